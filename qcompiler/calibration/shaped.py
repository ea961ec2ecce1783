"""Samples of several shapes in one data set: sentences of their own length, for a network that is compiled at several.

A source is a folder of `.npz` (each as `data.py` takes one, of one shape), one such file, a folder of images, or any iterable of samples. A sample whose shape
lies between two compiled ones is padded, where there are rules for it. The shape of every sample is known before the first is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.tensor import TensorInfo, as_array
from qcompiler.calibration.arrays import read_header, read_headers
from qcompiler.calibration.batches import is_batches, is_loader, named
from qcompiler.calibration.data import ArraySamples, Sample, Samples, Source, check_names, check_sample, names_of, open_samples
from qcompiler.runtime.shapes import Fitting, Shapes


class ShapedSamples:
    """Samples, each of one of the shapes of a network. which: their numbers. kept: the places of those that are handed out, None for all. names: of all
    that they hold, where the source has some. left_out: images of the source that make no whole sample."""

    def __init__(
        self, read: Callable[[], Iterator[Sample]], which: Sequence[int], kept: Sequence[int] | None = None, names: Sequence[str] = (), left_out: int = 0
    ) -> None:
        self._read, self._which, self._names, self.left_out = read, which, names, left_out
        self._kept = list(range(len(which))) if kept is None else list(kept)
        if not which:
            raise DataError("the data is empty: at least one sample is needed")

    @property
    def names(self) -> Sequence[str]:
        return names_of(self._names, self._kept, len(self._which))

    @property
    def count(self) -> int | None:
        return len(self._kept)

    @property
    def chosen(self) -> tuple[int, list[int]] | None:
        """Of how many samples these are which; None for all."""
        return None if len(self._kept) == len(self._which) else (len(self._which), self._kept)

    @property
    def shapes(self) -> Counter[int]:
        """The number of a shape -> how many samples have it."""
        return Counter(self._which[i] for i in self._kept)

    def __iter__(self) -> Iterator[Sample]:
        kept = set(self._kept)
        return (sample for place, sample in enumerate(self._read()) if place in kept)

    def take(self, indices: Sequence[int]) -> ShapedSamples:
        """Some of these samples, in order."""
        return ShapedSamples(self._read, self._which, sorted(self._kept[i] for i in indices), self._names, self.left_out)

    def mapped(self, form: Callable[[Sample], Sample]) -> ShapedSamples:
        """These samples, each put into another form."""
        return ShapedSamples(lambda: map(form, self._read()), self._which, self._kept, self._names, self.left_out)

    def at(self, shape: int) -> ShapedSamples:
        """Those of one shape."""
        return ShapedSamples(self._read, self._which, [i for i in self._kept if self._which[i] == shape], self._names, self.left_out)


def open_any(source: Source | Samples, inputs: Sequence[TensorInfo], fitting: Fitting, preprocess: Any = None, pixels: bool = False) -> Samples:
    """`open_shaped` for several shapes, or a folder of `.npz`; else `open_samples`. pixels: what is made of images."""
    folder = isinstance(source, (str, os.PathLike)) and preprocess is None and any(Path(source).glob("*.npz"))
    several = len(fitting.all) > 1 or folder or isinstance(source, ShapedSamples)
    return open_shaped(source, inputs, fitting, preprocess, pixels) if several else open_samples(source, inputs, preprocess, pixels)


def open_shaped(source: Source | Samples, inputs: Sequence[TensorInfo], fitting: Fitting, preprocess: Any = None, pixels: bool = False) -> ShapedSamples:
    """The samples of `source`, each checked against the shape of `fitting` that it has or is padded to. inputs: names and types.

    Raises DataError for a sample that no shape fits, and whatever `open_samples` refuses.
    """
    forms = [[TensorInfo(i.name, shapes[i.name], i.dtype) for i in inputs] for shapes in fitting.inputs]
    if isinstance(source, ShapedSamples):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return _of_iterable(source, forms, fitting, preprocess)
    path = Path(source)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.suffix in (".npz", ".npy") and path.is_file() else []
    if not files or preprocess is not None:  # images, or a mistake
        return _first_fit(lambda form: open_samples(path, form, preprocess, pixels), forms)
    return _joined([_of_file(file, forms, fitting) for file in files])


def _joined(parts: Sequence[ShapedSamples]) -> ShapedSamples:
    return ShapedSamples(lambda: (sample for part in parts for sample in part._read()), [number for part in parts for number in part._which])


def _of(samples: Samples, number: int, finish: Callable[[Sample], Sample] = lambda sample: sample) -> ShapedSamples:
    """Samples that all have, or `finish` gives them, one shape."""
    assert samples.count is not None
    return ShapedSamples(lambda: map(finish, samples), [number] * samples.count, names=samples.names, left_out=getattr(samples, "left_out", 0))


def _first_fit(opened: Callable[[Sequence[TensorInfo]], Samples], forms: Sequence[Sequence[TensorInfo]]) -> ShapedSamples:
    """Of the first shape that fits them. Raises what the first shape raises where none does."""
    refusals = []
    for number, form in enumerate(forms):
        try:
            return _of(opened(form), number)
        except DataError as error:
            refusals.append(error)
    raise refusals[0]


def _of_file(path: Path, forms: Sequence[Sequence[TensorInfo]], fitting: Fitting) -> ShapedSamples:
    """An `.npz` or `.npy`. Its arrays count samples along the first axis, as everywhere."""
    try:
        return _first_fit(lambda form: ArraySamples(path, form), forms)
    except DataError:
        headers = {forms[0][0].name: read_header(path)} if path.suffix == ".npy" else read_headers(path)
        check_names(headers, forms[0], str(path))
        shapes: dict[str, tuple[int, ...]] = {}
        for info in forms[0]:
            shape, rank = headers[info.name].shape, len(info.shape)
            shapes[info.name] = shape[1:] if len(shape) > rank else (1, *shape[1:])
        number = fitting.padded(shapes)
        if number is None and any(len(shape) == len(info.shape) for info, shape in zip(forms[0], shapes.values(), strict=True)):
            raise DataError(f"{path}: {fitting.refusal(shapes)}") from None
        if number is None:
            raise
        padded = number
        samples = ArraySamples(path, [TensorInfo(i.name, shapes[i.name], i.dtype) for i in forms[0]])
        return _of(samples, padded, lambda sample: {name: fitting.pad(name, array, padded) for name, array in sample.items()})


def _of_iterable(source: Any, forms: Sequence[Sequence[TensorInfo]], fitting: Fitting, preprocess: Any) -> ShapedSamples:
    held = list(source) if isinstance(source, Iterator) or is_loader(source) else source
    if is_batches(held) and not isinstance(held, Mapping):
        held = [named(item, forms[0], f"sample {place}") for place, item in enumerate(held)]
    open_samples(held, forms[0], preprocess)  # refuses what is no iterable of samples

    def read() -> Iterator[Sample]:
        for place, sample in enumerate(held):
            where = f"sample {place}"
            number, padded = _fitted(sample, forms, fitting, where)
            yield check_sample(padded, forms[number], where)

    return ShapedSamples(read, [_fitted(sample, forms, fitting, f"sample {place}")[0] for place, sample in enumerate(held)])


def _fitted(sample: Any, forms: Sequence[Sequence[TensorInfo]], fitting: Fitting, where: str) -> tuple[int, Any]:
    if not isinstance(sample, Mapping) or any(as_array(sample.get(i.name)) is None for i in forms[0]):
        return 0, check_sample(sample, forms[0], where)
    arrays: dict[str, np.ndarray] = {name: np.asarray(as_array(value)) for name, value in sample.items()}
    shapes: Shapes = {name: array.shape for name, array in arrays.items()}
    exact = fitting.exact(shapes)
    number = fitting.padded(shapes) if exact is None else exact
    if number is None:
        check_names(arrays, forms[0], where)
        raise DataError(f"{where}: {fitting.refusal(shapes)}")
    return number, arrays if exact is not None else {n: fitting.pad(n, a, number) if n in fitting.inputs[0] else a for n, a in arrays.items()}
