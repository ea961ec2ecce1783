"""The quantized network as a standard ONNX model: QuantizeLinear and DequantizeLinear around the operators of the source file.

Every tensor that the library stores in 8 bits is rounded with the same scale and zero point; convolutions and matrix products read the library's
int8 weights (DequantizeLinear along the output channels) and its int32 biases, corrections included (scale = input scale * weight scale, zero
point 0). Between them the arithmetic is float32: another runtime's result differs from the library's by how each rounds a sum that lies close to
the middle between two steps, and tables (sigmoid, hard-swish) by half a step.

A weighted group (docs/architecture.md) is written anew from what the compiler knows of it, so folded BatchNormalizations and separate biases are
gone; any other operator keeps the nodes of the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from qcompiler.base.errors import DataError, ModelError
from qcompiler.base.files import check_writable, replacing
from qcompiler.base.shape_table import check_single
from qcompiler.base.targets import Target
from qcompiler.calibration.data import Source
from qcompiler.importers.onnx_file import default_opset
from qcompiler.importers.origin import AnyModel, files_of, origin_of
from qcompiler.importers.qdq import take_out
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, relax_op, shape_of
from qcompiler.passes.groups import Group, find_groups, values_in_sixteen
from qcompiler.passes.layer_norms import layer_norms
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.job import asked_rows
from qcompiler.pipeline.library import Compilation
from qcompiler.pipeline.options import Options, complete, takes_options
from qcompiler.refine.integer_layers import IntegerLayer, integer_layers

OPSET = 13  # the first with int8 scales per axis; older files are converted
_ANCHORS = {"Conv": "conv2d", "ConvTranspose": "conv2d_transpose", "Gemm": "dense", "MatMul": "dense"}
_ABSORBED = {"BatchNormalization", "Add", "Sub", "Mul", "Div", "Relu", "Clip", "LeakyRelu", "PRelu", "Identity", "Dropout"}  # up to its group's end
_LAYOUTS = ("nhwc", "nchw", "moved", "ranked")  # suffixes of values that hold a tensor of the file in another order (passes/layout.py)
_INEXACT = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


@dataclass(frozen=True)
class Export:
    """What was written. values: 8-bit tensors by name. kept_float: group id -> why its nodes compute in float32 without 8-bit weights."""

    model: onnx.ModelProto = field(repr=False)
    values: dict[str, QParams]
    weighted: int
    kept_float: dict[str, str]


@takes_options
def export_onnx(
    model: AnyModel, output: str | os.PathLike[str], calibration: Source | None = None, target: str | Target = "native", **options: Unpack[Options]
) -> Export:
    """Quantize `model` as `compile` does (same errors) and write the network as ONNX QDQ to `output`.

    Raises OutputError, before any work, when `output` can't be written; ModelError for what QuantizeLinear can't express.
    """
    options = complete(options, "export_onnx")
    for name in ("input_types", "output_types", "resize_inside"):
        if options[name]:
            raise DataError(f"{name} is for libraries; an ONNX model keeps its inputs and outputs in float32. Leave it out")
    path = check_writable(Path(output), [*files_of(model), calibration, options["preprocess"], options["labels"]])
    check_single(asked_rows(options), "export_onnx")
    origin = origin_of(model, options["outputs"], options["example_inputs"])
    options["example_inputs"] = None
    source = _source(origin, options["requantize"])
    options["disable"] = [*options["disable"], "streams", "residuals", "halves"]  # QDQ states 8 bits
    export = qdq_model(source, compile_stages(origin, target, calibration, **options))
    with replacing(path) as temporary:
        temporary.write_bytes(export.model.SerializeToString(deterministic=True))
    return export


def qdq_model(source: onnx.ModelProto, compilation: Compilation) -> Export:
    """The QDQ form of `source` (operator set 13 or later), as `compilation` quantized it; checked by `onnx.checker`."""
    if values_in_sixteen(Graph.of(compilation.quantized.model.module).attrs) is not None:
        raise ModelError(
            "QuantizeLinear states 8 bits here, and this compilation stores values in 16; to export, disable the steps streams, residuals "
            "and halves, and leave keep_16 out"
        )
    return _Exporter(source, compilation).run()


def _source(given: AnyModel, requantize: bool = False) -> onnx.ModelProto:
    origin = origin_of(given)
    model, _ = take_out(origin.read()[0], requantize)
    kinds = {t.data_type for t in model.graph.initializer} | {i.type.tensor_type.elem_type for i in model.graph.input}
    for kind in sorted(kinds & _INEXACT):
        raise ModelError(
            f"{origin.where}: it holds {TensorProto.DataType.Name(kind).lower()} tensors; supported by export-onnx: float32 networks. Export it in float32"
        )
    if default_opset(model) >= OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises classes of its own
        raise ModelError(f"{origin.where}: operator set {default_opset(model)} can't be converted to {OPSET}: {error}. Export it with 13 or later") from error


@dataclass
class _Chain:
    """The nodes of the source that make a group's output from tensors outside of it; `anchor` is its convolution or product."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    anchor: onnx.NodeProto | None = None


class _Exporter:
    def __init__(self, source: onnx.ModelProto, compilation: Compilation) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(source)
        quantized = compilation.quantized
        self.graph, self.plan = self.model.graph, quantized.plan
        self.groups = find_groups(quantized.model.module)
        self.bindings = Graph.of(quantized.model.module).values()
        self.float_ops: dict[str, str] = Graph.of(quantized.qdq).attrs.get("qc.float_ops", {})
        self.rounded = {g.id: g for g in find_groups(quantized.qdq)}
        self.layers = {layer.group: layer for layer in integer_layers(compilation.integer)}
        self.constants = {t.name: t for t in self.graph.initializer}
        self.fixed = set(self.constants)
        for node in self.graph.node:
            if node.op_type == "Constant" or (node.input and all(not i or i in self.fixed for i in node.input)):
                self.fixed |= set(node.output)
        self.producer = {o: n for n in self.graph.node for o in n.output if o}
        self.stored = {g.id for g in self.groups if g.id in self.producer and g.id not in self.float_ops and self.plan.params(g.id)}
        self.naming = quantized.model.naming
        self.made = self.naming.made  # names of what the file doesn't have
        self.ends = {self.base(g.id) for g in self.groups} | {i.name for i in self.graph.input}
        self.norms = layer_norms(quantized.model.module)
        self.equalized = quantized.measured.equalized.equalization.channels
        self.before: dict[str, list[onnx.NodeProto]] = {}  # tensor -> nodes to put in place of, or behind, its producer
        self.copies: dict[tuple[str, QParams], str] = {}
        self.inputs: list[onnx.NodeProto] = []  # Q and DQ of network inputs
        self.added: list[onnx.TensorProto] = []
        self.parameters: dict[QParams, tuple[str, str]] = {}
        self.values: dict[str, QParams] = {}
        self.kept: dict[str, str] = {}
        self.weighted = 0

    def run(self) -> Export:
        replaced: dict[str, list[onnx.NodeProto]] = {}
        for group in self.groups:
            if group.id in self.float_ops:
                self.kept[group.id] = self.float_ops[group.id]
            elif group.id in self.producer and group.traits.weighted:
                nodes = self.weighted_nodes(group)
                if isinstance(nodes, str):
                    self.kept[group.id] = nodes
                else:
                    replaced[group.id], self.weighted = nodes, self.weighted + 1
            elif group.id in self.producer:
                self.quantize_operands(group, self.chain(group))
            if group.id not in replaced and (nodes := self.equalized_nodes(group)):
                replaced[group.id] = nodes
        nodes = list(self.inputs)
        for node in self.graph.node:
            new = next((replaced[o] for o in node.output if o in replaced), [node])
            nodes += new
            for name in node.output:
                if name in self.stored:
                    nodes += self.round_output(name, new[-1])
                nodes += self.before.get(name, [])
        for node in nodes:
            node.name = node.name or f"{node.op_type}:{node.output[0]}"  # viewers and other tools go by it
        self.finish(nodes)
        return Export(self.model, self.values, self.weighted, self.kept)

    def base(self, value: str) -> str:
        """The tensor of the file that a value holds, when it holds one in another order of its axes."""
        head, what = self.naming.split(value)
        if what.isdigit():
            head, what = self.naming.split(head)
        return head if what in _LAYOUTS else value

    # -- groups in the source -----------------------------------------------------------------------------------------------------------

    def chain(self, group: Group) -> _Chain:
        """Backwards from the group's output through tensors that no group ends in."""
        found, queue, seen = _Chain(), [group.id], set()
        while queue:
            node = self.producer.get(queue.pop())
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            found.nodes.append(node)
            if group.traits.weighted and _ANCHORS.get(node.op_type) == group.kind:
                found.anchor = node if found.anchor is None else None
                continue
            queue += [i for i in node.input if i and i not in self.fixed and i not in self.ends]
        return found

    def equalized_nodes(self, group: Group) -> list[onnx.NodeProto]:
        """What takes the place of a group's float nodes when channels that it reads or writes are scaled; nothing when theirs are the right constants.

        Raises ModelError for a group that isn't made of nodes with such constants."""
        if not any(v in self.equalized for v in (group.id, group.inputs[0] if group.inputs else "", group.residual or "")):
            return []
        nodes: list[onnx.NodeProto] | str = []
        if group.traits.weighted:
            nodes = self.weighted_nodes(group, rounded=False)
        elif group.id in self.norms:
            nodes = self.normalization(group)
        if isinstance(nodes, str):
            where = f"'{group.id}' has equalized channels, but {nodes}, so its constants can't be written anew"
            raise ModelError(f"{where}. Export without the step equalize (--disable equalize)")
        return nodes

    def normalization(self, group: Group) -> list[onnx.NodeProto] | str:
        """A layer normalization with other constants; one that the source spells out in other operators is scaled behind them."""
        name = group.id
        node = self.producer.get(self.base(name))
        if node is not None and node.op_type == "LayerNormalization":
            node.input[:] = [node.input[0], *(self.constant(self.made(name, i), a) for i, a in enumerate(self.norms[name]))]
            return []
        if node is None or name not in self.producer or len(group.shape) == 4:  # an image's channels may lie on another axis there
            return "the source has no LayerNormalization there"
        channels, plain = self.equalized[name], self.made(name, "plain")
        maker = onnx.NodeProto()
        maker.CopyFrom(node)
        maker.output[list(node.output).index(name)] = plain
        scale, shift = self.constant(self.made(name, "scale"), channels.scale), self.constant(self.made(name, "shift"), channels.shift)
        return [
            maker,
            helper.make_node("Sub", [plain, shift], [self.made(name, "centered")]),
            helper.make_node("Mul", [self.made(name, "centered"), scale], [name]),
        ]

    def weighted_nodes(self, group: Group, rounded: bool = True) -> list[onnx.NodeProto] | str:
        """The group anew: anchor with int8 weights and int32 bias (or, not `rounded`, both in float32), slopes, residual, clamp; or why it can't be so."""
        chain, layer = self.chain(group), self.layers.get(group.id)
        anchor = chain.anchor
        if anchor is None or (rounded and layer is None):
            return "no single node of the source is its convolution or product"
        strange = {n.op_type for n in chain.nodes if n is not anchor} - _ABSORBED
        if strange:
            return f"the source has {', '.join(sorted(strange))} between its product and its result"
        residual = None
        if group.residual is not None:
            outside = [i for n in chain.nodes if n is not anchor and n.op_type == "Add" for i in n.input if i in self.ends]
            if len(outside) != 1:
                return "its residual operand has no tensor of its own in the source"
            residual = self.operand(outside[0], self.params(group.residual)) if rounded else outside[0]
        if anchor.op_type == "ConvTranspose" and int(group.attrs.get("groups", 1)) > 1:
            return "DequantizeLinear has one axis, and the output channels of a grouped ConvTranspose lie on two"
        data = anchor.input[0]
        constants = self.rounded_constants(group, anchor, layer) if layer is not None and rounded else self.float_constants(group, anchor)
        if isinstance(constants, str):
            return constants
        if rounded:
            data = self.operand(data, self.params(group.inputs[0]))
        nodes, name, last = constants, group.id, self.made(group.id, "accumulator")
        if anchor.op_type == "MatMul":
            nodes.append(helper.make_node("MatMul", [data, self.made(name, "weight")], [self.made(name, "product")], name=anchor.name))
            nodes.append(helper.make_node("Add", [self.made(name, "product"), self.made(name, "bias")], [last]))
        elif anchor.op_type == "Gemm":
            nodes.append(helper.make_node("Gemm", [data, self.made(name, "weight"), self.made(name, "bias")], [last], name=anchor.name, transB=1))
        else:
            node = helper.make_node(anchor.op_type, [data, self.made(name, "weight"), self.made(name, "bias")], [last], name=anchor.name)
            node.attribute.extend(anchor.attribute)
            nodes.append(node)
        parts = [] if group.slopes is None else [self.slopes(group, anchor)]
        parts += [] if residual is None else [("Add", residual, "sum")]
        for op, operand, what in reversed(parts) if group.bends_sum else parts:
            nodes.append(helper.make_node(op, [last, operand], [self.made(name, what)]))
            last = self.made(name, what)
        if group.low is not None or group.high is not None:
            nodes.append(self.clamp(group, last, self.made(name, "clamped")))
        nodes[-1].output[0] = name
        return nodes

    def slopes(self, group: Group, anchor: onnx.NodeProto) -> tuple[str, str, str]:
        """(operator, its second operand, what its result is called) of slopes, which lie along the file's axis of channels."""
        assert group.slopes is not None and group.weight is not None
        behind = self.rank(anchor, group.weight) - 2  # axes of an image
        return "PRelu", self.constant(self.made(group.id, "slopes"), group.slopes.astype(np.float32).reshape(-1, *[1] * behind)), "bent"

    def rounded_constants(self, group: Group, anchor: onnx.NodeProto, layer: IntegerLayer) -> list[onnx.NodeProto] | str:
        """<id>~weight and <id>~bias as the library has them."""
        x, scale = self.params(group.inputs[0]), self.rounded[group.id].weight_scale
        weight = self.file_weight(group, anchor, layer.weight)
        if scale is None or isinstance(weight, str):
            return weight if isinstance(weight, str) else "its weights have no scale"
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": 1}[anchor.op_type]
        nodes = self.dequantized(self.made(group.id, "weight"), weight, scale.astype(np.float32), axis)
        return nodes + self.dequantized(self.made(group.id, "bias"), layer.bias.astype(np.int32), (np.float64(x.scale) * scale).astype(np.float32), 0)

    def float_constants(self, group: Group, anchor: onnx.NodeProto) -> list[onnx.NodeProto] | str:
        """<id>~weight and <id>~bias of the float network; they need no nodes."""
        assert group.weight is not None
        weight = self.file_weight(group, anchor, group.weight)
        if isinstance(weight, str):
            return weight
        self.constant(self.made(group.id, "weight"), weight)
        self.constant(self.made(group.id, "bias"), np.asarray(np.zeros(len(group.weight)) if group.bias is None else group.bias, np.float32))
        return []

    def clamp(self, group: Group, x: str, y: str) -> onnx.NodeProto:
        if group.low == 0 and group.high is None:
            return helper.make_node("Relu", [x], [y])
        bounds = [
            self.constant(self.made(group.id, side), np.array(value, np.float32)) if value is not None else ""
            for side, value in (("low", group.low), ("high", group.high))
        ]
        return helper.make_node("Clip", [x, *bounds], [y])

    def file_weight(self, group: Group, anchor: onnx.NodeProto, weight: np.ndarray) -> np.ndarray | str:
        """int8 weights [O, KH, KW, I/g] or [N, K] in the order of the anchor's own weight tensor."""
        if anchor.op_type == "Conv":
            moved = weight.transpose(0, 3, 1, 2)
        elif anchor.op_type == "ConvTranspose":
            moved = weight.transpose(3, 0, 1, 2)  # one group: ONNX has [I, O, KH, KW]
        else:
            attributes = {a.name: helper.get_attribute_value(a) for a in anchor.attribute}
            if attributes.get("transA"):
                return "its Gemm transposes the data"
            restored = np.empty_like(weight)
            restored[:, self.features(group.inputs[0], weight.shape[1])] = weight
            moved = restored if anchor.op_type == "Gemm" else restored.T
        line = self.rank(anchor, moved) == 3 and moved.ndim == 4  # 1-D convolutions are 2-D ones of height 1 inside
        return np.ascontiguousarray(moved[:, :, 0] if line else moved)

    def rank(self, anchor: onnx.NodeProto, weight: np.ndarray) -> int:
        """Of the anchor's weights in the file; that of ours where they are no initializer."""
        return len(self.constants[anchor.input[1]].dims) if anchor.input[1] in self.constants else weight.ndim

    def features(self, value: str, count: int) -> np.ndarray:
        """int64[K]: the feature in the file that each column of a dense group reads. Differs from 0, 1, ... behind a flattened NHWC image."""
        expr: Any = self.bindings.get(value)
        if self.naming.split(value)[1] and relax_op(expr) == "relax.reshape":
            shape = shape_of(expr.args[0])
            if len(shape) == 4 and int(np.prod(shape[1:])) == count:
                height, width, channels = shape[1:]
                return np.arange(count).reshape(channels, height, width).transpose(1, 2, 0).reshape(-1)
        return np.arange(count)

    # -- rounding -----------------------------------------------------------------------------------------------------------------------

    def params(self, value: str) -> QParams:
        found = self.plan.params(value)
        assert found is not None, value
        return found

    def operand(self, tensor: str, params: QParams) -> str:
        """`tensor` as an int8 operator sees it."""
        if tensor in self.stored and self.plan.params(tensor) == params:
            return tensor
        if (tensor, params) not in self.copies:
            name = self.made(tensor, "dq") + (f"{len(self.copies)}" if any(t == tensor for t, _ in self.copies) else "")
            self.copies[tensor, params] = name
            self.values.setdefault(tensor, params)
            pair = self.pair(tensor, name, params)
            if tensor in self.producer:
                self.before.setdefault(tensor, []).extend(pair)
            else:
                self.inputs += pair
        return self.copies[tensor, params]

    def quantize_operands(self, group: Group, chain: _Chain) -> None:
        """Operators that keep their nodes: float operands and constants are rounded on the way in."""
        known = {self.base(v): self.plan.params(v) for v in group.inputs}
        for node in chain.nodes:
            for index, name in enumerate(node.input):
                params = known.get(name)
                if params is not None:
                    node.input[index] = self.operand(name, params)
                elif group.weight is not None and name in self.constants and node.op_type in ("Add", "Sub", "Mul"):
                    node.input[index] = self.rounded_constant(group, name)

    def rounded_constant(self, group: Group, name: str) -> str:
        """The constant operand of an elementwise operator, as the library holds it."""
        twin = self.rounded[group.id]
        if twin.weight is None or twin.weight_scale is None:
            return name
        params = QParams(float(twin.weight_scale.item()), int(twin.weight_zero_point))
        quantized = params.quantize(numpy_helper.to_array(self.constants[name]))
        if not np.array_equal(np.sort(quantized, axis=None), np.sort(twin.weight, axis=None)):
            return name
        copy = self.made(group.id, "constant")
        scale, zero = self.scale_and_zero(params)
        self.inputs.append(helper.make_node("DequantizeLinear", [self.constant(f"{copy}_int8", quantized), scale, zero], [copy]))
        return copy

    def round_output(self, name: str, maker: onnx.NodeProto) -> list[onnx.NodeProto]:
        raw, params = self.made(name, "float"), self.params(name)
        maker.output[list(maker.output).index(name)] = raw
        self.values[name] = params
        return self.pair(raw, name, params)

    def pair(self, x: str, y: str, params: QParams) -> list[onnx.NodeProto]:
        parameters = list(self.scale_and_zero(params))
        quantize = helper.make_node("QuantizeLinear", [x, *parameters], [self.made(y, "q")])
        return [quantize, helper.make_node("DequantizeLinear", [self.made(y, "q"), *parameters], [y])]

    def scale_and_zero(self, params: QParams) -> tuple[str, str]:
        if params not in self.parameters:
            index = len(self.parameters)
            scale = self.constant(self.made("", f"scale{index}"), np.float32(params.scale))
            self.parameters[params] = scale, self.constant(self.made("", f"zero{index}"), np.int8(params.zero_point))
        return self.parameters[params]

    def dequantized(self, name: str, value: np.ndarray, scale: np.ndarray, axis: int) -> list[onnx.NodeProto]:
        zero = np.zeros(scale.shape, value.dtype)
        operands = [self.constant(f"{name}_{kind}", a) for kind, a in ((value.dtype.name, value), ("scale", scale), ("zero", zero))]
        return [helper.make_node("DequantizeLinear", operands, [name], axis=axis)]

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.added.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    # -- the end ------------------------------------------------------------------------------------------------------------------------

    def finish(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Drop what no output needs, and check the model."""
        needed = {o.name for o in self.graph.output}
        kept = []
        for node in reversed(nodes):
            if any(o in needed for o in node.output):
                kept.append(node)
                needed |= set(_read_by(node))
        kept.reverse()
        tensors = [t for t in [*self.graph.initializer, *self.added] if t.name in needed]
        inputs = [i for i in self.graph.input if i.name not in self.constants]
        for have, want in ((self.graph.node, kept), (self.graph.initializer, tensors), (self.graph.input, inputs)):
            copies = [type(item).FromString(item.SerializeToString()) for item in want]
            del have[:]
            have.extend(copies)
        del self.graph.value_info[:]
        self.model.producer_name = "qcompiler"
        self.model.ir_version = max(self.model.ir_version, 7)  # the version of operator set 13
        onnx.checker.check_model(self.model, full_check=self.model.ByteSize() < 2**31)


def _read_by(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (o.name for o in graph.output)
