"""Static memory plan: offsets for buffers with known lifetimes in one workspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
