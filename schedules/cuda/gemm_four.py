"""Convolution and dense layers with 4-bit weights on a GPU: what differs from `gemm.Gemm`.

Weights stay packed on their way through shared memory, in the order in which lanes hold them (`gemm_plan.pack`), so that a lane reads up to 16 adjacent bytes.
A stage has a row of pieces for every 32 channels. In registers a word of 8 weights becomes two words of bytes, each 16 times a weight: a 4-bit number in the
upper half of a byte, in two's complement.

    word & 0xF0F0F0F0   and   (word << 4) & 0xF0F0F0F0

Sums are 16 times what is meant, exactly, and shifted back behind the last step.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.cuda.epilogue import element
from qcompiler.schedules.cuda.gemm import Gemm, div, mod
from qcompiler.schedules.cuda.gemm_plan import PIECE, repeated_byte

UPPER = repeated_byte(-16)


class FourBitGemm(Gemm):
    """One kernel while it is written."""

    def piece_of(self, place: Any) -> tuple[Any, Any, Any]:
        along = T.bind(tirx.truncdiv(place, self.piece_bytes))
        each = self.tile.bk // PIECE
        return div(along, each), mod(along, each), mod(place, self.piece_bytes)

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
        for i in range(int(self.sums.shape[0])):
            T.buffer_store(self.sums, T.shift_right(self.sums[i], T.int32(4)), [i])
        super().add_up()


def unpacked(word: Any) -> tuple[Any, Any]:
    """The bytes of the low halves and of the high ones, 16 times each weight."""
    return tuple(T.bind(T.bitwise_and(value, T.int32(UPPER))) for value in (T.shift_left(word, T.int32(4)), word))
