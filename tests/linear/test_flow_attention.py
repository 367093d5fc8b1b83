from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.linear.flow_attention import Flow, FlowAttention, flow_attention, flow_quantities
from regard.masks import KeyPadding, SlidingWindow


def draw(n: int = 11, m: int = 17, d: int = 5, dv: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 3, n, d), (2, 3, m, d), (2, 3, m, dv))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """The paper's equations with explicit n x m flows."""
    q, k, n, m = torch.sigmoid(query), torch.sigmoid(key), query.shape[2], key.shape[2]
    incoming = torch.einsum("bhnd,bhd->bhn", q + eps, k.sum(2) + eps)
    outgoing = torch.einsum("bhmd,bhd->bhm", k + eps, q.sum(2) + eps)
    sink = torch.einsum("bhnd,bhd->bhn", q + eps, (k / outgoing[..., None]).sum(2) + eps)
    source = torch.einsum("bhmd,bhd->bhm", k + eps, (q / incoming[..., None]).sum(2) + eps).clamp(-1, 1)
    weights = torch.einsum("bhnd,bhmd->bhnm", q / incoming[..., None], k) * (m * source.softmax(-1))[:, :, None]
    return torch.sigmoid(sink * n / m)[..., None] * (weights @ value)


def causal_by_hand(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """The causal equations one position after another; what is known of a source is fixed when it comes."""
    q, k = torch.sigmoid(query), torch.sigmoid(key)
    length = q.shape[2]
    zero = torch.zeros((), dtype=q.dtype)
    given, taken, force = zero, zero, zero
    weighted, rows = [], []
    for t in range(length):
        count = t + 1
        keys, queries = k[:, :, :count].sum(2), q[:, :, :count].sum(2)
        incoming = ((q[:, :, t] + eps) * (keys + eps)).sum(-1, keepdim=True)
        outgoing = ((k[:, :, t] + eps) * (queries + eps)).sum(-1, keepdim=True)
        given = given + k[:, :, t] * count / outgoing
        taken = taken + q[:, :, t] * count / incoming
        sink = ((q[:, :, t] + eps) * (given + eps)).sum(-1, keepdim=True) / count
        source = (((k[:, :, t] + eps) * (taken + eps)).sum(-1, keepdim=True) / count).clamp(-1, 1)
        force = force + source.exp()
        weighted.append(value[:, :, t] * source.exp() / force * count)
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t] / incoming, k[:, :, :count])
        rows.append(torch.sigmoid(sink) * torch.einsum("bhs,bhse->bhe", scores, torch.stack(weighted, 2)))
    return torch.stack(rows, 2)


@pytest.mark.paper("flow_attention")
def test_conservation_makes_each_flow_one() -> None:
    query, key, _ = draw()
    q, k = torch.sigmoid(query), torch.sigmoid(key)
    flows = flow_quantities(query, key, eps=0)
    sources = torch.einsum("bhmd,bhnd->bhm", k / flows.outgoing[..., None], q)
    sinks = torch.einsum("bhnd,bhmd->bhn", q / flows.incoming[..., None], k)
    torch.testing.assert_close(sources, torch.ones_like(sources), rtol=0, atol=1e-14)
    torch.testing.assert_close(sinks, torch.ones_like(sinks), rtol=0, atol=1e-14)


@pytest.mark.paper("flow_attention")
@pytest.mark.parametrize("sizes", [(11, 17), (40, 3), (1, 1)])
def test_conserved_flows_add_up(sizes: tuple[int, int]) -> None:
    n, m = sizes
    query, key, _ = draw(n, m)
    flows = flow_quantities(query, key, eps=0)
    everywhere = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(flows.conserved_incoming.sum(-1), m * everywhere, rtol=1e-13, atol=0)
    torch.testing.assert_close(flows.conserved_outgoing.sum(-1), n * everywhere, rtol=1e-13, atol=0)


@pytest.mark.paper("flow_attention")
def test_without_both_parts_it_is_kernel_attention() -> None:
    query, key, value = draw()
    scores = torch.sigmoid(query) @ torch.sigmoid(key).transpose(-1, -2)
    expected = scores / scores.sum(-1, keepdim=True) @ value
    out = flow_attention(query, key, value, competition=False, allocation=False, eps=1e-12)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.paper("flow_attention")
@pytest.mark.parametrize("sizes", [(11, 17), (17, 11), (1, 6), (64, 64)])
def test_equal_tokens_give_a_gated_mean(sizes: tuple[int, int]) -> None:
    n, m = sizes
    query, key, value = draw(n, m)
    query, key = query[:, :, :1].expand(-1, -1, n, -1), key[:, :, :1].expand(-1, -1, m, -1)
    expected = torch.sigmoid(torch.ones((), dtype=torch.float64)) * value.mean(2, keepdim=True).expand(-1, -1, n, -1)
    torch.testing.assert_close(flow_attention(query, key, value, eps=1e-13), expected, rtol=0, atol=1e-11)


@pytest.mark.paper("flow_attention")
def test_later_tokens_change_nothing_earlier() -> None:
    query, key, value = draw(90, 90)
    before = flow_attention(query, key, value, causal=True)
    q, k, v = (torch.cat((t[:, :, :40], 3 * torch.randn_like(t[:, :, 40:])), 2) for t in (query, key, value))
    after = flow_attention(q, k, v, causal=True)
    torch.testing.assert_close(after[:, :, :40], before[:, :, :40], rtol=0, atol=1e-14)
    assert (after[:, :, 40:] - before[:, :, 40:]).abs().max() > 0.1


@pytest.mark.paper("flow_attention")
def test_linear_form_is_the_explicit_one() -> None:
    query, key, value = draw()
    torch.testing.assert_close(flow_attention(query, key, value), by_hand(query, key, value), rtol=0, atol=1e-13)
    query, key, value = draw(90, 90)
    out = flow_attention(query, key, value, causal=True)
    torch.testing.assert_close(out, causal_by_hand(query, key, value), rtol=0, atol=1e-12)


@pytest.mark.paper("flow_attention")
def test_permutations() -> None:
    query, key, value = draw()
    out, rows, columns = flow_attention(query, key, value), torch.randperm(11), torch.randperm(17)
    moved = flow_attention(query[:, :, rows], key[:, :, columns], value[:, :, columns])
    torch.testing.assert_close(moved, out[:, :, rows], rtol=0, atol=1e-13)


def test_decoding_state_does_not_grow() -> None:
    query, key, value = draw(30, 30)
    mechanism, parts = Flow(), []
    state = mechanism.init_state(2, like=query)
    for t in range(30):
        q, k, v = (x[:, :, t : t + 1] for x in (query, key, value))
        out, state = mechanism.step(q, k, v, state)
        parts.append(out)
        assert state is not None and state.context.sum.shape == (2, 3, 5, 4)
    torch.testing.assert_close(torch.cat(parts, 2), causal_by_hand(query, key, value), rtol=0, atol=1e-12)


def test_causal_quantities_are_those_of_the_prefix() -> None:
    query, key, _ = draw(20, 20)
    flows = flow_quantities(query, key, causal=True, eps=0)
    q, k = torch.sigmoid(query), torch.sigmoid(key)
    torch.testing.assert_close(flows.incoming[..., 12], (q[:, :, 12] * k[:, :, :13].sum(2)).sum(-1))
    torch.testing.assert_close(flows.outgoing[..., 12], (k[:, :, 12] * q[:, :, :13].sum(2)).sum(-1))
    with pytest.raises(ShapeError):
        flow_quantities(query, key[:, :, 1:], causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_neither_source_nor_sink(causal: bool) -> None:
    query, key, value = draw(20, 20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, :4], valid[1, 15:] = False, False
    out = Flow()(query, key, value, causal=causal, mask=KeyPadding(valid))
    for b in range(2):
        q, k, v = (t[b : b + 1][:, :, valid[b]] for t in (query, key, value))
        expected = causal_by_hand(q, k, v) if causal else by_hand(q, k, v)
        torch.testing.assert_close(out[b : b + 1][:, :, valid[b]], expected, rtol=0, atol=1e-12)


def test_a_mask_of_cross_attention_leaves_the_queries() -> None:
    query, key, value = draw(17, 17)
    valid = torch.arange(17) < 12
    out = Flow(mask_queries=False)(query, key, value, mask=KeyPadding(valid.expand(2, -1)))
    torch.testing.assert_close(out, by_hand(query, key[:, :, :12], value[:, :, :12]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_huge_numbers(causal: bool) -> None:
    query, key, value = (1e4 * t.float() for t in draw(40, 40))
    out = flow_attention(query, key, value, causal)
    assert bool(torch.isfinite(out).all())
    wide = flow_attention(query.double(), key.double(), value.double(), causal)
    torch.testing.assert_close(out.double(), wide, rtol=1e-3, atol=1e-4 * float(wide.abs().max()))


@pytest.mark.parametrize("causal", [False, True])
def test_layer_projects_around_the_mechanism(causal: bool) -> None:
    layer = FlowAttention(12, 3).double().eval()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    parts = [
        F.linear(x, p.weight, p.bias).view(2, 9, 3, 4).transpose(1, 2) for p in (layer.query, layer.key, layer.value)
    ]
    inner = (causal_by_hand if causal else by_hand)(parts[0], parts[1], parts[2])
    expected = F.linear(inner.transpose(1, 2).reshape(2, 9, 12), layer.out.weight, layer.out.bias)
    torch.testing.assert_close(layer(x, causal=causal), expected)
    assert layer.dropout.p == 0.05
    context = torch.randn(2, 5, 12, dtype=torch.float64)
    assert layer(x, context).shape == (2, 9, 12)


def test_what_is_refused() -> None:
    query, key, value = draw()
    with pytest.raises(ShapeError):
        flow_attention(query, key, value, causal=True)
    with pytest.raises(OptionError):
        Flow(eps=0)
    with pytest.raises(ValueError, match="KeyPadding"):
        FlowAttention(12, 3)(torch.randn(2, 9, 12), mask=SlidingWindow(3))
