"""``regard.capture``: what it shows, against the model's own arithmetic; and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, RetrofitError, UnknownNameError
from regard.inspect.capture import LayerTrace
from regard.masks import Causal, SlidingWindow
from tests.retrofit.probes import Gated, Tempered
from tests.retrofit.small_models import FAMILIES, bert, gpt2, inputs_of, llama, output_of, padding, t5, tokens, vit
from tests.retrofit.test_restoring import assert_same, state

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_same_and_the_model_untouched(family: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    inputs = inputs_of(model)
    if "input_ids" in inputs and family not in ("t5", "gpt2"):
        inputs["attention_mask"] = padding(2, 17, left=4)
    before, output = state(model), output_of(model, **inputs)
    with regard.capture(model, "all") as trace:
        assert torch.equal(output_of(model, **inputs), output)
    assert_same(state(model), before)
    assert torch.equal(output_of(model, **inputs), output)
    assert len(trace) == len(trace.paths) == len(list(trace)) == len(regard.retrofit.discover(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_weights_and_hidden_states_are_those_of_transformers(family: str, implementation: str) -> None:
    torch.manual_seed(1)
    eager = FAMILIES[family]("eager")
    model = FAMILIES[family](implementation)
    model.load_state_dict(eager.state_dict())
    inputs = inputs_of(model)
    if family in ("llama", "bert"):
        inputs["attention_mask"] = padding(2, 17, right=4)
    with torch.no_grad():
        own = eager(**inputs, output_attentions=True, output_hidden_states=True)
        with regard.capture(model) as trace:
            model(**inputs)
    if family == "t5":
        weights = [*own.encoder_attentions]
        for pair in zip(own.decoder_attentions, own.cross_attentions, strict=True):
            weights += pair
        states = [trace["encoder.block.1.layer.0.SelfAttention"].hidden_states]
        torch.testing.assert_close(states[0], own.encoder_hidden_states[1], **CLOSE)
    else:
        weights = list(own.attentions)
        for layer, theirs in zip(trace, own.hidden_states, strict=False):
            torch.testing.assert_close(layer.hidden_states, theirs, **CLOSE)
    assert len(weights) == len(trace)
    for layer, theirs in zip(trace, weights, strict=True):
        assert layer.weights is not None
        rows = theirs.sum(-1, keepdim=True) > 0
        torch.testing.assert_close(layer.weights, theirs * rows, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5", "whisper"])
def test_weights_times_values_are_the_head_outputs(family: str) -> None:
    model = FAMILIES[family]()
    with regard.capture(model, "all") as trace, torch.no_grad():
        model(**inputs_of(model))
    for layer in trace:
        assert layer.weights is not None and layer.values is not None and layer.head_outputs is not None
        values = layer.values.repeat_interleave(layer.weights.shape[1] // layer.values.shape[1], 1)
        torch.testing.assert_close(layer.weights @ values, layer.head_outputs, **CLOSE)
        assert layer.queries is not None and layer.keys is not None
        assert layer.queries.shape[:3] == layer.weights.shape[:3] and layer.keys.shape == layer.values.shape
        assert not any(t.requires_grad for t in (layer.weights, layer.values, layer.head_outputs, layer.queries))


def test_head_outputs_enter_the_output_projection() -> None:
    model, seen = llama(), []
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with regard.capture(model, layers=[1]) as trace:
        output_of(model, input_ids=tokens())
    hook.remove()
    assert trace.paths == ["model.layers.1.self_attn"]
    head_outputs = trace[0].head_outputs
    assert head_outputs is not None
    assert torch.equal(head_outputs.transpose(1, 2).flatten(2), seen[0])


def test_only_what_was_asked_is_kept() -> None:
    model = vit()
    with regard.capture(model, "head_outputs") as trace:
        output_of(model, **inputs_of(model))
    layer = trace[0]
    assert layer.head_outputs is not None and layer.head_outputs.shape == (2, 4, 10, 8)
    names = ("weights", "values", "queries", "keys", "hidden_states")
    assert all(getattr(layer, name) is None for name in names) and not layer._sources
    with regard.capture(model, ["keys", "values"], summarize=lambda layer: layer.values) as trace:
        output_of(model, **inputs_of(model))
    assert trace[0].keys is not None and trace[0].summary is trace[0].values and trace[0].weights is None
    with regard.capture(model, summarize=lambda layer: layer.values) as trace:
        output_of(model, **inputs_of(model))
    assert trace[0].values is None and trace[0].summary is None
    with pytest.raises(UnknownNameError, match="'head_outputs'"):
        regard.capture(model, ["head_output"])  # type: ignore[list-item]


@pytest.mark.parametrize("inside", [True, False])
def test_a_retrofitted_layer_shows_what_its_mechanism_implies(inside: bool) -> None:
    """In whichever order the two are put on."""
    model, ids = llama(), tokens()
    first = {"window": 4, "sinks": 0, "layers": [0]}
    capture = regard.capture(model)
    if inside:
        with regard.retrofit(model, "sliding_window", **first), capture as trace:
            output = output_of(model, input_ids=ids)
    else:
        with capture as trace, regard.retrofit(model, "sliding_window", **first):
            output = output_of(model, input_ids=ids)
    with regard.retrofit(model, "sliding_window", **first):
        assert torch.equal(output_of(model, input_ids=ids), output)
    seen = [layer.weights > 0 for layer in trace if layer.weights is not None]
    assert torch.equal(seen[0], (Causal() & SlidingWindow(4)).dense(17, 17).expand(2, 4, 17, 17))
    assert all(torch.equal(s, Causal().dense(17, 17).expand(2, 4, 17, 17)) for s in seen[1:])


def test_a_mechanism_without_weights_shows_none() -> None:
    model, ids = llama(), tokens()
    with regard.retrofit(model, Gated(), layers=[0]), regard.capture(model) as trace:
        output_of(model, input_ids=ids)
    assert trace[0].weights is None and trace[0].head_outputs is not None and trace[1].weights is not None
    with pytest.raises(OptionError, match="cannot be stacked"):
        trace.stack("weights")


def test_looking_changes_no_training_state() -> None:
    class Counting(Tempered):
        def attend(self, *args: Any) -> Tensor:
            if self.training:
                self.calls += 1
            return super().attend(*args)

    model, ids = llama(), tokens()
    model.train()
    mechanism = Counting(4, 2, 8, 32, 0, 1)
    with regard.retrofit(model, mechanism, layers=[0]), regard.capture(model) as trace:
        model(ids)
    assert mechanism.calls == 1 and mechanism.training and trace[0].weights is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("retrofitted", [False, True])
def test_gradients_against_small_differences(implementation: str, retrofitted: bool) -> None:
    """Each gradient is the derivative of the loss: nudging the tensor on its way moves the loss by as much."""
    model, ids = gpt2(implementation).double(), tokens(1, 7)
    handle = regard.retrofit(model, "full" if retrofitted else {0: "full"})
    layer, block = run_backward(model, ids)[1], model.transformer.h[1]
    places = {"hidden_states": block, "head_outputs": block.attn.c_proj}
    for name, place in places.items():
        gradient = layer.gradient(name)
        assert gradient.shape == getattr(layer, name).shape
        nudge = torch.randn_like(gradient) * 1e-5

        by = nudge.transpose(1, 2).flatten(2) if name == "head_outputs" else nudge

        def loss(sign: int, place: nn.Module = place, by: Tensor = by) -> Tensor:
            hook = place.register_forward_pre_hook(lambda module, args: (args[0] + sign * by, *args[1:]))
            with torch.no_grad():
                found = model(ids, use_cache=False).logits.square().mean()
            hook.remove()
            return found

        assert ((loss(1) - loss(-1)) / 2).item() == pytest.approx((gradient * nudge).sum().item(), rel=1e-5)
    check_chain_rule(layer, atol=1e-14)
    handle.restore()


def test_gradients_with_grouped_heads() -> None:
    # Llama's norms compute in single precision, so that small differences do not help; the chain rule does.
    check_chain_rule(run_backward(llama(), tokens(2, 7))[1], atol=1e-5)


def run_backward(model: Any, ids: Tensor) -> Any:
    with regard.capture(model, "all", gradients=True) as trace:
        model(ids, use_cache=False).logits.square().mean().backward()
    return trace


def check_chain_rule(layer: LayerTrace, atol: float) -> None:
    """values -> head outputs, and queries -> logits -> weights -> head outputs, written out."""
    weights, keys, upstream = layer.weights, layer.keys, layer.gradient("head_outputs")
    assert weights is not None and keys is not None
    groups = weights.shape[1] // keys.shape[1]
    to_values = (weights.transpose(-1, -2) @ upstream).unflatten(1, (-1, groups)).sum(2)
    torch.testing.assert_close(layer.gradient("values"), to_values, atol=atol, rtol=1e-4)
    to_weights = layer.gradient("weights")
    to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
    to_queries = to_logits @ keys.repeat_interleave(groups, 1) * keys.shape[-1] ** -0.5
    torch.testing.assert_close(layer.gradient("queries"), to_queries, atol=atol, rtol=1e-4)


def test_gradients_that_are_not_there() -> None:
    model, ids = llama(), tokens()
    with regard.capture(model) as trace:
        model(ids, labels=ids).loss.backward()
    with pytest.raises(OptionError, match="gradients=True"):
        trace[0].gradient("values")
    with regard.capture(model, gradients=True) as trace, torch.no_grad():
        model(ids)
    with pytest.raises(OptionError, match="gradients enabled"):
        trace[0].gradient("weights")
    with pytest.raises(UnknownNameError, match="head_outputs"):
        trace[0].gradient("head_output")
    with regard.capture(model, gradients=True) as trace:
        loss = model(ids, labels=ids).loss
    before = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert trace[0].gradient("weights").shape == (2, 4, 17, 17)
    with regard.capture(model, gradients=True):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (before[name] is None)


def test_each_step_of_generation() -> None:
    model, ids = llama(), tokens(1, 6)
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **arguments)
    with regard.capture(model, keep="all") as trace:
        assert torch.equal(model.generate(ids, **arguments), before)
    shapes = [tuple(call.weights.shape) for call in trace.calls(0) if call.weights is not None]
    assert shapes == [(1, 4, 6, 6), (1, 4, 1, 7), (1, 4, 1, 8), (1, 4, 1, 9)]
    assert trace[0].weights is trace.calls(0)[-1].weights
    with regard.capture(model) as latest:
        model.generate(ids, **arguments, cache_implementation="static")
    assert len(latest.calls(-1)) == 1
    weights = latest[0].weights
    assert weights is not None and torch.allclose(weights[..., :9], trace[0].weights, atol=1e-5)  # type: ignore[arg-type]
    assert not weights[..., 9:].any()
    latest.clear()
    assert len(latest) == 0


def test_two_captures_and_two_models() -> None:
    one, two, ids = llama(), bert(), tokens()
    before = [state(one), state(two)]
    with regard.capture(one) as first, regard.capture(two) as second, regard.capture(one, layers=[2]) as third:
        output_of(one, input_ids=ids)
        output_of(two, input_ids=ids)
    assert (len(first), len(second), len(third)) == (3, 2, 1)
    assert torch.equal(first[2].weights, third[0].weights)  # type: ignore[arg-type]
    for model, kept in zip((one, two), before, strict=True):
        assert_same(state(model), kept)


def test_a_trace_is_read_by_path_or_position() -> None:
    model = t5()
    with regard.capture(model, layers="decoder") as trace:
        output_of(model, **inputs_of(model))
    assert isinstance(trace["decoder.block.0.layer.1.EncDecAttention"], LayerTrace)
    assert trace[1].path == "decoder.block.0.layer.1.EncDecAttention"
    assert trace.stack("head_outputs").shape == (4, 2, 4, 9, 8)
    with pytest.raises(UnknownNameError, match=r"Did you mean.*EncDecAttention"):
        trace["decoder.block.0.layer.1.EncDecAttentio"]
    with pytest.raises(OptionError, match="4 layers"):
        trace[4]
    with pytest.raises(UnknownNameError, match="values"):
        trace.stack("value")


def test_wrong_use_is_told_and_leaves_no_trace() -> None:
    model = llama()
    before = state(model)
    with pytest.raises(RetrofitError, match="No attention layer"):
        regard.capture(nn.Linear(3, 3))
    with pytest.raises(OptionError, match="keep is"):
        regard.capture(model, keep="some")  # type: ignore[arg-type]
    once = regard.capture(model)
    with once, pytest.raises(OptionError, match="in use already"):
        once.__enter__()
    with pytest.raises(ZeroDivisionError), regard.capture(model):
        raise ZeroDivisionError
    assert_same(state(model), before)


@pytest.mark.parametrize("grad", [True, False])
def test_torchs_own_layers(grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, hidden = torch.randn(2, 7, 16), torch.arange(7) >= torch.tensor([7, 5])[:, None]
    with torch.set_grad_enabled(grad):
        before = model(x, src_key_padding_mask=hidden)
        with regard.capture(model, gradients=grad) as trace:
            watched = model(x, src_key_padding_mask=hidden)
        assert torch.equal(model(x, src_key_padding_mask=hidden), before)
    torch.testing.assert_close(watched[~hidden], before[~hidden], **CLOSE)
    first = model.layers[0]
    _, weights = first.self_attn(x, x, x, key_padding_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(trace[0].weights, weights.detach(), **CLOSE)
    assert torch.equal(trace[0].hidden_states, x)  # type: ignore[arg-type]
    torch.testing.assert_close(trace[1].hidden_states, first(x, src_key_padding_mask=hidden), **CLOSE)
    if grad:
        watched.square().sum().backward()
        assert trace[0].gradient("weights").shape == (2, 4, 7, 7)
