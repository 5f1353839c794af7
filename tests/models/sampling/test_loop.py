"""The sampling loop with a decoder whose logits are a table: what it does with codes, orders, guidance and errors."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.sampling.config import SamplingConfig
from models.sampling.loop import guide, sample

CODES, TOKENS = 6, 5


class Table:
    """Logits by (label, step), and a record of the codes that were fed."""

    codes, tokens, device = CODES, TOKENS, torch.device("cpu")

    def __init__(self, *, rows: int, guided: bool = False, order: list[int] | None = None):
        self.rows, self.guided = rows, guided
        self.orders_BT = torch.tensor(order or range(TOKENS)).expand(rows, -1)
        self.table = torch.randn(4, TOKENS, CODES, generator=torch.Generator().manual_seed(0))

    def prefill(self, labels_B: Tensor) -> Tensor:
        self.labels = torch.cat([labels_B, torch.full_like(labels_B, 3)]) if self.guided else labels_B
        self.fed: list[list[int]] = []
        return self.table[self.labels, 0]

    def step(self, codes_B: Tensor) -> Tensor:
        self.fed.append(codes_B.tolist())
        return self.table[self.labels, len(self.fed)]


def draw(decoder: Table, labels: list[int], ids: list[int], **settings: float) -> Tensor:
    return sample(decoder, torch.tensor(labels), torch.tensor(ids), config=SamplingConfig(**settings), seed=5)


def test_codes_of_a_sample_do_not_depend_on_the_others() -> None:
    together = draw(Table(rows=3), [0, 1, 2], [10, 11, 12])
    for row in range(3):
        assert torch.equal(together[row : row + 1], draw(Table(rows=1), [row], [10 + row]))
    assert not torch.equal(draw(Table(rows=1), [0], [1]), draw(Table(rows=1), [0], [2]))


def test_codes_are_fed_in_generation_order_and_returned_in_image_order() -> None:
    decoder = Table(rows=1, order=[4, 2, 0, 1, 3])
    codes = draw(decoder, [0], [0])[0].tolist()
    assert [fed[0] for fed in decoder.fed] == [codes[4], codes[2], codes[0], codes[1]]


def test_guidance_weighs_the_two_streams() -> None:
    decoder = Table(rows=1, guided=True)
    codes = draw(decoder, [0], [0], guidance_scale=3.0, greedy=True)[0]
    guided = decoder.table[3] + 3.0 * (decoder.table[0] - decoder.table[3])
    assert torch.equal(codes, guided.argmax(-1))
    streams = torch.stack([decoder.table[0, 0], decoder.table[3, 0]])
    torch.testing.assert_close(guide(streams, 1.0)[0], decoder.table[0, 0])
    assert torch.equal(guide(streams, 0.0)[0], decoder.table[3, 0])


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (0.5, True), (4.0, True)])
def test_scales_that_need_a_second_stream(scale: float, guided: bool) -> None:
    assert SamplingConfig(guidance_scale=scale).guided is guided


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": -1.0},
        {"guidance_power": -0.5},
        {"temperature": 0.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig.model_validate(settings)


def test_a_pass_has_its_rows() -> None:
    with pytest.raises(ValueError, match="a pass has 3 rows, got 2 labels and 2 sample ids"):
        draw(Table(rows=3), [0, 1], [0, 1])
    with pytest.raises(ValueError, match="needs True"):
        draw(Table(rows=1), [0], [0], guidance_scale=4.0)


@pytest.mark.parametrize("settings", [{}, {"greedy": True}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_stop(settings: dict[str, float]) -> None:
    decoder = Table(rows=2)
    decoder.table[1, 3, 2] = torch.nan
    draw(decoder, [0, 2], [0, 1], **settings)
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(decoder, [0, 1], [0, 1], **settings)
