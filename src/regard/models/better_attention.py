"""A small encoder classifier for the kinds of attention of :mod:`regard.dense.better_attention`.

Hosseini and Hosseini, "You Need to Pay Better Attention", 2024, arXiv 2403.01643, compare them in small encoders on
images (MNIST, CIFAR-100) and texts (IMDB, Amazon reviews): tokens, learned positions, pre-norm blocks, mean, head.
"""

from __future__ import annotations

from typing import Any

from regard.dense.better_attention import Kind
from regard.errors import OptionError
from regard.models.sequence import SequenceModel

__all__ = ["KINDS", "TinyEncoderClassifier"]

KINDS: dict[Kind, str] = {
    "standard": "full",
    "optimised": "better_attention_optimised",
    "efficient": "better_attention_efficient",
    "super": "better_attention",
}
"""The registered name of each kind."""


class TinyEncoderClassifier(SequenceModel):
    """Texts ``(batch, length)`` of ``vocab_size`` tokens, or patches ``(batch, length, input_dim)``, to logits
    ``(batch, num_classes)``; ``mask`` leaves padding out.

    attention: its kind. max_len: the longest input. attention_options: for the layers of that kind. Other keywords as
    in :class:`~regard.models.sequence.SequenceModel`.
    """

    def __init__(
        self,
        num_classes: int,
        attention: Kind = "super",
        *,
        max_len: int,
        embed_dim: int = 64,
        num_heads: int = 4,
        depth: int = 1,
        attention_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if attention not in KINDS:
            raise OptionError(f"attention is one of {', '.join(KINDS)}; got {attention!r}.")
        given = {"max_len": max_len} if attention == "super" else {}
        super().__init__(
            num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mechanism=KINDS[attention],
            options={**given, **(attention_options or {})},
            positions="learned",
            max_length=max_len,
            **{"causal": False, "pool": "mean", **options},
        )
