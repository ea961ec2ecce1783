"""TFLite operators with weights or windows: products, convolutions, pools, resizing. TFLite has images as NHWC and filters as OHWI, ONNX as NCHW and OIHW."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from qcompiler.importers.nodes import Refused
from qcompiler.importers.tflite_file import Operator, Tensor
from qcompiler.importers.tflite_graph import TO_NCHW, TO_NHWC, Graph

_PADDING = {0: "SAME_UPPER", 1: "VALID"}


def padding(op: Operator) -> str:
    found = op.option("Padding")
    if found not in _PADDING:
        raise Refused(f"its padding is number {found}; supported: SAME and VALID")
    return _PADDING[found]


def strides(op: Operator) -> list[int]:
    found = [op.option("StrideH", 1), op.option("StrideW", 1)]
    if min(found) < 1:
        raise Refused(f"its strides are {found}; supported: positive numbers")
    return found


def dilations(op: Operator) -> list[int]:
    found = [op.option("DilationHFactor", 1), op.option("DilationWFactor", 1)]
    if min(found) < 1:
        raise Refused(f"its dilations are {found}; supported: positive numbers")
    return found


def image(g: Graph, op: Operator, place: int = 0) -> str:
    """An operand [N, H, W, C], as [N, C, H, W]."""
    if g.rank(op, place) != 4:
        raise Refused(f"its operand '{g.operand(op, place).name}' has {g.rank(op, place)} axes; supported: images [N, H, W, C]")
    tensor = g.operand(op, place)
    if not tensor.quantized and tensor.dtype != "float32":
        raise Refused(f"its operand '{tensor.name}' holds {tensor.dtype}; supported: float32 and quantized integers")
    return g.value(op, place, TO_NCHW)


def back(g: Graph, op: Operator, value: str) -> None:
    """The operator's result from an image [N, C, H, W]; the activation is the same in either layout, and stays beside the product."""
    g.bind(op.outputs[0], g.node("Transpose", [g.activated(value, g.fused(op))], "nhwc", perm=TO_NHWC)[0])


# -- products ---------------------------------------------------------------------------------------------------------------------------------


def bias(g: Graph, op: Operator, place: int, x: Tensor, w: Tensor) -> list[str]:
    """The bias operand, if there is one. Integers are in units of both scales' product, which is what a kernel adds them to."""
    if not g.has(op, place):
        return []
    tensor = g.operand(op, place)
    if tensor.data is None or tensor.data.dtype.kind == "f":
        return [g.value(op, place)]
    if x.scale is None or w.scale is None or x.scale.size != 1:
        raise Refused(f"its bias '{tensor.name}' holds integers, and its operands are not quantized")
    limits = np.iinfo(np.int32)
    if tensor.data.min(initial=0) < limits.min or tensor.data.max(initial=0) > limits.max:
        raise Refused(f"its bias '{tensor.name}' is beyond 32 bits")
    scale = (x.scale * w.scale).astype(np.float32)
    names = g.constant(tensor.data.astype(np.int32), "bias/stored"), g.constant(scale.reshape(()) if scale.size == 1 else scale, "bias/scale")
    return g.node("DequantizeLinear", list(names), "bias", axis=0)


def product(g: Graph, op: Operator, kind: str, x: str, w: str, weight: Tensor, **attributes: Any) -> str:
    """`kind` (Conv or MatMul) of float `x` and the weights' float form `w`, with bias.

    int8 weights beside float activations: LiteRT rounds the activations to 8 bits under a scale that it finds in every run.
    """
    activation = g.operand(op, 0)
    if activation.quantized or weight.scale is None or weight.data is None:
        operands = [x, w, *bias(g, op, 2, activation, weight)]
        return g.node(kind, operands, **attributes)[0] if kind != "MatMul" else added(g, operands)
    stored = next(n for n in reversed(g.nodes) if w in n.output).input[0]  # of the DequantizeLinear that makes it
    q, scale, zero = g.node("DynamicQuantizeLinear", [x], outputs=3)
    zeros = g.constant(np.zeros((), g.constants[stored].dtype), "zero")
    integer = g.node(f"{kind}Integer", [q, stored, zero, zeros], **attributes)[0]
    along = [-1, 1, 1] if kind == "Conv" else [-1]
    one = g.constant(weight.scale.reshape(along if weight.scale.size > 1 else ()), "scale")
    value = g.node("Mul", [g.node("Mul", [g.node("Cast", [integer], to=TensorProto.FLOAT)[0], one])[0], scale], kind.lower())[0]
    if not g.has(op, 2):
        return value
    shift = g.value(op, 2)
    return g.node("Add", [value, g.node("Reshape", [shift, g.int64(along)])[0]], "biased")[0]


def added(g: Graph, operands: list[str]) -> str:
    """A matrix product, and its bias."""
    value = g.node("MatMul", operands[:2])[0]
    return g.node("Add", [value, operands[2]], "biased")[0] if len(operands) > 2 else value


def conv_2d(g: Graph, op: Operator) -> None:
    weight, x = g.operand(op, 1), image(g, op)
    if len(weight.shape) != 4:
        raise Refused(f"its filter '{weight.name}' has {len(weight.shape)} axes; supported: 4")
    channels, depth = g.operand(op, 0).shape[3], weight.shape[3]
    if channels < 1 or depth < 1 or channels % depth:
        raise Refused(f"its filter '{weight.name}' is for {depth} channels; the image has {channels}")
    w = g.value(op, 1, TO_NCHW)
    value = product(g, op, "Conv", x, w, weight, auto_pad=padding(op), strides=strides(op), dilations=dilations(op), group=channels // depth)
    back(g, op, value)


def depthwise_conv_2d(g: Graph, op: Operator) -> None:
    weight, x = g.operand(op, 1), image(g, op)
    channels = g.operand(op, 0).shape[3]
    if len(weight.shape) != 4 or weight.shape[0] != 1 or channels < 1 or weight.shape[3] % channels:
        raise Refused(f"its filter '{weight.name}' has shape {list(weight.shape)}; supported: [1, H, W, C * n] for an image of C = {channels} channels")
    w = g.value(op, 1, [3, 0, 1, 2])
    value = product(g, op, "Conv", x, w, weight, auto_pad=padding(op), strides=strides(op), dilations=dilations(op), group=channels)
    back(g, op, value)


def transpose_conv(g: Graph, op: Operator) -> None:
    """Operands: output shape, filter [O, H, W, I], image, bias."""
    _transposed(g, op, (2, 1, 3), g.ints(op, 0, "output shape"), padding(op), strides(op))


def transpose_conv_bias(g: Graph, op: Operator) -> None:
    """Convolution2DTransposeBias of MediaPipe, which LiteRT runs on its delegate for CPUs. Operands: image, filter [O, H, W, I], bias; the shape is that of the
    result's tensor. Options: a struct of three int32, padding (1: SAME, 2: VALID), strides along the width and the height."""
    if len(op.options) < 12:
        raise Refused(f"its options are {len(op.options)} bytes; supported: a padding and two strides of 4 bytes each")
    same, right, down = np.frombuffer(op.options[:12], "<i4").tolist()
    if same not in (1, 2) or min(right, down) < 1:
        raise Refused(f"its padding is number {same} and its strides {[down, right]}; supported: SAME and VALID, positive strides")
    _transposed(g, op, (0, 1, 2), list(g.tensors[op.outputs[0]].shape), _PADDING[same - 1], [down, right])


def _transposed(g: Graph, op: Operator, places: tuple[int, int, int], shape: list[int], pad: str, steps: list[int]) -> None:
    """A transposed convolution. places: of image, filter [O, H, W, I] and bias. SAME and VALID are those of the convolution whose gradient this is."""
    x, weight = (g.operand(op, place) for place in places[:2])
    value = image(g, op, places[0])
    if len(weight.shape) != 4 or len(shape) != 4:
        raise Refused(f"its filter and output shape have {len(weight.shape)} and {len(shape)} numbers; supported: 4")
    begin, end, more = list[int](), list[int](), list[int]()
    for n, out, k, s in zip(x.shape[1:3], shape[1:3], weight.shape[1:3], steps, strict=True):
        surplus = s * (n - 1) + k - out
        before = max(surplus, 0) // 2 if pad == "SAME_UPPER" else 0
        if n < 1 or (pad == "VALID" and surplus > 0) or -surplus >= s:
            raise Refused(f"its output shape {shape} doesn't fit an image of shape {list(x.shape)}")
        begin, end, more = [*begin, before], [*end, max(surplus, 0) - before], [*more, max(-surplus, 0)]
    operands = [value, g.value(op, places[1], [3, 0, 1, 2]), *bias(g, op, places[2], x, weight)]
    back(g, op, g.node("ConvTranspose", operands, strides=steps, pads=begin + end, output_padding=more)[0])


def fully_connected(g: Graph, op: Operator) -> None:
    """The last axis, or with keep_num_dims unset all that make its length, times [N, K] weights."""
    weight = g.operand(op, 1)
    if op.option("WeightsFormat") != 0:
        raise Refused("its weights are shuffled for one machine; convert the model again")
    if len(weight.shape) != 2:
        raise Refused(f"its weights '{weight.name}' have {len(weight.shape)} axes; supported: 2")
    n, k = weight.shape
    x, w = g.value(op, 0), g.value(op, 1, [1, 0])
    keep = bool(op.option("KeepNumDims", False)) and g.rank(op) > 2
    if not keep and g.operand(op, 0).shape[1:] != (k,):
        x = g.node("Reshape", [x, g.int64([-1, k])])[0]
    activation = g.operand(op, 0)
    if activation.quantized and not keep:
        value = g.node("Gemm", [x, w, *bias(g, op, 2, activation, weight)])[0]
    elif activation.quantized:
        rows = g.node("Gemm", [g.node("Reshape", [x, g.int64([-1, k])])[0], w, *bias(g, op, 2, activation, weight)])[0]
        if activation.shape[:-1].count(-1) > 1:
            raise Refused(f"its operand '{activation.name}' has a shape that the file leaves open")
        value = g.node("Reshape", [rows, g.int64([*activation.shape[:-1], n])])[0]
    else:
        value = product(g, op, "MatMul", x, w, weight)
    g.result(op, value)


def batch_matmul(g: Graph, op: Operator) -> None:
    values = []
    for place, turned in enumerate((op.option("AdjX", False), op.option("AdjY", False))):
        rank = g.rank(op, place)
        if rank < 2:
            raise Refused(f"its operand {place} has {rank} axes; supported: 2 and more")
        values.append(g.value(op, place, [*range(rank - 2), rank - 1, rank - 2] if turned else None))
    g.chain(op, "MatMul", values)


# -- windows and images -------------------------------------------------------------------------------------------------------------------------


def pool(kind: str) -> Any:
    def convert(g: Graph, op: Operator) -> None:
        kernel = [op.option("FilterHeight"), op.option("FilterWidth")]
        if min(kernel) < 1:
            raise Refused(f"its window is {kernel}; supported: positive numbers")
        back(g, op, g.node(kind, [image(g, op)], kernel_shape=kernel, strides=strides(op), auto_pad=padding(op))[0])

    return convert


def resize(mode: str) -> Any:
    """How coordinates of the result are turned into those of the operand: tensorflow/lite/kernels/internal/reference/resize_*.h."""

    def convert(g: Graph, op: Operator) -> None:
        sizes, corners, centers = g.ints(op, 1, "size"), op.option("AlignCorners", False), op.option("HalfPixelCenters", False)
        if len(sizes) != 2 or min(sizes) < 1:
            raise Refused(f"its size is {sizes}; supported: two positive numbers")
        coordinates = "align_corners" if corners else "half_pixel" if centers else "asymmetric"
        rounding: dict[str, Any] = {} if mode == "linear" else {"nearest_mode": "floor" if coordinates == "asymmetric" else "round_prefer_ceil"}
        shape = [max(d, 1) for d in g.operand(op, 0).shape]
        whole = g.int64([shape[0], shape[3], *sizes])
        value = g.node("Resize", [image(g, op), "", "", whole], mode=mode, coordinate_transformation_mode=coordinates, **rounding)[0]
        back(g, op, value)

    return convert


def shuffle(kind: str) -> Any:
    def convert(g: Graph, op: Operator) -> None:
        back(g, op, g.node(kind, [image(g, op)], blocksize=op.option("BlockSize"))[0])

    return convert


WINDOWS = {
    "CONV_2D": conv_2d, "DEPTHWISE_CONV_2D": depthwise_conv_2d, "TRANSPOSE_CONV": transpose_conv, "FULLY_CONNECTED": fully_connected,
    "BATCH_MATMUL": batch_matmul, "MAX_POOL_2D": pool("MaxPool"), "AVERAGE_POOL_2D": pool("AveragePool"), "RESIZE_BILINEAR": resize("linear"),
    "RESIZE_NEAREST_NEIGHBOR": resize("nearest"), "DEPTH_TO_SPACE": shuffle("DepthToSpace"), "SPACE_TO_DEPTH": shuffle("SpaceToDepth"),
}  # fmt: skip
CUSTOM = {"Convolution2DTransposeBias": transpose_conv_bias}
"""Operators that the schema does not have, by the name that files give them."""
