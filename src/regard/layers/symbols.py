"""Symbols that say which token a message comes from, without its features: what relational attention tags relations by.

Altabaa and Lafferty, "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
2024, arXiv 2405.16727, section 3.3. A retriever takes ``x (batch, length, embed_dim)`` and gives symbols of the same
shape; :class:`RelativeSymbols` gives a table by offset instead. ``start`` is the position of the first token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention
from regard.layers.heads import head_sizes
from regard.layers.maps import merge_heads, split_heads

__all__ = [
    "PositionalSymbols",
    "RelationalSymbolicAttention",
    "RelativeSymbols",
    "SymbolicAttention",
    "symbol_retriever",
]


class SymbolicAttention(nn.Module):
    """``softmax(q F^T / sqrt(d)) S`` per head, q a projection of x: a soft choice from a library of ``num_symbols``
    symbols S by template features F, both learned and N(0, 1) at first.

    Each token's symbol follows from that token alone.
    """

    def __init__(self, embed_dim: int, num_heads: int = 4, num_symbols: int = 32, trainable: bool = True) -> None:
        super().__init__()
        head_sizes(embed_dim, num_heads)
        if num_symbols < 1:
            raise OptionError(f"A library holds at least one symbol; got num_symbols={num_symbols}.")
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.features = nn.Parameter(torch.randn(num_symbols, embed_dim))
        self.library = nn.Parameter(torch.randn(num_symbols, embed_dim), requires_grad=trainable)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """``(batch, length, embed_dim)`` in and out."""
        (query,) = split_heads(self.query(x), self.num_heads)
        key, value = (
            split_heads(table.to(x.dtype)[None], self.num_heads)[0].expand(len(x), -1, -1, -1)
            for table in (self.features, self.library)
        )
        return merge_heads(dense_attention(query, key, value))


class PositionalSymbols(nn.Module):
    """A learned symbol per position, N(0, 1) at first: nothing of the tokens' content."""

    def __init__(self, embed_dim: int, max_length: int = 512) -> None:
        super().__init__()
        self.library = nn.Parameter(torch.randn(max_length, embed_dim))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """``(batch, length, embed_dim)``."""
        stop = start + x.shape[1]
        if stop > len(self.library):
            raise ShapeError(f"{stop} tokens, but symbols for {len(self.library)} positions; raise max_length.")
        return self.library[start:stop].to(x.dtype).expand(len(x), -1, -1)


class RelativeSymbols(nn.Module):
    """A learned symbol per offset j - i from receiver i to sender j, clamped to ``max_rel_pos`` either way."""

    def __init__(self, embed_dim: int, max_rel_pos: int = 32) -> None:
        super().__init__()
        if max_rel_pos < 0:
            raise OptionError(f"max_rel_pos counts positions, so it is not negative; got {max_rel_pos}.")
        self.max_rel_pos = max_rel_pos
        self.library = nn.Parameter(torch.empty(2 * max_rel_pos + 1, embed_dim))
        nn.init.xavier_uniform_(self.library)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """The table ``(2 max_rel_pos + 1, embed_dim)``, offset 0 in its middle."""
        return self.library.to(x.dtype)

    def pairs(self, length: int) -> Tensor:
        """The symbol of every pair, ``(length, length, embed_dim)``."""
        place = torch.arange(length, device=self.library.device)
        offset = (place - place[:, None]).clamp(-self.max_rel_pos, self.max_rel_pos)
        return self.library[offset + self.max_rel_pos]


class RelationalSymbolicAttention(nn.Module):
    """Symbols chosen by a token's relations with its neighbours: inner products with the ``neighbors`` tokens before it
    (and, not ``causal``, behind it), softmax over them, a projection, :class:`SymbolicAttention`.

    Neighbours beyond an end are the token at that end.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 4,
        num_symbols: int = 32,
        neighbors: int = 2,
        causal: bool = True,
        *,
        rel_heads: int = 4,
        include_self: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        head_sizes(embed_dim, rel_heads)
        if neighbors < 1:
            raise OptionError(f"neighbors counts tokens on a side, so it is at least 1; got {neighbors}.")
        offsets = range(-neighbors, 1 if causal else neighbors + 1)
        self.offsets = tuple(offset for offset in offsets if offset or include_self)
        self.rel_heads, self.normalize = rel_heads, normalize
        self.query, self.key = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.project = nn.Linear(rel_heads * len(self.offsets), embed_dim)
        self.symbols = SymbolicAttention(embed_dim, num_heads, num_symbols)

    def relations(self, x: Tensor) -> Tensor:
        """``(batch, length, neighbours, rel_heads)``."""
        (query,), (key,) = (split_heads(linear(x), self.rel_heads) for linear in (self.query, self.key))
        place = torch.arange(x.shape[1], device=x.device)[:, None] + torch.tensor(self.offsets, device=x.device)
        near = key[:, :, place.clamp(0, x.shape[1] - 1)]
        found = torch.einsum("bhid,bhind->binh", query, near)
        return (found * query.shape[-1] ** -0.5).softmax(2) if self.normalize else found

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """``(batch, length, embed_dim)`` in and out. Needs the sequence whole."""
        if start:
            raise OptionError("Symbols from neighbours need the tokens before; decode with symbols of another kind.")
        symbols: Tensor = self.symbols(self.project(self.relations(x).flatten(2)))
        return symbols


def symbol_retriever(kind: str, embed_dim: int, **options: int) -> nn.Module:
    """A retriever by name: ``"symbolic"``, ``"positional"``, ``"relative"`` or ``"relational"``, with its options."""
    kinds: dict[str, type[nn.Module]] = {
        "symbolic": SymbolicAttention,
        "positional": PositionalSymbols,
        "relative": RelativeSymbols,
        "relational": RelationalSymbolicAttention,
    }
    if kind not in kinds:
        raise OptionError(f"symbols is one of {', '.join(kinds)}; got {kind!r}.")
    return kinds[kind](embed_dim, **options)
