"""The table of ONNX operators with a conversion of our own; every other operator goes through Relax's importer."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from qcompiler.importers import arithmetic, images, shapes
from qcompiler.importers.nodes import Node, Value

Converter = Callable[[Node], list[Value] | None]  # None: leave this node to Relax's importer

CONVERTERS: dict[str, Converter] = {
    "AveragePool": images.average_pool,
    "BatchNormalization": images.batch_normalization,
    "Cast": shapes.cast,
    "Clip": arithmetic.clip,
    "Concat": shapes.concat,
    "Conv": images.conv,
    "ConvTranspose": images.conv_transpose,
    "CumSum": shapes.cumsum,
    "DepthToSpace": images.depth_to_space,
    "Dropout": arithmetic.dropout,
    "Einsum": shapes.einsum,
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Gather": shapes.gather,
    "Gemm": arithmetic.gemm,
    "GlobalAveragePool": images.global_pool(relax.op.mean),
    "GlobalMaxPool": images.global_pool(relax.op.max),
    "HardSigmoid": arithmetic.hard_sigmoid,
    "HardSwish": arithmetic.hard_swish,
    "Identity": arithmetic.identity,
    "Max": arithmetic.chain(relax.op.maximum),
    "MaxPool": images.max_pool,
    "Mean": arithmetic.chain(relax.op.add, mean=True),
    "Min": arithmetic.chain(relax.op.minimum),
    "Mish": arithmetic.mish,
    "Pad": shapes.pad,
    "ReduceMax": shapes.reduction(relax.op.max),
    "ReduceMean": shapes.reduction(relax.op.mean),
    "ReduceMin": shapes.reduction(relax.op.min),
    "ReduceProd": shapes.reduction(relax.op.prod),
    "ReduceSum": shapes.reduction(relax.op.sum),
    "Reshape": shapes.reshape,
    "Resize": images.resize,
    "Slice": shapes.slice_,
    "SpaceToDepth": images.space_to_depth,
    "Split": shapes.split,
    "Squeeze": shapes.squeeze,
    "Sum": arithmetic.chain(relax.op.add),
    "Swish": arithmetic.swish,
    "Tile": shapes.tile,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    "Upsample": images.resize,
}
