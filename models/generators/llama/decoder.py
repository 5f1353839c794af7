"""Llama-style generators for the sampling loop: a static cache, and modulations computed once per class of a pass.

B rows, R streams (B, or 2B with guidance: the conditional half first), D width, K values of a sub-token, C classes,
U distinct classes of a pass ("no class" is one), N blocks, M = 6 N + 2 modulations of D numbers each
"""

from __future__ import annotations

from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generators.llama.memory import CLASSES_AT_ONCE
from models.generators.llama.network import FactorizedHead, Llama, ModulatedBlock, ModulatedHead
from models.generators.llama.step import LlamaStep, UnitNorm
from models.generators.products import Product
from models.generators.step_decoder import StepDecoder
from models.generators.step_graphs import Capture, StepGraphs
from models.sampling.heads import Choose, CodeHead


class LlamaDecoder(StepDecoder):
    """See `StepDecoder`. Codes are in raster order, the only one that these generators are trained on."""

    def __init__(
        self,
        model: Llama,
        *,
        rows: int,
        guided: bool,
        orders: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, rows=rows, guided=guided, dtype=dtype)
        if orders is not None:
            raise ValueError("Llama-style generators generate codes in raster order only: leave orders out")
        with torch.inference_mode():
            self.split = model.split
            self.embeddings = [embedding.weight.float() for embedding in model.embeddings]
            self.class_embeddings_CD = model.class_embedding.weight.float()
            self.run = LlamaStep(
                list(model.blocks),
                model.rope_TF2,
                streams=self.streams,
                dtype=self.dtype,
                is_modulated=is_modulated(model),
            )
            self.modulations = Modulations(model, self.streams) if is_modulated(model) else None
            if isinstance(model.head, FactorizedHead):
                self.head = SubtokenHead(model, rows=rows, streams=self.streams, dtype=self.dtype)
            else:
                linear = Product(model.head.linears[0].weight, rows=self.streams, dtype=torch.float32)
                self.head = CodeHead(linear)
            self.use_graphs_on_cuda()

    def use_graphs(self, capture: Capture) -> None:
        super().use_graphs(capture)
        if isinstance(self.head, SubtokenHead):
            self.head.use_graphs(capture)

    def begin(self, condition: Tensor | None) -> Tensor:
        assert condition is not None
        labels_R = self.labels_of(condition)
        if self.modulations is not None:
            self.modulations.set(labels_R)
        return self.feed(0, F.embedding(labels_R, self.class_embeddings_CD))

    def append(self, codes_B: Tensor) -> Tensor:
        embedded = map(F.embedding, self.split(codes_B), self.embeddings)
        return self.feed(self.position, self.streams_of(sum(embedded, torch.zeros(()))))

    def compute(self, position: int, x_RD: Tensor) -> Tensor:
        if self.modulations is None:
            return self.run(position, x_RD)
        x_RD = self.run(position, x_RD, self.modulations.of_blocks)
        scale_RD, shift_RD = self.modulations.of_head
        return torch.addcmul(shift_RD, self.run.norm(x_RD), scale_RD)

    def allocate(self) -> tuple[Tensor, ...]:
        return (self.class_embeddings_CD.new_empty(self.streams, self.class_embeddings_CD.shape[1]),)


def is_modulated(model: Llama) -> bool:
    return isinstance(model.head, ModulatedHead)


class Modulations:
    """Scales, shifts and gates of each stream, the same at every step of a pass, in one static tensor.

    The norms' gains and the 1 that is added to a scale are folded into the scales.
    """

    def __init__(self, model: Llama, streams: int):
        self.model = model
        count, width = 6 * len(model.blocks) + 2, model.config.width
        self.gain = UnitNorm(width, model.rope_TF2.device).gain
        self.table_MRD = torch.empty(count, streams, width, device=model.rope_TF2.device)
        parts = self.table_MRD.unbind()
        self.of_blocks = [parts[start : start + 6] for start in range(0, count - 2, 6)]
        self.of_head = parts[-2:]

    def set(self, labels_R: Tensor) -> None:
        """Compute the modulations of each class once, and copy them to its streams."""
        distinct_U, picks_R = labels_R.unique(return_inverse=True)
        padded_U = F.pad(distinct_U, (0, -len(distinct_U) % CLASSES_AT_ONCE))
        embedded_UD = F.embedding(padded_U, self.model.class_embedding.weight.float())
        tables = [self._compute(F.silu(chunk_UD)) for chunk_UD in embedded_UD.split(CLASSES_AT_ONCE)]
        torch.index_select(torch.cat(tables, dim=1), 1, picks_R, out=self.table_MRD)

    def _compute(self, activated_UD: Tensor) -> Tensor:
        """(M, U, D): of each block scale, shift and gate of attention, then of the MLP; scale and shift of the head."""
        parts: list[Tensor] = []
        for block in self.model.blocks:
            assert isinstance(block, ModulatedBlock)
            gate1, gate2, scale1, scale2, shift1, shift2 = block.ada_lin(activated_UD).float().chunk(6, dim=-1)
            parts += [self._whole(scale1, block.attention_norm.weight), shift1, gate1]
            parts += [self._whole(scale2, block.ffn_norm.weight), shift2, gate2]
        head = self.model.head
        assert isinstance(head, ModulatedHead)
        scale, shift = head.ada_lin(activated_UD).float().chunk(2, dim=-1)
        return torch.stack([*parts, self._whole(scale, head.norm.weight), shift])

    def _whole(self, scale_UD: Tensor, weight_D: Tensor) -> Tensor:
        return (1 + scale_UD) * (self.gain * weight_D.float())


class SubtokenHead:
    """Draws the sub-tokens of a code one after the other, each given those before it, with a cache of one code."""

    def __init__(self, model: Llama, *, rows: int, streams: int, dtype: torch.dtype):
        head = model.head
        assert isinstance(head, FactorizedHead)
        self.rows, self.streams = rows, streams
        self.sizes = model.sizes
        self.embeddings = [embedding.weight.float() for embedding in model.embeddings]
        self.run = LlamaStep(list(head.blocks), head.rope_NF2, streams=streams, is_modulated=False, dtype=dtype)
        gain_D = self.run.norm.gain * head.norm.weight.float()
        self.linears = [
            Product(linear.weight.float() * gain_D, rows=streams, dtype=torch.float32) for linear in head.linears
        ]
        self.graphs: StepGraphs | None = None

    def draw(self, hidden_RD: Tensor, choose: Choose) -> Tensor:
        """Codes (B,)."""
        codes_B, x_RD = torch.zeros(self.rows, dtype=torch.int64, device=hidden_RD.device), hidden_RD
        for number, size in enumerate(self.sizes):
            values_B = choose(number, self.logits(number, x_RD))
            codes_B = codes_B + size * values_B
            if number + 1 < len(self.sizes):
                x_BD = F.embedding(values_B, self.embeddings[number])
                x_RD = torch.cat([x_BD, x_BD]) if self.streams > self.rows else x_BD
        return codes_B

    def logits(self, number: int, x_RD: Tensor) -> Tensor:
        """Float32 (R, K) of a sub-token: x_RD is the hidden state for the first, else the embedding of the one before."""
        if self.graphs is None:
            return self._compute(number, x_RD)
        self.x_RD.copy_(x_RD)
        self.graphs(number)
        return self.logits_RK[number].clone()

    def _compute(self, number: int, x_RD: Tensor) -> Tensor:
        return self.linears[number](self.run.norm(self.run(number, x_RD)))

    def use_graphs(self, capture: Capture) -> None:
        """See `StepDecoder.use_graphs`."""
        device = self.embeddings[0].device
        self.x_RD = torch.empty(self.streams, self.embeddings[0].shape[1], device=device)
        self.logits_RK = [torch.empty(self.streams, len(values), device=device) for values in self.embeddings]
        compute = WeakMethod(self._compute_in_place)  # no cycle, as in `StepDecoder`
        self.graphs = StepGraphs(lambda number: compute()(number), capture)

    def _compute_in_place(self, number: int) -> None:
        self.logits_RK[number].copy_(self._compute(number, self.x_RD))
