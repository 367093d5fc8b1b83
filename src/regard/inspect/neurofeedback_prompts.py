"""Prompts of neurofeedback: sentences with labels of their own activations, and what is asked then.

In words (:func:`neurofeedback_prompt`), or for models without words as spans of tokens (:func:`span_prompt`). Source:
"Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations", 2025, arXiv
2505.13763, and its repository; the three tasks are those of :mod:`regard.inspect.neurofeedback`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.loading import token_logits

__all__ = ["SpanPrompt", "binary_labels", "neurofeedback_prompt", "sample_span", "score_fields", "span_prompt"]

SCORE_FIELD = "[Score: {"
Task = Literal["report", "explicit", "implicit"]


def binary_labels(labels: Tensor) -> Tensor:
    """The labels as int64; OptionError for others than 0 and 1."""
    if bool(((labels != 0) & (labels != 1)).any()):
        raise OptionError(f"Labels are 0 and 1; got {sorted(set(labels.flatten().tolist()))[:6]}.")
    return labels.long()


def _controls(task: str, target: int | None, low: int, high: int) -> bool:
    """Whether a task asks for control, which takes a target."""
    if task not in get_args(Task):
        raise OptionError(f"task is 'report', 'explicit' or 'implicit'; got {task!r}.")
    if (task != "report") != (target is not None) or (target is not None and not low <= target <= high):
        raise OptionError(f"Control needs a target label from {low} to {high}, and reporting none; got {target}.")
    return task != "report"


def neurofeedback_prompt(
    sentences: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[int] | Tensor,
    task: Task = "report",
    target: int | None = None,
    *,
    levels: int = 2,
    flipped: bool = False,
) -> list[dict[str, str]]:
    """Chat turns: a system turn, then per sentence what the user asked for and the sentence with its score.

    sentences: texts, or pairs of an instruction and the text it got. ``report``: the last may lack its label, and the
    prompt then ends where the score would stand; if all have theirs, :func:`score_fields` finds the places of all in
    one pass. ``explicit`` and ``implicit``: one sentence more than labels; the last turns ask for the manner of label
    ``target``. The explicit prompt leaves the reply to be generated, the implicit one holds the last sentence.
    levels: 2 for scores 0 and 1, else scores 1 to ``levels``. flipped: show the scores the other way round.
    """
    low, high = (0, 1) if levels == 2 else (1, levels)
    scores = [int(label) for label in labels]
    if any(label != score or not low <= score <= high for label, score in zip(labels, scores, strict=True)):
        raise OptionError(f"Labels of {levels} levels are {low} to {high}; got {list(labels)}.")
    control = _controls(task, target, low, high)
    if len(sentences) - len(scores) not in ((1,) if control else (0, 1)):
        raise ShapeError(f"{task} takes one sentence more than labels; got {len(sentences)} and {len(scores)}.")
    pairs = [("Say something.", s) if isinstance(s, str) else (s[0], s[1]) for s in sentences]
    turns = [{"role": "system", "content": _system(control, low, high)}]
    for (asked, said), score in zip(pairs, scores, strict=False):
        shown = low + high - score if flipped else score
        turns += [_turn("user", asked), _turn("assistant", f"{said} {SCORE_FIELD}{shown}}}]")]
    if len(pairs) > len(scores):
        asked, said = pairs[-1]
        if control:
            asked = f"Imitation now: reply in the way that earns the score {target}, and copy no reply above. {asked}"
        turns.append(_turn("user", asked))
        if task != "explicit":
            turns.append(_turn("assistant", said if control else f"{said} {SCORE_FIELD}"))
    return turns


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _system(control: bool, low: int, high: int) -> str:
    scale = "either 0 or 1" if high == 1 else f"a whole number from {low} (lowest) to {high} (highest)"
    then = " Later you will be asked to imitate a score." if control else ""
    return (
        f"Each request is answered and followed by a score, {scale}: the activation of your brain while you said the "
        f"answer. Find out from the examples how it comes about.{then}"
    )


def score_fields(tokens: Tensor, opening: Sequence[int]) -> Tensor:
    """Places where scores stand, or would stand: those after each occurrence of the tokens ``opening`` (of
    ``SCORE_FIELD``, as the tokenizer writes its end within a text) in ``tokens`` ``(length,)``."""
    if tokens.dim() != 1 or not opening:
        raise ShapeError(f"Need tokens (length,) and at least one token to look for; got {tuple(tokens.shape)}.")
    wanted = torch.tensor(list(opening), device=tokens.device)
    if len(tokens) < len(wanted):
        return torch.empty(0, dtype=torch.long, device=tokens.device)
    found = (tokens.unfold(0, len(wanted), 1) == wanted).all(-1)
    return found.nonzero()[:, 0] + len(wanted)


@dataclass(frozen=True)
class SpanPrompt:
    """``tokens`` ``(batch, length)``; ``label_positions`` ``(batch, N)``, where labels stand, or would after the last
    token; ``spans`` ``(batch, N, 2)``: start and end of each sentence."""

    tokens: Tensor
    label_positions: Tensor
    spans: Tensor


def span_prompt(
    sentences: Tensor,
    labels: Tensor,
    token0: int,
    token1: int,
    task: Task = "report",
    target: int | None = None,
    marker: int | None = None,
) -> SpanPrompt:
    """Sentences without words: spans of tokens ``(batch, N, span)``, each followed by its label's token.

    ``report``: labels ``(batch, N)``, or ``(batch, N - 1)`` for a prompt that ends where the last would stand. Control:
    labels ``(batch, N - 1)``, then the token ``marker`` (the instruction) and the target's, then the last span, which
    the explicit prompt leaves to be generated; its span is given all the same.
    """
    control = _controls(task, target, 0, 1)
    if sentences.dim() != 3 or labels.dim() != 2 or len(labels) != len(sentences):
        raise ShapeError(f"Need (batch, N, span) and (batch, N or N - 1); got {sentences.shape} and {labels.shape}.")
    batch, count, span = sentences.shape
    if count - labels.shape[1] not in ((1,) if control else (0, 1)):
        raise ShapeError(f"{task} takes one sentence more than labels; got {count} and {labels.shape[1]}.")
    if control != (marker is not None):
        raise OptionError("Control needs the token of its marker, and reporting none.")
    shown = torch.tensor([token0, token1], device=sentences.device)[binary_labels(labels).to(sentences.device)]
    full = labels.shape[1]
    parts = [torch.cat((sentences[:, :full], shown[..., None]), -1).flatten(1)]
    first = torch.arange(count, device=sentences.device) * (span + 1)
    if control:
        asked = torch.tensor([marker, (token0, token1)[cast(int, target)]], device=sentences.device)
        parts.append(asked.expand(batch, 2))
        first[-1] += 2
    if full < count and task != "explicit":
        parts.append(sentences[:, -1])
    spans = torch.stack((first, first + span), -1)
    return SpanPrompt(torch.cat(parts, 1), (first + span).expand(batch, -1), spans.expand(batch, -1, -1))


@torch.no_grad()
def sample_span(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    temperature: float = 0.7,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``tokens`` ``(batch, n)`` and ``length`` more, drawn from the model one by one: the reply to an explicit prompt.

    allowed: the tokens it may write, all by default. The prompt is read anew each time: for short replies of small
    models; of large ones, ``model.generate`` keeps a cache.
    """
    if length < 1 or temperature <= 0:
        raise OptionError(f"Need length >= 1 and a positive temperature; got {length} and {temperature}.")
    for _ in range(length):
        logits = token_logits(model(tokens))[:, -1] / temperature
        choice = torch.arange(logits.shape[-1], device=logits.device) if allowed is None else allowed
        drawn = torch.multinomial(logits[:, choice].softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, choice[drawn]), 1)
    return tokens
