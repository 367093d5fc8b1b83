"""Sparsifiner: a low-rank guess of the attention map tells every query of a vision transformer which keys to attend to.

Predictor, the same for all heads of a layer, on queries and keys (N, D) of a head:

    q' = q W_q, k' = k W_k                        to D' = D / reduce_c channels
    c  = softmax(scale q' (k'^T P))               coefficients, r = N / reduce_n of them; P (N, r)
    approx = c E                                  E (r, N): connectivity patterns, the basis; no row for the class token

To be computed as a product of two sparse matrices, E is replaced by ``|E|`` where that exceeds ``basis_threshold`` and
by 0 elsewhere, and c keeps its ``basis_topk`` largest entries. Each query attends, in one softmax, to the
``ceil(keep N)`` keys of largest approx; the class token attends to all. The choice has no gradient.

Training (:mod:`regard.train.sparsifiner`). Stage 1: attention stays dense (``mode='dense'``) and the predictor alone
learns, by the squared distance between c E, as it is, and a dense teacher's attention. Stage 2: the predictor rests and
the backbone learns under the masks.

Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", 2023, arXiv
2303.13755, section 3. Query (batch, num_heads, N, head_dim), key and value (batch, num_kv_heads, N, ...).
Cost: the predictor's ``O(N D D' + N r D')`` and a sparse product of at most ``N basis_topk N``, attention's ``keep
N^2``. The released code scales q' k'^T by ``num_heads^-0.5`` (``official=True``); here it is ``head_dim^-0.5``. P and E
belong to ``tokens`` tokens; for another number they are interpolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, dense_attention, dense_weights, expand_groups, token_sparse_attention
from regard.layout import TokenLayout
from regard.masks import Boolean
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.scoring import grouped_scores
from regard.sparse.selection import settle_mask, top_k_mask

__all__ = ["Connectivity", "ConnectivityPredictor", "MaskFlops", "SparsifinerAttention", "mask_flops"]

Mode = Literal["sparse", "dense"]
Executor = Literal["gathered", "masked"]


class Connectivity(NamedTuple):
    """``mask`` boolean ``(batch, heads, N, N)``; ``approx (batch, heads, rows, N)``, ``coef (batch, heads, rows, r)``
    and ``basis (r, N)``, rows being all queries but the class token."""

    mask: Tensor
    approx: Tensor
    coef: Tensor
    basis: Tensor


class ConnectivityPredictor(nn.Module):
    """Which keys each query should see.

    tokens: N, the class token included. keep: share of keys. class_token: whether the first token is one. The other
    options as in the formulas of this module.
    """

    def __init__(
        self,
        head_dim: int,
        tokens: int,
        *,
        reduce_n: int = 8,
        reduce_c: int = 2,
        keep: float = 0.25,
        basis_topk: int = 8,
        basis_threshold: float = 0.02,
        class_token: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if min(head_dim, reduce_n, reduce_c, basis_topk) < 1 or tokens < 1 + class_token:
            raise OptionError(
                f"Need head_dim, reduce_n, reduce_c, basis_topk >= 1 and a token beside the class token; got "
                f"{head_dim}, {reduce_n}, {reduce_c}, {basis_topk} and tokens {tokens}."
            )
        if not 0 < keep <= 1 or basis_threshold < 0:
            raise OptionError(f"Need 0 < keep <= 1 and basis_threshold >= 0; got {keep} and {basis_threshold}.")
        self.tokens, self.keep, self.class_token = tokens, keep, class_token
        self.basis_topk, self.basis_threshold = basis_topk, basis_threshold
        self.scale = head_dim**-0.5 if scale is None else scale
        rank, width = max(tokens // reduce_n, 1), max(head_dim // reduce_c, 1)
        self.query, self.key = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.down, self.basis = (nn.Parameter(torch.empty(size)) for size in ((tokens, rank), (rank, tokens)))
        for parameter in (self.query.weight, self.key.weight, self.down, self.basis):
            nn.init.trunc_normal_(parameter, std=0.02)
        for linear in (self.query, self.key):
            nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, rank={self.basis.shape[0]}, keep={self.keep}"

    def budget(self, length: int) -> int:
        """Keys of each query."""
        return math.ceil(self.keep * length)

    def approximate(
        self, query: Tensor, key: Tensor, keys: Tensor | None = None, sparse: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``approx``, ``coef`` and ``basis``, differentiable. keys ``(batch | 1, kv_heads | heads | 1, N)`` boolean:
        tokens that count. sparse: as the product of two sparse matrices."""
        length, work = key.shape[2], accumulation_dtype(query.dtype)
        down, basis = (self._fitted(table, length).to(work) for table in (self.down, self.basis.T))
        basis = basis.T
        short = self.key(key).to(work)
        if keys is not None:
            if keys.shape[1] not in (1, short.shape[1]):
                short = short.repeat_interleave(query.shape[1] // short.shape[1], 1)
            short = torch.where(keys[..., None], short, 0)
        low = self.query(query[:, :, int(self.class_token) :]).to(work)
        coef = (grouped_scores(low, (short.transpose(2, 3) @ down).transpose(2, 3)) * self.scale).softmax(-1)
        if sparse:
            basis = F.threshold(basis.abs(), self.basis_threshold, 0.0)
            coef = torch.where(top_k_mask(coef.detach(), self.basis_topk), coef, 0)
        return coef @ basis, coef, basis

    def choose(self, approx: Tensor, visible: Tensor | None = None) -> Tensor:
        """Keys of each query but the class token, boolean, the shape of ``approx``; visible: what it may see."""
        scores = approx.detach()
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return top_k_mask(scores, self.budget(approx.shape[-1]))

    def forward(self, query: Tensor, key: Tensor, sparse: bool = True) -> Connectivity:
        """From ``query (batch, heads, N, head_dim)`` and ``key (batch, kv_heads, N, head_dim)``."""
        approx, coef, basis = self.approximate(query, key, sparse=sparse)
        mask = F.pad(self.choose(approx), (0, 0, int(self.class_token), 0), value=True)
        return Connectivity(mask, approx, coef, basis)

    def _fitted(self, table: Tensor, length: int) -> Tensor:
        """``(tokens, r)`` for ``length`` tokens: over the square that patches form, or else along their order."""
        if length == self.tokens:
            return table
        own, patches = table.split([int(self.class_token), self.tokens - self.class_token])
        count = length - self.class_token
        old, new = math.isqrt(len(patches)), math.isqrt(max(count, 0))
        if count <= 0:
            return own[:length]
        if old * old == len(patches) and new * new == count:
            square = patches.T.unflatten(1, (old, old))[None]
            fitted = F.interpolate(square, (new, new), mode="bilinear", align_corners=False).flatten(2)[0].T
        else:
            fitted = F.interpolate(patches.T[None], count, mode="linear", align_corners=False)[0].T
        return torch.cat((own, fitted))


@register("sparsifiner")
class SparsifinerAttention(SparseMechanism):
    """keep, reduce_n, reduce_c, basis_topk, basis_threshold, tokens, class_token: of the predictor.

    executor: ``"gathered"`` forms the chosen pairs alone, ``"masked"`` is dense attention under the same mask.
    Assign ``mode = "dense"`` for stage 1. After a call in training ``approx`` holds the predictor's map ``(batch,
    num_heads, rows, N)`` for the reconstruction loss, with its gradient; after any sparse call ``class_attention``
    holds the class token's weights ``(batch, num_heads, N)``.
    """

    patterns = frozenset(("self",))
    needs_training = True
    growth = "share of N^2"

    def __init__(
        self,
        head_dim: int,
        num_heads: int = 1,
        *,
        tokens: int = 197,
        keep: float = 0.25,
        reduce_n: int = 8,
        reduce_c: int = 2,
        basis_topk: int = 8,
        basis_threshold: float = 0.02,
        class_token: bool = True,
        executor: Executor = "gathered",
        official: bool = False,
    ) -> None:
        super().__init__()
        if executor not in get_args(Executor):
            raise OptionError(f"executor is 'gathered' or 'masked', not {executor!r}.")
        self.predictor = ConnectivityPredictor(
            head_dim,
            tokens,
            reduce_n=reduce_n,
            reduce_c=reduce_c,
            keep=keep,
            basis_topk=basis_topk,
            basis_threshold=basis_threshold,
            class_token=class_token,
            scale=num_heads**-0.5 if official else None,
        )
        self.executor = executor
        self.mode = "sparse"
        self.approx: Tensor | None = None
        self.class_attention: Tensor | None = None

    @property
    def mode(self) -> Mode:
        """What attention runs: ``"sparse"``, or ``"dense"`` while the predictor learns."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise OptionError(f"mode is 'sparse' or 'dense', not {mode!r}.")
        self._mode: Mode = mode

    def __getstate__(self) -> dict[str, Any]:
        # What a pass left behind may hang in its graph: it can be neither copied nor pickled.
        return {**self.__dict__, "approx": None, "class_attention": None}

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, executor={self.executor!r}"

    def chosen(self, query: Tensor, key: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        """The keys of the queries behind the class token ``(batch, heads, rows, N)``, and those the class token may
        see ``(batch | 1, heads | 1, 1, N)`` (None: all)."""
        length, first = key.shape[2], int(self.predictor.class_token)
        visible, keys = settle_mask(request, length, length)
        seen = None if visible is None else visible.dense(length, length, query.device)
        rest = None if seen is None else seen[:, :, first:]
        learning = self.training and self.predictor.down.requires_grad
        with torch.set_grad_enabled(learning and torch.is_grad_enabled()):
            approx, _, _ = self.predictor.approximate(query, key, keys, sparse=self.mode == "sparse")
        if self.training:
            self.approx = approx
        return self.predictor.choose(approx, rest), None if seen is None else seen[:, :, :first]

    def select(self, query: Tensor, key: Tensor, request: Request) -> TokenLayout:
        rows, own = self.chosen(query, key, request)
        if self.predictor.class_token:
            top = rows.new_ones(*rows.shape[:2], 1, rows.shape[-1])
            rows = torch.cat((top if own is None else top & own, rows), 2)
        return TokenLayout.of(rows)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if self.mode == "dense":
            if self.training:
                self.chosen(query, key, request)
            return dense_attention(query, key, value, mask=request.mask, scale=request.scale)
        rows, own = self.chosen(query, key, request)
        first = int(self.predictor.class_token)
        parts = []
        if first:
            # Written out, since who prunes tokens asks for the class token's weights.
            seen = None if own is None else Boolean(own)
            weights = dense_weights(query[:, :, :1], key, mask=seen, scale=request.scale)
            self.class_attention = weights.detach()[:, :, 0]
            parts.append(weights @ expand_groups(value, query.shape[1]))
        if rows.shape[2]:
            rest = query[:, :, first:]
            if self.executor == "masked":
                parts.append(dense_attention(rest, key, value, mask=Boolean(rows), scale=request.scale))
            else:
                out = token_sparse_attention(rest, key, value, self._lists(rows), scale=request.scale)
                assert isinstance(out, Tensor)
                parts.append(out)
        return torch.cat(parts, 2)

    def _lists(self, rows: Tensor) -> TokenLayout:
        slots = min(self.predictor.budget(rows.shape[-1]), rows.shape[-1])
        best = rows.to(torch.uint8).topk(slots, -1)
        return TokenLayout(best.indices.masked_fill(best.values == 0, -1), rows.shape[-1])

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound: the sparse product may be cheaper."""
        length, first = shape.k_len, int(self.predictor.class_token)
        pairs = (length - first) * self.predictor.budget(length) + first * length
        extra = 2 * shape.batch * shape.num_heads * _predictor_products(self.predictor, length)
        return dense_cost(shape, pairs / length**2, extra)


def _predictor_products(predictor: ConnectivityPredictor, length: int) -> int:
    """Multiplications of one head, the product c E at its densest."""
    rank, width = predictor.basis.shape[0], predictor.query.out_features
    rows = length - predictor.class_token
    low = (rows + length) * predictor.query.in_features * width + (rows + length) * rank * width
    return low + rows * min(predictor.basis_topk, rank) * length


@dataclass(frozen=True)
class MaskFlops:
    """Multiply-and-add pairs, counted as two operations, per sample and layer: ``dense`` attention's two products,
    those that a mask leaves (``attention``), and the predictor's (``predictor``)."""

    dense: float
    attention: float
    predictor: float

    @property
    def reduction(self) -> float:
        """Share of dense attention's operations that is saved, predictor included."""
        return 1 - (self.attention + self.predictor) / self.dense


def mask_flops(connectivity: Connectivity, predictor: ConnectivityPredictor, head_dim: int) -> MaskFlops:
    """Operations under predicted masks, mean over the batch. The sparse product is counted by the pairs of entries that
    are not zero; projections of queries, keys and values, the same for both, are left out."""
    mask, coef, basis = connectivity.mask, connectivity.coef, connectivity.basis
    if mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        raise ShapeError(f"A mask is (batch, heads, N, N); got {tuple(mask.shape)}.")
    batch, heads, length, _ = mask.shape
    rank, width = basis.shape[0], predictor.query.out_features
    rows = coef.shape[2]
    low = heads * (rows + length) * width * (predictor.query.in_features + rank)
    used = (coef != 0).sum((0, 1, 2)).double() / batch
    product = float((used * (basis != 0).sum(-1)).sum())
    return MaskFlops(
        4.0 * heads * length * length * head_dim, 4.0 * float(mask.sum()) / batch * head_dim, 2 * (low + product)
    )
