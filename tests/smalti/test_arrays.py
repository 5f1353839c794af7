"""The array layer: layouts, encoding, mapped reading, and refusal of everything that is not as it should be."""

from __future__ import annotations

import itertools
import json
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr

from smalti.arrays import ArraySpec, MappedArray, crc32c, encode_shard, metadata_bytes
from smalti.errors import CorruptError, InputError, UsageError

PROFILES = ("training", "transport", "zstd")
LAYOUTS = [((21, 2, 3), "uint16"), ((21,), "int32"), ((19, 4), "float16"), ((24, 2, 3), "uint8"), ((5, 2), "int64")]


def values_for(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


@pytest.fixture
def spec() -> ArraySpec:
    return ArraySpec(shape=(21, 2, 3), dtype="uint16", chunk_rows=4, shard_rows=8)


@pytest.fixture
def folder(tmp_path: Path, spec: ArraySpec, write_array) -> Path:
    return write_array(tmp_path / "array", spec, values_for(spec.shape, spec.dtype))


@pytest.mark.parametrize(
    ("profile", "shard_rows", "layout"), itertools.product(PROFILES, (8, None), LAYOUTS), ids=lambda value: str(value)
)
def test_round_trip_equals_zarr(write_array, tmp_path, profile, shard_rows, layout):
    shape, dtype = layout
    spec = ArraySpec(shape=shape, dtype=dtype, chunk_rows=4, shard_rows=shard_rows, profile=profile)
    values = values_for(shape, dtype)
    array = MappedArray(write_array(tmp_path / "array", spec, values), verify="crc")
    order = np.random.default_rng(1).permutation(shape[0])
    assert array.spec == spec
    assert array.is_mapped == (profile == "training")
    for found in (array.read(), zarr.open_array(tmp_path / "array", mode="r")[:], np.asarray(array)):
        np.testing.assert_array_equal(found, values)
        assert found.dtype == dtype
    np.testing.assert_array_equal(array.rows(order), values[order])
    np.testing.assert_array_equal(array.read_rows(3, 5), values[3:5])
    if len(shape) > 1:
        flat = values.reshape(-1, *shape[2:])
        order = np.random.default_rng(2).integers(0, len(flat), 40)
        np.testing.assert_array_equal(array.rows(order, axes=2), flat[order])


@pytest.mark.parametrize("profile", PROFILES)
def test_shard_wise_bytes_equal_whole(write_array, tmp_path, profile):
    spec = ArraySpec(shape=(21, 2, 3), dtype="uint16", chunk_rows=4, shard_rows=8, profile=profile)
    values = values_for(spec.shape, spec.dtype)
    values[4:8] = spec.fill_value  # an empty chunk is written all the same
    ours = write_array(tmp_path / "ours", spec, values)
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.json").write_bytes(metadata_bytes(spec))
    whole = zarr.open_array(tmp_path / "zarr", mode="r+")
    whole.with_config({"write_empty_chunks": True})[:] = values
    for shard in range(spec.shards):
        key = spec.shard_key(shard)
        assert (ours / key).read_bytes() == (tmp_path / "zarr" / key).read_bytes()


def test_indexing_follows_numpy(folder, spec):
    array, values = MappedArray(folder), values_for(spec.shape, spec.dtype)
    for index in (3, -1, slice(2, 9), slice(None, None, 5), slice(9, 2), [4, -2, 4]):
        np.testing.assert_array_equal(array[index], values[index])
    for index in (21, [0, -22]):
        with pytest.raises(IndexError):
            array[index]
    for rows in ([21], [-1]):
        with pytest.raises(IndexError, match="outside"):
            array.rows(rows)
    assert array.rows([]).shape == (0, 2, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)).read(), values)


def test_more_shards_than_maps(write_array, tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.arrays.MOST_MAPS", 2)
    spec = ArraySpec(shape=(10, 3), dtype="int32", chunk_rows=1, shard_rows=1)
    values = values_for(spec.shape, spec.dtype)
    array = MappedArray(write_array(tmp_path / "array", spec, values))
    np.testing.assert_array_equal(array.rows([9, 0, 5, 9, 3]), values[[9, 0, 5, 9, 3]])
    assert len(array._maps) == 2


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("uint16", np.array([[1], [70_000]])),
        ("uint16", np.array([[-1], [0]])),
        ("float16", np.array([[1.0], [1e6]])),
        ("uint16", np.array([[1.0], [2.0]])),
        ("float32", np.array([[1], [2]])),
    ],
)
def test_value_that_does_not_fit_is_refused(dtype, values):
    with pytest.raises(InputError):
        encode_shard(ArraySpec(shape=(2, 1), dtype=dtype, chunk_rows=2), 0, values)


def test_wrong_block_is_refused(spec):
    for shard, block in ((0, np.zeros((7, 2, 3))), (2, np.zeros((8, 2, 3))), (3, np.zeros((8, 2, 3)))):
        with pytest.raises(InputError):
            encode_shard(spec, shard, block.astype(np.uint16))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (0, 2)},
        {"shape": ()},
        {"dtype": "object"},
        {"chunk_rows": 0},
        {"shard_rows": 6},
        {"profile": "lz4"},
        {"dimension_names": ("image",)},
        {"shape": (8, 2**30)},
    ],
)
def test_impossible_layout_is_refused(change):
    with pytest.raises(UsageError):
        ArraySpec(**{"shape": (8, 2), "dtype": "uint16", "chunk_rows": 4, "shard_rows": 8, **change})


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shard_rows", [8, None])
def test_every_flipped_bit_is_found(write_array, flip_bit, tmp_path, profile, shard_rows):
    spec = ArraySpec(shape=(10, 2), dtype="uint16", chunk_rows=4, shard_rows=shard_rows, profile=profile)
    folder = write_array(tmp_path / "array", spec, values_for(spec.shape, spec.dtype))
    shard = folder / spec.shard_key(1)
    whole = shard.read_bytes()
    for bit in np.random.default_rng(3).permutation(8 * len(whole))[:40]:
        flip_bit(shard, int(bit))
        with pytest.raises(CorruptError, match=r"c/1/0"):
            MappedArray(folder, verify="crc")
        shard.write_bytes(whole)
    MappedArray(folder, verify="crc")


def test_flipped_bit_in_index_is_found_when_opening(flip_bit, folder, spec):
    shard = folder / spec.shard_key(0)
    whole = shard.read_bytes()
    first = len(whole) - (16 * 2 + 4)
    for bit in range(8 * first, 8 * len(whole), 7):
        flip_bit(shard, bit)
        with pytest.raises(CorruptError, match=r"c/0/0/0 has a damaged shard index"):
            MappedArray(folder)
        shard.write_bytes(whole)


@pytest.mark.parametrize("shard_rows", [8, None])
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[1:]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b"\0" + path.read_bytes()),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "empty", "short", "beheaded", "long", "shifted", "folder"],
)
def test_harmed_shard_is_named(write_array, tmp_path, shard_rows, harm):
    spec = ArraySpec(shape=(21, 2, 3), dtype="uint16", chunk_rows=4, shard_rows=shard_rows)
    folder = write_array(tmp_path / "array", spec, values_for(spec.shape, spec.dtype))
    harm(folder / spec.shard_key(1))
    with pytest.raises(CorruptError, match=r"c/1/0/0") as caught:
        MappedArray(folder)
    assert caught.value.path == str(folder / spec.shard_key(1))


@pytest.mark.parametrize("shard", [1, 2])
def test_missing_shard_folder_is_named(folder, shard):
    (folder / f"c/{shard}/0/0").unlink()
    (folder / f"c/{shard}/0").rmdir()
    (folder / f"c/{shard}").rmdir()
    with pytest.raises(CorruptError, match=rf"c/{shard}/0/0 is missing"):
        MappedArray(folder)


def test_stray_file_of_a_killed_writer_is_ignored(folder, spec):
    (folder / "c" / "0" / "0" / "0.1a2b.partial").write_bytes(b"half")
    (folder / "c" / "7.1a2b.partial").write_bytes(b"half")
    np.testing.assert_array_equal(MappedArray(folder, verify="crc").read(), values_for(spec.shape, spec.dtype))


def test_chunks_in_another_order_are_read_through_zarr(folder, spec):
    shard = folder / spec.shard_key(0)
    data, step = shard.read_bytes(), spec.chunk_bytes + 4
    index = np.array([[step, step], [0, step]], "<u8").tobytes()
    shard.write_bytes(data[step : 2 * step] + data[:step] + index + crc32c(index))
    array = MappedArray(folder, verify="crc")
    assert not array.is_mapped
    np.testing.assert_array_equal(array.read(), values_for(spec.shape, spec.dtype))


def edited(folder: Path, *path: str | int, value: object) -> Path:
    document = json.loads((folder / "zarr.json").read_text())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    (folder / "zarr.json").write_text(json.dumps(document))
    return folder


SHARDING = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shape",), [25, 2, 3]),
        (("shape",), [16, 2, 3]),
        (("shape",), [21, 6]),
        (("shape",), [10**12, 2, 3]),
        (("shape",), [21, 10**12, 3]),
        (("shape",), [21, 2, 10**30]),
        (("shape",), [-1, 2, 3]),
        (("shape",), [True, 2, 3]),
        (("shape",), []),
        (("shape",), None),
        (("data_type",), "uint32"),
        (("data_type",), "uint8"),
        (("data_type",), "object"),
        (("data_type",), {"name": "struct"}),
        (("chunk_grid", "configuration", "chunk_shape"), [16, 2, 3]),
        (("chunk_grid", "configuration", "chunk_shape"), [10**13, 2, 3]),
        (("chunk_grid", "name"), "rectilinear"),
        ((*SHARDING, "chunk_shape"), [2, 2, 3]),
        ((*SHARDING, "chunk_shape"), [4, 1, 3]),
        ((*SHARDING, "codecs"), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ((*SHARDING, "codecs", 0, "configuration", "endian"), "big"),
        ((*SHARDING, "codecs", 1, "name"), "zstd"),
        ((*SHARDING, "index_location"), "start"),
        (("codecs",), [{"name": "numcodecs.pickle"}]),
        (("codecs",), None),
        (("chunk_key_encoding", "name"), "v2"),
        (("storage_transformers",), [{"name": "anything"}]),
        (("fill_value",), 70_000),
        (("fill_value",), "NaN"),
        (("node_type",), "group"),
        (("zarr_format",), 2),
        (("dimension_names",), ["image"]),
        (("attributes",), 7),
    ],
    ids=str,
)
def test_edited_metadata_is_refused(folder, path, value):
    edited(folder, *path, value=value)
    with pytest.raises(CorruptError):
        MappedArray(folder, verify="crc")


def test_huge_shape_is_refused_quickly(folder):
    for shape in ([10**12, 2, 3], [21, 10**12, 3]):
        edited(folder, "shape", value=shape)
        started = time.monotonic()
        tracemalloc.start()
        try:
            with pytest.raises(CorruptError):
                MappedArray(folder)
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50, b'{"a": NaN}', b"\xff\xfe", b"1" * 5000, b"{} {}"],
    ids=["empty", "cut", "deep", "nested", "nan", "binary", "number", "two"],
)
def test_bad_json_is_refused(folder, data):
    (folder / "zarr.json").write_bytes(data)
    with pytest.raises(CorruptError, match=r"zarr\.json"):
        MappedArray(folder)


def test_large_metadata_is_refused(folder):
    (folder / "zarr.json").write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(CorruptError, match="larger"):
        MappedArray(folder)


def test_metadata_is_cut_at_every_byte(folder):
    whole = (folder / "zarr.json").read_bytes()
    for length in range(0, len(whole), 37):
        (folder / "zarr.json").write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            MappedArray(folder)
