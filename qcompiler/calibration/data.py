"""Samples: calibration and evaluation data as a stream of `{input name: array}`, one model call each.

A source is a `.npz` (one array per input name, first axis = samples), a `.npy` for a model with one input, a folder of images with a
preprocessing file, any iterable of samples, or batches of them (`batches.py`). Files are read a sample at a time, so memory does not grow with their
number, and may be read again and again. Everything that a header can show wrong is refused before the first sample; NaN and Inf when their sample comes up.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from qcompiler.base.errors import DataError, closest
from qcompiler.base.files import about, open_regular, read_regular
from qcompiler.base.tensor import TensorInfo, as_array, fits
from qcompiler.calibration.arrays import Header, damage, read_array, read_header, read_headers, read_rows, skip_header
from qcompiler.calibration.batches import Rows, is_batches
from qcompiler.calibration.preprocess import IMAGE_SUFFIXES, Preprocess, load_preprocess

KEPT = 64 << 20  # bytes of decoded images that samples keep for the next pass
Sample = dict[str, np.ndarray]
Source = str | os.PathLike[str] | Iterable[Any]
"""What samples are read from: a path, `{input name: array, or tensor of another library}` each, or batches."""


Preprocessing = str | os.PathLike[str] | Mapping[str, Any] | Preprocess | None
"""How images become inputs: a YAML file, a mapping with the same keys, or what was read from them."""


@runtime_checkable
class Samples(Protocol):
    """A stream of checked samples that can be iterated any number of times. `names` label them where the source does (file names)."""

    @property
    def names(self) -> Sequence[str]: ...
    def __iter__(self) -> Iterator[Sample]: ...
    @property
    def count(self) -> int | None: ...


def open_samples(source: Source | Samples, inputs: Sequence[TensorInfo], preprocess: Preprocessing = None, pixels: bool = False) -> Samples:
    """The samples of `source` (a path, an iterable of `{name: array}`, or what this function returned before), checked against `inputs`.

    `preprocess` (a YAML path, a mapping with the same keys, or a `Preprocess`) is required for a folder of images, and refused for anything else. pixels:
    images are handed out as uint8 pixels, only resized and cropped.
    An iterator that can be read only once is read into a list. Raises DataError.
    """
    settings = None if preprocess is None else load_preprocess(preprocess)
    if isinstance(source, (ArraySamples, ImageSamples, CheckedSamples, _Taken)):
        return source
    if not isinstance(source, (str, os.PathLike)):
        if settings is not None:
            raise DataError("preprocessing applies to a folder of images only; the samples given are arrays already")
        held: Any = list(source) if isinstance(source, Iterator) else source
        return LoadedSamples(Rows(held, inputs), inputs) if is_batches(held) else CheckedSamples(held, inputs)
    path = Path(source)
    try:
        there = about(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    if there is not None and stat.S_ISDIR(there.st_mode):
        return ImageSamples(path, inputs, settings, pixels)
    if there is None:
        raise DataError(f"{path}: no such file or folder. Data is an .npz, an .npy, or a folder of images with a preprocessing file")
    if settings is not None:
        raise DataError(f"{path}: preprocessing applies to a folder of images only")
    if path.suffix not in (".npz", ".npy"):
        raise DataError(f"{path}: unknown kind of data '{path.suffix}'. Supported: .npz, .npy, a folder of images with a preprocessing file")
    return ArraySamples(path, inputs)


def describe(inputs: Sequence[TensorInfo]) -> str:
    return "; ".join(f"'{i.name}' {i.dtype}{list(i.shape)}" for i in inputs)


def check_names(names: Iterable[str], inputs: Sequence[TensorInfo], where: str) -> None:
    """Raises DataError unless `names` are exactly the inputs' names."""
    wanted, given = [i.name for i in inputs], list(names)
    for name in given:
        if name not in wanted:
            raise DataError(f"{where}: unknown input '{name}'.{closest(name, wanted)} The model has: {describe(inputs)}")
    missing = [n for n in wanted if n not in given]
    if missing:
        raise DataError(f"{where}: missing input {', '.join(repr(n) for n in missing)}. The model has: {describe(inputs)}")


def check_sample(sample: Any, inputs: Sequence[TensorInfo], where: str) -> Sample:
    """`sample` when it is one full set of inputs: right names, shapes and dtypes, every number finite (or a mask of -Inf). Raises DataError."""
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: a sample is a mapping of input names to arrays, not {type(sample).__name__}. The model has: {describe(inputs)}")
    check_names(sample, inputs, where)
    checked = {}
    for info in inputs:
        array = as_array(sample[info.name])
        if array is None:
            raise DataError(f"{where}: input '{info.name}' is a {type(sample[info.name]).__name__}; an array or a tensor is expected")
        if not fits(array.dtype, info.dtype):
            raise DataError(f"{where}: input '{info.name}' has dtype {array.dtype}, the model wants {info.dtype}; convert with .astype('{info.dtype}')")
        if array.shape != tuple(info.shape):
            hint = "; add the batch axis with x[None]" if array.shape == tuple(info.shape[1:]) else ""
            raise DataError(f"{where}: input '{info.name}' has shape {list(array.shape)}, the model wants {list(info.shape)}{hint}")
        check_finite(array, info.name, where)
        checked[info.name] = array.astype(info.dtype, copy=False)
    return checked


def check_finite(array: np.ndarray, name: str, where: str) -> None:
    """Raises DataError when `array` holds NaN or Inf, unless it is an additive mask: nothing but 0 and -Inf."""
    if array.dtype.kind == "f" and not np.isfinite(array).all() and not ((array == 0) | (array == -np.inf)).all():
        kind = "NaN" if np.isnan(array).any() else "Inf" if (array == np.inf).any() else "-Inf beside other numbers than 0"
        advice = "; where it is added to the logits of an attention, -10000 hides a key as -Inf does" if kind.startswith("-") else ""
        raise DataError(f"{where}: input '{name}' holds {kind}; remove or mend the sample{advice}")


class CheckedSamples:
    """Samples from any iterable of `{name: array}`."""

    names: Sequence[str] = ()

    def __init__(self, source: Iterable[Mapping[str, np.ndarray]], inputs: Sequence[TensorInfo]) -> None:
        if not isinstance(source, Iterable):
            raise DataError(f"samples are an iterable of {{input name: array}}, batches, or a path; got {type(source).__name__}")
        self._source: Iterable[Mapping[str, Any]] = list(source) if isinstance(source, Iterator) else source
        self._inputs = inputs
        if self.count == 0:
            raise DataError("the data is empty: at least one sample is needed")

    @property
    def count(self) -> int | None:
        return len(self._source) if isinstance(self._source, Sized) else None

    def __iter__(self) -> Iterator[Sample]:
        index = -1
        for index, sample in enumerate(self._source):
            yield check_sample(sample, self._inputs, f"sample {index}")
        if index < 0:
            raise DataError("the data is empty: at least one sample is needed")


class LoadedSamples(CheckedSamples):
    """Samples that came in batches; kept from the first look at them on."""

    def __init__(self, rows: Rows, inputs: Sequence[TensorInfo]) -> None:
        self._rows, self._inputs, self.unit = rows, inputs, rows.unit

    @property
    def _source(self) -> list[Mapping[str, Any]]:  # type: ignore[override]
        return self._rows.all

    @property
    def left_out(self) -> int:
        """Rows that make no whole batch."""
        return self._rows.left_out

    def head(self, count: int) -> CheckedSamples:
        """The first samples, without reading more."""
        return CheckedSamples(self._rows.head(count), self._inputs)


class _NoSamples:
    """For a model that needs no data."""

    names: Sequence[str] = ()
    count: int | None = 0

    def __iter__(self) -> Iterator[Sample]:
        return iter(())


NO_SAMPLES = _NoSamples()


@dataclass(frozen=True)
class _Column:
    """One array file, read a `shape`d sample at a time."""

    name: str
    header: Header
    shape: tuple[int, ...]
    dtype: str
    count: int  # samples


class ArraySamples:
    """Samples from an `.npz` or `.npy`. The first axis counts samples: it replaces the model's batch axis when that is 1 or absent.

    For a model whose batch is B > 1, either B consecutive rows make a sample, or the array has one more axis than the input.
    """

    names: Sequence[str] = ()

    def __init__(self, path: Path, inputs: Sequence[TensorInfo]) -> None:
        self._path = path
        if path.suffix == ".npz":
            headers = read_headers(path)
            check_names(headers, inputs, str(path))
        else:
            if len(inputs) != 1:
                raise DataError(f"{path}: an .npy serves a model with one input, this one has {len(inputs)}: use an .npz. {describe(inputs)}")
            headers = {inputs[0].name: read_header(path)}
        self._columns = [self._column(info, headers[info.name]) for info in inputs]
        counts = {c.name: c.count for c in self._columns}
        if len(set(counts.values())) > 1:
            raise DataError(f"{path}: the inputs have different numbers of samples: {counts}")

    @property
    def count(self) -> int | None:
        return self._columns[0].count

    def _column(self, info: TensorInfo, header: Header) -> _Column:
        where, wanted, shape, dtype = str(self._path), tuple(info.shape), header.shape, header.dtype
        if not fits(dtype, info.dtype):
            raise DataError(f"{where}: input '{info.name}' has dtype {dtype}, the model wants {info.dtype}; save x.astype('{info.dtype}')")
        if not shape or shape[0] == 0:
            raise DataError(f"{where}: input '{info.name}' is empty: at least one sample is needed")
        if shape[1:] == wanted:
            return _Column(info.name, header, wanted, info.dtype, shape[0])
        if wanted and shape[1:] == wanted[1:]:
            if shape[0] % wanted[0]:
                raise DataError(f"{where}: input '{info.name}' has {shape[0]} rows, not a multiple of the model's batch {wanted[0]}")
            return _Column(info.name, header, wanted, info.dtype, shape[0] // wanted[0])
        form = "[samples" + "".join(f", {d}" for d in wanted[1:]) + "]"
        raise DataError(f"{where}: input '{info.name}' has shape {list(shape)}, expected {form} for the model's input {list(wanted)}")

    def __iter__(self) -> Iterator[Sample]:
        packed = self._path.suffix == ".npz"
        with ExitStack() as stack:
            streams: list[IO[bytes]] = []
            for column in self._columns:
                file = stack.enter_context(open_regular(self._path))
                with damage(self._path, self._path.suffix):
                    streams.append(stack.enter_context(zipfile.ZipFile(file).open(column.header.member)) if packed else file)
                    skip_header(streams[-1])
            for index in range(self._columns[0].count):
                sample = {}
                for column, stream in zip(self._columns, streams, strict=True):
                    with damage(self._path, self._path.suffix, f"input '{column.name}', sample {index}"):
                        sample[column.name] = read_rows(stream, column.header, math.prod(column.shape)).reshape(column.shape).astype(column.dtype, copy=False)
                    check_finite(sample[column.name], column.name, f"{self._path}: sample {index}")
                yield sample


def _below(folder: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder can't be read: {error.strerror}") from error

    for inside, _, names in os.walk(folder, onerror=unreadable):
        yield from (Path(inside) / name for name in names)


class ImageSamples:
    """Samples from the images below a folder, sorted by relative path; as many images per sample as the input's first axis says. Of the last images that
    make no whole sample, none is used (`left_out`). pixels: uint8 [N, H, W, C], resized and cropped, as a library with such an input takes them; else
    float32 in the layout of `preprocess`. Needs Pillow (the extra `images`)."""

    def __init__(self, folder: Path, inputs: Sequence[TensorInfo], preprocess: Preprocess | None, pixels: bool = False) -> None:
        if preprocess is None:
            raise DataError(f"{folder}: a folder of images needs a preprocessing file (--preprocess FILE.yaml)")
        files = sorted(p for p in _below(folder) if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
        if len(inputs) != 1:
            raise DataError(f"{folder}: a folder of images serves a model with one input, this one has {len(inputs)}: use an .npz. {describe(inputs)}")
        self._folder, self._inputs, self._preprocess, self._pixels, self._files = folder, inputs, preprocess, pixels, files
        self._batch = inputs[0].shape[0] if inputs[0].shape else 1
        self.left_out = len(files) % self._batch
        self.chosen: tuple[int, list[int]] | None = None  # of how many samples these are which
        self._kept: dict[Path, np.ndarray] = {}  # pixels of images, of all that is taken from these
        self._check(self._image(files[0]), files[0])
        if len(files) < self._batch:
            raise DataError(f"{folder}: {len(files)} images, and input '{inputs[0].name}' takes {self._batch} at a time; give at least as many images")

    @property
    def names(self) -> Sequence[str]:
        """File names relative to the folder, of the images that are used."""
        return [p.relative_to(self._folder).as_posix() for p in self._files[: len(self._files) // self._batch * self._batch]]

    @property
    def count(self) -> int | None:
        return len(self._files) // self._batch

    def spread(self, count: int | None) -> ImageSamples:
        """`count` of these samples, evenly spread (None, or more than there are: all)."""
        total = len(self._files) // self._batch
        return self if count is None or count >= total else self.take([i * total // count for i in range(count)])

    def take(self, indices: Sequence[int]) -> ImageSamples:
        """Some of these samples."""
        chosen = copy.copy(self)
        chosen._files = [file for i in indices for file in self._files[i * self._batch : (i + 1) * self._batch]]
        chosen.chosen = (len(self._files) // self._batch, list(indices)) if self.chosen is None else None
        return chosen

    def _image(self, path: Path) -> np.ndarray:
        assert self._preprocess is not None
        pixels = self._kept.get(path)
        if pixels is None:
            pixels = self._preprocess.pixels(path)
            if sum(kept.nbytes for kept in self._kept.values()) + pixels.nbytes <= KEPT:
                self._kept[path] = pixels
        return pixels[None].copy() if self._pixels else self._preprocess.input(pixels, path)

    def _check(self, image: np.ndarray, path: Path) -> np.ndarray:
        info = self._inputs[0]
        if image.shape[1:] != tuple(info.shape[1:]) or str(image.dtype) != info.dtype:
            one = [1, *info.shape[1:]]
            raise DataError(
                f"{path}: preprocessing makes {image.dtype}{list(image.shape)}, but input '{info.name}' is {info.dtype}{one if info.shape else []}"
                f"{f', {self._batch} of them at a time' if self._batch > 1 else ''}; check crop, layout and color"
            )
        return image

    def __iter__(self) -> Iterator[Sample]:
        for first in range(0, len(self._files) - self._batch + 1, self._batch):
            images = [self._check(self._image(path), path) for path in self._files[first : first + self._batch]]
            yield {self._inputs[0].name: np.concatenate(images) if len(images) > 1 else images[0]}


class _Taken:
    """Some samples of a source that can only be read from its beginning."""

    def __init__(self, source: Samples, indices: Sequence[int]) -> None:
        self._source, self._indices = source, set(indices)
        self.chosen = None if source.count is None else (source.count, list(indices))
        self.names = names_of(source.names, indices, source.count)
        self.count: int | None = len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        until = max(self._indices, default=-1) + 1
        return (sample for index, sample in enumerate(itertools.islice(self._source, until)) if index in self._indices)


def names_of(names: Sequence[str], indices: Sequence[int], count: int | None) -> Sequence[str]:
    """Of the names of all that `count` samples hold, as many each, those of the samples at `indices`."""
    each = len(names) // (count or 1)
    return [name for i in indices for name in names[i * each : (i + 1) * each]]


def take(samples: Samples, indices: Sequence[int]) -> Samples:
    """The samples at `indices`, in order."""
    taken: Samples = samples.take(indices) if hasattr(samples, "take") else _Taken(samples, indices)
    return taken


def at_most(samples: Samples, count: int | None) -> Samples:
    """`count` of the samples (None, or more than there are: all): evenly spread ones of a folder of images, of anything else the first.

    Raises DataError for a count below 1.
    """
    if count is not None and count < 1:
        raise DataError(f"{count} samples are asked for; at least 1 is needed")
    if isinstance(samples, LoadedSamples) and count is not None:
        return samples.head(count)
    if count is None or (samples.count is not None and samples.count <= count):
        return samples
    return samples.spread(count) if isinstance(samples, ImageSamples) else take(samples, range(count))


def unused(samples: object) -> list[str]:
    """A sentence where images or rows were left out because they make no whole batch."""
    left = getattr(samples, "left_out", 0)
    return [f"the last {left} {getattr(samples, 'unit', 'images')} make no whole batch and were left out"] if left else []


def load_labels(labels: str | os.PathLike[str] | Iterable[int], samples: Samples) -> np.ndarray:
    """Class indices, int64, one per sample: given as such, or a file of them.

    A `.npy` holds them in the order of the samples. Anything else is text, tab-separated: the columns `file` and `class_index` (or,
    without a header, the first two) joined with the image files by relative path, or by bare file name. Raises DataError.
    """
    if not isinstance(labels, (str, os.PathLike)):
        return _chosen(class_indices(labels), samples)
    path = Path(labels)
    if path.suffix == ".npy":
        return _chosen(class_indices(read_array(path), str(path)), samples)
    table = _read_label_table(path)
    if not samples.names:
        what = "a folder of images or a calibration stored of one; for array data give an .npy with one class index per sample"
        raise DataError(f"{path}: a table of labels goes with {what}")
    lost = [n for n in samples.names if n not in table and Path(n).name not in table]
    if lost:
        raise DataError(f"{path}: no label for {len(lost)} of {len(samples.names)} images, '{lost[0]}' the first")
    return class_indices([table[n] if n in table else table[Path(n).name] for n in samples.names], str(path))


def _chosen(labels: np.ndarray, samples: Samples) -> np.ndarray:
    """Of the labels of a whole source, those of the samples that were taken from it; images that fill no batch have none."""
    total, indices = getattr(samples, "chosen", None) or (0, [])
    left, whole = getattr(samples, "left_out", 0), total or samples.count or 1
    if left and len(labels) > whole and (len(labels) - left) % whole == 0:
        labels = labels[:-left]
    if not total or len(labels) % total or len(labels) == len(indices):
        return labels
    return np.ascontiguousarray(labels.reshape(total, -1)[indices].ravel())


def class_indices(labels: object, where: str = "labels") -> np.ndarray:
    """Labels as int64 [samples]. Raises DataError for what is no vector of integers from 0 on."""
    try:
        whole = as_array(labels)
        array = np.asarray(labels if isinstance(labels, Sequence) else list(labels)) if whole is None else whole  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: labels are a vector of integers, one per sample: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{where}: labels are a vector of integers, this is {array.dtype}{list(array.shape)}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int64).max):
        raise DataError(f"{where}: a label is {array.min() if array.min() < 0 else array.max()}; class indices count from 0")
    return array.astype(np.int64)


def _read_label_table(path: Path) -> dict[str, int]:
    try:
        lines = [line.split("\t") for line in read_regular(path).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise DataError(f"{path}: holds no labels")
    header = lines[0]
    named = "file" in header and "class_index" in header
    file_column, class_column = (header.index("file"), header.index("class_index")) if named else (0, 1)
    table = {}
    for number, fields in enumerate(lines[1:] if named else lines, 2 if named else 1):
        try:
            table[fields[file_column]] = int(fields[class_column])
        except (IndexError, ValueError):
            raise DataError(f"{path}: line {number}: expected a file name, a tab and a class index, got {chr(9).join(fields)!r}") from None
    return table
