"""The documentation as a site: it builds without a warning, links lead somewhere, and the reference has what the code has."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qcompiler
from qcompiler.cli.main import build_parser
from qcompiler.pipeline.options import OPTIONS

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("material", reason="needs the extra docs")


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
    assert {p.stem for p in (site / "howto").glob("*.html")} >= {"accuracy", "calibrate-once", "raspberry-pi", "cpp-service", "quantized-models", "tuning"}
