"""x86 kernels: importing this package registers their rows, best first."""

from qcompiler.schedules.x86 import conv as conv
