"""GRPO, RRPO and SRPO, start to finish, on plain values: read this file first.

    prompts -> base rollouts -> failed seeds -> resets -> suffix rollouts -> groups -> samples

GRPO  N fresh rollouts of a prompt form one group.
RRPO  b fresh rollouts form a group. The first failed one, the seed, is reset to the start of a
      *random* thought, and k suffixes from there form a second group; N = b + a k for a seeds.
SRPO  the same, but the policy itself names the thought that went wrong first.

A group is rollouts that left the same state, so their rewards are comparable. The rest follows:
a seed that was not found gives its suffixes to fresh rollouts of the base group, and so does a
reset to the first thought, which is the prompt. The methods differ in the rule passed in. Each
stage is one stream of requests over all prompts of a replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from megatron_srpo.advantages import credited
from megatron_srpo.config import Config
from megatron_srpo.draws import Drawn, draw
from megatron_srpo.protocols import CreditRule
from megatron_srpo.resets import checked
from megatron_srpo.rollouts import Roles, roll_out
from megatron_srpo.types import Group, Prompt, Reset, Rollout, Sample, Start


def collect_groups(
    prompts: Sequence[Prompt], *, step: int, roles: Roles, cfg: Config
) -> list[Group]:
    """One step's rollouts, grouped. Every prompt gets exactly `num_rollouts` that are trained."""
    groups = attempt(prompts, name=str(step), roles=roles, cfg=cfg)
    for again in range(1, cfg.algorithm.max_redraws + 1):
        speaking = {g.prompt.id for g in groups if g.use == "train" and g.has_signal}
        silent = [prompt for prompt in prompts if prompt.id not in speaking]
        if not silent:
            break
        groups = [
            replace(g, use="replaced") if g.use == "train" and g.prompt.id not in speaking else g
            for g in groups
        ]
        groups += attempt(silent, name=f"{step}.{again}", roles=roles, cfg=cfg)
    return groups


def attempt(prompts: Sequence[Prompt], *, name: str, roles: Roles, cfg: Config) -> list[Group]:
    """The method itself, once."""
    roll = partial(roll_out, name=name, roles=roles, cfg=cfg)

    # 1. Base: independent rollouts from the prompt, and the failed ones that will be reset.
    drawn = draw(prompts, roll, cfg.algorithm)

    # 2. Resets: each seed goes back to before the thought that is blamed.
    seeds = [seed for each in drawn for seed in each.seeds]
    chosen = checked(roles.rule.choose(seeds, roles.generator), seeds) if seeds else ()
    resets = {seed.id: go_back(r, seed, cfg) for r, seed in zip(chosen, seeds, strict=True)}

    # 3. Suffixes: independent rollouts from there; fresh ones for each seed that is not reset.
    starts = [start for each in drawn for start in start_again(each, resets, cfg)]
    rest: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
    for rollout in roll(starts):
        rest[rollout.prompt.id].append(rollout)

    # 4. Groups: rollouts are comparable only if they left the same state.
    groups: list[Group] = []
    for each in drawn:
        own = [resets[seed.id] for seed in each.seeds]
        groups += group([*each.base, *rest[each.prompt.id]], own, cfg)
        if each.untrained:
            groups.append(Group(prompt=each.prompt, rollouts=tuple(each.untrained), use="seeds"))
    return groups


def go_back(reset: Reset, seed: Rollout, cfg: Config) -> Reset:
    """The reset itself, or an earlier one: by the offset, and to leave room for a thought."""
    if reset.thought is None:
        return reset
    thought = max(reset.thought - cfg.algorithm.reset_offset, 0)
    room = cfg.rollout.max_response_tokens - cfg.thoughts.max_tokens
    while thought > 0 and seed.thoughts[thought].start > room:
        thought -= 1
    if thought == reset.thought:
        return reset
    return replace(reset, thought=thought, moved_from=reset.thought)


def start_again(drawn: Drawn, resets: dict[str, Reset], cfg: Config) -> list[Start]:
    """Where a prompt's remaining rollouts begin: at the prompt, then at each reset state."""
    num, prompt = cfg.algorithm.num_suffixes, drawn.prompt
    suffixes: list[Start] = []
    for number, seed in enumerate(drawn.seeds):
        thought = resets[seed.id].thought
        if thought is not None:
            end = seed.thoughts[thought].start
            suffixes += [
                Start(
                    prompt=prompt,
                    stage="suffix",
                    index=number * num + i,
                    token_ids=seed.token_ids[:end],
                    logprobs=seed.logprobs[:end],
                    seed_id=seed.id,
                )
                for i in range(num)
            ]
    num_extra = cfg.algorithm.num_rollouts - len(drawn.base) - len(suffixes)
    return [Start(prompt=prompt, stage="extra", index=i) for i in range(num_extra)] + suffixes


def group(rollouts: Sequence[Rollout], resets: Sequence[Reset], cfg: Config) -> list[Group]:
    """One prompt's rollouts by the state that they left; `separate`: and by their seed."""
    by_state: dict[tuple[str | None, bytes], list[Rollout]] = {}
    for rollout in rollouts:
        seed_id = rollout.seed_id if cfg.algorithm.empty_prefix == "separate" else None
        state = (seed_id, rollout.token_ids[: rollout.num_copied].tobytes())
        by_state.setdefault(state, []).append(rollout)
    groups: list[Group] = []
    for index, members in enumerate(by_state.values()):
        seeds = {rollout.seed_id for rollout in members}
        # A reset that made nothing is on record where its fresh rollouts are: in the first group.
        made = [r for r in resets if r.seed_id in seeds or (r.thought is None and index == 0)]
        groups.append(Group(prompt=members[0].prompt, rollouts=tuple(members), resets=tuple(made)))
    return groups


def to_samples(groups: Sequence[Group], credit: CreditRule, cfg: Config) -> list[Sample]:
    """Groups -> training sequences, blind to the method: weight and advantage say it all."""
    turns = {id: i for i, id in enumerate(dict.fromkeys(each.prompt.id for each in groups))}
    samples: list[Sample] = []
    for rollout, loss_weight, advantage in credited(groups, credit):
        is_masked = cfg.algorithm.truncated == "mask" and rollout.finish_reason == "length"
        prompt = rollout.prompt.token_ids
        pad = np.zeros(len(prompt), np.float32)
        samples.append(
            Sample(
                id=rollout.id,
                token_ids=np.concatenate([prompt, rollout.token_ids]),
                loss_weight=np.concatenate([pad, loss_weight * (not is_masked)]),
                advantage=np.concatenate([pad, advantage]),
                logprob=np.concatenate([pad, rollout.logprobs]),
                count=0.0 if is_masked else float(loss_weight.sum()),
                turn=turns[rollout.prompt.id],
            )
        )
    return samples
