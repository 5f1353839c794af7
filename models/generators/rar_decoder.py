"""RAR one step at a time: a static cache, summed position tables, and modulations shared by all that need the same.

A modulation depends on (class, step) alone. They are computed for the distinct classes of a pass, for a stretch of
steps at a time and for all blocks at once; a step only picks rows. Each class is a matrix product of its own and of
fixed shape, so no bit of a sample depends on which other samples are drawn with it.

B rows, R streams (B, or 2B with guidance: the conditional half first), T tokens, J = T + 1 positions that are fed,
D width, H heads, E = D / H, K codes, C classes, U distinct classes of the pass ("no class" is one), S steps of a
stretch, N blocks, M = 6N + 2 modulations
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.config import SPARE_POSITIONS, RarConfig
from models.generators.step_graphs import Capture, GraphPool, StepGraphs

if TYPE_CHECKING:
    from models.generators.rar import Block, Rar

STRETCH = 64  # steps of modulations that are kept at a time, if that many fit
SHORTEST_STRETCH = 16  # shorter ones would read the weights too often
TABLE_BYTES = {"cpu": 2**30, "cuda": 2**33}
SHORTEST_PRODUCT = 16  # keys: batched products of fewer take a slow path on the CPU


class RarDecoder:
    """Passes of `rows` samples through one set of weights; buffers are allocated once and serve every pass.

    The weights are read as they are at construction: build another decoder after an optimizer step. One pass is
    `prefill` and then `step` for each further token; both give float32 logits (R, K) of the next code.
    """

    def __init__(self, model: Rar, *, rows: int, guided: bool, orders: Tensor | None, dtype: torch.dtype | None):
        """orders: (T,) for all rows or (rows, T) one each, default raster; dtype: of weights and cache, default theirs."""
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.rows, self.guided, self.streams = rows, guided, rows * (1 + guided)
        self.codes, self.tokens, self.classes = model.codes, model.tokens, model.classes
        orders = torch.arange(model.tokens) if orders is None else orders
        orders = orders.to(self.device)
        self.orders_BT = orders.expand(rows, -1)
        with torch.inference_mode():
            self.places_JBD = _places(model, orders).to(self.dtype)
            self._read_weights(model)
            self._allocate_cache()
            self.graphs: StepGraphs | None = None
            if self.device.type == "cuda":
                self.use_graphs(GraphPool(self.device))

    def _read_weights(self, model: Rar) -> None:
        self.width, self.heads, self.eps = model.config.width, model.config.heads, model.adaln_before_head.norm.eps
        # With a gain of ones the kernel of the CPU takes two thirds of the time that it takes without one.
        self.no_affine = [self.places_JBD.new_ones(self.width), self.places_JBD.new_zeros(self.width)]
        self.embeddings = model.embeddings.weight.to(self.dtype)
        self.cls_D = model.cls_token[0, 0].to(self.dtype)
        self.class_embeddings_CD = model.embeddings.weight[model.codes + 1 :].float()
        self.steps_JD = model.timesteps_embeddings[0, : self.tokens + 1].float()
        self.blocks = [_BlockWeights(block, self.dtype) for block in model.blocks]
        self.head = _Affine(model.lm_head, torch.float32)  # guidance multiplies what rounding takes from logits
        self.modulations = [part.to(self.dtype) for part in _join_modulations(model)]

    def _allocate_cache(self) -> None:
        length = max(self.tokens + 1, SHORTEST_PRODUCT)
        shape = (len(self.blocks), self.streams, self.heads, length, self.width // self.heads)
        self.keys_RHJE = torch.zeros(shape, dtype=self.dtype, device=self.device).unbind()
        self.values_RHJE = torch.zeros(shape, dtype=self.dtype, device=self.device).unbind()
        ahead = torch.full((SHORTEST_PRODUCT, SHORTEST_PRODUCT), -torch.inf, dtype=self.dtype, device=self.device)
        self.unseen_11J = ahead.triu(1)[:, None, None].unbind()

    @torch.inference_mode()
    def use_graphs(self, capture: Capture) -> None:
        """From now on steps run by graphs, between buffers that never move."""
        self.x_RD = self.places_JBD.new_empty(self.streams, self.width)
        self.picked_RM = self.places_JBD.new_empty(self.streams, len(self.modulations[1]))
        self.logits_RK = torch.empty(self.streams, self.codes, device=self.device)
        self.graphs = StepGraphs(self._feed_buffers, capture)

    @torch.inference_mode()
    def prefill(self, labels_B: Tensor) -> Tensor:
        """Start a pass for these labels (0..C, C is no class): feed cls and condition. Returns logits (R, K)."""
        labels_R = self._both(labels_B.to(self.device))
        labels_R[self.rows :] = self.classes
        self.distinct_U, self.picks_R = labels_R.unique(return_inverse=True)
        self.stretch = range(0)
        self._feed(self._both((self.cls_D + self.places_JBD[0]).expand(self.rows, -1)), 0)
        classes_RD = self.class_embeddings_CD.to(self.dtype)[labels_R]
        self.position = 1
        return self._feed(classes_RD + self._both(self.places_JBD[1].expand(self.rows, -1)), 1)

    @torch.inference_mode()
    def step(self, codes_B: Tensor) -> Tensor:
        """Append the code of the last step, one per row. Returns logits (R, K) of the next."""
        self.position += 1
        x_BD = F.embedding(codes_B, self.embeddings) + self.places_JBD[self.position]
        return self._feed(self._both(x_BD), self.position)

    def _both(self, rows: Tensor) -> Tensor:
        """Rows as streams: twice with guidance."""
        return torch.cat([rows] * (1 + self.guided))

    def _feed(self, x_RD: Tensor, position: int) -> Tensor:
        """One position through all blocks and the head; its keys and values join the cache."""
        if self.graphs is None:
            return self._compute(x_RD, self._pick_modulations(position), position)
        self.x_RD.copy_(x_RD)
        self._pick_modulations(position, out=self.picked_RM)
        self.graphs(position)
        return self.logits_RK.clone()

    def _feed_buffers(self, position: int) -> None:
        self.logits_RK.copy_(self._compute(self.x_RD, self.picked_RM, position))

    def _compute(self, x_RD: Tensor, picked_RM: Tensor, position: int) -> Tensor:
        parts = picked_RM.view(self.streams, -1, self.width).unbind(1)
        for index, block in enumerate(self.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = parts[6 * index : 6 * index + 6]
            h_RD = block.qkv(self._norm(x_RD, scale1, shift1))
            h_RD = block.proj(self._attend(h_RD, index, position))
            x_RD = torch.addcmul(x_RD, gate1, h_RD)
            h_RD = F.gelu(block.fc1(self._norm(x_RD, scale2, shift2)))
            x_RD = torch.addcmul(x_RD, gate2, block.fc2(h_RD))
        return self.head(self._norm(x_RD, parts[-2], parts[-1]).float())

    def _norm(self, x_RD: Tensor, scale_RD: Tensor, shift_RD: Tensor) -> Tensor:
        return torch.addcmul(shift_RD, F.layer_norm(x_RD, (self.width,), *self.no_affine, eps=self.eps), scale_RD)

    def _attend(self, qkv_RD: Tensor, index: int, position: int) -> Tensor:
        block, keys_RHJE, values_RHJE = self.blocks[index], self.keys_RHJE[index], self.values_RHJE[index]
        q_RHE, k_RHE, v_RHE = qkv_RD.view(self.streams, 3, self.heads, -1).unbind(1)
        keys_RHJE[:, :, position] = F.layer_norm(k_RHE, k_RHE.shape[-1:], *block.k_norm, eps=self.eps)
        values_RHJE[:, :, position] = v_RHE
        q_RHE = F.layer_norm(q_RHE, q_RHE.shape[-1:], *block.q_norm, eps=self.eps)
        return self._attention(q_RHE, keys_RHJE, values_RHJE, position).view(self.streams, self.width)

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

    def _pick_modulations(self, position: int, *, out: Tensor | None = None) -> Tensor:
        """The modulations of each stream at this position, (R, M D)."""
        if position not in self.stretch:
            self._modulate_stretch(position)
        table_UM = self.table_USM[:, position - self.stretch.start]
        return torch.index_select(table_UM, 0, self.picks_R, out=out)

    def _modulate_stretch(self, position: int) -> None:
        """Compute the modulations of the distinct classes for the stretch of steps that holds this position."""
        length = self._stretch_length()
        start = position // length * length
        self.stretch = range(start, min(start + length, self.tokens + 1))
        conditions_USD = self.class_embeddings_CD[self.distinct_U, None] + self.steps_JD[start : self.stretch.stop]
        activated_USD = F.silu(conditions_USD).to(self.dtype)
        weight_MD, bias_M = self.modulations
        self.table_USM = activated_USD.new_empty(*activated_USD.shape[:2], len(bias_M))
        for activated_SD, table_SM in zip(activated_USD, self.table_USM, strict=True):
            torch.addmm(bias_M, activated_SD, weight_MD.T, out=table_SM)

    def _stretch_length(self) -> int:
        """Steps per stretch, even ones; by the shape of a pass, never by how many classes are in it."""
        bytes_per_step = (self.rows + 1) * self.modulations[1].nbytes
        longest = min(STRETCH, max(SHORTEST_STRETCH, TABLE_BYTES[self.device.type] // bytes_per_step))
        positions = self.tokens + 1
        return -(-positions // -(-positions // longest))


def sampling_bytes(
    config: RarConfig,
    *,
    codes: int,
    tokens: int,
    classes: int,
    rows: int,
    guided: bool,
    bytes_per_number: int,
    device_type: str,
) -> int:
    """About how much memory a decoder and its network take; the network's own weights are float32."""
    width, layers, streams, positions = config.width, config.layers, rows * (1 + guided), tokens + 1
    modulations = (6 * layers + 2) * width
    block = 4 * width * width + 2 * width * config.mlp_width
    own = layers * block + modulations * width + (2 * codes + classes + 3 * (positions + SPARE_POSITIONS)) * width
    # On the CPU the weights lie transposed beside the network's; on a device of the same precision only modulations do.
    is_copied = device_type == "cpu" or bytes_per_number != 4
    weights = 4 * own + bytes_per_number * (own if is_copied else modulations * width)
    cache = 2 * layers * streams * max(positions, SHORTEST_PRODUCT) * width
    table = min(rows, classes + 1) * min(STRETCH, positions) * modulations
    largest_table = max(TABLE_BYTES[device_type], SHORTEST_STRETCH * rows * modulations * bytes_per_number)
    work = streams * (modulations + 12 * width + config.mlp_width + 8 * codes + 2 * positions * config.heads)
    passes = bytes_per_number * (cache + work) + min(bytes_per_number * table, largest_table)
    joining = 3 * 4 * modulations * width  # modulations as they are, in pieces and joined, before there is a cache
    return weights + max(passes, joining)


class _BlockWeights:
    """The weights of one block as the decoder reads them."""

    def __init__(self, block: Block, dtype: torch.dtype):
        self.qkv, self.proj = _Affine(block.attn.qkv, dtype), _Affine(block.attn.proj, dtype)
        self.fc1, self.fc2 = _Affine(block.mlp.fc1, dtype), _Affine(block.mlp.fc2, dtype)
        self.k_norm = _norm_weights(block.attn.k_norm, dtype)
        # The softmax scale moves into the queries.
        self.q_norm = [
            part * block.attn.q_norm.weight.numel() ** -0.5 for part in _norm_weights(block.attn.q_norm, dtype)
        ]


class _Affine:
    """A linear layer whose weight lies transposed in memory on the CPU, where few rows then take a fifth less time."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        weight_IO = linear.weight.to(dtype).T
        self.weight_IO = weight_IO if weight_IO.is_cuda else weight_IO.contiguous()
        self.bias_O = linear.bias.to(dtype)

    def __call__(self, x_RI: Tensor) -> Tensor:
        return torch.addmm(self.bias_O, x_RI, self.weight_IO)


def _norm_weights(norm: nn.LayerNorm, dtype: torch.dtype) -> list[Tensor]:
    return [norm.weight.to(dtype), norm.bias.to(dtype)]


def _join_modulations(model: Rar) -> list[Tensor]:
    """All adaLN linears as one, (M D, D) and (M D), for a LayerNorm without affine: x * scale + shift.

    Since (x w + b)(1 + s) + t = x (w + w s) + (b + b s + t) and s and t are linear in the condition, the affine of the
    norm and the 1 go into weights and biases. Per block: shift, scale, gate of attention, then of the MLP; last scale
    and shift of the head.
    """
    parts: list[Tensor] = []
    for block in model.blocks:
        # A bias is one more column.
        shift1, scale1, gate1, shift2, scale2, gate2 = _with_bias(block.adaLN_modulation[0]).chunk(6)
        parts += [*_fold(block.norm1, scale1, shift1), gate1, *_fold(block.norm2, scale2, shift2), gate2]
    scale, shift = _with_bias(model.adaln_before_head.adaLN_modulation[0]).chunk(2)
    scale = scale + _one_of(scale)
    joined = torch.cat([*parts, scale, shift])
    return [joined[:, :-1].contiguous(), joined[:, -1].contiguous()]


def _fold(norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale that do the work of the norm's affine too."""
    scale = scale + _one_of(scale)
    return shift + norm.bias[:, None] * scale, norm.weight[:, None] * scale


def _one_of(part: Tensor) -> Tensor:
    """What adds 1 to a modulation: zero weights and a bias of 1."""
    return F.one_hot(torch.tensor(part.shape[1] - 1, device=part.device), part.shape[1]).to(part.dtype)


def _with_bias(linear: nn.Linear) -> Tensor:
    return torch.cat([linear.weight, linear.bias[:, None]], dim=1).float()


def _places(model: Rar, orders: Tensor) -> Tensor:
    """Both position tables as one: what position j of a sequence in these orders adds, (J, B or 1, D)."""
    places_TB = 2 + orders.reshape(-1, model.tokens).T
    own_TBD, target_TBD = model.pos_embed[0][places_TB], model.target_aware_pos_embed[0][places_TB]
    first_1BD = model.pos_embed[0, :1, None].expand_as(own_TBD[:1])
    second_1BD = model.pos_embed[0, 1] + target_TBD[:1]
    return torch.cat([first_1BD, second_1BD, own_TBD[:-1] + target_TBD[1:]])
