"""Each set's rows become questions without instructions, and what its reward compares with."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from prepare.code_sets import pickled_text
from prepare.math_sets import is_verifiable
from prepare.table import SETS

from tests.unit.prepared import Command, answers, packed, problems, program, read_items, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


# --- mathematics ---------------------------------------------------------------------------------


def olympiad(problem: str, boxed: str, source: str = "olympiads") -> dict[str, Any]:
    solution = f"We see \\boxed{{0}} is no answer, but $\\boxed{{{boxed}}}$ is."
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": source, "problem": problem, "solution": solution, "messages": messages}


def test_an_olympiad_s_answer_is_the_last_box_of_its_solution(prepare: Command, tmp_path: Path):
    rows = [
        olympiad("Half?", r"\frac{1}{2}"),
        olympiad(" Which one? \n", "C"),
        olympiad("What a relation?", r"x \mid y"),
        olympiad("Elsewhere?", "5", source="cn_k12"),
        {**olympiad("Prove it.", "1"), "solution": "Trivial."},
        olympiad("A number?", "-12"),
    ]
    write_rows(tmp_path / "hub/data/train-00000-of-00002.parquet", rows[:3])
    write_rows(tmp_path / "hub/data/train-00001-of-00002.parquet", rows[3:])
    write_rows(tmp_path / "hub/data/test-00000-of-00001.parquet", [olympiad("Not here.", "9")])
    sizes = ("--num-train", 1, "--num-test", 2)
    line = prepare("numina-olympiads", "--from", tmp_path / "hub", *sizes)
    written = answers(prepare.out / "train.jsonl") | answers(prepare.out / "test.jsonl")
    assert written == {"Half?": r"\frac{1}{2}", "Which one?": "C", "A number?": "-12"}
    assert line == (
        f"{prepare.out}: train.jsonl 1, test.jsonl 2; read 6 rows of 2 files; left out: "
        "1 answer not verifiable, 1 other source, 1 no boxed answer"
    )


@pytest.mark.parametrize(
    "answer",
    ["7", "-7", "+1", ".5", "0.25", r"\frac{\sqrt{3}}{2}", "(1, 2)", "[0, 1]", "A", "E", "3^{10}",
     r"2\pi r", "x=3", "1" * 60, "|2|", "n(n+1)/2"],
)  # fmt: skip
def test_what_can_be_graded_is_verifiable(answer: str):
    assert is_verifiable(answer)


@pytest.mark.parametrize(
    "answer",
    ["", "F", "AB", "n", r"\pi", "1" * 61, "1}", "[0, 1)", "12 cm", r"1\text{ cm}", r"5\mathrm{km}",
     "2 or 3", "25%", "all 3", "x is 4", ": 5", "; 5", "*5", "**5**", "~5", r"\mbox{3}"],
)  # fmt: skip
def test_words_units_pieces_and_long_expressions_are_not(answer: str):
    assert not is_verifiable(answer)


@pytest.mark.parametrize("file", ["{}/{}-00000-of-00001.parquet", "{}/{}/0000.parquet"])
def test_the_fifth_level_comes_from_all_subjects(prepare: Command, tmp_path: Path, file: str):
    for subject, level in (("algebra", 5), ("geometry", 5), ("prealgebra", 4)):
        for part in ("train", "test"):
            row = {
                "problem": f"{subject} {part}",
                "level": f"Level {level}",
                "type": subject.title(),
                "solution": rf"So \boxed{{{part}\frac{{1}}{{2}}}}.",
            }
            write_rows(tmp_path / "hub" / file.format(subject, part), [row])
    line = prepare("math-level5", "--from", tmp_path / "hub")
    for part in ("train", "test"):
        expected = {f"{s} {part}": rf"{part}\frac{{1}}{{2}}" for s in ("algebra", "geometry")}
        assert answers(prepare.out / f"{part}.jsonl") == expected
    assert line.endswith("read 6 rows of 6 files; left out: 2 other level")


def test_hmmt_is_a_test_whatever_the_hub_calls_it(prepare: Command, tmp_path: Path):
    rows = [{"problem_idx": 1, "problem": "Six?", "answer": "6", "problem_type": ["Algebra"]}]
    write_rows(tmp_path / "hub/data/train-00000-of-00001.parquet", rows)
    prepare("hmmt-nov-2025", "--from", tmp_path / "hub")
    assert prepare.files() == ["test.jsonl"]
    assert answers(prepare.out / "test.jsonl") == {"Six?": "6"}


@pytest.mark.parametrize(
    ("name", "file"), [("aime24", "data/train-00000-of-00001.parquet"), ("aime25", "test.jsonl")]
)
def test_an_aime_answer_has_no_zeros_in_front(
    prepare: Command, tmp_path: Path, name: str, file: str
):
    rows = [{"problem": f"P{n}", "answer": n, "id": "0"} for n in ("025", "204", "000")]
    write_rows(tmp_path / "hub" / file, rows)
    prepare(name, "--from", tmp_path / "hub")
    assert answers(prepare.out / "test.jsonl") == {"P025": "25", "P204": "204", "P000": "0"}


def test_an_aime_answer_may_be_stored_as_a_number(prepare: Command, tmp_path: Path):
    file = tmp_path / "aime.csv"
    file.write_text('problem,answer\n"One,\ntwo",12\n')
    prepare("aime24", "--from", file)
    assert answers(prepare.out / "test.jsonl") == {"One,\ntwo": "12"}


def test_another_answer_than_an_aime_has_is_refused(prepare: Command, tmp_path: Path):
    file = write_rows(tmp_path / "test.jsonl", [{"problem": "P", "answer": "1000"}])
    assert prepare.refused("aime25", "--from", file) == (
        f"{file}: row 1: 'answer' must be a number from 0 to 999, not '1000'"
    )


def test_a_grade_school_answer_is_the_number_behind_the_mark(prepare: Command, tmp_path: Path):
    train = [{"question": "Sum?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}]
    test = [
        {"question": "Cost?", "answer": "It is #### no.\n#### 1,234"},
        {"question": "None?", "answer": "Nobody knows"},
    ]
    write_rows(tmp_path / "hub/main/train-00000-of-00001.parquet", train)
    write_rows(tmp_path / "hub/main/test-00000-of-00001.parquet", test)
    write_rows(tmp_path / "hub/socratic/test-00000-of-00001.parquet", problems([1]))
    line = prepare("gsm8k", "--from", tmp_path / "hub")
    assert answers(prepare.out / "train.jsonl") == {"Sum?": "2"}
    assert answers(prepare.out / "test.jsonl") == {"Cost?": "1234"}
    assert line.endswith("read 3 rows of 2 files; left out: 1 no number behind ####")


def test_a_math_500_problem_keeps_the_name_that_it_has(prepare: Command, tmp_path: Path):
    row = {"problem": "P", "solution": "S", "answer": "3", "subject": "Algebra", "level": 2}
    named = [row | {"unique_id": "test/algebra/17.json"}, row | {"problem": "Q"}]
    write_rows(tmp_path / "test.jsonl", named)
    prepare("math-500", "--from", tmp_path / "test.jsonl")
    ids = {item["prompt"]: item["id"] for item in read_items(prepare.out / "test.jsonl")}
    assert ids["P"].startswith("test/algebra/17-") and len(ids["Q"]) == 16


def test_acereason_is_divided_here(prepare: Command, tmp_path: Path):
    write_rows(tmp_path / "math.jsonl", problems(range(20)))
    prepare("acereason-math", "--from", tmp_path, "--num-test", 5)
    assert len(read_items(prepare.out / "test.jsonl")) == 5
    written = answers(prepare.out / "train.jsonl") | answers(prepare.out / "test.jsonl")
    assert written == {row["problem"]: row["answer"] for row in problems(range(20))}


# --- questions -----------------------------------------------------------------------------------


def science(question: str, type: str, **columns: Any) -> dict[str, Any]:
    """A row as SciKnowEval has it."""
    return {
        "prompt": {"default": "You are an expert. Answer directly."},
        "question": question,
        "answer": "",
        "type": type,
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "t", "subtask": "s", "source": "web"},
        "answerKey": "",
        "choices": {"text": [], "label": []},
    } | columns


FOUR = {"text": ["one", "two\n lines", 3.5, "four"], "label": ["A", "B", "C", "D"]}
SCIENCE = [
    science("Which?", "mcq-4-choices", choices=FOUR, answerKey="B"),
    science("Soluble?", "true_or_false", answer="No"),
    science("Balance H2 + O2 = H2O", "filling", answer="2H2 + O2 = 2H2O"),
    science("Derive it.", "open-ended-qa", answer="step " * 50),
    science("Physics?", "mcq-4-choices", choices=FOUR, answerKey="A", domain="Physics"),
    science("Recall?", "mcq-4-choices", choices=FOUR, answerKey="A", details={"level": "L1"}),
    science("Wrong key?", "mcq-4-choices", choices=FOUR, answerKey="F"),
    {**science("Listed?", "", choices=FOUR, answerKey="D"), "type": ["mcq-4-choices"]},
]


def test_a_science_s_questions_are_divided_by_their_reward(prepare: Command, tmp_path: Path):
    write_rows(tmp_path / "hub/data/v2/sciknoweval_test_v2.jsonl", SCIENCE)
    line = prepare("sciknoweval-chemistry", "--from", tmp_path / "hub")
    assert prepare.files() == ["test.jsonl", "test_short.jsonl", "test_yes_no.jsonl"]
    choices = "\n\nA. one\nB. two lines\nC. 3.5\nD. four"
    expected = {f"Which?{choices}": "B", f"Listed?{choices}": "D"}
    assert answers(prepare.out / "test.jsonl") == expected
    assert answers(prepare.out / "test_yes_no.jsonl") == {"Soluble?": "no"}
    filled = {"Balance H2 + O2 = H2O": "2H2 + O2 = 2H2O"}
    assert answers(prepare.out / "test_short.jsonl") == filled
    for reason in ("other domain", "other level", "open answer too long", "none of the choices"):
        assert reason in line


def test_a_science_s_sample_is_drawn_before_it_is_divided(prepare: Command, tmp_path: Path):
    write_rows(tmp_path / "sciknoweval_test_v2.jsonl", SCIENCE)
    line = prepare("sciknoweval-chemistry", "--from", tmp_path, "--num-test", 3, "--seed", 1)
    assert sum(len(read_items(prepare.out / name)) for name in prepare.files()) == 3
    assert "1 not drawn" in line


@pytest.mark.parametrize(
    ("name", "domain"),
    [("sciknoweval-physics", "Physics"), ("sciknoweval-biology", "Biology"),
     ("sciknoweval-materials", "Material")],
)  # fmt: skip
def test_each_science_reads_its_own_domain(
    prepare: Command, tmp_path: Path, name: str, domain: str
):
    rows = [{**SCIENCE[0], "domain": d, "question": d} for d in ("Chemistry", domain)]
    write_rows(tmp_path / "sciknoweval_test_v2.jsonl", rows)
    prepare(name, "--from", tmp_path)
    (item,) = read_items(prepare.out / "test.jsonl")
    assert item["prompt"].startswith(f"{domain}\n\nA. one\n")


def commonsense(name: str, answer: str) -> dict[str, Any]:
    labels = ["A", "B", "C", "D", "E"]
    choices = {"label": labels, "text": [f"{name} {label}" for label in labels]}
    question = f"Where is {name}?"
    return {"id": name, "question": question, "question_concept": name, "choices": choices,
            "answerKey": answer}  # fmt: skip


def test_commonsense_is_tested_on_what_has_answers(prepare: Command, tmp_path: Path):
    for part, name, answer in (("train", "a", "C"), ("validation", "b", "E"), ("test", "c", "")):
        path = tmp_path / f"hub/data/{part}-00000-of-00001.parquet"
        write_rows(path, [commonsense(name, answer)])
    prepare("commonsenseqa", "--from", tmp_path / "hub")
    (item,) = read_items(prepare.out / "test.jsonl")
    lines = ["Where is b?", "", "A. b A", "B. b B", "C. b C", "D. b D", "E. b E"]
    assert (item["prompt"].split("\n"), item["answer"]) == (lines, "E")
    assert item["id"].startswith("b-")
    assert [*answers(prepare.out / "train.jsonl").values()] == ["C"]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_strategy_questions_are_answered_with_yes_or_no(
    prepare: Command, tmp_path: Path, suffix: str
):
    name = "{}.json" if suffix == "json" else "{}-00000-of-00001.parquet"
    for part, answer in (("train", True), ("test", False)):
        row = {"qid": part, "term": "t", "question": f"{part}?", "answer": answer, "facts": "f"}
        write_rows(tmp_path / "hub" / name.format(part), [row])
    prepare("strategyqa", "--from", tmp_path / "hub")
    assert answers(prepare.out / "train.jsonl") == {"train?": "yes"}
    assert answers(prepare.out / "test.jsonl") == {"test?": "no"}


def test_an_answer_that_is_neither_yes_nor_no_is_refused(prepare: Command, tmp_path: Path):
    file = write_rows(tmp_path / "a.jsonl", [{"qid": "1", "question": "Q", "answer": "maybe"}])
    line = prepare.refused("strategyqa", "--from", file, "--split", "test")
    assert line == f"{file}: row 1: 'answer' must be yes or no, true or false, not 'maybe'"


# --- code ----------------------------------------------------------------------------------------


def programs(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    """With enough others that both parts hold something."""
    others = [program(f"other{n}") for n in range(20)]
    return write_rows(tmp_path / "hub/test6.jsonl", [*rows, *others]).parent


def written_program(prepare: Command, name: str) -> dict[str, Any]:
    items = [item for file in prepare.files() for item in read_items(prepare.out / file)]
    (item,) = (item for item in items if item["id"].startswith(f"{name}-"))
    return item


def test_a_program_has_its_public_and_its_private_tests(prepare: Command, tmp_path: Path):
    prepare("livecodebench", "--from", programs(tmp_path, program("abc1")))
    item = written_program(prepare, "abc1")
    assert item["prompt"] == "Print the double of the number (abc1)."
    tests = [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "6\n"}]
    assert json.loads(item["answer"]) == {"tests": tests}


def test_a_function_has_its_name_and_its_starter_code(prepare: Command, tmp_path: Path):
    tests = [{"input": "[1, 2]\n3", "output": "[3]", "testtype": "functional"}]
    code = "class Solution:\n    def add(self, a, b):\n        "
    row = program(
        "3206",
        starter_code=code,
        public_test_cases=json.dumps(tests),
        private_test_cases=json.dumps([]),
        metadata='{"func_name": "add"}',
    )
    prepare("livecodebench", "--from", programs(tmp_path, row))
    item = written_program(prepare, "3206")
    ending = "Starter code:\n```python\nclass Solution:\n    def add(self, a, b):\n```"
    assert item["prompt"].endswith(f"(3206).\n\n{ending}")
    pairs = [{"input": "[1, 2]\n3", "output": "[3]"}]
    assert json.loads(item["answer"]) == {"tests": pairs, "function": "add"}


def ids(prepare: Command, part: str) -> set[str]:
    return {item["id"] for item in read_items(prepare.out / f"{part}.jsonl")}


def test_problems_are_divided_the_same_way_whatever_their_difficulty(
    prepare: Command, tmp_path: Path
):
    rows = [program(f"{d}{n}", difficulty=d) for d in ("easy", "hard") for n in range(40)]
    folder = programs(tmp_path, *rows)
    prepare("livecodebench", "--from", folder)
    everything = {part: ids(prepare, part) for part in ("train", "test")}
    assert everything["train"].isdisjoint(everything["test"])
    assert sum(map(len, everything.values())) == 100
    for difficulty in ("easy", "hard"):
        prepare.out = tmp_path / difficulty
        assert "60 other difficulty" in prepare(f"livecodebench-{difficulty}", "--from", folder)
        for part, names in everything.items():
            assert ids(prepare, part) == {name for name in names if name.startswith(difficulty)}


def test_about_a_quarter_of_the_problems_is_for_the_test(prepare: Command, tmp_path: Path):
    rows = [program(f"p{n}") for n in range(400)]
    prepare("livecodebench-medium", "--from", programs(tmp_path, *rows))
    assert 420 / 4 - 30 < len(ids(prepare, "test")) < 420 / 4 + 30


def test_problems_of_which_the_tests_are_wrong_are_left_out(prepare: Command, tmp_path: Path):
    rows = [program("abc350_c"), program("2891", question_title="find-the-peaks")]
    line = prepare("livecodebench", "--from", programs(tmp_path, *rows))
    assert line.endswith("left out: 2 in the set's errata")


class Evil:
    """A pickle that runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (packed(None, pickle.dumps(Evil())), "must hold one text and nothing else, not "),
        (packed(None, pickle.dumps(["[]", "[]"])), "must hold one text and nothing else, not "),
        (packed(None, pickle.dumps(b"[]")), "must hold one text and nothing else, not "),
        (packed(None, b"\x80\x04."), "must hold one text, not 0"),
        (packed(None, b"no pickle"), ""),
        ("?" * 8, "'private_test_cases' cannot be unpacked: "),
        ("AAAA", "'private_test_cases' cannot be unpacked: "),
        (packed([])[:20], "'private_test_cases' is cut short"),
        (packed({"input": "1"}), "'private_test_cases' must be JSON, a list of tests"),
        (packed([{"input": 1, "output": "2"}]), "'private_test_cases' must be JSON, a list"),
        (packed(None, pickle.dumps("[1, ")), "'private_test_cases' is no JSON ("),
        (packed([{"input": "", "output": "", "testtype": "functional"}]), "tests must all be "),
    ],
    ids=range(12),
)
def test_tests_that_are_no_text_are_refused_and_never_run(
    prepare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, complaint: str
):
    monkeypatch.chdir(tmp_path)
    folder = programs(tmp_path, program("bad", private_test_cases=content))
    line = prepare.refused("livecodebench", "--from", folder)
    assert line.startswith(f"{folder}/test6.jsonl: row 1: ") and complaint in line
    assert not Path("evil").exists()


def test_a_function_without_a_name_is_refused(prepare: Command, tmp_path: Path):
    tests = json.dumps([{"input": "1", "output": "2", "testtype": "functional"}])
    row = program("f", public_test_cases=tests, private_test_cases="[]")
    line = prepare.refused("livecodebench", "--from", programs(tmp_path, row))
    assert line.endswith("'metadata' must name the function that is tested, in func_name")


@pytest.mark.parametrize("text", ["", "[]", "é" * 300, "\ud800"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_text_in_a_pickle_is_what_pickle_would_give(text: str, protocol: int):
    assert pickled_text(pickle.dumps(text, protocol)) == text


# --- docs ----------------------------------------------------------------------------------------


def test_the_docs_list_every_set_with_its_place_and_its_reward():
    lines = (ROOT / "docs/data.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `")]
    listed = {row[1].strip(" `"): (row[2].strip(), row[5].strip()) for row in rows}
    for name, known in SETS.items():
        hub, reward = listed.pop(name)
        assert known.hub in hub and reward.startswith(known.reward), name
    assert listed == {}
