"""Token compression: limits, partitions, exactness where tokens repeat, and each rival against its rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.dense.full import FullAttention
from regard.errors import OptionError, ShapeError
from regard.layers.clustering import kmeans
from regard.sparse.token_sequence_compression import (
    Compressed,
    attention_saliency,
    bipartite_merge,
    cluster_aggregate,
    compress,
    grid_cells,
    proportional_bias,
    reconstruction_error,
    saliency_stability,
    unmerge,
)

METHODS = ["cluster", "cluster_select", "random", "strided", "pooling", "saliency", "tome"]
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
GRID = (6, 8)


def tokens(batch: int = 3, count: int = 48, channels: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels, generator=generator, dtype=torch.float64)


def run(method: str, x: Tensor, m: int) -> Compressed:
    scores = tokens(len(x), x.shape[1], 1, seed=9)[..., 0] if method == "saliency" else None
    grid = GRID if x.shape[1] == 48 and method in ("strided", "pooling") else None
    return compress(x, m, method, scores=scores, grid=grid)  # type: ignore[arg-type]


@pytest.mark.paper("token_sequence_compression")
@pytest.mark.parametrize("method", METHODS)
def test_as_many_tokens_as_before_are_the_tokens(method: str) -> None:
    x = tokens()
    found = run(method, x, 48)
    torch.testing.assert_close(found.tokens, x, **TIGHT)
    assert (found.sizes == 1).all() and torch.equal(found.assignment, torch.arange(48).expand(3, -1))


@pytest.mark.paper("token_sequence_compression")
@pytest.mark.parametrize("method", ["cluster", "pooling", "tome"])
def test_one_token_is_their_mean(method: str) -> None:
    x = tokens(count=47)
    found = run(method, x, 1)
    torch.testing.assert_close(found.tokens[:, 0], x.mean(1), **TIGHT)
    assert (found.sizes == 47).all()


@pytest.mark.paper("token_sequence_compression")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [1, 4, 12, 30, 48])
def test_the_assignment_is_a_partition(method: str, m: int) -> None:
    x = tokens()
    x[:, 10:20] = x[:, :1]  # copies, among which a choice could go astray
    tokens_out, sizes, assignment = run(method, x, m)
    assert tokens_out.shape == (3, m, 5) and assignment.shape == (3, 48)
    for b in range(3):
        assert torch.equal(torch.bincount(assignment[b], minlength=m), sizes[b])
    assert (sizes >= 1).all() and (sizes.sum(1) == 48).all()
    if method in ("cluster", "pooling", "tome"):
        expected = torch.stack([torch.stack([x[b, assignment[b] == c].mean(0) for c in range(m)]) for b in range(3)])
        torch.testing.assert_close(tokens_out, expected, **TIGHT)
    first = (assignment[:, None] == torch.arange(m)[:, None]).to(torch.int8).argmax(-1)
    if method in ("cluster", "pooling", "tome"):
        assert (first.diff(dim=1) > 0).all()


@pytest.mark.paper("token_sequence_compression")
@pytest.mark.parametrize("method", ["cluster", "cluster_select", "tome"])
def test_repeated_tokens_are_compressed_without_loss_and_log_sizes_make_attention_exact(method: str) -> None:
    distinct = tokens(2, 7, 8, seed=3)
    # ToMe compares even with odd places, and must merge half of all in a round: pairs side by side are its best case.
    order = torch.arange(14) // 2 if method == "tome" else torch.arange(42) // 2 % 7
    x = distinct[:, order]
    found = run(method, x, 7)
    torch.testing.assert_close(unmerge(found.tokens, found.assignment), x, **TIGHT)
    assert float(reconstruction_error(x, found.tokens, found.assignment).max()) < 1e-20
    project = tokens(1, 8, 24, seed=4)[0]

    def heads(t: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (t @ project).split(8, -1)]

    query, key, value = heads(x)
    _, few_keys, few_values = heads(found.tokens)
    full = FullAttention()
    bias = proportional_bias(found.sizes, torch.float64)
    torch.testing.assert_close(full(query, few_keys, few_values, mask=bias), full(query, key, value), **TIGHT)
    uneven = torch.cat((x, x[:, :1].expand(-1, 9, -1)), 1)
    again = run(method, uneven, 7) if method != "tome" else None
    if again is not None:
        _, few_keys, few_values = heads(again.tokens)
        _, key, value = heads(uneven)
        bias = proportional_bias(again.sizes, torch.float64)
        expected = full(query, key, value)
        torch.testing.assert_close(full(query, few_keys, few_values, mask=bias), expected, **TIGHT)
        assert not torch.allclose(full(query, few_keys, few_values), expected)


@pytest.mark.paper("token_sequence_compression")
def test_the_order_of_the_input_changes_the_order_of_the_output_alone() -> None:
    x = tokens()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    plain, moved = (cluster_aggregate(t, 9, init="farthest") for t in (x, x[:, order]))
    together = [found.assignment[:, :, None] == found.assignment[:, None] for found in (plain, moved)]
    assert torch.equal(together[1], together[0][:, order][:, :, order])
    distance = torch.cdist(plain.tokens, moved.tokens)
    assert (distance.min(-1).values < 1e-10).all() and (distance.min(-2).values < 1e-10).all()


@pytest.mark.paper("token_sequence_compression")
def test_clustering_that_starts_from_pooling_ends_no_worse() -> None:
    x = tokens(8)
    pooled = compress(x, 12, "pooling", grid=GRID)
    found = cluster_aggregate(x, 12, 30, init=grid_cells(GRID, 12))
    error = reconstruction_error(x, found.tokens, found.assignment)
    assert (error <= reconstruction_error(x, pooled.tokens, pooled.assignment)).all()
    torch.testing.assert_close(kmeans(x, 12, 30, init=grid_cells(GRID, 12)).errors[-1] / 48, error)
    start = kmeans(x, 12, 0, init=grid_cells(GRID, 12)).errors[0] / 48
    torch.testing.assert_close(start, reconstruction_error(x, pooled.tokens, pooled.assignment))


@pytest.mark.paper("token_sequence_compression")
@pytest.mark.parametrize("count", [20, 21])
@pytest.mark.parametrize("r", [0, 1, 6, 10])
def test_a_round_of_merging_takes_away_r_and_keeps_the_weighted_mean(count: int, r: int) -> None:
    x, sizes = tokens(count=count), torch.randint(1, 5, (3, count), generator=torch.Generator().manual_seed(2))
    key = tokens(count=count, seed=7)
    found = bipartite_merge(x, r, sizes=sizes, key=key)
    assert found.tokens.shape[1] == count - r
    torch.testing.assert_close((found.tokens * found.sizes[..., None]).sum(1), (x * sizes[..., None]).sum(1), **TIGHT)
    for b in range(3):  # the rule, one match after the other
        even, odd = range(0, count, 2), range(1, count, 2)
        match = {i: max(odd, key=lambda j: float(F.cosine_similarity(key[b, i], key[b, j], 0))) for i in even}
        value = {i: float(F.cosine_similarity(key[b, i], key[b, match[i]], 0)) for i in even}
        group = list(range(count))
        for i in sorted(even, key=lambda i: -value[i])[:r]:
            group[i] = match[i]
        own = torch.tensor(group)
        assert torch.equal(own[:, None] == own, found.assignment[b][:, None] == found.assignment[b])


@pytest.mark.paper("token_sequence_compression")
def test_merging_far_down_is_merging_in_rounds() -> None:
    x, key = tokens(count=20), tokens(count=20, channels=3, seed=5)
    found = compress(x, 4, "tome", key=key)
    first = bipartite_merge(x, 10, key=key)
    keys = torch.stack([torch.stack([key[b, first.assignment[b] == c].mean(0) for c in range(10)]) for b in range(3)])
    second = bipartite_merge(first.tokens, 5, sizes=first.sizes, key=keys)
    whole = second.assignment.gather(1, first.assignment)
    keys = torch.stack([torch.stack([key[b, whole[b] == c].mean(0) for c in range(5)]) for b in range(3)])
    third = bipartite_merge(second.tokens, 1, sizes=second.sizes, key=keys)
    torch.testing.assert_close(found.tokens, third.tokens, **TIGHT)
    assert torch.equal(found.sizes, third.sizes)


@pytest.mark.paper("token_sequence_compression")
def test_methods_that_choose_keep_what_their_rule_says() -> None:
    x, scores = tokens(), tokens(3, 48, 1, seed=9)[..., 0]
    best = scores.argsort(1, descending=True)[:, :12].sort(1).values
    found = compress(x, 12, "saliency", scores=scores)
    torch.testing.assert_close(found.tokens, x.gather(1, best[..., None].expand(-1, -1, 5)))
    assert torch.equal(found.assignment, torch.cdist(x, found.tokens).argmin(-1))
    rows, columns = torch.tensor([1, 3, 5]), torch.tensor([1, 3, 5, 7])
    expected = x.unflatten(1, GRID)[:, rows][:, :, columns].flatten(1, 2)
    torch.testing.assert_close(compress(x, 12, "strided", grid=GRID).tokens, expected)
    pooled = F.avg_pool2d(x.mT.unflatten(2, GRID), 2).flatten(2).mT
    torch.testing.assert_close(compress(x, 12, "pooling", grid=GRID).tokens, pooled)
    clusters, medoids = compress(x, 12, "cluster"), compress(x, 12, "cluster_select")
    for b, c in ((0, 0), (2, 11)):
        members = x[b, clusters.assignment[b] == c]
        nearest = members[(members - members.mean(0)).square().sum(-1).argmin()]
        torch.testing.assert_close(medoids.tokens[b, c], nearest)
    drawn = [compress(x, 12, "random", seed=seed).tokens for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (torch.cdist(drawn[0], x).min(-1).values < 1e-6).all()


@pytest.mark.paper("token_sequence_compression")
def test_clusters_lose_less_than_the_others() -> None:
    x = tokens(8) + 3 * tokens(8, 6, seed=4)[:, torch.arange(48) // 8]
    error = {}
    for method in METHODS:
        found = run(method, x, 12)
        error[method] = float(reconstruction_error(x, found.tokens, found.assignment).mean())
    assert min(error, key=error.__getitem__) == "cluster"


def test_order_by_size_and_gradients_through_the_means() -> None:
    x = tokens().requires_grad_()
    found = cluster_aggregate(x, 6, order="size")
    assert (found.sizes.diff(dim=1) <= 0).all()
    found.tokens[0, 2].sum().backward()
    assert x.grad is not None
    inside = found.assignment[0] == 2
    torch.testing.assert_close(x.grad[0, inside], torch.full_like(x[0, inside], 1 / float(found.sizes[0, 2])))
    assert (x.grad[0, ~inside] == 0).all() and (x.grad[1:] == 0).all()


def test_cells_are_as_square_as_can_be() -> None:
    assert torch.equal(grid_cells((4, 4), 4).view(4, 4)[::2, ::2], torch.tensor([[0, 1], [2, 3]]))
    assert grid_cells((4, 8), 8).bincount().tolist() == [4] * 8
    assert grid_cells((7,), 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(OptionError, match="cut into 11"):
        grid_cells((4, 4), 11)
    with pytest.raises(ShapeError, match="grid"):
        compress(tokens(), 4, "pooling", grid=(5, 5))


@pytest.mark.paper("token_sequence_compression")
def test_stability_is_rank_correlation_and_overlap() -> None:
    stats = pytest.importorskip("scipy.stats")
    layers = [tokens(4, 30, 1, seed=s)[..., 0] for s in range(3)]
    layers[2] = layers[0].exp()  # another scale, the same ranks
    layers[1][:, :10] = 0.5  # ties
    found = saliency_stability(layers, top=6)
    for i in range(3):
        for j in range(3):
            expected = sum(stats.spearmanr(layers[i][b], layers[j][b]).statistic for b in range(4)) / 4
            assert float(found.correlation[i, j]) == pytest.approx(expected)
    assert float(found.overlap[0, 2]) == pytest.approx(1) == float(found.correlation[0, 2])
    tops = [[set(layer[b].topk(6).indices.tolist()) for b in range(4)] for layer in layers]
    shared = sum(len(tops[0][b] & tops[1][b]) / 6 for b in range(4)) / 4
    assert float(found.overlap[0, 1]) == pytest.approx(shared)


def test_saliency_is_the_mean_over_heads_and_queries() -> None:
    weights = torch.rand(2, 3, 5, 9).softmax(-1)
    found = attention_saliency(weights, slice(1, 3), slice(4, None))
    expected = sum(weights[:, h, q, 4:] for h in range(3) for q in (1, 2)) / 6
    torch.testing.assert_close(found, expected)


def test_half_precision_keeps_its_type() -> None:
    for method in METHODS:
        assert run(method, tokens().bfloat16(), 12).tokens.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    x = tokens()
    with pytest.raises(OptionError, match="no method 'kmeans'"):
        compress(x, 4, "kmeans")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="1 to 48"):
        compress(x, 49)
    with pytest.raises(OptionError, match="scores go with"):
        compress(x, 4, "saliency")
    with pytest.raises(OptionError, match="scores go with"):
        compress(x, 4, scores=x[..., 0])
    with pytest.raises(ShapeError, match="one score"):
        compress(x, 4, "saliency", scores=x[0, :, 0])
    with pytest.raises(OptionError, match="order"):
        cluster_aggregate(x, 4, order="raster")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="half"):
        bipartite_merge(x, 25)
    with pytest.raises(ShapeError, match="two or more"):
        saliency_stability([x[..., 0]])
