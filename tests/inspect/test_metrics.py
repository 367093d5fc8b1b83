"""Metrics of maps whose values are known, and that rows as they come give what whole maps give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import OptionError
from regard.inspect.metrics import (
    METRICS,
    HeadSummary,
    attention_distance,
    attention_entropy,
    head_metrics,
    local_mass,
    previous_token_mass,
    same_token_mass,
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
    assert torch.equal(summary.top_keys.long(), best.indices) and torch.equal(summary.top_weights, best.values)


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


def test_every_metric_has_its_range() -> None:
    torch.manual_seed(1)
    weights = torch.randn(4, 20, 20).masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).softmax(-1)
    found = head_metrics(weights)
    assert set(found) == set(METRICS)
    assert (found["entropy"] <= math.log(20)).all() and (found["distance"] < 20).all()
    for name in ("sink", "previous", "self", "local"):
        assert ((found[name] >= 0) & (found[name] <= 1)).all()
