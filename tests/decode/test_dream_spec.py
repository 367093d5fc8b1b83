"""DREAM's draft, its trees and their verification, against plain decoding, beam search by hand and frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.decode.dream_spec import (
    DraftTree,
    attention_entropy,
    build_draft_tree,
    dream_generate,
    dream_loss,
    noisy_features,
    prune_visual_tokens,
    select_features_by_entropy,
    tree_of,
    verify,
)
from regard.errors import OptionError, ShapeError
from regard.models.dream_spec import DraftCache, DraftOutput, DreamDraft, previous_features
from tests.retrofit.small_models import llama, tokens

DIM, VOCAB = 16, 23


def draft_of(seed: int = 0, open_gates: bool = True, dim: int = DIM) -> DreamDraft:
    torch.manual_seed(seed)
    draft = DreamDraft(dim, 2).double().eval()
    if open_gates:
        nn.init.constant_(draft.cross.attention_gate, 0.7)
        nn.init.constant_(draft.cross.mlp_gate, -0.4)
    return draft


def inputs(length: int, seed: int = 1, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    embeds, feats = torch.randn(2, batch, length, DIM, generator=g, dtype=torch.float64)
    return embeds, feats


def target() -> Any:
    return llama().double().eval()


@pytest.mark.paper("dream_spec")
def test_closed_gates_read_no_features() -> None:
    embeds, feats = inputs(9)
    closed, opened = draft_of(open_gates=False), draft_of()
    assert torch.equal(closed(embeds, feats).hidden, closed(embeds, 100 + feats).hidden)
    assert not torch.equal(opened(embeds, feats).hidden, opened(embeds, 100 + feats).hidden)
    fresh = DreamDraft(DIM, 2)
    assert not bool(fresh.cross.attention_gate.any()) and not bool(fresh.cross.mlp_gate.any())


@pytest.mark.paper("dream_spec")
def test_a_token_reads_the_features_of_earlier_ones_alone() -> None:
    """With features at their own tokens, moved on by one: h_j reaches outputs i > j, and no other."""
    draft, (embeds, feats) = draft_of(), inputs(9)
    before = draft(embeds, previous_features(feats)).hidden
    for j in range(9):
        changed = feats.clone()
        changed[:, j] += 1
        moved = (draft(embeds, previous_features(changed)).hidden - before).abs().amax(-1) > 1e-12
        assert moved.tolist() == [[i > j for i in range(9)]] * 2


def test_reading_in_pieces_is_reading_at_once() -> None:
    draft, (embeds, feats) = draft_of(), inputs(11)
    expected = draft(embeds, previous_features(feats))
    cache, outs, last = DraftCache(), [], None
    for x, h in zip(embeds.split((4, 1, 6), 1), feats.split((4, 1, 6), 1), strict=True):
        outs.append(draft(x, previous_features(h, last), cache=cache).hidden)
        last = h[:, -1]
    torch.testing.assert_close(torch.cat(outs, 1), expected.hidden)
    assert cache.seen == 11


def chain(draft: DreamDraft, embed: Any, head: Any, prompt: Tensor, feats: Tensor, path: list[int]) -> list[Tensor]:
    """Log-probabilities of the next token after the prompt and after each token of a path, drafted one after the other,
    own hidden states in the place of the target's."""
    known, found = previous_features(feats[None]), []
    ids = prompt
    for token in [*path, None]:
        out = draft(embed(ids)[None], known).hidden[0]
        found.append(head(out[-1]).log_softmax(-1))
        if token is not None:
            ids = torch.cat((ids, torch.tensor([token])))
            known = torch.cat((known, out[None, -1:]), 1)
    return found


@pytest.mark.paper("dream_spec")
def test_the_tree_is_beam_search_by_hand() -> None:
    """Every node's score by drafting its path alone; which nodes there are by an explicit search over paths."""
    torch.manual_seed(3)
    draft, embed, head = draft_of(), nn.Embedding(VOCAB, DIM).double(), nn.Linear(DIM, VOCAB).double()
    head.weight.data *= 4
    prompt = torch.tensor([3, 1, 4, 1, 5])
    feats = torch.randn(5, DIM, dtype=torch.float64)
    depth, top_k, total = 4, 3, 14
    cache = DraftCache()
    known = previous_features(feats[None])
    hidden = draft(embed(prompt)[None], known, cache=cache).hidden[0, -1]
    tree = build_draft_tree(draft, embed, head, 5, hidden, cache, depth=depth, top_k=top_k, total=total)
    assert cache.seen == 5 and len(tree.tokens) == total and int(tree.tokens[0]) == 5
    scored: dict[tuple[int, ...], float] = {}
    beam: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        level = {}
        for path in beam:
            best = chain(draft, embed, head, prompt, feats, list(path))[-1].topk(top_k)
            for token, log_prob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                level[(*path, token)] = scored.get(path, 0.0) + log_prob
        scored |= level
        beam = sorted(level, key=level.__getitem__, reverse=True)[:top_k]
    wanted = sorted(scored, key=scored.__getitem__, reverse=True)[: total - 1]
    found = {}
    for node in range(1, total):
        way = [n for n in range(total) if bool(tree.mask[node, n])][1:]
        found[tuple(tree.tokens[way].tolist())] = float(tree.log_probs[node])
    assert set(found) == set(wanted)
    for path, score in found.items():
        assert score == pytest.approx(scored[path], abs=1e-9)


@pytest.mark.paper("dream_spec")
def test_masks_mark_ancestors_and_a_chain_is_causal() -> None:
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 4])
    tree = tree_of(torch.arange(7), parents)
    for node in range(7):
        ancestors, at = {node}, node
        while int(parents[at]) >= 0:
            at = int(parents[at])
            ancestors.add(at)
        assert set(tree.mask[node].nonzero()[:, 0].tolist()) == ancestors
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert sorted(tree.paths.tolist()) == [[0, 1, 3, -1], [0, 1, 4, 6], [0, 2, 5, -1]]
    assert tree.children(1) == [3, 4]
    straight = tree_of(torch.arange(6), torch.arange(6) - 1)
    assert torch.equal(straight.mask, torch.ones(6, 6).tril().bool())
    for wrong in ([0, 0], [-1, -1], [-1, 2, 0], [-1]):
        with pytest.raises(ShapeError):
            tree_of(torch.arange(3)[: max(len(wrong), 2)], torch.tensor(wrong))


def greedy(model: Any, ids: Tensor, count: int, embeds: Tensor | None = None) -> Tensor:
    """Plain decoding, every token anew from the whole text."""
    embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
    with torch.no_grad():
        for _ in range(count):
            token = model(inputs_embeds=embeds, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), 1)
            embeds = torch.cat((embeds, model.get_input_embeddings()(token)), 1)
    return ids


@pytest.mark.paper("dream_spec")
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 6), (4, 5, 30)])
def test_greedy_output_is_the_targets_whatever_the_draft(shape: tuple[int, int, int]) -> None:
    model, ids = target(), tokens(1, 7)
    dim = model.config.hidden_size
    depth, top_k, total = shape
    expected = greedy(model, ids, 20)
    for seed in range(3):
        draft = draft_of(seed, dim=dim)
        got = dream_generate(model, draft, ids, 20, depth=depth, top_k=top_k, total=total)
        assert torch.equal(got.tokens, expected)
        assert got.target_calls <= 19 and 1 <= got.mean_accepted_length <= depth + 1


@pytest.mark.paper("dream_spec")
def test_a_draft_that_knows_the_target_saves_passes() -> None:
    """A draft whose guesses are right is taken over whole; the output stays the same."""
    model, ids = target(), tokens(1, 7)
    expected = greedy(model, ids, 21)[0].tolist()

    class Oracle(DreamDraft):
        def forward(self, embeds, target_feats, mask=None, cache=None, positions=None):  # type: ignore[no-untyped-def]
            out = super().forward(embeds, target_feats, mask, cache, positions)
            assert cache is not None
            places = torch.arange(cache.seen - embeds.shape[1], cache.seen) if positions is None else positions
            following = torch.tensor([expected[min(int(p) + 1, len(expected) - 1)] for p in places])
            hot = 1e3 * model.get_output_embeddings().weight[following]
            return DraftOutput(hot[None], out.fused)

    draft = Oracle(model.config.hidden_size, 2).double()
    got = dream_generate(model, draft, ids, 21, depth=4, top_k=1, total=5)
    assert got.tokens[0].tolist() == expected
    assert got.accepted == [4] * 4 and got.mean_accepted_length == 5


@pytest.mark.paper("dream_spec")
def test_images_are_read_whole_by_the_target_and_pruned_for_the_draft() -> None:
    model, ids = target(), tokens(1, 12)
    model.set_attn_implementation("eager")
    image = 0
    ids[ids == image] = 1
    ids[0, 2:8] = image
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 2:8] = torch.randn(6, embeds.shape[-1], dtype=torch.float64)
    expected = greedy(model, ids, 10, embeds)
    for keep in (0.34, 1.0):
        got = dream_generate(
            model, draft_of(dim=embeds.shape[-1]), ids, 10, inputs_embeds=embeds, image_token=image, keep=keep
        )
        assert torch.equal(got.tokens, expected)
    model.set_attn_implementation("sdpa")
    with pytest.raises(OptionError, match="eager"):
        dream_generate(model, draft_of(dim=embeds.shape[-1]), ids, 4, inputs_embeds=embeds, image_token=image)


def test_the_end_token_ends_the_text() -> None:
    model, ids = target(), tokens(1, 7)
    expected = greedy(model, ids, 20)[0, 7:].tolist()
    end = expected[5]
    got = dream_generate(model, draft_of(dim=model.config.hidden_size), ids, 20, end=end).tokens[0, 7:].tolist()
    assert got == expected[: expected.index(end) + 1]


@pytest.mark.paper("dream_spec")
def test_sampled_tokens_are_distributed_as_the_targets() -> None:
    """First and second tokens over many draws, within 4 standard deviations of the target's chances."""
    g = torch.Generator().manual_seed(0)
    vocab, draws = 6, 20_000
    # Root; two children; one grandchild below the first.
    tree = tree_of(torch.tensor([0, 2, 5, 3]), torch.tensor([-1, 0, 0, 1]))
    logits = torch.randn(4, vocab, generator=g) * 1.5
    chances = (logits / 0.7).softmax(-1)
    first, second = torch.zeros(vocab), torch.zeros(vocab)
    for _ in range(draws):
        path, token = verify(logits, tree, 0.7, g)
        words = [*tree.tokens[path].tolist(), token]
        first[words[0]] += 1
        if words[0] == 2:
            second[words[1]] += 1
    for counted, wanted in ((first, chances[0]), (second, chances[1])):
        total = counted.sum()
        spread = (wanted * (1 - wanted) / total).sqrt()
        assert bool(((counted / total - wanted).abs() < 4 * spread + 1e-6).all())


def test_a_path_the_target_would_not_take_is_left() -> None:
    tree = tree_of(torch.tensor([0, 2, 1, 3]), torch.tensor([-1, 0, 0, 2]))
    logits = torch.full((4, 5), 0.0)
    logits[0, 1], logits[2, 3], logits[3, 4] = 1, 1, 1
    assert verify(logits, tree) == ([2, 3], 4)
    logits[0, 4] = 2
    assert verify(logits, tree) == ([], 4)


@pytest.mark.paper("dream_spec")
def test_entropy_of_known_attention_and_the_layer_it_selects() -> None:
    hot = F.one_hot(torch.randint(5, (2, 3, 4)), 5).float()
    torch.testing.assert_close(attention_entropy(hot), torch.zeros(2, 4))
    torch.testing.assert_close(attention_entropy(torch.full((2, 3, 4, 5), 0.2)), torch.full((2, 4), math.log(5)))
    g = torch.Generator().manual_seed(2)
    attentions = [torch.randn(2, 3, 7, 7, generator=g).mul(2).softmax(-1) for _ in range(10)]
    states = [torch.full((2, 7, 1), float(layer)) for layer in range(11)]
    chosen = select_features_by_entropy(states, attentions, 0.6)[..., 0]
    # int(0.6 * 10) = 6 layers, without layers 0 and 5.
    entropies = torch.stack([-(a * a.log()).sum(-1).mean(1) for a in attentions[1:5]])
    assert torch.equal(chosen - 1, 1.0 + entropies.argmin(0))
    with pytest.raises(OptionError, match="larger depth_fraction"):
        select_features_by_entropy(states[:7], attentions[:6], 0.4)
    with pytest.raises(ShapeError, match="11 hidden states"):
        select_features_by_entropy(states[:-1], attentions)


@pytest.mark.paper("dream_spec")
def test_pruning_keeps_text_and_the_images_best() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, 0, 0, 0, 0, 7, 0, 9], [0, 0, 5, 0, 0, 0, 8, 8]])
    embeds, feats = torch.randn(2, 2, 8, 4, generator=g)
    attn = torch.rand(2, 3, 8, 8, generator=g)
    same = prune_visual_tokens(ids, embeds, feats, attn, 1.0, image_token=0)
    for got, given in zip(same, (ids, embeds, feats, torch.arange(8).expand(2, -1)), strict=True):
        assert torch.equal(got, given)
    kept_ids, kept_embeds, kept_feats, place = prune_visual_tokens(ids, embeds, feats, attn, 0.4, image_token=0)
    score = attn.mean((1, 2))
    for row in range(2):
        images = [j for j in range(8) if int(ids[row, j]) == 0]
        best = sorted(images, key=lambda j: -float(score[row, j]))[:2]
        wanted = [j for j in range(8) if int(ids[row, j]) != 0 or j in best]
        assert place[row].tolist() == wanted
        assert torch.equal(kept_embeds[row], embeds[row, wanted]) and torch.equal(kept_feats[row], feats[row, wanted])
        assert torch.equal(kept_ids[row], ids[row, wanted])
    with pytest.raises(ShapeError, match="different numbers"):
        prune_visual_tokens(
            torch.tensor([[0, 1], [0, 0]]), embeds[:, :2], feats[:, :2], attn[..., :2, :2], image_token=0
        )
    with pytest.raises(OptionError, match="share"):
        prune_visual_tokens(ids, embeds, feats, attn, 0.0, image_token=0)


@pytest.mark.paper("dream_spec")
def test_the_loss_by_its_formula() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, fused, wanted, selected = torch.randn(4, 2, 5, DIM, generator=g, dtype=torch.float64)
    head = nn.Linear(DIM, VOCAB).double()
    counted = torch.rand(2, 5, generator=g) < 0.6
    total = 0.0
    for b, t in counted.nonzero().tolist():
        p, q = head(wanted[b, t]).softmax(-1), head(hidden[b, t]).softmax(-1)
        total += (p * (p / q).log()).sum().item()
        for a, c, weight in ((hidden, wanted, 0.2), (fused, selected, 1.0)):
            gap = (a[b, t] - c[b, t]).abs()
            total += weight * torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean().item()
    got = dream_loss(DraftOutput(hidden, fused), head, wanted, selected, counted)
    assert float(got) == pytest.approx(total / int(counted.sum()))
    assert float(dream_loss(DraftOutput(wanted, selected), head, wanted, selected)) == pytest.approx(0, abs=1e-12)
    noise = noisy_features(torch.zeros(1, 256, 3), 0.2, g)
    assert float(noise.abs().max()) <= 0.2 and float(noise.abs().max()) > 0.18


def test_training_opens_the_gates() -> None:
    """The loss reaches the gates, and through them the features."""
    draft = DreamDraft(DIM, 2).double()
    embeds, feats = inputs(6)
    head = nn.Linear(DIM, VOCAB).double()
    loss = dream_loss(draft(embeds, previous_features(feats)), head, feats, feats)
    grads = torch.autograd.grad(loss, (draft.cross.attention_gate, draft.cross.mlp_gate))
    assert all(float(grad) != 0 for grad in grads)


def test_mistakes_teach() -> None:
    with pytest.raises(OptionError, match="heads of even width"):
        DreamDraft(10, 3)
    draft, (embeds, feats) = draft_of(), inputs(4)
    with pytest.raises(ShapeError, match="same tokens"):
        draft(embeds, feats[:, :3])
    with pytest.raises(ShapeError, match="one column a token"):
        draft(embeds, feats, torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="depth >= 1"):
        build_draft_tree(draft, lambda x: x, lambda x: x, 0, embeds[0, 0], DraftCache(), total=1)
    with pytest.raises(ShapeError, match="one prompt"):
        dream_generate(None, draft, torch.zeros(2, 3, dtype=torch.int64))


def test_a_tree_is_an_ordinary_dataclass() -> None:
    tree = tree_of(torch.tensor([4]), torch.tensor([-1]))
    assert isinstance(tree, DraftTree) and tree.paths.tolist() == [[0]] and tree.children(0) == []
