"""Whole networks on every x86 row: each 8-bit value equals the reference arithmetic's, by emulation where the machine lacks a row's instructions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tools import require_slow
from x86_emulation import ALL, AMX, build_network, each, runs_here

from qcompiler.backend import artifact
from qcompiler.backend.build import Built, build
from qcompiler.base.errors import IncompatibleDevice
from qcompiler.base.targets import Target, missing_features
from qcompiler.cli.demo import demo_data
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter

pytestmark = runs_here
Values = dict[str, np.ndarray]


def traced(compilation: Compilation, target: Target, inputs: Values, folder: Path) -> tuple[Values, set[str]]:
    """Every value and output of the library for `target`, and the rows of its kernels. Two threads: tile state is a thread's own."""
    library = build_network(compilation.integer, target).link()
    values: Values = {}
    session = Session(library.save(folder / f"{target.name}.so"), threads=2)
    outputs = session.trace(inputs, lambda name, value: values.__setitem__(name, value.copy()))
    return values | outputs, {step["kernel"].split("/")[0] for step in library.manifest["steps"] if step["op"] in ("qc.conv2d", "qc.dense")}


def equal_bytes(got: Values, want: Values, target: Target) -> int:
    """How many 8-bit values both have, all equal."""
    common = [name for name in got.keys() & want.keys() if got[name].dtype == np.int8]
    for name in common:
        np.testing.assert_array_equal(got[name], want[name], err_msg=f"{target.name}: {name}")
    return len(common)


@pytest.mark.parametrize("target", each(ALL))
def test_digits(target: Target, digits_compilation: Compilation, tmp_path: Path) -> None:
    image = demo_data()[1][3]
    want = interpreter.run(digits_compilation.integer, image, keep="all") | interpreter.run(digits_compilation.integer, image)
    got, rows = traced(digits_compilation, target, image, tmp_path)
    assert equal_bytes(got, want, target) >= 10
    np.testing.assert_array_equal(got["logits"], want["logits"])
    assert target.name in rows and rows <= set(target.rows)


@pytest.mark.parametrize("target", each(t for t in ALL if t.name in ("x86-avx2", "x86-avx512vnni")))  # the others take minutes each
def test_mobilenet_v2(target: Target, real_data: Path, root: Path, tmp_path: Path, mobilenet: tuple[Compilation, Values, Values]) -> None:
    compilation, sample, want = mobilenet
    got, _ = traced(compilation, target, sample, tmp_path)
    assert equal_bytes(got, want, target) >= 53


@pytest.fixture(scope="module")
def mobilenet(real_data: Path, root: Path) -> tuple[Compilation, Values, Values]:
    require_slow("MobileNetV2 on emulated x86 rows")
    pictures, preprocess = real_data / "imagenet" / "calibration", root / "benchmarks" / "preprocess" / "mobilenet_v2.yaml"
    compilation = compile_stages(real_data / "models" / "mobilenet_v2.onnx", "native", pictures, preprocess=preprocess, preset="fast")
    sample = next(iter(compilation.quantized.job.samples))
    return compilation, sample, interpreter.run(compilation.integer, sample, keep="all")


# -- tiles in a library ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portable(digits_compilation: Compilation) -> Built:
    return build_network(digits_compilation.integer, ALL[0])


def test_a_library_with_tiles_asks_for_them(portable: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime of an AMX library, around code that any machine runs: where Linux refuses tiles, no session comes to be."""
    header = artifact._model_header
    monkeypatch.setattr(artifact, "_model_header", lambda *given: header(*given).replace("#define QC_TILES 0", "#define QC_TILES 1"))
    path = portable.link().save(tmp_path / "model.so")
    if missing_features(AMX):
        with pytest.raises(IncompatibleDevice, match="compiled for x86-avx2, and Linux refuses it AMX tiles .* they need version 5.16 or later"):
            Session(path)
    else:
        Session(path)


def test_a_library_for_tiles_names_the_feature_that_is_missing(digits_compilation: Compilation, portable: Built, tmp_path: Path) -> None:
    missing = missing_features(AMX)
    if not missing:
        pytest.skip("this machine has tiles")
    assert "#define QC_TILES 1" in artifact._model_header(portable.link().manifest | {"features": list(AMX.features)}, AMX)
    with pytest.raises(IncompatibleDevice, match=f"compiled for x86-amx, which needs the CPU features? {missing[0]}"):
        Session(build(digits_compilation.integer, AMX, "generate code").link().save(tmp_path / "model.so"))
