"""Evidence for a sign-off: everything that the page of `verify --report` shows, measured once. `report_html.page` writes it down.

Deterministic apart from times: the same library, model and data give the same figures.
"""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import qcompiler
from qcompiler.base.progress import Progress
from qcompiler.calibration.data import Samples
from qcompiler.calibration.padding import ALL
from qcompiler.importers.origin import Origin
from qcompiler.numerics.metrics import Accumulator
from qcompiler.numerics.spec import QParams
from qcompiler.runtime.bench import Neighbours, Timing, interleave
from qcompiler.runtime.channels import stored_form
from qcompiler.verification.footprint import Memory, joules, memory
from qcompiler.verification.parity import ParityReport
from qcompiler.verification.twin import counted

WORST = 10  # layers whose distributions are shown
_BINS = 96  # of a distribution, at most
_KEPT = 1 << 16  # elements of a sample that a distribution counts, evenly spaced
ITERATIONS = 20  # of each step, for its least time


@dataclass(frozen=True)
class Distribution:
    """How often a layer's values occur. edges: float64[n + 1], in the value's unit, whole quantization steps apart; counts: int64[n].

    low, high: the chosen range, None for a float value. outside: the fraction of the float network's values beyond it.
    """

    name: str
    edges: np.ndarray
    float_counts: np.ndarray
    int8_counts: np.ndarray
    low: float | None
    high: float | None
    outside: float


@dataclass(frozen=True)
class StepTime:
    """Least seconds of one step: of the library, and of the float network's step for the same value (None where it has none)."""

    name: str
    op: str
    kernel: str
    int8: float
    float32: float | None


@dataclass(frozen=True)
class Evidence:
    """All that the page shows. rounding: value id -> SQNR in dB of the float network's own value rounded to the library's 8 bits.

    float_only: seconds of float steps that the library does not have.
    sizes in bytes; `parameters` are those of the model's float tensors. digests: SHA-256, hexadecimal. model_matches: is the model the one that
    the library was compiled from, by digest? footprint: "int8", "float" -> (memory, joules per run or None where no counter can be read).
    busy: cores that other processes used during the measurement of `totals`, None where unknown. Of a board the footprint is empty.
    """

    parity: ParityReport
    rounding: dict[str, float]
    distributions: list[Distribution]
    totals: list[Timing]
    steps: list[StepTime]
    float_only: float
    threads: int
    library_bytes: int
    model_bytes: int
    parameter_bytes: int
    manifest: dict[str, Any]
    digests: dict[str, str]
    model_matches: bool
    environment: dict[str, str]
    footprint: dict[str, tuple[Memory, float | None]]
    source: dict[str, str] = field(default_factory=dict)
    busy: float | None = None


@dataclass(frozen=True)
class Measured:
    """What both networks take, and where: steps as `Session.profile` has them, the rest as in `Evidence`."""

    totals: list[Timing]
    int8: Sequence[tuple[str, str, str, float]]
    float32: Sequence[tuple[str, str, str, float]]
    footprint: dict[str, tuple[Memory, float | None]]
    busy: float | None
    where: str


Measurer = Callable[[Any, Any, Mapping[str, np.ndarray], float, Progress], Measured]
"""f(the library's session, the float network's, a sample, seconds, progress)"""


def measured_here(session: Any, twin: Any, sample: Mapping[str, np.ndarray], seconds: float, progress: Progress) -> Measured:
    """Both networks on this machine, in turns."""
    neighbours = Neighbours()
    totals = interleave({"int8": lambda: session.run(sample), "float": lambda: twin.run(sample)}, seconds=seconds, progress=progress)
    busy = neighbours.cores()
    steps = session.profile(sample, ITERATIONS), twin.profile(sample, ITERATIONS)
    footprint = {name: (memory(s.path, s.threads), joules(functools.partial(s.run, sample), seconds / 2)) for name, s in (("int8", session), ("float", twin))}
    return Measured(totals, *steps, footprint, busy, f"{cpu_name()}, {platform.system()} {platform.machine()}")


class HashedSamples:
    """Samples that remember the digest of what they gave, of the first whole pass."""

    def __init__(self, samples: Samples) -> None:
        self.source, self.names, self.count = samples, samples.names, samples.count
        self.left_out = getattr(samples, "left_out", 0)
        self.digest = ""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        digest = hashlib.sha256()
        for sample in self.source:
            for name in sorted(sample):
                digest.update(f"{name} {sample[name].dtype} {sample[name].shape}".encode())
                digest.update(np.ascontiguousarray(sample[name]).tobytes())
            yield sample
        self.digest = self.digest or digest.hexdigest()


def gather(
    session: Any,
    twin: Any,
    samples: HashedSamples,
    parity: ParityReport,
    model: Origin,
    labels: np.ndarray | None,
    seconds: float,
    progress: Progress,
    measure: Measurer = measured_here,
) -> Evidence:
    """The rest of the evidence beside `parity`, from the two sessions that it compared."""
    layers = _Layers(session.manifest, [r.name for r in parity.layers], [r.name for r in parity.worst_layers(WORST)])
    first: Mapping[str, np.ndarray] | None = None
    for done, sample in enumerate(samples):
        first = sample if first is None else first
        if done >= parity.layer_samples:
            break
        reference: dict[str, np.ndarray] = {}
        layers.counts = counted(twin, sample)
        twin.trace(sample, lambda name, array: reference.__setitem__(name, array.copy()) if name in layers.names else None)  # noqa: B023
        session.trace(sample, lambda name, array: layers.add(name, array, stored_form(session.manifest, name, reference[name])) if name in reference else None)  # noqa: B023
        progress("trace layers", done + 1, parity.layer_samples)
    assert first is not None
    measured = measure(session, twin, first, seconds, progress)
    steps, float_only = step_times(measured.int8, measured.float32)
    manifest = session.manifest
    digests = {"library": hashlib.sha256(session.path.read_bytes()).hexdigest(), **manifest.get("digests", {}), "evaluation data, as fed": samples.digest}
    if labels is not None:
        digests["labels"] = hashlib.sha256(labels.tobytes()).hexdigest()
    return Evidence(
        parity,
        layers.rounding(),
        layers.distributions(),
        measured.totals,
        steps,
        float_only,
        session.threads,
        session.path.stat().st_size,
        sum(p.stat().st_size for p in model.files[:1]),
        parameter_bytes(model),
        manifest,
        dict(digests),
        manifest.get("digests", {}).get("model") == twin.manifest["digests"]["model"],
        environment(manifest, measured.where),
        measured.footprint,
        busy=measured.busy,
    )


def step_times(int8: Sequence[tuple[str, str, str, float]], float32: Sequence[tuple[str, str, str, float]]) -> tuple[list[StepTime], float]:
    """What the library spends on each value, in order, joined by value id with the float network's; and the seconds of float steps left over.

    Steps that work for one value (filling its halo, computing it) count together, under the operator and kernel of the longest.
    """
    spent: dict[str, float] = {}
    for name, _, _, seconds in float32:
        spent[name] = spent.get(name, 0.0) + seconds
    grouped: dict[str, list[tuple[str, str, float]]] = {}
    for name, op, kernel, seconds in int8:
        grouped.setdefault(name, []).append((op, kernel, seconds))
    joined = []
    for name, steps in grouped.items():
        op, kernel, _ = max(steps, key=lambda s: s[2])
        joined.append(StepTime(name, op, kernel, sum(s[2] for s in steps), spent.pop(name, None)))
    return joined, sum(spent.values())


def parameter_bytes(model: Origin) -> int:
    """Bytes of the floating-point tensors that a model stores, in its own precision."""
    from onnx import TensorProto, numpy_helper

    from qcompiler.importers.onnx_file import tensors

    floating = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    return sum(numpy_helper.to_array(t).nbytes for t in tensors(model.read()[0]) if t.data_type in floating)


def environment(manifest: Mapping[str, Any], where: str) -> dict[str, str]:
    """What the library was compiled with, and what it was verified on."""
    compiled = manifest.get("compiler", {})
    return {
        "target": f"{manifest['target']} ({', '.join(manifest['features'])})",
        "compiled with": ", ".join(f"{name} {version}" for name, version in sorted(compiled.items())) or "not recorded",
        "verified with": f"qcompiler {qcompiler.__version__}, Python {platform.python_version()}, numpy {np.__version__}",
        "verified on": where,
        "artifact format, numerics": f"{manifest.get('format')}, {manifest.get('numerics')}",
    }


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))), platform.machine())


class _Layers:
    """Collects, per layer, the error of rounding alone, and of the worst layers the values themselves."""

    def __init__(self, manifest: Mapping[str, Any], names: Sequence[str], worst: Sequence[str]) -> None:
        self.names, self.counts = set(names), ALL  # counts: what counts of the sample that is being added
        self._params = {name: QParams(float(v["scale"]), int(v["zero_point"])) for name, v in manifest["values"].items() if name in self.names}
        self._rounding: dict[str, Accumulator] = {}
        self._values: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in worst}

    def add(self, name: str, actual: np.ndarray, reference: np.ndarray) -> None:
        """One sample's value in the library (int8, int16 or float32) and in the float network."""
        actual, reference = self.counts.part(name, actual), self.counts.part(name, reference)
        params = self._params.get(name) if actual.dtype in (np.int8, np.int16) else None
        if params is not None:
            self._rounding.setdefault(name, Accumulator()).add(params.dequantize(params.quantize(reference)), reference)
        if name in self._values:
            every = -(-reference.size // _KEPT)
            values = actual if params is None else params.dequantize(actual)
            self._values[name].append((reference.ravel()[::every].astype(np.float64), values.ravel()[::every].astype(np.float64)))

    def rounding(self) -> dict[str, float]:
        return {name: a.metrics().sqnr_db for name, a in self._rounding.items()}

    def distributions(self) -> list[Distribution]:
        return [self._distribution(name) for name in self._values if self._values[name]]

    def _distribution(self, name: str) -> Distribution:
        reference, actual = (np.concatenate(parts) for parts in zip(*self._values[name], strict=True))
        params = self._params.get(name)
        return distribution(name, reference, actual, params)


def distribution(name: str, reference: np.ndarray, actual: np.ndarray, params: QParams | None) -> Distribution:
    """Counts of both on one grid. Bins are whole steps wide and have the 8-bit values in their middle, so that no bin gets more of them than another."""
    reference, actual = (a[np.isfinite(a)] for a in (reference, actual))
    low, high = (None, None) if params is None else params.range
    least = min(float(a.min(initial=0.0)) for a in (reference, actual)) if low is None else min(low, float(reference.min(initial=0.0)))
    most = max(float(a.max(initial=0.0)) for a in (reference, actual)) if high is None else max(high, float(reference.max(initial=0.0)))
    step = params.scale if params is not None else max(most - least, 1e-30) / _BINS
    steps = max(1, math.ceil((most - least) / step + 1e-9))
    width = math.ceil(steps / _BINS)
    begin = math.floor(least / step + 0.5)
    count = max(1, -(-(steps + 2) // width))
    edges = (begin - 0.5 + width * np.arange(count + 1)) * step
    outside = float(((reference < low - step / 2) | (reference > high + step / 2)).mean()) if low is not None and high is not None and reference.size else 0.0
    return Distribution(name, edges, np.histogram(reference, edges)[0], np.histogram(actual, edges)[0], low, high, outside)
