"""Calibration: one streaming pass of the float network over sample data -> `CalibrationTable`.

Each value is looked at once, where it lies, while the network runs; memory is bounded by the network and one table of `BINS` counts per
value, not by the number of samples. The result does not depend on the order of the samples, but for the rounding of the float64 means.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.files import parse_json, read_regular, replacing
from qcompiler.base.parallel import in_order, worker_count
from qcompiler.base.progress import Progress, silent
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import check_sample
from qcompiler.calibration.histogram import BINS, Counts, Histogram, channel_statistics, counted
from qcompiler.calibration.padding import ALL, Padding
from qcompiler.calibration.shaped import ShapedSamples
from qcompiler.runtime.session import Session

FORMAT = 1
_SHORT = 2.0**24  # multiplications, of steps on the average: a tenth of a millisecond
UNBOUNDED = 2.0**100  # values beyond it stand for infinity: the least float32 that masks add, say
Visit = Callable[[str, np.ndarray], None]


class Executor(Protocol):
    """What runs the float network. `trace` calls visit(value id, array) for each input, then after each step, and returns the outputs.
    Arrays are valid during the call only."""

    @property
    def inputs(self) -> Sequence[TensorInfo]: ...
    def trace(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> Mapping[str, np.ndarray]: ...


class Watcher(Protocol):
    """Something else that looks at the values of the same pass (the means that bias correction needs, say). It sees what counts: without rows of padding
    (`Counted.rows`), outputs with zeros there.

    Samples are looked at side by side: `look`, in any thread and any order, finds what there is to know of a value of sample number `sample` (of those that
    the watcher sees), None for nothing, and changes nothing (seen: what the table records of the value, None for nothing); `take` gets what was found, sample
    after sample, and then `end_sample`."""

    def look(self, sample: int, value_id: str, array: np.ndarray, seen: Seen | None) -> Any: ...
    def take(self, value_id: str, seen: Any) -> None: ...
    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None: ...


@dataclass(frozen=True)
class Seen:
    """What there is to know of one sample's value; see `Statistics`. counts: None where the value is not finite or beyond UNBOUNDED; nan: it holds a NaN."""

    size: int
    channels: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # sums, squares, low, high
    low: float
    high: float
    power: float
    counts: Counts | None
    nan: bool = False

    @staticmethod
    def of(array: np.ndarray) -> Seen | None:
        """Of a float32 array; None for one without elements."""
        if array.size == 0:
            return None
        channels = channel_statistics(array)
        sums, squares, least, greatest = channels
        low, high, power = float(least.min()), float(greatest.max()), float(squares.sum())
        if not (np.isfinite(sums).all() and max(-low, high) < UNBOUNDED):
            return Seen(array.size, channels, low, high, power, None, bool(np.isnan(array).any()))
        return Seen(array.size, channels, low, high, power, counted(array, low, high))


@dataclass
class Statistics:
    """What calibration saw of one float32 value over all samples.

    Channels are the last axis; where samples have last axes of several lengths, all of it is one channel. `channel_sum` and `channel_square` (of values
    and of their squares, float64[C]) are over `channel_count` values per channel; `channel_low` and `channel_high` are float32[C].
    """

    histogram: Histogram = field(default_factory=Histogram)
    channel_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_low: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    channel_high: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    channel_count: int = 0

    @property
    def count(self) -> int:
        """Number of values seen."""
        return self.histogram.total

    @property
    def low(self) -> float:
        return self.histogram.low

    @property
    def high(self) -> float:
        return self.histogram.high

    @property
    def channel_mean(self) -> np.ndarray:
        """float64[C]"""
        return self.channel_sum / max(self.channel_count, 1)

    def add(self, array: np.ndarray) -> bool:
        """Look at one sample's float32 array. False, and nothing recorded, when it holds a NaN, an infinity or a number beyond UNBOUNDED."""
        seen = Seen.of(array)
        return seen is None or self.take(seen)

    def take(self, seen: Seen) -> bool:
        """`add` of what was seen."""
        if seen.counts is None:
            return False
        sums, squares, low, high = seen.channels
        if self.channel_count and len(sums) != len(self.channel_sum):
            sums, squares, low, high = sums.sum(keepdims=True), squares.sum(keepdims=True), low.min(keepdims=True), high.max(keepdims=True)
            self.channel_count *= len(self.channel_sum)
            self.channel_sum, self.channel_square = self.channel_sum.sum(keepdims=True), self.channel_square.sum(keepdims=True)
            self.channel_low, self.channel_high = self.channel_low.min(keepdims=True), self.channel_high.max(keepdims=True)
        if self.channel_count:
            low, high = np.minimum(low, self.channel_low), np.maximum(high, self.channel_high)
            sums, squares = sums + self.channel_sum, squares + self.channel_square
        self.channel_sum, self.channel_square, self.channel_low, self.channel_high = sums, squares, low, high
        self.channel_count += seen.size // len(sums)
        self.histogram.take(seen.counts, seen.low, seen.high, seen.power)
        return True


@dataclass
class CalibrationTable:
    """Statistics by value id, over `samples` samples. unbounded: values that were infinite, or as good as that, which no scale can state (masks).

    Saved as JSON: one value per line, counts run-length coded (-n stands for n zeros).
    """

    samples: int = 0
    values: dict[str, Statistics] = field(default_factory=dict)
    unbounded: set[str] = field(default_factory=set)
    asked: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what plans have asked so far, and were told, for the next plan

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the table's content, which nobody changes once it was asked for."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def with_copies(self, other: CalibrationTable, sources: Mapping[str, str]) -> CalibrationTable:
        """The table with more values. sources: of each the value of `other` that has its numbers."""
        values = {v: other.values[source] for v, source in sources.items() if source in other.values}
        return CalibrationTable(self.samples, {**values, **self.values}, self.unbounded | {v for v, source in sources.items() if source in other.unbounded})

    def to_json(self) -> str:
        """The whole table as JSON text; equal tables give equal text. Floats are written so that they read back exactly."""
        rows = [f"    {json.dumps(name)}: {json.dumps(_encode(s), allow_nan=False)}" for name, s in sorted(self.values.items())]
        unbounded = f'  "unbounded": {json.dumps(sorted(self.unbounded))},\n' if self.unbounded else ""
        return f'{{\n  "format": {FORMAT},\n  "samples": {self.samples},\n{unbounded}  "values": {{\n' + ",\n".join(rows) + "\n  }\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the table to `path`, beside it first and then renamed. Raises OutputError."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json())

    @staticmethod
    def from_json(text: str, where: str = "calibration table") -> CalibrationTable:
        """Raises DataError, naming `where`, for text that `to_json` did not write."""
        try:
            document = parse_json(text)
            if document["format"] != FORMAT:
                raise DataError(f"{where}: format {document['format']} is not supported (this version reads {FORMAT}); calibrate again")
            values = {name: _decode(row) for name, row in document["values"].items()}
            return CalibrationTable(int(document["samples"]), values, {str(name) for name in document.get("unbounded", [])})
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise DataError(f"{where}: not a calibration table ({type(error).__name__}: {error}); calibrate again") from error

    @staticmethod
    def load(path: str | Path) -> CalibrationTable:
        """Raises DataError when the file is missing, unreadable or malformed."""
        try:
            text = read_regular(path).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: can't be read as a calibration table: {error}") from error
        return CalibrationTable.from_json(text, str(path))


def calibrate(
    executor: Executor,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    ids: Collection[str] | None = None,
    watchers: Sequence[Watcher] = (),
    at_first: Sequence[Watcher] = (),
    padding: Padding | None = None,
    progress: Progress = silent,
    stage: str = "calibrate",
) -> CalibrationTable:
    """Run the float network over `samples` and record the float32 values named in `ids` (None: all), the network's inputs among them.

    Each sample is {input name: array} with exactly the model's shapes and dtypes; `ShapedSamples` are of any shape that the executor has. `watchers` see
    every value of the same pass, those `at_first` only where the sample has the executor's first shape; `stage` is what `progress` calls it. padding:
    positions that the network masks, which are left out; `executor` is a `Session` then. Raises DataError for no samples; samples that are all padding, or
    that a watcher refuses; missing or unknown input names; a wrong shape or dtype; NaN or infinity in an input, NaN in a recorded value, or
    an output that is nothing else.
    """
    wanted = None if ids is None else set(ids)
    table = CalibrationTable()
    total = len(samples) if isinstance(samples, Sized) else getattr(samples, "count", None)

    def looked(executor: Executor, item: tuple[int, Mapping[str, np.ndarray], Sequence[tuple[int, Watcher]]]) -> _Looked:
        number, sample, looking = item
        found = _Looked([w for _, w in looking])

        def visit(name: str, array: np.ndarray) -> None:
            array = visible.rows(name, array)
            seen = Seen.of(array) if array.dtype == np.float32 and (wanted is None or name in wanted) else None
            found.values.append((name, seen, [w.look(index, name, array, seen) for index, w in looking]))

        try:
            visible = padding.of(executor, sample) if padding else ALL
            found.outputs = visible.outputs(executor.trace(sample, visit))
        except DataError as error:
            raise DataError(f"calibration sample {number}: {error}") from None
        return found

    for found in in_order(looked, _side_by_side(executor), _numbered(samples, executor.inputs, watchers, at_first)):
        _take(table, found)
        table.samples += 1
        progress(stage, table.samples, total)
    if table.samples == 0:
        raise DataError("calibration data is empty; give at least one sample, better 50 to 500 that look like what the model will see")
    return table


def _side_by_side(executor: Executor) -> Sequence[Executor]:
    """What runs samples at the same time. Where steps are short, what is done in Python in between takes longer, and is done by one thread at a time: others
    would get into its way."""
    if not isinstance(executor, Session):
        return [executor]
    steps = executor.manifest["steps"]
    short = sum(step["macs"] for step in steps) < _SHORT * len(steps)
    return executor.alone(1 if short else worker_count(executor.manifest["workspace"]))


@dataclass
class _Looked:
    """What there was to see in one sample: of each value its statistics, and what each of `watchers` noticed."""

    watchers: Sequence[Watcher]
    values: list[tuple[str, Seen | None, list[Any]]] = field(default_factory=list)
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)


def _take(table: CalibrationTable, found: _Looked) -> None:
    """Add a sample to the table, and tell the watchers. Raises DataError for NaN."""
    for name, seen, noticed in found.values:
        if seen is not None and not table.values.setdefault(name, Statistics()).take(seen):
            if seen.nan:
                raise DataError(
                    f"calibration sample {table.samples}: value '{name}' is not a number (NaN) although the inputs are; "
                    "check the preprocessing, or leave this sample out"
                )
            table.unbounded.add(name)
        for watcher, something in zip(found.watchers, noticed, strict=True):
            if something is not None:
                watcher.take(name, something)
    for name, array in found.outputs.items():
        if array.size and array.dtype.kind == "f" and np.isnan(array).all():
            raise DataError(
                f"calibration sample {table.samples}: output '{name}' is nothing but NaN although the inputs are numbers; "
                "check the preprocessing, and the network in the runtime that it comes from"
            )
    for watcher in found.watchers:
        watcher.end_sample(found.outputs)


def _numbered(
    samples: Iterable[Mapping[str, np.ndarray]], inputs: Sequence[TensorInfo], watchers: Sequence[Watcher], at_first: Sequence[Watcher]
) -> Iterator[tuple[int, Mapping[str, np.ndarray], list[tuple[int, Watcher]]]]:
    """(number, sample, its number for each watcher that sees it, and the watcher)."""
    alike = 0
    for number, sample in enumerate(samples):
        if not isinstance(samples, ShapedSamples):
            sample = check_sample(sample, inputs, f"calibration sample {number}")
        first = all(sample[i.name].shape == tuple(i.shape) for i in inputs)
        yield number, sample, [*((number, w) for w in watchers), *((alike, w) for w in at_first if first)]
        alike += first


def _encode(s: Statistics) -> dict[str, Any]:
    h = s.histogram
    return {
        "low": h.low,
        "high": h.high,
        "mean_low": h.mean_low,
        "mean_high": h.mean_high,
        "samples": h.samples,
        "zeros": h.zeros,
        "exponent": h.exponent,
        "first": h.first,
        "counts": _run_lengths(h.counts),
        "powered": h.powered,
        "relative": h.relative[np.flatnonzero(h.counts)].tolist(),
        "channel_count": s.channel_count,
        "channel_sum": s.channel_sum.tolist(),
        "channel_square": s.channel_square.tolist(),
        "channel_low": s.channel_low.tolist(),
        "channel_high": s.channel_high.tolist(),
    }


def _decode(row: Mapping[str, Any]) -> Statistics:
    counts: list[int] = []
    for item in row["counts"]:
        counts.extend([item] if item > 0 else [0] * -item)
    numbers = [float(row[k]) for k in ("low", "high", "mean_low", "mean_high")]
    if len(counts) > BINS or not all(map(math.isfinite, numbers)):
        raise ValueError("a histogram is damaged")
    array = np.zeros(BINS, np.int64)
    array[: len(counts)] = counts
    relative = np.zeros(BINS)
    relative[np.flatnonzero(array)] = row["relative"]
    low, high, mean_low, mean_high = numbers
    exponent, first, zeros, samples, powered = (int(row[k]) for k in ("exponent", "first", "zeros", "samples", "powered"))
    histogram = Histogram(exponent, first, array, zeros, low, high, mean_low, mean_high, samples, relative, powered)
    return Statistics(
        histogram,
        np.asarray(row["channel_sum"], np.float64),
        np.asarray(row["channel_square"], np.float64),
        np.asarray(row["channel_low"], np.float32),
        np.asarray(row["channel_high"], np.float32),
        int(row["channel_count"]),
    )


def _run_lengths(counts: np.ndarray) -> list[int]:
    """Counts as a list in which -n stands for n zeros; trailing zeros are left out."""
    used = np.flatnonzero(counts)
    gaps = np.diff(used, prepend=-1) - 1
    return [item for gap, count in zip(gaps.tolist(), counts[used].tolist(), strict=True) for item in ([-gap, count] if gap else [count])]
