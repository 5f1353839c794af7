"""The layout of an array on disk: shape, dtype, chunks, shards and codecs; its zarr.json; and its shards as bytes.

An array is split along its first axis only, so every chunk and shard holds whole rows. Files are named
`c/<shard>/0/0...`. Three codec profiles exist; all end in crc32c, since zstd and blosc do not detect a flipped bit:

    training    bytes(little) + crc32c                            constant stride, can be mapped
    transport   bytes(little) + blosc(zstd, bitshuffle) + crc32c  smallest for codes
    zstd        bytes(little) + zstd + crc32c                     keys, boxes

zarr encodes the bytes in memory; callers write them by their own crash-safe protocol. zarr.json is parsed without zarr,
whose import takes 0.3 s: layouts other than these profiles are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from smalti.errors import InputError, UsageError, corrupt_error
from smalti.json_files import Json

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

Profile = Literal["training", "transport", "zstd"]
CODECS: dict[Profile, list[str]] = {
    "training": ["bytes", "crc32c"],
    "transport": ["bytes", "blosc", "crc32c"],
    "zstd": ["bytes", "zstd", "crc32c"],
}
INTEGERS = tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
DTYPES = ("bool", *INTEGERS, "float16", "float32", "float64")
CRC_BYTES = 4
LARGEST_CHUNK = 2**31 - 1  # bytes before compression: the limit of blosc, and a bound for forged shapes
CHUNK_KEYS: Json = {"name": "default", "configuration": {"separator": "/"}}


@dataclass(frozen=True)
class ArraySpec:
    """Type and chunks of an array; UsageError for an impossible layout.

    shape: all sizes >= 1; the first axis counts rows.  chunk_rows: rows in one (inner) chunk.
    shard_rows: rows in one shard file, a multiple of chunk_rows; None: each chunk is a file.
    fill_value: None means the dtype's maximum (integers), NaN (floats) or False.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int | None = None
    profile: Profile = "training"
    fill_value: int | float | bool | None = None
    dimension_names: tuple[str, ...] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UsageError(
                f"the layout of an array of shape {list(self.shape)} and dtype {self.dtype} is not valid: {problem}"
            )
        if self.fill_value is None:
            object.__setattr__(self, "fill_value", _default_fill(self.dtype))

    def _problem(self) -> str | None:
        if not self.shape or not all(type(size) is int and size >= 1 for size in self.shape):
            return "every size must be a whole number of at least 1"
        if self.dtype not in DTYPES:
            return f"the dtype must be one of {', '.join(DTYPES)}"
        if self.chunk_rows < 1:
            return f"chunk_rows is {self.chunk_rows}, expected at least 1"
        if self.shard_rows is not None and (self.shard_rows < 1 or self.shard_rows % self.chunk_rows):
            return f"shard_rows is {self.shard_rows}, expected a multiple of chunk_rows, which is {self.chunk_rows}"
        if self.profile not in CODECS:
            return f"the codec profile is {self.profile!r}, expected one of {', '.join(CODECS)}"
        if self.dimension_names is not None and len(self.dimension_names) != len(self.shape):
            return f"{len(self.dimension_names)} dimension names were given for {len(self.shape)} axes"
        if self.chunk_bytes > LARGEST_CHUNK:
            return f"one chunk would hold {self.chunk_bytes} bytes, at most {LARGEST_CHUNK} are possible"
        return None

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before the codecs."""
        return self.chunk_rows * self.row_bytes

    @property
    def stride(self) -> int:
        """Bytes from one chunk of the training profile to the next."""
        return self.chunk_bytes + CRC_BYTES

    @property
    def file_rows(self) -> int:
        """Rows in one whole file: a shard, or a chunk where the array is not sharded."""
        return self.shard_rows or self.chunk_rows

    @property
    def shards(self) -> int:
        """Count of files (shards, or chunks where the array is not sharded)."""
        return -(-self.shape[0] // self.file_rows)

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index: two 64-bit numbers for every chunk of a full shard, and their crc32c."""
        return 0 if self.shard_rows is None else 16 * (self.shard_rows // self.chunk_rows) + CRC_BYTES

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row after its last."""
        start = shard * self.file_rows
        return start, min(start + self.file_rows, self.shape[0])

    def chunks_in(self, shard: int) -> int:
        """Count of inner chunks that hold rows; the others of a last shard are absent from its file."""
        start, stop = self.shard_range(shard)
        return -(-(stop - start) // self.chunk_rows)

    def shard_key(self, shard: int) -> str:
        """Path of a shard's file below the array's folder, for example `c/3/0/0`."""
        return "/".join(["c", str(shard), *("0" for _ in self.row_shape)])


def _default_fill(dtype: str) -> int | float | bool:
    """A fill value that is no valid code or measurement."""
    kind = np.dtype(dtype)
    return int(np.iinfo(kind).max) if kind.kind in "iu" else np.nan if kind.kind == "f" else False


def spec_from_document(document: Json, path: str) -> ArraySpec:
    """The layout in a parsed zarr.json; CorruptError, naming path, where it is not a layout of this format."""
    try:
        return _spec(document)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as cause:
        raise corrupt_error(path, f"is not the metadata of an array that smalti reads ({str(cause)[:300]})") from cause


def _spec(document: Json) -> ArraySpec:
    kind = document["zarr_format"], document["node_type"], document.get("storage_transformers", [])
    if kind != (3, "array", []) or document["chunk_key_encoding"] not in (CHUNK_KEYS, {"name": "default"}):
        raise ValueError("expected zarr version 3, without storage transformers, files named c/0/0")
    shape, dtype, grid = tuple(document["shape"]), document["data_type"], document["chunk_grid"]
    chunks, codecs = grid["configuration"]["chunk_shape"], document["codecs"]
    shard_rows = None
    if codecs[0]["name"] == "sharding_indexed":
        sharding, whole = codecs[0]["configuration"], chunks
        if len(codecs) > 1 or whole[1:] != [*shape[1:]] or not _is_plain_index(sharding):
            raise ValueError("expected shards of whole rows, with their index and its crc32c at the end")
        shard_rows, chunks, codecs = whole[0], sharding["chunk_shape"], sharding["codecs"]
    if grid["name"] != "regular" or chunks[1:] != [*shape[1:]]:
        raise ValueError(f"shape {list(shape)} is split into {chunks}, expected whole rows")
    names = document.get("dimension_names")
    return ArraySpec(
        shape=shape,
        dtype=dtype,
        chunk_rows=chunks[0],
        shard_rows=shard_rows,
        profile=_profile(codecs, dtype),
        fill_value=_fill(document["fill_value"], dtype),
        dimension_names=None if names is None else tuple(names),
        attributes=dict(document.get("attributes", {})),
    )


def _is_plain_index(sharding: Json) -> bool:
    is_training = _profile(sharding["index_codecs"], "uint64") == "training"
    return is_training and bool(sharding.get("index_location", "end") == "end")


def _profile(codecs: Json, dtype: str) -> Profile:
    names = [codec["name"] for codec in codecs]
    found = next((profile for profile, known in CODECS.items() if names == known), None)
    if found is None or (np.dtype(dtype).itemsize > 1 and codecs[0]["configuration"]["endian"] != "little"):
        known = "; ".join(" + ".join(names) for names in CODECS.values())
        raise ValueError(f"its codecs are {names}, expected one of: {known} (bytes little-endian)")
    return found


def _fill(value: Json, dtype: str) -> int | float | bool:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return (
            np.nan if value == "NaN" else float(value)
        )  # the same NaN object, so that two equal layouts compare equal
    if type(value) is not (bool if kind.kind == "b" else int):
        raise ValueError(f"fill value {value!r} is not a {dtype}")
    found: int | bool = kind.type(value).item()  # OverflowError where it does not fit
    return found


def metadata_bytes(spec: ArraySpec) -> bytes:
    """The zarr.json of an array."""
    store, _ = _array_in_memory(spec)
    return store._store_dict["zarr.json"].to_bytes()


def group_files(attributes: Mapping[str, Any], arrays: Mapping[str, ArraySpec]) -> dict[str, bytes]:
    """Every zarr.json of a group of arrays, by path; that of the group is the last, since it repeats the others.

    With this consolidated metadata zarr finds the arrays without listing the folder, which would warn of every other file.
    """
    import zarr  # takes a quarter of a second, only needed for writing
    from zarr.storage import MemoryStore

    store = MemoryStore()
    zarr.create_group(store, attributes=dict(attributes), zarr_format=3)
    files = {f"{name}/zarr.json": metadata_bytes(spec) for name, spec in arrays.items()}
    document = json.loads(store._store_dict["zarr.json"].to_bytes())
    members = {name: json.loads(files[f"{name}/zarr.json"]) for name in sorted(arrays)}
    document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
    return {**files, "zarr.json": json.dumps(document, indent=2).encode()}


def encode_shard(spec: ArraySpec, shard: int, block: NDArray[Any]) -> tuple[str, bytes]:
    """One shard of an array as (path below the array's folder, bytes): the bytes that zarr would write.

    shard: its number, 0 <= shard < spec.shards (a chunk's number where the array is not sharded).
    block: (rows of this shard, *row shape), of a dtype that casts to spec.dtype without loss of range.
    InputError: another shape, or a value that does not fit the dtype (zarr would store 70,000 as 4,464 in uint16).
    """
    start, stop = spec.shard_range(shard)
    if not 0 <= shard < spec.shards or block.shape != (stop - start, *spec.row_shape):
        expected = f"rows {start} to {stop} of shape {list(spec.row_shape)}"
        raise InputError(f"shard {shard} of {spec.shards} holds {expected}, but got {list(block.shape)}")
    store, array = _array_in_memory(spec)
    array[start:stop] = _cast_in_range(block, spec.dtype)
    key = spec.shard_key(shard)
    return key, store._store_dict[key].to_bytes()


def _cast_in_range(block: NDArray[Any], dtype: str) -> NDArray[Any]:
    """block as a contiguous array of the dtype; InputError where a value is out of its range or the kind differs."""
    target = np.dtype(dtype).newbyteorder("<")
    if block.dtype == target or block.size == 0:
        return np.ascontiguousarray(block, dtype=target)
    if block.dtype.kind in "iu" and target.kind in "iu":
        limits = np.iinfo(target)
        is_bad = (block < limits.min) | (block > limits.max)
    elif block.dtype.kind == target.kind == "f":
        with np.errstate(over="ignore"):
            is_bad = np.isfinite(block) & np.isinf(block.astype(target))
    else:
        raise InputError(f"an array of {block.dtype} cannot be stored as {dtype}; cast it first if this is intended")
    if is_bad.any():
        place = tuple(np.argwhere(is_bad)[0])
        raise InputError(f"row {place[0]} holds {block[place]}, which does not fit {target.name}")
    return np.ascontiguousarray(block, dtype=target)


def _array_in_memory(spec: ArraySpec) -> tuple[MemoryStore, zarr.Array[Any]]:
    """A zarr array of this layout in a new memory store. Empty chunks are written, to be told from lost ones."""
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    compressors: list[Any] = [Crc32cCodec()]
    if spec.profile == "transport":
        typesize = np.dtype(spec.dtype).itemsize
        compressors.insert(0, BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=typesize))
    elif spec.profile == "zstd":
        compressors.insert(0, ZstdCodec(level=3, checksum=False))
    store = MemoryStore()
    array: zarr.Array[Any] = zarr.create_array(
        store,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=(spec.chunk_rows, *spec.row_shape),
        shards=None if spec.shard_rows is None else (spec.shard_rows, *spec.row_shape),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=compressors,
        fill_value=spec.fill_value,
        dimension_names=spec.dimension_names,
        attributes=dict(spec.attributes),
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    return store, array
