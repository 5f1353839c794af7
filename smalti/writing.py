"""Writing a token set outside of the pipeline, complete or not at all.

Everything is written into a hidden folder beside the target and synced, then the folder is renamed. A run that is killed
leaves the hidden folder, never a partial token set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from smalti.attributes import TokenAttributes, attributes_to_document
from smalti.card import card_bytes, croissant_bytes, sums_bytes
from smalti.errors import InputError, UsageError
from smalti.layout import ArraySpec, Profile, encode_shard, group_files
from smalti.listing import SUMS, FileEntry
from smalti.tokens import BOX_AXES, TokenSet, check_codes, check_labels, encode_keys, open_tokens

SHARD_IMAGES, CHUNK_IMAGES, CHUNK_KEYS = 16_384, 128, 65_536


class Sliceable(Protocol):
    """An array that is read in slices: of numpy, zarr or h5py, or a memory map."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Any, /) -> Any: ...


def create_tokens(
    path: str | os.PathLike[str],
    tokens: Sliceable,
    *,
    labels: ArrayLike,
    codes: int,
    grid: tuple[int, int],
    name: str,
    keys: Sequence[str] | None = None,
    boxes: Sliceable | None = None,
    classes: int | None = None,
    shard_images: int = SHARD_IMAGES,
    chunk_images: int = CHUNK_IMAGES,
    profile: Profile = "training",
    **described: Any,
) -> TokenSet:
    """Writes a new token set and opens it.

    path: a folder that does not exist yet.  tokens: (images, crops, tokens) or (images, tokens) integers in [0, codes);
    read shard by shard, so it may be on disk.  labels: (images,) in [0, classes).  classes: default the number of class
    names, or the highest label + 1.  keys: a name for each image, by default its number.  boxes: (images, crops, 5).
    described: further fields of smalti.attributes.TokenAttributes.
    InputError: an invalid code or label, with its row, or an invalid shape.  UsageError: path exists, impossible layout.
    """
    labels_I = np.asarray(labels)
    classes = classes or len(described.get("class_names", ())) or int(labels_I.max(initial=0)) + 1
    images, crops = tokens.shape[0], tokens.shape[1] if len(tokens.shape) == 3 else 1
    attributes = TokenAttributes(
        name=name, n_images=images, n_crops=crops, grid=grid, codes=codes, classes=classes, **described
    )
    names = encode_keys([f"{number:0{len(str(images - 1))}d}" for number in range(images)] if keys is None else [*keys])
    specs = token_specs(
        attributes,
        key_bytes=names.shape[1],
        shard_images=shard_images,
        chunk_images=chunk_images,
        profile=profile,
        has_boxes=boxes is not None,
    )
    sources: dict[str, Sliceable] = {"tokens": tokens, "labels": labels_I, "keys": names}
    if boxes is not None:
        sources["boxes"] = boxes
    for what, source in sources.items():
        shape = specs[what].shape if what != "tokens" or len(tokens.shape) == 3 else (images, attributes.tokens)
        if tuple(source.shape) != shape:
            raise InputError(f"{what} have shape {tuple(source.shape)}, expected {shape} for a grid of {grid}")
    check_labels(labels_I, classes, InputError, "labels")
    _write_whole(Path(path), _files(attributes, specs, sources))
    return open_tokens(path)


def token_specs(
    attributes: TokenAttributes,
    *,
    key_bytes: int,
    shard_images: int = SHARD_IMAGES,
    chunk_images: int = CHUNK_IMAGES,
    profile: Profile = "training",
    has_boxes: bool = False,
) -> dict[str, ArraySpec]:
    """Layouts of the arrays of a token set, by name. key_bytes: UTF-8 length of the longest key."""
    images, crops = attributes.n_images, attributes.n_crops

    def per_image(what: str, size: int, dtype: str, profile: Profile) -> ArraySpec:
        names = ("image", "crop", what)
        return ArraySpec((images, crops, size), dtype, chunk_images, shard_images, profile, dimension_names=names)

    key_axes = ("image", "byte")
    specs = {
        "tokens": per_image("token", attributes.tokens, attributes.dtype, profile),
        "labels": ArraySpec((images,), "int32", chunk_rows=images, dimension_names=("image",)),
        "keys": ArraySpec((images, key_bytes), "uint8", CHUNK_KEYS, None, "zstd", 0, key_axes),
    }
    return {**specs, "boxes": per_image("box", BOX_AXES, "float32", "zstd")} if has_boxes else specs


def _files(
    attributes: TokenAttributes, specs: dict[str, ArraySpec], sources: dict[str, Sliceable]
) -> Iterator[tuple[str, bytes]]:
    """Every file of the set as (path, bytes); the group's zarr.json, the cards and the checksums are the last."""
    entries: list[FileEntry] = []

    def listed(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for path, data in files:
            entries.append(FileEntry(path, len(data), hashlib.sha256(data).hexdigest()))
            yield path, data

    yield from listed(_array_files(attributes, specs, sources))
    yield from listed([("README.md", card_bytes(attributes)), ("croissant.json", croissant_bytes(attributes, entries))])
    yield SUMS, sums_bytes(entries)


def _array_files(
    attributes: TokenAttributes, specs: dict[str, ArraySpec], sources: dict[str, Sliceable]
) -> Iterator[tuple[str, bytes]]:
    for name, spec in specs.items():
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            block = np.asarray(sources[name][start:stop]).reshape(stop - start, *spec.row_shape)
            if name == "tokens":
                check_codes(block, attributes.codes, start, InputError, "tokens")
            key, data = encode_shard(spec, shard, block)
            yield f"{name}/{key}", data
    yield from group_files(attributes_to_document(attributes), specs).items()


def _write_whole(target: Path, files: Iterator[tuple[str, bytes]]) -> None:
    """Writes all files into a hidden folder and renames it to target; after an error the folder is removed."""
    if target.exists():
        raise UsageError(f"{target} exists, and token sets are not overwritten; choose another folder", path=target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)  # mkdtemp gives 0700
        for path, data in files:
            _write_durably(draft / path, data)
        for folder, _, _ in os.walk(draft):
            _sync_folder(Path(folder))
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
