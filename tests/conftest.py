"""Shared by all tests: one torch thread, no user settings, and the option of the crash tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("SMALTI_STORE", None)

import pytest

if TYPE_CHECKING:
    from tests.hub import Hub


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs at seeded moments per stage in the crash tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that holds nothing yet, and an empty cache."""
    from tests.hub import Hub

    return Hub(tmp_path / "hub-cache", monkeypatch)
