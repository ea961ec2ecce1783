"""What a model file says about its own quantization: the parameters that quantization-aware training, or another tool, chose.

The importer takes QuantizeLinear and DequantizeLinear out of the network and leaves this behind, as the attribute `qc.trained` of the module. A value
named here ends its group, because the model rounds it to 8 bits there; the plan takes its parameters as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.numerics.spec import QParams

ATTRIBUTE = "qc.trained"


@dataclass
class Trained:
    """values: value id -> parameters. Of operators, by the id of their result: weights (float64 [O] scales), biases (float64 [O], exact multiples of
    input scale * weight scale), constants (parameters of the constant operand of an add, sub or mul). notes: what could not be taken over, and why."""

    values: dict[str, QParams] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, QParams] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.values or self.weights or self.constants or self.notes)

    @staticmethod
    def of(attrs: Mapping[str, Any]) -> Trained:
        """From a module's attributes; empty for a module without any."""
        found = attrs.get(ATTRIBUTE, {})

        def params(name: str) -> dict[str, QParams]:
            return {k: QParams(float(s), int(z)) for k, (s, z) in found.get(name, {}).items()}

        def arrays(name: str) -> dict[str, np.ndarray]:
            return {k: np.asarray(v, np.float64) for k, v in found.get(name, {}).items()}

        return Trained(params("values"), arrays("weights"), arrays("biases"), params("constants"), [str(n) for n in found.get("notes", [])])

    def attribute(self) -> dict[str, Any]:
        """As plain Python, for `ATTRIBUTE`."""
        document: dict[str, Any] = {name: {k: [p.scale, p.zero_point] for k, p in getattr(self, name).items()} for name in ("values", "constants")}
        document |= {name: {k: [float(x) for x in v] for k, v in getattr(self, name).items()} for name in ("weights", "biases")}
        return document | {"notes": list(self.notes)}
