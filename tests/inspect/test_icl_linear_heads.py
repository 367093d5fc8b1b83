"""Heads that learnt regression: limits, loops from the formulas, gradients, closed forms, and weights set by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.icl_linear_heads import (
    approximate_loss,
    debiased_gd_predict,
    gd_predict,
    head_sum_predict,
    icl_linear_regression,
    kq_matrix,
    kq_pattern,
    optimal_mu,
    ov_matrix,
    ov_pattern,
    ridge_predict,
)
from regard.models.icl_linear_heads import ICLHeads
from regard.reproduce.icl_linear_heads import D, Starts
from regard.retrofit.sites import discover
from regard.train.icl_linear_heads import train_in_context


def prompts(n: int = 6, length: int = 40, d: int = 5, tasks: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    drawn = icl_linear_regression(n, length, d, tasks=tasks, generator=torch.Generator().manual_seed(seed))
    return tuple(part.double() for part in drawn)  # type: ignore[return-value]


def pair(omega: float) -> Tensor:
    return torch.tensor([omega, -omega], dtype=torch.float64)


@pytest.mark.paper("icl_linear_heads")
def test_the_task_is_linear_regression() -> None:
    z, z_q, y_q = prompts(5000, 12, 3)
    assert z.shape == (5000, 12, 4) and z_q.shape == (5000, 1, 4) and y_q.shape == (5000, 1)
    assert bool((z_q[..., -1] == 0).all())
    x, y = z[..., :-1], z[..., -1:]
    fitted = torch.linalg.lstsq(x, y).solution
    left = (y - x @ fitted).square().sum((1, 2)) / (12 - 3)
    assert float(left.mean()) == pytest.approx(0.01, rel=0.05)
    assert float(y.var()) == pytest.approx(1.01, rel=0.05) and float(y_q.var()) == pytest.approx(1.01, rel=0.08)
    # The question's label comes from the examples' own beta.
    assert float((z_q[:, 0, :-1, None] * fitted).sum(1).sub(y_q).square().mean()) < 0.03


@pytest.mark.paper("icl_linear_heads")
def test_covariances_tasks_and_supports() -> None:
    z, _, _ = icl_linear_regression(2000, 20, 4, cov=0.6, generator=torch.Generator().manual_seed(0))
    x = z[..., :-1].flatten(0, 1)
    place = torch.arange(4)
    assert torch.allclose(x.mT @ x / len(x), 0.6 ** (place[:, None] - place).abs().float(), atol=0.03)
    given = torch.diag(torch.tensor([4.0, 1.0]))
    z, _, _ = icl_linear_regression(2000, 20, 2, cov=given, generator=torch.Generator().manual_seed(0))
    assert float(z[..., 0].var()) == pytest.approx(4, rel=0.05)
    z, _, y_q = icl_linear_regression(50, 30, 4, 0.0, tasks=2, supports=[[0, 1], [1, 2, 3]])
    assert z.shape == (50, 30, 6) and y_q.shape == (50, 2)
    beta = torch.linalg.lstsq(z[..., :4].double(), z[..., 4:].double()).solution
    assert bool((beta[:, 2:, 0].abs() < 1e-4).all()) and bool((beta[:, 0, 1].abs() < 1e-4).all())
    assert bool((beta[:, :2, 0].abs().mean(0) > 0.1).all())


@pytest.mark.paper("icl_linear_heads")
@pytest.mark.parametrize(("omega", "error"), [(0.02, 1e-3), (0.1, 2e-2)])
def test_symmetric_heads_tend_to_debiased_gradient_descent(omega: float, error: float) -> None:
    z, z_q, _ = prompts(200)
    step = debiased_gd_predict(z, z_q, lr=1.0)
    heads = head_sum_predict(z, z_q, pair(omega), torch.tensor([1.0, -1.0], dtype=torch.float64)) / (2 * omega)
    relative = float((heads - step).norm() / step.norm())
    assert relative < error
    # The error is of third order: of second, once divided.
    closer = head_sum_predict(z, z_q, pair(omega / 2), torch.tensor([1.0, -1.0], dtype=torch.float64)) / omega
    assert float((closer - step).norm() / step.norm()) == pytest.approx(relative / 4, rel=0.1)


@pytest.mark.paper("icl_linear_heads")
def test_predictors_are_the_sums_that_define_them() -> None:
    z, z_q, _ = prompts(3, 7, 2)
    omega, mu = torch.tensor([0.4, -0.3, 0.1]).double(), torch.tensor([1.5, -2.0, 0.3]).double()
    heads, plain, debiased = (
        head_sum_predict(z, z_q, omega, mu),
        gd_predict(z, z_q, 0.7),
        debiased_gd_predict(z, z_q, 0.7),
    )
    for b in range(3):
        x, y, q = z[b, :, :2], z[b, :, 2], z_q[b, 0, :2]
        scores = [float(x[i] @ q) for i in range(7)]
        told = 0.0
        for w, m in zip(omega.tolist(), mu.tolist(), strict=True):
            weights = torch.tensor([w * s for s in scores], dtype=torch.float64).exp()
            told += m * float((weights * y).sum() / weights.sum())
        assert float(heads[b]) == pytest.approx(told)
        step = sum(float(y[i]) * scores[i] for i in range(7)) / 7
        assert float(plain[b]) == pytest.approx(0.7 * step)
        assert float(debiased[b]) == pytest.approx(0.7 * (step - float(y.mean()) * float(x.mean(0) @ q)))


@pytest.mark.paper("icl_linear_heads")
def test_a_shift_of_all_labels_is_invisible_to_heads_that_cancel() -> None:
    z, z_q, _ = prompts()
    shifted = z.clone()
    shifted[..., -1] += 3
    for omega in (0.1, 1.0, 4.0):
        before, after = (head_sum_predict(t, z_q, pair(omega), pair(1.0)) for t in (z, shifted))
        assert torch.allclose(before, after, atol=1e-12)
        one = pair(omega)[:1]
        before, after = (head_sum_predict(t, z_q, one, one) for t in (z, shifted))
        assert torch.allclose(after - before, torch.full_like(before, 3 * omega))


@pytest.mark.paper("icl_linear_heads")
def test_optimal_mu_is_where_the_approximate_loss_is_flat() -> None:
    for omega in (pair(0.2), torch.tensor([0.3, -0.1, 0.25, -0.4]).double(), torch.tensor([0.2, 0.2]).double()):
        mu = optimal_mu(omega, 40, 5, 0.01).requires_grad_()
        loss = approximate_loss(omega, mu, 40, 5, 0.01)
        (gradient,) = torch.autograd.grad(loss, mu)
        assert float(gradient.abs().max()) < 1e-8
        other = mu.detach() + 0.1 * torch.randn(len(mu), dtype=torch.float64)
        assert float(approximate_loss(omega, other, 40, 5, 0.01)) >= float(loss.detach())
    assert float(optimal_mu(pair(0.2), 40, 5, 0.01).sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.paper("icl_linear_heads")
def test_the_approximate_loss_is_near_the_measured_one() -> None:
    z, z_q, y_q = prompts(4000, 100, 20)
    for omega in (pair(0.1), pair(0.15)[:1], torch.tensor([0.1, -0.15, 0.05]).double()):
        mu = optimal_mu(omega, 100, 20, 0.01)
        measured = float((head_sum_predict(z, z_q, omega, mu) - y_q).square().mean())
        assert measured == pytest.approx(float(approximate_loss(omega, mu, 100, 20, 0.01)), rel=0.1)


@pytest.mark.paper("icl_linear_heads")
def test_ridge_is_the_best_and_the_default_rates_are_the_best_rates() -> None:
    z, z_q, y_q = prompts(20_000)

    def error(told: Tensor) -> float:
        return float((told - y_q).square().mean())

    ridge = error(ridge_predict(z, z_q, 0.01))
    assert 0.01 < ridge < 0.0125
    x, y, q = z[0, :, :-1], z[0, :, -1], z_q[0, 0, :-1]
    padded = torch.cat((x, 0.05**0.5 * torch.eye(5).double())), torch.cat((y, torch.zeros(5).double()))
    by_rows = torch.linalg.lstsq(padded[0], padded[1][:, None]).solution[:, 0] @ q
    assert float(ridge_predict(z, z_q, 0.01)[0]) == pytest.approx(float(by_rows))
    for predict, reached in ((gd_predict, 1.01 - 40 / 46.05), (debiased_gd_predict, 1.01 - 39 / 45.05)):
        best = error(predict(z, z_q, noise_var=0.01))
        # In the mean 1 + s2 less the square of E beta.b over E |b|^2.
        assert best == pytest.approx(reached, rel=0.05) and best > 5 * ridge
        told = predict(z, z_q, 1.0)
        fitted = float((told * y_q).sum() / told.square().sum())
        assert float((predict(z, z_q, noise_var=0.01) / told).mean()) == pytest.approx(fitted, rel=0.02)
    # With much noise, in closed form: E beta.b over E |b|^2, with 40 and with 39 degrees of freedom.
    for predict, rate in ((gd_predict, 40 / (40 + 6 + 5 * 2)), (debiased_gd_predict, 40 / (39 + 6 + 5 * 2))):
        assert torch.allclose(predict(z, z_q, noise_var=2.0), predict(z, z_q, rate))


@pytest.mark.paper("icl_linear_heads")
def test_order_of_examples_does_not_matter_and_any_length_is_taken() -> None:
    torch.manual_seed(0)
    model = ICLHeads(5, 2).double()
    z, z_q, _ = prompts()
    assert torch.allclose(model(z[:, torch.randperm(40)], z_q), model(z, z_q), atol=1e-12)
    longer, question, _ = prompts(6, 160)
    assert model(longer, question).shape == (6, 1)
    assert ICLHeads(5, 3, tasks=2)(*(t.float() for t in prompts(6, 9, tasks=2)[:2])).shape == (6, 2)


@pytest.mark.paper("icl_linear_heads")
@pytest.mark.parametrize("tasks", [1, 2])
def test_extracted_numbers_make_the_layer_once_other_weights_are_zero(tasks: int) -> None:
    torch.manual_seed(0)
    model, d, width = ICLHeads(5, 3, tasks).double(), 5, 5 + tasks
    attention = model.attention
    omega = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    mu = torch.randn(3, tasks, dtype=torch.float64)
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value, attention.out):
            linear.weight.zero_()
        for head in range(3):
            rows = slice(head * width, head * width + d)
            labels = slice(head * width + d, (head + 1) * width)
            attention.query.weight[rows, :d] = 2 * torch.eye(d)
            attention.key.weight[rows, :d] = float(omega[head]) * width**0.5 / 2 * torch.eye(d)
            attention.value.weight[labels, d:] = torch.eye(tasks)
            attention.out.weight[d:, labels] = torch.diag(mu[head]).to(mu)
    keys, values = kq_pattern(kq_matrix(model), d), ov_pattern(ov_matrix(model), d)
    assert torch.allclose(keys.omega, omega) and torch.allclose(values.mu, mu)
    assert torch.allclose(keys.diagonality, torch.ones(3).double()) and keys.homogeneity == pytest.approx(0.4)
    assert torch.allclose(values.last_entry_only, torch.ones(3).double())
    assert values.zero_sum == pytest.approx(float((mu.sum(0).abs() / mu.abs().amax(0)).max()))
    z, z_q, _ = prompts(6, 30, tasks=tasks)
    assert torch.allclose(model(z, z_q), head_sum_predict(z, z_q, keys.omega, values.mu), atol=1e-12)


@pytest.mark.paper("icl_linear_heads")
def test_matrices_are_those_of_the_scores_and_outputs_of_any_layer() -> None:
    torch.manual_seed(0)
    z, z_q, _ = prompts(4, 9)
    model = ICLHeads(5, 2).double()
    kq, ov = kq_matrix(model), ov_matrix(discover(model)[0])
    out = torch.zeros(4, 6, dtype=torch.float64)
    for head in range(2):
        weights = (z @ kq[head] @ z_q.mT)[..., 0].softmax(-1)
        out = out + (weights[:, None] @ z)[:, 0] @ ov[head].T
    assert torch.allclose(model.attention(z_q, z)[:, 0], out)
    # Of T5, say, which has no factor.
    assert torch.allclose(kq_matrix(model, scale=1.0), kq * 6**0.5)
    layer = nn.MultiheadAttention(6, 2, bias=False, batch_first=True).double()
    kq, ov = kq_matrix(layer), ov_matrix(layer)
    weights = [(z @ kq[head] @ z_q.mT)[..., 0].softmax(-1) for head in range(2)]
    told = sum((w[:, None] @ z)[:, 0] @ ov[head].T for head, w in enumerate(weights))
    assert torch.allclose(layer(z_q, z, z)[0][:, 0], told)


@pytest.mark.paper("icl_linear_heads")
def test_entries_that_no_input_reaches_count_in_no_pattern() -> None:
    kq = torch.diag(torch.tensor([1.0, 1.0, 0.0]))[None].clone()
    kq[:, :, 2] = 7
    assert float(kq_pattern(kq, 2).diagonality) == 1
    kq[:, 2, 0] = 1
    assert float(kq_pattern(kq, 2).diagonality) == pytest.approx(2 / 3)
    ov = torch.zeros(2, 3, 3)
    ov[:, :2] = 5
    ov[0, 2, 2], ov[1, 2, 2], ov[1, 2, 0] = 2, -1, 1
    pattern = ov_pattern(ov, 2)
    assert pattern.mu[:, 0].tolist() == [2, -1] and pattern.last_entry_only.tolist() == [1, 0.5]
    assert pattern.zero_sum == 0.5


@pytest.mark.paper("icl_linear_heads")
def test_two_heads_learn_to_oppose_each_other() -> None:
    # Heads whose random weights begin on one side stay there for long; these do not.
    torch.manual_seed(1)
    model = ICLHeads(2, 2)
    losses = train_in_context(
        model, lambda n, g: icl_linear_regression(n, 20, 2, generator=g), steps=700, batch_size=64, lr=1e-2
    )
    keys, values = kq_pattern(kq_matrix(model), 2), ov_pattern(ov_matrix(model), 2)
    assert len(losses) == 700 and sum(losses[-50:]) < 0.4 * sum(losses[:50])
    assert float(keys.omega.prod()) < 0 and keys.homogeneity > 0.7 and float(keys.diagonality.min()) > 0.9
    assert values.zero_sum < 0.2 and bool((values.mu[:, 0] * keys.omega > 0).all())


@pytest.mark.paper("icl_linear_heads")
def test_mistakes_are_explained() -> None:
    z, z_q, _ = prompts(2, 4)
    with pytest.raises(OptionError, match="rho"):
        icl_linear_regression(1, 4, 2, cov=1.5)
    with pytest.raises(OptionError, match="identity"):
        icl_linear_regression(1, 4, 2, cov="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="covariance"):
        icl_linear_regression(1, 4, 2, cov=torch.eye(3))
    with pytest.raises(OptionError, match="tasks"):
        icl_linear_regression(1, 4, 2, tasks=2, supports=[[0]])
    for wrong in (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(OptionError, match="symmetric"):
            icl_linear_regression(1, 4, 2, cov=wrong)
    with pytest.raises(OptionError, match="0 to 1"):
        icl_linear_regression(1, 4, 2, supports=[[2]])
    with pytest.raises(ShapeError, match="omega"):
        head_sum_predict(z, z_q, pair(0.1), torch.ones(3))
    with pytest.raises(ShapeError, match="omega"):
        approximate_loss(pair(0.1), torch.ones(3).double(), 4, 2, 0.1)
    with pytest.raises(OptionError, match="noise_std"):
        icl_linear_regression(0, 4, 2)
    with pytest.raises(ShapeError, match="questions"):
        ICLHeads(4)(z.float(), z_q.float())
    with pytest.raises(ShapeError, match="questions"):
        gd_predict(z, z_q[:1])
    with pytest.raises(OptionError, match="noise_var"):
        ridge_predict(z, z_q, 0)
    with pytest.raises(ShapeError, match="0 < d < D"):
        kq_pattern(torch.ones(1, 3, 3), 3)
    with pytest.raises(OptionError, match="2 attention layers"):
        kq_matrix(nn.ModuleList([ICLHeads(2), ICLHeads(2)]))
    with pytest.raises(OptionError, match="omega"):
        optimal_mu(torch.ones(1, 1), 4, 2, 0.1)
    with pytest.raises(OptionError, match="step"):
        train_in_context(ICLHeads(2), lambda n, g: prompts(n), steps=0)


def test_starts_that_train_side_by_side_are_layers_of_their_own() -> None:
    starts = Starts(2)
    z, z_q, y_q = icl_linear_regression(9, 7, D, generator=torch.Generator().manual_seed(0))
    before = starts(z, z_q)
    assert torch.allclose(before, torch.stack([layer(z, z_q) for layer in starts.layers]), atol=1e-6)
    starts.query.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) == 3)[:, None, None, None])
    (starts(z, z_q) - y_q).square().mean().backward()
    with torch.no_grad():
        starts.query -= starts.query.grad
    layers = starts.finished()
    after = torch.stack([layer(z, z_q) for layer in layers])
    changed = (after - before).abs().amax((1, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [3]
    assert torch.allclose(after, starts(z, z_q), atol=1e-6)
