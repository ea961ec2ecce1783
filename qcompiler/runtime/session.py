"""Runs a compiled library from Python."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qcompiler.base.arguments import check, checks_arguments
from qcompiler.base.errors import ArtifactError, DataError, DeviceFailure, IncompatibleDevice, SessionBusy, closest
from qcompiler.base.host import host_architecture, host_features
from qcompiler.base.memory import aligned, aligned_bytes
from qcompiler.base.tensor import TensorInfo, as_array, first_states, fits
from qcompiler.runtime.library import check_complete, manifest_in, on_gpu
from qcompiler.runtime.private_copy import PrivateCopy
from qcompiler.runtime.shapes import Fitting, Shapes, ports

# QC_ERROR_DEVICE, _MEMORY, _GPU, _SELFTEST
_ERRORS: dict[int, type[ArtifactError]] = {7: IncompatibleDevice, 8: DeviceFailure, 10: DeviceFailure, 11: DeviceFailure}


Bound = tuple[list[np.ndarray], int, Shapes | None]
"""A call's inputs in order, contiguous, aligned and of the right dtype; the number of the shape that takes them; their own shapes, where they were padded."""


class Context:
    """Memory of one run: a workspace, inputs and outputs. Contexts of one session share constants and code, not memory. manifest: of the shape that it runs
    at, as that of a library for it alone would be."""

    def __init__(self, session: Session, inputs: Bound, workspace: np.ndarray | None = None) -> None:
        self._session = session
        self._inputs, self._shape, self._cut = inputs
        self.manifest = session.fitting.all[self._shape]
        self._workspace = aligned_bytes(self.manifest["workspace"] + 64) if workspace is None else workspace
        self._outputs = [np.empty(o.shape, o.dtype) for o in session.outputs_at[self._shape]]
        self._input_pointers = (ctypes.c_void_p * len(self._inputs))(*(a.ctypes.data for a in self._inputs))
        self._output_pointers = (ctypes.c_void_p * len(self._outputs))(*(a.ctypes.data for a in self._outputs))
        self._address = self._workspace.ctypes.data

    @property
    def lane(self) -> int:
        """Contexts of one lane, which is their session's, don't run at the same time."""
        return id(self._session)

    def run(self, begin: int, end: int) -> None:
        """Run steps [begin, end) of the manifest's list."""
        self._session.execute(self._shape, self._address, self._input_pointers, self._output_pointers, begin, end)

    def profile(self) -> list[float]:
        """Run all steps, one after the other; seconds of each."""
        return self._session.time_steps(self._shape, self._address, self._input_pointers, self._output_pointers)

    def view(self, value_id: str) -> np.ndarray:
        """A value as its last step left it: float32, or canonical int8. May be a view of the workspace, valid until the next step.

        Raises KeyError for an unknown id.
        """
        entry = self.manifest["layouts"][value_id]
        if entry["space"] != "workspace":
            port: np.ndarray = (self._inputs if entry["space"] == "input" else self._outputs)[entry["offset"]]
            return port.reshape(tuple(entry["shape"]))
        start = entry["offset"]
        return decoded(entry, self._workspace[start : start + stored_bytes(entry)])

    def value(self, value_id: str) -> np.ndarray:
        """A copy of `view`."""
        return self.view(value_id).copy()

    def memory(self, step: int) -> list[np.ndarray]:
        """What steps from `step` on read, or leave alone, of all that is written there: of the workspace, as far as that is known, what is still to be read;
        inputs, outputs. Writing it back restores a run that is before this step."""
        held = self._session.held
        parts = [self._workspace[begin:end] for begin, end in held[self._shape][step]] if held else [self._workspace]
        return [*parts, *self._inputs, *self._outputs]

    def on(self, session: Session) -> Context:
        """The same memory, with steps run by another session of the same library (which has other constants, say)."""
        twin = copy.copy(self)
        twin._session = session
        return twin

    def inputs(self) -> dict[str, np.ndarray]:
        """Network inputs by name."""
        return {i.name: a for i, a in zip(self._session.inputs, self._inputs, strict=True)}

    def outputs(self) -> dict[str, np.ndarray]:
        """Network outputs by name, cut to what belongs to the inputs where these were padded."""
        found = {o.name: a for o, a in zip(self._session.outputs, self._outputs, strict=True)}
        return found if self._cut is None else {name: self._session.fitting.cut(name, a, self._cut) for name, a in found.items()}


class Specialization:
    """A session at one of the shapes that its library was compiled for: what a session on a library for that shape alone would be. shape: its number."""

    def __init__(self, session: Session, shape: int) -> None:
        self._session, self.shape, self.manifest = session, shape, session.fitting.all[shape]
        self.path, self.threads, self.run, self.trace, self.profile = session.path, session.threads, session.run, session.trace, session.profile
        self.inputs, self.outputs = ports(self.manifest["inputs"]), session.outputs_at[shape]


class _Turn:
    """Lets one call at a time into a session: other threads wait. Raises SessionBusy where waiting would never end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._lost = False
        _TURNS.add(self)

    def __enter__(self) -> None:
        if self._thread == threading.get_ident():
            raise SessionBusy("a call from inside a call of the same session (a callback of trace); load the library a second time for it")
        if self._lost:
            raise SessionBusy("another thread was inside this session when the process was forked, so its memory is half-written; load the library again")
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._thread = None
        self._lock.release()

    def forked(self) -> None:
        """In a child process: a call of a thread that the child does not have never ends."""
        self._lost = self._lock.locked() and self._thread != threading.get_ident()


_TURNS: weakref.WeakSet[_Turn] = weakref.WeakSet()


def _forked() -> None:
    for turn in _TURNS:
        turn.forked()


os.register_at_fork(after_in_child=_forked)


class Session:
    """A loaded library. One call at a time per session, other threads wait; any number of sessions in any threads.

    A library for several shapes runs at the one that its inputs have, or, where it has rules for padding, at the least that they can be padded to; then
    outputs are cut back. `manifest`, `inputs` and `outputs` are those of the first shape; `specializations` has one entry per shape.

    `threads` bounds the threads of one call; it has no meaning for a GPU. Inputs may have any alignment and strides; outputs are fresh arrays.
    The file is copied into memory when it is loaded, once for all sessions of equal contents: it may be replaced, overwritten or removed afterwards.
    A session can't be copied or pickled.
    `state` {input: output}: what the library was compiled to keep (`--state`), or what its TFLite file keeps. Calls leave those inputs out: in the first call
    they are zeros (or what the file begins with), and in the next what the output became. A call that gives all of them is one by itself: it neither reads
    nor changes what the session keeps.
    A child made by fork may use it, but for one on a GPU, and unless another thread was inside it at that moment.

    Raises ArtifactError for a file that is damaged or not ours, IncompatibleDevice when this machine lacks an instruction set, driver or GPU that it needs,
    DeviceFailure when memory runs out (the GPU's, for a library for one).
    """

    @checks_arguments
    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self.path = Path(path)
        threads = int(threads)
        if threads < 1:
            raise DataError(f"threads is {threads}; at least 1 is needed")
        self.threads = threads
        copied = PrivateCopy(self.path)
        self.manifest, architecture = manifest_in(copied.data, self.path)
        self._check_device(architecture)
        check_complete(copied.data, self.path)
        try:
            self._copy = copied.load()
            self._library = _declare(self._copy.library)
        except (OSError, AttributeError) as error:
            raise ArtifactError(f"{self.path}: can't be loaded: {error}") from error
        handle = ctypes.c_void_p()
        self._check(self._library.qc_session_create(threads, ctypes.byref(handle)))
        self._handle = handle
        self._copy.sessions.add(id(self))
        self.fitting = Fitting(self.manifest)
        self.outputs_at = [ports(m["outputs"]) for m in self.fitting.all]
        self.inputs, self.outputs = ports(self.manifest["inputs"]), self.outputs_at[0]
        self._workspace = aligned_bytes(max(m["workspace"] for m in self.fitting.all) + 64)
        self._shape = 0
        self.state: dict[str, str] = dict(self.manifest.get("state", {}))
        self._kept = self._first_states()
        self._mutable: np.ndarray | None = None
        self.held: Sequence[Sequence[Sequence[tuple[int, int]]]] = ()  # at each shape, before each step: ranges of the workspace in use, where known
        self._turn = _Turn()

    @property
    def specializations(self) -> list[Specialization]:
        """This session at each of its library's shapes."""
        return [Specialization(self, shape) for shape in range(len(self.fitting.all))]

    def _check(self, status: int) -> None:
        if status:
            message = f"{self.path}: {self._library.qc_last_error().decode(errors='replace')}"
            raise _ERRORS.get(status, ArtifactError)(message)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.qc_session_destroy(self._handle)
            self._copy.ended(id(self))

    def __repr__(self) -> str:
        kept = "float32" if not self.manifest.get("values") else "int8"
        inputs, outputs = (", ".join(f"{p.name} {p.dtype}{list(p.shape)}" for p in ports) for ports in (self.inputs, self.outputs))
        more = f", at {len(self.fitting.all)} shapes in all" if len(self.fitting.all) > 1 else ""
        return f"<Session {self.path}: {kept} for {self.manifest['target']}, {self.threads} thread{'s' * (self.threads != 1)}; {inputs} -> {outputs}{more}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a Session holds code and memory of its process and can't be copied or pickled; load {self.path} again where another is needed")

    def _check_device(self, architecture: str) -> None:
        if architecture != host_architecture():
            raise IncompatibleDevice(
                f"{self.path}: compiled for {architecture} ({self.manifest['target']}), this machine is {host_architecture()}; "
                "compiled from the same model and data with --target native, a library has the same 8-bit values, and can be run and verified here; "
                "verify, run and bench take --board for a device or an emulator (docs/boards.md)"
            )
        if on_gpu(self.manifest):
            return  # the library looks at the GPU when a session is made
        known = host_features()
        missing = [f for f in self.manifest["features"] if known is not None and f not in known]  # else the library asks by itself when a session is made
        if missing:
            raise IncompatibleDevice(
                f"{self.path}: compiled for {self.manifest['target']}, which needs the CPU features {', '.join(missing)}, and this CPU lacks them; "
                "compile again with --target native on this machine, or for a more portable target"
            )

    # -- running --------------------------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the network on {input name: array}; returns {output name: fresh array}, without the states that the session keeps.

        Raises DataError for a missing or unknown name, a wrong shape or a wrong dtype, DeviceFailure when a GPU fails.
        """
        with self._turn:
            return self._without_state(inputs, self._run(self.bound(self._with_state(inputs))))

    def run_bound(self, inputs: Bound) -> dict[str, np.ndarray]:
        """`run` on what `bound` made of inputs, states among them, in this session or in another one on the same library."""
        with self._turn:
            return self._run(inputs)

    def _run(self, inputs: Bound) -> dict[str, np.ndarray]:
        context = Context(self, inputs, self._workspace)
        context.run(0, len(context.manifest["steps"]))
        return context.outputs()

    def reset(self) -> None:
        """Make the states that the session keeps what they were in the first call again, as for a new stream."""
        with self._turn:
            self._kept = self._first_states()

    def _first_states(self) -> dict[str, np.ndarray]:
        return first_states(self.inputs, self.state, self.manifest.get("initial", {}))

    def _with_state(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A call's inputs and what the session keeps. Raises DataError where a call gives some states and leaves out others."""
        if not self.state or not isinstance(inputs, Mapping):
            return inputs
        given = [name for name in self.state if name in inputs]
        if given and len(given) < len(self.state):
            missing = ", ".join(f"'{name}'" for name in self.state if name not in inputs)
            raise DataError(f"states are given together or not at all: '{given[0]}' is given, {missing} not")
        return inputs if given else {**inputs, **self._kept}

    def _without_state(self, inputs: Mapping[str, np.ndarray], outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A call's outputs, but for those that the session keeps for the next one."""
        if not self.state or any(name in inputs for name in self.state):
            return outputs
        for name, output in self.state.items():
            self._kept[name][...] = outputs[output]
        return {name: array for name, array in outputs.items() if name not in self.state.values()}

    def selftest(self) -> None:
        """Run the library's test vectors, and compare what has the same bits on every CPU. It takes as long as that many calls.

        Raises DeviceFailure when this machine computes wrongly, naming the value; ArtifactError for a library without test vectors.
        """
        if "selftest" not in self.manifest:
            raise ArtifactError(f"{self.path}: has no test vectors; compile it with selftest=2")
        self._check(self._library.qc_selftest())

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        """Run step by step, calling `visit(value id, array)` after each step that computes a value of the model.

        Arrays are float32, or canonical int8, in NHWC, and valid only during the call. Network inputs are visited first. Returns the outputs.
        """
        check("trace()", "visit", visit, Callable[[str, np.ndarray], None])
        with self._turn:
            context = Context(self, self.bound(self._with_state(inputs)), self._workspace)
            for name, array in context.inputs().items():
                visit(name, array)
            for index, step in enumerate(context.manifest["steps"]):
                context.run(index, index + 1)
                for value in [] if step.get("auxiliary") else [step["id"], *step.get("more", [])]:
                    visit(value, context.view(value))
            return self._without_state(inputs, context.outputs())

    def profile(self, inputs: Mapping[str, np.ndarray], iterations: int = 50) -> list[tuple[str, str, str, float]]:
        """(value id, operator, kernel, least seconds) per step, over `iterations` runs; by the GPU's clock on one. Raises DataError as `run`."""
        check("profile()", "iterations", iterations, int)
        if iterations < 1:
            raise DataError(f"iterations is {iterations}; at least 1 is needed")
        with self._turn:
            context = Context(self, self.bound(self._with_state(inputs)), self._workspace)
            steps = context.manifest["steps"]
            best = [math.inf] * len(steps)
            for _ in range(iterations):
                best = [min(pair) for pair in zip(best, context.profile(), strict=True)]
        return [(s["id"], s["op"], s["kernel"], t) for s, t in zip(steps, best, strict=True)]

    def new_context(self, inputs: Mapping[str, np.ndarray]) -> Context:
        """Separate memory for stepping through one sample while others advance too."""
        return Context(self, self.bound(inputs))

    def alone(self, count: int) -> list[Session]:
        """So many sessions of one thread each, for as many threads that run a sample each; this one where a single one is asked for. What constants
        they run with, where this one was given some, they share with it."""
        if count == 1:
            return [self]
        made = [Session(self.path) for _ in range(count)]
        for session in made:
            session.held = self.held
            session._mutable = self._mutable
        return made

    def set_constants(self, constants: np.ndarray) -> None:
        """Run with another constants blob (same layout) instead of the library's own: how bias correction tries its corrections. One that is aligned to 64
        bytes is not copied: what is written to it later counts."""
        assert constants.size == self.manifest["constants"]
        self._mutable = aligned(constants)

    # -- pieces ---------------------------------------------------------------------------------------------------------------------

    def bound(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        """As the function `bound`. Raises as `run`."""
        return bound(self.fitting, self.inputs, inputs)

    def execute(self, shape: int, workspace: int, inputs: Any, outputs: Any, begin: int, end: int) -> None:
        """Run steps [begin, end) of shape number `shape` on memory given by addresses: `workspace`, and ctypes arrays of pointers."""
        self._at(shape)
        status = self._library.qc_session_execute(self._handle, workspace, self._constants(), inputs, outputs, begin, end)
        if status:
            self._check(status)

    def time_steps(self, shape: int, workspace: int, inputs: Any, outputs: Any) -> list[float]:
        """`execute` of all steps; seconds of each."""
        self._at(shape)
        steps = len(self.fitting.all[shape]["steps"])
        seconds = (ctypes.c_double * steps)()
        self._check(self._library.qc_session_profile(self._handle, workspace, self._constants(), inputs, outputs, 0, steps, seconds))
        return list(seconds)

    def _at(self, shape: int) -> None:
        if shape != self._shape:
            self._check(self._library.qc_session_set_shape(self._handle, shape))
            self._shape = shape

    def _constants(self) -> int | None:
        return None if self._mutable is None else int(self._mutable.ctypes.data)


def bound(fitting: Fitting, infos: Sequence[TensorInfo], inputs: Mapping[str, np.ndarray]) -> Bound:
    """What a call runs on. Arrays are copied only where they are padded, not contiguous or not aligned."""
    arrays = checked(inputs, infos, len(fitting.all) == 1)
    shape, own = 0, None
    if len(fitting.all) > 1:
        given = {name: array.shape for name, array in arrays.items()}
        exact = fitting.exact(given)
        found = fitting.padded(given) if exact is None else exact
        if found is None:
            raise DataError(fitting.refusal(given))
        shape = found
        if exact is None:
            own, arrays = given, {name: fitting.pad(name, array, shape) for name, array in arrays.items()}
    return [np.require(arrays[i.name], i.dtype, ["C", "A"]) for i in infos], shape, own


def checked(inputs: Mapping[str, np.ndarray], infos: Sequence[TensorInfo], fixed: bool = True) -> dict[str, np.ndarray]:
    """{name: array} of a call's inputs. fixed: the shapes must be those of `infos`. Raises DataError."""
    names = [i.name for i in infos]
    if not isinstance(inputs, Mapping):
        raise DataError(f"inputs are a mapping {{name: array}}, not {type(inputs).__name__}; names: {', '.join(names)}")
    for name in inputs:
        if name not in names:
            raise DataError(f"unknown input '{name}'.{closest(str(name), names)} Inputs: {', '.join(names)}")
    arrays = {}
    for info in infos:
        if info.name not in inputs:
            raise DataError(f"input '{info.name}' is missing; the model wants {', '.join(f'{i.name} {list(i.shape)} {i.dtype}' for i in infos)}")
        whole = as_array(inputs[info.name])
        try:
            array = arrays[info.name] = np.asarray(inputs[info.name]) if whole is None else whole
        except ValueError as error:
            raise DataError(f"input '{info.name}' is no array: {error}") from error
        if not fits(array.dtype, info.dtype):
            raise DataError(f"input '{info.name}' has dtype {array.dtype}; the model wants {info.dtype}")
        if fixed and array.shape != info.shape:
            raise DataError(f"input '{info.name}' has shape {list(array.shape)}; the model wants {list(info.shape)}")
    return arrays


def _stored_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Of a value with what lies around it; entry: of the manifest's layouts."""
    shape = tuple(entry["shape"])
    if "halo" not in entry:
        return shape
    top, left, bottom, right = entry["halo"]
    return (shape[0], shape[1] + top + bottom, shape[2] + left + right, entry["pitch"])


def stored_bytes(entry: Mapping[str, Any]) -> int:
    """Bytes that a value takes in memory."""
    return int(math.prod(_stored_shape(entry)) * np.dtype(entry["storage"]).itemsize)


def decoded(entry: Mapping[str, Any], raw: np.ndarray) -> np.ndarray:
    """A value from its bytes in memory: float32, canonical int8, or pixels; a view of them where they are stored so."""
    shape, storage = entry["shape"], np.dtype(entry["storage"])
    image: np.ndarray = raw.view(storage).reshape(_stored_shape(entry))
    if "halo" in entry:
        top, left, _, _ = entry["halo"]
        image = image[:, top : top + shape[1], left : left + shape[2], : shape[3]]
    return (image ^ 128).view(np.int8) if storage == np.uint8 and not entry.get("unsigned") else image


def _declare(library: Any) -> Any:
    """Argument types of the C functions used here (runtime/cpp/include/qcompiler/qcompiler.h)."""
    pointer, pointers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    library.qc_session_create.argtypes = [ctypes.c_int32, pointers]
    library.qc_session_destroy.argtypes = [pointer]
    if hasattr(library, "qc_session_set_shape"):  # not in libraries of the first versions, which have one shape
        library.qc_session_set_shape.argtypes = [pointer, ctypes.c_int32]
    library.qc_session_destroy.restype = None
    library.qc_session_execute.argtypes = [pointer, pointer, pointer, pointers, pointers, ctypes.c_int32, ctypes.c_int32]
    library.qc_session_profile.argtypes = [pointer, pointer, pointer, pointers, pointers, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_double)]
    library.qc_last_error.restype = ctypes.c_char_p
    return library
