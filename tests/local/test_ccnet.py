"""Criss-cross attention against dense attention under a cross, its dependencies and limits; its loss against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.losses import category_consistent_loss
from regard.local.axes import axis_attention, axis_mask, axis_transport, axis_weights
from regard.local.ccnet import CrissCrossAttention, NonLocalBlock2d, RecurrentCrissCross
from regard.models.ccnet import RCCAHead

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
SPACES = [(4, 6), (5, 5), (1, 7), (7, 1), (2, 3, 4)]


def lively(module: nn.Module) -> nn.Module:
    """With a gate that is open and queries that prefer some keys."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def maps(*space: int, channels: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *space, dtype=torch.float64)


def cross(space: tuple[int, ...]) -> Tensor:
    """Pairs of places that differ in at most one coordinate, by loops."""
    places = list(itertools.product(*(range(n) for n in space)))
    return torch.tensor([[sum(a != b for a, b in zip(u, p, strict=True)) <= 1 for p in places] for u in places])


@pytest.mark.paper("ccnet")
@pytest.mark.parametrize("space", SPACES)
def test_identity_at_initialisation(space) -> None:
    x = maps(*space)
    for module in (CrissCrossAttention(8), RecurrentCrissCross(8)):
        assert torch.equal(module.double()(x), x)


@pytest.mark.paper("ccnet")
@pytest.mark.parametrize("space", SPACES)
def test_a_row_of_attention_covers_the_cross_once(space) -> None:
    module, x = lively(CrissCrossAttention(8)), maps(*space, batch=1)
    query, key = (part(x.flatten(2))[0].T for part in (module.query, module.key))
    seen = cross(space)
    assert seen.sum(1).eq(sum(space) - len(space) + 1).all()
    for index, position in enumerate(itertools.product(*(range(n) for n in space))):
        weights = module.attention_map(x, position)[0].flatten()
        assert torch.equal(weights > 0, seen[index])
        torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64), **TIGHT)
        logits = (key @ query[index])[seen[index]]
        torch.testing.assert_close(weights[seen[index]], logits.exp() / logits.exp().sum(), **TIGHT)


@pytest.mark.paper("ccnet")
def test_one_pass_reaches_the_cross_and_two_the_map() -> None:
    space, u = (5, 6), (1, 4)
    for passes in (1, 2):
        module = lively(RecurrentCrissCross(8, recurrence=passes, reduction=2))
        x = maps(*space, batch=1).requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0, :, u[0], u[1]].sum(), x)
        reached = grad[0].abs().sum(0) > 0
        expected = cross(space)[u[0] * 6 + u[1]].view(space) if passes == 1 else torch.ones(space, dtype=torch.bool)
        assert torch.equal(reached, expected)


@pytest.mark.paper("ccnet")
@pytest.mark.parametrize("space", SPACES)
def test_equals_dense_attention_under_the_cross(space) -> None:
    module, x = lively(CrissCrossAttention(8, reduction=2)), maps(*space)
    query, key, value = (part(x.flatten(2)).transpose(1, 2) for part in (module.query, module.key, module.value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=cross(space), scale=1.0)
    torch.testing.assert_close(module(x), x + module.gamma * attended.transpose(1, 2).view(x.shape), **TIGHT)


@pytest.mark.paper("ccnet")
@pytest.mark.parametrize("space", [(1, 9), (9, 1)])
def test_on_a_line_it_is_the_non_local_block(space) -> None:
    module, dense = lively(CrissCrossAttention(8, reduction=2)), NonLocalBlock2d(8, reduction=2).double()
    dense.load_state_dict(module.state_dict())
    x = maps(*space)
    torch.testing.assert_close(module(x), dense(x), **TIGHT)
    square = maps(3, 3)
    assert not torch.allclose(module(square), dense(square))


def test_non_local_block_written_out() -> None:
    dense, x = lively(NonLocalBlock2d(8, reduction=2)), maps(3, 4)
    query, key, value = (part(x.flatten(2)) for part in (dense.query, dense.key, dense.value))
    attended = value @ torch.einsum("bcu,bcp->bup", query, key).softmax(-1).transpose(1, 2)
    torch.testing.assert_close(dense(x), x + dense.gamma * attended.view(x.shape), **TIGHT)


@pytest.mark.parametrize("space", [(6,), (4, 5), (2, 3, 4), (2, 2, 3, 2)])
def test_axis_attention_for_any_number_of_axes(space) -> None:
    axes = [
        torch.randn(2, heads, *space, dim, dtype=torch.float64, requires_grad=True)
        for heads, dim in ((4, 3), (2, 3), (2, 5))
    ]
    flat = [t.detach().flatten(2, -2).requires_grad_() for t in axes]
    expected = F.scaled_dot_product_attention(*flat, attn_mask=cross(space), enable_gqa=True)
    actual = axis_attention(*axes)
    torch.testing.assert_close(actual.flatten(2, -2), expected, **TIGHT)
    seed = torch.randn_like(expected)
    for grad, wanted in zip(
        torch.autograd.grad(actual, axes, seed.view_as(actual)), torch.autograd.grad(expected, flat, seed), strict=True
    ):
        torch.testing.assert_close(grad.flatten(2, -2), wanted, **TIGHT)
    assert torch.equal(axis_mask(space), cross(space))
    assert axis_weights(axes[0], axes[1]).shape == (2, 4, *space, sum(space))


def test_what_several_passes_transport_is_the_product_of_their_matrices() -> None:
    module, x, space = lively(RecurrentCrissCross(8, recurrence=3, reduction=2)), maps(3, 4), (3, 4)
    matrix, y = torch.eye(12, dtype=torch.float64), x
    for _ in range(3):
        query, key = (part(y.flatten(2)) for part in (module.attention.query, module.attention.key))
        logits = torch.einsum("bcu,bcp->bup", query, key).masked_fill(~cross(space), float("-inf"))
        matrix, y = logits.softmax(-1) @ matrix, module.attention(y)
    for index, position in enumerate(itertools.product(range(3), range(4))):
        torch.testing.assert_close(module.attention_map(x, position).flatten(1), matrix[:, index], **TIGHT)


def by_loops(features: Tensor, labels: Tensor, delta_v: float, delta_d: float) -> tuple[float, float, float]:
    pixels: dict[int, list[Tensor]] = {}
    for b, i, j in itertools.product(*(range(n) for n in labels.shape)):
        label = int(labels[b, i, j])
        if label != 255:
            pixels.setdefault(label, []).append(features[b, :, i, j])
    means = {c: torch.stack(p).mean(0) for c, p in pixels.items()}
    spread = []
    for c, members in pixels.items():
        own = []
        for h in members:
            d = float((h - means[c]).norm())
            own.append(
                0 if d <= delta_v else (d - delta_v) ** 2 if d <= delta_d else d - delta_d + (delta_d - delta_v) ** 2
            )
        spread.append(sum(own) / len(own))
    pairs = [max(0.0, 2 * delta_d - float((means[a] - means[b]).norm())) ** 2 for a in means for b in means if a != b]
    return sum(spread) / len(spread), sum(pairs) / len(pairs), sum(float(m.norm()) for m in means.values()) / len(means)


def test_loss_against_loops() -> None:
    features, labels = maps(4, 5, channels=3), torch.randint(3, (2, 4, 5))
    labels[labels == 2] = 7
    labels[0, 0] = 255
    var, dis, reg = by_loops(features, labels, 0.5, 1.5)
    loss = category_consistent_loss(features, labels, alpha=2.0, beta=0.7, gamma=0.1)
    torch.testing.assert_close(float(loss), 2 * var + 0.7 * dis + 0.1 * reg, **TIGHT)
    assert torch.autograd.gradcheck(lambda f: category_consistent_loss(f, labels), (features.requires_grad_(),))


@pytest.mark.paper("ccnet")
def test_loss_is_zero_for_tight_and_distant_classes() -> None:
    labels = torch.tensor([[[0, 0, 1, 1], [2, 2, 255, 255]]])
    means = torch.tensor([[0.0, 0, 0], [3.0, 0, 0], [0, 3.0, 0]], dtype=torch.float64)
    features = means[labels.clamp_max(2)].movedim(-1, 1) + 0
    features[:, 2, :, 0], features[:, 2, :, 1] = 0.5, -0.5  # at most delta_v from the mean, on either side
    features[:, 2, 0, 2], features[:, 2, 0, 3] = 0.5, -0.5
    features[:, :, 1, 2:] = 100.0
    assert float(category_consistent_loss(features, labels, gamma=0.0)) == 0
    assert float(category_consistent_loss(features, labels)) > 0
    assert float(category_consistent_loss(0.9 * features, labels, gamma=0.0)) > 0
    features[:, 2] *= 1.1
    assert float(category_consistent_loss(features, labels, gamma=0.0)) > 0


def test_loss_with_one_class_or_none() -> None:
    features = maps(2, 2, channels=3).requires_grad_()
    for labels in (torch.full((2, 2, 2), 255), torch.zeros(2, 2, 2, dtype=torch.int64)):
        loss = category_consistent_loss(features, labels)
        (grad,) = torch.autograd.grad(loss, features)
        assert bool(loss.isfinite()) and bool(grad.isfinite().all())
    with pytest.raises(ShapeError, match="nearest"):
        category_consistent_loss(features, torch.zeros(2, 4, 4, dtype=torch.int64))
    with pytest.raises(OptionError, match="delta"):
        category_consistent_loss(features, torch.zeros(2, 2, 2), delta_v=2.0)


def test_head() -> None:
    head = RCCAHead(64, 24, 5)
    x = torch.randn(2, 64, 7, 9)
    assert head(x).shape == (2, 5, 7, 9)
    head(x).sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert head.attention.recurrence == 2
    with torch.device("meta"):
        released = RCCAHead(2048, 512, 19)
    attention = 2 * (512 * 64 + 64) + 512 * 512 + 512 + 1
    convolutions = 9 * (2048 * 512 + 512 * 512 + 2560 * 512) + 3 * 2 * 512
    assert sum(p.numel() for p in released.parameters()) == attention + convolutions + 512 * 19 + 19
    again = RCCAHead(64, 24, 5, recurrence=1)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in head.parameters())


def test_bad_input_teaches() -> None:
    with pytest.raises(OptionError, match="reduction"):
        CrissCrossAttention(4)
    with pytest.raises(OptionError, match="recurrence"):
        RecurrentCrissCross(8, recurrence=0)
    with pytest.raises(OptionError, match="in_channels"):
        RCCAHead(16, 8, 2)
    with pytest.raises(ShapeError, match="CrissCrossAttention takes"):
        CrissCrossAttention(8)(torch.randn(1, 8, 5))
    with pytest.raises(ShapeError, match="position"):
        CrissCrossAttention(8).attention_map(torch.randn(1, 8, 5, 5), (5, 0))
    with pytest.raises(ShapeError, match="one space"):
        axis_attention(torch.randn(1, 1, 2, 3, 4), torch.randn(1, 1, 3, 2, 4), torch.randn(1, 1, 3, 2, 4))
    with pytest.raises(ShapeError, match="one space"):
        axis_attention(torch.randn(1, 1, 2, 3, 4), torch.randn(1, 1, 2, 3, 4), torch.randn(1, 1, 3, 2, 4))
    with pytest.raises(ShapeError, match="mass"):
        axis_transport(torch.rand(1, 1, 2, 3, 5), torch.rand(1, 1, 3, 2))
