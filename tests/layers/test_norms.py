from __future__ import annotations

import torch

from regard.layers.norms import SRMSNorm, srms_norm


def test_srms_norm_is_rms_norm_without_weight() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(SRMSNorm()(x), torch.nn.functional.rms_norm(x, (8,), eps=0.0))


def test_srms_norm_keeps_zeros_and_their_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    srms_norm(x).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_srms_norm_of_half_precision_does_not_overflow() -> None:
    x = torch.full((4,), 6e4, dtype=torch.float16)
    torch.testing.assert_close(srms_norm(x), torch.ones(4, dtype=torch.float16))
