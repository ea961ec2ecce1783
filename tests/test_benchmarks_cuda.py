"""benchmarks/cuda.py, from preparing to the results file, on the tests' driver: one part that fails costs no other."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeGpu
from tools import require_nvcc

from qcompiler.base.progress import silent
from qcompiler.base.targets import find_target
from qcompiler.cli.demo import MODEL


@pytest.fixture(scope="module")
def scripts(root: Path) -> Iterator[Any]:
    """Imports a benchmark script by name."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(root / "benchmarks"))
        yield importlib.import_module


@dataclass
class Prepared:
    """A folder that `--prepare` wrote, and a GPU for it."""

    gpu: FakeGpu
    folder: Path
    script: Path

    def run(self, results: Path, switches: str = "", folder: Path | None = None, *more: str) -> subprocess.CompletedProcess[str]:
        """On a machine that has numpy and Python alone."""
        options = ["--prepared", folder or self.folder, "--json", results, "--seconds", "0", "--without", "torch", *more]
        absent = "yaml rich tvm tvm_ffi onnx onnxruntime onnxscript torch scipy PIL typer click".split()
        runner = results.parent / "sitecustomize.py"
        runner.write_text(f"import sys; sys.modules.update(dict.fromkeys({absent}))\n")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("PYTHONPATH", str(runner.parent))
            return self.gpu.run(sys.executable, self.script, *options, switches=f"skip-repeats,{switches}")


@pytest.fixture(scope="module")
def prepared(scripts: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Five kernels of the test suite, the example network, one with 4-bit weights, and one that can't be compiled."""
    require_nvcc()
    prepare, network = scripts("cuda_prepare"), scripts("networks").Network
    all_cases, folder = prepare.row_cases, tmp_path_factory.mktemp("prepared")

    def few(target: Any) -> dict[str, Any]:
        found = all_cases(target)
        assert {kernel.row.partition("/")[0] for _, kernel in found.values()} >= set(target.rows) and len(found) > 400
        assert {"cuda-mma/attention", "cuda-mma/matmul", "cuda/f32.dense_weight_only", "cuda/recurrence"} <= {kernel.row for _, kernel in found.values()}
        shared = next(name for name, (_, kernel) in found.items() if kernel.counters)
        chosen = ("cuda-mma/pointwise_0", "cuda-dp4a/residual_0", "depthwise/ragged_padded", next(n for n, (c, _) in found.items() if c.tolerance), shared)
        return {name: found[name] for name in chosen}

    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = FakeGpu.record(folder, monkeypatch)
        monkeypatch.setattr(prepare, "row_cases", few)
        digits, broken = network("digits", MODEL, None, None), network("broken", folder / "none.onnx", None, None)
        plan = prepare.prepare(
            folder / "made", find_target("cuda-sm80"), [broken, digits], [1], rows=True, weights=[("product", 2)], peers=False, progress=silent
        )
        assert [f["section"] for f in plan["failed"]] == ["prepare broken-1"]
        assert [(n["name"], n["integer"]) for n in plan["networks"]] == [("digits-1", True), ("product-int4-2", False)]
    gpu.emulate()
    return Prepared(gpu, folder / "made", root / "benchmarks" / "cuda.py")


def test_all_sections(prepared: Prepared, tmp_path: Path) -> None:
    """Everything is measured; what could not be prepared and peers that are missing are named."""
    done = prepared.run(tmp_path / "r.json")
    assert done.returncode == 1, done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["gpu"] == "Fake GPU" and [(r["wrong"], r["outside"]) for r in document["rows"]] == [(0, False)] * 5
    network, weights = document["networks"]
    assert (network["exact"]["outputs"], weights["exact"]["outputs"]) == ({"logits": 0}, {"y": 0})
    for memory in (n["exact"]["memory"] for n in (network, weights)):
        assert 0 <= memory["second"] - memory["planned"] < 4096 and memory["first"] > memory["second"] and memory["left"] == 0, memory
    assert network["steps"]["peak"] == 4096 * 10 * 1e9 and all(s["seconds"] > 0 for s in network["steps"]["steps"])
    assert any(s["of_peak"] > 0 for s in network["steps"]["steps"])
    assert list(network["speed"]["candidates"]) == ["int8"] and set(network["speed"]["left_out"]) == {"tensorrt float16", "tensorrt int8"}
    assert [f["section"] for f in document["failed"]] == ["prepare broken-1"]
    for text in ("rows on the device: 0 differ", "digits, batch 1: the same bytes as on the CPU", "of int8 peak", "nothing differs, 1 sections failed"):
        assert text in done.stdout, done.stdout
    assert "left out: tensorrt int8: ModuleNotFoundError" in done.stderr


def test_a_kernel_that_breaks_the_device(prepared: Prepared, tmp_path: Path) -> None:
    """The other cases are checked, every section that fails is named, and the file is whole."""
    done = prepared.run(tmp_path / "r.json", "fail-kernel=1")
    assert done.returncode == 1
    document = json.loads((tmp_path / "r.json").read_text())
    assert ["error" in r for r in document["rows"]] == [False, True, False, False, False]
    failed = [f["section"] for f in document["failed"]]
    assert failed[1].startswith("rows, cuda-dp4a/residual_0") and failed[2:6] == [f"{kind}:digits-1" for kind in ("exact", "steps", "speed", "speed")]
    assert all("unspecified launch failure" in f["error"] and f"FAILED: {f['section']}" in done.stdout for f in document["failed"][1:])


def test_differences_are_reported(prepared: Prepared, tmp_path: Path) -> None:
    made = Path(shutil.copytree(prepared.folder, tmp_path / "made"))
    for name, key in (("rows.npz", "2y"), ("digits-1.npz", "logits-1"), ("product-int4-2.npz", "y-0")):
        arrays = dict(np.load(made / name))
        arrays[key].reshape(-1)[3] += 1
        np.savez(made / name, **arrays)
    done = prepared.run(tmp_path / "r.json", "", made, "--without", "steps", "--without", "speed")
    document = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 1 and [r["wrong"] for r in document["rows"]] == [0, 0, 1, 0, 0]
    assert [n["exact"]["outputs"] for n in document["networks"]] == [{"logits": 1}, {"y": 1}]
    assert "digits, batch 1: DIFFERS FROM THE CPU: {'logits': 1}" in done.stdout and "SOMETHING DIFFERS" in done.stdout


def test_no_time(prepared: Prepared, tmp_path: Path) -> None:
    """What no time is left for is named, and the file is whole."""
    done = prepared.run(tmp_path / "r.json", "", None, "--within", "1")
    document = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 1 and not any("exact" in n for n in document["networks"])
    assert {f["error"] for f in document["failed"][1:]} == {"no time was left"} and len(document["failed"]) > 6


def test_a_section_that_hangs_with_all_that_it_started(scripts: Any) -> None:
    """Its time is up, though a process of its own holds the output open; what it said is kept."""
    began = time.monotonic()
    status, said = scripts("cuda").bounded(["sh", "-c", "echo so far >&2; sleep 60 & sleep 60"], 0.2)
    assert (status, said) == (None, "so far\n") and time.monotonic() - began < 30
    assert scripts("cuda").bounded(["sh", "-c", "echo last >&2; exit 3"], 30) == (3, "last\n")


def test_a_result_that_cannot_be_read_costs_no_other(scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = scripts("cuda")
    report = cuda.Report(tmp_path / "r.json", cuda.Gpu("g", 90), {"target": "t", "networks": [{"name": "n"}], "failed": []})
    cuda.guarded(report, "steps:n", lambda: cuda.text_of({"network": "n", "batch": 1, "steps": {}}, "steps"))
    failed = json.loads((tmp_path / "r.json").read_text())["failed"]
    assert failed == [{"section": "steps:n", "error": "KeyError: 'steps'"}] and "FAILED: steps:n" in capsys.readouterr().out


def test_what_cannot_run(prepared: Prepared, tmp_path: Path) -> None:
    done = prepared.run(tmp_path / "r.json", "capability=75")
    assert done.returncode == 2 and "was prepared for cuda-sm80, and Fake GPU has compute capability 7.5" in done.stderr
    done = prepared.run(tmp_path / "r.json", folder=tmp_path)
    assert done.returncode == 2 and "not a folder that --prepare wrote" in done.stderr


def test_without_a_gpu(scripts: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = scripts("cuda")
    monkeypatch.setattr(cuda, "find_gpu", lambda: "an NVIDIA driver")
    assert cuda.main([]) == 2
    assert capsys.readouterr().err == "benchmarks/cuda.py measures on a GPU, and this machine lacks an NVIDIA driver\n"
    assert [cuda.target_of(cuda.Gpu("g", c)).name for c in (75, 80, 89, 99)] == ["cuda-sm75", "cuda-sm80", "cuda-sm89", "cuda-sm90"]
    with pytest.raises(SystemExit):
        cuda.main(["--prepare", "folder"])


def test_samples_of_a_batch_differ(scripts: Any) -> None:
    images = np.random.default_rng(0).standard_normal((8, 3, 5, 40)).astype(np.float32)
    batches = [scripts("cuda_prepare").batch_of(images, 32, i) for i in (0, 1)]
    assert batches[0].shape == (32, 3, 5, 40) and batches[0].flags.c_contiguous
    assert len({image.tobytes() for image in batches[0]}) == 32 and batches[0].tobytes() != batches[1].tobytes()
