"""The delta rule: every form against the loop over tokens, and what the rule is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.kernels import delta_rule, linear_attention, segments
from regard.kernels.delta_rule import FORMS as PLAIN

FORMS = ["auto", *PLAIN]


def inputs(length: int, kv_heads: int = 4) -> list[Tensor]:
    query, key = (torch.randn(2, heads, length, 5, dtype=torch.float64) for heads in (4, kv_heads))
    value = torch.randn(2, kv_heads, length, 3, dtype=torch.float64)
    beta, gap = torch.rand(2, 4, length, dtype=torch.float64), -torch.rand(2, 4, length, dtype=torch.float64)
    leaves = [query, torch.nn.functional.normalize(key, dim=-1), value, beta, gap]
    return [leaf.requires_grad_() for leaf in leaves]


def looped(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, gap: Tensor, state: Tensor) -> Tensor:
    """``exp(g) (I - beta k k^T) S + beta k v^T`` as it stands; output and last state side by side."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    outs, one = [], torch.eye(query.shape[-1], dtype=query.dtype)
    for t in range(query.shape[2]):
        k, b = key[:, :, t, :, None], beta[:, :, t, None, None]
        state = gap[:, :, t, None, None].exp() * ((one - b * k @ k.transpose(-1, -2)) @ state)
        state = state + b * k @ value[:, :, t, None]
        outs.append((query[:, :, t, None] @ state)[:, :, 0])
    return torch.cat((torch.stack(outs, 2).flatten(), state.flatten()))


@pytest.mark.parametrize("limit", [1, 1 << 19])
@pytest.mark.parametrize(("length", "kv_heads", "chunk"), [(1, 4, 64), (37, 2, 8), (16, 1, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_the_rule(
    form: str, length: int, kv_heads: int, chunk: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, in two stretches with the state carried over; as one segment, and as many."""
    monkeypatch.setattr(segments, "_SEGMENT", limit)
    leaves = inputs(length + 3, kv_heads)
    state, outs = None, []
    for part in (slice(0, 3), slice(3, length + 3)):
        q, k, v, beta, gap = (leaf[:, :, part] for leaf in leaves)
        out, state = delta_rule(q, k, v, beta, log_decay=gap, state=state, chunk_size=chunk, backend=form)
        outs.append(out)
    assert state is not None
    actual = torch.cat((torch.cat(outs, 2).flatten(), state.sum.flatten()))
    expected = looped(*leaves, torch.zeros(2, 4, 5, 3, dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(total, leaves, seed) for total in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_a_unit_key_is_overwritten(form: str) -> None:
    """With beta = 1 the last value written under a key is what it gives back, whatever stood there."""
    key = torch.eye(4).repeat(3, 1)[None, None].double()
    value = torch.randn(1, 1, 12, 3, dtype=torch.float64)
    _, state = delta_rule(key, key, value, torch.ones(1, 1, 12, dtype=torch.float64), chunk_size=5, backend=form)
    torch.testing.assert_close(state.sum[0, 0], value[0, 0, 8:])


@pytest.mark.parametrize("form", FORMS)
def test_orthogonal_keys_make_it_a_plain_sum(form: str) -> None:
    """Nothing is taken away then: linear attention with values times beta."""
    query, _, value, beta, gap = inputs(5)
    key = torch.eye(5, dtype=torch.float64).expand(2, 4, 5, 5)
    out, state = delta_rule(query, key, value, beta, log_decay=gap, backend=form)
    plain, total = linear_attention(query, key, value * beta[..., None], causal=True, log_decay=gap)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(state.sum, total.sum)


@pytest.mark.parametrize("form", FORMS)
def test_minus_infinity_begins_anew(form: str) -> None:
    leaves = inputs(20)
    gap = leaves[4].detach().clone()
    gap[:, :, 7] = float("-inf")
    out, _ = delta_rule(*leaves[:4], log_decay=gap, chunk_size=8, backend=form)
    alone, _ = delta_rule(*(t[:, :, 7:] for t in leaves[:4]), log_decay=leaves[4][:, :, 7:], backend="recurrent")
    torch.testing.assert_close(out[:, :, 7:], alone)
    assert all(bool(t.isfinite().all()) for t in torch.autograd.grad(out.sum(), leaves[:4]))


def test_errors_teach() -> None:
    q, k, v, beta, _ = inputs(5)
    with pytest.raises(ShapeError, match="a key and a value per query"):
        delta_rule(q[:, :, :4], k, v, beta)
    with pytest.raises(ShapeError, match="beta is"):
        delta_rule(q, k, v, beta[:, :1])


def test_states_move_between_forms() -> None:
    """A prompt in chunks, tokens one by one, then the matrix form: the loop all along."""
    leaves = [leaf.detach() for leaf in inputs(30, 2)]
    expected = looped(*leaves, torch.zeros(2, 4, 5, 3, dtype=torch.float64))
    state, outs = None, []
    for form, start, stop in (("chunked", 0, 17), ("recurrent", 17, 20), ("parallel", 20, 30)):
        q, k, v, beta, gap = (leaf[:, :, start:stop] for leaf in leaves)
        out, state = delta_rule(q, k, v, beta, log_decay=gap, state=state, chunk_size=8, backend=form)
        outs.append(out)
    assert state is not None
    torch.testing.assert_close(torch.cat((torch.cat(outs, 2).flatten(), state.sum.flatten())), expected)
