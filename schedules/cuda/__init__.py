"""Kernels for NVIDIA GPUs: importing this package registers their rows, best first."""

from importlib import import_module as _import_module

_NAMES = "depthwise conv direct pool matmul_mma matmul rows attention_mma attention weight_only_mma weight_only recurrence"
for _name in _NAMES.split():
    _import_module(f"{__name__}.{_name}")
