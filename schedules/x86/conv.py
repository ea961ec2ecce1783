"""Rows for convolution and dense layers on x86. A target lists the ISAs it allows, best first; float layers have two widths."""

from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.conv_transposed import TransposedRow
from qcompiler.schedules.table import register
from qcompiler.schedules.winograd import WinogradRow
from qcompiler.schedules.x86 import isa

for _unit in (isa.AVX512, isa.AVX2):
    register("qc.conv2d", WinogradRow(_unit, _unit.name))
for _kind, _row in (("conv2d", ConvRow), ("dense", ConvRow), ("conv2d_transpose", TransposedRow)):
    for _unit in (isa.AVX512VNNI, isa.AVX512, isa.AVXVNNI, isa.AVX2):
        register(f"qc.{_kind}", _row(f"qc.{_kind}", _unit, _unit.name))
    for _unit, _name in ((isa.AVX512FMA, "x86-avx512vnni"), (isa.AVX512FMA, "x86-avx512"), (isa.AVX2FMA, "x86-avx2")):
        register(f"qc.f32.{_kind}", _row(f"qc.f32.{_kind}", _unit, _name))
