"""Attention taken apart: variants that each give up one of its principles, behind one call.

Xue, Moosavi and Aletras, "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025, arXiv 2510.11602, section 3 and appendix I. With hidden states H, per head of d channels, and causal softmax:

    standard        A = softmax(Q K^T / sqrt(d)),  Q, K, V = H W,  O = A V W_O
    mlp             O = (SiLU(H W_G) * (H W_U)) W_D: no token is mixed with another
    approximate     exp(s) becomes 1 + s + s^2 / 2 (Taylor), over its row sum
    nonapproximate  A_ij = exp(s_j) / sum over l <= i of exp(s_l),  s_j = SiLU(H W_Q)_j . (H W_K)_j / sqrt(d)
    rnd_emb_qk      Q, K = X W:  X is what the layers before make of random vectors, the same for every input
    fixed_seq_qk    Q, K = X W:  X is what the layers before make of one fixed text
    static_emb_qk   Q, K = e W:  e are the token embeddings, in every layer

:data:`PRINCIPLES` says which principles each keeps. Where queries and keys come from is the call's ``source``; a model
that feeds it is :class:`regard.models.deconstructed_attention.TinyLM`. All have the parameters of standard attention,
4 embed_dim^2 (mlp: three matrices of width 4/3 embed_dim). Rotary positions on Q and K, as in the paper's base model
(they cancel in ``nonapproximate``). The paper's appendix prints the Taylor terms divided each by a sum of its own; here
one sum divides all three, so that rows add up to one as in its equation 6.

Cost: standard and static_emb_qk that of attention; rnd_emb_qk and fixed_seq_qk form their map once for a whole batch;
approximate is linear in length with ``(d + 1) (d + 2) / 2`` features, nonapproximate with one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, dense_cost, linear_cost, linear_layer_flops
from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.kernels import accumulation_dtype, dense_attention, linear_attention
from regard.kernels.dense import dense_weights, masked_softmax
from regard.layers.feature_maps import poly_features, poly_width, taylor_exp
from regard.layers.heads import head_sizes
from regard.layers.padding import layer_keys
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["KINDS", "PRINCIPLES", "AttentionVariant", "Principles", "kinds_that"]

_CHUNK = 64
# Added to sums that are at least one half where anything is seen.
_EPS = 1e-12


@dataclass(frozen=True)
class Principles:
    """Which design principles of attention hold (the paper's section 1)."""

    token_mixing: bool
    sequence_dependence: bool
    softmax_dot_product: bool
    current_hidden_state: bool


PRINCIPLES: dict[str, Principles] = {
    "standard": Principles(True, True, True, True),
    "mlp": Principles(False, False, False, False),
    "approximate": Principles(True, True, False, True),
    "nonapproximate": Principles(True, True, False, True),
    "rnd_emb_qk": Principles(True, False, True, False),
    "fixed_seq_qk": Principles(True, False, True, False),
    "static_emb_qk": Principles(True, True, True, False),
}
"""By kind; ``mlp`` has no attention weights that could keep any of them."""
KINDS = tuple(PRINCIPLES)
_FIXED = ("rnd_emb_qk", "fixed_seq_qk")


def kinds_that(**principles: bool) -> tuple[str, ...]:
    """The kinds that keep (True) or drop (False) the named principles, such as ``kinds_that(token_mixing=False)``."""
    known = Principles.__dataclass_fields__
    for name in principles:
        if name not in known:
            raise UnknownNameError("principle", name, known, f"There are: {', '.join(known)}.")
    return tuple(k for k, p in PRINCIPLES.items() if all(getattr(p, n) == want for n, want in principles.items()))


@register("deconstructed_attention")
class AttentionVariant(Layer):
    """``(batch, length, embed_dim)`` in and out.

    kind: one of :data:`KINDS`. max_length: with rnd_emb_qk and fixed_seq_qk, the length of the frozen random vectors
    that stand in where a call gives no ``source``; None for none. rotary: positions on queries and keys.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kind: str = "standard",
        *,
        head_dim: int | None = None,
        max_length: int | None = 2048,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        if kind not in PRINCIPLES:
            raise UnknownNameError("attention variant", kind, KINDS, f"There are: {', '.join(KINDS)}.")
        self.kind, self.embed_dim, self.num_heads, self.rotary = kind, embed_dim, num_heads, rotary
        self.head_dim = head_sizes(embed_dim, num_heads, None, head_dim)[1]
        width = num_heads * self.head_dim
        self.frozen: Tensor | None
        self.register_buffer("frozen", None)
        if kind == "mlp":
            self.hidden_dim = round(4 * width / 3)
            self.gate, self.up = (nn.Linear(embed_dim, self.hidden_dim, bias=False) for _ in range(2))
            self.out = nn.Linear(self.hidden_dim, embed_dim, bias=False)
            return
        self.query, self.key, self.value = (nn.Linear(embed_dim, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, embed_dim, bias=False)
        if kind in _FIXED and max_length is not None:
            self.frozen = torch.randn(max_length, embed_dim)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, {self.num_heads} heads"

    @property
    def principles(self) -> Principles:
        """Which principles of attention hold."""
        return PRINCIPLES[self.kind]

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Attend. mask: a regard mask or a boolean tensor; approximate and nonapproximate take masks of keys alone.

        source ``(batch | 1, length, embed_dim)``: what queries and keys are made from in rnd_emb_qk and fixed_seq_qk
        (default: frozen random vectors) and static_emb_qk (default: ``x``, as in a first layer). Others refuse it.
        """
        self._check(x)
        if self.kind == "mlp":
            return self._out(F.silu(self.gate(x)) * self.up(x))
        query, key = self.query_key(x, source)
        value = self._heads(self.value(x))
        rule = Boolean(mask) if isinstance(mask, Tensor) else mask
        if self.kind == "approximate":
            keys = layer_keys(rule, x.shape[1], x.device, "The Taylor approximation")
            heads = self._taylor(query, key, value, causal, keys)
        elif self.kind == "nonapproximate":
            keys = layer_keys(rule, x.shape[1], x.device, "Self-gating attention")
            heads = self._gated(query, key, value, causal, keys)
        elif len(query) < len(x) and (rule is None or rule.batch == 1):
            # One map for the whole batch: the batch's values stand side by side in its channels.
            joined = value.permute(1, 2, 0, 3).flatten(2)[None]
            read = dense_attention(query, key, joined, causal=causal, mask=rule)
            heads = read[0].unflatten(-1, (len(x), self.head_dim)).permute(2, 0, 1, 3)
        else:
            query, key = (t.expand(len(x), -1, -1, -1) for t in (query, key))
            heads = dense_attention(query, key, value, causal=causal, mask=rule)
        return self._out(heads.transpose(1, 2).flatten(2))

    def query_key(self, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys ``(batch | 1, num_heads, length, head_dim)`` for ``x``, rotated where that matters."""
        origin = self._source(x, source)
        query, key = self._heads(self.query(origin)), self._heads(self.key(origin))
        if self.kind == "nonapproximate":
            return F.silu(query), key
        if self.rotary:
            cos, sin = rotary_angles(x.shape[1], self.head_dim, device=x.device, dtype=x.dtype)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        return query, key

    def weights(self, x: Tensor, *, causal: bool = False, source: Tensor | None = None) -> Tensor:
        """The map A ``(batch | 1, num_heads, length, length)``, whole, by its definition."""
        self._check(x)
        if self.kind == "mlp":
            raise UnsupportedPatternError("The mlp variant mixes no tokens, so it has no attention weights.")
        query, key = self.query_key(x, source)
        length, device = x.shape[1], x.device
        if self.kind not in ("approximate", "nonapproximate"):
            return dense_weights(query, key, causal=causal)
        visible = Causal().dense(length, length, device) if causal else torch.ones(length, length).bool().to(device)
        work = accumulation_dtype(x.dtype)
        if self.kind == "nonapproximate":
            scores = self._self_scores(query, key)[:, :, None].expand(-1, -1, length, -1)
            return masked_softmax(scores, visible).to(x.dtype)
        scores = query.to(work) @ key.to(work).transpose(-1, -2) * self.head_dim**-0.5
        powers = taylor_exp(scores, 2).masked_fill(~visible, 0)
        return (powers / powers.sum(-1, keepdim=True)).to(x.dtype)

    def flops(self, length: int, batch: int = 1) -> int:
        """Of one causal forward pass, counted as :mod:`regard.cost` does; a source is projected once for the batch in
        rnd_emb_qk and fixed_seq_qk."""
        tokens, width = batch * length, self.num_heads * self.head_dim
        if self.kind == "mlp":
            return 3 * linear_layer_flops(tokens, self.embed_dim, self.hidden_dim)
        one = linear_layer_flops(tokens, self.embed_dim, width)
        shape = AttentionShape(length, length, self.num_heads, self.head_dim, batch, causal=True)
        if self.kind == "approximate":
            return 4 * one + linear_cost(shape, poly_width(self.head_dim, 2), _CHUNK).flops
        if self.kind == "nonapproximate":
            return 4 * one + linear_cost(shape, 1, _CHUNK).flops
        if self.kind in _FIXED:
            folded = AttentionShape(length, length, self.num_heads, self.head_dim, value_dim=batch * self.head_dim)
            return 2 * one + 2 * one // batch + dense_cost(folded).flops
        return 4 * one + dense_cost(shape).flops

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"AttentionVariant takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")

    def _source(self, x: Tensor, source: Tensor | None) -> Tensor:
        if self.principles.current_hidden_state:
            if source is not None:
                raise OptionError(f"{self.kind} takes queries and keys from its input; leave source out.")
            return x
        if source is None:
            if self.kind == "static_emb_qk":
                return x
            if self.frozen is None:
                raise OptionError(f"{self.kind} needs a source: this layer was built with max_length=None.")
            if x.shape[1] > len(self.frozen):
                raise ShapeError(f"{x.shape[1]} tokens exceed max_length {len(self.frozen)}.")
            return self.frozen[None, : x.shape[1]]
        if source.dim() != 3 or source.shape[1:] != x.shape[1:] or len(source) not in (1, len(x)):
            raise ShapeError(
                f"A source is (batch or 1, length, embed_dim) like x {tuple(x.shape)}, got {tuple(source.shape)}."
            )
        return source

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _out(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.out(hidden)
        return out

    def _taylor(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, keys: Tensor | None) -> Tensor:
        work, root = accumulation_dtype(query.dtype), self.head_dim**-0.25
        query, key = (poly_features(t.to(work) * root, 2) for t in (query, key))
        if keys is not None:
            key = key.masked_fill(~keys[..., None], 0)
        out, _ = linear_attention(
            query, key, value.to(work), causal=causal, normalize=True, eps=_EPS, chunk_size=_CHUNK
        )
        return out.to(value.dtype)

    def _self_scores(self, query: Tensor, key: Tensor) -> Tensor:
        """``s_j``, ``(batch, num_heads, length)``."""
        work = accumulation_dtype(query.dtype)
        return (query.to(work) * key.to(work)).sum(-1) * self.head_dim**-0.5

    def _gated(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, keys: Tensor | None) -> Tensor:
        """Sums of ``exp(s_j) v_j`` and ``exp(s_j)`` carried along, each relative to the largest ``s`` so far."""
        scores = self._self_scores(query, key)
        hidden = None if keys is None else ~keys.expand(scores.shape)
        seen = scores.detach() if hidden is None else scores.detach().masked_fill(hidden, float("-inf"))
        most = seen.cummax(-1).values if causal else seen.amax(-1, keepdim=True).expand(seen.shape)
        most = most.masked_fill(most.isinf(), 0)  # nothing seen so far
        mass = (scores - most).exp() if hidden is None else (scores - most).masked_fill(hidden, float("-inf")).exp()
        fade = None
        if causal:
            before = torch.cat((most[..., :1], most[..., :-1]), -1)
            fade = (before - most).clamp_max(0)
        out, _ = linear_attention(
            torch.ones_like(mass)[..., None],
            mass[..., None],
            value.to(mass.dtype),
            causal=causal,
            log_decay=fade,
            normalize=True,
            eps=_EPS,
            chunk_size=_CHUNK,
        )
        return out.to(value.dtype)
