"""Dense attention composed of steps: every choice against loops written from the formulas, against the papers that are
one choice each, in tiles and whole; what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.dense import compose
from regard.dense.comateformer import CombinedAttention
from regard.dense.composed import ComposedDense
from regard.dense.lla import LocalLinearAttention
from regard.dense.moh import NormRoutedHeads
from regard.dense.mta import MultiTokenAttention
from regard.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPatternError
from regard.kernels import scored, use_backend
from regard.layers.head_allocation import HEADS, RoutedHeads
from regard.layers.map_transforms import MAP_TRANSFORMS, KeyQueryConv, MapTransform
from regard.layers.normalizers import NORMALIZERS
from regard.layers.read_outs import READ_OUTS
from regard.layers.scorers import SCORERS
from regard.masks import Causal, Document, KeyPadding

HEADS_, KV, DIM = 4, 2, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(q_len: int = 5, k_len: int = 7, kv_heads: int = KV, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(batch, HEADS_, q_len, DIM, seed=1),
        draw(batch, kv_heads, k_len, DIM, seed=2),
        draw(batch, kv_heads, k_len, DIM, seed=3),
    )


def made(score: Any = "dot", *, seed: int = 0, **choices: Any) -> ComposedDense:
    torch.manual_seed(seed)
    module = compose(score, num_heads=HEADS_, head_dim=DIM, **choices).double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=50 + index))
    return module


# ---- the same from formulas, pair by pair ----------------------------------------------------------------------------


def pair_score(name: str, scorer: Any, q: Tensor, k: Tensor) -> Tensor:
    if name == "dot":
        return q @ k / math.sqrt(len(q))
    if name == "gaussian":
        return -(scorer.log_precision.exp() * (q - k) ** 2).sum() / 2
    if name == "low_rank":
        return (scorer.query.weight @ q) @ (scorer.key.weight @ k) / math.sqrt(len(scorer.key.weight))
    if name == "additive":
        return scorer.out.weight[0] @ torch.tanh(scorer.query.weight @ q + scorer.query.bias + scorer.key.weight @ k)
    assert name == "relational"
    parts = zip(scorer.query.weight.chunk(2), scorer.key.weight.chunk(2), scorer.out.weight[0], strict=True)
    return sum(w * torch.tanh((u @ q) @ (v @ k) / math.sqrt(len(u))) for u, v, w in parts)  # type: ignore[return-value]


def pair_scores(name: str, scorer: Any, query: Tensor, key: Tensor) -> Tensor:
    rows = [
        [torch.stack([pair_score(name, scorer, q, k) for k in key[h]]) for q in query[h]] for h in range(len(query))
    ]
    return torch.stack([torch.stack(row) for row in rows])


def convolved(maps: Tensor, step: KeyQueryConv, seen: Tensor, taken: Tensor) -> Tensor:
    kernel, later = step.kernel, step.later
    heads, q_len, k_len = maps.shape
    _, c_q, c_k = kernel.shape
    out = []
    for h, i, j in itertools.product(range(heads), range(q_len), range(k_len)):
        total = maps.new_zeros(())
        for a, b in itertools.product(range(-later, c_q - later), range(-(c_k // 2), c_k // 2 + 1)):
            row, column = i - a, j + b
            if 0 <= row < q_len and 0 <= column < k_len and seen[h, i, j] and seen[h, row, column] and taken[i, row]:
                total = total + kernel[h, c_q - 1 - later - a, b + c_k // 2] * maps[h, row, column]
        out.append(total)
    return torch.stack(out).view(heads, q_len, k_len)


def normalised(name: str, module: ComposedDense, scores: Tensor, seen: Tensor) -> Tensor:
    heads, rows, _ = scores.shape
    out = torch.zeros_like(scores)
    for h, i in itertools.product(range(heads), range(rows)):
        on = seen[h, i].nonzero()[:, 0]
        if len(on) == 0:
            continue
        s = scores[h, i, on]
        if name == "tempered":
            s = s / module.normalizer.log_number[h].exp()  # type: ignore[union-attr]
        if name == "sigmoid":
            w = 1 / (1 + (-(s - math.log(len(on)))).exp())
        elif name == "sparsemax":
            ordered = s.sort(descending=True).values
            size = max(n for n in range(1, len(s) + 1) if 1 + n * ordered[n - 1] > ordered[:n].sum())
            w = (s - (ordered[:size].sum() - 1) / size).clamp_min(0)
        else:
            w = s.exp() / s.exp().sum()
        out = out.index_put((torch.tensor(h), torch.tensor(i), on), w)
    return out


def read_by_row(name: str, module: ComposedDense, weights: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if name == "sum":
        return weights @ value
    outs = []
    for h, i in itertools.product(range(len(weights)), range(weights.shape[1])):
        w, q, k, v = weights[h, i], query[h, i], key[h], value[h]
        if name == "compositional":
            outs.append((w * 2 / (1 + ((q - k).abs().sum(-1) / DIM).exp())) @ v)
            continue
        if not bool(w.any()):
            outs.append(torch.zeros_like(v[0]))
            continue
        design = torch.cat((torch.ones(len(k), 1).double(), k - q), 1)
        ridge = module.reader.ridge[h] * torch.diag(torch.tensor([0.0] + [1.0] * DIM).double())  # type: ignore[index]
        fit = torch.linalg.solve(design.T @ (w[:, None] * design) + ridge, design.T @ (w[:, None] * v))
        outs.append(fit[0])
    return torch.stack(outs).view(len(weights), weights.shape[1], -1)


def gates(module: ComposedDense, query: Tensor) -> Tensor:
    """``(heads, rows)``: one shared head, two of three routed, by the formulas of a mixture of heads."""
    router = module.allocation.router
    out = []
    for row in query.unbind(1):
        x = row.flatten()
        shared, routed = 2 * (router.pair_logits.weight @ x).softmax(0)  # type: ignore[union-attr]
        p = (router.routed_logits.weight @ x).softmax(0)  # type: ignore[union-attr]
        top = p.topk(2).indices
        on = torch.zeros(3).double().index_fill(0, top, 1.0)
        out.append(torch.cat((shared[None], routed * 2 * on * p / p[top].sum())))
    return torch.stack(out, 1)


def plain(
    module: ComposedDense, names: dict[str, str], query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor
) -> Tensor:
    """One sequence: ``(heads, rows, d)`` and ``(kv_heads, k_len, d)``; mask ``(rows, k_len)``."""
    heads, q_len, k_len = len(query), query.shape[1], key.shape[1]
    key, value = (torch.stack([t[h * len(t) // heads] for h in range(heads)]) for t in (key, value))
    at = [i + k_len - q_len for i in range(q_len)]
    seen = mask.expand(heads, -1, -1).clone()
    for h, i, j in itertools.product(range(heads), range(q_len), range(k_len)):
        near = names["heads"] != "long_short" or h >= heads // 2 or abs(at[i] - j) < 3
        seen[h, i, j] &= near and (not causal or j <= at[i])
    taken = torch.tensor([[i == r or bool(mask[i, at[r]]) for r in range(q_len)] for i in range(q_len)])

    def weights_of(q: Tensor, k: Tensor, shared: bool) -> Tensor:
        if shared:
            q, k = (torch.stack([t[h // 2 * 2 : h // 2 * 2 + 2].mean(0) for h in range(heads)]) for t in (q, k))
        s = pair_scores(names["score"], module.scorer, q, k)
        for step in module.before:
            s = convolved(s, step, seen, taken) if isinstance(step, KeyQueryConv) else mixed(s, step)
        return normalised(names["normalizer"], module, s, seen)

    grouped = names["heads"] == "grouped"
    if module.difference is None:
        weights = weights_of(query, key, grouped)
    else:
        v = module.difference
        lam = (v.lambda_q1 @ v.lambda_k1).exp() - (v.lambda_q2 @ v.lambda_k2).exp() + 0.2
        first, second = (
            weights_of(query[..., part], key[..., part], grouped and n == 1)
            for n, part in enumerate((slice(0, DIM // 2), slice(DIM // 2, DIM)))
        )
        weights = first - lam * second
    for step in module.after:
        if isinstance(step, KeyQueryConv):
            weights = convolved(weights, step, seen, taken)
        elif hasattr(step, "kernel"):
            weights = torch.where(seen, mixed(weights, step), 0)
        else:
            weights = torch.where(seen, (weights - 0.1).clamp_min(0), 0)
    out = read_by_row(names["read"], module, weights, query, key, value)
    return out * gates(module, query)[..., None] if names["heads"] == "routed" else out


def mixed(maps: Tensor, step: Any) -> Tensor:
    size = step.kernel.shape[-1]
    rows = []
    for h in range(len(maps)):
        group, own = divmod(h, size)
        rows.append(sum(step.kernel[group, own, other] * maps[group * size + other] for other in range(size)))
    return torch.stack(rows)


SCORE_OPTIONS: dict[str, dict[str, Any]] = {
    "dot": {},
    "gaussian": {},
    "low_rank": {"rank": 1},
    "additive": {"hidden": 3},
    "relational": {"num_relations": 2, "function": "tanh"},
}
MAPS: dict[str, Any] = {
    "none": (),
    "conv": {"key_query_conv": {"q_kernel": 2, "k_kernel": 3}},
    "conv_after_and_mix": [
        {"head_mix": {"group": 2}},
        {"key_query_conv": {"q_kernel": 3, "k_kernel": 1, "place": "post"}},
        {"head_mix": {"place": "post"}},
    ],
    "key_conv_and_edges": {"key_conv": {"k_kernel": 3}, "edges": {"threshold": 0.1}},
    "difference": "difference",
}
ALLOCATIONS: dict[str, Any] = {
    "all": "all",
    "routed": {"routed": {"shared_fraction": 0.25, "router": "learned"}},
    "grouped": "grouped",
    "long_short": {"long_short": {"window": 3}},
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("maps", MAPS)
def test_the_product_of_choices(maps: str, allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every normaliser with every read-out and, in turn, every score; forward and gradient, in tiles, masked, causal,
    with grouped key heads and fewer queries than keys, against the loops."""
    monkeypatch.setattr(scored, "_TILE", 60)
    turns = itertools.cycle(SCORE_OPTIONS)
    chance = torch.rand(5, 7, generator=torch.Generator().manual_seed(4)) < 0.8
    chance[1] = False
    for count, (norm, read) in enumerate(
        itertools.product(("softmax", "tempered", "sparsemax", "sigmoid"), ("sum", "local_linear", "compositional"))
    ):
        score = next(turns)
        choices: dict[str, Any] = {
            "maps": MAPS[maps],
            "heads": ALLOCATIONS[allocation],
            "normalizer": {"tempered": {"learned": True, "temperature": 0.7}} if norm == "tempered" else norm,
            "read": {"local_linear": {"ridge": 0.3}} if read == "local_linear" else read,
        }
        after = maps in ("conv_after_and_mix", "key_conv_and_edges", "difference")
        if read == "local_linear" and (after or norm == "sigmoid"):
            with pytest.raises(OptionError, match="distribution over keys"):
                made({score: SCORE_OPTIONS[score]}, **choices)
            continue
        module = made({score: SCORE_OPTIONS[score]}, **choices, seed=count)
        causal = count % 2 == 0 or maps == "conv_after_and_mix"
        mask = chance if causal else torch.ones(5, 7, dtype=torch.bool)
        leaves = [t.requires_grad_() for t in tokens()]
        found = module(*leaves, causal=causal, mask=mask)
        names = {"score": score, "normalizer": norm, "read": read, "heads": allocation}
        expected = plain(module, names, *(t[0] for t in leaves), causal=causal, mask=mask)[None]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        wanted = [*leaves, *(p for p in module.parameters())]
        seed = draw(*found.shape, seed=9)
        grads = (torch.autograd.grad(out, wanted, seed, allow_unused=True) for out in (found, expected))
        for actual, right in zip(*grads, strict=True):
            if actual is not None and right is not None:
                torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-8)
            else:
                assert all(g is None or not bool(g.any()) for g in (actual, right))


@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_convolution_over_both_sides(place: str) -> None:
    module = made(maps={"key_query_conv": {"q_kernel": 5, "k_kernel": 3, "place": place, "both_sides": True}})
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    leaves = [t.requires_grad_() for t in tokens(6, 6)]
    names = {"score": "dot", "normalizer": "softmax", "read": "sum", "heads": "all"}
    found = module(*leaves, mask=mask)
    expected = plain(module, names, *(t[0] for t in leaves), causal=False, mask=mask)[None]
    torch.testing.assert_close(found, expected)
    wanted = [*leaves, *module.parameters()]
    for actual, right in zip(*(torch.autograd.grad(o.square().sum(), wanted) for o in (found, expected)), strict=True):
        torch.testing.assert_close(actual, right)


def test_all_names_are_known_to_the_product_or_to_tests_of_their_own() -> None:
    """A step that is added here gets a formula here."""
    assert set(SCORERS) == {*SCORE_OPTIONS, "bilinear", "feed_forward", "distance", "filtered"}
    assert set(MAP_TRANSFORMS) == {"key_query_conv", "key_conv", "head_mix", "edges", "difference", "nested"}
    assert set(READ_OUTS) == {"sum", "local_linear", "compositional", "alignment"}
    assert set(HEADS) == set(ALLOCATIONS)
    assert {"softmax", "tempered", "sparsemax", "sigmoid"} < set(NORMALIZERS)


# ---- a paper is one choice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_papers_are_choices(causal: bool) -> None:
    query, key, value = tokens(7, 7)
    arguments: dict[str, Any] = {"causal": causal}

    combined = CombinedAttention(head_dim=DIM).double()
    torch.testing.assert_close(
        made(normalizer="tanh", read="compositional")(query, key, value, **arguments),
        combined(query, key, value, **arguments),
    )

    linear = LocalLinearAttention(0.3, normalize=False, num_heads=HEADS_).double()
    mine = compose(read={"local_linear": {"ridge": 0.3}}, num_heads=HEADS_, head_dim=DIM).double()
    torch.testing.assert_close(mine(query, key, value, **arguments), linear(query, key, value, **arguments))

    for training in (False, True):
        routed = NormRoutedHeads(HEADS_).train(training)
        mine = made(heads="routed").train(training)
        torch.testing.assert_close(mine(query, key, value, **arguments), routed(query, key, value, **arguments))

    layer = MultiTokenAttention(HEADS_ * DIM, HEADS_, q_kernel=3, k_kernel=3, post_softmax=True, head_group=2)
    layer = layer.double()
    mine = made(
        maps=[
            {"key_query_conv": {"q_kernel": 3, "k_kernel": 3}},
            {"key_query_conv": {"q_kernel": 3, "k_kernel": 3, "place": "post"}},
            {"head_mix": {"group": 2, "place": "post"}},
        ]
    )
    with torch.no_grad():
        for own, step in zip(
            (layer.pre_kernel, layer.post_kernel, layer.post_heads), (*mine.before, *mine.after), strict=True
        ):
            own.copy_(step.kernel)  # type: ignore[union-attr]
    seen = Causal().dense(7, 7) if causal else None
    torch.testing.assert_close(mine.weights(query, key, **arguments), layer.weights(query, key, seen))

    mine = made(maps="difference")
    assert mine.difference is not None
    (q1, q2), (k1, k2) = query.chunk(2, -1), key.chunk(2, -1)
    torch.testing.assert_close(
        mine(query, key, value, **arguments),
        F.scaled_dot_product_attention(q1, k1, value, is_causal=causal, enable_gqa=True)
        - mine.difference.lam * F.scaled_dot_product_attention(q2, k2, value, is_causal=causal, enable_gqa=True),
    )


@pytest.mark.parametrize("nest", ["q", "k", "qk"])
@pytest.mark.parametrize("causal", [False, True])
def test_nesting_adds_outputs_to_queries_and_keys(nest: str, causal: bool) -> None:
    query, key, value = tokens(6, 6, HEADS_)
    level_query, level_key = query, key
    for _ in range(2):
        below = F.scaled_dot_product_attention(level_query, level_key, value, is_causal=causal)
        level_query = query + below if "q" in nest else query
        level_key = key + below if "k" in nest else key
    expected = F.scaled_dot_product_attention(level_query, level_key, value, is_causal=causal)
    module = made(maps={"nested": {"order": 3, "nest": nest}})
    torch.testing.assert_close(module(query, key, value, causal=causal), expected)
    assert module.executor(10_000, 10_000) == "fused"


def test_edges_alignment_and_temperatures() -> None:
    query, key, value = tokens(6, 6, HEADS_)
    weights = (query @ key.mT / math.sqrt(DIM)).softmax(-1)
    torch.testing.assert_close(
        made(maps={"edges": {"threshold": 0.1}})(query, key, value), (weights - 0.1).clamp_min(0) @ value
    )
    hard = made(read={"alignment": {"mode": "hard"}})
    torch.testing.assert_close(hard(query, key, value), value.gather(2, weights.argmax(-1, True).expand(-1, -1, -1, 4)))
    exact = made(read={"alignment": {"mode": "exact"}})
    expected = (weights[..., None] * value[..., None, :, :].exp()).sum(-2).log()
    torch.testing.assert_close(exact(query, key, value), expected)
    torch.testing.assert_close(made(read="alignment")(query, key, value), weights @ value)
    fixed = made(normalizer={"tempered": {"temperature": [0.5, 1.0, 2.0, 4.0]}})
    assert not list(fixed.parameters())
    temperature, scores = torch.tensor([0.5, 1.0, 2.0, 4.0]).double().view(-1, 1, 1), query @ key.mT / math.sqrt(DIM)
    torch.testing.assert_close(fixed(query, key, value), (scores / temperature).softmax(-1) @ value)
    longer = made(normalizer={"length_scaled": {"scale": [0.5, 1.0, 2.0, 4.0], "learned": True}})
    with torch.no_grad():
        longer.normalizer.log_number.copy_(temperature.flatten().log())  # type: ignore[union-attr]
    torch.testing.assert_close(longer(query, key, value), (scores * temperature * math.log(6)).softmax(-1) @ value)


@pytest.mark.parametrize("robust", [True, False])
def test_filtered_residuals_know_their_places(robust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles, with fewer queries than keys, by the formula pair by pair; the variance by its closed form."""
    monkeypatch.setattr(scored, "_TILE", 60)
    query, key, value = tokens(5, 7, HEADS_)
    module = made({"filtered": {"max_len": 8, "robust": robust}})
    system = module.scorer
    mu = (system.fading.sigmoid() - 1) * 5 / 8  # type: ignore[operator, union-attr]
    process, measured, anchor, nu = system.log_noise.exp()  # type: ignore[operator]
    rows = []
    for h, i, j in itertools.product(range(HEADS_), range(5), range(7)):
        dt = max(i + 2 - j, 0)
        fade = (mu[h] * dt).exp()
        variance = process[h] * (fade**2 - 1) / (2 * mu[h]) + measured[h] * fade**2 + anchor[h]
        misfit = (query[0, h, i] - fade * key[0, h, j]).square().sum() / (nu[h] * DIM * variance)
        rows.append(-variance.log() - (misfit.log1p() if robust else misfit))
    scores = torch.stack(rows).view(HEADS_, 5, 7)
    hidden = ~Causal().dense(5, 7)[0]
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
    torch.testing.assert_close(module(query, key, value, causal=True), expected)
    with pytest.raises(ShapeError, match="each of 2 heads"):
        compose("filtered", num_heads=2, head_dim=DIM)(query, key, value)


def test_the_share_of_pairs_is_counted() -> None:
    query, key, value = tokens(9, 9)
    near = made(heads={"long_short": {"window": 3}})
    for causal in (False, True):
        counted = (near.weights(query, key, causal=causal) != 0).double().mean()
        assert near.pairs(query, key, value, causal=causal) == pytest.approx(float(counted))
    routed = made(heads="routed")
    assert isinstance(routed.allocation, RoutedHeads)
    assert routed.pairs(query, key, value) == pytest.approx(0.75)
    uniform = routed.allocation.balance_loss(torch.ones_like(query))
    assert float(uniform) == pytest.approx(1.0)  # one of two routed heads, each with probability one half


# ---- how it is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both_sides", [False, True])
def test_tiles_bring_the_neighbouring_rows_along(both_sides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two convolutions over queries, packed documents and padding: tiles give what the whole map gives, and no tile is
    longer than its rows and their reach."""
    steps = [
        {"key_query_conv": {"q_kernel": 3, "k_kernel": 3, "both_sides": both_sides}},
        {"key_query_conv": {"q_kernel": 5, "k_kernel": 1, "place": "post", "both_sides": both_sides}},
    ]
    module = made("distance", maps=steps)
    leaves = [t.requires_grad_() for t in tokens(24, 24, batch=2)]
    rule = Document(torch.arange(24)[None] // 9) & KeyPadding(torch.arange(24).expand(2, -1) < 22)
    longest: list[int] = []
    inner = module.scorer.forward
    monkeypatch.setattr(module.scorer, "forward", lambda q, k: (longest.append(q.shape[2]), inner(q, k))[1])
    monkeypatch.setattr(scored, "_TILE", 24 * 2 * HEADS_ * 3 * 5)
    out, grads = [], []
    for form in ("whole", "tiled"):
        longest.clear()
        with use_backend(form):
            out.append(module(*leaves, causal=not both_sides, mask=rule))
            grads.append(torch.autograd.grad(out[-1].sum(), [*leaves, *module.parameters()]))
    assert max(longest) == 5 + 6
    torch.testing.assert_close(out[1], out[0])
    for tiled, whole in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(tiled, whole)


def test_packed_documents_are_apart() -> None:
    """The rows of one document are the same whether another stands before it or not."""
    module = made(maps={"key_query_conv": {"q_kernel": 4, "k_kernel": 3}})
    query, key, value = tokens(10, 10)
    packed = module(query, key, value, causal=True, mask=Document(torch.tensor([0] * 4 + [1] * 6)))
    alone = module(*(t[:, :, 4:] for t in (query, key, value)), causal=True)
    torch.testing.assert_close(packed[:, :, 4:], alone)


class Turned(MapTransform):
    """Rows upside down: any row enters any other."""

    def forward(self, maps: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
        return maps.flip(2)


def test_an_own_transform_keeps_the_map_whole() -> None:
    module = made("distance", maps=Turned())
    assert module.executor(100_000, 100_000) == "whole" and "whole" in module.describe()
    query, key, value = tokens(6, 6, HEADS_)
    with use_backend("tiled"):
        out = module(query, key, value)
    torch.testing.assert_close(out, made("distance")(query.flip(2), key, value))
    with pytest.raises(UnsupportedPatternError, match=r"Turned .* the future would reach the past"):
        module(query, key, value, causal=True)


def test_the_choices_are_told() -> None:
    module = made(
        "additive",
        maps={"key_query_conv": {"q_kernel": 2, "k_kernel": 3}},
        normalizer={"entmax": {"alpha": 1.3}},
        read="compositional",
        heads="grouped",
    )
    told = module.describe()
    for part in ("additive", "KeyQueryConv(4 heads, 2 queries x 3 keys", "entmax", "compositional", "grouped", "tiles"):
        assert part in told and part in repr(module)
    assert module.executor(16384, 16384) == "tiled" and module.executor(16, 16) == "whole"
    assert "fused" in made().describe() and made(heads="routed").executor(9, 9) == "fused"
    assert made(heads="long_short").executor(16384, 16384) == "tiled"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_errors_teach() -> None:
    for choices, error, match in (
        ({"maps": "conv"}, UnknownNameError, "key_query_conv"),
        ({"maps": {"key_conv": {"kernel": 3}}}, OptionError, "no option 'kernel'. It takes: k_kernel, place"),
        ({"maps": {"key_conv": {"k_kernel": 4}}}, OptionError, "odd"),
        ({"maps": {"key_query_conv": {"both_sides": True}}}, OptionError, "q_kernel is odd"),
        ({"maps": {"key_query_conv": {"place": "both"}}}, OptionError, "'pre' or 'post'"),
        ({"maps": {"head_mix": {"group": 3}}}, OptionError, "do not divide"),
        ({"maps": ["difference", "difference"]}, OptionError, "one MapDifference at most"),
        ({"maps": torch.nn.Identity()}, OptionError, "is a MapTransform"),
        ({"maps": {"nested": {"order": 1}}}, OptionError, "order 2 or more"),
        ({"maps": {"edges": {"mode": "soft"}}}, UnknownNameError, "adjacency mode"),
        ({"normalizer": {"entmax": {"alpha": 1.0}}}, OptionError, "above 1"),
        ({"normalizer": {"softmax": {"temperature": 2.0}}}, OptionError, "no option 'temperature'"),
        ({"normalizer": {"tempered": {"temperature": [1.0, 2.0]}}}, OptionError, "one for each of 4 heads"),
        ({"normalizer": {"tempered": {"temperature": 0.0}}}, OptionError, "positive number"),
        ({"normalizer": 3}, OptionError, "given by its name"),
        ({"read": "mean"}, UnknownNameError, "read-out named 'mean'"),
        ({"read": {"local_linear": {"ridge": 0.0}}}, OptionError, "ridge is positive"),
        ({"read": {"compositional": {"beta": -1.0}}}, OptionError, "beta is not negative"),
        ({"read": {"compositional": {"centre": "mean"}}}, OptionError, "'scale2' or 'none'"),
        ({"read": {"alignment": {"mode": "best"}}}, OptionError, "mode is one of"),
        ({"read": {"alignment": {"mode": "hard"}}, "normalizer": "relu"}, OptionError, "distribution over keys"),
        ({"heads": {"routed": {"active_fraction": 0.1}}}, OptionError, "need 0 <= shared_fraction"),
        ({"heads": {"routed": {"router": "best"}}}, OptionError, "'norm' or 'learned'"),
        ({"heads": {"grouped": {"group": 3}}}, OptionError, "do not divide"),
        ({"heads": {"long_short": {"short_fraction": 2.0}}}, OptionError, "between 0 and 1"),
        ({"heads": {"long_short": {"window": 0}}}, OptionError, "at least 1"),
        ({"score": {"low_rank": {"rank": 4}}}, OptionError, "below head_dim"),
        ({"score": {"relational": {"function": "softmax"}}}, UnknownNameError, "function named 'softmax'"),
        ({"score": {"gaussian": {"precision": -1.0}}}, OptionError, "above 0"),
        (
            {"score": {"feed_forward": {"shared_over_heads": False}}, "heads": "grouped"},
            OptionError,
            "shared_over_heads=True",
        ),
    ):
        with pytest.raises(error, match=match):
            made(**choices)
    with pytest.raises(OptionError, match="odd"):
        compose(maps="difference", head_dim=5)
    query, key, value = tokens(6, 6)
    with pytest.raises(ShapeError, match="built for 2 heads"):
        compose(heads="long_short", num_heads=2)(query, key, value)
    with pytest.raises(ShapeError, match="convolves 2 heads"):
        compose(maps="key_conv", num_heads=2)(query, key, value)
    with pytest.raises(ShapeError, match="number for each of 2 heads"):
        compose(normalizer={"tempered": {"learned": True}}, num_heads=2)(query, key, value)
    with pytest.raises(ShapeError, match="ridge for each of 2 heads"):
        compose(read="local_linear", num_heads=2)(query, key, value)
    with pytest.raises(ShapeError, match="values have as many channels"):
        made(maps="nested")(query, key, value[..., :2])
    with pytest.raises(UnsupportedPatternError, match="both_sides=False"):
        made(maps={"key_query_conv": {"q_kernel": 3, "both_sides": True}})(query, key, value, causal=True)
    with pytest.raises(UnsupportedPatternError):
        made(maps={"nested": {"nest": "k"}}).init_state(1, like=query)
