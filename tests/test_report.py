"""The page of `verify --report`: its figures are the report's, it refers to nothing outside of itself, and a browser shows it."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import require_browser

from qcompiler.base.errors import OutputError
from qcompiler.base.text import milliseconds, number, percent, size
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.numerics.metrics import Accumulator, wilson
from qcompiler.numerics.spec import QParams
from qcompiler.runtime.bench import Timing
from qcompiler.verification.compared import Compared
from qcompiler.verification.evidence import Evidence, StepTime, distribution, step_times
from qcompiler.verification.footprint import Memory
from qcompiler.verification.page import page
from qcompiler.verification.page_target import section as target_section
from qcompiler.verification.parity import Check, ParityReport, Thresholds
from qcompiler.verification.report import verify_report
from qcompiler.verification.svg import histogram, pareto_chart, sqnr_chart

VOID = {"meta", "br"}
TIMES = {"latency", "steps", "speedup", "footprint"}  # ids of what may differ from run to run


class Page(HTMLParser):
    """texts: id -> text of that element. rows: id of a table -> its cells. Fails where tags don't nest."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        name = dict(attrs).get("id")
        if name is not None:
            assert name not in self.texts, f"id {name} twice"
            self.texts[name] = ""
        for name, _ in attrs:
            assert not name.startswith("on") and name not in ("src", "href"), name
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))
        table = next((i for t, i in reversed(self.open) if t == "table" and i), None)
        if table and tag == "tr":
            self.rows.setdefault(table, []).append([])
        if table and tag == "td":
            self.rows[table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)  # <line/>

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, name in self.open:
            if name:
                self.texts[name] += data
        table = next((i for t, i in reversed(self.open) if t == "table" and i), None)
        if table and any(t == "td" for t, _ in self.open):
            self.rows[table][-1][-1] += data


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    _, evaluation, labels = demo_data()
    np.savez(folder / "images.npz", image=np.concatenate([s["image"] for s in evaluation[:80]]))
    np.save(folder / "labels.npy", labels[:80])
    return folder


@pytest.fixture(scope="module")
def made(files: Path, digits: Callable[[str], Path]) -> tuple[ParityReport, str]:
    """(report, page) of the example network."""
    limits = Thresholds(min_sqnr=15.0, min_agreement=0.9, max_accuracy_drop=3.0, max_channel_bias=40.0)
    data, labels = files / "images.npz", files / "labels.npy"
    parity = verify_report(digits("x86-avx2"), MODEL, data, files / "r.html", labels=labels, thresholds=limits, layer_samples=4, seconds=0.1)
    return parity, (files / "r.html").read_text(encoding="utf-8")


def test_figures_are_the_reports(made: tuple[ParityReport, str], digits: Callable[[str], Path]) -> None:
    parity, document = made
    shown = Page(document)
    assert shown.texts["verdict"] == ("PASSED" if parity.passed else "FAILED") == "PASSED"
    assert shown.texts["int8-accuracy"] == percent(parity.int8_accuracy)
    assert shown.texts["float-accuracy"] == percent(parity.float_accuracy)
    assert shown.texts["agreement"] == percent(parity.agreement)
    assert shown.texts["sqnr"] == f"{parity.outputs[0].metrics.sqnr_db:.2f} dB"
    assert shown.texts["library-size"] == size(digits("x86-avx2").stat().st_size)
    assert [cells[0] for cells in shown.rows["thresholds"] if cells] == [
        "SQNR of every output",
        "top-1 agreement with float",
        "drop of top-1 accuracy",
        "bias of every channel",
    ]
    assert all(cells[3] == "held" for cells in shown.rows["thresholds"] if cells)
    rows = [cells for cells in shown.rows["layers"] if cells]
    assert [(r[1], r[2], r[3]) for r in rows] == [(r.name, r.dtype, number(r.metrics.sqnr_db)) for r in parity.layers]
    assert all(float(r[4]) >= float(r[3]) - 1.0 for r in rows if r[2] == "int8"), [(r[1], r[3], r[4]) for r in rows]
    for row in parity.worst_layers(10):
        assert f"<code>{row.name}</code></h3>" in document
    digests = dict(cells for cells in shown.rows["digests"] if cells)
    assert {"library", "model", "calibration", "plan", "constants", "labels", "evaluation data, as fed"} <= set(digests)
    assert "has the digest" in digests["model"] and "model-mismatch" not in shown.texts
    total = [cells for cells in shown.rows["steps"] if cells][-1]
    assert total[0] == "sum of the steps" and float(total[3]) > 0 and float(total[4]) > 0


def test_the_page_stands_alone(made: tuple[ParityReport, str]) -> None:
    document = made[1]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|file://", document)
    assert not {"script", "link", "img", "iframe", "object", "audio"} & set(Page(document).tags)
    assert str(Path.home()) not in document or Path.home() == Path("/")


def test_nothing_but_times_changes(made: tuple[ParityReport, str], files: Path, digits: Callable[[str], Path]) -> None:
    limits = made[0].thresholds
    data, labels = files / "images.npz", files / "labels.npy"
    again = verify_report(digits("x86-avx2"), MODEL, data, files / "again.html", labels=labels, thresholds=limits, layer_samples=4, seconds=0.1)
    assert again == made[0]
    first, second = Page(made[1]), Page((files / "again.html").read_text(encoding="utf-8"))
    assert {k: v for k, v in first.texts.items() if k not in TIMES} == {k: v for k, v in second.texts.items() if k not in TIMES}
    pictures = [re.findall(r"<figure>.*?</figure>", p, re.S) for p in (made[1], (files / "again.html").read_text(encoding="utf-8"))]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 11


def test_failures_names_and_odd_numbers(made: tuple[ParityReport, str]) -> None:
    """Every name is escaped; NaN and infinity, missing labels, and a library of another model are all shown."""
    evil = '<b onload="x">&\'</b>'
    odd = Accumulator(0.1)
    odd.add(np.array([[np.nan, 1.0]]), np.array([[0.0, 1.0]]))
    same = Accumulator(0.1)
    same.add(np.ones((1, 2)), np.ones((1, 2)))
    rows = [Compared(evil, "int8", odd.metrics()), Compared("exact", "int8", same.metrics())]
    limits = Thresholds(min_sqnr=10.0, min_agreement=0.5)
    checks = [
        Check("min_sqnr", math.nan, False, f"output '{evil}': SQNR nan dB is below 10 dB"),
        Check("min_agreement", 0.75, True, "output 'SQNR': top-1 agreement 0.7500 is below 0.5"),
    ]
    parity = ParityReport(3, 3, [Compared(evil, "float32", odd.metrics())], rows, limits, checks=checks)
    manifest = {
        "model": evil,
        "target": "x86-avx2",
        "features": ["avx2"],
        "values": {evil: {"scale": 0.1, "zero_point": 0}},
        "float_ops": [{"id": evil, "op": evil, "node": evil, "reason": evil}],
    }
    d = distribution(evil, np.array([np.nan, 0.3]), np.array([0.3, 0.3]), QParams(0.1, 0))
    timings = [Timing("int8", 1e-3, 2e-3, 9), Timing("float", 3e-3, 4e-3, 9)]
    steps = [StepTime(evil, evil, evil, 1e-6, None)]
    sizes: dict[str, tuple[Memory, float | None]] = {"int8": (Memory(1000, 2000, None), 0.5), "float": (Memory(4000, 3000, 9000), 1.25)}
    evidence = Evidence(parity, {evil: 40.0}, [d], timings, steps, 0.0, 1, 10, 20, 0, manifest, {evil: evil}, False, {evil: evil}, sizes, {evil: evil})
    document = page(evidence, evil, evil)
    shown = Page(document)
    assert "<b onload" not in document and "onload" in shown.texts["float-ops"]
    assert shown.texts["verdict"] == "FAILED"
    assert [(cells[0], cells[3]) for cells in shown.rows["thresholds"] if cells] == [("SQNR of every output", "missed"), ("top-1 agreement with float", "held")]
    assert "another model" in shown.texts["model-mismatch"]
    assert "int8-accuracy" not in shown.texts and "agreement" not in shown.texts
    assert shown.texts["speedup"] == "3.00 x"
    assert [cells[3] for cells in shown.rows["layers"] if cells] == ["nan", "inf"]
    assert [cells[1:3] for cells in shown.rows["latency"] if cells] == [[milliseconds(t.minimum), milliseconds(t.median)] for t in timings]
    memory = [cells for cells in shown.rows["footprint"] if cells]
    assert memory == [["int8", "1.0 kB", "2.0 kB", "not measurable", "500.000"], ["float", "4.0 kB", "3.0 kB", "9.0 kB", "1250.000"]]
    assert "not compared" in page(replace(evidence, parity=replace(parity, layers=[]), distributions=[]), "l", "m")
    at_once = replace(evidence, totals=[Timing("int8", 0.0, 0.0, 9), Timing("float", 3e-3, 4e-3, 9)], steps=[StepTime(evil, evil, evil, 0.0, 1e-6)])
    assert Page(page(at_once, "l", "m")).texts["speedup"] == "not known"


def test_intervals_are_over_what_counts(made: tuple[ParityReport, str]) -> None:
    """Rows that a mask hides are none: an interval is that of the rows that an agreement is over, not of the samples."""
    parity = made[0]
    (out,) = parity.outputs
    assert out.rows == parity.samples == parity.rows
    few = replace(parity, outputs=[replace(out, agreement=0.75, rows=4)], int8_accuracy=0.5, float_accuracy=0.25, hidden=parity.samples - 4)
    evidence = Evidence(
        few,
        {},
        [],
        [Timing("int8", 1e-3, 2e-3, 9), Timing("float", 3e-3, 4e-3, 9)],
        [StepTime("v", "o", "k", 1e-6, None)],
        0.0,
        1,
        10,
        20,
        0,
        {"target": "t", "features": [], "values": {}, "float_ops": []},
        {},
        True,
        {},
        {},
    )
    document = page(evidence, "l", "m")
    for fraction in (3, 2, 1):
        low, high = wilson(fraction, 4)
        assert f"{100 * low:.2f} to {100 * high:.2f} %" in document


def account(met: bool = True) -> dict[str, Any]:
    """`mixed_precision` of a manifest: two plans, the second chosen and exact."""
    evil = '<b onload="x">'
    shared = {"agreement": None, "accuracy_drop": -0.5, "bytes": 2_000_000}
    points = [
        {"float_layers": [], "sqnr_db": 20.0, "sqnr_bound_db": 19.0, "seconds": 1e-3, "met": False, "chosen": False, **shared},
        {"float_layers": [evil], "sqnr_db": None, "sqnr_bound_db": None, "seconds": 2e-3, "met": met, "chosen": True, **shared},
    ]
    curve = [{"layers": i, "sqnr_db": 20.0 + i, "seconds": 1e-3 + i * 1e-4, "bytes": 10} for i in range(3)]
    times = {"int8_seconds": 1e-5, "float_seconds": 2e-5}
    layers = [{"id": evil, "sqnr_db": 30.0, **times}, {"id": "exact", "sqnr_db": None, **times}]
    return {
        "goal": "--min-sqnr 25", "met": met, "statement": f"about {evil}", "samples": 12, "held_out": 3, "threads": 1, "measured_on": "x86-avx2",
        "float": {"seconds": 4e-3, "bytes": 8_000_000}, "findings": [{"wanted": evil, "found": "24 dB", "met": met}], "points": points,
        "curve": curve, "sensitivity": {"samples": 2, "layers": layers},
    }  # fmt: skip


def test_the_section_on_an_accuracy_target() -> None:
    for met in (True, False):
        document = target_section(account(met))
        shown = Page(document)
        assert "<b onload" not in document and shown.texts["target"].startswith("about <b onload")
        assert ("(missed)" in shown.texts["target"]) != met and f'class="verdict {"pass" if met else "fail"}"' in document
        assert [cells for cells in shown.rows["plans"] if cells][1:] == [
            ["0 layers in float", "20.00", "19.00", "", "-0.50", "1.000", "0.250", "2.00 MB", "missed"],
            ["1 layer in float", "", "", "", "-0.50", "2.000", "0.500", "2.00 MB", "chosen, " + ("met" if met else "missed")],
        ]
        assert [cells[1] for cells in shown.rows["sensitivity"] if cells] == ["30.00", "exact"]
    assert "sensitivities were not measured" in target_section(account() | {"sensitivity": {}, "curve": []})


def test_the_pareto_chart_places_points() -> None:
    """Times lie on one scale, float's too; a higher SQNR is higher; an exact point lies on the upper edge; the chosen one is ringed."""
    chart = pareto_chart(account())
    circles = [(float(x), float(y), r) for x, y, r in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)" r="(\d)"', chart)]
    assert [r for *_, r in circles] == ["4", "4", "9"] and circles[1][:2] == circles[2][:2]
    float32 = float(re.findall(r'<line x1="([^"]+)"[^>]+stroke-dasharray="5 3"', chart)[0])
    assert float32 - circles[1][0] == pytest.approx(2 * (circles[1][0] - circles[0][0]), abs=0.3)  # 1, 2 and 4 ms
    assert circles[1][1] == 18.0 < circles[0][1]
    assert chart.count('stroke-width="2"') == 2, "a confidence interval where there is one"
    assert "<svg" in pareto_chart(account() | {"goal": "--min-agreement 0.9", "curve": [], "points": []})


def test_wilson() -> None:
    """Against values computed by hand from the formula's two roots: |p - p'| = z sqrt(p' (1 - p') / n)."""
    for k, n in ((0, 10), (10, 10), (1, 1), (37, 50), (8325, 10000)):
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(k / n - end) == pytest.approx(1.959963984540054 * (end * (1 - end) / n) ** 0.5, rel=1e-9)
    assert wilson(0, 10)[1] == pytest.approx(0.2775328, abs=1e-6)


def test_distributions_count_everything() -> None:
    rng = np.random.default_rng(0)
    params = QParams(0.05, -20)
    reference = rng.standard_normal(5000) * 3
    actual = params.dequantize(params.quantize(reference))
    d = distribution("x", reference, actual, params)
    assert d.float_counts.sum() == d.int8_counts.sum() == 5000
    assert len(d.edges) == len(d.float_counts) + 1 <= 100
    widths = np.diff(d.edges) / params.scale
    np.testing.assert_allclose(widths, np.rint(widths), atol=1e-9)
    low, high = params.range
    assert d.outside == pytest.approx(((reference < low - 0.025) | (reference > high + 0.025)).mean())
    assert d.outside > 0
    inside = (d.edges[:-1] > low) & (d.edges[1:] < high)  # rounding to nearest never leaves a bin that is whole steps wide
    np.testing.assert_array_equal(d.float_counts[inside], d.int8_counts[inside])
    flat = distribution("zero", np.zeros(3), np.zeros(3), None)
    assert flat.low is None and flat.float_counts.sum() == 3
    assert "NaN" not in histogram(flat) and "nan" not in histogram(d)


def test_charts_take_any_number() -> None:
    values = [1.0, float("nan"), float("inf"), float("-inf"), -25.0]
    chart = sqnr_chart([f"v{i}" for i in range(5)], values, [None, 50.0, None, 80.0, 1.0], ["v1"])
    coordinates = [float(c) for c in re.findall(r'c[xy]="([^"]+)"', chart)]
    assert np.isfinite(coordinates).all() and chart.count("<circle") == 6
    assert "<svg" in sqnr_chart([], [], [], [])


def test_steps_of_one_value_count_together() -> None:
    steps, rest = step_times([("a", "halo", "any", 1.0), ("a", "conv", "k", 3.0), ("b", "add", "k", 2.0)], [("a", "f", "k", 8.0), ("c", "f", "k", 5.0)])
    assert steps == [StepTime("a", "conv", "k", 4.0, 8.0), StepTime("b", "add", "k", 2.0, None)]
    assert rest == 5.0


def test_the_command(files: Path, digits: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(digits("x86-avx2")), "--model", str(MODEL), "--data", str(files / "images.npz"), "--layer-samples", "1"]
    assert main([*words, "--report", str(files / "cli.html")]) == 0
    assert f"{files / 'cli.html'}: the report" in capsys.readouterr().out
    assert main([*words, "--report", str(files / "failed.html"), "--min-sqnr", "99"]) == 1
    assert Page((files / "failed.html").read_text()).texts["verdict"] == "FAILED"
    assert main(["verify", "missing.so", "--model", "m", "--data", "d", "--report", str(files / "nowhere" / "r.html")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(OutputError):
        verify_report("missing.so", "m", "d", files)


def test_a_browser_shows_it(made: tuple[ParityReport, str], tmp_path: Path) -> None:
    """Rendered 1200 pixels wide: it fits, and all of its colours are there."""
    browser = require_browser()
    image = pytest.importorskip("PIL.Image")
    document = made[1].replace('<div class="facts">', target_section(account()) + '<div class="facts">')
    (tmp_path / "r.html").write_text(document, encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    shot, pdf = tmp_path / "r.png", tmp_path / "r.pdf"
    for option in ("--window-size=1200,3600", f"--screenshot={shot}"), ("--no-pdf-header-footer", f"--print-to-pdf={pdf}"):
        subprocess.run([*words, *option, f"file://{tmp_path / 'r.html'}"], check=True, capture_output=True, timeout=60)
    pixels = np.asarray(image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (3600, 1200, 3)
    for colour in ((0xD9, 0x76, 0x1A), (0xEE, 0xF7, 0xF0), (0xFF, 0xF3, 0xDF)):  # int8 curves, verdict, chosen range
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 200, colour
    assert (pixels[:, :20] > 250).all() and (pixels[:, -20:] > 250).all(), "nothing runs over the page's edge"
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 20_000
