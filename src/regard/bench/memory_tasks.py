"""Tasks that ask for details of past events, after delays and distractors.

Sequence forms of what Lampinen et al., "Towards mental time travel", 2021, arXiv 2105.14039, section 4, ask of agents:
the agent's view is a vector per step, and instead of acting it names the answer where it is asked. Inputs ``(batch,
length, input_dim)``, targets ``(batch, length)`` with classes at questions and :data:`~regard.bench.tasks.IGNORED`
elsewhere; metric: accuracy. The test split is longer than the training split where a task's ``test_`` option says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError

__all__ = ["DANCES", "Ballet", "ObjectPermanence", "PairedChunkRecall", "RapidWordLearning"]

COMPASS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")

DANCES: dict[str, str] = {
    **{f"{a}-{b}": f"{a} {b} {b} {a}" for a, b in (("N", "S"), ("E", "W"), ("NE", "SW"), ("NW", "SE"))},
    "plus clockwise": "N S E W S N W E",
    "plus counterclockwise": "N S W E S N E W",
    "cross clockwise": "NE SW SE NW SW NE NW SE",
    "cross counterclockwise": "NE SW NW SE SW NE SE NW",
    "square clockwise": "N E S S W W N E",
    "square counterclockwise": "N W S S E E N W",
    "star": "N S NE SW E W SE NW",
    "hourglass": "NE W SW E SE W NW E",
}
"""Dances by name, as steps that are repeated until the dance is over."""


def _unit(size: int, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Random directions ``(size, count, dim)``: looks, words and cues that no training can have learned by heart."""
    return F.normalize(torch.randn(size, count, dim, generator=generator), dim=-1)


def _subset(size: int, count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """``chosen`` different numbers below ``count`` in random order, ``(size, chosen)``."""
    return torch.rand(size, count, generator=generator).argsort(-1)[:, :chosen]


def _ask(inputs: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Targets: ``answers (batch, questions)`` at the last steps."""
    targets = torch.full(inputs.shape[:2], IGNORED)
    targets[:, -answers.shape[1] :] = answers
    return inputs, targets


class PairedChunkRecall(Classification):
    """Events of ``chunk_size`` steps show a cue and, at other steps, a value for each of ``details`` kinds. After
    ``distractors`` more of such events, which nobody asks about, each question shows the cue of an event and a kind,
    and the answer is the value."""

    def __init__(
        self,
        events: int = 16,
        chunk_size: int = 8,
        details: int = 3,
        values: int = 8,
        distractors: int = 8,
        test_distractors: int = 32,
        questions: int = 16,
        cue_dim: int = 16,
    ) -> None:
        if not 1 <= details < chunk_size or not 1 <= questions <= events:
            raise OptionError(
                f"Events of {chunk_size} steps hold a cue and {details} details, and {questions} questions need as "
                f"many events; there are {events}."
            )
        self.events, self.chunk_size, self.details, self.values = events, chunk_size, details, values
        self.distractors, self.test_distractors, self.questions = distractors, test_distractors, questions
        self.cue_dim, self.num_classes, self.input_dim = cue_dim, values, cue_dim + details + values + 1

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Events, distractors, questions."""
        count = self.events + (self.distractors if split == "train" else self.test_distractors)
        cues = _unit(size, count, self.cue_dim, generator)
        values = torch.randint(self.values, (size, count, self.details), generator=generator)
        # Step 0 of the unshuffled event is the cue's, the next ones are the details'.
        event = torch.zeros(size, count, self.chunk_size, self.input_dim)
        event[:, :, 0, : self.cue_dim] = cues
        kinds, start = torch.eye(self.details), self.cue_dim + self.details
        event[:, :, 1 : 1 + self.details, self.cue_dim : start] = kinds
        event[:, :, 1 : 1 + self.details, start : start + self.values] = F.one_hot(values, self.values).float()
        order = torch.rand(size, count, self.chunk_size, generator=generator).argsort(-1)
        event = event.gather(2, order[..., None].expand_as(event))
        asked = _subset(size, self.events, self.questions, generator)
        kind = torch.randint(self.details, (size, self.questions), generator=generator)
        question = torch.zeros(size, self.questions, self.input_dim)
        question[..., : self.cue_dim] = cues.gather(1, asked[..., None].expand(-1, -1, self.cue_dim))
        question[..., self.cue_dim : start] = kinds[kind]
        question[..., -1] = 1
        answers = values[torch.arange(size)[:, None], asked, kind]
        return _ask(torch.cat((event.flatten(1, 2), question), 1), answers)


class Ballet(Classification):
    """Dancers at different places of a stage dance one after the other, ``delay`` empty steps after each; then one of
    the dances is named, and the answer is the place of the one who danced it.

    A step shows the dancer's look, place and move. There are 8 places and the dances of :data:`DANCES`.
    """

    num_classes = 8

    def __init__(
        self,
        dancers: int = 2,
        delay: int = 16,
        test_dancers: int | None = None,
        test_delay: int | None = None,
        dance_length: int = 16,
        look_dim: int = 8,
    ) -> None:
        most = max(dancers, test_dancers or 0)
        if not 1 <= min(dancers, test_dancers or dancers) <= most <= 8 or delay < 0 or dance_length < 8:
            raise OptionError(
                f"Need 1 to 8 dancers, delay >= 0 and dance_length >= 8; got {dancers}, {test_dancers}, {delay}, "
                f"{dance_length}."
            )
        self.dancers, self.test_dancers = dancers, test_dancers or dancers
        self.delay, self.test_delay = delay, delay if test_delay is None else test_delay
        self.dance_length, self.look_dim = dance_length, look_dim
        self.input_dim = look_dim + 8 + len(COMPASS) + len(DANCES)
        steps = [[COMPASS.index(step) for step in dance.split()] for dance in DANCES.values()]
        rows = [(dance * dance_length)[:dance_length] for dance in steps]
        self.moves = F.one_hot(torch.tensor(rows), len(COMPASS)).float()

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Dances and delays, then one step with the name of a dance."""
        train = split == "train"
        dancers, delay = (self.dancers, self.delay) if train else (self.test_dancers, self.test_delay)
        looks = _unit(size, dancers, self.look_dim, generator)
        places = _subset(size, 8, dancers, generator)
        dances = _subset(size, len(DANCES), dancers, generator)
        still = torch.cat((looks, F.one_hot(places, 8).float()), -1)
        still = still[:, :, None].expand(-1, -1, self.dance_length, -1)
        show = torch.cat((still, self.moves[dances]), -1)
        show = F.pad(show, (0, len(DANCES), 0, delay)).flatten(1, 2)
        asked = torch.randint(dancers, (size, 1), generator=generator)
        name = F.one_hot(dances.gather(1, asked), len(DANCES)).float()
        question = F.pad(name, (self.input_dim - len(DANCES), 0))
        return _ask(torch.cat((show, question), 1), places.gather(1, asked))


class ObjectPermanence(Classification):
    """Objects jump out of their boxes, each some times at random moments, ``showing`` steps in all, and are hidden for
    ``delay`` steps. Then an object's look is shown and the answer is its box."""

    def __init__(
        self,
        objects: int = 4,
        boxes: int = 8,
        showing: int = 48,
        delay: int = 16,
        test_delay: int | None = None,
        look_dim: int = 8,
    ) -> None:
        if not 1 <= objects <= min(boxes, showing) or delay < 0:
            raise OptionError(
                f"Need a box and a moment for each object and delay >= 0; got {objects} objects, {boxes} boxes, "
                f"{showing} steps, delay {delay}."
            )
        self.objects, self.boxes, self.showing, self.look_dim = objects, boxes, showing, look_dim
        self.delay, self.test_delay = delay, delay if test_delay is None else test_delay
        self.num_classes, self.input_dim = boxes, look_dim + boxes + 1

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Jumps, the delay, and one question for each object, in random order."""
        looks = _unit(size, self.objects, self.look_dim, generator)
        boxes = _subset(size, self.boxes, self.objects, generator)
        each = torch.cat((looks, F.one_hot(boxes, self.boxes).float()), -1)
        # A moment shows one of the objects or, as often, none; at fixed moments each is shown once at least.
        jumper = torch.randint(2 * self.objects, (size, self.showing), generator=generator)
        jumper.scatter_(
            1, _subset(size, self.showing, self.objects, generator), torch.arange(self.objects).repeat(size, 1)
        )
        shown = F.pad(each, (0, 0, 0, self.objects))
        jumps = shown.gather(1, jumper[..., None].expand(-1, -1, shown.shape[-1]))
        jumps = F.pad(jumps, (0, 1, 0, self.delay if split == "train" else self.test_delay))
        order = _subset(size, self.objects, self.objects, generator)
        question = F.pad(looks.gather(1, order[..., None].expand_as(looks)), (0, self.boxes + 1))
        question[..., -1] = 1
        return _ask(torch.cat((jumps, question), 1), boxes.gather(1, order))


class RapidWordLearning(Classification):
    """New words for new objects: ``words`` objects are shown with their names, ``repeats`` steps each, then ``phases``
    more sets of other objects and words as distractors. At a question a word is given with a line-up of ``choices``
    objects of the first set, and the answer is the place of the one it names."""

    def __init__(
        self,
        words: int = 4,
        repeats: int = 4,
        phases: int = 1,
        test_phases: int | None = None,
        choices: int = 3,
        dim: int = 8,
    ) -> None:
        if not 2 <= choices <= words or repeats < 1 or phases < 0 or dim < 1:
            raise OptionError(
                f"Need 2 <= choices <= words, repeats >= 1 and phases >= 0; got {choices}, {words}, {repeats}, "
                f"{phases}."
            )
        self.words, self.repeats, self.choices, self.dim = words, repeats, choices, dim
        self.phases, self.test_phases = phases, phases if test_phases is None else test_phases
        self.num_classes, self.input_dim = choices, dim * (2 + choices) + 1

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Exposures, then one question for each word of the first set, in random order."""
        count = self.words * (1 + (self.phases if split == "train" else self.test_phases))
        words, objects = _unit(size, 2 * count, self.dim, generator).chunk(2, 1)
        exposures = torch.cat((words, objects), -1).repeat_interleave(self.repeats, 1)
        exposures = F.pad(exposures, (0, self.dim * self.choices + 1))
        order = _subset(size, self.words, self.words, generator)
        answers = torch.randint(self.choices, order.shape, generator=generator)
        # Others are the words that follow the right one in a circle, so that no object stands twice in a line-up.
        turn = torch.arange(self.choices) - answers[..., None]
        line_up = (order[..., None] + turn) % self.words
        rows = torch.arange(size)[:, None]
        question = torch.zeros(size, self.words, self.input_dim)
        question[..., : self.dim] = words[rows, order]
        question[..., 2 * self.dim : -1] = objects[rows[..., None], line_up].flatten(2)
        question[..., -1] = 1
        return _ask(torch.cat((exposures, question), 1), answers)
