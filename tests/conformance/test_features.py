"""Every feature module ``(batch, channels, *space)`` keeps the contracts of :class:`regard.mechanism.Feature`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.conformance.subjects import (
    CHANNELS,
    Subject,
    assert_finite,
    assert_same,
    check_gradient,
    check_low_precision,
    draw,
    gradients,
    over,
)

SPACES = {
    "even": {1: (48,), 2: (8, 8), 3: (2, 4, 6)},
    "odd": {1: (37,), 2: (7, 9), 3: (3, 5, 3)},
    "one": {1: (1,), 2: (1, 1), 3: (1, 1, 1)},
}


def maps(
    subject: Subject,
    space: str = "odd",
    axes: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> Tensor:
    size = SPACES[space][max(subject.cls.grid_axes) if axes is None else axes]
    return draw(batch, CHANNELS, *size, dtype=dtype, seed=3).requires_grad_(grad)


@over("feature")
@pytest.mark.parametrize("space", SPACES)
def test_shapes(subject: Subject, space: str) -> None:
    """Every declared number of axes works, and the map keeps its shape."""
    assert subject.cls.grid_axes, "a feature module names the numbers of spatial axes that it takes"
    for axes in subject.cls.grid_axes:
        x = maps(subject, space, axes)
        out = subject.build()(x)
        assert out.shape == x.shape
        assert out.dtype == x.dtype
        assert_finite(out)


@over("feature", lambda s: s.cls.true_gradient)
def test_gradient(subject: Subject) -> None:
    check_gradient(subject.build(), maps(subject, batch=1))


@over("feature")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_low_precision(subject: Subject, dtype: torch.dtype) -> None:
    check_low_precision(subject.build(), dtype, maps(subject))


@over("feature")
def test_batch_independence(subject: Subject) -> None:
    module, x = subject.build(), maps(subject, batch=3)
    together = module(x)
    for row in range(3):
        assert_same(together[row : row + 1], module(x[row : row + 1]))


@over("feature")
def test_memory_layout_does_not_matter(subject: Subject) -> None:
    module, x = subject.build(), maps(subject)
    view = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_same(module(view), module(x))
    assert torch.equal(view, x), "the input was changed in place"


@over("feature")
@pytest.mark.parametrize("size", [1e4, 1e-6], ids=["huge", "tiny"])
def test_magnitudes(subject: Subject, size: float) -> None:
    x = (size * maps(subject, dtype=torch.float32)).detach().requires_grad_()
    out = subject.build(dtype=torch.float32)(x)
    assert_finite(out, *gradients(out, x))


@over("feature")
def test_determinism(subject: Subject) -> None:
    module, x, outs = subject.build(dtype=torch.float32), maps(subject, dtype=torch.float32), []
    for seed, used in enumerate((module, module, subject.build(dtype=torch.float32))):
        torch.manual_seed(100 + seed)
        outs.append(used(x))
    assert torch.equal(outs[0], outs[1]), "two calls differ"
    assert torch.equal(outs[0], outs[2]), "two builds from one seed differ"


@over("feature")
def test_earlier_calls_leave_no_trace(subject: Subject) -> None:
    """After other sizes and inference mode, numbers and gradients are those of a fresh instance."""
    used, results = subject.build(), []
    with torch.inference_mode():
        for space in SPACES:
            used(maps(subject, space, batch=1))
    for module in (used, subject.build()):
        x = maps(subject, grad=True)
        out = module(x)
        results.append((out, gradients(out, x)[0]))
    for actual, expected in zip(*results, strict=True):
        assert actual is not None and expected is not None
        assert_same(actual, expected)


@over("feature")
def test_training_mode(subject: Subject) -> None:
    """Trains: finite gradients reach the input and most of the parameters."""
    module, x = subject.build(train=True), maps(subject, grad=True)
    out = module(x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = gradients(out, x, *parameters)
    assert grads[0] is not None
    assert_finite(out, *grads)
    reached = sum(grad is not None for grad in grads[1:])
    assert reached >= len(parameters) / 2, f"a gradient reaches {reached} of {len(parameters)} parameters"


@over("feature")
def test_state_dict(subject: Subject) -> None:
    module, other, x = subject.build(seed=1), subject.build(seed=2), maps(subject)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x), expected), "the state dict does not carry all that matters"


@over("feature")
def test_compile(subject: Subject) -> None:
    module, outs, grads = subject.build(), [], []
    torch._dynamo.reset()
    for run in (module, torch.compile(module, backend="eager", dynamic=False)):
        x = maps(subject, grad=True)
        outs.append(run(x))
        grads.append(gradients(outs[-1], x)[0])
    assert_same(outs[1], outs[0])
    assert grads[0] is not None and grads[1] is not None
    assert_same(grads[1], grads[0])


@pytest.mark.slow
@over("feature")
def test_inductor(subject: Subject) -> None:
    module, x = subject.build(dtype=torch.float32), maps(subject, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(module, dynamic=False)(x), module(x), 1e-4)
