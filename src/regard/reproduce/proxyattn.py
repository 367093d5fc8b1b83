"""ProxyAttn: how much attention one proxy head finds for eight, against block means of each head and an oracle; and
what budgets of their own are worth to heads.

The heads share a pattern and differ by noise and by temperature. The pattern: topics that change slowly, a sink on the
first tokens, and needles, single keys in unrelated places that all queries of some later block look for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.measure import interleaved, median_ratio
from regard.kernels import dense_attention
from regard.layout import BlockLayout
from regard.masks import Causal
from regard.reproduce.finding import Finding
from regard.sparse.metrics import head_agreement
from regard.sparse.proxyattn import head_budgets, proxy_block_mask, proxy_block_scores
from regard.sparse.scoring import BlockView, mean_scores

HEADS, LENGTH, DIM, BLOCK = 8, 4096, 64, 64
BLOCKS = LENGTH // BLOCK
DENSITY, GAMMA = 0.1, 0.95
SEEDS = range(10, 16)


def similar_heads(
    seed: int,
    needles: int = 8,
    pull: float = 5.0,
    temperatures: tuple[float, float] = (0.4, 2.0),
    noise: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(1, 8, 4096, 64)``. needles: that each block of queries looks for. pull: how strongly.
    temperatures: factors on the logits of the flattest and of the sharpest head. noise: of each head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    walk = F.layer_norm(normal(LENGTH // 16, DIM).cumsum(0), (DIM,)).repeat_interleave(16, 0)
    query, key = 1.2 * walk + 0.6 * normal(LENGTH, DIM), 1.2 * walk + 0.6 * normal(LENGTH, DIM)
    sink = F.normalize(normal(DIM), dim=0)
    query, key[:4] = query + 3 * sink, key[:4] + 12 * sink
    for block in range(2, BLOCKS):
        for needle in torch.randint((block - 1) * BLOCK, (needles,), generator=generator).tolist():
            direction = F.normalize(normal(DIM), dim=0)
            key[needle] = key[needle] + 10 * direction
            query[block * BLOCK : (block + 1) * BLOCK] += pull * direction
    low, high = (t**0.5 for t in temperatures)
    factors = torch.linspace(low, high, HEADS)[torch.randperm(HEADS, generator=generator)].square()
    query = factors.view(1, HEADS, 1, 1) * (query + noise * normal(1, HEADS, LENGTH, DIM))
    return query, key + noise * normal(1, HEADS, LENGTH, DIM)


@dataclass
class Judged:
    """recall: share of each head's attention inside the chosen blocks ``(heads,)``. density: of the visible blocks."""

    recall: Tensor
    density: float

    @property
    def mean(self) -> float:
        """Recall over all heads."""
        return float(self.recall.mean())

    @property
    def worst(self) -> float:
        """Recall of the worst head."""
        return float(self.recall.min())


class Case:
    """One input, its true block masses, and scores of its blocks."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key
        self.visible = BlockLayout.of(Causal(), LENGTH, LENGTH, BLOCK, BLOCK).visit
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        masses, sample = [], []
        for head in range(HEADS):
            weights = (query[0, head] @ key[0, head].T / DIM**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
            masses.append(weights.view(BLOCKS, BLOCK, BLOCKS, BLOCK).sum((1, 3)) / BLOCK)
            sample.append(weights[LENGTH // 2 :: BLOCK])
        self.mass = torch.stack(masses)[None]
        self.agreement = head_agreement(torch.stack(sample)[None], 100)[0]

    def scores(self, groups: int, stride: int) -> Tensor:
        """Those of proxy heads."""
        return proxy_block_scores(self.query, self.key, BLOCK, groups, stride)

    def mean_scores(self) -> Tensor:
        """Those of block means, head by head."""
        view = BlockView(BlockLayout.of(Causal(), LENGTH, LENGTH, BLOCK, BLOCK), None, True, DIM**-0.5)
        return self.sighted(mean_scores(self.query, self.key, view))

    def sighted(self, scores: Tensor) -> Tensor:
        """``-inf`` out of sight."""
        return scores.masked_fill(~self.visible, float("-inf"))

    def judge(self, scores: Tensor, budgets: Tensor | float) -> Judged:
        """The best blocks by ``scores``; a float is the share of its visible blocks that every row gets."""
        if isinstance(budgets, float):
            rows = torch.arange(1, BLOCKS + 1)
            budgets = (rows * budgets).ceil().long().expand(1, HEADS, -1)
        mask = proxy_block_mask(scores, budgets)
        density = float(mask.sum() / (self.visible.sum() * HEADS))
        return Judged((self.mass * mask).sum(-1).mean(-1)[0], density)

    def density_for(self, scores: Tensor, reaches: Callable[[Judged], bool]) -> float:
        """The least density at which one share for all heads reaches a goal."""
        tried = (self.judge(scores, share / 100) for share in range(1, 101))
        return next(judged.density for judged in tried if reaches(judged))


def run(report: Callable[[str], None]) -> Finding:
    """Recall by score at a fixed share of blocks, density by kind of budget at equal recall, and time."""
    rows: list[dict[str, float]] = []
    for seed in SEEDS:
        case = Case(*similar_heads(seed))
        proxy = case.scores(1, 4)
        found = {
            "oracle": case.judge(case.sighted(case.mass), DENSITY),
            "each_head_for_itself": case.judge(case.scores(HEADS, 4), DENSITY),
            "proxy": case.judge(proxy, DENSITY),
            "proxy_stride_1": case.judge(case.scores(1, 1), DENSITY),
            "pooled": case.judge(case.mean_scores(), DENSITY),
        }
        row = {f"{name}_recall": judged.mean for name, judged in found.items()}
        row |= {f"{name}_density": judged.density for name, judged in found.items()}
        row["agreement_of_heads_on_top_100"] = float(case.agreement[~torch.eye(HEADS, dtype=torch.bool)].mean())
        row |= _budgets(case, proxy, "own_budgets")
        other = Case(*similar_heads(seed, noise=0.6))
        row["more_noise_oracle_recall"] = other.judge(other.sighted(other.mass), DENSITY).mean
        row["more_noise_proxy_recall"] = other.judge(other.scores(1, 4), DENSITY).mean
        few = Case(*similar_heads(seed, needles=4, pull=6.0, temperatures=(0.8, 2.0)))
        row |= _budgets(few, few.scores(1, 4), "few_needles_own_budgets")
        rows.append(row)
        report(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    measured = {f"{name}_mean": statistics.mean(row[name] for row in rows) for name in rows[0]}
    measured["proxy_below_oracle_largest"] = max(row["oracle_recall"] - row["proxy_recall"] for row in rows)
    measured["pooled_below_proxy_smallest"] = min(row["proxy_recall"] - row["pooled_recall"] for row in rows)
    for kind in ("own_budgets", "few_needles_own_budgets"):
        for goal in ("mean", "worst"):
            ratios = [row[f"{kind}_density"] / row[f"{kind}_one_share_density_same_{goal}"] for row in rows]
            measured[f"{kind}_density_ratio_same_{goal}_recall_mean"] = statistics.mean(ratios)
            measured[f"{kind}_density_ratio_same_{goal}_recall_largest"] = max(ratios)
    measured |= _speed(*similar_heads(0))
    report(f"estimation of dense attention's time: {measured['time_ratio_estimation_to_dense']:.3f}")
    holds = (
        measured["oracle_recall_mean"] - measured["proxy_recall_mean"] < 0.05
        and measured["proxy_recall_mean"] - measured["pooled_recall_mean"] > 0.1
        and measured["own_budgets_density_ratio_same_mean_recall_mean"] < 1
        and measured["own_budgets_density_ratio_same_worst_recall_mean"] < 1
        and measured["time_ratio_estimation_to_dense"] < 2 / HEADS
    )
    note = (
        f"{HEADS} heads, {LENGTH} tokens, blocks of {BLOCK}, one proxy head, stride 4, mean of {len(SEEDS)} seeds; "
        f"fixed budgets are {DENSITY} of the visible blocks of a row, first and own block besides. Holds if the proxy "
        "stays within 0.05 of the oracle's recall and 0.1 above pooled scores, if budgets of their own (gamma "
        f"{GAMMA}) take fewer blocks than one share for all heads at the same recall, of all heads and of the worst, "
        "and if estimation at stride 1 costs less than twice groups / heads of dense attention. The budget is read "
        "off the last block of queries, so it is as good as that block is typical: on single seeds it takes more "
        "blocks than one share for all would, and with few, strong needles it gains next to nothing at the same mean "
        "recall. The margin to the oracle is narrow: single seeds exceed 0.05, and so does the mean where heads have "
        "twice the noise of their own (more_noise). Accuracy of large models and the 10.3 times of a GPU would take "
        "those."
    )
    return Finding(measured, holds, note)


def _budgets(case: Case, scores: Tensor, name: str) -> dict[str, float]:
    """Budgets by head, and the density at which one share for all heads does as well."""
    own = case.judge(scores, head_budgets(case.query, case.key, BLOCK, GAMMA))
    return {
        f"{name}_recall": own.mean,
        f"{name}_worst_recall": own.worst,
        f"{name}_density": own.density,
        f"{name}_one_share_density_same_mean": case.density_for(scores, lambda judged: judged.mean >= own.mean),
        f"{name}_one_share_density_same_worst": case.density_for(scores, lambda judged: judged.worst >= own.worst),
    }


def _speed(query: Tensor, key: Tensor) -> dict[str, float]:
    taken = interleaved(
        {
            "dense": lambda: dense_attention(query, key, key, causal=True),
            "all": lambda: proxy_block_scores(query, key, BLOCK, groups=HEADS),
            "one": lambda: proxy_block_scores(query, key, BLOCK),
            "one, stride 4": lambda: proxy_block_scores(query, key, BLOCK, stride=4),
        },
        rounds=5,
    )
    return {
        "time_ratio_estimation_to_dense": median_ratio(taken["one"], taken["dense"]),
        "time_ratio_estimation_stride_4_to_dense": median_ratio(taken["one, stride 4"], taken["dense"]),
        "time_ratio_one_group_to_eight": median_ratio(taken["one"], taken["all"]),
    }
