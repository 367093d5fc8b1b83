"""Heads of vision transformers: pruning against models pruned by hand, profiles against loops, maps that are known."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError, UnknownNameError
from regard.inspect.metrics import js_divergence
from regard.inspect.vit_head_analytics import (
    METRICS,
    head_importance,
    head_importances,
    head_report,
    khop_profile,
    mean_attention_distance,
)
from regard.models.vit import VisionTransformer
from regard.nn import MultiHeadAttention, TransformerBlock

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def small_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(6, 2, 1, 5, embed_dim=12, depth=2, num_heads=3, position_std=0.5).double()


def attention_of(model: VisionTransformer, layer: int) -> MultiHeadAttention:
    return cast(MultiHeadAttention, cast(TransformerBlock, model.blocks[layer]).attention)


def drop_columns(model: VisionTransformer, layer: int, heads: list[int]) -> None:
    """Heads without their part of the output projection."""
    with torch.no_grad():
        for head in heads:
            attention_of(model, layer).out.weight[:, 4 * head : 4 * head + 4] = 0


def images_and_labels(model: VisionTransformer, count: int = 12) -> tuple[Tensor, Tensor]:
    """Images of which the model calls all but the last two right."""
    torch.manual_seed(1)
    images = torch.randn(count, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        labels = model.eval()(images).argmax(-1)
    labels[-2:] = (labels[-2:] + 1) % 5
    return images, labels


def maps(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


@pytest.mark.paper("vit_head_analytics")
def test_hops_and_the_class_column_share_out_each_row() -> None:
    profile = khop_profile(maps(2, 3, 4, 13, 13), (3, 4))
    whole = profile.strength.sum(-1) + profile.cls_column
    torch.testing.assert_close(whole, torch.ones_like(whole), **EXACT)
    assert profile.strength.shape == profile.per_neighbour.shape == (2, 4, 4)


@pytest.mark.paper("vit_head_analytics")
def test_profile_is_the_loop_over_patches() -> None:
    attn, grid = maps(1, 2, 2, 14, 14), (3, 4)
    profile = khop_profile(attn, grid, cls=2)
    places = [(r, c) for r in range(3) for c in range(4)]
    for head in range(2):
        for hop in range(4):
            sums, means = [], []
            for image in range(2):
                for p, (r, c) in enumerate(places):
                    ring = [q for q, (y, x) in enumerate(places) if max(abs(r - y), abs(c - x)) == hop]
                    mass = sum(float(attn[0, image, head, 2 + p, 2 + q]) for q in ring)
                    sums.append(mass)
                    means += [mass / len(ring)] if ring else []
            assert float(profile.strength[0, head, hop]) == pytest.approx(sum(sums) / len(sums), abs=1e-12)
            assert float(profile.per_neighbour[0, head, hop]) == pytest.approx(sum(means) / len(means), abs=1e-12)
    torch.testing.assert_close(profile.cls_row, attn[:, :, :, :2, 2:].sum(-1).mean((1, 3)), **EXACT)
    torch.testing.assert_close(profile.layer_trend[0], profile.per_neighbour[0].mean(0), **EXACT)


@pytest.mark.paper("vit_head_analytics")
def test_identity_stays_and_uniform_attention_is_flat_per_neighbour() -> None:
    identity = torch.eye(20, dtype=torch.float64).expand(1, 1, 1, -1, -1)
    profile = khop_profile(identity, (4, 5), cls=False)
    assert profile.strength.tolist() == [[[1, 0, 0, 0, 0]]]
    assert profile.cls_column.tolist() == [[0]] and bool(profile.cls_row.isnan().all())
    assert mean_attention_distance(identity, (4, 5), cls=False).tolist() == [[0]]
    flat = khop_profile(torch.full((1, 1, 1, 26, 26), 1 / 26, dtype=torch.float64), (5, 5))
    torch.testing.assert_close(flat.per_neighbour, torch.full_like(flat.per_neighbour, 1 / 26), **EXACT)
    # The ring of an inner patch has 8 patches at one step and the grid's average is smaller, but the sum still grows.
    assert float(flat.strength[0, 0, 1]) > float(flat.strength[0, 0, 0])


@pytest.mark.paper("vit_head_analytics")
def test_a_head_that_looks_one_to_the_right_is_at_one_hop() -> None:
    rows, columns = 4, 6
    attn = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            attn[r * columns + c, r * columns + (c + 1) % columns] = 1
    profile = khop_profile(attn[None, None, None], (rows, columns), cls=False).strength[0, 0]
    # All but the last column look one step away; that one looks back across the grid.
    assert float(profile[1]) == pytest.approx((columns - 1) / columns, abs=1e-12)
    assert float(profile[columns - 1]) == pytest.approx(1 / columns, abs=1e-12)
    inner = attn.clone()
    inner[columns - 1 :: columns] = 0
    inside = khop_profile(inner[None, None, None], (rows, columns), cls=False).strength[0, 0]
    assert float(inside[1]) == pytest.approx(float(inside.sum()), abs=1e-12)
    distance = mean_attention_distance(attn[None, None, None], (rows, columns), cls=False)
    assert float(distance) == pytest.approx(((columns - 1) * 1 + (columns - 1)) / columns, abs=1e-12)


def test_mean_distance_of_uniform_attention_is_that_of_random_pairs() -> None:
    flat = torch.full((1, 1, 1, 13, 13), 1 / 13, dtype=torch.float64)
    places = [(r, c) for r in range(3) for c in range(4)]
    expected = sum(math.dist(p, q) for p in places for q in places) / len(places) ** 2
    assert float(mean_attention_distance(flat, (3, 4))) == pytest.approx(expected, abs=1e-12)


def test_distance_counts_only_weight_between_patches() -> None:
    """Of five tokens the first is the class token; the grid is 2 x 2."""
    attn = torch.zeros(1, 1, 2, 5, 5, dtype=torch.float64)
    attn[..., 0] = 1
    # One patch of head 1 gives half of its weight to its neighbour: its distance is 1, and the others have none.
    attn[0, 0, 1, 2] = torch.tensor([0.5, 0, 0, 0, 0.5])
    found = mean_attention_distance(attn, (2, 2))
    assert bool(found[0, 0].isnan()) and float(found[0, 1]) == 1


@pytest.mark.paper("vit_head_analytics")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_summed_in_single(dtype: torch.dtype) -> None:
    attn = maps(2, 64, 2, 65, 65).to(dtype)
    profile, exact = khop_profile(attn, (8, 8)), khop_profile(attn.double(), (8, 8))
    for name in ("strength", "per_neighbour", "cls_column", "cls_row"):
        half, whole = getattr(profile, name), getattr(exact, name)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), whole, rtol=1e-5, atol=1e-7)
    distance = mean_attention_distance(attn, (8, 8)).double()
    torch.testing.assert_close(distance, mean_attention_distance(attn.double(), (8, 8)), rtol=1e-5, atol=0)


@pytest.mark.paper("vit_head_analytics")
def test_importance_is_that_of_a_model_pruned_by_hand() -> None:
    model = small_vit()
    images, labels = images_and_labels(model)
    found = head_importances(model, images, labels)
    pruned = small_vit()
    drop_columns(pruned, 1, [2])
    with torch.no_grad():
        own, other = model(images)[:-2], pruned.eval()(images)[:-2]
    p, q, truth = own.softmax(-1), other.softmax(-1), labels[:-2].tolist()
    drop, divergence, rank = 0.0, 0.0, 0
    for i, y in enumerate(truth):
        drop += float(p[i, y] - q[i, y])
        m = (p[i] + q[i]) / 2
        divergence += float(((p[i] * (p[i] / m).log()).sum() + (q[i] * (q[i] / m).log()).sum()) / 2)
        rank += other[i].argsort(descending=True).tolist().index(y) - own[i].argsort(descending=True).tolist().index(y)
    assert float(found["prob_drop"][1, 2]) == pytest.approx(drop / 10, abs=1e-10)
    assert float(found["js_divergence"][1, 2]) == pytest.approx(divergence / 10, abs=1e-10)
    assert float(found["rank_drop"][1, 2]) == pytest.approx(rank / 10, abs=1e-10)
    assert found["prob_drop"].shape == (2, 3)
    torch.testing.assert_close(head_importance(model, images, labels, "rank_drop"), found["rank_drop"])


@pytest.mark.paper("vit_head_analytics")
def test_the_model_is_judged_in_evaluation_mode_and_left_in_its_modes() -> None:
    torch.manual_seed(0)
    options = {"embed_dim": 12, "depth": 3, "num_heads": 3, "position_std": 0.5}
    model = VisionTransformer(6, 2, 1, 5, **options, drop_path=0.9).double()
    images, labels = images_and_labels(model)
    expected = head_importances(model, images, labels)
    report = head_report(model, images, labels, clusters=1, size=16, steps=1)
    model.train()
    model.norm.eval()
    model.blocks[0].eval()  # it drops no paths; the others do
    flags = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = head_importances(model, images, labels)
    again = head_report(model, images, labels, clusters=1, size=16, steps=1)
    for metric in METRICS:
        assert torch.equal(found[metric], expected[metric])
    assert torch.equal(again.profile.strength, report.profile.strength)
    with pytest.raises(OptionError, match="none of these"):
        head_importance(model, images[-2:], labels[-2:])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.paper("vit_head_analytics")
def test_left_in_alone_a_head_is_what_it_gives_back() -> None:
    model = small_vit()
    images, labels = images_and_labels(model)
    found = head_importance(model, images, labels, leave_one_in=True)
    alone, none = small_vit(), small_vit()
    drop_columns(alone, 0, [0, 2])
    drop_columns(none, 0, [0, 1, 2])
    with torch.no_grad():
        kept, lost = (m.eval()(images)[:-2].softmax(-1).gather(1, labels[:-2, None]).mean() for m in (alone, none))
    assert float(found[0, 1]) == pytest.approx(float(kept - lost), abs=1e-10)


@pytest.mark.paper("vit_head_analytics")
@pytest.mark.parametrize("leave_one_in", [False, True])
def test_a_head_without_output_projection_has_no_importance(leave_one_in: bool) -> None:
    model = small_vit()
    drop_columns(model, 0, [1])
    images, labels = images_and_labels(model)
    found = head_importances(model, images, labels, leave_one_in=leave_one_in)
    for metric in METRICS:
        assert float(found[metric][0, 1]) == 0.0
    assert float(found["js_divergence"][0, 0].abs()) > 1e-8


@pytest.mark.paper("vit_head_analytics")
def test_divergence_lies_between_zero_and_log_two_either_way() -> None:
    torch.manual_seed(0)
    p, q = ((6 * torch.randn(200, 7, dtype=torch.float64)).softmax(-1) for _ in range(2))
    found = js_divergence(p, q)
    torch.testing.assert_close(found, js_divergence(q, p), **EXACT)
    assert bool((found >= 0).all()) and bool((found <= math.log(2)).all())
    apart = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(js_divergence(apart, apart.flip(0)), torch.full_like(apart[0], math.log(2)), **EXACT)
    assert js_divergence(p, p).eq(0).all()
    # Between two models: which of them is pruned from which makes no difference.
    first, second = small_vit(0).eval(), small_vit(3).eval()
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        a, b = first(x).softmax(-1), second(x).softmax(-1)
    torch.testing.assert_close(js_divergence(a, b), js_divergence(b, a), **EXACT)


@pytest.mark.paper("vit_head_analytics")
@pytest.mark.parametrize(("name", "before"), [("ViT", 1), ("DeiT", 2)])
def test_classifiers_of_transformers(name: str, before: int) -> None:
    """With a class token, and with a distillation token beside it: against the model's own maps, and one pruned."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=8, patch_size=2, num_labels=4)
    model = getattr(transformers, f"{name}ForImageClassification")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    pixels = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    eager, pruned = copy.deepcopy(model), copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    getattr(pruned, name.lower()).layers[1].attention.o_proj.weight.data[:, 8:] = 0
    with torch.no_grad():
        own, other = model(pixel_values=pixels).logits, pruned(pixel_values=pixels).logits
        attn = torch.stack(eager(pixel_values=pixels, output_attentions=True).attentions)
    labels = own.argmax(-1)
    drop = (own.softmax(-1) - other.softmax(-1)).gather(1, labels[:, None]).mean()
    batch = {"pixel_values": pixels}
    report = head_report(model, batch, labels.int(), grid=(4, 4), clusters=2, size=16, steps=2)
    assert len(report.rows) == 4 and len(report.rows[0].strength) == 4
    for row in report.rows:
        own_map = attn[row.layer, :, row.head]
        assert row.cls_share == pytest.approx(float(own_map[:, before:, :before].sum(-1).mean()))
        assert row.strength[0] == pytest.approx(float(own_map[:, before:, before:].diagonal(0, 1, 2).mean()))
        if (row.layer, row.head) == (1, 1):
            assert row.importance["prob_drop"] == pytest.approx(float(drop), abs=1e-10) and float(drop) != 0
    with pytest.raises(OptionError, match="grid"):
        head_report(model, batch, labels)
    with pytest.raises(OptionError, match="fewer than a grid"):
        head_report(model, batch, labels, grid=(5, 5))


@pytest.mark.paper("vit_head_analytics")
def test_report_joins_what_its_parts_say() -> None:
    model = small_vit()
    images, labels = images_and_labels(model)
    state = torch.get_rng_state()
    report = head_report(model, images, labels, metric="js_divergence", clusters=2, size=16, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    expected = head_importances(model, images, labels)
    values = [row.importance["js_divergence"] for row in report.rows]
    assert values == sorted(values, reverse=True) and len(report.rows) == 6
    with torch.no_grad():
        attn = torch.stack([model.attention_weights(model.encode(model.embed(images), last=i), i) for i in range(2)])
        distance = mean_attention_distance(attn, (3, 3))
    for row in report.rows:
        assert row.importance == {metric: float(expected[metric][row.layer, row.head]) for metric in METRICS}
        assert row.distance == pytest.approx(float(distance[row.layer, row.head]), abs=1e-12)
        assert sum(row.strength) + row.cls_share == pytest.approx(1, abs=1e-12)
        assert row.cluster == int(report.patterns.head_clusters()[row.layer, row.head])
    assert sum(report.clusters_of(4).values()) == 4 and len(str(report).splitlines()) == 7
    numbered = [dataclasses.replace(row, cluster=at) for at, row in enumerate(report.rows)]
    assert dataclasses.replace(report, rows=numbered).clusters_of(2) == {0: 1, 1: 1}
    alone = head_report(model, images, labels, leave_one_in=True, clusters=2, size=16, steps=1)
    left = head_importance(model, images, labels, leave_one_in=True)
    assert [row.importance["prob_drop"] for row in alone.rows] == sorted(left.flatten().tolist(), reverse=True)


def test_bad_input_is_explained() -> None:
    model = small_vit()
    images, labels = images_and_labels(model)
    with pytest.raises(UnknownNameError, match="prob_drop"):
        head_importance(model, images, labels, "accuracy")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="one class an image"):
        head_importance(model, images, labels[:3])
    with pytest.raises(OptionError, match="none of these"):
        head_importance(model, images[-2:], labels[-2:])
    with pytest.raises(ShapeError, match="an image at least"):
        head_importance(model, images[:0], labels[:0])
    with pytest.raises(ShapeError, match="no logits"):
        head_importance(nn.Sequential(attention_of(model, 0)), torch.randn(2, 4, 12).double(), labels[:2])
    with pytest.raises(ShapeError, match="3 x 4"):
        khop_profile(maps(1, 1, 1, 12, 12), (3, 4))
    for grid in ((12,), 12, (0, 12)):
        with pytest.raises(OptionError, match="rows, columns"):
            khop_profile(maps(1, 1, 1, 12, 12), grid)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="Maps are"):
        mean_attention_distance(maps(1, 0, 1, 12, 12), (3, 4), cls=False)
    with pytest.raises(OptionError, match="not finite"):
        khop_profile(torch.full((1, 2, 4, 4, 4), torch.nan), (2, 2), False)
