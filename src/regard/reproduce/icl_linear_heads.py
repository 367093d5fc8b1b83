"""Linear regression in context: what one, two and four heads learn, next to the estimators that they come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

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
WIDTH = D + 1
STEPS, EARLY, RATE, STARTS = 15_000, 3000, 1e-3, 12
OMEGAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
_NAMES = ("query", "key", "value", "out")
Point = tuple[float, float]


def draw(length: int, rho: float, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of the experiment."""
    return icl_linear_regression(n, length, D, NOISE_VAR**0.5, rho, generator=generator)


class Starts(nn.Module):
    """Layers of heads from random weights of their own each, side by side: they train in one graph, many times faster
    than one after the other, and do not touch each other. Prompts to predictions ``(starts, n, 1)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.layers = []
        for seed in range(STARTS):
            torch.manual_seed(seed)
            self.layers.append(ICLHeads(D, heads))
        # (starts, heads, width, width), the rows of ``out`` transposed: heads stand in its columns.
        for name in _NAMES:
            weights = [getattr(layer.attention, name).weight.detach() for layer in self.layers]
            stacked = torch.stack([w.mT if name == "out" else w for w in weights])
            setattr(self, name, nn.Parameter(stacked.unflatten(1, (heads, WIDTH)).clone()))

    def forward(self, z: Tensor, z_q: Tensor) -> Tensor:
        # Heads of all starts together: (starts * heads, width, width) and (starts * heads, width).
        kq = (self.key.mT @ self.query).flatten(0, 1) * WIDTH**-0.5
        read = (self.value.mT @ self.out[..., -1:])[..., 0].flatten(0, 1)
        weights = (torch.einsum("hkq,nq->nhk", kq, z_q[:, 0]) @ z.mT).softmax(-1)
        told = (weights * (read @ z.mT)).sum(-1)
        return told.unflatten(1, (STARTS, -1)).sum(2).T[..., None]

    def finished(self) -> list[ICLHeads]:
        """The layers, with the weights that they learnt."""
        with torch.no_grad():
            for place, layer in enumerate(self.layers):
                for name in _NAMES:
                    weight = getattr(self, name)[place].flatten(0, 1)
                    getattr(layer.attention, name).weight.copy_(weight.mT if name == "out" else weight)
        return self.layers


class Trained:
    """Layers after training, with their errors on fresh prompts as they trained."""

    def __init__(self, heads: int, rho: float = 0.0) -> None:
        self.tests = {
            n: draw(n, rho, PROMPTS // 4, torch.Generator().manual_seed(10_000)) for n in (LENGTH, 4 * LENGTH)
        }
        self.starts = Starts(heads)
        # By step, of each start.
        self.curve: dict[int, list[float]] = {}
        self.look(0)
        train_in_context(self.starts, partial(draw, LENGTH, rho), steps=STEPS, lr=RATE, watch=self.look)
        self.layers = self.starts.finished()

    @torch.no_grad()
    def look(self, step: int) -> None:
        if step % 250 == 0:
            z, z_q, y_q = self.tests[LENGTH]
            self.curve[step] = (self.starts(z, z_q) - y_q).square().mean((1, 2)).tolist()

    @torch.no_grad()
    def error(self, layer: ICLHeads, length: int) -> float:
        """Mean squared error."""
        z, z_q, y_q = self.tests[length]
        return float((layer(z, z_q) - y_q).square().mean())

    def middle(self) -> list[Point]:
        """The median start by step."""
        return [(float(step), median(errors)) for step, errors in self.curve.items() if step]

    def weights(self) -> list[dict[str, Any]]:
        """What the weights of each look like."""
        return [self._weights(layer) for layer in self.layers]

    def _weights(self, layer: ICLHeads) -> dict[str, Any]:
        keys, values = kq_pattern(kq_matrix(layer), D), ov_pattern(ov_matrix(layer), D)
        return {
            "test_error": round(self.error(layer, LENGTH), 4),
            f"test_error_at_{4 * LENGTH}_examples": round(self.error(layer, 4 * LENGTH), 4),
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
    trained = {heads: Trained(heads) for heads in (1, 2, 4)}
    bound = 0.6 * median(trained[1].curve[STEPS])
    middle: dict[int, float] = {}
    for heads, models in trained.items():
        found, middle[heads] = models.weights(), median(models.curve[STEPS])
        measured[f"{heads}_heads_errors"] = [start["test_error"] for start in found]
        if heads == 2:
            measured["2_heads_starts"] = found
        measured[f"{heads}_heads_median_error"] = round(middle[heads], 4)
        if heads > 1:
            for step in (EARLY, STEPS):
                reached = sum(error <= bound for error in models.curve[step])
                measured[f"{heads}_heads_starts_of_{STARTS}_at_0.6_of_one_head_after_{step}_steps"] = reached
        report(f"{heads} heads, errors of {STARTS} starts: {measured[f'{heads}_heads_errors']}")
    measured["correlated_x_four_heads"] = correlated()
    report(f"correlated x: {measured['correlated_x_four_heads']}")
    pairs = measured["2_heads_starts"]
    opposed = [f for f in pairs if f["omega"][0] * f["omega"][1] < 0 and f["mu"][0] * f["mu"][1] < 0]
    measured["two_heads_starts_that_oppose"] = len(opposed)
    parts = {
        "holds_two_and_four_heads_beat_one": max(middle[2], middle[4]) <= bound,
        "holds_near_debiased_step": max(middle[2], middle[4]) < 1.15 * errors["debiased_gradient_step"],
        "holds_patterns_of_two_heads": 2 * len(opposed) > STARTS
        and all(
            f["sum_of_mu_over_largest"] < 0.05 and max(f["squared_kq_mass_off_the_diagonal"]) < 0.1 for f in opposed
        ),
    }
    measured |= parts
    lines = {"ridge": errors["ridge"], "debiased gradient step": errors["debiased_gradient_step"]}
    curves = {f"{heads} head{'s' if heads > 1 else ''}": models.middle() for heads, models in trained.items()}
    curves["2 heads, worst start"] = [(float(n), max(e)) for n, e in trained[2].curve.items() if n]
    shares = {
        f"{heads} heads": [(float(n), float(sum(x <= bound for x in e))) for n, e in trained[heads].curve.items() if n]
        for heads in (2, 4)
    }
    plots = [
        Plot(
            f"From random weights, median of {STARTS} starts",
            "training steps",
            "mean squared error",
            curves,
            log_x=True,
            log_y=True,
            references=lines,
        ),
        Plot(
            "Starts that reach 0.6 of one head's error",
            "training steps",
            f"starts of {STARTS}",
            shares,
            log_x=True,
            references={"all": float(STARTS)},
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
    and is it another matrix than a multiple of the identity. Medians over starts, before and after training."""
    place = torch.arange(D)
    cov = rho ** (place[:, None] - place).abs().float()

    def apart(layer: ICLHeads) -> tuple[float, float]:
        head = int(ov_pattern(ov_matrix(layer), D).mu[:, 0].abs().argmax())
        kq = kq_matrix(layer)[head, :D, :D]
        rest = kq - kq.trace() / D * torch.eye(D)
        return float((kq @ cov - cov @ kq).norm() / (kq @ cov).norm()), float(rest.norm() / kq.norm())

    before = [apart(layer) for layer in Starts(4).layers]
    after = [apart(layer) for layer in Trained(4, rho).layers]
    return {
        "commutator_of_kq_with_covariance_before": round(median(x for x, _ in before), 3),
        "commutator_of_kq_with_covariance": round(median(x for x, _ in after), 3),
        "kq_off_the_identity": round(median(y for _, y in after), 3),
    }


NOTE = (
    "d = 5, 40 examples, noise of variance 0.01, Adam at 1e-3, 128 fresh prompts a step, 15 000 steps from 12 of "
    "torch's random weights for each number of heads. Errors are on 20 000 prompts without training and 5000 after it. "
    "Holds if the median starts of two and of four heads reach 0.6 of one head's error and 1.15 of the debiased "
    "step's, if most starts of two heads take opposite signs, and if of these the mu sum to less than 0.05 of the "
    "largest and less than 0.1 of the squared entries of KQ lie off the diagonal. An earlier run asked this of each of "
    "four starts after 3000 steps, and two of them failed; the released code trains for 500 000 steps from one start "
    "each, with 256 prompts a step and noise of variance 0.1. With time most starts get away from the one-head "
    "solution, but not all: where both heads begin on one side and share the label alike, they stay there. In a trial "
    "with the released code's noise and batches one more of these got away, and two stayed for 60 000 steps: two heads "
    "do not come to debiased descent from every random start, as the paper has it; four do from all of these. "
    "Debiasing is no gain by itself here: the plain gradient step does as well, but softmax heads that cancel take the "
    "means out of theirs. KQ entries that multiply the question's empty label, and rows of OV that are not read, stay "
    "as they began and are not counted. On correlated x KQ should commute with the covariance, as a function of it; "
    "the commutator is given before and after training."
)
