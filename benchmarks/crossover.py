"""From which length on each training-free sparse mechanism beats SDPA, its choice of blocks included.

Queries and keys are smooth along the sequence with noise on top, so that there is something to choose; every mechanism
runs at its sparser settings (the catalogue's ``sweep``), at each length beside SDPA in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Report, Row, ratio
from regard.bench.fields import field_tokens
from regard.bench.measure import interleaved
from regard.mechanism import Mechanism
from regard.registry import build, catalogue, describe

_HEADS, _DIM = 4, 64
# Of each mechanism's sweep, the second sparsest setting.
_SETTING = 1


def run(report: Report, quick: bool) -> list[Row]:
    """The length at which a mechanism overtakes, and its speed at the longest."""
    lengths, rounds = ((1024, 2048), 1) if quick else ((4096, 8192, 16384, 32768), 3)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for length in lengths:
        for causal in (True, False):
            calls, shares = _calls(length, causal)
            report(f"crossover: {length} tokens, {'causal' if causal else 'all keys'}, {len(calls)} calls")
            times = interleaved(calls, rounds)
            for name, share in shares.items():
                found.setdefault(name, []).append((length, ratio(times, "SDPA", name), share))
    return [_row(name, results) for name, results in found.items()]


def _calls(length: int, causal: bool) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    grid = _space(length)
    tensors = field_tokens((length,) if causal else grid, _HEADS, _DIM, seed=0, noise=0.3, size=1.2, waves=length / 64)
    sdpa = partial(F.scaled_dot_product_attention, *tensors, is_causal=causal)
    calls: dict[str, Callable[[], object]] = {"SDPA": sdpa}
    shares = {}
    for entry in catalogue():
        if not entry.sweep:
            continue
        mechanism = _built(entry.key, {**entry.compare, **entry.sweep[_sparser(entry.sweep)]})
        if ("causal-self" in mechanism.patterns) != causal:
            continue
        space = grid if not causal and 3 in mechanism.grid_axes else None
        name = f"{entry.key}, {'causal' if causal else 'all keys'}"
        calls[name] = _inference(mechanism, tensors, causal, space)
        shares[name] = mechanism.pairs(*tensors, causal=causal, grid=space) or 0.0
        if causal:
            shares[name] *= 2 * length / (length + 1)
    return calls, shares


def _inference(
    mechanism: Mechanism, tensors: tuple[Tensor, Tensor, Tensor], causal: bool, grid: tuple[int, ...] | None
) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> Tensor:
        out: Tensor = mechanism(*tensors, causal=causal, grid=grid)
        return out

    return call


def _sparser(sweep: tuple[Mapping[str, Any], ...]) -> int:
    return min(_SETTING, len(sweep) - 1)


def _space(length: int) -> tuple[int, int, int]:
    """Frames of a square or twice as wide picture: 8 x 16 x 32 for 4096 tokens."""
    side = 1 << (int(math.log2(length)) - 3) // 2
    return (8, side, length // 8 // side)


def _built(name: str, options: Mapping[str, Any]) -> Mechanism:
    context = {"num_heads": _HEADS, "num_kv_heads": _HEADS, "head_dim": _DIM, "layer_index": 0, "num_layers": 1}
    module = build(name, options, **context)
    assert isinstance(module, Mechanism)
    return module.eval()


def _row(name: str, results: list[tuple[int, float, float]]) -> Row:
    """How many times faster at the longest, and from where on."""
    first = next((at for at, _ in enumerate(results) if all(speed > 1 for _, speed, _ in results[at:])), None)
    won = "not yet" if first is None else f"from {results[first][0]} tokens on"
    speeds = ", ".join(f"{length}: {speed:.2f}" for length, speed, _ in results)
    length, speed, share = results[-1]
    options = describe(name.partition(",")[0]).sweep
    note = f"wins {won} ({speeds}); {share:.1%} of the pairs at {length}; {dict(options[_sparser(options)])}"
    return Row(f"{name}, {length} tokens", speed, "x SDPA's speed", None, note=note)
