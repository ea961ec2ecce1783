"""Runs a compiled library from Python."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from qcompiler.artifact import read_manifest
from qcompiler.elf import read_section
from qcompiler.errors import ArtifactError, DataError, IncompatibleDevice, closest
from qcompiler.targets import host_architecture, host_features

_THREADS = threading.local()  # the pool's size as this thread last set it


@dataclass(frozen=True)
class TensorInfo:
    """Name, static shape and numpy dtype name of a network input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Context:
    """Memory of one run: a workspace, inputs and outputs. Contexts of one session share constants and code, not memory."""

    def __init__(self, session: Session, inputs: Mapping[str, np.ndarray]) -> None:
        self._session = session
        self._workspace = _aligned(session.manifest["workspace"] + 64)
        self._inputs = session.bind(inputs)
        self._outputs = session.empty_outputs()

    def run(self, begin: int, end: int) -> None:
        """Run steps [begin, end) of the manifest's list."""
        self._session.call(self._workspace, self._inputs, self._outputs, begin, end)

    def value(self, value_id: str) -> np.ndarray:
        """A copy of a value as its last step left it: float32, or canonical int8. Raises KeyError for an unknown id."""
        return self._session.fetch(value_id, self._workspace, self._inputs, self._outputs).copy()

    def outputs(self) -> dict[str, np.ndarray]:
        """Network outputs by name."""
        return {o.name: a for o, a in zip(self._session.outputs, self._outputs, strict=True)}


class Session:
    """A loaded library. One call at a time per session; any number of sessions in any threads.

    `threads` bounds the threads of one call. Inputs may have any alignment and strides; outputs are fresh arrays.

    Raises ArtifactError for a file that is damaged or not ours, IncompatibleDevice when this machine lacks an instruction set it needs.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self.path = Path(path)
        if threads < 1:
            raise DataError(f"threads is {threads}; at least 1 is needed")
        self.threads = threads
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self._check_device()
        try:
            self._handle = ctypes.CDLL(str(self.path.resolve()))
            self._constants = ctypes.addressof(ctypes.c_char.in_dll(self._handle, "qc_constants"))
            self._run = _load_module(str(self.path.resolve()))["qc_run"]
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"{self.path}: can't be loaded: {error}") from error
        self.inputs = [TensorInfo(p["name"], tuple(p["shape"]), p["dtype"]) for p in self.manifest["inputs"]]
        self.outputs = [TensorInfo(p["name"], tuple(p["shape"]), p["dtype"]) for p in self.manifest["outputs"]]
        self._workspace = _aligned(self.manifest["workspace"] + 64)
        self._mutable: np.ndarray | None = None
        self._lock = threading.Lock()

    def _check_device(self) -> None:
        architecture = read_section(self.path, ".qc.manifest")[1]
        if architecture != host_architecture():
            raise IncompatibleDevice(f"{self.path}: compiled for {architecture} ({self.manifest['target']}), this machine is {host_architecture()}")
        missing = [f for f in self.manifest["features"] if f not in host_features()]
        if missing:
            raise IncompatibleDevice(
                f"{self.path}: compiled for {self.manifest['target']}, which needs the CPU features {', '.join(missing)}, and this CPU lacks them; "
                "compile again with --target native on this machine, or for a more portable target")

    # -- running --------------------------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the network on {input name: array}; returns {output name: fresh array}.

        Raises DataError for a missing or unknown name, a wrong shape or a wrong dtype.
        """
        bound, outputs = self.bind(inputs), self.empty_outputs()
        with self._lock:
            self.call(self._workspace, bound, outputs, 0, len(self.manifest["steps"]))
        return {o.name: a for o, a in zip(self.outputs, outputs, strict=True)}

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        """Run step by step, calling `visit(value id, array)` after each step that computes a value of the model.

        Arrays are float32, or canonical int8, in NHWC, and valid only during the call. Network inputs are visited first. Returns the outputs.
        """
        bound, outputs = self.bind(inputs), self.empty_outputs()
        with self._lock:
            for info, array in zip(self.inputs, bound, strict=True):
                visit(info.name, array)
            for index, step in enumerate(self.manifest["steps"]):
                self.call(self._workspace, bound, outputs, index, index + 1)
                if not step.get("auxiliary"):
                    visit(step["id"], self.fetch(step["id"], self._workspace, bound, outputs))
        return {o.name: a for o, a in zip(self.outputs, outputs, strict=True)}

    def profile(self, inputs: Mapping[str, np.ndarray], iterations: int = 50) -> list[tuple[str, str, str, float]]:
        """(value id, operator, kernel, least seconds) per step, over `iterations` runs."""
        bound, outputs = self.bind(inputs), self.empty_outputs()
        steps = self.manifest["steps"]
        best = np.full(len(steps), np.inf)
        with self._lock:
            for _ in range(iterations):
                for index in range(len(steps)):
                    start = time.perf_counter()
                    self.call(self._workspace, bound, outputs, index, index + 1)
                    best[index] = min(best[index], time.perf_counter() - start)
        return [(s["id"], s["op"], s["kernel"], float(t)) for s, t in zip(steps, best, strict=True)]

    def new_context(self, inputs: Mapping[str, np.ndarray]) -> Context:
        """Separate memory for stepping through one sample while others advance too."""
        return Context(self, inputs)

    def set_constants(self, constants: np.ndarray) -> None:
        """Run with another constants blob (same layout) instead of the library's own: how bias correction tries its corrections."""
        assert constants.size == self.manifest["constants"]
        if self._mutable is None:
            self._mutable = _aligned(constants.size)
        self._mutable[:] = constants

    # -- pieces ---------------------------------------------------------------------------------------------------------------------

    def bind(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Inputs in order, contiguous and of the right dtype alignment; copied only where they are not."""
        names = [i.name for i in self.inputs]
        for name in inputs:
            if name not in names:
                raise DataError(f"unknown input '{name}'.{closest(str(name), names)} Inputs: {', '.join(names)}")
        bound = []
        for info in self.inputs:
            if info.name not in inputs:
                raise DataError(f"input '{info.name}' is missing; the model wants {', '.join(f'{i.name} {list(i.shape)} {i.dtype}' for i in self.inputs)}")
            array = np.asarray(inputs[info.name])
            if str(array.dtype) != info.dtype:
                raise DataError(f"input '{info.name}' has dtype {array.dtype}; the model wants {info.dtype}")
            if array.shape != info.shape:
                raise DataError(f"input '{info.name}' has shape {list(array.shape)}; the model wants {list(info.shape)}")
            bound.append(np.require(array, requirements=["C", "A"]))
        return bound

    def empty_outputs(self) -> list[np.ndarray]:
        return [np.empty(o.shape, o.dtype) for o in self.outputs]

    def call(self, workspace: np.ndarray, inputs: list[np.ndarray], outputs: list[np.ndarray], begin: int, end: int) -> None:
        """Run steps [begin, end) on the given memory."""
        set_threads(self.threads)
        constants = self._constants if self._mutable is None else self._mutable.ctypes.data
        pointers = [workspace.ctypes.data, constants, *(a.ctypes.data for a in inputs), *(a.ctypes.data for a in outputs)]
        self._run(*map(ctypes.c_void_p, pointers), begin, end)

    def fetch(self, value_id: str, workspace: np.ndarray, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> np.ndarray:
        """The value in its canonical form; a view of `workspace` where storage is canonical and dense."""
        entry = self.manifest["layouts"][value_id]
        shape, storage = tuple(entry["shape"]), np.dtype(entry["storage"])
        if entry["space"] != "workspace":
            return (inputs if entry["space"] == "input" else outputs)[entry["offset"]]
        top, left, bottom, right = entry.get("halo", (0, 0, 0, 0))
        full = shape if "halo" not in entry else (shape[0], shape[1] + top + bottom, shape[2] + left + right, entry["pitch"])
        start = entry["offset"]
        image = workspace[start : start + int(np.prod(full, dtype=np.int64)) * storage.itemsize].view(storage).reshape(full)
        if "halo" in entry:
            image = image[:, top : top + shape[1], left : left + shape[2], : shape[3]]
        return (image ^ 128).view(np.int8) if storage == np.uint8 else image


def set_threads(count: int) -> None:
    """Set the size of this thread's worker pool; does nothing when it has that size."""
    if getattr(_THREADS, "count", None) != count:
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)
        _THREADS.count = count


def _load_module(path: str) -> Any:
    import tvm  # noqa: F401  (registers the runtime that the library's parallel loops call)

    return tvm_ffi.load_module(path)


def _aligned(size: int) -> np.ndarray:
    """Zeroed bytes whose first address is a multiple of 64."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
