"""Finding the block of letters that contains all letters of a query: a match that takes several tokens at once."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["FindBlock", "find_block_task"]

ASKS = ("all", "first", "last", "missing")


class FindBlock(Classification):
    """``abc.dbe.cda#be`` and then ``dbe``: of blocks of distinct letters, just one holds all letters of the query.

    After Golovneva et al., "Multi-Token Attention", 2025, arXiv 2504.00927, section 4.1. Inputs ``(batch, length)``:
    letters are tokens ``0 .. vocab - 1``, then ``.`` and ``#``. ask: ``"all"`` of that block, its ``"first"`` or
    ``"last"`` letter, or its one letter that is ``"missing"`` from the query; targets are the answer's letters, ignored
    elsewhere. Metric: share of sequences whose answer is right from end to end, given its earlier letters.
    """

    def __init__(
        self,
        block_len: int = 5,
        query_len: int = 2,
        blocks: int = 52,
        vocab: int = 26,
        ask: Literal["all", "first", "last", "missing"] = "all",
    ) -> None:
        if not 1 <= query_len <= block_len < vocab or blocks < 1 or ask not in ASKS:
            raise OptionError(
                "Needs 1 <= query_len <= block_len < vocab (with as many letters as a block is long, every block would "
                f"hold the query), blocks >= 1 and ask one of {', '.join(ASKS)}; got query_len={query_len}, "
                f"block_len={block_len}, vocab={vocab}, blocks={blocks}, ask={ask!r}."
            )
        if ask == "missing" and query_len != block_len - 1:
            raise OptionError(f"One letter is missing where query_len is block_len - 1 = {block_len - 1}.")
        self.block_len, self.query_len, self.blocks, self.vocab, self.ask = block_len, query_len, blocks, vocab, ask
        self.vocab_size = self.num_classes = vocab + 2
        self.answer_len = block_len if ask == "all" else 1
        self.length = blocks * (block_len + 1) + query_len + self.answer_len - 1

    @property
    def chance(self) -> float:
        """Of guessing letters that are not in the query where one is missing, and any distinct ones elsewhere."""
        if self.ask == "missing":
            return 1 / (self.vocab - self.query_len)
        return 1 / math.perm(self.vocab, self.answer_len)

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` texts and their answers."""

        def shuffled(count: int, *shape: int) -> Tensor:
            return torch.rand(*shape, count, generator=generator).argsort(-1)

        wanted = shuffled(self.vocab, size)[:, : self.block_len]
        order = shuffled(self.block_len, size)
        query = wanted.gather(1, order[:, : self.query_len])
        texts = shuffled(self.vocab, size, self.blocks)[..., : self.block_len]
        while True:
            found = (texts[:, :, :, None] == query[:, None, None]).any(2).all(-1)
            if not found.any():
                break
            texts[found] = shuffled(self.vocab, int(found.sum()))[:, : self.block_len]
        place = torch.randint(self.blocks, (size,), generator=generator)
        texts[torch.arange(size), place] = wanted
        dot, hash_sign = torch.full((size, self.blocks, 1), self.vocab), torch.full((size, 1), self.vocab + 1)
        prompt = torch.cat((torch.cat((texts, dot), -1).flatten(1)[:, :-1], hash_sign, query), 1)
        if self.ask == "missing":
            answer = wanted.gather(1, order[:, self.query_len :])
        else:
            answer = {"all": wanted, "first": wanted[:, :1], "last": wanted[:, -1:]}[self.ask]
        inputs = torch.cat((prompt, answer[:, :-1]), 1)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -self.answer_len :] = answer
        return inputs, targets

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        right = (outputs.argmax(-1) == targets) | (targets == IGNORED)
        return float(right.all(-1).sum()), len(targets)


def find_block_task(
    block_len: int = 5,
    query_len: int = 2,
    blocks: int = 52,
    vocab: int = 26,
    ask: Literal["all", "first", "last", "missing"] = "all",
) -> FindBlock:
    """The task of :class:`FindBlock`; by default the paper's, whose texts with their answers have 319 letters."""
    return FindBlock(block_len, query_len, blocks, vocab, ask)
