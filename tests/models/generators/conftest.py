"""What tests of generators share."""

from __future__ import annotations

import pytest

from models.generators.rar import decoder as rar_decoder


@pytest.fixture(params=["compiled", "torch"])
def each_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute a step of RAR on the CPU, whatever the number of rows."""
    monkeypatch.setattr(rar_decoder, "FEW_STREAMS", 10**6 if request.param == "compiled" else 0)
