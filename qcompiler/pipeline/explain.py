"""How a network would be quantized, and why, without compiling it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from qcompiler.base.errors import DataError
from qcompiler.base.targets import Target
from qcompiler.base.text import table
from qcompiler.calibration.data import Source
from qcompiler.importers.origin import AnyModel
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.halves import HALVES
from qcompiler.pipeline.compile import quantize, quantize_weights
from qcompiler.pipeline.options import Options, complete, takes_options
from qcompiler.pipeline.survey import LayerNoise, layer_noise
from qcompiler.pipeline.texts import NOISE_COLUMNS, noise_rows, noise_title, weights_text
from qcompiler.plan.quant_plan import QuantPlan, count_operators


@dataclass(frozen=True)
class Explanation:
    """A plan, for people (`print`) and programs (`to_json`).

    groups: the network's operators. refused: value id -> why what the plan has in 8 bits stays float after all. samples: of the calibration.
    sensitivity: (samples, SQNR of the plan in dB, layers), where it was asked for. halves: {value in 16 bits: its halves}.
    """

    plan: QuantPlan
    groups: Sequence[Group]
    refused: Mapping[str, str]
    samples: int
    sensitivity: tuple[int, float, list[LayerNoise]] | None = None
    halves: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def count(self) -> dict[str, int]:
        """Operators by type."""
        return count_operators(self.groups, self.plan.reasons.keys() | self.refused.keys(), self.halves)

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.plan.to_json())
        document |= {"operators": {g.id: g.kind for g in self.groups}, "refused": dict(self.refused), "samples": self.samples, "digest": self.plan.digest}
        document["count"] = self.count
        if self.sensitivity is not None:
            samples, estimate, rows = self.sensitivity
            document["sensitivity"] = {"samples": samples, "sqnr_db": estimate, "layers": [vars(row) for row in rows]}
        return document

    def __str__(self) -> str:
        parts = [
            *(f"'{value}' stays float after all: {reason}" for value, reason in self.refused.items()),
            self.plan.explain(self.groups, self.halves).rstrip(),
        ]
        if self.sensitivity is not None:
            samples, estimate, rows = self.sensitivity
            parts += ["", table(noise_title(samples, estimate), NOISE_COLUMNS, noise_rows(rows))]
        return "\n".join(parts)


@dataclass(frozen=True)
class WeightsExplanation:
    """How the weights of a network would be stored beside float activations. account: as `weights` of a manifest."""

    account: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"weights": dict(self.account)}

    def __str__(self) -> str:
        return weights_text(self.account)


@takes_options
def explain(
    model: AnyModel, target: str | Target = "native", calibration: Source | None = None, *, sensitivity: bool = False, **options: Unpack[Options]
) -> Explanation | WeightsExplanation:
    """The plan that `compile` would make of the same arguments: for every value how it is stored, under which range, with what estimated error and why; for
    every operator that stays float the reason. With `weights`: how these would be stored, with what error.

    sensitivity: measure what rounding each layer alone does to the outputs as well (about a minute). Errors as `compile`.
    """
    options = complete(options, "explain")
    if options["weights"] is not None:
        if sensitivity:
            raise DataError("--sensitivity is of 8-bit activations; it does not go with --weights, which leaves them float")
        return WeightsExplanation(Graph.of(quantize_weights(model, calibration, options)[0][1]).attrs["qc.weights"])
    if sensitivity and calibration is None:
        raise DataError("--sensitivity needs --calibration: what rounding does to the outputs is measured on those samples")
    quantized = quantize(model, target, calibration, **options)
    # insert_qdq refuses what would overflow on the actual weights; those reasons belong to the answer too.
    refused = {k: v for k, v in Graph.of(quantized.qdq).attrs.get("qc.float_ops", {}).items() if k not in quantized.plan.reasons}
    groups = find_groups(quantized.model.module)
    halves = Graph.of(quantized.model.module).attrs.get(HALVES, {})
    return Explanation(quantized.plan, groups, refused, quantized.measured.table.samples, layer_noise(quantized) if sensitivity else None, halves)
