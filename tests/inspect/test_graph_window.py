"""Graph windows against powers of the tree's matrix and loops; statistics against scipy; metrics on planted maps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, RetrofitError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.inspect.capture import capture
from regard.inspect.ego_tree import EgoTree, Perturbation, PromptTemplate, linearise_ego_tree, perturb_tree
from regard.inspect.graph_window import (
    graph_window_mask,
    hop_profile,
    node_text_shift,
    received_attention,
    skewed_line_sink,
    structure_alignment,
    window_schedule,
)
from regard.inspect.two_samples import compare_samples
from regard.masks import Boolean
from regard.models.sequence import SequenceModel
from regard.retrofit import retrofit

EXACT = {"atol": 1e-12, "rtol": 1e-12}
# Two neighbours with children, one without; node 5 hangs on two of them.
TREE = EgoTree(0, ((3, (5, 6)), (4, ()), (7, (8, 5, 9))))


def small_model(seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(5, vocab_size=20, embed_dim=16, depth=2, num_heads=2).double()


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def uniform_causal(length: int) -> Tensor:
    lower = causal(length).double()
    return lower / lower.sum(-1, keepdim=True)


def visible(hops: int, bidirectional: bool = True, tree: EgoTree = TREE) -> Tensor:
    return graph_window_mask(tree.positions, tree.edges, len(tree.tokens), hops, bidirectional) == 0


@pytest.mark.paper("graph_window")
def test_prompt_is_written_in_the_papers_order() -> None:
    text, node = PromptTemplate(), 8
    said = [1, node + 0, 2]
    said += [node + 3, 3, node + 5, 4, node + 6, 5]
    said += [node + 4, 3, 5]
    said += [node + 7, 3, node + 8, 4, node + 5, 4, node + 9, 5]
    said += [6, node + 0, 7]
    assert TREE.tokens.tolist() == said
    assert TREE.nodes.tolist() == [0, 3, 5, 6, 4, 7, 8, 5, 9]
    assert TREE.hop.tolist() == [0, 1, 2, 2, 1, 1, 2, 2, 2]
    assert TREE.edges.tolist() == [[0, 1], [1, 2], [1, 3], [0, 4], [0, 5], [5, 6], [5, 7], [5, 8]]
    index = TREE.node_index
    at_nodes = TREE.tokens[index >= 0] - text.first_node
    assert torch.equal(at_nodes, TREE.nodes[index[index >= 0]])
    assert index[-2] == 0 and TREE.positions[0] == 1


@pytest.mark.paper("graph_window")
def test_drawn_tree_keeps_to_the_graph_and_the_fanout() -> None:
    graph = {node: [(node + step) % 30 for step in (1, 2, 3, 5, 29, 28, 27, 25)] for node in range(30)}
    tree = linearise_ego_tree(graph, 4, (3, 4), generator=torch.Generator().manual_seed(0))
    assert len(tree.branches) == 3
    assert len({head for head, _ in tree.branches}) == 3
    for head, tail in tree.branches:
        assert head in graph[4]
        assert len(tail) == len(set(tail)) == 4
        assert set(tail) <= set(graph[head]) - {4}
    with pytest.raises(OptionError, match="neighbours of node 40"):
        linearise_ego_tree(graph, 40)
    with pytest.raises(OptionError, match="fanout"):
        linearise_ego_tree(graph, 4, (0, 2))
    # Links to oneself, and repeated ones, count for nothing.
    tree = linearise_ego_tree({0: [0, 1, 1], 1: [1, 0, 2, 2]}, 0)
    assert tree.branches == ((1, (2,)),)


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_window_is_the_power_of_links_and_self_loops(bidirectional: bool) -> None:
    count = len(TREE.nodes)
    links = torch.eye(count)
    for parent, child in TREE.edges.tolist():
        links[child, parent] = 1
    both, places = links + links.T, TREE.positions
    for hops in range(1, 6):
        reach = torch.linalg.matrix_power(both, hops) > 0
        if not bidirectional:
            reach = reach.tril()
        seen = visible(hops, bidirectional)
        assert torch.equal(seen[places[:, None], places[None]], reach)


@pytest.mark.paper("graph_window")
def test_one_hop_is_the_adjacency_with_self_loops() -> None:
    star = EgoTree(0, ((1, (4,)), (2, (5,)), (3, ())))
    seen = visible(1, tree=star)[star.positions[:, None], star.positions[None]]
    expected = torch.eye(6, dtype=torch.bool)
    for a, b in [(0, 1), (1, 2), (0, 3), (3, 4), (0, 5)]:
        expected[a, b] = expected[b, a] = True
    assert torch.equal(seen, expected)


@pytest.mark.paper("graph_window")
def test_windows_are_nested_and_end_in_everything() -> None:
    places, whole = TREE.positions, causal(len(TREE.tokens))
    for bidirectional in (True, False):
        windows = [visible(hops, bidirectional) for hops in range(6)]
        assert all(bool((~small | large).all()) for small, large in pairwise(windows))
        assert not torch.equal(windows[1], windows[2]) and not torch.equal(windows[2], windows[3])
        assert torch.equal(windows[4], windows[5])
    assert bool(visible(4)[places[:, None], places[None]].all())
    assert torch.equal(visible(4, bidirectional=False), whole)
    assert not torch.equal(visible(3, bidirectional=False), whole)


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("hops", [0, 1, 2, 9])
def test_pairs_with_text_stay_causal(hops: int) -> None:
    length = len(TREE.tokens)
    text = torch.ones(length, dtype=torch.bool)
    text[TREE.positions] = False  # the question's centre is text here: it sees all before it
    pairs = text[:, None] | text[None]
    for bidirectional in (True, False):
        assert torch.equal(visible(hops, bidirectional)[pairs], causal(length)[pairs])
    additive = graph_window_mask(TREE.positions, TREE.edges, length, hops, blocked=-123.0)
    assert set(additive[pairs].unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    assert set(additive[~pairs].unique().tolist()) <= {0.0, -123.0}


@pytest.mark.paper("graph_window")
def test_relabelled_entries_give_the_same_window() -> None:
    count, length = len(TREE.nodes), len(TREE.tokens)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    # Entry i is now called order[i], and stands where it stood: the mask is the same.
    positions = torch.empty_like(TREE.positions)
    positions[order] = TREE.positions
    same = graph_window_mask(positions, order[TREE.edges], length, 2)
    assert torch.equal(same, graph_window_mask(TREE.positions, TREE.edges, length, 2))
    # It keeps its name and stands where another stood: rows and columns are permuted.
    moved = graph_window_mask(TREE.positions[order], TREE.edges, length, 2)
    places = TREE.positions
    original = same[places[:, None], places[None]]
    assert torch.equal(moved[places[order][:, None], places[order][None]], original)


@pytest.mark.paper("graph_window")
def test_entries_without_a_way_between_them_never_see_each_other() -> None:
    places = torch.arange(4)
    seen = graph_window_mask(places, torch.tensor([[0, 1], [2, 3]]), 4, 9) == 0
    assert torch.equal(seen, torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool())
    assert float(graph_window_mask(places, torch.tensor([[0, 1], [2, 3]]), 4).min()) == -6000


def test_mask_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(OptionError, match="hops"):
        graph_window_mask(TREE.positions, TREE.edges, 40, -1)
    with pytest.raises(ShapeError, match="there are 10 tokens"):
        graph_window_mask(TREE.positions, TREE.edges, 10)
    with pytest.raises(ShapeError, match="all different"):
        graph_window_mask(torch.tensor([1, 1]), torch.tensor([[0, 1]]), 4)
    with pytest.raises(ShapeError, match="an integer each"):
        graph_window_mask(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1]]), 4)
    with pytest.raises(ShapeError, match="pairs of entries"):
        graph_window_mask(torch.tensor([1, 2]), torch.tensor([0, 1]), 4)
    with pytest.raises(OptionError, match="entries 0 to 1"):
        graph_window_mask(torch.tensor([1, 2]), torch.tensor([[0, 2]]), 4)
    with pytest.raises(OptionError, match="infer"):
        window_schedule(2, infer=-1)


@pytest.mark.paper("graph_window")
def test_schedule_narrows_training_and_leaves_inference_alone() -> None:
    model, tokens = small_model(), TREE.tokens[None]
    schedule = window_schedule(train_hops=1)
    plain = model.eval()(tokens)
    with schedule.on(model):
        schedule.look_at([TREE])
        assert torch.equal(model.eval()(tokens), plain)
        with capture(model.train(), "weights") as trace:
            trained = model(tokens)
    weights = trace.stack("weights")
    seen = visible(1)
    assert bool((weights.masked_select(~seen) == 0).all()) and bool((weights.masked_select(seen) > 0).all())
    assert not torch.allclose(trained, plain)
    assert torch.equal(model.eval()(tokens), plain)


@pytest.mark.paper("graph_window")
def test_schedule_with_trees_of_several_sizes_filled_up_on_the_left() -> None:
    other = EgoTree(2, ((1, (5,)), (6, (7,))))
    model, length = small_model(), len(TREE.tokens)
    gap = length - len(other.tokens)
    tokens = torch.stack((TREE.tokens, torch.cat((torch.zeros(gap, dtype=torch.int64), other.tokens))))
    schedule = window_schedule(2, bidirectional=False)
    schedule.look_at([TREE, other], length)
    with schedule.on(model.train()), capture(model) as trace:
        model(tokens)
    weights = trace.stack("weights")[0]
    assert torch.equal(weights[0, 0] > 0, visible(2, bidirectional=False))
    inner = visible(2, bidirectional=False, tree=other)
    assert torch.equal(weights[1, 0, gap:, gap:] > 0, inner)
    # The next batch, in another order, and one tree for all.
    schedule.look_at([other, TREE], length)
    with schedule.on(model), capture(model, "weights") as trace:
        model(tokens.flip(0))
    assert torch.allclose(trace.stack("weights")[0].flip(0), weights, **EXACT)
    schedule.look_at([TREE])
    with schedule.on(model), capture(model, "weights") as trace:
        model(tokens)
    assert torch.equal(trace.stack("weights")[0, :, 0] > 0, visible(2, bidirectional=False).expand(2, -1, -1))
    schedule.look_at([TREE, other, other], length)
    with schedule.on(model), pytest.raises(ShapeError, match="2 prompts"):
        model(tokens)
    with pytest.raises(ShapeError, match="does not fit"):
        schedule.look_at([TREE], 5)
    with window_schedule(1).on(model), pytest.raises(OptionError, match="look_at"):
        model(tokens)


@pytest.mark.paper("graph_window")
def test_schedule_on_a_hugging_face_model_and_while_it_generates() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import llama

    model, tokens = llama().double().eval(), TREE.tokens[None]
    schedule = window_schedule("full", infer=1)
    schedule.look_at([TREE])
    bias = graph_window_mask(TREE.positions, TREE.edges, tokens.shape[1], 1, blocked=-20000.0).double()
    asked = model(input_ids=tokens, attention_mask=bias[None, None]).logits
    with schedule.on(model):
        assert torch.allclose(model(input_ids=tokens).logits, asked, **EXACT)
        cached = model.generate(tokens, max_new_tokens=3, do_sample=False)
        whole = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False)
        schedule.look_at([TREE, TREE])
        with pytest.raises(ShapeError, match="name each tree once a beam"):
            model.generate(tokens, max_new_tokens=3, do_sample=False, num_beams=3)
    assert torch.equal(cached, whole)
    plain = model(input_ids=tokens).logits
    with window_schedule(1).on(model):
        assert torch.equal(model(input_ids=tokens).logits, plain)


def windowed(model: SequenceModel, **options: bool) -> tuple[Tensor, Tensor]:
    """Logits and weights of the first layer under a window of one hop."""
    schedule = window_schedule(1, infer=1, **options)
    schedule.look_at([TREE])
    with schedule.on(model), capture(model, "weights") as trace:
        logits = model(TREE.tokens[None])
    return logits, trace.stack("weights")[0]


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_mechanism_in_the_layers_keeps_its_own_rule(bidirectional: bool) -> None:
    """Built in or put in by retrofit: the window narrows what the mechanism sees, and softmax does not take over."""
    near = (torch.arange(len(TREE.tokens))[:, None] - torch.arange(len(TREE.tokens))[None]).abs() < 3
    model = small_model().eval()
    built = SequenceModel(
        5,
        vocab_size=20,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mechanism="sliding_window",
        options={"window": 3, "sinks": 0},
    ).double()
    built.load_state_dict(model.state_dict())
    alone = built.eval()(TREE.tokens[None])
    logits, weights = windowed(built, bidirectional=bidirectional)
    assert torch.equal(weights[0, 0] > 0, visible(1, bidirectional) & near)
    with retrofit(model, "sliding_window", window=3, sinks=0):
        other, same = windowed(model, bidirectional=bidirectional)
    assert torch.allclose(logits, other, **EXACT) and torch.allclose(weights, same, **EXACT)
    assert not torch.allclose(logits, alone) and torch.equal(built(TREE.tokens[None]), alone)


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_masks_given_to_a_model_hold_beside_the_window(bidirectional: bool) -> None:
    """Boolean, float and padding masks: between nodes the window, elsewhere what the model was given."""
    model, length = small_model(), len(TREE.tokens)
    own = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) > 0.3
    own |= torch.eye(length, dtype=torch.bool)
    nodes = torch.zeros(length, dtype=torch.bool)
    nodes[TREE.positions] = True
    expected = torch.where(nodes[:, None] & nodes[None], visible(1, bidirectional), own & causal(length))
    schedule = window_schedule(1, infer=1, bidirectional=bidirectional)
    schedule.look_at([TREE])
    mechanism = model.blocks[0].attention.mechanism
    tensors = [torch.randn(3, 2, length, 8, dtype=torch.float64) for _ in range(3)]
    bias = torch.randn(length, length, dtype=torch.float64)
    with schedule.on(model.eval()), capture(model, "weights") as trace:
        for mask in (own, Boolean(own), bias):
            mechanism(*tensors, causal=True, mask=mask)
            weights = trace[0].weights
            assert weights is not None
            if mask is bias:
                seen = torch.where(nodes[:, None] & nodes[None], visible(1, bidirectional), causal(length))
                scores = tensors[0] @ tensors[1].mT / math.sqrt(8) + bias
                torch.testing.assert_close(weights, scores.masked_fill(~seen, -math.inf).softmax(-1), **EXACT)
            else:
                assert torch.equal(weights > 0, expected.expand_as(weights))


def test_what_cannot_hold_a_window_refuses_it() -> None:
    linear = SequenceModel(5, vocab_size=20, embed_dim=16, depth=2, num_heads=2, mechanism="linear_attention").eval()
    plain = linear(TREE.tokens[None])
    with pytest.raises(UnsupportedMaskError, match="linear_attention"):
        windowed(linear)
    assert torch.equal(linear(TREE.tokens[None]), plain)
    # What is causal alone can hold a window within the triangle.
    options = {"block_size": 32, "top_k": 1}
    moba = SequenceModel(5, vocab_size=20, embed_dim=16, depth=2, num_heads=2, mechanism="moba", options=options)
    _, weights = windowed(moba, bidirectional=False)
    assert torch.equal(weights[0, 0] > 0, visible(1, bidirectional=False))
    with pytest.raises(UnsupportedPatternError, match="moba"):
        windowed(moba)


def test_schedule_refuses_models_whose_attention_it_would_change() -> None:
    """Caps and sinks would be lost; and of several stacks only one reads the prompt."""
    transformers = pytest.importorskip("transformers")
    from tests.retrofit.small_models import t5

    size = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**size, **heads)).eval()
    schedule, tokens = window_schedule("full", infer=1), TREE.tokens[None]
    schedule.look_at([TREE])
    plain = capped(tokens).logits
    with schedule.on(capped), pytest.raises(RetrofitError, match="caps its logits"):
        capped(tokens)
    with window_schedule(1).on(capped):
        assert torch.equal(capped(tokens).logits, plain), "full leaves it alone"
    assert torch.equal(capped(tokens).logits, plain)
    model = t5()
    with pytest.raises(OptionError, match="several stacks"), schedule.on(model):
        pass
    with schedule.on(model.encoder), capture(model.encoder, "weights") as trace:
        model.encoder(tokens)
    nodes = torch.zeros(tokens.shape[1], dtype=torch.bool)
    nodes[TREE.positions] = True
    seen = visible(1) | ~(nodes[:, None] & nodes[None])
    assert torch.equal(trace.stack("weights")[0, 0, 0] > 0, seen)


@pytest.mark.paper("graph_window")
def test_received_attention_of_uniform_causal_weights() -> None:
    length = 12
    got = received_attention(uniform_causal(length).expand(2, 3, length, length))
    expected = [sum(1 / (i + 1) for i in range(j, length)) / (length - j) for j in range(length)]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64).expand(2, -1), **EXACT)


@pytest.mark.paper("graph_window")
def test_received_attention_against_a_loop() -> None:
    torch.manual_seed(0)
    attn = torch.randn(2, 3, 7, 7, dtype=torch.float64).softmax(-1)
    attn[:, :, 4, 2] = 0
    for triangle in (True, False):
        got = received_attention(attn, causal=triangle)
        for b in range(2):
            for j in range(7):
                rows = [float(attn[b, :, i, j].mean()) for i in range(j if triangle else 0, 7)]
                kept = [value for value in rows if value != 0]
                assert math.isclose(float(got[b, j]), sum(kept) / len(kept), rel_tol=1e-12)
    with pytest.raises(ShapeError, match="heads"):
        received_attention(attn[0, 0])


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("equal_variance", [True, False])
def test_two_samples_as_scipy_says(equal_variance: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    entropy = stats.entropy
    torch.manual_seed(0)
    for n, m, shift in ((5, 9, 0.1), (40, 25, 0.5), (300, 500, 0.02), (60, 60, 3.0)):
        a, b = torch.randn(n, dtype=torch.float64), 1.3 * torch.randn(m, dtype=torch.float64) + shift
        got = compare_samples(a, b, equal_variance=equal_variance, bins=20, limits=(-3, 3))
        t = stats.ttest_ind(b.numpy(), a.numpy(), equal_var=equal_variance)
        assert math.isclose(got.t, t.statistic, rel_tol=1e-9)
        assert math.isclose(got.t_p, t.pvalue, rel_tol=1e-8, abs_tol=1e-300)
        ks = stats.ks_2samp(a.numpy(), b.numpy())
        assert math.isclose(got.ks, ks.statistic, rel_tol=1e-12)
        limit = stats.kstwobign.sf(math.sqrt(n * m / (n + m)) * got.ks)
        assert math.isclose(got.ks_p, limit, rel_tol=1e-6, abs_tol=1e-12)
        p, q = (torch.histc(x, 20, -3, 3).numpy() for x in (a, b))
        p, q = p / p.sum(), q / q.sum()
        assert math.isclose(got.js, (entropy(p, (p + q) / 2) + entropy(q, (p + q) / 2)) / 2, rel_tol=1e-9)


@pytest.mark.paper("graph_window")
def test_shift_is_found_where_it_was_planted() -> None:
    torch.manual_seed(0)
    is_node = torch.arange(400) % 2 == 0
    before = 10 ** (-2 + 0.2 * torch.randn(400, dtype=torch.float64))
    before[5] = 0  # gets nothing: left out
    after = torch.where(is_node, before * 2, before)
    shift = node_text_shift(before, after, is_node)
    assert shift.text.t == 0 and shift.text.ks == 0 and shift.text.js == 0 and shift.text.t_p == 1
    assert math.isclose(shift.node.means[1] - shift.node.means[0], math.log10(2), rel_tol=1e-9)
    assert shift.node.t > 5 and shift.node.t_p < 1e-6 and shift.node.ks_p < 1e-6 and shift.node.js > 0.1
    assert shift.text_to_node_after.t > shift.text_to_node_before.t + 5
    assert shift.text_to_node_before.means == (shift.text.means[0], shift.node.means[0])
    assert shift.text_to_node_after.means == (shift.text.means[1], shift.node.means[1])
    with pytest.raises(ShapeError, match="boolean"):
        node_text_shift(before, after, is_node.float())
    with pytest.raises(ShapeError, match="does not go with"):
        node_text_shift(before, after, is_node[:7])
    before[7] = math.nan
    with pytest.raises(OptionError, match="NaN"):
        node_text_shift(before, after, is_node)


@pytest.mark.paper("graph_window")
def test_hop_profile_of_weights_that_depend_on_hops() -> None:
    hop = torch.tensor([0, -1, 1, 2, 2, -1, 1, 2])
    level = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    attn = torch.where(hop >= 0, level[hop.clamp_min(0)], 7.0).expand(2, 8, 8)
    assert torch.allclose(hop_profile(attn, hop), level.expand(2, 3), **EXACT)
    between = TREE.distance
    assert int(between.max()) == 4
    assert torch.allclose(
        hop_profile(1 / (1 + between.double()), between), 1 / torch.arange(1, 6, dtype=torch.float64), **EXACT
    )
    torch.manual_seed(0)
    some = torch.rand(9, 9, dtype=torch.float64)
    pairs = [float(some[i, j]) for i in range(9) for j in range(i + 1) if int(between[i, j]) == 3]
    assert math.isclose(float(hop_profile(some, between)[3]), sum(pairs) / len(pairs), rel_tol=1e-12)
    pairs = [float(some[i, j]) for i in range(9) for j in range(9) if int(between[i, j]) == 3]
    assert math.isclose(float(hop_profile(some, between, causal=False)[3]), sum(pairs) / len(pairs), rel_tol=1e-12)
    # The last rows of a map alone: their queries stand at the last keys.
    rows = [float(some[i, j]) for i in (7, 8) for j in range(i + 1) if int(between[i, j]) == 2]
    assert math.isclose(float(hop_profile(some[7:], between[7:])[2]), sum(rows) / len(rows), rel_tol=1e-12)
    with pytest.raises(ShapeError, match="hop is"):
        hop_profile(some, between[:4])
    with pytest.raises(ShapeError, match="nothing to average"):
        hop_profile(some, -torch.ones(9))


def followed(links: Tensor) -> Tensor:
    """Causal weights, high where linked."""
    scores = torch.where(links, 3.0, 0.0).double().masked_fill(~causal(len(links)), -math.inf)
    return scores.softmax(-1)


@pytest.mark.paper("graph_window")
def test_alignment_of_planted_and_of_uniform_weights() -> None:
    links = TREE.distance == 1
    attn = torch.stack((followed(links), uniform_causal(len(links)), followed(~links)))
    found = structure_alignment(attn, links)
    assert torch.allclose(found.auc, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), **EXACT)
    assert found.difference[0] > 0.1 and abs(found.difference[1]) < 1e-12 and found.difference[2] < -0.01
    with pytest.raises(ShapeError, match="boolean"):
        structure_alignment(attn, links.float())
    with pytest.raises(ShapeError, match="nothing to compare"):
        structure_alignment(attn, torch.zeros_like(links))


@pytest.mark.paper("graph_window")
def test_alignment_against_pairs_counted_by_hand() -> None:
    torch.manual_seed(0)
    links, attn = TREE.distance == 1, torch.rand(9, 9, dtype=torch.float64).softmax(-1)
    areas = []
    for i in range(9):
        wins = [
            1.0 if attn[i, j] > attn[i, k] else 0.0
            for j in range(9)
            for k in range(9)
            if links[i, j] and not links[i, k] and k != i
        ]
        if wins:
            areas.append(sum(wins) / len(wins))
    found = structure_alignment(attn, links, causal=False)
    assert math.isclose(float(found.auc), sum(areas) / len(areas), rel_tol=1e-12)
    lifts = []
    for i in range(9):
        linked = [float(attn[i, j]) for j in range(9) if links[i, j]]
        others = [float(attn[i, j]) for j in range(9) if not links[i, j] and j != i]
        lifts.append(sum(linked) / len(linked) - sum(others) / len(others))
    assert math.isclose(float(found.difference), sum(lifts) / 9, rel_tol=1e-12)
    attn[4, 4] = math.nan
    with pytest.raises(OptionError, match="NaN"):
        structure_alignment(attn, links)


@pytest.mark.paper("graph_window")
@pytest.mark.parametrize("slope", [0.5, 0.9])
def test_planted_line_is_flagged_and_others_are_not(slope: float) -> None:
    count = 40
    line = torch.zeros(count, count, dtype=torch.bool)
    line[torch.arange(count), (slope * torch.arange(count)).floor().long()] = True
    column = torch.zeros(count, count, dtype=torch.bool)
    column[:, 0] = True
    torch.manual_seed(0)
    noise = torch.rand(count, count, dtype=torch.float64).masked_fill(~causal(count), 0)
    attn = torch.stack((followed(line), uniform_causal(count), followed(column), noise / noise.sum(-1, keepdim=True)))
    # Nodes stand apart in the text, in order.
    places = 3 * torch.arange(count) + 2
    whole = torch.zeros(4, 130, 130, dtype=torch.float64)
    whole[:, places[:, None], places[None]] = attn
    found = skewed_line_sink(whole, places)
    assert found.flagged.tolist() == [True, False, False, False]
    assert abs(float(found.slope[0]) - slope) < 0.02 and float(found.correlation[0]) > 0.99
    assert float(found.correlation[2]) == 0
    assert torch.allclose(found.concentration[1], found.flat[1], **EXACT)
    with pytest.raises(ShapeError, match="four nodes"):
        skewed_line_sink(whole, places[:3])
    for wrong in (places + 100, places - 5):
        with pytest.raises(ShapeError, match="no places"):
            skewed_line_sink(whole, wrong)
    with pytest.raises(ShapeError, match="no places"):
        skewed_line_sink(whole[:, :50], places)
    with pytest.raises(ShapeError, match="ascend"):
        skewed_line_sink(whole, places.flip(0))


@pytest.mark.paper("graph_window")
def test_perturbations_break_what_they_say() -> None:
    def links(tree: EgoTree) -> list[tuple[int, int]]:
        return [(int(tree.nodes[a]), int(tree.nodes[b])) for a, b in tree.edges.tolist()]

    tree = EgoTree(0, ((1, (11, 12, 13)), (2, (21, 22)), (3, (31, 32, 33, 34))))
    for seed in range(5):
        swapped, exchanged, shuffled, foreign = (
            perturb_tree(
                tree,
                cast(Perturbation, kind),
                generator=torch.Generator().manual_seed(seed),
                unrelated=range(10, 60),
            )
            for kind in ("swap_children", "exchange_children", "shuffle", "unrelated")
        )
        tails = dict(tree.branches)
        moved = [head for head, tail in swapped.branches if tail != tails[head]]
        assert len(moved) == 2
        assert dict(swapped.branches)[moved[0]] == tails[moved[1]]
        assert dict(swapped.branches)[moved[1]] == tails[moved[0]]
        assert [head for head, _ in exchanged.branches] == [1, 2, 3]
        assert [len(tail) for _, tail in exchanged.branches] == [3, 2, 4]
        gone = sum(len(set(tail) - set(tails[head])) for head, tail in exchanged.branches)
        assert gone in (2, 4)
        assert sorted(shuffled.nodes.tolist()) == sorted(tree.nodes.tolist()) and shuffled.centre == 0
        assert [len(tail) for _, tail in shuffled.branches] == [3, 2, 4]
        assert len(set(links(shuffled)) & set(links(tree))) < 9
        assert len(set(foreign.nodes.tolist()) - set(tree.nodes.tolist())) == 6
        assert torch.equal(foreign.edges, tree.edges)
    with pytest.raises(OptionError, match="A perturbation is one of"):
        perturb_tree(tree, cast(Perturbation, "cut"))
    with pytest.raises(OptionError, match="unrelated has 1"):
        perturb_tree(tree, "unrelated", unrelated=[77])


def test_maps_of_half_precision_are_averaged_in_single() -> None:
    attn = uniform_causal(600).expand(2, -1, -1)
    for dtype in (torch.float16, torch.bfloat16):
        half = attn.to(dtype)
        exact = received_attention(half.double())
        assert received_attention(half).dtype == torch.float32
        torch.testing.assert_close(received_attention(half).double(), exact, rtol=1e-5, atol=0)
        hop = torch.arange(600) % 3
        torch.testing.assert_close(hop_profile(half, hop).double(), hop_profile(half.double(), hop), rtol=1e-5, atol=0)
