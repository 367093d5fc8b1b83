"""Hierarchical chunk attention memory: attend to summaries of the past, then in detail inside the chosen chunks.

Lampinen et al., "Towards mental time travel: a hierarchical memory for reinforcement learning agents", 2021, arXiv
2105.14039, section 2, with the released attention. The past is cut into chunks of ``C`` steps; each keeps its ``C``
vectors and a summary key, their mean. A query ``x`` scores the summaries and reads inside the best ``top_k`` chunks:

    r_i = (x W_r) . (mean(chunk_i) W_s) / sqrt(D),  w = softmax of the top_k largest r
    out = sum_i w_i MHA(x, chunk_i + codes, chunk_i + codes)

``codes`` are sinusoids of the step within the chunk, counted backwards. Scoring is single-headed and without bias, the
maps of the multi-head attention have biases, and what is remembered carries no gradient: only the maps learn, and those
who ask. A query that may see no chunk reads zeros. Cost of a query ``O(M D + top_k C D)`` over ``M`` chunks, where all
steps would cost ``O(M C D)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import masked_softmax
from regard.kernels.shapes import accumulation_dtype
from regard.layers.mlp import Mlp
from regard.mechanism import Layer
from regard.registry import register

__all__ = [
    "HCAM",
    "HCAMBlock",
    "HCAMProjections",
    "HCAMRead",
    "HierarchicalMemory",
    "backward_codes",
    "chunk_mask",
    "hcam_attention",
]


@dataclass(frozen=True, eq=False)
class HierarchicalMemory:
    """What is remembered of ``batch`` pasts, each with its own clock.

    keys ``(batch, M, D)`` and contents ``(batch, M, C, D)``: the chunks; accumulator ``(batch, C, D)``: the steps of
    the next one, of which ``steps_since_last_write (batch,)`` have come. written ``(batch,)``: chunks written in all,
    by default ``M``. slots: the most chunks that are kept, the oldest being overwritten; None lets the table grow.
    """

    keys: Tensor
    contents: Tensor
    steps_since_last_write: Tensor
    accumulator: Tensor
    written: Tensor | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        shape = self.contents.shape
        if len(shape) != 4 or self.keys.shape != (*shape[:2], shape[3]) or self.accumulator.shape[1:] != shape[2:]:
            raise ShapeError(
                "A memory takes keys (batch, M, D), contents (batch, M, C, D) and an accumulator (batch, C, D); got "
                f"{tuple(self.keys.shape)}, {tuple(shape)} and {tuple(self.accumulator.shape)}."
            )
        if self.slots is not None and (self.slots < 1 or shape[1] > self.slots):
            raise OptionError(
                f"slots is at least 1 and holds the chunks that there are ({shape[1]}); got {self.slots}."
            )
        if self.written is None:
            object.__setattr__(self, "written", torch.full_like(self.steps_since_last_write, shape[1]))

    @classmethod
    def empty(
        cls, batch: int, chunk_size: int, dim: int, *, like: Tensor, slots: int | None = None
    ) -> HierarchicalMemory:
        """Nothing remembered yet, in the dtype and on the device of ``like``."""
        if chunk_size < 1:
            raise OptionError(f"A chunk has at least one step, got chunk_size {chunk_size}.")
        return cls.of(like.new_zeros(batch, 0, dim), chunk_size, slots)

    @classmethod
    def of(cls, steps: Tensor, chunk_size: int, slots: int | None = None) -> HierarchicalMemory:
        """The memory of pasts ``(batch, length, D)``, as if written step by step into a growing table."""
        steps = steps.detach()
        batch, length, _ = steps.shape
        count = length // chunk_size
        contents = steps[:, : count * chunk_size].unflatten(1, (count, chunk_size))
        rest = steps[:, count * chunk_size :]
        clock = torch.full((batch,), rest.shape[1], device=steps.device)
        accumulator = F.pad(rest, (0, 0, 0, chunk_size - rest.shape[1]))
        return cls(contents.mean(2), contents, clock, accumulator, slots=slots)

    @property
    def count(self) -> Tensor:
        """``written``, as a tensor."""
        assert self.written is not None
        return self.written

    @property
    def visible(self) -> Tensor:
        """Which places of the table hold a chunk, ``(batch, M)``."""
        return torch.arange(self.keys.shape[1], device=self.keys.device) < self.count[:, None]

    def write(self, x: Tensor) -> HierarchicalMemory:
        """The memory after one step ``(batch, D)``, or after several ``(batch, length, D)``."""
        if x.dim() not in (2, 3) or (len(x), x.shape[-1]) != (len(self.keys), self.keys.shape[-1]):
            raise ShapeError(
                f"This memory takes steps ({len(self.keys)}, {self.keys.shape[-1]}) or ({len(self.keys)}, length, "
                f"{self.keys.shape[-1]}); got {tuple(x.shape)}."
            )
        if x.dim() == 2:
            return self._write_step(x.detach())
        memory = self
        for step in x.detach().unbind(1):
            memory = memory._write_step(step)
        return memory

    def reset(self, mask: Tensor) -> HierarchicalMemory:
        """Forget the pasts where ``mask (batch,)`` is True, as at the end of an episode."""
        if mask.shape != self.steps_since_last_write.shape or mask.dtype != torch.bool:
            raise ShapeError(f"reset takes a boolean mask ({len(self.keys)},); got {mask.dtype} {tuple(mask.shape)}.")
        return replace(
            self,
            steps_since_last_write=self.steps_since_last_write.masked_fill(mask, 0),
            written=self.count.masked_fill(mask, 0),
            keys=self.keys.masked_fill(mask[:, None, None], 0),
            contents=self.contents.masked_fill(mask[:, None, None, None], 0),
            accumulator=self.accumulator.masked_fill(mask[:, None, None], 0),
        )

    def _write_step(self, x: Tensor) -> HierarchicalMemory:
        chunk = self.accumulator.shape[1]
        here = F.one_hot(self.steps_since_last_write, chunk).bool()[..., None]
        accumulator = torch.where(here, x[:, None].to(self.keys.dtype), self.accumulator)
        clock = self.steps_since_last_write + 1
        full = clock == chunk
        if not bool(full.any()):
            return replace(self, steps_since_last_write=clock, accumulator=accumulator)
        keys, contents = self.keys, self.contents
        places = keys.shape[1]
        if places != self.slots and bool((full & (self.count == places)).any()):
            keys, contents = F.pad(keys, (0, 0, 0, 1)), F.pad(contents, (0, 0, 0, 0, 0, 1))
            places += 1
        at = F.one_hot(self.count % places, places).bool() & full[:, None]
        keys = torch.where(at[..., None], accumulator.mean(1, keepdim=True), keys)
        contents = torch.where(at[..., None, None], accumulator[:, None], contents)
        clock = clock.masked_fill(full, 0)
        return HierarchicalMemory(keys, contents, clock, accumulator, self.count + full, self.slots)


class HCAMProjections(nn.Module):
    """The maps of :func:`hcam_attention`: ``rank_query`` and ``rank_key`` score summaries; ``query``, ``key``,
    ``value`` and ``out`` are those of the attention inside chunks. Weights are drawn from a normal distribution that is
    cut at two deviations, with variance ``2 / inputs``; biases begin at zero."""

    def __init__(self, query_dim: int, memory_dim: int, dim: int) -> None:
        super().__init__()
        self.rank_query = nn.Linear(query_dim, dim, bias=False)
        self.rank_key = nn.Linear(memory_dim, dim, bias=False)
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(memory_dim, dim)
        self.value = nn.Linear(memory_dim, dim)
        self.out = nn.Linear(dim, dim)
        for layer in (self.rank_query, self.rank_key, self.query, self.key, self.value, self.out):
            # The cut leaves 0.8796 of a normal distribution's deviation.
            std = (2 / layer.in_features) ** 0.5 / 0.87962566103423978
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class HCAMRead(NamedTuple):
    """output ``(batch, queries, dim)``; chosen ``(batch, queries, top_k)``: places of chunks, best first, -1 where
    there was none to choose; weights: theirs, of sum 1 (0 where nothing was seen)."""

    output: Tensor
    chosen: Tensor
    weights: Tensor


def backward_codes(chunk_size: int, dim: int, *, like: Tensor) -> Tensor:
    """Sinusoids ``(chunk_size, dim)`` of ``chunk_size - 1, ..., 0``: first all sines, then all cosines."""
    if dim % 2:
        raise OptionError(f"Codes of steps need an even width, got {dim}; use position=False.")
    steps = torch.arange(chunk_size - 1, -1, -1, dtype=torch.float64, device=like.device)
    rates = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=like.device) / dim)
    angles = steps[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1).to(like.dtype)


def chunk_mask(length: int, chunk_size: int, episode: Tensor | None = None, slots: int | None = None) -> Tensor:
    """Which of the ``length // chunk_size`` chunks of a sequence each of its steps may read, ``(batch | 1, length,
    chunks)``: those that were finished before it, the last ``slots`` of them, and with ``episode (batch, length)`` (a
    number for each step) only chunks that lie in its own episode."""
    count = length // chunk_size
    device = None if episode is None else episode.device
    finished = torch.arange(length, device=device)[:, None] // chunk_size
    chunk = torch.arange(count, device=device)
    seen = (chunk < finished) if slots is None else (chunk < finished) & (chunk >= finished - slots)
    if episode is None:
        return seen[None]
    within = episode[:, : count * chunk_size].unflatten(1, (count, chunk_size))
    return seen & (within[:, None] == episode[:, :, None, None]).all(-1)


def hcam_attention(
    queries: Tensor,
    memory: HierarchicalMemory,
    projections: HCAMProjections,
    top_k: int,
    num_heads: int = 1,
    mask: Tensor | None = None,
    position: bool = True,
) -> HCAMRead:
    """Read from the ``top_k`` best chunks for each of ``queries (batch, Q, E)``.

    mask: boolean ``(batch | 1, Q, M)``, True where a query may read a chunk (causality, other episodes). position: add
    codes of the step to the contents.
    """
    batch, places, chunk, width = memory.contents.shape
    dim = projections.out.out_features
    if queries.dim() != 3 or len(queries) != batch:
        raise ShapeError(f"Queries are ({batch}, Q, E), one past each; got {tuple(queries.shape)}.")
    if top_k < 1 or dim % num_heads:
        raise OptionError(f"Need top_k >= 1 and num_heads that divide {dim}; got {top_k} and {num_heads}.")
    length = queries.shape[1]
    fits = mask is None or (mask.dtype == torch.bool and mask.shape in ((1, length, places), (batch, length, places)))
    if mask is not None and not fits:
        raise ShapeError(f"The mask is boolean ({batch}, {length}, {places}); got {mask.dtype} {tuple(mask.shape)}.")
    top_k, work = min(top_k, places), accumulation_dtype(queries.dtype)
    if not top_k:
        nothing = queries.new_zeros(batch, length, 0)
        return HCAMRead(queries.new_zeros(batch, length, dim), nothing.long(), nothing)
    visible = memory.visible[:, None].expand(-1, length, -1)
    visible = visible if mask is None else visible & mask
    asked, summaries = projections.rank_query(queries), projections.rank_key(memory.keys.detach())
    scores = asked.to(work) @ summaries.to(work).transpose(1, 2) * dim**-0.5
    chosen = scores.detach().masked_fill(~visible, float("-inf")).topk(top_k, -1).indices
    seen = visible.gather(2, chosen)
    weights = masked_softmax(scores.gather(2, chosen), seen)

    contents = memory.contents.detach()
    if position:
        contents = contents + backward_codes(chunk, width, like=contents)

    def taken(chunks: Tensor) -> Tensor:
        rows = chosen.flatten(1)[..., None].expand(-1, -1, chunk * chunks.shape[-1])
        return chunks.flatten(2).gather(1, rows).view(batch, length, top_k, chunk, -1)

    def projected(layer: nn.Linear) -> Tensor:
        # Whichever is fewer is projected: the chunks there are, or the chunks that are read.
        found: Tensor = taken(layer(contents)) if length * top_k >= places else layer(taken(contents))
        return found.to(work).unflatten(-1, (num_heads, -1))

    query = projections.query(queries).to(work).unflatten(-1, (num_heads, -1))
    logits = torch.einsum("bqhd,bqkchd->bqkhc", query, projected(projections.key)) * (dim // num_heads) ** -0.5
    # Chunks are mixed with their weights before the output map, which is linear.
    shares = logits.softmax(-1) * weights[..., None, None]
    mixed = torch.einsum("bqkhc,bqkchd->bqhd", shares, projected(projections.value)).flatten(2).to(queries.dtype)
    out = F.linear(mixed, projections.out.weight)
    out = out + projections.out.bias * seen.any(-1, keepdim=True)
    return HCAMRead(out, chosen.masked_fill(~seen, -1), weights.to(queries.dtype))


@register("hcam")
class HCAM(Layer):
    """Every step of a sequence reads the chunks that were finished before it, ``(batch, length, embed_dim)`` in and
    out.

    chunk_size: steps of a chunk. top_k: chunks read. position: codes of the step within a chunk. slots: the most chunks
    that are remembered. :meth:`step` gives the same numbers step by step, over a :class:`HierarchicalMemory`.
    """

    patterns = frozenset({"causal-self"})
    needs_training = True
    growth = "N^2 / C"
    true_gradient = False  # what is remembered carries no gradient

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        chunk_size: int = 32,
        top_k: int = 4,
        position: bool = True,
        slots: int | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or chunk_size < 1 or top_k < 1 or (slots is not None and slots < 1):
            raise OptionError(
                f"Need num_heads that divide embed_dim {embed_dim}, and chunk_size, top_k and slots of at least 1; got "
                f"{num_heads}, {chunk_size}, {top_k} and {slots}."
            )
        if position and embed_dim % 2:
            raise OptionError(f"Codes of steps need an even embed_dim, got {embed_dim}; use position=False.")
        self.embed_dim, self.num_heads, self.chunk_size, self.top_k = embed_dim, num_heads, chunk_size, top_k
        self.position, self.slots = position, slots
        self.projections = HCAMProjections(embed_dim, embed_dim, embed_dim)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, top_k={self.top_k}"

    def read(self, x: Tensor, memory: HierarchicalMemory, mask: Tensor | None = None) -> HCAMRead:
        """What steps ``x`` read of a memory, and from where."""
        return hcam_attention(x, memory, self.projections, self.top_k, self.num_heads, mask, self.position)

    def forward(self, x: Tensor, *, causal: bool = True, episode: Tensor | None = None) -> Tensor:
        """episode: numbers ``(batch, length)``; nothing is read across a change of episode."""
        if not causal:
            raise UnsupportedPatternError("A memory holds the past alone; HCAM has no form without causality.")
        seen = chunk_mask(x.shape[1], self.chunk_size, episode, self.slots).to(x.device)
        return self.read(x, HierarchicalMemory.of(x, self.chunk_size), seen).output

    def init_state(self, batch: int, *, like: Tensor) -> HierarchicalMemory:
        """The empty memory."""
        return HierarchicalMemory.empty(batch, self.chunk_size, self.embed_dim, like=like, slots=self.slots)

    def step(self, x: Tensor, state: HierarchicalMemory) -> tuple[Tensor, HierarchicalMemory]:
        """The next steps ``(batch, length, embed_dim)``: each reads, then is written."""
        outs = []
        for token in x.split(1, 1):
            outs.append(self.read(token, state).output)
            state = state.write(token[:, 0])
        return torch.cat(outs, 1), state


class HCAMBlock(nn.Module):
    """``x + hcam(norm(x))``, then ``x + mlp(norm(x))``; options as in :class:`HCAM`. What is remembered is the normed
    input of the block."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        chunk_size: int = 32,
        top_k: int = 4,
        position: bool = True,
        slots: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.memory_norm, self.mlp_norm = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.memory = HCAM(embed_dim, num_heads, chunk_size, top_k, position, slots)
        self.mlp = Mlp(embed_dim, mlp_ratio)

    def forward(self, x: Tensor, *, episode: Tensor | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out; episode as in :meth:`HCAM.forward`."""
        return self._feed(x + self.memory(self.memory_norm(x), episode=episode))

    def step(self, x: Tensor, state: HierarchicalMemory) -> tuple[Tensor, HierarchicalMemory]:
        """The same for the next steps, over ``memory.init_state``."""
        read, state = self.memory.step(self.memory_norm(x), state)
        return self._feed(x + read), state

    def _feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.mlp(self.mlp_norm(x))
        return x + fed
