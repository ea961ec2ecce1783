"""The wheel, an editable install and the plain checkout: one package, the same modules in each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import qcompiler
from qcompiler.base.targets import load_targets

MODULES = ("qcompiler.passes.graph", "qcompiler.schedules.table", "qcompiler.cli.main", "qcompiler.runtime")
CHECK = """
import importlib, sys
from pathlib import Path
places = {name: str(Path(importlib.import_module(name).__file__).resolve()) for name in sys.argv[2:]}
wrong = {n: p for n, p in places.items() if not p.startswith(sys.argv[1])}
assert not wrong, wrong
from qcompiler.base.targets import load_targets
assert "x86-avx2" in load_targets()
for name in ("passes", "schedules"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is importable at the top level")
from qcompiler.cli.demo import FOLDER
assert (FOLDER / "digits.onnx").is_file() and (FOLDER / "digits.npz").is_file(), FOLDER
"""

LIGHT = """
import sys
import numpy as np
import qcompiler
session = qcompiler.load(sys.argv[1], threads=2)
image = np.zeros(session.inputs[0].shape, np.float32)
(output,) = session.run({session.inputs[0].name: image}).values()
assert np.isfinite(output).all() and session.profile({session.inputs[0].name: image}, 2)
from qcompiler.runtime.bench import interleave
assert interleave({"int8": lambda: session.run({session.inputs[0].name: image})}, seconds=0.01)[0].minimum > 0
"""

EXTRAS = """PIL ai_edge_litert ai_edge_quantizer bokeh distributed flatbuffers nncf onnxruntime onnxscript openvino pycocotools setuptools shtab sklearn tflite
torch"""
WITHOUT_EXTRAS = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS.split()!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(*command: str, cwd: Path, path: str = "") -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("qcompiler", "passes", "schedules"):
        shutil.copytree(root / folder, copy / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "targets.yaml"):
        shutil.copy(root / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77 (pip install '.[test]')")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), ".", cwd=sources)
    (built,) = folder.glob("qcompiler-*.whl")
    return built


def test_wheel_holds_one_package_and_everything_in_it(wheel: Path, sources: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/")]
    packaged = [n for n in names if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in packaged} == {"qcompiler"}
    found = [p for folder in ("qcompiler", "passes", "schedules") for p in (sources / folder).rglob("*") if p.is_file()]
    paths = {p.relative_to(sources).as_posix() for p in found if p.suffix != ".pyc" and ".egg-info" not in str(p)}
    expected = {n if n.startswith("qcompiler/") else f"qcompiler/{n}" for n in paths} | {"qcompiler/targets.yaml"}
    assert expected == set(packaged)
    assert {"qcompiler/py.typed", "qcompiler/cli/demo_data/digits.onnx", "qcompiler/cli/demo_data/digits.npz"} <= expected
    (entry,) = (n for n in names if n.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "qcompiler = qcompiler.cli.main:main" in archive.read(entry).decode()


def test_installed_wheel_imports_from_its_own_place(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    assert {p.name for p in site.iterdir() if not p.name.endswith(".dist-info") and p.name != "bin"} == {"qcompiler"}
    run(sys.executable, "-c", CHECK, str(site), *MODULES, cwd=tmp_path, path=str(site))


def test_a_library_runs_where_numpy_is_all_there_is(wheel: Path, digits: Callable[[str], Path], tmp_path: Path) -> None:
    """The light runtime: loading, running and timing a library imports nothing that a board would have to install besides numpy."""
    import numpy

    site, packages = tmp_path / "site", Path(numpy.__file__).resolve().parent.parent
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    for part in ("numpy", "numpy.libs"):
        if (packages / part).is_dir():
            (site / part).symlink_to(packages / part)
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    for absent in ("tvm", "onnx", "yaml", "rich", "xgboost"):
        assert subprocess.run([str(python), "-c", f"import {absent}"], capture_output=True, env={"PYTHONPATH": str(site)}).returncode, absent
    run(str(python), "-c", LIGHT, str(digits("native")), cwd=tmp_path, path=str(site))


def test_editable_install_imports_from_the_sources(wheel: Path, sources: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))  # pip, setuptools and the dependencies of the environment that runs this
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall", "--prefix", str(tmp_path / "venv"))
    run(str(python), "-m", "pip", "install", *options, "--editable", str(sources), cwd=tmp_path)
    run(str(python), "-c", CHECK, str(sources), *MODULES, cwd=tmp_path)


def test_checkout_imports_without_installing(root: Path) -> None:
    run(sys.executable, "-c", CHECK.replace('("passes", "schedules")', "()"), str(root), *MODULES, cwd=root, path=str(root))
    for name in ("passes", "schedules"):  # the folders are on the path here, and say what to import instead
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=root, capture_output=True, text=True)
        assert done.returncode
        assert f"import this package as qcompiler.{name}" in done.stderr


def test_every_module_imports_without_the_extras(root: Path) -> None:
    """`pip install .` alone compiles: what an extra brings is imported where it is used."""
    files = [p.relative_to(root).with_suffix("") for part in ("qcompiler", "passes", "schedules") for p in sorted((root / part).rglob("*.py"))]
    names = [".".join(f.parts if f.parts[0] == "qcompiler" else ("qcompiler", *f.parts)) for f in files]
    names = [n.removesuffix(".__init__") for n in names if not n.endswith("__main__")]
    assert len(names) > 200
    program = WITHOUT_EXTRAS + "\n".join(f"importlib.import_module({n!r})" for n in names)
    run(sys.executable, "-c", program, cwd=root)


def test_tvm_is_pinned_exactly(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert {"apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"} <= set(project["dependencies"])


def test_demo_data_is_small(root: Path) -> None:
    assert sum(p.stat().st_size for p in (root / "qcompiler" / "cli" / "demo_data").iterdir()) < 1_000_000


def test_no_source_file_is_huge(root: Path) -> None:
    files = [p for folder in ("qcompiler", "passes", "schedules") for p in (root / folder).rglob("*.py")]
    long = {str(p.relative_to(root)): n for p in files if (n := len(p.read_text().splitlines())) > 450}
    assert not long, f"split these: {long}"


def test_the_recipes_of_other_packagers_ask_for_the_same(root: Path) -> None:
    """The conda recipe and the container file name what pyproject.toml names; the boosted trees come without libraries for GPUs."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = dict(re.match(r"([\w-]+)(.*)", d.split(";")[0]).groups() for d in project["dependencies"])  # type: ignore[union-attr]
    assert "xgboost-cpu" in wanted
    recipe = yaml.safe_load((root / "packaging" / "conda" / "recipe.yaml").read_text())
    named = dict(line.split(maxsplit=1) for line in recipe["requirements"]["run"] if " " in line)
    for name, version in wanted.items():
        conda = {"PyYAML": "pyyaml", "xgboost-cpu": "py-xgboost-cpu"}.get(name, name)
        if name.startswith("apache-tvm"):
            assert any(f"{name}{version}" in line for line in recipe["build"]["script"]), name
        elif name != "xgboost":
            assert named[conda] == version.strip(), name
    assert f'version: "{qcompiler.__version__}"' in (root / "packaging" / "conda" / "recipe.yaml").read_text()
    container = (root / "packaging" / "Dockerfile").read_text()
    packages = {target.compiler.replace("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu") for target in load_targets().values() if "aarch64" in target.compiler}
    assert all(package in container for package in packages & {"g++-aarch64-linux-gnu"}) and "qemu-user-static" in container
    extras = re.search(r"\[([\w,]+)\]", container.split("pip install", 2)[-1])
    assert extras is not None and set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_the_workflow_runs_what_is_here(root: Path) -> None:
    jobs = yaml.safe_load((root / ".github" / "workflows" / "check.yml").read_text())["jobs"]
    supported = [c.rsplit(" ", 1)[1] for c in tomllib.loads((root / "pyproject.toml").read_text())["project"]["classifiers"] if "Python :: 3." in c]
    for name in ("check", "arm"):
        assert jobs[name]["strategy"]["matrix"]["python"] == supported
    assert jobs["arm"]["runs-on"].endswith("-arm") and jobs["arm"]["needs"] == "cross"
    scripts = {word for job in jobs.values() for step in job["steps"] for word in step.get("run", "").split() if word.startswith((".ci/", "packaging/"))}
    assert scripts == {".ci/run", ".ci/arm", "packaging/Dockerfile"}
    for script in (".ci/run", ".ci/arm"):
        assert os.access(root / script, os.X_OK)
        run("bash", "-n", script, cwd=root)
    for program in re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON", (root / ".ci" / "arm").read_text(), flags=re.DOTALL):
        compile(program, ".ci/arm", "exec")
