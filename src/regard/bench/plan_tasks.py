"""Strings in which one token plans what follows: what an anchor of attention is, where it is known."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["PlanStrings"]


class PlanStrings(Classification):
    """Random bits, in which stand one plan and ``decoys`` tokens that look as rare: the ``bits`` tokens after the plan
    are the plan's number, highest bit first; what follows a decoy is random.

    The bits of a plan are independent, so each of them can be known from the plan alone. Inputs ``(batch, length)``:
    tokens 0 and 1, plans from 2, then as many decoys. Targets ``(batch, length)``: in training the next token, in tests
    only where the plan determines it. place: of the plan (default: anywhere). :meth:`draw` also says where it is.
    """

    def __init__(self, length: int = 40, bits: int = 6, decoys: int = 2, place: int | None = None) -> None:
        if bits < 1 or decoys < 0 or length < (decoys + 1) * (bits + 1):
            raise OptionError(
                f"A plan and {decoys} decoys with {bits} bits each need a length of {(decoys + 1) * (bits + 1)} or "
                f"more; got {length}."
            )
        if place is not None and (decoys or not 0 <= place < length - bits):
            raise OptionError(f"A plan at a set place has no decoys, and its {bits} bits follow; got place={place}.")
        self.length, self.bits, self.decoys, self.place = length, bits, decoys, place
        self.num_classes = self.vocab_size = 2 + 2 * 2**bits

    @property
    def chance(self) -> float:
        """Of guessing between two bits."""
        return 0.5

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, places of the plan ``(size,)`` and of the decoys ``(size, decoys)``."""
        tokens = torch.randint(2, (size, self.length), generator=generator)
        marks, plans = self.decoys + 1, 2**self.bits
        # Marks stand at least ``bits + 1`` apart: sorted places in what is left, spread out again.
        room = self.length - marks * (self.bits + 1) + 1
        places = torch.randint(room, (size, marks), generator=generator).sort(-1).values
        places = places + torch.arange(marks) * (self.bits + 1)
        order = torch.rand(size, marks, generator=generator).argsort(-1)
        places = places.gather(1, order)
        if self.place is not None:
            places = torch.full_like(places, self.place)
        number = torch.randint(plans, (size, marks), generator=generator)
        number[:, 1:] += plans
        tokens.scatter_(1, places, number + 2)
        plan = places[:, 0]
        powers = torch.arange(self.bits - 1, -1, -1)
        result = (number[:, :1] >> powers) & 1
        tokens.scatter_(1, plan[:, None] + 1 + torch.arange(self.bits), result)
        return tokens, plan, places[:, 1:]

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        tokens, plan, _ = self.draw(size, generator)
        following = torch.cat((tokens[:, 1:], torch.full((size, 1), IGNORED)), 1)
        if split == "train":
            return tokens, following
        back = torch.arange(self.length) - plan[:, None]
        return tokens, torch.where((back >= 0) & (back < self.bits), following, IGNORED)
