"""What the machine we stand on is."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def host_features() -> frozenset[str] | None:
    """CPU features of this machine as the kernel reports them ("flags" on x86, "Features" on Arm), less the AMX tiles that it gives to no process. None where
    it reports those of another kind of machine, as to a process under emulation."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    ours = "flags" if host_architecture() in ("x86_64", "i686") else "Features"
    found = next((value for key, _, value in (line.partition(":") for line in lines) if key.strip() == ours), None)
    if found is None:
        return None
    features = frozenset(found.split())
    return features if "amx_tile" not in features or _tiles_are_given() else features - {"amx_tile"}


_ARCH_PRCTL, _GET_SUPPORTED, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1021, 0x1023, 18  # Linux: asm/unistd_64.h, asm/prctl.h, the state component


def _arch_prctl(code: int, argument: Any) -> int:
    """What Linux says of a request about this x86 process: 0, or the number of the error."""
    return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, code, argument) else 0


def _tiles_are_given() -> bool:
    supported = ctypes.c_uint64()
    return _arch_prctl(_GET_SUPPORTED, ctypes.byref(supported)) == 0 and bool(supported.value >> _TILE_DATA & 1)


def request_tiles() -> int:
    """Ask Linux for AMX tiles in this process, as runtime/cpp/qc_threads.c does: 0, or the number of the error."""
    return _arch_prctl(_REQUEST_PERMISSION, _TILE_DATA)


def host_architecture() -> str:
    machine = platform.machine()
    return {"amd64": "x86_64", "arm64": "aarch64", "armv7l": "armv7a"}.get(machine.lower(), machine)
