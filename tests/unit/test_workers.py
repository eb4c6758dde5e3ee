"""Several processes for one reward: who is asked when, and what a loss costs the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_srpo.rewards import sandbox
from megatron_srpo.rewards.judge import RewardJudge, judge_named
from megatron_srpo.rewards.messages import item_in, packed_item, packed_verdict, verdict_in
from megatron_srpo.rewards.verdict import RewardError, RewardRaisedError
from megatron_srpo.rewards.workers import Workers, ready
from megatron_srpo.stopping import StopRequested
from megatron_srpo.types import InputError, Prompt, Score
from tests.unit.builders import in_place
from tests.unit.test_process import PROMPT, is_running, judge_of, named, wait_until

FILE = '''
import os, signal, sys, time
from pathlib import Path
from megatron_srpo.types import Score

HERE = Path(__file__).parent

def say(value):
    return Score(value=value, correct=value == 1)

def wait_for(*names):
    while not all((HERE / name).exists() for name in names):
        time.sleep(0.005)
    return say(1.0)

def meet(name, *others):
    (HERE / name).touch()
    return wait_for(*others)

def hang(name):
    (HERE / name).with_suffix(".new").write_text(str(os.getpid()))
    (HERE / name).with_suffix(".new").rename(HERE / name)
    time.sleep(60)

ACTS = {
    "pid": lambda: say(os.getpid()),
    "length": lambda *rest: say(float(sum(map(len, rest)))),
    "number": lambda rest: say(float(rest)),
    "meet": meet,
    "wait_for": wait_for,
    "hang": hang,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda: [][1],
    "fail": lambda: Score(value=1.0, correct=True, failure="no opinion"),
    "heavy": lambda: say(len({"torch", "sympy", "vllm", "megatron"} & {*sys.modules})),
}

def reward(prompt, response):
    """Does what the response says."""
    word, *rest = response.split()
    return ACTS[word](*rest)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several_workers")


@pytest.fixture(scope="module")
def three(folder: Path) -> RewardJudge:
    """Three processes at most, for all tests."""
    return judge_of(named(folder, FILE), num_workers=3)


def items(*responses: str) -> list[tuple[Prompt, str]]:
    return [(PROMPT, response) for response in responses]


def values(scores: list[Score]) -> list[float]:
    return [score.value for score in scores]


def idle(judge: RewardJudge) -> list[int]:
    """Ids of processes that wait to be asked."""
    (workers,) = judge.rewards
    assert isinstance(workers, Workers)
    return [worker._process.pid for worker in workers.idle]


def test_several_items_are_worked_on_at_once_and_never_more_than_there_may_be(
    three: RewardJudge,
) -> None:
    scores = three.judge(items("meet a a b c", "meet b a b c", "meet c a b c", *["pid"] * 20))
    assert values(scores[:3]) == [1.0] * 3
    assert {*values(scores[3:])} <= {*map(float, idle(three))}
    assert len(idle(three)) == 3


def test_scores_come_in_the_order_of_their_items_though_later_ones_finish_first(
    three: RewardJudge,
) -> None:
    responses = ["wait_for last", *(f"number {n}" for n in range(30)), "meet last last"]
    assert values(three.judge(items(*responses))) == [1.0, *map(float, range(30)), 1.0]
    assert three.judge([]) == []


def test_an_item_is_begun_while_the_next_one_is_still_to_come(folder: Path) -> None:
    """Also the first, whose process is not even there."""
    judge = judge_of(named(folder, FILE))

    def stream() -> Iterator[tuple[Prompt, str]]:
        for name in ("early", "late"):
            yield PROMPT, f"meet {name} {name}"
            wait_until((folder / name).exists)

    assert values(judge.judge(stream())) == [1.0, 1.0]


def test_a_process_is_started_only_when_all_others_are_busy(folder: Path) -> None:
    (workers,) = judge_of(named(folder, FILE), num_workers=3).rewards
    round = workers.begin(lambda: None)
    for _ in range(5):
        round.put(PROMPT, "pid")
        while not round.is_done:
            ready(round.descriptors, within_s=5)
            round.advance()
    assert len({*values(round.scores)}) == 1
    workers.close()


def test_what_one_item_does_to_its_process_costs_the_others_nothing(folder: Path) -> None:
    judge = judge_of(named(folder, FILE), timeout_s=1, num_workers=3)
    hanging, one, killing, two = judge.judge(items("hang h", "number 1", "kill", "number 2"))
    assert values([one, two]) == [1.0, 2.0]
    assert hanging.failure == "its process took longer than 1 s, twice"
    assert killing.failure == "its process died with signal 9, twice"
    assert not is_running(int((folder / "h").read_text()))


def test_every_attempt_is_a_sign_of_life(folder: Path) -> None:
    ticks: list[None] = []
    judge = judge_of(named(folder, FILE), num_workers=1)
    judge.judge(items("kill", "number 1", "number 2"), tick=lambda: ticks.append(None))
    # Two processes start and die, a third starts, and answers twice.
    assert len(ticks) == 2 + 2 + 1 + 2


def test_a_response_that_no_connection_holds_is_asked_about(folder: Path) -> None:
    judge = judge_of(named(folder, FILE), num_workers=1)
    for _ in ("starting", "idle"):
        assert values(judge.judge(items(f"length {'x' * 2**20}"))) == [2**20]


@pytest.mark.parametrize("raised", [StopRequested, KeyboardInterrupt, OSError])
def test_when_the_engine_stops_no_process_goes_on_and_the_next_call_is_answered(
    folder: Path, three: RewardJudge, raised: type[BaseException]
) -> None:
    mark = folder / f"stopped_{raised.__name__}"

    def stream() -> Iterator[tuple[Prompt, str]]:
        yield PROMPT, "number 1"
        yield PROMPT, f"hang {mark.name}"
        wait_until(mark.exists)
        raise raised

    with pytest.raises(raised):
        three.judge(stream())
    assert not is_running(int(mark.read_text()))
    assert values(three.judge(items("number 1", "number 2"))) == [1.0, 2.0]


def test_a_reward_that_raises_ends_what_the_other_processes_do(
    folder: Path, three: RewardJudge
) -> None:
    def stream() -> Iterator[tuple[Prompt, str]]:
        yield PROMPT, "hang other"
        wait_until((folder / "other").exists)
        yield PROMPT, "raise"

    with pytest.raises(RewardError, match="the reward of prompt 'p' raised IndexError: list index"):
        three.judge(stream())
    assert not is_running(int((folder / "other").read_text()))
    assert values(three.judge(items("number 3"))) == [3.0]


def test_nothing_is_left_of_processes_that_were_ended(folder: Path) -> None:
    judge = judge_of(named(folder, FILE), timeout_s=0.5, num_workers=3)
    before = len(os.listdir("/proc/self/fd"))
    pids = values(judge.judge(items("pid", "kill", "hang leak", "pid", "pid")))
    pids += [float((folder / "leak").read_text())]
    judge.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(Path(f"/proc/{int(pid)}").exists() for pid in pids if pid)


def test_what_is_no_verdict_is_refused_where_a_reward_runs_in_place_too() -> None:
    with pytest.raises(RewardError, match=r"prompt 'p' raised TypeError: it must give a Score"):
        in_place(lambda prompt, response: 0.5).judge(items("1"))  # type: ignore[arg-type,return-value]


# --- a second opinion ---------------------------------------------------------------------------


def test_a_second_reward_says_whether_it_agrees_and_changes_no_score(folder: Path) -> None:
    def opinion(prompt: Prompt, response: str) -> Score:
        failure = "no idea" if response == "3" else None
        return Score(value=9.0, correct=response in ("1", "2", "3"), failure=failure)

    def first(prompt: Prompt, response: str) -> Score:
        return Score(value=float(response), correct=response in "14")

    judge = RewardJudge([*in_place(first).rewards, *in_place(opinion).rewards])
    assert judge.judge(items("1", "2", "3", "4")) == [
        Score(value=1.0, correct=True, second_opinion=True),
        Score(value=2.0, correct=False, second_opinion=True),
        Score(value=3.0, correct=False, second_opinion=None),
        Score(value=4.0, correct=True, second_opinion=False),
    ]


def test_both_rewards_work_at_once_each_in_processes_of_its_own(folder: Path) -> None:
    there, here = folder / "two", folder / "one"
    for each in (there, here):
        each.mkdir()
    judge = judge_named(named(here, FILE), second=named(there, FILE), timeout_s=20, num_workers=1)
    meeting = items(*(f"meet {n} {here}/{n} {there}/{n}" for n in range(3)), "fail", "pid")
    scores = judge.judge(meeting)
    assert [score.second_opinion for score in scores] == [True, True, True, None, False]
    assert scores[3].failure == "no opinion"
    judge.close()


def test_a_second_reward_that_raises_is_named_so(folder: Path) -> None:
    folder = folder / "raising"
    folder.mkdir()
    judge = judge_named("boxed", second=named(folder, FILE), timeout_s=20, num_workers=1)
    with pytest.raises(RewardError, match=r"^the second reward of prompt 'p' raised IndexError"):
        judge.judge(items("number 1", "raise"))


# --- what is imported ---------------------------------------------------------------------------


def test_no_process_imports_what_its_reward_does_not_use(three: RewardJudge) -> None:
    assert values(three.judge(items("heavy"))) == [0.0]
    program = (
        "import sys; from megatron_srpo.rewards.judge import judge_named;"
        "judge_named('boxed', timeout_s=1, num_workers=1).judge([]);"
        "print(sorted({'torch', 'sympy', 'math_verify', 'vllm', 'megatron'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_what_is_sent_arrives_whole() -> None:
    tokens = np.arange(9, dtype=np.int32)
    prompt = Prompt(id="q", text="?\ud800", token_ids=tokens, answer="1", solution=("a", "b"))
    back, response = item_in(packed_item(prompt, "two\nlines"))
    assert response == "two\nlines" and back.token_ids.tolist() == tokens.tolist()
    for name in ("id", "text", "answer", "solution"):
        assert getattr(back, name) == getattr(prompt, name)
    for score in (Score(value=0.5, correct=False), Score(value=1.0, correct=True, failure="no")):
        assert verdict_in(packed_verdict(score)) == score
    raised = verdict_in(packed_verdict(RewardRaisedError("KeyError: 1", "a trace")))
    assert isinstance(raised, RewardRaisedError)
    assert str(raised) == "KeyError: 1" and "a trace" in raised.__notes__[0]


# --- code ---------------------------------------------------------------------------------------


def test_programs_are_judged_in_processes_each_within_its_time(tmp_path: Path) -> None:
    judge = judge_named("code", timeout_s=5, num_workers=2, sandbox="limits")
    (note,) = judge.notes
    assert note.startswith("reward=code: programs run in the sandbox ")
    answer = '{"tests": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]}'
    prompt = Prompt(id="p", text="", token_ids=np.zeros(1, np.int32), answer=answer)
    programs = ("print(sum(map(int, input().split())))", "print(3)", "while True: pass")
    scores = judge.judge((prompt, f"```python\n{program}\n```") for program in programs)
    assert scores == [
        Score(value=1.0, correct=True),
        Score(value=0.5, correct=False),
        Score(value=0.0, correct=False),
    ]


def test_a_sandbox_weaker_than_the_config_accepts_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "strongest", lambda: "limits")
    with pytest.raises(InputError, match="sandbox=namespaces: this machine offers limits only"):
        judge_named("boxed", second="code", timeout_s=20, num_workers=2)
