"""Flow-attention: linear attention in which keys compete and queries are gated, from conservation of a flow.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", 2022, arXiv 2202.06258, section 3.
Values flow from sources (keys, ``j`` of ``m``) to sinks (queries, ``i`` of ``n``) through capacities ``phi =
sigmoid``:

    I_i = phi(q_i) . sum_j phi(k_j)            incoming flow of a sink
    O_j = phi(k_j) . sum_i phi(q_i)            outgoing flow of a source
    Ihat_i = phi(q_i) . sum_j phi(k_j) / O_j   incoming flow when every source gives 1
    Ohat_j = phi(k_j) . sum_i phi(q_i) / I_i   outgoing flow when every sink takes 1
    competition:  V'_j = m softmax_j(clamp(Ohat, -1, 1)) v_j
    aggregation:  A_i = phi(q_i) / I_i  sum_j phi(k_j)^T V'_j
    allocation:   R_i = sigmoid(Ihat_i n / m) A_i

(``eps`` is added to both factors of each flow.) The causal form takes running sums and the counts ``n_t`` so
far; a source's competition weight is then fixed by what was known when it came. Time ``O((n + m) d d_v)``, a
state of ``d x d_v`` and four vectors per head; ``scale`` multiplies the queries, by default with 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from regard.cache import KeyValueCache
from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, ShapeError
from regard.kernels import LinearState, linear_attention, masked_softmax
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.padding import layer_keys, per_head
from regard.masks import Mask
from regard.mechanism import Layer, Mechanism, Request
from regard.registry import register

__all__ = ["Flow", "FlowAttention", "FlowQuantities", "FlowState", "flow_attention", "flow_quantities"]


@dataclass(frozen=True)
class FlowQuantities:
    """``incoming (batch, heads, n)`` and ``outgoing (batch, heads, m)``, and the same after conservation
    (``conserved_outgoing`` before it is clamped). Causal: of sums up to each position, the conserved ones per
    token so far, as the causal form reads them."""

    incoming: Tensor
    outgoing: Tensor
    conserved_incoming: Tensor
    conserved_outgoing: Tensor


@dataclass(frozen=True)
class FlowState:
    """What the causal form has summed up so far, per head: keys, queries, both after conservation ``(batch,
    heads, d)``, the exponents of competition and the count ``(batch, heads, 1)``, and the context."""

    keys: Tensor
    queries: Tensor
    conserved_keys: Tensor
    conserved_queries: Tensor
    competition: Tensor
    count: Tensor
    context: LinearState


def flow_quantities(query: Tensor, key: Tensor, causal: bool = False, *, eps: float = 1e-6) -> FlowQuantities:
    """The flows of ``query (batch, heads, n, d)`` and ``key (batch, kv_heads, m, d)``, for inspection."""
    sinks, sources = _capacities(query, key, 1.0)
    if causal:
        _check_causal(query, key)
        return _causal_flows(sinks, sinks, sources, _counts(sinks, None), None, eps)[0]
    return _flows(sinks, sources, eps)


def flow_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    eps: float = 1e-6,
    competition: bool = True,
    allocation: bool = True,
    key_padding_mask: Tensor | None = None,
    *,
    query_padding_mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """query ``(batch, heads, n, d)``, key ``(batch, kv_heads, m, d)``, value ``(batch, kv_heads, m, d_v)`` to
    ``(batch, heads, n, d_v)``; the causal form needs ``n == m``.

    competition, allocation: switch the paper's two parts off. key_padding_mask, query_padding_mask: True
    where a token is real, ``(batch, length)`` or broadcastable to ``(batch, heads, length)``; padding is
    neither source nor sink. Causal: one mask, of the keys. Where no real key is in sight the output is zero.
    """
    sinks, sources = _capacities(query, key, scale)
    v = expand_groups(value, query.shape[1]).to(sinks.dtype)
    real = per_head(key_padding_mask)
    if causal:
        _check_causal(query, key)
        return _causal(sinks, sources, v, real, None, eps, competition, allocation)[0].to(query.dtype)
    taking = per_head(query_padding_mask)
    if real is not None:
        sources, v = sources.masked_fill(~real[..., None], 0), v.masked_fill(~real[..., None], 0)
    counted = sinks if taking is None else sinks.masked_fill(~taking[..., None], 0)
    flows = _flows(sinks, sources, eps, counted)
    num_sinks = _number(taking, sinks)
    num_sources = _number(real, sources)
    if competition:
        share = masked_softmax(flows.conserved_outgoing.clamp(-1, 1), real) * num_sources
        v = v * share[..., None]
    out, _ = linear_attention(sinks / flows.incoming[..., None], sources, v)
    if allocation:
        out = out * torch.sigmoid(flows.conserved_incoming * (num_sinks / num_sources))[..., None]
    return out.to(query.dtype)


def _capacities(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    work = accumulation_dtype(query.dtype)
    return torch.sigmoid(query.to(work) * scale), torch.sigmoid(expand_groups(key, query.shape[1]).to(work))


def _flow(capacity: Tensor, total: Tensor, eps: float) -> Tensor:
    return ((capacity + eps) * (total + eps)).sum(-1)


def _flows(sinks: Tensor, sources: Tensor, eps: float, counted: Tensor | None = None) -> FlowQuantities:
    """``counted``: the sinks with those that are padding emptied."""
    counted = sinks if counted is None else counted
    incoming = _flow(sinks, sources.sum(2, keepdim=True), eps)
    outgoing = _flow(sources, counted.sum(2, keepdim=True), eps)
    conserved_in = _flow(sinks, (sources / outgoing[..., None]).sum(2, keepdim=True), eps)
    conserved_out = _flow(sources, (counted / incoming[..., None]).sum(2, keepdim=True), eps)
    return FlowQuantities(incoming, outgoing, conserved_in, conserved_out)


def _number(real: Tensor | None, tokens: Tensor) -> Tensor:
    """How many tokens are real, at least 1: ``(batch | 1, heads | 1, 1)``."""
    if real is None:
        return tokens.new_full((1, 1, 1), tokens.shape[2])
    return real.sum(-1, keepdim=True).clamp_min(1).to(tokens.dtype)


def _counts(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Real tokens up to each position ``(batch | 1, heads | 1, n)``."""
    if real is None:
        return torch.arange(1, tokens.shape[2] + 1, device=tokens.device, dtype=tokens.dtype).view(1, 1, -1)
    return real.to(tokens.dtype).cumsum(-1)


def _running(tokens: Tensor, before: Tensor | None) -> Tensor:
    """Cumulative sums over positions, on top of those ``before`` ``(batch, heads, d)``."""
    total = tokens.cumsum(2)
    return total if before is None else total + before[:, :, None]


def _causal_flows(
    sinks: Tensor, counted: Tensor, sources: Tensor, count: Tensor, state: FlowState | None, eps: float
) -> tuple[FlowQuantities, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Flows of sums up to each position, and those sums. ``counted``: the sinks, those that are padding
    emptied."""
    keys = _running(sources, None if state is None else state.keys)
    queries = _running(counted, None if state is None else state.queries)
    incoming, outgoing = _flow(sinks, keys, eps), _flow(sources, queries, eps)
    given = _running(sources * (count / outgoing)[..., None], None if state is None else state.conserved_keys)
    taken = _running(counted * (count / incoming)[..., None], None if state is None else state.conserved_queries)
    seen = count.clamp_min(1)
    flows = FlowQuantities(incoming, outgoing, _flow(sinks, given, eps) / seen, _flow(sources, taken, eps) / seen)
    return flows, (keys, queries, given, taken)


def _causal(
    sinks: Tensor,
    sources: Tensor,
    value: Tensor,
    real: Tensor | None,
    state: FlowState | None,
    eps: float,
    competition: bool,
    allocation: bool,
) -> tuple[Tensor, FlowState]:
    if real is not None:
        hidden = ~real[..., None]
        sources, value = sources.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        counted = sinks.masked_fill(hidden, 0)
    else:
        counted = sinks
    count = _counts(sinks, real)
    count = count if state is None else count + state.count
    flows, sums = _causal_flows(sinks, counted, sources, count, state, eps)
    force = flows.conserved_outgoing.clamp(-1, 1).exp()
    force = force if real is None else force.masked_fill(~real, 0)
    rivals = _running(force[..., None], None if state is None else state.competition)[..., 0]
    if competition:
        share = force / rivals.clamp_min(torch.finfo(force.dtype).tiny) * count
        value = value * share[..., None]
    context = None if state is None else state.context
    out, context = linear_attention(sinks / flows.incoming[..., None], sources, value, causal=True, state=context)
    if allocation:
        out = out * torch.sigmoid(flows.conserved_incoming)[..., None]
    keys, queries, given, taken = (total[:, :, -1] for total in sums)
    seen = count[..., -1:].expand(*sinks.shape[:2], 1)
    return out, FlowState(keys, queries, given, taken, rivals[..., -1:], seen, context)


@register("flow_attention")
class Flow(Mechanism):
    """Flow-attention on (query, key, value), without projections.

    competition, allocation: the paper's ablations switch them off. eps: added to both factors of each flow.
    mask_queries: where a key mask covers as many keys as there are queries it is taken to speak of the tokens
    of self-attention, so that padding is no sink either; False where such a call is cross-attention.
    """

    patterns = frozenset({"self", "cross", "causal-self"})
    mask_support = "keys"
    needs_training = True
    decodes = True
    growth = "N"

    def __init__(
        self, competition: bool = True, allocation: bool = True, eps: float = 1e-6, mask_queries: bool = True
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise OptionError(f"eps must be above 0, got {eps}; flow_quantities takes 0 for inspection.")
        self.competition, self.allocation, self.eps, self.mask_queries = (
            competition,
            allocation,
            eps,
            mask_queries,
        )

    def extra_repr(self) -> str:
        return f"competition={self.competition}, allocation={self.allocation}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        same = self.mask_queries and query.shape[2] == key.shape[2]
        return flow_attention(
            query,
            key,
            value,
            request.causal,
            self.eps,
            self.competition,
            self.allocation,
            request.keys,
            query_padding_mask=request.keys if same else None,
            scale=1.0 if request.scale is None else request.scale,
        )

    def init_state(self, batch: int, *, like: Tensor, cache: KeyValueCache | None = None) -> FlowState | None:
        self._own_state(cache)
        return None

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: FlowState | None
    ) -> tuple[Tensor, FlowState | None]:
        sinks, sources = _capacities(query, key, 1.0)
        v = expand_groups(value, query.shape[1]).to(sinks.dtype)
        out, state = _causal(sinks, sources, v, None, state, self.eps, self.competition, self.allocation)
        return out.to(query.dtype), state

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        whole = linear_cost(shape, chunk=64 if shape.causal else None)
        rows, d = shape.batch * shape.num_heads, shape.head_dim
        state = rows * (d * shape.v_dim + 4 * d + 2) * 4
        flops = whole.flops + 4 * rows * (shape.q_len + shape.k_len) * d
        return replace(whole, flops=flops, bytes=whole.bytes - whole.state_bytes + state, state_bytes=state)


@register("flow_attention_layer")
class FlowAttention(Layer):
    """The paper's module: projections around flow-attention, ``(batch, length, embed_dim)`` in and out.

    dropout: of the output. competition, allocation: the paper's ablations.
    """

    patterns = frozenset({"self", "cross", "causal-self"})
    needs_training = True
    growth = "N"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.05,
        competition: bool = True,
        allocation: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        self.competition, self.allocation, self.eps = competition, allocation, eps
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, causal: bool = False, mask: Mask | None = None
    ) -> Tensor:
        """Attend within ``x``, or from ``x`` to ``context`` ``(batch, m, embed_dim)``. mask: of keys
        alone."""
        source = x if context is None else context
        keys = layer_keys(mask, source.shape[1], x.device, "FlowAttention")
        query, key, value = (
            project(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, tokens in ((self.query, x), (self.key, source), (self.value, source))
        )
        out = flow_attention(
            query,
            key,
            value,
            causal,
            self.eps,
            self.competition,
            self.allocation,
            keys,
            query_padding_mask=keys if context is None else None,
        )
        mixed: Tensor = self.dropout(self.out(out.transpose(1, 2).flatten(2)))
        return mixed


def _check_causal(query: Tensor, key: Tensor) -> None:
    if query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"Causal flow-attention needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}."
        )
