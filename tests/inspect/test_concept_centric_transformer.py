"""Slot attention and concept-centric heads: explicit loops, the degenerate token, symmetries, sums over concepts."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.concept_centric_transformer import (
    ConceptCentricHead,
    ConceptCrossAttention,
    concept_contributions,
    explanation_loss,
    sparsity_loss,
)
from regard.layers.slot_attention import SlotAttention, SlotVariant
from regard.models.vit import VisionTransformer

EXACT = {"atol": 1e-12, "rtol": 1e-12}
DIM, SLOTS = 6, 4
VARIANTS: tuple[SlotVariant, ...] = ("sa", "isa", "qsa")


def slot_attention(variant: SlotVariant = "sa", iters: int = 1, seed: int = 0) -> SlotAttention:
    torch.manual_seed(seed)
    module = SlotAttention(SLOTS, DIM, iters, variant).double()
    with torch.no_grad():  # biases and norms away from their trivial start
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(count: int = 5, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    spread = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / (spread + layer.eps).sqrt() * layer.weight + layer.bias


def gru(update: Tensor, state: Tensor, cell: nn.GRUCell) -> Tensor:
    """Cho et al.'s unit, gate by gate."""
    of_update = (cell.weight_ih @ update + cell.bias_ih).chunk(3)
    of_state = (cell.weight_hh @ state + cell.bias_hh).chunk(3)
    reset, keep = torch.sigmoid(of_update[0] + of_state[0]), torch.sigmoid(of_update[1] + of_state[1])
    return (1 - keep) * torch.tanh(of_update[2] + reset * of_state[2]) + keep * state


def loop(module: SlotAttention, x: Tensor, slots: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """One image: the formula, token by token and slot by slot."""
    assignment = torch.zeros(len(x), len(slots), dtype=x.dtype)
    for _ in range(iters):
        queries = [module.query.weight @ norm(slot, module.slot_norm) for slot in slots]
        keys = [module.key.weight @ norm(token, module.token_norm) for token in x]
        values = [module.value.weight @ norm(token, module.token_norm) for token in x]
        for n, key in enumerate(keys):
            scores = [(key @ query / math.sqrt(DIM)).exp() for query in queries]
            for k, score in enumerate(scores):
                assignment[n, k] = score / sum(scores)
        new = []
        for k, slot in enumerate(slots):
            whole = sum(assignment[n, k] + 1e-8 for n in range(len(x)))
            update = sum(((assignment[n, k] + 1e-8) / whole * value for n, value in enumerate(values)), 0 * slot)
            new.append(gru(update, slot, module.gru))
        slots = torch.stack(new)
    return slots, assignment


@pytest.mark.paper("concept_centric_transformer")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("iters", [1, 3])
def test_slots_are_the_formula(variant: SlotVariant, iters: int) -> None:
    module, x = slot_attention(variant, iters), tokens()
    first = torch.randn(2, SLOTS, DIM, dtype=torch.float64)
    with torch.no_grad():
        slots, assignment = module(x, slots=first)
        for image in range(2):
            wanted = loop(module, x[image], first[image], iters + (variant == "isa"))
            torch.testing.assert_close(slots[image], wanted[0], **EXACT)
            torch.testing.assert_close(assignment[image], wanted[1], **EXACT)


@pytest.mark.paper("concept_centric_transformer")
@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_over_slots_and_weights_over_tokens(variant: SlotVariant) -> None:
    module, x = slot_attention(variant, 2), tokens(7, 3)
    slots, assignment = module(x)
    assert slots.shape == (3, SLOTS, DIM) and assignment.shape == (3, 7, SLOTS)
    torch.testing.assert_close(assignment.sum(-1), torch.ones(3, 7, dtype=torch.float64), **EXACT)
    weights = module.token_weights(assignment)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, SLOTS, dtype=torch.float64), **EXACT)
    # Not a softmax over tokens: the sum over tokens of the assignment is free.
    assert (assignment.sum(1) - 1).abs().max() > 0.1


@pytest.mark.paper("concept_centric_transformer")
def test_one_token_gives_every_slot_its_value() -> None:
    """Normalised over one token, each weight is 1: the update is v, whatever the query."""
    module, x = slot_attention(), tokens(1)
    first = 3 * torch.randn(2, SLOTS, DIM, dtype=torch.float64)
    slots, assignment = module(x, slots=first)
    assert assignment.std(-1).min() > 1e-3, "queries differ"
    for image in range(2):
        value = module.value.weight @ norm(x[image, 0], module.token_norm)
        for k in range(SLOTS):
            torch.testing.assert_close(slots[image, k], gru(value, first[image, k], module.gru), **EXACT)


@pytest.mark.paper("concept_centric_transformer")
@pytest.mark.parametrize("variant", VARIANTS)
def test_slots_follow_a_permutation_of_the_first_ones(variant: SlotVariant) -> None:
    module, x, order = slot_attention(variant, 3), tokens(), torch.tensor([2, 0, 3, 1])
    first = torch.randn(2, SLOTS, DIM, dtype=torch.float64)
    slots, assignment = module(x, slots=first)
    moved = module(x, slots=first[:, order])
    torch.testing.assert_close(moved[0], slots[:, order], **EXACT)
    torch.testing.assert_close(moved[1], assignment[..., order], **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_the_straight_through_term_changes_no_value_and_carries_gradients() -> None:
    """The last step's gradient with respect to its own start is that of the first slots; the others are cut."""
    module, x = slot_attention("qsa", 3), tokens()
    slots, _ = module(x)
    slots.square().sum().backward()
    assert module.first.grad is not None and module.first.grad.abs().sum() > 0

    plain = SlotAttention(SLOTS, DIM, 1, "sa").double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "first"}, strict=False)
    state = module.first.detach().expand(2, -1, -1)
    with torch.no_grad():
        for _ in range(2):
            state, _ = plain(x, slots=state)
    last = state.clone().requires_grad_()
    wanted, _ = plain(x, slots=last)
    assert torch.equal(wanted, slots), "bit for bit"
    wanted.square().sum().backward()
    assert last.grad is not None and module.key.weight.grad is not None and plain.key.weight.grad is not None
    torch.testing.assert_close(module.first.grad, last.grad.sum(0), **EXACT)
    torch.testing.assert_close(module.key.weight.grad, plain.key.weight.grad, **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_implicit_slots_learn_from_the_last_step_alone() -> None:
    module, x = slot_attention("isa", 2), tokens()
    module(x)[0].square().sum().backward()
    assert module.first.grad is None
    plain = SlotAttention(SLOTS, DIM, 1, "sa").double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "first"}, strict=False)
    state = module.first.detach().expand(2, -1, -1)
    with torch.no_grad():
        for _ in range(2):
            state, _ = plain(x, slots=state)
    plain(x, slots=state)[0].square().sum().backward()
    for name in ("query", "key", "value"):
        torch.testing.assert_close(getattr(module, name).weight.grad, getattr(plain, name).weight.grad, **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_drawn_slots_come_from_one_gaussian() -> None:
    module = slot_attention("sa")
    drawn = module.initial(20_000, torch.Generator().manual_seed(0)).flatten(0, 1)
    torch.testing.assert_close(drawn.mean(0), module.mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), module.log_deviation[0].exp(), atol=0, rtol=0.02)
    drawn.sum().backward()
    assert module.mean.grad is not None and module.log_deviation.grad is not None


@pytest.mark.paper("concept_centric_transformer")
def test_hidden_tokens_are_not_there() -> None:
    module, x = slot_attention("qsa", 3), tokens(5)
    mask = torch.tensor([[True, True, False, True, False]]).expand(2, -1)
    torch.testing.assert_close(module(x, mask=mask)[0], module(x[:, mask[0]])[0], **EXACT)
    for class_token in (True, False):
        head = made_head(n_spatial=3, class_token=class_token)
        full = torch.cat((x[:, :1], x), 1) if class_token else x
        short = torch.cat((x[:, :1], x[:, mask[0]]), 1) if class_token else x[:, mask[0]]
        torch.testing.assert_close(head(full, mask=mask), head(short), **EXACT)
        shares, of_short = concept_contributions(head, full, mask=mask), concept_contributions(head, short)
        torch.testing.assert_close(shares.global_, of_short.global_, **EXACT)
        torch.testing.assert_close(shares.spatial, of_short.spatial, **EXACT)


def made_head(seed: int = 0, **options: object) -> ConceptCentricHead:
    torch.manual_seed(seed)
    settings: dict[str, object] = {"n_global": SLOTS, **options}
    head = ConceptCentricHead(DIM, 5, 2, **settings).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


@pytest.mark.paper("concept_centric_transformer")
def test_cross_attention_is_the_library_s_with_a_projection_to_classes() -> None:
    torch.manual_seed(0)
    cross = ConceptCrossAttention(DIM, 5, 2).double().eval()
    x, concepts = tokens(3), tokens(4, seed=2)
    weights = torch.cat((cross.query.weight, cross.key.weight, cross.value.weight))
    read, attn = F.multi_head_attention_forward(
        *(t.transpose(0, 1) for t in (x, concepts, concepts)),
        embed_dim_to_check=DIM,
        num_heads=2,
        in_proj_weight=weights,
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=torch.eye(DIM, dtype=torch.float64),
        out_proj_bias=None,  # type: ignore[arg-type]
        average_attn_weights=False,
    )
    logits, own = cross(x, concepts)
    torch.testing.assert_close(own, cast(Tensor, attn), **EXACT)
    torch.testing.assert_close(logits, read.transpose(0, 1) @ cross.out.weight.T + cross.out.bias, **EXACT)


@pytest.mark.paper("concept_centric_transformer")
@pytest.mark.parametrize("options", [{}, {"n_spatial": 3}, {"n_global": 0, "n_spatial": 3}, {"concepts": "free"}])
def test_logits_are_bias_and_one_share_a_concept(options: dict[str, object]) -> None:
    head, x = made_head(**options), tokens(6)
    reading, shares = head.read(x), concept_contributions(head, x)
    torch.testing.assert_close(shares.logits(), reading.logits, **EXACT)
    # Share by share, from the modules' weights.
    for stream, parts, spatial in (
        (head.global_stream, shares.global_, False),
        (head.spatial_stream, shares.spatial, True),
    ):
        if stream is None:
            assert parts.shape[1] == 0
            continue
        cross, concepts = stream.cross, stream.concepts_of(x[:, 1:], None)
        _, attn = cross(x[:, 1:] if spatial else x[:, :1], concepts)
        for k in range(concepts.shape[1]):
            wanted = torch.zeros(2, 5, dtype=torch.float64)
            for h, rows in enumerate((slice(0, 3), slice(3, 6))):
                vote = concepts[:, k] @ cross.value.weight[rows].T @ cross.out.weight[:, rows].T
                wanted += attn[:, h, :, k].mean(1, keepdim=True) * vote
            torch.testing.assert_close(parts[:, k], wanted, **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_drawn_slots_and_pooled_queries_add_up_as_well() -> None:
    head, x = made_head(n_spatial=3, variant="sa", class_token=False), tokens(6)
    reading = head.read(x, generator=torch.Generator().manual_seed(3))
    shares = concept_contributions(head, x, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(shares.logits(), reading.logits, **EXACT)
    assert (head.read(x, generator=torch.Generator().manual_seed(4)).logits - reading.logits).abs().max() > 1e-4
    # The query of the global stream: patches under a learned softmax.
    assert head.pool is not None and head.global_stream is not None
    weight = (x @ head.pool.weight[0] + head.pool.bias).exp()
    pooled = (weight[..., None] * x).sum(1) / weight.sum(1, keepdim=True)
    concepts = head.global_stream.concepts_of(x, None, torch.Generator().manual_seed(3))
    _, attn = head.global_stream.cross(pooled[:, None], concepts)
    assert reading.global_attn is not None
    torch.testing.assert_close(reading.global_attn, attn.mean(1), **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_deleting_a_concept_takes_its_share() -> None:
    head, x = made_head(n_spatial=3), tokens(6)
    shares = concept_contributions(head, x)
    deleted = torch.zeros(2, SLOTS + 3, dtype=torch.bool)
    deleted[0, 1], deleted[1, [0, 5]] = True, True
    left = shares.without(deleted)
    of_first = shares.bias + shares.global_[0, [0, 2, 3]].sum(0) + shares.spatial[0].sum(0)
    of_second = shares.bias + shares.global_[1, 1:].sum(0) + shares.spatial[1, [0, 2]].sum(0)
    torch.testing.assert_close(left, torch.stack((of_first, of_second)), **EXACT)
    with pytest.raises(ShapeError, match="boolean"):
        shares.without(deleted[:, 1:])
    with pytest.raises(ShapeError, match="boolean"):
        shares.without(torch.tensor([0, 1]))


@pytest.mark.paper("concept_centric_transformer")
def test_without_positions_concepts_have_no_identity() -> None:
    head, x, order = made_head(iters=2), tokens(6), torch.tensor([2, 0, 3, 1])
    stream = head.global_stream
    assert stream is not None and stream.slots is not None
    before = head.read(x)
    with torch.no_grad():
        stream.slots.first.copy_(stream.slots.first[order])
    assert (head(x) - before.logits).abs().max() > 1e-3, "positions tell concepts apart"
    with torch.no_grad():
        stream.positions.zero_()
        moved = head.read(x)
        stream.slots.first.copy_(stream.slots.first[order.argsort()])
    still = head.read(x)
    torch.testing.assert_close(still.logits, moved.logits, **EXACT)
    assert still.global_attn is not None and moved.global_attn is not None
    torch.testing.assert_close(still.global_attn[..., order], moved.global_attn, **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_what_concepts_start_as() -> None:
    """Free ones from a normal of 1 / sqrt(dim), cut far out; positions of slots at zero."""
    torch.manual_seed(0)
    free = ConceptCentricHead(64, 5, 2, n_global=400, concepts="free").global_stream
    slots = ConceptCentricHead(64, 5, 2).global_stream
    assert free is not None and slots is not None
    assert float(free.positions.detach().std()) == pytest.approx(1 / 8, rel=0.02)
    assert not slots.positions.any()


@pytest.mark.paper("concept_centric_transformer")
def test_as_released_global_slots_read_the_class_token_alone() -> None:
    """Then patches do not matter, and slots that start alike and stand at one place are one concept."""
    x = tokens(6)
    other = torch.cat((x[:, :1], tokens(5, seed=9)), 1)
    released, sound = made_head(global_from="query"), made_head()
    torch.testing.assert_close(released(x), released(other), **EXACT)
    assert (sound(x) - sound(other)).abs().max() > 1e-3
    stream = released.global_stream
    assert stream is not None and stream.slots is not None
    with torch.no_grad():
        stream.positions.zero_()
        stream.slots.first.copy_(stream.slots.first[:1].expand(SLOTS, -1))
    attn = released.read(x).global_attn
    assert attn is not None
    torch.testing.assert_close(attn, torch.full_like(attn, 1 / SLOTS), **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_streams_are_added_and_patches_averaged() -> None:
    head, x = made_head(n_spatial=3), tokens(6)
    first, second = head.global_stream, head.spatial_stream
    assert first is not None and second is not None
    from_class, _ = first.cross(x[:, :1], first.concepts_of(x[:, 1:], None))
    each = [second.cross(x[:, n : n + 1], second.concepts_of(x[:, 1:], None))[0][:, 0] for n in range(1, 6)]
    reading = head.read(x)
    torch.testing.assert_close(reading.logits, from_class[:, 0] + sum(each) / 5, **EXACT)
    assert reading.global_attn is not None and reading.spatial_attn is not None
    assert reading.global_attn.shape == (2, 1, SLOTS) and reading.spatial_attn.shape == (2, 5, 3)
    torch.testing.assert_close(reading.spatial_attn.sum(-1), torch.ones(2, 5, dtype=torch.float64), **EXACT)


@pytest.mark.paper("concept_centric_transformer")
def test_explanation_loss() -> None:
    attn = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)[:, None]
    target = torch.tensor([[2.0, 2.0, 0.0], [0.0, 3.0, 0.0], [math.nan, 1.0, 0.0]])
    # The first row is right, the second wrong in two entries by 1, the third not annotated: 3 (2 / 6).
    assert explanation_loss(attn, target).item() == pytest.approx(1.0)
    assert explanation_loss(attn[1:2], target[1:2]).item() == pytest.approx(2.0), "the greatest there is"
    nothing = torch.stack((torch.full((3,), math.nan), torch.zeros(3)))
    attn.requires_grad_()
    loss = explanation_loss(attn[:2], nothing)
    loss.backward()
    assert loss.item() == 0 and attn.grad is not None and torch.isfinite(attn.grad).all()
    with pytest.raises(ShapeError, match="shape"):
        explanation_loss(attn, target[:, :2])
    with pytest.raises(OptionError, match="at least 0"):
        explanation_loss(attn, -target)
    # One row for each query, weighed alike.
    rows = torch.rand(2, 3, 4, dtype=torch.float64).softmax(-1)
    wanted = torch.rand(2, 3, 4, dtype=torch.float64)
    wanted[1, 2, 0] = math.nan
    known = [(b, n) for b in range(2) for n in range(3) if (b, n) != (1, 2)]
    each = [float((rows[b, n] - wanted[b, n] / wanted[b, n].sum()).square().sum()) for b, n in known]
    assert explanation_loss(rows, wanted).item() == pytest.approx(sum(each) / 5)


@pytest.mark.paper("concept_centric_transformer")
def test_sparsity_loss_is_an_entropy() -> None:
    even, one = torch.full((2, 5, 8), 1 / 8, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None]
    assert sparsity_loss(even, None).item() == pytest.approx(math.log(8) / 8, abs=1e-6)
    assert sparsity_loss(one).item() == pytest.approx(0, abs=1e-7)
    rows = torch.softmax(torch.randn(3, 4, 6, dtype=torch.float64), -1)
    entropy = torch.distributions.Categorical(probs=rows).entropy().mean() / 6
    assert sparsity_loss(rows, even).item() == pytest.approx(entropy.item() + math.log(8) / 8, abs=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        assert sparsity_loss(one.to(dtype)).item() == pytest.approx(0, abs=1e-7), "where a weight is 0, no NaN"
        wide, half = rows.to(dtype).double(), rows.to(dtype)
        assert sparsity_loss(half).item() == pytest.approx(sparsity_loss(wide).item(), rel=1e-5)
        target = torch.ones(3, 4, 6)
        assert explanation_loss(half, target).item() == pytest.approx(explanation_loss(wide, target).item(), rel=1e-5)


@pytest.mark.paper("concept_centric_transformer")
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_place_of_a_classifier_it_learns_what_is_annotated(variant: SlotVariant) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(4, 2, 1, 2, embed_dim=8, depth=1, num_heads=2, position_std=0.5)
    head = ConceptCentricHead(8, 2, 2, n_global=3, n_spatial=2, variant=variant)
    images, classes = torch.randn(16, 1, 4, 4), torch.arange(16) % 2
    images[:, :, :2] += 2 * classes[:, None, None, None]
    strokes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[classes]
    model = nn.ModuleList([vit, head])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        reading = head.read(vit.norm(vit.encode(vit.embed(images))))
        assert reading.global_attn is not None
        loss = F.cross_entropy(reading.logits, classes) + explanation_loss(reading.global_attn, strokes)
        loss = loss + 0.5 * sparsity_loss(reading.global_attn, reading.spatial_attn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    reading = head.read(vit.norm(vit.encode(vit.embed(images))))
    assert reading.global_attn is not None
    assert (reading.logits.argmax(-1) == classes).double().mean() > 0.9
    assert (reading.global_attn[:, 0].argmax(-1) == classes).double().mean() > 0.9


@pytest.mark.paper("concept_centric_transformer")
def test_errors_teach() -> None:
    with pytest.raises(OptionError, match="sa, isa, qsa"):
        SlotAttention(3, 4, variant="bo")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="iteration"):
        SlotAttention(3, 4, 0)
    with pytest.raises(ShapeError, match="reads tokens"):
        slot_attention()(torch.zeros(2, 3, DIM + 1))
    with pytest.raises(ShapeError, match="First slots"):
        slot_attention()(tokens(), slots=torch.zeros(1, SLOTS, DIM))
    with pytest.raises(ShapeError, match="mask"):
        slot_attention()(tokens(), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(OptionError, match="stream"):
        ConceptCentricHead(8, 2, 2, n_global=0)
    with pytest.raises(OptionError, match="slots, free"):
        ConceptCentricHead(8, 2, 2, concepts="fixed")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="num_heads"):
        ConceptCrossAttention(8, 2, 3)
    with pytest.raises(OptionError, match="class"):
        ConceptCrossAttention(8, 0, 2)
    for concepts in (torch.zeros(2, 4, 6), torch.zeros(3, 4, 8), torch.zeros(4, 8)):
        with pytest.raises(ShapeError, match="ask concepts"):
            ConceptCrossAttention(8, 5, 2)(torch.zeros(2, 3, 8), concepts)
    with pytest.raises(ShapeError, match="class token"):
        made_head()(tokens(1))
    with pytest.raises(ShapeError, match="mask"):
        made_head()(tokens(5), mask=torch.ones(2, 5, dtype=torch.bool))
    for class_token in (True, False):
        with pytest.raises(ShapeError, match="hides all patches"):
            made_head(n_spatial=2, class_token=class_token)(
                tokens(5), mask=torch.tensor([[True], [False]]).expand(2, 5 - class_token)
            )
    with pytest.raises(ShapeError, match="stream"):
        sparsity_loss(None)
