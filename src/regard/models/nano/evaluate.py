"""How well nano predicts text it never saw, beside two baselines that know no context beyond theirs.

``python -m regard.models.nano.evaluate`` measures, on every byte of the held-out modules: nano in windows of
2048 tokens, ``xz -9e``, and a bigram of nano's own tokens. It prints a table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.models.nano import WEIGHTS, load_nano, load_tokenizer
from regard.models.nano.corpus import Module, read_corpus
from regard.models.nano.train import encode, token_bytes, token_losses

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

__all__ = ["Bigram", "bits_per_byte", "evaluate", "main", "table", "window_nats", "xz_bits"]

WINDOW = 2048
SHORT_WINDOW = 256
BUCKETS = ((0, 256), (256, 512), (512, 1024), (1024, 2048))
"""Positions in a window, in tokens, first included, last excluded."""


@torch.no_grad()
def window_nats(model: LlamaForCausalLM, tokens: Tensor, window: int = WINDOW) -> Tensor:
    """Nats of each token after the first, each predicted from its own window only.

    ``tokens`` (1 + length,) are cut into windows of ``window`` inputs, the last one shorter; gives (length,).
    """
    inputs, targets = tokens[:-1], tokens[1:]
    whole = len(inputs) // window * window
    parts: list[Tensor] = []
    # Batches of equal memory, whatever the window.
    for start in range(0, whole, max(window, WINDOW)):
        end = min(start + max(window, WINDOW), whole)
        rows = inputs[start:end].view(-1, window), targets[start:end].view(-1, window)
        parts.append(token_losses(model, *rows))
    if whole < len(inputs):
        parts.append(token_losses(model, inputs[None, whole:], targets[None, whole:]))
    return torch.cat(parts) if parts else torch.empty(0)


def xz_bits(text: str, primer: str = "") -> float:
    """Bits per byte of ``text`` under ``xz -9e``; with ``primer``, what ``text`` adds after it."""

    def size(data: str) -> int:
        return len(lzma.compress(data.encode(), preset=9 | lzma.PRESET_EXTREME)) if data else 0

    return 8 * (size(primer + text) - size(primer)) / len(text.encode())


class Bigram:
    """Next-token probabilities from pair counts, drawn towards the unigram by ``prior`` pseudo-counts.

    p(b | a) = (count(a, b) + prior * p(b)) / (count(a) + prior), with p(b) smoothed by one count.
    """

    def __init__(self, documents: Sequence[Tensor], vocabulary: int, prior: float) -> None:
        self.prior = prior
        pairs = torch.cat([document[:-1] * vocabulary + document[1:] for document in documents])
        self.pairs = torch.bincount(pairs, minlength=vocabulary * vocabulary).view(vocabulary, vocabulary)
        self.firsts = self.pairs.sum(1)
        seconds = self.pairs.sum(0) + 1
        self.unigram = seconds / seconds.sum()

    @classmethod
    def tuned(cls, documents: Sequence[Tensor], vocabulary: int) -> Bigram:
        """The bigram whose prior is best on every tenth of ``documents``, then counted on all of them."""
        apart = documents[::10]
        bigram = cls([d for i, d in enumerate(documents) if i % 10], vocabulary, 1.0)
        losses: dict[float, float] = {}
        for exponent in range(-2, 11):
            bigram.prior = 2.0**exponent
            losses[bigram.prior] = sum(bigram.nats(document).sum().item() for document in apart)
        return cls(documents, vocabulary, min(losses, key=losses.__getitem__))

    def nats(self, tokens: Tensor) -> Tensor:
        """Nats of each token after the first: (1 + length,) in, (length,) out."""
        first, second = tokens[:-1], tokens[1:]
        numerator = self.pairs[first, second] + self.prior * self.unigram[second]
        return -(numerator / (self.firsts[first] + self.prior)).log()


def bits_per_byte(nats: Tensor, text_bytes: Tensor) -> float:
    """Bits per byte from nats and bytes of the same tokens."""
    total = text_bytes.sum().item()
    return nats.double().sum().item() / math.log(2) / total if total else math.nan


def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, train: Sequence[Module], held_out: Sequence[Module]
) -> dict[str, Any]:
    """All figures, in bits per byte unless named otherwise.

    Position buckets count whole windows only, so that every bucket holds the same windows. Beside each stands
    the same tokens' figure in windows of 256 tokens: what is lost where the model cannot look far back.
    """
    lengths = token_bytes(tokenizer)
    documents = [tokens for _, tokens in encode(tokenizer, held_out)]
    all_bytes = torch.cat([lengths[document[1:]] for document in documents])
    long, short, whole_bytes = [], [], []
    nats = []
    for document in documents:
        scores = window_nats(model, document)
        whole = len(scores) // WINDOW * WINDOW
        nats.append(scores)
        if whole:
            long.append(scores[:whole].view(-1, WINDOW))
            short.append(window_nats(model, document[: whole + 1], SHORT_WINDOW).view(-1, WINDOW))
            whole_bytes.append(lengths[document[1 : whole + 1]].view(-1, WINDOW))
    in_long, in_short, in_bytes = (
        torch.cat(part) if part else torch.empty(0, WINDOW) for part in (long, short, whole_bytes)
    )
    bigram = Bigram.tuned([tokens for _, tokens in encode(tokenizer, train)], tokenizer.get_vocab_size())
    text = "".join(module.text for module in held_out)
    return {
        "modules": len(held_out),
        "bytes": len(text.encode()),
        "tokens": int(all_bytes.numel()),
        "bytes_per_token": all_bytes.mean().item(),
        "nano": bits_per_byte(torch.cat(nats), all_bytes),
        "whole_windows": len(in_long),
        "by_position": [
            {
                "first": first,
                "last": last,
                "nano": bits_per_byte(in_long[:, first:last], in_bytes[:, first:last]),
                "same_tokens_in_short_windows": bits_per_byte(in_short[:, first:last], in_bytes[:, first:last]),
            }
            for first, last in BUCKETS
        ],
        "bigram": bits_per_byte(torch.cat([bigram.nats(document) for document in documents]), all_bytes),
        "bigram_prior": bigram.prior,
        "xz": xz_bits(text),
        "xz_after_train_text": xz_bits(text, primer="".join(module.text for module in train)),
    }


def table(report: dict[str, Any]) -> str:
    """The figures for reading."""
    lines = [
        f"{report['bytes']} bytes of {report['modules']} held-out modules",
        f"{report['bytes_per_token']:.3f} bytes a token",
        "",
        f"{'bits per byte':<34}",
        f"  {'nano, windows of 2048 tokens':<32}{report['nano']:.4f}",
        f"  {'xz -9e':<32}{report['xz']:.4f}",
        f"  {'xz -9e after the train text':<32}{report['xz_after_train_text']:.4f}",
        f"  {'bigram of the same tokens':<32}{report['bigram']:.4f}",
        "",
        f"nano by position, {report['whole_windows']} whole windows",
        f"  {'position':<16}{'window 2048':>12}{'same tokens, window 256':>26}",
    ]
    for row in report["by_position"]:
        position = f"{row['first']}-{row['last']}"
        lines.append(f"  {position:<16}{row['nano']:>12.4f}{row['same_tokens_in_short_windows']:>26.4f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m regard.models.nano.evaluate", description="Measure nano.")
    parser.add_argument("--json", type=Path, default=WEIGHTS / "evaluation.json", help="file the figures go to")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer().backend_tokenizer
    report = evaluate(load_nano(), tokenizer, read_corpus("train"), read_corpus("held_out"))
    report["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
