"""What a mask says, against the mask itself."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import UnsupportedMaskError
from regard.masks import Boolean, Causal, KeyPadding, SlidingWindow
from regard.retrofit import reading as module
from regard.retrofit.reading import Reading, read_mask


def seen_by(reading: Reading, q_len: int, k_len: int) -> torch.Tensor:
    """What a reading shows, over all keys."""
    seen = torch.zeros(1, 1, q_len, k_len, dtype=torch.bool)
    rule = reading.visible
    inside = (
        torch.ones(1, 1, q_len, reading.keys, dtype=torch.bool) if rule is None else rule.dense(q_len, reading.keys)
    )
    seen = seen.expand(*inside.shape[:2], -1, -1).clone()
    seen[..., : reading.keys] = inside
    return seen


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(0, 4),
    st.sampled_from(["random", "causal", "padding", "window", "all"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_a_reading_shows_what_the_mask_shows(
    q_len: int, past: int, room: int, kind: str, causal: bool, as_float: bool, seed: int
) -> None:
    """Whatever the mask: what is read from it, drawn again, is the mask."""
    generator = torch.Generator().manual_seed(seed)
    held = q_len + past
    k_len = held + room
    valid = torch.rand(2, held, generator=generator) < 0.7
    rules = {
        "causal": Causal().dense(q_len, held),
        "padding": (Causal() & KeyPadding(valid)).dense(q_len, held)
        if causal
        else KeyPadding(valid).dense(q_len, held),
        "window": (Causal() & SlidingWindow(2)).dense(q_len, held),
        "all": torch.ones(1, 1, q_len, held, dtype=torch.bool),
        "random": torch.rand(2, 3, q_len, held, generator=generator) < 0.5,
    }
    mask = torch.zeros(*rules[kind].shape[:2], q_len, k_len, dtype=torch.bool)
    mask[..., :held] = rules[kind]
    given_mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if as_float else mask
    reading = read_mask(given_mask, q_len, k_len, causal)
    assert torch.equal(seen_by(reading, q_len, k_len).expand(mask.shape), mask)
    assert reading.bias is None


def test_plain_masks_are_read_as_plain() -> None:
    triangle = Causal().dense(5, 5)
    assert read_mask(triangle, 5, 5, True) == Reading(True, None, None, 5)
    assert read_mask(triangle.expand(4, 1, -1, -1), 5, 5, False) == Reading(True, None, None, 5)
    assert read_mask(torch.ones(2, 1, 5, 8, dtype=torch.bool), 5, 8, False) == Reading(False, None, None, 8)
    assert read_mask(Causal().dense(2, 8), 2, 8, True) == Reading(True, None, None, 8)
    assert read_mask(torch.zeros(1, 1, 5, 5), 5, 5, False) == Reading(False, None, None, 5)
    assert read_mask(None, 5, 5, False) == Reading(False, None, None, 5)
    assert read_mask(None, 1, 9, True) == Reading(True, None, None, 9)
    # The first pass over an empty static cache: nine places, five of them taken.
    assert read_mask(None, 5, 9, True) == Reading(True, None, None, 5)


def test_padding_and_other_masks_keep_their_form() -> None:
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    two_axes = read_mask(valid.long(), 3, 4, False)
    assert isinstance(two_axes.mask, KeyPadding) and torch.equal(two_axes.mask.valid, valid)
    under_causal = read_mask((Causal() & KeyPadding(valid)).dense(4, 4), 4, 4, True)
    assert under_causal.causal and isinstance(under_causal.mask, KeyPadding)
    window = read_mask((Causal() & SlidingWindow(2)).dense(4, 4), 4, 4, True)
    assert window.causal and isinstance(window.mask, Boolean)
    # A prefix that all see is not causal, whatever the layer says.
    prefix = Causal().dense(4, 4).clone()
    prefix[..., :3] = True
    assert not read_mask(prefix, 4, 4, True).causal
    longer = read_mask(valid, 3, 3, False)
    assert isinstance(longer.mask, KeyPadding) and longer.keys == 3


def test_values_are_a_bias() -> None:
    bias = torch.randn(1, 2, 4, 4)
    hidden = bias.masked_fill(~Causal().dense(4, 4), float("-inf"))
    reading = read_mask(hidden, 4, 4, True)
    assert reading.causal and reading.mask is None and reading.bias is not None
    seen = Causal().dense(4, 4).expand(1, 2, 4, 4)
    assert torch.equal(reading.bias[seen], bias[seen])
    position = torch.randn(1, 2, 4, 4)
    assert read_mask(None, 4, 4, False, position_bias=torch.zeros(1, 2, 4, 4)).bias is None
    both = read_mask(hidden, 4, 4, True, position_bias=position)
    assert both.bias is not None and torch.equal(both.bias[seen], (bias + position)[seen])
    padded = read_mask(torch.tensor([[1, 1, 1, 0]]), 4, 4, False, position_bias=position)
    folded = padded.argument(4, torch.float32)
    assert isinstance(folded, torch.Tensor) and bool((folded[..., 3] == torch.finfo(torch.float32).min).all())
    assert torch.equal(folded[..., :3], position[..., :3])


def test_a_block_mask_is_read() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")
    assert read_mask(block_mask, 256, 256, True) == Reading(True, None, None, 256)


def test_what_is_no_mask_is_refused() -> None:
    for wrong in (torch.ones(1, 1, 3, 4, dtype=torch.bool), torch.ones(1, 1, 5, 5, dtype=torch.long), "causal"):
        with pytest.raises(UnsupportedMaskError):
            read_mask(wrong, 5, 5, True)


def test_masks_are_read_once_and_not_kept() -> None:
    mask = Causal().dense(5, 5).clone()
    read_mask(mask, 5, 5, True)
    assert id(mask) in module._cache
    mask[0, 0, 0, 4] = True
    changed = read_mask(mask, 5, 5, True)
    assert not changed.causal
    identity = id(mask)
    del mask, changed
    gc.collect()
    assert identity not in module._cache
    with torch.inference_mode():
        assert read_mask(Causal().dense(5, 5), 5, 5, True).causal
