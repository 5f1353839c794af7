"""Vector quantization: each latent becomes the nearest row of a learnt codebook (VQ-VAE, arXiv 1711.00937).

The codebook starts from latents of the first training step, and codes that are hardly used are revived from latents:
both keep small codebooks fully used. What they need (step, running use) is in buffers, so that a checkpoint has it,
and draws come from torch's default generator, which the training engine seeds before every step.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from models.metrics import perplexity
from models.quantizers.config import VectorConfig
from models.quantizers.quantized import Quantized

# Shapes: B images, D latent channels, h w latent grid, N tokens (B*h*w), K codes
DISTANCES_PER_CHUNK = 2**22  # 16 MiB of float32, whatever the number of tokens and codes
CODES_PER_CHUNK = 2**14


class VectorQuantizer(nn.Module):
    """Codebook of `config.codes` rows of width `dim`."""

    def __init__(self, config: VectorConfig, *, dim: int):
        super().__init__()
        self.config = config
        self.codebook_size = config.codes
        self.codebook_KD = nn.Parameter(torch.empty(config.codes, dim).uniform_(-1 / config.codes, 1 / config.codes))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage_K", torch.full((config.codes,), 1 / config.codes))

    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize; in training also keep the running use of codes, and revive the little-used ones when due."""
        z_BhwD = z_BDhw.permute(0, 2, 3, 1)
        z_ND = z_BhwD.reshape(-1, z_BDhw.shape[1])
        if self.training:
            self.refresh(z_ND.detach())
        codes_N = nearest(z_ND.detach(), self.codebook_KD.detach())
        if self.training:
            self.count(codes_N)
        chosen_ND = F.embedding(codes_N, self.codebook_KD)
        passed_BhwD = (z_ND + (chosen_ND - z_ND).detach()).reshape(z_BhwD.shape)  # copies the gradient through
        codes_Bhw = codes_N.reshape(z_BhwD.shape[:3])
        return Quantized(passed_BhwD.permute(0, 3, 1, 2), codes_Bhw, self.losses(z_ND, chosen_ND), self.stats(codes_N))

    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        return F.embedding(codes_Bhw, self.codebook_KD).permute(0, 3, 1, 2)

    def encode(self, z_BDhw: Tensor) -> Tensor:
        """Codes alone, without losses."""
        z_BhwD = z_BDhw.permute(0, 2, 3, 1)
        return nearest(z_BhwD.reshape(-1, z_BDhw.shape[1]), self.codebook_KD).reshape(z_BhwD.shape[:3])

    def losses(self, z_ND: Tensor, chosen_ND: Tensor) -> dict[str, Tensor]:
        """Equation 3 of the paper, or taming's legacy form with beta on the codebook term."""
        weight = dict.fromkeys(("commitment", "codebook"), self.config.weight)
        weight[self.config.beta_on] *= self.config.beta
        return {
            "commitment": weight["commitment"] * F.mse_loss(z_ND, chosen_ND.detach()),
            "codebook": weight["codebook"] * F.mse_loss(chosen_ND, z_ND.detach()),
        }

    @torch.no_grad()
    def stats(self, codes_N: Tensor) -> dict[str, Tensor]:
        """Share of codes in this batch, their perplexity, and the share of codes below the revival bound."""
        counts_K = torch.bincount(codes_N, minlength=self.config.codes)
        return {
            "usage": (counts_K > 0).float().mean(),
            "perplexity": perplexity(counts_K),
            "dead": self.little_used().float().mean(),
        }

    @torch.no_grad()
    def refresh(self, z_ND: Tensor) -> None:
        """Before the search of a training step: fill the codebook at the first, revive codes at every N-th."""
        config, step = self.config, int(self.step)
        if step == 0 and config.init == "latents":
            self.replace(torch.ones_like(self.usage_K, dtype=torch.bool), z_ND)
        elif config.revive_every and step % config.revive_every == 0 and 0 < step <= config.revive_until:
            self.replace(self.little_used(), z_ND)

    def little_used(self) -> Tensor:
        return self.usage_K < self.config.revive_below / self.config.codes

    def replace(self, is_replaced_K: Tensor, z_ND: Tensor) -> None:
        """Put random latents into the marked rows, and count these rows as used evenly."""
        rows = int(is_replaced_K.sum())
        draws = torch.randperm(len(z_ND), device=z_ND.device)
        fresh_ND = z_ND[draws.repeat(-(-rows // len(draws)))[:rows]].to(self.codebook_KD.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(fresh_ND, src=0)  # every replica must hold one codebook
        self.codebook_KD[is_replaced_K] = fresh_ND
        self.usage_K[is_replaced_K] = 1 / self.config.codes

    @torch.no_grad()
    def count(self, codes_N: Tensor) -> None:
        """Advance the step and the running use, over all replicas."""
        counts_K = torch.bincount(codes_N, minlength=self.config.codes).to(self.usage_K.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_K)
        self.usage_K.lerp_(counts_K / counts_K.sum(), 1 - self.config.usage_decay)
        self.step += 1


@torch.no_grad()
def nearest(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the nearest codebook row for each token; the first on ties; memory bounded by one chunk.

    Float32 even under autocast: half precision would move tokens to other codes.
    """
    tokens = max(1, DISTANCES_PER_CHUNK // min(len(codebook_KD), CODES_PER_CHUNK))
    with torch.autocast(z_ND.device.type, enabled=False):
        codebook_KD = codebook_KD.float()
        half_norms_K = codebook_KD.square().sum(1) / 2
        return torch.cat([nearest_of_chunk(z_nD, codebook_KD, half_norms_K) for z_nD in z_ND.float().split(tokens)])


def nearest_of_chunk(z_nD: Tensor, codebook_KD: Tensor, half_norms_K: Tensor) -> Tensor:
    """A running minimum of |c|^2 / 2 - z.c, which orders codes as the squared distance does."""
    best_n = z_nD.new_full((len(z_nD),), torch.inf)
    codes_n = torch.zeros(len(z_nD), dtype=torch.int64, device=z_nD.device)
    for start in range(0, len(codebook_KD), CODES_PER_CHUNK):
        part = slice(start, start + CODES_PER_CHUNK)
        distance_n, code_n = torch.addmm(half_norms_K[part], z_nD, codebook_KD[part].T, alpha=-1).min(dim=1)
        codes_n = torch.where(distance_n < best_n, code_n + start, codes_n)
        best_n = torch.minimum(distance_n, best_n)
    return codes_n
