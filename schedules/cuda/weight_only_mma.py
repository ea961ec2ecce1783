"""Dense layers with 8- or 4-bit weights and many rows of float32 activations on tensor cores, `mma.sync` m16n8k16 of bfloat16 with float32 sums.

Nothing is rounded on the way there: a weight less its zero point has 8 significant bits, which a bfloat16 holds, and an activation's 24 are those of three:

    x = x1 + x2 + x3        x1: x without its lower 16 bits; x2: the same of what is left; x3: the rest
    for 32 of the reduction, of one group:  part = (x3 + x2 + x1) . (q - z);   acc += part * s

Tensor cores add 8 products and a sum at a time, each cut off 2 bits or more below those of a float32 of the largest, and what comes out to a float32 (M. Fasi,
N. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7, 2021): that is 9 / 2 + 2 times 2^-24 of what is
added. A part begins at 0 and takes 4 such additions of x1's products, behind 8 of others' that are 2^-7 as large: it is off by 27 times 2^-24 of its
magnitudes, whatever the depth of the layer, within the bound of docs/numerics.md ("Weights alone").

A warp has 16 rows, or twice as many, by 64 outputs, straight from memory. Which of 32 places of the reduction a lane holds is free, and here they are 8
adjacent ones; which outputs, and here they are 16 adjacent ones of each row. `warps` divide the reduction among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, View, clamp, make_kernel, view, when
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.cards import card_of
from qcompiler.schedules.cuda.epilogue import element, quad
from qcompiler.schedules.cuda.gemm import barrier, call
from qcompiler.schedules.cuda.weight_only import Sizes, whole_numbers
from qcompiler.schedules.portable.threads import alignment, unravel
from qcompiler.schedules.portable.weight_only import NO_LIMIT, check_weight_only
from qcompiler.schedules.table import Kernel, Need, OpCall, register

ROWS, COLUMNS, DEPTH = 16, 64, 32  # of a part: rows, outputs, places of the reduction
PARTS = COLUMNS // 8  # products of 8 columns
FEW = 8  # rows that wait for the weights, whatever multiplies
LEAST = 32  # places of the reduction from which on the error keeps its bound
UPPER = 0x7632  # of __byte_perm: the upper halves of two words


def column_order() -> np.ndarray:
    """[part, column of 8]: the output, of 64, such that a lane's sums, of columns 2 * i and 2 * i + 1 of all parts, are adjacent."""
    part, column = np.arange(PARTS)[:, None], np.arange(8)
    return column // 2 * (2 * PARTS) + 2 * part + column % 2


def pack_weights(q: np.ndarray, bits: int) -> np.ndarray:
    """int8 [N, K] as flat int32 [64 outputs][32 places][lane][part] words, of 8-bit weights two: unsigned fields of q + 2^(bits-1), the first lowest. Lane
    4 * column + i has places 8 * i and on. Padding is q = 0."""
    outputs, inputs = q.shape
    padded = np.zeros((-(-outputs // COLUMNS) * COLUMNS, -(-inputs // DEPTH) * DEPTH), np.int64)
    padded[:outputs, :inputs] = q
    fields = (padded + (1 << (bits - 1))).reshape(-1, COLUMNS, padded.shape[1] // DEPTH, 4, 8 * bits // 32, 32 // bits)[:, column_order()]
    words = np.bitwise_or.reduce(fields.astype(np.uint32) << (np.arange(32 // bits, dtype=np.uint32) * bits), axis=-1)
    return np.ascontiguousarray(words.transpose(0, 3, 2, 4, 1, 5)).reshape(-1).view(np.int32)


def pack_groups(values: np.ndarray) -> np.ndarray:
    """float32 [N, G] as [64 outputs][group][output]; padding is 0."""
    padded = np.zeros((-(-values.shape[0] // COLUMNS) * COLUMNS, values.shape[1]), np.float32)
    padded[: values.shape[0]] = values
    return padded.reshape(-1, COLUMNS, values.shape[1]).transpose(0, 2, 1)


def pack_zeros(values: np.ndarray) -> np.ndarray:
    """float32 [N, G] as flat [64 outputs][group][column][part]: those of a lane's weights."""
    return np.ascontiguousarray(pack_groups(values)[:, :, column_order().T]).reshape(-1)


class WeightOnlyMmaRow:
    """`qc.f32.dense_weight_only` of more than a few rows."""

    name = "cuda-mma/f32.dense_weight_only"
    isa = "cuda-mma"
    own_channels = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        if reason := check_weight_only(op):
            return reason
        s = Sizes.of(op)
        if target.capability < 80:
            return "the tensor cores know no bfloat16."
        if s.rows <= FEW:
            return f"{s.rows} rows wait for the weights."
        if s.inputs % 4 or s.outputs % 4 or s.inputs < LEAST:
            return f"the layer has {s.inputs} inputs and {s.outputs} outputs; supported: multiples of 4, and from {LEAST} inputs on."
        return None if s.group % DEPTH == 0 or s.groups == 1 else f"groups have {s.group} weights; supported: multiples of {DEPTH}."

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(dense=True), *[Need() for _ in op.tensors[1:]]]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"rows": [ROWS, 2 * ROWS], "warps": [1, 2, 4, 8]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        """So many warps that every multiprocessor has enough loads under way. With 32 rows the compiler (13.0) spills a register to fit one more warp."""
        s, processors = Sizes.of(op), card_of(target).processors
        fitting = [w for w in self.space(op, target)["warps"] if w == 1 or w * DEPTH <= s.inputs]
        return {"rows": ROWS, "warps": next((w for w in fitting if tiles(s, ROWS) * w >= 8 * processors), fitting[-1])}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        s, rows, warps = Sizes.of(op), int(params["rows"]), int(params["warps"])
        q, zero, scale, bias = (np.asarray(o) for o in op.operands[1:5])
        arrays = [pack_weights(q, s.bits), *(np.ascontiguousarray(pack_groups(a)).reshape(-1) for a in (scale, bias.reshape(-1, 1)))]
        arrays += [pack_zeros(zero)] if zero.any() else []

        def emit(k: Emitter) -> None:
            Block(k, s, rows // ROWS, warps).emit()

        threads = 32 * warps
        everything, macs = tiles(s, rows) * threads, s.rows * s.outputs * s.inputs
        return make_kernel(self.name, op, target, emit, arrays=arrays, macs=macs, threads=everything, block=threads, params=params)


def tiles(s: Sizes, rows: int) -> int:
    return -(-s.outputs // COLUMNS) * -(-s.rows // rows)


class Block:
    """One kernel while it is written. `high`: times 16 rows."""

    def __init__(self, k: Emitter, s: Sizes, high: int, warps: int) -> None:
        self.k, self.s, self.high, self.warps = k, s, high, warps
        self.weights, self.scales, self.bias, *zeros = k.arrays
        self.zeros = zeros[0] if zeros else None
        lane = T.bind(T.bitwise_and(k.thread, T.int32(31)))
        self.lane, self.warp = lane, T.bind(T.shift_right(k.thread, T.int32(5)))
        self.row = T.bind(T.shift_right(lane, T.int32(2)))  # and column
        self.part = T.bind(T.bitwise_and(lane, T.int32(3)))  # of the reduction, and of the outputs
        blocks = -(-s.outputs // COLUMNS), -(-s.rows // (ROWS * high))  # neighbours read the same weights
        self.tile, row = unravel(k.group, blocks)
        self.first = T.bind(row * (ROWS * high) + self.row)
        self.steps = -(-s.inputs // DEPTH)
        self.sums = local(high * 4 * PARTS, "float32")
        self.low, self.limit = (None if abs(float(k.op.attrs[name])) >= NO_LIMIT else k.f32(k.op.attrs[name]) for name in ("low", "high"))

    def emit(self) -> None:
        zero = tirx.const(0.0, "float32")
        for i in range(int(self.sums.shape[0])):
            T.buffer_store(self.sums, zero, [i])
        self.right, self.left, self.products = local(4 * PARTS), local(3 * 8), local(4 * PARTS, "float32")
        near = [T.bind(T.min(self.first + 8 * i, T.int32(self.s.rows - 1)) * self.s.inputs) for i in range(2 * self.high)]  # behind the last: not stored
        with T.serial(0, -(-self.steps // self.warps)) as i:
            step = T.bind(i * self.warps + self.warp)
            with when(step < self.steps if self.steps % self.warps else None):
                self.step(step, near)
        self.finish()

    def step(self, step: Any, near: list[Any]) -> None:
        """32 places of the reduction, which lie in one group."""
        s, each = self.s, self.s.bits // 4  # words of a lane and part
        start = T.bind(step * DEPTH + self.part * 8)
        group = T.bind(self.tile * s.groups + tirx.truncdiv(step * DEPTH, s.group))
        at = T.bind(((self.tile * self.steps + step) * 32 + self.lane) * (PARTS * each // 4))
        stored = [element(q, i) for q in [quad(self.weights, at + i) for i in range(PARTS * each // 4)] for i in range(4)]
        zeros = [quad(self.zeros, group * (COLUMNS // 4) + self.row * (PARTS // 4) + i) for i in range(PARTS // 4)] if self.zeros is not None else []
        for part in range(PARTS):
            numbers = [n for word in stored[each * part : each * (part + 1)] for n in whole_numbers(T.bind(word), s.bits)]
            if zeros:
                numbers = [T.bind(n - element(zeros[part // 4], part % 4)) for n in numbers]
            for pair in range(4):
                T.buffer_store(self.right, upper(*numbers[2 * pair : 2 * pair + 2]), [4 * part + pair])
        for high in range(self.high):
            self.read_rows(near[2 * high : 2 * high + 2], start)
            for i in range(4 * PARTS):
                T.buffer_store(self.products, tirx.const(0.0, "float32"), [i])
            for number, half, part in itertools.product((2, 1, 0), (0, 1), range(PARTS)):  # the smallest first
                operands = T.address_of(self.left[8 * number + 4 * half]), T.address_of(self.right[4 * part + 2 * half])
                call("qc_multiply_bfloats", T.address_of(self.products[4 * part]), *operands)
            for four in range(PARTS // 2):
                scale = quad(self.scales, group * (COLUMNS // 4) + self.part * (PARTS // 2) + four)
                for i, j in itertools.product(range(4), (0, 2)):  # an output, and which of two rows
                    at = 4 * (2 * four + i // 2) + j + i % 2
                    to = 4 * PARTS * high + at
                    T.buffer_store(self.sums, self.sums[to] + T.bind(self.products[at]) * element(scale, i), [to])

    def read_rows(self, starts: list[Any], start: Any) -> None:
        """left[8 * n + 4 * half + place] = bfloat16 number n of 3 of 8 activations of 2 rows, as products take them."""
        s, zero = self.s, tirx.const(0.0, "float32")
        for i, line in enumerate(starts):
            for half in (0, 1):
                loaded = local(4, "float32")
                for j in range(4):
                    T.buffer_store(loaded, zero, [j])
                with when(start + 4 * half < s.inputs if s.inputs % DEPTH else None):
                    read = quad(self.k.inputs[0], T.shift_right(line + start, T.int32(2)) + half)
                    for j in range(4):
                        T.buffer_store(loaded, element(read, j), [j])
                for pair in (0, 1):
                    for number, words in enumerate(zip(*(thirds(T.bind(loaded[2 * pair + j])) for j in (0, 1)), strict=True)):
                        T.buffer_store(self.left, upper(*words), [8 * number + 4 * half + 2 * pair + i])

    def finish(self) -> None:
        """The warps' sums in the first one's, through shared memory; a lane has 16 adjacent outputs of each of its rows."""
        count = int(self.sums.shape[0])
        if self.warps > 1:
            shared = T.alloc_buffer(((self.warps - 1) * count * 32,), "float32", scope="shared")
            with T.If(self.warp > 0), T.Then():
                for i in range(count):
                    T.buffer_store(shared, self.sums[i], [((self.warp - 1) * count + i) * 32 + self.lane])
            barrier()
        with when(self.warp == 0 if self.warps > 1 else None):
            if self.warps > 1:
                with T.serial(0, self.warps - 1) as other:
                    for i in range(count):
                        T.buffer_store(self.sums, self.sums[i] + shared[(other * count + i) * 32 + self.lane], [i])
            for i in range(2 * self.high):
                row = T.bind(self.first + 8 * i)
                with when(row < self.s.rows if self.s.rows % (ROWS * self.high) else None):
                    self.write_row(row, 4 * PARTS * (i // 2) + 2 * (i % 2))

    def write_row(self, row: Any, at: int) -> None:
        """sums[at], [at + 1], [at + 4], ... and on are a row's."""
        k, s = self.k, self.s
        out, more = view(k.output, k.op.output), [view(k.inputs[1], k.op.tensors[1])] if len(k.inputs) > 1 else []
        for four in range(PARTS // 2):
            output = T.bind(self.tile * COLUMNS + self.part * (2 * PARTS) + 4 * four)
            with when(output < s.outputs if s.outputs % COLUMNS else None):
                index = [*unravel(row, k.op.output.shape[:-1]), output]
                bias = quad(self.bias, T.shift_right(output, T.int32(2)))
                values = [element(bias, i) + self.sums[at + 4 * (2 * four + i // 2) + i % 2] for i in range(4)]
                for residual in more:
                    values = [a + b for a, b in zip(values, read_four(residual, residual.at(index)), strict=True)]
                write_four(out, out.at(index), [T.bind(clamp(value, self.low, self.limit, 1)) for value in values])


def read_four(source: View, at: Any) -> list[Any]:
    """float32 elements `at` and on, at once where rows are aligned to them."""
    if alignment(source) % 4:
        return [source.buffer[at + i] for i in range(4)]
    read = quad(source.buffer, T.shift_right(at, T.int32(2)))
    return [element(read, i) for i in range(4)]


def write_four(to: View, at: Any, values: list[Any]) -> None:
    """The other way."""
    if alignment(to) % 4:
        for i, value in enumerate(values):
            T.buffer_store(to.buffer, value, [at + i])
    else:
        T.buffer_store(to.buffer, T.Shuffle(values, list(range(4))), [T.ramp(T.bind(T.shift_right(at, T.int32(2))) * 4, 1, 4)])


def thirds(x: Any) -> list[Any]:
    """A float32 as three, the upper halves of which are bfloat16 and add up to it; of an infinite one the others are 0."""
    infinite = T.bind(T.bitwise_and(T.reinterpret("int32", x), T.int32(0x7FFFFFFF)) == 0x7F800000)
    found, rest = [x], x
    for _ in (1, 2):
        cut = T.reinterpret("float32", T.bitwise_and(T.reinterpret("int32", rest), T.int32(-0x10000)))
        rest = T.bind(T.Select(infinite, tirx.const(0.0, "float32"), rest - cut))
        found.append(rest)
    return found


def upper(first: Any, second: Any) -> Any:
    """The upper halves of two float32, as a word."""
    return T.bind(T.call_pure_extern("int32", "__byte_perm", T.reinterpret("int32", first), T.reinterpret("int32", second), T.int32(UPPER)))


register("qc.f32.dense_weight_only", WeightOnlyMmaRow())
