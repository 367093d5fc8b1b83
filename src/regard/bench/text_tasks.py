"""Long classification of real text: which package of Python's standard library some bytes of source come from."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["PACKAGES", "PackageText", "package_text"]

PACKAGES = ("asyncio", "ctypes", "email", "importlib", "json", "multiprocessing", "unittest", "xml")
"""Packages that every supported Python has, each of several modules."""


@cache
def package_text(name: str) -> tuple[bytes, bytes]:
    """Train and held-out source of a package of this interpreter's standard library: every third module is held out,
    so that no file is in both. Its tests are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted((root / name).rglob("*.py")) if not {"test", "tests"} & set(f.parts)]
    # Files of a few lines say nothing, and would leave a small package without a whole module to be tested on.
    texts = [text for text in (file.read_bytes() for file in files) if len(text) >= 1024]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, text in enumerate(texts):
        parts[index % 3 == 1].append(text)
    return b"\n".join(parts[0]), b"\n".join(parts[1])


class PackageText(Classification):
    """Which of :data:`PACKAGES` a piece of ``length`` bytes comes from, after the byte-level text of the Long Range
    Arena (Tay et al., 2020, arXiv 2011.04006, section 2.3). Packages are drawn evenly, pieces at random places of
    their modules laid end to end. Inputs ``(batch, length)`` int64, targets ``(batch,)``."""

    vocab_size = 256

    def __init__(self, length: int = 1024, packages: tuple[str, ...] = PACKAGES) -> None:
        self.length, self.packages, self.num_classes = length, packages, len(packages)
        self._text: dict[str, list[Tensor]] = {"train": [], "test": []}
        for name in packages:
            for split, text in zip(("train", "test"), package_text(name), strict=True):
                if len(text) < max(length, 1):
                    raise OptionError(
                        f"{name!r} has {len(text)} bytes of {split} text here, fewer than length {length}; choose a "
                        "shorter length or other packages."
                    )
                self._text[split].append(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """``size`` pieces and their packages."""
        classes = torch.randint(self.num_classes, (size,), generator=generator)
        shares = torch.rand(size, generator=generator)
        pieces = []
        for number, share in zip(classes.tolist(), shares.tolist(), strict=True):
            text = self._text[split][number]
            start = int(share * (len(text) - self.length + 1))
            pieces.append(text[start : start + self.length])
        return torch.stack(pieces).long(), classes
