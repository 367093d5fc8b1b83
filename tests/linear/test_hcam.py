from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.linear.hcam import (
    HCAM,
    HCAMBlock,
    HCAMProjections,
    HCAMRead,
    HierarchicalMemory,
    backward_codes,
    chunk_mask,
    hcam_attention,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def maps(query_dim: int = 6, memory_dim: int = 8, dim: int = 8) -> HCAMProjections:
    """Projections with generic biases: the initial zeros would hide them."""
    made = HCAMProjections(query_dim, memory_dim, dim).double()
    for layer in (made.query, made.key, made.value, made.out):
        nn.init.normal_(layer.bias)
    return made


def torch_attention(projections: HCAMProjections, num_heads: int) -> nn.MultiheadAttention:
    """torch's own multi-head attention with the weights of the attention inside chunks."""
    query, key = projections.query, projections.key
    module = nn.MultiheadAttention(
        projections.out.in_features, num_heads, kdim=key.in_features, vdim=key.in_features, batch_first=True
    ).double()
    with torch.no_grad():
        if module.in_proj_weight is None:
            assert module.q_proj_weight is not None
            for target, layer in ((module.q_proj_weight, query), (module.k_proj_weight, key)):
                target.copy_(layer.weight)
            module.v_proj_weight.copy_(projections.value.weight)
        else:
            module.in_proj_weight.copy_(torch.cat([m.weight for m in (query, key, projections.value)]))
        module.in_proj_bias.copy_(torch.cat([m.bias for m in (query, key, projections.value)]))
        module.out_proj.load_state_dict(projections.out.state_dict())
    return module


@torch.no_grad()
def by_hand(
    queries: Tensor,
    memory: HierarchicalMemory,
    projections: HCAMProjections,
    top_k: int,
    num_heads: int,
    mask: Tensor | None = None,
    position: bool = True,
) -> HCAMRead:
    """Query by query: every chunk is read densely, and those that are not chosen get weight 0."""
    batch, chunks, chunk, width = memory.contents.shape
    attention = torch_attention(projections, num_heads)
    codes = torch.zeros(chunk, width, dtype=torch.float64)
    for step in range(chunk):
        for i in range(width // 2):
            angle = (chunk - 1 - step) / 10_000 ** (2 * i / width)
            codes[step, i], codes[step, width // 2 + i] = math.sin(angle), math.cos(angle)
    outputs = torch.zeros(batch, queries.shape[1], 8, dtype=torch.float64)
    weights = torch.zeros(batch, queries.shape[1], chunks, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries.shape[1]):
            x = queries[b, q]
            asked = projections.rank_query.weight @ x
            rank = torch.stack([asked @ (projections.rank_key.weight @ key) / 8**0.5 for key in memory.keys[b]])
            allowed = torch.ones(chunks, dtype=torch.bool) if mask is None else mask[b, q]
            best = [int(i) for i in rank.argsort(descending=True) if allowed[i]][:top_k]
            if not best:
                continue
            share = torch.zeros(chunks, dtype=torch.float64)
            share[best] = rank[best].softmax(0)
            for i in range(chunks):
                steps = (memory.contents[b, i] + (codes if position else 0))[None]
                outputs[b, q] += share[i] * attention(x[None, None], steps, steps)[0][0, 0]
            weights[b, q] = share
    return HCAMRead(outputs, torch.empty(0), weights)


def spread(read: HCAMRead, chunks: int) -> Tensor:
    """The weight of each chunk."""
    wide = torch.zeros(*read.weights.shape[:2], chunks + 1, dtype=read.weights.dtype)
    wide.scatter_(2, read.chosen.where(read.chosen >= 0, chunks), read.weights.detach())
    return wide[..., :-1]


@pytest.mark.paper("hcam")
@pytest.mark.parametrize("queries", [2, 12], ids=["gather-first", "project-first"])
@pytest.mark.parametrize("position", [True, False])
def test_gathered_is_dense(queries: int, position: bool) -> None:
    projections, x = maps(8), draw(2, queries, 8)
    memory = HierarchicalMemory.of(draw(2, 7 * 4, 8), 4)
    mask = torch.rand(2, queries, 7) < 0.6
    mask[0, 0] = False
    for shown in (None, mask):
        read = hcam_attention(x, memory, projections, 2, 4, shown, position)
        expected = by_hand(x, memory, projections, 2, 4, shown, position)
        torch.testing.assert_close(read.output, expected.output, **EXACT)
        torch.testing.assert_close(spread(read, 7), expected.weights, **EXACT)
    assert torch.equal(read.output[0, 0], torch.zeros(8).double())
    assert bool((read.chosen[0, 0] == -1).all())


@pytest.mark.paper("hcam")
def test_single_steps_are_softmax_attention_over_keys() -> None:
    """Chunks of one step, all of them read, and nothing done inside."""
    projections, x = maps(), draw(2, 5, 6)
    with torch.no_grad():
        for layer in (projections.value, projections.out):
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
    steps = draw(2, 9, 8)
    memory = HierarchicalMemory.of(steps, 1)
    torch.testing.assert_close(memory.keys, steps)
    for top_k in (9, 20):
        out = hcam_attention(x, memory, projections, top_k, 2, position=False).output
        query, key = F.linear(x, projections.rank_query.weight), F.linear(steps, projections.rank_key.weight)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, steps), **EXACT)


@pytest.mark.paper("hcam")
def test_gradients_reach_the_maps_and_not_the_memory() -> None:
    projections, x = maps(), draw(2, 5, 6).requires_grad_()
    keys, contents = draw(2, 6, 8).requires_grad_(), draw(2, 6, 3, 8).requires_grad_()
    memory = HierarchicalMemory(keys, contents, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 8).double())
    out = hcam_attention(x, memory, projections, 2, 2).output
    (out * draw(*out.shape)).sum().backward()
    assert keys.grad is None and contents.grad is None
    assert x.grad is not None and bool((x.grad != 0).any())
    for name, parameter in projections.named_parameters():
        if name == "key.bias":
            continue  # it moves all logits of a chunk alike
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-6, name
    written = HierarchicalMemory.empty(2, 2, 8, like=x).write(x[..., :1].expand(-1, -1, 8))
    assert not written.keys.requires_grad and not written.accumulator.requires_grad


@pytest.mark.paper("hcam")
def test_gradients_are_right_given_the_choice() -> None:
    """Finite differences, small enough to leave the choice of chunks as it is."""
    projections, memory = maps(), HierarchicalMemory.of(draw(1, 5 * 2, 8), 2)
    x = draw(1, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: hcam_attention(q, memory, projections, 2, 2).output, (x,))


@pytest.mark.paper("hcam")
def test_masked_chunks_are_never_chosen() -> None:
    projections, x = maps(), draw(2, 30, 6)
    memory = HierarchicalMemory.of(draw(2, 10 * 3, 8), 3)
    mask = torch.rand(2, 30, 10).argsort(-1) < 4  # four are shown to each
    read = hcam_attention(x, memory, projections, 4, 2, mask)
    assert bool((read.chosen >= 0).all()) and bool(mask.gather(2, read.chosen).all())
    torch.testing.assert_close(read.weights.sum(-1), torch.ones(2, 30).double())
    wide = hcam_attention(x, memory, projections, 6, 2, mask)
    assert bool(((wide.chosen == -1).sum(-1) == 2).all())
    torch.testing.assert_close(wide.output, read.output, **EXACT)


@pytest.mark.paper("hcam")
@pytest.mark.parametrize("length", [29, 4, 3])
def test_the_future_is_not_read(length: int) -> None:
    layer, x = HCAM(8, 2, 4, 2).double(), draw(2, length, 8)
    before = layer(x)
    for cut in range(1, length):
        changed = torch.cat((x[:, :cut], 3 * draw(2, length - cut, 8)), 1)
        torch.testing.assert_close(layer(changed)[:, :cut], before[:, :cut], **EXACT)
    # A chunk is read from the step after its last one on.
    assert torch.equal(before[:, :4], torch.zeros_like(before[:, :4]))
    if length > 4:
        assert bool((before[:, 4] != 0).all())


@pytest.mark.paper("hcam")
def test_a_full_chunk_is_written() -> None:
    memory, steps = HierarchicalMemory.empty(2, 3, 8, like=draw(1)), draw(2, 11, 8)
    for index in range(11):
        memory = memory.write(steps[:, index])
        count = (index + 1) // 3
        assert memory.keys.shape == (2, count, 8) and bool(memory.visible.all())
        assert memory.steps_since_last_write.tolist() == [(index + 1) % 3] * 2
        if count:
            chunk = steps[:, 3 * count - 3 : 3 * count]
            torch.testing.assert_close(memory.contents[:, -1], chunk)
            torch.testing.assert_close(memory.keys[:, -1], chunk.mean(1))
    whole = HierarchicalMemory.of(steps, 3)
    torch.testing.assert_close(whole.keys, memory.keys)
    torch.testing.assert_close(whole.contents, memory.contents)
    x = draw(2, 4, 8)
    more, expected = (m.write(x) for m in (whole, memory))
    torch.testing.assert_close(more.contents, expected.contents)


@pytest.mark.paper("hcam")
def test_the_oldest_chunk_is_overwritten() -> None:
    steps, projections, x = draw(2, 6 * 3, 8), maps(), draw(2, 5, 6)
    ring = HierarchicalMemory.empty(2, 3, 8, like=steps, slots=4).write(steps)
    assert ring.keys.shape[1] == 4
    last = HierarchicalMemory.of(steps[:, 2 * 3 :], 3)
    torch.testing.assert_close(
        hcam_attention(x, ring, projections, 2).output, hcam_attention(x, last, projections, 2).output, **EXACT
    )


@pytest.mark.paper("hcam")
def test_reset_forgets_one_past_alone() -> None:
    steps, projections, x = draw(2, 8, 8), maps(), draw(2, 5, 6)
    memory = HierarchicalMemory.empty(2, 3, 8, like=steps).write(steps)
    after = memory.reset(torch.tensor([True, False]))
    read = hcam_attention(x, after, projections, 2)
    assert torch.equal(read.output[0], torch.zeros_like(read.output[0]))
    torch.testing.assert_close(read.output[1], hcam_attention(x, memory, projections, 2).output[1], **EXACT)
    # Rows with clocks of their own go on as if they were alone.
    new = draw(2, 10, 8)
    after = after.write(new)
    for row, past in ((0, new[:1]), (1, torch.cat((steps, new), 1)[1:])):
        alone = hcam_attention(x[row : row + 1], HierarchicalMemory.of(past, 3), projections, 2).output[0]
        torch.testing.assert_close(hcam_attention(x, after, projections, 2).output[row], alone, **EXACT)


@pytest.mark.paper("hcam")
def test_order_of_chunks_does_not_matter() -> None:
    projections, x = maps(), draw(2, 5, 6)
    memory, order = HierarchicalMemory.of(draw(2, 7 * 3, 8), 3), torch.randperm(7)
    moved = replace(memory, keys=memory.keys[:, order], contents=memory.contents[:, order])
    first, second = (hcam_attention(x, m, projections, 3, 2) for m in (memory, moved))
    torch.testing.assert_close(second.output, first.output, **EXACT)
    assert torch.equal(order[second.chosen], first.chosen)


@pytest.mark.paper("hcam")
@pytest.mark.parametrize("slots", [None, 3])
def test_step_by_step(slots: int | None) -> None:
    block, x = HCAMBlock(8, 2, 4, 2, slots=slots).double(), draw(2, 30, 8)
    state, outs = block.memory.init_state(2, like=x), []
    for piece in x.split([1, 6, 3, 20], 1):
        out, state = block.step(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), block(x), **EXACT)
    assert state.keys.shape[1] == (7 if slots is None else slots)


@pytest.mark.paper("hcam")
def test_block_is_the_formula() -> None:
    block, x = HCAMBlock(8, 2, 4, 2).double(), draw(2, 17, 8)
    normed = block.memory_norm(x)
    seen = torch.arange(4) * 4 + 4 <= torch.arange(17)[:, None]
    memory = HierarchicalMemory.of(normed, 4)
    hidden = x + by_hand(normed, memory, block.memory.projections, 2, 2, seen.expand(2, -1, -1)).output
    torch.testing.assert_close(block(x), hidden + block.mlp(block.mlp_norm(hidden)), **EXACT)


@pytest.mark.paper("hcam")
def test_nothing_leaks_across_episodes() -> None:
    layer, x = HCAM(8, 2, 2, 2).double(), draw(1, 16, 8)
    episode = torch.tensor([[0] * 7 + [1] * 9])
    out = layer(x, episode=episode)
    changed = torch.cat((draw(1, 7, 8), x[:, 7:]), 1)
    torch.testing.assert_close(layer(changed, episode=episode)[:, 7:], out[:, 7:], **EXACT)
    # Steps 8 to 15 are four whole chunks of the second episode.
    torch.testing.assert_close(out[:, 8:], layer(x[:, 8:]), **EXACT)
    mask = chunk_mask(16, 2, episode)[0]
    assert not bool(mask[7:, :4].any()) and bool(mask[15, 4:7].all())
    torch.testing.assert_close(layer(x, episode=torch.zeros(1, 16)), layer(x))


@pytest.mark.paper("hcam")
def test_initial_weights() -> None:
    made = HCAMProjections(256, 512, 128)
    assert made.rank_query.bias is None and made.rank_key.bias is None
    for layer in (made.rank_query, made.rank_key, made.query, made.key, made.value, made.out):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / layer.in_features) ** 0.5, rel=0.03)
    assert not any(bool(layer.bias.any()) for layer in (made.query, made.key, made.value, made.out))


def test_codes_count_backwards() -> None:
    short, long = (backward_codes(n, 8, like=draw(1)) for n in (3, 10))
    torch.testing.assert_close(long[-3:], short)
    torch.testing.assert_close(short[-1], torch.tensor([0.0] * 4 + [1.0] * 4).double())
    with pytest.raises(OptionError):
        backward_codes(3, 7, like=draw(1))


def test_mistakes_are_named() -> None:
    memory, projections = HierarchicalMemory.of(draw(2, 12, 8), 3), maps()
    for queries, mask in ((draw(3, 5, 6), None), (draw(2, 5, 6), torch.ones(2, 5, 3, dtype=torch.bool))):
        with pytest.raises(ShapeError):
            hcam_attention(queries, memory, projections, 2, 1, mask)
    for top_k, heads in ((0, 1), (2, 3)):
        with pytest.raises(OptionError):
            hcam_attention(draw(2, 5, 6), memory, projections, top_k, heads)
    for wrong in (lambda: HCAM(7), lambda: HCAM(8, 3), lambda: HCAM(8, slots=0)):
        with pytest.raises(OptionError):
            wrong()
    with pytest.raises(UnsupportedPatternError):
        HCAM(8)(torch.randn(2, 5, 8), causal=False)
    with pytest.raises(ShapeError):
        memory.write(draw(2, 7))
    with pytest.raises(ShapeError):
        memory.reset(torch.zeros(2))
    with pytest.raises(ShapeError):
        replace(memory, keys=draw(2, 3, 8))
    with pytest.raises(OptionError):
        replace(memory, slots=2)
