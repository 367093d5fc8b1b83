"""Pages that commands write, in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["paragraph", "table"]


def paragraph(text: str) -> list[str]:
    """Lines of at most 120 characters, and an empty one."""
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = (head, ["---"] * len(head), *rows)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]
