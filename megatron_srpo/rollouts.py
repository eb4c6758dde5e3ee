"""How does a state become a scored response?   starts -> requests -> completions -> rollouts"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.protocols import Generator, Judge, ResetRule, Tokenizer
from megatron_srpo.seeding import counter_seed
from megatron_srpo.thoughts import split_thoughts
from megatron_srpo.types import Completion, Prompt, Request, Rollout, Score, Start, Thought, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Who does the work: any engine, judge and rule that keep their protocols."""

    generator: Generator
    tokenizer: Tokenizer
    judge: Judge
    rule: ResetRule


def roll_out(starts: Sequence[Start], *, name: str, roles: Roles, cfg: Config) -> list[Rollout]:
    """Continue each start to its end; the judge has a whole response while others still generate.

    `name` says which step this is (and which attempt of it): ids and seeds begin with it.
    """
    by_id = {f"{name}/{s.prompt.id}/{s.stage}/{s.index}": s for s in starts}
    requests = [_request(id, start, cfg) for id, start in by_id.items()]
    finished: list[_Response] = []

    def responses() -> Iterator[tuple[Prompt, str]]:
        for new in roles.generator.generate(requests):
            finished.append(_response(by_id[new.request_id], new, roles.tokenizer, cfg))
            yield finished[-1].start.prompt, finished[-1].text

    scores = roles.judge.judge(responses())
    rollouts = {r.new.request_id: _rollout(r, s) for r, s in zip(finished, scores, strict=True)}
    return [rollouts[id] for id in by_id]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Response:
    """Whole, and not scored yet."""

    start: Start
    new: Completion
    token_ids: Tokens
    thoughts: tuple[Thought, ...]

    @property
    def text(self) -> str:
        """The copied prefix included."""
        return "".join(thought.text for thought in self.thoughts)


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


def _response(start: Start, new: Completion, tokenizer: Tokenizer, cfg: Config) -> _Response:
    token_ids = np.concatenate([start.token_ids, new.token_ids])
    thoughts = split_thoughts(token_ids, tokenizer, cfg.thoughts)
    return _Response(start=start, new=new, token_ids=token_ids, thoughts=thoughts)


def _rollout(response: _Response, score: Score) -> Rollout:
    start, new = response.start, response.new
    return Rollout(
        id=new.request_id,
        prompt=start.prompt,
        stage=start.stage,
        token_ids=response.token_ids,
        logprobs=np.concatenate([start.logprobs, new.logprobs]),
        num_copied=len(start.token_ids),
        seed_id=start.seed_id,
        thoughts=response.thoughts,
        score=score,
        finish_reason=new.finish_reason,
        num_cached_tokens=new.num_cached_tokens,
        weight_version=new.weight_version,
    )
