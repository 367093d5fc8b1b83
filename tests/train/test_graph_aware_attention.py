"""The adapter on sparse graphs: its thresholds, its formula in loops, and what it leaves of a frozen model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.models.sequence import SequenceModel
from regard.train.graph_aware_attention import SparseGINAdapter, add_sparse_gin
from regard.train.lora import add_lora

WIDTH, LENGTH = 6, 8


def stream() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def attention_maps(heads: int = 3) -> Tensor:
    scores = 2 * torch.randn(2, heads, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf).softmax(-1)


def adapter(**options: Any) -> SparseGINAdapter:
    torch.manual_seed(0)
    made = SparseGINAdapter(WIDTH, scale_init=0.7, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def small_model() -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(11, vocab_size=11, embed_dim=8, depth=3, num_heads=2).eval()


def small_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids) if isinstance(model, SequenceModel) else model(input_ids=ids, use_cache=False).logits
    assert isinstance(out, Tensor)
    return out


def some_ids() -> Tensor:
    return torch.randint(11, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.paper("graph_aware_attention")
def test_which_edges_are_kept() -> None:
    """sigmoid(10 (A - 0.1)) > 0.6 exactly where A > 0.1 + log(0.6 / 0.4) / 10 = 0.14055."""
    edge = 0.1 + math.log(0.6 / 0.4) / 10
    assert edge == pytest.approx(0.1405, abs=1e-4)
    weights = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weights[0, 0, 2] = torch.tensor([edge - 1e-9, edge + 1e-9, 0.7], dtype=torch.float64)
    found = SparseGINAdapter(4).double().graph(weights)[0]
    assert found[2].tolist() == pytest.approx([0, 0.6, 1 / (1 + math.exp(-6))])
    assert not bool(found[:2].any())


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("adjacency", ["sum", "mean", "any"])
@pytest.mark.parametrize("width", [None, 4])
def test_it_is_its_formula(adjacency: str, width: int | None) -> None:
    made, x, maps = adapter(adjacency=adjacency, width=width, mult=1.5), stream(), attention_maps()
    expected = torch.zeros_like(x)
    for batch in range(2):
        nodes = x[batch] if width is None else made.enter(x[batch])
        for i in range(LENGTH):
            mixed = made.eps * nodes[i]
            for j in range(i + 1):
                heads = [float(maps[batch, h, i, j]) for h in range(3)]
                weight = {"sum": min(sum(heads), 1), "mean": sum(heads) / 3, "any": max(heads)}[adjacency]
                link = 1 / (1 + math.exp(-10 * (weight - 0.1)))
                mixed = mixed + (link if link > 0.6 else 0) * nodes[j]
            inner = made.up(mixed)
            out = made.leave(made.down(torch.where(inner > 0, inner, made.act.weight * inner)) + mixed)
            normed = out / (out.square().mean() + 1e-5).sqrt() * made.norm.weight
            expected[batch, i] = x[batch, i] + made.scale * normed
    torch.testing.assert_close(made(x, maps), expected)


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("adjacency", ["sum", "mean", "any"])
def test_messages_go_from_earlier_tokens_to_later_ones(adjacency: str) -> None:
    made, x = adapter(adjacency=adjacency), stream()
    # Even maps that see everything leave no way back.
    everywhere = torch.full((2, 3, LENGTH, LENGTH), 0.5, dtype=torch.float64)
    moved = made(x + torch.eye(LENGTH, dtype=x.dtype)[3, :, None], everywhere) - made(x, everywhere)
    assert not bool(moved[:, :3].any())
    assert bool((moved[:, 4:].abs().amax((0, 2)) > 1e-3).all())


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("made", [small_model, small_llama])
def test_at_scale_zero_the_frozen_model_is_what_it_was(made: Any) -> None:
    model, ids = made(), some_ids()
    before = logits(model, ids)
    frozen = {id(parameter) for parameter in model.parameters()}
    adapters = add_sparse_gin(model, scale_final=0.0)
    assert torch.equal(logits(model, ids), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(adapters) and all(".adapter." in name for name in trained)
    assert not frozen & {id(parameter) for parameter in adapters}
    with torch.no_grad():
        model.get_submodule("blocks.1.adapter" if made is small_model else "model.layers.1.adapter").scale.fill_(0.1)  # type: ignore[operator, union-attr]
    assert not torch.allclose(logits(model, ids), before)


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("made", [small_model, small_llama])
def test_an_adapted_model_is_causal_and_learns(made: Any) -> None:
    model, ids = made(), some_ids()
    adapters = add_sparse_gin(model, width=4)
    scales = [module.scale.item() for module in model.modules() if isinstance(module, SparseGINAdapter)]
    assert scales == [0.0, 0.25, 0.5]
    changed = torch.cat((ids[:, :6], (ids[:, 6:] + 1) % 11), 1)
    torch.testing.assert_close(logits(model, changed)[:, :6], logits(model, ids)[:, :6])
    losses = []
    optimizer = torch.optim.Adam(adapters, 0.05)
    for _ in range(30):
        loss = nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), logits(model, ids))


@pytest.mark.paper("graph_aware_attention")
def test_its_maps_are_those_of_the_layer() -> None:
    """Both kinds of host give the adapter the softmax maps of the attention, computed here from its projections."""
    model, seen = small_model(), []
    add_sparse_gin(model)
    block = model.blocks[0]
    block.get_submodule("adapter").register_forward_pre_hook(lambda module, args: seen.append(args))
    ids = some_ids()
    model(ids)
    inner = block.get_submodule("block")
    hidden = inner.attention_norm(model.embed(ids))  # type: ignore[operator]
    query, key, _ = inner.attention.project(hidden)  # type: ignore[union-attr, operator]
    scores = (query @ key.mT / 2).masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
    x, weights = seen[0]
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(x, model.embed(ids) + inner.attention(hidden, causal=True))  # type: ignore[operator]


@pytest.mark.paper("graph_aware_attention")
def test_generation_goes_without_a_cache() -> None:
    model, ids = small_llama(), some_ids()
    add_sparse_gin(model)
    found = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)  # type: ignore[operator]
    expected = ids
    for _ in range(3):
        expected = torch.cat((expected, logits(model, expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, expected)
    with pytest.raises(ShapeError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)  # type: ignore[operator]


@pytest.mark.paper("graph_aware_attention")
def test_budget_beside_lora() -> None:
    def trained(parameters: list[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters)

    made = SparseGINAdapter(192, width=23)
    linear = 2 * 192 * 23 + 23 + 192 + 2 * (23 * 23 + 23)
    assert trained(list(made.parameters())) == linear + 192 + 3  # the norm's gain; eps, scale and the slope of PReLU
    model = small_model()
    assert trained(add_lora(model, rank=2)) == 3 * 4 * 2 * 2 * 8


def test_refusals() -> None:
    with pytest.raises(OptionError, match="adjacency"):
        SparseGINAdapter(8, adjacency="all")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="layer_index"):
        SparseGINAdapter(8, layer_index=2, num_layers=2)
    with pytest.raises(OptionError, match="hidden unit"):
        SparseGINAdapter(8, mult=0.01)
    with pytest.raises(ShapeError, match="fits its maps"):
        adapter()(stream()[:, :4], attention_maps())
    with pytest.raises(RetrofitError, match="no decoder layer"):
        add_sparse_gin(nn.Linear(3, 3))
    model = SequenceModel(5, vocab_size=5, embed_dim=8, depth=1, num_heads=2, causal=False)
    add_sparse_gin(model)
    with pytest.raises(OptionError, match="causal=True"):
        model(some_ids() % 5)
