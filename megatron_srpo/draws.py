"""Which fresh rollouts are compared, and which failed ones are reset?   prompts -> base and seeds

in_group     b rollouts of a prompt are its base group; the first failed ones among them are the
             seeds and stay in the group. With `allocation=dead` there are seeds only where all of
             them have failed.
extra_draws  a prompt is drawn until a of its rollouts have failed and b others are there. The
             first a failed ones are seeds, not trained; the first b others are the base (paper,
             released code: one chain after another, at most 12). That base is better than the
             policy, since a failed rollout was taken out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_srpo.config_method import AlgorithmConfig
from megatron_srpo.types import Prompt, Rollout, Start

Roll = Callable[[Sequence[Start]], list[Rollout]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A prompt's fresh rollouts, told apart."""

    prompt: Prompt
    base: Sequence[Rollout]
    seeds: Sequence[Rollout]
    """At most `num_seeds`, in the order in which they were drawn."""
    untrained: Sequence[Rollout] = ()
    """Of all that were drawn, those that are not in the base: seeds, and what came after them."""

    def is_complete(self, cfg: AlgorithmConfig) -> bool:
        return len(self.base) == cfg.num_base and len(self.seeds) == cfg.num_seeds


def draw(prompts: Sequence[Prompt], roll: Roll, cfg: AlgorithmConfig) -> list[Drawn]:
    """As `cfg.seeds` says; without seeds both ways are the same."""
    if cfg.seeds == "extra_draws" and cfg.num_seeds:
        return _extra_draws(prompts, roll, cfg)
    fresh = _fresh(prompts, range(cfg.num_base), roll)
    return [Drawn(prompt=p, base=fresh[p.id], seeds=_to_reset(fresh[p.id], cfg)) for p in prompts]


def _to_reset(base: Sequence[Rollout], cfg: AlgorithmConfig) -> list[Rollout]:
    """The first failed ones; with `allocation=dead` none if any is correct."""
    if cfg.allocation == "dead" and any(rollout.score.correct for rollout in base):
        return []
    return failed(base)[: cfg.num_seeds]


def _extra_draws(prompts: Sequence[Prompt], roll: Roll, cfg: AlgorithmConfig) -> list[Drawn]:
    """In rounds over all prompts, each as large as all before it together.

    The result is that of drawing one by one; what a round drew too many is untrained.
    """
    drawn: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
    first, last = 0, cfg.num_base + cfg.num_seeds
    while open := [p for p in prompts if not _tell_apart(p, drawn[p.id], cfg).is_complete(cfg)]:
        for id, rollouts in _fresh(open, range(first, last), roll).items():
            drawn[id] += rollouts
        if last == cfg.max_draws:
            break
        first, last = last, min(2 * last, cfg.max_draws)
    return [_tell_apart(prompt, drawn[prompt.id], cfg) for prompt in prompts]


def _fresh(prompts: Sequence[Prompt], indices: range, roll: Roll) -> dict[str, list[Rollout]]:
    flat = iter(roll([Start(prompt=p, stage="base", index=i) for p in prompts for i in indices]))
    return {prompt.id: [next(flat) for _ in indices] for prompt in prompts}


def failed(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Not correct; a reward that could not be computed is no verdict."""
    return [r for r in rollouts if not r.score.correct and r.score.failure is None]


def _tell_apart(prompt: Prompt, drawn: Sequence[Rollout], cfg: AlgorithmConfig) -> Drawn:
    seeds = failed(drawn)[: cfg.num_seeds]
    taken = {seed.id for seed in seeds}
    others = [rollout for rollout in drawn if rollout.id not in taken]
    return Drawn(
        prompt=prompt,
        base=others[: cfg.num_base],
        seeds=seeds,
        untrained=seeds + others[cfg.num_base :],
    )
