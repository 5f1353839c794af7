"""Views: named, deterministic crops and flips of each image of a set.

A policy is a frozen config that defines the number of views of an image and each of them. View v of image i is a function
of the image, v and, for random crops, (seed, i), independent of order, worker and batch. To add a policy, write one
class here and add it to `Views`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.images import resampling
from pipeline.keys import NEUTRAL

ATTEMPTS = 10  # boxes that a random resized crop draws until one fits
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")

Size = Annotated[int, Field(ge=1, description="pixels per side of a view")]
Box = NDArray[np.float32]
Policy = TypeVar("Policy", bound="ViewPolicy")


class ViewPolicy(Config, ABC):
    """Base of all policies; by default there is one view, named by the policy's kind."""

    kind: str
    size: Size

    @property
    def upright(self) -> int:
        """The view that is centred and not mirrored."""
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
    """The unchanged image; it must be size x size."""

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
    """Short side to `short_side` (null: `size`), then the centre: the usual transform of evaluations."""

    kind: Literal["eval-crop"] = "eval-crop"
    short_side: int | None = Field(
        None, ge=1, description="pixels of the short side before the crop; null: size", json_schema_extra=NEUTRAL
    )
    filter: resampling.Filter = Field("bicubic", description="resampling filter")

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        return _check_room(self, self.short_side or self.size)

    def describe(self) -> list[dict[str, Any]]:
        return [_description(self.kind, scale=(self.short_side or self.size) / self.size)]

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        resized_HW3 = resampling.resize_short_side(image_HW3, self.short_side or self.size, self.filter)
        return resampling.center_crop(resized_HW3, self.size, self.filter)[None]


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
    """The ADM centre crop shifted by whole pixels: first (0, 0), then every other (down, right) within +-pixels."""

    kind: Literal["shifts"] = "shifts"
    pixels: int = Field(1, ge=0, le=16, description="largest shift in each direction; (2 * pixels + 1) ** 2 views")
    fill: int = Field(0, ge=0, le=255, description="value of the new pixels at the border")

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


class Place(NamedTuple):
    """The box of a view in its image, in pixels, and whether it is mirrored; the fields of a box in a token set."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


class DrawnViews(ViewPolicy):
    """`draws` views at drawn places, half of them mirrored if `flip`.

    Place and mirror come from Philox keyed by (seed, image index, draw), so they are the same wherever they are made.
    """

    draws: int = Field(1, ge=1, le=1024, description="views per image")
    seed: int = Field(0, ge=0, lt=2**64, description="seed of positions and flips")
    flip: bool = Field(False, description="mirror half of the views")
    filter: resampling.Filter = Field("bilinear", description="resampling filter")

    @property
    def count(self) -> int:
        return self.draws

    @abstractmethod
    def sides(self, image_HW3: NDArray[np.uint8]) -> tuple[int, int]:
        """Height and width of the resized image that views are cut from."""

    @abstractmethod
    def prepare(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The resized image that views are cut from."""

    @abstractmethod
    def place(self, height: int, width: int, view: int, index: int) -> Place:
        """The box of a view of image `index` in a resized image of height x width."""

    def describe(self) -> list[dict[str, Any]]:
        scale = getattr(self, "short_side", self.size) / self.size
        return [_description(self.kind, identifier=f"random-{draw}", scale=scale) for draw in range(self.draws)]

    def apply(self, image_HW3: NDArray[np.uint8], view: int, *, index: int) -> NDArray[np.uint8]:
        return self._cut(self.prepare(image_HW3), view, index)

    def apply_all(self, image_HW3: NDArray[np.uint8], *, index: int) -> NDArray[np.uint8]:
        prepared_HW3 = self.prepare(image_HW3)
        return np.stack([self._cut(prepared_HW3, view, index) for view in range(self.count)])

    def boxes(self, image_HW3: NDArray[np.uint8], *, index: int) -> Box:
        """Boxes of the views in the resized image: float32 (count, 5) of x, y, w, h, flip."""
        height, width = self.sides(image_HW3)
        return np.array([self.place(height, width, view, index) for view in range(self.count)], dtype=np.float32)

    def words(self, view: int, index: int, count: int) -> NDArray[np.uint64]:
        """The first `count` random words of a view."""
        key = np.array([self.seed, index], np.uint64)
        drawn: NDArray[np.uint64] = np.random.Philox(key=key, counter=view << 64).random_raw(count)
        return drawn

    def _cut(self, prepared_HW3: NDArray[np.uint8], view: int, index: int) -> NDArray[np.uint8]:
        height, width = prepared_HW3.shape[:2]
        place = self.place(height, width, view, index)
        cut_HW3 = prepared_HW3[place.top : place.top + place.height, place.left : place.left + place.width]
        seen_SS3 = resampling.resize(cut_HW3, self.size, self.size, self.filter)
        return resampling.flip(seen_SS3) if place.flip else seen_SS3


class RandomCropViews(DrawnViews):
    """Crops of the image resized to `short_side`: at random positions, or all from the centre."""

    kind: Literal["random-crop"] = "random-crop"
    short_side: int = Field(ge=1, description="pixels of the short side before the crop")
    centered: bool = Field(
        False, description="cut the centre, so that only mirrors are random", json_schema_extra=NEUTRAL
    )

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        return _check_room(self, self.short_side)

    def sides(self, image_HW3: NDArray[np.uint8]) -> tuple[int, int]:
        return resampling.short_side_sizes(image_HW3, self.short_side, self.filter)

    def prepare(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resampling.resize_short_side(image_HW3, self.short_side, self.filter)

    def place(self, height: int, width: int, view: int, index: int) -> Place:
        words = self.words(view, index, 3)
        top, left = (_below(word, side - self.size + 1) for word, side in zip(words, (height, width), strict=False))
        if self.centered:
            top, left = resampling.center_offsets(height, width, self.size, self.filter)
        return Place(left, top, self.size, self.size, self.flip and _below(words[2], 2) == 1)


class RandomResizedCropViews(DrawnViews):
    """Crops of a random share of the area and a random aspect ratio, resized to size x size (Inception's augmentation).

    As in torchvision: the share is uniform, the ratio uniform in its logarithm; after ten boxes that do not fit the image
    the largest central one whose ratio is allowed is cut.
    """

    kind: Literal["random-resized-crop"] = "random-resized-crop"
    scale: tuple[float, float] = Field((0.08, 1.0), strict=False, description="smallest and largest share of the area")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), strict=False, description="smallest and largest width / height")

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        for name, (least, most) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < least <= most < np.inf or (name == "scale" and most > 1):
                raise ValueError(
                    f"{name} {least}, {most} must be two positive numbers in ascending order, a scale at most 1"
                )
        return self

    def sides(self, image_HW3: NDArray[np.uint8]) -> tuple[int, int]:
        height, width = image_HW3.shape[:2]
        return height, width

    def prepare(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return image_HW3

    def place(self, height: int, width: int, view: int, index: int) -> Place:
        words = self.words(view, index, 1 + 4 * ATTEMPTS)
        flip = self.flip and _below(words[0], 2) == 1
        for share, slant, down, right in words[1:].reshape(ATTEMPTS, 4):
            area = height * width * _between(share, *self.scale)
            ratio = math.exp(_between(slant, *map(math.log, self.ratio)))
            box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                top, left = _below(down, height - box_height + 1), _below(right, width - box_width + 1)
                return Place(left, top, box_width, box_height, flip)
        box_width = min(width, max(1, round(height * self.ratio[1])))
        box_height = min(height, max(1, round(width / self.ratio[0])))
        return Place((width - box_width) // 2, (height - box_height) // 2, box_width, box_height, flip)


Views = Annotated[
    CenterViews
    | TenCropViews
    | ShiftViews
    | EvalCropViews
    | RandomCropViews
    | RandomResizedCropViews
    | ResizeViews
    | NoneViews,
    Field(discriminator="kind"),
]


def _description(kind: str, *, identifier: str | None = None, flip: bool = False, scale: float = 1.0) -> dict[str, Any]:
    return {"id": (identifier or kind) + ("+flip" if flip else ""), "kind": kind, "flip": flip, "scale": scale}


def _check_room(views: Policy, short_side: int) -> Policy:
    if short_side < views.size:
        raise ValueError(f"short_side {short_side} must be at least size {views.size}")
    return views


def _between(word: np.uint64, low: float, high: float) -> float:
    """A uniform 64-bit word to [low, high)."""
    return low + (high - low) * (int(word) >> 11) / 2**53


def _below(word: np.uint64, end: int) -> int:
    """A uniform 64-bit word to 0..end-1."""
    return (int(word) * end) >> 64
