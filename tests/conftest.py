"""Settings for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tensors here are tiny: threads would only wait for one another


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
