"""Settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter, which it decides when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
torch.set_num_threads(1)  # the tensors here are tiny: threads would only wait for one another


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
