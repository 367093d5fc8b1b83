"""Mechanisms whose cost grows linearly with length. One file a paper; :func:`compose` combines the frame's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.linear.frame import compose as compose

__all__ = ["compose"]


def __getattr__(name: str) -> Any:
    if name == "compose":
        from regard.linear.frame import compose

        return compose
    raise AttributeError(f"module 'regard.linear' has no attribute {name!r}")
