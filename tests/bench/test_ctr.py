"""The made-up click log, and the area under the curve."""

from __future__ import annotations

import math

import pytest
import torch

from regard.bench.ctr import SyntheticClicks, area_under_curve, synthetic_ctr
from regard.errors import OptionError
from regard.models.dare import TwoStageSequenceModel


def small(**settings: object) -> SyntheticClicks:
    return synthetic_ctr(60, 6, 10, train=400, test=300, **settings)


def test_the_area_is_how_often_a_positive_scores_above_a_negative() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.3, 0.3])
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert area_under_curve(scores, labels) == pytest.approx(sum(float(p) for p in pairs) / 9)
    with pytest.raises(OptionError, match="both"):
        area_under_curve(scores, torch.ones(6))


@pytest.mark.paper("dare")
@pytest.mark.parametrize("focus", [0.0, 0.7])
def test_chances_follow_the_decayed_count_of_the_targets_category(focus: float) -> None:
    task = small(focus=focus, half_life=3.0, slope=2.0, threshold=0.7)
    clicks, labels, chance = task.data["train"]
    for i in range(20):
        count = 0.0
        for j in range(10):
            if clicks.mask[i, j] and clicks.history["category"][i, j] == clicks.target["category"][i]:
                count += 0.5 ** ((int(clicks.history["time"][i, j]) - 1) / 3)
        assert float(chance[i]) == pytest.approx(1 / (1 + math.exp(-2 * (count - 0.7))), rel=1e-5)
    assert set(labels.tolist()) == {0, 1}
    assert abs(float(labels.double().mean() - chance.double().mean())) < 0.1


def test_fields_padding_and_items_of_categories() -> None:
    task = small()
    clicks, _, _ = task.data["train"]
    assert (clicks.history["item"][~clicks.mask] == 0).all() and (clicks.history["time"][~clicks.mask] == 0).all()
    assert (clicks.history["item"][clicks.mask] >= 1).all() and int(clicks.history["item"].max()) <= 60
    assert ((clicks.history["item"] - 1) % 6 + 1)[clicks.mask].eq(clicks.history["category"][clicks.mask]).all()
    assert (clicks.history["time"][:, -1] == 1).all() and (clicks.target["time"] == 0).all()
    assert set(clicks.mask.sum(-1).tolist()) == set(range(5, 11))
    inputs, labels = task.batch(7, torch.Generator().manual_seed(0), "test")
    assert inputs.mask.shape == (7, 10) and labels.shape == (7,)


def test_information_is_that_of_the_joint_table() -> None:
    task = small()
    information = task.information
    assert information.shape == (2, 10) and (information[0] > information[1]).all() and (information >= 0).all()
    clicks, labels, _ = task.draw(60_000, torch.Generator().manual_seed(3))
    for lag in (1, 6):
        real = clicks.mask[:, -lag]
        same = (clicks.history["category"][:, -lag] == clicks.target["category"])[real]
        expected = 0.0
        for x in (False, True):
            for y in (0, 1):
                joint = float(((same == x) & (labels[real] == y)).double().mean())
                expected += joint * math.log2(
                    joint / float((same == x).double().mean()) / float((labels[real] == y).double().mean())
                )
        assert float(information[0, lag - 1]) == pytest.approx(expected, abs=4 * math.sqrt(expected / 60_000))


def test_learned_scores_are_sorted_by_lag_and_kind() -> None:
    task, model = small(), TwoStageSequenceModel({"item": 61, "category": 7, "time": 11}, 4, 4)
    with torch.no_grad():
        for table in model.embedding.attention.values():
            table.weight.zero_()  # type: ignore[union-attr, operator]
        model.embedding.attention["category"].weight[:] = 2 * torch.eye(7)[:, :4]  # type: ignore[index, union-attr]
        model.embedding.attention["time"].weight[:, 0] = torch.arange(11.0)  # type: ignore[index, union-attr]
        model.embedding.attention["time"].weight[0, 0] = 1  # type: ignore[index, union-attr]
    learned = task.learned(model)
    # Categories 1 to 3 score 4 / sqrt(8) with themselves, a lag scores itself over two.
    torch.testing.assert_close(learned[1], torch.arange(1, 11).double() / 2)
    assert (learned[0] > learned[1] + 0.3).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="interests"):
        synthetic_ctr(10, 20)
