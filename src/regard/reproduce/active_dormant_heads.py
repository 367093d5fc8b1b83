"""Active and dormant heads: sink, drain and peak as small transformers learn bigram-backcopy, and on nano."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from regard import capture
from regard.bench.subjects import load_subject, read_text, token_windows
from regard.bench.tasks import stdlib_text
from regard.inspect.active_dormant_heads import ExtremeTokenReport, extreme_token_report, zero_head_effect
from regard.inspect.backcopy import bigram_backcopy, bigram_transition
from regard.models.active_dormant_heads import BackcopyTransformer
from regard.reproduce.finding import Finding, Plot
from regard.train.active_dormant_heads import train_backcopy

VOCAB, LENGTH, TRIGGERS = 32, 32, 3
# Width, sequences of a batch, steps: of one layer and of three.
SIZES = {1: (64, 64, 400), 3: (128, 32, 640)}
RATES = {"adam": 3e-3, "sgd": 3e-2}
# Random starts of three layers.
STARTS = 2
Point = tuple[float, float]


def language() -> Tensor:
    """Bigrams of the 32 most frequent characters of the standard library's source, blanks run together."""
    text = stdlib_text(400_000)[0].decode("utf-8", "replace")
    return bigram_transition(" ".join(text.split()), VOCAB)


class Run:
    """One model, trained, and looked at on 256 held-out sequences as it trains."""

    def __init__(
        self, attn: Literal["softmax", "relu"], depth: int, optimizer: Literal["adam", "sgd"], seed: int = 0
    ) -> None:
        transition, (width, batch, steps) = language(), SIZES[depth]
        draw = partial(_draw, transition)
        self.tokens, self.triggers = draw(256, torch.Generator().manual_seed(10_000))
        torch.manual_seed(seed)
        self.model = BackcopyTransformer(VOCAB + 1, attn=attn, embed_dim=width, depth=depth, max_length=LENGTH)
        at = [0, *(round(steps * 2 ** (-k / 2)) for k in range(14, -1, -1))]
        self.history = train_backcopy(
            self.model,
            draw,
            steps=steps,
            batch_size=batch,
            optimizer=optimizer,
            lr=RATES[optimizer],
            seed=seed,
            watch=self.look,
            at=at,
        )

    def look(self) -> tuple[ExtremeTokenReport, ExtremeTokenReport, float]:
        """At the other queries, at triggers, and the length of the start token's state that enters the second layer
        (where there is none, the first)."""
        with torch.no_grad(), capture(self.model, "hidden_states") as trace:
            self.model(self.tokens[:1])
        state = trace[min(1, len(trace) - 1)].hidden_states
        assert state is not None
        return (
            extreme_token_report(self.model, self.tokens, query_mask=~self.triggers),
            extreme_token_report(self.model, self.tokens, query_mask=self.triggers),
            float(state[0, 0].norm()),
        )

    @property
    def last(self) -> tuple[ExtremeTokenReport, ExtremeTokenReport]:
        other, trigger, _ = self.history.watched[max(self.history.watched)]
        return other, trigger

    def growth(self) -> list[Point]:
        """Of deep models: how the start token's state as it leaves the first layer grows in length, by step."""
        before = self.history.watched[0][2]
        return [(float(n), seen[2] / before) for n, seen in self.history.watched.items()]

    def curve(self, value: Callable[[ExtremeTokenReport], Tensor], at_triggers: bool = False) -> list[Point]:
        """A figure of the first head over the steps, the first step left out."""
        return [(float(n), float(value(r[at_triggers]).flatten()[0])) for n, r in self.history.watched.items() if n]

    @torch.no_grad()
    def accuracy(self) -> float:
        """At triggers."""
        right = self.model(self.tokens)[:, :-1].argmax(-1) == self.tokens[:, 1:]
        return float(right[self.triggers[:, :-1]].float().mean())


def _draw(transition: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return bigram_backcopy(n, LENGTH, triggers=TRIGGERS, transition=transition, generator=generator)


def run(report: Callable[[str], None]) -> Finding:
    """One layer with softmax and with ReLU attention; three layers by Adam and by gradient descent; nano."""
    measured: dict[str, Any] = {}
    shallow = {attn: Run(attn, 1, "adam") for attn in ("softmax", "relu")}
    for attn, trained in shallow.items():
        other, trigger = trained.last
        effect = zero_head_effect(
            trained.model,
            {"triggers": (trained.tokens, trained.triggers), "others": (trained.tokens, ~trained.triggers)},
        )
        measured[f"one_layer_{attn}"] = {
            "accuracy_at_triggers": round(trained.accuracy(), 3),
            "sink_weight_at_other_tokens": round(float(other.sink), 3),
            "sink_weight_at_triggers": round(float(trigger.sink), 3),
            "value_of_sink_over_others": round(float(other.drain), 3),
            "loss_rise_without_head_at_triggers_nats": round(float(effect["triggers"]), 2),
            "loss_rise_without_head_at_others_nats": round(float(effect["others"]), 3),
        }
        report(f"one layer, {attn}: {measured[f'one_layer_{attn}']}")
    gap = shallow["softmax"].curve(lambda r: r.logit_gap)
    measured["one_layer_softmax_sink_logit_gap"] = {str(int(n)): round(y, 2) for n, y in gap}
    slope, fit = log_fit([(n, y) for n, y in gap if n >= 50])
    measured["sink_logit_gap_per_doubling_of_steps"] = round(slope * math.log(2), 2)
    measured["sink_logit_gap_log_fit_r2"] = round(fit, 3)
    deep = {(kind, seed): Run("softmax", 3, kind, seed) for kind in RATES for seed in range(STARTS)}  # type: ignore[arg-type]
    for (kind, seed), trained in deep.items():
        other = trained.last[0]
        measured[f"three_layers_{kind}_start_{seed}"] = {
            "accuracy_at_triggers": round(trained.accuracy(), 3),
            "length_of_sink_state_after_first_layer_over_its_length_before_training": round(trained.growth()[-1][1], 2),
            "residual_of_sink_over_others_by_layer": [round(x, 2) for x in other.peak.tolist()],
            "sink_weight_at_other_tokens_by_layer": [round(x, 2) for x in other.sink[:, 0].tolist()],
            "value_of_sink_over_others_by_layer": [round(x, 2) for x in other.drain[:, 0].tolist()],
        }
        report(f"three layers, {kind}, start {seed}: {measured[f'three_layers_{kind}_start_{seed}']}")
    nano = on_nano()
    measured["nano_residual_of_first_token_over_others_by_layer"] = [round(x, 2) for x in nano.peak.tolist()]
    measured["nano_heads_with_half_their_weight_on_first_token"] = int((nano.sink > 0.5).sum())
    measured["nano_largest_sink_weight"] = round(float(nano.sink.max()), 3)
    drained = torch.corrcoef(torch.stack((nano.sink.flatten(), nano.drain.flatten())))[0, 1]
    measured["nano_correlation_of_sink_weight_and_value_ratio"] = round(float(drained), 2)
    soft, relu = measured["one_layer_softmax"], measured["one_layer_relu"]
    grown = {kind: [deep[kind, seed].growth()[-1][1] for seed in range(STARTS)] for kind in RATES}
    parts = {
        "holds_softmax_head_rests_on_a_drained_sink": soft["sink_weight_at_other_tokens"] > 0.6
        and soft["sink_weight_at_triggers"] < 0.05
        and soft["value_of_sink_over_others"] < 0.4,
        "holds_relu_head_needs_no_sink": relu["sink_weight_at_other_tokens"] < 0.05
        and relu["value_of_sink_over_others"] > 0.6,
        "holds_state_after_first_layer_grows_with_adam_not_with_sgd": min(grown["adam"]) > 3
        and max(grown["sgd"]) < 1.5,
    }
    measured |= parts
    return Finding(measured, all(parts.values()), NOTE, plots(shallow, deep, nano))


NOTE = (
    "Bigrams of 32 characters of the standard library's source, the 3 most frequent as triggers, 32 tokens; figures on "
    "256 fresh sequences. One layer: width 64, batches of 64, Adam at 3e-3, 400 steps. Three layers, from two random "
    "starts: width 128, batches of 32, 640 steps, Adam at 3e-3 or gradient descent at 0.03 with momentum, as the "
    "released code has it. Holds if the softmax head has more than 0.6 of its weight on the start token away from "
    "triggers, less than 0.05 at them and a value there below 0.4 of the others', if the ReLU head has less than 0.05 "
    "and a value above 0.6, and if from both starts the start token's state after the first layer grows to more than 3 "
    "times its length before training with Adam and to less than 1.5 times with gradient descent. That is what the "
    "paper's figure shows (in its released data 5.8 and 0.84 times after 10 000 steps, with gradient descent 1.3 times "
    "at most on the way). An earlier run put the same bounds on the largest ratio to the other tokens over all layers; "
    "gradient descent failed it, and would still: its third layer rests on the start token, whose state then stands "
    "out after the second layer. In trials this ratio rose to 1.9 by 3200 steps as weight decay shrank the others, and "
    "at the paper's width of 256 stayed below 1.5 for 800 steps, while Adam at 1e-3 came to 2.0 there. So gradient "
    "descent has no peak that grows, but not none. The paper's batches are 512 sequences of 256 tokens. The sink logit "
    "rises while the head learns and then flattens, so 400 steps of the whole model do not show a logarithm of time, "
    "which is proved for a reduced one. nano has no start token and no head that rests on the first token of a window."
)


def log_fit(points: list[Point]) -> tuple[float, float]:
    """Slope over the logarithm of x by least squares, and the share of variance that it explains."""
    x = torch.tensor([math.log(n) for n, _ in points], dtype=torch.float64)
    y = torch.tensor([value for _, value in points], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    left = y - y.mean() - slope * (x - x.mean())
    return float(slope), float(1 - left.square().sum() / (y - y.mean()).square().sum())


def on_nano() -> ExtremeTokenReport:
    """On held-out source."""
    subject = load_subject("nano")
    return extreme_token_report(subject.model, token_windows(subject, read_text(None), 256, 4))


def plots(shallow: dict[str, Run], deep: dict[tuple[str, int], Run], nano: ExtremeTokenReport) -> list[Plot]:
    """Sink, value, logit gap as one layer trains; the start token's state as three do; peaks by layer."""
    soft, relu = shallow["softmax"], shallow["relu"]
    return [
        Plot(
            "One layer: weight on the start token",
            "training steps",
            "mean weight",
            {
                "softmax, other tokens": soft.curve(lambda r: r.sink),
                "softmax, triggers": soft.curve(lambda r: r.sink, at_triggers=True),
                "ReLU, other tokens": relu.curve(lambda r: r.sink),
            },
            log_x=True,
        ),
        Plot(
            "One layer: value of the start token",
            "training steps",
            "length over the others'",
            {"softmax": soft.curve(lambda r: r.drain), "ReLU": relu.curve(lambda r: r.drain)},
            log_x=True,
            references={"as the others": 1.0},
        ),
        Plot(
            "One layer: sink logit over the others' mean",
            "training steps",
            "logit gap, other tokens",
            {"softmax": soft.curve(lambda r: r.logit_gap)},
            log_x=True,
        ),
        Plot(
            "Three layers: state of the start token after the first",
            "training steps",
            "length over that before training",
            {
                f"{name}, start {seed}": deep[kind, seed].growth()
                for kind, name in (("adam", "Adam"), ("sgd", "SGD"))
                for seed in range(STARTS)
            },
            references={"as before training": 1.0},
        ),
        Plot(
            "Residual state of the first token by layer",
            "layers passed",
            "length over the others'",
            {
                "3 layers, Adam": list(enumerate(deep["adam", 0].last[0].peak.tolist())),
                "3 layers, SGD": list(enumerate(deep["sgd", 0].last[0].peak.tolist())),
                "nano": list(enumerate(nano.peak.tolist())),
            },
            references={"as the others": 1.0},
        ),
    ]
