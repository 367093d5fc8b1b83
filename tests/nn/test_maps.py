"""Layers on tokens as layers on maps, whichever way the caller keeps its channels."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.nn import OnMap


@pytest.mark.parametrize("name", ["twins", "cswin", "dinat", "hilo"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])
def test_channels_first_and_last_agree_with_the_layer(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = regard.create(name, embed_dim=32, num_heads=4).double().eval()
    maps = torch.randn(2, 32, *size, dtype=torch.float64)
    tokens = layer(maps.flatten(2).transpose(1, 2), grid=size)
    first, last = OnMap(layer)(maps), OnMap(layer, channels_last=True)(maps.movedim(1, -1))
    assert first.shape == maps.shape and last.shape == (2, *size, 32)
    torch.testing.assert_close(first.flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(last.movedim(-1, 1), first)
