"""Attention from plain functions, against the same functions written out on whole maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard.dense.program import program
from regard.errors import BackendError, OptionError
from regard.kernels.rowwise import ROWWISE, Rowwise
from regard.kernels.tuning import records, tuning_file
from regard.masks import Causal, SlidingWindow

HEADS, LENGTH, DIM = 4, 45, 8
FORMS: tuple[dict[str, Any], ...] = (
    {"backend": "eager"},
    {"backend": "tiled", "tile": (16, 8)},
    {"backend": "tiled", "tile": (7, 45)},
    {"backend": "tiled", "tile": (45, 13)},
)


def _inputs(length: int = LENGTH, kv_heads: int = HEADS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sizes = (HEADS, kv_heads, kv_heads)
    return tuple(torch.randn(2, heads, length, DIM, dtype=dtype).requires_grad_() for heads in sizes)


class Slopes(nn.Module):
    """A bias with parameters, one of them looked up by the key's place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.slopes = nn.Parameter(torch.rand(HEADS, dtype=torch.float64))
        self.table = nn.Parameter(torch.randn(HEADS, LENGTH, dtype=torch.float64))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score.tanh() - self.slopes[h] * (q_idx - kv_idx).abs() + self.table[h, kv_idx]


def staircase(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Another window for each head, and rows of the second sequence that see nothing."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 5 + 6 * h) & ((b == 0) | (q_idx > 3))


def _visible() -> Tensor:
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    return torch.stack(
        [torch.stack([(q >= k) & (q - k < 5 + 6 * h) & ((b == 0) | (q > 3)) for h in range(HEADS)]) for b in range(2)]
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rowwise", ["softmax", "sigmoid", "relu", "retention", "softmax_one"])
def test_every_form_equals_the_formula_forward_and_backward(form: dict[str, Any], rowwise: str) -> None:
    query, key, value = _inputs(kv_heads=2)
    bias = Slopes()
    mine = program(bias, staircase, rowwise, **form)
    wide_key, wide_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    scores = (query @ wide_key.mT / DIM**0.5).tanh() - bias.slopes[:, None, None] * (q - k).abs()
    scores, seen = scores + bias.table[:, None, :], _visible()
    weights = {
        "softmax": lambda: scores.masked_fill(~seen, -1e30).softmax(-1),
        "softmax_one": lambda: (
            scores.exp().masked_fill(~seen, 0) / (1 + scores.exp().masked_fill(~seen, 0).sum(-1, keepdim=True))
        ),
        "sigmoid": scores.sigmoid,
        "relu": scores.relu,
        "retention": lambda: scores / scores.abs().masked_fill(~seen, 0).sum(-1, keepdim=True).clamp_min(1),
    }[rowwise]()
    expected = weights.masked_fill(~seen, 0) @ wide_value
    out = mine(query, key, value)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    given = (query, key, value, *mine.parameters())
    grad = torch.randn_like(out)
    found, meant = torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, given, grad)
    for a, b in zip(found, meant, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (out[1, :, :4] == 0).all()


def test_functions_that_work_on_single_pairs_alone_are_run_pair_by_pair() -> None:
    """``table[h][q_idx]`` means another thing on tensors than on numbers, and may even run."""
    query, key, value = _inputs()
    table = torch.randn(HEADS, LENGTH, dtype=torch.float64)
    picked = program(lambda score, b, h, q, k: score + table[h][k], backend="tiled", tile=(16, 16))
    plain = program(lambda score, b, h, q, k: score + table[h, k], backend="eager")
    torch.testing.assert_close(picked(query, key, value), plain(query, key, value))


def test_without_functions_it_is_softmax_attention() -> None:
    query, key, value = _inputs()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mine = regard.program()
    torch.testing.assert_close(mine(query, key, value, causal=True), expected)
    assert mine.executor(query, key, value) == "fused"
    for form in FORMS:
        torch.testing.assert_close(program(mask_mod=Causal(), **form)(query, key, value), expected)


def test_flex_attention_takes_what_it_can_express() -> None:
    query, key, value = (t.detach() for t in _inputs(64, dtype=torch.float32))
    mine = program(lambda s, b, h, q, k: s - 0.1 * (q - k), lambda b, h, q, k: q >= k, backend="flex")
    tiled = program(mine.score_mod, mine.mask_mod, backend="tiled", tile=(16, 16))
    torch.testing.assert_close(mine(query, key, value), tiled(query, key, value), rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match="eager"):
        program(rowwise="sigmoid", backend="flex")(query, key, value)


def test_indices_count_from_the_end_as_in_decoding_or_from_the_start() -> None:
    query, key, value = (t.detach() for t in _inputs())
    bias = torch.randn(LENGTH, LENGTH, dtype=torch.float64)
    whole = program(lambda s, b, h, q, k: s + bias[q, k], lambda b, h, q, k: q >= k)
    last = whole(query[:, :, -3:], key, value)
    torch.testing.assert_close(last, whole(query, key, value)[:, :, -3:])
    first = program(whole.score_mod, whole.mask_mod, align="start")(query[:, :, :3], key, value)
    torch.testing.assert_close(first, whole(query, key, value)[:, :, :3])


def test_decoding_gives_the_parallel_form() -> None:
    query, key, value = (t.detach() for t in _inputs(12))
    mine = program(lambda s, b, h, q, k: s - 0.3 * (h + 1) * (q - k), SlidingWindow(5))
    state, steps = mine.init_state(2, like=query), []
    for t in range(12):
        out, state = mine.step(*(x[:, :, t : t + 1] for x in (query, key, value)), state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 2), mine(query, key, value, causal=True))


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_tile_or_an_input_forward_and_backward() -> None:
    for length in (256, 512):
        inputs = tuple(torch.randn(1, 1, length, DIM, requires_grad=True) for _ in range(3))
        mine = program(lambda s, b, h, q, k: s.tanh(), Causal(), backend="tiled", tile=(16, 64))
        with _Largest() as largest:
            mine(*inputs).sum().backward()
        assert largest.numel <= max(length * DIM, 16 * 64)


def test_blocks_that_the_mask_hides_are_never_scored() -> None:
    scored = []

    def counting(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        scored.append(score.numel())
        return score

    query, key, value = (torch.randn(1, 1, 256, DIM) for _ in range(3))
    program(counting, Causal() & SlidingWindow(32), backend="tiled", tile=(32, 32))(query, key, value)
    # Eight rows of tiles, each with its own tile and (but the first) the one before.
    assert sum(n for n in scored if n == 32 * 32) == (8 + 7) * 32 * 32


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "told"),
    [
        (lambda score, b, h, q, k: score if q > k else -score, None, "torch.where"),
        (lambda score, b, h, q, k: q >= k, None, "mask_mod"),
        (None, lambda b, h, q, k: q - k, "Compare"),
        (lambda score, b: score, None, "score_mod"),
    ],
)
def test_functions_that_cannot_run_are_refused(score_mod: Any, mask_mod: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        program(score_mod, mask_mod)(*_inputs())


def test_unknown_options_are_refused() -> None:
    for options in ({"align": "middle"}, {"backend": "fast"}, {"tile": (0, 4)}):
        with pytest.raises(OptionError):
            program(**options)  # type: ignore[arg-type]


def test_a_reduction_of_ones_own() -> None:
    """Softmax with base 2, whose state is the sum and the largest score."""

    def block(scores: Tensor, visible: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        top = scores.masked_fill(~visible, -1e30).amax(-1, keepdim=True)
        weights = torch.exp2(scores - top).masked_fill(~visible, 0)
        return weights, (top, weights.sum(-1, keepdim=True))

    def merge(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        top = torch.maximum(a[0], b[0])
        left, right = torch.exp2(a[0] - top), torch.exp2(b[0] - top)
        return (top, a[1] * left + b[1] * right), left, right

    two = Rowwise("base two", block, merge, lambda state: 1 / state[1].clamp_min(1e-30))
    query, key, value = _inputs()
    mine = program(rowwise=two, mask_mod=Causal(), backend="tiled", tile=(8, 8))
    scaled = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=torch.tensor(2.0).log() / DIM**0.5)
    torch.testing.assert_close(mine(query, key, value), scaled)


def test_a_reduction_of_ones_own_that_is_called_softmax_is_not_taken_for_it() -> None:
    sigmoid = ROWWISE["sigmoid"]
    mine = Rowwise("softmax", sigmoid.block, sigmoid.merge, sigmoid.finish)
    query, key, value = _inputs()
    torch.testing.assert_close(program(rowwise=mine)(query, key, value), program(rowwise="sigmoid")(query, key, value))


def test_tuning_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    query, key, value = (t.detach().float() for t in _inputs())
    mine = program(lambda s, b, h, q, k: s - (q - k).abs(), rowwise="sigmoid", tune=True)
    assert "measured" not in mine.executor(query, key, value)
    mine(query, key, value)
    (record,) = records()["program"].values()
    assert set(record.seconds) >= {"eager", "tiled 128 256"} and record.best in record.seconds
    other = program(mine.score_mod, rowwise="sigmoid")
    assert other.executor(query, key, value).startswith(record.best.split()[0])
    assert "measured" in other.executor(query, key, value)
    torch.testing.assert_close(
        other(query, key, value), program(mine.score_mod, rowwise="sigmoid", backend="eager")(query, key, value)
    )
    # Another function of the same name is not what was measured.
    steeper = program(lambda s, b, h, q, k: s - 2 * (q - k).abs(), rowwise="sigmoid")
    assert "measured" not in steeper.executor(query, key, value)
    # What a crash left of the file is measured again.
    tuning_file().write_text('{"program": {')
    assert records() == {}
    mine.tune(query, key, value)
    assert len(records()["program"]) == 1
