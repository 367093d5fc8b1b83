from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError, UnsupportedPatternError
from regard.linear.agent_attention import (
    AgentAttention,
    AgentAttention2d,
    AgentBias,
    agent_attention,
    pool_agents,
    swap_agent,
)
from regard.masks import KeyPadding


def draw(length: int = 36, k_len: int | None = None, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    k_len = length if k_len is None else k_len
    query, key, value = (torch.randn(2, 3, n, d, dtype=torch.float64) for n in (length, k_len, k_len))
    return query, key, value


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """The generalised linear form: phi_q (phi_k^T V)."""
    scale = query.shape[-1] ** -0.5
    to_agents, to_keys = scale * query @ agents.transpose(-1, -2), scale * agents @ key.transpose(-1, -2)
    phi_q = torch.softmax(to_agents if bias2 is None else to_agents + bias2, -1)
    phi_k = torch.softmax(to_keys if bias1 is None else to_keys + bias1, -1).transpose(-1, -2)
    return phi_q @ (phi_k.transpose(-1, -2) @ value)


@pytest.mark.paper("agent_attention")
def test_rows_are_distributions_of_low_rank() -> None:
    query, key, _ = draw()
    weights = AgentAttention(agent_num=9).weights(query, key, grid=(6, 6))
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 36, dtype=torch.float64), rtol=0, atol=1e-14)
    singular = torch.linalg.svdvals(weights)
    assert bool((singular[..., 9:] < 1e-13).all())
    assert bool((singular[..., 8] > 1e-9).all())


@pytest.mark.paper("agent_attention")
@pytest.mark.parametrize("k_len", [36, 50])
def test_two_hops_are_the_linear_form(k_len: int) -> None:
    query, key, value = draw(36, k_len)
    agents = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    bias1, bias2 = torch.randn(3, 7, k_len, dtype=torch.float64), torch.randn(3, 36, 7, dtype=torch.float64)
    torch.testing.assert_close(agent_attention(query, key, value, agents), by_hand(query, key, value, agents))
    out, first, second = agent_attention(query, key, value, agents, bias1, bias2, return_maps=True)
    torch.testing.assert_close(out, by_hand(query, key, value, agents, bias1, bias2))
    torch.testing.assert_close(second @ (first @ value), out)
    for one in (first, second):
        torch.testing.assert_close(one.sum(-1), torch.ones_like(one[..., 0]))


@pytest.mark.paper("agent_attention")
def test_one_agent_gives_every_query_the_same() -> None:
    query, key, value = draw()
    out = AgentAttention(agent_num=1)(query, key, value)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), rtol=0, atol=1e-14)
    mean = query.mean(2, keepdim=True)
    torch.testing.assert_close(out[:, :, :1], torch.softmax(mean @ key.transpose(-1, -2) / 5**0.5, -1) @ value)


@pytest.mark.paper("agent_attention")
@pytest.mark.parametrize("agents", ["pooled", "strided", "learned"])
def test_constant_values_stay(agents: str) -> None:
    query, key, _ = draw()
    value = torch.randn(2, 3, 1, 5, dtype=torch.float64).expand(-1, -1, 36, -1)
    mechanism = AgentAttention(agent_num=9, agents=agents, bias_grid=(6, 6), num_heads=3, head_dim=5).double()
    torch.testing.assert_close(mechanism(query, key, value), value, rtol=0, atol=1e-14)


@pytest.mark.paper("agent_attention")
def test_permutations() -> None:
    query, key, value = draw()
    agents = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    bias1, bias2 = torch.randn(3, 7, 36, dtype=torch.float64), torch.randn(3, 36, 7, dtype=torch.float64)
    order = torch.randperm(7)
    out = agent_attention(query, key, value, agents, bias1, bias2)
    moved = agent_attention(query, key, value, agents[:, :, order], bias1[:, order], bias2[..., order])
    torch.testing.assert_close(moved, out, rtol=0, atol=1e-13)
    mechanism, columns = AgentAttention(agent_num=9), torch.randperm(36)
    swapped = mechanism(query, key[:, :, columns], value[:, :, columns], grid=(6, 6))
    torch.testing.assert_close(swapped, mechanism(query, key, value, grid=(6, 6)), rtol=0, atol=1e-13)


@pytest.mark.paper("agent_attention")
@pytest.mark.parametrize(("heads", "agents", "height", "width"), [(3, 49, 14, 14), (8, 9, 7, 11)])
def test_number_of_bias_parameters(heads: int, agents: int, height: int, width: int) -> None:
    bias = AgentBias(heads, agents, (height, width), class_token=True)
    assert sum(p.numel() for p in bias.parameters()) == heads * agents * (2 * 49 + 2 * (height + width) + 2)
    first, second = bias()
    assert first.shape == (heads, agents, height * width + 1)
    assert second.shape == (heads, height * width + 1, agents)


def test_agents_are_means_of_their_bins() -> None:
    query, _, _ = draw(42)
    agents = pool_agents(query, (6, 7), 4).view(2, 3, 2, 2, 5)
    grid = query.view(2, 3, 6, 7, 5)
    for row, rows in enumerate((slice(0, 3), slice(3, 6))):
        for column, columns in enumerate((slice(0, 4), slice(3, 7))):
            torch.testing.assert_close(agents[:, :, row, column], grid[:, :, rows, columns].mean((2, 3)))
    with_class = torch.cat((torch.randn(2, 3, 1, 5, dtype=torch.float64), query), 2)
    torch.testing.assert_close(pool_agents(with_class, (6, 7), 4, class_tokens=1).view_as(agents), agents)
    torch.testing.assert_close(pool_agents(query, None, 3)[:, :, 0], query[:, :, :14].mean(2))
    with pytest.raises(OptionError):
        pool_agents(query, (6, 7), 5)


def test_bias_is_map_plus_row_plus_column() -> None:
    bias = AgentBias(2, 4, (7, 7), class_token=True).double()
    assert bias.class_token is not None
    first, second = bias()
    row, column = 3, 5
    place = 1 + row * 7 + column
    for whole, index in ((first, 0), (second.transpose(1, 2), 1)):
        expected = bias.maps[index][:, :, row, column] + bias.rows[index][:, :, row] + bias.columns[index][:, :, column]
        torch.testing.assert_close(whole[:, :, place], expected)
        torch.testing.assert_close(whole[:, :, 0], bias.class_token[index][:, :, 0])
    wide = AgentBias(2, 4, (14, 14)).double()
    near = F.interpolate(wide.maps[0], size=(14, 14), mode="bilinear")
    expected = near + wide.rows[0][..., None] + wide.columns[0][:, :, None]
    torch.testing.assert_close(wide()[0], expected.flatten(2))


def test_padding_makes_no_agents() -> None:
    query, key, value = draw()
    valid = torch.ones(2, 36, dtype=torch.bool)
    valid[0, 20:] = False
    out = AgentAttention(agent_num=6)(query, key, value, mask=KeyPadding(valid))
    # Six bins of six: two of them hold padding alone, one holds two real tokens.
    agents = torch.stack([query[:, :, i : min(i + 6, 20)].mean(2) for i in (0, 6, 12, 18)], 2)
    torch.testing.assert_close(out[:1], by_hand(query[:1], key[:1, :, :20], value[:1, :, :20], agents[:1]))
    torch.testing.assert_close(out[1:], AgentAttention(agent_num=6)(query, key, value)[1:])


def test_shortcut_and_second_scale() -> None:
    query, key, value = draw()
    out = AgentAttention(agent_num=6, broadcast_scale=0.7, shortcut=0.075)(query, key, value)
    agents = query.view(2, 3, 6, 6, 5).mean(3)
    gathered = torch.softmax(agents @ key.transpose(-1, -2) / 5**0.5, -1) @ value
    expected = torch.softmax(0.7 * query @ agents.transpose(-1, -2), -1) @ gathered + 0.075 * value
    torch.testing.assert_close(out, expected)
    with pytest.raises(ShapeError):
        AgentAttention(agent_num=6, shortcut=0.1)(query, key[:, :, 1:], value[:, :, 1:])


@pytest.mark.parametrize("class_token", [False, True])
def test_module_is_the_formula(class_token: bool) -> None:
    first = int(class_token)
    module = AgentAttention2d(12, 3, agent_num=4, window=5, class_token=class_token).double()
    x = torch.randn(2, 25 + first, 12, dtype=torch.float64)
    query, key, value = (t.reshape(2, -1, 3, 4).transpose(1, 2) for t in F.linear(x, module.qkv.weight).split(12, -1))
    square = query[:, :, first:].reshape(2, 3, 5, 5, 4)
    agents = [square[:, :, a, b].mean((2, 3)) for a in (slice(0, 3), slice(2, 5)) for b in (slice(0, 3), slice(2, 5))]
    assert module.bias is not None and module.depthwise is not None
    out = by_hand(query, key, value, torch.stack(agents, 2), *module.bias())
    out = out.transpose(1, 2).reshape(2, -1, 12)
    maps = value.transpose(1, 2).reshape(2, -1, 12)[:, first:].transpose(1, 2).reshape(2, 12, 5, 5)
    conv = module.depthwise.conv
    local = F.conv2d(maps, conv.weight, conv.bias, padding=1, groups=12).flatten(2).transpose(1, 2)
    out = torch.cat((out[:, :first], out[:, first:] + local), 1)
    torch.testing.assert_close(module.tokens(x, (5, 5)), F.linear(out, module.out.weight, module.out.bias))
    if class_token:
        with pytest.raises(ShapeError):
            module(torch.randn(2, 12, 5, 5))
    else:
        torch.testing.assert_close(
            module(x.transpose(1, 2).reshape(2, 12, 5, 5)).flatten(2).transpose(1, 2), module.tokens(x, (5, 5))
        )


def test_other_grids_than_the_biases_were_made_for() -> None:
    module = AgentAttention2d(12, 3, agent_num=4, window=5)
    assert module(torch.randn(2, 12, 8, 3)).shape == (2, 12, 8, 3)


def test_no_causal_form() -> None:
    with pytest.raises(UnsupportedPatternError):
        AgentAttention()(*draw(), causal=True)


def test_traits_follow_the_options() -> None:
    assert not AgentAttention().needs_training
    assert AgentAttention(agents="learned", num_heads=3, head_dim=5).needs_training
    with pytest.raises(OptionError):
        AgentAttention(agents="learned")
    with pytest.raises(OptionError):
        AgentAttention(agents="random")
    with pytest.raises(OptionError):
        AgentAttention(bias_grid=(6, 6))


class CrossAttention(nn.Module):
    """Attention as in a latent diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            project(t).unflatten(-1, (2, 4)).transpose(1, 2)
            for project, t in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_swap_in_a_diffusion_model() -> None:
    model = nn.ModuleList([CrossAttention(), CrossAttention()]).double()
    x, context = torch.randn(2, 64, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    block = model[0]
    assert isinstance(block, CrossAttention)
    self_before, cross_before, few_before = block(x), block(x, context), block(x[:, :16])
    with swap_agent(model, agent_num=16) as handle:
        assert len(handle.modules) == 2
        q, k, v = (p(x).view(2, 64, 2, 4).transpose(1, 2) for p in (block.to_q, block.to_k, block.to_v))
        agents = q.reshape(2, 2, 4, 2, 4, 2, 4).mean((3, 5)).flatten(2, 3)
        gathered = torch.softmax(agents @ k.transpose(-1, -2) / 2, -1) @ v
        mixed = torch.softmax(4**-0.15 * q @ agents.transpose(-1, -2), -1) @ gathered + 0.075 * v
        torch.testing.assert_close(block(x), block.to_out(mixed.transpose(1, 2).flatten(2)))
        assert torch.equal(block(x, context), cross_before) and torch.equal(block(x, context=context), cross_before)
        assert torch.equal(block(x[:, :16]), few_before)
        handle.at(step=19, steps=50)
        assert not torch.equal(block(x), self_before)
        handle.at(step=20, steps=50)
        assert torch.equal(block(x), self_before)
    assert torch.equal(block(x), self_before)
    assert "forward" not in block.__dict__
    with pytest.raises(RetrofitError):
        swap_agent(nn.Linear(2, 2))
