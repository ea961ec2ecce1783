"""The report's section on an accuracy target: the plans tried, the trade of accuracy against latency against size, and what each layer does to it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.base.text import float_layers, milliseconds, number, percent, size
from qcompiler.verification.page_table import html_table
from qcompiler.verification.svg import FLOAT, INT8, pareto_chart

_LAYERS = 15  # most sensitive ones with a row


def section(account: Mapping[str, Any]) -> str:
    """`mixed_precision` of a manifest as HTML."""
    state = "pass" if account["met"] else "fail"
    findings = "".join(f"<li>{html.escape(f['wanted'])}: {html.escape(f['found'])}{'' if f['met'] else ' <b>(missed)</b>'}</li>" for f in account["findings"])
    where = f"Times are of {html.escape(account['measured_on'])}, {account['threads']} thread, measured when it was compiled"
    return "\n".join(
        [
            "<h2>Accuracy target</h2>",
            f'<div class="verdict {state}" id="target">{html.escape(account["statement"])}.<ul>{findings}</ul></div>',
            f'<figure id="pareto">{pareto_chart(account)}<figcaption class="quiet">{_key()}</figcaption></figure>',
            _plans(account),
            f'<p class="quiet">{account["samples"]} calibration samples, of which {account["held_out"]} only judge: nothing was fitted to them. {where}.</p>',
            _sensitivity(account["sensitivity"]),
        ]
    )


def _key() -> str:
    return (
        f'<span class="key" style="background:{INT8}"></span>plans that were compiled and measured, labelled with their number of float layers and size; '
        f'<span class="key" style="background:{FLOAT};height:3px;vertical-align:middle"></span>predicted; bars: lower end of the 95 % confidence interval; '
        "ringed: chosen; dotted: the SQNR asked for"
    )


def _plans(account: Mapping[str, Any]) -> str:
    float32 = account["float"]
    rows = [["float32 network", "", "", "", "", milliseconds(float32["seconds"]), "1.000", size(float32["bytes"]), ""]]
    for p in sorted(account["points"], key=lambda p: p["seconds"]):
        drop = "" if p["accuracy_drop"] is None else f"{p['accuracy_drop']:.2f}"
        figures = [number(p["sqnr_db"]), number(p["sqnr_bound_db"]), percent(p["agreement"]), drop, milliseconds(p["seconds"])]
        verdict = ("<b>chosen</b>, " if p["chosen"] else "") + ("met" if p["met"] else "missed")
        rows.append(
            [
                float_layers(len(p["float_layers"]), len(p.get("in_sixteen", ()))),
                *figures,
                f"{p['seconds'] / float32['seconds']:.3f}",
                size(p["bytes"]),
                verdict,
            ]
        )
    columns = ("plan", "SQNR dB|", "at 95 %|", "top-1 agreement|", "accuracy drop|", "ms|", "x float|", "size|", "target")
    return html_table(columns, rows, "plans")


def _sensitivity(found: Mapping[str, Any]) -> str:
    if not found:
        return '<p class="quiet">The plan with everything in int8 met the target: sensitivities were not measured.</p>'
    worst: Sequence[dict[str, Any]] = sorted(found["layers"], key=lambda r: float("inf") if r["sqnr_db"] is None else r["sqnr_db"])[:_LAYERS]
    rows = [
        [f"<code>{html.escape(r['id'])}</code>", number(r["sqnr_db"]) or "exact", f"{1e6 * r['int8_seconds']:.1f}", f"{1e6 * r['float_seconds']:.1f}"]
        for r in worst
    ]
    note = f"The {len(worst)} most sensitive layers: SQNR of the outputs when this layer's weights and result alone are rounded to 8 bits"
    samples = f"{found['samples']} sample{'s' if found['samples'] > 1 else ''}"
    return f'<p class="quiet">{note}, on {samples}.</p>' + html_table(("layer", "SQNR dB|", "int8 us|", "float us|"), rows, "sensitivity")
