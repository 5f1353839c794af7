"""Keys and values of all positions so far, in static buffers.

R streams, J positions of the cache, N positions that are fed at once, D width, H heads, E = D / H, O = 3 D
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generators.memory import SHORTEST_PRODUCT

FEW_STREAMS = 8  # up to here the compiled attention is the faster one on the CPU


class KeyCache:
    """The cache of all blocks, and causal attention over it, softmax scale 1/sqrt(E)."""

    def __init__(
        self,
        *,
        blocks: int,
        streams: int,
        heads: int,
        positions: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.scale = (width // heads) ** -0.5
        shape = (blocks, 2, streams, heads, max(positions, SHORTEST_PRODUCT), width // heads)
        self.both_2RHJE = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.is_compiled = device.type == "cpu" and dtype == torch.float32 and streams <= FEW_STREAMS
        if self.is_compiled:
            from models.generators.core_kernels import attend  # numba, which only this needs

            self._compiled, self._arrays = attend, [tuple(both.numpy()) for both in self.both_2RHJE]
        ahead = torch.full((SHORTEST_PRODUCT, SHORTEST_PRODUCT), -torch.inf, dtype=dtype, device=device)
        self.unseen_11J = ahead.triu(1)[:, None, None].unbind()

    def attend_first(self, block: int, qkv_RNO: Tensor) -> Tensor:
        """Start a pass with N positions at once: (R, N, D)."""
        both_2RHJE = self.both_2RHJE[block]
        qkv_3RHNE = qkv_RNO.unflatten(-1, (3, both_2RHJE.shape[2], -1)).permute(2, 0, 3, 1, 4)
        both_2RHJE[:, :, :, : qkv_RNO.shape[1]] = qkv_3RHNE[1:]
        return F.scaled_dot_product_attention(*qkv_3RHNE, is_causal=True).transpose(1, 2).flatten(2)

    def attend(self, block: int, position: int, qkv_RO: Tensor) -> Tensor:
        """Add a position; attention of its queries over all positions so far, (R, D)."""
        if self.is_compiled:
            out_RD = self._compiled(qkv_RO.numpy(), *self._arrays[block], position, self.scale)
            return torch.from_numpy(out_RD)
        both_2RHJE = self.both_2RHJE[block]
        qkv_R3HE = qkv_RO.unflatten(-1, (3, both_2RHJE.shape[2], -1))
        both_2RHJE[:, :, :, position] = qkv_R3HE[:, 1:].transpose(0, 1)
        return self._attention(qkv_R3HE[:, 0], both_2RHJE, position).flatten(1)

    def _attention(self, q_RHE: Tensor, both_2RHJE: Tensor, position: int) -> Tensor:
        """One query per stream and head over the keys up to this position; (R, H, E)."""
        if q_RHE.is_cuda:
            keys_RHJE, values_RHJE = both_2RHJE[:, :, :, : position + 1]
            return F.scaled_dot_product_attention(q_RHE[:, :, None], keys_RHJE, values_RHJE)[:, :, 0]
        # On a core, batched products take half to two thirds of the time of the fused kernel, made for many queries.
        q = (q_RHE * self.scale).flatten(0, 1)[:, None]
        keys, values = both_2RHJE[:, :, :, : max(position + 1, SHORTEST_PRODUCT)].flatten(1, 2)
        products = torch.bmm(q, keys.mT)
        if position + 1 < SHORTEST_PRODUCT:
            products += self.unseen_11J[position]
        return torch.bmm(products.softmax(-1), values).view_as(q_RHE)
