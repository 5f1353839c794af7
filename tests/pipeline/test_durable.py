"""Durable writes: whole or not at all, no litter, refusals in words."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import durable
from pipeline.errors import CannotWrite, StorageError


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(durable, "watch", lambda what, path: calls.append((what, path.name)))
    return calls


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_whole_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    durable.write_file(path, b"long old text")
    durable.write_file(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["c.bin"]


def test_the_file_appears_only_with_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    states: dict[str, bool] = {}
    monkeypatch.setattr(durable, "watch", lambda what, path: states.setdefault(what, path.exists()))
    durable.write_file(path, b"1")
    assert states == {"write": False, "rename": False, "renamed": True}


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with suppress(KeyboardInterrupt), durable.writing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["x"])


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    with durable.writing(tmp_path / "x") as one, durable.writing(tmp_path / "x") as two:
        one.write_bytes(b"1")
        two.write_bytes(b"2")
        assert one != two
    assert names(tmp_path) == ["x"]


def test_every_operation_is_seen(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    durable.write_file(tmp_path / "a", b"")
    durable.append_line(tmp_path / "journal", b"x")
    durable.move(tmp_path / "a", tmp_path / "b")
    durable.remove(tmp_path / "b")
    durable.remove(tmp_path / "not there")
    write = [("write", "a"), ("rename", "a"), ("renamed", "a"), ("append", "journal"), ("appended", "journal")]
    assert seen == [*write, ("move", "b"), ("moved", "b"), ("remove", "b")]


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    for line in (b"one", b"two"):
        durable.append_line(tmp_path / "journal", line)
    assert (tmp_path / "journal").read_bytes() == b"one\ntwo\n"


def test_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("rename"), replace(path, target)))
    durable.write_file(tmp_path / "x", b"1")
    assert order == ["fsync", "rename"]


def test_remove_takes_links_and_not_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    durable.remove(tmp_path / "link")
    assert (tmp_path / "kept" / "file").exists()
    durable.remove(tmp_path / "kept")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("number", "words"), sorted(durable.REFUSALS.items()))
def test_refusals_are_73_in_words(number: int, words: str) -> None:
    with pytest.raises(CannotWrite, match=words) as caught, durable.refusals(Path("/x/y")):
        raise OSError(number, os.strerror(number))
    assert (caught.value.exit_code, caught.value.path) == (73, "/x/y")
    assert caught.value.hint


def test_what_is_read_meanwhile_is_not_called_a_refusal_to_write(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(IsADirectoryError), durable.writing(tmp_path / "draft" / "x"):
        (tmp_path / "images").read_bytes()
    assert names(tmp_path / "draft") == []
    elsewhere = tmp_path / "images" / "1.png"
    with pytest.raises(PermissionError), durable.refusals(tmp_path / "draft" / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(elsewhere))
    with pytest.raises(CannotWrite), durable.refusals(tmp_path / "draft" / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))


def test_a_failing_disk_is_74() -> None:
    with pytest.raises(StorageError) as caught, durable.refusals(Path("/x/y")):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.exit_code == 74


def test_a_folder_or_file_in_the_way_is_73(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(CannotWrite):
            durable.write_file(path, b"1")
    assert names(tmp_path) == ["file", "folder"]
