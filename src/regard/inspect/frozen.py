"""A model's blocks as affine maps: everything in them that depends on the input is held at its value for one input.

Held are attention weights, the scales of norms, the ratios ``(phi(u) - phi(0)) / u`` of activations (its limit
``phi'(0)`` at ``u = 0``) and whole activations that gate another branch. What is left is affine in the states that
enter, and agrees with the model at the input that was recorded. One run records the coefficients; further runs on other
states take them in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.intervene import Edit, intervene
from regard.inspect.loading import model_answer
from regard.kernels import expand_groups
from regard.retrofit.sites import Site, discover
from regard.retrofit.switch import Call, Weights

__all__ = ["FrozenBlocks"]

_ACTIVATIONS = {
    *(F.gelu, F.relu, F.relu6, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid, F.tanh, F.sigmoid),
    *(torch.relu, torch.tanh, torch.sigmoid, torch.selu, torch.celu),
    *(Tensor.relu, Tensor.tanh, Tensor.sigmoid),
}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
# T5's divides by the root of the mean square too.
_RMS_NORMS = ("RMSNorm", "T5LayerNorm")
_OUTSIDE = -1


class FrozenBlocks:
    """The stack of blocks of a model whose attention :func:`regard.retrofit.discover` finds.

    Between :meth:`open` and :meth:`close`: :meth:`record` runs the model on one sequence, then :meth:`run` maps states
    ``(tokens, dim)`` through blocks with all coefficients held, :meth:`run_live` with none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = discover(model)
        self.blocks: list[nn.Module] = []
        for site in self.sites:
            if all(site.block is not block for block in self.blocks):
                self.blocks.append(site.block)
        self.weights: dict[int, Tensor] = {}
        """Of each attention layer, ``(batch, num_heads, tokens, keys)``."""
        self.values: dict[int, Tensor] = {}
        """``(batch, num_heads, keys, value_dim)``."""
        self.inputs: list[Tensor] = []
        """States that entered each block, in the model's own axes."""
        self.outputs: list[Any] = []
        self.answer: Tensor | None = None
        """What the model gave: logits, or its last hidden state."""
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], int | str]] = []
        self._asked: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._kept: dict[int, list[Tensor]] = {}
        self._state: Literal["idle", "record", "replay"] = "idle"
        self._at, self._next, self._quiet = _OUTSIDE, 0, 0
        self._closing: ExitStack | None = None
        self._mode = _Watching(self)

    # Opening and closing

    def open(self) -> None:
        """Lay hooks on the model, which keeps its numbers."""
        if self._closing is not None:
            raise OptionError("This lens is open already; make another one.")
        closing = ExitStack()
        try:
            edit = Edit(frozenset(range(len(self.sites))), self._before_attention, self._after_attention)
            closing.enter_context(intervene(self.model, edit))
            for index, block in enumerate(self.blocks):
                self._hook(closing, block.register_forward_pre_hook(self._entering(index), with_kwargs=True))
                self._hook(closing, block.register_forward_hook(self._leave_block))
            for module in self.model.modules():
                after = self._hook_of(module)
                if after is not None:
                    self._hook(closing, module.register_forward_pre_hook(self._hush))
                    self._hook(closing, module.register_forward_hook(after))
        except BaseException:
            closing.close()
            raise
        self._closing = closing

    def close(self) -> None:
        """Take the hooks off."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.close()

    @staticmethod
    def _hook(closing: ExitStack, handle: Any) -> None:
        closing.callback(handle.remove)

    def _hook_of(self, module: nn.Module) -> Callable[..., Tensor | None] | None:
        """Norms and activations that are written out in their own forward; torch's are met as functions."""
        kind = type(module)
        if kind.__name__.endswith(_RMS_NORMS) and not isinstance(module, nn.RMSNorm):
            return self._after_rms_norm
        return self._after_activation if kind.__module__ == "transformers.activations" else None

    # Running

    @torch.no_grad()
    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on one sequence and keep its coefficients. Returns what the model returns."""
        self._check_open()
        if self.model.training:
            raise OptionError("A model in training drops units at random, which no map stands for; call model.eval().")
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            kwargs.setdefault("use_cache", False)
        for kept in (self.weights, self.values, self.inputs, self.outputs, self._calls, self._kept):
            kept.clear()
        self.answer = None
        with self._running("record"):
            out = self.model(*args, **kwargs)
        self._asked = (args, kwargs)
        self._check_chain()
        for index in range(len(self.blocks)):
            self._check_affine(index)
        self.answer = model_answer(out)
        return out

    def run(self, x: Tensor, first: int, last: int, closed: bool = False) -> Tensor:
        """States ``(tokens, dim)`` that enter block ``first`` to those that leave block ``last - 1``; closed: to what
        the model gives after its last block, ``(tokens, ...)``, or ``(1, classes)`` of a pooled answer."""
        with self._running("replay"):
            return self._through(x, first, last, closed)

    def run_live(self, x: Tensor, first: int, last: int, closed: bool = False) -> Tensor:
        """The model's own, curved, with nothing held."""
        self._check_open()
        return self._through(x, first, last, closed)

    def run_tail(self, state: Tensor) -> Tensor:
        """States ``(tokens, dim)`` that leave the last block to what the model makes of them, ``(tokens, ...)``."""
        with self._running("replay"):
            self._at, self._next = _OUTSIDE, 0
            given = self._close(state.view_as(_tensor(self.outputs[-1])))
            return given.reshape(-1, given.shape[-1])

    def tokens_in(self, block: int) -> Tensor:
        """States that entered a block, ``(tokens, dim)``."""
        state = self.inputs[block]
        return state.reshape(-1, state.shape[-1])

    def tokens_out(self, block: int) -> Tensor:
        """States that left a block, ``(tokens, dim)``."""
        state = _tensor(self.outputs[block])
        return state.reshape(-1, state.shape[-1])

    def attention(self, block: int) -> tuple[int, Site]:
        """The attention layer of a block among its own tokens: its place among the model's, and the layer."""
        for layer, site in enumerate(self.sites):
            if site.block is self.blocks[block] and self.weights[layer].shape[-1] == self.weights[layer].shape[-2]:
                return layer, site
        raise RetrofitError(f"Block {block} has no attention among its own tokens.")

    def _through(self, x: Tensor, first: int, last: int, closed: bool) -> Tensor:
        if x.shape != self.tokens_in(first).shape:
            raise ShapeError(f"States {tuple(self.tokens_in(first).shape)} enter here, got {tuple(x.shape)}.")
        state = x.view_as(self.inputs[first])
        for index in range(first, last):
            args, kwargs, place = self._calls[index]
            if isinstance(place, int):
                args = (*args[:place], state, *args[place + 1 :])
            else:
                kwargs = {**kwargs, place: state}
            self._at, self._next = index, 0
            state = _tensor(self.blocks[index](*args, **kwargs))
        self._at, self._next = _OUTSIDE, 0
        if closed:
            state = self._close(state)
        return state.reshape(-1, state.shape[-1])

    def _close(self, state: Tensor) -> Tensor:
        """What the model makes of the states that leave its last block: it runs with its blocks skipped."""
        answers = [*self.outputs[:-1], _exchanged(self.outputs[-1], state)]
        with ExitStack() as skipping:
            for block, answer in zip(self.blocks, answers, strict=True):
                skipping.enter_context(_skipped(block, answer))
            args, kwargs = self._asked
            return model_answer(self.model(*args, **kwargs))

    @contextmanager
    def _running(self, state: Literal["record", "replay"]) -> Iterator[None]:
        self._check_open()
        self._state, self._at, self._next, self._quiet = state, _OUTSIDE, 0, 0
        try:
            with self._mode:
                yield
        finally:
            self._state = "idle"

    # Checks

    def _check_open(self) -> None:
        if self._closing is None:
            raise OptionError("The lens is closed; use it inside `with TensorLens(model) as lens:`.")

    def _check_chain(self) -> None:
        if len(self._calls) != len(self.blocks):
            raise RetrofitError(
                f"{len(self.blocks)} blocks hold this model's attention and {len(self._calls)} calls were seen. A lens "
                "looks at a stack whose blocks run once each, in order; pass such a part of the model (its encoder)."
            )
        for index, state in enumerate(self.inputs):
            if state.numel() != state.shape[-1] * max(state.shape[:-1]):
                raise ShapeError(
                    f"A lens looks at one sequence: states (1, tokens, dim) enter block {index}, and these are "
                    f"{tuple(state.shape)}. Pass a batch of one."
                )
            if index and not torch.equal(state, _tensor(self.outputs[index - 1])):
                raise RetrofitError(
                    f"What leaves block {index - 1} ({type(self.blocks[index - 1]).__name__}) is not what enters block "
                    f"{index}: something stands between them. Pass a part of the model whose blocks follow one "
                    "another (its encoder, one stage)."
                )

    def _check_affine(self, index: int) -> None:
        x = self.tokens_in(index)
        there, zero, back = (self.run(state, index, index + 1) for state in (x, torch.zeros_like(x), -x))
        allowed = 10 * torch.finfo(x.dtype).eps ** 0.5 * max(float(t.abs().amax()) for t in (there, zero, back))
        bend = float((there + back - 2 * zero).abs().amax())
        apart = float((there - self.tokens_out(index)).abs().amax())
        if not max(bend, apart) <= allowed:
            raise RetrofitError(
                f"Block {index} ({type(self.blocks[index]).__name__}) is not affine with its attention, norms and "
                "activations held: it multiplies two things that depend on its input in a way that is not known (a "
                "router, a gate without an activation), or has a norm of its own. Such models have no lens yet."
            )

    # What is held

    def _hold(self, make: Callable[[], Tensor]) -> Tensor:
        if self._state == "record":
            self._kept.setdefault(self._at, []).append(make().detach())
            return self._kept[self._at][-1]
        self._next += 1
        return self._kept[self._at][self._next - 1]

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._state != "record":
                return
            places: list[tuple[int | str, Any]] = [("hidden_states", kwargs.get("hidden_states"))]
            places += [*enumerate(args), *kwargs.items()]
            for place, tensor in places:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
                    self._calls.append((args, kwargs, place))
                    self.inputs.append(tensor)
                    self._at = index
                    return

        return enter

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._state == "record":
            self.outputs.append(output)
            self._at = _OUTSIDE

    def _before_attention(self, layer: int, call: Call) -> Call:
        # What attention computes on the way to its weights is no coefficient.
        self._quiet += self._state != "idle"
        return call

    def _after_attention(self, layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        if self._state == "idle":
            return output, weights
        heads = output.shape[2]
        if self._state == "record":
            maps = weights()
            if maps is None:
                raise OptionError(
                    f"{self.sites[layer].path} has a mechanism that is not linear in the values, so it has no weights "
                    "to hold."
                )
            self.weights[layer], self.values[layer] = maps, expand_groups(call.value, heads)
        else:
            output = (self.weights[layer] @ expand_groups(call.value, heads)).transpose(1, 2)
        self._quiet -= 1
        return output, weights

    def _hush(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._quiet += self._state != "idle"

    def _after_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._state == "idle":
            return None
        if self._quiet == 1:
            output = self.activation(args[0], module.forward, lambda: output)
        self._quiet -= 1
        return output

    def _after_rms_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._state == "idle":
            return None
        x = args[0]

        def coefficient() -> Tensor:
            # The gain up to a factor, which the second line finds: epsilon and offsets of the gain need not be known.
            gain = module.forward(x.new_ones(x.shape[-1]).expand(1, 1, -1)).reshape(-1)
            scale = (output * gain * x).sum(-1, keepdim=True) / (gain * x).square().sum(-1, keepdim=True).clamp_min(
                torch.finfo(x.dtype).tiny
            )
            return gain * scale

        if self._quiet == 1:
            held = self._hold(coefficient)
            output = output if self._state == "record" else x * held
        self._quiet -= 1
        return output

    def activation(self, u: Tensor, phi: Callable[[Tensor], Tensor], live: Callable[[], Tensor]) -> Tensor:
        """``live()`` while recording; then ``phi(0)`` and the held ratio times ``u``. Marked, in case it is a gate."""
        ratio = self._hold(lambda: _ratio(u, phi))
        out = live() if self._state == "record" else u * ratio + phi(u.new_zeros(1)).detach()
        out._regard_gate = True  # type: ignore[attr-defined]
        return out

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Functions of torch, as :class:`_Watching` meets them."""
        if self._quiet or self._state == "idle":
            return func(*args, **kwargs)
        if func is F.layer_norm or func is F.rms_norm:
            return self._norm(func, *args, **kwargs)
        if func in _ACTIVATIONS:
            u, *rest = args if args else (kwargs.pop("input"),)
            out_of_place = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
            return self.activation(u, lambda z: func(z, *rest, **out_of_place), lambda: func(u, *rest, **out_of_place))
        if func in _PRODUCTS and all(isinstance(x, Tensor) for x in args[:2]) and args[0].shape == args[1].shape:
            # An activation times another branch: the gate is the coefficient.
            for gate, other in ((args[0], args[1]), (args[1], args[0])):
                if getattr(gate, "_regard_gate", False) and not isinstance(other, nn.Parameter):
                    held = self._hold(lambda gate=gate: gate)  # type: ignore[misc]
                    return held * other
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
        if self._state == "record":
            found: Tensor = func(x, normalized_shape, *args, **kwargs)
            return found
        out = centred * scale if weight is None else centred * scale * weight
        return out if bias is None else out + bias


class _Watching(TorchFunctionMode):
    """Leads torch's functions past the blocks that are recorded or replayed."""

    def __init__(self, frozen: FrozenBlocks) -> None:
        super().__init__()
        self.frozen = frozen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.frozen.function(func, args, kwargs or {})


def _ratio(u: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """``(phi(u) - phi(0)) / u``, and ``phi'(0)`` at 0."""
    zero = u == 0
    with torch.enable_grad():
        origin = u.new_zeros(1).requires_grad_()
        slope = torch.autograd.grad(phi(origin).sum(), origin)[0] if zero.any() else torch.zeros_like(origin)
    rise = phi(u) - phi(u.new_zeros(1))
    return torch.where(zero, slope, rise / torch.where(zero, torch.ones_like(u), u))


def _tensor(output: Any) -> Tensor:
    """The states in what a block returns."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise RetrofitError(f"A block returns its states first, or alone; this one returns {type(output).__name__}.")
    return found


def _exchanged(output: Any, state: Tensor) -> Any:
    """What a block returns, with other states."""
    return state if isinstance(output, Tensor) else type(output)((state, *output[1:]))


@contextmanager
def _skipped(block: nn.Module, answer: Any) -> Iterator[None]:
    """A block that gives an answer without computing it."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before
