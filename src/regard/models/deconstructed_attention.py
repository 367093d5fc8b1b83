"""A small language model of attention variants, one kind a layer, and schedules that mix them with standard attention.

Xue et al., "Deconstructing Attention", 2025, arXiv 2510.11602, sections 3.4, 3.5 and 4.2, table 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.cost import linear_layer_flops
from regard.dense.deconstructed_attention import PRINCIPLES, AttentionVariant
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.nn import TransformerBlock

__all__ = ["PATTERNS", "TinyLM", "hybrid_stack"]

PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "uniform": lambda layer, depth: False,
    "alternate": lambda layer, depth: layer % 2 == 0,
    "odd": lambda layer, depth: layer % 2 == 1,
    "first_half": lambda layer, depth: layer > depth // 2,
    "last_half": lambda layer, depth: layer <= depth // 2,
    "middle": lambda layer, depth: not depth // 4 < layer <= depth - depth // 4,
    "quarter": lambda layer, depth: layer % 4 == 0,
    "first": lambda layer, depth: layer == 1,
    "last": lambda layer, depth: layer == depth,
    "bilateral": lambda layer, depth: layer in (1, depth),
}
"""Which 1-based layers of how many stay standard. ``alternate`` is the paper's hybrid (even layers); ``first_half`` and
``last_half`` (its "bottom" and "top") name the half that is replaced, as ``middle`` does; ``odd``, ``quarter``,
``first``, ``last`` and ``bilateral`` name the layers that stay."""


def hybrid_stack(kind: str, pattern: str | int = "alternate", depth: int = 2) -> tuple[str, ...]:
    """The kinds of ``depth`` layers: ``kind``, and standard attention where the pattern says so.

    pattern: a name in :data:`PATTERNS`, or a number k: every k-th layer is standard.
    """
    if kind not in PRINCIPLES:
        raise UnknownNameError("attention variant", kind, PRINCIPLES, f"There are: {', '.join(PRINCIPLES)}.")
    if isinstance(pattern, str) and pattern not in PATTERNS:
        raise UnknownNameError("pattern", pattern, PATTERNS, f"There are: {', '.join(PATTERNS)}.")
    if depth < 1 or (isinstance(pattern, int) and pattern < 1):
        raise OptionError(f"Needs at least one layer, and every k-th with k >= 1; got depth {depth}, {pattern!r}.")
    stays = PATTERNS[pattern] if isinstance(pattern, str) else lambda layer, depth: layer % pattern == 0
    return tuple("standard" if stays(layer, depth) else kind for layer in range(1, depth + 1))


class TinyLM(nn.Module):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``; pre-norm blocks, causal.

    kinds: of each layer, as :func:`hybrid_stack` gives them. Layers of rnd_emb_qk and fixed_seq_qk take their queries
    and keys from a second stream, that all blocks carry along from a fixed input: frozen normal vectors, or the
    embedding of ``fixed_tokens (at least max_length,)``. It has no batch and needs computing once a batch. Layers of
    static_emb_qk take the token embeddings. All sources pass the norm of the layer that they enter.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        vocab_size: int,
        *,
        embed_dim: int = 64,
        num_heads: int = 4,
        max_length: int = 256,
        fixed_tokens: Tensor | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if not kinds:
            raise OptionError("A model needs the kind of at least one layer.")
        self.kinds, self.max_length, self.vocab_size = tuple(kinds), max_length, vocab_size
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, AttentionVariant(embed_dim, num_heads, kind, max_length=None), mlp_ratio)
            for kind in self.kinds
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size)
        self.noise: Tensor | None
        self.text: Tensor | None
        noise = torch.randn(max_length, embed_dim) if "rnd_emb_qk" in self.kinds else None
        self.register_buffer("noise", noise)
        self.register_buffer("text", None)
        if "fixed_seq_qk" in self.kinds:
            if fixed_tokens is None or fixed_tokens.dim() != 1 or len(fixed_tokens) < max_length:
                raise OptionError(
                    f"fixed_seq_qk needs fixed_tokens, a text of at least max_length = {max_length} tokens."
                )
            self.text = fixed_tokens[:max_length].clone()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        hidden: Tensor = self.norm(self._run(tokens)[-1])
        logits: Tensor = self.head(hidden)
        return logits

    @torch.no_grad()
    def weights(self, tokens: Tensor) -> list[Tensor | None]:
        """Each layer's map ``(batch | 1, num_heads, length, length)``, None where tokens are not mixed."""
        states = self._run(tokens)
        maps: list[Tensor | None] = []
        sources = self._sources(states[0])
        for block, state, source in zip(self.blocks, states, sources, strict=False):
            attention, norm = _parts(block)
            at = None if source is None else norm(source)
            maps.append(None if attention.kind == "mlp" else attention.weights(norm(state), causal=True, source=at))
        return maps

    def flops(self, length: int, batch: int = 1) -> int:
        """Of one forward pass: blocks, output projection and, where there is one, the second stream of each kind."""
        total = linear_layer_flops(batch * length, self.embed.embedding_dim, self.vocab_size)
        for block in self.blocks:
            total += _parts(block)[0].flops(length, batch) + self._mlp_flops(block, batch * length)
        for kind in ("rnd_emb_qk", "fixed_seq_qk"):
            # The last layer that reads the stream needs what the layers before it made.
            for block in self.blocks[: self._reach(kind)]:
                total += _parts(block)[0].flops(length) + self._mlp_flops(block, length)
        return total

    def _mlp_flops(self, block: nn.Module, tokens: int) -> int:
        linears = [m for m in block.get_submodule("mlp").children() if isinstance(m, nn.Linear)]
        return sum(linear_layer_flops(tokens, m.in_features, m.out_features) for m in linears)

    def _reach(self, kind: str) -> int:
        """How many blocks the stream of a kind passes."""
        return max((layer for layer, other in enumerate(self.kinds) if other == kind), default=0)

    def _run(self, tokens: Tensor) -> list[Tensor]:
        """The hidden states before each block, and after the last."""
        if tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise ShapeError(f"Tokens are (batch, up to {self.max_length}), got {tuple(tokens.shape)}.")
        states = [self.embed(tokens)]
        for block, source in zip(self.blocks, self._sources(states[0]), strict=True):
            states.append(_through(block, states[-1], source))
        return states

    def _sources(self, embedded: Tensor) -> list[Tensor | None]:
        """What each layer's queries and keys are made from, None for the hidden state itself."""
        length = embedded.shape[1]
        streams: dict[str, Tensor] = {}
        if self.noise is not None:
            streams["rnd_emb_qk"] = self.noise[None, :length]
        if self.text is not None:
            streams["fixed_seq_qk"] = self.embed(self.text[None, :length])
        begun = dict(streams)
        sources: list[Tensor | None] = []
        for layer, (block, kind) in enumerate(zip(self.blocks, self.kinds, strict=True)):
            sources.append(embedded if kind == "static_emb_qk" else streams.get(kind))
            for name, stream in streams.items():
                if layer < self._reach(name):
                    # On the stream itself a layer's queries and keys come from the stream, or from where it began.
                    own = begun[name] if kind == "static_emb_qk" else stream
                    inner = None if PRINCIPLES[kind].current_hidden_state or kind == "mlp" else own
                    streams[name] = _through(block, stream, inner)
        return sources


def _parts(block: nn.Module) -> tuple[AttentionVariant, nn.Module]:
    attention = block.get_submodule("attention")
    assert isinstance(attention, AttentionVariant)
    return attention, block.get_submodule("attention_norm")


def _through(block: nn.Module, hidden: Tensor, source: Tensor | None) -> Tensor:
    call: dict[str, Any] = {} if source is None else {"source": _parts(block)[1](source)}
    out: Tensor = block(hidden, causal=True, **call)
    return out
