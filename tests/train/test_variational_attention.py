"""Latent alignment in models: states and losses of every mode, padding, gradients, evidence, and training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard.bench.alignment_tasks import NoisyAlignment, NumberWords, english_number, german_number
from regard.errors import OptionError, ShapeError
from regard.models.latent_translation import Pairs, PositionModel, Translator
from regard.models.variational_attention import DirichletAttention, InferenceNetwork, LatentAttention, Mode
from regard.train.variational_attention import (
    alignment_loss,
    bounds,
    exact_evidence,
    fit_alignment,
    model_loss,
    relaxed_elbo,
)

pytestmark = pytest.mark.paper("variational_attention")
MODES: tuple[Mode, ...] = ("soft", "exact", "enum", "sample", "gumbel", "wsram")
SRC, TGT = 5, 4


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def attention(mode: Mode = "exact", score: str = "mlp") -> LatentAttention:
    torch.manual_seed(1)
    return LatentAttention(SRC, TGT, 6, score=score, mode=mode).double()  # type: ignore[arg-type]


def translator(mode: Mode = "enum", infer: bool = True) -> Translator:
    torch.manual_seed(2)
    words = NumberWords()
    sizes = {"embed_dim": 6, "encoder_dim": 5, "decoder_dim": 7, "attn_dim": 8, "inference_dim": 4}
    model = Translator(len(words.source_words), len(words.target_words), **sizes, mode=mode, infer=infer)
    return model.double().eval()


@pytest.mark.parametrize("score", ["mlp", "general"])
def test_states_and_prior_against_a_loop(score: str) -> None:
    module, query, memory = attention("exact", score), normals(2, 3, TGT), normals(2, 6, SRC)
    found = module(query, memory)
    joined = torch.cat((module.from_query.weight, module.from_memory.weight), 1)
    bias = module.from_query.bias if score == "mlp" else 0
    for b, t in ((0, 0), (1, 2)):
        if score == "mlp":
            assert module.energy is not None and isinstance(module.key, nn.Linear)
            hidden = [module.query.weight @ query[b, t] + module.key.weight @ memory[b, z] for z in range(6)]
            scores = torch.stack([module.energy.weight[0] @ torch.tanh(h) for h in hidden])
        else:
            scores = torch.stack([(module.query.weight @ query[b, t]) @ memory[b, z] for z in range(6)])
        torch.testing.assert_close(found.log_prior[b, t], scores.softmax(-1).log())
        for z in range(6):
            state = torch.tanh(joined @ torch.cat((query[b, t], memory[b, z])) + bias)
            torch.testing.assert_close(found.states[z, b, t], state)
        mean = scores.softmax(-1) @ memory[b]
        torch.testing.assert_close(found.soft_state[b, t], torch.tanh(joined @ torch.cat((query[b, t], mean)) + bias))
        torch.testing.assert_close(found.context[b, t], mean)


def losses_of(module: LatentAttention, query: Tensor, memory: Tensor, **options: Tensor) -> dict[str, Tensor]:
    """The loss of each mode with a fixed output layer, and the same draws."""
    torch.manual_seed(3)
    head = nn.Linear(TGT, 9).double()
    target = torch.arange(query.shape[0] * query.shape[1]).view(query.shape[:2]) % 9

    def likelihood(states: Tensor) -> Tensor:
        return head(states).log_softmax(-1).gather(-1, target.expand(states.shape[:-1])[..., None])[..., 0]

    found = {}
    for mode in MODES:
        if mode == "wsram" and "q_log_alpha" not in options:
            continue
        module.mode, module.samples = mode, 4
        torch.manual_seed(4)
        aligned = module(query, memory, **options)
        soft = likelihood(aligned.soft_state)
        found[mode] = alignment_loss(aligned, likelihood(aligned.states), mode, soft)
    return found


def test_with_one_position_all_modes_coincide() -> None:
    """Wake-sleep adds log-weights, which are zero."""
    query, memory, q = normals(2, 3, TGT), normals(2, 1, SRC), normals(2, 3, 1)
    found = losses_of(attention(), query, memory, q_log_alpha=q)
    for mode in MODES:
        torch.testing.assert_close(found[mode], found["soft"], msg=mode)


def test_with_a_one_hot_prior_soft_is_exact() -> None:
    module = attention("exact", "general")
    module.query.weight.data *= 1e6
    query, memory = normals(2, 3, TGT), normals(2, 6, SRC)
    aligned = module(query, memory)
    assert float(aligned.log_prior.detach().exp().amax(-1).min()) == 1
    found = losses_of(module, query, memory)
    torch.testing.assert_close(found["soft"], found["exact"])
    # With a spread prior they differ.
    spread = losses_of(attention(), query, memory)
    assert float((spread["soft"] - spread["exact"]).abs().min()) > 1e-6


@pytest.mark.parametrize("posterior", [False, True])
def test_padding_has_no_weight_in_any_mode(posterior: bool) -> None:
    module, query, memory = attention(), normals(2, 3, TGT), normals(2, 6, SRC)
    lengths, options = torch.tensor([6, 2]), {}
    if posterior:
        options["q_log_alpha"] = normals(2, 3, 6)
    changed = memory.clone()
    changed[1, 2:] = 50 * normals(4, SRC)
    modes = [mode for mode in MODES if posterior or mode != "wsram"]
    for mode in modes:
        module.mode, module.samples = mode, 50
        aligned = module(query, memory, lengths, **options)
        assert bool(torch.isneginf(aligned.log_prior[1, :, 2:]).all())
        assert bool(torch.isneginf(aligned.log_q[1, :, 2:]).all())
        if aligned.positions is not None:
            assert int(aligned.positions[:, 1].max()) < 2
            assert int(aligned.positions[:, 0].max()) == 5
    if posterior:
        first = losses_of(module, query, memory.requires_grad_(), lengths=lengths, **options)
        second = losses_of(module, query, changed, lengths=lengths, **options)
        for mode in MODES:
            torch.testing.assert_close(first[mode], second[mode], msg=mode)
        (grad,) = torch.autograd.grad(sum(loss.sum() for loss in first.values()), memory)
        assert bool((grad[1, 2:] == 0).all()) and bool((grad[1, :2] != 0).any()) and bool(grad.isfinite().all())


def posterior_gradients(model: PositionModel, pairs: Pairs, baseline: bool, draws: int) -> Tensor:
    """Gradients of the posterior's network by single draws, ``(draws, numbers)``."""
    assert model.inference is not None
    parameters = list(model.inference.parameters())
    rows = []
    for seed in range(draws):
        loss = model_loss(model, pairs, torch.Generator().manual_seed(seed), baseline)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def test_the_soft_decoder_as_baseline_lowers_the_variance_and_leaves_the_mean() -> None:
    torch.manual_seed(5)
    model = PositionModel(12, 4, 4, mode="enum").double()
    pairs = NoisyAlignment(12, 4).batch(4, torch.Generator().manual_seed(0))
    assert model.inference is not None
    exact = torch.autograd.grad(model_loss(model, pairs), list(model.inference.parameters()))
    wanted = torch.cat([g.flatten() for g in exact])
    model.attention.mode = "sample"
    spread = []
    for baseline in (False, True):
        found = posterior_gradients(model, pairs, baseline, 250)
        error = found.std(0).norm() / len(found) ** 0.5
        assert float((found.mean(0) - wanted).norm()) < 2 * float(error)
        spread.append(float(found.var(0).sum()))
    assert spread[1] < spread[0] / 10


def test_exact_evidence_is_the_sum_over_positions() -> None:
    model, words = translator(), NumberWords()
    pairs = words.pairs([427, 6, 90_001])
    states, log_weight = model.marginal_states(pairs)
    evidence, predicted = exact_evidence(model, pairs), model.predict(pairs)
    torch.testing.assert_close(predicted.exp().sum(-1), torch.ones_like(evidence))
    for b, t in ((0, 2), (1, 0), (2, 3)):
        real = range(int(pairs.lengths[b]))
        mixed = sum(log_weight[z, b, t].exp() * model.head(states[z, b, t]).softmax(-1) for z in real)
        assert isinstance(mixed, Tensor)
        torch.testing.assert_close(evidence[b, t], mixed[pairs.targets[b, t]].log())
        torch.testing.assert_close(predicted[b, t], mixed.log())
    assert bool((evidence[~pairs.counted] == 0).all()) and bool((evidence[pairs.counted] < 0).all())
    # The best two positions, their weights scaled to sum to one.
    few, weight = model.marginal_states(pairs, top_k=2)
    kept, where = log_weight[:, 0, 1].topk(2)
    torch.testing.assert_close(weight[:, 0, 1], kept.log_softmax(-1))
    torch.testing.assert_close(few[:, 0, 1], states[where, 0, 1])
    torch.testing.assert_close(exact_evidence(model, pairs, top_k=50), evidence)
    soft = translator("soft")
    torch.testing.assert_close(exact_evidence(soft, pairs)[pairs.counted].mean(), -model_loss(soft, pairs))


def test_bounds_of_a_model() -> None:
    pairs = NumberWords().pairs([427, 6, 90_001])
    found = bounds(translator("sample"), pairs)
    assert found.variational is not None and found.variational < found.evidence and found.hard < found.evidence
    assert bounds(translator("sample", infer=False), pairs).variational is None
    assert found.evidence == pytest.approx(float(exact_evidence(translator(), pairs)[pairs.counted].mean()), abs=1e-12)
    enum = translator("enum")
    assert -float(model_loss(enum, pairs)) == pytest.approx(found.variational, abs=1e-12)


def test_the_context_that_feeds_back_is_the_soft_one_in_every_mode() -> None:
    pairs = NumberWords().pairs([427])
    contexts = [translator(mode)(pairs).context for mode in MODES]
    for context in contexts[1:]:
        torch.testing.assert_close(context, contexts[0])


def test_a_translator_does_not_look_ahead_and_its_posterior_does() -> None:
    model, pairs = translator(), NumberWords().pairs([427])
    later = pairs.inputs.clone()
    later[0, 3] += 1
    changed = model.predict(Pairs(pairs.source, pairs.lengths, later, pairs.targets))
    torch.testing.assert_close(changed[:, :3], model.predict(pairs)[:, :3])
    assert float((changed[:, 3:] - model.predict(pairs)[:, 3:]).detach().abs().max()) > 1e-9
    targets = pairs.targets.clone()
    targets[0, -1] += 3
    posterior = model(pairs).log_posterior
    other = model(Pairs(pairs.source, pairs.lengths, pairs.inputs, targets)).log_posterior
    assert posterior is not None and other is not None
    assert float((posterior[0, 0] - other[0, 0]).abs().max().detach()) > 1e-9


def test_a_pair_is_the_same_alone_and_padded_in_a_batch() -> None:
    words = NumberWords()
    alone, together = words.pairs([7]), words.pairs([7, 123_456])
    for mode in ("exact", "enum"):
        model = translator(mode)  # type: ignore[arg-type]
        steps = alone.targets.shape[1]
        single, padded = model(alone), model(together)
        torch.testing.assert_close(padded.log_prior[:1, :steps, : alone.source.shape[1]], single.log_prior)
        if mode == "enum":
            assert padded.log_posterior is not None and single.log_posterior is not None
            kept = padded.log_posterior[:1, :steps, : alone.source.shape[1]]
            torch.testing.assert_close(kept, single.log_posterior)


def test_greedy_translation_is_the_best_token_at_each_step() -> None:
    model, words = translator(), NumberWords()
    pairs = words.pairs([427, 6])
    written = model.translate(pairs.source, pairs.lengths, words.first, words.last, max_length=5)
    inputs = torch.full((2, 1), words.first)
    for step in range(written.shape[1]):
        predicted = model.predict(Pairs(pairs.source, pairs.lengths, inputs, torch.zeros_like(inputs)))
        done = (written[:, :step] == words.last).any(-1)
        torch.testing.assert_close(written[:, step], predicted[:, -1].argmax(-1).masked_fill(done, words.last))
        inputs = torch.cat((inputs, written[:, step : step + 1]), 1)


def test_inference_network_alone() -> None:
    network = InferenceNetwork(SRC, TGT, hidden=3).double().eval()
    source, target = normals(2, 5, SRC), normals(2, 4, TGT)
    found = network(source, target, torch.tensor([5, 3]))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert bool(torch.isneginf(found[1, :, 3:]).all())
    torch.testing.assert_close(found[1:, :, :3], network(source[1:, :3], target[1:]))
    torch.testing.assert_close(network.scores(source, target).log_softmax(-1)[0], found[0])


def relaxed(samples: int) -> tuple[DirichletAttention, Tensor, Tensor, Tensor]:
    torch.manual_seed(6)
    return (
        DirichletAttention(SRC, TGT, 6, samples=samples).double(),
        normals(2, 1, TGT),
        normals(2, 4, SRC),
        normals(2, 1, 4),
    )


def test_dirichlet_attention() -> None:
    module, query, memory, q_scores = relaxed(4000)
    lengths = torch.tensor([4, 2])
    with torch.no_grad():
        prior, posterior = module(query, memory, lengths), module(query, memory, lengths, q_scores)
    assert bool((prior.weights[:, 1, :, 2:] == 0).all()) and bool((posterior.weights[:, 1, :, 2:] == 0).all())
    torch.testing.assert_close(posterior.weights.sum(-1), torch.ones(4000, 2, 1, dtype=torch.float64))
    wanted = torch.distributions.Dirichlet(q_scores[0, 0].exp()).mean
    torch.testing.assert_close(posterior.weights[:, 0, 0].mean(0), wanted, atol=0.02, rtol=0)
    mean = prior.prior[0, 0] / prior.prior[0, 0].sum()
    torch.testing.assert_close(prior.context[0, 0], mean @ memory[0])
    state = torch.tanh(module.from_query(query) + posterior.weights[5] @ module.from_memory(memory))
    torch.testing.assert_close(posterior.states[5], state)
    # The bound stays below what draws from the prior say of log p(y).
    head = normals(TGT, 7)
    likelihood = [(found.states @ head).log_softmax(-1)[..., 3] for found in (prior, posterior)]
    evidence = likelihood[0].logsumexp(0) - math.log(4000)
    assert bool((relaxed_elbo(posterior, likelihood[1]) < evidence).all())
    one, _, _, _ = relaxed(3)
    single = one(query, memory[:, :1])
    torch.testing.assert_close(single.weights, torch.ones(3, 2, 1, 1, dtype=torch.float64))


def test_relaxed_elbo_has_the_gradient_of_its_mean() -> None:
    """Likelihood linear in the weights: ``E_q l = sum_i c_i a_i / A``."""
    module, query, memory, q_scores = relaxed(60_000)
    query, memory, q_scores, factor = query[:1], memory[:1], q_scores[:1].requires_grad_(), normals(4)
    found = module(query, memory, None, q_scores)
    value = relaxed_elbo(found, (found.weights * factor).sum(-1), baseline=0.0).sum()
    (estimated,) = torch.autograd.grad(value, q_scores)
    concentration = q_scores.exp()
    known = (torch.distributions.Dirichlet(concentration), torch.distributions.Dirichlet(found.prior.detach()))
    exact = (factor * known[0].mean).sum() - torch.distributions.kl_divergence(*known).sum()
    assert float(value) == pytest.approx(float(exact), abs=0.02)
    torch.testing.assert_close(estimated, torch.autograd.grad(exact, q_scores)[0], atol=0.02, rtol=0.02)


def test_noisy_alignment_follows_its_rule() -> None:
    task = NoisyAlignment(vocab_size=5, source_length=6)
    pairs = task.batch(4000, torch.Generator().manual_seed(0))
    assert pairs.source.shape == (4000, 6) and pairs.targets.shape == (4000, 1)
    best = task.best(pairs)
    for row in range(5):
        start, chance = int(pairs.inputs[row]), 0.0
        for after, share in enumerate((0.5, 0.3, 0.2)):
            symbol = int(pairs.source[row, (start + after) % 6])
            chance += share * (int(task.relabel[symbol]) == int(pairs.targets[row]))
        assert float(best[row]) == pytest.approx(math.log(chance), abs=1e-5)
    wide = NoisyAlignment()
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    floor = -float(wide.best(wide.batch(20_000, torch.Generator().manual_seed(0))).mean())
    assert entropy - 0.05 < floor < entropy, "symbols that come twice make it a little easier"


def test_number_words() -> None:
    for number, german, english in (
        (427, "vier hundert sieben und zwanzig", "four hundred twenty seven"),
        (1, "eins", "one"),
        (21, "ein und zwanzig", "twenty one"),
        (101, "ein hundert eins", "one hundred one"),
        (216_017, "zwei hundert sech zehn tausend sieb zehn", "two hundred sixteen thousand seventeen"),
        (1_001, "ein tausend eins", "one thousand one"),
        (30, "dreißig", "thirty"),
    ):
        assert " ".join(german_number(number)) == german and " ".join(english_number(number)) == english
    task = NumberWords(500)
    pairs = task.batch(20, torch.Generator().manual_seed(0))
    assert task.words(pairs.targets)[0][-1] != "</s>" and bool((pairs.inputs[:, 0] == task.first).all())
    assert int((pairs.targets == task.last).sum()) == 20
    torch.testing.assert_close(pairs.inputs[:, 1:][pairs.counted[:, 1:]], pairs.targets[:, :-1][pairs.counted[:, 1:]])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns(mode: Mode) -> None:
    task = NoisyAlignment(6, 3, (1.0,))
    torch.manual_seed(0)
    model = PositionModel(6, 3, 3, dim=6, attn_dim=8, mode=mode)
    history = fit_alignment(model, task, steps=120, epoch=60, batch_size=32, lr=1e-2, held_out=128, halve_from=None)
    assert history.steps == [60, 120]
    assert history.nats[-1] < 0.9 * math.log(6)
    assert history.perplexity[-1] == pytest.approx(math.exp(history.nats[-1]))


@pytest.mark.slow
def test_a_translator_says_numbers_that_it_has_not_seen() -> None:
    task = NumberWords(999)
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "encoder_dim": 24, "decoder_dim": 32, "attn_dim": 32, "inference_dim": 24}
    model = Translator(len(task.source_words), len(task.target_words), **sizes, num_layers=1, dropout=0.0)  # type: ignore[arg-type]
    fit_alignment(model, task, steps=1200, epoch=200, lr=2e-2, halve_from=None, held_out=99)
    pairs = task.batch(99, torch.Generator().manual_seed(1), "test")
    for top_k in (None, 5):
        written = model.translate(pairs.source, pairs.lengths, task.first, task.last, 12, top_k)
        right = [a == b for a, b in zip(task.words(written), task.words(pairs.targets), strict=True)]
        assert sum(right) >= 94


def test_the_rate_is_halved_where_nothing_improves() -> None:
    model, seen = PositionModel(6, 3, 3, mode="soft"), []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.bias.requires_grad_(True)

    class Same(NoisyAlignment):
        def batch(self, size: int, generator: torch.Generator, split: str = "train") -> Pairs:
            return super().batch(size, torch.Generator().manual_seed(0), split)

    history = fit_alignment(
        model, Same(6, 3), steps=5, epoch=1, lr=1e-30, held_out=8, look=lambda step, pairs: seen.append(step)
    )
    assert seen == [1, 2, 3, 4, 5]
    assert history.rates == [1e-30, 1e-30, 5e-31, 2.5e-31, 1.25e-31], "from the second epoch on"


def test_training_the_baseline_adds_its_cross_entropy() -> None:
    module, query, memory = attention("sample"), normals(1, 2, TGT), normals(1, 3, SRC)
    aligned = module(query, memory)
    likelihood, soft = normals(1, 1, 2), normals(1, 2)
    plain, more = (alignment_loss(aligned, likelihood, "sample", soft, train_baseline=w) for w in (0.0, 0.7))
    torch.testing.assert_close(more - plain, -0.7 * soft)


def test_hard_attention_is_the_bound_of_the_prior() -> None:
    module, query, memory = attention("enum"), normals(1, 2, TGT), normals(1, 3, SRC)
    aligned = module(query, memory)
    likelihood = normals(3, 1, 2)
    wanted = -(aligned.log_prior.exp() * likelihood.movedim(0, -1)).sum(-1)
    torch.testing.assert_close(alignment_loss(aligned, likelihood, "enum"), wanted)


def test_bad_input() -> None:
    module, query, memory = attention(), normals(1, 2, TGT), normals(1, 3, SRC)
    for error, words, call in (
        (OptionError, "mode is one of", lambda: LatentAttention(SRC, TGT, mode="hard")),  # type: ignore[arg-type]
        (OptionError, "score is", lambda: LatentAttention(SRC, TGT, score="dot")),  # type: ignore[arg-type]
        (OptionError, "temperature", lambda: LatentAttention(SRC, TGT, temperature=0.0)),
        (OptionError, "floor", lambda: DirichletAttention(SRC, TGT, floor=0.0)),
        (ShapeError, "Need a query", lambda: module(memory, query)),
        (ShapeError, "lengths", lambda: module(query, memory, torch.tensor([0]))),
        (ShapeError, "posterior", lambda: module(query, memory, None, normals(1, 2, 4))),
        (OptionError, "top_k=0", lambda: module.marginal_states(query, memory, None, 0)),
        (OptionError, "drawn positions", lambda: alignment_loss(module(query, memory), normals(3, 1, 2), "sample")),
        (OptionError, "infer=True", lambda: model_loss(translator("wsram", infer=False), NumberWords().pairs([3]))),
        (OptionError, "999999", lambda: german_number(0)),
        (OptionError, "Chances", lambda: NoisyAlignment(chances=(0.5, 0.3))),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(ShapeError, match="step by step"):
        Pairs(torch.zeros(1, 3), torch.tensor([3]), torch.zeros(1, 2), torch.zeros(1, 4))
