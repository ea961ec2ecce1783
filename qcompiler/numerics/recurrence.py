"""Recurrent layers (LSTM, GRU, RNN) in exact integers, and in float32: docs/numerics.md, section 12, is normative.

The projection of the inputs, of all steps at once, is a dense layer before; here is what goes from step to step. Every sum and product is of integers, but
for three products that are rounded to an integer right away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.numerics.arithmetic import F32, Array, requantize, to_int
from qcompiler.numerics.spec import WEIGHT_HIGH, QParams

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
"""Cell -> rows of gates, in ONNX's order: i o f c; z r h; one."""
FUNCTIONS = {"lstm": 3, "gru": 2, "rnn": 1}
"""Cell -> activations: of gates, of what is new, and (LSTM) of the cell."""

GATE_BITS = 11  # of fractions of what a gate's function is applied to: it reaches across [-16, 16)
STATE_BITS = 15  # of fractions of a hidden state and of every gate
CELL_BITS = 16  # of fractions of an LSTM's cell, which reaches across (-256, 256)
PIECE_BITS = 6  # of a place between two entries of a table
STATE_LIMIT, CELL_LIMIT, GATE_LIMIT = 2**15 - 1, 2**24 - 1, 2**15 - 1
STATE_LIMITS = (1.0, 256.0)
"""What integers hold of a hidden state, and of a cell."""
TERM_LIMIT = 2**20  # of each addend of a gate
RESET_LIMIT = 2**16 - 1  # of the one that a GRU's reset gate multiplies
BIAS_LIMIT = 2**29
MAX_HIDDEN = 2**15  # 128 * 127 * H + 2^29 fits int32


def _softsign(x: Array) -> Array:
    return np.asarray(x / (1 + np.abs(x)))


REAL: dict[str, Callable[[Array, float, float], Array]] = {
    "Sigmoid": lambda x, a, b: 1 / (1 + np.exp(-x)),
    "Tanh": lambda x, a, b: np.tanh(x),
    "Relu": lambda x, a, b: np.maximum(x, 0),
    "HardSigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "LeakyRelu": lambda x, a, b: np.where(x < 0, a * x, x),
    "Affine": lambda x, a, b: a * x + b,
    "ScaledTanh": lambda x, a, b: a * np.tanh(b * x),
    "Softsign": lambda x, a, b: _softsign(x),
}
"""The activations by ONNX's names, of float64 numbers and alpha, beta."""
DEFAULTS = {"HardSigmoid": (0.2, 0.5), "LeakyRelu": (0.01, 0.0)}
"""Alpha and beta where a model states none (ONNX, LSTM); those of other functions must be stated."""
BOUNDED = ("Sigmoid", "Tanh", "HardSigmoid", "Softsign")
"""Activations within [-1, 1], which have tables."""


def table(name: str, alpha: float = 0.0, beta: float = 0.0) -> Array:
    """int16 [1025]: an activation of `BOUNDED` at -16, -16 + 1/32, ..., 16, in units of 2^-15."""
    x = (np.arange(2 ** (16 - PIECE_BITS) + 1) * 2.0**PIECE_BITS - 2**15) * 2.0**-GATE_BITS
    with np.errstate(over="ignore"):
        real = REAL[name](x, alpha, beta)
    return np.clip(np.rint(real * 2.0**STATE_BITS), -STATE_LIMIT, STATE_LIMIT).astype(np.int16)


def recurrence_parameters(
    weight: Array, bias: Array, p_scale: float, clip: float | None, y: QParams | None, wide: bool = False
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """(w int8 [G * H, H], bias int32 [G * H], multiplier float32 [G * H], attributes) of `qc.recurrence`.

    weight, bias: of the hidden state, real; p_scale: of the projection; clip: of what gates' functions are applied to; y: of the result, None for float32;
    wide: products read states in 16 bits. One scale per row of weights, coarser where a bias would leave 2^29 units.
    """
    w = np.asarray(weight, np.float64)
    scale = np.maximum(np.abs(w).max(axis=1, initial=0.0) / WEIGHT_HIGH, 2.0**-60)
    scale = np.maximum(scale, np.abs(bias) * 128 / BIAS_LIMIT)
    q = np.clip(np.rint(w / scale[:, None]), -WEIGHT_HIGH, WEIGHT_HIGH).astype(np.int8)
    units = np.rint(np.asarray(bias, np.float64) * 128 / scale).astype(np.int32)
    limit = GATE_LIMIT if clip is None else int(min(np.rint(clip * 2.0**GATE_BITS), GATE_LIMIT))
    attrs: dict[str, Any] = {"p_multiplier": float(F32(p_scale * 2.0**GATE_BITS)), "limit": limit, "wide": wide}
    if y is None:
        return q, units, (scale * 2.0 ** (GATE_BITS - 7)).astype(F32), {**attrs, "out_dtype": "float32"}
    attrs |= {"multiplier": float(F32(2.0**-STATE_BITS / y.scale)), "zero_point": y.zero_point, "out_dtype": y.dtype}
    return q, units, (scale * 2.0 ** (GATE_BITS - 7)).astype(F32), attrs


def _stored(x: Array, bits: int, limit: int) -> Array:
    """int32: a real state in units of 2^-bits; NaN becomes the upper limit."""
    scaled = np.asarray(x, F32) * F32(2.0**bits)
    return to_int(np.where(scaled < limit, scaled, F32(limit)), -limit, limit).astype(np.int64)


def _shifted(x: Array, bits: int) -> Array:
    """x * 2^-bits, rounded to nearest, ties up."""
    return (x + (1 << (bits - 1))) >> bits


def _looked_up(entries: Array, x: Array) -> Array:
    """A table at x in units of 2^-11: the entries on both sides, weighted by their distances."""
    place = x + 2**15
    i, part, wide = place >> PIECE_BITS, place & (2**PIECE_BITS - 1), entries.astype(np.int64)
    return _shifted(wide[i] * (2**PIECE_BITS - part) + wide[i + 1] * part, PIECE_BITS)


def steps_of(steps: int, lengths: Array, reverse: bool) -> list[tuple[Array, Array]]:
    """(rows of the batch, the step of each) in order of execution: row b takes its first `lengths[b]` steps, forwards or backwards."""
    lengths = np.clip(lengths.astype(np.int64), 0, steps)
    found = []
    for s in range(steps):
        rows = np.flatnonzero(s < lengths)
        found.append((rows, lengths[rows] - 1 - s if reverse else np.full(rows.size, s)))
    return found


@dataclass(frozen=True)
class _Step:
    """The integers of a step, int64 all; names as those of `recurrence`, weight [G * H, H]."""

    cell: str
    weight: Array
    bias: Array
    multiplier: Array
    tables: Array
    limit: int
    wide: bool
    linear_before_reset: bool

    def recurrent(self, state: Array, first: int, last: int, most: int = TERM_LIMIT) -> Array:
        """[B, (last - first) * H], the gates from `first` to `last`, of a state in units of 2^-15."""
        part = slice(first * state.shape[1], last * state.shape[1])
        if self.wide:
            acc = _shifted(state @ self.weight[part].T, STATE_BITS - 7) + self.bias[part]
        else:
            acc = np.clip(_shifted(state, STATE_BITS - 7), -128, 127) @ self.weight[part].T + self.bias[part]
        return to_int(acc.astype(np.int32).astype(F32) * self.multiplier[part], -most, most).astype(np.int64)

    def gate(self, function: int, x: Array, bound: int | None = None) -> Array:
        bound = self.limit if bound is None else bound
        return _looked_up(self.tables[function], np.clip(x, -bound, bound))

    def taken(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        """(the new h, the new c), both [B, H]. x [B, G * H]: the inputs of the gates."""
        hidden = h.shape[1]
        if self.cell == "rnn":
            return self.gate(0, x + self.recurrent(h, 0, 1)), c
        if self.cell == "gru":
            z, r = np.split(self.gate(0, x[:, : 2 * hidden] + self.recurrent(h, 0, 2)), 2, axis=1)
            if self.linear_before_reset:
                new = _shifted(r * self.recurrent(h, 2, 3, RESET_LIMIT), STATE_BITS)
            else:
                new = self.recurrent(_shifted(r * h, STATE_BITS), 2, 3)
            n = self.gate(1, x[:, 2 * hidden :] + new)
            return n + _shifted(z * (h - n), STATE_BITS), c
        a = x + self.recurrent(h, 0, GATES["lstm"])
        i, o, f = np.split(self.gate(0, a[:, : 3 * hidden]), 3, axis=1)
        kept = np.rint(c.astype(F32) * (f.astype(F32) * F32(2.0**-STATE_BITS))).astype(np.int64)
        c = np.clip(kept + _shifted(i * self.gate(1, a[:, 3 * hidden :]), 2 * STATE_BITS - CELL_BITS), -CELL_LIMIT, CELL_LIMIT)
        return _shifted(o * self.gate(2, _shifted(c, CELL_BITS - GATE_BITS), GATE_LIMIT), STATE_BITS), c


def recurrence(
    p: Array,
    w: Array,
    bias: Array,
    multiplier_: Array,
    tables: Array,
    h0: Array,
    c0: Array,
    lengths: Array,
    *,
    cell: str,
    reverse: bool,
    linear_before_reset: bool,
    sequence: bool,
    finals: int,
    p_multiplier: float,
    limit: int,
    wide: bool = False,
    multiplier: float = 2.0**-STATE_BITS,
    zero_point: int = 0,
    out_dtype: str = "int8",
) -> Array:
    """The hidden states of all steps [T, B, H] (where `sequence`), behind them the last one (`finals` >= 1) and the last cell (2): [T + finals, B, H].

    p int16 [T, B, G * H]; w int8 [G * H, H]; bias int32, multiplier_ float32 [G * H]; tables int16 [F, 1025] (`table`); h0, c0 float32 [B, H]; lengths
    int32 [B], clipped to [0, T]: what lies beyond is 0. Made by `recurrence_parameters`. wide: products read all bits of a state, not its 8
    upper ones. out_dtype: "int8", "int16", or "float32", which finals need.
    """
    steps, batch, hidden = p.shape[0], p.shape[1], w.shape[1]
    h, c = _stored(h0, STATE_BITS, STATE_LIMIT), _stored(c0, CELL_BITS, CELL_LIMIT)
    inputs = to_int(p.astype(np.int32).astype(F32) * F32(p_multiplier), -TERM_LIMIT, TERM_LIMIT).astype(np.int64)
    states = np.zeros((steps, batch, hidden), np.int64)
    step = _Step(cell, w.astype(np.int64), bias, multiplier_, tables, limit, wide, linear_before_reset)
    for rows, at in steps_of(steps, lengths, reverse):
        h[rows], c[rows] = step.taken(inputs[at, rows], h[rows], c[rows])
        states[at, rows] = h[rows]
    if out_dtype != "float32":
        assert not finals, "last states are float32"
        return requantize(states, multiplier, zero_point, dtype=out_dtype)
    found = ([*states] if sequence else []) + [h][: finals >= 1]
    real = [s.astype(F32) * F32(2.0**-STATE_BITS) for s in found] + ([c.astype(F32) * F32(2.0**-CELL_BITS)] if finals == 2 else [])
    return np.stack(real)


def f32_recurrence(
    p: Array,
    w: Array,
    bias: Array,
    h0: Array,
    c0: Array,
    lengths: Array,
    *,
    cell: str,
    reverse: bool,
    linear_before_reset: bool,
    sequence: bool,
    finals: int,
    activations: Sequence[str],
    alpha: Sequence[float],
    beta: Sequence[float],
    clip: float | None = None,
) -> Array:
    """The same of real numbers: p float32 [T, B, G * H], w [G * H, H], bias [G * H]. clip: of what gates' functions are applied to. Computed in float64."""
    steps, batch, hidden = p.shape[0], p.shape[1], w.shape[1]
    h, c = h0.astype(np.float64), c0.astype(np.float64)
    x, weight, most = p.astype(np.float64), w.astype(np.float64), np.inf if clip is None else clip
    states = np.zeros((steps, batch, hidden))

    def gate(function: int, value: Array, bound: float = most) -> Array:
        with np.errstate(over="ignore"):
            return REAL[activations[function]](np.clip(value, -bound, bound), alpha[function], beta[function])

    for rows, at in steps_of(steps, lengths, reverse):
        old = h[rows]
        parts = np.split(x[at, rows], GATES[cell], axis=1)
        if cell == "gru" and not linear_before_reset:
            first = old @ weight[: 2 * hidden].T + bias[: 2 * hidden]
            z, r = (gate(0, parts[i] + first[:, i * hidden : (i + 1) * hidden]) for i in range(2))
            n = gate(1, parts[2] + (r * old) @ weight[2 * hidden :].T + bias[2 * hidden :])
            h[rows] = n + z * (old - n)
        else:
            terms = np.split(old @ weight.T + bias, GATES[cell], axis=1)
            if cell == "rnn":
                h[rows] = gate(0, parts[0] + terms[0])
            elif cell == "gru":
                z, r = gate(0, parts[0] + terms[0]), gate(0, parts[1] + terms[1])
                n = gate(1, parts[2] + r * terms[2])
                h[rows] = n + z * (old - n)
            else:
                i, o, f = (gate(0, a + b) for a, b in zip(parts[:3], terms[:3], strict=True))
                c[rows] = f * c[rows] + i * gate(1, parts[3] + terms[3])
                h[rows] = o * gate(2, c[rows], np.inf)
        states[at, rows] = h[rows]
    return np.stack(([*states] if sequence else []) + [h, c][:finals]).astype(F32)
