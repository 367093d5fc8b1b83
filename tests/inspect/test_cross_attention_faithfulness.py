"""Cross-attention and saliency by masks: models whose reliance is known, and agreement by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, ShapeError
from regard.inspect.cross_attention_faithfulness import (
    agreement_report,
    cluster_regions,
    cross_attention_map,
    encoder_saliency,
    explained_relevance,
    grid_regions,
    perturbation_saliency,
    pool_saliency,
)
from regard.inspect.saliency import deletion_curve, presence
from regard.models.cross_attention_faithfulness import TinyS2T


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Listener(nn.Module):
    """Row ``k`` reads frames ``2 k`` and ``2 k + 1`` alone, and the inputs up to ``k``."""

    def __init__(self, steps: int = 4, features: int = 3, vocab: int = 5) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocab, 6), nn.Linear(6, vocab)
        self.front = nn.Linear(2 * features, 6, bias=False)
        self.steps = steps

    def encode(self, x: Tensor) -> Tensor:
        """A frame of silence gives a state of zeros: nothing mixes, nothing is added."""
        return self.front(x.unflatten(1, (self.steps, 2)).flatten(2))

    def decode(self, memory: Tensor, inputs: Tensor) -> Tensor:
        past = self.embedding(inputs).cumsum(1)
        return self.out(torch.tanh(memory[:, : inputs.shape[1]] + past))

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        return self.decode(self.encode(x), inputs)


def listener() -> tuple[Listener, Tensor, Tensor]:
    return Listener().double(), normal(8, 3), torch.tensor([0, 3, 1, 4])


@pytest.mark.paper("cross_attention_faithfulness")
@pytest.mark.parametrize("masks", ["grid", "cluster"])
def test_what_the_model_ignores_has_no_saliency(masks: str) -> None:
    model, x, inputs = listener()
    found = perturbation_saliency(model, x, inputs, masks, 4000, segments=(24,), generator=seeded())  # type: ignore[arg-type]
    assert found.shape == (4, 8, 3)
    own = torch.arange(8) // 2 == torch.arange(4)[:, None]
    if masks == "grid":  # one cell a region
        heard, unheard = (found.abs().amax(-1) * where for where in (own, ~own))
        assert bool((unheard.amax(-1) < 0.2 * heard.amax(-1)).all())
    # A feature without a weight is nothing to any row, but for the masks that fell on others.
    with torch.no_grad():
        model.front.weight[:, [1, 4]] = 0
    found = perturbation_saliency(model, x, inputs, "grid", 2000, segments=(24,), generator=seeded())
    spread = found[..., [0, 2]].abs().amax()
    assert float(found[..., 1].abs().amax()) < 0.1 * float(spread)
    deaf = perturbation_saliency(lambda x, t: model(0 * x, t), x, inputs, n_masks=50, generator=seeded())
    assert float(deaf.abs().max()) == 0


@pytest.mark.paper("cross_attention_faithfulness")
def test_saliency_is_the_mean_change_over_all_masks() -> None:
    """Against every subset of four regions, in loops."""
    model, x, inputs = listener()
    regions = torch.arange(8) // 2
    model.requires_grad_(False)
    model.out.weight.mul_(6)  # sure of its answers, so that the divergence is far from the one the other way round
    whole = model(x[None], inputs[None])[0].softmax(-1)
    expected, fallen = torch.zeros(2, 4, 4, dtype=torch.float64)
    for subset in range(16):
        kept = [bool(subset >> j & 1) for j in range(4)]
        masked = model((x * torch.tensor(kept)[regions, None])[None], inputs[None])[0].softmax(-1)
        kl = (whole * (whole / masked).log()).sum(-1)
        less_likely = torch.stack([whole[k, whole[k].argmax()] - masked[k, whole[k].argmax()] for k in range(4)])
        for j in range(4):
            expected[:, j] += kl * (-1 if kept[j] else 1) / 8
            fallen[:, j] += less_likely * (-1 if kept[j] else 1) / 8
    found = perturbation_saliency(model, x, inputs, regions, 20000, generator=seeded())
    for frame in (0, 1):
        torch.testing.assert_close(found[:, frame::2], expected, atol=0.03 * float(expected.max()), rtol=0)
    difference = perturbation_saliency(model, x, inputs, regions, 20000, metric="difference", generator=seeded())
    torch.testing.assert_close(difference[:, ::2], fallen, atol=0.03 * float(fallen.abs().max()), rtol=0)
    # Few masks that drop much, or little, estimate other things: what is there decides what a region is worth.
    sizes = [
        float(perturbation_saliency(model, x, inputs, regions, 2000, keep, generator=seeded()).mean())
        for keep in (0.9, 0.5)
    ]
    assert sizes[0] != pytest.approx(sizes[1], rel=0.02)


@pytest.mark.paper("cross_attention_faithfulness")
def test_masks_keep_the_share_asked_for_and_places_that_always_stay_have_no_saliency() -> None:
    model, x, inputs = listener()
    seen: list[Tensor] = []

    def watched(part: Tensor, tokens: Tensor) -> Tensor:
        seen.append(part)
        return model(part, tokens)

    regions = torch.tensor([-1, -1, 0, 0, 1, 1, 2, 2])
    found = perturbation_saliency(watched, x, inputs, regions, 500, 0.8, baseline=9.0, generator=seeded())
    masked = torch.cat([part for part in seen if len(part) > 1])
    assert len(masked) == 500 and bool((masked[:, :2] == x[:2]).all())
    missing = (masked[:, 2:] == 9).all(-1)
    assert torch.equal(missing[:, ::2], missing[:, 1::2]) and float(missing.double().mean()) == pytest.approx(
        0.2, abs=0.03
    )
    assert bool((found[:, :2] == 0).all()) and float(found[1, 2].abs()) > 0


@pytest.mark.paper("cross_attention_faithfulness")
def test_granularities_count_alike() -> None:
    model, x, inputs = listener()
    both = perturbation_saliency(model, x, inputs, n_masks=120, segments=(4, 12), generator=seeded())
    generator = seeded()
    each = [
        perturbation_saliency(model, x, inputs, n_masks=60, segments=(count,), generator=generator) for count in (4, 12)
    ]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


@pytest.mark.paper("cross_attention_faithfulness")
def test_half_precision_and_tokens_that_are_ruled_out() -> None:
    model, x, inputs = listener()
    x = x.float()
    coarse = torch.arange(8) // 2

    def at(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return perturbation_saliency(model.to(dtype), x.to(dtype), inputs, coarse, 200, generator=seeded())

    exact, half = at(model, torch.float32), at(model, torch.bfloat16)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.1 * float(exact.abs().max()), rtol=0)
    model.float()

    def ruled(part: Tensor, tokens: Tensor) -> Tensor:
        return model(part, tokens).index_fill(-1, torch.tensor([2]), -torch.inf)

    lowered = perturbation_saliency(
        lambda part, tokens: ruled(part, tokens).clamp_min(-1e4), x, inputs, coarse, 200, generator=seeded()
    )
    torch.testing.assert_close(perturbation_saliency(ruled, x, inputs, coarse, 200, generator=seeded()), lowered)
    maps = torch.rand(2, 3, 40)
    torch.testing.assert_close(
        explained_relevance(maps[0].bfloat16(), maps[1]), explained_relevance(maps[0].bfloat16().float(), maps[1])
    )


@pytest.mark.paper("cross_attention_faithfulness")
def test_an_encoder_that_does_not_mix_gives_both_saliencies_alike() -> None:
    model, x, inputs = listener()
    steps = torch.arange(8) // 2
    of_input = perturbation_saliency(model, x, inputs, steps[:, None].expand(8, 3), 300, generator=seeded())
    of_states = encoder_saliency(model.decode, model.encode(x[None])[0], inputs, 300, generator=seeded())
    for over in ("max", "mean"):
        torch.testing.assert_close(pool_saliency(of_input, 4, over, over), of_states)  # type: ignore[arg-type]
    by_time = perturbation_saliency(model, x, inputs, steps, 300, metric="difference", generator=seeded())
    memory = model.encode(x[None])[0]
    torch.testing.assert_close(
        encoder_saliency(model.decode, memory, inputs, 300, metric="difference", generator=seeded()), by_time[:, ::2]
    )


@pytest.mark.paper("cross_attention_faithfulness")
def test_forced_decoding_does_not_see_later_inputs() -> None:
    torch.manual_seed(1)
    model = TinyS2T(10, 4, embed_dim=16, num_heads=2).double().eval()
    x, inputs = normal(8, 4), torch.tensor([0, 3, 5, 2, 7])
    changed = inputs.clone()
    changed[3:] = torch.tensor([9, 9])
    before, after = (
        perturbation_saliency(model, x, i, "grid", 60, segments=(8,), generator=seeded()) for i in (inputs, changed)
    )
    torch.testing.assert_close(before[:3], after[:3], atol=1e-12, rtol=0)
    assert not torch.allclose(before[3:], after[3:])


@pytest.mark.paper("cross_attention_faithfulness")
@pytest.mark.parametrize("normalise", ["row", "map"])
@pytest.mark.parametrize("corr", ["pearson", "spearman"])
def test_agreement_of_a_map_with_itself_is_one_and_ignores_scale(normalise: str, corr: str) -> None:
    a, b = normal(2, 3, 4, 6).softmax(-1), normal(2, 3, 4, 6)
    options = {"normalise": normalise, "corr": corr}
    torch.testing.assert_close(explained_relevance(a, a, **options), torch.ones(2, 3, dtype=torch.float64))  # type: ignore[arg-type]
    found = explained_relevance(a, b, **options)  # type: ignore[arg-type]
    assert found.shape == (2, 3) and bool((found.abs() < 0.95).all())
    torch.testing.assert_close(explained_relevance(3 * a + 2, 0.1 * b - 5, **options), found)  # type: ignore[arg-type]
    torch.testing.assert_close(explained_relevance(a, -b, **options), -found)  # type: ignore[arg-type]
    # Ranks ignore any monotone change, values do not.
    bent = explained_relevance(a, b.exp(), **options)  # type: ignore[arg-type]
    assert torch.allclose(bent, found) == (corr == "spearman")


@pytest.mark.paper("cross_attention_faithfulness")
def test_agreement_is_pearson_of_standardised_maps() -> None:
    a, b = normal(4, 6), normal(4, 6)
    # Rows brought to mean 0 and deviation 1 first, then one correlation of the flattened maps.
    rows = [(m - m.mean(-1, keepdim=True)) / m.std(-1, keepdim=True) for m in (a, b)]
    expected = torch.corrcoef(torch.stack([m.flatten() for m in rows]))[0, 1]
    torch.testing.assert_close(explained_relevance(a, b), expected)
    torch.testing.assert_close(
        explained_relevance(a, b, normalise="map"), torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
    )
    # Left out rows do not count, whatever is in them.
    exclude = torch.tensor([False, True, False, True])
    for normalise in ("row", "map"):
        torch.testing.assert_close(
            explained_relevance(a, b, exclude=exclude, normalise=normalise),  # type: ignore[arg-type]
            explained_relevance(a[[0, 2]], b[[0, 2]], normalise=normalise),  # type: ignore[arg-type]
        )


@pytest.mark.paper("cross_attention_faithfulness")
def test_averaging_heads_and_layers_is_linear() -> None:
    attn = normal(3, 2, 4, 5, 6).softmax(-1)
    whole = cross_attention_map(attn)
    torch.testing.assert_close(whole, cross_attention_map(attn, "head").mean(0))
    torch.testing.assert_close(whole, cross_attention_map(attn, "layer").mean(1))
    torch.testing.assert_close(whole, sum(attn[i, :, h] for i in range(3) for h in range(4)) / 12)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.paper("cross_attention_faithfulness")
def test_the_report_names_what_agrees() -> None:
    """Layer 1, head 2 attends where saliency is; everything else is noise."""
    saliency = normal(3, 5, 40).square()
    attn = normal(2, 3, 4, 5, 40).softmax(-1)
    attn[1, :, 2] = 3 * saliency
    found = agreement_report(attn, saliency, torch.rand_like(saliency), generator=seeded())
    assert found.input_heads.shape == (2, 4) and float(found.input_heads[1, 2]) == pytest.approx(1)
    assert int(found.input_heads.flatten().argmax()) == 6 and float(found.encoder_heads.abs().max()) < 0.3
    assert float(found.input_layers[1]) > 0.8 > float(found.input_layers[0])
    assert found.input_all > 0.8 and abs(found.input_permuted) < 0.2
    assert found.input_all == pytest.approx(float(explained_relevance(attn.mean((0, 2)), saliency).mean()))
    for layer in range(2):
        rho = [float(explained_relevance(attn[layer, b].mean(0), saliency[b])) for b in range(3)]
        assert float(found.input_layers[layer]) == pytest.approx(sum(rho) / 3)
    # Rows that are excluded may hold anything.
    exclude = torch.tensor([False, False, True, False, True])
    spoilt, other = saliency.clone(), normal(3, 5, 40).square()
    spoilt[:, exclude] = normal(3, 2, 40)
    kept = ~exclude
    told = agreement_report(attn, spoilt, other, exclude.expand(3, 5), generator=seeded())
    plain = agreement_report(attn[..., kept, :], saliency[:, kept], other[:, kept], generator=seeded())
    for name in ("input_heads", "input_layers", "encoder_heads", "encoder_layers"):
        torch.testing.assert_close(getattr(told, name), getattr(plain, name))
    for name in ("input_all", "input_permuted", "encoder_all", "encoder_permuted"):
        assert getattr(told, name) == pytest.approx(getattr(plain, name))


@pytest.mark.paper("cross_attention_faithfulness")
def test_pooling_brings_frames_to_encoder_steps() -> None:
    saliency = torch.arange(24.0).reshape(1, 6, 4)
    assert pool_saliency(saliency, 3).tolist() == [[7, 15, 23]]
    assert pool_saliency(saliency, 3, "mean", "mean").tolist() == [[3.5, 11.5, 19.5]]
    assert pool_saliency(saliency, 3, "max", "mean").tolist() == [[5, 13, 21]]


@pytest.mark.paper("cross_attention_faithfulness")
def test_regions_cover_all_and_clusters_keep_to_the_sound() -> None:
    for shape, segments in (((40, 16), 20), ((12,), 4), ((40, 16), 640)):
        regions = grid_regions(shape, segments, shift=1)
        assert regions.shape == shape and regions.unique().tolist() == list(range(int(regions.max()) + 1))
        assert abs(len(regions.unique()) - segments) <= segments
    assert grid_regions((40, 16), 640).unique().numel() == 640
    assert grid_regions((12,), 3).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert grid_regions((12,), 3, shift=1).tolist() == [0] * 3 + [1] * 4 + [2] * 4 + [3]
    even = cluster_regions(torch.zeros(20, 20), 16)
    for region in even.unique():
        time, bins = (even == region).nonzero().unbind(-1)
        assert int(time.max() - time.min()) < 10 and int(bins.max() - bins.min()) < 10
    x = torch.zeros(40, 16)
    x[10:14, 6:9] = 1
    clusters = cluster_regions(x, 24, energy=8.0)
    inside, outside = clusters[10:14, 6:9].unique(), clusters[x == 0].unique()
    assert not set(inside.tolist()) & set(outside.tolist())
    by_place = cluster_regions(x, 24, energy=0.0)
    assert set(by_place[10:14, 6:9].unique().tolist()) & set(by_place[x == 0].unique().tolist())


@pytest.mark.paper("cross_attention_faithfulness")
def test_captured_cross_attention_of_the_small_model() -> None:
    model = TinyS2T(10, 4, embed_dim=16, num_heads=2, decoder_layers=3).eval()
    x, inputs = torch.randn(2, 8, 4), torch.randint(10, (2, 5))
    with torch.no_grad(), regard.capture(model, layers=lambda path: ".cross" in path) as trace:
        logits = model(x, inputs)
    attn = trace.stack("weights")
    assert logits.shape == (2, 5, 10) and attn.shape == (3, 2, 2, 5, 4)
    torch.testing.assert_close(attn.sum(-1), torch.ones(3, 2, 2, 5))
    # Row by row it is what stepwise decoding would compute, and each state hears its own frames alone without layers.
    torch.testing.assert_close(model(x, inputs[:, :3]), logits[:, :3])
    again = model(x, torch.full((2, 2), 3))
    assert not torch.allclose(again[:, 0], again[:, 1], atol=1e-3)  # it knows where it is
    bare, changed = TinyS2T(10, 4, encoder_layers=0), x.clone()
    changed[:, 2:4] += 1
    moved = (bare.encode(changed) - bare.encode(x)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False, True, False, False]
    assert bool(((model.encode(changed) - model.encode(x)).abs().amax((0, 2)) > 0).all())


@pytest.mark.paper("cross_attention_faithfulness")
def test_deleting_by_saliency_is_faster_than_against_it() -> None:
    model, x, inputs = listener()
    target = model(x[None], inputs[None])[0].argmax(-1)

    def likelihood(part: Tensor) -> Tensor:
        logits = model(part, inputs.expand(len(part), -1)).log_softmax(-1)
        return logits.gather(-1, target.expand(len(part), -1)[..., None])[..., 0].mean(-1)

    saliency = perturbation_saliency(model, x, inputs, torch.arange(8), 500, metric="difference", generator=seeded())
    present = presence(likelihood, x)
    most, least = (deletion_curve(present, saliency.mean(0), 8, first) for first in ("most", "least"))  # type: ignore[arg-type]
    assert float(most.auc) < float(least.auc)
    assert float(most.scores[0]) == float(least.scores[0]) and math.isclose(most.scores[-1], least.scores[-1])


@pytest.mark.paper("cross_attention_faithfulness")
def test_errors_teach() -> None:
    model, x, inputs = listener()
    with pytest.raises(OptionError, match="'grid', 'cluster'"):
        perturbation_saliency(model, x, inputs, "slic")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'kl' or 'difference'"):
        perturbation_saliency(model, x, inputs, n_masks=9, metric="l2")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="between 0 and 1"):
        perturbation_saliency(model, x, inputs, keep=1.0)
    with pytest.raises(ShapeError, match="masks='grid'"):
        cluster_regions(x[:, 0], 3)
    with pytest.raises(ShapeError, match="pool_saliency"):
        explained_relevance(torch.ones(3, 4), torch.ones(3, 8))
    with pytest.raises(OptionError, match="All rows"):
        explained_relevance(torch.ones(3, 4), torch.ones(3, 4), exclude=torch.ones(3, dtype=torch.bool))
    with pytest.raises(OptionError, match="'row' or 'map'"):
        explained_relevance(torch.ones(3, 4), torch.ones(3, 4), normalise="column")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="averaged over"):
        cross_attention_map(torch.ones(1, 1, 1, 1, 1), "mean")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="layers, batch"):
        cross_attention_map(torch.ones(1, 1, 1, 1))
    with pytest.raises(OptionError, match="'max' or 'mean'"):
        pool_saliency(torch.ones(2, 4, 3), 2, "sum")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="Encoder steps"):
        pool_saliency(torch.ones(2, 4, 3), 5)
    with pytest.raises(ShapeError, match="multiple of 2 frames"):
        TinyS2T(10, 4).encode(torch.ones(1, 7, 4))
    with pytest.raises(ShapeError, match="One example at a time"):
        perturbation_saliency(model, x[None], inputs[None])
    with pytest.raises(ShapeError, match="for these inputs, got dict"):
        perturbation_saliency(lambda x, t: {"logits": model(x, t)}, x, inputs, torch.arange(8), 20)  # type: ignore[arg-type,return-value]
    with pytest.raises(ShapeError, match="for these inputs, got"):
        perturbation_saliency(lambda x, t: model(x, t)[:, -1], x, inputs, torch.arange(8), 20)
    with pytest.raises(OptionError, match="exclude is boolean"):
        explained_relevance(torch.ones(3, 4), torch.ones(3, 4), exclude=torch.ones(3, dtype=torch.int64))
    with pytest.raises(OptionError, match="NaN"):
        explained_relevance(torch.full((3, 4), torch.nan), torch.ones(3, 4))


@pytest.mark.paper("cross_attention_faithfulness")
def test_hugging_face_models_are_read_as_they_are() -> None:
    """Whisper's spectrogram and T5's tokens; cross-attention by path."""
    pytest.importorskip("transformers")
    from tests.retrofit import small_models

    whisper = small_models.whisper().eval()
    given = small_models.inputs_of(whisper)
    sound, inputs = given["input_features"][0].mT, given["decoder_input_ids"][0]

    def speech(x: Tensor, t: Tensor) -> Tensor:
        return whisper(input_features=x.mT, decoder_input_ids=t).last_hidden_state

    saliency = perturbation_saliency(speech, sound, inputs, "grid", 40, segments=(4,), generator=seeded())
    assert saliency.shape == (len(inputs), *sound.shape) and float(saliency.abs().max()) > 0
    with torch.no_grad(), regard.capture(whisper, layers=lambda path: "encoder_attn" in path) as trace:
        whisper(**given)
    attn = trace.stack("weights")[:, :1]
    pooled = pool_saliency(saliency, attn.shape[-1])[None]
    assert agreement_report(attn, pooled, pooled).input_heads.shape == attn.shape[::2][:2]

    t5 = small_models.t5().eval()
    text = small_models.inputs_of(t5)
    found = perturbation_saliency(
        lambda x, t: t5(input_ids=x, decoder_input_ids=t).logits,
        text["input_ids"][0],
        text["decoder_input_ids"][0],
        "grid",
        40,
        baseline=0,
        generator=seeded(),
    )
    assert found.shape == (len(text["decoder_input_ids"][0]), len(text["input_ids"][0])) and bool(
        found.isfinite().all()
    )
    for model, source, tokens, length in (
        (t5, text["input_ids"], text["decoder_input_ids"][0], text["input_ids"].shape[1]),
        (whisper, given["input_features"], inputs, attn.shape[-1]),
    ):
        with torch.no_grad():
            memory = model.get_encoder()(source[:1])[0][0]

        def decode(states: Tensor, t: Tensor, model: nn.Module = model) -> Tensor:
            said = model(encoder_outputs=(states,), decoder_input_ids=t)
            return said.logits if "logits" in said else said.last_hidden_state

        of_states = encoder_saliency(decode, memory, tokens, 40, generator=seeded())
        assert of_states.shape == (len(tokens), length) and bool(of_states.isfinite().all())
        assert not model.training
