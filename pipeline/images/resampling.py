"""Resizing and cropping of uint8 (H, W, 3) arrays with Pillow's antialiased filters, as the published systems do.

A very long or very narrow image (sides differ by more than 16 times) is first cut to its central 16:1 part, so that one
of 3000x1 pixels becomes a small picture instead of a huge one that is then thrown away.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_ASPECT = 16

Filter = Literal["bicubic", "bilinear", "lanczos", "box", "nearest"]


def adm_crop(image_HW3: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The centre crop of ADM to (size, size, 3): halve by box filter, bicubic to the short side, cut the centre.

    Source: Dhariwal and Nichol 2021 (https://arxiv.org/abs/2105.05233), as used for the tokens of RAR.
    """
    image_HW3 = cut_long_side(image_HW3)
    while min(image_HW3.shape[:2]) >= 2 * size:
        height, width = image_HW3.shape[:2]
        image_HW3 = resize(image_HW3, height // 2, width // 2, "box")
    height, width = image_HW3.shape[:2]
    scale = size / min(height, width)
    image_HW3 = resize(image_HW3, round(height * scale), round(width * scale), "bicubic")
    height, width = image_HW3.shape[:2]
    return crop(image_HW3, (height - size) // 2, (width - size) // 2, size)


def short_side_crop(image_HW3: NDArray[np.uint8], size: int, filter: Filter) -> NDArray[np.uint8]:
    """Short side to `size`, then the centre (size, size, 3); offsets are rounded half to even, as torchvision does."""
    image_HW3 = resize_short_side(image_HW3, size, filter)
    height, width = image_HW3.shape[:2]
    return crop(image_HW3, round((height - size) / 2), round((width - size) / 2), size)


def resize_short_side(image_HW3: NDArray[np.uint8], size: int, filter: Filter) -> NDArray[np.uint8]:
    """Short side to `size`, the long one to int(size * long / short), as torchvision does."""
    height, width = short_side_sizes(image_HW3, size)
    return resize(cut_long_side(image_HW3), height, width, filter)


def short_side_sizes(image_HW3: NDArray[np.uint8], size: int) -> tuple[int, int]:
    """Height and width that `resize_short_side` gives."""
    height, width = cut_long_side(image_HW3).shape[:2]
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def cut_long_side(image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The central part whose long side is at most 16 times the short one."""
    height, width = image_HW3.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image_HW3[top : top + longest, left : left + longest]


def resize(image_HW3: NDArray[np.uint8], height: int, width: int, filter: Filter) -> NDArray[np.uint8]:
    """The whole image at (height, width, 3)."""
    if image_HW3.shape[:2] == (height, width):
        return image_HW3
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    return np.asarray(image.resize((width, height), Image.Resampling[filter.upper()]))


def crop(image_HW3: NDArray[np.uint8], top: int, left: int, size: int) -> NDArray[np.uint8]:
    """The square (size, size, 3) whose corner is at (top, left)."""
    return image_HW3[top : top + size, left : left + size]


def flip(image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Left and right exchanged."""
    return image_HW3[:, ::-1]


def shift(image_HW3: NDArray[np.uint8], down: int, right: int, fill: int) -> NDArray[np.uint8]:
    """The image moved by whole pixels; what comes in from outside has the value `fill`."""
    height, width = image_HW3.shape[:2]
    moved_HW3 = np.full_like(image_HW3, fill)
    moved_HW3[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image_HW3[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return moved_HW3
