"""The two forms of Winograd's 3x3 convolution that are exact in integers: their transforms, along one axis, and what keeps them exact.

    y = A^T [ (G g G^T) * (B^T d B) ] A          (Lavin and Gray 2015, arXiv:1509.09308, section 4)

Each matrix is also a function of the values along one axis, with fewer operations; the other axis follows in the same way. Rows of G are scaled
to integers, and A^T takes the scale back but for a common factor. Bounds hold for all weights in [-127, 127], so that bias correction and rounding may
replace them.

**F(2x2, 3x3)**, 16 multiplications instead of 36. G holds halves; 2 G is used, so every sum is four times the convolution's, and one shift gives it back.
For stored bytes in 0..255 |B^T d B| <= 4 * 255 and |(2 G) g (2 G)^T| <= 9 * 127 fit int16; a sum over C channels, and each partial sum of A^T m A in
the order used here, stays below 2 * C * 4 * 255 * 9 * 127 < 2^31.

**F(4x4, 3x3)**, 36 multiplications instead of 144. With the rows of G times (24, -6, -6, 24, 24, 3) every sum is 24^2 times the convolution's. It does
not fit 32 bits, and need not: 24^2 = 9 * 2^6, all sums are modulo 2^32, and times the inverse of 9 they are 2^6 y, which an arithmetic shift makes y
wherever |y| < 2^25. With bytes taken as -128..127, |y| <= C * 9 * 128 * 127 keeps below that; |B^T d B| <= 100 * 128 and |G' g G'^T| <= 49 * 127 fit
int16, so VPMADDWD is exact. Sums that wrap around are LLVM's vp.add and vp.sub: TVM promises of its own that they don't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.isa import call, scalar

Line = Sequence[Any]
Matrix = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Form:
    """outputs, inputs: of a tile along one axis. matrices: (B^T, G', A'^T), which `input`, `weight` and `output` multiply a line of values by. offset: taken
    from stored bytes first. channels: up to so many input channels it is exact. operations: instructions, or the time of so many, of the transforms of (a
    vector of patches, of weights, of outputs). add: of two products' sums. finish: takes the scale back.
    """

    outputs: int
    inputs: int
    matrices: tuple[Matrix, Matrix, Matrix]
    offset: int
    channels: int
    operations: tuple[int, int, int]
    input: Callable[[Line], list[Any]]
    weight: Callable[[Line], list[Any]]
    output: Callable[[Line], list[Any]]
    finish: Callable[[Any], Any]
    add: Callable[[Any, Any], Any]


def both_ways(transform: Callable[[Line], list[Any]], tile: Sequence[Line]) -> list[list[Any]]:
    """matrix * tile * matrix^T, for `transform` of one line."""
    columns = [[T.bind(v) for v in transform(column)] for column in zip(*tile, strict=True)]
    return [[T.bind(v) for v in transform(line)] for line in zip(*columns, strict=True)]


def shift_left(value: Any, bits: int) -> Any:
    """Wraps around."""
    element, _, lanes = str(value.ty.dtype).partition("x")
    return T.shift_left(value, scalar(bits, element, int(lanes)))


def _lanes(value: Any) -> int:
    return int(str(value.ty.dtype).partition("x")[2])


def _wrapping(name: str, a: Any, b: Any) -> Any:
    lanes = _lanes(a)
    return call(f"int32x{lanes}", f"llvm.vp.{name}", a, b, scalar(True, "bool", lanes), tirx.const(lanes, "int32"))


def add(a: Any, b: Any) -> Any:
    """a + b modulo 2^32."""
    return _wrapping("add", a, b)


def sub(a: Any, b: Any) -> Any:
    """a - b modulo 2^32."""
    return _wrapping("sub", a, b)


# -- F(2x2, 3x3) ----------------------------------------------------------------------------------------------------------------------------


def _input2(d: Line) -> list[Any]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _weight2(g: Line) -> list[Any]:
    ends = T.bind(g[0] + g[2])
    return [g[0] + g[0], ends + g[1], ends - g[1], g[2] + g[2]]


def _output2(m: Line) -> list[Any]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _finish2(value: Any) -> Any:
    return T.shift_right(value, scalar(2, "int32", _lanes(value)))


# -- F(4x4, 3x3) ----------------------------------------------------------------------------------------------------------------------------

INVERSE_OF_9 = 954437177  # 9 * 954437177 = 1 modulo 2^32


def _input4(d: Line) -> list[Any]:
    e, f = T.bind(d[4] - d[2]), T.bind(shift_left(d[3] - d[1], 1))
    a, b = T.bind(d[4] - shift_left(d[2], 2)), T.bind(d[3] - shift_left(d[1], 2))
    return [shift_left(d[0] - d[2], 2) + e, a + b, a - b, e + f, e - f, d[5] - d[3] - shift_left(f, 1)]


def _weight4(g: Line) -> list[Any]:
    ends, far, middle = T.bind(g[0] + g[2]), T.bind(g[0] + shift_left(g[2], 2)), T.bind(g[1] + g[1])
    return [shift_left(g[0], 2) + (g[0] + g[0]), ends + g[1], ends - g[1], far + middle, far - middle, g[2] + (g[2] + g[2])]


def _output4(m: Line) -> list[Any]:
    p, q = T.bind(shift_left(add(m[1], m[2]), 2)), T.bind(shift_left(sub(m[1], m[2]), 2))
    r, s = T.bind(add(m[3], m[4])), T.bind(sub(m[3], m[4]))
    return [add(sub(m[0], p), r), sub(shift_left(s, 1), q), sub(shift_left(r, 2), p), sub(shift_left(add(s, m[5]), 3), q)]


def _finish4(value: Any) -> Any:
    lanes = _lanes(value)
    return T.shift_right(_wrapping("mul", value, scalar(INVERSE_OF_9, "int32", lanes)), scalar(6, "int32", lanes))


def _plain(a: Any, b: Any) -> Any:
    return a + b


_MATRICES2: tuple[Matrix, Matrix, Matrix] = (
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((2, 0, 0), (1, 1, 1), (1, -1, 1), (0, 0, 2)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
_MATRICES4: tuple[Matrix, Matrix, Matrix] = (
    ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)),
    ((6, 0, 0), (1, 1, 1), (1, -1, 1), (1, 2, 4), (1, -2, 4), (0, 0, 3)),
    ((1, -4, -4, 1, 1, 0), (0, -4, 4, 2, -2, 0), (0, -4, -4, 4, 4, 0), (0, -4, 4, 8, -8, 8)),
)
FORMS = {
    2: Form(2, 4, _MATRICES2, 0, 900, (64, 120, 90), _input2, _weight2, _output2, _finish2, _plain),
    4: Form(4, 6, _MATRICES4, 128, (2**25 - 1) // (9 * 128 * 127), (330, 310, 330), _input4, _weight4, _output4, _finish4, add),
}
"""By outputs along one axis."""
