"""Cosines, their correction, their ratios, by hand; what is measured; what the page says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_srpo.payoff import FRESH, LENGTH, SUFFIXES, TOKENS
from tests.unit.test_claims import run, tuned
from tools.studies.alignment import (
    MEASURED,
    STATES,
    Alignment,
    add,
    agreement,
    cell,
    cosine,
    missing,
    path_in,
    prompts_for,
    quality,
    read,
    relative,
    snr,
)
from tools.studies.regimes import REGIMES
from tools.studies.rule_of_thumb import gradients_part
from tools.studies.store import Store
from tools.studies.table import SEEDS

TRUTH, *NOISE = np.eye(5)


def found(arm: str, cosines: list[float], **other) -> Alignment:
    values = {
        "cell": cell("h8", "start", arm),
        "passed": 0.1,
        "num_prompts": 16,
        "tokens": 2400.0,
        "together": 0.5,
        "halves": 1.0,
        "payoff": {},
        "seconds": 9.0,
        "commit": "abc",
    }
    return Alignment(**{**values, **other}, cosines=cosines)


def told(gain: float) -> dict[str, float]:
    """What a run says of fresh rollouts at another price."""
    return {FRESH: 0.5, SUFFIXES: 0.0, TOKENS: 10 / gain, LENGTH: 10.0}


# --- cosines -------------------------------------------------------------------------------------


def test_a_cosine_with_a_noisy_reference_is_corrected_to_that_with_the_truth():
    one, other = TRUTH + NOISE[0], TRUTH + NOISE[1]
    reference, batch = one + other, TRUTH + NOISE[2]
    assert quality(cosine(one, other)) == pytest.approx(cosine(reference, TRUTH))
    measured = [cosine(batch, reference), cosine(TRUTH + 2 * NOISE[3], reference)]
    corrected = found("grpo", measured, halves=cosine(one, other))
    assert corrected.cosine == pytest.approx((1 / math.sqrt(2) + 1 / math.sqrt(5)) / 2)
    assert corrected.error == pytest.approx((1 / math.sqrt(2) - 1 / math.sqrt(5)) / 2)


@pytest.mark.parametrize("halves", [0.0, -0.2])
def test_halves_that_have_nothing_in_common_are_no_reference(halves: float):
    with pytest.raises(ValueError, match="reference for nothing"):
        quality(halves)


def test_a_gradient_of_nothing_points_nowhere():
    assert cosine(np.zeros(5), TRUTH) == 0.0
    assert cosine(TRUTH, -TRUTH) == pytest.approx(-1)


def test_signal_to_noise_is_that_of_the_squares():
    assert snr(cosine(3 * TRUTH + 2 * NOISE[0], TRUTH)) == pytest.approx(9 / 4)
    assert snr(-0.5) == 0.0


def drawn(rng: np.random.Generator, noises: dict[str, float]) -> list[Alignment]:
    """An unbiased estimator for each arm, against a reference that is noisy too."""
    truth = np.ones(300)

    def draw(noise: float) -> np.ndarray:
        return truth + noise * rng.standard_normal(300)

    halves = draw(2), draw(2)
    return [
        found(
            arm,
            [cosine(draw(noise), halves[0] + halves[1]) for _ in range(24)],
            halves=cosine(*halves),
        )
        for arm, noise in noises.items()
    ]


def test_an_estimator_against_itself_is_1_within_its_error():
    rng, scores = np.random.default_rng(0), []
    for _ in range(100):
        ratio = relative(*drawn(rng, {"prompt": 4.0, "grpo": 4.0}))
        assert ratio is not None and ratio.log_error < 0.4
        scores.append(math.log(ratio.value) / ratio.log_error)
    assert abs(np.mean(scores)) < 0.3 and np.std(scores) == pytest.approx(1, abs=0.2)


def test_half_the_variance_is_worth_twice_the_tokens_and_so_are_half_the_tokens():
    rng, ratios = np.random.default_rng(1), []
    for _ in range(100):
        calm, base = drawn(rng, {"srpo": 6 / math.sqrt(2), "grpo": 6.0})
        ratio, cheap = relative(calm, base), relative(replace(base, tokens=1200.0), base)
        assert ratio is not None and cheap is not None and cheap.value == pytest.approx(2)
        ratios.append(ratio.value)
    assert np.median(ratios) == pytest.approx(2, rel=0.1)


def test_an_error_of_a_ratio_is_that_of_both_cosines():
    base, one = found("grpo", [0.3, 0.5]), found("srpo", [0.4, 0.8])
    ratio = relative(one, base)
    assert ratio is not None
    assert ratio.value == pytest.approx((0.36 / 0.64) / (0.16 / 0.84))
    # d log SNR = 2 dc / (c (1 - c^2)); standard errors .1 and .2
    wanted = math.hypot(0.2 / (0.4 * 0.84), 0.4 / (0.6 * 0.64))
    assert ratio.log_error == pytest.approx(wanted)


def test_a_baseline_within_its_noise_has_no_ratio_and_a_wrong_direction_is_worth_nothing():
    assert relative(found("srpo", [0.5, 0.5]), found("grpo", [0.2, 0.0])) is None
    ratio = relative(found("srpo", [-0.5, -0.4]), found("grpo", [0.5, 0.4]))
    assert ratio is not None and (ratio.value, ratio.log_error) == (0.0, math.inf)


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("a_prompt", [57.0, 95.0, 143.5, 410.0])
def test_batches_of_all_arms_are_equal_in_tokens_to_half_a_prompt(a_prompt: float):
    num = prompts_for(2400, 64 * a_prompt, num_prompts=64)
    assert abs(num * a_prompt - 2400) <= a_prompt / 2


def test_a_batch_has_a_prompt():
    assert prompts_for(10, 9600, num_prompts=64) == 1


# --- lines ---------------------------------------------------------------------------------------


def test_what_is_measured_is_read_back_and_not_measured_again(tmp_path: Path):
    path = path_in(tmp_path)
    before = missing("h8", path)
    done = found("srpo", [0.1, 0.2], payoff=told(1.5))
    assert done.predicted == pytest.approx(1.5)
    add(path, done)
    assert read(path) == {done.cell: done}
    assert missing("h8", path) == [each for each in before if each != done.cell]
    assert len(before) == len(MEASURED) * len(STATES["h8"]) == len(missing("h8", path)) + 1


def test_the_warm_start_comes_first_and_no_gradient_twice():
    assert set(STATES) == set(REGIMES)
    for regime, states in STATES.items():
        cells = missing(regime, Path("nowhere"))
        assert len(set(cells)) == len(cells) and cells[0] == cell(regime, "start", "grpo")
        assert [*states.values()] == sorted(states.values())


def test_gradients_are_no_runs(tmp_path: Path):
    add(path_in(tmp_path), found("srpo", [0.1, 0.2]))
    assert not Store(tmp_path).records


# --- page ----------------------------------------------------------------------------------------


def test_a_prediction_s_error_is_that_of_logarithms():
    points = [(2.0, 1.0), (1.0, 1.0), (4.0, 2.0), (3.0, 0.0), (1.0, math.inf)]
    same = agreement(points)
    assert same is not None and same.num == 3
    assert same.factor == pytest.approx(2 ** math.sqrt(2 / 3)) and same.bias == pytest.approx(0.5)
    assert same.correlation == pytest.approx(math.sqrt(3) / 2)
    assert agreement(points[:2]) is None


def test_the_page_holds_gradients_against_runs(tmp_path: Path):
    store = tuned(tmp_path)
    arms = {"grpo": (0.30, 0.5), "rrpo": (0.20, 0.4), "srpo": (0.35, 0.6), "chain26": (0.4, 0.7)}
    known = {}
    for arm, (level, end) in arms.items():
        one = found(arm, [level, level + 0.02], payoff={} if arm == "grpo" else told(end))
        known[one.cell] = one
        for seed in range(2):
            store.add(run(arm, seed, end + 0.01 * seed))
    text = gradients_part(known, store, SEEDS)
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    ratio = relative(known[cell("h8", "start", "rrpo")], known[cell("h8", "start", "grpo")])
    assert ratio is not None
    assert f"0.210 ± 0.010 | {ratio.value:.2f} ×/÷" in rows["| rrpo"]
    checks = [line for line in text.splitlines() if line.startswith("| start | h8 | ")]
    assert "| start | h8 | SNR | difference in AUC per token | 1.00 | 3 |  |  |  |  |" in checks
    assert sum("rule of thumb | SNR | 1.00 | 3 |" in line for line in checks) == 1
    assert gradients_part({}, store, SEEDS) == ""
