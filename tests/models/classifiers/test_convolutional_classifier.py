"""The judge: shapes, bounds, and that it learns."""

from __future__ import annotations

import torch

from models.classifiers.config import BUILDERS, ConvolutionalClassifierConfig
from models.registry import build


def test_features_are_bounded_and_feed_the_logits() -> None:
    judge = build(ConvolutionalClassifierConfig(channels=1, image_size=16, classes=7, features=20), BUILDERS)
    images_BCHW = torch.rand(3, 1, 16, 16)
    features_BE = judge.features(images_BCHW)
    assert features_BE.shape == (3, 20)
    assert features_BE.abs().max() < 1
    torch.testing.assert_close(judge(images_BCHW), judge.head(features_BE))


def test_it_learns_bright_from_dark() -> None:
    torch.manual_seed(0)
    judge = build(ConvolutionalClassifierConfig(classes=2, image_size=16, widths=(8, 8, 8, 8), features=8), BUILDERS)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    labels_B = torch.arange(16) % 2
    images_BCHW = 0.5 * torch.rand(16, 3, 16, 16) + 0.4 * labels_B.view(-1, 1, 1, 1)
    for _ in range(20):
        optimizer.zero_grad()
        judge.loss(images_BCHW, labels_B, smoothing=0.05).backward()
        optimizer.step()
    assert torch.equal(judge(images_BCHW).argmax(1), labels_B)
