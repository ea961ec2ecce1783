"""The memory plan: no two live buffers overlap, and the plan is tight on cases with a known optimum."""

import itertools
import random

import numpy as np

from qcompiler.base.memory import ALIGNMENT, Request, is_aligned, packed, plan_memory, round_up


def overlap(a: Request, b: Request) -> bool:
    return a.first <= b.last and b.first <= a.last


def test_live_buffers_never_overlap() -> None:
    generator = random.Random(1)
    for _ in range(50):
        requests = []
        for i in range(30):
            first = generator.randrange(20)
            requests.append(Request(f"b{i}", generator.randrange(1, 5000), first, first + generator.randrange(6)))
        offsets, size = plan_memory(requests)
        for a, b in itertools.combinations(requests, 2):
            if overlap(a, b):
                assert offsets[a.name] + a.size <= offsets[b.name] or offsets[b.name] + b.size <= offsets[a.name], (a, b)
        assert all(o % ALIGNMENT == 0 for o in offsets.values())
        assert max(offsets[r.name] + r.size for r in requests) <= size


def test_a_chain_needs_two_buffers() -> None:
    requests = [Request(f"b{i}", 1024, i, i + 1) for i in range(10)]
    _, size = plan_memory(requests)
    assert size == 2 * round_up(1024 + ALIGNMENT)


def test_the_plan_does_not_depend_on_the_order_of_requests() -> None:
    requests = [Request(f"b{i}", 64 * (i % 3 + 1), i, i + 2) for i in range(12)]
    assert plan_memory(requests) == plan_memory(requests[::-1])


def test_nothing_to_place() -> None:
    assert plan_memory([]) == ({}, 0)


def test_packed_arrays_are_views_of_one_blob() -> None:
    arrays = [np.arange(5, dtype=np.float32), np.zeros((0, 3), np.int8), np.arange(6, dtype=np.int64).reshape(2, 3).T]
    lists = [arrays[:2], [], [arrays[2], arrays[2]]]
    blob, offsets = packed(lists)
    assert offsets == [[0, 64], [], [64, 128]] and blob.size == 192 + ALIGNMENT and is_aligned(blob)
    for found, wanted in zip([a for each in lists for a in each], [*arrays, arrays[2]], strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype and found.flags.aligned and (found.size == 0 or np.shares_memory(found, blob))
