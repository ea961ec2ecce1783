"""ARM kernels, 64 and 32 bits: importing this package registers their rows, best first."""

from importlib import import_module as _import_module

for _name in ("depthwise", "conv", "recurrence"):  # a depthwise convolution is a grouped one too, but a slow one
    _import_module(f"{__name__}.{_name}")
