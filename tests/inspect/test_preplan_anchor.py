"""The preplan-and-anchor rhythm: maps whose measures are known, loops written from the formulas, real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard
from regard.bench.plan_tasks import PlanStrings
from regard.errors import OptionError, ShapeError
from regard.inspect.preplan_anchor import anchor_tokens, preplan_tokens, rhythm_coupling, rhythm_lift, token_credit
from regard.inspect.rhythm import attention_rhythm, fai, head_distance, mean_map, middle_layers, split_heads, waad
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
    # 1.8 heads are two.
    assert [len(each) for each in split_heads(distance[:, :3], 0.3)] == [2, 2]


@pytest.mark.paper("preplan_anchor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_loses_distances(dtype: torch.dtype) -> None:
    length = 2048
    maps = first(length).to(dtype)
    assert float(head_distance(maps[None, :, None].expand(1, 1, 2, -1, -1))[0, 0]) == (length - 1) / 2
    assert waad(maps, 1999)[0, -50:].tolist() == [1998.0] + 49 * [1999.0]
    column = torch.zeros(1, 600, 600, dtype=dtype)
    column[:, 1:, 0] = 0.3
    received = fai(column, 1, None)
    assert received.dtype == torch.float32
    assert float(received[0, 0]) == pytest.approx(float(column[0, 1, 0]), rel=1e-6)


@pytest.mark.paper("preplan_anchor")
def test_rows_beside_the_response_may_hold_anything() -> None:
    """Padding comes as uniform rows, or as NaN."""
    weights, mask = causal(2, 1, 3), torch.zeros(1, LENGTH, dtype=torch.bool)
    mask[:, 4:] = True
    distance, influence = head_distance(weights, mask), fai(weights[0, :, 0], 2, 6, mask)
    for filler in (1 / LENGTH, torch.nan):
        padded = weights.clone()
        padded[..., :4, :] = filler
        torch.testing.assert_close(head_distance(padded, mask), distance)
        torch.testing.assert_close(fai(padded[0, :, 0], 2, 6, mask), influence)


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


@pytest.mark.paper("preplan_anchor")
def test_as_many_heads_as_asked_for_in_each_set() -> None:
    torch.manual_seed(1)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=2, num_heads=4).double().eval()
    tokens = torch.randint(11, (2, 18))
    found = attention_rhythm(model, lambda: model(tokens), torch.ones_like(tokens), q=0.5)
    assert (found.local_heads, found.global_heads) == split_heads(found.distance, 0.5)
    assert len(found.local_heads) == 4


def test_padded_prompts_of_an_eager_model_in_half_precision() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import llama, padding, tokens

    ids, model = tokens(2, 19), llama("eager").bfloat16()
    seen = padding(2, 19, left=5)
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, 9:] = True

    def run() -> None:
        model(input_ids=ids, attention_mask=seen)

    found = attention_rhythm(model, run, response, lo=1, hi=4, window=6, rows=7)
    with regard.capture(model, "weights") as trace, torch.no_grad():
        run()
    weights = trace.stack("weights")
    assert weights.dtype == torch.bfloat16 and found.waad.dtype == torch.float32
    exact = weights.double()
    torch.testing.assert_close(found.distance.double(), head_distance(exact, response), rtol=1e-5, atol=1e-6)
    near = waad(mean_map(exact, found.local_heads), 6)
    torch.testing.assert_close(found.waad[response].double(), near[response], rtol=1e-5, atol=1e-6)


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
    # 1.6 tokens of four are two.
    assert int(anchor_tokens(influence[:1, :4], 0.4).sum()) == 2
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
@pytest.mark.parametrize(("k", "alpha", "length"), [(3, 0.5, 31), (1, 0.25, 30), (2, 1.0, 31)])
def test_coupled_credit_agrees_with_a_loop(k: int, alpha: float, length: int) -> None:
    torch.manual_seed(2)
    looked, influence = 10 * torch.rand(24, length, dtype=torch.float64), torch.rand(24, length, dtype=torch.float64)
    gamma = token_credit(looked, influence, "coupled", amp=1.5, alpha=alpha, k=k)
    for row in range(24):
        assert gamma[row].tolist() == pytest.approx(looped(looked[row], influence[row], 0.4, k, alpha, 1.5))
    found = rhythm_coupling(looked, influence, k=k)
    assert bool((found.dominated <= found.anchors).all()) and bool(found.dominated.any())
    rows, at = found.dominated.nonzero(as_tuple=True)
    back = at - found.introduced_by[rows, at]
    assert int(back.min()) >= 1 and int(back.max()) <= k
    assert bool((found.introduced_by[~found.dominated] == -1).all())
    assert not bool(found.dominated[:, 0].any())
    # Without thresholds every anchor is dominated but one that nothing precedes.
    free = rhythm_coupling(looked, influence, k=k, tau_waad=torch.inf, tau_delta=-torch.inf)
    free.anchors[:, 0] = False
    assert torch.equal(free.dominated, free.anchors)
    never = rhythm_coupling(looked, influence, k=k, tau_waad=-1.0)
    gamma_never = token_credit(looked, influence, k=k, tau_waad=-1.0)
    torch.testing.assert_close(gamma_never, token_credit(looked, influence, "global"))
    gamma_free = token_credit(looked, influence, alpha=0.25, k=k, tau_waad=torch.inf, tau_delta=-torch.inf)
    extra = 0.75 * free.dominated + 0.25 * free.introductory
    torch.testing.assert_close((gamma_free - 1)[:, k:] / 0.5, extra.to(gamma_free.dtype)[:, k:])
    assert not bool(never.dominated.any()) and not bool(never.introductory.any())
    # Credit is handed on, never made: at most the anchors' extra, less where two share an introductory token.
    assert bool(((gamma - 1).sum(-1) <= 0.5 * found.anchors.sum(-1) + 1e-12).all())


@pytest.mark.paper("preplan_anchor")
def test_a_response_within_a_text_gets_the_credit_it_gets_alone() -> None:
    torch.manual_seed(3)
    looked, influence = torch.rand(1, 40), torch.rand(1, 40)
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, 13:35] = True
    # What stands beside it would move the medians and take all places.
    looked[~mask], influence[~mask] = 100.0, 100.0
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


@pytest.mark.paper("preplan_anchor")
def test_lifts_agree_with_loops_within_each_response() -> None:
    torch.manual_seed(4)
    # Whole numbers, so that some neighbours are equal and are no peaks.
    looked, influence = torch.randint(5, (8, 40)).double(), torch.randint(1, 6, (8, 40)).double()
    entropy = torch.rand(8, 40, dtype=torch.float64)
    influence[:, 34:] = 0
    mask = torch.rand(8, 40) > 0.2
    mask[0, :5], mask[1] = False, True

    def peaks(score: Tensor, row: int) -> set[int]:
        inside = [t for t in range(1, 39) if all(mask[row, t - 1 : t + 2])]
        return {t for t in inside if score[row, t] > max(score[row, t - 1], score[row, t + 1])}

    at_peaks, followed, chances = [], [], []
    for row in range(8):
        tall, far = peaks(looked, row), peaks(influence, row)
        at_peaks += [float(entropy[row, t]) for t in tall]
        followed += [t in tall or t - 1 in tall for t in far]
        room = [t for t in range(40) if mask[row, t] and influence[row, t] > 0]
        chances += [sum(t in tall or t - 1 in tall for t in room) / len(room)] * len(far)
    lift = rhythm_lift(looked, influence, entropy, mask)
    assert lift.entropy_at_peaks == pytest.approx(sum(at_peaks) / len(at_peaks))
    assert lift.entropy == pytest.approx(float(entropy[mask].mean()))
    assert lift.follows == pytest.approx(sum(followed) / len(followed))
    assert lift.follows_by_chance == pytest.approx(sum(chances) / len(chances))


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
    with pytest.raises(OptionError, match="at least"):
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
    with pytest.raises(ShapeError, match="same text"):
        rhythm_lift(scores, scores[:, :5], scores)
    with pytest.raises(OptionError, match="no token"):
        head_distance(maps[None, :, None], torch.zeros(2, 9))
    with pytest.raises(OptionError, match="NaN"):
        token_credit(scores, scores / 0 * 0)
    with pytest.raises(OptionError, match="NaN"):
        split_heads(torch.full((2, 4), torch.nan))
    with pytest.raises(OptionError, match="heads 0 to 2"):
        mean_map(causal(1, 2, 3), [(0, 3)])
    with pytest.raises(OptionError, match="layers 0 to 0"):
        mean_map(causal(1, 2, 3), [(-1, 0)])
    for call in (lambda whole: fai(whole[0, :, 0], 1, 3), head_distance):
        with pytest.raises(OptionError, match="later tokens"):
            call(torch.full((1, 2, 2, 9, 9), 1 / 9))
    with pytest.raises(OptionError, match="layer"):
        middle_layers(0)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=1, num_heads=2).eval()
    with pytest.raises(ShapeError, match="prompts and responses"):
        attention_rhythm(model, lambda: model(torch.zeros(2, 9, dtype=torch.int64)), torch.ones(2, 8))
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    for local, distant in (([(0, 0)], []), ([(0, 2)], [(0, 0)]), ([(0, 0)], [(0, -1)])):
        with pytest.raises(OptionError, match="heads 0 to 1"):
            attention_rhythm(model, lambda: model(tokens), torch.ones(2, 9), heads=(local, distant))
    with pytest.raises(OptionError, match="No attention layer"):
        attention_rhythm(model, lambda: None, torch.ones(2, 8))


def test_steps_of_generation_and_encoders_are_refused_and_the_model_is_left_alone() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import bert, llama, tokens

    model, ids = llama(), tokens(2, 12)
    before = model(input_ids=ids).logits
    with pytest.raises(ShapeError, match="one pass"):
        attention_rhythm(model, lambda: model.generate(ids, max_new_tokens=3), torch.ones(2, 12))
    with torch.no_grad():
        past = model(input_ids=ids[:, :11], use_cache=True).past_key_values
    with pytest.raises(ShapeError, match="one pass"):
        attention_rhythm(model, lambda: model(input_ids=ids[:, 11:], past_key_values=past), torch.ones(2, 12))
    assert torch.equal(model(input_ids=ids).logits, before)
    encoder = bert()
    with pytest.raises(OptionError, match="later tokens"):
        attention_rhythm(encoder, lambda: encoder(input_ids=ids), torch.ones(2, 12))


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_texts(length: int) -> None:
    scores = torch.rand(2, length)
    assert torch.equal(rhythm_coupling(scores, scores, q=1.0).anchors, torch.ones(2, length).bool())
    assert torch.equal(token_credit(scores, scores, "local")[:, -1], torch.ones(2))
    lift = rhythm_lift(scores, scores, scores)
    assert lift.entropy == pytest.approx(float(scores.mean())) and lift.follows != lift.follows
