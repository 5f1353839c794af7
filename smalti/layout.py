"""How an array lies on disk: its shape, dtype, chunks, shards and codecs, as a value; and its zarr.json, both ways.

An array is split along its first axis only, so every chunk and shard holds whole rows. Files therefore stand at
`c/<shard>/0/0...`. Three codec profiles exist; all end in crc32c, since zstd and blosc do not notice a flipped bit:

    training    bytes(little) + crc32c                            constant stride, can be mapped
    transport   bytes(little) + blosc(zstd, bitshuffle) + crc32c  smallest for codes
    zstd        bytes(little) + zstd + crc32c                     keys, boxes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from smalti.errors import UsageError
from smalti.limits import Json, bytes_of_chunk, damage

Profile = Literal["training", "transport", "zstd"]
CODECS: dict[Profile, list[str]] = {
    "training": ["bytes", "crc32c"],
    "transport": ["bytes", "blosc", "crc32c"],
    "zstd": ["bytes", "zstd", "crc32c"],
}
DTYPES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(f"float{bits}" for bits in (16, 32, 64)),
)
CRC_BYTES = 4
LARGEST_CHUNK = 2**31 - 1  # bytes before compression: the limit of blosc, and a bound for forged shapes


@dataclass(frozen=True)
class ArraySpec:
    """What an array is and how it is cut.

    shape: all sizes >= 1; the first axis counts rows.  chunk_rows: rows in one (inner) chunk.
    shard_rows: rows in one shard file, a multiple of chunk_rows; None stores each chunk as a file of its own.
    fill_value: None means the dtype's maximum (integers) or NaN (floats).
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
                f"an array of shape {list(self.shape)} and dtype {self.dtype} cannot be laid out: {problem}"
            )
        if self.fill_value is None:
            object.__setattr__(self, "fill_value", default_fill(self.dtype))

    def _problem(self) -> str | None:
        if not self.shape or min(self.shape) < 1:
            return "every size must be at least 1"
        if self.dtype not in DTYPES:
            return f"the dtype must be one of {', '.join(DTYPES)}"
        if self.chunk_rows < 1:
            return f"chunk_rows is {self.chunk_rows}, expected at least 1"
        if self.shard_rows is not None and (self.shard_rows < 1 or self.shard_rows % self.chunk_rows):
            return f"shard_rows is {self.shard_rows}, expected a multiple of chunk_rows, which is {self.chunk_rows}"
        if self.profile not in get_args(Profile):
            return f"the codec profile is {self.profile!r}, expected one of {', '.join(get_args(Profile))}"
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
    def file_rows(self) -> int:
        """Rows in one whole file: a shard, or a chunk where the array is not sharded."""
        return self.shard_rows or self.chunk_rows

    @property
    def shards(self) -> int:
        """Count of files (shards, or chunks where the array is not sharded)."""
        return -(-self.shape[0] // self.file_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.file_rows // self.chunk_rows

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


def default_fill(dtype: str) -> int | float | bool:
    """A value that data does not need: the maximum of an integer dtype, NaN, or False."""
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        return int(np.iinfo(kind).max)
    return np.nan if kind.kind == "f" else False


def spec_from_document(document: Json, path: str) -> ArraySpec:
    """The layout that a parsed zarr.json describes; CorruptError, naming path, where it is not one of ours."""
    if not isinstance(document, dict) or document.get("zarr_format") != 3 or document.get("node_type") != "array":
        raise damage(path, "is not the metadata of a zarr version 3 array")
    if document.get("storage_transformers"):
        raise damage(path, "asks for storage transformers, which no array of ours has")
    if document.get("chunk_key_encoding") not in (_KEYS, {"name": "default"}):
        raise damage(path, f"has chunk key encoding {document.get('chunk_key_encoding')}, expected {_KEYS}")
    shape = _sizes(document.get("shape"), path, "shape")
    dtype = document.get("data_type")
    if dtype not in DTYPES:
        raise damage(path, f"has data type {dtype!r}, expected one of {', '.join(DTYPES)}")
    grid = document.get("chunk_grid")
    if not isinstance(grid, dict) or grid.get("name") != "regular":
        raise damage(path, "has no regular chunk grid")
    outer = _sizes(_configuration(grid).get("chunk_shape"), path, "chunk shape")
    inner, profile = _codec_chain(document.get("codecs"), dtype, path)
    if outer[1:] != shape[1:] or (inner is not None and (inner[1:] != shape[1:] or outer[0] % inner[0])):
        raise damage(
            path, f"splits shape {list(shape)} into {list(outer)} and {list(inner or outer)}, expected whole rows"
        )
    chunk_rows = outer[0] if inner is None else inner[0]
    bytes_of_chunk((chunk_rows, *shape[1:]), np.dtype(dtype).itemsize, LARGEST_CHUNK, path)
    return ArraySpec(
        shape=shape,
        dtype=dtype,
        chunk_rows=chunk_rows,
        shard_rows=None if inner is None else outer[0],
        profile=profile,
        fill_value=_fill(document.get("fill_value"), dtype, path),
        dimension_names=_names(document.get("dimension_names"), len(shape), path),
        attributes=_attributes(document, path),
    )


_KEYS: Json = {"name": "default", "configuration": {"separator": "/"}}


def _configuration(codec: Json) -> dict[str, Any]:
    found = codec.get("configuration") if isinstance(codec, dict) else None
    return found if isinstance(found, dict) else {}


def _sizes(value: Json, path: str, what: str) -> tuple[int, ...]:
    is_list = isinstance(value, list) and 1 <= len(value) <= 8
    if not is_list or not all(type(size) is int and 1 <= size < 2**63 for size in value):
        raise damage(path, f"has {what} {str(value)[:80]}, expected a list of positive integers")
    return tuple(value)


def _codec_chain(codecs: Json, dtype: str, path: str) -> tuple[tuple[int, ...] | None, Profile]:
    """Inner chunk shape (None if the array is not sharded) and codec profile."""
    inner = None
    if isinstance(codecs, list) and [_name(codec) for codec in codecs] == ["sharding_indexed"]:
        sharding = _configuration(codecs[0])
        index = sharding.get("index_codecs")
        if sharding.get("index_location", "end") != "end" or _profile(index, "uint64") != "training":
            raise damage(path, "has a shard index that is not little-endian with crc32c at the end of the shard")
        inner, codecs = _sizes(sharding.get("chunk_shape"), path, "inner chunk shape"), sharding.get("codecs")
    profile = _profile(codecs, dtype)
    if profile is None:
        known = "; ".join(" + ".join(names) for names in CODECS.values())
        raise damage(path, f"has codecs {str(codecs)[:200]}, expected one of: {known} (bytes little-endian)")
    return inner, profile


def _profile(codecs: Json, dtype: str) -> Profile | None:
    if not isinstance(codecs, list):
        return None
    names = [_name(codec) for codec in codecs]
    found = next((profile for profile, known in CODECS.items() if names == known), None)
    is_little = found and (np.dtype(dtype).itemsize == 1 or _configuration(codecs[0]).get("endian") == "little")
    return found if is_little else None


def _name(codec: Json) -> Json:
    return codec.get("name") if isinstance(codec, dict) else codec


def _fill(value: Json, dtype: str, path: str) -> int | float | bool:
    kind = np.dtype(dtype).kind
    is_float = kind == "f" and (type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity"))
    is_integer = kind in "iu" and type(value) is int and _fits(value, dtype)
    if not (is_float or is_integer or (kind == "b" and type(value) is bool)):
        raise damage(path, f"has fill value {str(value)[:40]!r}, which is no {dtype}")
    if value == "NaN":
        return np.nan  # the one object, so that two equal layouts compare equal
    return float(value) if is_float else value


def _fits(value: int, dtype: str) -> bool:
    limits = np.iinfo(dtype)
    return int(limits.min) <= value <= int(limits.max)


def _names(value: Json, axes: int, path: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != axes or not all(isinstance(name, str) for name in value):
        raise damage(path, f"has dimension names {str(value)[:80]}, expected {axes} names")
    return tuple(value)


def _attributes(document: dict[str, Any], path: str) -> dict[str, Any]:
    found = document.get("attributes", {})
    if not isinstance(found, dict):
        raise damage(path, "has attributes that are no object")
    return found
