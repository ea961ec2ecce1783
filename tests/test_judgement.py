"""What is said of outputs that have lost much, or may lose it on samples that calibration has not seen."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from onnx_nets import OnnxNet

from qcompiler.numerics.spec import QParams
from qcompiler.pipeline.compile import Compilation, compile_stages
from qcompiler.pipeline.goal import decibel
from qcompiler.plan.quant_plan import Derived, Fixed, Quantized, QuantPlan, Shared
from qcompiler.plan.ranges import SampleEnds
from qcompiler.plan.together import without_sample


def compiled(folder: Path, loudness: list[float], spread: float = 0.0, target: str = "native", preset: str = "fast") -> Compilation:
    """A convolution and two outputs, of which the second adds features of magnitudes that differ by `spread` decades."""
    net = OnnxNet(seed=1)
    y = net.op("Relu", net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(8, 3, 3, 3), pads=[1] * 4))
    fine = net.op("Mul", y, net.const(np.logspace(0, -spread, 8).reshape(1, -1, 1, 1)))
    last = net.op("Conv", fine, net.const(np.logspace(0, spread, 8).reshape(1, -1, 1, 1) * net.rng.standard_normal((4, 8, 1, 1))))
    rng = np.random.default_rng(0)
    samples = [{"x": (scale * rng.standard_normal((1, 3, 8, 8))).astype(np.float32)} for scale in loudness]
    return compile_stages(net.save(folder / "net.onnx", [y, last]), target, samples, preset=preset)


def said(made: Compilation) -> list[str]:
    return [w for w in made.artifact.manifest["warnings"] if "lose much" in w]


def test_a_sound_network_is_not_warned_of(tmp_path: Path) -> None:
    made = compiled(tmp_path, [1.0] * 6)
    assert not said(made) and made.artifact.manifest["sqnr_db"] > 25


@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512"])
def test_the_worst_output_is_judged_on_every_target(target: str, tmp_path: Path) -> None:
    """By an estimate where it is not this machine, which one of these is not."""
    made = compiled(tmp_path, [1.0] * 4, spread=2.2, target=target)
    (line,) = said(made)
    found = made.artifact.manifest["sqnr_db"]
    assert 5 < found < 20 and f"about {found:.1f} dB are left on the calibration samples" in line and "--preset default" in line


def test_corrected_networks_have_one_figure_on_every_target(tmp_path: Path) -> None:
    """The bits are the same, and so is what they are judged by."""
    first, second, here = (compiled(tmp_path, [1.0] * 4, target=t, preset="default").artifact.manifest for t in ("x86-avx2", "x86-avx512", "native"))
    assert first["digests"]["plan"] == here["digests"]["plan"] and first["sqnr_db"] == second["sqnr_db"] == here["sqnr_db"]


@pytest.mark.parametrize("loud", [3, 12])
def test_what_others_may_lose_is_said(loud: int, tmp_path: Path) -> None:
    """One sample is five times as loud as the others, wherever it stands among them, and so may the next one be."""
    made = compiled(tmp_path, [5.0 if i == loud else 1.0 for i in range(loud + 3)])
    (line,) = said(made)
    assert line.startswith("the outputs may lose much") and made.artifact.manifest["sqnr_db"] > 25
    assert float(line.split("on others maybe ")[1].split(" dB")[0]) < 20


def test_a_plan_without_a_sample() -> None:
    """Ranges from data are narrower by what that sample alone reached, those that are stored alike together; what is fixed stays."""
    p, fixed = QParams.from_range(-1.0, 3.0), QParams(1 / 256, -128)
    edges = {"a": Quantized(p, "min-max", 40.0, ""), "b": Shared("a", ""), "c": Derived("b", ""), "d": Fixed(fixed, None, "")}
    plan, ends = QuantPlan("fast", edges=edges), SampleEnds(edges)
    ends.ends |= {"a": [(-1.0, 1.0), (0.5, 1.5), (-1.0, 0.5)], "b": [(0.0, 3.0), (0.0, 1.0), (0.0, 0.0)], "d": [(0.0, 1.0), (0.0, 0.1), (0.0, 0.1)]}
    params = dict.fromkeys("abc", p) | {"d": fixed}
    first, second, last = (without_sample(plan, params, ends, i) for i in range(3))
    assert first["a"] == first["b"] == first["c"] and first["d"] == fixed
    reach = [p.scale * (limit - p.zero_point) for limit in (-128, 127)]
    assert first["a"] == QParams.from_range(reach[0], reach[1] / 2)
    assert second == last == params
    assert math.isinf(decibel(0.0)) and without_sample(plan, params, SampleEnds(()), 0) == params


def test_the_roundings_of_a_file_are_not_called_ours(tmp_path: Path) -> None:
    """Nobody's options make them finer."""
    net = OnnxNet(seed=1)

    def rounded(x: str, scale: float) -> str:
        pair = [net.const(scale), net.const(0, "int8")]
        return str(net.op("DequantizeLinear", net.op("QuantizeLinear", x, *pair), *pair))

    w = net.const(net.rng.integers(-127, 128, (4, 3, 3, 3)), "int8")
    weight = net.op("DequantizeLinear", w, net.const(0.01), net.const(0, "int8"))
    y = rounded(net.op("Conv", rounded(net.input("x", 1, 3, 8, 8), 1.0), weight), 1.0)
    samples = [{"x": np.random.default_rng(i).standard_normal((1, 3, 8, 8)).astype(np.float32)} for i in range(3)]
    made = compile_stages(net.save(tmp_path / "net.onnx", [y]), "native", samples)
    (line,) = said(made)
    assert line.startswith("the model file's own roundings, which are kept, lose much") and "--" not in line and "float network that it came from" in line
