"""The largest of up to ten numbers: attention among the elements against pooling of elements encoded one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from regard.bench.measure import one_thread
from regard.bench.set_tasks import MaxRegression
from regard.bench.training import evaluate, fit
from regard.linear.set_transformer import ISAB, SAB
from regard.models.set_transformer import DeepSet, SetTransformer
from regard.reproduce.finding import Finding

WIDTH, HEADS, INDUCING, STEPS, BATCH, LENGTH = 64, 4, 16, 2000, 64, 1 << 14
RATES = {"two": (1e-3,), "rows": (1e-3, 3e-4)}  # what is compared with gets the better of two


def _transformer(num_inds: int | None) -> Callable[[], nn.Module]:
    return lambda: SetTransformer(1, 1, 1, num_inds, WIDTH, HEADS, decoder_depth=0)


def _pooled(pool: str) -> Callable[[], nn.Module]:
    return lambda: DeepSet(1, 1, 1, pool, WIDTH, depth=(4, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two_sab_and_pma": _transformer(None),
    f"two_isab_of_{INDUCING}_and_pma": _transformer(INDUCING),
    "rows_and_mean_pooling": _pooled("mean"),
    "rows_and_sum_pooling": _pooled("sum"),
    "rows_and_dot_product_pooling": _pooled("dot"),
    "rows_and_max_pooling": _pooled("max"),
}


def run(report: Callable[[str], None]) -> Finding:
    """One training each, on the same batches."""
    task, error = MaxRegression(), {}
    with one_thread():
        for name, build in MODELS.items():
            found = []
            for rate in RATES[name.split("_")[0]]:
                torch.manual_seed(0)
                model = build()
                history = fit(model, task, steps=STEPS, batch_size=BATCH, lr=rate, weight_decay=0.0)
                found.append(evaluate(model, task, batches=200, batch_size=64)[1])
                report(f"{name}, rate {rate}: mean absolute error {found[-1]:.3f} ({history.seconds:.0f} s)")
            error[name] = min(found)
    sab, isab = SAB(WIDTH, HEADS), ISAB(WIDTH, HEADS, INDUCING)
    ratios = [block.multiply_adds(2 * LENGTH) / block.multiply_adds(LENGTH) for block in (sab, isab)]
    exact, induced, mean, *_ = error.values()
    holds = exact < 1 and induced < 2 and mean > 2 * max(exact, induced)
    return Finding(
        {
            **{f"mean_absolute_error_{name}": round(value, 3) for name, value in error.items()},
            f"multiply_adds_of_sab_from_n_{LENGTH}_to_twice_as_many": round(ratios[0], 2),
            f"multiply_adds_of_isab_from_n_{LENGTH}_to_twice_as_many": round(ratios[1], 2),
        },
        holds,
        "Holds if on the largest of 1 to 10 whole numbers from 0 to 100 the error of two SAB and PMA is below 1, "
        f"that with {INDUCING} inducing points below 2, and mean pooling's more than twice either. Width {WIDTH}, "
        f"{HEADS} heads, {STEPS} steps of {BATCH} sets for all, rate 1e-3 (for poolings the better of 1e-3 and "
        "3e-4), one seed, 12,800 test sets. Max pooling is made for this task and is shown, as in the paper, as a "
        "bound; a softmax over the elements can come near it, so that pooling by a learned product does well too. "
        "Mean and sum pooling do not come down to the paper's 2.1 and 1.9 in these steps. That ISAB keeps the quality "
        "on large sets (clustering, point clouds) is not shown here.",
    )
