"""Attention over a part of the keys: against the plain formula, and against autograd over the whole row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import BackendError, ShapeError
from regard.kernels import merge_attentions
from regard.kernels import partial as module
from regard.kernels.partial import KeyRanges, partial_attention, partial_attention_backward

FORMS = ("reference", "tiled", "fused")


def qkv(
    q_len: int, k_len: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, value_dim: int = 8, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, q_len, dim, dtype=torch.float64),
        torch.randn(batch, kv_heads, k_len, dim, dtype=torch.float64),
        torch.randn(batch, kv_heads, k_len, value_dim, dtype=torch.float64),
    )


def causal(q_len: int, k_len: int, ahead: int) -> KeyRanges:
    return KeyRanges.causal(torch.arange(q_len) + ahead, torch.arange(k_len))


def drawn(q_len: int, k_len: int, batch: int) -> KeyRanges:
    limits = torch.randint(0, k_len + 1, (2, batch, q_len)).sort(0).values
    return KeyRanges(limits[0], limits[1], k_len)


def documents(length: int, limits: list[int]) -> KeyRanges:
    ids = torch.searchsorted(torch.tensor(limits), torch.arange(length), right=True)
    first = torch.tensor([0, *limits])[ids]
    return KeyRanges(first[None], torch.arange(1, length + 1)[None], length)


CASES = {
    "all": lambda: (qkv(70, 50), KeyRanges.everything(70, 50)),
    "triangle": lambda: (qkv(80, 80), causal(80, 80, 0)),
    "strict": lambda: (qkv(80, 80), causal(80, 80, -1)),
    "ahead": lambda: (qkv(70, 90), causal(70, 90, 13)),
    "behind": lambda: (qkv(90, 70), causal(90, 70, -30)),
    "hidden": lambda: (qkv(40, 30), causal(40, 30, -40)),
    "documents": lambda: (qkv(150, 150), documents(150, [3, 4, 60, 61, 110])),
    "any": lambda: (qkv(60, 45), drawn(60, 45, 1)),
    "any per sequence": lambda: (qkv(60, 45), drawn(60, 45, 2)),
    "widths": lambda: (qkv(40, 40, dim=6, value_dim=10), causal(40, 40, 0)),
    "far widths": lambda: (qkv(40, 40, dim=3, value_dim=20), causal(40, 40, 0)),
    "one": lambda: (qkv(1, 1, 1, 1), causal(1, 1, 0)),
}


def plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row by row as the formula stands."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = seen.expand(len(query), query.shape[1], -1, -1)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"))
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        keys = seen[b, h, i].nonzero()[:, 0]
        if len(keys):
            scores = key[b, h, keys] @ query[b, h, i] * scale
            out[b, h, i] = scores.softmax(0) @ value[b, h, keys]
            lse[b, h, i] = scores.exp().sum().log()
    return out, lse


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_part_is_the_formula_over_its_keys(case: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHED", 1 << 10)
    (query, key, value), ranges = CASES[case]()
    if case == "far widths" and form == "fused":
        pytest.skip("the fused kernels take no such widths")
    out, lse = partial_attention(query, key, value, ranges, scale=0.3, backend=form)
    expected, expected_lse = plain(query, key, value, ranges.dense(), 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_parts_add_up_to_those_of_the_whole(case: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys in question and other keys, of which nothing but the row's output and log-sum-exp is handed over."""
    monkeypatch.setattr(module, "_CACHED", 1 << 10)
    (query, key, value), ranges = CASES[case]()
    if case == "far widths" and form == "fused":
        pytest.skip("the fused kernels take no such widths")
    more_key, more_value = torch.randn_like(key)[:, :, :20], torch.randn_like(value)[:, :, :20]
    keys, values = torch.cat((key, more_key), 2), torch.cat((value, more_value), 2)
    extra = torch.ones(20, dtype=torch.bool).expand(len(ranges.first), 1, query.shape[2], -1).clone()
    extra[:, :, ::3] = False  # some rows see these keys alone, or nothing at all
    extra = extra[..., : more_key.shape[2]]
    seen = torch.cat((ranges.dense(), extra), -1)
    empty = ~seen.any(-1, keepdim=True)
    wholes = [t.clone().requires_grad_() for t in (query, keys, values)]
    out = F.scaled_dot_product_attention(*wholes, attn_mask=seen | empty, enable_gqa=True, scale=0.3) * ~empty
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, wholes, grad_out)
    lse = plain(query, keys, values, seen, 0.3)[1]
    size = key.shape[2]
    first = partial_attention_backward(grad_out, query, key, value, out.detach(), lse, ranges, scale=0.3, backend=form)
    torch.testing.assert_close(first[1], expected[1][:, :, :size])
    torch.testing.assert_close(first[2], expected[2][:, :, :size])
    # What the other keys add to the gradient of the query, from the formula.
    groups = query.shape[1] // key.shape[1]
    k, v = more_key.repeat_interleave(groups, 1), more_value.repeat_interleave(groups, 1)
    weights = (query @ k.mT * 0.3 - torch.where(lse.isfinite(), lse, 0)[..., None]).exp() * extra
    slopes = weights * (grad_out @ v.mT - (grad_out * out.detach()).sum(-1, keepdim=True))
    torch.testing.assert_close(first[0] + 0.3 * slopes @ k, expected[0])


def test_parts_merge_to_the_whole() -> None:
    query, key, value = qkv(33, 64)
    cut = [(0, 10), (10, 11), (11, 64)]
    parts = [partial_attention(query, key[:, :, a:b], value[:, :, a:b]) for a, b in cut]
    out, lse = merge_attentions(*zip(*parts, strict=True))
    whole = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, partial_attention(query, key, value)[1])


def test_pieces_are_rectangles_and_triangles_wherever_shards_meet() -> None:
    """The deals of ring attention need no mask: a zig-zag shard, and stripes with the diagonal in or out."""
    for ranges in (causal(300, 300, 0), causal(300, 300, -1)):
        assert [piece.kind for piece in ranges.pieces[0]] == ["causal"]
    late, early = torch.cat((torch.arange(100, 200), torch.arange(600, 700))), torch.arange(100)
    assert [piece.kind for piece in KeyRanges.causal(late, early).pieces[0]] == ["all"]
    assert [piece.kind for piece in KeyRanges.causal(early, late).pieces[0]] == []
    assert [piece.kind for piece in documents(300, [100, 200]).pieces[0]] == ["causal"] * 3
    assert causal(300, 300, 0).pairs == 300 * 301 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_lower_precision(dtype: torch.dtype, form: str) -> None:
    (query, key, value), ranges = CASES["documents"]()
    exact, exact_lse = plain(query, key, value, ranges.dense(), 0.3)
    low = [t.to(dtype) for t in (query, key, value)]
    out, lse = partial_attention(*low, ranges, scale=0.3, backend=form)
    assert out.dtype is dtype and lse.dtype is torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=tolerance, atol=tolerance)
    grads = partial_attention_backward(out, *low, out, lse, ranges, scale=0.3, backend=form)
    wide = partial_attention_backward(exact, query, key, value, exact, exact_lse, ranges, scale=0.3)
    for grad, expected in zip(grads, wide, strict=True):
        assert grad.dtype is torch.float32
        torch.testing.assert_close(grad.double(), expected, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    """Whatever form is chosen there, against the CPU's in double precision."""
    (query, key, value), ranges = CASES[case]()
    exact, exact_lse = partial_attention(query, key, value, ranges, scale=0.3, backend="reference")
    grads = partial_attention_backward(exact, query, key, value, exact, exact_lse, ranges, scale=0.3)
    low = [t.to("cuda", dtype) for t in (query, key, value)]
    out, lse = partial_attention(*low, ranges, scale=0.3)
    found = partial_attention_backward(exact.to("cuda", dtype), *low, out, lse, ranges, scale=0.3)
    tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-4
    for one, other in zip((out, lse, *found), (exact, exact_lse, *grads), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=tolerance, atol=tolerance)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = qkv(5, 7)
    with pytest.raises(ShapeError, match="do not fit"):
        partial_attention(query, key, value, KeyRanges.everything(5, 6))
    with pytest.raises(ShapeError, match="one shape"):
        KeyRanges(torch.zeros(1, 3), torch.zeros(1, 4), 4)
    with pytest.raises(BackendError, match="fused form"):
        partial_attention(query[..., :1], key[..., :1], value, backend="fused")


def test_memory_does_not_grow_with_the_number_of_pairs() -> None:
    """No tensor of the tiled form is as large as a sixteenth of the scores."""
    query, key, value = (torch.randn(1, 1, 4096, 4) for _ in range(3))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        out, lse = partial_attention(query, key, value, backend="tiled")
        partial_attention_backward(out, query, key, value, out, lse, backend="tiled")
    assert largest <= 4096 * 4096 / 16
