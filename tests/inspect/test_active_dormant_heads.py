"""Sinks, drains and peaks: loops from the definitions, heads built by hand, models of transformers, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, ShapeError
from regard.inspect.active_dormant_heads import (
    active_dormant_heads,
    dormancy,
    extreme_token_report,
    residual_peak,
    sink_logit_gap,
    sink_strength,
    value_drain,
    zero_head_effect,
)
from regard.inspect.backcopy import bigram_backcopy, bigram_transition, frequencies, trigger_tokens
from regard.inspect.intervene import ablate_heads, intervene, patch_inputs, set_attention
from regard.inspect.metrics import sink_mass
from regard.models.active_dormant_heads import BackcopyTransformer
from regard.models.attention_only import AttentionOnlyModel
from regard.nn import MultiHeadAttention
from regard.train.active_dormant_heads import backcopy_losses, backcopy_optimizer, train_backcopy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(vocab: int = 12) -> Tensor:
    rows = torch.rand(vocab, vocab, generator=generator(3), dtype=torch.float64).pow(3)
    return rows / rows.sum(-1, keepdim=True)


def causal_maps(*shape: int) -> Tensor:
    scores = torch.randn(*shape, generator=generator(1), dtype=torch.float64)
    visible = torch.ones(shape[-2:], dtype=torch.bool).tril(shape[-1] - shape[-2])
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


@pytest.mark.paper("active_dormant_heads")
@pytest.mark.parametrize("triggers", [3, (4, 7)])
def test_triggers_are_followed_by_what_stands_before_them_and_the_rest_by_the_chain(triggers: Any) -> None:
    transition = chain()
    tokens, mask = bigram_backcopy(400, 128, triggers=triggers, transition=transition, generator=generator())
    assert tokens.shape == mask.shape == (400, 128)
    assert bool((tokens[:, 0] == 12).all()) and not bool((tokens[:, 1:] == 12).any()) and not bool(mask[:, :2].any())
    which = trigger_tokens(transition, 3) if triggers == 3 else list(triggers)
    assert torch.equal(mask, torch.isin(tokens, torch.tensor(which)))
    now, then, before = tokens[:, 1:-1], tokens[:, 2:], tokens[:, :-2]
    here = mask[:, 1:-1]
    assert torch.equal(then[here], before[here]) and int(here.sum()) > 1000
    counts = torch.zeros(12, 12, dtype=torch.float64)
    counts.index_put_((now[~here], then[~here]), torch.ones(int((~here).sum()), dtype=torch.float64), accumulate=True)
    total = counts.sum(-1, keepdim=True)
    rest = [token for token in range(12) if token not in which]
    error = (counts / total.clamp_min(1) - transition)[rest]
    deviation = (transition * (1 - transition) / total.clamp_min(1)).sqrt()[rest]
    assert bool((total[rest] > 300).all()) and bool((error.abs() < 5 * deviation + 1e-3).all())


@pytest.mark.paper("active_dormant_heads")
def test_the_first_token_is_drawn_by_frequency_among_those_that_are_no_triggers() -> None:
    transition = chain()
    tokens, _ = bigram_backcopy(20_000, 2, triggers=3, transition=transition, generator=generator())
    often = frequencies(transition)
    assert torch.allclose(often @ transition, often) and float(often.sum()) == pytest.approx(1)
    often[trigger_tokens(transition, 3)] = 0
    assert torch.allclose(torch.bincount(tokens[:, 1], minlength=12) / 20_000, (often / often.sum()).float(), atol=0.02)
    again, _ = bigram_backcopy(2, 9, vocab=20, generator=generator())
    assert torch.equal(again, bigram_backcopy(2, 9, vocab=20, generator=generator())[0]) and int(again[0, 0]) == 20


@pytest.mark.paper("active_dormant_heads")
def test_bigrams_of_a_text() -> None:
    transition = bigram_transition("abababacz", 3)
    # a, b and c; b follows a three times, c once; nothing that counts follows c.
    assert torch.allclose(transition[0], torch.tensor([0, 0.75, 0.25], dtype=torch.float64))
    assert torch.allclose(transition[1], torch.tensor([1.0, 0, 0], dtype=torch.float64))
    assert torch.allclose(transition[2], torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64) / 7)
    # A chain with a period has its frequencies all the same.
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert torch.allclose(frequencies(swap), torch.tensor([0.5, 0.5], dtype=torch.float64))


@pytest.mark.paper("active_dormant_heads")
def test_sink_strength_of_uniform_and_of_identity_attention() -> None:
    length = 20
    uniform = torch.ones(length, length, dtype=torch.float64).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).expand(2, 3, -1, -1)
    expected = sum(1 / (t + 1) for t in range(1, length)) / (length - 1)
    assert torch.allclose(sink_strength(uniform), torch.full((3,), expected, dtype=torch.float64))
    assert bool((sink_strength(torch.eye(length).expand(2, 3, -1, -1)) == 0).all())
    # Query 0 alone is left out, which has nothing else to see.
    assert torch.allclose(sink_strength(uniform) * (length - 1) + 1, sink_mass(uniform).mean(0) * length)


@pytest.mark.paper("active_dormant_heads")
def test_metrics_are_the_loops_that_define_them() -> None:
    maps = causal_maps(3, 2, 4, 6, 8)
    values, hidden = torch.randn(3, 2, 4, 8, 5).double(), torch.randn(3, 2, 8, 5).double()
    scores, mask, k = maps.log(), torch.rand(2, 6, generator=generator(5)) > 0.4, 2
    layer, head = 1, 3
    strength, gaps, active = [], [], []
    for b in range(2):
        for q in range(6):
            if mask[b, q] and q + 2 > k:
                row = maps[layer, b, head, q]
                strength.append(float(row[k]))
                active.append(float(row.sum() - row[k]))
                others = [float(scores[layer, b, head, q, j]) for j in range(q + 3) if j != k]
                gaps.append(float(scores[layer, b, head, q, k]) - sum(others) / len(others))
    mean = lambda x: pytest.approx(sum(x) / len(x))  # noqa: E731
    assert float(sink_strength(maps, k, mask)[layer, head]) == mean(strength)
    assert float(sink_logit_gap(scores, k, mask)[layer, head]) == mean(gaps)
    assert float(dormancy(maps, {"some": mask}, k)["some"][layer, head]) == mean(active)
    # A query that does not see the sink, or nothing else, has no gap.
    windowed = scores.clone()
    windowed[:, 0, :, 1, k], windowed[:, 1, :, 5, :k], windowed[:, 1, :, 5, k + 1 :] = 3 * [float("-inf")]
    gaps = []
    for b, q in ((b, q) for b in range(2) for q in range(1, 6) if (b, q) not in ((0, 1), (1, 5))):
        others = [float(scores[layer, b, head, q, j]) for j in range(q + 3) if j != k]
        gaps.append(float(scores[layer, b, head, q, k]) - sum(others) / len(others))
    assert float(sink_logit_gap(windowed, k)[layer, head]) == mean(gaps)
    # Logits and logarithms of weights differ by a constant in each row.
    assert torch.allclose(sink_logit_gap(scores + torch.randn(3, 2, 4, 6, 1).double(), k), sink_logit_gap(scores, k))
    norms = values[layer, :, head].norm(dim=-1)
    others = torch.cat((norms[:, :k], norms[:, k + 1 :]), 1)
    assert float(value_drain(values, k)[layer, head]) == pytest.approx(float(norms[:, k].mean() / others.mean()))
    sizes = hidden[layer].norm(dim=-1)
    others = torch.cat((sizes[:, :k], sizes[:, k + 1 :]), 1)
    assert float(residual_peak(hidden, k)[layer]) == pytest.approx(float(sizes[:, k].mean() / others.mean()))


@pytest.mark.paper("active_dormant_heads")
def test_drain_does_not_change_with_the_scale_of_a_heads_values_and_leaves_padding_out() -> None:
    values = torch.randn(2, 3, 4, 9, 5, dtype=torch.float64)
    scale = torch.rand(3 - 1, 1, 4, 1, 1).double() + 0.1
    assert torch.allclose(value_drain(values * scale), value_drain(values))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 6:] = False
    assert torch.allclose(value_drain(values, mask=mask), value_drain(values[..., :6, :]))
    hidden = values[:, :, 0]
    assert torch.allclose(residual_peak(hidden, mask=mask), residual_peak(hidden[..., :6, :]))
    values[..., 0, :] = 0
    assert bool((value_drain(values) == 0).all())


@pytest.mark.paper("active_dormant_heads")
def test_dormancy_by_domain_tells_which_heads_switch() -> None:
    maps = torch.zeros(2, 2, 3, 3)
    # Head 0 rests in text 0 and works in text 1; head 1 works in both.
    maps[0, 0, :, 0] = maps[1, 0, :, 2] = maps[:, 1, :, 1] = 1
    found = dormancy(maps, {"one": torch.tensor([True, False]), "two": torch.tensor([False, True])})
    assert found["one"].tolist() == [0, 1] and found["two"].tolist() == [1, 1]
    assert active_dormant_heads(found).tolist() == [True, False]
    # The bounds themselves count; heads in between do not.
    activity = {"one": torch.tensor([0.3, 0.7, 0.31, 0.3]), "two": torch.tensor([0.7, 0.3, 0.7, 0.69])}
    assert active_dormant_heads(activity).tolist() == [True, True, False, False]
    # Weights of both signs do not cancel.
    signed = torch.zeros(1, 1, 3, 3)
    signed[..., 1], signed[..., 2] = 0.5, -0.5
    assert dormancy(signed, {"all": torch.ones(1, dtype=torch.bool)})["all"].tolist() == [1]
    # A row of zeros is at rest, sink or not.
    assert dormancy(torch.zeros(1, 1, 3, 3), {"all": torch.ones(1, dtype=torch.bool)})["all"].tolist() == [0]


@pytest.mark.paper("active_dormant_heads")
def test_relu_attention_can_say_nothing_and_softmax_cannot() -> None:
    query = torch.ones(1, 1, 4, 8, dtype=torch.float64)
    key = -torch.rand(1, 1, 4, 8, dtype=torch.float64) - 0.1
    value = torch.rand(1, 1, 4, 8, dtype=torch.float64) + 0.1
    relu = BackcopyTransformer(5, attn="relu", embed_dim=8).blocks[0].attention.mechanism
    soft = BackcopyTransformer(5, embed_dim=8).blocks[0].attention.mechanism
    assert bool((relu(query, key, value, causal=True) == 0).all())
    assert bool((soft(query, key, value, causal=True).norm(dim=-1) > 0.1).all())
    # relu(score) / t, of what is seen.
    key = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    weights = relu.weights(query, key, causal=True)[0, 0]
    for t in range(4):
        for j in range(4):
            score = float(query[0, 0, t] @ key[0, 0, j]) / 8**0.5
            assert float(weights[t, j]) == pytest.approx(max(score, 0) / (t + 1) if j <= t else 0)


def resting_model() -> AttentionOnlyModel:
    """Its head puts all weight on the first token, whose value is zero: channel 0 says 'start', and nothing reads it
    but the key."""
    model = AttentionOnlyModel(6, 6, embed_dim=4, depth=1, num_heads=1, max_length=16).double()
    attention = model.layers[0]
    with torch.no_grad():
        model.positions.weight.zero_()
        model.embed.weight[:, 0] = 0
        model.embed.weight[5] = torch.tensor([1.0, 0, 0, 0])
        for linear in (attention.query, attention.key):
            linear.weight.zero_()
            linear.bias.zero_()
        attention.query.bias[0] = 1
        attention.key.weight[0, 0] = 2000
        attention.value.weight[:, 0] = 0
        attention.value.bias.zero_()
    return model


@pytest.mark.paper("active_dormant_heads")
def test_a_resting_head_does_not_matter() -> None:
    model = resting_model()
    tokens = torch.cat((torch.full((3, 1), 5), torch.randint(0, 5, (3, 9), generator=generator())), 1)
    report = extreme_token_report(model, tokens)
    assert float(report.sink) == pytest.approx(1, abs=1e-6) and float(report.drain) == 0
    before = model(tokens)
    with intervene(model, ablate_heads([(0, 0)])):
        assert torch.allclose(model(tokens), before, atol=1e-12, rtol=0)
    assert float(zero_head_effect(model, {"all": tokens})["all"]) == pytest.approx(0, abs=1e-12)
    # With a value at the sink it does.
    with torch.no_grad():
        model.layers[0].value.weight[:, 0] = 1
    assert abs(float(zero_head_effect(model, {"all": tokens})["all"])) > 1e-3


@pytest.mark.paper("active_dormant_heads")
def test_so_it_is_with_a_head_of_a_hugging_face_model() -> None:
    small = pytest.importorskip("tests.retrofit.small_models")
    torch.manual_seed(0)
    model, tokens = small.llama(), small.tokens(2, 11)
    first = torch.zeros(11)
    first[0] = 1
    with regard.capture(model) as trace:
        model(tokens)
    value = trace[1].values[:, 1].clone()
    value[:, 0] = 0
    resting = (set_attention([(1, 2), (1, 3)], None, first), patch_inputs("value", {(1, 2): value}))
    # Heads 2 and 3 share their values. Edits of inputs come first, wherever they stand.
    with intervene(model, *resting), torch.no_grad():
        before = model(tokens).logits
    with intervene(model, *resting, ablate_heads([(1, 2)])), torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    with intervene(model, ablate_heads([(1, 2)])), torch.no_grad():
        assert not torch.allclose(model(tokens).logits, before)


@pytest.mark.paper("active_dormant_heads")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_report_reads_any_decoder(family: str) -> None:
    small = pytest.importorskip("tests.retrofit.small_models")
    torch.manual_seed(0)
    model, tokens = small.FAMILIES[family](), small.tokens(2, 13)
    mask = torch.rand(2, 13, generator=generator()) > 0.5
    report = extreme_token_report(model, tokens, query_mask=mask)
    with regard.capture(model, "all") as trace, torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    maps = trace.stack("weights")
    layers = len(trace)
    assert report.paths == tuple(trace.paths) and report.peak.shape == (layers + 1,)
    assert torch.allclose(report.sink, sink_strength(maps, 0, mask), atol=1e-6)
    groups = maps.shape[2] // trace[0].values.shape[1]
    assert torch.allclose(report.drain, value_drain(trace.stack("values")).repeat_interleave(groups, -1))
    # transformers norms the last of these states.
    assert torch.allclose(report.peak[:-1], residual_peak(torch.stack(states[:-1])))
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    leaving: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: leaving.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    assert torch.allclose(report.peak[-1], residual_peak(leaving[0])) and report.peak[-1] != report.peak[-2]
    with torch.no_grad():
        scores = trace[0].queries @ trace[0].keys.repeat_interleave(groups, 1).mT / trace[0].keys.shape[-1] ** 0.5
    scores = scores.masked_fill(maps[0] == 0, float("-inf"))
    assert torch.allclose(report.logit_gap[0], sink_logit_gap(scores, 0, mask), atol=1e-4)


@pytest.mark.paper("active_dormant_heads")
def test_rows_that_come_in_parts_make_the_same_report() -> None:
    small = pytest.importorskip("tests.retrofit.small_models")
    torch.manual_seed(0)
    # Longer than the rows that are formed at once; the window hides the sink from most queries.
    model, tokens = small.mistral(), torch.randint(3, 61, (1, 300))
    report = extreme_token_report(model, tokens)
    with regard.capture(model) as trace, torch.no_grad():
        model(tokens)
    maps = trace.stack("weights")
    assert bool((maps[..., 10:, 0] == 0).all())
    assert torch.allclose(report.sink, sink_strength(maps), atol=1e-6)
    assert torch.allclose(report.logit_gap, sink_logit_gap(maps.log()), atol=1e-4)


@pytest.mark.paper("active_dormant_heads")
def test_padding_is_left_out_of_a_report() -> None:
    small = pytest.importorskip("tests.retrofit.small_models")
    torch.manual_seed(0)
    model, tokens = small.llama(), small.tokens(1, 13)
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[:, 9:] = 0
    whole, cut = (
        extreme_token_report(model, batch) for batch in ({"input_ids": tokens, "attention_mask": mask}, tokens[:, :9])
    )
    for name in ("sink", "drain", "logit_gap", "peak"):
        assert torch.allclose(getattr(whole, name), getattr(cut, name), atol=1e-5), name
    # Both masks hold: padding stays out where queries are chosen.
    chosen = torch.rand(1, 13, generator=generator()) > 0.5
    both = extreme_token_report(model, {"input_ids": tokens, "attention_mask": mask}, query_mask=chosen)
    assert bool(chosen[:, 9:].any())
    assert torch.allclose(both.sink, extreme_token_report(model, tokens[:, :9], query_mask=chosen[:, :9]).sink)
    with pytest.raises(OptionError, match="right"):
        extreme_token_report(model, {"input_ids": tokens, "attention_mask": mask.flip(1)})
    with pytest.raises(ShapeError, match="query_mask"):
        extreme_token_report(model, {"input_ids": tokens, "attention_mask": mask}, query_mask=chosen[:, :9])
    with pytest.raises(ShapeError, match=r"\(1, 13\)"):
        extreme_token_report(model, tokens, query_mask=torch.ones(1, 14, dtype=torch.bool))
    with pytest.raises(OptionError, match="0 to 12"):
        extreme_token_report(model, {"input_ids": tokens, "attention_mask": mask}, k=13)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Encoder(nn.Module):
    """One layer that sees both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([MultiHeadAttention(8, 2)])

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](self.embed(ids))


@pytest.mark.paper("active_dormant_heads")
def test_queries_of_an_encoder_see_later_keys_too() -> None:
    torch.manual_seed(0)
    model, tokens = Encoder(), torch.randint(0, 20, (2, 300))
    report = extreme_token_report(model, tokens)
    with regard.capture(model, "weights") as trace, torch.no_grad():
        model(tokens)
    logs = trace.stack("weights").log().double()
    others = (logs[..., 1:].sum(-1)) / 299
    assert torch.allclose(report.logit_gap, (logs[..., 0] - others)[..., 1:].mean((1, 3)).float(), atol=1e-5)
    small = pytest.importorskip("tests.retrofit.small_models")
    with pytest.raises(OptionError, match="encoder and decoder"):
        extreme_token_report(small.FAMILIES["t5"](), tokens)


@pytest.mark.paper("active_dormant_heads")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # Sums of these leave float16's range, and of half precision's steps.
    values = (100 * torch.randn(2, 3, 4000, 5, generator=generator())).to(dtype)
    values[..., 0, :] *= 3
    drain, peak = value_drain(values), residual_peak(values[:, 0])
    assert drain.dtype == peak.dtype == torch.float32
    assert torch.allclose(drain, value_drain(values.double()).float()) and bool((drain > 1).all())
    assert torch.allclose(peak, residual_peak(values[:, 0].double()).float())
    maps = causal_maps(2, 3, 700, 700).to(dtype)
    masks = {"all": torch.ones(2, dtype=torch.bool)}
    assert torch.allclose(sink_strength(maps).double(), sink_strength(maps.double()))
    assert torch.allclose(dormancy(maps, masks)["all"].double(), dormancy(maps.double(), masks)["all"])
    scores = (8 * torch.randn(2, 3, 700, 700, generator=generator())).to(dtype)
    assert torch.allclose(sink_logit_gap(scores).double(), sink_logit_gap(scores.double()), atol=1e-5)


@pytest.mark.paper("active_dormant_heads")
def test_effects_of_heads_are_those_of_cutting_their_output_projection() -> None:
    torch.manual_seed(0)
    model = BackcopyTransformer(13, embed_dim=16, depth=2, num_heads=2, max_length=32)
    tokens, mask = bigram_backcopy(8, 24, transition=chain(), generator=generator())
    effects = zero_head_effect(model, {"trigger": (tokens, mask), "other": (tokens, ~mask), "all": tokens})
    base = backcopy_losses(model(tokens), tokens, mask)
    with torch.no_grad():
        model.blocks[1].attention.out.weight[:, 8:] = 0
    cut = backcopy_losses(model(tokens), tokens, mask)
    for name, place in (("all", 0), ("other", 1), ("trigger", 2)):
        assert float(effects[name][1, 1]) == pytest.approx(float((cut[place] - base[place]).detach()), abs=1e-5)
    assert effects["all"].shape == (2, 2)


@pytest.mark.paper("active_dormant_heads")
def test_weights_that_do_not_sum_to_one_have_no_logits() -> None:
    model = BackcopyTransformer(13, attn="relu", embed_dim=16, depth=1, max_length=32)
    report = extreme_token_report(model, bigram_backcopy(4, 16, transition=chain(), generator=generator())[0])
    assert bool(report.logit_gap.isnan().all()) and bool(report.sink.isfinite().all())


@pytest.mark.paper("active_dormant_heads")
@pytest.mark.parametrize("attn", ["softmax", "relu"])
def test_a_softmax_head_learns_to_rest_on_a_sink_and_a_relu_head_without(attn: Any) -> None:
    tokens, mask = bigram_backcopy(64, 24, 24, generator=generator(9))
    torch.manual_seed(0)
    model = BackcopyTransformer(25, attn=attn, embed_dim=48, max_length=24)
    history = train_backcopy(
        model,
        lambda n, g: bigram_backcopy(n, 24, 24, generator=g),
        steps=200,
        batch_size=32,
        lr=5e-3,
        watch=lambda: extreme_token_report(model, tokens, query_mask=~mask),
        at=[0, 200],
    )
    before, after = history.watched[0], history.watched[200]
    at_triggers = extreme_token_report(model, tokens, query_mask=mask)
    assert history.backcopy[0] > 2 and sum(history.backcopy[-5:]) / 5 < 0.3 and len(history.markov) == 200
    assert float(at_triggers.sink) < 0.05
    if attn == "softmax":
        assert float(before.sink) < 0.2 and float(after.sink) > 0.6 and float(after.drain) < 0.4
        assert float(after.logit_gap) > 2 > float(before.logit_gap)
    else:
        assert float(after.sink) < 0.05 and float(after.drain) > 0.4


@pytest.mark.paper("active_dormant_heads")
def test_optimisers_and_mistakes() -> None:
    model = BackcopyTransformer(5, embed_dim=8)
    assert isinstance(backcopy_optimizer(model, "adam"), torch.optim.AdamW)
    descent = backcopy_optimizer(model, "sgd")
    assert isinstance(descent, torch.optim.SGD) and descent.defaults["momentum"] == 0.9
    adam = backcopy_optimizer(model).defaults
    assert adam["lr"] == 3e-4 and adam["betas"] == (0.9, 0.99) and descent.defaults["lr"] == 0.03
    assert backcopy_optimizer(model, lr=0.0).defaults["lr"] == 0
    with pytest.raises(OptionError, match="adam"):
        backcopy_optimizer(model, "rmsprop")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="relu"):
        BackcopyTransformer(5, attn="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="max_length"):
        BackcopyTransformer(5, embed_dim=8, max_length=4)(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(OptionError, match="sum 1"):
        bigram_backcopy(1, 4, transition=torch.ones(3, 3))
    with pytest.raises(ShapeError, match="transition"):
        bigram_backcopy(1, 4, vocab=4, transition=chain(3))
    with pytest.raises(OptionError, match="Triggers"):
        bigram_backcopy(1, 4, triggers=(9,), transition=chain(3))
    with pytest.raises(OptionError, match="characters"):
        bigram_transition("aab", 4)
    with pytest.raises(OptionError, match="sink"):
        sink_strength(torch.ones(1, 1, 3, 3), 3)
    with pytest.raises(OptionError, match="sink"):
        sink_logit_gap(torch.ones(1, 1, 3, 3), -1)
    with pytest.raises(ShapeError, match="mask"):
        sink_strength(torch.ones(1, 1, 3, 3), 0, torch.ones(2, 3, dtype=torch.bool))
    for measure in (value_drain, residual_peak):
        with pytest.raises(ShapeError, match=r"\(batch, length\)"):
            measure(torch.ones(2, 3, 4, 5), mask=torch.ones(2, 5, dtype=torch.bool))
        with pytest.raises(OptionError, match="padding"):
            measure(torch.ones(2, 2, 4, 5), mask=torch.tensor([[False, True, True, True], [True] * 4]))
        with pytest.raises(OptionError, match="several tokens"):
            measure(torch.ones(2, 2, 1, 5))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ShapeError, match="'one'"):
        zero_head_effect(model, {"one": (ids, torch.ones(1, 3, dtype=torch.bool))})
    with pytest.raises(OptionError, match="next token"):
        zero_head_effect(model, {"one": (ids, torch.tensor([[False, False, False, True]]))})
    with pytest.raises(ShapeError, match="same heads"):
        active_dormant_heads({"one": torch.ones(2), "two": torch.ones(3)})
    with pytest.raises(ShapeError, match="Values"):
        value_drain(torch.ones(3, 3))
    with pytest.raises(OptionError, match="two domains"):
        active_dormant_heads({"one": torch.ones(2)})
