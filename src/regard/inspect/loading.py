"""Models to look into by name: ``nano``, a folder, or a hub id."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import FileFormatError, MissingExtraError, OptionError, RetrofitError

__all__ = ["load_image", "load_text_model", "load_vision_model", "model_answer", "token_logits"]

_TYPES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp", ".bmp": "bmp"}


def load_text_model(name: str = "nano") -> tuple[nn.Module, Any]:
    """A language model in float32 and evaluation mode, and its tokenizer: causal if it is made so, of encoder and
    decoder, or masked; else its bare encoder. Raises MissingExtraError without transformers, FileFormatError where
    there is no such model."""
    if name == "nano":
        from regard.models.nano import load_nano, load_tokenizer

        return load_nano().eval(), load_tokenizer()
    transformers = _transformers("Looking into a Hugging Face model")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        made = " ".join(getattr(config, "architectures", None) or [])
        kind = "AutoModelForCausalLM" if "CausalLM" in made or "LMHead" in made else "AutoModel"
        kind = "AutoModelForMaskedLM" if "MaskedLM" in made else kind
        kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else kind
        model = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{name!r} is neither 'nano' nor a language model that transformers can load ({error}). Give a folder with "
            "config.json, weights and tokenizer, or a hub id that this machine can reach."
        ) from error


def load_vision_model(name: str) -> tuple[nn.Module, Any]:
    """A vision transformer in float32 and evaluation mode, and its image processor."""
    transformers = _transformers("Looking into a vision model")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        made = " ".join(getattr(config, "architectures", None) or [])
        kind = "AutoModelForImageClassification" if "ImageClassification" in made else "AutoModel"
        model = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32)
        # The fast processors need torchvision.
        return model.eval(), transformers.AutoImageProcessor.from_pretrained(name, use_fast=False)
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{name!r} is no vision model that transformers can load ({error}). Give a folder with config.json, "
            "weights and preprocessor_config.json, or a hub id that this machine can reach."
        ) from error


def load_image(path: Path, processor: Any) -> tuple[Tensor, str]:
    """The image ``(1, channels, height, width)`` as the processor gives it, and its file as a ``data:`` address."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("Looking at images", "plot") from error
    if path.suffix.lower() not in _TYPES:
        raise FileFormatError(f"{path.name!r} is no image file that pages show: {', '.join(_TYPES)}.")
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise FileFormatError(f"{path.name!r} cannot be read as an image ({error}).") from error
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    return pixels, f"data:image/{_TYPES[path.suffix.lower()]};base64,{encoded}"


def token_logits(out: Any) -> Tensor:
    """``(batch, length, vocabulary)`` of what a language model gives: transformers' output, or the logits themselves.
    Raises OptionError for models that give none."""
    found = out.logits if hasattr(out, "logits") else out
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise OptionError("The model gives no logits (batch, length, vocabulary), and this is judged by them.")
    return found


def model_answer(out: Any) -> Tensor:
    """What a model gives: a tensor, or of transformers' output the logits, else the last hidden state. Raises
    RetrofitError for others."""
    for found in (out, getattr(out, "logits", None), getattr(out, "last_hidden_state", None)):
        if isinstance(found, Tensor):
            return found
    raise RetrofitError(f"The model returns {type(out).__name__}, with neither logits nor a last hidden state.")


def _transformers(feature: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(feature, "transformers") from error
    return transformers
