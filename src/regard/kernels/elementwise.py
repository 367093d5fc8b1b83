"""Plain functions of one pair, run on whole tiles.

A ``score_mod(score, b, h, q_idx, kv_idx)`` or ``mask_mod(b, h, q_idx, kv_idx)`` is written for single numbers. Most
such functions also work on tensors that broadcast together, which is fast; others (``table[h][q_idx]``) do not, and
some of those give wrong numbers instead of an error. So each is tried on a few pairs first and compared with
:func:`torch.vmap` over single pairs, which is what the function means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard.errors import OptionError

__all__ = ["Elementwise", "reads"]

_SIGNATURES = {4: "mask_mod(b, h, q_idx, kv_idx) -> bool", 5: "score_mod(score, b, h, q_idx, kv_idx) -> score"}


class Elementwise:
    """A function of one pair as a function of tensors that broadcast together; what it returns has their common shape.

    function: takes ``arity`` scalars, the last four of them indices. places: the indices of batch, heads, queries and
    keys from which the pairs that it is tried on are taken.

    Raises OptionError for a function that runs on no single pair, or gives anything but one number for it.
    """

    def __init__(
        self, function: Callable[..., Tensor], arity: int, places: tuple[range, range, range, range], like: Tensor
    ) -> None:
        self.function, self.arity = function, arity
        self.broadcasts = self._try(places, like)

    def instead(self, function: Callable[..., Tensor]) -> Elementwise:
        """Another function that calls this one for other indices: it broadcasts if this one does."""
        other = copy.copy(self)
        other.function = function
        return other

    def __call__(self, *tensors: Tensor) -> Tensor:
        if not self.broadcasts:
            return self._one_by_one(*tensors)
        out = self.function(*tensors)
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        return out if out.shape == shape else out.expand(shape)

    def _one_by_one(self, *tensors: Tensor) -> Tensor:
        wide = torch.broadcast_tensors(*tensors)
        out: Tensor = torch.vmap(self.function)(*(t.reshape(-1) for t in wide))
        return out.view(wide[0].shape)

    def _try(self, places: tuple[range, range, range, range], like: Tensor) -> bool:
        samples = [_some(place, axis, like.device) for axis, place in enumerate(places)]
        tensors: list[Tensor] = list(samples)
        if self.arity == 5:
            generator = torch.Generator().manual_seed(0)
            shape = tuple(s.numel() for s in samples)
            tensors.insert(0, torch.randn(shape, generator=generator, dtype=torch.float64).to(like))
        name = _SIGNATURES[self.arity]
        with torch.no_grad():
            try:
                meant: Tensor | None = self._one_by_one(*tensors)
            except Exception as error:
                # A function may run on tensors and not under vmap (an in-place operation): it is taken as it is.
                meant, failure = None, error
            wide: Tensor | None
            try:
                wide = self.function(*tensors)
                shape = torch.broadcast_shapes(*(t.shape for t in tensors))
                wide = wide.expand(shape) if wide.dim() else None
            except Exception:
                wide = None
        if meant is None and wide is None:
            raise OptionError(
                f"The function given as {name} fails on single pairs: {failure}. It takes scalar tensors and may hold "
                "tensors of its own, with indices inside their bounds; values decide by torch.where, not by if."
            )
        found = meant if meant is not None else wide
        assert found is not None
        if self.arity == 4 and found.dtype != torch.bool:
            raise OptionError(f"{name}: got {found.dtype}. Compare, do not compute: e.g. q_idx >= kv_idx.")
        if self.arity == 5 and not found.is_floating_point():
            raise OptionError(f"{name}: got {found.dtype}. Return the score, changed; who sees whom is mask_mod's.")
        return meant is None or (
            wide is not None and wide.dtype == meant.dtype and bool(torch.isclose(wide, meant, equal_nan=True).all())
        )


def reads(function: Callable[..., Tensor], arity: int, position: int, device: torch.device) -> bool:
    """Whether the function does anything with its argument at ``position``: whoever computes with a tensor calls torch
    with it."""
    tensors = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(arity)]
    watch = _Watch(tensors[position])
    with watch, torch.no_grad():
        try:
            out = function(*tensors)
        except Exception:
            return True
    return watch.seen or out is tensors[position]


class _Watch(TorchFunctionMode):
    """Notices calls that take one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.seen = tensor, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or self._within((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _within(self, what: Any) -> bool:
        if isinstance(what, Tensor):
            return what is self.tensor
        if isinstance(what, dict):
            return any(self._within(part) for part in what.values())
        return isinstance(what, (tuple, list)) and any(self._within(part) for part in what)


def _some(places: range, axis: int, device: torch.device) -> Tensor:
    """A few of these indices, first and last among them, along their axis of four."""
    size = len(places)
    index = sorted({places[i] for i in (0, min(1, size - 1), size // 3, size // 2, size - 1)})
    return torch.tensor(index, device=device).view([-1 if place == axis else 1 for place in range(4)])
