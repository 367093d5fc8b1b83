"""Attention over explicit lists of neighbours, against loops, torch's unfold and dense masked attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, OptionError, ShapeError
from regard.kernels.neighbors import Neighbors, neighbor_mix, neighbor_scatter, neighbor_scores
from regard.masks import Neighborhood

FORMS = ["reference", "loop", "gemm"]
RULES = [
    Neighborhood.of((13,), 5),
    Neighborhood.of((14,), 4, 2, 3, True),
    Neighborhood.of((7, 9), (3, 4), 1, (2, 1)),
    Neighborhood.of((6, 7), 5, border="mask"),
    Neighborhood.of((3, 4, 5), (3, 2, 3), 1, 1, (True, False, False)),
]


def tensors(neighbors: Neighbors, grad: bool = False, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, 2, neighbors.q_len, 3, dtype=torch.float64, requires_grad=grad)
    key, value = (
        torch.randn(2, kv_heads, neighbors.k_len, 3, dtype=torch.float64, requires_grad=grad) for _ in range(2)
    )
    return query, key, value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_softmax_over_the_lists_is_masked_attention(rule: Neighborhood, form: str) -> None:
    neighbors = Neighbors.of(rule)
    query, key, value = tensors(neighbors)
    scores = neighbor_scores(query, key, neighbors, backend=form) * 3**-0.5
    out = neighbor_mix(scores.masked_fill(~neighbors.valid, -torch.inf).softmax(-1), value, neighbors, backend=form)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=rule.dense(neighbors.q_len, neighbors.k_len))
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_each_operator_is_its_formula(form: str) -> None:
    neighbors = Neighbors.stencil((3, 4), [(0, 0), (-1, 1), (2, 0)], "empty")
    query, key, value = tensors(neighbors)
    weights = torch.randn(2, 2, 12, 3, dtype=torch.float64)
    scores, mixed = torch.zeros(2, 2, 12, 3).double(), torch.zeros(2, 2, 12, 3).double()
    scattered = torch.zeros(2, 2, 12, 3).double()
    for row in range(3):
        for column in range(4):
            for slot, (down, right) in enumerate([(0, 0), (-1, 1), (2, 0)]):
                y, x = row + down, column + right
                if not (0 <= y < 3 and 0 <= x < 4):
                    continue
                i, j = 4 * row + column, 4 * y + x
                scores[:, :, i, slot] = (query[:, :, i] * key[:, :, j]).sum(-1)
                mixed[:, :, i] += weights[:, :, i, slot, None] * value[:, :, j]
                scattered[:, :, j] += weights[:, :, i, slot, None] * query[:, :, i]
    torch.testing.assert_close(neighbor_scores(query, key, neighbors, backend=form), scores)
    torch.testing.assert_close(neighbor_mix(weights, value, neighbors, backend=form), mixed)
    torch.testing.assert_close(neighbor_scatter(weights, query, neighbors, backend=form), scattered)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_gradients(form: str) -> None:
    neighbors = Neighbors.of(Neighborhood.of((5, 4), (3, 2), 1, (1, 2)))
    query, key, value = tensors(neighbors, grad=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = neighbor_scores(query, key, neighbors, backend=form)
        return neighbor_mix(scores.sigmoid(), value, neighbors, backend=form)

    assert torch.autograd.gradcheck(attend, (query, key, value), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (query, key, value), fast_mode=True)
    weights = torch.randn(2, 2, 20, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, x: neighbor_scatter(w, x, neighbors, backend=form), (weights, query), fast_mode=True
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_square_stencil_is_unfold(form: str) -> None:
    """Empty slots are zeros, as in im2col."""
    offsets = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    neighbors = Neighbors.stencil((6, 5), offsets)
    x, query = torch.randn(1, 1, 30, 4).double(), torch.randn(1, 1, 30, 4).double()
    columns = F.unfold(x[0].transpose(1, 2).reshape(1, 4, 6, 5), 3, dilation=2, padding=2).view(1, 4, 9, 30)
    expected = torch.einsum("bid,bdni->bin", query[0], columns)[None]
    torch.testing.assert_close(neighbor_scores(query, x, neighbors, backend=form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_finer_grid_of_queries_replicates_the_border(form: str) -> None:
    neighbors = Neighbors.stencil((3, 2), [(0, 0), (-1, 0), (0, 1)], "replicate", factor=2)
    assert (neighbors.q_len, neighbors.k_len) == (24, 6)
    value = torch.randn(1, 1, 6, 5).double()
    padded = F.pad(value.transpose(2, 3).reshape(1, 5, 3, 2), (1, 1, 1, 1), mode="replicate")
    shifted = torch.stack([padded[..., 1:4, 1:3], padded[..., 0:3, 1:3], padded[..., 1:4, 2:4]], 1)
    weights = torch.rand(1, 1, 24, 3).double()
    fine = shifted.repeat_interleave(2, -1).repeat_interleave(2, -2).flatten(-2)
    expected = torch.einsum("bin,bndi->bid", weights[0], fine)[None]
    torch.testing.assert_close(neighbor_mix(weights, value, neighbors, backend=form), expected)


def test_grouped_heads_and_half_precision() -> None:
    neighbors = Neighbors.of(Neighborhood.of((8, 8), 3))
    query, key, value = tensors(neighbors, kv_heads=1)
    weights = torch.rand(2, 2, 64, 9).double()
    wide = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    torch.testing.assert_close(neighbor_scores(query, key, neighbors), neighbor_scores(query, wide[0], neighbors))
    torch.testing.assert_close(neighbor_mix(weights, value, neighbors), neighbor_mix(weights, wide[1], neighbors))
    half = value.bfloat16()
    assert neighbor_scores(query.bfloat16(), key.bfloat16(), neighbors).dtype == torch.float32
    assert neighbor_mix(weights.bfloat16(), half, neighbors).dtype == torch.bfloat16


def test_errors() -> None:
    neighbors = Neighbors.of(RULES[0])
    query, key, value = tensors(neighbors)
    with pytest.raises(ShapeError, match="13 queries"):
        neighbor_scores(query[:, :, :5], key, neighbors)
    with pytest.raises(ShapeError, match="5 slots"):
        neighbor_mix(query, value, neighbors)
    with pytest.raises(ShapeError, match="source"):
        neighbor_scatter(query, value, neighbors)
    with pytest.raises(OptionError, match="offsets of 2"):
        Neighbors.stencil((3, 3), [(0, 0, 0)])
    with pytest.raises(OptionError, match="border"):
        Neighbors.stencil((3, 3), [(0, 0)], "reflect")  # type: ignore[arg-type]
    with pytest.raises(BackendError):
        neighbor_scores(query, key, neighbors, backend="fused")
