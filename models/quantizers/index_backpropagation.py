"""Index backpropagation quantization (IBQ, arXiv 2412.02692): all codes get gradients, through a softmax over the codebook.

A latent is replaced by the codebook row of the largest dot product; the gradient is that of the softmax-weighted mean row. An
entropy loss makes the distribution of each token sharp and that of codes uniform. `propagation.py` computes this exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantizers.config import IndexBackpropagationConfig
from models.quantizers.groups import GroupsTokens
from models.quantizers.propagation import Propagated, TokenGroup, propagate, tempered_mass
from models.quantizers.quantizer import Quantized
from models.quantizers.vector import most_similar

# Shapes: B images, D latent channels, h w latent grid, N tokens (B*h*w), K codes


class IndexBackpropagationQuantizer(GroupsTokens):
    """Codebook of `config.codes` rows of width `dim`, standard normal at first."""

    def __init__(self, config: IndexBackpropagationConfig, *, dim: int):
        super().__init__(
            config.codes, entropy_tokens=config.entropy_tokens, decay=config.usage_decay, dead_below=config.dead_below
        )
        self.config = config
        self.codebook_KD = nn.Parameter(torch.randn(config.codes, dim))

    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize; in training also keep the running use of codes. In the codebook's precision, even under autocast."""
        z_BhwD = z_BDhw.movedim(1, -1)
        z_ND = z_BhwD.reshape(-1, z_BDhw.shape[1]).to(self.codebook_KD.dtype)
        self.prepare(z_ND)
        temperature, groups = None, None
        if self.config.entropy_weight:
            temperature = self.config.temperature
            groups = [TokenGroup(one.rows, one.tokens, self.mass_of_all_passes(one)) for one in self.groups(len(z_ND))]
        with torch.autocast(z_BDhw.device.type, enabled=False):
            passed = propagate(z_ND, self.codebook_KD, beta=self.config.beta, temperature=temperature, groups=groups)
            losses, entropies = self.losses(passed)
        if self.training:
            self.count(passed.codes_N)
        chosen_BDhw = passed.z_ND.reshape(z_BhwD.shape).movedim(-1, 1)
        codes_Bhw = passed.codes_N.reshape(z_BhwD.shape[:3])
        return Quantized(chosen_BDhw, codes_Bhw, losses, self.stats(passed.codes_N) | entropies)

    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        return F.embedding(codes_Bhw, self.codebook_KD).movedim(-1, 1)

    def encode(self, z_BDhw: Tensor) -> Tensor:
        """Codes alone, without losses."""
        z_BhwD = z_BDhw.movedim(1, -1)
        return most_similar(z_BhwD.reshape(-1, z_BDhw.shape[1]), self.codebook_KD).reshape(z_BhwD.shape[:3])

    def needs_survey(self, tokens: int) -> bool:
        return bool(self.config.entropy_weight) and super().needs_survey(tokens)

    @torch.no_grad()
    def mass(self, z_ND: Tensor) -> Tensor:
        with torch.autocast(z_ND.device.type, enabled=False):
            return tempered_mass(z_ND.to(self.codebook_KD.dtype), self.codebook_KD, self.config.temperature)

    def losses(self, passed: Propagated) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses, and the two entropies (nats) for the log."""
        config = self.config
        losses = {"quantization": config.weight * passed.quantization}
        if not config.entropy_weight:
            return losses, {}
        groups = self.groups(len(passed.codes_N))
        codebook_entropy = self.mean_over_groups(list(passed.codebook_entropy_G), groups)
        balance = config.sample_weight * passed.sample_entropy - config.batch_weight * codebook_entropy
        entropies = {"sample_entropy": passed.sample_entropy.detach(), "codebook_entropy": codebook_entropy.detach()}
        return losses | {"entropy": config.entropy_weight * balance}, entropies
