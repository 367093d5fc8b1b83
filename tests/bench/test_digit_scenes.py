"""Scenes of digits and how their answers are read."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from regard.bench.digit_scenes import LETTERS, DigitScenes
from regard.bench.tasks import IGNORED, Digits


def test_patches_hold_four_digits_in_reading_order() -> None:
    task = DigitScenes()
    patches, digits = task.scenes(3, torch.Generator().manual_seed(0))
    pixels, labels = Digits().batch(12, torch.Generator().manual_seed(0), "test")
    assert torch.equal(digits.flatten(), labels)
    image = patches.view(3, 8, 8, 2, 2).transpose(2, 3).reshape(3, 16, 16)
    for scene in range(3):
        for place in range(4):
            row, column = 8 * (place // 2), 8 * (place % 2)
            assert torch.equal(
                image[scene, row : row + 8, column : column + 8].flatten(), pixels[4 * scene + place, :, 0]
            )


def test_answers_are_spelled_and_read_back() -> None:
    task = DigitScenes()
    digits = torch.tensor([[1, 2, 6, 2], [3, 7, 8, 0]])
    answers = task.answers(digits)
    spoken = "".join(LETTERS[t] if t < task.space else " " if t == task.space else "." for t in answers[0] if t >= 0)
    assert spoken == "one two six two." and task.right_words(answers, digits).all()
    answers[1, 0] = LETTERS.index("f")
    assert task.right_words(answers, digits).tolist() == [[True] * 4, [False, True, True, True]]


def test_targets_are_the_next_letters() -> None:
    task = DigitScenes(question=3)
    (patches, text), targets = task.batch(4, torch.Generator().manual_seed(0))
    assert patches.shape == (4, 64, 4) and text.shape == targets.shape
    assert (text[:, :3] == task.ask).all() and (targets[:, :2] == IGNORED).all()
    following = targets[:, 2:-1]
    assert torch.equal(text[:, 3:][following >= 0], following[following >= 0])
