"""Mixture of sparse attention: each head picks the tokens that it works on, as an expert picks its inputs.

A head scores all tokens, ``r = sigmoid(x w)``, and takes the ``k = max(N // sparsity, 2)`` of largest score, I. It
forms queries, keys and values for these alone, by its own matrices; rotary positions, on a part of its channels, are
those of the tokens in the sequence; token I_a sees I_b if ``I_a >= I_b``; and

    y[I_a] += r[I_a] softmax(q_a k^T / sqrt(head_dim)) v W_o        (other tokens get nothing from this head)

The factor r is how the router learns: the choice has no gradient. A head costs ``8 D d k + 4 d k^2 + 2 D N + d k``
operations (D of the model, d of the head) against ``8 D d N + 4 d N^2`` of a dense one, and k keys and values instead
of N, so many more heads fit the same budget (:func:`iso_flop_heads`). As some tokens may be picked by no head, the
paper keeps four dense heads beside them, or local ones in long sequences.

Piękos, Csordás, Schmidhuber, "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice
Routing", 2025, arXiv 2505.00315, sections 2 and 3. ``(batch, length, embed_dim)`` in and out, always causal.

What a head picks depends on the whole sequence, later tokens included: values never leak, membership does, and no token
can be decoded before the last is known. ``causal_router=True`` picks the tokens whose score exceeds a threshold of the
head, the running mean over training batches of the score that would have picked k; this is strictly causal, and can
decode. The threshold is kept up to date in either mode, and the attribute may be set at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from regard.cache import EvictingCache
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import accumulation_dtype, dense_attention
from regard.layers.maps import merge_heads, split_heads
from regard.layers.padding import layer_keys
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, KeyPadding, Mask
from regard.mechanism import Layer, Mechanism, Pattern
from regard.registry import create, register

__all__ = [
    "MoSA",
    "MoSAHeads",
    "MoSAState",
    "chosen_tokens",
    "expert_choice",
    "head_flops",
    "iso_flop_heads",
    "kv_entries",
]


def chosen_tokens(length: int, sparsity: float) -> int:
    """How many tokens a head takes: ``length // sparsity``, at least two (to see one another), at most all."""
    return min(max(int(length // sparsity), 2), length)


def head_flops(length: int, embed_dim: int, head_dim: int, sparsity: float | None = None) -> int:
    """Operations of one head, the paper's count: dense, or with a sparsity that of a MoSA head."""
    k = length if sparsity is None else chosen_tokens(length, sparsity)
    routing = 0 if sparsity is None else 2 * embed_dim * length + head_dim * k
    return 8 * embed_dim * head_dim * k + 4 * head_dim * k * k + routing


def iso_flop_heads(
    dense_heads: int, length: int, sparsity: float, keep_dense: int, *, embed_dim: int, head_dim: int
) -> int:
    """How many MoSA heads cost no more than the dense heads that go when ``keep_dense`` of ``dense_heads`` stay."""
    if not 0 <= keep_dense <= dense_heads or sparsity < 1 or length < 1:
        raise OptionError(
            f"Need 0 <= keep_dense <= dense_heads, sparsity >= 1 and length >= 1; got {keep_dense}, {dense_heads}, "
            f"{sparsity}, {length}."
        )
    freed = (dense_heads - keep_dense) * head_flops(length, embed_dim, head_dim)
    return freed // head_flops(length, embed_dim, head_dim, sparsity)


def kv_entries(length: int, dense_heads: int, mosa_heads: int, sparsity: float) -> int:
    """Key-value pairs that a layer keeps for a sequence."""
    return length * dense_heads + chosen_tokens(length, sparsity) * mosa_heads


def expert_choice(scores: Tensor, k: int | Tensor, include_first: bool = False) -> tuple[Tensor, Tensor]:
    """The ``k`` tokens of largest score of each head: ``scores (batch, length, heads)`` to values and indices ``(batch,
    heads, k)``, in the order of the sequence.

    k: one number, or one for each sequence ``(batch,)``. include_first: token 0 is among them whatever its score. A
    token of score ``-inf`` is never taken; places left over stand last, with value ``-inf`` and index 0.
    """
    if scores.dim() != 3:
        raise ShapeError(f"expert_choice takes scores (batch, length, heads), got {tuple(scores.shape)}.")
    length, most = scores.shape[1], int(k.max()) if isinstance(k, Tensor) else k
    if not 1 <= most <= length:
        raise OptionError(f"Of {length} tokens between 1 and {length} can be chosen, not {most}.")
    ranked = scores.transpose(1, 2)
    if include_first:
        forced = ranked[..., :1].masked_fill(ranked[..., :1] > float("-inf"), float("inf"))
        ranked = torch.cat((forced, ranked[..., 1:]), -1)
    best = ranked.detach().topk(most, -1)
    taken = best.values > float("-inf")
    if isinstance(k, Tensor):
        taken = taken & (torch.arange(most, device=scores.device) < k[:, None, None].to(scores.device))
    return _in_order(scores.transpose(1, 2), best.indices, taken)


def _in_order(scores: Tensor, indices: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that are taken in the order of the sequence, places left over last."""
    places = torch.where(taken, indices, scores.shape[-1]).sort(-1).values
    left_over = places == scores.shape[-1]
    places = places.masked_fill(left_over, 0)
    return scores.gather(-1, places).masked_fill(left_over, float("-inf")), places


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first channels, as many as there are angles."""
    width = cos.shape[-1]
    return torch.cat((apply_rotary(x[..., :width], cos, sin), x[..., width:]), -1) if width else x


def _rotary_width(head_dim: int, fraction: float) -> int:
    if not 0 <= fraction <= 1:
        raise OptionError(f"rotate_fraction is a share of the head's channels between 0 and 1, got {fraction}.")
    return int(fraction * head_dim) // 2 * 2


class MoSAHeads(nn.Module):
    """The sparse heads alone: ``(batch, length, embed_dim)`` in and out, zeros for tokens that no head picks.

    sparsity: a head takes one token in so many. include_first: token 0 always, as in the paper's main comparison.
    rotate_fraction: channels of a head with rotary positions. causal_router: see the module; decay: of the running
    thresholds.
    """

    threshold: Tensor
    updates: Tensor

    def __init__(
        self,
        embed_dim: int,
        head_dim: int,
        num_heads: int,
        sparsity: float,
        include_first: bool = False,
        rotate_fraction: float = 0.5,
        *,
        causal_router: bool = False,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if min(embed_dim, head_dim, num_heads) < 1 or sparsity < 1 or not 0 <= decay < 1:
            raise OptionError(
                "Need embed_dim, head_dim, num_heads and sparsity of at least 1 and 0 <= decay < 1; got "
                f"{embed_dim}, {head_dim}, {num_heads}, {sparsity} and {decay}."
            )
        self.embed_dim, self.head_dim, self.num_heads = embed_dim, head_dim, num_heads
        self.sparsity, self.include_first, self.causal_router, self.decay = (
            sparsity,
            include_first,
            causal_router,
            decay,
        )
        self.rotary_width = _rotary_width(head_dim, rotate_fraction)
        self.router = nn.Linear(embed_dim, num_heads, bias=False)
        self.qkv = nn.Parameter(torch.empty(num_heads, embed_dim, 3 * head_dim))
        self.out = nn.Parameter(torch.empty(num_heads, head_dim, embed_dim))
        nn.init.uniform_(self.qkv, -1 / math.sqrt(3 * head_dim), 1 / math.sqrt(3 * head_dim))
        nn.init.uniform_(self.out, -1 / math.sqrt(embed_dim * num_heads), 1 / math.sqrt(embed_dim * num_heads))
        # A bound on logits: far from zero the sigmoids of different logits round to one number, which orders nothing.
        self.register_buffer("threshold", torch.zeros(num_heads))
        self.register_buffer("updates", torch.zeros(()))

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}, sparsity={self.sparsity}"

    def choose(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and indices ``(batch, heads, k)`` of the tokens that each head takes, in the order of the sequence;
        logits are ``-inf`` in places left over. keys ``(batch | 1, length)``: tokens that may be taken."""
        logits = self.router(x)
        if keys is not None:
            logits = logits.masked_fill(~keys[..., None], float("-inf"))
        k: int | Tensor = chosen_tokens(x.shape[1], self.sparsity)
        if keys is not None:
            real = keys.sum(-1).expand(len(x))
            k = (real // self.sparsity).long().clamp_min(2).minimum(real.clamp_min(1))
        chosen = self._above(logits) if self.causal_router else expert_choice(logits, k, self.include_first)
        if self.training:
            self._follow(logits.detach(), int(k.sum()) if isinstance(k, Tensor) else k * len(x))
        return chosen

    def _above(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`expert_choice`, of the tokens above the threshold."""
        kept = self._exceeds(logits)
        if self.include_first:
            kept[:, :, 0] = logits[:, 0] > float("-inf")
        most = max(int(kept.sum(-1).max()), 1)
        indices = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        return _in_order(logits.transpose(1, 2), indices, kept.gather(-1, indices))

    def _exceeds(self, logits: Tensor) -> Tensor:
        """``(batch, length, heads)`` to boolean ``(batch, heads, length)``."""
        return (logits > self.threshold.to(logits.dtype)).transpose(1, 2)

    @torch.no_grad()
    def _follow(self, logits: Tensor, count: int) -> None:
        """Move the thresholds towards the logit that ``count`` tokens of this batch exceed."""
        ordered = logits.flatten(0, 1).sort(dim=0, descending=True).values.to(self.threshold.dtype)
        last, next_best = ordered[count - 1], ordered[min(count, len(ordered) - 1)]
        middle = torch.where(next_best > float("-inf"), (last + next_best) / 2, last - 1)
        if bool(middle.isfinite().all()):
            self.updates += 1
            # At first a plain mean, so that the arbitrary start is forgotten at once.
            self.threshold.lerp_(middle, (1 / self.updates).clamp_min(1 - self.decay))

    def attend(self, x: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
        """The heads on tokens that were chosen; arguments as :meth:`choose` gives them."""
        batch, length, _ = x.shape
        flat = (indices + torch.arange(batch, device=x.device)[:, None, None] * length).transpose(0, 1)
        tokens = x.reshape(-1, self.embed_dim).index_select(0, flat.flatten()).view(self.num_heads, -1, self.embed_dim)
        query, key, value = self._per_sequence(tokens @ self.qkv, batch).chunk(3, -1)
        cos, sin = rotary_angles(length, self.rotary_width, device=x.device, dtype=x.dtype)
        cos, sin = cos[indices], sin[indices]
        there = logits > float("-inf")
        mask = None if bool(there.all()) else Boolean(there[:, :, None])
        heads = dense_attention(_rotated(query, cos, sin), _rotated(key, cos, sin), value, causal=True, mask=mask)
        gated = (heads * logits.sigmoid().to(heads.dtype)[..., None]).transpose(0, 1).flatten(1, 2)
        parts = (gated @ self.out).flatten(0, 1).to(accumulation_dtype(x.dtype))
        total = parts.new_zeros(batch * length, self.embed_dim).index_add(0, flat.flatten(), parts)
        return total.view(batch, length, -1).to(x.dtype)

    def _per_sequence(self, tokens: Tensor, batch: int) -> Tensor:
        """``(heads, batch * k, dim)`` to ``(batch, heads, k, dim)``."""
        return tokens.unflatten(1, (batch, -1)).transpose(0, 1)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """keys: boolean ``(batch | 1, length)``, tokens that count."""
        return self.attend(x, *self.choose(x, keys))

    def step(self, x: Tensor, cache: EvictingCache) -> Tensor:
        """The outputs of the next tokens ``(batch, new, embed_dim)``. The cache, changed in place, keeps for each head
        the tokens that it took."""
        start, new = cache.seen, x.shape[1]
        logits = self.router(x).transpose(1, 2)
        kept = self._exceeds(logits.transpose(1, 2))
        if self.include_first and not start:
            kept[:, :, 0] = True
        # Only heads that take any of these tokens compute anything.
        used = kept.any(2).any(0).nonzero()[:, 0]
        query, key, value = (x[:, None] @ self.qkv[used]).chunk(3, -1)
        cos, sin = rotary_angles(new, self.rotary_width, start=start, device=x.device, dtype=x.dtype)
        blank = x.new_zeros(len(x), self.num_heads, new, self.head_dim)
        old = 0 if not start else cache.read().key.shape[2]
        cache.append(blank.index_copy(1, used, _rotated(key, cos, sin)), blank.index_copy(1, used, value))
        cache.retain(torch.cat((kept.new_ones(*kept.shape[:2], old), kept), -1))
        if not len(used):
            return torch.zeros_like(x)
        held = cache.read()
        seen = held.visible(cache.seen, new, self.num_heads).tensor.expand(-1, self.num_heads, -1, -1)[:, used]
        heads = dense_attention(_rotated(query, cos, sin), held.key[:, used], held.value[:, used], mask=Boolean(seen))
        gates = (logits.sigmoid() * kept)[:, used, :, None].to(heads.dtype)
        return ((heads * gates) @ self.out[used]).sum(1)


@dataclass
class MoSAState:
    """Decoding state: what the sparse heads keep (none: no such heads), and the state of the others."""

    sparse: EvictingCache
    other: Any
    seen: int = 0


@register("mosa")
class MoSA(Layer):
    """Sparse heads beside ordinary ones, in place of ``num_heads`` dense heads.

    head_dim: by default ``embed_dim / num_heads``. other_heads: how many ordinary heads stay (default: half; the paper
    keeps 4 of 9). mosa_heads: by default ``sparsity`` for each dense head that goes, which costs about as much; see
    :func:`iso_flop_heads`. other: ``"dense"`` or ``"local"``; window: tokens that a local head sees (default: as many
    as a sparse head takes). The other options as in :class:`MoSAHeads`.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    needs_training = True
    growth = "N^2"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        mosa_heads: int | None = None,
        other_heads: int | None = None,
        sparsity: float = 8,
        *,
        other: Literal["dense", "local"] = "dense",
        window: int | None = None,
        include_first: bool = False,
        rotate_fraction: float = 0.5,
        causal_router: bool = False,
    ) -> None:
        super().__init__()
        others = max(num_heads // 2, 1) if other_heads is None else other_heads
        sparse = int((num_heads - others) * sparsity) if mosa_heads is None else mosa_heads
        if head_dim is None and embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim.")
        if min(sparse, others) < 0 or sparse + others < 1:
            raise OptionError(f"Need a head, and no negative numbers of them; got {sparse} sparse and {others} others.")
        if other not in ("dense", "local") or (window is not None and window < 1):
            raise OptionError(f"other is 'dense' or 'local' and a window has a token; got {other!r} and {window}.")
        self.embed_dim, self.head_dim = embed_dim, head_dim or embed_dim // num_heads
        self.mosa_heads, self.other_heads, self.sparsity = sparse, others, sparsity
        self.other, self.window = other, window
        self.rotary_width = _rotary_width(self.head_dim, rotate_fraction)
        options: dict[str, Any] = {"include_first": include_first, "rotate_fraction": rotate_fraction}
        self.sparse = (
            MoSAHeads(embed_dim, self.head_dim, sparse, sparsity, causal_router=causal_router, **options)
            if sparse
            else None
        )
        self.qkv = nn.Linear(embed_dim, 3 * others * self.head_dim, bias=False) if others else None
        self.out = nn.Linear(others * self.head_dim, embed_dim, bias=False) if others else None

    def extra_repr(self) -> str:
        return f"{self.mosa_heads} sparse and {self.other_heads} {self.other} heads"

    def flops(self, length: int) -> int:
        """Operations for a sequence, counted as :func:`head_flops`; a local head forms ``window`` logits a token."""
        dense = head_flops(length, self.embed_dim, self.head_dim)
        if self.other == "local":
            dense -= 4 * self.head_dim * length * (length - self._window(length))
        return self.other_heads * dense + self.mosa_heads * head_flops(
            length, self.embed_dim, self.head_dim, self.sparsity
        )

    def kv_entries(self, length: int) -> int:
        """Key-value pairs that are kept for a sequence (with the causal router: on average in training)."""
        kept = min(self._window(length), length) if self.other == "local" else length
        return kept * self.other_heads + kv_entries(length, 0, self.mosa_heads, self.sparsity)

    def _window(self, length: int) -> int:
        return chosen_tokens(length, self.sparsity) if self.window is None else self.window

    def _mechanism(self, length: int) -> Mechanism:
        if self.other == "dense":
            return cast(Mechanism, create("full"))
        return cast(Mechanism, create("sliding_window", window=self._window(length), sinks=0))

    def _project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the ordinary heads."""
        assert self.qkv is not None
        query, key, value = split_heads(self.qkv(x), self.other_heads, 3)
        cos, sin = rotary_angles(x.shape[1], self.rotary_width, start=start, device=x.device, dtype=x.dtype)
        return _rotated(query, cos, sin), _rotated(key, cos, sin), value

    def forward(self, x: Tensor, *, causal: bool = True, mask: Mask | None = None) -> Tensor:
        """Attend within ``x``. mask: of tokens that count for no query (padding)."""
        self._check(x)
        if not causal:
            raise UnsupportedPatternError("MoSA is defined for causal attention alone.")
        keys = layer_keys(mask, x.shape[1], x.device, "MoSA")
        keys = None if keys is None else keys.any(1)
        out = torch.zeros_like(x) if self.sparse is None else self.sparse(x, keys)
        if self.out is None:
            return out
        padding = None if keys is None else KeyPadding(keys.expand(len(x), -1))
        heads = self._mechanism(x.shape[1])(*self._project(x), causal=True, mask=padding)
        return out + cast(Tensor, self.out(merge_heads(heads)))

    def init_state(self, batch: int, *, like: Tensor) -> MoSAState:
        """The decoding state before the first token. Refused where later tokens have a say in what heads take."""
        if self.sparse is not None and not self.sparse.causal_router:
            raise UnsupportedPatternError(
                "MoSA's heads choose among all tokens of the sequence, so the next one cannot be decoded. Set "
                "causal_router=True (on a trained layer: layer.sparse.causal_router = True) to choose by thresholds."
            )
        if self.other == "local" and self.window is None:
            raise OptionError("Give the window of local heads to decode: by default it follows the sequence's length.")
        return MoSAState(EvictingCache(), self._mechanism(1).init_state(batch, like=like))

    def step(self, x: Tensor, state: MoSAState) -> tuple[Tensor, MoSAState]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the state, which is changed in place."""
        self._check(x)
        out = torch.zeros_like(x) if self.sparse is None else self.sparse.step(x, state.sparse)
        if self.out is not None:
            heads, state.other = self._mechanism(1).step(*self._project(x, state.seen), state.other)
            out = out + self.out(merge_heads(heads))
        state.seen += x.shape[1]
        return out, state

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"MoSA takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
