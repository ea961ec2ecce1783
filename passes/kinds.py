"""The kinds of groups and what is true of each: the one table that passes, plans, refinements and exporters ask.

A new operator is a row here. Code that treats one kind unlike all others (its realization, its geometry) lies with that kind and names it; a list of kinds
that have something in common is a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of group.

    name: as `Group.kind` has it. relax: the Relax operators that a group of this kind starts from. operator: the integer operator that computes it; None
        where there is none.
    weighted: a convolution or dense layer: int8 weights with a scale per output channel, int32 bias. window: its weights are a kernel that slides over an
        image. scatters: each input is spread over several outputs, instead of each output gathered from several inputs.
    elementwise: of two operands that broadcast, one of which may be a constant. sums: brings both operands to one unit by integer factors.
    accumulates: can hand out float32 straight from its int32 accumulator. bound: the greatest accumulator for operands of given shapes, (first operand,
        result) -> int, for kinds without weights whose sums are long.
    clamped: takes in the clamps behind it. residual: takes in one addition of a tensor behind it.
    moves: moves data, whatever its type. views: moves nothing at all: the same bytes under another shape. pads: puts the constant `attrs["value"]` among
        the values. joins: several operands, those of other parameters through a table. keeps: the result has its operands' quantization.
    light: computed in float where its operands are float anyway.
    per_channel: (attributes, shapes of the operands, shape of the result) -> is each channel of the result made from that channel of the operands, whatever
        positive factor the channel has? None: never.
    row_by_row: (attributes, rank of the result, number of leading axes) -> is each row of the result, an index of the leading axes, made of that row of the
        operands that have it? None: never, or as the kind itself says (attention).
    alone: one operator by itself, with constants of its own (`alone.py`).
    edge: a rounding to 8 bits, or its end, in a QDQ module: a border between groups.
    normalizes: divides each row by its own spread, so that what is added up before it may lie far apart.
    recurs: a recurrent layer, whose products read all 16 bits of its states where its result has them.
    restates: the same numbers with other scales, which float readers take unrounded.
    reads_wide, writes_wide: its operands, its result may be stored in 16 bits (docs/numerics.md, section 8). wants_wide: its operands shall be.
    float_kernel: has a float kernel of ours, `qc.f32.<name>`, that takes in the whole group.
    """

    name: str
    relax: tuple[str, ...] = ()
    operator: str | None = None
    weighted: bool = False
    window: bool = False
    scatters: bool = False
    elementwise: bool = False
    sums: bool = False
    accumulates: bool = False
    bound: Callable[[Shape, Shape], int] | None = None
    clamped: bool = False
    residual: bool = False
    moves: bool = False
    views: bool = False
    pads: bool = False
    joins: bool = False
    keeps: bool = False
    light: bool = False
    per_channel: Callable[[Mapping[str, Any], Sequence[Shape], Shape], bool] | None = None
    row_by_row: Callable[[Mapping[str, Any], int, int], bool] | None = None
    alone: bool = False
    edge: bool = False
    normalizes: bool = False
    recurs: bool = False
    restates: bool = False
    reads_wide: bool = False
    writes_wide: bool = False
    wants_wide: bool = False
    float_kernel: bool = False

    def __post_init__(self) -> None:
        assert not (self.window or self.scatters or self.residual or self.float_kernel) or self.weighted, self
        assert not (self.views or self.pads or self.joins) or self.moves, self
        assert not self.moves or self.keeps, self
        assert not (self.sums and not self.elementwise), self
        assert self.reads_wide or not self.wants_wide, self
        assert not self.moves or (self.reads_wide and self.writes_wide), self

    @property
    def gathers(self) -> bool:
        """Is each output a sum of weighted inputs, so that factors and means of the input's channels carry over to the weights?"""
        return self.weighted and not self.scatters


def _product(x: Shape, y: Shape) -> int:
    """255 * 255 for each of the K products of a sum."""
    return 255 * 255 * x[-1]


def _total(x: Shape, y: Shape) -> int:
    """255 for each element that a sum takes in."""
    return 255 * math.prod(x) // max(math.prod(y), 1)


def _channels(attrs: Mapping[str, Any], xs: Sequence[Shape], y: Shape) -> bool:
    """The last axis is the same, as long as nothing else is said."""
    return all(x[-1:] == y[-1:] for x in xs)


def _shapes(attrs: Mapping[str, Any], xs: Sequence[Shape], y: Shape) -> bool:
    return all(x == y for x in xs)


def _mean(attrs: Mapping[str, Any], xs: Sequence[Shape], y: Shape) -> bool:
    return len(xs[0]) - 1 not in attrs["axes"]


def _transpose(attrs: Mapping[str, Any], xs: Sequence[Shape], y: Shape) -> bool:
    return bool(attrs["axes"][-1] == len(y) - 1)


def _slice(attrs: Mapping[str, Any], xs: Sequence[Shape], y: Shape) -> bool:
    return attrs["strides"][-1] == 1 and _channels(attrs, xs, y)


def _selected(attrs: Mapping[str, Any], xs: Sequence[Shape], y: Shape) -> bool:
    return not attrs["indices"][-1]


def _any_rows(attrs: Mapping[str, Any], rank: int, axes: int) -> bool:
    return True


def _last_axis(attrs: Mapping[str, Any], rank: int, axes: int) -> bool:
    return bool(attrs.get("axis", rank - 1) % rank >= axes)


def _averaged_rows(attrs: Mapping[str, Any], rank: int, axes: int) -> bool:
    return all(axis >= axes for axis in attrs["axes"])


def _moved_rows(attrs: Mapping[str, Any], rank: int, axes: int) -> bool:
    return list(attrs["axes"][:axes]) == list(range(axes))


def _selected_rows(attrs: Mapping[str, Any], rank: int, axes: int) -> bool:
    return not any(attrs["indices"][:axes])


_RESHAPES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")
_MEANS = ("relax.mean", "relax.nn.adaptive_avg_pool2d")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "conv2d",
            ("relax.nn.conv2d",),
            "qc.conv2d",
            weighted=True,
            window=True,
            accumulates=True,
            clamped=True,
            residual=True,
            float_kernel=True,
            writes_wide=True,
        ),
        Kind(
            "conv2d_transpose",
            ("relax.nn.conv2d_transpose",),
            "qc.conv2d_transpose",
            weighted=True,
            window=True,
            scatters=True,
            accumulates=True,
            clamped=True,
            float_kernel=True,
        ),
        Kind(
            "dense",
            ("relax.matmul",),
            "qc.dense",
            weighted=True,
            accumulates=True,
            clamped=True,
            residual=True,
            float_kernel=True,
            writes_wide=True,
            row_by_row=_last_axis,
        ),
        Kind("matmul", ("relax.matmul",), "qc.matmul", accumulates=True, bound=_product, clamped=True, writes_wide=True),
        Kind(
            "add",
            ("relax.add",),
            "qc.add",
            elementwise=True,
            sums=True,
            clamped=True,
            light=True,
            per_channel=_shapes,
            reads_wide=True,
            writes_wide=True,
            row_by_row=_any_rows,
        ),
        Kind(
            "sub", ("relax.subtract",), "qc.add", elementwise=True, sums=True, clamped=True, light=True, reads_wide=True, writes_wide=True, row_by_row=_any_rows
        ),
        Kind("mul", ("relax.multiply",), "qc.mul", elementwise=True, clamped=True, light=True, reads_wide=True, writes_wide=True, row_by_row=_any_rows),
        Kind("rescale", (), "qc.requantize", light=True, restates=True, reads_wide=True, writes_wide=True, row_by_row=_any_rows),
        Kind("unary", (), "qc.lut", light=True, reads_wide=True, row_by_row=_any_rows),
        Kind("prelu", ("relax.nn.prelu",), "qc.prelu", clamped=True, light=True, per_channel=_channels, row_by_row=_any_rows),
        Kind("max_pool2d", ("relax.nn.max_pool2d",), "qc.max_pool2d", keeps=True, per_channel=_channels),
        Kind("avg_pool2d", ("relax.nn.avg_pool2d",), "qc.avg_pool2d", clamped=True, per_channel=_channels),
        Kind("mean", _MEANS, "qc.mean", bound=_total, clamped=True, per_channel=_mean, reads_wide=True, writes_wide=True, row_by_row=_averaged_rows),
        Kind("resize2d", ("relax.image.resize2d",), "qc.resize2d", keeps=True),
        Kind("concat", ("relax.concat",), "qc.concat", moves=True, joins=True, keeps=True, reads_wide=True, writes_wide=True, row_by_row=_last_axis),
        Kind(
            "reshape",
            _RESHAPES,
            "qc.reshape",
            moves=True,
            views=True,
            keeps=True,
            per_channel=_channels,
            reads_wide=True,
            writes_wide=True,
            row_by_row=_any_rows,
        ),
        Kind(
            "transpose",
            ("relax.permute_dims",),
            "qc.transpose",
            moves=True,
            keeps=True,
            per_channel=_transpose,
            reads_wide=True,
            writes_wide=True,
            row_by_row=_moved_rows,
        ),
        Kind(
            "slice",
            ("relax.strided_slice", "relax.split"),
            "qc.slice",
            moves=True,
            keeps=True,
            per_channel=_slice,
            reads_wide=True,
            writes_wide=True,
            row_by_row=_any_rows,
        ),
        Kind("pad", ("relax.nn.pad",), "qc.pad", moves=True, pads=True, keeps=True, reads_wide=True, writes_wide=True, row_by_row=_any_rows),
        Kind(
            "select",
            ("relax.flip", "relax.broadcast_to"),
            "qc.select",
            moves=True,
            keeps=True,
            per_channel=_selected,
            reads_wide=True,
            writes_wide=True,
            row_by_row=_selected_rows,
        ),
        Kind("attention", ("relax.nn.attention", "relax.nn.attention_bias"), "qc.attention", alone=True, writes_wide=True),
        Kind("layer_norm", ("relax.nn.layer_norm",), "qc.layer_norm", alone=True, normalizes=True, reads_wide=True, writes_wide=True, row_by_row=_last_axis),
        Kind("rms_norm", ("relax.nn.rms_norm",), "qc.rms_norm", alone=True, normalizes=True, reads_wide=True, writes_wide=True, row_by_row=_last_axis),
        Kind("softmax", ("relax.nn.softmax",), "qc.softmax", light=True, alone=True, reads_wide=True, writes_wide=True, row_by_row=_last_axis),
        Kind("take", ("relax.take",), "qc.gather", alone=True, writes_wide=True, row_by_row=_any_rows),
        Kind("recurrence", (), "qc.recurrence", accumulates=True, reads_wide=True, writes_wide=True, wants_wide=True, recurs=True),
        Kind("quantize", ("relax.quantize",), edge=True),
        Kind("dequantize", ("relax.dequantize",), edge=True),
        Kind("float"),
    )
}
