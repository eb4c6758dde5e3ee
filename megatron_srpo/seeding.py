"""Seeds are counters: what is drawn depends on who asks, not on what was drawn before.

So resume, replay and another number of replicas do not change a run's random choices.
"""

from __future__ import annotations

import hashlib


def counter_seed(*who: int | str) -> int:
    """63 bits from the words that name a draw, e.g. (run seed, step, prompt id, stage, index).

    >>> counter_seed(0, 1, "a") == counter_seed(0, 1, "a") != counter_seed(0, 11, "a")
    True
    """
    digest = hashlib.blake2b(repr(who).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
