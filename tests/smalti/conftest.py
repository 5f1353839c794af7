"""Small token sets and arrays for the tests of the public library."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import smalti
from smalti.arrays import ArraySpec, encode_shard, metadata_bytes


def _write_array(folder: Path, spec: ArraySpec, values: np.ndarray) -> Path:
    """Puts an array on disk shard by shard, as a stage does."""
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(metadata_bytes(spec))
    for shard in range(spec.shards):
        start, stop = spec.shard_range(shard)
        key, data = encode_shard(spec, shard, values[start:stop])
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    return folder


def _flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


@pytest.fixture
def write_array() -> Callable[[Path, ArraySpec, np.ndarray], Path]:
    return _write_array


@pytest.fixture
def flip_bit() -> Callable[[Path, int], None]:
    return _flip_bit


@pytest.fixture
def codes_ICT() -> np.ndarray:
    return _codes_ICT()


@pytest.fixture(scope="session")
def set_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "set"
    smalti.create_tokens(
        path,
        _codes_ICT(),
        labels=np.arange(50) % 10,
        codes=500,
        grid=(2, 4),
        name="tiny",
        keys=[f"käse/{number:03d}" for number in range(50)],
        shard_images=16,
        chunk_images=4,
    )
    return path


@pytest.fixture
def token_set(tmp_path: Path, set_of_this_session: Path) -> smalti.TokenSet:
    """50 images x 3 crops x 2x4 tokens in 4 shards (the last one is part full), 500 codes, 10 classes; to be harmed."""
    shutil.copytree(set_of_this_session, tmp_path / "set")
    return smalti.open_tokens(tmp_path / "set")


def _codes_ICT() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 500, (50, 3, 8)).astype(np.uint16)
