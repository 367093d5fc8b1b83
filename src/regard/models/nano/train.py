"""Trains nano from nothing: its tokenizer, then its weights, on two CPU cores in under two hours.

``python -m regard.models.nano.train --minutes 100`` plans by training time: learning rate and context length
follow the share of the plan that is done, so the cool-down completes however fast the machine is. A killed
run goes on from its last checkpoint when started again with the same ``--out``.

The cores take the steps eagerly: at these sizes ``torch.compile`` gains nothing on a processor at a context
of 512 tokens and loses a third at 2048.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from regard.errors import OptionError
from regard.models.nano import END_OF_TEXT, WEIGHTS, require_transformers
from regard.models.nano.corpus import Module, read_corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

__all__ = [
    "Muon",
    "Plan",
    "Run",
    "Shape",
    "Windows",
    "cut",
    "encode",
    "main",
    "new_model",
    "orthogonalise",
    "token_bytes",
    "token_losses",
    "train_tokenizer",
]

WEIGHTS_LIMIT = 8_000_000
"""Bytes the exported safetensors file may take."""


@dataclass(frozen=True)
class Shape:
    """The size of the model."""

    vocabulary: int = 4096
    hidden: int = 192
    intermediate: int = 704
    layers: int = 6
    heads: int = 6
    key_value_heads: int = 2
    context: int = 2048


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run. ``steps`` or ``minutes`` ends it, whichever comes first."""

    out: Path = Path("runs/nano")
    weights: Path = WEIGHTS
    steps: int | None = None
    minutes: float | None = None
    threads: int = 2
    shape: Shape = field(default_factory=Shape)
    stages: tuple[tuple[float, int], ...] = ((0.0, 512), (0.35, 1024), (0.6, 2048))
    """(share of the plan at which the stage begins, context length in tokens)"""
    tokens_per_step: int = 4096
    matrix_rate: float = 0.02
    rest_rate: float = 0.004
    matrix_decay: float = 0.05
    warm_up: float = 0.02
    cool_down: float = 0.6
    """Share of the plan, at its end, over which the learning rates fall linearly to zero."""
    checkpoint_seconds: float = 180.0
    log_every: int = 20
    held_out_windows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise OptionError("The run has no end: give steps, minutes, or both.")
        longest = max(context for _, context in self.stages)
        if longest > self.shape.context or longest > self.tokens_per_step:
            raise OptionError(
                f"A stage trains at {longest} tokens, but the model's context is {self.shape.context} and a "
                f"step has {self.tokens_per_step} tokens. Shorten the stage, or raise shape.context and "
                "tokens_per_step."
            )

    def context_at(self, progress: float) -> int:
        """Context length in tokens at ``progress`` in [0, 1]."""
        return [context for start, context in self.stages if start <= progress][-1]

    def rate_at(self, progress: float) -> float:
        """Factor on the learning rates: linear warm-up, constant, linear cool-down to zero."""
        return max(0.0, min(1.0, (progress + 1e-3) / self.warm_up, (1.0 - progress) / self.cool_down))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text comes back exactly, and every token stands for a whole number of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text each token stands for, shape (vocabulary,); zero for the end-of-text token."""
    # Byte-level BPE writes each byte as one character, so a token's length is its number of bytes.
    lengths = [0] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return torch.tensor(lengths, dtype=torch.float32)


def encode(tokenizer: Tokenizer, modules: Sequence[Module]) -> list[tuple[str, Tensor]]:
    """Each module as its package and its tokens, end of text first, shape (1 + length,)."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([module.text for module in modules])
    return [
        (module.package, torch.tensor([end, *encoding.ids], dtype=torch.long))
        for module, encoding in zip(modules, encodings, strict=True)
    ]


def new_model(shape: Shape) -> LlamaForCausalLM:
    """A fresh float32 model; its attention and feed-forward layers start by adding nothing to the stream."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5 / 2)
    return model


class Windows:
    """An endless, resumable stream of windows of ``context + 1`` tokens.

    One pass cuts every module that is long enough at a random phase; what is left of it, and the short
    modules, are packed with their own package, then with the rest. No token comes twice in a pass.
    """

    def __init__(self, documents: Sequence[tuple[str, Tensor]], seed: int) -> None:
        self.documents = documents
        self.seed = seed
        self.passes = -1
        self.context = 0
        self.cursor = 0
        self._windows: list[Tensor] = []

    def next(self, context: int, count: int) -> Tensor:
        """The next ``count`` windows, shape (count, context + 1)."""
        if context != self.context:
            self._begin(self.passes + 1, context)
        rows = []
        for _ in range(count):
            if self.cursor >= len(self._windows):
                self._begin(self.passes + 1, context)
            rows.append(self._windows[self.cursor])
            self.cursor += 1
        return torch.stack(rows)

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "context": self.context, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["context"]:
            self._begin(state["passes"], state["context"])
        self.cursor = state["cursor"]

    def _begin(self, passes: int, context: int) -> None:
        self.passes, self.context, self.cursor = passes, context, 0
        order = random.Random(f"{self.seed}/{passes}/{context}")
        self._windows = cut(self.documents, context + 1, order)
        if not self._windows:
            total = sum(len(tokens) for _, tokens in self.documents)
            raise OptionError(f"{total} tokens of text do not fill one window of {context + 1}: train on more text.")
        order.shuffle(self._windows)


def cut(documents: Sequence[tuple[str, Tensor]], size: int, order: random.Random) -> list[Tensor]:
    """Cuts ``(package, tokens)`` documents into windows of ``size``, each from one document where it can be."""
    windows: list[Tensor] = []
    leftovers: dict[str, list[Tensor]] = {}
    for package, tokens in documents:
        count = len(tokens) // size
        start = order.randint(0, len(tokens) - count * size)
        end = start + count * size
        windows.extend(tokens[start:end].split(size) if count else ())
        leftovers.setdefault(package, []).extend(part for part in (tokens[:start], tokens[end:]) if len(part))
    rest: list[Tensor] = []
    for parts in [*leftovers.values(), rest]:
        order.shuffle(parts)
        joined = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        count = len(joined) // size
        windows.extend(joined[: count * size].split(size) if count else ())
        if parts is not rest:
            rest.append(joined[count * size :])
    return windows


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024), in float32.

    ``torch.optim.Muon`` iterates in bfloat16 and one matrix at a time, which processors without bfloat16
    units do slowly; here matrices of one shape go through together.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = parameter.shape
                wide = update if rows <= columns else update.T
                by_shape.setdefault((wide.shape[0], wide.shape[1]), []).append((parameter, wide))
            for entries in by_shape.values():
                updates = orthogonalise(torch.stack([wide for _, wide in entries]))
                for (parameter, _), update in zip(entries, updates, strict=True):
                    rows, columns = parameter.shape
                    update = update if rows <= columns else update.T
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return loss


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings the singular values of ``matrices`` (batch, rows <= columns) close to 1; keeps their vectors."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, b * gram + c * (gram @ gram), x, beta=a)
    return x


def token_losses(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, given its window up to it: (batch, length) twice in, (batch * length,) out."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


class Run:
    """A training run: what it has done so far, and how it goes on."""

    def __init__(self, plan: Plan, modules: Sequence[Module], held_out: Sequence[Module]) -> None:
        from tokenizers import Tokenizer

        plan.out.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        torch.manual_seed(plan.seed)
        self.tokenizer_path = plan.out / "tokenizer.json"
        if not self.tokenizer_path.exists():
            tokenizer = train_tokenizer((module.text for module in modules), plan.shape.vocabulary)
            _write(self.tokenizer_path, lambda path: tokenizer.save(str(path)))
        self.tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        self.bytes = token_bytes(self.tokenizer)
        self.windows = Windows(encode(self.tokenizer, modules), plan.seed)
        self.held_out = self._held_out_windows(held_out)
        self.model = new_model(plan.shape)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, plan.matrix_rate, weight_decay=plan.matrix_decay),
            torch.optim.AdamW(rest, plan.rest_rate, betas=(0.9, 0.97), weight_decay=0.0),
        ]
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        self.checkpoint_path = plan.out / "checkpoint.pt"
        if self.checkpoint_path.exists():
            self._resume()

    @property
    def progress(self) -> float:
        """Share of the plan that is done, in [0, 1]."""
        shares = [0.0]
        if self.plan.steps is not None:
            shares.append(self.step / self.plan.steps)
        if self.plan.minutes is not None:
            shares.append(self.seconds / (60 * self.plan.minutes))
        return min(1.0, max(shares))

    def train(self, after_step: Callable[[Run], None] | None = None) -> None:
        """Trains to the end of the plan, then exports the weights."""
        plan = self.plan
        last = saved = time.monotonic()
        logged_at, logged_tokens = self.seconds, self.tokens
        nats = text_bytes = targets_seen = 0.0
        while self.progress < 1.0:
            context = plan.context_at(self.progress)
            batch = self.windows.next(context, plan.tokens_per_step // context)
            self._set_rates(plan.rate_at(self.progress))
            inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            loss = token_losses(self.model, inputs, targets).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss is {loss.item()} at step {self.step}, where a finite number was expected: "
                    "lower --matrix-rate and start with a fresh --out."
                )
            loss.backward()
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            self.step += 1
            self.tokens += targets.numel()
            nats += loss.item() * targets.numel()
            targets_seen += targets.numel()
            text_bytes += self.bytes[targets].sum().item()
            if self.step % plan.log_every == 0 or self.progress >= 1.0:
                speed = (self.tokens - logged_tokens) / max(self.seconds - logged_at, 1e-9)
                logged_at, logged_tokens = self.seconds, self.tokens
                self._report(context, nats / targets_seen, nats / math.log(2) / text_bytes, speed)
                nats = text_bytes = targets_seen = 0.0
            if now - saved >= plan.checkpoint_seconds:
                self.save()
                self._say(f"step {self.step}: saved; held-out {self.held_out_bits():.4f} bits per byte")
                saved = time.monotonic()
            if after_step is not None:
                after_step(self)
        self.save()
        self.export()

    def save(self) -> None:
        """Writes the checkpoint; a kill at any moment leaves the old one or the new one, never half."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "windows": self.windows.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "log": self.log,
        }
        _write(self.checkpoint_path, lambda path: torch.save(state, path))

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """Bits per byte on a few fixed held-out windows, for watching; ``evaluate.py`` measures in full."""
        nats = text_bytes = 0.0
        for window in self.held_out:
            targets = window[None, 1:]
            nats += token_losses(self.model, window[None, :-1], targets).sum().item()
            text_bytes += self.bytes[targets].sum().item()
        return nats / math.log(2) / text_bytes if text_bytes else math.nan

    def export(self) -> None:
        """Writes bfloat16 weights, configuration, tokenizer and ``training.json`` to ``plan.weights``."""
        import safetensors
        import tokenizers
        import transformers

        folder = self.plan.weights
        folder.mkdir(parents=True, exist_ok=True)
        small = new_model(self.plan.shape).to(torch.bfloat16)
        small.load_state_dict(self.model.state_dict())
        small.save_pretrained(folder)
        file = folder / "model.safetensors"
        file.chmod(0o644)  # safetensors writes for the owner alone, which an installed package must not keep
        size = file.stat().st_size
        if size > WEIGHTS_LIMIT:
            raise OptionError(f"model.safetensors takes {size} bytes, more than {WEIGHTS_LIMIT}: make shape smaller.")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = asdict(self.plan)
        for name in ("out", "weights"):
            del settings[name]
        record = {
            "command": " ".join(["python -m regard.models.nano.train", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "plan": settings,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.step,
            "tokens": self.tokens,
            "passes_begun": self.windows.passes + 1,
            "training_minutes": round(self.seconds / 60, 2),
            "train_loss_nats_per_token": self.log[-1]["loss"] if self.log else None,
            "train_bits_per_byte": self.log[-1]["bits_per_byte"] if self.log else None,
            "held_out_bits_per_byte_watched": round(self.held_out_bits(), 4),
            "curve": self.log[:: max(1, len(self.log) // 100)],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        self._say(f"exported {size} bytes of weights")

    def _held_out_windows(self, modules: Sequence[Module]) -> list[Tensor]:
        size = self.plan.shape.context + 1
        windows = cut(encode(self.tokenizer, modules), size, random.Random(self.plan.seed))
        return windows[:: max(1, len(windows) // self.plan.held_out_windows)][: self.plan.held_out_windows]

    def _resume(self) -> None:
        state = torch.load(self.checkpoint_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.windows.load_state_dict(state["windows"])
        torch.set_rng_state(state["random"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.log = state["log"]
        self._say(f"resumed at step {self.step}, {self.progress:.1%} of the plan done")

    def _set_rates(self, factor: float) -> None:
        rates = (self.plan.matrix_rate, self.plan.rest_rate)
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor

    def _report(self, context: int, loss: float, bits: float, speed: float) -> None:
        self.log.append(
            {
                "step": self.step,
                "tokens": self.tokens,
                "context": context,
                "loss": loss,
                "bits_per_byte": bits,
            }
        )
        left = self.seconds * (1 - self.progress) / max(self.progress, 1e-9) / 60
        self._say(
            f"step {self.step}  {self.progress:6.1%}  context {context}  loss {loss:.4f}  "
            f"bits/byte {bits:.4f}  {speed:.0f} tokens/s  {self.tokens / 1e6:.2f} M tokens  "
            f"{left:.0f} min left"
        )

    def _say(self, line: str) -> None:
        print(f"{datetime.now():%H:%M:%S}  {line}", flush=True)


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    save(unfinished)
    os.replace(unfinished, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m regard.models.nano.train", description="Train nano.")
    parser.add_argument("--minutes", type=float, help="training time after which the run ends (default 100)")
    parser.add_argument("--steps", type=int, help="optimiser steps after which the run ends")
    parser.add_argument("--out", type=Path, default=Plan.out, help="folder of the checkpoint (default %(default)s)")
    parser.add_argument("--weights", type=Path, default=Plan.weights, help="folder the finished model goes to")
    parser.add_argument("--threads", type=int, default=Plan.threads)
    parser.add_argument("--matrix-rate", type=float, default=Plan.matrix_rate, help="learning rate of the matrices")
    parser.add_argument("--rest-rate", type=float, default=Plan.rest_rate, help="learning rate of all else")
    require_transformers("Training nano")
    options = vars(parser.parse_args(arguments))
    if options["minutes"] is None and options["steps"] is None:
        options["minutes"] = 100.0
    torch.set_num_threads(options["threads"])
    plan = Plan(**options)
    Run(plan, read_corpus("train"), read_corpus("held_out")).train()


if __name__ == "__main__":
    main()
