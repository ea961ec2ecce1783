"""Which operators of a network with a batch run image by image.

    together:         every operator works on the whole batch; its weights are read once, its images come from and go to memory far away
    image by image:   a run of operators works on one image after the other, whose values stay near; weights are read again for each

The choice is made for runs of operators, by what each way moves between the core and memory behind its own caches. Operators that go image by image are
lowered for one image, so they are those of a library for one image, tuned or not, code and packed weights included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from qcompiler.base.memory import Request
from qcompiler.schedules.table import Layout

# Bytes. Measured on an EPYC of the fourth generation (1 MB of level 2, 32 MB of level 3 cache), where convolutions hide what comes from level 3, and
# a depthwise layer from memory takes three times as long; taken to be much alike elsewhere.
NEAR = 512 << 10  # so much stays in the caches of a core
FAR = 8 << 20  # and so much in the last one, which others use too
FARTHER = 16  # a byte from memory, in bytes from the last cache
CALL = 4 << 10  # what starting an operator once more costs

_ANY: Callable[[Mapping[str, Any]], bool] = lambda attrs: True  # noqa: E731


def _stays(attrs: Mapping[str, Any]) -> bool:
    """A transposition leaves the first axis where it is."""
    axes = attrs.get("axes")
    return axes is None or axes[0] == 0


def _not_first(attrs: Mapping[str, Any]) -> bool:
    return bool(attrs["axis"] > 0)


# Operators that make each index of the first axis of that index of their operands alone, given these attributes, and name no index of it in them.
BY_IMAGE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(("qc.quantize", "qc.dequantize", "qc.pixels", "qc.enter", "qc.leave", "qc.transpose"), _stays),
    **dict.fromkeys(("qc.requantize", "qc.conv2d", "qc.conv2d_transpose", "qc.dense", "qc.f32.conv2d", "qc.f32.dense", "qc.add", "qc.mul"), _ANY),
    **dict.fromkeys(("qc.lut", "qc.lut16", "qc.prelu", "qc.max_pool2d", "qc.avg_pool2d", "qc.resize2d", "qc.copy"), _ANY),
    **dict.fromkeys(("qc.concat", "qc.resample"), _not_first),
    "qc.mean": lambda attrs: 0 not in attrs["axes"],
    "qc.pad": lambda attrs: not any(attrs["pads"][0]),
    "qc.select": lambda attrs: not attrs["indices"][0],
}
_WEIGHTED = ("qc.conv2d", "qc.conv2d_transpose", "qc.dense", "qc.f32.conv2d", "qc.f32.dense", "qc.requantize", "qc.lut", "qc.lut16", "qc.pixels", "qc.prelu")


class Node(Protocol):
    """An operator on its way to a step."""

    name: str
    operands: list[Any]  # value ids and constants
    attrs: dict[str, Any]
    outputs: list[str]
    images: int


class Value(Protocol):
    layout: Layout
    root: str
    shift: int


class Step(Protocol):
    images: int


def runs_of(steps: Iterable[Step]) -> list[tuple[int, int, int]]:
    """(begin, end, images): the steps in runs that go through so many images one after the other."""
    found: list[tuple[int, int, int]] = []
    for index, step in enumerate(steps):
        if found and found[-1][2] == step.images:
            found[-1] = (found[-1][0], index + 1, step.images)
        else:
            found.append((index, index + 1, step.images))
    return found


def one_at_a_time(steps: Iterable[Step], values: Mapping[str, Value], requests: Iterable[Request]) -> list[Request]:
    """`requests` for memory of a run of all steps: a value that never leaves a run of images needs memory for one; any other that is written or read there
    lives from the first image to the last."""
    run = {i: (begin, end, images) for begin, end, images in runs_of(steps) for i in range(begin, end)}
    found = []
    for request in requests:
        written, read = run[request.first], run[request.last]
        if request.name in values and written == read:
            held = max(v.shift + v.layout.bytes // read[2] for v in values.values() if v.root == request.name)
            request = replace(request, size=held)
        elif request.name in values:
            request = replace(request, first=written[0] if written[2] > 1 else request.first, last=read[1] - 1 if read[2] > 1 else request.last)
        found.append(request)
    return found


def one_image(layout: Layout) -> Layout:
    return replace(layout, shape=(1, *layout.shape[1:]))


def choose_images(nodes: Sequence[Node], values: Mapping[str, Value], batch: int) -> None:
    """Set `images` of the nodes that go image by image to `batch`. Layouts must be decided."""
    steps = [n for n in nodes if n.name != "qc.reshape"]
    if batch < 2 or not steps:
        return
    weights = [sum(o.nbytes for o in n.operands if isinstance(o, np.ndarray)) for n in steps]
    total = sum(weights)
    last: dict[str, int] = {}
    first: dict[str, int] = {}
    for index, node in enumerate(steps):
        for value in (*(o for o in node.operands if isinstance(o, str)), *node.outputs):
            first.setdefault(values[value].root, index)
            last[values[value].root] = index
    live = [0] * (len(steps) + 1)  # bytes of the values that cross from step i - 1 to step i
    for root, begin in first.items():
        for index in range(begin + 1, last[root] + 1):
            live[index] += values[root].layout.bytes
    # the cheapest way to every step, by the way of the step before it
    together, apart = (0.0, list[bool]()), (math.inf, list[bool]())
    for index, node in enumerate(steps):
        moved = sum(values[v].layout.bytes for v in (*(o for o in node.operands if isinstance(o, str)), *node.outputs))
        changing = _moved(live[index], live[index])
        whole = _moved(moved, moved)
        single = _moved(batch * weights[index], total) + _moved(moved, moved // batch) + batch * CALL if _splits(node, values, batch) else math.inf
        come, leave = min(together, (apart[0] + changing, apart[1])), min(apart, (together[0] + changing, together[1]))
        together, apart = (come[0] + whole, [*come[1], False]), (leave[0] + single, [*leave[1], True])
    for node, chosen in zip(steps, min(together, apart)[1], strict=True):
        node.images = batch if chosen else 1


def _moved(count: int, among: int) -> float:
    """What `count` bytes cost that are read or written again only when `among` bytes have passed."""
    return 0.0 if among <= NEAR else float(count) if among <= FAR else float(FARTHER * count)


def _splits(node: Node, values: Mapping[str, Value], batch: int) -> bool:
    """Whether an operator may go image by image: all its values have the batch for first axis, and so has none of the constants that are like them."""
    if node.name not in BY_IMAGE or not BY_IMAGE[node.name](node.attrs):
        return False
    layouts = [values[v].layout for v in (*(o for o in node.operands if isinstance(o, str)), *node.outputs)]
    if len(layouts) < 2 or not all(len(v.shape) > 1 and v.shape[0] == batch for v in layouts):
        return False
    rank = len(layouts[-1].shape)
    return node.name in _WEIGHTED or all(c.ndim < rank or c.shape[0] == 1 for c in node.operands if isinstance(c, np.ndarray))
