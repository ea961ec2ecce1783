"""What a kernel is, and the table of rows that make them.

A *row* (operator family x ISA) turns an `OpCall` into a `Kernel`. `docs/architecture.md`, "Kernels", has the calling convention.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qcompiler.base.memory import round_up
from qcompiler.base.targets import Target


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: row-major `shape`, optionally with a halo and a channel pitch (rank 4, NHWC, only).

    Element (n, h, w, c) is at index `(((n * (top+H+bottom) + top+h) * (left+W+right)) + left+w) * pitch + c`.
    Halo elements hold the tensor's zero point (real 0) whenever a consumer runs; elements between channel C and `pitch` are undefined.
    `dtype` is the storage type: uint8 stores canonical int8 `q` as `q + 128`.
    """

    shape: tuple[int, ...]
    dtype: str
    halo: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    pitch: int = 0  # 0: the last dimension itself

    def __post_init__(self) -> None:
        assert len(self.shape) == 4 or (not any(self.halo) and self.pitch in (0, self.shape[-1] if self.shape else 0)), self

    @property
    def channel_pitch(self) -> int:
        return self.pitch or (self.shape[-1] if self.shape else 1)

    @property
    def dense(self) -> bool:
        """True when the tensor is contiguous: no halo, no channel padding."""
        return not any(self.halo) and (not self.shape or self.channel_pitch == self.shape[-1])

    @property
    def rows(self) -> tuple[int, int]:
        """(height, width) of the stored image, halo included (rank 4)."""
        top, left, bottom, right = self.halo
        return self.shape[1] + top + bottom, self.shape[2] + left + right

    @property
    def elements(self) -> int:
        """Elements to allocate, halo and channel padding included."""
        if len(self.shape) != 4:
            return math.prod(self.shape)
        height, width = self.rows
        return self.shape[0] * height * width * self.channel_pitch

    @property
    def bytes(self) -> int:
        return self.elements * np.dtype(self.dtype).itemsize

    def index(self, n: Any, h: Any, w: Any, c: Any) -> Any:
        """Flat element index of (n, h, w, c); works on ints and on TIR expressions. h and w may reach into the halo (negative)."""
        height, width = self.rows
        return ((n * height + (h + self.halo[0])) * width + (w + self.halo[1])) * self.channel_pitch + c

    def step(self, rows: Any, columns: Any) -> Any:
        """Elements from a pixel to the one so many rows below and columns to the right of it."""
        return (rows * self.rows[1] + columns) * self.channel_pitch


@dataclass(frozen=True)
class Need:
    """What a row asks of one input's layout. `halo` and `pitch` are lower bounds (pitch: must be a multiple of it)."""

    halo: tuple[int, int, int, int] = (0, 0, 0, 0)
    pitch: int = 1
    dense: bool = False  # no halo and no channel padding at all


def joined(layout: Layout, needs: list[Need]) -> Layout:
    """The least layout that satisfies every need."""
    top, left, bottom, right = (max([layout.halo[i], *(n.halo[i] for n in needs)]) for i in range(4))
    halo = (top, left, bottom, right)
    pitch = math.lcm(*(n.pitch for n in needs)) if needs else 1
    if not any(halo) and (not layout.shape or layout.shape[-1] % pitch == 0):
        return layout
    if len(layout.shape) != 4:
        raise AssertionError(f"a halo or pitch is needed of a tensor of rank {len(layout.shape)}")
    return replace(layout, halo=halo, pitch=round_up(layout.shape[-1], pitch))


def satisfied(layout: Layout, need: Need) -> bool:
    """Whether a layout is what a row asks for."""
    return all(h >= n for h, n in zip(layout.halo, need.halo, strict=True)) and layout.channel_pitch % need.pitch == 0 and (layout.dense or not need.dense)


@dataclass
class OpCall:
    """One operator to be compiled: `qc.*` name, tensor operands with their layouts, constant operands as arrays, attributes.

    Operands keep the order of the operator's signature in `qcompiler.numerics.operators`: `operands[i]` is a `Layout` for a tensor computed at run time, and
    a numpy array for a constant; `output` is the layout to write.

    `tail`: operators of one tensor and constants that go on with the result, element by element: the first operand of each is the layout of the value
    before it. What the last of them yields is written too; where `inner`, it alone. Only rows that are `Ending` get one.
    """

    name: str
    operands: list[Layout | np.ndarray]
    attrs: dict[str, Any]
    output: Layout
    value_id: str = ""
    tail: tuple[OpCall, ...] = ()
    inner: bool = False

    @property
    def tensors(self) -> list[Layout]:
        """Layouts of the run-time operands, in order."""
        return [o for o in self.operands if isinstance(o, Layout)]

    @property
    def written(self) -> list[Layout]:
        """Layouts of what is written, in the order of the kernel's pointers."""
        return ([] if self.inner else [self.output]) + [call.output for call in self.tail[-1:]]

    @property
    def alone(self) -> OpCall:
        """The operator without its tail."""
        return replace(self, tail=(), inner=False) if self.tail else self


_CODE: dict[str, Any] = {}
_MOST = 256  # entries of it; the oldest go


def once(facts: tuple[str, OpCall, *tuple[Any, ...]], arrays: Sequence[np.ndarray], code: Callable[[], Any]) -> Any:
    """`code()`, or what it gave before for equal facts: of operands and `arrays` that are constants, sizes and types count, not numbers."""
    row, op, *rest = facts
    sizes = [(o.shape, str(o.dtype)) if isinstance(o, np.ndarray) else o for o in (*op.operands, *arrays)]
    known = repr((row, op.name, sorted(op.attrs.items()), op.output, sizes, rest))
    found = _CODE.pop(known, None) or code()
    _CODE[known] = found  # the last to go
    if len(_CODE) > _MOST:
        del _CODE[next(iter(_CODE))]
    return found


def written(func: Any) -> Callable[[], Any]:
    """What `Kernel.make` is where the code is there already."""
    return lambda: func


@dataclass
class Kernel:
    """A compiled-to-TIR operator: `func(task: int32, inputs..., constants..., output)`, all pointers; run for task in range(tasks).
    With a tail there may be two outputs (`OpCall.written`).

    Tasks are independent and may run in any order on any threads. `func` is a private PrimFunc without parallel loops.
    `scratch` bytes per call (0: none) are passed as one more pointer after the output; it is shared by all tasks of the call.
    `key` identifies the code: equal keys mean interchangeable functions (constants excluded). `make` writes the code, once, when it is wanted: constants
    are packed again and again, and of equal kernels one is enough.

    On a GPU, `func(inputs..., constants..., output[, scratch][, counters])` binds threads itself; `launch` says how many: (blocks, threads per block),
    both along x. `tasks` is 0 then. `counters`: int32 words that are 0 when the kernel starts and must be 0 when it ends.
    """

    make: Callable[[], Any]
    tasks: int
    constants: list[np.ndarray]
    key: str
    row: str
    scratch: int = 0
    macs: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    launch: tuple[int, int] | None = None
    counters: int = 0

    @functools.cached_property
    def func(self) -> Any:
        return self.make()


class Row(Protocol):
    """One operator family on one ISA."""

    @property
    def name(self) -> str:
        """ "x86-avx512vnni/conv2d"."""

    @property
    def isa(self) -> str:
        """Matches a name in a target's `rows`; "any" for rows that every target may use."""

    @property
    def own_channels(self) -> bool:
        """Does every kernel of it leave the channels behind a pixel's own (`Layout.pitch`) alone? They may be another value's (`in_place.py`)."""

    def refuse(self, op: OpCall, target: Target) -> str | None:
        """Why this row can't take `op` (a full sentence), or None when it can. Layouts are not decided yet: only shapes and dtypes count."""

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        """One `Need` per run-time operand, in order."""

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        """The design space: tunable name -> its candidate values, all of them JSON scalars. Every combination that `build` accepts is exact."""

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        """The heuristic's point of `space`."""

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        """The kernel for decided layouts. Raises ValueError for a combination of tunables that can't be built."""


@runtime_checkable
class Packs(Protocol):
    """A row one of whose tunables decides how constants are packed."""

    def alike(self, ops: Sequence[OpCall], target: Target) -> list[dict[str, Any]]:
        """The heuristic's points for one operator at several shapes: those by which its constants are packed alike, where they cost little."""


@runtime_checkable
class Ending(Protocol):
    """A row whose kernels can go on with a result in registers."""

    def goes_on(self, op: OpCall, after: OpCall) -> bool:
        """Can its kernel of `op`, which may have a tail, compute `after` too, which reads what it makes? Layouts are not decided yet."""


def kernel_key(*parts: Any) -> str:
    """A short digest of everything that decides a kernel's code."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


KERNELS: dict[str, list[Row]] = {}  # operator name -> rows, best first


LARGEST = 2**31 - 2**8  # elements of a tensor: indices are int32, those of the idle threads of a GPU's last block too

FLAT: set[str] = set()
"""Operators whose kernels write their result without halo and channel padding, whatever reads it."""


def register(operator: str, row: Row) -> Row:
    """Append a row to the table; earlier rows are preferred."""
    KERNELS.setdefault(operator, []).append(row)
    return row


def select(op: OpCall, target: Target) -> Row:
    """The first row that takes `op`, in the order of the target's `rows`, portable ("any") rows last.

    Raises LookupError, with every row's reason, when none does.
    """
    reasons = []
    for isa in [*target.rows, "any"]:
        for row in KERNELS.get(op.name, []):
            if row.isa == isa:
                reason = row.refuse(op, target)
                if reason is None:
                    return row
                reasons.append(f"{row.name}: {reason}")
    raise LookupError("; ".join(reasons) or f"no kernel row implements {op.name} on {target.name}")
