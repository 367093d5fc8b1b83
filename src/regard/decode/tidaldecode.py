"""TidalDecode: at every decoding step a few layers choose the tokens, and the layers after them read those alone.

Prompts are read with full attention. At a decoding step, layer by layer:

- the layers before ``start`` attend to everything;
- layer ``start`` attends to everything too, and from its logits ``scale q . k`` every query head takes the ``top_k``
  positions of largest logit;
- the layers after it attend to these positions alone, each head to its own, in every layer the same (*position
  persistent*), with softmax over them;
- a layer of ``reselect`` attends to everything again, and takes a fresh choice for the layers after it.

All keys stay in the cache; the next step chooses anew. With grouped heads, ``share`` says who chooses: each query head
(``"head"``, as released), the key/value head by the largest logit of its group (``"max"``), or by the union of its
heads' choices (``"union"``). KV rows read in a step, of ``L`` layers and ``N`` tokens: ``(start + 1 + R) N + (L - start
- 1 - R) k`` instead of ``L N``, with ``R`` layers that choose again; a key/value head reads ``k`` rows for each of its
query heads with ``"head"``, and no more than that with ``"union"``.

Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", 2024, arXiv
2410.05076. The paper's cache correction, which reads the tokens decoded so sparsely again with full attention every so
many steps, is ``correct_every`` of :func:`tidal_generate`; its experiments leave it off. Query ``(batch, num_heads, 1,
head_dim)``, key and value ``(batch, num_kv_heads, length, head_dim)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, dense_cost
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.kernels import accumulation_dtype, dense_attention, masked_softmax, score_scale
from regard.kernels.shapes import take_tokens
from regard.masks import Boolean
from regard.mechanism import Mechanism, Pattern, Request
from regard.registry import register
from regard.retrofit.handle import Handle, retrofit
from regard.retrofit.sites import discover
from regard.sparse.metrics import topk_recall
from regard.sparse.scoring import grouped_scores

__all__ = [
    "KVRead",
    "TidalAttention",
    "TidalPolicy",
    "TidalState",
    "attend",
    "best_reselect_layer",
    "enable_tidal",
    "kv_bytes_read",
    "selection_overlap",
    "tidal_decode_step",
    "tidal_generate",
]

Role = Literal["dense", "select", "reuse"]
Share = Literal["head", "max", "union"]

# Where a model of 32 layers chooses again.
_RESELECT = 13


@dataclass(frozen=True)
class TidalPolicy:
    """What each layer of a model does at a decoding step.

    top_k: tokens chosen. start: the first layer that chooses. reselect: the layers that choose again, by default layer
    13 where the model reaches beyond it. share: who chooses (see above). newest: the token that is being decoded is
    always among the chosen.
    """

    num_layers: int
    top_k: int = 256
    start: int = 2
    reselect: tuple[int, ...] | None = None
    share: Share = "head"
    newest: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.top_k < 1 or self.start < 0:
            raise OptionError(
                f"Need num_layers >= 1, top_k >= 1 and start >= 0; got {self.num_layers}, {self.top_k}, {self.start}."
            )
        if self.share not in get_args(Share):
            raise OptionError(f"share is one of {get_args(Share)}, got {self.share!r}.")
        wrong = [layer for layer in self.reselect or () if not self.start < layer < self.num_layers]
        if wrong:
            raise OptionError(
                f"Layers that choose again come after start {self.start} and before the last of {self.num_layers}; got "
                f"{wrong}. best_reselect_layer finds one; () is for none."
            )

    @property
    def choosing(self) -> tuple[int, ...]:
        """The layers that choose, in order."""
        later: Sequence[int]
        if self.reselect is None:
            later = (_RESELECT,) if self.start < _RESELECT < self.num_layers - 1 else ()
        else:
            later = sorted(set(self.reselect))
        return tuple(layer for layer in (self.start, *later) if layer < self.num_layers)

    @property
    def dense_layers(self) -> int:
        """How many layers attend to everything."""
        return sum(self.role(layer) != "reuse" for layer in range(self.num_layers))

    def role(self, layer: int) -> Role:
        """``"dense"``: attends to everything; ``"select"``: does so and chooses; ``"reuse"``: reads what was chosen."""
        if not 0 <= layer < self.num_layers:
            raise OptionError(f"There is no layer {layer} among {self.num_layers}.")
        if layer in self.choosing:
            return "select"
        return "dense" if layer < self.start else "reuse"

    def rows(self, layer: int, length: int, group: int = 1) -> int:
        """KV rows that a key/value head reads for its ``group`` of query heads, at most with ``"union"``."""
        if self.role(layer) != "reuse":
            return length
        return min(self.top_k, length) * (1 if self.share == "max" else group)


@dataclass
class TidalState:
    """What the layers of a model share during a step: ``indices (batch, num_heads | num_kv_heads, slots)`` int64, the
    positions chosen, -1 for none; the layer that chose them, and how many tokens there were then.

    ``rows``: KV rows that a key/value head read, by layer, in the last step of that layer (mean over heads).
    """

    indices: Tensor | None = None
    layer: int = -1
    length: int = 0
    rows: dict[int, float] = field(default_factory=dict)

    def chosen(self, layer: int, batch: int, length: int) -> Tensor:
        """The positions for a layer of this step."""
        if self.indices is None or self.length != length or self.layer > layer or len(self.indices) != batch:
            raise OptionError(
                f"Layer {layer} has no choice to read at this step ({length} keys): the last was made by layer "
                f"{self.layer} for {self.length}. All layers of a model share one TidalState, and every step begins at "
                "its first layer: use enable_tidal(model), or retrofit(model, 'tidaldecode', state=TidalState())."
            )
        return self.indices


def attend(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: TidalState,
    policy: TidalPolicy,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One layer of one decoding step; the hook for any model, called layer by layer with one ``state``.

    query ``(batch, num_heads, 1, head_dim)``; key and value ``(batch, num_kv_heads, length, ...)``, the current token's
    among them. keys: boolean ``(batch | 1, num_heads | 1, length)``, tokens that exist. Returns ``(batch, num_heads, 1,
    value_dim)``.
    """
    batch, q_len = query.shape[0], query.shape[2]
    kv_heads, length = key.shape[1], key.shape[2]
    if q_len != 1:
        raise ShapeError(f"A decoding step has one query, got {q_len}; read prompts with full attention.")
    role = policy.role(layer)
    if role == "reuse":
        indices = state.chosen(layer, batch, length)
        state.rows[layer] = float((indices >= 0).sum()) / (batch * kv_heads)
        return _read(query, key, value, indices, scale)
    state.rows[layer] = float(length)
    if role == "dense":
        mask = None if keys is None else Boolean(keys[:, :, None])
        return dense_attention(query, key, value, mask=mask, scale=scale)
    work = accumulation_dtype(query.dtype)
    scores = grouped_scores(query.to(work) * score_scale(query, scale), key.to(work))
    if keys is not None:
        scores = scores.masked_fill(~keys[:, :, None], float("-inf"))
    state.indices, state.layer, state.length = _choose(scores[:, :, 0].detach(), kv_heads, policy), layer, length
    weights = masked_softmax(scores, None if keys is None else keys[:, :, None])
    return _grouped_product(weights, value.to(work)).to(query.dtype)


def _grouped_product(weights: Tensor, value: Tensor) -> Tensor:
    """``weights (batch, num_heads, 1, length) @ value (batch, num_kv_heads, length, dim)``, no heads repeated."""
    batch, heads, _, length = weights.shape
    folded = weights.reshape(batch, value.shape[1], -1, length)
    return (folded @ value).view(batch, heads, 1, value.shape[3])


def _choose(scores: Tensor, kv_heads: int, policy: TidalPolicy) -> Tensor:
    """``scores (batch, num_heads, length)``, ``-inf`` for what does not exist, to positions in ascending order."""
    if policy.share == "max":
        scores = scores.unflatten(1, (kv_heads, -1)).amax(2)
    if policy.newest:
        scores = torch.cat((scores[..., :-1], torch.full_like(scores[..., -1:], float("inf"))), -1)
    best = scores.topk(min(policy.top_k, scores.shape[-1]), -1)
    indices = best.indices.masked_fill(best.values == float("-inf"), -1)
    if policy.share == "union":
        indices = indices.unflatten(1, (kv_heads, -1)).flatten(2)
    indices = indices.sort(-1).values
    if policy.share == "union":
        again = torch.cat((torch.zeros_like(indices[..., :1]), indices[..., 1:] == indices[..., :-1]), -1).bool()
        indices = indices.masked_fill(again, -1)
    return indices


def _read(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, scale: float | None) -> Tensor:
    """Attention of each head over its own positions; nothing else is touched."""
    batch, heads = query.shape[:2]
    safe = indices.clamp_min(0)
    keys, values = take_tokens(key, safe), take_tokens(value, safe)
    real = indices >= 0
    mask = None if bool(real.all()) else Boolean(real[:, :, None])
    # The heads that share a list stand side by side, as so many queries.
    out = dense_attention(
        query.reshape(batch, indices.shape[1], -1, query.shape[3]), keys, values, mask=mask, scale=scale
    )
    return out.view(batch, heads, 1, value.shape[3])


@register("tidaldecode")
class TidalAttention(Mechanism):
    """One layer of the policy. state: shared by all layers of a model; by default its own, of which only a layer that
    does not read others' choices has enough. top_k, start, reselect, share, newest: of :class:`TidalPolicy`.

    Calls with several queries, and first tokens, get full attention.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self", "causal-cross"))
    mask_support = "keys"
    decodes = True

    def __init__(
        self,
        state: TidalState | None = None,
        *,
        top_k: int = 256,
        start: int = 2,
        reselect: Sequence[int] | None = None,
        share: Share = "head",
        newest: bool = False,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        again = None if reselect is None else tuple(reselect)
        self.policy = TidalPolicy(num_layers, top_k, start, again, share, newest)
        self.state = TidalState() if state is None else state
        self.layer = layer_index
        self.role = self.policy.role(layer_index)

    def extra_repr(self) -> str:
        return f"layer {self.layer}: {self.role}, top_k={self.policy.top_k}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if not self._single(query.shape[2], key.shape[2]):
            return dense_attention(query, key, value, causal=request.causal, mask=request.mask, scale=request.scale)
        keys, scale = request.keys, request.scale
        return attend(self.layer, query, key, value, self.state, self.policy, keys=keys, scale=scale)

    def _single(self, q_len: int, k_len: int) -> bool:
        return q_len == 1 and k_len > 1

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        if self.role != "reuse" or not self._single(query.shape[2], key.shape[2]):
            return super().computed_pairs(query, key, value, request)
        return min(self.policy.top_k / key.shape[2], 1.0)

    def cost(self, shape: AttentionShape) -> Cost:
        if self.role != "reuse" or not self._single(shape.q_len, shape.k_len):
            return dense_cost(shape)
        full = dense_cost(shape, min(self.policy.top_k / shape.k_len, 1.0))
        rows = min(self.policy.rows(self.layer, shape.k_len, shape.num_heads // shape.kv_heads), shape.k_len)
        spared = (shape.k_len - rows) * shape.kv_heads * (shape.head_dim + shape.v_dim) * shape.batch
        return dataclasses.replace(full, bytes=full.bytes - spared * shape.element_size)


def enable_tidal(
    model: nn.Module, policy: TidalPolicy | None = None, state: TidalState | None = None, **options: Any
) -> Handle:
    """Let a decoder of transformers decode by the policy, in ``generate`` as in single steps; the handle undoes it.

    options: of :class:`TidalPolicy` besides the number of layers, where no policy is given.
    """
    sites = discover(model)
    if any(site.num_layers != len(sites) for site in sites):
        raise RetrofitError("TidalDecode is for decoders of one stack of layers; this model has several.")
    if policy is None:
        policy = TidalPolicy(len(sites), **options)
    elif options:
        raise OptionError(f"Options {sorted(options)} belong to a policy, and one is given already.")
    if policy.num_layers != len(sites):
        raise OptionError(f"The policy is for {policy.num_layers} layers, but the model has {len(sites)}.")
    shared = TidalState() if state is None else state
    settings = {name: getattr(policy, name) for name in ("top_k", "start", "reselect", "share", "newest")}
    return retrofit(
        model,
        {
            site.path: TidalAttention(shared, **settings, layer_index=site.layer_index, num_layers=len(sites))
            for site in sites
        },
    )


@torch.no_grad()
def tidal_decode_step(
    model: nn.Module, cache: Any, token: Tensor, policy: TidalPolicy, state: TidalState | None = None
) -> tuple[Tensor, Any]:
    """The next token's logits ``(batch, vocabulary)`` after ``token (batch, 1)``, and the cache it was added to.

    cache: ``past_key_values`` of the model's pass over what came before. To decode many, hold :func:`enable_tidal`.
    """
    if token.dim() != 2 or token.shape[1] != 1:
        raise ShapeError(f"A step takes one token for each sequence, (batch, 1); got {tuple(token.shape)}.")
    with enable_tidal(model, policy, state):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return out.logits[:, -1], out.past_key_values


@torch.no_grad()
def tidal_generate(
    model: nn.Module,
    input_ids: Tensor,
    policy: TidalPolicy,
    max_new_tokens: int,
    *,
    correct_every: int | None = None,
    state: TidalState | None = None,
) -> Tensor:
    """Greedy tokens ``(batch, max_new_tokens)`` after a prompt ``(batch, length)`` without padding.

    correct_every: after so many steps the tokens decoded since are read again at once with full attention, so that
    their keys and values are those of the full model; None leaves them as they came.
    """
    if max_new_tokens < 1 or (correct_every is not None and correct_every < 2):
        raise OptionError(
            f"Need max_new_tokens >= 1 and correct_every >= 2 or None; got {max_new_tokens} and {correct_every}."
        )
    with enable_tidal(model, policy, state):
        out = model(input_ids=input_ids, use_cache=True)
        found = [out.logits[:, -1].argmax(-1, keepdim=True)]
        since = 0
        while len(found) < max_new_tokens:
            out = model(input_ids=found[-1], past_key_values=out.past_key_values, use_cache=True)
            since += 1
            if since == correct_every:
                out.past_key_values.crop(-since)
                again = torch.cat(found[-since:], 1)
                out = model(input_ids=again, past_key_values=out.past_key_values, use_cache=True)
                since = 0
            found.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(found, 1)


def selection_overlap(attn_by_layer: Tensor | Sequence[Tensor], k: int) -> Tensor:
    """How much of one layer's choice another's holds, ``(layers, layers)``: entry ``(a, b)`` is the share of the ``k``
    keys of largest attention in layer ``b`` that are among those of layer ``a``, mean over everything else.

    attn_by_layer: weights or logits ``(layers, ..., keys)``, or one tensor a layer; ``k / keys`` is chance.
    """
    layers = list(attn_by_layer)
    if not layers or any(layer.shape != layers[0].shape for layer in layers):
        raise ShapeError("Attention of at least one layer is needed, of all in the same shape.")
    chosen = [layer.topk(min(k, layer.shape[-1]), -1).indices for layer in layers]
    shares = [[topk_recall(own, other, k).mean() for other in layers] for own in chosen]
    return torch.stack([torch.stack(row) for row in shares])


def best_reselect_layer(attn: Tensor | Sequence[Tensor], k: int, start: int = 2) -> int:
    """The layer where choosing again helps most: layers up to it read the choice of ``start``, those after it its own.

    attn: as in :func:`selection_overlap`, of texts like those to decode.
    """
    overlap = selection_overlap(attn, k)
    count = len(overlap)
    if not 0 <= start < count - 2:
        raise OptionError(f"Of {count} layers none after {start} has a layer behind it to choose for.")
    held = [
        float(overlap[start, start + 1 : layer].sum() + overlap[layer, layer:].sum())
        for layer in range(start + 1, count - 1)
    ]
    return start + 1 + max(range(len(held)), key=held.__getitem__)


@dataclass(frozen=True)
class KVRead:
    """Bytes of keys and values that a decoding step reads: with full attention, and by a policy."""

    dense: int
    policy: int

    @property
    def ratio(self) -> float:
        """Policy over dense."""
        return self.policy / self.dense


def kv_bytes_read(
    policy: TidalPolicy,
    length: int,
    *,
    num_kv_heads: int = 1,
    num_heads: int | None = None,
    head_dim: int = 128,
    batch: int = 1,
    element_size: int = 2,
) -> KVRead:
    """What a step reads of ``length`` cached tokens in all layers (an upper bound with ``share="union"``)."""
    heads = num_kv_heads if num_heads is None else num_heads
    if length < 1 or heads % num_kv_heads:
        raise OptionError(
            f"Need length >= 1 and num_kv_heads that divides num_heads; got {length}, {num_kv_heads}, {heads}."
        )
    row = batch * num_kv_heads * 2 * head_dim * element_size
    rows = sum(policy.rows(layer, length, heads // num_kv_heads) for layer in range(policy.num_layers))
    return KVRead(policy.num_layers * length * row, rows * row)
