"""Weight decay over the steps: in every group, or in that of the matrices alone, as the published code does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.training.config import AdamW, Constant, TrainingConfig
from stages.training.replicas import Replicas
from stages.training.task import Part
from stages.training.trained_part import TrainedPart

ROWS = json.loads((Path(__file__).parents[2] / "golden/ibq/schedules.json").read_text())["schedules"]["XXL"]


def trained_part(**optimizer: object) -> TrainedPart:
    part = Part("main", nn.Linear(3, 2), AdamW(learning_rate=0.1, **optimizer), Constant())  # type: ignore[arg-type]
    return TrainedPart(part, TrainingConfig(), Replicas(device="cpu", precision="float32"))


@pytest.mark.parametrize("decays", ["all", "matrices"])
def test_annealed_decay_is_that_of_the_published_groups(decays: str) -> None:
    """The published code writes the annealed decay into both of its groups, biases and norms included."""
    trained = trained_part(weight_decay=0.05, weight_decay_end=ROWS["twde"], decays=decays)
    steps = ROWS["iterations_per_epoch"] * ROWS["epochs"]
    for row in ROWS["rows"]:
        trained.update(row["iteration"], steps)
        found = {id(one): group["weight_decay"] for group in trained.optimizer.param_groups for one in group["params"]}
        weight, bias = (found[id(one)] for one in trained.part.module.parameters())
        assert weight == pytest.approx(row["wd_decay_group"], rel=1e-9)
        assert bias == (pytest.approx(row["wd_nodecay_group"], rel=1e-9) if decays == "all" else 0.0)


@pytest.mark.parametrize(("decays", "share"), [("all", 0.9), ("matrices", 1.0)])
def test_a_bias_without_gradient_falls_by_its_decay_alone(decays: str, share: float) -> None:
    trained = trained_part(weight_decay=0.5, weight_decay_end=1.0, decays=decays)
    bias = trained.part.module.get_parameter("bias")
    bias.data.fill_(1.0)
    for one in trained.parameters:
        one.grad = torch.zeros_like(one)
    trained.update(9, 10)  # the last step: rate 0.1 x decay 1.0
    torch.testing.assert_close(bias.data, torch.full((2,), share))
