"""Targets: rows of targets.yaml, validated, and what the machine we stand on is."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.base.arguments import checks_arguments
from qcompiler.base.cpu_tests import read_cpu_tests
from qcompiler.base.cuda_driver import find_gpu
from qcompiler.base.errors import TargetError, closest
from qcompiler.base.files import about
from qcompiler.base.host import host_architecture, host_features, request_tiles
from qcompiler.base.triples import plain_triple
from qcompiler.base.yaml_file import read_yaml

_KEYS = {"triple", "tvm", "features", "rows", "storage", "compiler", "emulator", "cores", "tested", "host", "package", "cpus", "sysroot"}
_REQUIRED = {"triple", "tvm", "features", "rows", "storage"}


@dataclass(frozen=True)
class Target:
    """A row of targets.yaml.

    `features` are CPU features as Linux spells them in /proc/cpuinfo. `rows` are the kernel rows allowed, best first.
    `storage` is how int8 activations lie in memory: "int8", or "uint8" for q + 128.
    """

    name: str
    triple: str
    tvm: dict[str, Any]
    features: tuple[str, ...]
    rows: tuple[str, ...]
    storage: str
    compiler: tuple[str, ...] = ("g++",)
    emulator: tuple[str, ...] = ()
    cores: int = 2
    tested: str = ""  # on what instead, when kernels of this row never ran on hardware
    host: str = "x86_64-linux-gnu"  # of a GPU: the triple of the CPU that loads the library
    package: str = ""  # of Debian, with the first of `compiler`, on machines of another architecture
    cpus: tuple[str, ...] = ()  # names of CPUs, boards and GPUs that this is the best row for
    sysroot: str = ""  # for Android: of an NDK, to link with any clang
    cpu_tests: dict[str, str] = field(default_factory=dict, repr=False)  # of features of the architecture: C expressions

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def architecture(self) -> str:
        """ "x86_64", "aarch64", "armv7a", ..."""
        return self.triple.split("-")[0]

    @property
    def gpu(self) -> bool:
        """Whether kernels run on an NVIDIA GPU."""
        return self.architecture == "nvptx64"

    @property
    def android(self) -> bool:
        """Whether libraries are for Android, whose C library is bionic."""
        return "-android" in self.triple

    @property
    def capability(self) -> int:
        """The least compute capability of a GPU that runs the target's code: 80 for 8.0."""
        return int(re.sub(r"\D", "", str(self.tvm["arch"])))

    @property
    def one_capability(self) -> bool:
        """Whether no GPU of a later compute capability runs the target's code: it has instructions of one architecture alone (sm_90a)."""
        return str(self.tvm["arch"]).endswith("a")

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of a compute capability (86 for 8.6) runs the target's code."""
        return capability == self.capability if self.one_capability else capability >= self.capability

    @property
    def host_architecture(self) -> str:
        """The architecture of the CPU that loads the library."""
        return self.host.split("-")[0] if self.gpu else self.architecture

    @property
    def storage_offset(self) -> int:
        """What is added to a canonical int8 value in memory: 128 for uint8 storage, else 0."""
        return 128 if self.storage == "uint8" else 0

    def cpu_test(self, feature: str) -> str:
        """A C expression that is true where the CPU has `feature`. Raises TargetError for one that no library can ask for."""
        if feature in self.cpu_tests:
            return self.cpu_tests[feature]
        if self.architecture == "x86_64" and re.fullmatch(r"[\w.]+", feature, re.ASCII):
            return f'__builtin_cpu_supports("{feature}")'
        known = ", ".join(self.cpu_tests) or "none"
        raise TargetError(f"target '{self.name}': no run-time test for the feature '{feature}'; known: {known}. Others go under 'features' of a targets file")


def default_file() -> Path:
    """targets.yaml of the checkout, or the copy inside the installed package."""
    here = Path(__file__).resolve().parent.parent  # the package
    return here / "targets.yaml" if (here / "targets.yaml").is_file() else here.parent / "targets.yaml"


@checks_arguments
def load_targets(targets_file: str | os.PathLike[str] | None = None) -> dict[str, Target]:
    """All rows of a targets file (ours if none is named), by name, in order. Raises TargetError for a malformed one, naming the row and the key.

    Its section `features`, if any, adds to ours: {architecture: {feature: how a CPU is asked for it}}.
    """
    path = Path(targets_file or default_file())
    document, tests = _read(path)
    for architecture, ours in _read(default_file())[1].items():
        tests[architecture] = ours | tests.get(architecture, {})
    rows: dict[str, Target] = {}
    for name, fields in document["targets"].items():
        if not isinstance(fields, dict):
            raise TargetError(f"{path}: target '{name}': expected a mapping")
        for key in fields:
            if key not in _KEYS:
                raise TargetError(f"{path}: target '{name}': unknown key '{key}'.{closest(str(key), sorted(_KEYS))}")
        missing = sorted(_REQUIRED - set(fields))
        if missing:
            raise TargetError(f"{path}: target '{name}': missing {', '.join(missing)}")
        if fields["storage"] not in ("int8", "uint8"):
            raise TargetError(f"{path}: target '{name}': storage is '{fields['storage']}'; supported: int8, uint8")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        target = Target(name=str(name), cpu_tests=tests.get(str(fields["triple"]).split("-")[0], {}), **values)
        for feature in () if target.gpu else target.features:
            target.cpu_test(feature)
        for cpu in target.cpus:
            if other := next((t.name for t in rows.values() if cpu in t.cpus), None):
                raise TargetError(f"{path}: target '{name}': the CPU '{cpu}' is of '{other}' already")
        rows[str(name)] = target
    return rows


def _read(path: Path) -> tuple[dict[Any, Any], dict[str, dict[str, str]]]:
    """A targets file, and the tests of its section `features`."""
    there = about(path)
    return copy.deepcopy(_parsed(path, there and (there.st_mtime_ns, there.st_size, there.st_ino)))


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, version: object) -> tuple[dict[Any, Any], dict[str, dict[str, str]]]:
    try:
        document = read_yaml(path)
    except ValueError as error:
        raise TargetError(f"{path}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("targets"), dict):
        raise TargetError(f"{path}: expected a mapping with the key 'targets'")
    try:
        return document, read_cpu_tests(document.get("features", {}))
    except ValueError as error:
        raise TargetError(f"{path}: {error}") from error


def missing_features(target: Target) -> list[str]:
    """CPU features that `target` needs and this machine lacks (all of them on another architecture, "Android" where this is another Linux); for a GPU, what the
    machine lacks to run it."""
    if target.gpu:
        if target.host_architecture != host_architecture():
            return [target.host_architecture]
        gpu = find_gpu()
        if isinstance(gpu, str):
            return [gpu]
        return [] if target.runs_on(gpu.capability) else [f"compute capability {target.capability / 10} ({gpu.name} has {gpu.capability / 10})"]
    if target.architecture != host_architecture():
        return list(target.features) or [target.architecture]
    if target.android and not hasattr(sys, "getandroidapilevel"):
        return ["Android"]
    return [f for f in target.features if f not in (host_features() or ())]


def permit(target: Target) -> None:
    """Let this process run kernels of `target` outside a library, whose sessions do that: Linux gives AMX tiles on request. Raises TargetError if refused."""
    if "amx_tile" not in target.features:
        return
    error = request_tiles()
    if error:
        raise TargetError(f"Linux refuses AMX tiles to this process ({os.strerror(error)}); kernels of '{target.name}' can't run here")


def find_target(name: str | Target, path: str | os.PathLike[str] | None = None) -> Target:
    """A target by row name, by the name of a CPU or board ("cortex-a72", "raspberrypi4"), by triple (its most portable row), by triple plus features
    ("x86_64-linux-gnu+avx512_vnni"), or "native". Triples may be spelled as Clang and GCC do, or be an architecture alone ("arm64").

    "native" is the last row of the file for a CPU that this machine can run: rows are listed from portable to best. A row whose kernels never ran on hardware
    (`tested`) is taken by name only, unless no other runs here.
    A `Target` is returned as it is. Raises TargetError with the nearest names when there is none.
    """
    if isinstance(name, Target):
        return name
    rows = load_targets(path)
    if name in rows:
        return rows[name]
    if name == "native":
        runnable = [t for t in rows.values() if not t.gpu and not missing_features(t)]
        if not runnable:
            raise TargetError(f"no target in {path or default_file()} runs on this machine ({host_architecture()}); name one with --target")
        return ([t for t in runnable if not t.tested] or runnable)[-1]
    by_cpu = {cpu: t for t in rows.values() for cpu in t.cpus}
    if name.lower() in by_cpu:
        return by_cpu[name.lower()]
    triple, *wanted = name.split("+")
    triple = triple if any(t.triple == triple for t in rows.values()) else plain_triple(triple.lower()) or triple
    of_triple = [t for t in rows.values() if t.triple == triple]
    if of_triple:
        if not wanted:
            return of_triple[0]
        known = sorted({f for t in of_triple for f in t.features})
        for feature in wanted:
            if feature not in known:
                raise TargetError(f"unknown feature '{feature}' for {triple}.{closest(feature, known)} Known: {', '.join(known)}")
        best = [t for t in of_triple if set(wanted) <= set(t.features)]
        if best:
            return best[0]
        raise TargetError(f"no target of {triple} has all of {', '.join(wanted)}")
    near = closest(name, [*rows, "native", *by_cpu, *{t.triple for t in rows.values()}])
    few = "" if near else f" Known: {', '.join(list(rows)[:3])}, ..., triples, names of CPUs, and native."
    raise TargetError(f"unknown target '{name}'.{near or few} `qcompiler targets` lists all")
