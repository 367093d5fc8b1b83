"""Where a model's attention layers are: found by how they are written, addressed by module path.

A path is the only address that every model has: ViT and Whisper's encoder carry no ``layer_idx``, and a model of
encoder and decoder has three attention layers of each index.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

from torch import nn

from regard.errors import RetrofitError
from regard.mechanism import Mechanism

__all__ = ["Selector", "Site", "discover", "interface_method", "reachable", "select"]

Selector = int | str | Callable[[str], bool] | Sequence[int | str] | None

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "qk_head_dim", "key_value_proj_dim", "d_kv")
_EMBED_DIM = ("embed_dim", "hidden_size", "d_model")


@dataclass(frozen=True, eq=False)
class Site:
    """One attention layer: the module whose call is answered by a mechanism, or watched.

    ``host``: 'transformers' (a module that calls its AttentionInterface), 'torch' (nn.MultiheadAttention) or 'regard'
    (a :class:`~regard.mechanism.Mechanism` inside a host). ``block``: the element of the model's stack that holds it.
    ``layer_index`` counts layers of the same kind: encoder, decoder and cross-attention each start at 0.
    """

    path: str
    module: nn.Module
    host: Literal["transformers", "torch", "regard"]
    block: nn.Module
    parent: nn.Module | None
    layer_index: int
    num_layers: int

    @property
    def home(self) -> nn.Module:
        """The module that holds the projections."""
        return self.parent if self.host == "regard" and self.parent is not None else self.module

    @property
    def context(self) -> dict[str, int]:
        """What a mechanism's constructor may ask of the model."""
        module = self.home
        sources = [module, getattr(module, "config", None)]
        heads = _first_int(sources, _HEADS)
        embed_dim = _first_int(sources, _EMBED_DIM)
        head_dim = _first_int(sources, _HEAD_DIM)
        if heads is None or (embed_dim is None and head_dim is None):
            raise RetrofitError(
                f"{self.path}: the number of heads and their width cannot be read off {type(module).__name__}. "
                "Leave this layer out with layers=..., or pass a built mechanism instead of a name."
            )
        head_dim = head_dim or (embed_dim or 0) // heads
        kv_heads = _first_int(sources[:1], _KV_HEADS)
        groups = _first_int(sources[:1], ("num_key_value_groups",))
        if kv_heads is None:
            kv_heads = heads // groups if groups else _first_int(sources, _KV_HEADS) or heads
        return {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "embed_dim": embed_dim or heads * head_dim,
            "layer_index": self.layer_index,
            "num_layers": self.num_layers,
        }


def _first_int(sources: Iterable[object], names: Sequence[str]) -> int | None:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


_methods: dict[type, FunctionType | None] = {}


def interface_method(cls: type) -> FunctionType | None:
    """The method of a transformers attention module that asks the AttentionInterface what to call, or None."""
    if cls not in _methods:
        _methods[cls] = _find_interface_method(cls)
    return _methods[cls]


def _find_interface_method(cls: type) -> FunctionType | None:
    if any(base.__name__ == "PreTrainedModel" for base in cls.__mro__):
        return None
    seen: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, member in vars(base).items():
            if name in seen or not callable(member):
                continue
            seen.add(name)
            function = inspect.unwrap(member)
            if isinstance(function, FunctionType) and _INTERFACE in function.__code__.co_names:
                return function
    return None


def _host(module: nn.Module) -> Literal["transformers", "torch", "regard"] | None:
    if isinstance(module, Mechanism):
        return "regard"
    if isinstance(module, nn.MultiheadAttention):
        return "torch"
    return "transformers" if interface_method(type(module)) is not None else None


def _require_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise RetrofitError(
            f"Expected a live torch model, got {type(model).__name__}. Load it first, for instance with "
            "transformers.AutoModel.from_pretrained(name)."
        )


def reachable(model: nn.Module) -> bool:
    """Whether a model has attention layers that :func:`discover` finds."""
    _require_model(model)
    return any(_host(module) is not None for module in model.modules())


def discover(model: nn.Module) -> list[Site]:
    """All attention layers of a model that can be reached, in the model's order; RetrofitError when there are none."""
    _require_model(model)
    found: list[tuple[str, nn.Module, Literal["transformers", "torch", "regard"]]] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        host = _host(module)
        if host is None or any(path.startswith(prefix) for prefix in inside):
            continue
        if host == "regard":
            inside.append(f"{path}." if path else "")
        found.append((path, module, host))
    if not found:
        raise RetrofitError(_nothing_found(model))
    kinds: dict[str, list[str]] = {}
    for path, _, _ in found:
        kinds.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(path)
    sites = []
    for path, module, host in found:
        kind = kinds[re.sub(r"\b\d+\b", "*", path)]
        block = re.match(r"(.*\b\d+)(\.|$)", path)
        parent = path.rpartition(".")[0]
        sites.append(
            Site(
                path,
                module,
                host,
                model.get_submodule(block[1]) if block else module,
                model.get_submodule(parent) if path else None,
                kind.index(path),
                len(kind),
            )
        )
    return sites


def _nothing_found(model: nn.Module) -> str:
    name = type(model).__name__
    for library in ("timm", "diffusers"):
        if any(type(module).__module__.split(".")[0] == library for module in model.modules()):
            return (
                f"{name} is built of {library} modules, which cannot be retrofitted yet. Reached are models of "
                "transformers, torch.nn.MultiheadAttention and the hosts of regard.nn."
            )
    return (
        f"No attention layer that can be reached was found in {name}. Reached are transformers models that use its "
        "AttentionInterface, torch.nn.MultiheadAttention (also inside torch's Transformer layers) and the hosts of "
        "regard.nn; attention written out in a model's own forward is not."
    )


def select(sites: Sequence[Site], layers: Any) -> list[Site]:
    """The sites that a selector names, in the model's order.

    None: all. An int: layers of that ``layer_index`` (negative: from the end). A string: a module path or the start of
    one, or ``"re:..."``, a regular expression searched for in the path. A callable: asked with each path. A sequence:
    the union of its members.
    """
    if layers is None:
        return list(sites)
    if isinstance(layers, (list, tuple, set, range)):
        parts = [select(sites, part) for part in layers]
        chosen = {site.path for part in parts for site in part}
        return [site for site in sites if site.path in chosen]
    if isinstance(layers, str):
        if layers.startswith("re:"):
            try:
                pattern = re.compile(layers[3:])
            except re.error as error:
                raise RetrofitError(f"layers={layers!r} is no regular expression: {error}.") from error
            matches = [site for site in sites if pattern.search(site.path)]
        else:
            matches = [site for site in sites if f"{site.path}.".startswith(f"{layers}.")]
    elif isinstance(layers, int):
        matches = [s for s in sites if s.layer_index == (layers if layers >= 0 else s.num_layers + layers)]
    elif callable(layers):
        matches = [site for site in sites if layers(site.path)]
    else:
        raise RetrofitError(
            f"layers takes None, an index, a module path, 're:...', a callable on the path, or a list of these; got "
            f"{type(layers).__name__}."
        )
    if not matches:
        paths = [site.path for site in sites]
        listing = ", ".join(paths[:6]) + (f", ... ({len(paths)} in all)" if len(paths) > 6 else "")
        raise RetrofitError(f"layers={layers!r} names no attention layer of this model. It has: {listing}.")
    return matches
