"""Operations on whole score maps against loops written from their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.layers.score_maps import head_conv, identity_head_kernel, identity_kernel, key_query_conv, scale_map


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(scores: Tensor, kernel: Tensor, visible: Tensor) -> Tensor:
    """``S'_ij = sum_a sum_b w[c_q - 1 - a, b + (c_k - 1) / 2] S_{i - a, j + b}``, number by number."""
    batch, heads, q_len, k_len = scores.shape
    _, c_q, c_k = kernel.shape
    half, out = (c_k - 1) // 2, torch.zeros_like(scores)
    for n in range(batch):
        for h in range(heads):
            for i in range(q_len):
                for j in range(k_len):
                    for a in range(c_q):
                        for b in range(-half, half + 1):
                            if i - a >= 0 and 0 <= j + b < k_len and visible[i, j] and visible[i - a, j + b]:
                                weight = kernel[h, c_q - 1 - a, b + half]
                                out[n, h, i, j] += weight * scores[n, h, i - a, j + b]
    return out


@pytest.mark.paper("mta")
@pytest.mark.parametrize(("c_q", "c_k"), [(3, 5), (1, 3), (4, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_convolution_equals_the_loop(c_q: int, c_k: int, causal: bool) -> None:
    scores, kernel = draw(2, 2, 7, 7), draw(2, c_q, c_k, seed=1)
    visible = torch.ones(7, 7, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    expected = looped(scores, kernel, visible)
    torch.testing.assert_close(key_query_conv(scores, kernel, visible), expected)
    # With a mask of which queries take from which that forbids nothing, it is the same.
    torch.testing.assert_close(key_query_conv(scores, kernel, visible, visible), expected)


@pytest.mark.paper("mta")
def test_rows_that_may_not_be_taken_from_are_left_out() -> None:
    scores, kernel = draw(1, 2, 9, 9), draw(2, 4, 3, seed=1)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    same = ids[:, None] == ids
    visible = same & torch.ones_like(same).tril()
    out = key_query_conv(scores, kernel, visible, same[None, None])
    for part in (slice(0, 4), slice(4, 9)):
        alone = scores[:, :, part, part]
        expected = looped(alone, kernel, torch.ones(alone.shape[-2:], dtype=torch.bool).tril())
        torch.testing.assert_close(out[:, :, part, part], expected)
    # The mask of keys alone does not keep documents apart: their last rows reach the next one's first.
    assert not torch.allclose(key_query_conv(scores, kernel, visible), out)


@pytest.mark.paper("mta")
def test_a_single_tap_is_a_scale() -> None:
    scores, scale = draw(2, 3, 5, 6), draw(3, seed=1)
    torch.testing.assert_close(key_query_conv(scores, scale[:, None, None]), scale_map(scores, scale))
    torch.testing.assert_close(scale_map(scores, scale), torch.stack([scores[:, h] * scale[h] for h in range(3)], 1))


@pytest.mark.paper("mta")
def test_heads_are_mixed_inside_groups() -> None:
    maps, kernel = draw(2, 6, 4, 5), draw(2, 3, 3, seed=1)
    expected = torch.zeros_like(maps)
    for head in range(6):
        for other in range(6):
            if head // 3 == other // 3:
                expected[:, head] += kernel[head // 3, head % 3, other % 3] * maps[:, other]
    torch.testing.assert_close(head_conv(maps, kernel), expected)
    whole = draw(6, 6, seed=2)
    torch.testing.assert_close(head_conv(maps, whole), torch.tensordot(whole, maps, ([1], [1])).transpose(0, 1))


def test_identity_kernels_change_nothing() -> None:
    scores = draw(2, 4, 6, 6)
    assert torch.equal(key_query_conv(scores, identity_kernel(4, 3, 5)), scores)
    assert torch.equal(head_conv(scores, identity_head_kernel(4, 2)), scores)


def test_bad_input_says_what_was_expected() -> None:
    scores = draw(1, 2, 3, 3)
    with pytest.raises(OptionError, match="odd"):
        identity_kernel(2, 3, 4)
    with pytest.raises(OptionError, match="divide"):
        identity_head_kernel(6, 4)
    with pytest.raises(ShapeError, match="c_q, c_k"):
        key_query_conv(scores, draw(3, 2, 3))
    with pytest.raises(ShapeError, match="groups"):
        head_conv(scores, draw(2, 2, 2))
    with pytest.raises(ShapeError, match="each of 2 heads"):
        scale_map(scores, draw(3))
