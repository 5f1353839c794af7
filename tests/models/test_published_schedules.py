"""Schedules of IBQ and Open-MAGVIT2 against the published implementations' values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from models.schedules import cosine_between, warmup_cosine, warmup_plateau_linear

GOLDEN = Path(__file__).parents[1] / "golden"
IBQ = json.loads((GOLDEN / "ibq" / "schedules.json").read_text())["schedules"]
MAGVIT = load_file(GOLDEN / "open_magvit2" / "schedules.safetensors")
CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "open_magvit2" / "schedules.json").read_text())["config"]["cases"]
}


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL"])
def test_ibq_generators(size: str) -> None:
    spec = IBQ[size]
    total, warmup = (spec["iterations_per_epoch"] * spec[epochs] for epochs in ("epochs", "wp_epochs"))
    for row in spec["rows"]:
        step = row["iteration"]
        rate = warmup_plateau_linear(
            step, peak=spec["peak_lr"], start=spec["wp0"], end=spec["wpe"], warmup=warmup, total=total
        )
        decay = cosine_between(step, first=0.05, last=spec["twde"], total=total)
        assert rate == pytest.approx(row["lr"], rel=1e-9)
        assert decay == pytest.approx(row["wd_decay_group"], rel=1e-9)
        assert decay == pytest.approx(row["wd_nodecay_group"], rel=1e-9)  # the reference decays norms and biases too


@pytest.mark.parametrize("size", ["B", "XL"])
def test_open_magvit2_generators(size: str) -> None:
    case = CASES[size]
    for step, rate, decay in zip(
        MAGVIT[f"in/{size}/iters"], MAGVIT[f"out/{size}/lr"], MAGVIT[f"out/{size}/wd"], strict=True
    ):
        ours = warmup_plateau_linear(
            int(step), peak=case["peak"], start=case["wp0"], end=case["wpe"], warmup=case["wp_it"], total=case["max_it"]
        )
        assert ours == pytest.approx(float(rate), rel=1e-6)
        assert cosine_between(int(step), first=0.05, last=0.05, total=case["max_it"]) == pytest.approx(
            float(decay[0]), rel=1e-6
        )


def test_ibq_tokenizers() -> None:
    """Its multipliers of the rate: a linear warm-up, and one with a cosine that stops falling at a floor."""
    spec = IBQ["tokenizer_lambda"]
    ours = [min(1.0, step / 50) for step in spec["steps_b"]]
    assert ours == pytest.approx(spec["linear_warmup_50"], rel=1e-9)
    ours = [
        max(0.1, warmup_cosine(step, base=1.0, end=0.0, warmup=50, total=500)) if step >= 50 else step / 50
        for step in spec["steps_a"]
    ]
    assert ours == pytest.approx(spec["warmup50_cosine500_min0p1"], rel=1e-9)
