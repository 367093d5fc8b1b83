"""Latent alignment: bounds against sums written out, estimators against the gradients that they estimate, read-outs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.scored import Tile, scored_attention
from regard.layers.alignment import (
    AlignmentRead,
    alignment_kl,
    draw,
    draw_relaxed,
    elbo,
    exact_nll,
    expectation,
    hard_bound,
    importance_weights,
    log_alignment,
    log_marginal,
    log_probability,
    log_weights,
    read_drawn,
    reinforce_loss,
    true_posterior,
    wsram_loss,
)
from regard.layers.normalizers import NORMALIZERS

pytestmark = pytest.mark.paper("variational_attention")


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def problem(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prior, posterior and likelihood, as logarithms."""
    return normals(*shape).log_softmax(-1), normals(*shape).log_softmax(-1), 2 * normals(*shape) - 3


def test_evidence_and_bounds_are_the_sums() -> None:
    prior, q, likelihood = problem(6)
    p, chance, log_l = prior.exp().tolist(), q.exp().tolist(), likelihood.tolist()
    evidence = math.log(sum(p[z] * math.exp(log_l[z]) for z in range(6)))
    assert float(exact_nll(prior, likelihood)) == pytest.approx(-evidence, abs=1e-12)
    hard = sum(p[z] * log_l[z] for z in range(6))
    assert float(hard_bound(prior, likelihood)) == pytest.approx(hard, abs=1e-12)
    kl = sum(chance[z] * math.log(chance[z] / p[z]) for z in range(6))
    bound = sum(chance[z] * log_l[z] for z in range(6)) - 0.5 * kl
    assert float(elbo(q, prior, likelihood, kl_weight=0.5)) == pytest.approx(bound, abs=1e-12)


def test_bounds_stay_below_the_evidence_and_the_true_posterior_reaches_it() -> None:
    prior, q, likelihood = problem(200, 7)
    evidence = log_marginal(prior, likelihood)
    assert bool((elbo(q, prior, likelihood) < evidence).all())
    assert bool((hard_bound(prior, likelihood) < evidence).all())
    torch.testing.assert_close(elbo(true_posterior(prior, likelihood), prior, likelihood), evidence)
    torch.testing.assert_close(elbo(prior, prior, likelihood), hard_bound(prior, likelihood))
    # The gap of any q is its divergence from the true posterior.
    gap = alignment_kl(q, true_posterior(prior, likelihood))
    torch.testing.assert_close(evidence - elbo(q, prior, likelihood), gap)


def test_weights_of_zero_count_nowhere_and_carry_no_gradient() -> None:
    scores = normals(3, 5).requires_grad_()
    visible = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    prior = log_alignment(scores, visible)
    assert bool(torch.isneginf(prior[~visible]).all())
    likelihood = torch.where(visible, normals(3, 5), torch.tensor(float("nan"), dtype=torch.float64))
    q = log_alignment(normals(3, 5), visible)
    value = elbo(q, prior, likelihood)
    assert float(value[2].detach()) == 0 and bool(value.isfinite().all())
    torch.testing.assert_close(value[1], elbo(q[1, :2], prior[1, :2], likelihood[1, :2]))
    value.sum().backward()
    assert scores.grad is not None and bool((scores.grad[~visible] == 0).all()) and bool(scores.grad.isfinite().all())
    assert float(alignment_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log())) == math.inf


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    drawn = draw(weights.log(), 40_000)
    assert drawn.shape == (40_000, 2)
    share = torch.stack([(drawn == z).double().mean(0) for z in range(4)], -1)
    torch.testing.assert_close(share, weights, atol=0.01, rtol=0)
    torch.testing.assert_close(log_probability(weights.log(), drawn)[7, 0], weights[0, drawn[7, 0]].log())
    relaxed = draw_relaxed(weights.log(), 40_000, temperature=0.1)
    torch.testing.assert_close(relaxed.sum(-1), torch.ones(40_000, 2, dtype=torch.float64))
    assert float(relaxed[..., 0, 1].max()) == 0
    # The largest entry of a relaxed draw falls as the draw itself does.
    tops = torch.stack([(relaxed.argmax(-1) == z).double().mean(0) for z in range(4)], -1)
    torch.testing.assert_close(tops, weights, atol=0.01, rtol=0)


def reinforce_gradients(scores: Tensor, reward: Tensor, baseline: float) -> Tensor:
    """The gradient that each possible draw gives, ``(positions, positions)``."""
    rows = []
    for z in range(len(reward)):
        leaf = scores.clone().requires_grad_()
        log_q = log_probability(leaf.log_softmax(-1), torch.tensor([z]))
        reinforce_loss(reward[z : z + 1], log_q, baseline).sum().backward()
        assert leaf.grad is not None
        rows.append(leaf.grad)
    return torch.stack(rows)


def test_the_mean_reinforce_gradient_is_that_of_the_sum_and_a_baseline_lowers_its_variance() -> None:
    scores, reward = normals(5), normals(5) - 4
    leaf = scores.clone().requires_grad_()
    (-expectation(leaf.log_softmax(-1), reward)).backward()
    q, variances = scores.softmax(-1), []
    for baseline in (0.0, -4.0):
        each = reinforce_gradients(scores, reward, baseline)
        mean = q @ each
        torch.testing.assert_close(mean, leaf.grad)
        variances.append(float(q @ (each - mean).square().sum(-1)))
    assert variances[1] < variances[0] / 5
    # And so for draws that were drawn.
    drawn_leaf = scores.clone().requires_grad_()
    log_q = drawn_leaf.log_softmax(-1)
    drawn = draw(log_q, 100_000)
    reinforce_loss(reward[drawn], log_probability(log_q, drawn), torch.tensor(-4.0)).mean().backward()
    assert drawn_leaf.grad is not None and leaf.grad is not None
    torch.testing.assert_close(drawn_leaf.grad, leaf.grad, atol=0.01, rtol=0)


def test_wake_sleep_gradient_tends_to_that_of_the_evidence() -> None:
    scores, q_scores, likelihood = normals(4), normals(4), normals(4) - 2
    exact = [x.clone().requires_grad_() for x in (scores, likelihood)]
    exact_nll(exact[0].log_softmax(-1), exact[1]).backward()
    posterior = true_posterior(scores.log_softmax(-1), likelihood).exp()
    leaves = [x.clone().requires_grad_() for x in (scores, likelihood, q_scores)]
    log_q = leaves[2].log_softmax(-1)
    drawn = draw(log_q, 400_000)
    chosen = log_probability(leaves[1], drawn), log_probability(leaves[0].log_softmax(-1), drawn)
    of_q = log_probability(log_q, drawn)
    weight = importance_weights(*chosen, of_q)
    torch.testing.assert_close(weight.sum(0), torch.ones((), dtype=torch.float64))
    wsram_loss(*chosen, of_q).backward()
    for leaf, wanted in zip(leaves, (exact[0].grad, exact[1].grad, q_scores.softmax(-1) - posterior), strict=True):
        assert leaf.grad is not None and wanted is not None
        torch.testing.assert_close(leaf.grad, wanted, atol=0.01, rtol=0)


def test_read_outs_against_loops() -> None:
    weights, value = normals(2, 3, 4, 6).softmax(-1), normals(2, 3, 6, 5)
    exact = AlignmentRead("exact")(weights, value=value)
    for b, h, i, c in ((0, 0, 0, 0), (1, 2, 3, 4)):
        total = sum(float(weights[b, h, i, j]) * math.exp(float(value[b, h, j, c])) for j in range(6))
        assert float(exact[b, h, i, c]) == pytest.approx(math.log(total), abs=1e-12)
    soft = AlignmentRead("soft")(weights, value=value)
    assert bool((soft < exact).all()), "on log-likelihoods the weighted sum is the hard bound"
    hard = AlignmentRead("hard").eval()(weights, value=value)
    torch.testing.assert_close(hard[1, 0, 2], value[1, 0, weights[1, 0, 2].argmax()])
    assert AlignmentRead("exact").per_pair(5) == 5 and AlignmentRead("hard").per_pair(5) == 1


def test_drawn_read_outs_have_the_weighted_sum_as_their_mean() -> None:
    weights, value = normals(1, 1, 2, 4).softmax(-1), normals(1, 1, 4, 3)
    many = weights.expand(20_000, 1, 2, 4)
    wanted = (weights @ value)[0, 0]
    hard = AlignmentRead("hard")(many, value=value)
    read, log_weight = read_drawn(many, value)
    for found in (hard, read):
        torch.testing.assert_close(found.mean((0, 1)), wanted, atol=0.05, rtol=0)
        nearest = (found[..., None, :] - value[0, 0]).abs().sum(-1)
        assert float(nearest.amin(-1).max()) < 1e-12, "each is one of the values"
    index = (read[..., None, :] - value[0, 0]).abs().sum(-1).argmin(-1, keepdim=True)
    torch.testing.assert_close(log_weight, many.gather(-1, index)[..., 0].log())
    cold = AlignmentRead("gumbel", temperature=0.01)(many, value=value)
    torch.testing.assert_close(cold.mean((0, 1)), wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize("mode", ["soft", "exact", "hard", "gumbel"])
def test_rows_without_weight_read_zeros(mode: AlignmentRead.Mode) -> None:
    raw = normals(1, 1, 3, 4)
    weights = torch.cat((raw.softmax(-1)[:, :, :2], torch.zeros(1, 1, 1, 4, dtype=torch.float64)), 2).requires_grad_()
    value = normals(1, 1, 4, 2).requires_grad_()
    for training in (True, False):
        out = AlignmentRead(mode).train(training)(weights, value=value)
        assert bool((out[0, 0, 2] == 0).all()) and bool((out[0, 0, :2] != 0).all())
        grads = torch.autograd.grad(out.sum(), (weights, value), allow_unused=True)
        assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)
    read, chosen = read_drawn(weights, value)
    assert bool((read[0, 0, 2] == 0).all()) and float(chosen[0, 0, 2].detach()) == 0


def test_read_outs_run_in_tiles() -> None:
    query, key, value = normals(1, 2, 9, 4), normals(1, 2, 7, 4), normals(1, 2, 7, 3).requires_grad_()

    def score(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        return query @ key.transpose(-1, -2)

    softmax, read = NORMALIZERS["softmax"], AlignmentRead("exact")
    tiled = scored_attention(query, key, value, score, softmax, read=read, rows=2, backend="tiled")
    torch.testing.assert_close(tiled, scored_attention(query, key, value, score, softmax, read=read, backend="whole"))
    # A tile that is computed again in the backward pass draws what it drew before.
    out = scored_attention(query, key, value, score, softmax, read=AlignmentRead("hard"), rows=2, backend="tiled")
    drawn = (out[:, :, :, None] - value[:, :, None]).abs().sum(-1).argmin(-1)
    out.sum().backward()
    counts = torch.nn.functional.one_hot(drawn, 7).sum(2).double()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, counts[..., None].expand_as(value))


def test_a_posterior_takes_the_place_of_the_map_in_training() -> None:
    query, key, value = normals(1, 1, 3, 4), normals(1, 1, 5, 4), normals(1, 1, 5, 2)
    scores = normals(1, 1, 3, 5).requires_grad_()

    def score(query: Tensor, key: Tensor, tile: Tile) -> Tensor:
        # The last key is out of the map's reach.
        return (query @ key.transpose(-1, -2)).masked_fill(torch.arange(5) == 4, -math.inf)

    softmax, read = NORMALIZERS["softmax"], AlignmentRead("soft")
    prior = scored_attention(query, key, value, score, softmax, read=read)
    read.posterior = scores
    found = scored_attention(query, key, value, score, softmax, read=read, rows=1, backend="tiled")
    torch.testing.assert_close(found, scores[..., :4].softmax(-1) @ value[:, :, :4])
    (grad,) = torch.autograd.grad(found.sum(), scores)
    assert bool((grad[..., 4] == 0).all()) and bool((grad[..., :4] != 0).all())
    torch.testing.assert_close(scored_attention(query, key, value, score, softmax, read=read.eval()), prior)
    # With the true posterior, the mean log-likelihood less the divergence is the evidence.
    weights, likelihood = normals(1, 1, 3, 5).softmax(-1), normals(1, 1, 5, 1) - 2
    read.train().posterior = true_posterior(log_weights(weights), likelihood[:, :, :, 0][:, :, None])
    bound = read(weights, value=likelihood)[..., 0] - alignment_kl(read.posterior, log_weights(weights))
    torch.testing.assert_close(bound, AlignmentRead("exact")(weights, value=likelihood)[..., 0])
    read.posterior = scores[..., :3]
    with pytest.raises(ShapeError, match="a row for each query"):
        read(weights, value=likelihood)


def test_log_weights_have_no_gradient_at_zero() -> None:
    weights = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64, requires_grad=True)
    found = log_weights(weights)
    assert float(found[0].detach()) == -math.inf
    found[1:].sum().backward()
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, torch.tensor([0.0, 4.0, 4 / 3], dtype=torch.float64))


def test_bad_options() -> None:
    prior = torch.zeros(3)
    for call in (
        lambda: draw(prior, 0),
        lambda: draw_relaxed(prior, 0),
        lambda: draw_relaxed(prior, 1, temperature=0.0),
        lambda: AlignmentRead("harder"),  # type: ignore[arg-type]
        lambda: AlignmentRead("hard", temperature=0.0),
    ):
        with pytest.raises(OptionError):
            call()
