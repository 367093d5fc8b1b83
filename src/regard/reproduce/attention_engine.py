"""AttentionEngine on a CPU: how much code a variant is, that it is right, and what causal tiles save and take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.measure import interleaved, median_ratio, one_thread
from regard.dense.attention_engine import VARIANTS, AttentionEngine
from regard.dense.linear_attention_engine import (
    mamba2_engine,
    retention_decay,
    retention_engine,
    simple_gla_engine,
)
from regard.dense.program import program
from regard.kernels.online_functions import ONLINE
from regard.kernels.schedule import H100, schedule
from regard.masks import Causal
from regard.reproduce.finding import Finding

LENGTH, DIM, BLOCK, LINES = 4096, 64, 128, 40
# For equality in float64 and for times of both passes.
SHORT, TIMED, HEADS = 300, 2048, 2
Tensors = tuple[Tensor, Tensor, Tensor]


def run(report: Callable[[str], None]) -> Finding:
    """Lines, differences, shares of the work, sizes of score tensors, ratios of time."""
    lines = _lines()
    report("lines of user code: " + ", ".join(f"{name} {count}" for name, count in lines.items()))
    with one_thread():
        apart = {name: _apart(name) for name in VARIANTS} | _recurrent_apart()
        report("largest differences: " + ", ".join(f"{name} {most:.1g}" for name, most in apart.items()))
        shares = _work()
        report(f"share of the dense work: forward {shares[0]:.6f}, backward {shares[1]:.6f}")
        tile, whole = (_largest(backend) for backend in ("tiled", "reference"))
        report(f"largest tensor of scores: tiled {tile}, whole {whole}")
        ratios = _times()
        report(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    measured: dict[str, Any] = {f"lines_{name}": count for name, count in lines.items()}
    measured |= {f"largest_difference_{name}": float(f"{most:.1g}") for name, most in apart.items()}
    expected = 0.5 + 0.5 * BLOCK / LENGTH
    measured |= {
        "causal_flops_over_dense_forward": shares[0],
        "causal_flops_over_dense_backward": shares[1],
        "causal_flops_expected": expected,
        "largest_score_tensor_tiled": tile,
        "largest_score_tensor_whole_map": whole,
        "h100_configurations_for_dim_128": len(schedule(_tensors(4096, 128, torch.float16, "meta"), H100).configs),
    }
    measured |= {name: round(ratio, 2) for name, ratio in ratios.items()}
    holds = (
        max(lines.values()) <= LINES
        and max(apart.values()) < 1e-9
        and shares == (expected, expected)
        and tile == BLOCK * BLOCK
        and whole == LENGTH * LENGTH
    )
    return Finding(
        measured,
        holds,
        "Lines are those that a user writes for a variant, blank lines and documentation left out: the online "
        "function, the score's, or the modifications of the recurrent pattern. Differences are the largest of output "
        f"and gradients, float64, causal, {SHORT} tokens, tiles of 64 x 48, between the engine and the whole map under "
        "autograd (recurrent: the masked product). Work: all matrix products that ran, causal over all, "
        f"N = {LENGTH}, tiles of {BLOCK} x {BLOCK}. Scores: the most numbers of a tensor queries x keys in both "
        f"passes, of one head. Times: one thread, float32, {HEADS} heads of {DIM}, {TIMED} tokens, causal, forward and "
        "backward, medians of ratios of 5 interleaved rounds; whole_over_engine: the whole map under autograd (which "
        "computes hidden pairs too), program_over_engine: regard.program in the same tiles (more than 1: the engine is "
        "faster), sdpa_over_engine: torch's fused causal kernel. Holds if no variant takes more than "
        f"{LINES} lines, differences are below 1e-9, work is exactly 0.5 + 0.5 block / N in both passes and scores "
        "exist for one tile at a time. The paper's times, up to 10.4 times faster than what there was on an H100 and "
        "an MI250, are those of generated kernels and are not reproduced: here tiles are torch calls.",
    )


def _tensors(length: int, dim: int, dtype: torch.dtype, device: str = "cpu", heads: int = 1) -> Tensors:
    generator = None if device == "meta" else torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(1, heads, length, dim, generator=generator, dtype=dtype, device=device) for _ in range(3)
    )
    return query, key, value


def _engine(variant: str, tensors: Tensors, mask: Causal | None = None, **options: Any) -> AttentionEngine:
    score_mod, function = VARIANTS[variant]
    return AttentionEngine(tensors, None, score_mod, mask, function, scale=tensors[0].shape[3] ** -0.5, **options)


def _lines() -> dict[str, int]:
    """Of the code that a variant is."""
    found = {}
    for name, (score_mod, function) in VARIANTS.items():
        found[name] = sum(_counted(part) for part in (score_mod, ONLINE[function]) if part is not None)
    for name, make in (("simple_gla", simple_gla_engine), ("mamba2", mamba2_engine)):
        found[name] = _counted(make)
    found["recurrent_retention"] = _counted(retention_engine) + _counted(retention_decay)
    return found


def _counted(part: Any) -> int:
    source = inspect.getsource(part)
    for documented in (part, *(vars(part).values() if inspect.isclass(part) else ())):
        text = getattr(documented, "__doc__", None)
        source = source.replace(f'"""{text}"""', "") if text else source
    return len([line for line in source.splitlines() if line.strip()])


def _weights(variant: str, scores: Tensor) -> Tensor:
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if variant == "softmax":
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)
    hidden = scores.masked_fill(~seen, 0)
    if variant == "retention":
        return hidden / hidden.abs().sum(-1, keepdim=True).clamp_min(1)
    return (scores.sigmoid() if variant == "sigmoid" else scores.relu()).masked_fill(~seen, 0)


def _difference(found: Tensor, meant: Tensor, given: tuple[Tensor, ...]) -> float:
    """The largest of outputs and gradients."""
    pairs = [(found, meant)]
    pairs += zip(
        torch.autograd.grad(found.sin().sum(), given), torch.autograd.grad(meant.sin().sum(), given), strict=True
    )
    return max(float((a - b).abs().max()) for a, b in pairs)


def _apart(variant: str) -> float:
    query, key, value = tensors = _tensors(SHORT, DIM, torch.float64)
    for tensor in tensors:
        tensor.requires_grad_()
    out = _engine(variant, tensors, Causal(), block_m=64, block_n=48)(*tensors)
    return _difference(out, _weights(variant, query @ key.mT * DIM**-0.5) @ value, tensors)


def _recurrent_apart() -> dict[str, float]:
    query, key, value = tensors = _tensors(SHORT, DIM, torch.float64)
    gate = torch.randn(1, 1, SHORT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dt, a = F.softplus(gate), torch.tensor([-0.5], dtype=torch.float64)
    for tensor in tensors:
        tensor.requires_grad_()
    cases = {
        "simple_gla": (simple_gla_engine, (F.logsigmoid(gate),), F.logsigmoid(gate), DIM**-0.5),
        "recurrent_retention": (retention_engine, (retention_decay(query),), retention_decay(query), DIM**-0.5),
        "mamba2": (mamba2_engine, (dt, a, dt), dt * a, dt[..., None, :]),
    }
    found = {}
    for name, (make, given, decay, factor) in cases.items():
        run_ = decay.cumsum(-1)
        fade = (run_[..., :, None] - run_[..., None, :]).exp().tril()
        found[name] = _difference(make(tensors)(*tensors, *given), (query @ key.mT * factor * fade) @ value, tensors)
    return found


def _work() -> tuple[float, float]:
    """Matrix products of a causal call over those of a dense one, forward and backward."""
    counts = []
    for mask in (Causal(), None):
        tensors = _tensors(LENGTH, DIM, torch.float32)
        for tensor in tensors:
            tensor.requires_grad_()
        engine = _engine("softmax", tensors, mask, block_m=BLOCK, block_n=BLOCK)
        with FlopCounterMode(display=False) as forward:
            out = engine(*tensors)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    return counts[0][0] / counts[1][0], counts[0][1] / counts[1][1]


class _Scores(TorchDispatchMode):
    """The most numbers of a tensor whose last two axes are queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and not {1, DIM} & set(tensor.shape[2:]):
                self.most = max(self.most, tensor.numel())
        return out


def _largest(backend: Any) -> int:
    tensors = _tensors(LENGTH, DIM, torch.float32)
    for tensor in tensors:
        tensor.requires_grad_()
    engine = _engine("softmax", tensors, Causal(), block_m=BLOCK, block_n=BLOCK, backend=backend)
    with _Scores() as seen:
        engine(*tensors).sum().backward()
    return seen.most


def _times() -> dict[str, float]:
    """Of both passes, the others' over the engine's."""
    tensors = _tensors(TIMED, DIM, torch.float32, heads=HEADS)
    for tensor in tensors:
        tensor.requires_grad_()
    query, key, value = tensors

    def both(call: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call().sum(), tensors)

    ratios = {}
    for variant in VARIANTS:
        engine = _engine(variant, tensors, Causal())
        same = program(mask_mod=Causal(), rowwise=variant, backend="tiled", tile=(BLOCK, BLOCK))
        calls = {
            "engine": both(lambda engine=engine: engine(*tensors)),  # type: ignore[misc]
            "whole": both(lambda v=variant: _weights(v, query @ key.mT * DIM**-0.5) @ value),  # type: ignore[misc]
            "program": both(lambda same=same: same(*tensors)),  # type: ignore[misc]
        }
        if variant == "softmax":
            calls["sdpa"] = both(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
        taken = interleaved(calls)
        for name in list(calls)[1:]:
            ratios[f"time_{name}_over_engine_{variant}"] = median_ratio(taken[name], taken["engine"])
    return ratios
