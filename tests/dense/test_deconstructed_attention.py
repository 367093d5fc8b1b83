"""Attention variants against the paper's formulas, standard attention, and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.dense.deconstructed_attention import KINDS, PRINCIPLES, AttentionVariant, kinds_that
from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.masks import Document, KeyPadding

WIDTH, HEADS, LENGTH = 24, 3, 11
MIXING = [kind for kind in KINDS if kind != "mlp"]


def tokens(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variant(kind: str, **options: Any) -> AttentionVariant:
    torch.manual_seed(0)
    return AttentionVariant(WIDTH, HEADS, kind, max_length=32, **options).double()


def split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


@pytest.mark.paper("deconstructed_attention")
def test_standard_is_multi_head_attention() -> None:
    made, x = variant("standard", rotary=False), tokens()
    query, key, value = (split(linear(x)) for linear in (made.query, made.key, made.value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(made(x, causal=True), made.out(expected.transpose(1, 2).flatten(2)))


@pytest.mark.paper("deconstructed_attention")
def test_mlp_mixes_nothing_and_is_gated() -> None:
    made, x = variant("mlp"), tokens()
    out = made(x, causal=True)
    for place in range(LENGTH):
        one = x[:, place]
        gated = F.silu(one @ made.gate.weight.T) * (one @ made.up.weight.T)
        torch.testing.assert_close(out[:, place], gated @ made.out.weight.T)
    with pytest.raises(UnsupportedPatternError, match="no tokens"):
        made.weights(x)


@pytest.mark.paper("deconstructed_attention")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", MIXING)
def test_the_map_is_what_the_layer_applies(kind: str, causal: bool) -> None:
    """Fast forms (linear, folded batch) against the whole map; its rows sum to one and see the past alone."""
    made, x = variant(kind), tokens(batch=3)
    weights = made.weights(x, causal=causal)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if causal:
        assert bool((weights.triu(1) == 0).all())
    read = weights @ split(made.value(x))
    torch.testing.assert_close(made(x, causal=causal), made.out(read.transpose(1, 2).flatten(2)))


@pytest.mark.paper("deconstructed_attention")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_causal(kind: str) -> None:
    made, x = variant(kind), tokens()
    changed = torch.cat((x[:, :6], tokens(5)[:, 6:]), 1)
    torch.testing.assert_close(made(changed, causal=True)[:, :6], made(x, causal=True)[:, :6])


@pytest.mark.paper("deconstructed_attention")
def test_which_weights_depend_on_the_input() -> None:
    for kind in MIXING:
        made = variant(kind)
        same = torch.equal(made.weights(tokens(1)), made.weights(tokens(2)))
        assert same == (not PRINCIPLES[kind].sequence_dependence), kind
    # The source decides, where queries and keys come from one.
    made = variant("static_emb_qk")
    source = tokens(3)
    assert torch.equal(made.weights(tokens(1), source=source), made.weights(tokens(2), source=source))
    assert not torch.allclose(made.weights(tokens(1), source=source), made.weights(tokens(1)))


@pytest.mark.paper("deconstructed_attention")
def test_approximate_in_the_papers_recurrent_form() -> None:
    """Appendix I, sums over the past of v, of k v and of k (x) k v, token by token; one sum of weights divides all."""
    made, x = variant("approximate"), tokens()
    query, key = made.query_key(x)
    value, d = split(made.value(x)), WIDTH // HEADS
    outs = []
    zeroth, first = torch.zeros_like(value[:, :, 0]), value.new_zeros(2, HEADS, d, d)
    second, keys, squares = value.new_zeros(2, HEADS, d, d, d), torch.zeros_like(zeroth), torch.zeros_like(first)
    for t in range(LENGTH):
        q, k, v = query[:, :, t] / d**0.5, key[:, :, t], value[:, :, t]
        zeroth, first = zeroth + v, first + torch.einsum("bhi,bhv->bhiv", k, v)
        second = second + torch.einsum("bhi,bhj,bhv->bhijv", k, k, v)
        keys, squares = keys + k, squares + torch.einsum("bhi,bhj->bhij", k, k)
        total = t + 1 + (q * keys).sum(-1) + torch.einsum("bhi,bhj,bhij->bh", q, q, squares) / 2
        read = torch.einsum("bhi,bhiv->bhv", q, first) + torch.einsum("bhi,bhj,bhijv->bhv", q, q, second) / 2
        outs.append((zeroth + read) / total[..., None])
    heads = torch.stack(outs, 2)
    torch.testing.assert_close(made(x, causal=True), made.out(heads.transpose(1, 2).flatten(2)))


@pytest.mark.paper("deconstructed_attention")
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_nonapproximate_in_the_papers_recurrent_form(size: float) -> None:
    """Equation 18: a token's weight before the row sum is its own affair; large scores over- and underflow nothing."""
    made, x = variant("nonapproximate"), size * tokens()
    query, key, value = (split(linear(x)) for linear in (made.query, made.key, made.value))
    scores = (F.silu(query) * key).sum(-1) / (WIDTH // HEADS) ** 0.5
    outs = []
    for t in range(LENGTH):
        mass = (scores[..., : t + 1] - scores[..., : t + 1].amax(-1, keepdim=True)).exp()
        outs.append((mass[..., None] * value[:, :, : t + 1]).sum(2) / mass.sum(-1, keepdim=True))
    heads = torch.stack(outs, 2)
    torch.testing.assert_close(made(x, causal=True), made.out(heads.transpose(1, 2).flatten(2)))


@pytest.mark.paper("deconstructed_attention")
def test_static_embeddings_in_a_first_layer_are_standard_attention() -> None:
    standard, static, x = variant("standard"), variant("static_emb_qk"), tokens()
    static.load_state_dict(standard.state_dict())
    torch.testing.assert_close(static(x, causal=True), standard(x, causal=True))
    torch.testing.assert_close(static(x, causal=True, source=x), standard(x, causal=True))


@pytest.mark.paper("deconstructed_attention")
def test_the_table_of_principles() -> None:
    assert kinds_that(token_mixing=False) == ("mlp",)
    assert kinds_that(token_mixing=True, sequence_dependence=False) == ("rnd_emb_qk", "fixed_seq_qk")
    assert kinds_that(softmax_dot_product=False, token_mixing=True) == ("approximate", "nonapproximate")
    assert kinds_that(sequence_dependence=True, current_hidden_state=False) == ("static_emb_qk",)
    with pytest.raises(UnknownNameError, match="token_mixing"):
        kinds_that(token_mixin=True)


@pytest.mark.paper("deconstructed_attention")
def test_all_kinds_have_the_same_parameters() -> None:
    sizes = {kind: sum(p.numel() for p in variant(kind).parameters()) for kind in KINDS}
    assert set(sizes.values()) == {4 * WIDTH * WIDTH}


@pytest.mark.paper("deconstructed_attention")
def test_flops_grow_as_they_should() -> None:
    made = {kind: AttentionVariant(96, 6, kind, max_length=None) for kind in KINDS}
    for kind in ("mlp", "approximate", "nonapproximate"):
        assert made[kind].flops(4096) == 2 * made[kind].flops(2048), kind
    assert made["standard"].flops(4096) > 3 * made["standard"].flops(2048)
    # Maps that are the same for all inputs are formed once: four of eight times the products remain.
    scores, read = 2 * 2048**2 * 96, 2 * 2048**2 * 96
    projection = 2 * 2048 * 96**2
    assert made["rnd_emb_qk"].flops(2048, 8) == scores + 8 * read + (2 + 2 * 8) * projection
    assert made["standard"].flops(2048, 8) == 8 * (scores + read + 4 * projection)


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_absent(kind: str, side: str) -> None:
    made, x = variant(kind, rotary=False), tokens()
    real = slice(4, LENGTH) if side == "left" else slice(0, 7)
    valid = torch.zeros(2, LENGTH, dtype=torch.bool)
    valid[:, real] = True
    source = None if PRINCIPLES[kind].current_hidden_state else tokens(7)[:1]
    alone = made(x[:, real], causal=True, source=None if source is None else source[:, real])
    torch.testing.assert_close(made(x, causal=True, mask=KeyPadding(valid), source=source)[:, real], alone)


def test_packed_documents_in_the_folded_form() -> None:
    made, x = variant("rnd_emb_qk", rotary=False), tokens()
    packed = made(x, causal=True, mask=Document(torch.tensor([0] * 5 + [1] * 6)))
    assert made.frozen is not None
    torch.testing.assert_close(packed[:, 5:], made(x[:, 5:], causal=True, source=made.frozen[None, 5:LENGTH]))


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="standard"):
        variant("standrad")
    with pytest.raises(OptionError, match="leave source out"):
        variant("standard")(tokens(), source=tokens())
    with pytest.raises(OptionError, match="needs a source"):
        AttentionVariant(WIDTH, HEADS, "rnd_emb_qk", max_length=None)(tokens().float())
    with pytest.raises(ShapeError, match="max_length 32"):
        variant("rnd_emb_qk")(torch.zeros(1, 33, WIDTH, dtype=torch.float64))
    with pytest.raises(ShapeError, match="source is"):
        variant("static_emb_qk")(tokens(), source=tokens()[:, :4])
    with pytest.raises(ShapeError, match="24"):
        variant("standard")(torch.zeros(2, 5, 7, dtype=torch.float64))
