"""Group Think: a small model trained on traces of groups that share out a list, and how soon the list is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.group_tasks import EnumerateItems, GroupTask, LatencyCurve, enumerate_items, latency_curve
from regard.bench.measure import interleaved, median_ratio, one_thread
from regard.bench.training import fit
from regard.decode.group_think import SharedCache, group_logits, temperature_sampler
from regard.models.nano import require_transformers
from regard.reproduce.finding import Finding

STEPS, BATCH, REQUESTS, SEED = 1500, 32, 256, 12345
GROUP = 4
# Where independent samples are compared: 0.4 of the list's length, rounded down.
COMPARED = 4


def small_model(vocab_size: int, hidden: int, layers: int, heads: int = 4) -> Any:
    """An untrained Llama of transformers."""
    require_transformers("The reproduction of Group Think")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        initializer_range=0.08,  # a narrow model learns sooner from larger weights
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # what was said counts, not where
    )
    return LlamaForCausalLM(config)


class GroupTraces:
    """Demonstrations of a task for groups of 1, 2 and 4 in turn, as the trainer takes them.

    Targets are what the next token is drawn from ``(batch, thinkers, steps, vocab)``, zeros where nothing is to be
    learned, so that the loss is its expectation over the traces.
    """

    def __init__(self, task: GroupTask) -> None:
        self.task, self.num_classes = task, task.vocab_size

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Any, Tensor]:
        """Prompts and tokens, and the chances of each token."""
        group = (1, 2, 4)[int(torch.randint(3, (), generator=generator))]
        prompts, tokens, chances = self.task.demonstrations(size, generator, group)
        learned = tokens >= 0
        learned[:, :, 0] = False  # the header is given
        return (prompts, tokens), chances * learned[..., None]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return -(targets * outputs.log_softmax(-1)).sum() / targets.sum()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Tokens whose likeliest value is one that may be said."""
        allowed = targets.gather(-1, outputs.argmax(-1, keepdim=True)) > 0
        return float(allowed.sum()), int((targets.sum(-1) > 0).sum())


class _OnTraces(nn.Module):
    def __init__(self, model: Any, slot: int) -> None:
        super().__init__()
        self.model, self.slot = model, slot

    def forward(self, trace: tuple[Tensor, Tensor]) -> Tensor:
        return group_logits(self.model, *trace, slot=self.slot)


def train(task: EnumerateItems, report: Callable[[str], None], steps: int = STEPS) -> Any:
    """A model of two layers, trained on demonstrations with one slot length for all groups."""
    model = small_model(task.vocab_size, 128, 2)
    wrapped = _OnTraces(model, task.steps + 1)
    fit(wrapped, GroupTraces(task), steps=steps, batch_size=BATCH, lr=4e-3, report=report, every=200)
    return model.eval()


def curves(model: Any, task: EnumerateItems) -> dict[str, LatencyCurve]:
    """All ways of decoding on the same unseen problems: greedily, but for independent samples, which would be copies of
    one another; they are drawn at temperature 1."""
    problems = task.prompts(REQUESTS, torch.Generator().manual_seed(SEED), 1)

    def run(n_thinkers: int, **how: Any) -> LatencyCurve:
        return latency_curve(task, n_thinkers, model, problems=problems, **how)

    return {
        "one": run(1),
        "group": run(GROUP),
        "independent": run(GROUP, independent=True, sampler=temperature_sampler(1.0, SEED)),
        "blind_group": run(GROUP, visibility="self"),
    }


def step_time(hidden: int = 256, layers: int = 4, prompt: int = 256, rounds: int = 60) -> float:
    """Median ratio of the time of one decoding step of four thinkers to that of one."""
    model = small_model(64, hidden, layers).eval()
    ids = torch.randint(64, (1, prompt), generator=torch.Generator().manual_seed(0))

    def stepper(thinkers: int) -> Callable[[], Tensor]:
        shared, own = SharedCache(model, ids, "all", thinkers), torch.arange(thinkers)
        token, eye = torch.zeros(1, thinkers, dtype=torch.int64), torch.eye(thinkers, dtype=torch.bool)
        return lambda: shared.feed(token, own, prompt + 100 * own, eye)

    with one_thread(), torch.no_grad():
        taken = interleaved({"one": stepper(1), "group": stepper(GROUP)}, rounds=rounds, warmup=10)
    return median_ratio(taken["group"], taken["one"])


def run(report: Callable[[str], None]) -> Finding:
    """One model, four ways of decoding, and the time of a step."""
    task, measured = enumerate_items(), dict[str, Any]()
    found = curves(train(task, report), task)
    for how, curve in found.items():
        full = curve.steps_to_full
        # None: most requests are never complete.
        median = float(full.median())
        measured[f"{how}_median_steps_to_full"] = median if math.isfinite(median) else None
        measured[f"{how}_complete_share"] = round(float(full.isfinite().double().mean()), 3)
        measured[f"{how}_repeated_share"] = round(curve.repeated, 3)
        measured[f"{how}_coverage_by_step"] = [round(float(c), 3) for c in curve.coverage]
        report(f"{how}: full after {median} steps, coverage {measured[f'{how}_coverage_by_step']}")
    one, group = measured["one_median_steps_to_full"], measured["group_median_steps_to_full"]
    steps = group / one if one and group else None
    lead = float(found["group"].coverage[COMPARED - 1] - found["independent"].coverage[COMPARED - 1])
    measured["steps_to_full_group_over_one"] = steps and round(steps, 3)
    measured[f"coverage_lead_over_independent_after_{COMPARED}_steps"] = round(lead, 3)
    measured["time_of_step_4_thinkers_over_1"] = round(step_time(), 2)
    holds = steps is not None and steps <= 0.4 and lead >= 0.1 and measured["time_of_step_4_thinkers_over_1"] <= 1.6
    note = (
        f"Say 12 random targets of 32, each once; a Llama of two layers and width 128 trained {STEPS} steps of {BATCH} "
        "traces of groups of 1, 2 and 4 in which a thinker says what is left of its own quarter of the items, then "
        f"helps the others. {REQUESTS} new requests, greedy; four independent samples of the single thinker at "
        "temperature 1, for greedy ones would be copies. blind_group: the same four thinkers, each seeing itself "
        "alone. Holds if the median request is complete in at most 0.4 of the steps of one thinker, coverage after "
        f"{COMPARED} steps leads that of independent samples by 0.1, and a step of four thinkers (four layers of width "
        "256, 256 tokens of prompt, one thread) takes at most 1.6 times that of one. Most of the speed is the learned "
        "sharing out, which the blind group has too; seeing each other completes more requests and repeats less. "
        "Width, rotary base and learning rate were settled after trials at width 64 whose single thinker was seldom "
        "complete. Collaboration of models that were not trained for it, as in the paper, takes large ones."
    )
    return Finding(measured, holds, note)
