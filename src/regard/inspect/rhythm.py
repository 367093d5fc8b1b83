"""How far back tokens of a response look, and how often later ones return to them: WAAD and FAI.

"Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization", 2025,
arXiv 2510.13554, section 4, equations 7 to 10. ``A`` is a head's causal map, ``R`` the tokens of the response.

- Span of a head: ``d = mean over t in R of sum_s A[t, s] (t - s)``. The 30 percent of heads with the smallest span are
  the local ones, those with the largest the global ones; ``A_loc`` and ``A_glob`` are the means of their maps.
- Windowed average attention distance: ``WAAD_t = sum_s A_loc[t, s] min(t - s, W)``, between 0 and ``W``. Within a
  phrase it is low; where one begins it leaps.
- Future attention influence: ``FAI_s = mean of A_glob[t, s]`` over ``t`` in ``R`` with ``lo <= t - s <= hi``, between 0
  and 1; 0 where there is no such ``t``. The horizon is 10 to 50 tokens (10 to 100 in the paper's second version); where
  the paper measures how the signals go together (Table 2), all later tokens of the response.

Both measures are linear in ``A``, so :func:`attention_rhythm` takes them head by head from rows of weights: one extra
forward pass, ``O(layers batch heads length)`` numbers kept, and no map of a long text held whole. Shapes: ``weights``
``(layers, batch, heads, length, length)`` as ``trace.stack("weights")`` gives them, maps ``(batch, length, length)``,
what is said of tokens ``(batch, length)``; ``response_mask`` ``(batch, length)`` bool, True on the response (default:
everywhere). Distances are in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import LayerTrace, capture
from regard.kernels import accumulation_dtype
from regard.retrofit.sites import Selector

__all__ = [
    "Rhythm",
    "attention_rhythm",
    "fai",
    "head_distance",
    "mean_map",
    "middle_layers",
    "response_tokens",
    "split_heads",
    "waad",
]

Heads = list[tuple[int, int]]
"""``(layer, head)`` of each."""


def head_distance(weights: Tensor, response_mask: Tensor | None = None) -> Tensor:
    """``(layers, heads)``: how far each head looks back on average from the tokens of the responses (equation 7)."""
    if weights.dim() != 5 or weights.shape[-1] != weights.shape[-2]:
        raise ShapeError(
            f"weights are (layers, batch, heads, length, length), as trace.stack('weights') gives them; got "
            f"{tuple(weights.shape)}."
        )
    mask = response_tokens(weights[0, :, 0, :, 0], response_mask)
    _need_causal(weights, 0, mask)
    return _over_response(_row_distance(weights, 0, None), mask)


def split_heads(distance: Tensor, q: float = 0.3) -> tuple[Heads, Heads]:
    """The share ``q`` of ``(layers, heads)`` with the least distance and that with the largest: local and global heads,
    each set in order of its distance, the least first. At least one head in each."""
    if distance.dim() != 2 or distance.numel() < 2:
        raise ShapeError(f"distance is (layers, heads) of two heads or more, got {tuple(distance.shape)}.")
    if not 0 < q <= 0.5:
        raise OptionError(f"q is the share of heads in each of two sets, above 0 and at most 0.5; got {q}.")
    if bool(distance.isnan().any()):
        raise OptionError("Some distances are NaN, so heads have no order; look for NaN in the attention weights.")
    count = min(max(round(q * distance.numel()), 1), distance.numel() // 2)
    order = distance.flatten().argsort(stable=True).tolist()
    pairs = [divmod(at, distance.shape[1]) for at in order]
    return pairs[:count], pairs[-count:]


def mean_map(weights: Tensor, heads: Heads) -> Tensor:
    """``(batch, length, length)``: the mean of these heads' maps (equation 8)."""
    _need_heads(heads, weights.shape[0], weights.shape[2])
    layer, head = (list(each) for each in zip(*heads, strict=True))
    return weights[layer, :, head].mean(0)


def waad(weights: Tensor, window: int = 10) -> Tensor:
    """How far each token looks back, where no distance counts for more than ``window``: ``(..., length)`` in ``[0,
    window]`` of maps ``(..., length, length)``, those of the local heads (equation 9)."""
    if window < 1:
        raise OptionError(f"window is a distance of at least 1 token, got {window}.")
    return _row_distance(_square(weights), 0, window)


def fai(weights: Tensor, lo: int = 10, hi: int | None = 50, response_mask: Tensor | None = None) -> Tensor:
    """The mean weight each token gets from the response tokens ``lo`` to ``hi`` places later (hi None: to the end):
    ``(batch, length)`` in ``[0, 1]`` of maps ``(batch, length, length)``, those of the global heads (equation 10)."""
    _need_horizon(lo, hi)
    if weights.dim() != 3:
        raise ShapeError(f"Maps are (batch, length, length), one of each sequence; got {tuple(weights.shape)}.")
    mask = response_tokens(_square(weights)[..., 0], response_mask)
    _need_causal(weights, 0, mask)
    return _received(weights, 0, mask, lo, hi) / _window_size(mask, lo, hi).clamp_min(1)


@dataclass(frozen=True, eq=False)
class Rhythm:
    """What one forward pass shows. ``distance`` ``(layers, heads)`` in tokens, ``local_heads`` and ``global_heads`` by
    ``paths``, the layers that were looked at; ``waad`` and ``fai`` ``(batch, length)``."""

    paths: tuple[str, ...]
    distance: Tensor
    local_heads: Heads
    global_heads: Heads
    waad: Tensor
    fai: Tensor


def middle_layers(num_layers: int, count: int = 5) -> list[int]:
    """``count`` layers, evenly from a third of the depth to two thirds (section 5.1): what the paper looks at to save
    time. Fewer where there are not as many."""
    if num_layers < 1 or count < 1:
        raise OptionError(f"Need at least one layer and a count of at least 1; got {num_layers} and {count}.")
    first, last = num_layers // 3, min(2 * num_layers // 3, num_layers - 1)
    return sorted({round(first + (last - first) * at / max(count - 1, 1)) for at in range(count)})


@torch.no_grad()
def attention_rhythm(
    model: nn.Module,
    run: Callable[[], object],
    response_mask: Tensor,
    *,
    layers: Selector = None,
    heads: tuple[Heads, Heads] | None = None,
    q: float = 0.3,
    window: int = 10,
    lo: int = 10,
    hi: int | None = 50,
    rows: int = 256,
) -> Rhythm:
    """Spans of the heads of ``model``, WAAD of its local and FAI of its global ones, from one forward pass.

    run: makes that pass over prompts and responses, e.g. ``lambda: model(input_ids=ids)``; causal self-attention of
    any kind that :func:`regard.capture` knows, in evaluation mode (dropout would show). layers: e.g.
    :func:`middle_layers` (default: all). heads: local and global sets of an earlier pass, by the same layers (default:
    found in this one). rows: so many queries' weights are held at a time.
    """
    _need_horizon(lo, hi)
    if window < 1 or rows < 1:
        raise OptionError(f"window and rows are at least 1; got {window} and {rows}.")
    mask = response_tokens(response_mask, response_mask)

    def summarize(layer: LayerTrace) -> tuple[Tensor, Tensor, Tensor]:
        spans, near, received = [], [], torch.zeros(())
        for start, part in layer.weight_rows(rows):
            seen = (part.shape[0], layer.queries_seen, part.shape[-1])
            if seen != (*mask.shape, mask.shape[1]):
                raise ShapeError(
                    f"{layer.path} attends as {seen} (batch, queries, keys), and response_mask is {tuple(mask.shape)}: "
                    "give the mask of prompts and responses together, and read them in one pass."
                )
            _need_causal(part, start, mask)
            spans.append(_row_distance(part, start, None))
            near.append(_row_distance(part, start, window))
            received = received + _received(part, start, mask, lo, hi)
        if not spans:
            raise OptionError(f"{layer.path} shows no attention weights; leave it out with layers=.")
        return _over_response(torch.cat(spans, -1), mask), torch.cat(near, -1), received

    with capture(model, layers=layers, summarize=summarize) as trace:
        run()
    if not len(trace):
        raise OptionError("No attention layer ran; run() calls the model, e.g. lambda: model(input_ids=ids).")
    spans, near, received = zip(*(layer.summary for layer in trace), strict=True)
    if len({len(each) for each in spans}) > 1:
        raise OptionError("These layers have different numbers of heads; look at some of them with layers=.")
    distance = torch.stack(spans)
    local, distant = split_heads(distance, q) if heads is None else heads
    for each in (local, distant):
        _need_heads(each, *distance.shape)
    return Rhythm(
        tuple(trace.paths),
        distance,
        local,
        distant,
        torch.stack([near[layer][:, head] for layer, head in local]).mean(0),
        torch.stack([received[layer][:, head] for layer, head in distant]).mean(0)
        / _window_size(mask.to(received[0].device), lo, hi).clamp_min(1),
    )


def _row_distance(weights: Tensor, start: int, window: int | None) -> Tensor:
    """Of rows ``start`` onwards, ``(..., rows)``, in at least float32."""
    back = _back(weights, start).clamp(0, window)
    return (weights.to(accumulation_dtype(weights.dtype)) * back).sum(-1)


def _over_response(rows: Tensor, mask: Tensor) -> Tensor:
    """The mean over all response tokens of ``(..., batch, heads, length)``: ``(..., heads)``."""
    mask = mask.to(rows.device)
    return rows.masked_fill(~mask[:, None], 0).sum((-3, -1)) / mask.sum()


def _received(weights: Tensor, start: int, mask: Tensor, lo: int, hi: int | None) -> Tensor:
    """What keys get within the horizon from response queries of rows ``start`` onwards, ``(batch, ..., length)``."""
    back, reading = _back(weights, start), _of_response(weights, start, mask)
    counted = (back >= lo) & (back <= (back.shape[-1] if hi is None else hi)) & reading
    return weights.to(accumulation_dtype(weights.dtype)).masked_fill(~counted, 0).sum(-2)


def _need_causal(weights: Tensor, start: int, mask: Tensor) -> None:
    # Rows beside the response may hold anything: padding attends to whatever it likes.
    if bool(weights.masked_fill((_back(weights, start) >= 0) | ~_of_response(weights, start, mask), 0).any()):
        raise OptionError(
            "Some weight lies on later tokens, and these measures are of causal self-attention: take a decoder's own "
            "layers (layers=...)."
        )


def _of_response(weights: Tensor, start: int, mask: Tensor) -> Tensor:
    """Which rows are of the response, spread over weights ``(batch, rows, length)`` or ``(..., batch, heads, rows,
    length)``."""
    reading = mask[:, start : start + weights.shape[-2], None].to(weights.device)
    return reading if weights.dim() == 3 else reading[:, None]


def _back(weights: Tensor, start: int) -> Tensor:
    """How far each key lies back from rows ``start`` onwards, ``(rows, length)``."""
    query = torch.arange(start, start + weights.shape[-2], device=weights.device)
    return query[:, None] - torch.arange(weights.shape[-1], device=weights.device)


def _window_size(mask: Tensor, lo: int, hi: int | None) -> Tensor:
    """How many response tokens stand ``lo`` to ``hi`` places after each, ``(batch, length)``."""
    length = mask.shape[-1]
    before = nn.functional.pad(mask.long().cumsum(-1), (1, 0))
    place = torch.arange(length, device=mask.device)
    first = (place + lo).clamp_max(length)
    past = torch.full_like(place, length) if hi is None else (place + hi + 1).clamp_max(length)
    return before[:, past] - before[:, first]


def _square(weights: Tensor) -> Tensor:
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ShapeError(f"Maps of causal self-attention are (..., length, length); got {tuple(weights.shape)}.")
    return weights


def response_tokens(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The response, of scores that are known there."""
    if scores.dim() != 2:
        raise ShapeError(f"What is said of tokens is (batch, length), got {tuple(scores.shape)}.")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    if mask.shape != scores.shape:
        raise ShapeError(
            f"response_mask, WAAD, FAI and entropy are (batch, length) of the same text; got {tuple(mask.shape)} and "
            f"{tuple(scores.shape)}."
        )
    mask = mask.to(scores.device).bool()
    if not bool(mask.any()):
        raise OptionError("response_mask marks no token as part of a response.")
    if bool(scores[mask].isnan().any()):
        raise OptionError("Some of the response's values are NaN, so no token can be chosen by them.")
    return mask


def _need_heads(heads: Heads, layers: int, count: int) -> None:
    if not heads or any(not (0 <= layer < layers and 0 <= head < count) for layer, head in heads):
        raise OptionError(
            f"A set of heads has a (layer, head) at least, with layers 0 to {layers - 1} and heads 0 to {count - 1}; "
            f"got {heads}. split_heads gives such sets."
        )


def _need_horizon(lo: int, hi: int | None) -> None:
    if lo < 0 or (hi is not None and hi < lo):
        raise OptionError(f"lo and hi are distances to later tokens with 0 <= lo <= hi; got {lo} and {hi}.")
