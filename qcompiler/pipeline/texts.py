"""Tables of `explain` and `inspect`, for people. Nothing here computes, and nothing needs TVM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.base.text import number, size, table
from qcompiler.numerics.weight_only import heading

if TYPE_CHECKING:
    from qcompiler.pipeline.survey import LayerNoise


def noise_text(samples: int, estimate: float, rows: Sequence[LayerNoise]) -> str:
    """Sensitivities as a table."""
    title = f"Sensitivity on {samples} samples; SQNR of the whole plan about {number(estimate)} dB, were all roundings independent"
    cells = [[r.id, r.kind, number(r.sqnr_db), number(r.gain_db, "+.2f")] for r in rows]
    return table(title, ("layer", "operator", "SQNR dB, it alone in int8|", "dB gained when it stays float|"), cells)


def weights_text(account: Mapping[str, Any]) -> str:
    """The layers whose weights are stored in few bits (`weights` of the manifest)."""
    rows = [
        [r["id"], " x ".join(map(str, r["shape"])), size(r["float_bytes"]), size(r["bytes"]), "exact" if r["sqnr_db"] is None else number(r["sqnr_db"])]
        for r in account["layers"]
    ]
    return table(heading(account), ("layer", "outputs x inputs", "float32|", f"{account['dtype']}|", "SQNR of weights dB|"), rows)
