"""Which names may a program use that it does not define?   those that LiveCodeBench imports for it

Its answers are written for judges that import much of the standard library. Here only what a
program could mean is imported: a program is started for every test.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import re

MODULES = (
    *("typing", "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math"),
    *("random", "statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
"""Of a name that several have, the last one's is meant; of a module's own name, the module."""
WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def prelude(program: str) -> str:
    """Imports of all names in a program, also in its comments and strings, that are somebody's.

    >>> prelude("print(heappop(queue), math.pi)")
    'import math\\nfrom heapq import heappop\\nfrom math import pi\\n'
    """
    words = set(WORD.findall(program))
    lines = [f"import {module}\n" for module in sorted(words.intersection(MODULES))]
    homes = _homes()
    lines += [f"from {homes[word]} import {word}\n" for word in sorted(words & homes.keys())]
    return "".join(lines)


@functools.cache
def _homes() -> dict[str, str]:
    """Public name: module. A name that is built in is not replaced, nor is a module's."""
    homes: dict[str, str] = {}
    for module in MODULES:
        names = vars(importlib.import_module(module))
        public = names.get("__all__") or [name for name in names if not name.startswith("_")]
        homes |= dict.fromkeys(public, module)
    taken = {*dir(builtins), *MODULES}
    return {name: module for name, module in homes.items() if name not in taken}
