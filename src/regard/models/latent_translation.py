"""Encoder-decoders that read their source by latent alignment: one position each target step.

:class:`Translator` is the one of Deng et al., "Latent Alignment and Variational Attention", 2018, arXiv 1807.03756,
section 4: a bidirectional LSTM over the source, an LSTM decoder that is fed the soft context of the step before, and
the output layer on the state of one position. :class:`PositionModel` has no recurrence: what it embeds are tokens and
their positions, so that a target step is explained by its input and one source token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.models.variational_attention import (
    Aligned,
    BidirectionalLSTM,
    InferenceNetwork,
    LatentAttention,
    Mode,
)

__all__ = ["IGNORED", "AlignmentModel", "Pairs", "PositionModel", "Translator"]

IGNORED = -100
Hidden = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pairs:
    """A batch: source tokens ``(batch, S)`` and how many of them are real ``(batch,)``, decoder inputs and targets
    ``(batch, T)``, targets ``IGNORED`` behind the end."""

    source: Tensor
    lengths: Tensor
    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.shape != self.targets.shape or len(self.source) != len(self.inputs):
            raise ShapeError(
                f"Inputs and targets go step by step, for as many pairs as there are sources; got "
                f"{tuple(self.source.shape)}, {tuple(self.inputs.shape)} and {tuple(self.targets.shape)}."
            )

    @property
    def counted(self) -> Tensor:
        """Boolean ``(batch, T)``: the real targets."""
        return self.targets != IGNORED


class AlignmentModel(nn.Module):
    """Embeddings, :class:`~regard.models.variational_attention.LatentAttention` and an output layer; a subclass says
    what memory and queries are. ``inference`` is the posterior's network, None where positions follow the prior."""

    source_embedding: nn.Embedding
    input_embedding: nn.Embedding
    target_embedding: nn.Embedding
    attention: LatentAttention
    head: nn.Linear
    inference: InferenceNetwork | None
    dropout: float = 0.0

    @property
    def mode(self) -> Mode:
        """Of the attention."""
        return self.attention.mode

    @abstractmethod
    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Memory ``(batch, S, src_dim)`` of the embedded source."""

    @abstractmethod
    def queries(self, inputs: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        """Queries ``(batch, T, tgt_dim)`` of the embedded decoder inputs."""

    def forward(self, pairs: Pairs, generator: torch.Generator | None = None) -> Aligned:
        """States at every target step, as the mode has them."""
        source, memory, query = self._read(pairs)
        posterior = None
        if self.inference is not None and self.mode not in ("soft", "exact"):
            target = self._dropped(self.target_embedding(pairs.targets.clamp_min(0)))
            # A sequence has at least one step to run over, even if none of its targets counts.
            steps = pairs.counted.sum(-1).clamp_min(1)
            posterior = self.inference(source, target, pairs.lengths, steps)
        return cast(Aligned, self.attention(query, memory, pairs.lengths, posterior, generator))

    def marginal_states(self, pairs: Pairs, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """The mixture that predicts each step without its target: states ``(K, batch, T, tgt_dim)`` and log-weights."""
        _, memory, query = self._read(pairs)
        return self.attention.marginal_states(query, memory, pairs.lengths, top_k)

    def log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        """``log p(y | state)``, ``(..., batch, T)``, of states ``(..., batch, T, tgt_dim)``; zero where ignored."""
        logits = self.head(self._dropped(states))
        index = targets.clamp_min(0).expand(logits.shape[:-1])[..., None]
        chosen = logits.gather(-1, index)[..., 0] - logits.logsumexp(-1)
        return cast(Tensor, chosen.masked_fill(targets == IGNORED, 0.0))

    def predict(self, pairs: Pairs, top_k: int | None = None) -> Tensor:
        """``log p(y_t | x, inputs up to t)`` over all tokens, ``(batch, T, vocabulary)``."""
        states, log_weight = self.marginal_states(pairs, top_k)
        return self._mixed(states, log_weight)

    def _mixed(self, states: Tensor, log_weight: Tensor) -> Tensor:
        return (self.head(self._dropped(states)).log_softmax(-1) + log_weight[..., None]).logsumexp(0)

    def _read(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        source = self._dropped(self.source_embedding(pairs.source))
        memory = self.encode(source, pairs.lengths)
        inputs = self._dropped(self.input_embedding(pairs.inputs))
        return source, memory, self.queries(inputs, memory, pairs.lengths)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class PositionModel(AlignmentModel):
    """Memory: source tokens, each beside its position, ``2 dim`` numbers; queries: the inputs. No recurrence but the
    inference network's.

    inputs: how many decoder inputs there are. infer: whether modes that can have a posterior network do (False: hard
    attention, whose positions follow the prior).
    """

    def __init__(
        self,
        vocab_size: int,
        source_length: int,
        inputs: int,
        dim: int = 8,
        attn_dim: int = 32,
        mode: Mode = "sample",
        infer: bool = True,
        inference_dim: int = 16,
        temperature: float = 0.1,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(source_length, dim)
        self.input_embedding = nn.Embedding(inputs, dim)
        self.attention = LatentAttention(2 * dim, dim, attn_dim, mode=mode, temperature=temperature, samples=samples)
        self.head = nn.Linear(dim, vocab_size)
        self.target_embedding = nn.Embedding(vocab_size, dim)
        self.inference = InferenceNetwork(dim, dim, inference_dim, 1, 0.0) if infer else None

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        length = embedded.shape[1]
        if length > len(self.position.weight):
            raise ShapeError(f"This model has {len(self.position.weight)} positions and got a source of {length}.")
        return torch.cat((embedded, self.position.weight[:length].expand_as(embedded)), -1)

    def queries(self, inputs: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        return inputs


class Translator(AlignmentModel):
    """The paper's translation model; sizes by default are the released ones.

    Encoder: ``num_layers`` bidirectional LSTMs of ``encoder_dim`` a direction. Decoder: as many LSTM cells of
    ``decoder_dim``, the first reading the embedded token beside the soft context of the step before (zeros at first).
    Its embeddings are the posterior's too. Weights begin uniform in [-0.1, 0.1].
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        embed_dim: int = 512,
        encoder_dim: int = 512,
        decoder_dim: int = 768,
        attn_dim: int = 512,
        num_layers: int = 2,
        dropout: float = 0.3,
        mode: Mode = "sample",
        score: Literal["mlp", "general"] = "mlp",
        infer: bool = True,
        inference_dim: int = 512,
        temperature: float = 0.1,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1 or not 0 <= dropout < 1:
            raise OptionError(f"Need num_layers >= 1 and 0 <= dropout < 1, got {num_layers} and {dropout}.")
        self.dropout, memory_dim = dropout, 2 * encoder_dim
        self.source_embedding = nn.Embedding(source_vocab, embed_dim)
        self.input_embedding = self.target_embedding = nn.Embedding(target_vocab, embed_dim)
        self.encoder = BidirectionalLSTM(embed_dim, encoder_dim, num_layers, dropout)
        widths = [embed_dim + memory_dim] + [decoder_dim] * (num_layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(width, decoder_dim) for width in widths)
        self.attention = LatentAttention(memory_dim, decoder_dim, attn_dim, score, mode, temperature, samples)
        self.head = nn.Linear(decoder_dim, target_vocab)
        self.inference = InferenceNetwork(embed_dim, embed_dim, inference_dim, num_layers, dropout) if infer else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(embedded, lengths))

    def queries(self, inputs: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        keys, visible = self.attention.key(memory), self.attention.visible(memory, lengths)
        hidden, context = self._begin(memory)
        states = []
        for token in inputs.unbind(1):
            query, hidden = self._advance(token, context, hidden)
            context = (self.attention.prior(query[:, None], keys, visible).exp() @ memory)[:, 0]
            states.append(query)
        return torch.stack(states, 1)

    @torch.no_grad()
    def translate(
        self, source: Tensor, lengths: Tensor, first: int, last: int, max_length: int = 100, top_k: int | None = None
    ) -> Tensor:
        """The most probable token at each step, ``(batch, steps)``, until every row wrote ``last`` (which then fills
        it). first: the decoder's first input. top_k: positions of largest prior to sum over (the paper finds 5 to 10 as
        good as all)."""
        memory = self.encode(self._dropped(self.source_embedding(source)), lengths)
        hidden, context = self._begin(memory)
        keys, visible = self.attention.key(memory), self.attention.visible(memory, lengths)
        token = torch.full((len(source),), first, device=source.device)
        written: list[Tensor] = []
        done = torch.zeros_like(token, dtype=torch.bool)
        while len(written) < max_length and not bool(done.all()):
            query, hidden = self._advance(self._dropped(self.input_embedding(token)), context, hidden)
            context = (self.attention.prior(query[:, None], keys, visible).exp() @ memory)[:, 0]
            states, log_weight = self.attention.marginal_states(query[:, None], memory, lengths, top_k)
            token = self._mixed(states, log_weight)[:, 0].argmax(-1).masked_fill(done, last)
            done = done | (token == last)
            written.append(token)
        return torch.stack(written, 1) if written else source.new_empty(len(source), 0)

    def _begin(self, memory: Tensor) -> tuple[Hidden, Tensor]:
        rows = len(memory)
        zeros = [memory.new_zeros(rows, cast(nn.LSTMCell, cell).hidden_size) for cell in self.cells]
        return [(state, state) for state in zeros], memory.new_zeros(rows, memory.shape[-1])

    def _advance(self, token: Tensor, context: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """One decoder step ``(batch, decoder_dim)``, and its state."""
        x, states = torch.cat((token, context), -1), []
        for index, (cell, state) in enumerate(zip(self.cells, hidden, strict=True)):
            states.append(cell(self._dropped(x) if index else x, state))
            x = states[-1][0]
        return x, states
