"""Are the arguments of a public function of the types that its signature states? One sentence where one is not, before anything is done."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])


def fits(value: Any, wanted: Any) -> bool:
    """Is `value` of the type `wanted`, numbers of numpy and the elements of mappings and sequences included? Of other iterables, which may be read only once,
    and of protocols that can't be asked, what is inside is left to whoever reads them."""
    if wanted is Any:
        return True
    if wanted in (None, types.NoneType):
        return value is None
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, kind) for kind in inside)
    if wanted in (int, float):
        kinds = (int, np.integer) if wanted is int else (int, float, np.integer, np.floating)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if origin is collections.abc.Sequence:
        listed = isinstance(value, (collections.abc.Sequence, np.ndarray, collections.abc.Set)) and not isinstance(value, (str, bytes))
        return listed and all(fits(item, inside[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    kind = origin or wanted
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(value, kind)


def spelled(kind: Any) -> str:
    """A type as its source says it, without module names."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " | ".join(spelled(k) for k in typing.get_args(kind))
    if kind is types.NoneType:
        return "None"
    if typing.get_origin(kind) is collections.abc.Callable:
        *taken, returned = typing.get_args(kind)
        return f"Callable[[{', '.join(map(spelled, taken[0] if len(taken) == 1 and isinstance(taken[0], list) else taken))}], {spelled(returned)}]"
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    for module in ("collections.abc.", "typing.", "os.", "qcompiler.calibration.preprocess.", "numpy."):
        text = text.replace(module, "")
    return text


def check(where: str, name: str, value: Any, wanted: Any) -> None:
    """Raises TypeError unless an argument is of the type that is wanted. where: what takes it, such as "verify()"."""
    if not fits(value, wanted):
        raise TypeError(f"{where}: {name} is {value!r:.60}, {_article(type(value).__name__)}; expected {spelled(wanted)}")


def _article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def checks_arguments(function: F) -> F:
    """A decorator: TypeError for an argument that is not of the type of its annotation. Keyword arguments that the function takes as `**name` are its own.
    Inside of it numpy does not warn of overflow."""
    signature = inspect.signature(function)
    name = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def types_of() -> dict[str, Any]:
        hints = typing.get_type_hints(function)
        loose = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        return {k: v for k, v in hints.items() if k != "return" and k not in loose}

    @functools.wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*positional, **named).arguments
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        for key, wanted in types_of().items():
            if key in given:
                check(f"{name}()", key, given[key], wanted)
        with np.errstate(over="ignore", invalid="ignore"):  # a network's numbers may be infinite; what becomes of them is judged, and said in words
            return function(*positional, **named)

    return typing.cast(F, call)
