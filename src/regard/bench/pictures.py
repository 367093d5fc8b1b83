"""Pictures of attention: implied maps, masks and layouts, as arrays, PNG sprites, matplotlib figures or text."""

from __future__ import annotations

import base64
import inspect
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.figures import MARK, UNSEEN, new_figure, sequential
from regard.errors import MissingExtraError, OptionError
from regard.mechanism import Feature, Layer, Mechanism
from regard.registry import build, describe, get

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ReceptiveField", "draw", "draw_field", "implied_map", "map_sprite", "receptive_field", "text_map"]

_NUM_HEADS, _HEAD_DIM = 4, 16
_MOST_TOKENS = 4096
_DRAWS = 4


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
    torch.manual_seed(seed)
    side = round(length**0.5)
    module = _build(name, options)
    if isinstance(module, Mechanism):
        causal = "causal-self" in module.patterns
        grid = (length,) if causal else (side, side)
        count = length if causal else side * side
        query, key, value = (_smooth(_NUM_HEADS, count, _HEAD_DIM) for _ in range(3))
        with torch.no_grad():
            return module.weights(query, key, value, causal=causal, grid=grid)[0]
    return _influence(module, side)


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    """A small instance; options default to the catalogue's example."""
    embed_dim = _NUM_HEADS * _HEAD_DIM
    return build(
        name,
        {**describe(name).example, **options},
        num_heads=_NUM_HEADS,
        num_kv_heads=_NUM_HEADS,
        head_dim=_HEAD_DIM,
        embed_dim=embed_dim,
        channels=embed_dim,
        layer_index=0,
        num_layers=2,
    ).eval()


def _smooth(heads: int, length: int, dim: int) -> Tensor:
    """Random vectors that change slowly along the sequence, as real queries and keys do."""
    noise = torch.randn(1, heads, length + 4, dim)
    return 1.5 * noise.unfold(2, 5, 1).mean(-1) * 5**0.5


def _influence(module: nn.Module, side: int) -> Tensor:
    causal = isinstance(module, Layer) and "causal-self" in module.patterns
    grid = (side * side,) if causal else (side, side)
    x, out = _run(module, grid, causal)
    rows = []
    for position in range(out.shape[1]):
        (grad,) = torch.autograd.grad(out[0, position].sum(), x, retain_graph=True)
        rows.append(_as_tokens(grad, module)[0].norm(dim=-1))
    influence = torch.stack(rows)
    return (influence / influence.sum(-1, keepdim=True).clamp_min(1e-12))[None]


def _run(module: nn.Module, grid: Sequence[int], causal: bool, batch: int = 1) -> tuple[Tensor, Tensor]:
    """A layer or feature on random input: the input, which wants a gradient, and the output ``(batch, length,
    channels)``."""
    channels = _NUM_HEADS * _HEAD_DIM
    if isinstance(module, Feature):
        x = torch.randn(batch, channels, *grid, requires_grad=True)
        return x, _as_tokens(_only_tensor(module(x)), module)
    if not isinstance(module, Layer):
        raise OptionError(f"{type(module).__name__} has no attention map to draw.")
    x = torch.randn(batch, math.prod(grid), channels, requires_grad=True)
    takes = inspect.signature(module.forward).parameters
    call: dict[str, Any] = {"grid": tuple(grid)} if "grid" in takes and module.grid_axes else {}
    if causal and "causal" in takes:
        call["causal"] = True
    return x, _only_tensor(module(x, **call))


def _as_tokens(x: Tensor, module: nn.Module) -> Tensor:
    """``(batch, length, channels)`` of what a layer or feature takes or gives."""
    return x.flatten(2).transpose(1, 2) if isinstance(module, Feature) else x


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


@dataclass(frozen=True)
class ReceptiveField:
    """What one query sees on a grid. ``weights`` ``(heads, *grid)``: mean size over random inputs, ``seen`` likewise
    boolean: more than rounding on any of them. ``influence``: weights are not attention but the gradient of the output
    at the query towards each input position, of all heads together, scaled to sum to one."""

    weights: Tensor
    seen: Tensor
    query: tuple[int, ...]
    causal: bool
    influence: bool

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.weights.shape[1:])

    def groups(self) -> list[list[int]]:
        """Heads that see the same positions, together."""
        found: list[list[int]] = []
        for head, seen in enumerate(self.seen):
            like = next((group for group in found if torch.equal(self.seen[group[0]], seen)), None)
            if like is None:
                found.append([head])
            else:
                like.append(head)
        return found


def receptive_field(
    name: str,
    grid: Sequence[int],
    query: Sequence[int] | None = None,
    *,
    causal: bool | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
    **options: Any,
) -> ReceptiveField:
    """What the ``query`` (by default the middle) of ``name`` sees on ``grid``.

    causal: by default only where nothing else is defined. Weights are means over ``draws`` random inputs, since what is
    seen may depend on them.
    """
    grid = tuple(grid)
    place = tuple(length // 2 for length in grid) if query is None else tuple(query)
    if len(place) != len(grid) or any(not 0 <= at < length for at, length in zip(place, grid, strict=True)):
        raise OptionError(f"Query {place} is no position on the grid {grid}; each axis counts from 0.")
    if math.prod(grid) > _MOST_TOKENS:
        raise OptionError(
            f"Grid {grid} has {math.prod(grid)} positions; a picture takes up to {_MOST_TOKENS}. A smaller grid shows "
            "the same shape."
        )
    torch.manual_seed(seed)
    module = _build(name, options)
    if not isinstance(module, Mechanism | Layer | Feature):
        raise OptionError(f"{name} has no attention map to draw.")
    _check_axes(name, module, grid)
    causal = _causal(name, module, causal)
    flat = 0
    for at, length in zip(place, grid, strict=True):
        flat = flat * length + at
    if isinstance(module, Mechanism) and module.value_linear:
        count, rows = math.prod(grid), []
        for _ in range(draws):
            q, k, v = (_smooth(_NUM_HEADS, count, _HEAD_DIM) for _ in range(3))
            with torch.no_grad():
                rows.append(module.weights(q, k, v, causal=causal, grid=grid)[0, :, flat].abs())
        weights, influence = torch.stack(rows).mean(0), False
    else:
        weights, influence = _row_of_influence(module, grid, flat, causal, draws), True
    seen = weights > 1e-6 * weights.amax(-1, keepdim=True)
    return ReceptiveField(weights.unflatten(1, grid), seen.unflatten(1, grid), place, causal, influence)


def _check_axes(name: str, module: Mechanism | Layer | Feature, grid: tuple[int, ...]) -> None:
    axes = sorted(module.grid_axes)
    if axes and len(grid) not in axes:
        forms = " or ".join({1: "N", 2: "HxW", 3: "FxHxW"}.get(n, str(n)) for n in axes)
        takes = " or ".join(map(str, axes))
        raise OptionError(f"{name} with these options takes grids of {takes} axes ({forms}), not of {len(grid)}.")


def _causal(name: str, module: Mechanism | Layer | Feature, asked: bool | None) -> bool:
    defined = frozenset(("self",)) if isinstance(module, Feature) else module.patterns
    causal = "self" not in defined if asked is None else asked
    if ("causal-self" if causal else "self") not in defined:
        raise OptionError(
            f"{name} with these options does not define {'causal-self' if causal else 'self'} attention; it defines "
            f"{', '.join(sorted(defined))}."
        )
    return causal


def _row_of_influence(module: nn.Module, grid: tuple[int, ...], flat: int, causal: bool, draws: int) -> Tensor:
    """``(1, length)``: mean size of the gradient of a random mix of the output's channels at ``flat``."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not bool(parameter.any()):  # an initial zero would hide a whole branch
                parameter.normal_(0, 0.2)
    if isinstance(module, Mechanism):
        x = torch.randn(draws, _NUM_HEADS, math.prod(grid), _HEAD_DIM, requires_grad=True)
        out = module(x, x, x, causal=causal, grid=grid).transpose(1, 2).flatten(2)
        (grad,) = torch.autograd.grad((out[:, flat] * torch.randn_like(out[:, flat])).sum(), x)
        sizes = grad.transpose(1, 2).flatten(2).norm(dim=-1)
    else:
        x, out = _run(module, grid, causal, draws)
        (grad,) = torch.autograd.grad((out[:, flat] * torch.randn_like(out[:, flat])).sum(), x)
        sizes = _as_tokens(grad, module).norm(dim=-1)
    return (sizes / sizes.sum(-1, keepdim=True).clamp_min(1e-12)).mean(0, keepdim=True)


def draw(name: str, length: int = 64, **options: Any) -> Figure:
    """A figure of ``name``'s implied map, a panel a head."""
    maps = implied_map(name, length, **options)
    entry, influence = describe(name), not issubclass(get(name), Mechanism)
    figure = new_figure((2.6 * len(maps) + 0.8, 3.4))
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


def draw_field(
    name: str,
    grid: Sequence[int],
    query: Sequence[int] | None = None,
    *,
    causal: bool | None = None,
    **options: Any,
) -> Figure:
    """A figure of what one query of ``name`` sees: bars on a sequence, an image a head on two axes, a row of frames for
    heads that see the same on three."""
    field = receptive_field(name, grid, query, causal=causal, **options)
    draw_axes = (_draw_sequence, _draw_images, _draw_frames)[len(field.grid) - 1]
    figure = draw_axes(field)
    counts = field.seen.flatten(1).sum(-1).tolist()
    spread = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    where = ",".join(map(str, field.query))
    what = "the output at" if field.influence else "the query at"
    verb = "depends on" if field.influence else "sees"
    tail = f" ({'causal; ' if field.causal else ''}{_DRAWS} random inputs)"
    line = f"{what} {where} {verb} {spread} of {math.prod(field.grid)} positions{tail}"
    figure.suptitle(f"{name}: {describe(name).title}\n{line}", fontsize=9, wrap=True)
    return figure


def _measure(field: ReceptiveField) -> str:
    return "influence on the output" if field.influence else "attention weight"


def _heads(field: ReceptiveField, group: Sequence[int]) -> str:
    if field.influence:
        return "all heads"
    return f"head {group[0]}" if len(group) == 1 else f"heads {', '.join(map(str, group))}"


def _draw_sequence(field: ReceptiveField) -> Figure:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    heads, length = field.weights.shape
    figure = new_figure((9.0, 1.15 * heads + 1.5))
    panels = figure.subplots(heads, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    places = torch.arange(length)
    for head, panel in enumerate(panels):
        unseen = ~field.seen[head]
        top = 1.08 * float(field.weights.max())
        panel.bar(places[unseen].numpy(), top, width=1.0, color=UNSEEN)
        panel.bar(places.numpy(), field.weights[head].numpy(), width=1.0, color="#0072B2")
        panel.axvline(field.query[0], color=MARK, linewidth=1.5)
        panel.set_xlim(-0.5, length - 0.5)
        panel.set_ylim(0, top)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        panel.set_title(_heads(field, [head]), fontsize=8, loc="left", pad=2)
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("position", fontsize=8)
    figure.supylabel(_measure(field), fontsize=8)
    handles = [Patch(color="#0072B2", label=_measure(field)), Patch(color=MARK, label="query"), _not_seen()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _not_seen() -> Any:
    from matplotlib.patches import Patch

    return Patch(color=UNSEEN, label="never seen")


def _draw_images(field: ReceptiveField) -> Figure:
    heads, height, width = field.weights.shape
    side = 2.6 if heads > 1 else 4.0
    figure = new_figure((side * heads + 1.2, min(side * height / width, 8.0) + 1.4))
    panels = figure.subplots(1, heads, squeeze=False)
    for head, panel in enumerate(panels[0]):
        _image(panel, field, field.weights[head], field.seen[head], field.query)
        panel.set_title(_heads(field, [head]), fontsize=8)
        panel.set_xlabel("column", fontsize=7)
    panels[0, 0].set_ylabel("row", fontsize=7)
    _scale(figure, panels, field)
    return figure


def _draw_frames(field: ReceptiveField) -> Figure:
    groups, (frames, height, width) = field.groups(), field.grid
    side = min(max(12.0 / frames, 1.1), 2.4)
    figure = new_figure((side * frames + 1.4, (side * height / width + 0.35) * len(groups) + 1.3))
    panels = figure.subplots(len(groups), frames, squeeze=False)
    for row, group in zip(panels, groups, strict=True):
        weights, seen = field.weights[group].mean(0), field.seen[group[0]]
        for frame, panel in enumerate(row):
            query = field.query[1:] if frame == field.query[0] else None
            _image(panel, field, weights[frame], seen[frame], query)
            panel.set_title(f"frame {frame}", fontsize=7)
            if frame:
                panel.set_yticks([])
        if len(groups) > 1:
            row[0].set_ylabel(_heads(field, group), fontsize=8)
    _scale(figure, panels, field)
    return figure


def _levels(field: ReceptiveField) -> tuple[float, float]:
    """The range of the colours: what is seen, over three decades at most."""
    if not bool(field.seen.any()):
        return 1e-3, 1.0
    most = float(field.weights.max())
    least = max(float(field.weights[field.seen].min()), most / 1000)
    return (least, most) if least < 0.98 * most else (most / 10, most)


def _image(panel: Axes, field: ReceptiveField, weights: Tensor, seen: Tensor, query: Sequence[int] | None) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from numpy.ma import masked_array

    least, most = _levels(field)
    colours = sequential().with_extremes(bad=UNSEEN)
    shown = masked_array(weights.clamp_min(least).numpy(), (~seen).numpy())
    panel.imshow(shown, cmap=colours, norm=LogNorm(least, most), interpolation="nearest")
    panel.tick_params(labelsize=6, length=2)
    if query is not None:
        for colour, line in (("white", 3.2), (MARK, 1.8)):
            box = Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=line)
            box.set_clip_on(False)
            panel.add_patch(box)


def _scale(figure: Figure, panels: Any, field: ReceptiveField) -> None:
    """The colour bar and the legend of images."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    bar = figure.colorbar(ScalarMappable(LogNorm(*_levels(field)), sequential()), ax=panels, shrink=0.9, pad=0.02)
    bar.set_label(_measure(field), fontsize=8)
    least, most = _levels(field)
    steps = [m * 10.0**e for e in range(-9, 1) for m in (1, 2, 5)]
    ticks = [step for step in steps if 0.999 * least <= step <= 1.001 * most]
    bar.set_ticks(ticks, labels=[f"{100 * step:g} %" for step in ticks], fontsize=7)
    bar.minorticks_off()
    query = Patch(facecolor="white", edgecolor=MARK, linewidth=2, label="query")
    figure.legend(handles=[query, _not_seen()], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
