"""Array files as anything may have written them: `.npy`, and the members of an `.npz`.

numpy and zipfile answer damage with whatever exception their parsers come across; here it is a DataError that names the file.
"""

from __future__ import annotations

import contextlib
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.files import open_regular

_DAMAGE = (  # MemoryError: a header that says more than there is
    *(OSError, ValueError, EOFError, RuntimeError, NotImplementedError, SyntaxError, KeyError, IndexError, OverflowError, TypeError),
    *(MemoryError, zlib.error, zipfile.BadZipFile, tokenize.TokenError),
)


@dataclass(frozen=True)
class Header:
    """What an array file says of itself. `member`: its name in an `.npz`, empty for an `.npy`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    member: str = ""


@contextlib.contextmanager
def damage(path: Path, kind: str, where: str = "") -> Iterator[None]:
    """What parsers raise inside becomes a DataError that says that `path` can't be read as `kind`, and `where`."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, MemoryError):
            reason = "it says that it holds more than fits into memory"
        else:
            reason = getattr(error, "strerror", None) or (str(error.args[0]) if error.args else type(error).__name__)
        raise DataError(f"{path}: {where and where + ': '}can't be read as {kind}: {reason}") from error


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an `.npy`. Raises DataError."""
    with damage(Path(path), ".npy"), open_regular(path) as file:
        if zipfile.is_zipfile(file):
            raise DataError(f"{path}: holds several arrays; an .npy with one is expected")
        file.seek(0)
        header = _header(file)
        return read_rows(file, header, math.prod(header.shape)).reshape(header.shape)


def read_header(path: Path) -> Header:
    """Of an `.npy`. Raises DataError."""
    with damage(path, ".npy"), open_regular(path) as file:
        header = _header(file)
        _check_size(header, os.fstat(file.fileno()).st_size - file.tell())
    return header


def read_headers(path: Path, kind: str = ".npz") -> dict[str, Header]:
    """{array name: header} of an `.npz`, or of another kind of file that is one. Raises DataError."""
    found: dict[str, Header] = {}
    with damage(path, kind), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise DataError(f"{path}: holds two arrays called '{name}'")
            with archive.open(member) as stream:
                header = _header(stream)
                _check_size(header, member.file_size - stream.tell())
            found[name] = Header(header.shape, header.dtype, member.filename)
    return found


def skip_header(stream: IO[bytes]) -> None:
    """Bring a stream to where its array's data begin."""
    _header(stream)


def read_rows(stream: IO[bytes], header: Header, count: int) -> np.ndarray:
    """The next `count` elements, flat. Raises EOFError where the stream ends before."""
    size = count * header.dtype.itemsize
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the file is truncated")
    return np.frombuffer(data, header.dtype)


def _header(stream: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"its version {version[0]}.{version[1]} is unknown; supported: 1.0, 2.0, 3.0")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = reader(stream)
    except RecursionError as error:
        raise ValueError("its header is damaged") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if fortran and len(shape) > 1:
        raise ValueError("it is stored in Fortran order; save numpy.ascontiguousarray(x) instead")
    if any(isinstance(d, bool) or d < 0 for d in shape) or math.prod(shape) * dtype.itemsize >= 1 << 62:
        raise ValueError(f"its header is damaged: shape {shape}")
    return Header(shape, dtype)


def _check_size(header: Header, size: int) -> None:
    wanted = math.prod(header.shape) * header.dtype.itemsize
    if size < wanted:
        raise EOFError(f"the file is truncated: {header.dtype}{list(header.shape)} takes {wanted} bytes, and {size} are there")
