"""Labels by a small model's own layer-2 axes, told by the model itself in context: by component, and by shots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.bench.feedback_tasks import HyperplaneLabels
from regard.bench.training import evaluate, fit
from regard.inspect.neurofeedback import (
    ActivationAxes,
    Binarizer,
    ControlEffect,
    activation_axes,
    axis_score,
    control_effect,
    ideal_observer,
    metacognitive_dimension,
    report_accuracy,
    span_states,
)
from regard.models.sequence import SequenceModel
from regard.reproduce.finding import Finding, Plot

SEEDS = range(3)
STEPS, LAYER, CORPUS, PROMPTS = 400, 2, 2048, 192
# The first of the corpus judge the regression, and stand in no prompt.
HELD = 256
SHOTS = (0, 2, 4, 8, 16, 32)
COMPONENTS = (1, 2, 3, 4, 8, 16, 32, 64)
LAST = 3
TOLD = ("accuracy", "cross_entropy_nats", "ideal_accuracy_from_2_shots")


class Subject:
    """The trained model, a corpus of sentences read one by one, and their states at layer 2."""

    def __init__(self, seed: int, report: Callable[[str], None]) -> None:
        torch.manual_seed(seed)
        self.task = HyperplaneLabels()
        self.model = SequenceModel(2, input_dim=self.task.input_dim, embed_dim=96, depth=4, num_heads=4)
        fit(self.model, self.task, steps=STEPS, batch_size=32, lr=1e-3, seed=seed, report=report)
        self.accuracy = evaluate(self.model, self.task)[1]
        self.model.eval()
        self.generator = torch.Generator().manual_seed(100 + seed)
        self.corpus = self.task.embeddings(CORPUS, generator=self.generator)
        alone = self.task.prompt(self.corpus[:, None], torch.zeros(CORPUS, 1))[:, :1]
        self.states = span_states(self.model, alone, torch.tensor([[0, 1]]).expand(CORPUS, 1, 2), LAYER)[:, 0]

    def draw(self) -> Tensor:
        """Sentences of prompts, ``(prompts, sentences)``: places in the corpus."""
        return torch.randint(HELD, CORPUS, (PROMPTS, self.task.count), generator=self.generator)

    @torch.no_grad()
    def told(self, labels: Tensor) -> dict[str, list[float]]:
        """Accuracy and cross-entropy by shots, over prompts whose labels are shown as they are and flipped; and the
        accuracy of logistic regression on the states of the same examples, fitted to as many."""
        chosen = self.draw()
        right, loss = torch.zeros(self.task.count).double(), torch.zeros(self.task.count).double()
        for shown in (labels[chosen], 1 - labels[chosen]):
            logits = self.model(self.task.prompt(self.corpus[chosen], shown))
            # A label would stand in place of the vector after its question.
            places = (2 * torch.arange(self.task.count) + 1).expand(PROMPTS, -1)
            found = report_accuracy(logits, places, 0, 1, shown)
            right, loss = right + found.accuracy / 2, loss + found.cross_entropy / 2
        seen = [[torch.cat((row[:n], torch.arange(HELD))) for row in chosen[:32]] for n in SHOTS[1:]]
        ideal = [
            sum(ideal_observer(self.states[rows], labels[rows], n)[0] for rows in of_n) / 32
            for n, of_n in zip(SHOTS[1:], seen, strict=True)
        ]
        return {
            "accuracy": [round(float(right[n]), 3) for n in SHOTS],
            "cross_entropy_nats": [round(float(loss[n]), 3) for n in SHOTS],
            "ideal_accuracy_from_2_shots": ideal,
        }

    def controlled(self, axes: ActivationAxes, labels: Tensor) -> Tensor:
        """Scores ``(2, 2 prompts, k)`` under targets 0 and 1 of the sentence read after an instruction of no content,
        ``[0 | -1 or 1 | 0]``, shown labels as they are and flipped."""
        chosen, scores = self.draw(), []
        last = 2 * self.task.count - 1
        for target in (0, 1):
            of_target = []
            for flipped in (False, True):
                shown = (1 - labels if flipped else labels)[chosen]
                prompt = self.task.prompt(self.corpus[chosen], shown)[:, :last]
                asked = torch.zeros(PROMPTS, 1, self.task.input_dim)
                asked[..., -2] = 2 * target - 1
                prompt = torch.cat((prompt[:, :-1], asked, prompt[:, -1:]), 1)
                span = torch.tensor([[last, last + 1]]).expand(PROMPTS, 1, 2)
                # What the target means is what the shown labels say.
                sign = -1 if flipped else 1
                of_target.append(sign * axis_score(span_states(self.model, prompt, span, LAYER)[:, 0], axes))
            scores.append(torch.cat(of_target))
        return torch.stack(scores)


def examined(subject: Subject, report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """By axis: what is told, how the axis moves when asked to, its share of the variance, and what else moves."""
    centred = subject.states.double() - subject.states.double().mean(0)
    components = int((torch.linalg.svdvals(centred) > 0).sum())
    last = tuple(range(components - LAST + 1, components + 1))
    axes = activation_axes(subject.states, ks=COMPONENTS + last)
    semantic = Binarizer(0.0)(subject.corpus[:, 0])
    found = {}
    for group in (activation_axes(subject.states, "lr", labels=semantic), axes):
        scores, share = axis_score(subject.states, group), group.variance_share(subject.states)
        for at, name in enumerate(group.names):
            labels = Binarizer().fit(scores[:, at])(scores[:, at])
            zeros, ones = subject.controlled(group, labels)
            effect = control_effect(ones, zeros)
            others = [float(d) for place, d in enumerate(effect.d.abs()) if place != at]
            found[name] = {
                **subject.told(labels),
                "variance_share": float(share[at]),
                "d": float(effect.d[at]),
                "d_of_others": sum(others) / max(len(others), 1),
                "controlled": metacognitive_dimension(ControlEffect(effect.d[at], effect.low[at], effect.high[at])),
            }
            report(f"{name}: told {found[name]['accuracy']}, d {found[name]['d']:.3f}")
    return found


def run(report: Callable[[str], None]) -> Finding:
    """Train, freeze, take axes of layer 2, and let the models tell their own labels."""
    subjects = [Subject(seed, report) for seed in SEEDS]
    found = [examined(subject, report) for subject in subjects]
    names = [name for name in found[0] if all(name in each for each in found)]

    def mean(name: str, what: str) -> Any:
        values = torch.tensor([each[name][what] for each in found], dtype=torch.float64)
        return values.mean(0).tolist()

    measured: dict[str, Any] = {
        "trained_task_accuracy": [round(subject.accuracy, 3) for subject in subjects],
        "shots": list(SHOTS),
        "variance_share": {name: float(f"{mean(name, 'variance_share'):.2g}") for name in names},
    }
    for name in names:
        told = {what: [round(value, 3) for value in mean(name, what)] for what in TOLD}
        told["accuracy_after_32_shots_each_seed"] = [each[name]["accuracy"][-1] for each in found]
        measured[f"told_{name}"] = told
    measured["implicit_control_d"] = {name: round(mean(name, "d"), 3) for name in names}
    measured["implicit_control_mean_size_of_d_on_other_components"] = {
        name: round(mean(name, "d_of_others"), 3) for name in names[1:]
    }
    measured["axes_controlled_of_all_seeds"] = sum(axis["controlled"] for each in found for axis in each.values())
    early = [measured[f"told_PC{k}"]["accuracy"][-1] for k in COMPONENTS[:4]]
    late = [measured[f"told_{name}"]["accuracy"][-1] for name in names[-LAST:]]
    holds = min(early) > 0.75 and max(late) < 0.6
    return Finding(measured, holds, NOTE, plots(measured, names))


NOTE = (
    f"{len(SEEDS)} models of 4 layers, width 96, {STEPS} steps of 32 prompts of 33 random vectors with labels by a "
    f"random plane, then frozen. Components of {CORPUS} sentences' states where they enter layer 2 (layers from 0), "
    f"labels by median split, {PROMPTS} prompts shown as they are and flipped; figures are means of the models. Holds "
    f"if PC1 to PC4 are told at above 0.75 after 32 shots, the last {LAST} components at below 0.6: bounds set before "
    "any trial. Without examples accuracy is 0.5 by construction, since each prompt's labels are shown both ways. In "
    "a first trial sentences were two tokens of a vocabulary of 32, whose vectors were to be learnt: its loss stayed "
    "at chance for 800 steps, so that sentences are vectors here. A second showed that they are learnt; its 700 "
    "steps were cut to 400 for time. Reporting is what the models were trained for, on planes of their inputs: that "
    "they tell labels of their own axes says that these are nearly planes of what they read. Control is shown as a "
    "measurement alone: an instruction means nothing to these models, which take it for one more example."
)


def plots(measured: dict[str, Any], names: list[str]) -> list[Plot]:
    """Accuracy by shots, and by component."""
    by_shots = {name: measured[f"told_{name}"]["accuracy"] for name in ("LR", "PC1", "PC4", names[-1])}
    at_end = [(float(place), measured[f"told_{name}"]) for place, name in enumerate(names)]
    return [
        Plot(
            "Labels of its own activations",
            "examples shown",
            "accuracy",
            {name: list(zip(map(float, SHOTS), told, strict=True)) for name, told in by_shots.items()},
            references={"chance": 0.5},
        ),
        Plot(
            "After 32 examples, by component",
            "",
            "accuracy",
            {
                "the model": [(place, told["accuracy"][-1]) for place, told in at_end],
                "regression on its states": [
                    (place, told["ideal_accuracy_from_2_shots"][-1]) for place, told in at_end
                ],
            },
            references={"chance": 0.5},
            ticks={name: float(place) for place, name in enumerate(names)},
        ),
    ]
