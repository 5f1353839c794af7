"""Weight decay over the steps: in every group, or in that of the matrices alone, as the published code does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.training.config import AdamW, Constant, Sgd, TrainingConfig
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


def test_momentum_of_sgd_goes_on_where_a_training_stopped() -> None:
    def made() -> TrainedPart:
        torch.manual_seed(0)
        part = Part("main", nn.Linear(3, 2), Sgd(learning_rate=0.4), Constant())
        return TrainedPart(part, TrainingConfig(), Replicas(device="cpu", precision="float32"))

    def step(trained: TrainedPart) -> None:
        for one in trained.parameters:
            one.grad = one.detach() * 0.1
        trained.update(0, 10)

    whole, other = made(), made()
    for _ in range(2):
        step(whole)
    other.load({name: one.clone() for name, one in whole.state().items()})
    step(whole)
    step(other)
    first = made().part.module.get_parameter("weight")
    weight = whole.part.module.get_parameter("weight")
    values, velocity = first.detach().double(), torch.zeros(2, 3).double()
    for _ in range(3):
        velocity = 0.9 * velocity + 0.1 * values
        values = values - 0.4 * velocity
    torch.testing.assert_close(weight.detach().double(), values, atol=1e-6, rtol=0)
    assert torch.equal(weight, other.part.module.get_parameter("weight"))


@pytest.mark.parametrize(("decays", "share"), [("all", 0.9), ("matrices", 1.0)])
def test_a_bias_without_gradient_falls_by_its_decay_alone(decays: str, share: float) -> None:
    trained = trained_part(weight_decay=0.5, weight_decay_end=1.0, decays=decays)
    bias = trained.part.module.get_parameter("bias")
    bias.data.fill_(1.0)
    for one in trained.parameters:
        one.grad = torch.zeros_like(one)
    trained.update(9, 10)  # the last step: rate 0.1 x decay 1.0
    torch.testing.assert_close(bias.data, torch.full((2,), share))
