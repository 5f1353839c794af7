"""Every published schedule can be named in a recipe, and has the published implementations' values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from pipeline.config import parse_config
from stages.training.config import TrainingConfig

GOLDEN = Path(__file__).parents[1] / "golden"
IBQ = json.loads((GOLDEN / "ibq" / "schedules.json").read_text())["schedules"]
MAGVIT = load_file(GOLDEN / "open_magvit2" / "schedules.safetensors")
CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "open_magvit2" / "schedules.json").read_text())["config"]["cases"]
}


def training(steps: int, rate: float, schedule: dict[str, Any], **optimizer: Any) -> TrainingConfig:
    """What a recipe says."""
    values = {"steps": steps, "optimizer": {"learning_rate": rate, **optimizer}, "schedule": schedule}
    return parse_config(TrainingConfig, values, where="training")


def rate_at(config: TrainingConfig, step: int) -> float:
    return config.schedule.rate(step, base=config.optimizer.learning_rate, steps=config.steps)


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL"])
def test_ibq_generators(size: str) -> None:
    spec = IBQ[size]
    total, warmup = (spec["iterations_per_epoch"] * spec[epochs] for epochs in ("epochs", "wp_epochs"))
    schedule = {"kind": "warmup-plateau-linear", "warmup": warmup, "start": spec["wp0"], "end": spec["wpe"]}
    config = training(total, spec["peak_lr"], schedule, weight_decay=0.05, weight_decay_end=spec["twde"])
    for row in spec["rows"]:
        assert rate_at(config, row["iteration"]) == pytest.approx(row["lr"], rel=1e-9)
        decay = config.optimizer.decay(row["iteration"], steps=total)
        assert decay == pytest.approx(row["wd_decay_group"], rel=1e-9)


@pytest.mark.parametrize("size", ["B", "XL"])
def test_open_magvit2_generators(size: str) -> None:
    case = CASES[size]
    schedule = {
        "kind": "warmup-plateau-linear",
        "warmup": case["wp_it"],
        "start": case["wp0"],
        "end": case["wpe"],
    }
    config = training(case["max_it"], case["peak"], schedule, weight_decay=0.05)
    for step, rate, decay in zip(*(MAGVIT[name] for name in _names(size)), strict=True):
        assert rate_at(config, int(step)) == pytest.approx(float(rate), rel=1e-6)
        assert config.optimizer.decay(int(step), steps=config.steps) == pytest.approx(float(decay[0]), rel=1e-6)


def _names(size: str) -> tuple[str, str, str]:
    return f"in/{size}/iters", f"out/{size}/lr", f"out/{size}/wd"


def test_ibq_tokenizers() -> None:
    """Its multipliers of the rate: a linear warm-up, and one with a cosine that stops falling at a floor."""
    spec = IBQ["tokenizer_lambda"]
    config = training(1000, 1.0, {"kind": "constant", "warmup": 50})
    assert [rate_at(config, step) for step in spec["steps_b"]] == pytest.approx(spec["linear_warmup_50"], rel=1e-9)
    config = training(1000, 1.0, {"kind": "warmup-cosine", "warmup": 50, "period": 500, "floor": 0.1})
    found = [rate_at(config, step) for step in spec["steps_a"]]
    assert found == pytest.approx(spec["warmup50_cosine500_min0p1"], rel=1e-9)


def test_pretrained_tokenizers() -> None:
    """Drops by iterations, and a warm-up with a cosine to a hundredth whose last step has the end (open_magvit2, 4)."""
    steps = 1_500_000
    config = training(steps, 1e-4, {"kind": "constant", "drops": [800_000, 1_000_000]})
    assert [rate_at(config, step) for step in (0, 799_999, 800_000, 1_000_000)] == pytest.approx(
        [1e-4, 1e-4, 1e-5, 1e-6]
    )
    schedule = {"kind": "warmup-cosine", "warmup": 5000, "end": 1e-6, "period": steps - 1}
    config = training(steps, 1e-4, schedule)
    for step in (0, 2500, 5000, 5001, 700_000, steps - 1):
        share = (step - 5000) / (steps - 1 - 5000)
        published = step / 5000 if step < 5000 else 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * share))
        assert rate_at(config, step) == pytest.approx(1e-4 * published, rel=1e-9)


@pytest.mark.parametrize("peak", [3e-4, 5e-4])
def test_digit_generators(peak: float) -> None:
    config = training(125_000, peak, {"kind": "inverse-sqrt"}, betas=[0.9, 0.98], weight_decay=0.01, decays="all")
    for step in (0, 1, 3125, 6249):
        assert rate_at(config, step) == pytest.approx(1e-7 + step * (peak - 1e-7) / 6250, rel=1e-9)
    for step in (6250, 25_000, 125_000):
        assert rate_at(config, step) == pytest.approx(peak * math.sqrt(6250 / step), rel=1e-9)
    assert rate_at(config, 25_000) == pytest.approx(peak / 2)


def test_digit_linear_probe() -> None:
    """Half a cosine to 0, without a warm-up, over all steps."""
    config = training(100_000, 0.4, {"kind": "warmup-cosine"})
    found = [rate_at(config, step) for step in (0, 25_000, 50_000, 99_999, 100_000)]
    assert found == pytest.approx([0.4, 0.2 + 0.2 * math.sqrt(0.5), 0.2, 0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("kind", ["constant", "one-cycle", "warmup-cosine", "warmup-plateau-linear", "inverse-sqrt"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 2), (3, 5)])
def test_short_trainings_have_finite_rates(kind: str, steps: int, warmup: int) -> None:
    schedule = {"kind": kind} | ({} if kind == "one-cycle" else {"warmup": warmup or int(kind == "inverse-sqrt")})
    config = training(steps, 1.0, schedule, weight_decay=0.1, weight_decay_end=0.2)
    assert all(0 <= rate_at(config, step) <= 1 for step in range(steps))
    assert config.optimizer.decay(0, steps=steps) == pytest.approx(0.1)
    assert config.optimizer.decay(max(1, steps - 1), steps=steps) == pytest.approx(0.2)
