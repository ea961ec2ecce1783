"""Convolution and dense layers on a GPU as a tiled matrix product, on tensor cores or on dp4a: what a block does.

    prologue   the first steps' operands are on their way to shared memory
    each step  wait for the oldest step's operands; start copies of the newest; multiply
    sums       warps that shared a part add up; of blocks that shared a tile, each with its share of the steps, the last to arrive adds up
    epilogue   bias, rescaling, residual, clamp in registers; whole words to memory

A chunk is 16 bytes of the reduction, for one pixel or output channel. Chunks of a row of shared memory are permuted (`gemm_plan.swizzle`), so that 8
lanes that read the same chunk of 8 rows meet 8 different groups of banks. Taps outside of the image are stored as the zero point, which the bias
makes up for, so borders cost a comparison where they are copied and nothing where they are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter, when
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.epilogue import Epilogue, element, quad
from qcompiler.schedules.cuda.gemm_plan import CHUNK, PIECE, Geometry, Tile, Unit, swizzle


def call(name: str, *args: Any) -> None:
    """A device function with effects (device.cuh)."""
    T.evaluate(T.call_extern("int32", name, *args))


def barrier() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))


def div(value: Any, by: int) -> Any:
    return value if by == 1 else T.bind(tirx.truncdiv(value, by))


def mod(value: Any, by: int) -> Any:
    return T.int32(0) if by == 1 else T.bind(tirx.truncmod(value, by))


@dataclass
class Gemm:
    """One kernel while it is written."""

    k: Emitter
    g: Geometry
    tile: Tile
    unit: Unit
    zero: Any  # the input's zero point in all four bytes of a word
    alignment = 64  # of shared memory

    def __post_init__(self) -> None:
        k, g, t = self.k, self.g, self.tile
        self.steps = -(-g.depth // t.bk)  # of the whole reduction; this block's: `count` from `begin` on
        self.most = t.share(g)
        self.blocks_n = -(-g.outputs // t.bn)
        self.stage_bytes = t.stage_bytes(self.unit)
        self.shared = T.alloc_buffer((t.stages * self.stage_bytes,), "int8", scope="shared", align=self.alignment)
        self.shared_words = T.decl_buffer((t.stages * self.stage_bytes // 4,), "int32", data=self.shared.data, scope="shared")
        self.lane = T.bind(T.bitwise_and(k.thread, T.int32(31)))
        warp = T.bind(T.shift_right(k.thread, T.int32(5)))
        self.warp_n = mod(warp, t.warps[1])
        self.warp_m = mod(div(warp, t.warps[1]), t.warps[0])
        self.warp_k = div(warp, t.warps[0] * t.warps[1])
        self.split, self.block = mod(k.group, t.split_k), div(k.group, t.split_k)
        self.begin = T.bind(self.split * self.most) if t.split_k > 1 else T.int32(0)
        self.count = T.bind(T.min(self.steps - self.begin, self.most)) if self.steps % self.most else T.int32(self.most)
        self.block_n = mod(self.block, self.blocks_n)
        rest = div(self.block, self.blocks_n)
        blocks_m = -(-g.pixels // t.bm)
        self.block_m, self.group = mod(rest, blocks_m), div(rest, blocks_m)
        if blocks_m == 1:
            self.group = rest
        self.first_pixel = T.bind(self.block_m * t.bm)
        self.rows, self.columns = t.parts(self.unit)
        self.sums = local(self.rows * self.columns * self.unit.row_count * self.unit.columns)
        self.place_loads()
        self.place_weights()

    # -- global --> shared ----------------------------------------------------------------------------------------------------------------

    def place_loads(self) -> None:
        """What this thread copies in every step: one place along the reduction, of every `stride`-th pixel."""
        g, t = self.g, self.tile
        per_row = t.bk // g.vector
        self.column = T.bind(T.bitwise_and(self.k.thread, T.int32(per_row - 1)) * g.vector)
        first = T.bind(tirx.truncdiv(self.k.thread, per_row))
        stride = max(1, t.threads // per_row)
        self.loads: list[tuple[Any, Any, Any, Any, Any]] = []  # row, place in shared memory, index in x, image row, image column
        _, height, width = g.out.shape[:3]
        for begin in range(0, t.bm, stride):
            row = T.bind(first + begin)
            pixel = T.bind(T.min(self.first_pixel + row, g.pixels - 1))  # behind the last pixel: computed, not stored
            line = div(pixel, width)
            n, oh, ow = div(line, height), mod(line, height), mod(pixel, width)
            if height == 1:
                n = line
            ih, iw = T.bind(oh * g.strides[0] - g.padding[0]), T.bind(ow * g.strides[1] - g.padding[1])
            source = T.bind(g.x.index(n, ih, iw, self.group * g.inputs))
            chunk = T.bitwise_xor(tirx.truncdiv(self.column, CHUNK), swizzle(row, t.bk // CHUNK))
            place = T.bind(row * t.bk + chunk * CHUNK + T.bitwise_and(self.column, T.int32(CHUNK - 1)))
            self.loads.append((row, place, source, ih, iw))
        self.spare_rows = t.bm % stride != 0 or stride > t.bm

    def place_weights(self) -> None:
        """Which chunks of weights this thread copies in every step: place in shared memory, piece, and byte of `k.arrays[0]` in the first step."""
        t, (rows, depth) = self.tile, self.g.pieces
        first = T.bind(self.group * rows + self.block_n * (t.bn // PIECE))
        self.piece_bytes = PIECE * PIECE * self.unit.bits // 8
        self.weights: list[tuple[Any, Any, Any, Any]] = []
        for begin in range(0, t.weight_bytes(self.unit), t.threads * CHUNK):
            place = T.bind(self.k.thread * CHUNK + begin)
            row, along, inside = self.piece_of(place)
            source = T.bind(((first + row) * depth + along) * self.piece_bytes + inside)
            self.weights.append((place, T.bind(self.block_n * (t.bn // PIECE) + row), along, source))

    def piece_of(self, place: Any) -> tuple[Any, Any, Any]:
        """Of the weights' part of a stage: the piece along channels and along the reduction that a chunk is of, and the byte in it."""
        bk = self.tile.bk
        row = T.bind(tirx.truncdiv(place, bk))
        chunk = T.bind(T.bitwise_xor(tirx.truncdiv(mod(place, bk), CHUNK), swizzle(row, bk // CHUNK)))
        return tirx.truncdiv(row, PIECE), T.bind(tirx.truncdiv(chunk, 2)), tirx.truncmod(row, PIECE) * PIECE + tirx.truncmod(chunk, 2) * CHUNK

    def copy_weights(self, step: Any, base: Any) -> None:
        """Of a step, to byte `base` of shared memory. Behind the reduction they are 0, and behind the last channel's piece whatever they were."""
        t, (rows, depth), each = self.tile, self.g.pieces, self.tile.bk // PIECE
        move, size = T.bind(step * (each * self.piece_bytes)), t.weight_bytes(self.unit)
        for number, (place, row, along, source) in enumerate(self.weights):
            to, origin = T.address_of(self.shared[base + place]), T.address_of(self.k.arrays[0][source + move])
            with (
                when(row < rows if rows * PIECE % t.bn else None),
                when(place < size if (number + 1) * t.threads * CHUNK > size else None),
            ):
                if depth % each:
                    call(f"qc_copy_or_fill<{CHUNK}>", to, origin, step * each + along < depth, 0)
                else:
                    call(f"qc_copy<{CHUNK}>", to, origin)

    def copy_step(self, step: Any, stage: Any) -> None:
        """Start the copies of both operands of a step into a stage."""
        g, t = self.g, self.tile
        base = T.bind(stage * self.stage_bytes)
        at = T.bind(step * t.bk + self.column)
        tap = div(at, g.padded_inputs) if g.taps > 1 else T.int32(0)
        channel = T.bind(at - tap * g.padded_inputs)
        down = T.bind(div(tap, g.kernel[1]) * g.dilation[0]) if g.kernel[0] > 1 else T.int32(0)
        across = T.bind(mod(tap, g.kernel[1]) * g.dilation[1])
        move = T.bind((down * g.x.rows[1] + across) * g.x.channel_pitch + channel)

        def copy_rows() -> None:
            for row, place, source, ih, iw in self.loads:
                to, origin = T.address_of(self.shared[base + place]), T.address_of(self.k.inputs[0][source + move])
                with when(row < t.bm if self.spare_rows else None):
                    if not g.bounded:
                        call(f"qc_copy<{g.vector}>", to, origin)
                        continue
                    h, w = T.bind(ih + down), T.bind(iw + across)
                    inside = T.And(T.And(h >= 0, h < g.x.shape[1]), T.And(w >= 0, w < g.x.shape[2]))
                    call(f"qc_copy_or_fill<{g.vector}>", to, origin, inside, self.zero)

        with when(at < g.depth if g.depth % t.bk else None):  # behind the reduction weights are 0
            copy_rows()
        self.copy_weights(step, T.bind(base + t.bm * t.bk))

    # -- shared --> registers, products -----------------------------------------------------------------------------------------------------

    def multiply(self, stage: Any) -> None:
        """This warp's share of a step."""
        t = self.tile
        share = t.bk // (t.wk * self.unit.depth)
        a = T.bind(stage * self.stage_bytes + self.warp_m * (t.wm * t.bk))
        b = T.bind(self.weights_of_warp(stage * self.stage_bytes + t.bm * t.bk))
        if self.unit.columns > 1:
            for i in range(share):
                self.multiply_mma(a, b, T.bind((self.warp_k * share + i) * 2))
        else:
            with T.serial(0, share) as i:
                self.multiply_dp4a(a, b, T.bind(self.warp_k * share + i))

    def weights_of_warp(self, base: Any) -> Any:
        """The byte where a warp's weights begin, of a stage's that begin at `base`."""
        return base + self.warp_n * (self.tile.wn * self.tile.bk)

    def multiply_mma(self, a: Any, b: Any, chunk: Any) -> None:
        """32 bytes of the reduction: a load of 4 matrices yields the pixels' operand of a part."""
        t, lane, chunks = self.tile, self.lane, self.tile.bk // CHUNK
        left, right = local(4 * self.rows), local(2 * self.columns)
        row = T.bind(T.bitwise_and(lane, T.int32(15)))
        place = T.bind(a + row * t.bk + T.bitwise_xor(chunk + T.shift_right(lane, T.int32(4)), swizzle(row, chunks)) * CHUNK)
        for i in range(self.rows):
            call("qc_load_matrices", T.address_of(left[4 * i]), T.address_of(self.shared[place + 16 * i * t.bk]))
        self.load_weights(right, b, chunk)
        for i in range(self.rows):
            for j in range(self.columns):
                to = T.address_of(self.sums[4 * (i * self.columns + j)])
                call("qc_multiply_matrices", to, T.address_of(left[4 * i]), T.address_of(right[2 * j]))

    def load_weights(self, right: Any, b: Any, chunk: Any) -> None:
        """Both words of every part, for 32 bytes of the reduction: a load of 4 matrices yields those of two parts."""
        t, lane, chunks = self.tile, self.lane, self.tile.bk // CHUNK
        row = T.bind(T.bitwise_and(lane, T.int32(7)) + T.shift_right(lane, T.int32(4)) * 8)
        half = T.bitwise_and(T.shift_right(lane, T.int32(3)), T.int32(1))
        place = T.bind(b + row * t.bk + T.bitwise_xor(chunk + half, swizzle(row, chunks)) * CHUNK)
        for j in range(0, self.columns, 2):
            call("qc_load_matrices", T.address_of(right[2 * j]), T.address_of(self.shared[place + 8 * j * t.bk]))

    def multiply_dp4a(self, a: Any, b: Any, chunk: Any) -> None:
        """16 bytes of the reduction: lanes are 4 pixels by 8 channels."""
        y, x = T.bind(T.shift_right(self.lane, T.int32(3))), T.bind(T.bitwise_and(self.lane, T.int32(7)))
        right = self.weight_words(b, chunk, x)
        for i in range(self.rows):
            left = self.chunk_of(a, y + 4 * i, chunk, y, 4 * i)
            for j, words in enumerate(right):
                total = self.sums[i * self.columns + j]
                for word in range(4):
                    total = T.call_pure_extern("int32", "__dp4a", element(left, word), words[word], total)
                T.buffer_store(self.sums, total, [i * self.columns + j])

    def weight_words(self, b: Any, chunk: Any, x: Any) -> list[list[Any]]:
        """The 4 words of every part's channel `x`, for 16 bytes of the reduction."""
        quads = [self.chunk_of(b, x + 8 * j, chunk, x, 0) for j in range(self.columns)]
        return [[element(q, i) for i in range(4)] for q in quads]

    def chunk_of(self, base: Any, row: Any, chunk: Any, low: Any, part: int) -> Any:
        """A chunk of a row of shared memory, which is `low` + `part` as far as the swizzling goes."""
        chunks = self.tile.bk // CHUNK
        place = T.bitwise_xor(chunk, T.bitwise_xor(swizzle(low, chunks), swizzle(part, chunks)))
        return quad(self.shared_words, T.shift_right(base + row * self.tile.bk, T.int32(4)) + place)

    # -- the whole ------------------------------------------------------------------------------------------------------------------------

    def emit(self, end: Epilogue) -> None:
        t = self.tile
        for i in range(int(self.sums.shape[0])):
            T.buffer_store(self.sums, T.int32(0), [i])
        least = self.steps - (t.split_k - 1) * self.most
        ahead = t.ahead(self.unit)
        for stage in range(ahead):
            if stage < self.most:
                with when(self.count > stage if stage >= least else None):
                    self.copy_step(T.bind(self.begin + stage), T.int32(stage))
            call("qc_commit_copies")
        with T.serial(0, self.count) as step:
            call(f"qc_wait_copies<{ahead - 1}>")
            self.work(step, T.bind(step + ahead))
        self.add_up()
        first = self.warp_k == 0 if t.wk > 1 else None  # the warps that have the sums
        if t.split_k > 1:
            self.gather(first, end)
        else:
            with when(first):
                self.finish(end)

    def work(self, step: Any, newest: Any) -> None:
        """Multiply a step whose operands this thread's copies have brought; start the copies of the `newest` one."""
        barrier()  # the copies of all threads are there, and nobody reads the stage that is overwritten next
        self.copy_newest(newest)
        self.multiply(mod(step, self.tile.stages))

    def copy_newest(self, newest: Any) -> None:
        with T.If(newest < self.count), T.Then():
            self.copy_step(T.bind(self.begin + newest), mod(newest, self.tile.stages))
        call("qc_commit_copies")

    def add_up(self) -> None:
        """The sums of the warps that shared a part, in those of the first: through shared memory."""
        t, count = self.tile, int(self.sums.shape[0])
        if t.wk == 1:
            return
        memory, threads = self.shared_words, t.threads // t.wk
        thread = T.bind(self.k.thread - self.warp_k * threads)
        barrier()
        with T.If(self.warp_k > 0), T.Then():
            for i in range(count):
                T.buffer_store(memory, self.sums[i], [((self.warp_k - 1) * count + i) * threads + thread])
        barrier()
        with T.If(self.warp_k == 0), T.Then():
            with T.serial(0, t.wk - 1) as other:
                for i in range(count):
                    T.buffer_store(self.sums, self.sums[i] + memory[(other * count + i) * threads + thread], [i])

    def gather(self, first: Any, end: Epilogue) -> None:
        """Leave this block's sums in scratch, in the order of registers; the last block of a tile adds the others' and goes on. Integer sums
        are the same in any order."""
        t, k, count = self.tile, self.k, int(self.sums.shape[0])
        threads = t.threads // t.wk

        def place(split: Any) -> Any:
            return T.address_of(k.scratch[T.bind((self.block * t.split_k + split) * (t.bm * t.bn) + k.thread * 4)])

        sums = T.address_of(self.sums[0])
        with when(first):
            call(f"qc_store_sums<{count}, {threads * 4}>", place(self.split), sums)
        last = T.bind(T.call_extern("int32", "qc_last_of", T.address_of(k.counters[self.block]), t.split_k))
        with when(T.And(last != 0, first) if first is not None else last != 0):
            with T.serial(0, t.split_k - 1) as other:
                call(f"qc_add_sums<{count}, {threads * 4}>", sums, place(other + T.Cast("int32", other >= self.split)))
            self.finish(end)

    def finish(self, end: Epilogue) -> None:
        t, lane, mma = self.tile, self.lane, self.unit.columns == 2
        span = min(t.wn, self.g.span)
        parts = span // 8
        y, x = (T.shift_right(lane, T.int32(2)), T.bitwise_and(lane, T.int32(3))) if mma else (T.shift_right(lane, T.int32(3)), T.bitwise_and(lane, T.int32(7)))
        row = T.bind(self.block_n * t.bn + self.warp_n * t.wn)  # of weights; the channels of a span are spread over its rows
        below = mod(row, self.g.span)
        least = T.bind(row - below + x * (self.g.span // 8 * self.unit.columns) + tirx.truncdiv(below, 8) * self.unit.columns)
        channels = [T.bind(least + begin) for begin in range(0, t.wn, span)]
        tables = [T.bind(self.group * (self.g.pieces[0] * PIECE) + channel) for channel in channels]
        first = T.bind(self.first_pixel + self.warp_m * t.wm + y)
        for i in range(self.rows):
            for half in range(self.unit.row_count):
                pixel = T.bind(first + (i * self.unit.rows + half * 8))
                for base, channel, table in zip(range(i * self.columns, (i + 1) * self.columns, parts), channels, tables, strict=True):
                    if mma:
                        sums = [self.sums[4 * (base + j) + 2 * half + e] for j in range(parts) for e in (0, 1)]
                    else:
                        sums = [self.sums[base + j] for j in range(parts)]
                    inside = channel < self.g.outputs
                    with T.If(T.And(pixel < self.g.pixels, inside)), T.Then():
                        end(sums, table, pixel, self.group, channel)
