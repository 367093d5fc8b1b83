"""AttentionEngine: tiles against whole maps written out, hand-written derivatives against autograd's, templates against
one another, and the recurrent pattern against masked products."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard.dense.attention_engine import VARIANTS, AttentionEngine, EngineAttention, choose_template, meta_tensor
from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.kernels.merge import merge_attentions
from regard.kernels.online_functions import (
    ONLINE,
    OnlineFunc,
    OnlineIdentity,
    OnlineRetention,
    OnlineSoftmax,
    Scales,
    check_online,
)
from regard.kernels.schedule import H100
from regard.kernels.tuning import records
from regard.layers.custom_io import CustomIO
from regard.layers.mask_mods import and_masks, causal, sliding_window
from regard.masks import Causal

pytestmark = pytest.mark.paper("attention_engine")

HEADS, LENGTH, DIM = 4, 45, 8
MASKS: dict[str, Any] = {"all": None, "causal": causal, "window": and_masks(causal, sliding_window(9))}


def inputs(q_len: int = LENGTH, kv_heads: int = HEADS, value_dim: int = 6, grad: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(q_len)
    shapes = ((HEADS, q_len, DIM), (kv_heads, LENGTH, DIM), (kv_heads, LENGTH, value_dim))
    return tuple(
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_(grad) for shape in shapes
    )


def shown(name: str, q_len: int = LENGTH) -> Tensor:
    q, k = torch.arange(LENGTH)[-q_len:, None], torch.arange(LENGTH)[None]
    return {"all": q == q, "causal": k <= q, "window": (k <= q) & (k >= q - 9)}[name].expand(q_len, LENGTH)


def formula(variant: str, scores: Tensor, seen: Tensor) -> Tensor:
    """The weights of a whole map, by their definition."""
    weights = {
        "softmax": lambda: scores.masked_fill(~seen, float("-inf")).softmax(-1),
        "retention": lambda: scores / scores.abs().masked_fill(~seen, 0).sum(-1, keepdim=True).clamp_min(1),
        "sigmoid": scores.sigmoid,
        "relu": scores.relu,
    }[variant]()
    return weights.masked_fill(~seen, 0)


def scored(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.repeat_interleave(HEADS // key.shape[1], 1).mT * DIM**-0.5


def engine(variant: str, tensors: tuple[Tensor, ...], mask: Any = None, **options: Any) -> AttentionEngine:
    score_mod, function = VARIANTS[variant]
    options.setdefault("scale", DIM**-0.5)
    return AttentionEngine((tensors[0], tensors[1], tensors[2]), None, score_mod, mask, function, **options)


@pytest.mark.parametrize("blocks", [(16, 8), (7, 45), (45, 13), (1, 5), (128, 128)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_of_any_size_equal_the_formula(variant: str, blocks: tuple[int, int]) -> None:
    tensors = inputs(kv_heads=2, grad=False)
    for name, mask in MASKS.items():
        out = engine(variant, tensors, mask, block_m=blocks[0], block_n=blocks[1])(*tensors)
        expected = formula(variant, scored(*tensors[:2]), shown(name)) @ tensors[2].repeat_interleave(2, 1)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_written_derivative_is_autograd_s(variant: str, name: str) -> None:
    tensors = inputs(kv_heads=2)
    out = engine(variant, tensors, MASKS[name], block_m=16, block_n=12)(*tensors)
    expected = formula(variant, scored(*tensors[:2]), shown(name)) @ tensors[2].repeat_interleave(2, 1)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, meant = torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad)
    for a, b in zip(found, meant, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_retention_in_tiles_is_exact_to_rounding() -> None:
    tensors = inputs(grad=False)
    out = engine("retention", tensors, causal, block_m=16, block_n=8)(*tensors)
    assert float((out - formula("retention", scored(*tensors[:2]), shown("causal")) @ tensors[2]).abs().max()) < 2e-15


def test_a_detached_denominator_passes_no_gradient() -> None:
    """As RetNet's code and the engine's own have it."""
    query, key, value = inputs()
    mine = AttentionEngine((query, key, value), None, None, causal, OnlineRetention(detach=True), block_m=8, block_n=8)
    scores = (query @ key.mT).masked_fill(~shown("causal"), 0)
    expected = scores / scores.detach().abs().sum(-1, keepdim=True).clamp_min(1) @ value
    found = torch.autograd.grad(mine(query, key, value).sin().sum(), (query, key, value))
    for a, b in zip(found, torch.autograd.grad(expected.sin().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_custom_inputs_come_in_tiles_and_get_gradients() -> None:
    """One per head, one per query, one per pair, one alone: by the derived formula and by autograd alike."""
    query, key, value = inputs()
    generator = torch.Generator().manual_seed(2)
    shapes = {"slope": (HEADS,), "gain": (LENGTH, 2), "bias": (1, HEADS, LENGTH, LENGTH), "cap": (1,)}
    slope, gain, bias, cap = custom = tuple(
        (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
        for shape in shapes.values()
    )
    axes = {
        "slope": ("heads",),
        "gain": ("seq_len", "batch"),
        "bias": (1, "heads", "seq_len", "seq_len_kv"),
        "cap": (1,),
    }

    def traced(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        capped = (score * custom["gain"] / custom["cap"]).tanh() * custom["cap"]
        return capped - custom["slope"] * (q_idx - kv_idx).abs() + custom["bias"]

    def plain(score: Tensor, custom: Any, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        changed: Tensor = traced(score, custom, b, h, q_idx, kv_idx)
        return torch.where(q_idx >= 0, changed, 0)

    capped = (scored(query, key) / DIM**-0.5 * gain.T[:, None, :, None] / cap).tanh() * cap
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    weights = formula("softmax", capped - slope[:, None, None] * far + bias, shown("causal"))
    given = (query, key, value, *custom)
    meant = torch.autograd.grad((weights @ value).sin().sum(), given)
    for score_mod in (traced, plain):
        mine = AttentionEngine((query, key, value), CustomIO(axes), score_mod, causal, block_m=16, block_n=9)
        assert set(mine.derivative) == ({"score", *axes} if score_mod is traced else set())
        out = mine(query, key, value, *custom)
        torch.testing.assert_close(out, weights @ value, rtol=1e-11, atol=1e-12)
        for a, b in zip(torch.autograd.grad(out.sin().sum(), given), meant, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_gradients_that_would_be_lost_are_refused() -> None:
    tensors, scale = inputs(), nn.Parameter(torch.ones((), dtype=torch.float64))
    mine = AttentionEngine((tensors[0], tensors[1], tensors[2]), None, lambda s, *_: s * scale, causal)
    with pytest.raises(OptionError, match="custom input"):
        mine(*tensors)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_exist_for_one_tile_at_a_time_in_both_passes(variant: str) -> None:
    query, key, value = (torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    mine = engine(variant, (query, key, value), Causal(), block_m=64, block_n=128, scale=0.5)
    with Largest() as seen:
        mine(query, key, value).sum().backward()
    assert seen.most <= 64 * 128


def test_causal_work_is_half_and_half_a_block_in_both_passes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = (torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    counts = []
    for mask in (Causal(), None):
        mine = engine("softmax", (query, key, value), mask, block_m=64, block_n=64, scale=0.5)
        with FlopCounterMode(display=False) as counter:
            out = mine(query, key, value)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert [a / b for a, b in zip(*counts, strict=True)] == [0.5 + 0.5 * 64 / 512] * 2
    # Two products forward, five backward.
    assert counts[1] == (2 * 2 * 512 * 512 * 4, 5 * 2 * 512 * 512 * 4)


def test_blocks_found_empty_hold_nothing_and_skipping_them_changes_nothing() -> None:
    tensors = inputs(grad=False)
    name = "window"
    skips, visits = (
        engine("relu", tensors, MASKS[name], block_m=8, block_n=4, infer_mask=yes) for yes in (True, False)
    )
    torch.testing.assert_close(skips(*tensors), visits(*tensors), rtol=1e-13, atol=1e-14)
    layout = next(iter(skips._layouts.values()))
    assert not layout.visit.all() and next(iter(visits._layouts.values())).visit.all()
    seen = F.pad(shown(name), (0, 48 - LENGTH, 0, 48 - LENGTH)).unflatten(1, (-1, 4)).unflatten(0, (-1, 8))
    assert torch.equal(layout.visit[0, 0], seen.any(3).any(1))


def test_an_external_block_mask_comes_with_each_call() -> None:
    query, key, value = inputs(kv_heads=2)
    mine = engine("softmax", (query, key, value), causal, block_m=15, block_n=9, extern_block_mask=True)
    assert mine.template == "block_sparse"
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 1, 3, 5), (2, HEADS, 3, 5)):
        chosen = torch.rand(shape, generator=generator) < 0.5
        wide = chosen.repeat_interleave(15, 2).repeat_interleave(9, 3) & shown("causal")
        weights = scored(query, key).exp() * wide
        total = weights.sum(-1, keepdim=True)
        expected = weights / torch.where(total > 0, total, 1) @ value.repeat_interleave(2, 1)
        out = mine(query, key, value, block_mask=chosen)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.cos().sum(), (query, key, value), retain_graph=True),
            torch.autograd.grad(expected.cos().sum(), (query, key, value)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    with pytest.raises(OptionError, match="every call"):
        mine(query, key, value)
    with pytest.raises(ShapeError, match="blocks of 15 x 9"):
        mine(query, key, value, block_mask=torch.ones(1, 1, 3, 4, dtype=torch.bool))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_decoding_over_any_split_equals_the_formula(variant: str, kv_heads: int) -> None:
    tensors = inputs(q_len=3, kv_heads=kv_heads, grad=False)
    weights = formula(variant, scored(*tensors[:2]), shown("window", 3))
    expected = weights @ tensors[2].repeat_interleave(HEADS // kv_heads, 1)
    for splits in (1, 2, 7, LENGTH):
        mine = engine(variant, tensors, MASKS["window"], block_m=2, block_n=1, splits=splits)
        assert mine.template == ("decode_mha" if kv_heads == HEADS else "decode_gqa")
        torch.testing.assert_close(mine(*tensors), expected, rtol=1e-11, atol=1e-12)


def test_combined_shares_are_those_of_log_sum_exps() -> None:
    generator = torch.Generator().manual_seed(4)
    lses = torch.randn(3, 2, 5, generator=generator)
    lses[0, 0] = lses[:, 1, 2] = float("-inf")
    outs = torch.randn(3, 2, 5, 4, generator=generator)
    merged, _ = merge_attentions(list(outs), list(lses))
    torch.testing.assert_close((OnlineSoftmax().combine({"lse": lses[..., None]}) * outs).sum(0), merged)


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_decoding_has_gradients_places_and_custom_inputs_too(kv_heads: int) -> None:
    query, key, value = inputs(q_len=2, kv_heads=kv_heads)
    bias = torch.randn(HEADS, 2, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    slope = torch.rand(HEADS, dtype=torch.float64, requires_grad=True)
    given = (query, key, value, slope, bias.requires_grad_())

    def score_mod(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - custom["slope"] * (q_idx - kv_idx).abs() + custom["bias"] + (h + q_idx) * kv_idx / 64

    axes: dict[str, Any] = {"slope": ("heads",), "bias": ("heads", "seq_len", "seq_len_kv")}
    mine = AttentionEngine((query, key, value), axes, score_mod, causal, block_m=3, block_n=16, scale=DIM**-0.5)
    far = (torch.arange(LENGTH - 2, LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    scores = scored(query, key) - slope[:, None, None] * far + bias
    places = torch.arange(HEADS)[:, None, None] + torch.arange(LENGTH - 2, LENGTH)[:, None]
    scores = scores + places * torch.arange(LENGTH) / 64
    expected = formula("softmax", scores, shown("causal", 2)) @ value.repeat_interleave(HEADS // kv_heads, 1)
    out = mine(*given)
    torch.testing.assert_close(out, expected)
    meant = torch.autograd.grad(expected.sin().sum(), given)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), given), meant, strict=True):
        torch.testing.assert_close(a, b)


def test_shared_keys_and_values_decode_as_latents() -> None:
    """576 channels of scores, of which the first 512 are the value."""
    generator = torch.Generator().manual_seed(6)
    query, latent = (torch.randn(1, heads, n, 576, generator=generator) for heads, n in ((4, 1), (1, 50)))
    meta = (meta_tensor(1, 4, 1, 576), meta_tensor(1, 1, 50, 576), meta_tensor(1, 1, 50, 512))
    mine = AttentionEngine(meta, kv_shared=True, block_n=16, scale=576**-0.5, splits=3)
    assert mine.template == "mla_decode"
    wide = latent.expand(-1, 4, -1, -1)
    torch.testing.assert_close(mine(query, latent), F.scaled_dot_product_attention(query, wide, wide[..., :512]))


def test_templates_follow_shapes() -> None:
    def of(heads: int, kv_heads: int, q_len: int, **options: bool) -> str:
        meta = (meta_tensor(1, n, m, 4) for n, m in ((heads, q_len), (kv_heads, 9), (kv_heads, 9)))
        return choose_template(*meta, **options)

    assert [of(4, 4, 9), of(4, 2, 9), of(4, 4, 3), of(4, 2, 1)] == ["mha", "gqa", "decode_mha", "decode_gqa"]
    assert of(4, 4, 9, extern_block_mask=True) == "block_sparse" and of(4, 1, 1, kv_shared=True) == "mla_decode"
    tensors = inputs(grad=False)
    with pytest.raises(ShapeError, match="another engine"):
        engine("softmax", tensors)(tensors[0][:, :, :3], *tensors[1:])


def test_queries_and_keys_align_at_either_end() -> None:
    query, key, value = inputs(q_len=5, grad=False)
    first = engine("softmax", (query, key, value), causal, align="start")(query, key, value)
    weights = formula("softmax", scored(query, key), torch.ones(5, LENGTH).tril().bool())
    torch.testing.assert_close(first, weights @ value)


class Shifted(OnlineFunc):
    """``p = 2 s``, each part of which a test can break."""

    mask_value = 0.0

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def online_fwd(self, scores: Tensor, scales: Scales) -> tuple[Tensor, Scales, Tensor | float]:
        return 2 * scores + (self.broken == "mask"), scales, 0.5 if self.broken == "fold" else 1.0

    def forward(self, scores: Tensor, final: Scales) -> Tensor:
        return scores * (1 if self.broken == "forward" else 2)

    def backward(self, dp: Tensor, p: Tensor, final: Scales, doosum: Tensor) -> Tensor:
        return dp if self.broken == "backward" else 2 * dp

    def combine(self, final: Scales) -> Tensor:
        return torch.tensor(0.5 if self.broken == "combine" else 1.0)


def test_functions_of_one_s_own_are_tried_part_by_part() -> None:
    check_online(Shifted(), 0.0)
    query, key, value = inputs(grad=False)
    out = AttentionEngine((query, key, value), None, None, causal, Shifted())(query, key, value)
    torch.testing.assert_close(out, (2 * query @ key.mT).tril() @ value)
    told = {"mask": "hidden", "fold": "four blocks", "forward": "forward", "backward": "backward", "combine": "combine"}
    for broken, what in told.items():
        with pytest.raises(OptionError, match=what):
            check_online(Shifted(broken), 0.0)
    for function in ONLINE.values():
        check_online(function(), function.mask_value)
    # A hidden pair with score 0 would count in a softmax, one with -inf would not be zero in an identity.
    for function, value_ in ((OnlineSoftmax, 0.0), (OnlineIdentity, float("-inf"))):
        with pytest.raises(OptionError, match="hidden"):
            check_online(function(), value_)


def test_a_function_without_combine_runs_unsplit() -> None:
    class Plain(OnlineIdentity):
        combine = OnlineFunc.combine

    tensors = inputs(q_len=1, grad=False)
    meta = (tensors[0], tensors[1], tensors[2])
    AttentionEngine(meta, online_func=Plain())(*tensors)
    with pytest.raises(UnsupportedPatternError, match="combine"):
        AttentionEngine(meta, online_func=Plain(), splits=2, block_n=9)(*tensors)


def test_a_row_with_nothing_to_see_gives_zeros_and_zero_gradients() -> None:
    for variant in VARIANTS:
        tensors = inputs()
        out = engine(variant, tensors, lambda b, h, q, k: (q > 20) & (k <= q), block_m=16, block_n=8)(*tensors)
        grads = torch.autograd.grad(out.sum(), tensors)
        assert (out[:, :, :21] == 0).all() and (grads[0][:, :, :21] == 0).all() and grads[0].isfinite().all()


def test_without_a_fitting_tile_attention_runs_unfused() -> None:
    wide = tuple(meta_tensor(1, 1, 64, 1024) for _ in range(3))
    assert AttentionEngine((wide[0], wide[1], wide[2]), device=H100).backend == "reference"
    tensors = inputs()
    small = tuple(meta_tensor(1, 1, 64, 64, dtype=torch.float16) for _ in range(3))
    assert AttentionEngine((small[0], small[1], small[2]), device=H100).backend == "tiled"
    whole, tiled = (engine("retention", tensors, causal, backend=b) for b in ("reference", "tiled"))
    for a, b in zip(*(torch.autograd.grad(e(*tensors).sin().sum(), tensors) for e in (whole, tiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_tile_sizes_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    tensors = inputs(grad=False)
    record = engine("softmax", tensors, causal).tune(*tensors)
    assert len(record.seconds) == 6 and not record.failed
    again = engine("softmax", tensors, causal, tune=True)
    again(*tensors)
    assert f"{again.block_m} {again.block_n}" == record.best and len(records()["online"]) == 1


def test_the_mechanism_is_the_engine() -> None:
    tensors = inputs(kv_heads=2, grad=False)
    for variant in VARIANTS:
        mine = regard.create("attention_engine", variant=variant, block_m=16, block_n=8)
        expected = formula(variant, scored(*tensors[:2]), shown("causal"))
        torch.testing.assert_close(mine(*tensors, causal=True), expected @ tensors[2].repeat_interleave(2, 1))
        torch.testing.assert_close(mine.weights(*tensors[:2], causal=True), expected)
    assert mine.pairs(*tensors, causal=True) == pytest.approx(1080 / 2025, abs=0.15)
    own = EngineAttention(Shifted(), lambda s, *_: s.exp())
    out = own(*tensors, causal=True, scale=0.1)
    weights = (2 * (0.1 * tensors[0] @ tensors[1].repeat_interleave(2, 1).mT).exp()).tril()
    torch.testing.assert_close(out, weights @ tensors[2].repeat_interleave(2, 1))


def test_bad_input_is_refused() -> None:
    query, key, value = tensors = inputs(grad=False)
    bad: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (UnknownNameError, "sotmax", lambda: AttentionEngine((query, key, value), online_func="sotmax")),
        (OptionError, "block_m", lambda: engine("softmax", tensors, block_m=0)),
        (OptionError, "backend", lambda: engine("softmax", tensors, backend="cuda")),
        (OptionError, "OnlineFunc", lambda: AttentionEngine((query, key, value), online_func=3)),  # type: ignore[arg-type]
        (OptionError, "variant", lambda: EngineAttention("linear")),
        (OptionError, "axes", lambda: CustomIO({"x": ("heads", "heads")})),
        (OptionError, "parts", lambda: engine("softmax", inputs(1, grad=False), splits=3)(*inputs(1, grad=False))),
        (ShapeError, "value is missing", lambda: engine("softmax", tensors)(query, key)),
        (ShapeError, "custom inputs", lambda: engine("softmax", tensors)(*tensors, query)),
    ]
    for error, text, call in bad:
        with pytest.raises(error, match=text):
            call()
    mine = AttentionEngine((query, key, value), {"x": ("heads",)}, lambda s, c, *_: s + c["x"])
    with pytest.raises(ShapeError, match=r"\(4,\) here"):
        mine(*tensors, torch.zeros(3))
    assert math.isfinite(float(mine(*tensors, torch.zeros(4)).sum()))
