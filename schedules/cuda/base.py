"""The row type of plain GPU kernels, and how a thread reads adjacent channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import View
from qcompiler.schedules.portable.base import PortableRow
from qcompiler.schedules.portable.threads import alignment, in_words, load_words, unpack, words
from qcompiler.schedules.table import Kernel, OpCall, register

Make = Callable[[OpCall, Target, str], Kernel]


def gpu_row(operator: str, make: Make, check: Callable[[OpCall], str | None] = lambda op: None, row: type[PortableRow] = PortableRow) -> None:
    """Register `make` as the plain GPU row of `operator` ("qc.mean" -> "cuda/mean")."""
    register(operator, row(f"cuda/{operator.removeprefix('qc.')}", make, check, isa="cuda"))


def run_length(*views: View) -> int:
    """Adjacent channels that a thread handles at once: 4 where every view has them in aligned words, else 1."""
    return 4 if all(in_words(v) and v.dtype in ("int8", "uint8") and v.shape[-1] % 4 == 0 for v in views) else 1


class Reader:
    """Reads `run` adjacent elements of an 8-bit view as int32 scalars."""

    def __init__(self, view: View, run: int) -> None:
        self.view, self.run = view, run
        self.memory = words(view.buffer) if run > 1 else view.buffer

    def __call__(self, index: Any) -> list[Any]:
        """The elements at flat index `index`, a multiple of `run`."""
        if self.run == 1:
            return [T.Cast("int32", self.memory[index])]
        loaded = load_words(self.memory, index, self.run // 4, alignment(self.view))
        return [T.Cast("int32", unpack(word, j, self.view.dtype)) for word in loaded for j in range(4)]


def local(elements: int, dtype: str = "int32") -> Any:
    """Registers of a thread: every index must be a constant once loops are unrolled."""
    return T.alloc_buffer((elements,), dtype, scope="local")


def transpose(pixels: list[Any]) -> list[Any]:
    """Four words of 4 channels as four words of 4 pixels."""

    def permute(a: Any, b: Any, selector: int) -> Any:
        return T.bind(T.call_pure_extern("int32", "__byte_perm", a, b, T.int32(selector)))

    a, b, c, d = pixels
    low = permute(a, b, 0x5140), permute(c, d, 0x5140)  # channels 0 and 1 of two pixels
    high = permute(a, b, 0x7362), permute(c, d, 0x7362)
    return [permute(*pair, selector) for pair in (low, high) for selector in (0x5410, 0x7632)]
