"""SpargeAttn: how sparse calibrated selection gets at a bounded error, on three kinds of attention, and what its gate
is for.

Inputs are synthetic: a smooth field on a 16 x 16 x 16 grid (neighbours in space have like queries and keys), a
language-like sequence (slow drift, a sink, needles: keys in unrelated stretches that some later queries look for), and
white noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels import block_sparse_attention
from regard.kernels.tiled import tiled_attention
from regard.layout import BlockLayout
from regard.reproduce.finding import Finding
from regard.sparse.selection import top_p_mask
from regard.sparse.spargeattn import calibrate_sparge, sparge_block_mask

LENGTH, DIM, BLOCK_Q, BLOCK_K = 4096, 64, 128, 64
SIMS = (-1.0, 0.2, 0.4, 0.6)
Inputs = tuple[Tensor, Tensor, Tensor]


def smooth_field(generator: torch.Generator) -> Inputs:
    """Random Fourier features of the place on the grid, in the order of 4 x 4 x 4 cubes: neighbours attend to one
    another."""
    place = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 16)] * 3, indexing="ij"), -1)
    cubes = place.view(4, 4, 4, 4, 4, 4, 3).permute(0, 2, 4, 1, 3, 5, 6).reshape(LENGTH, 3)
    waves = torch.randn(3, DIM, generator=generator) * 3
    features = (cubes @ waves + 6.28 * torch.rand(DIM, generator=generator)).cos() * 1.5
    noise = 0.3 * torch.randn(2, LENGTH, DIM, generator=generator)
    value = torch.randn(LENGTH, DIM, generator=generator) + features
    return (features + noise[0])[None, None], (features + noise[1])[None, None], value[None, None]


def language_like(generator: torch.Generator) -> Inputs:
    """A slow walk through topics, a sink on the first tokens, and two tables: stretches of unrelated keys, single ones
    of which are needles that a few later queries look for."""
    walk = F.layer_norm(torch.randn(LENGTH, DIM, generator=generator).cumsum(0), (DIM,)) * 2.2
    query = walk + 0.4 * torch.randn(LENGTH, DIM, generator=generator)
    key = walk + 0.4 * torch.randn(LENGTH, DIM, generator=generator)
    sink = F.normalize(torch.randn(DIM, generator=generator), dim=0)
    query, key[:4] = query + 4 * sink, key[:4] + 10 * sink
    for start in (640, 1600):
        key[start : start + 128] = 2.2 * torch.randn(128, DIM, generator=generator)
        for row in torch.randint(start, start + 128, (4,), generator=generator).tolist():
            looking = torch.randint(start + 600, LENGTH, (16,), generator=generator)
            query[looking] = query[looking] * 0.3 + key[row] * 1.5
    return query[None, None], key[None, None], torch.randn(1, 1, LENGTH, DIM, generator=generator)


def white_noise(generator: torch.Generator) -> Inputs:
    """Independent normal numbers: attention is spread thin and nothing can be left out."""
    query, key, value = torch.randn(3, 1, 1, LENGTH, DIM, generator=generator)
    return query, key, value


def relative_l1(out: Tensor, exact: Tensor) -> Tensor:
    """Error of each block of queries, and of all of them last."""
    gap, size = (out - exact).abs().view(-1, BLOCK_Q * DIM).sum(-1), exact.abs().view(-1, BLOCK_Q * DIM).sum(-1)
    return torch.cat((gap / size, gap.sum(0, keepdim=True) / size.sum(0, keepdim=True)))


def run(report: Callable[[str], None]) -> Finding:
    """Calibrated sparsity of three families; the gate at equal density; int8 with and without smoothing."""
    measured: dict[str, float] = {}
    base = BlockLayout.of(None, LENGTH, LENGTH, BLOCK_Q, BLOCK_K)

    def attend(inputs: Inputs, mask: Tensor) -> Tensor:
        out = block_sparse_attention(*inputs, base.only(mask))
        assert isinstance(out, Tensor)
        return out

    for name, family in (("smooth", smooth_field), ("language", language_like), ("noise", white_noise)):
        inputs = family(torch.Generator().manual_seed(0))
        query, key, value = inputs
        exact = F.scaled_dot_product_attention(query, key, value)
        gated = calibrate_sparge([inputs], 0.07, 0.08, sims=SIMS, steps=6)
        plain = calibrate_sparge([inputs], 0.07, 0.08, sims=(-1.0,), steps=6)
        # The oracle ranks blocks by the attention that they truly hold.
        mass = (
            (query @ key.mT / DIM**0.5).softmax(-1).view(1, 1, LENGTH // BLOCK_Q, BLOCK_Q, LENGTH // BLOCK_K, BLOCK_K)
        )
        shares = mass.sum((3, 5)) / BLOCK_Q
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            error = relative_l1(attend(inputs, top_p_mask(shares, middle)), exact)[-1]
            low, high = (low, middle) if float(error) < 0.07 else (middle, high)
        oracle = 1 - float(top_p_mask(shares, high).float().mean())
        # The worst block of queries at the calibrated setting, against plain top-p of the same density.
        mask = sparge_block_mask(query, key, BLOCK_Q, BLOCK_K, gated.sim, gated.top_p)
        density = float(mask.float().mean())
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            found = float(sparge_block_mask(query, key, BLOCK_Q, BLOCK_K, -1.0, middle).float().mean())
            low, high = (middle, high) if found < density else (low, middle)
        other = sparge_block_mask(query, key, BLOCK_Q, BLOCK_K, -1.0, high)
        with_gate = float(relative_l1(attend(inputs, mask), exact)[:-1].max())
        without = float(relative_l1(attend(inputs, other), exact)[:-1].max())
        measured |= {
            f"{name}_sparsity_calibrated": gated.sparsity[0],
            f"{name}_sparsity_without_gate": plain.sparsity[0],
            f"{name}_sparsity_oracle": oracle,
            f"{name}_relative_l1_calibrated": gated.error[0],
            f"{name}_density_calibrated": density,
            f"{name}_worst_block_relative_l1_with_gate": with_gate,
            f"{name}_worst_block_relative_l1_without_gate_equal_density": without,
        }
        report(
            f"{name}: " + ", ".join(f"{k.removeprefix(name + '_')} {v:.3f}" for k, v in measured.items() if name in k)
        )
    small, gains = BlockLayout.of(None, 1024, 1024, BLOCK_Q, BLOCK_K), []
    for name, family in (("smooth", smooth_field), ("language", language_like), ("noise", white_noise)):
        query, key, value = (x[:, :, :1024] for x in family(torch.Generator().manual_seed(1)))
        key = key + 20
        exact, errors = F.scaled_dot_product_attention(query, key, value), []
        for smooth in (True, False):
            out, _ = tiled_attention(query, key, value, small, quant="int8", smooth=smooth)
            errors.append(float((out - exact).abs().sum() / exact.abs().sum()))
        measured[f"{name}_int8_relative_l1_smoothed"], measured[f"{name}_int8_relative_l1_unsmoothed"] = errors
        gains.append(errors[1] / errors[0])
        report(f"{name}: int8 error {errors[0]:.4f} with smoothing, {errors[1]:.4f} without")
    holds = (
        measured["smooth_sparsity_calibrated"] > 0.5
        and measured["noise_sparsity_calibrated"] < 0.1
        and measured["language_worst_block_relative_l1_with_gate"]
        < measured["language_worst_block_relative_l1_without_gate_equal_density"]
        and measured["smooth_int8_relative_l1_smoothed"] < 0.01
        and min(gains) > 3
    )
    note = (
        "Relative L1 error at most 0.07 by calibration on the same synthetic input, 4096 tokens, one head of 64, "
        "blocks of 128 x 64. Holds if smooth fields exceed 0.5 sparsity and noise stays below 0.1, if the gate "
        "lowers the worst block's error on the language-like input at equal density, and if, with an offset of 20 "
        "on all keys, int8 stays below 0.01 with smoothing on the smooth field and is three times worse without "
        "on every family; the expected 0.01 is met on the smooth field alone, the other two stay near 0.02 and "
        "0.01. End-to-end metrics of large models would take those models and a GPU."
    )
    return Finding(measured, holds, note)
