"""A name in the config is a part of the package, or a part of a file that lies anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_srpo.extensions import build, find
from megatron_srpo.protocols import ResetRule
from megatron_srpo.resets import RULES, RandomReset
from megatron_srpo.types import InputError
from tests.unit.builders import TOKENIZER, config

RULE = """
from megatron_srpo.types import Reset
from {beside} import WORD

class LastThought:
    def __init__(self, cfg, tokenizer):
        self.cfg = cfg

    def choose(self, seeds, generator):
        return [Reset(seed_id=s.id, thought=len(s.thoughts) - 1, cause=WORD) for s in seeds]

class Nothing:
    def __init__(self, cfg, tokenizer):
        pass

class Other:
    def __init__(self):
        pass

NUMBER = 5
"""


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A file with names of its own in each test: Python keeps what it has imported."""
    name = f"rules_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}_beside.py").write_text("WORD = 'last'\n")
    path = tmp_path / f"{name}.py"
    path.write_text(RULE.format(beside=f"{name}_beside"))
    return str(path)


def test_a_name_of_the_package_is_found_in_its_table():
    assert find("random", RULES, key="algorithm.resets") is RandomReset


def test_a_class_of_a_file_that_imports_what_lies_beside_it_is_built(file: str):
    cfg = config()
    rule = build(f"{file}:LastThought", RULES, ResetRule, cfg, TOKENIZER, key="algorithm.resets")
    assert rule.cfg is cfg  # type: ignore[attr-defined]
    assert type(rule).__name__ == "LastThought"


def test_a_path_starts_in_the_working_folder(file: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(file).parent)
    found = find(f"{Path(file).name}:LastThought", RULES, key="algorithm.resets")
    assert found is find(f"{file}:LastThought", RULES, key="algorithm.resets")


def test_two_names_of_one_file_come_from_one_module(file: str):
    first, second = (find(f"{file}:{name}", RULES, key="k") for name in ("LastThought", "Other"))
    assert first.__module__ == second.__module__


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "last",
            "k=last: must be one of none, random, self, oracle, depth_matched, prompt, dial, or",
        ),
        ("rules.txt:Last", "k=rules.txt:Last: must be one of"),
        ("nowhere/rules.py:Last", "k=nowhere/rules.py:Last: no such file: nowhere/rules.py"),
        ("{file}:Missing", "defines no function or class 'Missing'"),
        ("{file}:NUMBER", "defines no function or class 'NUMBER'"),
        (
            "{file}:Other",
            "Other: cannot be built with (Config, CharTokenizer): too many positional arguments",
        ),
        ("{file}:Nothing", "lacks the methods of protocols.ResetRule"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(file: str, name: str, message: str):
    with pytest.raises(InputError) as refused:
        build(name.format(file=file), RULES, ResetRule, config(), TOKENIZER, key="k")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("def broken(:\n", "SyntaxError: invalid syntax"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named"),
    ],
)
def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path, source: str, message: str):
    path = tmp_path / f"broken_{len(source)}.py"
    path.write_text(source)
    with pytest.raises(InputError, match=message):
        find(f"{path}:Rule", RULES, key="k")


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path: Path):
    path = tmp_path / "json.py"
    path.write_text(RULE)
    with pytest.raises(InputError, match="Python knows another module 'json': rename the file"):
        find(f"{path}:LastThought", RULES, key="k")


def test_a_file_that_cannot_be_imported_by_its_name_is_refused(tmp_path: Path):
    path = tmp_path / "rules.v2.py"
    path.write_text(RULE)
    with pytest.raises(InputError, match=r"rules.v2.py is no name that Python can import"):
        find(f"{path}:LastThought", RULES, key="k")


def test_a_constructor_that_fails_for_a_reason_of_its_own_shows_it(tmp_path: Path):
    path = tmp_path / "rules_that_fail.py"
    path.write_text("class Rule:\n    def __init__(self, cfg, tokenizer):\n        len(cfg)\n")
    with pytest.raises(TypeError, match="has no len"):
        build(f"{path}:Rule", RULES, ResetRule, config(), TOKENIZER, key="k")
