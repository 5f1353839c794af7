"""Discriminators and both sides of the adversarial loss against the published implementations' numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.batch_part import BatchPart
from models.losses.adversarial import Adversary, as_in_training, spread_statistics
from models.losses.blur_discriminator import BlurDiscriminator
from models.losses.config import DISCRIMINATORS, AdversarialConfig, BlurConfig, PatchConfig, ReconstructionConfig
from models.losses.reconstruction import ReconstructionLoss
from models.quantizers.config import LookupFreeConfig
from models.registry import build

GOLDEN = Path(__file__).parents[2] / "golden"
IBQ, IBQ_SPEC = (
    load_file(GOLDEN / "ibq" / "losses.safetensors"),
    json.loads((GOLDEN / "ibq" / "losses.json").read_text()),
)
NAME = "losses_and_discriminator"
MAGVIT = load_file(GOLDEN / "open_magvit2" / f"{NAME}.safetensors")
MAGVIT_SPEC = json.loads((GOLDEN / "open_magvit2" / f"{NAME}.json").read_text())
L1 = ReconstructionLoss(ReconstructionConfig(l1=1.0, l2=0.0))


def weights(arrays: dict[str, Tensor], prefix: str = "weights/loss.discriminator.") -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


def adversary(arrays: dict[str, Tensor], **changes: Any) -> Adversary:
    built = Adversary(AdversarialConfig(discriminator=PatchConfig(width=16), **changes), channels=3)
    built.discriminator.load_state_dict(weights(arrays), strict=True)
    return built


def close(ours: Tensor | float, theirs: Tensor | float, tolerance: float) -> None:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def total(*parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for part in parts for value in part.values()]).sum()


class TestIbq:
    """Discriminator first; the codebook's loss is given as numbers."""

    tolerance = IBQ_SPEC["tolerances"]["losses"]

    def codebook(self, index: int) -> float:
        quantization, _, _, entropy = IBQ_SPEC["config"]["codebook_tuples_quant_sample_avg_entropy"][index]
        return quantization + 0.05 * entropy

    def test_official_training(self) -> None:
        """Two passes of each side, without a step of either: terms, gradients, running statistics, then evaluation.

        In float64: in the second pass a leaky ReLU sits at 1e-6 from its kink, where float32 kernels fall on either side.
        """
        game = adversary(IBQ).train().double()
        for index, logs in enumerate(IBQ_SPEC["logs"]["c1_official_train"]):
            pixels, output = IBQ[f"in/x{index}"].double(), IBQ[f"in/xrec{index}"].double().requires_grad_()
            told = game(pixels, output, step=index)
            close(total(told.losses), logs["d_loss"], self.tolerance)
            close(told.stats["lecam_unweighted"], logs["d_log"]["train/lecam_loss"], self.tolerance)
            close(told.stats["logits_real"], logs["d_log"]["train/logits_real"], self.tolerance)
            close(told.stats["logits_fake"], logs["d_log"]["train/logits_fake"], self.tolerance)
            close(game.real_mean, logs["lecam_real"], 1e-7)
            close(game.fake_mean, logs["lecam_fake"], 1e-7)
            if index == 0:
                total(told.losses).backward()
            self.generator_side(game, pixels, output, index, logs)
        for name, parameter in game.discriminator.named_parameters():
            if f"out/c1/d_grad/{name}" in IBQ:
                assert relative(parameter.grad, IBQ[f"out/c1/d_grad/{name}"]) < 1e-4
        for name, buffer in game.discriminator.named_buffers():
            if f"out/c1/bn/{name}" in IBQ:
                close(buffer, IBQ[f"out/c1/bn/{name}"], IBQ_SPEC["tolerances"]["bn"])
        self.evaluation(game.float().eval())

    def generator_side(self, game: Adversary, pixels: Tensor, output: Tensor, index: int, logs: dict) -> None:
        reconstruction = L1(output, pixels)
        told = game.generator_side(output, reconstruction_loss=total(reconstruction), last_weight=output, step=index)
        close(told.losses["adversarial"], logs["g_log"]["train/g_loss"], self.tolerance)
        close(total(reconstruction, told.losses) + self.codebook(index), logs["g_total"], self.tolerance)
        (gradient,) = torch.autograd.grad(total(reconstruction, told.losses), output)
        assert relative(gradient, IBQ[f"out/c1/grad_xrec{index}"]) < 1e-4

    def evaluation(self, game: Adversary) -> None:
        logs = IBQ_SPEC["logs"]["c1b_eval_entropy_off"]
        with torch.no_grad():
            close(game.discriminator(IBQ["in/x0"]), IBQ["out/c1b/discriminator_logits_x0"], self.tolerance)
            told = game(IBQ["in/x0"], IBQ["in/xrec0"], step=2)
            close(total(told.losses), logs["d_loss"], self.tolerance)
            close(told.stats["lecam_unweighted"], logs["d_log"]["val/lecam_loss"], self.tolerance)
            reconstruction = L1(IBQ["in/xrec0"], IBQ["in/x0"])
            other = game.generator_side(
                IBQ["in/xrec0"], reconstruction_loss=total(reconstruction), last_weight=IBQ["in/xrec0"], step=2
            )
        close(other.stats["adversarial_unweighted"], logs["g_log"]["val/g_loss"], self.tolerance)
        close(total(reconstruction, other.losses) + 0.71, logs["g_total"], self.tolerance)

    def test_adaptive_weight(self) -> None:
        logs = IBQ_SPEC["logs"]["c2_adaptive"]
        last = IBQ["in/c2/last_layer"].clone().requires_grad_()
        output = F.conv2d(IBQ["in/c2/h"], last, padding=1)
        game = adversary(IBQ, weight=None, adaptive_scale=0.4).train()
        reconstruction = L1(output, IBQ["in/x0"])
        told = game.generator_side(output, reconstruction_loss=total(reconstruction), last_weight=last, step=0)
        close(told.stats["adversarial_weight"], logs["g_log"]["train/d_weight"], 1e-4)
        close(total(reconstruction, told.losses) + self.codebook(0), logs["g_total"], 1e-4)
        (gradient,) = torch.autograd.grad(total(reconstruction, told.losses), last)
        assert relative(gradient, IBQ["out/c2/grad_last_layer"]) < 1e-4

    def test_before_its_start(self) -> None:
        logs = IBQ_SPEC["logs"]["c3_before_disc_start"]
        output = IBQ["in/xrec0"]
        reconstruction = L1(output, IBQ["in/x0"])
        game = adversary(IBQ, start=10)
        told = game.generator_side(output, reconstruction_loss=total(reconstruction), last_weight=output, step=5)
        assert not told.losses
        close(total(reconstruction) + self.codebook(0), logs["g_total"], self.tolerance)


def in_pieces(game: Adversary, pixels: Tensor, output: Tensor, *, pieces: int, step: int) -> None:
    """One step of the discriminator's side, over the pieces of a batch."""
    for piece, (some, other) in enumerate(zip(pixels.chunk(pieces), output.chunk(pieces), strict=True)):
        game.part = BatchPart(piece, pieces)
        game(some, other, step=step)


@pytest.mark.parametrize("pieces", [2, 4])
def test_lecam_moves_once_per_step(pieces: int) -> None:
    torch.manual_seed(0)
    games = [adversary(IBQ, start=0) for _ in range(2)]
    for game in games:
        game.discriminator.eval()  # each logit is that of its image alone
    for step, (pixels, output) in enumerate(torch.rand(3, 2, 8, 3, 32, 32)):
        for game, count in zip(games, (1, pieces), strict=True):
            in_pieces(game, pixels, output, pieces=count, step=step)
        close(games[1].real_mean, games[0].real_mean, 1e-7)
        close(games[1].fake_mean, games[0].fake_mean, 1e-7)
    assert abs(float(games[0].real_mean)) > 1e-6


@pytest.mark.parametrize("pieces", [2, 4])
def test_running_statistics_forget_as_much_in_pieces(pieces: int) -> None:
    """What is left of a start far away tells how often the statistics have moved."""
    torch.manual_seed(0)
    left = []
    for count in (1, pieces):
        game = adversary(IBQ, start=0).train()
        spread_statistics(game, count)
        norms = [one for one in game.modules() if isinstance(one, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.running_mean.fill_(1e6)
        in_pieces(game, *torch.rand(2, 8, 3, 32, 32), pieces=count, step=0)
        left.append([float(norm.running_mean.mean()) for norm in norms])
    assert left[1] == pytest.approx(left[0], rel=1e-3)
    assert left[0] == pytest.approx([0.81e6] * len(left[0]), rel=1e-2)  # of images and of reconstructions, 0.9 each


VARIANTS = {
    "lecam_preset": {},
    "adaptive": {"weight": None, "adaptive_scale": 0.8},
    "dloss_vanilla": {"loss": "vanilla"},
    "dloss_nonsat": {"loss": "non-saturating"},
    "before_disc_start": {"start": 100},
    "enlarge": {},
    "lp_toy": {},
    "blur": {},
}
STEPS = {"before_disc_start": 10, "enlarge": 500}


class TestOpenMagvit2:
    """Tokenizer first, then the discriminator, on the same tensors."""

    tolerance = MAGVIT_SPEC["tolerances"]["losses"]

    def play(self, game: Adversary, variant: str, step: int) -> None:
        last = MAGVIT["in/last_layer"].clone().requires_grad_()
        output = F.conv2d(MAGVIT["in/feat"], last, padding=1)
        self.generator_side(game, variant, output, last, step)
        self.discriminator_side(game, variant, output, step)

    def generator_side(self, game: Adversary, variant: str, output: Tensor, last: Tensor, step: int) -> None:
        out = f"out/{variant}"
        reconstruction = L1(output, MAGVIT["in/x"])
        if variant == "lp_toy":
            toy = 0.5 * (MAGVIT["in/x"] - output).square().mean((1, 2, 3))
            reconstruction = reconstruction | {"perceptual": toy.mean()}
            close(reconstruction["perceptual"], MAGVIT[f"{out}/gen_perceptual_loss"], self.tolerance)
        close(reconstruction["l1"], MAGVIT[f"{out}/gen_reconstruct_loss"], self.tolerance)
        close(total(reconstruction), MAGVIT[f"{out}/gen_nll_loss"], self.tolerance)
        told = game.generator_side(output, reconstruction_loss=total(reconstruction), last_weight=last, step=step)
        close(total({"none": torch.zeros(())}, told.losses), MAGVIT[f"{out}/gen_g_loss"], self.tolerance)
        weight, theirs = told.stats["adversarial_weight"], MAGVIT[f"{out}/gen_d_weight"]
        close(weight, theirs, float(theirs) * MAGVIT_SPEC["tolerances"]["adaptive_weight_rel"] + 1e-9)
        quantizer = LookupFreeConfig(enlarge_ratio=3.0 if variant == "enlarge" else 0.0)
        entropy = quantizer.entropy_weight * (1 + quantizer.enlargement(step)) * MAGVIT["in/entropy_aux_loss"]
        loss = total(reconstruction, told.losses) + entropy + quantizer.commitment_weight * MAGVIT["in/commitment"]
        close(loss, MAGVIT[f"{out}/gen_total"], self.tolerance)
        (gradient,) = torch.autograd.grad(loss, last)
        assert relative(gradient, MAGVIT[f"{out}/gen_grad_last_layer"]) < 1e-3

    def discriminator_side(self, game: Adversary, variant: str, output: Tensor, step: int) -> None:
        out = f"out/{variant}"
        told = game(MAGVIT["in/x"], output, step=step)
        close(total(told.losses), MAGVIT[f"{out}/disc_total"], self.tolerance)
        close(told.stats["lecam_unweighted"], MAGVIT[f"{out}/disc_lecam_loss"], self.tolerance)
        close(torch.stack([game.real_mean, game.fake_mean]), MAGVIT[f"{out}/lecam_ema"], 1e-6)
        if variant != "before_disc_start":  # the reference logs factor * logits
            close(told.losses["discriminator"], MAGVIT[f"{out}/disc_non_saturated_d_loss"], self.tolerance)
            close(told.stats["logits_real"], MAGVIT[f"{out}/disc_logits_real"], self.tolerance)
            close(told.stats["logits_fake"], MAGVIT[f"{out}/disc_logits_fake"], self.tolerance)

    def test_three_official_steps(self) -> None:
        game = adversary(MAGVIT).train()
        for step in range(3):
            self.play(game, f"official_step{step}", step)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variants(self, variant: str) -> None:
        game = adversary(MAGVIT, **VARIANTS[variant]).train()
        if variant == "lecam_preset":
            game.real_mean.fill_(0.8)
            game.fake_mean.fill_(-0.6)
        if variant == "blur":
            game.discriminator = self.blur("blur")
        self.play(game, variant, STEPS.get(variant, 0))

    def blur(self, resample: Any) -> BlurDiscriminator:
        network = BlurDiscriminator(BlurConfig(width=32, resample=resample), channels=3)
        state = weights(MAGVIT, "weights/blur.loss.discriminator.")
        network.load_state_dict(
            {k: v for k, v in state.items() if resample == "blur" or "kernel" not in k}, strict=True
        )
        return network

    @torch.no_grad()
    def test_discriminators(self) -> None:
        tolerance = MAGVIT_SPEC["tolerances"]["disc_logits"]
        images = {"real": MAGVIT["in/x"], "fake": MAGVIT["in/xrec"]}
        patch = adversary(MAGVIT).discriminator
        networks = {"patchgan_eval": patch.eval(), "blur_disc": self.blur("blur"), "avgpool_disc": self.blur("average")}
        for name, network in networks.items():
            for side in images if name != "avgpool_disc" else ["real"]:
                close(network(images[side]), MAGVIT[f"out/{name}/{side}"], tolerance)
        patch.train()
        for side, pixels in images.items():
            close(patch(pixels), MAGVIT[f"out/patchgan_train/{side}"], tolerance)


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = [Adversary(AdversarialConfig(discriminator=d), channels=3) for d in (PatchConfig(), BlurConfig())]
    assert [sum(p.numel() for p in game.parameters()) for game in sizes] == [2_765_633, 1_909_889]


@pytest.mark.parametrize("config", [PatchConfig(width=4, layers=2), BlurConfig(width=32, stages=2, resample="average")])
def test_the_smallest_images(config: PatchConfig | BlurConfig) -> None:
    network = build(config, DISCRIMINATORS, channels=3)
    assert network(torch.zeros(2, 3, config.least_pixels, config.least_pixels)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, config.least_pixels - 1, config.least_pixels - 1))


def test_the_tokenizers_side_leaves_the_discriminator_alone() -> None:
    game = adversary(IBQ)
    output = IBQ["in/xrec0"].clone().requires_grad_()
    told = game.generator_side(output, reconstruction_loss=output.sum(), last_weight=output, step=0)
    total(told.losses).backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in game.parameters())
    assert float(output.grad.abs().sum()) > 0


def test_judging_as_in_training_leaves_no_trace() -> None:
    patch = adversary(IBQ).discriminator
    trained = copy.deepcopy(patch).train()(IBQ["in/x0"])
    before = copy.deepcopy(patch.eval().state_dict())
    mixed = patch(IBQ["in/x0"])
    with as_in_training(patch):
        judged = patch(IBQ["in/x0"])
    assert torch.equal(judged, trained)
    assert not torch.allclose(judged, mixed)
    assert all(torch.equal(before[name], tensor) for name, tensor in patch.state_dict().items())
    assert torch.equal(patch(IBQ["in/x0"]), mixed)
