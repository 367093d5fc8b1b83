"""Lightning attention: linear attention with one decay per head, computed in tiles at constant speed per
token.

Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", 2024,
arXiv 2405.17381, section 3 (the operator) and section 4 (TransNormerLLM's layer).

    o_t = q_t sum_{s <= t} lam^(t - s) k_s^T v_s,    lam = exp(-slope of the head)

There is no denominator; a norm of the output replaces it in the layer. In tiles of ``B`` tokens, with ``KV``
the state before the tile: the part inside a tile is ``((Q K^T) * M) V`` with ``M_ij = lam^(i - j)`` for ``i
>= j``, the part before it is ``diag(lam, ..., lam^B) Q KV``, and ``KV`` becomes ``lam^B KV + (diag(lam^(B -
1), ..., 1) K)^T V``. No power of ``1 / lam`` is ever formed. Time ``O(N d (d + B))``, one state ``d x d_v``
per head; decoding is the recurrence.

:class:`LightningAttention` is the operator on (query, key, value); :class:`TnlAttention` is the paper's layer
around it: ``(norm(lightning(SiLU(x Wq), SiLU(x Wk), x Wv)) * x Wu) Wo``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState, linear_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.norms import SRMSNorm, srms_norm
from regard.layers.padding import layer_keys
from regard.linear.frame import LinearMechanism
from regard.masks import Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = [
    "LightningAttention",
    "TnlAttention",
    "TnlState",
    "alibi_slopes",
    "decay_slopes",
    "lightning_attention",
    "lrpe",
    "srms_norm",
]

MODES = ("tiled", "recurrent", "parallel", "cumsum")


def alibi_slopes(heads: int) -> Tensor:
    """``2^(-8 i / H)`` for ``i = 1 .. H`` (float64), as in ALiBi; for ``H`` that is no power of two the
    slopes of the next lower power, then every other one of the next higher."""
    if heads < 1:
        raise OptionError(f"heads must be at least 1, got {heads}.")
    lower = 2 ** int(math.log2(heads))
    first = 2 ** (-8 * torch.arange(1, lower + 1, dtype=torch.float64) / lower)
    between = 2 ** (-8 * torch.arange(1, 2 * lower + 1, 2, dtype=torch.float64) / (2 * lower))
    return torch.cat((first, between[: heads - lower]))


def decay_slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """Slopes ``(heads,)`` of layer ``layer`` (from 0) of ``layers``: ALiBi's, times ``1 - layer / (layers -
    1) + 1e-5``.

    The last layer hardly decays. A single layer counts as the first.
    """
    if not 0 <= layer < layers:
        raise OptionError(f"layer counts from 0 to layers - 1; got layer {layer} of {layers}.")
    return alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope: Tensor,
    block: int = 64,
    state: LinearState | None = None,
    mode: str = "tiled",
    *,
    scale: float = 1.0,
) -> tuple[Tensor, LinearState]:
    """Output ``(batch, heads, N, d_v)`` and the state ``(batch, heads, d, d_v)`` after the last token.

    query ``(batch, heads, N, d)``, key and value ``(batch, kv_heads, N, ...)``, slope ``(heads,)`` of any
    size >= 0 (an infinite one forgets everything but the token itself). ``state`` continues an earlier
    stretch. mode: ``"tiled"``, ``"recurrent"``, ``"parallel"`` (the masked ``N x N`` matrix) or ``"cumsum"``
    (all ``N`` states at once, the slow form that tiling replaces).
    """
    if slope.shape != (query.shape[1],):
        raise ShapeError(f"slope has one value per query head ({query.shape[1]},), got {tuple(slope.shape)}.")
    log_decay = -slope.to(accumulation_dtype(query.dtype))
    if mode == "cumsum":
        return _all_states(query, key, value, log_decay, state, scale)
    if mode not in MODES:
        raise OptionError(f"mode {mode!r} is none of {', '.join(MODES)}.")
    return linear_attention(
        query,
        key,
        value,
        causal=True,
        log_decay=log_decay,
        scale=scale,
        state=state,
        chunk_size=block,
        backend="auto" if mode == "tiled" else mode,
    )


def _all_states(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: LinearState | None, scale: float
) -> tuple[Tensor, LinearState]:
    """Every state ``S_t`` at once, ``(batch, heads, N, d, d_v)``: a cumulative sum, or a doubling scan under
    a decay."""
    work, heads = log_decay.dtype, query.shape[1]
    q, k, v = query.to(work) * scale, expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
    states = k[..., :, None] * v[..., None, :]
    if state is not None:
        first = states[:, :, :1] + state.sum[:, :, None] * log_decay.exp().view(1, -1, 1, 1, 1)
        states = torch.cat((first, states[:, :, 1:]), 2)
    if not bool(log_decay.any()):
        states = states.cumsum(2)
    else:
        reach = 1
        while reach < states.shape[2]:
            faded = states[:, :, :-reach] * (reach * log_decay).exp().view(1, -1, 1, 1, 1)
            states = states + F.pad(faded, (0, 0, 0, 0, reach, 0))
            reach *= 2
    out = (q[..., None, :] @ states)[..., 0, :]
    return out.to(query.dtype), LinearState(states[:, :, -1])


@register("lightning_attention")
class LightningAttention(LinearMechanism):
    """The operator alone, causal self-attention without a denominator.

    slopes: of the decay per head; by default :func:`decay_slopes` for ``layer_index`` of ``num_layers``.
    block_size: tokens of a tile; it changes speed, not the result. feature_map: ``"identity"`` (the operator)
    or ``"silu"`` on queries and keys, as TransNormerLLM has it. The default ``scale`` is 1.
    """

    patterns = frozenset({"causal-self"})
    normalize = False

    def __init__(
        self,
        block_size: int = 64,
        slopes: Sequence[float] | None = None,
        feature_map: str = "identity",
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        if block_size < 1 or feature_map not in ("identity", "silu"):
            raise OptionError(
                f"Need block_size >= 1 and feature_map 'identity' or 'silu'; got {block_size}, {feature_map!r}."
            )
        if slopes is not None and any(not slope >= 0 for slope in slopes):
            raise OptionError(f"Slopes are at least 0 (a decay, never a growth); got {list(slopes)}.")
        self.chunk_size, self.feature_map = block_size, feature_map
        self.slopes = None if slopes is None else tuple(slopes)
        self.layer_index, self.num_layers = layer_index, num_layers

    def extra_repr(self) -> str:
        return f"block_size={self.chunk_size}, layer={self.layer_index} of {self.num_layers}"

    def slope(self, heads: int) -> Tensor:
        """The slopes ``(heads,)`` in use."""
        if self.slopes is None:
            return decay_slopes(heads, self.layer_index, self.num_layers)
        if len(self.slopes) != heads:
            raise ShapeError(f"{len(self.slopes)} slopes were given, but there are {heads} query heads.")
        return torch.tensor(self.slopes, dtype=torch.float64)

    def map_features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return (F.silu(query), F.silu(key)) if self.feature_map == "silu" else (query, key)

    def gates(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return -self.slope(query.shape[1]).to(query.device, accumulation_dtype(query.dtype)), None


def lrpe(x: Tensor, theta: Tensor, start: int = 0) -> Tensor:
    """Position by rotation: ``x (batch, heads, N, d)`` to ``[x cos(theta t), x sin(theta t)]`` ``(batch,
    heads, N, 2 d)``.

    ``theta (heads, d)``: an angle per channel. Products of two such vectors are ``sum_c q_c k_c cos(theta_c
    (t - s))``, the real part of ``q_t . k_s exp(i theta (t - s))`` (linearised relative position encoding,
    Qin et al., 2023, arXiv 2307.09270). ``start``: position of the first token.
    """
    # Angles are formed in float64: at long lengths float32 loses digits of position times angle.
    positions = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float64)
    angles = positions[:, None] * theta[:, None].to(torch.float64)
    return torch.cat((x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)), -1)


@dataclass(frozen=True)
class TnlState:
    """Decoding state of one layer: the running sum, and how many tokens it has seen."""

    running: LinearState | None = None
    tokens: int = 0


@register("tnl_attention")
class TnlAttention(Layer):
    """Gated lightning attention, ``(batch, length, embed_dim)`` in and out, always causal.

    layer_index, num_layers: give the slopes, and the first layer alone has :func:`lrpe` besides the decay
    (``position``: None decides so, True or False by will). official: the module that the authors maintain
    instead, with SiLU on the values too, LayerNorm, and a gate ``sigmoid(x A B)`` of rank ``head_dim``; it
    has no LRPE.
    """

    patterns = frozenset({"causal-self"})
    needs_training = True
    growth = "N"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        layer_index: int = 0,
        num_layers: int = 1,
        block_size: int = 64,
        position: bool | None = None,
        official: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.block_size, self.official = block_size, official
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.value = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)
        if official:
            self.norm: nn.Module = nn.LayerNorm(embed_dim)
            self.gate: nn.Module = nn.Sequential(
                nn.Linear(embed_dim, self.head_dim, bias=False),
                nn.Linear(self.head_dim, embed_dim, bias=False),
                nn.Sigmoid(),
            )
        else:
            self.norm = SRMSNorm()
            self.gate = nn.Linear(embed_dim, embed_dim, bias=False)
        self.layer_index, self.num_layers = layer_index, num_layers
        decay_slopes(num_heads, layer_index, num_layers)  # refuses impossible numbers now, not at the first call
        self.theta: nn.Parameter | None = None
        if (layer_index == 0 if position is None else position) and not official:
            rates = 10000 ** (-2 * torch.arange(embed_dim, dtype=torch.float64) / embed_dim)
            self.theta = nn.Parameter(rates.view(num_heads, -1).to(self.query.weight.dtype))

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out. mask: of keys alone (``KeyPadding``)."""
        keys = layer_keys(mask, x.shape[1], x.device, "TnlAttention")
        return self._run(x, TnlState(), keys)[0]

    def init_state(self, batch: int, *, like: Tensor) -> TnlState:
        """The state before the first token."""
        return TnlState()

    def step(self, x: Tensor, state: TnlState) -> tuple[Tensor, TnlState]:
        """The next token or tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`."""
        return self._run(x, state, None)

    def _run(self, x: Tensor, state: TnlState, keys: Tensor | None) -> tuple[Tensor, TnlState]:
        query, key, value = F.silu(self.query(x)), F.silu(self.key(x)), self.value(x)
        if self.official:
            value = F.silu(value)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        if keys is not None:
            key, value = (t.masked_fill(~keys[..., None], 0) for t in (key, value))
        if self.theta is not None:
            query, key = (lrpe(t, self.theta, state.tokens) for t in (query, key))
        slope = decay_slopes(self.num_heads, self.layer_index, self.num_layers).to(x.device)
        out, running = lightning_attention(query, key, value, slope, self.block_size, state.running)
        mixed: Tensor = self.out(self.norm(out.transpose(1, 2).flatten(2)) * self.gate(x))
        return mixed, TnlState(running, state.tokens + x.shape[1])
