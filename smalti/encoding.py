"""Arrays to bytes, made by zarr itself in memory, so that callers put them on disk by their own crash-safe protocol.

`encode_shard` gives the very bytes that zarr would write when it wrote the whole array, whichever shard is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smalti.errors import InputError
from smalti.layout import ArraySpec

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore


def metadata_bytes(spec: ArraySpec) -> bytes:
    """The zarr.json of an array."""
    store, _ = _array_in_memory(spec)
    return store._store_dict["zarr.json"].to_bytes()


def group_files(attributes: Mapping[str, Any], arrays: Mapping[str, ArraySpec]) -> dict[str, bytes]:
    """Every zarr.json of a group of arrays, by path; that of the group is the last, since it repeats the others.

    With this consolidated view zarr knows the arrays without listing the folder, where it warns of every other file.
    """
    import zarr  # takes a quarter of a second: paid by writers alone
    from zarr.storage import MemoryStore

    store = MemoryStore()
    zarr.create_group(store, attributes=dict(attributes), zarr_format=3)
    files = {f"{name}/zarr.json": metadata_bytes(spec) for name, spec in arrays.items()}
    document = json.loads(store._store_dict["zarr.json"].to_bytes())
    members = {name: json.loads(files[f"{name}/zarr.json"]) for name in sorted(arrays)}
    document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
    return {**files, "zarr.json": json.dumps(document, indent=2).encode()}


def encode_shard(spec: ArraySpec, shard: int, block: NDArray[Any]) -> tuple[str, bytes]:
    """One shard of an array as (path below the array's folder, bytes).

    shard: its number, 0 <= shard < spec.shards (a chunk's number where the array is not sharded).
    block: (rows of this shard, *row shape), of a dtype that casts to spec.dtype without loss of range.
    InputError: another shape, or a value that does not fit the dtype (zarr would store 70,000 as 4,464 in uint16).
    """
    if not 0 <= shard < spec.shards:
        raise InputError(f"there is no shard {shard}: an array of shape {list(spec.shape)} has {spec.shards}")
    start, stop = spec.shard_range(shard)
    if block.shape != (stop - start, *spec.row_shape):
        raise InputError(
            f"shard {shard} holds rows {start} to {stop} of shape {list(spec.row_shape)}, but got {list(block.shape)}"
        )
    store, array = _array_in_memory(spec)
    array[start:stop] = cast_in_range(block, spec.dtype)
    key = spec.shard_key(shard)
    return key, store._store_dict[key].to_bytes()


def cast_in_range(block: NDArray[Any], dtype: str) -> NDArray[Any]:
    """block as a contiguous array of another dtype; InputError where a value does not fit or the kind differs."""
    target = np.dtype(dtype).newbyteorder("<")
    if block.dtype == target or block.size == 0:
        return np.ascontiguousarray(block, dtype=target)
    is_integer, is_float = block.dtype.kind in "iu" and target.kind in "iu", block.dtype.kind == target.kind == "f"
    if not (is_integer or is_float):
        raise InputError(
            f"an array of {block.dtype} cannot be stored as {dtype}; cast it first if that is what you mean"
        )
    if is_integer:
        _check_integers(block, target)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(block, dtype=target)
    if is_float:
        _check_overflow(block, cast)
    return cast


def _check_integers(block: NDArray[Any], target: np.dtype[Any]) -> None:
    limits = np.iinfo(target)
    lowest, highest = int(block.min()), int(block.max())
    if lowest < limits.min or highest > limits.max:
        bad = lowest if lowest < limits.min else highest
        row = int(np.argwhere(block == bad)[0][0])
        raise InputError(f"row {row} holds {bad}, which does not fit {target.name} ({limits.min} to {limits.max})")


def _check_overflow(block: NDArray[Any], cast: NDArray[Any]) -> None:
    overflow = np.isinf(cast) & np.isfinite(block)
    if overflow.any():
        where = tuple(np.argwhere(overflow)[0])
        raise InputError(f"row {where[0]} holds {block[where]}, which overflows {cast.dtype.name}")


def _array_in_memory(spec: ArraySpec) -> tuple[MemoryStore, zarr.Array[Any]]:
    """A zarr array of this layout in a fresh memory store. Empty chunks are written, else they look like lost ones."""
    import zarr
    from zarr.codecs import BytesCodec
    from zarr.storage import MemoryStore

    store = MemoryStore()
    array: zarr.Array[Any] = zarr.create_array(
        store,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=(spec.chunk_rows, *spec.row_shape),
        shards=None if spec.shard_rows is None else (spec.shard_rows, *spec.row_shape),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=_compressors(spec),
        fill_value=spec.fill_value,
        dimension_names=spec.dimension_names,
        attributes=dict(spec.attributes),
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    return store, array


def _compressors(spec: ArraySpec) -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if spec.profile == "transport":
        typesize = np.dtype(spec.dtype).itemsize
        return [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=typesize), Crc32cCodec()]
    if spec.profile == "zstd":
        return [ZstdCodec(level=3, checksum=False), Crc32cCodec()]
    return [Crc32cCodec()]
