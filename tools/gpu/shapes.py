"""Part `shapes`: layers as wide as a 7B's and a 14B's, 8 of them: time, memory, sync, seeding"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_srpo.protocols import NamedTensors
from tools.gpu.apart import run_apart
from tools.gpu.cycle import of_last_step, overhead
from tools.gpu.result import NotRun, Numbers, Result, not_run, run_check
from tools.gpu.timing import measure
from tools.gpu.world import World, config_of

Task = tuple[str, Callable[[], list[Result]]]
QWEN: dict[str, Any] = {"vocab_size": 152_064, "max_position_embeddings": 32_768}
WIDTHS: dict[str, dict[str, Any]] = {
    "7B": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
       "num_key_value_heads": 4},
    "14B": QWEN
    | {"hidden_size": 5120, "intermediate_size": 13_824, "num_attention_heads": 40,
       "num_key_value_heads": 8},
}  # fmt: skip
"""Qwen2.5's."""
SMOKE = {
    "vocab_size": 512, "max_position_embeddings": 256, "hidden_size": 128,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FP8 = ["fp8.recipe=blockwise", "backend=transformer_engine"]
OVERHEAD, FLOORS, FP8_SHARE = 0.03, 2.0, 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_sequences: int
    prompt: int
    response: int
    num_layers: int

    def overrides(self) -> list[str]:
        longest = self.prompt + self.response
        return [
            f"rollout.max_response_tokens={self.response}",
            f"rollout.max_model_len={longest + 128}",
            f"rollout.max_num_seqs={self.num_sequences}",
            f"data.max_prompt_tokens={min(self.prompt, 100)}",
        ]


FULL = Load(num_sequences=128, prompt=256, response=512, num_layers=8)
SMALL = Load(num_sequences=4, prompt=32, response=16, num_layers=2)


def tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    train_s: dict[str, float] = {}
    if device.type == "cpu":
        yield "smoke", partial(measured, "smoke", "smoke", [], deadline, train_s)
    for width in WIDTHS:
        for kind, overrides in {"bf16": [], "FP8": FP8}.items():
            name = f"{width} widths, {kind}"
            if device.type == "cpu":
                yield name, lambda name=name: [not_run(name, "no GPU")]
            else:
                yield name, partial(measured, name, width, overrides, deadline, train_s)
    for width in WIDTHS:
        name = f"{width} widths, FP8 against bf16"
        yield name, lambda name=name, width=width: [run_check(name, partial(share, width, train_s))]


def measured(
    name: str, width: str, overrides: list[str], deadline: float, train_s: dict[str, float]
) -> list[Result]:
    """Notes how long training took."""
    given = {"name": name, "width": width, "overrides": overrides}
    results = run_apart(name, "tools.gpu.shapes:steps", given, deadline)
    for result in results:
        if "time/train_s" in result.numbers:
            train_s[name] = result.numbers["time/train_s"]
    return results


def share(width: str, train_s: dict[str, float]) -> tuple[Numbers, Numbers]:
    """Of a training phase in bf16, that one in FP8 takes."""
    both = [f"{width} widths, {kind}" for kind in ("FP8", "bf16")]
    if absent := [name for name in both if name not in train_s]:
        raise NotRun(f"no time of {absent[0]}")
    return {"share": train_s[both[0]] / train_s[both[1]]}, {"share": FP8_SHARE}


def steps(name: str, width: str, overrides: list[str]) -> list[Result]:
    """Three steps; the last is measured. Then three whose requests have no seeds."""
    is_gpu = torch.cuda.is_available()
    load = FULL if is_gpu else SMALL
    folder = random_model(WIDTHS.get(width, SMOKE), load.num_layers)
    gpu_only = ["dtype=bfloat16", f"rollout.kv_cache_bytes={8 * 2**30}"] if is_gpu else []
    bound = "max_logprob_diff=1" if is_gpu else "max_logprob_diff=1e-4"
    cfg = config_of(folder, *gpu_only, bound, *load.overrides(), *overrides)
    world = World.build(cfg)
    loads = Loads(world)
    row = several(world, load, 0)
    planned = {f"plan/{phase}_gib": gib for phase, gib in world.gpu.planned_gib.items()}
    found = [run_check(f"{name}: a step", partial(of_step, row | planned))]
    found.append(run_check(f"{name}: sync", partial(of_sync, loads.last_s, world)))
    world.engine.seeding = "engine"
    other = several(world, load, 10)
    speeds = {
        f"{seeding}_tokens_per_s": each["tokens/generated"] / each["time/generate_s"]
        for seeding, each in (("request", row), ("engine", other))
    }
    found.append(run_check(f"{name}: seeding", lambda: (speeds, {})))
    return found


def several(world: World, load: Load, first: int) -> dict[str, float]:
    """The last of three steps."""
    row: dict[str, float] = {}
    for step in range(first, first + 3):
        requests = world.requests(
            load.num_sequences, prompt=load.prompt, response=load.response, step=step
        )
        world.gpu.stopwatch.take()
        row = world.step(requests, step)
    return row


class Loads:
    """How long the engine took over the last stream of weights, gathering included."""

    def __init__(self, world: World) -> None:
        self.last_s, self._load = 0.0, world.engine.load_weights
        world.engine.load_weights = self._timed  # type: ignore[method-assign]

    def _timed(self, named_tensors: NamedTensors, *, version: int) -> None:
        start = time.perf_counter()
        self._load(named_tensors, version=version)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.last_s = time.perf_counter() - start


def of_step(row: dict[str, float]) -> tuple[Numbers, Numbers]:
    """Phases, tokens a second, memory, and what is none of the work."""
    planned = {name: gib for name, gib in row.items() if name.startswith("plan/")}
    numbers = (
        of_last_step(row)
        | planned
        | {
            "generate_tokens_per_s": row["tokens/generated"] / row["time/generate_s"],
            "train_tokens_per_s": row["tokens/all"] / row["time/train_s"],
            "overhead": overhead(row),
        }
    )
    return numbers, {"overhead": OVERHEAD} if torch.cuda.is_available() else {}


def of_sync(seconds: float, world: World) -> tuple[Numbers, Numbers]:
    """Against a copy of as many bytes on the device."""
    num_bytes = world.engine.weight_bytes
    if not torch.cuda.is_available():
        return {"load_s": seconds, "bytes": float(num_bytes)}, {}
    some = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copy_s = measure({"copy": some.clone})["copy"].median_ms / 1e3
    floor_s = num_bytes / 2**28 * copy_s
    numbers = {"load_s": seconds, "floor_s": floor_s, "floors": seconds / floor_s}
    return numbers, {"floors": FLOORS}


def random_model(shape: dict[str, Any], num_layers: int) -> Path:
    """As transformers initializes it, in bf16 on a GPU."""
    folder = Path(tempfile.mkdtemp())
    is_gpu = torch.cuda.is_available()
    config = AutoConfig.for_model(
        "qwen2", **shape, num_hidden_layers=num_layers, tie_word_embeddings=False,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda" if is_gpu else "cpu"):
        dtype = torch.bfloat16 if is_gpu else torch.float32
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    torch.cuda.empty_cache()
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The engine reads one; nobody speaks with it."""
    from tests.tiny import write_policy

    other = write_policy(Path(tempfile.mkdtemp()), seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((other / name).read_bytes())
