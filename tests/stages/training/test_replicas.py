"""One process's view of a training's precision."""

from __future__ import annotations

import pytest
import torch

from stages.training.replicas import Precision, Replicas


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_runs_outside_of_wrapped_modules_has_the_precision_of_training(
    precision: Precision, dtype: torch.dtype
) -> None:
    square = torch.ones(2, 2)
    with Replicas(device="cpu", precision=precision).autocast():
        assert (square @ square).dtype == dtype
    assert (square @ square).dtype == torch.float32
