"""A headless Chromium (Debian's), a page of a real run, and pages of what no run would leave."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_srpo.report.page import read_report, write_report
from tests.e2e.small_run import write_small_run
from tests.launch import start

SCREENSHOTS = Path(__file__).parents[2] / "screenshots"
REWARD = """
from megatron_srpo.types import Score

def odd(prompt, response):
    is_odd = sum(map(int, filter(str.isdigit, response))) % 2 == 1
    return Score(value=float(is_odd), correct=is_odd)
"""
"""Of which a random policy gets about half."""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Skips where there is none, or no Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        # As root, which containers are, Chromium has no sandbox of its own.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file, ready; what the page says on its console, or asks of a network, is an error."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_page(path: Path, *, width: int = 1280, scheme: str = "light", hash: str = "") -> Any:
        size = {"width": width, "height": 900}
        contexts.append(chromium.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda asked: complaints.append(asked.url) if ":" in asked.url[5:] else None
        )
        page.goto(f"{path.as_uri()}{hash}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def run(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of SRPO with real engines; where the random policy's localization cannot be parsed,
    which is everywhere, the reset is drawn."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "reward.py").write_text(REWARD)
    config = write_small_run(folder, reward=f"{folder}/reward.py:odd", algorithm={"num_prompts": 8})
    process = start("train", config, "localize.fallback=random", "credit.std=none")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return folder / "run"


@pytest.fixture(scope="session")
def overlaid(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, what would be another seed of it, and what would be GRPO."""
    folder = tmp_path_factory.mktemp("overlaid")
    roots = [run]
    for name, (old, new) in {
        "seed1": ("\nseed: 0\n", "\nseed: 1\n"),
        "grpo": ("resets: self", "resets: none"),
    }.items():
        roots.append(folder / name)
        shutil.copytree(run, roots[-1], ignore=shutil.ignore_patterns("report.html"))
        config = roots[-1] / "config.yaml"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))
        metrics = roots[-1] / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"reward/mean": 0.', '"reward/mean": 0.0'))
    write_report(read_report(roots), folder / "report.html")
    return folder / "report.html"
