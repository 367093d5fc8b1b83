"""Both forms of a linear map of tokens are torch's linear layer, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.kernels import token_linear as kernel
from regard.kernels.token_linear import token_linear
from regard.layers.linear import TokenLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 5), (1, 1, 5), (2, 0, 5)])
@pytest.mark.parametrize("form", ["reference", "convolution"])
def test_equals_the_product(form: str, shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    added = torch.randn(4, dtype=torch.float64, requires_grad=True) if bias else None
    if form == "convolution" and not x.numel():
        pytest.skip("a convolution of nothing is not asked for")
    out, wanted = token_linear(x, weight, added, backend=form), x @ weight.T + (0 if added is None else added)
    torch.testing.assert_close(out, wanted)
    leaves = [x, weight] if added is None else [x, weight, added]
    probe = torch.randn_like(wanted)
    for found, exact in zip(
        torch.autograd.grad(out, leaves, probe), torch.autograd.grad(wanted, leaves, probe), strict=True
    ):
        torch.testing.assert_close(found, exact)


def test_strided_tokens_and_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_onednn_is_faster", lambda: True)
    layer, x = TokenLinear(16, 8), torch.randn(16, 40, 30).permute(1, 2, 0)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == {"weight", "bias"}
