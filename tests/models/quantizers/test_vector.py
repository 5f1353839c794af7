"""Vector quantizer: conformance, losses by formula, first codebook, revival, bounded search, published assignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.quantizers import vector
from models.quantizers.config import VectorConfig
from models.quantizers.vector import VectorQuantizer, nearest
from tests.models.quantizers.quantizer_suite import QuantizerSuite

GOLDEN = Path(__file__).parents[2] / "golden" / "digit"


class TestConformance(QuantizerSuite):
    def build(self) -> nn.Module:
        return VectorQuantizer(VectorConfig(codes=16, revive_every=2, revive_until=10), dim=self.dim)


class TestUniformStart(QuantizerSuite):
    def build(self) -> nn.Module:
        return VectorQuantizer(VectorConfig(codes=16, init="uniform"), dim=self.dim)


@pytest.mark.parametrize(("beta_on", "commitment", "codebook"), [("commitment", 0.25, 1.0), ("codebook", 1.0, 0.25)])
def test_losses_follow_the_formula(beta_on: str, commitment: float, codebook: float) -> None:
    quantizer = VectorQuantizer(VectorConfig(codes=8, init="uniform", beta_on=beta_on, weight=2.0), dim=4)
    z_BDhw = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized = quantizer(z_BDhw)
    chosen_BDhw = quantizer.lookup(quantized.codes_Bhw)
    error = (z_BDhw - chosen_BDhw).square().mean()
    torch.testing.assert_close(quantized.losses["commitment"], 2 * commitment * error)
    torch.testing.assert_close(quantized.losses["codebook"], 2 * codebook * error)
    (gradient,) = torch.autograd.grad(quantized.losses["commitment"], z_BDhw, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * commitment * 2 * (z_BDhw - chosen_BDhw) / z_BDhw.numel())
    (gradient,) = torch.autograd.grad(quantized.losses["commitment"], quantizer.codebook_KD, allow_unused=True)
    assert gradient is None


def test_gradient_is_copied_through() -> None:
    quantizer = VectorQuantizer(VectorConfig(codes=8, init="uniform"), dim=4)
    z_BDhw = torch.randn(2, 4, 3, 3, requires_grad=True)
    weights_BDhw = torch.randn(2, 4, 3, 3)
    (quantizer(z_BDhw).z_BDhw * weights_BDhw).sum().backward()
    torch.testing.assert_close(z_BDhw.grad, weights_BDhw)


def test_first_training_step_fills_the_codebook_with_latents() -> None:
    quantizer = VectorQuantizer(VectorConfig(codes=18), dim=4).train()
    z_BDhw = torch.randn(2, 4, 3, 3)
    quantized = quantizer(z_BDhw)
    torch.testing.assert_close(quantized.z_BDhw, z_BDhw)  # as many codes as latents: each is its own code
    assert quantized.stats["usage"] == 1


def test_first_codebook_repeats_latents_when_there_are_fewer() -> None:
    quantizer = VectorQuantizer(VectorConfig(codes=10), dim=4).train()
    z_BDhw = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(quantizer(z_BDhw).z_BDhw, z_BDhw)


def test_unused_codes_are_revived_only_when_due() -> None:
    config = VectorConfig(codes=8, init="uniform", revive_every=3, revive_until=3, usage_decay=0.0)
    quantizer = VectorQuantizer(config, dim=2).train()
    with torch.no_grad():
        quantizer.codebook_KD.copy_(torch.full((8, 2), 100.0))
        quantizer.codebook_KD[0] = 0
    z_BDhw = torch.randn(2, 2, 4, 4)
    far = [int((quantizer.codebook_KD > 50).all(1).sum()) for _ in range(5) if quantizer(z_BDhw)]
    assert far == [7, 7, 7, 0, 0]


def test_revival_stops_after_its_last_step() -> None:
    config = VectorConfig(codes=8, init="uniform", revive_every=2, revive_until=3, usage_decay=0.0)
    quantizer = VectorQuantizer(config, dim=2).train()
    quantizer.step += 4
    with torch.no_grad():
        quantizer.codebook_KD.copy_(torch.full((8, 2), 100.0))
    quantizer(torch.randn(2, 2, 4, 4))
    quantizer(torch.randn(2, 2, 4, 4))
    assert (quantizer.codebook_KD == 100).all()


def test_nearest_equals_brute_force_in_any_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND, codebook_KD = torch.randn(57, 5), torch.randn(23, 5)
    expected_N = torch.cdist(z_ND.double(), codebook_KD.double()).argmin(1)
    monkeypatch.setattr(vector, "CODES_PER_CHUNK", 7)
    monkeypatch.setattr(vector, "DISTANCES_PER_CHUNK", 40)
    assert torch.equal(nearest(z_ND, codebook_KD), expected_N)


def test_nearest_takes_the_first_of_equal_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "CODES_PER_CHUNK", 2)
    codebook_KD = torch.tensor([[5.0], [1.0], [-1.0], [1.0]])
    assert nearest(torch.tensor([[1.0], [0.0], [-2.0]]), codebook_KD).tolist() == [1, 1, 2]


def test_nearest_agrees_with_published_semantic_tokens() -> None:
    golden = load_file(GOLDEN / "kmeans_assign.safetensors")
    codes_N = nearest(golden["in/features"].flatten(0, 1), golden["in/centroids_npy"])
    is_clear_N = golden["out/margin"].flatten() > 1e-3
    assert is_clear_N.sum() > 700
    assert torch.equal(codes_N[is_clear_N], golden["out/tokens"].flatten()[is_clear_N])
