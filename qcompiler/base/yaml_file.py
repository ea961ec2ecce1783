"""Reading small YAML files that people write: settings and targets."""

from __future__ import annotations

import os
from typing import Any

import yaml

from qcompiler.base.files import read_regular

_LIMIT = 1 << 16  # bytes: a file of settings has a few hundred
_DEPTH = 50
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads ten times as fast


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The document in a file. Raises ValueError, with the reason in one line, when it can't be read, is no YAML, is too large or nested too deeply, or
    uses aliases (a few lines of them can stand for more than fits into memory)."""
    try:
        data = read_regular(path)
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or error}") from error
    if len(data) > _LIMIT:
        raise ValueError(f"is too large: {len(data)} bytes, at most {_LIMIT} are supported")
    depth, too_deep = 0, "is nested too deeply"
    try:
        for event in yaml.parse(data, _LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH or isinstance(event, yaml.AliasEvent):
                break
        else:
            return yaml.load(data, _LOADER)
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:  # dates and numbers are converted as they come
        reason = " ".join(str(error).split())
        raise ValueError(too_deep if "nesting depth" in reason else f"can't be read as YAML: {reason}") from error  # libyaml reads ahead to its own limit
    raise ValueError(too_deep if depth > _DEPTH else "uses an alias (*name); write the value out where it is used")
