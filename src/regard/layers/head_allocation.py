"""Head allocation: what each head is for. All alike, some of them per token, groups that share a map, near and far.

Every allocation takes queries ``(batch, num_heads, q_len, head_dim)``. It may hide keys from heads
(:meth:`HeadAllocation.rule`), weigh heads per token (:meth:`~HeadAllocation.route`) or have a group of heads share a
map (``group``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.head_routing import HeadRouter, head_load_balance_loss, norm_router, shared_and_routed
from regard.layers.steps import build_step
from regard.masks import Everything, Mask, SlidingWindow, head_masks

__all__ = ["HEADS", "GroupedHeads", "HeadAllocation", "LongShortHeads", "RoutedHeads", "head_allocation"]


class HeadAllocation(nn.Module):
    """All heads alike."""

    group: int = 1
    """Heads that share a map (with a difference of maps: that which is subtracted)."""
    true_gradient: bool = True
    """Whether its gradient is the derivative of its output."""
    active: float = 1.0
    """Share of (token, head) pairs that are on."""

    def __init__(self, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads

    def check(self, query: Tensor) -> None:
        """Whether it was built for these heads."""
        if type(self) is not HeadAllocation and query.shape[1] != self.num_heads:
            raise ShapeError(
                f"This allocation was built for {self.num_heads} heads and got {query.shape[1]}; build it with "
                f"num_heads={query.shape[1]}."
            )

    def rule(self) -> Mask | None:
        """Who sees whom in which head; None for no rule."""
        return None

    def route(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gates ``(batch, q_len, num_heads)`` of heads' outputs, and which of the last heads are on, ``(batch, q_len,
        routed)``; None where all are."""
        return None

    def shared(self, tensor: Tensor) -> Tensor:
        """One tensor for each group of heads, their mean: ``(batch, num_heads, ...)`` to ``(batch, num_heads / group,
        ...)``."""
        return tensor if self.group == 1 else tensor.unflatten(1, (-1, self.group)).mean(2)

    def spread(self, maps: Tensor) -> Tensor:
        """Back from groups to heads."""
        return maps if self.group == 1 else maps.repeat_interleave(self.group, 1)

    def seen(self, q_len: int, k_len: int, causal: bool) -> float | None:
        """Share of all pairs that a call computes; None where it has no say."""
        return None


class RoutedHeads(HeadAllocation):
    """A mixture of heads: per token some heads are on, ``shared_fraction`` of all heads always (the first ones),
    ``active_fraction`` in all; see :mod:`regard.layers.head_routing`.

    router: ``"norm"``, without parameters, by the norms of queries, with a straight-through gradient; ``"learned"``, a
    linear map of all heads' queries of a token, which starts with gates of one.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        shared_fraction: float = 0.5,
        active_fraction: float = 0.75,
        router: Literal["norm", "learned"] = "norm",
    ) -> None:
        super().__init__(num_heads)
        if router not in ("norm", "learned"):
            raise OptionError(f"router is 'norm' or 'learned', got {router!r}.")
        self.always_on, self.routed_heads = shared_and_routed(num_heads, shared_fraction, active_fraction)
        self.active = (self.always_on + self.routed_heads) / num_heads
        self.true_gradient = router == "learned"
        self.router: HeadRouter | None = None
        if router == "learned":
            width = num_heads * head_dim
            self.router = HeadRouter(width, self.always_on, num_heads - self.always_on, self.routed_heads)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads, {self.always_on} always on, {self.routed_heads} routed"

    def route(self, query: Tensor) -> tuple[Tensor, Tensor]:
        gates, _, on = self._routed(query)
        return gates, on

    def balance_loss(self, query: Tensor) -> Tensor:
        """The load-balance loss of these queries' routing, to be added to the task's (times 0.01)."""
        _, probs, on = self._routed(query)
        return head_load_balance_loss(probs, on) if on.shape[-1] else query.new_zeros(())

    def _routed(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.check(query)
        if self.router is None:
            return norm_router(query, self.always_on, self.routed_heads)
        tokens = query.transpose(1, 2).flatten(2)
        if tokens.shape[-1] != self.router.width:
            raise ShapeError(
                f"This router reads {self.router.width} channels of all heads' queries and got {tokens.shape[-1]}; "
                "build it with num_heads and head_dim as they are."
            )
        found: tuple[Tensor, Tensor, Tensor] = self.router(tokens)
        return found


class GroupedHeads(HeadAllocation):
    """Each ``group`` of heads shares one score map, that of their mean query and key; every head reads its own values.

    With a difference of maps it is the subtracted one that is shared, as in grouped differential attention (Lim et
    al., 2025, arXiv 2510.06949): many signal heads, one noise head.
    """

    def __init__(self, num_heads: int, group: int = 2) -> None:
        super().__init__(num_heads)
        if group < 1 or num_heads % group:
            raise OptionError(f"Groups of {group} heads do not divide {num_heads} heads.")
        self.group = group

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads in groups of {self.group}"


class LongShortHeads(HeadAllocation):
    """The first ``short_fraction`` of the heads see a window, ``window`` tokens back (and, where later ones are seen,
    ahead), the token itself counted; the others see all."""

    def __init__(self, num_heads: int, window: int = 256, short_fraction: float = 0.5) -> None:
        super().__init__(num_heads)
        if not 0 <= short_fraction <= 1:
            raise OptionError(f"short_fraction lies between 0 and 1, got {short_fraction}.")
        self.window, self.short_heads = window, round(short_fraction * num_heads)
        self._mask = head_masks(
            [SlidingWindow(window)] * self.short_heads + [Everything()] * (num_heads - self.short_heads)
        )

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads, {self.short_heads} of window {self.window}"

    def rule(self) -> Mask | None:
        return self._mask

    def seen(self, q_len: int, k_len: int, causal: bool) -> float | None:
        place = torch.arange(q_len) + k_len - q_len
        last = place if causal else torch.full_like(place, k_len - 1)
        near = torch.minimum(last, place + self.window - 1).clamp_max(k_len - 1)
        short = (near - (place - self.window + 1).clamp_min(0) + 1).clamp_min(0).sum()
        far = (last + 1).clamp(0, k_len).sum()
        share = self.short_heads / self.num_heads
        return float(share * short + (1 - share) * far) / (q_len * k_len)


HEADS: dict[str, Callable[..., HeadAllocation]] = {
    "all": HeadAllocation,
    "routed": RoutedHeads,
    "grouped": GroupedHeads,
    "long_short": LongShortHeads,
}
"""By name, each built from ``num_heads``, ``head_dim`` where it needs it, and options."""


def head_allocation(name: str, *, num_heads: int = 1, head_dim: int = 64, **options: Any) -> HeadAllocation:
    """An allocation by name; UnknownNameError shows the names, OptionError the options."""
    return build_step("head allocation", HEADS, name, options, num_heads=num_heads, head_dim=head_dim)
