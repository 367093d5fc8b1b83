"""GRAT against dense attention under its expanded mask, its limits, densities and text; and inside models."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape
from regard.errors import OptionError, RetrofitError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import use_backend
from regard.local.grat import GRAT, grat_attention, grat_block_mask, group_tokens, ungroup_tokens
from regard.nn import MultiHeadAttention
from regard.retrofit.grat import apply_grat

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
SETTINGS = [
    ((8, 12), (4, 4), "cross", 1),
    ((7, 10), (3, 4), "cross", 1),
    ((8, 12), (2, 3), "block", 1),
    ((9, 11), (2, 2), "block", 2),
    ((4, 6, 6), (2, 3, 2), "cross", 1),
    ((3, 5, 7), (2, 2, 3), "block", 1),
]


def expanded(shape, group, kind: str, radius: int, text: int = 0) -> Tensor:
    """Token pairs from the definition, by loops over tokens; text last."""
    cells = [tuple(i // g for i, g in zip(t, group, strict=True)) for t in itertools.product(*map(range, shape))]

    def seen(p: tuple[int, ...], q: tuple[int, ...]) -> bool:
        if kind == "cross":
            return any(a == b for a, b in zip(p, q, strict=True))
        return all(abs(a - b) <= radius for a, b in zip(p, q, strict=True))

    return F.pad(torch.tensor([[seen(p, q) for q in cells] for p in cells]), (0, text, 0, text), value=True)


def inputs(tokens: int, heads: int = 2, dim: int = 8, batch: int = 2, grad: bool = False) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, dim, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


@pytest.mark.paper("grat")
@pytest.mark.parametrize(("shape", "group"), [((8, 12), (4, 3)), ((7, 10), (3, 4)), ((4, 6, 5), (2, 3, 2))])
def test_group_then_ungroup_is_the_identity(shape, group) -> None:
    x = torch.randn(2, 3, math.prod(shape), 5)
    grouped = group_tokens(x, shape, group)
    assert torch.equal(ungroup_tokens(grouped, shape, group), x)
    tokens = list(itertools.product(*map(range, shape)))
    first = [i for i, t in enumerate(tokens) if all(a < g for a, g in zip(t, group, strict=True))]
    assert torch.equal(grouped[:, :, : len(first)], x[:, :, first])


def test_the_mechanism_groups_as_the_functions_do() -> None:
    shape, group = (7, 10), (3, 4)
    order, _ = GRAT(group).plan(shape, torch.device("cpu"))
    x = torch.randn(1, 2, 70, 3)
    real = order.valid[:, None]
    assert torch.equal(order.apply(x) * real, group_tokens(x, shape, group))


@pytest.mark.paper("grat")
@pytest.mark.parametrize(
    ("shape", "group", "kind", "radius"),
    [
        ((4, 12), (4, 3), "cross", 1),
        ((12, 4), (3, 4), "cross", 1),
        ((6, 8), (2, 2), "block", 3),
        ((2, 6, 4), (2, 3, 2), "cross", 1),
    ],
)
def test_full_attention_where_every_cell_is_seen(shape, group, kind, radius) -> None:
    q, k, v = inputs(math.prod(shape))
    out = grat_attention(q, k, v, shape, group, kind, radius)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **TIGHT)


@pytest.mark.paper("grat")
@pytest.mark.parametrize(("shape", "group", "kind", "radius"), SETTINGS)
@pytest.mark.parametrize("text", [0, 5, 40])
def test_equals_dense_attention_under_the_expanded_mask(shape, group, kind, radius, text) -> None:
    seen = expanded(shape, group, kind, radius, text)
    tensors = inputs(math.prod(shape) + text, grad=True)
    out = grat_attention(*tensors, shape, group, kind, radius, text, scale=0.3)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(out, expected, **TIGHT)
    seed = torch.randn_like(out)
    for grad, wanted in zip(*(torch.autograd.grad(o, tensors, seed) for o in (out, expected)), strict=True):
        torch.testing.assert_close(grad, wanted, **TIGHT)
    weights = GRAT(group, kind, radius, text=text).weights(*tensors[:2], grid=shape)[0, 0]
    assert torch.equal(weights > 0, seen)
    cells = [tuple(i // g for i, g in zip(t, group, strict=True)) for t in itertools.product(*map(range, shape))]
    for (p, row), (q, other) in itertools.combinations(list(zip(cells, weights > 0, strict=False))[:30], 2):
        assert p != q or torch.equal(row, other), "queries of one cell have one set of keys"


@pytest.mark.parametrize("backend", ["reference", "gather", "auto"])
def test_executors_agree(backend: str) -> None:
    shape, group, text = (9, 14), (4, 4), 7
    tensors = [t.float() for t in inputs(math.prod(shape) + text)]
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=expanded(shape, group, "cross", 1, text))
    with use_backend(backend):
        out = grat_attention(*tensors, shape, group, text=text)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.paper("grat")
def test_densities() -> None:
    assert float(grat_block_mask((64, 64), (8, 8)).double().mean()) == 15 / 64
    assert float(grat_block_mask((32, 48, 80), (4, 8, 8)).double().mean()) == 0.34375
    block = grat_block_mask((64, 64), 8, "block")
    assert block.sum(1).max() == 9 and int(block.sum()) == 22**2  # 8 cells an axis: twice 2 and six times 3
    clamped = grat_block_mask((64, 64), 8, "block", border="clamp")
    assert torch.equal(clamped.sum(1), torch.full((64,), 9))
    assert GRAT(8).pairs(*(torch.zeros(1, 1, 4096, 1),) * 2, grid=(64, 64)) == 15 / 64
    cost = GRAT(8).cost(AttentionShape(4096, 4096, 4, 32, grid=(64, 64)))
    assert cost.pairs == 15 / 64
    # Cells at the border hold fewer tokens: pairs are counted by tokens.
    seen = expanded((7, 10), (3, 4), "cross", 1, 6)
    share = GRAT((3, 4), text=6).pairs(*(torch.zeros(1, 1, 76, 1),) * 2, grid=(7, 10))
    assert share == pytest.approx(float(seen.double().mean()))


@pytest.mark.paper("grat")
def test_padded_text_is_never_seen_and_valid_text_by_all() -> None:
    shape, group, text = (6, 8), (2, 2), 7
    q, k, v = inputs(math.prod(shape) + text)
    valid = torch.ones(2, text, dtype=torch.bool)
    valid[0, 3:] = False
    padded, real = math.prod(shape) + 5, math.prod(shape) + 1
    run = {"shape": shape, "group": group, "text": text, "text_valid": valid}
    before = grat_attention(q, k, v, **run)
    for place, batch in ((padded, 0), (real, 0), (padded, 1)):
        other_k, other_v = k.clone(), v.clone()
        other_k[batch, :, place] += 1
        other_v[batch, :, place] -= 1
        moved = (grat_attention(q, other_k, other_v, **run) - before).abs().sum(-1)
        if (place, batch) == (padded, 0):
            assert not bool(moved.any())
        else:
            assert bool((moved[batch] > 0).all()) and not bool(moved[1 - batch].any())
    seen = expanded(shape, group, "cross", 1, text)
    keys = torch.cat((torch.ones(2, math.prod(shape), dtype=torch.bool), valid), 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen & keys[:, None, None])
    torch.testing.assert_close(before, expected, **TIGHT)


@pytest.mark.paper("grat")
def test_cells_of_one_token_make_a_criss_cross() -> None:
    shape = (5, 6)
    places = list(itertools.product(range(5), range(6)))
    cross = torch.tensor([[a == c or b == d for c, d in places] for a, b in places])
    assert torch.equal(grat_block_mask(shape, 1), cross)
    assert cross.sum(1).eq(5 + 6 - 1).all()


def test_text_of_the_block_mask() -> None:
    cells = grat_block_mask((4, 6), (2, 2))
    mask = grat_block_mask((4, 6), (2, 2), text=6)
    assert mask.shape == (8, 8) and torch.equal(mask[:6, :6], cells)
    assert bool(mask[6:].all()) and bool(mask[:, 6:].all())
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] * 5 + [False]])
    several = grat_block_mask((4, 6), (2, 2), text=6, text_valid=valid)
    assert several.shape == (3, 8, 8)
    assert torch.equal(several[:, 0, 6:], torch.tensor([[True, True], [True, False], [True, True]]))
    assert torch.equal(grat_block_mask((4, 6), (2, 2), text=6, text_valid=valid[1]), several[1])


@pytest.mark.parametrize("text_first", [False, True])
def test_text_before_or_behind_the_image(text_first: bool) -> None:
    shape, text = (6, 8), 5
    tensors = inputs(math.prod(shape) + text)
    out = GRAT(2, text=text, text_first=text_first)(*tensors, grid=shape)
    seen = expanded(shape, (2, 2), "cross", 1, text)
    if text_first:
        seen = seen.roll((text, text), (0, 1))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, attn_mask=seen), **TIGHT)


def test_clamped_border_keeps_the_number_of_cells() -> None:
    shape, tensors = (10, 12), inputs(120)
    out = GRAT(2, "block", border="clamp")(*tensors, grid=shape)
    starts = [[min(max(p - 1, 0), count - 3) for p in range(count)] for count in (5, 6)]
    cells = [(a // 2, b // 2) for a, b in itertools.product(range(10), range(12))]
    seen = torch.tensor([[all(0 <= q[a] - starts[a][p[a]] < 3 for a in (0, 1)) for q in cells] for p in cells])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, attn_mask=seen), **TIGHT)


class JointBlock(nn.Module):
    """A transformer on image and text tokens at once that calls torch's attention itself."""

    def __init__(self, text_first: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.text_first = nn.Linear(16, 48), nn.Linear(16, 16), text_first

    def forward(self, image: Tensor, text: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        x = torch.cat((text, image) if self.text_first else (image, text), 1)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        # Attention of other lengths stays what it is.
        own = F.scaled_dot_product_attention(q[:, :, :3], k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        attended = torch.cat((attended[:, :, :3] + own, attended[:, :, 3:]), 2)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("text_first", [False, True])
def test_a_model_that_calls_torch_itself(text_first: bool) -> None:
    model, image, text = JointBlock(text_first), torch.randn(2, 48, 16), torch.randn(2, 5, 16)
    valid = torch.ones(2, 53, dtype=torch.bool)
    valid[1, slice(2, 5) if text_first else slice(50, None)] = False
    before = model(image, text, valid[:, None, None])
    seen = expanded((6, 8), (2, 2), "cross", 1, 5)
    seen = seen.roll((5, 5), (0, 1)) if text_first else seen
    expected = model(image, text, seen & valid[:, None, None])
    with apply_grat(model, (6, 8), 2, text=5, text_first=text_first) as handle:
        assert handle.active
        torch.testing.assert_close(model(image, text, valid[:, None, None]), expected)
        assert list(handle.modules) == [""] and handle.modules[""].off_grid == 5
    assert torch.equal(model(image, text, valid[:, None, None]), before)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_such_a_model_is_told_what_cannot_be() -> None:
    model, image, text = JointBlock(), torch.randn(2, 48, 16), torch.randn(2, 5, 16)
    with apply_grat(model, (6, 8), 2, text=4), pytest.raises(RetrofitError, match="52 queries"):
        model(image, text)
    with apply_grat(model, (6, 8), 2, text=5):
        with pytest.raises(RetrofitError, match="dropout"):
            model(image, text, dropout=0.1)
        with pytest.raises(UnsupportedMaskError, match="bias"):
            model(image, text, torch.randn(53, 53))
        with pytest.raises(UnsupportedPatternError, match="causal"):
            model(image, text, torch.ones(53, 53, dtype=torch.bool).tril())
        with torch.autocast("cpu", torch.bfloat16):
            assert model(image, text).dtype == torch.bfloat16
    model(image, text, dropout=0.1)


@pytest.mark.parametrize("host", ["torch", "regard"])
def test_models_that_retrofit_reaches(host: str) -> None:
    model: Any = nn.MultiheadAttention(16, 2, batch_first=True) if host == "torch" else MultiHeadAttention(16, 2)
    x, seen = torch.randn(2, 53, 16), expanded((6, 8), (2, 2), "block", 1, 5)

    def run(mask: Tensor | None) -> Tensor:
        if host == "torch":
            out: Tensor = model(x, x, x, attn_mask=None if mask is None else ~mask, need_weights=False)[0]
            return out
        return model(x, mask=mask)

    before, expected = run(None), run(seen)
    with apply_grat(model, (6, 8), 2, "block", text=5):
        torch.testing.assert_close(run(None), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(None), before)


def test_bad_options_teach() -> None:
    q, k, v = inputs(48)
    for options in ({"kind": "star"}, {"radius": -1}, {"border": "wrap"}, {"group": 0}, {"text": -1}):
        with pytest.raises(OptionError):
            GRAT(**options)
    with pytest.raises(OptionError, match="2 axes"):
        GRAT((4, 8, 8))(q, k, v, grid=(6, 8))
    with pytest.raises(ShapeError, match="beside the grid"):
        GRAT(2, text=3)(q, k, v, grid=(6, 8))
    with pytest.raises(ShapeError, match="grid="):
        GRAT(2)(q, k, v)
    with pytest.raises(ShapeError, match="text=2"):
        GRAT(2, shape=(6, 8), text=2)(q, k, v)
    with pytest.raises(ShapeError, match="2 or 3 axes"):
        GRAT(2, shape=(48,))
    with pytest.raises(ShapeError, match="text_valid"):
        grat_attention(q, k, v, (5, 8), 2, text=8, text_valid=torch.ones(8, dtype=torch.bool))
    with pytest.raises(ShapeError, match="text_valid"):
        grat_block_mask((4, 4), 2, text=3, text_valid=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="Grouping"):
        group_tokens(q, (5, 8), 2)
    with pytest.raises(ShapeError, match="Cells"):
        ungroup_tokens(q, (5, 9), 2)
    with pytest.raises(UnsupportedPatternError):
        GRAT(2)(q, k, v, causal=True, grid=(6, 8))
    with pytest.raises(ShapeError, match="grid"):
        GRAT(2).cost(AttentionShape(48, 48))
    assert "cross" in repr(GRAT(2))
