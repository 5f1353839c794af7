"""Figures of merit against values known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from models.metrics import perplexity, psnr


def test_psnr_of_a_known_error() -> None:
    images_BCHW = torch.zeros(2, 1, 4, 4)
    shifted_BCHW = images_BCHW + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(shifted_BCHW, images_BCHW), torch.tensor([20.0, 40.0]).double(), rtol=1e-6, atol=0)
    assert psnr(images_BCHW, images_BCHW).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(("counts", "expected"), [([3, 3, 3, 0], 3.0), ([5, 0, 0, 0], 1.0), ([0, 0, 0, 0], 1.0)])
def test_perplexity_counts_evenly_used_codes(counts: list[int], expected: float) -> None:
    assert float(perplexity(torch.tensor(counts))) == pytest.approx(expected)
