"""How many tokens does a step generate, read and train on?   config -> expected counts

Lengths and failures are not known before a run. Assumed: a prompt, a response and a localization
are half as long as they may be, a reset goes back to the middle of its response, and half of all
rollouts fail.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_srpo.config import Config

MEAN_LENGTH = 0.5
"""Of the longest that the config allows."""
SUFFIX_SHARE = 0.5
"""Of a response that a reset draws anew."""
FAILED = 0.5
"""Of all rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Requests that the rollout engines answer together."""

    name: str
    num: float
    """Requests, over all engines."""
    context: float
    """Tokens before the first one that is generated."""
    read: float
    """Of them, those that are not in the prefix cache, a mean over requests."""
    generated: float
    """Tokens of a mean answer."""
    longest: float
    """Tokens of the longest answer."""

    @property
    def num_generated(self) -> float:
        """Tokens of all answers."""
        return self.num * self.generated


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Of a step, over all GPUs."""

    stages: tuple[Stage, ...]
    sequences: float
    """That are trained on."""
    sequence_length: float
    """Mean, prompt and copied prefix included."""
    wanted: float
    """Tokens with a loss: what the head computes."""

    @property
    def trained(self) -> float:
        """Tokens of forward and backward passes, without padding."""
        return self.sequences * self.sequence_length

    @property
    def generated(self) -> float:
        """Tokens of all stages."""
        return sum(stage.num_generated for stage in self.stages)


def step_tokens(cfg: Config) -> StepTokens:
    """The larger counts, where something is a matter of luck: every seed is found."""
    algorithm, rollout = cfg.algorithm, cfg.rollout
    prompt = MEAN_LENGTH * cfg.data.max_prompt_tokens
    response = MEAN_LENGTH * rollout.max_response_tokens
    num_prompts = algorithm.num_prompts
    seeds, base = num_prompts * algorithm.num_seeds, num_prompts * algorithm.num_base
    drawn = base + (seeds / FAILED if algorithm.seeds == "extra_draws" else 0)
    suffixes = seeds * algorithm.num_suffixes
    longest = rollout.max_response_tokens
    stages = [_responses("base", drawn, num_prompts, prompt, response, longest)]
    if seeds and algorithm.resets in ("self", "depth_matched"):
        asked = prompt + response
        answer = MEAN_LENGTH * cfg.localize.max_tokens
        stages.append(
            Stage(
                name="localize",
                num=seeds,
                context=asked,
                read=asked,
                generated=answer,
                longest=cfg.localize.max_tokens,
            )
        )
    if suffixes:
        kept = (1 - SUFFIX_SHARE) * response
        stages.append(
            Stage(
                name="suffix",
                num=suffixes,
                context=prompt + kept,
                read=0.0,
                generated=SUFFIX_SHARE * response,
                longest=longest,
            )
        )
    return StepTokens(
        stages=tuple(stages),
        sequences=num_prompts * algorithm.num_rollouts,
        sequence_length=prompt + response,
        wanted=(base + SUFFIX_SHARE * suffixes) * response,
    )


def evaluation(cfg: Config) -> Stage:
    """All sets, each as large as `eval.num_prompts` lets it be."""
    answers = cfg.eval.num_samples * cfg.eval.num_seeds + cfg.eval.greedy
    num_prompts = len(cfg.eval.sets) * cfg.eval.num_prompts
    return _responses(
        "evaluate",
        num_prompts * answers,
        num_prompts,
        MEAN_LENGTH * cfg.data.max_prompt_tokens,
        MEAN_LENGTH * cfg.rollout.max_response_tokens,
        cfg.rollout.max_response_tokens,
    )


def _responses(
    name: str, num: float, num_prompts: int, prompt: float, response: float, longest: int
) -> Stage:
    """Of one prompt several: it is read once."""
    read = prompt * num_prompts / num if num else 0.0
    return Stage(name=name, num=num, context=prompt, read=read, generated=response, longest=longest)
