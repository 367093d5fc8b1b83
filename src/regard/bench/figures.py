"""What all figures share: how one is begun, and colours that every eye tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regard.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARK", "MARKS", "UNSEEN", "new_figure", "sequential"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colours: every eye tells them apart."""
MARKS = "osD^vP*X"
"""Marks of points, for those who see the colours less well, and for print."""
MARK = "#D55E00"
"""Outlines what the figure is about (vermilion of Okabe and Ito's palette)."""
UNSEEN = "#E4E4E4"
"""Where there is nothing at all, which is not the same as little."""


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of so many inches that needs no display. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Drawing", "plot") from error
    return Figure(figsize=size, layout="constrained")


def sequential() -> Any:
    """Little to much, from light to dark blue: its lightest is still told from ``UNSEEN``."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("regard", colormaps["YlGnBu"]([0.18, 0.4, 0.6, 0.8, 1.0]))
