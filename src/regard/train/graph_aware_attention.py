"""Sparse GIN: a frozen language model adapted by graph networks on its own attention maps, beside low-rank adapters.

Buehler, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", 2025, arXiv 2501.02393. Behind the
attention of each decoder layer, and before its MLP, the residual stream ``x`` gets

    x + s RMSNorm(G(x)),   u = eps x + a x,   G(x) = W_2 prelu(W_1 u) + u

where ``a`` is a sparse graph made of the layer's maps and ``s`` a learned number, at first 0 in the first layer and 0.5
in the last: at scale 0 a layer is what it was. Only the graph networks, their norms and scales are trained;
:func:`regard.train.lora.add_lora` is the usual rival. Messages go from key to query; the released code passes them the
other way on a lower triangular graph and keeps source <= target, which leaves each token its own message alone. Its
``"any"`` takes a sigmoid of temperature 10 per head first, after which every edge passes the cut; here it is the
largest of the heads' weights.

Needs whole maps: ``O(N^2)`` memory a layer, and no key/value cache in decoding.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.nn import MultiHeadAttention, TransformerBlock

__all__ = ["AdaptedBlock", "AdaptedDecoderLayer", "SparseGINAdapter", "add_sparse_gin"]

_LLAMA = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class SparseGINAdapter(nn.Module):
    """A GIN on the sparse graph of a frozen layer's own maps: ``x + s RMSNorm(G(x))``.

    The graph: ``A = min(sum_h A_h, 1)``, ``a = sigmoid(alpha (A - threshold))``, zero above the diagonal and where
    ``a <= cut`` or ``A = 0``. With the defaults edges of ``A > 0.1405`` are kept. ``G`` as in the module's text.

    width: channels of the GIN, between linear maps from and to ``embed_dim`` (default: embed_dim, without them). mult:
    hidden units over width. adjacency: how heads make one graph, ``"sum"``, ``"mean"``, or ``"any"``, the largest of
    them. scale_init, scale_final: first values of the learned s in the first and the last layer, linear in between.
    """

    def __init__(
        self,
        embed_dim: int,
        width: int | None = None,
        mult: float = 1.0,
        adjacency: Literal["sum", "mean", "any"] = "sum",
        alpha: float = 10.0,
        threshold: float = 0.1,
        cut: float = 0.6,
        scale_init: float = 0.0,
        scale_final: float = 0.5,
        *,
        dropout: float = 0.1,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        if adjacency not in ("sum", "mean", "any"):
            raise OptionError(f"adjacency is 'sum', 'mean' or 'any', got {adjacency!r}.")
        if not 0 <= layer_index < num_layers:
            raise OptionError(f"layer_index is 0 to {num_layers - 1}, got {layer_index}.")
        narrow = embed_dim if width is None else width
        hidden = int(mult * narrow)
        if narrow < 1 or hidden < 1:
            raise OptionError(f"width {narrow} and mult {mult} leave no hidden unit; raise them.")
        self.embed_dim, self.adjacency = embed_dim, adjacency
        self.alpha, self.threshold, self.cut = alpha, threshold, cut
        self.enter: nn.Module = nn.Identity() if width is None else nn.Linear(embed_dim, narrow)
        self.leave: nn.Module = nn.Identity() if width is None else nn.Linear(narrow, embed_dim)
        self.up, self.down, self.act = nn.Linear(narrow, hidden), nn.Linear(hidden, narrow), nn.PReLU()
        self.eps = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(embed_dim, eps=1e-5)
        share = layer_index / (num_layers - 1) if num_layers > 1 else 0.0
        self.scale = nn.Parameter(torch.tensor(scale_init + (scale_final - scale_init) * share))

    def extra_repr(self) -> str:
        return f"adjacency={self.adjacency!r}, alpha={self.alpha}, threshold={self.threshold}, cut={self.cut}"

    def graph(self, weights: Tensor) -> Tensor:
        """The graph ``(batch, length, length)`` of maps ``(batch, num_heads, length, length)``."""
        if weights.dim() != 4 or weights.shape[-1] != weights.shape[-2]:
            raise ShapeError(
                f"The adapter takes whole maps (batch, heads, length, length), got {tuple(weights.shape)}. With a "
                "cache a step has rows of its new tokens alone, so generate with use_cache=False."
            )
        if self.adjacency == "sum":
            linked = weights.sum(1).clamp(max=1)
        else:
            linked = weights.mean(1) if self.adjacency == "mean" else weights.amax(1)
        edges = torch.sigmoid(self.alpha * (linked - self.threshold))
        return edges.masked_fill((edges <= self.cut) | (linked <= 0), 0).tril()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The residual stream ``x (batch, length, embed_dim)`` behind the attention of these maps, the GIN added."""
        edges = self.graph(weights)
        if x.dim() != 3 or x.shape[-1] != self.embed_dim or x.shape[:2] != edges.shape[:2]:
            raise ShapeError(
                f"This adapter takes (batch, length, {self.embed_dim}) that fits its maps {tuple(weights.shape)}, got "
                f"{tuple(x.shape)}."
            )
        nodes = self.enter(x)
        mixed = self.eps * nodes + edges.to(nodes.dtype) @ nodes
        out = self.leave(self.dropout(self.down(self.act(self.up(mixed))) + mixed))
        added: Tensor = self.scale * self.norm(out)
        return x + added


class AdaptedBlock(nn.Module):
    """A :class:`~regard.nn.TransformerBlock` around multi-head attention, with an adapter before its MLP."""

    def __init__(self, block: TransformerBlock, adapter: SparseGINAdapter) -> None:
        super().__init__()
        self.block, self.adapter = block, adapter

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """As the block's; the attention must be causal."""
        if not call.get("causal"):
            raise OptionError("The adapter's graph is causal, so the block has to be: call it with causal=True.")
        attention = cast(MultiHeadAttention, self.block.attention)
        projected = attention.project(self.block.attention_norm(x))
        weights = attention.mechanism.weights(*projected, **call)
        return self.block.feed_forward(self.adapter(self.block.attend(x, **call), weights))


class AdaptedDecoderLayer(nn.Module):
    """A decoder layer of transformers, with Llama's names, with an adapter before its MLP."""

    def __init__(self, layer: nn.Module, adapter: SparseGINAdapter) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """As the layer's. RetrofitError where the attention gives no maps."""
        input_norm, attention, norm, mlp = (self.layer.get_submodule(name) for name in _LLAMA)
        out, weights = attention(hidden_states=input_norm(hidden_states), **call)[:2]
        if weights is None:
            raise RetrofitError(
                "The attention gives no maps; call model.set_attn_implementation('eager') before it runs."
            )
        x = self.adapter(hidden_states + out, weights)
        fed: Tensor = x + mlp(norm(x))
        return fed


def add_sparse_gin(model: nn.Module, **options: Any) -> list[nn.Parameter]:
    """Freeze ``model`` and give each of its decoder layers an adapter; options as in :class:`SparseGINAdapter`.

    model: of :class:`~regard.nn.TransformerBlock` around causal multi-head attention (such as
    :class:`regard.models.SequenceModel`), or a causal language model of transformers whose layers have Llama's names;
    it is changed in place, and one of transformers computes its maps from then on (``"eager"``). Returns the adapters'
    parameters, the only ones that still require a gradient.
    """
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if _adaptable(child) and not isinstance(parent, AdaptedBlock | AdaptedDecoderLayer)
    ]
    if not found:
        raise RetrofitError(
            "The model has no decoder layer to adapt: neither a TransformerBlock around MultiHeadAttention nor a layer "
            f"with {', '.join(_LLAMA)}. Put a SparseGINAdapter into its layers by hand."
        )
    model.requires_grad_(False)
    if hasattr(model, "set_attn_implementation"):
        cast(Any, model).set_attn_implementation("eager")
    adapters: list[nn.Parameter] = []
    for index, (parent, name, child) in enumerate(found):
        norm = child.attention_norm if isinstance(child, TransformerBlock) else child.get_submodule("input_layernorm")
        gain = cast(Tensor, norm.weight)
        adapter = SparseGINAdapter(len(gain), **options, layer_index=index, num_layers=len(found))
        adapter.to(gain.device, gain.dtype).train(child.training)
        if isinstance(child, TransformerBlock):
            setattr(parent, name, AdaptedBlock(child, adapter))
        else:
            setattr(parent, name, AdaptedDecoderLayer(child, adapter))
        adapters.extend(adapter.parameters())
    return adapters


def _adaptable(layer: nn.Module) -> bool:
    if isinstance(layer, TransformerBlock):
        return isinstance(layer.attention, MultiHeadAttention)
    return all(name in dict(layer.named_children()) for name in _LLAMA)
