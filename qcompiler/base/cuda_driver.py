"""The NVIDIA driver and GPU of this machine, asked through ctypes; nothing of the CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """The first GPU that the driver shows. `capability` is 86 for compute capability 8.6."""

    name: str
    capability: int


@functools.cache
def find_gpu() -> Gpu | str:
    """The GPU that CUDA libraries run on here, or in a few words why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "an NVIDIA driver"
    if driver.cuInit(0):
        return "an NVIDIA GPU"
    name, major, minor = ctypes.create_string_buffer(128), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), 0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_MINOR, 0)
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)
