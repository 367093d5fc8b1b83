"""What heads of a language model do, from a test that every model can take: random tokens, written twice.

On the second writing nothing but the first tells what comes next. A head that looks one token back is a *previous*
head, one that looks at the same token's first place a *duplicate* head, one that looks at the token after it an
*induction* head (Olsson et al., "In-context Learning and Induction Heads", 2022, arXiv 2209.11895); a head that rests
on the first token is a *sink* there, and one that weighs all tokens nearly alike is *even*. The others are *local* or
*global* by how far they look on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.inspect.capture import LayerTrace, capture
from regard.inspect.intervene import Head
from regard.inspect.loading import token_logits
from regard.inspect.metrics import METRICS, HeadSummary, Metric

__all__ = ["ROLES", "RoleScores", "head_roles", "repeated_tokens", "repetition_losses"]

ROLES = {
    "previous": "looks at the token before",
    "duplicate": "looks at the same token's earlier place",
    "induction": "looks at what followed the same token earlier",
    "sink": "rests on the first token",
    "even": "weighs all tokens nearly alike",
    "local": "looks nearby",
    "global": "looks far",
}
# A pattern names a head from here on; of several the strongest.
_NAMED = 0.3
_SINK = 0.5
# Share of the largest entropy that there can be.
_EVEN = 0.9


@dataclass(frozen=True)
class RoleScores:
    """``scores``: weight on each pattern, ``(layers, heads)`` each, 0 to 1, and under ``"even"`` the entropy over that
    of equal weights; ``distance`` ``(layers, heads)`` in tokens; ``roles``: one of :data:`ROLES` for each head."""

    scores: dict[str, Tensor]
    distance: Tensor
    roles: list[list[str]]

    def ranking(self, name: str) -> list[Head]:
        """All heads, those that show a pattern of ``scores`` most first."""
        if name not in self.scores:
            raise UnknownNameError("pattern of heads", name, list(self.scores))
        heads = self.scores[name].shape[1]
        return [divmod(place, heads) for place in self.scores[name].flatten().argsort(descending=True).tolist()]


def repeated_tokens(vocab: int, length: int, seed: int = 0, first: int = 0) -> Tensor:
    """``(1, 2 * length)`` int64: random tokens from ``first`` to ``vocab``, different where there are enough, twice."""
    if vocab - first < 2:
        raise OptionError(f"There are {vocab - first} tokens to draw from; a repeated text needs at least 2.")
    generator = torch.Generator().manual_seed(seed)
    if vocab - first >= length:
        once = torch.randperm(vocab - first, generator=generator)[:length] + first
    else:
        once = torch.randint(first, vocab, (length,), generator=generator)
    return torch.cat((once, once))[None]


def head_roles(
    model: nn.Module, run: Callable[[Tensor], object], vocab: int, *, length: int = 64, prefix: Tensor | None = None
) -> RoleScores:
    """Scores and roles of the causal self-attention heads of ``model``.

    run: calls the model on ``(1, tokens)`` int64, e.g. ``lambda ids: model(input_ids=ids)``. prefix: tokens that stand
    before every text, ``(1, n)``. Scores are means over the second writing, which rests on the prefix and the first.
    """
    tokens = repeated_tokens(vocab, length)
    skipped = 0 if prefix is None else prefix.shape[1]
    whole = tokens if prefix is None else torch.cat((prefix, tokens), 1)
    names = ("previous", "duplicate", "induction", "sink", "even")
    with (
        torch.no_grad(),
        capture(
            model,
            summarize=partial(_summarize, skipped + length, length),
        ) as trace,
    ):
        run(whole)
    means = [layer.summary for layer in trace if layer.summary is not None]
    scores = {name: torch.stack([found[name] for found in means]) for name in names}
    distance = torch.stack([found["distance"] for found in means])
    return RoleScores(scores, distance, _roles(scores, distance))


def repetition_losses(
    run: Callable[[Tensor], object], tokens: Tensor, prefix: Tensor | None = None
) -> tuple[float, float]:
    """Nats per token of a text written twice: of the first writing, and of the second. What the second is easier is
    learning from the context; without its induction heads a model loses that, and little of the first.

    run: as in :func:`head_roles`. tokens ``(batch, length)`` int64, prefix ``(1, n)``. The first token of each writing,
    which nothing announces, does not count.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ShapeError(f"A text to repeat is (batch, length) with at least 2 tokens, got {tuple(tokens.shape)}.")
    before = tokens[:, :0] if prefix is None else prefix.expand(len(tokens), -1)
    whole, length = torch.cat((before, tokens, tokens), 1), tokens.shape[1]
    with torch.no_grad():
        logits = token_logits(run(whole))[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    return float(losses[:, -2 * length + 1 : -length].mean()), float(losses[:, 1 - length :].mean())


def _summarize(start: int, length: int, layer: LayerTrace) -> dict[str, Tensor]:
    """Metrics of the queries of the second writing."""
    metrics: dict[str, Metric] = {
        "previous": METRICS["previous"],
        "sink": METRICS["sink"],
        "distance": METRICS["distance"],
        "duplicate": partial(_at, length),
        "induction": partial(_at, length - 1),
        "even": _evenness,
    }
    summary = HeadSummary(layer.queries_seen, metrics)
    for first, weights in layer.weight_rows(layer.queries_seen):
        summary.add(first + start, weights[:, :, start:])
    return {name: found[0] for name, found in summary.means().items()}


def _at(back: int, weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (weights * (query[:, None] - key == back)).sum(-1)


def _evenness(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return METRICS["entropy"](weights, query, key) / (query + 1).clamp_min(2).log()


def _roles(scores: dict[str, Tensor], distance: Tensor) -> list[list[str]]:
    middle = distance.median()
    patterns = torch.stack([scores[name] for name in ("previous", "duplicate", "induction")])
    strongest, which = patterns.max(0)
    found = []
    for layer in range(distance.shape[0]):
        row = []
        for head in range(distance.shape[1]):
            if strongest[layer, head] >= _NAMED:
                row.append(("previous", "duplicate", "induction")[int(which[layer, head])])
            elif scores["sink"][layer, head] >= _SINK:
                row.append("sink")
            elif scores["even"][layer, head] >= _EVEN:
                row.append("even")
            else:
                row.append("global" if distance[layer, head] > middle else "local")
        found.append(row)
    return found
