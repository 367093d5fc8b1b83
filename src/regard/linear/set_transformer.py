"""The blocks of the Set Transformer: attention between sets, without positions and without an order.

Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", 2018, arXiv
1810.00825, equations 6 to 11, with the released code where it departs from the text.

    MAB(X, Y) = LN(H + relu(H W_o)),  H = LN(X W_q + [softmax(Q_h K_h^T / sqrt(d)) V_h]_h)
    SAB(X) = MAB(X, X)                          O(n^2 d)
    ISAB_m(X) = MAB(X, MAB(I, X))               O(n m d), I: m learned inducing points
    PMA_k(Z) = MAB(S, Z)                        k learned seeds read the set

``Q = X W_q``, ``K = Y W_k``, ``V = Y W_v`` are split into heads. As released: the residual is the projected query,
there is no further projection behind the heads, logits are divided by the root of the whole width ``d``, and LN is off.
In the text the residual is ``X`` itself, logits are divided by the root of a head's width (``scale="head"``), and PMA
reads ``rFF(Z)`` (``feed_forward=True``). SAB and ISAB are permutation equivariant, PMA is invariant; with constant
logits it is mean pooling, so their composition approximates any invariant function of sets.

Sets are ``(batch, n, channels)``. ``mask`` says which elements are real: a mask of keys, or a boolean ``(batch, n)``.
It hides keys; what stands in padded rows of the output is to be ignored.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import dense_attention, dense_weights
from regard.layers.maps import merge_heads, split_heads
from regard.layers.padding import layer_keys, per_head
from regard.masks import Boolean, Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["ISAB", "MAB", "PMA", "SAB"]


class MAB(nn.Module):
    """Multi-head attention block: from ``x (batch, n, query_dim)`` to ``y (batch, m, key_dim)``, giving ``(batch, n,
    embed_dim)``.

    layer_norm: the two norms of the formula. scale: logits are divided by the root of ``"full"`` ``embed_dim`` or of
    the ``"head"`` width.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        embed_dim: int,
        num_heads: int,
        layer_norm: bool = False,
        scale: str = "full",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        if scale not in ("full", "head"):
            raise OptionError(f"scale is 'full' (1 / sqrt(embed_dim)) or 'head' (1 / sqrt(head_dim)); got {scale!r}.")
        self.num_heads = num_heads
        self.scale = (embed_dim if scale == "full" else embed_dim // num_heads) ** -0.5
        self.query = nn.Linear(query_dim, embed_dim)
        self.key = nn.Linear(key_dim, embed_dim)
        self.value = nn.Linear(key_dim, embed_dim)
        self.feed_forward = nn.Linear(embed_dim, embed_dim)
        self.attention_norm, self.norm = (nn.LayerNorm(embed_dim) if layer_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend from every element of ``x`` to the real ones of ``y``; from an empty set nothing is read."""
        query, key, value = self._project(x, y)
        read = dense_attention(query, key, value, mask=_visible(mask, y), scale=self.scale)
        hidden = self.attention_norm(merge_heads(query + read))
        out: Tensor = self.norm(hidden + F.relu(self.feed_forward(hidden)))
        return out

    def weights(self, x: Tensor, y: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """The attention matrix ``(batch, num_heads, n, m)``."""
        query, key, _ = self._project(x, y)
        return dense_weights(query, key, mask=_visible(mask, y), scale=self.scale)

    def multiply_adds(self, n: int, m: int) -> int:
        """Multiplications with addition of one call on sets of ``n`` and ``m`` elements, projections included."""
        d = self.query.out_features
        products = n * self.query.in_features * d + 2 * m * self.key.in_features * d + n * d * d
        return products + 2 * n * m * d

    def _project(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, tokens, width in (("x", x, self.query.in_features), ("y", y, self.key.in_features)):
            if tokens.dim() != 3 or tokens.shape[-1] != width:
                raise ShapeError(f"This block takes {name} as (batch, elements, {width}), got {tuple(tokens.shape)}.")
        query, key, value = self.query(x), self.key(y), self.value(y)
        return cast(
            tuple[Tensor, Tensor, Tensor], tuple(split_heads(t, self.num_heads)[0] for t in (query, key, value))
        )


def _visible(mask: Mask | Tensor | None, y: Tensor) -> Mask | None:
    """The elements of ``y`` that a mask shows, as a rule for all queries."""
    if isinstance(mask, Tensor):
        if mask.shape[-1] != y.shape[1]:
            raise ShapeError(f"A mask of shape {tuple(mask.shape)} does not fit sets of {y.shape[1]} elements.")
        real = per_head(mask)
    else:
        real = layer_keys(mask, y.shape[1], y.device, "Attention between sets")
    return None if real is None else Boolean(real[:, :, None])


@register("set_attention_block")
class SAB(Layer):
    """Set attention block: every element attends to all, ``(batch, n, in_dim)`` to ``(batch, n, embed_dim)``.

    in_dim: channels of the input, by default ``embed_dim``. Other options as in :class:`MAB`.
    """

    patterns = frozenset({"self"})
    needs_training = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        in_dim: int | None = None,
        layer_norm: bool = False,
        scale: str = "full",
    ) -> None:
        super().__init__()
        width = in_dim or embed_dim
        self.attention = MAB(width, width, embed_dim, num_heads, layer_norm, scale)

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend within the set."""
        out: Tensor = self.attention(x, x, mask=mask)
        return out

    def multiply_adds(self, n: int) -> int:
        """As of :class:`MAB`, for a set of ``n``."""
        return self.attention.multiply_adds(n, n)


@register("set_transformer")
class ISAB(Layer):
    """Induced set attention block: ``inducing`` learned points read the set, and every element reads the points.

    ``(batch, n, in_dim)`` to ``(batch, n, embed_dim)`` in time ``O(n inducing embed_dim)``. The points are drawn by
    Xavier's uniform rule on ``(1, inducing, embed_dim)``, as released. Other options as in :class:`SAB`.
    """

    patterns = frozenset({"self"})
    needs_training = True
    growth = "N m"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        inducing: int = 32,
        in_dim: int | None = None,
        layer_norm: bool = False,
        scale: str = "full",
    ) -> None:
        super().__init__()
        width = in_dim or embed_dim
        self.points = _learned_set("inducing", inducing, embed_dim)
        self.gather = MAB(embed_dim, width, embed_dim, num_heads, layer_norm, scale)
        self.spread = MAB(width, embed_dim, embed_dim, num_heads, layer_norm, scale)

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """Attend within the set, through the inducing points."""
        out: Tensor = self.spread(x, self.summary(x, mask=mask))
        return out

    def summary(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """What the points have read, ``(batch, inducing, embed_dim)``."""
        read: Tensor = self.gather(self.points.expand(len(x), -1, -1), x, mask=mask)
        return read

    def weights(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """How much of each element reaches each other by attention alone: the product of both maps, ``(batch,
        num_heads, n, n)``, of rank at most ``inducing``."""
        first = self.gather.weights(self.points.expand(len(x), -1, -1), x, mask=mask)
        return self.spread.weights(x, self.summary(x, mask=mask)) @ first

    def multiply_adds(self, n: int) -> int:
        """As of :class:`MAB`, for a set of ``n``."""
        m = self.points.shape[1]
        return self.gather.multiply_adds(m, n) + self.spread.multiply_adds(n, m)


class PMA(nn.Module):
    """Pooling by multi-head attention: ``seeds`` learned vectors read the set, ``(batch, n, embed_dim)`` to ``(batch,
    seeds, embed_dim)``; with more than one, a :class:`SAB` behind it relates the outputs to each other.

    feed_forward: a row-wise ``relu(Z W)`` before the set is read, as in the text. Other options as in :class:`MAB`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        seeds: int = 1,
        layer_norm: bool = False,
        scale: str = "full",
        feed_forward: bool = False,
    ) -> None:
        super().__init__()
        self.seeds = _learned_set("seeds", seeds, embed_dim)
        self.feed_forward = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU()) if feed_forward else nn.Identity()
        self.attention = MAB(embed_dim, embed_dim, embed_dim, num_heads, layer_norm, scale)

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """Pool the real elements of the set."""
        out: Tensor = self.attention(self.seeds.expand(len(x), -1, -1), self.feed_forward(x), mask=mask)
        return out


def _learned_set(name: str, count: int, width: int) -> nn.Parameter:
    if count < 1:
        raise OptionError(f"{name} is at least 1, got {count}.")
    drawn = nn.Parameter(torch.empty(1, count, width))
    nn.init.xavier_uniform_(drawn)
    return drawn
