"""Two-stage click models over a long history of behaviours: search, attend, predict.

With target ``t``, behaviours ``j`` and embeddings ``E_a`` (attention) and ``E_r`` (representation):

    s_j = score(E_a(t), E_a(j))         r = E_r(t)         u = sum over the top_k best of softmax_j(s) E_r(j)
    logits = MLP_(200, 80, 2)(norm[r, u, avg, r * u, r * avg])            avg: mean of E_r over the behaviours
    loss = CE(logits) + CE(MLP_(200, 2)(norm[r, u', r * u']))             u': attention to all, not pruned

norm is batch normalisation, hidden units are PReLU. Feng et al., "Long-Sequence Recommendation Models Need Decoupled
Embeddings", 2025 (ICLR), arXiv 2410.02604; sizes and the auxiliary network's as in the released code. Where fewer
than ``top_k`` behaviours are real, the released code attends to padding too; here padding is never seen. It divides
the sum for ``avg`` by the count plus one; here it is a mean.

The variants differ in their tables alone: ``"shared"`` (TWIN: Chang et al., 2023, arXiv 2302.02352) has one for both
roles, ``"projected"`` one and four linear maps behind it (target and behaviours, attention and representation),
``"decoupled"`` (DARE) two, ``"four_tables"`` two for targets and two for behaviours.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.sparse.dare import DecoupledEmbedding, Score, TargetAttention

__all__ = [
    "Clicks",
    "Prediction",
    "TwoStageSequenceModel",
    "gradient_conflict",
    "gradient_cosines",
    "gradient_domination",
    "role_gradients",
    "two_stage_loss",
]

Variant = Literal["shared", "projected", "decoupled", "four_tables"]


@dataclass(frozen=True)
class Clicks:
    """A batch: by field, ids of the target ``(batch,)`` and of the behaviours ``(batch, length)``; ``mask`` ``(batch,
    length)`` boolean, True for real behaviours."""

    target: Mapping[str, Tensor]
    history: Mapping[str, Tensor]
    mask: Tensor

    def __getitem__(self, index: Tensor | slice) -> Clicks:
        """Some examples."""
        target = {field: ids[index] for field, ids in self.target.items()}
        history = {field: ids[index] for field, ids in self.history.items()}
        return Clicks(target, history, self.mask[index])


class Prediction(NamedTuple):
    """Logits ``(batch, 2)`` of the main network and of the auxiliary one; class 1 is a click."""

    main: Tensor
    auxiliary: Tensor

    def clicks(self) -> Tensor:
        """Probability of a click ``(batch,)``."""
        return self.main.softmax(-1)[:, 1]


def two_stage_loss(prediction: Prediction, labels: Tensor) -> Tensor:
    """Cross-entropy of both networks, in nats. labels ``(batch,)`` int64."""
    return F.cross_entropy(prediction.main, labels) + F.cross_entropy(prediction.auxiliary, labels)


def _network(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.BatchNorm1d(sizes[0])]
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.PReLU(init=0.1)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class TwoStageSequenceModel(nn.Module):
    """:class:`Clicks` to :class:`Prediction`.

    fields: name -> number of ids, the same for targets and behaviours. n_attention, n_representation: widths, as in
    :class:`~regard.sparse.dare.DecoupledEmbedding`. top_k: behaviours kept by the search. time_field: the field whose
    dot product has its own scale (None: none); it is put last.
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        n_attention: int | Mapping[str, int] = 16,
        n_representation: int | Mapping[str, int] = 16,
        *,
        variant: Variant = "decoupled",
        top_k: int = 20,
        score: Score = "dot",
        time_field: str | None = "time",
    ) -> None:
        super().__init__()
        if variant not in ("shared", "projected", "decoupled", "four_tables"):
            raise OptionError(f"variant is 'shared', 'projected', 'decoupled' or 'four_tables', not {variant!r}.")
        if top_k < 1:
            raise OptionError(f"The search keeps at least one behaviour; got top_k={top_k}.")
        if time_field is not None:
            if time_field not in fields:
                raise OptionError(
                    f"time_field {time_field!r} is none of the fields {', '.join(fields)}; None for none."
                )
            fields = {**{f: n for f, n in fields.items() if f != time_field}, time_field: fields[time_field]}
        self.variant, self.top_k = variant, top_k

        def tables() -> DecoupledEmbedding:
            return DecoupledEmbedding(fields, n_attention, n_representation, tied=variant in ("shared", "projected"))

        self.embedding = tables()
        self.behaviours = tables() if variant == "four_tables" else self.embedding
        searched, seen = (
            sum(widths.values()) for widths in (self.embedding.attention_widths, self.embedding.representation_widths)
        )
        self.maps = None
        if variant == "projected":
            self.maps = nn.ModuleDict(
                {
                    "query": nn.Linear(searched, searched),
                    "key": nn.Linear(searched, searched),
                    "target": nn.Linear(seen, seen),
                    "value": nn.Linear(seen, seen),
                }
            )
        time_dim = self.embedding.attention_widths[time_field] if time_field is not None and len(fields) > 1 else 0
        self.attention = TargetAttention(score, dim=searched, time_dim=time_dim if score == "dot" else 0)
        self.main = _network([5 * seen, 200, 80, 2])
        self.auxiliary = _network([3 * seen, 200, 2])

    def _mapped(self, role: str, x: Tensor) -> Tensor:
        return x if self.maps is None else cast(Tensor, self.maps[role](x))

    def search(self, clicks: Clicks) -> Tensor:
        """Stage one: the score of every behaviour ``(batch, length)``, ``-inf`` for padding."""
        query = self._mapped("query", self.embedding.for_attention(clicks.target))
        key = self._mapped("key", self.behaviours.for_attention(clicks.history))
        return self.attention.scores(query, key, clicks.mask)

    def forward(self, clicks: Clicks, *, scores: Tensor | None = None) -> Prediction:
        """Both stages. scores: those of a search done elsewhere, ``-inf`` for padding."""
        target = self._mapped("target", self.embedding.for_representation(clicks.target))
        value = self._mapped("value", self.behaviours.for_representation(clicks.history))
        scores = self.search(clicks) if scores is None else scores
        if scores.shape != value.shape[:2]:
            raise ShapeError(f"Scores are (batch, length) = {tuple(value.shape[:2])}; got {tuple(scores.shape)}.")
        pruned, whole = self.attention.read(scores, value, self.top_k), self.attention.read(scores, value)
        real = clicks.mask[..., None].to(value.dtype)
        mean = (value * real).sum(1) / real.sum(1).clamp_min(1)
        main = self.main(torch.cat((target, pruned, mean, target * pruned, target * mean), -1))
        return Prediction(main, self.auxiliary(torch.cat((target, whole, target * whole), -1)))


def role_gradients(model: TwoStageSequenceModel, clicks: Clicks, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The loss's gradient to each field's table ``(ids, width)``, through attention and through representation.

    In a model with one table, their sum is its gradient: they are taken on a copy whose roles have tables of their
    own, with equal numbers. The model itself is left as it is.
    """
    if model.variant == "four_tables":
        raise OptionError("role_gradients compares the two roles of one embedding; 'four_tables' has two of them.")
    twin = copy.deepcopy(model)
    twin.embedding.untie()
    embedding = twin.embedding
    weights = [
        cast(nn.Embedding, tables[field]).weight
        for field in embedding.fields
        for tables in (embedding.attention, embedding.representation)
    ]
    found = torch.autograd.grad(two_stage_loss(twin(clicks), labels), weights)
    return {field: (found[2 * i], found[2 * i + 1]) for i, field in enumerate(embedding.fields)}


def gradient_cosines(model: TwoStageSequenceModel, clicks: Clicks, labels: Tensor, field: str = "category") -> Tensor:
    """Cosine between the two roles' gradients of each row of a field's table ``(ids,)``; nan where one is zero."""
    attention, representation = _of_field(model, clicks, labels, field)
    lengths = attention.norm(dim=-1) * representation.norm(dim=-1)
    return (attention * representation).sum(-1) / lengths.masked_fill(lengths == 0, float("nan"))


def gradient_conflict(model: TwoStageSequenceModel, clicks: Clicks, labels: Tensor, field: str = "category") -> float:
    """Share of a field's rows whose two gradients oppose each other (cosine below zero), of those that have both."""
    cosines = gradient_cosines(model, clicks, labels, field)
    cosines = cosines[~cosines.isnan()]
    return float((cosines < 0).double().mean())


def gradient_domination(model: TwoStageSequenceModel, clicks: Clicks, labels: Tensor, field: str = "category") -> float:
    """Mean norm of a row's gradient through representation over that through attention: above one, values dominate."""
    attention, representation = (part.norm(dim=-1) for part in _of_field(model, clicks, labels, field))
    return float(representation[representation > 0].mean() / attention[attention > 0].mean())


def _of_field(model: TwoStageSequenceModel, clicks: Clicks, labels: Tensor, field: str) -> tuple[Tensor, Tensor]:
    if field not in model.embedding.fields:
        raise OptionError(f"There is no field {field!r}; there are {', '.join(model.embedding.fields)}.")
    parts = role_gradients(model, clicks, labels)[field]
    if parts[0].shape != parts[1].shape:
        raise OptionError(
            f"The roles' tables of {field!r} differ in width ({parts[0].shape[1]} and {parts[1].shape[1]}), so their "
            "gradients cannot be compared."
        )
    return parts
