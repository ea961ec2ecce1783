"""Recurrent layers in int8 and in float32 beside ONNX Runtime's, single threaded and interleaved; and a streaming network as it is used.

    python benchmarks/recurrent.py [--hidden 64 128 256 512] [--steps 40] [--seconds 3] [--stream silero_vad_openvino_16k.onnx]

Layers of random weights, as many inputs as hidden elements, fed with noise that wanders slowly; errors are against ONNX Runtime's results. `of ORT`: ratio
of the least times. --stream: a voice activity detector (`pip download --no-deps silero-vad==6.2.3`; a wheel is a zip file) that takes frames of 512 samples
behind 64 of the frame before, and hands its state on: calibrated and tested on noise whose loudness and pitch change, frame after frame in one session.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.base.text import number, table
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.bench import interleave, ratios
from qcompiler.runtime.peers import onnxruntime_call

GATES = {"LSTM": 4, "GRU": 3}


def layer(op: str, steps: int, hidden: int, path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"W": (1, GATES[op] * hidden, hidden), "R": (1, GATES[op] * hidden, hidden), "B": (1, 2 * GATES[op] * hidden)}
    weights = [numpy_helper.from_array((rng.standard_normal(s) / np.sqrt(hidden)).astype(np.float32), n) for n, s in shapes.items()]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (steps, 1, hidden)), ("y", (steps, 1, 1, hidden)))]
    node = helper.make_node(op, ["x", "W", "R", "B"], ["y"], hidden_size=hidden, **({"linear_before_reset": 1} if op == "GRU" else {}))
    model = helper.make_model(helper.make_graph([node], op, ports[:1], ports[1:], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def wandering(seed: int, steps: int, hidden: int) -> np.ndarray:
    return (np.cumsum(np.random.default_rng(seed).standard_normal((steps, 1, hidden)), 0) / np.sqrt(steps)).astype(np.float32)


def layers(hidden: list[int], steps: int, seconds: float, folder: Path) -> str:
    head, rows = ("layer", "int8 us|", "float us|", "ORT us|", "int8 of ORT|", "float of ORT|", "SQNR dB|"), []
    for op in GATES:
        for size in hidden:
            path = layer(op, steps, size, folder / f"{op}{size}.onnx")
            int8 = qcompiler.compile(path, calibration=[{"x": wandering(s, steps, size)} for s in range(20)]).save(folder / f"{op}{size}.so")
            session, twin = qcompiler.load(int8), qcompiler.load(compile_float(path).save(folder / f"{op}{size}f.so"))
            peer, x = onnxruntime.InferenceSession(path), {"x": wandering(99, steps, size)}
            tests = [{"x": wandering(s, steps, size)} for s in range(100, 110)]
            error = sqnr_db(np.stack([peer.run(None, t)[0] for t in tests]), np.stack([session.run(t)["y"] for t in tests]))
            calls = {"int8": lambda s=session, x=x: s.run(x), "float": lambda s=twin, x=x: s.run(x), "ORT": onnxruntime_call(path, x, 1)}  # type: ignore[misc]
            times = interleave(calls, seconds=seconds)
            least, of = {t.name: t.minimum for t in times}, ratios(times, "ORT")
            cells = [number(least[n] * 1e6) for n in ("int8", "float", "ORT")] + [f"{of[n]:.2f}" for n in ("int8", "float")]
            rows.append((f"{op} {size}, {steps} steps", *cells, f"{error:.1f}"))
    return table("recurrent layers, one thread", head, rows)


def frames(seed: int, count: int) -> list[np.ndarray]:
    """Frames of a stream: noise through a resonance, both of which change."""
    rng, samples = np.random.default_rng(seed), 512 * count + 64
    loudness = np.interp(np.arange(samples), np.linspace(0, samples, count // 3), rng.uniform(-4, -0.5, count // 3))
    pitch = np.interp(np.arange(samples), np.linspace(0, samples, count // 4), rng.uniform(90, 260, count // 4))
    voice = np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / 16000)) + rng.standard_normal(samples) / 2
    smooth = np.convolve(voice, np.hanning(12) / 6, "same") * 10**loudness
    return [smooth[i * 512 : i * 512 + 576].astype(np.float32)[None] for i in range(count)]


def stream(path: Path, seconds: float, folder: Path) -> str:
    peer = onnxruntime.InferenceSession(path)
    shape, samples = (2, 1, 128), []
    for seed in range(8):
        state = np.zeros(shape, np.float32)
        for x in frames(seed, 60):
            samples.append({"input": x, "state": state})
            state = peer.run(None, samples[-1])[1]
    library = qcompiler.compile(path, calibration=samples[::3], input_shapes={"state": shape}, state={"state": "stateN"}).save(folder / "stream.so")
    session, wanted, got = qcompiler.load(library), list[float](), list[float]()
    for seed in range(50, 54):
        state = np.zeros(shape, np.float32)
        session.reset()
        for x in frames(seed, 60):
            answer, state = peer.run(None, {"input": x, "state": state})
            wanted.append(float(answer.item()))
            got.append(session.run({"input": x})["output"].item())
    x = frames(60, 12)[8]
    calls = {"int8": lambda: session.run({"input": x}), "ORT": onnxruntime_call(path, {"input": x, "state": np.zeros(shape, np.float32)}, 1)}
    times = interleave(calls, seconds=seconds)
    worst = np.abs(np.array(wanted) - np.array(got)).max()
    return f"{path.name}: {ratios(times, 'ORT')['int8']:.2f} of ORT's time for a frame; probabilities of {len(got)} frames differ by at most {worst:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--stream", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(layers(options.hidden, options.steps, options.seconds, Path(folder)))
        if options.stream:
            print(stream(options.stream, options.seconds, Path(folder)))


if __name__ == "__main__":
    main()
