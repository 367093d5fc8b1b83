"""Changing what heads do while a model runs: ``with intervene(model, ablate_heads([(2, 5)])): model(**inputs)``.

Works on what :func:`regard.capture` works on, retrofitted or not, and leaves the model untouched afterwards. A head is
``(layer, head)``: the layer's place among :func:`regard.retrofit.discover`'s sites, and the query head. Edits apply in
the order given; captures see what they leave. All of them are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import expand_groups
from regard.retrofit.handle import open_sites
from regard.retrofit.sites import Site, discover
from regard.retrofit.switch import Call, Weights

__all__ = [
    "Edit",
    "Head",
    "ablate_heads",
    "edit_heads",
    "intervene",
    "patch_heads",
    "patch_inputs",
    "reweigh_heads",
    "scale_heads",
    "set_attention",
    "swap_heads",
]

Head = tuple[int, int]
Rows = slice | Sequence[int] | None
InputName = Literal["query", "key", "value"]


@dataclass(frozen=True)
class Edit:
    """A change at some layers. ``inputs``: ``(layer, call) -> call`` before attention; ``outputs``: ``(layer, call,
    output (batch, q_len, num_heads, value_dim), weights) -> (output, weights)`` after it."""

    layers: frozenset[int]
    inputs: Callable[[int, Call], Call] | None = None
    outputs: Callable[[int, Call, Tensor, Weights], tuple[Tensor, Weights]] | None = None


class intervene:
    """A context manager in which ``edits`` hold. Raises OptionError for layers or heads that the model lacks."""

    def __init__(self, model: nn.Module, *edits: Edit) -> None:
        self._model, self._edits = model, edits
        self._sites = discover(model)
        count = len(self._sites)
        for layer in sorted(set().union(*(edit.layers for edit in edits))):
            if not 0 <= layer < count:
                raise OptionError(
                    f"There is no layer {layer}: the model has {count} attention layers, 0 to {count - 1}."
                )
        self._closing: ExitStack | None = None

    def __enter__(self) -> None:
        if self._closing is not None:
            raise OptionError("This intervention is in force already; make another one.")
        layers = sorted(set().union(*(edit.layers for edit in self._edits)))
        chosen = [self._sites[layer] for layer in layers]
        closing = ExitStack()
        try:
            if chosen:
                switches = open_sites(self._model, self._sites, chosen, closing, watching=True)
                for layer, switch in zip(layers, switches, strict=True):
                    editor = _Editor(layer, [edit for edit in self._edits if layer in edit.layers])
                    switch.editors.append(editor)
                    closing.callback(switch.editors.remove, editor)
        except BaseException:
            closing.close()
            raise
        self._closing = closing

    def __exit__(self, *exception: object) -> None:
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.close()


class _Editor:
    """The edits of one layer."""

    def __init__(self, layer: int, edits: list[Edit]) -> None:
        self.layer, self.edits = layer, edits

    def before(self, site: Site, call: Call) -> Call:
        for edit in self.edits:
            if edit.inputs is not None:
                call = edit.inputs(self.layer, call)
        return call

    def after(self, site: Site, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        for edit in self.edits:
            if edit.outputs is not None:
                output, weights = edit.outputs(self.layer, call, output, weights)
        return output, weights


def edit_heads(heads: Iterable[Head], change: Callable[[Tensor, Head, Call], Tensor]) -> Edit:
    """Heads whose output becomes ``change(output (batch, q_len, value_dim), head, call)``."""
    by_layer = _by_layer(heads)

    def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        edited = output.clone()
        for head in by_layer[layer]:
            _check_head(layer, head, output.shape[2])
            edited[:, :, head] = change(output[:, :, head], (layer, head), call)
        return edited, weights

    return Edit(frozenset(by_layer), outputs=outputs)


def ablate_heads(
    heads: Iterable[Head],
    how: Literal["zero", "mean", "uniform"] = "zero",
    means: Mapping[Head, Tensor] | None = None,
) -> Edit:
    """Switch heads off.

    ``"zero"``: their output is zero. ``"mean"``: it is ``means[head]`` ``(value_dim,)``, or ``(q_len, value_dim)``; by
    default the mean over the batch and all positions of the call itself. ``"uniform"``: they weigh all keys alike that
    a query sees.
    """
    heads = list(heads)
    if how == "uniform":
        return _uniform(heads)
    if how not in ("zero", "mean"):
        raise OptionError(f"how is 'zero', 'mean' or 'uniform', got {how!r}.")

    def change(output: Tensor, head: Head, call: Call) -> Tensor:
        if how == "zero":
            return torch.zeros_like(output)
        known = output.mean((0, 1)) if means is None else means[head].to(output)
        if known.shape not in (output.shape[2:], output.shape[1:]):
            raise ShapeError(
                f"The mean given for head {head} is {tuple(known.shape)}; a head's output is (q_len, value_dim) = "
                f"{tuple(output.shape[1:])}. Give one mean for all queries, or take the means on texts of this length."
            )
        return known.expand_as(output)

    return edit_heads(heads, change)


def scale_heads(gates: Tensor) -> Edit:
    """The outputs of head ``(layer, head)`` times ``gates[layer, head]``, for all layers; its gradient tells how the
    loss answers to each head."""
    if gates.dim() != 2:
        raise ShapeError(f"gates are (layers, heads), got {tuple(gates.shape)}.")

    def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        if output.shape[2] > gates.shape[1]:
            raise ShapeError(f"Layer {layer} has {output.shape[2]} heads, and gates are for {gates.shape[1]}.")
        return output * gates[layer, : output.shape[2], None].to(output), weights

    return Edit(frozenset(range(len(gates))), outputs=outputs)


def patch_heads(outputs: Mapping[Head, Tensor], rows: Rows = None) -> Edit:
    """Give heads the outputs of another run: ``(batch | 1, q_len, value_dim)`` for each, at some queries or all."""

    def change(output: Tensor, head: Head, call: Call) -> Tensor:
        given = outputs[head].to(output)
        if given.shape[1:] != output.shape[1:]:
            raise ShapeError(
                f"The output given for head {head} is {tuple(given.shape)}, and the head's own {tuple(output.shape)}: "
                "both runs need prompts of one length."
            )
        return _placed(output, given, rows)

    return edit_heads(outputs, change)


def patch_inputs(name: InputName, tensors: Mapping[Head, Tensor], rows: Rows = None) -> Edit:
    """Give heads the queries, keys or values of another run: ``(batch | 1, length, dim)`` for each, as attention gets
    them (rotated where the model rotates). Keys and values of query heads that share them change for all of these."""
    if name not in ("query", "key", "value"):
        raise OptionError(f"name is 'query', 'key' or 'value', got {name!r}.")
    by_layer = _by_layer(tensors)

    def inputs(layer: int, call: Call) -> Call:
        tensor = getattr(call, name).clone()
        groups = call.query.shape[1] // tensor.shape[1]
        for head in by_layer[layer]:
            _check_head(layer, head, call.query.shape[1])
            own = tensor[:, head // groups]
            tensor[:, head // groups] = _placed(own, tensors[layer, head].to(own), rows)
        if name == "query":
            return replace(call, query=tensor)
        return replace(call, key=tensor) if name == "key" else replace(call, value=tensor)

    return Edit(frozenset(by_layer), inputs=inputs)


def swap_heads(layer: int, first: int, second: int) -> Edit:
    """Two heads of a layer give their outputs in each other's place."""

    def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        order = list(range(output.shape[2]))
        for head in (first, second):
            _check_head(layer, head, len(order))
        order[first], order[second] = second, first
        return output[:, :, order], weights

    return Edit(frozenset((layer,)), outputs=outputs)


def set_attention(heads: Iterable[Head], rows: Rows, targets: Tensor) -> Edit:
    """Overwrite rows of heads' weights: ``targets`` ``(k_len,)``, ``(rows, k_len)`` or ``(batch, rows, k_len)``, each
    row summing to 1. Other rows and heads stay as they are, bit for bit."""
    if (targets < 0).any() or not torch.allclose(targets.sum(-1), torch.ones_like(targets.sum(-1)), atol=1e-4):
        raise OptionError("Rows of attention weights are at least 0 and sum to 1; normalise the targets.")

    def given(own: Tensor, head: int, call: Call) -> Tensor:
        if targets.dim() > 3 or any(
            n not in (1, m) for n, m in zip(targets.shape[::-1], own.shape[::-1], strict=False)
        ):
            raise ShapeError(f"targets {tuple(targets.shape)} do not fit rows of weights {tuple(own.shape)}.")
        return targets.to(own).expand_as(own)

    return reweigh_heads(heads, rows, given)


def _uniform(heads: Iterable[Head]) -> Edit:
    def alike(own: Tensor, head: int, call: Call) -> Tensor:
        rule = call.reading.visible
        if rule is None:
            return torch.full_like(own, 1 / own.shape[-1])
        seen = rule.dense(own.shape[-2], own.shape[-1], own.device)
        seen = seen[:, head if seen.shape[1] > 1 else 0].expand_as(own).to(own)
        return seen / seen.sum(-1, keepdim=True).clamp_min(1)

    return reweigh_heads(heads, None, alike)


def reweigh_heads(heads: Iterable[Head], rows: Rows, weigh: Callable[[Tensor, int, Call], Tensor]) -> Edit:
    """Heads with other weights ``weigh(own (batch, rows, k_len), head, call)`` at some rows."""
    by_layer = _by_layer(heads)
    index: slice | list[int] = slice(None) if rows is None else rows if isinstance(rows, slice) else list(rows)

    def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        edited, maps = output.clone(), weights()
        if maps is None:
            raise OptionError(f"Layer {layer} has a mechanism without weights, so none can be set.")
        maps, value = maps.clone(), expand_groups(call.value, output.shape[2])
        _check_rows(index, maps.shape[2])
        for head in by_layer[layer]:
            _check_head(layer, head, output.shape[2])
            maps[:, head, index] = weigh(maps[:, head, index], head, call)
            edited[:, index, head] = maps[:, head, index] @ value[:, head]
        return edited, lambda some=None: maps if some is None else maps[:, :, some]

    return Edit(frozenset(by_layer), outputs=outputs)


def _placed(own: Tensor, given: Tensor, rows: Rows) -> Tensor:
    """``given`` at some rows of ``own`` ``(batch, length, dim)``."""
    if rows is None:
        return given.expand_as(own)
    index = rows if isinstance(rows, slice) else list(rows)
    _check_rows(index, own.shape[1])
    out = own.clone()
    out[:, index] = given.expand_as(own)[:, index]
    return out


def _by_layer(heads: Iterable[Head]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


def _check_rows(index: slice | list[int], count: int) -> None:
    if not isinstance(index, slice) and any(not -count <= row < count for row in index):
        raise OptionError(f"There are {count} queries, 0 to {count - 1}; rows {index} go beyond.")


def _check_head(layer: int, head: int, count: int) -> None:
    if not 0 <= head < count:
        raise OptionError(f"Layer {layer} has heads 0 to {count - 1}; there is no head {head}.")
