"""The proof that two processes share a folder: given, refused with a reason, and gone afterwards."""

from __future__ import annotations

import os
import platform
from functools import partial
from pathlib import Path
from threading import Timer

import pytest

from pipeline.errors import CannotWrite
from pipeline.shared_folder import answer, asking, becomes_true, find_fault


def test_one_folder_is_proved_and_left_as_it_was(tmp_path: Path) -> None:
    with asking(tmp_path) as nonce:
        given = answer(nonce, 0.0)
        assert (given.host, given.started_in) == (platform.node(), str(Path.cwd()))
        assert find_fault(nonce, given) == ""
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    there = tmp_path / "there"
    with asking(tmp_path) as nonce:
        assert (
            find_fault(nonce, answer(there / nonce.name, 0.1))
            == "it does not see the file that was written there for it"
        )
    assert not there.exists()


def test_another_folder_with_the_same_file_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a container has a copy of the folder: it reads the nonce, but its own copy does not come back."""
    monkeypatch.setattr("pipeline.shared_folder.SEEN_SECONDS", 0.1)
    there = tmp_path / "there"
    there.mkdir()
    with asking(tmp_path) as nonce:
        (there / nonce.name).write_bytes(nonce.read_bytes())
        assert find_fault(nonce, answer(there / nonce.name, 0.0)) == "what it writes there is not seen here"


def test_who_cannot_write_says_why(tmp_path: Path) -> None:
    nonce = tmp_path / ("n" * 240)  # the copy's name is too long for a file system
    nonce.write_bytes(b"nonce")
    assert find_fault(nonce, answer(nonce, 0.0)) == "it cannot write there: File name too long"


def test_a_folder_that_refuses_the_nonce_is_73() -> None:
    with pytest.raises(CannotWrite), asking(Path(os.devnull)):
        pass


def test_waiting_is_bounded(tmp_path: Path) -> None:
    late = Timer(0.1, partial((tmp_path / "late").write_bytes, b""))
    late.start()
    assert becomes_true((tmp_path / "late").exists, 5.0)
    assert not becomes_true((tmp_path / "never").exists, 0.1)
