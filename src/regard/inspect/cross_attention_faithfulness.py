"""How much of what a decoder uses does its cross-attention show? Compared with saliency by perturbation.

"Cross-Attention is Half Explanation in Speech-to-Text Models", 2025, arXiv 2509.18010, with saliency as in its authors'
"SPES: Spectrogram Perturbation for Explainable Speech-to-Text Generation", 2024, arXiv 2411.01710. Two references under
forced decoding, for masks ``m`` that leave out regions at random::

    input:    D_k(m) = KL(p_k(. | X) || p_k(. | X * m)), regions of the spectrogram, cut at several granularities
    encoder:  the same, leaving out states of the encoder, which removes what the encoder mixed beforehand
    S[k, i] = mean of D_k where i was left out - mean of D_k where it was kept

(The authors' code has the first mean alone: per row the same map, up to scale, shift and sampling.)

Cross-attention ``(layers, batch, num_heads, T_out, T_enc)`` is averaged over heads, layers or both, and its agreement
is the correlation of the two maps ``(T_out, T_enc)`` after each row is standardised (the authors' saliency maps are
so, token by token; the whole map is offered too), rows of special tokens left out. A saliency map of the input is
pooled to encoder steps first.

A ``model`` is a function ``(x (n, T_in, ...), inputs (n, T_out)) -> logits (n, T_out, vocabulary)``: row ``k`` is
what is predicted from the inputs up to ``k``. For Whisper: ``lambda x, t: whisper(input_features=x.mT,
decoder_input_ids=t).logits``; over the states of an encoder, in transformers: ``lambda memory, t:
model(encoder_outputs=(memory,), decoder_input_ids=t).logits``. Cross-attention is captured by path: ``capture(model,
"weights", layers="re:encoder_attn")`` in Whisper, ``"re:EncDecAttention"`` in T5, and ``trace.stack("weights")``.

Cost: ``n_masks + 1`` forward passes an example. How a map stands the test of leaving out what it points at says
:func:`regard.inspect.saliency.deletion_curve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.inspect.saliency import mask_saliency, pearson, presence, rank_correlation
from regard.layers.clustering import kmeans

__all__ = [
    "AgreementReport",
    "agreement_report",
    "cluster_regions",
    "cross_attention_map",
    "encoder_saliency",
    "explained_relevance",
    "grid_regions",
    "perturbation_saliency",
    "pool_saliency",
]

Model = Callable[[Tensor, Tensor], Tensor]
Metric = Literal["kl", "difference"]
Pool = Literal["max", "mean"]

# Cells a region at the three granularities of the authors' example: 2000 to 3000 regions of 750 x 80 cells.
_CELLS = (30, 24, 20)


def grid_regions(shape: Sequence[int], segments: int, shift: int = 0) -> Tensor:
    """About ``segments`` equal blocks of a map ``(T_in, F)`` or a line ``(T_in,)``: int64 in that shape, counted from
    0. shift: moves their borders by so many cells, so that several grids do not share them."""
    cells = math.prod(shape)
    side = max(1, round((cells / max(segments, 1)) ** (1 / len(shape))))
    places = [(torch.arange(length) + shift % side) // side for length in shape]
    number = places[0] if len(shape) == 1 else places[0][:, None] * (int(places[1].max()) + 1) + places[1]
    return number.unique(return_inverse=True)[1]


def cluster_regions(x: Tensor, segments: int, energy: float = 2.0) -> Tensor:
    """About ``segments`` regions of a spectrogram ``(T_in, F)`` that are near in time, frequency and energy: int64
    ``(T_in, F)``. k-means from a grid, in the manner of SLIC superpixels. energy: what the difference of loudest and
    softest counts, in widths of a region; with 0 places alone decide."""
    if x.dim() != 2:
        raise ShapeError(f"Clusters are cut from a spectrogram (T_in, F); got {tuple(x.shape)}. Use masks='grid'.")
    start = grid_regions(x.shape, segments)
    side = max(1.0, math.sqrt(x.numel() / max(segments, 1)))
    time, bins = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij")
    level = ((x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)).float().cpu()
    points = torch.stack((time / side, bins / side, energy * level), -1).reshape(1, -1, 3)
    found = kmeans(points, int(start.max()) + 1, init=start.flatten()).assignment
    return found.reshape(x.shape)


@torch.no_grad()
def perturbation_saliency(
    model: Model,
    x: Tensor,
    inputs: Tensor,
    masks: Literal["grid", "cluster"] | Tensor = "cluster",
    n_masks: int = 2000,
    keep: float = 0.5,
    metric: Metric = "kl",
    *,
    segments: Sequence[int] | None = None,
    baseline: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Saliency ``(T_out, T_in, F)`` of one spectrogram ``x`` ``(T_in, F)`` for what is said next after each of
    ``inputs`` ``(T_out,)``; of a line ``(T_in,)`` (tokens) it is ``(T_out, T_in)``.

    masks: how regions are cut, or the regions themselves, integers in the shape of ``x``, or of its first axis
    for saliency ``(T_out, T_in)``. segments: how many, at each granularity; masks are shared among them (default: 30,
    24 and 20 cells a region, as in the authors' example). baseline: what stands for what is left out. metric: 'kl',
    or 'difference': how much less likely the token that is likeliest without masks becomes.
    """
    if inputs.dim() != 1 or not 1 <= x.dim() <= 2:
        raise ShapeError(
            "One example at a time: x is (T_in, F) or (T_in,) and inputs (T_out,), without a batch axis; got "
            f"{tuple(x.shape)} and {tuple(inputs.shape)}."
        )
    cut = _regions(x, masks, segments)
    per_cut = -(-n_masks // len(cut))
    found: Tensor | float = 0.0
    for regions in cut:
        kept = _draw(int(regions.max()) + 1, per_cut, keep, generator)
        says = presence(lambda part: _log_probabilities(model, part, inputs), x, baseline, regions, batch_size)
        by_region = mask_saliency(_change(model, x, inputs, says(kept), metric), kept.to(x.device))
        # Every cell has its region's; region -1, which always stays, finds the zero put behind.
        found = found + F.pad(by_region, (0, 1))[:, regions] / len(cut)
    return cast(Tensor, found)


@torch.no_grad()
def encoder_saliency(
    decode: Model,
    memory: Tensor,
    inputs: Tensor,
    n_masks: int = 2000,
    keep: float = 0.5,
    metric: Metric = "kl",
    *,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
) -> Tensor:
    """The same ``(T_out, T_enc)`` for encoder states ``memory`` ``(T_enc, dim)``, each left out (zero) or kept whole:
    what the decoder takes from each, whatever the encoder mixed into it. ``decode`` takes states as a model takes x."""
    steps = torch.arange(len(memory), device=memory.device)
    return perturbation_saliency(
        decode, memory, inputs, steps, n_masks, keep, metric, generator=generator, batch_size=batch_size
    )


def pool_saliency(saliency: Tensor, steps: int, over_frequency: Pool = "max", over_time: Pool = "max") -> Tensor:
    """Saliency of a spectrogram ``(..., T_in, F)`` for ``steps`` encoder steps, ``(..., steps)``: each takes the
    share of the frames that it stands for. The largest over both is what agreed best in the paper."""
    for pool in (over_frequency, over_time):
        if pool not in ("max", "mean"):
            raise OptionError(f"Pooling is by 'max' or 'mean', got {pool!r}.")
    frames = saliency.amax(-1) if over_frequency == "max" else saliency.mean(-1)
    if not 1 <= steps <= frames.shape[-1]:
        raise ShapeError(f"Encoder steps are between 1 and the {frames.shape[-1]} frames, got {steps}.")
    flat = frames.reshape(1, -1, frames.shape[-1])
    pooled = (F.adaptive_max_pool1d if over_time == "max" else F.adaptive_avg_pool1d)(flat, steps)
    return pooled.reshape(*frames.shape[:-1], steps)


def cross_attention_map(attn: Tensor, aggregate: Literal["head", "layer", "all"] = "all") -> Tensor:
    """Cross-attention ``(layers, batch, num_heads, T_out, T_enc)`` averaged over heads ``(layers, batch, ...)``, over
    layers ``(batch, num_heads, ...)`` or over both ``(batch, T_out, T_enc)``."""
    over = {"head": (2,), "layer": (0,), "all": (0, 2)}
    if aggregate not in over:
        raise OptionError(f"aggregate is one of {', '.join(over)}: what is averaged over; got {aggregate!r}.")
    if attn.dim() != 5:
        raise ShapeError(f"Cross-attention is (layers, batch, num_heads, T_out, T_enc), got {tuple(attn.shape)}.")
    return attn.mean(over[aggregate])


def explained_relevance(
    attention: Tensor,
    saliency: Tensor,
    corr: Literal["pearson", "spearman"] = "pearson",
    exclude: Tensor | None = None,
    normalise: Literal["row", "map"] = "row",
) -> Tensor:
    """Correlation of maps ``(..., T_out, T_enc)``, one for each, ``(...)``; leading axes broadcast.

    exclude: boolean ``(..., T_out)``, True for rows of special tokens, which do not count. normalise: 'row' gives every
    output token the same say, so that rho is the mean of the rows'; 'map' takes the values of the whole map as they
    are.
    """
    if corr not in ("pearson", "spearman") or normalise not in ("row", "map"):
        raise OptionError(f"corr is 'pearson' or 'spearman', normalise 'row' or 'map'; got {corr!r}, {normalise!r}.")
    if attention.shape[-2:] != saliency.shape[-2:]:
        raise ShapeError(
            f"The maps must be of one size (T_out, T_enc); got {tuple(attention.shape[-2:])} and "
            f"{tuple(saliency.shape[-2:])}. pool_saliency brings saliency of frames to encoder steps."
        )
    attention, saliency = torch.broadcast_tensors(attention, saliency.to(attention.device))
    counted = attention.new_ones(attention.shape[:-1], dtype=torch.bool)
    if exclude is not None:
        if exclude.dtype != torch.bool:
            raise OptionError(f"exclude is boolean, True for rows that do not count; got {exclude.dtype}.")
        counted = counted & ~exclude.to(counted.device)
    if not bool(counted.any(-1).all()):
        raise OptionError("All rows of a map are excluded, so there is nothing to correlate.")
    measure = pearson if corr == "pearson" else rank_correlation
    if normalise == "row":
        return (measure(attention, saliency) * counted).sum(-1) / counted.sum(-1)
    rows = [
        measure(a[kept].flatten(), s[kept].flatten())
        for a, s, kept in zip(
            attention.flatten(0, -3) if attention.dim() > 2 else attention[None],
            saliency.flatten(0, -3) if saliency.dim() > 2 else saliency[None],
            counted.reshape(-1, counted.shape[-1]),
            strict=True,
        )
    ]
    return torch.stack(rows).reshape(attention.shape[:-2])


@dataclass(frozen=True)
class AgreementReport:
    """Means over examples, against saliency of the input and of the encoder's states: ``input_heads``,
    ``encoder_heads`` ``(layers, num_heads)``; ``*_layers`` ``(layers,)``, of the means over heads; ``*_all``, of the
    mean of all; ``*_permuted``: of that mean with its columns in random order, the floor."""

    input_heads: Tensor
    input_layers: Tensor
    input_all: float
    input_permuted: float
    encoder_heads: Tensor
    encoder_layers: Tensor
    encoder_all: float
    encoder_permuted: float


def agreement_report(
    attn: Tensor,
    input_saliency: Tensor,
    encoder_saliency: Tensor,
    exclude: Tensor | None = None,
    corr: Literal["pearson", "spearman"] = "pearson",
    normalise: Literal["row", "map"] = "row",
    generator: torch.Generator | None = None,
) -> AgreementReport:
    """:func:`explained_relevance` of cross-attention ``(layers, batch, num_heads, T_out, T_enc)`` by saliency of the
    input, pooled, and of the encoder, both ``(batch, T_out, T_enc)``; ``exclude`` ``(batch, T_out)``."""
    whole = cross_attention_map(attn)
    order = torch.rand(whole.shape[0], 1, whole.shape[-1], generator=generator).argsort(-1).to(whole.device)
    permuted = whole.gather(-1, order.expand_as(whole))
    found: list[tuple[Tensor, Tensor, float, float]] = []
    for saliency in (input_saliency, encoder_saliency):

        def rho(attention: Tensor, s: Tensor = saliency, left_out: Tensor | None = exclude) -> Tensor:
            return explained_relevance(attention, s, corr, left_out, normalise)

        heads = explained_relevance(
            attn, saliency[:, None], corr, None if exclude is None else exclude[:, None], normalise
        )
        layers = rho(cross_attention_map(attn, "head"))
        found.append((heads.mean(1), layers.mean(1), float(rho(whole).mean()), float(rho(permuted).mean())))
    return AgreementReport(*found[0], *found[1])


def _regions(x: Tensor, masks: str | Tensor, segments: Sequence[int] | None) -> list[Tensor]:
    """At every granularity."""
    if isinstance(masks, Tensor):
        return [masks]
    counts = segments or [max(2, round(x.numel() / cells)) for cells in (_CELLS if x.dim() > 1 else (1,))]
    if masks == "grid":
        return [grid_regions(x.shape, count, shift).to(x.device) for shift, count in enumerate(counts)]
    if masks == "cluster":
        return [cluster_regions(x, count).to(x.device) for count in counts]
    raise OptionError(f"masks is 'grid', 'cluster' or the regions themselves, got {masks!r}.")


def _draw(features: int, count: int, keep: float, generator: torch.Generator | None) -> Tensor:
    if not 0 < keep < 1 or count < 2:
        raise OptionError(f"Masks keep a share between 0 and 1, and two are needed; got {keep} and {count}.")
    return torch.rand(count, features, generator=generator) < keep


def _log_probabilities(model: Model, x: Tensor, inputs: Tensor) -> Tensor:
    logits = model(x, inputs.expand(len(x), -1))
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (len(x), len(inputs)):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(f"The model gives logits {(len(x), len(inputs), 'vocabulary')} for these inputs, got {got}.")
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _change(model: Model, x: Tensor, inputs: Tensor, masked: Tensor, metric: Metric) -> Tensor:
    """``(n, T_out)`` from masked log-probabilities ``(n, T_out, vocabulary)``."""
    whole = _log_probabilities(model, x[None], inputs)
    if metric == "kl":
        # A token ruled out by the model, of logit -inf, adds nothing.
        return torch.where(whole > -torch.inf, whole.exp() * (whole - masked), 0).sum(-1)
    if metric == "difference":
        likeliest = whole.argmax(-1, keepdim=True)
        before, after = (p.gather(-1, likeliest.expand(len(p), -1, -1))[..., 0].exp() for p in (whole, masked))
        return before - after
    raise OptionError(f"metric is 'kl' or 'difference', got {metric!r}.")
