"""Do the unit tests notice when the algorithm is wrong?   mutations -> table of caught and survived

    python tools/mutate.py [--only NAME] [--jobs N]

Each mutation is a mistake that somebody could make: an exact piece of source, what stands there
instead, and what is wrong then. Package and unit tests are copied to a temporary folder, one
mutation is applied at a time, and the tests that mirror its file are run, then `test_algorithm`.
Tests that are red without any mutation are named and left out. Exit code 1 if fewer than 90 % are
caught, or if a piece of source is not found exactly once (the source has moved on: mend the list).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_CAUGHT = 0.9


@dataclass(frozen=True, slots=True)
class Mutation:
    """A mistake: in `file`, `old` becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    wrong: str
    """What is wrong then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the tests said of one mutation."""

    mutation: Mutation
    failed_test: str | None
    """The first test that failed; None: the mutation survived."""
    seconds: float


# fmt: off
MUTATIONS = (
    # --- algorithm: groups, seeds, stages ---
    Mutation("merge-all", "algorithm.py",
        "if reset is None or reset.thought == 0:", "if True:",
        "suffixes are compared with rollouts that left another state"),
    Mutation("never-merge-restart", "algorithm.py",
        "if reset is None or reset.thought == 0:", "if reset is None:",
        "rollouts of one state are split over two groups"),
    Mutation("merge-first-kept", "algorithm.py",
        "reset is None or reset.thought == 0:", "reset is None or reset.thought <= 1:",
        "a suffix behind one kept thought is compared with fresh rollouts"),
    Mutation("reset-lost-in-merge", "algorithm.py",
        "rollouts=fresh + again, reset=reset))", "rollouts=fresh + again))",
        "metrics and journal do not know that a merged group was reset"),
    Mutation("reset-on-base", "algorithm.py",
        "Group(prompt=prompt, rollouts=fresh))",
        "Group(prompt=prompt, rollouts=fresh, reset=reset))",
        "a reset is counted twice"),
    Mutation("suffixes-dropped", "algorithm.py",
        "rollouts=fresh + again, reset=reset))", "rollouts=fresh, reset=reset))",
        "a prompt without a second state trains on half of its rollouts"),
    Mutation("seed-removed", "algorithm.py",
        "base[i]), tuple(rest[", "r for r in base[i] if r is not seeds[i]), tuple(rest[",
        "the base group loses its seed and its mean is biased upwards"),
    Mutation("last-failed", "algorithm.py",
        "return next((r for r in rollouts if", "return next((r for r in reversed(rollouts) if",
        "the seed is the last failed rollout"),
    Mutation("seed-correct", "algorithm.py",
        "if not r.score.correct and r.score.failure is None", "if r.score.failure is None",
        "a right rollout is gone back on"),
    Mutation("seed-failed-reward", "algorithm.py",
        "not r.score.correct and r.score.failure is None", "not r.score.correct",
        "a rollout without a verdict is taken for a wrong one"),
    Mutation("grpo-seeds", "algorithm.py",
        "first_failed(rollouts) if num_suffixes else None", "first_failed(rollouts)",
        "GRPO draws resets that nothing uses"),
    Mutation("base-slices", "algorithm.py",
        "flat[i * num_base : (i + 1) * num_base]", "flat[i : i + num_base]",
        "rollouts of neighbouring prompts are mixed"),
    Mutation("suffix-slices", "algorithm.py",
        "rest[i * num_suffixes : (i + 1) * num_suffixes]",
        "rest[i * num_suffixes :][: num_suffixes + 1]",
        "a group takes a suffix of the next prompt"),
    Mutation("interleaved-starts", "algorithm.py",
        'index=i) for p in prompts for i in range(num_base)]',
        'index=i) for i in range(num_base) for p in prompts]',
        "starts are in another order than the slices that read them"),
    Mutation("extra-as-base", "algorithm.py",
        'stage="extra", index=index)', 'stage="base", index=index + 100)',
        "fresh rollouts in place of suffixes are counted as base rollouts"),
    Mutation("extra-repeats-base", "algorithm.py",
        'stage="extra", index=index)', 'stage="base", index=index)',
        "the resets' budget draws the base rollouts again"),
    Mutation("suffix-as-base", "algorithm.py",
        'stage="suffix", index=index, token_ids', 'stage="extra", index=index, token_ids',
        "suffixes carry the stage label of fresh rollouts"),
    Mutation("keep-blamed", "algorithm.py",
        "kept = slice(seed.thoughts[reset.thought].start)",
        "kept = slice(seed.thoughts[min(reset.thought + 1, len(seed.thoughts) - 1)].start)",
        "the blamed thought is kept"),
    Mutation("keep-one-less", "algorithm.py",
        "kept = slice(seed.thoughts[reset.thought].start)",
        "kept = slice(seed.thoughts[max(reset.thought - 1, 0)].start)",
        "a right thought is thrown away"),
    Mutation("prefix-off-by-a-token", "algorithm.py",
        "kept = slice(seed.thoughts[reset.thought].start)",
        "kept = slice(max(seed.thoughts[reset.thought].start - 1, 0))",
        "the prefix lacks its last token"),
    Mutation("ignore-moved", "algorithm.py",
        "return replace(reset, thought=thought, moved_from=reset.thought)", "return reset",
        "a prefix leaves no room for a thought"),
    Mutation("moved-uncounted", "algorithm.py",
        "thought=thought, moved_from=reset.thought)", "thought=thought)",
        "moved resets are not counted"),
    Mutation("room-off-by-one", "algorithm.py",
        "seed.thoughts[thought].start > room", "seed.thoughts[thought].start >= room",
        "a prefix that leaves just enough room is shortened"),
    Mutation("move-to-first", "algorithm.py",
        "        thought -= 1\n", "        thought = 0\n",
        "a reset that lacks room restarts instead of going back one thought"),
    # --- algorithm: requests and rollouts ---
    Mutation("suffix-max-tokens", "algorithm.py",
        "cfg.rollout.max_response_tokens - len(start.token_ids),",
        "cfg.rollout.max_response_tokens,",
        "prefix and suffix together exceed a response"),
    Mutation("prompt-takes-room", "algorithm.py",
        "max_response_tokens - len(start.token_ids),",
        "max_response_tokens - len(start.prompt.token_ids),",
        "the prompt is taken for the prefix"),
    Mutation("temperature-one", "algorithm.py",
        "temperature=cfg.rollout.temperature,", "temperature=1.0,",
        "rollouts ignore the configured temperature"),
    Mutation("one-seed", "algorithm.py",
        "seed=counter_seed(cfg.seed, id),", "seed=counter_seed(cfg.seed, step),",
        "all rollouts of a step share a seed"),
    Mutation("seed-by-position", "algorithm.py",
        "        for id, start in by_id.items()\n    ]\n    rollouts",
        "        for id, start in by_id.items()\n    ]\n"
        "    requests = [replace(r, seed=n) for n, r in enumerate(requests)]\n    rollouts",
        "what is drawn depends on the neighbours of a request"),
    Mutation("run-seed-ignored", "algorithm.py",
        "seed=counter_seed(cfg.seed, id),", "seed=counter_seed(0, id),",
        "every run draws the same"),
    Mutation("context-without-prefix", "algorithm.py",
        "context=np.concatenate([start.prompt.token_ids, start.token_ids]),",
        "context=start.prompt.token_ids,",
        "a suffix is sampled from the bare prompt and then glued to the prefix"),
    Mutation("prefix-trained", "algorithm.py",
        "num_copied=len(start.token_ids),", "num_copied=0,",
        "a suffix rollout trains on tokens that its seed sampled"),
    Mutation("own-token-masked", "algorithm.py",
        "num_copied=len(start.token_ids),", "num_copied=len(start.token_ids) + 1,",
        "the first own token is masked"),
    Mutation("reward-of-suffix-only", "algorithm.py",
        'score=roles.reward(start.prompt, "".join(thought.text for thought in thoughts)),',
        'score=roles.reward(start.prompt, "".join(roles.tokenizer.pieces(new.token_ids))),',
        "the reward sees a response without its prefix"),
    Mutation("eos-dropped", "algorithm.py",
        "token_ids = np.concatenate([start.token_ids, new.token_ids])",
        "token_ids = np.concatenate([start.token_ids, new.token_ids[:-1]])",
        "the sampled end of sequence is not in the rollout"),
    Mutation("prefix-logprobs-lost", "algorithm.py",
        "logprobs=np.concatenate([start.logprobs, new.logprobs]),",
        "logprobs=np.concatenate([0 * start.logprobs, new.logprobs]),",
        "the copied prefix forgets its parent's log-probs"),
    Mutation("finish-order", "algorithm.py",
        "return [rollouts[id] for id in by_id]", "return [*rollouts.values()]",
        "rollouts come in the order in which they finish and are grouped by chance"),
    Mutation("finish-reason-lost", "algorithm.py",
        "finish_reason=new.finish_reason,", 'finish_reason="stop",',
        "a response that was cut looks finished"),
    Mutation("version-lost", "algorithm.py",
        "weight_version=new.weight_version,", "weight_version=0,",
        "a rollout does not say which weights it had"),
    # --- algorithm: samples ---
    Mutation("prompt-weight", "algorithm.py",
        "loss_weight=np.concatenate([pad, loss_weight]),",
        "loss_weight=np.concatenate([pad + 1, loss_weight]),",
        "prompt tokens carry loss"),
    Mutation("mask-off-by-one", "algorithm.py",
        "loss_weight=np.concatenate([pad, loss_weight]),",
        "loss_weight=np.roll(np.concatenate([pad, loss_weight]), -1),",
        "the mask is one token early: the last prompt token is trained, the last own one is not"),
    Mutation("count-tokens", "algorithm.py",
        "count=float(loss_weight.sum()),", "count=float((loss_weight > 0).sum()),",
        "sequences are divided by their length twice"),
    Mutation("count-trained-only", "algorithm.py",
        "count=float(loss_weight.sum()),", "count=float((loss_weight * abs(advantage)).sum()),",
        "sequences without signal are left out of the denominator"),
    Mutation("sample-logprob-prompt-lost", "algorithm.py",
        "logprob=np.concatenate([pad, rollout.logprobs]),",
        "logprob=np.concatenate([rollout.logprobs, pad]),",
        "behaviour log-probs stand under other tokens"),
    # --- resets ---
    Mutation("random-excludes-last", "resets.py",
        ").randrange(len(seed.thoughts)),", ").randrange(max(1, len(seed.thoughts) - 1)),",
        "the last thought is never reset to"),
    Mutation("random-excludes-first", "resets.py",
        ").randrange(len(seed.thoughts)),",
        ").randrange(min(1, len(seed.thoughts) - 1), len(seed.thoughts)),",
        "the bare prompt is never reset to"),
    Mutation("random-ignores-step", "resets.py",
        'counter_seed(self.run_seed, step, seed.prompt.id, "reset", 0)',
        'counter_seed(self.run_seed, seed.prompt.id, "reset", 0)',
        "a prompt is reset to the same place in every epoch"),
    Mutation("random-ignores-prompt", "resets.py",
        'counter_seed(self.run_seed, step, seed.prompt.id, "reset", 0)',
        'counter_seed(self.run_seed, step, "reset", 0)',
        "all prompts of a step draw the same number"),
    Mutation("answers-by-finish", "resets.py",
        "self._read(seed, answers.get(requests[seed.id].id)) for seed in seeds]",
        "self._read(seed, answer) for seed, answer in zip(seeds, answers.values())]",
        "answers reach other seeds when short ones finish first"),
    Mutation("unparsed-last", "resets.py",
        "thought=verdict if isinstance(verdict, int) else 0,",
        "thought=verdict if isinstance(verdict, int) else len(seed.thoughts) - 1,",
        "an answer that names no thought resets to the last one"),
    Mutation("cause-merged", "resets.py",
        'cause="named" if isinstance(verdict, int) else verdict,',
        'cause="named" if isinstance(verdict, int) else "unparsed",',
        "`no error` is counted as not parsed"),
    Mutation("localize-temperature", "resets.py",
        "temperature=self.cfg.localize.temperature,", "temperature=self.cfg.rollout.temperature,",
        "the question is asked at the rollouts' temperature"),
    Mutation("localize-tokens-free", "resets.py",
        "num_tokens=len(answer.token_ids),", "num_tokens=0,",
        "tokens of the localization are not counted"),
    Mutation("oracle-one-late", "resets.py",
        "            return index\n    return len", "            return index + 1\n    return len",
        "the oracle keeps the wrong thought"),
    # --- localize ---
    Mutation("first-boxed", "localize.py",
        "    return int(boxed[-1]) - 1 if int(boxed[-1])",
        "    return int(boxed[0]) - 1 if int(boxed[0])",
        "the first boxed number counts, not the last"),
    Mutation("boxed-from-zero", "localize.py",
        "return int(boxed[-1]) - 1 if", "return int(boxed[-1]) if",
        "steps are numbered from 1 and read from 0"),
    Mutation("zero-names-first", "localize.py",
        'if int(boxed[-1]) else "no_error"', 'if int(boxed[-1]) else 0',
        "`no error` is taken for the first thought"),
    Mutation("boxed-out-of-range", "localize.py",
        "int(boxed[-1]) > num_thoughts:", "int(boxed[-1]) > num_thoughts + 1:",
        "a thought that does not exist is named"),
    Mutation("steps-from-zero", "localize.py",
        "enumerate(rollout.thoughts, start=1)", "enumerate(rollout.thoughts, start=0)",
        "the question numbers steps from 0, the answer is read from 1"),
    Mutation("last-minus", "localize.py",
        'return signs.index("-")', 'return len(signs) - 1 - signs[::-1].index("-")',
        "the last wrong thought is blamed"),
    Mutation("signs-beyond", "localize.py",
        'answer)[:num_thoughts]', 'answer)',
        "a sign behind the last thought names one that does not exist"),
    Mutation("few-signs-clean", "localize.py",
        'return "no_error" if len(signs) == num_thoughts else "unparsed"', 'return "no_error"',
        "an unfinished verdict says that there is no error"),
    Mutation("answer-shown", "localize.py",
        "prompt=rollout.prompt.text, response",
        "prompt=rollout.prompt.text + rollout.prompt.answer, response",
        "the right answer is shown to the localizer"),
    # --- thoughts ---
    Mutation("boundary-before-delimiter", "thoughts.py",
        "[match.end() for match", "[match.start() for match",
        "a thought ends before its delimiter"),
    Mutation("cut-one-late", "thoughts.py",
        "index + 1 - start == cfg.max_tokens", "index - start == cfg.max_tokens",
        "thoughts are one token longer than allowed"),
    Mutation("cut-from-response", "thoughts.py",
        "index + 1 - start == cfg.max_tokens", "(index + 1) % cfg.max_tokens == 0",
        "length is counted from the beginning of the response"),
    Mutation("cut-unsaid", "thoughts.py",
        "start=start, was_cut=not is_closed))", "start=start))",
        "cut thoughts are not counted"),
    Mutation("empty-last-thought", "thoughts.py",
        "        if char_end == len(text):\n"
        "            break  # no text is left to begin another thought with\n",
        "",
        "an empty thought stands behind the last delimiter"),
    Mutation("start-off-by-one", "thoughts.py",
        "            start = index + 1\n", "            start = index\n",
        "a thought begins with the last token of the one before"),
    Mutation("delimiter-as-pattern", "thoughts.py",
        "re.finditer(re.escape(cfg.delimiter), text)", "re.finditer(cfg.delimiter, text)",
        "a delimiter with a full stop ends thoughts anywhere"),
    Mutation("closed-forgotten", "thoughts.py",
        "num_closed > was_closed", "num_closed > len(thoughts)",
        "two delimiters in a token, or a cut, shift all later boundaries"),
    # --- advantages ---
    Mutation("sample-std", "advantages.py",
        "rewards[scored].std()", "rewards[scored].std(ddof=1)",
        "the sample's standard deviation instead of the population's"),
    Mutation("no-std", "advantages.py",
        "centred / rewards[scored].std()", "centred",
        "advantages are not divided by the spread"),
    Mutation("std-of-other-group", "advantages.py",
        "group.rollouts, _normalized(group.rollouts), strict=True",
        "group.rollouts, _normalized(groups[0].rollouts)",
        "every group is measured against the first"),
    Mutation("no-baseline", "advantages.py",
        "rewards[scored] - rewards[scored].mean()", "rewards[scored]",
        "no mean is subtracted"),
    Mutation("signal-by-std", "advantages.py",
        "np.ptp(rewards[scored]) > 0", "rewards[scored].std() > 0",
        "rounding makes a signal of rewards that agree"),
    Mutation("failure-is-zero", "advantages.py",
        "scored = np.array([rollout.score.failure is None for rollout in rollouts])",
        "scored = np.array([True for rollout in rollouts])",
        "a reward that failed counts as a reward of 0"),
    Mutation("failure-weighted", "advantages.py",
        "if rollout.score.failure is None:", "if True:",
        "a rollout without a verdict counts in the denominator"),
    Mutation("weight-by-whole-length", "advantages.py",
        "num_own = len(rollout.token_ids) - rollout.num_copied", "num_own = len(rollout.token_ids)",
        "a suffix weighs less the longer its prefix is"),
    Mutation("token-mean", "advantages.py",
        "= 1.0 / num_own", "= 1.0",
        "long rollouts weigh more than short ones"),
    Mutation("weight-on-prefix", "advantages.py",
        "loss_weight[rollout.num_copied :] =", "loss_weight[:] =",
        "the copied prefix is trained"),
    Mutation("advantage-on-prefix", "advantages.py",
        "advantages[rollout.num_copied :] = advantage", "advantages[:] = advantage",
        "the copied prefix has credit"),
    # --- loss ---
    Mutation("loss-sign", "loss.py",
        "return -(loss_weight_T", "return (loss_weight_T",
        "training makes good tokens less likely"),
    Mutation("denominator-dropped", "loss.py",
        ".sum() / denominator", ".sum()",
        "the step grows with the batch"),
    Mutation("local-mean", "loss.py",
        ".sum() / denominator", ".mean() / denominator",
        "micro-batches do not add up"),
    Mutation("weight-dropped", "loss.py",
        "(loss_weight_T * advantage_T * logprobs_T)", "(advantage_T * logprobs_T)",
        "the mask is not applied"),
    Mutation("k3-sign", "loss.py",
        "(difference_T.exp() - 1 - difference_T)", "((-difference_T).exp() - 1 + difference_T)",
        "the divergence is measured the other way round"),
    Mutation("mismatch-graph", "loss.py",
        "logprobs_T.detach() - ", "logprobs_T - ",
        "measuring keeps the graph in memory"),
    # --- evaluate ---
    Mutation("plug-in-estimate", "evaluate.py",
        "1 - comb(num_responses - num_correct, k) / comb(num_responses, k)",
        "1 - (1 - num_correct / num_responses) ** k",
        "pass@k is biased: responses are drawn with replacement"),
    Mutation("failed-is-wrong", "evaluate.py",
        "        if attempt.score.failure is None:\n            verdicts", "        verdicts",
        "a response whose reward failed counts as a wrong answer"),
    Mutation("too-few-verdicts", "evaluate.py",
        " if len(v) >= k]", "]",
        "a problem with fewer than k verdicts has a pass@k"),
    Mutation("problems-weigh-by-verdicts", "evaluate.py",
        "(sum(chances), len(chances))", "(sum(chances), len(attempts))",
        "a share of responses where a share of problems is meant"),
    Mutation("zero-for-nothing", "evaluate.py",
        "if chances := pass_at(k, attempts):", "if (chances := pass_at(k, attempts)) is not None:",
        "without a single verdict pass@k is 0"),
    Mutation("samples-alike", "evaluate.py",
        'counter_seed(cfg.seed, "eval", prompt.id, index)',
        'counter_seed(cfg.seed, "eval", prompt.id)',
        "all responses to a problem are the same"),
    Mutation("order-of-finishing", "evaluate.py",
        "[attempts[id] for id in draws]", "list(attempts.values())",
        "what is written depends on who finished first"),
    Mutation("nucleus-forgotten", "evaluate.py",
        "            top_p=cfg.rollout.top_p,\n", "",
        "evaluation samples from another distribution than the rollouts"),
    # --- batching ---
    Mutation("target-not-shifted", "batching.py",
        "target_ids=np.concatenate([sample.token_ids[1:]",
        "target_ids=np.concatenate([sample.token_ids[:-1]",
        "every token predicts itself"),
    Mutation("weight-not-shifted", "batching.py",
        "loss_weight=np.concatenate([sample.loss_weight[1:]",
        "loss_weight=np.concatenate([sample.loss_weight[:-1]",
        "the mask belongs to the token before"),
    Mutation("advantage-not-shifted", "batching.py",
        "advantage=np.concatenate([sample.advantage[1:]",
        "advantage=np.concatenate([sample.advantage[:-1]",
        "the credit belongs to the token before"),
    Mutation("logprob-not-shifted", "batching.py",
        "logprob=np.concatenate([sample.logprob[1:]", "logprob=np.concatenate([sample.logprob[:-1]",
        "mismatch is measured against the token before"),
    Mutation("positions-run-on", "batching.py",
        "np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])",
        "np.arange(sum(lengths), dtype=np.int32)",
        "positions do not begin anew in each sequence"),
    Mutation("cu-seqlens-whole", "batching.py",
        "np.concatenate([[0], np.cumsum(lengths)])",
        "np.concatenate([[0], np.cumsum(lengths) + 1])",
        "a sequence attends to its neighbour"),
    Mutation("sequence-twice", "batching.py",
        "        padded.append(fullest[:half])\n        del fullest[:half]\n",
        "        padded.append(fullest[:half])\n",
        "a sequence is in two micro-batches"),
    Mutation("never-split", "batching.py",
        "half = len(fullest) // 2", "half = 0",
        "a rank gets empty micro-batches while another of its own is full"),
    Mutation("counts-unequal", "batching.py",
        "return [_pad_count(micro_batches, num_micro_batches) for micro_batches in plan]",
        "return plan",
        "ranks have unequal numbers of micro-batches and wait for each other for ever"),
    Mutation("limit-plus-one", "batching.py",
        "if lengths[index] <= free:", "if lengths[index] <= free + 1:",
        "a micro-batch exceeds its limit"),
    Mutation("limit-strict", "batching.py",
        "if lengths[index] <= free:", "if lengths[index] < free:",
        "a sequence that just fits opens another micro-batch"),
    Mutation("loads-ignored", "batching.py",
        "lightest = loads.index(min(loads))", "lightest = index % num_ranks",
        "ranks are balanced by number, not by length"),
    Mutation("shortest-first", "batching.py",
        "key=lambda i: (-lengths[i], i))", "key=lambda i: (lengths[i], i))",
        "the longest sequence comes last and unbalances the ranks"),
)
# fmt: on


def copy_project(folder: Path) -> Path:
    """Package and unit tests, nothing else."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_srpo", folder / "megatron_srpo", ignore=skipped)
    shutil.copytree(ROOT / "tests" / "unit", folder / "tests" / "unit", ignore=skipped)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def tests_of(file: str) -> list[str]:
    """The file's own tests first, then the whole algorithm's where it goes through that file."""
    names = [f"test_{Path(file).stem}.py"]
    if file not in ("algorithm.py", "loss.py", "batching.py"):
        names.append("test_algorithm.py")
    return [f"tests/unit/{name}" for name in names]


def run_tests(folder: Path, tests: Sequence[str], *options: str) -> list[str]:
    """Ids of failed tests, or what stopped pytest."""
    try:
        done = pytest_in(folder, *options, *tests)
    except subprocess.TimeoutExpired:
        return ["pytest did not come to an end"]
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed or ([f"pytest ended with {done.returncode}"] if done.returncode else [])


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=no", "-rfE", "-pno:cacheprovider", *arguments],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def judge(mutation: Mutation, red: Sequence[str]) -> Outcome:
    """Apply one mutation to a fresh copy and run its tests up to the first failure."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = copy_project(Path(name))
        path = folder / "megatron_srpo" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        deselected = [f"--deselect={test}" for test in red]
        failed = run_tests(folder, tests_of(mutation.file), "-x", *deselected)
    return Outcome(
        mutation=mutation,
        failed_test=failed[0].rpartition("::")[2] if failed else None,
        seconds=time.perf_counter() - began,
    )


def stale(mutations: Sequence[Mutation]) -> list[str]:
    """Mutations whose `old` is not in the source exactly once."""
    counts = {m.name: (ROOT / "megatron_srpo" / m.file).read_text().count(m.old) for m in mutations}
    return [f"{name}: found {count} times" for name, count in counts.items() if count != 1]


def report(outcome: Outcome) -> str:
    m, test = outcome.mutation, outcome.failed_test
    verdict = f"caught    {test}" if test else f"SURVIVED  {m.wrong}"
    return f"{m.file:<14}{m.name:<28}{outcome.seconds:5.1f} s  {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", metavar="NAME", help="mutations whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    arguments = parser.parse_args()
    wanted = arguments.only or ""
    mutations = [m for m in MUTATIONS if wanted in m.name or wanted in m.file]
    if not mutations:
        parser.error(f"no mutation is named like {wanted!r}")
    if moved := stale(mutations):
        print("stale mutations, mend the list:", *moved, sep="\n  ")
        return 1

    began = time.perf_counter()
    tests = sorted({test for m in mutations for test in tests_of(m.file)})
    with tempfile.TemporaryDirectory() as name:
        red = run_tests(copy_project(Path(name)), tests)
    for test in red:
        print(f"red without a mutation, left out: {test}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = []
        for outcome in pool.map(lambda m: judge(m, red), mutations):
            print(report(outcome), flush=True)
            outcomes.append(outcome)
    num_caught = sum(outcome.failed_test is not None for outcome in outcomes)
    seconds = time.perf_counter() - began
    print(f"{num_caught} of {len(outcomes)} mutations caught in {seconds:.0f} s")
    return 0 if num_caught >= LEAST_CAUGHT * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
