"""FloatModel: a network as the rest of the compiler sees it, whatever file it came from."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm

from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import ModelError, closest
from qcompiler.base.memory import give_back
from qcompiler.base.tensor import TensorInfo
from qcompiler.base.value_ids import Naming
from qcompiler.importers.onnx import import_onnx
from qcompiler.importers.onnx_file import exactness, rounded
from qcompiler.importers.origin import AnyModel, Origin, cut_of, origin_of
from qcompiler.importers.states import States, take_states
from qcompiler.passes.graph import Graph, dtype_of, shape_of
from qcompiler.passes.sequence import CANONICAL, run


@dataclass(frozen=True, eq=False)
class FloatModel:
    """The canonical float module (docs/architecture.md) and what a user calls its inputs and outputs.

    Every floating tensor is float32, whatever the file's precision. `digest`: sha256 (hex) of what the network was read from and the input shapes.
    `sources`: value id -> (name, operator type) of the node in the file that computes it, folded ones included; `readers`: value id of the file
    -> the values computed from it directly. `fixed`: inputs of the file that are constants here, and their values as nested lists.
    `origin`: where it came from; `exactness`: the dB that another runtime on the origin comes near it at least (`onnx_file.exactness`).
    `rounded`: the outputs that are the integers of a quantization.
    `state`: input -> the output that is its next value: a session keeps them. `initial`: of those that don't begin with zeros, a number or nested lists.
    """

    module: tvm.IRModule
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    name: str
    digest: str
    sources: dict[str, tuple[str, str]]
    readers: dict[str, list[str]]
    origin: Origin
    exactness: float
    rounded: frozenset[str]
    fixed: dict[str, Any] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)
    initial: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def naming(self) -> Naming:
        """How its value ids are made and read."""
        return Graph.of(self.module).naming

    def account(self) -> dict[str, Any]:
        """What a manifest says of the network: its name, and what it takes to load the same from its file again."""
        more = {"fixed_inputs": self.fixed, "cut": cut_of(self.origin), "state": self.state, "initial": self.initial}
        return {"model": self.name, **{what: value for what, value in more.items() if value}}

    def source(self, value_id: str) -> tuple[str, str]:
        """(node name, operator type) behind a value id; a value made by the compiler (`<id>~<what>`) has the source of `<id>`."""
        found = self.naming.nearest(value_id, self.sources)
        return self.sources.get(found, (found, "Input"))


def load(
    model: AnyModel,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    requantize: bool = False,
    dump: Dump = no_dump,
    input_values: Mapping[str, Any] | None = None,
    state: Mapping[str, str] | None = None,
) -> FloatModel:
    """Read a network and bring it into canonical form.

    A symbolic batch dimension is 1 unless `input_shapes` says otherwise; any other symbolic dimension must be in `input_shapes`
    ({input name: whole shape}). requantize: of a file that is quantized in part, the rest may be quantized too.
    input_values: {input name: number, array or text "1,2,3"}, inputs that are the same in every call and become constants.
    state: {input name: output name}, outputs that are inputs of the next call, beside those that the model keeps by itself.
    Raises ModelError when the file can't be read, is of no format that is read here, is damaged, or holds what can't be compiled at all; and for a state
    that doesn't fit.
    """
    origin = origin_of(model)
    proto, origin_digest = origin.read()
    near, whole = exactness(proto), rounded(proto)
    own = take_states(origin.where, proto, input_values or ())
    imported = import_onnx(origin.where, proto, input_shapes or {}, requantize, input_values)
    del proto  # which holds all constants once more
    graph = Graph.of(imported.module)
    if not graph.inputs:
        raise ModelError(f"{origin.where}: the model has no inputs: all of its outputs are constants")
    inputs, outputs = ([TensorInfo(n, shape_of(v), dtype_of(v)) for n, v in pairs] for pairs in ([(str(p.name), p) for p in graph.inputs], graph.outputs))
    states = States({**own.next, **(state or {})}, own.initial)
    _check_states(origin.where, states, inputs, outputs)
    dump("import", imported.module)
    give_back()
    module = run(CANONICAL, imported.module, dump=dump)
    fixed = {name: array.tolist() for name, array in imported.fixed.items()}
    digest = hashlib.sha256(f"{origin_digest} {[(i.name, i.shape) for i in inputs]}{fixed or ''}".encode()).hexdigest()
    kept = (states.next, states.initial)
    return FloatModel(module, tuple(inputs), tuple(outputs), origin.name, digest, imported.sources, graph.consumers(), origin, near, whole, fixed, *kept)


def _check_states(where: str, states: States, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> None:
    """Raises ModelError unless each state goes from an output to an input of its own, of the same shape and type."""
    state = states.next
    ends = ({i.name: i for i in inputs}, {o.name: o for o in outputs})
    for pair in state.items():
        for name, ports, what in zip(pair, ends, ("input", "output"), strict=True):
            if name not in ports:
                raise ModelError(f"{where}: state '{'='.join(pair)}': there is no {what} '{name}'.{closest(name, list(ports))} Known: {', '.join(ports)}")
        into, out = (ports[name] for name, ports in zip(pair, ends, strict=True))
        if (into.shape, into.dtype) != (out.shape, out.dtype):
            raise ModelError(
                f"{where}: state '{'='.join(pair)}': the input is {into.dtype} {list(into.shape)} and the output {out.dtype} {list(out.shape)}; "
                "a state is the next call's input, so both must be the same"
            )
        try:
            shape = np.asarray(states.initial.get(pair[0], 0), into.dtype).shape
        except (OverflowError, ValueError, TypeError) as error:
            raise ModelError(f"{where}: state '{pair[0]}' holds {into.dtype}, and its first value does not ({error})") from error
        if shape not in ((), into.shape):
            raise ModelError(f"{where}: state '{pair[0]}' has shape {list(into.shape)}, and its first value {list(shape)}")
    twice = next((o for o in state.values() if list(state.values()).count(o) > 1), None)
    if twice is not None:
        raise ModelError(f"{where}: output '{twice}' is given as the state of two inputs; each state has an output of its own")
    if state and len(state) == len(inputs):
        raise ModelError(f"{where}: every input is given as a state, so that a call has no data; leave one out")
