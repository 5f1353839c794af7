"""Configs of the classifiers, and the table of their builders (no torch here)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.config import Config

Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=8, multiple_of=8)]


class ConvolutionalClassifierConfig(Config):
    """Four convolutions, a bounded feature vector, a linear head."""

    kind: Literal["convolutional"] = "convolutional"
    channels: Count = Field(default=3, description="Colour channels of the images.")
    classes: Count | None = Field(default=None, description="Number of classes; null: as many as the images have.")
    image_size: Annotated[int, Field(ge=8, multiple_of=8)] | None = Field(
        default=None, description="Pixels per side, a multiple of 8; null: as many as the views have."
    )
    widths: Annotated[tuple[Width, Width, Width, Width], Field(strict=False)] = Field(
        default=(32, 48, 64, 64), description="Channels of the four convolutions, multiples of 8."
    )
    features: Count = Field(default=64, description="Size of the feature vector on which distances are computed.")

    @property
    def outputs(self) -> int:
        """Number of classes; ValueError where it is not set."""
        return _required(self.classes, "classes")

    @property
    def pixels(self) -> int:
        """Pixels per side; ValueError where they are not set."""
        return _required(self.image_size, "image_size")


def _required(value: int | None, name: str) -> int:
    if value is None:
        raise ValueError(f"a classifier without {name} cannot be built")
    return value


ClassifierConfig = ConvolutionalClassifierConfig  # a union tagged by `kind` as soon as there is a second one

BUILDERS: dict[str, str] = {"convolutional": "models.classifiers.convolutional:ConvolutionalClassifier"}
