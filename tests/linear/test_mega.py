from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.layers.attention_functions import laplace, relu2
from regard.layers.position_bias import RotaryPositionBias
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.linear.mega import MegaBlock, MegaLayer, MegaState
from regard.masks import KeyPadding
from regard.models.mega import MegaLM

DIM, LENGTH = 6, 23


def build(seed: int = 0, **options: Any) -> MegaLayer:
    """A small layer in float64 whose parameters are all generic and not small."""
    torch.manual_seed(seed)
    layer = MegaLayer(DIM, **{"z_dim": 4, "hidden_dim": 5, "ema_dim": 3, "max_length": 64, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer.eval()


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def same(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def by_hand(layer: MegaLayer, x: Tensor, causal: bool) -> Tensor:
    """The layer for one sequence ``(length, dim)``, pair by pair, from the formulas."""
    length, size = len(x), layer.chunk_size or len(x)
    norm = layer.norm
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    n = (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    silu = lambda t: t / (1 + torch.exp(-t))  # noqa: E731
    ema = layer.ema
    p, r = ema.alpha.sigmoid(), ema.delta.sigmoid()
    s, rows = torch.zeros_like(p), []
    for t in range(length):
        s = p * ema.beta * n[t][:, None] + (1 - p * r) * s
        rows.append((ema.gamma * s).sum(-1) / math.sqrt(p.shape[1]) + ema.omega * n[t])
    m = silu(torch.stack(rows)) @ layer.mix.weight.T + layer.mix.bias
    u, z, gate, content = m.split([DIM, layer.z_dim, layer.hidden_dim, DIM], -1)
    z = silu(z)
    q, k = z * layer.gain[0] + layer.shift[0], z * layer.gain[1] + layer.shift[1]
    v = silu(n @ layer.value.weight.T + layer.value.bias)
    read = []
    for i in range(length):
        start = i // size * size
        seen = range(start, i + 1 if causal else min(start + size, length))
        bias = torch.stack([position(layer, i - j) for j in seen])
        products = torch.stack([q[i] @ k[j] for j in seen])
        if layer.attention == "softmax":
            weights = torch.exp(products / math.sqrt(layer.z_dim) + bias)
            weights = weights / weights.sum()
        else:
            scores = products / len(seen) + bias
            if layer.attention == "relu2":
                weights = torch.where(scores > 0, scores, 0.0) ** 2
            else:
                mu, sigma = torch.tensor((1 / 2, 1 / (4 * math.pi)), dtype=torch.float64).sqrt()
                weights = torch.distributions.Normal(mu, sigma).cdf(scores)
        read.append(sum(w * v[j] for w, j in zip(weights, seen, strict=True)))
    h = silu(content + (silu(gate) * torch.stack(read)) @ layer.out.weight.T + layer.out.bias)
    return x + torch.sigmoid(u) * (h - x)


def position(layer: MegaLayer, offset: int) -> Tensor:
    """The bias of a query that stands ``offset`` after its key."""
    bias = layer.position
    if not isinstance(bias, RotaryPositionBias):
        return bias.table[offset + bias.window[0] - 1, 0]
    cos, sin = rotary_angles(2, layer.z_dim, start=0, step=max(abs(offset), 1), dtype=torch.float64)
    query, key = (offset > 0, offset < 0)
    a = apply_rotary(bias.first, cos[int(query)], sin[int(query)])
    b = apply_rotary(bias.second, cos[int(key)], sin[int(key)])
    return a @ b


CASES = [
    *itertools.product(("softmax", "relu2", "laplace"), ("simple", "rotary"), (None, 5), (True, False)),
    ("softmax", "simple", 1, True),
]


@pytest.mark.paper("mega")
@pytest.mark.parametrize(("attention", "rel_pos", "chunk", "causal"), CASES)
def test_the_layer_is_its_formulas(attention: str, rel_pos: str, chunk: int | None, causal: bool) -> None:
    layer, x = build(attention=attention, rel_pos=rel_pos, chunk_size=chunk), tokens(13)
    with torch.no_grad():
        out = layer(x, causal=causal)
        for row in range(2):
            same(out[row], by_hand(layer, x[row], causal))


@pytest.mark.paper("mega")
@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("rel_pos", ["simple", "rotary"])
@pytest.mark.parametrize("chunk", [None, 5, 64])
def test_step_by_step_is_the_full_pass(attention: str, rel_pos: str, chunk: int | None) -> None:
    layer, x = build(attention=attention, rel_pos=rel_pos, chunk_size=chunk), tokens()
    with torch.no_grad():
        whole = layer(x, causal=True)
        for sizes in ([1] * LENGTH, [7, 1, 2, 13], [3, 20], [5, 10, 8], [LENGTH]):
            state, outs = layer.init_state(2, like=x), []
            for part in x.split(sizes, 1):
                out, state = layer.step(part, state)
                outs.append(out)
                assert chunk is None or state.key.shape[1] == state.value.shape[1] < chunk
            same(torch.cat(outs, 1), whole)


@pytest.mark.paper("mega")
def test_the_state_of_chunks_does_not_grow() -> None:
    layer = build(chunk_size=8)
    state, sizes = layer.init_state(1, like=tokens(1, 1)), []
    with torch.no_grad():
        for token in tokens(64, 1).split(1, 1):
            _, state = layer.step(token, state)
            sizes.append(sum(t.untyped_storage().nbytes() for t in (state.moving, state.key, state.value)))
    assert sizes[:8] == sizes[8:16] == sizes[56:]
    assert max(sizes) == 8 * (DIM * 3 + 7 * (4 + 5))  # the last token of a chunk leaves nothing behind


@pytest.mark.paper("mega")
def test_a_saved_state_resumes() -> None:
    layer, x = build(chunk_size=5), tokens()
    with torch.no_grad():
        whole = layer(x, causal=True)
        _, state = layer.step(x[:, :12], layer.init_state(2, like=x))
        kept = MegaState(*(t.clone() for t in (state.moving, state.key, state.value)))
        layer.step(x[:, :9], state)  # another future of the same state leaves it as it is
        out, _ = layer.step(x[:, 12:], kept)
    same(out, whole[:, 12:])
    same(state.key, kept.key, 0.0)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["softmax", "laplace"])
def test_one_chunk_is_full_attention(attention: str, causal: bool) -> None:
    full, x = build(attention=attention), tokens()
    for chunk in (LENGTH, 40, 64):
        chunked = build(attention=attention, chunk_size=chunk, rel_pos="rotary")
        whole = build(attention=attention, rel_pos="rotary")
        same(chunked(x, causal=causal), whole(x, causal=causal), 0.0)
    # A table of other reach: the same numbers around offset zero.
    chunked = build(attention=attention, chunk_size=LENGTH)
    with torch.no_grad():
        chunked.load_state_dict({**full.state_dict(), "position.table": full.position.table[64 - LENGTH : 63 + LENGTH]})
    same(chunked(x, causal=causal), full(x, causal=causal))


@pytest.mark.paper("mega")
@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("causal", [True, False])
def test_only_the_average_crosses_chunks(attention: str, causal: bool) -> None:
    """Without the average a chunk's output has no gradient to earlier chunks; with it there is one."""
    for ema_dim, crosses in ((0, False), (3, True)):
        layer = build(attention=attention, chunk_size=8, ema_dim=ema_dim)
        x = tokens().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x, causal=causal)[:, 16:].square().sum(), x)
        assert bool((grad[:, :16] != 0).any()) == crosses
        assert bool((grad[:, 16:] != 0).all(-1).any(-1).all())


@pytest.mark.paper("mega")
def test_attention_itself_stays_inside_chunks() -> None:
    layer = build(chunk_size=8)
    query, key, value = (torch.randn(2, LENGTH, size, dtype=torch.float64) for size in (4, 4, 5))
    key.requires_grad_(), value.requires_grad_()
    for causal in (True, False):
        out = layer.attend(query, key, value, causal=causal)
        for grad in torch.autograd.grad(out[:, 8:16].square().sum(), (key, value)):
            assert not bool(grad[:, :8].any()) and not bool(grad[:, 16:].any())
            assert bool(grad[:, 8:16].any())


@pytest.mark.paper("mega")
@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("chunk", [None, 6])
def test_the_future_changes_nothing(attention: str, chunk: int | None) -> None:
    layer, x = build(attention=attention, chunk_size=chunk), tokens()
    before = layer(x, causal=True)
    for cut in (1, 6, 9, 22):
        other = torch.cat((x[:, :cut], 5 * tokens()[:, cut:] + 2), 1)
        after = layer(other, causal=True)
        same(after[:, :cut], before[:, :cut])
        assert float((after - before)[:, cut:].detach().abs().max()) > 0.01


@pytest.mark.paper("mega")
@pytest.mark.parametrize("causal", [True, False])
def test_an_update_gate_of_zero_leaves_the_input(causal: bool) -> None:
    layer, x = build(), tokens()
    with torch.no_grad():
        layer.mix.bias[:DIM] = -math.inf
        assert torch.equal(layer(x, causal=causal), x)
        layer.mix.bias[:DIM] = math.inf  # and one of one leaves nothing of it but what the rest makes of it
        content = layer.mix(torch.nn.functional.silu(layer.ema(layer.norm(x))[0]))[..., -DIM:]
        layer.out.weight.zero_()
        same(layer(x, causal=causal), torch.nn.functional.silu(content + layer.out.bias))


@pytest.mark.paper("mega")
def test_a_reset_gate_of_zero_removes_attention() -> None:
    layer, x = build(), tokens()
    with torch.no_grad():
        rows = slice(DIM + 4, DIM + 9)
        layer.mix.weight[rows], layer.mix.bias[rows] = 0, 0
        out = layer(x, causal=True)
        mixed = layer.mix(torch.nn.functional.silu(layer.ema(layer.norm(x))[0]))
        hidden = torch.nn.functional.silu(mixed[..., -DIM:] + layer.out.bias)
        same(out, x + mixed[..., :DIM].sigmoid() * (hidden - x))
        for parameter in (layer.value.weight, layer.gain, layer.shift, layer.position.table):
            parameter.normal_()
        assert torch.equal(layer(x, causal=True), out)


@pytest.mark.paper("mega")
def test_laplace_meets_squared_relu_in_value_and_slope() -> None:
    x = torch.tensor(math.sqrt(1 / 2), dtype=torch.float64, requires_grad=True)
    for function in (laplace, relu2):
        value = function(x)
        (slope,) = torch.autograd.grad(value, x)
        same(value.detach(), torch.tensor(0.5, dtype=torch.float64), 1e-15)
        same(slope, torch.tensor(math.sqrt(2), dtype=torch.float64), 1e-15)
    grid = torch.linspace(-4, 4, 101, dtype=torch.float64)
    normal = torch.distributions.Normal(*torch.tensor((0.3, 0.7), dtype=torch.float64))
    same(laplace(grid, 0.3, 0.7), normal.cdf(grid), 1e-15)
    assert float(laplace(grid).max()) <= 1 and float(laplace(grid).min()) >= 0
    same(relu2(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([0.0, 0.0, 9.0]))


@pytest.mark.paper("mega")
@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_padding_is_as_if_it_were_not_there(attention: str, chunk: int | None, bidirectional: bool) -> None:
    layer, x = build(attention=attention, chunk_size=chunk, bidirectional=bidirectional), tokens()
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[1, 14:] = False
    out, alone = layer(x, mask=KeyPadding(keys)), layer(x[1:, :14])
    same(out[1:, :14], alone)
    same(out[:1], layer(x[:1]))


@pytest.mark.paper("mega")
def test_both_directions_for_encoders() -> None:
    layer, x = build(bidirectional=True, chunk_size=6), tokens()
    assert layer.ema.alpha.shape == (2 * DIM, 3)
    changed = (layer(torch.cat((x[:, :-1], tokens(1)), 1)) - layer(x)).detach()
    assert float(changed[:, 0].abs().max()) > 0  # the future reaches the first chunk, through the average
    for call in (lambda: layer(x, causal=True), lambda: layer.step(x, layer.init_state(2, like=x))):
        with pytest.raises(UnsupportedPatternError, match="runs both ways"):
            call()
    official = build(bidirectional=True, chunk_size=6, official=True)
    assert float((official(x) - layer(x)).detach().abs().max()) > 1e-3


@pytest.mark.paper("mega")
def test_postnorm_and_initial_values() -> None:
    layer, x = build(prenorm=False), tokens()
    out = layer(x, causal=True)
    inner = (out - layer.norm.bias) / layer.norm.weight
    same(inner.mean(-1), torch.zeros(2, LENGTH, dtype=torch.float64))
    same(inner.square().mean(-1), torch.ones(2, LENGTH, dtype=torch.float64), 1e-3)
    fresh = MegaLayer(256)
    assert (fresh.z_dim, fresh.hidden_dim, fresh.ema.ema_dim) == (64, 512, 16)
    for weight in (fresh.value.weight, fresh.mix.weight, fresh.out.weight, fresh.gain, fresh.position.table):
        assert abs(float(weight.detach().std()) / 0.02 - 1) < 0.2
    for bias in (fresh.value.bias, fresh.mix.bias, fresh.out.bias, fresh.shift):
        assert not bool(bias.any())


@pytest.mark.paper("mega")
def test_dropout_of_each_kind() -> None:
    x = tokens()
    plain = build()(x)
    for name in ("dropout", "attention_dropout", "hidden_dropout"):
        layer = build(**{name: 0.5})
        assert torch.equal(layer(x), plain)
        layer.train()
        assert not torch.equal(layer(x), layer(x)), name
    never = build(attention_dropout=1.0).train()
    gone = build()
    with torch.no_grad():
        gone.value.weight.zero_(), gone.value.bias.zero_()
    same(never(x), gone(x))  # with no weights left it reads what it would read of zeros


@pytest.mark.paper("mega")
def test_rotary_bias_is_the_product_of_rotated_vectors() -> None:
    bias = RotaryPositionBias(6, std=1.0).double()
    cos, sin = rotary_angles(9, 6, dtype=torch.float64)
    expected = apply_rotary(bias.first.expand(9, 6), cos, sin) @ apply_rotary(bias.second.expand(9, 6), cos, sin).T
    offsets = torch.arange(9)[:, None] - torch.arange(9)
    same(bias.at(offsets[..., None])[0], expected)


@pytest.mark.paper("mega")
def test_half_precision_decodes_as_it_reads() -> None:
    layer, x = build(chunk_size=8).bfloat16(), tokens().bfloat16()
    state, outs = layer.init_state(2, like=x), []
    with torch.no_grad():
        exact = build(chunk_size=8).bfloat16().double()(x.double(), causal=True)
        for token in x.split(1, 1):
            out, state = layer.step(token, state)
            outs.append(out)
    assert state.moving.dtype == torch.float32 and state.key.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(outs, 1).double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.paper("mega")
@pytest.mark.parametrize("prenorm", [True, False])
def test_a_block_is_a_layer_and_a_feed_forward(prenorm: bool) -> None:
    torch.manual_seed(0)
    block = MegaBlock(DIM, ffn_dim=7, chunk_size=5, prenorm=prenorm).double()
    x = tokens()
    mixed = block.layer(x, causal=True)
    first, _, _, second, _ = block.ffn.layers
    inside = torch.nn.functional.silu(first(block.ffn.norm(mixed) if prenorm else mixed))
    expected = mixed + second(inside)
    same(block(x, causal=True), expected if prenorm else block.ffn.norm(expected))
    assert first.out_features == 7 and MegaBlock(DIM).ffn.layers[0].out_features == 2 * DIM


@pytest.mark.paper("mega")
def test_a_language_model_reads_on() -> None:
    torch.manual_seed(0)
    model = MegaLM(11, 8, 2, chunk_size=5, rel_pos="rotary", attention="laplace").double()
    text = torch.randint(11, (2, 17))
    with torch.no_grad():
        whole = model(text)
        state, outs = model.init_state(2), []
        for part in text.split((9, 1, 1, 6), 1):
            logits, state = model.step(part, state)
            outs.append(logits)
    same(torch.cat(outs, 1), whole)
    other = text.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 11
    same(model(other)[:, :9], whole[:, :9])
    with pytest.raises(ShapeError, match="integers"):
        model(text.double())


def test_bad_input_is_explained() -> None:
    for options in ({"attention": "relu"}, {"rel_pos": "learned"}, {"chunk_size": 0}, {"ema_dim": -1}, {"z_dim": 0}):
        with pytest.raises(OptionError):
            MegaLayer(8, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="even"):
        MegaLayer(8, z_dim=3, rel_pos="rotary")
    layer = build()
    with pytest.raises(ShapeError, match="reaches 64 tokens"):
        layer(tokens(65))
    state = layer.init_state(2, like=tokens())
    _, state = layer.step(tokens(64), state)
    with pytest.raises(ShapeError, match="rotary"):
        layer.step(tokens(1), state)
