"""Language models that differ in their attention alone, at equal parameters and at equal training FLOPs.

The model is nano's at a smaller size (:class:`~regard.models.decoder.Decoder`) on the bytes of nano's corpus, whose
held-out modules no training step sees. Plain attention (``full``) sets both measures:

- *Equal parameters*: the width of the MLPs is chosen so that all parameters together are within a hundredth of its
  number; as many steps, on the same text in the same order.
- *Equal FLOPs*: that same model after as many training FLOPs as the baseline took, three times those of the forward
  passes: fewer steps for a dearer mechanism, more for a cheaper one.

The learning rate stays as it is after its warm-up, so that one run gives both readings. What is done is kept as it
comes, a result a run and a checkpoint a minute; the same comparison goes on from there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.equal_cost import count_parameters, forward_flops, matched
from regard.bench.kept import load_kept, save_kept
from regard.bench.measure import training_clock
from regard.bench.training import reads_ahead
from regard.errors import OptionError, RegardError, UnsupportedPatternError
from regard.mechanism import Layer, Mechanism
from regard.models.decoder import Decoder, positions_of
from regard.models.nano.corpus import Split, read_corpus
from regard.models.nano.train import Windows, cut
from regard.registry import get
from regard.registry import options as known_options

__all__ = [
    "BASELINE",
    "FORMS",
    "LanguageResult",
    "LanguageRun",
    "LanguageSettings",
    "Variant",
    "held_out_bits",
    "module_bytes",
    "run_languages",
    "variants_of",
]

VERSION = 1
BASELINE = "full"
"""What all others are compared with."""
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "dense_attention": {
        "entmax": {"normalizer": "entmax"},
        "sigmoid": {"normalizer": "sigmoid"},
        "relu": {"normalizer": "relu"},
        "distance": {"score": "distance"},
        "heads mixed before": {"heads": "pre"},
        "heads mixed after": {"heads": "post"},
    },
    "deconstructed_attention": {
        "approximate": {"kind": "approximate"},
        "nonapproximate": {"kind": "nonapproximate"},
    },
    "program": {"softmax_one": {"rowwise": "softmax_one"}},
    "flex_attention": {},
    "attention_engine": {},
}
"""Options of names that are plain attention by default, or nothing else."""

# Weight of a layer's balance_loss (MoH, arXiv 2410.11842, section 3.3).
_BALANCE = 0.01
# Seconds between two checkpoints.
_KEPT_EVERY = 60.0
_SEPARATOR = 0


@dataclass(frozen=True)
class Variant:
    """A mechanism or layer with its options; ``label``: what it is called in tables."""

    label: str
    mechanism: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LanguageSettings:
    """``hidden``: of the baseline's MLPs. steps: of training at equal parameters, ``batch`` windows of ``length`` bytes
    each. ``warmup``: steps until the learning rate ``lr`` is reached. ``tested``: held-out windows. ``points``: of a
    learning curve."""

    steps: int = 600
    batch: int = 4
    length: int = 128
    embed_dim: int = 64
    depth: int = 2
    num_heads: int = 4
    hidden: int = 240
    lr: float = 3e-3
    warmup: int = 40
    tested: int = 512
    points: int = 20

    def __post_init__(self) -> None:
        if self.steps < self.points:
            raise OptionError(f"A learning curve of {self.points} points needs as many steps; got {self.steps}.")

    def model(self, variant: Variant, hidden: int, seed: int = 0) -> Decoder:
        """An untrained model whose MLPs have this width."""
        torch.manual_seed(seed)
        return Decoder(
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            hidden=hidden,
            mechanism=variant.mechanism,
            options=variant.options,
            max_length=self.length,
        )


@dataclass
class LanguageRun:
    """One variant with one seed.

    parameters: of the whole model. flops: of a training step. flops_steps: steps at equal FLOPs. bits: per held-out
    byte, at equal ``"parameters"`` and at equal ``"flops"``. curve: bits per byte of the training text, each batch
    before it is learned from, a mean for each of ``points`` stretches of ``steps``. seconds: a step. reason: why there
    are no bits.
    """

    label: str
    mechanism: str
    options: dict[str, Any]
    seed: int
    hidden: int = 0
    parameters: int = 0
    flops: int = 0
    flops_steps: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    seconds: float | None = None
    reason: str = ""


@dataclass
class LanguageResult:
    """All runs, kept as ``language.json``."""

    settings: dict[str, Any]
    runs: list[LanguageRun] = field(default_factory=list)
    version: int = VERSION

    def find(self, label: str, seed: int) -> LanguageRun | None:
        """One variant's run with a seed."""
        return next((run for run in self.runs if (run.label, run.seed) == (label, seed)), None)

    def labels(self) -> list[str]:
        """The baseline, then the others by their bits at equal parameters, those without any last."""
        others = {run.label: self.mean_difference(run.label) for run in self.runs if run.label != BASELINE}
        return [BASELINE, *sorted(others, key=lambda label: (math.isnan(others[label]), others[label]))]

    def bits(self, label: str, which: str) -> list[float]:
        """Of each seed, at equal ``"parameters"`` or ``"flops"``."""
        return [run.bits[which] for run in self.runs if run.label == label and which in run.bits]

    def differences(self, label: str, which: str) -> list[float]:
        """Bits more than the baseline's, seed by seed."""
        pairs = [(run, self.find(BASELINE, run.seed)) for run in self.runs if run.label == label]
        return [
            run.bits[which] - base.bits[which]
            for run, base in pairs
            if base is not None and which in run.bits and which in base.bits
        ]

    def mean_difference(self, label: str, which: str = "parameters") -> float:
        """Over seeds; not a number where there is none."""
        found = self.differences(label, which)
        return statistics.fmean(found) if found else math.nan

    def only(self, variants: Sequence[Variant], seeds: int) -> LanguageResult:
        """These variants and the first so many seeds alone."""
        labels = {variant.label for variant in variants}
        return LanguageResult(self.settings, [run for run in self.runs if run.label in labels and run.seed < seeds])

    def save(self, folder: Path) -> None:
        """Write ``language.json``, whole or not at all."""
        save_kept(folder / "language.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> LanguageResult | None:
        """What an earlier run left in ``folder``; None if there is nothing."""
        return load_kept(folder / "language.json", VERSION, cls._read, "a comparison of language models")

    @classmethod
    def _read(cls, raw: dict[str, Any]) -> LanguageResult:
        return cls(raw["settings"], [LanguageRun(**run) for run in raw["runs"]])


def variants_of(
    names: Iterable[str], options: Mapping[str, Mapping[str, Any]] | None = None, length: int = 128
) -> tuple[Variant, ...]:
    """The baseline, and each name in the forms of :data:`FORMS` or with its own defaults.

    options: by name, in place of both. length: what a layer that is built for one length (``max_len``) is built for.
    Where some have learned positions, the baseline with these is among them: part of their difference is theirs.
    """
    others = []
    for name in dict.fromkeys(names):
        if options and name in options:
            others.append(Variant(name, name, dict(options[name])))
        elif name in FORMS:
            others += [Variant(f"{name}: {form}", name, own) for form, own in FORMS[name].items()]
        elif name != BASELINE:
            sized = {"max_len": length} if "max_len" in known_options(name) else {}
            others.append(Variant(name, name, sized))
    first = [Variant(BASELINE, BASELINE)]
    if any(positions_of(variant.mechanism, variant.options) == "learned" for variant in others):
        first.append(Variant(f"{BASELINE}: learned positions", BASELINE, {"rotary": False}))
    return tuple(first + others)


@cache
def module_bytes(split: Split) -> list[tuple[str, Tensor]]:
    """The modules of one split of nano's corpus: package, and bytes as tokens behind a zero, which no source has."""
    return [
        (module.package, torch.frombuffer(bytearray([_SEPARATOR]) + module.text.encode(), dtype=torch.uint8))
        for module in read_corpus(split)
    ]


@torch.no_grad()
def held_out_bits(model: Decoder, settings: LanguageSettings) -> float:
    """Bits per byte on windows of modules that no training step sees, always the same ones."""
    windows = cut(module_bytes("held_out"), settings.length + 1, Random(0))
    windows = windows[:: max(len(windows) // settings.tested, 1)][: settings.tested]
    was_training, nats, seen = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(windows), settings.batch):
        found = _nats(model, torch.stack(windows[start : start + settings.batch]))
        nats, seen = nats + float(found[0]), seen + found[1]
    model.train(was_training)
    return nats / seen / math.log(2)


def _nats(model: Decoder, windows: Tensor) -> tuple[Tensor, int]:
    """Summed over the bytes of windows ``(batch, length + 1)``, and how many bytes these are; separators are none."""
    tokens = windows.long()
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == _SEPARATOR, -100)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), int((targets >= 0).sum())


def run_languages(
    settings: LanguageSettings,
    variants: Sequence[Variant],
    seeds: int = 3,
    out: Path | str | None = None,
    report: Callable[[str, float], None] = lambda line, done: None,
    finished: Callable[[LanguageResult, LanguageRun], None] = lambda result, run: None,
) -> LanguageResult:
    """Train every variant with every seed, all variants of one seed first.

    report: what is going on, and how many runs are done, the current one in part. finished: called after each. With
    ``out``, what is done is kept there and not done again. Raises OptionError where another comparison's results lie.
    """
    folder = None if out is None else Path(out)
    kept = None if folder is None else LanguageResult.load(folder)
    if kept is not None and kept.settings != asdict(settings):
        raise OptionError(
            f"{folder} holds another comparison: {kept.settings} against {asdict(settings)}. Give another --out, or "
            "remove it."
        )
    baseline = settings.model(Variant(BASELINE, BASELINE), settings.hidden)
    parameters, flops = count_parameters(baseline), _step_flops(settings, baseline)
    earlier = LanguageResult(asdict(settings)) if kept is None else kept
    result, done = LanguageResult(asdict(settings), list(earlier.runs)), 0
    for seed in range(seeds):
        for variant in variants:
            run = earlier.find(variant.label, seed)
            if run is None or run.options != dict(variant.options) or run.reason:
                run = LanguageRun(variant.label, variant.mechanism, dict(variant.options), seed)

                def tell(line: str, share: float, run: LanguageRun = run, before: int = done) -> None:
                    report(f"{run.label}, seed {run.seed}: {line}", before + share)

                try:
                    _train(settings, _prepared(settings, variant, run, parameters, flops), run, folder, tell)
                except Exception as error:
                    # One variant's fault is not the others'.
                    run.bits, run.curve = {}, []
                    run.reason = str(error) if isinstance(error, RegardError) else f"{type(error).__name__}: {error}"
                result.runs = [r for r in result.runs if (r.label, r.seed) != (run.label, seed)] + [run]
                if folder is not None:
                    result.save(folder)
            done += 1
            finished(result.only(variants, seeds), run)
    return result.only(variants, seeds)


def _step_flops(settings: LanguageSettings, model: Decoder) -> int:
    """A backward pass takes twice what the forward pass takes."""
    return 3 * forward_flops(model, torch.zeros(settings.batch, settings.length, dtype=torch.long))


def _prepared(settings: LanguageSettings, variant: Variant, run: LanguageRun, parameters: int, flops: int) -> Decoder:
    """The untrained model, its measures written to ``run``; the baseline's are ``parameters`` and ``flops`` a step."""
    if "causal-self" not in cast(type[Layer | Mechanism], get(variant.mechanism)).patterns:
        raise UnsupportedPatternError(f"{variant.mechanism} has no causal form, and a language model needs one.")
    model, run.hidden = matched(lambda hidden: settings.model(variant, hidden, run.seed), parameters, settings.hidden)
    run.parameters, run.flops = count_parameters(model), _step_flops(settings, model)
    run.flops_steps = max(round(settings.steps * flops / run.flops), 1)
    texts = Windows(module_bytes("train"), run.seed)
    if reads_ahead(model, *(texts.next(settings.length, 2)[:, :-1].long() for _ in range(2))):
        raise UnsupportedPatternError(f"{variant.label} lets later tokens change earlier outputs.")
    return model


def _train(
    settings: LanguageSettings,
    model: Decoder,
    run: LanguageRun,
    folder: Path | None,
    report: Callable[[str, float], None],
) -> None:
    """Train until both readings are taken."""
    texts = Windows(module_bytes("train"), run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ends = [settings.steps * (point + 1) // settings.points for point in range(settings.points)]
    file = None if folder is None else folder / f"{run.label.replace(': ', '-').replace(' ', '_')}-{run.seed}.pt"
    about = {"settings": asdict(settings), "options": run.options}
    step, spent, nats, seen = 0, 0.0, 0.0, 0
    if file is not None and file.is_file():
        kept = torch.load(file, weights_only=True)
        if kept["about"] == about:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            texts.load_state_dict(kept["texts"])
            torch.set_rng_state(kept["random"])
            step, spent, nats, seen = kept["step"], kept["spent"], kept["nats"], kept["seen"]
            run.bits, run.curve = kept["bits"], kept["curve"]

    def keep(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"texts": texts.state_dict(), "random": torch.get_rng_state(), "about": about}
        state |= {"step": step, "spent": spent, "nats": nats, "seen": seen, "bits": run.bits, "curve": run.curve}
        torch.save(state, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)

    saved, total = spent, max(settings.steps, run.flops_steps)
    model.train()
    while step < total:
        began = training_clock()
        for part in optimizer.param_groups:
            part["lr"] = settings.lr * min((step + 1) / settings.warmup, 1)
        summed, counted = _nats(model, texts.next(settings.length, settings.batch))
        loss = summed / counted
        optimizer.zero_grad(set_to_none=True)
        (loss + _BALANCE * _balance(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, nats, seen = step + 1, nats + float(summed.detach()), seen + counted
        if not math.isfinite(nats):
            raise OptionError(f"Training diverged: the loss of step {step} is {float(loss.detach())}.")
        spent += training_clock() - began
        if step in ends:
            run.curve.append(nats / seen / math.log(2))
            nats, seen = 0.0, 0
        for which, at in (("parameters", settings.steps), ("flops", run.flops_steps)):
            if step == at:
                run.bits[which] = held_out_bits(model, settings)
        report(f"step {step}/{total}, loss {float(loss.detach()):.3f}", step / total)
        if file is not None and spent - saved > _KEPT_EVERY:
            keep(file)
            saved = spent
    run.seconds = spent / step
    if file is not None:
        file.unlink(missing_ok=True)


def _balance(model: Decoder) -> Tensor:
    """What layers leave behind after a pass to be added to the loss, such as MoH's ``balance_loss``."""
    found = [getattr(module, "balance_loss", None) for module in model.modules()]
    return sum((loss for loss in found if isinstance(loss, Tensor)), torch.zeros(()))
