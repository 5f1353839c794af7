"""The training of a tokenizer as a task of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.losses.config import BUILDERS
from models.metrics import psnr
from models.registry import build
from models.tokenizer import Tokenizer, TokenizerTraining, to_bytes
from stages.code_usage import CodeUsage
from stages.passes import run_passes
from stages.training.images import TrainingImages, unit_pixels
from stages.training.task import Batch, Losses, Modules, Part, Task

if TYPE_CHECKING:
    from stages.train_tokenizer import TrainTokenizerConfig

# B images, C colour channels, H W = S pixels, h w grid of codes

PART = "tokenizer"
PATIENCE = 0.2  # share of the steps after which a codebook has to be in use
PERFECT = 100.0  # dB that stand for an image without any error, which would have infinitely many
COLLAPSE = 0.5  # share of dead codes that is worth a warning


class TokenizerTask(Task):
    """Reconstruction of drawn views; judged by the PSNR of upright ones, as bytes."""

    def __init__(
        self, config: TrainTokenizerConfig, images: TrainingImages, judged: TrainingImages, device: torch.device
    ):
        self.config, self.images, self.judged, self.device = config, images, judged, device
        self.tokenizer = Tokenizer(config.model)
        module = TokenizerTraining(self.tokenizer, build(config.loss, BUILDERS))
        self.parts = [Part(PART, module, config.training.optimizer, config.training.schedule)]
        self.rows = len(images)
        self.reads_ahead = not images.is_cached
        self._has_warned = False

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        return self.images.batch(step, rows_B, share)[:1]

    def losses(self, part: str, modules: Modules, batch: Batch, step: int) -> Losses:
        losses, stats, _ = modules[PART](unit_pixels(batch[0]))
        return Losses(losses, stats)

    def evaluate(self) -> dict[str, float]:
        """Mean PSNR in dB of the judged images."""
        passes = self.judged.upright_passes(self.config.rows_per_pass)
        decibels_N = run_passes(self._psnr, passes, device=self.device)
        mean = float(np.minimum(decibels_N, PERFECT).mean())
        return {"psnr": mean, "loss": -mean}

    def warning(self, step: int, stats: Mapping[str, Any]) -> str | None:
        """Advice, once, if most codes of the codebook are dead."""
        dead = stats.get("dead", 0.0)
        if self._has_warned or dead < COLLAPSE or step < PATIENCE * self.config.training.steps:
            return None
        self._has_warned = True
        return (
            f"{dead:.0%} of the {self.config.model.codebook_size} codes are hardly used after {step + 1} steps: the "
            "codebook collapses; let the quantizer revive codes (model.quantizer.revive_every), or take fewer codes"
        )

    def used_codes(self) -> int:
        """Codes that occur in the upright views of the training images."""
        usage = CodeUsage(self.config.model.codebook_size)
        passes = self.images.upright_passes(self.config.rows_per_pass)
        usage.add(run_passes(self.tokenizer.encode, passes, device=self.device))
        return usage.used

    def _psnr(self, images_BCHW: Tensor) -> Tensor:
        decoded_BCHW = self.tokenizer.decode(self.tokenizer.encode(images_BCHW))
        return psnr(to_bytes(decoded_BCHW, self.tokenizer.rounding).float() / 255, images_BCHW)
