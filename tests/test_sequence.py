"""Passes in one list: each is checked and dumped, and a broken one is named; nothing is compiled, linked or looked at twice."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from small_nets import Net, op, residual_net
from tvm import relax

import qcompiler
from qcompiler.backend import artifact as artifacts
from qcompiler.base.errors import InternalError, ModelError, QCompilerError
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.importers.operators import CONVERTERS
from qcompiler.passes import groups, sequence
from qcompiler.passes.graph import GraphBuilder
from qcompiler.passes.well_formed import IllFormed, check
from qcompiler.pipeline import stages
from qcompiler.pipeline.float_library import compile_float


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(demo_data()[0], count))


def module_of(body: Any, *params: Any) -> tvm.IRModule:
    return tvm.IRModule({"main": relax.Function(list(params), body, params[0].ty)})


def twice() -> tvm.IRModule:
    """A value id that is bound twice, which TVM has nothing against."""
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    builder = relax.BlockBuilder()
    first = relax.DataflowVar("v", x.ty)
    second = relax.Var("v", x.ty)
    bindings = [relax.VarBinding(first, builder.normalize(op.nn.relu(x))), relax.VarBinding(second, builder.normalize(op.nn.relu(first)))]
    return module_of(builder.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], builder.normalize(relax.Tuple([second])))), x)


def two_blocks() -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    builder = relax.BlockBuilder()
    a, b = relax.Var("a", x.ty), relax.Var("b", x.ty)
    blocks = [relax.DataflowBlock([relax.VarBinding(v, builder.normalize(op.nn.relu(read)))]) for v, read in ((a, x), (b, a))]
    return module_of(relax.SeqExpr(blocks, b), x)


def unnamed_output() -> tvm.IRModule:
    module = residual_net()
    return tvm.IRModule({"main": module["main"].with_attr("qc.outputs", ["a", "b"])})


def symbolic() -> tvm.IRModule:
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 4), "float32"))
    return module_of(relax.SeqExpr([], x), x)


def undefined() -> tvm.IRModule:
    """An operand that nothing computes."""
    x, stranger = (relax.Var(name, relax.TensorType((1, 4), "float32")) for name in ("x", "stranger"))
    builder = relax.BlockBuilder()
    y = relax.Var("y", x.ty)
    block = relax.DataflowBlock([relax.VarBinding(y, builder.normalize(op.add(x, stranger)))])
    return module_of(relax.SeqExpr([block], y), x)


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize(
    "make, message",
    [
        (twice, "value id 'v' is bound twice"),
        (two_blocks, "at most one block"),
        (unnamed_output, "1 outputs have 2 names"),
        (symbolic, "'x' has no static shape"),
        (undefined, "stranger"),
        (lambda: tvm.IRModule({}), "one Relax function 'main' expected"),
    ],
)
def test_what_is_not_well_formed(make: Any, message: str, types: bool) -> None:
    with pytest.raises(IllFormed, match=re.escape(message)):
        check(make(), types)


def test_every_pass_is_in_the_list_and_named_as_its_file_says(root: Path) -> None:
    """A function of `passes/` that makes a module of a module is run by the list, not by another pass."""
    names = {each.__name__ for each in sequence.PASSES}
    found = set()
    for path in (root / "passes").rglob("*.py"):
        found |= set(re.findall(r"^def (\w+)\(module: tvm\.IRModule.*\) -> tvm\.IRModule:", path.read_text(), re.MULTILINE))
    assert found - {"run"} == names


def test_a_broken_pass_is_named_and_its_module_at_hand() -> None:
    def crooked(module: tvm.IRModule) -> tvm.IRModule:
        raise KeyError("~padded")

    module = residual_net()
    with pytest.raises(InternalError, match=r"^internal error in pass 'crooked': KeyError: '~padded'$") as caught:
        sequence.run((crooked,), module)
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.subject.same_as(module)
    assert isinstance(caught.value, QCompilerError)


def test_a_pass_that_makes_nonsense_is_named_and_dumped(tmp_path: Path) -> None:
    def sloppy(module: tvm.IRModule) -> tvm.IRModule:
        return twice()

    dumped = {}
    with pytest.raises(InternalError, match="in pass 'sloppy', whose result is not well-formed: IllFormed: value id 'v' is bound twice"):
        sequence.run((sloppy,), residual_net(), dump=dumped.__setitem__)
    assert list(dumped) == ["sloppy"]


def test_errors_that_a_user_can_mend_pass_as_they_are() -> None:
    def refusing(module: tvm.IRModule) -> tvm.IRModule:
        raise ModelError("no kernel")

    with pytest.raises(ModelError, match="^no kernel$"):
        sequence.run((refusing,), residual_net())


def test_the_dump_shows_every_pass_and_stage(tmp_path: Path) -> None:
    qcompiler.compile(MODEL, calibration=samples(8), dump_dir=tmp_path)
    names = [re.fullmatch(r"\d+_(\w+)\.(?:py|json|txt)", p.name)[1] for p in sorted(tmp_path.iterdir(), key=lambda p: int(p.name.split("_")[0]))]  # type: ignore[index]
    code = (*sequence.CPU_KERNELS, *sequence.LOWERABLE)
    assert names[: len(sequence.CANONICAL) + 1] == ["import", *[e.__name__ for e in sequence.CANONICAL]]
    wanted = [e.__name__ for e in (*sequence.FLOAT, *code)] + ["calibration", "plan"]
    wanted += [e.__name__ for e in (*sequence.REPLACE_WEIGHTS, *sequence.INSERT_QDQ, *sequence.INTEGER, *code)] + ["bias_correction"]
    left = iter(names)
    assert all(name in left for name in wanted), f"not in this order: {names}"


def test_groups_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    finder = groups._Finder.run
    monkeypatch.setattr(groups._Finder, "run", lambda self: looked.append(self) or finder(self))
    module = residual_net()
    first, second = groups.find_groups(module), groups.find_groups(module)
    assert len(looked) == 1 and first == second and first is not second
    weighted = next(g for g in first if g.weight is not None)
    with pytest.raises(ValueError, match="read-only"):
        weighted.weight[...] = 0  # type: ignore[index]
    del module, first, second, weighted
    looked.clear()
    assert not groups._FOUND or len(groups._FOUND) < 100
    groups.find_groups(residual_net())
    assert len(looked) == 1, "another module"


def links(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Of every library that a compilation links, which operators of ours it runs."""
    found, link = [], artifacts.link

    def counted(code: bytes, constants: np.ndarray, manifest: dict[str, Any], *more: Any) -> Any:
        found.append("float" if any(s["op"].startswith("qc.f32.conv") for s in manifest["steps"]) else "int8")
        return link(code, constants, manifest, *more)

    monkeypatch.setattr(artifacts, "link", counted)
    qcompiler.compile(MODEL, calibration=samples(12), **options)
    return found


def test_the_float_twin_is_linked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equalized, judged range by range, surveyed with other weights: always the same library, unless values get 16 bits. The int8 one is tried first."""
    assert links(monkeypatch, preset="accurate", disable=["mixed", "residuals", "halves"]) == ["float", "int8", "int8", "int8"], "two plans are tried"
    assert sorted(links(monkeypatch, preset="accurate")).count("float") <= 3  # layers kept in float make the library itself partly float


def test_a_bug_is_reported_not_blamed_on_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def crooked(module: tvm.IRModule) -> tvm.IRModule:
        raise AssertionError("a value got lost")

    monkeypatch.setattr(stages, "INTEGER", (*sequence.INTEGER, crooked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    np.savez(tmp_path / "c.npz", image=np.concatenate([s["image"] for s in samples(2)]))
    words = ["compile", str(MODEL), "--calibration", str(tmp_path / "c.npz"), "--output", str(tmp_path / "m.so"), "--preset", "fast"]
    assert main([*words, "--dump-dir", str(tmp_path / "dump")]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "error: internal error in pass 'crooked': AssertionError: a value got lost. This is a bug of qcompiler, not of its input: please report it"
    )
    assert line.endswith(f"and the dump in {tmp_path / 'dump'}") and not (tmp_path / "m.so").exists()
    (folder,) = tmp_path.glob("qcompiler-bug-*")
    trace = (folder / "traceback.txt").read_text()
    assert "a value got lost" in trace and "compile" in trace.splitlines()[1] and "in crooked" in trace
    assert "qc.conv2d" in (folder / "subject.py").read_text()
    monkeypatch.setattr("qcompiler.runtime.library.read_manifest", lambda path: {}[path])
    assert main(["inspect", str(MODEL)]) == 3
    assert "error: internal error: KeyError" in capsys.readouterr().err


def test_what_the_code_generator_refuses_is_a_bug_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("LLVM ERROR: " + "bad call " * 1000)

    monkeypatch.setenv("QCOMPILER_CACHE", "off")  # other tests may have had the same code generated
    monkeypatch.setattr("tvm.tirx.build", refusing)
    with pytest.raises(InternalError, match="^internal error in code generation for .*: RuntimeError: LLVM ERROR: bad call") as caught:
        compile_float(MODEL)
    assert len(str(caught.value)) < 800 and isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.subject is not None, "the module whose code it was"


def test_a_net_without_operators_is_well_formed() -> None:
    builder = GraphBuilder()
    check(builder.finish([("y", builder.input("x", (1, 4), "float32"))]))
    net = Net()
    check(net.done(net.input("x", 1, 4)))


@pytest.mark.parametrize("kernel, error", [((2, 3, 1, 1), InternalError), ((2, 5, 1, 1), ModelError)])
def test_a_converter_that_fails_is_at_fault_only_if_the_node_is_right(kernel: Any, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is the reference implementation of the ONNX standard: it convolves three channels with three, and not with five."""

    def crooked(node: Any) -> Any:
        raise KeyError("no such attribute")

    monkeypatch.setitem(CONVERTERS, "Conv", crooked)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 4, 4]), ("y", None))]
    node, weight = helper.make_node("Conv", ["x", "w"], ["y"], name="the_conv"), numpy_helper.from_array(np.ones(kernel, np.float32), "w")
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(error, match="node 'the_conv' \\(Conv\\)") as caught:
        load(tmp_path / "m.onnx")
    assert type(caught.value) is error and (error is ModelError or isinstance(caught.value.__cause__, KeyError))
