"""Configs of the stages that sample codes and decode them (no torch here, so that planning needs none)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from models.sampling.config import SamplingConfig
from pipeline.images import Views
from pipeline.keys import NEUTRAL
from stages.codes.token_files import ShardSizes
from stages.devices import Precision


class SampleConfig(ShardSizes):
    """Settings of sampling."""

    images: int = Field(default=64, ge=1, description="how many samples")
    labels: Literal["balanced", "like"] = Field(
        default="balanced", description="balanced: the classes in turn; like: in the proportions of the input labels"
    )
    classes: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="take only these classes, in turn (with balanced)"
    )
    seed: int = Field(default=0, ge=0, lt=2**53, description="of all random numbers")
    sampling: SamplingConfig = Field(
        default=SamplingConfig.model_validate({}), description="guidance, temperature, top-k, top-p, greedy"
    )
    order: tuple[int, ...] | None = Field(
        default=None, description="the image position that each step produces, left out for the generator's own"
    )
    random_order: bool = Field(
        default=False,
        json_schema_extra=NEUTRAL,
        description="generate the codes of each sample in its own random order, as in trainings without annealing",
    )
    precision: Precision = Field(
        default="float32",
        description="tf32: float32 with the products that CUDA rounds to 11 bits, as published; bfloat16: blocks and cache",
    )
    rows_per_pass: int = Field(default=64, ge=1, description="samples that go through the network together")

    @model_validator(mode="after")
    def _has_one_order(self) -> Self:
        if self.order is not None and self.random_order:
            raise ValueError(
                "order names one order for all samples, and random_order asks for others; give one of them"
            )
        return self


class ImagesConfig(ShardSizes):
    """How images are stored and shown."""

    shard_images: int = Field(default=1024, ge=1, description="images per file, a multiple of chunk_images")
    chunk_images: int = Field(default=64, ge=1, description="images per chunk, the unit of checking")
    grid_images: int = Field(default=100, ge=1, le=1000, description="images shown in grid.png, the first ones")
    npz: bool = Field(default=False, description="also write samples.npz (arr_0, uint8), as ADM's evaluator reads it")


class DecodeConfig(ImagesConfig):
    """Settings of decoding."""

    crop: int = Field(default=0, ge=0, description="which crop of each image to decode")
    rows_per_pass: int = Field(default=64, ge=1, description="images that go through the network together")
    precision: Literal["float32", "tf32"] = Field(
        default="float32",
        json_schema_extra=NEUTRAL,
        description="tf32: products that CUDA rounds to 11 bits, as published",
    )
    views: Views | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="how originals that are an image set are shown, by the upright view; null: ADM's centre crop",
    )


class GenerateConfig(ImagesConfig, SampleConfig):
    """Settings of sampling, and how the images are stored and shown."""

    rows_per_decoding: int = Field(default=64, ge=1, description="images that go through the tokenizer together")
