"""The mask algebra: every view of a mask tells the same rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from regard.errors import OptionError, ShapeError
from regard.layout import BlockLayout, block_members
from regard.masks import (
    Boolean,
    Causal,
    Dilated,
    Document,
    Everything,
    KeyPadding,
    Mask,
    Neighborhood,
    PerHead,
    Predicate,
    Prefix,
    Reindexed,
    Sinks,
    SlidingWindow,
    axis_windows,
    from_block_mask,
    head_masks,
)

BATCH, HEADS = 2, 3
PROFILE = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def atoms(draw: st.DrawFn, q_len: int, k_len: int) -> Mask:
    small = st.integers(1, 9)

    def bits(*shape: int) -> Tensor:
        seed = draw(st.integers(0, 99))
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6

    names = ["all", "causal", "window", "dilated", "sinks", "prefix", "document", "keys", "dense", "rule", "heads"]
    name = draw(st.sampled_from(names))
    if name == "causal":
        return Causal()
    if name == "window":
        return SlidingWindow(draw(small), draw(st.none() | small))
    if name == "dilated":
        return Dilated(draw(small))
    if name == "sinks":
        return Sinks(draw(small))
    if name == "prefix":
        return Prefix(draw(small) if draw(st.booleans()) else torch.tensor([draw(small), draw(small)]))
    if name == "document":
        rows = draw(st.sampled_from([1, BATCH]))
        return Document(bits(rows, q_len).long().cumsum(1) // 3, bits(rows, k_len).long().cumsum(1) // 3)
    if name == "keys":
        return KeyPadding(bits(BATCH, k_len))
    if name == "dense":
        shape = (
            draw(st.sampled_from([1, BATCH])),
            draw(st.sampled_from([1, HEADS])),
            draw(st.sampled_from([1, q_len])),
        )
        return Boolean(bits(*shape, k_len))
    if name == "rule":
        return Predicate(lambda b, h, q, k: (q * 3 + k * 5 + b + 2 * h) % 4 > 0, BATCH, HEADS)
    if name == "heads":
        rules = [draw(atoms(q_len, k_len)) for _ in range(HEADS)]
        return PerHead(tuple(rule if rule.heads == 1 else Causal() for rule in rules))
    return Everything()


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Mask, int, int]:
    q_len, k_len = draw(st.integers(1, 23)), draw(st.integers(1, 23))

    def extend(inner: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
        pair = st.tuples(inner, inner)
        return pair.map(lambda p: p[0] & p[1]) | pair.map(lambda p: p[0] | p[1]) | inner.map(lambda m: ~m)

    return draw(st.recursive(atoms(q_len, k_len), extend, max_leaves=4)), q_len, k_len


def by_hand(mask: Mask, q_len: int, k_len: int) -> Tensor:
    """The rule asked pair by pair, as FlexAttention would."""
    rule = mask.mod(q_len, k_len)
    axes = [range(mask.batch), range(mask.heads), range(q_len), range(k_len)]
    answers = [bool(rule(*(torch.tensor(i) for i in place))) for place in itertools.product(*axes)]
    return torch.tensor(answers).view(mask.batch, mask.heads, q_len, k_len)


@PROFILE
@given(expressions())
def test_dense_is_the_rule_pair_by_pair(case: tuple[Mask, int, int]) -> None:
    mask, q_len, k_len = case
    q_len, k_len = min(q_len, 6), min(k_len, 6)
    try:
        dense = mask.dense(q_len, k_len)
    except ShapeError:  # the cut lengths do not fit a tensor inside
        q_len, k_len = case[1:]
        dense = mask.dense(q_len, k_len)
    if dense.numel() <= 400:
        assert torch.equal(dense, by_hand(mask, q_len, k_len))


@PROFILE
@given(expressions(), st.integers(1, 8), st.integers(1, 8))
def test_bounds_are_sound(case: tuple[Mask, int, int], block_q: int, block_k: int) -> None:
    """Not possible: nothing visible. Certain: everything visible."""
    mask, q_len, k_len = case
    dense = mask.dense(q_len, k_len)
    q_blocks, k_blocks = block_members(q_len, block_q), block_members(k_len, block_k)
    possible, certain = mask.bounds(q_blocks, k_blocks, q_len, k_len)
    tiles = dense[:, :, q_blocks][..., k_blocks]  # (batch, heads, q blocks, block_q, k blocks, block_k)
    some, every = tiles.any(-1).any(3), tiles.all(-1).all(3)
    assert not bool((some & ~possible).any())
    assert not bool((certain & ~every).any())


@PROFILE
@given(expressions(), st.integers(1, 8), st.integers(1, 8))
def test_layout_is_the_mask(case: tuple[Mask, int, int], block_q: int, block_k: int) -> None:
    mask, q_len, k_len = case
    layout = BlockLayout.of(mask, q_len, k_len, block_q, block_k)
    assert torch.equal(layout.dense(), mask.dense(q_len, k_len).expand_as(layout.dense()))
    inside = layout.full.repeat_interleave(block_q, 2)[:, :, :q_len].repeat_interleave(block_k, 3)[..., :k_len]
    assert not bool((inside & ~layout.dense()).any()), "a full block hides something"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(expressions())
def test_flex_attention_sees_the_same(case: tuple[Mask, int, int]) -> None:
    """FlexAttention's own machinery makes the same blocks from ``mod``, and ``from_block_mask`` comes back."""
    mask, q_len, k_len = case
    dense = mask.dense(q_len, k_len)
    ours = BlockLayout.of(mask, q_len, k_len, 8, 8).block_mask()
    theirs = create_block_mask(mask.mod(q_len, k_len), mask.batch, mask.heads, q_len, k_len, device="cpu", BLOCK_SIZE=8)
    visited, needed = ours.to_dense().bool(), theirs.to_dense().bool()
    assert not bool((needed & ~visited.expand_as(needed)).any()), "a block that FlexAttention needs is left out"
    for block_mask in (ours, theirs):
        assert torch.equal(from_block_mask(block_mask).dense(q_len, k_len).expand_as(dense), dense)


@PROFILE
@given(expressions())
def test_connectives(case: tuple[Mask, int, int]) -> None:
    mask, q_len, k_len = case
    other = SlidingWindow(3) | Sinks(2)
    first, second = mask.dense(q_len, k_len), other.dense(q_len, k_len)
    assert torch.equal((mask & other).dense(q_len, k_len), first & second)
    assert torch.equal((mask | other).dense(q_len, k_len), first | second)
    assert torch.equal((~mask).dense(q_len, k_len), ~first)
    assert torch.equal((~(mask & ~other)).dense(q_len, k_len), ~first | second)


@PROFILE
@given(expressions(), st.randoms(use_true_random=False))
def test_permuted(case: tuple[Mask, int, int], random: object) -> None:
    mask, q_len, k_len = case
    query_order = torch.tensor(random.sample(range(q_len), q_len))  # type: ignore[attr-defined]
    key_order = torch.tensor(random.sample(range(k_len), k_len))  # type: ignore[attr-defined]
    permuted = mask.permuted(query_order, key_order)
    expected = mask.dense(q_len, k_len)[:, :, query_order][..., key_order]
    assert torch.equal(permuted.dense(q_len, k_len), expected)
    layout = BlockLayout.of(permuted, q_len, k_len, 4, 4)
    assert torch.equal(layout.dense(), expected.expand_as(layout.dense()))


@PROFILE
@given(expressions(), st.integers(1, 29), st.integers(1, 29), st.integers(0, 99))
def test_reindexed(case: tuple[Mask, int, int], new_q: int, new_k: int, seed: int) -> None:
    """New tokens stand for old ones, several for the same or some for none, in sequences of other lengths."""
    mask, q_len, k_len = case
    generator = torch.Generator().manual_seed(seed)
    query_index = torch.randint(q_len, (new_q,), generator=generator)
    key_index = torch.randint(k_len, (new_k,), generator=generator)
    query_valid = torch.rand(new_q, generator=generator) < 0.8
    key_valid = torch.rand(new_k, generator=generator) < 0.8
    new = Reindexed(mask, query_index, key_index, query_valid, key_valid, q_len, k_len)
    expected = mask.dense(q_len, k_len)[:, :, query_index][..., key_index]
    expected = expected & query_valid[:, None] & key_valid
    assert torch.equal(new.dense(new_q, new_k), expected)
    layout = BlockLayout.of(new.to("cpu"), new_q, new_k, 4, 3)
    assert torch.equal(layout.dense(), expected.expand_as(layout.dense()))
    keys = Reindexed(mask, query_index, key_index, None, key_valid, q_len, k_len).key_validity(new_k)
    if keys is not None:
        of_all_queries = mask.dense(q_len, k_len)[:, :, query_index][..., key_index] & key_valid
        assert torch.equal(keys[:, :, None].expand_as(of_all_queries), of_all_queries)


@PROFILE
@given(expressions())
def test_key_validity_is_the_rule_for_every_query(case: tuple[Mask, int, int]) -> None:
    mask, q_len, k_len = case
    valid, dense = mask.key_validity(k_len), mask.dense(q_len, k_len)
    if valid is not None:
        assert valid.shape[-1] == k_len
        assert torch.equal(valid[:, :, None].expand_as(dense), dense)


@pytest.mark.parametrize(
    "mask", [KeyPadding(torch.tensor([[True, False, True]])), Prefix(2), Sinks(1), Everything()], ids=repr
)
def test_rules_on_keys_alone_are_known_as_such(mask: Mask) -> None:
    """Their combinations too; ``Causal`` and windows speak of the query."""
    assert mask.key_validity(3) is not None
    assert (mask & Prefix(3) | ~mask).key_validity(3) is not None
    assert (mask & Causal()).key_validity(3) is None
    assert SlidingWindow(2).key_validity(3) is None


def test_lengths_align_at_the_bottom_right() -> None:
    """The last query sees the last key, so a decoding step sees the whole cache."""
    for q_len, k_len in ((1, 7), (3, 7), (7, 7), (7, 3)):
        dense = Causal().dense(q_len, k_len)[0, 0]
        assert torch.equal(dense, torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len))
    row = (Causal() & SlidingWindow(3)).dense(1, 7)[0, 0, 0]
    assert row.tolist() == [False] * 4 + [True] * 3


def test_window_counts() -> None:
    causal = (Causal() & SlidingWindow(4)).dense(10, 10)[0, 0]
    assert causal.sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert SlidingWindow(3, 1).dense(9, 9)[0, 0, 5].nonzero().flatten().tolist() == [3, 4, 5]
    assert Dilated(3).dense(9, 9)[0, 0, 4].nonzero().flatten().tolist() == [1, 4, 7]


def test_documents() -> None:
    dense = (Document(torch.tensor([0, 0, 1, 1, 1])) & Causal()).dense(5, 5)[0, 0]
    assert torch.equal(dense, torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().tril())
    with pytest.raises(ShapeError, match="key_ids"):
        Document(torch.zeros(4)).dense(4, 6)


def test_a_rule_per_head() -> None:
    """Each head sees by its own rule, whatever view of the mask is taken."""
    q_len, k_len = 9, 11
    near, padding = Causal() & SlidingWindow(3), KeyPadding(torch.rand(BATCH, k_len) < 0.6)
    rules = [near, padding, Causal(), near]
    mask = head_masks(rules)
    assert (mask.batch, mask.heads) == (BATCH, 4)
    expected = torch.cat([rule.dense(q_len, k_len).expand(BATCH, 1, q_len, k_len) for rule in rules], 1)
    assert torch.equal(mask.dense(q_len, k_len), expected)
    assert torch.equal(by_hand(mask, q_len, k_len), expected)
    q_blocks, k_blocks = block_members(q_len, 2), block_members(k_len, 3)
    for part, whole in enumerate(mask.bounds(q_blocks, k_blocks, q_len, k_len)):
        for head, rule in enumerate(rules):
            own = rule.bounds(q_blocks, k_blocks, q_len, k_len)[part]
            assert torch.equal(whole[:, head : head + 1], own.expand(BATCH, *own.shape[1:]))
    layout = BlockLayout.of(mask, q_len, k_len, 2, 3)
    assert torch.equal(layout.dense(), expected)
    assert mask.key_validity(k_len) is None, "windows speak of the query"
    keys = head_masks([padding, Sinks(2), Everything(), padding]).key_validity(k_len)
    assert keys is not None and torch.equal(keys[:, 0], padding.valid)
    assert torch.equal(keys[0, 1:3], torch.stack((torch.arange(k_len) < 2, torch.ones(k_len, dtype=torch.bool))))
    assert torch.equal(mask.to("cpu").dense(q_len, k_len), expected)
    assert mask.to("meta").dense(q_len, k_len, device="meta").device.type == "meta"


def test_equal_rules_for_all_heads_are_one_rule() -> None:
    assert head_masks([Causal(), Causal()]) == Causal()
    assert head_masks([Causal() & SlidingWindow(3)] * 3).heads == 1


def test_a_long_analytic_layout_needs_no_dense_tensor() -> None:
    """A million tokens: the dense mask would hold 10^12 pairs."""
    length = 1 << 20
    layout = BlockLayout.of(Causal() & (SlidingWindow(4096) | Sinks(128)), length, length, 1024, 1024)
    assert layout.visit.shape[-2:] == (1024, 1024)
    per_row = layout.visit[0, 0].sum(-1)
    assert int(per_row.max()) == 6, "four whole blocks of the window, its ragged end, and the sinks"
    assert per_row[:4].tolist() == [1, 2, 3, 4]
    assert layout.density() < 0.006


# --- neighbourhoods ---------------------------------------------------------------------------------------------


def looped_window(i: int, length: int, window: int, stride: int, causal: bool) -> tuple[int, int]:
    """The window of query ``i`` in words of the paper: the group's leader, its sides, moved inward at the border."""
    if causal:
        leader = min((i // stride) * stride + stride - 1, length - 1)
        return max(leader - window + 1, 0), i + 1
    leader = min((i // stride) * stride + stride // 2, length - 1)
    left, right = window // 2, window // 2 + window % 2 - 1
    start = max(leader - left, 0)
    if leader + right >= length:
        start = length - window
    return start, start + window


def looped_neighborhood(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """(length, length): the rule inside each residue class modulo the dilation."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for residue in range(dilation):
        members = list(range(residue, length, dilation))
        for place, i in enumerate(members):
            start, stop = looped_window(place, len(members), window, stride, causal)
            for j in members[start:stop]:
                seen[i, j] = True
    return seen


AXES = [
    (length, window, stride, dilation)
    for length in (1, 6, 9, 12)
    for window in range(1, length + 1)
    for stride in range(1, window + 1)
    for dilation in (1, 2, 3)
    if window * dilation <= length
]


@pytest.mark.parametrize("causal", [False, True])
def test_axis_windows_follow_the_paper(causal: bool) -> None:
    for length, window, stride, dilation in AXES:
        expected = looped_neighborhood(length, window, stride, dilation, causal)
        start, stop = axis_windows(length, window, stride, dilation, causal)
        keys = torch.arange(length)
        seen = (keys >= start[:, None]) & (keys < stop[:, None]) & ((keys - keys[:, None]) % dilation == 0)
        case = (length, window, stride, dilation)
        assert torch.equal(seen, expected), case
        mask = Neighborhood.of((length,), window, stride, dilation, causal)
        assert torch.equal(mask.dense(length, length)[0, 0], expected), case
        if not causal:
            assert bool((expected.sum(-1) == window).all())
            assert bool(expected.diagonal().all())


def test_neighborhood_is_a_product_of_axes() -> None:
    grid, window, stride, dilation, causal = (6, 5, 4), (3, 2, 2), (2, 1, 2), (2, 1, 2), (False, True, False)
    axes = [looped_neighborhood(*row) for row in zip(grid, window, stride, dilation, causal, strict=True)]
    expected = torch.einsum("ad,be,cf->abcdef", *(a.double() for a in axes)).reshape(120, 120).bool()
    mask = Neighborhood(grid, window, stride, dilation, causal)
    assert torch.equal(mask.dense(120, 120)[0, 0], expected)
    for block_q, block_k in ((8, 8), (20, 4), (7, 11)):
        assert torch.equal(BlockLayout.of(mask, 120, 120, block_q, block_k).dense()[0, 0], expected)


def test_masked_border_loses_keys_instead_of_moving() -> None:
    clamped = Neighborhood.of((9,), 5).dense(9, 9)[0, 0]
    masked = Neighborhood.of((9,), 5, border="mask").dense(9, 9)[0, 0]
    assert masked.sum(-1).tolist() == [3, 4, 5, 5, 5, 5, 5, 4, 3]
    assert torch.equal(masked, (torch.arange(9)[:, None] - torch.arange(9)).abs() <= 2)
    assert torch.equal(clamped[2:-2], masked[2:-2])


def test_masks_move_with_to() -> None:
    """``to`` keeps the rule (here on the same device) for tensors deep inside an expression."""
    mask = (KeyPadding(torch.tensor([[True, False, True]])) | Prefix(torch.tensor([1]))) & ~Document(
        torch.tensor([0, 1, 1])
    )
    mask = mask.permuted(torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))
    assert torch.equal(mask.to("cpu").dense(3, 3), mask.dense(3, 3))
    assert mask.to("meta").dense(3, 3, device="meta").device.type == "meta"


def test_dense_follows_the_device() -> None:
    assert Causal().dense(4, 4, device="meta").device.type == "meta"
    assert KeyPadding(torch.ones(2, 4, dtype=torch.bool)).dense(3, 4, device="meta").shape == (2, 1, 3, 4)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SlidingWindow(0), OptionError, "at least 1"),
        (lambda: Dilated(0), OptionError, "rate"),
        (lambda: Sinks(0), OptionError, "count"),
        (lambda: KeyPadding(torch.ones(2, 3)), ShapeError, "boolean"),
        (lambda: KeyPadding(torch.ones(2, 3, dtype=torch.bool)).dense(3, 4), ShapeError, "covers 3 keys"),
        (lambda: Boolean(torch.ones(3, dtype=torch.bool)), ShapeError, "2 to 4 axes"),
        (lambda: Boolean(torch.ones(3, 4, dtype=torch.bool)).dense(5, 4), ShapeError, "does not cover"),
        (lambda: head_masks([]), OptionError, "at least one mask"),
        (lambda: head_masks([PerHead((Causal(), Sinks(1)))]), OptionError, "no heads of its own"),
        (
            lambda: head_masks([Prefix(torch.tensor([1, 2])), Prefix(torch.tensor([1, 2, 3]))]),
            ShapeError,
            "different batch",
        ),
        (lambda: Neighborhood.of((8,), 3, stride=4), OptionError, "stride"),
        (lambda: Neighborhood.of((8,), 5, dilation=2), OptionError, "must not exceed"),
        (lambda: Neighborhood.of((8, 8), (3,)), OptionError, "needs 2 values"),
        (lambda: Neighborhood.of((8,), 3).dense(9, 9), ShapeError, "has 8 tokens"),
        (
            lambda: KeyPadding(torch.ones(2, 3, dtype=torch.bool)) & KeyPadding(torch.ones(3, 3, dtype=torch.bool)),
            ShapeError,
            "different batch",
        ),
    ],
)
def test_errors_teach(make: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()  # type: ignore[operator]
