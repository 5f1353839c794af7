"""A linear layer to the logits of all codes, fused with their cross entropy, so that many codes need little memory.

For 262,144 codes the logits of 2,048 positions are 2 GiB, and their cross entropy takes several times that. Here they are
computed for a block of codes at a time, and again in the backward pass: one tile of them is in memory at a time, and
every row of the weight is read once in either pass.

M positions, D width, K codes, k codes of a block
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.precision import at_least_float32

MANY_CODES = 2**16  # with fewer codes computing logits twice costs more than it saves
CPU_TILE, DEVICE_TILE = 2**21, 2**25  # logits of a tile: a CPU's cache, or enough work for a device
FEWEST_CODES = 256  # of a tile, however many rows it has


def head_cross_entropy(x_MD: Tensor, linear: nn.Linear, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of linear(x) in float32 or wider, and whether each target is the likeliest code, (M,) booleans."""
    if linear.out_features < MANY_CODES:
        logits_MK = at_least_float32(linear(x_MD))
        return F.cross_entropy(logits_MK, targets_M), logits_MK.detach().argmax(-1) == targets_M
    loss, hits_M = TiledCrossEntropy.apply(
        x_MD, linear.weight, linear.bias, targets_M, product_dtype(x_MD, linear.weight)
    )
    return loss, hits_M


def product_dtype(x_MD: Tensor, weight_KD: Tensor) -> torch.dtype:
    """The dtype of their product: autocast's, or the wider of the two."""
    kind = x_MD.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(x_MD.dtype, weight_KD.dtype)


class TiledCrossEntropy(torch.autograd.Function):
    """Mean cross entropy and hits, tile by tile; one number per position is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_KD: Tensor, bias_K: Tensor | None, targets_M: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        largest_M, total_M, of_target_M = (
            x_MD.new_full((len(x_MD),), start, dtype=wide) for start in (-torch.inf, -torch.inf, 0)
        )
        likeliest_M = torch.zeros_like(targets_M)
        with torch.autocast(x_MD.device.type, enabled=False):
            for codes, logits_Mk in tiles(x_MD.to(dtype), weight_KD, bias_K):
                above_M, code_M = logits_Mk.max(-1)
                likeliest_M = torch.where(above_M > largest_M, code_M + codes.start, likeliest_M)
                largest_M = torch.maximum(largest_M, above_M)
                place_M1, is_inside_M1 = places(targets_M, codes)
                of_target_M += (logits_Mk.gather(1, place_M1) * is_inside_M1)[:, 0]
                total_M = torch.logaddexp(total_M, logits_Mk.sub_(above_M[:, None]).exp_().sum(-1).log_() + above_M)
        ctx.dtype = dtype
        ctx.save_for_backward(x_MD, weight_KD, bias_K, targets_M, total_M)
        hits_M = likeliest_M == targets_M
        ctx.mark_non_differentiable(hits_M)
        return (total_M - of_target_M).mean(), hits_M

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x_MD, weight_KD, bias_K, targets_M, total_M = ctx.saved_tensors
        scale = gradients[0] / len(x_MD)
        narrow_MD = x_MD.to(ctx.dtype)
        scaled_MD = (x_MD * scale).to(ctx.dtype)
        of_x_MD = torch.zeros_like(x_MD, dtype=total_M.dtype)
        of_weight_KD = torch.empty_like(weight_KD)
        of_bias_K = None if bias_K is None else torch.empty_like(bias_K)
        with torch.autocast(x_MD.device.type, enabled=False):
            for codes, logits_Mk in tiles(narrow_MD, weight_KD, bias_K):
                surplus_Mk = logits_Mk.sub_(total_M[:, None]).exp_()  # probabilities, minus 1 for targets
                place_M1, is_inside_M1 = places(targets_M, codes)
                surplus_Mk.scatter_add_(1, place_M1, -is_inside_M1.to(surplus_Mk.dtype))
                if of_bias_K is not None:
                    of_bias_K[codes.start : codes.stop] = surplus_Mk.sum(0) * scale
                narrow_Mk = surplus_Mk.to(ctx.dtype)
                of_x_MD += narrow_Mk @ weight_KD[codes.start : codes.stop].to(ctx.dtype)
                of_weight_KD[codes.start : codes.stop] = narrow_Mk.T @ scaled_MD
        return (of_x_MD * scale).to(x_MD.dtype), of_weight_KD, of_bias_K, None, None


def tiles(x_MD: Tensor, weight_KD: Tensor, bias_K: Tensor | None) -> Iterator[tuple[range, Tensor]]:
    """Blocks of codes, each with its logits (M, k), float32 or wider, which the caller may overwrite."""
    tile = CPU_TILE if x_MD.device.type == "cpu" else DEVICE_TILE
    size = max(tile // len(x_MD), FEWEST_CODES)
    for start in range(0, len(weight_KD), size):
        codes = range(start, min(start + size, len(weight_KD)))
        logits_Mk = at_least_float32(x_MD @ weight_KD[start : codes.stop].to(x_MD.dtype).T)
        yield codes, logits_Mk if bias_K is None else logits_Mk.add_(bias_K[start : codes.stop])


def places(targets_M: Tensor, codes: range) -> tuple[Tensor, Tensor]:
    """The index of each target in the block, (M, 1), clamped, and whether the target is in the block."""
    place_M1 = (targets_M - codes.start)[:, None]
    return place_M1.clamp(0, len(codes) - 1), (place_M1 >= 0) & (place_M1 < len(codes))
