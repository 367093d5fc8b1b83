"""k-means in batches: against scikit-learn, its own guarantees, and partitions that stay whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.layers.clustering import cluster_means, cluster_sizes, kmeans, nearest, ordered_clusters


def tokens(batch: int = 3, count: int = 40, channels: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels, generator=generator, dtype=torch.float64)


def together(assignment: Tensor) -> Tensor:
    """Which tokens share a cluster."""
    return assignment[:, :, None] == assignment[:, None]


@pytest.mark.paper("token_sequence_compression")
def test_rounds_from_the_same_start_end_where_scikit_learns_do() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = tokens()
    start = torch.arange(40) % 6
    found = kmeans(x, 6, 100, init=start)
    for b in range(3):
        centres = torch.stack([x[b, start == c].mean(0) for c in range(6)]).numpy()
        other = cluster.KMeans(6, init=centres, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x[b].numpy())
        assert float(found.errors[-1, b]) == pytest.approx(other.inertia_, rel=1e-9)
        assert torch.equal(found.assignment[b], torch.as_tensor(other.labels_, dtype=torch.int64))


@pytest.mark.paper("token_sequence_compression")
@pytest.mark.parametrize("init", ["kmeans++", "farthest"])
def test_the_error_never_grows_and_is_what_it_says(init: str) -> None:
    x = tokens(6, 50)
    for clusters in (1, 4, 17, 50):
        assignment, errors = kmeans(x, clusters, 20, init=init)  # type: ignore[arg-type]
        assert (errors[1:] <= errors[:-1] + 1e-9).all()
        for b in range(6):
            own = [x[b, assignment[b] == c] for c in range(clusters)]
            assert all(len(members) for members in own)
            expected = sum(float((members - members.mean(0)).square().sum()) for members in own)
            assert float(errors[-1, b]) == pytest.approx(expected, abs=1e-9)


def test_plus_plus_takes_distant_groups_apart() -> None:
    centres = 100 * torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = torch.arange(80) % 8
    x = (centres[label] + tokens(1, 80, 4)[0])[None]
    for seed in range(5):
        found = kmeans(x, 8, 0, seed=seed).assignment
        assert torch.equal(together(found), together(label[None]))


def test_an_empty_cluster_takes_the_farthest_token() -> None:
    x = torch.tensor([[0.0, 0.1, 0.2, 9.0, 10.0]], dtype=torch.float64)[..., None]
    # The start has no token in cluster 2; 9 and 10 lie farthest from their mean, and the first of them moves.
    for iters in (0, 1, 5):
        found = kmeans(x, 3, iters, init=torch.tensor([0, 0, 0, 1, 1]))
        assert found.assignment.tolist() == [[0, 0, 0, 2, 1]]
    same = torch.ones(2, 7, 3)
    for init in ("kmeans++", "farthest"):
        assert (cluster_sizes(kmeans(same, 5, init=init).assignment, 5) > 0).all()  # type: ignore[arg-type]


def test_an_example_does_not_depend_on_its_batch() -> None:
    x = tokens(4, 30)
    for init in ("kmeans++", "farthest"):
        whole = kmeans(x, 7, init=init, seed=3).assignment  # type: ignore[arg-type]
        for b in range(4):
            assert torch.equal(kmeans(x[b : b + 1], 7, init=init, seed=3).assignment[0], whole[b])  # type: ignore[arg-type]


def test_cosine_sees_directions_alone() -> None:
    x = tokens(2, 30)
    length = torch.rand(2, 30, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 50 + 0.1
    plain = kmeans(x, 5, 30, init="farthest", metric="cosine").assignment
    assert torch.equal(kmeans(x * length, 5, 30, init="farthest", metric="cosine").assignment, plain)
    assert not torch.equal(kmeans(x * length, 5, 30, init="farthest").assignment, plain)


def test_a_far_origin_does_not_blur_single_precision() -> None:
    x = tokens(2, 30).float()
    expected = kmeans(x, 5, init="farthest").assignment
    assert torch.equal(kmeans(x + 3000, 5, init="farthest").assignment, expected)
    centres = x[:, :5]
    assert torch.equal(nearest(x + 3000, centres + 3000), torch.cdist(x, centres).argmin(-1))


def test_means_sizes_and_order() -> None:
    x, weight = tokens(2, 6), torch.rand(2, 6, dtype=torch.float64)
    assignment = torch.tensor([[2, 0, 2, 3, 0, 2], [3, 3, 3, 3, 0, 3]])
    means = cluster_means(x, assignment, 4, weight)
    own = weight[0, [0, 2, 5], None]
    torch.testing.assert_close(means[0, 2], (own * x[0, [0, 2, 5]]).sum(0) / own.sum())
    assert (means[0, 1] == 0).all() and (
        cluster_sizes(assignment, 4) == torch.tensor([[2, 0, 3, 1], [1, 0, 0, 5]])
    ).all()
    assert torch.equal(ordered_clusters(assignment), torch.tensor([[0, 1, 0, 2, 1, 0], [0, 0, 0, 0, 1, 0]]))
    assert cluster_means(x.bfloat16(), assignment, 4).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="clusters"):
        kmeans(tokens(), 41)
    with pytest.raises(ShapeError, match="batch, tokens"):
        kmeans(tokens()[0], 2)
    with pytest.raises(OptionError, match="init"):
        kmeans(tokens(), 2, init="random")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="metric"):
        kmeans(tokens(), 2, metric="l1")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="assignment"):
        kmeans(tokens(), 2, init=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(OptionError, match="names clusters"):
        kmeans(tokens(), 2, init=torch.full((40,), 2))
