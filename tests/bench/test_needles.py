from __future__ import annotations

import pytest
import torch

from regard.bench.recall import PairedRecall
from regard.bench.retrieval import NEEDLES, needle
from regard.bench.tasks import IGNORED
from regard.errors import OptionError


@pytest.mark.paper("titans")
@pytest.mark.parametrize("style", NEEDLES)
def test_the_needle_is_in_the_text_and_is_the_answer(style: str) -> None:
    task = needle(style, 128, digits=4, fillers=20)
    inputs, targets = task.batch(16, torch.Generator().manual_seed(0))
    kinds = {"passkey": 10, "number": 10, "word": 26}[style]
    assert task.num_classes == kinds and task.vocab_size == 20 + 4 * (kinds + 1)
    assert int(inputs.max()) == task.vocab_size - 1
    for row, answers in zip(inputs, targets[:, -4:], strict=True):
        symbols = [int(t) - 20 for t in row[:-4] if int(t) >= 20]
        assert [divmod(symbol, kinds) for symbol in symbols] == list(enumerate(answers.tolist()))
    assert bool((targets[:, :-4] == IGNORED).all())
    # Where the same place of the repeated sentence is seen twice, it reads the same.
    hay = torch.where(inputs[:, :-4] < 20, inputs[:, :-4], -1)
    same = (hay[:, 16:] == hay[:, :-16])[(hay[:, 16:] >= 0) & (hay[:, :-16] >= 0)]
    assert bool(same.all()) == (style == "passkey")


def test_unknown_needles_are_refused() -> None:
    with pytest.raises(OptionError, match="passkey, number, word"):
        needle("haystack")
    with pytest.raises(OptionError, match="kinds"):
        needle("word", kinds=1)


@pytest.mark.paper("titans")
def test_far_queries_stand_behind_the_distance() -> None:
    task = PairedRecall(length=512, pairs=16, keys=32, memory=64, distance=256)
    for split, first in (("train", 64), ("test", 64 + 256)):
        inputs, targets = task.batch(32, torch.Generator().manual_seed(0), split)
        asked = (targets != IGNORED).nonzero()[:, 1]
        assert len(asked) == 32 * 16
        assert int(asked.min()) >= first and (split == "test" or int(asked.min()) < 128)
        stored = inputs[:, :, 32:48].sum(-1).nonzero()[:, 1]
        assert int(stored.max()) < 64
    with pytest.raises(OptionError, match="behind a memory"):
        PairedRecall(length=512, memory=64, distance=448)
