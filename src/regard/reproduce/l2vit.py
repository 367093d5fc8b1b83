"""L2ViT: how flat rectified linear attention is beside softmax, and what local concentration gives back on digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.digits import DigitImages, digits_accuracy
from regard.bench.measure import one_thread
from regard.bench.training import fit
from regard.layers.maps import PatchEmbed
from regard.linear.l2vit import concentration
from regard.models.l2vit import LGABlock
from regard.reproduce.finding import Finding

WIDTH, HEADS, DEPTH, SEEDS, STEPS = 32, 2, 4, 3, 300
GRID, HEAD_DIM = (14, 14), 32
# The wider MLP has as many parameters as the concentration module.
VARIANTS: dict[str, dict[str, Any]] = {
    "with_concentration": {"mlp_ratio": 2.0},
    "without": {"mlp_ratio": 2.0, "enhanced": False},
    "without_wider_mlp": {"mlp_ratio": 3.6, "enhanced": False},
}


class _Classifier(nn.Module):
    """Digits of 16 x 16 pixels as 8 x 8 tokens, blocks of linear global attention alone, mean pooling."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed = PatchEmbed(1, WIDTH, 2)
        self.blocks = nn.ModuleList(LGABlock(WIDTH, HEADS, **options) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        tokens, grid = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens, grid=grid)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


def _entropies() -> dict[str, float]:
    """Mean entropy of rows, as a share of ``log N``, on Gaussian queries and keys of a 14 x 14 map."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(8, 196, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = query @ key.mT / HEAD_DIM**0.5
    maps = {
        "relu_linear": query.relu() @ key.relu().mT,
        "softmax": logits.softmax(-1),
        "softmax_of_4_times_the_logits": (4 * logits).softmax(-1),
    }
    found = {name: concentration(attn, GRID) for name, attn in maps.items()}
    return {name: value.entropy / value.flat for name, value in found.items()}


def run(report: Callable[[str], None]) -> Finding:
    """Entropies, then three seeds of each classifier."""
    entropy = _entropies()
    report("row entropy over log N: " + ", ".join(f"{k} {v:.3f}" for k, v in entropy.items()))
    task = DigitImages(scale=2, shift=1)
    accuracy: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sizes: dict[str, int] = {}
    with one_thread():
        for seed in range(SEEDS):
            for name, options in VARIANTS.items():
                torch.manual_seed(seed)
                model = _Classifier(options)
                sizes[name] = sum(p.numel() for p in model.parameters())
                fit(model, task, steps=STEPS, batch_size=32, lr=3e-3, seed=seed)
                accuracy[name].append(100 * digits_accuracy(model.eval(), task))
                report(f"seed {seed}, {name}: accuracy {accuracy[name][-1]:.1f} %")
    mean = {name: sum(values) / SEEDS for name, values in accuracy.items()}
    flat = entropy["relu_linear"] > 0.95 and entropy["softmax_of_4_times_the_logits"] < 0.8
    beats = mean["with_concentration"] > max(mean["without"], mean["without_wider_mlp"])
    measured = {
        **{f"row_entropy_over_log_n_{name}": round(value, 3) for name, value in entropy.items()},
        **{f"accuracy_percent_{name}_mean_of_{SEEDS}_seeds": round(value, 2) for name, value in mean.items()},
        **{f"accuracy_percent_{name}_by_seed": [round(v, 2) for v in values] for name, values in accuracy.items()},
        **{f"parameters_{name}": count for name, count in sizes.items()},
        "linear_is_flat_and_softmax_is_not": flat,
        "concentration_helps": beats,
    }
    return Finding(
        measured,
        flat and beats,
        "Holds if rows of rectified linear attention on Gaussian queries and keys (196 tokens, width 32) have more"
        " than 0.95 of the largest entropy and softmax of four times the usual logits less than 0.8, and on digits"
        " four blocks of linear global attention with the concentration module are, in the mean of three seeds, "
        f"above the same without it and above those with an MLP that is wider by as many parameters. Width {WIDTH},"
        f" 64 tokens, {STEPS} steps of 32, the divisor's bound as in the paper. The paper's claims need ImageNet.",
    )
