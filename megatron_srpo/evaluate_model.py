"""How good is the policy in a Hugging Face folder?   config -> metrics, and every response

The rollout engine alone: no trainer is built, no run folder is looked at. Every replica evaluates
its share of the problems.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.engines.megatron.mesh import destroy_mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.evaluate import Attempt, attempt_sums, evaluate, pass_at
from megatron_srpo.inputs import EvalInputs
from megatron_srpo.metrics import combine
from megatron_srpo.preflight import checked_mesh
from megatron_srpo.replica import MOST_LINES, LeaderJudge


def evaluate_model(cfg: Config, inputs: EvalInputs, out: Path | None = None) -> None:
    """Prints one line of JSON, and one for people on stderr; writes every response to `out`."""
    mesh = checked_mesh(rollout_tp=cfg.rollout.tp)
    engine = VllmGenerator(cfg.model, cfg.rollout, dtype=cfg.dtype)
    share = evaluate(
        inputs.held_out[mesh.replica :: mesh.num_replicas],
        generator=engine,
        tokenizer=inputs.tokenizer,
        judge=LeaderJudge(inner=inputs.judge, mesh=mesh),
        cfg=cfg,
    )
    # Nobody leaves while another still works; the ranks of a replica hold the same attempts.
    shares = mesh.gather(share if mesh.is_leader else [])
    engine.close()
    destroy_mesh()
    if mesh.rank == 0:
        # In the order of the problems, whatever the number of replicas: same sums, same bytes.
        order = {prompt.id: position for position, prompt in enumerate(inputs.held_out)}
        attempts = [attempt for share in shares for attempt in share]
        attempts.sort(key=lambda attempt: (order[attempt.prompt_id], attempt.index))
        if out is not None:
            _write(attempts, out)
        metrics = _metrics(attempts, cfg)
        failed = {a.prompt_id: a.score.failure for a in attempts if a.score.failure is not None}
        for prompt_id, failure in [*failed.items()][:MOST_LINES]:
            print(f"the reward of prompt {prompt_id!r} failed: {failure}", file=sys.stderr)
        print(summary(metrics, cfg, num_dropped=len(inputs.dropped)), file=sys.stderr)
        print(json.dumps({"model": str(cfg.model), **metrics}))


def _metrics(attempts: Sequence[Attempt], cfg: Config) -> dict[str, float]:
    """As in training, the standard error of each pass@k over problems, and how many there were."""
    name = f"eval/{cfg.data.eval.stem}"
    metrics = combine([attempt_sums(attempts, cfg)])
    for k in cfg.eval.pass_at:
        chances = pass_at(k, attempts)
        if len(chances) > 1:  # the spread of one problem is not known
            error = np.std(chances, ddof=1) / np.sqrt(len(chances))
            metrics[f"{name}/pass_at_{k}_stderr"] = float(error)
    num_problems = len({attempt.prompt_id for attempt in attempts})
    return {f"{name}/num_problems": num_problems, f"{name}/num_responses": len(attempts), **metrics}


def summary(metrics: dict[str, float], cfg: Config, *, num_dropped: int) -> str:
    """The metrics in one line for people."""
    of = {name.rpartition("/")[2]: value for name, value in metrics.items()}
    words = [
        f"{cfg.data.eval.stem}: {of['num_problems']} problems x {cfg.eval.num_samples}",
        *(
            f"pass@{k} {of[f'pass_at_{k}']:.3f} +- {of.get(f'pass_at_{k}_stderr', np.nan):.3f}"
            for k in cfg.eval.pass_at
            if f"pass_at_{k}" in of
        ),
        f"{of['response_tokens_mean']:.0f} tokens",
        f"truncated {of['truncated_rate']:.1%}",
    ]
    if of["failure_rate"]:
        words.append(f"reward failed {of['failure_rate']:.1%}")
    if num_dropped:
        words.append(f"left out {num_dropped} prompts of more than {cfg.data.max_prompt_tokens}")
    return "   ".join(words)


def _write(attempts: Sequence[Attempt], out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    lines = (json.dumps(asdict(attempt), ensure_ascii=False) + "\n" for attempt in attempts)
    partial.write_text("".join(lines), "utf-8")
    partial.rename(out)
