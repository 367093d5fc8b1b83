"""Linear regression in context: what one, two and four heads learn, next to the estimators that they come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.inspect.icl_linear_heads import (
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
from regard.reproduce.finding import Finding, Plot
from regard.train.icl_linear_heads import train_in_context

D, LENGTH, NOISE_VAR, PROMPTS = 5, 40, 0.01, 20_000
STEPS, RATE = 3000, 1e-3
# Random starts by number of heads.
SEEDS = {1: 1, 2: 4, 4: 2}
OMEGAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
Point = tuple[float, float]


def draw(length: int, rho: float, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of the experiment."""
    return icl_linear_regression(n, length, D, NOISE_VAR**0.5, rho, generator=generator)


class Trained:
    """A layer of heads after training, with its error on fresh prompts as it trained."""

    def __init__(self, heads: int, rho: float = 0.0, seed: int = 0) -> None:
        self.tests = {
            n: draw(n, rho, PROMPTS // 4, torch.Generator().manual_seed(10_000)) for n in (LENGTH, 4 * LENGTH)
        }
        torch.manual_seed(seed)
        self.model = ICLHeads(D, heads)
        self.curve: list[Point] = []
        train_in_context(self.model, partial(draw, LENGTH, rho), steps=STEPS, lr=RATE, seed=seed, watch=self.look)

    def look(self, step: int) -> None:
        if step % 100 == 0:
            self.curve.append((float(step), self.error()))

    @torch.no_grad()
    def error(self, length: int = LENGTH) -> float:
        """Mean squared error."""
        z, z_q, y_q = self.tests[length]
        return float((self.model(z, z_q) - y_q).square().mean())

    def weights(self) -> dict[str, Any]:
        """What its weights look like."""
        keys, values = kq_pattern(kq_matrix(self.model), D), ov_pattern(ov_matrix(self.model), D)
        return {
            "test_error": round(self.error(), 4),
            f"test_error_at_{4 * LENGTH}_examples": round(self.error(4 * LENGTH), 4),
            "omega": [round(x, 3) for x in keys.omega.tolist()],
            "mu": [round(x, 2) for x in values.mu[:, 0].tolist()],
            "squared_kq_mass_off_the_diagonal": [round(1 - x, 4) for x in keys.diagonality.tolist()],
            "squared_ov_mass_off_the_label": [round(1 - x, 4) for x in values.last_entry_only.tolist()],
            "smallest_over_largest_omega": round(keys.homogeneity, 3),
            "sum_of_mu_over_largest": round(values.zero_sum, 4),
        }


def estimators() -> tuple[dict[str, float], list[Point], list[Point]]:
    """Errors without training; those of two opposite heads and of one by omega, each with its best mu."""
    z, z_q, y_q = draw(LENGTH, 0.0, PROMPTS, torch.Generator().manual_seed(1))

    def error(told: Tensor) -> float:
        return float((told - y_q).square().mean())

    def of_heads(*omega: float) -> float:
        heads = torch.tensor(omega)
        # The best mu for these prompts, by least squares on what one head each would say.
        said = torch.cat([head_sum_predict(z, z_q, heads[h : h + 1], torch.ones(1)) for h in range(len(heads))], -1)
        mu = torch.linalg.lstsq(said.double(), y_q.double()).solution[:, 0].float()
        return error(said @ mu[:, None])

    two, one = [(w, of_heads(w, -w)) for w in OMEGAS], [(w, of_heads(w)) for w in OMEGAS]
    pair = torch.tensor([0.1, -0.1])
    return (
        {
            "ridge": round(error(ridge_predict(z, z_q, NOISE_VAR)), 4),
            "gradient_step": round(error(gd_predict(z, z_q, noise_var=NOISE_VAR)), 4),
            "debiased_gradient_step": round(error(debiased_gd_predict(z, z_q, noise_var=NOISE_VAR)), 4),
            "two_opposite_heads_best": round(min(e for _, e in two), 4),
            "one_head_best": round(min(e for _, e in one), 4),
            "two_heads_omega_0.1_and_optimal_mu": round(
                error(head_sum_predict(z, z_q, pair, optimal_mu(pair, LENGTH, D, NOISE_VAR))), 4
            ),
        },
        two,
        one,
    )


def run(report: Callable[[str], None]) -> Finding:
    """Estimators, then one, two and four heads trained from random weights, then four heads on correlated x."""
    measured: dict[str, Any] = {}
    errors, two, one = estimators()
    measured["error_without_training"] = errors
    report(f"errors without training: {errors}")
    trained = {(heads, seed): Trained(heads, seed=seed) for heads in SEEDS for seed in range(SEEDS[heads])}
    weights = {place: model.weights() for place, model in trained.items()}
    for (heads, seed), found in weights.items():
        measured[f"trained_{heads}_heads_start_{seed}"] = found
        report(f"{heads} heads, start {seed}: {found}")
    measured["correlated_x_four_heads"] = correlated()
    single = weights[1, 0]["test_error"]
    pairs = [found for (heads, _), found in weights.items() if heads == 2]
    opposed = [
        found for found in pairs if found["omega"][0] * found["omega"][1] < 0 and found["mu"][0] * found["mu"][1] < 0
    ]
    fours = [found for (heads, _), found in weights.items() if heads == 4]
    measured["starts_from_which_two_heads_reach_0.6_of_one"] = sum(f["test_error"] <= 0.6 * single for f in pairs)
    parts = {
        "holds_two_heads_beat_one_from_every_start": all(f["test_error"] <= 0.6 * single for f in pairs),
        "holds_four_heads_beat_one_from_every_start": all(f["test_error"] <= 0.6 * single for f in fours),
        "holds_patterns_where_two_heads_oppose": bool(opposed)
        and all(
            f["sum_of_mu_over_largest"] < 0.05 and max(f["squared_kq_mass_off_the_diagonal"]) < 0.1 for f in opposed
        ),
        "holds_near_debiased_step_where_two_heads_oppose": bool(opposed)
        and all(f["test_error"] < 1.15 * errors["debiased_gradient_step"] for f in opposed),
    }
    measured |= parts
    lines = {"ridge": errors["ridge"], "debiased gradient step": errors["debiased_gradient_step"]}
    curves = {
        f"{heads} head{'s' if heads > 1 else ''}, start {seed}": model.curve for (heads, seed), model in trained.items()
    }
    plots = [
        Plot(
            "Trained from random weights", "training steps", "mean squared error", curves, log_y=True, references=lines
        ),
        Plot(
            "Heads set by hand, best mu",
            "omega",
            "mean squared error",
            {"heads of omega and -omega": two, "one head": one},
            references={"debiased gradient step": errors["debiased_gradient_step"]},
        ),
    ]
    return Finding(measured, all(parts.values()), NOTE, plots)


def correlated(rho: float = 0.5) -> dict[str, Any]:
    """Of the head with the largest mu, trained on x of covariance ``rho^|i-j|``: does KQ commute with the covariance,
    and is it another matrix than a multiple of the identity."""
    model = Trained(4, rho).model
    head = int(ov_pattern(ov_matrix(model), D).mu[:, 0].abs().argmax())
    kq, place = kq_matrix(model)[head, :D, :D], torch.arange(D)
    cov = rho ** (place[:, None] - place).abs().float()
    apart = (kq @ cov - cov @ kq).norm() / (kq @ cov).norm()
    rest = (kq - kq.trace() / D * torch.eye(D)).norm() / kq.norm()
    return {"commutator_of_kq_with_covariance": round(float(apart), 3), "kq_off_the_identity": round(float(rest), 3)}


NOTE = (
    "d = 5, 40 examples, noise of variance 0.01, Adam at 1e-3, 128 fresh prompts a step, 3000 steps from torch's "
    "random weights (the reference trains for 100 000). Errors are on 20 000 prompts without training and 5000 after "
    "it. Holds if two heads reach 0.6 of one head's error from each of four random starts, and four heads from both "
    "of theirs; and if, where two heads took opposite signs, the mu sum to less than 0.05 of the largest, less than "
    "0.1 of the squared entries of KQ lie off the diagonal, and the error is within 1.15 of the debiased step's. Rate "
    "and bounds were set before the trials; that every start must pass was set after one had shown the first to "
    "fail, and none was dropped. Two heads that start on one side stay near the one-head solution: in a trial the "
    "first start was there after 12 000 steps still, with one mu shrinking towards the other side, and after 4000 at "
    "a rate of 1e-2. Longer training would tell whether it gets away; more heads make such a start unlikely. "
    "Debiasing is no gain by itself here: the plain gradient step does as well, but softmax heads that cancel take "
    "the means out of theirs. KQ entries that multiply the question's empty label, and rows of OV that are not read, "
    "stay as they began and are not counted."
)
