"""The table of ONNX operators with a conversion of our own; every other operator goes through Relax's importer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax

from qcompiler.importers import arithmetic, images, indexing, integers, shapes, spectra
from qcompiler.importers.attention import attention
from qcompiler.importers.contributed import simplified_layer_norm
from qcompiler.importers.einsum import einsum
from qcompiler.importers.nodes import Beyond, Node, Refused, Undefined, Value
from qcompiler.importers.recurrent import recurrent
from qcompiler.passes.graph import const


def _only_first_result(node: Node) -> list[Value] | None:
    """Relax's importer returns scalars for the mean and deviation of a normalization: its definition is used when they are read."""
    if any(node.outputs[1:]):
        raise Undefined
    return None


def _infinite(node: Node) -> list[Value]:
    """Relax's importer ignores which signs to detect."""
    x = node.tensor(0)
    if node.attrs.get("detect_negative", 1) and node.attrs.get("detect_positive", 1):
        return [relax.op.isinf(x)]
    sign = np.float32("inf" if node.attrs.get("detect_positive", 1) else "-inf")
    return [relax.op.equal(x, const(sign))]


def _power(node: Node) -> list[Value] | None:
    """TVM raises floats only; integers go through float32 (exact up to 2^24)."""
    if node.dtype(0) == "float32" and node.dtype(1) == "float32":
        return None
    base, exponent = (node.tensor(i) if node.dtype(i) == "float32" else node.emit("float", relax.op.astype(node.tensor(i), "float32")) for i in (0, 1))
    power = relax.op.power(base, exponent)
    return [power if node.dtype(0) == "float32" else relax.op.astype(node.emit("power", power), node.dtype(0))]


def _softmax(node: Node) -> list[Value] | None:
    """Below operator set 13 all axes from `axis` on are one; Relax's importer writes that with reshapes, which the last axis alone doesn't need."""
    rank = len(node.shape())
    if node.opset >= 13 or node.axis(int(node.attrs.get("axis", 1)), rank) != rank - 1:
        return None
    return [relax.op.nn.softmax(node.tensor(0), rank - 1)]


def by_definition(node: Node) -> list[Value]:
    raise Undefined


def _roi_align(node: Node) -> list[Value] | None:
    if node.text("mode", "avg") != "avg":
        raise Refused(f"mode '{node.text('mode', 'avg')}' is not supported; supported: avg")
    return None


def _data_dependent(node: Node) -> list[Value]:
    raise Beyond("how many results it yields depends on data. Cut the model before it and run it outside, on this network's outputs")


Converter = Callable[[Node], list[Value] | None]  # None: leave this node to Relax's importer

CONVERTERS: dict[str, Converter] = {
    "ArgMax": indexing.arg_extreme(True),
    "ArgMin": indexing.arg_extreme(False),
    "Attention": attention,
    "AveragePool": images.average_pool,
    "BatchNormalization": images.batch_normalization,
    "BitCast": arithmetic.bit_cast,
    "BitShift": arithmetic.bit_shift,
    "Cast": shapes.cast,
    "Clip": arithmetic.clip,
    "Col2Im": indexing.col2im,
    "Compress": indexing.compress,
    "Concat": shapes.concat,
    "Conv": images.conv,
    "ConvInteger": integers.conv_integer,
    "ConvTranspose": images.conv_transpose,
    "CumProd": indexing.cumulative("mul"),
    "CumSum": indexing.cumulative("add"),
    "DepthToSpace": images.depth_to_space,
    "DequantizeLinear": integers.dequantize_linear,
    "DFT": spectra.dft,
    "Div": arithmetic.divide,
    "Dropout": arithmetic.dropout,
    "DynamicQuantizeLinear": integers.dynamic_quantize_linear,
    "Einsum": einsum,
    "Expand": shapes.expand,
    "EyeLike": indexing.eye_like,
    "Flatten": shapes.flatten,
    "Gather": shapes.gather,
    "GatherElements": indexing.gather_elements,
    "GatherND": indexing.gather_nd,
    "Gemm": arithmetic.gemm,
    "GlobalAveragePool": images.global_pool(relax.op.mean),
    "GlobalMaxPool": images.global_pool(relax.op.max),
    "GRU": recurrent,
    "GroupNormalization": images.group_normalization,
    "HardSigmoid": arithmetic.hard_sigmoid,
    "HardSwish": arithmetic.hard_swish,
    "Identity": arithmetic.identity,
    "InstanceNormalization": images.instance_normalization,
    "IsInf": _infinite,
    "LSTM": recurrent,
    "LayerNormalization": _only_first_result,
    "LpNormalization": arithmetic.lp_normalization,
    "LpPool": images.lp_pool,
    "MatMul": arithmetic.matmul,
    "MatMulInteger": integers.matmul_integer,
    "Max": arithmetic.chain(relax.op.maximum),
    "MaxPool": images.max_pool,
    "MaxUnpool": indexing.max_unpool,
    "Mean": arithmetic.chain(relax.op.add, mean=True),
    "Min": arithmetic.chain(relax.op.minimum),
    "Mish": arithmetic.mish,
    "Mod": arithmetic.modulo,
    "NonMaxSuppression": _data_dependent,
    "OneHot": indexing.one_hot,
    "Pad": shapes.pad,
    "Pow": _power,
    "QuantizeLinear": integers.quantize_linear,
    "ReverseSequence": indexing.reverse_sequence,
    "RNN": recurrent,
    "RMSNormalization": by_definition,
    "ReduceL1": shapes.reduction(relax.op.sum, before=relax.op.abs),
    "ReduceL2": shapes.reduction(relax.op.sum, before=relax.op.square, after=relax.op.sqrt),
    "ReduceLogSum": shapes.reduction(relax.op.sum, after=relax.op.log),
    "ReduceLogSumExp": shapes.log_sum_exp,
    "ReduceMax": shapes.reduction(relax.op.max),
    "ReduceMean": shapes.reduction(relax.op.mean),
    "ReduceMin": shapes.reduction(relax.op.min),
    "ReduceProd": shapes.reduction(relax.op.prod),
    "ReduceSum": shapes.reduction(relax.op.sum),
    "ReduceSumSquare": shapes.reduction(relax.op.sum, before=relax.op.square),
    "Reshape": shapes.reshape,
    "Resize": images.resize,
    "Scatter": indexing.scatter_elements,
    "ScatterElements": indexing.scatter_elements,
    "ScatterND": indexing.scatter_nd,
    "SimplifiedLayerNormalization": simplified_layer_norm,  # ONNX Runtime's, written without a domain
    "Slice": shapes.slice_,
    "RoiAlign": _roi_align,
    "Softmax": _softmax,
    "SpaceToDepth": images.space_to_depth,
    "Split": shapes.split,
    "Squeeze": shapes.squeeze,
    "STFT": spectra.stft,
    "Sum": arithmetic.chain(relax.op.add),
    "Swish": arithmetic.swish,
    "TensorScatter": indexing.tensor_scatter,
    "Tile": shapes.tile,
    "TopK": indexing.top_k,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    "Upsample": images.resize,
}
