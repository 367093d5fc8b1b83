"""Attention heads that look where a pattern says: fixed or restricted heads, adapters of them, and a small encoder.

Li, Xiao, Xing, Wang, Murray, Carenini, "Human Guided Exploitation of Interpretable Attention Patterns in Summarization
and Topic Segmentation", 2022, arXiv 2112.05364. Patterns are maps ``P`` of :mod:`regard.layers.token_patterns`.

- A *fixed* head has weights ``rownorm(P)``, uniform in rows where ``P`` is empty: values and output projection are
  learnt, queries and keys are gone (``2 d d_h`` weights fewer). Its weights take ``O(nnz(P) d_h)`` to apply; maps are
  dense here, so that it is ``O(N^2 d_h)``, half of what a learnt head takes.
- A *masked* head has softmax over the keys in ``P``, over all keys in empty rows, as the released code has it for
  matching tokens and sentences.
- An adapter adds ``W_up concat_h(A_h W_down x V_h)`` beside a model's attention, in a few narrow pattern heads
  (projected attention layers: Stickland, Murray, 2019, arXiv 1902.02671). ``W_up`` starts at zero.

Released adapters apply GELU to what is added, and stand beside the feed-forward part; here they are as written above.
Shapes: ``x`` ``(batch, length, embed_dim)``; maps ``(batch, patterns, length, length)``, one for each patterned head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.heads import head_sizes
from regard.layers.token_patterns import Predicate, pattern_maps, row_normalised, segments_from_markers
from regard.nn import TransformerBlock

__all__ = ["FixedPatternHead", "HeadPattern", "PatternAdapter", "PatternAttention", "PatternEncoder", "PatternHeads"]

Mode = Literal["fixed", "masked"]


@dataclass(frozen=True)
class HeadPattern:
    """Where one head looks. ``mode``: ``"fixed"`` weights, or softmax ``"masked"`` by the pattern."""

    predicate: Predicate
    mode: Mode = "fixed"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise OptionError(f"mode is 'fixed' or 'masked', got {self.mode!r}.")


class FixedPatternHead(nn.Module):
    """One head with the weights of its pattern: ``x``, tokens and segments to ``(batch, length, embed_dim)``.

    Only value and output projection are learnt. :meth:`weights` tells which rows had no target.
    """

    def __init__(self, pattern: Predicate, embed_dim: int, head_dim: int | None = None) -> None:
        super().__init__()
        self.pattern = pattern
        self.value = nn.Linear(embed_dim, head_dim or embed_dim, bias=False)
        self.out = nn.Linear(head_dim or embed_dim, embed_dim, bias=False)

    def weights(self, tokens: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights ``(batch, length, length)``, uniform in rows without a target, and those rows ``(batch, length)``."""
        visible = None if segments is None else (segments >= 0)[:, None]
        return _fixed(self.pattern(tokens, segments), self.value.weight.dtype, visible)

    def forward(self, x: Tensor, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.out(self.weights(tokens, segments)[0] @ self.value(x)))


def _fixed(pattern: Tensor, dtype: torch.dtype, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of the pattern over their sums, and where they are empty the same weight for every key that is visible,
    ``(batch, 1 | length, length)``."""
    seen = torch.ones_like(pattern, dtype=torch.bool) if visible is None else visible
    weights, empty = row_normalised(pattern * seen, dtype)
    even = seen.to(dtype) / seen.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(empty[..., None], even, weights.to(dtype)), empty


class PatternHeads(nn.Module):
    """Heads side by side, ``(batch, length, embed_dim)`` to ``(batch, length, num_heads * head_dim)``, before any
    output projection: first those with a pattern, then learnt ones."""

    def __init__(
        self, embed_dim: int, num_heads: int, patterns: Sequence[HeadPattern] = (), head_dim: int | None = None
    ) -> None:
        super().__init__()
        if len(patterns) > num_heads:
            raise OptionError(f"There are {len(patterns)} patterns for {num_heads} heads; each takes one head.")
        self.num_heads, self.patterns = num_heads, tuple(patterns)
        self.head_dim = head_sizes(embed_dim, num_heads, head_dim=head_dim)[1]
        self.fixed = [at for at, pattern in enumerate(patterns) if pattern.mode == "fixed"]
        self.scored = [at for at in range(num_heads) if at not in self.fixed]
        width = len(self.scored) * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=False) if self.scored else None
        self.key = nn.Linear(embed_dim, width, bias=False) if self.scored else None
        self.value = nn.Linear(embed_dim, num_heads * self.head_dim, bias=False)

    def weights(self, x: Tensor, maps: Tensor, visible: Tensor | None = None) -> Tensor:
        """``(batch, num_heads, length, length)``. visible: the keys that there are ``(batch, length)``, False at
        padding, or ``(batch | 1, length, length)`` where queries do not see all of them, as in a causal model."""
        if maps.shape != (len(x), len(self.patterns), x.shape[1], x.shape[1]):
            raise ShapeError(
                f"maps are (batch, patterns, length, length) = {(len(x), len(self.patterns), x.shape[1], x.shape[1])} "
                f"here, got {tuple(maps.shape)}; pattern_maps makes them."
            )
        seen = visible[:, None] if visible is not None and visible.dim() == 2 else visible
        found: dict[int, Tensor] = {at: _fixed(maps[:, at], x.dtype, seen)[0] for at in self.fixed}
        if self.query is not None and self.key is not None:
            query, key = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.query, self.key))
            logits = query @ key.mT * self.head_dim**-0.5
            if seen is not None:
                logits = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min)
            for place, at in enumerate(self.scored):
                scores = logits[:, place]
                if at < len(self.patterns):
                    inside = maps[:, at] > 0 if seen is None else (maps[:, at] > 0) & seen
                    inside = inside | ~inside.any(-1, keepdim=True)
                    scores = scores.masked_fill(~inside, -torch.inf)
                found[at] = scores.softmax(-1)
        return torch.stack([found[at] for at in range(self.num_heads)], 1)

    def forward(self, x: Tensor, maps: Tensor, visible: Tensor | None = None) -> Tensor:
        value = self.value(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return (self.weights(x, maps, visible) @ value).transpose(1, 2).flatten(2)


class PatternAttention(nn.Module):
    """Self-attention of :class:`PatternHeads` with an output projection, for a transformer block."""

    def __init__(self, embed_dim: int, num_heads: int, patterns: Sequence[HeadPattern] = ()) -> None:
        super().__init__()
        self.heads = PatternHeads(embed_dim, num_heads, patterns)
        self.out = nn.Linear(num_heads * self.heads.head_dim, embed_dim)

    def forward(self, x: Tensor, maps: Tensor, visible: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.out(self.heads(x, maps, visible)))


class PatternAdapter(nn.Module):
    """What pattern heads of ``width`` channels add beside a model's attention: ``(batch, length, embed_dim)`` in and
    out, zeros before training. Heads beyond the patterns are learnt."""

    def __init__(
        self, embed_dim: int, num_heads: int = 4, patterns: Sequence[HeadPattern] = (), width: int | None = None
    ) -> None:
        super().__init__()
        width = max(embed_dim // 4 // num_heads, 1) * num_heads if width is None else width
        self.down = nn.Linear(embed_dim, width, bias=False)
        self.heads = PatternHeads(width, num_heads, patterns)
        self.up = nn.Linear(width, embed_dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, maps: Tensor, visible: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.up(self.heads(self.down(x), maps, visible)))


class PatternEncoder(nn.Module):
    """Documents ``(batch, length)`` of token numbers to logits ``(batch, length, num_classes)``, in pre-norm blocks
    whose first heads have patterns; every sentence begins with ``marker``. patterns: none makes it a plain encoder."""

    def __init__(
        self,
        vocab_size: int,
        num_classes: int = 2,
        *,
        marker: int = 0,
        patterns: Sequence[HeadPattern] = (),
        embed_dim: int = 48,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        self.marker, self.patterns = marker, tuple(patterns)
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.positions = nn.Embedding(max_length, embed_dim)
        # Both of one size, as in BERT: heads that are learnt find sentences by positions alone.
        self.embed_norm = nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, PatternAttention(embed_dim, num_heads, patterns), mlp_ratio)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.positions.num_embeddings:
            raise ShapeError(f"{tokens.shape[1]} tokens exceed max_length {self.positions.num_embeddings}.")
        segments = segments_from_markers(tokens, self.marker)
        maps = pattern_maps([pattern.predicate for pattern in self.patterns], tokens, segments)
        hidden = self.embed_norm(self.embed(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            hidden = block(hidden, maps=maps)
        return cast(Tensor, self.head(self.norm(hidden)))
