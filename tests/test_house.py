"""Where things live: imports point one way, and every file that a text names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# A room imports only from rooms before it; neither of passes and schedules imports the other.
ROOMS = (
    *("base", "numerics", "passes", "schedules", "runtime", "calibration", "importers", "plan", "refine", "backend", "pipeline", "verification"),
    *("boards", "tuning", "exporters", "cli"),
)
NAMED = re.compile(r"(?<![\w.:/-])((?:[\w-]+/)*(?:[\w-]+|\{[\w,-]+\})\.(?:py|c|cc|h|hpp|cuh|md|yaml))(?![\w.(])")
OURS_ELSEWHERE = {f"{folder}{n}" for n in ("qcompiler.h", "qcompiler.hpp", "loader.h", "pool.h", "pool.hpp") for folder in ("", "qcompiler/")}
"""As programs include them."""
OTHERS = {
    "boards.yaml",
    "model.h",
    "qcompiler/model/model.h",
    "mobilenet.yaml",
    "make_resnet50.py",
    "FILE.py",
    "mine.py",
}  # made for or by users, or lying beside data


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package."""
    for folder, name in (("qcompiler", "qcompiler"), ("passes", "qcompiler.passes"), ("schedules", "qcompiler.schedules")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = [name, *path.relative_to(root / folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {name if (name := f"{node.module}.{a.name}") in known else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & known


def room(module: str) -> str:
    """Empty for the package itself, which offers what its rooms have."""
    return [*module.split("."), ""][1].replace("__main__", "")


def test_imports_point_one_way(root: Path) -> None:
    files = dict(modules(root))
    assert {room(m) for m in files} - {""} == set(ROOMS)
    wrong = []
    for module, path in files.items():
        for other in imports(path, set(files)):
            here, there = room(module), room(other)
            if here and there and here != there and (ROOMS.index(there) > ROOMS.index(here) or {here, there} == {"passes", "schedules"}):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_circles(root: Path) -> None:
    files = dict(modules(root))
    reads = {m: imports(p, set(files)) - {m} for m, p in files.items() if p.name != "__init__.py"}
    while free := [m for m, others in reads.items() if not others & set(reads)]:
        for module in free:
            del reads[module]
    assert not reads, f"these import each other: {sorted(reads)}"


def texts(root: Path) -> list[Path]:
    code = [p for folder in ("qcompiler", "passes", "schedules", "tests", "benchmarks", "examples") for p in (root / folder).rglob("*.py")]
    return sorted([*root.glob("*.md"), *(root / "docs").glob("*.md"), *code])


def spelled_out(name: str) -> list[str]:
    """Names with braces are several: those of `test_{house,docs}.py` are two."""
    braces = re.search(r"\{([\w,-]+)\}", name)
    return [name] if braces is None else [name.replace(braces.group(), part) for part in braces.group(1).split(",")]


@pytest.mark.parametrize("kind", [".md", ".py"])
def test_every_file_that_a_text_names_exists(root: Path, kind: str) -> None:
    """In documents by the path from the checkout; in code a name beside the file, or of one file only, will do."""
    tracked = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and not {".venv", ".git", "build"} & set(p.relative_to(root).parts)]
    names = {name: sum(t.rpartition("/")[2] == name for t in tracked) for name in {t.rpartition("/")[2] for t in tracked}}
    missing = []
    for path in texts(root):
        if path.suffix != kind:
            continue
        quoted = re.findall(r"`([^`\n]+)`", path.read_text("utf-8"))
        for name in [n for q in quoted for found in NAMED.findall(q) for n in spelled_out(found)]:
            there = (root / name).is_file() or (kind == ".py" and ((path.parent / name).is_file() or names.get(name) == 1))
            if not there and name not in OURS_ELSEWHERE | OTHERS:
                missing.append(f"{path.relative_to(root)}: {name}")
    assert not missing, "\n".join(missing)
