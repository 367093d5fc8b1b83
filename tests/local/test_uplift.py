"""The Local Attender against padding and shifting by hand, its guarantees, and the upsampler around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import registry, use_backend
from regard.errors import OptionError, ShapeError
from regard.local.uplift import LocalAttender, neighbour_offsets
from regard.models.uplift import ConvBlock, UPLiFT, uplift_loss

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
SETS = [5, 9, 13, 17, 25]


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(factor: int = 2, size: tuple[int, int] = (5, 7), batch: int = 2, guide: int = 6) -> tuple[Tensor, Tensor]:
    fine = (factor * size[0], factor * size[1])
    return 2 * maps(batch, guide, *fine, seed=1), maps(batch, 4, *size, seed=2)


def attender(**options: Any) -> LocalAttender:
    torch.manual_seed(3)
    return LocalAttender(6, **options).double()


def by_hand(made: LocalAttender, guide: Tensor, value: Tensor) -> Tensor:
    """Replicate, shift, repeat each pixel, and add with weights from the formula."""
    n, factor = len(made.offsets), guide.shape[2] // value.shape[2]
    logits = torch.einsum("nc,bchw->bnhw", made.conv.weight[..., 0, 0], guide) + made.conv.bias[:, None, None]
    if made.conv_residual:
        shared = min(n, guide.shape[1])
        logits = torch.cat((logits[:, :shared] + guide[:, :shared], logits[:, shared:]), 1)
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    padded, out = F.pad(value, (2, 2, 2, 2), mode="replicate"), 0
    for slot, (down, right) in enumerate(made.offsets):
        moved = padded[:, :, 2 + down : 2 + down + value.shape[2], 2 + right : 2 + right + value.shape[3]]
        out = out + shares[:, slot : slot + 1] * moved.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return out


@pytest.mark.parametrize("neighbours", SETS)
@pytest.mark.parametrize(("factor", "size"), [(1, (5, 7)), (2, (5, 7)), (3, (1, 1)), (4, (2, 3))])
@pytest.mark.parametrize("residual", [False, True])
def test_formula(neighbours, factor, size, residual) -> None:
    made, (guide, value) = attender(neighbours=neighbours, conv_residual=residual), pair(factor, size)
    torch.testing.assert_close(made(guide, value), by_hand(made, guide, value), **TIGHT)


def test_neighbour_sets() -> None:
    """Pictures of the sets, the pixel itself in the middle."""
    pictures = {
        5: "..... ..x.. .xxx. ..x.. .....",
        9: "..... .xxx. .xxx. .xxx. .....",
        13: "..x.. .xxx. xxxxx .xxx. ..x..",
        17: "x.x.x .xxx. xxxxx .xxx. x.x.x",
        25: "xxxxx xxxxx xxxxx xxxxx xxxxx",
    }
    for count, picture in pictures.items():
        drawn = [(r - 2, c - 2) for r, row in enumerate(picture.split()) for c, cell in enumerate(row) if cell == "x"]
        assert list(neighbour_offsets(count)) == drawn and len(drawn) == count


@pytest.mark.paper("uplift")
@pytest.mark.parametrize("neighbours", SETS)
def test_output_lies_within_its_neighbourhood(neighbours: int) -> None:
    made, (guide, value) = attender(neighbours=neighbours), pair(3)
    out = made(guide, value)
    padded = F.pad(value, (2, 2, 2, 2), mode="replicate")
    around = torch.stack([padded[:, :, 2 + y : 7 + y, 2 + x : 9 + x] for y, x in made.offsets])
    low, high = (t.repeat_interleave(3, 2).repeat_interleave(3, 3) for t in (around.amin(0), around.amax(0)))
    assert (out >= low - 1e-12).all() and (out <= high + 1e-12).all()
    constant = torch.full_like(value, 3.7)
    torch.testing.assert_close(made(guide, constant), torch.full_like(out, 3.7), **TIGHT)


@pytest.mark.paper("uplift")
@pytest.mark.parametrize("neighbours", SETS)
def test_weights_sum_to_one_and_modes_agree(neighbours: int) -> None:
    made, (guide, value) = attender(neighbours=neighbours), pair()
    frugal = copy.deepcopy(made)
    frugal.low_mem = True
    total = made.weights(guide).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), **TIGHT)
    results = []
    for module, backend in ((frugal, "auto"), (made, "auto"), (made, "reference"), (made, "gemm")):
        inputs = [t.clone().requires_grad_() for t in (guide, value)]
        with use_backend(backend):
            out = module(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("uplift")
@pytest.mark.parametrize("neighbours", SETS)
def test_the_centre_alone_is_nearest_neighbour(neighbours: int) -> None:
    made, (guide, value) = attender(neighbours=neighbours, conv_residual=False), pair(3)
    with torch.no_grad():
        made.conv.weight.zero_()
        made.conv.bias.zero_()
        made.conv.bias[made.offsets.index((0, 0))] = 1000
    torch.testing.assert_close(made(guide, value), F.interpolate(value, scale_factor=3), rtol=0, atol=0)


@pytest.mark.paper("uplift")
def test_channels_are_mixed_in_place_alone() -> None:
    made, (guide, value) = attender(), pair()
    out, order = made(guide, value), torch.tensor([2, 0, 3, 1])
    assert torch.equal(made(guide, value[:, order]), out[:, order])
    torch.testing.assert_close(made(guide, value[:, 1:2]), out[:, 1:2], **TIGHT)
    changed = value.clone()
    changed[:, 0] += 1
    assert torch.equal(made(guide, changed)[:, 1:], out[:, 1:])


@pytest.mark.paper("uplift")
def test_preset_sizes() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UPLiFT.preset("dinov2-s14").parameters()) == 789_521
        latents = UPLiFT.preset("vae")
    assert latents.feature_channels == 4 and latents.pixels == 8
    assert not any(isinstance(m, nn.BatchNorm2d) for m in latents.modules())
    assert sum(isinstance(m, ConvBlock) for m in latents.refiner) == 12  # type: ignore[union-attr]


def small(**options: Any) -> UPLiFT:
    torch.manual_seed(4)
    settings = {"patch": 4, "widths": (4, 6, 8), "width": 18, **options}
    return UPLiFT(5, **settings).double().eval()


class _Counted(nn.Module):
    """A block that remembers the sizes of the maps it saw."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.seen = block, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape[2:]))
        out: Tensor = self.block(x)
        return out


@pytest.mark.paper("uplift")
@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_the_encoder_runs_once(iters: int, shared: bool) -> None:
    model = small(shared_encoder=shared)
    model.encoder[0] = counted = _Counted(model.encoder[0])
    model(maps(1, 3, 16, 12), maps(1, 5, 4, 3), iters=iters)
    assert counted.seen == ([(16, 12)] if shared else [(16 << i, 12 << i) for i in range(iters)])


def test_one_iteration_is_its_formula() -> None:
    model = small(patch=14)
    image, features = maps(2, 3, 28, 42), maps(2, 5, 2, 3)
    x = F.interpolate(image, (32, 48), mode="bilinear")
    levels = []
    for block, channels in zip(model.encoder, (4, 6, 8), strict=True):
        out = block.layers(x)
        x = out + torch.cat((x, torch.zeros_like(out[:, x.shape[1] :])), 1)
        assert x.shape[1] == channels
        levels.append(x)
    # Nearest neighbours: each cell takes the pixel at its upper left.
    joined = torch.cat((features, levels[2][:, :, ::16, ::16]), 1)
    y = model.reduce.layers(joined) + torch.cat((joined, joined.new_zeros(2, 5, 2, 3)), 1)
    y = model.enlarge(y) + F.interpolate(y, scale_factor=2, mode="bilinear")
    joined = torch.cat((y, levels[1][:, :, ::8, ::8]), 1)
    guide = model.guide.layers(joined) + joined[:, :18]
    expected = by_hand(model.attender, guide, features)
    torch.testing.assert_close(model(image, features), expected, **TIGHT)


def test_iterations_sizes_and_steps() -> None:
    model, image, features = small(), maps(1, 3, 17, 30), maps(1, 5, 4, 7)
    steps = model(image, features, iters=2, out_size=(17, 30), return_steps=True)
    assert [tuple(s.shape[2:]) for s in steps] == [(8, 14), (17, 30)]
    assert torch.equal(model(image, features), steps[0])
    twice = model(image, steps[0])
    torch.testing.assert_close(F.interpolate(twice, (17, 30), mode="bilinear"), steps[1], **TIGHT)
    assert (twice <= features.amax()).all() and (twice >= features.amin()).all()
    for patch, pixels in ((14, 16), (16, 16), (8, 8), (1, 1)):
        assert small(patch=patch).pixels == pixels


def test_noise_refiner_and_plain_head() -> None:
    image, features = maps(1, 3, 16, 16), maps(1, 5, 4, 4)
    noisy = small(noise_channels=2, norm="layer")
    assert not torch.equal(noisy(image, features), noisy(image, features))
    refined, plain = small(refiner=2), small()
    plain.load_state_dict({k: v for k, v in refined.state_dict().items() if not k.startswith("refiner")})
    assert torch.equal(refined(image, features), plain(image, features))
    nn.init.ones_(refined.refiner[-1].weight)
    assert not torch.equal(refined(image, features), plain(image, features))
    head = small(attender=False)
    assert head(image, features).shape == (1, 5, 8, 8) and head.attender is None


def test_loss_is_the_sum_over_depths_and_steps() -> None:
    model, images = small(), maps(2, 3, 32, 16)
    extractor = nn.Conv2d(3, 5, 4, stride=4).double()
    views = [images] + [F.interpolate(images, (32 >> d, 16 >> d), mode="bilinear", antialias=True) for d in (1, 2)]
    truth = [extractor(view).detach() for view in views]
    one = (model(views[1], truth[1]) - truth[0]).square().mean()
    first = model(views[2], truth[2])
    second = model(views[2], truth[2], iters=2)
    two = (first - truth[1]).square().mean() + (second - truth[0]).square().mean()
    loss = uplift_loss(model, extractor, images, depths=2)
    torch.testing.assert_close(loss, one + two, **TIGHT)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and extractor.weight.grad is None
    with pytest.raises(ShapeError, match=r"multiples of 2\^2 patches"):
        uplift_loss(model, extractor, maps(1, 3, 20, 16), depths=2)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model, extractor = small().float().train(), nn.Conv2d(3, 5, 4, stride=4)
    images = F.interpolate(torch.randn(4, 3, 6, 6), (32, 32), mode="bicubic")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = uplift_loss(model, extractor, images, depths=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_gradient() -> None:
    for neighbours in (9, 17):
        made = attender(neighbours=neighbours)
        inputs = [t.requires_grad_() for t in pair(2, (3, 4))]
        names = [name for name, _ in made.named_parameters()]

        def run(guide: Tensor, value: Tensor, *tensors: Tensor, made=made, names=names) -> Tensor:
            out: Tensor = torch.func.functional_call(made, dict(zip(names, tensors, strict=True)), (guide, value))
            return out

        assert torch.autograd.gradcheck(run, (*inputs, *made.parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    made, inputs = attender().to(dtype), [t.to(dtype) for t in pair()]
    fine = copy.deepcopy(made).double()
    out, exact = made(*inputs), fine(*(t.double() for t in inputs))
    assert out.dtype == dtype
    assert float((out.double() - exact).detach().abs().max()) < 16 * torch.finfo(dtype).eps * float(
        exact.detach().abs().max()
    )


def test_batch_layout_and_determinism() -> None:
    made, (guide, value) = attender(), pair(batch=3)
    out = made(guide, value)
    for row in range(3):
        torch.testing.assert_close(made(guide[row : row + 1], value[row : row + 1]), out[row : row + 1], **TIGHT)
    views = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (guide, value)]
    torch.testing.assert_close(made(*views), out, **TIGHT)
    assert torch.equal(made(guide, value), out)
    other = LocalAttender(6).double()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(guide, value), out)
    torch.testing.assert_close(torch.compile(made, backend="eager", dynamic=False)(guide, value), out, **TIGHT)


def test_huge_logits_stay_finite() -> None:
    made = attender().float()
    guide, value = ((1e4 * t.float()).requires_grad_() for t in pair())
    out = made(guide, value)
    out.sum().backward()
    assert out.isfinite().all() and guide.grad.isfinite().all() and value.grad.isfinite().all()


def test_registered_by_name() -> None:
    made = registry.create("uplift", guide_channels=6, neighbours=9)
    assert isinstance(made, LocalAttender)
    assert "17" in repr(attender())


def test_errors_teach() -> None:
    guide, value = pair()
    with pytest.raises(OptionError, match="5, 9, 13, 17, 25"):
        LocalAttender(6, neighbours=7)
    with pytest.raises(ShapeError, match="whole number"):
        attender()(guide[:, :, :-1], value)
    with pytest.raises(ShapeError, match="whole number"):
        attender()(F.interpolate(guide, (10, 21)), value)
    with pytest.raises(ShapeError, match=r"\(batch, 6, height, width\)"):
        attender()(guide[:, :5], value)
    with pytest.raises(OptionError, match="preset"):
        UPLiFT.preset("dinov3")
    with pytest.raises(OptionError, match="norm"):
        small(norm="group")
    with pytest.raises(OptionError, match="two widths"):
        small(widths=(4,))
    with pytest.raises(ShapeError, match="transpose"):
        small()(maps(1, 3, 16, 16), maps(1, 16, 5))
    with pytest.raises(ShapeError, match="iteration"):
        small()(maps(1, 3, 16, 16), maps(1, 5, 4, 4), iters=0)
    with pytest.raises(OptionError, match="depths"):
        uplift_loss(small(), nn.Identity(), maps(1, 3, 16, 16), depths=0)
