"""What a rank has imported before it begins: the server that it is forked from imports this.

Nothing is computed and no thread is started here; what is frozen is not looked at by any later
garbage collection of the forked.
"""

from __future__ import annotations

import gc
import warnings

from megatron_srpo.environment import set_environment

warnings.simplefilter("ignore")
set_environment()

import vllm.model_executor.model_loader  # noqa: E402
import vllm.model_executor.models.qwen2  # noqa: E402, F401

import megatron_srpo.__main__  # noqa: E402
import megatron_srpo.engines.vllm.cpu_worker  # noqa: E402
import megatron_srpo.train  # noqa: E402, F401
import tests.parallel.jobs  # noqa: E402
import tests.survival.victim  # noqa: E402, F401

gc.collect()
gc.freeze()
