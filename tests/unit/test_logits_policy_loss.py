"""Logits to policy loss and gradient: the operation, and its CUDA source compiled as C++."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import logits_policy_loss as op
from megatron_srpo.kernels import nvcc
from megatron_srpo.kernels.policy_loss import arguments
from megatron_srpo.loss import TokenTensors, policy_loss

NAN, INF = torch.nan, torch.inf
HERE = Path(__file__).parent
CONFIGS = {
    "reinforce": LossConfig(),
    "ppo": LossConfig(surrogate="ppo"),
    "truncate": LossConfig(surrogate="ppo", importance="token_truncate", importance_cap=1.1),
    "mask": LossConfig(importance="token_mask", importance_cap=1.1),
    "kl": LossConfig(surrogate="ppo", kl_coef=0.3),
}
Case = tuple[Tensor, Tensor, Tensor, TokenTensors]
"""logits [T, V], targets [T], temperature [T], tokens"""


def drawn(num_rows: int, vocab: int, *, dtype: torch.dtype = torch.float64) -> Case:
    """Every seventh row has no weight, every fifth was sampled by nobody."""
    random = torch.Generator().manual_seed(num_rows * 1000 + vocab)
    logits = (3 * torch.randn(num_rows, vocab, generator=random, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, vocab, (num_rows,), generator=random)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = (0.5 + torch.rand(num_rows, generator=random, dtype=torch.float64)).to(wide)
    z = logits.double() / temperature.double()[:, None]
    logprob = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def near_logprob() -> Tensor:
        return (logprob + 0.3 * torch.randn(num_rows, generator=random)).to(wide)

    place = torch.arange(num_rows)
    tokens = TokenTensors(
        loss_weight_T=torch.where(place % 7 == 6, 0.0, 0.5 + torch.rand(num_rows)).to(wide),
        advantage_T=torch.randn(num_rows, generator=random).to(wide),
        rollout_T=torch.where(place % 5 == 4, NAN, near_logprob()).to(wide),
        old_T=near_logprob(),
        reference_T=near_logprob(),
        cu_seqlens=torch.tensor([0, num_rows]),
    )
    return logits, targets, temperature, tokens


def double(tokens: TokenTensors) -> TokenTensors:
    names = ("loss_weight_T", "advantage_T", "rollout_T", "old_T", "reference_T")
    wide = {name: getattr(tokens, name) for name in names}
    return replace(tokens, **{name: x if x is None else x.double() for name, x in wide.items()})


def written_out(case: Case, cfg: LossConfig, num_real: int) -> dict[str, Tensor]:
    """In float64, by autograd through `loss.policy_loss`."""
    logits = case[0].double().requires_grad_()
    z = logits[:, :num_real] / case[2].double()[:, None]
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp > -INF, logp.exp() * logp, 0.0).sum(-1)
    logprob = logp.gather(1, case[1][:, None])[:, 0]
    loss, _ = policy_loss(logprob, double(case[3]), cfg, denominator=7.0)
    (by_logits,) = torch.autograd.grad(loss, logits)
    trained = case[3].loss_weight_T != 0
    return {
        "logprob": torch.where(trained, logprob.detach(), 0.0),
        "entropy": torch.where(trained, entropy.detach(), 0.0),
        "by_logits": by_logits,
        "loss": loss.detach(),
    }


def assert_close(found: Tensor, right: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.double(), right, rtol=0, atol=atol)


# --- the operation ---


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("vocab", [1, 37, 64])
def test_loss_counters_and_gradient_are_those_of_the_loss_of_the_log_probs(name: str, vocab: int):
    case, cfg, num_real = drawn(9, vocab), CONFIGS[name], max(1, vocab - 3)
    case = (case[0], case[1] % num_real, *case[2:])
    logits = case[0].clone().requires_grad_()
    loss, counters, logprob, entropy = op.logits_policy_loss(
        logits, case[1], case[3], cfg, temperature=case[2], denominator=7.0, num_real=num_real
    )
    right = written_out(case, cfg, num_real)
    (by_logits,) = torch.autograd.grad(3 * loss, logits)
    assert_close(loss.detach(), right["loss"], 1e-12)
    assert_close(by_logits, 3 * right["by_logits"], 1e-12)
    assert_close(logprob, right["logprob"], 1e-12)
    assert_close(entropy, right["entropy"], 1e-12)
    _, known = policy_loss(right["logprob"], case[3], cfg, denominator=7.0)
    for metric, value in known.quotients.items():
        assert counters.quotients[metric][0].item() == pytest.approx(value[0].item(), abs=1e-12)


def as_function(case: Case, cfg: LossConfig) -> Any:
    return lambda logits: op.logits_policy_loss(
        logits, case[1], case[3], cfg, temperature=case[2], denominator=7.0
    )[0]


def test_the_gradient_is_that_of_finite_differences():
    case = drawn(4, 6)
    logits = case[0].requires_grad_()
    assert torch.autograd.gradcheck(as_function(case, CONFIGS["reinforce"]), (logits,))


def test_a_graph_that_is_kept_gives_its_gradient_twice():
    case = drawn(4, 6)
    logits = case[0].requires_grad_()
    loss = as_function(case, CONFIGS["ppo"])(logits)
    twice = [torch.autograd.grad(2 * loss, logits, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(torch.autograd.grad(2 * loss, logits)[0], twice[0])


@pytest.mark.parametrize("num_rows", [0, 8])
def test_the_operation_is_registered_as_torch_wants_it(num_rows: int):
    logits, targets, temperature, tokens = drawn(num_rows, 11)
    others = arguments(tokens, CONFIGS["truncate"], 7.0)
    inputs = logits.requires_grad_(), targets, temperature, 9, *others
    outcome = torch.library.opcheck(torch.ops.megatron_srpo.logits_policy_loss, inputs)
    assert set(outcome.values()) == {"SUCCESS"}


def test_it_compiles_into_one_graph_forward_and_backward():
    case = drawn(5, 13)
    logits, function = case[0].requires_grad_(), as_function(case, CONFIGS["ppo"])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    right = torch.autograd.grad(2 * function(logits), logits)[0]
    with torch._dynamo.config.patch(disable=False):  # the engines' environment turns it off
        found = torch.autograd.grad(2 * compiled(logits), logits)[0]
    assert_close(found, right, 1e-12)


def test_rows_without_weight_and_columns_that_are_no_tokens_are_not_looked_at():
    logits, targets, temperature, tokens = drawn(14, 20, dtype=torch.bfloat16)
    logits[tokens.loss_weight_T == 0] = NAN
    logits[:, 17:] = NAN
    logits.requires_grad_()
    loss, _, logprob, _ = op.logits_policy_loss(
        logits,
        targets % 17,
        tokens,
        CONFIGS["reinforce"],
        temperature=temperature,
        denominator=7.0,
        num_real=17,
    )
    (by_logits,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and torch.isfinite(logprob).all()
    assert by_logits.dtype == torch.bfloat16 and torch.isfinite(by_logits).all()
    assert (by_logits[6] == 0).all() and (by_logits[:, 17:] == 0).all()
    assert (by_logits[0, :17] != 0).all()


def test_weights_of_whole_responses_are_refused():
    case = drawn(3, 5)
    with pytest.raises(ValueError, match="sequence_mask"):
        as_function(case, LossConfig(importance="sequence_mask"))(case[0])


# --- the CUDA source ---


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not shutil.which("g++"):
        pytest.skip("g++ is not there to compile the CUDA source as C++")
    built = tmp_path_factory.mktemp("cuda_as_cpp") / "kernel.so"
    options = ["-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-pthread", "-fno-extern-tls-init"]
    command = ["g++", *options, "-x", "c++", "-I", HERE / "cuda_as_cpp", "-o", built, op.SOURCE]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(built))


def launched(
    library: ctypes.CDLL, case: Case, cfg: LossConfig, num_real: int, num_blocks: int
) -> dict[str, Tensor]:
    logits, targets, temperature, tokens = case
    *per_token, _, surrogate, importance, low, high, kl, cap, denominator = arguments(
        tokens, cfg, 7.0
    )
    how = surrogate, importance, low, high, kl, cap, denominator
    names = ("logprob", "entropy", "by_logits")
    found = op.launch(
        library,
        logits,
        targets,
        temperature,
        num_real,
        tuple(per_token),
        how,
        num_blocks=num_blocks,
    )
    return dict(zip(names, found, strict=True))


def assert_right(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert_close(found["logprob"], right["logprob"], 5e-6)
    assert_close(found["entropy"], right["entropy"], 5e-6)
    largest = right["by_logits"].abs().max().item()
    # Half a unit in the last place of bfloat16 is 2e-3 of a number.
    is_rounded = found["by_logits"].dtype == torch.bfloat16
    assert_close(found["by_logits"], right["by_logits"], (4e-3 if is_rounded else 2e-6) * largest)


@pytest.mark.parametrize("num_blocks", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 37, 9001])
def test_the_cuda_kernel_is_right_in_any_cluster(
    library: ctypes.CDLL, vocab: int, dtype: torch.dtype, num_blocks: int
):
    """Rows of 37 and 9001 columns do not begin where 16 bytes do."""
    case, num_real = drawn(7, vocab, dtype=dtype), max(1, vocab - vocab // 9)
    case = (case[0], case[1] % num_real, *case[2:])
    found = launched(library, case, CONFIGS["kl"], num_real, num_blocks)
    assert_right(found, written_out(case, CONFIGS["kl"], num_real))
    assert (found["by_logits"][:, num_real:] == 0).all()
    assert (found["by_logits"][6] == 0).all() and found["logprob"][6] == 0


@pytest.mark.parametrize("is_reversed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cuda_kernel_has_the_coefficients_of_the_loss(
    library: ctypes.CDLL, name: str, is_reversed: int
):
    library.set_reversed(is_reversed)
    case = drawn(14, 64, dtype=torch.float32)
    assert_right(
        launched(library, case, CONFIGS[name], 64, 2), written_out(case, CONFIGS[name], 64)
    )
    library.set_reversed(0)


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_the_cuda_kernel_keeps_its_digits_at_extreme_logits(library: ctypes.CDLL, num_blocks: int):
    logits = 4e4 + torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    logits[1, :32] = -INF
    logits[2, :63] = -1e30
    logits[2, 63] = 1e30
    logits[3] = -1e30
    case = drawn(5, 64, dtype=torch.float32)
    case = (logits, torch.tensor([3, 40, 63, 2, 5]), *case[2:])
    assert_right(
        launched(library, case, CONFIGS["reinforce"], 64, num_blocks),
        written_out(case, CONFIGS["reinforce"], 64),
    )


def test_nan_does_not_hide_from_the_cuda_kernel_and_targets_that_nobody_holds_are_impossible(
    library: ctypes.CDLL,
):
    case = drawn(3, 64, dtype=torch.float32)
    case[0][1, 50] = NAN
    case = (case[0], torch.tensor([64, 3, -1]), *case[2:])
    found = launched(library, case, CONFIGS["reinforce"], 64, 2)
    assert found["logprob"][[0, 2]].tolist() == [-INF, -INF]
    assert found["logprob"][1].isnan() and found["by_logits"][1].isnan().all()
    assert torch.isfinite(found["by_logits"][[0, 2]]).all()


def test_rows_of_logits_may_lie_apart(library: ctypes.CDLL):
    case = drawn(6, 48, dtype=torch.bfloat16)
    right = launched(library, case, CONFIGS["ppo"], 48, 2)
    for extra in (8, 3):
        apart = torch.full((6, 48 + extra), NAN, dtype=torch.bfloat16)
        apart[:, :48] = case[0]
        found = launched(library, (apart[:, :48], *case[1:]), CONFIGS["ppo"], 48, 2)
        assert all(torch.equal(found[key], right[key]) for key in right)


def test_targets_of_the_cuda_kernel_may_have_32_bits(library: ctypes.CDLL):
    case = drawn(6, 48, dtype=torch.float32)
    right = launched(library, case, CONFIGS["ppo"], 48, 2)
    found = launched(library, (case[0], case[1].int(), *case[2:]), CONFIGS["ppo"], 48, 2)
    assert all(torch.equal(found[key], right[key]) for key in right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_gradient_is_scaled_where_it_lies(library: ctypes.CDLL, dtype: torch.dtype):
    x = torch.randn(1003).to(dtype)
    for factor in (1.0, 0.5):
        found = x.clone()
        op.launch_scale(library, found, torch.tensor(factor))
        assert torch.equal(found, x * factor)


def test_a_row_is_divided_among_few_blocks_if_it_is_short():
    sizes = {2 * 128: 1, 2 * 19008: 1, 2 * 32000: 2, 2 * 152064: 8, 4 * 152064: 8}
    assert {row_bytes: op.cluster_size(row_bytes) for row_bytes in sizes} == sizes


# --- nvcc ---


def test_a_library_is_built_once_and_again_if_anything_of_it_changes(tmp_path: Path):
    compiler, source = tmp_path / "nvcc", tmp_path / "some.cu"
    compiler.write_text(
        '#!/bin/sh\necho "$@" >> "$0.calls"\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    source.write_text("1")
    folder, calls = tmp_path / "cache", tmp_path / "nvcc.calls"

    def num_builds() -> int:
        return sum("some.cu" in line for line in calls.read_text().splitlines())

    first = nvcc.build(source, "90a", str(compiler), folder)
    assert first == nvcc.build(source, "90a", str(compiler), folder) and num_builds() == 1
    assert first != nvcc.build(source, "100a", str(compiler), folder)
    source.write_text("2")
    assert first != nvcc.build(source, "90a", str(compiler), folder) and num_builds() == 3
    assert sorted(folder.iterdir()) == sorted(folder.glob("some.sm_*.so"))


def refusing(folder: Path) -> Path:
    """An nvcc that compiles nothing."""
    compiler = folder / "nvcc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such thing" >&2; exit 1; }')
    compiler.chmod(0o755)
    return compiler


def test_a_source_that_nvcc_refuses_is_an_error_in_its_words(tmp_path: Path):
    compiler = refusing(tmp_path)
    with pytest.raises(RuntimeError, match="no such thing"):
        nvcc.build(op.SOURCE, "90a", str(compiler), tmp_path)
    assert list(tmp_path.iterdir()) == [compiler]


def test_where_nvcc_refuses_there_is_no_library_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler = refusing(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvcc.find_nvcc() == str(compiler)
    with pytest.warns(UserWarning, match="no such thing"):
        assert nvcc.load(op.SOURCE, "1a") is None
    with warnings.catch_warnings(action="error"):
        assert nvcc.load(op.SOURCE, "1a") is None


def test_without_nvcc_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(nvcc, "DEFAULT_HOME", str(tmp_path / "cuda"))
    assert nvcc.load(tmp_path / "any.cu", "90a") is None


def test_nvcc_is_found_where_cuda_is_installed_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(nvcc, "DEFAULT_HOME", str(tmp_path / "cuda"))
    assert nvcc.find_nvcc() is None
    compiler = refusing(tmp_path / "cuda" / "bin")
    assert nvcc.find_nvcc() == str(compiler)
