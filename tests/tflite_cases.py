"""A network a kind of operator: each case adds operators to a network and returns its results; `x` is an image [1, 6, 6, 4].

The same cases serve float networks and quantized ones, where `net` gives every result its scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tflite_nets import TfliteNet

IMAGE = (1, 6, 6, 4)
Case = Callable[[TfliteNet, int], int | list[int]]
RELU, RELU_N1, RELU6 = 1, 2, 3
SAME, VALID = 0, 1


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def weights(net: TfliteNet, *shape: int, axis: int = 0, seed: int = 0) -> tuple[int, np.ndarray]:
    """Weights of a product, and the scales of their channels (of a float network none)."""
    if net.quantized is None:
        return net.const(rng(seed).standard_normal(shape).astype(np.float32) * 0.3), np.zeros(0)
    scales = rng(seed).uniform(0.002, 0.01, shape[axis]).astype(np.float32)
    if net.dtype == "uint8":
        scales = scales[:1]
        return net.const(rng(seed).integers(1, 255, shape).astype(np.uint8), (scales, 128)), np.repeat(scales, shape[axis])
    return net.const(rng(seed).integers(-127, 128, shape).astype(np.int8), (scales, 0), axis), scales


def bias(net: TfliteNet, count: int, scales: np.ndarray, seed: int = 1) -> int:
    if net.quantized is None:
        return net.const(rng(seed).standard_normal(count).astype(np.float32))
    unit = np.float32(net.quantized[0]) * scales[: 1 if net.dtype == "uint8" else count]
    kind: Any = np.int64 if net.dtype == "int16" else np.int32
    return net.const((rng(seed).standard_normal(count) / unit).astype(kind), (unit, 0))


def conv(net: TfliteNet, x: int, *, padding: int, stride: int = 1, dilation: int = 1, activation: int = 0, groups: int = 1) -> int:
    w, scales = weights(net, 16, 3, 3, 4 // groups)
    size = 3 if stride == 2 and padding == SAME else 6 if padding == SAME else 6 - 2 * dilation
    options = {"padding": padding, "strideH": stride, "strideW": stride, "dilationHFactor": dilation, "dilationWFactor": dilation}
    return net.op("CONV_2D", [x, w, bias(net, 16, scales)], (1, size, size, 16), kind="Conv2DOptions", version=3, fusedActivationFunction=activation, **options)


def depthwise(net: TfliteNet, x: int, *, padding: int, stride: int, multiplier: int) -> int:
    w, scales = weights(net, 1, 3, 3, 4 * multiplier, axis=3)
    size = 6 if padding == SAME and stride == 1 else 3 if padding == SAME else 4
    options = {"padding": padding, "strideH": stride, "strideW": stride, "depthMultiplier": multiplier, "fusedActivationFunction": RELU6}
    shape = (1, size, size, 4 * multiplier)
    return net.op("DEPTHWISE_CONV_2D", [x, w, bias(net, 4 * multiplier, scales)], shape, kind="DepthwiseConv2DOptions", version=3, **options)


def transposed(net: TfliteNet, x: int, *, padding: int, stride: int, kernel: int, size: int) -> int:
    w, scales = weights(net, 5, kernel, kernel, 4)
    operands = [net.const(ints(1, size, size, 5)), w, x, bias(net, 5, scales)]
    return net.op("TRANSPOSE_CONV", operands, (1, size, size, 5), kind="TransposeConvOptions", version=3, padding=padding, strideH=stride, strideW=stride)


def dense(net: TfliteNet, x: int, *, keep: bool) -> int:
    k = 4 if keep else 144
    w, scales = weights(net, 7, k)
    shape = (1, 6, 6, 7) if keep else (1, 7)
    return net.op("FULLY_CONNECTED", [x, w, bias(net, 7, scales)], shape, kind="FullyConnectedOptions", version=4, keepNumDims=keep)


def pool(name: str) -> Case:
    options = {"padding": SAME, "strideH": 2, "strideW": 2, "filterHeight": 3, "filterWidth": 3}
    return lambda net, x: net.op(name, [x], (1, 3, 3, 4), kind="Pool2DOptions", version=2, **options)


def resized(name: str, corners: bool, centers: bool, size: int = 9) -> Case:
    kind = "ResizeBilinearOptions" if "BILINEAR" in name else "ResizeNearestNeighborOptions"
    return lambda net, x: net.op(
        name, [x, net.const(ints(size, size))], (1, size, size, 4), kind=kind, version=3, alignCorners=corners, halfPixelCenters=centers
    )


def unary(name: str, kind: str = "", version: int = 1, **options: Any) -> Case:
    return lambda net, x: net.op(name, [x], IMAGE, kind=kind, version=version, **options)


def second(net: TfliteNet, *shape: int, seed: int = 5, like: bool = False) -> int:
    """Another operand: a constant as the network holds such; like: in the network's own quantization."""
    if net.quantized is None:
        return net.const(rng(seed).standard_normal(shape).astype(np.float32))
    limits = np.iinfo(net.dtype)
    return net.const(
        rng(seed).integers(limits.min, limits.max + 1, shape).astype(net.dtype), net.quantized if like else (0.02, 0 if net.dtype != "uint8" else 128)
    )


def binary(name: str, kind: str, *shape: int, **options: Any) -> Case:
    return lambda net, x: net.op(name, [x, second(net, *shape)], IMAGE, kind=kind, version=2, **options)


def extremum(name: str, *shape: int) -> Case:
    """LiteRT compares integers, which must have one scale for that."""
    return lambda net, x: net.op(name, [x, second(net, *shape, like=True)], IMAGE, kind="MaximumMinimumOptions", version=2)


def reduced(name: str, keep: bool, *axes: int) -> Case:
    kept = [d for i, d in enumerate(IMAGE) if i not in axes] if not keep else [1 if i in axes else d for i, d in enumerate(IMAGE)]
    return lambda net, x: net.op(name, [x, net.const(ints(*axes))], kept, kind="ReducerOptions", version=2, keepDims=keep)


def pieces(net: TfliteNet, x: int) -> list[int]:
    first, middle = net.op("SPLIT", [net.const(ints(-1).reshape(())), x], *[(1, 6, 6, 2)] * 2, kind="SplitOptions", version=2, numSplits=2)
    (a, b) = net.op(
        "SPLIT_V", [first, net.const(ints(2, -1)), net.const(ints(1).reshape(()))], (1, 2, 6, 2), (1, 4, 6, 2), kind="SplitVOptions", version=2, numSplits=2
    )
    joined = net.op("CONCATENATION", [a, b, middle], (1, 12, 6, 2), kind="ConcatenationOptions", version=2, axis=1)
    return [a, joined]


def stacked(net: TfliteNet, x: int) -> list[int]:
    rows = net.op("UNPACK", [x], *[(1, 6, 4)] * 6, kind="UnpackOptions", version=2, axis=2, num=6)
    return [net.op("PACK", rows[:3], (1, 6, 4, 3), kind="PackOptions", version=2, axis=-1, valuesCount=3)]


def sliced(net: TfliteNet, x: int) -> list[int]:
    a = net.op("SLICE", [x, net.const(ints(0, 1, 2, 0)), net.const(ints(1, -1, 3, 4))], (1, 5, 3, 4), kind="SliceOptions", version=2)
    operands = [x, *(net.const(ints(*n)) for n in ((0, 5, -1, 1), (1, 0, 9, 9), (1, -2, 1, 2)))]
    masks = {"beginMask": 1, "endMask": 2, "shrinkAxisMask": 4}
    return [a, net.op("STRIDED_SLICE", operands, (1, 3, 2), kind="StridedSliceOptions", version=2, **masks)]


def shaped(net: TfliteNet, x: int) -> list[int]:
    flat = net.op("RESHAPE", [x, net.const(ints(1, -1))], (1, 144), kind="ReshapeOptions")
    wide = net.op("EXPAND_DIMS", [x, net.const(ints(1))], (1, 1, 6, 6, 4), kind="ExpandDimsOptions")
    turned = net.op("TRANSPOSE", [x, net.const(ints(0, 3, 1, 2))], (1, 4, 6, 6), kind="TransposeOptions", version=2)
    return [flat, net.op("SQUEEZE", [wide], IMAGE, kind="SqueezeOptions", squeezeDims=[1]), turned]


def padded(net: TfliteNet, x: int) -> list[int]:
    around = net.const(ints(0, 0, 1, 2, 0, 1, 0, 0).reshape(4, 2))
    return [
        net.op("PAD", [x, around], (1, 9, 7, 4), kind="PadOptions", version=2),
        net.op("MIRROR_PAD", [x, around], (1, 9, 7, 4), kind="MirrorPadOptions", version=2, mode=0),
    ]


def in_blocks(net: TfliteNet, x: int) -> int:
    """A dilated convolution as old converters wrote it."""
    block, ends = net.const(ints(2, 2)), net.const(ints(0, 0, 2, 0).reshape(2, 2))
    apart = net.op("SPACE_TO_BATCH_ND", [x, block, ends], (4, 3, 4, 4), kind="SpaceToBatchNDOptions", version=2)
    return net.op("BATCH_TO_SPACE_ND", [apart, block, ends], IMAGE, kind="BatchToSpaceNDOptions", version=2)


def gathered(net: TfliteNet, x: int) -> int:
    return net.op("GATHER", [x, net.const(ints(3, 0, 3))], (1, 3, 6, 4), kind="GatherOptions", version=2, axis=1)


def tiled(net: TfliteNet, x: int) -> int:
    return net.op("TILE", [x, net.const(ints(1, 2, 1, 1))], (1, 12, 6, 4), kind="TileOptions", version=2)


def products(net: TfliteNet, x: int) -> int:
    return net.op("BATCH_MATMUL", [x, second(net, 1, 6, 3, 4)], (1, 6, 6, 3), kind="BatchMatMulOptions", version=4, adjX=False, adjY=True)


BOTH: dict[str, Case] = {
    "conv same": lambda net, x: conv(net, x, padding=SAME, stride=2, activation=RELU6),
    "conv valid dilated": lambda net, x: conv(net, x, padding=VALID, dilation=2, activation=RELU),
    "depthwise": lambda net, x: depthwise(net, x, padding=SAME, stride=1, multiplier=1),
    "depthwise multiplied": lambda net, x: depthwise(net, x, padding=VALID, stride=1, multiplier=2),
    "transposed same": lambda net, x: transposed(net, x, padding=SAME, stride=2, kernel=3, size=12),
    "transposed valid": lambda net, x: transposed(net, x, padding=VALID, stride=2, kernel=3, size=13),
    "dense flattened": lambda net, x: dense(net, x, keep=False),
    "dense rows": lambda net, x: dense(net, x, keep=True),
    "max pool": pool("MAX_POOL_2D"), "average pool": pool("AVERAGE_POOL_2D"),
    "bilinear": resized("RESIZE_BILINEAR", False, False), "bilinear corners": resized("RESIZE_BILINEAR", True, False),
    "bilinear centers": resized("RESIZE_BILINEAR", False, True), "nearest": resized("RESIZE_NEAREST_NEIGHBOR", False, False),
    "nearest corners": resized("RESIZE_NEAREST_NEIGHBOR", True, False), "nearest centers": resized("RESIZE_NEAREST_NEIGHBOR", False, True, 15),
    "add": binary("ADD", "AddOptions", *IMAGE, fusedActivationFunction=RELU), "add row": binary("ADD", "AddOptions", 4),
    "sub": binary("SUB", "SubOptions", *IMAGE, fusedActivationFunction=RELU_N1), "mul": binary("MUL", "MulOptions", 1, 1, 1, 4),
    "maximum": extremum("MAXIMUM", *IMAGE), "minimum": extremum("MINIMUM", 4),
    "prelu": lambda net, x: net.op("PRELU", [x, second(net, 1, 1, 4)], IMAGE), "relu": unary("RELU", version=2), "relu6": unary("RELU6", version=2),
    "leaky": unary("LEAKY_RELU", "LeakyReluOptions", 2, alpha=0.2), "hard swish": unary("HARD_SWISH"), "mean": reduced("MEAN", True, 1, 2),
    "mean without axes": reduced("MEAN", False, 1, 2), "largest": reduced("REDUCE_MAX", True, 2),
    "pieces": pieces, "stacked": stacked, "sliced": sliced, "shaped": shaped, "padded": padded, "blocks": in_blocks, "gathered": gathered, "tiled": tiled,
    "depth to space": lambda net, x: net.op("DEPTH_TO_SPACE", [x], (1, 12, 12, 1), kind="DepthToSpaceOptions", blockSize=2),
    "space to depth": lambda net, x: net.op("SPACE_TO_DEPTH", [x], (1, 3, 3, 16), kind="SpaceToDepthOptions", version=2, blockSize=2),
    "products": products,
}  # fmt: skip
"""Operators that LiteRT has for float32 and for int8."""


def logical(net: TfliteNet, x: int) -> list[int]:
    above = net.op("GREATER", [x, second(net, *IMAGE)], IMAGE, dtype="bool", kind="GreaterOptions")
    below = net.op("LOGICAL_NOT", [above], IMAGE, dtype="bool", kind="LogicalNotOptions")
    either = net.op("LOGICAL_OR", [above, below], IMAGE, dtype="bool", kind="LogicalOrOptions")
    return [
        net.op("SELECT_V2", [above, x, second(net, 4)], IMAGE, kind="SelectV2Options"),
        net.op("CAST", [either], IMAGE, kind="CastOptions"),
        net.op("REDUCE_ANY", [above, net.const(ints(3))], (1, 6, 6), dtype="bool", kind="ReducerOptions", keepDims=False),
    ]


def indices(net: TfliteNet, x: int) -> list[int]:
    values, places = net.op("TOPK_V2", [x, net.const(ints(2).reshape(()))], (1, 6, 6, 2), (1, 6, 6, 2), kind="TopKV2Options")
    net.tensors[places].type = 2  # int32
    found = net.op("ARG_MAX", [x, net.const(ints(-1).reshape(()))], (1, 6, 6), dtype="int32", kind="ArgMaxOptions", outputType=2)
    hot = [found, *map(net.const, (ints(4).reshape(()), np.float32(2), np.float32(-1)))]
    return [values, places, net.op("ONE_HOT", hot, (1, 6, 6, 4), kind="OneHotOptions", axis=-1)]


def by_shape(net: TfliteNet, x: int) -> list[int]:
    """What converters write for a batch that was left open: shapes that are computed."""
    shape = net.op("SHAPE", [x], (4,), dtype="int32", kind="ShapeOptions", outType=2)
    first = [shape, *(net.const(ints(n)) for n in (0, 1, 1))]
    batch = net.op("STRIDED_SLICE", first, (), dtype="int32", kind="StridedSliceOptions", shrinkAxisMask=1)
    whole = net.op("PACK", [batch, net.const(ints(144).reshape(()))], (2,), dtype="int32", kind="PackOptions", valuesCount=2)
    return [
        net.op("RESHAPE", [x, whole], (1, 144), kind="ReshapeOptions"),
        net.op("FILL", [whole, net.const(np.float32(3))], (1, 144), kind="FillOptions"),
        net.op("BROADCAST_TO", [x, net.const(ints(2, 6, 6, 4))], (2, 6, 6, 4), kind="BroadcastToOptions", version=2),
    ]


def frames(net: TfliteNet, x: int) -> list[int]:
    """What tf.signal.frame becomes where the batch was left open: bounds, counts and places that are computed; a split of which one part is empty."""
    flat = net.op("RESHAPE", [x, net.const(ints(1, 144))], (1, 144), kind="ReshapeOptions")
    shape = net.op("SHAPE", [flat], (2,), dtype="int32", kind="ShapeOptions", outType=2)
    operands = [shape, net.const(ints(1, 1, 0)), net.const(ints(0).reshape(()))]
    batch, length, _ = net.op("SPLIT_V", operands, (1,), (1,), (0,), dtype="int32", kind="SplitVOptions", version=2, numSplits=3)
    count = net.op("FLOOR_DIV", [length, net.const(ints(25))], (1,), dtype="int32", kind="FloorDivOptions")  # 5
    below = net.op("FLOOR_DIV", [net.op("NEG", [length], (1,), dtype="int32", kind="NegOptions"), net.const(ints(25))], (1,), dtype="int32")  # -6
    ends = net.op("CONCATENATION", [batch, net.op("SUB", [length, net.const(ints(44))], (1,), dtype="int32")], (2,), dtype="int32", kind="ConcatenationOptions")
    cut = [flat, net.const(ints(0, 7)), ends, net.const(ints(1, 1))]
    numbers = [net.const(ints(0).reshape(())), net.op("RESHAPE", [count, net.const(ints())], (), dtype="int32"), net.const(ints(2).reshape(()))]
    places = net.op("RANGE", numbers, (3,), dtype="int32", kind="RangeOptions")
    last = [flat, net.op("CONCATENATION", [batch, below], (2,), dtype="int32", kind="ConcatenationOptions"), ends, net.const(ints(1, 1))]
    return [
        net.op("STRIDED_SLICE", cut, (1, 93), kind="StridedSliceOptions", version=2),
        net.op("STRIDED_SLICE", cut, (1, 100), kind="StridedSliceOptions", version=2, beginMask=2, endMask=1),
        net.op("STRIDED_SLICE", last, (1, 6), kind="StridedSliceOptions", version=2, beginMask=1, endMask=2),
        net.op("GATHER", [flat, places], (1, 3), kind="GatherOptions", axis=1),
    ]


def spectra(net: TfliteNet, x: int) -> list[int]:
    """Complex numbers between a Fourier transform and their parts, moved in every way that is supported."""

    def moved(name: str, of: int, shape: tuple[int, ...], *operands: np.ndarray, **options: Any) -> int:
        result: int = net.op(name, [of, *map(net.const, operands)], shape, dtype="complex64", **options)
        return result

    rows = net.op("EXPAND_DIMS", [net.op("TRANSPOSE", [x, net.const(ints(0, 1, 3, 2))], (1, 6, 4, 6)), net.const(ints(-2))], (1, 6, 4, 1, 6))
    short = net.op("RFFT2D", [rows, net.const(ints(1, 4))], (1, 6, 4, 1, 3), dtype="complex64", kind="Rfft2dOptions")  # two numbers of six are left out
    lines = moved("SQUEEZE", short, (1, 6, 4, 3), kind="SqueezeOptions", squeezeDims=[3])
    filled = net.op("RFFT2D", [x, net.const(ints(8, 4))], (1, 6, 8, 3), dtype="complex64", kind="Rfft2dOptions")  # and two are zeros
    wide = moved("EXPAND_DIMS", filled, (1, 6, 1, 8, 3), ints(-3), kind="ExpandDimsOptions")
    behind = moved("EXPAND_DIMS", filled, (1, 6, 8, 3, 1), ints(4), kind="ExpandDimsOptions")
    return [
        net.op("COMPLEX_ABS", [lines], (1, 6, 4, 3)),
        net.op("REAL", [moved("TRANSPOSE", filled, (1, 3, 6, 8), ints(0, 3, 1, 2), kind="TransposeOptions")], (1, 3, 6, 8)),
        net.op("IMAG", [moved("RESHAPE", wide, (6, 24), ints(6, -1), kind="ReshapeOptions")], (6, 24)),
        net.op("CAST", [behind], (1, 6, 8, 3, 1), kind="CastOptions"),
    ]


def symmetric(net: TfliteNet, x: int) -> int:
    around = net.const(ints(0, 0, 1, 1, 1, 0, 0, 0).reshape(4, 2))
    result: int = net.op("MIRROR_PAD", [x, around], (1, 8, 7, 4), kind="MirrorPadOptions", mode=1)
    return result


_UNARY = {
    "ABS": "AbsOptions", "NEG": "NegOptions", "EXP": "ExpOptions", "SQUARE": "SquareOptions", "SIN": "", "COS": "CosOptions", "FLOOR": "", "CEIL": "",
    "ROUND": "", "SIGN": "SignOptions", "ELU": "", "LOG_SOFTMAX": "LogSoftmaxOptions", "L2_NORMALIZATION": "L2NormOptions", "RELU_N1_TO_1": "",
    "RELU_0_TO_1": "", "LOGISTIC": "", "TANH": "", "ZEROS_LIKE": "ZerosLikeOptions",
}  # fmt: skip
FLOAT: dict[str, Case] = {
    **{name.lower(): unary(name, kind) for name, kind in _UNARY.items()},
    "gelu": unary("GELU", "GeluOptions"), "gelu tanh": unary("GELU", "GeluOptions", approximate=True), "softmax": unary("SOFTMAX", "SoftmaxOptions", beta=1.5),
    "roots": lambda net, x: net.op("RSQRT", [net.op("EXP", [x], IMAGE, kind="ExpOptions")], IMAGE),
    "div": binary("DIV", "DivOptions", 4), "squared difference": binary("SQUARED_DIFFERENCE", "SquaredDifferenceOptions", *IMAGE),
    "floor mod": binary("FLOOR_MOD", "FloorModOptions", *IMAGE), "floor div": binary("FLOOR_DIV", "FloorDivOptions", *IMAGE),
    "symmetric": symmetric,
    "sum": reduced("SUM", False, 3), "product of all": reduced("REDUCE_PROD", False, 1), "least": reduced("REDUCE_MIN", False, 1, 3),
    "running sum": lambda net, x: net.op("CUMSUM", [x, net.const(ints(1).reshape(()))], IMAGE, kind="CumsumOptions", exclusive=True),
    "reverse": lambda net, x: net.op("REVERSE_V2", [x, net.const(ints(1))], IMAGE, kind="ReverseV2Options"),
    "lookup": lambda net, x: net.op("EMBEDDING_LOOKUP", [net.const(ints(2, 0)), second(net, 3, 5)], (2, 5)),
    "picked": lambda net, x: net.op("GATHER_ND", [x, net.const(ints(0, 1, 0, 5).reshape(2, 2))], (2, 6, 4), kind="GatherNdOptions"),
    "grouped": lambda net, x: conv(net, x, padding=SAME, groups=2),
    "logical": logical, "indices": indices, "by shape": by_shape, "frames": frames, "spectra": spectra,
}  # fmt: skip
"""Operators in float32 alone."""
