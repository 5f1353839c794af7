"""Views: the named, deterministic crops and flips under which each image of a set is seen.

A policy is a frozen config that fixes how many views an image has, and what each of them is. View v of image i depends
on the image, v and, for random crops, (seed, i) alone: never on order, worker or batch. To add a policy, write one
class here and add it to `Views`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.images import resampling

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")

Size = Annotated[int, Field(ge=1, description="pixels per side of a view")]
Box = NDArray[np.float32]


class ViewPolicy(Config, ABC):
    """What all policies can do; by default there is one view, called by the policy's kind."""

    kind: str
    size: Size

    @property
    def upright(self) -> int:
        """The view that is nearest to the image itself: centred and not mirrored."""
        return 0

    @property
    def count(self) -> int:
        """Views per image."""
        return 1

    def describe(self) -> list[dict[str, Any]]:
        """One {id, kind, flip, scale, ...} per view, in order, for the attributes of a token set."""
        return [_description(self.kind)]

    def apply(self, image_HW3: NDArray[np.uint8], view: int, *, index: int) -> NDArray[np.uint8]:
        """View `view` of image `index` (its row in the image set): uint8 (size, size, 3)."""
        view_HW3: NDArray[np.uint8] = self.apply_all(image_HW3, index=index)[view]
        return view_HW3

    @abstractmethod
    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        """All views of image `index`: uint8 (count, size, size, 3)."""


class NoneViews(ViewPolicy):
    """The image as it is; it must already be size x size."""

    kind: Literal["none"] = "none"

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        height, width = image_HW3.shape[:2]
        if (height, width) != (self.size, self.size):
            raise InputError(
                f"image {index} has {width}x{height} pixels, but views of kind none need {self.size}x{self.size}",
                hint="use views of kind center",
            )
        return image_HW3[None]


class ResizeViews(ViewPolicy):
    """The whole image at size x size; its aspect is not kept."""

    kind: Literal["resize"] = "resize"
    filter: resampling.Filter = Field("bicubic", description="resampling filter")

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        return resampling.resize(image_HW3, self.size, self.size, self.filter)[None]


class CenterViews(ViewPolicy):
    """The ADM centre crop; with `center+flip` also its mirror image (the "plain" tokens of RAR)."""

    kind: Literal["center", "center+flip"] = "center"

    @property
    def count(self) -> int:
        return 1 if self.kind == "center" else 2

    def describe(self) -> list[dict[str, Any]]:
        return [_description("center"), _description("center", flip=True)][: self.count]

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        cropped = resampling.adm_crop(image_HW3, self.size)
        return np.stack([cropped, resampling.flip(cropped)][: self.count])


class EvalCropViews(ViewPolicy):
    """Short side to `size`, then the centre: the usual transform of evaluations."""

    kind: Literal["eval-crop"] = "eval-crop"
    filter: resampling.Filter = Field("bicubic", description="resampling filter")

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        return resampling.short_side_crop(image_HW3, self.size, self.filter)[None]


class TenCropViews(ViewPolicy):
    """ADM centre crop to int(scale * size); its four corners and centre, then those of its mirror image (RAR).

    So `top-left+flip` is the top left corner of the mirrored image, which is the mirrored top right corner.
    """

    kind: Literal["ten-crop"] = "ten-crop"
    scale: float = Field(1.1, ge=1, le=4, description="pixels per side of the crop that is cut, as a multiple of size")

    @property
    def count(self) -> int:
        return 10

    @property
    def upright(self) -> int:
        return CORNERS.index("center")

    def describe(self) -> list[dict[str, Any]]:
        return [_description(corner, flip=flip, scale=self.scale) for flip in (False, True) for corner in CORNERS]

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        large = resampling.adm_crop(image_HW3, int(self.scale * self.size))
        far = len(large) - self.size
        middle = round(far / 2)  # half to even, as torchvision
        offsets = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))  # in the order of CORNERS
        crops = [
            resampling.crop(image, top, left, self.size)
            for image in (large, resampling.flip(large))
            for top, left in offsets
        ]
        return np.stack(crops)


class ShiftViews(ViewPolicy):
    """The ADM centre crop moved by whole pixels: first unmoved, then every other (down, right) within +-pixels."""

    kind: Literal["shifts"] = "shifts"
    pixels: int = Field(1, ge=0, le=16, description="largest shift in each direction; (2 * pixels + 1) ** 2 views")
    fill: int = Field(0, ge=0, le=255, description="value of the pixels that come in from outside")

    @property
    def count(self) -> int:
        return len(self.shifts)

    @property
    def shifts(self) -> list[tuple[int, int]]:
        """(down, right) of each view."""
        span = range(-self.pixels, self.pixels + 1)
        return [(0, 0), *((down, right) for down in span for right in span if (down, right) != (0, 0))]

    def describe(self) -> list[dict[str, Any]]:
        return [
            _description("shift", identifier=f"shift{down:+d}{right:+d}") | {"down": down, "right": right}
            for down, right in self.shifts
        ]

    def apply(self, image_HW3: NDArray[np.uint8], view: int, *, index: int) -> NDArray[np.uint8]:
        down, right = self.shifts[view]
        return resampling.shift(resampling.adm_crop(image_HW3, self.size), down, right, self.fill)

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        cropped = resampling.adm_crop(image_HW3, self.size)
        return np.stack([resampling.shift(cropped, down, right, self.fill) for down, right in self.shifts])


class RandomCropViews(ViewPolicy):
    """`draws` crops at random places of the image resized to `short_side`, half of them mirrored if `flip`.

    Place and mirror come from Philox keyed by (seed, image index, draw), so they are the same wherever they are made.
    """

    kind: Literal["random-crop"] = "random-crop"
    short_side: int = Field(ge=1, description="pixels of the short side before the crop")
    draws: int = Field(1, ge=1, le=1024, description="views per image")
    seed: int = Field(0, ge=0, lt=2**64, description="seed of places and mirrors")
    flip: bool = Field(False, description="mirror half of the views")
    filter: resampling.Filter = Field("bilinear", description="resampling filter")

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.short_side < self.size:
            raise ValueError(f"short_side {self.short_side} must be at least size {self.size}")
        return self

    @property
    def count(self) -> int:
        return self.draws

    def describe(self) -> list[dict[str, Any]]:
        scale = self.short_side / self.size
        return [_description("random-crop", identifier=f"random-{draw}", scale=scale) for draw in range(self.draws)]

    def apply(self, image_HW3: NDArray[np.uint8], view: int, *, index: int) -> NDArray[np.uint8]:
        return self._cut(resampling.resize_short_side(image_HW3, self.short_side, self.filter), view, index)

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        resized = resampling.resize_short_side(image_HW3, self.short_side, self.filter)
        return np.stack([self._cut(resized, view, index) for view in range(self.count)])

    def _cut(self, resized_HW3: NDArray[np.uint8], view: int, index: int) -> NDArray[np.uint8]:
        top, left, flip = self.place(resized_HW3.shape[0], resized_HW3.shape[1], view, index)
        cropped = resampling.crop(resized_HW3, top, left, self.size)
        return resampling.flip(cropped) if flip else cropped

    def boxes(self, image_HW3: NDArray[np.uint8], *, index: int) -> Box:
        """Where the views lie, in pixels of the resized image: float32 (count, 5) of x, y, w, h, flip."""
        height, width = resampling.short_side_sizes(image_HW3, self.short_side, self.filter)
        places = [self.place(height, width, view, index) for view in range(self.count)]
        return np.array([(left, top, self.size, self.size, flip) for top, left, flip in places], dtype=np.float32)

    def place(self, height: int, width: int, view: int, index: int) -> tuple[int, int, bool]:
        """(top, left, mirrored) of one view in a resized image of height x width."""
        words = np.random.Philox(key=np.array([self.seed, index], np.uint64), counter=view << 64).random_raw(3)
        top, left = _below(words[0], height - self.size + 1), _below(words[1], width - self.size + 1)
        return top, left, self.flip and _below(words[2], 2) == 1


Views = Annotated[
    CenterViews | TenCropViews | ShiftViews | EvalCropViews | RandomCropViews | ResizeViews | NoneViews,
    Field(discriminator="kind"),
]


def _description(kind: str, *, identifier: str | None = None, flip: bool = False, scale: float = 1.0) -> dict[str, Any]:
    return {"id": (identifier or kind) + ("+flip" if flip else ""), "kind": kind, "flip": flip, "scale": scale}


def _below(word: np.uint64, end: int) -> int:
    """A uniform 64-bit word to 0..end-1."""
    return (int(word) * end) >> 64
