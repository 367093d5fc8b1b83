"""DARE: search and attention over a long history of behaviours, with embeddings of their own.

A recommendation model scores the behaviours ``j`` of a user against the target ``t``, keeps the ``top_k`` best (the
search) and attends to them:

    s_j = q_s . k_sj / sqrt(d_s) + q_t . k_tj / sqrt(d_t)        semantic fields, and the field of time
    u   = sum_j softmax_j(s) v_j        over the top_k largest s_j; search and attention use the same scores

With one embedding table for both roles (TWIN), the gradient that reaches a row through the values is larger than
that through the scores, and often opposed to it. DARE has two tables per field: ``q``, ``k`` come from ``E_a``, ``v``
from ``E_r``, and ``E_a`` can be narrower, which makes the search cheaper in proportion.

Feng et al., "Long-Sequence Recommendation Models Need Decoupled Embeddings", 2025 (ICLR), arXiv 2410.02604, sections
3 and 4. :class:`DecoupledEmbedding` holds the tables, :class:`TargetAttention` is the attention of one target to a
history ``(batch, length, dim)``; :class:`SearchAttention`, registered as ``dare``, is the same two stages as a
mechanism on ``(batch, heads, length, head_dim)`` for any number of queries. Search ``2 L d_a`` operations a target,
attention ``2 top_k d_r``. The model around it is :class:`regard.models.dare.TwoStageSequenceModel`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype, masked_softmax, score_scale, token_sparse_attention
from regard.layout import TokenLayout
from regard.mechanism import Request, SparseMechanism
from regard.registry import register
from regard.sparse.scoring import grouped_scores
from regard.sparse.selection import settle_mask

__all__ = ["DecoupledEmbedding", "SearchAttention", "TargetAttention", "search_flops"]

Score = Literal["dot", "din"]

# Scores of the search that are formed at once.
_AREA = 1 << 24


class DecoupledEmbedding(nn.Module):
    """Two tables for each field of a behaviour: one for attention, one for representation.

    fields: name -> number of ids. n_attention, n_representation: width of the tables, one for all fields or by field.
    tied: one table in both roles, the shared baseline. Tables begin as normal numbers of deviation ``std``.
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        n_attention: int | Mapping[str, int] = 16,
        n_representation: int | Mapping[str, int] = 16,
        *,
        tied: bool = False,
        std: float = 0.01,
    ) -> None:
        super().__init__()
        if not fields or any(count < 1 for count in fields.values()):
            raise OptionError(f"fields maps names to numbers of ids of at least 1; got {dict(fields)}.")
        self.fields, self.tied = dict(fields), tied
        self.attention_widths = self._widths("n_attention", n_attention)
        self.representation_widths = self._widths("n_representation", n_representation)
        if tied and self.attention_widths != self.representation_widths:
            raise OptionError(
                f"One table in both roles has one width: n_attention {n_attention} is not n_representation "
                f"{n_representation}. Make them equal, or use tied=False."
            )
        self.attention = self._tables(self.attention_widths, std)
        self.representation = self.attention if tied else self._tables(self.representation_widths, std)

    def _widths(self, name: str, width: int | Mapping[str, int]) -> dict[str, int]:
        widths = dict.fromkeys(self.fields, width) if isinstance(width, int) else dict(width)
        if set(widths) != set(self.fields) or any(w < 1 for w in widths.values()):
            raise OptionError(
                f"{name} is a width of at least 1, or one for each of {', '.join(self.fields)}; got {width}."
            )
        return {field: widths[field] for field in self.fields}

    def _tables(self, widths: Mapping[str, int], std: float) -> nn.ModuleDict:
        tables = nn.ModuleDict({field: nn.Embedding(count, widths[field]) for field, count in self.fields.items()})
        for table in tables.values():
            nn.init.normal_(cast(nn.Embedding, table).weight, std=std)
        return tables

    def untie(self) -> None:
        """Give representation tables of its own that begin as those of attention."""
        if self.tied:
            self.representation, self.tied = copy.deepcopy(self.attention), False

    def for_attention(self, ids: Mapping[str, Tensor]) -> Tensor:
        """``E_a``: ids of each field ``(...)`` -> their vectors side by side ``(..., sum of n_attention)``."""
        return self._look_up(self.attention, ids)

    def for_representation(self, ids: Mapping[str, Tensor]) -> Tensor:
        """``E_r``: ids of each field ``(...)`` -> their vectors side by side ``(..., sum of n_representation)``."""
        return self._look_up(self.representation, ids)

    def _look_up(self, tables: nn.ModuleDict, ids: Mapping[str, Tensor]) -> Tensor:
        missing = [field for field in self.fields if field not in ids]
        if missing:
            raise ShapeError(f"Ids of {', '.join(missing)} are missing; the fields are {', '.join(self.fields)}.")
        return torch.cat([tables[field](ids[field]) for field in self.fields], -1)


class TargetAttention(nn.Module):
    """One target attends to a history. Score ``"dot"``: scaled dot products, of the last ``time_dim`` features apart
    from the others; ``"din"``: a small network on ``[q, k, q - k, q * k]`` (Zhou et al., 2018, arXiv 1706.06978), with
    36 hidden units as in the released code, over the width; it needs ``dim``, the width of queries and keys.
    """

    def __init__(self, score: Score = "dot", *, dim: int | None = None, time_dim: int = 0) -> None:
        super().__init__()
        if score not in ("dot", "din") or time_dim < 0 or (score == "din" and dim is None):
            raise OptionError(
                f"score is 'dot' or 'din' (which needs dim), time_dim at least 0; got {score!r}, dim={dim}, {time_dim}."
            )
        self.score, self.time_dim = score, time_dim
        self.network: nn.Module | None = None
        if score == "din":
            self.network = nn.Sequential(nn.Linear(4 * cast(int, dim), 36), nn.PReLU(init=0.1), nn.Linear(36, 1))

    def extra_repr(self) -> str:
        return f"score={self.score!r}, time_dim={self.time_dim}"

    def scores(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """The search: ``(batch, length)``, ``-inf`` for padding, from ``query (batch, dim)`` and ``key (batch, length,
        dim)``. mask ``(batch, length)`` boolean: real behaviours.
        """
        if key.dim() != 3 or query.shape != (key.shape[0], key.shape[2]):
            raise ShapeError(
                f"TargetAttention takes query (batch, dim) and key (batch, length, dim); got {tuple(query.shape)} and "
                f"{tuple(key.shape)}."
            )
        if mask is not None and (mask.shape != key.shape[:2] or mask.dtype != torch.bool):
            raise ShapeError(
                f"The mask is boolean {tuple(key.shape[:2])}, True for real behaviours; got {mask.dtype} "
                f"{tuple(mask.shape)}."
            )
        if self.network is not None:
            wide = query[:, None].expand_as(key)
            scores = self.network(torch.cat((wide, key, wide - key, wide * key), -1))[..., 0] / key.shape[2]
        else:
            balanced = _balanced(query, self.time_dim) / math.sqrt(query.shape[1])
            scores = torch.bmm(key, balanced[..., None])[..., 0]
        return cast(Tensor, scores if mask is None else scores.masked_fill(~mask, float("-inf")))

    def read(self, scores: Tensor, value: Tensor, top_k: int | None = None) -> Tensor:
        """The attention: ``(batch, value_dim)`` from scores and ``value (batch, length, value_dim)``, over the
        ``top_k`` best (None: all). Where all is padding, zeros."""
        if top_k is not None and top_k < scores.shape[1]:
            scores, best = scores.topk(top_k, -1)
            value = value.gather(1, best[..., None].expand(-1, -1, value.shape[2]))
        real = scores > float("-inf")
        weights = masked_softmax(scores.masked_fill(~real, 0), real)
        return torch.bmm(weights[:, None], value)[:, 0]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both stages: the output ``(batch, value_dim)``, and all scores ``(batch, length)``."""
        if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
            raise ShapeError(f"One value a key: key {tuple(key.shape)}, value {tuple(value.shape)}.")
        scores = self.scores(query, key, mask)
        return self.read(scores, value, top_k), scores


@register("dare")
class SearchAttention(SparseMechanism):
    """Each query attends to the ``top_k`` keys of largest score, found by looking at all.

    time_dim: the last features of a head that stand for time; their dot product has a scale of its own.
    """

    growth = "N^2"

    def __init__(self, *, top_k: int = 20, time_dim: int = 0) -> None:
        super().__init__()
        if top_k < 1 or time_dim < 0:
            raise OptionError(f"Need top_k >= 1 and time_dim >= 0; got {top_k} and {time_dim}.")
        self.top_k, self.time_dim = top_k, time_dim

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, time_dim={self.time_dim}"

    @torch.no_grad()
    def select(self, query: Tensor, key: Tensor, request: Request) -> TokenLayout:
        batch, heads, q_len, _ = query.shape
        k_len = key.shape[2]
        rule, _keys = settle_mask(request, q_len, k_len)
        rule = None if rule is None else rule.to(query.device)
        work = accumulation_dtype(query.dtype)
        # A negative scale turns the order of the scores round.
        balanced = _balanced(query.to(work), self.time_dim) * score_scale(query, request.scale)
        columns = torch.arange(k_len, device=query.device).view(1, 1, 1, -1)
        step, found = max(_AREA // (batch * heads * k_len), 1), []
        for start in range(0, q_len, step):
            scores = grouped_scores(balanced[:, :, start : start + step], key.to(work))
            if rule is not None:
                rows = torch.arange(start, start + scores.shape[2], device=query.device).view(1, 1, -1, 1)
                scores = scores.masked_fill(~rule.at(rows, columns, q_len, k_len), float("-inf"))
            best = scores.topk(min(self.top_k, k_len), -1)
            found.append(best.indices.masked_fill(best.values == float("-inf"), -1))
        return TokenLayout(torch.cat(found, 2), k_len)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        layout = self.select(query, key, request)
        out = token_sparse_attention(_balanced(query, self.time_dim), key, value, layout, scale=request.scale)
        assert isinstance(out, Tensor)
        return out

    def cost(self, shape: AttentionShape) -> Cost:
        search = shape.batch * shape.num_heads * shape.q_len * search_flops(shape.k_len, shape.head_dim)
        return dense_cost(shape, min(self.top_k / shape.k_len, 1.0), search)


def _balanced(query: Tensor, time_dim: int) -> Tensor:
    """The query whose dot product over ``sqrt(dim)`` is that of its parts over the roots of their own widths."""
    dim = query.shape[-1]
    if time_dim == 0:
        return query
    if time_dim >= dim:
        raise ShapeError(f"Of {dim} features, time_dim {time_dim} would leave none for what is not time.")
    semantic, time = query.split((dim - time_dim, time_dim), -1)
    return torch.cat((semantic * math.sqrt(dim / (dim - time_dim)), time * math.sqrt(dim / time_dim)), -1)


def search_flops(length: int, attention_dim: int) -> int:
    """Operations of the search for one target among ``length`` behaviours: it grows with the width of ``E_a`` alone."""
    return 2 * length * attention_dim
