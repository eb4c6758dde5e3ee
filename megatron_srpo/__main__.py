"""`megatron-srpo train | sft | eval | plan | compare | report | show | submit | convert`.

The only place that sets up a process: started plainly it is one; under torchrun or srun, many.
Its exit code is 0 or one of `exit_codes.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.environment import be_one_process_unless_launched, set_environment
from megatron_srpo.exit_codes import ALARM, REFUSED, STOPPED
from megatron_srpo.plan.hardware import GPUS
from megatron_srpo.run_folder import RunFolder
from megatron_srpo.staging import check_free
from megatron_srpo.types import AlarmError, InputError

if TYPE_CHECKING:
    from megatron_srpo.inputs import EvalInputs


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    parser = _parser()
    # Overrides may stand before or behind an option, which argparse alone does not allow.
    arguments, rest = parser.parse_known_args(argv)
    has_config = "config" in arguments
    if unknown := [word for word in rest if not has_config or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    started_with = dict(os.environ)
    set_environment()
    # Libraries' warnings go to the run's log, not between the lines of a terminal.
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())
    be_one_process_unless_launched()
    try:
        if not has_config:
            WITHOUT_CONFIG[arguments.command](arguments)
            return 0
        overrides = [*arguments.overrides, *rest]
        cfg = load_config(arguments.config, overrides)
        if arguments.command == "submit":
            _submit(arguments, cfg, overrides, started_with)
            return 0
        if arguments.command == "plan":
            _plan(arguments, cfg)
            return 0
        return _run(arguments, cfg)
    except InputError as error:
        return _stop(error, code=REFUSED)
    except AlarmError as error:
        return _stop(error, code=ALARM)


def _run(arguments: argparse.Namespace, cfg: Config) -> int:
    """Imports step by step: what the user gave is checked before the engines' long imports."""
    num_processes = int(os.environ["WORLD_SIZE"])
    if arguments.command == "sft":
        from megatron_srpo.inputs import read_sft_inputs

        demonstrations = read_sft_inputs(cfg, num_processes=num_processes)
        from megatron_srpo.sft import sft

        sft(cfg, demonstrations)
    elif arguments.command == "eval":
        _evaluate(arguments, cfg, num_processes)
    else:
        from megatron_srpo.inputs import read_inputs

        inputs = read_inputs(cfg, num_processes=num_processes, replay=arguments.replay)
        if inputs.progress.is_finished:
            if os.environ["RANK"] == "0":
                print(
                    f"run_dir={cfg.run_dir}: this run is finished; for another one name a new "
                    "folder (run_dir=PATH) or remove this one",
                    file=sys.stderr,
                )
            _leave_report(cfg, is_renewed=False)
            return 0
        from megatron_srpo.profile.profile import parse_steps

        profiled = range(0)
        if arguments.profile is not None:
            first = inputs.progress.step
            profiled = parse_steps(arguments.profile, first=first, num_steps=cfg.num_steps)
        from megatron_srpo.train import train

        if not train(cfg, inputs, replay=arguments.replay, profiled=profiled):
            return STOPPED
        _leave_report(cfg, is_renewed=True)
    return 0


def _leave_report(cfg: Config, *, is_renewed: bool) -> None:
    """Of a finished run, on its first rank; a process that was killed may have left none."""
    folder = RunFolder(cfg.run_dir)
    if os.environ["RANK"] == "0" and (is_renewed or not folder.report.exists()):
        from megatron_srpo.report.afterwards import leave_report

        leave_report(folder)


def _evaluate(arguments: argparse.Namespace, cfg: Config, num_processes: int) -> None:
    from megatron_srpo.checkpoint_folder import hf_part, read_manifest
    from megatron_srpo.inputs import read_eval_inputs

    if arguments.ckpt is not None:
        read_manifest(arguments.ckpt)  # only for what it refuses
        cfg = cfg.model_copy(update={"model": hf_part(arguments.ckpt)})
    inputs = read_eval_inputs(
        cfg, num_processes=num_processes, out=arguments.out, is_stored=arguments.ckpt is None
    )
    if arguments.show is not None:
        _show_prompts(inputs, arguments.show)
        return
    from megatron_srpo.evaluate_model import evaluate_model

    evaluate_model(cfg, inputs, out=arguments.out, checkpoint=arguments.ckpt)


def _show_prompts(inputs: EvalInputs, number: int) -> None:
    longest = max(len(held_out.prompts) for held_out in inputs.sets)
    if number > longest:
        raise InputError(f"--show {number}: the largest set has {longest} prompts")
    if os.environ["RANK"] == "0":
        for held_out in inputs.sets:
            for prompt in held_out.prompts[number - 1 : number]:
                print(f"--- {held_out.name}: {prompt.id}, {len(prompt.token_ids)} tokens")
                print(inputs.tokenizer.shown(prompt.token_ids))


def _plan(arguments: argparse.Namespace, cfg: Config) -> None:
    import json

    from megatron_srpo.plan.page import as_json, page, search_page
    from megatron_srpo.plan.search import plan, search
    from megatron_srpo.plan.setup import Setup
    from megatron_srpo.plan.shape import model_folder, read_shape

    setup = Setup(
        cfg=cfg,
        shape=read_shape(model_folder(cfg.model)),
        gpu=GPUS[arguments.gpu],
        num_gpus=arguments.search or arguments.gpus,
    )
    plans = search(setup) if arguments.search else [plan(setup)]
    if arguments.json:
        print(json.dumps([as_json(each) for each in plans]))
    else:
        print("\n".join(search_page(plans) if arguments.search else page(plans[0])))


def _compare(arguments: argparse.Namespace) -> None:
    from megatron_srpo.compare import compare

    found = compare(arguments.first, arguments.second)
    print(found.to_string(float_format=lambda value: f"{value:.4f}"))


def _report(arguments: argparse.Namespace) -> None:
    from megatron_srpo.report.page import read_report, watch, write_report

    runs: list[Path] = arguments.runs
    out: Path = arguments.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if arguments.out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: {out.parent} is no folder")
    if arguments.export is not None:
        check_free(arguments.export)
    if arguments.watch:
        report = watch(runs, out)
    else:
        report = read_report(runs)
        write_report(report, out)
    print(out)
    if arguments.export is not None:
        from megatron_srpo.report.export import export

        export(report, arguments.export)


def _show(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_srpo.report.show import show

    show(arguments.run, step=arguments.step, prompt=arguments.prompt, console=Console())


def _submit(
    arguments: argparse.Namespace, cfg: Config, overrides: list[str], environment: dict[str, str]
) -> None:
    """`environment`: the user's, which sbatch hands on to the job; not what this process made of
    it, for this machine."""
    from megatron_srpo.submit import submit

    if arguments.eval and arguments.gpu:
        raise InputError("--gpu: a plan is of training; leave it out with --eval")
    submit(
        cfg,
        [str(arguments.config), *overrides],
        command="eval" if arguments.eval else "train",
        num_nodes=arguments.nodes,
        num_jobs=arguments.chain,
        is_dry=arguments.dry_run,
        gpu=GPUS[arguments.gpu] if arguments.gpu else None,
        environment=environment,
    )


def _convert(arguments: argparse.Namespace) -> None:
    from megatron_srpo.convert import Layout, convert

    convert(
        hf=arguments.hf,
        checkpoint=arguments.ckpt,
        out=arguments.out,
        layout=Layout(tp=arguments.tp, pp=arguments.pp, ep=arguments.ep),
        dtype=arguments.dtype,
        is_verified=arguments.verify,
    )


WITHOUT_CONFIG = {"convert": _convert, "compare": _compare, "report": _report, "show": _show}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-srpo", description="Reinforcement learning with resets on Megatron-Core."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("train", "train a policy with GRPO, RRPO or SRPO"),
        ("sft", "warm-start a policy from demonstrations"),
        ("eval", "measure a policy's pass@k on held-out problems"),
        ("plan", "what a run takes of GPUs' memory and time; needs none, and no weights"),
        ("submit", "check a run, and hand it to Slurm"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("config", type=Path, help="YAML file")
        command.add_argument("overrides", nargs="*", help="section.key=value")
        if name == "train":
            command.add_argument(
                "--replay", type=Path, metavar="RUN", help="train on this run's rollouts"
            )
            command.add_argument(
                "--profile", metavar="steps=3:5", help="where the time of steps 3 and 4 goes"
            )
        if name == "eval":
            _add_evaluation(command)
        if name == "plan":
            _add_planning(command)
        if name == "submit":
            _add_submission(command)
    comparison = commands.add_parser("compare", help="two evaluations, problem by problem")
    for name in ("first", "second"):
        comparison.add_argument(name, type=Path, help="folder that eval --out made")
    _add_report(commands.add_parser("report", help="one page that shows what runs did"))
    shown = commands.add_parser("show", help="what became of a prompt, in the terminal")
    shown.add_argument("run", type=Path, help="run folder")
    shown.add_argument("--step", type=int, help="from 0; the last one if not given")
    shown.add_argument("--prompt", metavar="K", help="id, or place in the step from 1; else a list")
    _add_conversion(commands.add_parser("convert", help="Hugging Face <-> Megatron checkpoint"))
    return parser


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the run's folder, or here"
    )
    command.add_argument("--watch", action="store_true", help="again and again, until runs end")
    command.add_argument(
        "--export", type=Path, metavar="DIR", help="also PNG, SVG and CSV, in a new folder"
    )


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="write tables and every response to a new folder"
    )
    command.add_argument(
        "--ckpt", type=Path, metavar="DIR", help="a run's or a converted checkpoint, not `model`"
    )
    command.add_argument(
        "--show", type=_size, metavar="N", help="print each set's N-th prompt as the policy sees it"
    )


def _add_planning(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpus", type=_size, default=8, metavar="N", help="default: 8")
    command.add_argument("--gpu", choices=GPUS, default="h100")
    command.add_argument(
        "--search", type=_size, metavar="GPUS", help="rank the layouts of so many that fit"
    )
    command.add_argument("--json", action="store_true", help="a list of plans, in bytes")


def _add_submission(command: argparse.ArgumentParser) -> None:
    command.add_argument("--eval", action="store_true", help="evaluate instead of train")
    command.add_argument("--nodes", type=_size, default=1)
    command.add_argument(
        "--chain", type=_size, default=1, metavar="JOBS", help="so many, one after the other"
    )
    command.add_argument("--gpu", choices=GPUS, help="of the nodes: says what the plan says of it")
    command.add_argument("--dry-run", action="store_true", help="print what would be submitted")


def _add_conversion(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face folder to convert")
    source.add_argument("--ckpt", type=Path, metavar="DIR", help="checkpoint to convert back")
    command.add_argument("--out", type=Path, metavar="DIR", required=True, help="new folder")
    for name in ("tp", "pp", "ep"):
        command.add_argument(
            f"--{name}", type=_size, default=1, help="divides a checkpoint's files; loads on any"
        )
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the stored")
    command.add_argument("--verify", action="store_true", help="compare logits with transformers")


def _size(word: str) -> int:
    if not word.isdigit() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no positive number")
    return int(word)


def _stop(error: Exception, *, code: int) -> int:
    if os.environ.get("RANK", "0") == "0" or code == ALARM:
        print(f"megatron-srpo: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
