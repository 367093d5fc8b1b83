"""Softmax attention and its dense variants. One file a paper; :func:`compose` combines the frame's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.dense.composed import compose as compose

__all__ = ["compose"]


def __getattr__(name: str) -> Any:
    if name == "compose":
        from regard.dense.composed import compose

        return compose
    raise AttributeError(f"module 'regard.dense' has no attribute {name!r}")
