"""Networks on sets: the Set Transformer, and the poolings that it is compared with.

Lee et al., "Set Transformer", 2018, arXiv 1810.00825, section 3.3 and the released models: an encoder of attention
blocks on the elements, pooling by learned seeds, attention among what was pooled, one linear layer. The rivals of its
tables encode each element by itself and pool (Zaheer et al., "Deep Sets", 2017, arXiv 1703.06114). Sets ``(batch, n,
dim_in)`` to ``(batch, num_outputs, dim_out)``; ``mask`` as in :mod:`regard.linear.set_transformer`.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.kernels import masked_softmax
from regard.layers.padding import layer_keys, per_head
from regard.linear.set_transformer import ISAB, PMA, SAB
from regard.masks import Mask

__all__ = ["DeepSet", "SetTransformer"]


class SetTransformer(nn.Module):
    """Two ISAB, PMA with a seed per output, two SAB, a linear layer.

    num_outputs: vectors of ``dim_out`` that come out, whatever the order of the set; None leaves pooling and all behind
    it out and reads every element, ``(batch, n, dim_out)``. num_inds: inducing points of each ISAB, None for SAB
    instead (quadratic in the set's size). decoder_depth: SABs behind the pooling; the released small models have none.
    """

    def __init__(
        self,
        dim_in: int,
        num_outputs: int | None,
        dim_out: int,
        num_inds: int | None = 32,
        dim: int = 128,
        num_heads: int = 4,
        layer_norm: bool = False,
        *,
        decoder_depth: int = 2,
        scale: str = "full",
    ) -> None:
        super().__init__()

        def encoder(width: int) -> nn.Module:
            if num_inds is None:
                return SAB(dim, num_heads, width, layer_norm, scale)
            return ISAB(dim, num_heads, num_inds, width, layer_norm, scale)

        self.encoder = nn.ModuleList((encoder(dim_in), encoder(dim)))
        self.pool = None if num_outputs is None else PMA(dim, num_heads, num_outputs, layer_norm, scale)
        self.decoder = nn.Sequential(
            *(SAB(dim, num_heads, None, layer_norm, scale) for _ in range(0 if num_outputs is None else decoder_depth))
        )
        self.head = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """``mask``: the real elements."""
        for block in self.encoder:
            x = block(x, mask=mask)
        if self.pool is not None:
            x = self.pool(x, mask=mask)
        return cast(Tensor, self.head(self.decoder(x)))


class DeepSet(nn.Module):
    """Row-wise layers, a pooling, layers on what was pooled.

    pool: ``"mean"``, ``"sum"``, ``"max"``, or ``"dot"``: the mean with the softmax of each element's product with a
    learned vector as weights. depth: linear layers before and behind the pooling, ReLU between them.
    """

    def __init__(
        self,
        dim_in: int,
        num_outputs: int,
        dim_out: int,
        pool: str = "mean",
        dim: int = 128,
        depth: tuple[int, int] = (4, 4),
    ) -> None:
        super().__init__()
        if pool not in ("mean", "sum", "max", "dot"):
            raise OptionError(f"pool is 'mean', 'sum', 'max' or 'dot'; got {pool!r}.")
        if min(depth) < 1:
            raise OptionError(f"Need a layer on either side of the pooling, got depth {depth}.")
        self.kind, self.num_outputs = pool, num_outputs
        self.encoder = _rows(dim_in, dim, dim, depth[0])
        self.query = nn.Parameter(torch.randn(dim)) if pool == "dot" else None
        self.decoder = _rows(dim, dim, num_outputs * dim_out, depth[1])

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        """``mask``: the real elements; an empty set pools to zeros."""
        hidden = self.encoder(x)
        keys = per_head(mask) if isinstance(mask, Tensor) else layer_keys(mask, x.shape[1], x.device, "DeepSet")
        real = torch.ones(1, 1, x.shape[1], dtype=torch.bool, device=x.device) if keys is None else keys
        return cast(Tensor, self.decoder(self._pool(hidden, real[:, 0])).unflatten(-1, (self.num_outputs, -1)))

    def _pool(self, hidden: Tensor, real: Tensor) -> Tensor:
        if self.query is not None:
            share = masked_softmax(hidden @ self.query * hidden.shape[-1] ** -0.5, real)
            return (share[..., None] * hidden).sum(1)
        if self.kind == "max":
            most = hidden.masked_fill(~real[..., None], float("-inf")).amax(1)
            return torch.where(real.any(1, keepdim=True), most, 0)
        total = hidden.masked_fill(~real[..., None], 0).sum(1)
        return total if self.kind == "sum" else total / real.sum(1, keepdim=True).clamp_min(1)


def _rows(dim_in: int, dim: int, dim_out: int, depth: int) -> nn.Sequential:
    widths = [dim_in, *[dim] * (depth - 1), dim_out]
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
