"""RAR, the randomised autoregressive generator (arXiv 2411.00776), under its published parameter names.

The sequence is [cls, condition, code, code, ...] in a given order of codes; each position gets an embedding of where it is
(`pos_embed`) and one of the position that it predicts (`target_aware_pos_embed`). Every block is modulated by class and
step, unless the config asks for a plain transformer.

B rows, T tokens of an image, N codes that are given (0..T), J = N + 2 positions, D width, K codes, C classes,
U labels that modulations are computed for, M the width of a block's modulations (6D; 2D at the head)
Ids of the embedding table: 0..K-1 codes, K unused, K+1+c class c, K+1+C no class.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.generators.config import SPARE_POSITIONS, SPARE_STEPS, CodeShape, RarConfig
from models.generators.generator import Generator, Streams
from models.generators.orders import draw_drops, draw_orders, scan_order
from models.layers.attention import CausalSelfAttention
from models.layers.mlp import Mlp
from models.layers.modulation import modulate, modulation
from models.losses.head_cross_entropy import head_cross_entropy

EPS = 1e-6
INIT_STD = 0.02
UNDECAYED = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm with its own affine, a modulation, and a gate."""

    def __init__(self, config: RarConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = CausalSelfAttention(
            config.width,
            config.heads,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            eps=EPS,
        )
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = Mlp(config.width, config.mlp_width, dropout=config.dropout)
        self.adaLN_modulation = modulation(config.width, 6) if config.modulated else None

    def forward(self, x_BJD: Tensor, activated_UJD: Tensor | None, picks_B: Tensor | slice) -> Tensor:
        if self.adaLN_modulation is None:
            x_BJD = x_BJD + self.attn(self.norm1(x_BJD))
            return x_BJD + self.mlp(self.norm2(x_BJD))
        modulations_BJM = self.adaLN_modulation(activated_UJD)[picks_B]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations_BJM.chunk(6, dim=-1)
        x_BJD = x_BJD + gate1 * self.attn(modulate(self.norm1(x_BJD), scale=scale1, shift=shift1))
        return x_BJD + gate2 * self.mlp(modulate(self.norm2(x_BJD), scale=scale2, shift=shift2))


class HeadNorm(nn.Module):
    """LayerNorm without affine, then a modulation whose scale comes first and shift second (unlike the blocks).

    In a plain transformer, a LayerNorm with affine.
    """

    def __init__(self, width: int, *, modulated: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=not modulated)
        self.adaLN_modulation = modulation(width, 2) if modulated else None

    def forward(self, x_BJD: Tensor, activated_UJD: Tensor | None, picks_B: Tensor | slice) -> Tensor:
        if self.adaLN_modulation is None:
            normed_BJD: Tensor = self.norm(x_BJD)
            return normed_BJD
        modulations_BJM = self.adaLN_modulation(activated_UJD)[picks_B]
        scale, shift = modulations_BJM.chunk(2, dim=-1)
        return modulate(self.norm(x_BJD), scale=scale, shift=shift)


class Rar(Generator):
    """The network."""

    scan_T: Tensor | None

    def __init__(self, config: RarConfig, shape: CodeShape):
        super().__init__(config, shape)
        # The order where none is drawn; None for raster.
        scan_T = (
            None if config.orders.scan == "raster" else torch.from_numpy(scan_order(config.orders.scan, shape.grid))
        )
        self.register_buffer("scan_T", scan_T, persistent=False)
        codes, tokens, classes = shape.codes, shape.tokens, shape.classes
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings = nn.Embedding(codes + classes + 2, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + SPARE_POSITIONS, width))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, tokens + SPARE_POSITIONS, width))
        if config.modulated:
            self.timesteps_embeddings = nn.Parameter(torch.zeros(1, tokens + SPARE_STEPS, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.adaln_before_head = HeadNorm(width, modulated=config.modulated)
        self.lm_head = nn.Linear(width, codes)
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh parameters from torch's default generator.

        | tensor                               | distribution                | std   |
        |--------------------------------------|-----------------------------|-------|
        | cls_token, every bias                | zeros                       |       |
        | LayerNorm weights                    | ones                        |       |
        | adaLN weights, head's included       | zeros                       |       |
        | other linear weights, lm_head        | normal, cut at +-2          | 0.02  |
        | embeddings: codes, classes, no class | normal, cut at +-2          | 0.02  |
        | both position tables                 | normal, cut at +-2          | 0.02  |
        | timesteps_embeddings                 | normal, cut at +-2          | 0.02  |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                (nn.init.zeros_ if "adaLN_modulation" in name else _cut_normal)(module.weight)
                nn.init.zeros_(module.bias)
        for table in self.tables():
            _cut_normal(table)

    def tables(self) -> list[Tensor]:
        """All embedding tables."""
        tables = [self.embeddings.weight, self.pos_embed, self.target_aware_pos_embed]
        return [*tables, self.timesteps_embeddings] if self.config.modulated else tables

    def draws(self, streams: Streams, rows: int, step: int) -> dict[str, NDArray[Any]]:
        """Orders (rows, T) while some are random, and which labels are dropped (rows,)."""
        drawn: dict[str, NDArray[Any]] = {}
        if ratio := self.config.orders.random_share(step):
            scan_T = scan_order(self.config.orders.scan, self.shape.grid)
            drawn["orders"] = draw_orders(streams("orders"), rows, scan_T, ratio)
        if self.config.label_dropout:
            drawn["dropped"] = draw_drops(streams("labels"), rows, self.config.label_dropout)
        return drawn

    def loss(
        self,
        codes_BT: Tensor,
        condition: Tensor | None,
        *,
        orders: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Generator`. orders: a permutation of 0..T-1 per row (B, T).  dropped: booleans (B,), True where the label is dropped."""
        labels_B = condition if dropped is None else torch.where(dropped, self.shape.classes, condition)
        codes_BT, orders = self._lay(codes_BT, orders)
        features_BTD = self.features(codes_BT[:, :-1], labels_B, orders)
        loss, hits = head_cross_entropy(features_BTD.flatten(0, 1), self.lm_head, codes_BT.flatten())
        return loss, {"correct": hits.float().mean()}

    def forward(self, shuffled_BN: Tensor, labels_B: Tensor, orders_BT: Tensor | None = None) -> Tensor:
        """Logits (B, N + 1, K) of steps 0..N, given the first N codes in generation order (N in 0..T).

        labels_B in 0..C, where C stands for no class.  orders_BT: default raster.
        """
        return self.lm_head(self.features(shuffled_BN, labels_B, orders_BT))

    def features(self, shuffled_BN: Tensor, labels_B: Tensor, orders_BT: Tensor | None) -> Tensor:
        """Input of the head, (B, N + 1, D)."""
        x_BJD, activated_UJD, picks_B = self._through(self.config.layers, shuffled_BN, labels_B, orders_BT)
        later_UJD = None if activated_UJD is None else activated_UJD[:, 1:]
        return self.adaln_before_head(x_BJD[:, 1:], later_UJD, picks_B)

    def hidden_states(self, codes_BT: Tensor, layer: int) -> Tensor:
        """See `Generator`: at `cls_token`, at the class, which is that of no class, and at each code, in the order of sampling."""
        self.config.check_layer(layer)
        shuffled_BT, orders_BT = self._lay(codes_BT, None)
        labels_B = codes_BT.new_full((len(codes_BT),), self.shape.classes)
        return self._through(layer, shuffled_BT, labels_B, orders_BT)[0]

    def _lay(self, codes_BT: Tensor, orders: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Codes in generation order, by default that of sampling, and that order of each row; None for raster."""
        orders = self.scan_T if orders is None else orders
        if orders is None:
            return codes_BT, None
        orders = orders.expand_as(codes_BT)
        return codes_BT.gather(1, orders), orders

    def _through(
        self, blocks: int, shuffled_BN: Tensor, labels_B: Tensor, orders_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | slice]:
        """Output of the first `blocks` blocks, (B, N + 2, D), and the input of their modulations (see `distinct`)."""
        x_BJD = self.embed(shuffled_BN, labels_B, orders_BT)
        distinct_U, picks_B = self.distinct(labels_B)
        activated_UJD = None
        if self.config.modulated:
            activated_UJD = F.silu(self.condition(distinct_U, positions=x_BJD.shape[1]))
        for block in islice(self.blocks, blocks):
            if self.checkpoint_blocks and self.training:
                x_BJD = checkpoint(block, x_BJD, activated_UJD, picks_B, use_reentrant=False)
            else:
                x_BJD = block(x_BJD, activated_UJD, picks_B)
        return x_BJD, activated_UJD, picks_B

    def embed(self, shuffled_BN: Tensor, labels_B: Tensor, orders_BT: Tensor | None) -> Tensor:
        """Input of block 0, (B, N + 2, D): embeddings of content, position and target position."""
        batch, given = shuffled_BN.shape
        if orders_BT is None:
            orders_BT = torch.arange(self.shape.tokens, device=shuffled_BN.device).expand(batch, -1)
        cls_B1D = self.cls_token.expand(batch, -1, -1)
        ids_BJ = torch.cat([self.condition_ids(labels_B)[:, None], shuffled_BN], dim=1)
        content_BJD = torch.cat([cls_B1D, self.embeddings(ids_BJ)], dim=1)
        first_B2 = torch.arange(2, device=orders_BT.device).expand(batch, -1)
        places_BJ = torch.cat([first_B2, 2 + orders_BT[:, :given]], dim=1)
        target_BJD = F.embedding(2 + orders_BT[:, : given + 1], self.target_aware_pos_embed[0])
        # Neither cls nor the last code predicts anything: they have no target row.
        target_BJD = F.pad(target_BJD, (0, 0, 1, given + 1 - target_BJD.shape[1]))
        return content_BJD + F.embedding(places_BJ, self.pos_embed[0]) + target_BJD

    def distinct(self, labels_B: Tensor) -> tuple[Tensor, Tensor | slice]:
        """Labels to compute modulations for, and the index of each row's label among them: all classes if there are fewer
        of them than rows, else each row its own. Sizes alone decide, so that no device has to synchronise."""
        if self.shape.classes + 1 < len(labels_B):
            return torch.arange(self.shape.classes + 1, device=labels_B.device), labels_B
        return labels_B, slice(None)

    def condition(self, labels_B: Tensor, *, positions: int) -> Tensor:
        """Condition of each position's modulation, (B, J, D): class embedding plus step embedding (steps are not permuted)."""
        return self.embeddings(self.condition_ids(labels_B))[:, None] + self.timesteps_embeddings[:, :positions]

    def condition_ids(self, labels_B: Tensor) -> Tensor:
        return labels_B + self.shape.codes + 1

    def repeated_blocks(self) -> Iterable[nn.Module]:
        return self.blocks

    def decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies. By substrings, as in the published training: hence `cls_token` decays, and
        `adaln_before_head` does not, because its name contains "ln"."""
        return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)


def _cut_normal(tensor: Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=INIT_STD)  # cut at +-2 absolute
