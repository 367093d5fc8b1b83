"""What normalising attention weights costs: they vanish with length, stop selecting, and react harder when sharper.

Mudarisov et al., "Limitations of Normalization in Attention Mechanism", 2025, arXiv 2508.17821. Weights are ``alpha =
F(l) / sum F(l)`` of ``L`` logits ``l``.

- Vanishing: with ``|l_i| <= a`` and an ``F`` that is continuous and above 0 on ``[-a, a]`` and does not depend on
  ``L``, ``min F / (L max F) <= alpha_i <= max F / (L min F)``; for softmax at temperature ``T`` these are ``exp(-2a/T)
  / L`` and ``exp(2a/T) / L`` (:func:`weight_bounds`). Where one logit is ``g`` above all others, other forms keep more
  than a share of ``1/L`` on it: sparsemax at least ``min(g/T, 1)``, 1.5-entmax ``min(g/(2T), 1)^2``, at any ``L``;
  scalable softmax, ``softmax(c log(L) l / T)``, at least ``1 / (1 + (L - 1) L^(-c g/T))``, which tends to 1 if ``c g >
  T``, to 1/2 if equal, to 0 if less.
- Selection: ``I`` are the ``N`` largest weights and ``s`` the sum of ``alpha_i x_i`` over them. ``D(N)`` is the mean of
  ``|s - alpha_j x_j|^2`` over the others (:func:`selection_distance`). For independent tokens of mean zero and
  ``E |x|^2 = v``, and weights that do not depend on them, it is ``v (sum_I alpha_i^2 + mean alpha_j^2)`` on average,
  for uniform weights ``v (N + 1) / L^2``.
- Separability: the share of the selected ``alpha_i x_i`` that are nearer to ``s`` than all others are
  (:func:`separability`).
- Sensitivity: the Jacobian of softmax is ``J = (diag(alpha) - alpha alpha^T) / T``. Its entries are at most ``1/(4T)``,
  reached where a weight is 1/2, and its spectral norm at most ``1/(2T)``, reached where two weights are. So a step of
  the logits of length ``eps`` moves the weights by at most ``eps/(2T)``, and by less than ``sqrt(2)``, which a step
  that turns all weight from one token to another comes near. (Summaries of the paper give ``1/(4T)`` for the norm,
  which two equal logits refute.)

All functions take any leading dimensions and cost ``O(L d)`` memory; no ``L x L`` matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.inspect.capture import LayerTrace, capture
from regard.inspect.loading import load_text_model
from regard.kernels import expand_groups
from regard.kernels.shapes import accumulation_dtype
from regard.layers.attention_stats import row_entropy
from regard.layers.normalizers import (
    NORMALIZERS,
    Normalizer,
    entmax,
    length_scaled_softmax,
    row_normalized,
    self_adjusted_softmax,
    sparsemax,
)
from regard.retrofit.sites import Selector

__all__ = [
    "KINDS",
    "SelectionReport",
    "attention_selection_report",
    "critical_top_n",
    "expected_selection_distance",
    "finite_difference_sensitivity",
    "jacobian_norm",
    "normalise",
    "selection_distance",
    "separability",
    "weight_bounds",
]

KINDS: dict[str, Normalizer] = {
    "softmax": NORMALIZERS["softmax"],
    "sparsemax": sparsemax,
    "entmax15": partial(entmax, alpha=1.5),
    "scalable_softmax": length_scaled_softmax,
    "self_adjusted": self_adjusted_softmax,
    "uniform": NORMALIZERS["uniform"],
}
"""Normalisers whose weights sum to one, by name."""


def normalise(
    logits: Tensor,
    kind: str | Callable[[Tensor], Tensor] = "softmax",
    temperature: float = 1.0,
    length: int | None = None,
    *,
    scale: float | Tensor = 0.43,
) -> Tensor:
    """Weights that sum to one over the last axis, of ``logits / temperature``.

    kind: a name of :data:`KINDS`, or a positive function ``F`` of each logit, divided by its sum. length, scale: ``n``
    (by default the number of logits) and ``c`` of scalable softmax, ``softmax(c log(n) l)``; give a parameter as
    ``scale`` to learn it.
    """
    _need_temperature(temperature)
    if length is not None and length < 1:
        raise OptionError(f"length is a number of logits, at least 1; got {length}.")
    if not logits.is_floating_point():
        logits = logits.float()
    scores = logits.to(accumulation_dtype(logits.dtype)) / temperature
    if callable(kind):
        shares = kind(scores.detach())
        total = shares.sum(-1)
        if not bool((shares >= 0).all() and (total > 0).all() and total.isfinite().all()):
            raise OptionError(
                "A function that gives weights is positive and finite; of these logits it is negative for one, or adds "
                f"up to between {float(total.min()):.3g} and {float(total.max()):.3g}."
            )
        weights = row_normalized(scores, None, kind, eps=torch.finfo(scores.dtype).tiny)
    elif kind not in KINDS:
        raise UnknownNameError(
            "normaliser", kind, KINDS, f"There are {', '.join(KINDS)}; or give a positive function of each logit."
        )
    elif kind == "scalable_softmax":
        weights = length_scaled_softmax(scores, None, scale, length)
    else:
        weights = KINDS[kind](scores, None)
    return weights.to(logits.dtype)


def weight_bounds(bound: float, length: int, temperature: float = 1.0) -> tuple[float, float]:
    """Bounds ``exp(-2a/T) / L`` and ``exp(2a/T) / L`` of every softmax weight of ``length`` logits of size at most
    ``bound``. As ``L`` grows, one logit at one end with all others at the other comes arbitrarily near."""
    _need_temperature(temperature)
    if not bound >= 0 or length < 1:
        raise OptionError(f"Need a bound of at least 0 and at least one logit; got {bound} and {length}.")
    reach = 2 * bound / temperature
    return math.exp(-reach) / length, math.exp(reach) / length if reach < 700 else math.inf


def selection_distance(
    x: Tensor,
    alpha: Tensor,
    top_n: int,
    *,
    weighted: bool = True,
    reduce: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """``D(N)``, squared distance from the weighted sum of the ``top_n`` tokens to the others: ``x (..., L, d)`` and
    ``alpha (..., L)`` to ``(...)``.

    weighted: to ``alpha_j x_j`` of the others, otherwise to ``x_j``. reduce: their mean or their sum.
    """
    _need_top_n(top_n, alpha)
    return _distances(x, alpha, weighted, reduce)[..., top_n - 1].to(x.dtype)


def _distances(x: Tensor, alpha: Tensor, weighted: bool = True, reduce: str = "mean") -> Tensor:
    """``D(1), ..., D(L - 1)``, ``(..., L - 1)`` in double precision: one sort, then running sums."""
    if reduce not in ("mean", "sum"):
        raise OptionError(f"reduce is 'mean' or 'sum'; got {reduce!r}.")
    tokens, weights = _ordered(x, alpha)
    selected = tokens * weights[..., None]
    others = selected if weighted else tokens
    total = selected.cumsum(-2)[..., :-1, :]
    left = others.sum(-2, keepdim=True) - others.cumsum(-2)[..., :-1, :]
    size = others.square().sum(-1)
    left_size = size.sum(-1, keepdim=True) - size.cumsum(-1)[..., :-1]
    length = alpha.shape[-1]
    count = length - torch.arange(1, length, device=x.device)
    distance = count * total.square().sum(-1) - 2 * (total * left).sum(-1) + left_size
    return (distance / count if reduce == "mean" else distance).clamp_min(0)


def expected_selection_distance(alpha: Tensor, top_n: int, variance: float = 1.0) -> Tensor:
    """``D(N)`` that independent tokens of mean zero with ``E |x|^2 = variance`` have on average under weights that do
    not depend on them: ``(..., L)`` to ``(...)``."""
    _need_top_n(top_n, alpha)
    squares = alpha.sort(-1, descending=True).values.square()
    return variance * (squares[..., :top_n].sum(-1) + squares[..., top_n:].mean(-1))


def separability(x: Tensor, alpha: Tensor, top_n: int) -> Tensor:
    """Share of the ``top_n`` selected ``alpha_i x_i`` that lie nearer to their sum than every token that was not
    selected: ``x (..., L, d)`` and ``alpha (..., L)`` to ``(...)``."""
    _need_top_n(top_n, alpha)
    tokens, weights = _ordered(x, alpha)
    vectors = tokens * weights[..., None]
    distance = (vectors[..., :top_n, :].sum(-2, keepdim=True) - vectors).square().sum(-1)
    nearest = distance[..., top_n:].amin(-1, keepdim=True)
    return (distance[..., :top_n] < nearest).to(x.dtype).mean(-1)


def critical_top_n(x: Tensor, alpha: Tensor, tol: float = 2.0) -> Tensor:
    """The first ``N`` at which the selection stands apart less than ``tol`` times as far as one with uniform weights on
    the same tokens would, ``(...)``; ``L`` where it never does. tol: a ratio of ``D(N)``, above 0."""
    if not tol > 0:
        raise OptionError(f"tol is a ratio of distances above 0; got {tol}.")
    _need_top_n(1, alpha)
    lost = _ratios(x, alpha) < tol
    return torch.where(lost.any(-1), lost.to(torch.int8).argmax(-1) + 1, alpha.shape[-1])


def _ratios(x: Tensor, alpha: Tensor) -> Tensor:
    """``D(N)`` over that of uniform weights with the same tokens selected, ``(..., L - 1)``."""
    tokens, weights = _ordered(x, alpha)
    flat = _distances(tokens, torch.full_like(weights, 1 / weights.shape[-1]))
    return _distances(tokens, weights) / flat.clamp_min(torch.finfo(flat.dtype).tiny)


def _ordered(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and weights in double precision, the largest weight first."""
    if x.dim() < 2 or x.shape[:-1] != alpha.shape:
        raise ShapeError(
            f"Tokens are (..., L, d) and their weights (..., L); got {tuple(x.shape)} and {tuple(alpha.shape)}."
        )
    if not bool(x.isfinite().all() and alpha.isfinite().all()):
        raise OptionError(
            "Tokens or weights hold NaN or infinity, so no distance is defined; look where they come from."
        )
    weights, order = alpha.double().sort(dim=-1, descending=True, stable=True)
    return x.double().gather(-2, order[..., None].expand(x.shape)), weights


def jacobian_norm(
    alpha: Tensor, temperature: float = 1.0, ord: Literal["spectral", "fro", "max"] = "spectral"
) -> Tensor:
    """A norm of softmax's Jacobian where it gives weights ``alpha (..., L)``, to ``(...)``: the spectral or Frobenius
    norm or the largest entry. The weights are at least 0 and sum to 1 (within 1 percent, for half precision)."""
    _need_temperature(temperature)
    if ord not in ("spectral", "fro", "max"):
        raise OptionError(f"ord is 'spectral', 'fro' or 'max'; got {ord!r}.")
    a = alpha.double()
    _need_shares(a, "These weights")
    if ord == "max":
        # Off the diagonal it is a_i a_j <= a_i (1 - a_i).
        norm = (a * (1 - a)).amax(-1)
    elif ord == "fro":
        squares = a.square().sort(-1).values
        pairs = (squares[..., 1:] * squares.cumsum(-1)[..., :-1]).sum(-1)
        norm = ((a * (1 - a)).square().sum(-1) + 2 * pairs).sqrt()
    else:
        norm = _largest_eigenvalue(a)
    return (norm / temperature).to(alpha.dtype)


def _largest_eigenvalue(a: Tensor) -> Tensor:
    """Of ``diag(a) - a a^T``: it lies between the two largest weights, where ``sum a_i^2 / (a_i - x) = 1``."""
    if a.shape[-1] == 1:
        return torch.zeros_like(a[..., 0])
    top, at = a.max(-1, keepdim=True)
    rest = a.scatter(-1, at, 0)
    low, high = rest.amax(-1, keepdim=True), top
    for _ in range(60):
        x = (low + high) / 2
        gap = rest - x
        terms = torch.where(gap.abs() > 0, rest.square() / torch.where(gap.abs() > 0, gap, 1), 0)
        above = top.square() / (top - x).clamp_min(torch.finfo(a.dtype).tiny) + terms.sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, low, x), torch.where(above, x, high)
    return low[..., 0]


def finite_difference_sensitivity(
    logits: Tensor,
    eps: float = 1e-4,
    temperature: float = 1.0,
    *,
    kind: str | Callable[[Tensor], Tensor] = "softmax",
    steps: int = 100,
    seed: int = 0,
) -> Tensor:
    """Change of the weights for a step of size ``eps`` of the logits, over ``eps``: ``(..., L)`` to ``(...)``.

    The step is the most telling one that ``steps`` power iterations find, each of one step of ``eps`` to either side,
    so that the result tends to the Jacobian's spectral norm for small ``eps`` (for kinds whose Jacobian is symmetric,
    which are all in :data:`KINDS` but 'self_adjusted'; of others it is a lower bound).
    """
    if not eps > 0 or steps < 1:
        raise OptionError(f"eps is above 0 and steps at least 1; got {eps} and {steps}.")
    start = logits.detach().double()
    weights = normalise(start, kind, temperature)
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start.device)
    for _ in range(steps):
        size = change.norm(dim=-1, keepdim=True)
        step = change / size.clamp_min(torch.finfo(size.dtype).tiny)
        ahead, back = (normalise(start + side * eps * step, kind, temperature) - weights for side in (1, -1))
        further = ahead.norm(dim=-1, keepdim=True) >= back.norm(dim=-1, keepdim=True)
        change = torch.where(further, ahead, back) / eps
    return change.norm(dim=-1).to(logits.dtype)


@dataclass(frozen=True, eq=False)
class SelectionReport:
    """How attention selects at the last position, by layer (``paths``), head, ``lengths`` and ``top_n``.

    ``distance``, ``ratio`` (to uniform weights on the same tokens), ``separability``, ``mass`` (sum of the ``top_n``
    largest weights): ``(layers, heads, lengths, top_n)``. ``max_weight``, ``entropy`` (nats), ``sensitivity`` (spectral
    norm of the Jacobian): ``(layers, heads, lengths)``. Means over windows of text; NaN where a layer has fewer heads
    than others or ``top_n`` leaves no token out.
    """

    paths: tuple[str, ...]
    lengths: tuple[int, ...]
    top_n: tuple[int, ...]
    distance: Tensor
    ratio: Tensor
    separability: Tensor
    mass: Tensor
    max_weight: Tensor
    entropy: Tensor
    sensitivity: Tensor


@torch.no_grad()
def attention_selection_report(
    model: nn.Module | str = "nano",
    text: Tensor | str = "",
    *,
    tokenizer: Any = None,
    lengths: Sequence[int] = (64, 128, 256, 512),
    top_n: Sequence[int] = (1, 2, 4, 8, 16, 32),
    vectors: Literal["values", "hidden_states"] = "hidden_states",
    layers: Selector = None,
) -> SelectionReport:
    """Measure selection in every attention layer of a model, whatever :func:`regard.capture` works on.

    model: called on token ids ``(windows, length)``, in evaluation mode; or 'nano', a folder or a hub id. text: ids, or
    a string, cut into windows by the tokenizer (a model given by name brings its own). lengths: how many of a window's
    first tokens are read. vectors: what the weights are thought to select, the hidden states that enter the layer (the
    paper speaks of embeddings) or the head's values, which are what it adds up. Of each map only its last row is made.
    """
    if vectors not in ("values", "hidden_states"):
        raise OptionError(f"vectors is 'hidden_states' or 'values'; got {vectors!r}.")
    if not lengths or not top_n or min(lengths) < 2 or min(top_n) < 1:
        raise OptionError(f"Need lengths of at least 2 and top_n of at least 1; got {lengths} and {top_n}.")
    network, windows = _subject(model, text, tokenizer, max(lengths))
    if network.training:
        raise OptionError("A model in training drops units at random; call model.eval().")
    kept: list[list[dict[str, Tensor]]] = []
    paths: tuple[str, ...] = ()
    for length in lengths:
        with capture(network, vectors, layers=layers, summarize=_last_row) as trace:
            network(windows[:, :length])
        kept.append([])
        for path, layer in zip(trace.paths, trace, strict=True):
            alpha = layer.summary
            if alpha is None:
                raise OptionError(f"{path} shows no attention weights, so nothing is selected there; leave it out.")
            _need_shares(alpha, f"The weights of {path}")
            tokens = expand_groups(layer.values, alpha.shape[1]) if layer.values is not None else layer.hidden_states
            assert tokens is not None
            if tokens.dim() == 3:
                tokens = tokens[:, None].expand(-1, alpha.shape[1], -1, -1)
            kept[-1].append(_measure(tokens, alpha, top_n))
        paths = tuple(trace.paths)
    fields = {name: _stacked([[found[name] for found in row] for row in kept]) for name in kept[0][0]}
    return SelectionReport(paths, tuple(lengths), tuple(top_n), **fields)


def _last_row(layer: LayerTrace) -> Tensor | None:
    """Weights of the last query ``(batch, heads, k_len)``."""
    for _, rows in layer.weight_rows(1, first=layer.queries_seen - 1):
        return rows[:, :, 0].double()
    return None


def _subject(model: nn.Module | str, text: Tensor | str, tokenizer: Any, length: int) -> tuple[nn.Module, Tensor]:
    if isinstance(model, str):
        model, own = load_text_model(model)
        tokenizer = own if tokenizer is None else tokenizer
    if isinstance(text, str):
        if tokenizer is None:
            raise OptionError("A string needs the model's tokenizer: pass tokenizer=..., or token ids as text.")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        text = ids[: len(ids) // length * length].view(-1, length)
        if not len(text):
            raise OptionError(f"The text has {len(ids)} tokens, fewer than the largest length {length}.")
    if text.dim() != 2 or text.shape[1] < length:
        raise ShapeError(f"Token ids are (windows, length) of at least {length} tokens; got {tuple(text.shape)}.")
    return model, text


def _measure(x: Tensor, alpha: Tensor, top_n: Sequence[int]) -> dict[str, Tensor]:
    """Of one layer at one length, ``(heads,)`` or ``(heads, top_n)``."""
    length, nothing = alpha.shape[-1], torch.full_like(alpha[..., 0], math.nan)
    distances, ratios = _distances(x, alpha), _ratios(x, alpha)
    running = alpha.sort(-1, descending=True).values.cumsum(-1)

    def by_count(of: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([of(n) if n < length else nothing for n in top_n], -1).mean(0)

    return {
        "distance": by_count(lambda n: distances[..., n - 1]),
        "ratio": by_count(lambda n: ratios[..., n - 1]),
        "separability": by_count(lambda n: separability(x, alpha, n).double()),
        "mass": by_count(lambda n: running[..., n - 1]),
        "max_weight": alpha.amax(-1).mean(0),
        "entropy": row_entropy(alpha).mean(0),
        "sensitivity": jacobian_norm(alpha).mean(0),
    }


def _stacked(by_length: list[list[Tensor]]) -> Tensor:
    """``(layers, heads, lengths, ...)`` of ``(heads, ...)`` by length and layer; NaN for the heads a layer lacks."""
    heads = max(len(found) for row in by_length for found in row)
    sample = by_length[0][0]
    out = sample.new_full((len(by_length[0]), heads, len(by_length), *sample.shape[1:]), math.nan)
    for at, row in enumerate(by_length):
        for layer, found in enumerate(row):
            out[layer, : len(found), at] = found
    return out


def _need_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise OptionError(f"A temperature is above 0; got {temperature}.")


def _need_shares(alpha: Tensor, whose: str) -> None:
    whole = alpha.sum(-1)
    if not bool((alpha >= 0).all() and ((whole - 1).abs() <= 0.01).all()):
        raise OptionError(
            f"{whose} are not at least 0 with a sum of 1 in each row (the sums are {float(whole.min()):.3g} to "
            f"{float(whole.max()):.3g}), so no normaliser gave them."
        )


def _need_top_n(top_n: int, alpha: Tensor) -> None:
    if not 1 <= top_n < alpha.shape[-1]:
        raise OptionError(f"top_n leaves at least one of {alpha.shape[-1]} tokens out and is at least 1; got {top_n}.")
