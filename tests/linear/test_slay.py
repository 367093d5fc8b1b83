from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.layers.feature_maps import positive_random_features
from regard.linear.slay import (
    Slay,
    YatAttention,
    draw_projections,
    quadrature,
    quadrature_kernel,
    slay_attention,
    slay_features,
    spherical_yat,
    yat_attention,
    yat_kernel,
)
from regard.masks import Causal, SlidingWindow

POSITIVE = ("anchor", "exact", "none", "hadamard")
SIGNED = ("maclaurin", "nystrom", "tensorsketch")


def draw(n: int = 41, d: int = 6, dv: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, 3, n, size, generator=generator, dtype=torch.float64) for size in (d, d, dv))
    return query, key, value


def units(count: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(
        torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def build(poly: str = "anchor", **options: object) -> Slay:
    torch.manual_seed(0)
    return Slay(poly=poly, num_heads=3, head_dim=6, **options).double()  # type: ignore[arg-type]


@pytest.mark.paper("slay")
def test_kernels() -> None:
    """The definition pair by pair; on the sphere it depends on the cosine alone and is at most 1 / eps."""
    query, key, _ = (t[0, 0] for t in draw(7))
    table = yat_kernel(query, key, 0.3)
    for i in range(7):
        for j in range(7):
            wanted = (query[i] @ key[j]) ** 2 / ((query[i] - key[j]).square().sum() + 0.3)
            assert float(table[i, j]) == pytest.approx(float(wanted), rel=1e-12)
    x, y = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    torch.testing.assert_close(spherical_yat(x @ y.T, 0.3), yat_kernel(x, y, 0.3), rtol=1e-12, atol=0)
    cosine = torch.linspace(-1, 1, 101, dtype=torch.float64)
    values = spherical_yat(cosine, 1e-3)
    assert float(values.max()) == float(values[-1]) == pytest.approx(1000) and float(values.min()) >= 0
    # Positive definite: no negative eigenvalue on the sphere.
    points = units(60, 5)
    assert float(torch.linalg.eigvalsh(spherical_yat(points @ points.T, 0.1)).min()) > -1e-9


@pytest.mark.paper("slay")
@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention(causal: bool) -> None:
    query, key, value = draw(11)
    out = yat_attention(query, key, value, 0.05, causal)
    for i in range(11):
        seen = i + 1 if causal else 11
        cosine = F.cosine_similarity(query[:, :, i : i + 1], key[:, :, :seen], dim=-1)
        weights = cosine**2 / (2.05 - 2 * cosine)
        wanted = (weights / weights.sum(-1, keepdim=True))[:, :, None] @ value[:, :, :seen]
        torch.testing.assert_close(out[:, :, i : i + 1], wanted, rtol=0, atol=1e-12)
    module = YatAttention(0.05)
    torch.testing.assert_close(module(query, key, value, causal=causal), out, rtol=0, atol=1e-14)
    banded = module.weights(query, key, mask=SlidingWindow(3) & Causal())
    assert not bool(banded.tril(-3).any()) and not bool(banded.triu(1).any())
    plain = YatAttention(0.05, spherical=False).weights(query, key)
    kernel = yat_kernel(query, key, 0.05)
    torch.testing.assert_close(plain, kernel / kernel.sum(-1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.paper("slay")
def test_random_features_have_the_mean_exp() -> None:
    """Within three standard errors, for each node: 4 x 4 unit vectors, 100 000 features."""
    x, y = units(4, 6, 1), units(4, 6, 2)
    omega = torch.randn(6, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for node in quadrature(2, 1.0)[0]:
        left, right = (positive_random_features(t * math.sqrt(2 * node), omega) for t in (x, y))
        products = left[:, None] * right[None] * omega.shape[1]
        error = (products.mean(-1) - (2 * node * x @ y.T).exp()).abs()
        assert bool((error <= 3 * products.std(-1) / omega.shape[1] ** 0.5).all())


@pytest.mark.paper("slay")
@pytest.mark.parametrize("nodes", [1, 3])
def test_without_random_features_it_is_the_quadrature_kernel(nodes: int) -> None:
    """The exact map of degree two and the exponential itself, node by node, against attention by the kernel of
    numpy's Gauss-Laguerre rule; and many features come near it."""
    import numpy as np

    query, key, value = draw(23, d=4)
    cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-1, -2)
    points, alphas = np.polynomial.laguerre.laggauss(nodes)
    kernel = sum(
        (float(a) / 2.5 * cosine**2 * (2 * float(t) / 2.5 * cosine).exp() for t, a in zip(points, alphas, strict=True)),
        torch.zeros((), dtype=torch.float64),
    )
    torch.testing.assert_close(quadrature_kernel(cosine, nodes, 0.5), kernel, rtol=0, atol=1e-12)
    rule = quadrature(nodes, 0.5)
    silent = torch.zeros(nodes, 1, 4, 1, dtype=torch.float64)
    # With omega = 0 a node's random feature is exp(-s): what remains of Psi is the map of degree two.
    left, right = (slay_features(t, silent, *rule, "exact") for t in (query, key))
    assert left.shape == (2, 3, 23, nodes, 16, 1)
    exps = torch.stack([(2 * s * cosine + 2 * s).exp() for s in rule[0]])
    rebuilt = torch.einsum("bhirpm,bhjrpm,rbhij->bhij", left, right, exps)
    torch.testing.assert_close(rebuilt, kernel, rtol=0, atol=1e-12)
    wanted = kernel / kernel.sum(-1, keepdim=True) @ value
    if nodes == 1:  # at more nodes the features' variance asks for too many of them
        near = slay_attention(query, key, value, 1, 4000, 1, 0.5, "exact", causal=False)
        assert float((near - wanted).norm() / wanted.norm()) < 0.15


@pytest.mark.paper("slay")
@pytest.mark.parametrize(
    ("eps", "errors"), [(1.0, {1: 0.27, 2: 0.060, 4: 0.0026}), (1e-3, {1: 0.75, 2: 0.54, 4: 0.26})]
)
def test_quadrature_error(eps: float, errors: dict[int, float]) -> None:
    cosine = torch.linspace(-1, 0.9, 2000, dtype=torch.float64)
    exact = spherical_yat(cosine, eps)
    for nodes, wanted in errors.items():
        found = ((quadrature_kernel(cosine, nodes, eps) - exact).abs() / exact).max()
        assert float(found) == pytest.approx(wanted, rel=0.02)


@pytest.mark.paper("slay")
def test_anchors_are_affine_in_the_squared_cosine() -> None:
    d, count = 5, 400_000
    x, y = units(6, d, 1), units(6, d, 2)
    (anchors,) = draw_projections("anchor", d, count, torch.Generator().manual_seed(0))
    torch.testing.assert_close(anchors.norm(dim=-1), torch.ones(count, dtype=torch.float64))
    products = (x @ anchors.T).square()[:, None] * (y @ anchors.T).square()[None] * d * (d + 2)
    error = (products.mean(-1) - 1 - 2 * (x @ y.T) ** 2).abs()
    assert bool((error <= 3.5 * products.std(-1) / count**0.5).all())
    # The features are these products.
    silent = torch.zeros(1, 1, d, 1, dtype=torch.float64)
    left, right = (
        slay_features(t[None, None], silent, (0.0,), (1.0,), "anchor", (anchors[:50],))[0, 0].flatten(1) for t in (x, y)
    )
    torch.testing.assert_close(left @ right.T * d * (d + 2), products[..., :50].mean(-1), rtol=0, atol=1e-10)


@pytest.mark.paper("slay")
@pytest.mark.parametrize("poly", ["maclaurin", "tensorsketch"])
def test_signed_maps_have_the_mean_of_the_squared_cosine(poly: str) -> None:
    x, y = units(5, 6, 1)[None, None], units(5, 6, 2)[None, None]
    generator, silent = torch.Generator().manual_seed(0), torch.zeros(1, 1, 6, 1, dtype=torch.float64)
    found = []
    for _ in range(600):
        projections = draw_projections(poly, 6, 16, generator)
        left, right = (slay_features(t, silent, (0.0,), (1.0,), poly, projections)[0, 0].flatten(1) for t in (x, y))
        found.append(left @ right.T)
    draws = torch.stack(found)
    wanted = (x @ y.transpose(-1, -2))[0, 0] ** 2
    assert bool(((draws.mean(0) - wanted).abs() <= 3.5 * draws.std(0) / 600**0.5).all())


@pytest.mark.paper("slay")
def test_nystrom_is_exact_with_enough_anchors() -> None:
    """The kernel c^2 has rank d (d + 1) / 2: so many anchors span it, but for the ridge."""
    x = units(20, 4)[None, None]
    projections = draw_projections("nystrom", 4, 40, torch.Generator().manual_seed(0))
    silent = torch.zeros(1, 1, 4, 1, dtype=torch.float64)
    features = slay_features(x, silent, (0.0,), (1.0,), "nystrom", projections)[0, 0].flatten(1)
    torch.testing.assert_close(features @ features.T, (x @ x.transpose(-1, -2))[0, 0] ** 2, rtol=0, atol=5e-3)


@pytest.mark.paper("slay")
@pytest.mark.parametrize("poly", POSITIVE)
def test_rows_are_distributions(poly: str) -> None:
    query, key, _ = draw()
    for causal in (False, True):
        weights = build(poly, delta=0.0).weights(query, key, causal=causal)
        assert bool((weights >= -1e-15).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-10)
    exact = yat_attention(query, key, torch.eye(41, dtype=torch.float64).expand(2, 3, -1, -1))
    assert bool((exact >= 0).all())
    torch.testing.assert_close(exact.sum(-1), torch.ones_like(exact[..., 0]), rtol=0, atol=1e-12)


@pytest.mark.paper("slay")
@pytest.mark.parametrize("poly", SIGNED)
def test_signed_maps_can_be_negative(poly: str) -> None:
    """Which is why no positivity is claimed for them, Nystrom's included."""
    query, key, _ = draw()
    least = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        features = [Slay(poly=poly, num_poly=4, num_heads=3, head_dim=6).double().features(x) for x in (query, key)]
        least = min(least, float((features[0] @ features[1].transpose(-1, -2)).min()))
    assert least < -1e-4


@pytest.mark.paper("slay")
@pytest.mark.parametrize("poly", POSITIVE + SIGNED)
def test_only_directions_count(poly: str) -> None:
    query, key, value = draw()
    module = build(poly)
    sizes = torch.rand(2, 3, 41, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 5 + 0.1
    before = module(query, key, value)
    torch.testing.assert_close(module(sizes * query, 3 * key / sizes, value), before, rtol=1e-7, atol=1e-9)
    assert float((module(-query, key, value) - before).abs().max()) > 1e-6 or poly == "exact"


@pytest.mark.paper("slay")
@pytest.mark.parametrize("poly", POSITIVE)
def test_no_leak_and_chunks_change_nothing(poly: str) -> None:
    query, key, value = draw()
    module = build(poly, chunk_size=8)
    before = module(query, key, value, causal=True)
    later = [torch.cat((t[:, :, :20], torch.randn_like(t[:, :, 20:])), 2) for t in (query, key, value)]
    after = module(*later, causal=True)
    torch.testing.assert_close(after[:, :, :20], before[:, :, :20], rtol=0, atol=1e-12)
    assert float((after - before)[:, :, 20:].abs().max()) > 1e-3
    left, right = module.features(query), module.features(key)
    kernel = (left @ right.transpose(-1, -2)).tril()
    dense = kernel @ value / (kernel.sum(-1, keepdim=True) + module.delta)
    torch.testing.assert_close(before, dense, rtol=0, atol=1e-12)
    once = slay_attention(query, key, value, chunk_size=16, poly=poly)
    for chunk in (1, 41, 256):
        other = slay_attention(query, key, value, chunk_size=chunk, poly=poly)
        torch.testing.assert_close(other, once, rtol=0, atol=1e-10)


@pytest.mark.paper("slay")
def test_ablations() -> None:
    """Laplace only leaves c^2 out; Hadamard is the product of both features of one omega, place by place."""
    x, y = units(4, 6, 1)[None, None], units(4, 6, 2)[None, None]
    omega = torch.randn(2, 1, 6, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = quadrature(2, 1.0)
    cosine = (x @ y.transpose(-1, -2))[0, 0]
    left, right = (slay_features(t, omega, *rule, "none")[0, 0].flatten(1) for t in (x, y))
    wanted = quadrature_kernel(cosine, 2, 1.0) / cosine**2
    torch.testing.assert_close(left @ right.T, wanted, rtol=0.05, atol=0)
    few = omega[..., :7]
    mixed = slay_features(x, few, *rule, "hadamard")[0, 0, :, :, 0]
    plain = slay_features(x, few, *rule, "none")[0, 0, :, :, 0]
    torch.testing.assert_close(mixed, plain * (x @ few[:, 0, None]).permute(1, 2, 0, 3)[0].square() / 7**0.5)


@pytest.mark.paper("slay")
def test_resampling() -> None:
    query, key, value = draw()
    fixed, fresh = build(), build(resample=True)
    assert torch.equal(fixed(query, key, value), fixed(query, key, value))
    assert not torch.equal(fresh(query, key, value), fresh(query, key, value))
    fresh.eval()
    assert torch.equal(fresh(query, key, value), fresh(query, key, value))
    assert torch.equal(slay_attention(query, key, value), slay_attention(query, key, value))
    once, twice = (slay_attention(query, key, value, resample=True) for _ in range(2))
    assert not torch.equal(once, twice)


@pytest.mark.paper("slay")
def test_decoding_resumes_from_a_prompt() -> None:
    query, key, value = draw()
    module = build(chunk_size=16)
    whole = module(query, key, value, causal=True)
    out, kept = module.step(query[:, :, :30], key[:, :, :30], value[:, :, :30], module.init_state(2, like=query))
    torch.testing.assert_close(out, whole[:, :, :30], rtol=0, atol=1e-11)
    assert kept.running is not None and kept.running.sum.shape == (2, 3, 3 * 8 * 16, 6)
    for _ in range(2):
        state = kept
        for t in range(30, 41):
            token = (x[:, :, t : t + 1] for x in (query, key, value))
            out, state = module.step(*token, state)  # type: ignore[assignment]
            torch.testing.assert_close(out, whole[:, :, t : t + 1], rtol=0, atol=1e-11)


def test_teaching_errors() -> None:
    query, key, value = draw(5)
    with pytest.raises(OptionError, match="tensorsketch"):
        Slay(poly="sketch")
    with pytest.raises(OptionError, match="eps"):
        YatAttention(eps=0.0)
    with pytest.raises(OptionError, match="at least 1"):
        Slay(num_nodes=0)
    with pytest.raises(OptionError, match="delta"):
        Slay(delta=-1.0)
    with pytest.raises(ShapeError, match="head_dim=6"):
        Slay(num_heads=4, head_dim=8).double()(query, key, value)
    with pytest.raises(ShapeError, match="omega"):
        slay_features(query, torch.zeros(2, 1, 5, 3), (0.1, 0.2), (0.5, 0.5))
