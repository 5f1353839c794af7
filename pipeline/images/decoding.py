"""Image files to uint8 RGB by fixed rules; the content determines the format, not the file's name.

| file | becomes |
|---|---|
| gray, palette, CMYK, YCbCr | Pillow's conversion to RGB; colour profiles are ignored |
| alpha (RGBA, gray with alpha, transparent colour) | composited over white: (c * a + 255 * (255 - a)) / 255, rounded |
| 16 bits per channel | the high byte, so that 0..65535 becomes 0..255 (Pillow would clip) |
| several frames | the first |
| EXIF orientation | ignored or applied, by the policy |
| more pixels than the policy allows | refused by the header, before decoding |
| truncated, empty, damaged, another format, 32-bit samples | refused |
Reading the header detects empty files, too large images and other formats; only decoding detects truncation and damage.
A JPEG has no checksum: one with altered bytes may decode to altered pixels. A deep index detects that.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import BadImages, InputError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
EXIF_ORIENTATION = 0x0112


class DecodePolicy(Config):
    """How image files become pixels; part of the image set's key."""

    corrupt: Literal["fail", "skip"] = Field(
        "fail", description="an image that cannot be decoded: stop, or leave it out and list it"
    )
    max_skipped: int = Field(
        0, ge=0, description="how many images `skip` may leave out before it stops too; 0: any number"
    )
    exif: Literal["ignore", "apply"] = Field("ignore", description="what to do with the EXIF orientation")
    max_pixels: int = Field(
        80_000_000, ge=1, le=178_000_000, description="refuse larger images (the largest of ImageNet has 61 million)"
    )
    alpha: Literal["white"] = Field("white", description="background of transparent images")


class CorruptImage(BadImages):
    """An image that cannot be decoded. `reason`: a fixed phrase without a path, for reports."""

    def __init__(self, reason: str, *, path: str, command: str = "smalti index", image_set: str = ""):
        super().__init__(f"image {path} {reason}", path=path, command=command, image_set=image_set)
        self.reason = reason


class UnreadableImage(InputError):
    """An image file that cannot be read, or that was changed since it was indexed. `reason`: a phrase without a path."""

    def __init__(self, reason: str, *, path: Path, hint: str | None = None):
        super().__init__(f"image {path} {reason}", path=path, hint=hint)
        self.reason = reason


def decode(source: bytes | Path, policy: DecodePolicy, *, name: str | None = None) -> NDArray[np.uint8]:
    """An image file, or its bytes, as uint8 (H, W, 3). `name`: of the bytes in errors.

    Raises CorruptImage for what the rules above refuse, UnreadableImage for a file that cannot be read.
    """
    name = name or (str(source) if isinstance(source, Path) else f"of {len(source)} bytes")
    data = read_file(source) if isinstance(source, Path) else source
    with opened(io.BytesIO(data), policy, name) as image:
        if image.format == "PNG":
            check_png(data)
        orientation = image.getexif().get(EXIF_ORIENTATION, 1) if policy.exif == "apply" else 1
        image.load()
        pixels_HW3 = to_rgb(ImageOps.exif_transpose(image) if orientation != 1 else image)
    return pixels_HW3


def check_header(path: Path, policy: DecodePolicy) -> tuple[int, int]:
    """Width and height from the header of an image file. Raises CorruptImage and UnreadableImage as `decode`."""
    try:
        with path.open("rb") as file, opened(file, policy, str(path)) as image:
            return image.size
    except OSError as cause:
        raise UnreadableImage(f"cannot be read: {cause.strerror}", path=path) from cause


@contextmanager
def opened(file: BinaryIO, policy: DecodePolicy, name: str) -> Iterator[Image.Image]:
    """Yield an image whose header was read and accepted; errors of the header and in the block become CorruptImage."""
    if not file.read(1):
        raise CorruptImage("is empty", path=name)
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > policy.max_pixels:
                raise CorruptImage(_too_large(policy), path=name)
            yield image
    except (CorruptImage, MemoryError):
        raise
    except UnidentifiedImageError as cause:
        raise CorruptImage(f"is none of {', '.join(FORMATS)}", path=name) from cause
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as cause:
        raise CorruptImage(_too_large(policy), path=name) from cause
    except Exception as cause:  # Pillow's readers raise a dozen kinds of errors on bad bytes
        if isinstance(cause, OSError) and cause.errno is not None:  # an I/O error
            raise
        raise CorruptImage("is truncated or damaged", path=name) from cause


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises UnreadableImage if it is missing or unreadable."""
    try:
        return path.read_bytes()
    except OSError as cause:
        raise UnreadableImage(f"cannot be read: {cause.strerror}", path=path) from cause


def check_png(data: bytes) -> None:
    """Verify the checksum of every chunk, which decoding a PNG does not. Raises Pillow's errors."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A loaded image of any supported mode as uint8 (H, W, 3). Raises ValueError for a mode without a rule."""
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return high_bytes(np.asarray(image), image.info.get("transparency"))
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(f"no rule for the mode {image.mode}")
    if image.has_transparency_data:
        return over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def over_white(image_HW4: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA over white, uint8 (H, W, 3), rounded to nearest."""
    colour_HW3 = image_HW4[:, :, :3].astype(np.uint32)
    alpha_HW1 = image_HW4[:, :, 3:].astype(np.uint32)
    return ((colour_HW3 * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255).astype(np.uint8)


def high_bytes(grey_HW: NDArray[Any], transparent: int | None) -> NDArray[np.uint8]:
    """16-bit gray as uint8 (H, W, 3): the high byte; pixels of the transparent value become white."""
    if grey_HW.min(initial=0) < 0 or grey_HW.max(initial=0) > 65535:
        raise ValueError("more than 16 bits per sample")
    high_HW = (grey_HW.astype(np.uint32) >> 8).astype(np.uint8)
    if isinstance(transparent, int):
        high_HW[grey_HW == transparent] = 255
    return np.repeat(high_HW[:, :, None], 3, axis=2)


def _too_large(policy: DecodePolicy) -> str:
    return f"has more than {policy.max_pixels} pixels (decode.max_pixels)"
