"""Convolution and dense layers with 4-bit weights on a GPU: what differs from `gemm.Gemm`.

Weights stay packed on their way through shared memory, in the order in which lanes hold them (`gemm_plan.pack`), so that a lane reads up to 16 adjacent bytes.
A stage has a row of pieces for every 32 channels. In registers a word of 8 weights becomes two words of bytes, each 16 times a weight: a 4-bit number in the
upper half of a byte, in two's complement.

    word & 0xF0F0F0F0   and   (word << 4) & 0xF0F0F0F0

Sums are 16 times what is meant, exactly, and shifted back behind the last step.

`wgmma` reads weights from shared memory alone, 8 bits each. So a stage has room for both: each thread unpacks the chunks that it has copied itself, into
where the product reads them, before they are shown to the tensor cores. What lies in memory is the same.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import when
from qcompiler.schedules.cuda.epilogue import element, quad
from qcompiler.schedules.cuda.gemm import Gemm, div, mod
from qcompiler.schedules.cuda.gemm_plan import CHUNK, PIECE, repeated_byte, swizzle
from qcompiler.schedules.cuda.wgmma import AsynchronousGemm

UPPER = repeated_byte(-16)


class FourBitGemm(Gemm):
    """One kernel while it is written."""

    def piece_of(self, place: Any) -> tuple[Any, Any, Any]:
        return packed_piece(self, place)

    def weights_of_warp(self, base: Any) -> Any:
        return base + div(self.warp_n * self.tile.wn, PIECE) * (self.tile.bk // PIECE * self.piece_bytes)

    def load_weights(self, right: Any, b: Any, chunk: Any) -> None:
        width = min(4, self.columns)  # of a piece's 4 parts, a lane's words of which adjoin, a warp may have 2
        first = tirx.truncdiv(b, 4 * width) + T.shift_right(chunk, T.int32(1)) * (128 // width) + self.lane * (4 // width)
        first = first + T.bitwise_and(self.warp_n, T.int32(1)) if width == 2 else first
        for j, word in enumerate(self.read(first, width, [0])):
            for half, value in enumerate(unpacked(word)):
                T.buffer_store(right, value, [2 * j + half])

    def weight_words(self, b: Any, chunk: Any, x: Any) -> list[list[Any]]:
        words = self.read(T.shift_right(b, T.int32(4)) + chunk * 16 + x, 4, [0, 8])  # two parts, of two words each; the other two
        return [[value for word in words[2 * j : 2 * j + 2] for value in unpacked(word)] for j in range(self.columns)]

    def read(self, first: Any, width: int, places: list[int]) -> list[Any]:
        """Words of the weights of this warp, `width` at a time: from number first + place of as many on, for each of the places in every piece."""
        first, piece = T.bind(first), self.tile.bk // PIECE * self.piece_bytes // 4 // width
        starts = [first + (i * piece + place) for i in range(max(1, self.tile.wn // PIECE)) for place in places]
        loaded = [T.bind(self.shared_words[T.ramp(T.bind(start) * width, 1, width)]) for start in starts]
        return [element(vector, i) for vector in loaded for i in range(width)]

    def add_up(self) -> None:
        shift_back(self)
        super().add_up()


class AsynchronousFourBitGemm(AsynchronousGemm):
    """One kernel while it is written. A stage: pixels, weights by 8 bits, weights by 4."""

    def piece_of(self, place: Any) -> tuple[Any, Any, Any]:
        return packed_piece(self, place)

    def copy_weights(self, step: Any, base: Any) -> None:
        super().copy_weights(step, T.bind(base + self.tile.bn * self.tile.bk))

    def prepare(self, stage: Any) -> None:
        """Unpack. No product reads this stage: all warps have waited for those of the step that had it last, before the barrier that this thread has passed."""
        t, size = self.tile, self.tile.weight_bytes(self.unit)
        b = T.bind(stage * self.stage_bytes + t.bm * t.bk)
        for number, (place, *_) in enumerate(self.weights):
            with when(place < size if (number + 1) * t.threads * CHUNK > size else None):
                row, along, inside = self.piece_of(place)
                lane = T.bind(T.shift_right(inside, T.int32(4)))  # that holds the chunk in a product by one warp: 4 parts of 8 channels, a word of each
                channel, quarter = T.bind(T.shift_right(lane, T.int32(2))), T.bitwise_and(lane, T.int32(3))
                first = T.bind(b + (row * PIECE + channel) * t.bk + quarter * 4)
                words = quad(self.shared_words, T.shift_right(b + t.bn * t.bk + place, T.int32(4)))
                for half in (0, 1):
                    chunk = T.bind(T.bitwise_xor(along * 2 + half, swizzle(channel, t.bk // CHUNK)) * CHUNK)
                    for part in range(4):
                        value = unpacked(T.bind(element(words, part)))[half]
                        T.buffer_store(self.shared_words, value, [T.shift_right(first + chunk, T.int32(2)) + part * (8 * t.bk // 4)])

    def add_up(self) -> None:
        super().add_up()
        shift_back(self)


def packed_piece(gemm: Gemm, place: Any) -> tuple[Any, Any, Any]:
    """`Gemm.piece_of` where pieces lie one after the other."""
    along, each = T.bind(tirx.truncdiv(place, gemm.piece_bytes)), gemm.tile.bk // PIECE
    return div(along, each), mod(along, each), mod(place, gemm.piece_bytes)


def shift_back(gemm: Gemm) -> None:
    for i in range(int(gemm.sums.shape[0])):
        T.buffer_store(gemm.sums, T.shift_right(gemm.sums[i], T.int32(4)), [i])


def unpacked(word: Any) -> tuple[Any, Any]:
    """The bytes of the low halves and of the high ones, 16 times each weight."""
    return tuple(T.bind(T.bitwise_and(value, T.int32(UPPER))) for value in (T.shift_left(word, T.int32(4)), word))
