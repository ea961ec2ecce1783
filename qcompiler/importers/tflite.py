"""A TFLite network as an ONNX model in memory: the same tensors, an operator at a time, images NHWC as in the file.

    x8 -> CONV_2D, fused RELU -> y8    -->    x = DequantizeLinear(x8); y8 = QuantizeLinear(Relu(Conv(x, DequantizeLinear(w8), DequantizeLinear(b32))))

Scales, zero points and integers are the file's; `qdq.py` takes them over. The transpositions around what ONNX defines for NCHW go again when the compiler
brings images into the layout that they had. An int32 bias has the scales' product as its scale, which is what its integers are added to, whatever scale
the file states. A product of float activations with int8 weights rounds its activations as it runs, and is written so (DynamicQuantizeLinear).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.base.errors import ModelError, closest
from qcompiler.importers.nodes import Refused, cut_offer
from qcompiler.importers.qlinear import CONTRIB
from qcompiler.importers.states import declare
from qcompiler.importers.tflite_complex import COMPLEX, ON_COMPLEX
from qcompiler.importers.tflite_file import DAMAGED, RESOURCE, Network, Operator, read_network
from qcompiler.importers.tflite_graph import Graph
from qcompiler.importers.tflite_operators import converter
from qcompiler.importers.tflite_state import up_to, with_ports, without_variables
from qcompiler.runtime.reference import LiteRt

OPSET = 21  # the first whose QuantizeLinear knows 16 bits
SHOWN = 8  # refused operators in one error
_ADVICE = "replace it before conversion (for LiteRT alone that would do: it may be a kernel of the program that runs the network), or cut the network before it"


@dataclass(frozen=True)
class TfliteFile:
    """A `Origin`: a TFLite file, up to the tensors `cut` where some are named: what stands behind them need not be known here."""

    path: Path
    cut: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def read(self) -> tuple[onnx.ModelProto, str]:
        network, digest = self._network()
        return _Translation(str(self.path), network).run(), digest

    def elsewhere(self) -> LiteRt:
        whole, _ = read_network(self.path)
        ported = self._ported(whole)
        network = _cut(self.where, ported, self.cut) if self.cut else ported
        names = [t.name for t in network.tensors]
        inputs = {names[i]: i for i in (*network.inputs, *(s.port for s in network.states))}
        outputs = {names[i]: i for i in network.outputs} | {names[s.next]: s.value for s in network.states}
        custom = any(operator.op == "CUSTOM" for operator in network.operators)
        if ported.states and (self.cut or any(t.dtype == RESOURCE for t in whole.tensors)):
            return LiteRt(without_variables(self.path.read_bytes(), ported, list(outputs.values())), inputs, outputs, False, custom)
        return LiteRt(str(self.path), inputs, outputs, bool(self.cut), custom)

    def _network(self) -> tuple[Network, str]:
        network, digest = read_network(self.path)
        network = self._ported(network)
        if not self.cut:
            return network, digest
        return _cut(self.where, network, self.cut), hashlib.sha256(f"{digest} {self.cut}".encode()).hexdigest()

    def _ported(self, network: Network) -> Network:
        try:
            return with_ports(network)
        except Refused as reason:
            raise ModelError(f"{self.where}: {reason}") from reason
        except DAMAGED as error:
            why = f"{type(error).__name__}: {str(error)[:120]}"
            raise ModelError(f"{self.where}: what it says of its variables contradicts itself ({why}). Export or download it again") from error


def _cut(where: str, network: Network, wanted: Sequence[str]) -> Network:
    """The network with the outputs `wanted`, and what they are computed from. Raises ModelError for a name that no operator computes."""
    places = {network.tensors[i].name: i for operator in network.operators for i in operator.outputs if i >= 0}
    for name in wanted:
        if name not in places:
            own = ", ".join(network.tensors[i].name for i in network.outputs)
            raise ModelError(f"{where}: outputs: no operator computes '{name}'.{closest(name, list(places))} Its own outputs: {own}")
    return up_to(network, [places[name] for name in dict.fromkeys(wanted)])


class _Translation(Graph):
    def __init__(self, where: str, network: Network) -> None:
        super().__init__(network.tensors, {*network.outputs, *(s.next for s in network.states)})
        self.where, self.network = where, network

    def run(self) -> onnx.ModelProto:
        if not self.network.outputs:
            raise ModelError(f"{self.where}: the model has no outputs")
        self.check_known()
        states = self.network.states
        inputs = [self.input(i) for i in (*self.network.inputs, *(s.port for s in states))]
        refusals: list[str] = []
        lost: set[int] = set()
        for operator in self.network.operators:
            if lost.isdisjoint(operator.inputs):
                try:
                    self.translate(operator)
                    continue
                except Refused as reason:
                    refusals.append(f"{self.spelled(operator)}: {reason}")
            lost |= set(operator.outputs)
        if refusals:
            shown = refusals[:SHOWN] + ([f"and {len(refusals) - SHOWN} operators more"] if len(refusals) > SHOWN else [])
            raise ModelError(f"{self.where}: {'; '.join(shown)}")
        outputs = [self.output(i) for i in dict.fromkeys((*self.network.outputs, *(s.next for s in states)))]
        used = {name for node in self.nodes for name in node.input} | {o.name for o in outputs}
        initializers = [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, "tflite", inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        declare(model, {self.tensors[s.port].name: (self.tensors[s.next].name, s.initial) for s in states})
        return model

    def check_known(self) -> None:
        """Raises ModelError that names every kind of operator without a translation, and how many there are of each."""
        unknown: Counter[str] = Counter()
        for operator in self.network.operators:
            if operator.custom.startswith("Flex"):
                unknown[f"TensorFlow's {operator.custom.removeprefix('Flex')} (a Flex operator)"] += 1
            elif converter(operator) is None:
                unknown[f"the custom operator {operator.custom}" if operator.op == "CUSTOM" else operator.op] += 1
        if unknown:
            listed = ", ".join(f"{name}{f' ({count} times)' if count > 1 else ''}" for name, count in sorted(unknown.items()))
            raise ModelError(f"{self.where}: no conversion exists for {listed}; {_ADVICE}{self.offer()}")

    def offer(self) -> str:
        """The tensors that unknown operators, and what reads their results, need, as an option; empty where they need the inputs alone."""
        lost, ends, varies = set[int](), set(self.network.outputs), {*self.network.inputs, *(s.port for s in self.network.states)}
        for operator in self.network.operators:
            if not varies.isdisjoint(operator.inputs):
                varies |= set(operator.outputs)
            if converter(operator) is None or not lost.isdisjoint(operator.inputs):
                lost |= set(operator.outputs)
                ends |= set(operator.inputs)
        made = [i for operator in self.network.operators for i in operator.outputs]
        return cut_offer([self.tensors[i].name for i in made if i in (ends & varies) - lost])

    def spelled(self, operator: Operator) -> str:
        return f"operator {self.network.operators.index(operator)} ({operator.op}, of '{self.tensors[operator.outputs[0]].name if operator.outputs else ''}')"

    def translate(self, operator: Operator) -> None:
        if not operator.outputs or any(o < 0 or o in self.reals or self.tensors[o].holds for o in operator.outputs):
            raise Refused("its results are missing, or computed by another operator too")
        for i in operator.inputs:
            if i >= 0 and i not in self.reals and self.tensors[i].data is None:
                raise Refused(f"its operand '{self.tensors[i].name}' is computed by no operator before it")
        self.current = self.tensors[operator.outputs[0]].name
        try:
            convert = converter(operator)
            assert convert is not None, operator  # `check_known`
            if complex_ := [self.tensors[i] for i in operator.inputs if i >= 0 and self.tensors[i].dtype == COMPLEX]:
                if operator.op not in ON_COMPLEX:
                    raise Refused(f"it computes with complex numbers; supported for these: {', '.join(ON_COMPLEX)}")
                if constant := [t.name for t in complex_ if t.data is not None]:
                    raise Refused(f"its operand '{constant[0]}' is a constant of complex numbers; supported: those that a Fourier transform makes")
                convert = ON_COMPLEX[operator.op]
            convert(self, operator)
        except DAMAGED as error:
            raise Refused(f"its operands or options contradict its definition ({type(error).__name__}: {str(error)[:120]})") from error

    # -- the edges ----------------------------------------------------------------------------------------------------------------------

    def input(self, index: int) -> onnx.ValueInfoProto:
        tensor = self.tensors[index]
        if index in self.reals or tensor.data is not None:
            raise ModelError(f"{self.where}: input '{tensor.name}' is listed twice, or a constant")
        if tensor.dtype == COMPLEX:
            raise ModelError(f"{self.where}: input '{tensor.name}' holds complex numbers; take in their real and imaginary parts")
        self.reals[index] = self.dequantized(tensor.name, tensor, self.fresh(tensor.name, "real")) if tensor.quantized else tensor.name
        return helper.make_tensor_value_info(tensor.name, _element(tensor.dtype), [None if d < 0 else d for d in tensor.shape])

    def output(self, index: int) -> onnx.ValueInfoProto:
        tensor = self.tensors[index]
        if index not in self.reals and tensor.data is None:
            raise ModelError(f"{self.where}: output '{tensor.name}' is computed by no operator")
        if tensor.dtype == COMPLEX:
            raise ModelError(f"{self.where}: output '{tensor.name}' holds complex numbers; hand out their real and imaginary parts, or their magnitude")
        if tensor.data is not None:
            self.constants[tensor.name] = tensor.data
        elif tensor.quantized and index in self.network.inputs:
            pass
        elif not tensor.quantized and self.reals[index] != tensor.name:
            self.nodes.append(helper.make_node("Identity", [self.reals[index]], [tensor.name], name=tensor.name))
        return helper.make_tensor_value_info(tensor.name, _element(tensor.dtype), None)


def _element(dtype: str) -> int:
    return int(TensorProto.DataType.Value({"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())))
