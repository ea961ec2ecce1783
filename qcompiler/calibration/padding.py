"""Which positions of a sample count: those that the network's own masks don't hide from every query (`passes/padding.py`).

Statistics of values, means and ranges are taken of rows that count, and outputs are judged by them: what a network makes of padding is of no consequence,
and looks alike in all samples. The float network itself computes its masks, up to which it runs for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm

from qcompiler.base.errors import DataError
from qcompiler.passes.graph import Graph, shape_of
from qcompiler.passes.groups import find_groups
from qcompiler.passes.padding import Padded, leading, padded
from qcompiler.passes.realize.transformers import MASKED


@dataclass(frozen=True)
class Counted:
    """Of one sample. kept: value id -> bool [batch * positions], which rows count; all of what isn't there. ports: output name -> value id. hidden: how many
    positions don't count."""

    kept: Mapping[str, np.ndarray] = field(default_factory=dict)
    ports: Mapping[str, str] = field(default_factory=dict)
    hidden: int = 0

    def rows(self, value_id: str, array: np.ndarray) -> np.ndarray:
        """The part of a value that counts, [rows, ...]; the array itself where all of it does."""
        kept = self.kept.get(value_id)
        axes = None if kept is None else leading(array.shape, len(kept))
        return array if kept is None or axes is None else array.reshape(len(kept), *(array.shape[axes:] or (1,)))[kept]

    def part(self, value_id: str, array: np.ndarray) -> np.ndarray:
        """`rows` with at least as many axes as the value has."""
        rows = self.rows(value_id, array)
        return rows.reshape((1,) * (array.ndim - rows.ndim) + rows.shape)

    def output(self, name: str, array: np.ndarray) -> np.ndarray:
        """The `part` of an output."""
        return self.part(self.ports.get(name, name), array)

    def mask(self, name: str, array: np.ndarray) -> np.ndarray:
        """bool, of an output's shape: which elements count."""
        return self._cleared(self.ports.get(name, name), np.ones(array.shape, bool))

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The network's outputs by name, with zeros where nothing counts, so that no sum takes it in."""
        return {name: self._cleared(self.ports.get(name, name), array) for name, array in arrays.items()}

    def _cleared(self, value_id: str, array: np.ndarray) -> np.ndarray:
        kept = self.kept.get(value_id)
        if kept is None or (axes := leading(array.shape, len(kept))) is None:
            return array
        return np.where(kept.reshape(*array.shape[:axes], *[1] * (array.ndim - axes)), array, np.zeros((), array.dtype))


ALL = Counted()
"""Everything counts."""


class _Form:
    """A canonical float module at one shape of its inputs."""

    def __init__(self, module: tvm.IRModule) -> None:
        graph = Graph.of(module)
        self.inputs = {str(p.name): shape_of(p) for p in graph.inputs}
        self.sets: list[Padded] = padded(module)
        biases = {b for each in self.sets for b in each.biases}
        self._shapes = {name: shape for name, shape in self.inputs.items() if name in biases} | {n: shape_of(e) for n, e in graph.bindings if n in biases}
        self.ports = {name: str(v.name) for name, v in graph.outputs}
        self._views = {g.id: g.inputs[0] for g in find_groups(module) if g.traits.views}

    def biases(self, context: Any) -> list[list[np.ndarray]]:
        """The masks of each set, [B or 1, H or 1, S or 1, T], as the float network computes them."""
        at = {value: i for i, s in enumerate(context.manifest["steps"]) for value in (s["id"], *s.get("more", ()))}
        source = {b: self._source(b, at) for each in self.sets for b in each.biases}
        done, found = 0, dict[str, np.ndarray]()
        for value in sorted(set(source.values()), key=lambda v: at.get(v, -1)):
            end = at.get(value, -1) + 1  # an input is there already
            context.run(done, end)
            done, found[value] = max(done, end), context.inputs()[value] if end == 0 else context.value(value)
        return [[found[source[b]].reshape(self._shapes[b]) for b in each.biases] for each in self.sets]

    def _source(self, value: str, at: Mapping[str, int]) -> str:
        """What a view, which no step computes, is a view of."""
        while value not in at and value in self._views:
            value = self._views[value]
        return value


class Padding:
    """The positions that the masks of a canonical float module, given at each of its shapes, can hide. False where there are none."""

    def __init__(self, *modules: tvm.IRModule) -> None:
        self._forms = [_Form(module) for module in modules]

    @property
    def sets(self) -> list[Padded]:
        """Those at the first shape."""
        return self._forms[0].sets

    def __bool__(self) -> bool:
        return bool(self.sets)

    def of(self, twin: Any, sample: Mapping[str, np.ndarray]) -> Counted:
        """What counts of one sample. twin: the `Session` of the float network. Raises DataError where nothing does."""
        form = next((f for f in self._forms if all(f.inputs[name] == array.shape for name, array in sample.items() if name in f.inputs)), self._forms[0])
        if not form.sets:
            return ALL
        kept, hidden = dict[str, np.ndarray](), 0
        for each, biases in zip(form.sets, form.biases(twin.new_context(dict(sample))), strict=True):
            seen = np.zeros((each.batch, each.positions), bool)
            for bias in biases:
                seen |= (bias > MASKED).any(axis=(1, 2))
            if not seen.any():
                names = " and ".join(f"'{name}'" for name in each.sources)
                raise DataError(f"every position is padding: the mask computed from {names} hides all {each.positions} of them; leave this sample out")
            if not seen.all():
                kept |= dict.fromkeys(each.values, seen.reshape(-1))
                hidden += int((~seen).sum())
        return Counted(kept, form.ports, hidden)
