"""A second opinion on an import: what the runtime that a model was made for computes from the model itself, beside what the imported float network does.

Parity alone compares a library with the float network of the same importer, so an operator that is read wrongly is wrong on both sides. Where that
runtime is installed, it runs the model as it is, without optimizations of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from qcompiler.base.files import parse_json

SMALL = 1e-6  # an error below this is none, whatever the signal
FLIPS = 0.01  # the fraction of integers (classes, indices, masks) that ties between floats may decide otherwise; one element always may
LIMIT = 3e38  # beyond it a number counts as infinite: masks are the least float here and minus infinity there
_TYPES = {f"tensor({name})": name for name in "float16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()}
_TYPES |= {"tensor(float)": "float32", "tensor(double)": "float64"}


class Runs(Protocol):
    """What is compared with the file: a `Session`, or anything that runs alike."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


Outputs = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""{input name: array} -> {output name: array}; inputs that the model does not have are passed over."""


class Elsewhere(Protocol):
    """Another runtime that runs a model as its user has it. `package`: what has to be installed for it."""

    @property
    def package(self) -> str: ...
    def open(self) -> tuple[str, Outputs]:
        """(name and version of the runtime, the model in it). Raises ImportError when it isn't installed, anything else when it can't run the model."""
        ...


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on a file (its path) or on the bytes of a model."""

    model: str | bytes = field(repr=False)
    package: str = "onnxruntime"

    def open(self) -> tuple[str, Outputs]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        types = {i.name: _TYPES[i.type] for i in session.get_inputs()}

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            feeds = {name: np.asarray(value).astype(types[name]) for name, value in inputs.items() if name in types}
            return dict(zip(names, session.run(None, feeds), strict=True))

        return f"onnxruntime {onnxruntime.__version__}", run


@dataclass(frozen=True)
class LiteRt:
    """LiteRT on a file (its path) or on its bytes: its reference kernels, or its usual ones where those lack an operator. `inputs` and `outputs`: name here
    -> tensor of the file; an input that is none of the file's is a state, which the file keeps. inside: tensors are wanted that are no outputs of the file's.
    custom: the network has operators that only the delegate for CPUs knows."""

    model: str | bytes = field(repr=False)
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    inside: bool = False
    custom: bool = False
    package: str = "ai-edge-litert"

    def open(self) -> tuple[str, Outputs]:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        given: dict[str, Any] = {"model_path" if isinstance(self.model, str) else "model_content": self.model}
        kept = {**given, "num_threads": 1, "experimental_preserve_all_tensors": self.inside}
        try:
            first = OpResolverType.BUILTIN if self.custom else OpResolverType.BUILTIN_REF
            interpreter = Interpreter(experimental_op_resolver_type=first, **kept)
        except ValueError:
            usual = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            interpreter = Interpreter(experimental_op_resolver_type=usual, **kept)
        ports = {port["index"]: port for port in interpreter.get_input_details()}
        types = {port["index"]: port["dtype"] for port in interpreter.get_tensor_details()}

        def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            for name, place in self.inputs.items():
                if place in ports and tuple(ports[place]["shape"]) != np.shape(given[name]):
                    interpreter.resize_tensor_input(place, np.shape(given[name]))
            interpreter.allocate_tensors()
            for name, place in self.inputs.items():
                interpreter.set_tensor(place, np.asarray(given[name]).astype(types[place]))
            interpreter.invoke()
            return {name: interpreter.get_tensor(place) for name, place in self.outputs.items()}

        return f"LiteRT {importlib.metadata.version('ai-edge-litert')}", run


@dataclass(frozen=True)
class OutputCheck:
    """One output. sqnr_db: of the imported network against the file's, infinite where they are equal, -infinite where infinities or shapes differ;
    for integers the decibels of the fraction that is equal have no meaning, and `differing` counts. max_error: over the finite elements. overflow: both
    have infinities or NaN, at other places, and are equal where both are finite."""

    name: str
    sqnr_db: float
    max_error: float
    differing: int
    equal: bool
    overflow: bool = False


@dataclass(frozen=True)
class ImportCheck:
    """Whether the imported float network computes what another runtime does. status: "equal", "different", "not run" (`reason` says why) or "not installed".

    least_db: the SQNR that every floating output must reach; `samples`: on how many it was measured. library: the library was compared, which rounds as
    the quantized file does, and whose float network is farther from it.
    """

    status: str
    runtime: str = ""
    samples: int = 0
    least_db: float = 0.0
    outputs: list[OutputCheck] = field(default_factory=list)
    reason: str = ""
    library: bool = False

    def state(self) -> dict[str, np.ndarray]:
        """All of it as an array, for `of_state`."""
        return {"plain": np.frombuffer(json.dumps(asdict(self)).encode(), np.uint8)}

    @staticmethod
    def of_state(state: Mapping[str, np.ndarray]) -> ImportCheck:
        """Raises what a state makes a parser raise that `state` did not make."""
        plain = parse_json(state["plain"].tobytes().decode())
        return ImportCheck(**{**plain, "outputs": [OutputCheck(**o) for o in plain["outputs"]]})

    def __str__(self) -> str:
        if self.status == "not installed":
            return f"import: not compared with another runtime ({self.runtime} is not installed)"
        if self.status == "not run":
            return f"import: not compared with another runtime: {self.runtime} can't run the model: {self.reason}"
        worst = min(self.outputs, key=lambda o: (o.equal, o.sqnr_db))
        measured = f"'{worst.name}' {worst.sqnr_db:.1f} dB, {worst.differing} elements differ by up to {worst.max_error:.3g}"
        verdict = "is" if self.status == "equal" else "is NOT"
        what = "library" if self.library else "float network"
        on = f"{self.samples} sample{'s' * (self.samples != 1)}"
        return f"import: the {what} {verdict} what {self.runtime} computes from the model, on {on}: at the worst {measured}"

    @property
    def failure(self) -> str | None:
        """The sentence for a verdict, or None."""
        if self.status != "different":
            return None
        wrong = [o for o in self.outputs if not o.equal]
        if all(o.overflow for o in wrong):
            names = ", ".join(f"'{o.name}'" for o in wrong)
            return (
                f"the numbers of {names} grow beyond float32, here and in {self.runtime}, to infinities or NaN that are not at the same places, so "
                "they can't be compared. Check the preprocessing and the weights of the model"
            )
        said = ", ".join(f"'{o.name}' {o.sqnr_db:.1f} dB (largest error {o.max_error:.3g})" for o in wrong)
        return (
            f"the imported float network is not what {self.runtime} computes from the model: {said}, at least {self.least_db:g} dB expected. "
            "An operator is read wrongly; please report the model"
        )


def confirmed(found: ImportCheck, checked: Callable[[], ImportCheck]) -> ImportCheck:
    """`found`, of the float network of a quantized file, or, where that is far from what the file computes, `checked`, of the library: the roundings of the
    file may take its results that far, where inputs lie beyond its ranges or scales are coarse, and an operator that is read wrongly is wrong in both."""
    if found.failure is None:
        return found
    other = checked()
    return replace(other, library=True) if other.status == "equal" else found


def installed_version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_import(
    other: Elsewhere,
    imported: Runs,
    samples: Iterable[Mapping[str, np.ndarray]],
    least_db: float,
    fixed: Mapping[str, Any] = {},
    rounded: Container[str] = (),
) -> ImportCheck:
    """Compare the float network `imported` with its model in the runtime `other`, over `samples`, each as the network takes them.

    least_db: how near outputs must come that are floats, or the integers of a quantization (`rounded`), where a step is nothing. fixed: inputs of the model
    that the network has as constants. What the other runtime can't do is no error, but in the result.
    """
    runtime, totals, done = other.package, dict[str, _Total](), 0
    try:
        runtime, run = other.open()
        for sample in samples:
            wanted = run({**{name: np.asarray(value) for name, value in fixed.items()}, **sample})
            for name, array in imported.run(sample).items():
                totals.setdefault(name, _Total()).add(array, np.asarray(wanted[name]))
            done += 1
    except ImportError:
        return ImportCheck("not installed", runtime)
    except Exception as error:  # the runtimes' exceptions have no common class of their own
        return ImportCheck("not run", runtime, reason=" ".join(str(error).split())[:300] or type(error).__name__)
    outputs = [total.result(name, least_db, name in rounded) for name, total in totals.items()]
    return ImportCheck("equal" if all(o.equal for o in outputs) else "different", runtime, done, least_db, outputs)


class _Total:
    """Sums over samples of one output."""

    def __init__(self) -> None:
        self.sum = self.signal = self.noise = self.worst = 0.0
        self.count = self.differing = 0
        self.integers = self.broken = False
        self.beyond = [False, False]  # has the network, has the other runtime something that is not finite?

    def add(self, got: np.ndarray, wanted: np.ndarray) -> None:
        if got.shape != wanted.shape:
            self.broken = True
            return
        self.integers = wanted.dtype.kind in "iub"
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        a, b = (np.where(np.abs(x) > LIMIT, np.copysign(np.inf, x), x) for x in (a, b))
        finite = np.isfinite(a) & np.isfinite(b)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        self.broken |= bool((~finite & ~same).any())
        self.beyond = [seen or not np.isfinite(x).all() for seen, x in zip(self.beyond, (a, b), strict=True)]
        error = np.abs(a[finite] - b[finite])
        self.sum, self.signal, self.noise = self.sum + float(b[finite].sum()), self.signal + float((b[finite] ** 2).sum()), self.noise + float((error**2).sum())
        self.worst = max(self.worst, float(error.max(initial=0.0)))
        self.count, self.differing = self.count + a.size, self.differing + int((~same).sum())

    def result(self, name: str, least_db: float, rounded: bool) -> OutputCheck:
        """rounded: integers with a zero point, which no part of them tells; what they say is how they differ from their mean."""
        signal = max(self.signal - self.sum**2 / max(self.count, 1), 0.0) if rounded else self.signal
        sqnr = np.inf if self.noise == 0 else 10 * np.log10(signal / self.noise) if signal else -np.inf
        few = self.differing <= max(1, FLIPS * self.count)
        if rounded:
            near = few or self.worst <= 1 or sqnr >= least_db
        elif self.integers:
            near = few
        else:
            near = sqnr >= least_db or self.worst <= SMALL
        overflow = self.broken and near and all(self.beyond)
        return OutputCheck(name, -np.inf if self.broken else float(sqnr), self.worst, self.differing, bool(near and not self.broken), bool(overflow))
