"""Dense layers with 8- or 4-bit weights and float32 activations on a GPU: a block has 4 outputs of a few rows, its lanes every so many-th word of weights.

A word is 4 or 8 weights of an output, and of one group; it becomes float32 in registers without a conversion: an integer in the mantissa of a power of two is
that power plus the integer, and a subtraction leaves the integer, exactly.

    for a word:  part = sum of x * q  (- z * sum of x);   acc += part * s      then the lanes' and the warps' acc are added up

With few rows the time is that of reading the weights once, so they lie in the order in which they are read: [tile of 4 outputs][word][output].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, clamp, make_kernel, view, when
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.cards import card_of
from qcompiler.schedules.cuda.epilogue import element, quad
from qcompiler.schedules.cuda.gemm import barrier
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.portable.weight_only import NO_LIMIT, check_weight_only
from qcompiler.schedules.table import Kernel, Need, OpCall, register

OUTPUTS = 4  # of a block
MANTISSA = 23
UNSHIFTED = 5  # 4-bit weights of a word that lie in the mantissa's bits


@dataclass(frozen=True)
class Sizes:
    """Of a layer; `height`: rows of a block."""

    rows: int
    outputs: int
    inputs: int
    bits: int
    group: int
    height: int

    @staticmethod
    def of(op: OpCall) -> Sizes:
        outputs, inputs = np.shape(op.operands[1])
        bits, rows = int(op.attrs["bits"]), math.prod(op.output.shape[:-1])
        return Sizes(rows, outputs, inputs, bits, min(int(op.attrs["group_size"]), inputs + 8 - inputs % 8), min(8, 1 << (rows - 1).bit_length()))

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def words(self) -> int:
        """Of an output."""
        return -(-self.inputs // self.per_word)

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group)

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.outputs // OUTPUTS), -(-self.rows // self.height)


def pack_weights(q: np.ndarray, s: Sizes) -> np.ndarray:
    """int8 [N, K] as flat int32 [tile][word][output]: unsigned fields of q + 2^(bits-1), the first lowest; padding is q = 0."""
    padded = np.zeros((s.blocks[0] * OUTPUTS, s.words * s.per_word), np.int64)
    padded[: s.outputs, : s.inputs] = q
    fields = (padded + (1 << (s.bits - 1))).reshape(len(padded), s.words, s.per_word).astype(np.uint32)
    words = np.bitwise_or.reduce(fields << (np.arange(s.per_word, dtype=np.uint32) * s.bits), axis=-1)
    return np.ascontiguousarray(words.reshape(-1, OUTPUTS, s.words).transpose(0, 2, 1)).reshape(-1).view(np.int32)


def pack_groups(values: np.ndarray, s: Sizes) -> np.ndarray:
    """float32 [N, G] as flat [tile][group][output]; padding is 0."""
    padded = np.zeros((s.blocks[0] * OUTPUTS, values.shape[1]), np.float32)
    padded[: s.outputs] = values
    return np.ascontiguousarray(padded.reshape(-1, OUTPUTS, values.shape[1]).transpose(0, 2, 1)).reshape(-1)


def whole_numbers(word: Any, bits: int) -> list[Any]:
    """float32 of the stored weights of a word, q each: exact."""

    def number(raised: Any, exponent: int) -> Any:
        return T.bind(T.reinterpret("float32", raised) - tirx.const(float(2**exponent + (1 << (bits - 1))), "float32"))

    if bits == 8:
        base = T.int32((127 + MANTISSA) << MANTISSA)  # its three lower bytes are 0
        return [number(T.call_pure_extern("int32", "__byte_perm", word, base, T.int32(0x7440 | i)), MANTISSA) for i in range(4)]
    found, upper = [], T.bind(T.shift_right(word, T.int32(4 * UNSHIFTED)))
    for i in range(8):
        source, place = (word, 4 * i) if i < UNSHIFTED else (upper, 4 * (i - UNSHIFTED))
        exponent = MANTISSA - place  # the field's unit is 1 there
        found.append(number(T.bitwise_or(T.bitwise_and(source, T.int32(15 << place)), T.int32((127 + exponent) << MANTISSA)), exponent))
    return found


class WeightOnlyRow:
    """`qc.f32.dense_weight_only`."""

    name = "cuda/f32.dense_weight_only"
    isa = "cuda"
    own_channels = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return check_weight_only(op)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(dense=True), *[Need() for _ in op.tensors[1:]]]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"warps": [1, 2, 4, 8]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        """So many warps that every multiprocessor has enough loads under way, none without words."""
        s, processors = Sizes.of(op), card_of(target).processors
        fitting = [w for w in self.space(op, target)["warps"] if w == 1 or 32 * w <= s.words]
        return {"warps": next((w for w in fitting if math.prod(s.blocks) * w >= 32 * processors), fitting[-1])}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        s, warps = Sizes.of(op), int(params["warps"])
        q, zero, scale, bias = (np.asarray(o) for o in op.operands[1:5])
        arrays = [pack_weights(q, s), pack_groups(scale, s), pack_groups(bias.reshape(-1, 1), s)]
        arrays += [pack_groups(zero, s)] if zero.any() else []
        macs, threads = s.rows * s.outputs * s.inputs, 32 * warps
        everything = math.prod(s.blocks) * threads

        def emit(k: Emitter) -> None:
            Block(k, s, warps).emit()

        return make_kernel(self.name, op, target, emit, arrays=arrays, macs=macs, threads=everything, block=threads, params=params)


class Block:
    """One kernel while it is written."""

    def __init__(self, k: Emitter, s: Sizes, warps: int) -> None:
        self.k, self.s, self.warps = k, s, warps
        self.weights, self.scales, self.bias, *zeros = k.arrays
        self.zeros = zeros[0] if zeros else None
        self.tile, rows = unravel(k.group, s.blocks)
        self.first = T.bind(rows * s.height)
        self.sums = local(s.height * OUTPUTS, "float32")
        self.low, self.high = (None if abs(float(k.op.attrs[name])) >= NO_LIMIT else k.f32(k.op.attrs[name]) for name in ("low", "high"))

    def emit(self) -> None:
        for i in range(self.s.height * OUTPUTS):
            T.buffer_store(self.sums, tirx.const(0.0, "float32"), [i])
        threads = 32 * self.warps
        with T.serial(0, -(-self.s.words // threads)) as step:
            word = T.bind(step * threads + self.k.thread)
            with when(word < self.s.words if self.s.words % threads else None):
                self.add_word(word)
        self.finish()

    def activations(self, row: int, start: Any) -> list[Any]:
        """Those that meet a word: elements `start` and on of a row; 0 behind the last one."""
        s, x = self.s, self.k.inputs[0]
        line = T.bind(T.min(self.first + row, T.int32(s.rows - 1)) * s.inputs)  # behind the last row: computed, not stored
        if s.inputs % s.per_word == 0:
            quads = [quad(x, T.shift_right(line + start, T.int32(2)) + i) for i in range(s.per_word // 4)]
            return [element(q, i) for q in quads for i in range(4)]
        zero = tirx.const(0.0, "float32")
        return [T.bind(T.if_then_else(start + i < s.inputs, x[line + start + i], zero)) for i in range(s.per_word)]

    def add_word(self, word: Any) -> None:
        s = self.s
        start = T.bind(word * s.per_word)
        group = T.bind(self.tile * s.groups + tirx.truncdiv(start, s.group))
        stored, scale = quad(self.weights, self.tile * s.words + word), quad(self.scales, group)
        zero = quad(self.zeros, group) if self.zeros is not None else None
        numbers = [whole_numbers(T.bind(element(stored, i)), s.bits) for i in range(OUTPUTS)]
        for row in range(s.height):
            x = self.activations(row, start)
            total = T.bind(sum(x[1:], x[0])) if zero is not None else None
            for i, factors in enumerate(numbers):
                part = sum((a * b for a, b in zip(x[1:], factors[1:], strict=True)), x[0] * factors[0])
                part = part if zero is None else part - element(zero, i) * total
                at = row * OUTPUTS + i
                T.buffer_store(self.sums, self.sums[at] + T.bind(part) * element(scale, i), [at])

    def finish(self) -> None:
        """The lanes' sums, then the warps' through shared memory; a thread writes a result."""
        k, s, count = self.k, self.s, self.s.height * OUTPUTS
        shared, warp = T.alloc_buffer((self.warps * count,), "float32", scope="shared"), T.bind(T.shift_right(k.thread, T.int32(5)))
        for i in range(count):
            total = T.bind(T.call_extern("float32", "qc_warp_sum", self.sums[i]))
            with T.If(T.bitwise_and(k.thread, T.int32(31)) == 0), T.Then():
                T.buffer_store(shared, total, [warp * count + i])
        barrier()
        row, output = T.bind(self.first + tirx.truncdiv(k.thread, OUTPUTS)), T.bind(self.tile * OUTPUTS + tirx.truncmod(k.thread, OUTPUTS))
        with T.If(T.And(k.thread < count, T.And(row < s.rows, output < s.outputs))), T.Then():
            value = self.bias[output]
            for other in range(self.warps):
                value = value + shared[other * count + k.thread]
            index = [*unravel(row, k.op.output.shape[:-1]), output]
            if len(k.inputs) > 1:
                residual = view(k.inputs[1], k.op.tensors[1])
                value = value + residual.buffer[residual.at(index)]
            out = view(k.output, k.op.output)
            T.buffer_store(out.buffer, clamp(value, self.low, self.high, 1), [out.at(index)])


register("qc.f32.dense_weight_only", WeightOnlyRow())
