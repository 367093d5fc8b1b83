"""Retrieval scores of prescribed attention, of cached and forced passes, and masks against models without heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, ShapeError
from regard.inspect.exploration import explore_text
from regard.inspect.explore_page import METRIC_NOTES
from regard.inspect.needles import MARKER, Needle, TextNeedle, draw_needles, needle_task, text_needle_task
from regard.inspect.retrieval_heads import (
    RetrievalScorer,
    RetrievalScores,
    activation_frequency,
    detect_retrieval_heads,
    head_overlap,
    mask_heads,
    needle_recall,
    text_retrieval_scores,
)
from regard.mechanism import Mechanism, Request
from regard.models.nano import load_nano, load_tokenizer
from regard.nn import MultiHeadAttention
from tests.retrofit.small_models import VOCABULARY, gpt2, llama, mistral, output_of, tokens

PROMPT = torch.tensor([9, 3, 9, 5, 6, 7, 8, 9, 4, 9])
SPAN = (3, 7)


def row(*places: int, keys: int = 10) -> Tensor:
    """One layer of heads that look at ``places`` most."""
    rows = torch.full((1, len(places), keys), 0.02)
    rows[0, torch.arange(len(places)), list(places)] = 0.8
    return rows


def score(places: list[int], emitted: list[int], **options: bool) -> float:
    scorer = RetrievalScorer(SPAN, PROMPT, **options)
    for place, token in zip(places, emitted, strict=True):
        scorer.step(row(place, keys=10 + len(emitted)), token)
    return float(scorer.score())


@pytest.mark.paper("retrieval_heads")
@pytest.mark.parametrize("official", [False, True])
def test_scores_of_prescribed_attention(official: bool) -> None:
    answer = PROMPT[slice(*SPAN)].tolist()
    assert score([3, 4, 5, 6], answer, official=official) == pytest.approx(1)
    # Outside the needle, even where the same token stands; and past the prompt.
    assert score([0, 2, 7, 9], [9, 9, 9, 9], official=official) == 0
    assert score([10, 11, 12, 13], answer, official=official) == 0
    # In the needle, at another token than the emitted one.
    assert score([4, 5, 6, 3], answer, official=official) == 0
    assert score([3, 3, 5, 0], answer, official=official) == pytest.approx(0.5)


@pytest.mark.paper("retrieval_heads")
def test_a_token_that_is_emitted_twice_counts_once() -> None:
    assert score([3] * 6, [5] * 6) == pytest.approx(0.25)
    assert score([3] * 6, [5] * 6, official=True) == pytest.approx(1.5)


@pytest.mark.paper("retrieval_heads")
def test_a_needle_that_holds_a_token_twice_and_one_that_stands_after_it_too() -> None:
    prompt = torch.tensor([5, 1, 5, 5, 6, 6, 9])
    for official in (False, True):
        scorer = RetrievalScorer((2, 5), prompt, official=official)
        for place, token in ((2, 5), (3, 5), (4, 6)):
            assert scorer.step(row(place, keys=7), token).all()
        # Of two kinds of tokens both, and of three tokens all.
        assert float(scorer.score()) == pytest.approx(1)
        # The same tokens just before and after the needle are no part of it.
        outside = RetrievalScorer((3, 5), prompt, official=official)
        assert not outside.step(row(2, keys=7), 5).any() and not outside.step(row(5, keys=7), 6).any()
        assert float(outside.score()) == 0


@pytest.mark.paper("retrieval_heads")
def test_heads_are_scored_apart_and_steps_told() -> None:
    scorer = RetrievalScorer(SPAN, PROMPT)
    assert scorer.step(row(3, 4, 9), 5).tolist() == [[True, False, False]]
    assert scorer.step(row(4, 4, 9), 6).tolist() == [[True, True, False]]
    assert scorer.score().tolist() == [[0.5, 0.25, 0]]
    # A head that sees nothing copies nothing, though the largest of its zeros is the first.
    blind = RetrievalScorer((0, 1), PROMPT)
    assert not blind.step(torch.zeros(1, 1, 10), 9).any()


@pytest.mark.paper("retrieval_heads")
def test_sharper_attention_scores_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    for power in (0.3, 4.0):
        plain, sharp = RetrievalScorer(SPAN, PROMPT), RetrievalScorer(SPAN, PROMPT)
        for token in PROMPT[slice(*SPAN)].tolist():
            weights = torch.rand(3, 5, 10, generator=generator, dtype=torch.float64).softmax(-1)
            raised = weights**power
            plain.step(weights, token)
            sharp.step(raised / raised.sum(-1, keepdim=True), token)
        assert float(plain.score().sum()) > 0 and torch.equal(plain.score(), sharp.score())


@pytest.mark.paper("retrieval_heads")
def test_haystack_in_another_order_scores_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(4, 2, 6, len(PROMPT), generator=generator)
    needle = list(range(*SPAN))
    others = [place for place in range(len(PROMPT)) if place not in needle]
    shuffled = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
    # The needle moves to the front by two places; attention goes with its tokens.
    order = [*shuffled[:1], *needle, *shuffled[1:]]
    first, second = RetrievalScorer(SPAN, PROMPT), RetrievalScorer((1, 5), PROMPT[order])
    for weights, token in zip(rows, PROMPT[slice(*SPAN)].tolist(), strict=True):
        first.step(weights, token)
        second.step(weights[:, :, order], token)
    assert float(first.score().sum()) > 0 and torch.equal(first.score(), second.score())


@pytest.mark.paper("retrieval_heads")
def test_masking_no_heads_changes_no_bit() -> None:
    model, ids = llama(), tokens()
    with mask_heads(model, []):
        inside = output_of(model, input_ids=ids)
    assert torch.equal(inside, output_of(model, input_ids=ids))


@pytest.mark.paper("retrieval_heads")
def test_masking_all_heads_of_a_layer_removes_its_attention() -> None:
    model, ids = llama().double(), tokens()
    with mask_heads(model, [(1, head) for head in range(4)]):
        masked = output_of(model, input_ids=ids)

    class Nothing(nn.Module):
        def forward(self, hidden_states: Tensor, **rest: object) -> tuple[Tensor, None]:
            return torch.zeros_like(hidden_states), None

    model.model.layers[1].self_attn = Nothing()
    torch.testing.assert_close(masked, output_of(model, input_ids=ids), atol=1e-12, rtol=0)
    assert (masked - output_of(llama().double(), input_ids=ids)).abs().max() > 1e-3


@pytest.mark.paper("retrieval_heads")
def test_masked_uniform_heads_see_all_alike() -> None:
    model = llama()
    with mask_heads(model, [(0, 2)], "uniform"), regard.capture(model) as trace:
        output_of(model, input_ids=tokens(1, 6))
    weights = trace[0].weights
    assert weights is not None
    expected = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(weights[0, 2], expected)


@pytest.mark.paper("retrieval_heads")
@pytest.mark.parametrize("build", [llama, gpt2, mistral])
def test_cached_decoding_and_one_forced_pass_score_the_same(build: object) -> None:
    model = build().double()  # type: ignore[operator]
    task = needle_task(18, 0.4, 5, VOCABULARY)
    stepwise = detect_retrieval_heads(model, task, 3, recall_threshold=-1, threshold=0)
    with torch.no_grad():
        by_context = []
        for index in range(3):
            needle = task(index)
            ids = needle.prompt[None]
            # The marker is these models' padding, which generate would not see.
            seen = torch.ones_like(ids)
            written = model.generate(ids, attention_mask=seen, max_new_tokens=5, do_sample=False, eos_token_id=None)
            with regard.capture(model) as trace:
                model(written[:, :-1])
            scorer = RetrievalScorer(needle.span, needle.prompt)
            for step, token in enumerate(written[0, 18:].tolist()):
                rows = [layer.weights[0, :, 17 + step] for layer in trace if layer.weights is not None]
                scorer.step(torch.stack(rows), token)
            by_context.append(scorer.score())
    torch.testing.assert_close(stepwise.by_context, torch.stack(by_context), atol=1e-12, rtol=0)


class Copier(Mechanism):
    """Two heads: one looks at what followed the query's own token earlier, the other at itself. Keys hold the token of
    each place as a one-hot vector."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        token = key[:, 0].argmax(-1)
        length = token.shape[1]
        before = torch.nn.functional.pad(token[:, :-1], (1, 0), value=-1)
        found = (token[:, :, None] == before[:, None, :]).tril().double()
        found[:, torch.arange(length), torch.arange(length)] += 1e-3
        eye = torch.eye(length, dtype=found.dtype).expand_as(found)
        return torch.stack((found / found.sum(-1, keepdim=True), eye), 1).to(value) @ value


class Model(nn.Module):
    """Emits what its first head looks at."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.attention = MultiHeadAttention(2 * size, 2, Copier(), bias=False)
        with torch.no_grad():
            # Every head gets the one-hot token whole; the output is the first head's.
            eye = torch.eye(size)
            double = torch.cat((torch.cat((eye, eye), 1), torch.cat((eye, eye), 1)))
            for linear in (self.attention.query, self.attention.key, self.attention.value):
                linear.weight.copy_(double)
            self.attention.out.weight.copy_(torch.eye(2 * size))

    def forward(self, ids: Tensor) -> Tensor:
        one = torch.nn.functional.one_hot(ids, self.size).float()
        return self.attention(torch.cat((one, torch.zeros_like(one)), -1), causal=True)[..., : self.size]


@pytest.mark.paper("retrieval_heads")
def test_a_prescribed_copier_is_found_in_contexts_that_it_answers() -> None:
    model = Model(30)
    task = needle_task([20, 26], [0.0, 0.5, 1.0], 4, 30)
    for forced in (False, True):
        found = detect_retrieval_heads(model, task, 12, forced=forced)
        assert found.recall == [1.0] * 12
        assert found.scores.tolist() == [[1.0, 0.0]] and found.heads == [(0, 0)]
    # A recall has to be above the threshold; the answer has four tokens, so the model is asked four times.
    assert detect_retrieval_heads(model, task, 2, recall_threshold=1.0).by_context.shape == (0, 1, 2)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    detect_retrieval_heads(model, task, 1)
    detect_retrieval_heads(model, task, 1, steps=2)
    handle.remove()
    assert len(calls) == 4 + 2
    with mask_heads(model, [(0, 0)]):
        without = detect_retrieval_heads(model, task, 12)
    # No context counts: what the model writes without the head is no answer.
    assert max(without.recall) <= 0.5 and without.by_context.shape == (0, 1, 2) and without.heads == []


@pytest.mark.paper("retrieval_heads")
def test_frequency_and_overlap() -> None:
    by_context = torch.tensor([[[0.5, 0.0]], [[0.1, 0.3]], [[0.2, 0.0]], [[0.9, 0.0]]])
    assert activation_frequency(by_context).tolist() == [[1.0, 0.25]]
    found = RetrievalScores(by_context, [1.0] * 4)
    assert found.heads == [(0, 0)] and found.ranking == [(0, 0), (0, 1)]
    # The bound itself counts.
    assert RetrievalScores(torch.tensor([[[0.25, 0.5, 0.125]]]), [1.0], 0.25).heads == [(0, 1), (0, 0)]
    at_bound = head_overlap(torch.tensor([[0.25, 0.5]]), torch.tensor([[0.25, 0.0]]), threshold=0.25)
    assert at_bound.jaccard == 0.5
    first = torch.tensor([[0.9, 0.5, 0.0], [0.0, 0.2, 0.05]])
    same = head_overlap(first, first)
    assert same.jaccard == 1 and same.correlation == pytest.approx(1)
    second = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.2, 0.0]])
    assert head_overlap(first, second).jaccard == pytest.approx(2 / 4) == head_overlap(second, first).jaccard
    with pytest.raises(ShapeError):
        head_overlap(first, second[:1])
    with pytest.raises(ShapeError):
        activation_frequency(torch.zeros(0, 2, 2))


@pytest.mark.paper("retrieval_heads")
def test_needles_stand_where_they_should() -> None:
    prompts, start = draw_needles(200, 24, None, 5, 20, torch.Generator().manual_seed(0))
    for prompt, first in zip(prompts, start.tolist(), strict=True):
        needle = prompt[first : first + 5].tolist()
        assert prompt[first - 1] == MARKER == prompt[-1] and (prompt == MARKER).sum() == 2
        assert len(set(needle)) == 5
        assert not set(needle) & set(prompt[: first - 1].tolist() + prompt[first + 5 :].tolist())
    assert int(start.min()) == 1 and int(start.max()) == 18
    task = needle_task([24, 40], [0.0, 1.0], 5, 20)
    assert [(len(task(i).prompt), task(i).span[0]) for i in range(4)] == [(24, 1), (24, 18), (40, 1), (40, 34)]
    assert torch.equal(task(1).prompt, task(1).prompt) and not torch.equal(task(0).prompt, task(4).prompt)
    other = needle_task([24, 40], [0.0, 1.0], 5, 20, seed=1)
    assert other(1).span == task(1).span and not torch.equal(other(1).prompt, task(1).prompt)


@pytest.mark.paper("retrieval_heads")
def test_text_needles_end_a_line_and_repeat_their_beginning() -> None:
    tokenizer = load_tokenizer()
    hay = "import os\nimport sys\n\n\ndef main():\n    print(os.name)\n\n"
    task = text_needle_task(tokenizer, hay, 120, [0.0, 0.5, 1.0])
    for index in (0, 1, 2, 3, 5):
        needle = task(index)
        text, answer = tokenizer.decode(needle.prompt), tokenizer.decode(needle.answer)
        assert len(needle.prompt) == 120 and text.startswith("<|endoftext|>")
        cue = text[text.rindex("\n") :]
        before = tokenizer.decode(needle.prompt[: needle.span[0]])
        assert before.endswith(cue) and text.count(cue + answer) == 1
        assert index % 3 == 2 or before.removesuffix(cue).endswith((">", "\n"))
    # All places for one form before the next.
    forms = ["secret words" in tokenizer.decode(task(index).prompt) for index in range(9)]
    assert forms == [False] * 3 + [True] * 3 + [False] * 3
    two = text_needle_task(tokenizer, hay, 80, 0.3, [TextNeedle("One is", " first"), TextNeedle("Two is", " second")])
    assert [tokenizer.decode(two(index).answer) for index in range(3)] == [" first", " second", " first"]
    own = text_needle_task(tokenizer, hay, 80, 0.3, [TextNeedle("The key is", " under the mat", "Where is the key?")])
    assert tokenizer.decode(own(0).prompt).endswith("Where is the key?")
    assert tokenizer.decode(own(0).answer) == " under the mat"


@pytest.mark.paper("retrieval_heads")
def test_heads_of_the_small_model_that_copy() -> None:
    model, tokenizer = load_nano(), load_tokenizer()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = text_retrieval_scores(model, tokenizer, "import os\nimport sys\n\n\ndef main():\n    print(os.name)\n\n")
    handle.remove()
    assert len(calls) == 12 and len(found.recall) == 12
    # A model that takes no more tokens is given no more.
    lengths = []
    model.config.max_position_embeddings = 120
    handle = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    text_retrieval_scores(model, tokenizer, "import os\n", contexts=2)
    handle.remove()
    assert min(lengths) > 60 and max(lengths) <= 120
    # Signatures of functions it copies.
    assert len(found.by_context) >= 4 and found.heads
    assert float(found.scores.max()) > 0.3 and 0 <= float(found.scores.min()) < 0.05


@pytest.mark.paper("retrieval_heads")
def test_the_page_shows_what_copies() -> None:
    model, tokenizer, text = load_nano(), load_tokenizer(), "import os\n\n\ndef main():\n    print(os.name)\n\n"
    shown = explore_text(model, tokenizer, text, ablate_tokens=0).metrics["retrieval"]
    expected = text_retrieval_scores(model, tokenizer, text).scores
    torch.testing.assert_close(torch.tensor(shown), expected, atol=1e-4, rtol=0)
    assert "retrieval" in METRIC_NOTES
    # A model without a trained weight finds no needle.
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert "retrieval" not in explore_text(model, tokenizer, text, ablate_tokens=0).metrics


@pytest.mark.paper("retrieval_heads")
def test_recall_counts_tokens() -> None:
    assert needle_recall([1, 2, 2, 3], [2, 9, 2, 2]) == 0.5
    assert needle_recall([1, 2], [2, 1, 5]) == 1


def test_what_is_wrong_is_told() -> None:
    for span in ((3, 11), (3, 3), (-1, 2)):
        with pytest.raises(OptionError, match="span"):
            Needle(PROMPT, span)
    with pytest.raises(OptionError, match="context"):
        needle_task(6, 0.5, 8, 30)(0)
    with pytest.raises(OptionError, match="vocab"):
        needle_task(20, 0.5, 8, 9)(0)
    with pytest.raises(OptionError, match="depth"):
        needle_task(20, 1.5, 8, 30)
    for options in ({"n": 0}, {"steps": 0}, {"steps": 3, "forced": True}):
        with pytest.raises(OptionError, match="at least 1"):
            detect_retrieval_heads(Model(30), needle_task(20, 0.5, 4, 30), **options)
    with pytest.raises(OptionError, match="step"):
        RetrievalScorer(SPAN, PROMPT).score()
    with pytest.raises(ShapeError, match="heads, keys"):
        RetrievalScorer(SPAN, PROMPT).step(torch.zeros(3, 4), 1)
    # Of a window's rows it is not known which keys they are.
    with pytest.raises(ShapeError, match="10 tokens"):
        RetrievalScorer(SPAN, PROMPT).step(torch.zeros(1, 1, 6), 1)
    with pytest.raises(OptionError, match="NaN"):
        RetrievalScorer(SPAN, PROMPT).step(torch.full((1, 1, 10), float("nan")), 5)
    other = RetrievalScorer(SPAN, PROMPT)
    other.step(row(3), 5)
    with pytest.raises(ShapeError, match="other heads"):
        other.step(row(3, 4), 5)
    with pytest.raises(OptionError, match="float32"):
        Needle(PROMPT.float(), SPAN)
    with pytest.raises(OptionError, match="answer"):
        needle_recall([], [1])
    with pytest.raises(OptionError, match="NaN"):
        head_overlap(torch.full((1, 2), float("nan")), torch.ones(1, 2))
    tokenizer = load_tokenizer()
    with pytest.raises(OptionError, match="haystack"):
        text_needle_task(tokenizer, "", 80, 0.5)
    with pytest.raises(OptionError, match="take"):
        text_needle_task(tokenizer, "a text", 8, 0.5)(0)

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiHeadAttention(4, 2, "full")

        def forward(self, ids: Tensor) -> Tensor:
            return self.attention(torch.ones(1, ids.shape[1], 4))[0]

    with pytest.raises(OptionError, match="logits"):
        detect_retrieval_heads(Vectors(), needle_task(20, 0.5, 4, 30), 1)
