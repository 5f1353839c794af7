"""What every autoregressive generator keeps to. A new one subclasses `GeneratorConformance` and builds itself.

class TestMine(GeneratorConformance):
    def build(self): return Mine(MineConfig(...), CodeShape(codes=12, grid=(2, 3), classes=3))
    def uncached(self, model, codes_BT, labels_B): return model(codes_BT[:, :-1], labels_B)
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.generators.generator import build_decoder
from models.sampling.config import PowerCosineGuidance, SamplingConfig
from models.sampling.loop import sample

GUIDED = SamplingConfig(
    guidance=PowerCosineGuidance(scale=(3.0,), power=1.0), temperature=(0.9,), top_k=(8,), top_p=(0.95,)
)
PLAIN = SamplingConfig()


def teacher_forced(decoder: Any, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
    """Logits (R, T, K) of every step, the given codes being fed through the cache."""
    hidden = [decoder.prefill(labels_B), *(decoder.step(codes_B) for codes_B in codes_BT[:, :-1].T)]
    return torch.stack([decoder.head.logits(hidden_RD) for hidden_RD in hidden], dim=1)


class GeneratorConformance:
    """Tests of training, of the cache and of sampling. Generators are tiny, and built with weights that say something."""

    def build(self) -> Any:
        raise NotImplementedError

    def uncached(self, model: Any, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
        """Logits (B, T, K) of every code given those before it, by the training forward pass."""
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self, model: Any, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        codes_BT = torch.randint(model.shape.codes, (rows, model.shape.tokens), generator=generator)
        return codes_BT, torch.randint(model.shape.classes, (rows,), generator=generator)

    def draw(self, model: Any, labels: list[int], ids: list[int], config: SamplingConfig) -> Tensor:
        decoder = build_decoder(model, rows=len(labels), guided=config.guided)
        return sample(decoder, torch.tensor(labels), torch.tensor(ids), config=config, seed=3)

    def test_the_loss_can_be_learnt(self, model: Any) -> None:
        codes_BT, labels_B = self.batch(model, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = float(model.loss(codes_BT, labels_B)[0].detach())
        for _ in range(30):
            optimizer.zero_grad()
            model.loss(codes_BT, labels_B)[0].backward()
            optimizer.step()
        last = float(model.loss(codes_BT, labels_B)[0].detach())
        assert abs(first - math.log(model.shape.codes)) < 1
        assert last < 0.5 * first

    def test_a_gradient_reaches_every_parameter(self, model: Any) -> None:
        model.loss(*self.batch(model, 8))[0].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_no_code_sees_itself_or_later_ones(self, model: Any) -> None:
        codes_BT, labels_B = self.batch(model, 2)
        before = self.uncached(model, codes_BT, labels_B)
        for step in range(model.shape.tokens):
            changed_BT = codes_BT.clone()
            changed_BT[:, step:] = (changed_BT[:, step:] + 1) % model.shape.codes
            after = self.uncached(model, changed_BT, labels_B)
            torch.testing.assert_close(after[:, : step + 1], before[:, : step + 1])

    def test_cached_equals_uncached(self, model: Any) -> None:
        codes_BT, labels_B = self.batch(model, 3)
        decoder = build_decoder(model, rows=3, guided=True)
        for _ in range(2):  # the second pass finds the cache full of the first
            logits = teacher_forced(decoder, codes_BT, labels_B)
            conditional, unconditional = logits.chunk(2)
            withheld_B = torch.full_like(labels_B, model.shape.classes)
            torch.testing.assert_close(conditional, self.uncached(model, codes_BT, labels_B), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(unconditional, self.uncached(model, codes_BT, withheld_B), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
    def test_a_sample_is_the_same_bits_whatever_its_neighbours(self, model: Any, config: SamplingConfig) -> None:
        """For a pass of the same shape, in logits and in codes."""
        many = self.draw(model, [0, 1, 2, 1], [7, 8, 9, 10], config)
        few = self.draw(model, [0, 0, 2, 0], [7, 1, 9, 2], config)
        assert torch.equal(many[[0, 2]], few[[0, 2]])
        logits = []
        for labels in ([0, 1, 2, 1], [0, 0, 2, 0]):
            decoder = build_decoder(model, rows=4, guided=config.guided)
            logits += [decoder.head.logits(decoder.prefill(torch.tensor(labels)))]
        assert torch.equal(logits[0][[0, 2]], logits[1][[0, 2]])

    def test_a_decoder_serves_many_passes(self, model: Any) -> None:
        decoder = build_decoder(model, rows=2, guided=True)
        labels, ids = torch.tensor([0, 2]), torch.tensor([4, 5])
        first = sample(decoder, labels, ids, config=GUIDED, seed=3)
        sample(decoder, torch.tensor([1, 1]), torch.tensor([6, 7]), config=GUIDED, seed=3)
        assert torch.equal(sample(decoder, labels, ids, config=GUIDED, seed=3), first)

    def test_codes_are_in_the_vocabulary(self, model: Any) -> None:
        codes_BT = self.draw(model, [0, 1, 2], [0, 1, 2], PLAIN)
        assert codes_BT.shape == (3, model.shape.tokens)
        assert codes_BT.dtype == torch.int64
        assert 0 <= int(codes_BT.min()) <= int(codes_BT.max()) < model.shape.codes
