"""What is compared on: a causal language model with its tokenizer, and text cut into windows of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import FileFormatError, MissingExtraError, OptionError
from regard.mechanism import Mechanism

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Subject",
    "load_subject",
    "log_probabilities",
    "mechanism_calls",
    "read_text",
    "text_bytes",
    "token_windows",
    "watched_calls",
]

_READABLE = (".txt", ".md", ".rst", ".py", ".json", ".csv", ".html", ".tex", ".c", ".h", ".js", ".ts", ".java", ".go")


@dataclass
class Subject:
    """A model and its tokenizer. ``name`` is what the user called it."""

    name: str
    model: PreTrainedModel
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_length(self) -> int | None:
        """Longest context that the model was made for, where its config says."""
        return getattr(self.model.config, "max_position_embeddings", None)


def load_subject(name: str = "nano") -> Subject:
    """``nano``, a folder, or a hub id: any causal language model of transformers, in float32 and eval mode.

    Raises MissingExtraError without transformers, FileFormatError for a folder or id that holds no such model.
    """
    if name == "nano":
        from regard.models.nano import load_nano, load_tokenizer

        return Subject(name, load_nano().eval(), load_tokenizer())
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("Comparing on a Hugging Face model", "transformers") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{name!r} is neither 'nano' nor a causal language model that transformers can load ({error}). "
            "Give a folder with config.json, weights and tokenizer, or a hub id that this machine can reach."
        ) from error
    return Subject(name, model.eval(), tokenizer)


def read_text(source: str | Path | None, split: Literal["train", "held_out"] = "held_out") -> list[str]:
    """Documents of a file or folder (all readable text files below it, in order); None: the standard library's source.

    ``split``: ``"held_out"`` or ``"train"``. The standard library is split as nano's training was; of other text, every
    fifth document (or, of a single one, the last fifth) is held out.
    """
    if source is None:
        from regard.models.nano.corpus import read_corpus

        return [module.text for module in read_corpus(split)]
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in _READABLE)
    elif path.is_file():
        files = [path]
    else:
        raise FileFormatError(f"There is no file or folder {str(path)!r} to read text from.")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            if path.is_file():
                raise FileFormatError(
                    f"{file.name} is not UTF-8 text ({error}). Convert it, or give another."
                ) from error
    if not texts:
        raise FileFormatError(f"{str(path)!r} holds no text files ({', '.join(_READABLE)}).")
    if len(texts) == 1:
        cut = len(texts[0]) * 4 // 5
        return [texts[0][cut:] if split == "held_out" else texts[0][:cut]]
    return [text for index, text in enumerate(texts) if (index % 5 == 4) == (split == "held_out")]


def token_windows(subject: Subject, texts: Sequence[str], length: int, count: int, seed: int = 0) -> Tensor:
    """``count`` windows ``(count, length)`` of consecutive tokens, drawn without overlap, long documents first.

    A window comes from one document where one is long enough; short documents are joined. Raises OptionError where the
    text is too short for even one.
    """
    if length < 2 or count < 1:
        raise OptionError(f"Need a length of at least 2 tokens and at least one window; got {length}, {count}.")
    limit = subject.max_length
    if limit is not None and length > limit:
        raise OptionError(f"{subject.name} was made for at most {limit} tokens; got --length {length}.")
    order = list(texts)
    random.Random(seed).shuffle(order)
    whole: list[Tensor] = []
    rest: list[Tensor] = []
    for text in order:
        if len(whole) >= 4 * count:
            break
        tokens = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor(tokens, dtype=torch.int64)
        pieces = ids.split(length)
        whole.extend(piece for piece in pieces if len(piece) == length)
        rest.extend(piece for piece in pieces if len(piece) < length)
    if len(whole) < count and rest:
        whole.extend(piece for piece in torch.cat(rest).split(length) if len(piece) == length)
    if not whole:
        have = sum(map(len, rest))
        raise OptionError(
            f"The text has {have} tokens, too few for one window of {length}. Give more, or less --length."
        )
    random.Random(seed).shuffle(whole)
    return torch.stack(whole[:count])


def text_bytes(subject: Subject, ids: Tensor) -> int:
    """Bytes of the text that these tokens stand for."""
    return len(subject.tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode("utf-8"))


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Next-token log-probabilities ``(length - 1, vocabulary)``."""
    return model(input_ids=window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


Call = tuple[Mechanism, tuple[Tensor, ...], dict[str, Any]]


@contextmanager
def watched_calls(mechanisms: Sequence[Mechanism]) -> Iterator[list[Call]]:
    """Every call of these mechanisms inside: the mechanism, its tensors and its keywords, in order."""
    seen: list[Call] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(module, Mechanism)
        seen.append((module, inputs, keywords))

    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in dict.fromkeys(mechanisms)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mechanism_calls(model: PreTrainedModel, mechanisms: Sequence[Mechanism], window: Tensor) -> list[Call]:
    """What the mechanisms inside a model are called with while it reads ``window``, layer by layer."""
    with watched_calls(mechanisms) as seen:
        log_probabilities(model, window)
    return seen
