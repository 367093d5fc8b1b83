"""Sparsity in the loop of step distillation: a student of a few sparse steps learns the distribution that a dense
teacher reaches in many.

Three denoisers, each ``(x_t, t, condition) -> x0``: the student, whose attention is sparse; the frozen dense teacher;
and a *fake* one, dense too, that follows what the student makes. No data is needed: the student samples from noise in
``K`` steps. One iteration of trajectory distribution matching (TDM) takes a step ``k`` of it at random, from time
``t_k``, and

    x0 = student(x at t_k)
    x_mid = x0 noised to the end of the step with eps = eta eps_hat + sqrt(1 - eta^2) noise     (eps_hat: from x, x0)
    x_t = x_mid diffused on to a random later time t

first for the fake net, ``mean (fake(x_t) - x0)^2 / (1 - abar_t)``, plus ``regularisation`` times the same towards
``teacher(x_t)``; then, by another draw, for the student, whose target ``x0 + teacher(x_t) - fake(x_t)`` lies where the
teacher's distribution is denser than the student's own:

    mean (sqrt((x0 - target)^2 + c^2) - c) / w,        w = min(mean |x0 - teacher(x_t)|, 5).

The target carries no gradient, and the teacher is guided, ``uncond + guidance (cond - uncond)``, in the student's loss
alone. Because only the student is sparse, it learns to make up for what its attention leaves out.

"Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation", 2025, arXiv 2508.10774,
on Luo et al., "Learning Few-Step Diffusion Models by Trajectory Distribution Matching", 2025, arXiv 2503.06674. As
released: 8 steps, guidance 3.5, regularisation 0.5 and eta 0.9 (CogVideoX), adapters of rank 64
(:func:`regard.train.lora.add_lora`), AdamW without momentum. The released script copies the fake net from the sparse
student; give such a copy as ``fake`` to do so. A toy instance is here too: :func:`ring_sets`, :class:`SetDenoiser`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels import accumulation_dtype
from regard.nn import MultiHeadAttention, TransformerBlock

__all__ = [
    "NoiseSchedule",
    "SetDenoiser",
    "TDMTrainer",
    "denoising_loss",
    "ring_sets",
    "sample_steps",
    "tdm_fake_loss",
    "tdm_generator_loss",
]

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x_t (batch, ...), t (batch,), condition or None) -> x0``, of the shape of ``x_t``."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise`` at times ``0 .. len(alpha_bar) - 1``; at the last one there is
    noise alone."""

    alpha_bar: Tensor

    @classmethod
    def scaled_linear(cls, times: int = 1000, first: float = 0.00085, last: float = 0.012) -> NoiseSchedule:
        """Square roots of the noise added at each time grow linearly (as if of 1000 times), and the whole is shifted so
        that nothing of ``x0`` is left at the end (Lin et al., 2023, arXiv 2305.08891): the schedule of CogVideoX."""
        betas = torch.linspace(first**0.5, last**0.5, times, dtype=torch.float64).square() * (1000 / times)
        root = (1 - betas).cumprod(0).sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return cls(root.square().float())

    @property
    def times(self) -> int:
        return len(self.alpha_bar)

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """``abar_t`` in shape to be multiplied with ``like``, in float32 or better: near 1, half precision is too
        coarse."""
        kept = self.alpha_bar.to(like.device, accumulation_dtype(like.dtype))
        return kept[t].view(-1, *(1,) * (like.dim() - 1))

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        kept = self.at(t, x0)
        return (kept.sqrt() * x0 + (1 - kept).sqrt() * noise).to(x0.dtype)

    def noise_in(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise that makes ``x`` of ``x0``."""
        kept = self.at(t, x)
        return ((x - kept.sqrt() * x0) / (1 - kept).sqrt()).to(x.dtype)

    def later(self, x: Tensor, noise: Tensor, t: Tensor, until: Tensor) -> Tensor:
        """``x`` at time ``t``, diffused on to the time ``until >= t``."""
        before, after = self.at(t, x), self.at(until, x)
        added = (1 - after) - after / before * (1 - before)
        return ((after / before).sqrt() * x + added.clamp_min(0).sqrt() * noise).to(x.dtype)

    def step_times(self, step: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """First and last time of step ``step`` of ``steps``, counted ``steps .. 1`` on the way from noise."""
        return step * self.times // steps - 1, (step - 1) * self.times // steps


@torch.no_grad()
def sample_steps(
    model: Denoiser,
    schedule: NoiseSchedule,
    noise: Tensor,
    steps: int,
    eta: float = 1.0,
    *,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample in so many steps: ``x0``, and what each step began with, ``(steps, batch, ...)``, step ``k`` at ``k - 1``
    (so the noise is last). eta: 1 keeps the noise that the model sees (DDIM), less renews part of it."""
    if not 1 <= steps <= schedule.times or not 0 <= eta <= 1:
        raise OptionError(f"Need 1 <= steps <= {schedule.times} and 0 <= eta <= 1, got {steps} and {eta}.")
    x, begun = noise, []
    for step in range(steps, 0, -1):
        begun.append(x)
        t, _ = schedule.step_times(torch.full((len(x),), step, device=x.device), steps)
        x0 = model(x, t, condition)
        if step > 1:
            eps = _renewed(schedule.noise_in(x, x0, t), eta, generator)
            x = schedule.noised(x0, eps, schedule.step_times(torch.full_like(t, step - 1), steps)[0])
    return x0, torch.stack(begun[::-1])


def _like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _renewed(noise: Tensor, eta: float, generator: torch.Generator | None) -> Tensor:
    return noise if eta == 1 else eta * noise + (1 - eta**2) ** 0.5 * _like(noise, generator)


def tdm_fake_loss(
    fake_x0: Tensor,
    student_x0: Tensor,
    alpha_bar: Tensor,
    teacher_x0: Tensor | None = None,
    regularisation: float = 0.5,
) -> Tensor:
    """What the fake net learns: the student's ``x0``, and ``regularisation`` times the teacher's, each squared error
    weighed by ``1 / (1 - abar_t)``. ``alpha_bar`` broadcasts to the others; no gradient to student and teacher."""
    weight = 1 / (1 - alpha_bar)
    loss = (weight * (fake_x0 - student_x0.detach()).square()).mean()
    if teacher_x0 is None or regularisation == 0:
        return loss
    return loss + regularisation * (weight * (fake_x0 - teacher_x0.detach()).square()).mean()


def tdm_generator_loss(
    x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, huber: float = 1e-3, clip: float = 5.0
) -> Tensor:
    """What the student learns: a pseudo-Huber distance of ``x0 (batch, ...)`` from ``x0 + teacher_x0 - fake_x0``,
    divided sample by sample by ``mean |x0 - teacher_x0|``, at most ``clip``. The gradient goes to ``x0`` alone."""
    x0 = x0.to(accumulation_dtype(x0.dtype))
    target = (x0 + (teacher_x0 - fake_x0)).detach()
    over = tuple(range(1, x0.dim()))
    size = (x0 - teacher_x0).detach().abs().mean(over, keepdim=True).clamp(torch.finfo(x0.dtype).eps, clip)
    return ((((x0 - target).square() + huber**2).sqrt() - huber) / size).mean()


class TDMTrainer:
    """Distil ``teacher`` into ``student``, both from the same weights as a rule, with ``fake`` to follow the student.

    steps: of the student. eta: share of its own noise that it keeps. guidance: of the teacher in the student's loss,
    with ``null_condition`` where there are conditions. last_time: share of all times up to which samples are diffused.
    lr, lr_fake, betas, weight_decay, max_norm: of AdamW on the parameters that require a gradient.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        fake: nn.Module,
        schedule: NoiseSchedule,
        *,
        steps: int = 8,
        eta: float = 0.9,
        guidance: float = 3.5,
        null_condition: Tensor | None = None,
        regularisation: float = 0.5,
        last_time: float = 0.98,
        lr: float = 1e-4,
        lr_fake: float = 5e-4,
        betas: tuple[float, float] = (0.0, 0.95),
        weight_decay: float = 1e-4,
        max_norm: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if len({id(student), id(teacher), id(fake)}) < 3:
            raise OptionError("Student, teacher and fake net are three modules; give copies (copy.deepcopy).")
        if not 1 <= steps <= schedule.times or not 0 < last_time <= 1 or not 0 <= eta <= 1:
            raise OptionError(
                f"Need 1 <= steps <= {schedule.times}, 0 < last_time <= 1 and 0 <= eta <= 1; "
                f"got {steps}, {last_time} and {eta}."
            )
        self.student, self.teacher, self.fake, self.schedule = student, teacher, fake, schedule
        self.steps, self.eta, self.guidance, self.null_condition = steps, eta, guidance, null_condition
        self.regularisation, self.last_time, self.max_norm = regularisation, last_time, max_norm
        self.generator = generator
        self.optimizer, self.fake_optimizer = (
            torch.optim.AdamW(_trained(net, name), lr=rate, betas=betas, weight_decay=weight_decay)
            for net, name, rate in ((student, "student", lr), (fake, "fake net", lr_fake))
        )

    def iterate(self, noise: Tensor, condition: Tensor | None = None) -> dict[str, float]:
        """One iteration from ``noise (batch, ...)``: a step of the fake net, then one of the student. Returns both
        losses."""
        _, begun = sample_steps(
            self.student, self.schedule, noise, self.steps, self.eta, condition=condition, generator=self.generator
        )
        fake_loss = self.fake_loss(begun, condition)
        self._update(self.fake_optimizer, fake_loss)
        loss = self.generator_loss(begun, condition)
        self._update(self.optimizer, loss)
        return {"fake": float(fake_loss.detach()), "generator": float(loss.detach())}

    def fake_loss(self, begun: Tensor, condition: Tensor | None = None) -> Tensor:
        """The fake net's loss on a draw from a trajectory (see :func:`sample_steps`)."""
        with torch.no_grad():
            x0, x, t = self._draw(begun, condition)
            real = self.teacher(x, t, condition) if self.regularisation else None
        return tdm_fake_loss(self.fake(x, t, condition), x0, self.schedule.at(t, x), real, self.regularisation)

    def generator_loss(self, begun: Tensor, condition: Tensor | None = None) -> Tensor:
        """The student's loss on a draw from a trajectory."""
        x0, x, t = self._draw(begun, condition)
        with torch.no_grad():
            real, fake = self.teacher(x, t, condition), self.fake(x, t, condition)
            if condition is not None and self.guidance != 1:
                if self.null_condition is None:
                    raise OptionError("Guidance needs null_condition, what stands for no condition; or guidance=1.")
                free = self.teacher(x, t, self.null_condition.expand_as(condition))
                real = free + self.guidance * (real - free)
        return tdm_generator_loss(x0, real, fake)

    def _draw(self, begun: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The student's ``x0`` at a random step of each sample, and it diffused to a random time behind this step:
        ``x0, x_t, t``. Only ``x0`` carries a gradient."""
        batch, device, schedule = begun.shape[1], begun.device, self.schedule
        step = torch.randint(1, self.steps + 1, (batch,), generator=self.generator, device=device)
        first, middle = schedule.step_times(step, self.steps)
        x = begun[step - 1, torch.arange(batch, device=device)]
        x0 = self.student(x, first, condition)
        kept = x0.detach()
        eps = _renewed(schedule.noise_in(x, kept, first), self.eta, self.generator)
        room = (int(self.last_time * schedule.times) - middle).clamp_min(1)
        share = torch.rand(batch, generator=self.generator, device=device, dtype=torch.float64)
        t = middle + (share * room).long()
        reached = schedule.noised(kept, eps, middle)
        return x0, schedule.later(reached, _like(reached, self.generator), middle, t), t

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_norm)
        optimizer.step()


def _trained(net: nn.Module, name: str) -> list[nn.Parameter]:
    found = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not found:
        raise OptionError(f"No parameter of the {name} requires a gradient; use add_lora, or requires_grad_(True).")
    return found


def ring_sets(batch: int, generator: torch.Generator | None = None, points: int = 64, spread: float = 0.1) -> Tensor:
    """Sets of points on a ring of 8 Gaussians, ``(batch, points, 2)``, variance 1 in each coordinate.

    The points of one set stand at every other of the 8 places, so a point tells of the others: a denoiser of single
    points cannot make such sets.
    """
    turn = torch.randint(2, (batch, 1), generator=generator)
    angle = (2 * torch.randint(4, (batch, points), generator=generator) + turn) * (math.pi / 4)
    ring = (2 * (1 - spread**2)) ** 0.5 * torch.stack((angle.cos(), angle.sin()), -1)
    return ring + spread * torch.randn(batch, points, 2, generator=generator)


class SetDenoiser(nn.Module):
    """A small transformer that denoises sets of points: ``(batch, points, channels)``, times ``(batch,)`` -> ``x0``.

    It predicts the velocity ``sqrt(abar) noise - sqrt(1 - abar) x0``. mechanism, options: of its attention. Points have
    no positions: a set has no order.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        channels: int = 2,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mechanism: str = "full",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.embed_dim = schedule, embed_dim
        self.point = nn.Linear(channels, embed_dim)
        self.time = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, MultiHeadAttention(embed_dim, num_heads, mechanism, **(options or {})), 2.0)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, channels)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or t.shape != x.shape[:1]:
            raise ShapeError(f"Need points (batch, points, channels), times (batch,); got {x.shape}, {t.shape}.")
        rates = torch.exp(-math.log(1e4) * torch.arange(self.embed_dim // 2, device=x.device) / (self.embed_dim // 2))
        waves = 1000 / self.schedule.times * t[:, None] * rates
        hidden = self.point(x) + self.time(torch.cat((waves.cos(), waves.sin()), -1).to(x.dtype))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        kept = self.schedule.at(t, x)
        return (kept.sqrt() * x - (1 - kept).sqrt() * self.head(self.norm(hidden))).to(x.dtype)


def denoising_loss(
    model: Denoiser, schedule: NoiseSchedule, x0: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """What trains a teacher: the squared error of the velocity at random times, which is that of ``x0`` over ``1 -
    abar_t``."""
    t = torch.randint(schedule.times, (len(x0),), generator=generator, device=x0.device)
    x = schedule.noised(x0, _like(x0, generator), t)
    return F.mse_loss(model(x, t, None), x0, reduction="none").div(1 - schedule.at(t, x)).mean()
