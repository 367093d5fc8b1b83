"""The affine map of a network against its formula written out, its own output, its Jacobian, and rollout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.projections import head_projections
from regard.inspect.saliency import gradient_saliency
from regard.inspect.tensorlens import (
    TensorLens,
    attention_norm_rollout,
    attention_rollout,
    grad_x_input,
    mean_attention,
    rollout,
)
from regard.models.sequence import SequenceModel
from regard.nn import MultiHeadAttention, TransformerBlock
from regard.retrofit.sites import discover
from tests.retrofit.small_models import FAMILIES, gpt2, inputs_of, llama, output_of, t5, tokens

WHOLE = ("gpt2", "llama", "bert", "vit")


class Stack(nn.Module):
    """Blocks in a row, on states ``(1, tokens, dim)``."""

    def __init__(self, *blocks: nn.Module, **call: Any) -> None:
        super().__init__()
        self.blocks, self.call = nn.ModuleList(blocks), call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **self.call)
        return x


class Residual(nn.Module):
    """``x + attention(x)`` alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        return x + self.attention(x, **call)


class Tail(nn.Module):
    """Attention, then something else."""

    def __init__(self, then: nn.Module) -> None:
        super().__init__()
        self.attention, self.then = MultiHeadAttention(8, 2), then

    def forward(self, x: Tensor) -> Tensor:
        return x + self.then(x + self.attention(x))


def small(depth: int = 2, dim: int = 8, heads: int = 2, causal: bool = True) -> tuple[Stack, Tensor]:
    blocks = [TransformerBlock(dim, MultiHeadAttention(dim, heads)) for _ in range(depth)]
    model = Stack(*blocks, causal=causal).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model, torch.randn(1, 5, dim, dtype=torch.float64)


def one_of(family: str) -> tuple[Any, dict[str, Tensor]]:
    model = FAMILIES[family]()
    return model, {name: tensor[:1] for name, tensor in inputs_of(model).items()}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("family", WHOLE)
def test_map_gives_the_models_output(family: str, closed: bool) -> None:
    model, inputs = one_of(family)
    before = output_of(model, **inputs)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    hooked = hooks(model)
    with TensorLens(model, closed) as lens:
        seen = lens(**inputs)
        found = seen.logits if "logits" in seen else seen.last_hidden_state
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)
        assert torch.equal(lens.x, hidden[0][0])
        out = lens.apply(lens.x)
        if closed:
            torch.testing.assert_close(out, before[0], rtol=1e-5, atol=1e-5)
        elif family == "bert":  # transformers norms the last hidden state of the others
            torch.testing.assert_close(out, hidden[-1][0], rtol=1e-5, atol=1e-5)
        # The map is affine, not only right at one point.
        other = torch.randn_like(lens.x)
        middle = lens.apply((lens.x + other) / 2)
        torch.testing.assert_close(middle, (out + lens.apply(other)) / 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(output_of(model, **inputs), before)
    assert hooks(model) == hooked


@pytest.mark.paper("tensorlens")
def test_whole_tensor_times_input_plus_bias_in_float64() -> None:
    model, x = small()
    with TensorLens(model) as lens:
        out = lens(x)[0]
        torch.testing.assert_close(
            torch.einsum("iajb,jb->ia", lens.dense(), x[0]) + lens.bias(), out, rtol=1e-12, atol=1e-12
        )


def norm_tensor(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``(tokens, dim, dim)``: ``diag(gamma) / sigma_i (I - 11^T / D)``."""
    dim = x.shape[-1]
    sigma = (x.var(-1, unbiased=False) + norm.eps).sqrt()
    centre = torch.eye(dim, dtype=x.dtype) - 1 / dim
    return norm.weight[:, None] * centre / sigma[:, None, None]


@pytest.mark.paper("tensorlens")
def test_pre_norm_block_is_the_formula() -> None:
    model, x = small(depth=1)
    block: Any = model.blocks[0]
    state, (tokens_, dim) = x[0], x[0].shape
    attention = block.attention
    normed = block.attention_norm(state)
    q, k = (linear(normed).unflatten(-1, (2, 4)).transpose(0, 1) for linear in (attention.query, attention.key))
    future = torch.ones(tokens_, tokens_).triu(1).bool()
    weights = (q @ k.mT / 2).masked_fill(future, -torch.inf).softmax(-1)
    first = torch.zeros(tokens_, dim, tokens_, dim, dtype=x.dtype)
    for h in range(2):
        rows = slice(4 * h, 4 * h + 4)
        ov = attention.out.weight[:, rows] @ attention.value.weight[rows]
        first += torch.einsum("ij,ab->iajb", weights[h], ov)
    first = torch.einsum("iajb,jbc->iajc", first, norm_tensor(state, block.attention_norm))
    identity = torch.einsum("ij,ab->iajb", torch.eye(tokens_, dtype=x.dtype), torch.eye(dim, dtype=x.dtype))
    first = first + identity
    middle = block.attend(x, causal=True)[0]
    up, _, down = block.mlp
    u = up(block.mlp_norm(middle))
    ffn = torch.einsum("ah,ih,hb->iab", down.weight, F.gelu(u) / u, up.weight) @ norm_tensor(middle, block.mlp_norm)
    second = identity + torch.einsum("ij,iab->iajb", torch.eye(tokens_, dtype=x.dtype), ffn)
    expected = torch.einsum("iajb,jbkc->iakc", second, first)
    with TensorLens(model) as lens:
        lens(x)
        torch.testing.assert_close(lens.dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("tensorlens")
def test_gated_block_takes_the_gate_as_coefficient() -> None:
    model, inputs = one_of("llama")
    model = model.double()
    layer = model.model.layers[0]
    with TensorLens(model) as lens:
        lens(**inputs)
        x, brought = lens.x, lens.contributions(0)
        middle = x + brought.sum(1)
        scale = (middle.square().mean(-1, keepdim=True) + layer.post_attention_layernorm.variance_epsilon).rsqrt()
        normed = middle * scale
        gate = F.silu(layer.mlp.gate_proj(normed))
        down, up = layer.mlp.down_proj.weight, layer.mlp.up_proj.weight
        ffn = torch.einsum("ah,ih,hb,ib->iab", down, gate, up, scale.expand_as(x))
        # Token 0 sees itself alone, so its tensor is a product of matrices.
        rms = (x[0].square().mean() + layer.input_layernorm.variance_epsilon).rsqrt()
        attention = layer.self_attn
        value = attention.v_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
        eye = torch.eye(32, dtype=x.dtype)
        expected = (eye + ffn[0]) @ (eye + rms * attention.o_proj.weight @ value)
        found = torch.stack([lens.layer(0).row(0, v)[0] for v in eye])
        # Llama's norm computes in float32, whatever it is given.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(lens.layer(0).bias(), torch.zeros_like(x))


@pytest.mark.paper("tensorlens")
def test_activation_at_zero_takes_its_slope() -> None:
    model, x = small(depth=1)
    block: Any = model.blocks[0]
    for parameter in (block.attention.out.weight, block.attention.out.bias, block.mlp_norm.bias, block.mlp[0].bias):
        nn.init.zeros_(parameter)
    x[0, 0] = 3.0  # a constant token: its norm is zero, and so is what enters the activation
    with TensorLens(model) as lens:
        lens(x)
        found = lens.dense()[0, :, 0]
    ffn = 0.5 * block.mlp[2].weight @ block.mlp[0].weight @ norm_tensor(x[0], block.mlp_norm)[0]
    torch.testing.assert_close(found, torch.eye(8, dtype=x.dtype) + ffn, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.Tanh(), nn.Softplus(), nn.Sigmoid()])
def test_activations_of_torch(activation: nn.Module) -> None:
    layers = nn.Sequential(nn.Linear(8, 12), activation, nn.Linear(12, 8))
    model = Stack(Tail(layers), Tail(nn.LayerNorm(8))).double().eval()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    with TensorLens(model) as lens:
        out = lens(x)[0]
        assert torch.equal(out, model(x)[0])
        torch.testing.assert_close(torch.einsum("iajb,jb->ia", lens.dense(), x[0]) + lens.bias(), out)


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_encoders(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    given = x[None] if batch_first else x[:, None]
    with TensorLens(model) as lens:
        lens(given)
        out = model(given).reshape(5, 8)
        torch.testing.assert_close(torch.einsum("iajb,jb->ia", lens.dense(), x) + lens.bias(), out)


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_nothing_comes_from_the_future(family: str) -> None:
    model, inputs = one_of(family)
    with TensorLens(model) as lens:
        lens(**inputs)
        for i in (0, 3, 7):
            row = lens.row(i, torch.randn(32))
            assert bool((row[i + 1 :] == 0).all())
            assert bool((row[max(0, i - 5) : i + 1] != 0).any(-1).all())
        assert bool((lens.token_map("io").triu(1) == 0).all())


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("family", WHOLE)
def test_signed_relevance_is_complete(family: str) -> None:
    model, inputs = one_of(family)
    with TensorLens(model.double()) as lens:
        lens(**{name: t.double() if t.is_floating_point() else t for name, t in inputs.items()})
        moved = lens.out - lens.bias()
        v = torch.randn(32, dtype=torch.float64)
        torch.testing.assert_close(lens.token_map("direction", v).sum(-1), moved @ v)
        own = F.normalize(lens.out, dim=-1)
        torch.testing.assert_close(lens.token_map("io").sum(-1), (moved * own).sum(-1))


@pytest.mark.paper("tensorlens")
def test_attention_alone_with_identity_values_is_unnormalised_rollout() -> None:
    dim, heads = 6, 3
    model = Stack(*(Residual(MultiHeadAttention(dim, heads, head_dim=dim, bias=False)) for _ in range(3)), causal=True)
    for block in model.blocks:
        attention: Any = block.attention
        attention.value.weight.data = torch.eye(dim).repeat(heads, 1)
        attention.out.weight.data = torch.eye(dim).repeat(1, heads)
    model = model.double().eval()
    x = 2 * torch.randn(1, 7, dim, dtype=torch.float64)
    with TensorLens(model) as lens:
        lens(x)
        expected = torch.eye(7, dtype=torch.float64)
        for block in range(3):
            expected = (torch.eye(7, dtype=torch.float64) + lens.attention(block).sum(0)) @ expected
        torch.testing.assert_close(lens.token_map("fro"), expected * dim**0.5)
        maps = torch.stack([torch.eye(7) + lens.attention(block).sum(0) for block in range(3)])
        torch.testing.assert_close(rollout(maps), expected)


@pytest.mark.paper("tensorlens")
def test_ranges_of_blocks_contract() -> None:
    model, x = small(depth=3)
    with TensorLens(model) as lens:
        lens(x)
        early, late, whole = lens.range(0, 1), lens.range(1, 3), lens.range(0, 3)
        product = torch.einsum("iajb,jbkc->iakc", late.dense(), early.dense())
        torch.testing.assert_close(product, whole.dense(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(late.apply(early.bias()), whole.bias())
        torch.testing.assert_close(lens.layer(-1).apply(lens.entering(2)), lens.out)


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("family", WHOLE)
def test_is_not_the_jacobian_where_scores_depend_on_the_input(family: str) -> None:
    model, inputs = one_of(family)
    with TensorLens(model) as lens:
        lens(**inputs)
        v = torch.randn(32)
        held, true = lens.row(5, v), lens.jacobian().row(5, v)
    assert (held - true).norm() / true.norm() > 1e-2


@pytest.mark.paper("tensorlens")
def test_is_the_jacobian_where_nothing_depends_on_the_input() -> None:
    model = Stack(*(Residual(MultiHeadAttention(8, 2)) for _ in range(2)), causal=True).double().eval()
    for block in model.blocks:
        nn.init.zeros_(block.attention.query.weight)
        nn.init.zeros_(block.attention.query.bias)
    with TensorLens(model) as lens:
        lens(torch.randn(1, 5, 8, dtype=torch.float64))
        torch.testing.assert_close(lens.dense(), lens.jacobian().dense())


@pytest.mark.paper("tensorlens")
def test_jacobian_is_the_models_own() -> None:
    model, x = small()
    expected = torch.autograd.functional.jacobian(model, x)[0, :, :, 0]  # type: ignore[no-untyped-call]
    with TensorLens(model) as lens:
        lens(x)
        torch.testing.assert_close(lens.jacobian().dense(), expected)


@pytest.mark.paper("tensorlens")
def test_rows_and_maps_are_those_of_the_whole_tensor() -> None:
    model, x = small()
    with TensorLens(model) as lens:
        lens(x)
        whole, v = lens.dense(), torch.randn(5, 8, dtype=torch.float64)
        torch.testing.assert_close(lens.row(-2, v[3]), torch.einsum("a,ajb->jb", v[3], whole[3]))
        torch.testing.assert_close(lens.token_map("fro"), whole.square().sum((1, 3)).sqrt())
        signed = torch.einsum("ia,iajb,jb->ij", v, whole, x[0])
        torch.testing.assert_close(lens.token_map("direction", v), signed)
        torch.testing.assert_close(lens.token_map("direction", v, rows=[4, 0]), signed[[4, 0]])
        torch.testing.assert_close(lens.token_map(rows=[-1]), lens.token_map()[-1:])


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("mechanism", ["sliding_window", "l2vit", "lightning_attention"])
def test_other_mechanisms_by_their_implied_weights(mechanism: str) -> None:
    causal = mechanism != "l2vit"
    positions = "learned" if mechanism == "l2vit" else "rotary"
    options = {"window": 4} if mechanism == "sliding_window" else {}
    model = (
        SequenceModel(
            5,
            vocab_size=9,
            embed_dim=8,
            num_heads=2,
            mechanism=mechanism,
            options=options,
            causal=causal,
            positions=positions,
        )
        .double()
        .eval()
    )
    ids = torch.randint(9, (1, 7))
    with TensorLens(model, closed=True) as lens:
        lens(ids)
        found = torch.einsum("iajb,jb->ia", lens.dense(), lens.x) + lens.bias()
    torch.testing.assert_close(found, model(ids)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.paper("tensorlens")
def test_pooled_answers_have_one_row() -> None:
    model = SequenceModel(3, vocab_size=9, embed_dim=8, num_heads=2, pool="mean", causal=False).eval()
    ids = torch.randint(9, (1, 6))
    with TensorLens(model, closed=True) as lens:
        lens(ids)
        assert lens.whole.shape == (1, 3, 6, 8)
        torch.testing.assert_close(lens.apply(lens.x), model(ids))


# Baselines


@pytest.mark.paper("tensorlens")
def test_rollout_and_mean_of_eager_attention() -> None:
    model = gpt2("eager")
    ids = tokens(1, 9)
    maps = [layer[0].mean(0) for layer in model(ids, output_attentions=True).attentions]
    expected = torch.eye(9)
    for attention in maps:
        expected = (0.5 * attention + 0.5 * torch.eye(9)) @ expected
    with TensorLens(model) as lens:
        lens(ids)
        torch.testing.assert_close(attention_rollout(lens), expected)
        torch.testing.assert_close(mean_attention(lens), sum(maps) / len(maps))


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_contributions_are_what_attention_brings(family: str) -> None:
    model, inputs = one_of(family)
    seen = []
    places = {
        "gpt2": lambda: model.h[0].attn.c_proj if hasattr(model, "h") else model.transformer.h[0].attn.c_proj,
        "bert": lambda: model.encoder.layer[0].attention.output.dense,
        "llama": lambda: model.model.layers[0].self_attn.o_proj,
    }
    out = places[family]()
    handle = out.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with TensorLens(model) as lens:
        lens(**inputs)
        handle.remove()
        bias = 0 if getattr(out, "bias", None) is None else out.bias
        torch.testing.assert_close(lens.contributions(0).sum(1) + bias, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.paper("tensorlens")
def test_norm_rollout_step_by_step() -> None:
    model, x = small()
    with TensorLens(model) as lens:
        lens(x)
        expected = torch.eye(5, dtype=torch.float64)
        for block in range(2):
            brought, state = lens.contributions(block), lens.entering(block)
            step = torch.zeros(5, 5, dtype=torch.float64)
            for i in range(5):
                for j in range(5):
                    step[i, j] = (brought[i, j] + (state[i] if i == j else 0)).norm()
            expected = (step / step.sum(-1, keepdim=True)) @ expected
        torch.testing.assert_close(attention_norm_rollout(lens), expected)


@pytest.mark.paper("tensorlens")
def test_gradient_times_input_of_the_models_own_logits() -> None:
    model, ids = llama(), tokens(1, 8)
    embedded = model.get_input_embeddings()(ids)
    expected = gradient_saliency(lambda e: model(inputs_embeds=e).logits[:, -1, 7], embedded)
    v = F.one_hot(torch.tensor(7), 61).float()
    with TensorLens(model, closed=True) as lens:
        lens(ids)
        torch.testing.assert_close(grad_x_input(lens, v, rows=[-1]), expected, rtol=1e-3, atol=1e-4)
        assert grad_x_input(lens).shape == (8, 8)


# What it refuses


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.paper("tensorlens")
def test_refusals_say_what_to_try() -> None:
    model, x = small()
    lens = TensorLens(model)
    with pytest.raises(OptionError, match="inside `with"):
        lens(x)
    with lens:
        with pytest.raises(OptionError, match="Run the model first"):
            lens.bias()
        with pytest.raises(ShapeError, match="batch of one"):
            lens(torch.cat((x, x)))
        lens(x)
        with pytest.raises(OptionError, match="blocks 0 to 1"):
            lens.range(1, 3)
        with pytest.raises(OptionError, match="'fro', 'direction' or 'io'"):
            lens.token_map("sum")  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="goes with reduce='direction'"):
            lens.token_map("direction")
        with pytest.raises(ShapeError, match="direction is"):
            lens.row(0, torch.ones(3))
        with pytest.raises(ShapeError, match="enter here"):
            lens.apply(torch.ones(4, 8))
        with pytest.raises(OptionError, match="no 5"):
            lens.row(5, torch.ones(8))
    with pytest.raises(OptionError, match=r"model.eval\(\)"), TensorLens(model.train()) as other:
        other(x)
    with pytest.raises(RetrofitError, match="not affine"), TensorLens(Stack(Tail(Squares())).eval()) as other:
        other(torch.randn(1, 4, 8))
    encoder_decoder = t5()
    with pytest.raises(RetrofitError), TensorLens(encoder_decoder) as other:
        other(**{name: t[:1] for name, t in inputs_of(encoder_decoder).items()})
    long = Stack(TransformerBlock(8, MultiHeadAttention(8, 2))).eval()
    with TensorLens(long) as other:
        other(torch.randn(1, 513, 8))
        with pytest.raises(OptionError, match="never form it"):
            other.dense()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_heads_write_into_a_logit_is_their_output_through_projection_norm_and_unembedding(family: str) -> None:
    model = FAMILIES[family]("eager").eval()
    inputs = {"input_ids": tokens()[:1]}
    with torch.no_grad(), regard.capture(model) as trace:
        model(**inputs)
    final: list[Tensor] = []
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    hook = norm.register_forward_pre_hook(lambda module, args: final.append(args[0].detach()[0, -1]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    direction = torch.zeros(model.config.vocab_size)
    direction[3], direction[5] = 1, -1
    with TensorLens(model, closed=True) as lens:
        lens(**inputs)
        found = lens.head_attribution(direction)
        with pytest.raises(ShapeError, match="direction"):
            lens.head_attribution(direction[:-1])
    x = final[0]
    for place, (layer, site) in enumerate(zip(trace, discover(model), strict=True)):
        assert layer.head_outputs is not None
        output = head_projections(site).output
        for head in range(found.shape[1]):
            written = output[head] @ layer.head_outputs[0, head, -1]
            if family == "gpt2":
                scaled = (written - written.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight
            else:
                scaled = written / (x.square().mean() + norm.variance_epsilon).sqrt() * norm.weight
            meant = model.lm_head.weight[3] @ scaled - model.lm_head.weight[5] @ scaled
            torch.testing.assert_close(found[place, head], meant.detach(), atol=1e-5, rtol=1e-4)
