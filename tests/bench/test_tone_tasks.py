"""Tone bursts: what is written down is what sounds, in order."""

from __future__ import annotations

import pytest
import torch

from regard.bench.tone_tasks import ToneBursts
from regard.errors import OptionError


def test_targets_are_the_bursts_in_order() -> None:
    task = ToneBursts(noise=0.2)
    (x, inputs), targets = task.batch(40, torch.Generator().manual_seed(0))
    assert x.shape == (40, 40, 16) and inputs.shape == targets.shape == (40, 6)
    for sound, said in zip(x, targets, strict=True):
        # Loud cells are above the noise; a burst is a run of frames with one loud band, gaps between them.
        band = [row.nonzero()[0].item() // 2 if row.any() else None for row in sound > 0.5]
        assert int((sound > 0.5).sum(-1).max()) == 2
        heard = [now for now, before in zip(band, [None, *band], strict=False) if now is not None and before is None]
        words = said[said >= 0].tolist()
        assert words == [int(b) + 2 for b in heard] + [1]
        assert 3 <= len(heard) <= 5


def test_inputs_are_the_targets_one_later() -> None:
    (_, inputs), targets = ToneBursts().batch(10, torch.Generator().manual_seed(1))
    assert bool((inputs[:, 0] == 0).all())
    said = targets[:, :-1] > 1
    assert torch.equal(inputs[:, 1:][said], targets[:, :-1][said])


def test_bursts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="multiple of symbols"):
        ToneBursts(bins=15)
    with pytest.raises(OptionError, match="fit"):
        ToneBursts(frames=20)
