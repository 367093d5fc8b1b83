"""Step distillation with sparsity in the loop: the schedule, the losses against the formulas, and the trainer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.train.blade import (
    NoiseSchedule,
    SetDenoiser,
    TDMTrainer,
    denoising_loss,
    ring_sets,
    sample_steps,
    tdm_fake_loss,
    tdm_generator_loss,
)
from regard.train.lora import add_lora

SCHEDULE = NoiseSchedule(NoiseSchedule.scaled_linear().alpha_bar.double())
SPARSE = {"block_size": 8, "keep": 4, "max_ratio": 0.25}


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Gaussian(nn.Module):
    """The exact denoiser of points of one Gaussian, moved by a condition; one parameter, so that it can be trained."""

    def __init__(self, mean: float, spread: float = 0.5) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.tensor(mean, dtype=torch.float64)), spread
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.times.append(t)
        kept = SCHEDULE.at(t, x)
        mean = self.mean if condition is None else self.mean + condition.view(-1, *(1,) * (x.dim() - 1))
        gain = kept.sqrt() * self.spread**2 / (kept * self.spread**2 + 1 - kept)
        return mean + gain * (x - kept.sqrt() * mean)


def trainer(student: nn.Module, teacher: nn.Module, fake: nn.Module, **options: object) -> TDMTrainer:
    settings = {"steps": 4, "generator": torch.Generator().manual_seed(1), **options}
    return TDMTrainer(student, teacher, fake, SCHEDULE, **settings)  # type: ignore[arg-type]


def test_schedule() -> None:
    bar = SCHEDULE.alpha_bar
    assert len(bar) == 1000 and bool((bar.diff() < 0).all())
    assert float(bar[-1]) == 0 and float(bar[0]) == pytest.approx(1 - 0.00085, abs=1e-6)
    t, x0, noise = torch.tensor([3, 500, 999]), normals(3, 4, 2), normals(3, 4, 2)
    x = SCHEDULE.noised(x0, noise, t)
    for row, time in enumerate(t.tolist()):
        kept = float(bar[time])
        torch.testing.assert_close(x[row], kept**0.5 * x0[row] + (1 - kept) ** 0.5 * noise[row])
    torch.testing.assert_close(SCHEDULE.noise_in(x, x0, t), noise)


@pytest.mark.paper("blade")
def test_diffusing_on_gives_the_marginal_of_the_later_time() -> None:
    """Coefficients of x0 and of the two independent noises, told by linearity."""
    t, until = torch.tensor([0, 250, 700]), torch.tensor([0, 600, 980])
    ones, none = torch.ones(3, 1, 1, dtype=torch.float64), torch.zeros(3, 1, 1, dtype=torch.float64)
    signal = SCHEDULE.later(SCHEDULE.noised(ones, none, t), none, t, until)
    first = SCHEDULE.later(SCHEDULE.noised(none, ones, t), none, t, until)
    second = SCHEDULE.later(none, ones, t, until)
    torch.testing.assert_close(signal, SCHEDULE.at(until, ones).sqrt())
    torch.testing.assert_close(first.square() + second.square(), 1 - SCHEDULE.at(until, ones))


@pytest.mark.paper("blade")
def test_steps_cover_all_times() -> None:
    assert [tuple(int(x) for x in SCHEDULE.step_times(torch.tensor(k), 8)) for k in (8, 4, 1)] == [
        (999, 875),
        (499, 375),
        (124, 0),
    ]


@pytest.mark.paper("blade")
def test_few_step_sampling() -> None:
    """The model is asked at the first time of each step; with the exact denoiser many steps reach the data's mean and
    spread, and eta below 1 as well."""
    model = Gaussian(0.7)
    for steps, eta in ((200, 1.0), (200, 0.9), (4, 1.0)):
        model.times.clear()
        generator = torch.Generator().manual_seed(0)
        x0, begun = sample_steps(model, SCHEDULE, normals(4000, 2, 1), steps, eta, generator=generator)
        assert [int(t[0]) for t in model.times] == [k * 1000 // steps - 1 for k in range(steps, 0, -1)]
        assert float(x0.mean()) == pytest.approx(0.7, abs=0.05)
        assert len(begun) == steps
        torch.testing.assert_close(model(begun[0], model.times[-1]), x0)
        if steps == 200:
            assert float(x0.std()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.paper("blade")
def test_generator_loss_by_the_formula() -> None:
    x0, teacher, fake = (normals(3, 5, 2).requires_grad_() for _ in range(3))
    with torch.no_grad():
        teacher[2] += 20  # beyond the clip
    loss = tdm_generator_loss(x0, teacher, fake, huber=0.1)
    terms = []
    for mine, real, follows in zip(x0.tolist(), teacher.tolist(), fake.tolist(), strict=True):
        flat = [(a, b, c) for p in zip(mine, real, follows, strict=True) for a, b, c in zip(*p, strict=True)]
        size = min(sum(abs(a - b) for a, b, _ in flat) / len(flat), 5.0)
        terms += [(math.sqrt((b - c) ** 2 + 0.01) - 0.1) / size for _, b, c in flat]
    assert float(loss.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, x0, retain_graph=True)
    # Down the gradient goes from where the fake net stands towards where the teacher does.
    assert torch.equal(gradient.sign(), (fake - teacher).sign())
    assert torch.autograd.grad(loss, (teacher, fake), allow_unused=True) == (None, None)


@pytest.mark.paper("blade")
def test_generator_loss_is_still_where_teacher_and_fake_agree() -> None:
    x0, teacher = normals(4, 6, 2).requires_grad_(), normals(4, 6, 2)
    loss = tdm_generator_loss(x0, teacher, teacher)
    assert float(loss.detach()) == 0
    assert float(torch.autograd.grad(loss, x0)[0].abs().max()) == 0
    # Nor is there a NaN where the student agrees with both.
    loss = tdm_generator_loss(x0, x0.detach(), x0.detach())
    assert float(torch.autograd.grad(loss, x0)[0].abs().max()) == 0
    # And in the trainer, with a student that differs from both.
    nets = SetDenoiser(SCHEDULE, embed_dim=16).double(), SetDenoiser(SCHEDULE, embed_dim=16).double()
    run = trainer(nets[0], nets[1], copy.deepcopy(nets[1]), guidance=1.0)
    run.generator_loss(normals(4, 3, 16, 2)).backward()
    assert all(float(p.grad.abs().max()) == 0 for p in nets[0].parameters() if p.grad is not None)


@pytest.mark.paper("blade")
def test_fake_loss_by_the_formula() -> None:
    fake, student, teacher = (normals(3, 4, 2).requires_grad_() for _ in range(3))
    bar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    loss = tdm_fake_loss(fake, student, bar.view(-1, 1, 1), teacher, 0.5)
    rows = [
        ((fake[i] - student[i]).square().mean() + 0.5 * (fake[i] - teacher[i]).square().mean()) / (1 - bar[i])
        for i in range(3)
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    grads = torch.autograd.grad(loss, (fake, student, teacher), allow_unused=True)
    assert grads[0] is not None and grads[1:] == (None, None)
    torch.testing.assert_close(
        tdm_fake_loss(fake, student, bar.view(-1, 1, 1)),
        tdm_fake_loss(fake, student, bar.view(-1, 1, 1), teacher, 0.0),
    )


@pytest.mark.paper("blade")
def test_draws_lie_behind_their_step_and_are_noised_as_told() -> None:
    """With a denoiser that knows the truth, x_t has the marginal of its time; times run from the end of the step to the
    last time."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(Gaussian):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            seen.append((x, t))
            return super().forward(x, t, condition)

    student, fake = Gaussian(0.5), Watch(0.0)
    run = trainer(student, Gaussian(0.0), fake, eta=0.9, last_time=0.98)
    begun = SCHEDULE.noised(normals(4, 20000, 1) * 0.5 + 0.5, normals(4, 20000, 1), torch.tensor([249, 499, 749, 999]))
    run.fake_loss(begun)
    (x, t), first = seen[-1], student.times[-1]
    assert set(first.tolist()) == {249, 499, 749, 999}
    assert bool((t >= first - 249).all()) and int(t.max()) < 980 and int(t.min()) < 20
    late = t > 900
    assert float(x[late].std()) == pytest.approx(1.0, abs=0.05)
    clean = t < 40  # of the last step alone
    assert bool((first[clean] == 249).all())
    assert float(x[clean].mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.paper("blade")
def test_the_teacher_is_guided_in_the_students_loss_alone() -> None:
    """With Gaussians that a condition moves: the pull is that of uncond + guidance (cond - uncond)."""
    condition = torch.full((8,), 0.2, dtype=torch.float64)
    begun = normals(4, 8, 3, 1)

    def loss(guidance: float, mean: float) -> float:
        run = trainer(
            Gaussian(0.1),
            Gaussian(mean),
            Gaussian(0.3),
            guidance=guidance,
            null_condition=torch.zeros(1, dtype=torch.float64),
        )
        return float(run.generator_loss(begun, condition).detach())

    # These denoisers are affine in the mean, so guidance moves the mean to mean + guidance * condition.
    assert loss(3.5, 0.0) == pytest.approx(loss(1.0, 2.5 * 0.2), rel=1e-9)
    assert loss(3.5, 0.0) != pytest.approx(loss(1.0, 0.0), rel=1e-3)
    plain, guided = (
        float(trainer(Gaussian(0.1), Gaussian(0.0), Gaussian(0.3), guidance=g).fake_loss(begun, condition).detach())
        for g in (1.0, 3.5)
    )
    assert plain == guided
    with pytest.raises(OptionError, match="null_condition"):
        trainer(Gaussian(0.1), Gaussian(0.0), Gaussian(0.3)).generator_loss(begun, condition)


@pytest.mark.paper("blade")
def test_distillation_moves_the_student_to_the_teacher() -> None:
    """A student that makes a Gaussian elsewhere comes to the teacher, which does not move."""
    student, teacher, fake = Gaussian(-0.5), Gaussian(0.8), Gaussian(-0.5)
    run = trainer(student, teacher, fake, guidance=1.0, lr=1e-2, lr_fake=3e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(250):
        losses = run.iterate(torch.randn(32, 2, 1, generator=generator, dtype=torch.float64))
    assert set(losses) == {"fake", "generator"}
    assert float(student.mean.detach()) == pytest.approx(0.8, abs=0.15)
    assert float(fake.mean.detach()) == pytest.approx(0.8, abs=0.15)
    assert float(teacher.mean.detach()) == 0.8 and teacher.mean.grad is None


@pytest.mark.paper("blade")
def test_a_sparse_student_with_adapters_trains_and_the_others_stay_dense() -> None:
    teacher = SetDenoiser(SCHEDULE, embed_dim=32)
    student = SetDenoiser(SCHEDULE, embed_dim=32, mechanism="blade", options=SPARSE)
    student.load_state_dict(teacher.state_dict())
    fake = copy.deepcopy(teacher)
    before = copy.deepcopy(teacher.state_dict())
    adapters = [*add_lora(student, 8), *add_lora(fake, 8)]
    run = TDMTrainer(student, teacher, fake, SCHEDULE, steps=2, guidance=1.0, lr=1e-3)
    noise = torch.randn(4, 64, 2)
    density = student.blocks[0].attention.mechanism.pairs(*(torch.randn(1, 4, 64, 8) for _ in range(2)))
    assert density is not None and density <= 0.25
    for _ in range(2):
        losses = run.iterate(noise)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert all(bool(p.any()) for p in adapters)
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())
    assert torch.equal(student.state_dict()["point.weight"], before["point.weight"])


def test_half_precision_stays_finite() -> None:
    """Near the data 1 - abar is below the resolution of bfloat16."""
    teacher = SetDenoiser(SCHEDULE, embed_dim=16).bfloat16()
    run = trainer(copy.deepcopy(teacher), teacher, copy.deepcopy(teacher), guidance=1.0)
    losses = run.iterate(torch.randn(32, 8, 2, dtype=torch.bfloat16))
    assert all(math.isfinite(loss) for loss in losses.values())
    x = torch.randn(1, 4, 2, dtype=torch.bfloat16)
    noised = SCHEDULE.noised(x, x, torch.tensor([0]))
    assert noised.dtype == x.dtype and float(SCHEDULE.at(torch.tensor([0]), x).max()) < 1


def test_ring_sets_stand_at_every_other_place() -> None:
    sets = ring_sets(200, torch.Generator().manual_seed(0))
    assert sets.shape == (200, 64, 2)
    assert float(sets.mean()) == pytest.approx(0, abs=0.05) and float(sets.var()) == pytest.approx(1, abs=0.02)
    places = (torch.atan2(sets[..., 1], sets[..., 0]) / (math.pi / 4)).round().long() % 8
    assert bool((places % 2 == places[:, :1] % 2).all())
    assert set(places[:, 0].tolist()) == set(range(8))


def test_denoising_loss_is_that_of_the_velocity() -> None:
    """The exact denoiser of a Gaussian has the smallest loss, and no error in x0 costs less near the end."""
    x0 = 0.7 + 0.5 * normals(4000, 1, 1)
    losses = [
        float(denoising_loss(Gaussian(mean), SCHEDULE, x0, torch.Generator().manual_seed(0)).detach())
        for mean in (0.4, 0.7, 1.0)
    ]
    assert losses[1] == min(losses)


def test_refusals() -> None:
    one, two = Gaussian(0.0), Gaussian(1.0)
    with pytest.raises(OptionError, match="three modules"):
        trainer(one, two, one)
    with pytest.raises(OptionError, match="steps"):
        trainer(one, two, Gaussian(0.0), steps=0)
    with pytest.raises(OptionError, match="requires a gradient"):
        trainer(Gaussian(0.0).requires_grad_(False), two, one)
    with pytest.raises(OptionError, match="eta"):
        sample_steps(one, SCHEDULE, normals(1, 1, 1), 4, 1.5)
    with pytest.raises(ShapeError, match="points"):
        SetDenoiser(SCHEDULE)(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))
