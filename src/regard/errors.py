"""Every error a person can meet: what was wrong, what was expected, what to try.

All derive from :class:`RegardError` and from the built-in class that a caller would expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "CommunicationError",
    "FileFormatError",
    "MissingExtraError",
    "OptionError",
    "PlacementError",
    "RegardError",
    "RetrofitError",
    "ShapeError",
    "UnknownNameError",
    "UnsupportedMaskError",
    "UnsupportedPatternError",
]


class RegardError(Exception):
    """The root of this library's errors."""


class ShapeError(RegardError, ValueError):
    """Tensors whose shapes do not fit together, or a grid that does not fit a length."""


class PlacementError(RegardError, ValueError):
    """Tensors on mixed devices or of mixed or unsuitable dtypes."""


class OptionError(RegardError, ValueError):
    """An option that does not exist, or a value out of its range."""


class UnsupportedPatternError(RegardError, ValueError):
    """A mechanism was asked for causal or cross attention that it does not define."""


class UnsupportedMaskError(RegardError, ValueError):
    """A mask that the mechanism cannot honour; it is refused, never ignored."""


class BackendError(RegardError, RuntimeError):
    """A backend that does not exist, or cannot run this request on this machine."""


class CommunicationError(RegardError, RuntimeError):
    """Ranks of a group that did not reach one another: one ended, came too late, or made another call."""


class RetrofitError(RegardError, RuntimeError):
    """A model whose attention cannot be reached or replaced."""


class FileFormatError(RegardError, ValueError):
    """A file that is not what it claims to be."""


class UnknownNameError(RegardError, LookupError):
    """A name that is not in a registry; the message carries the nearest names."""

    def __init__(self, kind: str, name: str, known: Iterable[str], listing: str = "") -> None:
        near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        tail = f" {listing}" if listing else ""
        super().__init__(f"There is no {kind} named {name!r}.{hint}{tail}")
        self.nearest = near


class MissingExtraError(RegardError, ImportError):
    """An optional dependency is needed; the message says what to install."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs packages that are not installed. Install them with: pip install 'regard[{extra}]'"
        )
