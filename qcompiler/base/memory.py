"""Memory: the static plan, offsets for buffers with known lifetimes in one workspace; aligned arrays; what the allocator keeps."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@dataclass(frozen=True)
class Request:
    """A buffer of `size` bytes that lives from step `first` to step `last`, both included."""

    name: str
    size: int
    first: int
    last: int


def round_up(size: int, to: int = ALIGNMENT) -> int:
    """The least multiple of `to` that is at least `size`."""
    return -(-size // to) * to


def aligned_bytes(size: int) -> np.ndarray:
    """uint8[size], zeros, whose first address is a multiple of `ALIGNMENT`."""
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def give_back() -> None:
    """Give the system back what the C library keeps of freed memory, where it can: the holes that temporary copies of weights leave."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array is one stretch of memory whose first address is a multiple of `ALIGNMENT`."""
    return array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0


def aligned(array: np.ndarray) -> np.ndarray:
    """The same numbers as `is_aligned` asks for; the array itself where it is so."""
    if is_aligned(array):
        return array
    found = aligned_bytes(array.nbytes).view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in row-major order: uint8 of one axis, the same memory where it lies so."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1) if array.size else np.zeros(0, np.uint8)


def packed(lists: Iterable[list[np.ndarray]]) -> tuple[np.ndarray, list[list[int]]]:
    """(uint8 that all arrays of all lists lie in, every one aligned; their byte offsets). In the lists, views of it take the arrays' places."""
    lists, offsets, size = list(lists), list[list[int]](), 0
    for arrays in lists:
        offsets.append([])
        for array in arrays:
            offsets[-1].append(size)
            size = round_up(size + array.nbytes)
    blob = aligned_bytes(size + ALIGNMENT)  # vector loads may read past the last array
    for arrays, places in zip(lists, offsets, strict=True):
        for index, (array, offset) in enumerate(zip(arrays, places, strict=True)):
            place = blob[offset : offset + array.nbytes]
            place[...] = bytes_of(array)
            arrays[index] = place.view(array.dtype).reshape(array.shape)
    return blob, offsets


def plan_memory(requests: list[Request], spare: int = ALIGNMENT) -> tuple[dict[str, int], int]:
    """Byte offsets, and the size of the workspace that holds them all.

    Greedy by size: the largest buffer first, each at the lowest offset where no buffer with an overlapping lifetime lies
    (Pisarchyk and Lee 2020, arXiv:2001.03288, "greedy by size"). `spare` bytes follow each buffer, because vector loads may read past its end.
    The order is total, so the plan is the same in every run.
    """
    placed: list[tuple[int, int, Request]] = []  # offset, end
    offsets: dict[str, int] = {}
    for request in sorted(requests, key=lambda r: (-r.size, r.first, r.name)):
        size = round_up(request.size + spare)
        rivals = sorted((o, e) for o, e, r in placed if r.first <= request.last and request.first <= r.last)
        offset = 0
        for start, end in rivals:
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, request))
        offsets[request.name] = offset
    return offsets, max((end for _, end, _ in placed), default=0)


def united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in order, where ranges touch as one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found
