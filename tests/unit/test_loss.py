"""The policy loss and its gradient against float64 sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_srpo.loss import mismatch, policy_loss


def tensors(seed: int, num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, weights and advantages of `num` tokens."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, weights, advantages = torch.randn(3, num, generator=generator, dtype=torch.float64)
    return -logprobs.abs(), weights.abs(), advantages


def test_the_loss_is_minus_the_weighted_sum_over_the_denominator():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    weights = torch.tensor([0.5, 0.25, 1.0])
    advantages = torch.tensor([2.0, -1.0, 3.0])
    # -(0.5*2*-1 + 0.25*-1*-2 + 1*3*-4) / 5 = -(-1 + 0.5 - 12) / 5
    loss = policy_loss(logprobs, weights, advantages, denominator=5.0)
    assert loss.item() == pytest.approx(2.5)


def test_a_better_than_average_token_is_made_likelier_by_a_step_down_the_gradient():
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    weights, advantages = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, -2.0, 3.0])
    policy_loss(logprobs, weights, advantages, denominator=4.0).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.125, 0.25, 0.0]


def test_the_gradient_is_that_of_the_ratio_form_at_the_behaviour_policy():
    logprobs, weights, advantages = tensors(0, 20)
    plain, ratio = (logprobs.clone().requires_grad_() for _ in range(2))
    policy_loss(plain, weights, advantages, denominator=3.0).backward()
    (-(weights * advantages * (ratio - logprobs).exp()).sum() / 3.0).backward()
    torch.testing.assert_close(plain.grad, ratio.grad, rtol=1e-14, atol=0)


def test_micro_batches_add_up_to_one_batch():
    logprobs, weights, advantages = tensors(1, 30)
    whole = policy_loss(logprobs, weights, advantages, denominator=7.0)
    parts = [
        policy_loss(logprobs[part], weights[part], advantages[part], denominator=7.0)
        for part in (slice(0, 4), slice(4, 5), slice(5, 30))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


def test_mismatch_is_measured_against_sums_written_out():
    trainer, rollout = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0])
    measured = mismatch(trainer, rollout)
    assert measured.abs_sum.item() == 1.5
    assert measured.abs_max.item() == 1.0
    # log r is 0.5, 0, -1.
    k3 = (math.exp(0.5) - 1 - 0.5) + 0 + (math.exp(-1) - 1 + 1)
    assert measured.k3_sum.item() == pytest.approx(k3, rel=1e-14)


def test_k3_estimates_the_divergence_of_trainer_from_rollout_engine():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    # Its expectation over what the rollout engine samples, token by token.
    k3 = sum(p[i].exp() * mismatch(q[i : i + 1], p[i : i + 1]).k3_sum for i in range(8))
    torch.testing.assert_close(k3, exact, rtol=1e-12, atol=0)


def test_no_tokens_have_no_mismatch():
    empty = mismatch(torch.empty(0), torch.empty(0))
    assert [empty.abs_sum.item(), empty.abs_max.item(), empty.k3_sum.item()] == [0, 0, 0]


def test_measuring_the_mismatch_keeps_no_graph():
    logprobs = torch.tensor([-1.0], requires_grad=True)
    assert not mismatch(logprobs, torch.tensor([-1.1])).abs_sum.requires_grad


def test_a_nan_logprob_makes_the_mismatch_nan_and_does_not_hide():
    measured = mismatch(torch.tensor([-1.0, float("nan")]), torch.tensor([-1.0, -1.0]))
    assert math.isnan(measured.abs_max.item()) and math.isnan(measured.k3_sum.item())
