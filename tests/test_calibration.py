"""Histograms, observers and the calibration pass."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.base.errors import DataError, OutputError
from qcompiler.base.parallel import in_order
from qcompiler.calibration import table as calibration
from qcompiler.calibration.histogram import (
    BINS,
    Histogram,
    add_counts,
    add_counts_reference,
    channel_statistics,
    count_bins,
    count_bins_reference,
    counted,
    grid_exponent,
)
from qcompiler.calibration.observers import OBSERVERS, entropy, min_max, percentile, relative_error, squared_error
from qcompiler.calibration.table import CalibrationTable, Statistics, calibrate
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.numerics.spec import QParams
from qcompiler.pipeline.float_code import float_code
from qcompiler.pipeline.float_library import float_models


def histogram_of(*samples: np.ndarray) -> Histogram:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample, float(sample.min()), float(sample.max()), float(np.square(sample, dtype=np.float64).sum()))
    return histogram


@pytest.mark.parametrize("shape", [(1, 9, 7, 64), (1, 5, 5, 3), (2, 3, 17), (1, 1000), (7,), (1, 1), (4, 4, 40)])
@pytest.mark.parametrize("relu", [False, True])
def test_kernels_equal_numpy(shape: tuple[int, ...], relu: bool) -> None:
    x = np.random.default_rng(len(shape)).normal(0, 3, shape).astype(np.float32)
    x = np.maximum(x, 0) if relu else x
    low, high = float(x.min()), float(x.max())
    exponent = grid_exponent(low, high)
    first = int(np.floor(np.ldexp(min(low, 0.0), -exponent)))
    counts, zeros = count_bins(x, exponent, first)
    wanted, wanted_zeros = count_bins_reference(x, exponent, first)
    assert zeros == wanted_zeros
    np.testing.assert_array_equal(counts, wanted)
    sums, squares, least, greatest = channel_statistics(x)
    flat = x.reshape(-1, shape[-1])
    np.testing.assert_allclose(sums, flat.sum(0, dtype=np.float64), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(squares, np.square(flat, dtype=np.float64).sum(0), rtol=1e-13)
    np.testing.assert_array_equal(least, flat.min(0))
    np.testing.assert_array_equal(greatest, flat.max(0))


def test_channel_sums_reveal_every_nonfinite_value() -> None:
    for channels, where in [(40, 3), (40, 20), (40, 39), (3, 1)]:
        for value in (np.nan, np.inf, -np.inf):
            x = np.ones((4, channels), np.float32)
            x[2, where] = value
            sums, *_ = channel_statistics(x)
            assert np.flatnonzero(~np.isfinite(sums)).tolist() == [where]
    sums, *_ = channel_statistics(np.full((3, 20), np.finfo(np.float32).max, np.float32))
    assert np.isfinite(sums).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-60, 60), st.floats(-1, 1), st.integers(1, 50)), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_merging_bins_is_exact_and_order_free(parts: list[tuple[int, float, int]], random: object) -> None:
    """Ranges that grow by many orders of magnitude, in any order, give the counts of one pass at the final width."""
    rng = np.random.default_rng(0)
    samples = [np.ldexp(rng.normal(shift, 1, n), k).astype(np.float32) for k, shift, n in parts]
    forward, backward = histogram_of(*samples), histogram_of(*reversed(samples))
    everything = np.concatenate(samples)
    counts, zeros = count_bins_reference(everything, forward.exponent, forward.first)
    for histogram in (forward, backward):
        np.testing.assert_array_equal(histogram.counts, counts)
        assert (histogram.exponent, histogram.first, histogram.zeros) == (forward.exponent, forward.first, zeros)
        assert (histogram.low, histogram.high) == (everything.min(), everything.max())
    merged = histogram_of(*samples[: len(samples) // 2]).merged(histogram_of(*samples[len(samples) // 2 :]))
    np.testing.assert_array_equal(merged.counts, counts)
    np.testing.assert_allclose(merged.relative, forward.relative, rtol=1e-9)
    np.testing.assert_allclose(backward.relative, forward.relative, rtol=1e-9)


@pytest.mark.parametrize("low, high", [(0.0, 6.0), (-1.0, 1.0), (0.0, 1e30), (-3e38, 3e38), (5.0, 5.0), (-1e-30, 0.0), (999.9, 1000.0)])
def test_grid_covers_the_range_with_many_bins(low: float, high: float) -> None:
    histogram = histogram_of(np.array([low, high], np.float32))
    assert histogram.total == 2
    used = (max(high, 0.0) - min(low, 0.0)) / histogram.width
    assert BINS / 2 - 2 <= used <= BINS


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "shifted": lambda rng, n: rng.normal(2, 0.5, size=n),
    "relu": lambda rng, n: np.maximum(rng.normal(size=n), 0),
    "relu6": lambda rng, n: np.clip(rng.normal(2, 4, size=n), 0, 6),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "heavy tail": lambda rng, n: rng.standard_t(3, size=n),
    "negative": lambda rng, n: -rng.exponential(size=n),
    "silu": lambda rng, n: (lambda v: v / (1 + np.exp(-v)))(rng.normal(0, 2, size=n)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_estimated_error_is_the_measured_one(name: str) -> None:
    rng = np.random.default_rng(1)
    x = DISTRIBUTIONS[name](rng, 100_000).astype(np.float32)
    histogram = histogram_of(*np.split(x, 10))
    for observer, observe in OBSERVERS.items():
        params = QParams.from_range(*observe(histogram))
        error, parts = (x.astype(np.float64) - params.dequantize(params.quantize(x))) ** 2, np.split(x.astype(np.float64), 10)
        assert squared_error(histogram, params) == pytest.approx(float(error.mean()), rel=0.03), observer
        shares = [e.sum() / np.square(p).sum() for e, p in zip(np.split(error, 10), parts, strict=True)]
        assert relative_error(histogram, params) == pytest.approx(float(np.mean(shares)), rel=0.03), observer


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_each_search_is_the_best_observer_by_its_own_measure(name: str) -> None:
    x = DISTRIBUTIONS[name](np.random.default_rng(2), 50_000).astype(np.float32)
    histogram = histogram_of(*np.split(x, 10))
    for search, error in (("mse", squared_error), ("sqnr", relative_error)):
        best = error(histogram, QParams.from_range(*OBSERVERS[search](histogram)))
        for observer, observe in OBSERVERS.items():
            assert best <= 1.01 * error(histogram, QParams.from_range(*observe(histogram))), (search, observer)


def test_a_rare_sample_of_huge_values_does_not_rule_the_others() -> None:
    """One sample of forty is a hundred times as large. By squared error the range must cover it; relative to each sample it need not."""
    rng = np.random.default_rng(6)
    histogram = histogram_of(*[rng.normal(0, 100.0 if i == 17 else 1.0, 2000).astype(np.float32) for i in range(40)])
    assert OBSERVERS["mse"](histogram)[1] > 200
    assert OBSERVERS["sqnr"](histogram)[1] < 50
    assert histogram.powered == 40


def test_samples_of_zeros_have_no_part_in_the_relative_error() -> None:
    x = np.random.default_rng(7).normal(size=1000).astype(np.float32)
    params = QParams.from_range(-3.0, 3.0)
    with_zeros = histogram_of(x, np.zeros(1000, np.float32))
    assert relative_error(with_zeros, params) == pytest.approx(relative_error(histogram_of(x), params), rel=1e-3)
    assert squared_error(with_zeros, params) == pytest.approx(squared_error(histogram_of(x), params) / 2, rel=1e-3)
    assert (with_zeros.samples, with_zeros.powered) == (2, 1)


def test_observers_stay_within_what_was_seen() -> None:
    for name, make in DISTRIBUTIONS.items():
        histogram = histogram_of(make(np.random.default_rng(3), 20_000).astype(np.float32))
        for observer, observe in OBSERVERS.items():
            low, high = observe(histogram)
            assert min(histogram.low, 0) <= low <= high <= max(histogram.high, 0), (name, observer)


def test_percentile_leaves_out_its_share() -> None:
    x = np.random.default_rng(4).normal(size=100_000).astype(np.float32)
    low, high = percentile(99.0)(histogram_of(x))
    assert np.mean(x < low) == pytest.approx(0.005, rel=0.05)
    assert np.mean(x > high) == pytest.approx(0.005, rel=0.05)
    low, high = percentile(99.0)(histogram_of(np.abs(x)))
    assert low < 1e-5 and np.mean(np.abs(x) > high) == pytest.approx(0.01, rel=0.05)


def test_entropy_cuts_a_lone_outlier_and_keeps_a_flat_range() -> None:
    rng = np.random.default_rng(5)
    spiked = np.append(np.abs(rng.normal(size=100_000)), 100.0).astype(np.float32)
    assert entropy(histogram_of(spiked))[1] < 50
    flat = rng.uniform(0, 1, 200_000).astype(np.float32)
    assert entropy(histogram_of(flat))[1] > 0.95


def test_average_is_of_the_samples_extremes() -> None:
    histogram = histogram_of(*[np.array([-k, 2 * k], np.float32) for k in (1, 2, 6)])
    assert OBSERVERS["average"](histogram) == pytest.approx((-3.0, 6.0))
    assert min_max(histogram) == (-6.0, 12.0)


def test_constant_and_empty_values_have_ranges() -> None:
    for array in (np.zeros(10, np.float32), np.full(10, 3.5, np.float32), np.full(10, -1e-30, np.float32)):
        histogram = histogram_of(array)
        for observer, observe in OBSERVERS.items():
            low, high = observe(histogram)
            assert low <= high, observer
            params = QParams.from_range(low, high)
            assert squared_error(histogram, params) <= (abs(float(array[0])) / 100) ** 2, observer
    for observe in OBSERVERS.values():
        assert observe(Histogram()) == (0.0, 0.0)


# -- the pass ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Port:
    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class Network:
    """A float network of three steps; `buffer` is overwritten after each visit, as a real executor reuses its memory."""

    inputs = (Port("image", (1, 4, 4, 3)), Port("gain", (1,)))

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        for name, array in inputs.items():
            visit(name, array)
        buffer = np.empty((1, 4, 4, 3), np.float32)
        value = inputs["image"]
        for name, step in [("scaled", lambda x: x * inputs["gain"]), ("relu", lambda x: np.maximum(x, 0)), ("root", np.sqrt)]:
            value = step(value)
            buffer[:] = value
            visit(name, buffer)
            buffer[:] = np.nan
        visit("count", np.arange(3))
        return {"root": value}


NAMES = ["image", "gain", "scaled", "relu", "root"]


def samples_of(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"image": rng.normal(size=(1, 4, 4, 3)).astype(np.float32), "gain": np.float32([2.0])} for _ in range(count)]


def test_calibrate_records_every_float_value() -> None:
    samples, seen = samples_of(5), []
    table = calibrate(Network(), iter(samples), progress=lambda *step: seen.append(step))
    assert sorted(table.values) == ["gain", "image", "relu", "root", "scaled"]
    assert table.samples == 5 and seen == [("calibrate", i + 1, None) for i in range(5)]
    scaled = np.concatenate([s["image"] * 2 for s in samples])
    s = table.values["scaled"]
    assert (s.low, s.high, s.count) == (scaled.min(), scaled.max(), scaled.size)
    np.testing.assert_allclose(s.channel_mean, scaled.mean((0, 1, 2), dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(s.channel_low, scaled.min((0, 1, 2)))
    np.testing.assert_array_equal(s.channel_high, scaled.max((0, 1, 2)))
    assert table.values["relu"].histogram.zeros == np.count_nonzero(scaled <= 0)
    assert list(calibrate(Network(), samples, ids={"relu"}).values) == ["relu"]


def test_the_order_of_samples_does_not_matter() -> None:
    samples = samples_of(6)
    forward, backward = calibrate(Network(), samples), calibrate(Network(), samples[::-1])
    for name, s in forward.values.items():
        np.testing.assert_array_equal(s.histogram.counts, backward.values[name].histogram.counts)
        np.testing.assert_allclose(s.channel_sum, backward.values[name].channel_sum, rtol=1e-9, atol=1e-12)


def test_samples_side_by_side_make_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    code, samples = float_code(float_models(MODEL)[0]), list(demo_data()[0])[:9]
    twin = code.session(1)
    monkeypatch.setattr(calibration, "worker_count", lambda size: 3)
    short, found = calibration._SHORT, list[CalibrationTable]()
    for least in (short, 0.0):
        monkeypatch.setattr(calibration, "_SHORT", least)
        assert len(calibration._side_by_side(twin)) == (1 if least else 3), "steps of so small a network are short"
        found.append(calibrate(twin, samples))
    assert found[0].digest == found[1].digest


def test_a_watcher_sees_the_same_pass() -> None:
    class Watcher:
        def __init__(self) -> None:
            self.names: list[str] = []

        def look(self, sample: int, value_id: str, array: np.ndarray, seen: object) -> int | None:
            return None if value_id == "count" else sample

        def take(self, value_id: str, seen: int) -> None:
            self.names.append(f"{value_id} {seen}")

        def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
            self.names += outputs

    watcher = Watcher()
    calibrate(Network(), samples_of(2), ids=(), watchers=[watcher])
    assert watcher.names == [f"{v} {i}" if i is not None else v for n in (0, 1) for v, i in [*((v, n) for v in NAMES), ("root", None)]]


def test_samples_side_by_side_give_the_same_table() -> None:
    """Threads look at samples in any order; what they saw is taken in the order of the samples."""
    numbers, turn = list(range(40)), threading.Semaphore(2)

    def slow(worker: int, number: int) -> tuple[int, int]:
        with turn:
            time.sleep(0.002 if number % 3 == 0 else 0)
        return worker, number

    found = list(in_order(slow, ["a", "b", "c"], iter(numbers)))
    assert [n for _, n in found] == numbers and len({w for w, _ in found}) > 1

    def failing(worker: str, number: int) -> int:
        if number == 7:
            raise DataError("seven")
        return number

    seen = []
    with pytest.raises(DataError, match="seven"):
        seen += in_order(failing, ["a", "b"], iter(numbers))
    assert list(in_order(failing, ["alone"], range(5))) == list(range(5))


def test_a_sample_counted_on_its_own_grid_is_exact_on_every_coarser_one() -> None:
    rng = np.random.default_rng(0)
    for spread, power in ((1.0, 7.0), (1e-4, 0.3), (300.0, 0.0)):
        x = np.maximum(rng.normal(0, spread, 5000), -spread / 2).astype(np.float32)
        x[:9] = 0
        own = counted(x, float(x.min()), float(x.max()))
        for steps in (0, 1, 3, 9):
            exponent = own.exponent + steps
            first = int(np.floor(np.ldexp(float(x.min()), -exponent))) - 5
            wanted, zeros = count_bins_reference(x, exponent, first)
            to = Histogram(exponent, first, np.ones(BINS, np.int64), relative=rng.uniform(size=BINS))
            counts, relative = add_counts_reference(own, to, power)
            add_counts(own, to, power)
            np.testing.assert_array_equal(to.counts, wanted + 1)
            np.testing.assert_array_equal(to.counts, counts)
            np.testing.assert_array_equal(to.relative, relative)
            assert own.zeros == zeros >= 9


def test_table_round_trip(tmp_path: Path) -> None:
    table = calibrate(Network(), samples_of(3))
    table.save(tmp_path / "table.json")
    again = CalibrationTable.load(tmp_path / "table.json")
    assert again.digest == table.digest and again.samples == 3
    for name, s in table.values.items():
        np.testing.assert_array_equal(s.histogram.counts, again.values[name].histogram.counts)
        np.testing.assert_array_equal(s.histogram.relative, again.values[name].histogram.relative)
        np.testing.assert_array_equal(s.channel_sum, again.values[name].channel_sum)
        assert again.values[name].channel_low.dtype == np.float32
    assert calibrate(Network(), samples_of(3, seed=1)).digest != table.digest
    json.loads((tmp_path / "table.json").read_text())
    with pytest.raises(OutputError, match="does not exist"):
        table.save(tmp_path / "no" / "table.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json", "not a calibration table"),
        ("{}", "not a calibration table"),
        ('{"format": 99}', "format 99 is not supported"),
        ("[1]", "not a calibration table"),
    ],
)
def test_a_damaged_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match=message):
        CalibrationTable.load(tmp_path / "t.json")


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        CalibrationTable.load(tmp_path / "none.json")


def broken(**change: object) -> list[dict[str, np.ndarray]]:
    sample: dict[str, object] = dict(samples_of(1)[0])
    for name, value in change.items():
        if value is None:
            del sample[name]
        else:
            sample[name] = value
    return [*samples_of(1), sample]  # type: ignore[list-item]


NAN = np.full((1, 4, 4, 3), np.nan, np.float32)
HAS = r"The model has: 'image' float32\[1, 4, 4, 3\]; 'gain' float32\[1\]"


@pytest.mark.parametrize(
    "samples, message",
    [
        ([], "calibration data is empty"),
        (broken(gain=None), f"calibration sample 1: missing input 'gain'. {HAS}"),
        (broken(imgae=NAN), f"calibration sample 1: unknown input 'imgae'. Did you mean 'image'. {HAS}"),
        (broken(image=np.zeros((1, 4, 4), np.float32)), r"sample 1: input 'image' has shape \[1, 4, 4\], the model wants \[1, 4, 4, 3\]"),
        (broken(image=np.zeros((1, 4, 4, 3))), "sample 1: input 'image' has dtype float64, the model wants float32"),
        (broken(image=[1.0]), "sample 1: input 'image' is a list"),
        ([np.zeros(3)], f"calibration sample 0: .* not ndarray. {HAS}"),
        (broken(image=NAN), "calibration sample 1: input 'image' holds NaN"),
    ],
)
def test_bad_data_is_refused(samples: list[dict[str, np.ndarray]], message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(DataError, match=message):
        calibrate(Network(), samples)


def test_what_is_infinite_is_named_and_not_an_error() -> None:
    with np.errstate(over="ignore"):
        table = calibrate(Network(), broken(image=np.full((1, 4, 4, 3), 3e38, np.float32)))
    assert "scaled" in table.unbounded and CalibrationTable.from_json(table.to_json()).unbounded == table.unbounded


def test_statistics_of_an_empty_tensor() -> None:
    statistics = Statistics()
    assert statistics.add(np.zeros((0, 3), np.float32)) and statistics.count == 0
