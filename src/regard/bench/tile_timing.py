"""The simulator's prediction beside measured time: many neighbourhoods, each in turn with dense attention on the same
tiles by the same executor.

On one thread: where others use the machine too, threads wait for one another, and short calls measure that wait.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from regard.bench.measure import interleaved, median_ratio
from regard.bench.simulate import Sides, sides
from regard.errors import FileFormatError, OptionError
from regard.inspect.saliency import rank_correlation
from regard.kernels import native
from regard.local.gna import GeneralizedNeighborhoodAttention, GNASimulator

__all__ = ["SETTINGS", "Setting", "Timed", "conditions_of", "correlations", "measure", "spearman"]

VERSION = 1
HEADS, HEAD_DIM, ROUNDS = 2, 64, 5


@dataclass(frozen=True)
class Setting:
    """A neighbourhood and the tile, of queries as of keys, that it is computed in."""

    grid: Sides
    window: Sides
    stride: Sides
    tile: Sides

    @classmethod
    def of(cls, grid: Sides, window: int | Sides, stride: int | Sides, tile: Sides) -> Setting:
        """With one number for all axes allowed."""
        axes = len(grid)
        wide = (window,) * axes if isinstance(window, int) else window
        step = (stride,) * axes if isinstance(stride, int) else stride
        return cls(grid, wide, step, tile)

    def __str__(self) -> str:
        return f"{sides(self.grid)}, window {sides(self.window)}, stride {sides(self.stride)}, tile {sides(self.tile)}"


_LINE, _IMAGE, _VIDEO = (6144,), (64, 96), (16, 16, 24)
# Tiles of 64 tokens everywhere, so that equally many visited tiles are equal work.
SETTINGS: tuple[Setting, ...] = (
    *(
        Setting.of(_LINE, window, stride, (64,))
        for window, stride in (
            (64, 64),
            (64, 1),
            (128, 32),
            (256, 256),
            (256, 1),
            (512, 64),
            (512, 1),
            (1024, 1),
            (1024, 256),
            (2048, 64),
            (3072, 1),
            (4608, 64),
        )
    ),
    *(
        Setting.of(_IMAGE, window, stride, tile)
        for window, stride, tile in (
            (8, 8, (8, 8)),
            (8, 1, (8, 8)),
            (13, 1, (8, 8)),
            (13, 1, (4, 16)),
            (13, 1, (2, 32)),
            (16, 8, (8, 8)),
            (16, 4, (8, 8)),
            (16, 1, (8, 8)),
            (24, 8, (8, 8)),
            (24, 1, (8, 8)),
            (24, 1, (16, 4)),
            (32, 16, (8, 8)),
            (32, 1, (8, 8)),
            ((40, 64), 8, (8, 8)),
            (48, 1, (8, 8)),
        )
    ),
    *(
        Setting.of(_VIDEO, window, stride, tile)
        for window, stride, tile in (
            (4, 4, (4, 4, 4)),
            (4, 1, (4, 4, 4)),
            (7, 1, (4, 4, 4)),
            (8, 4, (4, 4, 4)),
            (8, 1, (4, 4, 4)),
            (8, 1, (1, 8, 8)),
            (8, 1, (2, 4, 8)),
            ((8, 8, 12), 4, (4, 4, 4)),
            ((8, 8, 12), 1, (4, 4, 4)),
            (12, 4, (4, 4, 4)),
            (12, 1, (4, 4, 4)),
            ((14, 14, 20), 1, (4, 4, 4)),
        )
    ),
)


@dataclass(frozen=True)
class Timed:
    """A setting's prediction and its time. ``visited``: tiles of keys that a tile of queries visits on average, of
    ``total``; ``ratio``: median over the rounds of its time to dense attention's on the same tiles."""

    grid: Sides
    window: Sides
    stride: Sides
    tile: Sides
    visited: float
    total: int
    ratio: float

    @property
    def setting(self) -> Setting:
        return Setting(self.grid, self.window, self.stride, self.tile)

    @property
    def share(self) -> float:
        """The predicted cost: tiles visited, of all."""
        return self.visited / self.total


def measure(
    results: Path,
    settings: Sequence[Setting] | None = None,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[Sequence[Setting]], Iterable[Setting]] = iter,
) -> list[Timed]:
    """Time those of ``settings`` (by default ``SETTINGS``) that ``results`` does not hold yet, and return all.

    The file is written after each setting.

    Raises OptionError where the file was measured under other conditions, FileFormatError where it is something else.
    """
    settings = SETTINGS if settings is None else settings
    conditions = conditions_of(rounds)
    done = _load(results, conditions)
    for setting in progress([setting for setting in settings if setting not in done]):
        done[setting] = _time(setting, rounds)
        _save(results, conditions, done)
    return [done[setting] for setting in settings]


@torch.no_grad()
def _time(setting: Setting, rounds: int) -> Timed:
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(setting.grid)
    query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(3))
    # A window as large as the grid visits every tile: dense attention by the same executor in the same order.
    mechanisms = {
        "dense": GeneralizedNeighborhoodAttention(setting.grid, tile=setting.tile),
        "sparse": GeneralizedNeighborhoodAttention(setting.window, setting.stride, tile=setting.tile),
    }
    calls = {
        name: (lambda mechanism=mechanism: mechanism(query, key, value, grid=setting.grid))
        for name, mechanism in mechanisms.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = interleaved(calls, rounds=rounds, warmup=1)
    finally:
        torch.set_num_threads(threads)
    simulator = GNASimulator(setting.grid, setting.window, setting.stride, q_tile=setting.tile, kv_tile=setting.tile)
    ratio = median_ratio(taken["sparse"], taken["dense"])
    return Timed(
        setting.grid,
        setting.window,
        setting.stride,
        setting.tile,
        simulator.mean_visited,
        simulator.total_tiles,
        round(ratio, 5),
    )


def conditions_of(rounds: int) -> dict[str, Any]:
    """What the figures hold for; rows of different conditions do not stand in one file."""
    return {
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "rounds": rounds,
        "threads": 1,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "native": native.status().state in ("ready", "not built"),
    }


def _load(results: Path, conditions: dict[str, Any]) -> dict[Setting, Timed]:
    if not results.is_file():
        return {}
    try:
        raw = json.loads(results.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, expected {VERSION}")
        rows = [_row(row) for row in raw["rows"]]
        found = raw["conditions"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{results} holds no timings to go on with ({error}). Remove it, or give another --results."
        ) from error
    if found != conditions:
        changed = {k: (found.get(k), v) for k, v in conditions.items() if found.get(k) != v}
        told = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
        raise OptionError(
            f"{results} was measured under other conditions: {told}. Remove it, or give another --results."
        )
    return {row.setting: row for row in rows}


def _row(raw: Mapping[str, Any]) -> Timed:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Timed(**fields)


def _save(results: Path, conditions: dict[str, Any], done: dict[Setting, Timed]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    partial = results.with_suffix(results.suffix + ".partial")
    rows = [asdict(row) for row in done.values()]
    partial.write_text(
        json.dumps({"version": VERSION, "conditions": conditions, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    partial.replace(results)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation; equal numbers share the mean of their ranks."""
    if len(left) != len(right) or len(left) < 2:
        raise OptionError(
            f"A rank correlation takes two equally long lists of two or more, got {len(left)}, {len(right)}."
        )
    return float(rank_correlation(*(torch.tensor(values, dtype=torch.float64) for values in (left, right))))


def correlations(rows: Sequence[Timed]) -> dict[str, float]:
    """Rank correlation of tiles visited and time, over all settings and over those of each number of axes."""
    groups = {"all": list(rows)}
    for axes in (1, 2, 3):
        groups[f"{axes}-D"] = [row for row in rows if len(row.grid) == axes]
    return {
        name: spearman([row.visited for row in own], [row.ratio for row in own])
        for name, own in groups.items()
        if len(own) > 2
    }
