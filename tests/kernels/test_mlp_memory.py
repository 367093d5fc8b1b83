from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.mlp_memory import ACTIVATIONS, READS, MemoryNetwork, MemoryState, mlp_memory

HEADS, DIM = 3, 5


def draw(depth: int, norm: bool, length: int = 21, grad: bool = False) -> dict[str, Tensor]:
    """Weights, queries, unit keys, values and gates of two sequences."""
    widths = [DIM, *[7] * (depth - 1), DIM]
    made = {f"w{i}": 0.5 * torch.randn(HEADS, a, b) for i, (a, b) in enumerate(pairwise(widths))}
    for name in ("query", "key", "value"):
        made[name] = F.normalize(torch.randn(2, HEADS, length, DIM), dim=-1)
    for name, most in (("theta", 0.2), ("alpha", 0.2), ("eta", 0.9)):
        made[name] = most * torch.rand(2, HEADS, length)
    if norm:
        made["gain"], made["shift"] = torch.rand(HEADS, DIM), torch.randn(HEADS, DIM)
    return {name: t.double().requires_grad_(grad) for name, t in made.items()}


def call(
    inputs: dict[str, Tensor],
    activation: str = "silu",
    *,
    momentum: bool = True,
    decay: bool = True,
    state: MemoryState | None = None,
    **options: object,
) -> tuple[Tensor, MemoryState]:
    weights = tuple(inputs[name] for name in sorted(inputs) if name[0] == "w")
    state = MemoryState.start(weights, 2, momentum=momentum) if state is None else state
    norm = (inputs["gain"], inputs["shift"]) if "gain" in inputs else None
    return mlp_memory(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        inputs["theta"],
        state,
        log_keep=torch.log1p(-inputs["alpha"]) if decay else None,
        log_momentum=inputs["eta"].log() if momentum else None,
        network=MemoryNetwork(activation, norm),
        **options,  # type: ignore[arg-type]
    )


def definition(inputs: dict[str, Tensor], activation: str, chunk: int, read: str) -> Tensor:
    """Gradient descent with momentum and decay on one sequence after another, gradients by torch's autograd."""
    names = sorted(name for name in inputs if name[0] == "w")
    function = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation]
    outs = torch.zeros_like(inputs["value"])
    for b in range(2):
        for h in range(HEADS):

            def network(weights: list[Tensor], x: Tensor, h: int = h) -> Tensor:
                y = x
                for layer, weight in enumerate(weights):
                    y = y @ weight if layer == 0 else function(y) @ weight
                if "gain" not in inputs:
                    return y
                return x + F.layer_norm(y, (DIM,), inputs["gain"][h], inputs["shift"][h])

            weights = [inputs[name][h].detach() for name in names]
            momentum = [torch.zeros_like(w) for w in weights]
            base = weights
            for t in range(outs.shape[2]):
                if t % chunk == 0:
                    base = weights
                leaves = [w.clone().requires_grad_() for w in base]
                key, value, query = (inputs[name][b, h, t] for name in ("key", "value", "query"))
                grads = torch.autograd.grad((network(leaves, key) - value).square().sum(), leaves)
                theta, alpha, eta = (inputs[name][b, h, t] for name in ("theta", "alpha", "eta"))
                momentum = [eta * s - theta * g for s, g in zip(momentum, grads, strict=True)]
                earlier, weights = weights, [(1 - alpha) * w + s for w, s in zip(weights, momentum, strict=True)]
                outs[b, h, t] = network({"after": weights, "before": earlier, "chunk": base}[read], query)
    return outs


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("depth", "norm", "activation"), [(1, False, "silu"), (2, True, "gelu"), (3, False, "relu")])
@pytest.mark.parametrize("chunk", [1, 8])
def test_all_forms_are_gradient_descent(depth: int, norm: bool, activation: str, chunk: int, read: str) -> None:
    inputs = draw(depth, norm)
    expected = definition(inputs, activation, chunk, read)
    for form in ("chunked", "scan", "recurrent"):
        out, _ = call(inputs, activation, chunk_size=chunk, read=read, backend=form)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("momentum", "decay"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("norm", [True, False])
def test_forms_agree_in_state_and_gradient(momentum: bool, decay: bool, norm: bool) -> None:
    inputs = draw(2, norm, grad=True)
    results = []
    for form in ("chunked", "scan", "recurrent"):
        out, state = call(inputs, chunk_size=8, momentum=momentum, decay=decay, backend=form)
        seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        total = (out * seed).sum() + sum(w.square().sum() for w in (*state.weights, *(state.momentum or ())))
        results.append((out, *state.weights, *torch.autograd.grad(total, list(inputs.values()), allow_unused=True)))
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert (expected is None) == (actual is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_states_move_between_forms_amid_a_chunk() -> None:
    inputs = draw(2, True)
    whole, last = call(inputs, chunk_size=8)
    for form in ("chunked", "scan", "recurrent"):
        first = {n: t[:, :, :13] if t.dim() >= 3 and t.shape[2] == 21 else t for n, t in inputs.items()}
        rest = {n: t[:, :, 13:] if t.dim() >= 3 and t.shape[2] == 21 else t for n, t in inputs.items()}
        begun, state = call(first, chunk_size=8, backend="chunked")
        assert state.filled == 5
        ended, state = call(rest, chunk_size=8, backend=form, state=state.detach())
        torch.testing.assert_close(torch.cat((begun, ended), 2), whole, rtol=0, atol=1e-13)
        torch.testing.assert_close(state.weights, last.weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_activations(activation: str) -> None:
    function, slope = ACTIVATIONS[activation]
    z = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(function(z).sum(), z)
    torch.testing.assert_close(slope(z), expected, rtol=0, atol=1e-13)


def test_closed_gates_give_numbers() -> None:
    inputs = draw(2, True)
    inputs["alpha"][..., 3] = 1
    inputs["eta"][..., 3] = 0
    out, state = call(inputs, chunk_size=8)
    torch.testing.assert_close(out, call(inputs, chunk_size=8, backend="recurrent")[0], rtol=0, atol=1e-12)
    assert bool(torch.isfinite(torch.stack([w.sum() for w in state.weights])).all())


def test_the_plainest_memory_is_the_delta_rule() -> None:
    inputs = draw(1, False, grad=True)
    results = []
    for form in (None, "recurrent"):
        out, state = call(inputs, chunk_size=1, momentum=False, decay=False, backend=form)
        used = [inputs[name] for name in ("w0", "query", "key", "value", "theta")]
        results.append((out, state.weights[0], *torch.autograd.grad(out.square().sum(), used)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_half_precision_keeps_its_state_in_float32() -> None:
    fine = draw(2, True)
    coarse = {n: t.bfloat16() for n, t in fine.items()}
    out, state = call(coarse, chunk_size=8)
    assert out.dtype == torch.bfloat16 and state.weights[0].dtype == torch.float32
    exact, _ = call({n: t.double() for n, t in coarse.items()}, chunk_size=8)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)


def test_bad_input_is_refused() -> None:
    inputs = draw(1, False)
    with pytest.raises(OptionError, match="read one of"):
        call(inputs, read="never")
    with pytest.raises(OptionError, match="chunk_size"):
        call(inputs, chunk_size=0)
    with pytest.raises(ShapeError, match="log_keep"):
        call({**inputs, "alpha": inputs["alpha"][..., :4]})
    with pytest.raises(ShapeError, match="do not take keys"):
        call({**inputs, "key": inputs["key"][..., :4], "query": inputs["query"][..., :4]})
    plain = MemoryState.start((inputs["w0"],), 2, momentum=False)
    with pytest.raises(OptionError, match="log_momentum"):
        call(inputs, state=plain)
    _, begun = call(inputs, chunk_size=64)
    with pytest.raises(OptionError, match="cannot go on"):
        call(inputs, chunk_size=16, state=begun)
