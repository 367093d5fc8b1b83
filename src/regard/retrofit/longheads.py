"""LongHeads into a trained language model with rotary positions (mechanism: :mod:`regard.sparse.longheads`).

The mechanism must see queries and keys before rotary positions. A layer is handed its positions as cosines and sines;
here it is handed those of no rotation, so what it gives to attention, and what its key-value cache holds, is not
rotated, and the model's own tables go to the mechanism instead.

Source: Lu et al., "LongHeads: Multi-Head Attention is Secretly a Long Context Processor", 2024, arXiv 2402.10685.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard.errors import RetrofitError
from regard.layers.rotary import apply_rotary
from regard.mechanism import Pattern, Request
from regard.retrofit.handle import Handle, retrofit
from regard.retrofit.sites import Selector, Site, discover, interface_method, select
from regard.sparse.longheads import LongHeads

__all__ = ["apply_longheads"]


@dataclass(frozen=True)
class _Past:
    """What a layer remembers beside the model's cache: features, queries of the chunk that is not complete, how many
    tokens there were, and the last one's key, by which a cache that was changed behind our back is known."""

    features: Tensor | None
    queries: Tensor
    seen: int
    last_key: Tensor


class _Resident(LongHeads):
    """:class:`LongHeads` in a model that keeps keys and values in a cache of its own."""

    applies_rotary = False  # The model is handed tables of no rotation.

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self", "causal-cross"))
    mask_support: ClassVar[Literal["any", "keys", "none"]] = "none"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cache: object | None = None
        """The cache of the call in progress."""
        self._pasts: WeakKeyDictionary[object, _Past] = WeakKeyDictionary()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        start = key.shape[2] - query.shape[2]
        past = self._pasts.get(self.cache) if self.cache is not None and start else None
        if start and (past is None or past.seen != start or not torch.equal(past.last_key, key[:, :, start - 1])):
            raise RetrofitError(
                "LongHeads has not seen the queries of the tokens in this cache: it was filled before the model was "
                "retrofitted, or cropped or reordered since (assisted decoding, beam search). Start with an empty "
                "cache, and generate greedily or by sampling."
            )
        features = None if past is None else past.features
        waiting = None if past is None else past.queries
        features, waiting = self.extended(query, key, value, features, waiting, request.scale)
        if self.cache is not None:
            self._pasts[self.cache] = _Past(features, waiting, key.shape[2], key[:, :, -1].detach().clone())
        return self._run(query, key, value, features, start, request)


def apply_longheads(
    model: nn.Module,
    attn_length: int | None = None,
    chunk: int = 256,
    begin: int | None = None,
    layers: Selector = None,
) -> Handle:
    """Give a Hugging Face language model :class:`~regard.sparse.longheads.LongHeads`; the handle undoes it.

    attn_length: keys that a head attends to, by default the length the model was made for (as far as it holds whole
    chunks). chunk, begin: as in LongHeads. layers: which layers (see :func:`regard.retrofit`); the others keep full
    attention and their own positions. ``generate`` works, with a cache that starts empty.

    Reached are models of Llama's kind, whose layers are handed ``position_embeddings`` and rotate halves of each head.
    Raises RetrofitError for others, OptionError for options that do not fit together. Padded batches and beam search
    are refused when they come.
    """
    sites = [site for site in select(discover(model), layers) if site.host == "transformers"]
    if not sites:
        raise RetrofitError("LongHeads needs a transformers model with rotary positions; none of the layers is of one.")
    rotary = _rotary_of(model)
    if attn_length is None:
        attn_length = int(sites[0].module.config.max_position_embeddings) // chunk * chunk  # type: ignore[union-attr,arg-type]
    checked = LongHeads(attn_length, chunk, begin)
    near = next(model.parameters())
    rows = torch.arange(checked.begin, device=near.device)[None]
    cos, sin = (t[0].float() for t in rotary(torch.empty(1, device=near.device), rows))
    for site in sites:
        _check_rotation(site, cos, sin)
    modules = {site.path: _Resident(attn_length, chunk, begin, rope=(cos, sin)) for site in sites}
    closing = ExitStack()
    try:
        handle = retrofit(model, modules)
        closing.callback(handle.restore)
        for site in sites:
            for hook in _hooks(site.module, modules[site.path]):
                closing.callback(hook.remove)
    except BaseException:
        closing.close()
        raise
    return Handle(modules, closing)


def _rotary_of(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    found = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise RetrofitError(
            f"LongHeads needs one module of rotary positions (with inv_freq) in the model; {type(model).__name__} has "
            f"{len(found)}."
        )
    return found[0]


def _check_rotation(site: Site, cos: Tensor, sin: Tensor) -> None:
    """The layer's own rotation must be the one that the mechanism applies."""
    method = interface_method(type(site.module))
    own = None if method is None else method.__globals__.get("apply_rotary_pos_emb")
    width, probe = site.context["head_dim"], torch.randn(1, 1, 4, site.context["head_dim"], device=cos.device)
    table = cos[:4], sin[:4]
    same = False
    if own is not None and cos.shape[-1] == width:
        turned = own(probe, probe, table[0][None], table[1][None])[0]
        same = turned.shape == probe.shape and torch.allclose(turned, apply_rotary(probe, *table), atol=1e-5)
    if not same:
        raise RetrofitError(
            f"{site.path}: {type(site.module).__name__} does not rotate halves of whole heads as Llama does, and "
            "LongHeads rotates in no other way. Leave it out with layers=..., or choose another model."
        )


def _hooks(module: nn.Module, mechanism: _Resident) -> list[Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("position_embeddings")
        if given is None:
            raise RetrofitError(
                f"{type(module).__name__} was called without position_embeddings by name, so its positions are out of "
                "reach. LongHeads takes models of Llama's kind."
            )
        mechanism.cache = kwargs.get("past_key_values")
        still = torch.ones_like(given[0]), torch.zeros_like(given[1])
        return args, {**kwargs, "position_embeddings": still}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mechanism.cache = None

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
