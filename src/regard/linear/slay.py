"""SLAY: the spherical Yat-kernel as a mixture of positive random features, so that its attention is linear in length.

Luna et al., "SLAY: Geometry-Aware Spherical Linearized Attention with Yat-Kernel", 2026, arXiv
2602.04915, section 2, algorithm 1.

    E(q, k) = (q . k)^2 / (|q - k|^2 + eps)                   the Yat-kernel: alignment over distance
    E(c) = c^2 / (C - 2 c),  C = 2 + eps                      on the unit sphere, c = cos(q, k)
         = integral_0^inf exp(-s C) c^2 exp(2 s c) ds         (Bernstein)
         ~ sum_r w_r c^2 exp(2 s_r c),  s_r = t_r / C, w_r = alpha_r / C   (Gauss-Laguerre, R nodes)

Positive random features give ``exp(2 s c)`` and a map of degree two gives ``c^2``; the features of the product are
their tensor product, ``Psi(x) = [sqrt(w_r) poly(x) (x) prf(x; s_r)]_r``, ``R P M`` in all, and

    out_i = Psi(q_i) sum_j Psi(k_j)^T v_j / (Psi(q_i) . sum_j Psi(k_j) + delta).

Maps of degree two (``poly``): ``"anchor"``, the paper's choice, ``(a_p . x)^2 / sqrt(P)`` with random unit anchors, has
no negative product but is biased: times ``d (d + 2)`` its mean is ``1 + 2 c^2``. ``"exact"`` is ``x (x) x``.
``"maclaurin"``, ``"tensorsketch"`` and ``"nystrom"`` approach ``c^2`` itself but have negative products, so that a
denominator may come near zero. Two ablations change the kernel: ``"none"`` leaves ``c^2`` out (Laplace only),
``"hadamard"`` multiplies the features of both factors place by place, from one ``omega``.

``(batch, heads, N, d)``; lengths of queries and keys do not matter, only directions, so ``scale`` has no effect. Time
``O(N R P M d_v)``, a state of ``R P M (d_v + 1)`` a head. With tiny ``eps`` a few nodes fit the kernel badly near ``c =
1``, where it rises to ``1 / eps``. :class:`YatAttention` is the exact quadratic attention that is approximated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import linear_attention
from regard.kernels.shapes import accumulation_dtype, expand_groups
from regard.layers.feature_maps import positive_random_features, unit_vectors
from regard.linear.frame import LinearMechanism
from regard.mechanism import Mechanism, Request
from regard.registry import register

__all__ = [
    "Slay",
    "YatAttention",
    "draw_projections",
    "quadrature",
    "quadrature_kernel",
    "slay_attention",
    "slay_features",
    "spherical_yat",
    "yat_attention",
    "yat_kernel",
]

POLYNOMIALS = ("anchor", "exact", "maclaurin", "nystrom", "tensorsketch", "none", "hadamard")
_LIMIT = 20.0  # of the exponents of random features
_RIDGE = 1e-3  # of the anchors' kernel matrix in Nystrom features


def yat_kernel(query: Tensor, key: Tensor, eps: float = 1e-3) -> Tensor:
    """``(q . k)^2 / (|q - k|^2 + eps)``: query ``(..., N, d)``, key ``(..., M, d)`` to ``(..., N, M)``."""
    product = query @ key.transpose(-1, -2)
    norms = query.square().sum(-1)[..., :, None] + key.square().sum(-1)[..., None, :]
    return product.square() / ((norms - 2 * product).clamp_min(0) + eps)


def spherical_yat(cosine: Tensor, eps: float = 1e-3) -> Tensor:
    """``c^2 / (2 + eps - 2 c)``, within ``[0, 1 / eps]``: the Yat-kernel of unit vectors."""
    return cosine.square() / ((2 - 2 * cosine).clamp_min(0) + eps)


def yat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float = 1e-3,
    causal: bool = False,
    *,
    spherical: bool = True,
    seen: Tensor | None = None,
) -> Tensor:
    """Exact, quadratic: kernel weights divided by their sum over the row. query ``(batch, heads, N, d)``, key and value
    ``(batch, kv_heads, M, ...)`` to ``(batch, heads, N, d_v)``.

    spherical: of unit queries and keys, the kernel that SLAY approximates. causal: the last query sees the last key.
    seen: boolean, broadcastable to ``(batch, heads, N, M)``. A row with nothing to see, or whose kernel is zero
    everywhere, is zero.
    """
    work, heads = accumulation_dtype(query.dtype), query.shape[1]
    q, k, v = query.to(work), expand_groups(key, heads).to(work), expand_groups(value, heads).to(work)
    if spherical:
        q, k = unit_vectors(q), unit_vectors(k)
        kernel = spherical_yat(q @ k.transpose(-1, -2), eps)
    else:
        kernel = yat_kernel(q, k, eps)
    if causal:
        kernel = kernel.tril(k.shape[2] - q.shape[2])
    if seen is not None:
        kernel = kernel.masked_fill(~seen, 0)
    total = kernel.sum(-1, keepdim=True)
    return (kernel / torch.where(total == 0, 1, total) @ v).to(query.dtype)


def quadrature(num_nodes: int = 3, eps: float = 1e-3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes ``s_r = t_r / C`` and weights ``w_r = alpha_r / C`` of Gauss and Laguerre."""
    # Golub and Welsch: eigenvalues of the Jacobi matrix of Laguerre polynomials, first entries of its eigenvectors.
    place = torch.arange(num_nodes, dtype=torch.float64)
    jacobi = torch.diag(2 * place + 1) + torch.diag(place[1:], 1) + torch.diag(place[1:], -1)
    points, vectors = torch.linalg.eigh(jacobi)
    total = 2 + eps
    return tuple((points / total).tolist()), tuple((vectors[0].square() / total).tolist())


def quadrature_kernel(cosine: Tensor, num_nodes: int = 3, eps: float = 1e-3) -> Tensor:
    """``sum_r w_r c^2 exp(2 s_r c)``: what the features approach with ever more of them."""
    parts = [w * (2 * s * cosine).exp() for s, w in zip(*quadrature(num_nodes, eps), strict=True)]
    return cosine.square() * torch.stack(parts).sum(0)


def draw_projections(
    poly: str, dim: int, num_poly: int, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """What the map of degree two needs at random (float64), in the order that :func:`slay_features` takes it.

    ``"anchor"``: unit anchors ``(P, d)``. ``"nystrom"``: those, and ``(K + ridge)^(-1/2)`` of their kernel ``K_ij =
    (a_i . a_j)^2``. ``"maclaurin"``: two matrices of signs ``(P, d)``. ``"tensorsketch"``: two one-hot matrices with
    signs ``(P, d)`` that fold ``d`` channels into ``P``. Others: nothing.
    """
    if poly not in POLYNOMIALS:
        raise OptionError(f"poly is one of {', '.join(POLYNOMIALS)}; got {poly!r}.")

    def signs(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).double() * 2 - 1

    if poly in ("anchor", "nystrom"):
        anchors = unit_vectors(torch.randn(num_poly, dim, generator=generator, dtype=torch.float64))
        if poly == "anchor":
            return (anchors,)
        values, vectors = torch.linalg.eigh((anchors @ anchors.T).square())
        return anchors, vectors * (values + _RIDGE).rsqrt() @ vectors.T
    if poly == "maclaurin":
        return signs(num_poly, dim), signs(num_poly, dim)
    if poly == "tensorsketch":
        places = torch.randint(num_poly, (2, dim), generator=generator)
        folds = torch.nn.functional.one_hot(places, num_poly).double() * signs(2, dim, 1)
        return folds[0].T.contiguous(), folds[1].T.contiguous()
    return ()


def _poly(x: Tensor, poly: str, projections: tuple[Tensor, ...]) -> Tensor:
    """Features of degree two of unit vectors, ``(..., N, P)``."""
    if poly == "exact":
        return (x[..., :, None] * x[..., None, :]).flatten(-2)
    maps = [x @ projection.to(x.dtype).T for projection in projections[: 1 if poly == "nystrom" else 2]]
    if poly == "anchor":
        return maps[0].square() * len(projections[0]) ** -0.5
    if poly == "nystrom":
        return maps[0].square() @ projections[1].to(x.dtype)
    if poly == "maclaurin":
        return maps[0] * maps[1] * len(projections[0]) ** -0.5
    # The sketch of x (x) x is the circular convolution of two sketches of x.
    first, second = (torch.fft.rfft(sketch) for sketch in maps)
    return torch.fft.irfft(first * second, n=maps[0].shape[-1])


def slay_features(
    x: Tensor,
    omega: Tensor,
    nodes: tuple[float, ...],
    weights: tuple[float, ...],
    poly: str = "anchor",
    projections: tuple[Tensor, ...] = (),
) -> Tensor:
    """``Psi`` of ``x (batch, heads, N, d)``, of which only the directions count: ``(batch, heads, N, R, P, M)``.

    omega: standard normal ``(R, heads | 1, d, M)``. nodes, weights: of :func:`quadrature`. poly, projections: the map
    of degree two and what :func:`draw_projections` gave for it. ``P`` is ``d^2`` for ``"exact"`` and 1 for ``"none"``
    and ``"hadamard"``.
    """
    if poly not in POLYNOMIALS:
        raise OptionError(f"poly is one of {', '.join(POLYNOMIALS)}; got {poly!r}.")
    if omega.dim() != 4 or len(omega) != len(nodes) or omega.shape[2] != x.shape[-1]:
        raise ShapeError(f"omega is (nodes, heads | 1, {x.shape[-1]}, M) for this input, got {tuple(omega.shape)}.")
    unit = unit_vectors(x)
    # A zero vector has no direction and no features, whatever exp of nothing is.
    present = (unit != 0).any(-1, keepdim=True)
    omega = omega.to(unit.dtype)
    parts = []
    for noise, node, weight in zip(omega, nodes, weights, strict=True):
        random = positive_random_features(unit * math.sqrt(2 * node), noise, _LIMIT) * math.sqrt(weight)
        if poly == "hadamard":
            random = random * (unit @ noise).square() * noise.shape[-1] ** -0.5
        parts.append(random * present)
    features = torch.stack(parts, -2)[..., None, :]
    if poly in ("none", "hadamard"):
        return features
    return _poly(unit, poly, projections)[..., None, :, None] * features


def slay_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_nodes: int = 3,
    num_features: int = 16,
    num_poly: int = 8,
    eps: float = 1e-3,
    poly: str = "anchor",
    causal: bool = True,
    chunk_size: int = 256,
    resample: bool = False,
    *,
    delta: float = 1e-6,
) -> Tensor:
    """query ``(batch, heads, N, d)``, key and value ``(batch, kv_heads, M, ...)`` to ``(batch, heads, N, d_v)``.

    num_nodes R, num_features M, num_poly P: features of each kind. resample: draw them anew (from torch's generator)
    instead of the same at every call. delta: added to the denominator.
    """
    _check(num_nodes, num_features, num_poly, eps, poly, delta)
    generator = None if resample else torch.Generator().manual_seed(0)
    heads, dim = query.shape[1], query.shape[-1]
    omega = torch.randn(num_nodes, heads, dim, num_features, generator=generator, dtype=torch.float64).to(query.device)
    projections = tuple(t.to(query.device) for t in draw_projections(poly, dim, num_poly, generator))
    nodes, weights = quadrature(num_nodes, eps)
    q, k = (
        slay_features(x, omega, nodes, weights, poly, projections).flatten(3)
        for x in (query, expand_groups(key, heads))
    )
    out, _ = linear_attention(q, k, value, causal=causal, normalize=True, eps=delta, chunk_size=chunk_size)
    return out.to(query.dtype)


class _Frozen(nn.Module):
    """The random parts of the features, kept in the state dict."""

    def __init__(self, omega: Tensor, projections: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.omega: Tensor
        self.register_buffer("omega", omega)
        self.count = len(projections)
        for index, projection in enumerate(projections):
            self.register_buffer(f"projection{index}", projection)

    @property
    def projections(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"projection{index}") for index in range(self.count))


@register("slay")
class Slay(LinearMechanism):
    """SLAY on (query, key, value). Its random features are drawn when it is built, for ``num_heads`` query heads.

    num_nodes (R), num_features (M), num_poly (P): as in the paper. eps: of the kernel. poly: the map of degree two.
    delta: added to the denominator. chunk_size: tokens at once. resample: draw features anew before every training
    forward pass, so that no model fits one draw.
    """

    def __init__(
        self,
        num_nodes: int = 3,
        num_features: int = 16,
        num_poly: int = 8,
        eps: float = 1e-3,
        poly: str = "anchor",
        delta: float = 1e-6,
        chunk_size: int = 256,
        resample: bool = False,
        num_heads: int = 1,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        _check(num_nodes, num_features, num_poly, eps, poly, delta)
        self.num_nodes, self.num_features, self.num_poly = num_nodes, num_features, num_poly
        self.eps, self.poly, self.delta = eps, poly, delta
        self.chunk_size, self.resample, self.normalizer_eps = chunk_size, resample, delta
        self.num_heads, self.head_dim = num_heads, head_dim
        self.quadrature = quadrature(num_nodes, eps)
        self.frozen = _Frozen(*self._draw())

    def extra_repr(self) -> str:
        return (
            f"num_nodes={self.num_nodes}, num_features={self.num_features}, num_poly={self.num_poly}, eps={self.eps}, "
            f"poly={self.poly!r}"
        )

    def _draw(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        shape = (self.num_nodes, self.num_heads, self.head_dim, self.num_features)
        projections = draw_projections(self.poly, self.head_dim, self.num_poly)
        kind = torch.get_default_dtype()
        return torch.randn(shape), tuple(projection.to(kind) for projection in projections)

    @torch.no_grad()
    def redraw(self) -> None:
        """New random features, from torch's generator. A decoding state holds sums of the old ones."""
        omega, projections = self._draw()
        for old, new in zip(self.frozen.buffers(), (omega, *projections), strict=True):
            old.copy_(new)

    def features(self, x: Tensor) -> Tensor:
        """``(batch, num_heads, N, R P M)`` of queries or keys ``(batch, num_heads, N, head_dim)``."""
        if x.shape[1] != self.num_heads or x.shape[-1] != self.head_dim:
            raise ShapeError(
                f"This SLAY was built for {self.num_heads} heads of {self.head_dim} channels and got {x.shape[1]} of "
                f"{x.shape[-1]}; build it with num_heads={x.shape[1]}, head_dim={x.shape[-1]}."
            )
        frozen = self.frozen
        return slay_features(x, frozen.omega, *self.quadrature, self.poly, frozen.projections).flatten(3)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        if self.resample and self.training:
            self.redraw()
        return super().attend(query, key, value, request)

    def map_features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(query), self.features(expand_groups(key, query.shape[1]))

    def feature_dim(self, head_dim: int) -> int:
        wide = {"none": 1, "hadamard": 1, "exact": head_dim**2}.get(self.poly, self.num_poly)
        return self.num_nodes * wide * self.num_features


@register("yat_attention")
class YatAttention(Mechanism):
    """Exact Yat attention, quadratic in length. eps: of the kernel. spherical: of directions alone, as SLAY takes it;
    otherwise ``scale`` multiplies the queries."""

    needs_training = True

    def __init__(self, eps: float = 1e-3, spherical: bool = True) -> None:
        super().__init__()
        if not eps > 0:
            raise OptionError(f"eps is above 0, got {eps}.")
        self.eps, self.spherical = eps, spherical

    def extra_repr(self) -> str:
        return f"eps={self.eps}, spherical={self.spherical}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        visible = request.visible
        seen = None if visible is None else visible.dense(query.shape[2], key.shape[2], query.device)
        query = query if request.scale is None else query * request.scale
        return yat_attention(query, key, value, self.eps, spherical=self.spherical, seen=seen)


def _check(num_nodes: int, num_features: int, num_poly: int, eps: float, poly: str, delta: float) -> None:
    if min(num_nodes, num_features, num_poly) < 1:
        raise OptionError(
            f"num_nodes, num_features and num_poly are at least 1; got {num_nodes}, {num_features}, {num_poly}."
        )
    if not eps > 0 or delta < 0:
        raise OptionError(f"Need eps > 0 and delta >= 0; got {eps} and {delta}.")
    if poly not in POLYNOMIALS:
        raise OptionError(f"poly is one of {', '.join(POLYNOMIALS)}; got {poly!r}.")
