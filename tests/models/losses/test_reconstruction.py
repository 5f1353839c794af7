"""Pixel losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from models.losses.config import BUILDERS, ReconstructionConfig
from models.registry import build


def test_terms_are_weighted_means() -> None:
    loss = build(ReconstructionConfig(l1=2.0, l2=3.0), BUILDERS)
    losses = loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert {name: float(value) for name, value in losses.items()} == {"l1": 2 * 1.5, "l2": 3 * 2.5}


def test_terms_without_weight_are_left_out() -> None:
    assert set(build(ReconstructionConfig(), BUILDERS)(torch.ones(2), torch.ones(2))) == {"l2"}


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="no loss to train on"):
        ReconstructionConfig(l1=0.0, l2=0.0)
