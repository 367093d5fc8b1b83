from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.layers.attention_stats import local_mass, neighbourhood
from regard.linear.inline_attention import (
    FEATURES,
    InLineAttention,
    LocalResidual,
    injectivity_report,
    inline_attention,
    inline_weights,
    visible_without,
)
from regard.masks import KeyPadding

D = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def draw(n: int = 13, m: int = 17, d: int = 6, dv: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 3, n, d), (2, 3, m, d), (2, 3, m, dv))
    query, key, value = (torch.randn(shape, dtype=D) for shape in shapes)
    return query, key, value


def softmax_rows(queries: Tensor, key: Tensor) -> Tensor:
    return (queries @ key.T / math.sqrt(key.shape[1])).softmax(-1)


def linear_rows(queries: Tensor, key: Tensor) -> Tensor:
    scores = queries.relu() @ key.relu().T
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-300)


def inline_rows(queries: Tensor, key: Tensor, phi: str = "identity") -> Tensor:
    return inline_weights(queries[None, None], key[None, None], phi)[0, 0]


@pytest.mark.paper("inline_attention")
@pytest.mark.parametrize("phi", FEATURES)
def test_rows_sum_to_one_by_subtraction(phi: str) -> None:
    query, key, _ = draw()
    weights = inline_weights(5 * query, 5 * key, phi)
    assert float((weights.sum(-1) - 1).abs().max()) < 2e-12
    assert bool((weights < 0).any()), "the normalisation is by subtraction, so some weights are negative"


@pytest.mark.paper("inline_attention")
@pytest.mark.parametrize("phi", FEATURES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_linear_form_equals_the_formula(phi: str, scale: float | None) -> None:
    """Against the released order of operations: ``q KV + (1 - s q . kbar) vbar``."""
    query, key, value = draw()
    q, k = FEATURES[phi](query), FEATURES[phi](key)
    s = 6**-0.5 if scale is None else scale
    expected = q @ (k.mT @ value * s / 17) + (1 - s * q @ k.mean(2, keepdim=True).mT) * value.mean(2, keepdim=True)
    found = inline_attention(query, key, value, phi, scale)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(inline_weights(query, key, phi, scale) @ value, found, **TIGHT)
    mechanism = regard.create("inline_attention", phi=phi)
    torch.testing.assert_close(
        mechanism.weights(query, key, scale=scale), inline_weights(query, key, phi, scale), **TIGHT
    )


@pytest.mark.paper("inline_attention")
@pytest.mark.parametrize("phi", FEATURES)
def test_constant_values_are_reproduced(phi: str) -> None:
    query, key, _ = draw()
    out = inline_attention(query, key, torch.full((2, 3, 17, 5), 2.5, dtype=D), phi)
    torch.testing.assert_close(out, torch.full_like(out, 2.5), **TIGHT)


@pytest.mark.paper("inline_attention")
def test_division_confuses_collinear_queries_and_subtraction_does_not() -> None:
    key, query = torch.randn(40, 8, dtype=D), torch.randn(8, dtype=D)
    queries = torch.stack((query, 3 * query))
    assert injectivity_report(linear_rows, key, queries).smallest < 1e-15
    assert injectivity_report(softmax_rows, key, queries).smallest > 0.05
    # N weights of InLine sum to 1 as N entries of size 1 / N move: distances are of that order.
    assert injectivity_report(inline_rows, key, queries).smallest > 1e-2
    assert injectivity_report(partial(inline_rows, phi="relu"), key, queries).smallest > 1e-2


@pytest.mark.paper("inline_attention")
def test_redundant_rows_are_counted() -> None:
    directions = torch.randn(200, 16, dtype=D)
    queries = torch.cat([length * directions for length in (0.5, 1, 2, 3, 4)])
    key = torch.randn(64, 16, dtype=D)
    assert injectivity_report(linear_rows, key, queries).redundant == 800
    assert injectivity_report(softmax_rows, key, queries).redundant == 0
    assert injectivity_report(inline_rows, key, queries).redundant == 0
    twice = torch.cat((directions[:5], directions[:5]))
    assert injectivity_report(inline_rows, key, twice).redundant == 0, "equal queries may have equal rows"


@pytest.mark.paper("inline_attention")
def test_a_vector_added_to_all_keys_changes_nothing() -> None:
    query, key, value = draw()
    shift = 10 * torch.randn(2, 3, 1, 6, dtype=D)
    torch.testing.assert_close(inline_weights(query, key + shift), inline_weights(query, key), **TIGHT)
    torch.testing.assert_close(
        inline_attention(query, key + shift, value), inline_attention(query, key, value), **TIGHT
    )
    assert not torch.allclose(inline_weights(query, key + shift, "relu"), inline_weights(query, key, "relu"))


@pytest.mark.paper("inline_attention")
def test_features_can_be_read_off_a_row() -> None:
    """With orthonormal centred keys, least squares on a row gives the query's features back."""
    raw = torch.randn(30, 6, dtype=D)
    key, _ = torch.linalg.qr(raw - raw.mean(0))
    assert float(key.mean(0).abs().max()) < 1e-15
    query = torch.randn(11, 6, dtype=D)
    rows = inline_rows(query, key)
    found = torch.linalg.lstsq(key, (rows - 1 / 30).T * 30 * 6**0.5).solution.T
    torch.testing.assert_close(found, query, **TIGHT)


@pytest.mark.paper("inline_attention")
def test_no_kernel_no_residual() -> None:
    residual = LocalResidual(12, 3).double()
    torch.nn.init.zeros_(residual.kernels[2].weight)
    torch.nn.init.zeros_(residual.kernels[2].bias)
    x = torch.randn(2, 20, 12, dtype=D)
    assert not bool(residual(x, x, (4, 5)).any())
    layer, plain = InLineAttention(12, 3).double(), InLineAttention(12, 3, local=False).double()
    layer.residual.load_state_dict(residual.state_dict())
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("residual")})
    torch.testing.assert_close(layer(x, grid=(4, 5)), plain(x), **TIGHT)


@pytest.mark.paper("inline_attention")
def test_residual_is_translation_equivariant_away_from_borders() -> None:
    residual = LocalResidual(12, 3).double()
    x, value = torch.randn(2, 8, 9, 12, dtype=D), torch.randn(2, 8, 9, 12, dtype=D)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return residual(a.flatten(1, 2), b.flatten(1, 2), (8, 9)).unflatten(1, (8, 9))

    moved = run(x.roll((2, 3), (1, 2)), value.roll((2, 3), (1, 2)))
    torch.testing.assert_close(moved[:, 3:-1, 4:-1], run(x, value).roll((2, 3), (1, 2))[:, 3:-1, 4:-1], **TIGHT)
    assert not torch.allclose(moved[:, 0], run(x, value).roll((2, 3), (1, 2))[:, 0])


@pytest.mark.paper("inline_attention")
def test_residual_is_one_kernel_per_channel_and_image() -> None:
    """Written out: the kernels from the mean of all tokens, heads apart, then nine shifted products."""
    residual = LocalResidual(8, 2, class_tokens=1).double()
    x, value = torch.randn(2, 13, 8, dtype=D), torch.randn(2, 13, 8, dtype=D)
    first, _, second = residual.kernels
    mean = x.mean(1)
    kernels = []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        hidden = torch.nn.functional.gelu(mean[:, own] @ first.weight[own, :, 0].T + first.bias[own])
        wide = slice(36 * head, 36 * head + 36)
        kernels.append((hidden @ second.weight[wide, :, 0].T + second.bias[wide]).view(2, 4, 3, 3))
    kernel = torch.cat(kernels, 1)
    expected = torch.zeros(2, 13, 8, dtype=D)
    for row in range(3):
        for column in range(4):
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    r, c = row + dr, column + dc
                    if 0 <= r < 3 and 0 <= c < 4:
                        expected[:, 1 + 4 * row + column] += kernel[:, :, dr + 1, dc + 1] * value[:, 1 + 4 * r + c]
    torch.testing.assert_close(residual(x, value, (3, 4)), expected, **TIGHT)


def test_padding_is_as_if_it_were_not_there() -> None:
    query, key, value = draw()
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[:, 11:] = False
    expected = inline_attention(query, key[:, :, :11], value[:, :, :11], "relu")
    torch.testing.assert_close(inline_attention(query, key, value, "relu", key_padding_mask=valid), expected, **TIGHT)
    layer, x = InLineAttention(12, 3).double(), torch.randn(2, 24, 12, dtype=D)
    real = torch.zeros(2, 4, 6, dtype=torch.bool)
    real[:, :3, :5] = True
    found = layer(x, grid=(4, 6), mask=KeyPadding(real.flatten(1))).unflatten(1, (4, 6))[:, :3, :5]
    small = layer(x.unflatten(1, (4, 6))[:, :3, :5].flatten(1, 2), grid=(3, 5)).unflatten(1, (3, 5))
    torch.testing.assert_close(found, small, **TIGHT)


@pytest.mark.paper("inline_attention")
def test_masks_of_the_test_of_locality() -> None:
    local = visible_without((6, 7), "local", class_tokens=1)
    generator = torch.Generator().manual_seed(1)
    random = visible_without((6, 7), "random", class_tokens=1, generator=generator)
    assert local.shape == random.shape == (43, 43)
    assert bool(local[0].all()) and bool(local[:, 0].all()) and bool(random[0].all())
    assert torch.equal((~local).sum(-1), (~random).sum(-1)), "both hide as many keys from each query"
    assert torch.equal(~local[1:, 1:], neighbourhood((6, 7)))
    weights = torch.rand(42, 42).masked_fill(~local[1:, 1:], 0)
    assert float(local_mass(weights, (6, 7)).max()) == 0


def test_bad_input_teaches() -> None:
    query, key, value = draw()
    with pytest.raises(OptionError, match="identity"):
        inline_attention(query, key, value, "elu")
    with pytest.raises(OptionError, match="phi"):
        regard.create("inline_attention", phi="softplus")
    with pytest.raises(OptionError, match="num_heads"):
        InLineAttention(10, 3)
    with pytest.raises(ShapeError, match="grid"):
        InLineAttention(12, 3)(torch.randn(1, 20, 12))
    with pytest.raises(ShapeError, match="grid"):
        InLineAttention(12, 3)(torch.randn(1, 20, 12), grid=(3, 5))
    with pytest.raises(OptionError, match="random"):
        visible_without((3, 3), "global")
    with pytest.raises(ShapeError, match="queries"):
        injectivity_report(inline_rows, key[0, 0], query[0, 0, :1])
