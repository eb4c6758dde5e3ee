"""Files of a user's, and the paper's preset, through the command line and the real engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_srpo.journal import read_step
from tests.e2e.small_run import write_small_run
from tests.e2e.test_command_line import finish, metrics, refused, start

ROOT = Path(__file__).resolve().parents[2]
CREDIT = """
import numpy as np

class Everything:
    \"\"\"The reward itself, on every token, copied ones too.\"\"\"

    def __init__(self, cfg):
        pass

    def assign(self, groups):
        ones = lambda r: np.ones(len(r.token_ids), np.float32)
        return [[(ones(r), ones(r) * r.score.value) for r in g.rollouts] for g in groups]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with rule, reward and credit from files that lie elsewhere."""
    folder = tmp_path_factory.mktemp("user")
    config = write_small_run(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (rules,) = (block for block in blocks if block.startswith("# my_rules.py"))
    (folder / "my_rules.py").write_text(rules)
    (folder / "my_credit.py").write_text(CREDIT)
    named = {
        "algorithm.resets": folder / "my_rules.py:LastThought",
        "reward": folder / "my_rules.py:shorter_is_better",
        "credit.rule": folder / "my_credit.py:Everything",
    }
    finish(start("train", config, *(f"{key}={value}" for key, value in named.items())))
    return folder


def test_the_readmes_rule_decides_where_every_seed_goes_back_to(folder: Path) -> None:
    groups = [group for step in range(2) for group in read_step(folder / "run/rollouts", step)]
    by_id = {rollout.id: rollout for group in groups for rollout in group.rollouts}
    resets = [reset for group in groups for reset in group.resets]
    assert len(resets) >= 6 and {reset.cause for reset in resets} == {"last"}
    for reset in resets:
        chosen = reset.thought if reset.moved_from is None else reset.moved_from
        assert chosen == len(by_id[reset.seed_id].thoughts) - 1


def test_the_readmes_reward_is_the_one_that_was_given(folder: Path) -> None:
    for group in read_step(folder / "run/rollouts", 1):
        for rollout in group.rollouts:
            correct = rollout.text.split("\n")[-1] == group.prompt.answer
            assert rollout.score.correct == correct
            assert rollout.score.value == correct / (1 + rollout.text.count("\n"))


def test_a_users_credit_trains_tokens_that_the_packages_own_masks(folder: Path) -> None:
    for step, line in enumerate(metrics(folder / "run")[:2]):
        groups = read_step(folder / "run/rollouts", step)
        rewarded = [r for g in groups for r in g.rollouts if r.score.value > 0]
        assert line["tokens/trained"] == sum(len(r.token_ids) for r in rewarded)


@pytest.mark.parametrize(
    "override, message",
    [
        ("algorithm.resets=nowhere.py:Rule", "algorithm.resets=nowhere.py:Rule: no such file"),
        ("reward=vibes", "reward=vibes: must be one of last_line, boxed, math_verify, "),
        (
            "credit.rule={folder}/my_rules.py:LastThought",
            "cannot be built with (Config): missing a required argument: 'tokenizer'",
        ),
    ],
)
def test_a_part_that_does_not_fit_gets_one_line(folder: Path, override: str, message: str) -> None:
    run = folder / "refused"
    filled = override.replace("{folder}", str(folder))
    code, output = refused("train", folder / "config.yaml", filled, f"run_dir={run}")
    assert code == 2 and len(output.strip().splitlines()) == 1, output
    assert message in output
    assert not run.exists()


def test_a_rule_that_names_no_thought_of_its_seed_stops_the_run_with_one_line(
    folder: Path,
) -> None:
    text = (folder / "my_rules.py").read_text().replace("len(s.thoughts) - 1", "len(s.thoughts)")
    (folder / "my_wrong_rules.py").write_text(text)
    rule = f"algorithm.resets={folder / 'my_wrong_rules.py'}:LastThought"
    process = start("train", folder / "config.yaml", rule, f"run_dir={folder / 'wrong'}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "the reset rule chose thought" in output.strip().splitlines()[-1]
    assert "Traceback" in (folder / "wrong/log.txt").read_text()


def test_the_papers_preset_trains_on_a_toy_task(tmp_path: Path) -> None:
    write_small_run(tmp_path)
    toy = {
        "run_dir": tmp_path / "run",
        "model": tmp_path / "model",
        "data.train": tmp_path / "train.jsonl",
        "eval.sets.olympiads.data": tmp_path / "held_out.jsonl",
        "data.max_prompt_tokens": 16,
        "data.template": "'{prompt}'",
        "reward": "last_line",
        "dtype": "float32",
        "num_steps": 2,
        "max_logprob_diff": 5e-5,
        "algorithm.num_prompts": 8,
        "thoughts.max_tokens": 6,
        "thoughts.delimiter": '"\\n"',
        "localize.chat": "false",
        "localize.template": '"{prompt}{response}?"',
        "localize.parser": "verdicts",
        "localize.max_tokens": 12,
        "rollout.max_response_tokens": 24,
        "rollout.max_model_len": 128,
        "rollout.kv_cache_bytes": 2**26,
    }
    overrides = [f"{key}={value}" for key, value in toy.items()]
    finish(start("train", ROOT / "examples/paper.yaml", *overrides))
    lines = metrics(tmp_path / "run")
    assert len(lines) == 3
    for step, line in enumerate(lines[:2]):
        groups = read_step(tmp_path / "run/rollouts", step)
        trained = [r for g in groups if g.use == "train" for r in g.rollouts]
        seeds = {reset.seed_id for group in groups for reset in group.resets}
        assert len(trained) == 8 * 8
        assert seeds and not seeds & {rollout.id for rollout in trained}
        assert line["tokens/seed"] > 0
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["step"] == 0
