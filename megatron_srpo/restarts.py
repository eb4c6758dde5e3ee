"""Which states do suffixes leave?   seeds, resets -> lines -> starts, round by round

A line is what becomes of one seed: at first its suffixes leave the state to which the seed is
reset. With `reset_rounds` above 1 they come in rounds: while none from that state is correct, the
failed ones are reset as the seed was, and the next round leaves from the furthest of these states
that lies behind the line's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_srpo.config import Config
from megatron_srpo.config_method import AlgorithmConfig
from megatron_srpo.draws import Drawn, failed
from megatron_srpo.resets import checked
from megatron_srpo.rollouts import Roles
from megatron_srpo.types import Reset, Rollout, Start

Blame = Callable[[Sequence[Rollout]], list[Reset]]
"""Failed rollouts -> their resets, each to a thought that leaves room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    at: Rollout
    """Whose beginning is kept: the seed, later maybe one of its failed suffixes."""
    thought: int | None
    """Of `at`: the first that is not kept; None: the seed is not reset."""
    resets: tuple[Reset, ...]
    """All that were asked for, those included that no rollout left."""


def blame(rollouts: Sequence[Rollout], *, roles: Roles, cfg: Config) -> list[Reset]:
    """Implements `Blame` by the rule; `AlarmError` if it does not answer for each of them."""
    if not rollouts:
        return []
    chosen = checked(roles.rule.choose(rollouts, roles.generator), rollouts)
    return [go_back(reset, r, cfg) for reset, r in zip(chosen, rollouts, strict=True)]


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


def first_lines(drawn: Sequence[Drawn], blame: Blame) -> dict[str, Line]:
    """Seed id -> its line."""
    seeds = [seed for each in drawn for seed in each.seeds]
    return {
        seed.id: Line(at=seed, thought=reset.thought, resets=(reset,))
        for seed, reset in zip(seeds, blame(seeds), strict=True)
    }


def further(
    lines: Mapping[str, Line], suffixes: Mapping[str, Sequence[Rollout]], blame: Blame
) -> dict[str, Line]:
    """The lines of the next round. `suffixes`: by prompt, of all rounds so far."""
    stuck: dict[str, list[Rollout]] = {}
    for seed_id, line in lines.items():
        left = [r for r in suffixes[line.at.prompt.id] if r.seed_id == line.at.id]
        stuck[seed_id] = [] if any(r.score.correct for r in left) else failed(left)
    asked = [rollout for rollouts in stuck.values() for rollout in rollouts]
    resets = {reset.seed_id: reset for reset in blame(asked)}
    return {
        seed_id: _furthest(line, [(r, resets[r.id]) for r in stuck[seed_id]])
        for seed_id, line in lines.items()
    }


def _furthest(line: Line, found: Sequence[tuple[Rollout, Reset]]) -> Line:
    """Resets that nothing leaves are on record as `nearer`."""
    at, thought = line.at, line.thought
    for rollout, reset in found:
        if thought is not None and (reset.thought or 0) > thought:
            at, thought = rollout, reset.thought
    record = [
        reset
        if reset.seed_id == at.id or reset.thought is None
        else replace(reset, thought=None, moved_from=reset.thought, cause="nearer")
        for _, reset in found
    ]
    return replace(line, at=at, thought=thought, resets=(*line.resets, *record))


def starts(
    drawn: Drawn, lines: Mapping[str, Line], number: int, cfg: AlgorithmConfig
) -> list[Start]:
    """Where a prompt's remaining rollouts of a round begin: fresh ones for each seed that was not
    found or not reset, all in the first round, then those that leave its lines' states."""
    own = [lines[seed.id] for seed in drawn.seeds]
    num = cfg.num_suffixes // cfg.reset_rounds
    suffixes: list[Start] = []
    for position, line in enumerate(own):
        if line.thought is None:
            continue
        end = line.at.thoughts[line.thought].start
        first = position * cfg.num_suffixes + number * num
        suffixes += [
            Start(
                prompt=drawn.prompt,
                stage="suffix",
                index=first + i,
                token_ids=line.at.token_ids[:end],
                logprobs=line.at.logprobs[:end],
                seed_id=line.at.id,
            )
            for i in range(num)
        ]
    num_reset = sum(line.thought is not None for line in own)
    num_extra = cfg.num_rollouts - len(drawn.base) - num_reset * cfg.num_suffixes
    extra = range(num_extra) if number == 0 else range(0)
    return [Start(prompt=drawn.prompt, stage="extra", index=i) for i in extra] + suffixes
