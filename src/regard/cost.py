"""What attention costs: floating-point operations, bytes and state, counted the way torch's FLOP counter counts.

A product of ``(m, k)`` and ``(k, n)`` is ``2 m k n`` operations; softmax, masks and other elementwise work count zero.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttentionShape", "Cost", "cache_bytes", "dense_cost", "linear_cost", "linear_layer_flops"]


@dataclass(frozen=True)
class AttentionShape:
    """The sizes that cost depends on. Lengths in tokens; ``element_size`` in bytes."""

    q_len: int
    k_len: int
    num_heads: int = 1
    head_dim: int = 64
    batch: int = 1
    num_kv_heads: int | None = None
    value_dim: int | None = None
    causal: bool = False
    grid: tuple[int, ...] | None = None
    element_size: int = 4

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def v_dim(self) -> int:
        return self.value_dim or self.head_dim


@dataclass(frozen=True)
class Cost:
    """``flops``: of one forward. ``bytes``: inputs read and outputs written once, plus intermediates that must be
    stored. ``state_bytes``: kept between decoding steps at this length. ``pairs``: share of query-key pairs computed,
    or None where no pair is formed."""

    flops: int
    bytes: int
    state_bytes: int
    pairs: float | None = 1.0


def _traffic(shape: AttentionShape) -> int:
    queries = shape.q_len * shape.num_heads * (shape.head_dim + shape.v_dim)
    keys = shape.k_len * shape.kv_heads * (shape.head_dim + shape.v_dim)
    return shape.batch * (queries + keys) * shape.element_size


def cache_bytes(shape: AttentionShape, tokens: int | None = None) -> int:
    """Bytes of a key-value cache of ``tokens`` (default: all keys)."""
    kept = shape.k_len if tokens is None else min(tokens, shape.k_len)
    return shape.batch * kept * shape.kv_heads * (shape.head_dim + shape.v_dim) * shape.element_size


def dense_cost(shape: AttentionShape, density: float = 1.0, extra_flops: int = 0, cached: int | None = None) -> Cost:
    """Softmax attention over the share ``density`` of all pairs, scores never stored, plus ``extra_flops``."""
    pairs = shape.batch * shape.num_heads * shape.q_len * shape.k_len
    flops = round(2 * pairs * density * (shape.head_dim + shape.v_dim)) + extra_flops
    return Cost(flops, _traffic(shape), cache_bytes(shape, cached), density)


def linear_cost(shape: AttentionShape, feature_dim: int | None = None, chunk: int | None = None) -> Cost:
    """``q (k^T v)`` with features of ``feature_dim``; in chunks (causal), each also forms its own square of scores."""
    features = feature_dim or shape.head_dim
    rows = shape.batch * shape.num_heads
    flops = 2 * rows * (shape.q_len + shape.k_len) * features * shape.v_dim
    if chunk is not None:
        flops += 2 * rows * shape.q_len * min(chunk, shape.k_len) * (features + shape.v_dim)
    state = rows * features * (shape.v_dim + 1) * 4
    return Cost(flops, _traffic(shape) + state, state, None)


def linear_layer_flops(tokens: int, in_features: int, out_features: int) -> int:
    """FLOPs of a linear layer over ``tokens`` rows."""
    return 2 * tokens * in_features * out_features
