"""Whitened patches: whiteness, order, streaming, determinism, refusals."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from models.encoders.config import BUILDERS, EncoderConfig, WhitenedPatchesConfig
from models.encoders.whitened_patches import WhitenedPatches, WhitenedPatchesFit, patches
from models.registry import build

CONFIG = WhitenedPatchesConfig(channels=1, image_size=16, cells=4, patch=6, dims=8, noise=1e-9)


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    images_BCHW = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.avg_pool2d(images_BCHW, 3, stride=1, padding=1)


def test_features_are_white_on_the_set_they_were_fitted_on(images_BCHW: torch.Tensor) -> None:
    encoder = WhitenedPatches(CONFIG)
    encoder.fit([images_BCHW])
    features_BhwD = encoder(images_BCHW)
    assert features_BhwD.shape == (40, *CONFIG.grid, encoder.dims) == (40, 4, 4, 8)
    features_ND = features_BhwD.flatten(0, 2)
    torch.testing.assert_close(features_ND.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(features_ND.T.cov(correction=0), torch.eye(8), rtol=0, atol=1e-3)


def test_patches_are_in_raster_order() -> None:
    image_HW = torch.arange(256.0).reshape(16, 16)
    patches_NP = patches(image_HW[None, None], CONFIG)
    second_row_first_cell = patches_NP[4].reshape(6, 6)
    assert torch.equal(second_row_first_cell[1:5, 1:5], image_HW[4:8, 0:4])
    assert torch.equal(second_row_first_cell[1:5, 0], image_HW[4:8, 0])  # the border repeats its last pixel


def test_streaming_equals_one_batch(images_BCHW: torch.Tensor) -> None:
    whole = WhitenedPatches(CONFIG).fit([images_BCHW])
    streamed = WhitenedPatches(CONFIG).fit(images_BCHW.split(7))
    for name, tensor in whole.items():
        torch.testing.assert_close(streamed[name], tensor, rtol=1e-4, atol=1e-4)


def test_fitting_again_gives_the_same_bits(images_BCHW: torch.Tensor) -> None:
    states = [WhitenedPatches(CONFIG).fit(images_BCHW.split(16)) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_travels(images_BCHW: torch.Tensor) -> None:
    fitted = WhitenedPatches(CONFIG)
    fitted.fit([images_BCHW])
    other = build(TypeAdapter(EncoderConfig).validate_python(CONFIG.model_dump()), BUILDERS)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(images_BCHW), fitted(images_BCHW))


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        WhitenedPatchesFit(CONFIG).finish()


@pytest.mark.parametrize("wrong", [{"cells": 5}, {"patch": 7}, {"patch": 2}, {"dims": 37}])
def test_impossible_geometry_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        WhitenedPatchesConfig.model_validate(CONFIG.model_dump() | wrong)
