"""The page of `verify --report`: one HTML file, with its style and drawings inside, that refers to nothing else.

Every figure stands in an element whose `id` names it, so that a reader's script, or a test, finds it.
"""

from __future__ import annotations

import html
import math
from typing import Any

from qcompiler.base.text import milliseconds, number, percent, size
from qcompiler.numerics.metrics import wilson
from qcompiler.runtime.bench import BUSY
from qcompiler.verification.compared import Compared
from qcompiler.verification.evidence import WORST, Evidence, StepTime
from qcompiler.verification.footprint import Memory
from qcompiler.verification.page_table import html_table
from qcompiler.verification.page_target import section as target_section
from qcompiler.verification.parity import hidden_text
from qcompiler.verification.svg import FLOAT, INT8, bar, histogram, sqnr_chart

_SLOWEST = 20  # steps with a row of their own
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2730; max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 38px 0 8px; border-bottom: 2px solid #37414d; padding-bottom: 3px; }
h3 { font-size: 14px; margin: 0 0 2px; overflow-wrap: anywhere; } p { margin: 6px 0; max-width: 78em; } .quiet { color: #55606c; font-size: 13px; }
.verdict { margin: 18px 0; padding: 14px 18px; border-left: 8px solid; } .verdict strong { font-size: 22px; }
.verdict ul { margin: 6px 0 0; padding-left: 20px; }
.pass { border-color: #23743c; background: #eef7f0; } .fail, .warn { border-color: #b3261e; background: #fcefee; }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; } .fact { border: 1px solid #d8dde3; border-radius: 5px; padding: 9px 13px; }
.fact b { display: block; font-size: 22px; line-height: 1.3; white-space: nowrap; } .fact span { display: block; font-size: 13px; color: #55606c; }
table { border-collapse: collapse; width: 100%; font-size: 13px; margin: 8px 0; }
th { text-align: left; border-bottom: 1.5px solid #37414d; vertical-align: bottom; }
th, td { padding: 3px 9px 3px 0; } td { border-bottom: 1px solid #e6e9ed; vertical-align: top; overflow-wrap: anywhere; }
th.n { white-space: normal !important; } .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
code, .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; }
svg { width: 100%; height: auto; display: block; font-family: inherit; } svg.bar { width: 160px; height: 9px; margin-top: 5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px 26px; margin-top: 12px; } figure { margin: 0; break-inside: avoid; }
.key { display: inline-block; width: 22px; height: 10px; margin: 0 5px 0 14px; } .total td { font-weight: 600; border-top: 1.5px solid #37414d; }
@media print { @page { size: A4; margin: 14mm; } body { padding: 0; font-size: 11px; max-width: none; } h2 { break-after: avoid; margin-top: 22px; }
  tr, .fact, .verdict { break-inside: avoid; } thead { display: table-header-group; } table { font-size: 9.5px; } code, .mono { font-size: 8.5px; }
  .quiet, .fact span, h3 { font-size: 10px; } svg.bar { width: 90px; height: 5px; } .pair { gap: 10px 18px; }
  .fact b { font-size: 17px; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(evidence: Evidence, library: str, model: str) -> str:
    """The whole document. `library`, `model`: file names to show."""
    title = f"{evidence.manifest.get('model', model)}: int8 against float"
    sections = [
        f"<h1>{_e(title)}</h1>",
        f'<p class="quiet">Library <code>{_e(library)}</code> for {_e(evidence.manifest["target"])}, compared with <code>{_e(model)}</code> in float32</p>',
        _verdict(evidence),
        _facts(evidence),
        _outputs(evidence),
        _layers(evidence),
        _distributions(evidence),
        _latency(evidence),
        _footprint(evidence),
        target_section(evidence.manifest["mixed_precision"]) if "mixed_precision" in evidence.manifest else "",
        _float(evidence),
        _calibration(evidence),
        _identity(evidence),
        _all_layers(evidence),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_e(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(s for s in sections if s) + "\n</body></html>\n"


def _e(value: object) -> str:
    return html.escape(str(value))


def _times(longer: float | None, shorter: float) -> str:
    """A ratio of times; empty where one is too short for the clock."""
    return f"{longer / shorter:.2f} x" if longer and shorter else ""


def _interval(fraction: float, rows: int | None) -> str:
    """rows: over which the fraction is, those that count."""
    if not rows:
        return "not known"
    low, high = wilson(round(fraction * rows), rows)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


# -- sections ---------------------------------------------------------------------------------------------------------------------------


def _verdict(e: Evidence) -> str:
    p = e.parity
    limits = p.thresholds
    rows: list[list[str]] = []

    def verdict(threshold: str, name: str, wanted: str, worst: str) -> None:
        met = all(c.met for c in p.checked(threshold))
        rows.append([_e(name), _e(wanted), _e(worst), "held" if met else "<b>missed</b>"])

    def found(threshold: str) -> list[float]:
        return [c.found for c in p.checked(threshold)]

    if limits.min_sqnr is not None:
        verdict("min_sqnr", "SQNR of every output", f"at least {limits.min_sqnr:g} dB", f"{number(min(found('min_sqnr')))} dB")
    if limits.min_agreement is not None:
        worst = percent(min(found("min_agreement"), default=None))
        verdict("min_agreement", "top-1 agreement with float", f"at least {percent(limits.min_agreement)}", worst)
    if limits.max_accuracy_drop is not None and (drops := found("max_accuracy_drop")):
        worst = f"{max(drops):.2f} points"
        verdict("max_accuracy_drop", "drop of top-1 accuracy", f"at most {limits.max_accuracy_drop:g} points", worst)
    if limits.max_metric_drop is not None and p.metric is not None:
        verdict("max_metric_drop", f"drop of {p.metric.name}", f"at most {limits.max_metric_drop:g}", f"{p.metric.drop:.4f}")
    if limits.max_channel_bias is not None:
        worst = f"{max(found('max_channel_bias'), default=0.0):.2f} steps"
        verdict("max_channel_bias", "bias of every channel", f"at most {limits.max_channel_bias:g} steps", worst)
    for check, what in (("selftest", "test vectors of the library"), ("digest", "digest of all results")):
        if p.checked(check):
            verdict(check, what, "every bit as expected", "equal" if all(c.met for c in p.checked(check)) else "other bits")
    failures = f"<ul>{''.join(f'<li>{_e(f)}</li>' for f in p.failures)}</ul>" if p.failures else ""
    imported = "" if p.imported is None else f'<p id="import">{_e(str(p.imported))}</p>'
    hidden = f'<p id="padding">{_e(hidden_text(p))}</p>' if p.hidden else ""
    word, kind = ("PASSED", "pass") if p.passed else ("FAILED", "fail")
    said = "every threshold holds" if p.passed else f"{len(p.failures)} finding{'s' if len(p.failures) > 1 else ''}"
    mismatch = "The library was compiled from another model file, or for other input shapes, than the one compared with: their digests differ."
    warning = "" if e.model_matches else f'<div class="verdict warn" id="model-mismatch"><strong>Not the same model</strong><br>{mismatch}</div>'
    on = f"{p.samples} sample{'s' * (p.samples != 1)}"
    box = f'<div class="verdict {kind}"><strong id="verdict">{word}</strong> on {on}: {said}.{failures}{hidden}{imported}</div>'
    return box + warning + html_table(("threshold", "required", "measured", "result"), rows, "thresholds")


def _facts(e: Evidence) -> str:
    p, tiles = e.parity, []

    def tile(name: str, value: str, what: str, more: str = "") -> None:
        tiles.append(f'<div class="fact"><span>{_e(what)}</span><b id="{name}">{_e(value)}</b><span>{_e(more)}</span></div>')

    if p.int8_accuracy is not None and p.float_accuracy is not None:
        tile("int8-accuracy", percent(p.int8_accuracy), "top-1 accuracy, int8", f"95 %: {_interval(p.int8_accuracy, p.rows)}")
        tile("float-accuracy", percent(p.float_accuracy), "top-1 accuracy, float", f"95 %: {_interval(p.float_accuracy, p.rows)}")
    if p.metric is not None:
        tile("metric", f"{p.metric.int8_value:.4f}", f"{p.metric.name}, int8", f"float: {p.metric.float_value:.4f}")
    if p.agreement is not None:
        tile("agreement", percent(p.agreement), "top-1 agreement with float", f"95 %: {_interval(p.agreement, p.rows)}")
    tile("sqnr", f"{number(min(r.metrics.worst_db for r in p.outputs))} dB", "SQNR of the output" + ("s, the least" if len(p.outputs) > 1 else ""))
    times = {t.name: t.minimum for t in e.totals}
    threads = f"{e.threads} thread{'s' if e.threads > 1 else ''}"
    both = f"{milliseconds(times['int8'])} against {milliseconds(times['float'])} ms, {threads}"
    tile("speedup", _times(times["float"], times["int8"]) or "not known", "speed, int8 over float", both)
    share = f"{e.library_bytes / e.parameter_bytes:.2f} of the float parameters" if e.parameter_bytes else ""
    tile("library-size", size(e.library_bytes), "library, code included", share)
    tile("parameter-size", size(e.parameter_bytes), "float parameters", f"model file: {size(e.model_bytes)}")
    if (count := e.manifest.get("operators")) is not None:
        wide = f"{count['int16']} in 16 bits, " if "int16" in count else ""
        tile("int8-layers", f"{count['int8']} of {sum(count.values())}", "operators in int8", f"{wide}{count['float']} computed in float")
    return '<div class="facts">' + "".join(tiles) + "</div>"


_METRICS = ("SQNR dB|", "max error|", "median error|", "mean error|", "cosine|")


def _metrics(row: Compared) -> list[str]:
    m = row.metrics
    return [number(m.sqnr_db), *(number(v, ".3g") for v in (m.max_error, m.median_error, m.mean_error)), number(m.cosine, ".5f")]


def _outputs(e: Evidence) -> str:
    rows = []
    for r in e.parity.outputs:
        interval = "" if r.agreement is None else _interval(r.agreement, r.rows)
        rows.append([f"<code>{_e(r.name)}</code>", _e(r.dtype), *_metrics(r), percent(r.agreement), interval])
        rows += [[f"<code>{_e(r.name)}</code>, {_e(name)}", "", number(db), *[""] * 6] for name, db in r.metrics.parts.items()]
    columns = ("output", "dtype", *_METRICS, "top-1 agreement|", "95 % interval|")
    note = (
        "SQNR is 10 log10 of signal power over error power. Errors are int8 minus float, in the output's own unit; the median and the maximum are of "
        "their magnitude. Intervals are Wilson's for a proportion, at 95 %."
    )
    return f'<h2>Outputs</h2>{html_table(columns, rows, "outputs")}<p class="quiet">{note}</p>'


def _layers(e: Evidence) -> str:
    layers = e.parity.layers
    if not layers:
        return "<h2>Layers</h2><p>Layers were not compared (--layer-samples 0).</p>"
    worst = [r.name for r in e.parity.worst_layers(WORST)]
    chart = sqnr_chart([r.name for r in layers], [r.metrics.sqnr_db for r in layers], [e.rounding.get(r.name) for r in layers], worst)
    key = (
        f'<span class="key" style="background:{INT8}"></span>as the library computes it: the error accumulated from the input up to this layer'
        f'<span class="key" style="background:{FLOAT}"></span>(dashed) the float value rounded to this layer\'s 8 bits: its own share'
    )
    note = (
        f"Over {e.parity.layer_samples} samples. Where the lines meet, the layer's own rounding dominates; the gap between them is drift "
        f"from the layers before. Rings number the {len(worst)} worst layers, shown below."
    )
    return f"<h2>Error from layer to layer</h2><p>{note}</p><figure>{chart}<figcaption class=quiet>{key}</figcaption></figure>"


def _distributions(e: Evidence) -> str:
    if not e.distributions:
        return ""
    rows = {r.name: r for r in e.parity.layers}
    figures = []
    for rank, d in enumerate(e.distributions, 1):
        chosen = "held in float32" if d.low is None else f"range [{d.low:.4g}, {d.high:.4g}], {100 * d.outside:.3g} % of the float values outside"
        caption = f'<h3>{rank}. <code>{_e(d.name)}</code></h3><span class="quiet">SQNR {number(rows[d.name].metrics.sqnr_db)} dB; {chosen}</span>'
        figures.append(f"<figure>{caption}{histogram(d)}</figure>")
    key = (
        f'<span class="key" style="background:{FLOAT};opacity:.55;margin-left:0"></span>float values'
        f'<span class="key" style="background:{INT8};height:3px;vertical-align:middle"></span>dequantized int8 values'
        '<span class="key" style="background:#fff3df;outline:1px solid #b3261e"></span>chosen range'
    )
    note = "Number of values per bin, on a logarithmic axis; bins are whole quantization steps. Values beyond the range are clipped to its ends."
    return f'<h2>The worst layers</h2><p class="quiet">{note}<br>{key}</p><div class="pair">{"".join(figures)}</div>'


def _latency(e: Evidence) -> str:
    times = {t.name: t for t in e.totals}
    order = sorted(e.steps, key=lambda s: -s.int8)
    shown, others = order[:_SLOWEST], order[_SLOWEST:]
    largest = max([1e-12, *(s.int8 for s in shown), *(s.float32 or 0.0 for s in shown)])

    def cells(s: StepTime) -> list[str]:
        bars = bar(s.int8, largest, INT8) + ("" if s.float32 is None else bar(s.float32, largest, FLOAT))
        return [f"<code>{_e(s.name)}</code>", _e(s.op), _e(s.kernel), _micro(s.int8), _micro(s.float32), _times(s.float32, s.int8), bars]

    rows = [cells(s) for s in shown]
    if others:
        shared = sum(s.float32 or 0.0 for s in others)
        rows.append([f"{len(others)} more steps", "", "", _micro(sum(s.int8 for s in others)), _micro(shared), "", ""])
    if e.float_only > 0:
        rows.append(["steps of the float network only", "", "", "", _micro(e.float_only), "", ""])
    both = sum(s.int8 for s in order), sum(s.float32 or 0.0 for s in order) + e.float_only
    rows.append(["sum of the steps", "", "", *map(_micro, both), _times(both[1], both[0]), ""])
    whole = [[t.name, milliseconds(t.minimum), milliseconds(t.median), str(t.rounds)] for t in (times["int8"], times["float"])]
    note = (
        f"Both networks are compiled for {_e(e.manifest['target'])} and take turns on the same sample. "
        f"Threads: {e.threads}. Times of single steps are the least of several runs. Times vary from run to run; nothing else on this page does. "
        "The speed at the top is the ratio of the least times of whole runs; the sums of single steps leave out what lies between them."
    )
    if e.busy is not None and e.busy > BUSY:
        note += f" <b>Other processes used {e.busy:.1f} cores meanwhile: these times and ratios are not to be relied on.</b>"
    steps = html_table(("step", "operator", "kernel", "int8 us|", "float us|", "faster|", ""), rows, "steps", last=True)
    return f'<h2>Latency</h2><p class="quiet">{note}</p>{html_table(("network", "least ms|", "median ms|", "rounds|"), whole, "latency")}{steps}'


def _footprint(e: Evidence) -> str:
    if not e.footprint:  # of a board
        return ""
    """Memory and energy of both networks."""

    def cells(name: str, m: Memory, energy: float | None) -> list[str]:
        spent = "" if energy is None else f"{1e3 * energy:.3f}"
        return [name, size(m.constants), size(m.workspace), "not measurable" if m.resident is None else size(m.resident), spent]

    rows = [cells(name, *e.footprint[name]) for name in ("int8", "float")]
    note = (
        "Constants are shared by all users of the library; each concurrent run has a workspace. Resident: by how much the memory of a fresh process grew, at "
        "most, while it loaded and ran the library. "
    )
    note += (
        "Energy is that of whole processor packages while one network runs again and again: other programs on the machine count too."
        if all(energy is not None for _, energy in e.footprint.values())
        else "Energy is not measurable on this machine: there is no energy counter (/sys/class/powercap) that this process may read."
    )
    columns = ("network", "constants|", "workspace|", "resident|", "mJ per run|")
    return f'<h2>Memory and energy</h2>{html_table(columns, rows, "footprint")}<p class="quiet" id="energy">{note}</p>'


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _float(e: Evidence) -> str:
    entries: list[dict[str, Any]] = e.manifest["float_ops"]
    if not entries:
        return '<h2>What stayed float</h2><p id="float-ops">Nothing: every operator is computed in int8.</p>'
    rows = [[f"<code>{_e(f['id'])}</code>", _e(f["op"]), f"<code>{_e(f['node'])}</code>", _e(f["reason"])] for f in entries]
    return f"<h2>What stayed float</h2>{html_table(('value', 'operator', 'node', 'why'), rows, 'float-ops')}"


def _calibration(e: Evidence) -> str:
    m = e.manifest
    scales = [float(v["scale"]) for v in m["values"].values()]
    facts = {
        "calibration samples": m.get("calibration_samples", "not recorded"),
        "preset": m.get("preset", "not recorded"),
        **{name.replace("_", " "): what for name, what in m.get("quantization", {}).items()},
        "8-bit values": f"{len(scales)}, scales from {min(scales):.3g} to {max(scales):.3g}" if scales else "none",
        "evaluation samples": f"{e.parity.samples}, of which {e.parity.layer_samples} for layers",
        **e.source,
    }
    return f"<h2>Calibration and data</h2>{_pairs(facts, 'calibration')}"


def _identity(e: Evidence) -> str:
    digests = {name: f'<span class="mono">{_e(value or "none")}</span>' for name, value in e.digests.items()}
    match = "the model compared with has the digest that the library records" if e.model_matches else "the library records another model"
    rows = [[_e(name), value + (f" &nbsp; {_e(match)}" if name == "model" else "")] for name, value in digests.items()]
    table = html_table(("what", "digest"), rows, "digests")
    return f"<h2>Identity</h2>{_pairs(e.environment, 'environment')}<p>SHA-256 of everything that decides the result:</p>{table}"


def _pairs(facts: dict[str, Any], name: str) -> str:
    rows = "".join(f'<tr><td style="width:22%">{_e(k)}</td><td>{_e(v)}</td></tr>' for k, v in facts.items())
    return f'<table id="{name}"><tbody>{rows}</tbody></table>'


def _all_layers(e: Evidence) -> str:
    if not e.parity.layers:
        return ""
    rows = []
    for index, r in enumerate(e.parity.layers, 1):
        alone, m = e.rounding.get(r.name), r.metrics
        bias = "" if m.channel_bias is None or not math.isfinite(m.channel_bias) else f"{m.channel_bias:+.2f} in {m.channel}"
        values = _metrics(r)
        rows.append([str(index), f"<code>{_e(r.name)}</code>", _e(r.dtype), values[0], number(alone), *values[1:], bias])
    columns = ("#|", "value", "dtype", _METRICS[0], "rounding alone|", *_METRICS[1:], "channel bias, steps|")
    note = "The SQNR is accumulated from the input on; rounding alone is that of the float value stored in this layer's 8 bits. Errors are in the layer's unit."
    return f'<h2>All layers</h2><p class="quiet">{note}</p>{html_table(columns, rows, "layers")}'
