"""A cache in few bits: keys per channel, values per token, the newest tokens in full precision.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024, arXiv 2402.02750, section 3.2. Keys
have a few channels of large values, so a group shares a channel (over ``group_size`` tokens); values have none, so a
group shares a token (over up to ``group_size`` channels). ``x = q step + low`` with ``q`` of ``bits`` bits, ``low`` and
``step`` from the group's least and largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.cache.base import Cached, KeyValueCache, nothing_cached
from regard.cache.growing import DynamicCache
from regard.errors import OptionError

__all__ = ["QuantizedCache"]


class _Packed:
    """Groups of numbers along the last axis in ``bits`` bits each, several to a byte, growing along axis 2."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.parts: tuple[Tensor, Tensor, Tensor] | None = None

    def append(self, x: Tensor) -> None:
        """``x`` ``(batch, heads, rows, groups, group)``, the last a multiple of the numbers in a byte."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = (high - low) / (2**self.bits - 1)
        codes = ((x - low) / torch.where(step == 0, 1, step)).round().to(torch.uint8)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=x.device)
        packed = (codes.unflatten(-1, (-1, 8 // self.bits)) << shifts).sum(-1, dtype=torch.uint8)
        new = (packed, low, step)
        parts = self.parts
        self.parts = new if parts is None else tuple(torch.cat(pair, 2) for pair in zip(parts, new, strict=True))  # type: ignore[assignment]

    def read(self) -> Tensor:
        assert self.parts is not None
        packed, low, step = self.parts
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=packed.device)
        codes = (packed[..., None] >> shifts) & (2**self.bits - 1)
        return codes.flatten(-2).to(low.dtype) * step + low

    def keep(self, rows: int) -> None:
        if self.parts is not None:
            self.parts = tuple(part[:, :, :rows] for part in self.parts) if rows else None  # type: ignore[assignment]

    def select(self, index: Tensor) -> None:
        if self.parts is not None:
            self.parts = tuple(part[index] for part in self.parts)  # type: ignore[assignment]

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts or ())


class QuantizedCache(KeyValueCache):
    """bits: 2, 4 or 8 a number. group_size: tokens (keys) or channels (values) that share a range; value channels are
    cut into equal groups of at most so many. residual: so many newest tokens at least stay in full precision.

    Old tokens are rounded once, when a group of them is complete, and pass no gradients on; cropping back into them
    leaves them rounded.
    """

    def __init__(self, bits: int = 4, group_size: int = 32, residual: int = 64) -> None:
        super().__init__()
        if bits not in (2, 4, 8):
            raise OptionError(f"bits is 2, 4 or 8; got {bits}.")
        if group_size < 1 or group_size * bits % 8 or residual < 0:
            raise OptionError(
                f"group_size holds whole bytes (a multiple of {8 // bits}), residual is at least 0; got {group_size} "
                f"and {residual}."
            )
        self.bits, self.group_size, self.residual = bits, group_size, residual
        self._keys, self._values = _Packed(bits), _Packed(bits)
        self._recent = DynamicCache()
        self._rounded = 0

    def read(self) -> Cached:
        if not self.seen:
            raise nothing_cached()
        recent = self._recent.read()
        if not self._rounded:
            return recent
        key = self._keys.read().transpose(-1, -2).flatten(2, 3)
        value = self._values.read().flatten(3)[..., : recent.value.shape[-1]]
        return Cached(
            torch.cat((key.to(recent.key.dtype), recent.key), 2),
            torch.cat((value.to(recent.value.dtype), recent.value), 2),
        )

    def nbytes(self) -> int:
        return self._keys.nbytes() + self._values.nbytes() + self._recent.nbytes()

    def crop(self, length: int) -> None:
        self._check_crop(length)
        if length < self._rounded:
            # Back to whole groups; the rest of the group goes on as recent tokens.
            kept = self.read()
            whole = length // self.group_size * self.group_size
            self._keys.keep(whole // self.group_size)
            self._values.keep(whole)
            self._recent = DynamicCache()
            self._recent.append(kept.key[:, :, whole:length], kept.value[:, :, whole:length])
            self._rounded = whole
        else:
            self._recent.crop(length - self._rounded)
        self.seen = length

    def select(self, index: Tensor) -> None:
        for part in (self._keys, self._values, self._recent):
            part.select(index)

    def _store(self, key: Tensor, value: Tensor) -> None:
        recent = self._recent.append(key, value)
        full = max(recent.key.shape[2] - self.residual, 0) // self.group_size * self.group_size
        if not full:
            return
        old_key, old_value = recent.key[:, :, :full].detach(), recent.value[:, :, :full].detach()
        self._keys.append(old_key.unflatten(2, (-1, self.group_size)).transpose(-1, -2))
        self._values.append(self._grouped(old_value))
        self._rounded += full
        left = Cached(recent.key[:, :, full:].clone(), recent.value[:, :, full:].clone())
        self._recent = DynamicCache()
        self._recent.append(left.key, left.value)

    def _grouped(self, value: Tensor) -> Tensor:
        """Channels in equal groups of at most ``group_size``; a last short one repeats its last channel."""
        dim, per_byte = value.shape[-1], 8 // self.bits
        count = -(-dim // self.group_size)
        width = -(-dim // count)
        width += -width % per_byte
        short = width * -(-dim // width) - dim
        if short:
            value = torch.cat((value, value[..., -1:].expand(*value.shape[:-1], short)), -1)
        return value.unflatten(-1, (-1, width))

    def _like(self) -> tuple[Tensor, Tensor] | None:
        return self._recent._like()
