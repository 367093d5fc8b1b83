"""A retrofit leaves a model as it was: nested, shared, out of order, after errors, with or without ``with``."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import regard
from regard.errors import MissingExtraError, OptionError, RetrofitError, UnknownNameError
from tests.retrofit.probes import Tempered, Watching
from tests.retrofit.small_models import FAMILIES, bert, inputs_of, llama, output_of, t5, tokens


def state(model: nn.Module) -> dict[str, Any]:
    """All that a retrofit could leave behind."""
    from transformers import AttentionInterface, AttentionMaskInterface

    found: dict[str, Any] = {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "interfaces": (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)),
    }
    for path, module in model.named_modules():
        entry = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        for name, value in entry.items():
            if isinstance(value, dict):
                entry[name] = dict(value)
        found[f"module {path}"] = (id(module), entry)
        config = getattr(module, "config", None)
        if config is not None:
            parts = [getattr(config, name, None) for name in config.sub_configs]
            implementations = [part._attn_implementation for part in (config, *parts) if part is not None]
            found[f"config {path}"] = (id(config), implementations, copy.deepcopy(vars(config)))
    return found


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor)
    for name in before:
        if name != "tensors":
            assert after[name] == before[name], name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_as_before(family: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    inputs = inputs_of(model)
    before, output = state(model), output_of(model, **inputs)
    with regard.retrofit(model, "full"):
        assert model.config._attn_implementation == "regard"
        output_of(model, **inputs)
    assert_same(state(model), before)
    assert torch.equal(output_of(model, **inputs), output)


def test_after_an_error_inside() -> None:
    model, ids = llama(), tokens()
    before = state(model)
    with pytest.raises(ZeroDivisionError), regard.retrofit(model, "sliding_window"):
        output_of(model, input_ids=ids)
        raise ZeroDivisionError
    assert_same(state(model), before)

    class Broken(Watching):
        def attend(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), regard.retrofit(model, Broken()):
        model(ids, output_attentions=True)
    with regard.retrofit(model, "full"), torch.no_grad():
        # What the failed call asked for is not remembered.
        assert getattr(model(ids), "attentions", None) is None


def test_nothing_changes_when_it_cannot_be_done() -> None:
    model = llama()
    before = state(model)
    with pytest.raises(UnknownNameError, match="sliding_window"):
        regard.retrofit(model, "sliding_windo")
    with pytest.raises(OptionError, match="windw"):
        regard.retrofit(model, "sliding_window", windw=3)
    with pytest.raises(RetrofitError, match=r"names no attention layer.*model\.layers\.0\.self_attn"):
        regard.retrofit(model, "full", layers=7)
    with pytest.raises(RetrofitError, match="regular expression"):
        regard.retrofit(model, "full", layers="re:(")
    with pytest.raises(OptionError, match="keys choose the layers"):
        regard.retrofit(model, {0: "full"}, layers=[1])
    with pytest.raises(OptionError, match="already has its own"):
        regard.retrofit(model, Watching(), window=3)
    with pytest.raises(OptionError, match="A mechanism is a name"):
        regard.retrofit(model, 3)  # type: ignore[arg-type]
    with pytest.raises(RetrofitError, match="layers takes"):
        regard.retrofit(model, "full", layers=1.5)  # type: ignore[arg-type]
    assert_same(state(model), before)


def test_without_with() -> None:
    model, ids = llama(), tokens()
    before, output = state(model), output_of(model, input_ids=ids)
    handle = regard.retrofit(model, "sliding_window", window=2, sinks=0)
    assert handle.active and not torch.equal(output_of(model, input_ids=ids), output)
    handle.restore()
    handle.restore()
    assert not handle.active
    assert_same(state(model), before)
    with pytest.raises(RetrofitError, match="was restored"), handle:
        pass


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nested_retrofits_may_be_restored_in_any_order(order: tuple[int, ...]) -> None:
    """The newest that is still there answers, layer by layer."""
    model, ids = llama(), tokens()
    before, own = state(model), output_of(model, input_ids=ids)
    choices: list[tuple[str, dict[str, Any]]] = [
        ("sliding_window", {"window": 2, "sinks": 0}),
        ("sliding_window", {"window": 5, "sinks": 1, "layers": [0, 1]}),
        ("full", {"layers": [1]}),
    ]
    handles = [regard.retrofit(model, name, **options) for name, options in choices]
    alive = [0, 1, 2]
    for leaving in order:
        handles[leaving].restore()
        alive.remove(leaving)
        plan: dict[Any, Any] = {}
        for index in reversed(alive):
            name, options = choices[index]
            rest = {k: v for k, v in options.items() if k != "layers"}
            for layer in options.get("layers", [0, 1, 2]):
                plan.setdefault(layer, (name, rest))
        now = output_of(model, input_ids=ids)
        fresh = llama()
        fresh.load_state_dict(model.state_dict())
        if plan:
            with regard.retrofit(fresh, plan):
                expected = output_of(fresh, input_ids=ids)
        else:
            expected = own
        torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-6)
    assert_same(state(model), before)


def test_two_models_at_once() -> None:
    one, two, ids = llama(), bert("eager"), tokens()
    states, outputs = [state(one), state(two)], [output_of(one, input_ids=ids), output_of(two, input_ids=ids)]
    with regard.retrofit(one, "sliding_window", window=2, sinks=0):
        narrow = output_of(one, input_ids=ids)
        second = regard.retrofit(two, "full")
        assert torch.equal(output_of(one, input_ids=ids), narrow)
        torch.testing.assert_close(output_of(two, input_ids=ids), outputs[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(output_of(one, input_ids=ids), outputs[0])
    torch.testing.assert_close(output_of(two, input_ids=ids), outputs[1], atol=1e-5, rtol=1e-5)
    second.restore()
    for model, before in zip((one, two), states, strict=True):
        assert_same(state(model), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_models_that_share_one_config(implementation: str) -> None:
    """transformers keeps the very config that it is given, so a second model built of it is renamed too."""
    from transformers import LlamaForCausalLM

    one = llama(implementation)
    two, ids = LlamaForCausalLM(one.config).eval(), tokens()
    assert one.config is two.config
    before, output = state(two), output_of(two, input_ids=ids)
    first = regard.retrofit(one, "sliding_window", window=2, sinks=0)
    narrow = output_of(one, input_ids=ids)
    assert torch.equal(output_of(two, input_ids=ids), output)
    second = regard.retrofit(two, "full")
    assert torch.equal(output_of(one, input_ids=ids), narrow)
    first.restore()
    torch.testing.assert_close(output_of(two, input_ids=ids), output, atol=1e-5, rtol=1e-5)
    second.restore()
    assert_same(state(two), before)


def test_parameters_are_the_handles_and_not_the_models() -> None:
    model, ids = llama(), tokens()
    names = list(model.state_dict())
    with regard.retrofit(model, "test_tempered", layers=[0, 2], start=1.5) as handle:
        assert list(model.state_dict()) == names
        assert [p for p, _ in handle.named_parameters()] == [
            "model.layers.0.self_attn.temperature",
            "model.layers.2.self_attn.temperature",
        ]
        contexts = [module.context for module in handle.modules.values() if isinstance(module, Tempered)]
        assert contexts == [(4, 2, 8, 32, 0, 3), (4, 2, 8, 32, 2, 3)]
        model.requires_grad_(False)
        optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
        model.train()
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(module.training for module in handle.modules.values())
        model.eval()
        trained, kept = output_of(model, input_ids=ids), handle.state_dict()
        assert not any(module.training for module in handle.modules.values())
    assert set(kept) == {f"model.layers.{i}.self_attn.{n}" for i in (0, 2) for n in ("temperature", "calls")}
    with regard.retrofit(model, handle.modules):
        assert torch.equal(output_of(model, input_ids=ids), trained)
    with regard.retrofit(model, "test_tempered", layers=[0, 2]) as again:
        again.load_state_dict(kept)
        assert torch.equal(output_of(model, input_ids=ids), trained)
        with pytest.raises(OptionError, match="another retrofit"):
            again.load_state_dict({})


def test_the_mechanism_goes_where_the_model_is() -> None:
    model = llama().to(torch.bfloat16)
    with regard.retrofit(model, "test_tempered") as handle:
        assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}
        assert output_of(model, input_ids=tokens()).dtype == torch.bfloat16


def test_layers_are_chosen_by_index_path_pattern_or_function() -> None:
    model = t5()
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)]
    encoder = [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    decoder = [f"decoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    choices: list[tuple[Any, list[str]]] = [
        ("re:EncDec", cross),
        ("encoder", encoder),
        ("decoder.block.1", [decoder[1], cross[1]]),
        (lambda path: path.endswith("SelfAttention"), encoder + decoder),
        ([-1], [encoder[1], decoder[1], cross[1]]),
        ([0, "re:^enc"], [encoder[0], encoder[1], decoder[0], cross[0]]),
    ]
    for layers, expected in choices:
        with regard.retrofit(model, "full", layers=layers) as handle:
            assert list(handle.modules) == expected


def test_a_copy_made_inside_says_so() -> None:
    model, ids = llama(), tokens()
    with regard.retrofit(model, "full"):
        clone = copy.deepcopy(model)
        with pytest.raises(RetrofitError, match="copied"):
            output_of(clone, input_ids=ids)
        with pytest.raises(RetrofitError, match="copy"):
            regard.retrofit(clone, "full")
    clone.set_attn_implementation("sdpa")
    assert torch.equal(output_of(clone, input_ids=ids), output_of(model, input_ids=ids))


def test_what_cannot_be_reached_is_told() -> None:
    with pytest.raises(RetrofitError, match="No attention layer"):
        regard.retrofit(nn.Linear(3, 3), "full")
    with pytest.raises(RetrofitError, match="from_pretrained"):
        regard.retrofit("gpt2", "full")  # type: ignore[arg-type]
    for library in ("timm", "diffusers"):
        foreign = type("Block", (nn.Module,), {"__module__": f"{library}.models.some"})()
        with pytest.raises(RetrofitError, match=f"{library} modules, which cannot be retrofitted yet"):
            regard.retrofit(foreign, "full")
    with pytest.raises(OptionError, match="own projections"):
        regard.retrofit(llama(), "test_layer")


def test_without_transformers_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"Retrofitting a Hugging Face model.*regard\[transformers\]"):
        regard.retrofit(model, "full")


def test_the_name_is_callable_whatever_was_imported() -> None:
    orders = [
        "import regard",
        "import regard.retrofit",
        "import regard; import regard.retrofit.handle; import regard.inspect.capture",
        "import regard; regard.retrofit; import regard.retrofit",
        "from regard.retrofit import retrofit; import regard",
    ]
    program = f"""
import os, sys, torch

def use(order):
    exec(order, globals())
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 5, 8)
    for _ in range(2):
        with regard.retrofit(attention, "sliding_window", window=2) as handle, regard.capture(attention) as trace:
            attention(x, x, x)
        assert list(handle.modules) == [""] and trace[0].weights.shape == (1, 2, 5, 5)
    assert "transformers" not in sys.modules

for order in {orders!r}:
    child = os.fork()  # a fresh import of regard each, and one of torch for all
    if not child:
        use(order)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=80)
