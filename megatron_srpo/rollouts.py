"""How does a state become a scored response?   starts -> requests -> completions -> rollouts"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.protocols import Generator, ResetRule, Reward, Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.thoughts import split_thoughts
from megatron_srpo.types import Completion, Request, Rollout, Start


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Who does the work: any engine, reward and rule that keep their protocols."""

    generator: Generator
    tokenizer: Tokenizer
    reward: Reward
    rule: ResetRule


def roll_out(starts: Sequence[Start], *, name: str, roles: Roles, cfg: Config) -> list[Rollout]:
    """Continue each start to its end; score the whole response while others still generate.

    `name` says which step this is (and which attempt of it): ids and seeds begin with it.
    """
    by_id = {f"{name}/{s.prompt.id}/{s.stage}/{s.index}": s for s in starts}
    requests = [_request(id, start, cfg) for id, start in by_id.items()]
    rollouts = {
        new.request_id: _rollout(by_id[new.request_id], new, roles, cfg)
        for new in roles.generator.generate(requests)
    }
    return [rollouts[id] for id in by_id]


def _request(id: str, start: Start, cfg: Config) -> Request:
    return Request(
        id=id,
        purpose=start.stage,
        context=np.concatenate([start.prompt.token_ids, start.token_ids]),
        max_tokens=cfg.rollout.max_response_tokens - len(start.token_ids),
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        seed=counter_seed(cfg.seed, id),
    )


def _rollout(start: Start, new: Completion, roles: Roles, cfg: Config) -> Rollout:
    token_ids = np.concatenate([start.token_ids, new.token_ids])
    thoughts = split_thoughts(token_ids, roles.tokenizer, cfg.thoughts)
    return Rollout(
        id=new.request_id,
        prompt=start.prompt,
        stage=start.stage,
        token_ids=token_ids,
        logprobs=np.concatenate([start.logprobs, new.logprobs]),
        num_copied=len(start.token_ids),
        seed_id=start.seed_id,
        thoughts=thoughts,
        score=roles.reward(start.prompt, "".join(thought.text for thought in thoughts)),
        finish_reason=new.finish_reason,
        num_cached_tokens=new.num_cached_tokens,
        weight_version=new.weight_version,
    )
