"""Recurrent layers by the dot steps of ARM. The matrix instruction wants two rows of a batch; SDOT serves where it is there too."""

from qcompiler.schedules.arm import isa
from qcompiler.schedules.portable.recurrence import RecurrenceRow
from qcompiler.schedules.table import register

for _unit in (isa.DOTPROD, isa.NEON, isa.NEON32):
    register("qc.recurrence", RecurrenceRow(f"{_unit.name}/recurrence", _unit.name, _unit))
