"""Concept-centric heads: a classifier that says which concepts it saw, and whose logits are sums over concepts.

Hong, Park & Pavlic, "Concept-Centric Transformers: Enhancing Model Interpretability through Object-Centric Concept
Learning within a Shared Global Workspace", 2023, arXiv 2305.15775, with the released code where it says more; its
classifier is that of Rigotti et al., "Attention-based Interpretability with Concept Transformers", 2022.

    c_k = slot_k(tokens) + p_k                      slot attention on the image's own tokens; p_k, learned, gives a
                                                    concept its identity (free concepts: c_k is a parameter)
    a = softmax(W_q x . W_k c / sqrt(d_h))          per head; tokens x ask concepts c
    logits = W_o [sum_k a_hk W_v c_k]_h + b         no layer between the read and the classes, hence
           = b + sum_k sum_h a_hk (W_o^h W_v^h c_k) every concept has its own share of every class logit

The global stream asks with the class token (without one: with tokens pooled by a learned softmax), the spatial stream
with every patch and averages the logits; logits of the streams are added. Training adds to the cross entropy
``explanation_loss`` (weight 1 on CUB) and ``0.5 sparsity_loss``. CUB: 13 global, 95 spatial concepts.

As released, global slots are built from the class token alone: normalised over one token every slot gets the same
update and differs by its start and position only. Here they read the patches; ``global_from="query"`` is the released
way. Shapes: tokens ``(batch, [1 +] N, dim)``, logits ``(batch, num_classes)``, attention over concepts ``(batch,
queries, concepts)``, a mean over heads whose rows sum to 1. Cost O(N K d + K d^2) for K concepts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_weights
from regard.kernels.shapes import accumulation_dtype
from regard.layers.heads import head_sizes
from regard.layers.maps import merge_heads, split_heads
from regard.layers.slot_attention import SlotAttention, SlotVariant

__all__ = [
    "ConceptCentricHead",
    "ConceptContributions",
    "ConceptCrossAttention",
    "ConceptReading",
    "concept_contributions",
    "explanation_loss",
    "sparsity_loss",
]

Concepts = Literal["slots", "free"]
Source = Literal["patches", "query"]


class ConceptReading(NamedTuple):
    """What a head says of a batch: ``logits (batch, num_classes)``, and the attention of its streams over concepts,
    ``global_attn (batch, 1, n_global)`` and ``spatial_attn (batch, N, n_spatial)``; None for a stream it has not."""

    logits: Tensor
    global_attn: Tensor | None
    spatial_attn: Tensor | None


class ConceptContributions(NamedTuple):
    """Shares in logits: ``bias (num_classes,)``, ``global_ (batch, n_global, num_classes)`` and ``spatial (batch,
    n_spatial, num_classes)``. Their sum over concepts is the logits."""

    bias: Tensor
    global_: Tensor
    spatial: Tensor

    def logits(self) -> Tensor:
        """The sum of all shares ``(batch, num_classes)``."""
        return self.bias + self.global_.sum(1) + self.spatial.sum(1)

    def without(self, concepts: Tensor) -> Tensor:
        """Logits when concepts are deleted: boolean ``(batch, n_global + n_spatial)``, global ones first."""
        parts = torch.cat((self.global_, self.spatial), 1)
        if concepts.shape != parts.shape[:2] or concepts.dtype != torch.bool:
            raise ShapeError(
                f"Deleted concepts are a boolean tensor {tuple(parts.shape[:2])}, True for each that goes; "
                f"got {concepts.dtype}, {tuple(concepts.shape)}."
            )
        return self.bias + parts.masked_fill(concepts[..., None], 0).sum(1)


class ConceptCrossAttention(nn.Module):
    """Queries ``(batch, Nx, dim)`` ask concepts ``(batch, K, dim)``; heads are projected straight to class logits
    ``(batch, Nx, num_classes)``. Also gives the attention ``(batch, num_heads, Nx, K)`` (before dropout)."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_heads: int = 8,
        *,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        head_sizes(dim, num_heads)
        if num_classes < 1:
            raise OptionError(f"A classifier has at least one class, got {num_classes}.")
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, num_classes)
        self.dropout = nn.Dropout(projection_dropout)

    def attention(self, x: Tensor, concepts: Tensor) -> Tensor:
        """The attention ``(batch, num_heads, Nx, K)``."""
        (query,), (key,) = split_heads(self.query(x), self.num_heads), split_heads(self.key(concepts), self.num_heads)
        return dense_weights(query, key)

    def forward(self, x: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention."""
        if x.dim() != 3 or concepts.dim() != 3 or (len(x), x.shape[2]) != (len(concepts), concepts.shape[2]):
            raise ShapeError(
                f"Queries (batch, Nx, dim) ask concepts (batch, K, dim); got {tuple(x.shape)} and "
                f"{tuple(concepts.shape)}."
            )
        attn = self.attention(x, concepts)
        (value,) = split_heads(self.value(concepts), self.num_heads)
        read = F.dropout(attn, self.attention_dropout, self.training) @ value
        return self.dropout(self.out(merge_heads(read))), attn

    def votes(self, concepts: Tensor) -> Tensor:
        """What each concept adds to the logits where all of a head's attention is on it: ``(batch, num_heads, K,
        num_classes)``, the products ``W_o^h W_v^h c_k``."""
        (value,) = split_heads(self.value(concepts), self.num_heads)
        return torch.einsum("bhkd,chd->bhkc", value, self.out.weight.unflatten(1, (self.num_heads, -1)))


class ConceptCentricHead(nn.Module):
    """A classifier in place of a backbone's linear one: ``head(tokens)`` gives logits, ``head.read(tokens)`` the
    attention over concepts as well.

    n_global, n_spatial: concepts of the streams, 0 for none. concepts: ``"slots"`` of the image's tokens, or ``"free"``
    parameters (the concept transformer). variant, iters: of :class:`SlotAttention`. class_token: tokens begin with one.
    global_from: what global slots read, ``"patches"`` or, as released, the ``"query"`` of their stream.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_heads: int = 8,
        *,
        n_global: int = 10,
        n_spatial: int = 0,
        concepts: Concepts = "slots",
        variant: SlotVariant = "qsa",
        iters: int = 1,
        class_token: bool = True,
        global_from: Source = "patches",
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(n_global, n_spatial) < 0 or n_global + n_spatial == 0:
            raise OptionError(f"Give at least one stream concepts; got n_global {n_global}, n_spatial {n_spatial}.")
        if concepts not in get_args(Concepts) or global_from not in get_args(Source):
            raise OptionError(
                f"concepts is one of {', '.join(get_args(Concepts))} and global_from one of "
                f"{', '.join(get_args(Source))}; got {concepts!r} and {global_from!r}."
            )
        self.dim, self.class_token, self.global_from = dim, class_token, global_from
        self.pool = nn.Linear(dim, 1) if n_global and not class_token else None

        def stream(count: int) -> _Stream | None:
            source = SlotAttention(count, dim, iters, variant) if count and concepts == "slots" else None
            cross = ConceptCrossAttention(
                dim,
                num_classes,
                num_heads,
                attention_dropout=attention_dropout,
                projection_dropout=projection_dropout,
            )
            return _Stream(count, cross, source) if count else None

        self.global_stream, self.spatial_stream = stream(n_global), stream(n_spatial)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits. ``mask (batch, N)``: True for real patches (the class token not counted)."""
        return self.read(x, mask=mask).logits

    def read(
        self, x: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> ConceptReading:
        """Logits and attention. ``generator`` draws the slots of variant ``sa``."""
        query, patches = self._split(x, mask)
        total, attentions = x.new_zeros(()), []
        for stream, asks, sees, real in self._streams(query, patches, mask):
            logits, attn = stream.cross(asks, stream.concepts_of(sees, real, generator))
            total = total + _mean(logits, mask if asks is patches else None)
            attentions.append((asks is patches, attn.mean(1)))
        found = dict(attentions)
        return ConceptReading(total, found.get(False), found.get(True))

    def _split(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The global query ``(batch, 1, dim)`` and the patches."""
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] <= self.class_token:
            begin = "a class token and " if self.class_token else ""
            raise ShapeError(f"The head reads {begin}patches (batch, tokens, {self.dim}); got {tuple(x.shape)}.")
        patches = x[:, 1:] if self.class_token else x
        if mask is not None and (mask.shape != patches.shape[:2] or mask.dtype != torch.bool):
            raise ShapeError(
                f"mask is boolean of shape {tuple(patches.shape[:2])}; got {mask.dtype}, {tuple(mask.shape)}."
            )
        if mask is not None and not bool(mask.any(1).all()):
            raise ShapeError("mask hides all patches of an image, so there is nothing to see; leave that image out.")
        if self.pool is None:
            return x[:, :1], patches
        scores = self.pool(patches)[..., 0]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)[:, None] @ patches, patches

    def _streams(
        self, query: Tensor, patches: Tensor, mask: Tensor | None
    ) -> list[tuple[_Stream, Tensor, Tensor, Tensor | None]]:
        """Each stream with what asks, what its slots read, and which of that is real."""
        found: list[tuple[_Stream, Tensor, Tensor, Tensor | None]] = []
        if self.global_stream is not None:
            seen = (patches, mask) if self.global_from == "patches" else (query, None)
            found.append((self.global_stream, query, *seen))
        if self.spatial_stream is not None:
            found.append((self.spatial_stream, patches, patches, mask))
        return found


class _Stream(nn.Module):
    """Concepts and who asks them."""

    def __init__(self, count: int, cross: ConceptCrossAttention, slots: SlotAttention | None) -> None:
        super().__init__()
        self.cross, self.slots, dim = cross, slots, cross.query.in_features
        # Of slots their positions; else the concepts themselves.
        self.positions = nn.Parameter(torch.zeros(count, dim))
        if slots is None:
            nn.init.trunc_normal_(self.positions, std=dim**-0.5)

    def concepts_of(self, x: Tensor, mask: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """The concepts ``(batch, count, dim)`` of tokens ``x``."""
        if self.slots is None:
            return self.positions.expand(len(x), -1, -1)
        return self.slots(x, mask=mask, generator=generator)[0] + self.positions


def concept_contributions(
    head: ConceptCentricHead, x: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> ConceptContributions:
    """What each concept adds to each class logit of ``head(x)``, exactly, without dropout.

    A concept's share is its attention times its vote, summed over heads (and in the spatial stream averaged over
    patches). ``generator``: for variant ``sa``, whose slots are drawn; one in the same state gives the same logits.
    """
    query, patches = head._split(x, mask)
    streams = head._streams(query, patches, mask)
    classes = streams[0][0].cross.out.out_features
    bias = torch.stack([stream.cross.out.bias for stream, *_ in streams]).sum(0)
    parts = {spatial: x.new_zeros(len(x), 0, classes) for spatial in (False, True)}
    for stream, asks, sees, real in streams:
        concepts = stream.concepts_of(sees, real, generator)
        attn = stream.cross.attention(asks, concepts)
        mean = _mean(attn.transpose(1, 2), mask if asks is patches else None)
        parts[asks is patches] = torch.einsum("bhk,bhkc->bkc", mean, stream.cross.votes(concepts))
    return ConceptContributions(bias, parts[False], parts[True])


def explanation_loss(attn: Tensor, target: Tensor) -> Tensor:
    """How far attention over concepts is from what a person annotated: ``K`` times the mean square of ``attn - target /
    sum(target)``. Range 0 to 2.

    attn: ``(batch, queries, K)``. target: at least 0, the same shape, or ``(batch, K)`` where there is one query. Rows
    with a NaN, and rows without any concept, are not annotated and ignored; 0 if all are.
    """
    if target.dim() == attn.dim() - 1:
        target = target.unsqueeze(-2)
    if target.shape != attn.shape:
        raise ShapeError(f"Targets have the attention's shape {tuple(attn.shape)}; got {tuple(target.shape)}.")
    if bool((target < 0).any()):
        raise OptionError("Targets are at least 0: which concepts are there, NaN where that is not known.")
    whole = target.sum(-1)
    known = whole > 0  # False for NaN
    if not bool(known.any()):
        return attn.sum() * 0
    work = accumulation_dtype(attn.dtype)
    wanted = (target[known] / whole[known][..., None]).to(work)
    return attn.shape[-1] * F.mse_loss(attn[known].to(work), wanted)


def sparsity_loss(*attn: Tensor | None) -> Tensor:
    """Entropy of attention over concepts: the mean of ``-a log(a + 1e-8)`` over all entries, added over streams; None
    counts nothing. Each stream's part is between 0 (one concept a row) and ``log(K) / K`` (all alike)."""
    # In half precision 1e-8 is nothing, and the logarithm of 0 infinite.
    wide = [a.to(accumulation_dtype(a.dtype)) for a in attn if a is not None]
    parts = [-(a * (a + 1e-8).log()).mean() for a in wide]
    if not parts:
        raise ShapeError("Give the attention of at least one stream.")
    return torch.stack(parts).sum()


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the second axis, of real entries only."""
    if mask is None:
        return x.mean(1)
    share = mask.to(x.dtype) / mask.sum(1, keepdim=True)
    return torch.einsum("bn,bn...->b...", share, x)
