"""The papers as data: one ``[[paper]]`` table each (``[[mechanism]]`` for what is no paper's) in ``<home>.toml``.

Fields: ``key``, ``title``, ``year``, ``arxiv``, ``home``, ``kind``, ``module`` (where the class is registered),
``symbols`` (everything delivered for the paper, dotted), ``summary`` (one sentence), ``formula`` (plain text),
``claim``, ``example`` (options for an input of some dozens of tokens, used by pictures and by the conformance suite),
``compare`` (options for some thousands of tokens, where the paper's own are made for longer texts), ``sweep`` (several
such options, from dense to sparse, over ``compare``: the points of a quality curve), ``variants`` (other options by
name, which the conformance suite runs beside ``example``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from regard.errors import FileFormatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Entry", "entries", "evidence", "evidence_folder"]


@dataclass(frozen=True)
class Entry:
    """One paper or mechanism."""

    key: str
    title: str
    home: str
    kind: str
    summary: str
    year: int | None = None
    arxiv: str | None = None
    module: str | None = None
    symbols: tuple[str, ...] = ()
    formula: str = ""
    claim: str = ""
    example: Mapping[str, Any] = field(default_factory=dict)
    compare: Mapping[str, Any] = field(default_factory=dict)
    sweep: tuple[Mapping[str, Any], ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def paper(self) -> bool:
        """Whether a paper stands behind it."""
        return self.arxiv is not None

    @property
    def evidence(self) -> dict[str, Any] | None:
        """What `regard reproduce` measured, or None where nothing is kept yet."""
        return evidence(self.key)

    @property
    def picture(self) -> Path | None:
        """What `regard reproduce` drew of it, or None where there is no picture."""
        file = evidence_folder() / f"{self.key}.png"
        return file if file.is_file() else None


@cache
def entries() -> dict[str, Entry]:
    """All entries by key, in the order of the files."""
    found: dict[str, Entry] = {}
    for file in sorted(Path(__file__).parent.glob("*.toml")):
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        for table in (*tables.get("mechanism", ()), *tables.get("paper", ())):
            fields = {**table, "symbols": tuple(table.get("symbols", ())), "sweep": tuple(table.get("sweep", ()))}
            try:
                entry = Entry(**fields)
            except TypeError as error:
                raise FileFormatError(f"{file.name}: entry {table.get('key')!r}: {error}.") from error
            if entry.key in found:
                raise FileFormatError(f"{file.name}: {entry.key!r} is in the catalogue twice.")
            found[entry.key] = entry
    return found


def evidence_folder() -> Path:
    """Where the evidence lies: beside the package when installed, at the root of a checkout."""
    installed = Path(__file__).parent.parent / "reproductions"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "reproductions"


def evidence(key: str) -> dict[str, Any] | None:
    """The kept result of `regard reproduce KEY`, or None."""
    file = evidence_folder() / f"{key}.json"
    if not file.is_file():
        return None
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded
