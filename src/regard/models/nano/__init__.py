"""nano: a small causal language model of Python source that the library carries with it.

A Llama of 3.8 million parameters (6 layers, 6 query heads of 32 channels over 2 key/value heads, rotary
positions, context 2048 tokens) with a byte-level tokenizer of 4096 tokens. This project trained it on the
text of the CPython standard library; ``weights/training.json`` says how, ``corpus.py`` which modules it
never saw.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from regard.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["END_OF_TEXT", "WEIGHTS", "load_nano", "load_tokenizer", "require_transformers"]

END_OF_TEXT = "<|endoftext|>"
"""The one special token: it stands before every document."""

WEIGHTS = Path(str(files(__name__) / "weights"))
"""Folder of the weights, the configuration and the tokenizer, as ``from_pretrained`` reads it."""


def load_nano(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """nano in evaluation mode, its bfloat16 weights converted to ``dtype``."""
    require_transformers("nano")
    _require_file("model.safetensors")
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """nano's tokenizer; it adds no special token by itself, and gives back any text unchanged."""
    require_transformers("nano's tokenizer")
    _require_file("tokenizer.json")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(WEIGHTS / "tokenizer.json"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def require_transformers(feature: str) -> None:
    """Raises :class:`MissingExtraError` where the packages that ``feature`` needs are not installed."""
    if any(find_spec(package) is None for package in ("transformers", "tokenizers", "safetensors")):
        raise MissingExtraError(feature, "transformers")


def _require_file(name: str) -> None:
    if not (WEIGHTS / name).is_file():
        raise FileNotFoundError(
            f"There is no {name} in {WEIGHTS}, where nano's files are expected. Install regard again, or "
            "train the model (100 minutes on two cores): python -m regard.models.nano.train"
        )
