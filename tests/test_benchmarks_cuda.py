"""benchmarks/cuda.py, from preparing to the results file, on the tests' driver: one part that fails costs no other."""

from __future__ import annotations

import argparse
import importlib
import json
import re
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
from tools import require_module, require_nvcc

from qcompiler.base.progress import silent
from qcompiler.base.targets import find_target
from qcompiler.cli.demo import MODEL

TARGETS = ["cuda-sm80", "cuda-sm75-dp4a"]


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
        options = ["--prepared", folder or self.folder, "--json", results, "--seconds", "0", *more]
        absent = "yaml rich tvm tvm_ffi onnx onnxruntime onnxscript torch scipy PIL typer click".split()
        runner = results.parent / "sitecustomize.py"
        runner.write_text(f"import sys; sys.modules.update(dict.fromkeys({absent}))\n")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("PYTHONPATH", str(runner.parent))
            return self.gpu.run(sys.executable, self.script, *options, switches=f"skip-repeats,{switches}")


@pytest.fixture(scope="module")
def prepared(scripts: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Five kernels of the test suite, the example network for two targets, one with 4-bit weights, and one that can't be compiled: one file."""
    require_nvcc()
    prepare, network = scripts("cuda_prepare"), scripts("networks").Network
    all_cases, folder = prepare.row_cases, tmp_path_factory.mktemp("prepared")

    def few(target: Any) -> dict[str, Any]:
        found = all_cases(target)
        assert {kernel.row.partition("/")[0] for _, kernel in found.values()} >= set(target.rows) and len(found) > 400
        assert {"cuda-mma/attention", "cuda-mma/matmul", "cuda/f32.dense_weight_only", "cuda/recurrence"} <= {kernel.row for _, kernel in found.values()}
        shared = next(name for name, (_, kernel) in found.items() if kernel.counters)
        chosen = ("cuda-mma/residual_1", "cuda-mma/pointwise_0", "cuda-mma/pointwise_1", "tail/depthwise, table")
        return {name: found[name] for name in (*chosen, next(n for n, (c, _) in found.items() if c.tolerance), shared)}

    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = FakeGpu.record(folder, monkeypatch)
        monkeypatch.setattr(prepare, "row_cases", few)
        digits, broken = network("digits", MODEL, None, None), network("broken", folder / "none.onnx", None, None)
        targets, parts = [find_target(t) for t in TARGETS], {"rows": True, "weights": [("product", 2)], "peers": False}
        plan = prepare.prepare(folder / "made", targets, [broken, digits], [1], **parts, progress=silent)
        prepare.pack(folder / "made", folder / "made.tar.xz")
        assert [f["section"] for f in plan["failed"]] == ["prepare broken-1"]
        assert [(n["name"], n["integer"]) for n in plan["networks"]] == [("digits-1", True), ("product-int4-2", False)]
    gpu.emulate()
    return Prepared(gpu, folder / "made", root / "benchmarks" / "cuda.py")


def test_all_sections(prepared: Prepared, tmp_path: Path) -> None:
    """Everything is measured, from one file; what could not be prepared and peers that are missing are named. The same call again measures nothing."""
    archive = prepared.folder.with_suffix(".tar.xz")
    done = prepared.run(tmp_path / "r.json", "", archive)
    assert done.returncode == 1, done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["gpu"] == "Fake GPU" and [(r["wrong"], r["outside"]) for r in document["rows"]] == [(0, False)] * 6
    assert document["targets"] == TARGETS and [list(n["exact"]) for n in document["networks"]] == [TARGETS] * 2
    network, weights = document["networks"]
    for target in TARGETS:
        exact, steps = network["exact"][target], network["steps"][target]
        assert (exact["outputs"], weights["exact"][target]["outputs"]) == ({"logits": 0}, {"y": 0})
        for memory in (exact["memory"], weights["exact"][target]["memory"]):
            assert 0 <= memory["second"] - memory["planned"] < 4096 and memory["first"] > memory["second"] and memory["left"] == 0, memory
        assert steps["peak"] == 4096 * 10 * 1e9 and all(s["seconds"] > 0 for s in steps["steps"]) and any(s["of_peak"] > 0 for s in steps["steps"])
    assert {s["kernel"].partition("/")[0] for s in network["steps"]["cuda-sm75-dp4a"]["steps"]} & {"cuda-mma", "cuda-wgmma"} == set()
    assert list(network["speed"]["candidates"]) == [f"int8 {target}" for target in TARGETS] and set(network["speed"]["left_out"]) == {"torch float16"}
    assert network["peers"]["candidates"] == {} and set(network["peers"]["left_out"]) == {"torch float16 compiled", "tensorrt float16", "tensorrt int8"}
    assert [f["section"] for f in document["failed"]] == ["prepare broken-1"]
    said = ["dp4a: the same bytes as on the CPU", "ratio to int8 cuda-sm80", "of int8 peak", "device: 0 differ", "no peer ran", "nothing that ran differs"]
    assert sorted(said, key=done.stdout.index) == said
    assert "left out: tensorrt int8: ModuleNotFoundError" in done.stderr

    again = prepared.run(tmp_path / "r.json", "fail-init", archive)
    assert again.returncode == 2  # no GPU: the file stays
    again = prepared.run(tmp_path / "r.json", "fail-launch=1", archive)  # nothing is launched
    assert again.returncode == 1 and json.loads((tmp_path / "r.json").read_text()) == document and "ratio to" not in again.stdout


def test_a_kernel_that_breaks_the_device(prepared: Prepared, tmp_path: Path) -> None:
    """The other cases are checked, every section that fails is named, a library that does not run is not run again, and the file is whole."""
    done = prepared.run(tmp_path / "r.json", "fail-kernel=1")
    assert done.returncode == 1
    document = json.loads((tmp_path / "r.json").read_text())
    failed = [f["section"] for f in document["failed"]]
    assert failed[1:3] == ["exact:digits-1:cuda-sm80", "exact:digits-1:cuda-sm75-dp4a"] and failed[3].startswith("rows, ") and len(failed) == 4
    assert sum("error" in r for r in document["rows"]) == 1 and len(document["rows"]) == 6
    assert all("unspecified launch failure" in f["error"] and f"FAILED: {f['section']}" in done.stdout for f in document["failed"][1:])
    assert re.search("digits, batch 1 +cuda-sm80 +not known", done.stdout) and "speed" in document["networks"][1]


def test_differences_are_reported(prepared: Prepared, tmp_path: Path) -> None:
    made = Path(shutil.copytree(prepared.folder, tmp_path / "made"))
    for name, key in (("rows.npz", "2y"), ("digits-1.npz", "logits-1"), ("product-int4-2.npz", "y-0")):
        arrays = dict(np.load(made / name))
        arrays[key].reshape(-1)[3] += 1
        np.savez(made / name, **arrays)
    done = prepared.run(tmp_path / "r.json", "", made, "--without", "steps", "--without", "speed", "--without", "peers")
    document = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 1 and [r["wrong"] for r in document["rows"]] == [0, 0, 1, 0, 0, 0]
    assert [n["exact"]["cuda-sm80"]["outputs"] for n in document["networks"]] == [{"logits": 1}, {"y": 1}]
    assert "digits, batch 1, cuda-sm80: DIFFERS FROM THE CPU: {'logits': 1}" in done.stdout and "SOMETHING DIFFERS" in done.stdout


def test_a_call_that_is_cut_off_and_gone_on_with(prepared: Prepared, tmp_path: Path) -> None:
    """What no time is left for is named, and the file is whole; the next call does that alone, rows too that were written before the end."""
    results = tmp_path / "r.json"
    done = prepared.run(results, "", None, "--within", "1")
    document = json.loads(results.read_text())
    assert done.returncode == 1 and not any("exact" in n for n in document["networks"])
    assert all(f["error"].startswith("no time was left") for f in document["failed"][1:]) and len(document["failed"]) == 1 + 4 + 1
    known = {"case": "cuda-mma/pointwise_0", "row": "r", "wrong": 7, "outside": False}
    (tmp_path / f"r.{document['plan'][:8]}.jsonl").write_text(json.dumps(known) + '\n{"case": "cuda-m')
    done = prepared.run(results, "", None, "--without", "speed", "--without", "steps", "--without", "peers")
    document = json.loads(results.read_text())
    assert [f["section"] for f in document["failed"]] == ["prepare broken-1"] and all(list(n["exact"]) == TARGETS for n in document["networks"])
    assert sorted(r["wrong"] for r in document["rows"]) == [0, 0, 0, 0, 0, 7] and "1 differ" in done.stdout


def test_a_row_that_breaks_the_device_is_given_up(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows' cases run, each in a process that such a case did not break; and where everything breaks, the end comes soon."""
    cuda, started = scripts("cuda"), []
    real = cuda.child
    cases = [{"case": f"{row}{i}", "row": row} for i in range(20) for row in ("good", "bad")]

    def child(bad: str, section: str, results: Path, *_: Any) -> str:
        done = {line["case"] for line in cuda.sections.lines_of(results)}
        started.append(len(done))
        for case in cases:
            if case["case"] not in done:
                if case["row"].startswith(bad):
                    return "unspecified launch failure"
                with results.open("a") as file:
                    file.write("\n" + json.dumps(case | {"wrong": 0, "outside": False}))
        return ""

    def run(name: str, bad: str) -> list[dict[str, Any]]:
        plan = {"targets": ["t"], "networks": [], "failed": []}
        report = cuda.Report(tmp_path / name, cuda.Gpu("g", 90), plan)
        monkeypatch.setattr(cuda, "child", lambda *arguments: child(bad, *arguments))
        cuda.rows(report, cases, argparse.Namespace(within=float("inf")))
        return list(report.document["rows"])

    lines = run("one.json", "bad")
    assert len(lines) == 40 and sum("error" in line for line in lines) == 20 and len(started) == 4
    assert sum("3 of bad broke the device" in line.get("error", "") for line in lines) == 17
    monkeypatch.setitem(cuda.LIMITS, "rows", 1.0)  # too little to begin
    with monkeypatch.context() as patch:
        report = cuda.Report(tmp_path / "late.json", cuda.Gpu("g", 90), {"targets": ["t"], "networks": [], "failed": []})
        patch.setattr(cuda, "child", real)
        cuda.rows(report, cases, argparse.Namespace(within=float("inf"), limit=100.0))
        assert [f["error"] for f in report.document["failed"]] == ["no time was left for 40 of 40 cases"] and not report.document["rows"]
    started.clear()
    monkeypatch.setattr(cuda, "OF_A_ROW", 100)
    assert len(run("all.json", "")) == len(started) == cuda.IN_TURN


def test_cases_that_matter_most_come_first(prepared: Prepared) -> None:
    """Those at the heuristics' choice, a row after the other, then those at other points."""
    rows = json.loads((prepared.folder / "plan.json").read_text())["rows"]
    names = [r["case"] for r in rows]
    assert {"cuda-mma/pointwise_1", "cuda-mma/residual_1"} < set(names[-3:]) and "cuda-mma/pointwise_0" in names[:3]
    assert len({r["row"] for r in rows[:3]}) == 3


def test_a_section_that_hangs_with_all_that_it_started(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is up, though a process of its own holds the output open; what it said is kept. One whose file no longer grows ends sooner."""
    cuda, began = scripts("cuda"), time.monotonic()
    status, said = cuda.bounded(["sh", "-c", "echo so far >&2; sleep 60 & sleep 60"], 0.2)
    assert (status, said) == (None, "so far\n") and time.monotonic() - began < 30
    assert cuda.bounded(["sh", "-c", "echo last >&2; exit 3"], 30) == (3, "last\n")
    monkeypatch.setattr(cuda, "STILL", 1.5)
    grown = tmp_path / "lines"
    assert cuda.bounded(["sh", "-c", f"echo 1 > {grown}; sleep 60"], 100, grown)[0] is None and time.monotonic() - began < 30
    assert cuda.bounded(["sh", "-c", f"for i in 1 2 3; do echo $i >> {grown}; sleep 1; done"], 100, grown)[0] == 0


def test_a_result_that_cannot_be_read_costs_no_other(scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = scripts("cuda")
    network = {"name": "n", "network": "n", "batch": 1, "integer": True}
    report = cuda.Report(tmp_path / "r.json", cuda.Gpu("g", 90), {"targets": ["t"], "networks": [network], "failed": []})
    cuda.guarded(report, "steps:n:t", lambda: cuda.text_of(network, "steps", {}, ["t"]))
    failed = json.loads((tmp_path / "r.json").read_text())["failed"]
    assert failed == [{"section": "steps:n:t", "error": "KeyError: 'steps'"}] and "FAILED: steps:n:t" in capsys.readouterr().out


def test_what_cannot_run(prepared: Prepared, tmp_path: Path) -> None:
    done = prepared.run(tmp_path / "r.json", "capability=75")
    assert done.returncode == 2 and "was prepared for cuda-sm80, cuda-sm75-dp4a, and Fake GPU has compute capability 7.5" in done.stderr
    (tmp_path / "cut.tar.xz").write_bytes(prepared.folder.with_suffix(".tar.xz").read_bytes()[:9000])
    for other in (tmp_path, tmp_path / "none.tar.xz", tmp_path / "cut.tar.xz", prepared.folder / "plan.json"):
        done = prepared.run(tmp_path / "r.json", folder=other)
        assert done.returncode == 2 and f"{other}: not what --prepare wrote" in done.stderr, done.stderr


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


def test_the_peer_of_a_text_encoder(scripts: Any) -> None:
    """A layer is PyTorch's own with the same weights, masked tokens count for nothing, and inputs go by their names."""
    torch = require_module("torch")
    sections = scripts("cuda_sections")
    model = sections.torch_model("paraphrase-MiniLM-L3, 16 tokens").eval()
    assert len(model.layers) == 3 and len(sections.torch_model("MiniLM, 128 tokens").layers) == 6
    ours, theirs = model.layers[0], torch.nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True).eval()
    pairs = {"self_attn.in_proj_": ours.qkv, "self_attn.out_proj.": ours.out, "linear1.": ours.first, "linear2.": ours.second}
    pairs |= {"norm1.": ours.norms[0], "norm2.": ours.norms[1]}
    theirs.load_state_dict({f"{name}{kind}": getattr(layer, kind) for name, layer in pairs.items() for kind in ("weight", "bias")})
    with torch.inference_mode():
        x = torch.randn(2, 16, 384)
        torch.testing.assert_close(ours(x, torch.zeros(2, 1, 1, 16)), theirs(x), rtol=1e-4, atol=1e-5)
        ids, mask = np.random.default_rng(0).integers(0, 4096, (2, 16)).astype(np.int32), np.ones((2, 16), np.int64)
        mask[1, 10:] = 0
        other = np.where(mask > 0, ids, 5)
        found = [model(*map(torch.from_numpy, sections.torch_inputs({"attention_mask": mask, "input_ids": i}))) for i in (ids, other)]
        assert found[0].shape == (2, 16, 384) and not torch.equal(*found)
        torch.testing.assert_close(found[0][mask > 0], found[1][mask > 0], rtol=1e-4, atol=1e-5)
    (image,) = sections.torch_inputs({"x": np.ones((1, 3, 4, 4), np.float32)})
    assert image.dtype == np.float16
