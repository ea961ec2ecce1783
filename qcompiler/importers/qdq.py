"""QuantizeLinear and DequantizeLinear in a file: taken out of the graph where 8-bit kernels can say the same, their parameters kept (`passes/trained.py`).

    conv -> QuantizeLinear -> DequantizeLinear -> ...    -->    conv -> Clip to what 8 bits can say -> ...
    int8 constant -> DequantizeLinear -> conv            -->    float constant -> conv
    float constant -> QuantizeLinear -> DequantizeLinear -->    the same, rounded

So the float network is what the file computes but for the rounding of such activations. The Clip is needed: quantizers remove a ReLU where saturation does
its work; and the rounded value is one of its own, so that whoever reads the unrounded one in the file reads that. It is left out behind operators that only
move data of the same quantization, and at network inputs that are read in no other way, where it could not do anything.
Integer tensors that only move between two of these nodes, and operators that take and yield integers (QLinearConv, ...), are written as
DequantizeLinear, float operator, QuantizeLinear first (`qlinear.py`); what dynamic quantization wrote becomes the product that it was (`dynamic.py`).

Every other node stays, and is computed as ONNX defines it, in float32 (`integers.py`): integers that someone reads as integers, types of more than 8 bits,
several scales per tensor, scales that are computed when the network runs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompiler.base.value_ids import Naming
from qcompiler.importers.control import captured, in_order
from qcompiler.importers.dynamic import real_attentions, real_lstms, take_back
from qcompiler.importers.nodes import RANDOM, Refused
from qcompiler.importers.onnx_file import default_opset, names
from qcompiler.importers.qlinear import CONTRIB, expand
from qcompiler.importers.stated import BITS, Parameters, Rounded, check_scale, summands, weight_scales
from qcompiler.numerics.spec import QParams
from qcompiler.passes.trained import Trained

PAIR = ("QuantizeLinear", "DequantizeLinear")
_DOMAINS = ("", "ai.onnx", CONTRIB)  # ONNX Runtime's own pair has the same meaning
MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity", "Dropout", "Expand", "Tile",
         "DepthToSpace", "SpaceToDepth", "GlobalMaxPool"}  # fmt: skip
"""Operators whose results are elements of their first operand: they keep its quantization."""
_REARRANGES = MOVES - {"MaxPool", "GlobalMaxPool", "Dropout"}
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SMALL = 4096  # elements of the operands of what is computed here: scales, shapes


def take_out(model: onnx.ModelProto, requantize: bool = False) -> tuple[onnx.ModelProto, Trained]:
    """(the float network, what was found). A model without quantized arithmetic is returned as it is. Raises Refused for scales that can't be."""
    naming = Naming.beside(names(model))
    model, notes = real_lstms(_sorted(model), naming)
    model, more = real_attentions(model, naming)
    notes += more
    model, dynamic = take_back(model, naming)
    model = expand(model, naming)
    if not any(n.op_type in PAIR and n.domain in _DOMAINS for n in model.graph.node):
        return model, Trained(notes=notes)
    return _Rewriter(model, naming, dynamic, trained=Trained(requantize=requantize, notes=notes)).run()


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose nodes stand behind those that they read from; itself where they do."""
    order = in_order(model.graph.node)
    if all(a is b for a, b in zip(order, model.graph.node, strict=True)):
        return model
    ordered = onnx.ModelProto()
    ordered.CopyFrom(model)
    del ordered.graph.node[:]
    ordered.graph.node.extend(order)
    return ordered


@dataclass
class _Rewriter:
    source: onnx.ModelProto
    naming: Naming
    dynamic: dict[str, str]  # result of a product whose activations are rounded under a scale of their own -> what the file had
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    trained: Trained = field(default_factory=Trained)

    def __post_init__(self) -> None:
        graph = self.source.graph
        self.opset = default_opset(self.source)
        self.tensors = {t.name: t for t in graph.initializer}
        self.inputs = {i.name: i for i in graph.input if i.name not in self.tensors}
        self.outputs = {o.name for o in graph.output} | captured(graph)
        self.made_by: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.alias: dict[str, str] = {}  # tensor of the file -> what its readers read now
        self.integer: dict[str, tuple[str, Parameters]] = {}  # result of a Q node -> what it rounds, and how
        self.rounded: dict[str, Rounded] = {}  # constants
        self.forms: dict[str, list[tuple[QParams, str]]] = {}  # float tensor -> its rounded forms
        self.held: dict[str, QParams] = {}  # rounded float tensors, and those that hold elements of one
        self.made: dict[str, np.ndarray] = {}  # new constants
        self.notes: dict[tuple[str, str], list[str]] = {}  # (operator, what is to be said) -> nodes

    def run(self) -> tuple[onnx.ModelProto, Trained]:
        for node in self.source.graph.node:
            try:
                if node.domain not in _DOMAINS:
                    self.keep(node)
                elif node.op_type == "QuantizeLinear":
                    self.quantize(node)
                elif node.op_type == "DequantizeLinear":
                    self.dequantize(node)
                else:
                    self.keep(node)
            except Refused as reason:
                raise Refused(f"node '{node.name or node.output[0]}' ({node.op_type}): {reason}") from reason
        for (op, text), nodes in self.notes.items():
            self.trained.notes.append(f"node '{nodes[0]}' ({op}){f' and {len(nodes) - 1} more' if len(nodes) > 1 else ''}: {text}")
        return self.finished(), self.trained

    def note(self, node: onnx.NodeProto, text: str) -> None:
        self.notes.setdefault((node.op_type, text), []).append(node.name or node.output[0])

    def array(self, name: str) -> np.ndarray | None:
        """The value of a tensor that is known now."""
        if name in self.made:
            return self.made[name]
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def parameters(self, node: onnx.NodeProto) -> Parameters | None:
        """None where scale or zero point is computed when the network runs, or is no integer quantization."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if len(node.input) < 2:
            raise Refused(f"node '{node.name or node.output[0]}' ({node.op_type}): its scale is missing")
        scale = self.array(node.input[1])
        zero = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if scale is None or (zero is None and len(node.input) > 2 and node.input[2]):
            return None
        dtype = str(zero.dtype) if zero is not None else ""
        if zero is None and node.op_type == "QuantizeLinear":
            kind = attributes.get("output_dtype", 0)
            dtype = TensorProto.DataType.Name(kind).lower() if kind else "uint8"
        elif zero is None:
            dtype = self.integer[node.input[0]][1].dtype if node.input[0] in self.integer else str(self.constant_type(node.input[0]))
        if dtype not in (*BITS, "int32"):
            return None
        scale = scale.astype(np.float32)
        check_scale(scale, node.input[1], divides=node.op_type == "QuantizeLinear")
        zero = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
        scale, zero = (a.reshape(()) if a.size == 1 else a for a in (scale, zero))
        return Parameters(scale, zero, dtype, int(attributes.get("axis", 1)), int(attributes.get("block_size", 0)))

    def constant_type(self, name: str) -> str:
        if name in self.rounded:
            return self.rounded[name].dtype
        if name in self.tensors:
            return str(np.dtype(helper.tensor_dtype_to_np_dtype(self.tensors[name].data_type)))
        kind = self.inputs[name].type.tensor_type.elem_type if name in self.inputs else 0
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(kind))) if kind else ""

    # -- the two nodes ------------------------------------------------------------------------------------------------------------------

    def quantize(self, node: onnx.NodeProto) -> None:
        found, x, q = self.parameters(node), self.alias.get(node.input[0], node.input[0]), node.output[0]
        if found is None:
            return self.keep(node)
        constant = self.array(x)
        if constant is not None:
            value = found.quantize(constant)
            self.rounded[q] = Rounded.of(value, found)
            self.made[q] = value.astype(found.dtype if found.dtype in ("int8", "uint8", "int16", "uint16") else "int8")
            return
        self.integer[q] = (x, found)
        reason = self.unpaired(found)
        if reason is not None and q in self.readers:
            self.note(node, f"{reason}; rounded in float32, as the file says{'; requantize makes 8 bits of it' if found.scale.size == 1 else ''}")
        if reason is not None or not self.only_paired(node, found):
            self.keep(node)  # someone reads the integers themselves

    def only_paired(self, node: onnx.NodeProto, found: Parameters) -> bool:
        """Are the integers that a QuantizeLinear yields read by nothing but DequantizeLinear under the same parameters?"""
        q = node.output[0]
        return q not in self.outputs and all(r.op_type == "DequantizeLinear" and self.parameters(r) == found for r in self.readers.get(q, []))

    def unpaired(self, found: Parameters) -> str | None:
        """Why these parameters are left to float arithmetic, if they are."""
        params = found.of_activation()
        return params if isinstance(params, str) and not (self.trained.requantize and found.scale.size == 1) else None

    def dequantize(self, node: onnx.NodeProto) -> None:
        q, y, found = node.input[0], node.output[0], self.parameters(node)
        constant = self.rounded[q].value if q in self.rounded else self.array(q)
        if found is None:
            return self.keep(node)
        if constant is not None:
            self.rounded[y] = Rounded.of(constant.astype(np.int64), found)
            self.made[y] = found.dequantize(self.rounded[y].value)
            if not np.isfinite(self.made[y]).all():
                raise Refused(f"with the scale '{node.input[1]}', constants are beyond float32. Export the model again")
        elif q in self.integer and self.integer[q][1] == found and self.unpaired(found) is None:
            self.pair(node, self.integer[q][0], y, found)
        else:
            self.keep(node)
            params = found.of_activation() if found.is_positive else ""
            if isinstance(params, QParams):
                self.state(y, params)

    def pair(self, node: onnx.NodeProto, x: str, y: str, found: Parameters) -> None:
        """Both nodes together: `y` is `x`, rounded."""
        params = found.of_activation()
        if isinstance(params, str):
            self.note(node, f"{params}; chosen anew")
            self.clip(x, y, found)
        elif (form := next((f for p, f in self.forms.get(x, []) if p == params), None)) is not None:
            self.alias[y] = form
        elif self.held.get(x) == params or (self.clips_nothing(x, found, params) and self.only_rounded(x, found)):
            self.alias[y] = x
            self.state(x, params)
        else:
            self.clip(x, y, found)
            self.state(y, params)
            self.forms.setdefault(x, []).append((params, y))
            if self.trained.requantize and x not in self.outputs:
                self.alias[x] = y  # who reads the unrounded value reads the rounded one: there is one form of it
        if y in self.outputs and y in self.alias:
            self.emit(helper.make_node("Identity", [self.alias.pop(y)], [y]))

    def state(self, name: str, params: QParams) -> None:
        self.trained.values[name] = self.held[name] = params

    def clips_nothing(self, x: str, found: Parameters, params: QParams) -> bool:
        """Does rounding `x` to int8 saturate where the file does, because nothing but the rounding itself computes it?"""
        maker = self.made_by.get(x)
        if maker is None:
            return x in self.inputs and found.fills_int8
        if maker.op_type in ("Resize", "Upsample"):  # between the operand's elements
            modes = {helper.get_attribute_value(a) for a in maker.attribute if a.name in ("mode", "coordinate_transformation_mode")}
            return modes.isdisjoint({b"cubic", b"tf_crop_and_resize"}) and self.held.get(maker.input[0]) == params
        return maker.op_type == "Concat" and len(maker.input) > 1 and found.fills_int8  # its operands are requantized one by one

    def only_rounded(self, x: str, found: Parameters) -> bool:
        """Is `x` read by nothing but nodes that round it so?"""
        readers = self.readers.get(x, [])
        return x not in self.outputs and all(r.op_type == "QuantizeLinear" and self.parameters(r) == found and self.only_paired(r, found) for r in readers)

    def clip(self, x: str, y: str, found: Parameters) -> None:
        """`y` is `x` within what the type can say."""
        low, high = found.range
        if self.opset < 11:
            self.emit(helper.make_node("Clip", [x], [y], min=float(low), max=float(high)))
            return
        bounds = [self.naming.made(y, end) for end in ("low", "high")]
        self.made |= dict(zip(bounds, (low, high), strict=True))
        self.emit(helper.make_node("Clip", [x, *bounds], [y]))

    # -- every other node ---------------------------------------------------------------------------------------------------------------

    def keep(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type in PAIR and node.domain == CONTRIB:
            copy.domain = ""
        for i, name in enumerate(copy.input):
            copy.input[i] = self.alias.get(name, name)
        if self.known(copy):
            return
        if copy.op_type in WEIGHTED:
            self.within_reach(copy)
        self.emit(copy)
        if copy.input and copy.input[0] in self.held and (copy.op_type in MOVES or self.pads_alike(copy)):
            self.held |= dict.fromkeys(copy.output, self.held[copy.input[0]])
        if copy.op_type in WEIGHTED:
            self.weighted(copy)
        elif copy.op_type in ("Add", "Sub", "Mul"):
            self.constant_operand(copy)

    def pads_alike(self, node: onnx.NodeProto) -> bool:
        """Is this a Pad whose new elements its operand's quantization states exactly?"""
        if node.op_type != "Pad" or self.opset < 11 or any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
            return node.op_type == "Pad" and self.opset >= 11
        value = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        if value is None:
            return False
        params = self.held[node.input[0]]
        steps = float(value.reshape(-1)[0]) / params.scale
        return abs(steps - round(steps)) < 1e-4 and -128 <= round(steps) + params.zero_point <= 127

    def emit(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        self.made_by |= dict.fromkeys(node.output, node)

    def known(self, node: onnx.NodeProto) -> bool:
        """Compute the node here, if it rearranges a constant, or computes a scale. A rounded constant, rearranged, is still one."""
        arrays = [self.array(i) if i else None for i in node.input]
        if any(i and a is None for i, a in zip(node.input, arrays, strict=True)) or any(a.HasField("g") for a in node.attribute):
            return False
        moves = node.op_type in _REARRANGES or node.op_type == "Cast"
        if node.op_type in (*PAIR, *RANDOM, "Dropout") or not (moves or sum(a.size for a in arrays if a is not None) <= _SMALL):
            return False
        results = self.evaluated(node, arrays)
        if results is None:
            return False
        self.made |= dict(zip(node.output, results, strict=True))
        if moves and node.input[0] in self.rounded and results[0].dtype.kind == "f":
            before, one = self.rounded[node.input[0]], node.op_type == "Cast"
            parts = [[a] * len(results) if one else self.evaluated(node, [a, *arrays[1:]]) for a in (before.value, before.scale, before.zero_point)]
            for name, value, scale, zero in zip(node.output, *(p or [] for p in parts), strict=True):
                self.rounded[name] = replace(before, value=value, scale=scale, zero_point=zero)
        return True

    def evaluated(self, node: onnx.NodeProto, arrays: list[np.ndarray | None]) -> list[np.ndarray] | None:
        """A node's results from its operands; None where the reference implementation doesn't know them."""
        ports = [[helper.make_empty_tensor_value_info(n) for n in dict.fromkeys(names) if n] for names in (node.input, node.output)]
        model = helper.make_model(helper.make_graph([node], "node", *ports), opset_imports=self.source.opset_import)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                results = ReferenceEvaluator(model).run(None, {n: a for n, a in zip(node.input, arrays, strict=True) if n})
        except Exception:  # it raises whatever its operators raise
            return None
        return [np.asarray(r) for r in results] if all(isinstance(r, (np.ndarray, np.generic)) for r in results) else None

    def within_reach(self, node: onnx.NodeProto) -> None:
        """Weights that int8 can't say, of a product whose other operand the file rounds: as a longer sum of such that it can (`summands`)."""
        x, weight = node.input[0], self.rounded.get(node.input[1])
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        found = summands(node.op_type, attributes, weight) if weight is not None and x in self.held and self.opset >= 11 else None
        if found is None or isinstance(weight_scales(node.op_type, attributes, found[2]), str):
            return
        axis, again, parts = found
        made, operands = self.naming.made, [x]
        for i, ends in enumerate(again):
            operands.append(x if ends is None else made(node.output[0], f"again{i}"))
            if ends is not None:
                bounds = [made(operands[-1], what) for what in ("from", "to", "along")]
                self.made |= {name: np.array([n], np.int64) for name, n in zip(bounds, (*ends, axis), strict=True)}
                self.emit(helper.make_node("Slice", [x, *bounds], [operands[-1]], name=operands[-1]))
                self.state(operands[-1], self.held[x])
        node.input[0], node.input[1] = made(node.output[0], "operands"), made(node.output[0], "weight")
        self.emit(helper.make_node("Concat", operands, [node.input[0]], name=node.input[0], axis=axis))
        self.state(node.input[0], self.held[x])
        self.rounded[node.input[1]] = parts
        self.made[node.input[1]] = np.asarray(parts.value * parts.scale, np.float32)

    def weighted(self, node: onnx.NodeProto) -> None:
        """The weights and bias of a convolution or product, where they are stated in integers."""
        y, attributes = node.output[0], {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight, x = self.rounded.get(node.input[1]), node.input[0]
        if weight is None:
            return
        if y in self.dynamic and x not in self.held:
            self.trained.calibrated.add(x)
            self.note(node, f"taken back to a product of reals from {self.dynamic[y]}: the range of its activations, looked up in every run, is calibrated")
        scales = weight_scales(node.op_type, attributes, weight)
        self.trained.integer.add(y)
        if isinstance(scales, str):
            known = x in self.held or x in self.trained.calibrated
            ways = "what they stand for is computed in float; requantize makes 8 bits of all, and --weights int4 stores weights alone in 4"
            self.note(node, f"{scales}; {'they are quantized anew' if known else ways}")
            return
        self.trained.weights[y] = scales
        lowest = int((weight.value - weight.zero_point == -128).sum())
        if lowest:
            self.note(node, f"{lowest} of its weights are -128; they become -127, the least here")
        bias, held = self.rounded.get(node.input[2]) if len(node.input) > 2 else None, self.held.get(x)
        if bias is not None and held is not None and (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) == (1.0, 1.0):
            unit = np.float64(held.scale) * scales  # what a bias's scale states in float32
            if bias.value.shape == unit.shape and (unit.astype(np.float32) == bias.scale).all() and not bias.zero_point.any():
                self.trained.biases[y] = bias.value * unit

    def constant_operand(self, node: onnx.NodeProto) -> None:
        constants = [self.rounded[i].params for i in node.input if i in self.rounded]
        if len(constants) == 1 and isinstance(constants[0], QParams):
            self.trained.constants[node.output[0]] = constants[0]
        elif len(constants) == 1:
            self.note(node, f"its constant operand: {constants[0]}; computed in float32")

    # -- the end ------------------------------------------------------------------------------------------------------------------------

    def finished(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        graph = model.graph
        for output in graph.output:
            if output.name in self.alias and output.name not in self.made_by:
                self.emit(helper.make_node("Identity", [self.alias[output.name]], [output.name]))
        used = {name for node in self.nodes for name in node.input} | self.outputs
        tensors = [t for t in graph.initializer if t.name in used and t.name not in self.made]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(tensors)
        graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v).reshape(np.shape(v)), k) for k, v in self.made.items() if k in used)
        return model
