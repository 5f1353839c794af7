"""RAR one step at a time: a static cache, summed position tables, and modulations shared by all that need the same.

A modulation depends on (class, step) alone. They are computed for the distinct classes of a pass, for a stretch of
steps at a time and for all blocks at once; a step only picks rows. Each class is a matrix product of its own and of
fixed shape, so no bit of a sample depends on which other samples are drawn with it.

B rows, R streams (B, or 2B with guidance: the conditional half first), T tokens, J = T + 1 positions that are fed,
D width, K codes, C classes, U distinct classes of the pass ("no class" is one), S steps of a stretch, N blocks,
M = 6N + 2 modulations (of D numbers each)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.config import SPARE_POSITIONS, RarConfig
from models.generators.rar.step import SHORTEST_PRODUCT, RarStep
from models.generators.step_graphs import Capture, GraphPool, StepGraphs

if TYPE_CHECKING:
    from models.generators.rar.network import Rar

STRETCH = 64  # steps of modulations that are kept at a time, if that many fit
SHORTEST_STRETCH = 16  # shorter ones would read the weights too often
CPU_TABLE_BYTES, DEVICE_TABLE_BYTES = 2**30, 2**33  # what the modulations of a stretch may take
FEW_STREAMS = 8  # up to here the compiled step is the faster one on a CPU, at widths of 256 to 1,408
Step = Callable[[Tensor, Tensor, int], Tensor]


class RarDecoder:
    """Passes of `rows` samples through one set of weights; buffers are allocated once and serve every pass.

    The weights are read as they are at construction: build another decoder after an optimizer step. One pass is
    `prefill` and then `step` for each further token; both give float32 logits (R, K) of the next code.
    """

    def __init__(self, model: Rar, *, rows: int, guided: bool, orders: Tensor | None, dtype: torch.dtype | None):
        """orders: (T,) for all rows or (rows, T) one each, default raster.

        dtype: of the blocks' weights and of the cache, default theirs. The residual stream and the modulations are float32:
        rounding them would cost more than rounding all the rest.
        """
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.rows, self.guided, self.streams = rows, guided, rows * (1 + guided)
        self.codes, self.tokens, self.classes = model.codes, model.tokens, model.classes
        orders = torch.arange(model.tokens) if orders is None else orders
        orders = orders.to(self.device)
        self.orders_BT = orders.expand(rows, -1)
        with torch.inference_mode():
            self.places_JBD = _places(model, orders).float()
            self._read_weights(model)
            self.run = self._choose_step(model)
            self.graphs: StepGraphs | None = None
            if self.device.type == "cuda":
                self.use_graphs(GraphPool(self.device))

    def _read_weights(self, model: Rar) -> None:
        self.embeddings = model.embeddings.weight.float()
        self.cls_D = model.cls_token[0, 0].float()
        self.class_embeddings_CD = self.embeddings[model.codes + 1 :]
        self.steps_JD = model.timesteps_embeddings[0, : self.tokens + 1].float()
        self.modulations = _join_modulations(model)

    def _choose_step(self, model: Rar) -> Step:
        """By the shape of a pass and the device alone, so that a sample's bytes depend on nothing else."""
        if self.device.type == "cpu" and self.dtype == torch.float32 and self.streams <= FEW_STREAMS:
            from models.generators.rar.core_step import RarCoreStep  # numba, which only this needs

            return RarCoreStep(model, streams=self.streams)
        return RarStep(model, streams=self.streams, dtype=self.dtype)

    @torch.inference_mode()
    def use_graphs(self, capture: Capture) -> None:
        """From now on steps run by graphs, between buffers that never move."""
        self.x_RD = self.places_JBD.new_empty(self.streams, len(self.cls_D))
        self.picked_RM = self.places_JBD.new_empty(self.streams, len(self.modulations[1]))
        self.logits_RK = torch.empty(self.streams, self.codes, device=self.device)
        feed = WeakMethod(self._feed_buffers)  # no cycle: its memory is free as soon as nobody holds the decoder
        self.graphs = StepGraphs(lambda position: feed()(position), capture)

    @torch.inference_mode()
    def prefill(self, labels_B: Tensor) -> Tensor:
        """Start a pass for these labels (0..C, C is no class): feed cls and condition. Returns logits (R, K)."""
        labels_R = self._both(labels_B.to(self.device))
        labels_R[self.rows :] = self.classes
        self.distinct_U, self.picks_R = labels_R.unique(return_inverse=True)
        self.stretch = range(0)
        self._feed(self._both((self.cls_D + self.places_JBD[0]).expand(self.rows, -1)), 0)
        classes_RD = self.class_embeddings_CD[labels_R]
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
        modulations_RMD = picked_RM.view(self.streams, -1, x_RD.shape[1])
        return self.run(x_RD, modulations_RMD, position)

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
        activated_USD = F.silu(conditions_USD)
        weight_MD, bias_M = self.modulations
        self.table_USM = None  # the last one's memory is free before the next takes its own
        self.table_USM = activated_USD.new_empty(*activated_USD.shape[:2], len(bias_M))
        for activated_SD, table_SM in zip(activated_USD, self.table_USM, strict=True):
            torch.addmm(bias_M, activated_SD, weight_MD.T, out=table_SM)

    def _stretch_length(self) -> int:
        """Steps per stretch, even ones; by the shape of a pass, never by how many classes are in it."""
        bytes_per_step = (self.rows + 1) * self.modulations[1].nbytes
        longest = min(STRETCH, max(SHORTEST_STRETCH, table_bytes(self.device.type) // bytes_per_step))
        positions = self.tokens + 1
        return -(-positions // -(-positions // longest))


def table_bytes(device_type: str) -> int:
    return CPU_TABLE_BYTES if device_type == "cpu" else DEVICE_TABLE_BYTES


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
    """About how much memory a decoder and its network take; `bytes_per_number` is that of blocks and cache alone."""
    width, layers, streams, positions = config.width, config.layers, rows * (1 + guided), tokens + 1
    modulations = (6 * layers + 2) * width
    block = 4 * width * width + 2 * width * config.mlp_width
    own = layers * block + modulations * width + (2 * codes + classes + 3 * (positions + SPARE_POSITIONS)) * width
    # Joined modulations lie beside the network's; on the CPU many rows read transposed weights of blocks and head.
    is_copied = (device_type == "cpu" and streams > FEW_STREAMS) or bytes_per_number != 4
    copied = bytes_per_number * layers * block + 4 * codes * width if is_copied else 0
    weights = 4 * own + 4 * modulations * width + copied
    cache = 2 * layers * streams * max(positions, SHORTEST_PRODUCT) * width
    table = min(rows, classes + 1) * min(STRETCH, positions) * modulations
    largest_table = max(table_bytes(device_type), SHORTEST_STRETCH * rows * modulations * 4)
    work = streams * (modulations + 12 * width + config.mlp_width + 8 * codes + 2 * positions * config.heads)
    passes = bytes_per_number * cache + 4 * work + min(4 * table, largest_table)
    joining = 3 * 4 * modulations * width  # modulations as they are, in pieces and joined, before there is a cache
    return weights + max(passes, joining)


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
