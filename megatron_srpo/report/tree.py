"""What became of one prompt in one step?   groups -> a tree: rollouts, resets, suffixes

The page and the terminal show the same tree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srpo.advantages import CREDITS
from megatron_srpo.algorithm import to_samples
from megatron_srpo.config import Config
from megatron_srpo.types import Group, Prompt, Reset, Rollout

Credit = tuple[tuple[int, float, float], ...]
"""Of neighbouring tokens that have the same: how many, loss weight, advantage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A rollout; of a seed, what was done about it."""

    rollout: Rollout
    group: Group
    credit: Credit | None
    """None: it was not trained, or a rule of the user's gave the credit, which is not on record."""
    reset: Reset | None = None
    suffixes: tuple[Branch, ...] = ()

    @property
    def verdict(self) -> str:
        """pass, fail, or none: the reward could not be computed."""
        if self.rollout.score.failure is not None:
            return "none"
        return "pass" if self.rollout.score.correct else "fail"

    @property
    def num_copied_thoughts(self) -> int:
        return sum(thought.start < self.rollout.num_copied for thought in self.rollout.thoughts)

    @property
    def all(self) -> list[Branch]:
        """This one, and all that came of it."""
        return [self, *(b for suffix in self.suffixes for b in suffix.all)]

    @property
    def name(self) -> str:
        """What tells it from the prompt's other rollouts: base/0; 5.1/base/0 if drawn anew."""
        step, _, rest = self.rollout.id.partition("/")
        stage = rest.removeprefix(self.rollout.prompt.id + "/")
        return f"{step}/{stage}" if "." in step else stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """One prompt of one step."""

    prompt: Prompt
    branches: tuple[Branch, ...]

    @property
    def has_reset(self) -> bool:
        """A failed rollout was gone back on."""
        return any(b.reset is not None and b.reset.thought is not None for b in self.branches)

    @property
    def all(self) -> list[Branch]:
        return [branch for root in self.branches for branch in root.all]


def trees(groups: Sequence[Group], cfg: Config | None) -> list[Tree]:
    """Of a step, in the journal's order. Without a config no credit is known."""
    credit = _credits(groups, cfg) if cfg else {}
    by_prompt: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_prompt[group.prompt.id].append(group)
    return [_tree(own, credit) for own in by_prompt.values()]


def _tree(groups: list[Group], credit: dict[str, Credit]) -> Tree:
    members = [(rollout, group) for group in groups for rollout in group.rollouts]
    ids = {rollout.id for rollout, _ in members}
    resets = {reset.seed_id: reset for group in groups for reset in group.resets}
    by_seed: dict[str | None, list[tuple[Rollout, Group]]] = defaultdict(list)
    for rollout, group in members:
        by_seed[rollout.seed_id if rollout.seed_id in ids else None].append((rollout, group))

    def grown(seed_id: str | None) -> tuple[Branch, ...]:
        return tuple(
            Branch(
                rollout=rollout,
                group=group,
                credit=credit.get(rollout.id),
                reset=resets.get(rollout.id),
                suffixes=grown(rollout.id),
            )
            for rollout, group in by_seed[seed_id]
        )

    return Tree(prompt=groups[0].prompt, branches=grown(None))


def is_credit_known(cfg: Config | None) -> bool:
    """The rule is one of the package's own: what it gave can be computed again."""
    return cfg is not None and cfg.credit.rule in CREDITS


def _credits(groups: Sequence[Group], cfg: Config) -> dict[str, Credit]:
    if not is_credit_known(cfg):
        return {}
    prompts = {rollout.id: len(g.prompt.token_ids) for g in groups for rollout in g.rollouts}
    return {
        sample.id: runs(
            sample.loss_weight[prompts[sample.id] :], sample.advantage[prompts[sample.id] :]
        )
        for sample in to_samples(groups, CREDITS[cfg.credit.rule](cfg), cfg)
    }


def runs(loss_weight: Iterable[float], advantage: Iterable[float]) -> Credit:
    """Neighbours that are alike, counted.

    >>> runs([0, 0, 0.5, 0.5], [0, 0, -1, -1])
    ((2, 0.0, 0.0), (2, 0.5, -1.0))
    """
    pairs = np.stack([np.asarray(loss_weight), np.asarray(advantage)], axis=1)
    if not len(pairs):
        return ()
    begins = np.flatnonzero(np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1)))
    lengths = np.diff(np.append(begins, len(pairs)))
    return tuple(
        (int(length), float(pairs[begin, 0]), float(pairs[begin, 1]))
        for begin, length in zip(begins, lengths, strict=True)
    )
