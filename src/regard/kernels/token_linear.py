"""A linear map of tokens, ``x W^T + b``, by the faster of the two libraries that torch brings for CPUs.

``reference``: torch's own linear layer, in float32 a product by MKL. ``convolution``: the same as a 1 x 1 convolution,
which goes to oneDNN. On processors that are not Intel's MKL keeps to slower code, and oneDNN takes about half its time
forward and backward, so there ``auto`` takes it for float32 and more than a few tokens.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.backends import resolve

__all__ = ["token_linear"]

FORMS = ("reference", "convolution")

# Below so many tokens the call costs more than the product.
_FEW = 512


def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``x (..., in_features)``, weight ``(out_features, in_features)`` -> ``(..., out_features)``."""
    form = resolve("token_linear", backend, FORMS)
    if form == "auto":
        small = x.device.type != "cpu" or x.dtype != torch.float32 or x[..., 0].numel() < _FEW
        form = "reference" if small or not _onednn_is_faster() else "convolution"
    if form == "reference":
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


@cache
def _onednn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    try:
        maker = Path("/proc/cpuinfo").read_text().partition("vendor_id")[2].partition("\n")[0]
    except OSError:
        maker = platform.processor()
    return "AMD" in maker
