"""Token sets: opened, checked, read by row. A row is one crop of one image: row = image * n_crops + crop.

    token_set = open_tokens("imagenet-tokens")
    codes_BT = token_set.tokens.rows(...)             or token_set.codes_of(rows)
    for rows_B, codes_BT, labels_B in token_set.epoch(512, seed=0, epoch=0): ...

The folder is a zarr version 3 group with arrays tokens (image, crop, token), labels (image,), keys (image, byte) and,
where crops are random, boxes (image, crop, 5). Opening takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smalti.arrays import LoadedArray, MappedArray
from smalti.attributes import TokenAttributes, attributes_from_document, attributes_to_document
from smalti.epoch import Epoch, TokenDataset
from smalti.errors import CorruptError, InputError, UsageError, corrupt_error
from smalti.json_files import read_json
from smalti.listing import read_listing
from smalti.memory import check_fits_in_memory

Verify = Literal["index", "crc", "sha256"]
Rows = MappedArray | LoadedArray
LONGEST_KEY = 4096  # bytes; the longest path of Linux
BOX_AXES = 5  # x, y, width, height, flip


@dataclass(eq=False, repr=False)
class TokenSet:
    """An opened token set.

    tokens: (n_images, n_crops, tokens) uint16 or uint32.  labels: (n_images,) int32.  key_bytes: (n_images, longest) uint8.
    boxes: (n_images, n_crops, 5) float32 or None.  attributes: the metadata of the set.
    """

    path: Path
    attributes: TokenAttributes
    tokens: Rows
    labels: NDArray[np.int32]
    key_bytes: Rows
    boxes: Rows | None

    @property
    def n_images(self) -> int:
        return self.attributes.n_images

    @property
    def n_crops(self) -> int:
        return self.attributes.n_crops

    @property
    def codes(self) -> int:
        """Size of the codebook: every code is below it."""
        return self.attributes.codes

    @property
    def grid(self) -> tuple[int, int]:
        return self.attributes.grid

    @property
    def is_mapped(self) -> bool:
        """Whether rows are read from a memory map, which makes shuffled reading fast."""
        return self.tokens.is_mapped

    def __len__(self) -> int:
        """Count of rows: images times crops."""
        return self.attributes.rows

    def __repr__(self) -> str:
        described = f"{self.n_images} images x {self.n_crops} crops x {self.grid[0]}x{self.grid[1]} tokens"
        return f"TokenSet({str(self.path)!r}, {described}, {self.codes} codes)"

    @cached_property
    def keys(self) -> list[str]:
        """Names of the images, in order."""
        return decode_keys(self.key_bytes.read(), str(self.path / "keys"))

    def codes_of(self, rows: ArrayLike) -> NDArray[Any]:
        """Codes (len(rows), tokens) of rows, in their order."""
        return self.tokens.rows(rows, axes=2)

    def labels_of(self, rows: ArrayLike) -> NDArray[np.int32]:
        """Labels (len(rows),) of rows."""
        return self.labels[np.asarray(rows, dtype=np.int64) // self.n_crops]

    def epoch(self, batch: int, *, seed: int, epoch: int, **options: Any) -> Epoch:
        """An iterator of (rows_B, codes_BT, labels_B) over one shuffled epoch; its arguments are those of smalti.Epoch."""
        return Epoch(self, batch, seed=seed, epoch=epoch, **options)

    def dataset(self) -> TokenDataset:
        """The rows as a map-style dataset for torch's DataLoader."""
        return TokenDataset(self)

    def load(self) -> TokenSet:
        """The same set with its codes in memory; UsageError where they need more than half of the free memory."""
        check_fits_in_memory(int(np.prod(self.tokens.shape)) * self.tokens.dtype.itemsize, str(self.path))
        return replace(self, tokens=LoadedArray(self.tokens.read()))

    def check_values(self) -> None:
        """Reads everything; CorruptError names the first row whose code or label is out of range."""
        check_labels(self.labels, self.attributes.classes, CorruptError, str(self.path / "labels"))
        images = max(1, 2**25 // (self.n_crops * self.attributes.tokens))  # 64 to 128 MiB at a time
        for start in range(0, self.n_images, images):
            block = self.tokens.read_rows(start, min(start + images, self.n_images))
            check_codes(block, self.codes, start, CorruptError, str(self.path / "tokens"))


def open_tokens(path: str | os.PathLike[str], *, verify: Verify = "index") -> TokenSet:
    """Opens a token set for reading.

    verify: "index" checks the manifest (or SHA256SUMS), file sizes, metadata and shard indexes; "crc" also the
    checksum of every chunk; "sha256" also the digest of every file.
    InputError: there is no token set at path.  CorruptError, which names the file: it is damaged, or of a newer format.
    """
    if verify not in get_args(Verify):
        raise UsageError(f"verify is {verify!r}, expected one of {', '.join(get_args(Verify))}")
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder, expected a token set", path=folder)
    listing = read_listing(folder)
    attributes = attributes_from_document(read_json(folder / "zarr.json"), str(folder / "zarr.json"))
    names = ["tokens", "labels", "keys", *(["boxes"] if (folder / "boxes").exists() else [])]
    if listing is not None:
        listing.check_names_and_sizes()
        listing.check_metadata("zarr.json", *(f"{name}/zarr.json" for name in names))
    elif verify == "sha256":
        raise UsageError(f"{folder} has neither manifest.json nor SHA256SUMS, so only verify='crc' is possible")
    arrays = {name: MappedArray(folder / name, verify="index" if verify == "index" else "crc") for name in names}
    if verify == "sha256" and listing is not None:
        listing.check_all()
    for name, array in arrays.items():
        _check_layout(name, array, attributes)
    labels = arrays["labels"].read()
    return TokenSet(folder, attributes, arrays["tokens"], labels, arrays["keys"], arrays.get("boxes"))


def verify_tokens(path: str | os.PathLike[str]) -> TokenSet:
    """Opens a token set and checks every digest and checksum, every code, label and key."""
    has_listing = read_listing(Path(path)) is not None
    token_set = open_tokens(path, verify="sha256" if has_listing else "crc")
    token_set.check_values()
    if len(set(token_set.keys)) != token_set.n_images:
        raise corrupt_error(token_set.path / "keys", "contains a duplicate key")
    return token_set


def content_digest(token_set: TokenSet) -> str:
    """SHA-256 in hex over attributes, layouts, and the length and crc32c of every chunk, independent of the path.

    Metadata, shard indexes and the 4 bytes after every chunk are read, so it takes milliseconds. It identifies the data
    as far as these checksums do, which `verify="crc"` checks. The cards beside the arrays are left out.
    """
    digest = hashlib.sha256(b"smalti token set 1\n" + _canonical(attributes_to_document(token_set.attributes)))
    for name in ("tokens", "labels", "keys", *(["boxes"] if token_set.boxes is not None else [])):
        array = MappedArray(token_set.path / name)
        spec = array.spec
        layout = [name, list(spec.shape), spec.dtype, spec.chunk_rows, spec.shard_rows, spec.profile]
        digest.update(_canonical(layout))
        for shard in range(spec.shards):
            digest.update(array.chunk_checksums(shard))
    return digest.hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def check_codes(
    codes_ICT: NDArray[Any], codes: int, first_image: int, error: type[CorruptError | InputError], where: str
) -> None:
    """Raises error, naming the row, where a code is not in [0, codes)."""
    if codes_ICT.size == 0 or (int(codes_ICT.max()) < codes and int(codes_ICT.min()) >= 0):
        return
    image, crop, token = (int(place) for place in np.argwhere((codes_ICT < 0) | (codes_ICT >= codes))[0])
    row = (first_image + image) * codes_ICT.shape[1] + crop
    found = f"code {int(codes_ICT[image, crop, token])} at token {token}, expected 0 to {codes - 1}"
    raise error(f"{where}: row {row} (image {first_image + image}, crop {crop}) holds {found}", path=where)


def check_labels(labels_I: NDArray[Any], classes: int, error: type[CorruptError | InputError], where: str) -> None:
    """Raises error, naming the row, where a label is not in [0, classes)."""
    bad = np.flatnonzero((labels_I < 0) | (labels_I >= classes))
    if bad.size:
        found = f"label {int(labels_I[bad[0]])}, expected 0 to {classes - 1}"
        raise error(f"{where}: row {int(bad[0])} (an image) holds {found}", path=where)


def encode_keys(keys: list[str]) -> NDArray[np.uint8]:
    """Names as (image, longest) UTF-8 bytes, zero padded; InputError for an empty, too long or repeated name."""
    encoded = [key.encode("utf-8") for key in keys]
    for key, data in zip(keys, encoded, strict=True):
        if not 0 < len(data) <= LONGEST_KEY or b"\0" in data:
            raise InputError(f"{key[:80]!r} is not a valid key: expected 1 to {LONGEST_KEY} bytes without NUL")
    if len(set(encoded)) != len(encoded):
        twice = Counter(keys).most_common(1)[0][0]
        raise InputError(f"the key {twice!r} is used for more than one image")
    longest = max(map(len, encoded))
    return np.array(encoded, dtype=f"S{longest}").view(np.uint8).reshape(len(keys), longest)


def decode_keys(bytes_IL: NDArray[np.uint8], where: str) -> list[str]:
    """The inverse of encode_keys; CorruptError where the bytes are not UTF-8."""
    packed = np.ascontiguousarray(bytes_IL).view(f"S{bytes_IL.shape[1]}")[:, 0]
    try:
        return [data.decode("utf-8") for data in packed.tolist()]
    except UnicodeDecodeError as cause:
        raise corrupt_error(where, f"holds a key that is not UTF-8 ({cause})") from cause


def _check_layout(name: str, array: MappedArray, attributes: TokenAttributes) -> None:
    """CorruptError where an array's shape, dtype or fill value contradicts the attributes."""
    images, crops = attributes.n_images, attributes.n_crops
    longest = array.shape[-1] if name == "keys" and array.shape[-1] <= LONGEST_KEY else 0
    shape, dtype = {
        "tokens": ((images, crops, attributes.tokens), attributes.dtype),
        "labels": ((images,), "int32"),
        "keys": ((images, longest), "uint8"),
        "boxes": ((images, crops, BOX_AXES), "float32"),
    }[name]
    if array.shape != shape or array.spec.dtype != dtype:
        found = f"holds {array.spec.dtype} of shape {list(array.shape)}"
        raise corrupt_error(
            array.path, f"{found}, but by the group's attributes it must be {dtype} of shape {list(shape)}"
        )
    if name == "tokens" and array.spec.fill_value != np.iinfo(dtype).max:
        raise corrupt_error(array.path, f"has fill value {array.spec.fill_value}, expected {np.iinfo(dtype).max}")
