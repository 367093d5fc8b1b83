"""Multi-head attention with a pluggable mechanism: the projections around ``(query, key, value)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.layers.heads import head_sizes
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import Boolean, KeyPadding, Mask
from regard.mechanism import Layer, Mechanism
from regard.registry import build, get
from regard.registry import options as known_options

__all__ = ["MultiHeadAttention", "make_attention"]


class MultiHeadAttention(nn.Module):
    """Project, attend by a mechanism, project back: ``(batch, length, embed_dim)`` in and out.

    mechanism: a name (its options follow as keywords) or a built :class:`~regard.mechanism.Mechanism`.
    num_kv_heads: key/value heads, dividing ``num_heads`` (default: equal). kdim, vdim: channels of the context, for
    cross-attention. rotary: rotary positions on queries and keys (Su et al., 2021, arXiv 2104.09864); the last query
    stands where the last key does. dropout: of the output of the mechanism's heads before the output projection.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mechanism: str | Mechanism = "full",
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        rotary: bool = False,
        dropout: float = 0.0,
        layer_index: int = 0,
        num_layers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.rotary = rotary
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=bias)
        self.key = nn.Linear(kdim or embed_dim, kv_width, bias=bias)
        self.value = nn.Linear(vdim or embed_dim, kv_width, bias=bias)
        self.out = nn.Linear(width, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        if isinstance(mechanism, str):
            if not issubclass(get(mechanism), Mechanism):
                raise OptionError(f"{mechanism!r} brings its own projections; use regard.nn.make_attention for it.")
            built = build(
                mechanism,
                options,
                num_heads=num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                layer_index=layer_index,
                num_layers=num_layers,
            )
            mechanism = cast(Mechanism, built)
        elif options:
            raise OptionError(
                f"Options {sorted(options)} belong to a mechanism's name; the one passed is built already."
            )
        self.mechanism = mechanism
        if rotary and self.mechanism.applies_rotary:
            raise OptionError("This mechanism applies rotary positions itself; leave rotary out.")

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, mechanism: str | Mechanism = "full", **options: Any
    ) -> MultiHeadAttention:
        """The same weights as a ``torch.nn.MultiheadAttention``, around another mechanism.

        Inputs come batch first, whatever the module's ``batch_first``; its dropout of attention weights is left out.
        """
        if module.bias_k is not None or module.add_zero_attn:
            raise RetrofitError("add_bias_kv and add_zero_attn of nn.MultiheadAttention are not supported.")
        host = cls(
            module.embed_dim,
            module.num_heads,
            mechanism,
            kdim=module.kdim,
            vdim=module.vdim,
            bias=module.in_proj_bias is not None,
            dropout=0.0,
            **options,
        ).to(module.out_proj.weight.device, module.out_proj.weight.dtype)
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = tuple(cast(Tensor, w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight))
        with torch.no_grad():
            for linear, weight in zip((host.query, host.key, host.value), weights, strict=True):
                linear.weight.copy_(weight)
            if module.in_proj_bias is not None:
                for linear, bias in zip((host.query, host.key, host.value), module.in_proj_bias.chunk(3), strict=True):
                    linear.bias.copy_(bias)
            host.out.weight.copy_(module.out_proj.weight)
            if module.out_proj.bias is not None:
                host.out.bias.copy_(module.out_proj.bias)
        return host.train(module.training)

    def project(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``(batch, num_heads, length, head_dim)``, key and value ``(batch, num_kv_heads, ...)``."""
        key_source, value_source = (
            context if isinstance(context, tuple) else (x, x) if context is None else (context,) * 2
        )
        for what, tensor, linear in (
            ("x", x, self.query),
            ("the source of keys", key_source, self.key),
            ("the source of values", value_source, self.value),
        ):
            if tensor.dim() != 3 or tensor.shape[-1] != linear.in_features:
                raise ShapeError(
                    f"MultiHeadAttention takes {what} as (batch, length, {linear.in_features}), "
                    f"got {tuple(tensor.shape)}."
                )

        def heads(tensor: Tensor, count: int) -> Tensor:
            return tensor.unflatten(-1, (count, self.head_dim)).transpose(1, 2)

        query = heads(self.query(x), self.num_heads)
        key, value = heads(self.key(key_source), self.num_kv_heads), heads(self.value(value_source), self.num_kv_heads)
        if self.rotary:
            longest = max(query.shape[2], key.shape[2])
            places = self.mechanism.token_positions(longest)
            counted = longest if places is None else places
            cos, sin = rotary_angles(counted, self.head_dim, device=x.device, dtype=x.dtype)
            query, key = (
                apply_rotary(t, cos[longest - t.shape[2] :], sin[longest - t.shape[2] :]) for t in (query, key)
            )
        return query, key, value

    def forward(
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        key_padding: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend within ``x`` ``(batch, length, embed_dim)``, or from ``x`` to ``context`` ``(batch, k_len, kdim)``.

        context: a pair takes keys from the first and values ``(batch, k_len, vdim)`` from the second. mask: a regard
        mask or a tensor, as the mechanism takes it. key_padding: boolean ``(batch, k_len)``, True for real tokens
        (torch's ``key_padding_mask`` is its opposite).
        """
        if key_padding is not None:
            padding = KeyPadding(key_padding)
            if isinstance(mask, Tensor):
                if mask.dtype != torch.bool:
                    raise OptionError(
                        "key_padding goes with a regard mask or a boolean one; write it into the additive mask as -inf."
                    )
                mask = Boolean(mask)
            mask = padding if mask is None else mask & padding
        query, key, value = self.project(x, context)
        out = self.mechanism(query, key, value, causal=causal, mask=mask, grid=grid)
        return cast(Tensor, self.out(self.dropout(out.transpose(1, 2).flatten(2))))


def make_attention(name: str, embed_dim: int, num_heads: int, **options: Any) -> nn.Module:
    """``(batch, length, embed_dim)`` in and out for any name: a layer as it is, a mechanism inside its host.

    Keywords that :class:`MultiHeadAttention` takes go to it, the others to the mechanism or layer. Raises OptionError
    for what is neither.
    """
    if not issubclass(get(name), Layer | Mechanism):
        raise OptionError(f"{name!r} works on feature maps, not on tokens; build it with regard.create.")
    if issubclass(get(name), Layer):
        context = {k: options.pop(k) for k in ("layer_index", "num_layers", "num_kv_heads") if k in options}
        # To switch off what a layer does not have is no mistake; to switch it on is one, and build says so.
        absent = [k for k in ("rotary", "dropout") if k not in known_options(name) and not options.get(k)]
        options = {k: v for k, v in options.items() if k not in absent}
        return build(name, options, embed_dim=embed_dim, channels=embed_dim, num_heads=num_heads, **context)
    return MultiHeadAttention(embed_dim, num_heads, name, **options)
