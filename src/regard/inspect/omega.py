"""Omega: a head's raw score as one bilinear form of what the norm before it gives, and its singular vectors.

Before ``1 / sqrt(head_dim)`` the score of two tokens is::

    score(i, j) = [x_i; 1]^T Omega [x_j; 1],   Omega = [W_Q; b_Q] [W_K; b_K]^T = sum_k s_k u_k v_k^T

``x``: after the norm's centring and division by ``sigma``; its gain and offset are folded into the weights, which are
centred as ``x`` is. The rank is at most ``head_dim``. "Sparse Attention Decomposition Applied to Circuit Tracing",
2024, arXiv 2410.00340, section 3.

Scope: pre-norm models and models without norms whose queries and keys are plain projections; rotary positions make
Omega differ from pair to pair and are refused. :func:`read_scores` proves on its run that a model is one of these.
Cost: one forward pass; an SVD of ``head_dim x head_dim`` a head. Half precision is read in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.capture import capture
from regard.inspect.projections import HeadProjections, head_projections
from regard.kernels import accumulation_dtype, expand_groups
from regard.retrofit.sites import Site, discover

__all__ = ["OmegaSVD", "ScoreCache", "decompose_score", "omega", "omega_svd", "read_scores", "svs_used", "with_one"]


class OmegaSVD(NamedTuple):
    """Left ``(layers, heads, embed_dim + 1, rank)``, values ``(layers, heads, rank)``, right as left."""

    left: Tensor
    values: Tensor
    right: Tensor


def omega(model: nn.Module, layer: int, head: int) -> Tensor:
    """``(embed_dim + 1, embed_dim + 1)`` of one head."""
    sites = discover(model)
    if not 0 <= layer < len(sites) or not 0 <= head < sites[layer].context["num_heads"]:
        raise OptionError(f"There is no head ({layer}, {head}): the model has {len(sites)} layers.")
    query, key = _augmented(_folded(sites[layer]))
    return query[head] @ key[head].mT


def omega_svd(model: nn.Module) -> OmegaSVD:
    """The singular vectors of every head's Omega, cut at the rank that the head can have."""
    return _svd([_folded(site) for site in discover(model)])


def decompose_score(x_dst: Tensor, x_src: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Terms ``s_k (x_dst . u_k) (v_k . x_src)``, ``(..., rank)``, which sum to the raw score of ``x_dst`` with
    ``x_src``, each ``(..., embed_dim)``; the SVD is one head's."""
    for x in (x_dst, x_src):
        if x.shape[-1] + 1 != left.shape[-2]:
            raise ShapeError(f"Omega acts on {left.shape[-2] - 1} channels and a constant 1; got {tuple(x.shape)}.")
    return (with_one(x_dst) @ left) * values * (with_one(x_src) @ right)


def svs_used(terms: Tensor, frac: float = 1.0) -> Tensor:
    """Indices of ``terms (rank,)``, the largest first: the shortest prefix that exceeds ``frac`` of the sum (of the
    smallest first, where the sum is negative); all of them if none does, as of terms that are all positive."""
    if terms.dim() != 1 or not 0 < frac <= 1:
        raise OptionError(f"terms are (rank,) and 0 < frac <= 1; got {tuple(terms.shape)} and {frac}.")
    facing = -terms if terms.sum() < 0 else terms
    order = facing.argsort(descending=True)
    beyond = (facing[order].cumsum(0) > frac * facing.sum()).nonzero()
    return order if len(beyond) == 0 else order[: int(beyond[0]) + 1]


@dataclass(frozen=True, eq=False)
class ScoreCache:
    """A prompt's run, layer by layer: ``normed (length, embed_dim)``, its ``scale (length,)``, ``weights`` and raw
    ``scores (heads, length, length)``, ``written (heads, length, embed_dim)`` by each head without biases, and
    ``entered (length, embed_dim)``, the residual before the layer's block."""

    model: nn.Module
    svd: OmegaSVD
    folded: list[HeadProjections]
    centred: list[bool]
    normed: list[Tensor]
    scale: list[Tensor]
    weights: list[Tensor]
    scores: list[Tensor]
    written: list[Tensor]
    entered: list[Tensor]
    frac: float

    def check(self, layer: int, head: int, *tokens: int) -> None:
        """Raise OptionError for a head or a token that there is not."""
        (layers, heads), length = self.svd.values.shape[:2], len(self.normed[0])
        if not (0 <= layer < layers and 0 <= head < heads and all(0 <= token < length for token in tokens)):
            raise OptionError(
                f"There is no head ({layer}, {head}) or token {tokens}: the model has {layers} layers of {heads} heads "
                f"and the prompt {length} tokens, from 0."
            )

    def terms(self, layer: int, head: int, dst: int, src: int) -> Tensor:
        """The score's terms ``(rank,)``."""
        self.check(layer, head, dst, src)
        return decompose_score(self.normed[layer][dst], self.normed[layer][src], *(t[layer, head] for t in self.svd))

    def used(self, layer: int, head: int, dst: int, src: int) -> Tensor:
        """Indices of the singular vectors that the score uses."""
        return svs_used(self.terms(layer, head, dst, src), self.frac)

    def part(self, layer: int, states: Tensor) -> Tensor:
        """What ``states (..., embed_dim)`` in the residual are to a layer's norm, but for its scale."""
        return states - states.mean(-1, keepdim=True) if self.centred[layer] else states


@torch.no_grad()
def read_scores(model: nn.Module, tokens: Tensor, frac: float = 1.0) -> ScoreCache:
    """Run a prompt ``(1, length)``. ``frac``: see :func:`svs_used`. Raises RetrofitError where scores are no
    product of plain projections of a pre-norm residual."""
    if tokens.dim() != 2 or len(tokens) != 1 or tokens.shape[1] == 0:
        raise ShapeError(f"One prompt (1, length) at a time; got {tuple(tokens.shape)}.")
    if not 0 < frac <= 1:
        raise OptionError(f"frac is above 0 and at most 1, got {frac}.")
    if model.training:
        raise OptionError("A model in training drops units at random; call model.eval().")
    sites = discover(model)
    folded = [_folded(site) for site in sites]
    answers: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer, site in enumerate(sites):
            hooks.callback(site.home.register_forward_hook(_keep(answers, layer)).remove)
        with capture(model, "all") as seen:
            model(tokens)
    cache = ScoreCache(model, _svd(folded), folded, [], [], [], [], [], [], [], frac)
    for layer, (site, own, at) in enumerate(zip(sites, folded, seen, strict=True)):
        captured = [at.hidden_states, at.head_outputs, at.queries, at.keys, at.weights]
        x, z, q, k, maps = (t if t is None else t.to(own.query.dtype) for t in captured)
        if x is None or z is None or q is None or k is None or maps is None:
            raise RetrofitError(f"{site.path} has no residual stream or no weights to look at.")
        x, norm = x.reshape(-1, x.shape[-1]), _norm(site)
        cache.centred.append(isinstance(norm, nn.LayerNorm))
        centred, scale = cache.part(layer, x), x.new_ones(len(x))
        if norm is not None:
            scale = (centred.square().mean(-1) + _epsilon(norm, x)).sqrt()
        normed = centred / scale[:, None]
        queries, keys = (normed @ w.mT + b[:, None] for w, b in ((own.query, own.query_bias), (own.key, own.key_bias)))
        written = (z[0] - own.value_bias[:, None]) @ own.output.mT
        _check(site, queries, q[0], "queries are", answers[layer].dtype)
        _check(site, keys, expand_groups(k, len(queries))[0], "keys are", answers[layer].dtype)
        whole = written.sum(0) + own.output_bias
        _check(site, whole, answers[layer].reshape(-1, x.shape[-1]), "output is", answers[layer].dtype)
        for kept, found in (
            (cache.normed, normed),
            (cache.scale, scale),
            (cache.scores, queries @ keys.mT),
            (cache.weights, maps[0]),
            (cache.written, written),
            (cache.entered, x),
        ):
            kept.append(found)
    return cache


def with_one(x: Tensor, last: float = 1) -> Tensor:
    """``[x; 1]``, or another last entry."""
    return torch.cat((x, x.new_full((*x.shape[:-1], 1), last)), -1)


def _augmented(own: HeadProjections) -> tuple[Tensor, Tensor]:
    """``[W_Q; b_Q]`` and ``[W_K; b_K]``, ``(heads, embed_dim + 1, head_dim)``."""
    return (
        torch.cat((own.query.mT, own.query_bias[:, None]), 1),
        torch.cat((own.key.mT, own.key_bias[:, None]), 1),
    )


def _svd(folded: list[HeadProjections]) -> OmegaSVD:
    if len({own.query.shape for own in folded}) > 1:
        raise RetrofitError("These layers differ in heads or widths, so their singular vectors do not stack.")
    query, key = (torch.stack(list(both)) for both in zip(*(_augmented(own) for own in folded), strict=True))
    # Omega is a product of thin matrices: its SVD is that of their triangles.
    (q_basis, q_rest), (k_basis, k_rest) = torch.linalg.qr(query), torch.linalg.qr(key)
    left, values, right = torch.linalg.svd(q_rest @ k_rest.mT)
    return OmegaSVD(q_basis @ left, values, k_basis @ right.mT)


def _folded(site: Site) -> HeadProjections:
    """A layer's projections of the normalised residual, the value biases moved behind the output projection."""
    home = site.home
    if getattr(home, "rotary", False) or "position_embeddings" in inspect.signature(home.forward).parameters:
        raise RetrofitError(f"{site.path}: rotary positions turn queries and keys, so that no one Omega gives scores.")
    own, norm = head_projections(site), _norm(site)
    work = accumulation_dtype(own.query.dtype)
    maps = [m.to(work) for m in (own.query, own.key, own.value)]
    biases = [b.to(work) for b in (own.query_bias, own.key_bias, own.value_bias)]
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    if isinstance(bias, Tensor):
        biases = [shift + m @ bias.detach().to(work) for shift, m in zip(biases, maps, strict=True)]
    if isinstance(weight, Tensor):
        maps = [m * weight.detach().to(work) for m in maps]
    if isinstance(norm, nn.LayerNorm):
        # What reads the mean of a centred state reads nothing.
        maps = [m - m.mean(-1, keepdim=True) for m in maps]
    output = own.output.to(work)
    output_bias = own.output_bias.to(work) + torch.einsum("hdv,hv->d", output, biases[2])
    return HeadProjections(maps[0], maps[1], maps[2], output, biases[0], biases[1], biases[2], output_bias)


def _norm(site: Site) -> nn.Module | None:
    """The norm before a layer's attention; None where the residual enters as it is."""
    block = site.block
    if block is site.home:
        return None
    norms = [child for child in block.children() if _is_norm(child)]
    if getattr(block, "attention_scale", None) is not None:
        raise RetrofitError(f"{site.path}: its block scales what attention writes, which is not followed.")
    if getattr(block, "norm_first", True) is False or (not norms and any(_is_norm(m) for m in block.modules())):
        raise RetrofitError(
            f"{site.path}: the norm before attention was not found; pre-norm blocks have it as a child."
        )
    return norms[0] if norms else None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _epsilon(norm: nn.Module, x: Tensor) -> float:
    for name in ("eps", "variance_epsilon"):
        found = getattr(norm, name, None)
        if isinstance(found, float):
            return found
    return torch.finfo(x.dtype).eps


def _keep(into: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        into[layer] = output if isinstance(output, Tensor) else output[0]

    return keep


def _check(site: Site, made: Tensor, own: Tensor, what: str, dtype: torch.dtype) -> None:
    off = max(1e-3, 8 * torch.finfo(dtype).eps)
    own = own.to(made.dtype)
    if made.shape != own.shape or not torch.allclose(made, own, rtol=off, atol=off * float(own.abs().amax())):
        raise RetrofitError(
            f"{site.path}: its {what} not the plain projection of the normalised residual (rotary positions, norms of "
            "queries, a norm behind attention, an output projection elsewhere), so that Omega does not give its scores."
        )
