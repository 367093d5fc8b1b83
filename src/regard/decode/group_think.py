"""Group Think: one model decodes several thinkers at once, and each sees what all of them wrote up to the step before.

Hsu et al., "Group Think: Multiple Concurrent Reasoning Agents Collaborating at Token Level Granularity", 2025, arXiv
2505.11107. Token ``k + 1`` of thinker ``n`` is drawn from

    p(x[n, k + 1] | prompt, x[1, 1..k], ..., x[N, 1..k]):

tokens of one step are drawn apart. Keys and values of all thinkers lie in one cache in the order of time, so a mask by
step instead of position says all: query ``(n, k)`` sees key ``(m, j)`` if ``j < k`` or ``(m, j) = (n, k)``. That query
gives token ``k + 1``, so what the others write reaches it one step later than in the formula; ``same_step=True`` lets
it see ``j = k`` too, and is the formula to the letter.
Thinker ``n`` owns a slot of position ids, ``prompt + n * slot + (k - 1)``, so that its own text looks like ordinary
text to rotary positions; the order in the cache means nothing to them.

A step is one forward pass of ``N`` tokens, in one of two forms that give the same numbers: ``"interleaved"`` puts them
into one sequence, ``"batched"`` into ``N`` sequences whose new keys are then shared along the key axis. The weights are
read once a step, so where reading them takes the time, ``N`` thinkers take little longer than one.

The exact size of a slot, and that a thinker's header stands inside it, are this library's choice: the paper leaves
them open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = [
    "GroupThinkDecoder",
    "GroupTrace",
    "SharedCache",
    "greedy",
    "group_logits",
    "group_mask",
    "group_positions",
    "teacher_forced_logprobs",
    "temperature_sampler",
]

Sampler = Callable[[Tensor], Tensor]
Visibility = str | Tensor

ABSENT = -1
"""Stands in a trace where a thinker had stopped."""


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token: ``(..., vocab)`` to ``(...)``."""
    return logits.argmax(-1)


def temperature_sampler(temperature: float = 1.0, seed: int = 0) -> Sampler:
    """A sampler that draws from ``softmax(logits / temperature)`` with its own random state."""
    if temperature <= 0:
        raise OptionError(f"temperature must be positive, got {temperature}; greedy is the limit of 0.")
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        chances = (logits.float() / temperature).softmax(-1).cpu()
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
        return drawn.view(logits.shape[:-1]).to(logits.device)

    return draw


def group_mask(
    prompt_len: int, thinkers: int, steps: int, visibility: Visibility = "all", *, same_step: bool = False
) -> Tensor:
    """Who sees whom in the interleaved order: boolean ``(T, T)``, ``T = prompt_len + thinkers * steps``.

    The prompt comes first and is causal; then step 1 of all thinkers, step 2, and so on. visibility: ``"all"``,
    ``"self"`` (independent chains), or a boolean ``(thinkers, thinkers)``: row ``n`` says whom thinker ``n`` sees (its
    own tokens always). same_step: whether it sees them in the very step that is read, too.
    """
    _check_sizes(prompt_len, thinkers, steps)
    sees = _graph(visibility, thinkers)
    index = torch.arange(thinkers * steps)
    owner, step = index % thinkers, index.div(thinkers, rounding_mode="floor")
    length = prompt_len + len(index)
    mask = torch.eye(length, dtype=torch.bool)
    mask[:, :prompt_len] = torch.arange(prompt_len) <= torch.arange(length)[:, None]
    earlier = step <= step[:, None] if same_step else step < step[:, None]
    mask[prompt_len:, prompt_len:] |= earlier & sees[owner][:, owner]
    return mask


def group_positions(prompt_len: int, thinkers: int, steps: int, slot: int) -> Tensor:
    """Position ids ``(T,)`` in the interleaved order: thinker ``n`` (from 0) stands at ``prompt_len + n * slot`` on."""
    _check_sizes(prompt_len, thinkers, steps)
    if slot < steps:
        raise OptionError(f"A slot of {slot} positions is too short for {steps} steps; slots would overlap.")
    own = slot * torch.arange(thinkers) + torch.arange(steps)[:, None]
    return torch.cat((torch.arange(prompt_len), prompt_len + own.flatten()))


def _check_sizes(prompt_len: int, thinkers: int, steps: int) -> None:
    if prompt_len < 1 or thinkers < 1 or steps < 0:
        raise OptionError(
            f"Need a prompt of at least one token, one thinker and no negative steps; got prompt_len {prompt_len}, "
            f"thinkers {thinkers}, steps {steps}."
        )


def _graph(visibility: Visibility, thinkers: int) -> Tensor:
    """Boolean ``(thinkers, thinkers)``, its diagonal True."""
    own = torch.eye(thinkers, dtype=torch.bool)
    if isinstance(visibility, Tensor):
        if visibility.shape != own.shape or visibility.dtype != torch.bool:
            raise ShapeError(
                f"A visibility graph is boolean ({thinkers}, {thinkers}), row n saying whom thinker n sees; got "
                f"{visibility.dtype} {tuple(visibility.shape)}."
            )
        return visibility.cpu() | own
    if visibility not in ("all", "self"):
        raise OptionError(f"visibility is 'all', 'self' or a boolean tensor; got {visibility!r}.")
    return torch.ones_like(own) if visibility == "all" else own


def group_logits(
    model: Any,
    prompt: Tensor,
    tokens: Tensor,
    *,
    slot: int | None = None,
    visibility: Visibility = "all",
    same_step: bool = False,
) -> Tensor:
    """Logits ``(batch, thinkers, steps, vocab)`` of each token of a group trace, in one parallel pass.

    prompt ``(batch, prompt_len)``; tokens ``(batch, thinkers, steps)``, -1 where a thinker had stopped. Row ``[n, k]``
    predicts ``tokens[n, k]``; all thinkers' first tokens come from the end of the prompt.
    """
    batch, thinkers, steps = _check_trace(prompt, tokens)
    length = prompt.shape[1]
    written = tokens[:, :, :-1].transpose(1, 2).flatten(1)
    present = torch.cat((torch.ones_like(prompt, dtype=torch.bool), written >= 0), 1)
    mask = group_mask(length, thinkers, steps - 1, visibility, same_step=same_step).to(prompt.device)
    # A token that is absent is hidden from all but itself, so that no row is empty.
    seen = mask & (present[:, None] | torch.eye(len(mask), dtype=torch.bool, device=prompt.device))
    positions = group_positions(length, thinkers, steps - 1, slot or steps).to(prompt.device)
    _check_room(model, length, thinkers, slot or steps)
    ids = torch.cat((prompt, written.clamp_min(0)), 1)
    logits = _forward(model, ids, positions.expand(batch, -1), seen[:, None], None)
    first = logits[:, length - 1 : length, None].expand(-1, -1, thinkers, -1)
    later = logits[:, length:].unflatten(1, (steps - 1, thinkers))
    return torch.cat((first, later), 1).transpose(1, 2)


def teacher_forced_logprobs(
    model: Any,
    prompt: Tensor,
    tokens: Tensor,
    *,
    slot: int | None = None,
    visibility: Visibility = "all",
    same_step: bool = False,
) -> Tensor:
    """Log probability (nats) of each token of a finished trace, ``(batch, thinkers, steps)``; 0 where it is absent."""
    logits = group_logits(model, prompt, tokens, slot=slot, visibility=visibility, same_step=same_step)
    scores = logits.log_softmax(-1)
    chosen = scores.gather(-1, tokens.clamp_min(0)[..., None])[..., 0]
    return chosen.masked_fill(tokens < 0, 0.0)


def _check_trace(prompt: Tensor, tokens: Tensor) -> tuple[int, int, int]:
    _check_prompt(prompt)
    if tokens.dim() != 3 or tokens.shape[0] != prompt.shape[0] or not tokens.shape[2]:
        raise ShapeError(
            f"A trace is tokens (batch, thinkers, steps) for a prompt of batch {prompt.shape[0]}; got "
            f"{tuple(tokens.shape)}."
        )
    batch, thinkers, steps = tokens.shape
    return batch, thinkers, steps


def _check_prompt(prompt: Tensor) -> None:
    if prompt.dim() != 2 or not prompt.shape[1] or prompt.is_floating_point():
        raise ShapeError(f"A prompt is token ids (batch, length), one length for all; got {tuple(prompt.shape)}.")


def _check_room(model: Any, prompt_len: int, thinkers: int, slot: int) -> None:
    room, needed = getattr(model.config, "max_position_embeddings", None), prompt_len + thinkers * slot
    if room is not None and needed > room:
        raise OptionError(
            f"A prompt of {prompt_len} tokens and {thinkers} slots of {slot} need {needed} positions, but the model "
            f"knows {room}. Take fewer thinkers, fewer steps or a smaller slot."
        )


def _forward(model: Any, ids: Tensor, positions: Tensor, seen: Tensor, cache: Any) -> Tensor:
    """Logits ``(batch, tokens, vocab)``. seen: boolean ``(batch, 1, tokens, keys)``."""
    # Additive: every attention implementation of transformers reads it, eager ones no boolean.
    blocked = torch.zeros(seen.shape, dtype=model.dtype, device=ids.device)
    blocked.masked_fill_(~seen, torch.finfo(model.dtype).min)
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=blocked,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits
    return logits


class SharedCache:
    """The keys and values of a prompt and of all its thinkers, and whose each is.

    model: a causal language model of transformers. prompt ``(batch, length)``. ``logits`` ``(batch, vocab)`` are those
    after the prompt. owners ``(keys,)``: the thinker of each key, -1 for the prompt.
    """

    def __init__(self, model: Any, prompt: Tensor, visibility: Visibility, thinkers: int) -> None:
        from transformers import DynamicCache

        self.model, self.sees = model, _graph(visibility, thinkers).to(prompt.device)
        # Without a configuration every layer keeps all keys: a sliding window would count them in the wrong order.
        self.cache = DynamicCache()
        call: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            call["logits_to_keep"] = 1
        self.logits: Tensor = model(input_ids=prompt, **call).logits[:, -1]
        self.owners = torch.full(prompt.shape[1:], ABSENT, device=prompt.device)
        self.present = torch.ones_like(prompt, dtype=torch.bool)

    def feed(self, tokens: Tensor, owners: Tensor, positions: Tensor, among: Tensor, batched: bool = False) -> Tensor:
        """Write tokens ``(batch, new)`` of ``owners (new,)`` and give the logits after each, ``(batch, new, vocab)``.

        among: boolean ``(new, new)``, who of the new tokens sees whom. batched: every token in a sequence of its own;
        none sees another then.
        """
        past = self.present[:, None] & ((self.owners < 0) | self.sees[owners][:, self.owners.clamp_min(0)])
        here = tokens >= 0
        ids, new = tokens.clamp_min(0), tokens.shape[1]
        if batched:
            logits = self._feed_rows(ids, positions, past)
        else:
            own = torch.eye(new, dtype=torch.bool, device=tokens.device)
            seen = torch.cat((past, (among & here[:, None]) | own), 2)
            logits = _forward(self.model, ids, positions.expand(len(ids), -1), seen[:, None], self.cache)
        self.owners, self.present = torch.cat((self.owners, owners)), torch.cat((self.present, here), 1)
        return logits

    def _feed_rows(self, ids: Tensor, positions: Tensor, past: Tensor) -> Tensor:
        batch, new = ids.shape
        kept = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.cache.batch_repeat_interleave(new)
        seen = torch.cat((past.flatten(0, 1), past.new_ones(batch * new, 1)), 1)[:, None, None]
        logits = _forward(self.model, ids.view(-1, 1), positions.repeat(batch)[:, None], seen, self.cache)
        for layer, old in zip(self.cache.layers, kept, strict=True):
            layer.keys, layer.values = (
                torch.cat((shared, rows[:, :, -1].unflatten(0, (batch, new)).transpose(1, 2)), 2)
                for shared, rows in zip(old, (layer.keys, layer.values), strict=True)
            )
        return logits.view(batch, new, -1)


@dataclass(frozen=True)
class GroupTrace:
    """What a group wrote: tokens ``(batch, thinkers, steps)``, headers included, -1 where a thinker had stopped.

    logits ``(batch, thinkers, steps, vocab)``: what each token was drawn from, where they were asked for.
    """

    prompt: Tensor
    tokens: Tensor
    slot: int
    logits: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each thinker, ``(batch, thinkers)``."""
        return (self.tokens >= 0).sum(-1)


class GroupThinkDecoder:
    """Decodes ``n_thinkers`` thinkers of one model together, one token each per step.

    model: a causal language model of transformers (it takes ``position_ids`` and a mask of four axes). max_steps: steps
    after the longest header. slot: position ids per thinker (default: as many as steps). sampler: logits ``(batch,
    thinkers, vocab)`` to tokens ``(batch, thinkers)``. stop: token ids that end a thinker; it is frozen then, its keys
    stay visible. visibility, same_step: as in :func:`group_mask`. form: ``"interleaved"`` or ``"batched"`` (whose
    sequences cannot see the same step).
    """

    def __init__(
        self,
        model: Any,
        n_thinkers: int = 4,
        max_steps: int = 64,
        *,
        slot: int | None = None,
        sampler: Sampler = greedy,
        stop: int | Collection[int] = (),
        visibility: Visibility = "all",
        same_step: bool = False,
        form: Literal["interleaved", "batched"] = "interleaved",
    ) -> None:
        if n_thinkers < 1 or max_steps < 1:
            raise OptionError(f"Need at least one thinker and one step; got {n_thinkers} and {max_steps}.")
        if form not in ("interleaved", "batched"):
            raise OptionError(f"form is 'interleaved' or 'batched'; got {form!r}.")
        if same_step and form == "batched":
            raise OptionError("Sequences of one batch share keys after a step: same_step needs form='interleaved'.")
        _graph(visibility, n_thinkers)
        self.model, self.n_thinkers, self.max_steps = model, n_thinkers, max_steps
        self.slot, self.sampler, self.visibility, self.form = slot, sampler, visibility, form
        self.same_step = same_step
        self.stop = torch.tensor([stop] if isinstance(stop, int) else sorted(stop), dtype=torch.int64)

    @torch.no_grad()
    def __call__(
        self, prompt: Tensor, headers: Sequence[Sequence[int]] | None = None, *, keep_logits: bool = False
    ) -> GroupTrace:
        """Decode. prompt ``(batch, length)``; headers: first tokens of each thinker, given instead of sampled, at the
        start of its slot (a thinker with a shorter header begins to write sooner)."""
        _check_prompt(prompt)
        given = self._headers(headers).to(prompt.device)
        steps = given.shape[1] + self.max_steps
        slot = steps if self.slot is None else self.slot
        positions = group_positions(prompt.shape[1], self.n_thinkers, steps, slot)[prompt.shape[1] :]
        positions = positions.view(steps, self.n_thinkers).to(prompt.device)
        _check_room(self.model, prompt.shape[1], self.n_thinkers, slot)
        shared = SharedCache(self.model, prompt, self.visibility, self.n_thinkers)
        logits = shared.logits[:, None].expand(-1, self.n_thinkers, -1)
        active = torch.ones(len(prompt), self.n_thinkers, dtype=torch.bool, device=prompt.device)
        among = group_mask(1, self.n_thinkers, 1, self.visibility, same_step=self.same_step)[1:, 1:].to(prompt.device)
        tokens, kept = [], []
        # What all headers have in common in length is read in one pass.
        common = int((given >= 0).all(0).sum())
        if common and not keep_logits:
            tokens = [given[:, k].expand(len(prompt), -1) for k in range(common)]
            logits = self._read_headers(shared, given[:, :common], positions[:common])
        for k in range(len(tokens), steps):
            forced = given[:, k] if k < given.shape[1] else torch.full_like(positions[0], ABSENT)
            token = torch.where(forced >= 0, forced, self.sampler(logits))
            token = token.masked_fill(~active, ABSENT)
            tokens.append(token)
            kept.append(logits)
            active = active & ~(torch.isin(token, self.stop.to(token.device)) & (forced < 0))
            if k + 1 == steps or not active.any():
                break
            running = (token >= 0).any(0).nonzero()[:, 0]
            found = shared.feed(
                token[:, running], running, positions[k, running], among[running][:, running], self.form == "batched"
            )
            logits = logits.index_copy(1, running, found)
        return GroupTrace(prompt, torch.stack(tokens, 2), slot, torch.stack(kept, 2) if keep_logits else None)

    def _read_headers(self, shared: SharedCache, given: Tensor, positions: Tensor) -> Tensor:
        thinkers, length = given.shape
        among = group_mask(1, thinkers, length, self.visibility, same_step=self.same_step)[1:, 1:].to(given.device)
        owners = torch.arange(thinkers, device=given.device).repeat(length)
        row = given.T.flatten().expand(len(shared.present), -1)
        return shared.feed(row, owners, positions.flatten(), among)[:, -thinkers:]

    def _headers(self, headers: Sequence[Sequence[int]] | None) -> Tensor:
        """``(thinkers, longest)``, -1 behind the end of each."""
        if headers is None:
            return torch.empty(self.n_thinkers, 0, dtype=torch.int64)
        if len(headers) != self.n_thinkers:
            raise OptionError(f"{len(headers)} headers for {self.n_thinkers} thinkers: give one each, empty if none.")
        longest = max(map(len, headers))
        rows = [list(header) + [ABSENT] * (longest - len(header)) for header in headers]
        return torch.tensor(rows, dtype=torch.int64).view(self.n_thinkers, longest)
