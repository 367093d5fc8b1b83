"""Probabilistic attention: a mixture of Gaussians over queries and values, whose units adapt while it is used.

Unit j holds a key and a value; a query and its output are drawn from ``sum_j pi_ij N(q_i; k_j, 1 / alpha_j) N(v_i; v_j,
1 / beta_j)``. Attention is inference in it:

    w_ij = softmax_j(log pi_ij - alpha_j / 2 |q_i - k_j|^2 - beta_j / 2 |u_i - v_j|^2),   out_i = sum_j w_ij v_j

with the last term where initial values ``u`` are given. With ``alpha = 1 / sqrt(d)``, no initial values and the
magnitude prior ``pi_ij ~ exp(alpha_j / 2 |k_j|^2)`` this is dot-product attention, without that prior attention by
distance. While a trained model is used, EM fits the units to the input at hand: keys to the queries they answer for
(``key_iters``), values to those that an annotator fixed at places F (``value_iters``):

    k_j <- (c k_j + alpha_j sum_i w_ij q_i) / (c + alpha_j sum_i w_ij)
    v_j <- (c v_j + beta_j sum_{i in F} w_ij v*_i) / (c + beta_j sum_{i in F} w_ij)

with ``c`` the precision of a prior around the present mean (without one: the weighted mean). Relative positions add
``-alpha_j / 2 (|q_i - r^q_ij|^2 + |k_j - r^k_ij|^2)``, and ``r^v_ij`` to the value.

Gabbur, Bilkhu and Movellan, "Probabilistic Attention for Interactive Segmentation", 2021, arXiv 2106.15338. A per-key
precision's normaliser ``alpha_j^(d/2)`` counts as part of ``pi``, as in the released code. That code puts positions of
values beside the output instead of adding them, and its magnitude prior has ``exp(beta_j / 2 |v_j|^2)`` even without
initial values; here it has it with them alone. Positions steer responsibilities, and are left out of the keys' update,
in both. Cost: one attention, and one more for each iteration; memory is linear in length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.kernels import accumulation_dtype, expand_groups
from regard.kernels.scored import scored_weights
from regard.layers.gaussian_mixture import GaussianMixture, PairPositions, mixture_log_likelihood
from regard.layers.heads import head_sizes
from regard.layers.maps import merge_heads, split_heads
from regard.layers.position_bias import relative_offsets
from regard.masks import Mask
from regard.mechanism import Feature, Layer, Mechanism, Request
from regard.registry import register

__all__ = [
    "AxialProbabilisticAttention2d",
    "PairPositions",
    "ProbabilisticAttention",
    "ProbabilisticSelfAttention",
    "adapt_keys",
    "mixture_log_likelihood",
    "probabilistic_attention",
]

Precision = float | Tensor


def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Precision | None = None,
    beta: Precision = 0.0,
    *,
    prior: Tensor | None = None,
    magnitude_prior: bool = False,
    value_init: Tensor | None = None,
    value_fixed: Tensor | None = None,
    fixed_mask: Tensor | None = None,
    key_iters: int = 0,
    value_iters: int = 0,
    key_prior_precision: Precision | None = None,
    value_prior_precision: Precision | None = None,
    pos_emb: PairPositions | None = None,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    clamp_output: bool = False,
) -> Tensor:
    """Output ``(batch, num_heads, q_len, value_dim)`` of query ``(batch, num_heads, q_len, head_dim)``, key and value
    ``(batch, kv_heads, k_len, ...)``.

    alpha (default ``1 / sqrt(head_dim)``), beta and the prior precisions: numbers, or tensors ``(batch | 1, num_heads |
    1, k_len)``. prior: ``pi``, broadcastable to ``(batch, num_heads, q_len, k_len)``. value_init, value_fixed:
    ``(batch, num_heads, q_len, value_dim)``; fixed_mask: boolean ``(batch | 1, num_heads | 1, q_len)``, where
    value_fixed is known. pos_emb: ``(q_len, k_len, dim)`` each. clamp_output: give the known values back at their
    places. In self-attention a token that the mask hides as a key does not move keys as a query either.
    """
    frame = ProbabilisticAttention(magnitude_prior=magnitude_prior, key_iters=key_iters)
    request = frame.request(query, key, value, causal, mask)
    if value_iters < 0 or (value_fixed is None) != (fixed_mask is None):
        raise OptionError(
            f"value_iters is at least 0 (got {value_iters}), and value_fixed comes with fixed_mask, which says where."
        )
    if fixed_mask is not None and (fixed_mask.dtype != torch.bool or fixed_mask.dim() != 3):
        raise ShapeError(
            "fixed_mask is boolean (batch | 1, num_heads | 1, q_len), True where the value is known; got "
            f"{fixed_mask.dtype} of shape {tuple(fixed_mask.shape)}."
        )
    if causal and value_iters and value_fixed is not None:
        raise UnsupportedPatternError(
            "A known value moves units that earlier queries read, so value_iters and causal do not go together."
        )
    expected = (*query.shape[:3], value.shape[-1])
    for name, given in (("value_init", value_init), ("value_fixed", value_fixed)):
        if given is not None and tuple(given.shape) != expected:
            raise ShapeError(f"{name} holds one value for each query, {expected}; got {tuple(given.shape)}.")
    mixture = GaussianMixture(
        query.shape[-1] ** -0.5 if alpha is None else alpha,
        beta,
        prior,
        magnitude_prior,
        value_init,
        PairPositions() if pos_emb is None else pos_emb,
        request.visible,
    )
    value = expand_groups(value, query.shape[1])
    key = _adapted(mixture, query, key, value, key_iters, key_prior_precision, request)
    if value_fixed is None or fixed_mask is None:
        return mixture.read(query, key, value)
    for _ in range(value_iters):
        value = mixture.propagate_values(
            query, key, value, value_fixed, fixed_mask, prior_precision=value_prior_precision
        )
    out = mixture.read(query, key, value)
    return torch.where(fixed_mask[..., None], value_fixed, out) if clamp_output else out


def adapt_keys(
    query: Tensor,
    key: Tensor,
    alpha: Precision | None = None,
    *,
    iters: int = 1,
    prior: Tensor | None = None,
    magnitude_prior: bool = False,
    key_prior_precision: Precision | None = None,
    mask: Mask | Tensor | None = None,
) -> Tensor:
    """The keys that :func:`probabilistic_attention` reads with after ``iters`` steps of EM, ``(batch, num_heads, k_len,
    head_dim)``; without a prior on keys and with a fixed prior on units, :func:`mixture_log_likelihood` never falls."""
    frame = ProbabilisticAttention(alpha if not isinstance(alpha, Tensor) else None, magnitude_prior, iters)
    request = frame.request(query, key, key, False, mask)
    precision = query.shape[-1] ** -0.5 if alpha is None else alpha
    mixture = GaussianMixture(precision, 0.0, prior, magnitude_prior, rule=request.visible)
    return _adapted(mixture, query, key, None, iters, key_prior_precision, request)


def _adapted(
    mixture: GaussianMixture,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    iters: int,
    prior_precision: Precision | None,
    request: Request,
) -> Tensor:
    """Keys after EM, one set for each query head."""
    if not iters:
        return key
    key = expand_groups(key, query.shape[1])
    part = request.keys if query.shape[2] == key.shape[2] else None
    for _ in range(iters):
        key = mixture.adapt_keys(query, key, value, prior_precision=prior_precision, part=part)
    return key


@register("probabilistic_attention")
class ProbabilisticAttention(Mechanism):
    """Responsibilities of keys for queries in place of the softmax of dot products.

    alpha: precision of queries (default ``1 / sqrt(head_dim)``, in whose place a call's ``scale`` stands).
    magnitude_prior: dot products instead of distances. key_iters: steps of EM for the keys, outside of training;
    with any, all queries move the keys, so causal attention is refused. key_prior_precision: see
    :func:`probabilistic_attention`.
    """

    needs_training = True
    decodes = True

    def __init__(
        self,
        alpha: float | None = None,
        magnitude_prior: bool = False,
        key_iters: int = 0,
        key_prior_precision: float | None = None,
    ) -> None:
        super().__init__()
        if key_iters < 0 or (alpha is not None and alpha <= 0):
            raise OptionError(f"key_iters is at least 0 and alpha positive; got {key_iters} and {alpha}.")
        self.alpha, self.magnitude_prior = alpha, magnitude_prior
        self.key_iters, self.key_prior_precision = key_iters, key_prior_precision
        if key_iters:
            self.patterns, self.decodes = frozenset(("self", "cross")), False  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, magnitude_prior={self.magnitude_prior}, key_iters={self.key_iters}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        mixture, key = self._fitted(query, key, request)
        return mixture.read(query, key, value)

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        mixture, key = self._fitted(query, key, request)
        return scored_weights(query, key, mixture.scorer(None), mixture.weights, rule=request.visible)

    def _fitted(self, query: Tensor, key: Tensor, request: Request) -> tuple[GaussianMixture, Tensor]:
        usual = query.shape[-1] ** -0.5
        alpha = usual if self.alpha is None else self.alpha
        if request.scale is not None:
            alpha = alpha * request.scale / usual
        mixture = GaussianMixture(alpha, magnitude_prior=self.magnitude_prior, rule=request.visible)
        iters = 0 if self.training else self.key_iters
        return mixture, _adapted(mixture, query, key, None, iters, self.key_prior_precision, request)


@register("probabilistic_self_attention")
class ProbabilisticSelfAttention(Layer):
    """``(batch, length, embed_dim)`` in and out, with projections around :func:`probabilistic_attention`.

    alpha: precision of queries (default ``1 / sqrt(head_dim)``). precision: ``"fixed"`` at alpha, or learned from
    there on for each ``"head"`` or each ``"key"`` (a function of its token). beta: of values, against
    value_prior_precision. key_iters and value_iters take place outside of training alone; with key_iters causal
    attention is refused.
    """

    needs_training = True
    patterns = frozenset(("self", "causal-self"))

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        alpha: float | None = None,
        beta: float = 1.0,
        precision: Literal["fixed", "head", "key"] = "fixed",
        magnitude_prior: bool = False,
        key_iters: int = 0,
        value_iters: int = 0,
        key_prior_precision: float | None = None,
        value_prior_precision: float | None = None,
        clamp_output: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if precision not in ("fixed", "head", "key"):
            raise OptionError(f"precision is 'fixed', 'head' or 'key', got {precision!r}.")
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.alpha = self.head_dim**-0.5 if alpha is None else alpha
        self.beta, self.magnitude_prior, self.clamp_output = beta, magnitude_prior, clamp_output
        self.key_iters, self.value_iters = key_iters, value_iters
        self.key_prior_precision, self.value_prior_precision = key_prior_precision, value_prior_precision
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(embed_dim, width, bias=bias)
        self.key = nn.Linear(embed_dim, kv_width, bias=bias)
        self.value = nn.Linear(embed_dim, kv_width, bias=bias)
        self.out = nn.Linear(width, embed_dim, bias=bias)
        self.head_precision = nn.Parameter(torch.zeros(num_heads)) if precision == "head" else None
        self.key_precision = nn.Linear(embed_dim, self.num_kv_heads) if precision == "key" else None
        if self.key_precision is not None:
            nn.init.zeros_(self.key_precision.weight)
            nn.init.zeros_(self.key_precision.bias)

    def precisions(self, x: Tensor) -> Precision:
        """``alpha`` for these tokens: a number, or ``(batch | 1, num_heads, length | 1)``."""
        if self.head_precision is not None:
            raw = self.head_precision[None, :, None]
        elif self.key_precision is not None:
            raw = expand_groups(self.key_precision(x).transpose(1, 2), self.num_heads)
        else:
            return self.alpha
        # Softplus grows as its argument, so that large inputs do not overflow; at zero it gives alpha.
        return self.alpha * F.softplus(raw.to(accumulation_dtype(raw.dtype))) / math.log(2)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        value_fixed: Tensor | None = None,
        fixed_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend. value_fixed ``(batch, length, num_heads * head_dim)``: values, as ``value`` makes them (with
        grouped heads repeated), known at the places of fixed_mask ``(batch, length)``."""
        if x.dim() != 3 or x.shape[-1] != self.query.in_features:
            raise ShapeError(f"This layer takes (batch, length, {self.query.in_features}), got {tuple(x.shape)}.")
        using = not self.training
        (query,) = split_heads(self.query(x), self.num_heads)
        (key,), (value,) = (split_heads(part(x), self.num_kv_heads) for part in (self.key, self.value))
        attended = probabilistic_attention(
            query,
            key,
            value,
            alpha=self.precisions(x),
            beta=self.beta,
            magnitude_prior=self.magnitude_prior,
            value_fixed=None if value_fixed is None else split_heads(value_fixed, self.num_heads)[0],
            fixed_mask=None if fixed_mask is None else fixed_mask[:, None],
            key_iters=self.key_iters if using else 0,
            value_iters=self.value_iters if using else 0,
            key_prior_precision=self.key_prior_precision,
            value_prior_precision=self.value_prior_precision,
            mask=mask,
            causal=causal,
            clamp_output=self.clamp_output and using,
        )
        out: Tensor = self.out(merge_heads(attended))
        return out


class _LinePass(nn.Module):
    """Attention within lines ``(lines, length, channels)``, with vectors of relative positions in all three places."""

    def __init__(self, channels: int, num_heads: int, max_size: int) -> None:
        super().__init__()
        self.num_heads, self.max_size, head_dim = num_heads, max_size, channels // num_heads
        self.project = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        # For query, key and value, by offset from -(max_size - 1) on.
        self.tables = nn.Parameter(torch.randn(3, 2 * max_size - 1, head_dim) * head_dim**-0.5)

    def forward(
        self, lines: Tensor, value_fixed: Tensor | None, fixed_mask: Tensor | None, options: dict[str, Precision | None]
    ) -> Tensor:
        length = lines.shape[1]
        if length > self.max_size:
            raise ShapeError(f"A line of {length} places exceeds max_size={self.max_size}; build it with a larger one.")
        near = relative_offsets((length,), lines.device)[..., 0] + self.max_size - 1
        attended = probabilistic_attention(
            *split_heads(self.project(lines), self.num_heads, 3),
            value_fixed=None if value_fixed is None else split_heads(value_fixed, self.num_heads)[0],
            fixed_mask=None if fixed_mask is None else fixed_mask[:, None],
            pos_emb=PairPositions(*self.tables[:, near]),
            **options,  # type: ignore[arg-type]
        )
        out: Tensor = self.out(merge_heads(attended))
        return out


@register("axial_probabilistic_attention")
class AxialProbabilisticAttention2d(Feature):
    """``(batch, channels, height, width)`` in and out: :func:`probabilistic_attention` within rows, then columns.

    Each pass has its own projections and learned relative positions, for sides up to ``max_size``. The other options as
    in :class:`ProbabilisticSelfAttention`; iterations take place outside of training alone.
    """

    growth = "N^1.5"
    needs_training = True

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        max_size: int = 64,
        alpha: float | None = None,
        beta: float = 1.0,
        magnitude_prior: bool = False,
        key_iters: int = 0,
        value_iters: int = 0,
        key_prior_precision: float | None = None,
        value_prior_precision: float | None = None,
    ) -> None:
        super().__init__()
        if max_size < 1:
            raise OptionError(f"max_size is at least 1, got {max_size}.")
        head_sizes(channels, num_heads)
        self.channels, self.key_iters, self.value_iters = channels, key_iters, value_iters
        self.options: dict[str, Precision | None] = {
            "alpha": alpha,
            "beta": beta,
            "magnitude_prior": magnitude_prior,
            "key_prior_precision": key_prior_precision,
            "value_prior_precision": value_prior_precision,
        }
        self.rows, self.columns = (_LinePass(channels, num_heads, max_size) for _ in range(2))

    def forward(
        self, x: Tensor, value_fixed: Sequence[Tensor] | None = None, fixed_mask: Tensor | None = None
    ) -> Tensor:
        """Attend. value_fixed: what is known of the rows' and the columns' values, a pair of maps like ``x``, at the
        places of fixed_mask ``(batch, height, width)``."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"This feature takes (batch, {self.channels}, height, width), got {tuple(x.shape)}.")
        options = dict(self.options)
        if not self.training:
            options |= {"key_iters": self.key_iters, "value_iters": self.value_iters}
        known = (None, None) if value_fixed is None else value_fixed
        # Channels last, with the axis to attend along before them.
        for part, order, fixed in zip((self.rows, self.columns), ((0, 2, 3, 1), (0, 3, 2, 1)), known, strict=True):
            maps = x.permute(order)
            places = None if fixed_mask is None else fixed_mask.permute(order[:1] + tuple(a - 1 for a in order[1:3]))
            lines = part(
                maps.flatten(0, 1),
                None if fixed is None else fixed.permute(order).flatten(0, 1),
                None if places is None else places.flatten(0, 1),
                options,
            )
            inverse = [order.index(axis) for axis in range(4)]
            x = lines.view(maps.shape).permute(inverse)
        return x
