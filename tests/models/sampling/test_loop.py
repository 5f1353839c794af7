"""The sampling loop with a decoder whose logits are a table: what it does with codes, orders, guidance and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.sampling.config import ConstantGuidance, LinearGuidance, PowerCosineGuidance, SamplingConfig
from models.sampling.heads import Choose, CodeHead
from models.sampling.loop import guide, sample

CODES, TOKENS = 6, 5


def scaled(scale: float) -> ConstantGuidance:
    return ConstantGuidance(scale=(scale,))


class Table:
    """Logits by (label, step), and a record of the codes that were fed."""

    tokens, subtokens, device = TOKENS, (CODES,), torch.device("cpu")

    def __init__(self, *, rows: int, guided: bool = False, order: list[int] | None = None):
        self.rows, self.guided = rows, guided
        self.orders_BT = None if order is None else torch.tensor(order).expand(rows, -1)
        self.head = CodeHead(lambda logits_RK: logits_RK)
        self.table = torch.randn(4, TOKENS, CODES, generator=torch.Generator().manual_seed(0))

    def prefill(self, labels_B: Tensor) -> Tensor:
        self.labels = torch.cat([labels_B, torch.full_like(labels_B, 3)]) if self.guided else labels_B
        self.fed: list[list[int]] = []
        return self.table[self.labels, 0]

    def step(self, codes_B: Tensor) -> Tensor:
        self.fed.append(codes_B.tolist())
        return self.table[self.labels, len(self.fed)]


def draw(decoder: Table, labels: list[int], ids: list[int], **settings: Any) -> Tensor:
    return sample(
        decoder, torch.tensor(labels), torch.tensor(ids), config=SamplingConfig.model_validate(settings), seed=5
    )


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
    codes = draw(decoder, [0], [0], guidance=scaled(3.0), greedy=True)[0]
    guided = decoder.table[3] + 3.0 * (decoder.table[0] - decoder.table[3])
    assert torch.equal(codes, guided.argmax(-1))
    streams = torch.stack([decoder.table[0, 0], decoder.table[3, 0]])
    torch.testing.assert_close(guide(streams, 1.0)[0], decoder.table[0, 0])
    assert torch.equal(guide(streams, 0.0)[0], decoder.table[3, 0])


@pytest.mark.parametrize(
    ("scale", "guided"), [(1.0, False), (0.5, True), (4.0, True), ([1.0, 1.0], False), ([1, 2], True)]
)
def test_scales_that_need_a_second_stream(scale: Any, guided: bool) -> None:
    assert SamplingConfig.model_validate({"guidance": {"kind": "constant", "scale": scale}}).guided is guided


def test_kinds_of_guidance() -> None:
    assert ConstantGuidance(scale=4.0).weights(4.0, 4).tolist() == [4, 4, 4, 4]
    assert LinearGuidance(scale=5.0).weights(5.0, 4).tolist() == [1, 2, 3, 4]
    rising = PowerCosineGuidance(scale=5.0, power=1.0).weights(5.0, 4)
    assert rising.tolist() == pytest.approx([1, 1 + 2 * (1 - 0.5**0.5), 3, 1 + 2 * (1 + 0.5**0.5)])


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": {"kind": "constant", "scale": -1.0}},
        {"guidance": {"kind": "constant", "scale": []}},
        {"guidance": {"kind": "linear"}},
        {"guidance": {"kind": "power-cosine", "scale": 2.0, "power": -0.5}},
        {"temperature": 0.0},
        {"temperature": [1.0, 0.0]},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": {"kind": "constant", "scale": [2, 3]}},
        {"temperature": [1, 1]},
        {"top_k": [3, 4]},
        {"top_p": [1, 1]},
    ],
)
def test_there_is_one_value_for_all_sub_tokens_or_one_for_each(settings: dict[str, Any]) -> None:
    config = SamplingConfig.model_validate(settings)
    config.check(2)
    for subtokens in (1, 3):
        with pytest.raises(ValueError, match="has 2 values, but a code is drawn in"):
            config.check(subtokens)


class TwoDraws:
    """A head of two sub-tokens: the second one's logits are those of the first one's value."""

    def __init__(self, table_VK: Tensor):
        self.table_VK = table_VK

    def draw(self, hidden_RD: Tensor, choose: Choose) -> Tensor:
        first_B = choose(0, hidden_RD)
        streams = torch.cat([first_B] * (len(hidden_RD) // len(first_B)))
        return first_B + CODES * choose(1, self.table_VK[streams])


def test_a_head_of_two_sub_tokens_draws_each_by_its_own_settings_and_random_numbers() -> None:
    table_VK = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(1))

    def drawn(rows: int, ids: list[int], **settings: Any) -> Tensor:
        decoder = Table(rows=rows)
        decoder.subtokens, decoder.head = (CODES, 4), TwoDraws(table_VK)
        return draw(decoder, [0] * rows, ids, **settings)

    many = drawn(4, [3, 4, 5, 6])
    assert torch.equal(many[2:3], drawn(1, [5]))
    assert len((many // CODES).unique()) > 1
    half = drawn(200, list(range(200)), top_k=[CODES, 1])
    assert torch.equal(half // CODES, table_VK.argmax(-1)[half % CODES])
    assert len(half.unique()) > 1
    cold = drawn(200, list(range(200)), temperature=[1e-6, 1.0])
    assert torch.equal((cold % CODES).unique(dim=0)[0], Table(rows=1).table[0].argmax(-1))


def test_a_pass_has_its_rows() -> None:
    with pytest.raises(ValueError, match="a pass has 3 rows, got 2 sample ids and conditions for 2"):
        draw(Table(rows=3), [0, 1], [0, 1])
    with pytest.raises(ValueError, match="needs True"):
        draw(Table(rows=1), [0], [0], guidance=scaled(4.0))


@pytest.mark.parametrize("settings", [{}, {"greedy": True}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_stop(settings: dict[str, Any]) -> None:
    decoder = Table(rows=2)
    decoder.table[1, 3, 2] = torch.nan
    draw(decoder, [0, 2], [0, 1], **settings)
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(decoder, [0, 1], [0, 1], **settings)
