"""One position of RAR through all blocks, over a static cache: whole batches, on any device.

R streams, J positions of the cache, D width, H heads, E = D / H, K codes, M = 6 N + 2 modulations of N blocks and the head,
I inputs and O outputs of a linear layer
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.rar.memory import SHORTEST_PRODUCT
from models.generators.rar.network import Block, Rar
from models.layers.attention import CausalSelfAttention


class RarStep:
    """Weights of the blocks and of the head, and the keys and values of all positions so far."""

    def __init__(self, model: Rar, *, streams: int, dtype: torch.dtype):
        """dtype: of weights and cache; the head is always float32."""
        self.streams, self.width, self.heads = streams, model.config.width, model.config.heads
        self.dtype, self.eps = dtype, model.adaln_before_head.norm.eps
        self.blocks = [_BlockWeights(block, dtype) for block in model.blocks]
        self.logits = _Affine(model.lm_head, torch.float32)  # guidance multiplies rounding errors of logits
        on_device = {"dtype": dtype, "device": model.lm_head.weight.device}
        # With a gain of ones the CPU kernel takes two thirds of the time that it takes without one.
        device = on_device["device"]
        self.no_affine = {
            (width, kind): (torch.ones(width, dtype=kind, device=device), torch.zeros(width, dtype=kind, device=device))
            for width, kind in ((self.width, torch.float32), (self.width // self.heads, dtype))
        }
        length = max(model.shape.tokens + 1, SHORTEST_PRODUCT)
        shape = (len(self.blocks), streams, self.heads, length, self.width // self.heads)
        self.keys_RHJE = torch.zeros(shape, **on_device).unbind()
        self.values_RHJE = torch.zeros(shape, **on_device).unbind()
        ahead = torch.full((SHORTEST_PRODUCT, SHORTEST_PRODUCT), -torch.inf, **on_device)
        self.unseen_11J = ahead.triu(1)[:, None, None].unbind()

    def __call__(self, x_RD: Tensor, modulations_RMD: Tensor, position: int) -> Tensor:
        """Float32 hidden states (R, D) before the head; the position's keys and values join the cache.

        modulations_RMD: per block shift, scale and gate of attention, then of the MLP; last scale and shift of the head.
        """
        parts = modulations_RMD.unbind(1)
        for index, block in enumerate(self.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = parts[6 * index : 6 * index + 6]
            h_RD = block.qkv(self._norm(x_RD, scale1, shift1).to(self.dtype))
            h_RD = block.proj(self._attend(h_RD, index, position))
            x_RD = torch.addcmul(x_RD, gate1, h_RD.float())
            h_RD = F.gelu(block.fc1(self._norm(x_RD, scale2, shift2).to(self.dtype)))
            x_RD = torch.addcmul(x_RD, gate2, block.fc2(h_RD).float())
        return self._norm(x_RD, parts[-2], parts[-1])

    def _norm(self, x_RD: Tensor, scale_RD: Tensor, shift_RD: Tensor) -> Tensor:
        return torch.addcmul(shift_RD, self._normalise(x_RD), scale_RD)

    def _normalise(self, x: Tensor) -> Tensor:
        ones, zeros = self.no_affine[x.shape[-1], x.dtype]
        return F.layer_norm(x, ones.shape, ones, zeros, self.eps)

    def _attend(self, qkv_RD: Tensor, index: int, position: int) -> Tensor:
        keys_RHJE, values_RHJE = self.keys_RHJE[index], self.values_RHJE[index]
        qkv_R3HE = qkv_RD.view(self.streams, 3, self.heads, -1)
        # Normalising all three takes less time than queries and keys alone, which would be copied first.
        normed_R3HE = self._normalise(qkv_R3HE)
        keys_RHJE[:, :, position], values_RHJE[:, :, position] = normed_R3HE[:, 1], qkv_R3HE[:, 2]
        gain_E, bias_E = self.blocks[index].query
        q_RHE = torch.addcmul(bias_E, normed_R3HE[:, 0], gain_E)
        return self._attention(q_RHE, keys_RHJE, values_RHJE, position).reshape(self.streams, self.width)

    def _attention(self, q_RHE: Tensor, keys_RHJE: Tensor, values_RHJE: Tensor, position: int) -> Tensor:
        """One query per stream and head over the keys up to this position; (R, H, E)."""
        used = slice(position + 1)
        if q_RHE.is_cuda:
            keys_RHJE, values_RHJE = keys_RHJE[:, :, used], values_RHJE[:, :, used]
            return F.scaled_dot_product_attention(q_RHE[:, :, None], keys_RHJE, values_RHJE, scale=1.0)[:, :, 0]
        # On a core, batched products take half to two thirds of the time of the fused kernel, made for many queries.
        q = q_RHE.view(-1, 1, q_RHE.shape[-1])
        if position + 1 >= SHORTEST_PRODUCT:
            keys, values = keys_RHJE[:, :, used].flatten(0, 1), values_RHJE[:, :, used].flatten(0, 1)
            return torch.bmm(torch.bmm(q, keys.mT).softmax(-1), values)
        keys, values = (part[:, :, :SHORTEST_PRODUCT].flatten(0, 1) for part in (keys_RHJE, values_RHJE))
        return torch.bmm(torch.baddbmm(self.unseen_11J[position], q, keys.mT).softmax(-1), values)


class _BlockWeights:
    """The weights of one block."""

    def __init__(self, block: Block, dtype: torch.dtype):
        self.qkv, self.proj = _Affine(block.attn.qkv, dtype), _Affine(block.attn.proj, dtype)
        self.fc1, self.fc2 = _Affine(block.mlp.fc1, dtype), _Affine(block.mlp.fc2, dtype)
        self.query = [part.to(dtype) for part in query_affine(block.attn)]


class _Affine:
    """A linear layer whose weight is stored transposed on the CPU, where few rows then take a fifth less time."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        weight_IO = linear.weight.to(dtype).T
        self.weight_IO = weight_IO if weight_IO.is_cuda else weight_IO.contiguous()
        self.bias_O = linear.bias.to(dtype)

    def __call__(self, x_RI: Tensor) -> Tensor:
        return torch.addmm(self.bias_O, x_RI, self.weight_IO)


def query_affine(attention: CausalSelfAttention) -> tuple[Tensor, Tensor]:
    """Gain and bias (E,) of normalised queries that make those of keys and the softmax scale unnecessary.

    In the softmax of q.(k g + b) / sqrt(E), the term q.b is the same for every key and cancels; g / sqrt(E) can
    multiply the query.
    """
    gain_E = attention.k_norm.weight * attention.k_norm.weight.numel() ** -0.5
    return attention.q_norm.weight * gain_E, attention.q_norm.bias * gain_E
