"""How many images lie in one file, and how many share a checksum."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config import Config


class ShardSizes(Config):
    """Settings of the stages that write arrays in shards. The defaults suit codes."""

    shard_images: int = Field(default=16_384, ge=1, description="images per file, a multiple of chunk_images")
    chunk_images: int = Field(default=128, ge=1, description="images per chunk, the unit of checking")

    @model_validator(mode="after")
    def _chunks_fill_shards(self) -> ShardSizes:
        if self.shard_images % self.chunk_images:
            raise ValueError(f"shard_images {self.shard_images} must be a multiple of chunk_images {self.chunk_images}")
        return self
