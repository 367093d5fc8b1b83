"""What one head's attention is like, in numbers: functions of attention weights ``(..., q_len, k_len)``.

Each gives one number per head, ``(...)``, averaged over the queries that see anything. Queries stand where keys stand,
the last at the last key. :func:`head_metrics` takes all of them in one pass, :func:`summarize_heads` from weights that
come in rows (:meth:`regard.inspect.capture.LayerTrace.weight_rows`).

A query's weights are read as shares: each without its sign, over their sum. Those of softmax are shares already; of
mechanisms whose implied weights may be negative or do not sum to 1, this is what makes their heads comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.inspect.capture import LayerTrace
from regard.kernels import accumulation_dtype

__all__ = [
    "METRICS",
    "HeadSummary",
    "attention_distance",
    "attention_entropy",
    "head_metrics",
    "js_divergence",
    "local_mass",
    "patch_metrics",
    "previous_token_mass",
    "same_token_mass",
    "shares",
    "sink_mass",
    "successor_mass",
    "summarize_heads",
]

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(shares (..., rows, k_len), query places (rows,), key places (k_len,)) -> (..., rows)``."""


def _entropy(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return -torch.special.xlogy(weights, weights).sum(-1)


def _distance(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (weights * (query[:, None] - key).abs()).sum(-1)


def _sink(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return weights[..., 0]


def _previous(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (weights * (query[:, None] - key == 1)).sum(-1)


def _self(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (weights * (query[:, None] == key)).sum(-1)


def _local(weights: Tensor, query: Tensor, key: Tensor, window: int = 16) -> Tensor:
    return (weights * ((query[:, None] - key).abs() < window)).sum(-1)


METRICS: dict[str, Metric] = {
    "entropy": _entropy,
    "distance": _distance,
    "sink": _sink,
    "previous": _previous,
    "self": _self,
    "local": _local,
}
"""Of every row: entropy in nats (0 to ``log k_len``), mean distance in tokens, weight on the first key, on the key
before, on the own key, and within 16 keys (0 to 1)."""


def patch_metrics(grid: Sequence[int], before: int = 1) -> dict[str, Metric]:
    """Metrics of images, for :class:`HeadSummary` with ``skip=before``: patches ``grid`` (rows, columns) stand row by
    row after ``before`` other tokens (class token, registers).

    Entropy in nats; mean Euclidean distance in patches, 0 to the grid's diagonal, among the patches attended to
    (Dosovitskiy et al., 2020, arXiv 2010.11929, section 4.5); weight on the own patch, on the eight around it, and on
    the tokens before the patches, 0 to 1.
    """
    if len(grid) != 2 or min(grid) < 1 or before < 0:
        raise ShapeError(f"grid is (rows, columns) of patches, and before counts tokens; got {tuple(grid)}, {before}.")
    place = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 2)

    def offsets(query: Tensor) -> Tensor:
        at = place.to(query.device)
        return (at[(query - before).clamp_min(0)][:, None] - at).abs()

    def distance(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mass = weights[..., before:]
        far = offsets(query).to(mass.dtype).square().sum(-1).sqrt()
        return (mass * far).sum(-1) / mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)

    def around(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (weights[..., before:] * (offsets(query).amax(-1) == 1)).sum(-1)

    def beside(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return weights[..., :before].sum(-1)

    found: dict[str, Metric] = {
        "entropy": _entropy,
        "distance in patches": distance,
        "own patch": _self,
        "patches around": around,
    }
    if before:
        found["other tokens"] = beside
    return found


def _mean(name: str, weights: Tensor) -> Tensor:
    return head_metrics(weights, (name,))[name]


def attention_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of the rows in nats: 0 for one key, ``log k`` for ``k`` keys alike (Clark et al., "What Does BERT
    Look At?", 2019, arXiv 1906.04341, section 3.3)."""
    return _mean("entropy", weights)


def attention_distance(weights: Tensor) -> Tensor:
    """Mean distance in tokens between a query and what it attends to, 0 to ``k_len - 1`` (Dosovitskiy et al., "An Image
    is Worth 16x16 Words", 2020, arXiv 2010.11929, section 4.5, there in pixels)."""
    return _mean("distance", weights)


def sink_mass(weights: Tensor) -> Tensor:
    """Mean weight on the first key, 0 to 1 (Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    2023, arXiv 2309.17453)."""
    return _mean("sink", weights)


def previous_token_mass(weights: Tensor) -> Tensor:
    """Mean weight on the key before the query's own, 0 to 1 (Clark et al., 2019, arXiv 1906.04341, section 3.1)."""
    return _mean("previous", weights)


def local_mass(weights: Tensor, window: int = 16) -> Tensor:
    """Mean weight on keys less than ``window`` tokens away, 0 to 1: what a sliding window of that size would keep
    (Beltagy et al., "Longformer", 2020, arXiv 2004.05150, section 3.1)."""
    summary = HeadSummary(weights.shape[-2], {"local": partial(_local, window=window)})
    summary.add(0, weights)
    return summary.means()["local"]


def same_token_mass(weights: Tensor, tokens: Tensor) -> Tensor:
    """Mean weight on earlier keys that hold the query's token, 0 to 1; over queries that have such keys.

    tokens: ``(batch, length)``; weights ``(batch, heads, length, length)``. Heads with much of it are duplicate-token
    heads (Wang et al., "Interpretability in the Wild", 2022, arXiv 2211.00593).
    """
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    return _over_pairs(weights, same)


def successor_mass(weights: Tensor, tokens: Tensor) -> Tensor:
    """Mean weight on keys that follow an earlier occurrence of the query's token, 0 to 1: the induction pattern (Olsson
    et al., "In-context Learning and Induction Heads", 2022, arXiv 2209.11895). Shapes as :func:`same_token_mass`."""
    before = torch.nn.functional.pad((tokens[:, :, None] == tokens[:, None, :-1]), (1, 0)).tril(0)
    before.diagonal(dim1=-2, dim2=-1).fill_(False)
    return _over_pairs(weights, before)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions ``(..., n)``: ``(...)``, 0 to ``log 2``, symmetric (Lin,
    "Divergence measures based on the Shannon entropy", 1991). Rows of two maps, or two predictions, are compared by it.
    """
    middle = (p + q) / 2

    def towards_middle(one: Tensor) -> Tensor:
        return (torch.special.xlogy(one, one) - torch.special.xlogy(one, middle)).sum(-1)

    return ((towards_middle(p) + towards_middle(q)) / 2).clamp_min(0)


def _over_pairs(weights: Tensor, pairs: Tensor) -> Tensor:
    if weights.dim() != 4 or pairs.shape != (weights.shape[0], *weights.shape[2:]):
        raise ShapeError(
            f"weights (batch, heads, length, length) go with tokens (batch, length); got {tuple(weights.shape)} and "
            f"{tuple(pairs.shape[:2])}."
        )
    mass = (shares(weights) * pairs[:, None]).sum(-1)
    counted = pairs.any(-1)[:, None].expand_as(mass)
    return (mass * counted).sum(-1) / counted.sum(-1).clamp_min(1)


def shares(weights: Tensor) -> Tensor:
    """Rows of ``(..., q_len, k_len)`` without signs, over their sums, in at least float32; 0 where nothing is seen."""
    wide = weights.abs().to(accumulation_dtype(weights.dtype))
    return wide / wide.sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)


def head_metrics(weights: Tensor, names: tuple[str, ...] = tuple(METRICS)) -> dict[str, Tensor]:
    """Several of :data:`METRICS` at once, each ``(...)`` for weights ``(..., q_len, k_len)``."""
    summary = HeadSummary(weights.shape[-2], {name: METRICS[name] for name in names})
    summary.add(0, weights)
    return summary.means()


@dataclass(eq=False)
class HeadSummary:
    """Metrics of one layer, from rows of weights as they come; and the keys that each query weighs most.

    ``top``: how many of these to keep, in ``top_keys`` ``(..., q_len, top)`` int32 and ``top_weights``, their shares,
    the largest first. ``skip``: queries at the beginning that metrics leave out.
    """

    queries: int
    metrics: Mapping[str, Metric] = field(default_factory=lambda: dict(METRICS))
    top: int = 0
    skip: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _rows: Tensor | None = field(default=None, repr=False)
    _received: Tensor | None = field(default=None, repr=False)
    _keys: list[Tensor] = field(default_factory=list, repr=False)
    _weights: list[Tensor] = field(default_factory=list, repr=False)

    def add(self, start: int, weights: Tensor) -> None:
        """Rows ``start`` onwards, ``(..., rows, k_len)``."""
        query, key = _places(weights, start, self.queries)
        wide = shares(weights)
        seen = (wide.sum(-1) > 0) & (torch.arange(start, start + wide.shape[-2], device=wide.device) >= self.skip)
        for name, metric in self.metrics.items():
            total = (metric(wide, query, key) * seen).sum(-1)
            self._sums[name] = total if name not in self._sums else self._sums[name] + total
        count, received = seen.sum(-1), wide.sum(-2)
        self._rows = count if self._rows is None else self._rows + count
        self._received = received if self._received is None else self._received + received
        if self.top:
            best = wide.topk(min(self.top, wide.shape[-1]), -1)
            self._keys.append(best.indices.to(torch.int32))
            self._weights.append(best.values)

    def means(self) -> dict[str, Tensor]:
        """Each metric, averaged over the queries that see anything."""
        if self._rows is None:
            return {}
        return {name: total / self._rows.clamp_min(1) for name, total in self._sums.items()}

    @property
    def received(self) -> Tensor:
        """Shares that each key receives from all queries, ``(..., k_len)``."""
        if self._received is None:
            raise ShapeError("No rows were added yet.")
        return self._received

    @property
    def top_keys(self) -> Tensor:
        """``(..., q_len, top)`` int32."""
        return torch.cat(self._keys, -2)

    @property
    def top_weights(self) -> Tensor:
        """``(..., q_len, top)``, the largest first."""
        return torch.cat(self._weights, -2)


def summarize_heads(top: int = 0, rows: int = 256) -> Callable[[LayerTrace], HeadSummary]:
    """For ``capture(model, summarize=summarize_heads())``: metrics of every head without a whole map."""

    def summarize(layer: LayerTrace) -> HeadSummary:
        summary = HeadSummary(layer.queries_seen, top=top)
        for start, weights in layer.weight_rows(rows):
            summary.add(start, weights)
        return summary

    return summarize


def _places(weights: Tensor, start: int, queries: int) -> tuple[Tensor, Tensor]:
    key = torch.arange(weights.shape[-1], device=weights.device)
    first = start + weights.shape[-1] - queries
    return torch.arange(first, first + weights.shape[-2], device=weights.device), key
