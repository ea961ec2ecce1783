"""What verbs have in common: the options of a compilation, made from their one table, and how words become values."""

from __future__ import annotations

import argparse
import collections.abc
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qcompiler.base.errors import ModelError
from qcompiler.base.shape_table import parse_shape
from qcompiler.pipeline.options import ARGUMENTS, GROUPS, LISTS, OPTIONS, TYPES, Option
from qcompiler.runtime.shapes import REPEAT

QUANTIZING = ("network", "recipe", "kernels", "work")
"""Groups of options of every verb that quantizes."""


def common_options(p: argparse.ArgumentParser, default: Any = False) -> None:
    """Options of every verb."""
    p.add_argument("--json", action="store_true", default=default, help="print the result as one JSON object instead of tables")
    p.add_argument("-q", "--quiet", action="store_true", default=default, help="no progress and no summary: only warnings, errors, and JSON where asked for")
    p.add_argument("--verbose", action="store_true", default=default, help="a line when a stage begins and ends, also on a terminal, and lists in full")


def add_model(p: argparse._ActionsContainer, *names: str) -> None:
    """The arguments `model`, `target` and `calibration`, or those of them that are named."""
    for name in names or ARGUMENTS:
        option = ARGUMENTS[name]
        if name == "model":
            p.add_argument(name, metavar="MODEL", help=option.help)
        else:
            p.add_argument(f"--{name}", default=option.default, metavar=option.metavar, help=_escaped(option))


def add_options(p: argparse.ArgumentParser, groups: Iterable[str], without: Iterable[str] = ()) -> None:
    """The options of some groups (`GROUPS`)."""
    for group in groups:
        names = [n for n, o in OPTIONS.items() if o.group == group and n not in without and (o.metavar or TYPES[n] is bool)]
        title, what = GROUPS[group]
        container = p.add_argument_group(title, what.replace("%", "%%") or None) if names else p
        for name in names:
            _add(container, name, OPTIONS[name])


def _add(p: argparse._ActionsContainer, name: str, option: Option) -> None:
    settings: dict[str, Any] = {"dest": name, "help": _escaped(option)}
    if TYPES[name] is bool:
        p.add_argument(option.flag, action="store_true", **settings)
        return
    kinds = {typing.get_origin(k) or k for k in typing.get_args(TYPES[name]) or (TYPES[name],)}
    settings["metavar"] = option.metavar
    if name in LISTS or (collections.abc.Mapping in kinds and name in _WORDS):
        settings |= {"action": "append", "default": [], "help": f"{settings['help']}; repeat for more"}
    if name == "outputs":
        settings |= {"action": "extend", "nargs": "+", "help": _escaped(option)}
    if option.choices:
        settings |= {"choices": option.choices, "default": option.default, "metavar": None}
    read = _WORDS.get(name) or (float if float in kinds else int if int in kinds else str)
    p.add_argument(option.flag, type=read, **settings)


def _escaped(option: Option) -> str:
    return option.help.replace("%", "%%")


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as keyword arguments."""
    found = {}
    for name, option in OPTIONS.items():
        value = getattr(options, name, None)
        if value is not None and value != [] and value != option.default:
            found[name] = once(option, value) if isinstance(value, list) and name not in LISTS else value
    return found


def once(option: Option, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{input: value} of an option that is given for each input. Raises ModelError for an input that is named twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ModelError(f"{option.flag} {name} is given twice")
        found[name] = value
    return found


def read_files(options: argparse.Namespace) -> Iterator[str | Path]:
    """The files and folders that a command reads."""
    from qcompiler.importers.origin import files_of

    for name in ("model", "library", "calibration", "data", "preprocess", "labels", "tuning_log", "targets_file", "shapes"):
        if given := getattr(options, name, None):
            yield from files_of(given) if name == "model" else [given]
    yield from (path for _, path in getattr(options, "input", ()))


# -- words --------------------------------------------------------------------------------------------------------------------------------------


def shape(text: str) -> tuple[str, tuple[int, ...] | list[tuple[int, ...]]]:
    """NAME=1,3,224,224 or NAME=1,{16,32}"""
    try:
        name, found = parse_shape(text)
        return name, found[0] if len(found) == 1 else found
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def input_value(text: str) -> tuple[str, str]:
    """NAME=16000"""
    name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=16000 or NAME=1,2,3")
    return name, value


def typed(text: str) -> tuple[str, str]:
    """NAME=TYPE"""
    name, equals, dtype = text.rpartition("=")
    if not (name and equals and dtype):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=TYPE, such as image=uint8")
    return name, dtype


def kept(text: str) -> tuple[str, str]:
    """INPUT=OUTPUT"""
    name, equals, output = text.partition("=")
    if not (name and equals and output):
        raise argparse.ArgumentTypeError(f"{text!r}: expected INPUT=OUTPUT, such as h=hn")
    return name, output


def pad_rule(text: str) -> tuple[str, float | str]:
    """NAME=0 or NAME=repeat"""
    name, _, value = text.rpartition("=")
    try:
        rule = value if value == REPEAT else float(value)
    except ValueError:
        name, rule = "", 0.0
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=0 or NAME={REPEAT}")
    return name, rule


def duration(text: str) -> float:
    """Seconds of "90", "90s", "20m" or "1.5h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a duration such as 90s, 20m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def pair(text: str) -> tuple[str, str]:
    """NAME=FILE"""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE")
    return name, value


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return int(text)


_WORDS: dict[str, Any] = {
    **{"input_shapes": shape, "pad": pad_rule, "input_values": input_value, "input_types": typed, "output_types": typed, "state": kept},
    "time_budget": duration,
}
