"""What every autoregressive generator keeps to. A new one subclasses `GeneratorConformance` and builds itself.

class TestMine(GeneratorConformance):
    def build(self): return Mine(MineConfig(...), CodeShape(codes=12, grid=(2, 3), classes=3))
    def uncached(self, model, codes_BT, labels_B): return model(codes_BT[:, :-1], labels_B)
"""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from models.generators.generator import build_decoder
from models.generators.step_decoder import StepDecoder
from models.generators.step_graphs import Work
from models.sampling.config import ConstantGuidance, PowerCosineGuidance, SamplingConfig
from models.sampling.loop import sample

GUIDED = SamplingConfig(
    guidance=PowerCosineGuidance(scale=(3.0,), power=1.0), temperature=(0.9,), top_k=(8,), top_p=(0.95,)
)
PLAIN = SamplingConfig()


def teacher_forced(decoder: Any, codes_BT: Tensor, condition: Any) -> Tensor:
    """Logits (R, T, K) of every step, the given codes being fed through the cache; those of sub-tokens side by side."""
    logits = [drawn_logits(decoder, decoder.prefill(condition), codes_BT[:, 0])]
    for step in range(1, codes_BT.shape[1]):
        logits.append(drawn_logits(decoder, decoder.step(codes_BT[:, step - 1]), codes_BT[:, step]))
    return torch.stack(logits, dim=1)


def drawn_logits(decoder: Any, hidden_RD: Tensor, codes_B: Tensor) -> Tensor:
    """What these codes are drawn from, (R, K)."""
    logits = []

    def choose(subtoken: int, logits_RK: Tensor) -> Tensor:
        logits.append(logits_RK)
        return codes_B // math.prod(decoder.subtokens[:subtoken]) % decoder.subtokens[subtoken]

    with torch.inference_mode():
        assert torch.equal(decoder.head.draw(hidden_RD, choose), codes_B)
    return torch.cat(logits, dim=-1)


class GeneratorConformance:
    """Tests of training, of the cache and of sampling. Generators are tiny, and built with weights that say something."""

    def build(self) -> Any:
        raise NotImplementedError

    def uncached(self, model: Any, codes_BT: Tensor, condition: Any) -> Tensor:
        """Logits (B, T, K) of every code given those before it, by the training forward pass; of sub-tokens side by side."""
        raise NotImplementedError

    def condition(self, model: Any, labels_B: Tensor) -> Any:
        """What is given for images of classes 0..2."""
        return labels_B

    def settings(self, model: Any, config: SamplingConfig) -> SamplingConfig:
        """Without guidance where there is none."""
        return config if model.config.can_be_guided else config.model_copy(update={"guidance": ConstantGuidance()})

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self, model: Any, rows: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(1)
        codes_BT = torch.randint(model.shape.codes, (rows, model.shape.tokens), generator=generator)
        return codes_BT, self.condition(model, torch.randint(3, (rows,), generator=generator))

    def draw(self, model: Any, labels: list[int], ids: list[int], config: SamplingConfig) -> Tensor:
        config, condition = self.settings(model, config), self.condition(model, torch.tensor(labels))
        decoder = build_decoder(model, rows=len(labels), guided=config.guided)
        return sample(decoder, condition, torch.tensor(ids), config=config, seed=3)

    def test_the_loss_can_be_learnt(self, model: Any) -> None:
        codes_BT, condition = self.batch(model, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = float(model.loss(codes_BT, condition)[0].detach())
        for _ in range(30):
            optimizer.zero_grad()
            model.loss(codes_BT, condition)[0].backward()
            optimizer.step()
        last = float(model.loss(codes_BT, condition)[0].detach())
        assert abs(first - math.log(model.shape.codes)) < 1
        assert last < 0.5 * first

    def test_a_gradient_reaches_every_parameter(self, model: Any) -> None:
        model.loss(*self.batch(model, 8))[0].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    @torch.no_grad()
    def test_hidden_states_are_what_blocks_give(self, model: Any) -> None:
        codes_BT, _ = self.batch(model, 3)
        try:
            model.config.check_layer(0)
        except ValueError:
            with pytest.raises(ValueError, match="hidden states"):
                model.hidden_states(codes_BT, 0)
            return
        given: list[Tensor] = []
        for block in model.repeated_blocks():
            block.register_forward_hook(lambda block, taken, gave: given.append(gave))
        for layer in range(model.config.layers + 1):
            given.clear()
            states_BJD = model.hidden_states(codes_BT, layer)
            assert len(given) == layer
            assert states_BJD.shape[::2] == (3, model.config.width)
            assert not given or states_BJD is given[-1]
        with pytest.raises(ValueError, match="layers 0"):
            model.hidden_states(codes_BT, layer + 1)

    def test_no_code_sees_itself_or_later_ones(self, model: Any) -> None:
        codes_BT, condition = self.batch(model, 2)
        before = self.uncached(model, codes_BT, condition)
        for step in range(model.shape.tokens):
            changed_BT = codes_BT.clone()
            changed_BT[:, step:] = (changed_BT[:, step:] + 1) % model.shape.codes
            after = self.uncached(model, changed_BT, condition)
            torch.testing.assert_close(after[:, :step], before[:, :step])
            first = model.config.subtokens(model.shape)[0]  # its later sub-tokens see the earlier ones
            torch.testing.assert_close(after[:, step, :first], before[:, step, :first])

    def test_cached_equals_uncached(self, model: Any) -> None:
        codes_BT, condition = self.batch(model, 3)
        guided = model.config.can_be_guided
        decoder = build_decoder(model, rows=3, guided=guided)
        expected = [self.uncached(model, codes_BT, condition)]
        if guided:
            expected += [self.uncached(model, codes_BT, torch.full_like(condition, model.shape.classes))]
        for _ in range(2):  # the second pass finds the cache full of the first
            logits = teacher_forced(decoder, codes_BT, condition)
            torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
    def test_a_sample_is_the_same_bits_whatever_its_neighbours(self, model: Any, config: SamplingConfig) -> None:
        """For a pass of the same shape, in logits and in codes."""
        many = self.draw(model, [0, 1, 2, 1], [7, 8, 9, 10], config)
        few = self.draw(model, [0, 0, 2, 0], [7, 1, 9, 2], config)
        assert torch.equal(many[[0, 2]], few[[0, 2]])
        logits = []
        for labels in ([0, 1, 2, 1], [0, 0, 2, 0]):
            decoder = build_decoder(model, rows=4, guided=self.settings(model, config).guided)
            hidden_RD = decoder.prefill(self.condition(model, torch.tensor(labels)))
            logits += [drawn_logits(decoder, hidden_RD, torch.tensor([3, 1, 2, 0]))]
        assert torch.equal(logits[0][[0, 2]], logits[1][[0, 2]])

    def test_a_decoder_serves_many_passes(self, model: Any) -> None:
        settings = self.settings(model, GUIDED)
        decoder = build_decoder(model, rows=2, guided=settings.guided)

        def draw(labels: list[int], ids: list[int]) -> Tensor:
            condition = self.condition(model, torch.tensor(labels))
            return sample(decoder, condition, torch.tensor(ids), config=settings, seed=3)

        first = draw([0, 2], [4, 5])
        draw([1, 1], [6, 7])
        assert torch.equal(draw([0, 2], [4, 5]), first)

    def test_codes_are_in_the_vocabulary(self, model: Any) -> None:
        codes_BT = self.draw(model, [0, 1, 2], [0, 1, 2], PLAIN)
        assert codes_BT.shape == (3, model.shape.tokens)
        assert codes_BT.dtype == torch.int64
        assert 0 <= int(codes_BT.min()) <= int(codes_BT.max()) < model.shape.codes


class StepConformance(GeneratorConformance):
    """Generators that are sampled with a cache: other precisions, and steps that are recorded as graphs."""

    recorded: int
    """How many graphs a pass takes."""

    def test_bfloat16_is_near(self, model: Any) -> None:
        labels_B = torch.tensor([0, 2])
        exact, near = (build_decoder(model, rows=2, guided=True, dtype=dtype) for dtype in (None, torch.bfloat16))
        codes_B = torch.tensor([3, 1])
        logits, wanted = (drawn_logits(decoder, decoder.prefill(labels_B), codes_B) for decoder in (near, exact))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wanted, atol=0.1, rtol=0.05)
        assert (logits != logits.bfloat16()).any(), "guidance would multiply what is rounded away"

    @pytest.mark.parametrize("guided", [False, True])
    def test_buffers_that_never_move_change_nothing(self, model: Any, guided: bool) -> None:
        """What graphs replay, here by running it again: passes before, while and after it is recorded are the same."""
        recorded: list[Work] = []

        def record(work: Work) -> Work:
            recorded.append(work)
            return work

        settings, ids_B = SamplingConfig(guidance=ConstantGuidance(scale=(3.0 if guided else 1.0,))), torch.arange(2)
        buffered, plain = (build_decoder(model, rows=2, guided=guided) for _ in range(2))
        buffered.use_graphs(record)
        for labels in ([0, 2], [1, 1], [2, 0], [0, 2]):
            found, expected = (
                sample(one, torch.tensor(labels), ids_B, config=settings, seed=3) for one in (buffered, plain)
            )
            assert torch.equal(found, expected)
        assert len(recorded) == self.recorded
        first = buffered.prefill(torch.tensor([0, 1]))
        kept = first.clone()
        buffered.step(torch.tensor([0, 1]))
        assert torch.equal(first, kept), "logits that were given stay as they are"

    def test_a_decoder_with_graphs_goes_with_its_last_user(self, model: Any) -> None:
        """Its cache is gigabytes, for which no collection of cycles should have to come by."""
        decoder = build_decoder(model, rows=2, guided=True)
        decoder.use_graphs(lambda work: work)
        for _ in range(3):
            sample(
                decoder,
                torch.tensor([0, 2]),
                torch.arange(2),
                config=SamplingConfig(guidance=ConstantGuidance(scale=(3.0,))),
                seed=3,
            )
        gone = weakref.ref(decoder)
        gc.disable()
        try:
            del decoder
            assert gone() is None
        finally:
            gc.enable()

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("guided", [False, True])
    def test_graphs_draw_the_codes_of_single_kernels(
        self, model: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, guided: bool
    ) -> None:
        model = model.cuda()
        settings, ids_B = SamplingConfig(guidance=ConstantGuidance(scale=(3.0 if guided else 1.0,))), torch.arange(4)
        graphs = build_decoder(model, rows=4, guided=guided, dtype=dtype)
        assert graphs.graphs is not None
        monkeypatch.setattr(StepDecoder, "use_graphs_on_cuda", lambda decoder: None)
        plain = build_decoder(model, rows=4, guided=guided, dtype=dtype)
        for labels in ([0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 1], [0, 1, 2, 0]):
            found, expected = (
                sample(one, torch.tensor(labels), ids_B, config=settings, seed=3) for one in (graphs, plain)
            )
            assert torch.equal(found, expected)
