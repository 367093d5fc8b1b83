"""Steps of a frame by name: built from a registry, with errors that show what there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from regard.errors import OptionError, UnknownNameError

__all__ = ["build_step", "chosen"]

T = TypeVar("T")


def build_step(
    place: str, registry: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, Any], **context: Any
) -> T:
    """The step ``name`` of a ``registry`` from its options, and from those of ``context`` that it takes.

    Raises UnknownNameError with the nearest names, OptionError for options that the step does not have.
    """
    if name not in registry:
        raise UnknownNameError(place, name, registry, f"There are: {', '.join(registry)}.")
    make = registry[name]
    known = inspect.signature(make).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        own = [option for option in known if option not in context]
        raise OptionError(f"The {place} {name!r} has no option {unknown[0]!r}. It takes: {', '.join(own) or 'none'}.")
    filled = {k: v for k, v in context.items() if k in known and k not in options}
    return make(**filled, **options)


def chosen(place: str, choice: object) -> tuple[str, dict[str, Any]]:
    """Name and options of a step given as a name, or as a name with options: ``{"entmax": {"alpha": 1.3}}``."""
    if isinstance(choice, str):
        return choice, {}
    if isinstance(choice, Mapping) and len(choice) == 1:
        name, options = next(iter(choice.items()))
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, dict(options)
    raise OptionError(
        f"A {place} is given by its name, or by its name with options such as {{'name': {{'option': 1}}}}, or as a "
        f"built step; got {choice!r:.120}."
    )
