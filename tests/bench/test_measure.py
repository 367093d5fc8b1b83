"""Measuring: what is counted, and in which order."""

from __future__ import annotations

import pytest
import torch

from regard.bench.measure import interleaved, median_ratio, one_thread, peak_bytes


def test_calls_take_turns_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    taken = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert len(taken["a"]) == len(taken["b"]) == 3


def test_ratios_are_formed_pair_by_pair() -> None:
    assert median_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_one_thread_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def test_peak_counts_what_is_held_at_once() -> None:
    def hold() -> None:
        first = torch.ones(1000)
        second = torch.ones(1000)
        del first
        third = torch.ones(500)
        del second, third

    assert 8000 <= peak_bytes(hold) < 8000 + 4096
