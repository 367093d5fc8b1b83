"""CBAM: a channel gate, then a spatial gate, on a feature map.

Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv 1807.06521, equations 2 and 3:

    channel  Mc = sigmoid(MLP(avgpool F) + MLP(maxpool F)),        F'  = Mc * F
    spatial  Ms = sigmoid(conv7x7([max_c F', mean_c F'])),          F'' = Ms * F'

The MLP (C -> C/r -> ReLU -> C) is shared by the pools; the convolution has no bias and is followed by batch norm, as
in the released code. In a residual block it acts on the branch before the addition. Cost: ``2 C^2 / r`` and ``2 k^n``
per place.
"""

from __future__ import annotations

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
        logits = sum(self.mlp(_POOLS[pool](flat)) for pool in self.pools)
        assert isinstance(logits, Tensor)
        return logits.sigmoid().reshape(*x.shape[:2], *(1,) * (x.dim() - 2))


class SpatialGate(nn.Module):
    """One factor per place, ``(batch, 1, *space)``, from the maximum and the mean over channels."""

    def __init__(self, kernel_size: int = 7, dims: int = 2) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or dims not in _CONVOLUTIONS:
            raise OptionError(f"kernel_size is odd and dims 1, 2 or 3; got {kernel_size} and {dims}.")
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

    order: 'channel-first' (the paper's best), 'spatial-first', or 'parallel' (both gates from the input). use_spatial:
    False leaves the channel gate alone.
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


def attach(model: nn.Module, factory: Callable[[int], nn.Module] = CBAM) -> int:
    """Put ``factory(channels)`` behind the last batch norm of every residual branch of ``model``, in place.

    Knows blocks with ``bn3`` or ``bn2`` (the usual ResNet and ResNeXt), those of transformers' ResNet (``layer`` beside
    ``shortcut``) and inverted residuals with a ``conv`` sequence (MobileNet). Returns how many blocks got one; raises
    RetrofitError where there is none.
    """
    count = 0
    for block in list(model.modules()):
        last = next((name for name in ("bn3", "bn2") if isinstance(getattr(block, name, None), nn.BatchNorm2d)), None)
        if last is not None and hasattr(block, "conv2"):
            norm = getattr(block, last)
            setattr(block, last, nn.Sequential(norm, _like(factory(norm.num_features), norm)))
        elif (branch := _branch(block)) is not None:
            norm = _last_norm(branch)
            branch.append(_like(factory(norm.num_features), norm))
        else:
            continue
        count += 1
    if not count:
        raise RetrofitError(
            f"{type(model).__name__} has no residual block this knows (bn2/bn3, layer + shortcut, inverted residual). "
            "Put the module into the block by hand, behind its last batch norm."
        )
    return count


def _branch(block: nn.Module) -> nn.Sequential | None:
    """The residual branch of blocks that keep it as one sequence."""
    for name, mate in (("layer", "shortcut"), ("conv", "use_res_connect")):
        branch = getattr(block, name, None)
        if isinstance(branch, nn.Sequential) and hasattr(block, mate):
            return branch
    return None


def _last_norm(branch: nn.Module) -> nn.BatchNorm2d:
    norms = [module for module in branch.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise RetrofitError("A residual branch without batch norm: its width is unknown. Attach the module by hand.")
    return norms[-1]


def _like(module: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    return module.to(norm.weight.device, norm.weight.dtype).train(norm.training)
