"""How a sequence is dealt: every token once, work counted pair by pair, documents that travel along."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.parallel.shards import Sharding
from regard.parallel.ulysses import head_shares

DEALS = ("contiguous", "zigzag", "striped")


def visible(length: int, ids: list[int] | None, causal: bool) -> torch.Tensor:
    seen = torch.ones(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen[i, j] = (not causal or j <= i) and (ids is None or ids[i] == ids[j])
    return seen


def test_windows_to_either_side() -> None:
    sharding, place = Sharding.zigzag(19, 3, documents=[0] * 8 + [1] * 11), torch.arange(19)
    near = (place[:, None] - place).abs() < 4
    for causal in (True, False):
        seen = visible(19, [0] * 8 + [1] * 11, causal) & near
        for rank in range(3):
            assert sharding.work(rank, causal, 4) == int(seen[sharding.positions(rank)].sum())
            for source in range(3):
                block = seen[sharding.positions(rank)][:, sharding.positions(source)]
                assert torch.equal(sharding.ranges(rank, source, causal, 4).dense()[0, 0], block)
    # In contiguous shards, a window reaches the next rank alone.
    assert Sharding.contiguous(64, 8).hops(True, 9) == [(1, 1)] * 7 + [(0, 0)]
    with pytest.raises(OptionError, match="at least 1; got 0"):
        sharding.work(0, True, 0)


@pytest.mark.parametrize("ids", [None, [7] * 5 + [2] + [4] * 12 + [1] * 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_ranges_pairs_and_work_count_what_is_visible(deal: Any, ranks: int, causal: bool, ids: Any) -> None:
    sharding, seen = Sharding.of(deal, 23, ranks, documents=ids), visible(23, ids, causal)
    for rank in range(ranks):
        rows = seen[sharding.positions(rank)]
        for source in range(ranks):
            block = rows[:, sharding.positions(source)]
            assert torch.equal(sharding.ranges(rank, source, causal).dense()[0, 0], block)
            assert int(sharding.pairs(causal)[rank, source]) == int(block.sum())
            assert sharding.ranges(rank, source, causal).pairs == int(block.sum())
        assert sharding.work(rank, causal) == int(rows.sum())


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize(("length", "ranks"), [(8, 4), (9, 4), (4, 4), (30, 7), (5, 1)])
def test_every_token_is_dealt_once_and_comes_back(deal: Any, length: int, ranks: int) -> None:
    sharding, x = Sharding.of(deal, length, ranks), torch.randn(2, length, 3)
    parts = [sharding.shard(x, rank, 1) for rank in range(ranks)]
    assert [part.shape[1] for part in parts] == list(sharding.lengths)
    assert torch.equal(sharding.gather(parts, 1), x)
    assert torch.equal(sharding.gather([sharding.positions(rank) for rank in range(ranks)], 0), torch.arange(length))
    assert max(sharding.lengths) - min(sharding.lengths) <= (2 if deal == "zigzag" else 1)


def test_the_deals() -> None:
    assert [part.tolist() for part in Sharding.contiguous(8, 2).parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [part.tolist() for part in Sharding.zigzag(8, 2).parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [part.tolist() for part in Sharding.striped(8, 2).parts] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [part.tolist() for part in Sharding.striped(8, 2, stripe=2).parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_balance_of_causal_work() -> None:
    """Contiguous: the last of P ranks has P^2 - (P - 1)^2 of P^2 parts, 2 - 1/P times the mean; zig-zag: equal."""
    length, ranks = 4096, 8
    assert abs(Sharding.contiguous(length, ranks).imbalance() - (2 - 1 / ranks)) < 1e-3
    zigzag = Sharding.zigzag(length, ranks)
    assert len({zigzag.work(rank) for rank in range(ranks)}) == 1
    assert sum(zigzag.work(rank) for rank in range(ranks)) == length * (length + 1) // 2
    assert 1 < Sharding.striped(length, ranks).imbalance() < 1.002
    assert Sharding.contiguous(length, ranks).imbalance(causal=False) == 1


def test_stripes_balance_packed_documents_where_the_zigzag_does_not() -> None:
    limits = [0, 3000, 3100, 3200, 4096]
    zigzag, striped = (Sharding.of(deal, 4096, 8, cumulative_lengths=limits) for deal in ("zigzag", "striped"))  # type: ignore[arg-type]
    assert striped.imbalance() < 1.01 < zigzag.imbalance()


def test_documents_by_ids_by_limits_and_per_sequence() -> None:
    ids = torch.tensor([3, 3, 0, 0, 0, 9])
    by_ids = Sharding.contiguous(6, 2, documents=ids)
    by_limits = Sharding.contiguous(6, 2, cumulative_lengths=torch.tensor([0, 2, 5, 6]))
    assert torch.equal(by_ids.pairs(), by_limits.pairs())
    assert by_ids.positions(1, restart=True).tolist() == [[1, 2, 0]]
    assert by_ids.positions(1).tolist() == [3, 4, 5]
    both = Sharding.contiguous(6, 2, documents=torch.stack((ids, torch.zeros(6, dtype=torch.int64))))
    assert both.batch == 2 and both.positions(1, restart=True).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert torch.equal(both.pairs(), by_ids.pairs() + Sharding.contiguous(6, 2).pairs())
    assert Sharding.contiguous(6, 2).positions(1, restart=True).tolist() == [[3, 4, 5]]


def test_teams_put_their_tokens_together() -> None:
    teams = Sharding.zigzag(16, 4, documents=[0] * 10 + [1] * 6).merged(2)
    assert [part.tolist() for part in teams.parts] == [part.tolist() for part in Sharding.zigzag(16, 2).parts]
    assert torch.equal(teams.pairs(), Sharding.zigzag(16, 2, documents=[0] * 10 + [1] * 6).pairs())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"), [(8, 8, 4), (8, 2, 4), (8, 1, 8), (12, 6, 4), (5, 5, 2), (6, 3, 4)]
)
def test_heads_are_dealt_with_the_keys_they_read(heads: int, kv_heads: int, ranks: int) -> None:
    shares = head_shares(heads, kv_heads, ranks)
    assert [h for share in shares for h in range(heads)[share.query]] == list(range(heads))
    for share in shares:
        own = list(range(heads))[share.query]
        reads = share.reads or [i * share.num_kv_heads // len(own) for i in range(len(own))]
        assert [list(range(kv_heads))[share.key][read] for read in reads] == [h // (heads // kv_heads) for h in own]
    assert max(share.num_heads for share in shares) - min(share.num_heads for share in shares) <= 1


def test_what_cannot_be_dealt_is_refused() -> None:
    def refused(make: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            make()

    refused(lambda: Sharding.zigzag(3, 4), OptionError, "3 tokens cannot be dealt to 4 ranks")
    refused(lambda: Sharding.of("spiral", 8, 2), OptionError, "contiguous, zigzag, striped")  # type: ignore[arg-type]
    refused(lambda: Sharding.striped(8, 4, stripe=3), OptionError, "at most 2 here")
    refused(lambda: Sharding([torch.tensor([0, 1]), torch.tensor([1])]), OptionError, "exactly once")
    refused(lambda: Sharding([torch.tensor([1, 0])]), OptionError, "ascending order")
    refused(lambda: Sharding([]), OptionError, "exactly once")
    refused(lambda: Sharding.contiguous(4, 2, documents=[0, 1, 0, 1]), OptionError, "comes back later")
    refused(lambda: Sharding.contiguous(4, 2, documents=[0, 1]), ShapeError, "of 4 tokens")
    refused(lambda: Sharding.contiguous(4, 2, cumulative_lengths=[0, 3]), OptionError, "from 0 to the length 4")
    refused(
        lambda: Sharding.contiguous(4, 2, documents=[0, 0, 0, 0], cumulative_lengths=[0, 4]), OptionError, "not both"
    )
    sharding = Sharding.contiguous(5, 2)
    refused(lambda: sharding.positions(2), OptionError, "ranks 0 to 1")
    refused(lambda: sharding.shard(torch.zeros(4), 0, 0), ShapeError, "needs 5 tokens")
    refused(lambda: sharding.gather([torch.zeros(3), torch.zeros(3)], 0), ShapeError, "rank 1's part needs 2 tokens")
    refused(lambda: sharding.gather([torch.zeros(3)], 0), ShapeError, "2 parts, got 1")
    refused(lambda: sharding.merged(3), OptionError, "teams of 3")
    refused(lambda: head_shares(2, 2, 4), OptionError, "too few for 4 ranks")
