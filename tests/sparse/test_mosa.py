"""MoSA against dense attention in its limits, against a loop over heads, and against the paper's own tables."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import use_backend
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Causal, KeyPadding
from regard.sparse.mosa import MoSA, MoSAHeads, chosen_tokens, expert_choice, head_flops, iso_flop_heads, kv_entries

WIDTH, DIM, HEADS = 12, 8, 3


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse_heads(sparsity: float = 4, **options: bool) -> MoSAHeads:
    return MoSAHeads(WIDTH, DIM, HEADS, sparsity, **options).double().eval()


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions on the first half of the channels, token by token."""
    rows = []
    for row, place in zip(x, places, strict=True):
        cos, sin = rotary_angles(1, DIM // 2, start=int(place), dtype=x.dtype)
        rows.append(torch.cat((apply_rotary(row[None, : DIM // 2], cos, sin)[0], row[DIM // 2 :])))
    return torch.stack(rows)


def by_the_formula(module: MoSAHeads, x: Tensor, chosen: list[list[list[int]]]) -> Tensor:
    """Sequence by sequence, head by head: gather, project, attend, gate, put back. ``chosen[b][h]``: tokens."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for h in range(module.num_heads):
            places = torch.tensor(chosen[b][h])
            if not len(places):
                continue
            query, key, value = (x[b, places] @ module.qkv[h]).chunk(3, -1)
            scores = rotate(query, places) @ rotate(key, places).T / math.sqrt(DIM)
            seen = places[:, None] >= places
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            gate = torch.sigmoid(x[b, places] @ module.router.weight[h])
            out[b].index_add_(0, places, gate[:, None] * (weights @ value) @ module.out[h])
    return out


def best(module: MoSAHeads, x: Tensor, k: int) -> list[list[list[int]]]:
    scores = (x @ module.router.weight.T).sigmoid().detach()
    return [
        [sorted(sorted(range(x.shape[1]), key=lambda t: -float(scores[b, t, h]))[:k]) for h in range(HEADS)]
        for b in range(len(x))
    ]


@pytest.mark.paper("mosa")
@pytest.mark.parametrize("length", [37, 9, 3, 1])
def test_equals_the_formula(length: int) -> None:
    module, x = sparse_heads(), tokens(length)
    k = min(max(length // 4, 2), length)
    torch.testing.assert_close(module(x), by_the_formula(module, x, best(module, x, k)))


@pytest.mark.paper("mosa")
def test_all_tokens_and_even_routers_are_half_of_causal_attention() -> None:
    module, x = sparse_heads(1), tokens(17)
    with torch.no_grad():
        module.router.weight.zero_()
    every = torch.arange(17)
    out = torch.zeros_like(x)
    for h in range(HEADS):
        for b in range(2):
            query, key, value = (x[b] @ module.qkv[h]).chunk(3, -1)
            query, key = rotate(query, every), rotate(key, every)
            heads = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
            out[b] += heads[0] @ module.out[h]
    torch.testing.assert_close(module(x), out / 2)


@pytest.mark.paper("mosa")
def test_all_tokens_are_gated_heads_summed() -> None:
    module, x = sparse_heads(1), tokens(17)
    cos, sin = rotary_angles(17, DIM // 2, dtype=torch.float64)
    out = torch.zeros_like(x)
    for h in range(HEADS):
        query, key, value = (x @ module.qkv[h]).chunk(3, -1)
        query, key = (
            torch.cat((apply_rotary(t[..., : DIM // 2], cos, sin), t[..., DIM // 2 :]), -1) for t in (query, key)
        )
        attention = (query @ key.mT / math.sqrt(DIM)).masked_fill(~torch.ones(17, 17).tril().bool(), float("-inf"))
        gate = torch.diag_embed((x @ module.router.weight[h]).sigmoid())
        out += gate @ attention.softmax(-1) @ value @ module.out[h]
    torch.testing.assert_close(module(x), out)


@pytest.mark.paper("mosa")
def test_each_head_uses_exactly_k_keys() -> None:
    module, x = sparse_heads(5), tokens(43)
    logits, indices = module.choose(x)
    assert indices.shape == (2, HEADS, 8) and bool((indices.diff(dim=-1) > 0).all())
    # What is not among a head's keys does not reach its output: all weights but one head's are taken away.
    for h in range(HEADS):
        leaf = x.clone().requires_grad_()
        alone = sparse_heads(5)
        alone.load_state_dict(module.state_dict())
        with torch.no_grad():
            alone.out[[n for n in range(HEADS) if n != h]] = 0
        alone.attend(leaf, logits.detach(), indices)[1].square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[1].any(-1).nonzero()[:, 0].tolist() == indices[1, h].tolist()
    layer = MoSA(WIDTH, 3, DIM, mosa_heads=HEADS, other_heads=0, sparsity=5)
    assert layer.kv_entries(43) == HEADS * 8 < HEADS * 43


@pytest.mark.paper("mosa")
def test_tokens_that_no_head_picks_get_zero() -> None:
    module, x = sparse_heads(8), tokens(40)
    served = torch.zeros(2, 40, dtype=torch.bool)
    served.scatter_(1, module.choose(x)[1].flatten(1), True)
    assert 0 < int(served.sum()) < served.numel()
    out = module(x)
    assert bool((out[~served] == 0).all()) and bool((out[served] != 0).any(-1).all())


@pytest.mark.paper("mosa")
def test_values_never_leak_membership_does_unless_the_router_is_causal() -> None:
    module, x = sparse_heads(4), tokens(32)
    changed = torch.cat((x[:, :20], 3 * tokens(12, seed=5)), 1)
    indices = module.choose(x)[1]

    def fixed(t: Tensor) -> Tensor:
        return module.attend(t, module.router(t).transpose(1, 2).gather(2, indices), indices)

    torch.testing.assert_close(fixed(changed)[:, :20], fixed(x)[:, :20], rtol=1e-12, atol=1e-12)
    assert float((module(changed) - module(x)).detach()[:, :20].abs().max()) > 1e-3
    module.causal_router = True
    with torch.no_grad():
        module.threshold.copy_(module.router(x).flatten(0, 1).quantile(0.75, 0))
    assert bool(module(x).any())
    for cut in range(1, 32):
        changed = torch.cat((x[:, :cut], 3 * tokens(32 - cut, seed=cut)), 1)
        torch.testing.assert_close(module(changed)[:, :cut], module(x)[:, :cut], rtol=1e-12, atol=1e-12)


@pytest.mark.paper("mosa")
def test_the_router_learns_through_the_gates_of_chosen_tokens_alone() -> None:
    module, x = sparse_heads(4), tokens(32)
    aim = tokens(32, seed=9)
    (module(x) * aim).sum().backward()
    # By hand: d/dw of r(x w) times what the head gives there, over the tokens it took.
    expected = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
    indices = module.choose(x)[1]
    for h in range(HEADS):
        alone = sparse_heads(4)
        alone.load_state_dict(module.state_dict())
        with torch.no_grad():
            alone.out[[n for n in range(HEADS) if n != h]] = 0
        given = (alone.attend(x, alone.choose(x)[0], indices) * aim).sum(-1).detach()
        for b in range(2):
            for t in indices[b, h]:
                gate = float((x[b, t] @ module.router.weight[h].detach()).sigmoid())
                expected[h] += given[b, t] * (1 - gate) * x[b, t]
    torch.testing.assert_close(module.router.weight.grad, expected)


@pytest.mark.paper("mosa")
def test_budgets_are_those_of_the_paper() -> None:
    # Its tables: heads of a 28M model at equal FLOPs, 9 heads of which 4 stay, length 1024.
    heads = [iso_flop_heads(9, 1024, 2**n, 4, embed_dim=512, head_dim=64) for n in range(1, 9)]
    assert heads == [13, 31, 69, 142, 276, 505, 848, 1277]
    assert kv_entries(1024, 4, 16, 16) == 5 * 1024 and kv_entries(1024, 9, 0, 1) == 9216
    core = head_flops(8192, 512, 64, 64) - 8 * 512 * 64 * 128 - 2 * 512 * 8192 - 64 * 128
    assert core / (4 * 64 * 8192**2) == pytest.approx(2.44e-4, rel=1e-2)
    assert chosen_tokens(10, 64) == 2 and chosen_tokens(1, 64) == 1 and chosen_tokens(100, 1) == 100


@pytest.mark.paper("mosa")
def test_flops_are_those_that_torch_counts() -> None:
    module, x = MoSAHeads(32, 8, 5, 4).eval(), torch.randn(1, 64, 32)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        module(x)
    gating = 5 * 8 * 16  # elementwise, so not counted by torch
    assert counter.get_total_flops() == 5 * head_flops(64, 32, 8, 4) - gating
    layer = MoSA(32, 4, 8, mosa_heads=5, other_heads=2, sparsity=4)
    assert layer.flops(64) == 5 * head_flops(64, 32, 8, 4) + 2 * head_flops(64, 32, 8)
    near = MoSA(32, 4, 8, mosa_heads=5, other_heads=2, sparsity=4, other="local")
    assert layer.flops(64) - near.flops(64) == 2 * 4 * 8 * 64 * (64 - 16)
    assert near.kv_entries(64) == 16 * 7


def test_expert_choice() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.3], [0.7, 0.1]])[None]
    values, indices = expert_choice(scores, 2)
    assert indices.tolist() == [[[1, 3], [0, 2]]]
    torch.testing.assert_close(values, torch.tensor([[[0.8, 0.7], [0.9, 0.3]]]))
    values, indices = expert_choice(scores, 2, include_first=True)
    assert indices.tolist() == [[[0, 1], [0, 2]]] and values[0, 0, 0] == 0.1
    two = torch.cat((scores, scores.masked_fill(torch.tensor([[0], [1], [1], [1]]).bool(), float("-inf"))))
    values, indices = expert_choice(two, torch.tensor([1, 2]))
    assert indices[0, 0, 0] == 1 and indices[1].tolist() == [[0, 0], [0, 0]]
    assert values.isneginf().tolist() == [[[False, True]] * 2] * 2
    for k in (0, 5):
        with pytest.raises(OptionError, match="can be chosen"):
            expert_choice(scores, k)
    with pytest.raises(ShapeError):
        expert_choice(scores[0], 1)


def test_the_first_token_is_taken_with_its_own_gate() -> None:
    module, x = sparse_heads(8, include_first=True), tokens(40)
    assert bool((module.choose(x)[1][..., 0] == 0).all())
    chosen = [
        [sorted({0, *[t for t in order if t][:4]}) for order in row]
        for row in (x @ module.router.weight.T).transpose(1, 2).argsort(dim=-1, descending=True).tolist()
    ]
    torch.testing.assert_close(module(x), by_the_formula(module, x, chosen))


def test_thresholds_follow_the_share_that_heads_take() -> None:
    module = MoSAHeads(WIDTH, DIM, HEADS, 8).double().train()
    for seed in range(30):
        module(tokens(64, batch=4, seed=seed))
    module.eval()
    x = tokens(512, batch=4, seed=99)
    expected = module.threshold.clone()
    module.causal_router = True
    kept = (module.choose(x)[0] > float("-inf")).double().sum(-1).mean() / 512
    assert float(kept) == pytest.approx(1 / 8, rel=0.15)
    assert torch.equal(module.threshold, expected), "thresholds stand still outside of training"


def test_a_training_step_decides_before_it_learns_its_threshold() -> None:
    module, x = sparse_heads(4, causal_router=True), tokens(32)
    with torch.no_grad():
        module.threshold.fill_(0.2)
    expected = module(x)
    torch.testing.assert_close(module.train()(x), expected)
    assert bool((module.threshold != 0.2).all())


@pytest.mark.parametrize("other", ["dense", "local"])
def test_step_by_step(other: str) -> None:
    layer = MoSA(WIDTH, 3, DIM, 4, 2, 4, other=other, window=6, causal_router=True, include_first=True)  # type: ignore[arg-type]
    layer = layer.double().eval()
    x = tokens(29)
    assert layer.sparse is not None
    with torch.no_grad():
        layer.sparse.threshold.copy_(layer.sparse.router(x).flatten(0, 1).quantile(0.8, 0))
    expected, state, outs = layer(x), layer.init_state(2, like=x), []
    for piece in x.split([1, 7, 1, 1, 15, 4], 1):
        out, state = layer.step(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    taken = layer.sparse.choose(x)[0] > float("-inf")
    assert state.sparse.counts().expand(2, 4).tolist() == taken.sum(-1).tolist()
    assert state.sparse.read().key.shape[2] == int(taken.sum(-1).max()) < 29


@pytest.mark.parametrize("options", [{}, {"causal_router": True}, {"include_first": True}])
def test_padding_has_no_part(options: dict[str, bool]) -> None:
    """A padded batch gives what its sequences give alone, whatever stands at the padding."""
    layer = MoSA(WIDTH, 4, DIM, mosa_heads=3, other_heads=1, sparsity=4, **options).double().eval()  # type: ignore[arg-type]
    x = tokens(20, batch=1)
    padded = torch.cat((x, torch.full((1, 13, WIDTH), 9.0, dtype=torch.float64)), 1)
    both = torch.cat((padded, tokens(33, batch=1, seed=3)))
    out = layer(both, mask=KeyPadding(torch.arange(33) < torch.tensor([[20], [33]])))
    torch.testing.assert_close(out[:1, :20], layer(x))
    torch.testing.assert_close(out[1:], layer(both[1:]))


def test_the_hybrid_is_the_sum_of_its_kinds() -> None:
    layer, x = MoSA(WIDTH, 4, DIM, mosa_heads=3, other_heads=2, sparsity=4).double().eval(), tokens(23)
    assert layer.sparse is not None and layer.qkv is not None and layer.out is not None
    query, key, value = (t.unflatten(-1, (2, DIM)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    cos, sin = rotary_angles(23, DIM // 2, dtype=torch.float64)
    query, key = (torch.cat((apply_rotary(t[..., : DIM // 2], cos, sin), t[..., DIM // 2 :]), -1) for t in (query, key))
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.sparse(x) + dense @ layer.out.weight.T)
    usual = MoSA(64, 8)
    assert (usual.other_heads, usual.mosa_heads, usual.head_dim) == (4, 32, 8)


def test_wrong_options_and_calls() -> None:
    with pytest.raises(OptionError, match="no multiple"):
        MoSA(10, 4)
    with pytest.raises(OptionError, match="Need a head"):
        MoSA(12, 4, mosa_heads=0, other_heads=0)
    with pytest.raises(OptionError, match="'dense' or 'local'"):
        MoSA(12, 4, other="sparse")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="sparsity"):
        MoSAHeads(12, 4, 2, 0.5)
    with pytest.raises(OptionError, match="rotate_fraction"):
        MoSAHeads(12, 4, 2, 2, rotate_fraction=2)
    with pytest.raises(OptionError, match="keep_dense"):
        iso_flop_heads(4, 64, 8, 5, embed_dim=8, head_dim=4)
    layer = MoSA(12, 4)
    with pytest.raises(ShapeError, match="MoSA takes"):
        layer(torch.randn(2, 5, 7))
    with pytest.raises(UnsupportedPatternError, match="causal attention alone"):
        layer(torch.randn(2, 5, 12), causal=False)
    with pytest.raises(UnsupportedMaskError):
        layer(torch.randn(2, 5, 12), mask=Causal())
    with pytest.raises(UnsupportedPatternError, match="causal_router=True"):
        layer.init_state(2, like=torch.randn(2, 1, 12))
    near = MoSA(12, 4, other="local", causal_router=True)
    with pytest.raises(OptionError, match="Give the window"):
        near.init_state(2, like=torch.randn(2, 1, 12))
