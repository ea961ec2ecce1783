"""Steps of LSTMs and GRUs that exporters spell out, and the sequences they write for split: what onnxruntime computes, as one operator where it is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from qcompiler.passes.graph import Graph, match_op
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.reference import check_import
from qcompiler.runtime.session import Session

X, H = 6, 4


class Net:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(1)

    def tensor(self, value: np.ndarray | list[int]) -> str:
        array = np.asarray(value, np.int64 if isinstance(value, list) else np.float32)
        self.tensors.append(numpy_helper.from_array(array, f"w{len(self.tensors)}"))
        return self.tensors[-1].name

    def op(self, op: str, *ins: str, outs: int = 1, name: str = "", **attributes: object) -> list[str]:
        names = [name or f"v{len(self.nodes)}_{i}" for i in range(outs)]
        self.nodes.append(helper.make_node(op, list(ins), names, **attributes))
        return names

    def one(self, op: str, *ins: str, name: str = "", **attributes: object) -> str:
        return self.op(op, *ins, name=name, **attributes)[0]

    def linear(self, x: str, rows: int, columns: int, form: str) -> str:
        w, b = self.rng.standard_normal((rows, columns)) * 0.5, self.rng.standard_normal(rows) * 0.2
        if form == "gemm":
            return self.one("Gemm", x, self.tensor(w), self.tensor(b), transB=1)
        return self.one("Add", self.tensor(b), self.one("MatMul", x, self.tensor(w.T)))

    def parts(self, x: str, count: int, form: str) -> list[str]:
        if form == "split":
            return self.op("Split", x, self.tensor([H] * count), outs=count, axis=1)
        if form == "slice":
            return [self.one("Slice", x, self.tensor([k * H]), self.tensor([(k + 1) * H]), self.tensor([-1])) for k in range(count)]
        whole = self.one("SplitToSequence", x, self.scalar(H), axis=1)
        return [self.one("SequenceAt", whole, self.scalar(k)) for k in range(count)]

    def scalar(self, value: int) -> str:
        self.tensors.append(numpy_helper.from_array(np.array(value, np.int64), f"w{len(self.tensors)}"))
        return self.tensors[-1].name

    def lstm(self, x: str, h: str, c: str, form: tuple[str, str], gate: str = "Sigmoid") -> tuple[str, str]:
        total = self.one("Add", self.linear(h, 4 * H, H, form[0]), self.linear(x, 4 * H, X, form[0]))
        i, f, g, o = self.parts(total, 4, form[1])
        i, f, o = (self.one(gate, v) for v in (i, f, o))
        cell = self.one("Add", self.one("Mul", f, c), self.one("Mul", i, self.one("Tanh", g)), name="cn")
        return self.one("Mul", o, self.one("Tanh", cell), name="hn"), cell

    def gru(self, x: str, h: str, form: tuple[str, str]) -> str:
        a, b = (self.parts(self.linear(v, 3 * H, size, form[0]), 3, form[1]) for v, size in ((x, X), (h, H)))
        r, z = (self.one("Sigmoid", self.one("Add", b[k], a[k])) for k in (0, 1))
        n = self.one("Tanh", self.one("Add", a[2], self.one("Mul", b[2], r)))
        return self.one("Add", self.one("Mul", self.one("Sub", h, n), z), n, name="hn")

    def saved(self, path: Path, inputs: dict[str, int], outputs: list[str]) -> Path:
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, size]) for n, size in inputs.items()]
        out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, H]) for n in outputs]
        model = helper.make_model(helper.make_graph(self.nodes, "g", ends, out, self.tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        return path


def operators(path: Path) -> list[str]:
    return [op[0] for _, e in Graph.of(load(path).module).bindings if (op := match_op(e)) is not None]


def compared(path: Path, tmp_path: Path) -> None:
    session, rng = Session(compile_float(path).save(tmp_path / "f.so")), np.random.default_rng(0)
    feeds = [{i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.inputs} for _ in range(3)]
    checked = check_import(origin_of(path).elsewhere(), session, feeds, 100)
    assert checked.status == "equal", str(checked)


@pytest.mark.parametrize("form", [("gemm", "split"), ("matmul", "slice"), ("gemm", "sequence")], ids="-".join)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_step(tmp_path: Path, cell: str, form: tuple[str, str]) -> None:
    net = Net()
    outputs = list(net.lstm("x", "h", "c", form)) if cell == "lstm" else [net.gru("x", "h", form)]
    path = net.saved(tmp_path / "m.onnx", {"x": X, "h": H} | ({"c": H} if cell == "lstm" else {}), outputs)
    assert operators(path) == ["qc.f32.recurrence"]
    compared(path, tmp_path)


def test_what_differs_stays(tmp_path: Path) -> None:
    net = Net()
    path = net.saved(tmp_path / "m.onnx", {"x": X, "h": H, "c": H}, list(net.lstm("x", "h", "c", ("gemm", "split"), gate="HardSigmoid")))
    assert "qc.f32.recurrence" not in operators(path)
    compared(path, tmp_path)


def test_two_steps_of_a_stream(tmp_path: Path) -> None:
    """A cell that something else reads, and a state inside of the session: int8, with frames as data."""
    net = Net()
    h, c = net.lstm("x", "h", "c", ("gemm", "split"))
    y = net.one("Add", net.one("Relu", c), h, name="y")
    path = net.saved(tmp_path / "m.onnx", {"x": X, "h": H, "c": H}, [y, h, c])
    frames = [{"x": x} for x in np.random.default_rng(3).standard_normal((40, 2, X)).astype(np.float32)]
    artifact = qcompiler.compile(path, "x86-avx2", frames, state={"h": "hn", "c": "cn"}, preset="fast")
    assert artifact.imported is not None and artifact.imported.status == "equal"
    assert qcompiler.verify(artifact, path, frames[:10], min_sqnr=25).passed
