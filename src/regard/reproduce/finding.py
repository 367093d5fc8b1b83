"""What one reproduction found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from regard.errors import OptionError

__all__ = ["Finding", "Kind", "Plot"]

Kind = Literal["line", "points", "bar"]


@dataclass(frozen=True)
class Plot:
    """One panel of a picture, as plain data.

    ``x``, ``y``: what the axes show, with units. ``series``: points ``(x, y)`` by name, drawn in the order given.
    ``log_x``, ``log_y``: logarithmic axes. ``references``: horizontal lines by name (chance, a bound).
    ``dashed``: names of series that are theory rather than measurement: broken lines without marks. ``ticks``: names of
    places on the x axis, for bars of things that are no numbers.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    kind: Kind = "line"
    log_x: bool = False
    log_y: bool = False
    references: Mapping[str, float] = field(default_factory=dict)
    dashed: Sequence[str] = ()
    ticks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(f"A plot's kind is one of {', '.join(get_args(Kind))}; got {self.kind!r}.")
        if not self.series or not all(self.series.values()):
            raise OptionError(f"The plot {self.title!r} has nothing to draw: give each series at least one point.")
        if unknown := set(self.dashed) - set(self.series):
            raise OptionError(f"dashed names no series of {self.title!r}: {sorted(unknown)}.")
        for name, points in self.series.items():
            for x, y in points:
                if not (math.isfinite(x) and math.isfinite(y)):
                    raise OptionError(f"{name!r} of {self.title!r} has the point ({x}, {y}): leave such points out.")
                if (self.log_x and x <= 0) or (self.log_y and y <= 0):
                    raise OptionError(f"{name!r} of {self.title!r} has ({x}, {y}), which no logarithmic axis shows.")

    def content(self) -> dict[str, Any]:
        """As JSON keeps it: four significant digits, settings left at their defaults left out. ``Plot(**content)``
        gives the plot again."""
        kept: dict[str, Any] = {"title": self.title, "x": self.x, "y": self.y}
        kept["series"] = {name: [[_rounded(x), _rounded(y)] for x, y in at] for name, at in self.series.items()}
        settings: dict[str, Any] = {
            "kind": "" if self.kind == "line" else self.kind,
            "log_x": self.log_x,
            "log_y": self.log_y,
            "references": {name: _rounded(level) for name, level in self.references.items()},
            "dashed": list(self.dashed),
            "ticks": {name: _rounded(place) for name, place in self.ticks.items()},
        }
        return kept | {name: value for name, value in settings.items() if value}


def _rounded(value: float) -> float:
    """Whole numbers as they are."""
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.4g}")


@dataclass
class Finding:
    """``measured``: plain JSON values with telling names (units in the name). ``holds``: whether the effect showed, by
    a rule that stands in the code. ``note``: what was compared, and what it would take where it does not hold.
    ``plots``: the panels of its picture, if one says more than the figures do."""

    measured: dict[str, Any] = field(default_factory=dict)
    holds: bool = False
    note: str = ""
    plots: list[Plot] = field(default_factory=list)
