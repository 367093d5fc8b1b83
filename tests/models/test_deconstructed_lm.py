"""Language models of attention variants: where each layer's queries and keys come from, and which stays standard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard.bench.attention_variants import compare_variants
from regard.bench.sequence_tasks import KeyValueRecall
from regard.bench.tasks import Digits
from regard.dense.deconstructed_attention import KINDS, AttentionVariant
from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.models.deconstructed_attention import TinyLM, hybrid_stack

TEXT = torch.arange(16) % 11


def model(*kinds: str) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(kinds, 11, embed_dim=12, num_heads=2, max_length=16, fixed_tokens=TEXT).double()


def tokens(seed: int = 1, batch: int = 3) -> Tensor:
    return torch.randint(11, (batch, 9), generator=torch.Generator().manual_seed(seed))


def maps(made: TinyLM, x: Tensor) -> list[Tensor]:
    found = made.weights(x)
    return [layer for layer in found if layer is not None]


@pytest.mark.paper("deconstructed_attention")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_causal(kind: str) -> None:
    for made in (model(kind, kind), model(kind, "standard")):
        x = tokens()
        changed = torch.cat((x[:, :5], (x[:, 5:] + 1) % 11), 1)
        torch.testing.assert_close(made(changed)[:, :5], made(x)[:, :5])


@pytest.mark.paper("deconstructed_attention")
@pytest.mark.parametrize("kind", ["rnd_emb_qk", "fixed_seq_qk"])
def test_fixed_maps_are_the_same_for_all_inputs_and_differ_by_layer(kind: str) -> None:
    made = model(kind, kind, "standard", kind)
    first, second = maps(made, tokens(1)), maps(made, tokens(2, batch=5))
    for layer in (0, 1, 3):
        assert first[layer].shape == (1, 2, 9, 9)
        assert torch.equal(first[layer], second[layer])
    assert first[2].shape[0] == 3
    assert not torch.allclose(first[0], first[1])


@pytest.mark.paper("deconstructed_attention")
def test_the_second_stream_is_the_stack_run_on_the_fixed_text() -> None:
    """Where the input is the fixed text itself, queries and keys are those of standard attention, in every layer."""
    fixed, standard = model("fixed_seq_qk", "fixed_seq_qk", "fixed_seq_qk"), model("standard", "standard", "standard")
    standard.load_state_dict({k: v for k, v in fixed.state_dict().items() if k != "text"})
    torch.testing.assert_close(fixed(TEXT[None, :9]), standard(TEXT[None, :9]))
    assert not torch.allclose(fixed(tokens()), standard(tokens()))


@pytest.mark.paper("deconstructed_attention")
def test_static_maps_change_with_tokens_but_not_with_earlier_layers() -> None:
    made = model("static_emb_qk", "static_emb_qk")
    before = maps(made, tokens(1))
    assert not torch.allclose(before[1], maps(made, tokens(2))[1])
    standard = model("standard", "standard")
    standard.load_state_dict(made.state_dict())
    torch.testing.assert_close(before[0], maps(standard, tokens(1))[0])
    kept = maps(standard, tokens(1))[1]
    for other in (made, standard):
        mlp = other.blocks[0].get_submodule("mlp")
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.5)
    assert torch.equal(maps(made, tokens(1))[1], before[1])
    assert not torch.allclose(maps(standard, tokens(1))[1], kept)


@pytest.mark.paper("deconstructed_attention")
def test_mlp_models_are_bigram_models() -> None:
    made, x = model("mlp", "mlp"), tokens()
    assert made.weights(x) == [None, None]
    changed = x.clone()
    changed[:, :4] = (x[:, :4] + 3) % 11
    torch.testing.assert_close(made(changed)[:, 4:], made(x)[:, 4:])


@pytest.mark.paper("deconstructed_attention")
def test_schedules() -> None:
    def standard(pattern: str | int, depth: int) -> list[int]:
        stack = hybrid_stack("mlp", pattern, depth)
        return [layer for layer, kind in enumerate(stack, 1) if kind == "standard"]

    # Table 11, for 24 layers.
    assert standard("alternate", 24) == list(range(2, 25, 2)) == standard(2, 24)
    assert standard("odd", 24) == list(range(1, 25, 2))
    assert standard("last_half", 24) == list(range(1, 13))
    assert standard("middle", 24) == [*range(1, 7), *range(19, 25)]
    assert standard("first_half", 24) == list(range(13, 25))
    assert standard("quarter", 24) == [4, 8, 12, 16, 20, 24]
    assert standard("first", 24) == [1] and standard("last", 24) == [24] and standard("bilateral", 24) == [1, 24]
    assert standard("uniform", 24) == [] and standard(5, 12) == [5, 10]


@pytest.mark.paper("deconstructed_attention")
def test_comparing_variants() -> None:
    task = KeyValueRecall(pairs=3, vocab_size=8)
    rows = compare_variants(
        {"plain": ("standard",), "none": ("mlp",), "text": ("fixed_seq_qk",)}, task, steps=3, embed_dim=24, batches=2
    )
    assert set(rows) == {"plain", "none", "text"}
    assert rows["plain"].parameters == rows["none"].parameters == rows["text"].parameters
    assert all(abs(row.perplexity - 2.718281828**row.loss) < 1e-4 for row in rows.values())
    assert max(rows["none"].flops, rows["text"].flops) < rows["plain"].flops
    with pytest.raises(OptionError, match="vocab_size"):
        compare_variants(["mlp"], Digits())


def test_flops_count_the_second_stream_up_to_its_last_reader() -> None:
    one = AttentionVariant(12, 2, "fixed_seq_qk", max_length=None)
    per_block, head = one.flops(9, 4) + 2 * 2 * 36 * 12 * 48, 2 * 36 * 12 * 11
    assert model("fixed_seq_qk").flops(9, 4) == per_block + head
    stream = one.flops(9) + 2 * 2 * 9 * 12 * 48
    assert model("fixed_seq_qk", "fixed_seq_qk").flops(9, 4) == 2 * per_block + head + stream


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError):
        hybrid_stack("mpl")
    with pytest.raises(UnknownNameError):
        hybrid_stack("mlp", "evry")
    with pytest.raises(OptionError):
        hybrid_stack("mlp", 0)
    with pytest.raises(OptionError, match="fixed_tokens"):
        TinyLM(["fixed_seq_qk"], 11)
    with pytest.raises(OptionError, match="at least one"):
        TinyLM([], 11)
    with pytest.raises(ShapeError, match="up to 16"):
        model("mlp")(torch.zeros(1, 17, dtype=torch.int64))
