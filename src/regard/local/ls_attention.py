"""Long-short attention: some heads see only the last few tokens, the others all of the past.

With ``0 <= i - j <= window`` for local heads (``window + 1`` tokens, the own included) and ``j <= i`` for global ones,
each head is ``softmax(q k^T / sqrt(d) + M) v``. Each kind has a fused projection of its own; the outputs, local ones
first, go through one output projection.

Why: the logits of a head have rank ``d``, while a dependency on the last few tokens is a nearly diagonal, full-rank
pattern. Over ``N >> d`` tokens such a pattern takes very large logits; softmax saturates, and training becomes
unstable. Over the ``window + 1 <= d`` logits of a local head it takes small ones.

Source: "Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention Solution", 2025, arXiv
2505.15548; the released code is a nanoGPT (AdamW 6e-4, warm-up 2000, clipping at 1, length 2048; small: 6 layers, 6
heads of 32, width 192). The paper leaves the split open; the code's settings are presets: ``"half"`` of the heads local
with window 20, as in its older state, and ``"newest"``, 11 of 12 heads with window 100. Positions are the host model's
(learned and absolute there). Heads narrower than ``embed_dim / num_heads`` save parameters, which the code gives back
to the MLP (:attr:`LongShortAttention.spare_width`).

``(batch, length, embed_dim)`` in and out. A local head takes ``O(N window d)`` and keeps ``window`` keys and values
between decoding steps.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.kernels import dense_attention
from regard.layers.maps import merge_heads, split_heads
from regard.masks import Boolean, Causal, Mask, SlidingWindow, head_masks
from regard.mechanism import Layer, Mechanism, Pattern
from regard.registry import create, register

__all__ = ["HeadGroup", "LongShortAttention"]

Executor = Literal["windowed", "masked"]

_PRESETS = {"half": (1, 2, 20), "newest": (11, 12, 100)}


class HeadGroup(nn.Module):
    """Heads that see alike: their fused projection, and the mechanism that they attend by."""

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, mechanism: Mechanism, bias: bool) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.qkv = nn.Linear(embed_dim, 3 * num_heads * head_dim, bias=bias)
        self.mechanism = mechanism

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each ``(batch, num_heads, length, head_dim)``."""
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        return query, key, value


@register("ls_attention")
class LongShortAttention(Layer):
    """local_heads: heads with a window, by default half of them. window: how many tokens before its own a local head
    sees. head_dim: of all heads, by default ``embed_dim / num_heads``.

    executor: ``"windowed"`` runs local heads block by block, ``"masked"`` all heads as one dense attention under a mask
    per head; they differ in speed alone.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(("causal-self",))
    needs_training = True
    growth = "N^2"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        local_heads: int | None = None,
        window: int = 20,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        executor: Executor = "windowed",
    ) -> None:
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim.")
        near = num_heads // 2 if local_heads is None else local_heads
        if not 0 <= near <= num_heads or num_heads < 1 or window < 0:
            raise OptionError(
                f"Need 0 <= local_heads <= num_heads, at least one head and window >= 0; got {near}, {num_heads}, "
                f"{window}."
            )
        if executor not in ("windowed", "masked"):
            raise OptionError(f"executor is 'windowed' or 'masked', not {executor!r}.")
        self.embed_dim, self.num_heads, self.local_heads = embed_dim, num_heads, near
        self.window, self.executor = window, executor
        self.head_dim = head_dim or embed_dim // num_heads
        self.groups = nn.ModuleDict()
        for name, heads, mechanism, options in (
            ("local", near, "sliding_window", {"window": window + 1, "sinks": 0}),
            ("global", num_heads - near, "full", {}),
        ):
            if heads:
                built = cast(Mechanism, create(mechanism, **options))
                self.groups[name] = HeadGroup(embed_dim, heads, self.head_dim, built, bias)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)

    @classmethod
    def preset(cls, name: str, embed_dim: int, num_heads: int, **changes: Any) -> LongShortAttention:
        """``"half"`` or ``"newest"``, the settings of the released code; the share of local heads is rounded down."""
        if name not in _PRESETS:
            raise UnknownNameError("preset", name, _PRESETS)
        share, of, window = _PRESETS[name]
        return cls(embed_dim, num_heads, **{"local_heads": num_heads * share // of, "window": window, **changes})

    @property
    def spare_width(self) -> int:
        """Hidden units by which an MLP may widen for the parameters that narrow heads save: ``2 (D - h d)``."""
        return 2 * (self.embed_dim - self.num_heads * self.head_dim)

    @property
    def rule(self) -> Mask:
        """Who sees whom, head by head."""
        near = Causal() & SlidingWindow(self.window + 1)
        return head_masks([near] * self.local_heads + [Causal()] * (self.num_heads - self.local_heads))

    def extra_repr(self) -> str:
        return f"{self.local_heads} of {self.num_heads} heads local, window={self.window}"

    def forward(self, x: Tensor, *, causal: bool = True, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend within ``x``. mask: one for all heads, a regard mask or a boolean tensor (True: visible)."""
        self._check(x)
        if not causal:
            raise UnsupportedPatternError("Long-short attention is defined for causal attention alone.")
        mask = Boolean(mask) if isinstance(mask, Tensor) else mask
        if mask is not None and mask.heads > 1:
            raise ShapeError(f"Long-short attention takes one mask for all heads, not one for {mask.heads}.")
        parts = [(group, group.project(x)) for group in self._groups()]
        if self.executor == "masked":
            query, key, value = (torch.cat(t, 1) for t in zip(*(projected for _, projected in parts), strict=True))
            rule = self.rule if mask is None else self.rule & mask.to(x.device)
            heads = dense_attention(query, key, value, mask=rule)
        else:
            heads = torch.cat([group.mechanism(*each, causal=True, mask=mask) for group, each in parts], 1)
        return cast(Tensor, self.out(merge_heads(heads)))

    def init_state(self, batch: int, *, like: Tensor) -> dict[str, Any]:
        """The decoding state before the first token: one of each kind of head."""
        return {name: group.mechanism.init_state(batch, like=like) for name, group in self._named()}

    def step(self, x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The next tokens ``(batch, new, embed_dim)``: their outputs and the new state."""
        self._check(x)
        outs, new = [], {}
        for name, group in self._named():
            out, new[name] = group.mechanism.step(*group.project(x), state[name])
            outs.append(out)
        return self.out(merge_heads(torch.cat(outs, 1))), new

    def _named(self) -> list[tuple[str, HeadGroup]]:
        return [(name, cast(HeadGroup, group)) for name, group in self.groups.items()]

    def _groups(self) -> list[HeadGroup]:
        return [group for _, group in self._named()]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"Long-short attention takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
