"""The projection matrices of an attention layer, head by head, however its model stores them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.errors import RetrofitError
from regard.kernels import expand_groups
from regard.retrofit.sites import Site

__all__ = ["HeadProjections", "head_projections", "output_projection"]

_SPLIT = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
_JOINT = ("c_attn", "qkv", "query_key_value", "qkv_proj", "in_proj", "Wqkv")
_OUT = ("out", "o_proj", "out_proj", "c_proj", "o", "out_lin", "dense", "proj")


@dataclass(frozen=True)
class HeadProjections:
    """Of the ``num_heads`` query heads of a layer on a residual stream of ``embed_dim`` channels; key and value heads
    that serve several query heads stand once for each.

    ``query``, ``key`` ``(num_heads, head_dim, embed_dim)`` with biases ``(num_heads, head_dim)``; ``value``
    ``(num_heads, value_dim, embed_dim)`` with its bias; ``output`` ``(num_heads, embed_dim, value_dim)`` and the
    layer's ``output_bias`` ``(embed_dim,)``. Biases that a layer lacks are zeros.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    output_bias: Tensor

    @property
    def qk(self) -> Tensor:
        """``W_Q^T W_K`` ``(num_heads, embed_dim, embed_dim)``: scores are ``x_q qk x_k``, before rotation and scale."""
        return self.query.mT @ self.key

    @property
    def ov(self) -> Tensor:
        """``W_O W_V`` ``(num_heads, embed_dim, embed_dim)``: what attending to ``x`` adds to the stream is ``ov x``."""
        return self.output @ self.value


def head_projections(site: Site) -> HeadProjections:
    """The projections of a layer of :func:`regard.retrofit.discover`: torch's, this library's and transformers' ways of
    storing them. Raises RetrofitError for others."""
    context, home = site.context, site.home
    heads, kv_heads = context["num_heads"], context["num_kv_heads"]
    if isinstance(home, nn.MultiheadAttention):
        weights, biases = _torch(home)
    else:
        weights, biases = _linears(home, site, heads * context["head_dim"], kv_heads * context["head_dim"])
    for what, weight, count in (("query", weights[0], heads), ("key", weights[1], kv_heads)):
        if weight.shape[0] != count * context["head_dim"]:
            raise RetrofitError(
                f"{site.path}: its {what} projection gives {weight.shape[0]} channels, and {count} heads of "
                f"{context['head_dim']} would take {count * context['head_dim']}: it holds more than one thing."
            )
    counts = (heads, kv_heads, kv_heads)
    maps = [
        expand_groups(w.detach().unflatten(0, (n, -1))[None], heads)[0] for w, n in zip(weights, counts, strict=True)
    ]
    shifts = [
        m.new_zeros(m.shape[:2]) if b is None else expand_groups(b.detach().unflatten(0, (n, -1))[None], heads)[0]
        for m, b, n in zip(maps, biases, counts, strict=True)
    ]
    out_weight, out_bias = output_projection(site)
    if out_weight.shape[1] != heads * maps[2].shape[1]:
        raise RetrofitError(
            f"{site.path}: {heads} heads of {maps[2].shape[1]} channels do not go into the {out_weight.shape[1]} of "
            "the output projection that was found."
        )
    output = out_weight.detach().unflatten(1, (heads, -1)).transpose(0, 1)
    bias = out_weight.new_zeros(out_weight.shape[0]) if out_bias is None else out_bias.detach()
    return HeadProjections(maps[0], maps[1], maps[2], output, shifts[0], shifts[1], shifts[2], bias)


def output_projection(site: Site) -> tuple[Tensor, Tensor | None]:
    """Weight ``(embed_dim, num_heads * value_dim)`` and bias of what follows the heads."""
    home = site.home
    # Not the block: what bears such a name there is an MLP's.
    for holder in (home, site.parent):
        # BERT keeps it in a sibling, ``output.dense``.
        for place in (holder, getattr(holder, "output", None)):
            for name in _OUT:
                found = getattr(place, name, None)
                if isinstance(found, nn.Module) and getattr(found, "weight", None) is not None:
                    return _plain(found)
    raise RetrofitError(f"{site.path}: no output projection was found in {type(home).__name__}.")


def _torch(module: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [w for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if w is not None]
    biases: list[Tensor | None] = [None] * 3
    if module.in_proj_bias is not None:
        biases = list(module.in_proj_bias.chunk(3))
    return weights, biases


def _linears(home: nn.Module, site: Site, width: int, kv_width: int) -> tuple[list[Tensor], list[Tensor | None]]:
    for names in _SPLIT:
        found = [getattr(home, name, None) for name in names]
        if all(isinstance(linear, nn.Module) and getattr(linear, "weight", None) is not None for linear in found):
            pairs = [_plain(linear) for linear in found if isinstance(linear, nn.Module)]
            return [weight for weight, _ in pairs], [bias for _, bias in pairs]
    for name in _JOINT:
        linear = getattr(home, name, None)
        if isinstance(linear, nn.Module) and getattr(linear, "weight", None) is not None:
            weight, bias = _plain(linear)
            if name == "query_key_value" or getattr(home, "multi_query", None) is False:
                # NeoX, Bloom, Falcon and GPTBigCode interleave the three head by head, each its own way.
                break
            if weight.shape[0] != width + 2 * kv_width:
                break
            sizes = [width, kv_width, kv_width]
            parts = list(weight.split(sizes))
            shifts: list[Tensor | None] = [None] * 3 if bias is None else list(bias.split(sizes))
            return parts, shifts
    raise RetrofitError(
        f"{site.path}: the query, key and value projections of {type(home).__name__} were not found under the usual "
        "names. Metrics that read captured tensors work on it; those that read weights do not."
    )


def _plain(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``(out, in)`` weight and bias; GPT-2's Conv1D stores the transpose."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    assert isinstance(weight, Tensor)
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    return weight, bias if isinstance(bias, torch.Tensor) else None
