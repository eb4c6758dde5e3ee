"""A report shows all that is on record, in its place and as text, and says what is missing."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_srpo.__main__ import main
from megatron_srpo.advantages import GroupNormalized, credited
from megatron_srpo.report.afterwards import leave_report
from megatron_srpo.report.charts import Chart, charts
from megatron_srpo.report.experiments import Measured, experiments
from megatron_srpo.report.export import export
from megatron_srpo.report.facts import depths, lengths
from megatron_srpo.report.page import read_report, watch, write_report
from megatron_srpo.report.record import read_runs
from megatron_srpo.report.rollouts import packed, plain, show, to_json
from megatron_srpo.report.show import show as show_in_terminal
from megatron_srpo.report.summary import summary
from megatron_srpo.report.tree import trees
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import InputError, Reset
from tests.unit.builders import (
    TOKENIZER,
    collect,
    config,
    group,
    prompt,
    responses,
    rollout,
    scripted,
)
from tests.unit.recorded import named, write_run

HOSTILE = "</script><img onerror=alert(1)> {{values}} \ud800 \u2028 🙂"


def values_of(page: str, id: str = "values") -> Any:
    found = re.search(rf'<script type="application/json" id="{id}">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def measured(root: Path) -> Measured:
    (run,) = read_runs([root])
    return show(run, most_bytes=10**9).measured


def chart_named(drawn: list[Chart], title: str) -> Chart:
    (chart,) = (chart for chart in drawn if chart.title == title)
    return chart


# --- trees ---------------------------------------------------------------------------------------


def test_a_tree_has_suffixes_under_the_seed_that_was_reset():
    (tree,) = trees(named(), config())
    assert [branch.name for branch in tree.branches] == [f"base/{i}" for i in range(4)]
    seed = tree.branches[1]
    assert [len(branch.suffixes) for branch in tree.branches] == [0, 4, 0, 0]
    assert seed.reset is not None and (seed.reset.thought, seed.reset.cause) == (1, "named")
    assert [suffix.name for suffix in seed.suffixes] == [f"suffix/{i}" for i in range(4)]
    assert [suffix.verdict for suffix in seed.suffixes] == ["pass", "pass", "fail", "pass"]
    assert {suffix.num_copied_thoughts for suffix in seed.suffixes} == {1}
    assert tree.has_reset and len(tree.all) == 8


def test_a_suffix_that_was_reset_in_a_later_round_has_its_own_suffixes():
    answers = responses("base", "5\n6\n2") | responses("suffix", "8\n4\n2", "1")
    answers |= {"0/p/base/0/localize": r"\boxed{2}", "0/p/suffix/0/localize": r"\boxed{3}"}
    cfg = config(algorithm={"num_rollouts": 3, "split": "1x2", "reset_rounds": 2})
    (tree,) = trees(collect(scripted(answers), cfg=cfg), cfg)
    (seed,) = tree.branches
    assert [branch.name for branch in tree.all] == ["base/0", "suffix/0", "suffix/1"]
    assert seed.suffixes[0].reset is not None and seed.suffixes[0].reset.thought == 2
    assert [branch.name for branch in seed.suffixes[0].suffixes] == ["suffix/1"]
    shown = plain(tree, TOKENIZER.pieces)["b"][0]["s"][0]["s"][0]
    assert (shown["k"], shown["t"]) == (2, ["1"])


def test_a_suffix_whose_seed_is_not_on_record_stands_alone():
    lone = rollout("5\n1", id="0/p/suffix/0", num_copied=2, seed_id="0/p/base/9")
    (tree,) = trees([group(lone)], config())
    assert [branch.name for branch in tree.branches] == ["suffix/0"]
    assert not tree.has_reset


def test_credit_is_the_one_that_was_trained_on():
    groups = named()
    (tree,) = trees(groups, config())
    given = {r.id: (w, a) for r, w, a in credited(groups, GroupNormalized(config()))}
    for branch in tree.all:
        assert branch.credit
        spread = np.concatenate([[(w, a)] * n for n, w, a in branch.credit]).T
        assert np.array_equal(spread, np.stack(given[branch.rollout.id]))
    copied, own = tree.branches[1].suffixes[0].credit or ()
    assert copied == (2, 0.0, 0.0)  # "5\n" was copied
    assert own[0] == 2 and own[2] == pytest.approx(0.25 / np.sqrt(3 / 16))  # 3 of 4 are right


def test_a_response_that_is_masked_because_it_was_cut_has_no_loss_weight():
    cut = rollout("5\n1", id="0/p/base/0", reward=1.0, finish_reason="length")
    members = group(cut, rollout("5\n2", id="0/p/base/1"))
    (tree,) = trees([members], config(algorithm={"truncated": "mask"}))
    assert tree.branches[0].credit == ((4, 0.0, 1.0),)


def test_credit_of_a_rule_of_the_users_is_not_known():
    (tree,) = trees(named(), config(credit={"rule": "mine.py:Rule"}))
    assert {branch.credit for branch in tree.all} == {None}


def test_what_was_drawn_in_search_of_a_seed_is_in_the_tree_and_has_no_credit():
    sought = group(rollout("5\n2", id="0/p/base/0"), use="seeds")
    (tree,) = trees([sought], config())
    assert tree.branches[0].credit is None and tree.branches[0].group.use == "seeds"


# --- what a page holds ---------------------------------------------------------------------------


def test_values_on_a_page_end_no_script_and_come_back_as_they_were():
    text = to_json({"a": HOSTILE})
    assert "<" not in text
    assert json.loads(text)["a"] == HOSTILE.replace("\ud800", "?")


def test_lengths_of_tokens_are_in_the_units_of_browsers():
    assert packed(["a", "", "🙂", "x" * 35, "y" * 71]) == "102z0zz1"


def test_a_page_holds_of_a_suffix_what_is_its_own():
    (tree,) = trees(named(), config())
    seed = plain(tree, TOKENIZER.pieces)["b"][1]
    assert seed["t"] == ["5\n", "6\n", "2"] and seed["x"]["k"] == 1 and seed["c"] == 0
    first = seed["s"][0]
    assert (first["k"], first["m"], first["t"], first["p"], first["c"]) == (1, 2, ["1"], "10", 1)


def test_steps_share_the_room_and_prompts_with_resets_come_first(tmp_path: Path):
    plain_ = [group(rollout("5\n2", id=f"0/q{i}/base/0", of=prompt(id=f"q{i}"))) for i in range(3)]
    root = write_run(tmp_path / "run", [[*plain_, *named()], [*plain_, *named(step=1)]])
    (run,) = read_runs([root])
    whole = show(run, most_bytes=10**6)
    sizes = [len(step) for step in whole.steps]
    assert (whole.num_prompts, whole.num_recorded) == (8, 8)
    part = show(run, most_bytes=sum(sizes) - 300)
    kept = [[p["id"] for p in json.loads(step)["prompts"]] for step in part.steps]
    assert (part.num_prompts, part.num_recorded) == (sum(map(len, kept)), 8)
    assert [ids[-1] for ids in kept] == ["p", "p"] and 2 < part.num_prompts < 8
    assert abs(len(kept[0]) - len(kept[1])) <= 1
    assert show(run, most_bytes=10).num_prompts == 0
    assert part.measured.depths.resets.sum() == 2  # facts are of all rollouts


def test_room_that_a_step_leaves_goes_to_those_behind_it(tmp_path: Path):
    few = [group(rollout("5\n2", id="0/q/base/0", of=prompt(id="q")))]
    root = write_run(tmp_path / "run", [few, named(step=1)])
    (run,) = read_runs([root])
    sizes = [
        len(to_json(json.loads(step)["prompts"])) for step in show(run, most_bytes=10**6).steps
    ]
    assert sizes[0] < sizes[1]
    assert show(run, most_bytes=sum(sizes) + 2).num_prompts == 2


def test_a_page_is_filled_and_texts_on_it_are_values(tmp_path: Path):
    hostile = group(
        rollout(HOSTILE.replace("\ud800", ""), id="0/p/base/0", of=prompt(id=HOSTILE[:40]))
    )
    root = write_run(tmp_path / "a<b> {{script}}", [[hostile]])
    write_report(read_report([root]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<title>a&lt;b&gt; {{script}} · run report</title>" in page
    (step,) = values_of(page, "rollout-values")[0]["steps"]
    assert step["prompts"][0]["id"] == HOSTILE[:40]
    assert page.count("</script>") == 3 and "<img" not in page
    assert not re.search(r"(src|href)=.https?:", page)


# --- facts ---------------------------------------------------------------------------------------


def test_depths_count_resets_and_what_their_suffixes_came_to():
    counts = depths(named())  # reset to thought 1 of 3
    assert counts.resets.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert (counts.suffixes[3], counts.corrected[3]) == (4, 3)
    twice = counts + counts
    assert (twice.resets.sum(), twice.suffixes[3], twice.corrected[3]) == (2, 8, 6)


def test_a_reset_to_the_prompt_made_its_own_suffixes_alone():
    seed, other = rollout("5\n2", id="s"), rollout("1", id="b", reward=1.0)
    fresh = rollout("2", id="x", stage="suffix", seed_id="s")
    reset = Reset(seed_id="s", thought=0, cause="named")
    counts = depths([group(seed, other, fresh, resets=(reset,))])
    assert (counts.resets[0], counts.suffixes[0], counts.corrected[0]) == (1, 1, 0)


def test_a_reset_that_was_not_made_or_not_trained_has_no_depth():
    seed = rollout("5\n2", id="s")
    skipped = group(seed, resets=(Reset(seed_id="s", thought=None, cause="no_error"),))
    assert depths([skipped]).resets.sum() == 0
    made = group(seed, resets=(Reset(seed_id="s", thought=1, cause="named"),), use="replaced")
    assert depths([made]).resets.sum() == 0


def test_lengths_are_told_apart_by_verdict():
    groups = [group(rollout("5\n1", reward=1.0), rollout("5\n6\n2", id="s"))]
    assert lengths(groups) == {
        "response/tokens_pass": 4.0,
        "response/tokens_fail": 6.0,
        "response/tokens_mean": 5.0,
        "response/tokens_max": 6.0,
    }
    assert lengths([replace(groups[0], use="seeds")]) == {}


# --- curves --------------------------------------------------------------------------------------


def rows(*rates: float, tokens: float = 100.0) -> list[dict[str, float]]:
    return [
        {"step": i, "pass_rate/base": rate, "tokens/base": tokens, "time/step_s": 36.0}
        for i, rate in enumerate(rates)
    ]


def test_runs_that_differ_in_the_seed_are_one_experiment(tmp_path: Path):
    for name, changes, values in (
        ("a", {"seed": 0}, rows(0.1, 0.2)),
        ("b", {"seed": 1}, rows(0.3, 0.8, tokens=300.0)),
        ("c", {"seed": 0, "algorithm": {"resets": "none"}}, rows(0.5)),
    ):
        write_run(tmp_path / name, metrics=values, **changes)
    found = experiments([measured(tmp_path / name) for name in "abc"])
    assert [each.name for each in found] == ["resets=self, 2 seeds", "resets=none"]
    means, deviations = found[0].curve("pass_rate/base") or ((), ())
    assert means == pytest.approx((0.2, 0.5))
    assert deviations == pytest.approx((0.2 / np.sqrt(2), 0.6 / np.sqrt(2)))
    assert found[0].axes() == {"step": [0, 1], "tokens": [0, 200], "hours": [0, 0.01]}
    assert found[1].curve("pass_rate/base") == ((0.5,), (None,))
    assert found[1].curve("loss") is None


def test_an_evaluation_has_points_where_there_was_one_only(tmp_path: Path):
    values = rows(0.1, 0.2, 0.3)
    for step in (0, 2):
        values[step]["eval/held_out/pass_at_1"] = 0.5 + step
    drawn = charts(experiments([measured(write_run(tmp_path / "run", metrics=values))]))
    (lines,) = chart_named(drawn, "Evaluation: held_out").sets
    assert lines.x == {"step": [0, 2], "tokens": [0, 200], "hours": [0, 0.02]}
    assert [(line.name, line.mean) for line in lines.lines] == [("pass@1", (0.5, 2.5))]


def test_every_metric_is_in_a_chart_and_what_is_always_0_only_if_all_is(tmp_path: Path):
    values = [
        {"step": 0, "tokens/base": 7, "tokens/seed": 0, "mine/own": 3, "group/redrawn_rate": 0}
    ]
    drawn = charts(experiments([measured(write_run(tmp_path / "run", metrics=values))]))
    assert [line.name for line in chart_named(drawn, "Generated tokens").sets[0].lines] == ["base"]
    assert chart_named(drawn, "Groups without signal").sets[0].lines[0].mean == (0,)
    assert chart_named(drawn, "mine/own").section == "Other"
    assert len({chart.id for chart in drawn}) == len(drawn)


def test_bars_of_depth_are_shares_and_rates(tmp_path: Path):
    drawn = charts(experiments([measured(write_run(tmp_path / "run", [named()]))]))
    (where,) = chart_named(drawn, "Where in the chain").sets[0].lines
    (rate,) = chart_named(drawn, "Corrected, by depth of the reset").sets[0].lines
    assert where.mean == (0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert rate.mean == (None, None, None, 0.75, *[None] * 6)


def test_the_summary_says_how_it_began_and_ended(tmp_path: Path):
    root = write_run(tmp_path / "run", metrics=rows(0.1, 0.4), num_steps=5)
    table = dict(summary([measured(root)]))
    assert table["pass rate of rollouts"] == ["0.100 → 0.400 (+0.300)"]
    assert table["generated tokens"] == ["200"] and table["time"] == ["1 min 12 s"]
    assert table["state"] == ["stopped after 2 of 5 steps"] and table["steps"] == ["2 of 5"]
    assert table["method"] == ["SRPO (self)"]


# --- what is missing -----------------------------------------------------------------------------


def test_a_cut_off_line_is_left_out_and_named(tmp_path: Path):
    root = write_run(tmp_path / "run", metrics=rows(0.1, 0.2))
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "pass_ra')
    (run,) = read_runs([root])
    assert [row["step"] for row in run.metrics] == [0, 1]
    assert any("line 3 is cut off" in line for line in run.missing)


def test_a_broken_line_is_left_out_and_a_step_that_was_done_again_counts_once(tmp_path: Path):
    root = write_run(tmp_path / "run", metrics=rows(0.1))
    with (root / "metrics.jsonl").open("a") as file:
        file.write('\x00\x00\n[1]\n{"step": 0, "pass_rate/base": 0.9, "loss": NaN}\n')
    (run,) = read_runs([root])
    assert [dict(row) for row in run.metrics] == [{"step": 0, "pass_rate/base": 0.9}]
    assert [line.partition(": ")[2] for line in run.missing] == [
        "line 2 is no row of metrics and is left out",
        "line 3 is no row of metrics and is left out",
    ]


def test_a_step_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path: Path):
    root = write_run(tmp_path / "run", [named(), named(step=1), named(step=2)])
    (root / "rollouts" / "000001-00000-of-00001.npz").unlink()
    part = root / "rollouts" / "000002-00000-of-00001.jsonl"
    part.write_bytes(part.read_bytes()[:-40])
    (shown,) = read_report([root]).runs
    assert [json.loads(step)["step"] for step in shown.steps] == [0]
    assert any("000001-00000-of-00001.npz: is missing" in line for line in shown.missing)
    assert any("000002-00000-of-00001: cannot be read" in line for line in shown.missing)
    assert any("tokenizer.json: not in" in line for line in shown.missing)


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "rollouts", "log.txt"])
def test_any_part_of_a_run_makes_a_report_that_names_the_others(tmp_path: Path, left: str):
    root = write_run(
        tmp_path / "run", [named()], metrics=rows(0.1), log="train self 1/2  x  3 s left\n"
    )
    names = {"config.yaml", "metrics.jsonl", "rollouts", "log.txt"}
    for name in names - {left}:
        path = root / name
        path.unlink() if path.is_file() else [*map(Path.unlink, path.iterdir()), path.rmdir()]
    if left == "log.txt":
        with pytest.raises(InputError, match="no run has left"):
            read_report([root])
        return
    write_report(read_report([root]), root / "report.html")
    (said,) = values_of((root / "report.html").read_text())["runs"]
    for name in names - {left}:
        assert any(f"run/{name}" in line for line in said["missing"]), name


def test_the_log_s_alarms_are_told_apart_from_its_steps(tmp_path: Path):
    log = "train self 1/2  pass 0.1  3 s left\nodd: a warning\nstopped in step 1: gradient is nan\n"
    (run,) = read_runs([write_run(tmp_path / "run", log=log)])
    assert run.alarms == ("stopped in step 1: gradient is nan",)
    assert run.remarks == ("odd: a warning",)


def test_a_run_that_is_at_work_is_said_to_run(tmp_path: Path):
    root = write_run(tmp_path / "run")
    with RunFolder(root).at_work():
        assert read_runs([root])[0].state == "runs"
    assert read_runs([root])[0].state == "stopped after 0 of 100 steps"


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path):
    roots = [write_run(tmp_path / name) for name in ("a/run", "b/run")]
    assert [run.name for run in read_runs(roots)] == ["a/run", "b/run"]
    with pytest.raises(InputError, match="is named twice"):
        read_runs([roots[0], roots[0]])


# --- commands ------------------------------------------------------------------------------------


def terminal(root: Path, **which: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    show_in_terminal(root, **{"step": None, "prompt": None} | which, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_shows_the_tree(tmp_path: Path):
    root = write_run(tmp_path / "run", [named(), named("[red]x", step=1)])
    assert terminal(root).split() == ["1", "[red]x", "✓✗↶2(✓✓✗✓)✗✓", "p="]
    said = terminal(root, step=0, prompt="1")
    assert said == terminal(root, step=0, prompt="p")
    lines = [line.strip("│├└─ ").rstrip() for line in said.splitlines()]
    assert lines[3] == "✗ fail  base/1  reward 0 · advantage -1"
    assert lines[4:7] == ["1. 5", "2. 6   ↶ blamed", "3. 2"]
    assert lines[7] == "↶ back to before thought 2 (named)"
    assert lines[8] == r"the policy said: \boxed{2}"
    assert lines[9:12] == ["✓ pass  suffix/0  reward 1 · advantage +0.577", "1| 5", "2. 1"]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ({"step": 7}, "no rollouts of step 7; there are 0 to 0"),
        ({"prompt": "2"}, "no prompt '2'; name an id, or a number from 1 to 1"),
        ({"prompt": "q"}, "no prompt 'q'"),
    ],
)
def test_what_is_not_on_record_is_refused(tmp_path: Path, which: dict[str, Any], message: str):
    root = write_run(tmp_path / "run", [named()])
    with pytest.raises(InputError, match=re.escape(message)):
        terminal(root, **which)


def test_a_report_of_nothing_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere: no such run folder"),
        ([str(tmp_path / "empty")], "no run has left"),
        ([str(tmp_path / "empty"), "--out", str(tmp_path / "x/y/r.html")], "is no folder"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_watching_ends_with_the_run_and_the_last_page_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write_run(tmp_path / "run", metrics=rows(0.1))
    said: list[tuple[str, float | None]] = []

    def look() -> None:
        values = values_of((root / "report.html").read_text())
        said.append((values["runs"][0]["state"], values["reload_s"]))

    work = contextlib.ExitStack()
    work.enter_context(RunFolder(root).at_work())

    def sleep(seconds: float) -> None:
        assert seconds >= 10
        look()
        work.close()

    monkeypatch.setattr("time.sleep", sleep)
    watch([root], root / "report.html")
    look()
    assert said == [("runs", 10.0), ("stopped after 1 of 100 steps", None)]


def test_an_export_holds_every_chart_and_every_rollout(tmp_path: Path):
    pytest.importorskip("matplotlib")
    root = write_run(tmp_path / "run", [named()], metrics=rows(0.1, 0.4))
    report = read_report([root])
    few = replace(report, charts=report.charts[:1])
    export(few, tmp_path / "out")
    (chart,) = few.charts
    tables = {"summary.csv", "metrics.csv", "rollouts.csv"}
    drawings = {f"{chart.id}.{kind}" for kind in ("png", "svg", "csv")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == tables | drawings
    drawn = [*csv.DictReader((tmp_path / "out" / f"{chart.id}.csv").open())]
    assert [(row["step"], row["line"], row["mean"]) for row in drawn] == [
        ("0.0", "from the prompt", "0.1"), ("1.0", "from the prompt", "0.4")
    ]  # fmt: skip
    recorded = [*csv.DictReader((tmp_path / "out" / "rollouts.csv").open())]
    assert len(recorded) == 8
    assert [r["rollout"] for r in recorded if r["blamed_thought"] == "2"] == ["0/p/base/1"]


def test_a_report_that_fails_is_a_line_in_the_log(tmp_path: Path):
    root = write_run(tmp_path / "run")
    (root / "report.html").mkdir()
    leave_report(RunFolder(root))
    (line,) = (root / "log.txt").read_text().splitlines()
    assert line.startswith(f"{root}/report.html was not written: ")
