"""The preplan-and-anchor rhythm: maps whose measures are known, loops written from the formulas, real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard
from regard.bench.plan_tasks import PlanStrings
from regard.errors import OptionError, ShapeError
from regard.inspect.preplan_anchor import (
    anchor_tokens,
    attention_rhythm,
    fai,
    head_distance,
    mean_map,
    middle_layers,
    preplan_tokens,
    rhythm_coupling,
    rhythm_lift,
    split_heads,
    token_credit,
    waad,
)
from regard.models.sequence import SequenceModel

LENGTH = 24


def causal(*shape: int, length: int = LENGTH) -> Tensor:
    """Random row-stochastic causal maps."""
    scores = torch.randn(*shape, length, length, dtype=torch.float64) * 2
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def previous(length: int = LENGTH) -> Tensor:
    """All attention on the token before; the first token's on itself."""
    place = torch.arange(length)
    return torch.zeros(1, length, length, dtype=torch.float64).index_put_(
        (torch.zeros_like(place), place, (place - 1).clamp_min(0)), torch.tensor(1.0, dtype=torch.float64)
    )


def first(length: int = LENGTH) -> Tensor:
    """All attention on the first token."""
    return torch.zeros(1, length, length, dtype=torch.float64).index_fill_(-1, torch.tensor([0]), 1.0)


@pytest.mark.paper("preplan_anchor")
def test_distance_of_maps_that_look_a_known_way_back() -> None:
    same = torch.eye(LENGTH, dtype=torch.float64)[None]
    assert torch.equal(waad(same), torch.zeros_like(same[..., 0]))
    one = torch.ones(1, LENGTH, dtype=torch.float64)
    one[:, 0] = 0
    assert torch.equal(waad(previous()), one)
    assert torch.equal(waad(first(), window=7), torch.arange(LENGTH).clamp(max=7).double()[None])


@pytest.mark.paper("preplan_anchor")
def test_influence_of_a_column_of_constant_weight_and_of_near_tokens() -> None:
    maps = torch.zeros(1, LENGTH, LENGTH, dtype=torch.float64)
    maps[:, 4:, 3] = 0.3
    assert float(fai(maps, 2, 9)[0, 3]) == pytest.approx(0.3)
    # Nearer than lo nothing counts, and farther than hi neither.
    near = maps.clone()
    near[:, 4:8, 3] = 0.9
    near[:, 14:, 3] = 0.7
    assert float(fai(near, 5, 10)[0, 3]) == pytest.approx(0.3)
    assert float(fai(near, 4, 10)[0, 3]) > 0.3
    # The last tokens have no window.
    assert float(fai(causal(1), 5, 10)[0, -5:].abs().sum()) == 0
    assert float(fai(causal(1), 5, None)[0, -6]) > 0


@pytest.mark.paper("preplan_anchor")
def test_measures_stay_within_their_range_and_agree_with_loops() -> None:
    maps = causal(3)
    mask = torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[0, 5:], mask[1, 9:20], mask[2] = True, True, True
    looked, influence = waad(maps, 6), fai(maps, 3, 8, mask)
    assert float(looked.min()) >= 0 and float(looked.max()) <= 6
    assert float(influence.min()) >= 0 and float(influence.max()) <= 1
    for b in range(3):
        for t in range(LENGTH):
            back = sum(float(maps[b, t, s]) * min(t - s, 6) for s in range(t + 1))
            assert float(looked[b, t]) == pytest.approx(back)
            later = [float(maps[b, u, t]) for u in range(t + 3, min(t + 8, LENGTH - 1) + 1) if mask[b, u]]
            assert float(influence[b, t]) == pytest.approx(sum(later) / max(len(later), 1))


@pytest.mark.paper("preplan_anchor")
def test_heads_are_split_by_how_far_they_look_from_the_response() -> None:
    weights = causal(2, 3, 5)
    mask = torch.rand(3, LENGTH) > 0.4
    distance = head_distance(weights, mask)
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    for layer in range(2):
        for head in range(5):
            rows = [(weights[layer, b, head, t] * back[t]).sum() for b in range(3) for t in range(LENGTH) if mask[b, t]]
            assert float(distance[layer, head]) == pytest.approx(float(sum(rows) / len(rows)))
    local, distant = split_heads(distance, 0.3)
    spans = sorted(distance.flatten().tolist())
    assert [float(distance[at]) for at in local] == pytest.approx(spans[:3])
    assert [float(distance[at]) for at in distant] == pytest.approx(spans[-3:])
    mean = mean_map(weights, local)
    torch.testing.assert_close(mean, sum(weights[layer, :, head] for layer, head in local) / 3)
    assert [len(each) for each in split_heads(distance[:1, :2], 0.1)] == [1, 1]


@pytest.mark.paper("preplan_anchor")
def test_the_future_moves_influence_and_not_the_distance() -> None:
    torch.manual_seed(0)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=2, num_heads=4).double().eval()
    tokens = torch.randint(11, (2, 20))
    other = torch.cat((tokens[:, :10], (tokens[:, 10:] + 1) % 11), 1)
    response = torch.ones_like(tokens, dtype=torch.bool)
    one = attention_rhythm(model, lambda: model(tokens), response, lo=2, hi=8)
    sets = (one.local_heads, one.global_heads)
    two = attention_rhythm(model, lambda: model(other), response, heads=sets, lo=2, hi=8)
    torch.testing.assert_close(one.waad[:, :10], two.waad[:, :10])
    assert not torch.allclose(one.waad[:, 10:], two.waad[:, 10:])
    assert bool(((one.fai - two.fai).abs()[:, 4:8] > 1e-6).all())


@pytest.mark.paper("preplan_anchor")
@pytest.mark.parametrize("rows", [5, 256])
def test_one_pass_says_what_the_captured_maps_say(rows: int) -> None:
    torch.manual_seed(1)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=3, num_heads=4, num_kv_heads=2).double().eval()
    tokens = torch.randint(11, (2, 18))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 6:] = True
    with regard.capture(model) as trace, torch.no_grad():
        model(tokens)
    weights = trace.stack("weights")
    local, distant = split_heads(head_distance(weights, mask))
    found = attention_rhythm(model, lambda: model(tokens), mask, window=5, lo=2, hi=6, rows=rows)
    assert (found.local_heads, found.global_heads) == (local, distant) and found.paths == tuple(trace.paths)
    torch.testing.assert_close(found.distance, head_distance(weights, mask))
    torch.testing.assert_close(found.waad, waad(mean_map(weights, local), 5))
    torch.testing.assert_close(found.fai, fai(mean_map(weights, distant), 2, 6, mask))


def test_a_hugging_face_model_and_some_of_its_layers() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import llama, tokens

    ids, model = tokens(2, 19), llama().eval()
    response = torch.ones_like(ids, dtype=torch.bool)
    layers = middle_layers(3)
    found = attention_rhythm(model, lambda: model(input_ids=ids), response, layers=layers, lo=1, hi=4)
    with regard.capture(model, layers=layers) as trace, torch.no_grad():
        model(input_ids=ids)
    weights = trace.stack("weights")
    torch.testing.assert_close(found.fai, fai(mean_map(weights, found.global_heads), 1, 4))
    assert len(found.paths) == len(layers)
    assert middle_layers(36) == [12, 15, 18, 21, 24] and middle_layers(6) == [2, 3, 4] and middle_layers(1) == [0]


@pytest.mark.paper("preplan_anchor")
def test_chosen_tokens_are_the_largest_share_of_the_response() -> None:
    looked = torch.tensor([[9.0, 1, 1, 5, 4, 4, 8, 3, 0, 0, 0, 9]])
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 1:11] = True
    # Changes 1 to 9: 0, 4, 1, 0, 4, 5, 3, 0, 0; the last token of the response has none.
    assert preplan_tokens(looked, 0.3, mask).nonzero()[:, 1].tolist() == [2, 5, 6]
    assert preplan_tokens(looked, 1.0, mask).nonzero()[:, 1].tolist() == [2, 3, 5, 6, 7]
    influence = torch.rand(4, 50, dtype=torch.float64)
    influence[:, 40:] = 0
    kept = torch.zeros(4, 50, dtype=torch.bool)
    kept[:, 20:] = True
    anchors = anchor_tokens(influence, 0.4, kept)
    for row in range(4):
        chosen = set(anchors[row].nonzero()[:, 0].tolist())
        best = sorted(range(20, 40), key=lambda at: -float(influence[row, at]))[:12]
        assert chosen == set(best)
    # A token without influence is none, however many there should be.
    assert anchor_tokens(influence, 0.9, kept).sum(-1).tolist() == [20] * 4


def looped(looked: Tensor, influence: Tensor, q: float, k: int, alpha: float, amp: float) -> list[float]:
    """Equations 13, 17 and 18, token by token, of one response."""
    length = len(looked)
    delta = [abs(float(looked[t] - looked[t + 1])) for t in range(length - 1)]
    anchors = sorted(range(length), key=lambda t: -float(influence[t]))[: round(q * length)]
    anchors = [t for t in anchors if float(influence[t]) > 0]
    middle = sorted(looked.tolist())[(length - 1) // 2]
    high = sorted(delta)[(len(delta) - 1) // 2]
    extra, introduces = [0.0] * length, set()
    for t in anchors:
        before = [u for u in range(max(t - k, 0), t)]
        if before and float(looked[t]) <= middle and max(delta[u] for u in before) >= high:
            extra[t] += 1 - alpha
            introduces.add(max(before, key=lambda u: delta[u]))
        else:
            extra[t] += 1
    return [1 + (amp - 1) * (extra[t] + alpha * (t in introduces)) for t in range(length)]


@pytest.mark.paper("preplan_anchor")
@pytest.mark.parametrize(("k", "alpha"), [(3, 0.5), (1, 0.25), (2, 1.0)])
def test_coupled_credit_agrees_with_a_loop(k: int, alpha: float) -> None:
    torch.manual_seed(2)
    looked, influence = 10 * torch.rand(6, 31, dtype=torch.float64), torch.rand(6, 31, dtype=torch.float64)
    gamma = token_credit(looked, influence, "coupled", amp=1.5, alpha=alpha, k=k)
    for row in range(6):
        assert gamma[row].tolist() == pytest.approx(looped(looked[row], influence[row], 0.4, k, alpha, 1.5))
    found = rhythm_coupling(looked, influence, k=k)
    assert bool((found.dominated <= found.anchors).all()) and bool(found.dominated.any())
    rows, at = found.dominated.nonzero(as_tuple=True)
    back = at - found.introduced_by[rows, at]
    assert int(back.min()) >= 1 and int(back.max()) <= k
    assert bool((found.introduced_by[~found.dominated] == -1).all())
    # Credit is handed on, never made: at most the anchors' extra, less where two share an introductory token.
    assert bool(((gamma - 1).sum(-1) <= 0.5 * found.anchors.sum(-1) + 1e-12).all())


@pytest.mark.paper("preplan_anchor")
def test_a_response_within_a_text_gets_the_credit_it_gets_alone() -> None:
    torch.manual_seed(3)
    looked, influence = torch.rand(1, 40), torch.rand(1, 40)
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, 13:35] = True
    for mode in ("local", "global", "coupled"):
        whole = token_credit(looked, influence, mode, response_mask=mask)
        alone = token_credit(looked[:, 13:35], influence[:, 13:35], mode)
        torch.testing.assert_close(whole[:, 13:35], alone)
        assert bool((whole[:, :13] == 1).all()) and bool((whole[:, 35:] == 1).all())
    assert token_credit(looked, influence, "local", amp=2.0, q=0.25).unique().tolist() == [1.0, 2.0]


def test_lifts_of_signals_made_to_go_together() -> None:
    looked, influence, entropy = torch.zeros(1, 31), torch.full((1, 31), 0.1), torch.ones(1, 31)
    looked[:, 3:30:6] = 5
    influence[:, 4:30:6] = 0.8
    entropy[:, 3:30:6] = 3
    lift = rhythm_lift(looked, influence, entropy)
    assert lift.follows == 1 and lift.follows_by_chance == pytest.approx(10 / 31)
    assert lift.entropy_at_peaks == 3 and lift.entropy == pytest.approx(1 + 2 * 5 / 31)


def test_strings_hold_their_plan() -> None:
    task = PlanStrings(40, 5, 2)
    tokens, plan, decoys = task.draw(50, torch.Generator().manual_seed(0))
    assert int((tokens > 1).sum()) == 150 and int(tokens.max()) < task.vocab_size
    for row in range(50):
        at = int(plan[row])
        number = int(tokens[row, at]) - 2
        assert [int(bit) for bit in f"{number:05b}"] == tokens[row, at + 1 : at + 6].tolist()
        assert all(int(tokens[row, int(d)]) >= 2 + 32 for d in decoys[row])
    inputs, targets = task.batch(8, torch.Generator().manual_seed(0), "test")
    assert int((targets >= 0).sum()) == 40
    rows, places = (targets >= 0).nonzero(as_tuple=True)
    assert torch.equal(targets[rows, places], inputs[rows, places + 1])
    assert PlanStrings(12, 4, 0, place=2).draw(5, torch.Generator())[1].tolist() == [2] * 5
    with pytest.raises(OptionError, match="length"):
        PlanStrings(20, 6, 2)
    with pytest.raises(OptionError, match="place"):
        PlanStrings(20, 6, 0, place=15)


def test_wrong_input_is_told() -> None:
    scores, maps = torch.rand(2, 9), causal(2, length=9)
    with pytest.raises(ShapeError, match="layers"):
        head_distance(maps)
    with pytest.raises(ShapeError, match="length, length"):
        waad(maps[:, :5])
    with pytest.raises(OptionError, match="window"):
        waad(maps, 0)
    with pytest.raises(OptionError, match="lo"):
        fai(maps, 5, 3)
    with pytest.raises(ShapeError, match="response_mask"):
        fai(maps, 1, 3, torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(OptionError, match="share"):
        split_heads(torch.rand(2, 4), 0.7)
    with pytest.raises(OptionError, match="average"):
        mean_map(causal(1, 2, 3), [])
    with pytest.raises(OptionError, match="share"):
        anchor_tokens(scores, 0.0)
    with pytest.raises(ShapeError, match="batch, length"):
        preplan_tokens(scores[0])
    with pytest.raises(OptionError, match="coupled"):
        token_credit(scores, scores, "both")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="alpha"):
        token_credit(scores, scores, alpha=1.5)
    with pytest.raises(OptionError, match="k counts"):
        rhythm_coupling(scores, scores, k=0)
    with pytest.raises(ShapeError, match="same text"):
        rhythm_coupling(scores, scores[:, :5])
    with pytest.raises(OptionError, match="layer"):
        middle_layers(0)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=1, num_heads=2).eval()
    with pytest.raises(ShapeError, match="prompts and responses"):
        attention_rhythm(model, lambda: model(torch.zeros(2, 9, dtype=torch.int64)), torch.ones(2, 8))
    with pytest.raises(OptionError, match="two sets"):
        attention_rhythm(model, lambda: None, torch.ones(2, 8), heads=([(0, 0)], []))
    with pytest.raises(OptionError, match="No attention layer"):
        attention_rhythm(model, lambda: None, torch.ones(2, 8))
