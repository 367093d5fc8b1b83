"""DARE's pieces: embeddings of two roles, the attention of a target, and the search as a mechanism."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.cost import AttentionShape
from regard.errors import OptionError, ShapeError
from regard.sparse.dare import DecoupledEmbedding, SearchAttention, TargetAttention, search_flops

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
FIELDS = {"item": 40, "category": 7, "time": 21}


def ids(*shape: int) -> dict[str, Tensor]:
    return {field: torch.randint(count, shape) for field, count in FIELDS.items()}


def triple(batch: int = 3, length: int = 17, dim: int = 12, value_dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, dim), (batch, length, dim), (batch, length, value_dim))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def padding(batch: int = 3, length: int = 17) -> Tensor:
    mask = torch.rand(batch, length) < 0.7
    mask[:, 0] = True
    return mask


@pytest.mark.paper("dare")
@pytest.mark.parametrize("time_dim", [0, 4])
def test_the_attention_is_the_formula_behaviour_by_behaviour(time_dim: int) -> None:
    query, key, value = triple()
    mask = padding()
    out, scores = TargetAttention(time_dim=time_dim)(query, key, value, mask, top_k=4)
    semantic = 12 - time_dim
    for b in range(3):
        own = []
        for j in range(17):
            s = sum(float(query[b, i] * key[b, j, i]) for i in range(semantic)) / math.sqrt(semantic)
            if time_dim:
                s += sum(float(query[b, i] * key[b, j, i]) for i in range(semantic, 12)) / math.sqrt(time_dim)
            own.append(s if mask[b, j] else -math.inf)
        assert scores[b].tolist() == pytest.approx(own)
        best = sorted(range(17), key=lambda j: -own[j])[:4]
        weights = [math.exp(own[j]) for j in best if mask[b, j]]
        expected = sum(w / sum(weights) * value[b, j] for w, j in zip(weights, best, strict=False))
        torch.testing.assert_close(out[b], expected, **TIGHT)


@pytest.mark.paper("dare")
@pytest.mark.parametrize("score", ["dot", "din"])
def test_a_search_that_keeps_everything_is_full_target_attention(score: str) -> None:
    query, key, value = triple()
    module = TargetAttention(score, dim=12).double()  # type: ignore[arg-type]
    full, scores = module(query, key, value)
    torch.testing.assert_close(full, torch.einsum("bl,blv->bv", scores.softmax(-1), value), **TIGHT)
    for top_k in (17, 100):
        torch.testing.assert_close(module(query, key, value, top_k=top_k)[0], full, **TIGHT)
    assert not torch.allclose(module(query, key, value, top_k=16)[0], full)


@pytest.mark.paper("dare")
def test_the_din_score_is_a_network_on_query_key_difference_and_product() -> None:
    query, key, _ = triple()
    module = TargetAttention("din", dim=12).double()
    assert module.network is not None
    first, slope, second = module.network
    for b, j in ((0, 0), (2, 9)):
        q, k = query[b], key[b, j]
        hidden = first.weight @ torch.cat((q, k, q - k, q * k)) + first.bias
        hidden = torch.where(hidden > 0, hidden, hidden * slope.weight)
        expected = (second.weight @ hidden + second.bias)[0] / 12
        torch.testing.assert_close(module.scores(query, key)[b, j], expected, **TIGHT)


@pytest.mark.paper("dare")
def test_the_order_of_behaviours_matters_through_the_time_field_alone() -> None:
    torch.manual_seed(1)
    embedding = DecoupledEmbedding(FIELDS, 4, 6, std=1.0).double()
    attention = TargetAttention(time_dim=4)
    target, history, mask = ids(3), ids(3, 17), padding()

    def read(history: dict[str, Tensor], mask: Tensor) -> Tensor:
        query, key = embedding.for_attention(target), embedding.for_attention(history)
        out: Tensor = attention(query, key, embedding.for_representation(history), mask, top_k=6)[0]
        return out

    order = torch.randperm(17)
    moved = {field: x[:, order] for field, x in history.items()}
    torch.testing.assert_close(read(moved, mask[:, order]), read(history, mask), **TIGHT)
    # Behaviours that change places and keep the times of the places are another history.
    assert not torch.allclose(read({**moved, "time": history["time"]}, mask[:, order]), read(history, mask))


@pytest.mark.paper("dare")
def test_padding_is_never_read() -> None:
    query, key, value = triple()
    mask = torch.zeros(3, 17, dtype=torch.bool)
    mask[0, :3] = mask[1, 5] = True
    out, _ = TargetAttention()(query, key, value, mask, top_k=8)
    torch.testing.assert_close(out[1], value[1, 5], **TIGHT)
    assert (out[2] == 0).all()
    changed = torch.where(mask[..., None], value, 1e6)
    torch.testing.assert_close(TargetAttention()(query, key, changed, mask, top_k=8)[0], out, **TIGHT)
    query.requires_grad_()
    TargetAttention()(query, key, value, mask, top_k=8)[0].sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


@pytest.mark.paper("dare")
def test_tables_of_two_roles_and_their_numbers() -> None:
    embedding = DecoupledEmbedding(FIELDS, {"item": 3, "category": 2, "time": 1}, 8)
    history = ids(2, 5)
    assert embedding.for_attention(history).shape == (2, 5, 6)
    assert embedding.for_representation(history).shape == (2, 5, 24)
    assert sum(p.numel() for p in embedding.parameters()) == 40 * 11 + 7 * 10 + 21 * 9
    tied = DecoupledEmbedding(FIELDS, 8, 8, tied=True)
    assert sum(p.numel() for p in tied.parameters()) == 68 * 8
    torch.testing.assert_close(tied.for_attention(history), tied.for_representation(history))
    tied.untie()
    assert sum(p.numel() for p in tied.parameters()) == 2 * 68 * 8
    torch.testing.assert_close(tied.for_attention(history), tied.for_representation(history))
    expected = torch.cat([tied.attention[f].weight[history[f]] for f in FIELDS], -1)  # type: ignore[index]
    torch.testing.assert_close(tied.for_attention(history), expected)


@pytest.mark.paper("dare")
def test_the_search_costs_in_proportion_to_the_width_of_attention() -> None:
    counted = []
    for width in (24, 48):
        query, key = torch.randn(4, width), torch.randn(4, 100, width)
        with FlopCounterMode(display=False) as counter:
            TargetAttention(time_dim=width // 3).scores(query, key)
        counted.append(counter.get_total_flops())
        assert counted[-1] == 4 * search_flops(100, width)
    assert counted[1] == 2 * counted[0]


@pytest.mark.paper("dare")
@pytest.mark.parametrize("time_dim", [0, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_mechanism_is_softmax_over_the_best_keys_of_each_query(time_dim: int, causal: bool) -> None:
    query = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 9, dim, dtype=torch.float64) for dim in (8, 5))
    out = SearchAttention(top_k=3, time_dim=time_dim)(query, key, value, causal=causal)
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    semantic = query[..., : 8 - time_dim] @ keys[..., : 8 - time_dim].mT / math.sqrt(8 - time_dim)
    logits = semantic + (query[..., 8 - time_dim :] @ keys[..., 8 - time_dim :].mT / math.sqrt(max(time_dim, 1)))
    if causal:
        logits = logits.masked_fill(~torch.ones(6, 9, dtype=torch.bool).tril(3), -math.inf)
    third = logits.sort(-1, descending=True).values[..., 2:3]
    expected = logits.masked_fill(logits < third, -math.inf).softmax(-1) @ values
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.paper("dare")
def test_the_mechanism_with_one_query_is_target_attention_and_with_all_keys_full_attention() -> None:
    query, key, value = triple()
    out = SearchAttention(top_k=5, time_dim=4)(query[:, None, None], key[:, None], value[:, None])
    torch.testing.assert_close(out[:, 0, 0], TargetAttention(time_dim=4)(query, key, value, top_k=5)[0], **TIGHT)
    q, k, v = (torch.randn(2, 3, 11, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(SearchAttention(top_k=11)(q, k, v), F.scaled_dot_product_attention(q, k, v), **TIGHT)


def test_the_search_in_stretches_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 3, 11, 8, dtype=torch.float64) for _ in range(3))
    whole = SearchAttention(top_k=4)(q, k, v, causal=True)
    monkeypatch.setattr("regard.sparse.dare._AREA", 2 * 3 * 11 * 2)
    torch.testing.assert_close(SearchAttention(top_k=4)(q, k, v, causal=True), whole, **TIGHT)


def test_cost_counts_search_and_attention() -> None:
    shape = AttentionShape(q_len=50, k_len=200, num_heads=2, head_dim=16, value_dim=8, batch=3)
    pairs = 3 * 2 * 50
    assert SearchAttention(top_k=20).cost(shape).flops == pairs * 200 * 2 * 16 + pairs * 20 * 2 * (16 + 8)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(OptionError, match="din"):
        TargetAttention("din")
    with pytest.raises(OptionError, match="one width"):
        DecoupledEmbedding(FIELDS, 4, 8, tied=True)
    with pytest.raises(OptionError, match="n_attention"):
        DecoupledEmbedding(FIELDS, {"item": 3})
    with pytest.raises(ShapeError, match="category"):
        DecoupledEmbedding(FIELDS).for_attention({"item": torch.tensor([1]), "time": torch.tensor([1])})
    with pytest.raises(ShapeError, match="time_dim"):
        TargetAttention(time_dim=12)(*triple())
    with pytest.raises(ShapeError, match="boolean"):
        TargetAttention()(*triple(), torch.ones(3, 17))
    with pytest.raises(OptionError, match="top_k"):
        SearchAttention(top_k=0)
