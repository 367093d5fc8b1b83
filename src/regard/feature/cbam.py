"""CBAM: a channel gate, then a spatial gate, on a feature map.

Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv 1807.06521, equations 2 and 3:

    channel  Mc = sigmoid(MLP(avgpool F) + MLP(maxpool F)),        F'  = Mc * F
    spatial  Ms = sigmoid(conv7x7([max_c F', mean_c F'])),          F'' = Ms * F'

The MLP (C -> C/r -> ReLU -> C) is shared by the pools; the convolution has no bias and is followed by batch norm, as
in the released code. In a residual block it acts on the branch before the addition. With the average pool alone and no
spatial gate it is Squeeze-and-Excitation (Hu et al., 2017, arXiv 1709.01507). Cost in multiplications: ``2 C^2 / r``
for each pool, and ``2 k^n`` per place for the convolution over n axes of space.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.mechanism import Feature
from regard.registry import register

__all__ = ["CBAM", "ChannelGate", "SpatialGate", "attach"]

Order = Literal["channel-first", "spatial-first", "parallel"]
_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda flat: flat.mean(-1),
    "max": lambda flat: flat.amax(-1),
    "lp": lambda flat: torch.linalg.vector_norm(flat, 2, dim=-1),
    "logsumexp": lambda flat: flat.logsumexp(-1),
}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ChannelGate(nn.Module):
    """One factor per channel, ``(batch, channels, 1, ...)``, from maps pooled over space.

    pools: of 'avg', 'max', 'lp' (the 2-norm) and 'logsumexp'; with 'avg' alone it is the gate of
    Squeeze-and-Excitation.
    """

    def __init__(self, channels: int, reduction: int = 16, pools: Sequence[str] = ("avg", "max")) -> None:
        super().__init__()
        if not pools or any(pool not in _POOLS for pool in pools):
            raise OptionError(f"pools are some of {', '.join(_POOLS)}; got {tuple(pools)}.")
        if channels < reduction or reduction < 1:
            raise OptionError(f"reduction {reduction} leaves no hidden unit for {channels} channels; make it smaller.")
        self.pools = tuple(pools)
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """The gate of ``x (batch, channels, *space)``."""
        flat = x.flatten(2)
        logits = torch.stack([self.mlp(_POOLS[pool](flat)) for pool in self.pools]).sum(0)
        return logits.sigmoid().reshape(*x.shape[:2], *(1,) * (x.dim() - 2))


class SpatialGate(nn.Module):
    """One factor per place, ``(batch, 1, *space)``, from the maximum and the mean over channels."""

    def __init__(self, kernel_size: int = 7, dims: int = 2) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or dims not in _CONVOLUTIONS:
            raise OptionError(f"kernel_size must be odd and dims 1, 2 or 3; got {kernel_size} and {dims}.")
        self.convolution = _CONVOLUTIONS[dims](2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = _NORMS[dims](1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """The gate of ``x (batch, channels, *space)``."""
        pooled = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        gate: Tensor = self.norm(self.convolution(pooled)).sigmoid()
        return gate


@register("cbam")
class CBAM(Feature):
    """``(batch, channels, *space)`` in and out, with ``dims`` axes of space.

    reduction: of the channels in the MLP. order: 'channel-first' (the paper's best), 'spatial-first', or 'parallel'
    (both gates from the input). pools: see :class:`ChannelGate`. use_spatial: False leaves the channel gate alone.
    """

    growth = "N"

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        order: Order = "channel-first",
        pools: Sequence[str] = ("avg", "max"),
        use_spatial: bool = True,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if order not in ("channel-first", "spatial-first", "parallel"):
            raise OptionError(f"order is 'channel-first', 'spatial-first' or 'parallel', got {order!r}.")
        self.order, self.dims, self.channels = order, dims, channels
        self.channel = ChannelGate(channels, reduction, pools)
        self.spatial = SpatialGate(kernel_size, dims) if use_spatial else None

    @overload
    def forward(self, x: Tensor, return_gates: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_gates: Literal[True]) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def forward(self, x: Tensor, return_gates: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """Gate. With ``return_gates`` also the channel gate ``(batch, channels, 1, ...)`` and the spatial gate
        ``(batch, 1, *space)`` (None without one)."""
        if x.dim() != self.dims + 2 or x.shape[1] != self.channels:
            raise ShapeError(
                f"This CBAM takes (batch, {self.channels}, *{self.dims} axes of space), got {tuple(x.shape)}."
            )
        place = None
        if self.spatial is None:
            channel = self.channel(x)
            out = x * channel
        elif self.order == "channel-first":
            channel = self.channel(x)
            out = x * channel
            place = self.spatial(out)
            out = out * place
        elif self.order == "spatial-first":
            place = self.spatial(x)
            out = x * place
            channel = self.channel(out)
            out = out * channel
        else:
            channel, place = self.channel(x), self.spatial(x)
            out = x * channel * place
        return (out, channel, place) if return_gates else out


class _Attached(nn.Sequential):
    """What stood at the end of a block, and the module put behind it."""


def attach(model: nn.Module, factory: Callable[[int], nn.Module] = CBAM) -> int:
    """Put ``factory(channels)`` behind the last batch norm of every residual branch of ``model``, in place.

    Knows ResNet and ResNeXt blocks (``bn3`` or ``bn2``, as most libraries write them; ``layer`` beside ``shortcut``, as
    transformers does) and MobileNet's inverted residuals of torchvision, timm and transformers; MobileNet V1 has no
    branches, there it goes behind each pointwise unit that follows a depthwise one. Returns how many blocks got one.
    Raises RetrofitError where there is none, or where they have one already.
    """
    if any(isinstance(module, _Attached) for module in model.modules()):
        raise RetrofitError("The blocks of this model have an attached module already; start from a fresh model.")
    slots: list[tuple[nn.Module, str]] = []
    inside: set[int] = set()
    for block in model.modules():
        found = [] if id(block) in inside else _slots(block)
        if found:
            slots += found
            inside.update(id(module) for module in block.modules())
    if not slots:
        raise RetrofitError(
            f"{type(model).__name__} has no block this knows (bn2/bn3, layer + shortcut, inverted residual, depthwise "
            "+ pointwise). Put the module into the block by hand, behind its last batch norm."
        )
    for block, name in slots:
        end = getattr(block, name)
        norms = [module for module in end.modules() if isinstance(module, nn.BatchNorm2d)]
        if not norms:
            raise RetrofitError(f"{name!r} of a {type(block).__name__} has no batch norm: its width is unknown.")
        weight = norms[-1].weight
        gate = factory(norms[-1].num_features).to(weight.device, weight.dtype).train(end.training)
        setattr(block, name, _Attached(end, gate))
    return len(slots)


def _slots(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where in ``block`` the branch ends: a module and the attribute's name."""
    for name, mates in (
        ("bn3", ("conv2", "conv_pwl")),
        ("bn2", ("conv2", "conv_pw")),
        ("layer", ("shortcut",)),
        ("conv", ("use_res_connect",)),
        ("block", ("use_res_connect",)),
        ("reduce_1x1", ("use_residual",)),
    ):
        if isinstance(getattr(block, name, None), nn.Module) and any(hasattr(block, mate) for mate in mates):
            return [(block, name)]
    if not isinstance(block, nn.ModuleList | nn.Sequential):
        return []
    units = list(block.named_children())
    return [
        (block, name)
        for (_, before), (name, unit) in itertools.pairwise(units)
        if _is_unit(before, depthwise=True) and _is_unit(unit, depthwise=False)
    ]


def _is_unit(module: nn.Module, depthwise: bool) -> bool:
    """Whether this is one convolution, depthwise or pointwise, with its batch norm."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if len(convolutions) != 1 or not any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        return False
    only = convolutions[0]
    return only.groups == only.in_channels > 1 if depthwise else only.kernel_size == (1, 1) and only.groups == 1
