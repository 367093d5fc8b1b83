"""How the attention of a whole model selects, layer by layer and head by head, as texts grow.

With the measures of :mod:`regard.inspect.normalization_limits` (Mudarisov et al., "Limitations of Normalization in
Attention Mechanism", 2025, arXiv 2508.17821), at the last position of each text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.capture import LayerTrace, capture
from regard.inspect.loading import load_text_model
from regard.inspect.normalization_limits import (
    jacobian_norm,
    need_shares,
    selection_distances,
    selection_ratios,
    separability,
)
from regard.kernels import expand_groups
from regard.layers.attention_stats import row_entropy
from regard.retrofit.sites import Selector

__all__ = ["SelectionReport", "attention_selection_report"]


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
            need_shares(alpha, f"The weights of {path}")
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
    distances, ratios = selection_distances(x, alpha), selection_ratios(x, alpha)
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
