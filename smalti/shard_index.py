"""The index at the end of a shard file: where each inner chunk lies. Checked before anything is read through it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from smalti.layout import CRC_BYTES, ArraySpec
from smalti.limits import damage

ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that the file does not hold


def crc32c(data: bytes | NDArray[Any]) -> bytes:
    """The checksum as it stands after the data: 4 bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def check_shard_index(spec: ArraySpec, shard: int, path: Path) -> bool:
    """Checks one file's size and index; True where its chunks stand in order at a constant stride (it can be mapped).

    CorruptError, naming the file: missing, empty, truncated, too long, index damaged, chunk absent or overlapping.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as cause:
        raise damage(path, "is missing") from cause
    with file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise damage(path, "is empty (0 bytes)")
        return _check_chunk_file(spec, size, path) if spec.shard_rows is None else _check_index(spec, shard, file, size)


def index_bytes(spec: ArraySpec) -> int:
    """Size of the index: two 64-bit numbers for every chunk that a whole shard could hold, and their crc32c."""
    return 0 if spec.shard_rows is None else 16 * spec.chunks_per_shard + CRC_BYTES


def stride(spec: ArraySpec) -> int:
    """Bytes from one raw chunk to the next."""
    return spec.chunk_bytes + CRC_BYTES


def _check_chunk_file(spec: ArraySpec, size: int, path: Path) -> bool:
    if spec.profile == "training" and size != stride(spec):
        raise damage(path, f"has {size} bytes, expected {stride(spec)}")
    return spec.profile == "training"


def _check_index(spec: ArraySpec, shard: int, file: BinaryIO, size: int) -> bool:
    path, chunks, length = Path(file.name), spec.chunks_in(shard), index_bytes(spec)
    expected = chunks * stride(spec) + length
    if size < length + chunks * CRC_BYTES or (spec.profile == "training" and size != expected):
        raise damage(path, f"has {size} bytes, expected {expected if spec.profile == 'training' else 'more'}")
    file.seek(size - length)
    data = file.read(length)
    if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise damage(path, "has a damaged shard index (its crc32c does not match)")
    index_C2 = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(-1, 2)
    return _check_entries(spec, index_C2, chunks, size - length, path)


def _check_entries(spec: ArraySpec, index_C2: NDArray[np.uint64], chunks: int, data_bytes: int, path: Path) -> bool:
    if (index_C2[chunks:] != ABSENT).any():
        raise damage(path, f"holds more than the {chunks} chunks that the array's shape leaves for it")
    absent = np.flatnonzero((index_C2[:chunks] == ABSENT).any(axis=1))
    if absent.size:
        raise damage(path, f"lacks chunk {absent[0]} of {chunks}")
    order = np.argsort(index_C2[:chunks, 0], kind="stable")
    starts, sizes = (
        index_C2[:chunks][order, column].astype(object) for column in (0, 1)
    )  # exact: forged sums overflow
    ends = starts + sizes
    if starts[0] != 0 or (starts[1:] != ends[:-1]).any() or ends[-1] != data_bytes:
        raise damage(path, f"has a shard index whose chunks do not fill its {data_bytes} bytes of data exactly")
    if spec.profile != "training":
        return False
    if (sizes != stride(spec)).any():
        raise damage(path, f"has chunks of another size than {stride(spec)} bytes")
    return bool((order == np.arange(chunks)).all())
