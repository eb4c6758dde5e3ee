"""Peak memory of converting wide models: plan and measurement, each conversion in its own process.

    python tools/bench_convert.py FOLDER [--model NAME] [--layers N] [--shard-bytes N]

Random bf16 weights of the model's widths and few layers are written to FOLDER (a new one; removed
at the end), converted to a checkpoint, back, and compared byte by byte. Prints one JSON object.
Resident memory counts the pages of the files that are mapped. The plan: the largest layer (or
tensor in none), one shard, and a constant: what the process of a tiny model takes, and 0.25 GiB for
pieces in flight and for what the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

WIDTHS = {  # model type, hidden, ffn, heads, key-value heads, vocabulary
    "tiny": ("qwen2", 64, 96, 4, 2, 128),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 40, 8, 152064),
    "olmo-3-7b": ("olmo3", 4096, 11008, 32, 32, 100278),
}
GIB = 2**30
ALLOWANCE_GIB = 0.25


def write_random(folder: Path, name: str, num_layers: int, shard_bytes: int) -> None:
    """A Hugging Face folder, a shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    model_type, hidden, ffn, num_heads, num_kv_heads, vocab_size = WIDTHS[name]
    config = AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = [type(_meta(AutoModelForCausalLM, config)).__name__]
    config.save_pretrained(folder)
    shapes = {n: p.shape for n, p in _meta(AutoModelForCausalLM, config).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for tensor, shape in shapes.items():
        if size and size + 2 * shape.numel() > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += 2 * shape.numel()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(std=0.02) for n in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _meta(of, config):
    import torch

    with torch.device("meta"):
        return of.from_config(config)


def convert(source: Path, out: Path, shard_bytes: int) -> None:
    """One direction or the other, by what `source` is."""
    from megatron_srpo.environment import be_one_process_unless_launched, set_environment

    set_environment()
    be_one_process_unless_launched()
    from megatron_srpo.convert import Layout, hf_to_megatron, megatron_to_hf
    from megatron_srpo.engines.megatron.mesh import build_mesh, destroy_mesh

    mesh = build_mesh()
    if (source / "config.json").is_file():
        hf_to_megatron(source, out, mesh, layout=Layout(tp=2))
    else:
        megatron_to_hf(source, out, mesh, max_shard_bytes=shard_bytes)
    destroy_mesh()


def same(one: Path, other: Path) -> bool:
    """Every tensor's bytes, and config.json's."""
    import torch

    from megatron_srpo.hf_folder import read_finite, stored_tensors

    mine, theirs = stored_tensors(one), stored_tensors(other)
    return (
        mine.keys() == theirs.keys()
        and (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
        and all(
            mine[n].dtype == theirs[n].dtype
            and torch.equal(
                read_finite(mine, n).view(torch.int16), read_finite(theirs, n).view(torch.int16)
            )
            for n in mine
        )
    )


def measured(*arguments: object) -> tuple[float, float]:
    """(peak GiB, seconds) of this file as a process with these arguments."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments}: ended with {status}")
    return usage.ru_maxrss * 1024 / GIB, time.perf_counter() - began


def largest_gib(folder: Path) -> float:
    """Of the layers and of the tensors in none."""
    from megatron_srpo.hf_folder import stored_tensors

    sizes: dict[str, float] = defaultdict(float)
    for name, tensor in stored_tensors(folder).items():
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else name
        num = 1
        for length in tensor.shape:
            num *= length
        sizes[layer] += 2 * num / GIB
    return max(sizes.values())


def round_trip(folder: Path, name: str, num_layers: int, shard_bytes: int) -> dict[str, float]:
    """Folder -> checkpoint -> folder; removes what it wrote."""
    folder.mkdir(parents=True)
    hf, checkpoint, back = folder / "hf", folder / "checkpoint", folder / "back"
    measured("--write", hf, "--model", name, "--layers", num_layers, "--shard-bytes", shard_bytes)
    forth_gib, forth_s = measured("--convert", hf, checkpoint)
    back_gib, back_s = measured("--convert", checkpoint, back, "--shard-bytes", shard_bytes)
    numbers = {
        "weights_gib": sum(f.stat().st_size for f in hf.glob("*.safetensors")) / GIB,
        "largest_shard_gib": max(f.stat().st_size for f in hf.glob("*.safetensors")) / GIB,
        "largest_layer_gib": largest_gib(hf),
        "to_megatron_peak_gib": forth_gib,
        "to_megatron_s": forth_s,
        "to_hf_peak_gib": back_gib,
        "to_hf_s": back_s,
        "byte_identical": same(hf, back),
    }
    shutil.rmtree(folder)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model", choices=WIDTHS, default="qwen2.5-14b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shard-bytes", type=int, default=2 * 10**9)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_random(arguments.write, arguments.model, arguments.layers, arguments.shard_bytes)
        return
    if arguments.convert:
        source, out = arguments.convert
        convert(source, out, arguments.shard_bytes)
        return
    constant = round_trip(arguments.folder, "tiny", 2, arguments.shard_bytes)
    numbers = round_trip(arguments.folder, arguments.model, arguments.layers, arguments.shard_bytes)
    layer = numbers["largest_layer_gib"]
    shard = max(arguments.shard_bytes / GIB, numbers["largest_shard_gib"])
    fixed = max(constant["to_megatron_peak_gib"], constant["to_hf_peak_gib"]) + ALLOWANCE_GIB
    planned = {"constant_gib": fixed, "planned_gib": layer + shard + fixed}
    print(json.dumps({"model": arguments.model, "layers": arguments.layers} | numbers | planned))


if __name__ == "__main__":
    main()
