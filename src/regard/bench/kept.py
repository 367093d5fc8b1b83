"""Results that are kept as they come: JSON files written whole or not at all, and read back with errors that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from regard.errors import FileFormatError

__all__ = ["load_kept", "save_kept"]

T = TypeVar("T")


def save_kept(file: Path, content: dict[str, Any]) -> None:
    """Write ``content``, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def load_kept(file: Path, version: int, build: Callable[[dict[str, Any]], T], what: str) -> T | None:
    """What ``build`` makes of an earlier run's file; None if there is none.

    what: named in the FileFormatError for a file of another version or kind, e.g. ``"a study"``.
    """
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["version"] != version:
            raise ValueError(f"version {raw['version']}, expected {version}")
        return build(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{file} is not {what} this version can continue ({error}). Give another --out, or remove it."
        ) from error
