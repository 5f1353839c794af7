"""Trainings on reconstructions as tasks of the engine: of a tokenizer, of its decoder alone, of a discriminator alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.losses.adversarial import Adversary, as_in_training
from models.metrics import psnr
from models.tokenizer import DecoderPass, Reconstructed, Tokenizer, TokenizerPass, to_bytes
from smalti.counting import counted
from stages.images.passes import unit_pixels
from stages.training.codebook import collapse, collapsed, count_codes
from stages.training.config import AdversaryConfig, ReconstructionTraining, TokenizerLearning
from stages.training.grids import draw_reconstructions
from stages.training.images import TrainingImages, mean_figure
from stages.training.task import Batch, Losses, Modules, Part, Task

if TYPE_CHECKING:
    from models.quantizers.usage import CountsUse
    from pipeline.draft import Draft

# B images, C colour channels, H W = S pixels, h w grid of codes

PART, ADVERSARY = "tokenizer", "adversary"
PATIENCE = 0.2  # share of the steps after which a codebook has to be in use
HEALTH = ("usage", "perplexity", "dead", "sample_entropy", "codebook_entropy")  # of the codebook, where it has them
PERFECT = 100.0  # dB that stand for an image without any error, which would have infinitely many

Learns = Literal["tokenizer", "decoder", "discriminator"]
PASSES: dict[Learns, type[TokenizerPass]] = {
    "tokenizer": TokenizerPass,
    "decoder": DecoderPass,
    "discriminator": DecoderPass,
}


class TrainedNetworks(NamedTuple):
    """The networks of a training: a tokenizer, what its reconstructions are compared by, and perhaps a discriminator."""

    tokenizer: Tokenizer
    loss: nn.Module
    adversary: Adversary | None


class TokenizerTask(Task):
    """Reconstruction of drawn views, with or without a discriminator; evaluated by the PSNR of upright ones, as bytes.

    learns: the whole tokenizer or its decoder, with the discriminator, or the discriminator alone, which is then
    evaluated by its accuracy on images and reconstructions.
    """

    shown = HEALTH

    def __init__(
        self,
        config: ReconstructionTraining,
        networks: TrainedNetworks,
        images: TrainingImages,
        judged: TrainingImages,
        device: torch.device,
        *,
        learns: Learns,
        adversarial: AdversaryConfig | None = None,
    ):
        self.config, self.images, self.judged, self.device, self.learns = config, images, judged, device, learns
        self.tokenizer, loss, self.adversary = networks
        self.seeing = PASSES[learns](self.tokenizer, loss)
        self.parts = []
        if learns != "discriminator":
            self.parts.append(Part(PART, self.seeing, config.training.optimizer, config.training.schedule))
        if self.adversary is not None:
            self.parts.append(_beside(self.adversary, adversarial or AdversaryConfig(), config))
        self.rows, self.judged_rows = len(images), len(judged)
        self.grids = config.reconstructions if isinstance(config, TokenizerLearning) else None
        self.draws_every = self.grids.every_of(config.training.steps) if self.grids else 0
        self.reads_ahead = not images.is_cached
        self._has_warned = False
        self.seeing.to(device)

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        return {"pixels": self.images.batch(step, rows_B, share)["pixels"]}

    def survey(self, pieces: Sequence[Batch]) -> None:
        """Where the quantizer needs the latents of a whole batch, in pieces, the images are encoded twice."""
        quantizer, config = self.tokenizer.quantizer, self.config
        quantizer.part = self.part
        rows, columns = self.tokenizer.grid(config.views.size, config.views.size)
        if self.learns != "tokenizer" or not quantizer.needs_survey(len(pieces[0]["pixels"]) * rows * columns):
            return
        with torch.no_grad(), self.replicas.autocast():
            latents = [
                self.tokenizer.autoencoder.encode(self.tokenizer.to_pixels(unit_pixels(piece["pixels"])))
                for piece in pieces
            ]
            quantizer.survey(torch.cat(latents).movedim(1, -1).flatten(0, 2))

    def shared_pass(self, modules: Modules, batch: Batch, step: int) -> Reconstructed:
        """The reconstruction that both sides see: the discriminator on its own step, the tokenizer on its."""
        images_BCHW = unit_pixels(batch["pixels"])
        self.tokenizer.quantizer.part = self.part
        if PART in modules:
            seen: Reconstructed = modules[PART](images_BCHW)
            return seen
        with torch.no_grad(), self.replicas.autocast():
            seen = self.seeing(images_BCHW)
        return seen

    def losses(self, part: str, modules: Modules, batch: Any, step: int) -> Losses:
        """Losses of the tokenizer with its adversarial term, or of the discriminator."""
        seen: Reconstructed = batch
        if self.adversary is not None:
            self.adversary.part = self.part
        if part == ADVERSARY:
            told = modules[ADVERSARY](seen.pixels_BCHW, seen.output_BCHW, step=step)
            alone = {"reconstruction": seen.reconstruction_loss} if self.learns == "discriminator" else {}
            return Losses(told.losses, told.stats | alone)
        if self.adversary is None:
            return Losses(seen.losses, seen.stats)
        with self.replicas.autocast():  # the network itself, not the replicas' wrapped forward
            minded = self.adversary.generator_side(
                seen.output_BCHW,
                reconstruction_loss=seen.reconstruction_loss,
                last_weight=self.tokenizer.autoencoder.last_weight,
                step=step,
            )
        return Losses(seen.losses | minded.losses, seen.stats | minded.stats)

    def replicated(self) -> Mapping[str, Tensor]:
        """The codebook and its running use: both are also changed in the forward pass."""
        quantizer: CountsUse = self.tokenizer.quantizer
        return {f"codebook ({name})": tensor for name, tensor in quantizer.state_dict().items()}

    def evaluate(self) -> dict[str, float]:
        """Mean PSNR in dB of the judged images, or the share of patches that the discriminator tells apart."""
        rows = self.config.rows_per_pass
        if self.learns == "discriminator":
            told = mean_figure(self._told_apart, self.judged, self.replicas, rows=rows)
            return {"told_apart": told, "loss": 1 - told}
        mean = mean_figure(self._psnr, self.judged, self.replicas, rows=rows)
        return {"psnr": mean, "loss": -mean}

    def draw(self, step: int) -> dict[str, bytes]:
        """A grid of originals and their reconstructions; every process makes its share."""
        assert self.grids is not None
        grid = draw_reconstructions(self.grids, self.tokenizer, self.judged, self.replicas, step)
        return {f"reconstructions-{step:08d}.png": grid} if grid else {}

    def warning(self, step: int, stats: Mapping[str, Any]) -> str | None:
        """Advice, once, if most codes of the codebook are dead."""
        training = self.config.training
        if self._has_warned or "dead" not in stats or step < PATIENCE * training.steps:
            return None
        rows, columns = self.tokenizer.grid(self.config.views.size, self.config.views.size)
        sentence = collapse(self.tokenizer.config, dead=stats["dead"], tokens=training.batch * rows * columns)
        self._has_warned = sentence is not None
        return sentence and f"after {counted(step + 1, 'step')} {sentence}"

    def final_warning(self, used: int) -> str | None:
        """Advice if the result uses few of its codes. used: codes that occur in the upright views of the training images."""
        rows, columns = self.tokenizer.grid(self.config.views.size, self.config.views.size)
        return collapsed(self.tokenizer.config, used=used, tokens=len(self.images) * rows * columns)

    def used_codes(self, out: Draft) -> int:
        """Codes that occur in the upright views of the training images; every process has to call it."""
        rows, codes = self.config.rows_per_pass, self.tokenizer.codebook_size
        return count_codes(self.tokenizer.encode, self.images, self.replicas, out, codes=codes, rows=rows).used

    def _psnr(self, images_BCHW: Tensor, _: NDArray[np.int64]) -> Tensor:
        decoded_BCHW = self.tokenizer.decode(self.tokenizer.encode(images_BCHW))
        decibels_B: Tensor = psnr(to_bytes(decoded_BCHW, self.tokenizer.rounding).float() / 255, images_BCHW)
        return decibels_B.clamp(max=PERFECT)

    def _told_apart(self, images_BCHW: Tensor, _: NDArray[np.int64]) -> Tensor:
        """Share of the patches of each image and of its reconstruction that are called what they are, (B,)."""
        assert self.adversary is not None
        seen, judge = self.seeing(images_BCHW), self.adversary.discriminator
        with as_in_training(judge):
            is_right_B1hw: Tensor = torch.cat([judge(seen.pixels_BCHW) > 0, judge(seen.output_BCHW) <= 0], 1)
        return is_right_B1hw.float().mean((1, 2, 3))


def _beside(adversary: Adversary, own: AdversaryConfig, config: ReconstructionTraining) -> Part:
    """The discriminator's part: its own optimizer and schedule where it has them."""
    return Part(
        ADVERSARY,
        adversary,
        own.optimizer or config.training.optimizer,
        own.schedule or config.training.schedule,
        goes_first=own.order == "discriminator-first",
    )
