"""Packages of the standard library by their bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from regard.bench.text_tasks import PACKAGES, PackageText, package_text
from regard.errors import OptionError


def test_no_module_is_in_both_splits() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES:
        train, test = package_text(name)
        held = [f for f in (root / name).rglob("*.py") if f.stat().st_size >= 1024 and f.read_bytes() in test]
        assert held and not any(file.read_bytes() in train for file in held), name


def test_pieces_come_from_their_package() -> None:
    task = PackageText(200)
    for split in ("train", "test"):
        inputs, targets = task.batch(300, torch.Generator().manual_seed(0), split)
        assert inputs.shape == (300, 200) and targets.shape == (300,)
        for piece, number in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert bytes(piece) in package_text(PACKAGES[number])[split == "test"]
        assert targets.bincount(minlength=8).min() > 15 and task.chance == 1 / 8


def test_packages_that_are_too_small_are_refused() -> None:
    with pytest.raises(OptionError, match="'json' has"):
        PackageText(100_000, ("json",))
    with pytest.raises(OptionError, match="fewer than length"):
        PackageText(64, ("no_such_package",))
