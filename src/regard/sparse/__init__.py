"""Mechanisms that choose blocks or tokens by content. One file a paper; :func:`compose` combines their steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.sparse.frame import compose as compose

__all__ = ["compose"]


def __getattr__(name: str) -> Any:
    if name == "compose":
        from regard.sparse.frame import compose

        return compose
    raise AttributeError(f"module 'regard.sparse' has no attribute {name!r}")
