"""The host of mechanisms against torch.nn.MultiheadAttention, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.dense.full import FullAttention
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.masks import Causal, KeyPadding, SlidingWindow
from regard.mechanism import Layer
from regard.nn import MultiHeadAttention, TransformerBlock, make_attention

WIDTH, HEADS = 16, 4


def tokens(length: int, width: int = WIDTH, seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiHeadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return theirs, MultiHeadAttention.from_torch(theirs)


def assert_same_with_gradients(
    theirs: nn.MultiheadAttention,
    ours: MultiHeadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    call: Any,
    their: Any,
) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = theirs(*leaves, need_weights=False, **their)[0]
    expected.sin().sum().backward()
    own = [t.clone().requires_grad_() for t in inputs]
    out = ours(own[0], (own[1], own[2]), **call)
    out.sin().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(own, leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    grads = [m.weight.grad for m in (ours.query, ours.key, ours.value)]
    if theirs.in_proj_weight is not None:
        torch.testing.assert_close(torch.cat(grads), theirs.in_proj_weight.grad)  # type: ignore[arg-type]
    else:
        named = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
        torch.testing.assert_close(grads, [w.grad for w in named])
    torch.testing.assert_close(ours.out.weight.grad, theirs.out_proj.weight.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(causal: bool, bias: bool) -> None:
    theirs, ours = pair(bias=bias)
    x = tokens(7)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    assert_same_with_gradients(theirs, ours, (x, x, x), {"causal": causal}, {"attn_mask": hidden})
    torch.testing.assert_close(ours(x, causal=causal), ours(x, (x, x), causal=causal))


@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (10, 10), (10, 6), (None, 6)])
def test_cross_attention(kdim: int | None, vdim: int | None) -> None:
    theirs, ours = pair(kdim=kdim, vdim=vdim)
    key, value = tokens(9, kdim or WIDTH, 2), tokens(9, vdim or WIDTH, 3)
    assert_same_with_gradients(theirs, ours, (tokens(5), key, value), {}, {})


def test_padding() -> None:
    theirs, ours = pair()
    x, valid = tokens(7), torch.ones(2, 7, dtype=torch.bool)
    valid[1, 4:] = False
    assert_same_with_gradients(theirs, ours, (x, x, x), {"key_padding": valid}, {"key_padding_mask": ~valid})
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    both = {"key_padding_mask": ~valid, "attn_mask": future}
    assert_same_with_gradients(theirs, ours, (x, x, x), {"key_padding": valid, "causal": True}, both)
    for mask in (~future, Causal()):
        assert_same_with_gradients(theirs, ours, (x, x, x), {"key_padding": valid, "mask": mask}, both)
    torch.testing.assert_close(ours(x, mask=KeyPadding(valid)), ours(x, key_padding=valid))


def test_additive_mask() -> None:
    theirs, ours = pair()
    x, bias = tokens(7), torch.randn(7, 7, dtype=torch.float64)
    assert_same_with_gradients(theirs, ours, (x, x, x), {"mask": bias}, {"attn_mask": bias})


def test_from_torch_keeps_mode_dtype_and_takes_a_mechanism() -> None:
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5).eval().to(torch.bfloat16)
    ours = MultiHeadAttention.from_torch(theirs, "sliding_window", window=3, sinks=0)
    assert not ours.training and ours.out.weight.dtype == torch.bfloat16
    double = copy.deepcopy(theirs).double()
    x = tokens(9)
    hidden = ~SlidingWindow(3).dense(9, 9)[0, 0]
    expected = double(*(x.transpose(0, 1),) * 3, attn_mask=hidden, need_weights=False)[0].transpose(0, 1)
    torch.testing.assert_close(ours.double()(x), expected)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    made = MultiHeadAttention(WIDTH, HEADS, dropout=0.5).double()
    x = tokens(5)
    assert not torch.equal(made(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_repeated_heads(kv_heads: int) -> None:
    torch.manual_seed(0)
    made, x = MultiHeadAttention(WIDTH, HEADS, num_kv_heads=kv_heads, head_dim=6).double(), tokens(7)
    full = MultiHeadAttention(WIDTH, HEADS, head_dim=6).double()
    with torch.no_grad():
        for name in ("query", "out"):
            getattr(full, name).load_state_dict(getattr(made, name).state_dict())
        for name in ("key", "value"):
            for kind in ("weight", "bias"):
                heads = getattr(getattr(made, name), kind).unflatten(0, (kv_heads, 6))
                getattr(getattr(full, name), kind).copy_(heads.repeat_interleave(HEADS // kv_heads, 0).flatten(0, 1))
    torch.testing.assert_close(made(x, causal=True), full(x, causal=True))


def test_rotary_positions_are_relative() -> None:
    """Shifting all tokens by a common number of positions changes no output; swapping two tokens does."""
    torch.manual_seed(0)
    made, x = MultiHeadAttention(WIDTH, HEADS, rotary=True).double(), tokens(7)
    plain = made(x)
    padded = torch.cat((tokens(5, seed=8), x), 1)
    hidden = torch.arange(12) >= 5
    torch.testing.assert_close(made(padded, mask=hidden.expand(12, 12))[:, 5:], plain)
    query, key, _ = made.project(x[:, :1].expand(-1, 7, -1))
    scores = query @ key.transpose(-1, -2)
    for distance in range(-6, 7):
        line = scores.diagonal(distance, -2, -1)
        torch.testing.assert_close(line, line[..., :1].expand_as(line))
    assert float((scores[..., 0, 0] - scores[..., 0, 3]).detach().abs().max()) > 1e-3
    still = MultiHeadAttention(WIDTH, HEADS).double()
    still.load_state_dict(made.state_dict())
    assert float((still(x) - plain).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("k_len", [3, 5, 8])
def test_rotary_cross_attention_ends_where_the_keys_end(k_len: int) -> None:
    """The last of the queries is at the last key's position, whichever are more."""
    torch.manual_seed(0)
    made = MultiHeadAttention(WIDTH, HEADS, rotary=True).double()
    x, context = tokens(5), tokens(k_len, seed=2)
    query, key, _ = made.project(x, context)
    longest = max(5, k_len)
    both = [torch.zeros(2, longest - t.shape[1], WIDTH, dtype=t.dtype) for t in (x, context)]
    full_query, _, _ = made.project(torch.cat((both[0], x), 1))
    _, full_key, _ = made.project(torch.cat((both[1], context), 1))
    torch.testing.assert_close(query, full_query[:, :, -5:])
    torch.testing.assert_close(key, full_key[:, :, -k_len:])
    assert made(x, context).shape == x.shape


def test_a_built_mechanism_is_used() -> None:
    torch.manual_seed(0)
    made, x = MultiHeadAttention(WIDTH, HEADS, FullAttention()).double(), tokens(5)
    query, key, value = made.project(x)
    expected = made.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(x), expected)


def test_make_attention_for_mechanisms_and_layers() -> None:
    host = make_attention("moba", WIDTH, HEADS, num_kv_heads=2, rotary=True, block_size=4, top_k=2)
    assert isinstance(host, MultiHeadAttention)
    assert (host.num_kv_heads, host.rotary, host.mechanism.block_size) == (2, True, 4)
    layer = make_attention("gda", WIDTH, HEADS, layer_index=2, num_layers=4, num_kv_heads=2, num_noise_heads=2)
    assert isinstance(layer, Layer)
    assert (layer.layer_index, layer.groups, layer.rotary) == (2, 2, True)
    # A layer's own positions can be switched off, and what it does not have may stay off.
    assert make_attention("gda", WIDTH, HEADS, rotary=False, dropout=0.0).rotary is False
    assert make_attention("moh", WIDTH, HEADS, dropout=0.0)(torch.randn(2, 5, WIDTH)).shape == (2, 5, WIDTH)


def test_make_attention_refuses_what_a_layer_has_not() -> None:
    with pytest.raises(OptionError, match="dropout"):
        make_attention("moh", WIDTH, HEADS, dropout=0.1)
    with pytest.raises(OptionError, match="feature maps"):
        make_attention("cbam", WIDTH, HEADS)
    with pytest.raises(regard.errors.UnknownNameError, match="moba"):
        make_attention("mobba", WIDTH, HEADS)


def test_every_layer_of_the_catalogue_fits_into_a_block() -> None:
    for entry in regard.catalogue(kind="layer"):
        cls = regard.registry.get(entry.key)
        if "causal-self" not in cls.patterns or cls.needs_grid:
            continue
        block = TransformerBlock(32, make_attention(entry.key, 32, HEADS, **entry.example))
        assert block(torch.randn(2, 12, 32)).shape == (2, 12, 32), entry.key


def test_block_is_two_residual_branches() -> None:
    torch.manual_seed(0)
    block, x = TransformerBlock(WIDTH, MultiHeadAttention(WIDTH, HEADS), 2.0).double(), tokens(5)
    reference = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    theirs, ours = reference.state_dict(), block.state_dict()
    for kind in ("weight", "bias"):
        parts = [ours[f"attention.{name}.{kind}"] for name in ("query", "key", "value")]
        theirs[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        for name, own in (
            ("self_attn.out_proj", "attention.out"),
            ("linear1", "mlp.0"),
            ("linear2", "mlp.2"),
            ("norm1", "attention_norm"),
            ("norm2", "mlp_norm"),
        ):
            theirs[f"{name}.{kind}"] = ours[f"{own}.{kind}"]
    reference.load_state_dict(theirs)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(block(x, causal=True), reference(x, src_mask=future))


def test_errors() -> None:
    with pytest.raises(OptionError, match="no multiple"):
        MultiHeadAttention(10, 4)
    with pytest.raises(OptionError, match="does not divide"):
        MultiHeadAttention(16, 4, num_kv_heads=3)
    with pytest.raises(OptionError, match="make_attention"):
        MultiHeadAttention(16, 4, "moh")
    with pytest.raises(OptionError, match="built already"):
        MultiHeadAttention(16, 4, FullAttention(), window=3)
    with pytest.raises(OptionError, match="block_sise"):
        MultiHeadAttention(16, 4, "moba", block_sise=3)
    with pytest.raises(RetrofitError, match="add_bias_kv"):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(16, 4, add_bias_kv=True))
    made = MultiHeadAttention(16, 4, kdim=6)
    with pytest.raises(ShapeError, match="source of keys"):
        made(torch.randn(2, 3, 16))
    with pytest.raises(ShapeError, match="takes x"):
        made(torch.randn(3, 16))
    with pytest.raises(OptionError, match="additive"):
        MultiHeadAttention(16, 4)(
            torch.randn(2, 3, 16), mask=torch.zeros(3, 3), key_padding=torch.ones(2, 3, dtype=torch.bool)
        )
