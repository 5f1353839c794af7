"""Conformance suite of the quantizers: subclass it, give `build`, and inherit the tests."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn


class QuantizerSuite:
    """Subclasses set `dim` and build one quantizer; latents are drawn around what it expects."""

    dim = 6

    def build(self) -> nn.Module:
        raise NotImplementedError

    def latents(self, seed: int = 0) -> Tensor:
        return torch.randn(3, self.dim, 4, 5, generator=torch.Generator().manual_seed(seed))

    @pytest.fixture
    def quantizer(self) -> nn.Module:
        """A quantizer that has seen one training step."""
        torch.manual_seed(1)
        quantizer = self.build().train()
        quantizer(self.latents())
        return quantizer.eval()

    def test_codes_are_in_range_and_agree_with_encode(self, quantizer: nn.Module) -> None:
        quantized = quantizer(self.latents())
        assert quantized.codes_Bhw.dtype == torch.int64
        assert quantized.codes_Bhw.shape == (3, 4, 5)
        assert 0 <= quantized.codes_Bhw.min() <= quantized.codes_Bhw.max() < quantizer.codebook_size
        assert torch.equal(quantized.codes_Bhw, quantizer.encode(self.latents()))

    def test_output_is_the_looked_up_code(self, quantizer: nn.Module) -> None:
        quantized = quantizer(self.latents())
        torch.testing.assert_close(quantized.z_BDhw, quantizer.lookup(quantized.codes_Bhw), rtol=0, atol=1e-6)

    def test_codes_are_fixed_points(self, quantizer: nn.Module) -> None:
        codes_Bhw = quantizer.encode(self.latents())
        assert torch.equal(quantizer.encode(quantizer.lookup(codes_Bhw)), codes_Bhw)

    def test_gradient_reaches_the_latents(self, quantizer: nn.Module) -> None:
        z_BDhw = self.latents().requires_grad_()
        quantizer.train()(z_BDhw).z_BDhw.sum().backward()
        assert z_BDhw.grad is not None
        assert z_BDhw.grad.abs().sum() > 0

    def test_losses_and_stats_are_scalars(self, quantizer: nn.Module) -> None:
        quantized = quantizer.train()(self.latents().requires_grad_())
        assert all(value.ndim == 0 and value.isfinite() for value in quantized.losses.values())
        assert all(value.ndim == 0 and not value.requires_grad for value in quantized.stats.values())

    def test_usage_and_perplexity_are_in_stats(self, quantizer: nn.Module) -> None:
        quantized = quantizer(self.latents())
        assert quantizer.stats(quantized.codes_Bhw.flatten()).keys() >= {"usage", "perplexity"}
        assert quantized.stats.keys() >= {"usage", "perplexity"}

    def test_evaluation_changes_no_state(self, quantizer: nn.Module) -> None:
        before = copy.deepcopy(quantizer.state_dict())
        quantizer(self.latents(1))
        assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())

    def test_resumed_training_is_exact(self) -> None:
        torch.manual_seed(1)
        whole, batches = self.build().train(), [self.latents(seed) for seed in range(6)]
        interrupted, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
        run_steps(whole, batches, first=0)
        run_steps(interrupted, batches[:3], first=0)
        resumed.load_state_dict(interrupted.state_dict())
        run_steps(resumed, batches[3:], first=3)
        assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in resumed.state_dict().items())


def run_steps(quantizer: nn.Module, batches: list[Tensor], *, first: int) -> None:
    """Training steps as the engine runs them: seeded before each, plain gradient descent."""
    for step, z_BDhw in enumerate(batches, first):
        torch.manual_seed(step)
        quantizer.zero_grad()
        losses = [*quantizer(z_BDhw).losses.values()]
        parameters = [*quantizer.parameters()]
        if parameters:
            sum(losses, torch.zeros(())).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
