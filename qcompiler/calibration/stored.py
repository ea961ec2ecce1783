"""Calibrate once: a file with the samples of a calibration, as the network got them, and with what every pass over them saw.

Corrections and judged ranges look at samples again, so a file of statistics alone could not lead to the same library. A compilation from the file makes the
same bytes as one from the data; passes that the file knows are not made again. The file is an `.npz` under another name: arrays only, nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.files import open_regular, parse_json, replacing
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.arrays import Header, damage, read_headers, read_rows, skip_header
from qcompiler.calibration.data import Sample, Samples, Source, check_sample
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.calibration.shaped import ShapedSamples, open_any
from qcompiler.calibration.table import CalibrationTable, Watcher
from qcompiler.runtime.shapes import Fitting, like

SUFFIX = ".qcal"
FORMAT = 1
LARGEST = 1 << 30
"""Bytes of samples that a file holds at most, before they are compressed."""


class Remembering(Watcher, Protocol):
    """A watcher whose findings can be kept: `state` gives them as arrays by name, `restore` takes them."""

    def state(self) -> dict[str, np.ndarray]: ...
    def restore(self, state: Mapping[str, np.ndarray]) -> None: ...


@dataclass(frozen=True)
class Pass:
    """What one pass over all samples saw. key: of all that decides it beside the model and the samples. watchers: the state of each that looked on."""

    key: str
    table: CalibrationTable
    watchers: list[dict[str, np.ndarray]] = field(default_factory=list)


class StoredSamples:
    """The samples in a file, read one at a time; passes are read when they are asked for. inputs: those of the shape at which the file was made. forms: the
    inputs at every shape of the samples; which: of every sample, at which. Raises DataError for what `save` did not write, and for samples of other inputs
    than `inputs` and those of `others`, the network at other shapes."""

    def __init__(self, path: Path, inputs: Sequence[TensorInfo], others: Sequence[Sequence[TensorInfo]] = ()) -> None:
        self._path = path
        self._headers = read_headers(path, SUFFIX)
        meta = self._json("meta")
        try:
            if meta["format"] != FORMAT:
                raise DataError(f"{path}: format {meta['format']} is not supported (this version reads {FORMAT}); calibrate again")
            self.count: int | None = int(meta["samples"])
            self.model, self.digest, self._passes = str(meta["model"]), str(meta["digest"]), dict(meta["passes"])
            forms = [[TensorInfo(str(i["name"]), tuple(map(int, i["shape"])), str(i["dtype"])) for i in f] for f in [meta["inputs"], *meta.get("shapes", [])]]
            self.which = [int(i) for i in meta.get("which", [0] * self.count)]
            if len(self.which) != self.count or any(not 0 <= i < len(forms) for i in self.which):
                raise ValueError("shapes of samples")
            self.names: Sequence[str] = [str(name) for name in meta.get("names", [])]
            if self.names and (not self.count or len(self.names) % self.count):
                raise ValueError("names of samples")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a calibration that qcompiler stored ({type(error).__name__}: {error}); calibrate again") from error
        known = {_described(form): form for form in (*others, inputs)}
        if lost := [form for form in forms if _described(form) not in known]:
            raise DataError(f"{path}: its samples are for the inputs {list(_described(lost[0]))}, the model has {list(_described(inputs))}; calibrate again")
        self.forms = [known[_described(form)] for form in forms]
        self.inputs = self.forms[0]

    def check_model(self, digest: str | None) -> None:
        """Raises DataError unless the samples were stored for the model with this digest (None: unknown)."""
        if digest not in (None, self.model):
            raise DataError(f"{self._path}: made for another model (its digest is {self.model}, this one's {digest}); calibrate this model")

    def reading(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Whatever the pass of that name makes a reader raise inside becomes a DataError."""
        return damage(self._path, SUFFIX, f"pass '{name}'")

    def known(self, name: str, key: str) -> Pass | None:
        """The pass of that name, where the file has it and nothing that decides it differs. Raises DataError where it is not what was stored."""
        entry = self._passes.get(name)
        if entry is None or entry.get("key") != key or "digest" not in entry:
            return None
        with self.reading(name), self._arrays() as array:
            table, states = array(entry["table"]).tobytes(), [{k: array(member) for k, member in state.items()} for state in entry["watchers"]]
            if _digest(name, table, states) != entry["digest"]:
                raise DataError(f"{self._path}: pass '{name}' is not what was stored (its digest differs); calibrate again")
            return Pass(key, CalibrationTable.from_json(table.decode(), str(self._path)), states)

    def __iter__(self) -> Iterator[Sample]:
        digest = hashlib.sha256()
        assert self.count is not None
        with self._arrays() as array:
            for index in range(self.count):
                with damage(self._path, SUFFIX, f"sample {index}"):
                    form = self.forms[self.which[index]]
                    sample = {info.name: array(f"sample/{index}/{number}") for number, info in enumerate(form)}
                digest.update(_bytes(sample))
                if index + 1 == self.count and digest.hexdigest() != self.digest:
                    raise DataError(f"{self._path}: its samples are not those that were stored (their digest differs); calibrate again")
                yield check_sample(sample, form, f"{self._path}: sample {index}")

    @contextlib.contextmanager
    def _arrays(self) -> Iterator[Callable[[str], np.ndarray]]:
        """What reads arrays of the open file by their names."""
        with damage(self._path, SUFFIX), open_regular(self._path) as file, zipfile.ZipFile(file) as archive:

            def array(name: str) -> np.ndarray:
                header: Header = self._headers[name]
                with archive.open(header.member) as stream:
                    skip_header(stream)
                    return read_rows(stream, header, math.prod(header.shape)).reshape(header.shape)

            yield array

    def _json(self, name: str) -> Any:
        if name not in self._headers:
            raise DataError(f"{self._path}: not a calibration that qcompiler stored; make one with `qcompiler calibrate`")
        with damage(self._path, SUFFIX), self._arrays() as array:
            return parse_json(array(name).tobytes().decode())


class StoredShaped(ShapedSamples):
    """The samples in a file that has some of several shapes. forms: the inputs at every shape of the network."""

    def __init__(self, file: StoredSamples, forms: Sequence[Sequence[TensorInfo]]) -> None:
        numbers = [_described(form) for form in forms]
        super().__init__(lambda: iter(file), [numbers.index(_described(file.forms[i])) for i in file.which], names=file.names)
        self.file, self.first = file, numbers.index(_described(file.inputs))


def file_behind(samples: Samples) -> StoredSamples | None:
    """The stored calibration that these are all samples of."""
    return samples.file if isinstance(samples, StoredShaped) else samples if isinstance(samples, StoredSamples) else None


def stored(source: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Is it the path of a stored calibration?"""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix == SUFFIX


def open_source(
    source: Source | Samples,
    inputs: Sequence[TensorInfo],
    preprocess: str | os.PathLike[str] | Mapping[str, Any] | Preprocess | None = None,
    fitting: Fitting | None = None,
    pixels: bool = False,
) -> Samples:
    """As `open_any`; a stored calibration too. fitting: of a network at several shapes."""
    fitting = fitting or like(inputs)
    if isinstance(source, StoredSamples):
        return source
    if stored(source):
        if preprocess is not None:
            raise DataError(f"{source}: preprocessing applies to a folder of images only; a stored calibration holds what was made of them")
        forms = [[TensorInfo(i.name, shapes[i.name], i.dtype) for i in inputs] for shapes in fitting.inputs]
        file = StoredSamples(Path(source), inputs, forms)
        return file if len(file.forms) == 1 else StoredShaped(file, forms)
    return open_any(source, inputs, fitting, preprocess, pixels)


def save(
    path: str | os.PathLike[str],
    model: str,
    inputs: Sequence[TensorInfo],
    samples: Samples,
    passes: Mapping[str, Pass],
    others: Sequence[Sequence[TensorInfo]] = (),
) -> int:
    """Write a calibration; how many samples it holds. model: the digest of the model. others: its inputs at the other shapes that samples have. Equal
    arguments give equal bytes.

    Raises OutputError when `path` can't be written, DataError for samples of more than `LARGEST` bytes.
    """
    digest, size, which = hashlib.sha256(), 0, list[int]()
    numbers = {tuple(tuple(i.shape) for i in form): number for number, form in enumerate((inputs, *others))}
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:

        def put(name: str, array: np.ndarray) -> str:
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)  # a number stays one
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), stream.getvalue(), zipfile.ZIP_DEFLATED, 4)
            return name

        def text(name: str, content: str) -> str:
            return put(name, np.frombuffer(content.encode(), np.uint8))

        for sample in samples:
            digest.update(_bytes(sample))
            size += sum(a.nbytes for a in sample.values())
            if size > LARGEST:
                raise DataError(f"the samples come to more than {LARGEST >> 20} MiB, and a stored calibration holds no more; use fewer (--samples N)")
            for number, info in enumerate(inputs):
                put(f"sample/{len(which)}/{number}", sample[info.name])
            which.append(numbers[tuple(sample[i.name].shape for i in inputs)])
        described: dict[str, Any] = {}
        for name, seen in passes.items():
            states = [{k: put(f"pass/{name}/{i}/{j}", state[k]) for j, k in enumerate(state)} for i, state in enumerate(seen.watchers)]
            table = seen.table.to_json()
            told = _digest(name, table.encode(), seen.watchers)
            described[name] = {"key": seen.key, "table": text(f"pass/{name}/table", table), "watchers": states, "digest": told}
        first, *more = ([{"name": i.name, "shape": list(i.shape), "dtype": i.dtype} for i in form] for form in (inputs, *others))
        meta = {"format": FORMAT, "model": model, "samples": len(which), "digest": digest.hexdigest(), "passes": described, "inputs": first}
        named = {"names": list(samples.names)} if samples.names else {}
        text("meta", json.dumps(meta | named | ({"shapes": more, "which": which} if more else {})))
    return len(which)


def _described(form: Sequence[TensorInfo]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((i.name, tuple(i.shape), i.dtype) for i in form)


def _digest(name: str, table: bytes, states: Sequence[Mapping[str, np.ndarray]]) -> str:
    """Of what a pass saw."""
    return hashlib.sha256(b"\0".join([name.encode(), table, *map(_bytes, states)])).hexdigest()


def _bytes(sample: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(f"{name} {a.dtype} {a.shape}".encode() + np.ascontiguousarray(a).tobytes() for name, a in sorted(sample.items()))
