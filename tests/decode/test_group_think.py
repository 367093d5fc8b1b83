"""Group Think against ordinary decoding, against separate chains, and against one parallel pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.decode.group_think import (
    GroupThinkDecoder,
    GroupTrace,
    group_logits,
    group_mask,
    group_positions,
    teacher_forced_logprobs,
    temperature_sampler,
)
from regard.errors import OptionError, ShapeError

pytest.importorskip("transformers")

HEADERS = [[5, 6], [7], [8, 9, 10]]


def small(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes})
    config.initializer_range = 0.3  # so that tokens differ and attention matters
    return LlamaForCausalLM(config).double().eval()


def prompt(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


def separate_chain(model: Any, start: Tensor, first: int, steps: int) -> Tensor:
    """Greedy tokens of one chain, whole sequence every time, its own tokens at positions ``first`` on."""
    ids, length = start, start.shape[1]
    for _ in range(steps):
        positions = torch.cat((torch.arange(length), first + torch.arange(ids.shape[1] - length)))
        call = {"position_ids": positions.expand(len(ids), -1), "attention_mask": torch.ones_like(ids)}
        logits = model(input_ids=ids, use_cache=False, **call).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids[:, length:]


@pytest.mark.paper("group_think")
def test_one_thinker_is_ordinary_greedy_decoding() -> None:
    from regard.models.nano import load_nano, load_tokenizer

    model = load_nano()
    start = load_tokenizer()("def read(path):\n    with open(", return_tensors="pt").input_ids
    expected = model.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, start.shape[1] :]
    for form in ("interleaved", "batched"):
        trace = GroupThinkDecoder(model, 1, 12, form=form)(start)  # type: ignore[arg-type]
        assert torch.equal(trace.tokens[:, 0], expected)


@pytest.mark.paper("group_think")
def test_seeing_oneself_alone_gives_separate_chains() -> None:
    model, start, slot, steps = small(), prompt(), 11, 8
    trace = GroupThinkDecoder(model, 3, steps, slot=slot, visibility="self")(start)
    for n in range(3):
        chain = separate_chain(model, start, start.shape[1] + n * slot, steps)
        assert torch.equal(trace.tokens[:, n], chain)
    together = GroupThinkDecoder(model, 3, steps, slot=slot)(start)
    assert not torch.equal(together.tokens, trace.tokens), "seeing one another must matter"


@pytest.mark.paper("group_think")
@pytest.mark.parametrize("form", ["interleaved", "batched", "same step"])
@pytest.mark.parametrize("visibility", ["all", "self", "chain"])
@pytest.mark.parametrize("headers", [None, HEADERS], ids=["bare", "headers"])
def test_step_by_step_equals_one_parallel_pass(form: Any, visibility: str, headers: Any) -> None:
    graph: Any = torch.ones(3, 3, dtype=torch.bool).tril() if visibility == "chain" else visibility
    model, start = small(), prompt()
    how: Any = {"form": form} if form != "same step" else {"same_step": True}
    decoder = GroupThinkDecoder(
        model, 3, 6, slot=12, visibility=graph, stop=(3, 4), sampler=temperature_sampler(2.0), **how
    )
    trace = decoder(start, headers, keep_logits=True)
    assert trace.logits is not None
    order: Any = {"slot": 12, "visibility": graph, "same_step": form == "same step"}
    parallel = group_logits(model, start, trace.tokens, **order)
    there = trace.tokens >= 0
    assert torch.allclose(trace.logits[there], parallel[there], atol=1e-9)
    scores = teacher_forced_logprobs(model, start, trace.tokens, **order)
    expected = trace.logits.log_softmax(-1).gather(-1, trace.tokens.clamp_min(0)[..., None])[..., 0]
    assert torch.allclose(scores, expected.where(there, 0.0), atol=1e-9)


def test_headers_read_in_one_pass_or_step_by_step() -> None:
    model, start = small(), prompt()
    traces = [GroupThinkDecoder(model, 3, 5)(start, HEADERS, keep_logits=keep) for keep in (False, True)]
    assert torch.equal(traces[0].tokens, traces[1].tokens)
    for n, header in enumerate(HEADERS):
        assert traces[0].tokens[:, n, : len(header)].tolist() == [header] * 2


@pytest.mark.paper("group_think")
def test_a_token_changes_nothing_of_its_own_step_and_before() -> None:
    model, start = small(), prompt(1)
    tokens = torch.randint(31, (1, 3, 6), generator=torch.Generator().manual_seed(2))
    before = group_logits(model, start, tokens)
    thinker, step = 1, 2
    tokens[:, thinker, step] = (tokens[:, thinker, step] + 1) % 31
    change = (group_logits(model, start, tokens) - before).abs().amax((0, 3))  # (thinkers, steps)
    assert change[:, : step + 1].max() == 0
    others = [0, 2]
    assert change[thinker, step + 1 :].min() > 1e-6, "its own next token depends on it"
    assert change[others, step + 1].max() == 0, "others draw their next token before their step has read it"
    assert change[:, step + 2 :].min() > 1e-6


@pytest.mark.paper("group_think")
def test_with_same_step_the_next_token_depends_on_all_thinkers() -> None:
    """p(x[n, k + 1] | prompt, x[1, 1..k], ..., x[N, 1..k]) to the letter."""
    model, start = small(), prompt(1)
    tokens = torch.randint(31, (1, 3, 6), generator=torch.Generator().manual_seed(2))
    before = group_logits(model, start, tokens, same_step=True)
    tokens[:, 1, 2] = (tokens[:, 1, 2] + 1) % 31
    change = (group_logits(model, start, tokens, same_step=True) - before).abs().amax((0, 3))
    assert change[:, :3].max() == 0 and change[:, 3:].min() > 1e-6
    mask = group_mask(5, 3, 4, same_step=True)
    assert mask[5:].sum(1).tolist() == [5 + 3 * k for k in (1, 2, 3, 4) for _ in range(3)]


@pytest.mark.paper("group_think")
def test_order_in_the_cache_is_irrelevant_to_rotary_models() -> None:
    from transformers import DynamicCache

    model, start, thinkers, steps = small(), prompt(1), 3, 4
    tokens = torch.randint(31, (1, thinkers * steps), generator=torch.Generator().manual_seed(3))
    mask = group_mask(7, thinkers, steps)
    positions = group_positions(7, thinkers, steps, 9)[None]
    ids = torch.cat((start, tokens), 1)
    past = ids.shape[1] - thinkers

    def last_step(order: Tensor) -> Tensor:
        cache = DynamicCache()
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))[None, None]
        model(ids[:, :past], attention_mask=bias[..., :past, :past], position_ids=positions[:, :past],
              past_key_values=cache, use_cache=True)  # fmt: skip
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]
        rows = torch.cat((bias[..., past:, :past][..., order], bias[..., past:, past:]), -1)
        out = model(ids[:, past:], attention_mask=rows, position_ids=positions[:, past:], past_key_values=cache)
        logits: Tensor = out.logits
        return logits

    with torch.no_grad():
        plain, shuffled = last_step(torch.arange(past)), last_step(torch.randperm(past))
    assert torch.allclose(plain, shuffled, atol=1e-9)


@pytest.mark.paper("group_think")
def test_the_mask_of_each_step_has_the_right_number_of_keys() -> None:
    length, thinkers, steps = 5, 3, 4
    mask = group_mask(length, thinkers, steps)
    assert torch.equal(mask[:length].sum(1), torch.arange(1, length + 1))
    for k in range(1, steps + 1):
        rows = mask[length + (k - 1) * thinkers : length + k * thinkers]
        assert rows.sum(1).tolist() == [length + thinkers * (k - 1) + 1] * thinkers


@pytest.mark.paper("group_think")
def test_mask_and_positions_by_their_definition() -> None:
    length, thinkers, steps, slot = 3, 2, 3, 5
    graph = torch.tensor([[False, True], [False, False]])  # the first sees the second, not the other way round
    mask, positions = group_mask(length, thinkers, steps, graph), group_positions(length, thinkers, steps, slot)
    place = {(n, k): length + (k - 1) * thinkers + n for n in range(thinkers) for k in range(1, steps + 1)}
    for (n, k), row in place.items():
        assert positions[row] == length + n * slot + k - 1
        for (m, j), column in place.items():
            expected = (j < k and (m == n or bool(graph[n, m]))) or (m, j) == (n, k)
            assert bool(mask[row, column]) == expected
    assert torch.equal(positions[:length], torch.arange(length))


def test_a_thinker_that_stops_is_frozen_and_stays_visible() -> None:
    model, start = small(), prompt(1)
    script = iter([[1, 2, 3], [4, 30, 5], [6, 9, 7], [8, 9, 10]])

    def scripted(logits: Tensor) -> Tensor:
        return torch.tensor([next(script)])

    trace = GroupThinkDecoder(model, 3, 4, stop=30, sampler=scripted)(start, keep_logits=True)
    assert trace.tokens[0].tolist() == [[1, 4, 6, 8], [2, 30, -1, -1], [3, 5, 7, 10]]
    assert trace.lengths.tolist() == [[4, 2, 4]] and trace.logits is not None
    # Others go on as if its line ended there, its end token among what they see.
    parallel = group_logits(model, start, trace.tokens)
    assert torch.allclose(trace.logits[:, 0], parallel[:, 0], atol=1e-9)
    without = trace.tokens.clone()
    without[0, 1, 1] = -1
    assert not torch.allclose(group_logits(model, start, without)[:, 0, 2:], parallel[:, 0, 2:])


def test_rows_of_a_batch_are_independent() -> None:
    model, start = small(), prompt(3)
    together = GroupThinkDecoder(model, 2, 6, stop=range(6))(start)
    for row in range(3):
        alone = GroupThinkDecoder(model, 2, 6, stop=range(6))(start[row : row + 1])
        steps = alone.tokens.shape[2]
        assert torch.equal(together.tokens[row : row + 1, :, :steps], alone.tokens)
        assert (together.tokens[row, :, steps:] == -1).all()


def test_all_attention_implementations_read_the_mask() -> None:
    start = prompt()
    traces: list[GroupTrace] = [
        GroupThinkDecoder(small(attn_implementation=name), 3, 6)(start) for name in ("sdpa", "eager")
    ]
    assert torch.equal(traces[0].tokens, traces[1].tokens)


def test_a_model_with_learned_positions() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model, start = GPT2LMHeadModel(config).double().eval(), prompt(1)
    trace = GroupThinkDecoder(model, 3, 6)(start, keep_logits=True)
    assert trace.logits is not None
    assert torch.allclose(trace.logits, group_logits(model, start, trace.tokens, slot=6), atol=1e-9)


def test_wrong_input_is_explained() -> None:
    model, start = small(), prompt()
    with pytest.raises(OptionError, match="at least one thinker"):
        GroupThinkDecoder(model, 0)
    with pytest.raises(OptionError, match="interleaved"):
        GroupThinkDecoder(model, 2, form="stacked")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="same_step"):
        GroupThinkDecoder(model, 2, form="batched", same_step=True)
    with pytest.raises(OptionError, match="visibility"):
        GroupThinkDecoder(model, 2, visibility="none")
    with pytest.raises(ShapeError, match=r"boolean \(2, 2\)"):
        group_mask(3, 2, 2, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="overlap"):
        GroupThinkDecoder(model, 2, 8, slot=4)(start)
    with pytest.raises(OptionError, match="knows 256"):
        GroupThinkDecoder(model, 4, 100)(start)
    with pytest.raises(OptionError, match="2 headers for 3"):
        GroupThinkDecoder(model, 3)(start, [[1], [2]])
    with pytest.raises(ShapeError, match="token ids"):
        GroupThinkDecoder(model, 2)(start[0])
    with pytest.raises(ShapeError, match="trace"):
        teacher_forced_logprobs(model, start, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(OptionError, match="temperature"):
        temperature_sampler(0.0)
