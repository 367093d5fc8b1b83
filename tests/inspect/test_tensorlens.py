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
from tests.retrofit.small_models import FAMILIES, gpt2, inputs_of, llama, output_of, t5, tokens, wide

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


def routed() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return MixtralForCausalLM(MixtralConfig(**size, num_attention_heads=4, num_key_value_heads=2)).eval()


class Probabilities(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x).softmax(-1)
        return found


@pytest.mark.paper("tensorlens")
def test_what_is_not_affine_is_refused() -> None:
    with pytest.raises(RetrofitError, match="routers"), TensorLens(routed()) as lens:
        lens(tokens(1, 6))
    # In half precision too, where rounding alone bends every map a little.
    for dtype in (torch.float64, torch.bfloat16):
        model = Stack(Tail(nn.Sequential(nn.Linear(8, 8), Squares()))).to(dtype).eval()
        with pytest.raises(RetrofitError, match="Block 0"), TensorLens(model) as lens:
            lens(torch.randn(1, 4, 8, dtype=dtype))
    plain = SequenceModel(9, vocab_size=9, embed_dim=8, num_heads=2)
    nn.init.normal_(plain.head.weight)
    model, ids = Probabilities(plain).eval(), torch.randint(9, (1, 5))
    with TensorLens(model) as lens:
        lens(ids)  # what follows the blocks is no part of this map
        with pytest.raises(RetrofitError, match="follows the blocks"):
            lens.head_attribution(torch.ones(9))
    with pytest.raises(RetrofitError, match="follows the blocks"), TensorLens(model, closed=True) as lens:
        lens(ids)
    with pytest.raises(OptionError, match="not finite"), TensorLens(Stack(Tail(nn.Identity())).eval()) as lens:
        lens(torch.full((1, 4, 8), torch.nan))


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model, inputs = one_of(family)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    with TensorLens(model.to(dtype), closed=True) as lens:
        lens(**inputs)
        out = output_of(model, **inputs)[0]
        torch.testing.assert_close(lens.apply(lens.x), out, rtol=0.0, atol=0.05 * float(out.abs().max()))
        assert lens.token_map("io").isfinite().all()


@pytest.mark.paper("tensorlens")
def test_a_map_of_an_earlier_input_does_not_take_the_later_coefficients() -> None:
    model, x = small()
    with TensorLens(model) as lens:
        lens(x)
        earlier, row = lens.layer(0), lens.row(2, torch.ones(8))
        lens(2 * x)
        torch.testing.assert_close(lens.layer(0).apply(2 * x[0]), model.blocks[0](2 * x, causal=True)[0])
        assert not torch.allclose(lens.row(2, torch.ones(8)), row)
        with pytest.raises(OptionError, match="another input"):
            earlier.apply(x[0])


# Heads and the answer


def through(norm: nn.Module, states: dict[nn.Module, Tensor], write: Tensor, gain: float = 0.0) -> Tensor:
    """A write ``(dim,)`` through a norm whose scale is held at the state that it saw."""
    x, weight = states[norm], norm.weight + gain  # type: ignore[operator]
    if isinstance(norm, nn.LayerNorm):
        return (write - write.mean()) / (x.var(correction=0) + norm.eps).sqrt() * weight
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
    return write / (x.square().mean() + eps).sqrt() * weight


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0}
    size = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return wide(Gemma2ForCausalLM(Gemma2Config(**size, **heads, attn_implementation="eager")))


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "residual_multiplier": 0.3, "logits_scaling": 2.0}
    size = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return wide(GraniteForCausalLM(GraniteConfig(**size, **heads)))


def scaled() -> nn.Module:
    """Layer scale on the branches."""
    model = SequenceModel(61, vocab_size=61, embed_dim=32, num_heads=4)
    model.blocks = nn.ModuleList(TransformerBlock(32, MultiHeadAttention(32, 4), layer_scale=0.5) for _ in range(2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


DIRECT: dict[str, Any] = {**FAMILIES, "gemma2": gemma2, "granite": granite, "scaled": scaled}


@pytest.mark.paper("tensorlens")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit", "gemma2", "granite", "scaled"])
def test_what_a_head_writes_into_the_answer_by_hand(family: str) -> None:
    """Output projection, the scales and norms that the write meets on its way, unembedding."""
    torch.manual_seed(3)
    model = DIRECT[family]()
    inputs = {"x": tokens()[:1]} if family == "scaled" else {"input_ids": tokens()[:1]}
    inputs = {name: t[:1] for name, t in inputs_of(model).items()} if family == "vit" else inputs
    place, states, hooks = 4, {}, []
    for module in model.modules():
        if "Norm" in type(module).__name__:
            with torch.no_grad():
                module.weight.normal_(0.8, 0.3)
            hooks.append(module.register_forward_hook(lambda m, args, _: states.__setitem__(m, args[0][0, place])))
    with torch.no_grad(), regard.capture(model) as trace:
        answer = model(**inputs)
    for hook in hooks:
        hook.remove()
    size = 32 if family in ("bert", "vit") else 61
    direction = torch.randn(size)

    def read(layer: int, write: Tensor) -> Tensor:
        if family == "gpt2":
            return model.lm_head(through(model.transformer.ln_f, states, write))
        if family == "llama":
            return model.lm_head(through(model.model.norm, states, write))
        if family == "vit":
            return through(model.layernorm, states, write)
        if family == "bert":
            for later in range(layer, 2):
                block = model.encoder.layer[later]
                for norm in [block.attention.output.LayerNorm] * (later == layer) + [block.output.LayerNorm]:
                    write = through(norm, states, write)
                if later == 0:
                    write = through(model.encoder.layer[1].attention.output.LayerNorm, states, write)
            return write
        if family == "granite":
            return model.lm_head(through(model.model.norm, states, 0.3 * write)) / 2
        if family == "scaled":
            stream = write * model.blocks[layer].attention_scale
            return through(model.norm, states, stream) @ model.head.weight.T
        norm = model.model.layers[layer].post_attention_layernorm
        logits = model.lm_head(through(model.model.norm, states, through(norm, states, write, 1.0), 1.0))
        capped = answer.logits[0, place]
        return logits * capped / (3.0 * torch.atanh(capped / 3.0))

    with TensorLens(model) as lens:
        lens(**inputs)
        with torch.no_grad():
            found = lens.head_attribution(direction, place)
        assert found.shape == (len(trace), 4) and not found.requires_grad
        for layer, (seen, site) in enumerate(zip(trace, discover(model), strict=True)):
            assert seen.head_outputs is not None
            output = head_projections(site).output
            for head in range(4):
                meant = read(layer, output[head] @ seen.head_outputs[0, head, place]) @ direction
                torch.testing.assert_close(found[layer, head], meant.detach(), atol=1e-5, rtol=1e-3)
        for wrong in ((direction[:-1], 0), (direction, 400)):
            with pytest.raises(ShapeError, match="direction"):
                lens.head_attribution(*wrong)


@pytest.mark.paper("tensorlens")
def test_heads_of_a_pooled_answer_write_at_every_token() -> None:
    model = SequenceModel(3, vocab_size=9, embed_dim=8, num_heads=2, depth=1, pool="mean", causal=False).double().eval()
    ids, direction = torch.randint(9, (1, 6)), torch.randn(3, dtype=torch.float64)
    states: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
    with regard.capture(model) as trace:
        model(ids)
    hook.remove()
    z, sigma = trace[0].head_outputs, (states[0].var(-1, correction=0) + 1e-5).sqrt()
    assert z is not None
    out = model.blocks[0].attention.out.weight.unflatten(1, (2, -1))  # type: ignore[index, union-attr]
    written = torch.einsum("hnd,ohd->hno", z[0], out)
    held = (written - written.mean(-1, keepdim=True)) / sigma[:, None] * model.norm.weight
    with TensorLens(model) as lens:
        lens(ids)
        torch.testing.assert_close(
            lens.head_attribution(direction, 0)[0], (held.mean(1) @ model.head.weight.T @ direction).detach()
        )


@pytest.mark.paper("tensorlens")
def test_heads_and_biases_are_all_of_an_attention_only_answer() -> None:
    """One layer: what heads write, what entered, and biases add up to the logits."""
    model = Stack(Residual(MultiHeadAttention(8, 2)), causal=True).double().eval()
    x, v = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    with TensorLens(model) as lens:
        out = lens(x)
        rest = x[0, 2] + model.blocks[0].attention.out.bias  # type: ignore[union-attr]
        torch.testing.assert_close(lens.head_attribution(v, 2).sum(), (out[0, 2] - rest) @ v)
