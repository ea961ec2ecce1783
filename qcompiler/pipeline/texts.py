"""Tables of `explain` and `inspect`, for people. Nothing here computes, and nothing needs TVM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.base.text import number, size, table
from qcompiler.numerics.weight_only import heading

if TYPE_CHECKING:
    from qcompiler.pipeline.survey import LayerNoise


NOISE_COLUMNS = ("layer", "operator", "SQNR dB, it alone in int8|", "dB gained when it stays float|", "% more work|")


def noise_rows(rows: Sequence[LayerNoise]) -> list[list[str]]:
    """Sensitivities, under `NOISE_COLUMNS`."""
    return [[r.id, r.kind, number(r.sqnr_db), number(r.gain_db, "+.2f"), number(100 * r.work, "+.1f")] for r in rows]


def noise_title(samples: int, estimate: float) -> str:
    return f"Sensitivity on {samples} sample{'s' * (samples != 1)}; SQNR of the whole plan about {number(estimate)} dB, were all roundings independent"


WEIGHT_COLUMNS = ("layer", "outputs x inputs", "float32|", "stored|", "SQNR of weights dB|")


def weight_rows(account: Mapping[str, Any]) -> list[list[str]]:
    """The layers whose weights are stored in few bits (`weights` of the manifest), under `WEIGHT_COLUMNS`."""
    return [
        [r["id"], " x ".join(map(str, r["shape"])), size(r["float_bytes"]), size(r["bytes"]), "exact" if r["sqnr_db"] is None else number(r["sqnr_db"])]
        for r in account["layers"]
    ]


def weights_text(account: Mapping[str, Any]) -> str:
    """The same as text."""
    return table(heading(account), WEIGHT_COLUMNS, weight_rows(account))
