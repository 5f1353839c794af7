"""Token sets: what is written, what is read, and what is refused, naming the place."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

import smalti
from smalti.tokens import decode_keys, encode_keys

GOLDEN = Path(__file__).parents[1] / "golden" / "tokens"


def rewrite(path: Path, **changes: object) -> None:
    """Edits the smalti attributes of a group."""
    document = json.loads(path.read_text())
    document["attributes"]["smalti"].update(changes)
    path.write_text(json.dumps(document))


def without_sums(token_set: smalti.TokenSet) -> Path:
    (token_set.path / "SHA256SUMS").unlink()
    return token_set.path


def with_manifest(folder: Path, **changes: object) -> Path:
    """Gives a folder the manifest that an artifact has."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("manifest."))
    entries = [
        {
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
    data = json.dumps({"format": 1, "stage": "pretokenize", "files": entries, **changes}).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n")
    return folder


def make(path: Path, codes_ICT: np.ndarray, **changes: object) -> smalti.TokenSet:
    return smalti.create_tokens(
        path, codes_ICT, **{"labels": np.arange(50) % 10, "codes": 500, "grid": (2, 4), "name": "tiny", **changes}
    )


def test_what_was_written_is_read(token_set, codes_ICT):
    found = smalti.verify_tokens(token_set.path)
    np.testing.assert_array_equal(np.asarray(found.tokens), codes_ICT)
    np.testing.assert_array_equal(found.labels, np.arange(50) % 10)
    assert found.keys[7] == "käse/007"
    assert (found.n_images, found.n_crops, found.grid, found.codes, len(found)) == (50, 3, (2, 4), 500, 150)
    assert found.boxes is None
    np.testing.assert_array_equal(found.codes_of([0, 149, 4]), codes_ICT.reshape(150, 8)[[0, 149, 4]])
    assert found.labels_of([0, 149, 4]).tolist() == [0, 9, 1]


def test_any_zarr_reader_opens_it(token_set, codes_ICT):
    group = zarr.open_group(token_set.path, mode="r")
    np.testing.assert_array_equal(group["tokens"][:], codes_ICT)
    assert group["tokens"].metadata.dimension_names == ("image", "crop", "token")
    assert group["tokens"].fill_value == 65_535
    assert group["tokens"].shards == (16, 3, 8)
    assert group["labels"].dtype == np.int32
    assert bytes(group["keys"][7]).decode() == "käse/007"
    assert group.attrs["smalti"]["format"] == 1


def test_zarr_does_not_warn_of_the_files_beside_the_arrays(token_set):
    (token_set.path / "manifest.json").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(token_set.path, mode="r")
        assert sorted(group) == sorted(name for name, _ in group.members()) == ["keys", "labels", "tokens"]
        assert "tokens (50, 3, 8) uint16" in str(group.tree())
        for name, array in group.arrays():
            alone = zarr.open_array(token_set.path / name, mode="r")
            assert array.metadata == alone.metadata
            np.testing.assert_array_equal(array[:], alone[:])


@pytest.mark.parametrize(
    ("codes", "dtype"), [(2, "uint16"), (65_535, "uint16"), (65_536, "uint32"), (262_144, "uint32")]
)
def test_dtype_leaves_its_maximum_free(tmp_path, codes, dtype):
    highest = np.full((3, 1, 8), codes - 1)
    found = make(tmp_path / "set", highest, labels=[0, 1, 2], codes=codes)
    assert found.tokens.dtype == dtype
    np.testing.assert_array_equal(found.tokens.read(), highest)
    assert zarr.open_group(found.path, mode="r")["tokens"].fill_value == np.iinfo(dtype).max


def test_random_crops_keep_their_boxes(tmp_path, codes_ICT):
    boxes = np.random.default_rng(1).random((50, 3, 5), dtype=np.float32)
    found = make(tmp_path / "set", codes_ICT, boxes=boxes, shard_images=16, chunk_images=4)
    np.testing.assert_array_equal(found.boxes.read(), boxes)
    np.testing.assert_array_equal(found.boxes.rows([149, 3], axes=2), boxes.reshape(150, 5)[[149, 3]])


@pytest.mark.parametrize("profile", ["transport", "zstd"])
def test_other_profiles_hold_the_same(tmp_path, codes_ICT, profile):
    found = make(tmp_path / "set", codes_ICT, profile=profile, shard_images=16, chunk_images=4)
    np.testing.assert_array_equal(smalti.verify_tokens(found.path).tokens.read(), codes_ICT)


def test_one_crop_may_come_without_its_axis(tmp_path, codes_ICT):
    found = make(tmp_path / "set", codes_ICT[:, 0], class_names=[*"abcdefghij"])
    np.testing.assert_array_equal(found.tokens.read(), codes_ICT[:, :1])
    assert found.attributes.class_names == tuple("abcdefghij")
    assert found.keys[3] == "03"


def test_same_input_gives_same_bytes(tmp_path, codes_ICT):
    first, second = (make(tmp_path / name, codes_ICT).path for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [(first / name).read_bytes() for name in files] == [(second / name).read_bytes() for name in files]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"codes": 499}, r"row \d+ \(image \d+, crop \d\) holds code 499 at token \d, expected 0 to 498"),
        ({"labels": [-1] + [0] * 49}, "row 0 .* holds label -1"),
        ({"labels": [0] * 49 + [10], "classes": 10}, "row 49 .* holds label 10, expected 0 to 9"),
        ({"labels": [0] * 49}, "labels"),
        ({"grid": (2, 2)}, "tokens have shape"),
        ({"keys": ["a"] * 50}, "is used for more than one"),
        ({"keys": [""] * 50}, "is not a valid key"),
        ({"keys": ["a", "b"]}, "keys have shape"),
        ({"boxes": np.zeros((50, 3, 4))}, "boxes have shape"),
    ],
)
def test_foreign_data_that_does_not_fit_is_refused(tmp_path, codes_ICT, changes, sentence):
    codes_ICT[4, 1, 2] = 499
    with pytest.raises(smalti.InputError, match=sentence):
        make(tmp_path / "set", codes_ICT, **changes)
    assert list(tmp_path.iterdir()) == []


def test_negative_code_is_refused(tmp_path, codes_ICT):
    signed = codes_ICT.astype(np.int64)
    signed[20, 2, 1] = -1
    with pytest.raises(smalti.InputError, match=r"row 62 \(image 20, crop 2\) holds code -1 at token 1"):
        make(tmp_path / "set", signed)


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": 0},
        {"codes": 2**32},
        {"grid": (0, 8)},
        {"grid": 8},
        {"factors": (5, 10)},
        {"class_names": ("one",), "classes": 10},
        {"crops": ({"id": 1},)},
        {"value_range": (0.0, float("nan"))},
        {"shard_images": 100},
    ],
)
def test_impossible_description_is_refused(tmp_path, codes_ICT, changes):
    with pytest.raises(smalti.UsageError):
        make(tmp_path / "set", codes_ICT, **changes)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(token_set, codes_ICT):
    before = (token_set.path / "zarr.json").read_bytes()
    with pytest.raises(smalti.UsageError, match="exists"):
        make(token_set.path, codes_ICT)
    assert (token_set.path / "zarr.json").read_bytes() == before


def test_failure_while_writing_leaves_nothing(tmp_path, codes_ICT, monkeypatch):
    monkeypatch.setattr("smalti.writing.os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path / "set", codes_ICT)
    assert list(tmp_path.iterdir()) == []


def test_poked_values_are_found_with_their_row(tmp_path, codes_ICT):
    found = make(tmp_path / "set", codes_ICT, shard_images=16, chunk_images=4)
    group = zarr.open_group(without_sums(found), mode="r+")
    for value, place in ((500, (33, 2, 5)), (65_535, (20, 0, 0))):
        group["tokens"][place] = value
        with pytest.raises(smalti.CorruptError, match=rf"row {3 * place[0] + place[1]} \(image {place[0]}, .*{value}"):
            smalti.verify_tokens(found.path)
    group["tokens"][:] = codes_ICT
    for value in (-1, 10):
        group["labels"][12] = value
        with pytest.raises(smalti.CorruptError, match=rf"labels: row 12 .* label {value}, expected 0 to 9"):
            smalti.verify_tokens(found.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_images": 51},
        {"n_images": 2**60},
        {"n_crops": 2},
        {"grid": [4, 4]},
        {"grid": [2]},
        {"codes": 70_000},
        {"codes": -1},
        {"codes": "500"},
        {"codes": True},
        {"classes": None},
        {"name": ""},
        {"class_names": "abc"},
        {"tokenizer": []},
    ],
    ids=str,
)
def test_edited_attributes_are_refused(token_set, changes):
    rewrite(without_sums(token_set) / "zarr.json", **changes)
    with pytest.raises(smalti.CorruptError):
        smalti.open_tokens(token_set.path)


def test_a_larger_shape_in_the_padding_is_refused(token_set):
    path = without_sums(token_set) / "tokens" / "zarr.json"
    document = json.loads(path.read_text())
    document["shape"][0] = 52  # fits the last chunk, which is padded
    path.write_text(json.dumps(document))
    with pytest.raises(smalti.CorruptError, match="attributes it must be"):
        smalti.open_tokens(token_set.path)


@pytest.mark.parametrize("format_", [2, 99])
def test_future_format_is_refused_and_untouched(token_set, format_):
    path = without_sums(token_set) / "zarr.json"
    rewrite(path, format=format_)
    before = path.read_bytes()
    with pytest.raises(smalti.CorruptError, match=f"needs version >= {format_}"):
        smalti.open_tokens(token_set.path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("format_", [0, -1, "1", None, 1.5, True])
def test_unknown_format_is_refused(token_set, format_):
    rewrite(without_sums(token_set) / "zarr.json", format=format_)
    with pytest.raises(smalti.CorruptError, match="format version"):
        smalti.open_tokens(token_set.path)


def test_unknown_fields_are_kept(token_set):
    rewrite(without_sums(token_set) / "zarr.json", curator="somebody")
    assert smalti.open_tokens(token_set.path).attributes.extra == {"curator": "somebody"}


def test_other_folders_are_no_token_sets(tmp_path):
    with pytest.raises(smalti.InputError, match="not a folder"):
        smalti.open_tokens(tmp_path / "nowhere")
    with pytest.raises(smalti.CorruptError, match=r"zarr\.json is missing"):
        smalti.open_tokens(tmp_path)
    zarr.create_group(tmp_path / "group", attributes={"other": 1})
    with pytest.raises(smalti.CorruptError, match="no attributes named smalti"):
        smalti.open_tokens(tmp_path / "group")


@pytest.mark.parametrize("name", ["tokens", "labels", "keys"])
def test_missing_array_is_named(token_set, name):
    shutil.rmtree(without_sums(token_set) / name)
    with pytest.raises(smalti.CorruptError, match=rf"{name}/zarr\.json is missing"):
        smalti.open_tokens(token_set.path)


@pytest.mark.parametrize("prepare", [with_manifest, lambda folder: folder], ids=["manifest", "sums"])
def test_levels_of_verification(token_set, prepare, flip_bit):
    folder = prepare(token_set.path)
    smalti.open_tokens(folder, verify="sha256")
    flip_bit(folder / "README.md", 9)
    for level in ("index", "crc"):
        smalti.open_tokens(folder, verify=level)
    with pytest.raises(smalti.CorruptError, match=r"README\.md has SHA-256"):
        smalti.open_tokens(folder, verify="sha256")
    flip_bit(folder / "README.md", 9)
    flip_bit(folder / "tokens" / "c" / "1" / "0" / "0", 100)
    smalti.open_tokens(folder)
    with pytest.raises(smalti.CorruptError, match=r"tokens/c/1/0/0"):
        smalti.open_tokens(folder, verify="crc")
    with pytest.raises(smalti.UsageError, match="verify"):
        smalti.open_tokens(folder, verify="quick")


def test_sha256_needs_a_list(token_set):
    with pytest.raises(smalti.UsageError, match="neither"):
        smalti.open_tokens(without_sums(token_set), verify="sha256")
    assert smalti.verify_tokens(token_set.path).n_images == 50


@pytest.mark.parametrize("prepare", [with_manifest, lambda folder: folder], ids=["manifest", "sums"])
@pytest.mark.parametrize("name", ["zarr.json", "tokens/zarr.json", "keys/zarr.json"])
def test_flipped_bit_in_metadata_is_found_when_opening(token_set, prepare, name, flip_bit):
    folder = prepare(token_set.path)
    path = folder / name
    whole = path.read_bytes()
    for bit in np.random.default_rng(4).permutation(8 * len(whole))[:8]:
        flip_bit(path, int(bit))
        with pytest.raises(smalti.CorruptError):
            smalti.open_tokens(folder)
        path.write_bytes(whole)


def test_flipped_bit_in_manifest_is_found_when_opening(token_set, flip_bit):
    folder = with_manifest(token_set.path)
    for name in ("manifest.json", "manifest.sha256"):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * 60, 29):
            flip_bit(folder / name, bit)
            with pytest.raises(smalti.CorruptError, match="manifest"):
                smalti.open_tokens(folder)
            (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_half_a_manifest_is_refused(token_set, name):
    (with_manifest(token_set.path) / name).unlink()
    with pytest.raises(smalti.CorruptError, match=rf"{name} is missing"):
        smalti.open_tokens(token_set.path)


def test_swapped_file_is_found(tmp_path, token_set, codes_ICT):
    other = make(tmp_path / "other", codes_ICT[::-1], shard_images=16, chunk_images=4)
    folder = with_manifest(token_set.path)
    shutil.copy(other.path / "tokens" / "c" / "0" / "0" / "0", folder / "tokens" / "c" / "0" / "0" / "0")
    with pytest.raises(smalti.CorruptError, match=r"tokens/c/0/0/0 has SHA-256"):
        smalti.open_tokens(folder, verify="sha256")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "tokens/../../secret", "a\\b", "", "a//b", "./a", "C:/x", 5]
)
def test_names_that_leave_the_folder_are_refused(token_set, name):
    folder = with_manifest(token_set.path, files=[{"path": name, "size": 1, "sha256": "0" * 64}])
    with pytest.raises(smalti.CorruptError, match="is outside of its folder"):
        smalti.open_tokens(folder)


@pytest.mark.parametrize("line", ["0" * 64 + "  ../secret", "0" * 63 + "  a", "hello", "0" * 64 + " a"])
def test_bad_sums_are_refused(token_set, line):
    with (token_set.path / "SHA256SUMS").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(smalti.CorruptError, match="SHA256SUMS"):
        smalti.open_tokens(token_set.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": "x"},
        {"files": None},
        {"files": [7]},
        {"files": []},
        {"files": [{"path": "zarr.json"}]},
    ],
)
def test_bad_manifest_is_refused(token_set, changes):
    with pytest.raises(smalti.CorruptError, match=r"manifest\.json"):
        smalti.open_tokens(with_manifest(token_set.path, **changes))


def test_keys_survive():
    keys = ["a", "ä" * 50, "n01440764/n01440764_10026.JPEG"]
    assert decode_keys(encode_keys(keys), "keys") == keys
    with pytest.raises(smalti.InputError):
        encode_keys(["a\0"])
    with pytest.raises(smalti.CorruptError, match="UTF-8"):
        decode_keys(np.array([[255]], np.uint8), "keys")


def test_load_reads_all_or_refuses(token_set, codes_ICT, monkeypatch):
    loaded = token_set.load()
    shutil.rmtree(token_set.path / "tokens")
    np.testing.assert_array_equal(loaded.codes_of([149, 0]), codes_ICT.reshape(150, 8)[[149, 0]])
    np.testing.assert_array_equal(loaded.tokens[3:5], codes_ICT[3:5])
    with pytest.raises(IndexError):
        loaded.codes_of([150])
    monkeypatch.setattr("smalti.memory.free_memory", lambda: 2 * codes_ICT.nbytes - 1)
    with pytest.raises(smalti.UsageError, match="more than half"):
        token_set.load()


def test_dataset_gives_one_or_many(token_set, codes_ICT):
    dataset = token_set.dataset()
    assert len(dataset) == 150
    codes_T, label = dataset[37]
    assert (codes_T.dtype, label) == (np.int64, 37 // 3 % 10)
    np.testing.assert_array_equal(codes_T, codes_ICT.reshape(150, 8)[37])
    np.testing.assert_array_equal(dataset[-1][0], codes_ICT[-1, -1])
    many = dataset.__getitems__([5, 140, 5])
    np.testing.assert_array_equal([codes for codes, _ in many], codes_ICT.reshape(150, 8)[[5, 140, 5]])
    with pytest.raises(IndexError):
        dataset[150]


def test_a_set_travels_between_processes(token_set, codes_ICT):
    found = pickle.loads(pickle.dumps(token_set))
    np.testing.assert_array_equal(found.codes_of([8, 3]), codes_ICT.reshape(150, 8)[[8, 3]])
    assert found.attributes == token_set.attributes


def test_old_version_stays_readable():
    """The golden set was written in format version 1: codes (i * 7 + c * 3 + t) % 300, labels i % 5."""
    found = smalti.verify_tokens(GOLDEN)
    image, crop, token = np.ogrid[:20, :2, :16]
    np.testing.assert_array_equal(found.tokens.read(), (image * 7 + crop * 3 + token) % 300)
    assert found.labels.tolist() == [number % 5 for number in range(20)]
    assert found.keys == [f"image-{number:02d}.png" for number in range(20)]
    np.testing.assert_array_equal(found.boxes.read()[4], np.full((2, 5), 4.5))
    assert found.attributes.tokenizer["family"] == "golden"
    assert found.attributes.crops == ({"id": "plain", "flip": False}, {"id": "flipped", "flip": True})
