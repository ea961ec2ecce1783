"""What calibration shows to be no case for 8 bits: group id -> why it shall stay float. `placement.py` says what follows from that for its neighbours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.observers import result_db, sqnr_db
from qcompiler.numerics.recurrence import STATE_LIMITS
from qcompiler.numerics.spec import QParams
from qcompiler.passes.groups import Group
from qcompiler.passes.trained import Trained
from qcompiler.passes.unary import Unary
from qcompiler.plan.placement import Placer
from qcompiler.plan.statistics import Statistics

_APART = 10.0  # quantities whose magnitudes differ by more share no scale at the end of a network
_SOUND, _AMPLIFIED, _BESIDE = 40.0, 3.0, 9.0  # dB, of a function's result: enough; less than its argument has; less than its own rounding leaves
_SLACK = 1.01  # a state that was rounded may lie a little beyond its bound


class Unsuited:
    """wide: the values that a network's attributes give 16 bits."""

    def __init__(self, placer: Placer, statistics: Statistics, trained: Trained, wide: frozenset[str]) -> None:
        self._groups, self._made_by, self._readers = placer.groups, placer.made_by, placer.readers
        self._statistics, self._trained, self._wide = statistics, trained, wide

    def unbounded(self) -> dict[str, str]:
        """group id -> why it stays float: it reads or makes what no scale can state."""
        touching = {g.id: next((v for v in (*g.operands, g.id) if v in self._statistics.table.unbounded), None) for g in self._groups}
        found = {name: f"value '{value}' was infinite in the calibration data, or as good as that (a mask)" for name, value in touching.items() if value}
        for group in self._groups:
            if group.kind == "recurrence" and (why := self._beyond(group)):
                found[group.id] = why
        return found

    def steep(self) -> dict[str, str]:
        """group id -> why it stays float: a function of one tensor that makes much of the rounding of its argument, as a sine of many periods does, and what
        computes that argument, as far as it is light: products hand their sums out in float32."""
        found: dict[str, str] = {}
        for group in self._groups:
            if group.function is None or group.reason or group.inputs[0] in self._wide or not self._statistics.table.values or self._trained.keeps_float:
                continue
            argument, result = self._statistics.of(group.inputs[0]), self._statistics.of(group.id)
            before, own = (sqnr_db(h, QParams.from_range(h.low, h.high)) for h in (argument, result))
            after = self._result_db(group.function, argument)
            if after < min(_SOUND, before - _AMPLIFIED, own - _BESIDE):
                found[group.id] = f"8 bits of its argument would leave {after:.0f} dB of its result"
                makers = [self._made_by[v] for v in group.inputs if v in self._made_by]
                while makers:
                    maker = makers.pop()
                    if (maker.traits.light or maker.traits.moves) and maker.id not in found:
                        found[maker.id] = f"8 bits of it would leave {after:.0f} dB of '{group.id}'"
                        makers += [self._made_by[v] for v in maker.operands if v in self._made_by]
        return found

    def _result_db(self, function: Unary, argument: Histogram) -> float:
        """What 8 bits of its argument leave of a function's result under the best of some ranges: one that saturates is better off with a part of it."""
        ranges = [QParams.from_range(argument.low / part, argument.high / part) for part in (1, 2, 4, 8, 16)]
        return self._statistics.once((str(function.expression), argument.digest), lambda: max(result_db(function, argument, params) for params in ranges))

    def _beyond(self, group: Group) -> str | None:
        """Why the initial state or cell of a recurrent layer is more than its integers hold."""
        given = iter(group.plain)
        for what, limit, known in zip(("state", "cell"), STATE_LIMITS, group.attrs["rest"], strict=False):
            reach = float(np.abs(known).max(initial=0.0)) if isinstance(known, np.ndarray) else self._statistics.reach(next(given))
            if reach > limit * _SLACK:
                return f"its initial {what} reaches {reach:.4g}; integers hold up to {limit:g}"
        return None

    def parted(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """group id -> why it shall stay float, of concatenations at the end of the network whose operands differ in magnitude by more than `_APART`: under one
        scale the smaller ones would be lost, and nothing in 8 bits reads them. reasons: of the groups that are float anyway."""
        ends: set[str] = set()  # values that only outputs read, or float operators, or what moves them there
        for value in reversed(self._readers):
            if all(g.id in reasons or (g.traits.moves and g.id in ends) for g in self._readers[value]):
                ends.add(value)
        found = {}
        for group in self._groups:
            if not group.traits.joins or group.id in reasons or group.id not in ends or any(v in self._trained.values for v in (*group.inputs, group.id)):
                continue
            reach = [max(-h.low, h.high) for v in group.inputs if (s := self._statistics.table.values.get(v)) is not None for h in [s.histogram]]
            if len(reach) == len(group.inputs) and max(reach) > _APART * min(reach) > 0:
                found[group.id] = f"its operands reach from {min(reach):.3g} to {max(reach):.3g}, and each keeps a scale of its own on the way out"
        return found
