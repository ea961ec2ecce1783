"""The loops that every depthwise kernel of x86 shares, whatever its type: task -> channel block -> row tile -> tile along the row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter, aligned_frame, loops
from qcompiler.schedules.depthwise_plan import Geometry, Pair, Tasks
from qcompiler.schedules.isa import load, save
from qcompiler.schedules.table import Layout, OpCall


class DepthwiseNest(ABC):
    """Emits one kernel. `blocks`: (first channel, width) of the channel vectors, see `blocks_of`. Parameters: `rows` x `columns` outputs per step;
    `order`, what is outermost within a task: "channels" (an input row stays in L1 for the next row tile), "rows" (every cache line is fetched
    once where blocks share lines, if the rows of a tile stay in L1) or "columns" (all blocks of a tile before the next one along the row: the
    same for rows of any length, and a block's weights are loaded for each tile); `row_tasks` x `channel_tasks`, the most tasks an image is divided into.

    Constants are packed block after block, so a block's constants start behind the sum of the `lanes` before it.
    """

    def __init__(self, op: OpCall, blocks: Sequence[Pair], params: Mapping[str, Any]) -> None:
        self.op, self.g, self.blocks = op, Geometry.of(op), list(blocks)
        self.tile = (min(int(params["rows"]), self.g.out[0]), min(int(params["columns"]), self.g.out[1]))
        self.tasks = Tasks.of(self.g, self.tile[0], self.blocks, int(params["row_tasks"]), int(params["channel_tasks"]))
        self.order = str(params["order"])
        self.params = tuple(sorted(params.items()))

    @abstractmethod
    def prepare(self) -> None:
        """Bind what all steps use (`self.k` is set)."""

    def lanes(self, width: int) -> int:
        """Constants of each kind that a block of `width` channels has."""
        return width

    @abstractmethod
    def step(self, source: Any, at: tuple[Any, Any, Any, Any], packed: Any, width: int) -> None:
        """One tile of one block. `source`: index of its first input pixel; `at`: (image, row, column, channel) of its first output;
        `packed`: lanes before the block's."""

    def emit(self, k: Emitter) -> None:
        """The body of the kernel."""
        self.k = k
        self.prepare()
        t = self.tasks
        task = aligned_frame(k.task, k.width // 4, k.i32(0), k.i32(0))
        chunk = T.bind(T.floormod(task, t.channel_chunks))
        rest = T.bind(T.floordiv(task, t.channel_chunks))
        image = T.bind(T.floordiv(rest, t.row_chunks))
        rows = _part(T.floormod(rest, t.row_chunks), t.row_chunks, t.tiles)
        blocks = _part(chunk, t.channel_chunks, t.blocks)
        outer = {"channels": [], "rows": [rows], "columns": [rows, self.across]}[self.order]
        with loops(*outer) as tile:
            self._blocks(image, [*tile, *[rows, self.across][len(outer) :]], blocks, chunk)

    @property
    def across(self) -> tuple[int, int]:
        """[begin, end) of the tiles along a row."""
        return 0, -(-self.g.out[1] // self.tile[1])

    def _blocks(self, image: Any, tiles: list[Any], blocks: tuple[Any, Any], chunk: Any) -> None:
        """All channel blocks of the task; `tiles`: down and along, each one tile or a pair (begin, end)."""
        t, width = self.tasks, self.blocks[0][1]
        with loops(blocks) as (block,):
            first = T.bind(T.min(block * width, max(self.g.channels - width, 0)))
            self._strip(image, tiles, first, T.bind(block * self.lanes(width)), width)
        if len(self.blocks) > t.blocks:
            with T.If(chunk == t.channel_chunks - 1), T.Then():
                packed = t.blocks * self.lanes(width)
                for channel, narrow in self.blocks[t.blocks :]:
                    self._strip(image, tiles, T.int32(channel), T.int32(packed), narrow)
                    packed += self.lanes(narrow)

    def _strip(self, image: Any, tiles: list[Any], channel: Any, packed: Any, width: int) -> None:
        """Some tiles of a block; the last one down and along is moved back to end with the image."""
        g, x = self.g, self.op.tensors[0]
        height, columns = self.tile
        with loops(*[t for t in tiles if isinstance(t, tuple)]) as index:
            row, column = [*tiles[: 2 - len(index)], *index]
            oh, ow = T.bind(T.min(row * height, g.out[0] - height)), T.bind(T.min(column * columns, g.out[1] - columns))
            source = T.bind(x.index(image, oh * g.strides[0] - g.padding[0], ow * g.strides[1] - g.padding[1], channel))
            self.step(source, (image, oh, ow, channel), packed, width)

    def pixel(self, source: Any, row: int, column: int, width: int) -> Any:
        """`width` channels of the input pixel at (row, column) from `source`."""
        x = self.op.tensors[0]
        return load(self.k.inputs[0], source + (row * x.rows[1] + column) * x.channel_pitch, width)

    def place(self, layout: Layout, at: tuple[Any, Any, Any, Any]) -> Callable[[int], Any]:
        """Index in `layout` (of the output's shape) of output number `o` of the tile at `at`."""
        base = T.bind(layout.index(*at))
        return lambda o: base + (o // self.tile[1] * layout.rows[1] + o % self.tile[1]) * layout.channel_pitch

    def save(self, index: Any, first: int, value: Any, width: int) -> None:
        """Store channels [first, first + width) of the block of one output at `index`: of the only block of few channels, those that exist."""
        count = min(width, max(self.g.channels - first, 0)) if len(self.blocks) == 1 else width
        if count == width:
            save(self.k.output, index + first, value, width)
        elif count:
            whole = T.alloc_buffer((width,), self.op.output.dtype)
            save(whole, 0, value, width)
            with T.serial(0, count) as c:
                T.buffer_store(self.k.output, whole[c], [index + first + c])


def _part(index: Any, parts: int, extent: int) -> tuple[Any, Any]:
    """[begin, end) of part `index` of `extent` items; sizes differ by at most one, and a last part is never smaller than another."""
    if parts == 1:
        return 0, extent
    return T.bind(T.floordiv(index * extent, parts)), T.bind(T.floordiv((index + 1) * extent, parts))
