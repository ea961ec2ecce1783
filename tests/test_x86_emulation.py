"""The models by which tests emulate instructions equal real ones: this machine's at 256 bits, and the manual's sums of VPDPBUSD."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from x86_emulation import (
    ALL,
    AMX,
    AVX512VNNI,
    AVXVNNI,
    HOST,
    MODELS,
    UnknownInstruction,
    code_target,
    emulating,
    encoding,
    is_emulated,
    runs_here,
    vpack,
    vpdpbusd,
    vpmaddubsw,
    vpmaddwd,
)

from qcompiler.base.targets import Target, find_target
from qcompiler.schedules.isa import call, load, save
from qcompiler.schedules.x86 import amx
from qcompiler.schedules.x86.isa import AVX512VNNI as AVX512VNNI_ISA

pytestmark = runs_here
ROUNDS = 512


def edges(dtype: str, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random integers of all magnitudes, a third of them at the ends of the range or next to 0."""
    info = np.iinfo(dtype)
    spread = rng.integers(info.min, info.max, count, dtype, endpoint=True) >> rng.integers(0, info.bits, count).astype(dtype)
    special = rng.choice(np.array([info.min, info.min + 1, -1 if info.min else 0, 0, 1, info.max - 1, info.max], dtype), count)
    return np.where(rng.random(count) < 0.33, special, spread).astype(dtype)


def executed(make: Callable[..., Any], arguments: list[np.ndarray], lanes: list[int], result: tuple[str, int]) -> np.ndarray:
    """`make(vectors...)` on vectors of `lanes` elements, one after the other."""
    dtype, out_lanes = result
    out = np.zeros(out_lanes * (arguments[0].size // lanes[0]), dtype)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": "run"})
            pointers = [T.arg(f"p{i}", T.handle()) for i in range(len(arguments) + 1)]
            buffers = [T.decl_buffer((a.size,), str(a.dtype), data=p) for a, p in zip([*arguments, out], pointers, strict=True)]
            with T.serial(0, out.size // out_lanes) as i:
                vectors = [load(b, i * n, n) for b, n in zip(buffers, lanes, strict=False)]
                save(buffers[-1], i * out_lanes, T.bind(make(*vectors)), out_lanes)
    function = tvm.tirx.build(tvm.IRModule({"run": builder.get()}), target=tvm.target.Target(HOST.tvm))["run"]
    function(*[ctypes.c_void_p(a.ctypes.data) for a in [*arguments, out]])
    return out


@pytest.mark.parametrize(
    ("real", "model", "dtype", "result"),
    [
        ("llvm.x86.avx2.pmadd.wd", vpmaddwd, "int16", "int32x8"),
        ("llvm.x86.avx2.pmadd.ub.sw", vpmaddubsw, "int8", "int16x16"),
        ("llvm.x86.avx2.packssdw", vpack(True), "int32", "int16x16"),
        ("llvm.x86.avx2.packsswb", vpack(True), "int16", "int8x32"),
        ("llvm.x86.avx2.packuswb", vpack(False), "int16", "int8x32"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.startswith("llvm") else "",
)
def test_models_equal_the_instructions_of_this_machine(real: str, model: Callable[..., Any], dtype: str, result: str) -> None:
    rng, lanes = np.random.default_rng(0), 32 // np.dtype(dtype).itemsize
    a, b = edges(dtype, rng, ROUNDS * lanes), edges(dtype, rng, ROUNDS * lanes)
    if real == "llvm.x86.avx2.pmadd.wd":
        a[(a == -(2**15)) & (b == -(2**15))] = 0  # the one sum that does not fit
    out = (result.split("x")[0], int(result.split("x")[1]))
    want = executed(lambda x, y: call(result, real, x, y), [a, b], [lanes, lanes], out)
    np.testing.assert_array_equal(executed(lambda x, y: model(result, x, y), [a, b], [lanes, lanes], out), want)
    assert len(np.unique(want)) > 100


def test_the_model_of_vpdpbusd_is_the_exact_sum() -> None:
    rng = np.random.default_rng(1)
    acc, a, b = rng.integers(-(2**30), 2**30, ROUNDS * 16).astype(np.int32), edges("uint8", rng, ROUNDS * 64), edges("int8", rng, ROUNDS * 64)
    got = executed(lambda c, x, y: vpdpbusd("int32x16", c, T.reinterpret("int8x64", x), y), [acc, a, b], [16, 64, 64], ("int32", 16))
    products = a.astype(np.int32) * b
    np.testing.assert_array_equal(got, acc + products.reshape(-1, 4).sum(1))


def test_the_model_of_vcvtps2dq_rounds_to_even_and_flags_what_does_not_fit() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 2**31, -(2**31), 3e9, -3e9, 0.49999997, 8388609.0, np.nan, -2.5, 1e30], np.float32)
    with emulating():
        got = executed(AVX512VNNI_ISA.to_int, [values], [16], ("int32", 16))
    least = -(2**31)
    want = [0, 2, 2, 0, -2, 10**9, -(10**9), least, least, least, least, 0, 8388609, least, -2, least]
    np.testing.assert_array_equal(got, np.array(want, np.int32))


def test_every_model_is_of_an_intrinsic_that_llvm_has() -> None:
    for name in MODELS:
        assert tvm.target.codegen.llvm_lookup_intrinsic_id(name) > 0, name


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("llvm.x86.avx512.vpdpwssd.512", lambda acc, x: call("int32x16", "llvm.x86.avx512.vpdpwssd.512", acc, x, x)),
        ("llvm.x86.avx2.vpdpbssd.256", lambda acc, x: call("int32x8", "llvm.x86.avx2.vpdpbssd.256", acc, x, x)),
        ("llvm.x86.tdpbssd", lambda *_: amx.emit("tdpbssd", amx.number(0), amx.number(1), amx.number(2))),
    ],
    ids=["avx512", "named-like-avx2", "tile"],
)
def test_an_instruction_without_a_model_is_named(name: str, make: Callable[..., Any]) -> None:
    values = np.zeros(16, np.int32)
    assert tvm.target.codegen.llvm_lookup_intrinsic_id(name) > 0
    with emulating(), pytest.raises(UnknownInstruction, match=f"{re.escape(name)} is not emulated"):
        executed(make, [values, values], [16, 16], ("int32", 16))
    with emulating():
        np.testing.assert_array_equal(executed(lambda x: x, [values], [16], ("int32", 16)), values)


def test_the_switch_emulates_every_row_but_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_EMULATE", "1")
    assert [is_emulated(t) for t in ALL] == [t != HOST for t in ALL]
    monkeypatch.delenv("QCOMPILER_EMULATE")
    assert [is_emulated(t) for t in ALL] == [code_target(t) == HOST != t for t in ALL]


@pytest.mark.parametrize(
    ("features", "native"),
    [
        ((*HOST.features,), [HOST]),
        (AVXVNNI.features, [HOST, AVXVNNI]),
        (AVX512VNNI.features, [HOST, find_target("x86-avx512"), AVX512VNNI]),
        ((*AVX512VNNI.features, *AVXVNNI.features), [t for t in ALL if t != AMX]),
        ((*AMX.features, *AVXVNNI.features), ALL),
    ],
    ids=["haswell", "alder-lake", "zen-4", "zen-5", "sapphire-rapids"],
)
def test_each_machine_runs_what_it_has(features: tuple[str, ...], native: list[Target]) -> None:
    """And no code is for a feature that the machine lacks."""
    has = {*features, *HOST.features}

    def missing(target: Target) -> set[str]:
        return set(target.features) - has

    assert [t for t in ALL if encoding(t, missing) == t] == native
    assert not any(missing(encoding(t, missing)) for t in ALL)
    assert (encoding(AVXVNNI, missing) == HOST) == (not {"avx_vnni", "avx512_vnni"} & has)
