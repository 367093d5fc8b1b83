"""CBAM against its formula, Squeeze-and-Excitation, its invariances, and the parameter totals of ResNet-50."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.feature.cbam import CBAM, ChannelGate, SpatialGate, attach


def maps(*space: int, channels: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *(space or (5, 7)), generator=generator, dtype=torch.float64)


def module(**options: Any) -> CBAM:
    """Trained, as it were: biases and running statistics are not at their start."""
    torch.manual_seed(0)
    made = CBAM(8, **{"reduction": 2, "kernel_size": 3, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
        if made.spatial is not None:
            made.spatial.norm.running_mean.fill_(0.3)
            made.spatial.norm.running_var.fill_(2.0)
    return made.eval()


def perceptron(gate: ChannelGate, v: Tensor) -> Tensor:
    first, second = gate.mlp[0], gate.mlp[2]
    return (v @ first.weight.T + first.bias).clamp_min(0) @ second.weight.T + second.bias


@pytest.mark.paper("cbam")
def test_average_pool_alone_is_squeeze_and_excitation() -> None:
    made, x = module(pools=("avg",), use_spatial=False), maps()
    squeeze = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
    ).double()
    state = made.channel.state_dict()
    squeeze[1].load_state_dict({"weight": state["mlp.0.weight"][..., None, None], "bias": state["mlp.0.bias"]})
    squeeze[3].load_state_dict({"weight": state["mlp.2.weight"][..., None, None], "bias": state["mlp.2.bias"]})
    torch.testing.assert_close(made(x), x * squeeze(x))
    assert made(x, return_gates=True)[2] is None


@pytest.mark.paper("cbam")
def test_gates_do_not_see_permutations() -> None:
    made, x = module(), maps()
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(made.channel(shuffled), made.channel(x))
    torch.testing.assert_close(made.spatial(x[:, torch.randperm(8)]), made.spatial(x))  # type: ignore[misc]
    assert made.channel(x).shape == (2, 8, 1, 1)
    assert made.spatial(x).shape == (2, 1, 5, 7)  # type: ignore[misc]
    # And they do see what they are for.
    assert float((made.channel(x[:, torch.arange(8).flip(0)]) - made.channel(x)).abs().max()) > 1e-3
    assert float((made.spatial(shuffled) - made.spatial(x)).abs().max()) > 1e-3  # type: ignore[misc]


@pytest.mark.paper("cbam")
@pytest.mark.parametrize("order", ["channel-first", "spatial-first", "parallel"])
@pytest.mark.parametrize("space", [(9,), (5, 7), (3, 4, 5)], ids=["1-d", "2-d", "3-d"])
def test_zero_weights_quarter_the_input(space: tuple[int, ...], order: str) -> None:
    made = CBAM(8, 2, order=order, dims=len(space)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.channel.mlp[2].weight.zero_()
        made.channel.mlp[2].bias.zero_()
        made.spatial.convolution.weight.zero_()  # type: ignore[union-attr]
    x = maps(*space)
    torch.testing.assert_close(made(x), x / 4)
    torch.testing.assert_close(made.eval()(x), x / 4)


@pytest.mark.paper("cbam")
@pytest.mark.parametrize(
    ("factory", "total"),
    [
        (None, 25_557_032),
        (lambda c: CBAM(c, pools=("avg",), use_spatial=False), 28_088_024),
        (CBAM, 28_089_624),
    ],
    ids=["plain", "se", "cbam"],
)
def test_parameters_of_resnet_50(factory: Any, total: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(depths=[3, 4, 6, 3], layer_type="bottleneck", num_labels=1000)
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(config)
        if factory is not None:
            assert attach(model, factory) == 16
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.paper("cbam")
def test_a_spatially_constant_map() -> None:
    made = module()
    v = torch.randn(2, 8, dtype=torch.float64)
    gate = made.channel(v[..., None, None].expand(-1, -1, 4, 3))
    torch.testing.assert_close(gate[..., 0, 0], (2 * perceptron(made.channel, v)).sigmoid())


def by_the_formula(made: CBAM, x: Tensor) -> Tensor:
    """Both gates written out, the convolution as a loop over its window."""
    mc = (perceptron(made.channel, x.mean((2, 3))) + perceptron(made.channel, x.amax((2, 3)))).sigmoid()
    x = x * mc[..., None, None]
    spatial = made.spatial
    assert spatial is not None
    pair = F.pad(torch.stack((x.max(1).values, x.mean(1)), 1), (1, 1, 1, 1))
    height, width, weight = x.shape[2], x.shape[3], spatial.convolution.weight[0]
    logits = torch.zeros(2, height, width, dtype=x.dtype)
    for i in range(3):
        for j in range(3):
            logits += torch.einsum("bchw,c->bhw", pair[:, :, i : i + height, j : j + width], weight[:, i, j])
    norm = spatial.norm
    logits = (logits - 0.3) / (2 + norm.eps) ** 0.5 * norm.weight + norm.bias
    return x * logits.sigmoid()[:, None]


@pytest.mark.paper("cbam")
def test_equals_the_formula() -> None:
    made, x = module(), maps()
    out, channel, place = made(x, return_gates=True)
    torch.testing.assert_close(out, by_the_formula(made, x))
    torch.testing.assert_close(out, x * channel * place)


@pytest.mark.parametrize("space", [(9,), (3, 4, 5)], ids=["1-d", "3-d"])
def test_other_dimensions_are_the_flat_one_on_a_stretched_map(space: tuple[int, ...]) -> None:
    """A map that varies along one axis alone, under a kernel that is zero off that axis, is a 1-D map."""
    line, x = module(dims=1), maps(space[-1])
    other = module(dims=len(space))
    other.channel.load_state_dict(line.channel.state_dict())
    assert other.spatial is not None and line.spatial is not None
    other.spatial.norm.load_state_dict(line.spatial.norm.state_dict())
    middle = (slice(None), slice(None), *(1,) * (len(space) - 1))
    with torch.no_grad():
        other.spatial.convolution.weight.zero_()
        other.spatial.convolution.weight[middle] = line.spatial.convolution.weight
    stretched = x.view(2, 8, *(1,) * (len(space) - 1), space[-1]).expand(-1, -1, *space)
    torch.testing.assert_close(other(stretched), line(x).view(2, 8, *(1,) * (len(space) - 1), -1).expand_as(stretched))


def test_orders() -> None:
    x, made = maps(), module(order="spatial-first")
    first = x * made.spatial(x)  # type: ignore[misc]
    torch.testing.assert_close(made(x), first * made.channel(first))
    parallel = module(order="parallel")
    torch.testing.assert_close(parallel(x), x * made.spatial(x) * made.channel(x))  # type: ignore[misc]


def test_extra_pools() -> None:
    gate, x = ChannelGate(8, 2, ("lp", "logsumexp")).double(), maps()
    lp, total = x.square().sum((2, 3)).sqrt(), x.exp().sum((2, 3)).log()
    torch.testing.assert_close(gate(x)[..., 0, 0], (perceptron(gate, lp) + perceptron(gate, total)).sigmoid())


class Bottleneck(nn.Module):
    """As torchvision and timm write it; ``groups`` makes it ResNeXt's."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)

    def branch(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.bn3(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


@pytest.mark.parametrize("groups", [1, 4])
def test_attach_acts_on_the_branch_before_the_addition(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Bottleneck(groups), Bottleneck(groups)).double().eval()
    plain, x = copy.deepcopy(model), maps(6, 6, channels=16)
    assert attach(model, lambda c: CBAM(c, 4)) == 2
    gates = [block.bn3[1] for block in model]
    for block, gate in zip(plain, gates, strict=True):
        assert isinstance(gate, CBAM) and not gate.training
        x = (x + gate(block.branch(x))).relu()
    torch.testing.assert_close(model(maps(6, 6, channels=16)), x)
    with pytest.raises(RetrofitError, match="already"):
        attach(model)


class InvertedResidual(nn.Module):
    """As torchvision writes MobileNetV2's."""

    def __init__(self) -> None:
        super().__init__()
        self.use_res_connect = True
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)),
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)),
            nn.Sequential(nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_attach_to_inverted_residuals() -> None:
    model = nn.Sequential(InvertedResidual(), InvertedResidual()).eval()
    plain, x = copy.deepcopy(model), torch.randn(1, 16, 5, 5)
    assert attach(model, lambda c: CBAM(c, 4)) == 2
    expected = x
    for block, old in zip(model, plain, strict=True):
        expected = expected + block.conv[1](old.conv(expected))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("name", "blocks"), [("MobileNetV1", 13), ("MobileNetV2", 16)])
def test_attach_to_mobilenets(name: str, blocks: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(depth_multiplier=0.5, num_labels=3, image_size=32)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    assert attach(model, lambda c: CBAM(c, 4)) == blocks
    gates = [m for m in model.modules() if isinstance(m, CBAM)]
    assert len(gates) == blocks
    seen: list[int] = []
    for gate in gates:
        gate.register_forward_hook(lambda m, args, out: seen.append(m.channels))
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3)
    assert seen == [gate.channels for gate in gates]


def test_attach_refuses_what_it_does_not_know() -> None:
    with pytest.raises(RetrofitError, match="by hand"):
        attach(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))


@pytest.mark.parametrize("options", [{"order": "both"}, {"pools": ()}, {"pools": ("median",)}, {"reduction": 16}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        CBAM(8, **{"reduction": 2, **options})


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(OptionError):
        SpatialGate(4)
    with pytest.raises(OptionError):
        SpatialGate(7, dims=4)
    for x in (maps(9), maps(channels=6)):
        with pytest.raises(ShapeError, match="takes"):
            module()(x)
