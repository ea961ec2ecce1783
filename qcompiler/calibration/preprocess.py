"""From an image file to a model's input: resize, centre crop, colour order, normalization, layout.

Settings come from a small YAML file; the keys are the fields of `Preprocess`.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.arguments import fits
from qcompiler.base.errors import DataError, closest
from qcompiler.base.files import open_regular
from qcompiler.base.yaml_file import read_yaml

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
LARGEST_SIDE = 1 << 16
LARGEST_IMAGE = 1 << 27  # pixels
_CHOICES = {"interpolation": ("nearest", "bilinear", "bicubic"), "color": ("RGB", "BGR", "GRAY"), "layout": ("NCHW", "NHWC")}


@dataclass(frozen=True)
class Preprocess:
    """`y = (x * scale - mean) / std` per channel, x the pixel value 0..255 after resizing and cropping, channels in the order of `color`.

    `resize`: an int scales the image so that its short side has this many pixels; (height, width) scales to exactly that; None keeps the
    size.
    `crop`: the centre square (or height, width) to cut out afterwards; None keeps everything.
    `mean`, `std`: one number, or one per channel. `layout`: of the result, which has a batch axis of 1 and dtype float32.
    `background`: the pixel value, one number or one per channel, that shows where an image is transparent; white by default.
    An image is turned upright as its EXIF data say, and 16-bit values are brought to 0..255, before anything else.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    color: str = "RGB"
    scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    layout: str = "NCHW"
    background: float | tuple[float, ...] = 255.0

    def __post_init__(self) -> None:
        for key in ("scale", "mean", "std", "background"):
            value = getattr(self, key)
            if not (fits(value, float) or (key != "scale" and isinstance(value, tuple) and all(fits(v, float) for v in value))):
                raise DataError(f"preprocessing: {key} is {shown(value)}; expected a number{'' if key == 'scale' else ', or a tuple of one per channel'}")
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise DataError(f"preprocessing: {key} is {shown(getattr(self, key))}; supported: {', '.join(allowed)}")
        for key in ("resize", "crop"):
            value = getattr(self, key)
            sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
            if value is not None and not all(type(s) is int and 0 < s <= LARGEST_SIDE for s in sides):
                raise DataError(f"preprocessing: {key} is {shown(value)}; expected a number of pixels from 1 to {LARGEST_SIDE}, or [height, width]")
        channels = 1 if self.color == "GRAY" else 3
        for key in ("mean", "std", "background"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != channels:
                raise DataError(f"preprocessing: {key} has {len(value)} values; expected one, or {channels} for color {self.color}")
        with np.errstate(over="ignore", under="ignore"):
            if not np.all(np.asarray(self.std, np.float32)):
                raise DataError("preprocessing: std is 0; it divides")
            if not all(np.isfinite(np.asarray(getattr(self, key), np.float32)).all() for key in ("scale", "mean", "std")):
                raise DataError("preprocessing: scale, mean or std is beyond the range of float32")
        if not all(0 <= b <= 255 for b in np.ravel(self.background)):
            raise DataError(f"preprocessing: background is {shown(self.background)}; expected pixel values from 0 to 255")

    def __call__(self, path: Path) -> np.ndarray:
        """The image file as float32 [1, C, H, W] (or [1, H, W, C]). Raises DataError for a file that is no image, or smaller than the
        crop."""
        return self.input(self.pixels(path), path)

    def input(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        """What `__call__` makes of the file's `pixels`."""
        values = self.normalized(pixels)
        if not np.isfinite(values).all():
            raise DataError(f"{path}: preprocessing makes NaN or Inf of it; check scale, mean and std")
        return self.laid_out(values[None])

    @property
    def channels(self) -> tuple[int, ...]:
        """Which channel of a pixel (R, G, B, or grey) each channel of the result is made from."""
        return {"RGB": (0, 1, 2), "BGR": (2, 1, 0), "GRAY": (0,)}[self.color]

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """`y` of uint8 pixels [..., R G B or grey], float32 [..., C] with channels in the order of `color`."""
        chosen = np.asarray(pixels, np.float32)[..., list(self.channels)]
        with np.errstate(all="ignore"):
            values: np.ndarray = (chosen * np.float32(self.scale) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return values

    def laid_out(self, values: np.ndarray) -> np.ndarray:
        """[N, H, W, C] in `layout`."""
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2) if self.layout == "NCHW" else values)

    def pixels(self, path: Path) -> np.ndarray:
        """The image file resized and cropped, uint8 [H, W, C], channels R, G, B or grey. Raises DataError as `__call__`."""
        try:
            from PIL import Image
        except ImportError as error:
            raise DataError("reading images needs Pillow: pip install 'qcompiler[images]'") from error
        image = self._opened(path)
        filters = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        if self.resize is not None:
            size = self.resized(*image.size)
            if size[0] * size[1] > LARGEST_IMAGE:
                raise DataError(f"{path}: {image.width} x {image.height} would become {size[0]} x {size[1]}; at most {LARGEST_IMAGE} pixels are supported")
            image = image.resize(size, filters[self.interpolation])
        if self.crop is not None:
            height, width = self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            if left < 0 or top < 0:
                raise DataError(f"{path}: {image.width} x {image.height} pixels after resizing, smaller than the crop {width} x {height}")
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image, np.uint8).reshape(image.height, image.width, -1)

    def _opened(self, path: Path) -> Any:
        """The image in the colours of `color`, 8 bits each, upright, without transparency."""
        from PIL import Image, ImageOps

        mode = "L" if self.color == "GRAY" else "RGB"
        try:
            with open_regular(path) as file, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as opened:
                    image = ImageOps.exif_transpose(opened)
                    if image.mode.startswith(("I", "F")):
                        image = _eight_bits(image)
                    if not image.has_transparency_data:
                        return image.convert(mode)
                    background = tuple(round(b) for b in np.broadcast_to(self.background, 1 if mode == "L" else 3))
                    if self.color == "BGR":
                        background = background[::-1]
                    paper = Image.new("RGB", image.size, background if mode == "RGB" else background * 3)
                    layer = image.convert("RGBA")
                    paper.paste(layer, mask=layer)
                    return paper.convert(mode)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{path}: an image of more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from error
        except MemoryError as error:
            raise DataError(f"{path}: can't be read as an image: more pixels than fit into memory") from error
        except Exception as error:  # a decoder of Pillow raises whatever a damaged file leads it to
            raise DataError(f"{path}: can't be read as an image: {getattr(error, 'strerror', None) or error}") from error

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which an image of this size is resized, where it is. The long side is truncated to whole pixels, as torchvision's Resize does."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        short = min(width, height)
        return int(self.resize * width / short), int(self.resize * height / short)


def _eight_bits(image: Any) -> Any:
    """A grey image of 16-bit values with 8-bit ones: 65535 becomes 255. Raises ValueError for values beyond 16 bits."""
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are no integers of 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def load_preprocess(source: str | os.PathLike[str] | Mapping[str, Any] | Preprocess) -> Preprocess:
    """Settings from a YAML file, or from a mapping with the same keys. `scale` may be a fraction ("1/255"). Raises DataError for an unknown key, with the
    nearest ones."""
    if isinstance(source, Preprocess):
        return source
    path: str | Path = "preprocess" if isinstance(source, Mapping) else Path(source)
    try:
        document = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    except ValueError as error:
        raise DataError(f"{path}: the preprocessing file {error}") from error
    keys = [f.name for f in dataclasses.fields(Preprocess)]
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a mapping with keys out of {', '.join(keys)}")
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in keys:
            raise DataError(f"{path}: unknown key {shown(key)}.{closest(str(key), keys)} Known: {', '.join(keys)}")
        convert = partial(_number, path, key) if key in ("scale", "mean", "std", "background") else _same
        values[key] = tuple(convert(v) for v in value) if isinstance(value, (list, tuple)) and key != "scale" else convert(value)
    try:
        return Preprocess(**values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _same(value: Any) -> Any:
    return value


def shown(value: Any) -> str:
    """A value as it is spelled in Python, cut short."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(path: str | Path, key: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        parts = [float(part) for part in value.split("/")] if isinstance(value, str) else [float(value)]
        number = parts[0] / parts[1] if len(parts) == 2 else parts[0]
        if len(parts) > 2:
            raise ValueError
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise DataError(f"{path}: {key} is {shown(value)}; expected a number or a fraction such as 1/255") from None
    if not np.isfinite(number):
        raise DataError(f"{path}: {key} is {shown(value)}; expected a finite number")
    return number
