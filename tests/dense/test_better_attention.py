"""Attention of fewer projections against its formulas, torch's own multi-head attention and torch's FLOP counter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.dense.better_attention import (
    EfficientAttention,
    OptimisedAttention,
    SuperAttention,
    count,
    from_mha,
)
from regard.errors import OptionError, RetrofitError, ShapeError, UnsupportedMaskError
from regard.kernels import use_backend
from regard.masks import KeyPadding, SlidingWindow
from regard.nn import MultiHeadAttention
from tests.test_cost import counted

DIM, LENGTH = 12, 7
KINDS: dict[str, Any] = {
    "optimised": OptimisedAttention,
    "efficient": EfficientAttention,
    "super": lambda dim, heads, **options: SuperAttention(dim, heads, max_len=10, **options),
}


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def layer(kind: str, heads: int = 3, **options: Any) -> Any:
    made = KINDS[kind](DIM, heads, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def by_hand(made: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """One sequence, head by head: softmax over the keys of each query, slices of what has no projection."""
    heads, d = made.num_heads, DIM // made.num_heads
    q, k = query @ made.query.weight.T + made.query.bias, key
    if made.key is not None:
        k = key @ made.key.weight.T + made.key.bias
    outs = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[:, part] @ k[:, part].T / math.sqrt(d)
        read = value[:, part]
        if isinstance(made, SuperAttention):
            kernel = made.kernel[min(h, len(made.kernel) - 1), : len(key), : len(key)]
            read = (kernel.tril() if causal else kernel) @ read
        if causal:
            later = torch.ones(len(query), len(key)).triu(1 + len(key) - len(query)).bool()
            scores = scores.masked_fill(later, -math.inf)
        outs.append(scores.softmax(1) @ read)
    return torch.cat(outs, 1) @ made.out.weight.T + made.out.bias


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, causal: bool) -> None:
    """Self-attention, and queries, keys and values of three sources."""
    for options in ({}, {"per_head": True}) if kind == "super" else ({},):
        made, x, keys, values = layer(kind, **options), tokens(5), tokens(9), tokens(9)
        for row in range(2):
            torch.testing.assert_close(made(x, causal=causal)[row], by_hand(made, x[row], x[row], x[row], causal))
            torch.testing.assert_close(
                made(x, (keys, values), causal=causal)[row], by_hand(made, x[row], keys[row], values[row], causal)
            )
        torch.testing.assert_close(made(x, keys), made(x, (keys, keys)))


@pytest.mark.paper("better_attention")
def test_weights_are_counted() -> None:
    """4 D^2, 3 D^2, 2 D^2 and 2 D^2 + L^2, whatever the number of heads."""
    for heads in (1, 4):
        expected = {"standard": 4 * 16**2, "optimised": 3 * 16**2, "efficient": 2 * 16**2, "super": 2 * 16**2 + 10**2}
        made = {
            "standard": MultiHeadAttention(16, heads, bias=False),
            **{kind: make(16, heads, bias=False) for kind, make in KINDS.items()},
        }
        for kind, weights in expected.items():
            found = count(kind, 16, heads, 10)  # type: ignore[arg-type]
            assert found.parameters == weights == sum(p.numel() for p in made[kind].parameters())
            x = torch.randn(1, 10, 16)
            with use_backend("reference"):
                assert found.flops == counted(lambda module=made[kind], x=x: module(x))
    products = [count(kind, 16, 4, 10).matmuls_per_head for kind in ("standard", "optimised", "efficient", "super")]  # type: ignore[arg-type]
    assert products == [6, 5, 4, 5]
    # Super has fewer weights than standard attention while L < sqrt(2) D.
    assert count("super", 100, 1, 141).parameters < count("standard", 100, 1, 141).parameters
    assert count("super", 100, 1, 142).parameters > count("standard", 100, 1, 142).parameters


def torch_mha(heads: int, bias: bool, blocks: bool = False) -> nn.MultiheadAttention:
    mha = nn.MultiheadAttention(DIM, heads, bias=bias, batch_first=True).double().eval()
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.normal_(std=0.5)
        if blocks:
            size = DIM // heads
            diagonal = torch.block_diag(*[torch.ones(size, size)] * heads)
            mha.in_proj_weight[DIM:].mul_(diagonal.repeat(2, 1))  # type: ignore[index]
    return mha


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "blocks"), [(1, False), (3, True)])
@pytest.mark.parametrize("kind", ["optimised", "efficient"])
def test_multi_head_attention_converts_exactly(kind: str, heads: int, blocks: bool, bias: bool) -> None:
    """With one head always; with several where each head's W_V and W_K read its own channels alone."""
    mha = torch_mha(heads, bias, blocks)
    made = from_mha(mha, kind)  # type: ignore[arg-type]
    assert isinstance(made, KINDS[kind]) and not made.training
    x, context = tokens(), tokens(9)
    torch.testing.assert_close(made(x), mha(x, x, x)[0])
    torch.testing.assert_close(made(x, context), mha(x, context, context)[0])
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    torch.testing.assert_close(made(x, causal=True), mha(x, x, x, attn_mask=hidden)[0])


@pytest.mark.paper("better_attention")
def test_several_heads_that_mix_channels_do_not_convert() -> None:
    mha = torch_mha(3, True, blocks=True)
    with torch.no_grad():
        mha.in_proj_weight[DIM, -1] = 1e-3  # type: ignore[index]
    from_mha(mha, "optimised")
    with pytest.raises(RetrofitError, match="keys"):
        from_mha(mha, "efficient")
    with pytest.raises(RetrofitError, match="values"):
        from_mha(torch_mha(3, False), "optimised")
    with pytest.raises(RetrofitError, match="one embed_dim"):
        from_mha(nn.MultiheadAttention(DIM, 1, kdim=5), "optimised")
    with pytest.raises(OptionError, match="identity"):
        from_mha(mha, "super")  # type: ignore[arg-type]


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("causal", [False, True])
def test_an_identity_kernel_is_efficient_attention(causal: bool) -> None:
    made = SuperAttention(DIM, 3, max_len=10, kernel_init="identity").double()
    efficient = EfficientAttention(DIM, 3).double()
    efficient.load_state_dict({name: t for name, t in made.state_dict().items() if name != "kernel"})
    x = tokens()
    torch.testing.assert_close(made(x, causal=causal), efficient(x, causal=causal))


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_no_earlier_output(kind: str) -> None:
    made, x = layer(kind), tokens()
    changed = torch.cat((x[:, :4], tokens(3)), 1)
    torch.testing.assert_close(made(changed, causal=True)[:, :4], made(x, causal=True)[:, :4])
    assert not torch.allclose(made(changed)[:, :4], made(x)[:, :4])
    assert not torch.allclose(made(changed, causal=True)[:, 4:], made(x, causal=True)[:, 4:])


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("kind", KINDS)
def test_super_alone_knows_the_order(kind: str) -> None:
    made, x = layer(kind), tokens()
    order = torch.randperm(LENGTH)
    assert torch.allclose(made(x[:, order]), made(x)[:, order]) == (kind != "super")


@pytest.mark.paper("better_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_valid_output(kind: str, causal: bool) -> None:
    """Whatever stands there, at either end; at the right end it is as if it were not there."""
    made, x = layer(kind), tokens()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, 4:], valid[1, :2] = False, False
    noise = torch.where(valid[..., None], x, 100 * tokens())
    out, other = (made(t, causal=causal, mask=KeyPadding(valid)) for t in (x, noise))
    torch.testing.assert_close(other[valid], out[valid])
    torch.testing.assert_close(made(x[:1, :4], causal=causal), out[:1, :4])


@pytest.mark.paper("better_attention")
def test_initial_weights() -> None:
    """Xavier's bound and zero biases; queries and keys as one matrix, as torch's own begin."""
    optimised = OptimisedAttention(64, 4)
    assert optimised.key is not None
    packed = torch.cat((optimised.query.weight, optimised.key.weight)).detach()
    reference = torch.nn.init.xavier_uniform_(torch.empty(128, 64))
    torch.testing.assert_close(packed.abs().max(), reference.abs().max(), rtol=0.01, atol=0)
    torch.testing.assert_close(packed.std(), reference.std(), rtol=0.03, atol=0)
    made = SuperAttention(64, 4, max_len=50)
    for weight in (made.query.weight, made.out.weight, made.kernel[0]):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound
    assert not made.query.bias.any() and not made.out.bias.any()


def test_refusals() -> None:
    made = layer("super")
    with pytest.raises(ShapeError, match="exceed max_len 10"):
        made(tokens(11))
    with pytest.raises(UnsupportedMaskError, match="per query"):
        made(tokens(), mask=SlidingWindow(3))
    with pytest.raises(ShapeError, match="own channels"):
        layer("efficient")(tokens(), torch.randn(2, 5, 9, dtype=torch.float64))
    with pytest.raises(ShapeError, match="equal"):
        layer("efficient")(tokens(), (tokens(5), tokens(6)))
    with pytest.raises(OptionError, match="must divide"):
        EfficientAttention(12, 5)
    for options in ({"max_len": 0}, {"kernel_init": "zeros"}):
        with pytest.raises(OptionError, match="max_len"):
            SuperAttention(12, 3, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="kind"):
        count("best", 4, 1, 4)  # type: ignore[arg-type]
