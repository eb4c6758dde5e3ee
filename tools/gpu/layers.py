"""Parts `te` and `fp8`: do the layers of a GPU compute what those of a CPU do?

Each family's tiny policy, log-probs and gradient, against transformers in float64 on the CPU; then
every FP8 recipe against bf16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_srpo.engines.megatron.mesh import Mesh, build_mesh
from megatron_srpo.types import InputError
from tests.tiny import (
    FAMILIES,
    by_stored_name,
    logprobs_of,
    random_samples,
    transformers_model,
    write_policy,
)
from tools.gpu.apart import run_apart
from tools.gpu.result import NotRun, Numbers, Result, not_run, run_check
from tools.gpu.world import batch_of, config_of, gradients_of, learner_of, off

HELD = "fp8.param_gather=true"
RECIPES = {
    "delayed": ["fp8.recipe=delayed"],
    "tensorwise": ["fp8.recipe=tensorwise"],
    "tensorwise, weights held in it,": ["fp8.recipe=tensorwise", HELD],
    "blockwise": ["fp8.recipe=blockwise"],
    "blockwise, weights held in it,": ["fp8.recipe=blockwise", HELD],
    "mxfp8": ["fp8.recipe=mxfp8"],
}
LOCAL = {"gradient_off": 1e-4, "logprob_mean_nats": 1e-5}
ENGINE = {"gradient_off": 0.05, "logprob_mean_nats": 0.03}
"""bfloat16 has 8 bits: a product of random numbers is off by 0.4 %, and layers add up."""
FP8 = {"loss_off": 0.05, "gradient_off": 0.3}
"""e4m3 has 4 bits: each number is off by up to 6 %."""
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
Task = tuple[str, Callable[[], list[Result]]]


def te_tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    for layers in ("local", "transformer_engine"):
        name = f"layers of every family, {layers}"
        if layers == "transformer_engine" and device.type == "cpu":
            yield name, lambda name=name: [not_run(name, "no GPU")]
            continue
        target, given = "tools.gpu.layers:families", {"name": name, "layers": layers}
        yield name, partial(run_apart, name, target, given, deadline)


def fp8_tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    for recipe, overrides in RECIPES.items():
        name = f"{recipe} against bf16"
        if device.type == "cpu":
            yield name, lambda name=name: [not_run(name, "no GPU")]
            continue
        target, given = "tools.gpu.layers:recipe", {"name": name, "overrides": overrides}
        yield name, partial(run_apart, name, target, given, deadline)


def families(name: str, layers: str) -> list[Result]:
    """`layers` as the config's `backend` has them; a build without that choice has local ones."""
    mesh = build_mesh()
    return [
        run_check(f"{name}: {family}", partial(against_transformers, mesh, family, layers))
        for family in FAMILIES
    ]


def against_transformers(mesh: Mesh, family: str, layers: str) -> tuple[Numbers, Numbers]:
    """A policy of two layers, weights of 0.1: errors show."""
    is_engine = layers == "transformer_engine"
    folder = write_policy(Path(tempfile.mkdtemp()), seed=0, family=family, tied=family == "qwen2")
    overrides = ["dtype=bfloat16", f"backend={layers}"] if is_engine else []
    try:
        cfg = config_of(folder, *overrides)
    except InputError as lacking:
        raise NotRun(str(lacking)) from lacking
    learner, samples = learner_of(cfg, mesh), random_samples(6, seed=1)
    model = transformers_model(folder)
    loss = torch.zeros((), dtype=torch.float64)
    differences: list[np.ndarray] = []
    answers = learner.logprobs([s.token_ids for s in samples], temperature=1.0)
    for sample, answer in zip(samples, answers, strict=True):
        right = logprobs_of(model, sample.token_ids, temperature=1.0)
        differences.append(np.abs(answer - right.detach().numpy()))
        credit = torch.from_numpy(sample.loss_weight * sample.advantage)[1:]
        loss = loss - (credit * right).sum() / len(samples)
    loss.backward()
    right = by_stored_name({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    learner.backward(batch_of(samples, cfg, mesh))
    numbers = {
        "gradient_off": off(gradients_of(learner, mesh), right),
        "logprob_mean_nats": float(np.concatenate(differences).mean()),
    }
    return numbers, ENGINE if is_engine else LOCAL


def recipe(name: str, overrides: list[str]) -> list[Result]:
    """Loss and gradient of a wider policy, in bf16 and in FP8."""
    mesh, folder = build_mesh(), write_policy(Path(tempfile.mkdtemp()), seed=0, **WIDE)
    samples = random_samples(8, seed=1)
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for changed in ([], overrides):
        cfg = config_of(folder, "dtype=bfloat16", "backend=transformer_engine", *changed)
        learner = learner_of(cfg, mesh)
        # As in a run, where a probe comes first: layers keep their first FP8 copies.
        learner.logprobs([samples[0].token_ids], temperature=1.0)
        stats = learner.backward(batch_of(samples, cfg, mesh))
        found.append((stats["loss"], gradients_of(learner, mesh)))
    (loss, right), (other, gradients) = found
    numbers = {"loss_off": abs(other - loss) / abs(loss), "gradient_off": off(gradients, right)}
    return [run_check(name, lambda: (numbers, FP8))]
