"""Combiner against its formula written as loops over sets of tokens, and against its limits."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard.kernels.spans as spans_module
from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.masks import Causal, KeyPadding
from regard.sparse.combiner import (
    Combiner,
    CombinerAttention,
    Summary,
    Variant,
    combiner_report,
    implied_matrix,
    span_summary,
)
from tests.conformance import test_mechanisms as suite
from tests.conformance.subjects import Subject

VARIANTS: tuple[Variant, ...] = get_args(Variant)
DIM = 4


def inputs(length: int, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, heads, length, DIM, generator=generator, dtype=torch.float64)
    return query, key, value


def split(variant: str, i: int, length: int, span: int, causal: bool) -> tuple[list[int], list[list[int]]]:
    """The direct set of token i and its spans, as the paper draws them; rows of the grid are ``span`` long."""
    tokens = range(i + 1) if causal else range(length)
    row, column = divmod(i, span)
    own_row = [j for j in tokens if j // span == row]
    if variant in ("fixed", "axial_row"):
        blocks = sorted({j // span for j in tokens} - {row})
        return own_row, [[j for j in tokens if j // span == block] for block in blocks]
    if variant == "logsparse":
        spans = [[j for j in range(start, start + size)] for start, size in digits(i)]
        if not causal:
            spans += [[length - 1 - j for j in range(start, start + size)] for start, size in digits(length - 1 - i)]
        return [i], spans
    direct = own_row + [j for j in tokens if j % span == column and j // span != row]
    above, below = [j for j in tokens if j // span < row], [j for j in tokens if j // span > row]
    spans = [[j for j in side if j % span == c] for side in (above, below) for c in range(span) if c != column]
    if variant == "axial_mixture":
        for other in sorted({j // span for j in above + below}):
            members = [j for j in tokens if j // span == other]
            spans += [[j for j in members if j % span < column], [j for j in members if j % span > column]]
    return direct, [members for members in spans if members]


def digits(number: int) -> list[tuple[int, int]]:
    """Start and length of the stretch that each binary digit of a number stands for, written out as text."""
    found, start = [], 0
    for place, digit in enumerate(text := bin(number)[2:]):
        if digit == "1":
            size = 2 ** (len(text) - 1 - place)
            found.append((start, size))
            start += size
    return found


def by_the_formula(
    query: Tensor,
    key: Tensor,
    variant: str,
    span: int,
    causal: bool,
    summary: str = "max",
    row_key: Tensor | None = None,
) -> Tensor:
    """p(j|i), token by token. row_key: keys of rows, one for each column, at the tokens' places."""
    batch, heads, length, dim = query.shape
    out = torch.zeros(batch, heads, length, length, dtype=query.dtype)

    def pool(x: Tensor) -> Tensor:
        return x.max(0).values if summary == "max" else x.mean(0)

    for b in range(batch):
        for h in range(heads):
            q, k = query[b, h], key[b, h]
            for i in range(length):
                direct, spans = split(variant, i, length, span, causal)
                inside, keys = [], []
                for members in spans:
                    at = members[0] - members[0] % span + i % span
                    # The last row may have no token in this column; a place without a token looks at the row evenly.
                    asks = torch.zeros(dim, dtype=q.dtype) if at >= length else q[at]
                    asks = asks if variant == "axial_row" else pool(q[members])
                    inside.append((k[members] @ asks / math.sqrt(dim)).softmax(0))
                    if variant != "axial_row":
                        keys.append(pool(k[members]))
                    else:
                        keys.append(inside[-1] @ k[members] if row_key is None else row_key[b, h, at])
                logits = torch.stack([q[i] @ k[j] for j in direct] + [q[i] @ key for key in keys]) / math.sqrt(dim)
                weights = logits.softmax(0)
                for weight, j in zip(weights, direct, strict=False):
                    out[b, h, i, j] += weight
                for weight, members, share in zip(weights[len(direct) :], spans, inside, strict=True):
                    for j, part in zip(members, share, strict=True):
                        out[b, h, i, j] += weight * part
    return out


@pytest.mark.paper("combiner")
@pytest.mark.parametrize("summary", ["max", "mean"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_conditional_probabilities_with_full_support(variant: Variant, causal: bool, summary: Summary) -> None:
    query, key, _ = inputs(18)
    found = implied_matrix(query, key, variant, span=5, causal=causal, summary=summary)
    visible = torch.ones(18, 18).tril().bool() if causal else torch.ones(18, 18).bool()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    assert bool((found >= 0).all()) and bool((found[..., visible] > 0).all()) and not bool(found[..., ~visible].any())
    expected = by_the_formula(query, key, variant, 5, causal, summary)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.paper("combiner")
@pytest.mark.parametrize("span", [1, 23, 100])
def test_one_span_or_spans_of_one_are_full_attention(span: int) -> None:
    query, key, value = inputs(23)
    for causal in (True, False):
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        torch.testing.assert_close(Combiner("fixed", span)(query, key, value, causal=causal), expected)


@pytest.mark.paper("combiner")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_is_the_implied_matrix_between_projections(variant: Variant, causal: bool) -> None:
    layer = CombinerAttention(8, 2, variant, 5, row_key="weighted").double()
    x = torch.randn(2, 18, 8, dtype=torch.float64)
    query, key, value = ((x @ w.T).unflatten(-1, (2, 4)).transpose(1, 2) for w in layer.qkv.weight.chunk(3))
    heads = by_the_formula(query, key, variant, 5, causal) @ value
    expected = heads.transpose(1, 2).flatten(2) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, causal=causal), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("combiner")
def test_keys_of_rows_are_projected_from_the_attention_inside() -> None:
    layer = CombinerAttention(8, 2, "axial_row", 6).double()
    x = torch.randn(2, 18, 8, dtype=torch.float64)
    query, key, value = ((x @ w.T).unflatten(-1, (2, 4)).transpose(1, 2) for w in layer.qkv.weight.chunk(3))
    rows = [F.scaled_dot_product_attention(*(t[:, :, r : r + 6] for t in (query, key, value))) for r in (0, 6, 12)]
    assert layer.row_out is not None and layer.row_key is not None
    inside = torch.cat(rows, 2).transpose(1, 2).flatten(2) @ layer.row_out.weight.T
    row_key = (F.layer_norm(x + inside, (8,)) @ layer.row_key.weight.T).unflatten(-1, (2, 4)).transpose(1, 2)
    heads = by_the_formula(query, key, "axial_row", 6, True, row_key=row_key) @ value
    expected = heads.transpose(1, 2).flatten(2) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, grid=(3, 6)), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("combiner")
def test_binary_spans_are_disjoint_cover_the_past_and_are_as_many_as_digits_set() -> None:
    # With all logits zero a row reads off its split: 1 / (1 + spans) each, spread evenly over the members.
    length = 64
    zeros = torch.zeros(1, 1, length, DIM, dtype=torch.float64)
    matrix = implied_matrix(zeros, zeros, "logsparse")[0, 0]
    for i in range(length):
        own = 1 / (1 + i.bit_count())
        assert float(matrix[i, i]) == pytest.approx(own)
        sizes = own / matrix[i, :i]
        at, found = 0, []
        while at < i:
            size = round(float(sizes[at]))
            torch.testing.assert_close(sizes[at : at + size], torch.full((size,), float(size), dtype=sizes.dtype))
            found.append(size)
            at += size
        assert at == i and found == [2**n for n in reversed(range(7)) if i >> n & 1]


@pytest.mark.paper("combiner")
@pytest.mark.parametrize("variant", VARIANTS)
def test_later_tokens_change_nothing_before(variant: Variant) -> None:
    layer = CombinerAttention(8, 2, variant, 5).double()
    x = torch.randn(1, 33, 8, dtype=torch.float64)
    before = layer(x)
    for i in range(1, 33):
        changed = torch.cat((x[:, :i], 5 * torch.randn(1, 33 - i, 8, dtype=torch.float64)), 1)
        torch.testing.assert_close(layer(changed)[:, :i], before[:, :i], rtol=1e-12, atol=1e-12)


@pytest.mark.paper("combiner")
@pytest.mark.parametrize(("variant", "width"), [("fixed", 16 + 256 // 16), ("logsparse", 1 + 8)])
def test_logits_per_token(variant: Variant, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = [], spans_module.joint_weights

    def counted(logits: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, ...]:
        seen.append(sum(group.numel() for group in logits))
        return plain(logits, masks)

    monkeypatch.setattr(spans_module, "joint_weights", counted)
    query, key, value = inputs(256, heads=1)
    Combiner(variant, 16)(query, key, value, causal=True)
    assert seen == [2 * 256 * width]
    assert combiner_report(256, span=16)[variant].logits_per_token == width


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["fixed", "axial_row", "axial_column", "axial_mixture"])
def test_flops_are_those_that_torch_counts(variant: Variant, causal: bool) -> None:
    query, key, value = torch.randn(3, 2, 3, 60, 8)
    module, shape = Combiner(variant, 10), AttentionShape(60, 60, 3, 8, 2, causal=causal)
    with FlopCounterMode(display=False) as counter:
        module(query, key, value, causal=causal)
    assert counter.get_total_flops() == module.cost(shape).flops
    report = combiner_report(60, 8, 3, span=10, causal=causal)[variant]
    assert 2 * report.flops == module.cost(shape).flops
    assert report.score_bytes == 3 * 60 * report.logits_per_token * 4


def test_growth_of_the_report() -> None:
    short, long = combiner_report(1024), combiner_report(16384)
    assert 15 < long["logsparse"].flops / short["logsparse"].flops < 16 * 14 / 10 + 1
    for variant in ("fixed", "axial_row", "axial_column", "axial_mixture"):
        assert 60 < long[variant].flops / short[variant].flops < 68  # 16 ** 1.5 = 64
    assert long["fixed"].flops_share < 0.02 and long["fixed"].score_share == 256 / 16384


def test_span_summary() -> None:
    query, key, value = inputs(11)
    for summary in ("max", "mean", "relu-max"):
        keys, queries, values = span_summary(query, key, value, [4, 1, 6], summary=summary)
        for n, members in enumerate((slice(0, 4), slice(4, 5), slice(5, 11))):
            q, k = (t[:, :, members].relu() if summary == "relu-max" else t[:, :, members] for t in (query, key))
            q, k = (t.mean(2) if summary == "mean" else t.max(2).values for t in (q, k))
            torch.testing.assert_close(keys[:, :, n], k)
            torch.testing.assert_close(queries[:, :, n], q)
            p = torch.einsum("bhd,bhjd->bhj", q, key[:, :, members]).div(2).softmax(-1)
            torch.testing.assert_close(values[:, :, n], torch.einsum("bhj,bhjd->bhd", p, value[:, :, members]))
    short = span_summary(query, key, value, 4)
    for found, expected in zip(short, span_summary(query, key, value, [4, 4, 3]), strict=True):
        torch.testing.assert_close(found, expected)
    for segments in (0, [4, 4], [5, 0, 6]):
        with pytest.raises(ShapeError, match="do not cut 11 tokens"):
            span_summary(query, key, value, segments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_has_no_part(variant: Variant) -> None:
    """A padded batch gives what its sequences give alone, whatever stands at the padding."""
    layer = CombinerAttention(8, 2, variant, 5).double()
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    padded = torch.cat((x, torch.full((1, 6, 8), 7.0, dtype=torch.float64)), 1)
    mask = KeyPadding(torch.arange(23)[None] < 17)
    for causal in (True, False) if variant != "logsparse" else (True,):
        torch.testing.assert_close(layer(padded, mask=mask, causal=causal)[:, :17], layer(x, causal=causal))


@pytest.mark.parametrize(("variant", "span"), [("fixed", 5), ("logsparse", None)])
def test_step_by_step_with_a_small_state(variant: Variant, span: int | None) -> None:
    layer = CombinerAttention(8, 2, variant, span).double()
    x = torch.randn(2, 23, 8, dtype=torch.float64)
    state, outs = layer.init_state(2, like=x), []
    for piece in x.split([9, 1, 1, 5, 7], 1):
        out, state = layer.step(piece, state)
        outs.append(out)
        spans = state.count // 5 if variant == "fixed" else state.count.bit_count()
        assert state.span_key.shape[2] == spans
        assert state.key.shape[2] == (state.count % 5 if variant == "fixed" else state.count)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_other_variants_keep_the_contracts_too(variant: Variant) -> None:
    """The conformance suite runs the first alone."""
    subject = Subject("combiner", "mechanism", {"variant": variant, "span": 7}, Combiner)
    for check in (
        suite.test_gradient,
        suite.test_implied_matrix,
        suite.test_hidden_keys_do_not_matter,
        suite.test_nothing_to_see_gives_zeros,
        suite.test_memory_layout_does_not_matter,
    ):
        check(subject)
    suite.test_low_precision(subject, torch.bfloat16)
    suite.test_magnitudes(subject, 1e4)


def test_learned_summaries() -> None:
    query, key, value = inputs(20)
    module = Combiner("fixed", 5, "deepset-max", head_dim=DIM).double()
    module(query, key, value, causal=True).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.eye(DIM))
    torch.testing.assert_close(module(query, key, value), Combiner("fixed", 5, "relu-max")(query, key, value))


def test_wrong_options_and_calls() -> None:
    with pytest.raises(OptionError, match="variant is one of"):
        Combiner("sparse")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one token"):
        Combiner(span=0)
    with pytest.raises(OptionError, match="summary is one of"):
        Combiner(summary="median")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give head_dim"):
        Combiner(summary="deepset-max")
    with pytest.raises(OptionError, match="no multiple"):
        CombinerAttention(10, 4)
    with pytest.raises(OptionError, match="row_key"):
        CombinerAttention(8, 2, row_key="plain")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="CombinerAttention takes"):
        CombinerAttention(8, 2)(torch.randn(1, 5, 7))
    query, key, value = inputs(12)
    with pytest.raises(ShapeError, match="rows and columns"):
        Combiner("axial_row")(query, key, value, grid=(2, 2, 3))
    with pytest.raises(UnsupportedMaskError):
        Combiner()(query, key, value, mask=Causal())
    for module in (Combiner("axial_row", 4), Combiner("fixed")):
        with pytest.raises(UnsupportedPatternError, match="cannot decode"):
            module.init_state(2, like=query)
