"""x86 kernels: importing this package registers their rows, best first."""

from importlib import import_module as _import_module

for _name in ("depthwise", "amx", "conv", "attention", "recurrence"):  # a depthwise convolution is a grouped one too, but a slow one
    _import_module(f"{__name__}.{_name}")
