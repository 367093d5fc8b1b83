"""Every layer ``(batch, length, channels)`` keeps the contracts of :class:`regard.mechanism.Layer`.

An argument that ``forward`` names (``causal``, ``mask``, ``grid``) is honoured. A layer without a ``causal`` argument
is causal always if its patterns are all causal, and never otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import UnsupportedPatternError
from regard.masks import KeyPadding
from tests.conformance.subjects import (
    CHANNELS,
    Subject,
    assert_finite,
    assert_same,
    change,
    check_gradient,
    check_low_precision,
    draw,
    gradients,
    over,
)


def tokens(length: int, batch: int = 2, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return draw(batch, length, CHANNELS, dtype=dtype, seed=length).requires_grad_(grad)


def calls(subject: Subject, length: int) -> list[dict[str, Any]]:
    """The keyword arguments of each self-attention pattern that it declares."""
    space = subject.space(length)
    if "causal" not in subject.forward_arguments:
        return [space]
    return [{"causal": causal, **space} for causal in subject.causals]


def is_causal(subject: Subject, arguments: dict[str, Any]) -> bool:
    always = all(pattern.startswith("causal") for pattern in subject.cls.patterns)
    return bool(arguments.get("causal", always))


@over("layer")
@pytest.mark.parametrize("length", [48, 37, 3, 1])
def test_shapes(subject: Subject, length: int) -> None:
    for arguments in calls(subject, length):
        out = subject.build()(tokens(length), **arguments)
        assert out.shape == (2, length, CHANNELS)
        assert out.dtype == torch.float64
        assert_finite(out)


@over("layer", lambda s: "causal" in s.forward_arguments and len(s.causals) < 2)
def test_undeclared_pattern_is_refused(subject: Subject) -> None:
    with pytest.raises(UnsupportedPatternError):
        subject.build()(tokens(37), causal=not subject.causals[0], **subject.space(37))


@over("layer", lambda s: s.cls.true_gradient)
def test_gradient(subject: Subject) -> None:
    for arguments in calls(subject, 20):
        check_gradient(subject.build(), tokens(20, batch=1), **arguments)


@over("layer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_low_precision(subject: Subject, dtype: torch.dtype) -> None:
    for arguments in calls(subject, 37):
        check_low_precision(subject.build(), dtype, tokens(37), **arguments)


@over("layer")
def test_no_leak_from_the_future(subject: Subject) -> None:
    module = subject.build()
    for arguments in calls(subject, 37):
        if is_causal(subject, arguments):
            before = module(tokens(37), **arguments)
            for cut in (1, 12, 19, 36):
                changed = module(change(tokens(37), 1, cut), **arguments)
                assert_same(changed[:, :cut], before[:, :cut])


@over("layer")
def test_batch_independence(subject: Subject) -> None:
    module, x = subject.build(), tokens(37, batch=3)
    for arguments in calls(subject, 37):
        together = module(x, **arguments)
        for row in range(3):
            assert_same(together[row : row + 1], module(x[row : row + 1], **arguments))


@over("layer")
def test_memory_layout_does_not_matter(subject: Subject) -> None:
    module, x = subject.build(), tokens(37)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    for arguments in calls(subject, 37):
        assert_same(module(view, **arguments), module(x, **arguments))
    assert torch.equal(view, x), "the input was changed in place"


@over("layer", lambda s: "mask" in s.forward_arguments)
def test_padding_does_not_matter(subject: Subject) -> None:
    """What stands at padded positions reaches no other; a sequence of padding alone stays finite."""
    module, x = subject.build(), tokens(37)
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[1, -12:] = False
    changed = torch.where(valid[..., None], x, 5 * draw(*x.shape, seed=43) + 1)
    nothing = torch.ones(2, 37, dtype=torch.bool)
    nothing[0] = False
    for arguments in calls(subject, 37):
        out, other = (module(t, mask=KeyPadding(valid), **arguments) for t in (x, changed))
        assert_same(other[valid], out[valid])
        leaf = tokens(37, grad=True)
        out = module(leaf, mask=KeyPadding(nothing), **arguments)
        assert_finite(out, *gradients(out, leaf))


@over("layer")
@pytest.mark.parametrize("size", [1e4, 1e-6], ids=["huge", "tiny"])
def test_magnitudes(subject: Subject, size: float) -> None:
    for arguments in calls(subject, 37):
        module = subject.build(dtype=torch.float32)
        x = (size * tokens(37, dtype=torch.float32)).detach().requires_grad_()
        out = module(x, **arguments)
        assert_finite(out, *gradients(out, x))


@over("layer")
def test_determinism(subject: Subject) -> None:
    module, x = subject.build(dtype=torch.float32), tokens(37, dtype=torch.float32)
    for arguments in calls(subject, 37):
        outs = []
        for seed, used in enumerate((module, module, subject.build(dtype=torch.float32))):
            torch.manual_seed(100 + seed)
            outs.append(used(x, **arguments))
        assert torch.equal(outs[0], outs[1]), "two calls differ"
        assert torch.equal(outs[0], outs[2]), "two builds from one seed differ"


@over("layer")
def test_earlier_calls_leave_no_trace(subject: Subject) -> None:
    """After other lengths and inference mode, numbers and gradients are those of a fresh instance."""
    used, fresh = subject.build(), subject.build()
    with torch.inference_mode():
        for length in (48, 37, 5):
            for arguments in calls(subject, length):
                used(tokens(length, batch=1), **arguments)
    for arguments in calls(subject, 37):
        results = []
        for module in (used, fresh):
            x = tokens(37, grad=True)
            out = module(x, **arguments)
            results.append((out, gradients(out, x)[0]))
        for actual, expected in zip(*results, strict=True):
            assert actual is not None and expected is not None
            assert_same(actual, expected)


@over("layer")
def test_training_mode(subject: Subject) -> None:
    """Trains: finite gradients reach the input and most of the parameters."""
    for arguments in calls(subject, 37):
        module, x = subject.build(train=True), tokens(37, grad=True)
        out = module(x, **arguments)
        parameters = [p for p in module.parameters() if p.requires_grad]
        grads = gradients(out, x, *parameters)
        assert grads[0] is not None
        assert_finite(out, *grads)
        reached = sum(grad is not None for grad in grads[1:])
        assert reached >= len(parameters) / 2, f"a gradient reaches {reached} of {len(parameters)} parameters"


@over("layer")
def test_state_dict(subject: Subject) -> None:
    module, other = subject.build(seed=1), subject.build(seed=2)
    arguments, x = calls(subject, 37)[0], tokens(37)
    expected = module(x, **arguments)
    assert torch.equal(copy.deepcopy(module)(x, **arguments), expected)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x, **arguments), expected), "the state dict does not carry all that matters"


@over("layer")
def test_compile(subject: Subject) -> None:
    arguments = calls(subject, 37)[-1]
    module, outs, grads = subject.build(), [], []
    torch._dynamo.reset()
    for run in (module, torch.compile(module, backend="eager", dynamic=False)):
        x = tokens(37, grad=True)
        outs.append(run(x, **arguments))
        grads.append(gradients(outs[-1], x)[0])
    assert_same(outs[1], outs[0])
    assert grads[0] is not None and grads[1] is not None
    assert_same(grads[1], grads[0])


@pytest.mark.slow
@over("layer")
def test_inductor(subject: Subject) -> None:
    arguments = calls(subject, 37)[-1]
    module, x = subject.build(dtype=torch.float32), tokens(37, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(module, dynamic=False)(x, **arguments), module(x, **arguments), 1e-4)
