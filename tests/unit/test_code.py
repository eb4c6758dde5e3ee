"""A response's last program is worth the share of its tests that it passes."""

from __future__ import annotations

import json
import time

import pytest

from megatron_srpo.rewards import code
from megatron_srpo.rewards.code import Code, last_block
from megatron_srpo.rewards.output import same_text, same_value
from megatron_srpo.rewards.prelude import prelude
from megatron_srpo.rewards.sandbox import Limits, strongest
from megatron_srpo.rewards.supervise import SandboxError
from megatron_srpo.types import InputError, Score
from tests.unit.builders import prompt

ADDS = "a, b = map(int, input().split())\nprint(a + b)\n"


def asked(*tests: tuple[str, str], function: str | None = None):
    answer = {"tests": [{"input": given, "output": out} for given, out in tests]}
    return prompt(answer=json.dumps(answer | ({"function": function} if function else {})))


SUMS = asked(("1 2", "3"), ("5 5\n", "10\n"), ("0 0", "0"), ("-1 1", "0"))
DIGITS = asked(("[1, 2]\n3", "[3, 1, 2]"), ("[]\n0", "[0]"), function="front")


def fenced(program: str) -> str:
    return f"So:\n```python\n{program}\n```\nThat is it."


@pytest.fixture(scope="module")
def reward() -> Code:
    return Code(sandbox="limits", timeout_s=30, limits=Limits(wall_s=2))


def score(value: float) -> Score:
    return Score(value=value, correct=value == 1)


# --- the reward ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, value",
    [
        (ADDS, 1.0),
        ("def main():\n    print(sum(map(int, input().split())))\nmain()", 1.0),
        ("print(3)", 0.25),
        ("print(0)", 0.5),
        (ADDS + "raise ValueError", 0.0),
        (ADDS + "exit(1)", 0.0),
        (ADDS + "exit(0)", 1.0),
        ("import os; os._exit(0)", 0.0),
        ("if input() != '1 2':\n    print(1 / 0)\nprint(3)", 0.25),
        ("this is no program", 0.0),
        ("", 0.0),
    ],
)
def test_a_program_is_worth_the_share_of_tests_that_it_passes(
    reward: Code, program: str, value: float
):
    assert reward(SUMS, fenced(program)) == score(value)


@pytest.mark.parametrize(
    "program, value",
    [
        ("def front(items, x): return [x] + items", 1.0),
        ("class Solution:\n    def front(self, items: List[int], x): return (x, *items)", 1.0),
        ("def front(items, x): print('[0]'); return items + [x]", 0.5),
        ("def front(items, x): return {x}", 0.0),
        ("def front(items): return items", 0.0),
        ("def back(items, x): return [x] + items", 0.0),
        ("print('[0]')", 0.0),
    ],
)
def test_a_function_is_worth_the_share_of_right_results(reward: Code, program: str, value: float):
    assert reward(DIGITS, fenced(program)) == score(value)


FORGED = {
    "equal to everything": "class E:\n    __eq__ = lambda *_: True\ndef front(*_): return E()",
    "an equal text": "class S(str):\n    __eq__ = lambda *_: True\ndef front(*_): return S()",
    "json replaced": "import json\njson.dump = lambda *_, **__: None\ndef front(*_): pass",
    "an exit code": "import os\ndef front(*_): os._exit(0)",
    "words of success": "import os\ndef front(*_):\n    os.write(1, b'passed: 2'); os._exit(0)",
    "what lies about": (
        "import gc, sys\n"
        "def front(*_):\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame: seen.append(str(frame.f_locals)); frame = frame.f_back\n"
        "    seen += [str(x) for x in gc.get_objects() if type(x) in (dict, list)]\n"
        "    return [3] + [1, 2] if any(str([3] + [1, 2]) in s for s in seen) else None"
    ),
}


@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED)
def test_a_verdict_cannot_be_forged(reward: Code, program: str):
    assert reward(DIGITS, fenced(program)) == score(0)


def test_a_program_sees_the_input_of_one_test_only(reward: Code):
    """Whoever keeps what it saw in a file or in a process does not find it again."""
    program = (
        "seen = []\n"
        "for path in ('/tmp/seen', 'seen', '/dev/shm/seen'):\n"
        "    try: seen.append(open(path).read())\n"
        "    except OSError: pass\n"
        "    try: open(path, 'a').write(input())\n"
        "    except OSError: pass\n"
        "print('nothing' if not seen else seen)"
    )
    assert reward(asked(("a", "nothing"), ("b", "nothing")), fenced(program)) == score(1)


def test_without_a_program_no_test_is_passed(reward: Code):
    assert reward(SUMS, "print(3)") == reward(SUMS, "") == score(0)


def test_tests_whose_turn_does_not_come_are_not_passed():
    """Each but the first takes its 2 s; the item has 1.5 s for all."""
    reward = Code(sandbox="limits", timeout_s=3, limits=Limits(wall_s=2))
    program = "a = input()\nwhile a != '1 2': pass\nprint(3)"
    start = time.monotonic()
    assert reward(SUMS, fenced(program)) == score(0.25)
    assert time.monotonic() < start + 3


def test_a_test_that_takes_too_long_does_not_take_the_others_time(reward: Code):
    reward = Code(sandbox="limits", timeout_s=30, limits=Limits(wall_s=0.3))
    program = "a = input()\nwhile a == '1 2': pass\nprint(sum(map(int, a.split())))"
    assert reward(SUMS, fenced(program)) == score(0.75)


def test_a_sandbox_that_fails_is_no_verdict(reward: Code, monkeypatch: pytest.MonkeyPatch):
    def run(*_: object, **__: object):
        raise SandboxError("no sandbox was closed:\n no room")

    monkeypatch.setattr(code, "run", run)
    said = reward(SUMS, fenced(ADDS))
    assert said == Score(value=0.0, correct=False, failure="no sandbox was closed: no room")


@pytest.mark.parametrize(
    "answer",
    [
        "42",
        "{}",
        '{"tests": []}',
        '{"tests": [{"input": "1"}]}',
        '{"tests": [{"input": "1", "output": 2}]}',
        '{"tests": [{"input": "1", "output": "2"}], "function": 3}',
        "no JSON",
    ],
)
def test_an_answer_without_tests_is_an_error(reward: Code, answer: str):
    with pytest.raises(InputError, match="the answer of a prompt about code must be JSON"):
        reward(prompt(answer=answer), fenced(ADDS))


def test_a_time_in_which_no_program_could_be_judged_is_an_error():
    with pytest.raises(InputError, match="reward_timeout_s=2: code needs 3 or more"):
        Code(sandbox="limits", timeout_s=2)


def test_the_level_in_use_is_the_strongest(reward: Code):
    assert reward.level == strongest()


# --- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, block",
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```\n```py\nb\n\nc\n```\nend", "b\n\nc\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("~~~\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````\na\n```\nb\n```\n````", "a\n```\nb\n```\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\n```", ""),
        ("`a` and ```b``` here", None),
        ("```python\na", None),
        ("a", None),
    ],
)
def test_the_last_closed_block_is_the_program(text: str, block: str | None):
    assert last_block(text) == block


@pytest.mark.parametrize(
    "given, expected, is_same",
    [
        ("3", "3\n", True),
        (" 3 \r\n4", "3\n4", True),
        ("a b", "a  b", False),
        ("1 2", "1  2", True),
        ("1.50", "1.5", True),
        ("1e3", "1000", True),
        ("0.1", "0.10000000000000001", False),
        ("50000000000000000", "50000000000000001", False),
        ("1 2", "2 1", False),
        ("1 2", "1\n2", False),
        ("1\n\n2", "1\n2", False),
        ("1", "1\n2", False),
        ("1\n2", "1", False),
        ("yes", "YES", False),
        ("1 yes", "1.0 yes", False),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("1e999999999", "1", False),
        ("1e9999999999999999999", "1", False),
        ("", "", True),
        ("", "0", False),
    ],
)
def test_printed_lines_are_compared_as_text_or_as_decimals(
    given: str, expected: str, is_same: bool
):
    assert same_text(given, expected) is is_same


@pytest.mark.parametrize(
    "given, expected, is_same",
    [
        ("[1, 2]", "[1,2]", True),
        ("1", "1.0", True),
        ('"1"', "1", False),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ("[2, 1]", "[1, 2]", False),
        ("null", "null", True),
        ("", "null", False),
        ("[" * 10**5, "[]", False),
        ("9" * 5000, "9", False),
    ],
)
def test_results_are_compared_as_json_values(given: str, expected: str, is_same: bool):
    assert same_value(given, expected) is is_same


def test_names_of_the_standard_library_are_there_unimported():
    names = "List, deque, heappush, inf, gcd, accumulate, reduce, StringIO, ascii_lowercase, dumps"
    modules = "math, collections, bisect, random, datetime, sys, itertools"
    defined: dict[str, object] = {}
    exec(prelude(f"{names} = {modules}"), defined)
    assert {*names.split(", "), *modules.split(", ")} <= defined.keys()


def test_what_is_built_in_stays_what_it_is():
    assert prelude("print(open, pow, compile, copyright, len, x)") == ""


def test_a_word_that_is_a_module_is_the_module():
    defined: dict[str, object] = {}
    exec(prelude("random.random(); datetime.datetime; bisect.bisect"), defined)
    assert {type(defined[name]).__name__ for name in ("random", "datetime", "bisect")} == {"module"}
