"""Omega against scores that attention computes, decompositions against sums, and edges that are cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.omega import decompose_score, omega, omega_svd, read_scores, svs_used
from regard.inspect.sparse_attention_decomposition import (
    Edge,
    ablate_edge,
    edge_signal,
    firing_edges,
    score_parts,
    trace,
    upstream_contribution,
)
from regard.models.attention_only import AttentionOnlyModel
from regard.models.sequence import SequenceModel
from tests.retrofit.small_models import bert, gpt2, llama, t5

LENGTH, HEADS = 9, 4
KINDS = ("attention only", "pre-norm", "gpt2")


def model(kind: str, depth: int = 3) -> nn.Module:
    """Random weights large enough that heads fire, biases and gains included."""
    torch.manual_seed(0)
    found: nn.Module
    if kind == "attention only":
        found = AttentionOnlyModel(60, 60, embed_dim=32, depth=depth, num_heads=HEADS, max_length=16)
    elif kind == "pre-norm":
        found = SequenceModel(60, vocab_size=60, embed_dim=32, depth=depth, positions="learned", mlp_ratio=2.0)
    else:
        found = gpt2()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name or "ln" in name) * float("weight" in name), 0.3)
            elif "query" in name or "key" in name:
                parameter.mul_(3)
    return found.double().eval()


def prompt() -> Tensor:
    return torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def some_edge(cache: Any, layer: int = 1, side: str = "s", most: int = 8) -> Edge:
    """An edge into the pair of the largest weight, off the first key, that uses at most ``most`` vectors."""
    best = (-1.0, (0, 0, 0))
    for head in range(HEADS):
        for dst in range(2, LENGTH):
            for src in range(1, dst):
                if cache.scores[layer][head, dst, src] > 0 and len(cache.used(layer, head, dst, src)) <= most:
                    best = max(best, (float(cache.weights[layer][head, dst, src]), (head, dst, src)))
    assert best[0] > 0
    head, dst, src = best[1]
    found = upstream_contribution(cache, layer, head, dst, src)[side == "s"][:layer]
    at = int(found.argmax())
    return Edge((at // HEADS, at % HEADS), (layer, head), dst, src, side, float(found.max()))  # type: ignore[arg-type]


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("kind", KINDS)
def test_terms_sum_to_the_score(kind: str) -> None:
    found = model(kind)
    cache, svd = read_scores(found, prompt()), omega_svd(found)
    with regard.capture(found, "all") as seen:
        found(prompt())
    for layer, at in enumerate(seen):
        assert at.queries is not None and at.keys is not None
        scores = (at.queries @ at.keys.mT)[0]
        for head in range(HEADS):
            x = cache.normed[layer]
            terms = decompose_score(x[:, None], x, *(t[layer, head] for t in svd))
            torch.testing.assert_close(terms.sum(-1), scores[head], atol=1e-9, rtol=1e-9)
            assert scores[head].abs().max() > 0.1
        torch.testing.assert_close(cache.scores[layer], scores)


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("kind", KINDS)
def test_omega_has_the_rank_of_a_head(kind: str) -> None:
    found = model(kind)
    svd = omega_svd(found)
    for layer, head in ((0, 0), (1, 3)):
        whole = omega(found, layer, head)
        assert whole.shape == (33, 33) and int(torch.linalg.matrix_rank(whole, tol=1e-9)) == 8
        values = torch.linalg.svdvals(whole)
        torch.testing.assert_close(svd.values[layer, head], values[:8])
        left, s, right = (t[layer, head] for t in svd)
        torch.testing.assert_close(left @ s.diag() @ right.mT, whole)
        for basis in (left, right):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(8, dtype=basis.dtype))
    with pytest.raises(OptionError, match="no head"):
        omega(found, 0, 4)


@pytest.mark.paper("sparse_attention_decomposition")
def test_omega_is_the_papers_four_blocks() -> None:
    """Of a model without norms nothing is folded or centred."""
    found = model("attention only")
    layer = found.layers[1]  # type: ignore[index]
    rows = slice(16, 24)
    w_q, w_k = layer.query.weight[rows].T, layer.key.weight[rows].T
    b_q, b_k = layer.query.bias[rows], layer.key.bias[rows]
    top = torch.cat((w_q @ w_k.T, (w_q @ b_k)[:, None]), 1)
    bottom = torch.cat((b_q @ w_k.T, (b_q @ b_k)[None]))
    torch.testing.assert_close(omega(found, 1, 2), torch.cat((top, bottom[None])).detach())


@pytest.mark.paper("sparse_attention_decomposition")
def test_a_change_of_basis_inside_heads_changes_nothing() -> None:
    found = model("pre-norm")
    other = copy.deepcopy(found)
    with torch.no_grad():
        for block in other.blocks:  # type: ignore[union-attr]
            for head in range(HEADS):
                change = torch.randn(8, 8).double()
                rows = slice(8 * head, 8 * head + 8)
                for linear, by in (
                    (block.attention.query, change),
                    (block.attention.key, torch.linalg.inv(change).mT),
                ):
                    linear.weight[rows] = by.mT @ linear.weight[rows]
                    linear.bias[rows] = by.mT @ linear.bias[rows]
    assert (other.blocks[1].attention.query.weight - found.blocks[1].attention.query.weight).abs().max() > 0.1  # type: ignore[index, union-attr]
    torch.testing.assert_close(omega(other, 1, 2), omega(found, 1, 2))
    old, new = omega_svd(found), omega_svd(other)
    torch.testing.assert_close(new.values, old.values)
    # Singular vectors are unique up to a sign that both sides share.
    sign = (old.left * new.left).sum(-2).sign()[..., None, :]
    torch.testing.assert_close(new.left * sign, old.left, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(new.right * sign, old.right, atol=1e-7, rtol=1e-7)
    edges = 0
    for at in firing_edges(*(read_scores(found, prompt()).__getattribute__(name)[2] for name in ("weights", "scores"))):
        start = (2, *(int(i) for i in at))
        first, second = trace(found, prompt(), start), trace(other, prompt(), start)
        assert [edge.networkx()[:2] for edge in first] == [edge.networkx()[:2] for edge in second]
        assert [e.weight for e in first] == pytest.approx([e.weight for e in second], abs=1e-7)
        edges += len(first)
    assert edges > 4


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("kind", KINDS)
def test_mode_b_changes_one_head_of_the_layer(kind: str) -> None:
    found = model(kind)
    edge = some_edge(cache := read_scores(found, prompt()))
    head = edge.downstream[1]
    with regard.capture(found) as before:
        found(prompt())
    with ablate_edge(cache, edge, "B"), regard.capture(found) as after:
        found(prompt())
    for name in ("weights", "head_outputs"):
        old, new = getattr(before[1], name), getattr(after[1], name)
        others = [h for h in range(HEADS) if h != head]
        assert not torch.equal(old[:, head], new[:, head])
        if kind == "gpt2" and name == "head_outputs":
            # Its fused attention rounds by how tensors lie in memory, and an edit copies them.
            torch.testing.assert_close(old[:, others], new[:, others], atol=1e-13, rtol=1e-13)
        else:
            assert torch.equal(old[:, others], new[:, others])
    assert torch.equal(before[0].weights, after[0].weights)  # type: ignore[arg-type]
    with regard.capture(found) as again:
        found(prompt())
    assert torch.equal(again[1].weights, before[1].weights)  # type: ignore[arg-type]


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("kind", ["attention only", "pre-norm"])
@pytest.mark.parametrize("side", ["s", "d"])
def test_mode_b_is_a_step_of_one_heads_input(kind: str, side: str) -> None:
    """Queries, keys and values by hand, from the normalised residual less the projected output of the head."""
    found: Any = model(kind)
    cache = read_scores(found, prompt())
    edge = some_edge(cache, side=side)
    used = cache.used(*edge.downstream, edge.dst, edge.src)
    layer, head = edge.downstream
    basis = torch.linalg.svd(omega(found, layer, head))
    vectors = (basis.Vh.mT if side == "s" else basis.U)[:, used]
    if kind == "attention only":
        block, upstream = found.layers[layer], found.layers[edge.upstream[0]]
        norm, before_it = None, None
    else:
        block, upstream = (found.blocks[at].attention for at in (layer, edge.upstream[0]))
        norm, before_it = (found.blocks[at].attention_norm for at in (layer, edge.upstream[0]))
    with regard.capture(found, "all") as before:
        found(prompt())
    columns = slice(8 * edge.upstream[1], 8 * edge.upstream[1] + 8)
    z, offset = before[edge.upstream[0]].head_outputs, upstream.value.bias[columns]
    assert z is not None and before[layer].hidden_states is not None
    if before_it is not None:
        offset = offset + upstream.value.weight[columns] @ before_it.bias
    wrote = upstream.out.weight[:, columns] @ (z[0, edge.upstream[1], edge.token] - offset)
    if norm is not None:
        wrote = wrote - wrote.mean()
    delta = (vectors @ vectors.mT @ torch.cat((wrote, wrote.new_ones(1))))[:-1]
    if norm is not None:
        delta = delta - delta.mean()
    torch.testing.assert_close(edge_signal(cache, edge), delta.detach(), atol=1e-9, rtol=1e-7)
    step = delta
    if norm is not None:
        x = before[layer].hidden_states[0, edge.token]  # type: ignore[index]
        step = norm.weight * delta / (x.var(correction=0) + norm.eps).sqrt()
    with ablate_edge(cache, edge, "B"), regard.capture(found, "all") as after:
        found(prompt())
    rows = slice(8 * head, 8 * head + 8)
    for name, linear in (("queries", block.query), ("keys", block.key), ("values", block.value)):
        old, new = getattr(before[layer], name)[0, head], getattr(after[layer], name)[0, head]
        expected = old.clone()
        expected[edge.token] -= linear.weight[rows] @ step
        torch.testing.assert_close(new, expected.detach())


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("kind", KINDS)
def test_mode_a_changes_the_residual_and_what_follows(kind: str) -> None:
    found = model(kind)
    cache = read_scores(found, prompt())
    edge = some_edge(cache)
    for boost in (False, True):
        with ablate_edge(cache, edge, "A", boost), regard.capture(found, "all") as cut:
            found(prompt())
        after = cut[1]
        assert after.hidden_states is not None and after.queries is not None and after.keys is not None
        moved = after.hidden_states[0] - cache.entered[1]
        signal = edge_signal(cache, edge) * (1 if boost else -1)
        others = [i for i in range(LENGTH) if i != edge.token]
        assert not moved[others].abs().max() > 1e-12 and signal.abs().max() > 1e-3
        if kind == "attention only":
            torch.testing.assert_close(moved[edge.token], signal)
        else:
            # The MLP follows in the same block.
            assert moved[edge.token].abs().max() > 1e-3 and abs(float(signal.mean())) < 1e-12
        for head in range(HEADS):
            change = (after.queries[0, head] @ after.keys[0, head].mT - cache.scores[1][head]).abs()
            assert change[others][:, others].max() < 1e-9 < 1e-4 < change[edge.token].max()


@pytest.mark.paper("sparse_attention_decomposition")
def test_used_directions_matter_more_than_others() -> None:
    """Projected out of the source token's normalised residual: used ones take more of the score than it has, as many
    unused ones less in the median."""
    lost, control = [], []
    generator = torch.Generator().manual_seed(0)
    found = model("pre-norm")
    for seed in range(4):
        tokens = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        cache = read_scores(found, tokens)
        for layer, head, dst, src in (
            (lay, *(int(i) for i in at))
            for lay in (1, 2)
            for at in firing_edges(cache.weights[lay], cache.scores[lay], 0.3)
        ):
            used = cache.used(layer, head, dst, src)
            if len(used) > 4:
                continue
            right, others = cache.svd.right[layer, head], [k for k in range(8) if k not in used.tolist()]
            some = torch.tensor(others)[torch.randperm(len(others), generator=generator)[: len(used)]]
            first, second = (torch.cat((cache.normed[layer][i], torch.ones(1))) for i in (dst, src))
            before = first @ omega(found, layer, head) @ second
            for basis, into in ((right[:, used], lost), (right[:, some], control)):
                left = second - basis @ (basis.mT @ second)
                into.append(float(before - first @ omega(found, layer, head) @ left))
            assert lost[-1] > float(before) - 1e-9
    assert len(lost) >= 10 and min(lost) > 0
    assert float(torch.tensor(lost).median()) > 2 * float(torch.tensor(control).abs().median())


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_score(kind: str) -> None:
    found = model(kind)
    mlps: list[Tensor] = []
    blocks: Any = getattr(found, "blocks", None) or (found.transformer.h if kind == "gpt2" else [])
    hooks = [block.mlp.register_forward_hook(lambda *_: mlps.append(_[2])) for block in blocks]
    cache = read_scores(found, prompt())
    for hook in hooks:
        hook.remove()
    last = len(cache.scores) - 1
    for head, dst, src in ((0, 8, 3), (2, 5, 5), (3, 7, 1)):
        parts = score_parts(cache, last, head, dst, src)
        torch.testing.assert_close(parts.total(), cache.scores[last][head, dst, src])
        assert parts.heads[:last].abs().min() > 1e-4 and not parts.heads[last:].any()
        # A part is the score's own linear answer to what the part wrote.
        query = torch.cat((cache.normed[last][dst], torch.ones(1))) @ omega(found, last, head)
        for layer in range(last):
            wrote = mlps[layer][0, src] if mlps else torch.zeros(32)
            if cache.centred[last]:
                wrote = wrote - wrote.mean()
            expected = query[:-1] @ wrote.to(query) / cache.scale[last][src]
            torch.testing.assert_close(parts.mlps[layer], expected.detach(), atol=1e-10, rtol=1e-7)


@pytest.mark.paper("sparse_attention_decomposition")
def test_contributions_by_a_loop() -> None:
    found = model("pre-norm")
    cache = read_scores(found, prompt())
    layer, head, dst, src = 2, 1, 6, 4
    for constant in (True, False):
        to_dst, to_src = upstream_contribution(cache, layer, head, dst, src, constant)
        whole = torch.linalg.svd(omega(found, layer, head))
        used = cache.used(layer, head, dst, src).tolist()
        with regard.capture(found) as seen:
            found(prompt())
        for before in range(layer):
            block = found.blocks[before]  # type: ignore[index]
            out = block.attention.out.weight.unflatten(1, (HEADS, -1))
            attention, norm = block.attention, block.attention_norm
            offset = (attention.value.weight @ norm.bias + attention.value.bias).unflatten(0, (HEADS, -1))
            z = seen[before].head_outputs
            assert z is not None
            for own in range(HEADS):
                for token, vectors, got in ((dst, whole.U, to_dst), (src, whole.Vh.mT, to_src)):
                    o = out[:, own] @ (z[0, own, token] - offset[own])
                    o = torch.cat((o - o.mean(), torch.ones(1) * constant))
                    x = torch.cat((cache.normed[layer][dst], torch.ones(1)))
                    expected = sum(
                        float(((x @ whole.U[:, k]).sign() * whole.S[k].sqrt() * (o @ vectors[:, k])).detach())
                        for k in used
                    ) / float(cache.scale[layer][token])
                    assert float(got[before, own]) == pytest.approx(expected, abs=1e-8)
        assert not to_dst[layer:].any() and not to_src[layer:].any()


@pytest.mark.paper("sparse_attention_decomposition")
def test_which_vectors_are_used() -> None:
    terms = torch.tensor([-3.0, 5.0, 1.0, 2.0])
    # 5 alone is not more than the total 5; 5 + 2 is.
    assert svs_used(terms).tolist() == [1, 3] and svs_used(terms, 0.9).tolist() == [1]
    assert svs_used(-terms).tolist() == [1, 3]
    assert sorted(svs_used(torch.tensor([1.0, 2.0, 4.0])).tolist()) == [0, 1, 2]
    assert svs_used(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [2]
    for wrong in (terms[None], terms.new_zeros(2, 2)):
        with pytest.raises(OptionError):
            svs_used(wrong)


@pytest.mark.paper("sparse_attention_decomposition")
def test_which_pairs_fire() -> None:
    weights = torch.tensor([[1.0, 0, 0], [0.4, 0.6, 0], [0.1, 0.2, 0.7]])
    scores = torch.tensor([[1.0, 1, 1], [1, 2, 1], [1, 1, -0.5]])
    assert firing_edges(weights, scores).tolist() == [[1, 1]]
    assert firing_edges(weights, scores, skip_first=False).tolist() == [[0, 0], [1, 1]]
    assert firing_edges(weights, scores.abs(), 0.65).tolist() == [[2, 2]]
    assert firing_edges(torch.tensor([[0.0, 0.5]]), torch.ones(1, 2)).tolist() == []
    with pytest.raises(ShapeError):
        firing_edges(weights, scores[:2])


@pytest.mark.paper("sparse_attention_decomposition")
def test_a_trace_ends_where_the_sum_is_covered_and_goes_on_where_heads_fire() -> None:
    found = model("attention only")
    cache = read_scores(found, prompt())
    start = next(
        (2, *(int(i) for i in at)) for at in firing_edges(cache.weights[2], cache.scores[2], 0.5) if int(at[2]) > 0
    )
    edges = trace(cache, None, start)
    both = upstream_contribution(cache, *start)
    for side, found_here in zip("ds", both, strict=True):
        kept = {e.upstream: e.weight for e in edges if e.downstream == start[:2] and (e.dst, e.src) == start[2:]
                and e.side == side}  # fmt: skip
        for (layer, head), weight in kept.items():
            assert weight == pytest.approx(float(found_here[layer, head]))
        total = float(found_here.sum())
        assert sum(kept.values()) > 0.7 * total
        assert len(kept) == 1 or sum(kept.values()) - min(kept.values()) <= 0.7 * total
        rest = [float(found_here[a, b]) for a in range(2) for b in range(HEADS) if (a, b) not in kept]
        assert max(rest, default=-1e9) <= min(kept.values())
    places = {(*e.downstream, e.dst, e.src) for e in edges}
    for layer, head, dst, src in places - {start}:
        assert cache.weights[layer][head, dst, src] > 0.5 and src > 0
        assert any(e.upstream == (layer, head) and e.token == dst for e in edges)
    assert trace(found, prompt(), start) == edges
    assert edges[0].networkx()[1] == (*start[:2], edges[0].token)


@pytest.mark.paper("sparse_attention_decomposition")
def test_omega_behind_a_layer_norm_reads_no_mean() -> None:
    """Its weights are centred as its states are, on which the singular vectors depend."""
    for kind in ("pre-norm", "gpt2"):
        mean = torch.cat((torch.ones(32), torch.zeros(1))).double()
        for head in range(HEADS):
            whole = omega(model(kind), 1, head)
            assert max(float((whole @ mean).abs().max()), float((mean @ whole).abs().max())) < 1e-10


@pytest.mark.paper("sparse_attention_decomposition")
def test_a_trace_goes_on_from_the_token_that_was_written_to() -> None:
    """With every head of layer 1 firing on its best earlier token, against a recursion."""
    cache = read_scores(model("attention only"), prompt())
    weights = [torch.zeros_like(maps) for maps in cache.weights]
    for head in range(HEADS):
        for dst in range(1, LENGTH):
            weights[1][head, dst, 1 + int(cache.scores[1][head, dst, 1 : dst + 1].argmax())] = 1
    start = (2, 0, *(int(i) for i in (cache.scores[2][0].tril()[:, 1:] > 0).nonzero()[-1] + torch.tensor([0, 1])))
    weights[2][0, start[2], start[3]] = 1
    cache = replace(cache, weights=weights)

    def follow(place: tuple[int, ...]) -> set[tuple[Any, ...]]:
        layer, head, dst, src = place
        found: set[tuple[Any, ...]] = set()
        if layer == 0:
            return found
        for side, token, given in zip("ds", (dst, src), upstream_contribution(cache, *place), strict=True):
            ranked = sorted(((float(given[a, b]), a, b) for a in range(layer) for b in range(HEADS)), reverse=True)
            total, so_far = sum(weight for weight, _, _ in ranked), 0.0
            for weight, a, b in ranked:
                found.add(((a, b), (layer, head), dst, src, side))
                for key in range(1, token + 1):
                    if cache.weights[a][b, token, key] > 0.5 and cache.scores[a][b, token, key] > 0:
                        found |= follow((a, b, token, key))
                so_far += weight
                if so_far > 0.7 * total:
                    break
        return found

    edges = trace(cache, None, start)
    assert {(e.upstream, e.downstream, e.dst, e.src, e.side) for e in edges} == follow(start)
    assert len(edges) == len(set(edges)) and {edge.downstream[0] for edge in edges} == {1, 2}


@pytest.mark.paper("sparse_attention_decomposition")
def test_edges_make_a_graph() -> None:
    networkx = pytest.importorskip("networkx")
    found = model("attention only")
    cache = read_scores(found, prompt())
    fires = firing_edges(cache.weights[2], cache.scores[2])
    edges = max((trace(cache, None, (2, *(int(i) for i in at))) for at in fires), key=len)
    graph = networkx.MultiDiGraph()
    graph.add_edges_from(edge.networkx() for edge in edges)
    assert graph.number_of_edges() == len(edges) > 2
    for upstream, downstream, facts in graph.edges(data=True):
        assert upstream[0] < downstream[0] and downstream[2] == facts["dst" if facts["type"] == "d" else "src"]


@pytest.mark.paper("sparse_attention_decomposition")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float32(dtype: torch.dtype) -> None:
    found = model("gpt2").to(dtype)
    cache, exact = read_scores(found, prompt()), read_scores(found.double(), prompt())
    for layer in range(2):
        assert cache.scores[layer].dtype == cache.svd.left.dtype == torch.float32
        size = float(exact.scores[layer].abs().max())
        torch.testing.assert_close(cache.scores[layer].double(), exact.scores[layer], rtol=0.0, atol=0.05 * size)
    edge = some_edge(cache)
    for mode in ("A", "B"):
        with ablate_edge(cache, edge, mode), regard.capture(found.to(dtype)) as after:  # type: ignore[arg-type]
            found(prompt())
        assert after[1].weights is not None and after[1].weights.dtype == dtype


@pytest.mark.paper("sparse_attention_decomposition")
def test_models_whose_scores_omega_does_not_give_are_refused() -> None:
    def encoder(norm_first: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    rotary = SequenceModel(9, vocab_size=9, embed_dim=8, num_heads=2, depth=1).eval()
    for found, told in (
        (llama(), "rotary"),
        (rotary, "rotary"),
        (bert(), "norm before attention"),
        (encoder(False), "norm before attention"),
    ):
        for asking in (lambda m=found: omega(m, 0, 0), lambda m=found: omega_svd(m)):
            with pytest.raises(RetrofitError, match=told):
                asking()
    assert omega(encoder(True), 0, 1).shape == (9, 9)
    # T5 is pre-norm, its bias by distance comes after the score.
    cache = read_scores(t5().encoder, prompt())
    with regard.capture(encoder_of := cache.model, "all") as seen:
        encoder_of(prompt())
    assert seen[1].queries is not None and seen[1].keys is not None
    torch.testing.assert_close(cache.scores[1], (seen[1].queries @ seen[1].keys.mT)[0], rtol=1e-4, atol=1e-4)
    scaled = SequenceModel(9, vocab_size=9, embed_dim=8, num_heads=2, depth=1, positions="none").eval()
    scaled.blocks[0].attention_scale = nn.Parameter(torch.ones(8))
    with pytest.raises(RetrofitError, match="scales what attention writes"):
        omega(scaled, 0, 0)
    # Norms behind attention under the names of one before it: the run tells.
    from transformers import BartConfig, BartModel

    size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartModel(BartConfig(vocab_size=60, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, **size)).eval()
    with pytest.raises(RetrofitError, match="plain projection"):
        read_scores(bart.encoder, prompt())
    assert not any(module._forward_hooks for module in bart.modules())


@pytest.mark.paper("sparse_attention_decomposition")
def test_heads_and_tokens_that_there_are_not() -> None:
    cache = read_scores(found := model("attention only"), prompt())
    edge = some_edge(cache)
    for at in ((3, 0, 4, 2), (1, 4, 4, 2), (-1, 0, 4, 2), (1, 0, LENGTH, 2), (1, 0, 4, -1)):
        for asking in (
            lambda a=at: cache.used(*a),
            lambda a=at: upstream_contribution(cache, *a),
            lambda a=at: score_parts(cache, *a),
            lambda a=at: trace(cache, None, a),
            lambda a=at: edge_signal(cache, Edge((0, 0), a[:2], a[2], a[3], "s", 0.0)),
        ):
            with pytest.raises(OptionError, match="There is no head"):
                asking()
    with pytest.raises(OptionError, match="There is no head"):
        edge_signal(cache, Edge((0, 9), (1, 0), 4, 2, "s", 0.0))
    for mode in ("A", "B"):
        with pytest.raises(ShapeError, match="9 tokens"), ablate_edge(cache, edge, mode):  # type: ignore[arg-type]
            found(prompt()[:, :-1])
        with pytest.raises(ShapeError, match="9 tokens"), ablate_edge(cache, edge, mode):  # type: ignore[arg-type]
            found(prompt().expand(2, -1))
    with regard.capture(found) as after:
        found(prompt())
    assert after[2].weights is not None and torch.equal(after[2].weights[0], cache.weights[2])
    # Nothing fires into the first key, so nothing leads there.
    assert trace(cache, None, (2, 0, 5, 0)) == []
    with pytest.raises(OptionError, match="cover"):
        trace(cache, None, (2, 0, 5, 2), cover=0.0)
    with pytest.raises(ShapeError):
        read_scores(found, prompt()[:, :0])
    with pytest.raises(OptionError, match="frac"):
        read_scores(found, prompt(), frac=1.5)


@pytest.mark.paper("sparse_attention_decomposition")
def test_a_control_is_as_many_unused_vectors() -> None:
    found = model("attention only")
    cache = read_scores(found, prompt())
    edge = some_edge(cache, most=4)
    layer, head = edge.downstream
    used = cache.used(layer, head, edge.dst, edge.src).tolist()
    one, two, again = (edge_signal(cache, edge, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, two)
    # What it is made of: the projections on that many others, and on none of those used.
    right = cache.svd.right[layer, head]
    wrote = torch.cat((cache.written[0][edge.upstream[1], edge.token], torch.ones(1))).double()
    parts = (right.mT @ wrote)[:, None] * right.mT[:, :-1]
    taken = torch.linalg.lstsq(parts.mT, one[:, None]).solution[:, 0].round(decimals=6).tolist()
    assert [k for k in range(8) if taken[k] == 1] == [k for k in range(8) if taken[k] != 0]
    assert taken.count(1.0) == len(used) and not any(taken[k] for k in used)
    many = next(
        (h, i, j)
        for h in range(HEADS)
        for i in range(2, LENGTH)
        for j in range(1, i)
        if len(cache.used(1, h, i, j)) > 4
    )
    with pytest.raises(OptionError, match="too few for a control"):
        edge_signal(cache, Edge((0, 0), (1, many[0]), many[1], many[2], "s", 0.0), torch.Generator())


@pytest.mark.paper("sparse_attention_decomposition")
def test_mode_b_needs_heads_with_keys_of_their_own() -> None:
    torch.manual_seed(0)
    found = SequenceModel(60, vocab_size=60, embed_dim=32, num_heads=4, num_kv_heads=2, positions="learned").eval()
    cache = read_scores(found, prompt())
    edge = Edge((0, 1), (1, 2), 5, 3, "s", 0.0)
    with pytest.raises(OptionError, match="share keys"), ablate_edge(cache, edge, "B"):
        found(prompt())
    with ablate_edge(cache, edge, "A"), torch.no_grad():
        assert not torch.equal(found(prompt())[0, 3], cache.model(prompt())[0, 2])


def test_what_is_wrong_is_told() -> None:
    found = model("attention only")
    cache = read_scores(found, prompt())
    edge = some_edge(cache)
    with pytest.raises(RetrofitError, match="rotary"):
        read_scores(llama().eval(), prompt())
    with pytest.raises(ShapeError, match="One prompt"):
        read_scores(found, prompt().expand(2, -1))
    with pytest.raises(OptionError, match="eval"):
        read_scores(copy.deepcopy(found).train(), prompt())
    with pytest.raises(OptionError, match="start"):
        trace(cache, None, (1, 0))
    with pytest.raises(OptionError, match="tokens"):
        trace(found, None, (1, 0, 3))
    with pytest.raises(OptionError, match="mode"), ablate_edge(cache, edge, "C"):  # type: ignore[arg-type]
        pass
    with pytest.raises(OptionError, match="before"):
        edge_signal(cache, Edge((1, 0), (1, 1), 3, 2, "s", 0.0))
    with pytest.raises(ShapeError, match="channels"):
        decompose_score(torch.zeros(5), torch.zeros(5), *(t[0, 0] for t in cache.svd))
