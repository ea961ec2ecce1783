"""Whole networks on ARM, emulated: every 8-bit value equals x86's and the reference arithmetic's, from one calibration."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulated import ARM, Host
from tools import NotTested, require_slow, require_target

from qcompiler.backend.artifact import Artifact
from qcompiler.backend.build import build
from qcompiler.base.errors import IncompatibleDevice, TargetError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import find_target, load_targets, missing_features
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.pipeline.compile import compile, compile_stages
from qcompiler.pipeline.library import Compilation, describe
from qcompiler.plan.planner import decide
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter

X86 = ("x86-avx2", "x86-avxvnni", "x86-avx512vnni")
Values = dict[str, np.ndarray]


def artifact_for(compilation: Compilation, name: str) -> Artifact:
    """The library for another target, of the integer network as it is."""
    return build(compilation.integer, find_target(name), "generate code").link(**describe(compilation.integer, compilation.quantized.model))


def traced(library: Artifact, inputs: Values, folder: Path) -> Values:
    """Every value and output of a library for this machine."""
    folder.mkdir()
    values: Values = {}
    outputs = Session(library.save(folder / "model.so")).trace(inputs, lambda name, value: values.__setitem__(name, value.copy()))
    return values | outputs


def assert_same(got: Values, want: Values, name: str) -> int:
    """Equal bytes wherever both have a value; returns how many 8-bit values were compared."""
    common = got.keys() & want.keys()
    for value in common:
        assert got[value].dtype == want[value].dtype, (name, value)
        np.testing.assert_array_equal(got[value], want[value], err_msg=f"{name}: {value}")
    return sum(got[value].dtype == np.int8 for value in common)


# -- the embedded network ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Compilation:
    return compile_stages(MODEL, "native", demo_data()[0])


@pytest.fixture(scope="module")
def image() -> Values:
    return demo_data()[1][3]


@pytest.fixture(scope="module")
def reference(digits: Compilation, image: Values) -> Values:
    return interpreter.run(digits.integer, image, keep="all") | interpreter.run(digits.integer, image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arm")


@pytest.mark.parametrize("name", ARM)
def test_digits_on_arm_equal_the_reference(name: str, digits: Compilation, image: Values, reference: Values, folder: Path) -> None:
    target = find_target(name)
    require_target(target)
    library = artifact_for(digits, name)
    outputs, values = Host.build(target, folder).run(library, image, folder / name)
    assert assert_same(values | outputs, reference, name) >= 10
    assert np.array_equal(outputs["logits"], reference["logits"])
    rows = {step["kernel"].split("/")[0] for step in library.manifest["steps"] if step["op"] in ("qc.conv2d", "qc.dense")}
    assert rows <= set(target.rows) and name in rows, "convolutions must not fall back on portable kernels"


@pytest.fixture(scope="module")
def partly_float() -> Compilation:
    """Layers in float at both ends, 8-bit layers between them."""
    off = ["equalize", "judge-ranges", "margins", "residuals", "halves", "correct-bias", "round-narrow", "round-all"]
    return compile_stages(MODEL, "native", itertools.islice(demo_data()[0], 16), preset="accurate", disable=off)


@pytest.mark.parametrize("name", ARM)
def test_layers_in_float_have_the_same_bits(name: str, partly_float: Compilation, image: Values, folder: Path) -> None:
    """Sums in the same order, fused multiplication and addition: as on x86. Armv7's NEON doesn't fuse, so there floats differ in the last bits."""
    target = find_target(name)
    require_target(target)
    here = traced(artifact_for(partly_float, "x86-avx2"), image, folder / f"float-x86-{name}")
    outputs, values = Host.build(target, folder).run(artifact_for(partly_float, name), image, folder / f"float-{name}")
    got = values | outputs
    floats = [v for v in got.keys() & here.keys() if got[v].dtype == np.float32]
    assert "relu1" in floats and "logits" in floats
    if target.architecture == "aarch64":
        assert assert_same(got, here, name) >= 8
    for value in floats:
        np.testing.assert_allclose(got[value], here[value], atol=1e-5, err_msg=value)


def test_one_calibration_gives_one_plan_for_every_target(digits: Compilation) -> None:
    network = digits.quantized
    digests = {name: decide(network.model, network.measured.table, target, "default").digest for name, target in load_targets().items()}
    assert set(ARM) | set(X86) <= digests.keys()
    assert len(set(digests.values())) == 1, digests


def test_cross_compiling_by_the_public_entry(digits: Compilation, image: Values, reference: Values, folder: Path) -> None:
    """Bias correction runs on this machine and reaches the library for the other one."""
    target = find_target("aarch64-linux-gnu+asimddp")
    require_target(target)
    library = compile(MODEL, target.triple + "+asimddp", demo_data()[0])
    assert library.manifest["target"] == "arm64-dotprod"
    assert library.manifest["digests"]["plan"] == digits.artifact.manifest["digests"]["plan"]
    assert library.manifest["quantization"] == digits.artifact.manifest["quantization"]
    outputs, _ = Host.build(target, folder).run(library, image, folder / "public")
    np.testing.assert_array_equal(outputs["logits"], reference["logits"])


# -- a real network ------------------------------------------------------------------------------------------------------------------------


def test_mobilenet_v2_is_byte_identical_everywhere(real_data: Path, root: Path, folder: Path) -> None:
    """The 53 8-bit values of MobileNetV2, on every target, from one calibration. Takes a minute."""
    require_slow("MobileNetV2 on ARM")
    for name in ARM:
        require_target(find_target(name))
    pictures, preprocess = real_data / "imagenet" / "calibration", root / "benchmarks" / "preprocess" / "mobilenet_v2.yaml"
    compilation = compile_stages(real_data / "models" / "mobilenet_v2.onnx", "native", pictures, preprocess=preprocess, preset="fast")
    (sample,) = itertools.islice(compilation.quantized.job.samples, 1)
    want = traced(compilation.artifact, sample, folder / "network")
    assert sum(v.dtype == np.int8 for v in want.values()) >= 53
    for name in X86:
        if not missing_features(find_target(name)):
            assert assert_same(traced(artifact_for(compilation, name), sample, folder / f"network-{name}"), want, name) >= 53
    for name in ARM:
        outputs, values = Host.build(find_target(name), folder).run(artifact_for(compilation, name), sample, folder / f"network-{name}")
        assert assert_same(values | outputs, want, name) >= 53
        shutil.rmtree(folder / f"network-{name}")


# -- the wrong machine ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cpu", "feature"), [("arm64-i8mm", "cortex-a72", "asimddp"), ("arm64-i8mm", "neoverse-n1", "i8mm"), ("arm64-dotprod", "cortex-a53", "asimddp")]
)
def test_a_cpu_without_the_instructions_is_an_error_not_a_crash(name: str, cpu: str, feature: str, digits: Compilation, image: Values, folder: Path) -> None:
    target = find_target(name)
    require_target(target)
    place = folder / f"{name}-{cpu}"
    place.mkdir()
    library = artifact_for(digits, name).save(place / "model.so")
    image["image"].tofile(place / "input0.bin")
    host = Host.build(target, folder)
    assert host.command(library, place).returncode == 0
    done = host.command(library, place, "-cpu", cpu)
    assert done.returncode == 7, (done.returncode, done.stderr)  # QC_ERROR_DEVICE
    assert f"compiled for {name}, which needs the CPU feature {feature}, and this CPU lacks it" in done.stderr


def test_a_library_for_another_architecture_is_refused(digits: Compilation, tmp_path: Path) -> None:
    target = find_target("arm64-neon" if host_architecture() != "aarch64" else "armv7-neon")
    require_target(target)
    library = artifact_for(digits, target.name).save(tmp_path / "model.so")
    with pytest.raises(IncompatibleDevice, match=f"compiled for {target.architecture} \\({target.name}\\), this machine is {host_architecture()}"):
        Session(library)


# -- the wrong tools -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "package"), [("arm64-i8mm", "g++-aarch64-linux-gnu"), ("armv7-neon", "g++-arm-linux-gnueabihf")])
def test_a_missing_cross_compiler_names_the_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=f"'{name}' needs one of the compilers .* apt-get install {package.replace('+', '[+]')}$"):
        compile(MODEL, name, demo_data()[0])


def test_a_feature_that_nothing_can_test_is_refused(tmp_path: Path) -> None:
    rows = "targets: {odd: {triple: aarch64-linux-gnu, tvm: {kind: llvm, mtriple: aarch64-linux-gnu}, features: [sve3], rows: [arm64-neon], storage: int8}}"
    (tmp_path / "targets.yaml").write_text(rows)
    with pytest.raises(TargetError, match="target 'odd': no run-time test for the feature 'sve3'; known: asimd, asimddp, i8mm"):
        find_target("odd", tmp_path / "targets.yaml")
    (tmp_path / "targets.yaml").write_text("features: {aarch64: {sve3: {hwcap2: 31}}}\n" + rows)
    assert find_target("odd", tmp_path / "targets.yaml").cpu_test("sve3") == "(getauxval(AT_HWCAP2) & 2147483648ul)"


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("0", NotTested)])
def test_a_missing_emulator_skips_loudly_or_fails(required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Callable[..., None] = lambda name, path=None: None  # noqa: E731
    monkeypatch.setattr(shutil, "which", absent)
    monkeypatch.setenv("QCOMPILER_REQUIRE_TOOLS", required)
    with pytest.raises(outcome, match="arm64-i8mm NOT TESTED: no .*qemu-aarch64-static .apt-get install g..-aarch64-linux-gnu qemu-user-static.$"):
        require_target(find_target("arm64-i8mm"))
