"""Relational and dual attention against loops over pairs from the formula, torch's own attention, and invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.dense.dual_attention import DualAttention, RelationalAttention, RelationalCrossAttention
from regard.errors import OptionError, ShapeError
from regard.layers.symbols import (
    PositionalSymbols,
    RelationalSymbolicAttention,
    RelativeSymbols,
    SymbolicAttention,
    symbol_retriever,
)
from regard.masks import KeyPadding

WIDTH, HEADS, LENGTH = 12, 3, 7


def tokens(seed: int = 1, length: int = LENGTH, width: int = WIDTH) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relational(**options: Any) -> RelationalAttention:
    torch.manual_seed(0)
    return RelationalAttention(WIDTH, HEADS, **options).double()


def dual(heads: int = 4, **options: Any) -> DualAttention:
    torch.manual_seed(0)
    return DualAttention(WIDTH, heads, **options).double()


def formula(made: RelationalAttention, x: Tensor, symbol: Any, causal: bool, act: Any = lambda r: r) -> Tensor:
    """Relations are projected by W_r for every pair before they are aggregated; symbol(b, i, j) is the sender's."""
    dim, heads, kv = made.head_dim, made.num_heads, made.num_kv_heads
    rows = []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            parts = []
            for h in range(heads):
                g = h // (heads // kv)
                query = (made.query.weight @ x[b, i])[h * dim : (h + 1) * dim]
                seen = range(i + 1 if causal else x.shape[1])
                scores = torch.stack(
                    [query @ (made.key.weight @ x[b, j])[g * dim : (g + 1) * dim] / math.sqrt(dim) for j in seen]
                )
                message = 0
                for alpha, j in zip(scores.softmax(0), seen, strict=True):
                    r = torch.stack(
                        [
                            q @ k / math.sqrt(made.rel_proj_dim)
                            for q, k in zip(
                                (made.rel_query.weight @ x[b, i]).chunk(made.num_relations),
                                (made.rel_key.weight @ x[b, j]).chunk(made.num_relations),
                                strict=True,
                            )
                        ]
                    )
                    tag = (made.value.weight @ symbol(b, i, j))[g * dim : (g + 1) * dim]
                    message = message + alpha * (made.rel_out[h] @ act(r) + tag)
                parts.append(message)
            rows.append(torch.cat(parts))  # type: ignore[arg-type]
    return made.out(torch.stack(rows).view(len(x), x.shape[1], -1))  # type: ignore[no-any-return]


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_relations": 2, "rel_proj_dim": 5}, {"rel_activation": "tanh"}, {"num_kv_heads": 1}],
    ids=str,
)
def test_relations_projected_first_or_aggregated_first(options: dict[str, Any], causal: bool) -> None:
    """The layer aggregates relations and then projects; the formula projects every pair's."""
    made, x, symbols = relational(**options), tokens(), tokens(5)
    act = torch.tanh if options.get("rel_activation") == "tanh" else lambda r: r
    expected = formula(made, x, lambda b, i, j: symbols[b, j], causal, act)
    torch.testing.assert_close(made(x, symbols, causal=causal), expected)


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("reach", [2, 10])
def test_symbols_by_offset(reach: int) -> None:
    """A table of offsets, the tensor of all pairs, and the formula with s_(j - i) agree."""
    table = RelativeSymbols(WIDTH, reach).double()
    made, pairwise, x = relational(), relational(relative=True), tokens()

    def symbol(b: int, i: int, j: int) -> Tensor:
        return table.library[max(-reach, min(reach, j - i)) + reach]

    for causal in (False, True):
        expected = formula(made, x, symbol, causal)
        torch.testing.assert_close(made(x, table(x), causal=causal), expected)
        torch.testing.assert_close(pairwise(x, table.pairs(LENGTH), causal=causal), expected)


@pytest.mark.paper("dual_attention")
def test_no_relational_heads_is_multi_head_attention() -> None:
    made, x = dual(relational_heads=0), tokens()
    plain = nn.MultiheadAttention(WIDTH, 4, bias=False, batch_first=True).double()
    sensory = made.sensory
    assert sensory is not None and made.relational is None and made.symbols is None
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat((sensory.query.weight, sensory.key.weight, sensory.value.weight)))
        plain.out_proj.weight.copy_(sensory.out.weight)
    torch.testing.assert_close(made(x), plain(x, x, x, need_weights=False)[0])
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    torch.testing.assert_close(made(x, causal=True), plain(x, x, x, need_weights=False, attn_mask=hidden)[0])


@pytest.mark.paper("dual_attention")
def test_both_kinds_of_heads_stand_side_by_side() -> None:
    """Sensory heads fill the first channels, relational ones the others, each through a square map of its own."""
    made, x, symbols = dual(4, relational_heads=1), tokens(), tokens(5)
    assert made.sensory is not None and isinstance(made.relational, RelationalAttention)
    assert made.sensory.out.weight.shape == (9, 9) and made.relational.out.weight.shape == (3, 3)
    out = made(x, symbols=symbols)
    torch.testing.assert_close(out[..., 9:], made.relational(x, symbols))
    linears = (made.sensory.query, made.sensory.key, made.sensory.value)
    query, key, value = (linear(x).view(2, LENGTH, 3, 3).transpose(1, 2) for linear in linears)
    plain = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[..., :9], made.sensory.out(plain))
    shared = dual(4, share_attn_params=True)
    assert shared.sensory is not None and shared.relational is not None
    assert shared.sensory.query is shared.relational.query and shared.sensory.key is shared.relational.key
    fewer = sum(p.numel() for p in dual(4).parameters()) - sum(p.numel() for p in shared.parameters())
    assert fewer == 2 * WIDTH * WIDTH // 2


@pytest.mark.paper("dual_attention")
def test_symmetric_relations() -> None:
    made, x = relational(symmetric=True, num_relations=4, rel_proj_dim=3), tokens()
    relations = made.relations(x)
    assert relations.shape == (2, LENGTH, LENGTH, 4)
    torch.testing.assert_close(relations, relations.transpose(1, 2))
    other = relational(num_relations=4, rel_proj_dim=3).relations(x)
    assert float((other - other.transpose(1, 2)).detach().abs().max()) > 0.1


@pytest.mark.paper("dual_attention")
def test_outputs_depend_on_features_through_inner_products_alone() -> None:
    """With positional symbols, a rotation of all features undone in W_q and W_k changes nothing; one that is not undone
    changes the output, and sensory heads need it undone in W_v as well."""
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).double())[0]
    made, x = relational(), tokens()
    symbols = PositionalSymbols(WIDTH, 16).double()(x)
    before = made(x, symbols)
    turned = x @ rotation.T
    assert float((made(turned, symbols) - before).detach().abs().max()) > 1e-2
    with torch.no_grad():
        for linear in (made.query, made.key, made.rel_query, made.rel_key):
            linear.weight.copy_(linear.weight @ rotation.T)
    torch.testing.assert_close(made(turned, symbols), before)


@pytest.mark.paper("dual_attention")
def test_symbols_of_positions_carry_no_content() -> None:
    """Without W_r the messages are symbols alone: with attention held uniform no token's features reach the output."""
    made, x = relational(), tokens()
    with torch.no_grad():
        made.rel_out.zero_()
        made.query.weight.zero_()
    for retriever in (PositionalSymbols(WIDTH, 16).double(), RelativeSymbols(WIDTH, 3).double()):
        torch.testing.assert_close(made(x, retriever(x)), made(tokens(9), retriever(tokens(9))), rtol=0, atol=1e-14)
    content = SymbolicAttention(WIDTH, 2, 5).double()
    assert float((made(x, content(x)) - made(tokens(9), content(tokens(9)))).detach().abs().max()) > 1e-3


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("symbols", ["symbolic", "positional", "relative", "relational"])
def test_causal(symbols: str) -> None:
    torch.manual_seed(0)
    made, x = DualAttention(16, 4, symbols=symbols, rotary=symbols == "positional").double(), tokens(width=16)
    changed = x.clone()
    changed[:, 4:] = 3 * x.flip(1)[:, 4:] + 1
    before, after = (made(t, causal=True) for t in (x, changed))
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-12)
    assert float((after[:, 4:] - before[:, 4:]).detach().abs().max()) > 1e-2


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("symbols", ["symbolic", "positional", "relative"])
@pytest.mark.parametrize("heads", [0, 2, 4])
def test_cached_decoding_is_the_full_forward(symbols: str, heads: int) -> None:
    torch.manual_seed(0)
    made = DualAttention(16, 4, heads, symbols=symbols, rotary=True, rel_activation="relu").double().eval()
    x = tokens(width=16)
    state, outs = made.init_state(2, like=x), []
    for part in x.split([1, 3, 1, 2], 1):
        out, state = made.step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), made(x, causal=True))
    assert state.seen == LENGTH and state.nbytes() > 0


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("symbols", ["symbolic", "relative"])
def test_tiles_agree_with_the_whole_and_hold_less(symbols: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is linear in length: no tensor of a tiled pass, forward or backward, holds a number per pair."""
    options = {"max_rel_pos": 4} if symbols == "relative" else {}
    made, x = dual(num_relations=3, symbols=symbols, symbol_options=options), tokens(length=96).requires_grad_()
    whole = made.relational(x, made.symbols(x), causal=True)  # type: ignore[misc]
    expected = torch.autograd.grad(whole.square().sum(), x)[0]
    monkeypatch.setattr("regard.kernels.scored._TILE", 2 * 2 * 3 * 96 * 8)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        tiled = made.relational(x, made.symbols(x), causal=True)  # type: ignore[misc]
        found = torch.autograd.grad(tiled.square().sum(), x)[0]
    torch.testing.assert_close(tiled, whole)
    torch.testing.assert_close(found, expected)
    assert largest < 2 * 2 * 96 * 96, "a map of the two heads"


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("disentangled", [False, True])
def test_ablations(disentangled: bool) -> None:
    """Cross: softmax(q k) s. Disentangled: alpha r s with a relation per head."""
    torch.manual_seed(0)
    made, x, symbols = RelationalCrossAttention(WIDTH, HEADS, disentangled).double(), tokens(), tokens(5)
    dim, outs = WIDTH // HEADS, []
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    for h in range(HEADS):
        part = slice(h * dim, (h + 1) * dim)
        scores = (x @ made.query.weight[part].T) @ (x @ made.key.weight[part].T).transpose(1, 2) / math.sqrt(dim)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        if disentangled:
            assert made.rel_query is not None and made.rel_key is not None
            q, k = x @ made.rel_query.weight[part].T, x @ made.rel_key.weight[part].T
            weights = weights * (q @ k.transpose(1, 2)) / math.sqrt(dim)
        outs.append(weights @ (symbols @ made.value.weight[part].T))
    torch.testing.assert_close(made(x, symbols, causal=True), made.out(torch.cat(outs, -1)))
    named = dual(relation="disentangled_cross" if disentangled else "cross")
    assert isinstance(named.relational, RelationalCrossAttention) and named(x).shape == x.shape


def test_cross_attention_with_another_activation_zeroes_what_is_hidden() -> None:
    torch.manual_seed(0)
    made, x, symbols = RelationalCrossAttention(WIDTH, HEADS, activation="sigmoid").double(), tokens(), tokens(5)
    out = made(x, symbols, causal=True)
    first = (made.query(x)[:, 0].view(2, HEADS, -1) * made.key(x)[:, 0].view(2, HEADS, -1)).sum(-1) / 2
    value = made.value(symbols)[:, 0].view(2, HEADS, -1)
    torch.testing.assert_close(out[:, 0], made.out((first.sigmoid()[..., None] * value).flatten(1)))


@pytest.mark.paper("dual_attention")
def test_symbolic_attention_is_its_formula() -> None:
    made, x = SymbolicAttention(WIDTH, 3, 5).double(), tokens()
    outs = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = made.query(x)[..., part] @ made.features[:, part].T / 2
        outs.append(scores.softmax(-1) @ made.library[:, part])
    torch.testing.assert_close(made(x), torch.cat(outs, -1))
    assert not SymbolicAttention(WIDTH, trainable=False).library.requires_grad
    torch.manual_seed(0)
    wide = SymbolicAttention(64, 4, 256)
    for table in (wide.features, wide.library):
        assert abs(float(table.detach().std()) - 1) < 0.02


@pytest.mark.paper("dual_attention")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_symbols_from_neighbours(causal: bool, own: bool) -> None:
    made, x = RelationalSymbolicAttention(WIDTH, 2, 5, 2, causal, rel_heads=3, include_self=own).double(), tokens()
    found = made.relations(x)
    offsets = [o for o in ((-2, -1, 0) if causal else (-2, -1, 0, 1, 2)) if o or own]
    for i in range(LENGTH):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            near = torch.stack([made.key(x)[0, min(max(i + o, 0), LENGTH - 1), part] for o in offsets])
            torch.testing.assert_close(found[0, i, :, h], (near @ made.query(x)[0, i, part] / 2).softmax(0))
    torch.testing.assert_close(made(x), made.symbols(made.project(found.flatten(2))))
    changed = x.clone()
    changed[:, 5:] += 1
    assert (
        torch.equal(made(changed)[:, :3], made(x)[:, :3]) and torch.equal(made(changed)[:, 4], made(x)[:, 4]) == causal
    )


def test_masks_and_whole_maps() -> None:
    made, x, symbols = relational(), tokens(), tokens(5)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, 5:] = False
    torch.testing.assert_close(made(x, symbols, mask=KeyPadding(valid))[:, :5], made(x[:, :5], symbols[:, :5]))
    weights, relations = made.weights(x, causal=True), made.relations(x)
    heads = torch.einsum("bhij,bijr,hdr->bihd", weights, relations, made.rel_out)
    heads = heads + torch.einsum("bhij,bjhd->bihd", weights, made.value(symbols).view(2, LENGTH, HEADS, -1))
    torch.testing.assert_close(made(x, symbols, causal=True), made.out(heads.flatten(2)))
    assert not bool(dual(relational_heads=2)(x, mask=torch.zeros(LENGTH, LENGTH, dtype=torch.bool)).any())


def test_errors() -> None:
    for options in (
        {"relational_heads": 5},
        {"relational_heads": 1, "share_attn_params": True},
        {"relation": "other"},
        {"symbols": "none"},
        {"rel_activation": "softmax"},
    ):
        with pytest.raises(OptionError):
            DualAttention(WIDTH, 4, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="symbols"):
        dual(symbols=None)(tokens())
    with pytest.raises(OptionError, match="ablations"):
        dual(relation="cross").init_state(1, like=tokens())
    with pytest.raises(OptionError, match="kind"):
        made = dual(symbols="relational")
        state = made.init_state(2, like=tokens())
        made.step(tokens(), state)
        made.step(tokens(), state)
    with pytest.raises(ShapeError, match="max_length"):
        PositionalSymbols(WIDTH, 3)(tokens())
    with pytest.raises(ShapeError, match="one a token"):
        relational()(tokens(), tokens(length=3))
    with pytest.raises(ShapeError, match="odd number"):
        relational()(tokens(), tokens()[0, :4])
    with pytest.raises(ShapeError, match="one a pair"):
        relational(relative=True)(tokens(), tokens())
    with pytest.raises(ShapeError):
        relational()(tokens(width=5), tokens())
    for make in (
        lambda: SymbolicAttention(WIDTH, 2, 0),
        lambda: RelativeSymbols(WIDTH, -1),
        lambda: RelationalSymbolicAttention(WIDTH, 2, 5, 0),
        lambda: symbol_retriever("other", WIDTH),
    ):
        with pytest.raises(OptionError):
            make()
