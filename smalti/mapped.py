"""Reading an array at the speed of memory: raw shards are checked by their index and then mapped, not copied.

A raw shard is plain little-endian rows at a constant stride (chunk bytes + 4), so a strided view of the mapped file is
the array. Arrays with another codec profile, or with chunks in another order, are read through zarr instead: the same
calls, about a thousand times slower for shuffled rows. Nothing here writes.
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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smalti.errors import UsageError
from smalti.layout import CRC_BYTES, spec_from_document
from smalti.limits import damage, read_json
from smalti.shard_index import check_shard_index, crc32c, stride

ArrayVerify = Literal["index", "crc"]
MOST_MAPS = 256  # each map holds a file descriptor; others are mapped again when asked for

Positions = slice | NDArray[np.intp]

log = logging.getLogger(__name__)


class MappedArray:
    """A zarr array on a local disk, opened for reading.

    path: the array's folder (where its zarr.json stands).
    verify: "index" checks metadata, file sizes and shard indexes; "crc" also every chunk's crc32c.
    CorruptError names the file that is missing, damaged, or not as the metadata says.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: ArrayVerify = "index") -> None:
        if verify not in get_args(ArrayVerify):
            raise UsageError(f"verify is {verify!r}, expected one of {', '.join(get_args(ArrayVerify))}")
        self.path = Path(path)
        metadata = self.path / "zarr.json"
        self.spec = spec_from_document(read_json(metadata), str(metadata))
        self._check_shard_names()
        strided = [check_shard_index(self.spec, shard, self.shard_path(shard)) for shard in range(self.spec.shards)]
        self.is_mapped = all(strided)
        if not self.is_mapped:
            log.info("%s is read through zarr (profile %s): slow for shuffled rows", self.path, self.spec.profile)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()
        if verify == "crc":
            self.check_crc()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spec.dtype)

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self.spec.attributes)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.spec.row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"MappedArray({str(self.path)!r}, shape={self.shape}, dtype={self.spec.dtype})"

    def __reduce__(self) -> tuple[object, ...]:  # maps stay at home: another process opens and checks its own
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
            raise ValueError(f"{self.path} lies on disk, so an array of it is always a copy")
        return self.read() if dtype is None else self.read().astype(dtype)

    def shard_path(self, shard: int) -> Path:
        return self.path / self.spec.shard_key(shard)

    def rows(self, indices: ArrayLike, *, axes: int = 1) -> NDArray[Any]:
        """The rows of these indices, in their order, as a new array (len(indices), *shape[axes:]).

        axes: how many leading axes the indices run over; with 2, index = row * shape[1] + position on axis 1.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        per_row = math.prod(self.shape[1:axes])
        self._check_range(wanted, per_row)
        out = np.empty((wanted.size, *self.shape[axes:]), self.dtype.newbyteorder("<"))
        gather = self._gather if self.is_mapped else self._gather_by_zarr
        for shard, where in _by_shard(wanted, self.spec.file_rows * per_row):
            gather(shard, wanted[where] - shard * self.spec.file_rows * per_row, per_row, out, where)
        return out

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop (excluded) as a new array."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} are outside of {self.path}, which has {len(self)}")
        out = np.empty((stop - start, *self.spec.row_shape), self.dtype)
        for shard in range(start // self.spec.file_rows, -(-stop // self.spec.file_rows) if stop > start else 0):
            first, last = self.spec.shard_range(shard)
            low, high = max(start, first), min(stop, last)
            if low < high:
                out[low - start : high - start] = self._slice(shard, low - first, high - first)
        return out

    def read(self) -> NDArray[Any]:
        """The whole array."""
        return self.read_rows(0, len(self))

    def read_shard(self, shard: int) -> NDArray[Any]:
        """All rows of one shard."""
        return self.read_rows(*self.spec.shard_range(shard))

    def check_crc(self) -> None:
        """Reads everything; CorruptError names the first file with a chunk whose crc32c does not match."""
        for shard in range(self.spec.shards):
            if self.is_mapped:
                self._check_crc_of_map(shard)
            else:
                self._slice(shard, 0, self.spec.shard_range(shard)[1] - self.spec.shard_range(shard)[0])

    # Below: files and maps.

    def _check_shard_names(self) -> None:
        """Refuses a shape that needs other shard files than there are, before any loop over a forged count."""
        try:
            names = {entry.name for entry in os.scandir(self.path / "c") if entry.name.isdecimal()}
        except (FileNotFoundError, NotADirectoryError):
            names = set()
        if self.spec.shards > len(names):
            missing = next(shard for shard in range(self.spec.shards) if str(shard) not in names)
            raise damage(
                self.shard_path(missing), f"is missing: shape {list(self.shape)} needs {self.spec.shards} shards"
            )
        surplus = [name for name in names if not (int(name) < self.spec.shards and str(int(name)) == name)]
        if surplus:
            extra = self.path / "c" / min(surplus)
            raise damage(extra, f"is not needed by shape {list(self.shape)}, which has {self.spec.shards} shards")

    def _check_range(self, wanted: NDArray[np.int64], per_row: int) -> None:
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self) * per_row):
            bad = int(wanted.min()) if int(wanted.min()) < 0 else int(wanted.max())
            raise IndexError(f"row {bad} is outside of {self.path}, which has {len(self) * per_row}")

    def _gather(self, shard: int, local: NDArray[np.int64], per_row: int, out: NDArray[Any], where: Positions) -> None:
        """Copies records of one shard to their places in out.

        A record is one element of a 1-D view whose elements overlap, one starting at every byte: numpy copies such
        elements two to three times faster than it gathers rows of a two-dimensional strided array.
        """
        record_bytes, per_chunk = self.spec.row_bytes // per_row, self.spec.chunk_rows * per_row
        starts = local // per_chunk * stride(self.spec) + local % per_chunk * record_bytes
        shard_bytes = self.spec.chunks_in(shard) * stride(self.spec)
        records = np.ndarray((shard_bytes - record_bytes + 1,), f"V{record_bytes}", self._map(shard), 0, (1,))
        out.view(np.uint8).reshape(len(out), record_bytes).view(records.dtype)[where, 0] = records[starts]

    def _slice(self, shard: int, low: int, high: int) -> NDArray[Any]:
        if not self.is_mapped:
            first = self.spec.shard_range(shard)[0]
            return self._by_zarr(shard, slice(first + low, first + high))
        chunk = self.spec.chunk_rows
        first, last = low // chunk, -(-high // chunk)
        whole = self._chunks(shard)[first:last].reshape(-1, *self.spec.row_shape)
        return whole[low - first * chunk : high - first * chunk]

    def _chunks(self, shard: int) -> NDArray[Any]:
        """A shard as a read-only view (chunks, chunk rows, *row shape) of its file."""
        shape = (self.spec.chunks_in(shard), self.spec.chunk_rows, *self.spec.row_shape)
        inner = [self.dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        little = self.dtype.newbyteorder("<")
        return np.ndarray(shape, little, self._map(shard), 0, (stride(self.spec), *inner))

    def _map(self, shard: int) -> mmap.mmap:
        with self._lock:  # a loader may read from several threads
            if shard not in self._maps:
                with self.shard_path(shard).open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if len(self._maps) > MOST_MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(shard)
            return self._maps[shard]

    def _check_crc_of_map(self, shard: int) -> None:
        raw = np.memmap(self.shard_path(shard), np.uint8, mode="r")
        step = stride(self.spec)
        for chunk in range(self.spec.chunks_in(shard)):
            data = raw[chunk * step : (chunk + 1) * step]
            if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:].tobytes():
                raise damage(self.shard_path(shard), f"has damaged data: the crc32c of chunk {chunk} does not match")

    # Below: the slow way, for other codec profiles.

    def _gather_by_zarr(
        self, shard: int, local: NDArray[np.int64], per_row: int, out: NDArray[Any], where: Positions
    ) -> None:
        """Decodes each chunk that is asked for once."""
        rows, in_row = np.divmod(local, per_row)
        rest, places = out.shape[1:], np.arange(len(out))[where]
        chunks = np.unique(rows // self.spec.chunk_rows)
        for run in np.split(chunks, np.flatnonzero(np.diff(chunks) > 1) + 1):
            low = int(run[0]) * self.spec.chunk_rows
            high = min((int(run[-1]) + 1) * self.spec.chunk_rows, len(self) - self.spec.shard_range(shard)[0])
            inside = (rows >= low) & (rows < high)
            block = self._slice(shard, low, high)
            out[places[inside]] = block.reshape(high - low, per_row, *rest)[rows[inside] - low, in_row[inside]]

    def _by_zarr(self, shard: int, rows: slice) -> NDArray[Any]:
        try:
            return np.asarray(self._zarr[rows])
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, OSError) as cause:
            raise damage(self.shard_path(shard), f"cannot be decoded ({cause})") from cause

    @cached_property
    def _zarr(self) -> Any:
        import zarr  # takes a quarter of a second: paid by the slow way alone

        return zarr.open_array(self.path, mode="r")


def _by_shard(indices: NDArray[np.int64], rows_per_shard: int) -> Iterator[tuple[int, Positions]]:
    """(shard, positions in indices) for each shard that is asked for."""
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
