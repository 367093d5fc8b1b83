"""FlexAttention: its back ends against whole maps written out, torch's own, and one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard.dense.flex_attention import FlexAux, flex, flex_decode
from regard.dense.flex_export import to_flex
from regard.dense.program import program
from regard.errors import BackendError, OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.layers.block_mask import create_block_mask
from regard.layers.mask_mods import and_masks, causal, document, sliding_window
from regard.layers.score_mods import (
    MODS,
    LearnedBias,
    RelativePosition,
    ScoreMod,
    alibi,
    alibi_slopes,
    compose,
    mla_rope,
    soft_cap,
)
from regard.masks import Causal, SlidingWindow
from tests.layers.mask_cases import CASES, Case

pytestmark = pytest.mark.paper("flex_attention")

BATCH, HEADS, KV_HEADS, LENGTH, DIM, VALUE_DIM = 2, 4, 2, 40, 16, 8


def inputs(
    q_len: int = LENGTH, k_len: int = LENGTH, dtype: torch.dtype = torch.float64, value_dim: int = VALUE_DIM
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(q_len + k_len)
    shapes = ((HEADS, q_len, DIM), (KV_HEADS, k_len, DIM), (KV_HEADS, k_len, value_dim))
    query, key, value = (torch.randn(BATCH, *shape, generator=generator, dtype=dtype) for shape in shapes)
    return query, key, value


def scored(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    return query @ key.repeat_interleave(HEADS // KV_HEADS, 1).mT * (DIM**-0.5 if scale is None else scale)


def formula(scores: Tensor, seen: Tensor, value: Tensor) -> Tensor:
    """Softmax over the pairs that are seen, by exponentials and sums."""
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1)) @ value.repeat_interleave(HEADS // KV_HEADS, 1)


def shown(case: Case) -> Tensor:
    places = [range(BATCH if case.batch else 1), range(HEADS), range(case.q_len), range(case.k_len)]
    flat = [case.shown(b, h, q, k) for b in places[0] for h in places[1] for q in places[2] for k in places[3]]
    return torch.tensor(flat).view([len(place) for place in places])


def block_mask(case: Case, block_size: int | tuple[int, int] = 16) -> Any:
    return create_block_mask(
        case.mask, case.batch, HEADS if case.name == "heads" else None, case.q_len, case.k_len, block_size
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_back_ends_agree_under_every_mask(case: Case) -> None:
    query, key, value = inputs(case.q_len, case.k_len)
    expected = formula(scored(query, key), shown(case), value)
    for backend in ("auto", "eager", "tiled"):
        for size in ((16, 8), 128):
            out = flex(query, key, value, None, block_mask(case, size), enable_gqa=True, backend=backend)  # type: ignore[arg-type]
            torch.testing.assert_close(out, expected)
    visible = shown(case)
    if bool(visible.any(-1).all()):
        fused = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
        torch.testing.assert_close(expected, fused)


@dataclass(frozen=True)
class Modified:
    """make: the library's function, with random numbers in its parameters. meant: the scores, changed on whole maps."""

    name: str
    make: Callable[[], Any]
    meant: Callable[[Tensor, Any], Tensor]


def _random(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _rope_parts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(BATCH, HEADS, LENGTH, 6).double(), torch.randn(BATCH, 1, LENGTH, 6).double()


QI, KJ = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
MODIFIED = (
    Modified(
        "alibi",
        lambda: alibi(HEADS),
        lambda s, mod: s - torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]).double()[:, None, None] * (QI - KJ).abs(),
    ),
    Modified(
        "relative_position",
        lambda: _random(RelativePosition(HEADS, 5)),
        lambda s, mod: s + torch.stack([mod.table[:, (i - KJ).clamp(-5, 5) + 5] for i in range(LENGTH)], 1),
    ),
    Modified("soft_cap", lambda: soft_cap(0.5), lambda s, mod: 0.5 * torch.tanh(s / 0.5)),
    Modified(
        "mla_rope",
        lambda: mla_rope(*_rope_parts(), 0.2),
        lambda s, mod: s + 0.2 * _rope_parts()[0] @ _rope_parts()[1].mT,
    ),
    Modified("learned_bias", lambda: _random(LearnedBias(HEADS, LENGTH, LENGTH)), lambda s, mod: s + mod.bias),
    Modified(
        "composed",
        lambda: compose(soft_cap(2.0), alibi(HEADS)),
        lambda s, mod: 2 * (s / 2).tanh() - alibi_slopes(HEADS).double()[:, None, None] * (QI - KJ).abs(),
    ),
)


@pytest.mark.parametrize("case", MODIFIED, ids=lambda case: case.name)
def test_back_ends_agree_for_every_score_mod_forward_and_backward(case: Modified) -> None:
    """Gradients of query, key, value and what the function holds are those of the formula on whole maps."""
    assert {one.name for one in MODIFIED} >= set(MODS)
    query, key, value = (t.requires_grad_() for t in inputs())
    mod = case.make()
    given = [query, key, value, *(mod.parameters() if isinstance(mod, nn.Module) else ())]
    seen = (QI >= KJ) & (QI - KJ <= 11)
    expected = formula(case.meant(scored(query, key), mod), seen, value)
    grad = torch.randn_like(expected)
    meant = torch.autograd.grad(expected, given, grad)
    mask = create_block_mask(and_masks(causal, sliding_window(11)), None, None, LENGTH, LENGTH, 8)
    for backend in ("eager", "tiled"):
        out = flex(query, key, value, mod, mask, enable_gqa=True, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(out, expected)
        for found, wanted in zip(torch.autograd.grad(out, given, grad), meant, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(found, wanted)


def test_a_captured_bias_looked_up_by_offset_gets_its_gradient() -> None:
    """``bias[q - kv]``: many pairs read one number, whose gradient is their sum."""
    query, key, value = inputs()
    bias = torch.randn(2 * LENGTH, dtype=torch.float64, requires_grad=True)
    out = flex(query, key, value, lambda s, b, h, q, k: s + bias[q - k + LENGTH], enable_gqa=True, backend="tiled")
    expected = formula(scored(query, key) + bias[QI - KJ + LENGTH], torch.ones(LENGTH, LENGTH), value)
    grad = torch.randn_like(expected)
    (found,), (meant,) = (torch.autograd.grad(t, bias, grad) for t in (out, expected))  # type: ignore[arg-type]
    torch.testing.assert_close(found, meant)
    assert bool((meant != 0).sum() == 2 * LENGTH - 1)


def test_alibi_slopes_are_those_of_its_release() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    twelve = [2.0**-n for n in range(1, 9)] + [2.0 ** -(n + 0.5) for n in range(4)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(twelve))


def test_documents_equal_attention_to_each_by_itself() -> None:
    query, key, value = inputs()
    mask = create_block_mask(and_masks(document([11, 4, 25]), causal), None, None, LENGTH, LENGTH, 16)
    parts = [slice(0, 11), slice(11, 15), slice(15, 40)]
    expected = [
        F.scaled_dot_product_attention(query[:, :, p], key[:, :, p], value[:, :, p], is_causal=True, enable_gqa=True)
        for p in parts
    ]
    torch.testing.assert_close(flex(query, key, value, None, mask, enable_gqa=True), torch.cat(expected, 2))


@pytest.mark.parametrize("backend", ["auto", "eager", "tiled"])
def test_a_row_with_nothing_to_see_gives_zeros_and_finite_gradients(backend: Any) -> None:
    query, key, value = (t.requires_grad_() for t in inputs())
    # Heads 2 and 3 see nothing at all in the first 20 rows, so that whole rows of blocks are empty.
    mask = create_block_mask(lambda b, h, q, k: (q >= 20) | (h < 2) & (k < q), None, HEADS, LENGTH, LENGTH, 8)
    out = flex(query, key, value, None, mask, enable_gqa=True, backend=backend)
    assert isinstance(out, Tensor)
    assert (out[:, 2:, :20] == 0).all()
    assert (out[:, :2, 0] == 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), (query, key, value)):
        assert gradient.isfinite().all()
    _, aux = flex(query, key, value, alibi(HEADS), mask, enable_gqa=True, return_aux=True)
    assert isinstance(aux, FlexAux)
    for part in aux:
        assert (part[:, 2:, :20] == float("-inf")).all()
        assert part[:, :, 20:].isfinite().all()


def test_grouped_heads_equal_repeated_ones() -> None:
    query, key, value = inputs()
    wide = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (key, value))
    mask = create_block_mask(lambda b, h, q, k: q - k >= h, None, HEADS, LENGTH, LENGTH, 16)
    out = flex(query, key, value, alibi(HEADS), mask, enable_gqa=True)
    torch.testing.assert_close(out, flex(query, *wide, alibi(HEADS), mask))
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        flex(query, key, value)


def test_auxiliary_outputs_are_those_of_the_scores() -> None:
    query, key, value = (t.requires_grad_() for t in inputs())
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, 8)
    scores = scored(query, key, 0.5).masked_fill(QI < KJ, float("-inf"))
    for backend in ("eager", "tiled"):
        _, aux = flex(query, key, value, None, mask, 0.5, True, True, backend)  # type: ignore[arg-type]
        assert isinstance(aux, FlexAux)
        torch.testing.assert_close(aux.lse, scores.logsumexp(-1))
        torch.testing.assert_close(aux.max_scores, scores.amax(-1))
        (found,) = torch.autograd.grad(aux.lse.sin().sum(), query)
        (meant,) = torch.autograd.grad(scores.logsumexp(-1).sin().sum(), query, retain_graph=True)
        torch.testing.assert_close(found, meant)


@pytest.mark.parametrize("splits", [None, 1, 3, 40])
@pytest.mark.parametrize("q_len", [1, 3])
def test_split_decoding_equals_one_pass(splits: int | None, q_len: int) -> None:
    query, key, value = inputs(q_len)
    where = torch.tensor([39, 17])

    def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= where[b] + q_idx) & (where[b] + q_idx - kv_idx < 9 + 3 * h)

    bias = torch.randn(HEADS, q_len, LENGTH, dtype=torch.float64)
    for mod in (None, lambda s, b, h, q, k: s + bias[h, q, k], lambda s, b, h, q, k: s + bias[h][q][k]):
        for mask in (None, create_block_mask(near, BATCH, HEADS, q_len, LENGTH, (2, 8))):
            out, aux = flex(query, key, value, mod, mask, enable_gqa=True, return_aux=True)
            split, split_aux = flex_decode(query, key, value, mod, mask, None, True, True, splits)
            torch.testing.assert_close(split, out)
            for a, b in zip(split_aux, aux, strict=True):
                torch.testing.assert_close(a, b)


def test_parts_that_no_query_sees_are_not_read() -> None:
    query, key, value = inputs(1, 64)
    mask = create_block_mask(lambda b, h, q, k: k >= 48, None, None, 1, 64, (1, 8))
    hidden = [torch.cat((torch.full_like(t[:, :, :48], torch.nan), t[:, :, 48:]), 2) for t in (key, value)]
    out = flex_decode(query, *hidden, None, mask, enable_gqa=True, splits=4)
    expected = F.scaled_dot_product_attention(query, key[:, :, 48:], value[:, :, 48:], enable_gqa=True)
    torch.testing.assert_close(out, expected)
    nothing = create_block_mask(lambda b, h, q, k: k < 0 * q, None, None, 1, 64, (1, 8))
    out, aux = flex_decode(query, key, value, None, nothing, enable_gqa=True, return_aux=True)
    assert (out == 0).all()
    assert (aux.lse == float("-inf")).all()  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """Counts products, and the numbers of the largest tensor made."""

    numbers = 0
    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        if func is torch.ops.aten.bmm.default:
            self.flops += 2 * out.numel() * args[0].shape[-1]
        return out


def test_only_listed_blocks_are_computed_and_no_map_is_kept() -> None:
    length = 1024
    query, key, value = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    for mask_mod, blocks in ((causal, 36), (and_masks(causal, sliding_window(256)), 21)):
        mask = create_block_mask(mask_mod, None, None, length, length, 128)
        assert int(mask.to_dense().sum()) == blocks
        with Largest() as seen:
            out = flex(query, key, value, None, mask, backend="tiled")
            forward = seen.flops
            torch.autograd.grad(out.sum(), (query, key, value))  # type: ignore[union-attr]
        assert forward == blocks * 128 * 128 * (16 + 16) * 2
        assert seen.numbers <= length * 128, "a row of blocks at most"


def test_sequences_and_heads_pay_for_their_own_blocks() -> None:
    query, key, value = (torch.randn(2, 3, 64, 8) for _ in range(3))
    mask = create_block_mask(lambda b, h, q, k: k < 8 * (1 + h + 4 * b), 2, 3, 64, 64, 8)
    with Largest() as seen:
        out = flex(query, key, value, None, mask, backend="tiled")
    assert seen.flops == 8 * (1 + 2 + 3 + 5 + 6 + 7) * 8 * 8 * (8 + 8) * 2
    for b in range(2):
        for h in range(3):
            end = 8 * (1 + h + 4 * b)
            expected = F.scaled_dot_product_attention(query[b, h], key[b, h, :end], value[b, h, :end])
            torch.testing.assert_close(out[b, h], expected, rtol=1e-5, atol=1e-6)  # type: ignore[index]


def test_the_compiled_back_end_agrees() -> None:
    query, key, value = inputs(48, 48, torch.float32, DIM)
    mod: ScoreMod = compose(soft_cap(2.0), alibi(HEADS))
    mask = create_block_mask(and_masks(causal, sliding_window(20)), None, None, 48, 48, 16)
    out = flex(query, key, value, mod, mask, enable_gqa=True, backend="torch")
    torch.testing.assert_close(out, flex(query, key, value, mod, mask, enable_gqa=True), rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match="tiled"):
        flex(query.requires_grad_(), key, value, mod, mask, enable_gqa=True, backend="torch")
    with pytest.raises(BackendError, match="without state"):
        flex(query.detach(), key, value, mod, mask, enable_gqa=True, backend="torch", return_aux=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.q_len >= 16], ids=lambda case: case.name)
def test_the_compiled_back_end_agrees_under_every_mask(case: Case) -> None:
    query, key, value = inputs(case.q_len, case.k_len, torch.float32, DIM)
    mask = block_mask(case)
    out = flex(query, key, value, None, mask, enable_gqa=True, backend="torch")
    tiled = flex(query, key, value, None, mask, enable_gqa=True, backend="tiled")
    torch.testing.assert_close(out, tiled, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", MODIFIED, ids=lambda case: case.name)
def test_the_compiled_back_end_agrees_for_every_score_mod(case: Modified) -> None:
    query, key, value = inputs(dtype=torch.float32, value_dim=DIM)
    mod = case.make()
    if isinstance(mod, nn.Module):
        mod.float().requires_grad_(False)
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, 16)
    out = flex(query, key, value, mod, mask, enable_gqa=True, backend="torch")
    tiled = flex(query, key, value, mod, mask, enable_gqa=True, backend="tiled")
    torch.testing.assert_close(out, tiled, rtol=1e-4, atol=1e-5)


def test_torch_s_block_masks_are_taken() -> None:
    query, key, value = inputs()
    theirs = torch_flex.create_block_mask(causal, None, None, LENGTH, LENGTH, "cpu", BLOCK_SIZE=8)
    out = flex(query, key, value, None, theirs, enable_gqa=True, backend="tiled")
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)


MECHANISMS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("full", {}, {"causal": True}),
    ("sliding_window", {"window": 7, "sinks": 2}, {"causal": True}),
    ("sliding_window", {"window": 5}, {"mask": Causal() | SlidingWindow(3), "scale": 0.7}),
    ("gna", {"window": 3}, {"grid": (5, 8)}),
    ("fna", {"window": 3, "dilation": 2, "position_bias": True, "num_heads": HEADS}, {"grid": (5, 8)}),
    ("swin", {"window": 4, "shift": 2, "num_heads": HEADS}, {"grid": (5, 8)}),
    ("moba", {"block_size": 8, "top_k": 2}, {"causal": True}),
    ("vmoba", {}, {"grid": (2, 4, 5)}),
    (
        "flex_attention",
        {"score_mod": "alibi", "mask_mod": "sliding_window", "mask_options": {"window": 9}, "num_heads": HEADS},
        {},
    ),
)


@pytest.mark.parametrize(
    ("name", "options", "call"), MECHANISMS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(MECHANISMS)]
)
def test_a_mechanism_goes_to_flex(name: str, options: dict[str, Any], call: dict[str, Any]) -> None:
    query, key, value = inputs(dtype=torch.float64)
    mechanism = regard.create(name, **options).double()
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.normal_()
    parts = to_flex(mechanism, query, key, block_size=8, **call)  # type: ignore[arg-type]
    out = flex(query, key, value, enable_gqa=True, **parts._asdict())
    torch.testing.assert_close(out, mechanism(query, key, value, **call), rtol=1e-6, atol=1e-7)


def test_decoding_programs_keep_their_places() -> None:
    query, key, value = inputs(3, LENGTH)
    mine = program(alibi(HEADS), lambda b, h, q, k: q >= k)
    out = flex(query, key, value, enable_gqa=True, **to_flex(mine, query, key)._asdict())
    torch.testing.assert_close(out, mine(query, key, value))


def test_what_is_no_such_softmax_is_told() -> None:
    query, key, _ = inputs()
    for mechanism, why in (
        (program(rowwise="sigmoid"), "'sigmoid'"),
        (regard.create("linear_attention"), "no softmax of scores under a mask"),
        (regard.create("dense_attention", normalizer="sparsemax"), "no softmax of scores|differ"),
        (regard.create("dense_attention", normalizer="relu"), "do not sum to 1"),
        (regard.create("dinat", embed_dim=16, num_heads=2), "projections of its own"),
    ):
        with pytest.raises(UnsupportedPatternError, match=why):
            to_flex(mechanism, query, key)  # type: ignore[arg-type]


def test_the_mechanism_takes_functions_by_name() -> None:
    query, key, value = inputs()
    named = regard.create(
        "flex_attention", score_mod="soft_cap", score_options={"cap": 1.0}, mask_mod="causal", num_heads=HEADS
    )
    expected = formula(scored(query, key).tanh(), QI >= KJ, value)
    torch.testing.assert_close(named(query, key, value), expected)
    learned = regard.create(
        "flex_attention", score_mod="relative_position", score_options={"reach": 4}, num_heads=HEADS
    )
    assert [tuple(p.shape) for p in learned.parameters()] == [(HEADS, 9)]
    with pytest.raises(UnknownNameError, match="alibi"):
        regard.create("flex_attention", score_mod="alibbi")
    with pytest.raises(OptionError, match="does not take these options"):
        regard.create("flex_attention", mask_mod="sliding_window", mask_options={"width": 3})


def test_what_cannot_be_is_refused() -> None:
    query, key, value = inputs()
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH)
    with pytest.raises(ShapeError, match="_adjust"):
        flex(query[:, :, 1:], key, value, None, mask, enable_gqa=True)
    with pytest.raises(ShapeError, match="3 heads"):
        flex(query, key, value, None, create_block_mask(causal, None, 3, LENGTH, LENGTH), enable_gqa=True)
    with pytest.raises(OptionError, match="backend"):
        flex(query, key, value, enable_gqa=True, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="split"):
        flex_decode(query, key, value, enable_gqa=True, splits=41)
    with pytest.raises(OptionError, match="score_mod"):
        flex(query, key, value, lambda s, b, h, q, k: q, enable_gqa=True)
    for wrong in (
        lambda: soft_cap(0.0),
        lambda: alibi(0),
        lambda: RelativePosition(2, -1),
        lambda: LearnedBias(1, 0, 1),
    ):
        with pytest.raises(OptionError):
            wrong()
    with pytest.raises(ShapeError, match="rope_heads"):
        mla_rope(torch.zeros(1, 4, 5, 2), torch.zeros(1, 3, 5, 2), 1.0)
