"""Peak memory of dense attention over length: each variant in tiles, or fused, against its plain form.

These are the variants whose score is a function of one query and one key. The form that runs by default (tiles of
queries that the backward pass computes again, or the fused softmax kernel) stands against the form that keeps whole
maps, at three lengths, each form in a process of its own.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import regard
from benchmarks.rows import Report, Row, peak_growth, run_alone
from regard.kernels import use_backend
from regard.mechanism import Layer

HEADS, DIM = 6, 64
FORMS = ("default", "plain")


@dataclass(frozen=True)
class Variant:
    """What is built: a registered name with options. heads: so many that one tile holds no map at the shortest length.
    plain: the context in which the kernels keep whole maps."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: int = HEADS
    dim: int = DIM
    plain: str = "whole"

    def build(self, length: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module and its inputs."""
        torch.manual_seed(0)
        width = self.heads * self.dim
        module = regard.build(
            self.name, self.options, num_heads=self.heads, head_dim=self.dim, embed_dim=width, layer_index=0
        ).eval()
        layer = isinstance(module, Layer)
        shape = (1, length, width) if layer else (1, self.heads, length, self.dim)
        return module, tuple(torch.randn(shape).requires_grad_() for _ in range(1 if layer else 3))


def _composed(count: int = HEADS, **options: Any) -> Variant:
    return Variant("dense_attention", options, count)


VARIANTS: dict[str, Variant] = {
    "full": Variant("full", plain="reference"),
    "gda": Variant("gda", {"num_noise_heads": 2}, plain="reference"),
    "moh": Variant("moh", plain="reference"),
    "nexus": Variant("nexus", plain="reference"),
    "better_attention": Variant("better_attention_efficient", plain="reference"),
    "lla": Variant("lla", heads=2, dim=32),
    "neural_attention": Variant("neural_attention", heads=2),
    "comateformer": Variant("comateformer", heads=2),
    "dual_attention": Variant("dual_attention", {"relational_heads": 6}),
    "afa": Variant("afa", heads=4),
    "probabilistic_attention": Variant("probabilistic_attention"),
    "graph_aware_attention": Variant("graph_aware_attention", {"threshold_mode": "silu"}),
    "score low_rank": _composed(score="low_rank"),
    "score additive": _composed(score={"additive": {"hidden": 8}}, count=1),
    "score distance": _composed(score="distance"),
    "score gaussian": _composed(score="gaussian"),
    "score filtered": _composed(score="filtered", count=2),
    "score relational": _composed(score={"relational": {"num_relations": 2}}, count=2),
    "normaliser tempered": _composed(normalizer={"tempered": {"learned": True}}),
    "normaliser length_scaled": _composed(normalizer="length_scaled"),
    "normaliser sigmoid": _composed(normalizer="sigmoid"),
    "normaliser relu": _composed(normalizer="relu"),
    "normaliser softplus": _composed(normalizer="softplus"),
    "normaliser entmax": _composed(normalizer="entmax"),
    "maps key_query_conv": _composed(maps="key_query_conv", count=4),
    "maps head_mix": _composed(maps="head_mix"),
    "maps difference": _composed(maps="difference", count=4),
    "maps edges": _composed(maps="edges"),
    "heads grouped": _composed(heads="grouped"),
    "heads long_short": _composed(heads="long_short"),
}


def run(report: Report, quick: bool) -> list[Row]:
    """Growth of the peak with a doubling of the length: 2 is linear, 4 is quadratic; less where a tile, which has one
    size at every length, is most of it."""
    lengths = (256, 384, 576) if quick else (1024, 1536, 2304)
    known = {entry.key for entry in regard.catalogue() if entry.module is not None}
    names = [name for name, variant in VARIANTS.items() if variant.name in known]
    rows = []
    for name in names[::6] if quick else names:
        report(f"memory of {name}: {', '.join(map(str, lengths))} tokens")
        peaks = {form: _peaks(name, form, lengths) for form in FORMS}
        for index, what in enumerate(("forward", "forward + backward")):
            default, plain = ([point[index] for point in peaks[form]] for form in FORMS)
            note = (
                f"{_mebibytes(default)} at {', '.join(map(str, lengths))} tokens; whole maps {_mebibytes(plain)}, "
                f"x {_growth(plain, lengths):.2f} per doubling"
            )
            rows.append(Row(f"memory of {name}, {what}", _growth(default, lengths), "per doubling", 2.2, "<=", note))
    return rows


def _peaks(name: str, form: str, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Forward, and forward and backward, at each length."""
    numbers = iter(map(int, run_alone("benchmarks.dense_memory", name, form, *map(str, lengths)).split()))
    return list(zip(numbers, numbers, strict=True))


def _growth(peaks: list[int], lengths: tuple[int, ...]) -> float:
    """With a doubling, from the first length to the last."""
    doublings = math.log2(lengths[-1] / lengths[0])
    return float((peaks[-1] / max(peaks[0], 1)) ** (1 / doublings))


def _mebibytes(peaks: list[int]) -> str:
    return ", ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " MiB"


def peak(name: str, form: str, length: int) -> tuple[int, int]:
    """Bytes that a forward pass, and a forward and backward pass, hold at most beyond what is resident before."""
    variant = VARIANTS[name]
    small, short = variant.build(64)
    module, inputs = variant.build(length)
    with use_backend("auto" if form == "default" else variant.plain):
        for call in (_forward(small, short), _both(small, short)):
            call()  # what libraries set up once is not counted
        return peak_growth(_forward(module, inputs)), peak_growth(_both(module, inputs))


def _causally(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """What is always causal takes no word of it."""
    asked = {"causal": True} if "causal" in inspect.signature(module.forward).parameters else {}
    out: Tensor = module(*inputs, **asked)
    return out


def _forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return _causally(module, inputs)

    return call


def _both(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    wanted = [*inputs, *module.parameters()]

    def call() -> object:
        out = _causally(module, inputs)
        return torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return call


if __name__ == "__main__":
    print(*(number for length in sys.argv[3:] for number in peak(sys.argv[1], sys.argv[2], int(length))))
