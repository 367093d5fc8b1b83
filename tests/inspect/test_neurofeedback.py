"""Neurofeedback: axes against numpy and scikit-learn, effects against theory, prompts against their parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.bench.feedback_tasks import HyperplaneLabels
from regard.errors import OptionError, ShapeError
from regard.inspect.logistic import fit_logistic
from regard.inspect.neurofeedback import (
    Binarizer,
    ControlEffect,
    EvenLikert,
    activation_axes,
    axis_score,
    control_effect,
    ideal_observer,
    metacognitive_dimension,
    report_accuracy,
    span_states,
)
from regard.inspect.neurofeedback_prompts import (
    SCORE_FIELD,
    neurofeedback_prompt,
    sample_span,
    score_fields,
    span_prompt,
)
from regard.models.sequence import SequenceModel


def states(n: int = 200, dim: int = 12) -> Tensor:
    """Correlated states of unequal variances, off the origin."""
    return torch.randn(n, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + 3


def small(vocab: int = 20) -> SequenceModel:
    return SequenceModel(vocab, vocab_size=vocab, embed_dim=16, depth=3, num_heads=2).double().eval()


@pytest.mark.paper("neurofeedback")
def test_effect_is_zero_for_one_sample_antisymmetric_and_free_of_units() -> None:
    a, b = torch.randn(40, 3).double() + 0.7, torch.randn(25, 3).double()
    effect = control_effect(a, b)
    assert torch.equal(control_effect(a, a).d, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(control_effect(b, a).d, -effect.d)
    torch.testing.assert_close(control_effect(5 * a - 2, 5 * b - 2).d, effect.d)
    torch.testing.assert_close(control_effect(-a, -b).d, -effect.d)


@pytest.mark.paper("neurofeedback")
def test_effect_by_hand() -> None:
    effect = control_effect(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 3.0]))
    pooled = math.sqrt((2 * 4 + 1 * 2) / 3)
    d = 2 / pooled
    half = 1.96 * math.sqrt(5 / 6 + d**2 / 10)
    assert (float(effect.d), float(effect.low), float(effect.high)) == pytest.approx((d, d - half, d + half))
    for sign in (1, -1):
        endless = control_effect(sign * torch.ones(3), torch.zeros(3))
        assert float(endless.d) == float(endless.low) == float(endless.high) == sign * math.inf
        assert metacognitive_dimension(endless) == (sign == 1)


@pytest.mark.paper("neurofeedback")
def test_interval_holds_the_true_effect_as_often_as_it_says() -> None:
    ones, zeros = torch.randn(60, 4000) + 0.5, torch.randn(60, 4000)
    effect = control_effect(ones, zeros)
    held = ((effect.low < 0.5) & (effect.high > 0.5)).double().mean()
    assert abs(float(held) - 0.95) < 0.012


@pytest.mark.paper("neurofeedback")
def test_dimension_counts_axes_that_moved_as_asked() -> None:
    noise = torch.randn(200, 5).double()
    moved = noise + torch.tensor([2.0, 0.0, 1.0, -2.0, 0.0])
    assert metacognitive_dimension(control_effect(moved, noise)) == 2
    assert metacognitive_dimension(ControlEffect(torch.zeros(0), torch.zeros(0), torch.zeros(0))) == 0


@pytest.mark.paper("neurofeedback")
@pytest.mark.parametrize("n", [2, 7, 30, 101])
def test_median_split_is_balanced_to_one_example(n: int) -> None:
    scores = torch.randn(n).double() ** 3 + 1
    labels = Binarizer().fit(scores)(scores)
    assert abs(int(labels.sum()) - (n - int(labels.sum()))) <= 1
    assert float(scores[labels == 1].min()) > float(scores[labels == 0].max())


@pytest.mark.paper("neurofeedback")
def test_threshold_that_is_given_stays() -> None:
    scores = torch.tensor([-1.0, 0.0, 5.0, 7.0])
    assert Binarizer(0.0).fit(scores)(scores).tolist() == [0, 1, 1, 1]
    # A median is that of the last fit.
    assert Binarizer().fit(scores + 100).fit(scores).threshold == 2.5


@pytest.mark.paper("neurofeedback")
def test_six_levels_split_each_side_of_zero_evenly() -> None:
    scores = torch.cat((-torch.arange(1, 31).double(), 0.1 * torch.arange(1, 61).double()))
    labels = EvenLikert(6).fit(scores)(scores)
    assert labels.bincount(minlength=7).tolist() == [0, 10, 10, 10, 20, 20, 20]
    assert ((labels > 3) == (scores >= 0)).all()
    assert (labels[scores.argsort()].diff() >= 0).all()
    # 0 itself belongs to the upper side.
    assert EvenLikert(2).fit(scores)(torch.tensor([-1e-9, 0.0])).tolist() == [1, 2]


@pytest.mark.paper("neurofeedback")
def test_score_is_the_dot_product_with_what_the_layer_got() -> None:
    model, tokens = small(), torch.randint(20, (30, 6))
    spans = torch.tensor([[1, 4], [3, 6]]).expand(30, 2, 2)
    with regard.capture(model) as trace, torch.no_grad():
        model(tokens)
    entered = trace[2].hidden_states
    assert entered is not None
    by_hand = torch.stack((entered[:, 1:4].mean(1), entered[:, 3:6].mean(1)), 1)
    pooled = span_states(model, tokens, spans, 2)
    torch.testing.assert_close(pooled, by_hand)
    axes = activation_axes(pooled[:, 0], ks=[1, 3])
    expected = (by_hand - by_hand[:, 0].mean(0)) @ axes.directions.T
    torch.testing.assert_close(axis_score(pooled, axes), expected)
    # Layer 2's entrance is what the second block gives.
    hidden = model.embed(tokens)
    for block in model.blocks[:2]:
        hidden = block(hidden, causal=True)
    torch.testing.assert_close(entered, hidden.detach())


@pytest.mark.paper("neurofeedback")
def test_components_are_orthogonal_and_their_scores_uncorrelated() -> None:
    hidden = states()
    axes = activation_axes(hidden, ks=range(1, 13))
    torch.testing.assert_close(axes.directions @ axes.directions.T, torch.eye(12, dtype=torch.float64))
    scores = axis_score(hidden, axes)
    torch.testing.assert_close(scores.mean(0), torch.zeros(12, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.corrcoef(scores.T), torch.eye(12, dtype=torch.float64))
    by_numpy = np.linalg.eigvalsh(np.cov(hidden.T.numpy(), bias=True))[::-1]
    torch.testing.assert_close(axes.deviation.square(), torch.from_numpy(by_numpy.copy()))
    assert float(axes.variance_share(hidden).sum()) == pytest.approx(1)


@pytest.mark.paper("neurofeedback")
def test_components_have_a_sign_and_end_where_the_states_do() -> None:
    """States that fill three of eight dimensions."""
    hidden = torch.randn(40, 3).double() @ torch.randn(3, 8).double()
    axes = activation_axes(hidden, ks=[1, 2, 3])
    assert bool((axes.directions.amax(1) == axes.directions.abs().amax(1)).all())
    torch.testing.assert_close(activation_axes(-hidden, ks=[1, 2, 3]).directions, axes.directions)
    assert activation_axes(hidden).names == ("PC1", "PC2")
    with pytest.raises(OptionError, match="components 1 to 3"):
        activation_axes(hidden, ks=[4])


@pytest.mark.paper("neurofeedback")
def test_default_components_are_the_papers_as_far_as_states_go() -> None:
    assert activation_axes(states()).names == ("PC1", "PC2", "PC4", "PC8")
    assert activation_axes(states(6)).names == ("PC1", "PC2", "PC4")


@pytest.mark.paper("neurofeedback")
@pytest.mark.parametrize("n", [200, 8])
def test_regression_axis_agrees_with_scikit_learn(n: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    hidden = states(n)
    labels = (hidden[:, 0] + torch.randn(n) > hidden[:, 0].mean()).long()
    ours, offset = fit_logistic(hidden, labels)
    theirs = linear_model.LogisticRegression(tol=1e-10, max_iter=20_000).fit(hidden.numpy(), labels.numpy())
    torch.testing.assert_close(ours, torch.from_numpy(theirs.coef_[0]), atol=2e-5, rtol=1e-4)
    assert float(offset) == pytest.approx(float(theirs.intercept_[0]), abs=2e-4, rel=1e-4)
    axes = activation_axes(hidden, "lr", labels=labels)
    torch.testing.assert_close(axes.directions[0], ours / ours.norm())
    scores = axis_score(hidden, axes)[:, 0]
    assert scores[labels == 1].mean() > scores[labels == 0].mean()


def report_of(model: nn.Module, sentences: Tensor, labels: Tensor) -> Tensor:
    prompt = span_prompt(sentences, labels, 16, 17)
    with torch.no_grad():
        return report_accuracy(model(prompt.tokens), prompt.label_positions, 16, 17, labels).difference


@pytest.mark.paper("neurofeedback")
def test_flipped_labels_turn_the_told_share_round_for_a_symmetric_model() -> None:
    sentences, labels = torch.randint(16, (5, 6, 3)), torch.randint(2, (5, 6))

    class Symmetric(nn.Module):
        """A linear reader of which labels came before: swapping all of them swaps the two logits."""

        def forward(self, tokens: Tensor) -> Tensor:
            votes = ((tokens == 17).double() - (tokens == 16).double()).cumsum(1)
            logits = torch.zeros(*tokens.shape, 20, dtype=torch.float64)
            logits[..., 16], logits[..., 17] = -votes, votes
            return logits

    shown, flipped = (report_of(Symmetric(), sentences, x).sigmoid() for x in (labels, 1 - labels))
    torch.testing.assert_close(flipped, 1 - shown)
    assert (shown - 0.5).abs().max() > 0.3


@pytest.mark.paper("neurofeedback")
def test_report_counts_by_shots() -> None:
    """Logits that know every label from the second shot on, and are wrong before."""
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    prompt = span_prompt(torch.zeros(2, 4, 2, dtype=torch.long), labels, 1, 2)
    assert prompt.tokens[0].tolist() == [0, 0, 2, 0, 0, 1, 0, 0, 2, 0, 0, 1]
    logits = torch.zeros(2, 12, 3)
    for row in range(2):
        for shot in range(4):
            right = (2.0 if labels[row, shot] else -2.0) * (1 if shot >= 2 else -1)
            logits[row, 3 * shot + 1, 2] = right
            logits[row, 3 * shot + 1, 0] = 50  # another word does not count
    even = report_accuracy(0 * logits, prompt.label_positions, 1, 2, labels)
    assert even.accuracy.tolist() == labels.double().mean(0).tolist()  # an undecided model says 1
    told = report_accuracy(logits, prompt.label_positions, 1, 2, labels)
    assert told.accuracy.tolist() == [0, 0, 1, 1]
    sure, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert told.cross_entropy.tolist() == pytest.approx([wrong, wrong, sure, sure])


@pytest.mark.paper("neurofeedback")
def test_implicit_control_of_identical_instructions_is_exactly_zero() -> None:
    model, sentences, labels = small(), torch.randint(16, (12, 5, 3)), torch.randint(2, (12, 4))
    scores = {}
    axes = None
    for target, asked in ((1, 1), (0, 1), (2, 0)):
        prompt = span_prompt(sentences, labels, 16, 17, "implicit", target=asked, marker=18)
        last = span_states(model, prompt.tokens, prompt.spans[:, -1:], 2)[:, 0]
        axes = axes or activation_axes(last)
        scores[target] = axis_score(last, axes)
    assert torch.equal(control_effect(scores[1], scores[0]).d, torch.zeros(len(axes.names) if axes else 0).double())
    assert (control_effect(scores[1], scores[2]).d != 0).all()


@pytest.mark.paper("neurofeedback")
def test_implicit_prompts_differ_in_the_target_alone_and_hold_the_sentence() -> None:
    sentences, labels = torch.randint(16, (4, 5, 3)), torch.randint(2, (4, 4))
    one, zero = (span_prompt(sentences, labels, 16, 17, "implicit", target=c, marker=18) for c in (1, 0))
    assert (one.tokens != zero.tokens).sum(1).tolist() == [1] * 4
    for prompt in (one, zero):
        found = torch.stack([prompt.tokens[:, a:b] for a, b in prompt.spans[0].tolist()], 1)
        assert torch.equal(found, sentences)
    explicit = span_prompt(sentences, labels, 16, 17, "explicit", target=1, marker=18)
    assert torch.equal(explicit.tokens, one.tokens[:, :-3])


@pytest.mark.paper("neurofeedback")
def test_explicit_replies_come_from_the_model() -> None:
    class Counting(nn.Module):
        """Sure that the next token is one more than the last; label tokens it would like best of all."""

        def forward(self, tokens: Tensor) -> Tensor:
            logits = 50.0 * nn.functional.one_hot((tokens + 1) % 16, 20)
            logits[..., 16:] = 80
            return logits

    start = torch.tensor([[3], [7]])
    # Odds of e at temperature 1 are a certainty near 0, and even where it is high.
    wavering = nn.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    drawn = [sample_span(wavering, torch.zeros(400, 1).long(), 1, t)[:, 1].double().mean() for t in (0.01, 100.0)]
    assert float(drawn[0]) == 1 and abs(float(drawn[1]) - 0.5) < 0.1
    assert sample_span(Counting(), start, 3, allowed=torch.arange(16)).tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


@pytest.mark.paper("neurofeedback")
def test_chat_prompts() -> None:
    said = [("Ask a.", "One."), ("Ask b.", "Two."), ("Ask c.", "Three.")]
    report = neurofeedback_prompt(said, [1, 0])
    assert [turn["role"] for turn in report] == ["system"] + ["user", "assistant"] * 3
    assert [turn["content"] for turn in report[2::2]] == ["One. [Score: {1}]", "Two. [Score: {0}]", "Three. [Score: {"]
    flipped = neurofeedback_prompt(said, [1, 0], flipped=True)
    assert [turn["content"] for turn in flipped[2:5:2]] == ["One. [Score: {0}]", "Two. [Score: {1}]"]
    explicit = neurofeedback_prompt(said, [1, 0], "explicit", 1)
    implicit = [neurofeedback_prompt(said, [1, 0], "implicit", target) for target in (0, 1)]
    assert explicit[-1]["role"] == "user" and "Ask c." in explicit[-1]["content"]
    assert implicit[1][:-1] == explicit and implicit[1][-1]["content"] == "Three."
    assert [a == b for a, b in zip(*implicit, strict=True)] == [True] * 5 + [False, True]
    six = neurofeedback_prompt(["a", "b"], [6, 2], levels=6, flipped=True)
    assert [turn["content"] for turn in six[2::2]] == ["a [Score: {1}]", "b [Score: {5}]"]


@pytest.mark.paper("neurofeedback")
def test_score_fields_are_found_in_a_rendered_prompt() -> None:
    turns = neurofeedback_prompt(["One.", "Two.", "Three."], [1, 0, 1])
    text = "".join(turn["content"] for turn in turns)
    tokens = torch.tensor([ord(letter) for letter in text])
    places = score_fields(tokens, [ord(letter) for letter in SCORE_FIELD])
    assert [text[place] for place in places.tolist()] == ["1", "0", "1"]
    assert len(score_fields(tokens[:3], [1, 2, 3, 4])) == 0


@pytest.mark.paper("neurofeedback")
def test_ideal_observer_learns_a_hyperplane_and_guesses_at_none() -> None:
    hidden = states(400, 4)
    labels = Binarizer().fit(hidden[:, 1])(hidden[:, 1])
    found = [ideal_observer(hidden, labels, n) for n in (0, 8, 200)]
    assert found[0] == pytest.approx((0.5, math.log(2)))
    assert found[2][0] > 0.95 > found[1][0] - 0.1 and found[2][1] < found[1][1] < 0.7
    ones = torch.ones(10, dtype=torch.long)
    assert ideal_observer(torch.randn(10, 3), ones, 4) == pytest.approx((1.0, -math.log(5 / 6)))


@pytest.mark.paper("neurofeedback")
def test_runs_on_a_language_model() -> None:
    small_models = pytest.importorskip("tests.retrofit.small_models")
    model, tokens = small_models.llama().eval(), small_models.tokens()
    spans = torch.tensor([[2, 9]]).expand(2, 1, 2)
    got = span_states(model, {"input_ids": tokens}, spans, 1)
    with torch.no_grad():
        states_ = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got[:, 0], states_[1][:, 2:9].mean(1))


def test_layers_of_an_encoder_and_decoder_are_those_of_discover() -> None:
    """Two of the encoder; of the decoder's four the second and fourth are cross-attention, which enters midway."""
    small_models = pytest.importorskip("tests.retrofit.small_models")
    model = small_models.t5().eval()
    inputs = {"input_ids": small_models.tokens(2, 13), "decoder_input_ids": small_models.tokens(2, 9)}
    spans = torch.tensor([[1, 5]]).expand(2, 1, 2)
    with torch.no_grad():
        said = model(**inputs, output_hidden_states=True)
    encoder, decoder = said.encoder_hidden_states, said.decoder_hidden_states
    for layer, states_ in {0: encoder[0], 1: encoder[1], 2: decoder[0], 4: decoder[1]}.items():
        torch.testing.assert_close(span_states(model, inputs, spans, layer)[:, 0], states_[:, 1:5].mean(1))
    for layer in (-1, 6):
        with pytest.raises(OptionError, match="0 to 5"):
            span_states(model, inputs, spans, layer)


def test_half_precision_states_do_not_overflow() -> None:
    model = SequenceModel(20, vocab_size=20, embed_dim=16, depth=1, num_heads=2).eval()
    with torch.no_grad():
        model.embed.weight.fill_(30_000.0)
    tokens = torch.randint(20, (2, 9))
    got = span_states(model.half(), tokens, torch.tensor([[0, 9]]).expand(2, 1, 2), 0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full_like(got, 30_000.0), rtol=1e-3, atol=0)


@pytest.mark.paper("neurofeedback")
def test_task_labels_are_a_plane_of_the_embeddings() -> None:
    task = HyperplaneLabels(count=40, dim=3)
    inputs, targets = task.batch(3, torch.Generator().manual_seed(0))
    for row, target in zip(inputs.view(3, 40, 2, 5), targets.view(3, 40, 2), strict=True):
        asked, shown = row.unbind(1)
        assert torch.equal(asked[:, :3], shown[:, :3]) and (asked[:, 3:] == torch.tensor([0.0, 1.0])).all()
        y = target[:, 0]
        assert torch.equal(shown[:, 3], 2.0 * y - 1) and (target[:, 1] < 0).all()
        normal, offset = fit_logistic(shown[:, :3], y, penalty=1e-6)
        assert (((shown[:, :3].double() @ normal + offset) > 0) == (y == 1)).all()


@pytest.mark.paper("neurofeedback")
def test_bad_input_is_told() -> None:
    hidden = states(10)
    for ks in ([0], [40], []):
        with pytest.raises(OptionError, match="components 1 to"):
            activation_axes(hidden, ks=ks)
    with pytest.raises(OptionError, match="labels"):
        activation_axes(hidden, "lr")
    with pytest.raises(OptionError, match="both labels"):
        activation_axes(hidden, "lr", labels=torch.ones(10))
    with pytest.raises(ShapeError, match="dimensions"):
        axis_score(torch.randn(3, 5), activation_axes(hidden))
    for bad in (Binarizer(), EvenLikert()):
        with pytest.raises(OptionError, match="fit"):
            bad(torch.zeros(3))
    with pytest.raises(OptionError, match="even"):
        EvenLikert(5)
    with pytest.raises(OptionError, match="target"):
        neurofeedback_prompt(["a", "b"], [1], "implicit")
    with pytest.raises(OptionError, match="0 to 1"):
        neurofeedback_prompt(["a", "b"], [2])
    with pytest.raises(ShapeError, match="one sentence more"):
        span_prompt(torch.zeros(1, 3, 2, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), 1, 2, "implicit", 1, 3)
    shots, spans = torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(OptionError, match="Labels are 0 and 1"):
        span_prompt(shots, spans - 1, 1, 2)
    with pytest.raises(OptionError, match="task"):
        span_prompt(shots, spans, 1, 2, "Report")  # type: ignore[arg-type]
    for asked in ({"target": 1}, {"marker": 3}, {"task": "implicit", "target": 1}, {"task": "implicit", "target": 2}):
        with pytest.raises(OptionError, match="Control needs"):
            span_prompt(shots, spans, 1, 2, **asked)
    with pytest.raises(OptionError, match="0 to 1"):
        neurofeedback_prompt(["a", "b"], torch.tensor([0.7]))
    for tokens in ((1, 1), (1, 5), (-1, 2)):
        with pytest.raises(OptionError, match="two tokens"):
            report_accuracy(torch.rand(1, 4, 5), torch.tensor([[2]]), *tokens, torch.tensor([[1]]))
    with pytest.raises(OptionError, match="Labels are 0 and 1"):
        report_accuracy(torch.rand(1, 4, 5), torch.tensor([[2]]), 1, 2, torch.tensor([[6]]))
    with pytest.raises(OptionError, match="Labels are 0 and 1"):
        ideal_observer(hidden, torch.arange(10) % 3, 4)
    for kind in ("pca", "lr"):
        with pytest.raises(OptionError, match="not finite"):
            activation_axes(hidden / 0, kind, labels=torch.arange(10) % 2)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="not finite"):
        fit_logistic(hidden / 0, torch.arange(10) % 2)
    for scores in (torch.zeros(0), torch.tensor([0.0, torch.nan])):
        with pytest.raises(OptionError, match="finite scores"):
            Binarizer().fit(scores)
    with pytest.raises(OptionError, match="start < end"):
        span_states(small(), torch.zeros(1, 4, dtype=torch.long), torch.tensor([[[2, 9]]]), 1)
    with pytest.raises(ShapeError, match="two scores"):
        control_effect(torch.ones(1), torch.ones(5))
