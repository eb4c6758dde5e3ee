"""The report in a real browser: it is drawn without a complaint, and does what its keys say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.journal import read_step
from megatron_srpo.report.page import read_report, write_report
from megatron_srpo.report.record import read_runs
from megatron_srpo.report.tree import Tree, trees
from tests.browser.conftest import SCREENSHOTS
from tests.unit.builders import group, prompt, rollout
from tests.unit.recorded import named, write_run

pytestmark = pytest.mark.browser
Opened = Callable[..., Any]


def recorded(run: Path, step: int) -> list[Tree]:
    (record,) = read_runs([run])
    return trees(read_step(run / "rollouts", step), record.cfg)


def rows(page: Any) -> list[str]:
    return page.locator(".row b").all_text_contents()


def focused(page: Any, attribute: str) -> str:
    return page.evaluate(f"document.activeElement.getAttribute('{attribute}')")


def test_a_finished_run_has_left_its_page(run: Path, opened: Opened):
    page = opened(run / "report.html")
    assert page.title() == "run · run report"
    assert page.locator("h2").all_inner_texts() == [
        "Summary", "Learning", "Resets", "Health", "Cost", "Other", "Rollouts"
    ]  # fmt: skip
    assert "finished" in page.locator("#summary-table").inner_text()
    figures = page.locator("figure:visible").count()
    assert figures >= 15 and page.locator("figure:visible canvas").count() == figures
    assert page.locator(".note").count() == 0
    assert page.locator("#rollouts-note").inner_text().endswith("in all steps: 16.")


def test_filters_choose_the_prompts_that_the_journal_has(run: Path, opened: Opened):
    page = opened(run / "report.html")
    for step in (0, 1):
        page.select_option("#step", str(step))
        known = recorded(run, step)
        assert rows(page) == [tree.prompt.id for tree in known]
        for kind, belongs in {
            "pass": lambda tree: any(branch.verdict == "pass" for branch in tree.all),
            "fail": lambda tree: any(branch.verdict == "fail" for branch in tree.all),
            "reset": lambda tree: tree.has_reset,
            "silent": lambda tree: not any(branch.group.has_signal for branch in tree.all),
        }.items():
            page.select_option("#kind", kind)
            assert rows(page) == [tree.prompt.id for tree in known if belongs(tree)], kind
        page.select_option("#kind", "all")
    page.select_option("#step", "all")
    assert page.locator("#count").inner_text() == "16 prompts"
    id = known[3].prompt.id
    page.fill("#search", id.upper())
    assert {row.partition(" · ")[2] for row in rows(page)} >= {id} and len(rows(page)) < 16
    page.fill("#search", "no such text")
    assert rows(page) == []


def test_a_prompt_opens_as_the_tree_of_its_rollouts(run: Path, opened: Opened):
    page = opened(run / "report.html")
    tree = next(tree for tree in recorded(run, 1) if any(b.suffixes for b in tree.branches))
    seed = next(branch for branch in tree.branches if branch.suffixes)
    page.click(f".row:has(b:text-is('{tree.prompt.id}'))")
    shown = page.locator("#detail [role=tree] > .branch")
    assert shown.count() == len(tree.branches)
    first = shown.first
    assert first.locator("> .head code").inner_text() == seed.name
    thoughts = first.locator("> .thoughts > li")
    texts = thoughts.locator(".thought").all_text_contents()
    assert texts == [thought.text for thought in seed.rollout.thoughts]
    assert seed.reset is not None and seed.reset.thought is not None
    blamed = first.locator("> .thoughts > .blamed")
    assert blamed.get_attribute("value") == str(seed.reset.thought + 1)
    assert "↶" in blamed.locator("mark").inner_text()
    assert first.locator(".localization").text_content() == seed.reset.answer
    suffixes = first.locator("> .suffixes > .branch")
    assert suffixes.count() == len(seed.suffixes)
    for index, suffix in enumerate(seed.suffixes):
        drawn = suffixes.nth(index)
        assert (
            drawn.locator(".sign").inner_text()
            == {"pass": "✓ pass", "fail": "✗ fail"}[suffix.verdict]
        )
        assert "".join(drawn.locator(".thought").all_text_contents()) == suffix.rollout.text
        copied = drawn.locator(".token.copied")
        assert copied.count() == suffix.rollout.num_copied
        assert drawn.locator(".token").count() == len(suffix.rollout.token_ids)


def test_hovering_a_token_says_its_credit(run: Path, opened: Opened):
    page = opened(run / "report.html")
    step, tree, branch = next(
        (step, tree, suffix)
        for step in (0, 1)
        for tree in recorded(run, step)
        for seed in tree.branches
        for suffix in seed.suffixes
        if suffix.rollout.num_copied and suffix.group.has_signal
    )
    page.select_option("#step", str(step))
    page.click(f".row:has(b:text-is('{tree.prompt.id}'))")
    drawn = page.locator(".branch .branch").filter(
        has=page.locator(f"code:text-is('{branch.name}')")
    )
    assert branch.credit
    (_, weight, advantage) = branch.credit[-1]
    drawn.locator(".token:not(.copied)").first.hover()
    said = page.locator("#tip").inner_text()
    sign = "+" if advantage > 0 else "−"
    assert said.startswith(
        f"token {branch.rollout.num_copied}: advantage {sign}{abs(advantage):.4g}"
    )
    assert float(said.rpartition(" ")[2]) == pytest.approx(weight, rel=1e-3)
    drawn.locator(".token.copied").first.hover()
    assert page.locator("#tip").inner_text() == "token 0: copied, masked, no loss"
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()


def test_everything_can_be_done_with_keys(run: Path, opened: Opened):
    page = opened(run / "report.html")
    known = recorded(run, 0)
    page.keyboard.press("p")
    assert page.locator("#step").input_value() == "0"
    page.keyboard.press("n")
    page.keyboard.press("p")
    page.keyboard.press("/")
    assert focused(page, "id") == "search"
    page.keyboard.press("Tab")
    assert focused(page, "data-number") == "0"
    at = next(i for i, tree in enumerate(known) if any(b.suffixes for b in tree.branches))
    for _ in range(at):
        page.keyboard.press("ArrowDown")
    assert focused(page, "data-number") == str(at)
    page.keyboard.press("Enter")
    assert page.locator("#detail h3").inner_text() == f"{known[at].prompt.id}, step 0"
    assert focused(page, "aria-expanded") == "true"
    page.keyboard.press("ArrowRight")
    assert focused(page, "aria-label").startswith("suffix/0")
    page.keyboard.press("ArrowDown")
    assert focused(page, "aria-label").startswith("suffix/1")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert focused(page, "aria-expanded") == "false"
    assert page.locator(".branch .branch").first.is_hidden()
    page.keyboard.press("Escape")
    assert focused(page, "data-number") == str(at)
    page.keyboard.press("End")
    assert focused(page, "data-number") == str(len(known) - 1)


def test_the_address_names_what_is_open(run: Path, opened: Opened):
    page = opened(run / "report.html")
    page.select_option("#step", "0")
    page.locator(".row").nth(2).click()
    heading = page.locator("#detail h3").inner_text()
    again = opened(run / "report.html", hash=page.evaluate("location.hash"))
    assert again.locator("#detail h3").inner_text() == heading


def test_runs_are_overlaid_with_a_band_over_seeds(overlaid: Path, opened: Opened):
    page = opened(overlaid)
    drawn = page.locator("#learning_reward .u-label:visible").all_inner_texts()
    assert drawn == ["step", "——— resets=self, 2 seeds", "- - - resets=none"]
    assert page.locator("#learning_reward .u-series.band").count() == 2
    for axis, label in (("tokens", "generated tokens"), ("hours", "hours")):
        page.check(f"input[value={axis}]")
        assert page.locator("#learning_reward .u-label").first.inner_text() == label
    page.click("#learning_reward .numbers summary")
    page.locator("#learning_reward .numbers caption").first.wait_for()
    assert page.locator("#learning_reward .numbers caption").all_inner_texts() == [
        "resets=self, 2 seeds", "resets=none"
    ]  # fmt: skip
    assert page.locator("#run option").count() == 3
    page.select_option("#run", "2")
    assert page.locator(".row").count() == 8


def test_texts_of_rollouts_are_shown_as_they_are(tmp_path: Path, opened: Opened):
    evil = '</script><img src=x onerror="document.title=1"><b>&lt;'
    asked = prompt(evil[:8], id=f"p{evil}")
    hostile = group(
        rollout(evil, id=f"0/p{evil}/base/0", of=asked), rollout("a\u2028\0b", id="0/x", of=asked)
    )
    root = write_run(tmp_path / "run<i>", [[hostile]], log=f"stopped in step 0: {evil}\n")
    write_report(read_report([root]), root / "report.html")
    page = opened(root / "report.html")
    page.locator(".row").first.click()
    assert "".join(page.locator(".branch").first.locator(".thought").all_text_contents()) == evil
    assert page.locator("#detail h3").inner_text() == f"p{evil}, step 0"
    assert evil in page.locator(".note.alarm").inner_text()
    assert page.locator("img, main i, main script").count() == 0
    assert page.title() == "run<i> · run report"


def test_a_page_without_a_tokenizer_or_config_shows_thoughts(tmp_path: Path, opened: Opened):
    root = write_run(tmp_path / "run", [named()])
    (root / "config.yaml").unlink()
    write_report(read_report([root]), root / "report.html")
    page = opened(root / "report.html")
    missing = page.locator(".note.missing").inner_text()
    assert "config.yaml: no such config file" in missing and "tokenizer.json" in missing
    page.locator(".row").first.click()
    suffix = page.locator(".branch .branch").first
    assert suffix.locator(".thought").all_text_contents() == ["5\n", "1"]
    suffix.locator(".token").last.hover()
    assert page.locator("#tip").inner_text().startswith("credit not known")


def test_a_sampled_page_says_so(tmp_path: Path, opened: Opened):
    root = write_run(tmp_path / "run", [named(), named(step=1)])
    write_report(read_report([root], most_bytes=700), root / "report.html")
    page = opened(root / "report.html")
    said = page.locator("#rollouts-note").inner_text()
    held = json.loads(page.locator("#rollout-values").text_content())[0]["steps"]
    shown = sum(len(step["prompts"]) for step in held)
    assert shown < 2 and said.startswith(f"A sample: {shown} of the journal's 2 prompts.")
    assert "(0 of 1 prompts)" in page.locator("#step").inner_text()


@pytest.mark.parametrize("width", [390, 1024, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width(overlaid: Path, opened: Opened, width: int, scheme: str):
    page = opened(overlaid, width=width, scheme=scheme)
    page.select_option("#kind", "reset")
    page.locator(".row").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "[...document.querySelectorAll('figure canvas, .branch')].filter("
        "(e) => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report-{width}-{scheme}.png", full_page=True)
