"""A YAML file and dotted overrides <-> `Config`.

A key that does not exist is an error that names the nearest right one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from megatron_srpo.config import Config
from megatron_srpo.config_sections import Section
from megatron_srpo.types import InputError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """YAML file, then `section.key=value` overrides.

    Raises `InputError` with one line for everything that is wrong with them.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r}: must look like section.key=value")
    try:
        tree = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise InputError(f"{path}: must be a mapping of keys to values")
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:  # one without a number is OmegaConf's, about a lone number
        reason = error.strerror or "must be a mapping of keys to values"
        raise InputError(f"{path}: {reason}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    _refuse_unknown_keys(values, path)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        given = "" if isinstance(first["input"], Mapping | Section) else f"={first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}{given}: {message}") from error


def dump_config(cfg: Config) -> str:
    """The resolved config as YAML, every default written out."""
    # `${` is an interpolation unless a backslash stands before it; two of those stand for one.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\\\${", cfg.model_dump_json())
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(escaped)))


def field_names(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields; * stands for a name that the user gives a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := _section_of(field.annotation):
            is_named = get_origin(field.annotation) is dict
            yield from field_names(inner, f"{prefix}{name}.*." if is_named else f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _refuse_unknown_keys(
    values: dict[Any, Any], path: Path, prefix: str = "", pattern: str = ""
) -> None:
    """`prefix` is what the user wrote, `pattern` the same in terms of `field_names`."""
    known = list(field_names())
    is_named = any(field.startswith(f"{pattern}*.") for field in known)
    for key, value in values.items():
        name = f"{prefix}{key}"
        field = f"{pattern}*" if is_named else f"{pattern}{key}"
        if not is_named and field not in known:
            # A right last part in the wrong section is the commonest slip.
            near = [k for k in known if k.split(".")[-1] == str(key)]
            near += difflib.get_close_matches(field, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path}: unknown key {name!r}{hint}")
        if isinstance(value, dict):
            _refuse_unknown_keys(cast(dict[Any, Any], value), path, f"{name}.", f"{field}.")
