"""Attention with fewer projections: without the values', without the keys' too, and with a learned mixing of tokens.

Hosseini and Hosseini, "You Need to Pay Better Attention", 2024, arXiv 2403.01643. Head h of ``num_heads``, with
``d = embed_dim / num_heads`` channels and ``X[h]`` for the h-th slice of d channels of X:

    standard    softmax(Q W_Q (K W_K)^T / sqrt(d)) V W_V, all heads side by side, times W_O         4 D^2 weights
    Optimised   softmax(Q W_Q (K W_K)^T / sqrt(d)) V[h], then W_O                                   3 D^2
    Efficient   softmax(Q W_Q K[h]^T / sqrt(d)) V[h], then W_O                                      2 D^2
    Super       softmax(Q W_Q K[h]^T / sqrt(d)) W_A V[h], then W_O                                  2 D^2 + L^2

Two linear maps in a row are one: with one head, ``W_V W_O`` and ``W_Q W_K^T`` are merged and nothing is lost
(:func:`from_mha`). With several, a head sees its own slice of the channels alone, so it is less than standard attention
unless W_V (and W_K) is block diagonal. Super's kernel W_A mixes the values of ``max_len`` positions before they are
read; shorter inputs take its leading block, causal ones its lower triangle. It tells positions apart, so it depends on
the tokens' order, and a mask per query would not hold through it: padding alone is honoured.

Inputs ``(batch, length, embed_dim)``, keys and values of their own length. Weights begin as Xavier's, biases at zero.
Cost: a dense attention, and 4, 3 or 2 projections of ``2 N D^2`` FLOPs; ``2 N^2 D`` more for W_A (:func:`count`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.cost import AttentionShape, dense_cost, linear_layer_flops
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.kernels import accumulation_dtype, dense_attention
from regard.layers.heads import head_sizes
from regard.layers.padding import layer_keys
from regard.masks import Boolean, Mask
from regard.mechanism import ALL_PATTERNS, Layer
from regard.registry import register

__all__ = ["Count", "EfficientAttention", "Kind", "OptimisedAttention", "SuperAttention", "count", "from_mha"]

Kind = Literal["standard", "optimised", "efficient", "super"]
Context = Tensor | tuple[Tensor, Tensor] | None


class _SlicedValues(Layer):
    """What the three share: heads read slices of the values, and of the keys where these have no projection."""

    patterns = ALL_PATTERNS
    needs_training = True

    def __init__(self, embed_dim: int, num_heads: int, project_keys: bool, bias: bool) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise OptionError(f"Heads are slices of the channels: num_heads {num_heads} must divide {embed_dim}.")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.query = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.key = nn.Linear(embed_dim, embed_dim, bias=bias) if project_keys else None
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)
        # Queries and keys as one matrix, as nn.MultiheadAttention begins.
        packed = (self.query,) if self.key is None else (self.query, self.key)
        for linears in (packed, (self.out,)):
            bound = math.sqrt(6 / ((1 + len(linears)) * embed_dim))
            for linear in linears:
                nn.init.uniform_(linear.weight, -bound, bound)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def forward(
        self, x: Tensor, context: Context = None, *, causal: bool = False, mask: Mask | Tensor | None = None
    ) -> Tensor:
        """Attend within ``x (batch, length, embed_dim)``, or from ``x`` to ``context (batch, k_len, embed_dim)``; a
        pair takes keys from the first and values from the second. mask: a regard mask or a boolean tensor, True where
        visible."""
        key, value = context if isinstance(context, tuple) else (x, x) if context is None else (context, context)
        for what, tensor in (("x", x), ("the keys' source", key), ("the values' source", value)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.embed_dim:
                raise ShapeError(
                    f"{type(self).__name__} takes {what} as (batch, length, {self.embed_dim}), got "
                    f"{tuple(tensor.shape)}; without projections keys and values have the layer's own channels."
                )
        if not len(x) == len(key) == len(value) or key.shape[1] != value.shape[1]:
            raise ShapeError(
                f"Batches of all three and lengths of keys and values must be equal; got {tuple(x.shape)}, "
                f"{tuple(key.shape)} and {tuple(value.shape)}."
            )
        rule = Boolean(mask) if isinstance(mask, Tensor) else mask
        heads = [
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for t in (self.query(x), key if self.key is None else self.key(key), value)
        ]
        heads[2] = self.align(heads[2], causal, rule)
        read = dense_attention(heads[0], heads[1], heads[2], causal=causal, mask=rule)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out

    def align(self, value: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """What is read, from the values ``(batch, num_heads, k_len, head_dim)``: themselves."""
        return value


@register("better_attention_optimised")
class OptimisedAttention(_SlicedValues):
    """Standard attention without W_V: ``3 embed_dim^2`` weights."""

    def __init__(self, embed_dim: int, num_heads: int = 1, bias: bool = True) -> None:
        super().__init__(embed_dim, num_heads, True, bias)


@register("better_attention_efficient")
class EfficientAttention(_SlicedValues):
    """Standard attention without W_V and W_K: ``2 embed_dim^2`` weights."""

    def __init__(self, embed_dim: int, num_heads: int = 1, bias: bool = True) -> None:
        super().__init__(embed_dim, num_heads, False, bias)


@register("better_attention")
class SuperAttention(_SlicedValues):
    """Efficient attention whose values are mixed by a learned kernel W_A first: ``2 embed_dim^2 + max_len^2`` weights,
    fewer than standard attention's while ``max_len < sqrt(2) embed_dim``.

    max_len: the longest input. per_head: a kernel for each head instead of one for all. kernel_init: ``"xavier"``, or
    ``"identity"``, with which it begins as Efficient attention. Padded values count as zeros; masks per query are
    refused.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        max_len: int = 512,
        bias: bool = True,
        per_head: bool = False,
        kernel_init: Literal["xavier", "identity"] = "xavier",
    ) -> None:
        super().__init__(embed_dim, num_heads, False, bias)
        if max_len < 1 or kernel_init not in ("xavier", "identity"):
            raise OptionError(
                f"max_len is at least 1 and kernel_init 'xavier' or 'identity'; got {max_len} and {kernel_init!r}."
            )
        self.max_len = max_len
        self.kernel = nn.Parameter(torch.eye(max_len).repeat(num_heads if per_head else 1, 1, 1))
        if kernel_init == "xavier":
            for matrix in self.kernel:
                nn.init.xavier_uniform_(matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_len={self.max_len}, kernels={len(self.kernel)}"

    def align(self, value: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """``W_A V``, zeros for padded rows of V."""
        length = value.shape[2]
        if length > self.max_len:
            raise ShapeError(
                f"{length} keys exceed max_len {self.max_len}, the size of the learned kernel; build the layer with a "
                "larger one and train it, or cut the input."
            )
        keys = layer_keys(mask, length, value.device, type(self).__name__)
        work = accumulation_dtype(value.dtype)
        kernel = self.kernel[:, :length, :length].to(work)
        wide = value.to(work)
        if keys is not None:
            wide = wide.masked_fill(~keys[..., None], 0)
        return ((kernel.tril() if causal else kernel) @ wide).to(value.dtype)


@dataclass(frozen=True)
class Count:
    """``parameters``: weights without biases. ``matmuls_per_head``: of projections, scores, read-out, kernel and
    output. ``flops``: of one forward pass of one sequence."""

    parameters: int
    matmuls_per_head: int
    flops: int


def count(kind: Kind, dim: int, heads: int, length: int) -> Count:
    """What self-attention of a kind costs for ``length`` tokens (Super: of ``max_len`` as long) of ``dim`` channels."""
    if kind not in get_args(Kind):
        raise OptionError(f"kind is one of {', '.join(get_args(Kind))}; got {kind!r}.")
    projections = {"standard": 4, "optimised": 3, "efficient": 2, "super": 2}[kind]
    mixing = kind == "super"
    attention = dense_cost(AttentionShape(length, length, heads, head_sizes(dim, heads)[1])).flops
    return Count(
        projections * dim**2 + mixing * length**2,
        projections + 2 + mixing,
        projections * linear_layer_flops(length, dim, dim)
        + attention
        + mixing * linear_layer_flops(length, length, dim),
    )


@torch.no_grad()
def from_mha(
    mha: nn.MultiheadAttention, kind: Literal["optimised", "efficient"]
) -> OptimisedAttention | EfficientAttention:
    """The same function with fewer weights: ``W_V W_O`` becomes the output's weight and, for ``"efficient"``, ``W_Q
    W_K^T`` the query's. Biases of keys drop out (softmax does not see them), those of values go into the output's.

    Inputs come batch first. Exact with one head, and with several where W_V (and W_K) is block diagonal, a block for
    each head; RetrofitError where it is not. A query that sees no key gets the output's bias.
    """
    if mha.in_proj_weight is None or mha.bias_k is not None or mha.add_zero_attn:
        raise RetrofitError("Needs a module of one embed_dim for all inputs, without add_bias_kv and add_zero_attn.")
    if kind not in ("optimised", "efficient"):
        raise OptionError(
            f"kind is 'optimised' or 'efficient', got {kind!r}; Super with an identity kernel is Efficient."
        )
    dim, heads = mha.embed_dim, mha.num_heads
    has_bias = mha.in_proj_bias is not None
    query, key, value = mha.in_proj_weight.chunk(3)
    zero = query.new_zeros(dim)
    query_bias, key_bias, value_bias = mha.in_proj_bias.chunk(3) if has_bias else (zero, zero, zero)
    out, out_bias = mha.out_proj.weight, mha.out_proj.bias if has_bias else zero
    made = (OptimisedAttention if kind == "optimised" else EfficientAttention)(dim, heads, bias=has_bias)
    made.to(query.device, query.dtype)
    # A slice of the input is all that a head can have: of the maps' blocks, only those on the diagonal may differ
    # from zero. Wide, so that products of weights keep their digits.
    wide = torch.float64 if query.device.type != "mps" else torch.float32
    _require_blocks("values", value, heads)
    new_out, new_out_bias = out.to(wide) @ value.to(wide), out_bias.to(wide) + out.to(wide) @ value_bias.to(wide)
    new_query, new_query_bias = query.to(wide), query_bias.to(wide)
    if kind == "efficient":
        _require_blocks("keys", key, heads)
        new_query, new_query_bias = key.to(wide).T @ new_query, key.to(wide).T @ new_query_bias
    for linear, weight, bias in ((made.query, new_query, new_query_bias), (made.out, new_out, new_out_bias)):
        linear.weight.copy_(weight)
        if has_bias:
            linear.bias.copy_(bias)
    if made.key is not None:
        made.key.weight.copy_(key)
        if has_bias:
            made.key.bias.copy_(key_bias)
    return made.train(mha.training)


def _require_blocks(what: str, weight: Tensor, heads: int) -> None:
    size = len(weight) // heads
    blocks = weight.unflatten(0, (heads, size)).unflatten(-1, (heads, size))
    beside = blocks.abs().amax((1, 3)) * ~torch.eye(heads, dtype=torch.bool, device=weight.device)
    if bool(beside.any()):
        raise RetrofitError(
            f"With {heads} heads each would read its own slice of the {what} alone, but their projection mixes all "
            "channels, so nothing of fewer weights is equal to it. Convert a module of one head or with block diagonal "
            "projections, or train the smaller layer anew."
        )
