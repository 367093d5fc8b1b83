"""Names to classes: ``@register("moba")``, ``create("moba", block_size=128)``, ``catalogue()``.

The catalogue (``regard/catalogue/*.toml``) says in which module a name lives, so nothing is imported until it is asked
for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from regard.catalogue import Entry, entries
from regard.errors import OptionError, UnknownNameError
from regard.mechanism import Feature, Layer, Mechanism

__all__ = ["CONTEXT", "build", "catalogue", "create", "describe", "get", "options", "register"]

CONTEXT = ("num_heads", "num_kv_heads", "head_dim", "embed_dim", "channels", "layer_index", "num_layers")
"""Constructor arguments that hosts and retrofit fill in; everything else a constructor takes is an option."""

_classes: dict[str, type[nn.Module]] = {}
M = TypeVar("M", bound=type[nn.Module])


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make ``name`` mean this class."""

    def decorate(cls: M) -> M:
        known = _classes.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise OptionError(f"{name!r} is already registered for {known.__qualname__}; choose another name.")
        _classes[name] = cls
        cls.registered_name = name  # type: ignore[attr-defined]
        return cls

    return decorate


def catalogue(kind: str | None = None, home: str | None = None) -> list[Entry]:
    """What there is: all entries, or those of a ``kind`` ('mechanism', 'layer', 'feature', ...) or ``home`` folder."""
    return [e for e in entries().values() if (kind is None or e.kind == kind) and (home is None or e.home == home)]


def describe(name: str) -> Entry:
    """The catalogue entry of a name."""
    known = entries()
    if name not in known:
        raise UnknownNameError("paper or mechanism", name, known, "`regard list` shows them all.")
    return known[name]


def get(name: str) -> type[nn.Module]:
    """The class behind a name, importing its module if needed. Names registered by the caller's own code count too."""
    if name not in _classes:
        known = entries()
        if name not in known or known[name].module is None:
            buildable = [k for k, e in known.items() if e.module] + list(_classes)
            raise UnknownNameError("mechanism", name, buildable, "`regard list` shows them all.")
        importlib.import_module(cast(str, known[name].module))
    return _classes[name]


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a name: constructor parameters that are not filled in from the model."""
    return {k: p for k, p in _parameters(get(name)).items() if k not in CONTEXT}


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def create(name: str, **arguments: Any) -> nn.Module:
    """Build a mechanism, layer or feature module by name.

    Raises UnknownNameError with the nearest names, and OptionError for an option that it does not have.
    """
    cls = get(name)
    known = _parameters(cls)
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        listing = f"It takes: {', '.join(known) or 'nothing'}."
        error = UnknownNameError(f"option of {name!r}", unknown[0], known, listing)
        raise OptionError(str(error))
    missing = [k for k, p in known.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise OptionError(f"{name!r} also needs {', '.join(missing)}.")
    return cls(**arguments)


def build(name: str, options: Mapping[str, Any], **context: int) -> nn.Module:
    """As :func:`create`, with what the host knows of the model (see ``CONTEXT``) filled in where the class asks."""
    known = _parameters(get(name))
    filled = {k: v for k, v in context.items() if k in known and k not in options}
    return create(name, **filled, **options)


def kind_of(cls: type[nn.Module]) -> str:
    """'mechanism', 'layer', 'feature' or 'other'."""
    for kind, base in (("mechanism", Mechanism), ("layer", Layer), ("feature", Feature)):
        if issubclass(cls, base):
            return kind
    return "other"
