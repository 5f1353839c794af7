"""Arrays on disk: tokens, features, images, boxes.

    spec = ArraySpec(shape=(1000, 10, 256), dtype="uint16", chunk_rows=128, shard_rows=256)
    group_files({"smalti": {...}}, {"tokens": spec})   every zarr.json by path
    encode_shard(spec, 3, block)                       ("c/3/0/0", bytes)
    MappedArray(folder).rows([5, 900, 2])              checked, then mapped

A shard of the training profile is plain little-endian rows at a constant stride, so a strided view of the mapped file is
the array. Arrays with another profile, or with chunks in another order, are read through zarr instead: the same calls,
about a thousand times slower for shuffled rows.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from smalti.errors import UsageError, corrupt_error
from smalti.json_files import read_json
from smalti.layout import CRC_BYTES, ArraySpec, Profile, encode_shard, group_files, metadata_bytes, spec_from_document

__all__ = ["ArraySpec", "LoadedArray", "MappedArray", "Profile", "encode_shard", "group_files", "metadata_bytes"]

ArrayVerify = Literal["index", "crc"]
MOST_MAPS = 256  # each map holds a file descriptor; the least recently used ones are closed
ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that a shard does not hold

Positions = slice | NDArray[np.intp]

log = logging.getLogger(__name__)


class MappedArray:
    """A zarr array on a local disk, opened for reading.

    path: the array's folder (with its zarr.json).
    verify: "index" checks metadata, file sizes and shard indexes; "crc" also every chunk's crc32c.
    CorruptError names the file that is missing, damaged, or in conflict with the metadata.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: ArrayVerify = "index") -> None:
        if verify not in get_args(ArrayVerify):
            raise UsageError(f"verify is {verify!r}, expected one of {', '.join(get_args(ArrayVerify))}")
        self.path = Path(path)
        metadata = self.path / "zarr.json"
        self.spec = spec_from_document(read_json(metadata), str(metadata))
        self.shape, self.dtype = self.spec.shape, np.dtype(self.spec.dtype)
        self._check_shard_names()
        strided = [self._check_shard(shard) for shard in range(self.spec.shards)]
        self.is_mapped = all(strided)
        if not self.is_mapped:
            log.info("%s is read through zarr (profile %s): slow for shuffled rows", self.path, self.spec.profile)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()
        if verify == "crc":
            self.check_crc()

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.spec.row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"MappedArray({str(self.path)!r}, shape={self.shape}, dtype={self.spec.dtype})"

    def __reduce__(self) -> tuple[object, ...]:  # another process opens and checks its own maps
        return (MappedArray, (str(self.path),))

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Rows by number, slice, or a list of numbers (negative numbers count from the end)."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            return self.read_rows(start, max(start, stop))
        numbers = np.arange(len(self))[index]  # numpy's own rules, and its IndexError
        found = self.rows(numbers)
        return found[0] if np.ndim(numbers) == 0 else found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self.path} is on disk: an array of it is always a copy")
        return self.read() if dtype is None else self.read().astype(dtype)

    def shard_path(self, shard: int) -> Path:
        return self.path / self.spec.shard_key(shard)

    def rows(self, indices: ArrayLike, *, axes: int = 1) -> NDArray[Any]:
        """The rows of these indices, in their order, as a new array (len(indices), *shape[axes:]).

        axes: number of leading axes that the indices run over; with 2, index = row * shape[1] + position on axis 1.
        """
        per_row = math.prod(self.shape[1:axes])
        wanted = _checked(indices, len(self) * per_row, self.path)
        if not self.is_mapped:
            rows, positions = np.unique(wanted // per_row, return_inverse=True)  # each chunk is decoded once
            block = self._by_zarr(rows, self.path).reshape(len(rows), per_row, *self.shape[axes:])
            return block[positions, wanted % per_row]
        out = np.empty((wanted.size, *self.shape[axes:]), self.dtype.newbyteorder("<"))
        for shard, where in _by_shard(wanted, self.spec.file_rows * per_row):
            self._gather(shard, wanted[where] - shard * self.spec.file_rows * per_row, per_row, out, where)
        return out

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop (excluded) as a new array."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} are outside of {self.path}, which has {len(self)}")
        out = np.empty((stop - start, *self.spec.row_shape), self.dtype)
        shards = range(start // self.spec.file_rows, -(-stop // self.spec.file_rows)) if stop > start else ()
        for shard in shards:
            first, last = self.spec.shard_range(shard)
            low, high = max(start, first), min(stop, last)
            out[low - start : high - start] = self._slice(shard, low - first, high - first)
        return out

    def read(self) -> NDArray[Any]:
        """The whole array."""
        return self.read_rows(0, len(self))

    def read_shard(self, shard: int) -> NDArray[Any]:
        """All rows of one shard."""
        return self.read_rows(*self.spec.shard_range(shard))

    def release(self) -> None:
        """Give back the memory of the pages that were read; what is asked for next is mapped again."""
        with self._lock:
            self._maps.clear()

    def check_crc(self) -> None:
        """Reads everything; CorruptError names the first file with a chunk whose crc32c does not match."""
        for shard in range(self.spec.shards):
            if not self.is_mapped:
                self.read_shard(shard)
                continue
            raw, step = np.memmap(self.shard_path(shard), np.uint8, mode="r"), self.spec.stride
            for chunk in range(self.spec.chunks_in(shard)):
                if not _has_crc(raw[chunk * step : (chunk + 1) * step]):
                    found = f"has damaged data: the crc32c of chunk {chunk} does not match"
                    raise corrupt_error(self.shard_path(shard), found)

    def chunk_checksums(self, shard: int) -> bytes:
        """The lengths of the chunks of a file (8 bytes each), then the crc32c of each, in the order of the rows."""
        raw, length = np.memmap(self.shard_path(shard), np.uint8, mode="r"), self.spec.index_bytes
        chunks_C2 = np.array([[0, raw.size]], "<u8")
        if length:
            chunks_C2 = raw[-length:-CRC_BYTES].view("<u8").reshape(-1, 2)[: self.spec.chunks_in(shard)]
        ends_C = chunks_C2.sum(axis=1).astype(np.int64)
        crcs_C4: NDArray[np.uint8] = raw[ends_C[:, None] + np.arange(-CRC_BYTES, 0)]
        return bytes(chunks_C2[:, 1].tobytes() + crcs_C4.tobytes())

    # Checks when opening.

    def _check_shard_names(self) -> None:
        """CorruptError where the shard files do not match the shape, before any loop over a forged count."""
        folder, shards = self.path / "c", self.spec.shards
        names = {entry.name for entry in os.scandir(folder) if entry.name.isdecimal()} if folder.is_dir() else set()
        if shards > len(names):
            missing = self.shard_path(next(shard for shard in range(shards) if str(shard) not in names))
            raise corrupt_error(missing, f"is missing: shape {list(self.shape)} needs {shards} shards")
        surplus = [name for name in names if not (int(name) < shards and str(int(name)) == name)]
        if surplus:
            found = f"is not needed by shape {list(self.shape)}, which has {shards} shards"
            raise corrupt_error(folder / min(surplus), found)

    def _check_shard(self, shard: int) -> bool:
        """Checks one file's size and index; True if its chunks are in order at a constant stride, so that it can be mapped."""
        path, spec, length = self.shard_path(shard), self.spec, self.spec.index_bytes
        chunks, is_raw = spec.chunks_in(shard), spec.profile == "training"
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                smallest = (chunks * spec.stride if is_raw else chunks * CRC_BYTES) + length
                if size < max(smallest, 1) or (is_raw and size != smallest):
                    raise corrupt_error(path, f"has {size} bytes, expected {'' if is_raw else 'at least '}{smallest}")
                file.seek(size - length)
                index = file.read(length)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as cause:
            raise corrupt_error(path, "is missing") from cause
        if not length:
            return is_raw
        if not _has_crc(np.frombuffer(index, np.uint8)):
            raise corrupt_error(path, "has a damaged shard index (its crc32c does not match)")
        return self._check_index(path, np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(-1, 2), chunks, size - length)

    def _check_index(self, path: Path, index_C2: NDArray[np.uint64], chunks: int, data_bytes: int) -> bool:
        if (index_C2[chunks:] != ABSENT).any() or (index_C2[:chunks] == ABSENT).any():
            raise corrupt_error(path, f"does not hold the {chunks} chunks that the array's shape needs")
        order = np.argsort(index_C2[:chunks, 0], kind="stable")
        starts, sizes = index_C2[:chunks][order].astype(object).T  # exact: forged sums overflow
        ends = starts + sizes
        if starts[0] != 0 or (starts[1:] != ends[:-1]).any() or ends[-1] != data_bytes:
            raise corrupt_error(path, f"has a shard index whose chunks do not fill its {data_bytes} bytes exactly")
        if self.spec.profile != "training":
            return False
        if (sizes != self.spec.stride).any():
            raise corrupt_error(path, f"has chunks of another size than {self.spec.stride} bytes")
        return bool((order == np.arange(chunks)).all())

    # Reading, by maps or by zarr.

    def _gather(self, shard: int, local: NDArray[np.int64], per_row: int, out: NDArray[Any], where: Positions) -> None:
        """Copies records of one shard to the positions `where` of out.

        A record is one element of a 1-D view whose elements overlap, one starting at every byte: numpy copies such
        elements two to three times faster than it gathers rows of a two-dimensional strided array.
        """
        record_bytes, per_chunk = self.spec.row_bytes // per_row, self.spec.chunk_rows * per_row
        starts = local // per_chunk * self.spec.stride + local % per_chunk * record_bytes
        shard_bytes = self.spec.chunks_in(shard) * self.spec.stride
        records = np.ndarray((shard_bytes - record_bytes + 1,), f"V{record_bytes}", self._map(shard), 0, (1,))
        out.view(np.uint8).reshape(len(out), record_bytes).view(records.dtype)[where, 0] = records[starts]

    def _slice(self, shard: int, low: int, high: int) -> NDArray[Any]:
        """Rows low to high of a shard: of the map, a view (chunks, chunk rows, *row shape) without the checksums."""
        if not self.is_mapped:
            first = self.spec.shard_range(shard)[0]
            return self._by_zarr(slice(first + low, first + high), self.shard_path(shard))
        chunk = self.spec.chunk_rows
        shape = (self.spec.chunks_in(shard), chunk, *self.spec.row_shape)
        inner = [self.dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        little = self.dtype.newbyteorder("<")
        chunks = np.ndarray(shape, little, self._map(shard), 0, (self.spec.stride, *inner))
        first, last = low // chunk, -(-high // chunk)
        whole: NDArray[Any] = chunks[first:last].reshape(-1, *self.spec.row_shape)
        return whole[low - first * chunk : high - first * chunk]

    def _map(self, shard: int) -> mmap.mmap:
        with self._lock:  # a loader may read from several threads
            if shard not in self._maps:
                with self.shard_path(shard).open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if len(self._maps) > MOST_MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(shard)
            return self._maps[shard]

    def _by_zarr(self, rows: slice | NDArray[np.int64], path: Path) -> NDArray[Any]:
        try:
            return np.asarray(self._zarr.oindex[rows])
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, OSError) as cause:
            raise corrupt_error(path, f"cannot be decoded ({cause})") from cause

    @cached_property
    def _zarr(self) -> Any:
        import zarr  # takes a quarter of a second, only needed here

        return zarr.open_array(self.path, mode="r")


class LoadedArray:
    """An array in memory with the reading methods of MappedArray."""

    is_mapped = True

    def __init__(self, values: NDArray[Any]) -> None:
        self._values, self.shape, self.dtype = values, values.shape, values.dtype

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.array(self._values[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype=dtype, copy=copy)

    def rows(self, indices: ArrayLike, *, axes: int = 1) -> NDArray[Any]:
        flat = self._values.reshape(math.prod(self.shape[:axes]), *self.shape[axes:])
        return flat[_checked(indices, len(flat), "the array")]

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} are outside of the array, which has {len(self)}")
        return self._values[start:stop].copy()

    def read(self) -> NDArray[Any]:
        return self._values.copy()


def _checked(indices: ArrayLike, rows: int, where: str | Path) -> NDArray[np.int64]:
    """Row numbers (B,); IndexError for one outside of [0, rows)."""
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    lowest, highest = (int(wanted.min()), int(wanted.max())) if wanted.size else (0, 0)
    if lowest < 0 or (wanted.size and highest >= rows):
        raise IndexError(f"row {lowest if lowest < 0 else highest} is outside of {where}, which has {rows}")
    return wanted


def _by_shard(indices: NDArray[np.int64], rows_per_shard: int) -> Iterator[tuple[int, Positions]]:
    """(shard, positions in indices) for each shard that the indices touch."""
    shards = indices // rows_per_shard
    if shards.size == 0:
        return
    if shards.min() == shards.max():
        yield int(shards[0]), slice(None)
        return
    narrow = shards.astype(np.uint16) if shards.max() < 2**16 else shards  # numpy sorts these by radix
    order = np.argsort(narrow, kind="stable")
    starts = np.flatnonzero(np.diff(narrow[order])) + 1
    for where in np.split(order, starts):
        yield int(shards[where[0]]), where


def crc32c(data: bytes | NDArray[np.uint8]) -> bytes:
    """The checksum that follows the data: 4 bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def _has_crc(data: NDArray[np.uint8]) -> bool:
    """Whether the last 4 bytes are the checksum of those before them."""
    return crc32c(data[:-CRC_BYTES]) == data[-CRC_BYTES:].tobytes()
