"""Sentiment words: the class is the majority, and is seen in nothing else."""

from __future__ import annotations

import pytest
import torch

from regard.bench.sentiment_tasks import SentimentWords
from regard.errors import OptionError


def test_the_class_is_the_majority() -> None:
    task = SentimentWords(length=40)
    tokens, target = task.batch(500, torch.Generator().manual_seed(0))
    assert tokens.shape == (500, 40) and bool((tokens[:, 0] == task.cls).all()) and int(tokens.max()) < task.vocab_size
    sentiment = task.sentiment(tokens)
    assert torch.equal(sentiment.sum(-1) > 0, target == 1)
    charged = (sentiment != 0).sum(-1)
    assert bool((charged % 2 == 1).all()) and set(charged.tolist()) == {5, 7, 9}
    # Every majority comes up, unanimity and the closest call alike.
    majority = sentiment.sum(-1).abs()[charged == 9]
    assert set(majority.tolist()) == {1, 3, 5, 7, 9}
    assert 0.4 < float(target.float().mean()) < 0.6


def test_unknown_tokens_fill_up_the_end() -> None:
    tokens, _ = SentimentWords(length=40).batch(300, torch.Generator().manual_seed(1))
    filled = tokens == 1
    assert torch.equal(filled.sort(-1).values, filled)
    lengths = (~filled).sum(-1)
    assert int(lengths.max()) == 40 and 20 <= int(lengths.min()) <= 22


def test_too_short_documents_are_refused() -> None:
    with pytest.raises(OptionError, match="24 tokens"):
        SentimentWords(length=20)
