"""Kernels that run on every target: generic vectors, no intrinsics of any one ISA. Importing this package registers them."""

from qcompiler.schedules.portable import attention, conv, elementwise, embedding, matmul, movement, normalization, ordered, pixels, pool, resize, weight_only

__all__ = ["attention", "conv", "elementwise", "embedding", "matmul", "movement", "normalization", "ordered", "pixels", "pool", "resize", "weight_only"]
