"""Lookup-free quantization: the code of a latent is the signs of its channels (arXiv 2310.05737; Open-MAGVIT2).

The entropy loss is over a softmax of 2^D codes, but its logits are sums over channels, so it factorises exactly:
the entropy of a token is the sum of D binary entropies, and the mean distribution over codes is one matrix product of
the joint probabilities of the low and of the high half of the channels. No tensor of tokens x 2^D is allocated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.precision import at_least_float32
from models.quantizers.config import LookupFreeConfig
from models.quantizers.groups import GroupsTokens
from models.quantizers.quantizer import Quantized

# Shapes: B images, D latent channels (bits of a code), h w latent grid, N tokens (B*h*w), K = 2^D codes,
# L and M joint values of the low and of the high channels (L * M = K)
EPSILON = 1e-5  # inside the logarithm of the mean distribution, as published


class LookupFreeQuantizer(GroupsTokens):
    """Signs of `dim` channels, without parameters. Channel 0 is the lowest bit; a channel of exactly 0 is a 0 bit."""

    def __init__(self, config: LookupFreeConfig, *, dim: int):
        super().__init__(
            2**dim, entropy_tokens=config.entropy_tokens, decay=config.usage_decay, dead_below=config.dead_below
        )
        self.config = config
        self.register_buffer("bit_values_D", 2 ** torch.arange(dim), persistent=False)

    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize; the gradient passes straight through. In training also keep the running use of codes."""
        signs_BDhw = torch.where(z_BDhw > 0, 1.0, -1.0).to(z_BDhw.dtype)
        codes_Bhw = self.encode(z_BDhw)
        codes_N = codes_Bhw.flatten()
        z_ND = at_least_float32(z_BDhw).movedim(1, -1).reshape(len(codes_N), -1)
        self.prepare(z_ND)
        losses, entropies = self.losses(z_ND)
        if self.training:
            self.count(codes_N)
        passed_BDhw = signs_BDhw + (z_BDhw - z_BDhw.detach())  # exactly the signs, with the gradient of z
        return Quantized(passed_BDhw, codes_Bhw, losses, self.stats(codes_N) | entropies)

    def encode(self, z_BDhw: Tensor) -> Tensor:
        """Codes alone, without losses."""
        return ((z_BDhw > 0).movedim(1, -1) * self.bit_values_D).sum(-1)

    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        self.check_codes(codes_Bhw)
        is_set_BDhw = (codes_Bhw[..., None] & self.bit_values_D).movedim(-1, 1) != 0
        return torch.where(is_set_BDhw, 1.0, -1.0)

    def losses(self, z_ND: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses, and the two entropies (nats) for the log. Float32 even under autocast."""
        config = self.config
        with torch.autocast(z_ND.device.type, enabled=False):
            sample, codebook = self.entropies(z_ND)
            commitment = F.mse_loss(z_ND, torch.where(z_ND > 0, 1.0, -1.0).to(z_ND.dtype))
        weight = config.entropy_weight * (1 + config.enlargement(int(self.step)))
        losses = {
            "entropy": weight * (config.sample_weight * sample - config.batch_weight * codebook),
            "commitment": config.commitment_weight * commitment,
        }
        return losses, {"sample_entropy": sample.detach(), "codebook_entropy": codebook.detach()}

    def entropies(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of a token over all codes, and mean over groups of the entropy of their mean; nats, exact."""
        logits_ND, groups = code_logits(z_ND, self.config.temperature), self.groups(len(z_ND))
        codebook = []
        for group in groups:
            mass_ML, of_all_ML = joint_mass(logits_ND[group.rows]), self.mass_of_all_passes(group)
            if of_all_ML is not None:
                mass_ML = mass_ML + (of_all_ML - mass_ML).detach()
            codebook.append(entropy_of(mass_ML / group.tokens))
        return binary_entropy(logits_ND).sum(1).mean(), self.mean_over_groups(codebook, groups)

    @torch.no_grad()
    def mass(self, z_ND: Tensor) -> Tensor:
        with torch.autocast(z_ND.device.type, enabled=False):
            return joint_mass(code_logits(at_least_float32(z_ND), self.config.temperature))


def code_logits(z_ND: Tensor, temperature: float) -> Tensor:
    """The logit of +1 of each channel: that of code c is 2 z.c / temperature, so +1 has sigmoid(4 z / temperature)."""
    return z_ND * (4 / temperature)


def joint_mass(logits_ND: Tensor) -> Tensor:
    """The sum over tokens of the probabilities of all codes: those of the high channels (M) by those of the low (L)."""
    low = logits_ND.shape[1] // 2
    high_NM, low_NL = joint(logits_ND[:, low:]), joint(logits_ND[:, :low])
    return high_NM.T @ low_NL


def entropy_of(mean_ML: Tensor) -> Tensor:
    return -(mean_ML * (mean_ML + EPSILON).log()).sum()


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy of sigmoid(logit) in nats, without cancellation at large logits."""
    size = logits.abs()
    return torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)


def joint(logits_ND: Tensor) -> Tensor:
    """Probability of each of the 2^D values of D independent channels; channel 0 is the lowest bit.

    Through the logarithm: the gradient p (1 - p) of a sigmoid loses its digits near 1.
    """
    probabilities_NL = logits_ND.new_ones(len(logits_ND), 1)
    for logit_N in logits_ND.unbind(1):
        zero_NL = probabilities_NL * F.logsigmoid(-logit_N[:, None]).exp()
        probabilities_NL = torch.cat([zero_NL, probabilities_NL * F.logsigmoid(logit_N[:, None]).exp()], dim=1)
    return probabilities_NL
