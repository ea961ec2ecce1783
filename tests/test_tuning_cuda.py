"""Tuning in rounds for a GPU, from a machine without one: export, the measuring program under a driver of ours, import, and the next round."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_cuda import FakeGpu, without_driver
from onnx import TensorProto, helper, numpy_helper
from tools import require_nvcc

from qcompiler.backend.tuning_log import read_log
from qcompiler.base.errors import TuningError
from qcompiler.cli.main import main
from qcompiler.runtime.elf import read_section
from qcompiler.tuning.remote import PENDING, SIZE_LIMIT, import_results


def network(path: Path) -> None:
    """A deep convolution on few pixels, whose tiles blocks share, and a dense layer."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((40, 64, 3, 3)), "d": rng.standard_normal((40 * 9, 10))}
    weights = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]), helper.make_node("Flatten", ["c"], ["f"])]
    nodes.append(helper.make_node("MatMul", ["f", "d"], ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", [1, 64, 3, 3]), ("y", [1, 10]))]
    graph = helper.make_graph(nodes, "two", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)


@dataclass
class Round:
    """An exported folder, the log that waits for its results, and the GPU that can run its libraries."""

    gpu: FakeGpu
    folder: Path
    log: Path
    command: list[str]

    def measure(self, results: Path, switches: str = "") -> subprocess.CompletedProcess[str]:
        environment = self.gpu.environment(f"skip-repeats,{switches}")
        return subprocess.run(["./qc_measure", str(results), "0"], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)

    def waiting(self, place: Path) -> Path:
        """A copy of the log, which waits for the results."""
        return Path(shutil.copytree(self.log, place))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Round]:
    require_nvcc()
    folder = tmp_path_factory.mktemp("cuda")
    network(folder / "net.onnx")
    np.save(folder / "data.npy", np.random.default_rng(1).standard_normal((4, 64, 3, 3)).astype(np.float32))
    command = ["tune", str(folder / "net.onnx"), "--target", "cuda-sm80", "--calibration", str(folder / "data.npy"), "--preset", "fast", "--candidates", "3"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = FakeGpu.record(folder, monkeypatch)
        assert main([*command, "--log", str(folder / "log"), "--export-candidates", str(folder / "round1")]) == 0
        gpu.emulate()
        yield Round(gpu, folder / "round1", folder / "log", command)


@pytest.fixture(scope="module")
def measured(exported: Round) -> Path:
    """The results of the round."""
    path = exported.folder.parent / "results.jsonl"
    done = exported.measure(path)
    assert done.returncode == 0, done.stderr
    return path


def test_the_folder_is_self_contained(exported: Round) -> None:
    """Below the limit; a program for this CPU that needs libc alone, and libraries with device code in them."""
    files = sorted(p.name for p in exported.folder.iterdir())
    assert files == ["candidates.txt", "manifest.json", "qc_measure", "task000.so", "task001.so"]
    assert sum(p.stat().st_size for p in exported.folder.iterdir()) < SIZE_LIMIT
    needed = subprocess.run(["readelf", "-d", *files[2:]], cwd=exported.folder, capture_output=True, text=True, check=True).stdout
    libraries = {line.split("[")[1].split(".so")[0] for line in needed.splitlines() if "(NEEDED)" in line}
    assert libraries <= {"ld-linux-x86-64", "libc", "libdl", "libpthread", "libm"}
    assert all(read_section(exported.folder / name, ".qc.device")[0] for name in files[3:])
    manifest = json.loads((exported.folder / "manifest.json").read_text())
    assert (manifest["target"], manifest["isa"], manifest["threads"]) == ("cuda-sm80", "cuda-mma", 1)


def test_rounds(exported: Round, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All candidates are right and timed by the GPU's clock; they are in the log, and the next round tries others."""
    header, *lines = [json.loads(line) for line in measured.read_text().splitlines()]
    assert (header["host"], header["threads"]) == ("Fake GPU", 1)
    assert [(line["task"], line["step"], line["status"]) for line in lines] == [(task, step, "ok") for task in (0, 1) for step in range(4)]
    log = exported.waiting(tmp_path / "log")
    assert main(["tune", "--log", str(log), "--import-results", str(measured)]) == 0
    assert "6 variants measured" in capsys.readouterr().out
    records = read_log(log)
    assert len(records) == 6 and all((r.isa, r.host) == ("cuda-mma", "Fake GPU") and r.ratio > 0 for r in records)
    tried = {json.dumps([r.row, r.params], sort_keys=True) for r in records}
    assert main([*exported.command, "--log", str(log), "--export-candidates", str(tmp_path / "round2")]) == 0
    tasks = json.loads((tmp_path / "round2" / "manifest.json").read_text())["tasks"]
    new = {json.dumps([task["row"], point], sort_keys=True) for task in tasks for point in task["points"][1:]}
    assert len(tasks) == 2 and len(new) == 6 and not new & tried
    assert main(["tune", "--log", str(log), "--import-results", str(measured)]) == 2
    assert "waits for set" in capsys.readouterr().err


def test_a_candidate_that_breaks_the_context(exported: Round, tmp_path: Path) -> None:
    """A GPU refuses everything after a failed launch: the others are measured in a new process."""
    done = exported.measure(tmp_path / "results.jsonl", "fail-kernel=1")
    assert done.returncode == 0 and "task000.so, candidate 1: the GPU failed during a run: unspecified launch failure" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert [line["status"] for line in lines] == ["ok", "refused", "ok", "ok"] * 2
    found = import_results(tmp_path / "results.jsonl", exported.waiting(tmp_path / "log"))
    assert (found.measured, len(found.failed), found.missing) == (4, 2, 0)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (None, "needs an NVIDIA driver, and there is none here"),
        ("no-device", "there is no NVIDIA GPU here that the driver can use"),
        ("capability=75", "needs compute capability 8.0 or later, and GPU 0 (Fake GPU) has 7.5"),
    ],
)
def test_a_device_that_cannot_measure(exported: Round, switches: str | None, message: str, tmp_path: Path) -> None:
    """One clear line, and no results."""
    environment = without_driver() if switches is None else exported.gpu.environment(switches)
    done = subprocess.run(["./qc_measure", str(tmp_path / "results.jsonl")], cwd=exported.folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr, done.stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_results_that_were_cut_short(exported: Round, measured: Path, tmp_path: Path) -> None:
    """Whole lines count, and the rest is measured in another round; without one whole result nothing is imported."""
    text = measured.read_text()
    log, cut = exported.waiting(tmp_path / "log"), tmp_path / "cut.jsonl"
    first = text.index("\n") + 1
    for end, message in ((0, "empty, or cut short"), (first // 2, "empty, or cut short"), (first + 5, "holds no result")):
        cut.write_text(text[:end])
        with pytest.raises(TuningError, match=message):
            import_results(cut, log)
        assert (log / PENDING).exists()
    cut.write_text(text[: text.index('"task": 1')])
    found = import_results(cut, log)
    assert (found.measured, found.missing) == (3, 3) and len(read_log(log)) == 3


def test_results_of_another_set(exported: Round, measured: Path, tmp_path: Path) -> None:
    log, other = exported.waiting(tmp_path / "log"), tmp_path / "other.jsonl"
    name = json.loads(measured.read_text().splitlines()[0])["set"]
    other.write_text(measured.read_text().replace(name, name[::-1]))
    with pytest.raises(TuningError, match=f"measured candidate set {name[::-1]}, and .* waits for set {name}"):
        import_results(other, log)
    assert (log / PENDING).exists() and not read_log(log)
