"""Changes of scores as functions ``score_mod(score, b, h, q_idx, kv_idx) -> score`` of one pair.

As FlexAttention takes them (Dong et al., 2024, arXiv 2412.05496): scores come scaled, queries and keys count from 0,
and tensors that a function holds get gradients. Those with parameters are modules. :data:`MODS` has them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError

__all__ = [
    "MODS",
    "LearnedBias",
    "RelativePosition",
    "ScoreMod",
    "alibi",
    "alibi_slopes",
    "compose",
    "mla_rope",
    "soft_cap",
]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def alibi_slopes(num_heads: int) -> Tensor:
    """``2^(-8 (h + 1) / H)`` for a power of two; otherwise those of the next lower power, and then every other slope of
    the next higher (Press et al., "Train Short, Test Long", 2021, arXiv 2108.12409, and its released code)."""
    if num_heads < 1:
        raise OptionError(f"num_heads must be at least 1, got {num_heads}.")
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / lower) for head in range(lower)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / lower) for head in range(num_heads - lower)]
    return torch.tensor(slopes)


def alibi(num_heads: int) -> ScoreMod:
    """A penalty that grows with the distance, another slope for each head: ``score - slope_h |i - j|``."""
    slopes = alibi_slopes(num_heads)

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes.to(score)[h] * (q_idx - kv_idx).abs()

    return mod


class RelativePosition(nn.Module):
    """``score + table[h, i - j]``: a learned number per head and offset, offsets beyond ``reach`` counted as ``reach``.

    ``table`` ``(num_heads, 2 reach + 1)``, zero at first.
    """

    def __init__(self, num_heads: int, reach: int) -> None:
        super().__init__()
        if num_heads < 1 or reach < 0:
            raise OptionError(f"Need num_heads of at least 1 and reach of at least 0; got {num_heads} and {reach}.")
        self.num_heads, self.reach = num_heads, reach
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * reach + 1))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, reach={self.reach}"

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        offset = (q_idx - kv_idx).clamp(-self.reach, self.reach) + self.reach
        return score + self.table.to(score.dtype)[h, offset]


class LearnedBias(nn.Module):
    """``score + bias[h, i, j]``, learned, zero at first."""

    def __init__(self, num_heads: int, q_len: int, k_len: int) -> None:
        super().__init__()
        if min(num_heads, q_len, k_len) < 1:
            raise OptionError(f"A bias has at least one head, query and key; got {num_heads}, {q_len}, {k_len}.")
        self.bias = nn.Parameter(torch.zeros(num_heads, q_len, k_len))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.bias.shape)}"

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.bias.to(score.dtype)[h, q_idx, kv_idx]


def soft_cap(cap: float = 50.0) -> ScoreMod:
    """``cap tanh(score / cap)``: scores stay within ``cap`` (Gemma 2 and Grok, with 50 and 30)."""
    if not 0 < cap < math.inf:
        raise OptionError(f"cap is a positive number, got {cap}.")
    return lambda score, b, h, q_idx, kv_idx: cap * (score / cap).tanh()


def mla_rope(query_rope: Tensor, key_rope: Tensor, scale: float) -> ScoreMod:
    """``score + scale q^R . k^R``: the rotated part of multi-head latent attention's scores, beside the part without
    positions (DeepSeek-V2, 2024, arXiv 2405.04434, equations 14 to 18).

    query_rope ``(batch, num_heads, q_len, dim)`` and key_rope ``(batch, rope_heads, k_len, dim)``, both rotated;
    DeepSeek has one ``rope_head`` for all. scale: the one that the scores have, ``1 / sqrt(d + d^R)`` in the paper.
    """
    heads, rope_heads = query_rope.shape[1], key_rope.shape[1]
    same = query_rope.dim() == key_rope.dim() == 4 and query_rope.shape[-1] == key_rope.shape[-1]
    if not same or rope_heads == 0 or heads % rope_heads:
        raise ShapeError(
            "The rotated parts are (batch, num_heads, q_len, dim) and (batch, rope_heads, k_len, dim) with rope_heads "
            f"dividing num_heads; got {tuple(query_rope.shape)} and {tuple(key_rope.shape)}."
        )
    group = heads // rope_heads

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + scale * (query_rope[b, h, q_idx] * key_rope[b, h // group, kv_idx]).sum(-1).to(score.dtype)

    return mod


def compose(*score_mods: ScoreMod) -> ScoreMod:
    """One after the other, the first on the scores themselves."""

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for score_mod in score_mods:
            score = score_mod(score, b, h, q_idx, kv_idx)
        return score

    return mod


MODS: dict[str, Callable[..., ScoreMod]] = {
    "alibi": alibi,
    "relative_position": RelativePosition,
    "soft_cap": soft_cap,
    "mla_rope": mla_rope,
    "learned_bias": LearnedBias,
}
"""What makes a score_mod, by name; options are those of the function or class."""
