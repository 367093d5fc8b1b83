"""GRPO with credit by token: its gradient, its clip, and what credit may not touch."""

from __future__ import annotations

import pytest
import torch

from regard.errors import OptionError, ShapeError
from regard.inspect.preplan_anchor import token_credit
from regard.train.preplan_anchor import group_advantage, grpo_loss, reweight_advantage


@pytest.mark.paper("preplan_anchor")
def test_without_amplification_the_loss_is_grpos() -> None:
    torch.manual_seed(0)
    old = torch.randn(6, 9, dtype=torch.float64)
    new = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    advantage = torch.randn(6, dtype=torch.float64)
    looked, influence = torch.rand(6, 9, dtype=torch.float64), torch.rand(6, 9, dtype=torch.float64)
    for mode in ("local", "global", "coupled"):
        gamma = token_credit(looked, influence, mode, amp=1.0)
        assert torch.equal(grpo_loss(new, old, reweight_advantage(advantage, gamma)), grpo_loss(new, old, advantage))
    total = 0.0
    for row in range(6):
        gains = []
        for t in range(9):
            ratio, a = float((new.detach()[row, t] - old[row, t]).exp()), float(advantage[row])
            gains.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        total += sum(gains) / 9
    assert float(grpo_loss(new, old, advantage).detach()) == pytest.approx(-total / 6)


@pytest.mark.paper("preplan_anchor")
def test_negative_advantages_are_never_changed() -> None:
    advantage = torch.tensor([2.0, -1.0, 0.0], requires_grad=True)
    gamma = (1 + torch.rand(3, 5)).requires_grad_()
    shaped = reweight_advantage(advantage, gamma)
    assert torch.equal(shaped[1], torch.full((5,), -1.0)) and torch.equal(shaped[2], torch.zeros(5))
    torch.testing.assert_close(shaped[0], 2 * gamma[0])
    shaped.sum().backward()
    assert gamma.grad is None and advantage.grad is not None
    # The paper's second version weighs them, too.
    torch.testing.assert_close(reweight_advantage(advantage, gamma, both_signs=True)[1], -gamma[1])
    assert not token_credit(torch.rand(2, 9).requires_grad_(), torch.rand(2, 9)).requires_grad


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    logp = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()
    grpo_loss(logp, logp.detach(), advantage, response_mask=mask).backward()
    torch.testing.assert_close(logp.grad, -advantage * mask / mask.sum(-1, keepdim=True) / 3)


def test_no_gradient_reaches_the_old_policy_nor_the_advantage() -> None:
    logp, old = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    advantage = torch.randn(3, requires_grad=True)
    grpo_loss(logp, old, advantage).backward()
    assert logp.grad is not None and old.grad is None and advantage.grad is None


def test_the_clip_stops_the_gradient_and_padding_may_be_anything() -> None:
    old = torch.zeros(2, 3)
    new = torch.tensor([[0.5, -0.5, 0.0], [0.5, -0.5, -torch.inf]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    old = old.masked_fill(~mask, -torch.inf)
    loss = grpo_loss(new, old, torch.tensor([1.0, -1.0]), response_mask=mask)
    loss.backward()
    assert bool(loss.isfinite()) and new.grad is not None and bool(new.grad.isfinite().all())
    # Beyond the clip, the better is not made better still, nor the worse worse.
    assert float(new.grad[0, 0]) == 0 and float(new.grad[1, 1]) == 0
    assert float(new.grad[0, 1]) < 0 < float(new.grad[1, 0])


def test_advantages_of_a_group() -> None:
    found = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]]), atol=1e-5, rtol=0)
    assert torch.equal(group_advantage(torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])), found)


def test_wrong_input_is_told() -> None:
    logp = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="advantage"):
        grpo_loss(logp, logp, torch.zeros(3))
    with pytest.raises(ShapeError, match="go together"):
        grpo_loss(logp, logp[:, :2], torch.zeros(2))
    with pytest.raises(OptionError, match="clip"):
        grpo_loss(logp, logp, torch.zeros(2), clip=0)
    with pytest.raises(ShapeError, match="response_mask"):
        grpo_loss(logp, logp, torch.zeros(2), response_mask=torch.ones(2, 2))
