"""What a token set holds, as one digest: the same for the same arrays and attributes, wherever they lie.

Nothing but metadata, shard indexes and the checksum behind every chunk is read, so it takes milliseconds. It stands for the
data as long as these checksums fit, which `open_tokens(verify="crc")` checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smalti.attributes import attributes_to_document
from smalti.layout import CRC_BYTES
from smalti.mapped import MappedArray
from smalti.shard_index import ABSENT, index_bytes
from smalti.tokens import TokenSet

HEADER = b"smalti token set 1\n"


def content_digest(token_set: TokenSet) -> str:
    """SHA-256 in hex over attributes, layouts, and the length and crc32c of every chunk.

    The cards beside the arrays are left out. CorruptError names a file that is damaged or missing.
    """
    digest = hashlib.sha256(HEADER)
    digest.update(_canonical(attributes_to_document(token_set.attributes)))
    for name in ("tokens", "labels", "keys", *(["boxes"] if token_set.boxes is not None else [])):
        array = MappedArray(token_set.path / name)
        spec = array.spec
        layout = [name, list(spec.shape), spec.dtype, spec.chunk_rows, spec.shard_rows, spec.profile]
        digest.update(_canonical(layout))
        for checksums in _checksums(array):
            digest.update(checksums)
    return digest.hexdigest()


def _checksums(array: MappedArray) -> Iterator[bytes]:
    """Of each file: the lengths of its chunks and the checksums that stand behind them, in the order of the rows."""
    spec = array.spec
    for shard in range(spec.shards):
        path = array.shard_path(shard)
        length = index_bytes(spec)
        if length == 0:
            yield _behind(path, np.array([[0, path.stat().st_size]], "<u8"))
            continue
        with path.open("rb") as file:
            file.seek(-length, os.SEEK_END)
            chunks_N2 = np.frombuffer(file.read(length - CRC_BYTES), "<u8").reshape(-1, 2)
        yield _behind(path, chunks_N2[chunks_N2[:, 0] != ABSENT])


def _behind(path: Path, chunks_N2: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> bytes:
    """Lengths of chunks at (offset, length), and the last bytes of each."""
    ends_N = chunks_N2.sum(axis=1).astype(np.int64)
    bytes_F = np.memmap(path, np.uint8, mode="r")
    crcs_N4 = bytes_F[ends_N[:, None] + np.arange(-CRC_BYTES, 0)]
    lengths_N: bytes = chunks_N2[:, 1].astype("<u8").tobytes()
    checksums: bytes = crcs_N4.tobytes()
    return lengths_N + checksums


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
