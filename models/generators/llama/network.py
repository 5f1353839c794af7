"""Llama-style generators: a causal transformer over codes in raster order, whose first position holds the class.

Two published kinds share this network. In IBQ (arXiv 2412.02692) every block is modulated by the class, and one linear
layer gives the logits of all codes. In Open-MAGVIT2 (arXiv 2409.04410) blocks are plain, a code is embedded as the sum of
its sub-tokens' embeddings, and a small transformer draws the sub-tokens one after the other from the hidden state.

B rows, T tokens of an image and positions (the class takes the place of the last code), D width, F pairs of channels
of a head, N sub-tokens of a code, K values of one, C classes; class C stands for no class
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig, LlamaSettings
from models.generators.generator import Generator, Streams
from models.generators.orders import draw_drops
from models.layers.modulation import modulate, modulation
from models.layers.rope import rope_table
from models.layers.rotary_attention import RotaryAttention
from models.layers.swiglu import SwiGlu
from models.losses.head_cross_entropy import head_cross_entropy

EPS = 1e-5
INIT_STD = 0.02
Run = Callable[..., Tensor]
"""Calls a block with its arguments, with or without activation checkpointing."""


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: LlamaSettings):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=EPS)
        self.attention = RotaryAttention(config.width, config.heads, dropout=config.dropout)
        self.ffn_norm = nn.RMSNorm(config.width, eps=EPS)
        self.feed_forward = SwiGlu(config.width, config.mlp_width, dropout=config.dropout)

    def forward(self, x_BTD: Tensor, rope_TF2: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_TF2)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class ModulatedBlock(Block):
    """The same with a scale, a shift and a gate for both, from the activated class embedding."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.ada_lin = modulation(config.width, 6)

    def forward(self, x_BTD: Tensor, rope_TF2: Tensor, activated_B1D: Tensor) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(activated_B1D).chunk(6, dim=-1)
        h_BTD = modulate(self.attention_norm(x_BTD), scale=scale1, shift=shift1)
        x_BTD = x_BTD + gate1 * self.attention(h_BTD, rope_TF2)
        h_BTD = modulate(self.ffn_norm(x_BTD), scale=scale2, shift=shift2)
        return x_BTD + gate2 * self.feed_forward(h_BTD)


class ModulatedHead(nn.Module):
    """RMSNorm, modulated by the class, then one linear layer to the logits of all codes."""

    def __init__(self, config: LlamaConfig, codes: int):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=EPS)
        self.ada_lin = modulation(config.width, 2)
        self.linears = nn.ModuleList([nn.Linear(config.width, codes, bias=False)])

    def forward(self, x_BTD: Tensor, embedded: Sequence[Tensor], activated_B1D: Tensor, run: Run) -> tuple[Tensor, ...]:
        """Input of the linear layer, (B, T, D)."""
        scale, shift = self.ada_lin(activated_B1D).chunk(2, dim=-1)
        return (modulate(self.norm(x_BTD), scale=scale, shift=shift),)


class FactorizedHead(nn.Module):
    """A causal transformer over the hidden state and then the sub-tokens but the last; a linear layer for each."""

    rope_NF2: Tensor

    def __init__(self, config: FactorizedConfig, factors: Sequence[int]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.head_layers))
        self.norm = nn.RMSNorm(config.width, eps=EPS)
        self.linears = nn.ModuleList(nn.Linear(config.width, factor, bias=False) for factor in factors)
        rope_NF2 = rope_table((1, len(factors) - 1), config.head_width)
        self.register_buffer("rope_NF2", rope_NF2, persistent=False)

    def forward(self, x_BTD: Tensor, embedded: Sequence[Tensor], activated_B1D: Tensor, run: Run) -> tuple[Tensor, ...]:
        """Input of each sub-token's linear layer, (B, T, D), given the embeddings (B, T, D) of the sub-tokens before it."""
        x_MND = torch.stack([x_BTD, *embedded], dim=2).flatten(0, 1)
        for block in self.blocks:
            x_MND = run(block, x_MND, self.rope_NF2)
        return self.norm(x_MND).unflatten(0, x_BTD.shape[:2]).unbind(2)


class Llama(Generator):
    """The network of both kinds; the config's kind decides on modulation and head."""

    config: LlamaConfig | FactorizedConfig
    rope_TF2: Tensor

    def __init__(self, config: LlamaConfig | FactorizedConfig, shape: CodeShape):
        super().__init__(config, shape)
        self.factors = config.subtokens(shape)
        self.sizes = [math.prod(self.factors[:index]) for index in range(len(self.factors))]
        """Place value of each sub-token in a code."""
        self.embeddings = nn.ModuleList(nn.Embedding(factor, config.width) for factor in self.factors)
        self.class_embedding = nn.Embedding(shape.classes + 1, config.width)
        self.blocks: nn.ModuleList
        self.head: ModulatedHead | FactorizedHead
        if isinstance(config, LlamaConfig):
            self.blocks = nn.ModuleList(ModulatedBlock(config) for _ in range(config.layers))
            self.head = ModulatedHead(config, shape.codes)
        else:
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.head = FactorizedHead(config, self.factors)
        self.dropout = nn.Dropout(config.token_dropout)
        rope_JF2 = rope_table(shape.grid, config.head_width)
        self.register_buffer("rope_TF2", rope_JF2[:-1], persistent=False)  # nothing follows the last code
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh parameters from torch's default generator.

        | tensor                                  | distribution | std                      |
        |-----------------------------------------|--------------|--------------------------|
        | embeddings, linear weights              | normal       | 0.02                     |
        | modulations: rows of the gates          | normal       | 0.02 * gate_scale        |
        | modulations: other rows, head's included| normal       | 0.01                     |
        | linear layers to logits, every bias     | zeros        |                          |
        | RMSNorm weights                         | ones         |                          |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Linear) and "ada_lin" in name:
                self._scale_modulation(module.weight)
        for linear in self.head.linears:
            nn.init.zeros_(linear.weight)

    @torch.no_grad()
    def _scale_modulation(self, weight_MD: Tensor) -> None:
        """Gates are the first two sixths of a block's modulations."""
        gates = 2 * self.config.width if len(weight_MD) == 6 * self.config.width else 0
        weight_MD[:gates] *= self.config.gate_scale if isinstance(self.config, LlamaConfig) else 1
        weight_MD[gates:] *= 0.5

    def draws(self, streams: Streams, rows: int, step: int) -> dict[str, NDArray[Any]]:
        """Which labels are dropped, (rows,)."""
        if not self.config.label_dropout:
            return {}
        return {"dropped": draw_drops(streams("labels"), rows, self.config.label_dropout)}

    def loss(
        self, codes_BT: Tensor, condition: Tensor | None, *, dropped: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Generator`: the sum of the sub-tokens' cross entropies; a code is correct if all its sub-tokens are.

        dropped: booleans (B,), True where the label is dropped.
        """
        assert condition is not None
        labels_B = condition if dropped is None else torch.where(dropped, self.shape.classes, condition)
        subtokens = self.split(codes_BT)
        features = self.features(subtokens, labels_B)
        parts = [
            head_cross_entropy(feature_BTD.flatten(0, 1), linear, subtoken_BT.flatten())
            for feature_BTD, linear, subtoken_BT in zip(features, self.head.linears, subtokens, strict=True)
        ]
        losses, hits = zip(*parts, strict=True)
        return sum(losses[1:], losses[0]), {"correct": torch.stack(hits).all(0).float().mean()}

    def forward(self, codes_BT: Tensor, labels_B: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, T, K) of each sub-token of every code, given the codes and sub-tokens before it.

        labels_B in 0..C, where C stands for no class.
        """
        features = self.features(self.split(codes_BT), labels_B)
        return tuple(linear(feature_BTD) for linear, feature_BTD in zip(self.head.linears, features, strict=True))

    def features(self, subtokens: Sequence[Tensor], labels_B: Tensor) -> tuple[Tensor, ...]:
        """Input of each sub-token's linear layer, (B, T, D)."""
        embedded = self._embed(subtokens)
        class_B1D = self.class_embedding(labels_B)[:, None]
        activated_B1D = F.silu(class_B1D)
        x_BTD = self._through(self.config.layers, embedded, class_B1D, activated_B1D)
        return self.head(x_BTD, embedded[:-1], activated_B1D, self._run)

    def hidden_states(self, codes_BT: Tensor, layer: int) -> Tensor:
        """See `Generator`: at the class, which is that of no class, and at each code but the last."""
        self.config.check_layer(layer)
        labels_B = codes_BT.new_full((len(codes_BT),), self.shape.classes)
        class_B1D = self.class_embedding(labels_B)[:, None]
        return self._through(layer, self._embed(self.split(codes_BT)), class_B1D, F.silu(class_B1D))

    def _embed(self, subtokens: Sequence[Tensor]) -> list[Tensor]:
        return [embedding(values_BT) for embedding, values_BT in zip(self.embeddings, subtokens, strict=True)]

    def _through(self, blocks: int, embedded: Sequence[Tensor], class_B1D: Tensor, activated_B1D: Tensor) -> Tensor:
        """Output of the first `blocks` blocks, (B, T, D)."""
        x_BTD = self.dropout(torch.cat([class_B1D, sum(embedded[1:], embedded[0])[:, :-1]], dim=1))
        for block in islice(self.blocks, blocks):
            modulations = (activated_B1D,) if isinstance(block, ModulatedBlock) else ()
            x_BTD = self._run(block, x_BTD, self.rope_TF2, *modulations)
        return x_BTD

    def _run(self, block: nn.Module, *arguments: Tensor) -> Tensor:
        if self.checkpoint_blocks and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def split(self, codes_BT: Tensor) -> list[Tensor]:
        """The sub-tokens of codes, the lowest first, each (B, T)."""
        return [codes_BT // size % factor for size, factor in zip(self.sizes, self.factors, strict=True)]

    def repeated_blocks(self) -> Iterable[nn.Module]:
        return self.blocks
