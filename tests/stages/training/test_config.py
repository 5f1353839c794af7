"""Schedules by the published numbers, and configs that are given in part."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.config import parse_config
from pipeline.errors import UsageError
from stages.training.config import (
    Constant,
    OneCycle,
    TrainClassifierConfig,
    TrainGeneratorConfig,
    TrainingConfig,
    WarmupCosine,
)

SCHEDULES = Path(__file__).parents[2] / "golden/rar/schedules.json"


def test_constant_rises_and_drops() -> None:
    schedule = Constant(warmup=4, drops=(10, 20))
    rates = [schedule.rate(step, base=1.0, steps=30) for step in (0, 1, 4, 9, 10, 19, 20)]
    assert rates == pytest.approx([0, 0.25, 1, 1, 0.1, 0.1, 0.01])


def test_one_cycle_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=40, cycle_momentum=False)
    for step in range(40):
        assert OneCycle().rate(step, base=0.5, steps=40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if step < 39:
            theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_one_cycle_of_few_steps_is_finite(steps: int) -> None:
    rates = [OneCycle().rate(step, base=1.0, steps=steps) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert max(rates) > 0.5


def test_warmup_cosine_is_the_published_one() -> None:
    cases = json.loads(SCHEDULES.read_text())["learning_rate"]["cases"]
    assert cases
    for case in cases:
        schedule = WarmupCosine(warmup=case["warmup_steps"], end=case["end_lr"])
        for step, rate in case["rows"]:
            if step <= case["max_steps"]:
                found = schedule.rate(step, base=case["base_lr"], steps=case["max_steps"])
                assert found == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch": 9, "rows_per_pass": 2}, "not a multiple of rows_per_pass 2"),
        ({"select": "best"}, "evaluate_every"),
        ({"clip": 0}, "clip"),
        ({"ema": 1.0}, "ema"),
        ({"steps": 1.5}, "steps"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_nonsense_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_config(TrainingConfig, given, where="training")


def test_a_part_of_a_training_keeps_the_stages_default() -> None:
    own = TrainGeneratorConfig().training
    given = {"seed": 3, "optimizer": {"learning_rate": 0.5}}
    found = parse_config(TrainGeneratorConfig, {"training": given}, where="generator").training
    assert found.optimizer.learning_rate == 0.5
    assert found.optimizer.betas == own.optimizer.betas != TrainingConfig().optimizer.betas
    assert (found.seed, found.steps, found.schedule) == (3, own.steps, own.schedule)


def test_another_schedule_replaces_the_default_whole() -> None:
    given = {"training": {"schedule": {"kind": "constant"}}}
    assert parse_config(TrainClassifierConfig, given, where="judge").training.schedule == Constant()
    assert isinstance(TrainClassifierConfig().training.schedule, OneCycle)
    assert math.isclose(WarmupCosine(end=0.5).rate(7, base=1.0, steps=7), 0.5)
