"""scikit-learn's bundled handwritten digits as an image source: 1,797 real 8x8 images, upscaled, split by class.

The split asks no random generator: within each class the images of the smallest SHA-256(seed, key) are held out and
the next ones are for validation, so it is the same on every platform and with every library version. There are
ceil(held_out * 1797) and ceil(validation * 1797) of them, shared among the classes by largest remainder: 360 held out,
180 for validation and 1,257 to train on by default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.images.listing import Listing

IMAGES = 1797
CLASSES = 10
SHA256 = (
    "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # of pixels (0..16, uint8) then labels (uint8)
)

Split = Literal["train", "validation", "held-out", "all"]


class DigitsSource(Config):
    """The handwritten digits that scikit-learn bundles: white on black, RGB, nothing to download."""

    kind: Literal["digits"] = "digits"
    split: Split = Field("train", description="which part of the stratified split")
    size: int = Field(32, ge=8, le=1024, description="pixels per side after bicubic upscaling from 8x8")
    split_seed: int = Field(0, ge=0, description="which stratified split")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the images that is held out")
    validation: float = Field(0.1, ge=0, lt=1, description="share of the images that settings are chosen by")

    @model_validator(mode="after")
    def _leaves_some_to_train_on(self) -> Self:
        if self.counts["train"] < 1:
            raise ValueError(f"held_out {self.held_out} and validation {self.validation} leave no digit to train on")
        return self

    @property
    def counts(self) -> dict[str, int]:
        """hmm"""
        held_out, validation = math.ceil(self.held_out * IMAGES), math.ceil(self.validation * IMAGES)
        train = IMAGES - held_out - validation
        return {"held-out": held_out, "validation": validation, "train": train, "all": IMAGES}

    @property
    def images(self) -> int:
        """How many digits this source has."""
        return self.counts[self.split]


def list_digits(source: DigitsSource) -> Listing:
    """The digits of one split; keys are `digit-0000` to `digit-1796`, their rows in scikit-learn's array."""
    _, labels = load_digits()
    rows = split_rows(labels, source)
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


def split_rows(labels: NDArray[np.uint8], source: DigitsSource) -> NDArray[np.intp]:
    """The rows of the source's split, ascending: of each class as many as the share asks for."""
    left = [_by_hash(np.flatnonzero(labels == label), source.split_seed) for label in range(CLASSES)]
    parts = {"all": left}
    for split in ("held-out", "validation"):
        counts = share_among(np.array([len(rows) for rows in left]), source.counts[split])
        parts[split] = [rows[:count] for rows, count in zip(left, counts, strict=True)]
        left = [rows[count:] for rows, count in zip(left, counts, strict=True)]
    parts["train"] = left
    return np.sort(np.concatenate(parts[source.split]))


def _by_hash(rows: NDArray[np.intp], seed: int) -> NDArray[np.intp]:
    """The rows by ascending SHA-256(seed, key)."""
    return np.array(sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{_key(row)}".encode()).digest()))


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
