"""What importing the package brings along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_tvm_is_imported_without_pytorch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('imported')\n")
    code = "import qcompiler.pipeline.compile, qcompiler.cli.main; from tvm import relax; print('compiler'); import torch, tvm; print(tvm.relax is relax)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=300)
    assert done.stdout.split() == ["compiler", "imported", "True"], done.stderr
    code = "import torch, qcompiler; from tvm import relax; print('compiler')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=300)
    assert done.stdout.split()[0] == "imported", done.stderr
