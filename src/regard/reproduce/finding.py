"""What one reproduction found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Finding"]


@dataclass
class Finding:
    """``measured``: plain JSON values with telling names (units in the name). ``holds``: whether the effect showed, by
    a rule that stands in the code. ``note``: what was compared, and what it would take where it does not hold."""

    measured: dict[str, Any] = field(default_factory=dict)
    holds: bool = False
    note: str = ""
