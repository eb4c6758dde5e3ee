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
from megatron_srpo.draws import draw
from megatron_srpo.protocols import CreditRule
from megatron_srpo.restarts import blame, first_lines, further, starts
from megatron_srpo.rollouts import Roles, roll_out
from megatron_srpo.types import Group, Prompt, Reset, Rollout, Sample


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
    reset = partial(blame, roles=roles, cfg=cfg)

    # 1. Base: independent rollouts from the prompt, and the failed ones that will be reset.
    drawn = draw(prompts, roll, cfg.algorithm)

    # 2. Resets: each seed goes back to before the thought that is blamed.
    lines = first_lines(drawn, reset)

    # 3. Suffixes: independent rollouts from there; fresh ones for each seed that is not reset.
    rest: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
    for number in range(cfg.algorithm.reset_rounds):
        if number:  # where all have failed again, go back to before what is blamed now
            lines = further(lines, rest, reset)
        for rollout in roll([s for d in drawn for s in starts(d, lines, number, cfg.algorithm)]):
            rest[rollout.prompt.id].append(rollout)

    # 4. Groups: rollouts are comparable only if they left the same state.
    groups: list[Group] = []
    for each in drawn:
        own = [r for seed in each.seeds for r in lines[seed.id].resets]
        groups += group([*each.base, *rest[each.prompt.id]], own, cfg)
        if each.untrained:
            groups.append(Group(prompt=each.prompt, rollouts=tuple(each.untrained), use="seeds"))
    return groups


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
