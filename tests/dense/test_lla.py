"""Local linear attention against the regression that defines it, its two limits, and each of its forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.bench import regression_maps as maps
from regard.dense.lla import LocalLinearAttention, flash_lla, local_linear_attention
from regard.errors import OptionError, ShapeError
from regard.kernels import scored
from regard.kernels.conjugate import conjugate_gradient
from regard.kernels.local_linear import lla_cg_solve, local_linear_weights, pairwise_centered_matvec
from regard.layers.norms import srms_norm
from regard.masks import KeyPadding
from regard.nn import MultiHeadAttention


def tensors(length: int = 14, dim: int = 4, value_dim: int = 3, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + dim)
    shapes = ((1, heads, length, dim), (1, heads, length, dim), (1, heads, length, value_dim))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def softmax_map(query: Tensor, key: Tensor, causal: bool, bandwidth: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) / bandwidth
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1)


def published(query: Tensor, key: Tensor, value: Tensor, causal: bool, ridge: float) -> tuple[Tensor, Tensor]:
    """Output and weights for each query in a loop: covariances around the query and the paper's quotient."""
    dim = query.shape[-1]
    p = softmax_map(query, key, causal, math.sqrt(dim))
    weights = torch.zeros_like(p)
    for h in range(query.shape[1]):
        for i in range(query.shape[2]):
            z = key[0, h] - query[0, h, i]
            mu = p[0, h, i] @ z
            sigma = z.T @ (p[0, h, i][:, None] * z) + ridge * torch.eye(dim, dtype=torch.float64)
            rho = torch.linalg.solve(sigma, mu)
            weights[0, h, i] = p[0, h, i] * (1 - z @ rho) / (1 - mu @ rho)
    return weights @ value, weights


@pytest.mark.paper("lla")
@pytest.mark.parametrize("causal", [False, True])
def test_the_published_formula(causal: bool) -> None:
    query, key, value = tensors()
    out, weights = published(query, key, value, causal, 0.05)
    for solver in ("dense", "cg"):
        ours = local_linear_attention(query, key, value, causal, ridge=0.05, solver=solver)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, out)
    mechanism = LocalLinearAttention(ridge=0.05, normalize=False).double()
    torch.testing.assert_close(mechanism.weights(query, key, causal=causal), weights, rtol=1e-6, atol=1e-7)


@pytest.mark.paper("lla")
def test_it_is_weighted_ridge_regression_around_the_query() -> None:
    """The minimum of the objective over intercept and slopes, from its normal equations as one system."""
    query, key, value = tensors(length=9)
    p, ridge = softmax_map(query, key, False, 2.0)[0, 0, 4], 0.3
    design = torch.cat((torch.ones(9, 1, dtype=torch.float64), key[0, 0] - query[0, 0, 4]), 1)
    penalty = ridge * torch.diag(torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64))
    fit = torch.linalg.solve(design.T @ (p[:, None] * design) + penalty, design.T @ (p[:, None] * value[0, 0]))
    out = local_linear_attention(query, key, value, causal=False, ridge=ridge)
    torch.testing.assert_close(out[0, 0, 4], fit[0])


@pytest.mark.paper("lla")
@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_a_large_ridge_is_softmax_attention(solver: str) -> None:
    query, key, value = tensors()
    out = local_linear_attention(query, key, value, ridge=1e14, solver=solver)  # type: ignore[arg-type]
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-10)


@pytest.mark.paper("lla")
def test_affine_values_come_back_exactly() -> None:
    query, key, _ = tensors(length=20)
    generator = torch.Generator().manual_seed(3)
    matrix, offset = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (3,)))
    out = local_linear_attention(query, key, key @ matrix + offset, ridge=1e-11)
    wanted = query @ matrix + offset
    # Five keys in general position fix an affine map of four dimensions.
    torch.testing.assert_close(out[:, :, 4:], wanted[:, :, 4:], rtol=0, atol=1e-5)
    assert float((out - wanted)[:, :, :4].abs().amax((1, 3)).min()) > 1e-2
    plain = local_linear_attention(query, key, key @ matrix + offset, ridge=1e14)
    assert float((plain - wanted)[:, :, 4:].abs().mean()) > 0.1


@pytest.mark.paper("lla")
def test_equal_weights_without_ridge_are_least_squares() -> None:
    query, key, value = tensors(length=20)
    out = local_linear_attention(query, key, value, causal=False, bandwidth=math.inf, ridge=1e-12)
    ones = torch.ones(1, 2, 20, 1, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat((key, ones), -1), value).solution
    torch.testing.assert_close(out, torch.cat((query, ones), -1) @ fit, rtol=0, atol=1e-9)


@pytest.mark.paper("lla")
def test_rows_sum_to_one_and_the_first_token_is_its_value() -> None:
    query, key, value = tensors()
    mechanism = LocalLinearAttention(normalize=False).double()
    weights = mechanism.weights(query, key, causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert float(weights.detach().min()) < -0.01
    assert not bool(weights.triu(1).any())
    torch.testing.assert_close(local_linear_attention(query, key, value)[:, :, 0], value[:, :, 0])


@pytest.mark.paper("lla")
def test_causal_means_causal() -> None:
    query, key, value = tensors()
    before = local_linear_attention(query, key, value)
    key[:, :, 8:], value[:, :, 8:] = 7.0, -3.0
    torch.testing.assert_close(local_linear_attention(query, key, value)[:, :, :8], before[:, :, :8], rtol=0, atol=0)


@pytest.mark.paper("lla")
@pytest.mark.parametrize("causal", [False, True])
def test_conjugate_gradients_equal_the_dense_solve(causal: bool) -> None:
    query, key, value = tensors(length=30, dim=8)
    query, key = srms_norm(query), srms_norm(key)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    dense, cg = (local_linear_attention(*leaves, causal, solver=s) for s in ("dense", "cg"))  # type: ignore[arg-type,misc]
    torch.testing.assert_close(cg, dense, rtol=0, atol=1e-10)
    seed = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(out, leaves, seed) for out in (cg, dense)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    # In as many steps as there are dimensions, where rounding does not get in the way.
    exact = local_linear_attention(query, key, value, causal, ridge=1.0)
    steps = local_linear_attention(query, key, value, causal, ridge=1.0, solver="cg", cg_iterations=8)
    torch.testing.assert_close(steps, exact, rtol=0, atol=1e-10)


@pytest.mark.paper("lla")
def test_the_primitives_equal_what_they_do_not_form() -> None:
    query, key, _ = tensors(length=9)
    p, x = softmax_map(query, key, False, 2.0), torch.randn_like(query)
    z = key[:, :, None] - query[:, :, :, None]
    torch.testing.assert_close(pairwise_centered_matvec(x, key, query), (z * x[:, :, :, None]).sum(-1))
    sigma = torch.einsum("bhij,bhijd,bhije->bhide", p, z, z) + 0.2 * torch.eye(4, dtype=torch.float64)
    mu = torch.einsum("bhij,bhijd->bhid", p, z)
    torch.testing.assert_close(lla_cg_solve(p, key, query, mu, 0.2), torch.linalg.solve(sigma, mu))


@pytest.mark.paper("lla")
def test_constants_and_linear_maps_of_the_values_pass_through() -> None:
    query, key, value = tensors()
    out = local_linear_attention(query, key, value)
    offset, matrix = torch.tensor([3.0, -1, 2]).double(), torch.tensor([[1.0, 2], [0, -1], [4, 1]]).double()
    torch.testing.assert_close(local_linear_attention(query, key, value + offset), out + offset)
    torch.testing.assert_close(local_linear_attention(query, key, value @ matrix), out @ matrix)


@pytest.mark.paper("lla")
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_equal_the_whole(causal: bool) -> None:
    query, key, value = tensors(length=23)
    mask = KeyPadding((torch.arange(23) != 5)[None])
    for kernel in ("dot", "rbf"):
        whole = local_linear_attention(query, key, value, causal, mask, kernel=kernel)  # type: ignore[arg-type]
        blocks = flash_lla(query, key, value, causal, mask, kernel=kernel, block_q=7, block_k=5)  # type: ignore[arg-type]
        torch.testing.assert_close(blocks, whole)
    hidden = flash_lla(query, key, value, causal, KeyPadding(torch.zeros(1, 23, dtype=torch.bool)))
    assert not bool(hidden.any())


class _Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.paper("lla")
def test_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "_TILE", 1 << 18)

    def largest(length: int, solver: str) -> int:
        query, key, value = (t.float().requires_grad_() for t in tensors(length, heads=1))
        with _Largest() as made:
            out = local_linear_attention(query, key, value, solver=solver, cg_iterations=2)  # type: ignore[arg-type]
            out.sum().backward()
        return made.numbers

    for solver in ("dense", "cg"):
        assert largest(800, solver) <= 1.3 * largest(400, solver) < 800 * 800 / 4
    query, key, value = (t.float() for t in tensors(400, heads=1))
    with _Largest() as made:
        flash_lla(query, key, value, cg_iterations=1, block_q=100, block_k=100)
    assert made.numbers <= 100 * 100


@pytest.mark.paper("lla")
def test_rbf_weights_are_dot_weights_of_keys_of_one_norm() -> None:
    query, key, value = tensors()
    key = srms_norm(key)
    rbf, dot = (local_linear_attention(query, key, value, kernel=kernel) for kernel in ("rbf", "dot"))  # type: ignore[arg-type]
    torch.testing.assert_close(rbf, dot)
    shifted = local_linear_attention(query + 1, tensors()[1] + 1, value, kernel="rbf")
    torch.testing.assert_close(shifted, local_linear_attention(query, tensors()[1], value, kernel="rbf"))


@pytest.mark.paper("lla")
def test_the_gradient_of_the_weights_and_of_the_ridge() -> None:
    query, key, value = (t[..., :6, :].clone().requires_grad_() for t in tensors())
    ridge = torch.tensor([0.05, 0.4], dtype=torch.float64, requires_grad=True)

    def run(query: Tensor, key: Tensor, value: Tensor, ridge: Tensor) -> Tensor:
        return local_linear_attention(query, key, value, ridge=ridge)

    assert torch.autograd.gradcheck(run, (query, key, value, ridge), fast_mode=True)


@pytest.mark.paper("lla")
def test_one_sharp_key_keeps_the_digits_of_float32() -> None:
    """Where one key has nearly all weight the slope is steep, and its products with that key must cancel."""
    query, key, _ = tensors(length=40, dim=8)
    p = softmax_map(query, key, False, 0.3).float()
    query, key = query.float(), key.float()
    exact = local_linear_weights(p.double(), query.double(), key.double(), torch.tensor(1e-2).double())
    coarse = local_linear_weights(p, query, key, torch.tensor(1e-2)).double()
    assert float(p.amax(-1).max()) > 0.999
    assert float((coarse - exact).abs().max() / exact.abs().max()) < 2e-6


@pytest.mark.paper("lla")
def test_each_head_learns_its_ridge() -> None:
    host = MultiHeadAttention(32, 4, "lla", rotary=True, ridge=0.02).double()
    mechanism = host.mechanism
    assert isinstance(mechanism, LocalLinearAttention)
    torch.testing.assert_close(mechanism.ridge, torch.full((4,), 0.02, dtype=torch.float64))
    host(torch.randn(2, 10, 32, dtype=torch.float64), causal=True).square().sum().backward()
    assert mechanism.raw_ridge.grad is not None
    assert bool((mechanism.raw_ridge.grad != 0).all())
    query, key, value = tensors()
    one = LocalLinearAttention().double()
    plain = local_linear_attention(srms_norm(query), srms_norm(key), value, ridge=one.ridge)
    torch.testing.assert_close(one(3 * query, key / 7, value, causal=True), plain)


@pytest.mark.paper("lla")
def test_conjugate_gradients_stand_still_when_solved() -> None:
    matrix = torch.tensor([[2.0, 1], [1, 3]]).double()
    right = torch.tensor([[1.0, 2], [0, 0]]).double()
    found = conjugate_gradient(lambda x: x @ matrix, right, 50)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right.T).T)


@pytest.mark.paper("lla")
def test_a_smooth_map_is_estimated_better_than_by_softmax() -> None:
    sample = maps.smooth_map(4, torch.Generator().manual_seed(5), pairs=256, queries=64)
    found = maps.test_time_regression(sample, [2.0**-k for k in range(3, 9)])
    assert found["lla"][0] <= 0.6 * found["softmax"][0]
    assert found["softmax"][0] < found["global_linear"][0]


@pytest.mark.paper("lla")
def test_tasks_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    drift = maps.piecewise_affine_drift(2, generator, pairs=40, segments=2, noise=0.0)
    ones = torch.ones(2, 20, 1)
    design = torch.cat((drift.key[:, 20:], ones), -1)
    torch.testing.assert_close(design @ torch.linalg.lstsq(design, drift.value[:, 20:]).solution, drift.value[:, 20:])
    assert drift.sequential
    recall = maps.associative_recall(2, generator, noise=0.0)
    torch.testing.assert_close(recall.query, recall.key)
    linear = maps.in_context_regression(2, generator, noise=0.0)
    solution = torch.linalg.lstsq(linear.key, linear.value).solution
    torch.testing.assert_close(linear.key @ solution, linear.value, atol=1e-4, rtol=0)
    # In a stream, what comes after a query does not move its estimate.
    later = maps.MapSample(drift.key, drift.value.clone(), drift.query, drift.target, True)
    later.value[:, 30:] = 9.0
    for estimate in maps.ESTIMATORS.values():
        torch.testing.assert_close(estimate(later, 0.5, 1e-3)[:, :31], estimate(drift, 0.5, 1e-3)[:, :31])


def test_bad_options_are_refused() -> None:
    query, key, value = tensors()
    for options in ({"ridge": 0.0}, {"bandwidth": -1.0}, {"solver": "lu"}, {"kernel": "cosine"}, {"cg_iterations": 0}):
        with pytest.raises(OptionError):
            local_linear_attention(query, key, value, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        LocalLinearAttention(ridge=-1)
    with pytest.raises(OptionError):
        flash_lla(query, key, value, block_q=0)
    with pytest.raises(ShapeError, match="num_heads"):
        LocalLinearAttention(num_heads=3).double()(query, key, value)
    with pytest.raises(OptionError):
        maps.piecewise_affine_drift(1, torch.Generator(), pairs=10, segments=3)
