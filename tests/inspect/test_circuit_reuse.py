"""Path patching against models written out by hand, theorems of what cannot reach what, and the prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.bench.circuit_tasks import TwoLookups
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.circuit_prompts import (
    NAMES,
    ColoredObjects,
    colored_objects_prompts,
    encode_prompts,
    encode_words,
    ioi_prompts,
    single_tokens,
    vocabulary,
    wrong_color_weights,
)
from regard.inspect.circuit_reuse import (
    activation_patch_heads,
    circuit_faithfulness,
    circuit_overlap,
    logit_difference,
    mean_ablate_heads,
    path_patching,
    set_attention,
)
from regard.inspect.intervene import Head
from regard.models.attention_only import AttentionOnlyModel
from regard.models.sequence import SequenceModel
from tests.retrofit.small_models import bert, gpt2, llama

LAYERS, HEADS = 3, 4


def prompts(batch: int = 3, length: int = 7, vocab: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, vocab, (batch, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 3] = (clean[:, 3] + 5) % vocab
    answers = torch.tensor([[4, 9], [10, 5], [7, 20]])[:batch]
    return clean, corrupt, answers


def model() -> nn.Module:
    return llama().double()


def attention_only(depth: int = 2) -> AttentionOnlyModel:
    torch.manual_seed(1)
    found = AttentionOnlyModel(60, 60, embed_dim=16, depth=depth, num_heads=4, max_length=16).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.5)
    return found.eval()


@pytest.mark.paper("circuit_reuse")
@pytest.mark.parametrize("component", ["z", "q", "k", "v"])
def test_a_prompt_patched_with_itself_has_no_effect(component: str) -> None:
    clean, _, answers = prompts()
    effects = path_patching(model(), [(2, 1), (1, 0)], clean, clean, answers, component)  # type: ignore[arg-type]
    assert effects.shape == (LAYERS, HEADS) and not effects.any()


@pytest.mark.paper("circuit_reuse")
@pytest.mark.parametrize("component", ["z", "q", "k", "v"])
def test_nothing_reaches_a_receiver_from_its_own_layer_or_above(component: str) -> None:
    clean, corrupt, answers = prompts()
    effects = path_patching(model(), [(1, 1)], clean, corrupt, answers, component, None)  # type: ignore[arg-type]
    assert not effects[1:].any()
    # Keys and values serve two heads each, and what enters the layer reaches all of them.
    assert (effects[0] != 0).all()


@pytest.mark.paper("circuit_reuse")
def test_a_head_that_feeds_nothing_into_the_receivers_has_no_effect() -> None:
    clean, corrupt, answers = prompts()
    found = model()
    with torch.no_grad():
        found.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
    for receivers in ([(2, 1)], 2, LAYERS):
        effects = path_patching(found, receivers, clean, corrupt, answers, "v", None)  # type: ignore[arg-type]
        assert effects[0, 1].abs() < 1e-12 and effects[0, 0].abs() > 1e-9


@pytest.mark.paper("circuit_reuse")
def test_all_heads_together_are_direct_logit_attribution_without_norms() -> None:
    found = attention_only()
    clean, corrupt, answers = prompts()
    with torch.no_grad():
        effects = path_patching(found, 2, clean, corrupt, answers, freeze_mlps=True)
        ends, parts = [], []
        for ids in (clean, corrupt):
            with regard.capture(found) as trace:
                ends.append(float(logit_difference(found(ids), answers).mean()))
            toward = found.head.weight[answers[:, 0]] - found.head.weight[answers[:, 1]]
            rows = []
            for layer, seen in zip(found.layers, trace, strict=True):
                assert seen.head_outputs is not None
                out = layer.out.weight.unflatten(1, (4, -1))
                rows.append(torch.einsum("bhd,chd,bc->bh", seen.head_outputs[:, :, -1], out, toward).mean(0))
            parts.append(torch.stack(rows))
    expected = (parts[1] - parts[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(effects.double(), expected, atol=1e-5, rtol=1e-5)
    # The last token and its place are the same in both, so that heads alone make the difference.
    assert float(effects.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.paper("circuit_reuse")
def test_frozen_mlps_leave_direct_logit_attribution() -> None:
    """As above with MLPs, which hide what heads give directly unless they are held."""
    torch.manual_seed(2)
    found = SequenceModel(60, vocab_size=60, embed_dim=16, depth=2, num_heads=4).double().eval()
    found.norm = nn.Identity()
    clean, corrupt, answers = prompts()
    free, frozen = (path_patching(found, 2, clean, corrupt, answers, freeze_mlps=held) for held in (False, True))
    with torch.no_grad():
        ends, parts = [], []
        toward = found.head.weight[answers[:, 0]] - found.head.weight[answers[:, 1]]
        for ids in (clean, corrupt):
            with regard.capture(found) as trace:
                ends.append(float(logit_difference(found(ids), answers).mean()))
            outs = torch.stack([seen.head_outputs[:, :, -1] for seen in trace if seen.head_outputs is not None])
            maps = torch.stack([block.attention.out.weight.unflatten(1, (4, -1)) for block in found.blocks])
            parts.append(torch.einsum("lbhd,lchd,bc->blh", outs, maps, toward).mean(0))
    expected = (parts[1] - parts[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(frozen.double(), expected, atol=1e-5, rtol=1e-5)
    assert (free - frozen).abs().max() > 1e-3


@pytest.mark.paper("circuit_reuse")
def test_a_path_is_what_is_left_when_the_others_are_cut() -> None:
    """One receiver, its queries: the second layer computed by hand from the sender's corrupt output."""
    found = attention_only()
    clean, corrupt, answers = prompts()
    sender, receiver = (0, 2), (1, 1)
    effect = path_patching(found, [receiver], clean, corrupt, answers, "q", None)[sender]
    with torch.no_grad():
        embed = [found.embed(ids) + found.positions(torch.arange(7)) for ids in (clean, corrupt)]
        first, second = found.layers
        outs = []
        for ids in (clean, corrupt):
            with regard.capture(found) as trace:
                found(ids)
            assert trace[0].head_outputs is not None
            outs.append(trace[0].head_outputs)
        mixed = outs[0].clone()
        mixed[:, sender[1]] = outs[1][:, sender[1]]
        stream = [embed[0] + first.out(z.transpose(1, 2).flatten(2)) for z in (outs[0], mixed)]

        def heads(linear: nn.Module, x: Tensor) -> Tensor:
            return linear(x).unflatten(-1, (4, -1)).transpose(1, 2)

        query, key, value = (heads(linear, stream[0]) for linear in (second.query, second.key, second.value))
        query[:, receiver[1]] = heads(second.query, stream[1])[:, receiver[1]]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        logits = found.head(stream[0] + second.out(out.transpose(1, 2).flatten(2)))
        own, other = (float(logit_difference(found(ids), answers).mean()) for ids in (clean, corrupt))
        expected = (float(logit_difference(logits, answers).mean()) - own) / (other - own)
    assert float(effect) == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-4


@pytest.mark.paper("circuit_reuse")
def test_receivers_are_free_and_so_feed_one_another() -> None:
    """Two receivers in a row, by hand: the later one also gets what the earlier one makes of the sender."""
    found = attention_only(3)
    clean, corrupt, answers = prompts()
    effect = path_patching(found, [(1, 1), (2, 3)], clean, corrupt, answers, "z", None)[0, 2]

    def heads(layer: Any, x: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (layer.query, layer.key, layer.value)
        )
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def behind(layer: Any, x: Tensor, z: Tensor) -> Tensor:
        out: Tensor = x + layer.out(z.transpose(1, 2).flatten(2))
        return out

    def mixed(z: Tensor, head: int, other: Tensor) -> Tensor:
        z = z.clone()
        z[:, head] = other[:, head]
        return z

    first, second, third = found.layers
    with torch.no_grad():
        start, other = (found.embed(ids) + found.positions(torch.arange(7)) for ids in (clean, corrupt))
        sent = behind(first, start, mixed(heads(first, start), 2, heads(first, other)))
        own = behind(first, start, heads(first, start))
        one = mixed(heads(second, own), 1, heads(second, sent))
        two = heads(third, behind(second, sent, one))
        last = behind(second, own, one)
        logits = found.head(behind(third, last, mixed(heads(third, last), 3, two)))
        ends = [float(logit_difference(found(ids), answers).mean()) for ids in (clean, corrupt)]
        expected = (float(logit_difference(logits, answers).mean()) - ends[0]) / (ends[1] - ends[0])
    assert float(effect) == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-4


@pytest.mark.paper("circuit_reuse")
def test_heads_of_the_last_layer_act_directly() -> None:
    found = model()
    clean, corrupt, answers = prompts()
    free = activation_patch_heads(found, clean, corrupt, answers)
    direct = path_patching(found, LAYERS, clean, corrupt, answers)
    # Behind the last layer there are no heads to hold: both ways are one.
    torch.testing.assert_close(direct[2], free[2], atol=1e-6, rtol=1e-6)
    assert (free[0] - direct[0]).abs().max() > 1e-6


@pytest.mark.paper("circuit_reuse")
def test_the_residual_before_a_layer_receives_what_its_heads_do() -> None:
    """Before the last layer all that a sender of the first can do passes through the residual stream there."""
    clean, corrupt, answers = prompts()
    for found in (model(), gpt2().double()):
        depth = 3 if found.__class__.__name__.startswith("Llama") else 2
        through = path_patching(found, depth - 1, clean, corrupt, answers, position=None)
        assert through[: depth - 1].abs().max() > 1e-4 and not through[depth - 1 :].any()
    # With one layer below, nothing below is held, so that patching plainly gives the same.
    plain = activation_patch_heads(found, clean, corrupt, answers, position=None)
    torch.testing.assert_close(through[0], plain[0], atol=1e-6, rtol=1e-6)
    # So it does where blocks are attention alone and the residual runs around them.
    found = attention_only()
    through = path_patching(found, 1, clean, corrupt, answers, position=None)
    plain = activation_patch_heads(found, clean, corrupt, answers, position=None)
    torch.testing.assert_close(through[0], plain[0], atol=1e-6, rtol=1e-6)


@pytest.mark.paper("circuit_reuse")
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_the_residual_in_the_middle_by_hand(freeze_mlps: bool) -> None:
    """Three layers, the residual before the last: heads of layer 1 do not answer to a sender of layer 0, its MLP does
    unless it is held; layer 2 is free."""
    torch.manual_seed(4)
    found = SequenceModel(60, vocab_size=60, embed_dim=16, depth=3, num_heads=4, positions="learned").double().eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (clean, corrupt, answers), head = prompts(), 2
    effects = path_patching(found, 2, clean, corrupt, answers, position=3, freeze_mlps=freeze_mlps)
    with torch.no_grad():
        traces, mlps, ends = [], [], []
        for ids in (clean, corrupt):
            given: list[Tensor] = []
            hooks = [block.mlp.register_forward_hook(lambda *_, to=given: to.append(_[2])) for block in found.blocks]
            with regard.capture(found) as trace:
                ends.append(float(logit_difference(found(ids), answers).mean()))
            for hook in hooks:
                hook.remove()
            traces.append([layer.head_outputs for layer in trace])
            mlps.append(given)
        mixed = traces[0][0].clone()  # type: ignore[union-attr]
        mixed[:, head, 3] = traces[1][0][:, head, 3]  # type: ignore[index]
        stream = found.embed(clean) + found.positions[:7]  # type: ignore[index]
        for layer, z in ((0, mixed), (1, traces[0][1])):
            block = found.blocks[layer]
            stream = stream + block.attention.out(z.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
            stream = stream + (mlps[0][layer] if freeze_mlps else block.mlp(block.mlp_norm(stream)))
        logits = found.head(found.norm(found.blocks[2](stream, causal=True)))
        expected = (float(logit_difference(logits, answers).mean()) - ends[0]) / (ends[1] - ends[0])
    assert float(effects[0, head]) == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-3
    assert (effects[:2] != 0).all() and not effects[2:].any()


@pytest.mark.paper("circuit_reuse")
def test_set_attention_changes_the_rows_that_it_names() -> None:
    found, (ids, _, _) = model(), prompts()
    targets = torch.zeros(7)
    targets[[2, 4]] = 0.5
    with regard.capture(found) as before:
        found(ids)
    with set_attention(found, [(2, 0), (2, 3)], -1, targets), regard.capture(found) as after:
        found(ids)
    for place in range(LAYERS):
        old, new = before[place].weights, after[place].weights
        assert old is not None and new is not None
        torch.testing.assert_close(new.sum(-1), torch.ones_like(new.sum(-1)))
        changed = torch.zeros_like(new, dtype=torch.bool)
        if place == 2:
            changed[:, [0, 3], -1] = True
            torch.testing.assert_close(new[:, [0, 3], -1], targets.double().expand(3, 2, 7))
        assert torch.equal(new[~changed], old[~changed])
    outputs = after[2].head_outputs
    assert outputs is not None and before[2].head_outputs is not None
    assert torch.equal(outputs[:, :, :-1], before[2].head_outputs[:, :, :-1])
    with pytest.raises(OptionError, match="sum to 1"):
        set_attention(found, [(2, 0)], -1, torch.ones(7))


@pytest.mark.paper("circuit_reuse")
def test_overlap() -> None:
    first: list[Head] = [(0, 1), (1, 2), (2, 0), (2, 3)]
    second: list[Head] = [(0, 1), (2, 0)]
    for how in ("share", "jaccard"):
        assert circuit_overlap(first, first, how) == 1  # type: ignore[arg-type]
    assert circuit_overlap(first, second) == 0.5 and circuit_overlap(second, first) == 1
    assert circuit_overlap(first, second, "jaccard") == 0.5 == circuit_overlap(second, first, "jaccard")


@pytest.mark.paper("circuit_reuse")
def test_faithfulness_of_all_heads_and_of_none() -> None:
    found, (ids, _, answers) = attention_only(), prompts()
    whole = [(layer, head) for layer in range(2) for head in range(4)]
    assert circuit_faithfulness(found, whole, ids, answers) == pytest.approx(1)
    with torch.no_grad(), regard.capture(found) as trace:
        own = logit_difference(found(ids), answers).mean()
    with torch.no_grad():
        # Every head at its mean over the prompts.
        hidden = found.embed(ids) + found.positions(torch.arange(7))
        for layer, seen in zip(found.layers, trace, strict=True):
            assert seen.head_outputs is not None
            hidden = hidden + layer.out(seen.head_outputs.mean(0).transpose(0, 1).flatten(1))
        expected = logit_difference(found.head(hidden), answers).mean() / own
    assert circuit_faithfulness(found, [], ids, answers) == pytest.approx(float(expected))
    # Means over other prompts are other means.
    other = prompts()[1].flip(0)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    with torch.no_grad(), mean_ablate_heads(found, every, other):
        meant = logit_difference(found(ids), answers).mean() / own
    assert circuit_faithfulness(found, [], ids, answers, other) == pytest.approx(float(meant))
    assert abs(float(meant - expected)) > 1e-3
    with mean_ablate_heads(found, [(0, 1)], ids), regard.capture(found) as after:
        found(ids)
    assert after[0].head_outputs is not None and trace[0].head_outputs is not None
    torch.testing.assert_close(after[0].head_outputs[:, 1], trace[0].head_outputs[:, 1].mean(0).expand(3, -1, -1))


@pytest.mark.paper("circuit_reuse")
def test_ioi_prompts() -> None:
    for clean, corrupt in ioi_prompts(40, seed=3):
        assert clean.words.count(clean.wrong) == 2 and clean.words.count(clean.answer) == 1
        assert len(clean.words) == len(corrupt.words)
        assert sum(a != b for a, b in zip(clean.words, corrupt.words, strict=True)) == 1
        assert corrupt.words.count(clean.wrong) == 1 == corrupt.words.count(clean.answer)
        assert clean.text.startswith("When ") and clean.text.endswith(" to") and " , " not in clean.text
    assert ioi_prompts(5, 1) == ioi_prompts(5, 1) != ioi_prompts(5, 2)


@pytest.mark.paper("circuit_reuse")
def test_colored_objects_prompts() -> None:
    for clean, corrupt, asked in colored_objects_prompts(40, seed=2):
        assert clean.answer != clean.wrong and clean.answer.lower() in asked.colors
        different = [
            place for place, pair in enumerate(zip(clean.words, corrupt.words, strict=True)) if len({*pair}) > 1
        ]
        assert len(different) == 1 and clean.words[different[0]] == asked.objects[asked.asked]
        assert corrupt.words[different[0]] == asked.objects[asked.colors.index(clean.wrong.lower())]
        # One solved example before the question.
        assert clean.text.count("What color is the") == 2 and clean.text.endswith("\nA:")
    bare = ColoredObjects("table", ("mug", "pen", "cup"), ("red", "orange", "green"), 1)
    text = colored_objects_prompts(1, shots=0)[0][0].text
    assert text.startswith("Q: On the ") and text.count("Q:") == 1
    assert " ".join(bare.words).startswith("Q : On the table , there is a red mug , an orange pen , and a green cup .")
    assert bare.answer == "Orange" and bare.min_pair_obj(2).answer == "Green"
    assert bare.min_pair_color(1, "blue").answer == "Blue" and bare.min_pair_color(0, "blue").answer == "Orange"
    assert "jug" in bare.min_pair_invalid("jug").words
    for wrong in (
        lambda: bare.min_pair_obj(1),
        lambda: bare.min_pair_color(1, "red"),
        lambda: bare.min_pair_invalid("pen"),
        lambda: bare.min_pair_invalid("jug").answer,
        lambda: colored_objects_prompts(1, n_objects=1),
    ):
        with pytest.raises(OptionError):
            wrong()


@pytest.mark.paper("circuit_reuse")
def test_words_become_numbers() -> None:
    found = [clean for clean, _ in ioi_prompts(6)]
    numbers = vocabulary(found)
    ids, answers = encode_words(found, numbers)
    back = {number: word for word, number in numbers.items()}
    assert [tuple(back[i] for i in row) for row in ids] == [prompt.words for prompt in found]
    assert [back[right] for right, _ in answers] == [prompt.answer for prompt in found]
    assert sorted(numbers.values()) == list(range(len(numbers)))


def tokenizer_of(kind: str) -> Any:
    """Small tokenizers of each make, trained on prompts without some of the words, which they split or do not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    left_out = {"Laura", "Peter", "necklace", "puzzle", "purple", "Purple", "garden"}
    drawn = [pair[0] for pair in ioi_prompts(60)] + [found[0] for found in colored_objects_prompts(60)]
    texts = [prompt.text + f" {prompt.answer} {prompt.wrong}" for prompt in drawn]
    texts = [" ".join(word for word in text.split(" ") if word.strip(",.?\nA:Q") not in left_out) for text in texts]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated")]
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if kind != "bytes":
        around = "<s> $A" if kind == "sentencepiece" else "<s> $A </s>"
        marks = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.paper("circuit_reuse")
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "pieces"])
def test_prompts_of_any_tokenizer(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    kept = single_tokens(tokenizer, NAMES)
    assert 3 <= len(kept) < len(NAMES) and "Laura" not in kept
    drawn = colored_objects_prompts(20, tokenizer=tokenizer)
    for pairs in (ioi_prompts(20, tokenizer=tokenizer), ioi_prompts(20, tokenizer=tokenizer, corrupt="swap"), drawn):
        clean, corrupt, answers = encode_prompts(tokenizer, pairs)
        assert clean.shape == corrupt.shape and answers.shape == (20, 2) and not (clean == 0).any()
        assert ((clean != corrupt).sum(1) == 1).all() and (answers[:, 0] != answers[:, 1]).all()
        # What comes first is the tokenizer's own; what comes last is the text's last token.
        assert bool((clean[:, 0] == 1).all()) == (kind != "bytes") and not (clean == 2).any()
        for pair, ids, (right, wrong) in zip(pairs, clean.tolist(), answers.tolist(), strict=True):
            lower = str.lower if kind == "pieces" else str
            for answer, written in ((right, pair[0].answer), (wrong, pair[0].wrong)):
                assert tokenizer.decode([answer]).strip() == lower(written)
            whole = tokenizer(f"{pair[0].text} {pair[0].answer}", add_special_tokens=False)["input_ids"]
            assert whole == [*ids[int(kind != "bytes") :], right]
    weights = wrong_color_weights(tokenizer, drawn)
    clean = encode_prompts(tokenizer, drawn)[0]
    for row, ids, (_, _, asked) in zip(weights, clean, drawn, strict=True):
        places = row[0].nonzero()[:, 0]
        assert row[0, places].tolist() == [0.5, 0.5]
        others = {color for color in asked.colors if color != asked.colors[asked.asked]}
        assert {tokenizer.decode([int(token)]).strip() for token in ids[places]} == others
        # In the question, not in the solved example before it.
        assert int(places[0]) > (len(ids) - int(kind != "bytes")) // 2


@pytest.mark.paper("circuit_reuse")
def test_words_that_a_tokenizer_splits_are_told() -> None:
    tokenizer = tokenizer_of("bytes")
    with pytest.raises(OptionError, match="tokenizer="):
        encode_prompts(tokenizer, ioi_prompts(60))
    # The answers are known, and a place is not.
    with pytest.raises(OptionError, match="place by place"):
        encode_prompts(tokenizer, ioi_prompts(40, names=single_tokens(tokenizer, NAMES), places=("store", "garden")))
    with pytest.raises(OptionError, match="At least 3 names"):
        ioi_prompts(3, tokenizer=tokenizer, names=("Mary", "Laura", "Peter", "John"))
    with pytest.raises(OptionError, match="At least 2 colors"):
        colored_objects_prompts(3, n_objects=2, tokenizer=tokenizer, colors=("purple", "red"))
    with pytest.raises(OptionError, match="'third' or 'swap'"):
        ioi_prompts(3, corrupt="none")  # type: ignore[arg-type]
    for clean, corrupt in ioi_prompts(20, corrupt="swap"):
        # The corrupt prompt is the clean one of the other answer.
        assert corrupt.words.count(clean.answer) == 2 and corrupt.words.count(clean.wrong) == 1


@pytest.mark.paper("circuit_reuse")
def test_colors_are_one_token_with_a_capital_too() -> None:
    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [sum(map(ord, part)) for part in text.replace("Red", "R ed").split(" ")]}

    drawn = colored_objects_prompts(20, n_objects=2, tokenizer=tokenizer, colors=("red", "blue", "green"))
    assert {color for _, _, asked in drawn for color in asked.colors} == {"blue", "green"}


@pytest.mark.paper("circuit_reuse")
def test_prompts_run_through_a_model() -> None:
    tokenizer = tokenizer_of("bytes")
    found = SequenceModel(len(tokenizer), vocab_size=len(tokenizer), embed_dim=16, num_heads=4).double().eval()
    clean, corrupt, answers = encode_prompts(tokenizer, ioi_prompts(4, tokenizer=tokenizer))
    assert path_patching(found, 2, clean, corrupt, answers, position=None).abs().max() > 1e-3
    drawn = colored_objects_prompts(4, tokenizer=tokenizer)
    clean, _, _ = encode_prompts(tokenizer, drawn)
    weights = wrong_color_weights(tokenizer, drawn)
    with set_attention(found, [(1, 2)], -1, weights), regard.capture(found) as after:
        found(clean)
    assert after[1].weights is not None
    torch.testing.assert_close(after[1].weights[:, 2, -1:], weights.double())


@pytest.mark.paper("circuit_reuse")
def test_pairs_of_the_small_tasks_differ_in_one_token() -> None:
    task = TwoLookups()
    generator = torch.Generator().manual_seed(0)
    for kind in ("names", "attributes"):
        clean, corrupt, answers = task.pairs(kind, 50, generator)  # type: ignore[arg-type]
        assert ((clean != corrupt).sum(1) == 1).all() and (answers[:, 0] != answers[:, 1]).all()
        for row, (right, wrong) in zip(clean, answers.tolist(), strict=True):
            found = row.tolist()
            if kind == "names":
                assert found.count(right) == 1 and found.count(wrong) == 2
            else:
                assert found[found.index(found[-1]) - 1] == right and wrong in found[:6]
    inputs, targets = task.batch(8, generator)
    assert inputs.shape == (8, 10) and (targets[:, :-1] < 0).all() and (targets[:, -1] >= 0).all()


def test_what_is_wrong_is_told() -> None:
    found, (ids, other, answers) = model(), prompts()
    with pytest.raises(OptionError, match="component"):
        path_patching(found, [(1, 0)], ids, other, answers, "o")  # type: ignore[arg-type]
    for heads, told in (([(3, 0)], "no layer 3"), ([(-1, 0), (2, 0)], "no layer -1"), ([(1, 4)], "no head 4")):
        with pytest.raises(OptionError, match=told):
            path_patching(found, heads, ids, other, answers)
        with pytest.raises(OptionError, match=told):
            circuit_faithfulness(found, heads, ids, answers)
    with pytest.raises(OptionError, match="No heads"):
        path_patching(found, [], ids, other, answers)
    for patching in (path_patching, activation_patch_heads):
        given = (found, 3, ids, other, answers) if patching is path_patching else (found, ids, other, answers)
        with pytest.raises(OptionError, match="no position 7"):
            patching(*given, position=7)  # type: ignore[operator]
        with pytest.raises(OptionError, match="eval"):
            patching(found.train(), *given[1:])  # type: ignore[operator]
        found.eval()
    with pytest.raises(RetrofitError, match="freeze_mlps"):
        path_patching(bert(), 1, ids, other, answers, freeze_mlps=True)
    with pytest.raises(OptionError, match="no logits"):
        path_patching(bert(), 1, ids, other, answers)
    with pytest.raises(OptionError, match="receive"):
        path_patching(found, 4, ids, other, answers)
    with pytest.raises(ShapeError, match="alike"):
        path_patching(found, 3, ids, other[:, 1:], answers)
    with pytest.raises(ShapeError, match="answers"):
        path_patching(found, 3, ids, other, answers[:, 0])
    with pytest.raises(OptionError, match="circuit"):
        circuit_overlap([], [(0, 1)])
    with pytest.raises(OptionError, match="heads"):
        mean_ablate_heads(found, [(0, 9)], ids)
