from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.models.titans import TitansLMM, TitansMAC, TitansMAG, TitansMAL

SMALL: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, Any] = {
    "context": lambda: TitansMAC(11, **SMALL, segment=8, persistent=3, memory={"chunk_size": 4}),
    "gate": lambda: TitansMAG(11, **SMALL, window=5, persistent=3, memory={"chunk_size": 4}),
    "layer": lambda: TitansMAL(11, **SMALL, window=5, persistent=3, memory={"chunk_size": 4}),
    "memory": lambda: TitansLMM(11, **SMALL, memory={"chunk_size": 4}),
}


@pytest.mark.paper("titans")
@pytest.mark.parametrize("name", MODELS)
def test_causal_and_the_same_step_by_step(name: str) -> None:
    model = MODELS[name]().double()
    tokens = torch.randint(11, (2, 21))
    logits = model(tokens)
    assert logits.shape == (2, 21, 11)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :9], logits[:, :9], rtol=0, atol=1e-13)
    state, rows = model.init_state(2), []
    for piece in tokens.split((10, 1, 1, 9), 1):
        out, state = model.step(piece, state)
        rows.append(out)
    torch.testing.assert_close(torch.cat(rows, 1), logits, rtol=0, atol=1e-11)


@pytest.mark.paper("titans")
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_through_what_the_memory_learned(name: str) -> None:
    """Initial weights, gates and projections of the memory all get a gradient, and a few steps lower the loss."""
    model = MODELS[name]()
    tokens = torch.randint(11, (4, 24))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    reached = {path for path, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {path for path, _ in model.named_parameters()}


@pytest.mark.paper("titans")
def test_state_does_not_grow() -> None:
    model = TitansMAG(11, **SMALL, window=5, persistent=3, memory={"chunk_size": 4})
    state, sizes = model.init_state(1), []
    for _ in range(3):
        _, state = model.step(torch.randint(11, (1, 12)), state)
        sizes.append([part.kept[0].shape[2] for part in state])
    assert sizes == [[7, 7]] * 3  # three persistent tokens and a window less the token to come


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="integers"):
        TitansLMM(11, **SMALL)(torch.zeros(1, 4))
    with pytest.raises(OptionError, match="num_layers"):
        TitansLMM(11, num_layers=0)
