"""What is kept for a stage is made once, and forgotten with the stage, also where it failed."""

from __future__ import annotations

import pytest

from pipeline import stage_cache
from pipeline.stage_cache import after_giving_back, give_back


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test declares leaves with it."""
    monkeypatch.setattr(stage_cache, "_forgets", list(stage_cache._forgets))
    monkeypatch.setattr(stage_cache, "_afterwards", list(stage_cache._afterwards))


@pytest.mark.usefixtures("alone")
def test_made_once_until_it_is_given_back() -> None:
    calls: list[int] = []

    @stage_cache.cached(2)
    def load(number: int) -> list[int]:
        calls.append(number)
        return [number]

    assert load(1) is load(1)
    give_back()
    assert load(1) == [1]
    assert calls == [1, 1]


@pytest.mark.usefixtures("alone")
def test_a_device_is_asked_after_everything_was_forgotten() -> None:
    seen: list[str] = []

    class Held:
        def __del__(self) -> None:
            seen.append("freed")

    @stage_cache.cached(1)
    def hold() -> Held:
        return Held()

    after_giving_back(lambda: seen.append("asked"))
    hold()
    give_back()
    assert seen == ["freed", "asked"]
