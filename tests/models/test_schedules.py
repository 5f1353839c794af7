"""Schedules against the published implementation's values (tests/golden/rar/schedules.json)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.schedules import power_cosine, random_ratio, warmup_cosine

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rar" / "schedules.json").read_text())


@pytest.mark.parametrize("name", GOLDEN["cfg_scale"]["table"])
def test_guidance(name: str) -> None:
    scale, power = map(float, name.split("/"))
    np.testing.assert_allclose(power_cosine(scale, power, 256), GOLDEN["cfg_scale"]["table"][name], rtol=2e-5)


def test_guidance_at_the_edges() -> None:
    assert (power_cosine(1.0, 2.0, 16) == 1).all()
    assert (power_cosine(4.0, 0.0, 16) == 4).all()
    assert power_cosine(4.0, 1.0, 16)[0] == 1
    for scale, power in ((-1.0, 1.0), (4.0, -1.0)):
        with pytest.raises(ValueError, match="negative"):
            power_cosine(scale, power, 16)


@pytest.mark.parametrize("case", GOLDEN["random_ratio"]["cases"], ids=lambda case: f"{case['start']}-{case['end']}")
def test_random_ratio(case: dict) -> None:
    for step, expected in case["rows"]:
        ours = random_ratio(step, start=case["start"], end=case["end"])
        # Published code divides by zero where start = end; here the ratio has fallen to 0 at that step.
        assert ours == (0.0 if expected == "ZeroDivisionError" else pytest.approx(expected, abs=1e-15))


def test_learning_rate() -> None:
    for case in GOLDEN["learning_rate"]["cases"]:
        for step, expected in case["rows"]:
            rate = warmup_cosine(
                step, base=case["base_lr"], end=case["end_lr"], warmup=case["warmup_steps"], total=case["max_steps"]
            )
            assert rate == pytest.approx(expected, abs=1e-12, rel=1e-9)


def test_learning_rate_beyond_the_end_and_without_warmup() -> None:
    assert warmup_cosine(11, base=1.0, end=0.1, warmup=2, total=10) == 0.1
    assert warmup_cosine(0, base=1.0, end=0.1, warmup=0, total=10) == 1.0
    assert warmup_cosine(5, base=1.0, end=0.1, warmup=5, total=5) == 0.1
