"""Trees: what a store remembers of folders, what makes it list them anew, and that a remembered id is the listed one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.images import FolderSource, identify
from pipeline.images import sources as image_sources
from pipeline.trees import RECORDS, Memory, Tree, mark

HOUR_NS = 3_600_000_000_000


class Listed:
    """An image folder whose listings are counted."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.count = root, 0
        really = image_sources.list_folder

        def listing(*given: object) -> object:
            self.count += 1
            return really(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(image_sources, "list_folder", listing)

    def tree(self) -> Tree:
        found = identify(FolderSource(), self.root)
        assert isinstance(found, Tree)
        return found

    def ask(self, store: Path | None, *, rescan: bool = False) -> tuple[str, int]:
        """(content id, listings that it took) of a new process."""
        before = self.count
        return Memory(store, rescan).content_id(self.tree()), self.count - before


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def age(root: Path) -> None:
    """Every folder was modified an hour ago, each at a time of its own."""
    for number, folder in enumerate([root, *sorted(path for path in root.rglob("*") if path.is_dir())]):
        then = time.time_ns() - HOUR_NS + number
        os.utime(folder, ns=(then, then))


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listed:
    root = tmp_path / "images"
    for name in ("a/1.png", "a/deep/er/2.png", "b/3.png"):
        write(root / name, name.encode())
    write(tmp_path / "elsewhere" / "4.png", b"4")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    age(root)
    age(tmp_path / "elsewhere")
    (tmp_path / "store").mkdir()
    return Listed(root, monkeypatch)


def test_a_folder_that_was_not_modified_is_listed_once(listed: Listed, tmp_path: Path) -> None:
    first = listed.ask(tmp_path / "store")
    assert first[1] == 1
    assert listed.ask(tmp_path / "store") == (first[0], 0)
    assert listed.ask(tmp_path / "store", rescan=True) == first
    assert listed.ask(tmp_path / "store") == (first[0], 0)


@pytest.mark.parametrize("where", ["", "a", "a/deep", "a/deep/er", "c"])
def test_whatever_comes_or_goes_at_any_depth_is_noticed(listed: Listed, tmp_path: Path, where: str) -> None:
    before, _ = listed.ask(tmp_path / "store")
    write(listed.root / where / "new.d" / "5.png", b"55")
    assert listed.ask(tmp_path / "store")[1] == 1
    age(listed.root)
    age(tmp_path / "elsewhere")
    with_new, _ = listed.ask(tmp_path / "store")
    assert with_new != before
    (listed.root / where / "new.d" / "5.png").unlink()
    assert listed.ask(tmp_path / "store") == (before, 1)


def test_a_link_to_another_folder_is_noticed_though_old_files_are_in_it(listed: Listed, tmp_path: Path) -> None:
    before, _ = listed.ask(tmp_path / "store")
    write(tmp_path / "other" / "6.png", b"666")
    age(tmp_path / "other")
    then = listed.root.stat().st_mtime_ns
    (listed.root / "c").unlink()
    (listed.root / "c").symlink_to(tmp_path / "other")
    os.utime(listed.root, ns=(then, then))
    after, listings = listed.ask(tmp_path / "store")
    assert after != before
    assert listings == 1


def test_an_overwritten_file_is_seen_by_a_rescan_alone(listed: Listed, tmp_path: Path) -> None:
    before, _ = listed.ask(tmp_path / "store")
    (listed.root / "a" / "1.png").write_bytes(b"of another size")
    assert listed.ask(tmp_path / "store") == (before, 0)
    assert listed.ask(None)[0] != before
    found, listings = listed.ask(tmp_path / "store", rescan=True)
    assert found != before
    assert listings == 1
    assert listed.ask(tmp_path / "store") == (found, 0)


def test_the_time_of_a_young_folder_is_not_trusted(listed: Listed, tmp_path: Path) -> None:
    """Its next modification may come within the same tick, so the files in it are looked at."""
    now = time.time_ns()
    os.utime(listed.root / "a", ns=(now, now))
    before, _ = listed.ask(tmp_path / "store")
    assert listed.ask(tmp_path / "store") == (before, 0)
    (listed.root / "a" / "1.png").write_bytes(b"of another size")
    assert listed.ask(tmp_path / "store")[0] != before
    before, _ = listed.ask(tmp_path / "store")
    write(listed.root / "a" / "5.png", b"55")
    os.utime(listed.root / "a", ns=(now, now))
    assert listed.ask(tmp_path / "store")[0] != before
    assert mark(listed.root / "a").entries
    assert not mark(listed.root / "b").entries


def test_a_damaged_record_is_not_believed(listed: Listed, tmp_path: Path) -> None:
    before, _ = listed.ask(tmp_path / "store")
    (record,) = (tmp_path / "store" / RECORDS).iterdir()
    data = record.read_bytes()
    for damaged in (b"", data[:70], data.replace(before.encode(), before.encode()[::-1]), b"{}", b"\xff\n\xff"):
        record.write_bytes(damaged)
        assert listed.ask(tmp_path / "store") == (before, 1)
        assert record.read_bytes() == data


def test_problems_are_not_remembered_because_they_may_go_without_a_trace(listed: Listed, tmp_path: Path) -> None:
    (listed.root / "b" / "nothing.png").symlink_to(tmp_path / "later.png")
    age(listed.root)
    before, _ = listed.ask(tmp_path / "store")
    assert listed.ask(tmp_path / "store") == (before, 1)
    (tmp_path / "later.png").write_bytes(b"there now")
    assert listed.ask(tmp_path / "store")[0] != before


def test_other_rules_and_other_places_are_other_trees(listed: Listed, tmp_path: Path) -> None:
    listed.ask(tmp_path / "store")
    deep = identify(FolderSource(deep=True), listed.root)
    assert isinstance(deep, Tree)
    assert deep.name != listed.tree().name
    (tmp_path / "link").symlink_to(listed.root)
    by_link = identify(FolderSource(), tmp_path / "link")
    assert isinstance(by_link, Tree)
    assert by_link.name == listed.tree().name


def test_nothing_is_written_where_there_is_no_store(listed: Listed, tmp_path: Path) -> None:
    memory = Memory(tmp_path / "none")
    memory.content_id(listed.tree())
    assert not (tmp_path / "none").exists()
    (tmp_path / "none").mkdir()
    memory.save()
    assert listed.ask(tmp_path / "none")[1] == 0


def test_a_doubted_id_is_listed_again(listed: Listed, tmp_path: Path) -> None:
    found, _ = listed.ask(tmp_path / "store")
    memory = Memory(tmp_path / "store")
    assert memory.content_id(listed.tree()) == found
    assert not memory.doubt(["another"])
    assert memory.doubt([found])
    count = listed.count
    assert memory.content_id(listed.tree()) == found
    assert listed.count == count + 1
    assert not memory.doubt([found])
