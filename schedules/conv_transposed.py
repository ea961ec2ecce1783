"""Transposed convolution as forward convolutions, by the template of `conv.py`.

With strides s, the outputs at rows s * i + a and columns s * j + b (a *phase*) meet those taps of the kernel only that fit a and b, and are a convolution
with stride 1 of the input by these taps:

    y[s * i + a] = sum of x[i + (a + pad - t * dilation) / s] * w[t] over the taps t for which the division leaves nothing

A kernel runs the convolutions of all phases, each writing every s-th row and column. Phases that are alike but for where they read and write share code;
neighbouring ones in a row that read the same inputs are one convolution with more channels, where the pixels of the output touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules import conv_plan as plan
from qcompiler.schedules.builder import when
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.conv_epilogue import Epilogue, Parameters
from qcompiler.schedules.conv_kernel import ConvKernel, Start
from qcompiler.schedules.isa import Isa
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, kernel_key


@dataclass(frozen=True)
class Spread(Layout):
    """Every `apart[0]`-th row and `apart[1]`-th column of an image that lies like `whole`, from its first pixel on."""

    apart: tuple[int, int] = (1, 1)
    whole: Layout | None = None

    @property
    def elements(self) -> int:
        assert self.whole is not None
        return self.whole.elements

    def index(self, n: Any, h: Any, w: Any, c: Any) -> Any:
        assert self.whole is not None
        return self.whole.index(n, h * self.apart[0], w * self.apart[1], c)

    def step(self, rows: Any, columns: Any) -> Any:
        assert self.whole is not None
        return self.whole.step(rows * self.apart[0], columns * self.apart[1])


@dataclass(frozen=True)
class Line:
    """The outputs `first + stride * i`, i < `count`, of one axis: taps in the order of the inputs that they read, `start + i` and then one every `dilation`.
    No taps: nothing is read, and one tap of zeros stands for them."""

    first: int
    count: int
    taps: tuple[int, ...]
    start: int
    dilation: int

    @property
    def code(self) -> tuple[int, int, int]:
        """What its code depends on."""
        return len(self.taps), self.dilation, self.count

    @property
    def reads(self) -> tuple[Any, ...]:
        """Lines of equal `reads` read the same inputs."""
        return (*self.code, self.start)


def lines(stride: int, kernel: int, pad: int, dilation: int, outputs: int) -> list[Line]:
    """The phases of an axis."""
    found = []
    for first in range(min(stride, outputs)):
        taps = [t for t in reversed(range(kernel)) if (first + pad - t * dilation) % stride == 0]
        read = [(first + pad - t * dilation) // stride for t in taps] or [0]
        found.append(Line(first, -(-(outputs - first) // stride), tuple(taps), read[0], read[1] - read[0] if len(read) > 1 else 1))
    return found


@dataclass(frozen=True)
class Phase:
    """Outputs of one row phase and of adjacent column phases that read the same."""

    row: Line
    columns: tuple[Line, ...]

    @property
    def code(self) -> tuple[Any, ...]:
        return self.row.code, self.columns[0].code, len(self.columns)

    def weight(self, weight: np.ndarray) -> np.ndarray:
        """[O, KH, KW, I] as [columns * O, taps, taps, I]."""
        padded = np.pad(weight, [(0, 0), (0, 1), (0, 1), (0, 0)])  # the last tap of each axis: zeros
        rows = padded[:, list(self.row.taps or (-1,))]
        return np.concatenate([rows[:, :, list(column.taps or (-1,))] for column in self.columns])

    def start(self, x: Layout, out: Layout) -> tuple[int, int]:
        """Elements from the first pixel of the input to the first one that is read, and from the first pixel of the output to the first one that is written."""
        return x.step(self.row.start, self.columns[0].start), out.step(self.row.first, self.columns[0].first)


def phases_of(op: OpCall, joins: bool) -> list[Phase]:
    """The phases of a transposed convolution, those of equal code side by side. `joins`: columns may become channels."""
    weight = op.operands[1]
    assert isinstance(weight, np.ndarray)
    a, axes = op.attrs, []
    for i, outputs in enumerate(op.output.shape[1:3]):
        axes.append(lines(int(a["strides"][i]), weight.shape[1 + i], int(a["padding"][i]), int(a.get("dilation", (1, 1))[i]), outputs))
    columns = [tuple(alike) for _, alike in itertools.groupby(axes[1], lambda line: line.reads if joins else line.first)]
    return sorted((Phase(row, column) for row in axes[0] for column in columns), key=lambda p: p.code)


@dataclass(frozen=True)
class Part:
    """A phase as a forward convolution, narrow groups joined (`joined` became one)."""

    phase: Phase
    geometry: plan.Geometry
    joined: int

    def tiling(self, unit: Isa, params: Mapping[str, Any]) -> plan.Tiling:
        """The best tile of so many blocks, as far as there are channels."""
        tile = self.tile(unit, int(params["blocks"]))
        tasks = int(params["pixel_tasks"]), int(params["channel_tasks"])
        return plan.Tiling(*tile, str(params["order"]), plan.default_unroll(self.geometry, unit), *tasks)

    def tile(self, unit: Isa, blocks: int) -> tuple[int, int, int]:
        most = min(blocks, -(-self.geometry.outputs // unit.lanes))
        return plan.best_tile(self.geometry, unit, [next(b for b in range(most, 0, -1) if unit.fits(1, b))])


class TransposedKernel:
    """Emits the PrimFunc that runs the convolutions of all phases, those of equal code one after the other."""

    def __init__(self, unit: Isa, parts: Sequence[Part], tilings: Sequence[plan.Tiling], epilogue: Epilogue) -> None:
        self.unit, self.x, self.out = unit, parts[0].geometry.x, parts[0].geometry.out
        plain = [replace(part.geometry, padding=(0, 0)) for part in parts]  # the place of a phase says where it reads
        self.emitters = [ConvKernel(g, unit, tiling, epilogue) for g, tiling in zip(plain, tilings, strict=True)]
        self.alike = [list(same) for _, same in itertools.groupby(range(len(parts)), lambda i: (plain[i], tilings[i]))]

    @property
    def tasks(self) -> int:
        return sum(emitter.tasks for emitter in self.emitters)

    @property
    def code(self) -> list[Any]:
        """What decides it."""
        return [(self.emitters[same[0]].g, self.emitters[same[0]].tiling, len(same)) for same in self.alike]

    def build(self) -> Any:
        unit, vectors = self.unit, sum(e.vectors for e in self.emitters)
        weights = sum(e.vectors * e.vector_weights for e in self.emitters)
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True, is_private=True):
                T.func_attr({"tirx.noalias": True})
                task = T.arg("task", T.int32())
                names = ["x", "w", "bias", *([] if unit.is_float else ["multiplier"]), "params", "starts", "out"]
                pointers = {n: T.arg(n, T.handle()) for n in names}
                types = {"x": self.x.dtype, "w": unit.weight_dtype, "bias": unit.accumulator, "multiplier": "float32", "starts": "int32", "out": self.out.dtype}
                sizes = {"x": self.x.elements, "w": weights, "starts": 4 * len(self.emitters), "out": self.out.elements}
                lanes = vectors * unit.lanes
                sizes["multiplier"] = lanes * self.emitters[0].multipliers
                buffers = {n: T.decl_buffer((sizes.get(n, lanes),), types[n], data=pointers[n]) for n in names if n != "params"}
                params = Parameters(unit)
                params.declare(pointers["params"])
                first = 0
                for same in self.alike:
                    emitter = self.emitters[same[0]]
                    emitter.params = params
                    for name in {"x", "w", "bias", "multiplier", "out"} & set(buffers):
                        setattr(emitter, name, buffers[name])
                    end = first + emitter.tasks * len(same)
                    with when(T.And(task >= first, task < end) if len(self.alike) > 1 else None):
                        number = T.bind(task - first)
                        place = T.bind((number // emitter.tasks + same[0]) * 4)
                        emitter.start = Start(*(T.bind(buffers["starts"][place + i]) for i in range(4)))
                        emitter.task(T.bind(number % emitter.tasks))
                    first = end
        return builder.get()


class TransposedRow(ConvRow):
    """`qc.conv2d_transpose` or `qc.f32.conv2d_transpose` on one ISA.

    Tunables: `blocks`, vectors of channels of a tile; `order` and tasks as in `Tiling`, of each phase. The model finds the best tile of so many blocks.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unit = self.unit.forms[-1]  # steps are not sorted: phases share code

    @property
    def own_channels(self) -> bool:
        return True

    def refuse(self, op: OpCall, target: Target) -> str | None:
        ranks = [len(o.shape) for o in op.operands[:2]]
        if ranks != [4, 4]:
            return f"the input has rank {ranks[0]} and the weight rank {ranks[1]}; supported: 4 and 4."
        if op.operands[1].shape[3] == 1 < int(op.attrs.get("groups", 1)):
            return "a depthwise kernel would be mostly zeros as a matrix; the portable row multiplies lanes of channels."
        return super().refuse(op, target)

    def parts(self, op: OpCall) -> list[Part]:
        x, weight, out = op.operands[0], op.operands[1], op.output
        assert isinstance(x, Layout) and isinstance(weight, np.ndarray)
        groups, (n, _, _, outputs), found = int(op.attrs.get("groups", 1)), out.shape, []
        for phase in phases_of(op, groups == 1 and out.channel_pitch == outputs):
            (row, column), many = (phase.row, phase.columns[0]), len(phase.columns)
            here = Spread((n, row.count, column.count, outputs * many), out.dtype, apart=tuple(op.attrs["strides"]), whole=out)
            kernel, dilation = (len(row.taps) or 1, len(column.taps) or 1), (row.dilation, column.dilation)
            sizes = weight.shape[3], outputs // groups * many, groups
            geometry = plan.Geometry(x, here, None, *sizes, kernel, (1, 1), dilation, (-row.start, -column.start))
            found.append(Part(phase, *plan.merge_groups(geometry, self.unit)))
        return found

    def geometry(self, op: OpCall) -> tuple[plan.Geometry, int]:
        """Of the phase with most work."""
        part = max(self.parts(op), key=lambda p: p.geometry.macs)
        return part.geometry, part.joined

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        halos = [part.geometry.halo() for part in self.parts(op)]
        top, left, bottom, right = (max(sides) for sides in zip(*halos, strict=True))
        return [Need(halo=(top, left, bottom, right), pitch=self.pitch(op))]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        space = plan.design_space(self.geometry(op)[0], self.unit)
        return {name: space[name] for name in ("blocks", "order", "pixel_tasks", "channel_tasks")}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        points = [self.within(op, target, blocks) for blocks in self.space(op, target)["blocks"]]
        return min(points, key=lambda point: point[0])[1]

    def within(self, op: OpCall, target: Target, blocks: int) -> tuple[float, dict[str, Any]]:
        parts = self.parts(op)
        tiles = [part.tile(self.unit, blocks) for part in parts]
        costs = [plan.cycles(part.geometry, self.unit, *tile) for part, tile in zip(parts, tiles, strict=True)]
        cost, largest = max((cost, i) for i, cost in enumerate(costs))
        pixel_tasks, channel_tasks = plan.split_tasks(parts[largest].geometry, self.unit, tiles[largest], cost)
        return sum(costs), {"blocks": blocks, "order": "channels", "pixel_tasks": pixel_tasks, "channel_tasks": channel_tasks}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        parts, epilogue = self.parts(op), self.epilogue(op)
        tilings = [part.tiling(self.unit, params) for part in parts]
        kernel = TransposedKernel(self.unit, parts, tilings, epilogue)
        weight, bias, *multiplier = (np.asarray(o) for o in op.operands[1:])
        constants, starts, at, vector = [], [], 0, 0
        for part, emitter in zip(parts, kernel.emitters, strict=True):
            own = [np.tile(o, len(part.phase.columns)) for o in (bias, *multiplier)]  # along the channels
            constants.append(self.constants(op, part.phase.weight(weight), own, emitter, part.joined))
            starts.append([*part.phase.start(kernel.x, op.output), at, vector])
            at, vector = at + constants[-1][0].size, vector + emitter.vectors
        arrays = [np.concatenate(same) for same in zip(*constants, strict=True)]
        key = kernel_key("transposed", self.unit, kernel.code, epilogue)
        macs = sum(p.geometry.macs for p in parts)
        return Kernel(kernel.build, kernel.tasks, [*arrays, self.parameters(op), np.array(starts, np.int32)], key, self.name, 0, macs, dict(params))
