"""Which rollouts does a page hold, and how?   a run's steps -> JSON that fits, and facts of all

A prompt is shown with all of its rollouts or not at all. Steps share the room equally, what one
leaves goes to those behind it; in a step, prompts with resets come first, then the journal's order.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_srpo.report.experiments import Measured, Row
from megatron_srpo.report.facts import Depths, depths, lengths
from megatron_srpo.report.record import RunRecord, read_groups
from megatron_srpo.report.tokens import Pieces, find_pieces
from megatron_srpo.report.tree import Branch, Tree, trees

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Of one run."""

    measured: Measured
    steps: tuple[str, ...]
    """JSON, one of each step that is on record: `{"step", "of", "prompts"}`; see `plain`."""
    num_prompts: int
    """That are shown, of so many:"""
    num_recorded: int
    missing: tuple[str, ...]
    """In the journal, or of the tokenizer."""


def show(run: RunRecord, *, most_bytes: int) -> Shown:
    """All steps of the journal, read once; `most_bytes` of their rollouts are kept."""
    pieces, why = find_pieces(run)
    missing = [why] if why and run.steps else []
    facts: dict[int, Row] = {}
    total = Depths.none()
    steps: list[str] = []
    num_bytes = num_prompts = num_recorded = 0
    for index, step in enumerate(run.steps, start=1):
        groups, damage = read_groups(run, step)
        if damage:
            missing.append(damage)
            continue
        total += depths(groups)
        facts[step] = lengths(groups)
        grown = trees(groups, run.cfg)
        room = most_bytes * index // len(run.steps) - num_bytes
        kept = _fitting(grown, pieces, room=room)
        prompts = ",".join(kept)
        steps.append(f'{{"step":{step},"of":{len(grown)},"prompts":[{prompts}]}}')
        num_bytes += len(prompts.encode())
        num_prompts += len(kept)
        num_recorded += len(grown)
    rows = {int(row["step"]): row for row in run.metrics}
    rows |= {step: rows.get(step, {"step": float(step)}) | facts[step] for step in facts}
    return Shown(
        measured=Measured(run=run, rows=tuple(rows[s] for s in sorted(rows)), depths=total),
        steps=tuple(steps),
        num_prompts=num_prompts,
        num_recorded=num_recorded,
        missing=tuple(missing),
    )


def _fitting(grown: list[Tree], pieces: Pieces | None, *, room: int) -> list[str]:
    """JSON of prompts, in the journal's order, until the first for which there is no room."""
    kept: dict[int, str] = {}
    for index in sorted(range(len(grown)), key=lambda i: (not grown[i].has_reset, i)):
        text = to_json(plain(grown[index], pieces))
        room -= len(text.encode()) + 1
        if room < 0:
            break
        kept[index] = text
    return [kept[index] for index in sorted(kept)]


def to_json(value: Any) -> str:
    """Short, and safe between the tags of a page: no text in it can end a script. A surrogate that
    stands alone, which a page cannot hold, is a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def plain(tree: Tree, pieces: Pieces | None) -> dict[str, Any]:
    """A prompt for the page: `id`, question `q`, answer `a`, known right thoughts `sol`, rollouts
    `b` (`_plain`)."""
    prompt = tree.prompt
    known: dict[str, Any] = {"id": prompt.id, "q": prompt.text, "a": prompt.answer}
    if prompt.solution:
        known["sol"] = list(prompt.solution)
    return known | {"b": [_plain(branch, pieces) for branch in tree.branches]}


def _plain(branch: Branch, pieces: Pieces | None) -> dict[str, Any]:
    """A rollout for the page; what is usual is left out.

    n name; v reward; c 1 right, 0 wrong, absent without a verdict; f why; k thoughts copied from
    the seed; t texts of the others; p lengths of the tokens' texts (`packed`), without copied ones;
    r credit of all tokens, three numbers for a run of them (`tree.Credit`); m copied tokens; u use,
    if not trained; z 1 in a group without signal; l 1 cut by length; x reset; s suffixes.
    """
    rollout, copied = branch.rollout, branch.num_copied_thoughts
    score, start = rollout.score, rollout.num_copied
    known: dict[str, Any] = {
        "n": branch.name,
        "v": _short(score.value),
        "c": int(score.correct) if score.failure is None else None,
        "f": score.failure,
        "k": copied or None,
        "t": [thought.text for thought in rollout.thoughts[copied:]],
        "p": packed(pieces(rollout.token_ids)[start:]) if pieces else None,
        "r": [_short(n) for run in branch.credit for n in run] if branch.credit else None,
        "m": start or None,
        "u": branch.group.use if branch.group.use != "train" else None,
        "z": None if branch.group.has_signal else 1,
        "l": 1 if rollout.finish_reason == "length" else None,
        "x": _reset(branch),
        "s": [_plain(suffix, pieces) for suffix in branch.suffixes] or None,
    }
    return {key: value for key, value in known.items() if value is not None}


def _reset(branch: Branch) -> dict[str, Any] | None:
    """k the first thought that is not kept, absent if nothing was reset; w why; a the policy's
    answer; o the thought that it named, if another; n tokens of the answer."""
    reset = branch.reset
    if reset is None:
        return None
    known = {
        "k": reset.thought,
        "w": reset.cause,
        "a": reset.answer or None,
        "o": reset.moved_from,
        "n": reset.num_tokens or None,
    }
    return {key: value for key, value in known.items() if value is not None}


def _short(number: float) -> float | None:
    """Four digits, whole numbers as such; nothing for what is no number."""
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.4g}")
    return int(rounded) if rounded == int(rounded) else rounded


def packed(pieces: list[str]) -> str:
    """Lengths in UTF-16 units, as browsers count; a digit of 35 (z) goes on with the next.

    >>> packed(["ab", "", "c" * 36])
    '20z1'
    """
    lengths = [len(piece.encode("utf-16-le", "surrogatepass")) // 2 for piece in pieces]
    return "".join("z" * (length // 35) + DIGITS[length % 35] for length in lengths)
