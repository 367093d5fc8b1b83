from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.bench.memory_tasks import (
    COMPASS,
    DANCES,
    Ballet,
    ObjectPermanence,
    PairedChunkRecall,
    RapidWordLearning,
)
from regard.bench.tasks import IGNORED
from regard.errors import OptionError, UnsupportedPatternError
from regard.models.hcam import HierarchicalMemoryAgentCore

TASKS = [
    PairedChunkRecall(4, 4, 2, 4, 2, 6, 3, 8),
    Ballet(2, 8, test_dancers=3, test_delay=12),
    ObjectPermanence(3, 4, 16, 4, test_delay=8),
    RapidWordLearning(test_phases=3),
]


def core(**options: int | None) -> HierarchicalMemoryAgentCore:
    settings = {"input_dim": 5, "embed_dim": 16, "num_heads": 2, "chunk_size": 4, "top_k": 2, **options}
    return HierarchicalMemoryAgentCore(3, **settings).double()  # type: ignore[arg-type]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.paper("hcam")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("slots", [None, 2])
def test_actor_and_learner_agree(window: int | None, slots: int | None) -> None:
    model, x = core(window=window, slots=slots), draw(2, 21, 5)
    state, outs = model.init_state(2, like=x), []
    for piece in x.split([1, 2, 9, 1, 8], 1):
        out, state = model.step(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), model(x), rtol=0, atol=1e-12)


@pytest.mark.paper("hcam")
@pytest.mark.parametrize("window", [None, 6])
def test_reset_begins_an_episode(window: int | None) -> None:
    model, x = core(window=window), draw(2, 20, 5)
    _, state = model.step(x[:, :7], model.init_state(2, like=x))
    out, _ = model.step(x[:, 7:], state.reset(torch.tensor([True, False])))
    torch.testing.assert_close(out[:1], model(x[:1, 7:]), rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1:], model(x[1:])[:, 7:], rtol=0, atol=1e-12)


@pytest.mark.paper("hcam")
def test_learner_keeps_episodes_apart() -> None:
    model, x = core(), draw(1, 24, 5)
    episode = (torch.arange(24) >= 12).long()[None]
    torch.testing.assert_close(model(x, episode=episode)[:, 12:], model(x[:, 12:]), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x)[:, 12:], model(x[:, 12:]))
    with pytest.raises(UnsupportedPatternError):
        core(window=4)(x, episode=episode)


def test_tokens_and_options() -> None:
    model = HierarchicalMemoryAgentCore(3, vocab_size=7, embed_dim=16)
    assert model(torch.randint(7, (2, 9))).shape == (2, 9, 3)
    for wrong in ({}, {"input_dim": 3, "vocab_size": 4}, {"input_dim": 3, "window": 1}):
        with pytest.raises(OptionError):
            HierarchicalMemoryAgentCore(3, **wrong)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.paper("hcam")
def test_paired_chunks_hold_the_answers() -> None:
    task = PairedChunkRecall(events=6, details=3, distractors=2, test_distractors=9, questions=5)
    for split, count in (("train", 8), ("test", 15)):
        inputs, targets = task.batch(4, generator(), split)
        assert inputs.shape == (4, count * 8 + 5, task.input_dim)
        assert bool((targets[:, :-5] == IGNORED).all())
        for row in range(4):
            events = inputs[row, : count * 8].unflatten(0, (count, 8))
            for question, answer in zip(inputs[row, -5:], targets[row, -5:], strict=True):
                shown = (events[..., :16] == question[:16]).all(-1).any(-1)
                assert int(shown.sum()) == 1 and int(shown.nonzero()) < 6
                detail = events[shown][0][:, 16:19] == question[16:19]
                assert int(events[shown][0][detail.all(-1)][0, 19:27].argmax()) == int(answer)


@pytest.mark.paper("hcam")
def test_ballet() -> None:
    turns = {"N": (0, 1), "S": (0, -1), "E": (1, 0), "W": (-1, 0)}
    offsets = torch.tensor([[sum(turns[c][axis] for c in name) for axis in range(2)] for name in COMPASS])
    task = Ballet(4, 5, test_dancers=8, test_delay=9)
    walked = torch.einsum("dtm,ma->dta", task.moves, offsets.float()).cumsum(1)
    assert not bool(walked[:, -1].any()), "dancers come back to their place"
    assert float(walked.abs().max()) == 1, "and stay near it"
    assert len(task.moves.flatten(1).unique(dim=0)) == len(DANCES)
    for split, dancers, delay in (("train", 4, 5), ("test", 8, 9)):
        inputs, targets = task.batch(6, generator(), split)
        show = inputs[:, :-1].unflatten(1, (dancers, 16 + delay))
        assert not bool(show[:, :, 16:].any())
        named = inputs[:, -1, -len(DANCES) :].argmax(-1)
        danced = (show[:, :, :16, 16:24] == task.moves[named][:, None]).all(-1).all(-1)
        assert bool((danced.sum(1) == 1).all())
        assert torch.equal(show[danced][:, 0, 8:16].argmax(-1), targets[:, -1])


@pytest.mark.paper("hcam")
def test_object_permanence() -> None:
    task = ObjectPermanence(test_delay=40)
    inputs, targets = task.batch(6, generator(), "test")
    assert inputs.shape[1] == 48 + 40 + 4 and not bool(inputs[:, 48:-4].any())
    for row in range(6):
        for question, box in zip(inputs[row, -4:], targets[row, -4:], strict=True):
            jumps = inputs[row, :48][(inputs[row, :48, :8] == question[:8]).all(-1)]
            assert len(jumps) >= 1 and bool((jumps[:, 8:16].argmax(-1) == box).all())


@pytest.mark.paper("hcam")
def test_rapid_word_learning() -> None:
    task = RapidWordLearning(test_phases=3)
    inputs, targets = task.batch(6, generator(), "test")
    assert inputs.shape[1] == 4 * 4 * 4 + 4
    for row in range(6):
        for question, place in zip(inputs[row, -4:], targets[row, -4:], strict=True):
            line_up = question[16:-1].unflatten(0, (3, 8))
            named = inputs[row, :16][(inputs[row, :16, :8] == question[:8]).all(-1)]
            assert len(named) == 4 and torch.equal(named[0, 8:16], line_up[place])
            known = (inputs[row, :16, None, 8:16] == line_up).all(-1).any(0)
            assert bool(known.all()) and len(line_up.unique(dim=0)) == 3


@pytest.mark.paper("hcam")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_every_task_can_be_learned(task: PairedChunkRecall) -> None:
    """A small core fits one batch."""
    model = HierarchicalMemoryAgentCore(task.num_classes, input_dim=task.input_dim, embed_dim=32, depth=1, chunk_size=4)
    inputs, targets = task.batch(8, generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = task.loss(model(inputs), targets)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert model(task.batch(2, generator(), "test")[0]).shape[-1] == task.num_classes


def test_impossible_tasks_are_refused() -> None:
    for wrong in (
        lambda: PairedChunkRecall(details=8),
        lambda: Ballet(9),
        lambda: ObjectPermanence(9),
        lambda: RapidWordLearning(choices=5),
    ):
        with pytest.raises(OptionError):
            wrong()
