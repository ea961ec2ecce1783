"""The documentation as a site: it builds without a warning, links lead somewhere, and the reference has what the code has."""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import qcompiler
from qcompiler.cli.main import build_parser
from qcompiler.pipeline.options import OPTIONS

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("material", reason="needs the extra docs")


STAGES = ("load", "widen", "equalize", "calibrate", "plan", "quantize", "realize", "generate", "correct", "port", "link", "run", "verify")


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(root), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    return folder


def test_the_reference_has_every_name_option_and_command(site: Path) -> None:
    api = html.unescape((site / "reference" / "api.html").read_text())
    for name in set(qcompiler.__all__) - {"load", "Options"}:
        assert f'id="{name.lower()}' in api, name
    for name in OPTIONS:
        assert f"<code>{name}</code>" in api, name
    cli = (site / "reference" / "cli.html").read_text()
    for verb in next(a for a in build_parser()._actions if a.choices and "compile" in a.choices).choices or ():
        assert f'id="{verb}"' in cli, verb


def test_the_readme_is_the_first_page_and_its_links_are_pages(site: Path) -> None:
    first = (site / "index.html").read_text()
    assert 'href="numerics.html"' in first and 'href="contributing.html"' in first and "docs/" not in first.split("<article")[1].split("href=")[1]
    pages = {"accuracy", "android", "calibrate-once", "cpp-service", "jetson", "pytorch", "quantized-models", "raspberry-pi", "transformers", "tuning"}
    assert {p.stem for p in (site / "howto").glob("*.html")} >= pages


def test_pictures_are_drawn_by_the_code(site: Path) -> None:
    drawn = {p.name: ElementTree.fromstring(p.read_text()) for p in (site / "pictures").glob("*.svg")}
    assert set(drawn) == {"pipeline.svg", "range.svg", "tile.svg"}
    said = {name: ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")] for name, root in drawn.items()}
    assert [s for s in said["pipeline.svg"] if s in STAGES] == list(STAGES) and "\u2192 ParityReport" in said["pipeline.svg"]
    assert any("clips" in s for s in said["range.svg"]) and any("of the 32 vector registers" in s for s in said["tile.svg"])
    concepts = (site / "concepts.html").read_text()
    assert all(f'src="pictures/{name}"' in concepts for name in drawn)


def test_commands_of_the_pages_are_commands(root: Path) -> None:
    """Every line of a page that calls qcompiler is one that its parser takes."""
    lines = 0
    for page in [root / "README.md", *(root / "docs").rglob("*.md")]:
        for line in re.sub(r"\\\n\s*", " ", page.read_text()).splitlines():
            line = line.strip().removeprefix("$ ")
            if not line.startswith("qcompiler ") or "..." in line:
                continue
            words = shlex.split(line, comments=True)
            words = words[1 : next((i for i, w in enumerate(words) if w in ("|", ">", "&&", ";")), len(words))]
            words = [w.removesuffix(";") for w in words]
            if words[0] == "COMMAND" or "[" in line:
                continue
            try:
                build_parser().parse_args(words)
            except SystemExit as error:
                assert error.code == 0, f"{page.name}: {line}"
            lines += 1
    assert lines > 60
