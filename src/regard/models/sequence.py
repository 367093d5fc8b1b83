"""A small transformer over tokens whose attention is any mechanism or layer: the test bed of the small experiments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.masks import Mask
from regard.mechanism import Layer
from regard.nn import TransformerBlock, make_attention
from regard.registry import get
from regard.registry import options as known_options

__all__ = ["SequenceModel"]


class SequenceModel(nn.Module):
    """Tokens ``(batch, length)`` int64 (or vectors ``(batch, length, input_dim)``) to logits.

    mechanism: one name for all layers, or one per layer. options: of the mechanism (one mapping for all, or per layer).
    positions: ``"rotary"`` (mechanisms, and layers with an option of that name), ``"learned"`` or ``"none"``. pool:
    ``"none"`` gives ``(batch, length, num_classes)``, ``"mean"`` and ``"last"`` give ``(batch, num_classes)`` and leave
    padding out where the mask is one of padding.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        vocab_size: int | None = None,
        input_dim: int | None = None,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mechanism: str | Sequence[str] = "full",
        options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        causal: bool = True,
        positions: str = "rotary",
        max_length: int = 2048,
        mlp_ratio: float = 4.0,
        pool: str = "none",
        grid: tuple[int, ...] | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if (vocab_size is None) == (input_dim is None):
            raise OptionError("Give vocab_size for tokens or input_dim for vectors, one of the two.")
        if positions not in ("rotary", "learned", "none") or pool not in ("none", "mean", "last"):
            raise OptionError(f"positions={positions!r} or pool={pool!r} is not one of the documented choices.")
        names = [mechanism] * depth if isinstance(mechanism, str) else list(mechanism)
        settings = [options or {}] * depth if options is None or isinstance(options, dict) else list(options)
        if len(names) != depth or len(settings) != depth:
            raise OptionError(f"Need one mechanism and one options mapping per layer ({depth}).")
        self.causal, self.pool, self.grid = causal, pool, grid
        self.embed: nn.Module = (
            nn.Embedding(vocab_size, embed_dim) if vocab_size else nn.Linear(cast(int, input_dim), embed_dim)
        )
        self.positions = nn.Parameter(torch.zeros(max_length, embed_dim)) if positions == "learned" else None
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList()
        self._unnamed: list[frozenset[str]] = []
        for index, (name, setting) in enumerate(zip(names, settings, strict=True)):
            keywords: dict[str, Any] = {"layer_index": index, "num_layers": depth, **setting}
            # Some layers have rotary positions by default.
            if positions == "rotary" or (issubclass(get(name), Layer) and "rotary" in known_options(name)):
                keywords.setdefault("rotary", positions == "rotary")
            if num_kv_heads is not None:
                keywords["num_kv_heads"] = num_kv_heads
            attention = make_attention(name, embed_dim, num_heads, **keywords)
            self._unnamed.append(_unnamed(name, attention, causal))
            self.blocks.append(TransformerBlock(embed_dim, attention, mlp_ratio))
        self.norm: nn.Module = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Logits, per position or pooled."""
        hidden = self.embed(x)
        if self.positions is not None:
            if hidden.shape[1] > len(self.positions):
                raise ShapeError(f"{hidden.shape[1]} tokens exceed max_length {len(self.positions)}.")
            hidden = hidden + self.positions[: hidden.shape[1]]
        call: dict[str, Any] = {"causal": self.causal}
        if mask is not None:
            call["mask"] = mask
        if self.grid is not None:
            call["grid"] = self.grid
        for block, unnamed in zip(self.blocks, self._unnamed, strict=True):
            hidden = block(hidden, **{name: value for name, value in call.items() if name not in unnamed})
        hidden = self.norm(hidden)
        return cast(Tensor, self.head(hidden if self.pool == "none" else self._pool(hidden, mask)))

    def _pool(self, hidden: Tensor, mask: Mask | None) -> Tensor:
        keys = None if mask is None else mask.key_validity(hidden.shape[1])
        if keys is None:
            return hidden.mean(1) if self.pool == "mean" else hidden[:, -1]
        real = keys[:, 0].to(hidden.device).expand(len(hidden), -1)
        if self.pool == "mean":
            share = real / real.sum(-1, keepdim=True).clamp_min(1)
            return (hidden * share[..., None].to(hidden.dtype)).sum(1)
        last = (real * torch.arange(real.shape[1], device=real.device)).argmax(-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _unnamed(name: str, attention: nn.Module, causal: bool) -> frozenset[str]:
    """What a layer's ``forward`` does not name and need not be told: that it is what it always is, and the grid."""
    named = inspect.signature(attention.forward).parameters
    if not isinstance(attention, Layer) or any(p.kind is p.VAR_KEYWORD for p in named.values()):
        return frozenset()
    always = all(pattern.startswith("causal") for pattern in attention.patterns)
    if "causal" not in named and causal != always:
        raise UnsupportedPatternError(f"{name} is {'always' if always else 'never'} causal; got causal={causal}.")
    return frozenset({"causal", "grid"} - set(named))
