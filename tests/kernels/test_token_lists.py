"""Blocks of queries over shared key lists, against the dense form."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ShapeError
from regard.kernels import token_lists
from regard.kernels.token_lists import token_list_attention
from regard.layout import num_blocks
from regard.masks import Boolean, Causal, Mask


def lists(heads: int, blocks: int, k_len: int, slots: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct keys in random order, some slots empty."""
    order = torch.rand(2, heads, blocks, k_len, generator=generator).argsort(-1)[..., :slots]
    return order.masked_fill(torch.rand(order.shape, generator=generator) < 0.2, -1)


@pytest.mark.parametrize("area", [1 << 19, 64], ids=["whole", "cut"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("rule", ["none", "causal", "random"])
def test_agrees_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, rule: str, heads: int, bias: bool, area: int
) -> None:
    monkeypatch.setattr(token_lists, "_GROUP", area)
    generator = torch.Generator().manual_seed(heads)
    q_len, k_len, block = 21, 30, 4
    shapes = [(2, 4, q_len, 8), (2, 2, k_len, 8), (2, 2, k_len, 5)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    key_bias = torch.randn(2, 2, k_len, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = lists(heads, num_blocks(q_len, block), k_len, 9, generator)
    masks: dict[str, Mask | None] = {
        "none": None,
        "causal": Causal(),
        "random": Boolean(torch.rand(2, 2 if heads == 1 else heads, q_len, k_len, generator=generator) < 0.6),
    }
    leaves = [*tensors, key_bias] if bias else tensors
    weights = torch.randn(2, 4, q_len, 5, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("gather", "reference"):
        out, lse = token_list_attention(
            *tensors,
            indices,
            block,
            mask=masks[rule],
            key_bias=key_bias if bias else None,
            return_lse=True,
            backend=backend,
        )
        total = (out * weights).sum() + torch.where(lse.isfinite(), lse, 0).sin().sum()
        results.append((out, lse, *torch.autograd.grad(total, leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_settled_slots_skip_the_mask() -> None:
    """What is settled is visible to all queries of its block, so evaluating the mask there changes nothing."""
    query, key, value = (torch.randn(1, 1, 12, 4, dtype=torch.float64) for _ in range(3))
    index = torch.arange(12).view(3, 4)
    indices = torch.stack([torch.cat((torch.arange(4), index[block])) for block in (1, 2)])[None, None]
    query = query[:, :, 4:]
    settled = token_list_attention(query, key, value, indices, 4, mask=Causal(), settled=4)
    torch.testing.assert_close(settled, token_list_attention(query, key, value, indices, 4, mask=Causal()))


def test_large_bias_and_empty_rows_stay_finite() -> None:
    query, key, value = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    indices = torch.tensor([[[[0, 1, -1], [-1, -1, -1]]]])
    bias = torch.full((1, 1, 5), 300.0, requires_grad=True)
    out, lse = token_list_attention(query, key, value, indices, 3, key_bias=bias, return_lse=True)
    assert not bool(out[:, :, 3:].any()) and bool((lse[:, :, 3:] == float("-inf")).all())
    for grad in torch.autograd.grad(out.sum(), (query, key, value, bias)):
        assert bool(torch.isfinite(grad).all())


def test_wrong_lists_are_refused() -> None:
    query, key, value = (torch.randn(1, 1, 5, 4) for _ in range(3))
    with pytest.raises(ShapeError):
        token_list_attention(query, key, value, torch.zeros(1, 1, 3, 2, dtype=torch.int64), 3)
