"""Configs of the feature encoders, and the table of their builders (no torch here)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from models.config import Config

Count = Annotated[int, Field(ge=1)]


class WhitenedPatchesConfig(Config):
    """PCA-whitened local patches, fitted on the image set: features for small sets without weights of others."""

    kind: Literal["whitened-patches"] = "whitened-patches"
    channels: Count = Field(default=3, description="Colour channels of the images.")
    image_size: Count = Field(default=32, description="Pixels per side.")
    cells: Count = Field(default=4, description="Features per side; divides the image size.")
    patch: Count = Field(
        default=12, description="Pixels per side of the patch around each cell; it may overlap others."
    )
    dims: Count = Field(default=24, description="Principal components kept, each scaled to variance 1.")
    noise: float = Field(default=1e-3, gt=0, description="Share of the largest variance added before scaling.")

    @property
    def needs_fit(self) -> bool:
        """True: its state is fitted on an image set before use."""
        return True

    @property
    def grid(self) -> tuple[int, int]:
        return self.cells, self.cells

    @property
    def accepts(self) -> tuple[int, ...]:
        """Pixels per side of the images that it takes."""
        return (self.image_size,)

    @model_validator(mode="after")
    def _cells_and_patches_fit(self) -> WhitenedPatchesConfig:
        stride = self.image_size // self.cells
        if self.image_size % self.cells:
            raise ValueError(f"cells {self.cells} must divide image_size {self.image_size}")
        if self.patch < stride or (self.patch - stride) % 2:
            raise ValueError(
                f"patch {self.patch} must exceed the cell of {stride} pixels by an even number, or equal it"
            )
        if self.dims > self.channels * self.patch**2:
            raise ValueError(f"dims {self.dims} must be at most the {self.channels * self.patch**2} values of a patch")
        return self


class Dinov2Config(Config):
    """DINOv2 with four registers (arXiv 2304.07193, 2309.16588), patch features of one block."""

    channels: ClassVar[int] = 3
    kind: Literal["dinov2"] = "dinov2"
    size: Literal["small", "base", "large", "giant"] = Field(description="Size of the vision transformer.")
    image_size: Annotated[int, Field(ge=14, multiple_of=14)] = Field(
        default=224, description="Pixels per side, 14 per patch."
    )
    block: int = Field(
        default=-3,
        description="Block that is read, from 0, or from the end: -1 the last; -3 as in DiGIT (9 of base, 21 of large).",
    )
    norm: bool = Field(default=True, description="Whether the final LayerNorm is applied to the features.")
    interpolation: Literal["dinov2", "timm"] = Field(
        default="dinov2", description="How positions are resampled: bicubic with offset 0.1, or timm's antialiased way."
    )

    @property
    def needs_fit(self) -> bool:
        """False: its state is a published weight file."""
        return False

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size // 14, self.image_size // 14

    @property
    def accepts(self) -> tuple[int, ...]:
        """Pixels per side of the images that it takes: its own, and those that it resizes itself (256 to 224)."""
        return self.image_size, self.image_size * 8 // 7

    @property
    def blocks(self) -> int:
        """Blocks of the transformer."""
        return {"small": 12, "base": 12, "large": 24, "giant": 40}[self.size]

    @property
    def timm_name(self) -> str:
        return f"vit_{self.size}_patch14_reg4_dinov2"

    @model_validator(mode="after")
    def _has_the_block(self) -> Dinov2Config:
        if not -self.blocks <= self.block < self.blocks:
            raise ValueError(f"block {self.block} is outside of the {self.blocks} blocks of size {self.size}")
        return self


EncoderConfig = Annotated[WhitenedPatchesConfig | Dinov2Config, Field(discriminator="kind")]

BUILDERS: dict[str, str] = {
    "whitened-patches": "models.encoders.whitened_patches:WhitenedPatches",
    "dinov2": "models.encoders.dinov2:Dinov2",
}
