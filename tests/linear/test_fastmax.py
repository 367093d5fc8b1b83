from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.linear.fastmax import (
    Fastmax,
    FastmaxFunction,
    fastmax,
    fastmax_attention_matrix,
    gradient_bound,
    normalize_tokens,
)
from regard.masks import KeyPadding


def draw(n: int = 45, m: int | None = None, d: int = 6, dv: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    return tuple(  # type: ignore[return-value]
        torch.randn(2, 3, length, size, generator=generator, dtype=torch.float64)
        for length, size in ((n, d), (m, d), (m, dv))
    )


def by_hand(query: Tensor, key: Tensor, value: Tensor, p: int, causal: bool, temperature: float = 1.0) -> Tensor:
    """The definition, a pair at a time, with the norms of the paper's code (each token's own where causal)."""

    def hat(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        norms = x.norm(dim=-1, keepdim=True)
        return x / (norms if causal else norms.amax(2, keepdim=True))

    q, k = hat(query), hat(key)
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for i in range(query.shape[2]):
        weights, total = torch.zeros_like(out[:, :, 0]), torch.zeros_like(out[:, :, 0, :1])
        for j in range(i + 1 if causal else key.shape[2]):
            s = (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True) / temperature
            f = sum((s**power / math.factorial(power) for power in range(p + 1)), torch.zeros_like(s))
            weights, total = weights + f * value[:, :, j], total + f
        out[:, :, i] = weights / total
    return out


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_factorised_and_dense_are_the_definition(p: int, causal: bool) -> None:
    query, key, value = draw(21)
    wanted = by_hand(query, key, value, p, causal, 0.7)
    for method in ("factorized", "dense", "auto"):
        out = fastmax(query, key, value, p, causal, temperature=0.7, method=method, chunk_size=8)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 16, 45, 200])
def test_chunks_change_nothing(p: int, chunk: int) -> None:
    query, key, value = draw(45)
    for causal in (False, True):
        dense = fastmax(query, key, value, p, causal, method="dense")
        factorised = fastmax(query, key, value, p, causal, chunk_size=chunk)
        torch.testing.assert_close(factorised, dense, rtol=0, atol=1e-12)


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_rows_are_distributions(p: int, causal: bool) -> None:
    for seed in range(5):
        query, key, _ = draw(30, d=3, seed=seed)
        weights = fastmax_attention_matrix(query, key, p, causal)
        assert bool((weights >= -1e-12).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
        if causal:
            assert not bool(weights.triu(1).any())


@pytest.mark.paper("fastmax")
def test_second_degree_is_positive_for_every_score() -> None:
    query, key, _ = draw(30)
    assert bool((fastmax_attention_matrix(50 * query, key, 2, normalize="none") > 0).all())
    assert bool((fastmax_attention_matrix(50 * query, key, 1, normalize="none") < 0).any())


@pytest.mark.paper("fastmax")
def test_error_against_softmax_falls_with_the_degree() -> None:
    """Gaussian queries and keys, 256 tokens of 32 channels: largest difference of weights from softmax's."""
    query, key, _ = draw(256, d=32)
    scores = normalize_tokens(query) @ normalize_tokens(key).transpose(-1, -2)
    worst = [
        float((fastmax_attention_matrix(query, key, p) - scores.softmax(-1)).abs().max() / scores.softmax(-1).max())
        for p in (1, 2, 3)
    ]
    assert worst[0] > 4 * worst[1] > 16 * worst[2]
    # The remainder of the series: |exp(s) - f(s)| <= exp(b) b^(p + 1) / (p + 1)!, for numerator and denominator.
    reach = float(scores.abs().max())
    for p, error in zip((1, 2, 3), worst, strict=True):
        assert error <= 2 * math.exp(3 * reach) * reach ** (p + 1) / math.factorial(p + 1)


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("zero", ["query", "key"])
def test_zero_queries_or_keys_give_means(p: int, zero: str) -> None:
    query, key, value = draw()
    query, key = (torch.zeros_like(t) if name == zero else t for name, t in (("query", query), ("key", key)))
    prefix = value.cumsum(2) / torch.arange(1, 46, dtype=torch.float64)[:, None]
    for method in ("factorized", "dense"):
        out = fastmax(query, key, value, p, method=method)
        torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out), rtol=0, atol=1e-12)
        out = fastmax(query, key, value, p, causal=True, method=method, chunk_size=16)
        torch.testing.assert_close(out, prefix, rtol=0, atol=1e-12)


@pytest.mark.paper("fastmax")
def test_degree_zero_ignores_queries_and_keys() -> None:
    query, key, value = draw()
    for causal in (False, True):
        for method in ("factorized", "dense"):
            out = fastmax(query, key, value, 0, causal, method=method)
            other = fastmax(torch.randn_like(query), torch.randn_like(key), value, 0, causal, method=method)
            torch.testing.assert_close(out, other, rtol=0, atol=1e-12)


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("normalize", ["maxnorm", "standard", "none"])
def test_no_leak_from_the_future(normalize: str) -> None:
    """Later tokens of any size move nothing before them: the norm is each token's own."""
    query, key, value = draw()
    for method in ("factorized", "dense"):
        before = fastmax(query, key, value, 2, True, normalize, method=method, chunk_size=8)
        later = [torch.cat((t[:, :, :20], 100 * torch.randn_like(t[:, :, 20:])), 2) for t in (query, key, value)]
        after = fastmax(*later, 2, True, normalize, method=method, chunk_size=8)
        torch.testing.assert_close(after[:, :, :20], before[:, :, :20], rtol=0, atol=1e-12)
        assert float((after - before)[:, :, 20:].abs().max()) > 1e-2


@pytest.mark.paper("fastmax")
def test_maxnorm() -> None:
    """Largest norm one over a head, ratios of norms and directions of the centred tokens kept."""
    query, *_ = draw()
    hat, centred = normalize_tokens(query), query - query.mean(-1, keepdim=True)
    torch.testing.assert_close(hat.norm(dim=-1).amax(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(hat * centred.norm(dim=-1).amax(-1)[..., None, None], centred)
    torch.testing.assert_close(normalize_tokens(1e150 * query), hat)
    own = normalize_tokens(query, causal=True)
    torch.testing.assert_close(own.norm(dim=-1), torch.ones(2, 3, 45, dtype=torch.float64))
    standard = normalize_tokens(query, "standard")
    torch.testing.assert_close(standard, centred / query.std(-1, unbiased=False, keepdim=True))


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0, 1, 2])
def test_custom_backward_is_autograd(p: int, causal: bool) -> None:
    query, key, value = (0.5 * t.requires_grad_() for t in draw(23))
    sums = FastmaxFunction.apply(query, key, value, p, causal, 8)
    kernel = sum(
        ((query @ key.transpose(-1, -2)) ** power / math.factorial(power) for power in range(p + 1)),
        torch.zeros((), dtype=torch.float64),
    )
    wanted = (kernel.tril() if causal else kernel) @ value
    torch.testing.assert_close(sums, wanted, rtol=0, atol=1e-11)
    seed = torch.randn_like(wanted)
    theirs = torch.autograd.grad(wanted, (query, key, value), seed, allow_unused=True)
    for ours, grad in zip(torch.autograd.grad(sums, (query, key, value), seed), theirs, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if grad is None else grad, rtol=0, atol=1e-10)


@pytest.mark.paper("fastmax")
def test_backward_keeps_inputs_alone() -> None:
    """What autograd stores does not grow with the number of features."""
    query, key, value = (t.requires_grad_() for t in draw(64, d=12))
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        FastmaxFunction.apply(query, key, value, 2, True, 16)
    assert kept == query.numel() + key.numel() + value.numel()


@pytest.mark.paper("fastmax")
def test_sensitivity_is_bounded() -> None:
    """Against the derivative itself, and against the bound 8 / M of degree 2."""
    for m in (8, 64, 512):
        query, key, _ = draw(4, m, d=5)
        found = gradient_bound(query, key, 2)
        assert found.largest <= found.bound <= 8 / m + 1e-12
    scores = (normalize_tokens(query) @ normalize_tokens(key).transpose(-1, -2))[0, 0, 0].requires_grad_()

    def worst(scores: Tensor) -> float:
        kernel = 1 + scores + scores**2 / 2
        slopes = []
        for j in range(len(scores)):
            # Values that are 1 at key j and -1 elsewhere move the output most.
            values = torch.full_like(scores, -1).scatter(0, torch.tensor([j]), 1.0)
            out = (kernel / kernel.sum()) @ values
            slopes.append(float(torch.autograd.grad(out, scores, retain_graph=True)[0][j].abs()))
        return max(slopes)

    row = gradient_bound(query[:1, :1, :1], key[:1, :1], 2)
    alone = (normalize_tokens(query[:1, :1, :1]) @ normalize_tokens(key[:1, :1]).transpose(-1, -2))[0, 0, 0]
    assert worst(alone.requires_grad_()) == pytest.approx(row.largest, rel=1e-9)
    assert worst(scores) <= found.largest + 1e-12
    assert gradient_bound(query, key, 1).bound > gradient_bound(query, key, 1, temperature=2.0).bound


@pytest.mark.paper("fastmax")
@pytest.mark.parametrize("p", [1, 2])
def test_padding_leaves_no_trace(p: int) -> None:
    """A padded sequence, however large its padding, gives what the sequence alone gives."""
    query, key, value = draw(30)
    padded = [torch.cat((t[:, :, :19], 50 * torch.randn_like(t[:, :, 19:])), 2) for t in (query, key, value)]
    valid = (torch.arange(30) < 19).expand(2, -1)
    for method in ("factorized", "dense"):
        for causal in (False, True):
            module = Fastmax(p, method=method, chunk_size=8)
            out = module(*padded, causal=causal, mask=KeyPadding(valid))[:, :, :19]
            alone = module(*(t[:, :, :19] for t in (query, key, value)), causal=causal)
            torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)


@pytest.mark.paper("fastmax")
def test_decoding_resumes_from_a_prompt() -> None:
    """A prompt in one piece, then tokens one by one; the state is a sum and can be kept and continued twice."""
    query, key, value = draw(40)
    module = Fastmax(2, chunk_size=16)
    whole = module(query, key, value, causal=True)
    state = module.init_state(2, like=query)
    out, state = module.step(query[:, :, :29], key[:, :, :29], value[:, :, :29], state)
    torch.testing.assert_close(out, whole[:, :, :29], rtol=0, atol=1e-12)
    assert state is not None and state.sum.shape == (2, 3, 1 + 6 + 21, 4 + 1)
    for _ in range(2):
        run = state
        for t in range(29, 40):
            token = (x[:, :, t : t + 1] for x in (query, key, value))
            out, run = module.step(*token, run)  # type: ignore[assignment]
            torch.testing.assert_close(out, whole[:, :, t : t + 1], rtol=0, atol=1e-12)


def test_teaching_errors() -> None:
    query, key, value = draw(5)
    with pytest.raises(OptionError, match="maxnorm"):
        Fastmax(normalize="max")
    with pytest.raises(OptionError, match="dense"):
        fastmax(query, key, value, 3)
    with pytest.raises(OptionError, match="temperature"):
        Fastmax(temperature=0.0)
    with pytest.raises(OptionError, match="up to 2"):
        Fastmax(p=3)
    with pytest.raises(ShapeError, match="step"):
        fastmax(query[:, :, :3], key, value, causal=True)
