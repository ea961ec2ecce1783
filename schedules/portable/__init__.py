"""Kernels that run on every target: generic vectors, no intrinsics of any one ISA. Importing this package registers them."""

from qcompiler.schedules.portable import conv, elementwise, matmul, movement, pool, resize, weight_only

__all__ = ["conv", "elementwise", "matmul", "movement", "pool", "resize", "weight_only"]
