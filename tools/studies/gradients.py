"""How good is the gradient that each arm learns from?   policy, arms -> cosines with the truth

Batches of all arms take the same prompts and about the same number of generated tokens, through
the run's own parts: engine, reset rule, credit rule, exchange, the trainer's backward pass. No
weight changes, and no loss is there but the policy loss. The truth is that of plain policy
gradient (mean baseline, no std, every token the same weight) on a large sample of other prompts;
`alignment.py` says what is done with its noise.

Arms that ask the engine for the same thing get the same answer (`kept.py`): four of a prompt's
eight rollouts under GRPO are its base rollouts under SRPO, and arms that differ in credit alone
share all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_srpo.advantages import CREDITS
from megatron_srpo.algorithm import collect_groups, to_samples
from megatron_srpo.assembly import Run, assemble
from megatron_srpo.colocation import Colocation
from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.engines.megatron.learner import MegatronLearner
from megatron_srpo.extensions import build
from megatron_srpo.inputs import Inputs, read_inputs
from megatron_srpo.metrics import GENERATED, Sums, combine, rollout_sums
from megatron_srpo.payoff import PAYOFF
from megatron_srpo.protocols import CreditRule, ResetRule
from megatron_srpo.resets import RULES
from megatron_srpo.rollouts import Roles
from megatron_srpo.train import loop
from megatron_srpo.types import Group, Prompt
from tools.studies.alignment import (
    STATES,
    Alignment,
    Cell,
    Gradient,
    add,
    cosine,
    prompts_for,
)
from tools.studies.regimes import CONFIG, REGIMES
from tools.studies.runs import FIXED, MANY_STEPS, PASS, Lines, workplace
from tools.studies.table import ARMS, TUNED, Settings

SEED = 950
"""Of rollouts and of the run that makes the policies; no run of another study has it."""
TRUTH: Settings = (
    *ARMS["grpo"],
    *("credit.std=none", "credit.aggregation=token_mean"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a measurement."""

    num_batches: int = 24
    baseline_batches: int = 96
    """Of the arm that is in all ratios."""
    batch_tokens: float = 2400
    """Generated, of all kinds: what 16 prompts cost GRPO in h8."""
    num_measured: int = 64
    """Prompts that tell how many tokens an arm needs for one."""
    reference_prompts: int = 512
    reference_rollouts: int = 16


def measure(
    cells: Sequence[Cell],
    path: Path,
    *,
    lr: str | None,
    commit: str,
    tell: Callable[[str], None],
    size: Size = Size(),
) -> None:
    """Cells of one regime, each a line of `path` when it is done. Policies after the warm start
    are those of a GRPO run with the learning rate `lr`."""
    here, regime = workplace(), REGIMES[cells[0].regime]
    fixed = [*regime.overrides, *FIXED, f"seed={SEED}"]
    cfg = load_config(CONFIG, [*fixed, *ARMS[TUNED], *([f"optimizer.lr={lr}"] if lr else [])])
    inputs = read_inputs(cfg, num_processes=1)
    run = assemble(cfg, inputs, here.mesh, None, Colocation.on(here.mesh))
    here.engines.append(run.engine)
    bench = Bench(run=run, inputs=inputs, fixed=fixed, size=size)
    states = [*STATES[regime.name]]
    last = max(states.index(each.state) for each in cells)
    levels = {state: STATES[regime.name][state] for state in states[: last + 1]}
    for state, passed in policies(run, levels):
        own = [each for each in cells if each.state == state]
        if not own:
            continue
        began = time.perf_counter()
        halves = bench.halves()
        alike, seconds = cosine(*halves), time.perf_counter() - began
        tell(
            f"{regime.name} {state}: pass@1 {passed:.2f}, halves of the reference have a cosine of "
            f"{alike:.2f}, {seconds:.0f} s"
        )
        if alike <= 0:
            tell("nothing is measured against noise")
            continue
        for each in own:
            found = bench.align(each, halves, passed=passed, commit=commit)
            add(path, found)
            tell(in_words(found))
    inputs.judge.close()


def in_words(found: Alignment) -> str:
    """What became of it, in a line."""
    return (
        f"{found.cell.regime} {found.cell.state}  {' '.join(found.cell.settings)}  cosine "
        f"{found.cosine:.3f} ± {found.error:.3f} with {found.tokens:.0f} tokens of "
        f"{found.num_prompts} prompts, in {found.seconds:.0f} s"
    )


class Reached(BaseException):
    """The policy passes as often as it should; no `Exception`, like `StopRequested`."""

    def __init__(self, passed: float) -> None:
        super().__init__()
        self.passed = passed


def policies(run: Run, levels: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """(state, held-out pass@1) while the run's policy is there. Levels rise."""
    lines = Lines(None, run.cfg.log, name="", num_steps=MANY_STEPS, stopwatch=run.stopwatch)
    lines.lines = []
    for state, level in levels.items():
        yield state, _train_until(level, run, lines)


def _train_until(level: float, run: Run, lines: Lines) -> float:
    def evaluate() -> Sums:
        evaluated = run.evaluate()
        passed = combine([evaluated])[PASS]
        if passed >= level:
            raise Reached(passed)
        return evaluated

    here = replace(
        run, first_step=len(lines.lines), evaluate=evaluate, record=lambda step, groups: None
    )
    try:
        loop(here, lines)
    except Reached as reached:
        return reached.passed
    raise AssertionError(f"{MANY_STEPS} steps have not led to a pass rate of {level}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measures the policy that the run has at the moment."""

    run: Run
    inputs: Inputs
    fixed: Sequence[str]
    """Overrides of all arms."""
    size: Size

    @property
    def prompts(self) -> list[Prompt]:
        """In one random order: the reference's come first, and are nobody else's."""
        prompts = self.inputs.prompts
        return [prompts[i] for i in np.random.default_rng(SEED).permutation(len(prompts))]

    def halves(self) -> tuple[Gradient, Gradient]:
        """Of the reference."""
        num = self.size.reference_prompts
        cfg = self._config((*TRUTH, f"algorithm.num_rollouts={self.size.reference_rollouts}"))
        groups = self._collect(self.prompts[:num], cfg)
        one, other = (self._gradient(part, cfg) for part in parts(groups, num // 2))
        return one, other

    def align(
        self, cell: Cell, halves: tuple[Gradient, Gradient], *, passed: float, commit: str
    ) -> Alignment:
        """The arm's batches against the reference."""
        size, began = self.size, time.perf_counter()
        cfg, prompts = self._config(cell.settings), self.prompts[self.size.reference_prompts :]
        some = prompts[: size.num_measured]
        num_tokens = tokens_of(self._collect(some, cfg), cfg)
        num = prompts_for(size.batch_tokens, num_tokens, num_prompts=len(some))
        is_baseline = cell.settings == tuple(sorted(ARMS[TUNED]))
        num_batches = size.baseline_batches if is_baseline else size.num_batches
        groups = self._collect(prompts[: num * num_batches], cfg)
        gradients = [self._gradient(part, cfg) for part in parts(groups, num)]
        reference = halves[0] + halves[1]
        metrics = combine([rollout_sums(groups, cfg)])
        return Alignment(
            cell=cell,
            passed=round(passed, 4),
            num_prompts=num,
            tokens=round(tokens_of(groups, cfg) / num_batches, 1),
            cosines=[round(cosine(each, reference), 4) for each in gradients],
            together=round(cosine(np.sum(gradients, axis=0), reference), 4),
            halves=round(cosine(*halves), 4),
            payoff={n: round(v, 4) for n, v in metrics.items() if n.startswith(PAYOFF)},
            seconds=round(time.perf_counter() - began, 1),
            commit=commit,
        )

    def _config(self, settings: Settings) -> Config:
        return load_config(CONFIG, [*self.fixed, *settings])

    def _collect(self, prompts: Sequence[Prompt], cfg: Config) -> list[Group]:
        rules: tuple[Any, ...] = (cfg.algorithm.resets, RULES, ResetRule, cfg)
        roles = Roles(
            generator=self.run.completions,
            tokenizer=self.inputs.tokenizer,
            judge=self.run.judge,
            rule=build(*rules, self.inputs.tokenizer, key="algorithm.resets"),
        )
        with self.run.gpu.generating():
            return collect_groups(prompts, step=MANY_STEPS, roles=roles, cfg=cfg)

    def _gradient(self, groups: Sequence[Group], cfg: Config) -> Gradient:
        """Of the policy loss, as the optimizer would see it; 0 where no reward differs."""
        learner = self.run.learner
        assert isinstance(learner, MegatronLearner)
        credit = build(cfg.credit.rule, CREDITS, CreditRule, cfg, key="credit.rule")
        batch = self.run.exchange(to_samples(groups, credit, cfg))
        models: list[Any] = [*learner.models]
        buffers = [buffer for model in models for buffer in model.buffers]
        if not batch.micro_batches:
            return np.zeros(sum(buffer.grad_data.numel() for buffer in buffers))
        with self.run.gpu.training():
            learner.backward(batch)
        return torch.cat([buffer.grad_data for buffer in buffers]).double().numpy()


def tokens_of(groups: Sequence[Group], cfg: Config) -> float:
    """Generated, of all kinds."""
    sums = rollout_sums(groups, cfg)
    return sum(sums[name][0] for name in GENERATED if name in sums)


def parts(groups: Sequence[Group], num_prompts: int) -> list[list[Group]]:
    """Groups of the first so many prompts, of the next so many, ..."""
    of = {id: i for i, id in enumerate(dict.fromkeys(group.prompt.id for group in groups))}
    parts: list[list[Group]] = [[] for _ in range(-(-len(of) // num_prompts))]
    for group in groups:
        parts[of[group.prompt.id] // num_prompts].append(group)
    return parts
