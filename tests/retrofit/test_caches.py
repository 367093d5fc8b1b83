"""Generation from decoding states, and prompts read by another mechanism than the one that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import regard
from regard.cache import (
    DynamicCache,
    EvictingCache,
    HeavyHitters,
    KeyValueCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    Recent,
    StaticCache,
)
from regard.errors import OptionError, RetrofitError, UnsupportedMaskError
from tests.retrofit.small_models import gpt2, llama, padding, t5, tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def generated(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    ones = torch.ones_like(ids)
    out = model.generate(ids, **{"attention_mask": ones, **GREEDY, **arguments})
    assert isinstance(out, Tensor)
    return out


STORAGES: dict[str, Callable[[], KeyValueCache] | None] = {
    "own": None,
    "dynamic": DynamicCache,
    "static": lambda: StaticCache(32),
    "paged": lambda: PagedCache(PagePool(32, 4)),
    "evicting nothing": lambda: EvictingCache(HeavyHitters(64)),
    "recent enough": lambda: EvictingCache(Recent(64)),
    "residual": lambda: QuantizedCache(residual=64),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_is_the_models_own_from_any_cache(build: Callable[[], PreTrainedModel], storage: str) -> None:
    model, ids = build(), tokens(2, 9)
    before = generated(model, ids)
    with regard.retrofit(model, "full") as handle:
        cache = handle.cache(STORAGES[storage])
        assert torch.equal(generated(model, ids, past_key_values=cache), before)
        assert cache.get_seq_length() == 9 + 11
    assert torch.equal(generated(model, ids), before)


@pytest.mark.parametrize("name", ["sliding_window", "moba", "lightning_attention", "flow_attention", "s2_attention"])
def test_states_generate_what_the_parallel_form_does(name: str) -> None:
    """A model without any cache sees all tokens anew at each step; the states must give the same."""
    options: dict[str, Any] = {
        "sliding_window": {"window": 5, "sinks": 1},
        "moba": {"block_size": 4, "top_k": 2},
        "s2_attention": {"block_size": 2, "local_blocks": 2, "stride": 3},
    }
    model, ids = llama().double(), tokens(2, 9)
    with regard.retrofit(model, name, **options.get(name, {})) as handle:
        slow = generated(model, ids, use_cache=False)
        assert torch.equal(generated(model, ids, past_key_values=handle.cache()), slow)


def test_some_layers_may_keep_the_models_own_cache() -> None:
    model, ids = llama(), tokens(2, 9)
    with regard.retrofit(model, "sliding_window", layers=[1], window=4) as handle:
        slow = generated(model, ids, use_cache=False)
        assert torch.equal(generated(model, ids, past_key_values=handle.cache()), slow)


def test_little_is_kept_where_little_is_seen() -> None:
    model, ids = llama(), tokens(1, 40)
    with regard.retrofit(model, "full") as handle, torch.no_grad():
        cache = handle.cache(lambda: EvictingCache(HeavyHitters(8, recent=4)))
        generated(model, ids, past_key_values=cache)
        for layer in cache.layers:
            assert int(layer._decoding.state.counts().max()) == 8 and layer.get_seq_length() == 51


@pytest.mark.parametrize("own_cache", [False, True])
def test_prompt_and_answer_by_different_mechanisms(own_cache: bool) -> None:
    """Prefill in a window, decode in full: as when the prompt's cache is filled under the window and then read."""
    model, ids = llama().double(), tokens(2, 12)
    with regard.retrofit(model, "sliding_window", window=3, sinks=0), torch.no_grad():
        past = model(input_ids=ids, use_cache=True)
    first, expected = past.logits[:, -1].argmax(-1, keepdim=True), []
    with torch.no_grad():
        token, cache = first, past.past_key_values
        for _ in range(12):
            expected.append(token)
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    with regard.retrofit(model, "sliding_window", decode="full", window=3, sinks=0) as handle:
        arguments = {"past_key_values": handle.cache()} if own_cache else {}
        got = generated(model, ids, **arguments)[:, 12:]
    assert torch.equal(got, torch.cat(expected, 1))


def test_a_prompt_in_pieces_needs_its_keys() -> None:
    model, ids = llama().double(), tokens(1, 12)
    with regard.retrofit(model, "full", decode="moba") as handle, torch.no_grad():
        cache = handle.cache()
        model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
        with pytest.raises(RetrofitError, match="in one piece"):
            model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)
    with regard.retrofit(model, "moba", decode="full", block_size=4) as handle, torch.no_grad():
        cache = handle.cache()
        whole = model(input_ids=ids, use_cache=False).logits
        parts = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(6, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("storage", ["dynamic", "paged", "residual"])
def test_beam_search(storage: str) -> None:
    model, ids = llama(), tokens(2, 9)
    before = generated(model, ids, num_beams=3)
    with regard.retrofit(model, "full") as handle:
        assert torch.equal(generated(model, ids, num_beams=3, past_key_values=handle.cache(STORAGES[storage])), before)
    with (
        regard.retrofit(model, "lightning_attention") as handle,
        pytest.raises(RetrofitError, match="divided by rows"),
    ):
        generated(model, ids, num_beams=3, past_key_values=handle.cache())


def test_cropping() -> None:
    model, ids = llama().double(), tokens(1, 12)
    with regard.retrofit(model, "full") as handle, torch.no_grad():
        cache = handle.cache()
        whole = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-5)
        again = model(input_ids=ids[:, 7:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(again, whole[:, 7:])
        cache.reset()
        torch.testing.assert_close(model(input_ids=ids, past_key_values=cache, use_cache=True).logits, whole)


def test_what_cannot_be_decoded_from_states_is_refused() -> None:
    model, ids = llama(), tokens(2, 9)
    with regard.retrofit(model, "full") as handle:
        with pytest.raises(UnsupportedMaskError, match="padding"):
            generated(model, ids, attention_mask=padding(2, 9, left=4), past_key_values=handle.cache())
        with pytest.raises(RetrofitError, match="no attention weights"):
            model(input_ids=ids, past_key_values=handle.cache(), use_cache=True, output_attentions=True)
        cache = handle.cache()
        with regard.retrofit(model, "full"), pytest.raises(RetrofitError, match="another retrofit"):
            generated(model, ids, past_key_values=cache)
    with pytest.raises(RetrofitError, match="was restored"):
        generated(model, ids, past_key_values=cache)
    with pytest.raises(RetrofitError, match="was restored"):
        handle.cache()
    with regard.retrofit(model, "spargeattn") as handle, pytest.raises(RetrofitError, match="decode='full'"):
        handle.cache()
    with regard.retrofit(model, "moba") as handle, pytest.raises(OptionError, match="place in the sequence"):
        handle.cache(EvictingCache)
    with regard.retrofit(t5(), "full") as handle, pytest.raises(RetrofitError, match="in one stack"):
        handle.cache()


def test_parameters_of_both_mechanisms_belong_to_the_handle() -> None:
    model = llama()
    with regard.retrofit(model, "full", decode="dynamic_mask_attention") as handle:
        names = [name for name, _ in handle.named_parameters()]
        assert names and all(".decode." in name for name in names)
        handle.load_state_dict(handle.state_dict())
