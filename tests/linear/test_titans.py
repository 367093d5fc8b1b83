from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.delta_rule import delta_rule
from regard.kernels.scan import linear_scan
from regard.linear.titans import NeuralMemory, linear_memory_update
from regard.linear.titans_layers import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from regard.masks import KeyPadding
from regard.mechanism import Layer
from regard.nn import MultiHeadAttention

LENGTH = 24


def draw(length: int = LENGTH, unit: bool = True) -> tuple[Tensor, ...]:
    """Key, value, theta, alpha, eta, memory of two sequences and three heads."""
    key, value = torch.randn(2, 3, length, 6).double(), torch.randn(2, 3, length, 4).double()
    gates = (rate * torch.rand(2, 3, length).double() for rate in (0.5, 0.3, 0.9))
    return F.normalize(key, dim=-1) if unit else key, value, *gates, torch.randn(2, 3, 6, 4).double()


def generic(module: Layer) -> Layer:
    """In float64 and with every parameter moved, so that no zero or one hides a branch."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


LAYERS: dict[str, Any] = {
    "memory": lambda: NeuralMemory(16, 2, chunk_size=8),
    "before": lambda: NeuralMemory(16, 2, chunk_size=8, read="before"),
    "chunk": lambda: NeuralMemory(16, 2, chunk_size=8, read="chunk"),
    "context": lambda: MemoryAsContext(16, 2, segment=8, persistent=3, memory={"chunk_size": 4}),
    "context_skip": lambda: MemoryAsContext(16, 2, segment=8, persistent=3, memory={"chunk_size": 4}, skip=True),
    "gate": lambda: MemoryAsGate(16, 2, window=5, persistent=3, memory={"chunk_size": 4}),
    "layer": lambda: MemoryAsLayer(16, 2, window=5, persistent=3, memory={"chunk_size": 4}),
}


@pytest.mark.paper("titans")
def test_without_momentum_token_by_token_it_is_the_delta_rule() -> None:
    key, value, theta, alpha, _, memory = draw()
    ours, momentum = linear_memory_update(key, value, theta, alpha, 0.0, memory, 1)
    expected, eye = memory, torch.eye(6, dtype=torch.float64)
    for t in range(LENGTH):
        outer = key[:, :, t, :, None] * key[:, :, t, None]
        keep = (1 - alpha[:, :, t])[..., None, None] * eye - 2 * theta[:, :, t, None, None] * outer
        write = 2 * theta[:, :, t, None, None] * key[:, :, t, :, None] * value[:, :, t, None]
        before, expected = expected, keep @ expected + write
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(momentum, expected - (1 - alpha[:, :, -1, None, None]) * before, rtol=0, atol=1e-14)


@pytest.mark.paper("titans")
def test_it_is_the_delta_rule_of_the_other_kernel() -> None:
    key, value, theta, alpha, _, _ = draw()
    _, state = delta_rule(key, key, value, 2 * theta)
    torch.testing.assert_close(linear_memory_update(key, value, theta, chunk_size=1)[0], state.sum, rtol=0, atol=1e-13)
    # With a decay the gated rule decays before it takes away, so that strength and value are measured against it.
    kept = 1 - alpha
    _, state = delta_rule(key, key, value * kept[..., None], 2 * theta / kept, log_decay=kept.log())
    ours, _ = linear_memory_update(key, value, theta, alpha, chunk_size=1)
    torch.testing.assert_close(ours, state.sum, rtol=0, atol=1e-13)


@pytest.mark.paper("titans")
def test_without_steps_the_memory_decays() -> None:
    key, value, _, alpha, eta, memory = draw()
    for chunk in (1, 8, 64):
        left, momentum = linear_memory_update(key, value, 0.0, alpha, eta, memory, chunk)
        torch.testing.assert_close(left, memory * (1 - alpha).prod(-1)[..., None, None], rtol=0, atol=1e-14)
        assert not bool(momentum.any())


@pytest.mark.paper("titans")
@pytest.mark.parametrize("chunk", [1, 4, 8, LENGTH])
def test_closed_form_is_sequential_updates_with_frozen_gradients(chunk: int) -> None:
    key, value, theta, alpha, eta, memory = draw()
    surprise, now, frozen = torch.zeros_like(memory), memory, memory
    for t in range(LENGTH):
        frozen = now if t % chunk == 0 else frozen
        k, v = key[:, :, t, :, None], value[:, :, t, None]
        gradient = 2 * k * (k.transpose(-1, -2) @ frozen - v)
        surprise = eta[:, :, t, None, None] * surprise - theta[:, :, t, None, None] * gradient
        now = (1 - alpha)[:, :, t, None, None] * now + surprise
    ours = linear_memory_update(key, value, theta, alpha, eta, memory, chunk)
    torch.testing.assert_close(ours, (now, surprise), rtol=0, atol=1e-13)


@pytest.mark.paper("titans")
def test_one_chunk_is_two_scans_and_the_sum_of_the_paper() -> None:
    key, value, theta, alpha, eta, memory = draw()
    gradient = 2 * key[..., :, None] * (key @ memory - value)[..., None, :]
    moved = linear_scan(
        eta.log().transpose(1, 2)[..., None, None], (-theta[..., None, None] * gradient).transpose(1, 2)
    )
    states = linear_scan((1 - alpha).log().transpose(1, 2)[..., None, None], moved, memory)
    ours, _ = linear_memory_update(key, value, theta, alpha, eta, memory, LENGTH)
    torch.testing.assert_close(ours, states[:, -1], rtol=0, atol=1e-13)
    # Without momentum: M_t = beta_t M_0 - sum_i theta_i (beta_t / beta_i) grad_i.
    beta = (1 - alpha).cumprod(-1)
    share = (theta * beta[..., -1:] / beta)[..., None, None]
    expected = beta[..., -1, None, None] * memory - (share * gradient).sum(2)
    ours, _ = linear_memory_update(key, value, theta, alpha, 0.0, memory, LENGTH)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


@pytest.mark.paper("titans")
def test_one_stored_key_gives_back_its_value() -> None:
    key, value, *_ = draw(1)
    for chunk in (1, 16):
        memory, _ = linear_memory_update(key, value, 0.5, chunk_size=chunk)
        torch.testing.assert_close(key @ memory, value, rtol=0, atol=1e-15)
    # Orthogonal keys do not disturb each other, and a key that comes again replaces its value.
    keys = torch.eye(6, dtype=torch.float64).repeat(2, 3, 2, 1)
    values = torch.randn(2, 3, 12, 4).double()
    memory, _ = linear_memory_update(keys, values, 0.5, chunk_size=1)
    torch.testing.assert_close(keys[:, :, :6] @ memory, values[:, :, 6:], rtol=0, atol=1e-15)


def test_gradients_of_closed_gates_are_numbers() -> None:
    inputs = [t.requires_grad_() for t in draw()]
    key, value, theta, alpha, eta, memory = inputs
    gates = (theta, alpha.round(), eta * 0)
    sum(t.sum() for t in linear_memory_update(key, value, *gates, memory, 8)).backward()  # type: ignore[union-attr]
    assert all(t.grad is None or bool(torch.isfinite(t.grad).all()) for t in inputs)


@pytest.mark.paper("titans")
def test_layer_is_its_formula() -> None:
    """Projections, convolutions, gates and read-out of the whole layer, by the definition and torch's autograd."""
    layer = generic(NeuralMemory(8, 2, depth=2, chunk_size=4, hidden_mult=2, max_rate=0.7))
    assert isinstance(layer, NeuralMemory) and layer.gain is not None and layer.shift is not None
    x = torch.randn(1, 10, 8).double()

    def convolved(linear: torch.nn.Module, conv: Any) -> Tensor:
        rows = F.pad(linear(x).transpose(1, 2), (3, 0))
        kernel = conv.weight[:, None]
        return F.silu(F.conv1d(rows, kernel, conv.bias, groups=8)).transpose(1, 2)[0].unflatten(-1, (2, 4))

    query, key, value = (
        convolved(*pair)
        for pair in (
            (layer.query, layer.query_conv),
            (layer.key, layer.key_conv),
            (layer.value, layer.value_conv),
        )
    )
    query, key = (t / t.norm(dim=-1, keepdim=True) for t in (query, key))
    theta, alpha, eta = layer.gates(x)[0].sigmoid().unflatten(-1, (3, 2)).unbind(1)
    outs = torch.zeros(10, 2, 4, dtype=torch.float64)
    for head in range(2):
        gain, shift = layer.gain[head], layer.shift[head]

        def memory(weights: list[Tensor], row: Tensor, gain: Tensor = gain, shift: Tensor = shift) -> Tensor:
            return row + F.layer_norm(F.silu(row @ weights[0]) @ weights[1], (4,), gain, shift)

        weights = [w[head].detach() for w in layer.initial]
        momentum, frozen = [torch.zeros_like(w) for w in weights], weights
        for t in range(10):
            frozen = weights if t % 4 == 0 else frozen
            leaves = [w.clone().requires_grad_() for w in frozen]
            loss = (memory(leaves, key[t, head]) - value[t, head]).square().sum()
            grads = torch.autograd.grad(loss, leaves, retain_graph=True)
            momentum = [eta[t, head] * s - 0.7 * theta[t, head] * g for s, g in zip(momentum, grads, strict=True)]
            weights = [(1 - alpha[t, head]) * w + s for w, s in zip(weights, momentum, strict=True)]
            outs[t, head] = memory(weights, query[t, head])
    expected = layer.out(layer.norm(outs.flatten(1)) * F.silu(layer.gate(x[0])))
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.paper("titans")
@pytest.mark.parametrize("name", LAYERS)
def test_later_tokens_change_no_earlier_output(name: str) -> None:
    layer, x = generic(LAYERS[name]()), torch.randn(2, LENGTH, 16).double()
    before = layer(x)
    for cut in (1, 7, 8, 13):
        changed = x.clone()
        changed[:, cut:] = 3 * torch.randn(2, LENGTH - cut, 16).double()
        torch.testing.assert_close(layer(changed)[:, :cut], before[:, :cut], rtol=0, atol=1e-13)
    # ... while an early token reaches the last one, far outside of window and segment.
    x[:, 0] += 1
    assert float((layer(x)[:, -1] - before[:, -1]).detach().abs().max()) > 1e-7


@pytest.mark.paper("titans")
@pytest.mark.parametrize("pieces", [(8, 8, 8), (16, 8), (1,) * LENGTH, (3, 10, 11)])
@pytest.mark.parametrize("name", LAYERS)
def test_pieces_with_carried_state_are_one_pass(name: str, pieces: tuple[int, ...]) -> None:
    layer, x = generic(LAYERS[name]()), torch.randn(2, LENGTH, 16).double()
    state, outs = layer.init_state(2, like=x), []  # type: ignore[operator]
    for piece in x.split(pieces, 1):
        out, state = layer.step(piece, state)  # type: ignore[operator]
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), rtol=0, atol=1e-12)


@pytest.mark.paper("titans")
def test_store_and_retrieve() -> None:
    layer, x = generic(NeuralMemory(16, 2, chunk_size=8)), torch.randn(2, LENGTH, 16).double()
    assert isinstance(layer, NeuralMemory)
    state = layer.store(x[:, 8:16], layer.store(x[:, :8]))
    rest, after = layer.step(x[:, 16:], state)
    torch.testing.assert_close(rest, layer(x)[:, 16:], rtol=0, atol=1e-13)
    torch.testing.assert_close(layer(x[:, 16:], state=state), rest, rtol=0, atol=1e-15)
    torch.testing.assert_close(after.memory.weights, layer.store(x).memory.weights, rtol=0, atol=1e-13)
    # Reading writes nothing: what comes first is read with the weights that were stored.
    frozen = generic(NeuralMemory(16, 2, chunk_size=8, read="before"))
    assert isinstance(frozen, NeuralMemory)
    stored = frozen.store(x)
    alone = frozen.retrieve(x, stored)
    torch.testing.assert_close(frozen.retrieve(x, stored), alone, rtol=0, atol=0)
    unread = replace(stored, tails=frozen.init_state(2, like=x).tails)
    torch.testing.assert_close(frozen.step(x[:, :1], unread)[0], alone[:, :1], rtol=0, atol=1e-13)


@pytest.mark.paper("titans")
def test_gate_without_memory_and_tokens_is_window_attention() -> None:
    layer = MemoryAsGate(16, 2, window=5, persistent=0, memory=False).double()
    host = MultiHeadAttention(16, 2, "sliding_window", window=5, sinks=0, bias=False, rotary=True).double()
    host.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "persistent"})
    x = torch.randn(2, LENGTH, 16).double()
    torch.testing.assert_close(layer(x), host(x, causal=True), rtol=0, atol=1e-13)


@pytest.mark.paper("titans")
@pytest.mark.parametrize("name", ["context", "context_skip", "gate", "layer"])
def test_layers_with_attention_are_their_formulas(name: str) -> None:
    layer, x = generic(LAYERS[name]()), torch.randn(1, LENGTH, 16).double()
    memory: NeuralMemory = layer.memory  # type: ignore[assignment]
    prefix = layer.persistent[None]
    front = prefix.shape[1]

    def turned(rows: Tensor, places: Tensor) -> Tensor:
        rates = 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
        angle = places[:, None] * rates
        first, second = rows.unflatten(-1, (2, 2, 4)).unbind(-2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def attend(queries: Tensor, at: Tensor, source: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        query, key = turned(layer.query(queries), at), turned(layer.key(source), places)  # type: ignore[operator]
        value = layer.value(source).unflatten(-1, (2, 8))  # type: ignore[operator]
        scores = torch.einsum("qhd,khd->hqk", query, key) * 8**-0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return layer.out(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))  # type: ignore[operator]

    def gated(y: Tensor, m: Tensor) -> Tensor:
        gate = layer.gate
        left = F.rms_norm(y, (16,), gate.norm.weight, 1e-6)  # type: ignore[union-attr]
        return left * F.rms_norm(m, (16,), gate.memory_norm.weight, 1e-6).sigmoid()  # type: ignore[union-attr]

    whole = torch.cat((prefix, x), 1)
    place = torch.arange(whole.shape[1])
    near = (place[front:, None] >= place) & (place[front:, None] - place < 5)
    if name == "gate":
        seen = near | (place < front)
        expected = gated(attend(x[0], place[front:], whole[0], place, seen), memory(whole)[0, front:])
    elif name == "layer":
        read = memory(whole)[0]
        expected = attend(read[front:], place[front:], read, place, near)
    else:
        state, parts = memory.init_state(1, like=x), []
        for start in range(0, LENGTH, 8):
            segment = x[:, start : start + 8]
            # The query's convolution sees the three inputs before the segment.
            recent = x[:, max(start - 3, 0) : start + 8]
            known = memory.retrieve(recent, state)[:, -8:]
            source = torch.cat((prefix, known, segment), 1)[0]
            places = torch.cat((torch.arange(3), torch.arange(3, 11), torch.arange(3, 11)))
            past = torch.ones(8, 8, dtype=torch.bool).tril()
            seen = torch.cat((torch.ones(8, 3, dtype=torch.bool), past, past), 1)
            y = attend(segment[0], torch.arange(3, 11), source, places, seen)
            y = segment[0] + y if name == "context_skip" else y
            read, state = memory.step(y[None], state)
            parts.append(gated(y, read[0]))
        expected = torch.cat(parts)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["context", "gate", "layer"])
def test_persistent_tokens_matter_and_learn(name: str) -> None:
    layer, x = generic(LAYERS[name]()), torch.randn(1, LENGTH, 16).double()
    (grad,) = torch.autograd.grad(layer(x)[:, -1].square().sum(), [layer.persistent])  # type: ignore[list-item]
    assert bool((grad.abs().amax(-1) > 0).all())


def test_hidden_tokens_write_and_forget_nothing() -> None:
    x, seen = torch.randn(1, LENGTH, 16).double(), torch.ones(1, LENGTH, dtype=torch.bool)
    seen[:, 8:16] = False
    layer = generic(NeuralMemory(16, 2, chunk_size=4))
    out = layer(x, mask=KeyPadding(seen))
    torch.testing.assert_close(out[:, :8], layer(x[:, :8]), rtol=0, atol=1e-13)
    # Two whole chunks are hidden: without momentum and convolutions, what follows is as if they were not there.
    layer = generic(NeuralMemory(16, 2, chunk_size=4, momentum=False, conv_size=1))
    out, shown = layer(x, mask=KeyPadding(seen)), torch.cat((x[:, :8], x[:, 16:]), 1)
    torch.testing.assert_close(out[:, 16:], layer(shown)[:, 8:], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "multiple"),
        ({"depth": 0}, "depth"),
        ({"max_rate": 0.0}, "max_rate"),
        ({"activation": "tanh"}, "activation"),
        ({"read": "twice"}, "read"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        NeuralMemory(16, **options)


def test_bad_input_is_refused() -> None:
    key, value, theta, *_ = draw()
    with pytest.raises(OptionError, match="alpha"):
        linear_memory_update(key, value, theta, 1.5)
    with pytest.raises(OptionError, match="theta"):
        linear_memory_update(key, value, -theta)
    with pytest.raises(ShapeError, match="memory"):
        linear_memory_update(key, value, theta, memory=torch.zeros(2, 3, 4, 4))
    with pytest.raises(ShapeError, match="NeuralMemory takes"):
        NeuralMemory(16)(torch.zeros(2, 16))
    with pytest.raises(ShapeError, match="MemoryAsGate takes"):
        MemoryAsGate(16, 2)(torch.zeros(2, 3, 8))
    for layer in (MemoryAsGate, MemoryAsLayer):
        with pytest.raises(OptionError, match="window"):
            layer(16, 2, window=0)
    with pytest.raises(OptionError, match="segment"):
        MemoryAsContext(16, 2, segment=0)
    with pytest.raises(OptionError, match="persistent"):
        MemoryAsContext(16, 2, persistent=-1)
