"""Checks of images before any is read: sizes, views and channels that do not fit, and missing sizes (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.artifact import Artifact
from pipeline.compatibility import Known, KnownInputs
from pipeline.errors import SmaltiError, UsageError
from pipeline.images import ImageSet, ViewPolicy
from pipeline.images.views import NoneViews
from pipeline.recipe import Recipe, Step
from pipeline.stage import Inputs, Stage

COLOURS = 3  # every image is decoded to red, green, blue
NOT_YET = 0  # pixels of images that nobody has looked at
IMAGES = "images"
DIGITS = "digits"
LOOKED_AT = 8  # images whose size a refusal names


def check_seen(views: ViewPolicy, inputs: KnownInputs, *names: str) -> None:
    """Raise for views of kind none, if the images have another size."""
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
    """Raise for a network with another number of colour channels than images have."""
    if network.channels != COLOURS:
        raise inputs.refusal(
            f"has {place}.channels {network.channels}, but images have {COLOURS} channels (red, green, blue)"
        )


def check_sizes(declared: Stage, given: Mapping[str, Any], inputs: Inputs) -> None:
    """UsageError (exit code 2) where a single stage is given images other than the digits without their size."""
    if unsaid(declared, given) and inputs[IMAGES].facts.get("source") != DIGITS:
        raise lacks_size(declared, given, f"{inputs[IMAGES].name} holds other images{describe_sizes(inputs[IMAGES])}")


def check_unmade_sizes(declared: Stage, given: Mapping[str, Any], images: str) -> None:
    """The same for images that are not indexed yet: a folder, or the word digits and a split of them."""
    if unsaid(declared, given) and images.partition(":")[0] != DIGITS:
        raise lacks_size(declared, given, f"{images} holds other images")


def lacks_size(declared: Stage, given: Mapping[str, Any], found: str) -> UsageError:
    name, value = next(iter(unsaid(declared, given).items()))
    return UsageError(
        f"{declared.name} lacks {name}: its default of {value} pixels is for the digits, but {found}",
        hint=f"give --set {name}=N, in pixels",
    )


def check_step_sizes(recipe: Recipe) -> None:
    """UsageError (exit code 2) where a step of a recipe reads images other than the digits, and lacks their size."""
    steps = {step.name: step for step in recipe.steps}
    for step in recipe.steps:
        for name, value in unsaid(step.stage, step.given).items():
            if not _are_digits(steps[str(step.inputs[IMAGES])]):
                raise UsageError(
                    f"step {step.name} lacks {name}: its default of {value} pixels is for the digits, but its images "
                    f"are others ({step.inputs[IMAGES]})",
                    hint=f"give it in the recipe, or with --set {step.name}.{name}=N, in pixels",
                )


def unsaid(declared: Stage, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with defaults for the digits that are not given, with their values."""
    if not declared.digits_defaults:
        return {}
    return {setting.name: setting.value for setting in declared.settings(given) if setting.is_for_digits}


def describe_sizes(artifact: Artifact) -> str:
    """The sizes of some images of a set in words; nothing where they cannot be read."""
    try:
        image_set = ImageSet.open(artifact.path)
        chosen = range(0, len(image_set), max(1, len(image_set) // LOOKED_AT))
        sizes = sorted({image_set.image(number).shape[1::-1] for number in chosen})
    except SmaltiError:  # what is wrong with an image is said when it is needed
        return ""
    ends = dict.fromkeys((sizes[0], sizes[-1]))
    return f" of {' to '.join(f'{width}x{height}' for width, height in ends)} pixels"


def _are_digits(step: Step) -> bool:
    config: Any = step.config
    return step.stage.name == "index" and config.source.kind == DIGITS
