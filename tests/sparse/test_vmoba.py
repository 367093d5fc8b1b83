"""VMoBA: blocks of a video, selection in each scope against plain loops, and the merged executor."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention
from regard.masks import KeyPadding
from regard.sparse.vmoba import (
    VMoBAAttention,
    partition_video,
    select_pairs,
    unpartition_video,
    vmoba_gate,
    vmoba_partition_for_layer,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
GRID = (4, 6, 5)  # which no block below divides on every axis
SHAPES = [1, 3, (2, 3), (2, 2, 4)]
SCOPES = ["query", "head", "block", "all"]


def inputs(size: float = 1.0, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    length = math.prod(GRID)
    query = size * torch.randn(2, 4, length, dim, dtype=torch.float64)
    return query, size * torch.randn(2, 2, length, dim, dtype=torch.float64), torch.randn(2, 2, length, 5).double()


def sides(block: object) -> tuple[int, int, int]:
    if isinstance(block, int):
        return block, GRID[1], GRID[2]
    assert isinstance(block, tuple)
    return block if len(block) == 3 else (GRID[0], *block)


def block_of(block: object) -> Tensor:
    """The block of each token, counted row-major over blocks."""
    tile = sides(block)
    counts = [-(-n // s) for n, s in zip(GRID, tile, strict=True)]
    found = []
    for place in product(*(range(n) for n in GRID)):
        t, h, w = (p // s for p, s in zip(place, tile, strict=True))
        found.append((t * counts[1] + h) * counts[2] + w)
    return torch.tensor(found)


def seen_pairs(module: VMoBAAttention, query: Tensor, key: Tensor) -> Tensor:
    return module.weights(query, key, grid=GRID) > 0


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


@pytest.mark.paper("vmoba")
@pytest.mark.parametrize("block", SHAPES)
@pytest.mark.parametrize("scope", SCOPES)
def test_full_threshold_and_all_blocks_are_full_attention(block: object, scope: str) -> None:
    tensors = inputs(3.0)
    expected = dense(*tensors)
    module = VMoBAAttention(block, "threshold", scope, threshold=1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(module(*tensors, grid=GRID), expected, **TIGHT)
    assert module.pairs(*tensors, grid=GRID) == pytest.approx(1)
    if scope != "block":
        module = VMoBAAttention(block, "topk", scope, top_k=int(block_of(block).max()) + 1)  # type: ignore[arg-type]
        torch.testing.assert_close(module(*tensors, grid=GRID), expected, **TIGHT)


@pytest.mark.paper("vmoba")
@pytest.mark.parametrize("grid", [GRID, (1, 1, 7), (5, 3, 8)])
@pytest.mark.parametrize("block", [1, 2, (2, 3), (4, 4), (1, 1, 1), (2, 2, 4), (9, 9, 9)])
def test_partition_and_back(grid: tuple[int, int, int], block: int | tuple[int, ...]) -> None:
    x = torch.randn(2, math.prod(grid), 3, 4)
    assert torch.equal(unpartition_video(partition_video(x, grid, block), grid, block), x)


@pytest.mark.paper("vmoba")
@pytest.mark.parametrize("block", [2, (2, 5), (2, 3, 5), (2, 2, 5)])
def test_blocks_are_contiguous_cuboids(block: int | tuple[int, ...]) -> None:
    """Of a grid that they divide: each run of the permuted tokens is one, and the executor's columns are these runs."""
    places = torch.tensor(list(product(*(range(n) for n in GRID))))
    volume = math.prod(sides(block))
    runs = partition_video(places[None, :, None], GRID, block)[0, :, 0].split(volume)
    for run in runs:
        assert len({tuple(place) for place in run.tolist()}) == volume
        assert tuple((run.amax(0) - run.amin(0) + 1).tolist()) == sides(block)
    order = VMoBAAttention(block).order(len(places), GRID, torch.device("cpu"))
    assert torch.equal(places[order.order], torch.cat(runs)) and order.block == volume
    if isinstance(block, int):  # frames are consecutive tokens as they are
        assert torch.equal(torch.cat(runs), places)


def test_layers_take_turns() -> None:
    found = [vmoba_partition_for_layer(layer, 2, [3, 4], (1, 2, 3)) for layer in range(7)]
    assert found == [2, (3, 4), (1, 2, 3), 2, (3, 4), (1, 2, 3), 2]
    blocks = [VMoBAAttention(layer_index=layer).block for layer in range(4)]
    assert blocks == [1, (8, 8), (4, 8, 8), 1]


@pytest.mark.paper("vmoba")
@pytest.mark.parametrize("block", SHAPES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", ["threshold", "topk"])
def test_every_query_attends_to_its_own_block(block: object, scope: str, mode: str) -> None:
    if mode == "topk" and scope == "block":
        return
    query, key, _ = inputs(3.0)
    home = block_of(block)
    module = VMoBAAttention(block, mode, scope, top_k=1, threshold=0.0)  # type: ignore[arg-type]
    seen = seen_pairs(module, query, -key)
    same = home[:, None] == home
    assert bool(seen[..., same].all())
    if mode == "topk":
        assert not bool(seen[..., ~same].any())


@pytest.mark.paper("vmoba")
def test_top_k_counts() -> None:
    gate, own = torch.randn(2, 3, 30, 10, dtype=torch.float64), torch.arange(30) // 3
    each = select_pairs(gate, own, "topk", "query", 4)
    assert bool((each.sum(-1) == 4).all())
    per_head = select_pairs(gate, own, "topk", "head", 4)
    assert bool((per_head.sum((-2, -1)) == 4 * 30).all())
    assert len(per_head.sum(-1).unique()) > 3
    among_all = select_pairs(gate, own, "topk", "all", 4)
    assert bool((among_all.sum((-3, -2, -1)) == 4 * 30 * 3).all()) and len(among_all.sum((-2, -1)).unique()) > 1
    mine = torch.arange(10) == own[:, None]
    for chosen, dims in ((each, (-1,)), (per_head, (-2, -1)), (among_all, (-3, -2, -1))):
        others = chosen & ~mine
        assert bool((gate.masked_fill(~others, 9).amin(dims) > gate.masked_fill(chosen, -9).amax(dims)).all())
    # In a video whose blocks are of one size, the numbers of keys follow.
    query, key, _ = inputs()
    seen = seen_pairs(VMoBAAttention((2, 2, 5), "topk", "query", 3), query, key)
    assert bool((seen.sum(-1) == 60).all())
    seen = seen_pairs(VMoBAAttention((2, 2, 5), "topk", "head", 3), query, key)
    assert bool((seen.sum((-2, -1)) == 60 * 120).all()) and len(seen.sum(-1).unique()) > 2


def looped(pairs: list[tuple[float, bool]], threshold: float) -> list[bool]:
    """Pairs ``(gate, own)`` of one scope."""
    low, high = min(g for g, _ in pairs), max(g for g, _ in pairs)
    even = [(g - low) / (high - low) for g, _ in pairs]
    total = sum(even)
    missing = max(0.0, threshold - sum(e for e, (_, own) in zip(even, pairs, strict=True) if own) / total)
    kept = [own for _, own in pairs]
    covered = 0.0
    for place in sorted((i for i, (_, own) in enumerate(pairs) if not own), key=lambda i: -even[i]):
        kept[place] = True
        covered += even[place]
        if covered / total >= missing:
            break
    return kept


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.6, 0.95])
def test_threshold_is_that_of_the_formulas(scope: str, threshold: float) -> None:
    gate, own = torch.randn(2, 3, 12, 5, dtype=torch.float64), torch.arange(12) // 3
    found = select_pairs(gate, own, "threshold", scope, threshold=threshold)  # type: ignore[arg-type]
    groups: dict[tuple[int, ...], list[tuple[int, int, int, int]]] = {}
    for b, h, i, n in product(range(2), range(3), range(12), range(5)):
        name = {"query": (b, h, i), "head": (b, h), "block": (b, n), "all": (b,)}[scope]
        groups.setdefault(name, []).append((b, h, i, n))
    expected = torch.zeros_like(found)
    for members in groups.values():
        kept = looped([(float(gate[m]), int(own[m[2]]) == m[3]) for m in members], threshold)
        for member, taken in zip(members, kept, strict=True):
            expected[member] = taken
    assert torch.equal(found, expected)


@pytest.mark.paper("vmoba")
@pytest.mark.parametrize("scope", SCOPES)
def test_density_rises_with_the_threshold(scope: str) -> None:
    query, key, _ = inputs(2.0)
    found = [
        VMoBAAttention((2, 2, 4), scope=scope, threshold=tau).pairs(query, key, grid=GRID)  # type: ignore[arg-type]
        for tau in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    ]
    assert all(b is not None and a is not None and b >= a for a, b in pairwise(found))
    assert found[0] is not None and found[0] < 0.5 and found[-1] == pytest.approx(1)


@pytest.mark.paper("vmoba")
@pytest.mark.parametrize("block", SHAPES)
@pytest.mark.parametrize("scope", ["query", "head"])
def test_merged_parts_are_a_masked_softmax_forward_and_backward(block: object, scope: str) -> None:
    module = VMoBAAttention(block, "threshold", scope, threshold=0.4)  # type: ignore[arg-type]
    ours, plain = ([t.requires_grad_() for t in tensors] for tensors in _twice(inputs(2.0)))
    out = module(*ours, grid=GRID)
    # The choice by the formulas: gates from means over the tokens of each block.
    home = block_of(block)
    count = int(home.max()) + 1
    means = torch.stack([plain[1].detach()[:, :, home == b].mean(2) for b in range(count)], 2).repeat_interleave(2, 1)
    chosen = select_pairs(plain[0].detach() @ means.mT, home, "threshold", scope, threshold=0.4)  # type: ignore[arg-type]
    expected = dense(*plain, chosen[..., home])
    torch.testing.assert_close(out, expected, **TIGHT)
    assert module.pairs(*ours[:2], grid=GRID) == pytest.approx(float(chosen[..., home].double().mean()))
    seed = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, ours, seed), torch.autograd.grad(expected, plain, seed), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    # The executor's own form of it, in single precision.
    query, key, value = (t.detach().float() for t in ours)
    order = module.order(query.shape[2], GRID, query.device)
    layout = module.select(query, key, module.request(query, key, value, grid=GRID))
    merged = block_sparse_attention(query, order.apply(key), order.apply(value), layout, backend="merged")
    masked = block_sparse_attention(query, order.apply(key), order.apply(value), layout, backend="reference")
    torch.testing.assert_close(merged, masked, rtol=1e-5, atol=1e-5)


def _twice(tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    return [t.clone() for t in tensors], [t.clone() for t in tensors]


def test_gate_is_the_product_with_block_means() -> None:
    query, key, _ = inputs()
    gate = vmoba_gate(query, key, 50)
    assert gate.shape == (2, 4, 120, 3)
    torch.testing.assert_close(gate[1, 3, :, 2], query[1, 3] @ key[1, 1, 100:].mean(0), **TIGHT)


def test_hidden_keys_and_equal_gates() -> None:
    query, key, value = inputs(2.0)
    valid = torch.ones(2, 120, dtype=torch.bool)
    valid[0, :30], valid[1, 50:83] = False, False  # a whole frame, and pieces of blocks
    for block in SHAPES:
        module = VMoBAAttention(block, threshold=0.3)  # type: ignore[arg-type]
        other = torch.where(valid[:, None, :, None], key, 1e3)
        call = {"grid": GRID, "mask": KeyPadding(valid)}
        torch.testing.assert_close(module(query, key, value, **call), module(query, other, value, **call), **TIGHT)
    # Gates that tell nothing leave nothing out.
    flat = VMoBAAttention(1)(0 * query, key, value, grid=GRID)
    torch.testing.assert_close(flat, dense(0 * query, key, value), **TIGHT)


def test_cost_and_shape() -> None:
    query, key, value = inputs()
    fixed = VMoBAAttention((2, 2, 5), "topk", top_k=3, shape=GRID)
    assert torch.equal(fixed(query, key, value), fixed(query, key, value, grid=GRID))
    cost = fixed.cost(AttentionShape(120, 120, 4, 8))
    assert cost.pairs == pytest.approx(0.5) == fixed.pairs(query, key)
    assert cost.flops == 2 * 4 * 120 * 60 * 16 + 2 * 4 * 120 * 6 * 8
    assert VMoBAAttention((2, 2, 5), shape=GRID).cost(AttentionShape(120, 120)).pairs == 1


def test_errors() -> None:
    query, key, value = inputs()
    for options in ({"block": 0}, {"block": (1, 2, 3, 4)}, {"mode": "best"}, {"scope": "row"}):
        with pytest.raises(OptionError):
            VMoBAAttention(**options)  # type: ignore[arg-type]
    for options in ({"top_k": 0}, {"threshold": 1.5}, {"mode": "topk", "scope": "block"}):
        with pytest.raises(OptionError):
            VMoBAAttention(**options)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="grid"):
        VMoBAAttention()(query, key, value)
    with pytest.raises(ShapeError, match="frames, height, width"):
        VMoBAAttention()(query, key, value, grid=(10, 12))
    with pytest.raises(ShapeError, match="video"):
        partition_video(torch.zeros(1, 7, 1, 1), GRID, 1)
    with pytest.raises(ShapeError, match="Blocks of"):
        unpartition_video(torch.zeros(1, 7, 1, 1), GRID, 1)
