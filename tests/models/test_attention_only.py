from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.bench.sequence_tasks import sequence_task
from regard.bench.training import evaluate, fit
from regard.dense.full import FullAttention
from regard.errors import ShapeError
from regard.models.attention_only import AttentionOnlyModel


@pytest.mark.paper("slay")
def test_it_is_attention_alone() -> None:
    """Every layer is h + attention(h): with output projections at zero the answer is linear in the embeddings."""
    model = AttentionOnlyModel(9, 4, embed_dim=16, num_heads=2, max_length=12)
    assert not any(isinstance(m, nn.LayerNorm | nn.GELU) for m in model.modules())
    tokens = torch.randint(9, (3, 10), generator=torch.Generator().manual_seed(0))
    hidden = model.embed(tokens) + model.positions.weight[:10]
    expected = hidden
    for layer in model.layers:
        expected = expected + layer(expected, causal=True)
    torch.testing.assert_close(model(tokens), model.head(expected))
    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(layer.out.bias)  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(model(tokens), model.head(hidden))
    with pytest.raises(ShapeError):
        model(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.paper("slay")
def test_causal_and_built_mechanisms() -> None:
    torch.manual_seed(0)
    named = AttentionOnlyModel(9, 4, embed_dim=16, num_heads=2, max_length=12)
    built = AttentionOnlyModel(9, 4, embed_dim=16, num_heads=2, max_length=12, mechanism=FullAttention)
    built.load_state_dict(named.state_dict())
    tokens = torch.randint(9, (3, 10), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(built(tokens), named(tokens))
    later = torch.cat((tokens[:, :6], (tokens[:, 6:] + 1) % 9), 1)
    torch.testing.assert_close(named(later)[:, :6], named(tokens)[:, :6])


@pytest.mark.paper("slay")
def test_it_learns_a_task() -> None:
    torch.manual_seed(0)
    task = sequence_task("first_token", length=12, vocab_size=6)
    model = AttentionOnlyModel(task.vocab_size, task.num_classes, embed_dim=32, num_heads=2, depth=1, mechanism="slay")
    fit(model, task, steps=150, batch_size=32, lr=1e-2)
    assert evaluate(model, task, batches=2)[1] > 0.9
