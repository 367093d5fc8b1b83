"""Which form of an executor runs: ``backend="auto"`` per call, or a context manager for all calls inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

from regard.errors import BackendError

__all__ = ["compiled_flex", "current_backend", "has_triton", "resolve", "use_backend"]

# A plain global, since torch.compile can read one, and compiles anew when it changes. All forms give the same numbers,
# so that a thread that meets another's choice loses no more than speed.
_current = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every kernel inside with this form where it has it, e.g. ``"reference"``; others keep ``"auto"``.

    It holds for the whole process.
    """
    global _current
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before


def current_backend() -> str:
    """The name that :func:`use_backend` set, else ``"auto"``."""
    return _current


@cache
def compiled_flex() -> Any:
    """torch's FlexAttention, compiled: forward and backward on a GPU, forward alone on a CPU."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is not."""
    return find_spec("triton") is not None


def resolve(kernel: str, requested: str | None, forms: Sequence[str]) -> str:
    """The form to run: what the call asks for, else what the context says, else ``"auto"``.

    A call that names a form the kernel lacks is an error; a context that does is not, since it speaks to many kernels.
    """
    if requested is not None and requested != "auto":
        if requested not in forms:
            raise BackendError(f"{kernel} has no backend {requested!r}. It has: auto, {', '.join(forms)}.")
        return requested
    name = current_backend()
    return name if requested is None and name in forms else "auto"
