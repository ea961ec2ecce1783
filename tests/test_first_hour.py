"""The page of the first hour: what stands there was typed, so it can be typed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools import require_module, require_programs, require_slow

INSTALLING = ("sudo ", "git clone", "python3.11 -m venv", ". qc/", "pip install")


def commands(page: Path) -> list[str]:
    """What is typed, in order: lines that begin with `$`, with the lines that they continue on and the text that they are fed."""
    lines, found = page.read_text().splitlines(), []
    while lines:
        line = lines.pop(0)
        if not line.startswith("$ "):
            continue
        typed = [line[2:]]
        while typed[-1].endswith("\\"):
            typed.append(lines.pop(0))
        if typed[-1].endswith("<<END"):
            typed[-1] = typed[-1].replace("<<END", "<<'END'")
            while typed[-1] != "END":
                typed.append(lines.pop(0))
        found.append("\n".join(typed))
    return found


def test_the_page_goes_from_an_installation_to_a_board(root: Path) -> None:
    typed = commands(root / "docs" / "first-hour.md")
    assert [c.split()[1] for c in typed if c.startswith("qcompiler ")] == [
        *("demo", "targets", "calibrate", "explain", "compile", "verify", "run", "bench", "compile", "bundle", "verify")
    ]
    assert typed[0].startswith("sudo apt-get") and any("qemu-aarch64-static" in c for c in typed)


def test_every_line_of_the_first_hour_works(root: Path, real_data: Path, tmp_path: Path) -> None:
    require_slow("the first hour")
    require_programs("the first hour", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
    require_module("PIL.Image", "Pillow")
    (tmp_path / "mobilenet_v2.onnx").symlink_to(real_data / "models" / "mobilenet_v2.onnx")
    (tmp_path / "imagenet").symlink_to(real_data / "imagenet")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = {}
    for command in commands(root / "docs" / "first-hour.md"):
        if not command.startswith(INSTALLING):
            done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode in (0, 141) and "Traceback" not in done.stderr, f"{command}\n{done.stdout}\n{done.stderr}"  # 141: `head` has seen enough
            said[command] = done.stdout
    (equal,) = (out for command, out in said.items() if command.startswith("python -c"))
    assert equal == "True\n"
