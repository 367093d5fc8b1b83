"""Linear attention whose gates read the tokens: what is forgotten and overwritten is decided token by token.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t                        update="sum"
    S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t  update="delta"
    y_t = (norm(q_t S_t) * SiLU(x_t W_g)) W_o

One layer covers, by its options, gated linear attention (Yang et al., 2023, arXiv 2312.06635, section 4: a decay per
channel), a scalar decay per head as in Mamba-2's form (Dao and Gu, 2024, arXiv 2405.21060), DeltaNet (Yang et al.,
2024, arXiv 2406.06484) and gated DeltaNet (Yang et al., 2024, arXiv 2412.06464). Time ``O(N d (d + chunk))``, one state
``d x d_v`` per head and the last inputs of the convolution; it decodes token by token.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels import accumulation_dtype, delta_rule, linear_attention
from regard.layers.causal_conv import CausalConv
from regard.layers.feature_maps import unit_vectors
from regard.layers.heads import head_sizes
from regard.layers.norms import srms_norm
from regard.layers.padding import layer_keys
from regard.linear.frame import FrameState
from regard.masks import Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["GatedLinearAttention"]

UPDATES, DECAYS = ("sum", "delta"), ("none", "head", "channel")
# A gate's logit is divided by this, so that decays begin near one (Yang et al., 2023, section 4.4).
_TEMPERATURE = 16.0


@register("gated_linear_attention")
class GatedLinearAttention(Layer):
    """``(batch, length, embed_dim)`` in and out, causal.

    update: ``"sum"`` or ``"delta"``; with the delta rule queries and keys have unit length and ``beta`` is a sigmoid of
    the token. decay: ``"none"``, ``"head"`` or ``"channel"`` (of the keys; not with the delta rule), ``sigmoid(x
    W)^(1/16)``, through a bottleneck of ``gate_rank`` for channels. kernel_size: of a causal convolution with SiLU on
    queries, keys and values, 0 for none. gated: whether ``SiLU(x W_g)`` multiplies the output, which is normed head by
    head before.
    """

    patterns = frozenset({"causal-self"})
    needs_training = True
    growth = "N"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        update: Literal["sum", "delta"] = "sum",
        decay: Literal["none", "head", "channel"] = "head",
        kernel_size: int = 4,
        gated: bool = True,
        gate_rank: int = 16,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        if update not in UPDATES or decay not in DECAYS:
            raise OptionError(
                f"update is one of {', '.join(UPDATES)} and decay one of {', '.join(DECAYS)}; got {update!r} and "
                f"{decay!r}."
            )
        if update == "delta" and decay == "channel":
            raise OptionError("The delta rule has a decay per head, not per channel; take decay='head' or 'none'.")
        if min(gate_rank, chunk_size) < 1 or kernel_size < 0:
            raise OptionError(
                f"Need gate_rank >= 1, chunk_size >= 1 and kernel_size >= 0; got {gate_rank}, {chunk_size} and "
                f"{kernel_size}."
            )
        _, self.head_dim = head_sizes(embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.chunk_size = embed_dim, num_heads, chunk_size
        self.update, self.decay = update, decay
        self.project = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.conv = CausalConv(3 * embed_dim, kernel_size, bias=False) if kernel_size else None
        self.fade: nn.Module | None = None
        if decay == "head":
            self.fade = nn.Linear(embed_dim, num_heads)
        elif decay == "channel":
            self.fade = nn.Sequential(nn.Linear(embed_dim, gate_rank, bias=False), nn.Linear(gate_rank, embed_dim))
        self.strength = nn.Linear(embed_dim, num_heads, bias=False) if update == "delta" else None
        self.gate = nn.Linear(embed_dim, embed_dim, bias=False) if gated else None
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, update={self.update!r}, decay={self.decay!r}"

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out. mask: of keys alone (``KeyPadding``); what it hides leaves the
        state as it was."""
        keys = layer_keys(mask, x.shape[1], x.device, "GatedLinearAttention")
        return self._run(x, FrameState(), keys)[0]

    def init_state(self, batch: int, *, like: Tensor) -> FrameState:
        """The state before the first token."""
        return FrameState()

    def step(self, x: Tensor, state: FrameState) -> tuple[Tensor, FrameState]:
        """The next token or tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`."""
        return self._run(x, state, None)

    def _run(self, x: Tensor, state: FrameState, keys: Tensor | None) -> tuple[Tensor, FrameState]:
        mixed, tail = self.project(x), state.tail
        if keys is not None:
            mixed = mixed.masked_fill(~keys[:, 0, :, None], 0)
        if self.conv is not None:
            mixed, tail = self.conv(mixed, tail)
            mixed = F.silu(mixed)
        query, key, value = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(accumulation_dtype(x.dtype))
            for t in mixed.chunk(3, -1)
        )
        log_decay = self._log_decay(x)
        if keys is not None:
            hidden = ~keys[:, :, :, None]
            key = key.masked_fill(hidden, 0)
            if log_decay is not None:
                log_decay = log_decay.masked_fill(hidden if log_decay.dim() == 4 else hidden[..., 0], 0)
        if self.strength is not None:
            beta = self.strength(x).to(query.dtype).sigmoid().transpose(1, 2)
            query, key = unit_vectors(query), unit_vectors(key)
            out, running = delta_rule(
                query, key, value, beta, log_decay=log_decay, state=state.running, chunk_size=self.chunk_size
            )
        else:
            out, running = linear_attention(
                query,
                key,
                value,
                causal=True,
                log_decay=log_decay,
                scale=self.head_dim**-0.5,
                state=state.running,
                chunk_size=self.chunk_size,
            )
        out = srms_norm(out).transpose(1, 2).flatten(2).to(x.dtype)
        if self.gate is not None:
            out = out * F.silu(self.gate(x))
        return self.out(out), FrameState(running, tail)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """Per head ``(batch, heads, length)``, or per channel ``(batch, heads, length, head_dim)``."""
        if self.fade is None:
            return None
        logit: Tensor = self.fade(x)
        gate = F.logsigmoid(logit.to(accumulation_dtype(x.dtype))) / _TEMPERATURE
        if self.decay == "head":
            return gate.transpose(1, 2)
        return gate.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
