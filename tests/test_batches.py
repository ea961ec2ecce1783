"""Samples that come in batches: what a DataLoader yields, with labels or without, and arrays that hold all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qcompiler.base.errors import DataError
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration import batches
from qcompiler.calibration.data import at_most, open_samples, unused

X = np.arange(10 * 3, dtype=np.float32).reshape(10, 3)
ONE, TWO = [TensorInfo("x", (1, 3), "float32")], [TensorInfo("x", (4, 3), "float32"), TensorInfo("n", (4,), "int64")]


class Loader:
    """As PyTorch's, which shuffles: every pass has another order."""

    batch_size = 4

    def __init__(self, form: Any = lambda x, y: (x, y)) -> None:
        self.dataset, self.form, self.passes, self.read = X, form, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for start in range(0, 10, 4):
            self.read += 1
            rows = X[start : start + 4] + 1000 * (self.passes - 1)
            yield self.form(rows, np.arange(start, start + len(rows)))


def rows(samples: Any) -> np.ndarray:
    return np.concatenate([s["x"] for s in samples])


@pytest.mark.parametrize("form", [lambda x, y: (x, y), lambda x, y: [x], lambda x, y: x, lambda x, y: {"x": x}])
def test_a_loader(form: Any) -> None:
    """Labels are dropped, batches divided; read once, whatever its order is the next time."""
    loader = Loader(form)
    samples = open_samples(loader, ONE)
    assert samples.count == 10 and [s["x"].shape for s in samples] == [(1, 3)] * 10 and unused(samples) == []
    np.testing.assert_array_equal(rows(samples), X)
    np.testing.assert_array_equal(rows(samples), X)
    assert loader.passes == 1


def test_the_networks_batch_goes_over_the_loaders() -> None:
    three = [TensorInfo("x", (3, 3), "float32")]
    samples = open_samples(Loader(), three)
    np.testing.assert_array_equal(rows(samples), X[:9])
    assert unused(samples) == ["the last 1 rows make no whole batch and were left out"]


def test_no_more_is_read_than_is_asked_for() -> None:
    loader = Loader()
    samples = at_most(open_samples(loader, ONE), 3)
    assert samples.count == 3 and len(list(samples)) == 3 and loader.read == 1


def test_several_inputs() -> None:
    """As many elements of a tuple as there are inputs, in their order."""
    found = list(open_samples([(X[:4], np.arange(4), "label"), (X[4:8], np.arange(4, 8), "label")], TWO))
    assert [s["n"].tolist() for s in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="batch 0: the inputs make different numbers of samples: {'x': 2, 'n': 1}"):
        list(open_samples([(X[:8], np.arange(4))], TWO))


@pytest.mark.parametrize("source", [X, {"x": X}, X[:, None], [X[:4], X[4:]]])
def test_arrays(source: Any) -> None:
    np.testing.assert_array_equal(rows(open_samples(source, ONE)), X)


@pytest.mark.parametrize(
    ("source", "inputs", "message"),
    [
        (X[:3], TWO[:1], r"3 rows make no batch of the model: at least one sample is needed. The model has: 'x' \[4, 3\]"),
        (X[:0], ONE, "the data is empty"),
        ({}, ONE, "the data is empty|missing input 'x'"),
        ({"x": X, "label": np.arange(10)}, ONE, "unknown input 'label'"),
        ([{"x": X[:4], "n": np.arange(4), "label": 3}], TWO, "unknown input 'label'"),
    ],
)
def test_what_holds_no_sample_is_told(source: Any, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(open_samples(source, inputs))


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LARGEST", 60)
    with pytest.raises(DataError, match="a DataLoader may shuffle, so it is read once and kept. Give max_samples"):
        list(open_samples(Loader(), ONE))
    assert len(list(at_most(open_samples(Loader(), ONE), 5))) == 5
