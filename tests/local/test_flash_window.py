"""Flash window attention as a mechanism: Swin's numbers by another kernel, and the model of its traffic."""

from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError
from regard.local.flash_window import FlashWindowAttention, window_traffic
from regard.local.swin import SwinAttention, SwinBlock
from regard.masks import KeyPadding

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.mark.paper("flash_window")
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (5, 7), (3, 3)])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("position_bias", ["table", "continuous", None])
def test_shifted_windows_are_those_of_swin(size, shift, position_bias) -> None:
    height, width = size
    inputs = [torch.randn(2, 4, height * width, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = {"window": 4, "shift": shift, "position_bias": position_bias, "num_heads": 4}
    swin, flash = SwinAttention(**options).double(), FlashWindowAttention(**options, chunk=3).double()
    flash.load_state_dict(swin.state_dict())
    probe = torch.randn_like(inputs[2])
    for mask in (None, KeyPadding(torch.rand(2, height * width) < 0.7), torch.rand(2, 4, *(height * width,) * 2) < 0.5):
        results = []
        for module in (swin, flash):
            out = module(*inputs, grid=size, mask=mask)
            results.append((out, *torch.autograd.grad(out, [*inputs, *module.parameters()], probe)))
        for ours, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, expected, **TIGHT)


@pytest.mark.paper("flash_window")
def test_standard_attention_moves_one_plus_n_over_d_as_many_bytes() -> None:
    sizes = {"n": 49, "d": 32, "heads": 3, "windows": 1024, "dtype": torch.float16}
    standard, flash, ours = (window_traffic(**sizes, scheme=s) for s in ("standard", "flash", "flash_window"))
    assert standard.moved / ours.moved == 1 + 49 / 32
    assert round(standard.moved / ours.moved, 2) == 2.53
    assert ours.moved == 3 * 1024 * 2 * sum(49 * 32 for _ in "qkvo")
    # A sequence's tiling gains nothing here: the same bytes, and whole rows on chip.
    assert flash.moved == ours.moved
    assert flash.on_chip - ours.on_chip == 2 * (3 * 49 * 32 - 2 * 49 * 16)
    assert ours.on_chip == 4 * 49**2 + 2 * 2 * 49 * 16
    assert window_traffic(**sizes, chunk=64).on_chip == window_traffic(**sizes, chunk=32).on_chip


def test_blocks_run_on_it() -> None:
    plain = SwinBlock(16, 2, window=4, shift=2).double()
    other = SwinBlock(16, 2, window=4, shift=2, impl="flash_window").double()
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9 * 6, 16, dtype=torch.float64)
    torch.testing.assert_close(other(x, grid=(9, 6)), plain(x, grid=(9, 6)), **TIGHT)


def test_bad_options_teach() -> None:
    with pytest.raises(OptionError, match="chunk"):
        FlashWindowAttention(chunk=0)
    with pytest.raises(OptionError, match="scheme"):
        window_traffic(49, 32, 1, 1, scheme="tiled")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least 1"):
        window_traffic(49, 0, 1, 1)
    with pytest.raises(OptionError, match="flash_window"):
        SwinBlock(16, 2, impl="flash")
