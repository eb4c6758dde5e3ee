"""What is compared: arms, studies, in which regimes, over how many seeds, and in which order.

    study -> stages of jobs

The learning rate is tuned on `TUNING_SEEDS`; what is reported comes from `SEEDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OTHERS = ("u8", "m8", "k8", "f8")
"""Regimes beside h8."""
TUNING_SEEDS = {"h8": (900, 901, 902), **dict.fromkeys(OTHERS, (900, 901))}
"""Chose each regime's learning rate, by GRPO's area under the curve over tokens; never reported."""
SEEDS = range(10)
"""What is reported; the first so many, where a stage asks for fewer."""
LEARNING_RATES = ("0.0002", "0.0003", "0.00045", "0.0007", "0.001")
TUNED = "grpo"
"""The arm that is tuned: all others use its learning rate."""

Settings = tuple[str, ...]
"""Overrides of a regime's config, `key=value`."""
CHAIN = ("credit.rule=chain",)
SHAPE_26 = ("algorithm.split=1x6",)
EXTRA = ("algorithm.seeds=extra_draws",)
HALF = ("credit.baseline=half",)
CHAIN_26 = ("algorithm.resets=self", *CHAIN, *SHAPE_26)
UNLABELLED = ("retention.data=null",)
FOUR = ("loss.updates_per_batch=4",)


def resets(rule: str) -> Settings:
    """The method that goes back to where `rule` says."""
    return (f"algorithm.resets={rule}",)


ARMS: Mapping[str, Settings] = {
    "grpo": resets("none"),
    "half": (*resets("none"), *HALF),
    "rrpo": resets("random"),
    "srpo": resets("self"),
    "oracle": resets("oracle"),
    "prompt": resets("prompt"),
    "chain": (*resets("self"), *CHAIN),
    "srpo26": (*resets("self"), *SHAPE_26),
    "chain26": CHAIN_26,
    "chain26 masked": (*CHAIN_26, "credit.prefix_weight=0"),
    "chain26 random": (*resets("random"), *CHAIN, *SHAPE_26),
    "chain26 half": (*CHAIN_26, *HALF),
    "chain26 dead": (*CHAIN_26, "algorithm.allocation=dead"),
    "srpo 1x4 extra": (*resets("self"), *EXTRA),
    "srpo 2x4 extra": (*resets("self"), *EXTRA, "algorithm.split=2x4"),
    "srpo 1x8 extra": (*resets("self"), *EXTRA, "algorithm.split=1x8"),
    "srpo kl": (*resets("self"), "loss.kl_coef=0.05"),
    "srpo u4": (*resets("self"), *FOUR),
    "srpo u4 clip": (*resets("self"), *FOUR, "loss.surrogate=ppo"),
    "srpo u4 kl": (*resets("self"), *FOUR, "loss.kl_coef=0.05"),
    "grpo u4": (*resets("none"), *FOUR),
    "grpo u4 clip": (*resets("none"), *FOUR, "loss.surrogate=ppo"),
    **{
        f"dial {q}": (*resets("dial"), f"algorithm.dial={q}", *CHAIN, *SHAPE_26)
        for q in ("0.0", "0.25", "0.5", "0.75", "1.0")
    },
    "chain26 initial": (*CHAIN_26, *UNLABELLED, "retention.source=initial"),
    "chain26 verified": (*CHAIN_26, *UNLABELLED, "retention.source=verified"),
    "chain26 none": (*CHAIN_26, *UNLABELLED),
    "srpo none": (*resets("self"), *UNLABELLED),
    "grpo none": (*resets("none"), *UNLABELLED),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A question."""

    title: str
    arms: Sequence[str]
    baseline: str
    """The arm that the others are compared with, in pairs of one seed."""
    lr: str | None = None
    """Instead of the regime's."""


STUDIES: Mapping[str, Study] = {
    "methods": Study(
        title="Methods, credit and shapes",
        arms=(
            *("grpo", "srpo", "chain26", "rrpo", "half"),
            *("chain", "oracle", "prompt"),
            *("chain26 half", "chain26 dead"),
            *("chain26 random", "chain26 masked", "srpo26"),
        ),
        baseline="grpo",
    ),
    "slower": Study(
        title="Everybody with two thirds of GRPO's best learning rate",
        arms=("grpo", "srpo", "chain26"),
        baseline="grpo",
        lr="0.0003",
    ),
    "localization": Study(
        title="How good must the localizer be, and what keeps it so?",
        arms=(
            *("chain26", *(f"dial {q}" for q in ("0.0", "0.25", "0.5", "0.75", "1.0"))),
            *("chain26 initial", "chain26 verified", "chain26 none", "srpo none", "grpo none"),
        ),
        baseline="chain26",
    ),
    "splits": Study(
        title="Splits of eight rollouts",
        arms=("srpo 1x4 extra", "srpo 2x4 extra", "srpo 1x8 extra", "srpo", "srpo26"),
        baseline="srpo 1x4 extra",
    ),
    "seeds": Study(
        title="Is the seed trained?",
        arms=("srpo", "srpo 1x4 extra"),
        baseline="srpo",
    ),
    "clip": Study(
        title="Clipping, KL and several updates of one batch",
        arms=(
            *("srpo", "srpo u4", "srpo u4 clip", "srpo kl", "srpo u4 kl"),
            *("grpo", "grpo u4", "grpo u4 clip"),
        ),
        baseline="srpo",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Runs that are wanted together."""

    study: str
    regimes: Sequence[str]
    num_arms: int = 99
    """The study's first so many."""
    num_seeds: int = 7


STAGES: Sequence[Stage] = (
    Stage(study="methods", regimes=("h8",), num_arms=5),
    Stage(study="methods", regimes=OTHERS, num_arms=5),
    Stage(study="methods", regimes=("h8",), num_arms=10),
    Stage(study="slower", regimes=("h8",)),
    Stage(study="methods", regimes=OTHERS, num_arms=8),
    Stage(study="methods", regimes=("u8", "m8"), num_arms=10),
    Stage(study="localization", regimes=("h8",)),
    Stage(study="splits", regimes=("h8",)),
    Stage(study="seeds", regimes=("h8",)),
    Stage(study="clip", regimes=("h8",)),
    Stage(study="methods", regimes=("h8",), num_arms=5, num_seeds=10),
    Stage(study="methods", regimes=("h8",)),
)
"""What matters most comes first."""


def regimes_of(study: str) -> list[str]:
    """Where the study is made: other studies' runs elsewhere are none of its own."""
    return [*dict.fromkeys(name for each in STAGES if each.study == study for name in each.regimes)]


QUICK, QUICK_SEEDS = ("rrpo", "srpo"), range(3)
"""What `--quick` compares in h8."""
