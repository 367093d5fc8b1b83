"""The main job: what attention mechanisms cost, and what they change, on a real model and real text.

For each mechanism a twin of the model (sharing its weights) is retrofitted, and twin and original run in turn on the
same windows of text, so that every ratio is measured side by side.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.kept import load_kept, save_kept
from regard.bench.measure import peak_bytes, seconds
from regard.bench.subjects import (
    Subject,
    load_subject,
    log_probabilities,
    mechanism_calls,
    read_text,
    text_bytes,
    token_windows,
)
from regard.errors import OptionError, RegardError
from regard.mechanism import Mechanism
from regard.registry import catalogue, describe, get

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from regard.retrofit import Handle


__all__ = ["Comparison", "Plan", "Row", "applicable", "compare", "default_mechanisms"]

VERSION = 1
_MAP_CELLS = 128


@dataclass(frozen=True)
class Plan:
    """One comparison. ``options``: per mechanism, over what the catalogue suggests for this length. ``train``: steps of
    fine-tuning for mechanisms that need training (0: they are shown untrained). ``windows``: pieces of text."""

    model: str = "nano"
    text: str | None = None
    mechanisms: tuple[str, ...] = ()
    length: int = 2048
    windows: int = 8
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train: int = 0
    decode_tokens: int = 16
    passage: int = 512

    def settings(self, name: str) -> dict[str, Any]:
        """The options that ``name`` runs with."""
        return {**describe(name).compare, **self.options.get(name, {})}


@dataclass
class Row:
    """One mechanism's result. ``group``: 'exact', 'training-free', 'untrained', 'trained', 'failed' or 'not
    applicable'.

    Ratios are to the untouched model's full attention, measured in turn. ``pairs`` is the share of the pairs that full
    causal attention computes; None where a mechanism forms no pairs. ``kl`` in nats per token.
    """

    mechanism: str
    group: str
    options: dict[str, Any] = field(default_factory=dict)
    bits_per_byte: float | None = None
    change: float | None = None
    kl: float | None = None
    pairs: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    memory_ratio: float | None = None
    needs_training: bool = False
    reason: str = ""
    maps: list[str] = field(default_factory=list)
    """One PNG per layer, base64: the implied attention of its heads side by side, pooled to cells."""


@dataclass
class Comparison:
    """All rows of a run and what they were measured on; ``save`` and ``load`` keep it as ``results.json``."""

    fingerprint: dict[str, Any]
    reference: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write ``results.json``, whole or not at all."""
        save_kept(folder / "results.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Comparison | None:
        """What an earlier run left in ``folder``; None if there is nothing."""
        return load_kept(folder / "results.json", VERSION, cls._read, "a comparison")

    @classmethod
    def _read(cls, raw: dict[str, Any]) -> Comparison:
        return cls(raw["fingerprint"], raw["reference"], [Row(**row) for row in raw["rows"]])


def applicable(name: str) -> str:
    """Why ``name`` cannot stand in a causal language model; empty if it can."""
    cls = get(name)
    if not issubclass(cls, Mechanism):
        kind = describe(name).kind
        return f"a {kind} with parameters of its own, not a mechanism on (query, key, value)"
    if "causal-self" not in cls.patterns:
        return "not defined for causal attention"
    if cls.applies_rotary:
        return "applies rotary positions itself, and a model hands over queries and keys that have theirs"
    return ""


def default_mechanisms(training_free: bool = False) -> list[str]:
    """Every mechanism on (query, key, value): ``full``, then those that need no training, then the others (left out
    with ``training_free``), then those that cannot stand in a causal model (likewise)."""
    ranked = []
    for entry in catalogue("mechanism"):
        if entry.module:
            needs_training = bool(get(entry.key).needs_training)  # type: ignore[attr-defined]
            ranked.append((bool(applicable(entry.key)), needs_training, entry.key != "full", entry.key))
    return [name for refused, needs, _, name in sorted(ranked) if not (training_free and (refused or needs))]


def compare(
    plan: Plan | None = None,
    *,
    out: Path | str | None = None,
    report: Callable[[str], None] = lambda line: None,
    subject: Subject | None = None,
    **settings: Any,
) -> Comparison:
    """Run the comparison; ``settings`` are :class:`Plan`'s fields for those who give no plan.

    With ``out``, each finished mechanism is written at once and a later call with the same plan goes on from there;
    after Ctrl-C what is finished is returned by raising KeyboardInterrupt only once it is saved.
    """
    plan = plan or Plan(**settings)
    names = list(plan.mechanisms) or default_mechanisms()
    reasons = {name: applicable(name) for name in names}
    unused = set(plan.options) - set(names)
    if unused:
        raise OptionError(f"Options are given for {sorted(unused)}, which are not compared: {', '.join(names)}.")
    subject = subject or load_subject(plan.model)
    windows = token_windows(subject, read_text(plan.text), plan.length, plan.windows)
    fingerprint = _fingerprint(plan, windows)
    folder = None if out is None else Path(out)
    done = None if folder is None else Comparison.load(folder)
    if done is not None and done.fingerprint != fingerprint:
        raise OptionError(
            f"{folder} holds a comparison of another model, text or length: {done.fingerprint} against {fingerprint}. "
            "Give another --out, or remove it."
        )
    result = done or Comparison(fingerprint, _reference(subject, windows, plan))
    if folder is not None:
        result.save(folder)
    for name in names:
        wanted = {"mechanism": name, "options": plan.settings(name) if not reasons[name] else {}}
        kept = [
            r for r in result.rows if r.mechanism == name and r.options == wanted["options"] and r.group != "failed"
        ]
        if kept and (plan.train == 0 or kept[0].group != "untrained"):
            report(f"{name}: kept from an earlier run")
            continue
        result.rows = [row for row in result.rows if row.mechanism != name]
        if reasons[name]:
            needs = bool(getattr(get(name), "needs_training", False))
            result.rows.append(Row(name, "not applicable", reason=reasons[name], needs_training=needs))
        else:
            report(f"{name}: measuring")
            result.rows.append(_measure(subject, windows, name, plan, result.reference, report))
        result.rows.sort(key=lambda row: names.index(row.mechanism) if row.mechanism in names else len(names))
        if folder is not None:
            result.save(folder)
    return result


def _fingerprint(plan: Plan, windows: Tensor) -> dict[str, Any]:
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    return {
        "model": plan.model,
        "text": plan.text or "held-out standard library",
        "length": plan.length,
        "windows": len(windows),
        "tokens": digest,
    }


@torch.no_grad()
def _peak(model: PreTrainedModel, window: Tensor) -> int:
    """Peak bytes of a prefill without the output head, whose logits would hide everything else."""
    return peak_bytes(lambda: model.base_model(input_ids=window[None], use_cache=False))


def _timed_log_probabilities(model: PreTrainedModel, window: Tensor) -> tuple[float, Tensor]:
    kept: list[Tensor] = []
    spent = seconds(lambda: kept.append(log_probabilities(model, window)))
    return spent, kept[0]


def _reference(subject: Subject, windows: Tensor, plan: Plan) -> dict[str, Any]:
    nats = text = 0.0
    early, late = [], []
    for window in windows:
        loss = F.nll_loss(log_probabilities(subject.model, window), window[1:], reduction="none")
        nats, text = nats + float(loss.sum()), text + text_bytes(subject, window[1:])
        early.append(float(loss[: len(loss) // 8].mean()))
        late.append(float(loss[len(loss) // 2 :].mean()))
    passage = windows[0, : plan.passage]
    return {
        "bits_per_byte": nats / math.log(2) / text,
        "bytes": int(text),
        "parameters": subject.parameters,
        "loss_first_eighth": statistics.mean(early),
        "loss_second_half": statistics.mean(late),
        "passage": [subject.tokenizer.decode([token]) for token in passage.tolist()],
    }


def _twin(model: PreTrainedModel, share: bool = True) -> PreTrainedModel:
    """The same model as another object, so that one can be changed while the other runs; weights are shared."""
    tensors = [*model.parameters(), *model.buffers()] if share else []
    twin: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return twin


def _measure(
    subject: Subject,
    windows: Tensor,
    name: str,
    plan: Plan,
    reference: dict[str, Any],
    report: Callable[[str], None],
) -> Row:
    from regard.retrofit import retrofit

    options = plan.settings(name)
    needs_training = bool(get(name).needs_training)  # type: ignore[attr-defined]
    exact = bool(get(name).exact)  # type: ignore[attr-defined]
    train = plan.train if needs_training else 0
    group = "exact" if exact else "trained" if train else "untrained" if needs_training else "training-free"
    row = Row(name, group, options, needs_training=needs_training)
    twin = _twin(subject.model, share=not train)
    try:
        with retrofit(twin, name, **options) as handle:
            mechanisms = [module for module in handle.modules.values() if isinstance(module, Mechanism)]
            if train:
                _fine_tune(twin, mechanisms, subject, plan, train, report)
            _quality(subject, twin, windows, row, reference, report)
            row.pairs = _pairs(twin, mechanisms, windows[0])
            row.maps = _maps(twin, mechanisms, windows[0, : plan.passage])
            row.memory_ratio = _peak(twin, windows[0]) / _peak(subject.model, windows[0])
            row.decode_ratio = _decode_ratio(subject.model, twin, handle, windows[0], plan.decode_tokens)
    except RegardError as error:
        row.group, row.reason = "failed", str(error)
    return row


def _quality(
    subject: Subject,
    twin: PreTrainedModel,
    windows: Tensor,
    row: Row,
    reference: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """Loss, divergence and prefill time, window by window, both models in turn."""
    nats = divergence = 0.0
    ratios = []
    log_probabilities(twin, windows[0])
    for index, window in enumerate(windows):
        own, full = _timed_log_probabilities(subject.model, window)
        other, changed = _timed_log_probabilities(twin, window)
        ratios.append(other / own)
        nats += float(F.nll_loss(changed, window[1:], reduction="sum"))
        divergence += float(F.kl_div(changed, full, reduction="batchmean", log_target=True))
        report(f"{row.mechanism}: window {index + 1} of {len(windows)}")
    row.bits_per_byte = nats / math.log(2) / reference["bytes"]
    row.change = row.bits_per_byte - reference["bits_per_byte"]
    row.kl = max(divergence / len(windows), 0.0)
    row.prefill_ratio = statistics.median(ratios)


@torch.no_grad()
def _pairs(model: PreTrainedModel, mechanisms: Sequence[Mechanism], window: Tensor) -> float | None:
    shares = []
    for mechanism, inputs, keywords in mechanism_calls(model, mechanisms, window):
        share = mechanism.pairs(*inputs, **keywords)
        if share is None:
            return None
        length = inputs[0].shape[2]
        shares.append(share * 2 * length / (length + 1))
    return statistics.mean(shares) if shares else None


@torch.no_grad()
def _maps(model: PreTrainedModel, mechanisms: Sequence[Mechanism], passage: Tensor) -> list[str]:
    from regard.bench.pictures import map_sprite

    sprites = []
    for mechanism, inputs, keywords in mechanism_calls(model, mechanisms, passage):
        if not mechanism.value_linear:
            return []
        sprites.append(map_sprite(mechanism.weights(*inputs, **keywords)[0], _MAP_CELLS))
    return sprites


@torch.no_grad()
def _decode_ratio(
    model: PreTrainedModel, twin: PreTrainedModel, handle: Handle, window: Tensor, tokens: int
) -> float | None:
    """Seconds per decoded token, twin over original, behind the window: out of the mechanism's own decoding state where
    it has one, out of a cache of all keys otherwise; None if it can do neither."""
    decodes = all(module.decodes for module in handle.modules.values())
    caches = []
    for each in (model, twin):
        try:
            own = handle.cache() if decodes and each is twin else None
            caches.append(each(input_ids=window[None, :-tokens], past_key_values=own, use_cache=True).past_key_values)
        except RegardError:
            return None

    def step(place: int, each: PreTrainedModel, cache: Any) -> float:
        return seconds(lambda: each(input_ids=window[None, place, None], past_key_values=cache, use_cache=True))

    ratios = []
    for place in range(len(window) - tokens, len(window)):
        try:
            own, other = (step(place, each, cache) for each, cache in zip((model, twin), caches, strict=True))
        except RegardError:
            return None
        ratios.append(other / own)
    return statistics.median(ratios[1:])


def _fine_tune(
    model: PreTrainedModel,
    mechanisms: Sequence[Mechanism],
    subject: Subject,
    plan: Plan,
    steps: int,
    report: Callable[[str], None],
) -> None:
    """Train the twin's weights and the mechanisms' own on the train split, at the plan's length."""
    windows = token_windows(subject, read_text(plan.text, "train"), plan.length, min(2 * steps, 512), seed=1)
    parameters = list(model.parameters()) + [p for m in mechanisms for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        batch = windows[torch.arange(2 * step, 2 * step + 2) % len(windows)]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(f"fine-tuning: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}")
    model.eval()
