"""Coefficients: what a model multiplies its states by, kept from one run and put back in the next, whatever enters.

While a model runs under ``with coefficients.running("record")``, torch's norms and activations are met as functions,
transformers' own by hooks. Kept are the scale of a norm, the ratio ``(phi(u) - phi(0)) / u`` of an activation (its
limit ``phi'(0)`` at ``u = 0``) and a whole activation that gates another branch; ``"replay"`` takes them in the same
order, place by place. With ``"direct"`` also what an activation inside a block gives is constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from regard.errors import RetrofitError

__all__ = ["OUTSIDE", "Coefficients", "Running"]

Running = Literal["record", "replay", "direct"]
OUTSIDE = -1
"""The place of what stands before and behind the blocks, which have the places 0, 1, ..."""

_ACTIVATIONS = {
    *(F.gelu, F.relu, F.relu6, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid, F.tanh, F.sigmoid),
    *(torch.relu, torch.tanh, torch.sigmoid, torch.selu, torch.celu),
    *(Tensor.relu, Tensor.tanh, Tensor.sigmoid),
}
_ROUTERS = {F.softmax, torch.softmax, Tensor.softmax, torch.topk, Tensor.topk}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
# T5's divides by the root of the mean square too.
_RMS_NORMS = ("RMSNorm", "T5LayerNorm")


class Coefficients(TorchFunctionMode):
    """``state`` is what goes on, ``place`` where; ``quiet`` counts calls within which nothing is a coefficient (a norm
    or activation that is met as a whole, attention on the way to its weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Running | Literal["idle"] = "idle"
        self.place, self.quiet = OUTSIDE, 0
        self._next = 0
        self._kept: dict[int, list[Tensor]] = {}

    @contextmanager
    def running(self, state: Running) -> Iterator[None]:
        """The model runs. Recording forgets what was kept."""
        self.state, self.quiet = state, 0
        self.enter(OUTSIDE)
        if state == "record":
            self._kept.clear()
        try:
            with self:
                yield
        finally:
            self.state = "idle"

    def enter(self, place: int) -> None:
        """Go on at the first coefficient of a place."""
        self.place, self._next = place, 0

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks on norms and activations that are written out in their own forward."""
        for module in model.modules():
            kind = type(module)
            after: Callable[..., Tensor | None]
            if kind.__name__.endswith(_RMS_NORMS) and not isinstance(module, nn.RMSNorm):
                after = self._after_rms_norm
            elif kind.__module__ == "transformers.activations":
                after = self._after_activation
            else:
                continue
            yield module.register_forward_pre_hook(self._hush)
            yield module.register_forward_hook(after)

    def _hush(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.quiet += self.state != "idle"

    def _after_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.state == "idle":
            return None
        if self.quiet == 1:
            output = self._activation(args[0], module.forward, lambda: output)
        self.quiet -= 1
        return output

    def _after_rms_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.state == "idle":
            return None
        x = args[0]

        def coefficient() -> Tensor:
            # The gain up to a factor, which the second line finds: epsilon and offsets of the gain need not be known.
            gain = module.forward(x.new_ones(x.shape[-1]).expand(1, 1, -1)).reshape(-1)
            scale = (output * gain * x).sum(-1, keepdim=True) / (gain * x).square().sum(-1, keepdim=True).clamp_min(
                torch.finfo(x.dtype).tiny
            )
            return gain * scale

        if self.quiet == 1:
            held = self._hold(coefficient)
            output = output if self.state == "record" else x * held
        self.quiet -= 1
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.quiet or self.state == "idle":
            return func(*args, **kwargs)
        if func in _ROUTERS and self.place != OUTSIDE:
            raise RetrofitError(
                f"Block {self.place} calls {func.__name__} beside its attention, as routers of experts do; what they "
                "decide is not followed. Such models have no lens yet."
            )
        if func is F.layer_norm or func is F.rms_norm:
            return self._norm(func, *args, **kwargs)
        if func in _ACTIVATIONS:
            u, *rest = args if args else (kwargs.pop("input"),)
            out_of_place = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
            return self._activation(u, lambda z: func(z, *rest, **out_of_place), lambda: func(u, *rest, **out_of_place))
        if func in _PRODUCTS and all(isinstance(x, Tensor) for x in args[:2]) and args[0].shape == args[1].shape:
            # An activation times another branch: the gate is the coefficient.
            for gate, other in ((args[0], args[1]), (args[1], args[0])):
                if getattr(gate, "_regard_gate", False) and not isinstance(other, nn.Parameter):
                    held = self._hold(lambda gate=gate: gate)  # type: ignore[misc]
                    return self._cut(held * other)
        return func(*args, **kwargs)

    def _norm(self, func: Any, x: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        names = ("weight", "bias", "eps") if func is F.layer_norm else ("weight", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        weight, bias, eps = (given.get(name) for name in ("weight", "bias", "eps"))
        if eps is None:
            eps = 1e-5 if func is F.layer_norm else torch.finfo(x.dtype).eps
        axes = tuple(range(-len(normalized_shape), 0))
        centred = x - x.mean(axes, keepdim=True) if func is F.layer_norm else x
        scale = self._hold(lambda: (centred.square().mean(axes, keepdim=True) + eps).rsqrt())
        if self.state == "record":
            found: Tensor = func(x, normalized_shape, *args, **kwargs)
            return found
        out = centred * scale if weight is None else centred * scale * weight
        return out if bias is None else out + bias

    def _activation(self, u: Tensor, phi: Callable[[Tensor], Tensor], live: Callable[[], Tensor]) -> Tensor:
        """``live()`` while recording; then ``phi(0)`` and the held ratio times ``u``. Marked, in case it is a gate."""
        ratio = self._hold(lambda: _ratio(u, phi))
        out = live() if self.state == "record" else self._cut(u * ratio + phi(u.new_zeros(1)).detach())
        out._regard_gate = True  # type: ignore[attr-defined]
        return out

    def _hold(self, make: Callable[[], Tensor]) -> Tensor:
        if self.state == "record":
            self._kept.setdefault(self.place, []).append(make().detach())
            return self._kept[self.place][-1]
        self._next += 1
        return self._kept[self.place][self._next - 1]

    def _cut(self, branch: Tensor) -> Tensor:
        return branch.detach() if self.state == "direct" and self.place != OUTSIDE else branch


def _ratio(u: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """``(phi(u) - phi(0)) / u``, and ``phi'(0)`` at 0."""
    zero = u == 0
    with torch.enable_grad():
        origin = u.new_zeros(1).requires_grad_()
        slope = torch.autograd.grad(phi(origin).sum(), origin)[0] if zero.any() else torch.zeros_like(origin)
    rise = phi(u) - phi(u.new_zeros(1))
    return torch.where(zero, slope, rise / torch.where(zero, torch.ones_like(u), u))
