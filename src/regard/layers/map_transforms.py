"""Transforms of attention maps as steps of a frame: convolutions, mixtures of heads, differences, maps of higher order.

A :class:`MapTransform` takes a map ``(batch, heads, rows, k_len)`` to one of the same shape, before the normaliser
(scores) or after it (weights). :class:`MapDifference` makes one map of two, :class:`Nesting` says where queries and
keys come from. The operations by themselves are in :mod:`regard.layers.score_maps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.layers.graph import check_mode, process_adjacency
from regard.layers.head_output import differential_lambda
from regard.layers.head_output import lambda_init as depth_lambda
from regard.layers.score_maps import head_conv, identity_head_kernel, identity_kernel, key_query_conv
from regard.layers.steps import build_step, chosen

__all__ = [
    "MAP_TRANSFORMS",
    "Edges",
    "HeadMix",
    "KeyConv",
    "KeyQueryConv",
    "MapDifference",
    "MapTransform",
    "Nesting",
    "map_transforms",
]

Place = Literal["pre", "post"]


class MapTransform(nn.Module):
    """A map for a map, of the same shape."""

    place: Place = "pre"
    """``"pre"``: of scores, before the normaliser; ``"post"``: of weights, after it."""
    reach: tuple[int, int] | None = None
    """How many queries before and after its own a row is made from; None: any, so that the map is kept whole."""
    causal_safe: bool = False
    """Whether a row takes nothing from later queries; where it may, a causal call is refused."""
    per_pair: int = 1
    """Numbers that it holds for each pair."""

    def forward(self, maps: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
        """visible: boolean, broadcastable to the map (None: all). rows: which queries take from which, boolean ``(batch
        | 1, heads | 1, rows, rows)`` (None: all)."""
        raise NotImplementedError

    def flops(self, shape: AttentionShape) -> int:
        """FLOPs of a call."""
        return 0


class KeyQueryConv(MapTransform):
    """Each head's map convolved with a kernel of its own over ``q_kernel`` queries (its own and earlier ones) and
    ``k_kernel`` keys (odd, from both sides), which begins as the identity; see
    :func:`~regard.layers.score_maps.key_query_conv`.

    both_sides: later queries too (``q_kernel`` odd), which a causal call refuses. Golovneva et al., 2025, arXiv
    2504.00927, section 3.1.
    """

    reach: tuple[int, int]
    per_pair = 2

    def __init__(
        self,
        num_heads: int,
        q_kernel: int = 6,
        k_kernel: int = 11,
        place: Place = "pre",
        both_sides: bool = False,
    ) -> None:
        super().__init__()
        _check_place(place)
        if both_sides and q_kernel % 2 == 0:
            raise OptionError(
                f"With both_sides as many later as earlier queries count: q_kernel is odd, not {q_kernel}."
            )
        self.place = place
        self.later = q_kernel // 2 if both_sides else 0
        self.reach, self.causal_safe = (q_kernel - 1 - self.later, self.later), self.later == 0
        self.kernel = nn.Parameter(identity_kernel(num_heads, q_kernel, k_kernel, self.later))

    def extra_repr(self) -> str:
        heads, c_q, c_k = self.kernel.shape
        return f"{heads} heads, {c_q} queries x {c_k} keys, {self.place!r}" + (", both sides" if self.later else "")

    def forward(self, maps: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
        _check_heads("convolves", len(self.kernel), maps)
        return key_query_conv(maps, self.kernel, visible, rows, self.later)

    def flops(self, shape: AttentionShape) -> int:
        taps = self.kernel.shape[1] * self.kernel.shape[2]
        return 2 * taps * shape.batch * shape.num_heads * shape.q_len * shape.k_len


class KeyConv(KeyQueryConv):
    """A convolution over keys alone, row by row."""

    def __init__(self, num_heads: int, k_kernel: int = 11, place: Place = "pre") -> None:
        super().__init__(num_heads, 1, k_kernel, place)


class HeadMix(MapTransform):
    """Each head's map becomes a learned linear mixture of all heads' (or of those in its group of ``group`` heads),
    which begins as the identity.

    Shazeer et al., "Talking-Heads Attention", 2020, arXiv 2003.02436; in groups Golovneva et al., 2025, section 3.2.
    """

    reach = (0, 0)
    causal_safe = True

    def __init__(self, num_heads: int, group: int | None = None, place: Place = "pre") -> None:
        super().__init__()
        _check_place(place)
        self.place, self.num_heads = place, num_heads
        self.kernel = nn.Parameter(identity_head_kernel(num_heads, num_heads if group is None else group))

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads in groups of {self.kernel.shape[-1]}, {self.place!r}"

    def forward(self, maps: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
        _check_heads("mixes", self.num_heads, maps)
        mixed = head_conv(maps, self.kernel)
        # Heads may see different keys, and none is shown another's.
        return mixed if visible is None or self.place == "pre" else mixed.masked_fill(~visible, 0)

    def flops(self, shape: AttentionShape) -> int:
        return 2 * self.kernel.shape[-1] * shape.batch * shape.num_heads * shape.q_len * shape.k_len


class Edges(MapTransform):
    """The map as a weighted graph with fewer or harder edges, after the normaliser:
    :func:`~regard.layers.graph.process_adjacency` with this ``mode``, ``threshold``, ``beta`` and ``fraction``."""

    place = "post"
    reach = (0, 0)
    causal_safe = True
    per_pair = 2

    def __init__(self, mode: str = "relu", threshold: float = 0.2, beta: float = 10.0, fraction: float = 0.1) -> None:
        super().__init__()
        check_mode(mode, fraction)
        self.mode, self.threshold, self.beta, self.fraction = mode, threshold, beta, fraction

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, threshold={self.threshold}"

    def forward(self, maps: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
        seen = maps.new_ones(1, dtype=torch.bool) if visible is None else visible
        return process_adjacency(
            maps,
            self.mode,
            threshold=self.threshold,
            beta=self.beta,
            fraction=self.fraction,
            visible=seen.expand(maps.shape),
        )


class MapDifference(nn.Module):
    """``A - lam B`` of two normalised maps: those of the two halves of queries' and keys' channels.

    ``lam = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init`` with four learned vectors of half a head's channels,
    N(0, lambda_std^2) at first; lambda_init: by default that of the layer's depth. Rows of a softmax then sum to ``1 -
    lam``. Ye et al., "Differential Transformer", 2024, arXiv 2410.05258, section 2.1; its norm per head comes after
    the read-out (:class:`~regard.layers.head_output.HeadNorm`).
    """

    def __init__(
        self, head_dim: int, lambda_init: float | None = None, lambda_std: float = 0.1, layer_index: int = 0
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise OptionError(
                f"A difference of maps takes each head's channels in two halves; head_dim {head_dim} is odd."
            )
        self.lambda_init = depth_lambda(layer_index + 1) if lambda_init is None else lambda_init
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(head_dim // 2) * lambda_std) for _ in range(4)
        )

    def extra_repr(self) -> str:
        return f"lambda_init={self.lambda_init:.3g}"

    @property
    def lam(self) -> Tensor:
        """The weight of the second map, a scalar in float32 at least."""
        vectors = (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        return differential_lambda(*vectors, self.lambda_init)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - self.lam.to(first.dtype) * second


class Nesting(nn.Module):
    """Attention of ``order`` levels: a level's queries (and keys) are the given ones plus the output of the level
    below, ``q + U`` (and ``k + U``), the values stay; all levels run the same steps.

    nest: ``"q"``, ``"k"`` or ``"qk"``. With ``"k"`` every key has an output of its own, so that queries and keys must
    be the same tokens. Values are as wide as queries. Chen et al., "Nexus", 2025, arXiv 2512.03377.
    """

    def __init__(self, order: int = 2, nest: Literal["q", "k", "qk"] = "q") -> None:
        super().__init__()
        if order < 2 or nest not in ("q", "k", "qk"):
            raise OptionError(
                f"A nesting has order 2 or more (1 is no nesting) and nests 'q', 'k' or 'qk'; got {order} and {nest!r}."
            )
        self.order, self.nest = order, nest

    def extra_repr(self) -> str:
        return f"order={self.order}, nest={self.nest!r}"


MAP_TRANSFORMS: dict[str, Callable[..., nn.Module]] = {
    "key_query_conv": KeyQueryConv,
    "key_conv": KeyConv,
    "head_mix": HeadMix,
    "edges": Edges,
    "difference": MapDifference,
    "nested": Nesting,
}
"""By name, each built from ``num_heads`` or ``head_dim`` where it needs them, and options."""


def map_transforms(choices: Any, **context: Any) -> list[nn.Module]:
    """The transforms of a choice: a name, names with options ``{"key_conv": {"k_kernel": 3}}``, a built module, or a
    sequence of these, which also lets one transform stand twice."""
    if isinstance(choices, Mapping) and len(choices) != 1:
        choices = [{name: options} for name, options in choices.items()]
    elif isinstance(choices, str | Mapping | nn.Module) or not isinstance(choices, Sequence):
        choices = [choices]
    built: list[nn.Module] = []
    for choice in choices:
        if not isinstance(choice, nn.Module):
            name, options = chosen("map transform", choice)
            choice = build_step("map transform", MAP_TRANSFORMS, name, options, **context)
        if not isinstance(choice, MapTransform | MapDifference | Nesting):
            raise OptionError(f"A map transform of one's own is a MapTransform, got {type(choice).__name__}.")
        built.append(choice)
    for kind in (MapDifference, Nesting):
        if sum(isinstance(step, kind) for step in built) > 1:
            raise OptionError(f"There is one {kind.__name__} at most; for a higher order raise a nesting's order.")
    return built


def _check_place(place: str) -> None:
    if place not in ("pre", "post"):
        raise OptionError(f"A transform stands 'pre' or 'post' (before or after) the normaliser, got {place!r}.")


def _check_heads(what: str, heads: int, maps: Tensor) -> None:
    if maps.shape[1] != heads:
        raise ShapeError(
            f"This mechanism {what} {heads} heads and got {maps.shape[1]}; build it with num_heads={maps.shape[1]}."
        )
