"""Neural Attention Search on a trained model (mechanism: :mod:`regard.sparse.nats`).

Source: Deng & Lindauer, "Neural Attention Search", 2025, arXiv 2502.13251: of a frozen language model only the
projections to token types learn, by distillation of its hidden states under full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError
from regard.mechanism import Mechanism
from regard.retrofit.handle import Handle, retrofit
from regard.retrofit.sites import Selector, Site, discover, select
from regard.retrofit.switch import Replacement, Switch
from regard.sparse.nats import NAtS

__all__ = ["NAtSHandle", "enable_nats"]

Train = Literal["types only", "all"]


class NAtSHandle(Handle):
    """A model whose tokens have types: train ``parameters()`` on :meth:`distillation_loss`, and generate with
    ``past_key_values=handle.cache()``, which keeps the living keys alone."""

    def __init__(
        self,
        modules: Mapping[str, Mechanism],
        closing: ExitStack,
        answering: Sequence[tuple[Switch, Replacement]] = (),
    ) -> None:
        super().__init__(modules, closing, answering)
        self.layers = [cast(NAtS, module) for module in self.modules.values()]

    def __enter__(self) -> NAtSHandle:
        super().__enter__()
        return self

    @contextmanager
    def full(self) -> Iterator[None]:
        """Full attention, as the model had it, inside the block."""
        for layer in self.layers:
            layer.full = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.full = False

    def usage(self) -> Tensor:
        """Share of all earlier keys that tokens read in the last pass, per layer, ``(layers,)``."""
        return torch.stack([layer.usage().mean() for layer in self.layers])

    def distillation_loss(self, run: Callable[[], Tensor], labelled: Tensor | None = None) -> Tensor:
        """Mean squared distance of hidden states under types from those under full attention.

        run: one pass of the model, ``(batch, length, channels)``, such as ``lambda: model.base_model(ids)[0]``; it is
        called twice. labelled: boolean ``(batch, length)``, the tokens that count (None: all).
        """
        with self.full(), torch.no_grad():
            aim = run()
        distance = (run() - aim).float().square().mean(-1)
        if labelled is None:
            return distance.mean()
        return torch.where(labelled, distance, 0).sum() / labelled.sum().clamp_min(1)


def enable_nats(
    model: nn.Module, layers: Selector = None, *, train: Train = "types only", **options: Any
) -> NAtSHandle:
    """Give the causal attention layers of a trained model learned token types; the handle undoes it.

    layers: which (see :func:`regard.retrofit`). options: of :class:`~regard.sparse.nats.NAtS`. train: ``"types only"``
    freezes the model's own parameters until the handle is left, ``"all"`` leaves them as they are. In training mode
    (``model.train()``) types are drawn; in evaluation mode the likeliest are taken. The projections begin random.

    Raises RetrofitError for layers whose input cannot be listened to, and what :func:`regard.retrofit` raises.
    """
    if train not in get_args(Train):
        raise OptionError(f"train is one of {get_args(Train)}, got {train!r}.")
    sites = select(discover(model), layers)
    built = {site.path: _built(site, options) for site in sites}
    inner = retrofit(model, built)
    closing = ExitStack()
    closing.callback(inner.restore)
    for site in sites:
        hook = site.home.register_forward_pre_hook(_listener(site, built[site.path]), with_kwargs=True)
        closing.callback(hook.remove)
    if train == "types only":
        own = {id(parameter) for parameter in inner.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in own:
                parameter.requires_grad_(False)
                closing.callback(parameter.requires_grad_, True)
    return NAtSHandle(inner.modules, closing, inner._answering)


def _built(site: Site, options: Mapping[str, Any]) -> NAtS:
    if site.host == "torch":
        raise RetrofitError(
            f"{site.path}: types are read off the input of a causal layer of transformers or regard.nn, and this is an "
            "nn.MultiheadAttention. Leave it out with layers=..., or rebuild it with MultiHeadAttention.from_torch."
        )
    context = site.context
    module = NAtS(context["embed_dim"], context["num_heads"], context["num_kv_heads"], **options)
    like = next(parameter for parameter in site.home.parameters() if parameter.is_floating_point())
    return module.to(device=like.device, dtype=like.dtype).train(site.module.training)


def _listener(site: Site, mechanism: NAtS) -> Callable[[nn.Module, Any, Any], None]:
    def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[-1] != mechanism.types.in_features:
            raise RetrofitError(
                f"{site.path}: the input of {type(module).__name__} was expected as (batch, length, "
                f"{mechanism.types.in_features}). Leave this layer out with layers=...."
            )
        mechanism.hidden = found.detach()

    return listen
