"""Dense layers with 8- or 4-bit weights and float32 activations: weights become float32 in registers, a vector of output channels at a time.

    for a tile of outputs: for a tile of rows: for a group: acc += x[k] * float(stored[k]);  total += (acc - offset * sum of x) * scale

With few rows the time is that of reading the weights once, so they lie in the order in which they are read: [tile][k][outputs of the tile], 4-bit ones as
pairs (k, k + 1) in a byte, stored as q + 8. What storage and zero point add to q (`offset`) is taken off once per group, by the sum of the group's x;
several rows take it off each weight, which costs less than that many sums.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, accumulator, cast, clamp, load, loops, make_kernel, share, splat, store, task_count, vector, vector_bytes, view
from qcompiler.schedules.isa import call
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.table import Kernel, Layout, OpCall

STEPS = 8  # k's per turn of the inner loop
MACS_PER_TASK = 500_000
NO_LIMIT = float(np.finfo(np.float32).max)


def pack_weights(q: np.ndarray, bits: int, width: int) -> np.ndarray:
    """int8 [N, K] as flat bytes [tile][k][width]; 4 bits: uint8 [tile][pair of k][width], the even k in the low half. Padding is never stored from."""
    outputs, inputs = q.shape
    tiles = -(-outputs // width)
    padded = np.zeros((tiles * width, inputs + inputs % (8 // bits)), np.int8)
    padded[:outputs, :inputs] = q
    moved = padded.reshape(tiles, width, -1).transpose(0, 2, 1)
    if bits == 8:
        return np.ascontiguousarray(moved).reshape(-1)
    halves = (moved + 8).astype(np.uint8)
    return np.ascontiguousarray(halves[:, 0::2] | halves[:, 1::2] << 4).reshape(-1)


def pack_groups(values: np.ndarray, width: int) -> np.ndarray:
    """float32 [N, G] as flat [tile][group][width]; padding is 0."""
    outputs, groups = values.shape
    padded = np.zeros((-(-outputs // width) * width, groups), np.float32)
    padded[:outputs] = values
    return np.ascontiguousarray(padded.reshape(-1, width, groups).transpose(0, 2, 1)).reshape(-1)


def weight_only(op: OpCall, target: Target, row: str) -> Kernel:
    """`qc.f32.dense_weight_only`."""
    q, zero, scale, bias = (np.asarray(o) for o in op.operands[1:5])
    bits, group = int(op.attrs["bits"]), int(op.attrs["group_size"])
    outputs, inputs = q.shape
    rows = math.prod(op.output.shape[:-1])
    lanes = vector_bytes(target) // 4
    height = min(4, 1 << (rows.bit_length() - 1))
    blocks = max(1, min(8 // height, -(-outputs // lanes)))  # accumulators of a tile and a group are twice `height * blocks`
    width = blocks * lanes
    offset = zero.astype(np.float32) + (8 if bits == 4 else 0)
    shifted = bool(offset.any())
    arrays = [pack_weights(q, bits, width), pack_groups(scale, width), pack_groups(bias.reshape(-1, 1), width)]
    arrays += [pack_groups(offset, width)] if shifted else []
    macs = rows * outputs * inputs
    tile_count = -(-outputs // width)

    def emit(k: Emitter) -> None:
        _Tile(k, bits, group, (rows, outputs, inputs), (height, blocks, lanes), shifted).run(tile_count)

    return make_kernel(row, op, target, emit, tasks=task_count(macs, tile_count, MACS_PER_TASK), arrays=arrays, macs=macs)


class _Tile:
    """Emits the loops. `sizes`: rows, outputs, inputs. `shape`: rows, vectors of outputs, and lanes of a tile."""

    def __init__(self, k: Emitter, bits: int, group: int, sizes: tuple[int, int, int], shape: tuple[int, int, int], shifted: bool) -> None:
        self.k, self.bits, self.group, self.shifted = k, bits, group, shifted
        (self.rows, self.outputs, self.inputs), (self.height, self.blocks, self.lanes) = sizes, shape
        self.width, self.groups = self.blocks * self.lanes, -(-self.inputs // group)
        self.weights, self.scales, self.bias, *offsets = k.arrays
        self.offsets = offsets[0] if shifted else None
        self.out = view(k.output, k.op.output)
        self.residual = view(k.inputs[1], k.op.tensors[1]) if len(k.inputs) > 1 else None
        self.low, self.high = (None if abs(float(k.op.attrs[name])) >= NO_LIMIT else k.f32(k.op.attrs[name]) for name in ("low", "high"))

    def run(self, tile_count: int) -> None:
        with loops(share(self.k, tile_count), -(-self.rows // self.height)) as (tile, row):
            first = T.bind(T.min(row * self.height, self.rows - self.height))  # a ragged last tile of rows is moved back
            self.total = [[self.zero() for _ in range(self.blocks)] for _ in range(self.height)]
            whole, rest = divmod(self.inputs, self.group)
            with loops(whole) as (number,):
                if whole:
                    self.sum_group(tile, first, number, self.group)
            if rest:
                self.sum_group(tile, first, T.int32(whole), rest)
            self.finish(tile, first, tile_count)

    def zero(self) -> Any:
        made = accumulator(self.lanes, "float32")
        store(made, 0, splat(tirx.const(0.0, "float32"), self.lanes), self.lanes)
        return made

    def multiply_add(self, a: Any, b: Any, target: Any) -> None:
        store(target, 0, call(vector("float32", self.lanes), "llvm.fmuladd", a, b, load(target, 0, self.lanes)), self.lanes)

    def sum_group(self, tile: Any, first: Any, number: Any, size: int) -> None:
        """Add the `size` products of group `number` to the totals."""
        n, parts = self.lanes, [[self.zero() for _ in range(self.blocks)] for _ in range(self.height)]
        sums = [self.zero()] if self.shifted and self.height == 1 else []
        at = T.bind((tile * self.groups + number) * self.width)
        base = T.bind(number * self.group)
        whole = size // STEPS
        with loops(whole) as (turn,):
            if whole:
                self.steps(tile, first, at, T.bind(base + turn * STEPS), STEPS, parts, sums)
        if size % STEPS:
            self.steps(tile, first, at, T.bind(base + whole * STEPS), size % STEPS, parts, sums)
        for b in range(self.blocks):
            scale = T.bind(load(self.scales, at + b * n, n))
            for r in range(self.height):
                part = load(parts[r][b], 0, n)
                if sums:
                    part = part - load(self.offsets, at + b * n, n) * load(sums[0], 0, n)
                self.multiply_add(part, scale, self.total[r][b])

    def steps(self, tile: Any, first: Any, at: Any, start: Any, count: int, parts: list[list[Any]], sums: list[Any]) -> None:
        """k = start, ..., start + count - 1; `start` is even, and `count` too, save for the last k of all. `at`: of the group's scales."""
        n, per_byte = self.lanes, 8 // self.bits
        stored = -(-self.inputs // per_byte)
        line = T.bind((tile * stored + T.shift_right(start, T.int32(per_byte - 1))) * self.width)
        for step in range(0, count, per_byte):
            halves = range(min(per_byte, count - step))

            def stored_at(b: int, step: int = step) -> Any:
                return T.bind(cast("int32", load(self.weights, line + (step // per_byte * self.width + b * n), n), n))

            def broadcast(r: int, half: int, step: int = step) -> Any:
                x = T.bind(splat(self.k.inputs[0][(first + r) * self.inputs + start + (step + half)], n))
                if sums:
                    store(sums[0], 0, load(sums[0], 0, n) + x, n)
                return x

            if self.height == 1:  # many blocks: each is done with before the next is loaded, for accumulators take half of the registers
                pair = [broadcast(0, half) for half in halves]
                for b in range(self.blocks):
                    word = stored_at(b)
                    for half in halves:
                        self.multiply_add(pair[half], T.bind(cast("float32", self.value(word, half), n)), parts[0][b])
                continue
            words = [stored_at(b) for b in range(self.blocks)]
            for half in halves:
                row = [broadcast(r, half) for r in range(self.height)]
                for b, word in enumerate(words):
                    weight = cast("float32", self.value(word, half), n)
                    weight = T.bind(weight - load(self.offsets, at + b * n, n) if self.shifted else weight)
                    for r in range(self.height):
                        self.multiply_add(row[r], weight, parts[r][b])

    def value(self, word: Any, half: int) -> Any:
        if self.bits == 8:
            return word
        constant = splat(T.int32(4 if half else 15), self.lanes)
        return T.shift_right(word, constant) if half else T.bitwise_and(word, constant)

    def finish(self, tile: Any, first: Any, tile_count: int) -> None:
        """Bias, residual, clamp. The last tile of outputs may have padding, which is not stored."""
        valid = self.outputs - (tile_count - 1) * self.width
        if valid == self.width:
            self.store_outputs(tile, first, self.width)
            return
        with T.If(tile < tile_count - 1):
            with T.Then():
                if tile_count > 1:
                    self.store_outputs(tile, first, self.width)
            with T.Else():
                self.store_outputs(tile, first, valid)

    def store_outputs(self, tile: Any, first: Any, valid: int) -> None:
        for r in range(self.height):
            index = self.index(T.bind(first + r))
            for b in range(self.blocks):
                left = valid - b * self.lanes
                if left >= self.lanes:
                    self.store_one(index, tile, load(self.total[r][b], 0, self.lanes), b * self.lanes, self.lanes)
                    continue
                for lane in range(max(left, 0)):
                    self.store_one(index, tile, self.total[r][b][lane], b * self.lanes + lane, 1)

    def store_one(self, index: list[Any], tile: Any, value: Any, start: int, lanes: int) -> None:
        channel = tile * self.width + start
        value = value + load(self.bias, channel, lanes)
        if self.residual is not None:
            value = value + load(self.residual.buffer, self.residual.at([*index, channel]), lanes)
        store(self.out.buffer, self.out.at([*index, channel]), clamp(value, self.low, self.high, lanes), lanes)

    def index(self, row: Any) -> list[Any]:
        """The leading indices of a row of the output."""
        found, rest = [], row
        for extent in reversed(self.out.shape[1:-1]):
            found.append(T.bind(T.truncmod(rest, extent)))
            rest = T.bind(T.truncdiv(rest, extent))
        return [rest, *reversed(found)] if len(self.out.shape) > 1 else []


def check_weight_only(op: OpCall) -> str | None:
    if not isinstance(op.operands[0], Layout) or not all(isinstance(o, np.ndarray) for o in op.operands[1:5]):
        return "the input must be computed at run time, and weights and bias must be constants."
    if op.operands[0].dtype != "float32" or op.output.dtype != "float32":
        return "activations must be float32."
    return None


portable("qc.f32.dense_weight_only", weight_only, check=check_weight_only, dense=True)
