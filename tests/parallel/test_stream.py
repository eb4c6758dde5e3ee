"""Full tensors in buckets: how much memory a stream of weights takes, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.weights import Shard, buckets, full_tensors, local_parameters
from megatron_srpo.hf_folder import EMBEDDING, read_tensors
from tests.parallel.jobs import build_learner
from tests.parallel.pool import Pool
from tests.tiny import write_policy

TP2_PP2 = (4, {"tp": 2, "pp": 2})
EP2 = (2, {"ep": 2})


class Counted(TorchDispatchMode):
    """In place of a GPU's allocator: what operations have made, and is still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), more: Any = None
    ) -> Any:
        given = {
            a.untyped_storage()._cdata
            for a in torch.utils._pytree.tree_leaves((arguments, more))
            if isinstance(a, torch.Tensor)
        }
        found = function(*arguments, **(more or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.alive())
        return found

    def alive(self) -> int:
        self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
        return sum(size for _, size in self._made.values())


def streamed(mesh: Mesh, policy: Path, bucket_bytes: int) -> dict[str, Any]:
    """As a rollout engine takes it, and the sums of tensors that were kept to the end."""
    learner = build_learner(policy, mesh)
    local = local_parameters(learner.modules, mesh)
    counted, sums, largest = Counted(), dict[str, float](), 0
    with counted:
        stream = full_tensors(
            learner._family, learner._heads, mesh, learner.shards, local,
            tied=learner.modules[0].share_embeddings_and_output_weights, bucket_bytes=bucket_bytes,
        )  # fmt: skip
        for name, tensor in stream:
            largest = max(largest, tensor.untyped_storage().nbytes())
            sums[name] = float(tensor.sum())
            del tensor
    left = counted.alive()
    whole = sum(t.numel() * 4 for n, t in learner.export() if n != "lm_head.weight")
    kept = dict(full_tensors(
        learner._family, learner._heads, mesh, learner.shards, local, tied=False,
        bucket_bytes=bucket_bytes,
    ))  # fmt: skip
    return {
        "most": counted.most,
        "left": left,
        "whole": whole,
        "largest": largest,
        "sums": sums,
        "kept": {name: float(tensor.sum()) for name, tensor in kept.items()},
    }


@pytest.mark.parametrize("bucket_bytes", [2**14, 2**19, 2**29])
def test_a_stream_holds_two_buckets_and_a_parameter_not_the_model(
    pool: Pool, tmp_path: Path, bucket_bytes: int
):
    policy = write_policy(tmp_path, seed=0, num_layers=12, tied=True)
    num, layout = TP2_PP2
    ranks = pool.run(num, streamed, policy, bucket_bytes, **layout)
    tensors = dict(read_tensors(policy))
    for rank in ranks:
        parameter = 128 * 128 * 4 * 2  # qkv, of 4 query and 2 key-value heads; fc1 is less
        bucket = min(bucket_bytes, rank["whole"])
        assert rank["most"] <= 1.5 * max(bucket, parameter) + 2 * parameter + 64
        assert rank["left"] == 0
        if bucket_bytes < 2**20:
            assert rank["most"] < rank["whole"] / 2
        for name, tensor in tensors.items():
            right = pytest.approx(float(tensor.sum()), rel=1e-4, abs=1e-3)
            assert rank["sums"][name] == right and rank["kept"][name] == right


def test_experts_of_one_layer_travel_together_and_others_are_not_kept_waiting():
    def shard(layer: int, expert: int, stage: int = 0) -> Shard:
        name = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"
        return Shard(name=name, stage=stage, expert_rank=expert // 2, shape=(2,), dim=None)

    shards = [shard(layer, expert) for layer in range(2) for expert in range(4)]
    found = [*buckets(shards, {s.name: 8 for s in shards}, 1000)]
    assert [[*map(shards.index, bucket)] for bucket in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_bucket_is_full_before_it_is_too_large_and_a_larger_parameter_is_alone():
    def named(names: str, dim: int | None) -> Sequence[Shard]:
        return [Shard(name=n, stage=0, expert_rank=None, shape=(1,), dim=dim) for n in names]

    shards = [*named("abc", 0), *named("xy", None), *named("de", 0)]
    sizes = dict(zip("abcdexy", (4, 4, 4, 99, 1, 1, 1), strict=True))
    found = [[s.name for s in bucket] for bucket in buckets(shards, sizes, 8)]
    assert found == [["a", "b"], ["c"], ["d"], ["e"], ["x", "y"]]


def test_on_one_gpu_nothing_is_copied(policy: Path, mesh: Mesh):
    learner = build_learner(policy, mesh)
    weights = {buffer.param_data.data_ptr() for model in learner.models for buffer in model.buffers}
    first, embedding = next(learner.export())
    assert first == EMBEDDING and embedding.untyped_storage().data_ptr() in weights
