"""LiveCodeBench: problems of programming contests with the tests that a program must pass."""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from prepare.item import Item, LeftOut, Row, text_of

MAX_TESTS_BYTES = 2**30
"""Of one problem's tests, unpacked: a file may claim more than a machine has."""
TEXT = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
AROUND_TEXT = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")
ERRATA = frozenset((
    "abc311_c", "abc326_d", "abc327_b", "abc333_e", "abc343_e", "abc362_c",
    "find-words-containing-character", "find-the-peaks",
    "generate-binary-strings-without-adjacent-zeros",
    "abc337_e", "abc355_e", "abc350_c",
))  # fmt: skip
"""Problems that accept more answers than their tests, that talk with the judge, or whose tests are
wrong, by id or title (ERRATA.md of the LiveCodeBench repository): no grader is right about them."""


def live_code(difficulties: tuple[str, ...]) -> Callable[[Row], Item]:
    """Problems of these difficulties, each with all of its tests, public and private."""

    def item(row: Row) -> Item:
        if text_of(row, "difficulty") not in difficulties:
            raise LeftOut("other difficulty")
        name = text_of(row, "question_id")
        if not ERRATA.isdisjoint((name, row["question_title"])):
            raise LeftOut("in the set's errata")
        question = text_of(row, "question_content")
        if starter := str(row["starter_code"] or "").rstrip():
            question = f"{question}\n\nStarter code:\n```python\n{starter}\n```"
        return Item(prompt=question, answer=_answer(row), id=name)

    return item


def _answer(row: Row) -> str:
    """`{"tests": [{"input", "output"}, ...], "function": ...}`; without a function a program reads
    standard input. With it an input has a JSON value a line, and the output is one."""
    tests = [
        *_tests(text_of(row, "public_test_cases"), "public_test_cases"),
        *_tests(_unpacked(text_of(row, "private_test_cases")), "private_test_cases"),
    ]
    kinds = {test.get("testtype") for test in tests}
    if not tests:
        raise LeftOut("no tests")
    if not kinds <= {"stdin", "functional"} or len(kinds) != 1:
        raise ValueError(
            f"tests must all be stdin or all functional, not {sorted(map(str, kinds))}"
        )
    answer: dict[str, Any] = {
        "tests": [{"input": test["input"], "output": test["output"]} for test in tests]
    }
    if kinds == {"functional"}:
        answer["function"] = _function(row)
    return json.dumps(answer)


def _tests(content: str, column: str) -> list[Mapping[str, Any]]:
    tests = _json(content, column)
    if not isinstance(tests, list) or not all(_is_test(test) for test in tests):
        raise ValueError(f"{column!r} must be JSON, a list of tests with input and output")
    return tests


def _json(content: str, column: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{column!r} is no JSON ({error})") from error


def _is_test(test: object) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output"))


def _function(row: Row) -> str:
    metadata = _json(text_of(row, "metadata"), "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("'metadata' must name the function that is tested, in func_name")
    return name


def _unpacked(content: str) -> str:
    """JSON as it is, or base64 of zlib of a pickle of it."""
    if content.startswith("["):
        return content
    try:
        packed = base64.b64decode(content, validate=True)
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(packed, MAX_TESTS_BYTES)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"'private_test_cases' cannot be unpacked: {error}") from error
    if not unpacking.eof:
        raise ValueError(f"'private_test_cases' is cut short, or above {MAX_TESTS_BYTES} bytes")
    return pickled_text(pickled)


def pickled_text(pickled: bytes) -> str:
    """The text in the pickle of a text. `ValueError` for any other: a pickle is a program, and
    this one is looked at, never run."""
    texts: list[str] = []
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in TEXT:
            assert isinstance(argument, str)
            texts.append(argument)
        elif operation.name not in AROUND_TEXT:
            raise ValueError(f"a pickle must hold one text and nothing else, not {operation.name}")
    if len(texts) != 1:
        raise ValueError(f"a pickle must hold one text, not {len(texts)}")
    return texts[0]
