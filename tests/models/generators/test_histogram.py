"""The two baselines without training: counts per class and position, and uniform codes, through the one sampling loop."""

from __future__ import annotations

import pytest
import torch

from models.generators.config import BUILDERS, HistogramConfig, UniformConfig
from models.generators.histogram import Histogram
from models.registry import build
from models.sampling.config import SamplingConfig
from models.sampling.loop import sample

CODES, TOKENS, CLASSES, ROWS = 6, 4, 3, 2000


@pytest.fixture(scope="module")
def fitted() -> Histogram:
    """Class c shows code c at every position, except position 1: there codes 4 (one image of four) and 5."""
    model = build(HistogramConfig(), BUILDERS, codes=CODES, tokens=TOKENS, classes=CLASSES)
    labels_N = torch.arange(CLASSES).repeat(4)
    codes_NT = labels_N[:, None].repeat(1, TOKENS)
    codes_NT[:, 1] = 5
    codes_NT[:CLASSES, 1] = 4
    model.fit([(codes_NT[:5], labels_N[:5]), (codes_NT[5:], labels_N[5:])])
    return model


def draw(model: torch.nn.Module, label: int, **settings: float) -> torch.Tensor:
    config = SamplingConfig(**settings)
    decoder = model.decoder(rows=ROWS, guided=config.guided)
    labels_B = torch.full((ROWS,), label)
    return sample(decoder, labels_B, torch.arange(ROWS), config=config, seed=3)


def test_codes_follow_the_counts_of_their_class_and_position(fitted: Histogram) -> None:
    codes_BT = draw(fitted, 2)
    assert (codes_BT[:, [0, 2, 3]] == 2).all()
    assert set(codes_BT[:, 1].tolist()) == {4, 5}
    assert (codes_BT[:, 1] == 4).float().mean() == pytest.approx(0.25, abs=0.03)


def test_guidance_never_draws_what_the_class_never_showed(fitted: Histogram) -> None:
    assert (draw(fitted, 1, guidance_scale=4.0)[:, 0] == 1).all()


def test_codes_land_in_image_order_whatever_the_order_of_drawing(fitted: Histogram) -> None:
    decoder = fitted.decoder(rows=1, guided=False, orders=torch.tensor([3, 1, 0, 2]))
    codes_BT = sample(decoder, torch.tensor([0]), torch.tensor([7]), config=SamplingConfig(), seed=0)
    assert codes_BT[0, [0, 2, 3]].tolist() == [0, 0, 0]
    assert codes_BT[0, 1] in (4, 5)


def test_fitting_again_starts_from_nothing(fitted: Histogram) -> None:
    model = build(HistogramConfig(), BUILDERS, codes=CODES, tokens=TOKENS, classes=1)
    for code in (1, 2):
        model.fit([(torch.full((3, TOKENS), code), torch.zeros(3, dtype=torch.int64))])
    assert model.counts_CTK.sum() == 3 * TOKENS
    assert (model.counts_CTK[0, :, 2] == 3).all()


def test_counts_are_those_of_all_images_however_they_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    codes_NT = torch.randint(CODES, (90, TOKENS), generator=generator)
    labels_N = torch.arange(90) * CLASSES // 90  # classes stand together
    wanted = torch.zeros(CLASSES, TOKENS, CODES, dtype=torch.int64)
    for codes_T, label in zip(codes_NT, labels_N, strict=True):
        wanted[label, torch.arange(TOKENS), codes_T] += 1
    for rows in (1, 7, 50, 90):
        model = build(HistogramConfig(), BUILDERS, codes=CODES, tokens=TOKENS, classes=CLASSES)
        model.fit(zip(codes_NT.split(rows), labels_N.split(rows), strict=True))
        assert torch.equal(model.counts_CTK, wanted)


def test_a_class_without_images_is_refused() -> None:
    model = build(HistogramConfig(), BUILDERS, codes=CODES, tokens=TOKENS, classes=CLASSES)
    with pytest.raises(ValueError, match=r"none of \[0, 2\]"):
        model.fit([(torch.zeros(2, TOKENS, dtype=torch.int64), torch.ones(2, dtype=torch.int64))])


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_uniform_draws_every_code_equally_often(scale: float) -> None:
    model = build(UniformConfig(), BUILDERS, codes=CODES, tokens=TOKENS, classes=CLASSES)
    shares_K = torch.bincount(draw(model, 1, guidance_scale=scale).flatten(), minlength=CODES) / (ROWS * TOKENS)
    assert shares_K.tolist() == pytest.approx([1 / CODES] * CODES, abs=0.02)


def test_weights_round_trip(fitted: Histogram) -> None:
    other = build(HistogramConfig(), BUILDERS, codes=CODES, tokens=TOKENS, classes=CLASSES)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(draw(other, 0), draw(fitted, 0))
