"""The two baselines without training: counts per class and position, and uniform codes, through the one sampling loop."""

from __future__ import annotations

import pytest
import torch

from models.generators.config import CodeShape, HistogramConfig, UniformConfig
from models.generators.generator import build_decoder, build_generator
from models.generators.tables.network import Histogram
from models.sampling.config import ConstantGuidance, SamplingConfig
from models.sampling.loop import sample

CODES, TOKENS, CLASSES, ROWS = 6, 4, 3, 2000
SHAPE = CodeShape(codes=CODES, grid=(2, 2), classes=CLASSES)


@pytest.fixture(scope="module")
def fitted() -> Histogram:
    """Class c shows code c at every position, except position 1: there codes 4 (one image of four) and 5."""
    model = build_generator(HistogramConfig(), SHAPE)
    labels_N = torch.arange(CLASSES).repeat(4)
    codes_NT = labels_N[:, None].repeat(1, TOKENS)
    codes_NT[:, 1] = 5
    codes_NT[:CLASSES, 1] = 4
    model.fit([(codes_NT[:5], labels_N[:5]), (codes_NT[5:], labels_N[5:])])
    return model


def draw(model: torch.nn.Module, label: int, *, scale: float = 1.0) -> torch.Tensor:
    config = SamplingConfig(guidance=ConstantGuidance(scale=(scale,)))
    decoder = build_decoder(model, rows=ROWS, guided=config.guided)
    labels_B = torch.full((ROWS,), label)
    return sample(decoder, labels_B, torch.arange(ROWS), config=config, seed=3)


def test_codes_follow_the_counts_of_their_class_and_position(fitted: Histogram) -> None:
    codes_BT = draw(fitted, 2)
    assert (codes_BT[:, [0, 2, 3]] == 2).all()
    assert set(codes_BT[:, 1].tolist()) == {4, 5}
    assert (codes_BT[:, 1] == 4).float().mean() == pytest.approx(0.25, abs=0.03)


def test_guidance_never_draws_what_the_class_never_showed(fitted: Histogram) -> None:
    assert (draw(fitted, 1, scale=4.0)[:, 0] == 1).all()


def test_codes_land_in_image_order_whatever_the_order_of_drawing(fitted: Histogram) -> None:
    decoder = build_decoder(fitted, rows=1, guided=False, orders=torch.tensor([3, 1, 0, 2]))
    codes_BT = sample(decoder, torch.tensor([0]), torch.tensor([7]), config=SamplingConfig(), seed=0)
    assert codes_BT[0, [0, 2, 3]].tolist() == [0, 0, 0]
    assert codes_BT[0, 1] in (4, 5)


def test_fitting_again_starts_from_nothing(fitted: Histogram) -> None:
    model = build_generator(HistogramConfig(), SHAPE.model_copy(update={"classes": 1}))
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
        model = build_generator(HistogramConfig(), SHAPE)
        model.fit(zip(codes_NT.split(rows), labels_N.split(rows), strict=True))
        assert torch.equal(model.counts_CTK, wanted)


def test_a_class_without_images_is_refused() -> None:
    model = build_generator(HistogramConfig(), SHAPE)
    with pytest.raises(ValueError, match=r"none of classes \[0, 2\]"):
        model.fit([(torch.zeros(2, TOKENS, dtype=torch.int64), torch.ones(2, dtype=torch.int64))])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_uniform_draws_every_code_equally_often(scale: float) -> None:
    model = build_generator(UniformConfig(), SHAPE)
    shares_K = torch.bincount(draw(model, 1, scale=scale).flatten(), minlength=CODES) / (ROWS * TOKENS)
    assert shares_K.tolist() == pytest.approx([1 / CODES] * CODES, abs=0.02)


def test_weights_round_trip(fitted: Histogram) -> None:
    other = build_generator(HistogramConfig(), SHAPE)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(draw(other, 0), draw(fitted, 0))
