"""Metrics of maps whose values are known, and that rows as they come give what whole maps give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import OptionError, ShapeError
from regard.inspect.metrics import (
    METRICS,
    HeadSummary,
    attention_distance,
    attention_entropy,
    head_metrics,
    local_mass,
    patch_metrics,
    previous_token_mass,
    same_token_mass,
    shares,
    sink_mass,
    successor_mass,
    summarize_heads,
)
from tests.retrofit.small_models import FAMILIES, inputs_of, output_of


def _uniform(length: int) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.float64).tril()
    return (causal / causal.sum(-1, keepdim=True))[None, None]


def test_uniform_causal_attention() -> None:
    length, maps = 9, _uniform(9)
    counts = torch.arange(1, length + 1, dtype=torch.float64)
    torch.testing.assert_close(attention_entropy(maps)[0, 0], counts.log().mean())
    torch.testing.assert_close(sink_mass(maps)[0, 0], (1 / counts).mean())
    torch.testing.assert_close(attention_distance(maps)[0, 0], ((counts - 1) / 2).mean())
    torch.testing.assert_close(previous_token_mass(maps)[0, 0], (1 / counts)[1:].sum() / length)
    torch.testing.assert_close(local_mass(maps, 3)[0, 0], (counts.clamp_max(3) / counts).mean())


def test_one_key_has_no_entropy_and_rows_that_see_nothing_do_not_count() -> None:
    eye = torch.eye(5)[None]
    assert float(attention_entropy(eye)) == 0 and float(attention_distance(eye)) == 0
    half = eye.clone()
    half[:, :2] = 0
    assert float(head_metrics(half)["self"]) == 1


def test_weights_count_by_their_shares() -> None:
    """Negative ones by their size, and rows that do not sum to 1 as if they did."""
    rows = torch.tensor([[[0.5, 0.0, 0.0], [-1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]])
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(shares(rows), expected) and shares(rows.half()).dtype == torch.float32
    assert float(sink_mass(rows)) == pytest.approx((1 + 0.25) / 2)
    assert float(attention_entropy(rows)) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2)
    summary = HeadSummary(3, top=2)
    summary.add(0, rows)
    assert torch.equal(summary.top_weights[0, 1], torch.tensor([0.75, 0.25]))
    assert torch.equal(summary.received[0], torch.tensor([1.25, 0.75, 0.0]))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_metrics_of_patches_by_a_loop(before: int) -> None:
    """Patches alone are judged, each by where the others lie on the grid."""
    rows, columns = 3, 4
    torch.manual_seed(before)
    weights = torch.randn(2, before + 12, before + 12, dtype=torch.float64).softmax(-1)
    summary = HeadSummary(before + 12, patch_metrics((rows, columns), before), skip=before)
    for start in range(0, before + 12, 5):
        summary.add(start, weights[:, start : start + 5])
    found = summary.means()
    assert ("other tokens" in found) == (before > 0)
    for head in range(2):
        distance = around = own = other = entropy = 0.0
        for query in range(12):
            row = weights[head, before + query].tolist()
            entropy -= sum(w * math.log(w) for w in row)
            own, other = own + row[before + query], other + sum(row[:before])
            apart = [divmod(query, columns)[0] - divmod(key, columns)[0] for key in range(12)]
            aside = [divmod(query, columns)[1] - divmod(key, columns)[1] for key in range(12)]
            among = row[before:]
            distance += sum(w * math.hypot(r, c) for w, r, c in zip(among, apart, aside, strict=True)) / sum(among)
            around += sum(w for w, r, c in zip(among, apart, aside, strict=True) if max(abs(r), abs(c)) == 1)
        expected = {"entropy": entropy, "distance in patches": distance, "own patch": own, "patches around": around}
        for name, total in (expected | ({"other tokens": other} if before else {})).items():
            assert float(found[name][head]) == pytest.approx(total / 12)
    with pytest.raises(ShapeError, match="rows, columns"):
        patch_metrics((3, 0))


def test_patterns_of_tokens() -> None:
    tokens = torch.tensor([[1, 2, 3, 1, 2, 4]])
    same, after = torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)
    same[0, 0, 3, 0] = same[0, 0, 4, 1] = 1
    after[0, 0, 3, 1] = after[0, 0, 4, 2] = 1
    assert float(same_token_mass(same, tokens)) == 1 and float(successor_mass(after, tokens)) == 1
    assert float(same_token_mass(after, tokens)) == 0 and float(successor_mass(same, tokens)) == 0


def test_rows_as_they_come_give_what_the_whole_map_gives() -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 11, 15, dtype=torch.float64).softmax(-1)
    summary = HeadSummary(11, top=4)
    for start in range(0, 11, 4):
        summary.add(start, weights[..., start : start + 4, :])
    for name, found in summary.means().items():
        torch.testing.assert_close(found, head_metrics(weights)[name])
    torch.testing.assert_close(summary.received, weights.sum(-2))
    best = weights.topk(4, -1)
    assert torch.equal(summary.top_keys.long(), best.indices)
    # Rows of softmax sum to 1 but for rounding, and are divided by their sum.
    torch.testing.assert_close(summary.top_weights, best.values, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_is_summarised_without_its_maps(family: str, implementation: str) -> None:
    model = FAMILIES[family](implementation)
    inputs = inputs_of(model)
    with regard.capture(model) as whole:
        output_of(model, **inputs)
    with regard.capture(model, summarize=summarize_heads(top=3, rows=5)) as rows:
        output_of(model, **inputs)
    for seen, summed in zip(whole, rows, strict=True):
        assert seen.weights is not None and summed.weights is None
        for name, found in summed.summary.means().items():
            torch.testing.assert_close(found, head_metrics(seen.weights)[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(OptionError, match="over"):
        next(iter(rows[0].weight_rows()))


@pytest.mark.parametrize("kind", ["gptj", "bloom", "deberta-v2"])
def test_models_that_cannot_be_watched_give_their_own_maps(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    own = {"gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "bloom": {"n_layer": 2, "n_head": 4}}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](vocab_size=40, **(shape | own.get(kind, {})))
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        maps = torch.stack(model(torch.arange(2, 14)[None], output_attentions=True).attentions)
    found = head_metrics(maps)
    assert found["entropy"].shape == (2, 1, 4)
    rows = torch.special.entr(maps.double()).sum(-1).mean(-1).float()
    torch.testing.assert_close(found["entropy"], rows, atol=1e-5, rtol=1e-5)


def test_every_metric_has_its_range() -> None:
    torch.manual_seed(1)
    weights = torch.randn(4, 20, 20).masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).softmax(-1)
    found = head_metrics(weights)
    assert set(found) == set(METRICS)
    assert (found["entropy"] <= math.log(20)).all() and (found["distance"] < 20).all()
    for name in ("sink", "previous", "self", "local"):
        assert ((found[name] >= 0) & (found[name] <= 1)).all()
