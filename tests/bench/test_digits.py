"""Digits as images, and the small transformers on them."""

from __future__ import annotations

import pytest
import torch

from regard.bench.digits import DigitImages, PixelDigits, digits_accuracy, digits_vit
from regard.bench.tasks import Digits
from regard.errors import OptionError


def test_images_are_the_digits_enlarged() -> None:
    pixels, classes = Digits().all()
    images, same = DigitImages(scale=1).all()
    assert torch.equal(images.flatten(1), pixels[..., 0]) and torch.equal(classes, same)
    large, _ = DigitImages(scale=2).all()
    assert large.shape == (len(classes), 1, 16, 16)
    torch.testing.assert_close(
        large.unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean((3, 5)).mean(), images.mean(), rtol=0.02, atol=0
    )


def test_training_images_move_and_test_images_do_not() -> None:
    task = DigitImages(scale=1, shift=1)
    still, _ = DigitImages(scale=1).batch(40, torch.Generator().manual_seed(0))
    moved, _ = task.batch(40, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(still[:, 0], (1, 1, 1, 1), value=-1.0)
    offsets = set()
    for before, after in zip(padded, moved[:, 0], strict=True):
        fits = [(r, c) for r in range(3) for c in range(3) if torch.equal(before[r : r + 8, c : c + 8], after)]
        assert fits
        offsets.add(fits[0])
    assert len(offsets) > 4
    draws = [t.batch(9, torch.Generator().manual_seed(0), "test")[0] for t in (task, DigitImages(scale=1))]
    assert torch.equal(*draws)
    with pytest.raises(OptionError, match="shift"):
        DigitImages(shift=16)


def test_a_small_transformer_begins_to_learn() -> None:
    model, task = digits_vit(steps=25, embed_dim=24, depth=1, num_heads=2)
    assert len(model.blocks) == 1 and not model.training
    accuracy = digits_accuracy(model, task)
    assert 0 <= accuracy <= 1
    perfect = {tuple(image.flatten().tolist()): label for image, label in zip(*task.all(), strict=True)}
    oracle = lambda images: torch.eye(10)[torch.stack([perfect[tuple(i.flatten().tolist())] for i in images])]  # noqa: E731
    assert digits_accuracy(oracle, task) == 1


def test_digits_pixel_by_pixel() -> None:
    plain, shuffled = PixelDigits(), PixelDigits(shuffled=True)
    pixels, classes = plain.all("test")
    moved, same = shuffled.all("test")
    assert pixels.shape[1:] == (64, 1) and torch.equal(classes, same)
    assert not torch.equal(pixels, moved) and torch.equal(pixels.sort(1).values, moved.sort(1).values)
    order = PixelDigits(shuffled=True).all("train")[0]
    assert torch.equal(order, shuffled.all("train")[0]), "one order for all"
