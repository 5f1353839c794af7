"""Images as an artifact, and a common interface to them and to image sets.

An artifact of kind "images" is a zarr group: `images/` uint8 (image, height, width, channel) in shards, `labels/` int32
(image,), and attributes that say what the labels mean. `open_pictures` reads it or an image set alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact, read_manifest
from pipeline.cores import own_cores
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError
from pipeline.images import ImageSet, ViewPolicy, Views
from pipeline.images.views import CenterViews
from pipeline.stage_cache import cached
from smalti.arrays import ArraySpec, MappedArray, encode_shard, group_files
from smalti.json_files import read_json

FORMAT = 1
ATTRIBUTES = "smalti_images"

Images_BHW3 = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageLayout:
    """The layout of images of one size in shards; picklable. described: JSON for the group's attributes."""

    images: int
    height: int
    width: int
    shard_images: int
    chunk_images: int
    described: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def spec(self) -> ArraySpec:
        return ArraySpec(
            shape=(self.images, self.height, self.width, 3),
            dtype="uint8",
            chunk_rows=self.chunk_images,
            shard_rows=self.shard_images,
            dimension_names=("image", "height", "width", "channel"),
        )

    @property
    def sizes(self) -> list[int]:
        """Images of each shard."""
        ranges = [self.spec.shard_range(number) for number in range(self.spec.shards)]
        return [stop - start for start, stop in ranges]

    def shard(self, number: int, images_BHW3: Images_BHW3) -> dict[str, bytes]:
        """The one file of a shard."""
        name, data = encode_shard(self.spec, number, images_BHW3)
        return {f"images/{name}": data}


def write_labels_and_metadata(
    out: Draft, layout: ImageLayout, labels_I: NDArray[np.int32], *, others: Mapping[str, ArraySpec]
) -> None:
    """Everything of an images artifact besides the shards, which must be in the draft already.

    others: arrays beside images and labels, by name.
    """
    spec = ArraySpec(shape=labels_I.shape, dtype="int32", chunk_rows=max(1, len(labels_I)), dimension_names=("image",))
    if not out.is_done("labels"):
        name, data = encode_shard(spec, 0, labels_I)
        out.put("labels", {f"labels/{name}": data})
    if not out.is_done("metadata"):
        attributes = {ATTRIBUTES: {"format": FORMAT, **layout.described}}
        out.put("metadata", group_files(attributes, {"images": layout.spec, "labels": spec, **others}))


@dataclass(frozen=True)
class Pictures:
    """Images of one size with their labels, from an artifact or an image set.

    read(start, stop) -> uint8 (B, size, size, 3).  labels_I: int32.  class_names: may be empty.  keys: may be empty.
    """

    name: str
    path: Path
    size: int
    labels_I: NDArray[np.int32]
    class_names: list[str]
    keys: list[str]
    read: Callable[[int, int], Images_BHW3] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels_I)

    def passes(self, rows: int) -> Iterator[tuple[int, Images_BHW3]]:
        """Blocks of `rows` images, the last one shorter, each with the number of its first image."""
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)))


@dataclass(frozen=True)
class PicturesAt:
    """The images of a shard: artifact, size and views; picklable. digest: of the artifact's manifest."""

    path: Path
    digest: str
    size: int
    views: Views | None

    @classmethod
    def of(cls, artifact: Artifact, *, size: int, views: Views | None) -> PicturesAt:
        return cls(artifact.path.absolute(), artifact.digest, size, views)

    @cached(3)
    def open(self) -> Pictures:
        """The pictures; opened once per process."""
        return open_pictures(read_manifest(self.path), size=self.size, views=self.views)


def open_pictures(artifact: Artifact, *, size: int | None, views: ViewPolicy | None = None) -> Pictures:
    """The images of an artifact of kind "images", or the upright view (size x size) of every image of an image set.

    size: None takes what an images artifact has.  views: by default the ADM centre crop.
    InputError if an images artifact has another size, or an image set is given none.
    """
    if artifact.kind == "image-set":
        return _open_set(artifact, size, views)
    return _open_images(artifact, size)


def _open_set(artifact: Artifact, size: int | None, views: ViewPolicy | None) -> Pictures:
    if size is None:
        raise InputError(f"{artifact.name} is an image set, whose images have no common size: give size in the config")
    images, seen = ImageSet.open(artifact.path), views or CenterViews(size=size)
    if seen.size != size:
        raise InputError(f"{artifact.name} was to be seen in views of {seen.size} pixels, expected {size}")

    def read(start: int, stop: int) -> Images_BHW3:
        chosen = [seen.upright] * (stop - start)
        return images.chosen_views(range(start, stop), chosen, views=seen, threads=own_cores())

    return Pictures(artifact.name, artifact.path, size, images.labels, images.classes, images.keys, read)


def _open_images(artifact: Artifact, size: int | None) -> Pictures:
    attributes = read_json(artifact.path / "zarr.json").get("attributes", {}).get(ATTRIBUTES, {})
    if attributes.get("format") != FORMAT:
        found = attributes.get("format")
        raise CorruptError(
            f"{artifact.name} has images format {found!r}, this version reads {FORMAT}", path=artifact.path
        )
    images, labels_I = MappedArray(artifact.path / "images"), MappedArray(artifact.path / "labels").read()
    if images.shape[0] != len(labels_I) or images.shape[3:] != (3,) or images.shape[1] != images.shape[2]:
        raise CorruptError(
            f"{artifact.name} has images {images.shape} and {len(labels_I)} labels, expected square colour images",
            path=artifact.path,
        )
    if size not in (None, images.shape[1]):
        raise InputError(f"{artifact.name} has images of {images.shape[1]} pixels a side, expected {size}")
    names = [str(name) for name in attributes.get("class_names", [])]
    return Pictures(artifact.name, artifact.path, images.shape[1], labels_I, names, [], images.read_rows)
