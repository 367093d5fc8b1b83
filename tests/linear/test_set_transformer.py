from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.set_tasks import (
    SHAPES,
    AmortisedClustering,
    MaxRegression,
    PointClouds,
    SetAnomaly,
    UniqueCounting,
)
from regard.errors import OptionError, ShapeError
from regard.kernels.backends import use_backend
from regard.layers.attention_stats import numerical_rank
from regard.linear.set_transformer import ISAB, MAB, PMA, SAB
from regard.masks import KeyPadding
from regard.models.set_transformer import DeepSet, SetTransformer

EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def by_hand(block: MAB, x: Tensor, y: Tensor, scale: float) -> Tensor:
    """One set, head by head and row by row, from the formula."""
    query, key, value = (F.linear(t, p.weight, p.bias) for p, t in ((block.query, x), (block.key, y), (block.value, y)))
    width = query.shape[-1] // block.num_heads
    hidden = query.clone()
    for row in range(len(x)):
        for head in range(block.num_heads):
            part = slice(head * width, (head + 1) * width)
            logits = torch.stack([query[row, part] @ key[other, part] * scale for other in range(len(y))])
            hidden[row, part] += (logits.softmax(0)[:, None] * value[:, part]).sum(0)
    hidden = block.attention_norm(hidden)
    fed = torch.relu(F.linear(hidden, block.feed_forward.weight, block.feed_forward.bias))
    out: Tensor = block.norm(hidden + fed)
    return out


@pytest.mark.paper("set_transformer")
@pytest.mark.parametrize(("layer_norm", "scale", "divisor"), [(False, "full", 12), (True, "head", 4)])
def test_block_is_the_formula(layer_norm: bool, scale: str, divisor: int) -> None:
    block = MAB(5, 7, 12, 3, layer_norm, scale).double()
    x, y = draw(2, 6, 5), draw(2, 9, 7)
    expected = torch.stack([by_hand(block, x[i], y[i], divisor**-0.5) for i in range(2)])
    torch.testing.assert_close(block(x, y), expected, **EXACT)


@pytest.mark.paper("set_transformer")
def test_blocks_are_made_of_one() -> None:
    x = draw(2, 9, 8)
    sab, isab, pma = (m.double() for m in (SAB(8, 2), ISAB(8, 2, 4), PMA(8, 2, 3, feed_forward=True)))
    torch.testing.assert_close(sab(x), sab.attention(x, x))
    read = isab.gather(isab.points.expand(2, -1, -1), x)
    torch.testing.assert_close(isab(x), isab.spread(x, read))
    first = pma.feed_forward[0]
    fed = torch.relu(F.linear(x, first.weight, first.bias))
    torch.testing.assert_close(pma(x), pma.attention(pma.seeds.expand(2, -1, -1), fed))


@pytest.mark.paper("set_transformer")
@pytest.mark.parametrize("build", [lambda: SAB(8, 2, 3), lambda: ISAB(8, 2, 4, 3)], ids=["SAB", "ISAB"])
def test_equivariance(build: type[SAB]) -> None:
    block, x, order = build().double(), draw(2, 9, 3), torch.randperm(9)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], **EXACT)


@pytest.mark.paper("set_transformer")
@pytest.mark.parametrize(
    "build",
    [
        lambda: PMA(3, 1, 4),
        lambda: SetTransformer(3, 2, 5, 4, 8, 2),
        lambda: SetTransformer(3, 2, 5, None, 8, 2, True),
        *(lambda pool=pool: DeepSet(3, 2, 5, pool, 8) for pool in ("mean", "sum", "max", "dot")),
    ],
)
def test_invariance(build: type[nn.Module]) -> None:
    model, x = build().double(), draw(2, 9, 3)
    torch.testing.assert_close(model(x[:, torch.randperm(9)]), model(x), **EXACT)
    assert not torch.allclose(model(x[:, :8]), model(x)), "the model reads the set at all"


@pytest.mark.paper("set_transformer")
@pytest.mark.parametrize(
    "build",
    [
        lambda: SetTransformer(3, 2, 5, 4, 8, 2),
        lambda: SetTransformer(3, 2, 5, None, 8, 2),
        *(lambda pool=pool: DeepSet(3, 2, 5, pool, 8) for pool in ("mean", "sum", "max", "dot")),
    ],
)
def test_padding_changes_nothing(build: type[nn.Module]) -> None:
    model, x = build().double(), draw(2, 9, 3)
    padded = torch.cat((x, 50 * draw(2, 4, 3)), 1)
    real = (torch.arange(13) < 9).expand(2, -1)
    for mask in (real, KeyPadding(real)):
        torch.testing.assert_close(model(padded, mask=mask), model(x), **EXACT)
    # Sets of different sizes in one batch.
    sizes = torch.arange(13) < torch.tensor([[9], [5]])
    torch.testing.assert_close(model(padded, mask=sizes)[1:], model(x[1:, :5]), **EXACT)
    with pytest.raises(ShapeError):
        model(padded, mask=real.float())


@pytest.mark.paper("set_transformer")
def test_padding_leaves_the_elements_as_they_are() -> None:
    x, real = draw(2, 9, 8), (torch.arange(13) < 9).expand(2, -1)
    padded = torch.cat((x, draw(2, 4, 8)), 1)
    for block in (SAB(8, 2).double(), ISAB(8, 2, 4).double()):
        torch.testing.assert_close(block(padded, mask=real)[:, :9], block(x), **EXACT)
    with pytest.raises(ShapeError):
        SAB(8, 2).double()(x, mask=real)


@pytest.mark.paper("set_transformer")
def test_pooling_without_keys_is_the_mean() -> None:
    pool, x = PMA(8, 2, 3).double(), draw(2, 9, 8)
    with torch.no_grad():
        pool.attention.key.weight.zero_()
    block = pool.attention
    mean = F.linear(x, block.value.weight, block.value.bias).mean(1, keepdim=True)
    hidden = F.linear(pool.seeds, block.query.weight, block.query.bias) + mean
    fed = torch.relu(F.linear(hidden, block.feed_forward.weight, block.feed_forward.bias))
    torch.testing.assert_close(pool(x), hidden + fed, **EXACT)


@pytest.mark.paper("set_transformer")
def test_cost_is_linear_with_inducing_points() -> None:
    sab, isab = SAB(64, 4), ISAB(64, 4, 16)
    for n in (1 << 12, 1 << 16):
        assert isab.multiply_adds(2 * n) / isab.multiply_adds(n) == pytest.approx(2, abs=0.01)
    assert isab.multiply_adds(300) - isab.multiply_adds(200) == isab.multiply_adds(200) - isab.multiply_adds(100)
    ratios = [sab.multiply_adds(2 * n) / sab.multiply_adds(n) for n in (64, 1024, 1 << 16)]
    assert ratios == sorted(ratios) and ratios[-1] == pytest.approx(4, abs=0.01)


@pytest.mark.paper("set_transformer")
@pytest.mark.parametrize("build", [lambda: SAB(32, 4, 8), lambda: ISAB(32, 4, 6, 8)], ids=["SAB", "ISAB"])
def test_counted_cost_is_that_of_the_call(build: type[SAB]) -> None:
    block, counter = build(), FlopCounterMode(display=False)
    with counter, use_backend("reference"):
        block(torch.randn(1, 50, 8))
    assert counter.get_total_flops() == 2 * block.multiply_adds(50)


@pytest.mark.paper("set_transformer")
def test_inducing_points_bound_the_rank() -> None:
    block, x = ISAB(12, 3, 5).double(), 3 * draw(2, 30, 12)
    weights = block.weights(x)
    assert weights.shape == (2, 3, 30, 30)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 30, dtype=torch.float64))
    assert int(numerical_rank(weights, 1e-12).max()) <= 5
    assert int(numerical_rank(SAB(12, 3).double().attention.weights(x, x), 1e-12).min()) > 5
    # With linear feed-forward parts left out, this is how the values of single elements arrive.
    hidden = block.spread.weights(x, block.summary(x))
    read = block.gather.weights(block.points.expand(2, -1, -1), x)
    torch.testing.assert_close(weights, torch.einsum("bhqm,bhmk->bhqk", hidden, read))


@pytest.mark.paper("set_transformer")
def test_seeds_are_outputs() -> None:
    pool, x = PMA(8, 2, 4).double(), draw(2, 9, 8)
    before, order = pool(x), torch.tensor([2, 0, 3, 1])
    assert before.shape == (2, 4, 8)
    with torch.no_grad():
        pool.seeds.copy_(pool.seeds[:, order])
    torch.testing.assert_close(pool(x), before[:, order], **EXACT)


@pytest.mark.paper("set_transformer")
def test_model_is_two_encoders_pooling_and_two_decoders() -> None:
    model = SetTransformer(3, 4, 5)
    assert [type(block) for block in model.encoder] == [ISAB, ISAB]
    assert isinstance(model.pool, PMA) and [type(block) for block in model.decoder] == [SAB, SAB]
    assert model(torch.randn(2, 20, 3)).shape == (2, 4, 5)
    limit = (6 / (32 * 128 + 128)) ** 0.5
    for block in model.encoder:
        assert isinstance(block, ISAB) and block.points.shape == (1, 32, 128)
        assert 0.95 * limit < float(block.points.detach().abs().max()) <= limit
    assert SetTransformer(3, None, 5)(torch.randn(2, 20, 3)).shape == (2, 20, 5)


def test_mistakes_are_named() -> None:
    for wrong in (lambda: SAB(10, 3), lambda: MAB(4, 4, 4, 2, scale="none"), lambda: ISAB(8, 2, 0)):
        with pytest.raises(OptionError):
            wrong()
    with pytest.raises(OptionError):
        DeepSet(3, 1, 1, "median")
    with pytest.raises(ShapeError):
        SAB(8, 2)(torch.randn(2, 5, 7))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.paper("set_transformer")
def test_max_regression() -> None:
    task, sizes = MaxRegression(), set()
    for seed in range(40):
        values, most = task.batch(8, generator(seed))
        sizes.add(values.shape[1])
        assert torch.equal(values.max(1).values, most[:, 0]) and 0 <= float(values.min()) <= float(values.max()) <= 100
    assert sizes == set(range(1, 11))
    assert task.score(most + 2, most) == (16.0, 8)


@pytest.mark.paper("set_transformer")
def test_unique_counting() -> None:
    task = UniqueCounting(noise=0.0)
    samples, counts = task.batch(64, generator())
    for row, count in zip(samples, counts.flatten(), strict=True):
        assert len(row.unique(dim=0)) == int(count)
    assert int(counts.max()) == samples.shape[1] and int(counts.min()) == 1
    logs = (counts + 0.5).log()
    assert task.score(logs, counts) == (64.0, 64)
    exact = -torch.distributions.Poisson(logs.exp()).log_prob(counts).mean()
    torch.testing.assert_close(task.loss(logs, counts), exact)
    kinds = torch.cat((task.kinds["train"], task.kinds["test"]))
    assert len(kinds.unique(dim=0)) == len(kinds)


@pytest.mark.paper("set_transformer")
def test_clustering_likelihood_is_that_of_the_library() -> None:
    task = AmortisedClustering(components=3)
    points, targets = task.batch(4, generator())
    true = targets[:, :3]
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(true[..., 0]),
        torch.distributions.Independent(torch.distributions.Normal(true[..., 1:3], true[..., 3:]), 1),
    )
    expected = mixture.log_prob(points.transpose(0, 1)).mean(0)
    torch.testing.assert_close(task.best(targets), expected)
    raw = torch.cat((true[..., :1].log(), true[..., 1:3], true[..., 3:].expm1().log()), -1)
    torch.testing.assert_close(task.loss(raw, targets), -expected.mean())


@pytest.mark.paper("set_transformer")
def test_anomaly() -> None:
    task = SetAnomaly(noise=0.0)
    elements, odd = task.batch(32, generator())
    signs = (elements @ task.rotation.T).round()
    for row, place in zip(signs, odd.tolist(), strict=True):
        others = torch.cat((row[:place], row[place + 1 :]))
        assert int(((others == 1).all(0) & (row[place] == -1)).sum()) >= 2
    outputs = F.one_hot(odd, 8)[..., None].float()
    assert task.score(outputs, odd) == (32.0, 32)


@pytest.mark.paper("set_transformer")
def test_point_clouds() -> None:
    clouds, shape = PointClouds(400, noise=0.0).batch(96, generator())
    torch.testing.assert_close(clouds.mean(1), torch.zeros(96, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(clouds.flatten(1).std(1), torch.ones(96))
    spread = torch.linalg.svdvals(clouds)
    name = [SHAPES[int(i)] for i in shape]
    for row, kind in enumerate(name):
        if kind == "sphere":
            radius = torch.linalg.vector_norm(clouds[row] - clouds[row].mean(0), dim=-1)
            assert float(radius.std()) < 0.15
        assert (float(spread[row, 2]) < 1e-3) == (kind == "disc")
    assert len(set(name)) == len(SHAPES)


@pytest.mark.paper("set_transformer")
@pytest.mark.parametrize(
    "task", [MaxRegression(), UniqueCounting(), AmortisedClustering(2, 20, 30), SetAnomaly(), PointClouds(30)]
)
def test_every_task_can_be_learned(task: MaxRegression) -> None:
    """A model that reads the tasks' inputs fits one batch."""
    model = SetTransformer(task.input_dim, task.num_outputs, task.num_classes, 4, 32, 2, decoder_depth=1)
    inputs, targets = task.batch(16, generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = task.loss(model(inputs), targets)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    floor = -float(task.best(targets).mean()) if isinstance(task, AmortisedClustering) else 0
    assert losses[-1] - floor < 0.7 * (losses[0] - floor)
    assert task.score(model(inputs).detach(), targets)[1] == 16
