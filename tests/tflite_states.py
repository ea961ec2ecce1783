"""Recurrent TFLite operators and variables, as small networks with a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tflite_cases import rng
from tflite_nets import TfliteNet

B, T, COLUMNS, H = 2, 3, 5, 4
NONE, RELU, RELU6, TANH = 0, 1, 3, 4
Made = tuple[TfliteNet, list[int]]


class Weights:
    """Constants of a network, each with other numbers; of 8 bits where `scale` is given."""

    def __init__(self, net: TfliteNet, scale: float | None = None) -> None:
        self.net, self.scale, self.count = net, scale, 0

    def __call__(self, *shape: int, floats: bool = False) -> int:
        self.count += 1
        values = rng(self.count).standard_normal(shape) * 0.6
        if self.scale is None or floats:
            return self.net.const(values.astype(np.float32))
        scale = self.scale * (1 + self.count / 10)
        return self.net.const(np.clip(np.rint(values / scale), -127, 127).astype(np.int8), (scale, 0))


def lstm_operands(w: Weights, x: int, *, inputs: int = COLUMNS, outputs: int = H, coupled: bool, peepholes: bool, projection: bool) -> list[int]:
    """All up to the projection's bias."""
    first = [-1] if coupled else []
    gates = range(len(first), 4)
    peep = [*first, *(w(H, floats=True) for _ in range(len(first), 3))] if peepholes else [-1] * 3
    biases = [*first, *(w(H, floats=True) for _ in gates)]
    return [
        x, *first, *(w(H, inputs) for _ in gates), *first, *(w(H, outputs) for _ in gates), *peep, *biases,
        *([w(outputs, H), w(outputs, floats=True)] if projection else [-1, -1]),
    ]  # fmt: skip


def lstm(
    *, coupled: bool = False, peepholes: bool = False, projection: bool = False, norm: bool = False, time_major: bool = False, one: bool = False,
    scale: float | None = None, **options: Any,
) -> Made:  # fmt: skip
    net, outputs = TfliteNet(), 3 if projection else H
    w, shape = Weights(net, scale), (T, B) if time_major else (B, T)
    x = net.input((B, COLUMNS) if one else (*shape, COLUMNS), name="x")
    operands = lstm_operands(w, x, outputs=outputs, coupled=coupled, peepholes=peepholes, projection=projection)
    operands += [net.variable((B, outputs), name="h"), net.variable((B, H), name="c")]
    if norm:
        operands += [-1 if coupled and k == 0 else w(H, floats=True) for k in range(4)]
    kind = {"kind": "LSTMOptions"} if one else {"kind": "UnidirectionalSequenceLSTMOptions", "timeMajor": time_major}
    name, result = ("LSTM", (B, outputs)) if one else ("UNIDIRECTIONAL_SEQUENCE_LSTM", (*shape, outputs))
    return net, [net.op(name, operands, result, **{"fusedActivationFunction": TANH, **kind, **options})]


def basic_lstm() -> Made:
    """Its states are inputs and outputs already; here variables keep them."""
    net = TfliteNet()
    w, x = Weights(net), net.input((B, COLUMNS), name="x")
    handles = [net.handle(name) for name in ("last", "cell")]
    net.first(last=np.zeros((B, H), np.float32), cell=rng(5).standard_normal((B, H)).astype(np.float32))
    last, cell = (net.op("READ_VARIABLE", [h], (B, H), kind="ReadVariableOptions") for h in handles)
    operands = [x, last, w(4 * H, COLUMNS + H), w(4 * H), cell]
    new = net.op("LSTM", operands, (B, H), (B, H), (B, COLUMNS + H), (B, 4 * H), kind="LSTMOptions", kernelType=1, fusedActivationFunction=TANH)
    for handle, value in zip(handles, new[:2], strict=True):
        net.op("ASSIGN_VARIABLE", [handle, value], kind="AssignVariableOptions")
    return net, [new[0]]


def bidirectional_lstm(*, merge: bool = False, aux: str = "", time_major: bool = False, peepholes: bool = False) -> Made:
    net = TfliteNet()
    w, shape = Weights(net), (T, B) if time_major else (B, T)
    x = net.input((*shape, COLUMNS), name="x")
    there = lstm_operands(w, x, coupled=False, peepholes=peepholes, projection=False)
    back = lstm_operands(w, x, coupled=False, peepholes=peepholes, projection=False)[1:]
    states = [net.variable((B, H), name=name) for name in ("h0", "c0", "h1", "c1")]
    second = [net.op("NEG", [x], (*shape, COLUMNS), kind="NegOptions")] if aux else [-1]
    more = [w(H, COLUMNS) for _ in range(8)] if aux == "weights" else [-1] * 8
    results = [(*shape, 2 * H)] if merge else [(*shape, H)] * 2
    options = {"kind": "BidirectionalSequenceLSTMOptions", "timeMajor": time_major, "mergeOutputs": merge, "fusedActivationFunction": TANH}
    made = net.op("BIDIRECTIONAL_SEQUENCE_LSTM", [*there, *back, *states, *second, *more], *results, version=3, **options)
    return net, [made] if merge else made


def rnn(activation: int, *, one: bool = False, time_major: bool = False) -> Made:
    net = TfliteNet()
    w, shape = Weights(net), (B,) if one else (T, B) if time_major else (B, T)
    operands = [net.input((*shape, COLUMNS), name="x"), w(H, COLUMNS), w(H, H), w(H), net.variable((B, H), name="h")]
    kind = {"kind": "RNNOptions"} if one else {"kind": "SequenceRNNOptions", "timeMajor": time_major}
    return net, [net.op("RNN" if one else "UNIDIRECTIONAL_SEQUENCE_RNN", operands, (*shape, H), fusedActivationFunction=activation, **kind)]


def bidirectional_rnn(activation: int, *, merge: bool = False, aux: str = "", time_major: bool = False) -> Made:
    net = TfliteNet()
    w, shape = Weights(net), (T, B) if time_major else (B, T)
    x = net.input((*shape, COLUMNS), name="x")
    operands = [x]
    for name in ("h0", "h1"):
        operands += [w(H, COLUMNS), w(H, H), w(H), net.variable((B, H), name=name)]
    operands += [net.op("NEG", [x], (*shape, COLUMNS), kind="NegOptions")] if aux else [-1]
    operands += [w(H, COLUMNS), w(H, COLUMNS)] if aux == "weights" else [-1, -1]
    options = {"kind": "BidirectionalSequenceRNNOptions", "timeMajor": time_major, "mergeOutputs": merge, "fusedActivationFunction": activation}
    made = net.op("BIDIRECTIONAL_SEQUENCE_RNN", operands, *([(*shape, 2 * H)] if merge else [(*shape, H)] * 2), **options)
    return net, [made] if merge else made


def svdf(rank: int, activation: int = NONE, *, memory: int = 6, shift: bool = True, scale: float | None = None) -> Made:
    """Two of them, as a keyword network has: the second has a state of its own."""
    net, units = TfliteNet(), 3
    w = Weights(net, scale)
    x = net.input((B, COLUMNS), name="x")
    for name, inputs in (("s", COLUMNS), ("t", units)):
        operands = [x, w(units * rank, inputs), w(units * rank, memory), w(units, floats=True) if shift else -1]
        operands.append(net.variable((B, units * rank * memory), name=name))
        x = net.op("SVDF", operands, (B, units), kind="SVDFOptions", rank=rank, fusedActivationFunction=activation)
    return net, [x]


def stream(first: float = 0.0) -> Made:
    """What streaming networks are made of: what was kept and the new frame, of which the newest are kept. A second variable holds a running sum, read after it
    was written; a third is never written; a fourth is the frame before."""
    net, length = TfliteNet(), 4
    x = net.input((1, 1, 1, COLUMNS), name="x")
    handles = {name: net.handle(name) for name in ("ring", "sum", "constant", "last")}
    ring = np.full((1, length, 1, COLUMNS), first, np.float32)
    net.first(
        ring=ring,
        sum=np.zeros((1, COLUMNS), np.float32),
        constant=rng(3).standard_normal(COLUMNS).astype(np.float32),
        last=np.ones((1, 1, 1, COLUMNS), np.float32),
    )

    def read(name: str, *shape: int) -> int:
        result: int = net.op("READ_VARIABLE", [handles[name]], shape, kind="ReadVariableOptions")
        return result

    def write(name: str, value: int) -> None:
        net.op("ASSIGN_VARIABLE", [handles[name], value], kind="AssignVariableOptions")

    whole = net.op("CONCATENATION", [read("ring", 1, length, 1, COLUMNS), x], (1, length + 1, 1, COLUMNS), kind="ConcatenationOptions", axis=1)
    numbers = [net.const(np.array(n, np.int32)) for n in ((0, 1, 0, 0), (1, length, 1, COLUMNS))]
    write("ring", net.op("SLICE", [whole, *numbers], (1, length, 1, COLUMNS), kind="SliceOptions"))
    filters = [net.const(rng(k).standard_normal(s).astype(np.float32) * 0.4) for k, s in ((1, (3, length + 1, 1, COLUMNS)), (2, (3,)))]
    y = net.op("CONV_2D", [whole, *filters], (1, 1, 1, 3), kind="Conv2DOptions", padding=1, strideH=1, strideW=1)
    flat = net.op("RESHAPE", [x, net.const(np.array([1, COLUMNS], np.int32))], (1, COLUMNS), kind="ReshapeOptions")
    write("sum", net.op("ADD", [read("sum", 1, COLUMNS), flat], (1, COLUMNS), kind="AddOptions"))
    z = net.op("ADD", [read("sum", 1, COLUMNS), read("constant", COLUMNS)], (1, COLUMNS), kind="AddOptions")
    before = net.op("SUB", [x, read("last", 1, 1, 1, COLUMNS)], (1, 1, 1, COLUMNS), kind="SubOptions")
    write("last", x)
    return net, [y, z, before]


CASES: dict[str, Callable[[], Made]] = {
    "lstm": lstm, "lstm time major": lambda: lstm(time_major=True), "lstm one step": lambda: lstm(one=True),
    "lstm relu": lambda: lstm(fusedActivationFunction=RELU), "lstm relu6": lambda: lstm(fusedActivationFunction=RELU6),
    "lstm coupled": lambda: lstm(coupled=True), "lstm peepholes": lambda: lstm(peepholes=True),
    "lstm coupled peepholes": lambda: lstm(coupled=True, peepholes=True), "lstm projected": lambda: lstm(projection=True, projClip=0.4),
    "lstm clipped": lambda: lstm(cellClip=0.3), "lstm normalized": lambda: lstm(norm=True), "lstm normalized coupled": lambda: lstm(norm=True, coupled=True),
    "lstm all": lambda: lstm(norm=True, peepholes=True, projection=True, cellClip=0.8, projClip=0.9, one=True), "lstm basic": basic_lstm,
    "both": bidirectional_lstm, "both merged": lambda: bidirectional_lstm(merge=True, time_major=True),
    "both second": lambda: bidirectional_lstm(aux="weights"), "both crossed": lambda: bidirectional_lstm(aux="alone", merge=True, time_major=True),
    "both peepholes": lambda: bidirectional_lstm(peepholes=True), "rnn": lambda: rnn(TANH), "rnn relu": lambda: rnn(RELU), "rnn relu6": lambda: rnn(RELU6),
    "rnn plain": lambda: rnn(NONE), "rnn one": lambda: rnn(TANH, one=True), "rnn time major": lambda: rnn(RELU6, time_major=True),
    "rnn both": lambda: bidirectional_rnn(TANH), "rnn both merged": lambda: bidirectional_rnn(RELU6, merge=True),
    "rnn both second": lambda: bidirectional_rnn(TANH, aux="weights", time_major=True),
    "rnn both crossed": lambda: bidirectional_rnn(RELU, aux="alone", time_major=True), "svdf": lambda: svdf(1), "svdf relu": lambda: svdf(1, RELU),
    "svdf rank 2": lambda: svdf(2), "svdf without bias": lambda: svdf(1, shift=False), "svdf one column": lambda: svdf(2, memory=1), "stream": stream,
    "stream from elsewhere": lambda: stream(0.7),
}  # fmt: skip
"""float32, all operators that keep something."""
