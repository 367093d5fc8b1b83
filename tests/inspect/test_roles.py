"""Roles of heads whose attention is prescribed, and of the library's own small model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError
from regard.inspect.roles import ROLES, head_roles, repeated_tokens
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
    assert set(ROLES) == {"previous", "duplicate", "induction", "sink", "even", "local", "global"}


def test_tokens_are_written_twice() -> None:
    tokens = repeated_tokens(100, 20, first=5)
    assert tokens.shape == (1, 40) and torch.equal(tokens[:, :20], tokens[:, 20:])
    assert len(set(tokens[0, :20].tolist())) == 20 and int(tokens.min()) >= 5
    assert repeated_tokens(4, 20).max() < 4
    with pytest.raises(OptionError):
        repeated_tokens(5, 4, first=4)
