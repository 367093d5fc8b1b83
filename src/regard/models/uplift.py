"""UPLiFT: doubles the resolution of a frozen extractor's features, again and again, up to pixels.

Source: "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders", 2026, arXiv 2601.17950 (mechanism:
:mod:`regard.local.uplift`). A convolutional encoder reads the image once, without downsampling. Each iteration puts its
last level, brought to the features' size, beside the features; two convolutions, a transposed one (with a bilinear
skip), the level before the last at twice the size, and two more convolutions make the guide; a Local Attender takes the
features there. All iterations share their weights. Where the paper names parts of its variant for latents without
saying how they are wired (noise, refiner), the docstring of :class:`UPLiFT` says how they are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.norms import ChannelNorm
from regard.local.uplift import LocalAttender

__all__ = ["ConvBlock", "UPLiFT", "uplift_loss"]


_NORMS: Mapping[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": ChannelNorm}


class ConvBlock(nn.Module):
    """``convolutions`` times 3 x 3 convolution (no bias), norm, ReLU; then a 1 x 1 convolution; plus the input, its
    channels cut off or filled up with zeros to ``out_channels``."""

    def __init__(self, in_channels: int, out_channels: int, convolutions: int = 1, norm: str = "batch") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(convolutions):
            before = out_channels if index else in_channels
            layers += [nn.Conv2d(before, out_channels, 3, padding=1, bias=False), _NORMS[norm](out_channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        own = x[:, : out.shape[1]]
        return out + F.pad(own, (0, 0, 0, 0, 0, out.shape[1] - own.shape[1]))


class UPLiFT(nn.Module):
    """Image ``(batch, image_channels, height, width)`` and the extractor's features ``(batch, feature_channels, h, w)``
    -> features at ``2 ** iters`` times their size.

    patch: pixels of the image per feature; the image is resized so that this becomes a power of two (14 to 16), hence
    ``log2`` of that many iterations reach its pixels. widths: of the encoder's blocks. width: of the decoder.
    neighbours: of the attender. norm: 'batch' or 'layer' (over channels). noise_channels: of standard normal numbers,
    drawn anew for each iteration beside the decoder's input. refiner: number of blocks that correct the upsampled
    features from the guide beside them (the correction is zero before training). attender: False predicts features by
    a 1 x 1 convolution of the guide instead, for comparison. shared_encoder: False reads the image anew for each
    iteration, at ``pixels`` times the size of its features. low_mem: of the attender.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dinov2-s14": {"feature_channels": 384, "patch": 14},
        "vae": {"feature_channels": 4, "patch": 8, "norm": "layer", "noise_channels": 4, "refiner": 12},
    }
    """The paper's sizes; it does not say how many channels of noise."""

    def __init__(
        self,
        feature_channels: int,
        patch: int = 14,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 128),
        width: int = 64,
        neighbours: int = 17,
        norm: Literal["batch", "layer"] = "batch",
        noise_channels: int = 0,
        refiner: int = 0,
        attender: bool = True,
        shared_encoder: bool = True,
        low_mem: bool = False,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise OptionError(f"norm is {' or '.join(map(repr, _NORMS))}, got {norm!r}.")
        if patch < 1 or len(widths) < 2 or min(noise_channels, refiner) < 0:
            raise OptionError(
                "Need patch >= 1, at least two widths, noise_channels and refiner >= 0; got "
                f"{patch}, {tuple(widths)}, {noise_channels}, {refiner}."
            )
        self.feature_channels, self.patch, self.noise_channels = feature_channels, patch, noise_channels
        self.image_channels, self.shared_encoder = image_channels, shared_encoder
        sizes = zip((image_channels, *widths), widths, strict=False)
        self.encoder = nn.ModuleList(ConvBlock(before, after, norm=norm) for before, after in sizes)
        self.reduce = ConvBlock(feature_channels + noise_channels + widths[-1], width, 2, norm)
        self.enlarge = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.guide = ConvBlock(width + widths[-2], width, 2, norm)
        self.attender = LocalAttender(width, neighbours, low_mem=low_mem) if attender else None
        self.predict = None if attender else nn.Conv2d(width, feature_channels, 1)
        self.refiner: nn.Sequential | None = None
        if refiner:
            inputs = (feature_channels + width, *(width,) * (refiner - 1))
            blocks = [ConvBlock(channels, width, norm=norm) for channels in inputs]
            last = nn.Conv2d(width, feature_channels, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
            self.refiner = nn.Sequential(*blocks, last)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UPLiFT:
        """A size of :attr:`presets`, with some arguments changed."""
        if name not in cls.presets:
            raise OptionError(f"There is no UPLiFT preset {name!r}; there are {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **changes})

    @property
    def pixels(self) -> int:
        """Pixels of the resized image per feature: the power of two from ``patch`` on."""
        return 1 << (self.patch - 1).bit_length()

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's last level and the one before it, at the image's own size."""
        levels = [image]
        for block in self.encoder:
            levels.append(block(levels[-1]))
        return levels[-1], levels[-2]

    @overload
    def forward(
        self,
        image: Tensor,
        features: Tensor,
        iters: int = ...,
        out_size: Sequence[int] | None = ...,
        return_steps: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor,
        features: Tensor,
        iters: int = ...,
        out_size: Sequence[int] | None = ...,
        *,
        return_steps: Literal[True],
    ) -> list[Tensor]: ...
    def forward(
        self,
        image: Tensor,
        features: Tensor,
        iters: int = 1,
        out_size: Sequence[int] | None = None,
        return_steps: bool = False,
    ) -> Tensor | list[Tensor]:
        """Upsample. out_size: (height, width) of a bilinear resize at the end. return_steps: a list of what every
        iteration gave, the last one resized."""
        self._check(image, features, iters)
        steps, levels = [], None
        for _ in range(iters):
            if levels is None or not self.shared_encoder:
                levels = self.encode(self._resized(image, features))
            features = self._step(levels, features)
            steps.append(features)
        if out_size is not None:
            steps[-1] = F.interpolate(features, tuple(out_size), mode="bilinear", align_corners=False)
        return steps if return_steps else steps[-1]

    def _check(self, image: Tensor, features: Tensor, iters: int) -> None:
        expected = (self.image_channels, self.feature_channels)
        if image.dim() != 4 or features.dim() != 4 or (image.shape[1], features.shape[1]) != expected:
            raise ShapeError(
                f"UPLiFT takes an image (batch, {self.image_channels}, height, width) and features (batch, "
                f"{self.feature_channels}, h, w); got {tuple(image.shape)} and {tuple(features.shape)}. Tokens of a "
                "vision transformer become a map by tokens.transpose(1, 2).unflatten(2, (h, w))."
            )
        if image.shape[0] != features.shape[0] or iters < 1:
            raise ShapeError(
                f"One image for each map of features and at least one iteration: got {image.shape[0]} images, "
                f"{features.shape[0]} maps, iters={iters}."
            )

    def _resized(self, image: Tensor, features: Tensor) -> Tensor:
        """The image that the encoder reads: of one size for all iterations, or with the detail that each one adds."""
        if self.shared_encoder:
            size = [round(side * self.pixels / self.patch) for side in image.shape[2:]]
        else:
            size = [side * self.pixels for side in features.shape[2:]]
        if size == list(image.shape[2:]):
            return image
        return F.interpolate(image, size, mode="bilinear", align_corners=False)

    def _step(self, levels: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
        """One doubling, with the encoder's last two levels, the last one first."""
        height, width = features.shape[2:]
        last, before = (F.interpolate(t, (n * height, n * width)) for n, t in zip((1, 2), levels, strict=True))
        noise = features.new_empty(len(features), self.noise_channels, height, width).normal_()
        x = self.reduce(torch.cat((features, noise, last), 1))
        x = self.enlarge(x) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        guide = self.guide(torch.cat((x, before), 1))
        out: Tensor = self.attender(guide, features) if self.attender is not None else self.predict(guide)  # type: ignore[misc]
        if self.refiner is not None:
            out = out + self.refiner(torch.cat((out, guide), 1))
        return out


def uplift_loss(model: nn.Module, extractor: Callable[[Tensor], Tensor], images: Tensor, depths: int = 3) -> Tensor:
    """Training objective: the frozen ``extractor`` (images -> features ``(batch, channels, h, w)``) reads the images at
    full size and at ``1/2, ..., 1/2^depths`` of it; from depth ``i`` the model, given image and features of that depth,
    runs ``i`` iterations. Sum over depths and iterations of the mean squared error to the extractor's features there.

    The paper trains for one epoch by Adam with rate 1e-3. Image sides should be multiples of ``2^depths`` patches.
    """
    if depths < 1:
        raise OptionError(f"depths is at least 1, got {depths}.")
    sizes = [tuple(side >> depth for side in images.shape[2:]) for depth in range(depths + 1)]
    seen = [images, *(F.interpolate(images, size, mode="bilinear", antialias=True) for size in sizes[1:])]
    with torch.no_grad():
        truth = [extractor(image) for image in seen]
    total = images.new_zeros(())
    for depth in range(1, depths + 1):
        steps = model(seen[depth], truth[depth], iters=depth, return_steps=True)
        for found, wanted in zip(steps, reversed(truth[:depth]), strict=True):
            if found.shape != wanted.shape:
                raise ShapeError(
                    f"Features of images at twice the size are not twice as many: the model gives "
                    f"{tuple(found.shape)}, the extractor {tuple(wanted.shape)}. Use image sides that are multiples of "
                    f"2^{depths} patches."
                )
            total = total + F.mse_loss(found, wanted)
    return total
