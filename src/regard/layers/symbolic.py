"""Formulas of arrays, with the formula of their derivative.

A ``score_mod`` that is called with :class:`SymbolicArray` in place of tensors leaves its formula behind, from which
:meth:`SymbolicArray.backward` derives another one: what a code generator needs, as in AttentionEngine (Chen et al.,
2025, arXiv 2502.15349), where both become lines of a kernel. Here they are evaluated on torch tensors, which is worth
it for three things: one can read the derivative (``str``), a tile's backward pass records no graph and keeps only what
the formula names, and whatever traces is known to need nothing beyond these operations. Any other function of tensors
works too, by autograd.

    s = SymbolicArray("score")
    sigmoid = ((s * 0.5).tanh() + 1) * 0.5
    str(sigmoid.backward(SymbolicArray("grad"))["score"])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from regard.errors import OptionError
from regard.kernels.online import Custom, Index

__all__ = ["SymbolicArray", "SymbolicScore", "trace_score"]

_LOG2 = math.log(2.0)

_VALUES: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "max": torch.maximum,
    # One where the first is larger, one half where they are equal: torch's own choice for the derivative of a maximum.
    "above": lambda a, b: torch.heaviside(a - b, torch.full((), 0.5, dtype=a.dtype, device=a.device)),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "tanh": torch.tanh,
    "row_sum": lambda a: a.sum(-1, keepdim=True),
    "row_max": lambda a: a.amax(-1, keepdim=True),
    "row_abssum": lambda a: a.abs().sum(-1, keepdim=True),
    # The largest numbers of a row share its derivative.
    "row_argmax": lambda a: _shared_equally(a == a.amax(-1, keepdim=True), a),
}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def _shared_equally(largest: Tensor, like: Tensor) -> Tensor:
    ones = largest.to(like.dtype)
    return ones / ones.sum(-1, keepdim=True)


class SymbolicArray:
    """A named array, or an operation on others; ``row`` where it has one number for each row."""

    def __init__(self, name: str, *, row: bool = False) -> None:
        self.name, self.operation, self.operands, self.row = name, "", (), row
        self.constant: float | None = None

    operands: tuple[SymbolicArray, ...]

    @classmethod
    def _of(cls, operation: str, *operands: Any, row: bool | None = None) -> SymbolicArray:
        made = cls("")
        made.operation, made.operands = operation, tuple(_wrapped(one) for one in operands)
        made.row = all(one.row or one.constant is not None for one in made.operands) if row is None else row
        return made

    def __add__(self, other: Any) -> SymbolicArray:
        return self._of("add", self, other)

    def __radd__(self, other: Any) -> SymbolicArray:
        return self._of("add", other, self)

    def __sub__(self, other: Any) -> SymbolicArray:
        return self._of("sub", self, other)

    def __rsub__(self, other: Any) -> SymbolicArray:
        return self._of("sub", other, self)

    def __mul__(self, other: Any) -> SymbolicArray:
        return self._of("mul", self, other)

    def __rmul__(self, other: Any) -> SymbolicArray:
        return self._of("mul", other, self)

    def __truediv__(self, other: Any) -> SymbolicArray:
        return self._of("div", self, other)

    def __rtruediv__(self, other: Any) -> SymbolicArray:
        return self._of("div", other, self)

    def __neg__(self) -> SymbolicArray:
        return self._of("neg", self)

    def abs(self) -> SymbolicArray:
        return self._of("abs", self)

    def max(self, other: Any) -> SymbolicArray:
        """The larger of two, pair by pair."""
        return self._of("max", self, other)

    def exp(self) -> SymbolicArray:
        return self._of("exp", self)

    def exp2(self) -> SymbolicArray:
        return self._of("exp2", self)

    def log(self) -> SymbolicArray:
        return self._of("log", self)

    def tanh(self) -> SymbolicArray:
        return self._of("tanh", self)

    def get_reduce(self, kind: str) -> SymbolicArray:
        """``"sum"``, ``"max"`` or ``"abssum"`` of each row."""
        if f"row_{kind}" not in _VALUES or kind == "argmax":
            raise OptionError(f"Rows reduce by 'sum', 'max' or 'abssum', not {kind!r}.")
        return self._of(f"row_{kind}", self, row=True)

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("A symbolic array has no values to compare.")

    def __bool__(self) -> NoReturn:
        raise TypeError("A symbolic array has no value that could be true.")

    __hash__ = object.__hash__

    def __str__(self) -> str:
        if self.constant is not None:
            return f"{self.constant:g}"
        if not self.operation:
            return self.name
        inner = [str(one) for one in self.operands]
        if self.operation in _SIGNS:
            return f"({inner[0]} {_SIGNS[self.operation]} {inner[1]})"
        return f"-{inner[0]}" if self.operation == "neg" else f"{self.operation}({', '.join(inner)})"

    def _ordered(self) -> list[SymbolicArray]:
        """This and what it is made of, operands first, each once."""
        order: dict[int, SymbolicArray] = {}
        waiting = [(self, False)]
        while waiting:
            node, ready = waiting.pop()
            if id(node) in order:
                continue
            if ready:
                order[id(node)] = node
            else:
                waiting += [(node, True), *((one, False) for one in node.operands)]
        return list(order.values())

    def evaluate(self, tensors: Mapping[str, Tensor], known: dict[int, Tensor] | None = None) -> Tensor:
        """On tensors that broadcast together, by the names of the formula's arrays. known: what several formulas share,
        kept from one to the next on the same tensors."""
        like = next(iter(tensors.values()))
        values = {} if known is None else known
        for node in self._ordered():
            if id(node) in values:
                continue
            if node.constant is not None:
                values[id(node)] = torch.full((), node.constant, dtype=like.dtype, device=like.device)
            elif node.operation:
                values[id(node)] = _VALUES[node.operation](*(values[id(one)] for one in node.operands))
            else:
                values[id(node)] = tensors[node.name]
        return values[id(self)]

    def backward(self, grad: SymbolicArray) -> dict[str, SymbolicArray]:
        """The formula of the gradient of each named array, from that of this one; arrays without one are left out.

        Where an array was broadcast, its gradient is still to be summed over what it was broadcast to, but for rows.
        """
        found: dict[int, SymbolicArray] = {id(self): grad}
        leaves: dict[str, SymbolicArray] = {}
        for node in reversed(self._ordered()):
            if id(node) not in found or node.constant is not None:
                continue
            if not node.operation:
                known = leaves.get(node.name)
                leaves[node.name] = found[id(node)] if known is None else known + found[id(node)]
                continue
            for operand, part in zip(node.operands, _derived(node, found[id(node)]), strict=True):
                if operand.constant is None:
                    part = part.get_reduce("sum") if operand.row and not part.row else part
                    known = found.get(id(operand))
                    found[id(operand)] = part if known is None else known + part
        return leaves


def _wrapped(one: Any) -> SymbolicArray:
    if isinstance(one, SymbolicArray):
        return one
    if isinstance(one, bool) or not isinstance(one, (int, float)):
        raise TypeError(f"A symbolic array combines with symbolic arrays and numbers, not with {type(one).__name__}.")
    made = SymbolicArray("")
    made.constant = float(one)
    return made


def _derived(node: SymbolicArray, grad: SymbolicArray) -> tuple[SymbolicArray, ...]:
    """The gradients of an operation's operands."""
    a, b = (*node.operands, node.operands[0])[:2]
    match node.operation:
        case "add":
            return grad, grad
        case "sub":
            return grad, -grad
        case "mul":
            return grad * b, grad * a
        case "div":
            return grad / b, -(grad * node / b)
        case "neg":
            return (-grad,)
        case "abs":
            return (grad * SymbolicArray._of("sign", a),)
        case "max":
            return grad * SymbolicArray._of("above", a, b), grad * SymbolicArray._of("above", b, a)
        case "exp":
            return (grad * node,)
        case "exp2":
            return (grad * node * _LOG2,)
        case "log":
            return (grad / a,)
        case "tanh":
            return (grad - grad * node * node,)
        case "row_sum":
            # Times one for each number of the row.
            return (grad * (a * 0 + 1),)
        case "row_max":
            return (grad * SymbolicArray._of("row_argmax", a, row=False),)
        case "row_abssum":
            return (grad * SymbolicArray._of("sign", a),)
    raise OptionError(f"A formula that holds {node.operation!r} has no derivative here: it is one already.")


_INDICES = ("b", "h", "q_idx", "kv_idx")


class SymbolicScore:
    """A score's formula and its derivative, as :func:`~regard.kernels.online.online_attention` takes them.

    ``formula``, and ``derivative`` by name: of ``score`` and of each custom tensor that the formula reads; ``grad``
    stands for the gradient of the changed score.
    """

    def __init__(self, formula: SymbolicArray, names: Sequence[str]) -> None:
        self.formula, self.names = formula, tuple(names)
        derived = formula.backward(SymbolicArray("grad"))
        self.derivative = {name: derived[name] for name in ("score", *names) if name in derived}

    def __call__(self, scores: Tensor, custom: Custom, index: Index) -> Tensor:
        return self.formula.evaluate(self._given(scores, custom, index)).expand(scores.shape)

    def gradient(
        self, grad: Tensor, scores: Tensor, custom: Custom, index: Index, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        given = {**self._given(scores, custom, index), "grad": grad}
        known: dict[int, Tensor] = {}

        def derived(name: str) -> Tensor | None:
            formula = self.derivative.get(name)
            return None if formula is None else formula.evaluate(given, known).expand(scores.shape)

        first = derived("score")
        more = [derived(name) if need else None for name, need in zip(self.names, needs, strict=True)]
        summed = [
            None if part is None else part.sum_to_size(tensor.shape) for part, tensor in zip(more, custom, strict=True)
        ]
        return torch.zeros_like(scores) if first is None else first, summed

    def _given(self, scores: Tensor, custom: Custom, index: Index) -> dict[str, Tensor]:
        places = {name: place.to(scores.dtype) for name, place in zip(_INDICES, index, strict=True)}
        return {"score": scores, **places, **dict(zip(self.names, custom, strict=True))}


def trace_score(score_mod: Callable[..., Any], names: Sequence[str]) -> SymbolicScore | None:
    """The formula of ``score_mod(score, custom, b, h, q_idx, kv_idx)``, ``custom`` a mapping of ``names``; None for a
    function that does more than symbolic arrays know."""
    arrays = {name: SymbolicArray(name) for name in ("score", *_INDICES, *names)}
    try:
        formula = score_mod(
            arrays["score"], {name: arrays[name] for name in names}, *(arrays[name] for name in _INDICES)
        )
    except Exception:
        # Whatever it raised, on tensors it may run.
        return None
    # A row's reduction would be one of a tile, which is not what a whole map gives.
    if not isinstance(formula, SymbolicArray) or any(n.operation.startswith("row_") for n in formula._ordered()):
        return None
    return SymbolicScore(formula, names)
