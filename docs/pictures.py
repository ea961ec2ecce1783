"""The pictures of the site, drawn from what the code does: as SVG text, {file name: text}.

python docs/pictures.py FOLDER          # writes them there
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy as np

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.plan.quant_plan import Quantized
from qcompiler.schedules.conv_plan import Geometry, default_tiling
from qcompiler.schedules.table import Layout
from qcompiler.schedules.x86.isa import AVX512VNNI
from qcompiler.verification.evidence import Distribution
from qcompiler.verification.svg import BAD, FLOAT, GRID, INK, INT8, histogram

ROOT = Path(__file__).resolve().parent.parent
_BARS = 96


def pictures() -> dict[str, str]:
    """{file name: SVG}."""
    return {"pipeline.svg": pipeline((ROOT / "docs" / "architecture.md").read_text()), "range.svg": chosen_range(), "tile.svg": tile()}


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif">'
    return f'{start}<title>{title}</title><rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 13, fill: str = INK, weight: str = "normal") -> str:
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{fill}" font-weight="{weight}">{plain}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = INK) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{stroke}"/>'


def pipeline(architecture: str) -> str:
    """The stages, as the list at the head of docs/architecture.md has them: a row for each, with what goes in and what comes out."""
    block = architecture.split("```")[1]
    stages = re.findall(r"^(\w+) +(.+?) +-> (\S.*?)  +\S", block, flags=re.MULTILINE)
    left, row, width = 20, 38, 760
    parts = []
    for index, (name, taken, made) in enumerate(stages):
        y = 16 + index * row
        middle = y + 19
        parts += [_box(left + 240, y, 150, 28, "#eef3f9", FLOAT), _text(left + 315, middle, name, "middle", weight="bold")]
        parts += [_text(left + 226, middle, taken.strip(), "end", 12), _text(left + 410, middle, f"\u2192 {made.strip()}", size=12, fill=INT8)]
        if index + 1 < len(stages):
            parts.append(f'<path d="M{left + 315} {y + 28}v{row - 28}" stroke="{INK}" fill="none"/>')
    return _svg(width, 20 + len(stages) * row, "The stages of a compilation, and what goes through them", parts)


def chosen_range() -> str:
    """What calibration saw of a value of the example network, and the range that the plan gives its 8 bits: the value whose range is cut most."""
    with tempfile.TemporaryDirectory() as folder:
        stored = qcompiler.calibrate(MODEL, Path(folder) / "digits.qcal", demo_data()[0])
        plan = qcompiler.explain(MODEL, calibration=stored.path).plan  # type: ignore[union-attr]
    found: list[tuple[float, Distribution]] = []
    for name, edge in plan.edges.items():
        if not isinstance(edge, Quantized) or name not in stored.table.values:
            continue
        seen, params = stored.table.values[name].histogram, edge.params
        low, high = (float(params.scale) * (q - params.zero_point) for q in (-128, 127))
        edges = np.linspace(min(seen.low, low), max(seen.high, high), _BARS + 1)
        centres = (seen.edges[:-1] + seen.edges[1:]) / 2
        rounded = np.clip(np.rint(centres / params.scale), -128 - params.zero_point, 127 - params.zero_point) * params.scale
        counts = [np.histogram(np.clip(at, edges[0], edges[-1]), edges, weights=seen.counts)[0].astype(np.int64) for at in (centres, rounded)]
        outside = float(seen.counts[(seen.edges[1:] < low) | (seen.edges[:-1] > high)].sum() / max(seen.total, 1))
        cut = max(seen.high - high, low - seen.low) / max(seen.high - seen.low, 1e-30)
        found.append((cut, Distribution(name, edges, *counts, low, high, outside)))
    d = max(found, key=lambda pair: pair[0])[1]
    inner = re.sub(r"^<svg[^>]*>|</svg>$", "", histogram(d))
    legend = [
        _text(40, 214, f"value '{d.name}' of the example network, {stored.samples} samples; counts on a logarithmic axis", size=12),
        *(_box(40, 226, 12, 12, FLOAT), _text(58, 237, "as calibration saw it, in float", size=12)),
        *(_box(250, 231, 12, 2, INT8, INT8), _text(268, 237, "rounded to 8 bits", size=12)),
        *(_box(390, 226, 12, 12, "#fff3df", BAD), _text(408, 237, "the chosen range", size=12)),
        _text(40, 258, f"[{d.low:.4g}, {d.high:.4g}] clips {100 * d.outside:.2g} % of the values, for finer steps everywhere else", size=12),
    ]
    return _svg(540, 270, "A calibration histogram with the chosen range", [inner, *legend])


def tile() -> str:
    """The register tile that the compiler chooses for a convolution of 56 x 56 pixels, 3 x 3, from 64 to 64 channels, on AVX512 with VNNI."""
    x = out = Layout((1, 56, 56, 64), "uint8")
    geometry = Geometry(x, out, None, 64, 64, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    isa = AVX512VNNI
    chosen = default_tiling(geometry, isa)
    pixels, cell = chosen.rows * chosen.cols, 26
    parts = [_text(20, 24, "output pixels, 3 x 3 convolution on 56 x 56 x 64", weight="bold")]
    parts.append(_text(20, 42, "a tile in orange; a task computes a run of tiles", size=12))
    for r in range(max(chosen.rows, 3) + 1):
        for c in range(max(chosen.cols, 6) + 4):
            inside = r < chosen.rows and c < chosen.cols
            parts.append(_box(20 + c * cell, 56 + r * cell, cell - 3, cell - 3, INT8 if inside else "#f4f6f8", GRID))
    top = 56 + (max(chosen.rows, 3) + 1) * cell + 30
    of = f"{chosen.rows} x {chosen.cols} pixels times {chosen.blocks} vectors of {isa.lanes} channels"
    parts += [_text(20, top, f"its accumulators: {of}", weight="bold")]
    where = f"{pixels * chosen.blocks} of the {isa.registers} vector registers, over all {geometry.depth(isa.group)} dot steps of {isa.group} channels"
    parts.append(_text(20, top + 18, where, size=12))
    for p in range(pixels):
        for b in range(chosen.blocks):
            parts.append(_box(20 + b * 150, top + 30 + p * 18, 140, 14, "#fbe3cd", INT8))
            parts.append(_text(90 + b * 150, top + 41 + p * 18, f"pixel {p}, channels {b * isa.lanes} to {(b + 1) * isa.lanes - 1}", "middle", 10))
    return _svg(660, top + 50 + pixels * 18, "A register tile of a convolution", parts)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (folder / name).write_text(text)
