"""Results as text for people: the tables that the command line prints. Nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.base.text import count_text, float_layers, milliseconds, number, percent, size, table
from qcompiler.cli.sheets import Sheet
from qcompiler.numerics.weight_only import heading
from qcompiler.pipeline.texts import weights_text
from qcompiler.runtime.bench import Timing, ratios
from qcompiler.runtime.library import on_gpu, session_bytes
from qcompiler.runtime.shapes import of_inputs, specializations, spelled

if TYPE_CHECKING:
    from qcompiler.backend.artifact import Artifact
    from qcompiler.verification.footprint import Memory


_REASONS = 5  # operators in float that the summary names


def compiled_text(output: Path, artifact: Artifact, model: str, verbose: bool) -> str:
    """What `qcompiler compile` says in the end: what was made, how good it is expected to be, what stayed float and why, and what to do next."""
    manifest = artifact.manifest
    floats, shown = manifest["float_ops"], len(manifest["float_ops"]) if verbose else _REASONS
    lines = [f"{output}: {size(artifact.size)} for {manifest['target']}"]
    if (count := manifest.get("operators")) is not None:
        quality = manifest.get("sqnr_db")
        lines.append(count_text(count) + ("" if quality is None else f"; SQNR of the outputs about {number(quality)} dB on calibration samples"))
    lines += [f"note: {n}" for n in manifest.get("notes", [])]
    lines += [f"{entry['id']} ({entry['op']}) stays float: {entry['reason']}" for entry in floats[:shown]]
    if len(floats) > shown:
        lines.append(f"... and {len(floats) - shown} more in float; qcompiler inspect {output} lists them")
    wide = manifest.get("sixteen", [])
    lines += [f"'{entry['id']}' has 16 bits: {entry['reason']}" for entry in (wide if verbose else wide[:_REASONS])]
    if len(wide) > _REASONS and not verbose:
        lines.append(f"... and {len(wide) - _REASONS} more in 16 bits; qcompiler inspect {output} lists them")
    if "shapes" in manifest:
        lines += ["", shapes_sheet(manifest).text()]
    if "mixed_precision" in manifest:
        lines += ["", target_text(manifest["mixed_precision"])]
    if "weights" in manifest:
        lines.append(heading(manifest["weights"]))
    if artifact.imported is not None:
        lines.append(str(artifact.imported))
    return "\n".join([*lines, f"Next: qcompiler verify {output} --model {model} --data DATA; qcompiler bench {output} --model {model}"])


def timing_text(timings: Sequence[Timing], base: str, batch: int = 1, threads: int = 1) -> str:
    """Latencies, and their ratio to `base` (below 1: faster). batch: samples of a call."""
    factors = ratios(timings, base)
    rows = [
        [t.name, *map(milliseconds, (t.minimum, t.mean, t.median, t.p90, t.p99)), f"{batch / t.mean:.1f}", f"{factors[t.name]:.3f}", str(t.rounds)]
        for t in timings
    ]
    title = f"Latency of a call with {batch} sample{'s' * (batch > 1)}, {threads} thread{'s' * (threads > 1)}"
    text = table(title, ("what", "minimum ms|", "mean|", "p50|", "p90|", "p99|", "samples/s|", f"x {base}|", "calls|"), rows)
    return f"{text}\n'x {base}' is the minimum over that of {base}: below 1 is faster"


def profile_text(steps: Sequence[tuple[str, str, str, float]], floats: Sequence[tuple[str, str, str, float]] = ()) -> str:
    """Per step: value, operator, kernel row, time, share; and what the float network takes for the same value, where `floats` are its steps."""
    total = sum(seconds for *_, seconds in steps)
    spent: dict[str, float] = {}
    for value, _, _, seconds in floats:
        spent[value] = spent.get(value, 0.0) + seconds
    last = {value: index for index, (value, *_) in enumerate(steps)}  # a value's halo is filled before it is computed
    rows = []
    for index, (value, op, kernel, seconds) in enumerate(steps):
        beside = spent.get(value) if last[value] == index else None
        rows.append([value, op, kernel, f"{seconds * 1e6:.1f}", percent(seconds / total), *([number(beside and beside * 1e6, ".1f")] if floats else [])])
    columns = ("value", "operator", "kernel", "us|", "share|", *(["in float us|"] if floats else []))
    return table(f"Steps, {total * 1e3:.3f} ms in all" + (f"; {sum(spent.values()) * 1e3:.3f} ms in float" if floats else ""), columns, rows)


def footprint_text(measured: Mapping[str, tuple[Memory, float | None]]) -> str:
    """Memory and energy per network."""
    rows = [
        [name, size(m.constants), size(m.workspace), "not measurable" if m.resident is None else size(m.resident), "" if j is None else f"{1e3 * j:.3f}"]
        for name, (m, j) in measured.items()
    ]
    text = table("Memory and energy", ("network", "constants|", "workspace|", "resident|", "mJ per run|"), rows)
    missing = any(j is None for _, j in measured.values())
    return text + ("\nenergy is not measurable on this machine: no counter in /sys/class/powercap that this process may read" if missing else "")


def port_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """Per input and output: name, type, shape, and what its numbers mean where the network's own are float32."""
    found = []
    for kind in ("inputs", "outputs"):
        for port in manifest[kind]:
            said, meaning = manifest.get("ports", {}).get(kind, {}).get(port["name"]), ""
            if said is not None and "preprocess" in said:
                p = said["preprocess"]
                meaning = (
                    f"pixels, {p['color']}: (x * {p['scale']:g} - {p['mean']}) / {p['std']}"
                    if p["color"] == "GRAY"
                    else (f"pixels R, G, B; {p['color']}: (x * {p['scale']:g} - {p['mean']}) / {p['std']}")
                )
            elif said is not None:
                meaning = f"{port['scale']:.6g} * (q - {port['zero_point']})"
            found.append([kind[:-1], port["name"], port["dtype"], str(port["shape"]), meaning])
    return found


def shapes_sheet(manifest: Mapping[str, Any]) -> Sheet:
    """The shapes that a library was compiled for, and what each takes beside those before it."""
    rows = []
    for m in specializations(manifest):
        rows.append([spelled(of_inputs(m)), str(len(m["steps"])), size(m["code_added"]), size(m["constants_added"]), size(m["workspace"])])
    return Sheet(f"Shapes: {len(rows)}", ("inputs", "steps|", "code added|", "constants added|", "workspace|"), rows)


def step_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per step of the library: value id, operator, how its result is held, kernel row, multiply-adds, and why it is not int8 (or None)."""
    reasons = {entry["id"]: entry["reason"] for entry in [*manifest.get("sixteen", []), *manifest["float_ops"]]}
    steps = []
    for step in manifest["steps"]:
        if step.get("auxiliary"):
            continue
        entry = manifest["layouts"][step["id"]]
        dtype = "int8" if entry["storage"] in ("int8", "uint8") and "unsigned" not in entry else entry["storage"]
        row = {
            "id": step["id"],
            "op": step["op"],
            "dtype": dtype,
            "kernel": step["kernel"],
            "macs": step["macs"],
            "reason": reasons.get(step["id"]),
        }
        steps.append(row)
    return steps


def manifest_sheets(manifest: Mapping[str, Any], file_size: int) -> list[Sheet]:
    """What `qcompiler inspect` shows: the library, what the quantization did, what to know it by, its ports, its steps."""
    compiler = ", ".join(f"{name} {version}" for name, version in manifest.get("compiler", {}).items())
    quality = manifest.get("sqnr_db")
    general = {
        "model": manifest.get("model"),
        "target": f"{manifest['target']} ({', '.join(manifest['features'])})",
        "triple": manifest.get("triple"),
        "size": size(file_size),
        "weights and tables": size(manifest["constants"]) if "constants" in manifest else None,
        "memory of a run": size(manifest["workspace"]) if "workspace" in manifest and not on_gpu(manifest) else None,
        "memory of a session": f"{size(session_bytes(manifest))} on the GPU, beside weights and tables once" if on_gpu(manifest) else None,
        "compiled by": compiler,
        "format, numerics": ", ".join(str(manifest[k]) for k in ("format", "numerics") if k in manifest),
        "preset": manifest.get("preset"),
        "calibration samples": manifest.get("calibration_samples"),
        "operators": None if (count := manifest.get("operators")) is None else count_text(count),
        "expected SQNR": None if quality is None else f"{number(quality)} dB on calibration samples",
        "warnings": "; ".join(manifest.get("warnings", [])),
        "notes": "; ".join(manifest.get("notes", [])),
    }
    sheets = [Sheet("Library", ("", ""), _filled(general))]
    if done := _filled(manifest.get("quantization", {})):
        sheets.append(Sheet("What the steps of the quantization did", ("", ""), done))
    if known := _filled(manifest.get("digests", {})):
        sheets.append(Sheet("Digests (SHA-256)", ("", ""), known))
    sheets.append(Sheet("Inputs and outputs", ("", "name", "dtype", "shape", "its numbers"), port_rows(manifest)))
    if "shapes" in manifest:
        sheets.append(shapes_sheet(manifest))
    values, cells = manifest.get("values", {}), []
    for s in step_rows(manifest):
        stored = values.get(s["id"], {}) if s["dtype"] in ("int8", "int16") else {}
        scale = f"{stored['scale']:.5g}" if "scale" in stored else ""
        cells.append([s["id"], s["op"], s["dtype"], scale, str(stored.get("zero_point", "")), s["kernel"], f"{s['macs'] / 1e6:.2f}", s["reason"] or ""])
    columns = ("value", "operator", "result", "scale|", "zero point|", "kernel", "MMAC|", "why not int8")
    return [*sheets, Sheet("Steps", columns, cells)]


def _filled(rows: Mapping[str, Any]) -> list[list[str]]:
    """The rows that say something."""
    return [[key.replace("_", " "), str(value)] for key, value in rows.items() if value not in (None, "")]


def manifest_text(manifest: Mapping[str, Any], file_size: int) -> str:
    """The same as text, with what an accuracy target tried and how weights are stored."""
    more = [target_text(manifest["mixed_precision"])] if "mixed_precision" in manifest else []
    more += [weights_text(manifest["weights"])] if "weights" in manifest else []
    return "\n\n".join([*(s.text() for s in manifest_sheets(manifest, file_size)), *more])


def target_text(account: Mapping[str, Any]) -> str:
    """The plans that a compilation to an accuracy target tried (`mixed_precision` of the manifest), and what it decided."""
    float32 = account["float"]
    rows = [["float", "", "", "", "", milliseconds(float32["seconds"]), "1.000", size(float32["bytes"]), ""]]
    for p in sorted(account["points"], key=lambda p: p["seconds"]):
        drop = "" if p["accuracy_drop"] is None else f"{p['accuracy_drop']:.2f}"
        found = ("chosen" if p["chosen"] else "meets the target") if p["met"] else "most accurate, too little" if p["chosen"] else "misses"
        rows.append(
            [
                float_layers(len(p["float_layers"]), len(p.get("in_sixteen", ()))),
                number(p["sqnr_db"]),
                number(p["sqnr_bound_db"]),
                percent(p["agreement"]),
                drop,
                milliseconds(p["seconds"]),
                f"{p['seconds'] / float32['seconds']:.3f}",
                size(p["bytes"]),
                found,
            ]
        )
    columns = ("plan", "SQNR dB|", "at 95 %|", "agreement|", "accuracy drop|", "ms|", "x float|", "size|", "")
    title = f"Plans tried, {account['samples']} samples, {account['held_out']} held out; times on {account['measured_on']}, {account['threads']} thread"
    findings = [f"{f['wanted']}: {f['found']}{'' if f['met'] else ' (MISSED)'}" for f in account["findings"]]
    return "\n".join([table(title, columns, rows, width=180), "", *findings, account["statement"]])
