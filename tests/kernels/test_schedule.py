"""The scheduler against its formulas, and against trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard.dense.attention_engine import meta_tensor
from regard.errors import ShapeError
from regard.kernels.schedule import H100, schedule

pytestmark = pytest.mark.paper("attention_engine")


def meta(length: int, dim: int, value_dim: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    return tuple(meta_tensor(1, 2, length, d, dtype=dtype) for d in (dim, dim, value_dim))


@pytest.mark.parametrize(
    ("dim", "value_dim", "dtype"), [(64, 64, torch.float16), (128, 256, torch.float16), (64, 96, torch.float32)]
)
def test_what_is_kept_is_all_that_fits(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    length, size, expected = 160, dtype.itemsize, set()
    everything = itertools.product(
        (64, 128, 192), range(16, 161, 16), (0, 1), (0, 1), range(128, 1025, 128), (1, 2, 3, 4)
    )
    for m, n, scores, output, threads, stages in everything:
        shared = m * dim * size + n * dim * stages * size + n * value_dim * stages * size
        shared += 4 * m * n * scores + 4 * m * value_dim * output
        registers = 4 * (m * n + m * value_dim) / (threads * 4)
        # A group of 128 threads takes 64 rows.
        fits = shared <= 232448 and registers <= 255 and registers * threads <= 65536
        if fits and m % (64 * threads // 128) == 0:
            expected.add((m, n, dim, bool(scores), bool(output), threads, stages, shared, registers))
    found = schedule(meta(length, dim, value_dim, dtype))  # type: ignore[arg-type]
    listed = [tuple(vars(config).values()) for config in found.configs]
    assert found.fuse and set(listed) == expected and len(listed) == len(expected)


def test_long_inputs_are_enumerated_within_the_limits() -> None:
    found = schedule(meta(4096, 128, 128), H100)  # type: ignore[arg-type]
    assert found.fuse
    for c in found.configs:
        assert c.shared_bytes <= 232448 and c.registers_per_thread <= 255
        assert c.registers_per_thread * c.threads <= 65536 and c.block_k == 128


def test_nothing_fits_wide_outputs() -> None:
    """64 rows of 1024 channels fill all registers before a score is there; a score dim is a multiple of 16."""
    assert not schedule(meta(256, 64, 1024)).fuse  # type: ignore[arg-type]
    assert not schedule(meta(256, 40, 64)).fuse  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="schedule"):
        schedule((meta_tensor(1, 2, 3), *meta(9, 16, 16)[1:]))  # type: ignore[arg-type]
