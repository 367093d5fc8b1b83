"""The limits of normalised attention: bounds, loops written from the formulas, drawings, eigenvalues, real models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.errors import FileFormatError, OptionError, ShapeError, UnknownNameError
from regard.inspect.normalization_limits import (
    KINDS,
    critical_top_n,
    expected_selection_distance,
    finite_difference_sensitivity,
    jacobian_norm,
    normalise,
    selection_distance,
    separability,
    weight_bounds,
)
from regard.inspect.selection_report import attention_selection_report
from regard.models.sequence import SequenceModel
from regard.reproduce.normalization_limits import needle, slope


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.paper("normalization_limits")
@pytest.mark.parametrize("length", [10, 100, 1000, 10000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softmax_stays_within_the_bounds(length: int, temperature: float) -> None:
    bound = 1.5
    low, high = weight_bounds(bound, length, temperature)
    logits = bound * (2 * torch.rand(20, length, dtype=torch.float64) - 1)
    weights = normalise(logits, temperature=temperature)
    assert bool((weights >= low).all()) and bool((weights <= high).all())
    assert low == pytest.approx(math.exp(-3 / temperature) / length)
    assert high == pytest.approx(math.exp(3 / temperature) / length)
    # One logit at one end, all others at the other: what is missing to the bound vanishes as 1/L.
    reach = math.exp(3 / temperature)
    for sign, limit, factor in ((1, high, reach), (-1, low, 1 / reach)):
        extreme = torch.full((length,), -sign * bound, dtype=torch.float64)
        extreme[0] = sign * bound
        found = float(normalise(extreme, temperature=temperature)[0])
        assert found / limit == pytest.approx(length / (length - 1 + factor), rel=1e-9)


def test_bounds_beyond_what_floats_hold() -> None:
    assert weight_bounds(400, 10) == (math.exp(-800) / 10, math.inf)
    assert weight_bounds(0, 8) == (1 / 8, 1 / 8)


@pytest.mark.paper("normalization_limits")
def test_any_form_of_single_logits_stays_within_its_extremes() -> None:
    """min F / (L max F) and max F / (L min F) on [-a, a]; one logit at an extreme of F comes near, as 1/L."""
    bound = 2.0
    grid = torch.linspace(-bound, bound, 4001, dtype=torch.float64)
    for function in (F.softplus, torch.sigmoid, lambda x: 1 + x.square()):
        values = function(grid)
        least, most = grid[values.argmin()], grid[values.argmax()]
        for length in (10, 100_000):
            weights = normalise(bound * (2 * torch.rand(4, length, dtype=torch.float64) - 1), function)
            low, high = values.min() / values.max() / length, values.max() / values.min() / length
            assert bool((weights >= low).all()) and bool((weights <= high).all())
        for one, others, limit in ((most, least, high), (least, most, low)):
            logits = torch.cat((one[None], others.expand(99_999)))
            assert float(normalise(logits, function)[0] / limit) == pytest.approx(1, abs=1e-3)


@pytest.mark.paper("normalization_limits")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_what_a_gap_keeps_where_weights_are_not_of_single_logits(temperature: float) -> None:
    """The largest logit is g above all others: sparsemax and entmax keep a share at any length, scalable softmax only
    where s g > T, half where equal; random others, then all others tied, where the bounds are reached."""
    scale = 0.43

    def top(kind: str, gap: float, length: int, tied: bool) -> float:
        logits = torch.zeros(length, dtype=torch.float64) if tied else -torch.rand(length, dtype=torch.float64)
        logits[0] = gap
        return float(normalise(logits, kind, temperature, scale=scale)[0])

    for gap in (0.1, 0.4, 0.9, 3.0):
        near = gap / temperature
        for kind, kept in (("sparsemax", min(near, 1)), ("entmax15", min(near / 2, 1) ** 2)):
            assert all(top(kind, gap, length, False) >= kept - 1e-9 for length in (10, 1000, 100_000))
            assert top(kind, gap, 100_000, True) == pytest.approx(kept, abs=5e-3)
        for length in (10, 1000, 100_000):
            kept = 1 / (1 + (length - 1) * length ** (-scale * near))
            assert top("scalable_softmax", gap, length, False) >= kept
            assert top("scalable_softmax", gap, length, True) == pytest.approx(kept)
    critical = temperature / scale
    assert top("scalable_softmax", critical, 100_000, True) == pytest.approx(0.5, abs=1e-4)
    assert top("scalable_softmax", 1.5 * critical, 100_000, True) > 0.99
    vanishing = {length: top("scalable_softmax", 0.5 * critical, length, True) for length in (1000, 10_000, 100_000)}
    assert slope(vanishing) == pytest.approx(-0.5, abs=0.02)


@pytest.mark.paper("normalization_limits")
def test_any_positive_function_of_the_logit_vanishes_as_one_over_length() -> None:
    for function in (F.softplus, torch.sigmoid, lambda x: 1 + x.square()):
        largest = {n: float(normalise(needle(n, 4), function)[:, 0].mean()) for n in (512, 2048, 8192)}
        assert slope(largest) == pytest.approx(-1, abs=0.1)


@pytest.mark.paper("normalization_limits")
def test_scalable_softmax_keeps_the_needle_and_softmax_loses_it() -> None:
    lengths = (512, 2048, 8192)
    found = {k: {n: float(normalise(needle(n), k)[:, 0].mean()) for n in lengths} for k in KINDS}
    for name, expected in (("softmax", (0.085, 0.023, 0.0056)), ("scalable_softmax", (0.97, 0.98, 0.99))):
        assert list(found[name].values()) == pytest.approx(expected, rel=0.05)
    assert slope(found["softmax"]) == pytest.approx(-1, abs=0.1)
    assert found["sparsemax"] == pytest.approx(dict.fromkeys(lengths, 1.0))
    assert found["uniform"][512] == pytest.approx(1 / 512)


@pytest.mark.paper("normalization_limits")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one_and_shift_where_they_should(kind: str) -> None:
    logits = 3 * normal(6, 40)
    weights = normalise(logits, kind, 0.7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.float64))
    assert bool((weights >= 0).all())
    moved = normalise(logits + 5, kind, 0.7)
    if kind == "self_adjusted":
        assert not torch.allclose(moved, weights), "it depends on the sign of the logits"
    else:
        torch.testing.assert_close(moved, weights, atol=1e-7, rtol=1e-6)
    assert bool((weights == 0).any()) == (kind in ("sparsemax", "entmax15", "self_adjusted"))


@pytest.mark.paper("normalization_limits")
def test_the_length_aware_kind_takes_its_length_and_learns_its_scale() -> None:
    logits = normal(3, 9)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weights = normalise(logits, "scalable_softmax", 2.0, 100, scale=scale)
    torch.testing.assert_close(weights, (0.7 * math.log(100) * logits / 2).softmax(-1))
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), scale)
    step = 1e-6
    nearby = [(s * math.log(100) * logits / 2).softmax(-1)[:, 0].sum() for s in (0.7 + step, 0.7 - step)]
    torch.testing.assert_close(gradient, (nearby[0] - nearby[1]) / (2 * step))
    torch.testing.assert_close(normalise(logits, "scalable_softmax"), normalise(logits, "scalable_softmax", length=9))
    # More logits than half precision counts to.
    many = torch.zeros(70_000, dtype=torch.float16)
    many[0] = 4
    for kind in ("scalable_softmax", F.softplus):
        half, single = normalise(many, kind), normalise(many.float(), kind)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half[0].float(), single[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(normalise(torch.tensor([3, 1])), normalise(torch.tensor([3.0, 1.0])))
    with pytest.raises(OptionError, match="length"):
        normalise(logits, "scalable_softmax", length=0)


@pytest.mark.paper("normalization_limits")
def test_self_adjusted_softmax_is_its_formula() -> None:
    for logits in (normal(50), normal(50) + 9, normal(50) - 9):
        x = logits.tolist()
        low, high = min(*x, 0.0), max(*x, 0.0)
        total = sum(math.exp(value) for value in x)
        raw = [(value - low) / (high - low) * math.exp(value) / total for value in x]
        expected = torch.tensor([value / sum(raw) for value in raw], dtype=torch.float64)
        torch.testing.assert_close(normalise(logits, "self_adjusted"), expected)
    flat = torch.full((4,), -2.0, dtype=torch.float64)
    torch.testing.assert_close(normalise(flat, "self_adjusted"), torch.full((4,), 0.25, dtype=torch.float64))


def looped(x: Tensor, alpha: Tensor, top_n: int, weighted: bool) -> tuple[list[float], float]:
    """Distances to each token that is not selected, and the separability, one token at a time."""
    order = sorted(range(len(alpha)), key=lambda i: -float(alpha[i]))
    chosen, others = order[:top_n], order[top_n:]
    total = torch.zeros_like(x[0])
    for i in chosen:
        total = total + alpha[i] * x[i]
    away = [float((total - (alpha[j] * x[j] if weighted else x[j])).square().sum()) for j in others]
    nearest = min(float((total - alpha[j] * x[j]).square().sum()) for j in others)
    near = [float((total - alpha[i] * x[i]).square().sum()) < nearest for i in chosen]
    return away, sum(near) / top_n


@pytest.mark.paper("normalization_limits")
@pytest.mark.parametrize("top_n", [1, 4, 10])
def test_distances_and_separability_against_loops(top_n: int) -> None:
    x, alpha = normal(2, 3, 11, 5), normalise(2 * normal(2, 3, 11))
    for weighted in (True, False):
        for reduce in ("mean", "sum"):
            found = selection_distance(x, alpha, top_n, weighted=weighted, reduce=reduce)  # type: ignore[arg-type]
            for at in ((0, 0), (1, 2)):
                away, _ = looped(x[at], alpha[at], top_n, weighted)
                expected = sum(away) / (len(away) if reduce == "mean" else 1)
                assert float(found[at]) == pytest.approx(expected)
    found = separability(x, alpha, top_n)
    assert float(found[1, 1]) == pytest.approx(looped(x[1, 1], alpha[1, 1], top_n, True)[1])


@pytest.mark.paper("normalization_limits")
@pytest.mark.parametrize("kind", ["uniform", "softmax"])
def test_expected_distance_against_monte_carlo(kind: str) -> None:
    """The mean over 8000 drawings of the tokens, within 3 percent, and the closed form of uniform weights."""
    length, dim = 40, 6
    alpha = normalise(normal(length), kind)
    for top_n in (1, 8, 30):
        x = 1.3 * normal(8000, length, dim)
        drawn = selection_distance(x, alpha.expand(8000, -1), top_n).mean()
        expected = expected_selection_distance(alpha, top_n, 1.3**2 * dim)
        assert float(drawn) == pytest.approx(float(expected), rel=0.03)
        if kind == "uniform":
            assert float(expected) == pytest.approx(1.3**2 * dim * (top_n + 1) / length**2)


@pytest.mark.paper("normalization_limits")
def test_critical_number_is_where_the_loop_stops() -> None:
    x, alpha = normal(5, 30, 4), normalise(2 * normal(5, 30))
    for tol in (1.5, 3.0, 6.0):
        found = critical_top_n(x, alpha, tol).tolist()
        for row, answer in enumerate(found):
            expected = 30
            for n in range(1, 30):
                order = alpha[row].argsort(descending=True)
                flat = torch.full((30,), 1 / 30, dtype=torch.float64)
                own, even = (looped(x[row][order], w, n, True)[0] for w in (alpha[row][order], flat))
                if sum(own) < tol * sum(even):
                    expected = n
                    break
            assert answer == expected
    assert critical_top_n(x, torch.full((5, 30), 1 / 30, dtype=torch.float64)).tolist() == [1] * 5


def jacobian(alpha: Tensor, temperature: float) -> Tensor:
    return (torch.diag_embed(alpha) - alpha[..., :, None] * alpha[..., None, :]) / temperature


@pytest.mark.paper("normalization_limits")
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_jacobian_norms_against_the_matrix_and_their_bounds(temperature: float) -> None:
    for sharpness in (0.1, 1, 10, 300):
        alpha = normalise(sharpness * normal(30, 12))
        matrix = jacobian(alpha, temperature)
        expected = {
            "spectral": torch.linalg.matrix_norm(matrix, 2),
            "fro": torch.linalg.matrix_norm(matrix),
            "max": matrix.abs().amax((-1, -2)),
        }
        for name, value in expected.items():
            found = jacobian_norm(alpha, temperature, name)  # type: ignore[arg-type]
            torch.testing.assert_close(found, value, atol=1e-9, rtol=1e-9)
        assert bool((expected["spectral"] <= (1 + 1e-12) / (2 * temperature)).all())
        assert bool((expected["max"] <= (1 + 1e-12) / (4 * temperature)).all())


@pytest.mark.paper("normalization_limits")
def test_two_equal_logits_attain_both_bounds() -> None:
    for alpha in ([0.5, 0.5], [0.5, 0.5, 0.0, 0.0]):
        weights = torch.tensor(alpha, dtype=torch.float64)
        assert float(jacobian_norm(weights, 0.1)) == pytest.approx(1 / 0.2), "1/(4T) is no bound of the spectral norm"
        assert float(jacobian_norm(weights, 0.1, "max")) == pytest.approx(1 / 0.4)
    # A weight of 1/2 reaches the entries' bound by itself; the norm's takes two.
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert float(jacobian_norm(weights, 0.1, "max")) == pytest.approx(1 / 0.4) and float(jacobian_norm(weights)) < 0.45
    for certain in ([1.0], [1.0, 0.0, 0.0]):
        assert float(jacobian_norm(torch.tensor(certain, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


@pytest.mark.paper("normalization_limits")
def test_small_steps_find_the_norm_and_large_ones_stay_below_the_square_root_of_two() -> None:
    logits = 2 * normal(8, 20)
    for temperature in (0.3, 1.0):
        steps = finite_difference_sensitivity(logits, 1e-6, temperature, steps=400)
        norms = jacobian_norm(normalise(logits, temperature=temperature), temperature)
        torch.testing.assert_close(steps, norms, rtol=1e-3, atol=1e-6)
    for eps in (0.001, 0.1, 1.0, 50.0):
        change = eps * finite_difference_sensitivity(logits, eps, 0.02)
        assert bool((change <= min(eps / 0.04, math.sqrt(2)) + 1e-12).all())
    assert float(change.max()) > 1.3, "a large step moves nearly all weight"
    # Where the bounds are reached: at a tie, and from one token to another.
    tie = torch.tensor([0.0, 0.0, -900.0], dtype=torch.float64)
    assert float(finite_difference_sensitivity(tie, 1e-4, 0.5)) == pytest.approx(1 / (2 * 0.5), rel=1e-6)
    one = torch.tensor([40.0, 0.0, -900.0], dtype=torch.float64)
    assert float((normalise(one) - normalise(one[[1, 0, 2]])).norm()) == pytest.approx(math.sqrt(2), rel=1e-12)


@pytest.mark.paper("normalization_limits")
def test_sensitivity_grows_as_one_over_the_temperature_for_the_same_weights() -> None:
    logits = normal(4, 30)
    cold, warm = (finite_difference_sensitivity(t * logits, 1e-6, t, steps=300) for t in (0.1, 1.0))
    torch.testing.assert_close(cold, 10 * warm, rtol=1e-3, atol=0)


@pytest.mark.paper("normalization_limits")
def test_the_report_is_what_the_captured_weights_say() -> None:
    pytest.importorskip("transformers")
    from tests.retrofit.small_models import gpt2, tokens

    ids, model = tokens(2, 17), gpt2()
    report = attention_selection_report(model, ids, lengths=(8, 17), top_n=(1, 4, 8), vectors="values")
    assert report.ratio.shape == (len(report.paths), 4, 2, 3) and report.entropy.shape == (len(report.paths), 4, 2)
    assert bool(report.ratio[:, :, 0, 2].isnan().all()), "eight of eight leave nothing out"
    with regard.capture(model) as trace, torch.no_grad():
        model(ids)
    states = attention_selection_report(model, ids, lengths=(17,), top_n=(4,))
    for index, layer in enumerate(trace):
        assert layer.hidden_states is not None and layer.weights is not None
        away = [looped(layer.hidden_states[b], layer.weights[b, 2, -1], 4, True)[0] for b in range(2)]
        mean = sum(sum(row) / len(row) for row in away) / 2
        assert float(states.distance[index, 2, 0, 0]) == pytest.approx(mean, rel=1e-4)
        assert layer.weights is not None and layer.values is not None
        for head in (0, 3):
            rows = [looped(layer.values[b, head], layer.weights[b, head, -1], 4, True) for b in range(2)]
            assert float(report.distance[index, head, 1, 1]) == pytest.approx(
                sum(sum(away) / len(away) for away, _ in rows) / 2, rel=1e-4
            )
            assert float(report.separability[index, head, 1, 1]) == pytest.approx(sum(share for _, share in rows) / 2)
            weights = layer.weights[:, head, -1].double()
            assert float(report.max_weight[index, head, 1]) == pytest.approx(float(weights.amax(-1).mean()))
            entropy = -(weights * weights.log()).sum(-1).mean()
            assert float(report.entropy[index, head, 1]) == pytest.approx(float(entropy))
            mass = weights.sort(-1, descending=True).values[:, :4].sum(-1).mean()
            assert float(report.mass[index, head, 1, 1]) == pytest.approx(float(mass))


def test_the_report_runs_on_our_own_models_and_hidden_states() -> None:
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=2, num_heads=4, num_kv_heads=2).eval()
    ids = torch.randint(11, (2, 12))
    for vectors in ("values", "hidden_states"):
        report = attention_selection_report(model, ids, lengths=(12,), top_n=(2,), vectors=vectors)  # type: ignore[arg-type]
        assert report.paths and bool(report.distance.isfinite().all())
    one = attention_selection_report(model, ids, lengths=(12,), top_n=(2,), layers=[1])
    torch.testing.assert_close(
        one.sensitivity, attention_selection_report(model, ids, lengths=(12,), top_n=(2,)).sensitivity[1:]
    )


@pytest.mark.paper("normalization_limits")
def test_the_report_reads_the_first_tokens_and_the_values_that_heads_share() -> None:
    torch.manual_seed(0)
    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=1, num_heads=4, num_kv_heads=2).double().eval()
    ids = torch.randint(11, (1, 14))
    report = attention_selection_report(model, ids, lengths=(9,), top_n=(3,), vectors="values")
    with regard.capture(model) as trace, torch.no_grad():
        model(ids[:, :9])
    weights, values = trace[0].weights, trace[0].values
    assert weights is not None and values is not None
    for head in range(4):
        alpha = weights[0, head, -1]
        away, _ = looped(values[0, head // 2], alpha, 3, True)
        assert float(report.distance[0, head, 0, 0]) == pytest.approx(sum(away) / len(away), rel=1e-9)
        norm = torch.linalg.matrix_norm(jacobian(alpha, 1.0), 2)
        assert float(report.sensitivity[0, head, 0]) == pytest.approx(float(norm), rel=1e-9)


def test_a_string_is_cut_into_windows_by_the_tokenizer() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 11 for letter in text]}

    model = SequenceModel(11, vocab_size=11, embed_dim=16, depth=1, num_heads=2).eval()
    text = "a text of more than twenty letters"
    report = attention_selection_report(model, text, tokenizer=tokenizer, lengths=(10,), top_n=(2,))
    ids = torch.tensor(tokenizer(text, False)["input_ids"][:30]).view(3, 10)
    same = attention_selection_report(model, ids, lengths=(10,), top_n=(2,))
    assert torch.equal(report.distance, same.distance)
    with pytest.raises(OptionError, match="fewer than"):
        attention_selection_report(model, "short", tokenizer=tokenizer, lengths=(10,), top_n=(2,))
    with pytest.raises(OptionError, match="tokenizer"):
        attention_selection_report(model, text, lengths=(10,), top_n=(2,))


@pytest.mark.paper("normalization_limits")
def test_the_report_reads_mechanisms_and_refuses_what_no_normaliser_gave() -> None:
    ids = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(0))

    def model(mechanism: str, **options: int) -> SequenceModel:
        torch.manual_seed(0)
        size = {"vocab_size": 11, "embed_dim": 16, "depth": 1, "num_heads": 2}
        return SequenceModel(11, mechanism=mechanism, options=options, **size).eval()  # type: ignore[arg-type]

    def report(of: nn.Module) -> float:
        found = attention_selection_report(of, ids, lengths=(16,), top_n=(4,), vectors="values")
        return float(found.mass[0, 1, 0, 0])

    assert report(model("sliding_window", window=4, sinks=0)) == pytest.approx(1), "four keys hold all weight"
    full = model("full")
    assert report(full) < 0.9
    with regard.retrofit(full, "sliding_window", window=4, sinks=0):
        assert report(full) == pytest.approx(1)
    for unnormalised in ("lightning_attention", "lla"):  # sums of other than one; negative weights
        with pytest.raises(OptionError, match="no normaliser"):
            report(model(unnormalised))
    with pytest.raises(OptionError, match="training"):
        report(full.train())
    assert full.training
    with pytest.raises(OptionError, match="no normaliser"):
        jacobian_norm(torch.tensor([0.5, 0.2]))
    with pytest.raises(OptionError, match="no normaliser"):
        jacobian_norm(torch.tensor([1.5, -0.5]))
    assert float(jacobian_norm(torch.full((4,), 0.25, dtype=torch.bfloat16))) == pytest.approx(0.25)


def test_nano_is_at_hand() -> None:
    pytest.importorskip("transformers")
    report = attention_selection_report(text="def main():\n    return 0\n" * 8, lengths=(16,), top_n=(2, 4))
    assert report.ratio.shape == (6, 6, 1, 2) and bool(report.ratio.isfinite().all())


def test_wrong_input_is_told() -> None:
    x, alpha = normal(9, 3), normalise(normal(9))
    with pytest.raises(UnknownNameError, match="softmax"):
        normalise(alpha, "sofmax")
    with pytest.raises(OptionError, match="positive"):
        normalise(normal(9), torch.tanh)
    with pytest.raises(OptionError, match="temperature"):
        normalise(alpha, temperature=0)
    with pytest.raises(OptionError, match="top_n"):
        selection_distance(x, alpha, 9)
    with pytest.raises(OptionError, match="'mean' or 'sum'"):
        selection_distance(x, alpha, 2, reduce="max")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\(\.\.\., L, d\)"):
        selection_distance(x[:5], alpha, 2)
    with pytest.raises(OptionError, match="spectral"):
        jacobian_norm(alpha, ord="nuclear")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="eps"):
        finite_difference_sensitivity(alpha, 0)
    with pytest.raises(OptionError, match="tol"):
        critical_top_n(x, alpha, 0)
    with pytest.raises(OptionError, match="bound"):
        weight_bounds(-1, 5)
    with pytest.raises(FileFormatError, match="no/such"):
        attention_selection_report("./no/such", "text")
    with pytest.raises(OptionError, match="positive and finite"):
        normalise(torch.tensor([-1.0, -2.0]), F.relu)
    with pytest.raises(OptionError, match="positive and finite"):
        normalise(torch.tensor([0.0, 999.0]), torch.exp)
    with pytest.raises(OptionError, match="negative for one"):
        normalise(torch.tensor([3.0, -1.0]), lambda x: x)
    x[3, 1] = math.nan
    for measure in (selection_distance, separability):
        with pytest.raises(OptionError, match="NaN"):
            measure(x, alpha, 2)
    with pytest.raises(ShapeError, match="windows"):
        attention_selection_report(nn.Identity(), torch.zeros(3, dtype=torch.int64))
