"""Recurrent layers by the dot steps of x86. Without VNNI by the form that takes any weights."""

from qcompiler.schedules.portable.recurrence import RecurrenceRow
from qcompiler.schedules.table import register
from qcompiler.schedules.x86 import isa

for _unit in (isa.AVX512VNNI, isa.AVX512, isa.AVXVNNI, isa.AVX2):
    register("qc.recurrence", RecurrenceRow(f"{_unit.name}/recurrence", _unit.name, _unit.forms[-1]))
