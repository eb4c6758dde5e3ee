"""How many tokens does a step generate, read and train on?   config -> expected counts

Counted as the loop does it: fresh rollouts until there are seeds (`draws.py`), localizations and
suffixes in rounds (`restarts.py`), prompts drawn anew (`algorithm.py`), what is learned beside
rollouts (`retention.py`). Every call of the rollout engines is a stage: the next one waits for its
longest answer.

Lengths and rewards are not known before a run. Assumed: a prompt, a response and a localization
are half as long as they may be; a reset goes back to the middle of its response, in a later round
to another state than before; pass rates are spread evenly from 0 to 1, from prompts and from every
state that is reset to. Of n rollouts that leave one state, each number of failed ones, 0 to n, is
then equally likely: all fail with probability 1 / (n + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_srpo.config import Config
from megatron_srpo.config_method import AlgorithmConfig

MEAN_LENGTH = 0.5
"""Of the longest that the config allows."""
SUFFIX_SHARE = 0.5
"""Of a response that a reset draws anew."""
ASKING = ("self", "depth_matched")
"""Reset rules that ask the policy."""


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
    """Tokens of the longest answer that there may be."""

    @property
    def num_generated(self) -> float:
        """Tokens of all answers."""
        return self.num * self.generated


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Of a step, over all GPUs."""

    stages: tuple[Stage, ...]
    """In their order; several may have one name."""
    sequences: float
    """That are trained on, those of the retention loss included: as if every group had a signal."""
    trained: float
    """Tokens of forward and backward passes, prompts and copied prefixes included, no padding."""
    wanted: float
    """Tokens with a loss: what the head computes."""

    @property
    def sequence_length(self) -> float:
        """Mean of what is trained on."""
        return self.trained / self.sequences

    @property
    def generated(self) -> float:
        """Tokens of all stages."""
        return sum(stage.num_generated for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Means, in tokens."""

    prompt: float
    response: float
    kept: float
    """Of the response that is reset."""
    question: float
    """About a failed response; the template's own words are not counted."""
    answer: float

    @classmethod
    def of(cls, cfg: Config) -> Lengths:
        prompt = MEAN_LENGTH * cfg.data.max_prompt_tokens
        response = MEAN_LENGTH * cfg.rollout.max_response_tokens
        asks = cfg.localize.template.count
        return cls(
            prompt=prompt,
            response=response,
            kept=response * (1 - SUFFIX_SHARE) * (cfg.algorithm.resets != "prompt"),
            question=prompt * asks("{prompt}") + response * (asks("{response}") + asks("{steps}")),
            answer=MEAN_LENGTH * cfg.localize.max_tokens,
        )


def step_tokens(cfg: Config) -> StepTokens:
    """All of a step's, in the mean over steps."""
    algorithm, mean = cfg.algorithm, Lengths.of(cfg)
    stages: list[Stage] = []
    for number in range(1 + algorithm.max_redraws):
        # As if a prompt's rollouts were all fresh ones: it is drawn anew while all have agreed.
        silent = 2 / (number * algorithm.num_rollouts + 1) if number else 1.0
        stages += _attempt(cfg, mean, algorithm.num_prompts * silent)
    num_rollouts = algorithm.num_prompts * algorithm.num_rollouts
    num_copied = algorithm.num_prompts * seeds_found(algorithm) * algorithm.num_suffixes
    own = num_rollouts * mean.response
    if cfg.credit.rule != "chain":
        own -= num_copied * mean.kept
    retained = _num_retained(cfg)
    return StepTokens(
        stages=tuple(stages),
        sequences=num_rollouts + retained,
        trained=num_rollouts * (mean.prompt + mean.response)
        + retained * (mean.question + mean.answer),
        wanted=own + retained * mean.answer,
    )


def _attempt(cfg: Config, mean: Lengths, num_prompts: float) -> Iterator[Stage]:
    """The method itself, once, for so many prompts."""
    algorithm = cfg.algorithm
    for number, drawn in enumerate(draws(algorithm)):
        num_read = 0 if number else num_prompts  # then prompts are in the cache
        yield _responses(
            "base", num_prompts * drawn, num_read, mean, cfg.rollout.max_response_tokens
        )
    num_suffixes = algorithm.num_suffixes // algorithm.reset_rounds
    for number in range(algorithm.reset_rounds if algorithm.num_seeds else 0):
        if algorithm.resets in ASKING:
            # Later all suffixes that left a state, where all of them have failed, round by round.
            asked = num_suffixes / (num_suffixes + 1) ** number if number else 1
            yield Stage(
                name="localize",
                num=num_prompts * seeds_found(algorithm) * asked,
                context=mean.question,
                read=mean.question,
                generated=mean.answer,
                longest=cfg.localize.max_tokens,
            )
        yield _suffixes(cfg, mean, num_prompts, number)


def _suffixes(cfg: Config, mean: Lengths, num_prompts: float, number: int) -> Stage:
    """Of one round; in the first with fresh rollouts for seeds that were not found."""
    algorithm = cfg.algorithm
    found = seeds_found(algorithm)
    fresh = (algorithm.num_seeds - found) * algorithm.num_suffixes if number == 0 else 0.0
    copied = found * algorithm.num_suffixes / algorithm.reset_rounds
    kept = mean.kept * copied / (copied + fresh)
    return Stage(
        name="suffix",
        num=num_prompts * (copied + fresh),
        context=mean.prompt + kept,
        read=0.0,
        generated=mean.response - kept,
        longest=cfg.rollout.max_response_tokens,
    )


def draws(cfg: AlgorithmConfig) -> list[float]:
    """Fresh rollouts of a mean prompt, round by round."""
    if cfg.seeds == "in_group" or not cfg.num_seeds:
        return [cfg.num_base]
    first, last = 0, cfg.num_base + cfg.num_seeds
    rounds = [float(last)]
    while last < cfg.max_draws:
        first, last = last, min(2 * last, cfg.max_draws)
        rounds.append((last - first) * cfg.num_seeds / (first + 1))  # where too few have failed
    return rounds


def seeds_found(cfg: AlgorithmConfig) -> float:
    """Failed rollouts of a mean prompt that are reset."""
    wanted = cfg.num_seeds
    if cfg.allocation == "dead":
        return wanted / (cfg.num_base + 1)
    drawn = cfg.max_draws if cfg.seeds == "extra_draws" else cfg.num_base
    return wanted - wanted * (wanted + 1) / 2 / (drawn + 1)


def _num_retained(cfg: Config) -> int:
    """Demonstrations that a step learns from: of the policy's own as soon as there are so many."""
    is_on = cfg.retention.source != "labelled" or cfg.retention.data is not None
    return cfg.retention.num_samples * is_on


def evaluation(cfg: Config) -> Stage:
    """All sets, each as large as `eval.num_prompts` lets it be."""
    answers = cfg.eval.num_samples * cfg.eval.num_seeds + cfg.eval.greedy
    num_prompts = len(cfg.eval.sets) * cfg.eval.num_prompts
    num, longest = num_prompts * answers, cfg.rollout.max_response_tokens
    return _responses("evaluate", num, num_prompts, Lengths.of(cfg), longest)


def _responses(name: str, num: float, num_read: float, mean: Lengths, longest: int) -> Stage:
    """Of one prompt several: it is read once."""
    return Stage(
        name=name,
        num=num,
        context=mean.prompt,
        read=mean.prompt * num_read / num,
        generated=mean.response,
        longest=longest,
    )
