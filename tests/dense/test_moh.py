"""Mixture of heads against multi-head attention, its formula as a loop, and torch's own module."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape
from regard.dense.moh import (
    HeadRouter,
    MixtureOfHeads,
    NormRoutedHeads,
    active_head_flops,
    head_load_balance_loss,
    head_usage,
    norm_router,
)
from regard.errors import OptionError, ShapeError
from regard.masks import KeyPadding
from regard.registry import build

WIDTH, HEADS, LENGTH = 24, 6, 11


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(shared: int, routed: int, **options: object) -> MixtureOfHeads:
    """A layer whose router has been trained, as it were: its weights are not zero."""
    torch.manual_seed(0)
    made = MixtureOfHeads(WIDTH, HEADS, shared, routed, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.router.parameters() if made.router is not None else ():
            parameter.normal_()
    return made.eval()


def head_outputs(made: MixtureOfHeads, x: Tensor, causal: bool = False) -> Tensor:
    """Ordinary heads ``(batch, heads, length, head_dim)`` by torch."""
    split = [
        linear(x).view(*x.shape[:2], -1, made.head_dim).transpose(1, 2) for linear in (made.query, made.key, made.value)
    ]
    return F.scaled_dot_product_attention(*split, is_causal=causal, enable_gqa=True)


def formula_gates(made: MixtureOfHeads, row: Tensor, count: bool = True) -> list[float]:
    """The gates of one token, written from the paper's formulas in plain Python."""
    router, shared, k = made.router, made.shared_heads, made.routed_heads
    assert router is not None

    def softmax(weight: Tensor) -> list[float]:
        logits = [math.fsum(float(w * v) for w, v in zip(r, row, strict=True)) for r in weight.detach()]
        top = max(logits)
        total = sum(math.exp(v - top) for v in logits)
        return [math.exp(v - top) / total for v in logits]

    s = [1.0] * shared if shared < 2 else softmax(router.shared_logits.weight)  # type: ignore[union-attr]
    p = softmax(router.routed_logits.weight) if k else [0.0] * (HEADS - shared)  # type: ignore[union-attr]
    a = softmax(router.pair_logits.weight) if shared and k else None  # type: ignore[union-attr]
    chosen = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    total = sum(p[i] for i in chosen)
    gates = [v * (shared if count else 1) for v in s]
    gates += [(p[i] / total if i in chosen else 0.0) * (k if count else 1) for i in range(len(p))]
    if a is not None:
        both = 2 if count else 1
        gates = [g * both * (a[0] if i < shared else a[1]) for i, g in enumerate(gates)]
    return gates


@pytest.mark.paper("moh")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 2, 6])
def test_all_heads_and_a_zero_router_are_multi_head_attention(shared: int, causal: bool) -> None:
    made, x = MixtureOfHeads(WIDTH, HEADS, shared, HEADS - shared).double(), tokens()
    reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([m.weight for m in (made.query, made.key, made.value)]))
        reference.in_proj_bias.copy_(torch.cat([m.bias for m in (made.query, made.key, made.value)]))
        reference.out_proj.load_state_dict(made.out.state_dict())
    hidden = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64) if causal else None
    expected = reference(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(made(x, causal=causal), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("moh")
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(("shared", "routed"), [(0, 2), (1, 3), (2, 1), (3, 0), (2, 4)])
def test_both_executors_agree_forward_and_backward(shared: int, routed: int, kv_heads: int) -> None:
    made = layer(shared, routed, num_kv_heads=kv_heads, rotary=True)
    other = copy.deepcopy(made)
    other.executor = "gathered"
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 7:] = False
    per_head = torch.rand(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    for call in ({}, {"causal": True}, {"mask": KeyPadding(valid), "causal": True}, {"mask": per_head}):
        results = []
        for module in (made, other):
            x = tokens().requires_grad_()
            out = module(x, **call)
            (out.sin().sum() + module.balance_loss).backward()
            results.append((out.detach(), x.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.paper("moh")
def test_number_and_sums_of_gates() -> None:
    made, x = layer(2, 3), tokens()
    _, gates, _ = made.attend(x)
    assert bool(((gates != 0).sum(-1) == 5).all())
    assert bool((gates[..., :2] > 0).all())
    a = (x @ made.router.pair_logits.weight.T).softmax(-1)  # type: ignore[union-attr]
    torch.testing.assert_close(gates[..., :2].sum(-1), 2 * a[..., 0] * 2)
    torch.testing.assert_close(gates[..., 2:].sum(-1), 2 * a[..., 1] * 3)


@pytest.mark.paper("moh")
@pytest.mark.parametrize("gate_scale", ["count", "none"])
@pytest.mark.parametrize(("shared", "routed"), [(0, 2), (1, 3), (2, 3), (6, 0), (3, 0)])
def test_equals_the_formula_token_by_token(shared: int, routed: int, gate_scale: str) -> None:
    made, x = layer(shared, routed, gate_scale=gate_scale), tokens()
    out, gates, _ = made.attend(x)
    heads, columns = head_outputs(made, x), made.out.weight.view(WIDTH, HEADS, -1)
    for b in range(2):
        for t in range(LENGTH):
            expected = formula_gates(made, x[b, t], gate_scale == "count")
            torch.testing.assert_close(gates[b, t], torch.tensor(expected, dtype=torch.float64))
            y = sum((g * columns[:, i] @ heads[b, i, t] for i, g in enumerate(expected)), made.out.bias)
            torch.testing.assert_close(out[b, t], y)


@pytest.mark.paper("moh")
def test_balance_loss() -> None:
    uniform, spread = torch.full((4, 8), 1 / 8), torch.zeros(4, 8)
    for token in range(4):
        spread[token, 2 * token : 2 * token + 2] = 1
    assert float(head_load_balance_loss(uniform, spread)) == pytest.approx(2)
    one = torch.zeros(4, 8).index_fill(1, torch.tensor([0]), 1)
    assert float(head_load_balance_loss(one, one)) == pytest.approx(8)
    generator = torch.Generator().manual_seed(0)
    probs, mask = torch.rand(3, 5, 8, generator=generator).softmax(-1), torch.rand(3, 5, 8, generator=generator) < 0.3
    flat, hits = probs.view(15, 8), mask.view(15, 8).float()
    expected = sum(float(flat[:, e].mean() * hits[:, e].mean()) for e in range(8)) * 8
    assert float(head_load_balance_loss(probs, mask)) == pytest.approx(expected, rel=1e-5)
    # The released form: the mean over experts of P f, times E^2.
    released = float((flat.mean(0) * hits.mean(0)).mean() * 64)
    assert float(head_load_balance_loss(probs, mask)) == pytest.approx(released, rel=1e-5)


@pytest.mark.paper("moh")
@pytest.mark.parametrize("executor", ["masked", "gathered"])
@pytest.mark.parametrize("router", ["learned", "norm"])
def test_causal(router: str, executor: str) -> None:
    made = layer(2, 2, router=router, executor=executor)
    x, changed = tokens(), tokens()
    changed[:, 6:] = 3 * tokens(seed=9)[:, 6:]
    (before, gates, _), (after, others, _) = made.attend(x, causal=True), made.attend(changed, causal=True)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-12)
    torch.testing.assert_close(others[:, :6], gates[:, :6], rtol=0, atol=1e-12)
    assert float((after[:, 6:] - before[:, 6:]).abs().max()) > 1e-2


@pytest.mark.paper("moh")
@pytest.mark.parametrize(("shared", "routed"), [(2, 3), (4, 1)])
def test_parameter_overhead(shared: int, routed: int) -> None:
    plain = sum(p.numel() for p in nn.MultiheadAttention(WIDTH, HEADS).parameters())
    made = layer(shared, routed)
    assert sum(p.numel() for p in made.parameters()) - plain == WIDTH * (HEADS - shared) + WIDTH * shared + 2 * WIDTH
    tuned = MixtureOfHeads.from_pretrained(nn.MultiheadAttention(WIDTH, HEADS))
    assert sum(p.numel() for p in tuned.parameters()) == plain


@pytest.mark.paper("moh")
@pytest.mark.parametrize("bias", [True, False])
def test_from_pretrained_gates_the_heads_of_the_torch_module(bias: bool) -> None:
    mha = nn.MultiheadAttention(32, 8, bias=bias, batch_first=True).double()
    nn.init.normal_(mha.in_proj_weight)  # numbers that float32 does not hold
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    everything = MixtureOfHeads.from_pretrained(mha, 0.5, 1.0)
    torch.testing.assert_close(everything(x), mha(x, x, x, need_weights=False)[0], rtol=1e-10, atol=1e-10)
    made = MixtureOfHeads.from_pretrained(mha)
    assert (made.shared_heads, made.routed_heads) == (4, 2)
    out, gates, _ = made.attend(x)
    queries = (x @ mha.in_proj_weight[:32].T + (mha.in_proj_bias[:32] if bias else 0)).view(2, 7, 8, 4)
    chosen = queries.norm(dim=-1)[..., 4:].topk(2).indices + 4
    expected = torch.zeros(2, 7, 8, dtype=torch.float64).scatter(-1, chosen, 1)
    expected[..., :4] = 1
    torch.testing.assert_close(gates, expected)
    columns = mha.out_proj.weight.view(32, 8, 4)
    y = torch.einsum("bth,bhtd,chd->btc", expected, head_outputs(made, x), columns)
    torch.testing.assert_close(out, y if mha.out_proj.bias is None else y + mha.out_proj.bias)


def test_norm_router_probabilities_and_gradient() -> None:
    query = torch.randn(1, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    gates, probs, mask = norm_router(query, 2, 1)
    norms = query[0, 2:].norm(dim=-1).T
    for t in range(3):
        deviation = math.sqrt(sum((float(n) - float(norms[t].mean())) ** 2 for n in norms[t]) / 2)
        torch.testing.assert_close(probs[0, t], (norms[t] / deviation).softmax(-1))
    assert torch.equal(gates[0, :, 2:], mask[0])
    # Straight through: the gradient is that of the probabilities.
    seed = torch.randn(1, 3, 5, dtype=torch.float64)
    through = torch.autograd.grad(gates, query, seed, retain_graph=True)[0]
    torch.testing.assert_close(through, torch.autograd.grad(probs, query, seed[..., 2:])[0])


def test_norm_router_without_spread_stays_finite() -> None:
    query = torch.ones(1, 4, 3, 2, requires_grad=True)
    gates, probs, _ = norm_router(query * torch.tensor([1.0, 0.0, 1e-30])[:, None], 1, 2)
    gates.square().sum().backward()
    torch.testing.assert_close(probs, torch.full((1, 3, 3), 1 / 3))
    assert query.grad is not None and bool(query.grad.isfinite().all())


def test_norm_router_trains_all_heads_whatever_the_executor() -> None:
    grads = []
    for executor in ("masked", "gathered"):
        torch.manual_seed(0)
        made = MixtureOfHeads(WIDTH, HEADS, 2, 2, router="norm", executor=executor).double()  # type: ignore[arg-type]
        made(tokens()).sin().sum().backward()
        grads.append(made.query.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_the_mechanism_keeps_what_it_chooses_of_full_attention() -> None:
    torch.manual_seed(3)
    query = torch.randn(2, 8, 9, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 4, 9, 4, dtype=torch.float64)
    made = build("moh_norm", {"shared_fraction": 0.25, "active_fraction": 0.5}, num_heads=8).eval()
    full = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    top = query[:, 2:].norm(dim=-1).topk(2, dim=1).indices + 2
    on = torch.zeros(2, 8, 9, dtype=torch.float64).scatter(1, top, 1)
    on[:, :2] = 1
    torch.testing.assert_close(made(query, key, value, causal=True), full * on[..., None])
    torch.testing.assert_close(made.train()(query, key, value, causal=True), full * on[..., None])
    shape = AttentionShape(9, 9, 8, 4)
    assert made.cost(shape).flops == 4 * 9 * 9 * 8 * 4 // 2  # type: ignore[operator]


@pytest.mark.paper("moh")
def test_flops_fall_to_the_active_share() -> None:
    full = active_head_flops(100, 64, 4, 4)
    assert full == 2 * (2 * 100 * 100 * 64)
    assert active_head_flops(100, 64, 4, 3) * 4 == full * 3
    made = layer(1, 2)
    usage = head_usage(made.attend(tokens())[1])
    assert usage["active"] == pytest.approx(3)
    assert usage["share"][0] == 1 and sum(usage["share"][1:]) == pytest.approx(2)


def test_the_gathered_executor_computes_fewer_scores() -> None:
    """Counted by torch on written-out softmax, where routing is even: two of four heads, each half the time."""
    from torch.utils.flop_counter import FlopCounterMode

    import regard.kernels

    made = MixtureOfHeads(32, 4, 0, 2, bias=False, head_dim=8)
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        x[:, ::2, 0], x[:, 1::2, 0] = 9, -9
        made.router.routed_logits.weight[:2, 0] = 1  # type: ignore[union-attr]
        made.router.routed_logits.weight[2:, 0] = -1  # type: ignore[union-attr]
    counts = []
    for executor in ("masked", "gathered"):
        made.executor = executor
        with regard.kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
            made(x)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == active_head_flops(64, 32, 4, 2)


def test_a_pass_leaves_nothing_that_cannot_be_copied() -> None:
    made = layer(1, 2)
    made(tokens())
    assert made.balance_loss is not None and made.balance_loss.requires_grad
    twin = copy.deepcopy(made)
    assert twin.balance_loss is None
    torch.testing.assert_close(twin(tokens()), made(tokens()))


def test_half_precision_and_rows_with_nothing_to_see() -> None:
    made, nothing = layer(1, 2), torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    nothing[:, 0] = torch.arange(LENGTH) > 3
    for executor in ("masked", "gathered"):
        made.executor = executor
        out = made(tokens(), mask=nothing)
        torch.testing.assert_close(out[:, :4], made.out.bias.expand(2, 4, -1))
        coarse = copy.deepcopy(made).bfloat16()(tokens().bfloat16(), mask=nothing)
        assert coarse.dtype == torch.bfloat16 and bool(coarse.isfinite().all())


@pytest.mark.parametrize(
    "options",
    [
        {"shared_heads": 7},
        {"shared_heads": 0, "routed_heads": 0},
        {"shared_heads": 2, "routed_heads": 5},
        {"executor": "fast"},
        {"router": "random"},
        {"gate_scale": "mean"},
        {"num_kv_heads": 4},
    ],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        MixtureOfHeads(WIDTH, HEADS, **options)  # type: ignore[arg-type]


def test_other_errors() -> None:
    with pytest.raises(OptionError, match="multiple"):
        MixtureOfHeads(10, 4)
    with pytest.raises(OptionError, match="k <= routed_total"):
        HeadRouter(8, 1, 2, 3)
    with pytest.raises(OptionError, match="shared_fraction"):
        NormRoutedHeads(8, 0.75, 0.5)
    with pytest.raises(OptionError, match="plain self-attention"):
        MixtureOfHeads.from_pretrained(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(ShapeError):
        layer(1, 2)(torch.randn(2, 3, 5, dtype=torch.float64))
    with pytest.raises(ShapeError, match="built for 4 heads"):
        NormRoutedHeads(4)(*torch.randn(3, 1, 8, 3, 4))
