"""A library on a board, with the methods of a `Session`: what verifies and measures one here does it there."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import ArtifactError, BoardLost, DeviceFailure, IncompatibleDevice
from qcompiler.boards.device import Device, program
from qcompiler.runtime.bench import Timing
from qcompiler.runtime.elf import mapped
from qcompiler.runtime.library import check_complete, manifest_in
from qcompiler.runtime.session import bound, decoded, stored_bytes
from qcompiler.runtime.shapes import Fitting, Shapes, ports

_STEPS = "steps.bin"


class BoardSession:
    """A library on an open board. One run is one exchange; the library and `qc_run` are sent once. Shapes are chosen, padded and cut as by a `Session`.

    Raises ArtifactError for a file that is damaged or not ours, IncompatibleDevice where the board can't run it.
    """

    def __init__(self, device: Device, library: str | os.PathLike[str], threads: int = 1) -> None:
        self.device, self.path, self.threads = device, Path(library), threads
        data = mapped(self.path)
        self.manifest, architecture = manifest_in(data, self.path)
        check_complete(data, self.path)
        board, target = device.board, device.board.target
        if architecture != target.host_architecture:
            raise IncompatibleDevice(
                f"{self.path}: compiled for {architecture} ({self.manifest['target']}), board '{board.name}' is {target.host_architecture} ({target.name})"
            )
        self.fitting, self._shape = Fitting(self.manifest), 0
        self.whole_inputs = self.inputs = ports(self.manifest["inputs"])
        self.outputs = ports(self.manifest["outputs"])
        self._library = f"model-{hashlib.sha256(data).hexdigest()[:12]}.so"  # several may be there at once
        self._staying = {"qc_run": program("qc_run", target), self._library: bytes(data)}

    @property
    def specializations(self) -> list[BoardSession]:
        """This session at each of its library's shapes."""
        return [self._at(shape) for shape in range(len(self.fitting.all))]

    def _at(self, shape: int) -> BoardSession:
        made = copy.copy(self)
        made._shape, made.manifest = shape, self.fitting.all[shape]
        made.inputs, made.outputs = ports(made.manifest["inputs"]), ports(made.manifest["outputs"])
        return made

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `Session.run`. Raises BoardError too."""
        arrays, shape, own = bound(self.fitting, self.whole_inputs, inputs)
        return self._outputs(self._run(arrays, shape, []), shape, own)

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        """As `Session.trace`; the board runs all steps first."""
        arrays, shape, own = bound(self.fitting, self.whole_inputs, inputs)
        manifest = self.fitting.all[shape]
        values = [(i, v) for i, s in enumerate(manifest["steps"]) if not s.get("auxiliary") for v in (s["id"], *s.get("more", []))]
        entries = {v: manifest["layouts"][v] for _, v in values}
        plan = []
        for step, value in values:
            entry = entries[value]
            if entry["space"] != "input":
                plan.append(f"{step} {entry['space']} {entry['offset']} {stored_bytes(entry)}")
        found = self._run(arrays, shape, plan)
        raw = np.frombuffer(found.get(_STEPS, b""), np.uint8)
        if raw.size != sum(stored_bytes(e) for e in entries.values() if e["space"] != "input"):
            raise BoardLost(f"board '{self.device.board.name}': the values of the steps are incomplete")
        for info, array in zip(self.inputs, arrays, strict=True):
            visit(info.name, array)
        at = 0
        for _, value in values:
            entry = entries[value]
            if entry["space"] == "input":
                visit(value, arrays[entry["offset"]].reshape(tuple(entry["shape"])))
                continue
            visit(value, decoded(entry, raw[at : at + stored_bytes(entry)]))
            at += stored_bytes(entry)
        return self._outputs(found, shape, own)

    def bench(self, iterations: int) -> Timing:
        """The latency of so many runs on the board, by its own clock. Inputs are zeros: int8 kernels take the same time for any."""
        seconds = self._measured(["--bench", str(iterations)])["seconds"]
        return Timing("", seconds["minimum"], seconds["median"], iterations, seconds["mean"], seconds["p90"], seconds["p99"])

    def profile(self, iterations: int = 50) -> list[tuple[str, str, str, float]]:
        """As `Session.profile`, on zeros."""
        steps, least = self.manifest["steps"], self._measured(["--profile", str(iterations)])["steps"]
        if len(least) != len(steps):
            raise BoardLost(f"board '{self.device.board.name}': the times of the steps are incomplete")
        return [(s["id"], s["op"], s["kernel"], float(t)) for s, t in zip(steps, least, strict=True)]

    def selftest(self) -> None:
        """As `Session.selftest`."""
        if "selftest" not in self.manifest:
            raise ArtifactError(f"{self.path}: has no test vectors; compile it with selftest=2")
        answer = self.device.run([*self._command(), "--selftest"], staying=self._staying)
        if answer.status == 1:
            raise DeviceFailure(str(self.device.failed(answer, "the self-test failed")))
        if answer.status:
            raise self.device.failed(answer, "qc_run")

    # -- pieces ---------------------------------------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        return ["./qc_run", f"./{self._library}", "--threads", str(self.threads)]

    def _run(self, arrays: Sequence[np.ndarray], shape: int, plan: Sequence[str]) -> Mapping[str, bytes]:
        """The files that the board wrote."""
        passing = {f"in{i}.npy": _npy(array) for i, array in enumerate(arrays)}
        words = ["--numbered", ".", *self._shaped(shape)]
        wanted = [f"out{i}.npy" for i in range(len(self.outputs))]
        if plan:
            passing["plan.txt"] = "".join(f"{line}\n" for line in plan).encode()
            words += ["--steps", "plan.txt"]
            wanted.append(_STEPS)
        answer = self.device.run([*self._command(), *words], staying=self._staying, passing=passing, wanted=wanted)
        if answer.status:
            raise self.device.failed(answer, "qc_run")
        return answer.files

    def _shaped(self, shape: int) -> list[str]:
        return ["--shape", str(shape)] if len(self.fitting.all) > 1 else []

    def _outputs(self, files: Mapping[str, bytes], shape: int, own: Shapes | None) -> dict[str, np.ndarray]:
        """own: the shapes of the inputs, where they were padded."""
        found, where = {}, f"board '{self.device.board.name}'"
        for i, info in enumerate(ports(self.fitting.all[shape]["outputs"])):
            try:
                array = np.load(io.BytesIO(files[f"out{i}.npy"]), allow_pickle=False)
            except (KeyError, ValueError, OSError, EOFError) as error:
                raise BoardLost(f"{where}: output '{info.name}' is missing or damaged") from error
            if array.shape != info.shape or str(array.dtype) != info.dtype:
                raise BoardLost(f"{where}: output '{info.name}' is {array.dtype}{list(array.shape)}, not {info.dtype}{list(info.shape)}")
            found[info.name] = array if own is None else self.fitting.cut(info.name, array, own)
        return found

    def _measured(self, words: Sequence[str]) -> dict[str, Any]:
        answer = self.device.run([*self._command(), *self._shaped(self._shape), *words], staying=self._staying)
        if answer.status:
            raise self.device.failed(answer, "qc_run")
        try:
            document = json.loads(answer.output)
            numbers = document["steps"] if "steps" in document else [document["seconds"][k] for k in ("minimum", "median", "mean", "p90", "p99")]
            if not all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers):
                raise ValueError("a time is no number")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BoardLost(f"board '{self.device.board.name}': its times can't be read ({error})") from error
        return dict(document)


def take_turns(sessions: Mapping[str, BoardSession], seconds: float, turns: int = 5) -> list[Timing]:
    """Latencies of libraries on one board, measured in turns for about `seconds` of its time in all."""
    parts: dict[str, list[Timing]] = {name: [] for name in sessions}
    once = {name: max(s.bench(3).median, 1e-7) for name, s in sessions.items()}
    begin = time.monotonic()
    for turn in range(turns):
        if turn and time.monotonic() - begin > 3 * seconds:
            break
        names = list(sessions)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            count = int(min(max(seconds / turns / len(names) / once[name], 2), 1e6))
            parts[name].append(sessions[name].bench(count))
    return [_together(name, timings) for name, timings in parts.items()]


def _together(name: str, parts: Sequence[Timing]) -> Timing:
    """Of several measurements: the least, all, and the middle one's quantiles."""
    rounds = sum(p.rounds for p in parts)
    median, p90, p99 = (statistics.median(getattr(p, q) for p in parts) for q in ("median", "p90", "p99"))
    return Timing(name, min(p.minimum for p in parts), median, rounds, sum(p.mean * p.rounds for p in parts) / rounds, p90, p99)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
