"""Positions that a network's masks hide don't count in calibration; indices beyond a table are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_nets import OnnxNet, execute
from transformer_nets import HEADS, TOKENS, VOCABULARY, WIDTH, Transformer, bert, sentences, vit

import qcompiler
from qcompiler.base.errors import DataError
from qcompiler.calibration.padding import ALL, Counted, Padding
from qcompiler.importers.model import load
from qcompiler.pipeline.float_code import float_code
from qcompiler.pipeline.job import opened
from qcompiler.pipeline.stages import Measured, calibrate, equalize
from qcompiler.plan.sensitivity import Walk
from qcompiler.refine import rounding
from qcompiler.refine.rounding import DataRounder
from qcompiler.verification.compared import Votes
from qcompiler.verification.parity import ParityReport
from qcompiler.verification.report import verify_report

Sample = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("net") / "bert.onnx")


def with_padding(samples: list[Sample], token: int) -> list[Sample]:
    """The same sentences with another token in the padding."""
    return [{"ids": np.where(s["mask"] == 1, s["ids"], token), "mask": s["mask"]} for s in samples]


def measured(path: Path, samples: list[Sample]) -> Measured:
    return calibrate(equalize(opened(path, "native", samples, {})))


def test_nothing_of_padding_is_recorded(path: Path) -> None:
    """Whatever token stands in the padding, statistics of all values with a row for each position are the same."""
    some, other = (measured(path, with_padding(sentences(6), token)) for token in (0, VOCABULARY - 1))
    (aligned,) = some.padding.sets
    assert aligned.sources == ("mask",) and (aligned.batch, aligned.positions) == (1, TOKENS)
    rows = sum(int(s["mask"].sum()) for s in sentences(6))
    compared = [v for v in some.table.values if v in aligned.values]
    assert len(compared) > 20
    for value in compared:
        assert some.table.values[value].channel_count in (rows, rows * HEADS), value  # heads are rows of their own
        np.testing.assert_allclose(some.table.values[value].channel_sum, other.table.values[value].channel_sum, rtol=1e-5, atol=1e-4)
        assert some.table.values[value].low == pytest.approx(other.table.values[value].low, rel=1e-5)
    assert {k: np.round(c.scale, 3).tolist() for k, c in some.equalized.equalization.channels.items()} == {
        k: np.round(c.scale, 3).tolist() for k, c in other.equalized.equalization.channels.items()
    }
    for mine, others in zip(some.means.outputs, other.means.outputs, strict=True):
        for name in mine:
            np.testing.assert_allclose(mine[name], others[name], rtol=1e-4, atol=1e-5)


def test_outputs_are_judged_where_they_count(path: Path) -> None:
    model, sample = load(path), sentences(1)[0]
    twin, padding = float_code(model).session(), Padding(model.module)
    counted = padding.of(twin, sample)
    assert Walk(twin, sample, padding=padding).power.sum() < Walk(twin, sample).power.sum()
    (name,) = (o.name for o in twin.outputs)
    cleared = counted.outputs(twin.run(sample))[name]
    kept = sample["mask"][0].astype(bool)
    assert not cleared[0, ~kept].any() and np.array_equal(cleared[0, kept], twin.run(sample)[name][0, kept])


def test_samples_without_padding_count_whole(path: Path) -> None:
    model, sample = load(path), sentences(1)[0] | {"mask": np.ones((1, TOKENS), np.int64)}
    assert not Padding(model.module).of(float_code(model).session(), sample).kept


def test_corrections_see_what_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is rounded for as many positions as there are tokens."""
    seen: set[int] = set()
    original = DataRounder._patches

    def watch(self: DataRounder, layer: object, weight: np.ndarray, contexts: object, random: np.random.Generator, then: Any) -> Iterator[Any]:
        for found in original(self, layer, weight, contexts, random, lambda x: (x.shape[1], then(x))):  # type: ignore[arg-type]
            seen.add(found[0])
            yield found[1]

    monkeypatch.setattr(DataRounder, "_patches", watch)
    monkeypatch.setattr(rounding, "_ROWS", 1)  # one sample at a time
    samples = sentences(6)
    qcompiler.compile(path, calibration=samples)
    assert seen == {int(s["mask"].sum()) for s in samples}


def figures(report: ParityReport) -> dict[str, str]:
    """Of outputs and layers, as many digits as sums in another order leave alone."""
    metrics = {row.name: row.metrics for row in [*report.outputs, *report.layers]}
    return {name: f"{m.elements} {m.sqnr_db:.9f} {m.max_error:.9f} {m.mean_error:.12f} {m.cosine:.12f}" for name, m in metrics.items()}


def test_verify_leaves_padding_out(tmp_path: Path) -> None:
    """Figures of sentences of eight tokens are those of the same sentences with four positions of padding behind them; so is the page's account."""
    model = bert(tmp_path / "bert.onnx", tokens="s")
    shapes = {"ids": [(1, TOKENS), (1, 8)]}
    library = tmp_path / "bert.so"
    qcompiler.compile(model, calibration=sentences(4), input_shapes=shapes, preset="fast").save(library)
    session, whole = qcompiler.load(library), np.ones((1, 8), np.int64)
    short = [{"ids": s["ids"], "mask": whole} for s in sentences(3, tokens=8)]
    padded = [{k: np.concatenate([a, np.full((1, TOKENS - 8), 7 * (k == "ids"), np.int64)], axis=1) for k, a in s.items()} for s in short]
    alone, report = (qcompiler.verify(session, model, samples) for samples in (short, padded))
    assert (alone.hidden, report.hidden) == (0, 3 * (TOKENS - 8)) and "masks hide 12 positions" in str(report) and "masks hide" not in str(alone)
    assert report.outputs[0].metrics.elements == 3 * 8 * WIDTH
    got, wanted = figures(report), figures(alone)
    assert len(got) > 20 and {name for name in got if got[name] != wanted[name]} == {"cast1", "sub2", "mul3"}  # the mask itself, which has other elements
    page = verify_report(library, model, padded, tmp_path / "page.html", seconds=0.01)
    assert page.outputs == report.outputs and "masks hide 12 positions" in (tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match="sample 1: every position is padding: the mask computed from 'mask' hides all 12 of them"):
        qcompiler.verify(session, model, [padded[0], {"ids": padded[0]["ids"], "mask": 0 * padded[0]["mask"]}])


def test_votes_of_hidden_rows_do_not_count() -> None:
    """Scores [positions, classes]: of four rows the second is hidden; and scores [1, positions], where a hidden one would win."""
    kept = np.array([True, False, True, True])
    counts, votes, places = Counted({"v": kept}, {"out": "v"}), Votes("out"), Votes("out")
    expected = np.eye(4, dtype=np.float32)
    votes.add(expected[[0, 3, 2, 1]], expected, counts)
    got, wanted, judged = votes.result()
    assert judged.tolist() == kept.tolist() and (got == wanted)[judged].tolist() == [True, True, False]
    places.add(np.array([[1.0, 9.0, 3.0, 2.0]]), np.array([[1.0, 0.0, 3.0, 2.0]]), counts)
    assert [a.tolist() for a in places.result()] == [[2], [2], [True]]


class _Mean(Transformer):
    """A block, and the mean over all positions behind it: masked by a product with the mask, or not at all."""

    def made(self, path: Path, masked: bool) -> Path:
        x = self.input("x", 1, TOKENS, WIDTH)
        mask = self.input("mask", 1, TOKENS, dtype=onnx.TensorProto.INT64)
        kept = self.op("Cast", mask, to=onnx.TensorProto.FLOAT)
        bias = self.op("Mul", self.op("Sub", self.const(1.0), self.op("Unsqueeze", kept, self.ints(1, 2))), self.const(-1e9))
        y = self.norm(self.op("Add", self.attention(self.norm(x), bias), x))
        y = self.op("Mul", y, self.op("Unsqueeze", kept, self.ints(2))) if masked else y
        return self.save(path, [self.op("ReduceMean", y, axes=[1], keepdims=0)])


@pytest.mark.parametrize("masked", [True, False])
def test_what_else_reads_padding_needs_a_mask_too(tmp_path: Path, masked: bool) -> None:
    assert bool(Padding(load(_Mean(3).made(tmp_path / "mean.onnx", masked)).module)) == masked


@pytest.mark.parametrize("shape", [(2, TOKENS), (2, 1, 1, 3, TOKENS // 3), (1, 2, 1, TOKENS), (2, 1, 1, TOKENS)])
def test_masks_under_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The bias is a view of a value of fewer or more axes, of which each sequence of a batch has its own part."""
    net = Transformer(4)
    x = net.input("x", 2, TOKENS, WIDTH)
    bias = net.op("Reshape", net.op("Mul", net.input("mask", *shape), net.const(-1e9)), net.ints(2, 1, 1, TOKENS))
    model = load(net.save(tmp_path / "net.onnx", [net.op("Add", net.attention(net.norm(x), bias), x)]))
    hidden = np.arange(2 * TOKENS).reshape(2, TOKENS) % 5 == 0
    sample = {"x": np.ones((2, TOKENS, WIDTH), np.float32), "mask": hidden.astype(np.float32).reshape(shape)}
    counted = Padding(model.module).of(float_code(model).session(), sample)
    assert counted.hidden == hidden.sum() and all(np.array_equal(rows, ~hidden.reshape(-1)) for rows in counted.kept.values())


def test_networks_without_computed_masks_have_no_padding(tmp_path: Path) -> None:
    model = load(vit(tmp_path / "vit.onnx"))
    assert not Padding(model.module) and Padding(model.module).of(None, {}) is ALL


def _beyond(sample: Sample) -> None:
    sample["ids"][0, 0] = VOCABULARY


def _far_before(sample: Sample) -> None:
    sample["ids"][0, 0] = -VOCABULARY - 1


def _hidden(sample: Sample) -> None:
    sample["mask"][:] = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_beyond, rf"calibration sample 2: input 'ids' holds {VOCABULARY}, which is no row of the table of {VOCABULARY}"),
        (_far_before, rf"calibration sample 2: input 'ids' holds {-VOCABULARY - 1}, which is no row"),
        (_hidden, rf"calibration sample 2: every position is padding: the mask computed from 'mask' hides all {TOKENS} of them"),
    ],
)
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_data_that_can_be_no_text_is_refused(path: Path, preset: str, spoil: Callable[[Sample], None], message: str) -> None:
    samples = sentences(4)
    spoil(samples[2])
    with pytest.raises(DataError, match=message):
        calibrate(equalize(opened(path, "native", samples, {"preset": preset})))


def test_negative_ids_count_from_the_end(tmp_path: Path) -> None:
    """In integers without operators of their own."""
    net = OnnxNet(opset=17)
    ids = net.input("ids", 1, 6, dtype=onnx.TensorProto.INT64)
    x = net.op("Gather", net.const(net.rng.standard_normal((9, 8))), ids, axis=0)
    y = net.op("LayerNormalization", x, net.const(np.ones(8)), net.const(np.zeros(8)), axis=-1)
    file = net.save(tmp_path / "ids.onnx", [y])
    samples = [{"ids": np.array([[-1, 0, 8, -9, 3, i]], np.int64)} for i in range(4)]
    artifact = qcompiler.compile(file, calibration=samples)
    assert {s["op"] for s in artifact.manifest["steps"]} <= {"qc.gather", "qc.layer_norm", "qc.dequantize"}
    session = qcompiler.load(artifact.save(tmp_path / "ids.so"))
    (got,), (wanted,) = (list(r.values()) for r in (session.run(samples[0]), execute(load(file).module, samples[0])))
    np.testing.assert_allclose(got, wanted, atol=0.06)
