"""The frame of linear attention: map queries and keys to features, update a state, normalise, correct.

A mechanism is a choice at each step; what its paper adds is the only code in its file. :class:`LinearMechanism` runs
the frame around :meth:`~LinearMechanism.map_features` and, where keys fade or are overwritten,
:meth:`~LinearMechanism.gates`; :func:`compose` builds a mechanism from steps that no paper combined::

    compose(feature_map="elu", update="delta", decay="learned", normalizer="rms", correction="conv")

    S_t = exp(g_t) S_{t-1} + phi(k_t)^T v_t                                             update="sum"
    S_t = exp(g_t) (I - beta_t phi(k_t)^T phi(k_t)) S_{t-1} + beta_t phi(k_t)^T v_t     update="delta"
    o_t = normalise(phi(q_t) S_t) + correction_t

With the defaults it is the linear transformer of Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236,
equations 8 to 12; fixed decays make it a retention (Sun et al., 2023, arXiv 2307.08621), the delta rule a fast weight
programmer (Schlag et al., 2021, arXiv 2102.11174). Gates that a token's own input sets are
:class:`regard.linear.gated.GatedLinearAttention`'s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels import LinearState, delta_rule, expand_groups, linear_attention
from regard.layers.causal_conv import CausalConv
from regard.layers.feature_maps import poly_features, poly_width, unit_vectors
from regard.layers.norms import srms_norm
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = ["FEATURE_MAPS", "ComposedLinear", "FrameState", "LinearMechanism", "compose"]

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp_max(0).exp()),
    "relu": F.relu,
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
    "taylor": lambda x: poly_features(x * x.shape[-1] ** -0.25, 2),
    "identity": lambda x: x,
}
"""Maps on the last axis by name. ``elu``: ``elu(x) + 1``, which for negative numbers is exp. ``taylor``: softmax's
exponential up to its square, with ``(d + 1) (d + 2) / 2`` features."""
UPDATES, NORMALIZERS = ("sum", "delta"), ("sum", "rms", "none")


@dataclass(frozen=True)
class FrameState:
    """Decoding state: the sum (None before the first token, whose heads and sizes it takes), and what a correction
    needs of the last tokens. It can be saved, and moves between the forms."""

    running: LinearState | None = None
    tail: Tensor | None = None


class LinearMechanism(Mechanism):
    """A mechanism whose keys and values are kept as one state of fixed size.

    Three forms, all through :mod:`regard.kernels`: parallel and chunked over a whole sequence, and token by token.
    """

    patterns = frozenset({"self", "cross", "causal-self"})
    mask_support = "keys"
    needs_training = True
    decodes = True
    growth = "N"
    chunk_size: int = 64
    normalize: bool = True
    """Whether outputs are divided by the sum of scores, plus ``normalizer_eps``."""
    normalizer_eps: float = 1e-6
    update: str = "sum"

    @abstractmethod
    def map_features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``phi`` of queries ``(batch, num_heads, q_len, d)`` and keys ``(batch, kv_heads, k_len, d)``; keys may come
        back with all query heads."""

    def gates(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Log-decay ``(num_heads,)``, ``(batch, num_heads, length)`` or with a channel axis, and, with the delta rule,
        how much is overwritten ``(batch, num_heads, length)``."""
        return None, None

    def correct(
        self, out: Tensor, value: Tensor, keys: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The finished output, and what the next tokens need of these; ``out`` is in the accumulation dtype."""
        return out, tail

    def feature_dim(self, head_dim: int) -> int:
        """How many features a head has."""
        return head_dim

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        scale = 1.0 if request.scale is None else request.scale
        return self._run(query, key, value, FrameState(), request.causal, request.keys, scale)[0]

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> FrameState:
        self._own_state(cache)
        return FrameState()

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: FrameState) -> tuple[Tensor, FrameState]:
        return self._run(query, key, value, state, True, None, 1.0)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: FrameState,
        causal: bool,
        keys: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, FrameState]:
        """keys: which are there, ``(batch | 1, heads | 1, k_len)``; the others leave the state as it was, but for its
        fading."""
        q, k = self.map_features(query, key)
        if keys is not None:
            hidden = ~keys[..., None]
            k, value = (expand_groups(t, q.shape[1]).masked_fill(hidden, 0) for t in (k, value))
        log_decay, beta = self.gates(q)
        if self.update == "delta":
            assert beta is not None
            if log_decay is not None and log_decay.dim() == 1:
                log_decay = log_decay[:, None].expand(beta.shape)
            out, running = delta_rule(
                q,
                k,
                value,
                beta,
                log_decay=log_decay,
                state=state.running,
                scale=scale,
                chunk_size=self.chunk_size,
            )
        else:
            out, running = linear_attention(
                q,
                k,
                value,
                causal=causal,
                log_decay=log_decay,
                normalize=self.normalize,
                eps=self.normalizer_eps,
                scale=scale,
                state=state.running,
                chunk_size=self.chunk_size,
            )
        out, tail = self.correct(out, value, keys, state.tail)
        return out.to(query.dtype), FrameState(running, tail)

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        features = self.feature_dim(shape.head_dim)
        whole = linear_cost(shape, features, self.chunk_size if shape.causal else None)
        # Without a normaliser no sum of keys stands beside the state.
        state = shape.batch * shape.num_heads * features * (shape.v_dim + self.normalize) * 4
        return replace(whole, bytes=whole.bytes - whole.state_bytes + state, state_bytes=state)


@register("linear_attention")
class ComposedLinear(LinearMechanism):
    """Linear attention from steps of one's own choice, by default that of Katharopoulos et al.

    feature_map: a name in :data:`FEATURE_MAPS`. update: ``"sum"``, or ``"delta"`` on features of unit length, with a
    strength that is learned per head from one half. decay: None, slopes per head, or ``"learned"`` (the ``sigmoid`` of
    a number per head, from 1 - 1/32 to 1 - 1/512 as in a retention). normalizer: ``"sum"`` of scores, ``"rms"`` (root
    mean square of each head's output) or ``"none"``. correction: None, or ``"conv"``, a causal convolution of
    ``kernel_size`` tokens on the values of each channel, added; it begins as zero. A decay, the delta rule and the
    convolution have an order of tokens: with them it is causal alone. ``scale`` multiplies scores, so that with a sum
    of scores it changes nothing.
    """

    def __init__(
        self,
        feature_map: str = "elu",
        update: Literal["sum", "delta"] = "sum",
        decay: Literal["learned"] | Sequence[float] | None = None,
        normalizer: Literal["sum", "rms", "none"] | None = None,
        correction: Literal["conv"] | None = None,
        kernel_size: int = 4,
        chunk_size: int = 64,
        eps: float = 1e-6,
        num_heads: int = 1,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise UnknownNameError("feature map", feature_map, FEATURE_MAPS, f"There are: {', '.join(FEATURE_MAPS)}.")
        if normalizer is None:
            normalizer = "none" if update == "delta" else "sum"
        if update not in UPDATES or normalizer not in NORMALIZERS or correction not in (None, "conv"):
            raise OptionError(
                f"update is one of {', '.join(UPDATES)}, normalizer one of {', '.join(NORMALIZERS)}, correction 'conv' "
                f"or None; got {update!r}, {normalizer!r}, {correction!r}."
            )
        if update == "delta" and normalizer == "sum":
            raise OptionError("The delta rule has no sum of scores to divide by; take normalizer='rms' or 'none'.")
        if chunk_size < 1:
            raise OptionError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.feature_map, self.update, self.normalizer, self.correction = feature_map, update, normalizer, correction
        self.normalize, self.normalizer_eps, self.chunk_size = normalizer == "sum", eps, chunk_size
        self.num_heads, self.head_dim = num_heads, head_dim
        if update == "delta" or decay is not None or correction is not None:
            self.patterns = frozenset({"causal-self"})  # type: ignore[misc]
        self.strength = nn.Parameter(torch.zeros(num_heads)) if update == "delta" else None
        self.keep: nn.Parameter | None = None
        self.slopes: tuple[float, ...] | None = None
        if decay == "learned":
            kept = 1 - 2 ** -torch.linspace(5, 9, num_heads)
            self.keep = nn.Parameter(kept.logit())
        elif decay is not None:
            self.slopes = tuple(float(slope) for slope in decay)
            if len(self.slopes) != num_heads or any(not slope >= 0 for slope in self.slopes):
                raise OptionError(f"decay gives one slope >= 0 for each of {num_heads} heads, got {list(decay)}.")
        self.conv: CausalConv | None = None
        if correction is not None:
            self.conv = CausalConv(num_heads * head_dim, kernel_size, bias=False)
            nn.init.zeros_(self.conv.weight)

    def extra_repr(self) -> str:
        return f"{self.feature_map!r}, update={self.update!r}, normalizer={self.normalizer!r}"

    def feature_dim(self, head_dim: int) -> int:
        return poly_width(head_dim, 2) if self.feature_map == "taylor" else head_dim

    def map_features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = FEATURE_MAPS[self.feature_map]
        query, key = feature_map(query), feature_map(key)
        return (unit_vectors(query), unit_vectors(key)) if self.update == "delta" else (query, key)

    def gates(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.keep is not None or self.slopes is not None or self.strength is not None:
            self._check_heads(query)
        log_decay = None if self.keep is None else F.logsigmoid(self.keep)
        if self.slopes is not None:
            log_decay = -torch.tensor(self.slopes, dtype=query.dtype, device=query.device)
        if self.strength is None:
            return log_decay, None
        beta = self.strength.sigmoid()[:, None].expand(*query.shape[:3])
        return log_decay, beta

    def _check_heads(self, query: Tensor) -> None:
        if query.shape[1] != self.num_heads:
            raise ShapeError(
                f"This mechanism was built for {self.num_heads} heads and got {query.shape[1]}; build it with "
                f"num_heads={query.shape[1]}."
            )

    def correct(
        self, out: Tensor, value: Tensor, keys: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.normalizer == "rms":
            out = srms_norm(out)
        if self.conv is None:
            return out, tail
        near = expand_groups(value, out.shape[1])
        if near.shape[1] * near.shape[-1] != self.conv.channels:
            raise ShapeError(
                f"The convolution was built for {self.num_heads} heads of {self.head_dim} channels and got values of "
                f"{near.shape[1]} heads of {near.shape[-1]}; build it with these as num_heads and head_dim."
            )
        moved, tail = self.conv(near.transpose(1, 2).flatten(2), tail)
        return out + moved.unflatten(-1, (self.num_heads, -1)).transpose(1, 2), tail


def compose(
    feature_map: str = "elu",
    *,
    update: Literal["sum", "delta"] = "sum",
    decay: Literal["learned"] | Sequence[float] | None = None,
    normalizer: Literal["sum", "rms", "none"] | None = None,
    correction: Literal["conv"] | None = None,
    num_heads: int = 1,
    head_dim: int = 64,
    chunk_size: int = 64,
) -> ComposedLinear:
    """Linear attention from a feature map, an update, a normaliser and a correction; options as in
    :class:`ComposedLinear`. Raises OptionError where steps contradict each other, UnknownNameError for unknown maps."""
    return ComposedLinear(
        feature_map,
        update,
        decay,
        normalizer,
        correction,
        chunk_size=chunk_size,
        num_heads=num_heads,
        head_dim=head_dim,
    )
