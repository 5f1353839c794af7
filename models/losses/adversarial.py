"""Adversarial training of VQGAN tokenizers: the losses of the discriminator, and the adversarial loss of the tokenizer.

Hinge, vanilla or non-saturating loss of the discriminator, with LeCAM's regulariser (arXiv 2104.03310); the tokenizer has
the non-saturating loss of each image's mean logit. Its weight is fixed, or (VQGAN, equation 7) such that its gradient at
the last layer has the norm of the reconstruction's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_part import BatchPart
from models.layers.precision import at_least_float32
from models.losses.config import DISCRIMINATORS, AdversarialConfig
from models.registry import build

# Shapes: B images, C colour channels, H W pixels, h w grid of logits
LARGEST_WEIGHT = 1e4


class GanLosses(NamedTuple):
    """losses: weighted, named scalars whose sum is minimised.  stats: scalars for the log."""

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Adversary(nn.Module):
    """A discriminator and LeCAM's running means of its logits (buffers, so that a resumed training has them).

    part: the part of the step's batch in the next pass; running means are updated with the last piece of a step.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, config: AdversarialConfig, *, channels: int):
        super().__init__()
        self.config = config
        self.discriminator = build(config.discriminator, DISCRIMINATORS, channels=channels)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        self.part = BatchPart()

    def forward(self, pixels_BCHW: Tensor, output_BCHW: Tensor, *, step: int) -> GanLosses:
        """Losses of the discriminator on images and reconstructions, both without gradient, in the network's range."""
        real_B1hw = at_least_float32(self.discriminator(pixels_BCHW.detach()))
        fake_B1hw = at_least_float32(self.discriminator(output_BCHW.detach()))
        factor = float(step >= self.config.start)
        losses = {"discriminator": factor * self.discriminator_loss(real_B1hw, fake_B1hw)}
        stats = {"logits_real": real_B1hw.detach().mean(), "logits_fake": fake_B1hw.detach().mean()}
        if self.config.lecam:
            real_mean, fake_mean = self.update_means(stats["logits_real"], stats["logits_fake"])
            above_fake, below_real = F.relu(real_B1hw - fake_mean), F.relu(real_mean - fake_B1hw)
            lecam = above_fake.square().mean() + below_real.square().mean()
            losses["lecam"] = factor * self.config.lecam * lecam
            stats["lecam_unweighted"] = lecam.detach()
        return GanLosses(losses, stats)

    def discriminator_loss(self, real_B1hw: Tensor, fake_B1hw: Tensor) -> Tensor:
        if self.config.loss == "hinge":
            return 0.5 * (F.relu(1 - real_B1hw).mean() + F.relu(1 + fake_B1hw).mean())
        if self.config.loss == "vanilla":
            return 0.5 * (F.softplus(-real_B1hw).mean() + F.softplus(fake_B1hw).mean())
        return F.softplus(-image_means(real_B1hw)).mean() + F.softplus(image_means(fake_B1hw)).mean()

    @torch.no_grad()
    def update_means(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The running means, which start at 0, with this step's means over all processes and its pieces so far.

        They are stored once per step, with its last piece.
        """
        means = torch.stack([real, fake]).to(self.real_mean.dtype)
        if self.part.world > 1:
            torch.distributed.all_reduce(means)
            means /= self.part.world
        self._seen_means = means + self._seen_means if self.part.piece else means  # sums over the pieces of this step
        step_means = self._seen_means / (self.part.piece + 1)
        real_mean = self.real_mean.lerp(step_means[0], 1 - self.config.lecam_decay)
        fake_mean = self.fake_mean.lerp(step_means[1], 1 - self.config.lecam_decay)
        if self.part.is_last:
            self.real_mean.copy_(real_mean)
            self.fake_mean.copy_(fake_mean)
        return real_mean, fake_mean

    def generator_side(
        self, output_BCHW: Tensor, *, reconstruction_loss: Tensor, last_weight: Tensor, step: int
    ) -> GanLosses:
        """The adversarial loss of the tokenizer on its outputs; the discriminator gets no gradient.

        reconstruction_loss, last_weight: an adaptive weight compares the gradients of both losses at this parameter.
        """
        if step < self.config.start:
            return GanLosses({}, {"adversarial_weight": output_BCHW.new_zeros(())})
        with frozen(self.discriminator):
            logits_B1hw = at_least_float32(self.discriminator(output_BCHW))
        unweighted = F.softplus(-image_means(logits_B1hw)).mean()
        if self.config.weight is None:
            weight = self.config.adaptive_scale * gradient_ratio(reconstruction_loss, unweighted, last_weight)
        else:
            weight = output_BCHW.new_tensor(self.config.weight)
        stats = {"adversarial_weight": weight, "adversarial_unweighted": unweighted.detach()}
        return GanLosses({"adversarial": weight * unweighted}, stats)


def spread_statistics(module: nn.Module, pieces: int) -> None:
    """Adapt the momentum of batch normalisation: `pieces` passes change running statistics as much as one pass does."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and pieces > 1 and norm.momentum is not None:
            norm.momentum = 1 - (1 - norm.momentum) ** (1 / pieces)


def image_means(logits_B1hw: Tensor) -> Tensor:
    return logits_B1hw.mean((1, 2, 3))


def gradient_ratio(reconstruction_loss: Tensor, adversarial_loss: Tensor, weight: Tensor) -> Tensor:
    """Ratio of the norms of both losses' gradients at `weight`, at most 10,000, detached."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)
    (of_adversary,) = torch.autograd.grad(adversarial_loss, weight, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversary.norm() + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


@contextmanager
def as_in_training(module: nn.Module) -> Iterator[None]:
    """Batch normalisation by the statistics of the batch, as in training, without changing the running statistics.

    These mix images and reconstructions: with them a discriminator may fail that separates the two in training.
    """
    norms = [one for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
    before = [(one.training, one.track_running_stats) for one in norms]
    for one in norms:
        one.training, one.track_running_stats = True, False
    try:
        yield
    finally:
        for one, (training, track) in zip(norms, before, strict=True):
            one.training, one.track_running_stats = training, track


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within this context the module's parameters get no gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
