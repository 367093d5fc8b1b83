"""CBAM on digits among clutter: a small convolutional network, plain, with channel gates alone (SE), and with CBAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.tasks import ClutteredDigits
from regard.bench.training import fit
from regard.feature.cbam import CBAM
from regard.reproduce.finding import Finding

EPOCHS, BATCH, SEEDS, WIDTHS = 25, 50, (0, 1), (8, 16, 32)
FACTORIES: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda channels: nn.Identity(),
    "se": lambda channels: CBAM(channels, 4, pools=("avg",), use_spatial=False),
    "cbam": lambda channels: CBAM(channels, 4),
}


class _Network(nn.Module):
    """Three convolutions, each with batch norm, the module under test, ReLU and pooling; then a global average."""

    def __init__(self, factory: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for before, after in zip((1, *WIDTHS), WIDTHS, strict=False):
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), factory(after), nn.ReLU()
                )
            )
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _gate_ratio(model: _Network, images: Tensor, boxes: Tensor) -> float:
    """Mean spatial gate inside the digit's box over that outside: mean of the stages' gates, on the canvas."""
    size, gates = images.shape[-1], []
    hooks = [
        stage.get_submodule("2.spatial").register_forward_hook(
            lambda m, args, out: gates.append(F.interpolate(out, size))
        )
        for stage in model.stages
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    gate = torch.stack(gates).mean(0)[:, 0]
    place = torch.arange(size) + 0.5
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    across, down = (place > left) & (place < right), (place > top) & (place < bottom)
    inside = down[:, :, None] & across[:, None, :]
    return float(gate[inside].mean() / gate[~inside].mean())


def run(report: Callable[[str], None]) -> Finding:
    """Held-out accuracy of the three networks over two seeds, and where the spatial gate is open."""
    task = ClutteredDigits(train=1200)
    images, digits, boxes = task.all("test")
    steps = EPOCHS * len(task.all("train")[0]) // BATCH
    accuracy: dict[str, list[float]] = {name: [] for name in FACTORIES}
    ratios: list[float] = []
    for seed in SEEDS:
        for name, factory in FACTORIES.items():
            torch.manual_seed(seed)
            model = _Network(factory)
            fit(model, task, steps=steps, batch_size=BATCH, lr=3e-3, seed=seed)
            model.eval()
            with torch.no_grad():
                accuracy[name].append(float((model(images).argmax(-1) == digits).float().mean()))
                if name == "cbam":
                    ratios.append(_gate_ratio(model, images, boxes))
            report(f"seed {seed}  {name}: accuracy {accuracy[name][-1]:.3f}")
    mean = {name: sum(values) / len(SEEDS) for name, values in accuracy.items()}
    ratio = sum(ratios) / len(SEEDS)
    measured = {
        **{f"accuracy_{name}_each_seed": [round(v, 4) for v in values] for name, values in accuracy.items()},
        **{f"accuracy_{name}": round(v, 4) for name, v in mean.items()},
        "spatial_gate_inside_over_outside_digit_each_seed": [round(r, 3) for r in ratios],
        "spatial_gate_inside_over_outside_digit": round(ratio, 3),
    }
    return Finding(
        measured,
        mean["cbam"] > mean["plain"] and ratio > 1.3,
        f"Drawn digits among 8 pieces of others on 32 x 32 pixels, {len(task.all('train')[0])} images to train on, "
        f"{len(images)} held out; three convolutions of {', '.join(map(str, WIDTHS))} channels with global pooling, "
        f"{EPOCHS} epochs, {len(SEEDS)} seeds. Holds if CBAM is more accurate than the plain network and its spatial "
        "gate is 1.3 times larger inside the digit's box than outside. ImageNet needs its data and GPU days.",
    )
