"""The block task: every text has its answer, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.bench.block_tasks import find_block_task
from regard.bench.tasks import IGNORED
from regard.errors import OptionError


@pytest.mark.paper("mta")
@pytest.mark.parametrize("ask", ["all", "first", "last", "missing"])
def test_one_block_holds_the_query_and_the_answer_is_its(ask: Any) -> None:
    task = find_block_task(block_len=3, query_len=2, blocks=8, vocab=10, ask=ask)
    inputs, targets = task.batch(64, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (64, task.length)
    for text, answer in zip(inputs.tolist(), targets.tolist(), strict=True):
        end = text.index(task.vocab + 1)
        letters = " ".join(map(str, text[:end])).split(f" {task.vocab} ")
        blocks = [[int(letter) for letter in block.split()] for block in letters]
        query = text[end + 1 : end + 3]
        holding = [block for block in blocks if set(query) <= set(block)]
        assert len(blocks) == 8 and len(holding) == 1 and all(len(set(block)) == 3 for block in blocks)
        (block,) = holding
        expected = {
            "all": block,
            "first": block[:1],
            "last": block[-1:],
            "missing": [letter for letter in block if letter not in query],
        }[ask]
        assert [a for a in answer if a != IGNORED] == expected == answer[-len(expected) :]
        assert text[end + 3 :] == expected[:-1]


@pytest.mark.paper("mta")
def test_sizes_of_the_paper_and_the_score_of_whole_answers() -> None:
    task = find_block_task()
    inputs, targets = task.batch(4, torch.Generator().manual_seed(0))
    assert inputs.shape == (4, 318)  # 319 letters with the last of the answer
    outputs = torch.nn.functional.one_hot(targets.clamp_min(0), task.num_classes).float()
    assert task.score(outputs, targets) == (4.0, 4)
    outputs[1, -2] = outputs[1, -2].roll(1)
    assert task.score(outputs, targets) == (3.0, 4)
    assert task.chance == 1 / (26 * 25 * 24 * 23 * 22)
    assert find_block_task(3, 2, 8, 10, "missing").chance == 1 / 8


@pytest.mark.parametrize(
    "options",
    [{"block_len": 26}, {"query_len": 6}, {"query_len": 0}, {"blocks": 0}, {"ask": "none"}, {"ask": "missing"}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        find_block_task(**options)
