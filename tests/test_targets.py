"""targets.yaml: selection by name, triple and features; every mistake named."""

from pathlib import Path

import pytest

from qcompiler.base.errors import TargetError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import find_target, load_targets, missing_features

ROW = "{triple: x, tvm: {}, features: [], rows: [], storage: int8, cpus: [c]}"


def test_every_row_is_complete() -> None:
    rows = load_targets()
    assert {"x86-avx2", "x86-avxvnni", "x86-avx512", "x86-avx512vnni"} <= set(rows)
    for target in rows.values():
        assert target.rows and target.features and target.compiler


def test_a_library_asks_its_cpu_for_every_feature() -> None:
    rows = load_targets()
    asked = {f: t.cpu_test(f) for t in rows.values() if not t.gpu for f in t.features}
    assert (asked["avx2"], asked["avx512_vnni"]) == ('__builtin_cpu_supports("avx2")', '__builtin_cpu_supports("avx512vnni")')
    assert (asked["avx_vnni"], asked["amx_tile"], asked["amx_int8"]) == ("qc_cpuid7(1, 0, 4)", "qc_cpuid7(0, 3, 24)", "qc_cpuid7(0, 3, 25)")
    bits = {name: [rows[name].cpu_test(f) for f in rows[name].features] for name in ("arm64-i8mm", "armv7-neon")}
    assert bits["arm64-i8mm"] == ["(getauxval(AT_HWCAP) & 2ul)", "(getauxval(AT_HWCAP) & 1048576ul)", "(getauxval(AT_HWCAP2) & 8192ul)"]
    assert bits["armv7-neon"] == ["(getauxval(AT_HWCAP) & 4096ul)"]


def test_by_name_triple_and_features() -> None:
    assert find_target("x86-avx2").name == "x86-avx2"
    assert find_target("x86_64-linux-gnu").name == "x86-avx2"
    assert find_target("x86_64-linux-gnu+avx512_vnni").name == "x86-avx512vnni"


def test_native_runs_here() -> None:
    assert missing_features(find_target("native")) == []


def test_native_prefers_rows_that_ran_on_hardware(tmp_path: Path) -> None:
    row = "{{triple: {}-linux-gnu, tvm: {{kind: llvm}}, features: [], rows: [x86-avx2], storage: uint8{}}}"
    path, (tried, untried) = tmp_path / "mine.yaml", (row.format(host_architecture(), more) for more in ("", ", tested: emulated only"))
    path.write_text(f"targets: {{a: {tried}, b: {tried}, c: {untried}}}")
    assert (find_target("native", path).name, find_target("c", path).name) == ("b", "c")
    path.write_text(f"targets: {{b: {untried}, c: {untried}}}")
    assert find_target("native", path).name == "c"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("x86_64-pc-linux-gnu", "x86-avx2"),
        ("x86_64-unknown-linux-gnu+avx512_vnni", "x86-avx512vnni"),
        ("amd64", "x86-avx2"),
        ("aarch64-unknown-linux-gnu", "arm64-neon"),
        ("arm64", "arm64-neon"),
        ("arm64+asimddp", "arm64-dotprod"),
        ("armv7l-unknown-linux-gnueabihf", "armv7-neon"),
        ("cortex-a72", "arm64-neon"),
        ("Neoverse-N1", "arm64-dotprod"),
        ("skylake-avx512", "x86-avx512"),
        ("raspberrypi4", "arm64-neon"),
        ("jetson-orin", "cuda-sm87-arm64"),
        ("t4", "cuda-sm75"),
        ("gtx1660", "cuda-sm75-dp4a"),
        ("aarch64-linux-android24+asimddp", "arm64-android-dotprod"),
        ("aarch64-none-linux-android", "arm64-android"),
        ("arm64-v8a", "arm64-android"),
        ("armeabi-v7a", "armv7-android"),
        ("armv7a-linux-androideabi", "armv7-android"),
    ],
)
def test_names_that_people_use(name: str, row: str) -> None:
    assert find_target(name).name == row


def test_compilers_and_rows_agree_on_cpus() -> None:
    """LLVM builds for the row's own mcpu what this file says of a CPU of that name."""
    for target in load_targets().values():
        if target.architecture == "x86_64":
            assert target.tvm["mcpu"] in target.cpus, target.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x86_64-pc-windows-msvc", "target 'x86_64-pc-windows-msvc': libraries are made for Linux with the GNU C library"),
        ("x86_64-linux-android", "target 'x86_64-linux-android': libraries are made for Linux with the GNU C library, and for Android on Arm; the triple of"),
        ("cortex-a711", "unknown target 'cortex-a711'. Did you mean 'cortex-a71"),
        ("x86-avx", "unknown target 'x86-avx'. Did you mean 'x86-avx2'"),
        ("x86_64-linux-gnu+avx512vnni", "unknown feature 'avx512vnni' for x86_64-linux-gnu. Did you mean 'avx512_vnni'"),
        ("sparc", "unknown target 'sparc'. Known: x86-avx2, x86-avxvnni, x86-avx512, ..., triples, names of CPUs, and native. `qcompiler targets` lists all"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(TargetError) as error:
        find_target(name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targets: {a: {triple: x, tvm: {}, features: [], rows: [], storge: int8}}", "target 'a': unknown key 'storge'. Did you mean 'storage'"),
        ("targets: {a: {triple: x}}", "target 'a': missing features, rows, storage, tvm"),
        ("targets: {a: {triple: x, tvm: {}, features: [], rows: [], storage: int4}}", "storage is 'int4'; supported: int8, uint8"),
        ("rows: {}", "expected a mapping with the key 'targets'"),
        (f"targets: {{a: {ROW}, b: {ROW}}}", "target 'b': the CPU 'c' is of 'a' already"),
        ("targets: [", "can't be read as YAML"),
        ("targets: {a: 3}", "target 'a': expected a mapping"),
        ("{targets: {}, features: [avx2]}", "features: expected a mapping {architecture: {feature: test}}"),
        ("{targets: {}, features: {x86_64: {a: {supports: 'a\")'}}}}", "features: x86_64: a: no test of a CPU"),
        ("{targets: {}, features: {x86_64: {a: {cpuid7: [1, rax, 4]}}}}", "features: x86_64: a: no test of a CPU: {'cpuid7': [1, 'rax', 4]}; supported:"),
        ("{targets: {}, features: {aarch64: {a: {hwcap: 1, hwcap2: 2}}}}", "features: aarch64: a: no test of a CPU"),
        ("{targets: {}, features: {aarch64: {a: {hwcap: 64}}}}", "features: aarch64: a: no test of a CPU"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(TargetError) as error:
        load_targets(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("targets: {mine: {triple: x86_64-linux-gnu, tvm: {kind: llvm}, features: [sse2], rows: [x86-avx2], storage: uint8}}")
    assert find_target("mine", path).storage_offset == 128
