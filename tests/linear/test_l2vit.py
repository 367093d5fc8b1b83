from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.layers.attention_stats import neighbourhood
from regard.linear.l2vit import LocalConcentration, concentration, relu_linear_attention

D = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def draw(n: int = 13, m: int = 17, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 3, n, 6), (2, 3, m, 6), (2, 3, m, 5))
    query, key, value = (torch.randn(shape, dtype=D) for shape in shapes)
    return size * query, size * key, value


@pytest.mark.paper("l2vit")
@pytest.mark.parametrize("denom_min", [100.0, 1e-3])
def test_values_first_equals_weights_first(denom_min: float) -> None:
    query, key, value = draw()
    temperature = torch.rand(3, dtype=D) + 0.1
    scores = query.relu() @ key.relu().mT
    rows = scores * temperature[:, None, None] / scores.sum(-1, keepdim=True).clamp_min(denom_min)
    found = relu_linear_attention(query, key, value, temperature, denom_min)
    torch.testing.assert_close(found, rows @ value, **TIGHT)
    mechanism = regard.create("l2vit", num_heads=3, denom_min=denom_min).double()
    with torch.no_grad():
        mechanism.temperature.copy_(temperature)
    torch.testing.assert_close(mechanism.weights(query, key), rows, **TIGHT)


@pytest.mark.paper("l2vit")
def test_rows_are_distributions_where_the_bound_is_not_met() -> None:
    query, key, value = draw(size=10)
    weights = regard.create("l2vit").weights(query, key, scale=1.0)
    found = (query.relu() * key.relu().sum(2, keepdim=True)).sum(-1) >= 100
    assert float(found.double().mean()) > 0.9
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1)[found], torch.ones_like(weights.sum(-1)[found]), **TIGHT)
    out = relu_linear_attention(query, key, value, 1.0)
    low, high = value.amin(2, keepdim=True) - 1e-12, value.amax(2, keepdim=True) + 1e-12
    assert bool(((out >= low) & (out <= high))[found].all())


@pytest.mark.paper("l2vit")
def test_linear_below_the_bound_and_invariant_above() -> None:
    query, key, value = draw()
    query = query.abs()
    divisor = (query * key.relu().sum(2, keepdim=True)).sum(-1, keepdim=True)
    below, above = 90 / divisor * query, 250 / divisor * query
    out = relu_linear_attention(below, key, value)
    torch.testing.assert_close(relu_linear_attention(below / 2, key, value), out / 2, **TIGHT)
    other = below.roll(1, 2)
    mixed = relu_linear_attention(0.3 * below + 0.7 * other, key, value)
    torch.testing.assert_close(mixed, 0.3 * out + 0.7 * relu_linear_attention(other, key, value), **TIGHT)
    out = relu_linear_attention(above, key, value)
    torch.testing.assert_close(relu_linear_attention(above / 2, key, value), out, **TIGHT)
    torch.testing.assert_close(relu_linear_attention(7 * above, key, value), out, **TIGHT)
    assert not bool(relu_linear_attention(-query, key, value).any()), "a query that finds nothing gives nothing"


@pytest.mark.paper("l2vit")
def test_temperature_starts_at_the_usual_scale() -> None:
    query, key, value = draw()
    mechanism = regard.create("l2vit", num_heads=3, head_dim=6).double()
    torch.testing.assert_close(
        mechanism(query, key, value), relu_linear_attention(query, key, value), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        relu_linear_attention(query, key, value), relu_linear_attention(query, key, value, 1.0) / 6**0.5, **TIGHT
    )


@pytest.mark.paper("l2vit")
def test_local_concentration_by_hand() -> None:
    module, x = LocalConcentration(8).double(), torch.randn(2, 30, 8, dtype=D)
    module.norm.running_mean.copy_(torch.randn(8))
    module.norm.running_var.copy_(torch.rand(8) + 0.5)
    module.eval()
    maps = x.mT.unflatten(2, (5, 6))
    maps = F.gelu(F.conv2d(maps, module.spread.weight, module.spread.bias, padding=3, groups=8))
    mean, std = module.norm.running_mean, (module.norm.running_var + 1e-5).sqrt()
    maps = (maps - mean[:, None, None]) / std[:, None, None]
    maps = F.conv2d(maps, module.gather.weight, module.gather.bias, padding=3, groups=8)
    torch.testing.assert_close(module(x, (5, 6)), maps.flatten(2).mT, **TIGHT)


@pytest.mark.paper("l2vit")
def test_concentration_tells_flat_from_peaked() -> None:
    grid, n = (14, 14), 196
    flat = concentration(torch.full((1, n, n), 1 / n, dtype=D), grid)
    assert abs(flat.entropy - math.log(n)) < 1e-12 and abs(flat.flat - math.log(n)) < 1e-6
    assert abs(flat.local_mass - float(neighbourhood(grid).double().mean())) < 1e-12
    near = concentration(neighbourhood(grid).double(), grid)
    assert abs(near.local_mass - 1) < 1e-12 and near.entropy < math.log(9) + 1e-12
    half = torch.cat((torch.zeros(n // 2, n, dtype=D), torch.eye(n, dtype=D)[n // 2 :]))
    assert concentration(half, grid).local_mass == 1, "rows without weight do not count"
    query, key = torch.randn(n, 32, dtype=D), torch.randn(n, 32, dtype=D)
    linear = concentration(query.relu() @ key.relu().T, grid)
    softmax = concentration((4 * query @ key.T / 32**0.5).softmax(-1), grid)
    assert softmax.entropy < linear.entropy - 2 and linear.entropy > 0.97 * linear.flat


def test_padding_is_as_if_it_were_not_there() -> None:
    query, key, value = draw()
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[:, 9:] = False
    expected = relu_linear_attention(query, key[:, :, :9], value[:, :, :9])
    torch.testing.assert_close(relu_linear_attention(query, key, value, key_padding_mask=valid), expected, **TIGHT)


def test_bad_input_teaches() -> None:
    query, key, value = draw()
    for call in (
        lambda: regard.create("l2vit", denom_min=0.0),
        lambda: relu_linear_attention(query, key, value, denom_min=-1.0),
    ):
        with pytest.raises(OptionError, match="denom_min"):
            call()
    with pytest.raises(ShapeError, match="head"):
        regard.create("l2vit", num_heads=2).double()(query, key, value)
    with pytest.raises(OptionError, match="odd"):
        LocalConcentration(8, 4)
    with pytest.raises(ShapeError, match="grid"):
        LocalConcentration(8)(torch.randn(1, 12, 8), (3, 3))
