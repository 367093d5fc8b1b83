"""The table: every catalogue entry that can be built, in each variant, how to build it small, and inputs for it.

Nothing here or in the suite knows an entry by name. What an entry cannot do it declares in its traits
(:class:`regard.mechanism.Traits`), and the suite checks that the declaration is true. ``REGARD_CONFORMANCE=moba,gna``
in the environment keeps the table to those entries. A variant's declarations are those of its instances, as options may
change them.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.masks import KeyPadding, Mask, Sinks, SlidingWindow

HEADS, DIM, CHANNELS = 4, 8, 32


def _rectangle(length: int) -> tuple[int, int]:
    """``length`` as height times width, as square as its factors allow."""
    height = max(h for h in range(1, int(length**0.5) + 1) if length % h == 0)
    return height, length // height


def grid_of(length: int, axes: int) -> tuple[int, ...]:
    """A grid of one to three axes that holds ``length`` tokens."""
    if axes == 1:
        return (length,)
    if axes == 2:
        return _rectangle(length)
    frames = next((f for f in (2, 3) if length % f == 0), 1)
    return (frames, *_rectangle(length // frames))


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same seed and shape in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Subject:
    """One row of the table. ``cls``: what declares its traits, a class or, of a variant, an instance."""

    name: str
    kind: str
    options: Mapping[str, Any]
    cls: Any
    variant: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}:{self.variant}" if self.variant else self.name

    def build(
        self,
        *,
        kv_heads: int = HEADS,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        train: bool = False,
    ) -> Any:
        """A small instance with generic parameters: initial zeros and ones would hide whole branches."""
        torch.manual_seed(seed)
        module = regard.build(
            self.name,
            self.options,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            head_dim=DIM,
            embed_dim=CHANNELS,
            channels=CHANNELS,
            layer_index=0,
            num_layers=2,
        ).to(dtype)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.05 * noise.to(dtype))
        return module.train(train)

    @property
    def forward_arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.cls.forward).parameters

    def space(self, length: int, axes: int | None = None) -> dict[str, Any]:
        """The ``grid`` argument where the subject needs one (or where ``axes`` asks for one)."""
        if axes is None:
            if not self.cls.needs_grid:
                return {}
            axes = 2 if 2 in self.cls.grid_axes else min(self.cls.grid_axes)
        return {"grid": grid_of(length, axes)}

    @property
    def causals(self) -> list[bool]:
        """The values of ``causal`` that its self-attention patterns allow."""
        return [causal for causal in (False, True) if ("causal-self" if causal else "self") in self.cls.patterns]


def _table() -> tuple[list[Subject], dict[str, str]]:
    rows, broken = [], {}
    for entry in regard.catalogue():
        if entry.kind not in ("mechanism", "layer", "feature") or entry.module is None:
            continue
        try:
            importlib.import_module(entry.module)
            cls = importlib.import_module("regard.registry").get(entry.key)
        except Exception as error:  # the catalogue's own tests report it; here the others must still run
            broken[entry.key] = f"{type(error).__name__}: {error}"
            continue
        rows.append(Subject(entry.key, entry.kind, entry.example, cls))
        for variant, options in entry.variants.items():
            try:
                declared = Subject(entry.key, entry.kind, options, cls).build()
            except Exception as error:
                broken[f"{entry.key}:{variant}"] = f"{type(error).__name__}: {error}"
                continue
            rows.append(Subject(entry.key, entry.kind, options, declared, variant))
    return rows, broken


SUBJECTS, BROKEN = _table()
_only = os.environ.get("REGARD_CONFORMANCE", "")
if _only:
    SUBJECTS = [subject for subject in SUBJECTS if subject.name in _only.split(",")]


def over(kind: str, where: Callable[[Subject], bool] = lambda subject: True) -> pytest.MarkDecorator:
    """Parametrize a check over the subjects of a kind, those for which it makes sense."""
    rows = [subject for subject in SUBJECTS if subject.kind == kind and where(subject)]
    return pytest.mark.parametrize("subject", rows, ids=[subject.label for subject in rows])


def query_key_value(
    q_len: int,
    k_len: int | None = None,
    *,
    batch: int = 2,
    kv_heads: int = HEADS,
    value_dim: int = DIM,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a mechanism."""
    k_len = q_len if k_len is None else k_len
    query = draw(batch, HEADS, q_len, DIM, dtype=dtype, seed=3 * seed + 1)
    key = draw(batch, kv_heads, k_len, DIM, dtype=dtype, seed=3 * seed + 2)
    value = draw(batch, kv_heads, k_len, value_dim, dtype=dtype, seed=3 * seed + 3)
    return tuple(t.requires_grad_(grad) for t in (query, key, value))  # type: ignore[return-value]


def change(tensor: Tensor, axis: int, start: int) -> Tensor:
    """The tensor with other numbers from ``start`` on along ``axis``: larger ones, so that selections move too."""
    size = tensor.shape[axis] - start
    head, tail = tensor.detach().split([start, size], axis)
    other = draw(*tail.shape, dtype=tensor.dtype, seed=991) * 3 + 0.5
    return torch.cat((head, other), axis)


def worst(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6)
    return float(error.nan_to_num(nan=float("inf")))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    error = worst(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} exceeds {tolerance:g}"


def assert_finite(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or bool(torch.isfinite(tensor).all()), "not all numbers are finite"


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    """Gradients of a generic scalar of the output; None where an input has no part in it."""
    if not output.requires_grad:
        return [None] * len(inputs)
    seed = draw(*output.shape, dtype=output.dtype, seed=77)
    return list(torch.autograd.grad(output, inputs, seed, allow_unused=True))


def check_gradient(module: nn.Module, *inputs: Tensor, **arguments: Any) -> None:
    """torch's gradient check along random directions, for the inputs and the module's parameters."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors[len(inputs) :], strict=True))
        output: Tensor = torch.func.functional_call(module, given, tensors[: len(inputs)], arguments)
        return output

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, (*leaves, *parameters), fast_mode=True, check_undefined_grad=False)


def check_low_precision(module: nn.Module, dtype: torch.dtype, *inputs: Tensor, **arguments: Any) -> None:
    """The module in a coarser dtype, forward and backward, agrees with float64 on the same rounded numbers.

    A number may be off by four roundings of the largest and, beyond that, by as much as the float64 form itself moves
    when inputs and parameters move by a few roundings: a choice of keys that stands on a knife's edge shows as such a
    move, without a word about how it chooses. At least half of all numbers must do without that second allowance.
    """
    eps = torch.finfo(dtype).eps
    coarse = module.to(dtype)
    rounded = [tensor.to(dtype) for tensor in inputs]
    fine = copy.deepcopy(coarse).double()
    exact = [tensor.double() for tensor in rounded]
    actual, base = _output_and_gradients(coarse, rounded, arguments), _output_and_gradients(fine, exact, arguments)
    assert actual[0] is not None and actual[0].dtype == dtype
    moved = [None if tensor is None else torch.zeros_like(tensor) for tensor in base]
    state = {name: tensor.clone() for name, tensor in fine.state_dict().items()}
    for trial in range(6):
        with torch.no_grad():
            for index, parameter in enumerate(fine.parameters()):
                parameter.mul_(1 + 4 * eps * draw(*parameter.shape, seed=1000 * trial + index))
        near = [t * (1 + 4 * eps * draw(*t.shape, seed=1000 * trial + 500 + i)) for i, t in enumerate(exact)]
        other = _output_and_gradients(fine, near, arguments)
        moved = [None if m is None else m.maximum((o - b).abs()) for m, o, b in zip(moved, other, base, strict=True)]  # type: ignore[operator]
        fine.load_state_dict(state)
    names = ["output", *(f"gradient of input {index}" for index in range(len(inputs)))]
    for name, low, high, slack in zip(names, actual, base, moved, strict=True):
        if low is None or high is None or slack is None:
            continue
        error, size = (low.double() - high).abs(), high.abs().amax().clamp_min(1e-3)
        plain = 4 * eps * (size + high.abs())
        beyond = ~(error <= plain + 4 * slack)
        assert not bool(beyond.any()), (
            f"{name}: {int(beyond.sum())} of {error.numel()} numbers are off by up to "
            f"{float((error / size)[beyond].max()):.3g} of the largest, where {dtype} explains "
            f"{float(((plain + 4 * slack) / size)[beyond].max()):.3g}"
        )
        close = float((error <= plain).double().mean())
        assert close >= 0.5, f"{name}: only {close:.0%} of the numbers agree to {float((plain / size).max()):.2g}"


def _output_and_gradients(module: nn.Module, inputs: list[Tensor], arguments: dict[str, Any]) -> list[Tensor | None]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output: Tensor = module(*leaves, **arguments)
    return [output.detach(), *gradients(output, *leaves)]


def masks_for(batch: int, q_len: int, k_len: int, support: str) -> dict[str, Mask | Tensor]:
    """Masks that a mechanism of this support must honour, by name."""
    if support == "none":
        return {}
    valid = torch.ones(batch, k_len, dtype=torch.bool)
    valid[-1, -(k_len // 3) :] = False
    left = torch.ones(batch, k_len, dtype=torch.bool)
    left[0, : k_len // 4] = False
    masks: dict[str, Mask | Tensor] = {"padding": KeyPadding(valid), "left-padding": KeyPadding(left)}
    if support == "any":
        chance = torch.rand(batch, HEADS, q_len, k_len, generator=torch.Generator().manual_seed(5))
        masks["random"] = chance < 0.7
        masks["window"] = SlidingWindow(7) | Sinks(2)
    return masks
