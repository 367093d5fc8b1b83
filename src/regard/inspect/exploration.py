"""What the page of :mod:`regard.inspect.explore_page` shows of a model on a text, on two, or on an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError
from regard.inspect.capture import capture
from regard.inspect.loading import model_answer
from regard.inspect.metrics import METRICS, Metric, patch_metrics
from regard.inspect.observation import Exploration, Patches, Progress, Span, ablate_all, look
from regard.inspect.retrieval_heads import text_retrieval_scores
from regard.inspect.roles import head_roles, repetition_losses
from regard.retrofit.sites import discover

__all__ = ["explore_image", "explore_text"]

# Tokens of the text that are written twice.
_REPEATED = 128
# Tokens that a model of encoder and decoder writes by itself.
_WRITTEN = 64


def explore_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    second: str | None = None,
    *,
    name: str = "model",
    max_tokens: int = 4096,
    ablate_tokens: int = 512,
    progress: Progress = lambda line: None,
) -> Exploration:
    """A transformers language model on a text.

    second: another text. An encoder reads both as a pair; of a model of encoder and decoder it is what the decoder
    writes, by default what the model writes by itself. Each text is cut at ``max_tokens``; heads are ablated on its
    first ``ablate_tokens`` (0: not at all). Raises OptionError for texts of less than 2 tokens, and for a second text
    where a model reads one alone.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _of_translation(model, tokenizer, text, second, name, max_tokens, ablate_tokens, progress)
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return _of_encoder(model, tokenizer, text, second, name, max_tokens, ablate_tokens, progress)
    if second is not None:
        raise OptionError("This model reads one text from left to right; write the second one behind the first.")
    start = tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=start is None, verbose=False)["input_ids"]
    tokens = _cut(([] if start is None else [start]) + list(ids), max_tokens, progress)

    def run(given: Tensor) -> Tensor:
        return model_answer(model(input_ids=given))

    progress(f"attention of {tokens.shape[1]} tokens")
    found, logits = look(model, partial(run, tokens), name, _shown(tokenizer, tokens), True, _of_text)
    found.losses = [None, *_next_token_losses(logits, tokens)]
    progress("roles on repeated tokens")
    prefix = None if start is None else torch.tensor([[start]])
    roles = head_roles(model, run, logits.shape[-1], prefix=prefix)
    found.roles = roles.roles
    for role in ("previous", "duplicate", "induction"):
        found.metrics[f"{role}, repeated tokens"] = _table(roles.scores[role])
    progress("retrieval of lines hidden in the text")
    retrieval = text_retrieval_scores(model, tokenizer, text)
    # A model that finds no needle has no heads that are known to.
    if len(retrieval.by_context):
        found.metrics["retrieval"] = _table(retrieval.scores)
    if ablate_tokens:
        short = tokens[:, :ablate_tokens]
        repeated = tokens[:, start is not None :][:, :_REPEATED]
        gain = partial(_repetition_gain, run, repeated, prefix) if repeated.shape[1] > 1 else None
        ablate_all(model, partial(run, short), found, partial(_next_token_loss, short), gain, progress)
    return found


def _of_encoder(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    second: str | None,
    name: str,
    max_tokens: int,
    ablate_tokens: int,
    progress: Progress,
) -> Exploration:
    given = tokenizer(text, second, verbose=False)
    tokens = _cut(given["input_ids"], max_tokens, progress)
    # Which of the two texts each token is of, where a model asks.
    types = given.get("token_type_ids")
    more = {} if types is None or second is None else {"token_type_ids": torch.tensor([types])[:, :max_tokens]}

    def run(count: int) -> Tensor:
        return model_answer(
            model(input_ids=tokens[:, :count], **{key: value[:, :count] for key, value in more.items()})
        )

    progress(f"attention of {tokens.shape[1]} tokens")
    found, _ = look(model, partial(run, max_tokens), name, _shown(tokenizer, tokens), False, _of_text)
    if ablate_tokens:
        ablate_all(model, partial(run, ablate_tokens), found, None, None, progress)
    return found


def _of_translation(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    second: str | None,
    name: str,
    max_tokens: int,
    ablate_tokens: int,
    progress: Progress,
) -> Exploration:
    source = _cut(tokenizer(text, verbose=False)["input_ids"], max_tokens, progress)
    config: Any = model.config
    start = config.decoder_start_token_id
    if second is None:
        progress("what the model writes")
        answers: Any = model
        written = answers.generate(input_ids=source, max_new_tokens=min(_WRITTEN, max_tokens - 1), do_sample=False)
        target = _cut(written[0].tolist(), max_tokens, progress)
    else:
        ids = tokenizer(text_target=second, verbose=False)["input_ids"]
        target = _cut(([] if start is None else [start]) + list(ids), max_tokens, progress)

    def run(given: Tensor) -> Tensor:
        return model_answer(model(input_ids=source, decoder_input_ids=given, use_cache=False))

    progress(f"attention of {source.shape[1]} and {target.shape[1]} tokens")
    shown = _shown(tokenizer, source) + _shown(tokenizer, target)
    spans = _spans(model, source.shape[1], target.shape[1])
    found, logits = look(model, partial(run, target), name, shown, False, _of_text, spans)
    found.losses = [None] * (source.shape[1] + 1)
    found.losses += _next_token_losses(logits, target)
    if ablate_tokens:
        short = target[:, : max(ablate_tokens, 2)]
        ablate_all(model, partial(run, short), found, partial(_next_token_loss, short), None, progress)
    return found


@torch.no_grad()
def _spans(model: nn.Module, source: int, target: int) -> list[Span]:
    """What attends to what in each layer, found by a run in which every kind of layer sees its own numbers."""
    few = torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    with capture(model, "weights") as trace:
        model(input_ids=few[0], decoder_input_ids=few[1], use_cache=False)
    first, then = (0, source), (source, target)
    kinds = {(3, 3): ("encoder", first, first), (5, 5): ("decoder", then, then), (5, 3): ("cross", then, first)}
    found = []
    for site, layer in zip(discover(model), trace, strict=True):
        shape = None if layer.weights is None else tuple(layer.weights.shape[-2:])
        if shape not in kinds:
            raise OptionError(f"{site.path} attends from and to {shape} tokens of 5 and 3; it cannot be shown.")
        kind, queries, keys = kinds[shape]
        found.append(Span(f"{kind} {site.layer_index}", queries, keys))
    return found


def explore_image(
    model: nn.Module,
    pixels: Tensor,
    picture: str,
    *,
    name: str = "model",
    ablate: bool = True,
    progress: Progress = lambda line: None,
) -> Exploration:
    """A vision transformer on one image ``(1, channels, height, width)``, as its processor gives it: one of
    transformers, or one that takes images alone, such as :class:`regard.models.vit.VisionTransformer`.

    picture: the image to show, as a ``data:`` address.
    """
    named = "pixel_values" in signature(model.forward).parameters

    def run() -> Tensor:
        return model_answer(model(pixel_values=pixels) if named else model(pixels))

    ratio = pixels.shape[-2] / pixels.shape[-1]
    found, _ = look(model, run, name, None, False, partial(_of_patches, ratio))
    grid, before = _grid(len(found.tokens), ratio)
    rows = [f"patch {r}, {c}" for r in range(grid[0]) for c in range(grid[1])]
    found.tokens = [*(("[CLS]", *(f"[register {i}]" for i in range(1, before)))[:before]), *rows]
    found.patches = Patches(grid, before, picture)
    if ablate:
        ablate_all(model, run, found, None, None, progress)
    return found


def _grid(count: int, ratio: float) -> tuple[tuple[int, int], int]:
    """Rows and columns of the patches and the tokens before them, from their number and the image's height over
    width."""
    for before in range(0, 9):
        rows = round(math.sqrt((count - before) * ratio))
        if rows > 0 and (count - before) % rows == 0:
            columns = (count - before) // rows
            if abs(rows / columns - ratio) <= 0.25 * ratio and before != 2:
                return (rows, columns), before
    raise OptionError(f"{count} tokens are no grid of patches of an image with sides {ratio:.2f} : 1.")


def _of_text(span: Span) -> tuple[Mapping[str, Metric], int]:
    """The metrics of heads, and how many queries at the beginning they leave out."""
    # Tokens of another text are neither near nor far.
    return ({"entropy": METRICS["entropy"]} if span.crosses else METRICS), 0


def _of_patches(ratio: float, span: Span) -> tuple[Mapping[str, Metric], int]:
    grid, before = _grid(span.queries[1], ratio)
    return patch_metrics(grid, before), before


def _repetition_gain(run: Callable[[Tensor], Tensor], tokens: Tensor, prefix: Tensor | None) -> float:
    first, second = repetition_losses(run, tokens, prefix)
    return round(first - second, 5)


def _next_token_losses(logits: Tensor, tokens: Tensor) -> list[float]:
    """Nats of each token but the first."""
    each = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")
    return [round(value, 3) for value in each.tolist()]


def _next_token_loss(tokens: Tensor, logits: Tensor) -> float:
    return float(F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))


def _table(values: Tensor) -> list[list[float | None]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _cut(ids: list[int], max_tokens: int, progress: Progress) -> Tensor:
    if len(ids) > max_tokens:
        progress(f"the text has {len(ids)} tokens; the first {max_tokens} are shown")
    if len(ids[:max_tokens]) < 2:
        raise OptionError("The text has fewer than two tokens; there is nothing to attend to.")
    return torch.tensor([ids[:max_tokens]])


def _shown(tokenizer: Any, tokens: Tensor) -> list[str]:
    """The text of each token."""
    return [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in tokens[0].tolist()]
