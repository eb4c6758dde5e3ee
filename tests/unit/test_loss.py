"""Every form of the loss against numbers written out and float64 finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.loss import Counters, TokenTensors, add_counters, policy_loss, to_metrics

NAN = float("nan")
SURROGATES = ("reinforce", "ppo")
IMPORTANCES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REINFORCE = LossConfig()
PPO = LossConfig(surrogate="ppo", clip_low=0.2, clip_high=0.3)


def tokens_of(
    rollout: Sequence[float],
    *,
    weight: Sequence[float] | None = None,
    advantage: Sequence[float] | None = None,
    old: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
) -> TokenTensors:
    """float64; weights and advantages are 1 unless told, and there is one sequence."""

    def tensor(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    ones = [1.0] * len(rollout)
    return TokenTensors(
        loss_weight_T=tensor(weight or ones),
        advantage_T=tensor(advantage or ones),
        rollout_T=tensor(rollout),
        old_T=tensor(old) if old else None,
        reference_T=tensor(reference) if reference else None,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths or [len(rollout)])]).int(),
    )


def value(logprobs: Sequence[float], tokens: TokenTensors, cfg: LossConfig) -> float:
    """The loss, not divided by anything."""
    loss, _ = policy_loss(torch.tensor(logprobs, dtype=torch.float64), tokens, cfg, denominator=1.0)
    return loss.item()


def gradient(logprobs: Sequence[float], tokens: TokenTensors, cfg: LossConfig) -> list[float]:
    current = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    policy_loss(current, tokens, cfg, denominator=1.0)[0].backward()
    assert current.grad is not None
    return current.grad.tolist()


def metrics(
    logprobs: Sequence[float], tokens: TokenTensors, cfg: LossConfig = REINFORCE
) -> dict[str, float]:
    current = torch.tensor(logprobs, dtype=torch.float64)
    return to_metrics(policy_loss(current, tokens, cfg, denominator=1.0)[1])


def drawn(seed: int, lengths: Sequence[int]) -> tuple[Tensor, TokenTensors]:
    """Random tokens: some not trained, some demonstrations, others off policy either way."""
    num = sum(lengths)
    noise = torch.randn(6, num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs = -1 - noise[0].abs()
    rollout, weight = logprobs + 0.3 * noise[1], noise[2].abs()
    rollout[::7], weight[::5] = NAN, 0.0
    return logprobs, TokenTensors(
        loss_weight_T=weight,
        advantage_T=noise[3],
        rollout_T=rollout,
        old_T=logprobs + 0.3 * noise[4],
        reference_T=logprobs + 0.5 * noise[5],
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]),
    )


def part(tokens: TokenTensors, start: int, end: int, lengths: Sequence[int]) -> TokenTensors:
    assert tokens.old_T is not None and tokens.reference_T is not None
    here = slice(start, end)
    return TokenTensors(
        loss_weight_T=tokens.loss_weight_T[here],
        advantage_T=tokens.advantage_T[here],
        rollout_T=tokens.rollout_T[here],
        old_T=tokens.old_T[here],
        reference_T=tokens.reference_T[here],
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]),
    )


# --- reinforce ---


def test_the_loss_is_minus_the_weighted_sum_over_the_denominator():
    tokens = tokens_of([-1.0, -2.0, -4.0], weight=[0.5, 0.25, 1.0], advantage=[2.0, -1.0, 3.0])
    # -(0.5*2*-1 + 0.25*-1*-2 + 1*3*-4) / 5 = -(-1 + 0.5 - 12) / 5
    loss, _ = policy_loss(torch.tensor([-1.0, -2.0, -4.0]), tokens, REINFORCE, denominator=5.0)
    assert loss.item() == pytest.approx(2.5)


def test_reinforce_is_the_weighted_sum_to_the_last_bit():
    logprobs, tokens = drawn(0, [20])
    credit = tokens.loss_weight_T * tokens.advantage_T
    loss, _ = policy_loss(logprobs, tokens, REINFORCE, denominator=3.0)
    assert loss.item() == (-(credit * logprobs).sum() / 3.0).item()


def test_a_better_than_average_token_is_made_likelier_by_a_step_down_the_gradient():
    tokens = tokens_of([-1.0] * 3, weight=[0.5, 0.5, 0.0], advantage=[1.0, -2.0, 3.0])
    assert gradient([-1.0] * 3, tokens, REINFORCE) == [-0.5, 1.0, 0.0]


def test_before_the_first_update_ppo_takes_the_step_of_reinforce():
    weight, advantage = [0.5, 0.25, 1.0], [1.0, -2.0, 3.0]
    logprobs = [-1.0, -2.0, -0.3]
    tokens = tokens_of([-1.1, -2.2, -0.2], weight=weight, advantage=advantage)
    assert gradient(logprobs, tokens, PPO) == gradient(logprobs, tokens, REINFORCE)
    assert metrics(logprobs, tokens, PPO)["loss/ratio_max"] == 1.0
    # Minus the sum of the credit: every ratio is 1.
    assert value(logprobs, tokens, PPO) == -(0.5 * 1 - 0.25 * 2 + 1 * 3)


# --- ppo ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "bites"),
    [
        (1.2, 2.0, -2.4, False),
        (1.5, 2.0, -2.6, True),  # min(3.0, 1.3 * 2)
        (0.5, 2.0, -1.0, False),  # min(1.0, 0.8 * 2): the way back is open
        (1.5, -2.0, 3.0, False),  # min(-3.0, -2.6)
        (0.5, -2.0, 1.6, True),  # min(-1.0, -1.6)
        (0.9, -2.0, 1.8, False),
        (9.0, 0.0, 0.0, False),
    ],
)
def test_the_clip_bites_where_the_policy_has_gone_far_enough(
    ratio: float, advantage: float, expected: float, bites: bool
):
    logprobs = [-2.0 + math.log(ratio)]
    tokens = tokens_of([-2.0], advantage=[advantage], old=[-2.0])
    assert value(logprobs, tokens, PPO) == pytest.approx(expected, rel=1e-12)
    # d(-r A) / d log pi = -r A, nothing where it bites
    expected_gradient = 0.0 if bites else -ratio * advantage
    assert gradient(logprobs, tokens, PPO) == pytest.approx([expected_gradient], rel=1e-12)
    assert metrics(logprobs, tokens, PPO)["loss/clip_fraction"] == float(bites)
    assert metrics(logprobs, tokens, PPO)["loss/ratio_max"] == pytest.approx(ratio)


@pytest.mark.parametrize("seed", range(4))
def test_ppo_is_the_smaller_of_clipped_and_unclipped_written_out(seed: int):
    logprobs, tokens = drawn(seed, [60])
    assert tokens.old_T is not None
    right = torch.zeros((), dtype=torch.float64)
    for t in range(60):
        advantage, ratio = tokens.advantage_T[t], (logprobs[t] - tokens.old_T[t]).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        if tokens.rollout_T[t].isnan():
            surrogate = advantage * logprobs[t]
        right -= tokens.loss_weight_T[t] * surrogate
    loss, _ = policy_loss(logprobs, tokens, PPO, denominator=1.0)
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)


def test_an_infinite_ratio_that_the_clip_cuts_has_no_gradient_instead_of_nan():
    tokens = tokens_of([-800.0], old=[-800.0])
    assert gradient([-1.0], tokens, PPO) == [0.0]


# --- importance ---


@pytest.mark.parametrize(
    ("importance", "weights", "capped_rate"),
    [
        # token weights exp(old - rollout): 1.5, 0.5 | 1, 3, untrained; products: .75 | 3
        ("none", [1.0, 1.0, 1.0, 1.0], None),
        ("token_truncate", [1.5, 0.5, 1.0, 2.0], 0.25),
        ("token_mask", [1.5, 0.5, 1.0, 0.0], 0.25),
        ("sequence_truncate", [0.75, 0.75, 2.0, 2.0], 0.5),
        ("sequence_mask", [0.75, 0.75, 0.0, 0.0], 0.5),
    ],
)
def test_importance_weights_are_cut_or_left_out_above_the_cap(
    importance: str, weights: list[float], capped_rate: float | None
):
    ratios = [1.5, 0.5, 1.0, 3.0, 9.0]
    tokens = tokens_of(
        [-2.0 - math.log(ratio) for ratio in ratios],
        weight=[1.0, 1.0, 1.0, 1.0, 0.0],
        advantage=[1.0, 2.0, -1.0, 3.0, 5.0],
        lengths=[2, 3],
    )
    cfg = LossConfig.model_validate({"importance": importance, "importance_cap": 2.0})
    found = gradient([-2.0] * 5, tokens, cfg)
    right = [-w * a for w, a in zip([*weights, 0.0], [1.0, 2.0, -1.0, 3.0, 5.0], strict=True)]
    assert found == pytest.approx(right, rel=1e-12)
    reported = metrics([-2.0] * 5, tokens, cfg)
    assert reported.get("importance/capped_rate") == capped_rate
    if capped_rate is not None:
        assert reported["importance/weight_mean"] == pytest.approx(sum(weights) / 4)


def test_a_weight_at_the_cap_is_kept():
    for importance in ("token_mask", "sequence_mask"):
        cfg = LossConfig.model_validate({"importance": importance, "importance_cap": 1.0})
        assert gradient([-1.0], tokens_of([-1.0]), cfg) == [-1.0]


def test_importance_speaks_of_the_policy_before_the_first_update():
    # old / rollout = 1.5, whatever the current policy is; the gradient does not see the weight.
    tokens = tokens_of([-1.0], old=[-1.0 + math.log(1.5)])
    cfg = LossConfig(importance="token_truncate")
    assert gradient([-7.0], tokens, cfg) == pytest.approx([-1.5], rel=1e-12)


def test_a_response_too_unlikely_for_floats_is_still_capped():
    tokens = tokens_of([-900.0, -1.0])
    truncated = gradient([-1.0, -1.0], tokens, LossConfig(importance="sequence_truncate"))
    assert truncated == [-2.0, -2.0]
    assert gradient([-1.0, -1.0], tokens, LossConfig(importance="sequence_mask")) == [0.0, 0.0]


# --- KL ---


def test_the_kl_term_is_k3_and_pulls_towards_the_reference():
    tokens = tokens_of([-2.0] * 3, advantage=[0.0] * 3, reference=[-1.5, -2.0, -3.0])
    cfg = LossConfig(kl_coef=0.1)
    # log reference - log pi is 0.5, 0, -1; d k3 / d log pi = 1 - reference / pi
    k3 = (math.exp(0.5) - 1 - 0.5) + 0 + (math.exp(-1) - 1 + 1)
    assert value([-2.0] * 3, tokens, cfg) == pytest.approx(0.1 * k3, rel=1e-12)
    found = gradient([-2.0] * 3, tokens, cfg)
    right = [0.1 * (1 - math.exp(0.5)), 0.0, 0.1 * (1 - math.exp(-1))]
    assert found == pytest.approx(right, rel=1e-12)
    assert metrics([-2.0] * 3, tokens, cfg)["loss/kl_reference"] == pytest.approx(k3 / 3)


def test_k3_averages_to_the_divergence_of_the_policy_from_its_reference():
    generator = torch.Generator().manual_seed(0)
    pi, ref = torch.randn(2, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (pi.exp() * (pi - ref)).sum().item()
    tokens = tokens_of(
        pi.tolist(), weight=pi.exp().tolist(), advantage=[0.0] * 8, reference=ref.tolist()
    )
    assert value(pi.tolist(), tokens, LossConfig(kl_coef=1.0)) == pytest.approx(exact, rel=1e-12)


# --- all forms ---


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_gradient_is_that_of_finite_differences(
    surrogate: str, importance: str, kl_coef: float
):
    logprobs, tokens = drawn(5, [9, 6, 5])
    cfg = LossConfig.model_validate(
        {"surrogate": surrogate, "importance": importance, "kl_coef": kl_coef}
    )
    found, eps = gradient(logprobs.tolist(), tokens, cfg), 1e-6
    for t in range(20):
        up, down = logprobs.clone(), logprobs.clone()
        up[t] += eps
        down[t] -= eps
        slope = (value(up.tolist(), tokens, cfg) - value(down.tolist(), tokens, cfg)) / (2 * eps)
        assert found[t] == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_packed_micro_batch_is_its_sequences_alone(surrogate: str, importance: str):
    lengths = [8, 1, 12, 9]
    logprobs, tokens = drawn(1, lengths)
    cfg = LossConfig.model_validate(
        {"surrogate": surrogate, "importance": importance, "kl_coef": 0.1, "importance_cap": 1.2}
    )
    whole, counters = policy_loss(logprobs, tokens, cfg, denominator=7.0)
    alone: list[tuple[Tensor, Counters]] = []
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        own = part(tokens, end - length, end, [length])
        alone.append(policy_loss(logprobs[end - length : end], own, cfg, denominator=7.0))
    torch.testing.assert_close(sum(loss for loss, _ in alone), whole, rtol=1e-13, atol=0)
    added = to_metrics(add_counters([each for _, each in alone]))
    assert added == pytest.approx(to_metrics(counters), rel=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_padding_at_the_end_of_a_sequence_changes_neither_loss_nor_metrics(
    surrogate: str, importance: str
):
    lengths, padding = [8, 3, 12], 5
    logprobs, tokens = drawn(2, lengths)
    cfg = LossConfig.model_validate(
        {"surrogate": surrogate, "importance": importance, "kl_coef": 0.1, "importance_cap": 1.2}
    )
    right, counters = policy_loss(logprobs, tokens, cfg, denominator=7.0)

    def padded(values_T: Tensor | None, fill: float) -> Tensor:
        assert values_T is not None
        rows = [torch.cat([row, row.new_full([padding], fill)]) for row in values_T.split(lengths)]
        return torch.cat(rows)

    # The policy says something of padding too; nobody sampled it.
    found, with_padding = policy_loss(
        padded(logprobs, -11.0),
        TokenTensors(
            loss_weight_T=padded(tokens.loss_weight_T, 0.0),
            advantage_T=padded(tokens.advantage_T, 0.0),
            rollout_T=padded(tokens.rollout_T, 0.0),
            old_T=padded(tokens.old_T, -12.0),
            reference_T=padded(tokens.reference_T, -10.0),
            cu_seqlens=torch.tensor([0, *itertools.accumulate(n + padding for n in lengths)]),
        ),
        cfg,
        denominator=7.0,
    )
    torch.testing.assert_close(found, right, rtol=1e-13, atol=0)
    assert to_metrics(with_padding) == pytest.approx(to_metrics(counters), rel=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_demonstration_is_cross_entropy_and_its_nan_reaches_no_gradient(
    surrogate: str, importance: str
):
    # Neighbour of a sampled token; old and reference are far off, and would overflow.
    tokens = tokens_of(
        [NAN, -1.0],
        weight=[0.5, 1.0],
        advantage=[3.0, 1.0],
        old=[-900.0, -1.0],
        reference=[800.0, -1.0],
    )
    cfg = LossConfig.model_validate(
        {"surrogate": surrogate, "importance": importance, "kl_coef": 1.0}
    )
    assert gradient([-2.0, -1.0], tokens, cfg) == [-1.5, -1.0]
    reported = metrics([-2.0, -1.0], tokens, cfg)
    assert reported["loss/demonstrations"] == 0.5 * 3.0 * 2.0
    assert reported["tokens/trained"] == 1.0
    assert reported["mismatch/logprob_abs_max"] == 0.0


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_tokens_without_weight_have_neither_gradient_nor_counters(surrogate: str):
    tokens = tokens_of([NAN, 700.0], weight=[0.0, 0.0], old=[-900.0, -900.0])
    cfg = LossConfig.model_validate({"surrogate": surrogate, "importance": "token_mask"})
    assert gradient([-1.0, -1.0], tokens, cfg) == [0.0, 0.0]
    reported = metrics([-1.0, -1.0], tokens, cfg)
    assert reported.pop("mismatch/ess") == 1.0
    assert set(reported.values()) == {0.0}


# --- counters ---


def test_mismatch_is_measured_against_sums_written_out():
    tokens = tokens_of([-1.5, -2.0, -2.0])
    found = metrics([-1.0, -2.0, -3.0], tokens)
    # log old - log rollout is 0.5, 0, -1.
    assert found["mismatch/logprob_abs_mean"] == pytest.approx(0.5)
    assert found["mismatch/logprob_abs_max"] == 1.0
    assert found["mismatch/kl_k1"] == pytest.approx(0.5 / 3)
    k3 = (math.exp(0.5) - 1 - 0.5) + 0 + (math.exp(-1) - 1 + 1)
    assert found["mismatch/kl_k3"] == pytest.approx(k3 / 3, rel=1e-14)
    weights = [math.exp(0.5), 1.0, math.exp(-1)]
    assert found["mismatch/weight_mean"] == pytest.approx(sum(weights) / 3)
    ess = sum(weights) ** 2 / (3 * sum(w * w for w in weights))
    assert found["mismatch/ess"] == pytest.approx(ess, rel=1e-12)


def test_mismatch_is_between_rollout_engine_and_the_policy_before_the_first_update():
    assert metrics([-5.0], tokens_of([-1.0], old=[-1.25]))["mismatch/logprob_abs_max"] == 0.25


@pytest.mark.parametrize("name", ["mismatch/kl_k1", "mismatch/kl_k3"])
def test_k1_and_k3_average_to_the_divergence_of_trainer_from_rollout_engine(name: str):
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum().item()
    # Its expectation over what the rollout engine samples, token by token.
    found = sum(
        p[i].exp().item() * metrics([q[i]], tokens_of([p[i].item()]))[name] for i in range(8)
    )
    assert found == pytest.approx(exact, rel=1e-12)


def test_only_what_the_configuration_makes_meaningful_is_reported():
    tokens = tokens_of([-1.0], reference=[-1.0])
    always = {name for name in metrics([-1.0], tokens) if not name.startswith("mismatch/")}
    assert always == {"loss", "loss/demonstrations", "tokens/trained"}
    cfg = LossConfig(surrogate="ppo", kl_coef=1.0, importance="token_mask")
    more = set(metrics([-1.0], tokens, cfg)) - set(metrics([-1.0], tokens))
    assert more == {
        "loss/clip_fraction",
        "loss/ratio_max",
        "loss/kl_reference",
        "importance/weight_mean",
        "importance/capped_rate",
    }


def test_counting_keeps_no_graph():
    current = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    tokens = tokens_of([-1.1], old=[-1.2], reference=[-1.3])
    cfg = LossConfig(surrogate="ppo", kl_coef=1.0, importance="token_mask")
    _, counters = policy_loss(current, tokens, cfg, denominator=1.0)
    kept = [*counters.maxima.values(), *(x for pair in counters.quotients.values() for x in pair)]
    assert not any(tensor.requires_grad for tensor in kept)


def test_a_nan_logprob_makes_the_mismatch_nan_and_does_not_hide():
    found = metrics([-1.0, NAN], tokens_of([-1.0, -1.0]))
    assert math.isnan(found["mismatch/logprob_abs_max"]) and math.isnan(found["mismatch/kl_k3"])
