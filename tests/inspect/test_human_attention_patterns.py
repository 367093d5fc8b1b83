"""Patterns of tokens in heads: maps known by hand, importance by masking, injected heads and adapters against loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.bench.pattern_tasks import MARKER, ExtractiveSummaryToy, TopicSegmentationToy
from regard.bench.tasks import IGNORED
from regard.errors import OptionError, ShapeError
from regard.inspect.human_attention_patterns import (
    Documents,
    adapted,
    discover,
    fix_heads,
    head_importance_taylor,
    pattern_relevance,
)
from regard.inspect.intervene import intervene, scale_heads
from regard.layers.token_patterns import (
    Predicate,
    first_token,
    intra_sentence,
    matching_token,
    pattern_maps,
    positional,
    row_normalised,
    same_segment_context,
    segments_from_markers,
)
from regard.models.human_attention_patterns import (
    FixedPatternHead,
    HeadPattern,
    PatternAdapter,
    PatternAttention,
    PatternEncoder,
    PatternHeads,
)
from regard.models.sequence import SequenceModel
from regard.retrofit.sites import discover as attention_sites

EXACT = {"atol": 1e-12, "rtol": 1e-12}
ALL: list[Predicate] = [
    matching_token,
    intra_sentence,
    same_segment_context,
    first_token,
    positional(-1),
    positional(1),
    positional(2),
]
TOKENS = torch.tensor([[0, 5, 3, 5, 0, 7, 3, 9], [0, 4, 4, 2, 0, 4, 6, 8]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, -1]])


def classifier(seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    model = SequenceModel(
        3, vocab_size=10, embed_dim=12, depth=2, num_heads=3, causal=False, positions="learned", max_length=8
    )
    return model.double().eval()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss for each document."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


class Uneven(nn.Module):
    """A classifier that leaves one of its attention layers out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = classifier(), classifier()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.used(tokens)


def batch() -> Documents:
    targets = torch.randint(3, TOKENS.shape, generator=torch.Generator().manual_seed(1))
    return Documents(TOKENS, TOKENS, SEGMENTS, targets)


@pytest.mark.paper("human_attention_patterns")
def test_predicates_are_their_definitions() -> None:
    names = ("match", "sentence", "context", "first", "-1", "+1", "+2")
    maps = {name: pattern(TOKENS, SEGMENTS) for name, pattern in zip(names, ALL, strict=True)}
    for b in range(2):
        for i in range(8):
            for j in range(8):
                real = bool(SEGMENTS[b, i] >= 0 and SEGMENTS[b, j] >= 0)
                same = bool(SEGMENTS[b, i] == SEGMENTS[b, j])
                assert bool(maps["match"][b, i, j]) == (real and i != j and bool(TOKENS[b, i] == TOKENS[b, j]))
                assert bool(maps["sentence"][b, i, j]) == (real and same)
                assert bool(maps["context"][b, i, j]) == (real and (same or i == 0))
                assert bool(maps["first"][b, i, j]) == (real and j == 0)
                for name, offset in (("-1", -1), ("+1", 1), ("+2", 2)):
                    assert bool(maps[name][b, i, j]) == (real and j - i == offset)
    quiet = matching_token(TOKENS, ignored=(0, 5))
    assert not quiet[TOKENS == 0].any() and not quiet[TOKENS == 5].any()
    assert quiet[0].nonzero().tolist() == [[2, 6], [6, 2]]
    assert torch.equal(quiet[0, 2], matching_token(TOKENS)[0, 2])
    assert segments_from_markers(torch.tensor([[9, 0, 5, 0, 7]]), 0).tolist() == [[-1, 0, 0, 1, 1]]


@pytest.mark.paper("human_attention_patterns")
@pytest.mark.parametrize("pattern", ALL)
def test_rows_sum_to_one_or_are_flagged(pattern: Predicate) -> None:
    found = pattern(TOKENS, SEGMENTS)
    weights, empty = row_normalised(found, torch.float64)
    torch.testing.assert_close(weights.sum(-1), (~empty).double(), **EXACT)
    assert torch.equal(empty, ~found.any(-1))
    assert bool(empty[1, 7])
    assert weights[empty].eq(0).all()


@pytest.mark.paper("human_attention_patterns")
def test_names_of_tokens_do_not_matter() -> None:
    renamed = torch.randperm(10, generator=torch.Generator().manual_seed(0))[TOKENS]
    assert not torch.equal(renamed, TOKENS)
    assert torch.equal(matching_token(renamed, SEGMENTS), matching_token(TOKENS, SEGMENTS))


@pytest.mark.paper("human_attention_patterns")
@pytest.mark.parametrize("pattern", ALL)
def test_relevance_of_a_pattern_itself_and_of_uniform_attention(pattern: Predicate) -> None:
    found = pattern(TOKENS, SEGMENTS)
    weights, empty = row_normalised(found, torch.float64)
    # What rows without a target attend to does not count.
    filled = weights + empty[..., None] * torch.eye(8, dtype=torch.float64)
    relevance = pattern_relevance(filled[None, :, None].expand(2, -1, 3, -1, -1), found)
    torch.testing.assert_close(relevance, torch.ones(2, 3, dtype=torch.float64), **EXACT)
    uniform = pattern_relevance(torch.full((1, 2, 1, 8, 8), 1 / 8, dtype=torch.float64), found)
    density = [float(found[b][found[b].any(-1)].double().mean()) for b in range(2)]
    assert float(uniform) == pytest.approx(sum(density) / 2, abs=1e-12)


@pytest.mark.paper("human_attention_patterns")
def test_relevance_is_the_formula_and_skips_inputs_without_a_target() -> None:
    torch.manual_seed(0)
    attn = torch.randn(1, 2, 2, 8, 8, dtype=torch.float64).softmax(-1)
    tokens = torch.stack((TOKENS[0], torch.arange(8)))
    found = matching_token(tokens)
    inside = whole = 0.0
    for i in range(8):
        if found[0, i].any():
            inside += sum(float(attn[0, 0, 1, i, j]) for j in range(8) if found[0, i, j])
            whole += float(attn[0, 0, 1, i].sum())
    assert float(pattern_relevance(attn, found)[0, 1]) == pytest.approx(inside / whole, abs=1e-12)
    assert bool(pattern_relevance(attn[:, 1:], found[1:]).isnan().all())
    torch.testing.assert_close(
        pattern_relevance(attn.bfloat16(), found), pattern_relevance(attn.bfloat16().float(), found), **EXACT
    )


@pytest.mark.paper("human_attention_patterns")
def test_importance_is_the_slope_of_each_documents_loss_as_a_head_fades() -> None:
    model, data = classifier(), batch()
    found = head_importance_taylor(model, cross_entropy, data)
    torch.testing.assert_close(found.double().norm(dim=-1), torch.ones(2).double(), atol=1e-6, rtol=0)
    slopes = torch.zeros(2, 3, dtype=torch.float64)
    for layer in range(2):
        for head in range(3):
            losses = []
            for gate in (1 + 1e-5, 1 - 1e-5):
                gates = torch.ones(2, 3, dtype=torch.float64)
                gates[layer, head] = gate
                with torch.no_grad(), intervene(model, scale_heads(gates)):
                    losses.append(cross_entropy(model(TOKENS), data.targets))
            slopes[layer, head] = ((losses[0] - losses[1]) / 2e-5).abs().sum()
    expected = slopes / slopes.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(head_importance_taylor(model, cross_entropy, data), found)


@pytest.mark.paper("human_attention_patterns")
def test_discovery_names_the_pattern_of_a_head_that_has_it() -> None:
    model, data = classifier(), batch()
    patterns = {"matching": matching_token, "sentence": intra_sentence, "previous": positional(-1)}
    put = {(1, 2): matching_token(TOKENS, SEGMENTS), (0, 1): positional(-1)(TOKENS, SEGMENTS)}
    with intervene(model, *fix_heads(put)):
        rows = discover(model, [data, data], patterns, cross_entropy)
        importance = head_importance_taylor(model, cross_entropy, data)
    assert [row.importance for row in rows] == sorted((row.importance for row in rows), reverse=True)
    by_head = {(row.layer, row.head): row for row in rows}
    assert by_head[1, 2].pattern == "matching" and by_head[1, 2].relevance["matching"] == pytest.approx(1)
    assert by_head[0, 1].pattern == "previous" and by_head[0, 1].relevance["previous"] == pytest.approx(1)
    assert sum(row.pattern == "matching" for row in rows) == sum(row.pattern == "previous" for row in rows) == 1
    for (layer, head), row in by_head.items():
        assert row.importance == pytest.approx(float(importance[layer, head]), abs=1e-6)
    # The rule: furthest above the mean of all heads, by more than one of their deviations.
    for name in patterns:
        relevance = torch.tensor([row.relevance[name] for row in rows])
        above = (relevance - relevance.mean()) / relevance.std(correction=0)
        for row, size in zip(rows, above, strict=True):
            assert float(size) > 1 or row.pattern != name
            assert float(size) <= 1 or row.pattern is not None
    # Of two batches the importance of a head is the mean over both, before layers are normalised.
    other = Documents(TOKENS.flip(0), TOKENS.flip(0), SEGMENTS.flip(0), 2 - data.targets)
    sums = torch.zeros(2, 3)
    for each in (data, other):
        for layer in range(2):
            for head in range(3):
                gates = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
                for b in range(2):
                    with intervene(model, scale_heads(gates)):
                        loss = cross_entropy(model(each.tokens), each.targets)[b]
                    slope = torch.autograd.grad(loss, gates)[0]
                    sums[layer, head] += slope[layer, head].abs()
    expected = sums / sums.norm(dim=-1, keepdim=True)
    for row in discover(model, [data, other], patterns, cross_entropy):
        assert row.importance == pytest.approx(float(expected[row.layer, row.head]), abs=1e-5)
    with pytest.raises(OptionError, match="at least one pattern"):
        discover(model, [data], {}, cross_entropy)
    with pytest.raises(OptionError, match="at least one batch"):
        discover(model, [], patterns, cross_entropy)


@pytest.mark.paper("human_attention_patterns")
def test_fixed_heads_of_a_live_model_have_the_patterns_weights() -> None:
    model = classifier()
    pattern = matching_token(TOKENS, SEGMENTS)
    with torch.no_grad(), regard.capture(model) as before:
        plain = model(TOKENS)
    with torch.no_grad(), intervene(model, *fix_heads({(0, 1): pattern})), regard.capture(model) as trace:
        model(TOKENS)
    own, now = before.stack("weights")[0], trace.stack("weights")[0]
    weights, empty = row_normalised(pattern, torch.float64)
    expected = torch.where(empty[..., None], own[:, 1], weights)
    torch.testing.assert_close(now[:, 1], expected, **EXACT)
    assert torch.equal(now[:, [0, 2]], own[:, [0, 2]])
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain)


@pytest.mark.paper("human_attention_patterns")
def test_a_head_that_looks_one_back_shifts_the_values() -> None:
    torch.manual_seed(0)
    head = FixedPatternHead(positional(-1), 6, 4).double()
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    out = head(x, TOKENS)
    shifted = head.out(head.value(x))[:, :-1]
    torch.testing.assert_close(out[:, 1:], shifted, **EXACT)
    # The first has nothing before it, and takes the mean of all; the flag says so.
    torch.testing.assert_close(out[:, 0], head.out(head.value(x)).mean(1), **EXACT)
    assert head.weights(TOKENS)[1].nonzero().tolist() == [[0, 0], [1, 0]]
    weights, empty = head.weights(TOKENS, SEGMENTS)
    assert empty.nonzero().tolist() == [[0, 0], [1, 0], [1, 7]]
    assert weights[1, 0].tolist() == pytest.approx([1 / 7] * 7 + [0])  # padding has no part in it


@pytest.mark.paper("human_attention_patterns")
@pytest.mark.parametrize("embed_dim", [12, 30])
def test_a_fixed_head_has_no_queries_and_keys(embed_dim: int) -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    learnt, one = PatternAttention(embed_dim, 3), PatternAttention(embed_dim, 3, [HeadPattern(first_token)])
    masked = PatternAttention(embed_dim, 3, [HeadPattern(first_token, "masked")])
    assert count(learnt) - count(one) == 2 * embed_dim * (embed_dim // 3)
    assert count(masked) == count(learnt)
    assert count(FixedPatternHead(first_token, embed_dim, 5)) == 2 * embed_dim * 5


@pytest.mark.paper("human_attention_patterns")
def test_pattern_heads_are_the_loop_over_heads() -> None:
    torch.manual_seed(0)
    patterns = [HeadPattern(matching_token), HeadPattern(matching_token, "masked")]
    layer = PatternHeads(12, 3, patterns).double()
    x, real = torch.randn(2, 8, 12, dtype=torch.float64), SEGMENTS >= 0
    maps = pattern_maps([p.predicate for p in patterns], TOKENS, SEGMENTS)
    found, out = layer.weights(x, maps, real), layer(x, maps, real)
    assert layer.query is not None and layer.key is not None
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    for b in range(2):
        for i in range(8):
            targets = [j for j in range(8) if maps[b, 0, i, j]]
            visible = [j for j in range(8) if real[b, j]]
            fixed = torch.zeros(8, dtype=torch.float64)
            fixed[targets or visible] = 1 / len(targets or visible)
            torch.testing.assert_close(found[b, 0, i], fixed, **EXACT)
            for at, inside in ((1, targets or visible), (2, visible)):
                columns = slice(4 * (at - 1), 4 * at)
                row = torch.zeros(8, dtype=torch.float64)
                scores = torch.stack([query[b, i, columns] @ key[b, j, columns] / 2 for j in inside])
                row[inside] = scores.softmax(0)
                torch.testing.assert_close(found[b, at, i], row, **EXACT)
    expected = torch.cat([found[:, h] @ value[..., 4 * h : 4 * h + 4] for h in range(3)], -1)
    torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.paper("human_attention_patterns")
def test_an_adapter_adds_nothing_at_first_and_its_own_heads_later() -> None:
    model = classifier()
    patterns = [HeadPattern(matching_token), HeadPattern(intra_sentence, "masked"), HeadPattern(positional(-1))]
    adapters = [PatternAdapter(12, 4, patterns, width=8).double() for _ in range(2)]
    maps = pattern_maps([pattern.predicate for pattern in patterns], TOKENS, SEGMENTS)
    plain = model(TOKENS)
    with adapted(model, adapters, maps):
        assert torch.equal(model(TOKENS), plain)
        model(TOKENS).sum().backward()
    assert bool(adapters[0].up.weight.grad is not None and adapters[0].up.weight.grad.abs().sum() > 0)
    nn.init.normal_(adapters[1].up.weight)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    attention = model.blocks[1].attention
    with adapted(model, adapters, maps):
        found = attention(x)
    down = x @ adapters[1].down.weight.T
    torch.testing.assert_close(found, attention(x) + adapters[1].heads(down, maps) @ adapters[1].up.weight.T, **EXACT)
    assert torch.equal(model(TOKENS), plain)
    with pytest.raises(OptionError, match="2 attention layers"), adapted(model, adapters[:1], maps):
        pass


@pytest.mark.paper("human_attention_patterns")
def test_an_adapter_leaves_a_bert_bit_for_bit() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import FAMILIES, inputs_of, output_of

    model = FAMILIES["bert"]()
    inputs = inputs_of(model)
    count, length = inputs["input_ids"].shape
    width = model.config.hidden_size
    torch.manual_seed(0)
    adapters = [PatternAdapter(width) for _ in range(model.config.num_hidden_layers)]
    maps = torch.zeros(count, 0, length, length, dtype=torch.bool)
    plain = output_of(model, **inputs)
    with adapted(model, adapters, maps):
        assert torch.equal(output_of(model, **inputs), plain)
        nn.init.normal_(adapters[0].up.weight)
        assert not torch.equal(output_of(model, **inputs), plain)
    assert torch.equal(output_of(model, **inputs), plain)


@pytest.mark.paper("human_attention_patterns")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_patterns_in_a_causal_model_do_not_look_ahead(name: str) -> None:
    """In heads and in adapters, with padding; a pattern's rows are shared out among what a head sees."""
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import FAMILIES, padding

    torch.manual_seed(0)
    model = FAMILIES[name]()
    tokens = TOKENS.clone()
    tokens[:, 5:] += 20
    mask = padding(2, 8, left=2)
    pattern = intra_sentence(TOKENS, torch.where(mask > 0, SEGMENTS.clamp_min(0), -1))
    edits = fix_heads({(1, 2): pattern, (0, 0): positional(1)(TOKENS)})
    outputs = []
    for inputs in (TOKENS, tokens):
        with torch.no_grad(), intervene(model, *edits), regard.capture(model, "weights") as trace:
            outputs.append(model(inputs, attention_mask=mask).logits)
    torch.testing.assert_close(outputs[0][:, :5], outputs[1][:, :5], atol=1e-6, rtol=0)
    found = trace[1].weights
    assert found is not None
    for i in range(8):
        inside = [j for j in range(i + 1) if pattern[1, i, j]]
        for j in inside:
            assert float(found[1, 2, i, j]) == pytest.approx(1 / len(inside))
        assert i < 2 or float(found[1, 2, i, i + 1 :].abs().sum()) == 0
    # The key after the query is never seen: the head keeps its own weights.
    with torch.no_grad(), regard.capture(model, "weights") as own:
        model(tokens, attention_mask=mask)
    assert trace[0].weights is not None and own[0].weights is not None
    torch.testing.assert_close(trace[0].weights[:, 0], own[0].weights[:, 0])

    adapters = [PatternAdapter(32, 2, [HeadPattern(intra_sentence)]) for _ in attention_sites(model)]
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight, std=0.3)
    maps = pattern_maps([intra_sentence], TOKENS, SEGMENTS.clamp_min(0))
    with pytest.raises(OptionError, match="what comes later"), adapted(model, adapters, maps):
        model(TOKENS)
    past = torch.ones(1, 8, 8, dtype=torch.bool).tril()
    outputs = []
    for inputs in (TOKENS, tokens):
        with torch.no_grad(), adapted(model, adapters, maps, past):
            outputs.append(model(inputs).logits)
    torch.testing.assert_close(outputs[0][:, :5], outputs[1][:, :5], atol=1e-5, rtol=0)
    with torch.no_grad():
        plain = model(TOKENS).logits
    assert not torch.allclose(outputs[0], plain, atol=1e-3)


@pytest.mark.paper("human_attention_patterns")
def test_heads_leave_out_what_queries_do_not_see() -> None:
    torch.manual_seed(0)
    patterns = [HeadPattern(intra_sentence), HeadPattern(intra_sentence, "masked")]
    layer = PatternHeads(12, 3, patterns).double()
    x, visible = torch.randn(2, 8, 12, dtype=torch.float64), torch.ones(1, 8, 8, dtype=torch.bool).tril(-1)
    maps = pattern_maps([p.predicate for p in patterns], TOKENS, SEGMENTS)
    found = layer.weights(x, maps, visible)
    for b in range(2):
        for i in range(1, 8):
            inside = [j for j in range(i) if maps[b, 0, i, j]] or list(range(i))
            expected = torch.zeros(8, dtype=torch.float64)
            expected[inside] = 1 / len(inside)
            torch.testing.assert_close(found[b, 0, i], expected, **EXACT)
            assert found[b, 1, i].nonzero()[:, 0].tolist() == inside
            assert found[b, 2, i].nonzero()[:, 0].tolist() == list(range(i))
    # Padding alone is the same for all queries.
    real = SEGMENTS >= 0
    assert torch.equal(layer(x, maps, real), layer(x, maps, real[:, None].expand(2, 8, 8)))


@pytest.mark.paper("human_attention_patterns")
def test_discovery_in_hugging_face_models_and_under_a_retrofit() -> None:
    """Grouped keys, padding, half precision; maps of a mechanism in the layers' place."""
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import FAMILIES

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        said = outputs.logits if "logits" in outputs else outputs.last_hidden_state[..., :10]
        return F.cross_entropy(said.float().transpose(1, 2), targets, reduction="none").mean(1)

    patterns = {"matching": matching_token, "previous": positional(-1)}
    mask = (SEGMENTS >= 0).long()
    for name, dtype in (("llama", torch.float32), ("bert", torch.bfloat16)):
        model = FAMILIES[name]().to(dtype).train()
        data = Documents({"input_ids": TOKENS, "attention_mask": mask}, TOKENS, SEGMENTS, TOKENS)
        with intervene(model, *fix_heads({(1, 3): positional(-1)(TOKENS, SEGMENTS)})):
            rows = discover(model, [data], patterns, loss)
        head = next(row for row in rows if (row.layer, row.head) == (1, 3))
        assert head.pattern == "previous" and head.relevance["previous"] == pytest.approx(1, abs=1e-2)
        assert all(0 <= row.importance <= 1 and 0 <= row.relevance["matching"] <= 1.01 for row in rows)
        assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model = FAMILIES["bert"]()
    with regard.retrofit(model, "linear_attention"):
        rows = discover(model, [Documents(TOKENS, TOKENS, SEGMENTS, TOKENS)], patterns, loss)
    assert len(rows) == 8 and all(row.relevance["previous"] > 0 for row in rows)


@pytest.mark.paper("human_attention_patterns")
def test_the_encoder_sees_tokens_through_its_patterns() -> None:
    torch.manual_seed(0)
    patterns = [HeadPattern(partial(matching_token, ignored=(MARKER,))), HeadPattern(intra_sentence, "masked")]
    model = PatternEncoder(12, marker=MARKER, patterns=patterns, embed_dim=12, num_heads=2, depth=1).double()
    tokens = torch.tensor([[0, 3, 4, 0, 5, 3]])
    seen: list[Tensor] = []
    model.blocks[0].attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["maps"]), with_kwargs=True
    )
    assert model(tokens).shape == (1, 6, 2)
    assert seen[0][0, 0].nonzero().tolist() == [[1, 5], [5, 1]]
    assert torch.equal(seen[0][0, 1], torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool())


@pytest.mark.paper("human_attention_patterns")
def test_documents_repeat_words_in_salient_sentences_alone() -> None:
    task = ExtractiveSummaryToy(40)
    inputs, targets = task.train
    assert torch.equal(inputs, ExtractiveSummaryToy(40).train[0])
    for document, answer in zip(inputs.view(40, 8, 7), targets.view(40, 8, 7), strict=True):
        assert (document[:, 0] == MARKER).all() and (document[:, 1:] != MARKER).all()
        assert (answer[:, 1:] == IGNORED).all() and int(answer[:, 0].sum()) == 3
        words = [set(sentence[1:].tolist()) for sentence in document]
        shared = [any(words[i] & words[j] for j in range(8) if j != i) for i in range(8)]
        assert shared == answer[:, 0].bool().tolist()
        keys = {word for i in range(8) for j in range(i) for word in words[i] & words[j]}
        assert len(keys) == 3 and max(keys) <= 60 and len(set().union(*words)) == 8 * 6 - 3
    # The right answer scores 1, and one of three chosen sentences right a third.
    perfect = torch.stack((-targets.clamp_min(0), targets.clamp_min(0)), -1).double()
    assert task.score(perfect, targets) == (40.0, 40)
    one = torch.zeros(1, 56, 2)
    marks = (targets[0] == 1).nonzero()[:, 0].tolist() + (targets[0] == 0).nonzero()[:, 0].tolist()
    one[0, [marks[0], marks[3], marks[4]], 1] = 1
    assert task.score(one, targets[:1])[0] == pytest.approx(1 / 3)


@pytest.mark.paper("human_attention_patterns")
def test_topics_last_from_one_boundary_to_the_next() -> None:
    task = TopicSegmentationToy(30, noise=0.0)
    inputs, targets = task.train
    for document, answer in zip(inputs.view(30, 8, 7), targets.view(30, 8, 7), strict=True):
        topic = answer[:, 0].cumsum(0)
        assert int(answer[0, 0]) == 0
        words = [set(document[topic == t][:, 1:].flatten().tolist()) for t in range(int(topic.max()) + 1)]
        assert all(len(own) <= 4 for own in words)
        assert sum(len(own) for own in words) == len(set().union(*words))
    fresh = task.batch(400, torch.Generator().manual_seed(0), "test")[1]
    rate = float((fresh.view(400, 8, 7)[:, 1:, 0] == 1).double().mean())
    assert rate == pytest.approx(0.3, abs=0.04)


def test_bad_input_is_explained() -> None:
    with pytest.raises(OptionError, match="segments"):
        intra_sentence(TOKENS, None)
    with pytest.raises(ShapeError, match="shaped as tokens"):
        intra_sentence(TOKENS, SEGMENTS[:, :3])
    with pytest.raises(OptionError, match="negative"):
        row_normalised(torch.tensor([[-1.0, 2.0]]))
    with pytest.raises(OptionError, match="'fixed' or 'masked'"):
        HeadPattern(first_token, "soft")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="each takes one head"):
        PatternHeads(8, 1, [HeadPattern(first_token)] * 2)
    with pytest.raises(ShapeError, match="pattern_maps"):
        PatternHeads(8, 2, [HeadPattern(first_token)])(torch.randn(1, 4, 8), torch.ones(1, 2, 4, 4))
    with pytest.raises(ShapeError, match="go with a pattern"):
        pattern_relevance(torch.ones(1, 2, 1, 4, 4), torch.ones(2, 5, 5))
    with pytest.raises(OptionError, match="0 to 1"):
        pattern_relevance(torch.ones(1, 2, 1, 4, 4), 2 * torch.ones(2, 4, 4))
    model = classifier()
    with pytest.raises(ShapeError, match="its maps"), intervene(model, *fix_heads({(0, 0): torch.ones(2, 4, 4)})):
        model(TOKENS)
    with pytest.raises(OptionError, match="every attention layer"):
        discover(Uneven(), [batch()], {"first": first_token}, cross_entropy)
    with pytest.raises(ShapeError, match="reduction='none'"):
        head_importance_taylor(classifier(), lambda out, y: cross_entropy(out, y).mean(), batch())
    with pytest.raises(OptionError, match="salient"):
        ExtractiveSummaryToy(5, salient=2)
    with pytest.raises(OptionError, match="content=2"):
        ExtractiveSummaryToy(5, content=2)
    with pytest.raises(OptionError, match="shift"):
        TopicSegmentationToy(5, shift=0.0)
    with pytest.raises(ShapeError, match="max_length"):
        PatternEncoder(5, max_length=2)(torch.zeros(1, 3, dtype=torch.int64))
