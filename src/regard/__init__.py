"""regard: every attention mechanism behind one PyTorch interface.

``attention`` computes one by name, ``create`` builds it, ``program`` makes one of plain functions, ``catalogue`` lists
all, ``retrofit`` puts one into a live model, ``capture`` looks inside a model, ``compare`` measures what each costs and
changes. Nothing loads until it is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "attention": "regard.functional",
    "build": "regard.registry",
    "capture": "regard.inspect.capture",
    "catalogue": "regard.registry",
    "compare": "regard.bench.compare",
    "create": "regard.registry",
    "describe": "regard.registry",
    "program": "regard.dense.program",
    "register": "regard.registry",
    "retrofit": "regard.retrofit",
    "use_backend": "regard.kernels",
    "Mechanism": "regard.mechanism",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:
    from regard.dense.program import program as program
    from regard.functional import attention as attention
    from regard.kernels import use_backend as use_backend
    from regard.mechanism import Mechanism as Mechanism
    from regard.registry import build as build
    from regard.registry import catalogue as catalogue
    from regard.registry import create as create
    from regard.registry import describe as describe
    from regard.registry import register as register


def _load(name: str) -> Any:
    return getattr(importlib.import_module(_HOMES[name]), name)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = _load(name)
        return globals().get(name, found)  # a folder of this name, imported by now, stands for the function
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Folder(ModuleType):
    """A folder of this package that can be called as the function of its name: ``regard.catalogue()``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _load(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Face(ModuleType):
    """Importing a submodule sets it as an attribute here, which would hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and type(value) is ModuleType:
            value.__class__ = _Folder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
