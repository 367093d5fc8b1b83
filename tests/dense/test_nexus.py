"""Nested attention against explicit loops from the formula, torch's own attention, and what follows from either."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.composition import FunctionComposition, function_composition_task
from regard.dense.nexus import NexusAttention, logit_context_dependence, nexus_from_pretrained
from regard.errors import OptionError, ShapeError
from regard.masks import KeyPadding, SlidingWindow
from regard.nn import MultiHeadAttention

WIDTH, HEADS, LENGTH = 12, 3, 7


def tokens(seed: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: Any) -> NexusAttention:
    torch.manual_seed(0)
    made = NexusAttention(WIDTH, HEADS, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def heads_of(linear: nn.Module, x: Tensor) -> list[Tensor]:
    return list(linear(x).chunk(HEADS, -1))


def attend(query: list[Tensor], key: list[Tensor], value: list[Tensor], causal: bool) -> list[Tensor]:
    """softmax(q k^T / sqrt(d)) v, head by head."""
    outs = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        outs.append(scores.softmax(-1) @ v)
    return outs


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("causal", [False, True])
def test_order_one_is_multi_head_attention(causal: bool) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    nn.init.normal_(plain.in_proj_bias)
    hidden = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64) if causal else None
    expected = plain(tokens(), tokens(), tokens(), attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(nexus_from_pretrained(plain, order=1)(tokens(), causal=causal), expected)


@pytest.mark.paper("nexus")
def test_shared_weights_cost_no_parameters() -> None:
    plain = count(nn.MultiheadAttention(WIDTH, HEADS))
    for order in (1, 2, 3, 5):
        assert count(layer(order=order)) == plain
    triple = 3 * (WIDTH * WIDTH + WIDTH)
    assert count(layer(order=2, share_weights=False)) == plain + 2 * triple
    assert count(layer(order=3, share_weights=False)) == plain + 6 * triple
    # Inner outputs taken as they are leave the outer W_Q and W_K no part.
    bare = layer(order=2, share_weights=False, reproject=False, inner_residual=False)
    assert count(bare) == plain + 2 * triple - 2 * triple // 3


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nest", [("q", "k"), ("q",), ("k",)])
def test_shared_recursion_is_its_formula(nest: tuple[str, ...], causal: bool) -> None:
    """Order 3 unrolled by hand, with the inner output projected again."""
    made, x = layer(order=3, nest=nest), tokens()
    query, key, value = (heads_of(linear, x) for linear in (made.maps.query, made.maps.key, made.maps.value))
    for _ in range(2):
        hidden = x + torch.cat(attend(query, key, value, causal), -1)
        query = heads_of(made.maps.query, hidden) if "q" in nest else query
        key = heads_of(made.maps.key, hidden) if "k" in nest else key
    torch.testing.assert_close(made(x, causal=causal), made.out(torch.cat(attend(query, key, value, causal), -1)))


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reproject", [False, True])
def test_separate_weights_are_their_formula(residual: bool, reproject: bool) -> None:
    made, x = layer(order=2, share_weights=False, inner_residual=residual, reproject=reproject), tokens()
    nested = []
    for branch in ("q", "k"):
        inner = made.maps.inner[branch]
        linear = made.maps.query if branch == "q" else made.maps.key
        below = attend(*(heads_of(m, x) for m in (inner.query, inner.key, inner.value)), causal=True)  # type: ignore[arg-type]
        if reproject:
            assert linear is not None
            hidden = torch.cat(below, -1)
            nested.append(heads_of(linear, x + hidden if residual else hidden))
        elif residual:
            assert linear is not None
            nested.append([u + q for u, q in zip(below, heads_of(linear, x), strict=True)])
        else:
            nested.append(below)
    expected = torch.cat(attend(nested[0], nested[1], heads_of(made.maps.value, x), causal=True), -1)
    torch.testing.assert_close(made(x, causal=True), made.out(expected))


@pytest.mark.paper("nexus")
def test_logits_depend_on_context_from_order_two_on() -> None:
    x = tokens()
    for causal in (False, True):
        assert not bool(logit_context_dependence(layer(order=1), x, 2, causal=causal).any())
    others = [i for i in range(LENGTH) if i != 2]
    for options in ({}, {"nest": ("q",)}, {"share_weights": False}, {"reproject": False}):
        moved = logit_context_dependence(layer(order=2, **options), x, 2)  # type: ignore[arg-type]
        assert float(moved[others][:, others].min()) > 1e-4
    # With a causal mask the third token reaches pairs that have a later member, and no others.
    moved = logit_context_dependence(layer(order=2), x, 2, causal=True)
    assert not bool(moved[:2, :2].any())
    assert float(moved[3:, others].min()) > 1e-5


@pytest.mark.paper("nexus")
def test_order_one_logits_have_the_rank_of_a_head_and_nested_ones_no_fixed_form() -> None:
    """Order 1: x_i^T B x_j with B = W_Q^T W_K / sqrt(d), of rank d at most. Order 2 is no such form of its input."""
    x, dim = tokens(length=40), WIDTH // HEADS
    for order, fits in ((1, True), (2, False)):
        made = layer(order=order, bias=False)
        assert made.maps.query is not None and made.maps.key is not None
        form = made.maps.query.weight[:dim].T @ made.maps.key.weight[:dim] / math.sqrt(dim)
        assert int(torch.linalg.matrix_rank(form.detach())) == dim < WIDTH
        logits = made.logits(x)[:, 0]
        assert torch.allclose(x @ form @ x.transpose(1, 2), logits) == fits
        # No other form fits either: least squares over all B on one sequence.
        pairs = torch.einsum("id,je->ijde", x[0], x[0]).flatten(2).flatten(0, 1)
        best = torch.linalg.lstsq(pairs, logits[0].flatten()[:, None].detach()).solution
        rest = float((pairs @ best - logits[0].flatten()[:, None]).detach().norm() / logits[0].detach().norm())
        assert (rest < 1e-9) if fits else (rest > 0.02)


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [True, False])
def test_causal_for_every_order(order: int, share: bool) -> None:
    made, x = layer(order=order, share_weights=share), tokens()
    changed = x.clone()
    changed[:, 4:] = 3 * tokens(9)[:, 4:]
    before, after = (made(t, causal=True) for t in (x, changed))
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-12)
    assert float((after[:, 4:] - before[:, 4:]).detach().abs().max()) > 1e-2


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"nest": ("q",)}, {"nest": ("k",)}, {"share_weights": False}, {"reproject": False}, {"gate_init": 0.5}],
    ids=str,
)
def test_cached_decoding_is_the_full_forward(order: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made, x = NexusAttention(WIDTH, HEADS // 3 * 2, order, rotary=True, **options).double().eval(), tokens()
    state, outs = made.init_state(2, like=x), []
    for part in x.split([1, 3, 1, 2], 1):
        out, state = made.step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), made(x, causal=True))
    if made.share_weights:  # the values once, the keys of every level where keys are nested
        assert len(state.caches) == 1 + (order if "k" in made.nest else 1)
    assert state.seen == LENGTH and state.nbytes() > 0


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_an_upgrade_leaves_the_function_unchanged(order: int, share: bool) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval()
    upgraded = nexus_from_pretrained(plain, order, share_weights=share)
    assert not upgraded.training
    expected = plain(tokens(), tokens(), tokens(), need_weights=False)[0]
    torch.testing.assert_close(upgraded(tokens()), expected, rtol=0, atol=1e-14)
    loss = upgraded(tokens()).square().sum()
    loss.backward()
    gate = upgraded.maps.gate
    assert gate is not None and gate.grad is not None and float(gate.grad.abs().min()) > 0
    with torch.no_grad():
        gate.fill_(0.5)
    assert float((upgraded(tokens()) - expected).detach().abs().max()) > 1e-3


@pytest.mark.paper("nexus")
def test_an_upgrade_of_a_host_keeps_its_positions() -> None:
    torch.manual_seed(0)
    host = MultiHeadAttention(WIDTH, 2, rotary=True, bias=False).double()
    upgraded = nexus_from_pretrained(host, 2, nest=("q",))
    torch.testing.assert_close(upgraded(tokens(), causal=True), host(tokens(), causal=True), rtol=0, atol=1e-14)
    assert count(upgraded) == count(host) + 2
    for wrong in (nn.Linear(3, 3), MultiHeadAttention(WIDTH, 2, num_kv_heads=1), MultiHeadAttention(WIDTH, 2, "moba")):
        with pytest.raises(OptionError):
            nexus_from_pretrained(wrong)
    with pytest.raises(OptionError, match="plain self-attention"):
        nexus_from_pretrained(nn.MultiheadAttention(WIDTH, 2, kdim=5))


@pytest.mark.paper("nexus")
@pytest.mark.parametrize("reproject", [True, False])
def test_uniform_inner_attention_gives_uniform_outer_weights(reproject: bool) -> None:
    """Zero inner scores give all tokens one inner output; without a residual all queries and keys are then equal.
    Under a causal mask inner outputs are running means, which differ."""
    made = layer(order=2, share_weights=False, inner_residual=False, reproject=reproject)
    with torch.no_grad():
        for branch in ("q", "k"):
            made.maps.inner[branch].query.weight.zero_()  # type: ignore[union-attr]
            made.maps.inner[branch].query.bias.zero_()  # type: ignore[union-attr]
    weights = made.weights(tokens())
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / LENGTH))
    causal = made.weights(tokens(), causal=True)
    rows = torch.ones(LENGTH, LENGTH).tril() / torch.arange(1, LENGTH + 1)[:, None]
    assert float((causal - rows).detach().abs().max()) > 1e-3


@pytest.mark.paper("nexus")
def test_inner_maps_and_how_many_attentions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        ran.append(1)
        kwargs.pop("mask")
        return F.scaled_dot_product_attention(*args, is_causal=kwargs["causal"])

    monkeypatch.setattr("regard.dense.nexus.dense_attention", counted)
    for options, expected in (
        ({"order": 1}, 1),
        ({"order": 2}, 2),
        ({"order": 4}, 4),
        ({"order": 2, "share_weights": False}, 3),
        ({"order": 3, "share_weights": False}, 7),
        ({"order": 3, "share_weights": False, "nest": ("k",)}, 3),
    ):
        made = layer(**options)  # type: ignore[arg-type]
        ran.clear()
        _, inner = made(tokens(), causal=True, return_inner=True)
        assert len(ran) == expected == made.attentions == len(inner) + 1
        for weights in inner:
            assert weights.shape == (2, HEADS, LENGTH, LENGTH) and not bool(weights.triu(1).any())
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    made = layer(order=2)
    plain = layer(order=1)
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(tokens(), return_inner=True)[1][0], plain.weights(tokens()))


def test_masks_hold_on_every_level() -> None:
    made, x = layer(order=3), tokens()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, 5:] = False
    torch.testing.assert_close(made(x, mask=KeyPadding(valid))[:, :5], made(x[:, :5]))
    # Windows of two tokens, three levels deep, reach three tokens back.
    changed = x.clone()
    changed[:, 0] += 1
    out, moved = (made(t, causal=True, mask=SlidingWindow(2)) for t in (x, changed))
    assert torch.equal(out[:, 4:], moved[:, 4:]) and not torch.equal(out[:, 3], moved[:, 3])


def test_composition_task() -> None:
    generator = torch.Generator().manual_seed(0)
    arguments, values, found = function_composition_task(6, 3, 4, generator)
    for row in range(4):
        table = dict(zip(arguments[row].tolist(), values[row].tolist(), strict=True))
        assert sorted(table) == sorted(table.values()) == list(range(6))
        assert found[row].tolist() == [table[table[table[i]]] for i in arguments[row].tolist()]
    inputs, targets = FunctionComposition(6, 2).batch(5, generator)
    assert inputs.shape == (5, 6, 12) and targets.shape == (5, 6)
    assert FunctionComposition().chance == 1 / 12
    with pytest.raises(OptionError):
        function_composition_task(1, 3, 4, generator)


def test_errors() -> None:
    for options in ({"order": 0}, {"nest": ()}, {"nest": ("v",)}, {"gate_init": 0.0, "inner_residual": False}):
        with pytest.raises(OptionError):
            NexusAttention(WIDTH, HEADS, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="multiple"):
        NexusAttention(WIDTH, 5)
    with pytest.raises(ShapeError):
        layer()(tokens()[..., :5])
    assert torch.equal(copy.deepcopy(layer())(tokens()), layer()(tokens()))
