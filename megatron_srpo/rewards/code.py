"""Does the response's program pass its tests?   each one in a sandbox of its own

The answer of such a prompt is JSON, `{"tests": [{"input": ..., "output": ...}, ...]}`: two texts,
what a program reads and what it must print. With `"function": NAME` beside the tests the input
holds the arguments of a call, one JSON value a line, and the output is a JSON value.
"""

from __future__ import annotations

import functools
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from megatron_srpo.rewards.output import same_text, same_value
from megatron_srpo.rewards.prelude import prelude
from megatron_srpo.rewards.root_folder import Level
from megatron_srpo.rewards.sandbox import Limits, checked, run
from megatron_srpo.rewards.supervise import END_S, SandboxError
from megatron_srpo.types import InputError, Prompt, Score

SPARE_S = END_S + 0.5
"""Left of an item's time when its last program is killed, so that nobody has to kill this."""
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What goes in, and what must come out."""

    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a program must do: all of an answer."""

    cases: tuple[Case, ...]
    function: str | None
    """Called with the values of `input`; None: the program reads and prints."""


class Code:
    """Implements `protocols.Reward`: the value is the fraction of tests passed, and a response is
    correct if it passes all.

    A test is passed by a program that ends by itself in time, with exit code 0, and with the right
    output. Tests run one after another; those whose turn does not come before the item's time is
    over are not passed.
    """

    def __init__(self, *, sandbox: Level, timeout_s: float, limits: Limits | None = None) -> None:
        """`sandbox`: the weakest level that is accepted; `level` is the one in use, the strongest
        that the machine offers. `timeout_s`: for one response with all its tests.

        Raises `InputError` if the machine offers less, or if the time is too short.
        """
        if timeout_s < 2 * SPARE_S:
            raise InputError(f"reward_timeout_s={timeout_s:g}: code needs {2 * SPARE_S:g} or more")
        self.level: Level = checked(sandbox)
        self._budget_s = timeout_s - SPARE_S
        self._limits = limits or Limits()

    def __str__(self) -> str:
        return f"programs run in the sandbox {self.level}"

    def __call__(self, prompt: Prompt, response: str) -> Score:
        """Raises `InputError` if the prompt's answer holds no tests."""
        until = time.monotonic() + self._budget_s
        asked = asked_by(prompt.answer)
        program = last_block(response)
        if program is None:
            return Score(value=0.0, correct=False)
        run_on = functools.partial(
            run,
            program,
            level=self.level,
            function=asked.function,
            prelude=prelude(program),
            limits=self._limits,
            until=until,
        )
        is_same = same_text if asked.function is None else same_value
        num_passed = 0
        for case in asked.cases:
            if time.monotonic() >= until:
                break
            try:
                ran = run_on(case.input.encode())
            except (SandboxError, OSError) as error:
                if time.monotonic() >= until:
                    break
                return Score(value=0.0, correct=False, failure=" ".join(str(error).split()))
            given = ran.output.decode(errors="replace")
            num_passed += ran.ended_well and is_same(given, case.output)
        num_cases = len(asked.cases)
        return Score(value=num_passed / num_cases, correct=num_passed == num_cases)


def asked_by(answer: str) -> Asked:
    """Raises `InputError` if an answer holds no tests."""
    wrong = InputError(
        'the answer of a prompt about code must be JSON, {"tests": [{"input": TEXT, "output": '
        'TEXT}, ...]} and perhaps "function": NAME; not ' + repr(answer[:80])
    )
    try:
        given: Any = json.loads(answer)
        cases = tuple(Case(input=t["input"], output=t["output"]) for t in given["tests"])
        function = given.get("function")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise wrong from error
    texts = [text for case in cases for text in (case.input, case.output)]
    if not cases or not all(isinstance(text, str) for text in (*texts, function or "")):
        raise wrong
    return Asked(cases=cases, function=function)


def last_block(text: str) -> str | None:
    """Content of the last fenced block that is closed, whatever language it is said to be in."""
    found: str | None = None
    fence, begin = "", 0
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        match = FENCE.match(line.rstrip())
        if match is None:
            continue
        marks, rest = match.groups()
        if not fence and not (marks[0] == "`" and "`" in rest):
            fence, begin = marks, number + 1
        elif fence and marks.startswith(fence) and not rest:
            found, fence = "".join(lines[begin:number]), ""
    return found
