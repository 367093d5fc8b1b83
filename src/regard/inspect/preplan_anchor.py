"""The rhythm of reasoning in attention: tokens that plan a phrase, anchors that later ones return to, credit for both.

"Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization", 2025,
arXiv 2510.13554, sections 4 and 5, equations 7 to 18. ``A`` is a head's causal map, ``R`` the tokens of the response.

- Span of a head: ``d = mean over t in R of sum_s A[t, s] (t - s)``. The 30 percent of heads with the smallest span are
  the local ones, those with the largest the global ones; ``A_loc`` and ``A_glob`` are the means of their maps.
- Windowed average attention distance: ``WAAD_t = sum_s A_loc[t, s] min(t - s, W)``, between 0 and ``W``. Within a
  phrase it is low; where one begins it leaps.
- Future attention influence: ``FAI_s = mean of A_glob[t, s]`` over ``t`` in ``R`` with ``lo <= t - s <= hi``, between 0
  and 1; 0 where there is no such ``t``.
- Preplan tokens are the 40 percent of a response with the largest ``delta_t = |WAAD_t - WAAD_{t+1}|``, anchors the 40
  percent with the largest FAI. An anchor ``t`` is dominated if ``WAAD_t <= tau_waad`` and the largest ``delta`` of the
  ``k`` tokens before is at least ``tau_delta``; the token of that largest ``delta`` introduces it.
- Credit: ``gamma = 1 + (amp - 1) w`` with ``w = [preplan]``, ``w = [anchor]``, or coupled ``w = [anchor, not dominated]
  + (1 - alpha) [dominated] + alpha [introduces one]``; :mod:`regard.train.preplan_anchor` applies it.

The paper gives no thresholds; medians of the response stand for them. Its neighbourhood is of one to three tokens, its
horizon 10 to 50 tokens (10 to 100 in its second version); where it measures how the signals go together (Table 2), all
later tokens of the response.

Both measures are linear in ``A``, so :func:`attention_rhythm` takes them head by head from rows of weights: one extra
forward pass, ``O(layers batch heads length)`` numbers kept, and no map of a long text held whole. Shapes: ``weights``
``(layers, batch, heads, length, length)`` as ``trace.stack("weights")`` gives them, maps ``(batch, length, length)``,
what is said of tokens ``(batch, length)``; ``response_mask`` ``(batch, length)`` bool, True on the response (default:
everywhere). Distances are in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import LayerTrace, capture
from regard.kernels import accumulation_dtype
from regard.retrofit.sites import Selector

__all__ = [
    "Rhythm",
    "RhythmCoupling",
    "RhythmLift",
    "anchor_tokens",
    "attention_rhythm",
    "fai",
    "head_distance",
    "mean_map",
    "middle_layers",
    "preplan_tokens",
    "rhythm_coupling",
    "rhythm_lift",
    "split_heads",
    "token_credit",
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
    mask = _tokens(weights[0, :, 0, :, 0], response_mask)
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
    mask = _tokens(_square(weights)[..., 0], response_mask)
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
    mask = _tokens(response_mask, response_mask)

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


def preplan_tokens(waad: Tensor, q: float = 0.4, response_mask: Tensor | None = None) -> Tensor:
    """``(batch, length)`` bool: the share ``q`` of each response where WAAD changes most to the next token
    (equation 13). The last token has no next one; a token without change is never chosen."""
    mask = _tokens(waad, response_mask)
    return _top(_change(waad, mask).clamp_min(0), q, mask)


def anchor_tokens(fai: Tensor, q: float = 0.4, response_mask: Tensor | None = None) -> Tensor:
    """``(batch, length)`` bool: the share ``q`` of each response with the largest FAI (equation 15). A token of FAI 0,
    as those without a window have, is never chosen."""
    return _top(fai, q, _tokens(fai, response_mask))


@dataclass(frozen=True, eq=False)
class RhythmCoupling:
    """All ``(batch, length)``: ``anchors``, the ``dominated`` among them, ``introductory`` tokens of these (bool), and
    ``introduced_by`` (int64): the place of a dominated anchor's introductory token, -1 at other tokens."""

    anchors: Tensor
    dominated: Tensor
    introductory: Tensor
    introduced_by: Tensor


@torch.no_grad()
def rhythm_coupling(
    waad: Tensor,
    fai: Tensor,
    *,
    q: float = 0.4,
    k: int = 3,
    response_mask: Tensor | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> RhythmCoupling:
    """Anchors that the few tokens before them make likely, and which token that is (equation 17).

    k: how many tokens before. tau_waad, tau_delta: thresholds, by default the medians of each response. Of equal
    changes the nearest introduces.
    """
    mask = _tokens(waad, response_mask)
    _tokens(fai, mask)
    if k < 1:
        raise OptionError(f"k counts tokens before an anchor, so it is at least 1; got {k}.")
    change, length = _change(waad, mask), waad.shape[-1]
    low = _median(waad, mask) if tau_waad is None else torch.full_like(waad[:, :1], tau_waad)
    high = _median(change, change >= 0) if tau_delta is None else torch.full_like(waad[:, :1], tau_delta)
    before = nn.functional.pad(change, (k, 0), value=-1.0).unfold(-1, k, 1)[:, :length].flip(-1)
    largest, back = before.max(-1)
    anchors = anchor_tokens(fai, q, mask)
    # A change of -1 stands for a token that has none.
    dominated = anchors & (waad <= low) & (largest >= high) & (largest >= 0)
    introduced_by = torch.where(dominated, torch.arange(length, device=waad.device) - 1 - back, -1)
    introductory = torch.zeros_like(dominated)
    rows, at = dominated.nonzero(as_tuple=True)
    introductory[rows, introduced_by[rows, at]] = True
    return RhythmCoupling(anchors, dominated, introductory, introduced_by)


@torch.no_grad()
def token_credit(
    waad: Tensor,
    fai: Tensor,
    mode: Literal["local", "global", "coupled"] = "coupled",
    *,
    amp: float = 1.5,
    alpha: float = 0.5,
    q: float = 0.4,
    k: int = 3,
    response_mask: Tensor | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> Tensor:
    """``gamma`` ``(batch, length)``, without gradients: what a token's advantage is multiplied by (equations 14, 16 and
    18). amp: of a chosen token. alpha: the share of a dominated anchor's extra that goes to its introductory token; the
    shares of a token that is an anchor and introduces another add up."""
    if mode not in ("local", "global", "coupled"):
        raise OptionError(f"mode is 'local', 'global' or 'coupled', got {mode!r}.")
    if amp < 0 or not 0 <= alpha <= 1:
        raise OptionError(f"amp is at least 0 and alpha between 0 and 1; got {amp} and {alpha}.")
    if mode == "local":
        share = preplan_tokens(waad, q, response_mask).to(waad.dtype)
    elif mode == "global":
        share = anchor_tokens(fai, q, response_mask).to(fai.dtype)
    else:
        found = rhythm_coupling(
            waad, fai, q=q, k=k, response_mask=response_mask, tau_waad=tau_waad, tau_delta=tau_delta
        )
        own = found.anchors.to(waad.dtype) - alpha * found.dominated.to(waad.dtype)
        share = own + alpha * found.introductory.to(waad.dtype)
    return 1 + (amp - 1) * share


@dataclass(frozen=True)
class RhythmLift:
    """Table 2 of the paper. ``entropy_at_peaks`` and ``entropy`` (nats): mean entropy of the model's guess where WAAD
    peaks, and of all response tokens. ``follows``: share of FAI's peaks at or right after one of WAAD;
    ``follows_by_chance``: the same, were FAI's peaks anywhere in the response. NaN where there are no peaks."""

    entropy_at_peaks: float
    entropy: float
    follows: float
    follows_by_chance: float


@torch.no_grad()
def rhythm_lift(waad: Tensor, fai: Tensor, entropy: Tensor, response_mask: Tensor | None = None) -> RhythmLift:
    """How the signals go together, all ``(batch, length)``; ``entropy`` of the guess of each token, made at the one
    before. A peak is a token above both neighbours, all three of the response."""
    mask = _tokens(waad, response_mask)
    _tokens(fai, mask)
    _tokens(entropy, mask)
    tall, far = _peaks(waad, mask), _peaks(fai, mask)
    near = tall | nn.functional.pad(tall, (1, 0))[:, :-1]
    # Peaks may fall wherever there is a window; chance is judged within each response.
    room = mask & (fai > 0)
    chance = (near & room).sum(-1) / room.sum(-1).clamp_min(1)
    return RhythmLift(
        float(entropy[tall].mean()),
        float(entropy[mask].mean()),
        float(near[far].double().mean()),
        float((chance * far.sum(-1)).sum() / far.sum()),
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


def _change(waad: Tensor, mask: Tensor) -> Tensor:
    """``|WAAD_t - WAAD_{t+1}|`` where both are of the response, -1 elsewhere."""
    step = nn.functional.pad(waad.diff(dim=-1).abs(), (0, 1))
    return torch.where(mask & nn.functional.pad(mask[:, 1:], (0, 1)), step, -1.0)


def _top(score: Tensor, q: float, mask: Tensor) -> Tensor:
    if not 0 < q <= 1:
        raise OptionError(f"q is the share of tokens to choose, above 0 and at most 1; got {q}.")
    order = score.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return mask & (score > 0) & (rank < (q * mask.sum(-1, keepdim=True)).round())


def _median(score: Tensor, mask: Tensor) -> Tensor:
    return score.masked_fill(~mask, torch.nan).nanmedian(-1, keepdim=True).values


def _peaks(score: Tensor, mask: Tensor) -> Tensor:
    beside = nn.functional.pad(score.masked_fill(~mask, torch.inf), (1, 1), value=torch.inf)
    return mask & (score > beside[:, :-2]) & (score > beside[:, 2:])


def _square(weights: Tensor) -> Tensor:
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ShapeError(f"Maps of causal self-attention are (..., length, length); got {tuple(weights.shape)}.")
    return weights


def _tokens(scores: Tensor, mask: Tensor | None) -> Tensor:
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
