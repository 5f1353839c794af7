"""Masks of training and sampling against the published rule and numbers."""

from __future__ import annotations

import numpy as np

from models.generators.masks import draw_masks, even_mask, masked_after, masks_of

from .digit_fixtures import arrays


def test_published_masks() -> None:
    found = arrays("stage2_nar")
    masks_BT = masks_of(found["in/mask_ratio_uniform"].numpy(), found["in/mask_score_uniform"].numpy())
    assert np.array_equal(masks_BT, found["out/train_mask"][:, 1:].numpy())


def test_at_least_one_code_is_masked_and_at_most_all() -> None:
    scores_BT = np.random.default_rng(0).random((2, 6))
    assert masks_of(np.array([1 - 1e-12, 0.0]), scores_BT).sum(1).tolist() == [1, 6]


def test_the_mean_share_is_two_thirds() -> None:
    assert abs(draw_masks(np.random.default_rng(0), 4000, 64).mean() - 2 / np.pi - 0.5 / 64) < 0.02


def test_counts_of_the_published_iterations() -> None:
    assert masked_after(8, 256) == [251, 236, 212, 181, 142, 97, 49, 0]


def test_few_codes_take_many_iterations() -> None:
    assert masked_after(5, 3) == [2, 1, 1, 1, 0]
    assert masked_after(1, 3) == [0]


def test_the_mask_without_chance_is_of_the_mean_share_everywhere() -> None:
    mask_T = even_mask(256)
    assert abs(mask_T.mean() - 2 / np.pi) < 0.01
    assert all(abs(part.mean() - 2 / np.pi) < 0.1 for part in np.split(mask_T, 8))
    assert even_mask(1).all()
