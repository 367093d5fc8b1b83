"""Who may see whom, as an algebra: ``Causal() & (SlidingWindow(512) | Sinks(4))``.

A mask is a rule on (batch, head, query index, key index). One object gives

- ``dense(q_len, k_len)``: a boolean tensor ``(batch | 1, heads | 1, q_len, k_len)``, True where a query may see a key;
- ``bounds(q_blocks, k_blocks, ...)``: for blocks of indices, where something may be visible and where everything
  certainly is, without ever making the dense tensor for analytic masks (``regard.layout`` builds layouts from it);
- ``mod(q_len, k_len)``: FlexAttention's ``mask_mod``; ``from_block_mask`` comes back from a ``BlockMask``.

Queries and keys are aligned at the bottom right, as in decoding: the last query stands where the last key stands, so
query ``i`` has position ``i + k_len - q_len``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "Boolean",
    "Border",
    "Causal",
    "Dilated",
    "Document",
    "Everything",
    "KeyPadding",
    "Mask",
    "MaskMod",
    "Neighborhood",
    "PerHead",
    "Predicate",
    "Prefix",
    "Reindexed",
    "Sinks",
    "SlidingWindow",
    "axis_windows",
    "from_block_mask",
    "head_masks",
]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Bounds = tuple[Tensor, Tensor]


class Mask(ABC):
    """A rule that says which keys a query may see. Combine with ``&``, ``|`` and ``~``."""

    @property
    def batch(self) -> int:
        """Batch size that the rule depends on; 1 when it is the same for every sequence."""
        return 1

    @property
    def heads(self) -> int:
        """Number of heads that the rule depends on; 1 when it is the same for every head."""
        return 1

    @abstractmethod
    def mod(self, q_len: int, k_len: int) -> MaskMod:
        """The rule as FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)`` for these lengths, elementwise in tensors."""

    def wide_mod(self, q_len: int, k_len: int) -> MaskMod:
        """As :meth:`mod`, for a caller whose batch and head indices may run further than the rule's own."""
        rule, one_batch, one_head = self.mod(q_len, k_len), self.batch == 1, self.heads == 1
        return lambda b, h, q, k: rule(b * 0 if one_batch else b, h * 0 if one_head else h, q, k)

    @abstractmethod
    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        """What is known of each pair of blocks.

        ``q_blocks`` ``(num_q_blocks, block_q)`` and ``k_blocks`` ``(num_k_blocks, block_k)`` hold the indices of their
        members (a short block repeats one). Returns boolean tensors ``(batch | 1, heads | 1, num_q_blocks,
        num_k_blocks)``: ``possible`` (False: certainly nothing is visible) and ``certain`` (True: everything is).
        """

    def key_validity(self, k_len: int) -> Tensor | None:
        """``(batch | 1, heads | 1, k_len)`` if the rule depends on the key alone, else None."""
        return None

    def to(self, device: torch.device | str) -> Mask:
        """The same rule with its tensors on ``device``."""
        return self

    def at(self, query_index: Tensor, key_index: Tensor, q_len: int, k_len: int) -> Tensor:
        """The rule at index tensors that broadcast together as ``(batch, heads, ..., ...)`` in their last two axes."""
        device = query_index.device
        shape = [1] * max(query_index.dim(), key_index.dim())
        batch = torch.arange(self.batch, device=device).view(-1, *shape[1:])
        head = torch.arange(self.heads, device=device).view(1, -1, *shape[2:])
        return self.mod(q_len, k_len)(batch, head, query_index, key_index)

    def dense(self, q_len: int, k_len: int, device: torch.device | str | None = None) -> Tensor:
        """Boolean ``(batch | 1, heads | 1, q_len, k_len)``, True where the query may see the key."""
        query_index = torch.arange(q_len, device=device).view(1, 1, -1, 1)
        key_index = torch.arange(k_len, device=device).view(1, 1, 1, -1)
        seen = self.to(query_index.device).at(query_index, key_index, q_len, k_len)
        return seen.expand(self.batch, self.heads, q_len, k_len)

    def permuted(self, query_order: Tensor, key_order: Tensor) -> Mask:
        """The rule for reordered tokens: new index ``i`` holds the token of old index ``order[i]``."""
        return Reindexed(self, query_order, key_order)

    def __and__(self, other: Mask) -> Mask:
        return _Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return _Either(self, other)

    def __invert__(self) -> Mask:
        return _Not(self)


def _extent(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks.amin(-1), blocks.amax(-1)


def _plain(possible: Tensor, certain: Tensor) -> Bounds:
    return possible[None, None], certain[None, None]


def _distances(q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest query position minus key position of each pair of blocks."""
    (q_min, q_max), (k_min, k_max) = _extent(q_blocks + (k_len - q_len)), _extent(k_blocks)
    return q_min[:, None] - k_max[None], q_max[:, None] - k_min[None]


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Everything(Mask):
    """Every query sees every key."""

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        return lambda b, h, q, k: (q == q) & (k == k)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        yes = torch.ones(len(q_blocks), len(k_blocks), dtype=torch.bool, device=q_blocks.device)
        return _plain(yes, yes)

    def key_validity(self, k_len: int) -> Tensor | None:
        return torch.ones(1, 1, k_len, dtype=torch.bool)


@dataclass(frozen=True)
class Causal(Mask):
    """Keys up to the query's own position; the last query sees the last key."""

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        offset = k_len - q_len
        return lambda b, h, q, k: k <= q + offset

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        low, high = _distances(q_blocks, k_blocks, q_len, k_len)
        return _plain(high >= 0, low >= 0)


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Keys nearer than ``left`` positions before the query and ``right`` after it (``right`` defaults to ``left``).

    ``Causal() & SlidingWindow(w)`` is the usual causal window: the query's own key and the ``w - 1`` before it.
    """

    left: int
    right: int | None = None

    def __post_init__(self) -> None:
        _positive("SlidingWindow's left", self.left)
        _positive("SlidingWindow's right", self._right)

    @property
    def _right(self) -> int:
        return self.left if self.right is None else self.right

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        offset, left, right = k_len - q_len, self.left, self._right
        return lambda b, h, q, k: (q + offset - k < left) & (k - q - offset < right)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        low, high = _distances(q_blocks, k_blocks, q_len, k_len)
        left, right = self.left, self._right
        return _plain((low < left) & (high > -right), (high < left) & (low > -right))


@dataclass(frozen=True)
class Dilated(Mask):
    """Keys whose distance to the query is a multiple of ``rate``."""

    rate: int

    def __post_init__(self) -> None:
        _positive("Dilated's rate", self.rate)

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        offset, rate = k_len - q_len, self.rate
        return lambda b, h, q, k: (q + offset - k) % rate == 0

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        low, high = _distances(q_blocks, k_blocks, q_len, k_len)
        possible = high.div(self.rate, rounding_mode="floor") * self.rate >= low
        certain = possible & (low == high) if self.rate > 1 else torch.ones_like(possible)
        return _plain(possible, certain)


@dataclass(frozen=True)
class Sinks(Mask):
    """The first ``count`` keys, seen by all (StreamingLLM's attention sinks)."""

    count: int

    def __post_init__(self) -> None:
        _positive("Sinks' count", self.count)

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        count = self.count
        return lambda b, h, q, k: (k < count) & (q == q)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        k_min, k_max = _extent(k_blocks)
        rows = torch.ones(len(q_blocks), 1, dtype=torch.bool, device=q_blocks.device)
        return _plain(rows & (k_min < self.count), rows & (k_max < self.count))

    def key_validity(self, k_len: int) -> Tensor | None:
        return (torch.arange(k_len) < self.count)[None, None]


class _TensorMask(Mask):
    """A rule that carries a tensor whose first axis is the batch."""

    _per_batch: Tensor

    @property
    def batch(self) -> int:
        return self._per_batch.shape[0]


@dataclass(frozen=True, eq=False)
class Prefix(_TensorMask):
    """The first ``lengths[b]`` keys of sequence ``b``, seen by all; ``Causal() | Prefix(n)`` is a prefix LM.

    ``lengths``: an int, or an integer tensor ``(batch,)``.
    """

    lengths: int | Tensor
    _per_batch: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_per_batch", torch.as_tensor(self.lengths).reshape(-1))

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        lengths = self._per_batch
        return lambda b, h, q, k: (k < lengths[b]) & (q == q)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        k_min, k_max = _extent(k_blocks)
        lengths = self._per_batch.view(-1, 1, 1, 1)
        rows = torch.ones(1, 1, len(q_blocks), 1, dtype=torch.bool, device=q_blocks.device)
        return rows & (k_min < lengths), rows & (k_max < lengths)

    def key_validity(self, k_len: int) -> Tensor | None:
        return torch.arange(k_len, device=self._per_batch.device) < self._per_batch.view(-1, 1, 1)

    def to(self, device: torch.device | str) -> Mask:
        return Prefix(self._per_batch.to(device))


@dataclass(frozen=True, eq=False)
class Document(_TensorMask):
    """Packed sequences: a query sees the keys of its own document.

    ``ids`` ``(batch, q_len)`` or ``(q_len,)`` integers; ``key_ids`` likewise for the keys (default: the same).
    """

    ids: Tensor
    key_ids: Tensor | None = None
    _per_batch: Tensor = field(init=False, repr=False)
    _keys: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.ids.reshape(-1, self.ids.shape[-1])
        keys = ids if self.key_ids is None else self.key_ids.reshape(-1, self.key_ids.shape[-1])
        if ids.shape[0] != keys.shape[0]:
            raise ShapeError(f"Document ids of queries and keys differ in batch: {len(ids)} and {len(keys)}.")
        object.__setattr__(self, "_per_batch", ids)
        object.__setattr__(self, "_keys", keys)

    def _check(self, q_len: int, k_len: int) -> None:
        if self._per_batch.shape[1] != q_len or self._keys.shape[1] != k_len:
            raise ShapeError(
                f"Document ids cover {self._per_batch.shape[1]} queries and {self._keys.shape[1]} keys, "
                f"but attention has {q_len} and {k_len}; give key_ids when they differ."
            )

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        self._check(q_len, k_len)
        ids, keys = self._per_batch, self._keys
        return lambda b, h, q, k: ids[b, q] == keys[b, k]

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        self._check(q_len, k_len)
        (q_min, q_max), (k_min, k_max) = _extent(self._per_batch[:, q_blocks]), _extent(self._keys[:, k_blocks])
        possible = (q_min[:, :, None] <= k_max[:, None]) & (k_min[:, None] <= q_max[:, :, None])
        single = (q_min == q_max)[:, :, None] & (k_min == k_max)[:, None]
        return possible[:, None], (possible & single)[:, None]

    def to(self, device: torch.device | str) -> Mask:
        return Document(self._per_batch.to(device), self._keys.to(device))


@dataclass(frozen=True, eq=False)
class KeyPadding(_TensorMask):
    """Real keys only. ``valid`` ``(batch, k_len)`` boolean: True for a real token, False for padding."""

    valid: Tensor

    def __post_init__(self) -> None:
        if self.valid.dim() != 2 or self.valid.dtype != torch.bool:
            raise ShapeError(
                "KeyPadding takes a boolean tensor (batch, k_len), True for real tokens; "
                f"got {self.valid.dtype} of shape {tuple(self.valid.shape)}."
            )

    @property
    def _per_batch(self) -> Tensor:  # type: ignore[override]
        return self.valid

    def _check(self, k_len: int) -> None:
        if self.valid.shape[1] != k_len:
            raise ShapeError(f"KeyPadding covers {self.valid.shape[1]} keys, but attention has {k_len}.")

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        self._check(k_len)
        valid = self.valid
        return lambda b, h, q, k: valid[b, k] & (q == q)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        self._check(k_len)
        members = self.valid[:, k_blocks]
        rows = torch.ones(1, 1, len(q_blocks), 1, dtype=torch.bool, device=q_blocks.device)
        return rows & members.any(-1)[:, None, None], rows & members.all(-1)[:, None, None]

    def key_validity(self, k_len: int) -> Tensor | None:
        self._check(k_len)
        return self.valid[:, None]

    def to(self, device: torch.device | str) -> Mask:
        return KeyPadding(self.valid.to(device))


@dataclass(frozen=True, eq=False)
class Boolean(Mask):
    """A boolean tensor ``(batch | 1, heads | 1, q_len | 1, k_len)`` (or fewer leading axes), True where visible."""

    tensor: Tensor
    _full: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tensor.dtype != torch.bool or not 2 <= self.tensor.dim() <= 4:
            raise ShapeError(
                "A boolean mask has 2 to 4 axes (batch, heads, q_len, k_len), True where a query may see a key; "
                f"got {self.tensor.dtype} of shape {tuple(self.tensor.shape)}."
            )
        object.__setattr__(self, "_full", self.tensor[(None,) * (4 - self.tensor.dim())])

    @property
    def batch(self) -> int:
        return self._full.shape[0]

    @property
    def heads(self) -> int:
        return self._full.shape[1]

    def _expanded(self, q_len: int, k_len: int) -> Tensor:
        if self._full.shape[2] not in (1, q_len) or self._full.shape[3] not in (1, k_len):
            raise ShapeError(
                f"A boolean mask of shape {tuple(self.tensor.shape)} does not cover {q_len} queries and {k_len} keys."
            )
        return self._full.expand(-1, -1, q_len, k_len)

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        seen = self._expanded(q_len, k_len)
        shared_batch, shared_head = self.batch == 1, self.heads == 1
        return lambda b, h, q, k: seen[b * 0 if shared_batch else b, h * 0 if shared_head else h, q, k]

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        members = self._expanded(q_len, k_len)[:, :, q_blocks]
        some, every = members.any(3)[..., k_blocks], members.all(3)[..., k_blocks]
        return some.any(-1), every.all(-1)

    def key_validity(self, k_len: int) -> Tensor | None:
        return self._full.expand(-1, -1, 1, k_len)[:, :, 0] if self._full.shape[2] == 1 else None

    def dense(self, q_len: int, k_len: int, device: torch.device | str | None = None) -> Tensor:
        seen = self._expanded(q_len, k_len)
        return seen if device is None else seen.to(device)

    def to(self, device: torch.device | str) -> Mask:
        return Boolean(self.tensor.to(device))


@dataclass(frozen=True)
class Predicate(Mask):
    """Any elementwise function ``rule(b, h, q_idx, kv_idx) -> bool tensor`` on raw indices.

    ``batch`` and ``heads`` say how far the rule depends on them. Nothing is known of it but its values, so a block
    layout evaluates it everywhere, one row of blocks at a time.
    """

    rule: MaskMod
    batch_size: int = 1
    num_heads: int = 1

    @property
    def batch(self) -> int:
        return self.batch_size

    @property
    def heads(self) -> int:
        return self.num_heads

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        return self.rule

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        some, every = [], []
        for members in q_blocks:
            seen = self.at(members.view(1, 1, -1, 1, 1), k_blocks[None, None, None], q_len, k_len)
            seen = seen.expand(self.batch, self.heads, len(members), *k_blocks.shape)
            some.append(seen.any(-1).any(2))
            every.append(seen.all(-1).all(2))
        return torch.stack(some, 2), torch.stack(every, 2)


Border = Literal["clamp", "mask", "zero"]


def axis_windows(
    length: int,
    window: int,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    border: Border = "clamp",
) -> tuple[Tensor, Tensor]:
    """First and one-past-last key of every query along one axis, ``(length,)`` each, in steps of ``dilation``.

    The rule of generalized neighborhood attention (arXiv 2504.16922): queries go in groups of ``stride`` that share
    the window of their leader; at the border the window is moved inward (``border="clamp"``), so that every query has
    exactly ``window`` keys, or it sticks out and loses keys there (``border="mask"``; with ``"zero"`` as well, and
    those who attend let zeros take their place in the softmax). A causal axis ends at the query. With ``dilation`` d
    the rule holds inside each residue class modulo d.
    """
    index = torch.arange(length)
    residue, place = index % dilation, index // dilation
    size = (length - residue + dilation - 1).div(dilation, rounding_mode="floor")
    first = (place // stride) * stride
    if causal:
        leader = torch.minimum(first + stride - 1, size - 1)
        start, stop = (leader - window + 1).clamp_min(0), place + 1
    else:
        leader = torch.minimum(first + stride // 2, size - 1)
        left, right = window // 2, window // 2 + window % 2 - 1
        start, stop = leader - left, leader + right + 1
        if border == "clamp":
            start = start.clamp_min(0)
            start = torch.where(leader + right >= size, (size - window).clamp_min(0), start)
            stop = torch.minimum(start + window, size)
        else:
            start, stop = start.clamp_min(0), torch.minimum(stop, size)
    return residue + start * dilation, residue + (stop - 1) * dilation + 1


@dataclass(frozen=True)
class Neighborhood(Mask):
    """The n-dimensional neighbourhood of a token on a grid: a product of per-axis windows.

    ``grid``, ``window``, ``stride``, ``dilation``, ``causal``: one value per axis (see :func:`axis_windows`).
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    border: Border = "clamp"

    def __post_init__(self) -> None:
        axes = len(self.grid)
        for name in ("window", "stride", "dilation", "causal"):
            if len(getattr(self, name)) != axes:
                raise OptionError(f"Neighborhood's {name} needs {axes} values for grid {self.grid}.")
        if self.border not in get_args(Border):
            raise OptionError(f"border is one of {', '.join(get_args(Border))}; got {self.border!r}.")
        if self.border == "zero" and any(self.causal):
            raise OptionError("border='zero' has no meaning on a causal axis; use 'clamp' or 'mask'.")
        for axis, (length, window, stride, dilation) in enumerate(
            zip(self.grid, self.window, self.stride, self.dilation, strict=True)
        ):
            if not 1 <= stride <= window:
                raise OptionError(f"Axis {axis}: stride {stride} must lie between 1 and the window {window}.")
            if dilation < 1 or window * dilation > length:
                raise OptionError(
                    f"Axis {axis}: window {window} times dilation {dilation} must not exceed the length {length}."
                )

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        border: Border = "clamp",
    ) -> Neighborhood:
        """As the constructor, with one value for all axes allowed."""
        axes = len(grid)

        def spread(value: int | Sequence[int]) -> tuple[int, ...]:
            return (value,) * axes if isinstance(value, int) else tuple(value)

        flags = (causal,) * axes if isinstance(causal, bool) else tuple(causal)
        return cls(tuple(grid), spread(window), spread(stride), spread(dilation), flags, border)

    def _axes(self, device: torch.device) -> list[tuple[int, int, int, Tensor, Tensor]]:
        """Per axis: length, flat step, dilation, first key, one-past-last key."""
        rows, step = [], 1
        for axis in reversed(range(len(self.grid))):
            start, stop = axis_windows(
                self.grid[axis],
                self.window[axis],
                self.stride[axis],
                self.dilation[axis],
                self.causal[axis],
                self.border,
            )
            rows.append((self.grid[axis], step, self.dilation[axis], start.to(device), stop.to(device)))
            step *= self.grid[axis]
        return rows

    def _check(self, q_len: int, k_len: int) -> None:
        count = 1
        for length in self.grid:
            count *= length
        if q_len != count or k_len != count:
            raise ShapeError(f"A neighbourhood on grid {self.grid} has {count} tokens; got {q_len} and {k_len}.")

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        self._check(q_len, k_len)
        tables: dict[torch.device, list[tuple[int, int, int, Tensor, Tensor]]] = {}

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if q.device not in tables:
                tables[q.device] = self._axes(q.device)
            seen = None
            for length, step, dilation, start, stop in tables[q.device]:
                x, y = (q // step) % length, (k // step) % length
                near = (y >= start[x]) & (y < stop[x])
                if dilation > 1:
                    near = near & ((y - x) % dilation == 0)
                seen = near if seen is None else seen & near
            assert seen is not None
            return seen

        return rule

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        self._check(q_len, k_len)
        possible = certain = torch.ones(len(q_blocks), len(k_blocks), dtype=torch.bool, device=q_blocks.device)
        for length, step, dilation, start, stop in self._axes(q_blocks.device):
            x, y = (q_blocks // step) % length, (k_blocks // step) % length
            (start_min, start_max), (stop_min, stop_max), (k_min, k_max) = (_extent(t) for t in (start[x], stop[x], y))
            possible = possible & (k_max >= start_min[:, None]) & (k_min < stop_max[:, None])
            inside = (k_min >= start_max[:, None]) & (k_max < stop_min[:, None])
            if dilation > 1:
                (q_low, q_high), (k_low, k_high) = _extent(x % dilation), _extent(y % dilation)
                possible = possible & (k_high >= q_low[:, None]) & (k_low <= q_high[:, None])
                inside = inside & (k_high <= q_low[:, None]) & (k_low >= q_high[:, None])
            certain = certain & inside
        return _plain(possible, certain)


@dataclass(frozen=True)
class _Pair(Mask):
    first: Mask
    second: Mask

    @property
    def batch(self) -> int:
        return max(self.first.batch, self.second.batch)

    @property
    def heads(self) -> int:
        return max(self.first.heads, self.second.heads)

    def __post_init__(self) -> None:
        for name in ("batch", "heads"):
            sizes = {getattr(self.first, name), getattr(self.second, name)} - {1}
            if len(sizes) > 1:
                raise ShapeError(f"Masks for different {name} cannot be combined: {sorted(sizes)}.")

    def to(self, device: torch.device | str) -> Mask:
        return type(self)(self.first.to(device), self.second.to(device))


class _Both(_Pair):
    def mod(self, q_len: int, k_len: int) -> MaskMod:
        first, second = self.first.wide_mod(q_len, k_len), self.second.wide_mod(q_len, k_len)
        return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        (some, every), (some2, every2) = (m.bounds(q_blocks, k_blocks, q_len, k_len) for m in (self.first, self.second))
        return some & some2, every & every2

    def key_validity(self, k_len: int) -> Tensor | None:
        first, second = self.first.key_validity(k_len), self.second.key_validity(k_len)
        return None if first is None or second is None else first & second.to(first.device)


class _Either(_Pair):
    def mod(self, q_len: int, k_len: int) -> MaskMod:
        first, second = self.first.wide_mod(q_len, k_len), self.second.wide_mod(q_len, k_len)
        return lambda b, h, q, k: first(b, h, q, k) | second(b, h, q, k)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        (some, every), (some2, every2) = (m.bounds(q_blocks, k_blocks, q_len, k_len) for m in (self.first, self.second))
        return some | some2, every | every2

    def key_validity(self, k_len: int) -> Tensor | None:
        first, second = self.first.key_validity(k_len), self.second.key_validity(k_len)
        return None if first is None or second is None else first | second.to(first.device)


@dataclass(frozen=True)
class PerHead(Mask):
    """A rule of its own for every head: ``masks[h]`` holds for head ``h``, each the same for all heads by itself.

    Made by :func:`head_masks`.
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not self.masks or any(mask.heads != 1 for mask in self.masks):
            raise OptionError("PerHead takes at least one mask, each of which knows no heads of its own.")
        if len({mask.batch for mask in self.masks} - {1}) > 1:
            raise ShapeError("PerHead's masks are for different batch sizes.")

    @property
    def batch(self) -> int:
        return max(mask.batch for mask in self.masks)

    @property
    def heads(self) -> int:
        return len(self.masks)

    def _distinct(self) -> dict[Mask, list[int]]:
        """Each rule and the heads that it holds for; equal rules count once."""
        groups: dict[Mask, list[int]] = {}
        for head, mask in enumerate(self.masks):
            groups.setdefault(mask, []).append(head)
        return groups

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        rules = [(mask.wide_mod(q_len, k_len), heads) for mask, heads in self._distinct().items()]

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found = None
            for rule, heads in rules:
                own = h == heads[0]
                for head in heads[1:]:
                    own = own | (h == head)
                here = own & rule(b, h, q, k)
                found = here if found is None else found | here
            assert found is not None
            return found

        return seen

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        parts = {mask: mask.bounds(q_blocks, k_blocks, q_len, k_len) for mask in self._distinct()}
        wide = [[part.expand(self.batch, 1, *part.shape[2:]) for part in parts[mask]] for mask in self.masks]
        possible, certain = (torch.cat(column, 1) for column in zip(*wide, strict=True))
        return possible, certain

    def key_validity(self, k_len: int) -> Tensor | None:
        valid = [mask.key_validity(k_len) for mask in self.masks]
        found = [v.expand(self.batch, 1, k_len) for v in valid if v is not None]
        return torch.cat(found, 1) if len(found) == len(valid) else None

    def to(self, device: torch.device | str) -> Mask:
        return PerHead(tuple(mask.to(device) for mask in self.masks))


def head_masks(masks: Sequence[Mask]) -> Mask:
    """One mask for heads that see differently, a rule a head: ``head_masks([near] * 4 + [Causal()] * 8)``.

    Equal rules count once; where all are equal the mask is that rule itself, which knows no heads.
    """
    rules = PerHead(tuple(masks))
    return rules.masks[0] if len(set(rules.masks)) == 1 else rules


@dataclass(frozen=True)
class _Not(Mask):
    inner: Mask

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return self.inner.heads

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        rule = self.inner.mod(q_len, k_len)
        return lambda b, h, q, k: ~rule(b, h, q, k)

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        some, every = self.inner.bounds(q_blocks, k_blocks, q_len, k_len)
        return ~every, ~some

    def key_validity(self, k_len: int) -> Tensor | None:
        valid = self.inner.key_validity(k_len)
        return None if valid is None else ~valid

    def to(self, device: torch.device | str) -> Mask:
        return _Not(self.inner.to(device))


@dataclass(frozen=True, eq=False)
class Reindexed(Mask):
    """A rule seen through index maps: new query ``i`` is old query ``query_index[i]``, new key ``j`` old key
    ``key_index[j]``, or nothing where ``query_valid[i]`` or ``key_valid[j]`` is False (None: all stand for something).

    ``q_len`` and ``k_len``: the old lengths, by default those of the maps.
    """

    inner: Mask
    query_index: Tensor
    key_index: Tensor
    query_valid: Tensor | None = None
    key_valid: Tensor | None = None
    q_len: int | None = None
    k_len: int | None = None

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return self.inner.heads

    @property
    def _lengths(self) -> tuple[int, int]:
        q_len = len(self.query_index) if self.q_len is None else self.q_len
        return q_len, len(self.key_index) if self.k_len is None else self.k_len

    def mod(self, q_len: int, k_len: int) -> MaskMod:
        rule, query_index, key_index = self.inner.mod(*self._lengths), self.query_index, self.key_index
        query_valid, key_valid = self.query_valid, self.key_valid

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = rule(b, h, query_index[q], key_index[k])
            if query_valid is not None:
                visible = visible & query_valid[q]
            return visible if key_valid is None else visible & key_valid[k]

        return seen

    def bounds(self, q_blocks: Tensor, k_blocks: Tensor, q_len: int, k_len: int) -> Bounds:
        possible, certain = self.inner.bounds(self.query_index[q_blocks], self.key_index[k_blocks], *self._lengths)
        if self.query_valid is not None:
            queries = self.query_valid[q_blocks]
            possible, certain = possible & queries.any(-1)[:, None], certain & queries.all(-1)[:, None]
        if self.key_valid is not None:
            keys = self.key_valid[k_blocks]
            possible, certain = possible & keys.any(-1), certain & keys.all(-1)
        return possible, certain

    def key_validity(self, k_len: int) -> Tensor | None:
        valid = self.inner.key_validity(self._lengths[1])
        if valid is None or self.query_valid is not None:
            return None
        valid = valid[..., self.key_index.to(valid.device)]
        return valid if self.key_valid is None else valid & self.key_valid.to(valid.device)

    def to(self, device: torch.device | str) -> Mask:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Reindexed(
            self.inner.to(device),
            self.query_index.to(device),
            self.key_index.to(device),
            move(self.query_valid),
            move(self.key_valid),
            self.q_len,
            self.k_len,
        )


def from_block_mask(block_mask: BlockMask) -> Mask:
    """The mask behind a FlexAttention ``BlockMask``: its ``mask_mod``, with the blocks that it leaves out unseen."""
    visited = block_mask.to_dense().bool()
    block_q, block_k = block_mask.BLOCK_SIZE
    rule = block_mask.mask_mod
    batch, heads = visited.shape[:2]

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visited[b, h, q // block_q, k // block_k] & rule(b, h, q, k)

    return Predicate(seen, batch, heads)
