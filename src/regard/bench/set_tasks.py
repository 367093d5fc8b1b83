"""Tasks on sets, whose answers do not depend on the order of the elements (or follow it).

After the experiments of the Set Transformer (arXiv 1810.00825, section 5), on data that is drawn on the spot. Inputs
``(batch, n, input_dim)``; all sets of a batch have one size, which is drawn anew for every batch where it varies. A
model gives ``(batch, num_outputs, num_classes)``, and where ``num_outputs`` is None ``(batch, n, num_classes)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.tasks import Classification
from regard.errors import OptionError

__all__ = ["SHAPES", "AmortisedClustering", "MaxRegression", "PointClouds", "SetAnomaly", "UniqueCounting"]


def _size(smallest: int, largest: int, generator: torch.Generator) -> int:
    return int(torch.randint(smallest, largest + 1, (), generator=generator))


class MaxRegression:
    """The largest of 1 to ``largest`` whole numbers from 0 to ``top``. Loss and metric: mean absolute error."""

    input_dim = num_classes = num_outputs = 1

    def __init__(self, largest: int = 10, top: int = 100) -> None:
        if largest < 1 or top < 1:
            raise OptionError(f"Need sets of at least 1 value and a range of at least 1; got {largest} and {top}.")
        self.largest, self.top = largest, top

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Values ``(size, n, 1)`` and their maxima ``(size, 1, 1)``."""
        shape = (size, _size(1, self.largest, generator), 1)
        values = torch.randint(self.top + 1, shape, generator=generator).float()
        return values, values.amax(1, keepdim=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean absolute error."""
        return F.l1_loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sum of absolute errors and number of sets."""
        return float((outputs - targets).abs().sum()), targets.numel()


class UniqueCounting:
    """How many different kinds there are among 6 to 10 noisy samples; the kinds of the test split are never trained on.

    A kind is a random vector, a sample that vector and noise of size ``noise``. The model gives the logarithm of a
    Poisson rate; loss: negative log-likelihood in nats; metric: accuracy of the distribution's mode.
    """

    num_classes = num_outputs = 1

    def __init__(
        self, input_dim: int = 16, kinds: int = 512, noise: float = 0.1, smallest: int = 6, largest: int = 10
    ) -> None:
        if not 1 <= smallest <= largest <= kinds or noise < 0 or input_dim < 1:
            raise OptionError(
                f"Need 1 <= smallest <= largest <= kinds, input_dim >= 1 and noise >= 0; got {smallest}, {largest}, "
                f"{kinds}, {input_dim}, {noise}."
            )
        self.input_dim, self.noise, self.smallest, self.largest = input_dim, noise, smallest, largest
        drawn = torch.randn(2, kinds, input_dim, generator=torch.Generator().manual_seed(1))
        self.kinds = {"train": drawn[0], "test": drawn[1]}

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Samples ``(size, n, input_dim)`` and counts ``(size, 1, 1)``."""
        kinds = self.kinds[split]
        n = _size(self.smallest, self.largest, generator)
        count = torch.randint(1, n + 1, (size, 1), generator=generator)
        chosen = torch.rand(size, len(kinds), generator=generator).argsort(-1)[:, :n]
        # The first elements take one kind each, so that every kind occurs; the others take any of them.
        other = (torch.rand(size, n, generator=generator) * count).long()
        which = torch.where(torch.arange(n) < count, torch.arange(n), other)
        samples = kinds[chosen.gather(1, which)]
        samples = samples + self.noise * torch.randn(samples.shape, generator=generator)
        order = torch.rand(size, n, generator=generator).argsort(-1)
        return samples.gather(1, order[..., None].expand_as(samples)), count[..., None].float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative Poisson log-likelihood."""
        return F.poisson_nll_loss(outputs, targets, log_input=True, full=False) + torch.lgamma(targets + 1).mean()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sets whose count is the mode of the predicted distribution, and their number."""
        return float((outputs.exp().floor() == targets).sum()), targets.numel()


class AmortisedClustering:
    """The parameters of a mixture of ``components`` Gaussians in the plane, from 100 to 500 of its points.

    Means are uniform in ``[-4, 4]^2``, deviations 0.3, weights uniform on the simplex. Per component the model gives a
    logit of its weight, a mean and a deviation before softplus. Targets: the true ones ``(batch, components, 5)``
    followed by the points ``(batch, n, 2)``, in one tensor padded with zeros. Loss and metric: negative log-likelihood
    and log-likelihood per point, in nats.
    """

    input_dim, num_classes = 2, 5

    def __init__(self, components: int = 4, smallest: int = 100, largest: int = 500, deviation: float = 0.3) -> None:
        if not 1 <= smallest <= largest or components < 1 or deviation <= 0:
            raise OptionError(
                f"Need components >= 1, 1 <= smallest <= largest and deviation > 0; got {components}, {smallest}, "
                f"{largest}, {deviation}."
            )
        self.components, self.smallest, self.largest, self.deviation = components, smallest, largest, deviation
        self.num_outputs = components

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Points and targets."""
        n, k = _size(self.smallest, self.largest, generator), self.components
        # A uniform draw from the simplex: exponential numbers, scaled to sum 1.
        weights = -torch.rand(size, k, generator=generator).clamp_min(1e-12).log()
        weights = weights / weights.sum(-1, keepdim=True)
        means = 8 * torch.rand(size, k, 2, generator=generator) - 4
        label = torch.multinomial(weights, n, replacement=True, generator=generator)
        points = means.gather(1, label[..., None].expand(-1, -1, 2))
        points = points + self.deviation * torch.randn(points.shape, generator=generator)
        true = torch.cat((weights[..., None], means, torch.full_like(means, self.deviation)), -1)
        return points, torch.cat((true, F.pad(points, (0, 3))), 1)

    def log_likelihood(self, points: Tensor, parameters: Tensor) -> Tensor:
        """Mean over the points, ``(batch,)``, of weights, means and deviations ``(batch, components, 5)``."""
        weights, means, deviations = parameters.split((1, 2, 2), -1)
        apart = (points[:, :, None] - means[:, None]) / deviations[:, None]
        logs = -0.5 * apart.square() - deviations.log()[:, None] - 0.5 * math.log(2 * math.pi)
        return (logs.sum(-1) + weights[..., 0].clamp_min(1e-10).log()[:, None]).logsumexp(-1).mean(-1)

    def parameters(self, outputs: Tensor) -> Tensor:
        """What a model's raw outputs stand for."""
        weights, means, deviations = outputs.split((1, 2, 2), -1)
        return torch.cat((weights.softmax(1), means, F.softplus(deviations).clamp_min(1e-4)), -1)

    def best(self, targets: Tensor) -> Tensor:
        """The log-likelihood of the true parameters, ``(batch,)``."""
        return self.log_likelihood(targets[:, self.components :, :2], targets[:, : self.components])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood per point."""
        return -self.log_likelihood(targets[:, self.components :, :2], self.parameters(outputs)).mean()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sum of log-likelihoods and number of sets."""
        return -float(self.loss(outputs, targets)) * len(targets), len(targets)


class SetAnomaly(Classification):
    """Which of ``elements`` vectors lacks both of the attributes that all others share.

    A vector is ``attributes`` signs, turned by a fixed random rotation, and noise. In every set two attributes are
    drawn that all elements but one have; the odd one has neither, and the other attributes are random. The model scores
    each element; targets ``(batch,)``; metric: accuracy.
    """

    num_classes = 1
    num_outputs = None

    def __init__(self, elements: int = 8, attributes: int = 12, noise: float = 0.2) -> None:
        if elements < 3 or attributes < 2 or noise < 0:
            raise OptionError(
                f"Need 3 elements, 2 attributes and noise of at least 0; got {elements}, {attributes}, {noise}."
            )
        self.elements, self.attributes, self.noise, self.input_dim = elements, attributes, noise, attributes
        drawn = torch.randn(attributes, attributes, generator=torch.Generator().manual_seed(1))
        self.rotation = torch.linalg.qr(drawn)[0]

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Sets and the place of the odd element."""
        signs = torch.randint(2, (size, self.elements, self.attributes), generator=generator) * 2 - 1
        shared = torch.rand(size, self.attributes, generator=generator).argsort(-1) < 2
        odd = torch.randint(self.elements, (size,), generator=generator)
        is_odd = F.one_hot(odd, self.elements).bool()[..., None]
        signs = torch.where(shared[:, None], torch.where(is_odd, -1, 1), signs).float()
        noise = self.noise * torch.randn(signs.shape, generator=generator)
        return signs @ self.rotation + noise, odd

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs[..., 0], targets)

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        return super().score(outputs[..., 0], targets)


SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "disc", "helix", "saddle")


class PointClouds(Classification):
    """Which of :data:`SHAPES` a cloud of ``points`` points was drawn from, turned at random, with noise, and scaled to
    mean zero and deviation one, as ModelNet40's clouds are. Targets ``(batch, 1)``; metric: accuracy."""

    input_dim, num_outputs = 3, 1
    num_classes = len(SHAPES)

    def __init__(self, points: int = 100, noise: float = 0.02) -> None:
        if points < 2 or noise < 0:
            raise OptionError(f"Need at least 2 points and noise of at least 0; got {points} and {noise}.")
        self.points, self.noise = points, noise

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Clouds ``(size, points, 3)`` and their shapes."""
        label = torch.randint(len(SHAPES), (size,), generator=generator)
        u, v = torch.rand(2, size, self.points, generator=generator)
        side = torch.randint(3, (size, self.points), generator=generator)
        clouds = torch.stack([torch.stack(xyz, -1) for xyz in _surfaces(u, v, side)])[label, torch.arange(size)]
        # The orthogonal factor of a normal matrix, with its signs fixed, is a uniform rotation or reflection.
        factor, upper = torch.linalg.qr(torch.randn(size, 3, 3, generator=generator))
        clouds = clouds @ (factor * upper.diagonal(dim1=1, dim2=2).sign()[:, None])
        clouds = clouds + self.noise * torch.randn(clouds.shape, generator=generator)
        clouds = clouds - clouds.mean(1, keepdim=True)
        return clouds / clouds.flatten(1).std(1)[:, None, None], label[:, None]


def _surfaces(u: Tensor, v: Tensor, side: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Points of every shape from two uniform numbers each (and a random axis), in the order of ``SHAPES``."""
    around, across = 2 * math.pi * u, 2 * v - 1
    cos, sin, flat = around.cos(), around.sin(), torch.zeros_like(u)
    ring = (1 - across.square()).sqrt()
    face = [torch.where(side == axis, (across > 0) * 2.0 - 1, flat) for axis in range(3)]
    plane = (2 * u - 1, 2 * (2 * v % 1) - 1)
    cube_x = torch.where(side == 0, face[0], plane[0])
    cube_y = torch.where(side == 1, face[1], torch.where(side == 0, plane[0], plane[1]))
    cube_z = torch.where(side == 2, face[2], plane[1])
    tube = 2 * math.pi * v
    radius = v.sqrt()
    return [
        (ring * cos, ring * sin, across),
        (cube_x, cube_y, cube_z),
        (cos, sin, across),
        (radius * cos, radius * sin, 2 * (1 - radius)),
        ((1 + 0.4 * tube.cos()) * cos, (1 + 0.4 * tube.cos()) * sin, 0.4 * tube.sin()),
        (radius * cos, radius * sin, flat),
        ((2 * tube).cos(), (2 * tube).sin(), 2 * across),
        (plane[0], across, plane[0] * across),
    ]
