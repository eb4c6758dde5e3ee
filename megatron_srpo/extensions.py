"""What does a name in the config stand for: a part of this package, or one in a file of yours?

resets: self                      the package's own
resets: my_rules.py:LastThought   LastThought of the file my_rules.py
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from megatron_srpo.types import InputError

T = TypeVar("T")


def find(name: str, known: Mapping[str, T], *, key: str) -> T:
    """`known[name]`, or what FILE.py:NAME stands for; a path starts in the working folder.

    Raises `InputError`; `key` is the config field. An exception of the file's own code passes.
    """
    if name in known:
        return known[name]
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py"):
        raise InputError(f"{key}={name}: must be one of {', '.join(known)}, or FILE.py:NAME")
    if not Path(file).is_file():
        raise InputError(f"{key}={name}: no such file: {file}")
    if not Path(file).stem.isidentifier():
        raise InputError(f"{key}={name}: {Path(file).name} is no name that Python can import")
    found = getattr(_module(Path(file).resolve(), f"{key}={name}"), attribute, None)
    if not callable(found):
        raise InputError(f"{key}={name}: {file} defines no function or class {attribute!r}")
    return cast(T, found)


def build(
    name: str, known: Mapping[str, Callable[..., Any]], role: type[T], *arguments: Any, key: str
) -> T:
    """An object of the class that `find` finds. `InputError` if it does not keep its protocol."""
    make = find(name, known, key=key)
    try:
        inspect.signature(make).bind(*arguments)
    except TypeError as error:
        given = ", ".join(type(argument).__name__ for argument in arguments)
        raise InputError(f"{key}={name}: cannot be built with ({given}): {error}") from error
    built = make(*arguments)
    if not isinstance(built, role):
        raise InputError(f"{key}={name}: lacks the methods of protocols.{role.__name__}")
    return built


def _module(path: Path, where: str) -> ModuleType:
    """The file as a module; it may import what lies beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except (ImportError, SyntaxError) as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error
    if module.__file__ != str(path):
        raise InputError(f"{where}: Python knows another module {path.stem!r}: rename the file")
    return module
