"""Every error is the library's own and the built-in that a caller would catch; wrong input meets one that teaches."""

from __future__ import annotations

import pytest
import torch

import regard
from regard import errors
from regard.errors import (
    MissingExtraError,
    OptionError,
    PlacementError,
    RegardError,
    ShapeError,
    UnknownNameError,
    UnsupportedMaskError,
)


def test_every_error_has_the_common_root_and_a_builtin_base() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, RegardError)
        if error is not RegardError:
            assert issubclass(error, (ValueError, RuntimeError, LookupError, ImportError))


def test_unknown_names_come_with_the_nearest() -> None:
    error = UnknownNameError("mechanism", "slidin_windw", ["full", "sliding_window", "moba"], "See the list.")
    assert str(error).startswith("There is no mechanism named 'slidin_windw'. Did you mean 'sliding_window'?")
    assert str(error).endswith("See the list.")
    assert error.nearest == ["sliding_window"]
    assert "Did you mean" not in str(UnknownNameError("mechanism", "zzz", ["full"]))


def test_missing_extra_says_what_to_install() -> None:
    assert "pip install 'regard[plot]'" in str(MissingExtraError("Drawing", "plot"))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


Q = (2, 4, 6, 8)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ((Q[1:], Q, Q), "four axes"),
        ((Q, (3, 4, 6, 8), (3, 4, 6, 8)), "Batch sizes differ"),
        ((Q, (2, 3, 6, 8), (2, 3, 6, 8)), "divides the query's"),
        ((Q, Q, (2, 2, 6, 8)), "same number of heads"),
        ((Q, Q, (2, 4, 5, 8)), "lengths differ"),
        ((Q, (2, 4, 8, 6), (2, 4, 8, 6)), "ranspose 1 and 2"),
        ((Q, (2, 4, 0, 8), (2, 4, 0, 8)), "at least one query and one key"),
    ],
)
def test_wrong_shapes(shapes: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        regard.attention(*(tensor(*shape) for shape in shapes))


def test_wrong_dtypes_and_devices() -> None:
    query = tensor(*Q)
    with pytest.raises(PlacementError, match=r"key.to\(query.dtype\)"):
        regard.attention(query, query.half(), query.half())
    with pytest.raises(PlacementError, match="floating"):
        regard.attention(*(tensor(*Q, dtype=torch.int64),) * 3)
    with pytest.raises(PlacementError, match="different devices: cpu, meta"):
        regard.attention(query, query.to("meta"), query.to("meta"))


def test_wrong_masks() -> None:
    inputs = (tensor(*Q),) * 3
    with pytest.raises(UnsupportedMaskError, match=r"boolean .* or floating"):
        regard.attention(*inputs, mask=torch.ones(6, 6, dtype=torch.int64))
    with pytest.raises(ShapeError, match="does not broadcast"):
        regard.attention(*inputs, mask=torch.ones(6, 5))
    with pytest.raises(ShapeError, match=r"does not cover|does not broadcast"):
        regard.attention(*inputs, mask=torch.ones(6, 5, dtype=torch.bool))
    with pytest.raises(ShapeError, match="does not broadcast"):
        regard.attention(*inputs, mask=torch.ones(3, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(UnsupportedMaskError, match="takes_bias=True"):
        regard.attention(*inputs, "sliding_window", mask=torch.zeros(6, 6))


def test_wrong_grid() -> None:
    with pytest.raises(ShapeError, match=r"grid \(2, 4\) holds 8 tokens, but there are 6 queries"):
        regard.attention(*(tensor(*Q),) * 3, grid=(2, 4))


def test_wrong_options() -> None:
    inputs = (tensor(*Q),) * 3
    with pytest.raises(OptionError, match="Did you mean 'window'"):
        regard.attention(*inputs, "sliding_window", windw=3)
    with pytest.raises(OptionError, match="already has its own"):
        regard.attention(*inputs, regard.create("full"), window=3)
    with pytest.raises(UnknownNameError, match="sliding_window"):
        regard.attention(*inputs, "sliding_windows")
