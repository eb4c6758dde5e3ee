"""How do processes find each other?   environment of the launcher -> a store that all of them see

Before any collective: a rank that does not come can then be named, where a process group only
waits for it.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store

PATIENCE = timedelta(minutes=10)
"""So long a rank tries to reach the one that serves, and waits for an answer."""


def meet() -> Store:
    """Reads `RANK`, `MASTER_ADDR`, `MASTER_PORT`, as torchrun or a script sets them. The first rank
    serves, unless torchrun's agent does, whose store outlives its processes: each start has names
    of its own there. Waits for nobody but the server."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not has_agent,
        wait_for_workers=False,
        timeout=PATIENCE,
    )
    return PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
