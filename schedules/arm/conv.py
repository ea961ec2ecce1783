"""Rows for convolution and dense layers on ARM. A target lists the ISAs it allows, best first; float has one row per architecture."""

from qcompiler.schedules.arm import isa
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.conv_transposed import TransposedRow
from qcompiler.schedules.table import register

for _kind, _row in (("conv2d", ConvRow), ("dense", ConvRow), ("conv2d_transpose", TransposedRow)):
    for _unit in (isa.I8MM, isa.DOTPROD, isa.NEON, isa.NEON32):
        register(f"qc.{_kind}", _row(f"qc.{_kind}", _unit, _unit.name))
    for _unit in (isa.FLOAT, isa.FLOAT32):
        register(f"qc.f32.{_kind}", _row(f"qc.f32.{_kind}", _unit, _unit.name))
