"""Exported PyTorch programs: what they compute in PyTorch, their names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import require_module

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph
from qcompiler.passes.trained import Trained


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


def test_names_are_module_paths(torch: Any) -> None:
    sources = load(exported(torch)).sources
    assert {"stem", "blocks.0.conv", "blocks.1.norm"} <= set(sources), sorted(sources)
    assert any(name.startswith("blocks.0/") for name in sources)


def test_what_is_refused(torch: Any) -> None:
    with pytest.raises(ModelError, match=r"the module Net: give an exported program instead, .*torch\.export\.export"):
        load(residual(torch))
    batch = {"image": {2: torch.export.Dim("rows", min=4, max=64)}, "scale": None}
    program = torch.export.export(residual(torch), (torch.randn(1, 3, 8, 8),), {"scale": torch.ones(1)}, dynamic_shapes=batch)
    with pytest.raises(ModelError, match=r"dimension 2 .* of input 'image' .* is symbolic. Give it with --input-shape"):
        load(program)
    assert load(program, {"image": (1, 3, 12, 8)}).inputs[0].shape == (1, 3, 12, 8)


def test_stated_scales_are_kept(torch: Any, tmp_path: Path) -> None:
    """What PyTorch's own quantization writes between the operators: quantize and dequantize with numbers."""
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
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
