"""The ways into plain torch models: ``nn.MultiheadAttention``, and mechanisms in the hosts of ``regard.nn``.

The module stays where it is, with its parameters, keys and hooks; only its instance's ``forward`` is another one for a
while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RetrofitError
from regard.masks import Boolean, Mask
from regard.mechanism import Mechanism
from regard.retrofit.reading import Reading, read_mask
from regard.retrofit.sites import Site
from regard.retrofit.switch import SOFTMAX, Call, Patches, implied_weights, name_of, respond, switches

__all__ = ["open_mechanism", "open_multihead"]

_patches = Patches()


def _patch(closing: ExitStack, target: object, kind: str, apply: Callable[[], Callable[[], None]]) -> None:
    _patches.acquire(target, kind, apply)
    closing.callback(_patches.release, target, kind)


def _instead(module: nn.Module, method: Callable[..., Any], name: str = "forward") -> Callable[[], None]:
    """Give one instance another ``forward``, or another method."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = method

    def undo() -> None:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before

    return undo


def open_mechanism(site: Site, closing: ExitStack) -> None:
    """Lead the calls of a mechanism inside a host to its switch."""
    mechanism = site.module
    assert isinstance(mechanism, Mechanism)
    own, standing = mechanism.forward, mechanism.token_positions
    _patch(closing, mechanism, "forward", partial(_instead, mechanism, partial(_mechanism_forward, mechanism, own)))
    places = partial(_token_positions, mechanism, standing)
    _patch(closing, mechanism, "positions", partial(_instead, mechanism, places, "token_positions"))


def _token_positions(module: Mechanism, own: Callable[[int], Tensor | None], length: int) -> Tensor | None:
    """Hosts that rotate ask the mechanism that they hold, and mean the one that answers."""
    chosen = switches[id(module)].replacement
    return own(length) if chosen is None else chosen.mechanism.token_positions(length)


def _mechanism_forward(
    module: Mechanism,
    own_forward: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    switch = switches[id(module)]
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = Boolean(mask)
    rule, bias = (None, mask) if isinstance(mask, Tensor) else (mask, None)
    reading = Reading(causal, rule, bias, key.shape[2])
    space = None if grid is None else tuple(grid)

    def own(call: Call) -> tuple[Tensor, Tensor | None]:
        seen = call.reading
        told: dict[str, Any] = {"causal": seen.causal, "mask": seen.argument(call.query.shape[2], call.query.dtype)}
        out = own_forward(call.query, call.key, call.value, **told, grid=call.grid, scale=call.scale)
        return out.transpose(1, 2), None

    call = Call(query, key, value, lambda: reading, scale, 0.0, space)
    output, _ = switch.run(call, own, own_weights=partial(implied_weights, switch.site, module))
    return output.transpose(1, 2)


def open_multihead(site: Site, model: nn.Module, closing: ExitStack) -> None:
    """Lead the calls of an ``nn.MultiheadAttention`` to its switch, and keep torch from going around it."""
    module = site.module
    assert isinstance(module, nn.MultiheadAttention)
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise RetrofitError(
            f"{site.path}: add_bias_kv and add_zero_attn of nn.MultiheadAttention add keys of their own, which is not "
            "supported. Leave this layer out with layers=..., or build it without them."
        )
    _patch(closing, module, "forward", partial(_instead, module, partial(_multihead_forward, module)))
    # TransformerEncoderLayer computes attention itself, past this module, unless a hook hangs somewhere on it.
    _patch(closing, module, "hook", partial(_hook, module))
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(part is module for part in encoder.modules()):
            # It would hand padding to its layers as a nested tensor, which only that shortcut understands.
            _patch(closing, encoder, "nested", partial(_without_nested, encoder))


def _hook(module: nn.Module) -> Callable[[], None]:
    return module.register_forward_pre_hook(lambda module, args: None).remove


def _without_nested(encoder: nn.TransformerEncoder) -> Callable[[], None]:
    before = encoder.use_nested_tensor
    encoder.use_nested_tensor = False

    def undo() -> None:
        encoder.use_nested_tensor = before

    return undo


def _multihead_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    switch = switches[id(module)]
    if query.is_nested or key.is_nested or value.is_nested:
        raise RetrofitError(
            f"{switch.site.path}: nested tensors are not supported; pass padded ones and a padding mask."
        )
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    q, k, v = _project(module, query, key, value)
    mask = _one_mask(key_padding_mask, attn_mask, len(q), q)

    def read() -> Reading:
        return read_mask(mask, q.shape[2], k.shape[2], is_causal and mask is None)

    call = Call(q, k, v, read, dropout=module.dropout if module.training else 0.0)
    own = partial(respond, switch.site, SOFTMAX, want_weights=need_weights)
    if need_weights and switch.replacement is not None and not switch.replacement.mechanism.value_linear:
        raise RetrofitError(
            f"{switch.site.path}: {name_of(switch.replacement.mechanism)} implies no attention weights; call "
            "the module with need_weights=False."
        )
    heads, weights = switch.run(call, own, need_weights)
    output = F.linear(heads.flatten(2), module.out_proj.weight, module.out_proj.bias)
    if not need_weights or weights is None:
        weights = None
    elif average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return output[0], None if weights is None else weights[0]
    return output if module.batch_first else output.transpose(0, 1), weights


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(batch, num_heads, length, head_dim)`` each, by the module's own parameters."""
    if module.in_proj_weight is not None:
        weights: Iterable[Any] = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases: Iterable[Any] = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    projected = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in projected)
    return q, k, v


def _one_mask(padding: Tensor | None, mask: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
    """torch's two masks (True: hidden; float: added) as one: boolean (True: visible) or float, of four axes."""
    parts = []
    if padding is not None:
        parts.append(padding[:, None, None])
    if mask is not None:
        parts.append(mask[None, None] if mask.dim() == 2 else mask.view(batch, -1, *mask.shape[-2:]))
    if not parts:
        return None
    if all(part.dtype == torch.bool for part in parts):
        hidden = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return ~hidden
    added = [
        torch.zeros_like(p, dtype=like.dtype).masked_fill(p, float("-inf")) if p.dtype == torch.bool else p
        for p in parts
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
