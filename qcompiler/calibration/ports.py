"""Inputs and outputs in the types that their user has, instead of the network's float32: pixels, and integers with a scale.

What is asked for is checked here; a library's manifest says the same of itself (`ports`), so that whoever compares it with its float network can feed both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError, closest
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import Preprocessing, Sample, Samples, at_most, describe
from qcompiler.calibration.preprocess import Preprocess, load_preprocess
from qcompiler.calibration.resize import Resize, parse_size, spelled
from qcompiler.calibration.shaped import ShapedSamples
from qcompiler.calibration.stored import file_behind, open_source, stored
from qcompiler.numerics.operators import dequantize, quantize
from qcompiler.runtime.shapes import Fitting, of_inputs, specializations
from qcompiler.runtime.shapes import ports as shapes_of

INPUT_TYPES, OUTPUT_TYPES = ("uint8", "int8"), ("int8", "uint8")
_FOLDED = ("color", "scale", "mean", "std", "layout")  # keys of a preprocessing file that such a library carries out itself
_RESIZED = ("resize", "crop", "interpolation")  # and those that it carries out on pixels of one size


@dataclass(frozen=True)
class PixelInput:
    """An input of uint8 pixels [N, H, W, channels], R, G, B or grey, as decoders give them. model: the float network's input. source: (height, width) of the
    pixels where the library resizes and crops them itself."""

    model: TensorInfo
    preprocess: Preprocess
    source: tuple[int, int] | None = None

    @cached_property
    def resize(self) -> Resize | None:
        return None if self.source is None else Resize(self.preprocess, self.source)

    @property
    def folded(self) -> tuple[str, ...]:
        """The keys of a preprocessing file that the library carries out itself."""
        return _FOLDED + (_RESIZED if self.source else ())

    @property
    def given(self) -> TensorInfo:
        n, h, w, _ = (self.model.shape[i] for i in self.axes_back)
        return TensorInfo(self.model.name, (n, *(self.source or (h, w)), len(self.preprocess.channels)), "uint8")

    @property
    def axes(self) -> tuple[int, ...]:
        """From [N, H, W, C] to the network's layout."""
        return (0, 3, 1, 2) if self.preprocess.layout == "NCHW" else (0, 1, 2, 3)

    @property
    def axes_back(self) -> tuple[int, ...]:
        return tuple(self.axes.index(i) for i in range(4))

    @property
    def values(self) -> np.ndarray:
        """float32 [C, 256]: what the float network reads for each pixel value."""
        every = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, len(self.preprocess.channels)))
        return np.ascontiguousarray(self.preprocess.normalized(every).T)

    def real(self, array: np.ndarray) -> np.ndarray:
        """The float network's input of the same pixels."""
        return self.preprocess.laid_out(self.preprocess.normalized(self.resize(array) if self.resize else array))

    def stored(self, array: np.ndarray) -> np.ndarray:
        """The pixels that the float network's input comes from, or nearest to; where they are resized, some that look like it."""
        planes, values = array.transpose(self.axes_back), self.values
        pixels = np.empty(planes.shape, np.uint8)
        for place, channel in enumerate(self.preprocess.channels):
            order = np.argsort(values[place], kind="stable")
            pixels[..., channel] = np.rint(np.interp(planes[..., place], values[place][order], order))
        return self.resize.back(pixels) if self.resize else pixels

    def account(self) -> dict[str, Any]:
        """What the manifest says of it."""
        settings = {k: v for k, v in dataclasses.asdict(self.preprocess).items() if k in self.folded}
        said = {"shape": list(self.model.shape), "preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
        return said | ({"source": list(self.source)} if self.source else {})


@dataclass(frozen=True)
class IntegerInput:
    """An input of int8 numbers q that stand for `scale * (q - zero_point)`. model: the float network's input."""

    model: TensorInfo
    scale: float
    zero_point: int

    def real(self, array: np.ndarray) -> np.ndarray:
        """The float network's input that the integers stand for."""
        return dequantize(array, scale=self.scale, zero_point=self.zero_point)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """The integers of a float input."""
        return quantize(array, scale=self.scale, zero_point=self.zero_point)


@dataclass(frozen=True)
class Ports:
    """What a compilation is asked for: inputs of pixels, inputs of int8, and the types of outputs, by name."""

    pixels: Mapping[str, PixelInput] = field(default_factory=dict)
    integers: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pixels or self.integers or self.outputs)

    def at(self, inputs: Sequence[TensorInfo]) -> Ports:
        """The same for the network at another shape."""
        return dataclasses.replace(self, pixels={i.name: dataclasses.replace(self.pixels[i.name], model=i) for i in inputs if i.name in self.pixels})

    def given(self, inputs: Sequence[TensorInfo]) -> list[TensorInfo]:
        """The float network's inputs as data holds them: pixels for inputs of pixels, and float32 for all others."""
        pixels = self.at(inputs).pixels
        return [pixels[i.name].given if i.name in pixels else i for i in inputs]

    def fitting(self, real: Fitting) -> Fitting:
        """`real`, which chooses among the shapes of the float network, for data."""
        first, *others = ({**m, "inputs": [vars(i) for i in self.given(shapes_of(m["inputs"]))]} for m in real.all)
        return Fitting({**first, "shapes": others, "padding": real.rules})

    def real(self, sample: Sample) -> Sample:
        """A sample with pixels as the float network takes it."""
        return {name: self.pixels[name].real(array) if name in self.pixels else array for name, array in sample.items()}


NO_PORTS = Ports()


def asked(
    input_types: Mapping[str, str],
    output_types: Mapping[str, str],
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    preprocess: Preprocessing,
    state: Mapping[str, str] = {},
    resize_inside: Any = None,
) -> Ports:
    """The ports that {name: type} ask for. state: inputs and the outputs that sessions keep for them. resize_inside: "480x640" where the library resizes pixels
    of that height and width itself. Raises DataError for an unknown name or type, what is not float32, a state, and pixels without preprocessing."""
    for kind, types, infos, allowed in (("input", input_types, inputs, INPUT_TYPES), ("output", output_types, outputs, OUTPUT_TYPES)):
        known = {i.name: i for i in infos}
        for name, dtype in types.items():
            if name not in known:
                raise DataError(f"type {dtype} for {kind} '{name}': there is no such {kind}.{closest(name, list(known))} The model has: {describe(infos)}")
            if dtype not in allowed:
                raise DataError(f"{kind} '{name}': type '{dtype}' is not supported; supported: {', '.join(allowed)}; without the option it is float32")
            if name in {*state.keys(), *state.values()}:
                raise DataError(f"{kind} '{name}' is a state, which stays inside of sessions, in float32; leave its type out")
            if known[name].dtype != "float32":
                raise DataError(f"{kind} '{name}' is {known[name].dtype} in the model and stays so; a type can be chosen for float32 only")
    settings = None if preprocess is None else load_preprocess(preprocess)
    source = None if resize_inside is None else parse_size(resize_inside)
    pixels = {i.name: _pixels(i, settings, source) for i in inputs if input_types.get(i.name) == "uint8"}
    if source is not None and not pixels:
        raise DataError("resize_inside is about pixels: it goes with an input type of uint8 (--input-type NAME=uint8)")
    return Ports(pixels, tuple(i.name for i in inputs if input_types.get(i.name) == "int8"), dict(output_types))


def _pixels(info: TensorInfo, settings: Preprocess | None, source: tuple[int, int] | None) -> PixelInput:
    if settings is None:
        raise DataError(
            f"input '{info.name}' can't take uint8 pixels without preprocessing: give scale, mean, std, color and layout in a file (--preprocess FILE.yaml)"
        )
    port = PixelInput(info, settings if source else dataclasses.replace(settings, resize=None, crop=None), source)
    if len(info.shape) != 4 or info.shape[port.axes.index(3)] != len(settings.channels):
        form = "[N, C, H, W]" if settings.layout == "NCHW" else "[N, H, W, C]"
        raise DataError(
            f"input '{info.name}' is {list(info.shape)}; with color {settings.color} and layout {settings.layout} of the preprocessing file, "
            f"uint8 pixels serve an input {form} with C = {len(settings.channels)}"
        )
    wanted = tuple(info.shape[i] for i in port.axes_back)[1:3]
    if port.resize is not None and port.resize.size != wanted:
        raise DataError(
            f"input '{info.name}': resize and crop of the preprocessing file make {spelled(port.resize.size)} of pixels of {spelled(port.resize.source)} "
            f"(resize_inside), and the network takes {spelled(wanted)}; check resize and crop"
        )
    if not np.isfinite(port.values).all():
        raise DataError(f"input '{info.name}': preprocessing makes NaN or Inf of a pixel; check scale, mean and std")
    return port


# -- samples --------------------------------------------------------------------------------------------------------------------------------


class MappedSamples:
    """Samples of a source, each put into another form."""

    def __init__(self, source: Samples, form: Callable[[Sample], Sample]) -> None:
        self._source, self._form = source, form
        self.names, self.count = source.names, source.count
        self.left_out, self.chosen = getattr(source, "left_out", 0), getattr(source, "chosen", None)

    def __iter__(self) -> Iterator[Sample]:
        return map(self._form, self._source)


def mapped(source: Samples, form: Callable[[Sample], Sample]) -> Samples:
    """Samples of a source, each put into another form."""
    return source.mapped(form) if isinstance(source, ShapedSamples) else MappedSamples(source, form)


def open_real(
    source: Any,
    inputs: Sequence[TensorInfo],
    ports: Ports,
    preprocess: Preprocessing,
    count: int | None = None,
    model: str | None = None,
    fitting: Fitting | None = None,
) -> Samples:
    """The samples of `source`, at most `count` of them, as the float network takes them. Arrays hold pixels for inputs of pixels, and float32 for all others;
    see `open_source`. model: the digest of the model. fitting: of a network at several shapes."""
    if not ports.pixels or isinstance(source, (MappedSamples, ShapedSamples)) or _images(source) or stored(source):
        return at_most(_of_model(open_source(source, inputs, None if ports.pixels and stored(source) else preprocess, fitting), model), count)
    data = open_source(source, ports.given(inputs), None, None if fitting is None else ports.fitting(fitting))
    return mapped(at_most(data, count), ports.real)


def open_given(source: Any, library: Any, preprocess: Preprocessing, count: int | None = None) -> Samples:
    """The samples of `source`, at most `count` of them, as `library` (a session) takes them. Arrays hold pixels for inputs of pixels; for inputs of int8 they
    hold the model's float32 numbers. Raises DataError for a preprocessing file that says other than what the library has in itself."""
    ports = library_inputs(library.manifest)
    pixels = [p for p in ports.values() if isinstance(p, PixelInput)]
    settings = None if preprocess is None else load_preprocess(preprocess)
    every = specializations(library.manifest)
    fitting = Fitting(library.manifest) if len(every) > 1 else None
    if not ports or isinstance(source, (MappedSamples, ShapedSamples)):
        return at_most(_of_library(open_source(source, library.inputs, settings, fitting), every), count)
    if settings is not None:
        for port in pixels:
            _check_folded(port, settings)
    images = _images(source)
    infos = [i if (p := ports.get(i.name)) is None else p.given if isinstance(p, PixelInput) else p.model for i in library.inputs]
    if stored(source):
        if pixels:
            raise DataError(f"{source}: a stored calibration holds float32 numbers, and the library takes pixels; give images, or arrays of pixels")
        samples = at_most(_of_library(open_source(source, infos, None, fitting), every), count)
    else:
        if images and settings is not None and any(p.source for p in pixels):
            settings = dataclasses.replace(settings, resize=None, crop=None)  # pictures are of the size that the library takes
        samples = at_most(open_source(source, infos, settings if images or not pixels else None, fitting, bool(pixels)), count)
    integers = {n: p for n, p in ports.items() if isinstance(p, IntegerInput)}
    return mapped(samples, lambda s: {n: integers[n].stored(a) if n in integers else a for n, a in s.items()}) if integers else samples


def _of_library(samples: Samples, every: Sequence[Mapping[str, Any]]) -> Samples:
    """The samples, which a stored calibration must have of the model of one of these manifests."""
    file = file_behind(samples)
    at = next((m for m in every if file and of_inputs(m) == {i.name: tuple(i.shape) for i in file.inputs}), every[0])
    return _of_model(samples, at.get("digests", {}).get("model"))


def _of_model(samples: Samples, digest: str | None) -> Samples:
    """The samples, which a stored calibration must have of the model with this digest."""
    if file := file_behind(samples):
        file.check_model(digest)
    return samples


def image_of(manifest: Mapping[str, Any], settings: Preprocess, path: Path) -> np.ndarray:
    """An image file as the only input of a library takes it. Raises DataError as `open_given`, and as `Preprocess` for a file that is no image."""
    port = next(iter(library_inputs(manifest).values()), None)
    if isinstance(port, PixelInput):
        _check_folded(port, settings)
        if port.source is None:
            return settings.pixels(path)[None]
        found = dataclasses.replace(settings, resize=None, crop=None).pixels(path)[None]
        if found.shape[1:3] != port.source:
            raise DataError(f"{path}: has {spelled(found.shape[1:3])} pixels; the library resizes such of {spelled(port.source)} itself, and takes no others")
        return found
    return settings(path) if port is None else port.stored(settings(path))


def _check_folded(port: PixelInput, settings: Preprocess) -> None:
    if wrong := [k for k in port.folded if getattr(settings, k) != getattr(port.preprocess, k)]:
        said = ", ".join(f"{k} {getattr(settings, k)}, the library has {getattr(port.preprocess, k)}" for k in wrong)
        raise DataError(f"the preprocessing file is not the one that the library was compiled with: {said}")


def _images(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and Path(source).is_dir() and not any(Path(source).glob("*.npz"))


# -- libraries ------------------------------------------------------------------------------------------------------------------------------


def library_inputs(manifest: Mapping[str, Any]) -> dict[str, PixelInput | IntegerInput]:
    """The inputs of a library whose types are not the float network's, by name."""
    found: dict[str, PixelInput | IntegerInput] = {}
    for port in manifest["inputs"] if "ports" in manifest else ():
        said = manifest["ports"]["inputs"].get(port["name"])
        if said is None:
            continue
        model = TensorInfo(port["name"], tuple(said["shape"]), "float32")
        if "preprocess" in said:
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said["preprocess"].items()}
            found[port["name"]] = PixelInput(model, Preprocess(**settings), tuple(said["source"]) if "source" in said else None)
        else:
            found[port["name"]] = IntegerInput(model, port["scale"], port["zero_point"])
    return found


def real_inputs(manifest: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A library's inputs as its float network takes them."""
    ports = library_inputs(manifest)
    return {name: ports[name].real(array) if name in ports else array for name, array in inputs.items()}


def stored_inputs(manifest: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A float network's inputs as its library takes them."""
    ports = library_inputs(manifest)
    return {name: ports[name].stored(array) if name in ports else array for name, array in inputs.items()}


def real_outputs(manifest: Mapping[str, Any], outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A library's outputs as the float numbers that they stand for."""
    integers = {p["name"]: p for p in manifest["outputs"] if p["name"] in manifest["ports"]["outputs"]} if "ports" in manifest else {}
    return {
        name: array if name not in integers else dequantize(array, scale=integers[name]["scale"], zero_point=integers[name]["zero_point"])
        for name, array in outputs.items()
    }


@dataclass(frozen=True)
class OnReals:
    """A session of a library, fed and read in the float numbers that its network knows. manifest: of the shape that it runs at."""

    session: Any
    manifest: Mapping[str, Any]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return real_outputs(self.manifest, self.session.run(stored_inputs(self.manifest, inputs)))
