"""What the stages that look at images refuse before any image is read (no torch here)."""

from __future__ import annotations

from typing import Any

from pipeline.images import ImageSet, ViewPolicy
from pipeline.images.views import NoneViews
from pipeline.known import Known, KnownInputs

COLOURS = 3  # every image is decoded to red, green, blue
NOT_YET = 0  # pixels of images that nobody has looked at


def check_seen(views: ViewPolicy, inputs: KnownInputs, *names: str) -> None:
    """A refusal of views that take images as they are, where these have another size."""
    for known in (one for name in names for one in inputs.all(name)):
        if isinstance(views, NoneViews) and common_pixels(known) not in (NOT_YET, views.size):
            raise inputs.refusal(
                f"sees images as they are (views of kind none) at {views.size} pixels, but those of {known.name} have "
                f"{common_pixels(known) or 'several sizes'}",
                hint="use views of kind center",
            )


def common_pixels(images: Known) -> int | None:
    """A side of all images of a set; None where they are not squares of one size, NOT_YET as long as it is not made."""
    pixels: int | None = images.get("pixels", NOT_YET)
    if pixels == NOT_YET and images.artifact is not None:
        return ImageSet.open(images.artifact.path).common_pixels()
    return pixels


def check_rgb(network: Any, place: str, inputs: KnownInputs) -> None:
    """A refusal of a network for another number of colour channels than images have."""
    channels = getattr(network, "channels", COLOURS)
    if channels != COLOURS:
        raise inputs.refusal(f"has {place}.channels {channels}, but images have {COLOURS} channels (red, green, blue)")


def check_codes_fit(views: ViewPolicy, tokenizer: Known, inputs: KnownInputs) -> tuple[int, int] | None:
    """Rows and columns of codes of a view, as far as they are known; a refusal where views do not divide into codes."""
    pixels, downsample = tokenizer.get("pixels"), tokenizer.get("downsample")
    if tokenizer.kind == "codebook":
        if pixels not in (None, views.size):
            raise inputs.refusal(
                f"sees images at {views.size} pixels (views.size), but {tokenizer.name} takes images of {pixels} pixels"
            )
        grid: tuple[int, int] | None = tokenizer.get("grid")
        return grid
    if downsample is None:
        return None
    if views.size % downsample:
        raise inputs.refusal(
            f"sees images at {views.size} pixels (views.size), but a code of {tokenizer.name} is {downsample} pixels wide"
        )
    return (views.size // downsample,) * 2
