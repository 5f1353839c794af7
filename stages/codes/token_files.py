"""The files of a token set artifact: shards of codes, and the other arrays and cards.

The layout is fixed before the first code is known, so that each worker writes its shards. Labels, keys and metadata are
written after the shards, and the cards, which list every file, come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError
from pipeline.keys import sha256
from smalti.arrays import ArraySpec, encode_shard, group_files
from smalti.attributes import TokenAttributes, attributes_to_document
from smalti.card import card_bytes, croissant_bytes, sums_bytes
from smalti.listing import SUMS
from smalti.listing import FileEntry as ListedFile
from smalti.tokens import check_codes, check_labels, encode_keys
from smalti.writing import token_specs


@dataclass(frozen=True)
class TokenLayout:
    """The layout of a token set in shards; picklable. key_bytes: UTF-8 length of the longest key."""

    attributes: TokenAttributes
    key_bytes: int
    shard_images: int
    chunk_images: int
    has_boxes: bool = False

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """Layouts of the arrays, by name."""
        return token_specs(
            self.attributes,
            key_bytes=self.key_bytes,
            shard_images=self.shard_images,
            chunk_images=self.chunk_images,
            has_boxes=self.has_boxes,
        )

    @property
    def shards(self) -> int:
        return self.specs["tokens"].shards

    def shard_range(self, number: int) -> tuple[int, int]:
        """First image of a shard, and the image after its last."""
        return self.specs["tokens"].shard_range(number)

    @property
    def sizes(self) -> list[int]:
        """Images of each shard."""
        ranges = [self.shard_range(number) for number in range(self.shards)]
        return [stop - start for start, stop in ranges]

    def shard(self, number: int, codes_ICT: NDArray[Any]) -> dict[str, bytes]:
        """The one file of a shard; CorruptError names the row where a code is not below the code count."""
        start, stop = self.shard_range(number)
        spec = self.specs["tokens"]
        check_codes(codes_ICT, self.attributes.codes, start, CorruptError, "tokens")
        name, data = encode_shard(spec, number, codes_ICT.reshape(stop - start, *spec.row_shape))
        return {f"tokens/{name}": data}

    def box_shard(self, number: int, boxes_IC5: NDArray[np.float32]) -> dict[str, bytes]:
        """The file of a shard's boxes, where crops lie at random places."""
        name, data = encode_shard(self.specs["boxes"], number, boxes_IC5)
        return {f"boxes/{name}": data}


def write_labels_and_cards(out: Draft, layout: TokenLayout, labels_I: ArrayLike, keys: list[str]) -> None:
    """Everything of a token set besides the shards of codes, which must be in the draft already."""
    labels = np.asarray(labels_I)
    check_labels(labels, layout.attributes.classes, InputError, "labels")
    for name, block in (("labels", labels), ("keys", encode_keys(keys))):
        if not out.is_done(name):
            out.put(name, _array_files(layout.specs[name], name, block))
    if not out.is_done("metadata"):
        out.put("metadata", _metadata(layout))
    if not out.is_done("cards"):
        out.put("cards", _cards(out, layout.attributes))


def _array_files(spec: ArraySpec, name: str, block: NDArray[Any]) -> dict[str, bytes]:
    files = {}
    for shard in range(spec.shards):
        start, stop = spec.shard_range(shard)
        key, data = encode_shard(spec, shard, block[start:stop])
        files[f"{name}/{key}"] = data
    return files


def _metadata(layout: TokenLayout) -> dict[str, bytes]:
    return group_files(attributes_to_document(layout.attributes), layout.specs)


def _cards(out: Draft, attributes: TokenAttributes) -> dict[str, bytes]:
    files = [ListedFile(entry.path, entry.size, entry.sha256) for entry in out.entries()]
    cards = {"README.md": card_bytes(attributes), "croissant.json": croissant_bytes(attributes, files)}
    return {**cards, SUMS: sums_bytes([*files, *(_listed(name, data) for name, data in cards.items())])}


def _listed(name: str, data: bytes) -> ListedFile:
    return ListedFile(name, len(data), sha256(data))


class ShardSizes(Config):
    """Settings of the stages that write arrays in shards. The defaults suit codes."""

    shard_images: int = Field(default=16_384, ge=1, description="images per file, a multiple of chunk_images")
    chunk_images: int = Field(default=128, ge=1, description="images per chunk, the unit of checking")

    @model_validator(mode="after")
    def _chunks_fill_shards(self) -> ShardSizes:
        if self.shard_images % self.chunk_images:
            raise ValueError(f"shard_images {self.shard_images} must be a multiple of chunk_images {self.chunk_images}")
        return self
