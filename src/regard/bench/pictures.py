"""Pictures of attention: implied maps, masks and layouts, as arrays, PNG sprites, matplotlib figures or text."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import MissingExtraError, OptionError
from regard.mechanism import Feature, Layer, Mechanism
from regard.registry import build, describe, get

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "implied_map", "map_sprite", "text_map"]

_NUM_HEADS, _HEAD_DIM = 4, 16


def pooled(weights: Tensor, cells: int) -> Tensor:
    """Attention ``(heads, q_len, k_len)`` as shares of mass per cell, ``(heads, cells, cells)`` or its own size if
    less."""
    _, q_len, k_len = weights.shape
    rows, columns = min(cells, q_len), min(cells, k_len)
    # Mean over the queries of a cell, sum over its keys: each row still adds up to a query's whole attention.
    mass = F.adaptive_avg_pool2d(weights.float()[None], (rows, columns))[0]
    return mass * (k_len / columns)


def shade(mass: Tensor) -> Tensor:
    """Mass to brightness in [0, 1], row by row: logarithmic over three decades below the row's largest, so that both a
    sink and a diffuse background are visible; nothing at all is 0."""
    size = mass.abs()
    top = size.amax(-1, keepdim=True).clamp_min(1e-12)
    level = 1 + (size / top).clamp_min(1e-6).log10() / 3
    return torch.where(size > 0, level.clamp(0.04, 1), torch.zeros_like(level))


def map_sprite(weights: Tensor, cells: int) -> str:
    """Heads side by side as one 8-bit gray PNG, base64: weights ``(heads, q_len, k_len)``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Drawing attention maps", "plot") from error
    levels = (shade(pooled(weights, cells)) * 255).round().to(torch.uint8)
    image = Image.fromarray(torch.cat(list(levels), 1).numpy(), mode="L")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def implied_map(name: str, length: int = 64, seed: int = 0, **options: Any) -> Tensor:
    """What looks at what in ``name`` on a small smooth random input: ``(heads, length, length)``.

    For a mechanism the implied attention matrix; for a layer or a feature, which has none, the norm of each output
    position's gradient towards each input position, each row scaled to sum to one, ``(1, length, length)``.
    Options default to the catalogue's example.
    """
    settings = {**describe(name).example, **options}
    torch.manual_seed(seed)
    side = round(length**0.5)
    embed_dim = _NUM_HEADS * _HEAD_DIM
    module = build(
        name,
        settings,
        num_heads=_NUM_HEADS,
        num_kv_heads=_NUM_HEADS,
        head_dim=_HEAD_DIM,
        embed_dim=embed_dim,
        channels=embed_dim,
        layer_index=0,
        num_layers=2,
    ).eval()
    if isinstance(module, Mechanism):
        causal = "causal-self" in module.patterns
        grid = (length,) if causal else (side, side)
        count = length if causal else side * side
        query, key, value = (_smooth(_NUM_HEADS, count, _HEAD_DIM) for _ in range(3))
        with torch.no_grad():
            return module.weights(query, key, value, causal=causal, grid=grid)[0]
    return _influence(module, side, embed_dim)


def _smooth(heads: int, length: int, dim: int) -> Tensor:
    """Random vectors that change slowly along the sequence, as real queries and keys do."""
    noise = torch.randn(1, heads, length + 4, dim)
    return 1.5 * noise.unfold(2, 5, 1).mean(-1) * 5**0.5


def _influence(module: nn.Module, side: int, channels: int) -> Tensor:
    count = side * side
    if isinstance(module, Feature):
        x = torch.randn(1, channels, side, side, requires_grad=True)
        out = _only_tensor(module(x)).flatten(2).transpose(1, 2)
    elif isinstance(module, Layer):
        x = torch.randn(1, count, channels, requires_grad=True)
        causal = "causal-self" in module.patterns
        out = _only_tensor(module(x, causal=causal) if causal else module(x, grid=(side, side)))
    else:
        raise OptionError(f"{type(module).__name__} has no attention map to draw.")
    rows = []
    for position in range(out.shape[1]):
        (grad,) = torch.autograd.grad(out[0, position].sum(), x, retain_graph=True)
        flat = grad.flatten(2)[0].T if grad.dim() == 4 else grad[0]
        rows.append(flat.norm(dim=-1))
    influence = torch.stack(rows)
    return (influence / influence.sum(-1, keepdim=True).clamp_min(1e-12))[None]


def _only_tensor(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


def text_map(weights: Tensor, cells: int = 32) -> str:
    """One head ``(q_len, k_len)`` as text, two rows of cells a line."""
    levels = shade(pooled(weights[None], cells))[0]
    if len(levels) % 2:
        levels = F.pad(levels, (0, 0, 0, 1))
    lines = []
    for upper, lower in zip(levels[::2], levels[1::2], strict=True):
        line = ""
        for a, b in zip(upper.tolist(), lower.tolist(), strict=True):
            line += "\u2588" if a > 0.35 and b > 0.35 else "\u2580" if a > 0.35 else "\u2584" if b > 0.35 else "\u00b7"
        lines.append(line)
    return "\n".join(lines)


def draw(name: str, length: int = 64, **options: Any) -> Figure:
    """A figure of ``name``'s implied map, a panel a head."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Drawing", "plot") from error
    maps = implied_map(name, length, **options)
    entry, influence = describe(name), not issubclass(get(name), Mechanism)
    figure = Figure(figsize=(2.6 * len(maps) + 0.8, 3.4), layout="constrained")
    figure.suptitle(f"{name}: {entry.title}", fontsize=10)
    for index, weights in enumerate(maps):
        axes = figure.add_subplot(1, len(maps), index + 1)
        axes.imshow(shade(weights).numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title("influence (all heads)" if influence else f"head {index}", fontsize=8)
        axes.set_xlabel("input position" if influence else "key", fontsize=8)
        if index == 0:
            axes.set_ylabel("output position" if influence else "query", fontsize=8)
        axes.tick_params(labelsize=6)
    return figure
