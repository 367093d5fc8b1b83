"""Quantities as people write them: ``1M`` tokens, ``50GB/s``, ``10us``, ``80GB``, ``400TFLOP/s``; and back.

Tokens count in powers of 1024, as models' context lengths do (``128k`` is 131072); everything else in powers of 1000,
and of 1024 with an ``i`` (``80GiB``).
"""

from __future__ import annotations

import math
import re

from regard.errors import OptionError

__all__ = ["parse_quantity", "parse_tokens", "show_bytes", "show_quantity", "show_seconds", "show_tokens"]

_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SMALL = {"n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "": 1.0}
_EXAMPLE = {"B/s": "50GB/s", "B": "80GB", "FLOP/s": "400TFLOP/s", "s": "10us"}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?"


def parse_tokens(text: str, what: str) -> int:
    """``"65536"``, ``"128k"`` (131072) or ``"1M"`` (1048576)."""
    found = re.fullmatch(rf"{_NUMBER}\s*([kKmM]?)", text.strip().replace("_", ""))
    count = 0.0
    if found:
        count = float(found[1]) * 10.0 ** int(found[2] or 0) * {"": 1, "k": 1024, "m": 1024**2}[found[3].lower()]
    if count < 1 or count != int(count):
        raise OptionError(f"{what} {text!r} is no number of tokens: write 65536, 128k (131072) or 1M (1048576).")
    return int(count)


def parse_quantity(text: str, unit: str, what: str) -> float:
    """``text`` as a number of ``unit``: ``"B/s"``, ``"B"``, ``"FLOP/s"`` or ``"s"``. The unit has to be written, so
    that nobody takes bits for bytes or ms for us."""
    found = re.fullmatch(rf"{_NUMBER}\s*([a-zA-Zµ/]+)", text.strip())
    scale = _scale(found[3], unit) if found else None
    if found is None or scale is None:
        hint = " Bits are not bytes: 400Gbit/s is 50GB/s." if re.search(r"bit|bps|b/s", text) else ""
        raise OptionError(f"{what} {text!r} cannot be read: write a number and its unit, e.g. {_EXAMPLE[unit]}.{hint}")
    value = float(found[1]) * 10.0 ** int(found[2] or 0) * scale
    if not value and unit != "s":
        raise OptionError(f"{what} {text!r} is nothing at all: it has to be more than zero, e.g. {_EXAMPLE[unit]}.")
    return value


def _scale(written: str, unit: str) -> float | None:
    for end in {"FLOP/s": ("FLOP/s", "FLOPS", "FLOPs", "flop/s", "flops")}.get(unit, (unit,)):
        if not written.endswith(end):
            continue
        prefix = written[: -len(end)]
        if unit == "s":
            return _SMALL.get(prefix)
        if prefix.endswith("i") and prefix[:-1].lower() in ("k", "m", "g", "t"):
            return float(1024 ** ("kmgt".index(prefix[0].lower()) + 1))
        return _PREFIX.get("k" if prefix == "K" else prefix)
    return None


def show_quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: ``"50.0 GB/s"``."""
    if not math.isfinite(value):
        return "unlimited" if value > 0 else "-"
    for prefix in ("P", "T", "G", "M", "k"):
        if value >= 0.9995 * _PREFIX[prefix]:
            return f"{_digits(value / _PREFIX[prefix])} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def show_bytes(value: float) -> str:
    """``"1.50 GB"``."""
    return show_quantity(value, "B")


def show_seconds(value: float) -> str:
    """``"12.3 ms"``; hours from one on."""
    if value >= 3600:
        return f"{_digits(value / 3600)} h"
    for prefix, scale in (("", 1.0), ("m", 1e-3), ("u", 1e-6)):
        if value >= 0.9995 * scale:
            return f"{_digits(value / scale)} {prefix}s"
    return "0 s" if not value else f"{_digits(value * 1e9)} ns"


def show_tokens(count: int) -> str:
    """``"128k"``, ``"1M"``, or the number itself."""
    for size, name in ((1024**2, "M"), (1024, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{name}"
    return str(count)


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
