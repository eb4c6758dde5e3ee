"""What `megatron-srpo plan` says, against published sizes and numbers worked out by hand."""

from __future__ import annotations

import heapq
import json
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_srpo.__main__ import main
from megatron_srpo.config_file import load_config
from megatron_srpo.config_sections import ParallelConfig
from megatron_srpo.memory import LESS
from megatron_srpo.plan.compute import generation_s, layer_traffic_s, plan_step
from megatron_srpo.plan.hardware import (
    ENGINE_STEP_S,
    GPUS,
    OVERHEAD_BYTES,
    PUBLISHED,
    TRAIN_SHARE,
    known,
)
from megatron_srpo.plan.memory import (
    GIB,
    PhaseMemory,
    activation_bytes,
    plan_memory,
    planned_gib,
)
from megatron_srpo.plan.parameters import active_weights, counts_of, rollout_weights
from megatron_srpo.plan.search import check_state, fits, plan, search, verdict
from megatron_srpo.plan.setup import Setup, setup_here
from megatron_srpo.plan.shape import SHAPES, Shape, model_folder, read_shape
from megatron_srpo.plan.tokens import Stage, step_tokens
from megatron_srpo.types import InputError

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = [
    (path, command)
    for path in sorted(EXAMPLES.glob("*.yaml"))
    for command in re.findall(r"^#   plan +megatron-srpo (.*)$", path.read_text(), re.MULTILINE)
]
BIG = EXAMPLES / "qwen2.5_14b_8xh200.yaml"


def setup(*overrides: str, gpu: str = "h200", num_gpus: int = 8) -> Setup:
    """Of the 14B example."""
    cfg = load_config(BIG, overrides)
    shape = read_shape(model_folder(cfg.model))
    return Setup(cfg=cfg, shape=shape, gpu=GPUS[gpu], num_gpus=num_gpus)


def of(phase: str, memory: tuple[PhaseMemory, ...]) -> PhaseMemory:
    return next(each for each in memory if each.phase == phase)


# --- examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=lambda value: Path(value).stem)
def test_an_example_s_header_says_what_the_plan_says(
    path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    assert main(shlex.split(command)) == 0
    said = capsys.readouterr().out.splitlines()
    memory, hours = (line for line in said if line.startswith(("memory  ", "hours  ")))
    assert f"{command}\n#   {memory}\n#   {hours}\n" in path.read_text()


def test_every_example_for_gpus_has_a_plan() -> None:
    planned = {path for path, _ in COMMANDS}
    for path in EXAMPLES.glob("*.yaml"):
        cfg = load_config(path)
        assert path in planned or cfg.dtype == "float32" or path.stem == "benchmarks", path


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen3-32B", 32_762_123_264),
        ("Olmo-3-7B-Instruct", 7_298_011_136),
    ],
)
def test_all_parameters_together_are_the_published_number(name: str, published: int) -> None:
    shape = read_shape(SHAPES / name)
    padding = 2 * (shape.vocab - shape.model["vocab_size"]) * shape.hidden
    assert counts_of(shape, ParallelConfig(), 0).total - padding == published
    assert rollout_weights(shape, 1)[0] - padding == published


def test_ranks_and_stages_hold_all_parameters_once_but_for_norms_and_biases() -> None:
    shape = read_shape(SHAPES / "Qwen3-32B")
    whole = counts_of(shape, ParallelConfig(), 0)
    stages = [counts_of(shape, ParallelConfig(tp=4, pp=2, vpp=2), n) for n in range(2)]
    norms = 64 * (2 * 5120 + 2 * 128) + 5120
    assert 4 * sum(each.total for each in stages) == whole.total + 3 * norms
    assert 4 * sum(each.linear for each in stages) == whole.linear


def test_a_model_that_is_not_there_is_known_by_its_name_and_its_own_config_comes_first(
    tmp_path: Path,
) -> None:
    assert model_folder(tmp_path / "Qwen3-32B") == SHAPES / "Qwen3-32B"
    (tmp_path / "Qwen3-32B").mkdir()
    assert model_folder(tmp_path / "Qwen3-32B") == tmp_path / "Qwen3-32B"
    assert model_folder(tmp_path / "other") == tmp_path / "other"


# --- memory --------------------------------------------------------------------------------------


def test_memory_of_a_small_model_is_what_a_hand_computes() -> None:
    """2 layers, hidden 8, 2 heads of 4, MLP 16, vocabulary 128, on one GPU, no recomputation."""
    shape = Shape(
        model={}, num_layers=2, hidden=8, num_heads=2, num_kv_heads=1, head_size=4, ffn=16,
        vocab=128, is_tied=True, qkv_bias=True, qk_norm="head", num_experts=0, top_k=0,
        expert_ffn=0, expert_layers=frozenset(), windows=[None, None],
    )  # fmt: skip
    small = replace(
        setup("micro_batch_tokens=100", "data.max_prompt_tokens=4",
              "rollout.max_response_tokens=256", "parallel.tp=1", "rollout.tp=1"),
        shape=shape, num_gpus=1,
    )  # fmt: skip
    linear = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    number = linear + 2 * (2 * 8 + 16 + 2 * 4) + 8 + 128 * 8
    train = of("train", plan_memory(small))
    assert (train.weights, train.gradients, train.optimizer) == (
        2 * number,
        4 * number,
        12 * number,
    )
    # Longer than a micro-batch is the longest sequence: 260 tokens.
    layer = 2 * ((2 * 8) + (8 + 8) + (8 + 4) + 8 + (2 * 8) + 3 * 16) + 4 * 2
    assert train.activations == 260 * (2 * layer + 2 * (2 * 8 + 4 * 16))
    assert train.head == 260 * 8 * 8 + 260 * 128 * 6 + 128 * 8 * 2
    generate = of("generate", plan_memory(small))
    assert generate.rollout_weights == 2 * number
    assert generate.kv_cache == small.cfg.rollout.kv_cache_bytes
    assert generate.host == train.optimizer
    assert generate.total == sum(
        (2 * number, 2 * number, generate.kv_cache, generate.workspace, OVERHEAD_BYTES)
    )
    checkpoint = of("checkpoint", plan_memory(small))
    assert checkpoint.workspace == 8 * number and checkpoint.host == (12 + 2) * number
    assert checkpoint.total == (2 + 4 + 12 + 8) * number + OVERHEAD_BYTES


def test_what_layouts_share_is_divided_and_nothing_else() -> None:
    one, four = (of("train", plan_memory(setup(f"parallel.tp={tp}"))) for tp in (1, 4))
    assert four.weights == pytest.approx(one.weights / 4, rel=1e-3)
    assert four.gradients == pytest.approx(one.gradients / 4, rel=1e-3)
    # A copy of the policy has four times as many ranks: a quarter as many copies share its state.
    assert four.optimizer == pytest.approx(one.optimizer, rel=1e-3)
    pair = of("train", plan_memory(setup("parallel.tp=4", "parallel.cp=2")))
    assert pair.optimizer == four.optimizer
    assert pair.activations == four.activations / 2
    wide = of("generate", plan_memory(setup("rollout.tp=8")))
    narrow = of("generate", plan_memory(setup("rollout.tp=1")))
    assert wide.rollout_weights == pytest.approx(narrow.rollout_weights / 8, rel=1e-3)


def test_the_first_stage_of_a_pipeline_holds_most_micro_batches() -> None:
    layout = setup("parallel.tp=1", "parallel.pp=4")
    first, last = (activation_bytes(layout, stage) for stage in (0, 3))
    around = activation_bytes(setup("parallel.tp=1", "parallel.pp=1"), 0) / 48
    assert first / last == pytest.approx(4, abs=0.2) and around < last
    # Interleaved: 2 (4 - 0 - 1) + (2 - 1) 4 + 1 = 11 chunks of 6 layers against 4 of 12.
    chunks = activation_bytes(setup("parallel.tp=1", "parallel.pp=4", "parallel.vpp=2"), 0)
    assert chunks / first == pytest.approx(11 * 6 / (4 * 12), rel=0.01)


def test_recomputation_keeps_a_layer_s_input() -> None:
    kept, again = (
        of("train", plan_memory(setup(f"parallel.recompute={what}"))).activations
        for what in ("none", "full")
    )
    tokens, per_layer = 8192, 2 * 5120 // 2
    assert again < kept / 9
    assert again > tokens * 48 * per_layer


def test_eight_bits_are_copies_until_nothing_else_is_kept() -> None:
    bf16 = setup()
    linear = counts_of(bf16.shape, bf16.cfg.parallel, 0).linear
    copies = setup("fp8.recipe=blockwise", "fp8.rollout=true")
    alone = setup("fp8.recipe=blockwise", "fp8.param_gather=true")
    weights = [of("train", plan_memory(each)).weights for each in (bf16, copies, alone)]
    assert weights[1] - weights[0] == 2 * linear and weights[2] == weights[0]
    sampled = [of("generate", plan_memory(each)).rollout_weights for each in (bf16, copies)]
    assert sampled[0] - sampled[1] == rollout_weights(bf16.shape, 4)[1]
    assert plan_step(copies).train.seconds < plan_step(bf16).train.seconds
    ends = setup("fp8.recipe=blockwise", "fp8.first_last_bf16=6")  # 12 of 48 layers
    assert of("train", plan_memory(ends)).weights - weights[0] == 2 * linear * 3 / 4


# --- time ----------------------------------------------------------------------------------------


def test_tokens_of_a_step_are_counted_by_hand() -> None:
    """4 of 5 prompts have a failed rollout among 4: 0, 1, 2, 3 and 4 are equally likely."""
    tokens = step_tokens(setup().cfg)
    base, localize, suffix = tokens.stages
    found = 64 * 0.8
    assert (base.num, localize.num, suffix.num) == (64 * 4, found, 64 * 4)
    assert base.num_generated == 256 * 2048
    assert suffix.num_generated == 4 * (found * 1024 + (64 - found) * 2048)
    assert localize.num_generated == found * 512 and localize.read == 512 + 2048
    assert tokens.trained == 64 * 8 * (512 + 2048)
    assert tokens.wanted == 512 * 2048 - 4 * found * 1024


def test_training_is_six_flops_a_weight_and_token_and_what_attention_adds() -> None:
    planned = setup("algorithm.resets=none")
    linear = active_weights(planned.shape, range(48))
    tokens, wanted = 512 * 2560, 512 * 2048
    attention = 48 * 4 * (2560 / 2) * 5120
    head = 152064 * 5120
    flops = tokens * (6 * linear + 3 * attention) + wanted * 6 * head
    step = plan_step(planned)
    assert step.train.flops == pytest.approx(flops, rel=1e-9)
    assert step.train.mfu < TRAIN_SHARE


def test_a_window_bounds_what_attention_adds() -> None:
    shape = read_shape(SHAPES / "Olmo-3-7B-Instruct")
    short = replace(setup("rollout.max_response_tokens=1000"), shape=shape)
    long = replace(short, cfg=load_config(BIG, ["rollout.max_model_len=40000",
                                                "rollout.max_response_tokens=30000"]))  # fmt: skip
    everywhere = replace(shape, windows=[None] * 32)
    assert plan_step(short) == plan_step(replace(short, shape=everywhere))
    assert plan_step(long).train.flops < plan_step(replace(long, shape=everywhere)).train.flops


def test_a_pipeline_waits_while_it_fills() -> None:
    step = plan_step(setup("parallel.tp=1", "parallel.pp=4", "parallel.vpp=1"))
    count = step.train.num_micro_batches
    assert count == 1_310_720 / 2 / 8192
    assert step.train.bubble == pytest.approx(3 / (count + 3))
    halved = plan_step(setup("parallel.tp=1", "parallel.pp=4", "parallel.vpp=2"))
    assert halved.train.bubble == pytest.approx(1.5 / (count + 1.5))


def test_recomputation_and_several_updates_cost_time_and_no_useful_flops() -> None:
    plain = plan_step(setup()).train
    again = plan_step(setup("parallel.recompute=full")).train
    assert again.flops == plain.flops
    assert again.seconds / plain.seconds == pytest.approx(4 / 3, rel=0.05)
    four = plan_step(setup("loss.updates_per_batch=4")).train
    assert four.flops / plain.flops == pytest.approx(1 + 0.75 / 3)


def test_decoding_lasts_as_long_as_the_longest_answer_and_as_the_cache_is_small() -> None:
    planned = setup()
    few = Stage(name="base", num=8, context=512, read=0, generated=2048, longest=4096)
    assert generation_s(planned, replace(few, longest=8192)) == pytest.approx(
        2 * generation_s(planned, few), rel=0.02
    )
    many = replace(few, num=10_000)
    small = setup("rollout.kv_cache_bytes=4294967296")
    assert generation_s(small, many) > 2 * generation_s(planned, many)


@pytest.mark.parametrize("num", [1, 8, 32, 40, 64, 100, 400])
def test_answers_of_evenly_spread_lengths_take_as_many_steps_as_when_each_waits_for_a_place(
    num: int,
) -> None:
    """Steps are all that a time is made of where nothing is read or multiplied."""
    cfg = setup("rollout.max_num_seqs=32", "rollout.tp=1").cfg
    endless = replace(GPUS["h200"], memory_rate=1e30, bf16_flops=1e30)
    planned = replace(setup(gpu="h200"), cfg=cfg, gpu=endless, num_gpus=1)
    stage = Stage(name="base", num=num, context=0, read=0, generated=500, longest=1000)
    drawn = random.Random(num)
    ends: list[float] = []
    for _ in range(300):
        places = [0.0] * 32
        for _ in range(num):
            heapq.heapreplace(places, places[0] + drawn.uniform(0, 1000))
        ends.append(max(places))
    assert generation_s(planned, stage) / ENGINE_STEP_S == pytest.approx(
        sum(ends) / len(ends), rel=0.1
    )


MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
    "vocab_size": 151936, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_gpus", "prompt", "response", "words", "seconds"),
    [
        (16, 127, 1019, ["parallel.tp=1", "parallel.pp=2", "rollout.tp=1"], 92.8),
        (32, 103, 3251, ["parallel.tp=4", "parallel.pp=4", "parallel.recompute=full"], 376),
    ],
    ids=["Llama-3.1-8B", "Qwen3-32B"],
)
def test_what_published_runs_took_is_in_the_range_that_is_shown(
    num_gpus: int, prompt: int, response: int, words: list[str], seconds: float, tmp_path: Path
) -> None:
    """NeMo-RL v0.5, performance summary: GRPO, 2,048 responses a step, H100, bf16."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shape = read_shape(tmp_path if num_gpus == 16 else SHAPES / "Qwen3-32B")
    lengths = [
        f"data.max_prompt_tokens={2 * prompt}",
        f"rollout.max_response_tokens={2 * response}",
    ]
    batch = ["algorithm.resets=none", "algorithm.num_prompts=32", "algorithm.num_rollouts=64"]
    run = replace(setup(*lengths, *batch, *words, gpu="h100", num_gpus=num_gpus), shape=shape)
    assert 1 < seconds / plan(run).step.step_s < PUBLISHED


@pytest.mark.parametrize("park", ["[]", "[gradients]", "[optimizer]", "[optimizer,weights]"])
def test_what_is_lent_travels_both_ways_at_the_host_s_rate(park: str) -> None:
    planned = setup(f"colocation.park={park}")
    train = of("train", plan_memory(planned))
    lent = train.optimizer * ("optimizer" in park) + train.weights * ("weights" in park)
    assert plan_step(planned).park_s == pytest.approx(2 * lent / (0.75 * 64e9))


def test_a_token_travels_to_each_of_its_experts_and_back_forwards_and_backwards(
    tmp_path: Path,
) -> None:
    """48 layers of 8 experts a token; half of them are on the other of two ranks."""
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    alone, shared = (
        replace(setup("parallel.tp=1", f"parallel.ep={ep}"), shape=read_shape(tmp_path))
        for ep in (1, 2)
    )
    hidden = 1000 * 2048 * 2
    assert layer_traffic_s(alone, 1000, 3) == 0
    for passes, times in ((3, 4), (4, 6)):  # with recomputation forwards twice
        assert layer_traffic_s(shared, 1000, passes) == pytest.approx(
            times * 8 * hidden / 2 / (0.75 * 450e9)
        )


def test_an_offloaded_optimizer_is_no_faster_than_one_on_the_gpu() -> None:
    seconds = [
        plan_step(setup(f"optimizer.offload_fraction={share}", "colocation.park=[]")).step_s
        for share in (0, 0.5, 1)
    ]
    assert seconds == sorted(seconds) and seconds[2] > seconds[0] + 1


def test_a_sync_brings_what_a_rank_has_not_over_its_slowest_way() -> None:
    whole = 2 * 14_770_033_664
    near = plan_step(setup("parallel.tp=8")).sync
    assert near.bytes == whole * 7 / 8
    written = 2 * whole + whole / 4
    assert near.floor_s == pytest.approx(max(near.bytes / 450e9, written / 4800e9), rel=1e-3)
    far = plan_step(setup("parallel.pp=2", num_gpus=16)).sync
    assert far.bytes == whole * 3 / 4 and far.floor_s == pytest.approx(far.bytes / 50e9)


def test_experts_that_others_hold_come_in_a_sync(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    shape = read_shape(tmp_path)
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    dense = 2 * rollout_weights(shape, 1)[0] - experts
    for tp, ep, come in ((1, 1, 0), (1, 8, experts * 7 / 8), (2, 4, dense / 2 + experts * 3 / 4)):
        layout = replace(setup(f"parallel.tp={tp}", f"parallel.ep={ep}"), shape=shape)
        assert plan_step(layout).sync.bytes == come


# --- what is refused -----------------------------------------------------------------------------

REFUSED = [
    ("train", ["parallel.tp=1"], "h100 8"),
    ("train", ["micro_batch_tokens=65536", "parallel.tp=4"], "h100 8"),
    ("train", ["kernels.head=reference", "micro_batch_tokens=65536",
                    "parallel.recompute=full"], "h200 8"),
    ("generate", ["rollout.kv_cache_bytes=150000000000", "parallel.overlap=true"], "h200 8"),
    ("generate", ["parallel.tp=8", "rollout.tp=1", "parallel.overlap=true",
                       "rollout.kv_cache_bytes=60000000000"], "h100 8"),
    ("checkpoint", ["micro_batch_tokens=5120", "parallel.recompute=full"], "h100 8"),
    ("sync", ["model=models/Qwen3-32B", "parallel.tp=4", "rollout.tp=1", "parallel.overlap=true",
                  "parallel.recompute=full", "colocation.park=[optimizer,gradients,weights]",
                  "rollout.kv_cache_bytes=4294967296", "rollout.max_num_seqs=64"], "h100 32"),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "words", "gpus"), REFUSED, ids=str)
def test_what_does_not_fit_is_one_line_with_a_change_that_does(
    phase: str, words: list[str], gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, num = gpus.split()
    command = ["plan", str(BIG), "--gpu", gpu, "--gpus", num, *words]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(
        r"phase (\w+) does not fit: ([\d.]+) GiB are planned .* has ([\d.]+); (.*) fits$", line
    )
    assert found is not None, line
    named, planned, available, change = found.groups()
    assert named == phase and float(planned) > float(available)
    assert main([*command, *change.split()]) == 0
    assert change.partition("=")[0] in LESS[named], "what a run says that runs out of memory there"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=3"], "number of processes, 8, .* = 3; parallel.tp=[0-9]+ fits"),
        (["parallel.pp=5"], "number of processes, 8, .* = 10; parallel.pp=[0-9]+ fits"),
        (["rollout.tp=3"], "8, does not divide by rollout.tp = 3; rollout.tp=[0-9]+ fits"),
        (["algorithm.num_prompts=3"], "num_prompts=3 does not divide over 2 .* fits"),
        (["parallel.tp=16", "--gpus", "16"], "heads, 40, .* parallel.tp = 16; parallel.tp=.* fits"),
        (["fp8.recipe=mxfp8"], "fp8.recipe=mxfp8 needs compute capability 10.0"),
        (["rollout.max_model_len=99999"], "more than the model's max_position_embeddings"),
        (["rollout.kv_cache_bytes=1000000"], "does not hold one sequence"),
        (["model=models/none"], "models/none: not a Hugging Face model folder"),
    ],
    ids=str,
)
def test_what_does_not_divide_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(BIG), *words, "--gpu", "h200"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_more_gpus_are_asked_for_only_where_nothing_else_helps() -> None:
    alone = setup("parallel.tp=1", "rollout.tp=1", num_gpus=1, gpu="h100")
    pair = setup(
        "parallel.recompute=full", "parallel.overlap=true", "micro_batch_tokens=5120",
        "rollout.tp=2", "fp8.recipe=blockwise", "fp8.param_gather=true", num_gpus=2, gpu="h100",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"phase train .* --gpus 8 fits$"):
        plan(pair)
    assert fits(replace(pair, num_gpus=8)) and not fits(replace(pair, num_gpus=6))
    with pytest.raises(InputError, match=r"no change of one setting fits; --search 1 "):
        plan(alone)
    with pytest.raises(InputError, match=r"no layout of 1 GPUs .* divides and fits"):
        search(alone)


def test_the_smallest_change_of_a_setting_is_the_one_that_is_named() -> None:
    full = setup("rollout.kv_cache_bytes=150000000000")
    with pytest.raises(InputError) as refused:
        plan(full)
    size = int(re.findall(r"rollout.kv_cache_bytes=([0-9]+) fits", str(refused.value))[0])
    assert fits(setup(f"rollout.kv_cache_bytes={size}"))
    assert not fits(setup(f"rollout.kv_cache_bytes={size + GIB}"))


# --- search, JSON --------------------------------------------------------------------------------


def test_a_search_ranks_layouts_that_fit_and_finds_the_config_s_own() -> None:
    plans = search(setup())
    assert all(fits(each.setup) for each in plans)
    seconds = [each.step.step_s for each in plans]
    assert seconds[0] < 1.03 * min(seconds) and seconds[-1] > 1.5 * seconds[0]
    own = plan(setup())
    assert own.step in [each.step for each in plans]


def test_experts_are_shared_in_a_search(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    shape = read_shape(tmp_path)
    assert rollout_weights(shape, 1)[0] == 30_532_122_624  # Qwen3-30B-A3B
    assert active_weights(shape, range(48)) == pytest.approx(2.75e9, rel=0.05)
    plans = search(replace(setup("parallel.tp=1"), shape=shape))
    assert {each.setup.cfg.parallel.ep for each in plans} >= {2, 4, 8}


def test_json_has_the_bytes_of_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(BIG), "--gpu", "b200", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert [each["phase"] for each in said["memory"]] == ["generate", "train", "sync", "checkpoint"]
    parts: list[dict[str, Any]] = said["memory"]
    for phase in parts:
        sizes = [v for k, v in phase.items() if k not in ("phase", "stage", "host", "total")]
        assert phase["total"] == sum(sizes) < said["available_bytes"]
    assert said["step"]["step_s"] > said["step"]["train"]["seconds"] and said["hours"] > 0


def test_the_page_names_every_part_and_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(BIG), "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "activations", "head", "kv cache", "bubble",
                 "floor", "none of it measured", "not counted"):  # fmt: skip
        assert word in said
    assert main(["plan", str(BIG), "--gpu", "h200", "--search", "8"]) == 0
    assert "layouts of 8 GPUs fit" in capsys.readouterr().out


# --- what changes hands --------------------------------------------------------------------------


@pytest.mark.parametrize("park", ["[]", "[gradients]", "[optimizer,gradients,weights]"])
def test_what_is_not_lent_stays_while_the_engine_is_awake(park: str):
    default = plan_memory(setup())
    found = plan_memory(setup(f"colocation.park={park}"))
    train, generate, sync = (of(phase, found) for phase in ("train", "generate", "sync"))
    assert train == of("train", default)
    for part in ("weights", "gradients", "optimizer"):
        whole = getattr(train, part)
        assert getattr(generate, part) == (0 if part in park else whole) and whole
    assert sync.weights == train.weights
    lent = train.optimizer * ("optimizer" in park) + train.weights * ("weights" in park)
    assert generate.host - train.host == lent
    assert sync.host - train.host == train.optimizer * ("optimizer" in park)


def test_what_is_gathered_in_a_sync_is_there_in_part_in_parts_and_whole() -> None:
    table = 152064 * 5120 * 2
    for tp, pp, times in ((1, 1, 1), (2, 1, 2.5), (4, 1, 2.25), (1, 2, 2)):
        layout = setup(f"parallel.tp={tp}", f"parallel.pp={pp}")
        assert of("sync", plan_memory(layout)).workspace == times * table


def test_an_offloaded_share_of_the_optimizer_is_on_the_host_in_every_phase():
    whole, offloaded = (
        plan_memory(setup(f"optimizer.offload_fraction={share}")) for share in (0, 0.75)
    )
    before, after = of("train", whole), of("train", offloaded)
    assert after.optimizer == pytest.approx(before.optimizer / 4, abs=1)
    assert after.host - before.host == pytest.approx(before.optimizer * 3 / 4, abs=1)


def test_a_gpu_is_known_by_its_driver_s_name():
    assert known("NVIDIA H200") is GPUS["h200"] and known("NVIDIA A100-SXM4-80GB") is None


# --- before a run --------------------------------------------------------------------------------


def test_a_verdict_is_a_line_with_the_fullest_phase_and_what_the_gpu_has() -> None:
    assert verdict(setup()) == (
        "plan: fits: at the most 102.3 GiB, in phase checkpoint, of the 140.4 of an H200 SXM 141 GB"
    )
    said = verdict(setup(gpu="h100"))
    assert said.startswith("plan: WARNING: phase checkpoint does not fit: 102.3 GiB are planned ")
    assert re.search(r"has 79\.6; \S+ fits; it is tried all the same, .* an estimate$", said)


def test_only_what_is_counted_exactly_is_a_reason_to_refuse() -> None:
    """14.77 billion parameters: 2 + 4 bytes of each on a GPU of tp=1, 12 shared by 8."""
    alone = setup("parallel.tp=1", gpu="h100")
    with pytest.raises(InputError, match=r"alone take 103\.\d GiB .* stage 0, an H100 .* 79\.6; "):
        check_state(alone)
    close = setup(gpu="h100")  # tp=2: half of the weights and gradients, the same share
    assert of("train", plan_memory(close)).total > GPUS["h100"].memory_bytes
    check_state(close)


def test_the_start_is_planned_too_as_the_larger_of_a_whole_trainer_and_the_engine_s_turn() -> None:
    train, generate = (of(phase, plan_memory(setup())) for phase in ("train", "generate"))
    planned = planned_gib(setup())
    assert planned["generate"] == generate.total / GIB
    held = train.weights + train.gradients + train.optimizer + OVERHEAD_BYTES
    assert planned["start"] == held / GIB > planned["generate"]
    much = setup("rollout.kv_cache_bytes=90000000000")
    assert planned_gib(much)["start"] == planned_gib(much)["generate"]


def test_a_run_is_planned_for_its_own_gpu_with_the_memory_that_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    cfg = setup(f"model={tmp_path}").cfg
    assert setup_here(cfg, num_gpus=4) is None  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GIB, 141 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert setup_here(cfg, num_gpus=4) is None  # none that a plan knows
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = setup_here(cfg, num_gpus=4)
    assert found is not None and found.num_gpus == 4
    assert found.gpu == replace(GPUS["h200"], memory_bytes=141 * GIB)
