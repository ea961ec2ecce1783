"""From an image file to a model's input: resize, centre crop, colour order, normalization, layout.

Settings come from a small YAML file; the keys are the fields of `Preprocess`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qcompiler.base.errors import DataError, closest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_CHOICES = {"interpolation": ("nearest", "bilinear", "bicubic"), "color": ("RGB", "BGR", "GRAY"), "layout": ("NCHW", "NHWC")}


@dataclass(frozen=True)
class Preprocess:
    """`y = (x * scale - mean) / std` per channel, x the pixel value 0..255 after resizing and cropping, channels in the order of `color`.

    `resize`: an int scales the image so that its short side has this many pixels; (height, width) scales to exactly that; None keeps the
    size.
    `crop`: the centre square (or height, width) to cut out afterwards; None keeps everything.
    `mean`, `std`: one number, or one per channel. `layout`: of the result, which has a batch axis of 1 and dtype float32.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    color: str = "RGB"
    scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise DataError(f"preprocessing: {key} is {getattr(self, key)!r}; supported: {', '.join(allowed)}")
        for key in ("resize", "crop"):
            value = getattr(self, key)
            sides = value if isinstance(value, tuple) else (value,)
            if value is not None and (len(sides) > 2 or not all(type(s) is int and s > 0 for s in sides)):
                raise DataError(f"preprocessing: {key} is {value!r}; expected a positive number of pixels, or [height, width]")
        channels = 1 if self.color == "GRAY" else 3
        for key in ("mean", "std"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != channels:
                raise DataError(f"preprocessing: {key} has {len(value)} values; expected one, or {channels} for color {self.color}")
        if not np.all(self.std):
            raise DataError("preprocessing: std is 0; it divides")

    def __call__(self, path: Path) -> np.ndarray:
        """The image file as float32 [1, C, H, W] (or [1, H, W, C]). Raises DataError for a file that is no image, or smaller than the
        crop."""
        try:
            from PIL import Image
        except ImportError as error:
            raise DataError("reading images needs Pillow: pip install 'qcompiler[images]'") from error
        try:
            with Image.open(path) as opened:
                image = opened.convert("L" if self.color == "GRAY" else "RGB")
        except OSError as error:
            raise DataError(f"{path}: can't be read as an image: {error}") from error
        filters = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        if self.resize is not None:
            image = image.resize(self._size(*image.size), filters[self.interpolation])
        if self.crop is not None:
            height, width = self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            if left < 0 or top < 0:
                raise DataError(f"{path}: {image.width} x {image.height} pixels after resizing, smaller than the crop {width} x {height}")
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        values = (pixels * np.float32(self.scale) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1) if self.layout == "NCHW" else values)[None]

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize to. The long side is truncated to whole pixels, as torchvision's Resize does."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        short = min(width, height)
        return int(self.resize * width / short), int(self.resize * height / short)


def load_preprocess(path: str | Path) -> Preprocess:
    """Settings from a YAML file. `scale` may be a fraction ("1/255"). Raises DataError for an unknown key, with the nearest ones."""
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: preprocessing file can't be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    keys = [f.name for f in dataclasses.fields(Preprocess)]
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a mapping with keys out of {', '.join(keys)}")
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in keys:
            raise DataError(f"{path}: unknown key '{key}'.{closest(str(key), keys)} Known: {', '.join(keys)}")
        convert = partial(_number, path, key) if key in ("scale", "mean", "std") else _same
        values[key] = tuple(convert(v) for v in value) if isinstance(value, list) and key != "scale" else convert(value)
    try:
        return Preprocess(**values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _same(value: Any) -> Any:
    return value


def _number(path: Path, key: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise DataError(f"{path}: {key} is {value!r}; expected a number or a fraction such as 1/255") from None
    if not np.isfinite(number):
        raise DataError(f"{path}: {key} is {value!r}; expected a finite number")
    return number
