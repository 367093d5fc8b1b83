"""Dual Attention Transformers: shared symbols, cached decoding, initialisation, and images."""

from __future__ import annotations

import math

import pytest
import torch

from regard.bench.relational_tasks import ArgSort, ModularPolynomials, RelationalGame
from regard.dense.dual_attention import DualAttention
from regard.errors import OptionError, ShapeError
from regard.layers.symbols import SymbolicAttention
from regard.models.dual_attention import DATDecoderLM, DATEncoder, ViDAT


@pytest.mark.paper("dual_attention")
def test_blocks_share_one_retriever_that_reads_what_enters_them() -> None:
    torch.manual_seed(0)
    model, x = DATEncoder(16, 2, 4).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    (retriever,) = model.symbols
    assert isinstance(retriever, SymbolicAttention)
    hidden = x
    for block in model.blocks:
        attention = block.attention
        assert isinstance(attention, DualAttention) and attention.symbols is None
        hidden = hidden + attention(block.attention_norm(hidden), symbols=retriever(hidden))
        hidden = hidden + block.mlp(block.mlp_norm(hidden))
    torch.testing.assert_close(model(x), hidden)
    assert len(DATEncoder(16, 3, 4, shared_symbols=False).symbols) == 3
    assert len(DATEncoder(16, 3, 4, 0).symbols) == 0


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("symbols", ["symbolic", "positional", "relative"])
def test_language_model_decodes_as_it_reads(symbols: str) -> None:
    torch.manual_seed(0)
    model = DATDecoderLM(11, embed_dim=16, symbols=symbols).double().eval()
    tokens = torch.randint(11, (2, 9))
    logits = model(tokens)
    state, outs = model.init_state(2, like=model.embed.weight), []
    for part in tokens.split([1, 4, 1, 3], 1):
        out, state = model.step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), logits)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5], rtol=0, atol=1e-12)
    with pytest.raises(OptionError, match="causal"):
        DATEncoder(16, 1, 4).step(torch.randn(1, 1, 16), [])


def test_language_model_begins_as_released() -> None:
    torch.manual_seed(0)
    model = DATDecoderLM(50, embed_dim=64, depth=8)
    assert model.head.weight is model.embed.weight
    parameters = dict(model.named_parameters())
    for name, expected in (
        ("embed.weight", 0.02),
        ("encoder.blocks.3.attention.sensory.query.weight", 0.02),
        ("encoder.blocks.3.attention.relational.rel_out", 0.02),
        ("encoder.blocks.3.attention.relational.out.weight", 0.02 / math.sqrt(16)),
        ("encoder.blocks.3.mlp.2.weight", 0.02 / math.sqrt(16)),
        ("encoder.symbols.0.library", 1.0),
    ):
        assert float(parameters[name].detach().std()) == pytest.approx(expected, rel=0.15), name


@pytest.mark.paper("dual_attention")
def test_images() -> None:
    torch.manual_seed(0)
    model = ViDAT((8, 12), 4, in_channels=1, num_classes=5, embed_dim=16).double()
    images = torch.randn(3, 1, 8, 12, dtype=torch.float64)
    assert model(images).shape == (3, 5)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(3, 6, 16)
    tokens = torch.cat((model.class_token.expand(3, 1, -1), model.patches(patches)), 1) + model.positions
    torch.testing.assert_close(model(images), model.head(model.encoder(tokens)[:, 0]))
    attention = model.encoder.blocks[0].attention
    relations = attention.relational.relations(tokens)  # type: ignore[union-attr]
    torch.testing.assert_close(relations, relations.transpose(1, 2))
    pooled = ViDAT((8, 8), 4, symbols="symbolic", pool="mean", embed_dim=16)
    assert pooled(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(ShapeError):
        model(images[..., :8])
    for size, pool in (((8, 9), "cls"), ((8, 8), "max")):
        with pytest.raises(OptionError):
            ViDAT(size, 4, pool=pool)


@pytest.mark.parametrize("relation", ["same", "between", "match_pattern"])
def test_relational_games(relation: str) -> None:
    task = RelationalGame(relation, samples=40)
    for split in ("train", "test"):
        inputs, targets = task.batch(60, torch.Generator().manual_seed(0), split)
        assert 0.25 < float(targets.double().mean()) < 0.75
        for objects, target in zip(inputs, targets, strict=True):
            alike = (objects[:, None] == objects).all(-1)
            if relation == "same":
                holds = bool(alike[0, 1])
            elif relation == "between":
                holds = bool(alike[0, 2] and not alike[0, 1])
            else:
                holds = torch.equal(alike[:3, :3], alike[3:, 3:])
            assert holds == bool(target)
        from_pool = (inputs[:, :, None] == task.pool).all(-1).any(-1)
        assert bool(from_pool.all()) if split == "train" else not bool(from_pool.any())
    drawn = torch.cat([task.batch(100, torch.Generator().manual_seed(s))[0] for s in range(3)]).flatten(1)
    assert len(drawn.unique(dim=0)) <= 40
    with pytest.raises(OptionError):
        RelationalGame("other")


def test_argsort_and_polynomials() -> None:
    task = ArgSort(5, pool=9)
    inputs, ranks = task.batch(8, torch.Generator().manual_seed(0), "test")
    place = (inputs[:, :, None] == task.pool).all(-1).int().argmax(-1)
    for row in range(8):
        assert [sorted(place[row].tolist()).index(p) for p in place[row].tolist()] == ranks[row].tolist()
    text, targets = ModularPolynomials(5, 2).batch(20, torch.Generator().manual_seed(0))
    for row, target in zip(text.tolist(), targets.tolist(), strict=True):
        a, b, c, bar, x, equals = row
        assert (bar, equals) == (5, 6) and target == [-100] * 5 + [(a * x * x + b * x + c) % 5]
    with pytest.raises(OptionError):
        ArgSort(9, pool=5)
