"""The knobs of the method: what is drawn, what is learned from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_srpo.config_sections import (
    Count,
    CountOrZero,
    NonNegative,
    Section,
    check_template,
)


class AlgorithmConfig(Section):
    resets: str = "self"
    """none (GRPO); random (RRPO); self (SRPO): the thought that the policy blames; oracle: the
    first wrong one, where the task knows it; or your own rule, FILE.py:CLASS. Controls:
    depth_matched: as deep as `self` went for another seed; prompt: to the prompt; dial: oracle
    with probability `dial`, else random."""
    dial: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How often the localizer of `resets=dial` is right."""
    num_prompts: Count = 16
    """Per step, over all replicas."""
    num_rollouts: Count = 8
    """N: trained rollouts per prompt, base and suffix together."""
    split: Annotated[str, Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$")] = "1x4"
    """SEEDSxSUFFIXES: of the N rollouts so many restart from failed ones; the rest is the base."""
    seeds: Literal["in_group", "extra_draws"] = "in_group"
    """in_group: the first failed base rollouts, which stay in their group. extra_draws: fresh ones
    are drawn until enough have failed; those are reset and not trained (the paper's release)."""
    max_draws: Count = 12
    """Fresh rollouts of a prompt at most, with `seeds=extra_draws`."""
    allocation: Literal["fixed", "dead"] = "fixed"
    """Which prompts have resets. fixed: those with failed rollouts; dead: those whose base rollouts
    have all failed. The others' suffixes are fresh rollouts."""
    reset_rounds: Count = 1
    """A seed's suffixes come in so many rounds. While none from a state is correct, the next round
    leaves from the furthest state to which the rule resets one of them."""
    reset_offset: CountOrZero = 0
    """Resets go back so many thoughts further than the rule says."""
    empty_prefix: Literal["merge", "separate"] = "merge"
    """merge: rollouts that left the same state are one group, whatever led there. separate: each
    reset has a group of its own, also one to the bare prompt (the paper's release)."""
    truncated: Literal["train", "mask"] = "train"
    """mask: a response cut by its length counts in its group's statistics and not in the loss."""
    max_redraws: CountOrZero = 0
    """A prompt whose every group has equal rewards is drawn anew up to so many times."""

    @property
    def num_seeds(self) -> int:
        """Failed rollouts of a prompt that are reset."""
        return 0 if self.resets == "none" else int(self.split.split("x")[0])

    @property
    def num_suffixes(self) -> int:
        """Rollouts from each reset state."""
        return int(self.split.split("x")[1])

    @property
    def num_base(self) -> int:
        """Fresh rollouts per prompt."""
        return self.num_rollouts - self.num_seeds * self.num_suffixes

    @model_validator(mode="after")
    def _split_fits(self) -> AlgorithmConfig:
        again = self.num_seeds * self.num_suffixes
        if self.num_base < 0:
            raise ValueError(
                f"num_rollouts={self.num_rollouts} does not fit split={self.split}, "
                f"which alone makes {again}"
            )
        if self.seeds == "in_group" and self.num_base < self.num_seeds:
            raise ValueError(
                f"num_rollouts={self.num_rollouts} with split={self.split} has {self.num_base} "
                f"base rollouts and needs {self.num_seeds} failed ones among them; give more "
                "num_rollouts, or seeds=extra_draws"
            )
        num_drawn = self.num_base + self.num_seeds
        if self.num_seeds and self.seeds == "extra_draws" and self.max_draws < num_drawn:
            raise ValueError(
                f"max_draws={self.max_draws} is less than the {self.num_base} base rollouts and "
                f"{self.num_seeds} seeds that are drawn"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> AlgorithmConfig:
        if self.dial != 1 and self.resets != "dial":
            raise ValueError(f"dial={self.dial:g} is of resets=dial, not of resets={self.resets}")
        if self.allocation == "dead" and self.seeds == "extra_draws":
            raise ValueError("allocation=dead looks at the base group: it needs seeds=in_group")
        if self.num_suffixes % self.reset_rounds:
            raise ValueError(
                f"split={self.split} does not divide its {self.num_suffixes} suffixes over "
                f"reset_rounds={self.reset_rounds}"
            )
        return self


class CreditConfig(Section):
    rule: str = "group"
    """group: (reward - baseline) / std within a group, on the tokens that a rollout sampled
    itself; pooled: the same with all rollouts of a prompt for one group; chain: pooled, and copied
    prefixes are credited with `prefix_weight` x reward / std; or your own rule, FILE.py:CLASS."""
    prefix_weight: NonNegative = 1.0
    """Of `rule=chain`; 0: prefixes are masked, and count among the tokens."""
    baseline: Literal["mean", "half", "leave_one_out"] = "mean"
    """half: half of the mean (a control); leave_one_out: the mean of the group's other rewards."""
    std: Literal["population", "sample", "none"] = "population"
    """What the difference is divided by."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """sequence_mean: over sequences, of the means over their tokens. token_mean: over tokens."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> CreditConfig:
        if self.prefix_weight != 1 and self.rule != "chain":
            raise ValueError(
                f"prefix_weight={self.prefix_weight:g} is of rule=chain, not of rule={self.rule}"
            )
        return self


class ThoughtConfig(Section):
    delimiter: Annotated[str, Field(min_length=1)] = "</thought>"
    """Ends a thought and belongs to it."""
    max_tokens: Count = 256
    """A longer thought is cut there; a reset leaves at least this much room."""


class LocalizeConfig(Section):
    template: str = (
        "{prompt}\n\n{steps}\nThe final answer is wrong. Find the step that went wrong first: the "
        "first one that does not follow from the problem and the steps before it. Do not solve "
        "the problem again. Finish with \\boxed{{step number}}.\n"
    )
    """Asks the policy about its failed response. Fields: {prompt} {response} {steps} (numbered)."""
    chat: bool = False
    """Send it as a user message through the chat template."""
    parser: Literal["boxed", "verdicts"] = "boxed"
    """boxed: the last \\boxed{number}. verdicts: one + or - a thought up to the first -."""
    temperature: NonNegative = 0.3
    max_tokens: Count = 1024
    fallback: Literal["restart", "random", "skip"] = "restart"
    """If the answer names no thought: go back to the prompt, to a random thought, or nowhere (the
    reset's rollouts are then fresh ones)."""

    @model_validator(mode="after")
    def _template_formats(self) -> LocalizeConfig:
        check_template("template", self.template, ("prompt", "response", "steps"))
        return self


class RetentionConfig(Section):
    """A loss that keeps the policy able to localize."""

    source: Literal["labelled", "initial", "verified"] = "labelled"
    """Whose localizations: labelled: those in `data`; without labels, initial: what the initial
    policy answered in the first step; verified: the policy's latest answers that were followed by
    better rollouts than fresh ones."""
    data: Path | None = None
    """Labelled localization demonstrations (`prompt`, `response`); null: no such loss."""
    num_samples: Count = 12
    """Localizations per step."""
    weight: NonNegative = 0.1
    """Of their mean cross entropy, beside the policy loss."""

    @model_validator(mode="after")
    def _only_labels_are_read(self) -> RetentionConfig:
        if self.data is not None and self.source != "labelled":
            raise ValueError(f"data is of source=labelled, not of source={self.source}")
        return self
