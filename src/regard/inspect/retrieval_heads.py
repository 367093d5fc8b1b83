"""Retrieval heads: those that copy the needle out of a long context.

While a model writes the answer token by token, head ``h`` *copies* at a step if the key that it weighs most,
``j* = argmax_j A_h[last, j]``, lies inside the needle and holds the very token ``w`` that the model emits,
``x_{j*} = w``. With ``g_h`` the set of tokens so copied and ``k`` that of the needle's tokens, the score is
``|g_h & k| / |k|``, 0 to 1. Contexts count where the model has found the needle (recall of the needle's tokens above
one half), and a head's score is the mean over contexts of several lengths and depths; from 0.1 on it is a retrieval
head. What they do is told by masking: without them recall breaks, without as many other heads it does not.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv 2404.15574, section 2 (score),
section 3 (sparse, intrinsic, dynamically activated), section 4 (masking). The released code adds ``1 / len(needle)``
at every copying step, which counts a token that is emitted twice twice (``official=True``).

Shapes: scores ``(layers, heads)``, a head being (layer, head) as in :mod:`regard.inspect.intervene`. Cost: the
prompt is read once by whatever kernel the model uses; of each step one row ``(1, length)`` a head is formed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import LayerTrace, Trace, capture
from regard.inspect.intervene import Head, ablate_heads, intervene
from regard.inspect.loading import token_logits
from regard.inspect.needles import Needle, NeedleTask, text_needle_task

__all__ = [
    "HeadOverlap",
    "RetrievalScorer",
    "RetrievalScores",
    "activation_frequency",
    "detect_retrieval_heads",
    "head_overlap",
    "mask_heads",
    "needle_recall",
    "text_retrieval_scores",
]


# Tokens of the longest answer among the library's own needles, and some more.
_ANSWER = 40


class RetrievalScorer:
    """Watches one answer being written; ``needle_span`` (start, end) of ``prompt_ids`` ``(length,)``.

    official: the released code's count, which a repeated token can lift above 1, in place of sets.
    """

    def __init__(self, needle_span: tuple[int, int], prompt_ids: Tensor, *, official: bool = False) -> None:
        self._needle, self.official = Needle(prompt_ids, needle_span), official
        self._kinds = self._needle.answer.unique()
        # How often each kind of token was copied, (layers, heads, kinds).
        self._copied: Tensor | None = None

    def step(self, attention: Tensor, token_id: int) -> Tensor:
        """Whether each head copied, ``(layers, heads)`` boolean, as the model emitted ``token_id`` with the attention
        rows ``(layers, heads, keys)`` of the last position, the prompt's keys first."""
        prompt = self._needle.prompt.to(attention.device)
        if attention.dim() != 3 or attention.shape[-1] < len(prompt):
            raise ShapeError(
                f"Rows of attention are (layers, heads, keys) with a key for each of the {len(prompt)} tokens of the "
                f"prompt; got {tuple(attention.shape)}."
            )
        if self._copied is not None and self._copied.shape[:2] != attention.shape[:2]:
            raise ShapeError(f"Steps so far had other heads {tuple(self._copied.shape[:2])}; {tuple(attention.shape)}.")
        most, place = attention.max(-1)
        if bool(most.isnan().any()):
            raise OptionError("Attention holds NaN, so what heads look at is not known. Run the model in float32.")
        start, end = self._needle.span
        copies = (place >= start) & (place < end) & (prompt[place.clamp_max(len(prompt) - 1)] == token_id) & (most > 0)
        counted = (copies[..., None] & (self._kinds.to(copies.device) == token_id)).float()
        self._copied = counted if self._copied is None else self._copied + counted
        return copies

    def score(self) -> Tensor:
        """``(layers, heads)``."""
        if self._copied is None:
            raise OptionError("No step was seen yet; call step() for every token that the model emits.")
        if self.official:
            return self._copied.sum(-1) / len(self._needle.answer)
        return (self._copied > 0).float().mean(-1)


@dataclass(frozen=True)
class RetrievalScores:
    """``by_context`` ``(contexts, layers, heads)``: of those contexts whose needle was found. ``recall``: of all
    contexts, 0 to 1. ``scores`` ``(layers, heads)``: their mean, NaN where no needle was found. ``heads``: those of at
    least ``threshold``, the strongest first."""

    by_context: Tensor
    recall: list[float]
    threshold: float = 0.1

    @property
    def scores(self) -> Tensor:
        return self.by_context.mean(0)

    @property
    def heads(self) -> list[Head]:
        return [head for head in self.ranking if float(self.scores[head]) >= self.threshold]

    @property
    def ranking(self) -> list[Head]:
        """All heads, the strongest first."""
        count = self.by_context.shape[-1]
        order = self.scores.flatten().argsort(descending=True, stable=True).tolist()
        return [(place // count, place % count) for place in order]


def detect_retrieval_heads(
    model: nn.Module,
    needle_task: NeedleTask,
    n: int = 20,
    recall_threshold: float = 0.5,
    *,
    threshold: float = 0.1,
    steps: int | None = None,
    forced: bool = False,
    official: bool = False,
) -> RetrievalScores:
    """Scores of all heads of a causal model, over needles ``0`` to ``n - 1`` of a task (the paper: 20 lengths, 10
    depths, 3 needles).

    model: of transformers (decodes with its cache), or any that maps tokens ``(1, length)`` to logits. steps: tokens
    emitted (by default as many as the answer has). forced: read prompt and answer in one forward pass, what the model
    would emit at each of its places taken for what it emits; for an answer that it writes without a mistake the same.
    """
    if n < 1 or (steps is not None and (steps < 1 or forced)):
        raise OptionError(
            "n counts needles and steps emitted tokens, so they are at least 1, and a forced pass has as many steps as "
            f"its answer has tokens; got n={n}, steps={steps}, forced={forced}."
        )
    found, recall = [], []
    shape: tuple[int, ...] = ()
    for index in range(n):
        needle = needle_task(index)
        rows, emitted = _forced(model, needle) if forced else _decoded(model, needle, steps or len(needle.answer))
        scorer = RetrievalScorer(needle.span, needle.prompt, official=official)
        for row, token in zip(rows, emitted, strict=True):
            shape = scorer.step(row, token).shape
        recall.append(needle_recall(needle.answer.tolist(), emitted))
        if recall[-1] > recall_threshold:
            found.append(scorer.score().cpu())
    return RetrievalScores(torch.stack(found) if found else torch.zeros(0, *shape), recall, threshold)


def text_retrieval_scores(
    model: nn.Module,
    tokenizer: Any,
    haystack: str,
    *,
    contexts: int = 12,
    context_len: int = 192,
    recall_threshold: float = 0.5,
) -> RetrievalScores:
    """Scores of a causal language model of transformers on lines hidden in a text, cheaply: ``contexts`` forward passes
    of ``context_len`` tokens (fewer where the model takes no more) and an answer, at six depths."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int):
        context_len = min(context_len, limit - _ANSWER)
    # Tokens of more letters are rare, and the rest of a long text is not needed.
    task = text_needle_task(tokenizer, haystack[: 16 * context_len], context_len, [depth / 5 for depth in range(6)])
    return detect_retrieval_heads(model, task, contexts, recall_threshold, forced=True)


def needle_recall(answer: Sequence[int], emitted: Sequence[int]) -> float:
    """Share of the answer's tokens that were emitted, each as often as it stands there (unigram recall), 0 to 1."""
    if not len(answer):
        raise OptionError("An answer has at least one token.")
    return (Counter(answer) & Counter(emitted)).total() / len(answer)


def mask_heads(model: nn.Module, heads: Sequence[Head], how: Literal["zero", "uniform"] = "zero") -> intervene:
    """``with mask_heads(model, heads): ...``: their output is zero, or they weigh all alike that they see."""
    return intervene(model, ablate_heads(heads, how))


def activation_frequency(by_context: Tensor) -> Tensor:
    """Share of contexts in which a head copies anything, ``(layers, heads)``, from scores ``(contexts, layers,
    heads)``: near 1 for heads that always do, less for those that depend on the context."""
    if by_context.dim() != 3 or not len(by_context):
        raise ShapeError(f"Need scores (contexts, layers, heads) of some contexts; got {tuple(by_context.shape)}.")
    return (by_context > 0).float().mean(0)


@dataclass(frozen=True)
class HeadOverlap:
    """``jaccard``: retrieval heads of both over those of either, 0 to 1 (NaN where there are none). ``correlation``:
    Pearson's, of all scores, -1 to 1 (NaN where a model's are all alike)."""

    jaccard: float
    correlation: float


def head_overlap(scores_a: Tensor, scores_b: Tensor, threshold: float = 0.1) -> HeadOverlap:
    """Whether two models of one shape (or a model at two times of its training) retrieve with the same heads."""
    if scores_a.shape != scores_b.shape:
        raise ShapeError(f"Scores of one shape are compared; got {tuple(scores_a.shape)} and {tuple(scores_b.shape)}.")
    if bool((scores_a + scores_b).isnan().any()):
        raise OptionError("Scores hold NaN: a model found no needle, so its heads have none.")
    first, second = scores_a >= threshold, scores_b >= threshold
    either = int((first | second).sum())
    both = int((first & second).sum())
    correlation = torch.corrcoef(torch.stack((scores_a.flatten(), scores_b.flatten())))[0, 1]
    return HeadOverlap(both / either if either else float("nan"), float(correlation))


Rows = list[Tensor]
"""``(layers, heads, keys)`` of each step."""


@torch.no_grad()
def _forced(model: nn.Module, needle: Needle) -> tuple[Rows, list[int]]:
    first, answer = len(needle.prompt) - 1, needle.answer
    ids = torch.cat((needle.prompt, answer[:-1]))[None].to(_device(model))
    with _watching(model, first) as trace:
        logits = token_logits(model(ids))
    rows = _stacked(trace, ids.shape[1])
    return list(rows.unbind(2)), logits[0, first:].argmax(-1).tolist()


@torch.no_grad()
def _decoded(model: nn.Module, needle: Needle, steps: int) -> tuple[Rows, list[int]]:
    device = _device(model)
    ids, cache = needle.prompt[None].to(device), None
    # Transformers' models that generate take and give a cache.
    cached = hasattr(model, "prepare_inputs_for_generation")
    if cached and ids.shape[1] > 1:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    rows: Rows = []
    emitted: list[int] = []
    for _ in range(steps):
        with _watching(model, -1) as trace:
            if cached:
                out = model(ids[:, -1:], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
            else:
                out = model(ids)
        emitted.append(int(token_logits(out)[0, -1].argmax()))
        rows.append(_stacked(trace, ids.shape[1])[:, :, -1])
        ids = torch.cat((ids, torch.tensor([[emitted[-1]]], device=device)), 1)
    return rows, emitted


def _watching(model: nn.Module, first: int) -> capture:
    """Keeps the rows from query ``first`` on, of all layers."""

    def kept(layer: LayerTrace) -> Tensor | None:
        start = first % layer.queries_seen
        parts = [rows[0] for _, rows in layer.weight_rows(first=start)]
        return torch.cat(parts, 1) if parts else None

    return capture(model, summarize=kept)


def _stacked(trace: Trace, length: int) -> Tensor:
    """``(layers, heads, rows, length)``; keys that a sliding cache has dropped weigh nothing."""
    kept = []
    for layer in trace:
        rows = layer.summary
        if rows is None:
            raise OptionError(f"{layer.path} has a mechanism without weights, so what its heads copy is not known.")
        kept.append(F.pad(rows, (max(length - rows.shape[-1], 0), 0))[..., :length])
    if len({rows.shape for rows in kept}) != 1:
        raise OptionError(f"Layers with as many heads each are scored; got {[len(rows) for rows in kept]}.")
    return torch.stack(kept)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
