"""Rows for convolution and dense layers on ARM. A target lists the ISAs it allows, best first; float has one row per architecture."""

from qcompiler.schedules.arm import isa
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.table import register

for _kind in ("conv2d", "dense"):
    for _unit in (isa.I8MM, isa.DOTPROD, isa.NEON, isa.NEON32):
        register(f"qc.{_kind}", ConvRow(f"qc.{_kind}", _unit, _unit.name))
    for _unit in (isa.FLOAT, isa.FLOAT32):
        register(f"qc.f32.{_kind}", ConvRow(f"qc.f32.{_kind}", _unit, _unit.name))
