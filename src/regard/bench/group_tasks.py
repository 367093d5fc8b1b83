"""Tasks that a group of thinkers can share out, and how fast it is done with them.

A task is a list of things to say, each once, whoever says it: :func:`enumerate_items` (the targets of the prompt) and
:func:`all_pairs_shortest_path_toy` (the distance of each pair of nodes). Completion coverage is the share of the list
that all thinkers together have said, by step; it is what Group Think (arXiv 2505.11107, section 4) measures latency by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.decode.group_think import ABSENT, GroupThinkDecoder, greedy
from regard.errors import OptionError

__all__ = [
    "EnumerateItems",
    "GroupTask",
    "LatencyCurve",
    "ShortestPaths",
    "all_pairs_shortest_path_toy",
    "enumerate_items",
    "latency_curve",
]

GROUPS = (1, 2, 4)


class GroupTask(ABC):
    """A list shared out among 1, 2 or 4 thinkers.

    Tokens: ``things`` first, then what a task adds, then the end, the separator, a sign for each size of group and a
    header for each thinker. In a demonstration a thinker says, at random, something of its own part (things whose
    number is its own modulo the group's size) that nobody has said as far as it can see; when nothing of its part is
    left it helps the others, and when nothing is left at all it ends.
    """

    def __init__(self, things: int, extra: int, rounds: int, words: int) -> None:
        self.things, self.rounds, self.words = things, rounds, words
        self.end, self.separator = things + extra, things + extra + 1
        self.vocab_size = things + extra + 2 + len(GROUPS) + max(GROUPS)

    @property
    def steps(self) -> int:
        """Steps that one thinker alone needs, the end included."""
        return self.rounds * self.words + 1

    def headers(self, n_thinkers: int) -> list[list[int]]:
        """The first token of each thinker."""
        self._group(n_thinkers)
        first = self.separator + 1 + len(GROUPS)
        return [[first + n] for n in range(n_thinkers)]

    def prompts(self, size: int, generator: torch.Generator, n_thinkers: int) -> Tensor:
        """``size`` random problems as token ids ``(size, length)``, for a group of ``n_thinkers``."""
        return self.for_group(self._problems(size, generator), n_thinkers)

    def for_group(self, problems: Tensor, n_thinkers: int) -> Tensor:
        """The same problems for a group of another size: prompts without their first token, or whole prompts."""
        sign = torch.full((len(problems), 1), self.separator + 1 + self._group(n_thinkers))
        return torch.cat((sign, problems[:, -self._problem_length() :]), 1)

    def demonstrations(
        self, size: int, generator: torch.Generator, n_thinkers: int, *, same_step: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, traces ``(size, thinkers, 1 + steps)`` with headers and -1 behind each end, and what the next token
        of each place is drawn from, ``(size, thinkers, 1 + steps, vocab)``.

        same_step: whether the thinkers will see each other's tokens of the step that is read (as in
        :func:`~regard.decode.group_think.group_mask`). If not, a thing of one word is known a round late.
        """
        delay = 0 if same_step or self.words > 1 else 1
        prompts = self.prompts(size, generator, n_thinkers)
        left = [self._asked(prompts)[:, None].expand(-1, n_thinkers, -1)] * (delay + 1)
        part = torch.arange(self.things) % n_thinkers == torch.arange(n_thinkers)[:, None]
        active = torch.ones(size, n_thinkers, dtype=torch.bool)
        header = torch.tensor(self.headers(n_thinkers)).T
        tokens = [header[0].expand(size, -1)]
        chances = [F.one_hot(tokens[0], self.vocab_size).float()]
        own_said = torch.zeros(size, n_thinkers, self.things, dtype=torch.bool)
        while active.any():
            open_now = left[0] & ~own_said
            mine = open_now & part
            choice = torch.where(mine.any(-1, keepdim=True), mine, open_now).float()
            done = choice.sum(-1) == 0
            share = choice / choice.sum(-1, keepdim=True).clamp_min(1)
            pick = torch.multinomial((share + done[..., None]).flatten(0, 1), 1, generator=generator)
            pick = pick.view(size, n_thinkers).masked_fill(done | ~active, ABSENT)
            wide = F.pad(share, (0, self.vocab_size - self.things))
            wide[..., self.end] = done.float()
            said = F.one_hot(pick.clamp_min(0), self.things).bool() & (pick >= 0)[..., None]
            tokens.append(torch.where(done, self.end, pick).masked_fill(~active, ABSENT))
            chances.append(wide)
            for word in self._say(prompts, pick)[1:]:
                tokens.append(word.masked_fill(pick < 0, ABSENT))
                chances.append(F.one_hot(word.clamp_min(0), self.vocab_size).float())
            own_said = own_said | said
            left = [*left[1:], left[-1] & ~said.any(1, keepdim=True)]
            active = active & ~done
        # The round in which the last thinker ends is one word long.
        length = len(tokens) - self.words + 1
        return prompts, torch.stack(tokens, 2)[:, :, :length], torch.stack(chances, 2)[:, :, :length]

    def coverage(self, prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of traces without headers ``(batch, thinkers, steps)``: the share of the list that is said after each step,
        and how many of the things said by then had been said before or in the same step, both ``(batch, steps)``."""
        asked = self._asked(prompts)
        things, right = self._read(prompts, tokens)  # (batch, thinkers, steps)
        counts = F.one_hot(things.clamp_min(0), self.things) * (right & (things >= 0))[..., None]
        total = counts.sum(1).cumsum(1)  # (batch, steps, things)
        said = (total > 0) & asked[:, None]
        share = said.sum(-1) / asked.sum(-1, keepdim=True)
        return share, (total * asked[:, None]).sum(-1) - said.sum(-1)

    def _group(self, n_thinkers: int) -> int:
        if n_thinkers not in GROUPS:
            raise OptionError(f"These tasks are for groups of {GROUPS}; got {n_thinkers} thinkers.")
        return GROUPS.index(n_thinkers)

    @abstractmethod
    def _problem_length(self) -> int:
        """Tokens of a prompt behind the sign of the group."""

    @abstractmethod
    def _problems(self, size: int, generator: torch.Generator) -> Tensor:
        """Random problems as token ids, the separator last."""

    @abstractmethod
    def _asked(self, prompts: Tensor) -> Tensor:
        """Which things are to be said, boolean ``(batch, things)``."""

    @abstractmethod
    def _say(self, prompts: Tensor, pick: Tensor) -> list[Tensor]:
        """The words for things ``(batch, thinkers)``, the thing's own token first."""

    @abstractmethod
    def _read(self, prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The thing that is completed at each place (-1 for none), and whether what is said of it is right."""


class EnumerateItems(GroupTask):
    """Say ``targets`` random items out of ``items``, each once. Prompt: the group, the targets, the separator."""

    def __init__(self, items: int = 32, targets: int = 12) -> None:
        if not 1 <= targets <= items:
            raise OptionError(f"{targets} targets cannot be drawn from {items} items.")
        super().__init__(items, 0, targets, 1)
        self.targets = targets

    def _problem_length(self) -> int:
        return self.targets + 1

    def _problems(self, size: int, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(size, self.things, generator=generator).argsort(-1)[:, : self.targets]
        return F.pad(drawn, (0, 1), value=self.separator)

    def _asked(self, prompts: Tensor) -> Tensor:
        return F.one_hot(prompts[:, 1:-1], self.things).any(1)

    def _say(self, prompts: Tensor, pick: Tensor) -> list[Tensor]:
        return [pick]

    def _read(self, prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        things = tokens.masked_fill(tokens >= self.things, ABSENT)
        return things, things >= 0


class ShortestPaths(GroupTask):
    """Say the shortest distance of each pair of nodes of a complete graph: the pair's token, then the distance's.

    Prompt: the group, the weight of each pair (1 to ``longest``), the separator. A pair counts as covered when the
    right distance follows it.
    """

    def __init__(self, nodes: int = 4, longest: int = 6) -> None:
        if nodes < 2 or longest < 1:
            raise OptionError(f"Need two nodes and weights from 1 on; got {nodes} nodes, longest {longest}.")
        pairs = nodes * (nodes - 1) // 2
        super().__init__(pairs, longest, pairs, 2)
        self.nodes, self.longest = nodes, longest

    def distances(self, prompts: Tensor) -> Tensor:
        """Shortest distances by Floyd and Warshall, ``(batch, pairs)``."""
        first, second = torch.triu_indices(self.nodes, self.nodes, 1)
        table = torch.zeros(len(prompts), self.nodes, self.nodes, dtype=torch.int64)
        table[:, first, second] = table[:, second, first] = prompts[:, 1:-1] - self.things + 1
        for middle in range(self.nodes):
            table = torch.minimum(table, table[:, :, middle, None] + table[:, None, middle])
        return table[:, first, second]

    def _problem_length(self) -> int:
        return self.things + 1

    def _problems(self, size: int, generator: torch.Generator) -> Tensor:
        weights = torch.randint(self.longest, (size, self.things), generator=generator) + self.things
        return F.pad(weights, (0, 1), value=self.separator)

    def _asked(self, prompts: Tensor) -> Tensor:
        return torch.ones(len(prompts), self.things, dtype=torch.bool)

    def _say(self, prompts: Tensor, pick: Tensor) -> list[Tensor]:
        return [pick, self.distances(prompts).gather(1, pick.clamp_min(0)) - 1 + self.things]

    def _read(self, prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        before = F.pad(tokens, (1, 0), value=ABSENT)[..., :-1]
        distance = tokens - self.things + 1
        complete = (before >= 0) & (before < self.things) & (distance >= 1) & (distance <= self.longest)
        things = before.masked_fill(~complete, ABSENT)
        true = self.distances(prompts).gather(1, things.clamp_min(0).flatten(1)).view_as(things)
        return things, complete & (distance == true)


def enumerate_items(items: int = 32, targets: int = 12) -> EnumerateItems:
    """The task of saying ``targets`` of ``items``, each once."""
    return EnumerateItems(items, targets)


def all_pairs_shortest_path_toy(nodes: int = 4, longest: int = 6) -> ShortestPaths:
    """The task of saying all shortest distances of a small complete graph."""
    return ShortestPaths(nodes, longest)


@dataclass(frozen=True)
class LatencyCurve:
    """coverage ``(steps,)``: mean completion coverage after each step; steps_to_full ``(requests,)``: the step at which
    a request is complete, ``inf`` if it never is; repeated: share of the things said that had been said before."""

    coverage: Tensor
    steps_to_full: Tensor
    repeated: float


def latency_curve(
    task: GroupTask,
    n_thinkers: int,
    model: Any,
    *,
    problems: Tensor,
    independent: bool = False,
    steps: int | None = None,
    slot: int | None = None,
    sampler: Any = greedy,
    **options: Any,
) -> LatencyCurve:
    """Completion coverage by step of ``n_thinkers`` thinkers of ``model`` (a causal model of transformers) on problems
    ``(requests, length)`` of the task.

    independent: that many samples of a single thinker instead, which see nothing of each other. steps: at most so many
    behind the header. Further keywords go to :class:`~regard.decode.group_think.GroupThinkDecoder`.
    """
    longest = task.steps if steps is None else steps
    slot = 1 + longest if slot is None else slot
    size = 1 if independent else n_thinkers
    decoder = GroupThinkDecoder(model, size, longest, slot=slot, sampler=sampler, stop=task.end, **options)
    prompts = task.for_group(problems, size)
    repeats = n_thinkers if independent else 1
    trace = decoder(prompts.repeat_interleave(repeats, 0), task.headers(size)).tokens[:, :, 1:]
    tokens = F.pad(trace.reshape(len(prompts), n_thinkers, -1), (0, longest - trace.shape[2]), value=ABSENT)
    share, again = task.coverage(prompts, tokens)
    said = (task._read(prompts, tokens)[0] >= 0).sum((1, 2))
    finished = (share == 1).any(1)
    first = (share == 1).to(torch.int8).argmax(1) + 1
    return LatencyCurve(
        coverage=share.mean(0),
        steps_to_full=first.double().where(finished, float("inf")),
        repeated=float((again[:, -1] / said.clamp_min(1)).double().mean()),
    )
