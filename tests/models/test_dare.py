"""Two-stage click models: variants against one another, gradients of the two roles, and what is counted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.models.dare import (
    Clicks,
    Prediction,
    TwoStageSequenceModel,
    gradient_conflict,
    gradient_cosines,
    gradient_domination,
    role_gradients,
    two_stage_loss,
)

FIELDS = {"item": 30, "category": 6, "time": 13}
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def clicks(batch: int = 8, length: int = 12) -> tuple[Clicks, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def ids(*shape: int) -> dict[str, Tensor]:
        return {field: torch.randint(count, shape, generator=generator) for field, count in FIELDS.items()}

    mask = torch.rand(batch, length, generator=generator) < 0.8
    mask[:, -1] = True
    return Clicks(ids(batch), ids(batch, length), mask), torch.arange(batch) % 2


def model(variant: str = "decoupled", **options: object) -> TwoStageSequenceModel:
    torch.manual_seed(0)
    options = {"n_attention": 4, "n_representation": 4, "top_k": 5, **options}
    built = TwoStageSequenceModel(FIELDS, variant=variant, **options).double()  # type: ignore[arg-type]
    for name, parameter in built.named_parameters():
        if "embedding" in name or "behaviours" in name:
            nn.init.normal_(parameter)
    return built


def decoupled_as(shared: TwoStageSequenceModel) -> TwoStageSequenceModel:
    """A model of two tables with the numbers of one with one table."""
    built = model("decoupled")
    built.load_state_dict(shared.state_dict())
    return built


@pytest.mark.paper("dare")
def test_equal_tables_make_the_shared_model_and_their_gradients_add_up() -> None:
    shared = model("shared")
    decoupled = decoupled_as(shared)
    batch, labels = clicks()
    for a, b in zip(shared(batch), decoupled(batch), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    two_stage_loss(shared(batch), labels).backward()
    two_stage_loss(decoupled(batch), labels).backward()
    for field in FIELDS:
        own = shared.embedding.attention[field].weight.grad  # type: ignore[index]
        parts = [
            tables[field].weight.grad for tables in (decoupled.embedding.attention, decoupled.embedding.representation)
        ]  # type: ignore[index]
        torch.testing.assert_close(own, parts[0] + parts[1], **TIGHT)
    found = role_gradients(shared, batch, labels)
    for field, (attention, representation) in found.items():
        torch.testing.assert_close(attention, decoupled.embedding.attention[field].weight.grad, **TIGHT)  # type: ignore[index]
        torch.testing.assert_close(representation, decoupled.embedding.representation[field].weight.grad, **TIGHT)  # type: ignore[index]


@pytest.mark.paper("dare")
def test_the_shared_model_is_the_formula_of_the_baseline() -> None:
    shared = model("shared").eval()
    batch, _ = clicks()
    tables = {field: shared.embedding.attention[field].weight.detach() for field in FIELDS}  # type: ignore[index]
    inputs = ([], [])  # type: tuple[list[Tensor], list[Tensor]]
    for b in range(8):
        target = torch.cat([tables[f][batch.target[f][b]] for f in FIELDS])
        rows = [torch.cat([tables[f][batch.history[f][b, j]] for f in FIELDS]) for j in range(12) if batch.mask[b, j]]
        scores = [float(target[:8] @ r[:8]) / math.sqrt(8) + float(target[8:] @ r[8:]) / math.sqrt(4) for r in rows]

        def read(members: list[int], scores: list[float] = scores, rows: list[Tensor] = rows) -> Tensor:
            weights = torch.tensor([scores[j] for j in members], dtype=torch.float64).softmax(0)
            return sum((w * rows[j] for w, j in zip(weights, members, strict=True)), torch.zeros(12).double())

        best = sorted(range(len(rows)), key=lambda j: -scores[j])[:5]
        pruned, whole, mean = read(best), read(list(range(len(rows)))), torch.stack(rows).mean(0)
        inputs[0].append(torch.cat((target, pruned, mean, target * pruned, target * mean)))
        inputs[1].append(torch.cat((target, whole, target * whole)))
    expected = Prediction(shared.main(torch.stack(inputs[0])), shared.auxiliary(torch.stack(inputs[1])))
    for a, b in zip(shared(batch), expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.paper("dare")
def test_attention_embeddings_learn_through_the_softmax_alone() -> None:
    decoupled = model("decoupled")
    batch, labels = clicks()
    tables = [table.weight for table in decoupled.embedding.attention.values()]
    loss = two_stage_loss(decoupled(batch), labels)
    through = torch.autograd.grad(loss, tables)  # type: ignore[arg-type]
    assert all(bool(gradient.abs().max() > 0) for gradient in through)
    frozen = two_stage_loss(decoupled(batch, scores=decoupled.search(batch).detach()), labels)
    torch.testing.assert_close(frozen, loss, **TIGHT)
    found = torch.autograd.grad(frozen, tables, allow_unused=True)  # type: ignore[arg-type]
    assert all(gradient is None or bool((gradient == 0).all()) for gradient in found)


@pytest.mark.paper("dare")
def test_a_search_that_keeps_all_feeds_both_networks_alike() -> None:
    batch, _ = clicks()
    wide = model("decoupled", top_k=12).eval()
    captured: dict[str, Tensor] = {}
    wide.main.register_forward_pre_hook(lambda _, x: captured.update(main=x[0]))
    wide.auxiliary.register_forward_pre_hook(lambda _, x: captured.update(auxiliary=x[0]))
    wide(batch)
    torch.testing.assert_close(captured["main"][:, 12:24], captured["auxiliary"][:, 12:24], **TIGHT)
    wide.top_k = 3
    wide(batch)
    assert not torch.allclose(captured["main"][:, 12:24], captured["auxiliary"][:, 12:24])


@pytest.mark.paper("dare")
def test_the_order_of_the_history_does_not_matter() -> None:
    batch, _ = clicks()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved = Clicks(batch.target, {f: x[:, order] for f, x in batch.history.items()}, batch.mask[:, order])
    for variant in ("shared", "projected", "decoupled", "four_tables"):
        built = model(variant).eval()
        for a, b in zip(built(batch), built(moved), strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.paper("dare")
@pytest.mark.parametrize("d_a,d_r", [(16, 16), (8, 16)])
def test_the_number_of_parameters(d_a: int, d_r: int) -> None:
    seen, ids = 3 * d_r, sum(FIELDS.values())
    heads = 2 * 5 * seen + (5 * seen + 1) * 200 + 1 + 201 * 80 + 1 + 81 * 2
    heads += 2 * 3 * seen + (3 * seen + 1) * 200 + 1 + 201 * 2

    def count(variant: str, d_a: int = d_a) -> int:
        built = TwoStageSequenceModel(FIELDS, d_a, d_r, variant=variant)  # type: ignore[arg-type]
        return sum(p.numel() for p in built.parameters())

    assert count("decoupled") == ids * (d_a + d_r) + heads
    assert count("four_tables") == 2 * ids * (d_a + d_r) + heads
    assert count("shared", d_r) == ids * d_r + heads
    assert count("projected", d_r) == ids * d_r + heads + 4 * (seen + 1) * seen


@pytest.mark.paper("dare")
def test_conflict_and_domination_are_what_the_gradients_say() -> None:
    shared = model("shared")
    batch, labels = clicks()
    before = copy.deepcopy(shared.state_dict())
    attention, representation = role_gradients(shared, batch, labels)["category"]
    cosines, opposed, lengths = [], 0, ([], [])  # type: ignore[var-annotated]
    for a, r in zip(attention, representation, strict=True):
        lengths[0].append(float(a.norm()))
        lengths[1].append(float(r.norm()))
        cosines.append(float(a @ r / a.norm() / r.norm()))
        opposed += cosines[-1] < 0
    assert gradient_cosines(shared, batch, labels).tolist() == pytest.approx(cosines)
    assert gradient_conflict(shared, batch, labels) == pytest.approx(opposed / 6)
    assert gradient_domination(shared, batch, labels) == pytest.approx(sum(lengths[1]) / sum(lengths[0]))
    for name, value in shared.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert (value == before[name]).all()


def test_rows_without_gradient_are_not_counted() -> None:
    shared = model("shared")
    batch, labels = clicks()
    lonely = Clicks(
        {**batch.target, "item": batch.target["item"] * 0},
        {**batch.history, "item": batch.history["item"] * 0},
        batch.mask,
    )
    assert int((~gradient_cosines(shared, lonely, labels, "item").isnan()).sum()) == 1
    assert gradient_conflict(shared, lonely, labels, "item") in (0.0, 1.0)


def test_time_is_put_last_and_has_its_own_scale() -> None:
    built = TwoStageSequenceModel({"time": 13, "item": 30}, {"time": 2, "item": 6})
    assert list(built.embedding.fields) == ["item", "time"] and built.attention.time_dim == 2
    assert TwoStageSequenceModel(FIELDS, score="din").attention.time_dim == 0
    assert TwoStageSequenceModel({"item": 3}, time_field=None)(
        Clicks({"item": torch.tensor([1, 2])}, {"item": torch.ones(2, 4, dtype=torch.int64)}, torch.ones(2, 4) > 0)
    ).main.shape == (2, 2)


def test_a_model_learns_what_one_behaviour_says() -> None:
    torch.manual_seed(0)
    built = TwoStageSequenceModel(FIELDS, top_k=3, score="din")
    batch, _ = clicks(64)
    labels = (batch.history["category"] == batch.target["category"][:, None]).any(-1).long()
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-2)
    first = float(two_stage_loss(built(batch), labels).detach())
    for _ in range(40):
        optimizer.zero_grad()
        loss = two_stage_loss(built(batch), labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * first
    assert built.eval()(batch).clicks().shape == (64,)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(OptionError, match="variant"):
        TwoStageSequenceModel(FIELDS, variant="twin")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one width"):
        TwoStageSequenceModel(FIELDS, 8, 16, variant="shared")
    with pytest.raises(OptionError, match="time_field"):
        TwoStageSequenceModel({"item": 4})
    batch, labels = clicks()
    with pytest.raises(OptionError, match="four_tables"):
        role_gradients(model("four_tables"), batch, labels)
    with pytest.raises(OptionError, match="width"):
        gradient_conflict(model("decoupled", n_attention=2), batch, labels)
    with pytest.raises(OptionError, match="no field"):
        gradient_conflict(model("shared"), batch, labels, "shop")
    with pytest.raises(ShapeError, match="batch, length"):
        model()(batch, scores=torch.zeros(8, 3).double())
