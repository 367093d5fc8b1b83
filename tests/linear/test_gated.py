"""Gated linear attention against a loop over tokens, for every update and decay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError
from regard.linear.gated import GatedLinearAttention
from regard.masks import KeyPadding

WIDTH, HEADS = 8, 2
CHOICES = [("sum", "none"), ("sum", "head"), ("sum", "channel"), ("delta", "none"), ("delta", "head")]


def build(update: str, decay: str, kernel_size: int = 3) -> GatedLinearAttention:
    torch.manual_seed(0)
    layer = GatedLinearAttention(WIDTH, HEADS, update, decay, kernel_size, gate_rank=3, chunk_size=4)  # type: ignore[arg-type]
    return layer.double()


def looped(layer: GatedLinearAttention, x: Tensor) -> Tensor:
    """Token by token from the formulas; of the layer it takes the weights alone."""
    dim, weights = WIDTH // HEADS, dict(layer.named_parameters())
    mixed = x @ weights["project.weight"].mT
    if "conv.weight" in weights:
        taps = weights["conv.weight"]
        size = taps.shape[1]
        padded = F.pad(mixed, (0, 0, size - 1, 0))
        mixed = sum(padded[:, j : j + x.shape[1]] * taps[:, j] for j in range(size))
        mixed = mixed * mixed.sigmoid()
    rows = []
    state = x.new_zeros(x.shape[0], HEADS, dim, dim)
    for t in range(x.shape[1]):
        q, k, v = (part.view(-1, HEADS, dim) for part in mixed[:, t].chunk(3, -1))
        now, fade = x[:, t], torch.ones(x.shape[0], HEADS, 1, dtype=x.dtype)
        if layer.decay == "head":
            fade = (now @ weights["fade.weight"].mT + weights["fade.bias"]).sigmoid()[..., None] ** (1 / 16)
        elif layer.decay == "channel":
            logit = now @ weights["fade.0.weight"].mT @ weights["fade.1.weight"].mT + weights["fade.1.bias"]
            fade = logit.sigmoid().view(-1, HEADS, dim) ** (1 / 16)
        if layer.update == "delta":
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            beta = (now @ weights["strength.weight"].mT).sigmoid()[..., None, None]
            state = fade[..., None] * (state - beta * k[..., None] * (k[..., None, :] @ state))
            state = state + beta * k[..., None] * v[..., None, :]
        else:
            q = q * dim**-0.5
            state = fade[..., None] * state + k[..., None] * v[..., None, :]
        out = (q[..., None, :] @ state)[..., 0, :]
        rows.append((out / out.square().mean(-1, keepdim=True).sqrt()).flatten(1))
    gate = x @ weights["gate.weight"].mT
    return (torch.stack(rows, 1) * gate * gate.sigmoid()) @ weights["out.weight"].mT


@pytest.mark.parametrize(("update", "decay"), CHOICES)
@pytest.mark.parametrize("kernel_size", [0, 3])
def test_the_layer_is_its_formulas(update: str, decay: str, kernel_size: int) -> None:
    """Whole, and in pieces with the state carried on; with gradients."""
    layer, x = build(update, decay, kernel_size), torch.randn(2, 11, WIDTH, dtype=torch.float64)
    expected = looped(layer, x)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    seed, names = torch.randn_like(out), list(layer.parameters())
    for a, b in zip(*(torch.autograd.grad(total, names, seed) for total in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    state, outs = layer.init_state(2, like=x), []
    for piece in x.split((5, 1, 3, 2), 1):
        part, state = layer.step(piece, state)
        outs.append(part)
    torch.testing.assert_close(torch.cat(outs, 1), expected)


@pytest.mark.parametrize(("update", "decay"), CHOICES)
def test_padding_before_a_sequence_changes_nothing(update: str, decay: str) -> None:
    layer, x = build(update, decay), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    padded = torch.cat((torch.randn(2, 4, WIDTH, dtype=torch.float64), x), 1)
    keys = torch.arange(13).expand(2, -1) >= 4
    torch.testing.assert_close(layer(padded, mask=KeyPadding(keys))[:, 4:], layer(x))


def test_errors_teach() -> None:
    with pytest.raises(OptionError, match="decay per head, not per channel"):
        GatedLinearAttention(8, 2, "delta", "channel")
    with pytest.raises(OptionError, match="update is one of sum, delta"):
        GatedLinearAttention(8, 2, "hebb")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="kernel_size >= 0"):
        GatedLinearAttention(8, 2, kernel_size=-1)
