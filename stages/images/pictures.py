"""Grids of images as PNG: rows of ten with the class below each; text chunks hold their origin.

The same images and texts give the same bytes: no time, no host, no software version.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

COLUMNS = 10
SMALLEST_CELL = 64  # pixels a side: smaller images are enlarged by whole numbers, so that every pixel stays visible
GAP = 2
LINE = 12  # height of a line of text
BACKGROUND, INK = (255, 255, 255), (32, 32, 32)


def grid_png(images_NHW3: NDArray[np.uint8], captions: Sequence[str], texts: Mapping[str, str]) -> bytes:
    """A grid of equal images as the bytes of a PNG.

    captions: one for each image, cut to its width.  texts: keyword -> text for the tEXt chunks, written in order.
    """
    images_NHW3 = _enlarge(images_NHW3)
    height, width = images_NHW3.shape[1:3]
    columns = min(COLUMNS, len(images_NHW3))
    rows = -(-len(images_NHW3) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LINE + GAP) + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, (image_HW3, caption) in enumerate(zip(images_NHW3, captions, strict=True)):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + LINE + GAP)
        sheet.paste(Image.fromarray(image_HW3), (left, top))
        draw.text((left, top + height), _fit(caption, draw, font, width), fill=INK, font=font)
    return _png(sheet, texts)


def interleave(
    images_NHW3: NDArray[np.uint8], originals_NHW3: NDArray[np.uint8], captions: Sequence[str]
) -> tuple[NDArray[np.uint8], list[str]]:
    """Rows of ten originals, each followed by the row of their reconstructions; a short row is filled with white."""
    blank_HW3 = np.full_like(images_NHW3[:1], 255)
    rows, words = [], []
    for start in range(0, len(images_NHW3), COLUMNS):
        row = slice(start, start + COLUMNS)
        lacking = COLUMNS - len(images_NHW3[row])
        padding = [blank_HW3] * lacking
        rows += [originals_NHW3[row], *padding, images_NHW3[row], *padding]
        words += [*captions[row], *[""] * lacking, *[""] * len(images_NHW3[row]), *[""] * lacking]
    return np.concatenate(rows), words


def _enlarge(images_NHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    factor = -(-SMALLEST_CELL // images_NHW3.shape[2])
    return images_NHW3.repeat(factor, axis=1).repeat(factor, axis=2)


def _fit(caption: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """The beginning of a caption that is not wider than its image."""
    while caption and draw.textlength(caption, font=font) > width:
        caption = caption[:-1]
    return caption


def _png(sheet: Image.Image, texts: Mapping[str, str]) -> bytes:
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    buffer = io.BytesIO()
    sheet.save(buffer, format="png", pnginfo=info)
    return buffer.getvalue()
