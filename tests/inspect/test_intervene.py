"""Interventions, against the model with the same change made in its weights or written out; and nothing stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, ShapeError
from regard.inspect.intervene import (
    ablate_heads,
    edit_heads,
    intervene,
    patch_heads,
    patch_inputs,
    scale_heads,
    set_attention,
    swap_heads,
)
from regard.nn import MultiHeadAttention
from tests.retrofit.small_models import FAMILIES, inputs_of, llama, output_of
from tests.retrofit.test_restoring import assert_same, state

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def _layer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MultiHeadAttention(12, 3, "full").double(), torch.randn(2, 7, 12, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_nothing_changes_without_edits_and_nothing_stays_after(family: str) -> None:
    model = FAMILIES[family]()
    inputs = inputs_of(model)
    before, output = state(model), output_of(model, **inputs)
    with intervene(model, ablate_heads([])):
        assert torch.equal(output_of(model, **inputs), output)
    with intervene(model, ablate_heads([(0, 0), (1, 1)])):
        assert not torch.equal(output_of(model, **inputs), output)
    assert_same(state(model), before)
    assert torch.equal(output_of(model, **inputs), output)


def test_a_head_at_zero_is_its_columns_of_the_output_projection_at_zero() -> None:
    layer, x = _layer()
    with intervene(layer, ablate_heads([(0, 1)])):
        found = layer(x)
    with torch.no_grad():
        layer.out.weight[:, 4:8] = 0
    torch.testing.assert_close(found, layer(x), **EXACT)


def test_all_heads_at_zero_leave_the_output_bias() -> None:
    layer, x = _layer()
    with intervene(layer, ablate_heads([(0, h) for h in range(3)])):
        torch.testing.assert_close(layer(x), layer.out.bias.expand(2, 7, -1), **EXACT)


def test_mean_and_uniform() -> None:
    layer, x = _layer()
    with regard.capture(layer) as trace:
        layer(x)
    own = trace[0].head_outputs
    with intervene(layer, ablate_heads([(0, 2)], "mean")), regard.capture(layer) as seen:
        layer(x)
    torch.testing.assert_close(seen[0].head_outputs[:, 2], own[:, 2].mean((0, 1)).expand(2, 7, -1), **EXACT)
    torch.testing.assert_close(seen[0].head_outputs[:, :2], own[:, :2], atol=0, rtol=0)
    with intervene(layer, ablate_heads([(0, 2)], "uniform")), regard.capture(layer) as seen:
        layer(x, causal=True)
    running = trace[0].values[:, 2].cumsum(1) / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(seen[0].head_outputs[:, 2], running, **EXACT)
    torch.testing.assert_close(seen[0].weights[:, 2].sum(-1), torch.ones(2, 7, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_patching_a_run_with_itself_changes_nothing_and_with_another_gives_that_one(family: str) -> None:
    model = FAMILIES[family]()
    inputs = inputs_of(model)
    own = output_of(model, **inputs)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    with regard.capture(model, "all") as trace:
        output_of(model, **other)
    with regard.capture(model, "all") as same:
        output_of(model, **inputs)
    heads = same[0].head_outputs.shape[1]
    itself = {(0, h): same[0].head_outputs[:, h] for h in range(heads)}
    with intervene(model, patch_heads(itself)):
        torch.testing.assert_close(output_of(model, **inputs), own, atol=1e-6, rtol=1e-6)
    foreign = {(0, h): trace[0].head_outputs[:, h] for h in range(heads)}
    with intervene(model, patch_heads(foreign)), regard.capture(model) as seen:
        output_of(model, **inputs)
    torch.testing.assert_close(seen[0].head_outputs, trace[0].head_outputs, atol=0, rtol=0)
    # All of a layer's inputs from the other run give the other run's outputs.
    edits = []
    for name, kind in (("query", "queries"), ("key", "keys"), ("value", "values")):
        tensor = getattr(trace[0], kind)
        group = heads // tensor.shape[1]
        edits.append(patch_inputs(name, {(0, h): tensor[:, h // group] for h in range(heads)}))
    with intervene(model, *edits), regard.capture(model) as seen:
        output_of(model, **inputs)
    torch.testing.assert_close(seen[0].head_outputs, trace[0].head_outputs, atol=1e-5, rtol=1e-5)


def test_changed_inputs_are_answered_by_the_models_own_attention() -> None:
    """A window stays a window, and caps of logits stay, when a layer gets its own queries back from outside."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3, "sliding_window", window=2, sinks=0).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    own = layer(x, causal=True)
    with regard.capture(layer, "queries") as trace:
        layer(x, causal=True)
    back = patch_inputs("query", {(0, head): trace[0].queries[:, head] for head in range(3)})
    with intervene(layer, back), regard.capture(layer, "weights") as seen:
        torch.testing.assert_close(layer(x, causal=True), own, **EXACT)
    assert not seen[0].weights.tril(-2).any()
    # And the queries of another text are answered, not its own.
    with regard.capture(layer, "queries") as other:
        layer(x.flip(1), causal=True)
    foreign = patch_inputs("query", {(0, head): other[0].queries[:, head] for head in range(3)})
    with intervene(layer, foreign), regard.capture(layer, "all") as seen:
        layer(x, causal=True)
    query, key, value = other[0].queries, seen[0].keys, seen[0].values
    answer = regard.attention(query, key, value, "sliding_window", causal=True, window=2, sinks=0)
    torch.testing.assert_close(seen[0].head_outputs, answer, **EXACT)
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 0.5}
    config = transformers.Gemma2Config(**size, **heads, query_pre_attn_scalar=1)
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, 40, (1, 9))
    with torch.no_grad():
        plain = model(tokens).logits
        with regard.capture(model, "queries") as trace:
            model(tokens)
        back = patch_inputs("query", {(1, head): trace[1].queries[:, head] for head in range(4)})
        with intervene(model, back):
            torch.testing.assert_close(model(tokens).logits, plain, atol=1e-6, rtol=1e-6)


def test_patching_some_rows_leaves_the_others() -> None:
    layer, x = _layer()
    with regard.capture(layer) as trace:
        layer(x)
    given = torch.ones(1, 7, 4, dtype=torch.float64)
    with intervene(layer, patch_heads({(0, 0): given}, rows=[2, -1])), regard.capture(layer) as seen:
        layer(x)
    assert (seen[0].head_outputs[:, 0, [2, 6]] == 1).all()
    left = [0, 1, 3, 4, 5]
    assert torch.equal(seen[0].head_outputs[:, 0, left], trace[0].head_outputs[:, 0, left])


def test_swapping_twice_is_nothing() -> None:
    layer, x = _layer()
    with intervene(layer, swap_heads(0, 0, 2), swap_heads(0, 0, 2)):
        again = layer(x)
    assert torch.equal(again, layer(x))
    with intervene(layer, swap_heads(0, 0, 2)):
        assert not torch.allclose(layer(x), again)


def test_set_rows_give_the_values_that_they_point_at_and_touch_nothing_else() -> None:
    layer, x = _layer()
    with regard.capture(layer) as trace:
        layer(x)
    target = torch.zeros(7, dtype=torch.float64)
    target[1], target[4] = 0.25, 0.75
    with intervene(layer, set_attention([(0, 1)], [5], target)), regard.capture(layer) as seen:
        layer(x)
    value = trace[0].values[:, 1]
    torch.testing.assert_close(seen[0].head_outputs[:, 1, 5], 0.25 * value[:, 1] + 0.75 * value[:, 4], **EXACT)
    torch.testing.assert_close(seen[0].weights[:, 1, 5], target.expand(2, -1), **EXACT)
    rows = [0, 1, 2, 3, 4, 6]
    assert torch.equal(seen[0].head_outputs[:, 1, rows], trace[0].head_outputs[:, 1, rows])
    assert torch.equal(seen[0].head_outputs[:, [0, 2]], trace[0].head_outputs[:, [0, 2]])
    with pytest.raises(OptionError, match="sum to 1"):
        set_attention([(0, 0)], [0], torch.ones(7))


def test_gates_of_one_change_nothing_and_their_gradient_is_output_times_gradient() -> None:
    layer, x = _layer()
    gates = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    with intervene(layer, scale_heads(gates)):
        out = layer(x)
    torch.testing.assert_close(out, layer(x), **EXACT)
    (found,) = torch.autograd.grad(out.square().sum(), gates)
    with regard.capture(layer, gradients=True) as trace:
        layer(x).square().sum().backward()
    meant = (trace[0].gradient("head_outputs") * trace[0].head_outputs).sum((0, 2, 3))
    torch.testing.assert_close(found[0], meant, **EXACT)


def test_edits_hold_inside_a_retrofit() -> None:
    model = llama()
    inputs = inputs_of(model)
    with regard.retrofit(model, "sliding_window", window=4):
        plain = output_of(model, **inputs)
        with intervene(model, edit_heads([(0, 0)], lambda out, head, call: out * 0)), regard.capture(model) as trace:
            changed = output_of(model, **inputs)
    assert not torch.equal(plain, changed)
    assert (trace[0].head_outputs[:, 0] == 0).all()


def test_what_is_not_there_is_refused() -> None:
    layer, x = _layer()
    with pytest.raises(OptionError, match="no layer 3"):
        intervene(layer, ablate_heads([(3, 0)]))
    with pytest.raises(OptionError, match="no head 9"), intervene(layer, ablate_heads([(0, 9)])):
        layer(x)
    with pytest.raises(ShapeError, match="one length"), intervene(layer, patch_heads({(0, 0): torch.ones(1, 3, 4)})):
        layer(x)
    mean = ablate_heads([(0, 0)], "mean", {(0, 0): torch.ones(3, 4)})
    with pytest.raises(ShapeError, match="of this length"), intervene(layer, mean):
        layer(x)
    with pytest.raises(ShapeError, match="do not fit"), intervene(layer, set_attention([(0, 0)], [1], torch.eye(3)[0])):
        layer(x)
    for rows in ([7], [-8]):
        for edit in (set_attention([(0, 0)], rows, torch.eye(7)[0]), patch_heads({(0, 0): torch.ones(1, 7, 4)}, rows)):
            with pytest.raises(OptionError, match="7 queries"), intervene(layer, edit):
                layer(x)
    with pytest.raises(OptionError, match="how"):
        ablate_heads([(0, 0)], "off")  # type: ignore[arg-type]
