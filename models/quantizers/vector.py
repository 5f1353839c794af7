"""Vector quantization: each latent becomes the nearest row of a learnt codebook (VQ-VAE, arXiv 1711.00937).

The codebook is initialised with latents of the first training step, and little-used codes are replaced by latents: both
keep small codebooks fully used. Random numbers come from torch's default generator, which the training seeds before each step.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantizers.config import VectorConfig
from models.quantizers.quantizer import Quantized
from models.quantizers.usage import CountsUse

# Shapes: B images, D latent channels, h w latent grid, N tokens (B*h*w), K codes
DISTANCES_PER_CHUNK = 2**22  # 16 MiB of float32, whatever the number of tokens and codes
CODES_PER_CHUNK = 2**14


class VectorQuantizer(CountsUse):
    """Codebook of `config.codes` rows of width `dim`."""

    def __init__(self, config: VectorConfig, *, dim: int):
        super().__init__(config.codes, decay=config.usage_decay, dead_below=config.revive_below)
        self.config = config
        self.codebook_KD = nn.Parameter(torch.empty(config.codes, dim).uniform_(-1 / config.codes, 1 / config.codes))

    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize; in training also keep the running use of codes, and revive the little-used ones when due."""
        z_BhwD = z_BDhw.permute(0, 2, 3, 1)
        z_ND = z_BhwD.reshape(-1, z_BDhw.shape[1])
        self.prepare(z_ND)
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

    def needs_survey(self, tokens: int) -> bool:
        return self.starts() or self.revives()

    def starts(self) -> bool:
        """Whether this step fills the codebook."""
        return self.config.init == "latents" and int(self.step) == 0

    def revives(self) -> bool:
        """Whether this step revives little-used codes."""
        config, step = self.config, int(self.step)
        return bool(config.revive_every and step % config.revive_every == 0 and 0 < step <= config.revive_until)

    @torch.no_grad()
    def survey(self, z_ND: Tensor) -> None:
        """Fill the codebook in the first training step, revive codes in every N-th."""
        if self.starts():
            self.replace(torch.ones_like(self.usage_K, dtype=torch.bool), z_ND)
        elif self.revives():
            self.replace(self.little_used(), z_ND)

    def replace(self, is_replaced_K: Tensor, z_ND: Tensor) -> None:
        """Put random latents of the whole batch into the marked rows, and count these rows as used evenly."""
        if self.part.world > 1:
            shares = [torch.empty_like(z_ND) for _ in range(self.part.world)]
            torch.distributed.all_gather(shares, z_ND.contiguous())
            z_ND = torch.cat(shares)
        rows = int(is_replaced_K.sum())
        draws = torch.randperm(len(z_ND), device=z_ND.device)
        fresh_ND = z_ND[draws.repeat(-(-rows // len(draws)))[:rows]].to(self.codebook_KD.dtype)
        if self.part.world > 1:
            torch.distributed.broadcast(fresh_ND, src=0)  # processes draw different rows, but need the same codebook
        self.codebook_KD[is_replaced_K] = fresh_ND
        self.usage_K[is_replaced_K] = 1 / self.config.codes


@torch.no_grad()
def nearest(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the nearest codebook row for each token; the first on ties; memory bounded by one chunk.

    Float32 even under autocast: half precision would move tokens to other codes.
    """
    return search(z_ND, codebook_KD, codebook_KD.float().square().sum(1) / 2)


@torch.no_grad()
def most_similar(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the codebook row with the largest dot product for each token; otherwise as `nearest`."""
    return search(z_ND, codebook_KD, codebook_KD.new_zeros(len(codebook_KD), dtype=torch.float32))


def search(z_ND: Tensor, codebook_KD: Tensor, offset_K: Tensor) -> Tensor:
    """Index of the smallest offset - z.c for each token, in chunks of tokens and of codes."""
    tokens = max(1, DISTANCES_PER_CHUNK // min(len(codebook_KD), CODES_PER_CHUNK))
    with torch.autocast(z_ND.device.type, enabled=False):
        codebook_KD = codebook_KD.float()
        return torch.cat([search_chunk(z_nD, codebook_KD, offset_K) for z_nD in z_ND.float().split(tokens)])


def search_chunk(z_nD: Tensor, codebook_KD: Tensor, offset_K: Tensor) -> Tensor:
    """A running minimum; with offset |c|^2 / 2 it orders codes as the squared distance does."""
    best_n = z_nD.new_full((len(z_nD),), torch.inf)
    codes_n = torch.zeros(len(z_nD), dtype=torch.int64, device=z_nD.device)
    for start in range(0, len(codebook_KD), CODES_PER_CHUNK):
        part = slice(start, start + CODES_PER_CHUNK)
        distance_n, code_n = torch.addmm(offset_K[part], z_nD, codebook_KD[part].T, alpha=-1).min(dim=1)
        codes_n = torch.where(distance_n < best_n, code_n + start, codes_n)
        best_n = torch.minimum(distance_n, best_n)
    return codes_n
