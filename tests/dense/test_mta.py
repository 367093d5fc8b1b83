"""Multi-token attention against multi-head and talking-heads attention, its own limits, and runs apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache import EvictingCache
from regard.dense.composed import ComposedDense
from regard.dense.mta import CONFIGS, MultiTokenAttention
from regard.errors import OptionError, ShapeError
from regard.layers.head_output import HeadGate, HeadNorm
from regard.masks import Document, KeyPadding

WIDTH, HEADS, LENGTH = 32, 4, 12
BARE: dict[str, Any] = {"group_norm": False, "gate": None}
PLACES: list[dict[str, Any]] = [
    {"pre_softmax": True, "post_softmax": False},
    {"pre_softmax": False, "post_softmax": True},
    {"pre_softmax": True, "post_softmax": True, "head_group": 2, "head_mix": "both"},
]


def tokens(length: int = LENGTH, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int = 0, noise: float = 0.4, **options: Any) -> MultiTokenAttention:
    """A layer in float64 whose kernels are the identity with ``noise`` on it."""
    torch.manual_seed(seed)
    made = MultiTokenAttention(WIDTH, HEADS, **{"q_kernel": 3, "k_kernel": 5, **options}).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "kernel" in name or "heads" in name:
                parameter.add_(noise * torch.randn_like(parameter))
    return made


def multi_head(made: MultiTokenAttention, x: Tensor, causal: bool = True) -> Tensor:
    """Multi-head attention of the same projections by torch's own kernel."""
    query, key, value = made.project(x)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return made.out(out.transpose(1, 2).flatten(2))


@pytest.mark.paper("mta")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_at_first_it_is_multi_head_attention(causal: bool, kv_heads: int) -> None:
    made = layer(noise=0, post_softmax=True, head_group=4, head_mix="both", num_kv_heads=kv_heads, **BARE)
    torch.testing.assert_close(made(tokens(), causal=causal), multi_head(made, tokens(), causal))


@pytest.mark.paper("mta")
def test_norm_and_gate_follow_the_heads() -> None:
    made = layer(noise=0, depth_scale=True, layer_index=2, gate="vector")
    assert made.norm is not None and made.gate is not None
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 2)
    query, key, value = made.project(tokens())
    heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * made.norm.weight
    heads = heads * (1 - (0.8 - 0.6 * 2.718281828459045 ** (-0.3 * 2)))
    heads = heads / (1 + (-heads @ made.gate.linear.weight.T - made.gate.linear.bias).exp())
    torch.testing.assert_close(made(tokens(), causal=True), made.out(heads.transpose(1, 2).flatten(2)))
    scalar = layer().gate
    assert scalar is not None and scalar.linear.out_features == 1


@pytest.mark.paper("mta")
@pytest.mark.parametrize("places", PLACES)
def test_later_tokens_change_no_earlier_output(places: dict[str, Any]) -> None:
    made, x = layer(**places), tokens()
    before = made(x, causal=True)
    for cut in (1, 5, 11):
        changed = torch.cat((x[:, :cut], 3 * tokens(seed=9)[:, cut:]), 1)
        after = made(changed, causal=True)
        torch.testing.assert_close(after[:, :cut], before[:, :cut])
        assert not torch.allclose(after[:, cut:], before[:, cut:])


@pytest.mark.paper("mta")
def test_a_neighbouring_key_moves_a_weight() -> None:
    """What single-token attention cannot do: the ratio of two weights depends on a third key."""
    x, other = tokens(batch=1), tokens(batch=1)
    other[0, 5] += 1

    def ratio(made: MultiTokenAttention, x: Tensor) -> Tensor:
        query, key, _ = made.project(x)
        weights = made.weights(query[:, :, -1:], key, None)
        return weights[..., 4] / weights[..., 1]

    plain, convolved = layer(pre_softmax=False, **BARE), layer(**BARE)
    torch.testing.assert_close(ratio(plain, x), ratio(plain, other))
    assert not torch.allclose(ratio(convolved, x), ratio(convolved, other), rtol=1e-2)


@pytest.mark.paper("mta")
def test_one_tap_is_a_temperature_per_head() -> None:
    made, x = layer(q_kernel=1, k_kernel=1, **BARE), tokens()
    query, key, value = made.project(x)
    assert made.pre_kernel is not None
    scale = made.pre_kernel[:, 0, 0].view(1, -1, 1, 1)
    expected = F.scaled_dot_product_attention(query * scale, key, value, is_causal=True)
    torch.testing.assert_close(made(x, causal=True), made.out(expected.transpose(1, 2).flatten(2)))


@pytest.mark.paper("mta")
@pytest.mark.parametrize("place", ["pre", "post"])
def test_mixing_all_heads_is_talking_heads_attention(place: Any) -> None:
    made, x = layer(pre_softmax=False, head_group=HEADS, head_mix=place, **BARE), tokens()
    talking = ComposedDense(heads=place, num_heads=HEADS, head_dim=WIDTH // HEADS).double()
    kernel = made.pre_heads if place == "pre" else made.post_heads
    (mixture,) = talking.parameters()
    assert kernel is not None
    mixture.data.copy_(kernel)
    expected = talking(*made.project(x), causal=True)
    torch.testing.assert_close(made(x, causal=True), made.out(expected.transpose(1, 2).flatten(2)))


@pytest.mark.paper("mta")
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 1, 3, 2]])
def test_decoding_equals_the_parallel_form(places: dict[str, Any], chunks: list[int]) -> None:
    made, x = layer(num_kv_heads=2, **places), tokens()
    state, outs = made.init_state(2, like=x), []
    with torch.no_grad():
        for part in x.split(chunks, 1):
            out, state = made.step(part, state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), made(x, causal=True))
    # Kept besides keys and values: two queries for each convolution.
    convolutions = places["pre_softmax"] + places["post_softmax"]
    assert state.queries.shape[2] == 2 * convolutions and state.cache.seen == LENGTH


@pytest.mark.paper("mta")
@pytest.mark.parametrize("places", PLACES)
def test_packed_documents_are_as_if_apart(places: dict[str, Any]) -> None:
    made, x = layer(rotary=False, **places), tokens()
    packed = made(x, causal=True, mask=Document(torch.tensor([0] * 5 + [1] * 7)))
    torch.testing.assert_close(packed[:, :5], made(x[:, :5], causal=True))
    torch.testing.assert_close(packed[:, 5:], made(x[:, 5:], causal=True))
    # Rotary scores know distances alone, so that a document may stand anywhere.
    turned = layer(rotary=True, **places)
    packed = turned(x, causal=True, mask=Document(torch.tensor([0] * 5 + [1] * 7)))
    torch.testing.assert_close(packed[:, 5:], turned(x[:, 5:], causal=True))


@pytest.mark.paper("mta")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_either_side_is_as_if_absent(side: str, causal: bool) -> None:
    made, x = layer(**PLACES[2]), tokens()
    real = slice(4, LENGTH) if side == "left" else slice(0, 8)
    valid = torch.zeros(2, LENGTH, dtype=torch.bool)
    valid[:, real] = True
    torch.testing.assert_close(made(x, causal=causal, mask=KeyPadding(valid))[:, real], made(x[:, real], causal=causal))


@pytest.mark.paper("mta")
def test_the_papers_models_and_their_parameters() -> None:
    big = CONFIGS["830m"]
    assert [i for i in range(big.depth) if big.options(i).get("pre_softmax", True)] == [2, 6, 10, 14, 18, 22]
    with torch.device("meta"):
        layers = [MultiTokenAttention(big.embed_dim, big.num_heads, **big.options(i)) for i in (1, 2)]
    sizes = [sum(p.numel() for p in made.parameters()) for made in layers]
    plain = 4 * 1536**2 + 96 + 96 + 1  # projections, norm, gate
    assert sizes == [plain + 2 * 16 * 16, plain + 2 * 16 * 16 + 2 * 16 * 6 * 11]
    toy = CONFIGS["toy"]
    made = MultiTokenAttention(toy.embed_dim, toy.num_heads, **toy.options(0))
    assert made.pre_kernel is not None and made.pre_kernel.shape == (2, 2, 9) and made.dropout.p == 0.1
    with pytest.raises(OptionError, match="0 to 3"):
        toy.options(4)


def test_other_initial_kernels() -> None:
    constant, normal = layer(noise=0, init="constant"), layer(noise=0, init="normal")
    assert constant.pre_kernel is not None and normal.pre_kernel is not None
    assert bool((constant.pre_kernel - 0.3).abs().max() < 1e-6) and 0.1 < float(normal.pre_kernel.detach().std()) < 0.5


def test_dropout_of_weights_is_for_training_alone() -> None:
    made, x = layer(dropout=0.5, **BARE), tokens()
    assert torch.equal(made(x, causal=True), made(x, causal=True))
    made.train()
    assert not torch.equal(made(x, causal=True), made(x, causal=True))


def test_head_output_pieces() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(HeadNorm(8)(x), nn.RMSNorm(8, eps=1e-5)(x))
    torch.testing.assert_close(HeadNorm(8, layer=1)(x), 0.8 * nn.RMSNorm(8, eps=1e-5)(x))
    with pytest.raises(OptionError, match="scalar"):
        HeadGate(8, "matrix")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"k_kernel": 4}, {"q_kernel": 0}, {"head_group": 3}, {"head_mix": "no"}, {"init": "no"}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        MultiTokenAttention(WIDTH, HEADS, **options)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ShapeError, match="32"):
        layer()(torch.zeros(2, 5, 16, dtype=torch.float64))
    with pytest.raises(OptionError, match="group_norm"):
        layer(group_norm=False, depth_scale=True)
    with pytest.raises(OptionError, match="side by side"):
        layer().init_state(2, like=tokens(), cache=EvictingCache())
