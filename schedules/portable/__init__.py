"""Kernels that run on every target: generic vectors, no intrinsics of any one ISA. Importing this package registers them."""

from importlib import import_module as _import_module

for _name in (
    *("attention", "conv", "elementwise", "embedding", "matmul", "movement", "normalization", "ordered", "pixels", "pool"),
    *("recurrence", "resample", "resize", "weight_only"),
):
    _import_module(f"{__name__}.{_name}")
