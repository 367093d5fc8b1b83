"""Where Triton kernels are tested: on a GPU where there is one, else on a CPU through Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

__all__ = ["DEVICE", "needs_triton"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
