"""Bigram-backcopy: a language in which one head is needed now and then, and is in the way otherwise.

After a start token comes a Markov chain with transitions ``P`` on ``vocab`` tokens, but for ``triggers``, the most
frequent of them: what follows a trigger is the token before it. A model thus needs bigrams, which take no attention,
and at triggers a look at the token before. The first token is no trigger, so that two triggers never stand together.

"Active-Dormant Attention Heads", 2024, arXiv 2410.13835, section 2.1 (there ``P`` are the bigrams of characters in
Shakespeare's plays). Token ids are ``0 ... vocab - 1``, and ``vocab`` is the start token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["bigram_backcopy", "bigram_transition", "frequencies", "trigger_tokens"]

# One chain for all who give none.
_SEED = 0


def bigram_backcopy(
    n: int,
    seq_len: int = 256,
    vocab: int | None = None,
    triggers: int | Sequence[int] = 3,
    transition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``n`` sequences ``(n, seq_len)`` int64, the start token first, and where triggers stand, boolean of this shape.

    triggers: how many of the most frequent tokens, or which. transition: ``P`` ``(vocab, vocab)``, rows of which sum
    to one (:func:`bigram_transition` reads it off a text); by default a fixed random chain on ``vocab`` tokens (64).
    """
    chain = _random_chain(64 if vocab is None else vocab) if transition is None else transition.double().cpu()
    _check_chain(chain, vocab)
    size = len(chain)
    which = torch.as_tensor(trigger_tokens(chain, triggers) if isinstance(triggers, int) else list(triggers))
    if not 0 < len(which) < size or int(which.min()) < 0 or int(which.max()) >= size:
        raise OptionError(f"Triggers are some of the tokens 0 to {size - 1}, and not all of them; got {triggers}.")
    if n < 1 or seq_len < 2:
        raise OptionError(f"Need at least one sequence of 2 tokens, the start token and another; got {n}, {seq_len}.")
    is_trigger = torch.zeros(size + 1, dtype=torch.bool)
    is_trigger[which] = True
    first = frequencies(chain).masked_fill(is_trigger[:-1], 0)
    tokens = torch.full((n, seq_len), size)
    tokens[:, 1] = torch.multinomial(first, n, replacement=True, generator=generator)
    below = chain.cumsum(-1)
    draws = torch.rand(seq_len, n, 1, dtype=torch.float64, generator=generator)
    for place in range(2, seq_len):
        now, before = tokens[:, place - 1], tokens[:, place - 2]
        # Rounding may leave the last sum below one.
        drawn = (draws[place] >= below[now, :-1]).sum(-1)
        tokens[:, place] = torch.where(is_trigger[now], before, drawn)
    return tokens, is_trigger[tokens]


def bigram_transition(text: str | bytes, vocab: int) -> Tensor:
    """``P`` ``(vocab, vocab)`` float64 of a text's characters (or bytes). Token ``i`` is the ``i``-th most frequent;
    pairs with rarer ones are left out. What nothing follows is followed by all, as often as they follow others."""
    ranks = {kind: rank for rank, (kind, _) in enumerate(Counter(text).most_common(vocab))}
    if vocab < 2 or len(ranks) < vocab:
        raise OptionError(f"The text has {len(ranks)} different characters; vocab is between 2 and that, got {vocab}.")
    places = torch.tensor([ranks.get(kind, -1) for kind in text])
    now, then = places[:-1], places[1:]
    seen = (now >= 0) & (then >= 0)
    counts = torch.bincount(now[seen] * vocab + then[seen], minlength=vocab * vocab).view(vocab, vocab).double()
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(1), counts.sum(0) / counts.sum())


def frequencies(transition: Tensor) -> Tensor:
    """How often each token comes up in a chain ``(vocab, vocab)`` in the long run, ``(vocab,)``."""
    # Half a chance to stay changes nothing in the long run, and lets chains with a period settle.
    lazy = (transition.double() + torch.eye(len(transition), dtype=torch.float64)) / 2
    return torch.linalg.matrix_power(lazy, 1 << 14).mean(0).clamp_min(0)


def trigger_tokens(transition: Tensor, count: int) -> list[int]:
    """The ``count`` tokens that come up most."""
    return [int(token) for token in frequencies(transition).argsort(descending=True, stable=True)[: max(count, 0)]]


def _random_chain(vocab: int) -> Tensor:
    """Few likely successors for each token, and a few tokens that come up often, as among characters of a text."""
    if vocab < 2:
        raise OptionError(f"A chain needs at least 2 tokens; got vocab={vocab}.")
    generator = torch.Generator().manual_seed(_SEED)
    popular = 1 / (1 + torch.arange(vocab, dtype=torch.float64))
    chain = popular * torch.rand(vocab, vocab, generator=generator, dtype=torch.float64).pow(4)
    return chain / chain.sum(-1, keepdim=True)


def _check_chain(chain: Tensor, vocab: int | None) -> None:
    if chain.dim() != 2 or chain.shape[0] != chain.shape[1] or (vocab is not None and len(chain) != vocab):
        raise ShapeError(
            f"transition is ({'vocab, vocab' if vocab is None else f'{vocab}, {vocab}'}), a row for each token; got "
            f"{tuple(chain.shape)}."
        )
    if bool((chain < 0).any()) or not torch.allclose(chain.sum(-1), torch.ones_like(chain[0]), atol=1e-6):
        raise OptionError("Rows of a transition are chances: not negative, with sum 1. Divide each row by its sum.")
