"""What normalising attention weights costs: they vanish with length, stop selecting, and react harder when sharper.

"Limitations of Normalization in Attention Mechanism", 2025, arXiv 2508.17821. Weights are ``alpha = F(l) / sum F(l)``
of ``L`` logits ``l``.

- Vanishing: with ``|l| <= a`` and a positive smooth ``F`` that does not depend on ``L``, every weight is of order
  ``1/L``; softmax at temperature ``T``: ``exp(-2a/T)/L <= alpha_i <= exp(2a/T)/L`` (:func:`weight_bounds`). Forms that
  know the length (scalable softmax) or cut off (sparsemax, entmax) escape it.
- Selection: ``I`` are the ``N`` largest weights and ``s`` the sum of ``alpha_i x_i`` over them. ``D(N)`` is the mean of
  ``|s - alpha_j x_j|^2`` over the others (:func:`selection_distance`). For independent tokens of mean zero and
  ``E |x|^2 = v`` that is ``v (sum_I alpha_i^2 + mean alpha_j^2)``, for uniform weights ``v (N + 1) / L^2``.
- Separability: the share of the selected ``alpha_i x_i`` that are nearer to ``s`` than all others are
  (:func:`separability`).
- Sensitivity: the Jacobian of softmax is ``J = (diag(alpha) - alpha alpha^T) / T``, with entries up to ``1/(4T)`` and a
  spectral norm up to ``1/(2T)``, both reached where two logits tie and the rest are far below; no step changes the
  weights by more than ``sqrt(2)``. (Summaries give ``1/(4T)`` for the norm, which two equal logits refute.)

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
from regard.inspect.capture import capture
from regard.kernels import expand_groups
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
    (by default the number of logits) and ``s`` of scalable softmax, ``softmax(s log(n) l)``; give a parameter as
    ``scale`` to learn it.
    """
    _need_temperature(temperature)
    scores = logits / temperature
    if callable(kind):
        if bool((kind(scores.detach()) < 0).any()):
            raise OptionError("A function that gives weights is positive; this one is negative for some logit.")
        return row_normalized(scores, None, kind, eps=torch.finfo(scores.dtype).tiny)
    if kind not in KINDS:
        raise UnknownNameError(
            "normaliser", kind, KINDS, f"There are {', '.join(KINDS)}; or give a positive function of each logit."
        )
    if kind == "scalable_softmax":
        return length_scaled_softmax(scores, None, scale, length)
    return KINDS[kind](scores, None)


def weight_bounds(bound: float, length: int, temperature: float = 1.0) -> tuple[float, float]:
    """Least and largest weight that softmax can give any of ``length`` logits of size at most ``bound``."""
    _need_temperature(temperature)
    if bound < 0 or length < 1:
        raise OptionError(f"Need a bound of at least 0 and at least one logit; got {bound} and {length}.")
    reach = math.exp(2 * bound / temperature)
    return 1 / (reach * length), reach / length


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
    """``D(N)`` that independent tokens of mean zero with ``E |x|^2 = variance`` have on average: ``(..., L)`` to
    ``(...)``."""
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
    weights, order = alpha.double().sort(dim=-1, descending=True, stable=True)
    return x.double().gather(-2, order[..., None].expand(x.shape)), weights


def jacobian_norm(
    alpha: Tensor, temperature: float = 1.0, ord: Literal["spectral", "fro", "max"] = "spectral"
) -> Tensor:
    """A norm of softmax's Jacobian at weights ``(..., L)``: the spectral or Frobenius norm or the largest entry."""
    _need_temperature(temperature)
    if ord not in ("spectral", "fro", "max"):
        raise OptionError(f"ord is 'spectral', 'fro' or 'max'; got {ord!r}.")
    a = alpha.double()
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

    model: called on token ids ``(windows, length)``; 'nano' is the library's own. text: ids, or a string with the
    model's tokenizer (nano's is at hand), cut into windows. lengths: how many of a window's first tokens are read.
    vectors: what the weights are thought to select, the hidden states that enter the layer (the paper speaks of
    embeddings) or the head's values, which are what it adds up.
    """
    if vectors not in ("values", "hidden_states"):
        raise OptionError(f"vectors is 'hidden_states' or 'values'; got {vectors!r}.")
    if not lengths or not top_n or min(lengths) < 2 or min(top_n) < 1:
        raise OptionError(f"Need lengths of at least 2 and top_n of at least 1; got {lengths} and {top_n}.")
    network, windows = _subject(model, text, tokenizer, max(lengths))
    kept: list[list[dict[str, Tensor]]] = []
    paths: tuple[str, ...] = ()
    for length in lengths:
        hidden = vectors == "hidden_states"
        with capture(network, ("weights", "hidden_states" if hidden else "values"), layers=layers) as trace:
            network(windows[:, :length])
        kept.append([])
        for path, layer in zip(trace.paths, trace, strict=True):
            if layer.weights is None:
                raise OptionError(f"{path} shows no attention weights, so nothing is selected there; leave it out.")
            alpha = layer.weights[:, :, -1].double()
            tokens = expand_groups(layer.values, alpha.shape[1]) if layer.values is not None else layer.hidden_states
            assert tokens is not None
            if tokens.dim() == 3:
                tokens = tokens[:, None].expand(-1, alpha.shape[1], -1, -1)
            kept[-1].append(_measure(tokens, alpha, top_n))
        paths = tuple(trace.paths)
    fields = {name: _stacked([[found[name] for found in row] for row in kept]) for name in kept[0][0]}
    return SelectionReport(paths, tuple(lengths), tuple(top_n), **fields)


def _subject(model: nn.Module | str, text: Tensor | str, tokenizer: Any, length: int) -> tuple[nn.Module, Tensor]:
    network = _nano() if model == "nano" else model
    if isinstance(network, str):
        raise OptionError(f"Give a model or 'nano', not {network!r}: load it, and pass it with its tokenizer.")
    if model == "nano" and tokenizer is None:
        from regard.models.nano import load_tokenizer

        tokenizer = load_tokenizer()
    if isinstance(text, str):
        if tokenizer is None:
            raise OptionError("A string needs the model's tokenizer: pass tokenizer=..., or token ids as text.")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        text = ids[: len(ids) // length * length].view(-1, length)
        if not len(text):
            raise OptionError(f"The text has {len(ids)} tokens, fewer than the largest length {length}.")
    if text.dim() != 2 or text.shape[1] < length:
        raise ShapeError(f"Token ids are (windows, length) of at least {length} tokens; got {tuple(text.shape)}.")
    return network, text


def _nano() -> nn.Module:
    from regard.models.nano import load_nano

    return load_nano()


def _measure(x: Tensor, alpha: Tensor, top_n: Sequence[int]) -> dict[str, Tensor]:
    """Of one layer at one length, ``(heads,)`` or ``(heads, top_n)``."""
    length = alpha.shape[-1]
    distances, ratios = _distances(x, alpha), _ratios(x, alpha)
    running = alpha.sort(-1, descending=True).values.cumsum(-1)
    nothing = torch.full_like(alpha[..., 0], math.nan)
    by_count = {
        "distance": [distances[..., n - 1] if n < length else nothing for n in top_n],
        "ratio": [ratios[..., n - 1] if n < length else nothing for n in top_n],
        "separability": [separability(x, alpha, n).double() if n < length else nothing for n in top_n],
        "mass": [running[..., n - 1] if n < length else nothing for n in top_n],
    }
    found = {name: torch.stack(each, -1).mean(0) for name, each in by_count.items()}
    whole = {"max_weight": alpha.amax(-1), "entropy": row_entropy(alpha), "sensitivity": jacobian_norm(alpha)}
    return found | {name: each.mean(0) for name, each in whole.items()}


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


def _need_top_n(top_n: int, alpha: Tensor) -> None:
    if not 1 <= top_n < alpha.shape[-1]:
        raise OptionError(f"top_n leaves at least one of {alpha.shape[-1]} tokens out and is at least 1; got {top_n}.")
