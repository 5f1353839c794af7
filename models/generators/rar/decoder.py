"""RAR for the sampling loop: a static cache, summed position tables, and modulations computed once per class and step.

A modulation depends on (class, step) alone. They are computed for the distinct classes of a pass, for a stretch of
steps at a time and for all blocks at once; a step only selects rows. Each class has its own matrix product of fixed
shape, so that a sample does not depend on the other samples of its pass.

B rows, R streams (B, or 2B with guidance: the conditional half first), T tokens, J = T + 1 positions that are fed,
D width, K codes, C classes, U distinct classes of the pass ("no class" is one), S steps of a stretch, N blocks,
M = 6N + 2 modulations (of D numbers each)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.rar.memory import FEW_STREAMS, SHORTEST_STRETCH, STRETCH, table_bytes
from models.generators.rar.network import Rar
from models.generators.rar.step import RarStep
from models.generators.step_decoder import StepDecoder
from models.sampling.heads import CodeHead

if TYPE_CHECKING:
    from models.generators.rar.core_step import RarCoreStep

Step = Callable[[Tensor, Tensor, int], Tensor]


class RarDecoder(StepDecoder):
    """`StepDecoder` of RAR. Residual stream and modulations are float32: these are the most sensitive to rounding."""

    def __init__(
        self,
        model: Rar,
        *,
        rows: int,
        guided: bool,
        orders: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        orders = model.scan_T if orders is None else orders
        self.tables = model.pos_embed[0], model.target_aware_pos_embed[0]
        super().__init__(model, rows=rows, guided=guided, orders=orders, dtype=dtype)
        with torch.inference_mode():
            self._read_weights(model)
            self.run = self._choose_step(model)
            self.head = CodeHead(self.run.logits)
        self.use_graphs_on_cuda()

    @torch.inference_mode()
    def set_orders(self, orders: Tensor | None) -> None:
        super().set_orders(orders)
        every_T = torch.arange(self.tokens) if orders is None else orders
        self.places_JBD = _places(*self.tables, every_T.to(self.device)).float()

    def _read_weights(self, model: Rar) -> None:
        self.embeddings = model.embeddings.weight.float()
        self.cls_D = model.cls_token[0, 0].float()
        self.class_embeddings_CD = self.embeddings[self.shape.codes + 1 :]
        self.is_modulated = model.config.modulated
        if self.is_modulated:
            self.steps_JD = model.timesteps_embeddings[0, : self.tokens + 1].float()
        self.modulations = _join_modulations(model)

    def _choose_step(self, model: Rar) -> RarStep | RarCoreStep:
        """By the shape of a pass and the device alone, so that a sample does not depend on its values."""
        if self.device.type == "cpu" and self.dtype == torch.float32 and self.streams <= FEW_STREAMS:
            from models.generators.rar.core_step import RarCoreStep  # numba, which only this needs

            return RarCoreStep(model, streams=self.streams)
        return RarStep(model, streams=self.streams, dtype=self.dtype)

    def begin(self, condition: Tensor | None) -> Tensor:
        """Feed cls and the label."""
        assert condition is not None
        labels_R = self.labels_of(condition)
        self._begin_modulations(labels_R)
        self._feed(self.streams_of((self.cls_D + self.places_JBD[0]).expand(self.rows, -1)), 0)
        self.position = 1
        classes_RD = self.class_embeddings_CD[labels_R]
        return self._feed(classes_RD + self.streams_of(self.places_JBD[1].expand(self.rows, -1)), 1)

    def append(self, codes_B: Tensor) -> Tensor:
        """Feed codes."""
        x_BD = F.embedding(codes_B, self.embeddings) + self.places_JBD[self.position]
        return self._feed(self.streams_of(x_BD), self.position)

    def _feed(self, x_RD: Tensor, position: int) -> Tensor:
        return self.feed(position, x_RD, self._pick_modulations(position))

    def allocate(self) -> tuple[Tensor, ...]:
        """Of the residual stream, and of the modulations of each stream."""
        new = self.places_JBD.new_empty
        return new(self.streams, len(self.cls_D)), new(self.streams, len(self.modulations[1]))

    def compute(self, position: int, *inputs: Tensor) -> Tensor:
        """One position through all blocks and the norm before the head."""
        x_RD, picked_RM = inputs
        return self.run(x_RD, picked_RM.view(self.streams, -1, x_RD.shape[1]), position)

    def _begin_modulations(self, labels_R: Tensor) -> None:
        self.distinct_U, self.picks_R = labels_R.unique(return_inverse=True)
        self.stretch = range(0)
        if not self.is_modulated:  # one row for all classes and steps
            self.picks_R.zero_()
            self.stretch = range(self.tokens + 1)
            self.table_USM = self.modulations[1].expand(1, self.tokens + 1, -1)

    def _pick_modulations(self, position: int) -> Tensor:
        """The modulations of each stream at this position, (R, M D), in their buffer if there is one."""
        if position not in self.stretch:
            self._modulate_stretch(position)
        assert self.table_USM is not None
        table_UM = self.table_USM[:, position - self.stretch.start]
        return torch.index_select(table_UM, 0, self.picks_R, out=self.buffers[1] if self.buffers else None)

    def _modulate_stretch(self, position: int) -> None:
        """Compute the modulations of the distinct classes for the stretch of steps that holds this position."""
        length = self._stretch_length()
        start = position // length * length
        self.stretch = range(start, min(start + length, self.tokens + 1))
        conditions_USD = self.class_embeddings_CD[self.distinct_U, None] + self.steps_JD[start : self.stretch.stop]
        activated_USD = F.silu(conditions_USD)
        weight_MD, bias_M = self.modulations
        self.table_USM = None  # free its memory before the next is allocated
        self.table_USM = activated_USD.new_empty(*activated_USD.shape[:2], len(bias_M))
        for activated_SD, table_SM in zip(activated_USD, self.table_USM, strict=True):
            torch.addmm(bias_M, activated_SD, weight_MD.T, out=table_SM)

    def _stretch_length(self) -> int:
        """Steps per stretch, of even lengths; a function of the shape of a pass, not of its classes."""
        bytes_per_step = (self.rows + 1) * self.modulations[1].nbytes
        longest = min(STRETCH, max(SHORTEST_STRETCH, table_bytes(self.device.type) // bytes_per_step))
        positions = self.tokens + 1
        return -(-positions // -(-positions // longest))


def _join_modulations(model: Rar) -> list[Tensor]:
    """All adaLN linears as one, (M D, D) and (M D), for a LayerNorm without affine: x * scale + shift.

    Since (x w + b)(1 + s) + t = x (w + w s) + (b + b s + t) and s and t are linear in the condition, the affine of the
    norm and the 1 go into weights and biases. Per block: shift, scale, gate of attention, then of the MLP; last scale
    and shift of the head. Of a plain transformer the affines alone are left: (M D, 0) and (M D).
    """
    parts: list[Tensor] = []
    for block in model.blocks:
        # A bias is one more column.
        shift1, scale1, gate1, shift2, scale2, gate2 = _with_bias(block.adaLN_modulation, block.norm1, 6)
        if block.adaLN_modulation is None:
            gate1, gate2 = _one_of(gate1).expand_as(gate1), _one_of(gate2).expand_as(gate2)
        parts += [*_fold(block.norm1, scale1, shift1), gate1, *_fold(block.norm2, scale2, shift2), gate2]
    head = model.adaln_before_head
    scale, shift = _with_bias(head.adaLN_modulation, head.norm, 2)
    if head.adaLN_modulation is None:
        shift, scale = _fold(head.norm, scale, shift)
    else:
        scale = scale + _one_of(scale)
    joined = torch.cat([*parts, scale, shift])
    return [joined[:, :-1].contiguous(), joined[:, -1].contiguous()]


def _fold(norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale with the norm's affine folded in."""
    scale = scale + _one_of(scale)
    return shift + norm.bias[:, None] * scale, norm.weight[:, None] * scale


def _one_of(part: Tensor) -> Tensor:
    """The term that adds 1 to a modulation: zero weights and a bias of 1."""
    return F.one_hot(torch.tensor(part.shape[1] - 1, device=part.device), part.shape[1]).to(part.dtype)


def _with_bias(modulation: nn.Sequential | None, norm: nn.LayerNorm, parts: int) -> tuple[Tensor, ...]:
    """Weights and biases of each part, (D, D + 1); without a modulation zeros, (D, 1)."""
    if modulation is None:
        return norm.weight.new_zeros(parts, norm.weight.numel(), 1).unbind()
    return torch.cat([modulation[0].weight, modulation[0].bias[:, None]], dim=1).float().chunk(parts)


def _places(places_LD: Tensor, targets_LD: Tensor, orders: Tensor) -> Tensor:
    """Sum of both position tables at position j of a sequence in these orders, (T,) or (B, T): (J, B or 1, D)."""
    places_TB = 2 + torch.atleast_2d(orders).T
    own_TBD, target_TBD = places_LD[places_TB], targets_LD[places_TB]
    first_1BD = places_LD[:1, None].expand_as(own_TBD[:1])
    second_1BD = places_LD[1] + target_TBD[:1]
    return torch.cat([first_1BD, second_1BD, own_TBD[:-1] + target_TBD[1:]])
