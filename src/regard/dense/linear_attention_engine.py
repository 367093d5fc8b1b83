"""The recurrent pattern of AttentionEngine: linear attention with a decay per head and token, chunk by chunk.

    h_t = e^{g_t} h_{t-1} + k_t v_t^T,   o_t = q_t h_t,   with q_mod(q), k_mod(k), v_mod(v) and g = decay_mod(decay)

Within a chunk of ``chunk`` tokens, ``g`` summed from its start: ``o_t = e^{g_t} q_t h + sum_{s <= t} e^{g_t - g_s}
(q_t k_s) v_s``, then ``h <- e^{g_last} h + sum_t e^{g_last - g_t} k_t v_t^T``. Chen et al., "AttentionEngine", 2025,
arXiv 2502.15349; the chunks are :func:`regard.kernels.linear.linear_attention`'s. Time ``O(length)``, state ``dim x
value_dim`` for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regard.dense.full import FullAttention
from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState, linear_attention, linear_step
from regard.layers.custom_io import CustomIO

__all__ = ["LinearAttentionEngine", "mamba2_engine", "retention_decay", "retention_engine", "simple_gla_engine"]

Mod = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""``(tensor, custom) -> tensor``; tensors ``(batch, heads, length, dim)``, a decay ``(batch, heads, length, 1)``, and
custom tensors by name with four axes that broadcast with these."""


class LinearAttentionEngine:
    """A callable ``engine(query, key, value, decay, *custom)`` with gradients for all of these tensors.

    qkv_meta: query, key and value as they will come, or meta tensors; heads and dims are kept, lengths may change.
    decay ``(batch, num_heads, length)``: ``g`` before ``decay_mod``, the log of a factor. custom_io: names and axes of
    more tensors, axes named ``batch``, ``heads``, ``seq_len``, ``dim``. chunk: tokens of a chunk; the output does not
    depend on it. Causal; key heads may divide the query's. :meth:`step` decodes.
    """

    def __init__(
        self,
        qkv_meta: tuple[Tensor, Tensor, Tensor],
        q_mod: Mod | None = None,
        k_mod: Mod | None = None,
        v_mod: Mod | None = None,
        decay_mod: Mod | None = None,
        custom_io: CustomIO | Mapping[str, Sequence[int | str]] | None = None,
        chunk: int = 64,
    ) -> None:
        FullAttention().request(*qkv_meta)
        if chunk < 1:
            raise OptionError(f"chunk counts tokens, so it is at least 1; got {chunk}.")
        self.sizes = [(t.shape[1], t.shape[3]) for t in qkv_meta]
        self.mods = (q_mod, k_mod, v_mod, decay_mod)
        self.custom_io = custom_io if isinstance(custom_io, CustomIO) else CustomIO(custom_io)
        self.chunk = chunk

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, *custom: Tensor) -> Tensor:
        q, k, v, log_decay = self._changed(query, key, value, decay, custom)
        return linear_attention(q, k, v, causal=True, log_decay=log_decay, chunk_size=self.chunk)[0]

    def init_state(self, batch: int, *, like: Tensor) -> LinearState:
        """Before the first token."""
        (heads, dim), _, (_, value_dim) = self.sizes
        return LinearState.empty(batch, heads, dim, value_dim, like=like)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, *custom: Tensor, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        """The next token or tokens, and the state after them."""
        q, k, v, log_decay = self._changed(query, key, value, decay, custom)
        return linear_step(q, k, v, state, log_decay=log_decay)

    def _changed(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, custom: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        FullAttention().request(query, key, value)
        got = [(t.shape[1], t.shape[3]) for t in (query, key, value)]
        if got != self.sizes or decay.shape != query.shape[:3]:
            raise ShapeError(
                f"This engine is for (heads, dim) {self.sizes} and a decay (batch, heads, length) = "
                f"{tuple(query.shape[:3])}; got {got} and {tuple(decay.shape)}."
            )
        sizes = dict(zip(("batch", "heads", "seq_len", "dim"), query.shape, strict=True))
        held = self.custom_io.by_name(self.custom_io.placed(custom, sizes, query))
        tensors = (query, key, value, decay[..., None])
        q, k, v, g = (t if mod is None else mod(t, held) for t, mod in zip(tensors, self.mods, strict=True))
        return q, k, v, g.expand(*query.shape[:3], 1)[..., 0]


def simple_gla_engine(qkv_meta: tuple[Tensor, Tensor, Tensor], chunk: int = 64) -> LinearAttentionEngine:
    """Gated retention: queries over ``sqrt(dim)``, the decay a gate's logarithm."""
    scale = qkv_meta[0].shape[3] ** -0.5
    return LinearAttentionEngine(qkv_meta, q_mod=lambda q, custom: q * scale, chunk=chunk)


def retention_decay(query: Tensor) -> Tensor:
    """Retention's ``log(1 - 2^(-5 - h))`` of head ``h``, ``(batch, num_heads, length)`` for a query."""
    heads = torch.arange(query.shape[1], dtype=torch.float64)
    decay = torch.log1p(-(2.0 ** (-5 - heads))).to(query.device, torch.promote_types(query.dtype, torch.float32))
    return decay[None, :, None].expand(query.shape[:3])


def retention_engine(qkv_meta: tuple[Tensor, Tensor, Tensor], chunk: int = 64) -> LinearAttentionEngine:
    """RetNet's recurrence (Sun et al., 2023, arXiv 2307.08621): keys over ``sqrt(dim)``; call it with
    :func:`retention_decay`."""
    scale = qkv_meta[0].shape[3] ** -0.5
    return LinearAttentionEngine(qkv_meta, k_mod=lambda k, custom: k * scale, chunk=chunk)


def mamba2_engine(qkv_meta: tuple[Tensor, Tensor, Tensor], chunk: int = 64) -> LinearAttentionEngine:
    """SSD (Dao and Gu, 2024, arXiv 2405.21060): ``engine(C, B, x, dt, A, dt)`` with ``dt (batch, heads, length) > 0``
    as decay and again as a custom tensor, and ``A (heads,) < 0``."""
    return LinearAttentionEngine(
        qkv_meta,
        k_mod=lambda k, custom: k * custom["dt"],
        decay_mod=lambda decay, custom: decay * custom["A"],
        custom_io={"A": ("heads",), "dt": ("batch", "heads", "seq_len")},
        chunk=chunk,
    )
