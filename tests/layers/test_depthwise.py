from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.layers.depthwise import DepthwiseConv


def test_each_channel_is_convolved_on_the_grid() -> None:
    layer = DepthwiseConv(6, 3).double()
    x = torch.randn(2, 3, 20, 2, dtype=torch.float64)
    out = layer(x, (4, 5)).view(2, 3, 4, 5, 2)
    space = x.view(2, 3, 4, 5, 2)
    assert layer.conv.bias is not None
    for head, channel, row, column in ((0, 1, 0, 0), (2, 0, 3, 2), (1, 1, 2, 4)):
        kernel = layer.conv.weight[2 * head + channel, 0]
        expected = layer.conv.bias[2 * head + channel].expand(2).clone()
        for i in range(-1, 2):
            for j in range(-1, 2):
                if 0 <= row + i < 4 and 0 <= column + j < 5:
                    expected = expected + kernel[i + 1, j + 1] * space[:, head, row + i, column + j, channel]
        torch.testing.assert_close(out[:, head, row, column, channel], expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError):
        DepthwiseConv(4, 2)
    with pytest.raises(ShapeError):
        DepthwiseConv(4)(torch.randn(1, 2, 6, 2), (2, 2))
