"""Quality at equal cost: what sparse mechanisms keep of full attention, against the share of pairs that they compute.

Every mechanism whose catalogue entry has a ``sweep`` is measured at each of its settings: on held-out text, put into a
model (bits per byte, recalled mass), and on tensors (recalled mass, error of the output): smooth fields in space and
time, as video has them, and white noise, where no choice of few keys can be good and an honest method keeps many. The
oracle, which knows the true attention mass of every block, and static patterns stand beside them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.fields import field_tokens
from regard.bench.kept import load_kept, save_kept
from regard.bench.subjects import (
    Subject,
    load_subject,
    log_probabilities,
    read_text,
    text_bytes,
    token_windows,
    watched_calls,
)
from regard.errors import OptionError, RegardError
from regard.mechanism import Mechanism
from regard.registry import build, catalogue, describe, get
from regard.sparse.frame import compose
from regard.sparse.metrics import attention_overlap
from regard.sparse.scoring import sampled_scores
from regard.sparse.selection import TopK

__all__ = ["BASELINES", "Frontier", "Plan", "Point", "Setting", "frontier", "settings_of", "stretched"]

VERSION = 1
Group = Literal["mechanism", "oracle", "static"]
TENSORS = ("fields", "noise")

GRID = (8, 16, 16)
"""Frames, height and width of the tensor workloads: 2048 tokens."""
_HEADS, _HEAD_DIM = 4, 64
_COLUMNS, _ROWS = 256, 1024
# Layers of a model whose densities and recalled masses are measured.
_LAYERS = 3
_DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7)


@dataclass(frozen=True)
class Setting:
    """One point to measure: ``name`` in the legend, and what builds it."""

    name: str
    group: Group
    options: Mapping[str, Any]
    mechanism: str | None = None
    """Its name in the registry; None for the oracle."""

    def build(self, context: Mapping[str, Any]) -> Mechanism:
        """The mechanism, for a layer with these heads."""
        if self.mechanism is None:
            return _oracle(**self.options)
        module = build(self.mechanism, self.options, **context)
        assert isinstance(module, Mechanism)
        return module


def _oracle(ratio: float, block_size: int = 64) -> Mechanism:
    """The blocks of largest true attention mass, and each query's own."""
    score = partial(sampled_scores, share=1.0, minus="sum", reduce="mean")
    return compose(score, TopK(ratio=ratio), sinks=0, local=1, block_q=block_size, block_k=block_size)


BASELINES: tuple[Setting, ...] = (
    *(Setting("oracle blocks", "oracle", {"ratio": share}) for share in _DENSITIES),
    *(Setting("window", "static", {"window": n, "sinks": 0}, "sliding_window") for n in (64, 128, 256, 512, 1024)),
    *(
        Setting("window + sinks", "static", {"window": n, "sinks": 16}, "sliding_window")
        for n in (64, 128, 256, 512, 1024)
    ),
    *(
        Setting(
            "strided blocks",
            "static",
            {"block_size": 64, "local_blocks": 1, "stride": n, "homogeneous": True},
            "s2_attention",
        )
        for n in (16, 8, 4, 2)
    ),
)
"""What every mechanism is held against."""


def settings_of(name: str) -> list[Setting]:
    """The settings of a mechanism that its catalogue entry sweeps."""
    entry = describe(name)
    if not entry.sweep:
        swept = ", ".join(e.key for e in catalogue() if e.sweep)
        raise OptionError(f"{name} has no settings to sweep. There are: {swept}.")
    return [Setting(name, "mechanism", {**entry.compare, **options}, name) for options in entry.sweep]


@dataclass(frozen=True)
class Plan:
    """One run. ``lengths``: of windows of text. ``interpolate``: squeeze the positions of a window longer than the
    model's context into it, otherwise they run on. ``mechanisms``: names, by default all that can be swept."""

    model: str = "nano"
    text: str | None = None
    mechanisms: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (2048, 8192)
    tokens: int = 8192
    """Of text at each length."""
    interpolate: bool = False

    def settings(self) -> list[Setting]:
        """All points to measure, baselines first."""
        names = self.mechanisms or tuple(entry.key for entry in catalogue() if entry.sweep)
        return [*BASELINES, *(setting for name in names for setting in settings_of(name))]


@dataclass
class Point:
    """One setting on one workload (``"text 2048"``, ``"fields"``, ``"noise"``).

    ``density``: share of the pairs that full attention computes. ``recall``: mass in common with full attention's
    weights. ``bits_per_byte``: of a model on text. ``error``: of the output, relative to full attention's, on tensors.
    ``reason``: why there is nothing.
    """

    workload: str
    name: str
    group: Group
    options: dict[str, Any]
    density: float | None = None
    recall: float | None = None
    bits_per_byte: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass
class Frontier:
    """All points, and full attention's bits per byte by workload; ``save`` and ``load`` keep it as
    ``frontier.json``."""

    fingerprint: dict[str, Any]
    full: dict[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    version: int = VERSION

    @property
    def workloads(self) -> list[str]:
        """In the order of measuring."""
        return list(dict.fromkeys(point.workload for point in self.points))

    def find(self, workload: str, setting: Setting) -> Point | None:
        """The point of a setting, if it was measured."""
        key = workload, setting.name, dict(setting.options)
        return next((p for p in self.points if (p.workload, p.name, p.options) == key), None)

    def at(self, workload: str, name: str, measure: str, density: float) -> float | None:
        """A measure at a density between two measured ones, linear in its logarithm; None outside of what was
        measured."""
        found = sorted(
            (p.density, getattr(p, measure))
            for p in self.points
            if (p.workload, p.name) == (workload, name) and p.density and getattr(p, measure) is not None
        )
        for (low, a), (high, b) in pairwise(found):
            if low <= density <= high and low < high:
                share = math.log(density / low) / math.log(high / low)
                return float(a + share * (b - a))
        return None

    def save(self, folder: Path) -> None:
        """Write ``frontier.json``, whole or not at all."""
        save_kept(folder / "frontier.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Frontier | None:
        """What an earlier run left in ``folder``; None if there is nothing."""
        return load_kept(folder / "frontier.json", VERSION, cls._read, "a frontier")

    @classmethod
    def _read(cls, raw: dict[str, Any]) -> Frontier:
        return cls(raw["fingerprint"], raw["full"], [Point(**point) for point in raw["points"]])


def frontier(
    plan: Plan | None = None,
    *,
    out: Path | str | None = None,
    report: Callable[[int, int, str], None] = lambda done, total, line: None,
    subject: Subject | None = None,
    **settings: Any,
) -> Frontier:
    """Measure all points; ``settings`` are :class:`Plan`'s fields for those who give no plan.

    report: called with points done, points in all and the next one. With ``out``, each point is written at once and a
    later call of the same model, text and lengths goes on from there.
    """
    plan = plan or Plan(**settings)
    wanted, folder = plan.settings(), None if out is None else Path(out)
    fingerprint = {
        "model": plan.model,
        "text": plan.text or "held-out standard library",
        "tokens": plan.tokens,
        "interpolate": plan.interpolate,
        "grid": list(GRID),
    }
    done = None if folder is None else Frontier.load(folder)
    if done is not None and done.fingerprint != fingerprint:
        raise OptionError(
            f"{folder} holds a frontier of another model, text or amount: {done.fingerprint} against {fingerprint}. "
            "Give another --out, or remove it."
        )
    result = done or Frontier(fingerprint)
    total = len(wanted) * (len(plan.lengths) + len(TENSORS))
    count = 0

    def run(workload: str, measure: Callable[[Setting, Point], None]) -> None:
        nonlocal count
        for setting in wanted:
            report(count, total, f"{workload}: {setting.name} {_brief(setting.options)}")
            count += 1
            if result.find(workload, setting) is not None:
                continue
            point = Point(workload, setting.name, setting.group, dict(setting.options))
            try:
                measure(setting, point)
            except RegardError as error:
                point.reason = str(error)
            result.points.append(point)
            if folder is not None:
                result.save(folder)

    for workload in TENSORS:
        run(workload, partial(_on_tensors, _tensors(workload)))
    for length in plan.lengths:
        own = subject or load_subject(plan.model)
        own = stretched(own, length, plan.interpolate)
        windows = token_windows(own, read_text(plan.text), length, max(plan.tokens // length, 1))
        name = f"text {length}"
        if name not in result.full:
            result.full[name] = _bits_per_byte(own, windows, _nats(own, windows))
        run(name, partial(_on_text, own, windows))
    report(total, total, "done")
    return result


def _brief(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def stretched(subject: Subject, length: int, interpolate: bool) -> Subject:
    """A model for windows of ``length`` tokens: as it is where they fit its context; otherwise its rotary positions run
    on, or are squeezed into the context (Chen et al., 2023, arXiv 2306.15595)."""
    limit = subject.max_length
    if limit is None or length <= limit:
        return subject
    config = subject.model.config
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind != "default":
        raise OptionError(
            f"{subject.name} was made for {limit} tokens, and its positions are not plainly rotary: it cannot read "
            f"{length}. Choose lengths up to {limit}."
        )
    config.max_position_embeddings = length
    if interpolate:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": length / limit}
        for parent in list(subject.model.modules()):
            for name, child in parent.named_children():
                if hasattr(child, "inv_freq"):
                    setattr(parent, name, type(child)(config=config))
    return subject


def _nats(subject: Subject, windows: Tensor) -> float:
    """Loss summed over all tokens but the first of each window."""
    return sum(
        float(F.nll_loss(log_probabilities(subject.model, window), window[1:], reduction="sum")) for window in windows
    )


def _bits_per_byte(subject: Subject, windows: Tensor, nats: float) -> float:
    return nats / math.log(2) / sum(text_bytes(subject, window[1:]) for window in windows)


def _on_text(subject: Subject, windows: Tensor, setting: Setting, point: Point) -> None:
    from regard.retrofit import discover, retrofit

    if "causal-self" not in _class(setting).patterns:
        point.reason = "not defined for causal attention"
        return
    modules = {site.path: setting.build(site.context) for site in discover(subject.model)}
    for module in modules.values():
        module.eval()
    with retrofit(subject.model, modules) as handle:
        with watched_calls(list(handle.modules.values())) as calls:
            nats = _nats(subject, windows[:1])
        point.bits_per_byte = _bits_per_byte(subject, windows, nats + _nats(subject, windows[1:]))
        shares, kept = [], []
        for mechanism, inputs, keywords in calls[:: max(len(calls) // _LAYERS, 1)]:
            full = (len(windows[0]) + 1) / (2 * len(windows[0]))
            shares.append((mechanism.pairs(*inputs, **keywords) or 0.0) / full)
            overlap = attention_overlap(mechanism, inputs[0], inputs[1], columns=_COLUMNS, rows=_ROWS, **keywords)
            kept.append(float(overlap.mean()))
    point.density, point.recall = statistics.mean(shares), statistics.mean(kept)


def _class(setting: Setting) -> type[Mechanism]:
    if setting.mechanism is None:
        return Mechanism
    cls = get(setting.mechanism)
    assert issubclass(cls, Mechanism)
    return cls


def _tensors(workload: str) -> Sequence[Tensor]:
    if workload == "noise":
        generator = torch.Generator().manual_seed(0)
        return [2.0 * torch.randn(1, _HEADS, math.prod(GRID), _HEAD_DIM, generator=generator) for _ in range(3)]
    # Logits of some units between neighbours, and a little of each token's own.
    return field_tokens(GRID, _HEADS, _HEAD_DIM, seed=0, noise=0.3, size=1.2, waves=2.5)


def _grid(mechanism: Mechanism) -> tuple[int, ...] | None:
    """Space and time for a mechanism that reads them; frames and their tokens for one that takes two axes."""
    if 3 in mechanism.grid_axes:
        return GRID
    return (GRID[0], math.prod(GRID[1:])) if mechanism.needs_grid and 2 in mechanism.grid_axes else None


@torch.no_grad()
def _on_tensors(tensors: Sequence[Tensor], setting: Setting, point: Point) -> None:
    query, key, value = tensors
    cls = _class(setting)
    if "self" not in cls.patterns:
        point.reason = "defined for causal attention alone"
        return
    context = {"num_heads": _HEADS, "num_kv_heads": _HEADS, "head_dim": _HEAD_DIM, "layer_index": 0, "num_layers": 1}
    mechanism = setting.build(context).eval()
    grid = _grid(mechanism)
    torch.manual_seed(0)
    out = mechanism(query, key, value, grid=grid)
    expected = F.scaled_dot_product_attention(query, key, value)
    point.error = float((out - expected).norm() / expected.norm())
    point.density = mechanism.pairs(query, key, value, grid=grid)
    point.recall = float(attention_overlap(mechanism, query, key, columns=_COLUMNS, rows=_ROWS, grid=grid).mean())
