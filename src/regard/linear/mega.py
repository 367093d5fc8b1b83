"""Mega: one gated attention head whose queries and keys come from a damped moving average of the sequence.

Ma et al., "Mega: Moving Average Equipped Gated Attention", 2022, arXiv 2209.10655, section 3. With ``x`` the layer's
input, ``n`` that input normalised, and ``ema`` as in :mod:`regard.kernels.ema`:

    m = SiLU(ema(n)),  v = SiLU(W_v n),  u = sigmoid(W_u m),  z = SiLU(W_z m),  r = SiLU(W_r m),  c = W_h m
    q = z * g_q + b_q,  k = z * g_k + b_k        (one shared z, an affine map per channel each)
    A = softmax(q k^T / sqrt(z_dim) + bias)      or   A = f(q k^T / visible keys + bias),  f = relu2 | laplace
    h = SiLU(c + U_h (r * (A v))),   out = x + u * (h - x)

``bias`` depends on the offset alone: a table, or a sum of waves (``rotary``). In chunks of ``C`` tokens (Mega-chunk)
attention stays inside a chunk, and the average alone carries information from one to the next: time ``O(N (C +
log N))``, and decoding keeps the ``dim * ema_dim`` numbers of the average and the keys and values of the chunk under
way. Without chunks attention is ``O(N^2)`` and all keys and values are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels.dense import masked_softmax
from regard.kernels.shapes import accumulation_dtype
from regard.layers.attention_functions import laplace, relu2
from regard.layers.ema import DampedEMA
from regard.layers.padding import layer_keys
from regard.layers.position_bias import RelativePositionBias, RotaryPositionBias
from regard.masks import Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["MegaBlock", "MegaFeedForward", "MegaLayer", "MegaState"]

FUNCTIONS = {"relu2": relu2, "laplace": laplace}
_STD = 0.02


@dataclass(frozen=True)
class MegaState:
    """Decoding state of one layer: the moving average ``(batch, embed_dim, ema_dim)``, and the keys ``(batch, held,
    z_dim)`` and values ``(batch, held, hidden_dim)`` of the chunk under way (``held < chunk_size``)."""

    moving: Tensor
    key: Tensor
    value: Tensor


@register("mega")
class MegaLayer(Layer):
    """Moving average and gated attention, ``(batch, length, embed_dim)`` in and out, norm and residual included.

    z_dim: of queries and keys (a quarter of the width by default). hidden_dim: of values (twice the width). ema_dim:
    averages of each channel; 0 leaves the moving average out. attention: ``"softmax"``, ``"relu2"`` or ``"laplace"``.
    chunk_size: of attention, None for the whole sequence. rel_pos: ``"simple"``, a table that reaches ``max_length``
    tokens (or a chunk), or ``"rotary"``, for any length. bidirectional: the average runs both ways, for encoders; such
    a layer is never causal. prenorm: the norm comes first, or after the residual. dropout: of the average and of the
    output before its gate; attention_dropout: of weights; hidden_dropout: of values. official: as in
    :func:`~regard.kernels.ema.damped_ema`.
    """

    patterns = frozenset({"self", "causal-self"})
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        z_dim: int | None = None,
        hidden_dim: int | None = None,
        ema_dim: int = 16,
        attention: str = "softmax",
        chunk_size: int | None = None,
        rel_pos: str = "simple",
        bidirectional: bool = False,
        prenorm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        max_length: int = 1024,
        official: bool = False,
    ) -> None:
        super().__init__()
        z_dim = max(embed_dim // 4, 1) if z_dim is None else z_dim
        hidden_dim = 2 * embed_dim if hidden_dim is None else hidden_dim
        if min(embed_dim, z_dim, hidden_dim, max_length, 1 if chunk_size is None else chunk_size) < 1:
            raise OptionError(
                "embed_dim, z_dim, hidden_dim, chunk_size and max_length are at least 1; got "
                f"{embed_dim}, {z_dim}, {hidden_dim}, {chunk_size} and {max_length}."
            )
        if attention not in ("softmax", *FUNCTIONS) or rel_pos not in ("simple", "rotary"):
            raise OptionError(
                "attention is 'softmax', 'relu2' or 'laplace', and rel_pos 'simple' or 'rotary'; got "
                f"{attention!r} and {rel_pos!r}."
            )
        self.embed_dim, self.z_dim, self.hidden_dim = embed_dim, z_dim, hidden_dim
        self.attention, self.chunk_size, self.prenorm = attention, chunk_size, prenorm
        self.norm = nn.LayerNorm(embed_dim)
        self.ema = DampedEMA(embed_dim, ema_dim, bidirectional=bidirectional, official=official)
        self.value = nn.Linear(embed_dim, hidden_dim)
        self.mix = nn.Linear(embed_dim, 2 * embed_dim + z_dim + hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)
        self.gain, self.shift = nn.Parameter(torch.empty(2, z_dim)), nn.Parameter(torch.zeros(2, z_dim))
        self.position: RelativePositionBias | RotaryPositionBias
        if rel_pos == "rotary":
            self.position = RotaryPositionBias(z_dim, _STD)
        else:
            self.position = RelativePositionBias((chunk_size or max_length,), 1)
            nn.init.normal_(self.position.table, std=_STD)
        self.dropout, self.attention_dropout = nn.Dropout(dropout), nn.Dropout(attention_dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        nn.init.normal_(self.gain, std=_STD)
        for linear in (self.value, self.mix, self.out):
            _small(linear)

    def extra_repr(self) -> str:
        return f"attention={self.attention!r}, chunk_size={self.chunk_size}, prenorm={self.prenorm}"

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out. mask: of keys alone (``KeyPadding``)."""
        if causal:
            self._require_one_way()
        keys = layer_keys(mask, x.shape[1], x.device, "MegaLayer")
        return self._run(x, None, causal, None if keys is None else keys[:, 0])[0]

    def init_state(self, batch: int, *, like: Tensor) -> MegaState:
        """The state before the first token."""
        nothing = like.new_zeros(batch, 0, self.z_dim), like.new_zeros(batch, 0, self.hidden_dim)
        return MegaState(self.ema.init_state(batch, like=like), *nothing)

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        """The next token or tokens ``(batch, tokens, embed_dim)``; gives the numbers of :meth:`forward`, causal."""
        self._require_one_way()
        out, moving, key, value = self._run(x, state, True, None)
        assert moving is not None
        begun = key.shape[1] if self.chunk_size is None else key.shape[1] % self.chunk_size
        # Copies: views would keep the keys and values of chunks that are over.
        key, value = (t[:, t.shape[1] - begun :].clone() for t in (key, value))
        return out, MegaState(moving, key, value)

    def _require_one_way(self) -> None:
        if self.ema.bidirectional:
            raise UnsupportedPatternError(
                "This layer's moving average runs both ways, so it sees the future; build it with bidirectional=False."
            )

    def _run(
        self, x: Tensor, state: MegaState | None, causal: bool, keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Output, moving average, and keys and values from the start of the chunk under way."""
        normed = self.norm(x) if self.prenorm else x
        value = F.silu(self.value(normed))
        moved, moving = self.ema(normed, None if state is None else state.moving, keys=keys)
        mixed = self.mix(self.dropout(F.silu(moved)))
        update, shared, reset, content = mixed.split([self.embed_dim, self.z_dim, self.hidden_dim, self.embed_dim], -1)
        query, key = (F.silu(shared)[..., None, :] * self.gain + self.shift).unbind(-2)
        if state is not None:
            key, value = torch.cat((state.key, key), 1), torch.cat((state.value, value), 1)
        read = self.attend(query, key, self.hidden_dropout(value), causal=causal, keys=keys)
        hidden = self.dropout(F.silu(content + self.out(F.silu(reset) * read)))
        out = x + update.sigmoid() * (hidden - x)
        return out if self.prenorm else self.norm(out), moving, key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, keys: Tensor | None = None
    ) -> Tensor:
        """Attention inside chunks, ``(batch, queries, hidden_dim)``.

        query ``(batch, queries, z_dim)``, of the last of the tokens; key ``(batch, tokens, z_dim)`` and value ``(batch,
        tokens, hidden_dim)`` from the start of the first query's chunk. keys: boolean ``(batch | 1, tokens)``.
        """
        tokens = key.shape[1]
        size = min(self.chunk_size or tokens, tokens)
        begun = tokens - query.shape[1]
        outs = []
        if begun or size == tokens:
            # The chunk under way, or the only one: its last queries against all of it.
            rows = size - begun
            seen = None if keys is None else keys[:, None, :size]
            outs.append(self._inside(query[:, None, :rows], key[:, None, :size], value[:, None, :size], causal, seen))
            query, key, value = query[:, rows:], key[:, size:], value[:, size:]
            keys = None if keys is None else keys[:, size:]
        if query.shape[1]:
            short = -query.shape[1] % size
            if short:
                shown = query.new_ones(1, query.shape[1], dtype=torch.bool) if keys is None else keys
                keys = F.pad(shown, (0, short))
                query, key, value = (F.pad(t, (0, 0, 0, short)) for t in (query, key, value))
            query, key, value = (t.unflatten(1, (-1, size)) for t in (query, key, value))
            outs.append(
                self._inside(query, key, value, causal, None if keys is None else keys.unflatten(1, (-1, size)))
            )
        out = torch.cat([out.flatten(1, 2) for out in outs], 1) if len(outs) > 1 else outs[0].flatten(1, 2)
        return out[:, : tokens - begun]

    def _inside(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, keys: Tensor | None) -> Tensor:
        """``(batch, chunks, queries, hidden_dim)``, the queries being the last of each chunk's tokens."""
        work = accumulation_dtype(query.dtype)
        rows, columns = query.shape[2], key.shape[2]
        visible = None if keys is None else keys[:, :, None]
        if causal:
            past = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
            visible = past if visible is None else visible & past
        products = query.to(work) @ key.to(work).transpose(-1, -2)
        bias = self.position_bias(rows, columns).to(work)
        if self.attention == "softmax":
            weights = masked_softmax(products * self.z_dim**-0.5 + bias, visible)
        else:
            count = columns if visible is None else visible.sum(-1, keepdim=True).clamp_min(1)
            weights = FUNCTIONS[self.attention](products / count + bias)
            weights = weights if visible is None else weights.masked_fill(~visible, 0)
        return (self.attention_dropout(weights) @ value.to(work)).to(value.dtype)

    def position_bias(self, rows: int, columns: int) -> Tensor:
        """The bias ``(rows, columns)`` of the last ``rows`` of ``columns`` tokens for all of them."""
        reach = self.position.window[0] if isinstance(self.position, RelativePositionBias) else columns
        if columns > reach:
            raise ShapeError(
                f"The table of positions reaches {reach} tokens, but attention spans {columns}. Build the layer with "
                "a larger max_length, with rel_pos='rotary', or with a chunk_size."
            )
        offsets = torch.arange(columns - 1, -rows, -1, device=self.gain.device)
        # A number per offset, from the farthest key back to the last; each row starts one further to the left.
        return self.position.at(offsets[:, None])[0].unfold(0, columns, 1).flip(0)


class MegaFeedForward(nn.Module):
    """``x + W_2 SiLU(W_1 norm(x))``, or with the norm at the end; ``(..., embed_dim)`` in and out."""

    def __init__(
        self, embed_dim: int, ffn_dim: int, prenorm: bool = True, dropout: float = 0.0, hidden_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm, self.prenorm = nn.LayerNorm(embed_dim), prenorm
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, ffn_dim),
            nn.SiLU(),
            nn.Dropout(hidden_dropout),
            nn.Linear(ffn_dim, embed_dim),
            nn.Dropout(dropout),
        )
        for linear in (self.layers[0], self.layers[3]):
            _small(cast(nn.Linear, linear))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape in and out."""
        out: Tensor = x + self.layers(self.norm(x) if self.prenorm else x)
        return out if self.prenorm else self.norm(out)


class MegaBlock(nn.Module):
    """A :class:`MegaLayer`, then a :class:`MegaFeedForward` of ``ffn_dim`` (by default ``hidden_dim``); options as in
    :class:`MegaLayer`."""

    def __init__(
        self,
        embed_dim: int,
        *,
        ffn_dim: int | None = None,
        prenorm: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"prenorm": prenorm, "dropout": dropout, "hidden_dropout": hidden_dropout}
        self.layer = MegaLayer(embed_dim, **shared, **options)
        self.ffn = MegaFeedForward(embed_dim, ffn_dim or self.layer.hidden_dim, **shared)

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | None = None) -> Tensor:
        """``(batch, length, embed_dim)`` in and out."""
        out: Tensor = self.ffn(self.layer(x, causal=causal, mask=mask))
        return out

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        """The next tokens over ``layer.init_state``."""
        mixed, state = self.layer.step(x, state)
        return self.ffn(mixed), state


def _small(linear: nn.Linear) -> None:
    """Mega's initial values of a linear map."""
    nn.init.normal_(linear.weight, std=_STD)
    nn.init.zeros_(linear.bias)
