"""Synthetic documents in which patterns of tokens and sentences tell the answer: summaries and topic boundaries.

A document is some sentences of equal length, each begun by token :data:`MARKER`, at which the answer is asked. Training
documents are a fixed number, drawn from a seed; test documents are drawn afresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["MARKER", "ExtractiveSummaryToy", "TopicSegmentationToy"]

MARKER = 0


class _Documents(Classification):
    """Inputs ``(batch, sentences * (words_each + 1))`` int64; targets of that shape, ignored but at markers."""

    num_classes = 2
    vocab: int
    train: tuple[Tensor, Tensor]

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` documents of the split, with replacement."""
        if split != "train":
            return self.draw(size, generator)
        inputs, targets = self.train
        chosen = torch.randint(len(inputs), (size,), generator=generator)
        return inputs[chosen], targets[chosen]

    def _assembled(self, words: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Words ``(batch, sentences, words_each)`` from 0 and labels ``(batch, sentences)``, as tokens and targets."""
        marker = torch.full_like(words[..., :1], MARKER)
        targets = torch.full((*words.shape[:2], words.shape[2] + 1), IGNORED)
        targets[..., 0] = labels
        return torch.cat((marker, words + 1), -1).flatten(1), targets.flatten(1)


class ExtractiveSummaryToy(_Documents):
    """Which sentences sum up the document? Those that share key words with another sentence.

    Of ``sentences``, ``salient`` carry two of ``salient`` key words each, every key word being in two sentences; all
    other words of a document are different. Which words are keys changes from document to document: any of the first
    ``content`` of all ``words``, as content words stand beside others in real text. Elsewhere they come like any word,
    so that a word by itself is a weak hint, and none where ``content`` is ``words``. The score is F1 where the
    ``salient`` best sentences of each document are chosen.
    """

    metric = "F1 of the chosen sentences"

    def __init__(
        self,
        documents: int = 500,
        *,
        sentences: int = 8,
        words_each: int = 6,
        salient: int = 3,
        words: int = 300,
        content: int = 60,
        seed: int = 0,
    ) -> None:
        enough = sentences * words_each + salient <= words and salient <= content <= words
        if not 3 <= salient <= sentences or words_each < 2 or documents < 1 or not enough:
            raise OptionError(
                f"Need 3 to {sentences} salient sentences of at least 2 words, and words enough for all to differ; got "
                f"salient={salient}, words_each={words_each}, words={words}, content={content}, documents={documents}."
            )
        self.sentences, self.words_each, self.salient = sentences, words_each, salient
        self.words, self.content = words, content
        self.vocab = words + 1
        self.train = self.draw(documents, torch.Generator().manual_seed(seed))

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``size`` new documents."""
        places = self.sentences * self.words_each
        keys = torch.rand(size, self.content, generator=generator).argsort(-1)[:, : self.salient]
        order = torch.rand(size, self.words, generator=generator).scatter(1, keys, 1.0)  # last, so not among the others
        words = order.argsort(-1)[:, :places].unflatten(1, (self.sentences, self.words_each)).clone()
        chosen = torch.rand(size, self.sentences, generator=generator).argsort(-1)[:, : self.salient]
        slots = torch.rand(size, self.salient, self.words_each, generator=generator).argsort(-1)[..., :2]
        row = torch.arange(size)
        for at in range(self.salient):
            # Its own key word and that of the next salient sentence: a ring of shared words.
            words[row, chosen[:, at], slots[:, at, 0]] = keys[:, at]
            words[row, chosen[:, at], slots[:, at, 1]] = keys[:, (at + 1) % self.salient]
        labels = torch.zeros(size, self.sentences, dtype=torch.int64)
        labels.scatter_(1, chosen, 1)
        return self._assembled(words, labels)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """F1 summed over documents: as many sentences are chosen as there are, so precision is recall."""
        asked = targets != IGNORED
        count = len(targets)
        gain = (outputs[..., 1] - outputs[..., 0])[asked].unflatten(0, (count, -1))
        labels = targets[asked].unflatten(0, (count, -1))
        chosen = gain.topk(self.salient, -1).indices
        return float(labels.gather(1, chosen).double().mean(-1).sum()), count


class TopicSegmentationToy(_Documents):
    """Where does a new topic begin? A topic is a handful of words that its sentences draw from, beside noise.

    Each sentence begins a topic with probability ``shift`` (the first never counts as one); ``noise`` of the words are
    any. Topics are drawn anew for each document. The score is accuracy at sentences.
    """

    def __init__(
        self,
        documents: int = 500,
        *,
        sentences: int = 8,
        words_each: int = 6,
        topic_words: int = 4,
        words: int = 300,
        shift: float = 0.3,
        noise: float = 0.3,
        seed: int = 0,
    ) -> None:
        if not (0 < shift < 1 and 0 <= noise < 1 and topic_words >= 1 and sentences * topic_words <= words):
            raise OptionError(
                "Need 0 < shift < 1, 0 <= noise < 1 and words enough for every sentence's topic; got "
                f"shift={shift}, noise={noise}, topic_words={topic_words}, words={words}."
            )
        self.sentences, self.words_each, self.topic_words, self.words = sentences, words_each, topic_words, words
        self.shift, self.noise, self.vocab = shift, noise, words + 1
        self.train = self.draw(documents, torch.Generator().manual_seed(seed))

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``size`` new documents."""
        shape = (size, self.sentences, self.words_each)
        order = torch.rand(size, self.words, generator=generator).argsort(-1)
        topics = order[:, : self.sentences * self.topic_words].unflatten(1, (self.sentences, self.topic_words))
        labels = (torch.rand(size, self.sentences, generator=generator) < self.shift).long()
        labels[:, 0] = 0
        which = labels.cumsum(-1)
        own = topics[torch.arange(size)[:, None], which]
        words = own.gather(2, torch.randint(self.topic_words, shape, generator=generator))
        noisy = torch.rand(shape, generator=generator) < self.noise
        return self._assembled(torch.where(noisy, torch.randint(self.words, shape, generator=generator), words), labels)
