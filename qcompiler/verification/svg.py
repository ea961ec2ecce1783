"""The drawings of the report, as SVG text: no scripts, no fonts, no files. Widths are in the units of a page 1100 wide."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.verification.evidence import Distribution

FLOAT, INT8, GRID, INK, BAD = "#3b6ea8", "#d9761a", "#d8dde3", "#37414d", "#b3261e"  # told apart by colour-blind readers too


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">' + "".join(parts) + "</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, fill: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def sqnr_chart(names: Sequence[str], measured: Sequence[float], rounding: Sequence[float | None], worst: Sequence[str]) -> str:
    """SQNR in dB of every layer in network order: as the library computes it, and with rounding of this layer alone. Equal values (inf) lie on the
    upper edge, NaN and -inf on the lower."""
    width, height, left, top, bottom = 1100, 330, 46, 14, 42
    finite = [v for v in [*measured, *rounding] if v is not None and math.isfinite(v)]
    low = 10 * math.floor(min([0.0, *finite]) / 10)
    high = 10 * math.ceil(max([30.0, *finite]) / 10)

    def x(i: int) -> float:
        return left + (i + 0.5) * (width - left - 10) / max(len(names), 1)

    def y(value: float) -> float:
        value = low if math.isnan(value) else min(max(value, low), high)
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for level in range(low, high + 1, 10):
        parts += [_line(left, y(level), width - 10, y(level)), _text(left - 6, y(level) + 4, str(level), "end")]
    parts.append(_text(left + 2, top - 2, "dB", size=11))
    every = max(1, math.ceil(len(names) / 25))
    parts += [_text(x(i), height - bottom + 18, str(i + 1), "middle", 11) for i in range(0, len(names), every)]
    parts.append(_text((left + width) / 2, height - 6, "layer, in network order", "middle"))
    series: list[tuple[str, Sequence[float | None], str]] = [(FLOAT, rounding, 'stroke-dasharray="5 3"'), (INT8, measured, "")]
    for colour, values, extra in series:
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values) if v is not None)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" {extra}/>')
    ranks = {name: rank for rank, name in enumerate(worst, 1)}
    for i, (name, value) in enumerate(zip(names, measured, strict=True)):
        title = f"<title>{i + 1}. {html.escape(name)}: {value:.2f} dB</title>"
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3" fill="{INT8}">{title}</circle>')
        if name in ranks:
            parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="6.5" fill="none" stroke="{BAD}" stroke-width="1.4"/>')
            parts.append(_text(x(i), y(value) + 20, str(ranks[name]), "middle", 11, BAD))
    return _svg(width, height, "SQNR of every layer in network order", parts)


def pareto_chart(account: Mapping[str, Any]) -> str:
    """SQNR against latency of the plans of `mixed_precision`: predicted ones as a line, compiled ones as points labelled with float layers and size,
    with the lower end of their confidence interval; the chosen one ringed. A point without an SQNR (exact) lies on the upper edge."""
    width, height, left, top, bottom = 1100, 330, 52, 18, 44
    points, curve = account["points"], [p for p in account["curve"] if p["sqnr_db"] is not None]
    wanted = next((float(w) for flag, w in itertools.pairwise(account["goal"].split()) if flag == "--min-sqnr"), None)
    levels: list[float] = [v for p in [*points, *curve] for v in (p["sqnr_db"], p.get("sqnr_bound_db")) if v is not None] + ([] if wanted is None else [wanted])
    times: list[float] = [1e3 * p["seconds"] for p in [*points, *curve, account["float"]]]
    low, high = 5 * math.floor(min(levels, default=0.0) / 5), 5 * math.ceil(max([*levels, min(levels, default=0.0) + 5]) / 5)
    step = _round_step((max(times) - 0.9 * min(times)) / 6)
    begin, end = step * math.floor(0.9 * min(times) / step), step * math.ceil(1.02 * max(times) / step)

    def x(seconds: float) -> float:
        return left + (1e3 * seconds - begin) / (end - begin) * (width - left - 30)

    def y(value: float | None) -> float:
        return top + (high - (high if value is None else min(max(value, low), high))) / (high - low) * (height - top - bottom)

    parts = []
    for level in range(low, high + 1, 5 if high - low <= 40 else 10):
        parts += [_line(left, y(level), width - 10, y(level)), _text(left - 6, y(level) + 4, str(level), "end")]
    for i in range(round((end - begin) / step) + 1):
        parts.append(_text(x((begin + i * step) / 1e3), height - bottom + 17, f"{begin + i * step:.6g}", "middle", 11))
    parts += [_text(left + 4, top + 12, "SQNR dB", size=11), _text((left + width) / 2, height - 8, "latency in ms", "middle")]
    if wanted is not None:
        parts.append(_line(left, y(wanted), width - 10, y(wanted), BAD, 'stroke-dasharray="2 4" stroke-width="1.5"'))
    line = " ".join(f"{x(p['seconds']):.1f},{y(p['sqnr_db']):.1f}" for p in curve)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{FLOAT}" stroke-width="1.6"/>')
    edge = x(account["float"]["seconds"])
    parts += [_line(edge, top, edge, height - bottom, FLOAT, 'stroke-dasharray="5 3"'), _text(edge - 5, top + 12, "float32 network", "end", 11, FLOAT)]
    for p in points:
        at, up = x(p["seconds"]), y(p["sqnr_db"])
        if p["sqnr_bound_db"] is not None:
            bound = y(p["sqnr_bound_db"])
            parts += [_line(at, up, at, bound, INT8, 'stroke-width="2"'), _line(at - 6, bound, at + 6, bound, INT8, 'stroke-width="2"')]
        parts.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="4" fill="{INT8}"/>')
        if p["chosen"]:
            parts.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="9" fill="none" stroke="{INK}" stroke-width="1.6"/>')
        label = f"{len(p['float_layers'])} float, {p['bytes'] / 1e6:.2f} MB"
        parts.append(_text(at + 14, up + 4, label, size=11) if at < width * 0.7 else _text(at - 14, up + 4, label, "end", 11))
    return _svg(width, height, "Accuracy against latency of the plans tried", parts)


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... (times a power of ten)."""
    decade = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(decade * m for m in (1, 2, 5, 10) if decade * m >= least * (1 - 1e-9))


def histogram(d: Distribution) -> str:
    """Counts on a logarithmic axis: float values filled, 8-bit values as a line, the chosen range between brackets."""
    width, height, left, top, bottom = 530, 190, 40, 10, 34
    counts = np.maximum(d.float_counts, d.int8_counts)
    decades = max(1, math.ceil(math.log10(max(int(counts.max(initial=1)), 10))))
    begin, end = float(d.edges[0]), float(d.edges[-1])

    def x(value: float) -> float:
        return left + (value - begin) / max(end - begin, 1e-300) * (width - left - 10)

    def y(count: float) -> float:  # one unit below 1 for empty bins
        return height - bottom - (math.log10(count) + 0.3 if count >= 1 else 0.0) / (decades + 0.3) * (height - top - bottom)

    parts = []
    for decade in range(0, decades + 1, 1 if decades < 6 else 2):
        parts += [_line(left, y(10**decade), width - 10, y(10**decade)), _text(left - 5, y(10**decade) + 4, _power(decade), "end", 10)]
    if d.low is not None and d.high is not None:
        parts.append(f'<rect x="{x(d.low):.1f}" y="{top}" width="{x(d.high) - x(d.low):.1f}" height="{height - top - bottom}" fill="#fff3df"/>')
    bars = [
        f"M{x(a):.1f} {height - bottom}V{y(int(n)):.1f}H{x(b):.1f}V{height - bottom}Z"
        for a, b, n in zip(d.edges[:-1].tolist(), d.edges[1:].tolist(), d.float_counts.tolist(), strict=True)
        if n
    ]
    parts.append(f'<path d="{"".join(bars)}" fill="{FLOAT}" fill-opacity="0.55"/>')
    tops = [f"{x(a):.1f} {y(int(n)):.1f}H{x(b):.1f}" for a, b, n in zip(d.edges[:-1].tolist(), d.edges[1:].tolist(), d.int8_counts.tolist(), strict=True)]
    parts.append(f'<path d="M{"L".join(tops)}" fill="none" stroke="{INT8}" stroke-width="1.3"/>')
    if d.low is not None and d.high is not None:
        for bound, turn in ((d.low, 5), (d.high, -5)):
            edge = x(bound)
            parts.append(f'<path d="M{edge + turn:.1f} {top}H{edge:.1f}V{height - bottom}H{edge + turn:.1f}" fill="none" stroke="{BAD}" stroke-width="1.5"/>')
    parts.append(_line(left, height - bottom, width - 10, height - bottom, INK))
    for value, anchor in ((begin, "start"), (end, "end")):  # an end half a step off zero is zero to a reader
        parts.append(_text(x(value), height - bottom + 15, "0" if abs(value) < 0.02 * (end - begin) else f"{value:.3g}", anchor, 11))
    if begin < 0 < end and 0.15 < (0 - begin) / (end - begin) < 0.85:
        parts.append(_text(x(0.0), height - bottom + 15, "0", "middle", 11))
    return _svg(width, height, f"Distribution of {d.name}", parts)


def _power(decade: int) -> str:
    """10^decade as people write it: 1, 100, 10k, 1M."""
    return f"{10 ** (decade % 3)}{('', 'k', 'M', 'G', 'T')[decade // 3]}"


def bar(value: float, largest: float, colour: str) -> str:
    """A horizontal bar of a table cell: `value` of `largest`."""
    width = 0.0 if largest <= 0 else 160 * value / largest
    return f'<svg class="bar" viewBox="0 0 160 9" aria-hidden="true"><rect width="{width:.1f}" height="9" fill="{colour}"/></svg>'
