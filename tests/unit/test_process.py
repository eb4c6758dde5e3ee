"""A reward runs in a process: what it does there costs an item, never the run."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_srpo.rewards import process
from megatron_srpo.rewards.judge import InPlace, RewardJudge, judge_named
from megatron_srpo.rewards.process import Worker
from megatron_srpo.rewards.verdict import RewardError, checked
from megatron_srpo.rewards.workers import Workers
from megatron_srpo.types import InputError, Prompt, Score

PROMPT = Prompt(id="p", text="1+1", token_ids=np.arange(3, dtype=np.int32), answer="2")
FILE = '''
import ctypes, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from megatron_srpo.types import Score

HERE = Path(__file__).parent
print("a file that speaks when it is imported")

class OddError(Exception):
    """Cannot be pickled, and not be made of its text either."""

    def __init__(self, first, second):
        super().__init__(lambda: first)

    def __str__(self):
        return "an odd\\nerror"

def say(value):
    return Score(value=value, correct=value == 1)

def reward(prompt, response):
    """Does what the response says."""
    word, _, rest = response.partition(" ")
    if word == "once":  # the first process dies, the second answers
        mark = HERE / rest
        if mark.exists():
            return say(1.0)
        mark.touch()
        os._exit(7)
    return ACTS[word](prompt, rest)

def raise_odd(prompt, rest):
    raise OddError(1, 2)

def leave_a_fork(prompt, rest):
    """A process that it forked holds everything open."""
    if os.fork() == 0:
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)

def come_back_twice(prompt, rest):
    """Its fork comes back too, later, and answers or raises."""
    if os.fork() == 0:
        time.sleep(0.2)
        return say(1.0) if rest == "answer" else [][1]
    return say(0.0)

def start_another_and_hang(prompt, rest):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (HERE / "other.pid").write_text(str(other.pid))
    time.sleep(60)

def speak(prompt, rest):
    print("standard output of a reward")
    return say(float(sys.stdin.read() == ""))

ACTS = {
    "pid": lambda prompt, rest: say(os.getpid()),
    "answer": lambda prompt, rest: say(float(rest == prompt.answer)),
    "tokens": lambda prompt, rest: say(float(prompt.token_ids.sum())),
    "exit": lambda prompt, rest: os._exit(int(rest)),
    "sys.exit": lambda prompt, rest: sys.exit(int(rest)),
    "segfault": lambda prompt, rest: ctypes.string_at(0),
    "kill": lambda prompt, rest: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda prompt, rest: time.sleep(60),
    "raise": lambda prompt, rest: [][int(rest)],
    "raise_odd": raise_odd,
    "no_score": lambda prompt, rest: 0.5,
    "unpicklable": lambda prompt, rest: Score(value=0.0, correct=False, failure=lambda: 0),
    "fork": leave_a_fork,
    "twice": come_back_twice,
    "wait": lambda prompt, rest: time.sleep(0.6) or say(0.25),
    "another": start_another_and_hang,
    "speak": speak,
}
'''


def named(folder: Path, text: str = FILE) -> str:
    """FILE.py:FUNCTION; modules keep their names for the whole session."""
    file = folder / f"reward_{abs(hash(str(folder)))}.py"
    file.write_text(text)
    return f"{file}:reward"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward_process")


def judge_of(name: str, *, timeout_s: float = 20, num_workers: int = 2) -> RewardJudge:
    """Without a look at the file in this process."""
    start = partial(Worker, name, timeout_s=timeout_s)
    return RewardJudge([Workers(start=start, role="reward", num_workers=num_workers)])


def asking(name: str, *, timeout_s: float = 20) -> Callable[[str], Score]:
    """One item at a time, so that there is one process."""
    made = judge_of(name, timeout_s=timeout_s)
    return lambda response: made.judge([(PROMPT, response)])[0]


@pytest.fixture(scope="module")
def ask(folder: Path) -> Callable[[str], Score]:
    """One process for all tests that do not end it."""
    return asking(named(folder))


def is_running(pid: int) -> bool:
    """Zombies are not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reward_of_the_user_s_is_asked_in_another_process_that_stays(ask) -> None:
    assert ask("answer 2") == Score(value=1.0, correct=True)
    assert ask("answer 3") == Score(value=0.0, correct=False)
    assert ask("tokens") == Score(value=3.0, correct=False)
    assert ask("pid").value == ask("pid").value != os.getpid()


def test_comparisons_of_texts_stay_in_the_trainer_s_process(folder: Path) -> None:
    (boxed,) = judge_named("boxed", timeout_s=1, num_workers=1).rewards
    (mine,) = judge_named(named(folder), timeout_s=1, num_workers=1).rewards
    assert isinstance(boxed, InPlace) and isinstance(mine, Workers)
    with pytest.raises(InputError, match=r"^reward=vibes: must be one of last_line, boxed, "):
        judge_named("vibes", timeout_s=1, num_workers=1)
    with pytest.raises(InputError, match=r"^second_reward=vibes: must be one of last_line, "):
        judge_named("boxed", second="vibes", timeout_s=1, num_workers=1)


@pytest.mark.parametrize(
    ("response", "ending"),
    [
        ("exit 7", "ended with exit code 7"),
        ("exit 0", "ended with exit code 0"),
        ("sys.exit 3", "ended with exit code 3"),
        ("segfault", "died with signal 11"),
        ("kill", "died with signal 9"),
        ("fork", "died with signal 9"),
    ],
)
def test_an_item_that_ends_two_processes_has_a_failure_that_says_how(
    ask, response: str, ending: str
) -> None:
    before = ask("pid").value
    expected = Score(value=0.0, correct=False, failure=f"its process {ending}, twice")
    assert ask(response) == expected
    assert ask("pid").value != before
    assert ask("answer 2").correct


@pytest.mark.parametrize("does", ["answer", "raise"])
def test_a_fork_that_comes_back_says_nothing_in_place_of_the_next_item(ask, does: str) -> None:
    assert ask(f"twice {does}").value == 0.0
    assert ask("wait").value == 0.25


def test_an_item_whose_process_dies_once_is_asked_again(ask) -> None:
    assert ask("once mark") == Score(value=1.0, correct=True)


def test_a_process_that_dies_between_two_items_costs_neither_an_attempt(ask) -> None:
    pid = int(ask("pid").value)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    assert ask("once another mark").correct


def test_an_item_that_takes_too_long_is_ended_with_all_that_it_started(folder: Path) -> None:
    ask = asking(named(folder), timeout_s=1)
    failure = "its process took longer than 1 s, twice"
    assert ask("another") == Score(value=0.0, correct=False, failure=failure)
    other = int((folder / "other.pid").read_text())
    wait_until(lambda: not is_running(other))  # a kill is no end yet
    assert ask("answer 2").correct


def test_two_losses_of_different_kinds_are_both_told(folder: Path) -> None:
    (folder / "hang_later.py").write_text(
        FILE.replace(
            "return say(1.0)\n        mark.touch()", "time.sleep(60)\n        mark.touch()"
        )
    )
    ask = asking(f"{folder}/hang_later.py:reward", timeout_s=0.5)
    failure = "its process ended with exit code 7, then took longer than 0.5 s"
    assert ask("once third mark").failure == failure


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("raise 1", "IndexError: list index out of range"),
        ("raise_odd", "OddError: an odd error"),
        ("no_score", "TypeError: it must give a Score, not 0.5"),
    ],
)
def test_what_a_reward_raises_is_raised_here_with_its_traceback(
    ask, response: str, message: str
) -> None:
    with pytest.raises(RewardError) as raised:
        ask(response)
    assert str(raised.value) == f"the reward of prompt 'p' raised {message}"
    cause = raised.value.__cause__
    (note,) = cause.__notes__  # type: ignore[union-attr]
    assert note.startswith("in the reward's process:\nTraceback")
    assert ask("answer 2").correct


def test_a_score_arrives_as_plain_numbers_and_words(ask) -> None:
    assert (ask("unpicklable").failure or "").startswith("<function")
    plain = checked(Score(value=np.float32(1), correct=np.bool_(True)))  # type: ignore[arg-type]
    assert type(plain.value) is float and type(plain.correct) is bool and plain.failure is None


def test_signals_of_a_launcher_are_left_to_the_trainer(ask) -> None:
    pid = int(ask("pid").value)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    assert ask("pid").value == pid
    assert os.getpgid(pid) == pid != os.getpgrp()


def test_what_a_reward_prints_is_not_on_the_trainer_s_standard_output(folder: Path) -> None:
    program = f"""
        from tests.unit.test_process import asking
        assert asking({named(folder)!r})("speak").correct
    """
    done = run(program)
    assert done.stdout == "" and "standard output of a reward" in done.stderr


@pytest.mark.parametrize(
    ("text", "start_s", "message"),
    [
        ("import os; os._exit(5)", 20, "its process ended with exit code 5 before it was asked"),
        ("import time; time.sleep(60)", 0.3, "its process took longer than 0.3 s before it was "),
    ],
)
def test_a_file_that_cannot_be_imported_there_is_an_error_and_no_failure_of_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, start_s: float, message: str
) -> None:
    monkeypatch.setattr(process, "START_S", start_s)
    with pytest.raises(RewardError, match=f"the reward of prompt 'p' raised StartError: {message}"):
        asking(named(tmp_path, text))("")


def test_a_file_that_raises_there_is_told_like_a_reward_that_raises(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="ZeroDivisionError: division by zero"):
        asking(named(tmp_path, "1 / 0"))("")


def test_nothing_runs_before_the_first_item_nor_after_the_judge_is_gone(folder: Path) -> None:
    made = judge_of(named(folder))
    (workers,) = made.rewards
    assert isinstance(workers, Workers) and workers.idle == []
    (score,) = made.judge([(PROMPT, "pid")])
    pid = int(score.value)
    assert is_running(pid)
    del made, workers
    gc.collect()
    assert not is_running(pid)


def test_a_judge_that_is_closed_has_no_process_until_it_is_asked_again(folder: Path) -> None:
    made = judge_of(named(folder))
    (first,) = made.judge([(PROMPT, "pid")])
    made.close()
    assert not is_running(int(first.value))
    (second,) = made.judge([(PROMPT, "pid")])
    assert second.value != first.value and is_running(int(second.value))


def run(program: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which may end as it likes."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "ending",
    ["raise SystemExit(1)", "1 / 0", "os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"],
)
def test_however_the_trainer_ends_its_worker_ends_with_it(folder: Path, ending: str) -> None:
    said = run(f"""
        import os, signal
        from tests.unit.test_process import asking
        ask = asking({named(folder)!r})
        print(int(ask("pid").value), flush=True)
        {ending}
    """)
    assert said.returncode != 0
    pid = json.loads(said.stdout)
    wait_until(lambda: not is_running(pid))


def test_a_worker_that_is_busy_ends_when_its_trainer_is_killed(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(
        "import os, pathlib, time\n"
        "def reward(prompt, response):\n"
        "    path = pathlib.Path(response)\n"
        "    path.with_suffix('.new').write_text(str(os.getpid()))\n"
        "    path.with_suffix('.new').rename(path)\n"
        "    time.sleep(60)\n"
    )
    program = f"""
        from tests.unit.test_process import asking
        asking("{tmp_path}/busy.py:reward", timeout_s=50)("{tmp_path}/pid")
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=Path(__file__).parents[2]
    )
    wait_until((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not is_running(pid))
