"""Names: how classes get them, how people find them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import registry
from regard.errors import OptionError, UnknownNameError
from regard.mechanism import Feature, Layer, Mechanism, Request


class Mean(Mechanism):
    """A mechanism of the caller's own."""

    def __init__(self, num_heads: int, head_dim: int = 2, sharpness: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.sharpness = num_heads, head_dim, sharpness

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return value.mean(2, keepdim=True).expand(-1, query.shape[1], query.shape[2], -1)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    regard.register("own_mean")(Mean)
    yield "own_mean"


def test_names_of_the_callers_own(own: str) -> None:
    assert registry.get(own) is Mean and Mean.registered_name == own
    out = regard.attention(*(torch.ones(1, 2, 3, 4),) * 3, own)
    assert torch.equal(out, torch.ones(1, 2, 3, 4))
    with pytest.raises(UnknownNameError, match="own_mean"):
        registry.get("own_men")


def test_a_name_means_one_class(own: str) -> None:
    class Other(Mechanism):
        pass

    regard.register(own)(Mean)  # the same class again, as on a module's reload
    with pytest.raises(OptionError, match="already registered for Mean"):
        regard.register(own)(Other)


def test_options_are_what_the_model_does_not_fill_in(own: str) -> None:
    assert list(registry.options(own)) == ["sharpness"]
    assert "window" in registry.options("sliding_window")


def test_create_checks_arguments(own: str) -> None:
    module = regard.create(own, num_heads=3, sharpness=2.0)
    assert isinstance(module, Mean) and (module.num_heads, module.head_dim, module.sharpness) == (3, 2, 2.0)
    with pytest.raises(OptionError, match="also needs num_heads"):
        regard.create(own)
    with pytest.raises(OptionError, match=r"Did you mean 'sharpness'.*It takes: num_heads, head_dim, sharpness"):
        regard.create(own, sharpnes=2.0)


def test_build_fills_in_what_the_class_asks_for(own: str) -> None:
    module = regard.build(own, {"sharpness": 3.0}, num_heads=4, head_dim=16, embed_dim=64, layer_index=1)
    assert isinstance(module, Mean) and (module.num_heads, module.head_dim, module.sharpness) == (4, 16, 3.0)
    given = regard.build(own, {"head_dim": 5}, num_heads=4, head_dim=16)
    assert isinstance(given, Mean) and given.head_dim == 5, "an explicit option wins"


def test_unknown_names() -> None:
    for look_up in (registry.get, regard.create, regard.describe):
        with pytest.raises(UnknownNameError, match=r"Did you mean 'sliding_window'.*regard list"):
            look_up("sliding-window")


def test_kinds() -> None:
    assert registry.kind_of(Mean) == "mechanism"
    assert registry.kind_of(type("L", (Layer,), {})) == "layer"
    assert registry.kind_of(type("F", (Feature,), {})) == "feature"
    assert registry.kind_of(nn.Linear) == "other"


def test_catalogue_filters() -> None:
    everything = regard.catalogue()
    assert {e.key for e in regard.catalogue(kind="mechanism")} <= {e.key for e in everything}
    assert all(e.kind == "mechanism" and e.home == "local" for e in regard.catalogue("mechanism", "local"))
    assert any(e.key == "sliding_window" for e in regard.catalogue(home="local"))
    assert regard.catalogue(kind="nothing") == []


def test_describe() -> None:
    entry = regard.describe("full")
    assert (entry.home, entry.kind, entry.module) == ("dense", "mechanism", "regard.dense.full")
    assert not entry.paper and entry.evidence is None


def test_a_layer_is_no_mechanism_on_query_key_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_classes", {**registry._classes, "own_layer": type("L", (Layer,), {})})
    with pytest.raises(OptionError, match=r"its own projections"):
        regard.attention(*(torch.ones(1, 2, 3, 4),) * 3, "own_layer")
