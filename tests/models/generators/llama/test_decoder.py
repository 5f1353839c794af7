"""Llama-style generators keep to what every generator keeps to, and sample what the published implementations sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.generator import build_decoder
from models.generators.llama.network import Llama, ModulatedBlock
from models.sampling.config import ConstantGuidance, SamplingConfig
from models.sampling.loop import guide, sample
from tests.models.generators.conformance import StepConformance, teacher_forced
from tests.models.generators.llama.fixtures import IBQ, MAGVIT2, load, read

NUMBERS = {"width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "token_dropout": 0.0}


def build_loud(config: LlamaConfig | FactorizedConfig) -> Llama:
    """All parameters say something."""
    model = Llama(config, CodeShape(codes=12, grid=(2, 3), classes=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.5 if "embedding" in name else 0.2)
    return model


class LlamaSuite(StepConformance):
    def uncached(self, model: Llama, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
        return torch.cat(model(codes_BT, labels_B), dim=-1)

    def test_other_orders_are_refused(self, model: Llama) -> None:
        with pytest.raises(ValueError, match="in raster order"):
            build_decoder(model, rows=1, guided=False, orders=torch.arange(6))


class TestLlama(LlamaSuite):
    recorded = 6  # positions

    def build(self) -> Llama:
        return build_loud(LlamaConfig.model_validate(NUMBERS))

    def test_modulations_are_computed_once_per_class_of_a_pass(
        self, model: Llama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoder = build_decoder(model, rows=20, guided=True)
        rows: list[int] = []
        block = model.blocks[0]
        assert isinstance(block, ModulatedBlock)
        block.ada_lin.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        labels_B = torch.arange(20) % 3
        sample(
            decoder, labels_B, torch.arange(20), config=SamplingConfig(guidance=ConstantGuidance(scale=(2.0,))), seed=0
        )
        assert rows == [16]  # four classes, "no class" among them, in a product of a fixed shape


class TestFactorized(LlamaSuite):
    recorded = 6 + 3  # positions, and sub-tokens

    def build(self) -> Llama:
        return build_loud(FactorizedConfig.model_validate({**NUMBERS, "head_layers": 2, "factors": [2, 3, 2]}))

    def test_settings_of_each_sub_token(self, model: Llama) -> None:
        """With every sub-token but the first greedy, samples of one seed differ from greedy ones by the first alone."""
        likeliest = SamplingConfig(top_k=(1, 1, 1))
        codes = self.draw(model, [0, 1], [0, 1], likeliest)
        assert torch.equal(codes, self.draw(model, [0, 1], [5, 6], likeliest)), "nothing is left to chance"
        loose = SamplingConfig(temperature=(9.0, 1.0, 1.0), top_k=(2, 1, 1))
        assert not torch.equal(codes, self.draw(model, [0, 1], [0, 1], loose))


def test_guided_logits_of_ibq() -> None:
    spec, arrays = read(IBQ)
    tolerance = spec["tolerances"]["logits"]
    decoder = build_decoder(load(IBQ), rows=3, guided=True)
    logits_RTK = teacher_forced(decoder, arrays["in/tokens"], arrays["in/class"][:, 0])
    for found, name in zip(logits_RTK.chunk(2), ("cond", "uncond"), strict=True):
        torch.testing.assert_close(found, arrays[f"out/forced/{name}_logits"], atol=tolerance, rtol=0)
    guided_BTK = guide(logits_RTK, spec["config"]["cfg_scale"]) / spec["config"]["temperature"]
    wanted = arrays["out/forced/guided_logits_over_temperature"]
    torch.testing.assert_close(guided_BTK, wanted, atol=3 * tolerance, rtol=0)


def test_guided_logits_of_open_magvit2() -> None:
    spec, arrays = read(MAGVIT2)
    codes_BT = arrays["out/target_pre"] + 16 * arrays["out/target_post"]
    decoder = build_decoder(load(MAGVIT2), rows=2, guided=True)
    logits_RTK = teacher_forced(decoder, codes_BT, arrays["in/class_label"]).split([16, 256], dim=-1)
    for part, logits, scale in zip(("pre", "post"), logits_RTK, spec["config"]["cfg_scale"], strict=True):
        wanted = arrays[f"out/tf/cfg_logits_{part}"]
        torch.testing.assert_close(guide(logits, scale), wanted, atol=spec["tolerances"]["logits"], rtol=0)


def greedy(model: Llama, labels_B: Tensor, *scale: float) -> Tensor:
    config = SamplingConfig(guidance=ConstantGuidance(scale=scale), greedy=True)
    decoder = build_decoder(model, rows=len(labels_B), guided=config.guided)
    return sample(decoder, labels_B, torch.arange(len(labels_B)), config=config, seed=0)


def test_greedy_sequences_of_ibq() -> None:
    spec, arrays = read(IBQ)
    codes_BT = greedy(load(IBQ), arrays["in/class"][:, 0], spec["config"]["cfg_scale"])
    assert torch.equal(codes_BT, arrays["out/greedy/sequence"])


def test_greedy_sequences_of_open_magvit2() -> None:
    spec, arrays = read(MAGVIT2)
    model, labels_B = load(MAGVIT2), arrays["in/class_label"]
    assert torch.equal(greedy(model, labels_B, *spec["config"]["cfg_scale"]), arrays["out/greedy/full_index"])
    unguided = arrays["out/greedy_nocfg/pre"] + 16 * arrays["out/greedy_nocfg/post"]
    assert torch.equal(greedy(model, labels_B, 1.0), unguided)


@pytest.mark.parametrize("fixture", [IBQ, MAGVIT2], ids=["llama", "factorized"])
@pytest.mark.parametrize("rows", [1, 5, 9, 40])
def test_any_number_of_rows(fixture: object, rows: int) -> None:
    """Few and many rows take different kernels."""
    model = load(fixture)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(rows)
    codes_BT = torch.randint(96, (rows, 16), generator=generator)
    labels_B = torch.randint(10, (rows,), generator=generator)
    with torch.inference_mode():
        found = teacher_forced(build_decoder(model, rows=rows, guided=False), codes_BT, labels_B)
        wanted = torch.cat(model(codes_BT, labels_B), dim=-1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
