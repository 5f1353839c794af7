"""Resizing and cropping of uint8 (H, W, 3) arrays, as the published systems do: with Pillow's antialiased filters, or with
OpenCV's bilinear one, which is not antialiased (IBQ).

An image with an aspect ratio above 16 is first cut to its central 16:1 part, because the intermediate image of one of
3000x1 pixels would be huge.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_ASPECT = 16

Filter = Literal["bicubic", "bilinear", "lanczos", "box", "nearest", "opencv-bilinear"]
OPENCV: Filter = "opencv-bilinear"
BITS = 11  # of the weights in OpenCV's bilinear resize of bytes


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


def center_crop(image_HW3: NDArray[np.uint8], size: int, filter: Filter) -> NDArray[np.uint8]:
    """The square (size, size, 3) in the middle."""
    height, width = image_HW3.shape[:2]
    top, left = center_offsets(height, width, size, filter)
    return crop(image_HW3, top, left, size)


def center_offsets(height: int, width: int, size: int, filter: Filter) -> tuple[int, int]:
    """Top and left of the square in the middle, rounded half to even, as torchvision does; with OpenCV's filter down, as
    albumentations does.
    """
    top, left = (spare // 2 if filter == OPENCV else round(spare / 2) for spare in (height - size, width - size))
    return top, left


def resize_short_side(image_HW3: NDArray[np.uint8], size: int, filter: Filter) -> NDArray[np.uint8]:
    """Short side to `size`, the long one in proportion."""
    height, width = short_side_sizes(image_HW3, size, filter)
    return resize(cut_long_side(image_HW3), height, width, filter)


def short_side_sizes(image_HW3: NDArray[np.uint8], size: int, filter: Filter) -> tuple[int, int]:
    """Height and width that `resize_short_side` gives: the long side is cut to an integer, as torchvision does; with
    OpenCV's filter it is rounded half to even, as albumentations does.
    """
    height, width = cut_long_side(image_HW3).shape[:2]
    if filter == OPENCV:
        scale = size / min(height, width)
        return round(height * scale), round(width * scale)
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
    if filter == OPENCV:
        return opencv_bilinear(image_HW3, height, width)
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    return np.asarray(image.resize((width, height), Image.Resampling[filter.upper()]))


def opencv_bilinear(image_HW3: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """OpenCV's INTER_LINEAR for bytes, with the same bits: each pixel is a weighted sum of the two by two nearest.

    Source: https://docs.opencv.org/4.x/da/d54/group__imgproc__transform.html; arithmetic checked against version 5.0.
    """
    left_w, right_w, share_w = _neighbours(image_HW3.shape[1], width, beyond=False)
    top_h, bottom_h, share_h = _neighbours(image_HW3.shape[0], height, beyond=True)
    wide = image_HW3.astype(np.int32)
    rows_Hw3 = (wide[:, left_w] * share_w[0][:, None] + wide[:, right_w] * share_w[1][:, None]) >> 4
    above, below = (
        (rows_Hw3[rows] * share[:, None, None]) >> 16 for rows, share in ((top_h, share_h[0]), (bottom_h, share_h[1]))
    )
    resized: NDArray[np.uint8] = ((above + below + 2) >> 2).astype(np.uint8)
    return resized


def crop(image_HW3: NDArray[np.uint8], top: int, left: int, size: int) -> NDArray[np.uint8]:
    """The square (size, size, 3) whose corner is at (top, left)."""
    return image_HW3[top : top + size, left : left + size]


def flip(image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Left and right exchanged."""
    return image_HW3[:, ::-1]


def shift(image_HW3: NDArray[np.uint8], down: int, right: int, fill: int) -> NDArray[np.uint8]:
    """The image shifted by whole pixels; new pixels have the value `fill`."""
    height, width = image_HW3.shape[:2]
    moved_HW3 = np.full_like(image_HW3, fill)
    moved_HW3[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image_HW3[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return moved_HW3


def _neighbours(
    old: int, new: int, *, beyond: bool
) -> tuple[NDArray[np.intp], NDArray[np.intp], tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """For each new pixel the two old ones that it is computed from, and their weights in fixed point.

    beyond: at the border the weight is split between two equal neighbours, instead of one (they round differently).
    """
    places = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(places).astype(np.intp)
    share = (places - first).astype(np.float32)
    if not beyond:
        share[(first < 0) | (first >= old - 1)] = 0
        first = first.clip(0, old - 1)
    near, far = (np.rint(part * 2**BITS).astype(np.int32) for part in (1 - share, share))
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), (near, far)
