"""ONNX operators over images, signals and volumes: convolution, pooling, resizing, normalization. Channels come second, as in ONNX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers.arithmetic import matrix_product
from qcompiler.importers.nodes import Node, Refused, Value, check_bytes, real, window_padding
from qcompiler.importers.resample import Axis, nearest_indices, weights
from qcompiler.passes.graph import const, make_op

LAYOUT = {1: "NCW", 2: "NCHW", 3: "NCDHW"}
_KERNEL = {1: "OIW", 2: "OIHW", 3: "OIDHW"}
_KERNEL_TRANSPOSED = {1: "IOW", 2: "IOHW", 3: "IODHW"}


def _geometry(node: Node, kernel: list[int] | None = None) -> tuple[list[int], list[int], list[int], list[int]]:
    """(spatial sizes, kernel, strides, dilations) of a windowed node."""
    sizes = list(node.shape()[2:])
    rank = len(sizes)
    if rank not in LAYOUT:
        raise Refused(f"input of rank {rank + 2}; supported: ranks 3 to 5")
    kernel = kernel or [int(k) for k in node.attrs.get("kernel_shape", [])]
    strides, dilations = ([int(v) for v in node.attrs.get(name, [1] * rank)] for name in ("strides", "dilations"))
    for name, values in (("kernel_shape", kernel), ("strides", strides), ("dilations", dilations)):
        if len(values) != rank or min(values) < 1:
            raise Refused(f"{name} {values} for {rank} spatial axes; supported: {rank} positive numbers")
    return sizes, kernel, strides, dilations


def _with_bias(node: Node, what: str, product: Any, channels: int) -> Any:
    """`product` plus the bias operand (index 2), along axis 1."""
    if not node.has(2):
        return product
    rank, bias = len(node.shape()), node.inputs[2]
    if isinstance(bias, np.ndarray) and not bias.any():  # of whatever shape: PyTorch's exporter writes [channels, 2] for a Conv3d without a bias
        return product
    if tuple(node.shape(2)) != (channels,):
        raise Refused(f"a bias of shape {list(node.shape(2))} for {channels} output channels")
    shape = [1, channels] + [1] * (rank - 2)
    reshaped = const(real(bias).reshape(shape)) if isinstance(bias, np.ndarray) else node.emit("bias", relax.op.reshape(bias, shape))
    return relax.op.add(node.emit(what, product), reshaped)


def conv(node: Node) -> list[Value]:
    kernel_shape = node.shape(1)
    sizes, kernel, strides, dilations = _geometry(node, [int(d) for d in kernel_shape[2:]])
    groups, rank = int(node.attrs.get("group", 1)), len(sizes)
    if node.shape()[1] != kernel_shape[1] * groups or kernel_shape[0] % groups:
        raise Refused(f"weights of shape {list(kernel_shape)} don't fit an input of shape {list(node.shape())} with {groups} groups")
    begin, end = window_padding(node, sizes, kernel, strides, dilations)
    op = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}[rank]
    product = op(
        node.tensor(0), node.tensor(1), strides=strides, padding=[*begin, *end], dilation=dilations, groups=groups,
        data_layout=LAYOUT[rank], kernel_layout=_KERNEL[rank],
    )  # fmt: skip
    return [_with_bias(node, "conv", product, kernel_shape[0])]


def conv_transpose(node: Node) -> list[Value]:
    """Output size per axis: `(in - 1) * stride + output_padding + (kernel - 1) * dilation + 1 - begin - end`; `output_shape` fixes the padding."""
    kernel_shape = node.shape(1)
    sizes, kernel, strides, dilations = _geometry(node, [int(d) for d in kernel_shape[2:]])
    rank, groups = len(sizes), int(node.attrs.get("group", 1))
    extra = [int(v) for v in node.attrs.get("output_padding", [0] * rank)]
    full = [(n - 1) * s + (k - 1) * d + 1 + e for n, k, s, d, e in zip(sizes, kernel, strides, dilations, extra, strict=True)]
    mode = node.text("auto_pad", "NOTSET") or "NOTSET"
    wanted = node.attrs.get("output_shape")
    if wanted is None and mode.startswith("SAME"):
        wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
    if wanted is None:
        begin, end = window_padding(node, sizes, kernel, strides, dilations)
    else:
        total = [f - int(w) for f, w in zip(full, list(wanted)[-rank:], strict=True)]
        extra = [e + max(-t, 0) for e, t in zip(extra, total, strict=True)]  # a larger output is padded at its end
        small = [max(t, 0) // 2 for t in total]
        large = [max(t, 0) - h for t, h in zip(total, small, strict=True)]
        begin, end = (small, large) if mode == "SAME_UPPER" else (large, small)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise Refused(f"output_padding {extra} reaches beyond strides {strides}")
    op = {1: relax.op.nn.conv1d_transpose, 2: relax.op.nn.conv2d_transpose, 3: relax.op.nn.conv3d_transpose}[rank]
    product = op(
        node.tensor(0), node.tensor(1), strides=strides, padding=[*begin, *end], output_padding=extra, dilation=dilations, groups=groups,
        data_layout=LAYOUT[rank], kernel_layout=_KERNEL_TRANSPOSED[rank],
    )  # fmt: skip
    return [_with_bias(node, "conv", product, kernel_shape[1] * groups)]


def _window(node: Node) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """(kernel, strides, dilations, begin, end, needed) of a pooling node; `needed` is what the last windows need behind each axis, ceil mode included."""
    sizes, kernel, strides, dilations = _geometry(node)
    begin, end = window_padding(node, sizes, kernel, strides, dilations)
    ceil = bool(node.attrs.get("ceil_mode", 0)) and not node.text("auto_pad", "NOTSET").startswith("SAME")
    needed = []
    for n, k, s, d, b, e in zip(sizes, kernel, strides, dilations, begin, end, strict=True):
        span = n + b + e - ((k - 1) * d + 1)
        if span < 0:
            raise Refused(f"a window of {(k - 1) * d + 1} doesn't fit a padded axis of {n + b + e}")
        count = -(-span // s) + 1 if ceil else span // s + 1
        if ceil and (count - 1) * s >= n + b:  # a window may not start in the end padding
            count -= 1
        needed.append(max((count - 1) * s + (k - 1) * d + 1 - n - b, 0))
    return kernel, strides, dilations, begin, end, needed


def average_pool(node: Node) -> list[Value]:
    """Ceil mode and SAME padding become explicit padding: the end of each axis gets what the last window needs, no more."""
    kernel, strides, dilations, begin, end, needed = _window(node)
    rank, include, x = len(kernel), bool(node.attrs.get("count_include_pad", 0)), node.tensor(0)
    if include and any(w > e for w, e in zip(needed, end, strict=True)):  # declared padding counts, padding by ceil does not
        x = node.emit("pad", relax.op.nn.pad(x, _borders(begin, end)))
        begin, needed, include = [0] * rank, [w - e if w > e else 0 for w, e in zip(needed, end, strict=True)], False
    padding = [*begin, *needed]
    op = getattr(relax.op.nn, f"avg_pool{rank}d")
    return [op(x, kernel, strides, padding, dilations, False, include and any(padding), layout=LAYOUT[rank])]


def lp_pool(node: Node) -> list[Value]:
    """`(sum |x|^p)^(1/p)` over each window: the average with all padding counted, times the size of the window."""
    kernel, strides, dilations, begin, _, needed = _window(node)
    p, rank, count = int(node.attrs.get("p", 2)), len(kernel), math.prod(kernel)
    size = node.emit("size", relax.op.abs(node.tensor(0)))
    power = size if p == 1 else node.emit("power", relax.op.square(size) if p == 2 else relax.op.power(size, const(np.float32(p))))
    op = getattr(relax.op.nn, f"avg_pool{rank}d")
    mean = node.emit("mean", op(power, kernel, strides, [*begin, *needed], dilations, False, True, layout=LAYOUT[rank]))
    total = relax.op.multiply(mean, const(np.float32(count)))
    if p == 1:
        return [total]
    total = node.emit("total", total)
    return [relax.op.sqrt(total) if p == 2 else relax.op.power(total, const(np.float32(1 / p)))]


def max_pool(node: Node) -> list[Value]:
    kernel, strides, dilations, begin, _, needed = _window(node)
    rank = len(kernel)
    op = getattr(relax.op.nn, f"max_pool{rank}d")
    pooled = op(node.tensor(0), kernel, strides, [*begin, *needed], dilations, False, False, layout=LAYOUT[rank])
    if not any(node.outputs[1:]):
        return [pooled]
    return [pooled, _places_of_largest(node, kernel, strides, dilations, begin, needed)]


def _places_of_largest(node: Node, kernel: list[int], strides: list[int], dilations: list[int], begin: list[int], end: list[int]) -> Value:
    """int64: where in the whole tensor each window's largest element lies, the first of equal ones."""
    shape, rank = node.shape(), len(kernel)
    padded = [n + b + e for n, b, e in zip(shape[2:], begin, end, strict=True)]
    counts = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(padded, kernel, dilations, strides, strict=True)]
    x = node.tensor(0) if node.dtype() == "float32" else node.emit("float", relax.op.astype(node.tensor(0), "float32"))
    x = node.emit("padded", relax.op.nn.pad(x, _borders(begin, end), "constant", -math.inf)) if any([*begin, *end]) else x
    taps, axes = [], list(range(2, rank + 2))
    for tap in itertools.product(*map(range, kernel)):
        first = [t * d for t, d in zip(tap, dilations, strict=True)]
        last = [f + (c - 1) * s + 1 for f, c, s in zip(first, counts, strides, strict=True)]
        part = node.emit("part", relax.op.strided_slice(x, axes, first, last, strides))
        taps.append(node.emit("tap", relax.op.expand_dims(part, rank + 2)))
    windows = node.emit("windows", relax.op.concat(taps, rank + 2)) if len(taps) > 1 else taps[0]
    form = [*shape[:2], *counts]
    best = node.emit("best", make_op("qc.top_k", [windows], {"axis": rank + 2, "k": 1, "largest": True}, [*form, 1], "int64"))
    order = range(rank) if not node.attrs.get("storage_order", 0) else reversed(range(rank))
    weight, step = [0] * rank, 1
    for axis in reversed(list(order)):
        weight[axis], step = step, step * shape[2 + axis]
    offsets = [sum(t * d * w for t, d, w in zip(tap, dilations, weight, strict=True)) for tap in itertools.product(*map(range, kernel))]
    start = np.arange(shape[0] * shape[1]).reshape(*shape[:2], *[1] * rank) * step
    for axis in range(rank):
        at = (np.arange(counts[axis]) * strides[axis] - begin[axis]) * weight[axis]
        start = start + at.reshape([-1 if i == axis + 2 else 1 for i in range(rank + 2)])
    offset = node.emit("offset", relax.op.take(const(np.asarray(offsets, np.int64)), node.emit("flat", relax.op.reshape(best, form)), 0, mode="clip"))
    return relax.op.add(offset, const(start.astype(np.int64)))


def _borders(begin: list[int], end: list[int]) -> list[int]:
    """Widths for `nn.pad` around the spatial axes."""
    return [0, 0, 0, 0, *[w for pair in zip(begin, end, strict=True) for w in pair]]


def global_pool(reduce: Any) -> Any:
    return lambda node: [reduce(node.tensor(0), list(range(2, len(node.shape()))), True)]


def batch_normalization(node: Node) -> list[Value] | None:
    """`x * (scale / sqrt(var + eps)) + (bias - mean * scale / sqrt(var + eps))`: a multiply and an add of per-channel constants."""
    if int(node.attrs.get("training_mode", 0)) or any(node.outputs[1:]):
        raise Refused("it is in training mode; supported: inference. Export the model with model.eval()")
    if not all(isinstance(v, np.ndarray) for v in node.inputs[1:5]):
        return None
    names = ("scale", "bias", "mean", "variance")
    scale, bias, mean, variance = (np.asarray(node.constant(i, name), np.float64) for i, name in enumerate(names, 1))
    shape = [1, -1] + [1] * (len(node.shape()) - 2)
    factor = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    offset = bias - mean * factor
    scaled = node.emit("scaled", relax.op.multiply(node.tensor(0), const(factor.astype(np.float32).reshape(shape))))
    return [relax.op.add(scaled, const(offset.astype(np.float32).reshape(shape)))]


def group_normalization(node: Node) -> list[Value]:
    """Scale and bias are one per group in operator set 18, one per channel since 21. Raises ValueError for what no definition can mean."""
    shape, groups = node.shape(), int(node.attrs["num_groups"])
    channels = shape[1] if len(shape) > 1 else 0
    if groups < 1 or not channels or channels % groups:
        raise ValueError(f"{channels} channels of a tensor of shape {list(shape)} can't be divided into {groups} groups")
    operands, wanted = [], (groups,) if node.opset < 21 else (channels,)
    for index, what in ((1, "scale"), (2, "bias")):
        if node.shape(index) != wanted:
            raise ValueError(f"its {what} has shape {list(node.shape(index))}; operator set {node.opset} has {wanted[0]} of them for {groups} groups")
        value, repeats = node.inputs[index], channels // wanted[0]
        if isinstance(value, np.ndarray):
            operands.append(const(real(np.repeat(value, repeats))))
        else:
            operands.append(value if repeats == 1 else node.emit(what, relax.op.repeat(value, repeats, 0)))
    return [relax.op.nn.group_norm(node.tensor(0), *operands, groups, 1, list(range(2, len(shape))), float(node.attrs.get("epsilon", 1e-5)))]


def instance_normalization(node: Node) -> list[Value] | None:
    """A group normalization of groups of one channel, where scale and bias are constants."""
    shape = node.shape()
    if len(shape) < 3 or any(not isinstance(v, np.ndarray) or v.shape != shape[1:2] for v in node.inputs[1:]):
        return None
    axes = list(range(2, len(shape)))
    return [relax.op.nn.group_norm(*(node.tensor(i) for i in range(3)), shape[1], 1, axes, float(node.attrs.get("epsilon", 1e-5)))]


def resize(node: Node) -> list[Value]:
    """Resize since 10, and Upsample: `relax.image.resize2d` where that means the same; else gathers (nearest) or products with weight matrices."""
    shape, rank = node.shape(), len(node.shape())
    legacy = node.op == "Upsample" or node.opset < 11
    axes = [node.axis(int(a), rank) for a in node.attrs.get("axes", range(rank))]
    scales, sizes, by_scales = _scaled(node, axes, 1 if legacy else 2)
    check_bytes("its result", sizes)
    coordinates = "asymmetric" if legacy else node.text("coordinate_transformation_mode", "half_pixel")
    mode = node.text("mode", "nearest")
    rounding = "floor" if legacy else node.text("nearest_mode", "round_prefer_floor")
    roi = node.constant(1, "roi") if coordinates == "tf_crop_and_resize" else None
    changed = [a for a in range(rank) if sizes[a] != shape[a] or scales[a] != 1.0 or (roi is not None and a in axes)]
    if not changed:
        return [node.inputs[0]]
    exact = all(sizes[a] == shape[a] * scales[a] or not by_scales for a in changed)
    common_modes = ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
    plain = rank == 4 and set(changed) <= {2, 3} and not node.attrs.get("antialias", 0)
    plain &= coordinates != "align_corners" or 1 not in sizes[2:]  # TVM's steps between corners would be 0 / 0
    if plain and exact and mode in ("nearest", "linear") and coordinates in common_modes and node.dtype() == "float32":
        method = {"nearest": "nearest_neighbor", "linear": "linear"}[mode]
        return [
            relax.op.image.resize2d(
                node.tensor(0),
                relax.ShapeExpr(sizes[2:]),
                layout="NCHW",
                method=method,
                coordinate_transformation_mode=coordinates,
                rounding_method=rounding if mode == "nearest" else "round",
            )
        ]
    x, beyond = node.tensor(0), np.zeros(1, np.bool_)
    for n, a in enumerate(changed):
        bounds = (float(roi[axes.index(a)]), float(roi[len(axes) + axes.index(a)])) if roi is not None else (0.0, 1.0)
        axis = Axis(shape[a], sizes[a], scales[a], coordinates, bounds)
        if mode == "nearest" and roi is None:
            x = relax.op.take(x, const(nearest_indices(axis, rounding)), a, mode="clip")
        elif node.dtype() != "float32":
            raise Refused(f"mode '{mode}' rounds sums of {node.dtype()}, which ONNX leaves open; supported: float32. Cast its input to float32")
        else:
            matrix = weights(
                axis, mode, rounding, bool(node.attrs.get("antialias", 0)), float(node.attrs.get("cubic_coeff_a", -0.75)),
                bool(node.attrs.get("exclude_outside", 0)),
            )  # fmt: skip
            x = _times(node, matrix, x, a, rank)
            beyond = beyond | axis.outside().reshape([-1 if i == a else 1 for i in range(rank)])
        x = x if n == len(changed) - 1 else node.emit(f"axis{a}", x)
    if beyond.any() and coordinates == "tf_crop_and_resize":
        filling = const(np.float32(node.attrs.get("extrapolation_value", 0.0)))
        return [relax.op.where(const(np.broadcast_to(beyond, sizes)), filling, node.emit("inside", x))]
    return [x]


def _scaled(node: Node, axes: Sequence[int], place: int) -> tuple[list[float], list[int], bool]:
    """(scale, size of the result) of every axis, and whether scales were given, as operand `place` or attribute, and not sizes. Raises Refused."""
    shape = node.shape()
    found = node.attrs["scales"] if "scales" in node.attrs else node.constant(place, "scales")
    given = np.asarray(found if found is not None else [], np.float32).astype(np.float64)
    scales, sizes = [1.0] * len(shape), list(shape)
    if not (np.isfinite(given) & (given > 0)).all():
        raise Refused(f"scales {given.tolist()} are not positive finite numbers")
    by_scales = given.size == len(axes)
    if by_scales:
        for a, s in zip(axes, given, strict=True):
            scales[a], sizes[a] = float(s), int(np.floor(shape[a] * s + 1e-9))
    elif (wanted := node.param("sizes", 3)) is not None and len(wanted) == len(axes):
        policy = node.text("keep_aspect_ratio_policy", "stretch")
        ratios = [w / shape[a] for a, w in zip(axes, wanted, strict=True)]
        common = None if policy == "stretch" else (min(ratios) if policy == "not_larger" else max(ratios))
        for a, w, r in zip(axes, wanted, ratios, strict=True):
            sizes[a] = w if common is None else int(np.floor(shape[a] * common + 0.5))
            scales[a] = r if common is None else common
    else:
        raise Refused("neither scales nor sizes fit its axes")
    return scales, sizes, by_scales


def _times(node: Node, matrix: np.ndarray, x: Any, axis: int, rank: int) -> Any:
    """`matrix` [out, in] applied along one axis of x."""
    if axis == rank - 1:
        return relax.op.matmul(x, const(np.ascontiguousarray(matrix.T)))
    if axis == rank - 2:
        return matrix_product(node, const(matrix), x)
    order = [*[i for i in range(rank) if i != axis], axis]
    moved = node.emit("moved", relax.op.permute_dims(x, order))
    product = node.emit("product", relax.op.matmul(moved, const(np.ascontiguousarray(matrix.T))))
    return relax.op.permute_dims(product, list(np.argsort(order)))


def depth_to_space(node: Node) -> list[Value]:
    n, c, h, w = node.shape()
    b = int(node.attrs["blocksize"])
    if node.text("mode", "DCR") == "DCR":
        split, order = (n, b, b, c // (b * b), h, w), [0, 3, 4, 1, 5, 2]
    else:
        split, order = (n, c // (b * b), b, b, h, w), [0, 1, 4, 2, 5, 3]
    x = node.emit("split", relax.op.reshape(node.tensor(0), split))
    return [relax.op.reshape(node.emit("moved", relax.op.permute_dims(x, order)), (n, c // (b * b), h * b, w * b))]


def space_to_depth(node: Node) -> list[Value]:
    n, c, h, w = node.shape()
    b = int(node.attrs["blocksize"])
    order = [0, 3, 5, 1, 2, 4] if node.text("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    x = node.emit("split", relax.op.reshape(node.tensor(0), (n, c, h // b, b, w // b, b)))
    return [relax.op.reshape(node.emit("moved", relax.op.permute_dims(x, order)), (n, c * b * b, h // b, w // b))]
