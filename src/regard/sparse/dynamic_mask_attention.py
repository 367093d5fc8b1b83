"""Trainable dynamic mask attention: a small learned score per key, read off its value, decides which keys are kept.

Per key/value head ``h`` and key ``j``

    dt_hj = (W_dt concat_h' v_h'j)_h          s_hj = A_h softplus(dt_hj)      (``form="exp"``: its exponential)

Query ``i`` keeps the ``keep`` keys of largest score among those up to ``i``, and attends to them with the score as a
bias:

    softmax_j(scale q_i . k_j + s_hj) v_j     over the kept j

The choice is made on detached scores: ``A`` and ``W_dt`` learn through the bias of kept keys alone. ``A`` starts at
zero, where all scores tie; ties go to the more recent key, so an untrained layer is a sliding window. Scores do not
depend on the query: a key that falls out of the kept set never comes back, so a cache of ``keep`` tokens decodes
exactly.

Shi et al., "Trainable Dynamic Mask Sparse Attention", 2025, arXiv 2508.02124, section 3. The paper writes the
exponential; its released code takes the exponent alone (``form="linear"``, the default here, for its numerical range)
and its example model ranks keys over the whole sequence, which is not causal; this is the paper's ranking per query.
Query ``(batch, num_heads, q_len, head_dim)``, key and value ``(batch, num_kv_heads, k_len, head_dim)``; the heads of
a group keep the same keys. Time ``O(N keep d)`` plus ``O(N num_kv_heads^2 d)`` for the scores.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import EvictingCache, KeyValueCache
from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import dense_attention, expand_groups, token_sparse_attention
from regard.kernels.token_lists import token_list_attention
from regard.layers.heads import head_sizes
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layout import TokenLayout
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Layer, Mechanism, Pattern, Request
from regard.registry import register
from regard.sparse.scoring import split_blocks
from regard.sparse.selection import PrefixTopK, prefix_top_k, top_k_mask

__all__ = [
    "DynamicMask",
    "DynamicMaskAttention",
    "DynamicMaskCache",
    "dma_scores",
    "majority_smooth",
    "topk_prefix_indices",
    "topk_prefix_mask",
]

Form = Literal["linear", "exp"]
Executor = Literal["blocks", "gathered", "masked"]


def dma_scores(value: Tensor, w_dt: Tensor, a: Tensor, form: Form = "linear") -> Tensor:
    """Scores ``(batch, kv_heads, length)`` of keys from their values ``(batch, kv_heads, length, dim)``.

    w_dt ``(kv_heads, kv_heads * dim)``: one linear map over the values of all heads. a ``(kv_heads,)``.
    """
    steps = F.linear(value.transpose(1, 2).flatten(2), w_dt).transpose(1, 2)
    exponent = a[:, None] * F.softplus(steps)
    return exponent.exp() if form == "exp" else exponent


def topk_prefix_mask(scores: Tensor, keep: int, valid: Tensor | None = None, q_len: int | None = None) -> Tensor:
    """Boolean ``(batch, kv_heads, q_len, k_len)``: the ``keep`` best keys up to each query, ties to the more recent.

    valid ``(batch, k_len)`` boolean: real tokens. ``q_len`` last positions are queries (default: all).
    """
    k_len = scores.shape[-1]
    kept = _prefix(scores, keep, k_len if q_len is None else q_len, valid)
    return kept.rule.dense(k_len if q_len is None else q_len, k_len, scores.device)


def topk_prefix_indices(scores: Tensor, keep: int, valid: Tensor | None = None, q_len: int | None = None) -> Tensor:
    """The same as lists ``(batch, kv_heads, q_len, keep)`` int64, in order of position, -1 where there are fewer."""
    q_len = scores.shape[-1] if q_len is None else q_len
    return _per_query(_prefix(scores, keep, q_len, valid), min(keep, scores.shape[-1]), q_len, scores.shape[-1])


def _prefix(scores: Tensor, keep: int, q_len: int, valid: Tensor | None) -> PrefixTopK:
    # Short blocks waste few slots on keys that only some of their queries keep; long ones sweep in fewer steps.
    block_q = min(max(keep // 8, 16), 128)
    return prefix_top_k(scores, keep, q_len, block_q, None if valid is None else valid[:, None])


def _per_query(kept: PrefixTopK, keep: int, q_len: int, k_len: int) -> Tensor:
    """Lists of single queries out of lists of blocks."""
    lists, death = kept.lists, kept.rule.death
    batch, heads, blocks, slots = lists.shape
    block_q = slots - keep
    position = torch.arange(blocks * block_q, device=lists.device).view(blocks, block_q, 1) + (k_len - q_len)
    found = []
    for block in range(blocks):
        members = lists[:, :, block]
        ends = death.expand(batch, heads, -1).gather(-1, members.clamp_min(0))
        here = position[block]
        seen = (members >= 0)[:, :, None] & (members[:, :, None] <= here) & (here < ends[:, :, None])
        placed = torch.where(seen, members[:, :, None], k_len).sort(-1).values[..., :keep]
        found.append(torch.where(placed == k_len, -1, placed))
    return torch.cat(found, 2)[:, :, :q_len]


def majority_smooth(mask: Tensor, block_size: int) -> Tensor:
    """Keep whole key blocks: those of which a query keeps more than half of the tokens, and the query's own token.

    ``mask`` ``(batch, heads, q_len, k_len)`` boolean, causal; the result is cut to the causal triangle again, and the
    own token is forced, since a row whose kept keys are scattered would otherwise see nothing.
    """
    q_len, k_len = mask.shape[-2:]
    sizes = split_blocks(torch.ones(k_len, 1, device=mask.device), block_size).sum((-2, -1))
    counts = split_blocks(mask[..., None].to(torch.float32), block_size).sum((-2, -1))
    whole = (counts * 2 > sizes).repeat_interleave(block_size, -1)[..., :k_len]
    own = torch.eye(max(q_len, k_len), dtype=torch.bool, device=mask.device)[-q_len:, -k_len:]
    return (whole & Causal().dense(q_len, k_len, mask.device)) | own


class DynamicMaskCache(EvictingCache):
    """Decoding state: the kept tokens of each key/value head in order of position, with their scores in ``extra``."""

    def retain_best(self, keep: int) -> None:
        """Evict all but the ``keep`` tokens of largest score, ties to the more recent."""
        scores = self.extra["score"].detach()
        surplus = scores.shape[-1] - keep
        if surplus > 0:
            best = scores.argsort(dim=-1, stable=True)[..., surplus:]
            self.retain(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True))


@register("dynamic_mask_attention")
class DynamicMask(Mechanism):
    """keep: keys a query attends to. form: of the score, ``"linear"`` or the paper's ``"exp"``.

    smooth_block: keep whole key blocks by majority (see :func:`majority_smooth`); None does not. executor:
    ``"blocks"`` gathers kept keys once a block of queries, ``"gathered"`` query by query, ``"masked"`` is dense
    attention under the same mask (what smoothing and masks that differ between queries use); they differ in speed
    alone.

    The choice of keys reads the values, so the output is not linear in them; ``weights`` needs the values too.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self", "causal-cross"))
    needs_training = True
    value_linear = False
    decodes = True
    growth = "N k"

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        *,
        keep: int = 2048,
        form: Form = "linear",
        smooth_block: int | None = None,
        executor: Executor = "blocks",
    ) -> None:
        super().__init__()
        if keep < 1 or (smooth_block is not None and smooth_block < 1):
            raise OptionError(f"Need keep >= 1 and smooth_block >= 1 or None; got {keep} and {smooth_block}.")
        if form not in ("linear", "exp") or executor not in ("blocks", "gathered", "masked"):
            raise OptionError(
                f"form is 'linear' or 'exp', executor 'blocks', 'gathered' or 'masked'; got {form!r}, {executor!r}."
            )
        self.num_kv_heads, self.head_dim = num_kv_heads or num_heads, head_dim
        self.keep, self.form, self.smooth_block, self.executor = keep, form, smooth_block, executor
        self.A = nn.Parameter(torch.zeros(self.num_kv_heads))
        self.dt = nn.Linear(self.num_kv_heads * head_dim, self.num_kv_heads, bias=False)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, form={self.form!r}, smooth_block={self.smooth_block}"

    def scores(self, value: Tensor) -> Tensor:
        """Scores of the keys ``(batch, num_kv_heads, length)``."""
        if value.shape[1] != self.num_kv_heads or value.shape[3] != self.head_dim:
            raise ShapeError(
                f"This mechanism scores values of {self.num_kv_heads} heads of {self.head_dim}, "
                f"not {tuple(value.shape)}. Build it with num_kv_heads and head_dim of the model."
            )
        return dma_scores(value, self.dt.weight, self.A, self.form)

    def kept(self, value: Tensor, q_len: int | None = None, mask: Mask | None = None) -> Tensor:
        """Which keys each query keeps, boolean ``(batch, kv_heads | num_heads, q_len, k_len)``, smoothing included."""
        q_len = value.shape[2] if q_len is None else q_len
        keys = None if mask is None else mask.key_validity(value.shape[2])
        return self._mask(self.scores(value), Request(causal=True, mask=mask, keys=keys), q_len)

    def _mask(self, scores: Tensor, request: Request, q_len: int) -> Tensor:
        k_len, rule = scores.shape[-1], request.visible
        if request.mask is None or (request.keys is not None and request.keys.shape[1] in (1, scores.shape[1])):
            seen = prefix_top_k(scores, self.keep, q_len, 128, request.keys).rule.dense(q_len, k_len, scores.device)
        else:
            assert rule is not None
            visible = rule.dense(q_len, k_len, scores.device)
            wide = expand_groups(scores.detach(), visible.shape[1]) if visible.shape[1] > 1 else scores.detach()
            order = wide.argsort(dim=-1, stable=True)
            place = torch.arange(k_len, device=scores.device, dtype=torch.float32).expand_as(order)
            rank = torch.empty_like(place).scatter_(-1, order, place.contiguous())
            seen = top_k_mask(rank[:, :, None].masked_fill(~visible, float("-inf")), self.keep)
        if self.smooth_block is None:
            return seen
        smooth = majority_smooth(seen, self.smooth_block)
        return smooth if request.mask is None else smooth & request.mask.dense(q_len, k_len, scores.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return self._run(query, key, value, self.scores(value), request)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, request: Request) -> Tensor:
        heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
        shared = request.mask is None or (request.keys is not None and request.keys.shape[1] in (1, scores.shape[1]))
        if not shared or self.smooth_block is not None or self.executor == "masked" or self.keep >= k_len:
            seen = expand_groups(self._mask(scores, request, q_len), heads)
            bias = expand_groups(scores, heads)[:, :, None]
            return dense_attention(query, key, value, mask=Boolean(seen), bias=bias, scale=request.scale)
        block_q = min(max(self.keep // 8, 16), 128)
        kept = prefix_top_k(scores, self.keep, q_len, block_q, request.keys)
        if self.executor == "gathered":
            lists = expand_groups(_per_query(kept, self.keep, q_len, k_len), heads)
            layout = TokenLayout(lists, k_len)
            out = token_sparse_attention(query, key, value, layout, key_bias=scores, scale=request.scale)
        else:
            out = token_list_attention(
                query,
                key,
                value,
                kept.lists,
                block_q,
                mask=kept.rule,
                settled=kept.settled,
                key_bias=scores,
                scale=request.scale,
            )
        assert isinstance(out, Tensor)
        return out

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        """The implied attention matrix for these values."""
        if value is None:
            raise UnsupportedPatternError(
                "dynamic_mask_attention chooses its keys by their values, so the matrix depends on them: pass value."
            )
        scores, identity = self.scores(value), torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
        return self._run(query, key, identity.expand(*key.shape[:2], -1, -1), scores, request)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        if value.shape[-1] != self.head_dim:
            return self._share(query.shape[2], key.shape[2])
        seen = self._mask(self.scores(value), request, query.shape[2])
        return float(seen.to(torch.float64).mean())

    def _share(self, q_len: int, k_len: int) -> float:
        position = torch.arange(k_len - q_len + 1, k_len + 1, dtype=torch.float64)
        return float(position.clamp(0, self.keep).mean()) / k_len

    def cost(self, shape: AttentionShape) -> Cost:
        scoring = 2 * shape.batch * shape.k_len * shape.kv_heads * shape.kv_heads * shape.v_dim
        cost = dense_cost(shape, self._share(shape.q_len, shape.k_len), scoring, cached=self.keep)
        scores = shape.batch * shape.kv_heads * min(self.keep, shape.k_len) * shape.element_size
        return Cost(cost.flops, cost.bytes, cost.state_bytes + scores, cost.pairs)

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> DynamicMaskCache:
        self._own_state(cache)
        return DynamicMaskCache()

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, DynamicMaskCache]:
        if self.smooth_block is not None:
            raise UnsupportedPatternError(
                "Majority smoothing counts evicted keys too, so a cache of kept keys cannot decode with it; "
                "build the mechanism with smooth_block=None."
            )
        kept = state.append(key, value, score=self.scores(value))
        request = self.request(query, kept.key, kept.value, causal=True)
        out = self._run(query, kept.key, kept.value, state.extra["score"], request)
        state.retain_best(self.keep)
        return out, state


class DynamicMaskAttention(Layer):
    """The paper's attention layer: ``(batch, length, embed_dim)`` in and out, causal, with rotary positions.

    keep, form, smooth_block: as in :class:`DynamicMask`. qk_norm: root-mean-square norm of queries and keys per head.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    needs_training = True
    growth = "N k"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        keep: int = 2048,
        qk_norm: bool = True,
        form: Form = "linear",
        smooth_block: int | None = None,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.num_heads, self.rotary_base = num_heads, rotary_base
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=False)
        self.key = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=False)
        self.query_norm: nn.Module = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm: nn.Module = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.mechanism = DynamicMask(
            num_heads, self.head_dim, self.num_kv_heads, keep=keep, form=form, smooth_block=smooth_block
        )

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(batch, heads, length, head_dim)`` of tokens at positions from ``start`` on."""

        def heads(tensor: Tensor, count: int) -> Tensor:
            return tensor.unflatten(-1, (count, self.head_dim)).transpose(1, 2)

        query = self.query_norm(heads(self.query(x), self.num_heads))
        key = self.key_norm(heads(self.key(x), self.num_kv_heads))
        angles = rotary_angles(
            x.shape[1], self.head_dim, base=self.rotary_base, start=start, device=x.device, dtype=x.dtype
        )
        value = heads(self.value(x), self.num_kv_heads)
        return apply_rotary(query, *angles), apply_rotary(key, *angles), value

    def forward(self, x: Tensor, *, causal: bool = True, mask: Mask | None = None) -> Tensor:
        """Attend within ``x``."""
        if not causal:
            raise UnsupportedPatternError("Dynamic mask attention is defined for causal attention alone.")
        out = self.mechanism(*self.project(x), causal=True, mask=mask)
        return cast(Tensor, self.out(out.transpose(1, 2).flatten(2)))

    def step(self, x: Tensor, cache: DynamicMaskCache | None = None) -> tuple[Tensor, DynamicMaskCache]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the new cache (None: before the first)."""
        cache = DynamicMaskCache() if cache is None else cache
        out, cache = self.mechanism.step(*self.project(x, cache.seen), cache)
        return cast(Tensor, self.out(out.transpose(1, 2).flatten(2))), cache
