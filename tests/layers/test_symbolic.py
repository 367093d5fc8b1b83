"""Formulas and their derived derivatives against torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError
from regard.layers.symbolic import SymbolicArray, trace_score

pytestmark = pytest.mark.paper("attention_engine")

# Each on symbolic arrays, and on tensors: x (rows, keys), y (rows, keys) positive, r (rows, 1).
CASES: dict[str, tuple[Callable[[Any, Any, Any], Any], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "arithmetic": (
        lambda x, y, r: 2 - (3 * x + y) / (y + 1) - (-x) / 2,
        lambda x, y, r: 2 - (3 * x + y) / (y + 1) + x / 2,
    ),
    "reflected": (lambda x, y, r: 1 / y + (1 - x) * 2, lambda x, y, r: 1 / y + (1 - x) * 2),
    "exponentials": (lambda x, y, r: x.exp() * y.log() + x.exp2(), lambda x, y, r: x.exp() * y.log() + x.exp2()),
    "tanh": (lambda x, y, r: (x * y).tanh(), lambda x, y, r: (x * y).tanh()),
    "abs and max": (
        lambda x, y, r: x.abs() + x.max(y) + x.max(0),
        lambda x, y, r: x.abs() + torch.maximum(x, y) + x.relu(),
    ),
    "rows": (lambda x, y, r: x * r / (r + 1), lambda x, y, r: x * r / (r + 1)),
    "sum": (lambda x, y, r: x.exp() / x.exp().get_reduce("sum"), lambda x, y, r: x.softmax(-1)),
    "max": (lambda x, y, r: x - x.get_reduce("max") * y, lambda x, y, r: x - x.amax(-1, keepdim=True) * y),
    "abssum": (
        lambda x, y, r: x / x.get_reduce("abssum").max(1),
        lambda x, y, r: x / x.abs().sum(-1, keepdim=True).clamp_min(1),
    ),
    "used twice": (lambda x, y, r: (lambda t: t * t + t)(x * y), lambda x, y, r: (x * y) ** 2 + x * y),
}


@pytest.mark.parametrize("case", CASES)
def test_formulas_and_derivatives_are_torch_s(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, r = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (4, 6), (4, 1)))
    tensors = {"x": x.requires_grad_(), "y": (y.abs() + 0.2).requires_grad_(), "r": (r.abs() + 0.2).requires_grad_()}
    symbolic, plain = CASES[case]
    formula = symbolic(SymbolicArray("x"), SymbolicArray("y"), SymbolicArray("r", row=True))
    expected = plain(tensors["x"], tensors["y"], tensors["r"])
    detached = {name: t.detach() for name, t in tensors.items()}
    torch.testing.assert_close(formula.evaluate(detached), expected.detach())
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    derived = formula.backward(SymbolicArray("grad"))
    meant = torch.autograd.grad(expected, list(tensors.values()), grad, allow_unused=True)
    for name, gradient in zip(tensors, meant, strict=True):
        assert (name in derived) == (gradient is not None)
        if gradient is not None:
            torch.testing.assert_close(derived[name].evaluate({**detached, "grad": grad}), gradient)


def test_a_derivative_can_be_read() -> None:
    s = SymbolicArray("s")
    assert str((s * 2 + 1).backward(SymbolicArray("g"))["s"]) == "(g * 2)"
    assert str(-s.exp().max(0)) == "-max(exp(s), 0)"


def test_what_is_no_formula_is_not_traced() -> None:
    """Comparisons, tensors, reductions of a tile and torch's functions are left to tensors."""
    table = torch.ones(3)
    functions: list[Callable[..., Any]] = [
        lambda s, c, b, h, q, k: torch.where(q >= k, s, 0),
        lambda s, c, b, h, q, k: s * (q == k),
        lambda s, c, b, h, q, k: s if q else s + 1,
        lambda s, c, b, h, q, k: s + table,
        lambda s, c, b, h, q, k: table[h] * s,
        lambda s, c, b, h, q, k: s - s.get_reduce("max"),
        lambda s, c, b, h, q, k: s * True,
        lambda s, c, b, h, q, k: 1.0,
    ]
    for function in functions:
        assert trace_score(function, ()) is None
    assert trace_score(lambda s, c, b, h, q, k: s + c["x"] * (q - k).abs(), ("x",)) is not None
    with pytest.raises(OptionError, match="abssum"):
        SymbolicArray("x").get_reduce("mean")
