"""Ranks as a launcher tells them, and one process without a launcher."""

from __future__ import annotations

import pytest

from pipeline import ranks
from pipeline.errors import UsageError


def test_alone_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (0, 1, True)


def test_a_launcher_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (3, 4, False)


def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK is 'first'"):
        ranks.rank()
