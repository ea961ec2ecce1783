"""The ONNX graph that a TFLite network becomes, and what the translations of its operators ask of it: names, constants, float forms, results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompiler.importers.nodes import Refused
from qcompiler.importers.tflite_file import Operator, Tensor

TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
_ACTIVATIONS = {"NONE": None, "RELU": (0.0, None), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0), "RELU_0_TO_1": (0.0, 1.0)}
_FUSED = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6", "TANH", "SIGN_BIT")  # ActivationFunctionType


class Graph:
    """tensors: of the network; outputs: those that it hands out. `nodes`, `constants`: what has been written. `reals`: tensor -> the name of its float
    form, or its own where it holds no quantized numbers. `current`: the tensor that is computed now, beside which new names are made."""

    def __init__(self, tensors: list[Tensor], outputs: set[int]) -> None:
        self.tensors, self.outputs = tensors, outputs
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.reals: dict[int, str] = {}
        self.names = {t.name for t in tensors}
        self.current = ""

    def fresh(self, *parts: str) -> str:
        base = name = "/".join(parts)
        count = 1
        while name in self.names:
            count += 1
            name = f"{base}{count}"
        self.names.add(name)
        return name

    def constant(self, array: np.ndarray, what: str = "constant") -> str:
        name = self.fresh(self.current, what)
        self.constants[name] = array
        return name

    def node(self, op: str, inputs: list[str], what: str = "", *, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [self.fresh(self.current, what or op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names

    def real(self, index: int, perm: list[int] | None = None) -> str:
        """The float form of a tensor, transposed by `perm`; a tensor that holds no quantized numbers is itself."""
        tensor = self.tensors[index]
        if index in self.reals:
            return self.reals[index] if perm is None else self.node("Transpose", [self.reals[index]], perm=perm)[0]
        if tensor.data is None:
            raise Refused(f"its operand '{tensor.name}' has no value")
        data, axis = tensor.data, tensor.axis
        if perm is not None:
            data, axis = np.ascontiguousarray(data.transpose(perm)), perm.index(axis) if tensor.data.ndim else 0
        name = tensor.name if perm is None else self.fresh(tensor.name, "transposed")
        stored = self.fresh(name, "stored") if tensor.quantized else name
        self.constants[stored] = data
        if not tensor.quantized:
            return name
        return self.dequantized(stored, tensor, name if perm is not None else self.fresh(name, "real"), axis)

    def dequantized(self, stored: str, tensor: Tensor, name: str, axis: int | None = None) -> str:
        parameters = self.parameters(tensor)
        along = {} if tensor.scale is None or tensor.scale.size == 1 else {"axis": tensor.axis if axis is None else axis}
        self.nodes.append(helper.make_node("DequantizeLinear", [stored, *parameters], [name], name=self.fresh(name, "dq"), **along))
        return name

    def parameters(self, tensor: Tensor) -> list[str]:
        """The names of a tensor's scale and zero point; of int32 tensors, which have none, the scale alone."""
        assert tensor.scale is not None and tensor.zero_point is not None
        if tensor.dtype == "int64" or (tensor.dtype == "int32" and tensor.zero_point.any()):
            raise Refused(f"tensor '{tensor.name}' holds quantized {tensor.dtype}; supported: 8 and 16 bits, and 32 for biases")
        one = tensor.scale.size == 1
        arrays = [tensor.scale.reshape(()) if one else tensor.scale]
        if tensor.dtype != "int32":
            zero = tensor.zero_point.astype(tensor.dtype)
            arrays.append(zero.reshape(()) if one else zero)
        names = [f"{tensor.name}/{what}" for what in ("scale", "zero_point")][: len(arrays)]
        self.constants |= dict(zip(names, arrays, strict=True))
        return names

    def bind(self, index: int, value: str) -> None:
        """`value` is the tensor `index`; where that holds quantized numbers, it is rounded."""
        tensor, made_here = self.tensors[index], bool(self.nodes) and value in self.nodes[-1].output
        if not tensor.quantized:
            if made_here:  # the node that computes it bears its name
                place = list(self.nodes[-1].output).index(value)
                self.nodes[-1].output[place] = self.nodes[-1].name = value = tensor.name
            self.reals[index] = value
            return
        stored = self.fresh(tensor.name, "stored")
        self.quantized(value, tensor, stored)
        handed_out = index in self.outputs  # rounded like any other value, and handed out as the integers that stand for it
        self.reals[index] = self.dequantized(stored, tensor, self.fresh(tensor.name, "real") if handed_out else tensor.name)
        if handed_out:
            self.quantized(self.reals[index], tensor, tensor.name)

    def quantized(self, value: str, tensor: Tensor, name: str) -> None:
        along = {} if tensor.scale is None or tensor.scale.size == 1 else {"axis": tensor.axis}
        self.nodes.append(helper.make_node("QuantizeLinear", [value, *self.parameters(tensor)], [name], name=self.fresh(name, "q"), **along))

    # -- operands -------------------------------------------------------------------------------------------------------------------------

    def operand(self, op: Operator, place: int) -> Tensor:
        """Raises Refused where it is left out."""
        if not self.has(op, place):
            raise Refused(f"its operand {place} is missing")
        return self.tensors[op.inputs[place]]

    @staticmethod
    def has(op: Operator, place: int) -> bool:
        return place < len(op.inputs) and op.inputs[place] >= 0

    def value(self, op: Operator, place: int = 0, perm: list[int] | None = None) -> str:
        """The float form of operand `place`."""
        self.operand(op, place)
        return self.real(op.inputs[place], perm)

    def rank(self, op: Operator, place: int = 0) -> int:
        return len(self.operand(op, place).shape)

    def ints(self, op: Operator, place: int, what: str) -> list[int]:
        """A constant operand of integers. Raises Refused for one that is computed."""
        data = self.operand(op, place).data
        if data is None or data.dtype.kind not in "iu":
            raise Refused(f"its {what} (operand '{self.operand(op, place).name}') is computed when the network runs; supported: constants")
        return [int(v) for v in data.reshape(-1)]

    def shape_of(self, op: Operator, place: int) -> str:
        """A shape, constant or computed, as int64."""
        return self.cast(op, place) if self.operand(op, place).data is None else self.int64(self.ints(op, place, "shape"))

    def cast(self, op: Operator, place: int) -> str:
        """Integers, constant or computed, as int64."""
        return self.node("Cast", [self.value(op, place)], to=onnx.TensorProto.INT64)[0]

    def int64(self, numbers: list[int]) -> str:
        return self.constant(np.array(numbers, np.int64), "numbers")

    # -- results --------------------------------------------------------------------------------------------------------------------------

    def result(self, op: Operator, value: str) -> None:
        """`value` is what the operator computes; its fused activation comes behind."""
        self.bind(op.outputs[0], self.activated(value, self.fused(op)))

    @staticmethod
    def fused(op: Operator) -> str:
        return _FUSED[op.option("FusedActivationFunction")] if hasattr(op.options, "FusedActivationFunction") else "NONE"

    def activated(self, value: str, name: str) -> str:
        """Raises Refused for an activation that no kernel has."""
        if name not in _ACTIVATIONS:
            raise Refused(f"its fused activation {name} has no kernel in LiteRT either; supported: {', '.join(_ACTIVATIONS)}")
        bounds = _ACTIVATIONS[name]
        if bounds is None:
            return value
        if bounds == (0.0, None):
            return self.node("Relu", [value])[0]
        return self.node("Clip", [value, *(self.constant(np.array(b, np.float32), "bound") for b in bounds)])[0]

    def chain(self, op: Operator, kind: str, inputs: list[str], **attributes: Any) -> None:
        """The whole operator is one node."""
        self.result(op, self.node(kind, inputs, **attributes)[0])
