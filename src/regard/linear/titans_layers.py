"""Titans' three ways to join attention, which sees near and exactly, with the neural memory, which sees far.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time", 2024, arXiv 2501.00663, section 4. ``P`` are
persistent tokens, learned and the same for every input; ``M`` is :class:`~regard.linear.titans.NeuralMemory`:

- context (:class:`MemoryAsContext`), segment by segment: ``h = M(s)`` as the memory was before the segment ``s``, ``y =
  attention of s over [P | h | s]``, ``o = gate(y, M(y))``, where ``M(y)`` writes ``y`` and reads;
- gate (:class:`MemoryAsGate`): ``y = sliding-window attention over [P | x]`` with ``P`` always visible, ``o = gate(y,
  M([P | x]))``;
- layer (:class:`MemoryAsLayer`): ``y = M([P | x])``, ``o = sliding-window attention over y``.

``gate(y, m) = norm(y) * sigmoid(norm(m))``, with norms of learned gains: the paper says "any non-linear gating", and
that both are normed before a non-linearity. What the paper leaves to a mask, and a causal model needs: in a segment a
token sees ``h`` of itself and of earlier tokens alone, since ``h`` of a later one would tell of it, and ``M(y)`` reads
token by token while ``y`` is written. Queries and keys are turned by rotary positions, of the sequence behind ``P`` or,
for context, of the segment.

Time ``O(N (w + P) d)`` beside the memory's; the state is a window (or segment) of keys and values and the memory's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import block_sparse_attention, dense_attention
from regard.layers.heads import head_sizes
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import kept_layout
from regard.linear.titans import NeuralMemory, NeuralMemoryState
from regard.masks import Boolean, Causal, Sinks, SlidingWindow
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["ContextState", "MemoryAsContext", "MemoryAsGate", "MemoryAsLayer", "MemoryGate", "WindowState"]

_BLOCK = 64
Pair = tuple[Tensor, Tensor]


class MemoryGate(nn.Module):
    """``norm(y) * sigmoid(norm(m))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.memory_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        """What attention gives and what memory gives, ``(..., dim)``."""
        gated: Tensor = self.norm(y) * self.memory_norm(m).sigmoid()
        return gated


@dataclass(frozen=True, eq=False)
class WindowState:
    """keys and values ``(batch, heads, kept, head_dim)`` that a later token can see; memory: of the neural memory,
    None without one; seen: tokens so far, persistent ones included."""

    kept: Pair
    memory: NeuralMemoryState | None
    seen: int


@dataclass(frozen=True, eq=False)
class ContextState:
    """own, read: keys and values of the present segment's tokens and of what they read; memory: the neural memory's,
    before: as it was before the segment, both None without one; recent: the last inputs; filled: tokens of the
    segment."""

    own: Pair
    read: Pair
    memory: NeuralMemoryState | None
    before: NeuralMemoryState | None
    recent: Tensor
    filled: int


class _MemoryAttention(Layer):
    """What the three share: projections, rotary positions, persistent tokens, the memory and its gate."""

    patterns = frozenset({"causal-self"})
    needs_training = True
    growth = "N w"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        persistent: int,
        memory: Mapping[str, Any] | bool,
        rotary: bool,
        gated: bool,
    ) -> None:
        super().__init__()
        if persistent < 0:
            raise OptionError(f"persistent counts learned tokens and is at least 0; got {persistent}.")
        _, self.head_dim = head_sizes(embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.rotary = embed_dim, num_heads, rotary
        self.persistent = nn.Parameter(0.02 * torch.randn(persistent, embed_dim))
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.value = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)
        self.memory: NeuralMemory | None = None
        self.gate: MemoryGate | None = None
        if memory is not False:
            options = {"num_heads": num_heads, **(memory if isinstance(memory, Mapping) else {})}
            self.memory = NeuralMemory(embed_dim, **options)
            self.gate = MemoryGate(embed_dim) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, embed_dim)`` in and out."""
        out: Tensor = self.step(x, self.init_state(len(self._checked(x)), like=x))[0]
        return out

    @abstractmethod
    def init_state(self, batch: int, *, like: Tensor) -> Any:
        """The state before the first token: persistent tokens have been read."""

    @abstractmethod
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`."""

    def _prefix(self, batch: int, like: Tensor) -> Tensor:
        return self.persistent.to(like.dtype).expand(batch, -1, -1)

    def _heads(self, x: Tensor, start: int | None) -> Tensor:
        """Heads to the front, turned by positions from ``start`` on (None: not turned)."""
        x = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if start is None or not self.rotary:
            return x
        turn = rotary_angles(x.shape[2], self.head_dim, start=start, device=x.device, dtype=x.dtype)
        return apply_rotary(x, *turn)

    def _keys(self, x: Tensor, start: int) -> Pair:
        return self._heads(self.key(x), start), self._heads(self.value(x), None)

    def _mixed(self, out: Tensor) -> Tensor:
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"{type(self).__name__} takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        return x


def _joined(first: Pair, second: Pair) -> Pair:
    return torch.cat((first[0], second[0]), 2), torch.cat((first[1], second[1]), 2)


class _WindowedMemory(_MemoryAttention):
    """Sliding-window attention behind persistent tokens, beside or behind the memory."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int = 64,
        persistent: int = 16,
        memory: Mapping[str, Any] | bool = True,
        rotary: bool = True,
    ) -> None:
        super().__init__(embed_dim, num_heads, persistent, memory, rotary, gated=self.always)
        if window < 1:
            raise OptionError(f"window counts the token itself and is at least 1; got {window}.")
        self.window = window

    always: bool
    """Whether persistent tokens are seen from any distance."""

    def extra_repr(self) -> str:
        return f"window={self.window}, persistent={len(self.persistent)}"

    def init_state(self, batch: int, *, like: Tensor) -> WindowState:
        prefix = self._prefix(batch, like)
        memory = None if self.memory is None else self.memory.init_state(batch, like=like)
        source = prefix
        if self.memory is not None and memory is not None and len(self.persistent):
            read, memory = self.memory.step(prefix, memory)
            source = prefix if self.always else read
        return WindowState(self._trimmed(self._keys(source, 0)), memory, len(self.persistent))

    def _window(self, x: Tensor, state: WindowState) -> tuple[Tensor, Pair]:
        """Attention of the next tokens over what is kept and themselves, and what is kept then."""
        kept = _joined(state.kept, self._keys(x, state.seen))
        rule = Causal() & (
            SlidingWindow(self.window) | Sinks(len(self.persistent))
            if self.always and len(self.persistent)
            else SlidingWindow(self.window)
        )
        query = self._heads(self.query(x), state.seen)
        layout = kept_layout(rule, x.shape[1], kept[0].shape[2], _BLOCK, _BLOCK, x.device)
        return self._mixed(block_sparse_attention(query, *kept, layout)), self._trimmed(kept)

    def _trimmed(self, kept: Pair) -> Pair:
        """The keys and values that a later token can see."""
        pinned = len(self.persistent) if self.always else 0
        spare = kept[0].shape[2] - pinned - (self.window - 1)
        if spare <= 0:
            return kept
        key, value = (torch.cat((t[:, :, :pinned], t[:, :, pinned + spare :]), 2) for t in kept)
        return key, value


@register("titans_mag")
class MemoryAsGate(_WindowedMemory):
    """Sliding-window attention, gated by the memory.

    window: keys that a token sees, its own included. persistent: learned tokens in front, which attention always sees
    and the memory reads first. memory: options of :class:`~regard.linear.titans.NeuralMemory` (as many heads as
    attention has, where they do not say), or False for none: then the layer is attention alone, without the gate.
    """

    always = True

    def step(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        y, kept = self._window(x, state)
        memory = state.memory
        if self.memory is not None and memory is not None and self.gate is not None:
            read, memory = self.memory.step(x, memory)
            y = self.gate(y, read)
        return y, WindowState(kept, memory, state.seen + x.shape[1])


@register("titans_mal")
class MemoryAsLayer(_WindowedMemory):
    """Sliding-window attention over what the memory reads; options as in :class:`MemoryAsGate`. Persistent tokens stand
    in front of the memory, and attention sees what it made of them within its window alone."""

    always = False

    def step(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        memory, source = state.memory, x
        if self.memory is not None and memory is not None:
            source, memory = self.memory.step(x, memory)
        y, kept = self._window(source, state)
        return y, WindowState(kept, memory, state.seen + x.shape[1])


@register("titans_mac")
class MemoryAsContext(_MemoryAttention):
    """Full causal attention within segments, over what the memory knows of each token besides.

    segment: tokens that attend to each other; the memory alone carries across segments. skip: ``y = s + attention``,
    reading the paper's "residual connections in all blocks" as within this one too: then the memory is told the tokens
    themselves from the start, before attention has learned to pick them. Other options as in :class:`MemoryAsGate`.
    """

    growth = "N s"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment: int = 64,
        persistent: int = 16,
        memory: Mapping[str, Any] | bool = True,
        rotary: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, persistent, memory, rotary, gated=True)
        if segment < 1:
            raise OptionError(f"A segment has at least one token, got {segment}.")
        self.segment, self.skip = segment, skip

    def extra_repr(self) -> str:
        return f"segment={self.segment}, persistent={len(self.persistent)}"

    def init_state(self, batch: int, *, like: Tensor) -> ContextState:
        memory = None if self.memory is None else self.memory.init_state(batch, like=like)
        nothing = self._keys(like.new_zeros(batch, 0, self.embed_dim), 0)
        return ContextState(nothing, nothing, memory, memory, like.new_zeros(batch, 0, self.embed_dim), 0)

    def step(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        prefix, outs, start = self._keys(self._prefix(len(x), x), 0), [x[:, :0]], 0
        while start < x.shape[1]:
            stop = min(start + self.segment - state.filled, x.shape[1])
            out, state = self._within(x[:, start:stop], state, prefix)
            outs.append(out)
            start = stop
        return torch.cat(outs, 1), state

    def _within(self, x: Tensor, state: ContextState, prefix: Pair) -> tuple[Tensor, ContextState]:
        """Tokens of one segment."""
        length, front = x.shape[1], len(self.persistent)
        place, filled = front + state.filled, state.filled + length
        own, read, recent = _joined(state.own, self._keys(x, place)), state.read, state.recent
        keys = [prefix, own]
        if self.memory is not None and state.before is not None:
            # The last inputs stand before the segment's, so that the query's convolution finds them.
            context = torch.cat((recent, x), 1)
            known = self.memory.retrieve(context, state.before)[:, -length:]
            read = _joined(read, self._keys(known, place))
            keys = [prefix, read, own]
            reach = self.memory.query_conv.kernel_size - 1
            recent = context[:, max(context.shape[1] - reach, 0) :]
        past = torch.ones(length, filled, dtype=torch.bool, device=x.device).tril(state.filled)
        mask = torch.cat((past.new_ones(length, front), *[past] * (len(keys) - 1)), -1)
        key, value = (torch.cat([pair[which] for pair in keys], 2) for which in (0, 1))
        query = self._heads(self.query(x), place)
        y = self._mixed(dense_attention(query, key, value, mask=Boolean(mask)))
        y = x + y if self.skip else y
        memory = state.memory
        if self.memory is not None and memory is not None and self.gate is not None:
            known, memory = self.memory.step(y, memory)
            y = self.gate(y, known)
        if filled < self.segment:
            return y, ContextState(own, read, memory, state.before, recent, filled)
        nothing = (own[0][:, :, :0], own[1][:, :, :0])
        return y, ContextState(nothing, nothing, memory, memory, recent, 0)
