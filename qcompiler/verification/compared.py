"""Two networks side by side: values joined by value id, and classes voted for, over any number of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.padding import Counted
from qcompiler.numerics.metrics import Accumulator, Metrics
from qcompiler.runtime.channels import stored_form
from qcompiler.runtime.shapes import specializations

Visit = Callable[[str, np.ndarray], None]


@runtime_checkable
class Runner(Protocol):
    """What is compared: `qcompiler.runtime.session.Session`, or anything that runs alike."""

    manifest: dict[str, Any]

    @property
    def inputs(self) -> Sequence[TensorInfo]: ...
    @property
    def outputs(self) -> Sequence[TensorInfo]: ...
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def trace(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Compared:
    """One output or one layer. `dtype`: how the library holds it ("int8", "float32"). `agreement`: top-1, for outputs of shape [batch,
    classes]."""

    name: str
    dtype: str
    metrics: Metrics
    agreement: float | None = None


class Layers:
    """Joins two traces by value id."""

    def __init__(self, actual: Runner, reference: Runner) -> None:
        self._actual, self._reference = actual, reference
        self._rows: dict[str, tuple[str, Accumulator]] = {}
        self._skip = {i.name for i in actual.inputs}
        self._values = {name: value for m in reversed(specializations(actual.manifest)) for name, value in m.get("values", {}).items()}

    def add(self, sample: Mapping[str, np.ndarray], counts: Counted) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Trace both networks on a sample, and compare what counts; returns their outputs (actual, reference)."""
        kept: dict[str, np.ndarray] = {}
        outputs = self._reference.trace(sample, lambda name, array: kept.__setitem__(name, array.copy()))

        def visit(name: str, array: np.ndarray) -> None:
            if name in kept and name not in self._skip:
                expected = stored_form(self._actual.manifest, name, kept[name]) if kept[name].dtype.kind == "f" else kept[name]
                self._compare(name, array, expected, counts)

        return self._actual.trace(sample, visit), outputs

    def _compare(self, name: str, array: np.ndarray, reference: np.ndarray, counts: Counted) -> None:
        if array.shape != reference.shape:
            raise ArtifactError(f"value '{name}' has shape {list(array.shape)} in the library and {list(reference.shape)} in the float network")
        array, reference = counts.part(name, array), counts.part(name, reference)
        step, real = None, array
        if array.dtype in (np.int8, np.int16) and reference.dtype.kind == "f":
            try:
                info = self._values[name]
                step, zero = float(info["scale"]), int(info["zero_point"])
            except (KeyError, TypeError) as error:
                raise ArtifactError(f"the manifest gives no scale and zero point for the int8 value '{name}'") from error
            real = (array.astype(np.float32) - np.float32(zero)) * np.float32(step)
        elif array.dtype.kind != "f" or reference.dtype.kind != "f":  # integers of the network itself
            real, reference = array.astype(np.float32), reference.astype(np.float32)
        if name not in self._rows:
            self._rows[name] = (str(array.dtype), Accumulator(step))
        self._rows[name][1].add(real, reference)

    def rows(self) -> list[Compared]:
        if not self._rows:
            raise ArtifactError("no value of the library occurs in the float network: it was compiled from another model")
        return [Compared(name, dtype, accumulator.metrics()) for name, (dtype, accumulator) in self._rows.items()]


class Votes:
    """The classes that both networks find for each row of an output [rows, classes], and which rows count."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, got: np.ndarray, expected: np.ndarray, counts: Counted) -> None:
        """Scores of one sample."""
        mask = counts.mask(self._name, got)
        best = (np.where(mask, scores, -np.inf).argmax(1) for scores in (got, expected))
        self._found.append((*best, mask.any(1)))

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(classes by the library, classes by the float network, bool: what counts), each [rows of all samples]."""
        got, expected, counts = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        return got, expected, counts
