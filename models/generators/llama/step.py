"""One position of a Llama-style transformer through its blocks, over a static cache: whole batches, on any device.

Constant factors are folded into the weights: the gains of the norms, sqrt(D), and the scale of the softmax.

R streams, J positions of the cache, D width, H heads, E = D / H, F = E / 2 pairs of channels, V hidden width of the MLP,
O outputs of a product
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generators.llama.memory import SHORTEST_PRODUCT
from models.generators.llama.network import EPS, Block
from models.generators.products import Product

FEW_STREAMS = 16  # up to here batched products are faster on the CPU than the fused kernel, made for many queries
Modulation = tuple[Tensor, ...]
"""Of a block: scale, shift and gate of attention, then of the MLP, each (R, D)."""


class UnitNorm:
    """x / sqrt(sum(x^2) + D eps): RMSNorm without its gain and without a factor of sqrt(D), in float32."""

    def __init__(self, width: int, device: torch.device):
        self.floor = torch.tensor((width * EPS) ** 0.5, device=device)
        self.gain = width**0.5
        """The factor that is left out, to be folded into the next weights."""

    def __call__(self, x_RD: Tensor) -> Tensor:
        return x_RD / torch.hypot(torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True), self.floor)


class LlamaStep:
    """Weights of some blocks, and the keys and values of all positions so far."""

    def __init__(
        self, blocks: Sequence[Block], rope_JF2: Tensor, *, streams: int, is_modulated: bool, dtype: torch.dtype
    ):
        """dtype: of weights and cache; the residual stream is float32."""
        width, heads = blocks[0].attention.wo.in_features, blocks[0].attention.heads
        device, own = rope_JF2.device, width // heads
        self.streams, self.heads, self.dtype = streams, heads, dtype
        self.norm = UnitNorm(width, device)
        # In modulated blocks the gain is folded into the modulation.
        gain = 1.0 if is_modulated else self.norm.gain
        self.blocks = [_BlockWeights(block, gain, is_modulated, rows=streams, dtype=dtype) for block in blocks]
        self.rope_JF = torch.view_as_complex(rope_JF2.float().contiguous())
        length = max(len(rope_JF2), SHORTEST_PRODUCT)
        self.cache_2RHJE = torch.zeros(len(blocks), 2, streams, heads, length, own, dtype=dtype, device=device).unbind()
        ahead = torch.full((SHORTEST_PRODUCT, SHORTEST_PRODUCT), -torch.inf, dtype=dtype, device=device)
        self.unseen_11J = ahead.triu(1)[:, None, None].unbind()

    def __call__(self, position: int, x_RD: Tensor, modulations: Sequence[Modulation] | None = None) -> Tensor:
        """Float32 (R, D) after the last block; the position's keys and values join the cache."""
        for index, block in enumerate(self.blocks):
            if modulations is None:
                x_RD = x_RD + self._attend(self._narrow(self.norm(x_RD)), index, position)
                x_RD = x_RD + self._feed_forward(self._narrow(self.norm(x_RD)), block)
                continue
            scale1, shift1, gate1, scale2, shift2, gate2 = modulations[index]
            h_RD = self._narrow(torch.addcmul(shift1, self.norm(x_RD), scale1))
            x_RD = torch.addcmul(x_RD, gate1, self._attend(h_RD, index, position).float())
            h_RD = self._narrow(torch.addcmul(shift2, self.norm(x_RD), scale2))
            x_RD = torch.addcmul(x_RD, gate2, self._feed_forward(h_RD, block).float())
        return x_RD

    def _narrow(self, h_RD: Tensor) -> Tensor:
        return h_RD.to(self.dtype)

    def _feed_forward(self, h_RD: Tensor, block: _BlockWeights) -> Tensor:
        h_RO = block.w13(h_RD)
        hidden = h_RO.shape[1] // 2
        return block.w2(F.silu(h_RO[:, :hidden]) * h_RO[:, hidden:])

    def _attend(self, h_RD: Tensor, index: int, position: int) -> Tensor:
        block, cache_2RHJE = self.blocks[index], self.cache_2RHJE[index]
        qkv_R3HE = block.wqkv(h_RD).view(self.streams, 3, self.heads, -1)
        self._rotate(qkv_R3HE[:, :2], position)
        cache_2RHJE[:, :, :, position] = qkv_R3HE[:, 1:].transpose(0, 1)
        if position == 0:  # attention over one position is its value
            return block.wo(qkv_R3HE[:, 2].reshape(h_RD.shape))
        return block.wo(self._attention(qkv_R3HE[:, 0], *cache_2RHJE, position).reshape(h_RD.shape))

    def _rotate(self, qk_R2HE: Tensor, position: int) -> None:
        """In place, and in float32: adjacent channels are the real and the imaginary part of one number."""
        wide_R2HE = qk_R2HE.float()
        torch.view_as_complex(wide_R2HE.unflatten(-1, (-1, 2))).mul_(self.rope_JF[position])
        if wide_R2HE is not qk_R2HE:
            qk_R2HE.copy_(wide_R2HE)

    def _attention(self, q_RHE: Tensor, keys_RHJE: Tensor, values_RHJE: Tensor, position: int) -> Tensor:
        """One query per stream and head over the keys up to this position; (R, H, E)."""
        used = slice(position + 1)
        if q_RHE.is_cuda or self.streams > FEW_STREAMS:
            keys_RHJE, values_RHJE = keys_RHJE[:, :, used], values_RHJE[:, :, used]
            return F.scaled_dot_product_attention(q_RHE[:, :, None], keys_RHJE, values_RHJE, scale=1.0)[:, :, 0]
        q = q_RHE.reshape(-1, 1, q_RHE.shape[-1])
        if position + 1 >= SHORTEST_PRODUCT:
            keys, values = keys_RHJE[:, :, used].flatten(0, 1), values_RHJE[:, :, used].flatten(0, 1)
            return torch.bmm(torch.bmm(q, keys.mT).softmax(-1), values).view_as(q_RHE)
        keys, values = (part[:, :, :SHORTEST_PRODUCT].flatten(0, 1) for part in (keys_RHJE, values_RHJE))
        return torch.bmm(torch.baddbmm(self.unseen_11J[position], q, keys.mT).softmax(-1), values).view_as(q_RHE)


class _BlockWeights:
    """The weights of one block, with constant factors folded in."""

    def __init__(self, block: Block, gain: float, is_modulated: bool, *, rows: int, dtype: torch.dtype):
        wqkv_OD, w13_OD = (
            block.attention.wqkv.weight.float(),
            torch.cat([block.feed_forward.w1.weight, block.feed_forward.w3.weight]).float(),
        )
        if not is_modulated:
            wqkv_OD, w13_OD = wqkv_OD * (gain * block.attention_norm.weight), w13_OD * (gain * block.ffn_norm.weight)
        width, heads = block.attention.wo.in_features, block.attention.heads
        query_OD, rest_OD = wqkv_OD.split([width, 2 * width])
        wqkv_OD = torch.cat([query_OD * (width // heads) ** -0.5, rest_OD])
        self.wqkv, self.w13 = Product(wqkv_OD, rows=rows, dtype=dtype), Product(w13_OD, rows=rows, dtype=dtype)
        self.wo = Product(block.attention.wo.weight, rows=rows, dtype=dtype)
        self.w2 = Product(block.feed_forward.w2.weight, rows=rows, dtype=dtype)
