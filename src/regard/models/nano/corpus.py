"""The text nano is trained and measured on: the Python modules of the CPython standard library.

Every Python carries this text, so the model, its baselines and its tests work on a bare machine. Modules are
split by a hash of their path, so a module is in the same split on every machine and in every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from regard.errors import OptionError

__all__ = ["Module", "Split", "read_corpus", "split_of"]

Split = Literal["train", "held_out"]

HELD_OUT_PERCENT = 8
"""Share of the modules, in percent, that no training step ever sees."""

_LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"})
# Written by a program: the build's own settings, and the encoding tables made from Unicode's mapping files.
_GENERATED_NAMES = ("_sysconfigdata", "_sysconfig_vars")
_GENERATED_MARK = "gencodec.py"
_MARK_WITHIN = 400
_FEWEST_MODULES = 100


@dataclass(frozen=True)
class Module:
    """One source file: its posix path relative to the standard library, and its text."""

    name: str
    text: str

    @property
    def package(self) -> str:
        """The top-level package that holds the module; ``""`` for a module that stands alone."""
        return self.name.split("/", 1)[0] if "/" in self.name else ""


def split_of(name: str) -> Split:
    """The split of a module, from the SHA-256 of its posix path relative to the standard library."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "held_out" if number % 100 < HELD_OUT_PERCENT else "train"


def read_corpus(split: Split, root: Path | None = None) -> list[Module]:
    """All modules of one split, in the order of their paths.

    ``root`` is a folder of Python files that takes the place of the running Python's standard library.
    """
    if split not in get_args(Split):
        raise OptionError(f"split is {split!r}; it must be one of {', '.join(map(repr, get_args(Split)))}.")
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    modules = list(_modules(folder))
    if root is None and len(modules) < _FEWEST_MODULES:
        raise FileNotFoundError(
            f"Found {len(modules)} Python files of the standard library in {folder}, expected at least "
            f"{_FEWEST_MODULES}. This Python was installed without its sources (zipped, frozen or compiled "
            "only). Use a full CPython, or pass root=, a folder that holds a copy of its Lib directory."
        )
    if not modules:
        raise FileNotFoundError(f"Found no Python files in {folder}. Pass root=, a folder with *.py files.")
    return [module for module in modules if split_of(module.name) == split]


def _modules(folder: Path) -> Iterator[Module]:
    found = ((path.relative_to(folder), path) for path in folder.rglob("*.py"))
    for relative, path in sorted(found, key=lambda pair: pair[0].as_posix()):
        if _LEFT_OUT_FOLDERS.intersection(relative.parts[:-1]) or relative.name.startswith(_GENERATED_NAMES):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n")
        if text.strip() and _GENERATED_MARK not in text[:_MARK_WITHIN]:
            yield Module(relative.as_posix(), text)
