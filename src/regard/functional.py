"""One call for any mechanism: ``regard.attention(query, key, value, "moba", causal=True, top_k=4)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regard.errors import OptionError
from regard.masks import Mask
from regard.mechanism import Mechanism
from regard.registry import build

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mechanism: str | Mechanism = "full",
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """Attend by name. Shapes, masks and errors as in :meth:`regard.mechanism.Mechanism.forward`.

    A mechanism with trained parameters starts from its initialisation at each call; to train or keep them, build it
    once with :func:`regard.create` and pass the module.
    """
    if isinstance(mechanism, str):
        heads, kv_heads = query.shape[1], key.shape[1]
        built = build(mechanism, options, num_heads=heads, num_kv_heads=kv_heads, head_dim=query.shape[-1])
        if not isinstance(built, Mechanism):
            raise OptionError(
                f"{mechanism!r} is a {type(built).__name__} with its own projections, not a mechanism on (query, key, "
                "value); build it with regard.create and call it on its own input."
            )
        if query.is_floating_point():
            built.to(device=query.device, dtype=query.dtype)
        mechanism = built
    elif options:
        raise OptionError(f"Options {sorted(options)} belong to a name; the module passed already has its own.")
    return mechanism(query, key, value, causal=causal, mask=mask, grid=grid, scale=scale)
