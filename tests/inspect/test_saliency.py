"""Saliency and its agreement: linear models, known games, and correlations by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
import regard.inspect.saliency
from regard.errors import OptionError, ShapeError
from regard.inspect.saliency import (
    attention_saliency,
    auroc,
    deletion_curve,
    explanation_agreement,
    gradient_saliency,
    input_gradient,
    lime,
    lime_kernel,
    mask_saliency,
    occlusion,
    pearson,
    presence,
    rank_correlation,
    top_k_overlap,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_gradients_of_a_linear_score_are_its_weights() -> None:
    weight, inputs = normal(5, 3), normal(2, 5, 3)

    def score(x: Tensor) -> Tensor:
        return (x * weight).sum((1, 2))

    torch.testing.assert_close(input_gradient(score, inputs), weight.expand(2, 5, 3))
    torch.testing.assert_close(gradient_saliency(score, inputs, "xinput"), (weight * inputs).sum(-1))
    torch.testing.assert_close(gradient_saliency(score, inputs, "l1"), weight.abs().sum(-1).expand(2, 5))
    torch.testing.assert_close(gradient_saliency(score, inputs, "l2"), weight.square().sum(-1).sqrt().expand(2, 5))
    torch.testing.assert_close(gradient_saliency(score, inputs, "mean"), weight.mean(-1).expand(2, 5))


def test_gradients_work_where_none_are_kept_and_leave_none() -> None:
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        found = input_gradient(lambda x: layer(x)[:, 0, 0], torch.randn(2, 1, 3))
    torch.testing.assert_close(found, layer.weight.detach().expand(2, 1, 3))
    assert layer.weight.grad is None
    inputs = torch.randn(2, 1, 3)
    input_gradient(lambda x: layer(x)[:, 0, 0], inputs)
    assert not inputs.requires_grad


def test_presence_replaces_tokens_positions_and_regions() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1).double().sum(-1)

    presence(model, torch.tensor([7, 8, 9]), 1)(torch.tensor([[True, False, True]]))
    assert seen.pop().tolist() == [[7, 1, 9]]
    presence(model, torch.ones(2, 2), 0.0)(torch.tensor([[False, True]]))
    assert seen.pop().tolist() == [[[0, 0], [1, 1]]]
    regions = torch.tensor([[0, 1], [1, -1]])
    presence(model, torch.ones(2, 2), 0.0, regions)(torch.tensor([[False, True], [False, False]]))
    assert seen.pop().tolist() == [[[0, 1], [1, 1]], [[0, 0], [0, 1]]]
    seen.clear()
    parameter = torch.ones(3, requires_grad=True)
    present = presence(lambda x: model(x) * parameter.sum(), torch.ones(4), batch_size=3)
    assert present(torch.ones(7, 4, dtype=torch.bool)).requires_grad is False
    assert [len(part) for part in seen] == [3, 3, 1]


def test_every_perturbation_finds_the_terms_of_an_additive_score() -> None:
    terms = normal(6)

    def present(kept: Tensor) -> Tensor:
        return torch.stack((kept.double() @ terms, -2 * (kept.double() @ terms)), -1)

    torch.testing.assert_close(occlusion(present, 6), torch.stack((terms, -2 * terms)))
    # Ridge goes to zero, so the fit is exact whatever the weights of the samples.
    for width in (0.25, None):
        found = lime(present, 6, 200, kernel_width=width, ridge=1e-9)
        torch.testing.assert_close(found, torch.stack((terms, -2 * terms)), atol=1e-8, rtol=0)
    every = torch.tensor([[bool(n >> bit & 1) for bit in range(6)] for n in range(64)])
    change = present(torch.ones(1, 6, dtype=torch.bool)) - present(every)
    torch.testing.assert_close(mask_saliency(change, every), torch.stack((terms, -2 * terms)))


def test_lime_is_weighted_ridge_regression() -> None:
    """Against the normal equations with an explicit column of ones."""
    drawn: list[Tensor] = []
    values = normal(300)

    def present(kept: Tensor) -> Tensor:
        drawn.append(kept)
        return values

    found = lime(present, 4, 300, ridge=3.0)
    kept = drawn[0].double()
    assert bool(drawn[0][0].all()) and not bool(drawn[0][1:].all(-1).any())
    # Of four features, one to four are left out, each as often.
    counts = torch.bincount((4 - kept[1:].sum(-1)).long(), minlength=5)
    assert counts[0] == 0 and bool((counts[1:] > 50).all())
    design = torch.cat((kept, torch.ones(300, 1, dtype=torch.float64)), 1)
    cosine = kept.sum(-1) / (kept.norm(dim=-1) * 2).clamp_min(1e-12)
    weights = (-(((1 - cosine) * 100) ** 2) / 25**2).exp().sqrt()
    penalty = torch.diag(torch.tensor([3.0, 3, 3, 3, 0], dtype=torch.float64))
    expected = torch.linalg.solve(design.T @ (weights[:, None] * design) + penalty, design.T @ (weights * values))
    torch.testing.assert_close(found, expected[:4])


def test_lime_kernel_by_hand() -> None:
    assert float(lime_kernel(torch.tensor(1.0))) == 1
    assert float(lime_kernel(torch.tensor(0.25))) == pytest.approx(math.exp(-0.5 * (0.5 / 0.25) ** 2))
    assert lime_kernel(torch.tensor([0.1, 1.0]), None).tolist() == [1, 1]


def test_deletion_curve_by_hand() -> None:
    terms = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)

    def present(kept: Tensor) -> Tensor:
        return kept.double() @ terms

    most, least = deletion_curve(present, terms), deletion_curve(present, terms, first="least")
    assert most.scores.tolist() == [7, 3, 1, 0] and least.scores.tolist() == [7, 6, 4, 0]
    assert most.shares.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert float(most.auc) == pytest.approx((7 + 3 + 3 + 1 + 1 + 0) / 6)
    assert most.auc < least.auc
    assert deletion_curve(present, terms, steps=1).scores.tolist() == [7, 0]


def test_correlations_against_their_definitions() -> None:
    a, b = normal(3, 8), normal(3, 8)
    for x, y, found in zip(a, b, pearson(a, b), strict=True):
        torch.testing.assert_close(found, torch.corrcoef(torch.stack((x, y)))[0, 1])
    torch.testing.assert_close(pearson(a, 3e-200 * a + 1e-200), torch.ones(3, dtype=torch.float64))
    assert pearson(a, torch.ones_like(a)).tolist() == [0, 0, 0]
    # A monotone change keeps the ranks; without ties rho is 1 - 6 sum d^2 / (n (n^2 - 1)).
    torch.testing.assert_close(rank_correlation(a, a.exp()), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(rank_correlation(a, -a), -torch.ones(3, dtype=torch.float64))
    distance = (a.argsort(-1).argsort(-1) - b.argsort(-1).argsort(-1)).double().square().sum(-1)
    torch.testing.assert_close(rank_correlation(a, b), 1 - 6 * distance / (8 * 63))
    # Ties share the mean of their ranks: 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    tied = rank_correlation(torch.tensor([0.0, 5, 5, 9]), torch.tensor([0.0, 1, 2, 3]))
    assert float(tied) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_overlap_and_agreement() -> None:
    a, b = torch.tensor([4.0, 3, 2, 1, 0]), torch.tensor([4.0, 0, 3, 1, 2])
    assert float(top_k_overlap(a, b, 2)) == 0.5 and float(top_k_overlap(a, b, 5)) == 1
    # The largest, not those of largest size.
    assert float(top_k_overlap(torch.tensor([-9.0, 1, 2]), torch.tensor([0.0, 3, 4]), 2)) == 1
    both = explanation_agreement(a, b, 3)
    assert float(both.overlap) == pytest.approx(2 / 3)
    torch.testing.assert_close(both.rank_correlation, rank_correlation(a, b))


def test_auroc_counts_pairs() -> None:
    scores, positive = normal(40).round(decimals=1), torch.rand(40) < 0.4
    pairs = scores[positive][:, None] - scores[~positive]
    assert auroc(scores, positive) == pytest.approx(float((pairs.sign() / 2 + 0.5).mean()))


def test_attention_saliency_reads_one_row() -> None:
    weights = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(attention_saliency(weights, "max", 2), weights[:, :, 2].max(1).values)
    torch.testing.assert_close(attention_saliency(weights), weights[:, :, 0].mean(1))


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    text = str(regard.inspect.saliency.__doc__)
    code = text.split("::\n\n", 1)[1].split("\n\nWhat differs", 1)[0]
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    length = names["ids"].shape[1]
    for found in ("attention", "gradient", "surrogate"):
        assert names[found].shape == (length,) and bool(names[found].isfinite().all())
    assert float(names["attention"].sum()) == pytest.approx(1, abs=1e-5)
    assert "rank_correlation" in capsys.readouterr().out


Scored = tuple[Any, Tensor, Callable[..., Tensor], int]


def classifier() -> Scored:
    """BERT with a head; the logit of label 2."""
    from transformers import BertConfig, BertForSequenceClassification

    from tests.retrofit.small_models import tokens, wide

    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        attn_implementation="sdpa",
    )
    model = wide(BertForSequenceClassification(config)).double()
    return model, tokens(2, 9), lambda **given: model(**given).logits[:, 2], 0


def language_model(name: str) -> Scored:
    """The logit of token 7 after the last one."""
    from tests.retrofit.small_models import FAMILIES, tokens

    model = FAMILIES[name]().double()
    return model, tokens(2, 9), lambda **given: model(**given).logits[:, -1, 7], -1


def encoder_decoder() -> Scored:
    """T5; the logit of token 7 at the third step."""
    from tests.retrofit.small_models import t5, tokens

    model, inputs = t5().double(), tokens(1, 4)

    def score(**given: Tensor) -> Tensor:
        count = len(next(iter(given.values())))
        return model(decoder_input_ids=inputs.expand(count, -1), **given).logits[:, 2, 7]

    return model, tokens(2, 9), score, 2


@pytest.mark.parametrize("kind", ["classifier", "llama", "gpt2", "encoder_decoder"])
def test_hugging_face_models_are_explained_as_they_are(kind: str) -> None:
    """Gradients against those inside a run on tokens, perturbation and attention against loops."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind in ("classifier", "encoder_decoder"):
        model, ids, score, query = classifier() if kind == "classifier" else encoder_decoder()
    else:
        model, ids, score, query = language_model(kind)
    embedded = model.get_input_embeddings()(ids).detach()
    gradient = input_gradient(lambda e: score(inputs_embeds=e), embedded)
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    inside: list[Tensor] = []
    table = (model.get_encoder() if kind == "encoder_decoder" else model).get_input_embeddings()
    handle = table.register_forward_hook(lambda layer, given, output: inside.append(output))
    said = score(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(gradient, torch.autograd.grad(said.sum(), inside[0])[0])

    found = occlusion(presence(lambda x: score(input_ids=x), ids[1], 0, batch_size=4), ids.shape[1])
    for at in range(ids.shape[1]):
        without = ids[1].clone()
        without[at] = 0
        with torch.no_grad():
            torch.testing.assert_close(found[at], (score(input_ids=ids[1:]) - score(input_ids=without[None]))[0])

    with torch.no_grad(), regard.capture(model, "weights") as trace:
        score(input_ids=ids)
    last = trace[-1].weights
    assert last is not None
    attention = attention_saliency(last, query=query)
    assert attention.shape == ids.shape
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, dtype=attention.dtype))
    torch.testing.assert_close(attention, sum(last[:, h, query] for h in range(4)) / 4)
    assert explanation_agreement(attention, gradient.norm(dim=-1), 3).rank_correlation.shape == (2,)


def test_patches_of_a_picture_are_features() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import vit

    model, picture = vit(), torch.randn(3, 24, 24)
    row = torch.arange(24) // 8
    patches = (3 * row[:, None] + row).expand(3, 24, 24)
    found = occlusion(presence(lambda x: model(pixel_values=x).last_hidden_state[:, 0, 5], picture, 0.0, patches), 9)
    without = picture.clone()
    without[:, 8:16, 16:] = 0
    with torch.no_grad():
        both = model(pixel_values=torch.stack((picture, without))).last_hidden_state[:, 0, 5]
    assert found.shape == (9,)
    torch.testing.assert_close(found[5], both[0] - both[1], atol=1e-5, rtol=1e-4)


def test_a_mechanisms_own_map_is_read_like_any_other() -> None:
    query, key = torch.randn(2, 1, 4, 32, 8)
    weights = regard.create("moba", block_size=8, top_k=1).weights(query, key, causal=True)
    saliency = attention_saliency(weights, query=-1)
    torch.testing.assert_close(saliency, weights[:, :, 31].mean(1))
    assert bool((attention_saliency(weights, query=0)[:, 1:] == 0).all())


def test_half_precision_and_whole_numbers_are_summed_as_float32() -> None:
    torch.manual_seed(0)
    kept, terms = torch.rand(3000, 5) < 0.5, torch.tensor([2.0, -1.0, 0.5, 0.0, 4.0])
    change = (~kept).float() @ terms
    exact = mask_saliency(change, kept)
    torch.testing.assert_close(mask_saliency(change.bfloat16(), kept), exact)
    a, b = torch.randn(2, 400)
    torch.testing.assert_close(pearson(a.bfloat16(), b.bfloat16()), pearson(a.bfloat16().float(), b.bfloat16().float()))
    # Decisions of a model, 0 or 1: a vote of features 0 and 1.
    votes = lambda kept: (kept[:, 0] & kept[:, 1]).long()  # noqa: E731
    assert occlusion(votes, 3).tolist() == [1, 1, 0]
    found = lime(votes, 3, 500, kernel_width=None)
    assert found.is_floating_point() and float(found[:2].min()) > 0.2 > 0 > float(found[2])
    assert float(deletion_curve(votes, torch.tensor([1.0, 2.0, 3.0])).auc) == pytest.approx(0.5)


def test_nan_is_an_error_everywhere() -> None:
    spoilt, fine = torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    for compare in (pearson, rank_correlation, lambda a, b: top_k_overlap(a, b, 2), lambda a, b: auroc(a, b > 2)):
        with pytest.raises(OptionError, match="NaN"):
            compare(spoilt, fine)
    for explain in (
        lambda: deletion_curve(lambda k: k.sum(-1).float(), spoilt),
        lambda: occlusion(lambda k: torch.nan * k[:, 0], 3),
        lambda: lime(lambda k: torch.nan * k[:, 0], 3, 20),
        lambda: mask_saliency(spoilt, torch.eye(3, dtype=torch.bool)),
    ):
        with pytest.raises(OptionError, match="NaN"):
            explain()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ShapeError, match="one number for each"):
        input_gradient(lambda x: x, torch.ones(2, 3))
    with pytest.raises(OptionError, match="xinput"):
        gradient_saliency(lambda x: x.sum((1, 2)), torch.ones(2, 3, 1), "max")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="more masks"):
        mask_saliency(torch.ones(3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(OptionError, match="between 1 and"):
        top_k_overlap(torch.ones(3), torch.ones(3), 4)
    with pytest.raises(ShapeError, match="same 2 or more"):
        pearson(torch.ones(3), torch.ones(4))
    with pytest.raises(ShapeError, match="column a feature"):
        presence(lambda x: x, torch.ones(4))(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="integer"):
        presence(lambda x: x, torch.ones(4), 0.0, torch.ones(4))
    with pytest.raises(OptionError, match="ridge"):
        lime(lambda k: k.sum(-1).float(), 3, ridge=-1.0)
    with pytest.raises(OptionError, match="least"):
        deletion_curve(lambda k: k.sum(-1).float(), torch.ones(3), first="all")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="boolean for each"):
        auroc(torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(OptionError, match="over the heads"):
        attention_saliency(torch.ones(1, 1, 1, 1), "sum")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="There is no query 3"):
        attention_saliency(torch.ones(1, 1, 3, 3), query=3)
    with pytest.raises(OptionError, match="Embed tokens first"):
        input_gradient(lambda x: x.sum(1), torch.ones(2, 3, dtype=torch.int64))
    fixed = torch.ones(2, requires_grad=True)
    for score in (lambda x: x.detach().sum(1), lambda x: fixed * 2):
        with pytest.raises(OptionError, match="does not depend"):
            input_gradient(score, torch.ones(2, 3))
    with pytest.raises(OptionError, match="Wrap it"):
        presence(lambda x: {"logits": x}, torch.ones(2))(torch.ones(1, 2, dtype=torch.bool))  # type: ignore[arg-type,return-value]
    with pytest.raises(ShapeError, match="for 1 inputs"):
        presence(lambda x: x.sum(), torch.ones(2))(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"\(n, 4\)"):
        occlusion(presence(lambda x: x.sum(-1), torch.ones(4)), 5)
    with pytest.raises(ShapeError, match="One saliency per feature"):
        deletion_curve(lambda k: k.sum(-1).float(), torch.ones(2, 3))
    with pytest.raises(ShapeError, match="num_heads, q_len"):
        attention_saliency(torch.ones(3, 3))
