"""Projections read off a model, against what its layers compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import regard
from regard.errors import RetrofitError
from regard.inspect.projections import head_projections, output_projection
from regard.nn import MultiHeadAttention
from regard.retrofit.sites import discover
from tests.retrofit.small_models import FAMILIES, inputs_of, output_of, wide

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def made(name: str, **changes: Any) -> Any:
    """A model of transformers by its config's name."""
    import transformers

    size = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**{**size, **heads, **changes})
    return wide(transformers.AutoModelForCausalLM.from_config(config))


def bigcode(multi_query: bool) -> Any:
    size = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "n_positions": 64}
    return made("GPTBigCode", multi_query=multi_query, **size)


MORE: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "phi3": partial(made, "Phi3"),
    "bigcode": partial(bigcode, True),
    "opt": partial(made, "OPT", ffn_dim=48, word_embed_proj_dim=32, num_key_value_heads=4),
    "gemma2": partial(made, "Gemma2", head_dim=16),
}
ROTARY = ("llama", "mistral", "phi3", "gemma2")


@pytest.mark.parametrize("family", list(MORE))
def test_queries_values_and_outputs_are_projections_of_the_stream(family: str) -> None:
    """Whatever enters the projections of the first layer, values are its image under ``value`` (queries and keys too,
    where none are rotated), and what enters the output projection is the heads side by side."""
    model = MORE[family]()
    site = discover(model)[0]
    found = head_projections(site)
    entering: list[torch.Tensor] = []
    leaving: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = next(t for t in (kwargs.get("hidden_states"), *args) if isinstance(t, torch.Tensor))
        entering.append(given)

    hooks = [site.module.register_forward_pre_hook(note, with_kwargs=True)]
    weight, bias = output_projection(site)
    for module in model.modules():
        own = getattr(module, "weight", None)
        if isinstance(own, torch.Tensor) and own.data_ptr() == weight.data_ptr():
            hooks.append(module.register_forward_pre_hook(lambda _, args: leaving.append(args[0])))
    with regard.capture(model, "all") as trace, torch.no_grad():
        output_of(model, **inputs_of(model))
    for hook in hooks:
        hook.remove()
    pairs = [(found.value, found.value_bias, trace[0].values)]
    if family not in ROTARY:
        pairs += [(found.query, found.query_bias, trace[0].queries), (found.key, found.key_bias, trace[0].keys)]
    scale = float(found.query.shape[1]) ** -0.5 if family in ("whisper", "opt") else 1.0
    for place, (linear, shift, seen) in enumerate(pairs):
        made_of = torch.einsum("bnd,hvd->bhnv", entering[0], linear) + shift[:, None]
        assert seen is not None
        # These two scale their queries beforehand.
        made_of = made_of * scale if place == 1 else made_of
        torch.testing.assert_close(made_of, seen.repeat_interleave(made_of.shape[1] // seen.shape[1], 1), **CLOSE)
    heads = trace[0].head_outputs
    assert heads is not None
    torch.testing.assert_close(leaving[0], heads.transpose(1, 2).flatten(2), **CLOSE)
    side_by_side = torch.einsum("hdv,bhnv->bnd", found.output, heads) + found.output_bias
    torch.testing.assert_close(side_by_side, torch.nn.functional.linear(leaving[0], weight, bias), **CLOSE)


class Doubled(MultiHeadAttention):
    """Its query projection holds a gate too."""

    def __init__(self) -> None:
        super().__init__(12, 3)
        self.query = nn.Linear(12, 24)


class Headless(nn.Module):
    """Attention whose output projection has another name, in a block that has a ``proj`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        attention = MultiHeadAttention(12, 3)
        attention.last, attention.out = attention.out, nn.Identity()  # type: ignore[assignment]
        block = nn.Module()
        block.attention, block.proj = attention, nn.Linear(12, 12)  # type: ignore[assignment]
        self.blocks = nn.ModuleList((block,))


def test_what_is_stored_another_way_is_refused() -> None:
    for model, told in (
        (bigcode(False), "not found under the usual"),
        (made("GPTNeoX"), "not found under the usual"),
        (Doubled(), "more than one thing"),
        (Headless(), "no output projection"),
    ):
        with pytest.raises(RetrofitError, match=told):
            head_projections(discover(model)[0])
    wider = MultiHeadAttention(12, 3)
    wider.out = nn.Linear(15, 12)
    with pytest.raises(RetrofitError, match="do not go into the 15"):
        head_projections(discover(wider)[0])


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
