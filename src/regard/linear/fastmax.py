"""Fastmax: softmax's exponential cut off after degree ``p``, so that attention factorises exactly.

Gerami et al., "FAST: Factorizable Attention for Speeding up Transformers", 2024, arXiv 2402.07901, section 2.

    f(s) = sum_{l=0..p} s^l / l!,   s_ij = qhat_i . khat_j / t,   o_i = sum_j f(s_ij) v_j / sum_j f(s_ij)

``f(q . k) = phi(q) . phi(k)`` with the Taylor features of :func:`~regard.layers.feature_maps.poly_features`, so the
sums over keys are moments ``sum_j phi(k_j) [v_j, 1]``, prefix sums when causal: all pairs count, none is formed. For
``p = 2`` ``f`` is positive for every score; for ``p = 1`` as long as scores stay above -1.

Queries and keys are normalised so that ``|s| <= 1 / t``, where ``f`` is close to exp: ``"maxnorm"`` subtracts the mean
of a token's channels and divides all tokens of a head by the largest norm among them, queries and keys apart; since
that maximum would let the future into the past, causal attention divides each token by its own norm. ``"standard"``
divides a token by the standard deviation of its channels; ``"none"`` leaves both as they are (the released code does,
with ``t = 8 sqrt(d)``).

Features ``F = C(d + p, p)``, that is ``d + 1`` and about ``d^2 / 2``. Time ``O(N F d_v)``; the forward pass keeps ``O(F
d_v)`` besides input and output, the backward pass rebuilds the moments (:class:`FastmaxFunction`). Fewer operations
than softmax from ``N`` of about ``d`` (``p = 1``) and ``d^2 / 2`` (``p = 2``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState, linear_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.feature_maps import poly_features, poly_pullback, poly_width, taylor_exp, unit_vectors
from regard.layers.padding import per_head
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = [
    "Fastmax",
    "FastmaxFunction",
    "GradientBound",
    "fastmax",
    "fastmax_attention_matrix",
    "gradient_bound",
    "normalize_tokens",
    "poly_features",
]

NORMALIZERS = ("maxnorm", "standard", "none")
METHODS = ("factorized", "dense", "auto")


def fastmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: int = 2,
    causal: bool = False,
    normalize: str = "maxnorm",
    temperature: float = 1.0,
    method: str = "factorized",
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """query ``(batch, heads, N, d)``, key ``(batch, kv_heads, M, d)``, value ``(batch, kv_heads, M, d_v)`` to ``(batch,
    heads, N, d_v)``; causal needs ``N == M``.

    p: the degree, 1 or 2 (0 is the mean of the values); ``method="dense"`` writes the matrix out and takes any degree,
    ``"auto"`` takes the form of fewer operations. key_padding_mask, query_padding_mask: True where a token is real,
    ``(batch, length)`` or broadcastable to ``(batch, heads, length)``; the latter only keeps padding out of the largest
    norm. A row without a key in sight is zero.
    """
    _check(p, normalize, temperature, method, chunk_size)
    if causal and query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"Causal fastmax needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}; to continue a "
            "sequence use the mechanism's step."
        )
    q, k, values = _prepare(
        query, key, value, causal, normalize, temperature, per_head(key_padding_mask), per_head(query_padding_mask)
    )
    if method == "auto":
        fewer = 2 * poly_width(q.shape[-1], p) * values.shape[-1] < k.shape[2] * (q.shape[-1] + values.shape[-1])
        method = "factorized" if p <= 2 and fewer else "dense"
    if method == "dense":
        sums = _kernel(q, k, p, causal) @ values
    else:
        if p > 2:
            raise OptionError(f"The factorised form is made for p up to 2, got {p}; use method='dense'.")
        sums = FastmaxFunction.apply(q, k, values, p, causal, chunk_size)
    return _quotient(sums).to(query.dtype)


def fastmax_attention_matrix(
    query: Tensor,
    key: Tensor,
    p: int = 2,
    causal: bool = False,
    normalize: str = "maxnorm",
    temperature: float = 1.0,
) -> Tensor:
    """The weights ``(batch, heads, N, M)``, for inspection: any degree, quadratic in length."""
    _check(p, normalize, temperature, "dense", 1)
    q, k, ones = _prepare(query, key, key[..., :0], causal, normalize, temperature, None, None)
    kernel = _kernel(q, k, p, causal)
    return (kernel / _safe(kernel @ ones)).to(query.dtype)


def normalize_tokens(x: Tensor, normalize: str = "maxnorm", causal: bool = False, real: Tensor | None = None) -> Tensor:
    """Queries or keys ``(batch, heads, N, d)`` as the scores take them. real: ``(batch | 1, heads | 1, N)``, the tokens
    among which the largest norm is sought."""
    if normalize == "none":
        return x
    centred = x - x.mean(-1, keepdim=True)
    if normalize == "standard":
        return unit_vectors(centred) * x.shape[-1] ** 0.5
    if causal:
        return unit_vectors(centred)
    counted = centred if real is None else centred.masked_fill(~real[..., None], 0)
    if not x.shape[2]:
        return centred
    # The size is taken out first, as a constant, so that squares of huge numbers do not overflow.
    size = _safe(counted.detach().abs().amax((-2, -1), keepdim=True))
    largest = torch.linalg.vector_norm(counted / size, dim=-1, keepdim=True).amax(-2, keepdim=True)
    return centred / size / _safe(largest)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    normalize: str,
    temperature: float,
    real: Tensor | None,
    taking: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries over the temperature, normalised keys, and values with a column of ones, zero where hidden."""
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    q = normalize_tokens(query.to(work), normalize, causal, taking) / temperature
    k = normalize_tokens(expand_groups(key, heads).to(work), normalize, causal, real)
    values = F.pad(expand_groups(value, heads).to(work), (0, 1), value=1.0)
    if real is not None:
        hidden = ~real[..., None]
        k, values = k.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    return q, k, values


def _kernel(query: Tensor, key: Tensor, p: int, causal: bool) -> Tensor:
    kernel = taylor_exp(query @ key.transpose(-1, -2), p)
    return kernel.tril() if causal else kernel


def _safe(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


def _quotient(sums: Tensor) -> Tensor:
    return sums[..., :-1] / _safe(sums[..., -1:])


class FastmaxFunction(torch.autograd.Function):
    """``sum_j f(q_i . k_j) v_j`` over all keys, or those up to ``i``, in chunks of tokens.

    ``apply(query (batch, heads, N, d), key (batch, heads, M, d), value (batch, heads, M, d_v), p, causal, chunk_size)``
    gives ``(batch, heads, N, d_v)``; a column of ones among the values gives the denominators. Only the inputs are
    kept: the backward pass rebuilds the moments ``S = sum_j phi(k_j) v_j^T`` and, with the gradient ``g`` of the
    output, ``T = sum_i phi(q_i) g_i^T``, of which ``S g_i``, ``T v_j`` and ``phi(k_j) T`` are the gradients of
    ``phi(q_i)``, ``phi(k_j)`` and ``v_j``. Causal: within a chunk dense, ``S`` from the left and ``T`` from the right
    between chunks.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, p: int, causal: bool, chunk_size: int) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.p, ctx.causal, ctx.chunk_size = p, causal, chunk_size
        if not causal:
            moments = _moments(key, value, p, chunk_size)
            return torch.cat([poly_features(q, p) @ moments for q in query.split(chunk_size, 2)], 2)
        outs, total = [], None
        for q, k, v in _chunks(chunk_size, query, key, value):
            out = _kernel(q, k, p, True) @ v
            outs.append(out if total is None else out + poly_features(q, p) @ total)
            total = _grown(total, k, v, p)
        return torch.cat(outs, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        p, size = ctx.p, ctx.chunk_size
        if not ctx.causal:
            moments, taken = _moments(key, value, p, size), _moments(query, grad, p, size)
            grad_query = [poly_pullback(q, g @ moments.transpose(-1, -2), p) for q, g in _chunks(size, query, grad)]
            grad_key = [poly_pullback(k, v @ taken.transpose(-1, -2), p) for k, v in _chunks(size, key, value)]
            grad_value = [poly_features(k, p) @ taken for k in key.split(size, 2)]
            return torch.cat(grad_query, 2), torch.cat(grad_key, 2), torch.cat(grad_value, 2), None, None, None
        grad_query, grad_key, grad_value = [], [], []
        total: Tensor | None = None
        chunks = _chunks(size, query, key, value, grad)
        for q, k, v, g in chunks:
            inside = _score_gradient(q, k, v, g, p) @ k
            grad_query.append(inside if total is None else inside + poly_pullback(q, g @ total.transpose(-1, -2), p))
            total = _grown(total, k, v, p)
        total = None
        for q, k, v, g in reversed(chunks):
            to_key = _score_gradient(q, k, v, g, p).transpose(-1, -2) @ q
            to_value = _kernel(q, k, p, True).transpose(-1, -2) @ g
            if total is not None:
                to_key = to_key + poly_pullback(k, v @ total.transpose(-1, -2), p)
                to_value = to_value + poly_features(k, p) @ total
            grad_key.insert(0, to_key)
            grad_value.insert(0, to_value)
            total = _grown(total, q, g, p)
        return torch.cat(grad_query, 2), torch.cat(grad_key, 2), torch.cat(grad_value, 2), None, None, None


def _chunks(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(size, 2) for t in tensors), strict=True))


def _grown(total: Tensor | None, source: Tensor, carried: Tensor, p: int) -> Tensor:
    """``total + sum_j phi(source_j) carried_j^T``."""
    added = poly_features(source, p).transpose(-1, -2) @ carried
    return added if total is None else total + added


def _moments(source: Tensor, carried: Tensor, p: int, size: int) -> Tensor:
    total = source.new_zeros(*source.shape[:2], poly_width(source.shape[-1], p), carried.shape[-1])
    for x, y in _chunks(size, source, carried):
        total = _grown(total, x, y, p)
    return total


def _score_gradient(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, p: int) -> Tensor:
    return (taylor_exp(query @ key.transpose(-1, -2), p - 1) * (grad @ value.transpose(-1, -2))).tril()


@dataclass(frozen=True)
class GradientBound:
    """``largest``: the most that a score moves an output entry, ``max |d o_i / d s_ij|`` over values within [-1, 1].
    ``bound``: what it cannot exceed for any scores as large as these; infinite where ``f`` may reach zero."""

    largest: float
    bound: float


@torch.no_grad()
def gradient_bound(
    query: Tensor, key: Tensor, p: int = 2, normalize: str = "maxnorm", temperature: float = 1.0
) -> GradientBound:
    """How sensitive outputs are to scores, noncausal: measured, and the bound that falls as ``1 / M``.

    ``d o_i / d s_ij = f'(s_ij) (v_j - o_i) / g_i`` with ``g_i = sum_j f(s_ij)``, and ``|v_j - o_i| <= 2 (1 - a_ij)``.
    With ``|s| <= b``, ``f' <= f'(b)`` and ``g_i >= M f(-b)``, so that ``2 f'(b) / (M f(-b))`` bounds it (``8 / M`` for
    ``p = 2``, ``b = 1``). Softmax has no bound that falls with ``M``: one dominant key gives up to 1/2.
    """
    _check(p, normalize, temperature, "dense", 1)
    q, k, ones = _prepare(query, key, key[..., :0], False, normalize, temperature, None, None)
    scores = q @ k.transpose(-1, -2)
    kernel = taylor_exp(scores, p)
    total = kernel @ ones
    slope = taylor_exp(scores, p - 1) / total * 2 * (1 - kernel / total)
    reach = scores.abs().amax()
    lowest = float(taylor_exp(-reach, p))
    bound = 2 * float(taylor_exp(reach, p - 1)) / (scores.shape[-1] * lowest) if lowest > 0 else float("inf")
    return GradientBound(float(slope.abs().amax()), bound)


@register("fastmax")
class Fastmax(Mechanism):
    """Fastmax on (query, key, value), without projections.

    p: 1 or 2. normalize: ``"maxnorm"``, ``"standard"`` or ``"none"``. temperature: divides the scores, as ``scale=``
    multiplies them. method: ``"factorized"``, ``"dense"`` or ``"auto"``, the one of fewer operations. chunk_size:
    tokens at once; it changes speed, not the result. mask_queries: where a key mask covers as many keys as there are
    queries it is taken to speak of the tokens of self-attention, so that padding has no part in the largest norm of the
    queries; False where such a call is cross-attention.
    """

    patterns = frozenset({"self", "cross", "causal-self"})
    mask_support = "keys"
    needs_training = True
    decodes = True
    growth = "N"

    def __init__(
        self,
        p: int = 2,
        normalize: str = "maxnorm",
        temperature: float = 1.0,
        method: str = "auto",
        chunk_size: int = 128,
        mask_queries: bool = True,
    ) -> None:
        super().__init__()
        _check(p, normalize, temperature, method, chunk_size)
        if p > 2:
            raise OptionError(f"The mechanism takes p up to 2, got {p}; fastmax(method='dense') takes more.")
        self.p, self.normalize, self.temperature = p, normalize, temperature
        self.method, self.chunk_size, self.mask_queries = method, chunk_size, mask_queries

    def extra_repr(self) -> str:
        return f"p={self.p}, normalize={self.normalize!r}, temperature={self.temperature}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        return fastmax(
            query,
            key,
            value,
            self.p,
            request.causal,
            self.normalize,
            self.temperature if request.scale is None else self.temperature / request.scale,
            self.method,
            key_padding_mask=request.keys,
            query_padding_mask=request.keys if self.mask_queries and query.shape[2] == key.shape[2] else None,
            chunk_size=self.chunk_size,
        )

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> LinearState | None:
        self._own_state(cache)
        return None

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: LinearState | None
    ) -> tuple[Tensor, LinearState | None]:
        q, k, values = _prepare(query, key, value, True, self.normalize, self.temperature, None, None)
        q, k = (poly_features(x, self.p) for x in (q, k))
        sums, state = linear_attention(q, k, values, causal=True, state=state, chunk_size=self.chunk_size)
        return _quotient(sums).to(query.dtype), state

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        return linear_cost(shape, poly_width(shape.head_dim, self.p), self.chunk_size if shape.causal else None)


def _check(p: int, normalize: str, temperature: float, method: str, chunk_size: int) -> None:
    if p < 0 or chunk_size < 1:
        raise OptionError(f"Need a degree p >= 0 and chunk_size >= 1; got {p} and {chunk_size}.")
    if normalize not in NORMALIZERS:
        raise OptionError(f"normalize is one of {', '.join(NORMALIZERS)}; got {normalize!r}.")
    if method not in METHODS:
        raise OptionError(f"method is one of {', '.join(METHODS)}; got {method!r}.")
    if not temperature > 0:
        raise OptionError(f"temperature is above 0, got {temperature}.")
