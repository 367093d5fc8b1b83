"""Neighborhood attention in all its forms, against dense masked attention, loops and limits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels import use_backend
from regard.local.fna import (
    FORMS,
    NeighborhoodAttention,
    na_av,
    na_flops,
    na_fused,
    na_memory,
    na_qk,
    na_reference,
    tuned_tiles,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
SPACES = {1: (23,), 2: (9, 11), 3: (4, 6, 5)}


def maps(space: tuple[int, ...], heads: int = 2, dim: int = 4, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, heads, *space, dim, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


def window_of(axis: int, length: int, window: int, dilation: int, causal: bool) -> list[list[int]]:
    """The keys of each query on one axis, from the definition."""
    found = []
    for query in range(length):
        own = list(range(query % dilation, length, dilation))
        place = own.index(query)
        if causal:
            found.append(own[max(place - window + 1, 0) : place + 1])
            continue
        start = min(max(place - window // 2, 0), len(own) - window)
        found.append(own[start : start + window])
    return found


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int, causal: tuple[bool, ...], rpb: Tensor | None
) -> Tensor:
    """One query after another."""
    space, scale = q.shape[2:-1], q.shape[-1] ** -0.5
    keys = [window_of(a, n, window, dilation, c) for a, (n, c) in enumerate(zip(space, causal, strict=True))]
    out = torch.zeros_like(v)
    for place in itertools.product(*(range(n) for n in space)):
        near = list(itertools.product(*(keys[a][i] for a, i in enumerate(place))))
        at = (slice(None), slice(None))
        own = torch.stack([k[(*at, *j)] for j in near], 2)
        scores = torch.einsum("bhd,bhnd->bhn", q[(*at, *place)] * scale, own)
        if rpb is not None:
            offsets = [tuple((y - x) // dilation + window - 1 for x, y in zip(place, j, strict=True)) for j in near]
            scores = scores + torch.stack([rpb[(slice(None), *o)] for o in offsets], -1)
        values = torch.stack([v[(*at, *j)] for j in near], 2)
        out[(*at, *place)] = torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), values)
    return out


def unfused(
    q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int, causal: object, rpb: Tensor | None, backend: str
) -> Tensor:
    scores = na_qk(q * q.shape[-1] ** -0.5, k, window, dilation, causal, rpb, backend)  # type: ignore[arg-type]
    return na_av(scores.softmax(-1), v, window, dilation, causal, backend)  # type: ignore[arg-type]


CASES = [
    (axes, dilation, causal)
    for axes in SPACES
    for dilation in (1, 2)
    for causal in itertools.product((False, True), repeat=axes)
    if not (axes == 3 and dilation == 2)  # a side of 4 holds no dilated window of 3
]


@pytest.mark.paper("fna")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("axes", "dilation", "causal"), CASES)
def test_all_forms_are_the_definition(axes: int, dilation: int, causal: tuple[bool, ...], biased: bool) -> None:
    q, k, v = maps(SPACES[axes])
    rpb = torch.randn(2, *(5,) * axes, dtype=torch.float64) if biased else None
    wanted = by_hand(q, k, v, 3, dilation, causal, rpb)
    torch.testing.assert_close(na_reference(q, k, v, 3, dilation, causal, rpb), wanted, **TIGHT)
    torch.testing.assert_close(na_fused(q, k, v, 3, dilation, causal, rpb), wanted, **TIGHT)
    for backend in ("unfused", "gemm"):
        torch.testing.assert_close(unfused(q, k, v, 3, dilation, causal, rpb, backend), wanted, **TIGHT)


@pytest.mark.paper("fna")
@pytest.mark.parametrize(("axes", "dilation", "causal"), CASES)
def test_gradients_are_those_of_the_dense_form(axes: int, dilation: int, causal: tuple[bool, ...]) -> None:
    leaves = maps(SPACES[axes], grad=True)
    rpb = torch.randn(2, *(5,) * axes, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(leaves[0])

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (*leaves, rpb), probe)

    wanted = gradients(na_reference(*leaves, 3, dilation, causal, rpb))
    for out in (
        na_fused(*leaves, 3, dilation, causal, rpb),
        unfused(*leaves, 3, dilation, causal, rpb, "unfused"),
        unfused(*leaves, 3, dilation, causal, rpb, "gemm"),
    ):
        for found, exact in zip(gradients(out), wanted, strict=True):
            torch.testing.assert_close(found, exact, **TIGHT)


@pytest.mark.paper("fna")
def test_gradcheck() -> None:
    leaves = [*maps((5, 4), 1, 3, grad=True), torch.randn(1, 5, 5, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda q, k, v, b: na_fused(q, k, v, 3, 1, False, b), leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda q, k, v, b: unfused(q, k, v, 3, 1, False, b, "gemm"), leaves, fast_mode=True)


@pytest.mark.paper("fna")
@pytest.mark.parametrize("form", FORMS)
def test_a_window_as_large_as_the_grid_is_plain_attention(form: str) -> None:
    q, k, v = (t.flatten(2, 3) for t in maps((6, 6)))
    out = NeighborhoodAttention(6, backend=form)(q, k, v, grid=(6, 6))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **TIGHT)


@pytest.mark.paper("fna")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", SPACES)
def test_a_window_of_one_returns_the_values(axes: int, form: str) -> None:
    q, k, v = (t.flatten(2, -2) for t in maps(SPACES[axes]))
    torch.testing.assert_close(NeighborhoodAttention(1, backend=form)(q, k, v, grid=SPACES[axes]), v, **TIGHT)


@pytest.mark.paper("fna")
@pytest.mark.parametrize("q_tile", [1, 2, (3, 5), 8, None])
@pytest.mark.parametrize("kv_tile", [1, (4, 2), 16, None])
def test_tiles_do_not_change_the_result(q_tile: object, kv_tile: object) -> None:
    leaves = [*maps((9, 11), grad=True), torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)]
    out = na_fused(*leaves[:3], (3, 4), 2, (True, False), leaves[3], q_tile=q_tile, kv_tile=kv_tile)  # type: ignore
    wanted = na_reference(*leaves[:3], (3, 4), 2, (True, False), leaves[3])
    torch.testing.assert_close(out, wanted, **TIGHT)
    probe = torch.randn_like(wanted)
    for found, exact in zip(
        torch.autograd.grad(out, leaves, probe), torch.autograd.grad(wanted, leaves, probe), strict=True
    ):
        torch.testing.assert_close(found, exact, **TIGHT)


@pytest.mark.paper("fna")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_causal_axis_keeps_the_past(axis: int, form: str) -> None:
    q, k, v = maps((6, 7))
    mechanism = NeighborhoodAttention(3, causal_axes=tuple(a == axis for a in range(2)), backend=form)

    def run(*tensors: Tensor) -> Tensor:
        return mechanism(*(t.flatten(2, 3) for t in tensors), grid=(6, 7)).unflatten(2, (6, 7))

    later = [t.clone() for t in (q, k, v)]
    for t in later:
        t.narrow(2 + axis, 4, t.shape[2 + axis] - 4).normal_()
    before, after = run(q, k, v).narrow(2 + axis, 0, 4), run(*later).narrow(2 + axis, 0, 4)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_and_raster_order(causal: bool, form: str) -> None:
    q, k, v = (t.flatten(2, 3) for t in maps((6, 7)))
    mechanism = NeighborhoodAttention(3, position_bias=True, num_heads=2, backend=form).double()
    mask = torch.rand(2, 1, 42, 42) > 0.3
    with use_backend("reference"):
        wanted = NeighborhoodAttention(3, position_bias=True, num_heads=2, backend="dense").double()
        wanted.load_state_dict(mechanism.state_dict())
        expected = wanted(q, k, v, grid=(6, 7), mask=mask, causal=causal)
    torch.testing.assert_close(mechanism(q, k, v, grid=(6, 7), mask=mask, causal=causal), expected, **TIGHT)


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_borders_are_the_same_in_all_forms(border: str) -> None:
    q, k, v = (t.flatten(2, 3) for t in maps((6, 7)))
    outs = []
    for form in FORMS:
        torch.manual_seed(0)
        mechanism = NeighborhoodAttention(3, 2, position_bias=True, border=border, num_heads=2, backend=form).double()
        outs.append(mechanism(q, k, v, grid=(6, 7), mask=(torch.arange(42) % 5 > 0)[None]))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], **TIGHT)


def test_the_context_sets_the_form() -> None:
    q, k, v = (t.flatten(2, 3) for t in maps((5, 5)))
    mechanism = NeighborhoodAttention(3)
    outs = []
    for form in FORMS:
        with use_backend(form):
            outs.append(mechanism(q, k, v, grid=(5, 5)))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], **TIGHT)


def test_a_bias_on_a_map_smaller_than_its_window() -> None:
    """Offsets keep their meaning when the window has to shrink."""
    q, k, v = (t.flatten(2, 3) for t in maps((3, 4)))
    mechanism = NeighborhoodAttention(5, position_bias=True, num_heads=2).double()
    table = mechanism.position_bias.table.T.unflatten(1, (9, 9))
    row, column = torch.arange(12) // 4, torch.arange(12) % 4
    bias = table[:, row[None] - row[:, None] + 4, column[None] - column[:, None] + 4]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(mechanism(q, k, v, grid=(3, 4)), wanted, **TIGHT)


def test_counts() -> None:
    assert na_flops((64, 64), 13, 4, 32) == 2 * 2 * 4 * 4096 * 169 * 32
    assert na_memory((64, 64), 13, 4, form="unfused") == 4 * 4096 * 169 * 4
    assert na_memory((64, 64), 13, 4) == na_memory((64, 64), 31, 4) == 4 * 4096 * 4
    assert na_memory((64, 64), 13, 4, torch.bfloat16, "dense") == 4 * 4096**2 * 2
    assert na_memory((64, 64), 13, 4, torch.bfloat16) == 4 * 4096 * 4


def test_log_sum_exp_and_tuned_tiles() -> None:
    q, k, v = (t.float() for t in maps((8, 8)))
    out, lse = na_fused(q, k, v, 3, q_tile="tuned", return_lse=True)
    scores = na_qk(q * 0.5, k, 3)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, na_reference(q, k, v, 3), rtol=1e-5, atol=1e-5)
    assert tuned_tiles((8, 8), (3, 3), (1, 1), (False, False), 2, 4) is tuned_tiles(
        (8, 8), (3, 3), (1, 1), (False, False), 2, 4
    )


def test_errors() -> None:
    q, k, v = maps((6, 7))
    with pytest.raises(OptionError, match="length 6"):
        na_fused(q, k, v, 4, 2)
    with pytest.raises(ShapeError, match=r"\(heads, "):
        na_fused(q, k, v, 3, rpb=torch.zeros(2, 3, 3))
    with pytest.raises(ShapeError, match="axes of space"):
        na_qk(q, k[:, :, :5], 3)
    with pytest.raises(OptionError, match="unfused"):
        na_av(na_qk(q, k, 3), v, 3, backend="fused")
    with pytest.raises(OptionError, match="backend"):
        NeighborhoodAttention(3, backend="triton")
    with pytest.raises(OptionError, match="window"):
        NeighborhoodAttention(0)
    with pytest.raises(OptionError, match="border"):
        NeighborhoodAttention(3, border="wrap")
    with pytest.raises(OptionError, match="causal"):
        NeighborhoodAttention(3, border="zero")(*(t.flatten(2, 3) for t in (q, k, v)), causal=True)
    with pytest.raises(OptionError, match="form"):
        na_memory((4, 4), 3, 1, form="flash")
    with pytest.raises(ShapeError, match="bias"):
        NeighborhoodAttention(3, position_bias=True, num_heads=2)(*(t.flatten(2, 3) for t in (q, k, v)))
