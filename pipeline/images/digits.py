"""scikit-learn's bundled handwritten digits as an image source: 1,797 real 8x8 images, upscaled, split by class.

The split asks no random generator: within each class the images of the smallest SHA-256(seed, key) are held out, so it
is the same on every platform and with every library version. The held-out count is ceil(held_out * 1797), shared
among the classes by largest remainder: 360 and 1,437 by default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.images.listing import Listing

IMAGES = 1797
CLASSES = 10
SHA256 = (
    "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # of pixels (0..16, uint8) then labels (uint8)
)


class DigitsSource(Config):
    """The handwritten digits that scikit-learn bundles: white on black, RGB, nothing to download."""

    kind: Literal["digits"] = "digits"
    split: Literal["train", "held-out", "all"] = Field("train", description="which part of the stratified split")
    size: int = Field(32, ge=8, le=1024, description="pixels per side after bicubic upscaling from 8x8")
    split_seed: int = Field(0, ge=0, description="which stratified split")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the images that is held out")

    @property
    def images(self) -> int:
        """How many digits this split has."""
        held_out = math.ceil(self.held_out * IMAGES)
        return {"train": IMAGES - held_out, "held-out": held_out, "all": IMAGES}[self.split]


def list_digits(source: DigitsSource) -> Listing:
    """The digits of one split; keys are `digit-0000` to `digit-1796`, their rows in scikit-learn's array."""
    _, labels = load_digits()
    held_out = split_held_out(labels, seed=source.split_seed, share=source.held_out)
    chosen = {"train": ~held_out, "held-out": held_out, "all": np.ones(IMAGES, dtype=bool)}[source.split]
    rows = np.flatnonzero(chosen)
    return Listing(
        keys=[_key(row) for row in rows],
        labels=labels[rows].astype(np.int32),
        sizes=np.full(len(rows), 64, dtype=np.int64),
        classes=[str(digit) for digit in range(CLASSES)],
    )


def draw_digits(keys: Sequence[str], size: int) -> NDArray[np.uint8]:
    """Digits as uint8 (N, size, size, 3): grey levels 0..16 to 0..255, then Pillow's bicubic."""
    pixels_N88, _ = load_digits()
    grey_N88 = ((pixels_N88.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    images_NHW3 = np.empty((len(keys), size, size, 3), dtype=np.uint8)
    for position, key in enumerate(keys):
        grey = Image.fromarray(grey_N88[int(key.removeprefix("digit-"))])
        images_NHW3[position] = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))[:, :, None]
    return images_NHW3


def split_held_out(labels: NDArray[np.uint8], *, seed: int, share: float) -> NDArray[np.bool_]:
    """Which images are held out: (N,) bool, ceil(share * N) of them, as many of each class as its share asks for."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label, count in enumerate(share_among(np.bincount(labels, minlength=CLASSES), math.ceil(share * len(labels)))):
        rows = np.flatnonzero(labels == label)
        order = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{_key(row)}".encode()).digest())
        held_out[order[:count]] = True
    return held_out


def share_among(sizes: NDArray[np.intp], total: int) -> list[int]:
    """Split `total` in proportion to `sizes` by largest remainder, in whole numbers; of equals the first wins."""
    whole, parts = int(sizes.sum()), [int(size) * total for size in sizes]
    counts = [part // whole for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda index: (-(parts[index] % whole), index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


@cache
def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels 0..16 uint8 (1797, 8, 8), labels uint8 (1797,). Raises InputError if scikit-learn bundles others."""
    from sklearn.datasets import load_digits as load_bundled  # here: it takes seconds that planning need not spend

    bundled = load_bundled()
    pixels, labels = bundled.images.astype(np.uint8), bundled.target.astype(np.uint8)
    found = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if found != SHA256:
        raise InputError(
            f"the digits of the installed scikit-learn have SHA-256 {found}, expected {SHA256}",
            hint="install the scikit-learn version of constraints.txt",
        )
    return pixels, labels


def _key(row: int | np.integer[Any]) -> str:
    return f"digit-{row:04d}"
