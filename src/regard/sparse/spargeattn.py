"""SpargeAttn: training-free sparse attention that tells by block means where attention is, and by cosines whether to
trust.

Stage 1, before attention. Blocks of queries (128) and keys (64) are summarised by their means, and judged by their

    self-similarity = mean of all pairwise cosines inside the block = | mean of its unit vectors |^2,

keys taken minus their token mean. Pooled logits ``qbar kbar^T / sqrt d``, key blocks with similarity up to ``sim``
left out, softmax over the visible blocks; each row keeps its largest blocks while their sum stays within ``top_p``
(at least one), or a fixed ``ratio`` of all blocks. What the means cannot summarise is computed in full: every key
block, and every row of a query block, that is not self-similar. In causal attention the blocks on the diagonal are
always kept.

Stage 2, inside the tiled online softmax: a tile whose scores lie ``skip_threshold`` powers of two below the running
maxima is skipped, and scores may be int8 (:func:`regard.kernels.tiled.tiled_attention`).

Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference", 2025,
arXiv 2502.18137, sections 3.2 to 3.5. Query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads,
k_len, ...). Time: the share of blocks kept, of dense. Causal: what is selected for a query depends on the tokens of
its own block of queries and of the key blocks under it, later ones included, but on nothing behind them (the key mean
of a block runs over the keys up to its end); values never reach back. ``official=True`` selects as the released code
does: the mean of all keys, no forced diagonal, a short last key block always on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError
from regard.kernels import accumulation_dtype, block_sparse_attention, dense_attention, expand_groups, score_scale
from regard.kernels.tiled import TileStats, tiled_attention
from regard.layout import BlockLayout, num_blocks
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.scoring import BlockView, grouped_scores, per_kv_head, pool_blocks
from regard.sparse.selection import settle_mask, top_k_mask, top_p_mask

__all__ = [
    "SpargeAttention",
    "SpargeThresholds",
    "block_self_similarity",
    "calibrate_sparge",
    "sparge_attention",
    "sparge_block_mask",
]

PerHead = float | Sequence[float]


def block_self_similarity(x: Tensor, block_size: int, keys: Tensor | None = None) -> Tensor:
    """Mean of all pairwise cosines of the tokens of each block: ``(batch, heads, length, dim)`` -> ``(...,
    num_blocks)``.

    1 where all point the same way, ``1 / block_size`` where they are orthogonal. ``keys``: tokens that count.
    """
    unit = F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1)
    return pool_blocks(unit, block_size, keys).square().sum(-1).clamp_max(1)


def _similarity_of_keys(key: Tensor, block_size: int, keys: Tensor | None, causal: bool) -> Tensor:
    """Self-similarity of key blocks around the mean of all keys, or under ``causal`` of the keys up to the block's
    end."""
    key = key.to(accumulation_dtype(key.dtype))
    if keys is not None:
        key = torch.where(keys[..., None], key, 0)
    if not causal:
        count = key.shape[2] if keys is None else keys.sum(-1)[..., None, None].clamp_min(1)
        return block_self_similarity(key - key.sum(2, keepdim=True) / count, block_size, keys)
    means = pool_blocks(key, block_size, keys)
    ones = key.new_ones(1, 1, key.shape[2], 1) if keys is None else keys[..., None].to(key.dtype)
    share = pool_blocks(
        ones, block_size
    )  # means over the tokens that there are, so sums are means times the block's size
    sizes = key.new_full((means.shape[2], 1), block_size)
    sizes[-1] -= -key.shape[2] % block_size
    counts = share * sizes
    running = (means * counts).cumsum(2) / counts.cumsum(2).clamp_min(1)
    return block_self_similarity(key - running.repeat_interleave(block_size, 2)[:, :, : key.shape[2]], block_size, keys)


@torch.no_grad()
def sparge_block_mask(
    query: Tensor,
    key: Tensor,
    block_q: int = 128,
    block_k: int = 64,
    sim: PerHead | Tensor | None = None,
    top_p: PerHead | Tensor | None = 0.98,
    ratio: float | None = None,
    causal: bool = False,
    sink: bool = False,
    *,
    layout: BlockLayout | None = None,
    keys: Tensor | None = None,
    scale: float | None = None,
    official: bool = False,
) -> Tensor:
    """Stage 1: the blocks to compute, boolean ``(batch, num_heads, num_q_blocks, num_k_blocks)``.

    sim: the similarity above which a block counts as summarised (default 0.6; 0.1 below zero, which admits all, with
    ``ratio``); top_p: share of the pooled attention to keep, 1 or more keeps all; both may be given per head. ratio:
    keep this share of all key blocks instead. sink: the first key block is always kept. layout: the blocks that may
    be visible (default: by ``causal``), keys: the keys that count.
    """
    heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
    if layout is None:
        request = Request(causal=causal)
        layout = BlockLayout.of(request.visible, q_len, k_len, block_q, block_k, query.device)
    key = per_kv_head(key, keys)
    q_means, k_means = pool_blocks(query, block_q), pool_blocks(key, block_k, keys)
    bar = _per_head(sim if sim is not None else (0.6 if ratio is None else -0.1), q_means, "sim")
    similar = _similarity_of_keys(key, block_k, keys, causal and not official)
    trusted_k = expand_groups(similar, heads)[:, :, None] > bar
    if official and k_len % block_k:
        trusted_k[..., -1] = False
    trusted_q = block_self_similarity(query, block_q)[..., None] > bar
    view = BlockView(layout, keys, causal, score_scale(query, scale))
    visible = view.seen
    scores = grouped_scores(q_means, k_means) * view.scale
    scores = scores.masked_fill(~(visible & trusted_k), float("-inf"))
    if ratio is not None:
        chosen = top_k_mask(scores, max(int(ratio * scores.shape[-1]), 1))
    else:
        some = (scores > float("-inf")).any(-1, keepdim=True)
        shares = torch.where(some, scores, 0).softmax(-1) * some
        limit = _per_head(1.0 if top_p is None else top_p, q_means, "top_p")
        chosen = top_p_mask(shares, limit, crossing="exclude") | (limit >= 1)
    chosen = chosen | ~trusted_k | ~trusted_q
    if sink:
        chosen[..., 0] = True
    if causal and not official:
        chosen |= view.nearest(1)
    return chosen & visible


def _per_head(value: PerHead | Tensor, like: Tensor, name: str) -> Tensor:
    """A threshold as ``(1 | heads, 1, 1)``."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
    if len(tensor) not in (1, like.shape[1]):
        raise OptionError(f"{name} has {len(tensor)} values, but there are {like.shape[1]} heads.")
    return tensor


@dataclass(frozen=True)
class SpargeThresholds:
    """Calibrated settings, one value a head: pass ``options()`` to :class:`SpargeAttention`.

    ``sparsity``: share of the visible blocks left out on the calibration data, ``error``: relative L1 error there.
    """

    sim: tuple[float, ...]
    top_p: tuple[float, ...]
    skip_threshold: tuple[float, ...]
    sparsity: tuple[float, ...]
    error: tuple[float, ...]

    def options(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"sim": self.sim, "top_p": self.top_p, "skip_threshold": self.skip_threshold}


@torch.no_grad()
def calibrate_sparge(
    qkv_list: Sequence[tuple[Tensor, Tensor, Tensor]],
    l1: float = 0.07,
    pv_l1: float = 0.08,
    *,
    causal: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    sims: Sequence[float] = (-1.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9),
    steps: int = 8,
) -> SpargeThresholds:
    """Per head, the sparsest ``(sim, top_p, skip_threshold)`` whose relative L1 error stays below the targets on
    every input.

    For each ``sim`` a bisection finds the smallest ``top_p`` with an error below ``l1``; the sparsest pair is kept,
    and a second bisection lowers ``skip_threshold`` (from 50) while the error stays below ``pv_l1``. ``top_p = 1`` is
    full attention, so the targets can always be met.
    """
    if not qkv_list or not 0 < l1 < pv_l1:
        raise OptionError(f"Calibration needs inputs and 0 < l1 < pv_l1; got {len(qkv_list)} inputs, {l1}, {pv_l1}.")
    heads, device = qkv_list[0][0].shape[1], qkv_list[0][0].device
    exact = [dense_attention(*qkv, causal=causal) for qkv in qkv_list]
    visible = [
        BlockLayout.of(Request(causal=causal).visible, q.shape[2], k.shape[2], block_q, block_k, device)
        for q, k, _ in qkv_list
    ]

    def measure(sim: Tensor, top_p: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Largest error and mean sparsity over the inputs, ``(heads,)`` each."""
        errors, sparsities = [], []
        for (query, key, value), wanted, base in zip(qkv_list, exact, visible, strict=True):
            mask = sparge_block_mask(query, key, block_q, block_k, sim, top_p, causal=causal)
            if skip is None:
                out = block_sparse_attention(query, key, value, base.only(mask))
            else:
                out, _ = tiled_attention(query, key, value, base.only(mask), skip_threshold=skip)
            gap = (out.float() - wanted.float()).abs().sum((0, 2, 3))
            errors.append(gap / wanted.float().abs().sum((0, 2, 3)))
            sparsities.append(1 - mask.float().mean((0, 2, 3)) / base.visit.float().mean())
        return torch.stack(errors).amax(0), torch.stack(sparsities).mean(0)

    best_sim, best_p = torch.full((heads,), 1.0, device=device), torch.ones(heads, device=device)
    best = torch.full((heads,), -1.0, device=device)
    for sim in sims:
        bar = torch.full((heads,), float(sim), device=device)
        low, high = torch.zeros(heads, device=device), torch.ones(heads, device=device)
        sparsity = measure(bar, high, None)[1]
        for _ in range(steps):
            middle = (low + high) / 2
            error, found = measure(bar, middle, None)
            good = error < l1
            low, high = torch.where(good, low, middle), torch.where(good, middle, high)
            sparsity = torch.where(good, found, sparsity)
        better = sparsity > best
        best = torch.where(better, sparsity, best)
        best_sim, best_p = torch.where(better, bar, best_sim), torch.where(better, high, best_p)
    low, high = torch.zeros(heads, device=device), torch.full((heads,), 50.0, device=device)
    for _ in range(steps):
        middle = (low + high) / 2
        good = measure(best_sim, best_p, middle)[0] < pv_l1
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    error = measure(best_sim, best_p, high)[0]
    columns = (best_sim, best_p, high, best, error)
    return SpargeThresholds(*(tuple(float(x) for x in column) for column in columns))


def sparge_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, scale: float | None = None, **options: Any
) -> Tensor:
    """In place of ``scaled_dot_product_attention``; options as in :class:`SpargeAttention`."""
    return SpargeAttention(**options)(query, key, value, causal=causal, scale=scale)


@register("spargeattn")
class SpargeAttention(SparseMechanism):
    """block_q, block_k: tokens a block. sim, top_p, ratio, sink, official: as in :func:`sparge_block_mask`.

    skip_threshold: in powers of two (see :func:`~regard.kernels.tiled.tiled_attention`), per head or one for all;
    from the default 50 on nothing that float32 can hold is dropped, and the faster executor without tile skipping
    runs. quant: ``"int8"`` scores, or None. ``stats`` holds what the last call with tile skipping or int8 counted.
    """

    growth = "share of N^2"

    def __init__(
        self,
        block_q: int = 128,
        block_k: int = 64,
        sim: PerHead | None = None,
        top_p: PerHead | None = 0.98,
        ratio: float | None = None,
        *,
        sink: bool = False,
        skip_threshold: PerHead = 50.0,
        quant: Literal["int8"] | None = None,
        official: bool = False,
    ) -> None:
        super().__init__()
        if block_q < 1 or block_k < 1:
            raise OptionError(f"Block sizes must be at least 1, got {block_q} and {block_k}.")
        if ratio is not None and not 0 < ratio <= 1:
            raise OptionError(f"ratio is a share of the key blocks, between 0 and 1; got {ratio}.")
        if quant not in (None, "int8"):
            raise OptionError(f"quant is None or 'int8', not {quant!r}.")
        self.block_q, self.block_k, self.sim, self.top_p, self.ratio = block_q, block_k, sim, top_p, ratio
        self.sink, self.skip_threshold, self.quant, self.official = sink, skip_threshold, quant, official
        self.stats: TileStats | None = None

    @property
    def strictly_causal(self) -> bool:
        """False: the means of a block of queries, and of the key block on the diagonal, hold later tokens."""
        return False

    def extra_repr(self) -> str:
        return f"block_q={self.block_q}, block_k={self.block_k}, sim={self.sim}, top_p={self.top_p}, ratio={self.ratio}"

    def select(self, query: Tensor, key: Tensor, request: Request) -> BlockLayout:
        q_len, k_len = query.shape[2], key.shape[2]
        visible, keys = settle_mask(request, q_len, k_len)
        layout = BlockLayout.of(visible, q_len, k_len, self.block_q, self.block_k, query.device)
        return layout.only(
            sparge_block_mask(
                query,
                key,
                self.block_q,
                self.block_k,
                self.sim,
                self.top_p,
                self.ratio,
                request.causal,
                self.sink,
                layout=layout,
                keys=keys,
                scale=request.scale,
                official=self.official,
            )
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        threshold = torch.as_tensor(self.skip_threshold, dtype=torch.float32)
        if self.quant is None and bool((threshold >= 50).all()):
            return super().attend(query, key, value, request)
        out, self.stats = tiled_attention(
            query,
            key,
            value,
            self.select(query, key, request),
            skip_threshold=threshold.to(query.device),
            quant=self.quant,
            scale=request.scale,
        )
        return out

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound with ``top_p``, whose sparsity only the input tells."""
        nq, nk = num_blocks(shape.q_len, self.block_q), num_blocks(shape.k_len, self.block_k)
        pooled = 2 * shape.batch * shape.num_heads * nq * nk * shape.head_dim
        share = 1.0 if self.ratio is None else max(int(self.ratio * nk), 1) / nk
        if shape.causal and shape.q_len == shape.k_len:
            layout = BlockLayout.of(Request(causal=True).visible, shape.q_len, shape.k_len, self.block_q, self.block_k)
            share = min(share, layout.density())
        return dense_cost(shape, share, pooled)
