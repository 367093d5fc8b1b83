"""``regard.retrofit`` on transformers models: the same numbers with ``full``, the right mask for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
import regard.registry
from regard.errors import OptionError, RegardError, RetrofitError, UnsupportedMaskError, UnsupportedPatternError
from regard.masks import Causal, KeyPadding, Sinks, SlidingWindow
from tests.retrofit.probes import Gated, KeysOnly, Linear, SquareOnly, Unmasked, Watching
from tests.retrofit.small_models import (
    FAMILIES,
    bert,
    gpt2,
    inputs_of,
    llama,
    mistral,
    output_of,
    padding,
    t5,
    tokens,
    vit,
    whisper,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_gives_the_models_own_numbers(family: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    inputs = inputs_of(model)
    before = output_of(model, **inputs)
    with regard.retrofit(model, "full"):
        within = output_of(model, **inputs)
    if implementation == "sdpa":
        assert torch.equal(within, before)
    torch.testing.assert_close(within, before, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert"])
def test_padding(family: str, side: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    ids, mask = tokens(), padding(2, 17, **{side: 5})
    before = output_of(model, input_ids=ids, attention_mask=mask)
    with regard.retrofit(model, "full"):
        within = output_of(model, input_ids=ids, attention_mask=mask)
        blind = output_of(model, input_ids=ids)
    real = mask.bool()
    torch.testing.assert_close(within[real], before[real], **CLOSE)
    if side == "left" or family == "bert":
        assert not torch.allclose(blind[real], before[real], atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_of_encoder_and_decoder(implementation: str) -> None:
    model = t5(implementation)
    inputs = inputs_of(model) | {"attention_mask": padding(2, 13, right=4)}
    inputs["decoder_attention_mask"] = padding(2, 9, right=2)
    before = output_of(model, **inputs)
    with regard.retrofit(model, "full"):
        within = output_of(model, **inputs)
    real = inputs["decoder_attention_mask"].bool()
    torch.testing.assert_close(within[real], before[real], **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(implementation: str) -> None:
    model, ids = llama(implementation), tokens(1, 17)
    positions = torch.cat((torch.arange(7), torch.arange(10)))[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    before = output_of(model, **inputs)
    watching = Watching()
    with regard.retrofit(model, "full"):
        within = output_of(model, **inputs)
        alone = torch.cat((output_of(model, input_ids=ids[:, :7]), output_of(model, input_ids=ids[:, 7:])), 1)
    torch.testing.assert_close(within, before, **CLOSE)
    torch.testing.assert_close(within, alone, **CLOSE)
    with regard.retrofit(model, watching):
        output_of(model, **inputs)
    assert all(request.causal and request.mask is not None for request, *_ in watching.seen)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_greedy_generation_is_the_models_own(family: str, padded: bool, cache: str) -> None:
    model, ids = FAMILIES[family](), tokens(2, 9)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if padded:
        arguments["attention_mask"] = padding(2, 9, left=4)
    if cache == "static":
        arguments["cache_implementation"] = "static"
    before = model.generate(ids, **arguments)
    with regard.retrofit(model, "full"):
        assert torch.equal(model.generate(ids, **arguments), before)
        if cache == "dynamic":
            assert torch.equal(model.generate(ids, **arguments, use_cache=False), before)
    assert len(set(before[0, 9:].tolist())) > 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_encoder_decoder_generation_is_the_models_own(cache: str) -> None:
    model, ids = t5(), tokens(2, 9)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": padding(2, 9, right=3)}
    if cache == "static":
        arguments["cache_implementation"] = "static"
    before = model.generate(ids, **arguments)
    with regard.retrofit(model, "full"):
        assert torch.equal(model.generate(ids, **arguments), before)


def test_beam_search_is_the_models_own() -> None:
    model, ids = llama(), tokens(2, 9)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    arguments["attention_mask"] = padding(2, 9, left=4)
    before = model.generate(ids, **arguments)
    with regard.retrofit(model, "full"):
        assert torch.equal(model.generate(ids, **arguments), before)


@pytest.mark.parametrize("mechanism", ["full", "sliding_window"])
@pytest.mark.parametrize("static", [False, True])
def test_prefill_in_pieces_then_decoding_gives_the_whole(mechanism: str, static: bool) -> None:
    """The last of few queries sees the last of many keys, however the cache keeps them."""
    from transformers import DynamicCache, StaticCache

    model, ids = llama(), tokens(2, 15)
    options = {"window": 4, "sinks": 2, "block_size": 4} if mechanism == "sliding_window" else {}
    with regard.retrofit(model, mechanism, **options), torch.no_grad():
        whole = model(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
        pieces = [model(part, past_key_values=cache).logits for part in ids.split([6, 4, 1, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)


def test_a_static_cache_is_cut_to_what_it_holds() -> None:
    from transformers import StaticCache

    model, ids, watching = llama(), tokens(2, 6), Watching()
    with regard.retrofit(model, watching), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert [(q, k) for _, q, k in watching.seen] == [(6, 6)] * 3 + [(1, 7)] * 3
    assert all(request.causal and request.mask is None for request, *_ in watching.seen)


def test_sliding_window_is_the_same_model_under_that_mask() -> None:
    model, ids = llama(), tokens(2, 17)
    rule = Causal() & (SlidingWindow(4) | Sinks(2))
    by_hand = output_of(model, input_ids=ids, attention_mask=rule.dense(17, 17))
    with regard.retrofit(model, "sliding_window", window=4, sinks=2, block_size=4):
        within = output_of(model, input_ids=ids)
    torch.testing.assert_close(within, by_hand, **CLOSE)
    assert not torch.allclose(by_hand, output_of(model, input_ids=ids), atol=1e-2)


def test_sliding_window_and_padding_together() -> None:
    model, ids, mask = bert(), tokens(2, 17), padding(2, 17, right=5)
    rule = SlidingWindow(4) & KeyPadding(mask.bool())
    by_hand = output_of(model, input_ids=ids, attention_mask=rule.dense(17, 17))
    with regard.retrofit(model, "sliding_window", window=4, sinks=0, block_size=4):
        within = output_of(model, input_ids=ids, attention_mask=mask)
    # Queries that are padding themselves and see nothing get zeros here and an average from the model.
    torch.testing.assert_close(within[mask.bool()], by_hand[mask.bool()], **CLOSE)


def test_the_models_own_sliding_window_stays_in_force() -> None:
    model, ids, watching = mistral(), tokens(2, 17), Watching()
    before = output_of(model, input_ids=ids)
    with regard.retrofit(model, watching):
        torch.testing.assert_close(output_of(model, input_ids=ids), before, **CLOSE)
    window = Causal() & SlidingWindow(model.config.sliding_window)
    request = watching.seen[0][0]
    assert request.causal and request.visible is not None
    assert torch.equal(request.visible.dense(17, 17), window.dense(17, 17))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "whisper"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_that_hide_nothing_are_no_masks(family: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    inputs = inputs_of(model)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    before = output_of(model, **inputs)
    for mechanism in (Unmasked(), KeysOnly()):
        with regard.retrofit(model, mechanism):
            torch.testing.assert_close(output_of(model, **inputs), before, **CLOSE)


def test_padding_reaches_a_mechanism_of_padding_alone() -> None:
    for family in ("llama", "bert"):
        model, ids, mask = FAMILIES[family](), tokens(), padding(2, 17, left=5)
        before = output_of(model, input_ids=ids, attention_mask=mask)
        with regard.retrofit(model, KeysOnly()):
            within = output_of(model, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(within[mask.bool()], before[mask.bool()], **CLOSE)


def test_a_mask_that_cannot_be_honoured_is_an_error() -> None:
    model, ids = llama(), tokens(2, 17)
    with (
        regard.retrofit(model, Unmasked()),
        pytest.raises(UnsupportedMaskError, match=r"model\.layers\.0\.self_attn.*pad"),
    ):
        output_of(model, input_ids=ids, attention_mask=padding(2, 17, left=3))
    packed = {"position_ids": torch.cat((torch.arange(7), torch.arange(10)))[None].expand(2, -1), "use_cache": False}
    with regard.retrofit(model, KeysOnly()), pytest.raises(UnsupportedMaskError, match="packed documents"):
        output_of(model, input_ids=ids, **packed)
    windowed = mistral()
    with regard.retrofit(windowed, KeysOnly()), pytest.raises(UnsupportedMaskError, match="sliding window"):
        output_of(windowed, input_ids=ids)


def test_a_mask_passed_by_hand_is_read() -> None:
    """Boolean or float, triangular or not: what it hides stays hidden."""
    ids = tokens(2, 11)
    seen = torch.rand(2, 1, 11, 11) < 0.5
    seen |= torch.eye(11, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for model in (llama(), bert()):
        before = output_of(model, input_ids=ids, attention_mask=seen)
        with regard.retrofit(model, "full"):
            torch.testing.assert_close(output_of(model, input_ids=ids, attention_mask=seen), before, **CLOSE)
            torch.testing.assert_close(output_of(model, input_ids=ids, attention_mask=added), before, **CLOSE)
        with regard.retrofit(model, Unmasked()), pytest.raises(UnsupportedMaskError):
            output_of(model, input_ids=ids, attention_mask=added)
    triangle = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    watching = Watching()
    with regard.retrofit(model, watching):
        output_of(model, input_ids=ids, attention_mask=triangle)
    assert watching.seen[0][0].causal and watching.seen[0][0].mask is None


def test_a_float_mask_with_values_is_a_bias() -> None:
    model, ids = llama(), tokens(2, 11)
    bias = torch.randn(2, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), torch.finfo(torch.float32).min)
    before = output_of(model, input_ids=ids, attention_mask=bias)
    with regard.retrofit(model, "full"):
        torch.testing.assert_close(output_of(model, input_ids=ids, attention_mask=bias), before, **CLOSE)
    with regard.retrofit(model, "sliding_window"), pytest.raises(UnsupportedMaskError, match="adds a bias"):
        output_of(model, input_ids=ids, attention_mask=bias)


def test_relative_positions_of_t5_need_a_mechanism_that_takes_a_bias() -> None:
    model = t5()
    inputs = inputs_of(model)
    before = output_of(model, **inputs)
    with (
        regard.retrofit(model, "sliding_window", window=64),
        pytest.raises(UnsupportedMaskError, match=r"encoder\.block\.0\.layer\.0\.SelfAttention.*takes_bias"),
    ):
        output_of(model, **inputs)
    # Cross-attention carries a bias of zeros, which is none.
    watching = Watching()
    with regard.retrofit(model, watching, layers="re:EncDec"):
        torch.testing.assert_close(output_of(model, **inputs), before, **CLOSE)
    assert len(watching.seen) == 2
    for request, q_len, k_len in watching.seen:
        assert (q_len, k_len, request.causal, request.bias, request.scale) == (9, 13, False, None, 1.0)


def test_scale_is_passed_only_where_it_is_unusual() -> None:
    for model, scale in ((llama(), None), (whisper(), 1.0), (gpt2(scale_attn_by_inverse_layer_idx=True), 8**-0.5 / 2)):
        watching = Watching()
        with regard.retrofit(model, watching):
            output_of(model, **inputs_of(model))
        assert watching.seen[-1 if scale != 1.0 else 0][0].scale == (None if scale is None else pytest.approx(scale))


def test_a_mechanism_without_cross_attention_needs_use_cache_false() -> None:
    model, ids = llama(), tokens(1, 9)
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **arguments)
    with regard.retrofit(model, SquareOnly()):
        with pytest.raises(UnsupportedPatternError, match=r"use_cache=False"):
            model.generate(ids, **arguments)
        assert torch.equal(model.generate(ids, **arguments, use_cache=False), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "whisper"])
def test_layers_left_out_keep_the_models_own_attention(family: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    inputs = inputs_of(model)
    before = output_of(model, **inputs)
    options = {"layers": [0]} if family != "t5" else {"layers": "re:^decoder.*0.*EncDec"}
    with regard.retrofit(model, Watching(), **options) as handle:
        within = output_of(model, **inputs)
    assert 0 < len(handle.modules) < len(list(regard.retrofit.discover(model)))
    torch.testing.assert_close(within, before, **CLOSE)


def test_layers_left_out_get_masks_of_their_own_form() -> None:
    """An implementation of one's own, with a mask function that gives the raw padding mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shapes = []

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        shapes.append(None if attention_mask is None else tuple(attention_mask.shape))
        if attention_mask is not None:
            rule = Causal() & KeyPadding(attention_mask)
            attention_mask = rule.dense(query.shape[2], key.shape[2])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("padded_form", attend)
    AttentionMaskInterface.register("padded_form", lambda attention_mask=None, **kwargs: attention_mask)
    try:
        model, ids, mask = llama("padded_form"), tokens(), padding(2, 17, left=5)
        before = output_of(model, input_ids=ids, attention_mask=mask)
        with regard.retrofit(model, "full", layers=[1]):
            within = output_of(model, input_ids=ids, attention_mask=mask)
        assert shapes == [(2, 17)] * 5
        torch.testing.assert_close(within[mask.bool()], before[mask.bool()], **CLOSE)
    finally:
        del AttentionInterface._global_mapping["padded_form"], AttentionMaskInterface._global_mapping["padded_form"]


def test_a_mechanism_for_each_layer() -> None:
    model, ids = llama(), tokens()
    plan = {"re:layers\\.0\\.": "full", -1: ("sliding_window", {"window": 3, "sinks": 0}), "model": Watching()}
    with regard.retrofit(model, plan) as handle:
        within = output_of(model, input_ids=ids)
    kinds = [type(module).__name__ for module in handle.modules.values()]
    assert kinds == ["FullAttention", "Watching", "SlidingWindowAttention"]
    with regard.retrofit(model, "sliding_window", layers=[2], window=3, sinks=0):
        torch.testing.assert_close(output_of(model, input_ids=ids), within, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_output_attentions_gives_the_implied_weights(family: str) -> None:
    inputs = inputs_of(FAMILIES[family]("eager"))
    model = FAMILIES[family]("eager")
    with torch.no_grad():
        before = model(**inputs, output_attentions=True)
        with regard.retrofit(model, "full"):
            within = model(**inputs, output_attentions=True)
            without = model(**inputs)
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        if before.get(name):
            assert len(within[name]) == len(before[name]) == 2 + (family == "llama")
            for ours, theirs in zip(within[name], before[name], strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)
            assert name not in without or without[name] is None


def test_output_attentions_of_a_sparse_mechanism_and_of_a_static_cache() -> None:
    from transformers import StaticCache

    model, ids = llama(), tokens()
    with regard.retrofit(model, "sliding_window", window=4, sinks=1), torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0]
        cache = StaticCache(config=model.config, max_cache_len=32)
        cached = model(ids, past_key_values=cache, output_attentions=True).attentions[0]
    rule = (Causal() & (SlidingWindow(4) | Sinks(1))).dense(17, 17)
    assert torch.equal(weights > 0, rule.expand_as(weights))
    assert cached.shape == (2, 4, 17, 32)
    torch.testing.assert_close(cached[..., :17], weights, **CLOSE)
    assert not cached[..., 17:].any()
    with regard.retrofit(model, Gated()), pytest.raises(UnsupportedPatternError, match="not linear in the values"):
        model(ids, output_attentions=True)


def test_attention_dropout_in_training() -> None:
    model, ids = llama("eager", attention_dropout=0.3), tokens()
    model.train()

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return model(ids, use_cache=False).logits

    before = run()
    with regard.retrofit(model, "full"):
        torch.testing.assert_close(run(), before, **CLOSE)
    with regard.retrofit(model, Linear()), pytest.raises(RetrofitError, match=r"self_attn.*dropout 0\.3.*'off'"):
        run()
    with regard.retrofit(model, Linear(), attention_dropout="weights"):
        torch.testing.assert_close(run(), before, **CLOSE)
    with regard.retrofit(model, Linear(), attention_dropout="off"):
        off = run()
    torch.testing.assert_close(off, model.eval()(ids).logits, **CLOSE)
    with pytest.raises(OptionError, match="attention_dropout is one of"):
        regard.retrofit(model, "full", attention_dropout="sometimes")  # type: ignore[arg-type]


def test_gradients_flow_through() -> None:
    model, ids = llama(), tokens()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with regard.retrofit(model, "full"):
        within = gradients()
    for ours, theirs in zip(within, before, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, ids = llama().to(dtype), tokens()
        mask = padding(2, 17, left=4)
        before = output_of(model, input_ids=ids, attention_mask=mask)
        with regard.retrofit(model, "full"):
            within = output_of(model, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(within[mask.bool()], before[mask.bool()], atol=0.1, rtol=0.05)


def test_what_else_changes_attention_is_refused() -> None:
    """Logit caps, learned sinks and the like are no part of a mechanism."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    with regard.retrofit(model, "full"), pytest.raises(RetrofitError, match=r"layers\.0\.self_attn.*softcap"):
        output_of(model, input_ids=tokens())


def test_packed_lengths_without_positions_are_refused() -> None:
    model, ids = llama(), tokens(1, 10)
    lengths = torch.tensor([0, 4, 10], dtype=torch.int32)
    with regard.retrofit(model, "full"), pytest.raises(UnsupportedMaskError, match="position_ids"):
        output_of(model, input_ids=ids, cu_seq_lens_q=lengths, use_cache=False)


def test_images_have_no_grid_of_their_own() -> None:
    class Grids(Watching):
        needs_grid = True
        grid_axes = frozenset({2})

    with pytest.raises(RetrofitError, match="needs a grid of 2 axes"):
        regard.retrofit(vit(), Grids())


@pytest.fixture(scope="module")
def decoder_and_encoder() -> tuple[Any, Any]:
    return llama(), bert()


@pytest.mark.parametrize("key", [entry.key for entry in regard.catalogue("mechanism")])
def test_every_mechanism_runs_in_a_decoder_or_an_encoder_or_says_why(
    key: str, decoder_and_encoder: tuple[Any, Any]
) -> None:
    """Forward, with padding, cached decoding, captured: a result without NaN, or an error that names the layer."""
    ids, mask = tokens(2, 40), padding(2, 40, left=3)
    steps = torch.ones(1, 40, dtype=torch.long)
    ran = 0
    for model in decoder_and_encoder:
        before = output_of(model, input_ids=ids)
        calls: list[Any] = [
            lambda m: output_of(m, input_ids=ids),
            lambda m: output_of(m, input_ids=ids, attention_mask=mask),
        ]
        if model.can_generate():
            calls.append(lambda m: m.generate(ids[:1], attention_mask=steps, max_new_tokens=2, do_sample=False).float())
        for call in calls:
            try:
                with regard.retrofit(model, key, **regard.describe(key).example), regard.capture(model) as trace:
                    output = call(model)
            except RegardError as error:
                assert "layers" in str(error) or "layer." in str(error)
                continue
            real = output[mask.bool()] if output.shape[:2] == mask.shape else output
            assert torch.isfinite(real).all() and len(trace) == len(list(regard.retrofit.discover(model)))
            ran += 1
        assert torch.equal(output_of(model, input_ids=ids), before)
    cls: Any = regard.registry.get(key)
    assert ran or cls.needs_grid or cls.applies_rotary
