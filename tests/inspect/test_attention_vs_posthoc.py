"""Attention beside post-hoc explanations: autograd, sampled LIME and changes of the classifier judge the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.inspect.attention_vs_posthoc import (
    Target,
    attention_explanation,
    gradient_closed_form,
    gradient_explanation,
    lime_closed_form,
    lime_mean_field,
    lime_tokens,
    word_regions,
)
from regard.inspect.saliency import input_gradient, pearson
from regard.models.attention_vs_posthoc import CLSAttentionClassifier

REDUCE = ("mean", "l1", "l2", "xinput")


def classifier(sharp: float = 6.0) -> CLSAttentionClassifier:
    """``sharp`` multiplies the key projection, so that attention is uneven."""
    model = CLSAttentionClassifier(120, 16, 8, 10, 3, max_length=80).double()
    with torch.no_grad():
        model.key.weight.mul_(sharp)
    return model


def documents(count: int = 2, words: int = 60) -> Tensor:
    rows = [torch.randperm(110)[:words] + 10 for _ in range(count)]
    return torch.cat((torch.zeros(count, 1, dtype=torch.int64), torch.stack(rows)), 1)


@pytest.mark.paper("attention_vs_posthoc")
def test_forward_is_the_formula() -> None:
    """Loops over heads and tokens; sinusoids by hand."""
    model, tokens = classifier(), documents(1, 4)
    positions = torch.tensor(
        [[f(t / 10000 ** (2 * i / 16)) for i in range(8) for f in (math.sin, math.cos)] for t in range(5)]
    )
    e = (model.embedding.weight[tokens[0]] + positions).detach()
    logits = torch.zeros(2, dtype=torch.float64)
    for h in range(3):
        w_q, w_k = (w.weight[8 * h : 8 * h + 8] for w in (model.query, model.key))
        w_v = model.value.weight[10 * h : 10 * h + 10]
        scores = torch.stack([(w_q @ e[0]) @ (w_k @ e[t]) / math.sqrt(8) for t in range(5)])
        alpha = scores.exp() / scores.exp().sum()
        mixed = sum(alpha[t] * (w_v @ e[t]) for t in range(5))
        logits = logits + model.class_vectors[:, h] @ mixed / 3
    torch.testing.assert_close(model(tokens)[0], logits, atol=1e-7, rtol=1e-6)


@pytest.mark.paper("attention_vs_posthoc")
@pytest.mark.parametrize("target", [0, 1, (1, 0)])
def test_closed_form_gradient_is_autograd(target: Target) -> None:
    model, tokens = classifier(), documents()

    def score(embedded: Tensor) -> Tensor:
        logits = model.from_embedded(embedded)
        return logits[:, target] if isinstance(target, int) else logits[:, 1] - logits[:, 0]

    expected = input_gradient(score, model.embed(tokens).detach())
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(gradient_closed_form(model, tokens, target=target), expected, atol=1e-14, rtol=1e-9)
    for reduce in REDUCE:
        torch.testing.assert_close(
            gradient_closed_form(model, tokens, reduce, target), gradient_explanation(model, tokens, reduce, target)
        )


@pytest.mark.paper("attention_vs_posthoc")
def test_negating_the_class_vectors_turns_post_hoc_explanations_and_leaves_attention() -> None:
    model, tokens = classifier(), documents(1)
    before = explained(model, tokens)
    with torch.no_grad():
        model.class_vectors.neg_()
    after = explained(model, tokens)
    for name in ("attention", "attention_max"):
        assert torch.equal(before[name], after[name]) and bool((before[name] >= 0).all())
    for name in ("mean", "xinput", "lime", "closed_form", "mean_field"):
        assert float(before[name].abs().max()) > 0
        torch.testing.assert_close(after[name], -before[name])
    torch.testing.assert_close(after["l2"], before["l2"])


@pytest.mark.paper("attention_vs_posthoc")
def test_a_constant_in_all_values_moves_the_logit_alone() -> None:
    """What enters the gradient is the value's difference to the mean; the paper's limit of LIME takes the constant for
    evidence, while LIME itself and the mean field do not."""
    model, tokens = classifier(), documents(1)
    shift = torch.randn(30, dtype=torch.float64)
    before, logits = explained(model, tokens), model(tokens)
    handle = model.value.register_forward_hook(lambda layer, inputs, output: output + shift)
    after, moved = explained(model, tokens), model(tokens)
    handle.remove()
    expected = torch.stack(
        [sum(model.class_vectors[c, h] @ shift[10 * h : 10 * h + 10] for h in range(3)) / 3 for c in range(2)]
    )
    torch.testing.assert_close((moved - logits)[0], expected)
    for name in ("attention", "attention_max", "mean", "xinput", "lime", "mean_field"):
        torch.testing.assert_close(after[name], before[name])
    change = (after["closed_form"] - before["closed_form"]).abs().max()
    assert float(change) > 0.05 * float(before["closed_form"].abs().max())


@pytest.mark.paper("attention_vs_posthoc")
def test_lime_tends_to_its_closed_forms() -> None:
    """At the authors' initialisation, 60 words; the mean field has the scale as well."""
    model, tokens = classifier(sharp=1.0), documents(1)
    estimated = lime_tokens(model, tokens, 20000)[0, 1:]
    assert float(pearson(estimated, lime_closed_form(model, tokens)[0, 1:])) > 0.95
    mean_field = lime_mean_field(model, tokens)[0, 1:]
    assert float(pearson(estimated, mean_field)) > 0.999
    torch.testing.assert_close(estimated, mean_field, atol=0.03 * float(mean_field.abs().max()), rtol=0)
    # Even attention makes the classifier linear in which words are there, and 3/2 too much.
    slope = float(
        estimated @ lime_closed_form(model, tokens)[0, 1:] / lime_closed_form(model, tokens)[0, 1:].square().sum()
    )
    assert slope == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.paper("attention_vs_posthoc")
def test_the_mean_field_follows_uneven_attention() -> None:
    model, tokens = classifier(sharp=10.0), documents(1)
    for width in (0.25, None):
        estimated = lime_tokens(model, tokens, 5000, kernel_width=width)[0, 1:]
        mean_field = lime_mean_field(model, tokens, kernel_width=width)[0, 1:]
        assert float(pearson(estimated, mean_field)) > 0.99
        assert float(pearson(estimated, mean_field)) > float(pearson(estimated, lime_closed_form(model, tokens)[0, 1:]))
        assert float(estimated @ mean_field / mean_field.square().sum()) == pytest.approx(1, abs=0.07)


@pytest.mark.paper("attention_vs_posthoc")
def test_a_word_like_the_unknown_one_has_no_part() -> None:
    model, tokens = classifier(), documents(1)
    with torch.no_grad():
        model.embedding.weight[tokens[0, 7]] = model.embedding.weight[1]
    largest = float(lime_mean_field(model, tokens).abs().max())
    assert abs(float(lime_mean_field(model, tokens)[0, 7])) < 1e-12 * largest
    assert abs(float(lime_tokens(model, tokens, 5000)[0, 7])) < 0.03 * largest
    # The paper's formula gives it nothing where the softmax has the same sum without the document's words.
    with torch.no_grad():
        model.embedding.weight[10:] = model.embedding.weight[1]
    assert float(lime_closed_form(model, tokens).abs().max()) < 1e-15


@pytest.mark.paper("attention_vs_posthoc")
def test_a_pair_of_classes_is_the_difference_of_both() -> None:
    model, tokens = classifier(), documents(1)
    for explain in (gradient_explanation, lime_closed_form, lime_mean_field):
        torch.testing.assert_close(
            explain(model, tokens, target=(1, 0)), explain(model, tokens, target=1) - explain(model, tokens, target=0)
        )
    found = [
        lime_tokens(model, tokens, 100, target=target, generator=torch.Generator().manual_seed(0))
        for target in ((1, 0), 1, 0)
    ]
    torch.testing.assert_close(found[0], found[1] - found[2])


@pytest.mark.paper("attention_vs_posthoc")
def test_a_repeated_word_is_one_feature() -> None:
    model, tokens = classifier(), documents(1, 12)
    tokens[0, 5], tokens[0, 9] = tokens[0, 2], 1
    regions, words = word_regions(tokens[0], unk=1)
    assert words == 10 and regions[0] == -1 and regions[9] == -1 and regions[2] == regions[5]
    assert sorted(set(regions.tolist())) == list(range(-1, 10))
    for scores in (lime_tokens(model, tokens, 100), lime_closed_form(model, tokens), lime_mean_field(model, tokens)):
        assert scores[0, 2] == scores[0, 5] != 0
        assert scores[0, 0] == 0 and scores[0, 9] == 0
    # With a single word no others fluctuate, and what it changes is all there is.
    alone = torch.tensor([[0, 20, 20, 20]])
    there, gone = model(alone)[0, 1], model(torch.tensor([[0, 1, 1, 1]]))[0, 1]
    torch.testing.assert_close(lime_mean_field(model, alone)[0, 1], there - gone)


@pytest.mark.paper("attention_vs_posthoc")
def test_the_token_of_cls_is_a_word_elsewhere() -> None:
    """As one that looks like it."""
    model = classifier()
    with torch.no_grad():
        model.embedding.weight[30] = model.embedding.weight[0]
    again, other = torch.tensor([[0, 20, 21, 0]]), torch.tensor([[0, 20, 21, 30]])
    for explain in (lime_closed_form, lime_mean_field):
        torch.testing.assert_close(explain(model, again), explain(model, other))
        assert explain(model, again)[0, 0] == 0 != explain(model, again)[0, 3]


@pytest.mark.paper("attention_vs_posthoc")
def test_attention_is_averaged_over_heads_or_its_largest() -> None:
    model, tokens = classifier(), documents(2, 5)
    weights = model.read(model.embed(tokens)).weights.detach()
    for b in range(2):
        for t in range(6):
            of_heads = [float(weights[b, h, t]) for h in range(3)]
            assert float(attention_explanation(model, tokens)[b, t]) == pytest.approx(sum(of_heads) / 3)
            assert float(attention_explanation(model, tokens, "max")[b, t]) == max(of_heads)


@pytest.mark.paper("attention_vs_posthoc")
def test_explanations_of_a_document_of_unknown_tokens_are_zero() -> None:
    tokens = torch.tensor([[0, 1, 1]])
    for explain in (lime_tokens, lime_closed_form, lime_mean_field):
        assert explain(classifier(), tokens).tolist() == [[0, 0, 0]]


@pytest.mark.paper("attention_vs_posthoc")
def test_the_classifier_trains_and_its_errors_teach() -> None:
    model = CLSAttentionClassifier(120, 16, 8, 10, 3, max_length=20)
    model(documents(2, 8)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float(model.class_vectors.detach().abs().max()) <= 0.1
    with pytest.raises(ShapeError, match="max_length 20"):
        model(documents(1, 40))
    with pytest.raises(OptionError, match="class from 0 to 1"):
        gradient_explanation(model, documents(1, 8), target=2)
    with pytest.raises(OptionError, match="below 120"):
        lime_closed_form(model, documents(1, 8), unk=200)
    with pytest.raises(ShapeError, match="one document"):
        word_regions(documents(1, 8))
    with pytest.raises(ShapeError, match="one document"):
        lime_tokens(model, documents(1, 8)[0])


def explained(model: CLSAttentionClassifier, tokens: Tensor) -> dict[str, Tensor]:
    """Every explanation, LIME from the same samples."""
    found: dict[str, Tensor] = {
        "attention": attention_explanation(model, tokens),
        "attention_max": attention_explanation(model, tokens, "max"),
        "lime": lime_tokens(model, tokens, 300, generator=torch.Generator().manual_seed(1)),
        "closed_form": lime_closed_form(model, tokens),
        "mean_field": lime_mean_field(model, tokens),
    }
    return found | {
        "mean": gradient_explanation(model, tokens, "mean"),
        "xinput": gradient_explanation(model, tokens, "xinput"),
        "l2": gradient_explanation(model, tokens, "l2"),
    }
