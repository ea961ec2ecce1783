"""The Python interface as a user meets it: real signatures, values where the command line takes files, errors for what is of the wrong kind."""

from __future__ import annotations

import copy
import inspect
import pickle
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.base.targets import load_targets
from qcompiler.calibration.data import class_indices, open_samples
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import build_parser
from qcompiler.pipeline.options import ARGUMENTS, GROUPS, OPTIONS, TYPES, complete, given

WITH_OPTIONS = (qcompiler.compile, qcompiler.explain, qcompiler.export_onnx, qcompiler.tune)


class Tensor:
    """What PyTorch's tensors with a gradient, on a GPU, do."""

    def __init__(self, array: np.ndarray, ready: int = 0) -> None:
        self.array, self.ready = array, ready

    def detach(self) -> Tensor:
        return Tensor(self.array, 1)

    def cpu(self) -> Tensor:
        return Tensor(self.array, self.ready + 1)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.ready < 2:
            raise RuntimeError("can't call numpy() on a tensor that requires grad, or is on a GPU")
        return self.array


def test_every_public_name_is_there() -> None:
    assert set(qcompiler.__all__) == set(qcompiler._LAZY) and set(qcompiler.__all__) <= set(dir(qcompiler))
    for name in qcompiler.__all__:
        assert getattr(qcompiler, name) is not None
        assert (getattr(qcompiler, name).__doc__ or "").strip(), name


@pytest.mark.parametrize("function", WITH_OPTIONS, ids=lambda f: f.__name__)
def test_signatures_and_docstrings_have_every_option(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, option in OPTIONS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY and parameters[name].default == option.default, name
        assert f"\n    {name}: " in (function.__doc__ or ""), name
    assert {o.group for o in OPTIONS.values()} <= set(GROUPS)


def test_the_command_line_offers_what_the_functions_take() -> None:
    flags = {a.dest for a in build_parser()._subparsers._group_actions[0].choices["compile"]._actions}  # type: ignore[union-attr, index]
    of_python = {name for name, option in OPTIONS.items() if not option.metavar and TYPES[name] is not bool}
    assert set(OPTIONS) - flags == of_python and set(ARGUMENTS) <= flags


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": 3}, r"preset is 3, an int; expected str"),
        ({"group_size": 2.5}, "group_size is 2.5, a float; expected int"),
        ({"min_sqnr": "20"}, "min_sqnr is '20', a str; expected float"),
        ({"requantize": "yes"}, "requantize is 'yes', a str; expected bool"),
        ({"keep_float": [1]}, r"keep_float is \[1\], a list; expected str | Sequence"),
        ({"progress": 1}, "progress is 1, an int; expected Callable"),
        ({"keepfloat": "a"}, "no keyword argument 'keepfloat'. Did you mean 'keep_float'"),
    ],
)
def test_a_wrong_option_is_a_type_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=rf"compile\(\).*{said}"):
        complete(options)
    with pytest.raises(TypeError, match=said):
        qcompiler.compile("no such file", **options)


LIBRARY_CALLS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "target": (lambda so: qcompiler.compile(MODEL, 5), TypeError, r"compile\(\): target is 5, an int; expected str \| Target"),  # type: ignore[arg-type]
    "state": (lambda so: qcompiler.compile(MODEL, state={1: 2}), TypeError, r"state is \{1: 2\}, a dict; expected Mapping\[str, str\]"),  # type: ignore[dict-item]
    "shape": (lambda so: qcompiler.compile(MODEL, input_shapes={"image": "abc"}), TypeError, "input_shapes is .*expected Mapping"),
    "positional": (lambda so: qcompiler.compile(MODEL, "native", None, 5), TypeError, r"compile\(\): too many positional arguments"),  # type: ignore[call-arg]
    "value": (lambda so: qcompiler.compile(MODEL, input_values={"image": object()}), qcompiler.ModelError, "its value can't be"),
    "export": (lambda so: qcompiler.export_onnx(MODEL, 5), TypeError, r"export_onnx\(\): output is 5"),  # type: ignore[arg-type]
    "explain": (lambda so: qcompiler.explain(MODEL, sensitivity="x"), TypeError, "sensitivity is 'x', a str; expected bool"),  # type: ignore[arg-type]
    "calibrate": (lambda so: qcompiler.calibrate(MODEL, "a.qcal", None), TypeError, "calibration is None"),  # type: ignore[arg-type]
    "tune": (lambda so: qcompiler.tune(MODEL, log="l", trials="x"), TypeError, r"tune\(\): trials is 'x', a str; expected int"),  # type: ignore[arg-type]
    "tune without a log": (lambda so: qcompiler.tune(MODEL), TypeError, r"tune\(\): missing a required argument: 'log'"),  # type: ignore[call-arg]
    "targets": (lambda so: qcompiler.targets(5), TypeError, "targets_file is 5"),  # type: ignore[arg-type]
    "load": (lambda so: qcompiler.load(5), TypeError, r"Session\(\): path is 5"),  # type: ignore[arg-type]
    "pool": (lambda so: qcompiler.SessionPool(so, pin=5), TypeError, "pin is 5, an int; expected bool"),  # type: ignore[arg-type]
    "trace": (lambda so: qcompiler.load(so).trace({}, 5), TypeError, r"trace\(\): visit is 5"),  # type: ignore[arg-type]
    "profile": (lambda so: qcompiler.load(so).profile({}, 0), qcompiler.DataError, "iterations is 0"),
    "preprocess": (lambda so: Preprocess(scale="x"), qcompiler.DataError, "scale is 'x'; expected a number"),  # type: ignore[arg-type]
    "thresholds": (lambda so: qcompiler.Thresholds(min_sqnr="x"), TypeError, "min_sqnr is 'x', a str; expected float"),  # type: ignore[arg-type]
    "min_sqnr": (lambda so: _verify(so, min_sqnr="x"), TypeError, r"verify\(\): min_sqnr is 'x', a str; expected float \| None"),
    "expect_digest": (lambda so: _verify(so, expect_digest=5), TypeError, "expect_digest is 5, an int; expected str"),
    "metric": (lambda so: _verify(so, metric=5), TypeError, r"metric is 5, an int; expected str \| Callable\[\["),
    "layer_samples": (lambda so: _verify(so, layer_samples="x"), TypeError, "layer_samples is 'x', a str; expected int"),
    "fewer than none": (lambda so: _verify(so, layer_samples=-1), qcompiler.DataError, "layer_samples is -1; 0 or more"),
    "nan": (lambda so: _verify(so, min_sqnr=float("nan")), qcompiler.DataError, "min_sqnr is nan; a finite number of dB is needed"),
    "agreement": (lambda so: _verify(so, min_agreement=95), qcompiler.DataError, "min_agreement is 95; a fraction from 0 to 1 is needed"),
    "library": (lambda so: qcompiler.verify(5, MODEL, []), TypeError, "library is 5, an int; expected str"),  # type: ignore[arg-type]
}


def _verify(library: Path, **options: Any) -> object:
    return qcompiler.verify(library, MODEL, demo_data()[1][:2], **options)


@pytest.mark.parametrize("call", LIBRARY_CALLS)
def test_what_is_no_argument_is_said_in_one_sentence(call: str, digits: Callable[[str], Path]) -> None:
    function, error, said = LIBRARY_CALLS[call]
    with pytest.raises(error, match=said):
        function(digits("native"))


def test_every_public_function_checks_what_it_is_given() -> None:
    """A hint that can't be resolved would be an argument that is not checked."""
    for name in ("calibrate", "compile", "explain", "export_onnx", "targets", "tune", "verify"):
        inner = inspect.unwrap(getattr(qcompiler, name))
        assert inner is not getattr(qcompiler, name) and set(inspect.signature(inner).parameters) <= set(typing.get_type_hints(inner)), name


@pytest.mark.parametrize("budget", [-1.0, 0.0, float("nan")])
def test_a_time_budget_is_a_time(budget: float) -> None:
    with pytest.raises(qcompiler.DataError, match="time_budget is .* a finite number of seconds above 0"):
        qcompiler.compile(MODEL, calibration=demo_data()[0][:8], min_sqnr=10.0, time_budget=budget)


def test_what_a_progress_callback_raises_is_the_callers_own() -> None:
    def stop(stage: str, done: int, total: int | None) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="^enough$"):
        qcompiler.compile(MODEL, calibration=demo_data()[0][:8], preset="fast", progress=stop)


def test_options_are_completed() -> None:
    whole = complete({"keep_float": "conv1", "min_sqnr": 20, "preset": None, "labels": np.arange(3)})
    assert whole["keep_float"] == ["conv1"] and whole["enable"] == [] and whole["preset"] == "default" and set(whole) == set(OPTIONS)
    assert given(whole) == ["keep_float", "min_sqnr", "labels"]
    assert complete(whole) == whole and given(complete({})) == []


def test_preprocessing_by_value(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((16, 16), 100, np.uint8)).save(tmp_path / "a.png")
    for settings in ({"color": "GRAY", "scale": "1/200"}, Preprocess(color="GRAY", scale=1 / 200)):
        (sample,) = open_samples(tmp_path, [_info()], settings)
        np.testing.assert_allclose(sample["image"], 0.5, rtol=1e-6)
    with pytest.raises(qcompiler.DataError, match="preprocess: unknown key 'colour'. Did you mean 'color'"):
        open_samples(tmp_path, [_info()], {"colour": "GRAY"})


def _info() -> Any:
    from qcompiler.base.tensor import TensorInfo

    return TensorInfo("image", (1, 1, 16, 16), "float32")


def test_tensors_go_where_arrays_go(digits: Callable[[str], Path]) -> None:
    array = demo_data()[0][0]["image"]
    (sample,) = open_samples([{"image": Tensor(array)}], [_info()])
    np.testing.assert_array_equal(sample["image"], array)
    np.testing.assert_array_equal(class_indices(Tensor(np.arange(4))), np.arange(4))
    session = qcompiler.load(digits("native"))
    np.testing.assert_array_equal(session.run({"image": Tensor(array)})["logits"], session.run({"image": array})["logits"])  # type: ignore[dict-item]


def test_a_session_says_what_it_is_and_refuses_what_it_cannot(digits: Callable[[str], Path]) -> None:
    session = qcompiler.load(digits("native"))
    assert repr(session).startswith(f"<Session {session.path}: int8 for ") and "1 thread; image float32[1, 1, 16, 16] -> logits float32" in repr(session)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            copied(session)
    for threads in ("2", 1.0, True):
        with pytest.raises(TypeError, match="threads is .*expected int"):
            qcompiler.load(session.path, threads=threads)  # type: ignore[arg-type]


def test_an_artifact_is_verified_and_a_targets_file_is_a_value(tmp_path: Path) -> None:
    from qcompiler.base.targets import default_file

    own = tmp_path / "own.yaml"
    own.write_text(default_file().read_text().replace("  x86-avx2:", "  mine:"))
    seen: list[tuple[str, int, int | None]] = []
    calibration, evaluation, _ = demo_data()
    artifact = qcompiler.compile(
        MODEL, "mine", calibration[:8], preset="fast", keep_float="relu4", targets_file=str(own), progress=lambda *step: seen.append(step)
    )
    assert artifact.manifest["target"] == "mine" and any(entry["reason"].startswith("kept in float32 as asked") for entry in artifact.manifest["float_ops"])
    assert ("calibrate", 8, 8) in seen
    assert "mine" in qcompiler.targets(own) and "mine" not in load_targets()
    assert qcompiler.verify(artifact, MODEL, evaluation[:8], min_sqnr=15).passed
