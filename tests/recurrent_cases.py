"""Recurrent layers as operators: operands and attributes of every kind of cell, for kernels on every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.numerics.recurrence import GATES, recurrence_parameters, table
from qcompiler.numerics.spec import QParams

USUAL = QParams(1 / 128, 0)


@dataclass(frozen=True)
class Layer:
    """The real numbers of a layer and its attributes; `lengths`: None for all steps."""

    cell: str
    steps: int = 5
    batch: int = 1
    hidden: int = 16
    reverse: bool = False
    linear_before_reset: bool = False
    sequence: bool = True
    finals: int = 0
    lengths: tuple[int, ...] | None = None
    clip: float | None = None
    spread: float = 1.0
    wide: bool = False
    out: QParams = USUAL
    activations: tuple[str, ...] = ()

    def attributes(self) -> dict[str, Any]:
        names = ("cell", "reverse", "linear_before_reset", "sequence", "finals")
        return {name: getattr(self, name) for name in names}

    def functions(self) -> tuple[str, ...]:
        return self.activations or {"rnn": ("Tanh",), "gru": ("Sigmoid", "Tanh"), "lstm": ("Sigmoid", "Tanh", "Tanh")}[self.cell]

    def real(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Of `qc.f32.recurrence`."""
        rng, rows = np.random.default_rng(seed), GATES[self.cell] * self.hidden
        w = rng.standard_normal((rows, self.hidden)) * self.spread / np.sqrt(self.hidden)
        p = rng.standard_normal((self.steps, self.batch, rows)) * 2 * self.spread
        h0, c0 = (np.clip(rng.standard_normal((self.batch, self.hidden)), -1, 1) for _ in range(2))
        lengths = np.full(self.batch, self.steps) if self.lengths is None else np.asarray(self.lengths)
        arrays = [p, w, rng.standard_normal(rows) * 0.3, h0, c0]
        attrs = {**self.attributes(), "activations": list(self.functions()), "alpha": [0.2] * 3, "beta": [0.5] * 3}
        return [*(a.astype(np.float32) for a in arrays), lengths.astype(np.int32)], {**attrs, **({} if self.clip is None else {"clip": self.clip})}

    def integer(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The same layer as `qc.recurrence`; operand 0 is computed at run time, 1 to 4 are constants."""
        (p, w, bias, h0, c0, lengths), _ = self.real(seed)
        stored = QParams.from_range(-float(np.abs(p).max()), float(np.abs(p).max()), dtype="int16")
        out = None if self.finals else self.out
        q, units, multiplier, attrs = recurrence_parameters(w, bias, stored.scale, self.clip, out, self.wide)
        tables = np.stack([table(f, 0.2, 0.5) for f in self.functions()])
        return [stored.quantize(p), q, units, multiplier, tables, h0, c0, lengths], {**self.attributes(), **attrs}


LAYERS = {
    "lstm": Layer("lstm", hidden=20),
    "lstm_reverse": Layer("lstm", reverse=True, batch=3, hidden=17, lengths=(5, 0, 3)),
    "lstm_one": Layer("lstm", steps=1, hidden=1, finals=2),
    "lstm_final": Layer("lstm", hidden=33, batch=2, sequence=False, finals=2, spread=4.0),
    "lstm_wide": Layer("lstm", hidden=70, out=QParams(2.0**-15, 0, "int16"), clip=1.5, wide=True),
    "lstm_to_wide": Layer("lstm", hidden=19, out=QParams(2.0**-14, 0, "int16")),
    "gru": Layer("gru", hidden=18, lengths=(9,)),
    "gru_wide": Layer("gru", hidden=21, batch=2, spread=3.0, lengths=(5, 2), finals=1, wide=True),
    "gru_reset_last": Layer("gru", hidden=37, batch=2, linear_before_reset=True, spread=6.0, lengths=(-1, 4)),
    "gru_reverse": Layer("gru", steps=3, hidden=7, reverse=True, linear_before_reset=True, finals=1, clip=0.7),
    "rnn_wide": Layer("rnn", hidden=30, reverse=True, wide=True),
    "rnn": Layer("rnn", hidden=13, batch=2, out=QParams(1 / 100, -5)),
    "rnn_hard": Layer("rnn", hidden=40, steps=2, activations=("HardSigmoid",), out=QParams.from_range(0, 1)),
}
