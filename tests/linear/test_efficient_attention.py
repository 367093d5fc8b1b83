from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.linear.efficient_attention import (
    EfficientAttention,
    EfficientAttention2d,
    causal_efficient_attention,
    cost,
    efficient_attention,
    global_context_maps,
)
from regard.masks import KeyPadding


def draw(n: int = 9, m: int = 13, d: int = 5, dv: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 3, n, d), (2, 3, m, d), (2, 3, m, dv))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The implied matrix written out from the two softmaxes, exponentials and sums alone."""
    q = query.exp() / query.exp().sum(-1, keepdim=True)
    k = key.exp() / key.exp().sum(-2, keepdim=True)
    return torch.einsum("bhnd,bhmd->bhnm", q, k) @ value


@pytest.mark.paper("efficient_attention")
def test_scaling_is_the_scaled_product() -> None:
    query, key, value = draw()
    expected = query @ key.transpose(-1, -2) / key.shape[2] @ value
    torch.testing.assert_close(efficient_attention(query, key, value, "scaling"), expected, rtol=0, atol=1e-13)


@pytest.mark.paper("efficient_attention")
@pytest.mark.parametrize("length", [1, 4, 40])
def test_rows_are_distributions_and_constants_stay(length: int) -> None:
    query, key, _ = draw(m=length)
    weights = EfficientAttention().weights(query, key)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64), rtol=0, atol=1e-14)
    constant = torch.randn(2, 3, 1, 6, dtype=torch.float64).expand(-1, -1, length, -1)
    out = efficient_attention(query, key, constant)
    torch.testing.assert_close(out, constant[:, :, :1].expand_as(out), rtol=1e-13, atol=1e-13)


@pytest.mark.paper("efficient_attention")
def test_keys_first_and_queries_first_agree() -> None:
    query, key, value = draw()
    torch.testing.assert_close(efficient_attention(query, key, value), by_hand(query, key, value), rtol=0, atol=1e-13)


@pytest.mark.paper("efficient_attention")
@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_permutations(normalizer: str) -> None:
    query, key, value = draw()
    out = efficient_attention(query, key, value, normalizer)
    rows, columns = torch.randperm(9), torch.randperm(13)
    torch.testing.assert_close(efficient_attention(query[:, :, rows], key, value, normalizer), out[:, :, rows])
    moved = efficient_attention(query, key[:, :, columns], value[:, :, columns], normalizer)
    torch.testing.assert_close(moved, out, rtol=0, atol=1e-13)


@pytest.mark.paper("efficient_attention")
def test_constants_that_softmax_forgets() -> None:
    query, key, value = draw()
    out = efficient_attention(query, key, value)
    shifted_query = query + torch.randn(2, 3, 9, 1, dtype=torch.float64)
    shifted_key = key + torch.randn(2, 3, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(efficient_attention(shifted_query, shifted_key, value), out, rtol=0, atol=1e-13)
    other = key + torch.randn(2, 3, 13, 1, dtype=torch.float64)
    assert (efficient_attention(query, other, value) - out).abs().max() > 1e-3


@pytest.mark.paper("efficient_attention")
@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_rank_of_the_implied_matrix(normalizer: str) -> None:
    query, key, _ = draw(n=30, m=40, d=4)
    singular = torch.linalg.svdvals(EfficientAttention(normalizer).weights(query, key))
    assert bool((singular[..., 4:] < 1e-12 * singular[..., :1]).all())
    assert bool((singular[..., 3] > 1e-6 * singular[..., 0]).all())


@pytest.mark.paper("efficient_attention")
def test_large_numbers_stay_finite() -> None:
    query, key, value = (1e4 * t.float() for t in draw())
    out = efficient_attention(query, key, value)
    assert bool(torch.isfinite(out).all())
    # At such magnitudes each softmax is an argmax.
    chosen = key.argmax(2).gather(2, query.argmax(-1))
    torch.testing.assert_close(out, value.gather(2, chosen[..., None].expand(-1, -1, -1, 6)))


@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_padded_keys_are_as_if_absent(normalizer: str) -> None:
    query, key, value = draw()
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, 8:], valid[1] = False, False
    out = efficient_attention(query, key, value, normalizer, valid)
    short = efficient_attention(query[:1], key[:1, :, :8], value[:1, :, :8], normalizer)
    torch.testing.assert_close(out[:1], short, rtol=0, atol=1e-13)
    assert not bool(out[1].any())
    torch.testing.assert_close(EfficientAttention(normalizer)(query, key, value, mask=KeyPadding(valid)), out)


def test_global_context_maps() -> None:
    _, key, _ = draw()
    maps = global_context_maps(key)
    assert maps.shape == (2, 3, 5, 13)
    torch.testing.assert_close(maps, torch.softmax(key, 2).transpose(2, 3))


def test_causal_extension_is_a_softmax_over_the_past() -> None:
    query, key, value = draw(n=70, m=70)
    out = EfficientAttention(causal_extension=True)(query, key, value, causal=True)
    for t in (0, 1, 33, 69):
        prefix = by_hand(query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1])
        torch.testing.assert_close(out[:, :, t : t + 1], prefix, rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedPatternError):
        EfficientAttention()(query, key, value, causal=True)


def test_causal_extension_under_padding() -> None:
    query, key, value = (t.requires_grad_() for t in draw(n=20, m=20))
    valid = torch.rand(2, 20) < 0.6
    valid[:, :3] = False
    out = causal_efficient_attention(query, key, value, valid)
    for b in range(2):
        for t in range(20):
            seen = valid[b, : t + 1]
            row = out[b : b + 1, :, t : t + 1]
            if not bool(seen.any()):
                assert not bool(row.any())
                continue
            k, v = key[b : b + 1, :, : t + 1][:, :, seen], value[b : b + 1, :, : t + 1][:, :, seen]
            torch.testing.assert_close(row, by_hand(query[b : b + 1, :, t : t + 1], k, v), rtol=0, atol=1e-12)
    out.sum().backward()
    assert all(t.grad is not None and bool(torch.isfinite(t.grad).all()) for t in (query, key, value))


def test_module_on_maps() -> None:
    module = EfficientAttention2d(8, key_channels=4, value_channels=6, num_heads=2).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    tokens = x.flatten(2)

    def project(conv: nn.Module, t: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv1d) and conv.bias is not None
        return torch.einsum("oi,bin->bon", conv.weight[..., 0], t) + conv.bias[:, None]

    projected = [project(conv, tokens) for conv in (module.query, module.key, module.value)]
    heads = []
    for index in range(2):
        query, key, value = (t.chunk(2, 1)[index].transpose(1, 2)[:, None] for t in projected)
        heads.append(by_hand(query, key, value)[:, 0].transpose(1, 2))
    expected = x + project(module.reprojection, torch.cat(heads, 1)).view_as(x)
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(ShapeError):
        module(torch.randn(2, 7, 3, 5))


def test_cost_of_the_intermediate() -> None:
    efficient, dense = cost(8192, 64, 64), cost(8192, 64, 64, "dot_product")
    assert dense.bytes // efficient.bytes == 16384
    assert efficient.multiply_adds == 2 * 8192 * 64 * 64
    assert dense.multiply_adds == 8192 * 8192 * 128
    with pytest.raises(OptionError):
        cost(8, 4, 4, "sparse")


def test_options_are_checked() -> None:
    with pytest.raises(OptionError):
        EfficientAttention("sum")
    with pytest.raises(OptionError):
        EfficientAttention("scaling", causal_extension=True)
