"""The shapes that a library was compiled for: which one fits an input, and arrays padded to it. The C runtime does the same (runtime/cpp/qc_shapes.h).

An axis *varies* when it is not equally long at all shapes. Axes with the same lengths at every shape are of one *kind* (the tokens of ids, of their mask
and of the result, say): an array that is padded along one of them is padded along all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.tensor import TensorInfo

Shapes = Mapping[str, tuple[int, ...]]  # input name -> shape
REPEAT = "repeat"  # the pad rule that repeats the last slice; any other is a number


def specializations(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest of each shape, as that of a library for it alone would be. A library for one shape has one."""
    first = {k: v for k, v in manifest.items() if k != "shapes"}
    return [first, *({**first, **entry} for entry in manifest.get("shapes", []))]


def ports(described: Sequence[Mapping[str, Any]]) -> list[TensorInfo]:
    """`inputs` or `outputs` of a manifest."""
    return [TensorInfo(p["name"], tuple(p["shape"]), p["dtype"]) for p in described]


def spelled(shapes: Shapes) -> str:
    """Shapes for people: "ids [1, 16], mask [1, 16]"."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def of_inputs(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The input shapes of one shape's manifest."""
    return {p["name"]: tuple(p["shape"]) for p in manifest["inputs"]}


def chosen_shapes(manifest: Mapping[str, Any], rows: Sequence[Shapes]) -> list[int]:
    """The numbers of the shapes that one of `rows` names, each by the shapes of some inputs. Raises DataError where there is none."""
    every = [of_inputs(m) for m in specializations(manifest)]
    found = [i for i, shapes in enumerate(every) if any(all(shapes.get(name) == shape for name, shape in row.items()) for row in rows)]
    if not found:
        raise DataError(f"{'; '.join(map(spelled, rows))}: the library was compiled for {'; '.join(map(spelled, every))}")
    return found


def kinds(all_shapes: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], int]:
    """("inputs" or "outputs", port, axis) -> number of its kind, from 1 on, of every axis that varies. all_shapes: their manifests."""
    numbers: dict[tuple[int, ...], int] = {}
    found = {}
    for what in ("inputs", "outputs"):
        for index, port in enumerate(all_shapes[0][what]):
            for axis in range(len(port["shape"])):
                lengths = tuple(int(m[what][index]["shape"][axis]) for m in all_shapes)
                if len(set(lengths)) > 1:
                    found[what, str(port["name"]), axis] = numbers.setdefault(lengths, len(numbers) + 1)
    return found


class Fitting:
    """Chooses among the shapes of a library. `manifest`: the whole library's."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.all = specializations(manifest)
        self.inputs = [of_inputs(m) for m in self.all]
        self._exact = {tuple(shapes.values()): i for i, shapes in reversed(list(enumerate(self.inputs)))}
        self.kinds = kinds(self.all)
        self.rules: dict[str, Any] = dict(manifest.get("padding", {}))

    def exact(self, given: Shapes) -> int | None:
        """The number of the compiled shape that `given`, the shapes of all inputs, is; None: none."""
        return self._exact.get(tuple(given.get(name, ()) for name in self.inputs[0]))

    def padded(self, given: Shapes) -> int | None:
        """The number of the compiled shape to which `given` is padded with least work; None: there is none, or no rule allows it."""
        lengths = self._lengths(given)
        if lengths is None:
            return None
        allowed = {k for k in lengths if all(port in self.rules for (what, port, _), kind in self.kinds.items() if what == "inputs" and kind == k)}
        best: list[tuple[float, int]] = []
        for index, shapes in enumerate(self.inputs):
            there = {self.kinds["inputs", name, axis]: d for name, axis, d in _axes(shapes) if ("inputs", name, axis) in self.kinds}
            if all(there[k] == n or (there[k] > n and k in allowed) for k, n in lengths.items()):
                best.append((float(np.prod([there[k] / n for k, n in lengths.items()])), index))
        return min(best)[1] if best else None

    def _lengths(self, given: Shapes) -> dict[int, int] | None:
        """Number of a kind -> how long its axes are in `given`; None where `given` contradicts itself or could never be this library's."""
        found: dict[int, int] = {}
        if any(len(given.get(name, ())) != len(shape) for name, shape in self.inputs[0].items()):
            return None
        for name, axis, there in _axes(self.inputs[0]):
            length, kind = given[name][axis], self.kinds.get(("inputs", name, axis))
            if length < 1 or (kind is None and length != there) or (kind is not None and found.setdefault(kind, length) != length):
                return None
        return found

    def pad(self, name: str, array: np.ndarray, index: int) -> np.ndarray:
        """`array` as long as input `name` is at a compiled shape."""
        widths = [(0, there - here) for here, there in zip(array.shape, self.inputs[index][name], strict=True)]
        rule = self.rules[name] if any(after for _, after in widths) else 0
        return np.pad(array, widths, "edge") if rule == REPEAT else np.pad(array, widths, constant_values=rule)

    def cut(self, name: str, array: np.ndarray, given: Shapes) -> np.ndarray:
        """What of output `name` belongs to inputs of the shapes `given`."""
        lengths = self._lengths(given)
        assert lengths is not None
        return array[tuple(slice(lengths.get(self.kinds.get(("outputs", name, axis), 0))) for axis in range(array.ndim))].copy()

    def refusal(self, given: Shapes) -> str:
        """Why no compiled shape fits."""
        known = "; ".join(spelled(shapes) for shapes in self.inputs)
        how = ", nor can it be padded to one" if self.rules else ""
        return f"{spelled(given)} is no shape that this library was compiled for{how}: {known}"


def like(inputs: Sequence[TensorInfo]) -> Fitting:
    """For a network at one shape."""
    return Fitting({"inputs": [vars(i) for i in inputs], "outputs": []})


def _axes(shapes: Shapes) -> Iterator[tuple[str, int, int]]:
    """(input, axis, length) of all axes."""
    return itertools.chain.from_iterable(((name, axis, d) for axis, d in enumerate(shape)) for name, shape in shapes.items())
