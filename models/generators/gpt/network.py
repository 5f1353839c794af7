"""GPT over codes: the decoder-only transformer (fairseq) of DiGIT's generators and pixel decoders (arXiv 2410.12490).

The sequence is [condition codes, start, code, code, ...], in raster order. A class takes the place of the start. Sampled by
steps, attention is causal, in the condition too, and each position predicts the next code, the last one the end; sampled by
masks, attention is full, and a masked position predicts its own code. Norms come before attention and MLP or after the residual sums.

B rows, N codes that are given, T codes of an image, S codes of the condition (0 without), J = S + 1 + N positions, D width,
H heads, E = D / H, K codes, V = K + 5 (codes, then specials)
Ids of the embedding table: 0..K-1 codes, K..K+4 specials; class c is K + 5 + c; code s of the condition is K + 10 + s, because
published tables have rows for its specials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.generators.config import SPECIALS, UNREAD_POSITIONS, CodeShape, GptConfig
from models.generators.generator import Generator, Streams
from models.generators.masks import draw_masks, even_mask
from models.layers.mlp import Mlp

EPS = 1e-5
PAD, END, MASK = 1, 2, 3  # indices among the specials; the end token is also the start token
UNCOUNTED = -100  # a target that the loss ignores


class SelfAttention(nn.Module):
    """Fused qkv and a projection, all with bias; softmax scale 1/sqrt(E)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BJD: Tensor, *, is_causal: bool) -> Tensor:
        q_BHJE, k_BHJE, v_BHJE = self.qkv(x_BJD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y_BHJE = F.scaled_dot_product_attention(q_BHJE, k_BHJE, v_BHJE, is_causal=is_causal)
        projected: Tensor = self.proj(y_BHJE.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Attention and MLP, each with its LayerNorm before it (pre) or after its residual sum (post)."""

    def __init__(self, config: GptConfig):
        super().__init__()
        self.is_pre, self.is_causal = config.norm == "pre", config.sampled_by == "steps"
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = SelfAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = Mlp(config.width, config.mlp_width, dropout=0.0)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BJD: Tensor) -> Tensor:
        if self.is_pre:
            x_BJD = x_BJD + self.dropout(self.attn(self.norm1(x_BJD), is_causal=self.is_causal))
            return x_BJD + self.dropout(self.mlp(self.norm2(x_BJD)))
        x_BJD = self.norm1(x_BJD + self.dropout(self.attn(x_BJD, is_causal=self.is_causal)))
        normed_BJD: Tensor = self.norm2(x_BJD + self.dropout(self.mlp(x_BJD)))
        return normed_BJD


class Gpt(Generator):
    """The network."""

    config: GptConfig

    def __init__(self, config: GptConfig, shape: CodeShape):
        super().__init__(config, shape)
        self.embeddings = nn.Embedding(config.vocabulary(shape), config.width)
        rows = config.positions + UNREAD_POSITIONS
        self.positions = nn.Embedding(rows, config.width)
        self.condition_positions = nn.Embedding(rows, config.width) if shape.condition else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=EPS) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.width, shape.codes + SPECIALS, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh parameters from torch's default generator.

        | tensor                         | distribution                        | std or gain |
        |--------------------------------|-------------------------------------|-------------|
        | embeddings, positions, head    | normal; the rows of padding zeros   | D ** -0.5   |
        | each of q, k and v             | Xavier uniform                      | 2 ** -0.5   |
        | projection of attention        | Xavier uniform, bias zeros          | 1           |
        | MLP; biases of q, k and v      | PyTorch's of linear layers          |             |
        | norms                          | ones, biases zeros                  |             |
        """
        positions = [module for module in (self.positions, self.condition_positions) if module]
        for table in (self.embeddings, *positions, self.head):
            nn.init.normal_(table.weight, std=self.config.width**-0.5)
        with torch.no_grad():
            self.embeddings.weight[self.shape.codes + PAD] = 0
            for table in positions:
                table.weight[PAD] = 0
        for module in self.modules():
            if isinstance(module, Mlp):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()
            if isinstance(module, SelfAttention):
                module.qkv.reset_parameters()
                for part_DD in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(part_DD, gain=2**-0.5)
                nn.init.xavier_uniform_(module.proj.weight)
                nn.init.zeros_(module.proj.bias)

    def draws(self, streams: Streams, rows: int, step: int) -> dict[str, NDArray[Any]]:
        """Which codes are masked (rows, T), if sampled by masks."""
        if self.config.sampled_by == "steps":
            return {}
        return {"masks": draw_masks(streams("masks"), rows, self.shape.tokens)}

    def loss(
        self, codes_BT: Tensor, condition: Tensor | None, *, masks: Tensor | None = None, **draws: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean smoothed cross entropy over the vocabulary V: of all codes and the end token, or of the masked codes.

        See `Generator`.  masks: booleans (B, T), True where a code is masked; default `even_mask`.
        """
        if self.config.sampled_by == "steps":
            end_B1 = codes_BT.new_full((len(codes_BT), 1), self.shape.codes + END)
            return self._smoothed(self(codes_BT, condition), torch.cat([codes_BT, end_B1], dim=1))
        if masks is None:
            masks = torch.from_numpy(even_mask(self.shape.tokens)).to(codes_BT.device).expand_as(codes_BT)
        logits_BTV = self(codes_BT.masked_fill(masks, self.shape.codes + MASK), condition)[:, 1:]
        return self._smoothed(logits_BTV, codes_BT.masked_fill(~masks, UNCOUNTED))

    def _smoothed(self, logits_BNV: Tensor, targets_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits_BNV = logits_BNV.float()
        loss = F.cross_entropy(
            logits_BNV.flatten(0, 1),
            targets_BN.flatten(),
            label_smoothing=self.config.label_smoothing,
            ignore_index=UNCOUNTED,
        )
        hits_BN = logits_BNV.detach().argmax(-1) == targets_BN
        return loss, {"correct": hits_BN.sum() / (targets_BN != UNCOUNTED).sum()}

    def forward(self, codes_BN: Tensor, condition: Tensor | None) -> Tensor:
        """Logits (B, N + 1, V) at the start and at each of N codes (0..T), some of which may be the mask, K + 3.

        condition: labels (B,), codes (B, S) of another space, or None, as the config says.
        """
        *_, x_BJD = self.inner_states(codes_BN, condition)
        logits_BNV: Tensor = self.head(self.norm(x_BJD[:, -codes_BN.shape[1] - 1 :]))
        return logits_BNV

    def hidden_states(self, codes_BT: Tensor, layer: int) -> Tensor:
        """See `Generator`: at the start and at each code."""
        self.config.check_layer(layer)
        return next(islice(self.inner_states(codes_BT, None), layer, None))

    def inner_states(self, codes_BN: Tensor, condition: Tensor | None) -> Iterator[Tensor]:
        """The input of the first block, then the output of each block, (B, J, D)."""
        x_BJD = self.dropout(self.embed(codes_BN, condition))
        yield x_BJD
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x_BJD = checkpoint(block, x_BJD, use_reentrant=False)
            else:
                x_BJD = block(x_BJD)
            yield x_BJD

    def embed(self, codes_BN: Tensor, condition: Tensor | None) -> Tensor:
        """Embeddings of the whole sequence with positions, (B, J, D). The condition has its own position table."""
        start_B = codes_BN.new_full((len(codes_BN),), self.shape.codes + END)
        first_ids = self.shape.codes + SPECIALS
        if self.config.conditions_on == "class":
            assert condition is not None
            start_B = first_ids + condition
        ids_BN = torch.cat([start_B[:, None], codes_BN], dim=1)
        x_BJD = self.place(ids_BN, self.positions)
        if self.config.conditions_on == "codes":
            assert condition is not None
            assert self.condition_positions is not None
            prefix_BSD = self.place(first_ids + SPECIALS + condition, self.condition_positions)
            x_BJD = torch.cat([prefix_BSD, x_BJD], dim=1)
        return x_BJD

    def place(self, ids_BN: Tensor, positions: nn.Embedding, *, first: int = 0) -> Tensor:
        """Scaled embeddings at positions `first` and after it, (B, N, D)."""
        start = UNREAD_POSITIONS + first
        scaled_BND: Tensor = math.sqrt(self.config.width) * self.embeddings(ids_BN)
        return scaled_BND + positions.weight[start : start + ids_BN.shape[1]]

    def repeated_blocks(self) -> Iterable[nn.Module]:
        return self.blocks
