"""Roles of heads whose attention is prescribed, and of the library's own small model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.inspect.roles import ROLES, head_roles, repeated_tokens, repetition_losses
from regard.mechanism import Mechanism, Request
from regard.nn import MultiHeadAttention

LENGTH = 16
BACK = {"previous": 1, "duplicate": LENGTH, "induction": LENGTH - 1}


class Prescribed(Mechanism):
    """Every head looks a set number of tokens back (at the first token, where there are fewer); the last weighs all
    alike."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        length = query.shape[2]
        place = torch.arange(length)
        maps = torch.zeros(5, length, length)
        for head, back in enumerate([*BACK.values(), length]):
            maps[head, place, (place - back).clamp_min(0)] = 1
        maps[4] = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
        return maps.expand(query.shape[0], -1, -1, -1) @ value


class Model(nn.Module):
    """One layer of five prescribed heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(40, 10), MultiHeadAttention(10, 5, Prescribed())

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.attention(self.embed(tokens), causal=True)
        return out


@pytest.mark.parametrize("prefix", [None, torch.zeros(1, 3, dtype=torch.int64)])
def test_prescribed_heads_are_known_for_what_they_do(prefix: Tensor | None) -> None:
    model = Model()
    found = head_roles(model, model, 40, length=LENGTH, prefix=prefix)
    assert found.roles == [["previous", "duplicate", "induction", "sink", "even"]]
    for head, name in enumerate(BACK):
        assert float(found.scores[name][0, head]) == pytest.approx(1)
        others = [h for h in range(4) if h != head]
        assert float(found.scores[name][0, others].max()) < 0.1
        assert found.ranking(name)[0] == (0, head) and len(found.ranking(name)) == 5
    with pytest.raises(UnknownNameError, match="induction"):
        found.ranking("inductive")
    assert set(ROLES) == {"previous", "duplicate", "induction", "sink", "even", "local", "global"}


def test_tokens_are_written_twice() -> None:
    tokens = repeated_tokens(100, 20, first=5)
    assert tokens.shape == (1, 40) and torch.equal(tokens[:, :20], tokens[:, 20:])
    assert len(set(tokens[0, :20].tolist())) == 20 and int(tokens.min()) >= 5
    assert repeated_tokens(4, 20).max() < 4
    with pytest.raises(OptionError):
        repeated_tokens(5, 4, first=4)


@pytest.mark.parametrize("prefix", [None, torch.zeros(1, 3, dtype=torch.int64)])
def test_a_second_writing_is_as_easy_as_the_model_makes_it(prefix: Tensor | None) -> None:
    """Guesses alike until a token has stood before, and then its successor with nine chances of ten."""
    vocab, sure = 40, 0.9
    tokens = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(s))[:12] + 10 for s in (0, 1)])

    def run(given: Tensor) -> Tensor:
        logits = torch.zeros(*given.shape, vocab)
        for row, line in enumerate(given.tolist()):
            for place, token in enumerate(line):
                if token in line[:place]:
                    chances = torch.full((vocab,), (1 - sure) / (vocab - 1))
                    chances[line[line.index(token) + 1]] = sure
                    logits[row, place] = chances.log()
        return logits

    first, second = repetition_losses(run, tokens, prefix)
    assert first == pytest.approx(math.log(vocab), rel=1e-5) and second == pytest.approx(-math.log(sure), rel=1e-5)
    with pytest.raises(ShapeError, match="batch, length"):
        repetition_losses(run, tokens[0])
