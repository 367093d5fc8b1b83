"""Graph-aware attention against explicit loops from the formulas, torch's attention, and graph theory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regard.dense.graph_aware_attention import GINAttention, PNAAttention
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.kernels import scored
from regard.layers.graph import ADJACENCY_MODES, aggregate, graph_from_attention, process_adjacency
from regard.layers.rotary import apply_rotary, rotary_angles
from regard.masks import KeyPadding

WIDTH, HEADS, DIM, LENGTH = 12, 3, 4, 9
SOFT = ("softmax", "relu", "none")


def tokens(seed: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(kind: type[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    made = kind(WIDTH, HEADS, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def projected(linear: nn.Module, x: Tensor, head: int, turn: bool = True) -> Tensor:
    part = linear(x)[..., head * DIM : (head + 1) * DIM]
    return apply_rotary(part, *rotary_angles(x.shape[1], DIM, dtype=x.dtype)) if turn else part


def hidden_from(length: int, causal: bool) -> Tensor:
    return torch.ones(length, length).triu(1).bool() if causal else torch.zeros(length, length).bool()


def softmax_map(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(1, 2) / math.sqrt(DIM)
    return scores.masked_fill(hidden_from(q.shape[1], causal), -math.inf).softmax(-1)


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("causal", [False, True])
def test_without_its_network_it_is_attention_without_value_and_output(causal: bool) -> None:
    torch.manual_seed(0)
    layer, x = GINAttention(WIDTH, HEADS).double(), tokens()
    layer.mlp = nn.Identity()
    query, key = (
        torch.stack([projected(linear[0], x, h) for h in range(HEADS)], 1) for linear in (layer.query, layer.key)
    )
    value = torch.stack(x.chunk(HEADS, -1), 1)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(layer(x, causal=causal), expected.transpose(1, 2).flatten(2))


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"differential": True}, {"out_proj": True, "threshold_mode": "sigmoid"}])
def test_gin_is_its_formula(options: dict[str, Any], causal: bool) -> None:
    layer, x = build(GINAttention, mlp_mult=1.5, **options), tokens()
    outs = []
    for h in range(HEADS):
        maps = [
            softmax_map(layer.alpha * projected(q, x, h), projected(k, x, h), causal)
            for q, k in zip(layer.query, layer.key, strict=True)
        ]
        edges = maps[0] - layer.lam * maps[1] if "differential" in options else maps[0]
        if "threshold_mode" in options:
            edges = torch.sigmoid(10 * (edges - 0.2)).masked_fill(hidden_from(LENGTH, causal), 0)
        nodes = x[..., h * DIM : (h + 1) * DIM]
        mixed = layer.eps[h] * nodes + edges @ nodes
        inner = mixed @ layer.mlp.up.weight[h] + layer.mlp.up.bias[h]
        inner = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.mlp.gain[h]
        outs.append((inner * torch.sigmoid(inner)) @ layer.mlp.down.weight[h] + layer.mlp.down.bias[h])
        torch.testing.assert_close(layer.maps(x, causal=causal)[:, h], edges)
    expected = torch.cat(outs, -1)
    torch.testing.assert_close(layer(x, causal=causal), layer.out(expected) if layer.out else expected)


@pytest.mark.paper("graph_aware_attention")
def test_pair_scores_are_a_network_of_both_inputs() -> None:
    layer, x = build(GINAttention, scorer="mlp", scorer_hidden=5), tokens()
    pairs = torch.cat((x[:, :, None].expand(-1, -1, LENGTH, -1), x[:, None].expand(-1, LENGTH, -1, -1)), -1)
    scores = layer.pairs.second(F.silu(layer.pairs.first(pairs))).permute(0, 3, 1, 2)
    edges = scores.masked_fill(hidden_from(LENGTH, True), -math.inf).softmax(-1)
    torch.testing.assert_close(layer.maps(x, causal=True), edges)
    nodes = torch.stack(x.chunk(HEADS, -1), 1)
    expected = layer.mlp(layer.eps * nodes + edges @ nodes)
    torch.testing.assert_close(layer(x, causal=True), expected.transpose(1, 2).flatten(2))


@pytest.mark.paper("graph_aware_attention")
def test_it_begins_as_the_paper_says() -> None:
    layer = GINAttention(WIDTH, HEADS, differential=True, layer_index=2)
    assert layer.alpha is not None and layer.alpha.item() == 1 and not bool(layer.eps.any())
    assert layer.lam is not None and layer.lam.item() == pytest.approx(0.8 - 0.6 * math.exp(-0.6))
    assert layer.out is None
    assert layer.mlp.get_submodule("up").weight.shape == (HEADS, DIM, DIM // 2)
    plain = GINAttention(WIDTH, HEADS, mlp_mult=2, sharpen=False)
    # Two projections, one eps a head, and of each head d to 2d to d with biases and a gain; no values, no output.
    network = DIM * 2 * DIM + 2 * DIM + 2 * DIM + 2 * DIM * DIM + DIM
    assert sum(p.numel() for p in plain.parameters()) == 2 * WIDTH**2 + HEADS * (network + 1)


@pytest.mark.paper("graph_aware_attention")
def test_sums_separate_multisets_that_means_confuse() -> None:
    """A probe that reads {a, b} or {a, a, b, b}: softmax rows are means, and blind to how many there are."""
    a, b, probe = tokens(3, 3)[:1].unbind(1)
    small, large = torch.stack((a, b, probe), 1), torch.stack((a, a, b, b, probe), 1)

    def read(layer: GINAttention, x: Tensor) -> Tensor:
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        seen[:, -1] = False
        return layer(x, mask=seen)[:, -1]

    mean = build(GINAttention, rotary=False)
    torch.testing.assert_close(read(mean, small), read(mean, large), rtol=1e-12, atol=1e-12)
    total = build(GINAttention, rotary=False, threshold_mode="binary", threshold=0.0)
    assert (read(total, small) - read(total, large)).abs().max().item() > 1e-2
    values = torch.stack((a, b), 1)
    twice = values.repeat(1, 2, 1)
    for name, same in (("mean", True), ("sum", False)):
        one, other = (aggregate(v.new_ones(1, 1, v.shape[1]), v, (name,)) for v in (values, twice))
        assert torch.allclose(one, other) is same


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("adjacency", SOFT[:2])
@pytest.mark.parametrize("causal", [False, True])
def test_pna_is_its_formula(adjacency: str, causal: bool) -> None:
    layer, x = build(PNAAttention, adjacency=adjacency), tokens()
    heads = []
    for h in range(HEADS):
        q, k = (projected(linear, x, h) for linear in (layer.query, layer.key))
        value = projected(layer.value, x, h, turn=False)
        if adjacency == "softmax":
            edges = softmax_map(q, k, causal)
        else:
            edges = F.relu(q @ k.transpose(1, 2) / math.sqrt(DIM)).masked_fill(hidden_from(LENGTH, causal), 0)
        rows = []
        for batch in range(2):
            for i in range(LENGTH):
                weight = edges[batch, i]
                degree = weight.sum().item() or 1.0
                total = sum(weight[j] * value[batch, j] for j in range(LENGTH))
                mean = total / degree
                near = [j for j in range(LENGTH) if weight[j] > 0]
                top = value[batch, near].amax(0) if near else torch.zeros(DIM, dtype=x.dtype)
                square = sum(weight[j] * value[batch, j] ** 2 for j in range(LENGTH)) / degree
                rows.append(torch.cat((total, mean, top, (square - mean**2).clamp_min(0))))  # type: ignore[arg-type]
        read = torch.stack(rows).view(2, LENGTH, -1)
        torch.testing.assert_close(layer.neighbours(x, causal=causal)[:, h], read)
        heads.append(F.silu(read @ layer.up.weight[h]) @ layer.down.weight[h])
    torch.testing.assert_close(layer(x, causal=causal), layer.out(torch.cat(heads, -1)))


@pytest.mark.paper("graph_aware_attention")
def test_sum_and_mean_are_one_under_softmax() -> None:
    x = tokens()
    total, mean, _, var = build(PNAAttention).neighbours(x, causal=True).chunk(4, -1)
    torch.testing.assert_close(total, mean)
    assert bool((var >= 0).all())
    total, mean, _, _ = (
        build(PNAAttention, threshold_mode="relu", threshold=0.1).neighbours(x, causal=True).chunk(4, -1)
    )
    assert (total - mean).abs().max().item() > 0.1


@pytest.mark.paper("graph_aware_attention")
def test_extremes_ignore_what_has_no_weight() -> None:
    value = torch.tensor([[[9.0], [1.0], [-7.0], [2.0]]])
    weights = torch.tensor([[[0.0, 0.1, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.5, -1.0]]], requires_grad=True)
    out = aggregate(weights, value.requires_grad_(), ("max", "min", "sum"))
    assert out.tolist()[0][0][:2] == [2.0, 1.0]
    assert out.tolist()[0][1] == [0.0, 0.0, 0.0]
    assert out.tolist()[0][2][:2] == [9.0, -7.0]
    out.sum().backward()
    assert weights.grad is not None and bool(torch.isfinite(weights.grad).all())
    assert value.grad is not None and bool(torch.isfinite(value.grad).all())


@pytest.mark.paper("graph_aware_attention")
def test_nothing_to_see_is_finite() -> None:
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0] = False
    for layer in (
        build(PNAAttention),
        build(PNAAttention, adjacency="relu"),
        build(GINAttention, threshold_mode="silu"),
    ):
        x = tokens().requires_grad_()
        out = layer(x, causal=True, mask=KeyPadding(valid))
        out.sum().backward()
        assert bool(torch.isfinite(out).all()) and x.grad is not None and bool(torch.isfinite(x.grad).all())


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("mode", ADJACENCY_MODES)
def test_every_mode_is_causal(mode: str) -> None:
    """Neither what comes later nor how much of it changes an earlier output."""
    x = tokens()
    changed = torch.cat((x[:, :5], 3 * tokens(7)[:, 5:]), 1)
    for adjacency in SOFT:
        for kind in (GINAttention, PNAAttention):
            layer = build(kind, adjacency=adjacency, threshold_mode=mode, fraction=0.4)
            before = layer(x, causal=True)[:, :5]
            torch.testing.assert_close(layer(changed, causal=True)[:, :5], before, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(layer(x[:, :5], causal=True), before, rtol=1e-10, atol=1e-10)
            assert not bool(layer.maps(x, causal=True).triu(1).any())


MODES: dict[str, Callable[[float], float]] = {
    "none": lambda a: a,
    "relu": lambda a: max(a - 0.2, 0),
    "silu": lambda a: (a - 0.2) / (1 + math.exp(0.2 - a)),
    "softplus": lambda a: math.log1p(math.exp(a - 0.2)),
    "sharp_softplus": lambda a: math.log1p(math.exp(10 * (a - 0.2))) / 10,
    "sigmoid": lambda a: 1 / (1 + math.exp(-10 * (a - 0.2))),
    "flowthreshold": lambda a: 1 / (1 + math.exp(-5 * a)) / (1 + math.exp(-50 * (a - 0.2))),
    "binary": lambda a: float(a > 0.2),
    "silu+binary": lambda a: (a - 0.2) / (1 + math.exp(0.2 - a)) + 0.5 * (a > 0.2),
    "relu_below_binary_above": lambda a: float(a > 0.2),
    "silu_below_binary_above": lambda a: 1.0 if a > 0.2 else (a - 0.2) / (1 + math.exp(0.2 - a)),
    "softplus_below_binary_above": lambda a: 1.0 if a > 0.2 else math.log1p(math.exp(a - 0.2)),
}


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_their_functions(mode: str) -> None:
    weights = softmax_map(tokens(1)[..., :DIM], tokens(2)[..., :DIM], False)
    values = [[[MODES[mode](float(a)) for a in row] for row in item] for item in weights]
    expected = torch.tensor(values, dtype=torch.float64)
    found = process_adjacency(weights, mode, binary_scale=0.5)
    torch.testing.assert_close(found, expected.tril())


@pytest.mark.paper("graph_aware_attention")
def test_top_k_takes_a_share_of_what_a_row_sees() -> None:
    assert {*MODES, "top_k"} == set(ADJACENCY_MODES)
    weights = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0))
    edges = process_adjacency(weights, "top_k", fraction=0.1)
    for row in range(40):
        count = max((row + 1) // 10, 1)
        best = weights[:, row, : row + 1].topk(count).indices
        expected = torch.zeros(2, 40).scatter(1, best, 1.0)
        assert torch.equal(edges[:, row], expected)


@pytest.mark.paper("graph_aware_attention")
def test_a_learned_threshold_learns() -> None:
    layer = build(GINAttention, threshold_mode="relu", learn_threshold=True, threshold=0.05)
    layer(tokens(), causal=True).square().sum().backward()
    assert abs(float(layer.threshold.grad)) > 1e-6


@pytest.mark.paper("graph_aware_attention")
def test_graph_of_a_map() -> None:
    weights = torch.rand(14, 14, generator=torch.Generator().manual_seed(3)).tril()
    found = graph_from_attention(weights, 0.6)
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(14))
    graph.add_edges_from((j, i) for i in range(14) for j in range(14) if weights[i, j] > 0.6)
    assert {tuple(edge) for edge in found.edges.tolist()} == set(graph.edges)
    for (source, target), weight in zip(found.edges.tolist(), found.weights.tolist(), strict=True):
        assert weight == float(weights[target, source])
    assert found.in_degree.tolist() == [graph.in_degree(node) for node in range(14)]
    assert found.out_degree.tolist() == [graph.out_degree(node) for node in range(14)]
    simple = networkx.Graph(graph.to_undirected())
    simple.remove_edges_from(list(networkx.selfloop_edges(simple)))
    assert found.degree.tolist() == [simple.degree(node) for node in range(14)]
    clustering = networkx.clustering(simple)
    assert found.clustering.tolist() == pytest.approx([clustering[node] for node in range(14)])


class LargestTensor(TorchDispatchMode):
    """The most numbers of any tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.paper("graph_aware_attention")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GINAttention, {"threshold_mode": "softplus", "differential": True}),
        (GINAttention, {"scorer": "mlp", "scorer_hidden": 4}),
        (PNAAttention, {"adjacency": "relu"}),
    ],
)
def test_tiles_of_queries_give_the_same_in_linear_memory(
    kind: type[nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, results, largest = build(kind, **options), [], []
    for limit in (1 << 22, 1 << 12):
        monkeypatch.setattr(scored, "_TILE", limit)
        x = tokens(1, 64).requires_grad_()
        with LargestTensor() as seen:
            out = layer(x, causal=True)
            out.square().sum().backward()
        assert x.grad is not None
        results.append((out.detach(), x.grad))
        largest.append(seen.numel)
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-10)
    assert largest[0] >= 2 * 64 * 64 and largest[1] <= 1 << 13


def test_refusals() -> None:
    for kind in (GINAttention, PNAAttention):
        with pytest.raises(UnknownNameError, match="adjacency mode"):
            kind(WIDTH, HEADS, threshold_mode="sharp")
        with pytest.raises(OptionError, match="softmax"):
            kind(WIDTH, HEADS, adjacency="tanh")
        with pytest.raises(OptionError, match="hidden unit"):
            kind(WIDTH, HEADS, mlp_mult=0.1)
        with pytest.raises(ShapeError, match="takes"):
            kind(WIDTH, HEADS)(torch.zeros(2, 3, 5))
        with pytest.raises(OptionError, match="fraction"):
            kind(WIDTH, HEADS, fraction=0)
    with pytest.raises(OptionError, match="pair scorer"):
        GINAttention(WIDTH, HEADS, scorer="mlp", differential=True)
    with pytest.raises(UnknownNameError, match="aggregator"):
        PNAAttention(WIDTH, HEADS, aggregators=("median",))
    with pytest.raises(OptionError, match="aggregator"):
        PNAAttention(WIDTH, HEADS, aggregators=())
    with pytest.raises(ShapeError, match="one map"):
        graph_from_attention(torch.zeros(2, 3, 3))
