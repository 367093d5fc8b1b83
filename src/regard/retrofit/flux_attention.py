"""Flux Attention's routers on a trained model (mechanism: :mod:`regard.sparse.flux_attention`).

Source: "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference", 2026, arXiv 2604.07394.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import RetrofitError
from regard.layers.gumbel import annealed_temperature
from regard.layers.losses import SparsityLagrangian
from regard.mechanism import Mechanism
from regard.retrofit.handle import Handle, retrofit
from regard.retrofit.sites import Selector, Site, discover, select
from regard.sparse.flux_attention import FluxAttention, Mode, Span

__all__ = ["FluxHandle", "attach_flux"]

# Where a layer's queries come out before their rotary positions, normalised ones first.
_QUERIES = ("q_norm", "q_proj", "query")


class FluxHandle(Handle):
    """A model with routers: train them with :meth:`optimizer`, :meth:`anneal` and a loss on :meth:`sparsity`."""

    def __init__(self, modules: Mapping[str, Mechanism], closing: ExitStack) -> None:
        super().__init__(modules, closing)
        self.layers = [cast(FluxAttention, module) for module in self.modules.values()]

    def __enter__(self) -> FluxHandle:
        super().__enter__()
        return self

    def decisions(self) -> Tensor:
        """What the last pass decided, ``(batch, layers)``: 1 for full, 0 for sparse, with gradient in training."""
        found = [layer.routing for layer in self.layers]
        if any(routing is None for routing in found):
            raise RetrofitError("No decision yet: run the model first.")
        return torch.stack([routing.hard for routing in found if routing is not None], 1)

    def sparsity(self) -> Tensor:
        """Share of layers that are sparse, ``(batch,)``."""
        return 1 - self.decisions().mean(1)

    def set(self, *, mode: Mode | None = None, span: Span | None = None) -> None:
        """``mode``: let all layers route, or be full or sparse; unchanged if None. ``span``: the tokens of the prompts
        of the passes to come (see :meth:`~regard.sparse.flux_attention.LayerRouter.pooled`), None for all."""
        for layer in self.layers:
            layer.mode, layer.span = layer.mode if mode is None else mode, span

    def anneal(self, step: int, total: int) -> float:
        """Set the temperature of step ``step`` out of ``total`` training steps, and return it."""
        temperature = annealed_temperature(step, total)
        for layer in self.layers:
            layer.temperature = temperature
        return temperature

    def optimizer(
        self,
        lagrangian: SparsityLagrangian,
        lr: float = 5e-4,
        multiplier_lr: float = 1e-3,
        weight_decay: float = 0.1,
    ) -> torch.optim.AdamW:
        """Descent for the routers, ascent for the multipliers."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.parameters()), "lr": lr, "weight_decay": weight_decay},
            {"params": list(lagrangian.parameters()), "lr": multiplier_lr, "weight_decay": 0.0, "maximize": True},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def attach_flux(model: nn.Module, layers: Selector = None, *, freeze: bool = True, **options: Any) -> FluxHandle:
    """Give the causal attention layers of a trained model a router and a sparse branch; the handle undoes it.

    layers: which (see :func:`regard.retrofit`). options: of :class:`~regard.sparse.flux_attention.FluxAttention`.
    freeze: the model's own parameters need no gradient until the handle is left. In training mode
    (``model.train()``) decisions are drawn, and both branches run; in evaluation mode the chosen one runs, and while
    the model's KV cache goes on, as in ``generate``, the decision of the prompt is kept.

    Routers read a layer's queries before rotary positions where the layer has a module named ``q_norm``, ``q_proj`` or
    ``query`` that makes them, and else as attention gets them.

    Raises what :func:`regard.retrofit` raises; a layer that is not causal self-attention is refused when it is first
    called (leave it out with ``layers``).
    """
    sites = select(discover(model), layers)
    inner = retrofit(model, "flux_attention", layers, **{"keep_decision": True, **options})
    closing = ExitStack()
    closing.callback(inner.restore)
    for site in sites:
        mechanism = cast(FluxAttention, inner.modules[site.path])
        source = next((part for name in _QUERIES if (part := _module(site.home, name)) is not None), None)
        if source is not None:
            closing.callback(source.register_forward_hook(_listener(site, mechanism)).remove)
    if freeze:
        own = {id(parameter) for parameter in inner.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in own:
                parameter.requires_grad_(False)
                closing.callback(parameter.requires_grad_, True)
    return FluxHandle(inner.modules, closing)


def _module(home: nn.Module, name: str) -> nn.Module | None:
    found = getattr(home, name, None)
    return found if isinstance(found, nn.Module) else None


def _listener(site: Site, mechanism: FluxAttention) -> Callable[[nn.Module, Any, Any], None]:
    heads, dim = site.context["num_heads"], site.context["head_dim"]

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        mechanism.router_query = None
        if not isinstance(output, Tensor) or output.shape[-1] not in (dim, heads * dim):
            return
        if output.dim() == 3 and output.shape[-1] == heads * dim:
            mechanism.router_query = output.unflatten(-1, (heads, dim)).transpose(1, 2)
        elif output.dim() == 4:
            # (batch, length, heads, dim), unless the heads have been moved already
            moved = output.shape[1] == heads and output.shape[2] != heads
            mechanism.router_query = output if moved else output.transpose(1, 2)

    return listen
