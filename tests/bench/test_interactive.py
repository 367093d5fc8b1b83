"""The simulated annotator against scipy's regions and distances, and the measures against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from regard.bench.interactive import NoisyBlobs, foreground_iou, noc_at_iou, simulate_clicks
from regard.errors import OptionError, ShapeError


def maps(seed: int, count: int = 12) -> Tensor:
    return torch.randint(2, (count, 9, 11), generator=torch.Generator().manual_seed(seed))


@pytest.mark.paper("probabilistic_attention")
def test_clicks_go_into_the_middle_of_the_largest_error() -> None:
    target = maps(0)
    prediction = torch.where(torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 0, target)
    target[0, 2:8, 3:9], prediction[0, 2:8, 3:9] = 1, 0
    places, labels = simulate_clicks(target, prediction)
    for image in range(len(target)):
        largest: list[tuple[int, int]] = []
        for label in (0, 1):
            part = ((target[image] != prediction[image]) & (target[image] == label)).numpy()
            numbers, count = ndimage.label(part)
            for n in range(1, count + 1):
                region = np.pad(numbers == n, 1)
                depth = ndimage.distance_transform_cdt(region, "taxicab")[1:-1, 1:-1]
                largest.append((int(region.sum()), int(depth.max())))
                row, column = places[image, 0].tolist()
                if numbers[row, column] == n:
                    clicked = (int(region.sum()), int(depth[row, column]))
        assert clicked == max(largest)
        row, column = places[image, 0].tolist()
        assert labels[image, 0] == target[image, row, column] != prediction[image, row, column]
    assert labels[0, 0] == 1


@pytest.mark.paper("probabilistic_attention")
def test_first_clicks_random_clicks_and_none() -> None:
    target = torch.zeros(2, 5, 5, dtype=torch.long)
    target[0, 1:4, 1:4] = 1
    places, labels = simulate_clicks(target)
    assert places[0, 0].tolist() == [2, 2]
    assert labels[:, 0].tolist() == [1, -1]
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        places, labels = simulate_clicks(target, strategy="random_error", generator=generator)
        seen.add(tuple(places[0, 0].tolist()))
        assert labels[:, 0].tolist() == [1, -1]
    assert seen == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


@pytest.mark.paper("probabilistic_attention")
def test_measures() -> None:
    target = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    prediction = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    assert foreground_iou(prediction, target).tolist() == pytest.approx([1 / 3, 1])
    ious = torch.tensor([[0.5, 0.8, 0.7], [0.9, 0.9, 0.9], [0.1, 0.2, 0.3]])
    assert noc_at_iou(ious, 0.8).tolist() == [2, 1, 3]


@pytest.mark.paper("probabilistic_attention")
def test_three_quarters_of_the_pixels_are_on_their_side() -> None:
    inputs, targets = NoisyBlobs().batch(256, torch.Generator().manual_seed(0))
    side = (inputs.sum(1).flatten(1) > 0).long()
    assert float((side == targets).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(targets.double().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(inputs.var(0).mean()) == pytest.approx(1.1, abs=0.1)


@pytest.mark.paper("probabilistic_attention")
def test_wrong_calls_are_explained() -> None:
    with pytest.raises(OptionError, match="strategy"):
        simulate_clicks(maps(0), strategy="nearest")  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        simulate_clicks(maps(0), maps(0, 3))
    with pytest.raises(ShapeError):
        noc_at_iou(torch.zeros(3), 0.5)
    with pytest.raises(OptionError, match="smooth"):
        NoisyBlobs(smooth=2.0)
