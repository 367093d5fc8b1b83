"""The engine's recurrent pattern against masked products and against the recurrence of the paper it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.dense.attention_engine import meta_tensor
from regard.dense.linear_attention_engine import (
    LinearAttentionEngine,
    mamba2_engine,
    retention_decay,
    retention_engine,
    simple_gla_engine,
)
from regard.errors import OptionError, ShapeError
from regard.layers.ssm import ssd_scan

pytestmark = pytest.mark.paper("attention_engine")

BATCH, HEADS, LENGTH, DIM, VALUE_DIM = 2, 3, 37, 8, 5
META = tuple(meta_tensor(BATCH, HEADS, LENGTH, d, dtype=torch.float64) for d in (DIM, DIM, VALUE_DIM))
CHUNKS = (1, 5, 16, 37, 64)


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((LENGTH, DIM), (LENGTH, DIM), (LENGTH, VALUE_DIM), (LENGTH,))
    return tuple(torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


def masked(query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """``(q k^T * exp(sum of decays between)) v`` over the past."""
    run = decay.cumsum(-1)
    fade = (run[..., :, None] - run[..., None, :]).exp().tril()
    return (query @ key.mT * fade) @ value


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gated_linear_attention_is_a_masked_product(chunk: int) -> None:
    query, key, value, gate = (t.requires_grad_() for t in inputs())
    decay = F.logsigmoid(gate)
    out = simple_gla_engine(META, chunk)(query, key, value, decay)  # type: ignore[arg-type]
    expected = masked(query * DIM**-0.5, key, value, decay)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    given = (query, key, value, gate)
    meant = torch.autograd.grad(expected.sin().sum(), given, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), given), meant, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_retention_is_a_masked_product_with_its_decays(chunk: int) -> None:
    query, key, value, _ = inputs()
    out = retention_engine(META, chunk)(query, key, value, retention_decay(query))  # type: ignore[arg-type]
    gap = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7], dtype=torch.float64)
    fade = torch.where(gap >= 0, gamma[:, None, None] ** gap, 0)
    torch.testing.assert_close(out, (query @ key.mT * DIM**-0.5 * fade) @ value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_mamba2_is_ssd(chunk: int) -> None:
    query, key, value, steps = inputs()
    dt, a = F.softplus(steps).requires_grad_(), torch.tensor([-0.1, -1.0, -3.0], dtype=torch.float64).requires_grad_()
    out = mamba2_engine(META, chunk)(query, key, value, dt, a, dt)  # type: ignore[arg-type]
    expected = masked(query, key * dt[..., None], value, dt * a[:, None])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    for x, y in zip(
        torch.autograd.grad(out.sin().sum(), (dt, a), retain_graph=True),
        torch.autograd.grad(expected.sin().sum(), (dt, a)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    # As the recurrence runs in Mamba-2's own layout, whose B and C all heads share.
    shared = [t[:, :1].expand(-1, HEADS, -1, -1) for t in (query, key)]
    found = mamba2_engine(META, chunk)(*shared, value, dt, a, dt)  # type: ignore[arg-type]
    scanned, _ = ssd_scan(value.transpose(1, 2), dt.transpose(1, 2), a, key[:, 0], query[:, 0])
    torch.testing.assert_close(found, scanned.transpose(1, 2), rtol=1e-10, atol=1e-11)


def test_values_change_too_and_steps_give_the_whole() -> None:
    query, key, value, gate = inputs()

    def gated(v: Tensor, custom: Any) -> Tensor:
        changed: Tensor = v * custom["gate"] + custom["shift"]
        return changed

    engine = LinearAttentionEngine(
        META,  # type: ignore[arg-type]
        v_mod=gated,
        decay_mod=lambda g, custom: -g.exp(),
        custom_io={"gate": ("batch", "heads", "seq_len"), "shift": (1, "seq_len", 1)},
        chunk=8,
    )
    shift = torch.arange(LENGTH, dtype=torch.float64).view(1, -1, 1)
    whole = engine(query, key, value, gate, gate, shift)
    changed = value * gate[..., None] + shift[:, None]
    torch.testing.assert_close(whole, masked(query, key, changed, -gate.exp()), rtol=1e-9, atol=1e-9)
    state, parts = engine.init_state(BATCH, like=query), []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 9), slice(9, LENGTH)):
        q, k, v, g = (t[:, :, rows] for t in (query, key, value, gate))
        out, state = engine.step(q, k, v, g, g, shift[:, rows], state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-9, atol=1e-9)


def test_bad_input_is_refused() -> None:
    query, key, value, gate = inputs()
    engine = simple_gla_engine(META)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="decay"):
        engine(query, key, value, gate[..., :3])
    with pytest.raises(ShapeError, match="custom inputs"):
        engine(query, key, value, gate, gate)
    with pytest.raises(OptionError, match="chunk"):
        simple_gla_engine(META, 0)  # type: ignore[arg-type]
