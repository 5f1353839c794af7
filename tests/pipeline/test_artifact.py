"""The three levels of checking: every flipped bit, missing, longer, swapped or forged file is found where it is promised."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from tiny_stages import load, run_all

from pipeline.artifact import (
    DIGEST,
    MANIFEST,
    check_data,
    manifest_bytes,
    open_artifact,
    read_manifest,
    verify_artifact,
)
from pipeline.errors import CorruptError
from pipeline.keys import sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    return {step: artifact.path for step, artifact in run_all(load(folder), folder / "store").items()}


@pytest.fixture
def numbers(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an artifact of a sharded array."""
    return shutil.copytree(made["numbers"], tmp_path / "numbers")


@pytest.fixture
def words(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an artifact of plain files."""
    return shutil.copytree(made["sum"], tmp_path / "sum")


def levels(path: Path) -> set[str]:
    """The levels of checking that refuse this artifact."""
    refused = set()
    for name, level in {
        "open": open_artifact,
        "use": lambda path: check_data(read_manifest(path)),
        "verify": verify_artifact,
    }.items():
        try:
            level(path)
        except CorruptError:
            refused.add(name)
    return refused


def forge(path: Path, **changes: object) -> None:
    """Change the manifest and give it the right digest, as somebody would who means harm."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    write_manifest(path, manifest_bytes({**manifest, **changes}))


def write_manifest(path: Path, raw: bytes) -> None:
    (path / MANIFEST).write_bytes(raw)
    (path / DIGEST).write_text(sha256(raw))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_whole_artifact_passes_every_level(numbers: Path, words: Path) -> None:
    assert levels(numbers) == levels(words) == set()
    (words / "log" / "anything").write_text("the log is outside")
    assert levels(words) == set()


def test_the_manifest_says_nothing_of_time_place_or_process(made: dict[str, Path]) -> None:
    text = (made["sum"] / MANIFEST).read_text()
    manifest = json.loads(text)
    assert sorted(manifest) == [
        "config",
        "externals",
        "facts",
        "files",
        "format",
        "inputs",
        "key",
        "kind",
        "stage",
        "version",
    ]
    assert manifest["inputs"] == {
        "numbers": {"stage": "count", "key": made["numbers"].name, "digest": read_manifest(made["numbers"]).content}
    }
    assert "/" not in text.replace("deep/er/words.txt", "")


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_is_found_at_use(numbers: Path, words: Path, seed: int) -> None:
    chance = random.Random(seed)
    root = chance.choice([numbers, words])
    path = chance.choice([file for file in sorted(root.rglob("*")) if file.is_file() and "log" not in file.parts])
    flip(path, chance.randrange(8 * path.stat().st_size))
    assert levels(root) >= {"use", "verify"}, path
    if path.name in (MANIFEST, DIGEST, "zarr.json"):
        assert "open" in levels(root)


def test_a_flipped_bit_in_a_shard_index_is_found_at_open(numbers: Path) -> None:
    shard = numbers / "numbers" / "c" / "1" / "0"
    flip(shard, 8 * (shard.stat().st_size - 10))
    assert "open" in levels(numbers)


@pytest.mark.parametrize("change", ["missing", "empty", "truncated", "extra", "folder", "link", "folder-link"])
@pytest.mark.parametrize("name", ["deep/er/words.txt", "sum.txt"])
def test_size_and_kind_are_checked_at_open(words: Path, name: str, change: str) -> None:
    path = words / name
    data = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change == "link":
        (words.parent / "elsewhere").write_bytes(data)
        path.symlink_to(words.parent / "elsewhere")
    elif change == "folder-link":
        path.write_bytes(data)
        outside = words.parent / "outside"
        (words / "deep").rename(outside)
        (words / "deep").symlink_to(outside)
    elif change != "missing":
        path.write_bytes({"empty": b"", "truncated": data[:-1], "extra": data + b"\0"}[change])
    with pytest.raises(CorruptError) as caught:
        open_artifact(words)
    assert str(words) in str(caught.value.path)


@pytest.mark.parametrize("change", ["missing", "empty", "truncated", "extra"])
def test_a_damaged_shard_is_named_at_open(numbers: Path, change: str) -> None:
    shard = numbers / "numbers" / "c" / "2" / "0"
    data = shard.read_bytes()
    shard.unlink()
    if change != "missing":
        shard.write_bytes({"empty": b"", "truncated": data[:-1], "extra": data + b"\0"}[change])
    with pytest.raises(CorruptError, match="c/2/0"):
        open_artifact(numbers)


def test_a_surplus_file_is_found_by_verify(words: Path) -> None:
    (words / "deep" / "note.txt").touch()
    assert levels(words) == {"verify"}


def test_a_file_of_another_artifact_of_the_same_size_is_found_at_use(numbers: Path, tmp_path: Path) -> None:
    other = run_all(load(tmp_path, "numbers.seed=9"), tmp_path / "store")["numbers"].path
    for name in ("numbers/c/0/0", "numbers/zarr.json"):
        shutil.copy(other / name, numbers / name)
    assert levels(numbers) == {"verify"}  # a whole shard with its own checksums: crc32c cannot know where it belongs
    words = run_all(load(tmp_path, "sum.scale=3.0"), tmp_path / "store")["sum"].path
    shutil.copy(words / MANIFEST, numbers / MANIFEST)
    assert levels(numbers) == {"open", "use", "verify"}


def test_a_newer_format_asks_for_a_newer_version_and_alters_nothing(words: Path) -> None:
    forge(words, format=2)
    before = {path: path.read_bytes() for path in words.rglob("*") if path.is_file()}
    with pytest.raises(CorruptError, match="format 2 and needs a newer version") as caught:
        open_artifact(words)
    assert "upgrade" in str(caught.value.hint)
    assert {path: path.read_bytes() for path in words.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [0, -1, "1", None, True, 1.5])
def test_no_format_is_refused(words: Path, number: object) -> None:
    forge(words, format=number)
    assert "open" in levels(words)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "./x", "", "a\\b", "x/", "a\0b", "manifest.json", "log/run.json"],
)
def test_names_that_leave_the_artifact_are_refused(words: Path, name: str) -> None:
    forge(words, files=[{"path": name, "size": 0, "sha256": sha256(b"")}])
    assert levels(words) == {"open", "use", "verify"}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"path": "x"}]},
        {"files": [{"path": "x", "size": "1", "sha256": ""}]},
        {"files": [3]},
        {"files": {}},
        {"key": 3},
        {"version": "1"},
        {"config": []},
        {"facts": None},
    ],
)
def test_a_manifest_of_other_fields_is_refused(words: Path, changes: dict[str, object]) -> None:
    forge(words, **changes)
    assert levels(words) == {"open", "use", "verify"}


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"[" * 10**6 + b"]" * 10**6,
        b'"' + b"\\" * 10**6,
        b"nonsense",
        b"",
        b"null",
        b"\xff\xfe",
        b"1" * 10**5,
    ],
    ids=lambda raw: f"{raw[:8]!r}x{len(raw)}",
)
def test_forged_json_is_refused_within_a_second(words: Path, raw: bytes) -> None:
    write_manifest(words, raw)
    started = time.process_time()
    with pytest.raises(CorruptError):
        open_artifact(words)
    assert time.process_time() - started < 1.0


def test_a_huge_manifest_is_not_read(words: Path) -> None:
    with (words / MANIFEST).open("r+b") as file:
        file.truncate(10**12)  # sparse
    started = time.process_time()
    assert "open" in levels(words)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("shape", [[10**12, 1], [10**30, 1], [8, 1], [-1, 1], [7, 10**12]])
def test_forged_array_metadata_is_refused_within_a_second(numbers: Path, shape: list[int]) -> None:
    path = numbers / "numbers" / "zarr.json"
    document = {**json.loads(path.read_bytes()), "shape": shape}
    path.write_text(json.dumps(document))
    files = json.loads((numbers / MANIFEST).read_bytes())["files"]
    data = path.read_bytes()
    forge(
        numbers,
        files=[
            {"path": "numbers/zarr.json", "size": len(data), "sha256": sha256(data)}
            if entry["path"] == "numbers/zarr.json"
            else entry
            for entry in files
        ],
    )
    started = time.process_time()
    assert levels(numbers) == {"open", "use", "verify"}
    assert time.process_time() - started < 1.0


def test_what_is_no_artifact_is_said(tmp_path: Path, words: Path) -> None:
    (words / MANIFEST).unlink()
    for path in (words, tmp_path / "nothing"):
        with pytest.raises(CorruptError, match="is not an artifact"):
            open_artifact(path)


def test_an_unlisted_name_is_refused(made: dict[str, Path]) -> None:
    artifact = open_artifact(made["sum"])
    assert artifact.file("sum.txt").read_text().endswith(".0")
    with pytest.raises(CorruptError, match=r"has no file other\.txt"):
        artifact.file("other.txt")
