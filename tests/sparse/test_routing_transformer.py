"""Routing attention against full attention, planted clusters and loops; its centroids against plain means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.masks import KeyPadding
from regard.sparse.routing_transformer import (
    OnlineKMeans,
    RoutingAttention,
    RoutingTransformerAttention,
    routing_attention,
    routing_report,
    to_sphere,
)

ARITHMETIC = ("official", "port")


def inputs(length: int, heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def centroids(clusters: int, heads: int = 2, dim: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return to_sphere(torch.randn(heads, clusters, dim, generator=generator, dtype=torch.float64))


@pytest.mark.paper("routing_transformer")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_one_cluster_is_causal_attention_on_the_sphere(arithmetic: str, strict: bool) -> None:
    query, key, value = inputs(33)
    if arithmetic == "official":
        q, k, scale = F.layer_norm(query, (8,), eps=1e-6), F.layer_norm(key, (8,), eps=1e-6), 1.0
    else:
        q, k, scale = F.normalize(query, dim=-1) * 8**0.5, F.normalize(key, dim=-1) * 8**0.5, 8**-0.5
    out = routing_attention(query, key, value, centroids(1), 33, strict=strict, arithmetic=arithmetic)  # type: ignore[arg-type]
    expected = F.scaled_dot_product_attention(q, k, value, is_causal=True, scale=scale)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("routing_transformer")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_planted_clusters_are_block_diagonal(causal: bool, strict: bool) -> None:
    """Four orthogonal groups of eight tokens, in random places: full attention inside each group, none outside."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    basis = F.layer_norm(basis[:4] - basis[:4].mean(-1, keepdim=True), (16,))
    group = torch.arange(32).remainder(4)[torch.randperm(32, generator=generator)]
    x = basis[group] + 0.05 * torch.randn(1, 1, 32, 16, generator=generator, dtype=torch.float64)
    value = torch.randn(1, 1, 32, 16, generator=generator, dtype=torch.float64)
    out = routing_attention(x, x, value, basis[None], 8, causal, strict=strict, shared_qk=True)
    point = F.layer_norm(x, (16,), eps=1e-6)
    for c in range(4):
        members = (group == c).nonzero().flatten()
        part, inside = point[:, :, members], value[:, :, members]
        expected = F.scaled_dot_product_attention(part, part, inside, is_causal=causal, scale=1.0)
        torch.testing.assert_close(out[:, :, members], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("routing_transformer")
@pytest.mark.parametrize("strict", [False, True])
def test_order_of_clusters_does_not_matter(strict: bool) -> None:
    query, key, value = inputs(40)
    mu = centroids(5)
    out = routing_attention(query, key, value, mu, 10, strict=strict)
    torch.testing.assert_close(routing_attention(query, key, value, mu[:, [3, 0, 4, 1, 2]], 10, strict=strict), out)


@pytest.mark.paper("routing_transformer")
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_formula(causal: bool, shared: bool, arithmetic: str) -> None:
    """A loop over clusters and their members, results averaged over the clusters of a token."""
    query, key, value = inputs(26)
    key = query if shared else key
    mu, window = centroids(4), 9
    out = routing_attention(query, key, value, mu, window, causal, shared_qk=shared, arithmetic=arithmetic)  # type: ignore[arg-type]
    q, k = to_sphere(query, arithmetic), to_sphere(key, arithmetic)  # type: ignore[arg-type]
    scale = 1.0 if arithmetic == "official" else 8**-0.5
    for b in range(2):
        for h in range(2):
            results: list[list[Tensor]] = [[] for _ in range(26)]
            for c in range(4):
                rows = (q[b, h] @ mu[h, c]).topk(window).indices.tolist()
                columns = (k[b, h] @ mu[h, c]).topk(window).indices.tolist()
                for i in rows:
                    seen = [j for j in columns if j <= i or not causal]
                    if causal and i not in seen:
                        seen.append(i)
                    if shared and arithmetic == "port" and len(seen) > 1:
                        seen = [j for j in seen if j != i]
                    weights = (scale * k[b, h, seen] @ q[b, h, i]).softmax(-1)
                    results[i].append(weights @ value[b, h, seen])
            for i, found in enumerate(results):
                expected = torch.stack(found).mean(0) if found else torch.zeros(8, dtype=torch.float64)
                torch.testing.assert_close(out[b, h, i], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("routing_transformer")
def test_strict_is_causal_and_the_balanced_form_is_not() -> None:
    query, key, value = inputs(40)
    mu = centroids(5)

    def run(strict: bool, *tensors: Tensor) -> Tensor:
        return routing_attention(*tensors, mu, 8, strict=strict)  # type: ignore[arg-type]

    moved = {False: 0.0, True: 0.0}
    for t in (5, 20, 33):
        late = [torch.cat((x[:, :, : t + 1], 4 * torch.randn_like(x[:, :, t + 1 :])), 2) for x in (query, key, value)]
        for strict in moved:
            change = (run(strict, *late) - run(strict, query, key, value))[:, :, : t + 1].abs().max()
            moved[strict] = max(moved[strict], float(change))
    assert moved[True] < 1e-10
    assert moved[False] > 1e-3, "later tokens push earlier ones out of their cluster"


@pytest.mark.paper("routing_transformer")
def test_with_fixed_membership_later_values_change_nothing() -> None:
    """Membership reads queries and keys alone: other values behind a token leave its output as it was."""
    query, key, value = inputs(40)
    mu = centroids(5)
    out = routing_attention(query, key, value, mu, 8)
    for t in (5, 20, 33):
        late = torch.cat((value[:, :, : t + 1], torch.randn_like(value[:, :, t + 1 :])), 2)
        torch.testing.assert_close(routing_attention(query, key, late, mu, 8)[:, :, : t + 1], out[:, :, : t + 1])


@pytest.mark.paper("routing_transformer")
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_one_step_without_memory_gives_cluster_means(arithmetic: str) -> None:
    x, _, _ = inputs(30)
    kmeans = OnlineKMeans(2, 8, 6, decay=0.0, arithmetic=arithmetic).double()  # type: ignore[arg-type]
    kmeans.centroids[:, 5] = kmeans.centroids[:, :5].mean(1)  # never nearer than the nearest of those it averages
    before, nearest = kmeans.centroids.clone(), kmeans.assign(x)
    kmeans.update(x)
    point = to_sphere(x, arithmetic)  # type: ignore[arg-type]
    empty = 0
    for h in range(2):
        for c in range(6):
            members = point[:, h][nearest[:, h] == c]
            if not len(members):
                empty += 1
                assert torch.equal(kmeans.centroids[h, c], before[h, c])
                continue
            mean = members.mean(0)
            expected = mean if arithmetic == "official" else mean / mean.norm() * 8**0.5
            torch.testing.assert_close(kmeans.centroids[h, c], expected, rtol=1e-4, atol=1e-4)
    assert empty


@pytest.mark.paper("routing_transformer")
def test_flops() -> None:
    shape = AttentionShape(4096, 4096, 1, 64, causal=True)
    cost = RoutingTransformerAttention(1, 64, 64).cost(shape)
    assert cost.flops == 2 * 2 * 4096 * 64 * 64 + 2 * 64 * 64**2 * 128
    assert cost.flops / (2 * 4096**2 * 128) < 0.06


def test_init_finds_planted_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = to_sphere(torch.randn(2, 3, 8, generator=generator, dtype=torch.float64))
    group = torch.arange(60) % 3
    x = centres[:, group] + 0.05 * torch.randn(2, 2, 60, 8, generator=generator, dtype=torch.float64)
    module = RoutingTransformerAttention(2, 8, 3).double()
    module.init(x, iters=20)
    assigned = module.kmeans.assign(x)
    assert bool((assigned == assigned[:, :, group]).all())
    assert float(module.kmeans.commitment_loss(x)) < 1e-5
    report = routing_report(x, module.kmeans.centroids, 20)
    assert report.entropy == pytest.approx(1.0, abs=1e-6)
    assert report.unrouted < 0.1


def test_report_counts_tokens() -> None:
    x, _, _ = inputs(12)
    mu = centroids(1).expand(-1, 3, -1)
    report = routing_report(x, mu, 4)
    assert (report.unrouted, report.multiple) == pytest.approx((8 / 12, 4 / 12))


def test_centroids_move_in_training_alone() -> None:
    query, key, value = inputs(30)
    module = RoutingTransformerAttention(2, 8, 4, decay=0.5).double().eval()
    start = module.kmeans.centroids.clone()
    out = module(query, key, value, causal=True)
    assert torch.equal(module.kmeans.centroids, start)
    again = RoutingTransformerAttention(2, 8, 4, decay=0.5).double().eval()
    assert torch.equal(again(query, key, value, causal=True), out), "two builds route alike"
    torch.testing.assert_close(module.train()(query, key, value, causal=True), out)
    assert not torch.equal(module.kmeans.centroids, start)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_layer(strict: bool, shared: bool) -> None:
    torch.manual_seed(0)
    layer = RoutingAttention(
        32, 4, 2, clusters=4, window=9, shared_qk=shared, local_window=5, strict=strict, rotary=True
    )
    layer = layer.double().eval()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    out = layer(x, causal=True)
    assert out.shape == x.shape and layer.strictly_causal == strict
    if strict:
        late = torch.cat((x[:, :15], torch.randn_like(x[:, 15:])), 1)
        torch.testing.assert_close(layer(late, causal=True)[:, :15], out[:, :15])
    sizes = [RoutingAttention(32, 4, n, clusters=4, shared_qk=True) for n in (0, 4)]
    assert sizes[0].key is None and sizes[1].routing is None
    for part in sizes:
        assert part(x.float(), causal=True).shape == x.shape


def test_default_number_of_clusters_is_the_root_of_the_length() -> None:
    assert RoutingTransformerAttention(1, 8, length=1024).clusters == 32
    module = RoutingTransformerAttention(1, 8, length=1024)
    assert module.pairs(*inputs(1024, heads=1)[:2], causal=True) == pytest.approx(1 / 32)


def test_padding_takes_no_place_in_a_cluster() -> None:
    query, key, value = inputs(30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 10:20] = False
    for strict in (False, True):
        module = RoutingTransformerAttention(2, 8, 4, 9, strict=strict).double().eval()
        out = module(query, key, value, causal=True, mask=KeyPadding(valid))
        noise = torch.where(valid[:, None, :, None], key, 50.0)
        torch.testing.assert_close(module(query, noise, value, causal=True, mask=KeyPadding(valid)), out)


def test_errors_teach() -> None:
    with pytest.raises(OptionError):
        OnlineKMeans(1, 8, 0)
    with pytest.raises(OptionError):
        RoutingTransformerAttention(1, 8, window=0)
    with pytest.raises(OptionError):
        RoutingAttention(32, 4, 5)
    with pytest.raises(ShapeError):
        routing_attention(*inputs(10), centroids(4, heads=3), 5)
