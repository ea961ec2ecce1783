"""Exported PyTorch programs: what they compute in PyTorch, their names, and what is refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import require_module

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from qcompiler.passes.graph import Graph
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.compile import compile_stages
from qcompiler.verification import interpreter


@pytest.fixture(scope="module")
def torch() -> Any:
    require_module("onnxscript")
    return require_module("torch")


def residual(torch: Any) -> Any:
    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.norm(self.conv(x)) + x)

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(Block(), Block()), torch.nn.Linear(4, 5)

        def forward(self, image: Any, scale: Any) -> Any:
            return self.head(self.blocks(self.stem(image * scale)).mean((2, 3)))

    torch.manual_seed(0)
    return Net().eval()


def exported(torch: Any) -> Any:
    return torch.export.export(residual(torch), (torch.randn(1, 3, 8, 8),), {"scale": torch.ones(1)})


def test_a_program(torch: Any, tmp_path: Path) -> None:
    program = exported(torch)
    samples = [{"image": x, "scale": np.ones(1, np.float32)} for x in np.random.default_rng(0).standard_normal((8, 1, 3, 8, 8)).astype(np.float32)]
    artifact = qcompiler.compile(program, calibration=samples, target="x86-avx2", preset="fast")
    assert artifact.imported is not None and artifact.imported.status == "equal" and "PyTorch" in str(artifact.imported)
    report = qcompiler.verify(artifact.save(tmp_path / "p.so"), program, samples)
    assert report.passed and report.imported is not None and report.imported.status == "equal"
    assert load(program).digest == load(exported(torch)).digest


def test_a_module(torch: Any, tmp_path: Path) -> None:
    """In evaluation mode, whatever it is in; calibrated by a DataLoader that shuffles and has labels."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.9), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)).train()
    x = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(20)), batch_size=8, shuffle=True)
    artifact = qcompiler.compile(net, "x86-avx2", loader, example_inputs=np.zeros((2, 3, 8, 8), np.float32), preset="fast")
    assert net.training and net[1].training and artifact.imported is not None and artifact.imported.status == "equal"
    assert [tuple(i["shape"]) for i in artifact.manifest["inputs"]] == [(2, 3, 8, 8)]
    report = qcompiler.verify(artifact.save(tmp_path / "p.so"), net, x, example_inputs=(x[:2],), min_sqnr=20)
    assert report.passed, str(report)


def test_attention_with_a_bias_that_was_learned(torch: Any) -> None:
    """As T5 has it. PyTorch's exporter takes attention apart differently where a mask may want gradients, and fails on views of its result."""

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.projection, self.places = torch.nn.Linear(16, 48), torch.nn.Embedding(36, 4)

        def forward(self, x: Any) -> Any:
            q, k, v = (part.view(1, 6, 4, 4).transpose(1, 2) for part in self.projection(x).chunk(3, -1))
            bias = self.places(torch.arange(36).reshape(6, 6)).permute(2, 0, 1)[None]
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            return mixed.transpose(1, 2).reshape(1, 6, -1)

    x, net = torch.randn(1, 6, 16), Net().eval()
    found = interpreter.run(load(torch.export.export(net, (x,))).module, {"x": x.numpy()})
    np.testing.assert_allclose(next(iter(found.values())), net(x).detach().numpy(), atol=1e-5)


def test_names_are_module_paths(torch: Any) -> None:
    sources = load(exported(torch)).sources
    assert {"stem", "blocks.0.conv", "blocks.1.norm"} <= set(sources), sorted(sources)
    assert any(name.startswith("blocks.0/") for name in sources)


def test_what_is_refused(torch: Any) -> None:
    with pytest.raises(ModelError, match=r"the module Net: a module has no shapes\. What to do: give example_inputs=\(x,\)"):
        load(residual(torch))
    with pytest.raises(ModelError, match="example_inputs are the arguments that a PyTorch module is exported with; this network has shapes already"):
        origin_of(exported(torch), (), torch.ones(1))
    with pytest.raises(ModelError, match="the module Net: PyTorch can't export it: missing a required argument: 'scale'"):
        origin_of(residual(torch), (), torch.ones(1, 3, 8, 8))
    batch = {"image": {2: torch.export.Dim("rows", min=4, max=64)}, "scale": None}
    program = torch.export.export(residual(torch), (torch.randn(1, 3, 8, 8),), {"scale": torch.ones(1)}, dynamic_shapes=batch)
    with pytest.raises(ModelError, match=r"dimension 2 .* of input 'image' .* is symbolic. Give it with --input-shape"):
        load(program)
    assert load(program, {"image": (1, 3, 12, 8)}).inputs[0].shape == (1, 3, 12, 8)


def net_of(torch: Any, forward: Any) -> Any:
    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            numbers = {"q": torch.randint(-127, 128, (4, 8), dtype=torch.int8), "w": torch.randn(4, 8), "scales": torch.rand(4) * 0.01 + 0.01}
            numbers |= {"zeros": torch.zeros(4, dtype=torch.int64), "zeros32": torch.zeros(4, dtype=torch.int32)}
            numbers |= {"scale": torch.tensor(0.05), "zero": torch.tensor(3)}
            for name, value in numbers.items():
                self.register_buffer(name, value)

        def forward(self, x: Any) -> Any:
            return forward(self, x, torch.ops.quantized_decomposed)

    return Net().eval()


def activation(n: Any, x: Any, q: Any, low: int = -128) -> Any:
    return q.dequantize_per_tensor.tensor(q.quantize_per_tensor.tensor(x, n.scale, n.zero, low, 127, q8(x)), n.scale, n.zero, low, 127, q8(x))


def q8(x: Any) -> Any:
    return sys.modules["torch"].int8


def stored(n: Any, q: Any) -> Any:
    return q.dequantize_per_channel.default(n.q, n.scales, n.zeros, 0, -127, 127, n.q.dtype)


def linear(x: Any, w: Any) -> Any:
    return sys.modules["torch"].nn.functional.linear(x, w)


def fake(n: Any, x: Any, q: Any) -> Any:
    torch = sys.modules["torch"]
    weight = torch.fake_quantize_per_channel_affine(n.w, n.scales, n.zeros32, 0, -127, 127)
    return linear(torch.fake_quantize_per_tensor_affine(x, 0.05, 131, 0, 255), weight)


def dynamic(n: Any, x: Any, q: Any) -> Any:
    numbers = (*q.choose_qparams.tensor(x, -128, 127, 1e-5, q8(x)), -128, 127, q8(x))
    return linear(q.dequantize_per_tensor.tensor(q.quantize_per_tensor.tensor(x, *numbers), *numbers), stored(n, q))


def token(n: Any, x: Any, q: Any) -> Any:
    numbers = (*q.choose_qparams_per_token_asymmetric.default(x, q8(x)), -128, 127, q8(x))
    return linear(q.dequantize_per_token.default(q.quantize_per_token.default(x, *numbers), *numbers, x.dtype), stored(n, q))


FORMS = {
    "narrow": lambda n, x, q: linear(activation(n, x, q, -127), stored(n, q)),
    "fake": fake,
    "dynamic": dynamic,
    "token": token,
}


@pytest.mark.parametrize("form", FORMS)
def test_what_pytorch_quantized(torch: Any, form: str) -> None:
    """PT2E's operators and fake quantization: weights and scales are PyTorch's, dynamic ranges are calibrated, results agree."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    net = net_of(torch, FORMS[form])
    samples = [{"x": x} for x in np.random.default_rng(0).standard_normal((8, 3, 8)).astype(np.float32)]
    made = compile_stages(net, "x86-avx2", samples, example_inputs=samples[0]["x"], preset="fast")
    assert made.artifact.imported is not None and made.artifact.imported.status == "equal", str(made.artifact.imported)
    plan = made.quantized.plan
    ((weight, scales),) = (plan.weight(group) for group in plan.scales)
    wanted = torch.clamp(torch.round(net.w / net.scales[:, None]), -127, 127) if form == "fake" else net.q
    np.testing.assert_array_equal(weight, wanted.numpy())
    np.testing.assert_array_equal(np.float32(scales), net.scales.numpy())
    stated = {(np.float32(p.scale), p.zero_point) for p in Trained.of(Graph.of(made.quantized.model.module).attrs).values.values()}
    calibrated = form in ("dynamic", "token")
    assert stated == (set() if calibrated else {(np.float32(0.05), 3)})
    assert any("taken back" in note and "is calibrated" in note for note in plan.notes) == calibrated


def test_weights_with_a_scale_for_each_group(torch: Any, tmp_path: Path) -> None:
    """Groups along a row, as PT2E writes 4-bit weights, stored and computed: the reals are PyTorch's; 8 bits and own groups of 4 are there for the asking."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("q", torch.randint(-8, 8, (16, 64), dtype=torch.int8))
            self.register_buffer("scales", torch.rand(16, 2) * 0.05 + 0.01)
            self.register_buffer("zeros", torch.randint(-2, 2, (16, 2), dtype=torch.int8))

        def forward(self, x: Any) -> Any:
            q, numbers = torch.ops.quantized_decomposed, (self.scales, self.zeros, -8, 7, torch.int8, 32)
            w = q.dequantize_per_channel_group.default(self.q, *numbers, torch.float32)
            again = q.dequantize_per_channel_group.default(q.quantize_per_channel_group.default(w * 1.02, *numbers), *numbers, torch.float32)
            return torch.cat([x @ w.t(), x @ again.t()], 1)

    net = Net().eval()
    samples = [{"x": x} for x in np.random.default_rng(0).standard_normal((8, 4, 64)).astype(np.float32)]
    for options, least in (({"calibration": samples, "requantize": True}, 25), ({"weights": "int4", "group_size": 32, "asymmetric": True}, 20)):
        artifact = qcompiler.compile(net, target="x86-avx2", example_inputs=samples[0]["x"], **options)
        report = qcompiler.verify(artifact, net, samples, min_sqnr=least, example_inputs=samples[0]["x"])
        assert report.passed and report.imported is not None and report.imported.status == "equal", str(report)
        assert min(o.sqnr_db for o in report.imported.outputs) > 100
        assert {f["op"] for f in artifact.manifest["float_ops"]} <= {"Concat"} or "weights" in options
    notes = qcompiler.compile(net, "x86-avx2", samples, example_inputs=samples[0]["x"]).manifest["notes"]
    assert any("several scales along an output channel" in note and "--weights int4" in note for note in notes)


def test_stated_scales_are_kept(torch: Any, tmp_path: Path) -> None:
    """What PyTorch's own quantization writes between the operators: quantize and dequantize with numbers."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    ops = torch.ops.quantized_decomposed

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: Any) -> Any:
            for scale, zero in ((0.04, 3), (0.02, -128)):
                numbers = (scale, zero, -128, 127, torch.int8)
                x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *numbers), *numbers)
                x = torch.relu(self.conv(x)) if zero == 3 else x
            return x

    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.randn(1, 3, 8, 8),))
    model = load(program)
    stated = {(np.float32(p.scale), p.zero_point) for p in Trained.of(Graph.of(model.module).attrs).values.values()}
    assert stated == {(np.float32(0.04), 3), (np.float32(0.02), -128)}
