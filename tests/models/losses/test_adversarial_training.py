"""Three steps of IBQ's training with a discriminator, against the published implementation's trace.

The steps are written out as the engine takes them: one pass of the tokenizer, the discriminator's step on its output,
the tokenizer's step that minds the stepped discriminator, then the average of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.adapters import ibq
from models.adapters.tokenizers import discriminator_weights
from models.losses.adversarial import Adversary
from models.losses.config import AdversarialConfig, PatchConfig, ReconstructionConfig
from models.losses.reconstruction import ReconstructionLoss
from models.tokenizer import Reconstructed, Tokenizer, TokenizerPass

GOLDEN = Path(__file__).parents[2] / "golden" / "ibq"
ARRAYS = load_file(GOLDEN / "train_steps.safetensors")
SPEC = json.loads((GOLDEN / "train_steps.json").read_text())
PLAIN = {
    k.removeprefix("weights/"): v.float() if v.is_floating_point() else v
    for k, v in ARRAYS.items()
    if k.startswith("weights/")
}
LOGGED = {"quantize.embedding.weight": "quantizer.codebook_KD"}


def sides() -> tuple[TokenizerPass, Adversary]:
    network = {name: tensor for name, tensor in PLAIN.items() if not name.startswith("loss.")}
    found = ibq.recognise(network)
    tokenizer = Tokenizer(found.config)
    tokenizer.load_state_dict(found.state, strict=True)
    config = AdversarialConfig(discriminator=PatchConfig(width=SPEC["config"]["disc_ndf"]))
    adversary = Adversary(config, channels=3)
    adversary.discriminator.load_state_dict(discriminator_weights(PLAIN, averaged=False), strict=True)
    return TokenizerPass(tokenizer, ReconstructionLoss(ReconstructionConfig(l1=1.0, l2=0.0))), adversary


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class Trace:
    """The run itself, and what it left behind."""

    def __init__(self) -> None:
        self.tokenizing, self.adversary = sides()
        self.tokenizer = self.tokenizing.tokenizer
        rate, betas = SPEC["config"]["lr"], tuple(SPEC["config"]["adam_betas"])
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=rate, betas=betas) for m in (self.tokenizing, self.adversary)
        ]
        self.average = {name: parameter.detach().clone() for name, parameter in self.tokenizer.named_parameters()}
        self.logs: list[dict[str, Any]] = []
        for step in range(SPEC["config"]["steps"]):
            self.take(step)

    def take(self, step: int) -> None:
        done = self.tokenizing((ARRAYS[f"in/x{step}"] + 1) / 2)
        told = self.adversary(done.pixels_BCHW, done.output_BCHW, step=step)
        self.descend(1, total(told.losses))
        if step == 0:
            self.first_discriminator_gradient = self.adversary.discriminator.main[0].weight.grad.clone()
        other = self.adversary.generator_side(
            done.output_BCHW,
            reconstruction_loss=done.reconstruction_loss,
            last_weight=self.tokenizer.autoencoder.last_weight,
            step=step,
        )
        self.log(done, told, other)
        self.descend(0, total(done.losses | other.losses))
        if step == 0:
            self.first_output = done.output_BCHW.detach()
            self.first_gradients = {n: p.grad.clone() for n, p in self.tokenizer.named_parameters()}
        for name, parameter in self.tokenizer.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - SPEC["config"]["ema_decay"])

    def descend(self, side: int, loss: Tensor) -> None:
        self.optimizers[side].zero_grad()
        loss.backward()
        self.optimizers[side].step()

    def log(self, done: Reconstructed, told: Any, other: Any) -> None:
        """In the reference's names."""
        losses, stats = done.losses, done.stats
        values = {
            "disc_loss": total(told.losses),
            "logits_real": told.stats["logits_real"],
            "logits_fake": told.stats["logits_fake"],
            "lecam_loss": told.stats["lecam_unweighted"],
            "total_loss": total(losses | other.losses),
            "codebook_quant_loss": losses["quantization"],
            "codebook_entropy_loss": losses["entropy"] / 0.05,
            "codebook_sample_entropy_loss": stats["sample_entropy"],
            "codebook_avg_entropy_loss": stats["codebook_entropy"],
            "codebook_loss": losses["quantization"] + losses["entropy"],
            "nll_loss": done.reconstruction_loss,
            "reconstruct_loss": losses["l1"],
            "d_weight": other.stats["adversarial_weight"],
            "g_loss": other.losses["adversarial"],
            "unsacled_g_loss": other.stats["adversarial_unweighted"],
        }
        self.logs.append({f"train/{name}": value.item() for name, value in values.items()})


@pytest.fixture(scope="module")
def trace() -> Trace:
    torch.manual_seed(0)
    return Trace()


@pytest.mark.parametrize("step", range(SPEC["config"]["steps"]))
def test_logged_values(trace: Trace, step: int) -> None:
    tolerance = SPEC["tolerances"]["per_step_logs step 0" if step == 0 else "later steps"]
    theirs = SPEC["per_step_logs"][step]
    assert trace.logs[step].keys() == theirs.keys() - {"train/perceptual_loss", "train/disc_factor"}
    for name, value in trace.logs[step].items():
        assert value == pytest.approx(theirs[name], abs=tolerance), name


def test_first_step(trace: Trace) -> None:
    torch.testing.assert_close(trace.first_output, ARRAYS["out/step0/xrec"], atol=5e-4, rtol=0)
    assert relative(trace.first_discriminator_gradient, ARRAYS["out/step0/d_grad/main.0.weight"]) < 1e-3
    names = [key.removeprefix("out/step0/g_grad/") for key in ARRAYS if key.startswith("out/step0/g_grad/")]
    assert names
    for name in names:
        ours = trace.first_gradients[LOGGED.get(name, f"autoencoder.{name}")]
        assert relative(ours, ARRAYS[f"out/step0/g_grad/{name}"]) < 1e-3, name


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("values", ["after", "after_ema"])
def test_after_three_steps(trace: Trace, values: str) -> None:
    tokenizer = Tokenizer(trace.tokenizer.config).eval()
    state = trace.tokenizer.state_dict() | (trace.average if values == "after_ema" else {})
    tokenizer.load_state_dict(state, strict=True)
    codes_Bhw = tokenizer.encode((ARRAYS["in/x0"] + 1) / 2)
    assert int((codes_Bhw.flatten() != ARRAYS[f"out/{values}/indices"]).sum()) <= 1
    tolerances = SPEC["tolerances"]
    codebook_KD = tokenizer.quantizer.codebook_KD.detach()
    torch.testing.assert_close(codebook_KD, ARRAYS[f"out/{values}/codebook"], atol=tolerances["codebooks"], rtol=0)
    with torch.no_grad():
        output_BCHW = tokenizer.autoencoder.decode(tokenizer.quantizer.lookup(codes_Bhw))
    theirs = ARRAYS[f"out/{values}/reconstruction"]
    torch.testing.assert_close(output_BCHW, theirs, atol=tolerances["out/after/reconstruction"], rtol=0)
