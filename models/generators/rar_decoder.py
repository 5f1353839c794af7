"""RAR one step at a time: a static cache, summed position tables, and modulations shared by all that need the same.

A modulation depends on (class, step) alone. They are computed for the distinct classes of a pass, with the norms'
affines folded in, for a stretch of steps at a time; a step only picks rows. Each class is a matrix product of its own
and of fixed shape, so no bit of a sample depends on which other samples are drawn with it.

B rows, R streams (B, or 2B with guidance: the conditional half first), T tokens, D width, H heads, E = D / H, K codes,
U distinct classes of the pass (the last is "no class" with guidance), S steps of a stretch, N layers
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models.generators.rar import Block, Rar

STRETCH = 64  # about this many steps of modulations are kept at a time


class RarDecoder:
    """Passes of `rows` samples through one set of weights; buffers are allocated once and serve every pass.

    The weights are read as they are at construction: build another decoder after an optimizer step. One pass is
    `prefill` and then `step` for each further token; both give float32 logits (R, K) of the next code.
    """

    def __init__(self, model: Rar, *, rows: int, guided: bool, orders: Tensor | None, dtype: torch.dtype | None):
        """orders: (T,) for all rows or (rows, T) one each, default raster; dtype: of weights and cache, default theirs."""
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.rows, self.guided = rows, guided
        self.streams = rows * (1 + guided)
        self.codes, self.tokens, self.classes = model.codes, model.tokens, model.classes
        raster_T = torch.arange(model.tokens, device=self.device)
        self.orders_BT = (raster_T if orders is None else orders.to(self.device)).expand(rows, -1)
        with torch.inference_mode():
            self._read_weights(model)
            self.places_TBD = _places(model, raster_T if orders is None else orders.to(self.device)).to(self.dtype)
            self._allocate_cache(model)

    def _read_weights(self, model: Rar) -> None:
        self.width, self.heads = model.config.width, model.config.heads
        self.embeddings = model.embeddings.weight.to(self.dtype)
        self.cls_D = model.cls_token[0, 0].to(self.dtype)
        self.class_embeddings_CD = model.embeddings.weight[model.codes + 1 :].float()
        self.steps_JD = model.timesteps_embeddings[0, : self.tokens + 1].float()
        self.layers = [_Layer(block, self.dtype) for block in model.blocks]
        self.head_modulation = _linear(model.adaln_before_head.adaLN_modulation[0], self.dtype)
        self.head = _linear(model.lm_head, self.dtype)
        self.eps = model.adaln_before_head.norm.eps

    def _allocate_cache(self, model: Rar) -> None:
        shape = (len(self.layers), self.streams, self.heads, self.tokens + 1, self.width // self.heads)
        self.keys_NRHJE = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.values_NRHJE = torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def prefill(self, labels_B: Tensor) -> Tensor:
        """Start a pass for these labels (0..C, C is no class): feed cls and condition. Returns logits (R, K)."""
        labels_B = labels_B.to(self.device)
        if self.guided:
            labels_B = torch.cat([labels_B, torch.full_like(labels_B, self.classes)])
        self.distinct_U, self.picks_R = torch.unique(labels_B, return_inverse=True)
        self.stretch = range(0)
        self._feed(self.cls_D.expand(self.streams, -1) + self._places(0), 0)
        condition_RD = self.class_embeddings_CD.to(self.dtype)[labels_B]
        self.position = 1
        return self._logits(self._feed(condition_RD + self._places(1), 1), 1)

    @torch.inference_mode()
    def step(self, codes_B: Tensor) -> Tensor:
        """Append the code of the last step, one per row. Returns logits (R, K) of the next."""
        self.position += 1
        x_BD = F.embedding(codes_B, self.embeddings) + self.places_TBD[self.position]
        x_RD = torch.cat([x_BD, x_BD]) if self.guided else x_BD
        return self._logits(self._feed(x_RD, self.position), self.position)

    def _places(self, position: int) -> Tensor:
        places_BD = self.places_TBD[position]
        return torch.cat([places_BD.expand(self.rows, -1)] * (self.streams // self.rows))

    def _feed(self, x_RD: Tensor, position: int) -> Tensor:
        """One position through all blocks; its keys and values join the cache."""
        if position not in self.stretch:
            self._modulate_stretch(position)
        step = position - self.stretch.start
        for index, layer in enumerate(self.layers):
            scale1, shift1, gate1, scale2, shift2, gate2 = self._pick(layer.table_SU6D[step]).chunk(6, dim=-1)
            h_RD = torch.addcmul(shift1, F.layer_norm(x_RD, (self.width,), eps=self.eps), scale1)
            h_RD = self._attend(layer, index, h_RD, position)
            x_RD = torch.addcmul(x_RD, gate1, F.linear(h_RD, *layer.proj))
            h_RD = torch.addcmul(shift2, F.layer_norm(x_RD, (self.width,), eps=self.eps), scale2)
            h_RD = F.linear(F.gelu(F.linear(h_RD, *layer.fc1)), *layer.fc2)
            x_RD = torch.addcmul(x_RD, gate2, h_RD)
        return x_RD

    def _attend(self, layer: _Layer, index: int, h_RD: Tensor, position: int) -> Tensor:
        q_RHE, k_RHE, v_RHE = F.linear(h_RD, *layer.qkv).view(self.streams, 3, self.heads, -1).unbind(1)
        q_RHE = F.layer_norm(q_RHE, q_RHE.shape[-1:], *layer.q_norm, eps=self.eps)
        keys_RHJE, values_RHJE = self.keys_NRHJE[index], self.values_NRHJE[index]
        keys_RHJE[:, :, position] = F.layer_norm(k_RHE, k_RHE.shape[-1:], *layer.k_norm, eps=self.eps)
        values_RHJE[:, :, position] = v_RHE
        keys_RHJE, values_RHJE = keys_RHJE[:, :, : position + 1], values_RHJE[:, :, : position + 1]
        weights_RH1J = (q_RHE[:, :, None] @ keys_RHJE.mT).softmax(-1)
        return (weights_RH1J @ values_RHJE).view(self.streams, self.width)

    def _logits(self, x_RD: Tensor, position: int) -> Tensor:
        scale, shift = self._pick(self.head_table_SU2D[position - self.stretch.start]).chunk(2, dim=-1)
        h_RD = torch.addcmul(shift, F.layer_norm(x_RD, (self.width,), eps=self.eps), scale)
        return F.linear(h_RD, *self.head).float()

    def _pick(self, table_UD: Tensor) -> Tensor:
        return table_UD.index_select(0, self.picks_R)

    def _modulate_stretch(self, position: int) -> None:
        """Compute the modulations of the distinct classes for the stretch of steps that holds this position."""
        count = -(-(self.tokens + 1) // STRETCH)
        length = -(-(self.tokens + 1) // count)
        start = position // length * length
        self.stretch = range(start, min(start + length, self.tokens + 1))
        c_USD = self.class_embeddings_CD[self.distinct_U, None] + self.steps_JD[self.stretch.start : self.stretch.stop]
        activated_USD = F.silu(c_USD).to(self.dtype)
        for layer in self.layers:
            layer.table_SU6D = torch.stack([layer.modulations(a_SD) for a_SD in activated_USD], dim=1)
        self.head_table_SU2D = torch.stack([self._head_modulations(a_SD) for a_SD in activated_USD], dim=1)

    def _head_modulations(self, activated_SD: Tensor) -> Tensor:
        scale, shift = F.linear(activated_SD, *self.head_modulation).chunk(2, dim=-1)
        return torch.cat([1 + scale, shift], dim=-1)


class _Layer:
    """The weights of one block as the decoder reads them."""

    table_SU6D: Tensor

    def __init__(self, block: Block, dtype: torch.dtype):
        self.qkv, self.proj = _linear(block.attn.qkv, dtype), _linear(block.attn.proj, dtype)
        self.fc1, self.fc2 = _linear(block.mlp.fc1, dtype), _linear(block.mlp.fc2, dtype)
        self.adaln = _linear(block.adaLN_modulation[0], dtype)
        self.norm1, self.norm2 = _affine(block.norm1, dtype), _affine(block.norm2, dtype)
        # The softmax scale moves into the queries.
        shrink = block.attn.q_norm.weight.numel() ** -0.5
        self.q_norm = [part * shrink for part in _affine(block.attn.q_norm, dtype)]
        self.k_norm = _affine(block.attn.k_norm, dtype)

    def modulations(self, activated_SD: Tensor) -> Tensor:
        """(S, 6D): scale, shift, gate of attention, then of the MLP; applied to a LayerNorm without affine."""
        shift1, scale1, gate1, shift2, scale2, gate2 = F.linear(activated_SD, *self.adaln).chunk(6, dim=-1)
        parts = [*_fold(self.norm1, scale1, shift1), gate1, *_fold(self.norm2, scale2, shift2), gate2]
        return torch.cat(parts, dim=-1)


def _fold(norm: list[Tensor], scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(x w + b)(1 + scale) + shift as x scale' + shift'."""
    weight, bias = norm
    return weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)


def _linear(linear: torch.nn.Linear, dtype: torch.dtype) -> list[Tensor]:
    return [linear.weight.to(dtype), linear.bias.to(dtype)]


_affine = _linear  # a LayerNorm has the same two names


def _places(model: Rar, orders_BT: Tensor) -> Tensor:
    """Both position tables as one: what position j of a sequence in these orders adds, (T + 1, B or 1, D)."""
    places_TBD = (2 + orders_BT.reshape(-1, model.tokens)).T
    target_TBD = model.target_aware_pos_embed[0][places_TBD]
    own_TBD = model.pos_embed[0][places_TBD]
    first_1BD = model.pos_embed[0, :1, None].expand(1, own_TBD.shape[1], -1)
    second_1BD = model.pos_embed[0, 1] + target_TBD[:1]
    return torch.cat([first_1BD, second_1BD, own_TBD[:-1] + target_TBD[1:]])
