"""The options of a compilation, each stated once: type, default, meaning. Signatures, their help texts and the command line are made from this table.

To add one: a line in `Options`, and whoever reads it. It then is a keyword argument of `compile` and its kin, and an option of the verbs that take its group.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar

import numpy as np

from qcompiler.base.arguments import check, checks_arguments, spelled
from qcompiler.base.errors import closest
from qcompiler.base.progress import Callers, Progress
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.plan.recipes import PRESETS, STEPS

F = TypeVar("F", bound=Callable[..., Any])
AnyPath = str | os.PathLike[str]

DATA_HELP = (
    "an .npz (one array per input name, first axis = samples), an .npy for a model with one input, a folder of such .npz, or one of images together with "
    "preprocess"
)
PREPROCESS_HELP = (
    "resize (short side, or [height, width]), crop, interpolation (nearest, bilinear, bicubic), color (RGB, BGR, GRAY), scale, mean, std: "
    "y = (x * scale - mean) / std with x in 0..255, layout (NCHW, NHWC), background (pixel value behind transparent pixels, default 255)"
)
GROUPS = {
    "network": ("network and data", ""),
    "ports": ("inputs and outputs", "Of the library, which are float32 otherwise. Nothing inside the network changes."),
    "recipe": ("quantization", ""),
    "goal": (
        "accuracy target",
        "Keep those layers in float that reach the target at the least measured time. Every fourth calibration sample (of 8 or more) is held out to judge. "
        "When the target is missed, the most accurate library found is made, the manifest says so, and the command's exit status is 1.",
    ),
    "weights": (
        "weights alone",
        "For networks whose time goes into reading the weights of matrix products: activations stay float32, weights become float32 again in registers. "
        "No calibration data is needed. Of the other options keep_float, input_shapes, shapes, input_values, outputs, state, dump_dir, targets_file and "
        "progress go with it.",
    ),
    "kernels": ("code", ""),
    "work": ("work under way", ""),
}
"""Groups of options, in order: a title, and what they share."""


@dataclass(frozen=True)
class Option:
    """What is to know of an option beside its type. help: for people, in both spellings. group: of `GROUPS`. metavar: what the command line calls its value;
    empty for one that only Python has. flag: its name there, where it is not the option's own with dashes."""

    help: str
    group: str
    metavar: str = ""
    default: Any = None
    flag: str = ""
    choices: tuple[str, ...] = ()


class Options(TypedDict, total=False):
    """Keyword arguments of `compile`, `explain`, `export_onnx` and `tune`."""

    input_shapes: Annotated[
        Mapping[str, Sequence[int] | Sequence[Sequence[int]]] | Sequence[Mapping[str, Sequence[int]]] | None,
        Option(
            "shapes of inputs, by name, for models with symbolic dimensions (a symbolic batch is 1). Several, NAME=1,{16,32,64}, make one library that runs at "
            "each of them; they vary together. In Python {name: [(1, 16), (1, 32)]}, or a list of {name: shape}",
            "network",
            "NAME=1,3,224,224",
            flag="--input-shape",
        ),
    ]
    shapes: Annotated[AnyPath | None, Option("several shapes as a table: a list of {input: [1, 16], ...}, a row for each", "network", "FILE.yaml")]
    pad: Annotated[
        Mapping[str, Any] | None,
        Option(
            "of a library for several shapes: how an input of a length in between is padded to the next one, with a number (ids=0, mask=0) or by repeating its "
            "last row (repeat). Every input that varies needs a rule; outputs are cut back, and what belongs to the input never changes",
            "network",
            "NAME=VALUE",
            flag="--pad",
        ),
    ]
    input_values: Annotated[
        Mapping[str, Any] | None,
        Option(
            "inputs that are the same in every call and become constants (sr=16000): a number for all elements, or all of them (an array, or text 1,2,3)",
            "network",
            "NAME=VALUE",
            flag="--input-value",
        ),
    ]
    outputs: Annotated[
        str | Sequence[str],
        Option(
            "cut the network at these values (names of tensors in the model file), which are its outputs then. What stands behind them, such as a "
            "non-maximum suppression, runs outside",
            "network",
            "NAME",
            default=(),
        ),
    ]
    example_inputs: Annotated[
        Any,
        Option(
            "of a `torch.nn.Module`: the arguments of a call, at whose shapes torch.export exports it: a tensor, a tuple of them, or a mapping of keyword "
            "arguments",
            "network",
        ),
    ]
    state: Annotated[
        Mapping[str, str] | None,
        Option(
            "inputs whose next value is an output of this call (h=hn): sessions keep them, zeros at first, and a call takes and gives what is left. "
            "Calibration data are consecutive frames (each .npz of a folder is a stream), or hold the states like any other input",
            "network",
            "INPUT=OUTPUT",
        ),
    ]
    preprocess: Annotated[
        AnyPath | Mapping[str, Any] | Preprocess | None,
        Option(f"how images become inputs: a YAML file, or in Python a mapping, with the keys {PREPROCESS_HELP}", "network", "FILE.yaml"),
    ]
    max_samples: Annotated[
        int | None,
        Option("use at most so many calibration samples: evenly spread ones of a folder of images, of arrays the first", "network", "N", flag="--samples"),
    ]
    input_types: Annotated[
        Mapping[str, str] | None,
        Option(
            "types of inputs, by name. uint8: pixels [N, H, W, channels] (R, G, B, or grey), on which the library carries out color, scale, mean, std and "
            "layout of the preprocessing itself; int8: integers with the scale and zero point that the manifest states",
            "ports",
            "NAME=TYPE",
            flag="--input-type",
        ),
    ]
    resize_inside: Annotated[
        str | Sequence[int] | None,
        Option(
            "the library carries out resize and crop of the preprocessing too (bilinear or bicubic, antialiased as Pillow does), on pixels of this "
            "height and width: 480x640. It goes with an input type of uint8. In Python (480, 640) will do",
            "ports",
            "HxW",
        ),
    ]
    output_types: Annotated[
        Mapping[str, str] | None,
        Option(
            "types of outputs, by name: int8 or uint8, integers with the scale and zero point that the manifest states",
            "ports",
            "NAME=TYPE",
            flag="--output-type",
        ),
    ]
    preset: Annotated[
        str,
        Option(
            "how much to spend on choosing the quantization: fast compiles soonest, accurate loses least",
            "recipe",
            "PRESET",
            default="default",
            choices=tuple(PRESETS),
        ),
    ]
    enable: Annotated[
        str | Sequence[str],
        Option(
            f"steps to take that the preset leaves out. {'; '.join(f'{name}: {what}' for name, what in STEPS.items())}",
            "recipe",
            "STEP",
            default=(),
        ),
    ]
    disable: Annotated[str | Sequence[str], Option("steps of the preset to leave out", "recipe", "STEP", default=())]
    keep_float: Annotated[
        str | Sequence[str],
        Option(
            "layers that are not quantized: by the name of their node or their output in the model file, by a pattern of names (/encoder/*), "
            "or by the type of their operator (op:Softmax)",
            "recipe",
            "LAYER",
            default=(),
        ),
    ]
    keep_16: Annotated[
        str | Sequence[str],
        Option(
            "layers that compute in 16 bits: convolutions and dense layers read what they read in two halves, which takes a second product; sums, products and "
            "means write 16 bits. By the names, patterns and types that keep_float takes",
            "recipe",
            "LAYER",
            default=(),
        ),
    ]
    requantize: Annotated[
        bool,
        Option("of a model that is quantized already, quantize also what its file leaves in float or in 16 bits", "recipe", "", default=False),
    ]
    min_sqnr: Annotated[float | None, Option("dB: signal-to-quantization-noise ratio that every output reaches, with 95 % confidence", "goal", "DB")]
    min_agreement: Annotated[float | None, Option("fraction of samples (0 to 1) that get the float model's top-1 class", "goal", "FRACTION")]
    max_accuracy_drop: Annotated[float | None, Option("percentage points of top-1 accuracy that may be lost; needs labels", "goal", "POINTS")]
    max_metric_drop: Annotated[float | None, Option("of the metric, below that of the float network, in its own unit; needs metric", "goal", "X")]
    metric: Annotated[
        str | Callable[[dict[str, np.ndarray], Any], float] | None,
        Option(
            "a measure of quality, the higher the better: top5, f1, miou or map (extra metrics), or FILE.py:FUNCTION, in Python a function, of "
            "({output: array, all samples}, labels)",
            "goal",
            "FILE.py:FUNCTION",
        ),
    ]
    labels: Annotated[
        AnyPath | Iterable[Any] | None,
        Option(
            "of the calibration data. For images: a table with the columns file and class_index; for arrays: an .npy of class indices (or, in Python, these). "
            "For a metric whatever it takes: an .npy of any shape, JSON, or in Python any object",
            "goal",
            "TSV",
        ),
    ]
    time_budget: Annotated[
        float | None, Option("for the whole compilation, in seconds (the command line takes 90s, 20m, 1.5h); 10 minutes if not given", "goal", "TIME")
    ]
    weights: Annotated[str | None, Option("store the weights of Gemm and MatMul as int8 or int4", "weights", "TYPE")]
    group_size: Annotated[int | None, Option("weights of a row that share a scale: a multiple of 8; 64 if not given", "weights", "N")]
    asymmetric: Annotated[bool, Option("a zero point beside each scale", "weights", "", default=False)]
    tuning_log: Annotated[AnyPath | None, Option("use the tuned kernels recorded in this folder", "kernels", "DIR")]
    core: Annotated[
        str | None,
        Option("the type of core that tuning records are of, such as cortex-a72; records of other cores are only points to start from", "kernels", "CORE"),
    ]
    selftest: Annotated[
        int | None,
        Option("test vectors to put into the library, 1 to 64: with a few hundred bytes it can find out that a machine computes wrongly", "kernels", "N"),
    ]
    targets_file: Annotated[AnyPath | None, Option("a file like targets.yaml, whose rows are used instead", "kernels", "FILE.yaml")]
    dump_dir: Annotated[AnyPath | None, Option("write what every pass and stage made (modules, ranges, plan) into this folder", "work", "DIR")]
    progress: Annotated[
        Progress | None,
        Option(
            "called as progress(stage, done, total) in the calling thread, often: `done` steps of `total` (None: unknown) of the named stage are finished. "
            "What it raises ends the compilation",
            "work",
        ),
    ]


ARGUMENTS = {
    "model": Option(
        "an ONNX, TFLite or .pt2 file: a float network, or one that is quantized already; in Python also an `onnx.ModelProto`, a "
        "`torch.export.ExportedProgram`, or a `torch.nn.Module` with example_inputs",
        "network",
    ),
    "target": Option("a row of `qcompiler targets`, a triple, a triple+feature, or native for the best of this machine", "network", "T", default="native"),
    "calibration": Option(
        f"typical inputs, 100 are usually enough: {DATA_HELP}; in Python also any iterable of {{input name: array}}. "
        "Or FILE.qcal, which `qcompiler calibrate` stored. Not needed for a model that states its own ranges",
        "network",
        "DATA",
    ),
}
"""The arguments beside the options that the same functions and verbs share."""


def _flagged(name: str, option: Option) -> Option:
    return option if option.flag else dataclasses.replace(option, flag=f"--{name.replace('_', '-')}")


_HINTS = typing.get_type_hints(Options, include_extras=True)
OPTIONS: dict[str, Option] = {name: _flagged(name, typing.get_args(hint)[1]) for name, hint in _HINTS.items()}
TYPES: dict[str, Any] = {name: typing.get_args(hint)[0] for name, hint in _HINTS.items()}
LISTS = frozenset(name for name, option in OPTIONS.items() if option.default == ())


def complete(options: Mapping[str, Any], function: str = "compile") -> Options:
    """All options, those that are not given with their defaults; a single name where several are taken becomes a list of it.

    Raises TypeError for a name that there is not, with the nearest ones, and for a value of another type.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise TypeError(f"{function}() has no keyword argument '{name}'.{closest(name, list(OPTIONS))}")
        if value is not None:
            check(f"{function}()", name, value, TYPES[name])
    found: dict[str, Any] = {name: option.default if options.get(name) is None else options[name] for name, option in OPTIONS.items()}
    for name in LISTS:
        found[name] = [found[name]] if isinstance(found[name], str) else list(found[name])
    if found["progress"] is not None and not isinstance(found["progress"], Callers):
        found["progress"] = Callers(found["progress"])
    return typing.cast(Options, found)


def given(options: Mapping[str, Any]) -> list[str]:
    """The names of the options that differ from their defaults."""
    return [
        name
        for name, value in options.items()
        if value is not None and not (_plain(value) and value == OPTIONS[name].default) and not (name in LISTS and not value)
    ]


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float))


def explained(names: Iterable[str]) -> str:
    """Arguments and options for a docstring, a paragraph each."""
    everything = ARGUMENTS | OPTIONS
    return "\n".join(textwrap.fill(f"{name}: {everything[name].help}.", 118, initial_indent="    ", subsequent_indent="        ") for name in names)


def takes_options(function: F) -> F:
    """For functions that take `**options: Unpack[Options]`: their signature and their docstring show the options one by one, and the other arguments are
    checked against their types (the options are, by `complete`). A decorator."""
    function, signature = checks_arguments(function), inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=spelled(TYPES[n])) for n, o in OPTIONS.items()]
    function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    parts = [explained(p.name for p in own if p.name in ARGUMENTS)]
    for group, (title, what) in GROUPS.items():
        head = textwrap.fill(f"{title[0].upper()}{title[1:]}. {what}".strip(), 118, initial_indent="    ", subsequent_indent="    ")
        parts.append(f"{head}\n\n{explained(n for n, o in OPTIONS.items() if o.group == group)}")
    function.__doc__ = "\n\n".join([inspect.cleandoc(function.__doc__ or ""), "Arguments:", *parts]) + "\n"
    return function
