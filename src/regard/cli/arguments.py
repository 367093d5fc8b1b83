"""How commands read what they are given, and write what they found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.table import Table

from regard.cli.group import console
from regard.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "leave_stopped",
    "picture_file",
    "read_causal_axes",
    "read_numbers",
    "read_options",
    "read_position",
    "read_setting",
    "save_figure",
    "table_of",
    "written_flag",
]


def leave_stopped() -> NoReturn:
    """After Ctrl-C, with what was done shown and kept."""
    console.print("Stopped. The same command with the same --out goes on from here.", style="yellow")
    sys.exit(130)


def read_options(settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``KEY.NAME=VALUE``, several times, by key."""
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, value = read_setting(setting)
        if "." not in name:
            raise OptionError(f"--option {setting!r} names no mechanism: write KEY.NAME=VALUE, e.g. moba.top_k=4.")
        key, _, option = name.partition(".")
        options.setdefault(key, {})[option] = value
    return options


def read_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise OptionError(f"{option} {text!r} are no numbers: write e.g. {option} 2048,8192.") from error


def read_setting(text: str) -> tuple[str, Any]:
    """``name=value`` with the value read as JSON where it is (numbers, true, lists), else as a word."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OptionError(f"{text!r} is no setting: write NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def picture_file(target: Path) -> Path:
    """Refuse a name that no picture has, before work is spent on it."""
    if target.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{target.name!r} is no picture file: end it in .png, .svg or .pdf.")
    return target


def save_figure(figure: Figure, target: Path) -> None:
    """Write a picture, its folder too, and say so."""
    picture_file(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160)
    console.print(f"wrote {target}")


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]], wrap: bool = False, **style: Any) -> Table:
    """Rows under their head: names in the first column, numbers behind. wrap: those may break their lines. style: of
    the table."""
    table = Table(**style)
    for place, column in enumerate(head):
        first = place == 0
        table.add_column(column, justify="left" if first else "right", no_wrap=first or not wrap)
    for row in rows:
        table.add_row(*row)
    return table


def read_causal_axes(text: str | None, axes: int) -> tuple[bool, ...]:
    """``"0,1"`` as one truth for each axis of a grid."""
    if text is None:
        return (False,) * axes
    named = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < axes for part in named):
        raise OptionError(
            f"--causal {text!r} names no axes of the grid: write numbers from 0 to {axes - 1}, as in 0,1."
        )
    return tuple(str(axis) in named for axis in range(axes))


def read_position(text: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    """``"5,7"`` as a place on ``grid``."""
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    if len(parts) != len(grid) or not all(part.isdigit() for part in parts):
        raise OptionError(
            f"--query {text!r} is no position on a grid of {len(grid)} axes: write {','.join('5' * len(grid))} or so, "
            "counting from 0."
        )
    place = tuple(int(part) for part in parts)
    if any(at >= length for at, length in zip(place, grid, strict=True)):
        last = ",".join(str(length - 1) for length in grid)
        raise OptionError(f"--query {text!r} is not on the grid; its last position is {last}.")
    return place


def written_flag(name: str, value: Any) -> str:
    """An option as it is written."""
    flag = name.replace("_", "-")
    return f"--{flag} {value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"
