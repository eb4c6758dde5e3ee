"""Time by phase and family, of events that are made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_srpo.hf_folder import EMBEDDING, HEAD
from megatron_srpo.profile.kernels import PHASE, by_phase, covered, family_of
from megatron_srpo.profile.page import Work, active_weights, page
from megatron_srpo.profile.profile import parse_steps
from megatron_srpo.types import InputError


def event(cat: str, name: str, ts: float, dur: float, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1,
        "args": arguments,
    }  # fmt: skip


def phase(name: str, ts: float, dur: float) -> dict[str, Any]:
    return event("user_annotation", PHASE + name, ts, dur)


@pytest.mark.parametrize(
    "family, names",
    {
        "communication": [
            "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "gloo:all_reduce",
            "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 4>(...)",
        ],
        "memcpy": ["Memcpy DtoH (Device -> Pinned)", "Memset (Device)", "aten::copy_"],
        "optimizer": [
            "void transformer_engine::multi_tensor_apply_kernel<AdamFunctorMaster>(...)",
            "aten::_fused_adamw_",
            "void at::native::multi_tensor_apply_kernel<LpNormFunctor>",
        ],
        "attention": [
            "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>(...)",
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3",
            "vllm::unified_attention_with_output",
            "aten::scaled_dot_product_attention",
            "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>(...)",
        ],
        "GEMM": [
            "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
            "void cutlass::device_kernel<vllm::cutlass_3x_gemm_sm90_fp8>(...)",
            "aten::mm",
            "aten::addmm",
        ],
        "vLLM's own": [
            "vllm::rms_norm_kernel",
            "_C::rotary_embedding",
            "_topk_topp_kernel",
            "_gumbel_sample_kernel",
        ],
        "norm/elementwise": [
            "void at::native::vectorized_elementwise_kernel<4, ...>",
            "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
            "rmsnorm_fwd_tuned_kernel",
            "aten::mul",
            "aten::silu",
        ],
        "other": ["something_new"],
    }.items(),
)
def test_a_kernel_s_family_is_in_its_name(family: str, names: list[str]):
    assert {name: family_of(name) for name in names} == dict.fromkeys(names, family)


def test_time_that_several_cover_counts_once():
    assert covered([(0, 10), (2, 3), (8, 12), (20, 21), (20.5, 21)]) == 13
    assert covered([]) == 0


def test_a_kernel_belongs_to_the_phase_that_launched_it():
    found = by_phase(
        [
            phase("train", 0, 100),
            phase("sync", 100, 50),
            event("cuda_runtime", "cudaLaunchKernel", 90, 1, correlation=7),
            event("kernel", "nvjet_tst", 105, 20, correlation=7),
            event("kernel", "ncclDevKernel_Broadcast", 130, 10, correlation=8),
            event("cpu_op", "aten::mm", 0, 100),
        ]
    )
    assert found["train"].by_family == {"GEMM": pytest.approx(20e-6)}
    assert found["sync"].by_family == {"communication": pytest.approx(10e-6)}
    assert found["train"].idle == pytest.approx(80e-6)
    assert found["sync"].idle == pytest.approx(40e-6)


def test_streams_that_work_at_once_count_each_and_leave_idle_what_none_covers():
    found = by_phase(
        [
            phase("train", 0, 100),
            event("kernel", "nvjet", 10, 50),
            event("kernel", "ncclDevKernel_ReduceScatter", 30, 40),
            event("gpu_memcpy", "Memcpy HtoD", 90, 10),
        ]
    )["train"]
    assert found.by_family == {
        "GEMM": pytest.approx(50e-6),
        "communication": pytest.approx(40e-6),
        "memcpy": pytest.approx(10e-6),
    }
    assert found.idle == pytest.approx((10 + 20) * 1e-6)


def test_an_operation_on_a_cpu_has_the_time_that_it_did_not_spend_in_others():
    """outer: 0-10, 30-40, 60-100; its two products: 10-30 and 40-60, of which a copy 45-50."""
    found = by_phase(
        [
            phase("train", 0, 200),
            event("cpu_op", "aten::silu", 0, 100),
            event("cpu_op", "aten::mm", 10, 20),
            event("cpu_op", "aten::mm", 40, 20),
            event("cpu_op", "aten::copy_", 45, 5),
            event("cpu_op", "aten::mm", 150, 10),
        ]
    )["train"]
    assert found.by_family == {
        "norm/elementwise": pytest.approx(60e-6),
        "GEMM": pytest.approx(45e-6),
        "memcpy": pytest.approx(5e-6),
    }
    assert found.idle == pytest.approx(90e-6)


def test_what_an_optimizer_s_step_asks_for_is_its_own_whatever_it_is():
    found = by_phase(
        [
            phase("train", 0, 100),
            event("user_annotation", "Optimizer.step#AdamW.step", 50, 20),
            event("cpu_op", "aten::mul", 40, 5),
            event("cpu_op", "aten::mul", 60, 5),
        ]
    )["train"]
    assert found.by_family == {
        "norm/elementwise": pytest.approx(5e-6),
        "optimizer": pytest.approx(5e-6),
    }


def test_a_phase_that_comes_again_is_added_up_and_work_outside_of_phases_is_left_out():
    found = by_phase(
        [
            phase("sync", 0, 10),
            phase("other", 10, 10),
            phase("sync", 20, 10),
            *(event("kernel", "nvjet", ts, 2) for ts in (1, 22, 50)),
        ]
    )
    assert list(found) == ["sync", "other"]
    assert found["sync"].wall == pytest.approx(20e-6)
    assert found["sync"].by_family["GEMM"] == pytest.approx(4e-6)


def work(device: str) -> Work:
    return Work(generated=1000, trained=2000, active_weights=10**9, num_gpus=2, device=device)


def test_mfu_is_flops_over_the_peak_of_all_gpus_in_the_phase_s_time():
    times = by_phase([phase("train", 0, 1e6), phase("generate", 1e6, 3e6)])
    said = page(times, work("NVIDIA H200"), title="Steps 3 to 4")
    assert "# Steps 3 to 4\n" in said
    assert f"1.2e+13 FLOPs, MFU {100 * 1.2e13 / (2 * 989e12):.1f} %" in said  # 6 * 1e9 * 2000
    assert "2e+12 FLOPs, MFU 0.0 %" in said
    assert f"both, over all phases: MFU {100 * 1.4e13 / (4 * 2 * 989e12):.1f} %" in said
    assert "idle: 100.0 %" in said


def test_without_a_known_peak_there_is_no_mfu():
    said = page(by_phase([phase("train", 0, 1e6)]), work("x86_64, no GPU"), title="")
    assert said.count("MFU n/a") == 3


def test_a_token_meets_every_matrix_but_the_embedding_s_and_a_share_of_the_experts():
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (100, 8),
        HEAD: (100, 8),
        "model.norm.weight": (8,),
        "model.layers.0.mlp.gate.weight": (4, 8),
        **{f"model.layers.0.mlp.experts.{e}.up_proj.weight": (16, 8) for e in range(4)},
    }
    config = {"num_experts": 4, "num_experts_per_tok": 1}
    assert active_weights(shapes, config) == 800 + 32 + 128
    assert active_weights({HEAD: (3, 2)}, {}) == 6


@pytest.mark.parametrize(
    "text, message",
    [
        ("3:5", "must look like steps=3:5"),
        ("steps=5:5", "does the steps from 2 to 8"),
        ("steps=1:3", "does the steps from 2 to 8"),
        ("steps=7:9", "does the steps from 2 to 8"),
    ],
)
def test_steps_that_will_not_be_done_are_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_steps(text, first=2, num_steps=8)
