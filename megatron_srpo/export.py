"""The trained policy as a Hugging Face folder.   learner -> folder"""

from __future__ import annotations

from pathlib import Path

from megatron_srpo.engines.megatron.mesh import Mesh
from megatron_srpo.engines.megatron.model import is_tied
from megatron_srpo.hf_writer import write_folder
from megatron_srpo.protocols import Learner
from megatron_srpo.staging import on_disk


def save_hf(out: Path, learner: Learner, mesh: Mesh, *, like: Path) -> None:
    """Collective: every rank takes part in gathering tensors, rank 0 writes them. `AlarmError` if
    the disk refuses."""
    tensors = learner.export()
    if mesh.rank == 0:
        with on_disk(out):
            write_folder(out, tensors, like=like, tied=is_tied(like))
    else:
        for _ in tensors:
            pass
