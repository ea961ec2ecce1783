"""What a TFLite network keeps from call to call, as inputs and outputs: its variables, and the states that recurrent operators have inside.

    CALL_ONCE: v := a;  READ_VARIABLE(v) -> x;  ASSIGN_VARIABLE(v, y)    -->    x: an input, a in the first call;  y: the output that is its next value
    SVDF(x, ..., s) -> y, of a variable tensor s                         -->    SVDF(x, ..., s) -> y, s/next, and the same

What is read after it was written in the same call is what was written; a variable that is never written is a constant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.importers.nodes import Refused, check_bytes
from qcompiler.importers.tflite_file import RESOURCE, Network, Operator, State, Tensor, schema

KEPT = "ASSIGN_VARIABLE"
"""An operator of a network with ports: its result is its operand, the next value of a state."""
STATEFUL = {
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (18, 19), "BIDIRECTIONAL_SEQUENCE_LSTM": (35, 36, 37, 38), "LSTM": (18, 19), "RNN": (4,), "SVDF": (4,),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (4,), "BIDIRECTIONAL_SEQUENCE_RNN": (4, 8),
}  # fmt: skip
"""Operator -> its operands that are variable tensors, which a call writes too. With ports it has a result more for each, in this order."""
_ABOUT_VARIABLES = ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE")


def with_ports(network: Network) -> Network:
    """The network without variables, and its `states`. Raises Refused for a variable whose first value is not known, and for one that has two forms."""
    used = any(t.variable for t in network.tensors) or any(o.op in _ABOUT_VARIABLES for o in network.operators)
    return _Walk(network).run() if used else network


def up_to(network: Network, outputs: list[int]) -> Network:
    """The operators that `outputs` and the states behind them are computed by."""
    needed, states = set(outputs), list[State]()
    while True:
        operators = list[Operator]()
        for operator in reversed(network.operators):
            if not needed.isdisjoint(operator.outputs):
                needed |= set(operator.inputs)
                operators.append(operator)
        kept = [s for s in network.states if s.port in needed]
        if len(kept) == len(states):
            return replace(network, operators=operators[::-1], outputs=outputs, states=kept)
        states = kept
        needed |= {s.next for s in states}


def without_variables(data: bytes, network: Network, outputs: list[int]) -> bytes:
    """The file of `network`, which has ports, with an input for each variable, and the outputs `outputs`; their next values are tensors (`State.value`)."""
    import flatbuffers  # of the extra `tflite`

    table: Any = schema()
    model = table.ModelT.InitFromObj(table.Model.GetRootAs(data, 0))
    graph = model.subgraphs[0]
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    about = {int(getattr(table.BuiltinOperator, op)) for op in _ABOUT_VARIABLES}
    for read in (o for o in graph.operators if codes[o.opcodeIndex] == table.BuiltinOperator.READ_VARIABLE):
        constant = network.tensors[read.outputs[0]].data  # of a variable that is never written
        if constant is not None:
            graph.tensors[read.outputs[0]].buffer = len(model.buffers)
            model.buffers.append(table.BufferT())
            model.buffers[-1].data = np.frombuffer(constant.tobytes(), np.uint8)
    graph.operators = [o for o in graph.operators if codes[o.opcodeIndex] not in about]
    for stored, operator in zip(graph.operators, (o for o in network.operators if o.op != KEPT), strict=True):
        stored.inputs = np.array(operator.inputs, np.int32)
    ports = [s.port for s in network.states if not graph.tensors[s.port].isVariable]
    graph.inputs, graph.outputs = (np.array(v, np.int32) for v in ([*graph.inputs, *ports], list(dict.fromkeys(outputs))))
    for name in ("signatureDefs", "metadata"):
        setattr(model, name, None)
    builder = flatbuffers.Builder(len(data) + 1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


class _Walk:
    """`now`: variable (its name, or the index of a variable tensor) -> the tensor that has its value at this place."""

    def __init__(self, network: Network) -> None:
        self.network, self.tensors = network, list(network.tensors)
        self.now: dict[str | int, int] = {}
        self.same: dict[int, int] = {}  # a tensor that was read -> what it is
        self.first: dict[str | int, int] = {}  # variable -> the tensor of its value before the call
        self.initial: dict[str | int, Tensor] = {}
        self.operators: list[Operator] = []
        self.names = {t.name for t in network.tensors if t.dtype != RESOURCE}

    def run(self) -> Network:
        handles = handles_of(self.network)
        for operator in self.network.operators:
            if operator.op == "CALL_ONCE":
                self.call_once(operator)
            elif operator.op == "READ_VARIABLE":
                self.read(handles, operator)
            elif operator.op == "ASSIGN_VARIABLE":
                self.now[handle(handles, operator)] = self.same.get(operator.inputs[1], operator.inputs[1])
            elif operator.op != "VAR_HANDLE":
                self.operators.append(self.computed(operator))
        outputs = [self.same.get(o, o) for o in self.network.outputs]
        if outputs != self.network.outputs or any(self.tensors[i].variable for i in (*self.network.inputs, *outputs)):
            raise Refused("a variable is an input or output of the network itself; supported: variables that only its operators read and write")
        states = [s for variable in self.first if (s := self.state(variable)) is not None]
        return Network(self.tensors, self.operators, self.network.inputs, outputs, {}, states)

    # -- operators ----------------------------------------------------------------------------------------------------------------------

    def call_once(self, operator: Operator) -> None:
        called = self.network.called[operator.option("InitSubgraphIndex")]
        handles = handles_of(called)
        for inner in called.operators:
            if inner.op == "ASSIGN_VARIABLE":
                variable, value = handle(handles, inner), called.tensors[inner.inputs[1]]
                if value.data is None:
                    raise Refused(f"the first value of variable '{variable}' is computed (by what CALL_ONCE calls); supported: constants")
                self.initial[variable] = value
            elif inner.op != "VAR_HANDLE":
                raise Refused(f"CALL_ONCE calls {inner.op}; supported: ASSIGN_VARIABLE of constants")

    def read(self, handles: dict[int, str], operator: Operator) -> None:
        variable, (result,) = handle(handles, operator), operator.outputs
        if variable not in self.now:
            self.now[variable] = self.first[variable] = result
        self.same[result] = self.now[variable]
        self.alike(variable, result, self.now[variable])

    def computed(self, operator: Operator) -> Operator:
        """The operator on the values that variables have here; it has results for those that it writes."""
        written = [operator.inputs[i] for i in STATEFUL.get(operator.op, ()) if i < len(operator.inputs) and self.is_variable(operator.inputs[i])]
        for i in operator.inputs:
            if self.is_variable(i) and i not in self.now:
                self.now[i] = self.first[i] = i
        inputs = tuple(self.now[i] if self.is_variable(i) else self.same.get(i, i) for i in operator.inputs)
        more = tuple(self.added(replace(self.tensors[i], name=self.named(f"{self.tensors[i].name}/next"), variable=False)) for i in written)
        self.now |= dict(zip(written, more, strict=True))
        return replace(operator, inputs=inputs, outputs=operator.outputs + more)

    def is_variable(self, index: int) -> bool:
        """A variable tensor, no handle."""
        return index >= 0 and self.tensors[index].variable and self.tensors[index].dtype != RESOURCE

    # -- states -------------------------------------------------------------------------------------------------------------------------

    def state(self, variable: str | int) -> State | None:
        """None for one that is never written, which is a constant from now on."""
        port, last = self.first[variable], self.now[variable]
        tensor, initial = self.tensors[port], self.first_value(variable)
        if last == port:
            self.tensors[port] = replace(tensor, data=initial, variable=False)
            return None
        self.tensors[port] = replace(tensor, variable=False)
        if isinstance(variable, int):
            return State(port, last, variable, initial)
        self.names.discard(tensor.name)
        self.tensors[port] = replace(tensor, name=self.named(variable))
        self.alike(variable, port, last)
        kept = self.added(replace(self.tensors[port], name=self.named(f"{self.tensors[port].name}/next")))
        self.operators.append(Operator(KEPT, "", (last,), (kept,)))
        return State(port, kept, last, initial)

    def first_value(self, variable: str | int) -> np.ndarray:
        """LiteRT begins with variable tensors of real zeros."""
        tensor = self.tensors[self.first[variable]]
        if isinstance(variable, int):
            if -1 in tensor.shape:
                raise Refused(f"its state '{tensor.name}' has a shape that the file leaves open")
            check_bytes(f"tensor '{tensor.name}'", tensor.shape, 1)
            zero = 0 if tensor.zero_point is None else int(tensor.zero_point[0])
            return np.full(tensor.shape, zero, tensor.dtype)
        known = self.initial.get(variable)
        if known is None or known.data is None:
            raise Refused(f"variable '{variable}' is read before anything is written to it, and CALL_ONCE gives it no first value. Give it one before export")
        if (known.dtype, known.data.shape) != (tensor.dtype, tensor.shape):
            first = f"{known.dtype} {list(known.data.shape)}"
            raise Refused(f"the first value of variable '{variable}' is {first}, and what is read {tensor.dtype} {list(tensor.shape)}")
        return known.data

    def alike(self, variable: str | int, read: int, written: int) -> None:
        """Raises Refused unless a variable is read as it was written."""
        a, b = self.tensors[read], self.tensors[written]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise Refused(f"variable '{variable}' is read as {a.dtype} {list(a.shape)}, and {b.dtype} {list(b.shape)} is written to it")
        if not (_equal(a.scale, b.scale) and _equal(a.zero_point, b.zero_point)):
            raise Refused(f"variable '{variable}' is read with another scale or zero point than it is written with")

    def added(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def named(self, name: str) -> str:
        base, count = name, 1
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name


def handles_of(network: Network) -> dict[int, str]:
    """Tensor -> the name of the variable that it is a handle of."""
    made = [o for o in network.operators if o.op == "VAR_HANDLE"]
    return {o.outputs[0]: "/".join(filter(None, (o.text("Container"), o.text("SharedName")))) or "variable" for o in made}


def handle(handles: dict[int, str], operator: Operator) -> str:
    if operator.inputs[0] not in handles:
        raise Refused(f"the variable of {operator.op} is made by no VAR_HANDLE")
    return handles[operator.inputs[0]]


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
