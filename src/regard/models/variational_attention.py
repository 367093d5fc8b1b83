"""Attention whose alignment is a latent variable.

At each target step a decoder stands at one source position ``z``, which it cannot see. From a query ``h`` and memory
``m_1 .. m_S``:

    prior        p(z | h, m) = softmax over z of score(h, m_z);   'mlp': v . tanh(W h + U m_z), 'general': (W h) . m_z
    state        s_z = tanh(A [h; m_z]),   p(y | z) = softmax(B s_z)
    soft         s = tanh(A [h; sum_z p(z) m_z]): one state, and no likelihood of a latent choice
    posterior    q(z | x, y) = softmax over z of r_t^T W x_z, r and x from bidirectional LSTMs over target and source

:class:`LatentAttention` gives the states that a mode needs: all of them (``exact``, ``enum``), those of draws
(``sample``, ``wsram``) or of relaxed draws (``gumbel``); :mod:`regard.train.variational_attention` has what is learned
with each. What feeds back into a recurrent decoder is the soft context in every mode, so that a state never depends on
earlier draws and steps stay independent given the target's past. :class:`DirichletAttention` draws the weights
themselves.

Deng et al., "Latent Alignment and Variational Attention", 2018, arXiv 1807.03756, sections 2 to 4; sizes, dropout 0.3
and initial weights in [-0.1, 0.1] are those of the released IWSLT14 models. Cost: ``exact`` and ``enum`` run the output
layer for every source position, the others once a draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.alignment import draw, draw_relaxed, log_alignment
from regard.layers.dirichlet import draw_dirichlet

__all__ = ["Aligned", "DirichletAttention", "InferenceNetwork", "LatentAttention", "Mode", "RelaxedAligned"]

Mode = Literal["soft", "exact", "enum", "sample", "gumbel", "wsram"]


@dataclass(frozen=True)
class Aligned:
    """What one call gives, for ``batch`` sources of ``S`` positions, ``T`` target steps and ``K`` states a step (1 for
    soft, ``S`` for exact and enum, otherwise the number of draws).

    states ``(K, batch, T, tgt_dim)``. soft_state ``(batch, T, tgt_dim)``, the baseline's. context ``(batch, T,
    src_dim)``, the soft one. log_prior, log_posterior ``(batch, T, S)``, the latter None where ``z`` follows the prior.
    positions ``(K, batch, T)`` that were drawn, in modes sample and wsram.
    """

    states: Tensor
    soft_state: Tensor
    context: Tensor
    log_prior: Tensor
    log_posterior: Tensor | None = None
    positions: Tensor | None = None

    @property
    def log_q(self) -> Tensor:
        """What draws follow: the posterior, or the prior where there is none."""
        return self.log_prior if self.log_posterior is None else self.log_posterior


@dataclass(frozen=True)
class RelaxedAligned:
    """As :class:`Aligned`, of weights ``(K, batch, T, S)`` that were drawn. prior, posterior: concentrations
    ``(batch, T, S)``, posterior None where weights follow the prior. log_pi ``(K, batch, T)``: of the accepted noise,
    see :func:`regard.layers.dirichlet.draw_dirichlet`. visible: boolean ``(batch, 1, S)``, None where all is."""

    states: Tensor
    soft_state: Tensor
    context: Tensor
    weights: Tensor
    log_pi: Tensor
    prior: Tensor
    posterior: Tensor | None
    visible: Tensor | None


class _Alignment(nn.Module):
    """Scores of positions, and the decoder's state from a query and what was read."""

    def __init__(self, src_dim: int, tgt_dim: int, attn_dim: int | None, score: str) -> None:
        super().__init__()
        if score not in ("mlp", "general"):
            raise OptionError(f"score is 'mlp' or 'general', got {score!r}.")
        self.src_dim, self.tgt_dim, self.score_name = src_dim, tgt_dim, score
        width = src_dim if score == "general" else (tgt_dim if attn_dim is None else attn_dim)
        self.query = nn.Linear(tgt_dim, width, bias=False)
        self.key = nn.Linear(src_dim, width, bias=False) if score == "mlp" else nn.Identity()
        self.energy = nn.Linear(width, 1, bias=False) if score == "mlp" else None
        # One matrix on [query; memory], kept as two: memory goes through it once, however many steps read it.
        self.from_query = nn.Linear(tgt_dim, tgt_dim, bias=score == "mlp")
        self.from_memory = nn.Linear(src_dim, tgt_dim, bias=False)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """``(batch, T, S)`` of queries ``(batch, T, tgt_dim)`` and ``keys = self.key(memory)``."""
        asked = self.query(query)
        if self.energy is None:
            return cast(Tensor, asked @ keys.transpose(-1, -2))
        return cast(Tensor, self.energy(torch.tanh(asked[:, :, None] + keys[:, None]))[..., 0])

    def visible(self, memory: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Boolean ``(batch, 1, S)``: which positions are real."""
        if lengths is None:
            return None
        if lengths.shape != memory.shape[:1] or bool(((lengths < 1) | (lengths > memory.shape[1])).any()):
            raise ShapeError(
                f"lengths gives each source's real positions, 1 to {memory.shape[1]}, one number for each of "
                f"{memory.shape[0]}; got {lengths.tolist()}."
            )
        return (torch.arange(memory.shape[1], device=memory.device) < lengths.to(memory.device)[:, None])[:, None]

    def checked(self, query: Tensor, memory: Tensor, posterior: Tensor | None) -> None:
        """ShapeError for tensors that do not go together."""
        shapes = tuple(query.shape), tuple(memory.shape)
        if (
            [query.dim(), memory.dim()] != [3, 3]
            or (query.shape[-1], memory.shape[-1]) != (self.tgt_dim, self.src_dim)
            or query.shape[0] != memory.shape[0]
        ):
            raise ShapeError(
                f"Need a query (batch, steps, {self.tgt_dim}) and memory (batch, positions, {self.src_dim}); got "
                f"{shapes[0]} and {shapes[1]}."
            )
        wanted = (*query.shape[:2], memory.shape[1])
        if posterior is not None and posterior.shape != wanted:
            raise ShapeError(f"The posterior has one number a step and position, {wanted}; got {posterior.shape}.")

    def extra_repr(self) -> str:
        return f"score={self.score_name!r}"


class LatentAttention(_Alignment):
    """Attention from query ``(batch, T, tgt_dim)`` to memory ``(batch, S, src_dim)`` with a latent position.

    attn_dim: hidden numbers of the mlp score, by default ``tgt_dim``. temperature: of mode gumbel. samples: draws a
    step, by default 5 in mode wsram and 1 otherwise.
    """

    def __init__(
        self,
        src_dim: int,
        tgt_dim: int,
        attn_dim: int | None = None,
        score: Literal["mlp", "general"] = "mlp",
        mode: Mode = "sample",
        temperature: float = 0.1,
        samples: int | None = None,
    ) -> None:
        super().__init__(src_dim, tgt_dim, attn_dim, score)
        if mode not in get_args(Mode):
            raise OptionError(f"mode is one of {', '.join(get_args(Mode))}; got {mode!r}.")
        if not temperature > 0:
            raise OptionError(f"A temperature is above 0, got {temperature}.")
        self.mode, self.temperature = mode, temperature
        self.samples = (5 if mode == "wsram" else 1) if samples is None else samples

    def prior(self, query: Tensor, keys: Tensor, visible: Tensor | None) -> Tensor:
        """``log p(z)``, ``(batch, T, S)``, of ``keys = self.key(memory)``."""
        return log_alignment(self.scores(query, keys), visible)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        q_log_alpha: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Aligned:
        """lengths ``(batch,)``: real source positions; those behind have weight zero in prior and posterior.
        q_log_alpha ``(batch, T, S)``: the posterior's log-weights, or scores that are normalised here. Without it
        ``z`` follows the prior: hard attention in modes sample and enum."""
        self.checked(query, memory, q_log_alpha)
        visible = self.visible(memory, lengths)
        log_prior = self.prior(query, self.key(memory), visible)
        context = log_prior.exp() @ memory
        asked, offered = self.from_query(query), self.from_memory(memory)
        soft = torch.tanh(asked + log_prior.exp() @ offered)
        log_q = None if q_log_alpha is None else log_alignment(q_log_alpha, visible)
        drawn_from, positions = log_prior if log_q is None else log_q, None

        if self.mode == "soft":
            states = soft[None]
        elif self.mode in ("exact", "enum"):
            states = self.states_at_all(asked, offered)
        elif self.mode == "gumbel":
            states = torch.tanh(asked + draw_relaxed(drawn_from, self.samples, self.temperature, generator) @ offered)
        else:
            positions = draw(drawn_from, self.samples, generator)
            states = self.states_at(asked, offered, positions)
        return Aligned(states, soft, context, log_prior, log_q, positions)

    def marginal_states(
        self, query: Tensor, memory: Tensor, lengths: Tensor | None = None, top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """States ``(K, batch, T, tgt_dim)`` and their log-weights ``(K, batch, T)``: the mixture that the model is
        without a posterior, as in evaluation. All positions, or the ``top_k`` of largest prior; in mode soft the one
        state."""
        self.checked(query, memory, None)
        visible = self.visible(memory, lengths)
        log_prior = self.prior(query, self.key(memory), visible)
        asked, offered = self.from_query(query), self.from_memory(memory)
        if self.mode == "soft":
            soft = torch.tanh(asked + log_prior.exp() @ offered)
            return soft[None], torch.zeros_like(log_prior[None, ..., 0])
        if top_k is None or top_k >= memory.shape[1]:
            return self.states_at_all(asked, offered), log_prior.movedim(-1, 0)
        if top_k < 1:
            raise OptionError(f"At least one position is kept, got top_k={top_k}.")
        kept, positions = log_prior.topk(top_k, -1)
        return self.states_at(asked, offered, positions.movedim(-1, 0)), kept.log_softmax(-1).movedim(-1, 0)

    def states_at_all(self, asked: Tensor, offered: Tensor) -> Tensor:
        """States ``(S, batch, T, tgt_dim)`` of every position, of ``self.from_query(query)`` and
        ``self.from_memory(memory)``."""
        return torch.tanh(asked + offered.transpose(0, 1)[:, :, None])

    def states_at(self, asked: Tensor, offered: Tensor, positions: Tensor) -> Tensor:
        """States ``(K, batch, T, tgt_dim)`` of the positions ``(K, batch, T)``."""
        rows = torch.arange(len(offered), device=offered.device)[:, None]
        return torch.tanh(asked + offered[rows, positions])


class DirichletAttention(_Alignment):
    """Attention whose weights are a draw from a Dirichlet distribution: relaxed alignment, which has no sum to go
    through and no closed marginal.

    Concentrations are ``exp(score)`` for the prior and ``exp`` of the posterior's scores, at least ``floor``. boost:
    see :func:`regard.layers.dirichlet.draw_dirichlet`. For visual question answering the memory is the image's regions
    and there is one step.
    """

    def __init__(
        self,
        src_dim: int,
        tgt_dim: int,
        attn_dim: int | None = None,
        score: Literal["mlp", "general"] = "mlp",
        samples: int = 1,
        boost: int = 3,
        floor: float = 0.01,
    ) -> None:
        super().__init__(src_dim, tgt_dim, attn_dim, score)
        if not floor > 0:
            raise OptionError(f"The floor of concentrations is above 0, got {floor}.")
        self.samples, self.boost, self.floor = samples, boost, floor

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        q_scores: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RelaxedAligned:
        """q_scores ``(batch, T, S)``: the posterior's (:meth:`InferenceNetwork.scores`); without them weights follow
        the prior, as in evaluation, where the mean of ``p(y | weights)`` over draws estimates the likelihood. The soft
        state reads the prior's mean."""
        self.checked(query, memory, q_scores)
        visible = self.visible(memory, lengths)
        prior = self._concentration(self.scores(query, self.key(memory)))
        posterior = None if q_scores is None else self._concentration(q_scores)
        mean = prior if visible is None else prior.masked_fill(~visible, 0.0)
        mean = mean / mean.sum(-1, keepdim=True)
        drawn_from = prior if posterior is None else posterior
        weights, log_pi = draw_dirichlet(drawn_from, visible, self.samples, self.boost, generator)
        asked, offered = self.from_query(query), self.from_memory(memory)
        states, soft = torch.tanh(asked + weights @ offered), torch.tanh(asked + mean @ offered)
        return RelaxedAligned(states, soft, mean @ memory, weights, log_pi, prior, posterior, visible)

    def _concentration(self, scores: Tensor) -> Tensor:
        return scores.exp().clamp_min(self.floor)


class InferenceNetwork(nn.Module):
    """``log q(z | x, y)``, ``(batch, T, S)``, of embedded source ``(batch, S, src_dim)`` and target ``(batch, T,
    tgt_dim)``, which it sees as a whole: bidirectional LSTMs over both, and a bilinear match of their outputs.

    hidden: numbers of each direction. As released: two layers of 512, dropout 0.3, embeddings shared with the model.
    """

    def __init__(
        self, src_dim: int, tgt_dim: int, hidden: int = 512, num_layers: int = 2, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.source = BidirectionalLSTM(src_dim, hidden, num_layers, dropout)
        self.target = BidirectionalLSTM(tgt_dim, hidden, num_layers, dropout)
        self.match = nn.Linear(2 * hidden, 2 * hidden, bias=False)

    def scores(
        self, source: Tensor, target: Tensor, lengths: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> Tensor:
        """Scores before normalisation, padding included."""
        if source.dim() != 3 or target.dim() != 3 or len(source) != len(target):
            raise ShapeError(
                f"Need an embedded source (batch, positions, dim) and target (batch, steps, dim); got "
                f"{tuple(source.shape)} and {tuple(target.shape)}."
            )
        asked = self.match(self.target(target, target_lengths))
        return cast(Tensor, asked @ self.source(source, lengths).transpose(-1, -2))

    def forward(
        self, source: Tensor, target: Tensor, lengths: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> Tensor:
        scores = self.scores(source, target, lengths, target_lengths)
        if lengths is None:
            return log_alignment(scores)
        real = torch.arange(source.shape[1], device=source.device) < lengths.to(source.device)[:, None]
        return log_alignment(scores, real[:, None])


class BidirectionalLSTM(nn.LSTM):
    """``(batch, length, dim)`` -> ``(batch, length, 2 hidden)``; what stands behind a sequence's length is never read
    and gives zeros."""

    def __init__(self, dim: int, hidden: int, num_layers: int = 1, dropout: float = 0.0) -> None:
        # torch applies dropout between layers alone, and warns where there is one layer.
        between = dropout if num_layers > 1 else 0.0
        super().__init__(dim, hidden, num_layers, batch_first=True, dropout=between, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if lengths is None:
            return super().forward(x)[0]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = super().forward(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
