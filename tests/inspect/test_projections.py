"""Projections read off a model, against what its layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard
from regard.errors import RetrofitError
from regard.inspect.projections import head_projections
from regard.nn import MultiHeadAttention
from regard.retrofit.sites import discover
from tests.retrofit.small_models import FAMILIES, inputs_of, output_of

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_values_and_outputs_are_projections_of_the_stream(family: str) -> None:
    """Whatever enters the projections of the first layer, values are its image under ``value``."""
    model = FAMILIES[family]()
    site = discover(model)[0]
    found = head_projections(site)
    entering: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = next(t for t in (kwargs.get("hidden_states"), *args) if isinstance(t, torch.Tensor))
        entering.append(given)

    hook = site.module.register_forward_pre_hook(note, with_kwargs=True)
    with regard.capture(model) as trace, torch.no_grad():
        output_of(model, **inputs_of(model))
    hook.remove()
    values = torch.einsum("bnd,hvd->bhnv", entering[0], found.value) + found.value_bias[:, None]
    seen = trace[0].values
    assert seen is not None
    torch.testing.assert_close(values, seen.repeat_interleave(values.shape[1] // seen.shape[1], 1), **CLOSE)


def test_a_layer_is_the_sum_of_its_heads() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 6, "full", num_kv_heads=2).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    found = head_projections(discover(layer)[0])
    with regard.capture(layer) as trace:
        out = layer(x)
    scores = torch.einsum("bqd,hde,bke->bhqk", x, found.qk, x)
    shift = torch.einsum("hc,hce,bke->bhk", found.query_bias, found.key, x)
    weights = ((scores + shift[:, :, None]) / 2**0.5).softmax(-1)
    torch.testing.assert_close(weights, trace[0].weights)
    moved = torch.einsum("bhqk,hde,bke->bqd", weights, found.ov, x)
    constant = torch.einsum("hdv,hv->d", found.output, found.value_bias) + found.output_bias
    torch.testing.assert_close(moved + constant, out)


def test_torch_and_what_is_unknown() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=True)
    found = head_projections(discover(module)[0])
    assert found.query.shape == (3, 4, 12) and found.output.shape == (3, 12, 4)
    torch.testing.assert_close(found.key.flatten(0, 1), module.in_proj_weight[12:24])
    bare = regard.create("full")
    with pytest.raises(RetrofitError):
        head_projections(discover(nn.Sequential(bare))[0])
