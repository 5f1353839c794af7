"""Drafts: what the journal proves is kept, everything else is swept, a commit is complete or absent."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import durable
from pipeline.artifact import verify_artifact
from pipeline.draft import JOURNAL, Draft, Request, finish, is_complete, write_files
from pipeline.errors import CorruptError
from pipeline.keys import sha256

REQUEST = Request("make", "things", 1, "k" * 64, {"a": 1}, {}, {})


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A draft with three units, then a death."""
    draft = Draft.open(tmp_path / ".k.partial", REQUEST)
    for number in range(3):
        draft.put(f"unit-{number}", {f"a/{number}.bin": bytes([number]) * 9, f"b/{number}.bin": b"b"})
    return draft.path


def test_units_are_found_again_in_their_order(partial: Path) -> None:
    draft = Draft.open(partial, REQUEST)
    assert draft.units() == ["unit-0", "unit-1", "unit-2"]
    assert draft.is_done("unit-1")
    assert draft.files("unit-1") == [partial / "a/1.bin", partial / "b/1.bin"]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_ignored_and_its_files_are_swept(partial: Path, cut: int) -> None:
    journal = partial / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    draft = Draft.open(partial, REQUEST)
    assert draft.units() == ["unit-0", "unit-1"]
    assert not list(partial.rglob("2.bin"))
    draft.put("unit-2", {"a/2.bin": b"again"})
    assert Draft.open(partial, REQUEST).units() == ["unit-0", "unit-1", "unit-2"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"unit": "unit-9", "fil',
        b"\0\0\0\0\n",
        b"[]\n",
        b'{"unit": "x"}\n',
        b'{"unit": "x", "files": [{"path": "../../x", "size": 0, "sha256": ""}]}\n',
    ],
)
def test_a_line_that_is_none_ends_the_journal(partial: Path, line: bytes) -> None:
    with (partial / JOURNAL).open("ab") as file:
        file.write(line)
    assert Draft.open(partial, REQUEST).units() == ["unit-0", "unit-1", "unit-2"]


@pytest.mark.parametrize("change", ["missing", "empty", "longer", "bit", "folder"])
def test_a_unit_with_one_bad_file_goes_whole(partial: Path, change: str) -> None:
    path = partial / "a/1.bin"
    data = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes({"empty": b"", "longer": data + b"1", "bit": bytes([data[0] ^ 4]) + data[1:]}[change])
    draft = Draft.open(partial, REQUEST)
    assert draft.units() == ["unit-0", "unit-2"]
    assert not (partial / "b/1.bin").exists()
    draft.put("unit-1", {"a/1.bin": data} if change != "folder" else {"c.bin": data})


def test_strays_are_swept_and_the_log_stays(partial: Path) -> None:
    for name in (
        "a/3.bin.1234-abcd.partial",
        "a/0.bin.partial",
        "new/x.bin",
        "manifest.json",
        "log/run.json.1-2.partial",
    ):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(b"?")
    (partial / "log" / "metrics.jsonl").write_text("{}\n")
    Draft.open(partial, REQUEST)
    names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    assert names == [
        "a/0.bin",
        "a/1.bin",
        "a/2.bin",
        "b/0.bin",
        "b/1.bin",
        "b/2.bin",
        JOURNAL,
        "log/metrics.jsonl",
        "request.json",
    ]


def test_a_dropped_unit_is_gone_also_if_its_files_outlived_the_kill(
    partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft.open(partial, REQUEST)
    monkeypatch.setattr(durable, "remove", lambda path: None)
    draft.drop("unit-1")
    monkeypatch.undo()
    assert (partial / "a/1.bin").exists()
    assert Draft.open(partial, REQUEST).units() == ["unit-0", "unit-2"]
    assert not (partial / "a/1.bin").exists()


@pytest.mark.parametrize("seed", range(8))
def test_any_history_is_replayed(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    draft = Draft.open(tmp_path / "p", REQUEST)
    want: dict[str, bytes] = {}
    for _ in range(15):
        unit = f"unit-{chance.randrange(5)}"
        if unit in want and chance.random() < 0.4:
            draft.drop(unit)
            del want[unit]
        else:
            want[unit] = bytes([chance.randrange(256)])
            draft.put(unit, {f"{unit}.bin": want[unit]})
    again = Draft.open(tmp_path / "p", REQUEST)
    assert {unit: again.files(unit)[0].read_bytes() for unit in again.units()} == want


def test_a_large_file_is_hashed_and_recorded(partial: Path) -> None:
    draft = Draft.open(partial, REQUEST)
    with draft.writing("large", "large.bin") as path:
        path.write_bytes(b"large")
    assert {"path": "large.bin", "size": 5, "sha256": sha256(b"large")} in [
        entry.as_json() for entry in draft.entries()
    ]
    with suppress(KeyboardInterrupt), draft.writing("other", "other.bin") as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not draft.is_done("other")
    assert not list(partial.glob("other*"))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "manifest.json", "log/x"])
def test_files_outside_are_refused_before_any_write(partial: Path, name: str) -> None:
    draft = Draft.open(partial, REQUEST)
    with pytest.raises(CorruptError), draft.writing("x", name):
        pass
    with pytest.raises(CorruptError):
        write_files(partial, {name: b"x"})
    assert not (partial.parent / "x").exists()


def test_a_commit_holds_the_units_alone(partial: Path, tmp_path: Path) -> None:
    draft = Draft.open(partial, REQUEST)
    draft.put("checkpoint", {"scratch/state.bin": b"s"})
    (partial / "a" / "3.bin.77-dead.partial").write_bytes(b"a worker died in the middle of this")
    draft.facts["units"] = 3
    draft.figure = "3 units"
    draft.commit(tmp_path / "final")
    artifact = verify_artifact(tmp_path / "final")
    assert sorted(artifact.files) == ["a/0.bin", "a/1.bin", "a/2.bin", "b/0.bin", "b/1.bin", "b/2.bin"]
    assert (artifact.facts, artifact.figure) == ({"units": 3}, "3 units")
    assert not partial.exists()
    assert not (tmp_path / "final" / "scratch").exists()


def test_the_manifest_does_not_depend_on_the_order_of_units(tmp_path: Path) -> None:
    digests = set()
    for order in ([0, 1, 2], [2, 0, 1]):
        draft = Draft.open(tmp_path / f"p{order[0]}", REQUEST)
        for number in order:
            draft.put(f"unit-{number}", {f"{number}.bin": bytes([number])})
        draft.commit(tmp_path / f"f{order[0]}")
        digests.add(verify_artifact(tmp_path / f"f{order[0]}").digest)
    assert len(digests) == 1


def test_an_interrupted_commit_is_finished_only_for_its_own_request(
    partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(what: str, path: Path) -> None:
        if what == "move":
            raise KeyboardInterrupt

    monkeypatch.setattr(durable, "watch", die)
    with pytest.raises(KeyboardInterrupt):
        Draft.open(partial, REQUEST).commit(tmp_path / "final")
    monkeypatch.undo()
    other = Request("make", "things", 1, "k" * 64, {"a": 1}, {"x": {"stage": "s", "key": "k", "digest": "other"}}, {})
    assert is_complete(partial, REQUEST)
    assert not is_complete(partial, other)
    finish(partial, tmp_path / "final")
    assert verify_artifact(tmp_path / "final").key == REQUEST.key


def test_the_journal_is_lines_of_json(partial: Path) -> None:
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    assert lines[1] == {
        "unit": "unit-1",
        "files": [
            {"path": "a/1.bin", "size": 9, "sha256": sha256(b"\1" * 9)},
            {"path": "b/1.bin", "size": 1, "sha256": sha256(b"b")},
        ],
    }
