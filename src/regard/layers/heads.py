"""How channels are divided among heads."""

from __future__ import annotations

from regard.errors import OptionError

__all__ = ["head_sizes"]


def head_sizes(
    embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None
) -> tuple[int, int]:
    """``num_kv_heads`` and ``head_dim``, by default as many as query heads, and an equal share of ``embed_dim``.

    Raises OptionError where heads do not divide the channels, or key/value heads the query heads.
    """
    if head_dim is None and embed_dim % num_heads:
        raise OptionError(
            f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; choose another or give head_dim."
        )
    kv_heads = num_kv_heads or num_heads
    if num_heads % kv_heads:
        raise OptionError(f"num_kv_heads {kv_heads} does not divide num_heads {num_heads}.")
    return kv_heads, head_dim or embed_dim // num_heads
