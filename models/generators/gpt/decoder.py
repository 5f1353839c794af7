"""GPT for both sampling loops: one code after the other over a static cache, or all codes in each iteration.

B rows, which are as many streams (there is no guidance), N positions that are fed at once, T tokens, S codes of the condition, D
width, H heads, E = D / H, K codes, V = K + 5 (codes, then specials)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.gpt.network import MASK, Block, Gpt
from models.generators.key_cache import KeyCache
from models.generators.products import Product
from models.generators.step_decoder import StepDecoder
from models.sampling.heads import CodeHead


def decoder_of(
    model: Gpt, *, rows: int, guided: bool, orders: Tensor | None = None, dtype: torch.dtype | None = None
) -> GptDecoder | MaskedGptDecoder:
    """The decoder for the loop that `sampled_by` names. ValueError if guidance or orders are given."""
    if guided:
        raise ValueError("a gpt is not trained without its condition and cannot be guided: leave guidance out")
    if orders is not None:
        raise ValueError("a gpt generates codes in raster order only: leave orders out")
    if model.config.sampled_by == "masks":
        return MaskedGptDecoder(model, rows=rows, dtype=dtype)
    return GptDecoder(model, rows=rows, dtype=dtype)


class GptDecoder(StepDecoder):
    """`StepDecoder` of GPT: codes of a condition pass through the blocks at once. The residual stream is float32."""

    def __init__(self, model: Gpt, *, rows: int, dtype: torch.dtype | None):
        super().__init__(model, rows=rows, guided=False, dtype=dtype)
        self.model = model
        self.start = model.shape.condition.tokens if model.shape.condition else 0
        with torch.inference_mode():
            self.blocks = [_BlockWeights(block, rows=rows, dtype=self.dtype) for block in model.blocks]  # type: ignore[arg-type]
            self.logits = _product(model.head, rows, torch.float32)
            self.cache = KeyCache(
                blocks=len(self.blocks),
                streams=rows,
                heads=model.config.heads,
                positions=self.start + self.tokens,
                width=model.config.width,
                dtype=self.dtype,
                device=self.device,
            )
        self.head = CodeHead(self.logits)
        self.use_graphs_on_cuda()

    def begin(self, condition: Tensor | None) -> Tensor:
        """Feed the codes of the condition, if any, and the start token."""
        no_codes_B0 = torch.empty(self.rows, 0, dtype=torch.int64, device=self.device)
        x_BND = self.model.embed(no_codes_B0, condition).float()
        self.position = self.start
        if self.start:
            return self._run(x_BND, self.cache.attend_first)[:, -1]
        return self.feed(0, x_BND[:, 0])

    def append(self, codes_B: Tensor) -> Tensor:
        """Feed codes."""
        x_B1D = self.model.place(codes_B[:, None], self.model.positions, first=self.position - self.start)
        return self.feed(self.position, x_B1D[:, 0].float())

    def allocate(self) -> tuple[Tensor, ...]:
        """Of the residual stream."""
        return (torch.empty(self.rows, self.model.config.width, device=self.device),)

    def compute(self, position: int, *inputs: Tensor) -> Tensor:
        """One position through all blocks and the norm before the head."""
        return self._run(inputs[0], lambda block, qkv_BO: self.cache.attend(block, position, qkv_BO))

    def _run(self, x_BND: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """All blocks, and the last norm, of inputs (B, N, D) or (B, D)."""
        for index, block in enumerate(self.blocks):
            h_BND = block.norm1(x_BND) if block.is_pre else x_BND
            y_BND = attend(index, block.qkv(h_BND.to(self.dtype)))
            x_BND = x_BND + block.proj(y_BND)
            x_BND = x_BND if block.is_pre else block.norm1(x_BND)
            h_BND = block.norm2(x_BND) if block.is_pre else x_BND
            x_BND = x_BND + block.fc2(F.gelu(block.fc1(h_BND.to(self.dtype))))
            x_BND = x_BND if block.is_pre else block.norm2(x_BND)
        normed_BND: Tensor = self.model.norm(x_BND)
        return normed_BND


class _BlockWeights:
    """The layers of a block, as the step needs them."""

    def __init__(self, block: Block, *, rows: int, dtype: torch.dtype):
        self.is_pre, self.norm1, self.norm2 = block.is_pre, block.norm1, block.norm2
        self.qkv, self.proj = _product(block.attn.qkv, rows, dtype), _product(block.attn.proj, rows, dtype)
        self.fc1, self.fc2 = _product(block.mlp.fc1, rows, dtype), _product(block.mlp.fc2, rows, dtype)


def _product(linear: nn.Linear, rows: int, dtype: torch.dtype) -> Product:
    return Product(linear.weight, linear.bias, rows=rows, dtype=dtype)


class MaskedGptDecoder:
    """Passes of `rows` samples for the loop over masks; every call computes the whole sequence."""

    def __init__(self, model: Gpt, *, rows: int, dtype: torch.dtype | None):
        """dtype: of the products, default the weights' own."""
        weight = next(model.parameters())
        self.model, self.rows, self.device, self.dtype = model, rows, weight.device, dtype or weight.dtype
        self.tokens, self.guided = model.shape.tokens, False
        self.subtokens = model.config.subtokens(model.shape)

    @torch.inference_mode()
    def logits(self, codes_BT: Tensor, masks_BT: Tensor, condition: Tensor | None) -> Tensor:
        """Float32 logits (B, T, V) of every code, given those that are not masked."""
        is_other = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=is_other):
            hidden_BTV: Tensor = self.model(codes_BT.masked_fill(masks_BT, self.model.shape.codes + MASK), condition)
        return hidden_BTV[:, 1:].float()
