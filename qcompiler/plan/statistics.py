"""What a calibration table says of the values of a network, for one plan after another."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from qcompiler.base.errors import PlanError
from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.table import CalibrationTable
from qcompiler.passes.groups import Group

Found = TypeVar("Found")


class Statistics:
    """made_by: group id -> group."""

    def __init__(self, table: CalibrationTable, made_by: Mapping[str, Group]) -> None:
        self.table, self._made_by = table, made_by

    def of(self, value: str) -> Histogram:
        """Raises PlanError for a value that the table does not know."""
        while value not in self.table.values and value in self._made_by and self._made_by[value].kind == "reshape":
            value = self._made_by[value].inputs[0]  # another view of the same elements, which no step computes
        if value not in self.table.values:
            raise PlanError(f"value '{value}' has no statistics in the calibration table, which was made for another model or other values; calibrate again")
        return self.table.values[value].histogram

    def reach(self, value: str) -> float:
        """The greatest magnitude of a value in the calibration data; 0 without any."""
        if not self.table.values:
            return 0.0
        histogram = self.of(value)
        return max(-histogram.low, histogram.high)

    def once(self, of: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` finds, or what it found of the same before: plan after plan is made of a table, and tables have values in common."""
        if of not in self.table.asked:
            self.table.asked[of] = find()
        found: Found = self.table.asked[of]
        return found
