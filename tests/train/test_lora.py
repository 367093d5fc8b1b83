"""Adapters: nothing changes at first, only they are trained, and they can be written into the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regard.errors import OptionError
from regard.nn import MultiHeadAttention
from regard.train.lora import add_lora, merge_lora


def test_a_model_with_adapters_begins_as_it_was() -> None:
    model = MultiHeadAttention(16, 2).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = model(x)
    adapters = add_lora(model, rank=3)
    assert torch.equal(model(x), before)
    assert [tuple(p.shape) for p in adapters] == [(3, 16), (16, 3)] * 4
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters}


@pytest.mark.paper("blade")
def test_training_moves_the_weight_by_a_matrix_of_low_rank() -> None:
    model = nn.ModuleDict({"query": nn.Linear(8, 6), "other": nn.Linear(8, 6)}).double()
    old = {name: layer.weight.clone() for name, layer in model.items()}
    adapters = add_lora(model, rank=2, alpha=6)
    optimizer = torch.optim.SGD(adapters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model["query"](torch.randn(10, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    merge_lora(other)
    moved = other["query"].weight - old["query"]
    assert int(torch.linalg.matrix_rank(moved)) == 2
    down, up = adapters
    torch.testing.assert_close(moved, 6 / 2 * up @ down)
    assert torch.equal(model["other"].weight, old["other"])
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(other["query"](x), model["query"](x), rtol=1e-12, atol=1e-12)
    assert set(other.state_dict()) == {"query.weight", "query.bias", "other.weight", "other.bias"}


def test_refusals() -> None:
    with pytest.raises(OptionError, match="rank"):
        add_lora(MultiHeadAttention(8, 2), 0)
    with pytest.raises(OptionError, match="named"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), 1)
