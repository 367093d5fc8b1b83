"""Probabilistic attention against dot-product attention, explicit mixtures of torch.distributions and loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from regard.bench.interactive import foreground_iou
from regard.dense.probabilistic_attention import (
    AxialProbabilisticAttention2d,
    PairPositions,
    ProbabilisticAttention,
    ProbabilisticSelfAttention,
    adapt_keys,
    mixture_log_likelihood,
    probabilistic_attention,
)
from regard.errors import OptionError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.kernels import scored, use_backend
from regard.masks import KeyPadding

DIM = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(length: int = 7, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(2, heads, length, DIM, seed=seed),
        draw(2, heads, length, DIM, seed=seed + 1),
        draw(2, heads, length, 3, seed=seed + 2),
    )


def gaussian(x: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """The exponent of a Gaussian, from its density."""
    deviation = precision.rsqrt().expand_as(mean)
    return Normal(mean, deviation).log_prob(x).sum() - Normal(mean, deviation).log_prob(mean).sum()


def responsibilities(q: Tensor, k: Tensor, alpha: Tensor, pi: Tensor, start: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Of one head, pair by pair; alpha and beta by key."""
    w = torch.empty(len(q), len(k), dtype=q.dtype)
    for i in range(len(q)):
        for j in range(len(k)):
            log = gaussian(q[i], k[j], alpha[j]) + gaussian(start[i], v[j], beta[j])
            w[i, j] = pi[i, j] * log.exp()
    return w / w.sum(1, keepdim=True)


@pytest.mark.paper("probabilistic_attention")
@pytest.mark.parametrize("causal", [False, True])
def test_the_magnitude_prior_gives_dot_product_attention(causal: bool) -> None:
    query, key, value = qkv()
    out = probabilistic_attention(query, key, value, alpha=DIM**-0.5, beta=0, magnitude_prior=True, causal=causal)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert (out - expected).abs().max() < 1e-12
    per_key = torch.full((1, 1, 7), DIM**-0.5, dtype=torch.float64)
    out = probabilistic_attention(query, key, value, per_key, magnitude_prior=True, causal=causal)
    assert (out - expected).abs().max() < 1e-12
    assert (probabilistic_attention(query, key, value, causal=causal) - expected).abs().max() > 0.01


@pytest.mark.paper("probabilistic_attention")
def test_weights_are_the_responsibilities_of_the_mixture() -> None:
    """Precisions by key, a prior for each pair and initial values, against densities pair by pair."""
    query, key, value = qkv(5)
    alpha, beta = draw(2, 2, 5, seed=5).exp(), draw(2, 2, 5, seed=6).exp()
    prior, start = draw(2, 2, 5, 5, seed=7).exp(), draw(2, 2, 5, 3, seed=8)
    out = probabilistic_attention(query, key, value, alpha, beta, prior=prior, value_init=start)
    for b in range(2):
        for h in range(2):
            parts = (query, key, alpha, prior, start, value, beta)
            w = responsibilities(*(part[b, h] for part in parts))
            torch.testing.assert_close(out[b, h], w @ value[b, h], atol=1e-12, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_initial_values_under_the_magnitude_prior() -> None:
    query, key, value = qkv()
    start, beta = draw(2, 2, 7, 3, seed=8), 0.7
    logits = DIM**-0.5 * query @ key.mT + beta * start @ value.mT
    for given in (beta, torch.full((1, 1, 7), beta, dtype=torch.float64)):
        out = probabilistic_attention(query, key, value, beta=given, magnitude_prior=True, value_init=start)
        torch.testing.assert_close(out, logits.softmax(-1) @ value, atol=1e-12, rtol=0)


def mixture(key: Tensor, pi: Tensor, alpha: float) -> MixtureSameFamily:
    means = Independent(Normal(key, torch.full_like(key, alpha**-0.5)), 1)
    return MixtureSameFamily(Categorical(probs=pi), means)


@pytest.mark.paper("probabilistic_attention")
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_em_of_the_keys_never_lowers_the_likelihood(alpha: float) -> None:
    query, key, _ = qkv(12)
    pi = draw(12, seed=9).exp()
    pi = pi / pi.sum()
    for prior, given in ((torch.full((12,), 1 / 12, dtype=torch.float64), None), (pi, pi[None, None, None])):
        likelihoods = []
        for iters in range(7):
            keys = adapt_keys(query, key, alpha, iters=iters, prior=given)
            per_head = [
                torch.stack([mixture(keys[b, h], prior, alpha).log_prob(query[b, h]).sum() for h in range(2)])
                for b in range(2)
            ]
            likelihoods.append(torch.stack(per_head))
            torch.testing.assert_close(mixture_log_likelihood(query, keys, alpha, given), likelihoods[-1])
        steps = torch.stack(likelihoods).diff(dim=0)
        assert steps.min() >= -1e-10
        assert steps[0].min() > 0.1


@pytest.mark.paper("probabilistic_attention")
def test_a_step_of_the_keys_is_the_weighted_mean_with_its_prior() -> None:
    query, key, value = qkv(5)
    alpha, c = draw(1, 2, 5, seed=5).exp(), draw(1, 2, 5, seed=6).exp()
    none = torch.zeros(5, dtype=torch.float64)
    for precision in (None, c):
        got = adapt_keys(query, key, alpha, key_prior_precision=precision)
        out = probabilistic_attention(query, key, value, alpha, key_iters=1, key_prior_precision=precision)
        for b in range(2):
            for h in range(2):
                q, k, v, a = query[b, h], key[b, h], value[b, h], alpha[0, h]
                pi = torch.ones(5, 5, dtype=torch.float64)
                w = responsibilities(q, k, a, pi, v, v, none + 1e-300)
                new = torch.empty_like(k)
                for j in range(5):
                    strong = 0.0 if precision is None else float(c[0, h, j])
                    top = strong * k[j] + a[j] * sum(w[i, j] * q[i] for i in range(5))
                    new[j] = top / (strong + a[j] * w[:, j].sum())
                torch.testing.assert_close(got[b, h], new, atol=1e-11, rtol=0)
                w = responsibilities(q, new, a, pi, v, v, none + 1e-300)
                torch.testing.assert_close(out[b, h], w @ v, atol=1e-11, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_strong_priors_and_missing_annotations_change_nothing() -> None:
    query, key, value = qkv()
    assert torch.equal(adapt_keys(query, key, iters=3, key_prior_precision=math.inf), key)
    torch.testing.assert_close(adapt_keys(query, key, key_prior_precision=1e12), key, atol=1e-10, rtol=0)
    plain = probabilistic_attention(query, key, value)
    # Values at places that are not annotated are read nowhere, whatever they hold.
    nothing, unknown = torch.zeros(2, 2, 7, dtype=torch.bool), torch.full((2, 2, 7, 3), math.nan, dtype=torch.float64)
    for precision in (None, 0.0, 1.0):
        out = probabilistic_attention(
            query,
            key,
            value,
            beta=2.0,
            value_fixed=unknown,
            fixed_mask=nothing,
            value_iters=3,
            value_prior_precision=precision,
        )
        assert torch.equal(out, plain)


@pytest.mark.paper("probabilistic_attention")
def test_an_annotated_unit_moves_its_value_toward_the_label() -> None:
    """All responsibility on one unit: the update in closed form, and the others stay."""
    key = 10 * torch.eye(6, DIM + 2, dtype=torch.float64)[None, None]
    value, label = draw(1, 1, 6, 3), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    known, where = torch.zeros(1, 1, 6, 3, dtype=torch.float64), torch.zeros(1, 1, 6, dtype=torch.bool)
    known[0, 0, 2], where[0, 0, 2] = label, True
    beta, c = 3.0, 0.5
    out = probabilistic_attention(
        key,
        key,
        value,
        alpha=10.0,
        beta=beta,
        value_fixed=known,
        fixed_mask=where,
        value_iters=1,
        value_prior_precision=c,
    )
    expected = value.clone()
    expected[0, 0, 2] = (c * value[0, 0, 2] + beta * label) / (c + beta)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    without_prior = probabilistic_attention(
        key, key, value, 10.0, 3.0, value_fixed=known, fixed_mask=where, value_iters=1
    )
    torch.testing.assert_close(without_prior[0, 0, 2], label, atol=1e-12, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_an_annotation_raises_the_iou_of_its_neighbours() -> None:
    """Pixels of a blob that look alike: one label on one of them turns the others, and not the background."""
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, 1:5, 2:7] = 1
    features = torch.where(target.flatten()[:, None] == 1, 1.5, -1.5) + 0.5 * draw(64, DIM)
    tokens = features[None, None]
    value = torch.tensor([0.6, 0.4], dtype=torch.float64).expand(1, 1, 64, 2)  # everything is background at first
    known, where = torch.zeros(1, 1, 64, 2, dtype=torch.float64), torch.zeros(1, 1, 64, dtype=torch.bool)
    known[0, 0, 2 * 8 + 4, 1], where[0, 0, 2 * 8 + 4] = 1.0, True
    ious = []
    for iters in (0, 1):
        out = probabilistic_attention(
            tokens,
            tokens,
            value,
            beta=1.0,
            value_fixed=known,
            fixed_mask=where,
            value_iters=iters,
            value_prior_precision=0.05,
        )
        ious.append(float(foreground_iou(out.argmax(-1).view(1, 8, 8), target)))
    assert ious[0] == 0
    assert ious[1] > 0.9


@pytest.mark.paper("probabilistic_attention")
def test_distances_ignore_a_translation_and_dot_products_do_not() -> None:
    query, key, value = qkv()
    shift = draw(DIM, seed=4)
    for options in ({}, {"key_iters": 2}):
        out = probabilistic_attention(query, key, value, **options)  # type: ignore[arg-type]
        moved = probabilistic_attention(query + shift, key + shift, value, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(moved, out, atol=1e-12, rtol=0)
    # Keys of one norm: moved, both attentions still have the same keys and queries, and only distances agree.
    unit = F.normalize(key, dim=-1)
    same, other = (
        (
            probabilistic_attention(query, unit, value, magnitude_prior=prior)
            - probabilistic_attention(query + shift, unit + shift, value, magnitude_prior=prior)
        )
        .abs()
        .max()
        for prior in (False, True)
    )
    assert same < 1e-12 < 0.01 < other
    # And with keys of one norm the prior is the same for all of them.
    torch.testing.assert_close(
        probabilistic_attention(query, unit, value, magnitude_prior=True),
        probabilistic_attention(query, unit, value),
        atol=1e-12,
        rtol=0,
    )


def positions(length: int, seed: int = 20) -> PairPositions:
    return PairPositions(*(draw(length, length, dim, seed=seed + n) for n, dim in enumerate((DIM, DIM, 3))))


@pytest.mark.paper("probabilistic_attention")
def test_relative_positions_meet_queries_keys_and_values() -> None:
    query, key, value = qkv(5)
    r, alpha = positions(5), 0.6
    assert r.query is not None and r.key is not None and r.value is not None
    for magnitude in (False, True):
        out = probabilistic_attention(query, key, value, alpha, pos_emb=r, magnitude_prior=magnitude)
        for b, h, i in ((0, 0, 0), (1, 0, 3), (1, 1, 4)):
            logits = torch.empty(5, dtype=torch.float64)
            for j in range(5):
                q, k = query[b, h, i], key[b, h, j]
                if magnitude:  # the sum of products that axial attention with relative positions has
                    logits[j] = alpha * (q @ k + q @ r.query[i, j] + k @ r.key[i, j])
                else:
                    squares = ((q - k) ** 2 + (q - r.query[i, j]) ** 2 + (k - r.key[i, j]) ** 2).sum()
                    logits[j] = -alpha / 2 * squares
            expected = logits.softmax(0) @ (value[b, h] + r.value[i])
            torch.testing.assert_close(out[b, h, i], expected, atol=1e-12, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_known_values_are_compared_without_their_position() -> None:
    """What an annotated place says of a unit is its label less the offset that the unit's value would get there."""
    query, key, value = qkv(5, heads=1)
    offsets = positions(5).value
    assert offsets is not None
    where, label = torch.zeros(1, 1, 5, dtype=torch.bool), draw(2, 1, 5, 3, seed=30)
    where[..., [1, 4]] = True
    beta, c = 0.8, 0.3
    out = probabilistic_attention(
        query,
        key,
        value,
        beta=beta,
        value_fixed=label,
        fixed_mask=where,
        value_iters=2,
        value_prior_precision=c,
        pos_emb=PairPositions(value=offsets),
        clamp_output=True,
    )
    w = (-(DIM**-0.5) / 2 * torch.cdist(query, key) ** 2).softmax(-1)[:, 0]
    v = value[:, 0].clone()
    for _ in range(2):
        new = torch.empty_like(v)
        for j in range(5):
            heard = sum(w[:, i, j, None] * (label[:, 0, i] - offsets[i, j]) for i in (1, 4))
            new[:, j] = (c * v[:, j] + beta * heard) / (c + beta * (w[:, 1, j] + w[:, 4, j]))[:, None]
        v = new
    expected = w @ v + torch.einsum("bij,ijd->bid", w, offsets)
    expected[:, [1, 4]] = label[:, 0, [1, 4]]
    torch.testing.assert_close(out[:, 0], expected, atol=1e-11, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_initial_values_are_weighed_against_propagated_ones() -> None:
    """With initial values, responsibilities follow the values that the annotations moved."""
    query, key, value = qkv(5, heads=1)
    start, label = draw(2, 1, 5, 3, seed=31), draw(2, 1, 5, 3, seed=32)
    where = torch.tensor([True, False, True, False, False]).view(1, 1, 5)
    out = probabilistic_attention(
        query, key, value, beta=0.9, value_init=start, value_fixed=label, fixed_mask=where, value_iters=1
    )

    def weights(v: Tensor) -> Tensor:
        squares = DIM**-0.5 * torch.cdist(query, key) ** 2 + 0.9 * torch.cdist(start, v) ** 2
        return (-squares / 2).softmax(-1)

    w = weights(value)[:, :, [0, 2]]
    moved = (w / w.sum(-2, keepdim=True)).mT @ label[:, :, [0, 2]]
    torch.testing.assert_close(out, weights(moved) @ moved, atol=1e-11, rtol=0)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.paper("probabilistic_attention")
def test_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the keys, a step of the values and reading, forward and backward, hold a tile's map and no more."""
    monkeypatch.setattr(scored, "_TILE", 1 << 12)
    length = 512
    query, key, value = (torch.randn(1, 1, length, 2, requires_grad=True) for _ in range(3))
    where = torch.zeros(1, 1, length, dtype=torch.bool)
    where[..., ::100] = True
    with _Largest() as largest:
        out = probabilistic_attention(
            query, key, value, key_iters=1, value_iters=1, value_fixed=value.detach(), fixed_mask=where
        )
        out.sum().backward()
    assert query.grad is not None and key.grad is not None
    assert largest.numel <= 1 << 12


@pytest.mark.paper("probabilistic_attention")
def test_tiles_give_the_numbers_of_the_whole_map() -> None:
    options = {
        "alpha": draw(1, 2, 9, seed=5).exp(),
        "beta": 0.8,
        "prior": draw(1, 2, 9, 9, seed=6).exp(),
        "value_init": draw(2, 2, 9, 3, seed=7),
        "value_fixed": draw(2, 2, 9, 3, seed=8),
        "fixed_mask": (draw(2, 1, 9, seed=9) > 0).expand(2, 2, 9),
        "pos_emb": positions(9),
        "key_iters": 2,
        "value_iters": 2,
        "key_prior_precision": 0.3,
        "value_prior_precision": 0.4,
    }
    results = []
    for form in ("whole", "tiled"):
        leaves = [part.requires_grad_() for part in qkv(9)]
        with use_backend(form):
            out = probabilistic_attention(*leaves, **options)  # type: ignore[arg-type]
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, atol=1e-10, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_adaptation_is_differentiable() -> None:
    parts = [part[:1, :1].clone().requires_grad_() for part in qkv(4)]
    label, where = draw(1, 1, 4, 3, seed=3), torch.tensor([[[True, False, False, True]]])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return probabilistic_attention(
            query,
            key,
            value,
            beta=0.6,
            value_fixed=label,
            fixed_mask=where,
            key_iters=2,
            value_iters=1,
            value_prior_precision=0.5,
            key_prior_precision=0.2,
        )

    assert torch.autograd.gradcheck(attend, parts)


@pytest.mark.paper("probabilistic_attention")
def test_masked_units_and_tokens_have_no_part() -> None:
    query, key, value = qkv()
    real = torch.ones(2, 7, dtype=torch.bool)
    real[:, 5:] = False
    out = probabilistic_attention(query, key, value, key_iters=2, mask=KeyPadding(real))
    short = probabilistic_attention(*(part[:, :, :5] for part in (query, key, value)), key_iters=2)
    torch.testing.assert_close(out[:, :, :5], short, atol=1e-12, rtol=0)
    # A prior of zero leaves a unit out as a mask does, however near it is.
    prior = real[:, None, None].double()
    out = probabilistic_attention(query, key, value, prior=prior)
    torch.testing.assert_close(out, probabilistic_attention(query, key, value, mask=real[:, None, None]))
    assert torch.equal(
        probabilistic_attention(query, key, value, prior=torch.zeros(7, 7, dtype=torch.float64)),
        torch.zeros_like(value),
    )


@pytest.mark.paper("probabilistic_attention")
def test_the_mechanism_adapts_at_inference_alone() -> None:
    query, key, value = qkv()
    made = ProbabilisticAttention(key_iters=2)
    plain = probabilistic_attention(query, key, value)
    assert torch.equal(made.train()(query, key, value), plain)
    adapted = made.eval()(query, key, value)
    torch.testing.assert_close(adapted, probabilistic_attention(query, key, value, key_iters=2))
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(made.weights(query, key) @ value, adapted)
    with pytest.raises(UnsupportedPatternError):
        made(query, key, value, causal=True)
    narrow = ProbabilisticAttention()(query, key, value, scale=2.0)
    torch.testing.assert_close(narrow, probabilistic_attention(query, key, value, 2.0))


@pytest.mark.paper("probabilistic_attention")
def test_the_layer_projects_adapts_and_learns_precisions() -> None:
    torch.manual_seed(0)
    made = ProbabilisticSelfAttention(8, 2, key_iters=1, value_iters=1, value_prior_precision=0.5).double()
    x, where = draw(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    where[:, 2] = True
    label = draw(2, 6, 8, seed=3)

    def heads(t: Tensor) -> Tensor:
        return t.view(2, 6, 2, 4).transpose(1, 2)

    def attended(**options: object) -> Tensor:
        parts = [heads(m(x)) for m in (made.query, made.key, made.value)]
        out = probabilistic_attention(*parts, beta=1.0, **options)  # type: ignore[arg-type]
        return made.out(out.transpose(1, 2).flatten(2))

    assert torch.equal(made.train()(x, value_fixed=label, fixed_mask=where), attended())
    expected = attended(
        value_fixed=heads(label),
        fixed_mask=where[:, None],
        key_iters=1,
        value_iters=1,
        value_prior_precision=0.5,
    )
    torch.testing.assert_close(made.eval()(x, value_fixed=label, fixed_mask=where), expected)
    with pytest.raises(UnsupportedPatternError):
        made(x, causal=True)
    for kind in ("head", "key"):
        learned = ProbabilisticSelfAttention(8, 2, precision=kind).double()  # type: ignore[arg-type]
        fixed = ProbabilisticSelfAttention(8, 2).double()
        learned.load_state_dict(fixed.state_dict(), strict=False)
        torch.testing.assert_close(learned(x), fixed(x))
        learned(x).square().sum().backward()
        grads = [p.grad for name, p in learned.named_parameters() if "precision" in name]
        assert grads and all(g is not None and g.abs().max() > 0 for g in grads)


@pytest.mark.paper("probabilistic_attention")
def test_the_axial_feature_attends_within_rows_and_then_columns() -> None:
    """With the magnitude prior it is axial attention with relative positions, written out place by place."""
    torch.manual_seed(0)
    made = AxialProbabilisticAttention2d(6, 2, max_size=5, magnitude_prior=True).double()
    x = draw(1, 6, 3, 4)
    maps = x[0].permute(1, 2, 0)  # (height, width, channels)
    for part, along in ((made.rows, 1), (made.columns, 0)):
        query, key, value = part.project(maps).view(3, 4, 3, 2, 3).unbind(2)
        out = torch.empty(3, 4, 2, 3, dtype=torch.float64)
        for row in range(3):
            for column in range(4):
                here = (row, column)
                line = [(row, c) for c in range(4)] if along else [(r, column) for r in range(3)]
                near = [part.tables[:, here[along] - other[along] + 4] for other in line]
                for h in range(2):
                    q = query[row, column, h]
                    logits = [q @ key[p][h] + q @ r[0] + key[p][h] @ r[1] for p, r in zip(line, near, strict=True)]
                    w = (torch.stack(logits) / 3**0.5).softmax(0)
                    out[row, column, h] = w @ torch.stack([value[p][h] + r[2] for p, r in zip(line, near, strict=True)])
        maps = part.out(out.flatten(2))
    torch.testing.assert_close(made(x)[0], maps.permute(2, 0, 1), atol=1e-12, rtol=0)


@pytest.mark.paper("probabilistic_attention")
def test_the_axial_feature_adapts_and_takes_annotations() -> None:
    torch.manual_seed(0)
    made = AxialProbabilisticAttention2d(6, 2, max_size=5, key_iters=1, value_iters=1).double()
    x, where = draw(2, 6, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool)
    plain = made.train()(x)
    adapted = made.eval()(x)
    assert (adapted - plain).abs().max() > 1e-3
    known = (draw(2, 6, 3, 4, seed=1), draw(2, 6, 3, 4, seed=2))
    assert torch.equal(made(x, known, where), adapted)
    where[0, 1, 2] = True
    changed = made(x, known, where)
    assert torch.equal(changed[1], adapted[1])
    # The row of the annotated place hears of it in the first pass, and the columns pass that on.
    assert ((changed - adapted)[0].abs().amax(0) > 0).all()
    with pytest.raises(ShapeError, match="max_size"):
        made(draw(1, 6, 3, 6))


@pytest.mark.paper("probabilistic_attention")
def test_calls_that_make_no_sense_are_explained() -> None:
    query, key, value = qkv()
    where = torch.zeros(2, 2, 7, dtype=torch.bool)
    with pytest.raises(OptionError, match="fixed_mask"):
        probabilistic_attention(query, key, value, value_fixed=value)
    with pytest.raises(ShapeError, match="value_fixed"):
        probabilistic_attention(query, key, value, value_fixed=value[:, :, :3], fixed_mask=where)
    with pytest.raises(ShapeError, match="boolean"):
        probabilistic_attention(query, key, value, value_fixed=value, fixed_mask=where[0], value_iters=1)
    with pytest.raises(OptionError, match="key_iters"):
        probabilistic_attention(query, key, value, key_iters=-1)
    with pytest.raises(OptionError, match="precision"):
        adapt_keys(query, key, key_prior_precision=-1.0)
    with pytest.raises(UnsupportedPatternError):
        probabilistic_attention(query, key, value, key_iters=1, causal=True)
    with pytest.raises(UnsupportedPatternError, match="value_iters"):
        probabilistic_attention(query, key, value, value_fixed=value, fixed_mask=where, value_iters=1, causal=True)
    with pytest.raises(UnsupportedMaskError):
        probabilistic_attention(query, key, value, mask=torch.zeros(7, 7))
    with pytest.raises(OptionError, match="precision"):
        ProbabilisticSelfAttention(8, 2, precision="pixel")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="feature"):
        AxialProbabilisticAttention2d(6)(draw(1, 5, 3, 3))
