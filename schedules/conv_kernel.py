"""Convolution and dense layers as one register-tiled kernel, for every ISA that has a dot step.

    task -> (run of channels, run of pixel tiles) -> channel tile, pixel tile (either one outside) -> reduction -> epilogue

Inputs carry a halo that holds the zero point, so inner loops have no bounds checks. A ragged edge of the image is a tile moved back over
pixels that the same task or another one computes as well: equal bytes are written twice. Hence the output must not overlap any input,
the residual among them. A residual of ragged channels may be read up to 63 bytes past its end, never used.

Channels that would leave half of the last vector empty are computed for two pixels in it (`Isa.sharing`): their weights lie in both halves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import aligned_frame, when
from qcompiler.schedules.conv_epilogue import Epilogue, Parameters, by_sign
from qcompiler.schedules.conv_plan import Channels, Geometry, Tiling, cut_channels, runs, sorts_steps, split_blocks
from qcompiler.schedules.conv_steps import step_classes, step_offsets, table_pitch, tile_spans
from qcompiler.schedules.isa import Isa, load, save, scalar, shuffle


@dataclass(frozen=True)
class Start:
    """Where a convolution that shares its code begins: elements into the input, the output and the weights, and vectors into the constants per channel."""

    x: Any = 0
    out: Any = 0
    w: Any = 0
    vector: Any = 0


class ConvKernel:
    """Emits the PrimFunc of one geometry, tiling and epilogue."""

    def __init__(self, geometry: Geometry, isa: Isa, tiling: Tiling, epilogue: Epilogue) -> None:
        self.g, self.isa, self.tiling, self.epilogue = geometry, isa, tiling, epilogue
        self.channels: Channels = cut_channels(geometry.outputs, isa, tiling.blocks)
        batch, height, width = geometry.pixels
        if tiling.rows > height or tiling.cols > geometry.widest:
            raise ValueError(f"a tile of {tiling.rows} x {tiling.cols} pixels is larger than the output, {height} x {geometry.widest}")
        if tiling.blocks > self.channels.vectors:
            raise ValueError(f"{tiling.blocks} blocks of {isa.lanes} channels are more than {geometry.outputs} channels")
        if tiling.rows * tiling.cols * tiling.blocks > 2 * isa.registers:
            raise ValueError(f"{tiling.rows} x {tiling.cols} x {tiling.blocks} accumulators don't fit {isa.registers} registers")
        self.sorted, self.start = sorts_steps(geometry, isa), Start()
        self.tile_rows, self.tile_cols = -(-height // tiling.rows), -(-width // tiling.cols)
        self.pixel_run, self.pixel_tasks = runs(batch * self.tile_rows * self.tile_cols, tiling.pixel_tasks)
        self.channel_units = geometry.groups if geometry.groups > 1 else self.channels.full
        self.channel_run, self.channel_tasks = runs(self.channel_units, tiling.channel_tasks)
        self.offsets = [(r, c) for r in range(tiling.rows) for c in range(tiling.cols)]
        padded = self.offsets + self.offsets[-1:] * (-len(self.offsets) % isa.pixels)
        self.ties = [padded[i : i + isa.pixels] for i in range(0, len(padded), isa.pixels)]  # pixels that are computed together
        self.sharers = [self.offsets[i : i + self.channels.sharing] for i in range(0, len(self.offsets), self.channels.sharing)]  # of a last vector

    @property
    def tasks(self) -> int:
        return self.pixel_tasks * self.channel_tasks

    @property
    def scratch(self) -> int:
        """Bytes for sums that registers don't hold, per task."""
        return 0

    @property
    def multipliers(self) -> int:
        """Of a channel: a vector of them, then that for negative numbers."""
        return 2 if self.epilogue.bends else 1

    @property
    def vectors(self) -> int:
        """Of channels, of all groups."""
        return self.g.groups * self.channels.vectors

    @property
    def vector_weights(self) -> int:
        """Packed weights of one vector of output channels."""
        return self.g.depth(self.isa.group) * self.isa.group * self.isa.lanes

    def build(self) -> Any:
        g, isa = self.g, self.isa
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True, is_private=True):
                T.func_attr({"tirx.noalias": True})
                task = T.arg("task", T.int32())
                names = ["x", "residual", "w", "steps", "bias", "multiplier", "params", "out", "scratch"]
                here = {"residual": g.residual, "steps": self.sorted, "multiplier": not isa.is_float, "scratch": self.scratch}
                absent = {n for n in here if not here[n]}
                pointers = {n: T.arg(n, T.handle()) for n in names if n not in absent}
                lanes = self.vectors * isa.lanes
                self.x = T.decl_buffer((g.x.elements,), g.x.dtype, data=pointers["x"])
                self.w = T.decl_buffer((self.vectors * self.vector_weights,), isa.weight_dtype, data=pointers["w"])
                if self.sorted:
                    words = g.groups * len(tile_spans(self.channels)) * table_pitch(isa, self.channels, g.depth(isa.group))[1]
                    self.steps = T.decl_buffer((words,), str(step_offsets(g, isa).dtype), data=pointers["steps"])
                self.bias = T.decl_buffer((lanes,), isa.accumulator, data=pointers["bias"])
                if not isa.is_float:
                    self.multiplier = T.decl_buffer((lanes * self.multipliers,), "float32", data=pointers["multiplier"])
                if g.residual:
                    self.residual = T.decl_buffer((g.residual.elements,), g.residual.dtype, data=pointers["residual"])
                self.params = Parameters(isa)
                self.params.declare(pointers["params"])
                self.out = T.decl_buffer((g.out.elements,), g.out.dtype, data=pointers["out"])
                if self.scratch:
                    self.sums = T.decl_buffer((self.tasks * self.scratch // 4,), isa.accumulator, data=pointers["scratch"])
                self.task(self.framed(task) if len(isa.forms) > 1 else task)  # tiles may be larger than the registers
        return builder.get()

    def framed(self, task: Any) -> Any:
        """The task's number, at the start of a kernel that spills vectors."""
        words, at = self.params.views["int32"], self.params.zero
        return aligned_frame(task, self.isa.lanes, words[at], words[at + 1])

    def task(self, task: Any) -> None:
        pixel_task, channel_task = (task % self.pixel_tasks, task // self.pixel_tasks) if self.tasks > 1 else (0, 0)
        batch = self.g.pixels[0]
        self.first_pixel = T.bind(tirx.const(0, "int32") + pixel_task * self.pixel_run)
        self.pixel_count = _length(self.first_pixel, self.pixel_run, batch * self.tile_rows * self.tile_cols, self.pixel_tasks)
        first = T.bind(tirx.const(0, "int32") + channel_task * self.channel_run)
        count = _length(first, self.channel_run, self.channel_units, self.channel_tasks)
        if self.g.groups > 1:
            with T.serial(0, count) as i:
                group = T.bind(first + i)
                self.group(group, tirx.const(0, "int32"), self.channels.full, None)
        else:
            last = channel_task == self.channel_tasks - 1 if self.channel_tasks > 1 else None
            self.group(tirx.const(0, "int32"), first, count, last)

    def group(self, group: Any, first: Any, count: Any, has_last: Any) -> None:
        """Channel tiles [first, first + count) of one group, and its last one where the condition `has_last` holds (None: always)."""
        channels = self.channels

        def full(i: Any, pixel: Any) -> None:
            self.tile(group, (first + i) * channels.blocks, channels.blocks, pixel, channels.last == 0 and channels.full == 1)

        def last(pixel: Any) -> None:
            self.tile(group, tirx.const(channels.full * channels.blocks, "int32"), channels.last, pixel, True)

        if self.tiling.order == "pixels":
            with self.each_pixel() as pixel:
                with T.serial(0, count) as i:
                    full(i, pixel)
                if channels.last:
                    with when(has_last):
                        last(pixel)
        else:
            with T.serial(0, count) as i, self.each_pixel() as pixel:
                full(i, pixel)
            if channels.last:
                with when(has_last), self.each_pixel() as pixel:
                    last(pixel)

    @contextmanager
    def each_pixel(self) -> Iterator[Any]:
        """A loop over the pixel tiles of the task."""
        with T.serial(0, self.pixel_count) as p:
            yield T.bind(self.first_pixel + p)

    def place(self, pixel: Any) -> tuple[Any, Any, Any]:
        """(image, row, column) of the first output pixel of tile number `pixel`."""
        t, (batch, height, width) = self.tiling, self.g.pixels
        row = T.bind(T.min(pixel // self.tile_cols % self.tile_rows * t.rows, height - t.rows)) if height > 1 else 0
        col = T.bind(T.min(pixel % self.tile_cols * t.cols, width - t.cols))
        image = T.bind(pixel // (self.tile_cols * self.tile_rows)) if batch > 1 else 0
        return image, row, col

    def tile(self, group: Any, block: Any, blocks: int, pixel: Any, ragged: bool) -> None:
        """One register tile: `blocks` vectors from vector `block` of `group`, and the pixels of tile number `pixel`."""
        g, isa = self.g, self.isa
        image, row, col = self.place(pixel)
        vector = T.bind(group * self.channels.vectors + block)
        channel = group * g.outputs + block * isa.lanes
        x = T.bind(g.x.index(image, row * g.strides[0] - g.padding[0], col * g.strides[1] - g.padding[1], group * g.inputs) + self.start.x)
        w = T.bind(vector * self.vector_weights + self.start.w)
        vector = vector + self.start.vector
        whole = blocks - (ragged and self.channels.sharing > 1)  # vectors of one pixel each
        accs = [[[self.accumulator() for _ in ties] for _ in range(whole)] for ties in self.ties]
        shared = [self.accumulator() for _ in self.sharers] if whole < blocks else []
        for b in range(blocks):
            bias = T.bind(load(self.bias, (vector + b) * isa.lanes, isa.lanes))
            if b == whole:
                for acc in shared:
                    save(acc, 0, bias, isa.lanes)
                continue
            for line in accs:
                for acc, value in zip(line[b], isa.tie(bias), strict=True):
                    save(acc, 0, value, isa.lanes)
        if self.sorted:
            self.reduce_sorted(accs, blocks, x, w, T.bind(group * len(tile_spans(self.channels)) + block // self.channels.blocks))
        else:
            self.reduce(accs, shared, blocks, x, w)
        values = []
        for line in accs:
            sums = [[T.bind(v) for v in isa.untie([load(acc, 0, isa.lanes) for acc in tied])] for tied in line]
            values += [list(pixel) for pixel in zip(*sums, strict=True)]
        store = self.finish_packed if self.epilogue.packed else self.finish_wide
        out = T.bind(self.first_output(image, row, col, channel) + self.start.out)
        residual = T.bind(g.residual.index(image, row, col, channel)) if g.residual else None
        valid = self.channels.valid if ragged else blocks * isa.lanes
        if whole:
            store(values[: len(self.offsets)], vector, out, residual, min(valid, whole * isa.lanes))
        if shared:
            done = whole * isa.lanes
            sums = [[T.bind(load(acc, 0, isa.lanes))] for acc in shared]
            store(sums, vector + whole, out + done, None if residual is None else residual + done, valid - done, self.sharers)

    def first_output(self, image: Any, row: Any, col: Any, channel: Any) -> Any:
        """Where the first pixel of a tile begins in the output."""
        g = self.g
        if not g.wraps:
            return g.out.index(image, row, col, channel)
        batch, height, width, _ = g.out.shape
        line = T.bind(col // width)
        image, row, col = (T.bind(line // height) if batch > 1 else 0), T.bind(line % height), T.bind(col % width)
        top, left, bottom, right = g.out.halo
        self.turn = T.bind(width - col)  # the first pixel of the next row, and how much of the halo lies before it
        self.skipped = T.bind(g.out.step(0, left + right) + T.if_then_else(row == height - 1, g.out.step(top + bottom, 0), 0))
        return g.out.index(image, row, col, channel)

    def output_step(self, row: int, col: int) -> Any:
        """From the first pixel of a tile to another one, in the output."""
        step = self.g.out.step(row, col)
        return step + T.if_then_else(self.turn <= col, self.skipped, 0) if self.g.wraps and col > 0 else step

    def accumulator(self) -> Any:
        return T.alloc_buffer((self.isa.lanes,), self.isa.accumulator)

    def reduce(self, accs: list[list[list[Any]]], shared: list[Any], blocks: int, x: Any, w: Any) -> None:
        """The loops over kernel and input channels; the innermost one unrolled. `shared`: accumulators of the last vector for the pixels of `sharers`."""
        g, isa = self.g, self.isa.forms[-1]
        loops, size = g.loops(isa.group), blocks * isa.lanes * isa.group
        tail = g.tail(isa.group)
        pitch = g.x.channel_pitch
        places = [[(r * g.strides[0] * g.x.rows[1] + c * g.strides[1]) * pitch for r, c in ties] for ties in self.ties]

        def steps(x: Any, w: Any, valid: int, count: int) -> None:
            """`count` dot steps on activations that are loaded together."""
            values: list[list[Any]] = []
            for s in range(count):
                weights = [isa.weights(self.w, w + s * size + b * isa.lanes * isa.group) for b in range(blocks)]
                for i, (tied, line) in enumerate(zip(places, accs, strict=True)):
                    if s == 0:
                        values.append(isa.activations(self.x, [x + place for place in tied], valid, count))
                    for block, weight in zip(line, weights, strict=not shared):
                        sums = isa.dots([load(acc, 0, isa.lanes) for acc in block], values[i][s], weight)
                        for acc, value in zip(block, sums, strict=True):
                            save(acc, 0, value, isa.lanes)
                    group, last = divmod(i, self.channels.sharing)
                    if shared and last + 1 == len(self.sharers[group]):
                        value = isa.dot(load(shared[group], 0, isa.lanes), isa.join([v[s] for v in values[i - last : i + 1]]), weights[-1])
                        save(shared[group], 0, value, isa.lanes)

        def run(x: Any, w: Any, move: int, begin: int, end: int) -> None:
            """Whole dot steps [begin, end), as many together as one load serves."""
            while begin < end:
                count = min(isa.span if move == isa.group else 1, 1 << ((end - begin).bit_length() - 1))
                steps(x + begin * move, w + begin * size, isa.group, count)
                begin += count

        def nest(level: int, x: Any, w: Any) -> None:
            extent, move = loops[level]
            inner = math.prod(e for e, _ in loops[level + 1 :]) * size
            if level + 1 < len(loops):
                with T.serial(0, extent) as i:
                    nest(level + 1, T.bind(x + i * move), T.bind(w + i * inner))
                return
            whole = extent if tail == isa.group else extent - 1
            unroll = max(1, min(self.tiling.unroll, whole))
            times = whole // unroll
            if times > 1:
                with T.serial(0, times) as i:
                    xi, wi = T.bind(x + i * (unroll * move)), T.bind(w + i * (unroll * size))
                    run(xi, wi, move, 0, unroll)
            run(x, w, move, times * unroll if times > 1 else 0, whole)
            if whole < extent:
                steps(x + whole * move, w + whole * size, tail, 1)

        nest(0, x, w)

    def reduce_sorted(self, accs: list[list[list[Any]]], blocks: int, x: Any, w: Any, tile: Any) -> None:
        """The steps of channel tile number `tile`, class after class (`conv_steps`)."""
        g, isa = self.g, self.isa
        assert isa.pixels == 1
        size, tail, depth = isa.lanes * isa.group, g.tail(isa.group), g.depth(isa.group)
        head, pitch = table_pitch(isa, self.channels, depth)
        table = T.bind(tile * pitch)
        places = [(r * g.strides[0] * g.x.rows[1] + c * g.strides[1]) * g.x.channel_pitch for r, c in self.offsets]

        def step(x: Any, w: Any, forms: list[Isa], valid: int) -> None:
            weights = [form.weights(self.w, w + b * size) for b, form in enumerate(forms)]
            for place, line in zip(places, accs, strict=True):
                values = {form: form.activation(self.x, x + place, valid) for form in dict.fromkeys(forms)}
                for (acc,), form, weight in zip(line, forms, weights, strict=True):
                    save(acc, 0, form.dot(load(acc, 0, isa.lanes), values[form], weight), isa.lanes)

        begin: Any = 0
        classes = step_classes(isa, blocks)
        for index, forms in enumerate(classes + classes[-1:] * (tail != isa.group)):
            end = T.bind(T.Cast("int32", self.steps[table + index]))
            with T.serial(begin, end) as i:
                at = T.bind(x + T.Cast("int32", self.steps[table + head + i]))
                step(at, T.bind(w + i * (blocks * size)), [isa.forms[f] for f in forms], isa.group if index < len(classes) else tail)
            begin = end

    def scaled(self, value: Any, vector: Any, b: int) -> Any:
        """float32(acc) * multiplier."""
        lanes, multiplier = self.isa.lanes, self.factors(vector, b, 0)
        if self.epilogue.bends == "accumulator":
            multiplier = by_sign(value, multiplier, self.factors(vector, b, 1), lanes)
        return T.Cast(f"float32x{lanes}", value) * multiplier

    def factors(self, vector: Any, b: int, row: int) -> Any:
        """Multipliers of a vector of channels; row 1: for negative numbers."""
        lanes = self.isa.lanes
        return load(self.multiplier, ((vector + b) * self.multipliers + row) * lanes, lanes)

    def finish_wide(self, values: list[list[Any]], vector: Any, out: Any, residual: Any, valid: int, sharers: list[list[Any]] | None = None) -> None:
        """float32 or int16 output: natural channel order. `sharers`: the pixels that a line of values holds side by side, if not those of `offsets`."""
        g, isa, e = self.g, self.isa, self.epilogue
        lines = sharers or [[pixel] for pixel in self.offsets]
        width = isa.lanes // len(lines[0])
        for pixels, line in zip(lines, values, strict=True):
            for b, value in enumerate(line):
                y = value if isa.is_float else self.scaled(value, vector, b)
                if g.residual:
                    parts = [load(self.residual, residual + self.residual_step(*pixel) + b * isa.lanes, width) for pixel in pixels]
                    added = joined(parts, width, isa.lanes)
                    y = y + added if isa.is_float else self.rescaled(self.convertible(y, True), T.Cast(f"int32x{isa.lanes}", added), vector, b)
                if e.clamp_low:
                    y = T.max(y, self.params.word("low"))
                if e.clamp_high:
                    y = T.min(y, self.params.word("high"))
                if e.output == "int16":
                    y = T.Cast(f"int16x{isa.lanes}", isa.to_int(y))
                y = T.bind(y)
                for i, (r, c) in enumerate(pixels):
                    self.save_part(out + self.output_step(r, c) + b * isa.lanes, y, isa.lanes, i * width, min(width, valid - b * isa.lanes))

    def finish_packed(self, values: list[list[Any]], vector: Any, out: Any, residual: Any, valid: int, sharers: list[list[Any]] | None = None) -> None:
        """8-bit output: runs of 4, 2 or 1 vectors of 4 // run lines of values are requantized and packed together. `sharers`: as in `finish_wide`."""
        g, isa, e = self.g, self.isa, self.epilogue
        lines, start = sharers or [[pixel] for pixel in self.offsets], 0
        for run in split_blocks(len(values[0])):
            width = run * isa.lanes // len(lines[0])
            for p in range(0, len(lines), 4 // run):
                here = lines[p : p + 4 // run]
                slots = [(i, start + b) for i in range(len(here)) for b in range(run)]
                added: list[Any] = [None] * len(slots)
                if g.residual:
                    parts = [[load(self.residual, residual + self.residual_step(*pixel) + start * isa.lanes, width) for pixel in pixels] for pixels in here]
                    added = (self.gather_words if g.residual.dtype == "int16" else self.gather)(parts, width, run)
                ints = [self.requantize(values[p + i][b], vector, b, word) for (i, b), word in zip(slots, added, strict=True)]
                ints = [ints[i % len(ints)] for i in range(4)]
                packed = isa.pack(ints, self.params.offset() if e.offset else None, e.output == "int8")
                if e.clamp_low:
                    packed = T.max(packed, self.params.bound("low", e.output))
                if e.clamp_high:
                    packed = T.min(packed, self.params.bound("high", e.output))
                order = isa.packed_dwords(run)
                if order != sorted(order):
                    packed = T.reinterpret(f"{e.output}x{isa.bytes}", shuffle([T.reinterpret(f"int32x{isa.lanes}", packed)], order))
                packed = T.bind(packed)
                for i, (r, c) in enumerate(pixel for pixels in here for pixel in pixels):
                    place = self.output_step(r, c) + start * isa.lanes
                    self.save_part(out + place, packed, isa.bytes, i * width, min(width, valid - start * isa.lanes))
            start += run

    def requantize(self, value: Any, vector: Any, b: int, added: Any) -> Any:
        """rint(clip(float32(acc) * multiplier)) as int32 lanes, then the residual (int32 lanes or None) and its rescaling. The zero point comes later."""
        isa = self.isa
        y = self.convertible(self.scaled(value, vector, b), added is not None)
        if added is not None:
            y = self.rescaled(y, added, vector, b)
        return T.bind(isa.to_int(y))

    def convertible(self, y: Any, residual: bool) -> Any:
        """`to_int` gives INT32_MIN for any excess: right below, unless a residual follows, and wrong above."""
        if self.epilogue.exact_range:
            return y
        y = T.min(y, scalar(float(2**30), "float32", self.isa.lanes))
        return T.max(y, scalar(float(-(2**30)), "float32", self.isa.lanes)) if residual else y

    def rescaled(self, y: Any, added: Any, vector: Any, b: int) -> Any:
        """(rint(y) + (q - zr) * m) * scale as float32, `added` the int32 lanes of a residual as stored: (q - zr) * m = u * m + constant, for storage
        u = q + offset, in wrapping int32."""
        total = T.bind(self.isa.to_int(y) + (added * self.params.word("multiplier") + self.params.word("constant")))
        lanes, scale = self.isa.lanes, self.params.word("scale")
        if self.epilogue.bends != "sum":
            return T.Cast(f"float32x{lanes}", total) * scale
        scaled = T.Cast(f"float32x{lanes}", total) * by_sign(total, scale, self.factors(vector, b, 1), lanes)
        return T.min(scaled, scalar(float(2**30), "float32", lanes))  # a negative slope may lead beyond int32

    def residual_step(self, row: int, column: int) -> int:
        """From the first pixel of a tile to another one."""
        assert self.g.residual is not None
        return (row * self.g.residual.rows[1] + column) * self.g.residual.channel_pitch

    def gather(self, parts: list[list[Any]], width: int, run: int) -> list[Any]:
        """The residual bytes of up to `4 // run` lines of pixels, of each so many, as int32 lanes of each slot, by the inverse of the permutation before
        the store."""
        isa = self.isa
        together = T.bind(joined([part for line in parts for part in line], width, isa.bytes))
        if run < 4:
            inverse = np.argsort(isa.packed_dwords(run))
            together = T.bind(T.reinterpret(f"{isa.input_dtype}x{isa.bytes}", shuffle([T.reinterpret(f"int32x{isa.lanes}", together)], inverse.tolist())))
        return [isa.unpack(together, slot) for slot in range(len(parts) * run)]

    def gather_words(self, parts: list[list[Any]], width: int, run: int) -> list[Any]:
        """The same for a residual of 16 bits."""
        isa, order = self.isa, self.isa.channel_order(run).reshape(run, -1).tolist()
        loaded = [T.bind(joined(line, width, run * isa.lanes)) for line in parts]
        return [T.Cast(f"int32x{isa.lanes}", shuffle([words], channels)) for words in loaded for channels in order]

    def save_part(self, index: Any, vector: Any, total: int, begin: int, count: int) -> None:
        """Store elements [begin, begin + count) of a vector of `total`, as powers of two.

        Bytes that one register holds leave the vector as one number: LLVM 22 never ends merging many vectors of them that lie side by side.
        """
        while count > 0:
            size = 1 << (count.bit_length() - 1)
            if size == total:
                part = vector
            elif self.out.dtype.endswith("int8") and size <= 8 and begin % size == 0:
                words = T.reinterpret(f"int{8 * size}x{total // size}", vector)
                part = T.reinterpret(f"{self.out.dtype}x{size}" if size > 1 else self.out.dtype, shuffle([words], [begin // size]))
            else:
                part = shuffle([vector], range(begin, begin + size))
            save(self.out, index, part, size)
            index, begin, count = index + size, begin + size, count - size


def joined(parts: list[Any], width: int, lanes: int) -> Any:
    """Vectors of `width` elements side by side in one of `lanes`, the first one again where they are too few."""
    return parts[0] if width == lanes else shuffle(parts + parts[:1] * (lanes // width - len(parts)), range(lanes))


def _length(first: Any, run: int, total: int, tasks: int) -> Any:
    """The length of the run that starts at `first`."""
    return run if run * tasks == total else T.bind(T.min(tirx.const(run, "int32"), total - first))
