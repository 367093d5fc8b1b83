"""Small language models on graphs in prompts: trained through windows of several widths, asked without one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor

from regard.bench.graph_tasks import MajorityColour
from regard.bench.training import History, evaluate, fit
from regard.inspect.capture import capture
from regard.inspect.ego_tree import EgoTree, Perturbation, perturb_tree
from regard.inspect.graph_window import (
    Hops,
    WindowSchedule,
    hop_profile,
    node_text_shift,
    received_attention,
    skewed_line_sink,
    structure_alignment,
    window_schedule,
)
from regard.inspect.two_samples import Comparison
from regard.models.sequence import SequenceModel
from regard.reproduce.finding import Finding, Plot

SEEDS, STEPS, BATCH, RATE, CURVE = 5, 300, 32, 2e-3, 25
WINDOWS: tuple[Hops, ...] = (1, 2, 3, "full")
WATCHED = 64


def run(report: Callable[[str], None]) -> Finding:
    """The same model, data and steps for every window; accuracy on held-out centres under the full mask."""
    task = MajorityColour(fanout=(4, 3))
    asked_full: dict[str, list[float]] = {_name(hops): [] for hops in WINDOWS}
    asked_so: dict[str, list[float]] = {_name(hops): [] for hops in WINDOWS}
    both_ways: dict[str, list[float]] = {_name(hops): [] for hops in WINDOWS if hops != "full"}
    losses: dict[str, list[tuple[float, float]]] = {}
    broken: dict[str, list[float]] = {kind: [] for kind in ("intact", *get_args(Perturbation))}
    looks: dict[str, list[dict[str, Tensor]]] = {"before": [], "after": []}
    for seed in range(SEEDS):
        for hops in WINDOWS:
            name, model = _name(hops), _model(task, seed)
            if hops == "full":
                looks["before"].append(_look(model, task))
            history = _train(model, task, hops, seed)
            asked_full[name].append(_accuracy(model, task))
            asked_so[name].append(_accuracy(model, task, hops))
            if seed == 0:
                losses[name] = [(float(at), loss) for at, loss in zip(history.steps, history.loss, strict=True)]
            if hops == "full":
                looks["after"].append(_look(model, task))
                for kind, found in _broken(model, task, seed).items():
                    broken[kind].append(found)
            else:
                other = _model(task, seed)
                _train(other, task, hops, seed, bidirectional=True)
                both_ways[name].append(_accuracy(other, task))
            report(
                f"seed {seed}, window {hops}: accuracy {asked_full[name][-1]:.4f} under the full mask, "
                f"{asked_so[name][-1]:.4f} under its own"
                + (f"; trained both ways {both_ways[name][-1]:.4f}" if name in both_ways else "")
            )
    full = {name: statistics.mean(each) for name, each in asked_full.items()}
    between = max(full[_name(2)], full[_name(3)])
    parts = {
        "holds_a_middle_window_matches_or_beats_full": between >= full["full"],
        "holds_one_hop_is_lowest": full[_name(1)] < min(full[_name(2)], full[_name(3)], full["full"]),
        "holds_broken_links_hardly_matter": all(
            statistics.mean(broken["intact"]) - statistics.mean(broken[kind]) <= 0.02
            for kind in ("swap_children", "exchange_children")
        ),
    }
    measured: dict[str, Any] = {
        "accuracy_under_the_full_mask": {name: round(value, 4) for name, value in full.items()},
        "accuracy_less_that_of_full_mean_and_standard_error": {
            name: _paired(each, asked_full["full"]) for name, each in asked_full.items() if name != "full"
        },
        "accuracy_under_the_full_mask_each_seed": _rounded(asked_full),
        "accuracy_under_the_window_of_training_each_seed": _rounded(asked_so),
        "accuracy_under_the_full_mask_trained_both_ways_each_seed": _rounded(both_ways),
        "accuracy_of_full_with_broken_links_each_seed": _rounded(broken),
        **_seen(looks),
        **parts,
    }
    return Finding(measured, all(parts.values()), NOTE, _plots(full, both_ways, losses, looks))


NOTE = (
    f"Models of two layers, 64 wide, trained from scratch for {STEPS} steps of {BATCH} prompts, {SEEDS} seeds; prompts"
    " hold trees of up to 4 neighbours with up to 3 children of each, in a random graph of 120 nodes. The answer is "
    "the colour of most nodes two hops away, which is learned with each node's embedding; centres of test prompts are"
    " held out. Windows differ in nothing but the mask in training and lie within the ordinary causal mask, which is "
    "full, so that width alone changes when the full mask is asked. Holds if 2 or 3 hops do at least as well as full "
    "under the full mask, 1 hop does worst, and full loses at most 2 points when children of two neighbours are "
    "swapped or exchanged. The order is of means: from seed to seed windows differ as much as from one another, so "
    "that 2 and 3 hops match full rather than beat it, and 1 hop loses in some seeds only. The last part is weaker "
    "here than in the paper: these two leave the nodes two hops away the same, so that the answer itself does not "
    "change; shuffle and unrelated do change which nodes are two hops away, and their figures are shown without a "
    "rule. A first trial had windows in which nodes saw later ones, and was asked under the causal mask, so that "
    "direction changed with width; there full did best, and such windows are trained here too. Where nodes saw both "
    "ways when asked as well, full did best again. Text tokens, the answer's among them, see all nodes in every "
    "window, so that this task can be solved without any attention between nodes, and differences are small; a task "
    "that needs the links, and a pretrained model that is fine-tuned as in the paper (Llama-2-7B on text graphs), "
    "would test the claim harder. Settings after two trials: with 4 links a node the centre alone gave the answer "
    "away; with 16, and 4 children, 500 steps of one seed gave 0.926 with full and 0.891 with 2 hops. Children and "
    "steps were then made fewer to save time."
)


def _name(hops: Hops) -> str:
    return "full" if hops == "full" else f"{hops} hop{'s' if hops > 1 else ''}"


def _model(task: MajorityColour, seed: int) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(2, vocab_size=task.vocab_size, embed_dim=64, depth=2, num_heads=4)


def _train(model: SequenceModel, task: MajorityColour, hops: Hops, seed: int, bidirectional: bool = False) -> History:
    schedule = window_schedule(hops, bidirectional=bidirectional)
    with _told(task, schedule), schedule.on(model):
        return fit(model, task, steps=STEPS, batch_size=BATCH, lr=RATE, seed=seed, every=CURVE)


def _accuracy(model: SequenceModel, task: MajorityColour, hops: Hops = "full") -> float:
    schedule = window_schedule("full", infer=hops, bidirectional=False)
    with _told(task, schedule), schedule.on(model):
        return evaluate(model, task, batches=12, batch_size=64)[1]


@contextmanager
def _told(task: MajorityColour, schedule: WindowSchedule) -> Iterator[None]:
    """The schedule hears of each batch's trees."""
    task.told = lambda trees: schedule.look_at(trees, task.length)
    try:
        yield
    finally:
        task.told = None


def _broken(model: SequenceModel, task: MajorityColour, seed: int) -> dict[str, float]:
    """Accuracy on all held-out prompts, intact and with their links broken, the answers staying what they were."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, float]()
    trees = task.trees["test"]
    answers = torch.tensor([int(task.balance(tree) > 0) for tree in trees])
    everybody = range(len(task.colours))

    def right(asked: list[EgoTree]) -> float:
        with torch.no_grad():
            given = model.eval()(task.encode(asked))[:, -1].argmax(-1)
        return float((given == answers).double().mean())

    found["intact"] = right(trees)
    for kind in get_args(Perturbation):
        found[kind] = right([perturb_tree(tree, kind, generator=generator, unrelated=everybody) for tree in trees])
    return found


@torch.no_grad()
def _look(model: SequenceModel, task: MajorityColour) -> dict[str, Tensor]:
    """What attention makes of the nodes in held-out prompts, under the full mask; each ``(layers,)`` or as named."""
    trees = [tree for tree in task.trees["test"] if len(tree.nodes) == _largest(task)][:WATCHED]
    with capture(model.eval(), "weights") as trace:
        model(task.encode(trees))
    attn = trace.stack("weights").transpose(0, 1)
    follows, sinks, profile = [], [], []
    for weights, tree in zip(attn, trees, strict=True):
        places = tree.positions + task.length - len(tree.node_index)
        block = weights[..., places[:, None], places[None]]
        follows.append(structure_alignment(block, tree.distance == 1).auc)
        sinks.append(skewed_line_sink(weights, places).flagged.double())
        profile.append(hop_profile(block, tree.distance).mean(1))
    rows = [task.length - len(tree.node_index) for tree in trees]
    is_node = torch.zeros(len(trees), 1, task.length, dtype=torch.bool)
    real = torch.zeros_like(is_node)
    for at, (tree, gap) in enumerate(zip(trees, rows, strict=True)):
        is_node[at, 0, gap:], real[at, 0, gap:] = tree.node_index >= 0, True
    return {
        "auc": torch.stack(follows).mean((0, 2)),
        "lines": torch.stack(sinks).mean((0, 2)),
        "hops": torch.stack(profile).nanmean(0),
        "received": received_attention(attn) * real,
        "is_node": is_node,
    }


def _largest(task: MajorityColour) -> int:
    return max(len(tree.nodes) for tree in task.trees["test"])


def _seen(looks: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Alignment, lines and shifts, of each seed."""
    measured: dict[str, Any] = {}
    for when, found in looks.items():
        measured[f"alignment_auc_by_layer_{when}_training_each_seed"] = [_three(look["auc"]) for look in found]
        measured[f"share_of_heads_and_prompts_with_a_line_by_layer_{when}_training_each_seed"] = [
            _three(look["lines"]) for look in found
        ]
    shifts = [
        node_text_shift(before["received"], after["received"], before["is_node"])
        for before, after in zip(looks["before"], looks["after"], strict=True)
    ]
    for kind in ("node", "text"):
        measured[f"shift_of_log10_attention_to_{kind}_tokens_each_seed"] = [
            _comparison(getattr(shift, kind)) for shift in shifts
        ]
    return measured


def _comparison(found: Comparison) -> dict[str, Any]:
    kept = asdict(found)
    first, second = kept.pop("means")
    return {"moved_by": round(second - first, 3), **{name: float(f"{value:.3g}") for name, value in kept.items()}}


def _three(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _paired(values: list[float], others: list[float]) -> list[float]:
    """Mean difference seed by seed, and its standard error."""
    apart = [a - b for a, b in zip(values, others, strict=True)]
    return [round(statistics.mean(apart), 4), round(statistics.stdev(apart) / len(apart) ** 0.5, 4)]


def _rounded(values: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in each] for name, each in values.items()}


def _plots(
    full: dict[str, float],
    both_ways: dict[str, list[float]],
    losses: dict[str, list[tuple[float, float]]],
    looks: dict[str, list[dict[str, Tensor]]],
) -> list[Plot]:
    names = {name: float(at) for at, name in enumerate(full)}
    profiles = {when: torch.stack([look["hops"] for look in found]).mean(0) for when, found in looks.items()}
    return [
        Plot(
            "Held-out accuracy under the full mask",
            "window in training",
            "accuracy",
            {
                "trained within the causal mask": [(names[name], value) for name, value in full.items()],
                "trained both ways": [(names[name], statistics.mean(each)) for name, each in both_ways.items()],
            },
            kind="bar",
            references={"guessing": 0.5},
            ticks=names,
        ),
        Plot("Training loss, one batch each", "step", "loss in nats", losses),
        Plot(
            "Weight between two nodes, by steps along the tree",
            "steps between them",
            "mean weight of a pair",
            {
                f"layer {layer + 1}, {when} training": [
                    (float(hops), float(value)) for hops, value in enumerate(profile[layer])
                ]
                for when, profile in profiles.items()
                for layer in range(len(profile))
            },
            ticks={str(hops): float(hops) for hops in range(5)},
        ),
    ]
