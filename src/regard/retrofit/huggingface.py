"""The way into transformers: its AttentionInterface and AttentionMaskInterface, one name for all.

While a model is retrofitted or watched, the configs of the model and its parts name the implementation ``"regard"``.
Each call is then answered by the layer's switch, and the model's own implementation stays within reach for the layers
that are left to it. The mask function is registered beside the attention function: an implementation without one gets
no mask at all from transformers, silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.errors import MissingExtraError, RetrofitError, UnsupportedMaskError
from regard.retrofit.reading import Reading, read_mask
from regard.retrofit.sites import Site, interface_method
from regard.retrofit.switch import SOFTMAX, Call, Patches, respond, switches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["NAME", "open_model", "own_implementation"]

NAME = "regard"

# Arguments that change what attention computes, besides mask, bias and scale: refused, never ignored.
_MEANINGFUL = {
    "softcap": "caps its logits",
    "s_aux": "adds learned sinks to its softmax",
    "sinks": "adds learned sinks to its softmax",
    "indices": "already selects its keys",
    "block_indices": "already selects its keys",
    "head_mask": "is called with a head mask",
    "cache": "is served by continuous batching with a paged cache",
}
_EAGER = (None, "eager")

_patches = Patches()
_originals: dict[int, str | None] = {}
_members: dict[int, frozenset[int]] = {}
_weights_wanted: list[bool] = []


def open_model(model: nn.Module, sites: Iterable[Site], left: Iterable[Site], closing: ExitStack) -> None:
    """Lead the attention of the transformers models inside ``model`` to the switches, until ``closing`` closes.

    left: the sites that stay with the model's own attention.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise MissingExtraError("Retrofitting a Hugging Face model", "transformers") from error
    for site in sites:
        _check_not_copied(site)
    for site in left:
        if _implementation_before(site.module) in _EAGER:
            _eager(site.module)

    def patch(target: object, kind: str, apply: Callable[[], Callable[[], None]]) -> None:
        _patches.acquire(target, kind, apply)
        closing.callback(_patches.release, target, kind)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            patch(module, "weights wanted", partial(_watch_output_attentions, module))
    patch(_patches, "interface", _register)
    for config in _configs(model):
        patch(config, "implementation", partial(_rename, config))
    patch(model, "members", partial(_remember_members, model))


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """Every config in the model, each once: parts may share one, and some have their own copy (T5's two stacks)."""
    from transformers import PreTrainedConfig

    seen: set[int] = set()
    waiting = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    while waiting:
        config = waiting.pop(0)
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        waiting += [part for part in parts if isinstance(part, PreTrainedConfig)]


def _rename(config: PreTrainedConfig) -> Callable[[], None]:
    original = config._attn_implementation
    _originals[id(config)] = original
    # The internal attribute: the public one writes into all sub-configs as well, which may differ.
    config._attn_implementation_internal = NAME

    def undo() -> None:
        del _originals[id(config)]
        config._attn_implementation_internal = original

    return undo


def _register() -> Callable[[], None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _attention_mask)

    def undo() -> None:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)

    return undo


def _remember_members(model: nn.Module) -> Callable[[], None]:
    _members[id(model)] = frozenset(id(module) for module in model.modules())

    def undo() -> None:
        del _members[id(model)]

    return undo


def _watch_output_attentions(module: nn.Module) -> Callable[[], None]:
    """Not every layer passes ``output_attentions`` on to its attention function (GPT-2 keeps it)."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _weights_wanted.append(bool(kwargs.get("output_attentions")))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _weights_wanted:
            _weights_wanted.pop()

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: tensors ``(batch, heads, length, head_dim)`` in, ``(batch, length, heads, head_dim)``
    and weights or None out."""
    switch = switches.get(id(module))
    if switch is None:
        if any(id(module) in members for members in _members.values()) or getattr(module, "_is_replica", False):
            raise RetrofitError(
                f"{type(module).__name__} called for attention but was not found as an attention layer when the model "
                "was retrofitted. Were modules added or replicated since (nn.DataParallel)? Retrofit after that."
            )
        return own_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    position_bias = kwargs.get("position_bias")
    decoding, switch.pending = switch.pending, None
    keys = key.shape[2] + (0 if decoding is None else decoding.seen)

    def read() -> Reading:
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        return read_mask(attention_mask, query.shape[2], keys, causal, position_bias=position_bias)

    if switch.replacement is not None:
        _refuse_meaningful(switch.site, attention_mask, kwargs)
    wanted = bool(kwargs.get("output_attentions")) or any(_weights_wanted)
    wanted = wanted or bool(getattr(getattr(module, "config", None), "output_attentions", False))

    def own(call: Call) -> tuple[Tensor, Tensor | None]:
        if call.read is read:
            seen = (call.query, call.key, call.value, attention_mask)
            return own_attention(module, *seen, dropout=dropout, scaling=call.scale, **kwargs)
        # The model's own would not know another mask.
        _refuse_meaningful(switch.site, attention_mask, kwargs)
        return respond(switch.site, SOFTMAX, call, wanted)

    return switch.run(Call(query, key, value, read, scaling, dropout, decoding=decoding), own, wanted)


def _refuse_meaningful(site: Site, mask: Any, kwargs: dict[str, Any]) -> None:
    for name, what in _MEANINGFUL.items():
        if kwargs.get(name) is not None:
            raise RetrofitError(
                f"Layer {site.path}: this model's attention {what} ({name}), which a mechanism cannot do. Leave such "
                "layers out with layers=..., or choose another model."
            )
    lengths = kwargs.get("cu_seq_lens_q")
    if mask is None and lengths is not None and len(lengths) > 2:
        raise UnsupportedMaskError(
            f"Layer {site.path}: packed documents came as cu_seq_lens_q alone, which only flash attention reads. Pass "
            "position_ids that restart at each document (and use_cache=False)."
        )


def _attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Boolean ``(batch, 1, q_len, k_len)``, True where visible, or None where nothing but causality restricts.

    Where a layer stays with eager attention, which reads None as no restriction at all, the triangle is written out; so
    it is under a config of eager attention, which another model may share. Where a layer stays with an implementation
    that reads masks of another form (flash, flex, one's own), that form rides along.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    left = [s for s in switches.values() if s.site.host == "transformers" and not s.replacements]
    readers = {own_implementation(switch.site.module) for switch in left}
    named = _originals.get(id(kwargs.get("config")), "sdpa")
    readers |= {named} if named in _EAGER else set()
    readers.discard("sdpa")
    if not readers:
        return sdpa_mask(*args, **kwargs)
    plain = {**kwargs, "allow_is_causal_skip": False}
    others = [name for name in readers if name not in _EAGER]
    if not others:
        return sdpa_mask(*args, **plain)
    mask = sdpa_mask(*args, **{**plain, "allow_is_bidirectional_skip": False})
    make = {name: ALL_MASK_ATTENTION_FUNCTIONS.get(name) for name in others}
    mask.regard_forms = {name: function and function(*args, **kwargs) for name, function in make.items()}
    return mask


def own_implementation(module: nn.Module) -> str | None:
    """The implementation that a module's config named before."""
    return _originals.get(id(getattr(module, "config", None)))


def own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, given the mask in the form that it reads."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if id(getattr(module, "config", None)) not in _originals:
        raise RetrofitError(
            f"A {type(module).__name__} was asked for attention by regard, but its model is not retrofitted: it was "
            "copied from one that was. Restore first and copy then, or call model.set_attn_implementation('sdpa') on "
            "the copy."
        )
    name = own_implementation(module)
    if name == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    if name in _EAGER:
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            zero = torch.zeros((), device=mask.device, dtype=query.dtype)
            mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
        if getattr(module, "reorder_and_upcast_attn", False):
            return module._upcast_and_reordered_attn(query, key, value, mask)  # type: ignore[operator]
        return _eager(module)(module, query, key, value, mask, **kwargs)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 4:
        forms = getattr(mask, "regard_forms", {})
        if name not in forms:
            raise RetrofitError(
                f"The mask for the model's own {name!r} attention was lost on the way to {type(module).__name__}. Load "
                "the model with attn_implementation='sdpa', or retrofit all of its layers."
            )
        mask = forms[name]
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **kwargs)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager function of a model's own file, which transformers passes as a default and registers nowhere."""
    method = interface_method(type(module))
    names = [] if method is None else [name for name in method.__code__.co_names if re.match("eager.*attention", name)]
    functions = [method.__globals__.get(name) for name in names] if method is not None else []
    if not functions or functions[0] is None:
        raise RetrofitError(
            f"The eager attention of {type(module).__name__} was not found in {type(module).__module__}. Load the "
            "model with attn_implementation='sdpa', or retrofit all of its layers."
        )
    return functions[0]


def _implementation_before(module: nn.Module) -> str | None:
    config = getattr(module, "config", None)
    return _originals.get(id(config), getattr(config, "_attn_implementation", None))


def _check_not_copied(site: Site) -> None:
    if _implementation_before(site.module) == NAME:
        raise RetrofitError(
            f"{site.path}: this model is a copy of a retrofitted one and has no attention of its own. Restore first "
            "and copy then, or call model.set_attn_implementation('sdpa') on it."
        )
