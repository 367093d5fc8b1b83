"""Watching attention logits while a model trains: they grow before training becomes unstable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from regard.errors import OptionError, UnknownNameError
from regard.kernels import accumulation_dtype, expand_groups, score_scale
from regard.mechanism import SparseMechanism
from regard.retrofit.handle import open_sites
from regard.retrofit.sites import Selector, Site, discover, select
from regard.retrofit.switch import Call, Weights, switches

__all__ = ["LogitMonitor", "instability_flags"]

# Queries whose logits are formed at once.
_ROWS = 512


class LogitMonitor:
    """The largest absolute logit of every head, layer by layer, at every call: ``with LogitMonitor(model) as monitor:``
    around training or evaluation.

    Works on what :func:`regard.capture` works on (models of ``regard.nn`` and :class:`~regard.local.ls_attention.
    LongShortAttention` with its windowed executor, Hugging Face models, ``nn.MultiheadAttention``), whose output it
    leaves as it is. Logits are ``scale * q . k``, with the model's bias where there is one, over the pairs that a head
    sees. layers: which, as in :func:`regard.retrofit`. every: look at one call in so many of each layer; looking costs
    about a product of queries and keys.
    """

    def __init__(self, model: nn.Module, layers: Selector = None, every: int = 1) -> None:
        if every < 1:
            raise OptionError(f"every counts calls, so it is at least 1; got {every}.")
        self._model, self._sites = model, discover(model)
        self._chosen, self._every = select(self._sites, layers), every
        self._calls: dict[str, int] = {}
        self._seen: dict[str, list[Tensor]] = {}
        self._closing: ExitStack | None = None

    def __enter__(self) -> LogitMonitor:
        if self._closing is not None:
            raise OptionError("This monitor is in use already; make another one.")
        closing = ExitStack()
        try:
            for switch in open_sites(self._model, self._sites, self._chosen, closing, watching=True):
                switch.observers.append(self)
                closing.callback(switch.observers.remove, self)
        except BaseException:
            closing.close()
            raise
        self._closing = closing
        return self

    def __exit__(self, *exception: object) -> None:
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.close()

    @property
    def paths(self) -> list[str]:
        """Module paths of the layers that were seen, in the model's order."""
        return [site.path for site in self._chosen if site.path in self._seen]

    def history(self, path: str) -> Tensor:
        """Largest absolute logits of a layer, ``(calls, num_heads)``, the oldest first."""
        if path not in self._seen:
            raise UnknownNameError("watched layer", path, self.paths, f"Watched: {', '.join(self.paths) or 'nothing'}.")
        return torch.stack(self._seen[path])

    def latest(self) -> dict[str, Tensor]:
        """``(num_heads,)`` of each layer at its last call."""
        return {path: self._seen[path][-1] for path in self.paths}

    def peak(self) -> dict[str, Tensor]:
        """``(num_heads,)`` of each layer, the largest of all calls."""
        return {path: self.history(path).amax(0) for path in self.paths}

    def clear(self) -> None:
        """Forget all calls seen so far."""
        self._calls.clear()
        self._seen.clear()

    def observe(self, site: Site, call: Call, output: Tensor, weights: Weights) -> None:
        """What a watched layer calls."""
        count = self._calls.get(site.path, 0)
        self._calls[site.path] = count + 1
        if count % self._every == 0:
            self._seen.setdefault(site.path, []).append(_largest(site, call))


@torch.no_grad()
def _largest(site: Site, call: Call) -> Tensor:
    reading, heads = call.reading, call.query.shape[1]
    work, q_len, k_len = accumulation_dtype(call.query.dtype), call.query.shape[2], reading.keys
    query = call.query.to(work) * score_scale(call.query, call.scale)
    key = expand_groups(call.key[:, :, :k_len], heads).to(work)
    visible = _visible(site, call)
    largest = query.new_zeros(heads)
    for start in range(0, q_len, _ROWS):
        rows = slice(start, start + _ROWS)
        logits = query[:, :, rows] @ key.transpose(-1, -2)
        if reading.bias is not None:
            logits = logits + reading.bias.expand(-1, -1, q_len, -1)[:, :, rows].to(work)
        if visible is not None:
            logits = logits.masked_fill(~visible.expand(-1, -1, q_len, -1)[:, :, rows], 0)
        largest = torch.maximum(largest, logits.abs().amax((0, 2, 3)))
    return largest


def _visible(site: Site, call: Call) -> Tensor | None:
    """The pairs that the layer's heads see, boolean, broadcastable to the logits; None for all."""
    replacement = switches[id(site.module)].replacement
    mechanism = site.module if replacement is None else replacement.mechanism
    reading = call.reading
    if isinstance(mechanism, SparseMechanism):
        key = call.key[:, :, : reading.keys]
        request = mechanism.request(
            call.query, key, call.value[:, :, : reading.keys], reading.causal, reading.mask, call.grid, call.scale
        )
        return mechanism.select(call.query, key, request).dense()
    rule = reading.visible
    return None if rule is None else rule.dense(call.query.shape[2], reading.keys, call.query.device)


def instability_flags(losses: Sequence[float], factor: float = 1.5) -> list[bool]:
    """Where a loss curve spikes: above ``factor`` times the least loss before it, or no finite number."""
    if factor <= 1:
        raise OptionError(f"A spike lies above the running minimum, so factor must exceed 1; got {factor}.")
    flags, least = [], math.inf
    for loss in losses:
        flags.append(not math.isfinite(loss) or loss > factor * least)
        least = min(least, loss) if math.isfinite(loss) else least
    return flags
