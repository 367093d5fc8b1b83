"""Dual attention: some heads carry what other tokens are, others how they relate to the receiver.

Altabaa and Lafferty, "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
2024, arXiv 2405.16727. Sensory heads are ordinary attention. A relational head h sends relations tagged with a symbol
that says who the sender is, not what it is:

    alpha_ij = softmax_j((W_q^a x_i) . (W_k^a x_j) / sqrt(d_h)),  r_ij^l = act((W_q^l x_i) . (W_k^l x_j) / sqrt(d_r))
    out_i = sum_j alpha_ij (W_r r_ij + W_s s_j) = W_r sum_j alpha_ij r_ij + sum_j alpha_ij W_s s_j

The relations r_ij in R^R are shared by all relational heads; ``symmetric`` ties W_k^l to W_q^l. Symbols come from a
retriever (:mod:`regard.layers.symbols`). Each kind of head has its own square output map, and the two are concatenated.
Attention and relation have separate parameters, which is the disentangling. Rotary positions go on attention alone.

Cost: one attention and R more inner products of width d_r per pair. Queries go in tiles that the backward pass computes
again: memory is linear in length (the released code keeps N^2 R numbers). Decoding keeps keys, values, relation keys
and projected symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from regard.cache import DynamicCache
from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.kernels.scored import ReadOut, Tile, scored_attention
from regard.kernels.shapes import accumulation_dtype
from regard.layers.attention_functions import ACTIVATIONS
from regard.layers.heads import head_sizes
from regard.layers.maps import merge_heads, split_heads
from regard.layers.normalizers import NORMALIZERS
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.layers.scorers import relations
from regard.layers.symbols import symbol_retriever
from regard.masks import Boolean, Causal, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["DualAttention", "DualState", "RelationalAttention", "RelationalCrossAttention"]


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise OptionError(f"rel_activation is one of {', '.join(ACTIVATIONS)}; got {name!r}.")
    return ACTIVATIONS[name]


def _rule(causal: bool, mask: Mask | Tensor | None) -> Mask | None:
    rule = Boolean(mask) if isinstance(mask, Tensor) else mask
    if not causal:
        return rule
    return Causal() if rule is None else rule & Causal()


def _dot(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
    return (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)


def _by_offset(weights: Tensor, tile: Tile, reach: int) -> Tensor:
    """Weights added up by clamped offset from receiver to sender: ``(batch, heads, rows, 2 reach + 1)``."""
    offset = torch.arange(tile.k_len, device=weights.device) - tile.positions(weights.device)[:, None]
    index = (offset.clamp(-reach, reach) + reach).expand(weights.shape)
    return weights.new_zeros(*weights.shape[:3], 2 * reach + 1).scatter_add(-1, index, weights)


@dataclass
class DualState:
    """What decoding keeps: sensory keys and values, attention keys and symbols, and relation keys of the past."""

    sensory: DynamicCache = field(default_factory=DynamicCache)
    attention: DynamicCache = field(default_factory=DynamicCache)
    relation: DynamicCache = field(default_factory=DynamicCache)
    seen: int = 0

    def nbytes(self) -> int:
        """Bytes of storage held."""
        return sum(cache.nbytes() for cache in (self.sensory, self.attention, self.relation))


class _Projected(nn.Module):
    """Heads of width ``embed_dim / total_heads`` with query, key, value and a square output map."""

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int | None, total_heads: int | None) -> None:
        super().__init__()
        _, self.head_dim = head_sizes(embed_dim, total_heads or num_heads)
        self.num_kv_heads, _ = head_sizes(embed_dim, num_heads, num_kv_heads, self.head_dim)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=False)
        self.key, self.value = (nn.Linear(embed_dim, kv_width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)

    def pair(self, x: Tensor, rotary: bool, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys of attention."""
        query = split_heads(self.query(x), self.num_heads)[0]
        key = split_heads(self.key(x), self.num_kv_heads)[0]
        if rotary:
            angles = rotary_angles(x.shape[1], self.head_dim, start=start, device=x.device, dtype=x.dtype)
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        return query, key

    def check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"{type(self).__name__} takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")

    def tagged(self, x: Tensor, symbols: Tensor, relative: bool = False) -> Tensor | None:
        """Projected symbols per token ``(batch, kv_heads, length, head_dim)``; None where they go by pairs."""
        table, length = symbols.dim() == 2, x.shape[1]
        expected = (len(symbols) | 1,) if table else (length, length) if relative else tuple(x.shape[:2])
        if tuple(symbols.shape) != (*expected, self.embed_dim):
            raise ShapeError(
                f"Symbols come one a token {tuple(x.shape)}, as a table of an odd number of offsets (2 m + 1, "
                f"{self.embed_dim}) or, with relative=True, one a pair {(length, length, self.embed_dim)}; got "
                f"{tuple(symbols.shape)}."
            )
        if table or relative:
            return None
        return split_heads(self.value(symbols), self.num_kv_heads)[0]

    def reader(self, symbols: Tensor, work: torch.dtype) -> ReadOut:
        """How weights read symbols out where these go by pairs: a table of offsets, or every pair's own."""
        heads = self.value(symbols).unflatten(-1, (self.num_kv_heads, -1)).to(work)
        heads = heads.repeat_interleave(self.num_heads // self.num_kv_heads, -2)
        if symbols.dim() == 2:
            return lambda weights, query, key, value, tile: torch.einsum(
                "bhio,ohd->bhid", _by_offset(weights, tile, len(symbols) // 2), heads
            )
        return lambda weights, query, key, value, tile: torch.einsum(
            "bhij,ijhd->bhid", weights, heads[tile.start : tile.start + tile.rows]
        )


class RelationalAttention(_Projected):
    """Relational heads: ``x`` and symbols, both ``(batch, length, embed_dim)``, to ``(batch, length, num_heads *
    head_dim)``.

    num_relations: R (default: ``num_heads``). rel_proj_dim: d_r (default: ``head_dim * num_heads / R``). symmetric:
    ``r_ij = r_ji``. rel_activation: on relations, by name. num_kv_heads: of attention keys and symbols. total_heads:
    ``head_dim = embed_dim / total_heads`` (default: ``num_heads``), as other heads stand beside these. relative: a
    third-rank ``symbols`` holds a symbol for every pair, ``(length, length, embed_dim)``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_relations: int | None = None,
        rel_proj_dim: int | None = None,
        symmetric: bool = False,
        rel_activation: str = "identity",
        num_kv_heads: int | None = None,
        total_heads: int | None = None,
        *,
        relative: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, total_heads)
        self.num_relations = num_relations or num_heads
        self.rel_proj_dim = rel_proj_dim or max(self.head_dim * num_heads // self.num_relations, 1)
        self.activation = _activation(rel_activation)
        self.relative, self.rotary = relative, rotary
        self.rel_query = nn.Linear(embed_dim, self.num_relations * self.rel_proj_dim, bias=False)
        self.rel_key = self.rel_query if symmetric else nn.Linear(embed_dim, self.rel_query.out_features, bias=False)
        self.rel_out = nn.Parameter(torch.empty(num_heads, self.head_dim, self.num_relations))
        nn.init.kaiming_uniform_(self.rel_out, a=5**0.5)

    def relations(self, x: Tensor) -> Tensor:
        """``r (batch, length, length, num_relations)``, whole."""
        query, key = (split_heads(linear(x), self.num_relations)[0] for linear in (self.rel_query, self.rel_key))
        return relations(query, key, self.activation).permute(0, 2, 3, 1)

    def weights(self, x: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """``alpha (batch, num_heads, length, length)``, whole."""
        query, key = self.pair(x, self.rotary)
        key = key.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        tile = Tile(0, x.shape[1], x.shape[1], x.shape[1])
        return NORMALIZERS["softmax"](
            query @ key.transpose(-1, -2) * self.head_dim**-0.5, tile.visible(_rule(causal, mask), x.device)
        )

    def forward(
        self,
        x: Tensor,
        symbols: Tensor,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        state: DualState | None = None,
    ) -> Tensor:
        """Attend. symbols: of each token, or a table of offsets ``(2 m + 1, embed_dim)`` with offset 0 in its middle.

        mask: a regard mask or a boolean tensor, True where visible. state: of decoding, which is added to.
        """
        self.check(x)
        query, key = self.pair(x, self.rotary, 0 if state is None else state.seen)
        rel_query, rel_key = (split_heads(m(x), self.num_relations)[0] for m in (self.rel_query, self.rel_key))
        value = self.tagged(x, symbols, self.relative)
        work = accumulation_dtype(x.dtype)
        by_pair = self.reader(symbols, work) if value is None else None
        value = key[..., :0] if value is None else value
        if state is not None:
            kept = state.attention.append(key, value)
            key, value = kept.key, kept.value
            rel_key = state.relation.append(rel_key, rel_key[..., :0]).key
        rel_query, rel_key = rel_query.to(work), rel_key.to(work)

        def read(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
            part = rel_query[:, :, tile.start : tile.start + tile.rows]
            gathered = torch.einsum("bhij,brij->bhir", weights, relations(part, rel_key, self.activation))
            senders = weights @ value if by_pair is None else by_pair(weights, query, key, value, tile)
            return senders + gathered @ self.rel_out.to(work).transpose(-1, -2)

        heads = scored_attention(
            query,
            key,
            value,
            _dot,
            NORMALIZERS["softmax"],
            rule=_rule(causal, mask),
            read=read,
            per_pair=1 + -(-self.num_relations // self.num_heads),
        )
        out: Tensor = self.out(merge_heads(heads))
        return out


class RelationalCrossAttention(_Projected):
    """The ablations: symbols read out by relations themselves. ``x`` and symbols as in :class:`RelationalAttention`.

    Altabaa et al., "Abstractors and relational cross-attention", 2023, arXiv 2304.00195: ``sum_j a(x_i, x_j) s_j``, the
    relation being the attention; activation: ``"softmax"`` or a name of ``rel_activation`` (hidden pairs are zeroed).
    disentangled: ``sum_j alpha_ij r_ij s_j`` with softmax attention and a relation per head, each with its own
    parameters; activation is then the relation's.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        disentangled: bool = False,
        activation: str | None = None,
        num_kv_heads: int | None = None,
        total_heads: int | None = None,
        *,
        relative: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, total_heads)
        activation = activation or ("identity" if disentangled else "softmax")
        plain = activation == "softmax" and not disentangled
        self.activation = None if plain else _activation(activation)
        self.disentangled, self.relative, self.rotary = disentangled, relative, rotary
        self.rel_query, self.rel_key = (
            nn.Linear(embed_dim, self.query.out_features, bias=False) if disentangled else None for _ in range(2)
        )

    def forward(self, x: Tensor, symbols: Tensor, *, causal: bool = False, mask: Mask | Tensor | None = None) -> Tensor:
        """``(batch, length, num_heads * head_dim)``."""
        self.check(x)
        work = accumulation_dtype(x.dtype)
        query, key = self.pair(x, self.rotary)
        value = self.tagged(x, symbols, self.relative)
        by_pair = self.reader(symbols, work) if value is None else None
        relation = None
        if self.rel_query is not None and self.rel_key is not None:
            relation = tuple(split_heads(m(x), self.num_heads)[0].to(work) for m in (self.rel_query, self.rel_key))
        activation = self.activation

        def normalize(scores: Tensor, visible: Tensor | None) -> Tensor:
            if activation is None or relation is not None:
                return NORMALIZERS["softmax"](scores, visible)
            return activation(scores) if visible is None else activation(scores) * visible

        def read(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
            if relation is not None and activation is not None:
                part = relation[0][:, :, tile.start : tile.start + tile.rows]
                weights = weights * relations(part, relation[1], activation)
            return weights @ value if by_pair is None else by_pair(weights, query, key, value, tile)

        value = key[..., :0] if value is None else value
        heads = scored_attention(query, key, value, _dot, normalize, rule=_rule(causal, mask), read=read, per_pair=2)
        out: Tensor = self.out(merge_heads(heads))
        return out


@register("dual_attention")
class DualAttention(Layer):
    """``(batch, length, embed_dim)`` in and out: sensory heads, then relational ones, side by side.

    num_heads: of both kinds; relational_heads: of them (default: half; 0 is multi-head attention, without biases as
    released). symbols: the retriever, ``"symbolic"``, ``"positional"``, ``"relative"`` or ``"relational"``, with
    symbol_options; None where a model passes symbols to ``forward``, as models whose blocks share one do. relation:
    ``"disentangled"`` or an ablation, ``"cross"`` or ``"disentangled_cross"`` (:class:`RelationalCrossAttention`).
    share_attn_params: one W_q, W_k of attention for both kinds, of which there must be equally many. Other options: of
    :class:`RelationalAttention`. rotary: rotary positions on the attention of both kinds.
    """

    patterns = frozenset(("self", "causal-self"))
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        relational_heads: int | None = None,
        share_attn_params: bool = False,
        *,
        num_relations: int | None = None,
        rel_proj_dim: int | None = None,
        symmetric: bool = False,
        rel_activation: str = "identity",
        symbols: str | None = "symbolic",
        symbol_options: Mapping[str, int] | None = None,
        relation: str = "relational",
        rotary: bool = False,
    ) -> None:
        super().__init__()
        relational = num_heads // 2 if relational_heads is None else relational_heads
        sensory = num_heads - relational
        if relational < 0 or sensory < 0:
            raise OptionError(f"relational_heads {relational} must lie between 0 and num_heads {num_heads}.")
        if share_attn_params and sensory != relational:
            raise OptionError(f"share_attn_params needs equally many heads of both kinds; got {sensory}, {relational}.")
        if relation not in ("relational", "cross", "disentangled_cross"):
            raise OptionError(f"relation is 'relational', 'cross' or 'disentangled_cross'; got {relation!r}.")
        self.embed_dim, self.num_heads, self.relational_heads, self.rotary = embed_dim, num_heads, relational, rotary
        self.sensory = _Projected(embed_dim, sensory, None, num_heads) if sensory else None
        self.relational: RelationalAttention | RelationalCrossAttention | None = None
        if relational and relation == "relational":
            self.relational = RelationalAttention(
                embed_dim,
                relational,
                num_relations,
                rel_proj_dim,
                symmetric,
                rel_activation,
                total_heads=num_heads,
                rotary=rotary,
            )
        elif relational:
            self.relational = RelationalCrossAttention(
                embed_dim, relational, relation == "disentangled_cross", total_heads=num_heads, rotary=rotary
            )
        if share_attn_params and self.sensory is not None and self.relational is not None:
            self.sensory.query, self.sensory.key = self.relational.query, self.relational.key
        wanted = symbols if relational else None
        self.symbols = None if wanted is None else symbol_retriever(wanted, embed_dim, **(symbol_options or {}))

    def extra_repr(self) -> str:
        return f"{self.num_heads - self.relational_heads} sensory and {self.relational_heads} relational heads"

    def forward(
        self,
        x: Tensor,
        *,
        symbols: Tensor | None = None,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
    ) -> Tensor:
        """Attend. symbols: in place of the layer's own. mask: a regard mask or a boolean tensor, True where visible."""
        parts = []
        rule = Boolean(mask) if isinstance(mask, Tensor) else mask
        if self.sensory is not None:
            self.sensory.check(x)
            query, key = self.sensory.pair(x, self.rotary)
            value = split_heads(self.sensory.value(x), self.sensory.num_kv_heads)[0]
            parts.append(self.sensory.out(merge_heads(dense_attention(query, key, value, causal=causal, mask=rule))))
        if self.relational is not None:
            parts.append(self.relational(x, self._symbols(x, symbols), causal=causal, mask=rule))
        return torch.cat(parts, -1)

    def init_state(self, batch: int, *, like: Tensor) -> DualState:
        """The decoding state before the first token."""
        if isinstance(self.relational, RelationalCrossAttention):
            raise OptionError("The ablations do not decode; build the layer with relation='relational'.")
        return DualState()

    def step(self, x: Tensor, state: DualState, *, symbols: Tensor | None = None) -> tuple[Tensor, DualState]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the state, which is changed in place."""
        parts = []
        if self.sensory is not None:
            self.sensory.check(x)
            query, key = self.sensory.pair(x, self.rotary, state.seen)
            kept = state.sensory.append(key, split_heads(self.sensory.value(x), self.sensory.num_kv_heads)[0])
            parts.append(self.sensory.out(merge_heads(dense_attention(query, kept.key, kept.value, causal=True))))
        if self.relational is not None:
            found = self._symbols(x, symbols, state.seen)
            parts.append(cast(RelationalAttention, self.relational)(x, found, causal=True, state=state))
        state.seen += x.shape[1]
        return torch.cat(parts, -1), state

    def _symbols(self, x: Tensor, given: Tensor | None, start: int = 0) -> Tensor:
        if given is not None:
            return given
        if self.symbols is None:
            raise OptionError("This layer has no symbols of its own: pass symbols=, or build it with a retriever.")
        assert self.relational is not None
        self.relational.check(x)
        found: Tensor = self.symbols(x, start)
        return found
