"""The frame of linear attention: every choice of steps against a loop over tokens written from the formula."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.linear import compose
from regard.linear.frame import FEATURE_MAPS, FrameState
from regard.masks import KeyPadding

HEADS, DIM = 2, 4
CHOICES = list(
    itertools.product(("sum", "delta"), (None, "learned", (0.3, 0.01)), ("sum", "rms", "none"), (None, "conv"))
)


def tokens(length: int, kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, HEADS, length, DIM, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, length, DIM, dtype=torch.float64) for _ in range(2))
    return query, key, value


def looped(
    module: torch.nn.Module, feature_map: str, update: str, decay: object, normalizer: str, inputs: tuple[Tensor, ...]
) -> Tensor:
    """One batch entry, head and token after the other; parameters are read from the module, nothing else."""
    query, key, value = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in inputs)
    phi = {"elu": lambda x: torch.where(x > 0, x + 1, x.exp()), "softmax": lambda x: x.exp() / x.exp().sum()}[
        feature_map
    ]
    parameters = dict(module.named_parameters())
    out = torch.zeros_like(value)
    for b, h in itertools.product(range(2), range(HEADS)):
        state = torch.zeros(DIM, DIM, dtype=torch.float64)
        total = torch.zeros(DIM, dtype=torch.float64)
        keep = 1.0
        if decay == "learned":
            keep = 1 / (1 + (-parameters["keep"][h]).exp())  # type: ignore[assignment]
        elif isinstance(decay, tuple):
            keep = float(torch.tensor(-decay[h], dtype=torch.float64).exp())
        for t in range(value.shape[2]):
            q, k, v = phi(query[b, h, t]), phi(key[b, h, t]), value[b, h, t]
            if update == "delta":
                q, k = q / q.norm(), k / k.norm()
                beta = 1 / (1 + (-parameters["strength"][h]).exp())
                state = keep * (state - beta * torch.outer(k, k @ state)) + beta * torch.outer(k, v)
            else:
                state, total = keep * state + torch.outer(k, v), keep * total + k
            row = q @ state
            if normalizer == "sum":
                row = row / (q @ total + 1e-6)
            elif normalizer == "rms":
                row = row / (row.square().mean() + 1e-12).sqrt()
            if "conv.weight" in parameters:
                weight = parameters["conv.weight"].view(HEADS, DIM, 4)[h]
                for back in range(min(t + 1, 4)):
                    row = row + weight[:, 3 - back] * value[b, h, t - back]
            out[b, h, t] = row
    return out


@pytest.mark.parametrize(("update", "decay", "normalizer", "correction"), CHOICES)
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_every_choice_is_its_formula(
    feature_map: str, update: str, decay: object, normalizer: str, correction: str | None
) -> None:
    """The whole sequence, and a prompt in pieces followed by single tokens, from any state of the frame."""
    options = {"update": update, "decay": decay, "normalizer": normalizer, "correction": correction}
    if update == "delta" and normalizer == "sum":
        with pytest.raises(OptionError, match="no sum of scores"):
            compose(feature_map, **options)  # type: ignore[arg-type]
        return
    module = compose(feature_map, **options, num_heads=HEADS, head_dim=DIM, chunk_size=4).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = tokens(11, kv_heads=1)
    expected = looped(module, feature_map, update, decay, normalizer, inputs)
    torch.testing.assert_close(module(*inputs, causal=True), expected, rtol=1e-6, atol=1e-7)
    state, outs = module.init_state(2, like=inputs[0]), []
    for piece in (slice(0, 6), slice(6, 9), slice(9, 10), slice(10, 11)):
        out, state = module.step(*(t[:, :, piece] for t in inputs), state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-6, atol=1e-7)


def test_a_state_can_be_saved_and_goes_on(tmp_path: object) -> None:
    module = compose(update="delta", correction="conv", num_heads=HEADS, head_dim=DIM).double()
    inputs = tokens(9)
    _, state = module.step(*(t[:, :, :5] for t in inputs), module.init_state(2, like=inputs[0]))
    file = f"{tmp_path}/state.pt"
    assert state.running is not None
    torch.save({"sum": state.running.sum, "tail": state.tail}, file)
    kept = torch.load(file, weights_only=True)
    again = FrameState(type(state.running)(kept["sum"]), kept["tail"])
    for state_ in (state, again):
        out, _ = module.step(*(t[:, :, 5:] for t in inputs), state_)
        torch.testing.assert_close(out, module(*inputs, causal=True)[:, :, 5:])


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_map_without_order_is_a_product_of_matrices(feature_map: str) -> None:
    """Not causal: ``phi(q) (phi(k)^T v)`` over its sum, hidden keys left out."""
    module = compose(feature_map, normalizer="none" if feature_map in ("silu", "identity") else "sum")
    inputs, keys = tokens(7), torch.rand(2, 7) < 0.7
    q, k = (FEATURE_MAPS[feature_map](t) for t in inputs[:2])
    scores = (q @ k.transpose(-1, -2)).masked_fill(~keys[:, None, None], 0)
    if module.normalize:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(module(*inputs, mask=KeyPadding(keys)), scores @ inputs[2])


def test_taylor_features_are_softmax_for_small_scores() -> None:
    query, key, value = tokens(20)
    out = compose("taylor")(0.1 * query, 0.1 * key, value, causal=True)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(0.1 * query, 0.1 * key, value, is_causal=True), rtol=0, atol=1e-5
    )


def test_the_delta_rule_keeps_the_last_value_of_a_key_and_a_sum_their_mean() -> None:
    key = torch.eye(DIM, dtype=torch.float64).repeat(2, 1)[None, None]
    value = torch.randn(1, 1, 2 * DIM, DIM, dtype=torch.float64)
    delta = compose("identity", update="delta").double()
    with torch.no_grad():
        assert delta.strength is not None
        delta.strength.fill_(50.0)
    torch.testing.assert_close(delta(key, key, value, causal=True)[:, :, DIM:], value[:, :, DIM:])
    mean = compose("identity")(key, key, value, causal=True)[:, :, DIM:]
    torch.testing.assert_close(mean, (value[:, :, :DIM] + value[:, :, DIM:]) / 2, rtol=1e-5, atol=1e-5)


def test_errors_teach() -> None:
    with pytest.raises(UnknownNameError, match="feature map named 'elo'"):
        compose("elo")
    with pytest.raises(OptionError, match="one slope >= 0 for each of 2 heads"):
        compose(decay=(0.1,), num_heads=2)
    with pytest.raises(UnsupportedPatternError):
        compose(decay="learned", num_heads=HEADS)(*tokens(5))
    with pytest.raises(ShapeError, match="built for 3 heads"):
        compose(decay="learned", num_heads=3)(*tokens(5), causal=True)
    with pytest.raises(ShapeError, match="3 heads of 4 channels"):
        compose(correction="conv", num_heads=3, head_dim=4)(*tokens(5), causal=True)
