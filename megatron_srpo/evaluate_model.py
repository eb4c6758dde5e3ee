"""How good is the policy in a folder or checkpoint?   config -> table, and every response

The rollout engine alone: no trainer is built, no run folder is looked at. Every replica evaluates
its share of the problems.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config
from megatron_srpo.engines.megatron.mesh import Mesh, destroy_mesh
from megatron_srpo.engines.vllm.generator import VllmGenerator
from megatron_srpo.environment import unlaunched
from megatron_srpo.eval_table import MEAN, shown, table, write_tables
from megatron_srpo.evaluate import CONFIG, RESPONSES, Attempt, evaluate
from megatron_srpo.inputs import EvalInputs
from megatron_srpo.preflight import checked_mesh
from megatron_srpo.replica import MOST_LINES, LeaderJudge
from megatron_srpo.staging import staged_folder
from megatron_srpo.types import InputError


def evaluate_model(
    cfg: Config, inputs: EvalInputs, *, out: Path | None = None, checkpoint: Path | None = None
) -> None:
    """Prints one line of JSON, and a table for people on stderr; writes both and every response to
    the folder `out`. With a `checkpoint`, its weights; `cfg.model` is then its Hugging Face part.
    """
    mesh = checked_mesh(rollout_tp=cfg.rollout.tp)
    with contextlib.ExitStack() as stack:
        is_first = mesh.rank == 0
        # Made before anything is generated: what cannot be written is known now.
        folder = stack.enter_context(staged_folder(out)) if out is not None and is_first else None
        converted = stack.enter_context(_folder_of(checkpoint, mesh))
        shares = mesh.gather(_generated(cfg, inputs, mesh, converted or cfg.model))
        destroy_mesh()
        if is_first:
            attempts = _in_order([attempt for share in shares for attempt in share], inputs)
            found = table(attempts, cfg)
            _tell(attempts, found, inputs, cfg)
            print(json.dumps({"model": str(checkpoint or cfg.model), **metrics(found)}), flush=True)
            if folder is not None:
                _write(attempts, found, inputs, cfg, folder)


def _generated(cfg: Config, inputs: EvalInputs, mesh: Mesh, model: Path) -> list[Attempt]:
    """This replica's, on its leader: all its ranks hold the same."""
    engine = VllmGenerator(model, cfg.rollout, dtype=cfg.dtype, is_fp8=cfg.fp8.rollout)
    share: list[Attempt] = []
    for held_out in inputs.sets:
        share += evaluate(
            held_out.share(mesh.replica, mesh.num_replicas),
            generator=engine,
            tokenizer=inputs.tokenizer,
            judge=LeaderJudge(inner=held_out.judge, mesh=mesh),
            cfg=cfg,
        )
    engine.close()
    for held_out in inputs.sets:
        held_out.judge.close()
    return share if mesh.is_leader else []


def _in_order(attempts: list[Attempt], inputs: EvalInputs) -> list[Attempt]:
    """Of sets and problems, whatever the number of replicas: same sums, same bytes."""
    places = [(each.name, prompt.id) for each in inputs.sets for prompt in each.prompts]
    order = {place: position for position, place in enumerate(places)}
    return sorted(attempts, key=lambda attempt: order[attempt.set, attempt.prompt_id])


def metrics(found: pd.DataFrame) -> dict[str, float]:
    """`eval/<set>/<metric>`, as in training, for every number that there is."""
    return {
        f"eval/{name}/{metric}": int(value) if metric.startswith("num_") else value
        for name, row in found.to_dict(orient="index").items()
        for metric, value in row.items()
        if name != MEAN and not pd.isna(value)
    }


def _tell(
    attempts: Sequence[Attempt], found: pd.DataFrame, inputs: EvalInputs, cfg: Config
) -> None:
    lines = [*dict.fromkeys(note for each in inputs.sets for note in each.judge.notes)]
    failed = {
        (a.set, a.prompt_id): a.score.failure for a in attempts if a.score.failure is not None
    }
    lines += [
        f"{name}: the reward of prompt {id!r} failed: {failure}"
        for (name, id), failure in [*failed.items()][:MOST_LINES]
    ]
    lines.append(shown(found).to_string(index=False))
    if inputs.dropped:
        longest = cfg.data.max_prompt_tokens
        lines.append(f"left out {len(inputs.dropped)} prompts of more than {longest} tokens")
    print("\n".join(lines), file=sys.stderr)


@contextlib.contextmanager
def _folder_of(checkpoint: Path | None, mesh: Mesh) -> Iterator[Path | None]:
    """The checkpoint as a Hugging Face folder beside it, where all nodes see it, until the end.
    None without one. Raises `InputError` on every rank if it cannot be converted."""
    if checkpoint is None:
        yield None
        return
    # A time limit of Slurm's: what is in the way of others goes then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name = mesh.gather(f"{checkpoint.name}.{secrets.token_hex(4)}.hf")[0]
    folder = checkpoint.absolute().with_name(name)
    try:
        refusal = _converted(checkpoint, folder) if mesh.rank == 0 else ""
        if refusal := mesh.gather(refusal)[0]:
            raise InputError(refusal)
        yield folder
    finally:
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _converted(checkpoint: Path, folder: Path) -> str:
    """What the command says that cannot convert it. A process of its own: it is one alone, and its
    memory is free again."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_srpo", "convert", "--ckpt", checkpoint, "--out", folder],
        env=unlaunched(),
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.returncode:
        return ""
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return last.removeprefix("megatron-srpo: error: ")


def _write(
    attempts: Sequence[Attempt], found: pd.DataFrame, inputs: EvalInputs, cfg: Config, folder: Path
) -> None:
    digests = {(each.name, p.id): p.digest for each in inputs.sets for p in each.prompts}
    with (folder / RESPONSES).open("w", encoding="utf-8") as file:
        for attempt in attempts:
            row = asdict(attempt) | {"problem": digests[attempt.set, attempt.prompt_id]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / CONFIG).write_text(dump_config(cfg), "utf-8")
    write_tables(found, folder)
