"""A model's blocks as affine maps: everything in them that depends on the input is held at its value for one input.

Held are attention weights and the :mod:`regard.inspect.coefficients` of norms, activations and gates. What is left is
affine in the states that enter, and agrees with the model at the input that was recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.coefficients import OUTSIDE, Coefficients, Running
from regard.inspect.intervene import Edit, intervene
from regard.inspect.loading import model_answer
from regard.kernels import expand_groups
from regard.retrofit.sites import Site, discover
from regard.retrofit.switch import Call, Weights

__all__ = ["FrozenBlocks"]


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
        self._held = Coefficients()
        self._heads: dict[int, Tensor] = {}
        self._closing: ExitStack | None = None

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
                closing.callback(block.register_forward_pre_hook(self._entering(index), with_kwargs=True).remove)
                closing.callback(block.register_forward_hook(self._leave_block).remove)
            for handle in self._held.hooks(self.model):
                closing.callback(handle.remove)
        except BaseException:
            closing.close()
            raise
        self._closing = closing

    def close(self) -> None:
        """Take the hooks off."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.close()

    # Running

    @torch.no_grad()
    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on one sequence and keep its coefficients. Returns what the model returns."""
        self._check_open()
        if self.model.training:
            raise OptionError("A model in training drops units at random, which no map stands for; call model.eval().")
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            kwargs.setdefault("use_cache", False)
        for kept in (self.weights, self.values, self.inputs, self.outputs, self._calls):
            kept.clear()
        self.answer = None
        with self._running("record"):
            out = self.model(*args, **kwargs)
        self._asked = (args, kwargs)
        self._check_chain()
        for index, block in enumerate(self.blocks):
            name = f"Block {index} ({type(block).__name__})"
            self._check_affine(
                name, partial(self.run, first=index, last=index + 1), self.tokens_in(index), self.tokens_out(index)
            )
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

    def run_direct(self) -> tuple[Tensor, dict[int, Tensor]]:
        """The answer, and of each attention layer the heads' outputs ``(batch, tokens, num_heads, value_dim)``: leaves
        of a graph in which all that passes an attention or an activation is constant. What is left between them and the
        answer are output projections, residuals, norms and what follows the blocks."""
        self._heads = {}
        with self._running("direct"), torch.enable_grad():
            answer = self._through(self.tokens_in(0), 0, len(self.blocks), closed=True)
        return answer, self._heads

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
            self._held.enter(index)
            state = _tensor(self.blocks[index](*args, **kwargs))
        self._held.enter(OUTSIDE)
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
    def _running(self, state: Running) -> Iterator[None]:
        self._check_open()
        with self._held.running(state):
            yield

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
            if not bool(state.isfinite().all()):
                raise OptionError(f"What enters block {index} is not finite (NaN or infinity), so there is no map.")
            if index and not torch.equal(state, _tensor(self.outputs[index - 1])):
                raise RetrofitError(
                    f"What leaves block {index - 1} ({type(self.blocks[index - 1]).__name__}) is not what enters block "
                    f"{index}: something stands between them. Pass a part of the model whose blocks follow one "
                    "another (its encoder, one stage)."
                )

    @torch.no_grad()
    def check_close(self) -> None:
        """Raise RetrofitError where what follows the blocks is not affine with its norms and activations held."""
        assert self.answer is not None
        shape = _tensor(self.outputs[-1]).shape

        def close(state: Tensor) -> Tensor:
            with self._running("replay"):
                return self._close(state.view(shape))

        self._check_affine("What follows the blocks", close, self.tokens_out(-1), self.answer)

    def _check_affine(self, name: str, run: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
        there, zero, back = (run(state).float() for state in (x, torch.zeros_like(x), -x))
        allowed = max(1e-3, 8 * torch.finfo(x.dtype).eps) * max(float(t.abs().amax()) for t in (there, zero, back))
        bend = float((there + back - 2 * zero).abs().amax())
        apart = float((there - out.view_as(there)).abs().amax())
        if not max(bend, apart) <= allowed:
            raise RetrofitError(
                f"{name}: not affine with attention, norms and activations held. Two things that depend on the input "
                "are multiplied in a way that is not known (a gate without an activation, a softmax), or a norm is "
                "written out. Such models have no lens yet."
            )

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._held.state != "record":
                return
            places: list[tuple[int | str, Any]] = [("hidden_states", kwargs.get("hidden_states"))]
            places += [*enumerate(args), *kwargs.items()]
            for place, tensor in places:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
                    self._calls.append((args, kwargs, place))
                    self.inputs.append(tensor)
                    self._held.enter(index)
                    return

        return enter

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._held.state == "record":
            self.outputs.append(output)
            self._held.enter(OUTSIDE)

    def _before_attention(self, layer: int, call: Call) -> Call:
        # What attention computes on the way to its weights is no coefficient.
        self._held.quiet += self._held.state != "idle"
        return call

    def _after_attention(self, layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        if self._held.state == "idle":
            return output, weights
        heads = output.shape[2]
        if self._held.state == "record":
            maps = weights()
            if maps is None:
                raise OptionError(
                    f"{self.sites[layer].path} has a mechanism that is not linear in the values, so it has no weights "
                    "to hold."
                )
            self.weights[layer], self.values[layer] = maps, expand_groups(call.value, heads)
        else:
            output = (self.weights[layer] @ expand_groups(call.value, heads)).transpose(1, 2)
        if self._held.state == "direct":
            output = self._heads[layer] = output.detach().requires_grad_()
        self._held.quiet -= 1
        return output, weights


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
