"""Is a report of 50,000 rollouts pleasant to use?   a made-up journal -> benchmarks/report.json

    python tools/bench_report.py [--rollouts N] [--out FILE]

Needs Debian's chromium and Playwright. The page is opened five times, in a new context; a filter is
timed from its event to the end of the layout that follows, over the prompts of all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright
from tokenizers import Tokenizer, decoders, models

from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config
from megatron_srpo.journal import Journal
from megatron_srpo.report.page import read_report, write_report
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.types import Group, Prompt, Reset, Rollout, Score, Stage, Thought

WORDS = (
    "so ", "add ", "take ", "then ", "seven ", "nine ", "left ", "right ", "both ", "none ",
    "carry ", "sum ",
)  # fmt: skip
NUM_STEPS, NUM_THOUGHTS, WORDS_A_THOUGHT = 25, 6, 4
NUM_OPENINGS = 5
FILTERS = {
    "fail": ("kind", "fail"),
    "corrected": ("kind", "corrected"),
    "longest": ("kind", "longest"),
    "first_search": ("search", "carry sum"),
    "search": ("search", "nine both left"),
    "search_without_hit": ("search", "no such text"),
    "everything_again": ("search", ""),
}
"""What is set, one after the other."""
TIMED = """([id, value]) => {
  const began = performance.now(), input = document.getElementById(id);
  input.value = value;
  input.dispatchEvent(new Event(id === "search" ? "input" : "change"));
  document.getElementById("list").getBoundingClientRect();
  return performance.now() - began;
}"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> None:
    parser = argparse.ArgumentParser(description="A report of many rollouts in a browser.")
    parser.add_argument("--rollouts", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/report.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        write_run(root, num_prompts=arguments.rollouts // (8 * NUM_STEPS))
        began = time.perf_counter()
        report = read_report([root])
        write_report(report, RunFolder(root).report)
        made_s = time.perf_counter() - began
        with sync_playwright() as driver:
            program = shutil.which("chromium")
            browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
            openings = [opening(browser, RunFolder(root).report) for _ in range(NUM_OPENINGS)]
            browser.close()
        results = {
            "command": "python tools/bench_report.py",
            "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
            "load_at_the_end": os.getloadavg()[0],
            "rollouts": arguments.rollouts,
            "prompts_recorded": report.runs[0].num_recorded,
            "prompts_shown": report.runs[0].num_prompts,
            "page_mb": RunFolder(root).report.stat().st_size / 1e6,
            "report_made_s": made_s,
            "ms": {name: statistics.median(o[name] for o in openings) for name in openings[0]},
            "largest_ms": {name: max(o[name] for o in openings) for name in openings[0]},
        }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def opening(browser: Browser, path: Path) -> dict[str, float]:
    """Milliseconds from navigation, and of each filter."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page: Page = context.new_page()
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    found = {"ready": page.evaluate("performance.now()"), "first_paint": page.evaluate(PAINT)}
    page.select_option("#step", "all")
    found |= {name: page.evaluate(TIMED, [*change]) for name, change in FILTERS.items()}
    context.close()
    return found


def write_run(root: Path, *, num_prompts: int) -> None:
    """`num_prompts` a step, each with four rollouts and four suffixes of the first."""
    rng = random.Random(0)
    cfg = Config.model_validate(
        {
            "run_dir": root,
            "model": "nowhere",
            "data": {"train": "nowhere"},
            "num_steps": NUM_STEPS,
            "eval": {"sets": {"none": {"data": "nowhere"}}},
        }
    )
    folder = RunFolder(root)
    folder.hf.mkdir(parents=True)
    vocab = {word: index for index, word in enumerate([*WORDS, "\n", ""])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=""))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder.hf / "tokenizer.json"))
    folder.config.write_text(dump_config(cfg), "utf-8")
    folder.log.touch()
    folder.rollouts.mkdir()
    lines: list[str] = []
    for step in range(NUM_STEPS):
        groups = [group for index in range(num_prompts) for group in tree(step, index, rng)]
        Journal(folder=folder.rollouts, replica=0, num_replicas=1).write(step, groups)
        row = {"step": step, "pass_rate/base": rng.random(), "reward/mean": rng.random()}
        lines.append(json.dumps(row | {"tokens/base": 1e4, "time/step_s": 9.0}) + "\n")
    folder.metrics.write_text("".join(lines), "utf-8")


def tree(step: int, index: int, rng: random.Random) -> list[Group]:
    """A prompt's base group, and the group of the suffixes."""
    id = f"p{index:05d}"
    text = "What is " + "".join(rng.choices(WORDS, k=8)) + "?"
    prompt = Prompt(id=id, text=text, token_ids=np.zeros(8, np.int32), answer="seven")
    rollouts = [rollout(prompt, f"{step}/{id}/base/{i}", rng, None) for i in range(4)]
    place = rng.randrange(NUM_THOUGHTS)
    seed = rollouts[0]
    suffixes = [rollout(prompt, f"{step}/{id}/suffix/{i}", rng, (seed, place)) for i in range(4)]
    reset = Reset(seed_id=seed.id, thought=place, cause="named", answer=rf"\boxed{{{place + 1}}}")
    return [
        Group(prompt=prompt, rollouts=tuple(rollouts)),
        Group(prompt=prompt, rollouts=tuple(suffixes), resets=(reset,)),
    ]


def rollout(
    prompt: Prompt, id: str, rng: random.Random, seed: tuple[Rollout, int] | None
) -> Rollout:
    """Six thoughts of four words; of a suffix, the first ones are the seed's."""
    length = WORDS_A_THOUGHT + 1
    num_copied = seed[1] if seed else 0
    texts: list[Sequence[int]] = [
        [*rng.choices(range(len(WORDS)), k=WORDS_A_THOUGHT), len(WORDS)]
        for _ in range(NUM_THOUGHTS - num_copied)
    ]
    own = np.array([token for thought in texts for token in thought], np.int32)
    copied = seed[0].token_ids[: num_copied * length] if seed else own[:0]
    new = tuple(
        Thought(text="".join([*WORDS, "\n"][t] for t in thought), start=(num_copied + i) * length)
        for i, thought in enumerate(texts)
    )
    correct = rng.random() < 0.4 and not id.endswith("base/0")
    stage: Stage = "suffix" if seed else "base"
    fields: dict[str, Any] = {"num_cached_tokens": 0, "weight_version": step_of(id)}
    return Rollout(
        id=id,
        prompt=prompt,
        stage=stage,
        token_ids=np.concatenate([copied, own]),
        logprobs=np.zeros(NUM_THOUGHTS * length, np.float32),
        num_copied=num_copied * length,
        seed_id=seed[0].id if seed else None,
        thoughts=(*(seed[0].thoughts[:num_copied] if seed else ()), *new),
        score=Score(value=float(correct), correct=correct),
        finish_reason="stop",
        **fields,
    )


def step_of(id: str) -> int:
    """Of a rollout's id."""
    return int(id.partition("/")[0])


if __name__ == "__main__":
    main()
