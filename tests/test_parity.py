"""The parity runner on small fake networks: right numbers, and faults that it must find."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.base.errors import ArtifactError, DataError
from qcompiler.base.tensor import TensorInfo
from qcompiler.numerics.metrics import Accumulator, sqnr_db
from qcompiler.verification.bits import bit_parity
from qcompiler.verification.parity import ParityReport, Thresholds, compare, verify

Visit = Callable[[str, np.ndarray], None]
SCALES = {"hidden": (0.05, -20), "last": (0.1, -100)}
WEIGHT = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


class Float:
    """x [1, 5, 5, 6] -> hidden = relu(x @ W) -> last = hidden * 2 - 1 -> logits = mean over the image."""

    def __init__(self, output: str = "logits") -> None:
        self.inputs = [TensorInfo("x", (1, 5, 5, 6), "float32")]
        self.outputs = [TensorInfo(output, (1, 4), "float32")]
        self.manifest: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.trace(inputs, lambda name, array: None)

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> dict[str, np.ndarray]:
        visit("x", inputs["x"])
        hidden = self.step("hidden", relu(inputs["x"] @ WEIGHT), visit)
        last = self.step("last", hidden * 2 - 1, visit)
        return {self.outputs[0].name: last.mean((1, 2))}

    def step(self, name: str, value: np.ndarray, visit: Visit) -> np.ndarray:
        """Visit a value and hand it on; the array visited is destroyed afterwards, as a session's workspace is."""
        shown = value.copy()
        visit(name, shown)
        shown[...] = 99
        return value


class Int8(Float):
    """The same network with 8-bit values. `fault(name, q)` may damage what a kernel writes; `shift` is added to the zero points used by
    consumers."""

    def __init__(self, fault: Callable[[str, np.ndarray], np.ndarray] | None = None, zero_shift: int = 0, **names: Any) -> None:
        super().__init__(**names)
        self.manifest = {"values": {n: {"dtype": "int8", "scale": s, "zero_point": z} for n, (s, z) in SCALES.items()}}
        self.fault, self.zero_shift = fault or (lambda name, q: q), zero_shift

    def step(self, name: str, value: np.ndarray, visit: Visit) -> np.ndarray:
        scale, zero = SCALES[name]
        q = self.fault(name, np.clip(np.rint(value / scale) + zero, -128, 127).astype(np.int8))
        shown = q.copy()
        visit(name, shown)
        shown[...] = 0
        return (q.astype(np.float32) - (zero + self.zero_shift)) * np.float32(scale)


def samples(count: int = 12) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 5, 5, 6)).astype(np.float32)} for _ in range(count)]


def off_by_one(layer: str, channel: int) -> Callable[[str, np.ndarray], np.ndarray]:
    def fault(name: str, q: np.ndarray) -> np.ndarray:
        if name == layer:
            q[..., channel] += 1
        return q

    return fault


# -- metrics -----------------------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((3, 4, 5)).astype(np.float32)
    actual = reference + rng.standard_normal((3, 4, 5)).astype(np.float32) * 0.1 + np.float32(0.05)
    error = actual.astype(np.float64) - reference
    total = Accumulator(step=0.5)
    for a, r in zip(actual, reference, strict=True):
        total.add(a, r)
    m = total.metrics()
    assert m.elements == 60
    assert m.sqnr_db == pytest.approx(10 * np.log10((reference.astype(np.float64) ** 2).sum() / (error**2).sum()))
    assert m.max_error == pytest.approx(np.abs(error).max())
    assert m.median_error == pytest.approx(np.sort(np.abs(error).ravel())[29], rel=1 / 64)
    assert m.mean_error == pytest.approx(error.mean())
    assert m.cosine == pytest.approx((actual * reference).sum() / np.linalg.norm(actual) / np.linalg.norm(reference))
    means = error.mean((0, 1)) / 0.5
    assert m.channel == np.abs(means).argmax()
    assert m.channel_bias == pytest.approx(means[m.channel])


def test_limits_of_the_ratio() -> None:
    one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
    assert sqnr_db(one, one) == np.inf
    assert sqnr_db(zero, zero) == np.inf
    assert sqnr_db(one, zero) == -np.inf
    assert sqnr_db(zero, one) == 0
    assert np.isnan(sqnr_db(one * np.float32("nan"), one))
    assert sqnr_db(one * np.float32("inf"), one) == -np.inf


# -- verdicts ----------------------------------------------------------------------------------------------------------------------


def test_a_faithful_library_passes() -> None:
    labels = np.array([int(Float().run(s)["logits"].argmax()) for s in samples()])
    labels[0] = (labels[0] + 1) % 4
    limits = Thresholds(min_sqnr=25, min_agreement=1.0, max_accuracy_drop=0.0, max_channel_bias=0.4)
    report = compare(Int8(), Float(), samples(), labels=labels, thresholds=limits)
    assert report.passed, report.failures
    assert (report.samples, report.layer_samples) == (12, 8)
    assert [row.name for row in report.layers] == ["hidden", "last"]
    assert {row.dtype for row in report.layers} == {"int8"}
    assert report.float_accuracy == report.int8_accuracy == pytest.approx(11 / 12)
    assert report.agreement == 1.0
    assert all(row.metrics.elements == 8 * 100 for row in report.layers)


def test_a_wrong_zero_point_fails_with_default_thresholds() -> None:
    report = compare(Int8(zero_shift=40), Float(), samples())
    assert not report.passed
    assert "output 'logits': SQNR" in report.failures[0]
    assert report.thresholds.min_sqnr == 10
    last = next(row for row in report.layers if row.name == "last")
    hidden = next(row for row in report.layers if row.name == "hidden")
    assert hidden.metrics.sqnr_db > 25 > last.metrics.sqnr_db  # and the layers say where it began


def test_a_wrong_zero_point_in_the_manifest_fails() -> None:
    library = Int8()
    library.manifest["values"]["hidden"]["zero_point"] += 1
    report = compare(library, Float(), samples(), thresholds=Thresholds(max_channel_bias=0.5))
    assert report.failures == [f for f in report.failures if "layer 'hidden'" in f]
    assert not report.passed


@pytest.mark.parametrize("channel", range(4))
def test_a_kernel_off_by_one_in_one_channel_fails(channel: int) -> None:
    report = compare(Int8(off_by_one("last", channel)), Float(), samples(), thresholds=Thresholds(max_channel_bias=0.5))
    assert len(report.failures) == 1
    assert f"layer 'last': channel {channel} is off by +" in report.failures[0]
    assert report.layers[1].metrics.channel_bias == pytest.approx(1, abs=0.3)


def test_each_threshold_can_fail_and_pass() -> None:
    labels = np.array([int(Float().run(s)["logits"].argmax()) for s in samples()])

    def reverse(name: str, q: np.ndarray) -> np.ndarray:
        return q[..., ::-1].copy() if name == "last" else q

    def failures(**limits: float) -> list[str]:
        return compare(Int8(reverse), Float(), samples(), labels=labels, thresholds=Thresholds(**limits)).failures

    assert any("top-1 agreement" in f for f in failures(min_agreement=0.9))
    assert any("accuracy dropped by" in f for f in failures(max_accuracy_drop=50))
    assert failures(max_accuracy_drop=100) == []
    assert any("SQNR" in f for f in failures(min_sqnr=20))
    assert failures(min_sqnr=-20) == []


def test_nan_fails() -> None:
    class Broken(Int8):
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"logits": np.full((1, 4), np.nan, np.float32)}

    report = compare(Broken(), Float(), samples(2), layer_samples=0)
    assert not report.passed
    assert report.layers == []


def test_identical_networks_are_infinitely_good_and_their_json_is_json() -> None:
    report = compare(Float(), Float(), samples(3))
    assert report.passed
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["outputs"][0]["metrics"]["sqnr_db"] == "inf"
    assert document["passed"] is True
    assert document["thresholds"]["min_sqnr"] == 10
    assert [row["name"] for row in document["layers"]] == ["hidden", "last"]


def test_text_names_the_worst_layer_and_the_verdict() -> None:
    text = str(compare(Int8(zero_shift=40), Float(), samples()))
    assert text.index("last") < text.index("hidden")
    assert "FAILED: output 'logits': SQNR" in text
    assert "PASSED" in str(compare(Int8(), Float(), samples()))


# -- what can't be compared --------------------------------------------------------------------------------------------------------


def test_nothing_joins() -> None:
    class Other(Float):
        def step(self, name: str, value: np.ndarray, visit: Visit) -> np.ndarray:
            return super().step(f"other.{name}", value, visit)

    with pytest.raises(ArtifactError, match="compiled from another model"):
        compare(Int8(), Other(), samples())


def test_other_outputs_shapes_and_missing_scales() -> None:
    with pytest.raises(ArtifactError, match="outputs .*logits.* are not the float network's .*scores"):
        compare(Int8(), Float(output="scores"), samples())
    library = Int8()
    del library.manifest["values"]["last"]["scale"]
    with pytest.raises(ArtifactError, match="no scale and zero point for the int8 value 'last'"):
        compare(library, Float(), samples())

    class Flat(Float):
        def step(self, name: str, value: np.ndarray, visit: Visit) -> np.ndarray:
            super().step(name, value.reshape(1, -1), visit)
            return value

    with pytest.raises(ArtifactError, match=r"value 'hidden' has shape \[1, 5, 5, 4\] in the library and \[1, 100\]"):
        compare(Int8(), Flat(), samples())


def test_thresholds_that_need_what_is_not_there() -> None:
    with pytest.raises(DataError, match="needs labels"):
        compare(Int8(), Float(), samples(), thresholds=Thresholds(max_accuracy_drop=1))
    with pytest.raises(DataError, match="3 labels for 12 samples"):
        compare(Int8(), Float(), samples(), labels=np.zeros(3, np.int64))
    for wrong in (-1, 4):
        with pytest.raises(DataError, match=r"labels lie in \[.*, but output 'logits' has 4 classes, counted from 0"):
            compare(Int8(), Float(), samples(), labels=np.array([wrong, *[0] * 11]))
    with pytest.raises(DataError, match="the data is empty"):
        compare(Int8(), Float(), [])
    maps, reference = Int8(), Float()
    maps.outputs = reference.outputs = [TensorInfo("logits", (1, 4, 4), "float32")]
    with pytest.raises(DataError, match="need an output of shape"):
        compare(maps, reference, samples(), thresholds=Thresholds(min_agreement=0.9))


def test_verify_checks_samples_and_reads_label_files(tmp_path: Path) -> None:
    labels = np.array([int(Float().run(s)["logits"].argmax()) for s in samples()])
    np.save(tmp_path / "y.npy", labels)
    report: ParityReport = verify(Int8(), Float(), samples(), labels=tmp_path / "y.npy", max_accuracy_drop=10)
    assert report.float_accuracy == 1.0
    seen: list[tuple[str, int, int | None]] = []
    verify(Int8(), Float(), samples(3), progress=lambda *now: seen.append(now))
    assert seen == [("verify", 1, 3), ("verify", 2, 3), ("verify", 3, 3)]
    with pytest.raises(DataError, match="unknown input 'y'"):
        verify(Int8(), Float(), [{"y": samples(1)[0]["x"]}])


# -- bit parity --------------------------------------------------------------------------------------------------------------------


def expected_values(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept: dict[str, np.ndarray] = {}
    Int8().trace(sample, lambda name, array: kept.__setitem__(name, array.copy()))
    return kept


def test_bit_parity_finds_a_single_wrong_element() -> None:
    sample = samples(1)[0]
    expected = expected_values(sample)
    assert bit_parity(Int8(), expected, sample) == []
    expected["last"][0, 2, 3, 1] ^= 1
    (mismatch,) = bit_parity(Int8(), expected, sample)
    assert (mismatch.name, mismatch.elements, mismatch.index, mismatch.channels) == ("last", 1, (0, 2, 3, 1), (1,))
    assert "value 'last': 1 elements differ, first at [0, 2, 3, 1]" in str(mismatch)


def test_bit_parity_names_the_channel_of_an_off_by_one_kernel_where_it_begins() -> None:
    sample = samples(1)[0]
    mismatches = bit_parity(Int8(off_by_one("hidden", 2)), expected_values(sample), sample)
    assert [m.name for m in mismatches] == ["hidden", "last"]
    assert mismatches[0].channels == (2,)
    assert mismatches[0].elements == 25


def test_bit_parity_compares_something() -> None:
    with pytest.raises(ArtifactError, match="nothing was compared"):
        bit_parity(Int8(), {}, samples(1)[0])
    with pytest.raises(ArtifactError, match=r"value 'last' is int8\[1, 5, 5, 4\] in the library, float64\[3\]"):
        bit_parity(Int8(), {"last": np.zeros(3)}, samples(1)[0])
