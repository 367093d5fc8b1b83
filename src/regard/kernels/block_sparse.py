"""Softmax attention over the blocks of a layout, any layout, per batch and head.

``reference``: the dense form under the layout's mask. Fast forms, of which ``auto`` takes the one that suits the call:

- ``gather``: key blocks gathered for groups of query blocks (:mod:`regard.kernels.block_gather`); runs anywhere;
- ``fused``: a layout shared by all sequences and heads, through torch's fused CPU attention a few query blocks at a
  time (:mod:`regard.kernels.shared_blocks`);
- ``merged``: query blocks gathered for key blocks and merged by their log-sum-exp, for rows of single queries
  (:mod:`regard.kernels.query_gather`);
- ``native``: C++ for CPUs (:mod:`regard.kernels.native`); half precision is converted, float64 is not taken;
- ``flex``: compiled FlexAttention (forward and backward on a GPU, forward alone on a CPU);
- ``triton``: kernels of our own for GPUs (:mod:`regard.kernels.triton_blocks`), for blocks of any size, with the
  log-sum-exp.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from regard.errors import BackendError, ShapeError
from regard.kernels import native, shared_blocks
from regard.kernels.backends import compiled_flex, has_triton, resolve
from regard.kernels.block_gather import GatheredBlocks
from regard.kernels.dense import dense_attention
from regard.kernels.query_gather import MergedBlocks
from regard.kernels.score_bias import TableBias
from regard.kernels.shapes import score_scale
from regard.kernels.shared_blocks import SharedBlocks
from regard.layout import BlockLayout
from regard.masks import Boolean

__all__ = ["block_sparse_attention"]

FORMS = ("reference", "gather", "fused", "merged", "native", "flex", "triton")

# Up to so many queries (decoding) the whole rows cost less than finding out what to leave out.
_FEW = 8


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    bias: TableBias | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    bias: TableBias | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    bias: TableBias | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` over the pairs of ``layout``.

    query ``(batch, num_heads, q_len, head_dim)``; key and value ``(batch, kv_heads, k_len, ...)``, ``kv_heads``
    dividing ``num_heads``. Returns ``(batch, num_heads, q_len, value_dim)`` and, with ``return_lse``, the log-sum-exp
    of each row ``(batch, num_heads, q_len)``. Rows with nothing to see give zeros (and ``-inf``).
    """
    if layout.q_len != query.shape[2] or layout.k_len != key.shape[2]:
        raise ShapeError(
            f"The layout is for {layout.q_len} queries and {layout.k_len} keys; "
            f"got {query.shape[2]} and {key.shape[2]}."
        )
    form = resolve("block_sparse", backend, FORMS)
    if form == "auto":
        form = _choose(query, key, value, layout, bias, return_lse)
    if form in ("reference", "dense"):
        added = None if bias is None else bias.dense(layout.q_len, layout.k_len)
        return dense_attention(  # type: ignore[call-overload]
            query,
            key,
            value,
            mask=Boolean(layout.dense()),
            bias=added,
            scale=scale,
            return_lse=return_lse,
            backend="auto" if form == "dense" else "reference",
        )
    if bias is not None and form not in ("gather", "fused", "native"):
        raise BackendError(f"The {form} form takes no bias; use backend='gather'.")
    factor = score_scale(query, scale)
    if form == "flex":
        if return_lse:
            raise BackendError("The flex form does not return the log-sum-exp; use backend='gather'.")
        return _flex(query, key, value, layout, factor)
    out, lse = _run(form, query, key, value, layout, factor, bias, return_lse)
    return (out, lse) if return_lse else out


def _choose(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: TableBias | None, return_lse: bool
) -> str:
    """The fastest form that can run the call."""
    if query.shape[2] <= _FEW and not return_lse:
        return "dense"
    if layout.block_q == 1 < layout.block_k and bias is None:
        return "merged"
    if query.is_cuda and bias is None:
        # FlexAttention is made for blocks of whole tiles of its own.
        if not return_lse and layout.block_q % 128 == layout.block_k % 128 == 0:
            return "flex"
        if has_triton() and query.dtype != torch.float64:
            return "triton"
    if native.worthwhile(query, value, layout, bias):
        return "native"
    return "fused" if shared_blocks.fits(query, key, value, layout, bias, return_lse) else "gather"


# The index work of the forms is no graph: a compiled model calls them as they are.
@torch.compiler.disable
def _run(
    form: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    scale: float,
    bias: TableBias | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    table = None if bias is None else bias.table
    if form == "fused":
        shared_blocks.require(query, key, value, layout, bias, return_lse)
        return SharedBlocks.apply(query, key, value, table, layout, scale, bias)
    if form == "gather":
        return GatheredBlocks.apply(query, key, value, table, layout, scale, bias)
    if form == "triton":
        from regard.kernels.triton_blocks import TritonBlocks

        return TritonBlocks.apply(query, key, value, layout, scale)
    if form == "merged":
        return MergedBlocks.apply(query, key, value, layout, scale)
    return _Native.apply(query, key, value, table, layout, scale, bias)


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    if not query.is_cuda and any(t.requires_grad for t in (query, key, value)):
        raise BackendError("FlexAttention has no backward pass on CPU; use backend='gather'.")
    out: Tensor = compiled_flex()(
        query,
        key,
        value,
        block_mask=layout.block_mask(),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


class _Native(torch.autograd.Function):
    """Forward keeps the output and the log-sum-exp; backward forms the scores again. In C++, in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        layout: BlockLayout,
        scale: float,
        bias: TableBias | None,
    ) -> tuple[Tensor, Tensor]:
        if query.device.type != "cpu" or query.dtype == torch.float64:
            raise BackendError(
                f"The native form runs on a CPU in float32 or half precision, not in {query.dtype} on {query.device}; "
                "use backend='gather'."
            )
        out, lse = native.forward(query.float(), key.float(), value.float(), layout, scale, bias)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.scale, ctx.bias = layout, scale, bias
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = native.backward(
            query.float(),
            key.float(),
            value.float(),
            out.float(),
            lse,
            grad_out.float(),
            grad_lse,
            ctx.layout,
            ctx.scale,
            ctx.bias,
        )
        grad_query, grad_key, grad_value, grad_table = grads
        return (
            grad_query.to(query.dtype),
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            None if grad_table is None else grad_table.to(ctx.bias.table.dtype),
            None,
            None,
            None,
        )
