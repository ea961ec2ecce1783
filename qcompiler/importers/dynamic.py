"""What dynamic quantization wrote, taken back to the float network that it came from; the weights stay integers with their scale.

    x -> DynamicQuantizeLinear -> (q, s, z);   MatMulInteger(q, w8, z, zw) -> Cast -> Mul by s and constants c    -->    MatMul(x, DequantizeLinear(w8, c, zw))
    ... -> Add of Cast(Floor(b / (s * c)))  -> Cast -> ...    -->    ... and Add of b, which older files round in every run
    ConvInteger, DynamicQuantizeMatMul and MatMulIntegerToFloat (com.microsoft)                                    -->    likewise
    x -> DynamicQuantizeLinear -> (q, s, z);   DequantizeLinear(QuantizeLinear(x, s, z) or q, s, z)                --> x
    DynamicQuantizeLSTM (com.microsoft)                                                                            -->    LSTM of the reals of its weights
    x -> DynamicQuantizeLinear -> QAttention (com.microsoft)                                                       -->    Attention, likewise

Such a file rounds activations to 8 bits under a scale that it finds in every run; a compiled network has one from calibration. What doesn't have this form
stays, and is computed as it is defined (`integers.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.base.value_ids import Naming
from qcompiler.importers.control import captured
from qcompiler.importers.qlinear import CONTRIB

_PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
ON_INTEGERS = "qcompiler_on_integers"
"""An attribute of LSTMs: the file computes their products on integers."""
TAKEN_BACK = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def take_back(model: onnx.ModelProto, naming: Naming) -> tuple[onnx.ModelProto, dict[str, str]]:
    """(the model, result of a product of reals -> the operators that it replaces). A model without such operators is returned as it is."""
    if not any(n.op_type == "DynamicQuantizeLinear" or n.op_type in TAKEN_BACK for n in model.graph.node):
        return model, {}
    return _Finder(model, naming).run()


def real_lstms(model: onnx.ModelProto, naming: Naming) -> tuple[onnx.ModelProto, list[str]]:
    """The model with LSTM for DynamicQuantizeLSTM, and what is to be said of that. Operands: X, W int8 or uint8 [D, I, 4H], R [D, H, 4H], B, lengths, h, c, P,
    then scale and zero point of W and of R, [D] or [D, 4H]. One whose weights are computed, or are of other shapes, stays, and is refused by name."""
    tensors = {t.name: t for t in model.graph.initializer}

    def real(node: onnx.NodeProto, index: int, numbers: int) -> str | None:
        names = [*node.input, *[""] * 12]
        parts = [numpy_helper.to_array(tensors[n]) if n in tensors else None for n in (names[index], names[numbers], names[numbers + 1])]
        weight, scale, zero = parts
        if weight is None or scale is None or weight.ndim != 3:
            return None
        if any(p is not None and p.shape not in (weight.shape[:1], weight.shape[::2]) for p in (scale, zero)):
            return None
        along = [p.astype(np.float32).reshape(len(weight), 1, -1) for p in (scale, np.zeros(len(weight)) if zero is None else zero)]
        name = naming.made(node.output[0] or node.output[1], f"weight{index}")
        made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(((weight - along[1]) * along[0]).transpose(0, 2, 1), np.float32), name))
        return name

    if not any(n.op_type == "DynamicQuantizeLSTM" and n.domain == CONTRIB for n in model.graph.node):
        return model, []
    made, notes = onnx.ModelProto(), []
    made.CopyFrom(model)
    for node in made.graph.node:
        if node.op_type == "DynamicQuantizeLSTM" and node.domain == CONTRIB and len(node.input) > 8:
            w, r = real(node, 1, 8), real(node, 2, 10)
            if w is not None and r is not None:
                node.op_type, node.domain = "LSTM", ""
                node.input[:] = [node.input[0], w, r, *node.input[3:8]]
                node.attribute.append(helper.make_attribute(ON_INTEGERS, 1))
                said = "an LSTM of the reals that its integers stand for; the ranges of its activations, looked up in every run, are calibrated"
                notes.append(f"node '{node.name or w}' (DynamicQuantizeLSTM): taken back to {said}")
    return made, notes


def real_attentions(model: onnx.ModelProto, naming: Naming) -> tuple[onnx.ModelProto, list[str]]:
    """The model with Attention for QAttention, and what is to be said of that. Operands: x, W int8 or uint8 [C, N], bias, scale of x and of W ([] or [N]),
    mask, zero point of x and of W, past. One whose weights are computed, or that reads anything but a DynamicQuantizeLinear, stays, and is refused by name."""
    if not any(n.op_type == "QAttention" and n.domain == CONTRIB for n in model.graph.node):
        return model, []
    made, notes = onnx.ModelProto(), []
    made.CopyFrom(model)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    sources = {n.output[0]: n for n in model.graph.node if n.op_type == "DynamicQuantizeLinear"}
    for node in made.graph.node:
        names = [*node.input, *[""] * 9]
        x, weight, bias, scale, weight_scale, mask, zero, weight_zero, past = names[:9]
        source = sources.get(x)
        known = weight in tensors and weight_scale in tensors and (not weight_zero or weight_zero in tensors)
        if node.op_type != "QAttention" or source is None or [scale, zero] != list(source.output[1:]) or not known:
            continue
        numbers = tensors[weight].astype(np.float32) - (tensors[weight_zero].astype(np.float32) if weight_zero else np.float32(0))
        name = naming.made(node.output[0], "weight")
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(numbers * tensors[weight_scale], np.float32), name))
        node.op_type, node.input[:] = "Attention", [source.input[0], name, bias, mask, past]
        said = "an Attention of the reals that its integers stand for; the ranges of its activations, looked up in every run, are calibrated"
        notes.append(f"node '{node.name or node.output[0]}' (QAttention): taken back to {said}")
    return made, notes


@dataclass
class _Product:
    """One product: `result` = `op`(`x`, weights) [+ bias], computed by the nodes `gone` until now."""

    op: str
    x: str
    weight: str
    zero: str
    scale: np.ndarray | None  # float32; None: `scale_name`
    result: str
    node: onnx.NodeProto
    gone: list[onnx.NodeProto]
    scale_name: str = ""
    bias: str = ""

    def plain(self, naming: Naming) -> str:
        """The product itself, in front of the bias."""
        return naming.made(self.result, "product") if self.bias else self.result


@dataclass
class _Finder:
    model: onnx.ModelProto
    naming: Naming
    added: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.tensors = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.tensors[node.output[0]] = node.attribute[0].t
        self.outputs = {o.name for o in graph.output} | captured(graph)
        self.made_by: dict[str, onnx.NodeProto] = {o: n for n in graph.node for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def run(self) -> tuple[onnx.ModelProto, dict[str, str]]:
        products = [p for n in self.model.graph.node if (p := self.product(n)) is not None]
        at_end = {id(p.gone[-1]): p for p in products}
        gone = {id(n) for p in products for n in p.gone}
        rounded = {n.output[0]: x for n in self.model.graph.node if (x := self.rounded(n)) is not None}
        replaced = {p.plain(self.naming): " and ".join(dict.fromkeys(n.op_type for n in p.gone if n.op_type not in ("Cast", "Mul"))) for p in products}
        nodes: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            if id(node) in at_end:
                nodes += self.written(at_end[id(node)])
            if id(node) not in gone and node.output[0] not in rounded:
                if node.input and node.input[0] in rounded:
                    replaced |= dict.fromkeys(node.output, "DynamicQuantizeLinear")
                copied = onnx.NodeProto()
                copied.CopyFrom(node)
                copied.input[:] = [rounded.get(name, name) for name in node.input]
                nodes.append(copied)
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.node[:]
        model.graph.node.extend(self.read(nodes) if rounded else nodes)
        model.graph.initializer.extend(self.added)
        return model, replaced

    def rounded(self, node: onnx.NodeProto) -> str | None:
        """The value that a DequantizeLinear gives back, rounded under a scale that is found in every run; None for any other node."""
        if node.op_type != "DequantizeLinear" or node.output[0] in self.outputs:
            return None
        source, scale = self.made_by.get(node.input[0]), self.origin(node.input[1])
        if source is None or scale is None or scale.op_type != "DynamicQuantizeLinear":
            return None
        x, q = str(scale.input[0]), scale.output[0]
        if source.op_type == "QuantizeLinear":
            return x if source.input[0] == x and self.origin(source.input[1]) is scale else None
        return x if source is scale and node.input[0] == q else None

    def origin(self, name: str) -> onnx.NodeProto | None:
        """The node behind a value, casts left out."""
        node = self.made_by.get(name)
        return self.origin(node.input[0]) if node is not None and node.op_type in ("Cast", "Identity") else node

    def read(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Without the nodes whose results nothing reads any more."""
        wanted, kept = set(self.outputs), []
        for node in reversed(nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]

    def product(self, node: onnx.NodeProto) -> _Product | None:
        inputs = [*node.input, *[""] * 7]
        if node.domain not in ("", "ai.onnx", CONTRIB):
            return None
        if node.op_type == "DynamicQuantizeMatMul" and inputs[1] in self.tensors and inputs[2] in self.tensors:
            return _Product("MatMul", inputs[0], inputs[1], inputs[3], None, node.output[0], node, [node], inputs[2], inputs[4])
        source = self.made_by.get(inputs[0])
        if source is None or source.op_type != "DynamicQuantizeLinear" or inputs[1] not in self.tensors:
            return None
        x, (q, scale, zero) = source.input[0], source.output
        if node.op_type == "MatMulIntegerToFloat" and (inputs[0], inputs[2], inputs[4]) == (q, scale, zero) and inputs[3] in self.tensors:
            return _Product("MatMul", x, inputs[1], inputs[5], None, node.output[0], node, [node], inputs[3], inputs[6])
        if node.op_type not in _PRODUCTS or inputs[2] != zero or (inputs[3] and inputs[3] not in self.tensors):
            return None
        return self.scaled(_Product(_PRODUCTS[node.op_type], x, inputs[1], inputs[3], np.ones(1, np.float32), node.output[0], node, [node]), scale)

    def scaled(self, product: _Product, scale: str) -> _Product | None:
        """The product with the Cast and the multiplications that follow it, up to the one by `scale`; None where anything else reads what is between."""
        found, stated = False, None
        while not found:
            readers = self.readers.get(product.result, [])
            if len(readers) != 1 or product.result in self.outputs:
                return None
            (reader,) = readers
            if reader.op_type == "Add" and len(product.gone) == 1:
                bias = self.rounded_bias(reader.input[1] if reader.input[0] == product.result else reader.input[0], scale)
                if bias is None:
                    return None
                product.bias, stated = bias
            elif reader.op_type == "Cast" and product.gone[-1].op_type != "Cast":
                if helper.get_attribute_value(reader.attribute[0]) != TensorProto.FLOAT:
                    return None
            elif reader.op_type == "Mul" and len(product.gone) > 1:
                other = reader.input[1] if reader.input[0] == product.result else reader.input[0]
                maker = self.made_by.get(other)
                factors = list(maker.input) if maker is not None and maker.op_type == "Mul" and scale in maker.input else [other]
                for factor in factors:
                    if factor == scale and not found:
                        found = True
                    elif factor in self.tensors and (value := numpy_helper.to_array(self.tensors[factor])).size in (1, self.channels(product)):
                        assert product.scale is not None
                        product.scale = product.scale * value.astype(np.float32).reshape(-1)
                    else:
                        return None
            else:
                return None
            product.gone.append(reader)
            product.result = reader.output[0]
        same = stated is None or (product.scale is not None and np.allclose(stated, product.scale, rtol=1e-6, atol=0))
        return product if same else None

    def rounded_bias(self, name: str, scale: str) -> tuple[str, np.ndarray] | None:
        """(the constant b, the constant c) of Cast(Floor(b / (scale * c))), reshaped or not, as files add it to sums of products; None for anything else."""
        shape, node = None, self.made_by.get(name)
        if node is not None and node.op_type == "Reshape" and node.input[1] in self.tensors:
            shape, node = numpy_helper.to_array(self.tensors[node.input[1]]), self.made_by.get(node.input[0])
        for op in ("Cast", "Floor"):
            node = self.made_by.get(node.input[0]) if node is not None and node.op_type == op else None
        unit = self.made_by.get(node.input[1]) if node is not None and node.op_type == "Div" else None
        if node is None or unit is None or unit.op_type != "Mul" or scale not in unit.input or node.input[0] not in self.tensors:
            return None
        factor = self.tensors.get(unit.input[1] if unit.input[0] == scale else unit.input[0])
        bias = numpy_helper.to_array(self.tensors[node.input[0]])
        if factor is None or bias.dtype != np.float32:
            return None
        self.added.append(numpy_helper.from_array(bias if shape is None else bias.reshape(shape), self.naming.made(name, "bias")))
        return self.added[-1].name, numpy_helper.to_array(factor).astype(np.float32).reshape(-1)

    def channels(self, product: _Product) -> int:
        return int(self.tensors[product.weight].dims[0 if product.op == "Conv" else -1])

    def written(self, product: _Product) -> list[onnx.NodeProto]:
        made, plain = self.naming.made, product.plain(self.naming)
        y, channels = product.result, self.channels(product)
        scale = product.scale if product.scale is not None else numpy_helper.to_array(self.tensors[product.scale_name]).astype(np.float32).reshape(-1)
        kind = helper.tensor_dtype_to_np_dtype(self.tensors[product.weight].data_type)
        zero = numpy_helper.to_array(self.tensors[product.zero]).reshape(-1) if product.zero else np.zeros(1, kind)
        several = max(scale.size, zero.size) > 1
        names = made(y, "scale"), made(y, "zero")
        for name, array in zip(names, (scale, zero), strict=True):
            self.added.append(numpy_helper.from_array(np.broadcast_to(array, (channels,)).copy() if several else array.reshape(()), name))
        axis = 0 if product.op == "Conv" else len(self.tensors[product.weight].dims) - 1
        weight = helper.make_node("DequantizeLinear", [product.weight, *names], [made(y, "weight")], name=made(y, "weight"), axis=axis)
        real = helper.make_node(product.op, [product.x, made(y, "weight")], [plain], name=product.node.name or y)
        real.attribute.extend(product.node.attribute)
        return [weight, real] + ([helper.make_node("Add", [plain, product.bias], [y], name=made(y, "bias"))] if product.bias else [])
