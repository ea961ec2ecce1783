"""Two networks side by side: values joined by value id, and classes voted for, over any number of samples.

What samples tell is a `Tally`. Each sample has one of its own, whoever computes it; they are merged in the order of the samples, so that sums have the same
bits wherever samples run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.padding import Counted
from qcompiler.calibration.ports import real_outputs
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
    classes], over `rows` of them."""

    name: str
    dtype: str
    metrics: Metrics
    agreement: float | None = None
    rows: int | None = None


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

    def merge(self, later: Layers) -> None:
        """Add what another sample showed."""
        for name, (dtype, accumulator) in later._rows.items():
            if name in self._rows:
                self._rows[name][1].merge(accumulator)
            else:
                self._rows[name] = (dtype, accumulator)

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

    def merge(self, later: Votes) -> None:
        """Add the votes on samples that follow."""
        self._found += later._found

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(classes by the library, classes by the float network, bool: what counts), each [rows of all samples]."""
        got, expected, counts = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        return got, expected, counts


class Tally:
    """What samples tell of two networks. names: of the outputs; classified: those that are scores of classes; keep: whether the outputs themselves are
    kept, with zeros where they don't count."""

    def __init__(self, actual: Runner, reference: Runner, names: Sequence[str], classified: Sequence[str], keep: bool) -> None:
        self._actual, self._reference, self._keep = actual, reference, keep
        self.samples = self.hidden = 0
        self.outputs = {name: Accumulator() for name in names}
        self.votes = {name: Votes(name) for name in classified}
        self.layers = Layers(actual, reference)
        self.kept: list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = []

    def add(self, sample: Mapping[str, np.ndarray], counts: Counted, layers: bool) -> None:
        """Run both networks on a sample, of which `counts` counts, and compare them, with all layers or without."""
        if layers:
            got, expected = self.layers.add(sample, counts)
        else:
            got, expected = self._actual.run(sample), self._reference.run(sample)
        got = real_outputs(self._actual.manifest, got)
        for name, accumulator in self.outputs.items():
            accumulator.add(*(counts.output(name, a[name]).astype(np.float32) for a in (got, expected)))
        for name, vote in self.votes.items():
            vote.add(got[name], expected[name], counts)
        if self._keep:
            self.kept.append((counts.outputs(got), counts.outputs(expected)))
        self.samples, self.hidden = self.samples + 1, self.hidden + counts.hidden

    def merge(self, later: Tally) -> None:
        """Add the tally of a sample that follows."""
        for name, accumulator in self.outputs.items():
            accumulator.merge(later.outputs[name])
        for name, vote in self.votes.items():
            vote.merge(later.votes[name])
        self.layers.merge(later.layers)
        self.kept += later.kept
        self.samples, self.hidden = self.samples + later.samples, self.hidden + later.hidden
