"""Data that needs preparing: any iterable of {input name: array} will do, and tensors of PyTorch too. For image files the compiler can do it itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data

FOLDER = Path("images")
PREPROCESS = {"color": "GRAY", "scale": "1/255"}  # y = (x * scale - mean) / std; the same keys as in a YAML file


def write_images(count: int) -> None:
    """Stands for your pictures: the example's digits as files."""
    FOLDER.mkdir(exist_ok=True)
    for index, sample in enumerate(demo_data()[0][:count]):
        pixels = np.clip(np.rint(sample["image"][0, 0] * 255), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(FOLDER / f"{index:03}.png")


class Prepared:
    """Reads and prepares a picture at a time; may be iterated again and again, and memory does not grow with the number of files."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for path in sorted(FOLDER.glob("*.png")):
            pixels = np.asarray(Image.open(path), np.float32) * np.float32(1 / 255)
            yield {"image": pixels[None, None]}  # [1, 1, 16, 16], as the model wants it


def main() -> None:
    write_images(24)
    by_us = qcompiler.compile(MODEL, calibration=FOLDER, preprocess=PREPROCESS, preset="fast")
    by_you = qcompiler.compile(MODEL, calibration=Prepared(), preset="fast")
    same = by_us.manifest["digests"]["calibration"] == by_you.manifest["digests"]["calibration"]
    print(f"{by_us.manifest['calibration_samples']} images; both ways saw the same numbers: {same}")

    # Samples that were prepared in another way than those of the calibration are noticed.
    raw = [{"image": sample["image"] * np.float32(255)} for sample in Prepared()]
    print(*qcompiler.verify(by_us, MODEL, raw, layer_samples=0, min_sqnr=-100).warnings, sep="\n")


if __name__ == "__main__":
    main()
