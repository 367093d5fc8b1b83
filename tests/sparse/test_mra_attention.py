"""MRA: the refined matrix against plain loops, its limits, budgets and padding, and errors at equal cost."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.layers.tiles import tile_order
from regard.masks import Causal, KeyPadding
from regard.sparse.mra_attention import (
    MRA_PRESETS,
    MRAAttention,
    mra_attention,
    mra_decompose,
    mra_error,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
BLOCK = 8


def qkv(q_len: int = 48, k_len: int | None = None, kv_heads: int = 2, size: float = 1.5) -> tuple[Tensor, ...]:
    k_len = q_len if k_len is None else k_len
    query = size * torch.randn(2, 4, q_len, 6, dtype=torch.float64)
    key = size * torch.randn(2, kv_heads, k_len, 6, dtype=torch.float64)
    return query, key, torch.randn(2, kv_heads, k_len, 5, dtype=torch.float64)


def smooth(heads: int, length: int, rho: float, dim: int = 16) -> Tensor:
    """Three sequences ``(1, heads, length, dim)`` in which neighbours have correlation ``rho``, of unit variance."""
    x = torch.randn(3, 1, heads, length, dim, dtype=torch.float64)
    for i in range(1, length):
        x[..., i, :] = rho * x[..., i - 1, :] + (1 - rho**2) ** 0.5 * x[..., i, :]
    return x


def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def entries_by_loops(logits: Tensor, scales: tuple[int, ...], budgets: tuple[int, ...]) -> Tensor:
    """A_hat of one head, as the algorithm stands: boxes in a list, the best of them replaced by their children."""
    q_len, k_len = logits.shape

    def box(scale: int, i: int, j: int) -> Tensor:
        return logits[i * scale : (i + 1) * scale, j * scale : (j + 1) * scale]

    coarsest = scales[0]
    tops = [
        max(float(box(coarsest, i, j).mean()) for j in range(math.ceil(k_len / coarsest)))
        for i in range(math.ceil(q_len / coarsest))
    ]
    boxes = [(i, j) for i in range(math.ceil(q_len / coarsest)) for j in range(math.ceil(k_len / coarsest))]
    entries = torch.zeros_like(logits)
    for level, scale in enumerate(scales):
        for i, j in boxes:
            entries[i * scale : (i + 1) * scale, j * scale : (j + 1) * scale] = box(scale, i, j).mean().exp()
        if level == len(budgets):
            return entries
        ratio, below = scale // scales[level + 1], scales[level + 1]

        def rank(at: tuple[int, int], scale: int = scale) -> float:
            return float(box(scale, *at).mean()) - tops[at[0] * scale // coarsest]

        best = sorted(boxes, key=rank, reverse=True)[: budgets[level]]
        boxes = [
            (i * ratio + a, j * ratio + b)
            for i, j in best
            for a in range(ratio)
            for b in range(ratio)
            if (i * ratio + a) * below < q_len and (j * ratio + b) * below < k_len
        ]
    return entries


@pytest.mark.parametrize(
    ("scales", "budgets"), [((8, 1), (13,)), ((8, 1), (0,)), ((12, 4, 1), (7, 20)), ((8, 4), (9,))]
)
@pytest.mark.parametrize("lengths", [(48, 48), (45, 50)])
def test_decomposition_against_loops(
    scales: tuple[int, ...], budgets: tuple[int, ...], lengths: tuple[int, int]
) -> None:
    query, key, value = qkv(*lengths, kv_heads=4)
    logits = query @ key.transpose(-1, -2) / 6**0.5
    wanted = torch.stack([torch.stack([entries_by_loops(x, scales, budgets) for x in row]) for row in logits])
    torch.testing.assert_close(mra_decompose(logits, scales, budgets), wanted, **TIGHT)
    if scales[-1] == 1:
        out = wanted @ value / wanted.sum(-1, keepdim=True)
        torch.testing.assert_close(mra_attention(query, key, value, scales, budgets), out, **TIGHT)


@pytest.mark.paper("mra_attention")
@pytest.mark.parametrize("lengths", [(48, 48), (37, 37), (21, 38)])
def test_everything_refined_is_softmax(lengths: tuple[int, int]) -> None:
    query, key, value = qkv(*lengths)
    wanted = full(query, key, value)
    for mode in ("full", "sparse"):
        torch.testing.assert_close(mra_attention(query, key, value, (8, 1), (100,), mode), wanted, **TIGHT)
        torch.testing.assert_close(mra_attention(query, key, value, (12, 4, 1), (100, 900), mode), wanted, **TIGHT)
        torch.testing.assert_close(mra_attention(query, key, value, (1,), (), mode), wanted, **TIGHT)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(mra_decompose(logits, (1,)), logits.exp(), **TIGHT)


@pytest.mark.paper("mra_attention")
@pytest.mark.parametrize("length", [48, 43])
def test_constant_blocks_need_no_budget(length: int) -> None:
    """Short last blocks count as often as they have tokens."""
    query, key, value = qkv(length)
    query, key = (t[:, :, ::BLOCK].repeat_interleave(BLOCK, 2)[:, :, :length] for t in (query, key))
    found = mra_attention(query, key, value, (BLOCK, 1), (0,))
    torch.testing.assert_close(found, full(query, key, value), **TIGHT)


@pytest.mark.paper("mra_attention")
def test_coefficients_are_below_the_mean() -> None:
    logits = 2 * torch.randn(3, 45, 50, dtype=torch.float64)
    coarse = mra_decompose(logits, (BLOCK,))
    for i in range(0, 45, BLOCK):
        for j in range(0, 50, BLOCK):
            mean = logits[:, i : i + BLOCK, j : j + BLOCK].exp().mean((1, 2))
            box = coarse[:, i : i + BLOCK, j : j + BLOCK]
            assert bool((box <= mean[:, None, None]).all()) and bool((box == box[:, :1, :1]).all())


@pytest.mark.paper("mra_attention")
@pytest.mark.parametrize("relative", [True, False])
def test_budget_of_a_head(relative: bool) -> None:
    """Exactly m blocks a head; rows share them as they need, and may get none."""
    query, key, value = qkv(64)
    query[:, :, :BLOCK] += 3 * key.repeat_interleave(2, 1)[:, :, :BLOCK]
    for budget in (0, 5, 13, 64, 80):
        module = MRAAttention((BLOCK, 1), (budget,), relative=relative)
        visit = module.select(query, key, module.request(query, key, value)).visit
        assert bool((visit.sum((-2, -1)) == min(budget, 64)).all())
        assert bool((visit.sum(-1) == 0).any()) == (budget < 13 or (budget == 13 and not relative))
        weights = module.weights(query, key)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **TIGHT)
        assert bool((weights > 0).all())
    rows = MRAAttention((BLOCK, 1), blocks_per_row=2)
    assert rows.pairs(query, key) == pytest.approx(2 / 8)
    # With one block a row or more, a ranking that is relative leaves no row empty.
    visit = rows.select(query, key, rows.request(query, key, value)).visit
    assert bool((visit.sum(-1) >= 1).all()) and len(visit.sum(-1).unique()) > 1


@pytest.mark.paper("mra_attention")
@pytest.mark.parametrize("options", [{"blocks_per_row": 2}, {"budgets": (11,)}, {"scales": (8, 4, 1)}])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_padding(options: dict[str, object], mode: str) -> None:
    """Neither what stands in padding nor how much there is of it matters, on either side of a block's border."""
    length, options = 45, {"scales": (BLOCK, 1), "mode": mode, **options}
    query, key, value = qkv(length)
    wanted = mra_attention(query, key, value, **options)  # type: ignore[arg-type]
    for more in (2, 3, 20, 51):
        fill = 10 * torch.randn(3, 2, 4, more, 6, dtype=torch.float64)
        tensors = (
            torch.cat((query, fill[0]), 2),
            torch.cat((key, fill[1, :, :2]), 2),
            torch.cat((value, fill[2, :, :2, :, :5]), 2),
        )
        valid = torch.arange(length + more) < length
        for mask in (KeyPadding(valid.expand(2, -1)), valid & valid[:, None], valid.expand(length + more, -1)):
            found = mra_attention(*tensors, mask=mask, **options)  # type: ignore[arg-type]
            torch.testing.assert_close(found[:, :, :length], wanted, **TIGHT)


@pytest.mark.paper("mra_attention")
def test_error_falls_with_the_budget() -> None:
    """On average over inputs; and on smooth ones the coarse part helps."""
    query, key, value = smooth(24, 128, 0.95)
    exact = full(query, key, value)

    def error(mode: str, rows: int) -> float:
        found = mra_attention(query, key, value, (BLOCK, 1), mode=mode, blocks_per_row=rows)  # type: ignore[arg-type]
        return float(((found - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).mean())

    errors = [error("full", rows) for rows in (0, 1, 2, 4, 8, 16)]
    assert all(more < less for less, more in pairwise(errors)) and errors[-1] < 1e-9
    rough = torch.randn(3, 1, 24, 128, 16, dtype=torch.float64)
    matrix = [mra_error(*rough, (BLOCK, 1), blocks_per_row=rows).matrix["full"] for rows in (0, 2, 6, 16)]
    assert all(more < less for less, more in pairwise(matrix))
    for rows in (1, 2, 4, 8):
        assert error("full", rows) <= error("sparse", rows)


def test_sparse_form_is_softmax_over_the_chosen_blocks() -> None:
    query, key, value = qkv(45)
    module = MRAAttention((BLOCK, 1), (4,), "sparse")
    seen = module.select(query, key, module.request(query, key, value)).dense()
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 6**0.5).masked_fill(~seen, float("-inf"))
    wanted = scores.softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(module(query, key, value), wanted, **TIGHT)
    assert not bool(seen.any(-1).all())


def test_first_and_diagonal_blocks_come_first() -> None:
    query, key, value = qkv(64)
    row, column = torch.arange(8)[:, None], torch.arange(8)
    for options, prior in (
        ({"first": 1}, (row < 1) | (column < 1)),
        ({"diagonal": 1}, row == column),
        ({"diagonal": 3}, (row - column).abs() <= 1),
        ({"first": 2, "diagonal": 1}, (row < 2) | (column < 2) | (row == column)),
    ):
        for budget in (5, int(prior.sum()), 40):
            module = MRAAttention((BLOCK, 1), (budget,), **options)
            visit = module.select(query, key, module.request(query, key, value)).visit
            assert bool((visit.sum((-2, -1)) == budget).all())
            assert bool((visit[..., prior].sum(-1) == min(budget, int(prior.sum()))).all())
        fine = MRAAttention((BLOCK, 4, 1), (40, int(prior.sum()) * 4), **options)
        visit = fine.select(query, key, fine.request(query, key, value)).visit
        assert torch.equal(visit, prior.repeat_interleave(2, 0).repeat_interleave(2, 1).expand_as(visit))


@pytest.mark.parametrize("scales", [(8, 1), (8, 4, 1)])
def test_causal(scales: tuple[int, ...]) -> None:
    """The blocks of the queries are exact, those before exact or coarse; later blocks change nothing."""
    query, key, value = qkv(61)
    module = MRAAttention(scales, blocks_per_row=2)
    weights = module.weights(query, key, causal=True)
    assert not bool(weights[~Causal().dense(61, 61).expand_as(weights)].any())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **TIGHT)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    out = module(query, key, value, causal=True)
    known = 2 * scales[-2]  # two blocks a row cover the first two rows
    torch.testing.assert_close(out[:, :, :known], exact[:, :, :known], **TIGHT)
    assert float((out - exact).abs().max()) > 1e-3
    cut = [torch.cat((t[:, :, :40], torch.randn_like(t[:, :, 40:])), 2) for t in (query, key, value)]
    torch.testing.assert_close(module(*cut, causal=True)[:, :, :40], out[:, :, :40], **TIGHT)
    shared = MRAAttention((BLOCK, 1), (20,))
    visit = shared.select(query, key, shared.request(query, key, value, causal=True)).visit
    assert visit.sum(-1)[0, 0].tolist() == [1, 2, 2, 3, 2, 3, 2, 3]


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_patches_of_an_image(grid: tuple[int, int]) -> None:
    """Patches in place of strips: as if the tokens came patch by patch, borders padded."""
    query, key, value = qkv(math.prod(grid))
    order = tile_order(grid, (2, 4), (1, 1), torch.device("cpu"))
    valid = order.valid.expand(2, -1)
    hidden = torch.rand(2, math.prod(grid)) < 0.8
    module, plain = MRAAttention((8, 1), blocks_per_row=2, tile=(2, 4)), MRAAttention((8, 1), blocks_per_row=2)
    moved = [order.apply(t) for t in (query, key, value)]
    for mask in (None, KeyPadding(hidden), hidden[:, None, None].expand(2, 1, math.prod(grid), -1)):
        shown = valid if mask is None else valid & hidden[:, order.order]
        wanted = order.undo(plain(*moved, mask=KeyPadding(shown)))
        found = module(query, key, value, grid=grid, mask=mask)
        torch.testing.assert_close(found, wanted, **TIGHT)
    assert 0 < module.pairs(query, key, grid=grid) < 0.5
    torch.testing.assert_close(module(query, key, value), plain(query, key, value), **TIGHT)
    with pytest.raises(ShapeError, match="grid of 2 axes"):
        module(query, key, value, grid=(math.prod(grid),))


def test_gradients_reach_both_parts() -> None:
    leaves = [t[:1].requires_grad_() for t in qkv(21)]
    for options in ({"budgets": (3,)}, {"budgets": (0,)}, {"scales": (8, 4, 1), "budgets": (4, 6)}):
        module = MRAAttention(**{"scales": (BLOCK, 1), **options})  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(lambda q, k, v, m=module: m(q, k, v), leaves, fast_mode=True)


def test_large_logits() -> None:
    """Coarse and fine part are merged without overflow, whichever is larger."""
    query, key, value = (t.float() for t in qkv(48, size=200.0))
    for budget in (0, 4, 20):
        out = mra_attention(query, key, value, (BLOCK, 1), (budget,))
        exact = mra_attention(query.double(), key.double(), value.double(), (BLOCK, 1), (budget,))
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


def test_errors_at_equal_cost() -> None:
    query, key, value = smooth(2, 64, 0.9)
    found = mra_error(query, key, value, (BLOCK, 1), (24,))
    assert found.pairs == pytest.approx(24 * 64 / 64 + 1)
    exact = full(query, key, value)
    for mode in ("full", "sparse"):
        out = mra_attention(query, key, value, (BLOCK, 1), (24,), mode)
        wanted = float(((out - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).mean())
        assert found.output[mode] == pytest.approx(wanted)
    matrix = (query @ key.transpose(-1, -2) / 4).exp()
    left = torch.linalg.svdvals(matrix)[..., 12:].norm(dim=-1) / matrix.norm(dim=(-2, -1))
    assert found.matrix["rank"] == pytest.approx(float(left.mean()))
    kept = matrix.topk(25, -1).values
    lost = (matrix.square().sum((-2, -1)) - kept.square().sum((-2, -1))).sqrt() / matrix.norm(dim=(-2, -1))
    assert found.matrix["topk"] == pytest.approx(float(lost.mean()))
    assert found.matrix["topk"] < found.matrix["window"] < 1 and found.matrix["full"] < found.matrix["sparse"]


def test_names_and_options() -> None:
    assert isinstance(regard.create("mra_attention"), MRAAttention)
    query, key, value = qkv(200)
    outs = [MRAAttention(**options)(query, key, value) for options in MRA_PRESETS.values()]
    torch.testing.assert_close(outs[0], mra_attention(query, key, value), **TIGHT)
    torch.testing.assert_close(outs[1], mra_attention(query, key, value, mode="sparse"), **TIGHT)
    for options, words in (
        ({"scales": (32, 12, 1)}, "divisor"),
        ({"scales": (32, 8)}, "last scale"),
        ({"scales": ()}, "scales fall"),
        ({"budgets": (4, 4)}, "budgets are 1"),
        ({"budgets": (-1,)}, "budgets"),
        ({"mode": "coarse"}, "mode"),
        ({"diagonal": -1}, "negative"),
        ({"tile": (4, 4)}, "tile"),
    ):
        with pytest.raises(OptionError, match=words):
            MRAAttention(**options)
    with pytest.raises(OptionError, match="mode"):
        mra_decompose(torch.randn(8, 8), mode="coarse")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="q_len"):
        mra_decompose(torch.randn(8))
