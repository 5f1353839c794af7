"""Three steps of the engine with IBQ's recipe, against the published implementation's trace.

The recipe's own settings drive the task and the engine; replaced are the sizes, the images (the trace's, which are no
bytes), mixed precision, and LPIPS, which the trace has as zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from models.adapters import ibq
from models.adapters.tokenizers import discriminator_weights
from models.losses.adversarial import Adversary
from models.losses.config import BUILDERS, PatchConfig
from models.registry import build
from models.tokenizer import Tokenizer
from pipeline.recipe import load_recipe
from stages import stages
from stages.training.config import TrainTokenizerConfig
from stages.training.replicas import Replicas
from stages.training.task import Batch, Losses
from stages.training.tokenizer import PART, TokenizerTask, TrainedNetworks
from stages.training.trained_part import TrainedPart
from stages.training.trainer import Trainer

ROOT = Path(__file__).parents[3]
ARRAYS = load_file(ROOT / "tests/golden/ibq/train_steps.safetensors")
SPEC = json.loads((ROOT / "tests/golden/ibq/train_steps.json").read_text())
STEPS, TOLERANCES = SPEC["config"]["steps"], SPEC["tolerances"]
PLAIN = {
    name.removeprefix("weights/"): tensor.float() if tensor.is_floating_point() else tensor
    for name, tensor in ARRAYS.items()
    if name.startswith("weights/")
}
RENAMED = {"quantize.embedding.weight": "quantizer.codebook_KD"}


def published_config() -> TrainTokenizerConfig:
    """Of the recipe, for a small discriminator and three steps of two images."""
    small = ["training.precision=float32", "loss.perceptual=0.0", f"training.steps={STEPS}", "training.batch=2"]
    small += ["training.rows_per_pass=null"]
    recipe = load_recipe(
        ROOT / "recipes/imagenet256/ibq-tokenizer-16384.yaml",
        stages(),
        settings=[f"tokenizer.{setting}" for setting in small],
    )
    config: TrainTokenizerConfig = next(step.config for step in recipe.steps if step.name == "tokenizer")
    assert config.adversarial is not None
    patch = PatchConfig(width=SPEC["config"]["disc_ndf"])
    game = config.adversarial.model_copy(update={"discriminator": patch})
    return config.model_copy(update={"adversarial": game})


class TraceImages:
    """Stands for the training images: those of the trace, in the range of bytes but not rounded to them."""

    is_cached = True

    def __len__(self) -> int:
        return 2

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        return {"pixels": pixels_of(step).mul(255).movedim(1, -1), "labels": torch.zeros(2)}


def pixels_of(step: int) -> Tensor:
    """Images of a step in [0,1]."""
    return (ARRAYS[f"in/x{step}"] + 1) / 2


class TraceTask(TokenizerTask):
    """Keeps the reconstruction that it made last."""

    def losses(self, part: str, modules: Any, batch: Any, step: int) -> Losses:
        self.seen_BCHW = batch.output_BCHW.detach()
        return super().losses(part, modules, batch, step)


class TraceTrainer(Trainer):
    """Keeps the gradients of the first step, of both parts."""

    def _clip(self, trained: TrainedPart, losses: Losses) -> tuple[float, float]:
        if self.step == 0:
            named = trained.part.module.named_parameters()
            found = {name: one.grad.clone() for name, one in named if one.grad is not None}
            self.first = vars(self).get("first", {}) | found
        return super()._clip(trained, losses)


class Trace:
    """The run itself, and what it left behind."""

    def __init__(self) -> None:
        config = published_config()
        found = ibq.recognise({name: tensor for name, tensor in PLAIN.items() if not name.startswith("loss.")})
        tokenizer = Tokenizer(found.config)
        tokenizer.load_state_dict(found.state, strict=True)
        assert config.adversarial is not None
        adversary = Adversary(config.adversarial, channels=3)
        adversary.discriminator.load_state_dict(discriminator_weights(PLAIN, averaged=False), strict=True)
        images: Any = TraceImages()
        networks = TrainedNetworks(tokenizer, build(config.loss, BUILDERS), adversary)
        self.task = TraceTask(
            config,
            networks,
            images,
            images,
            torch.device("cpu"),
            learns="tokenizer",
            adversarial=config.adversarial,
        )
        replicas = Replicas(device="cpu", precision=config.training.precision)
        self.trainer = TraceTrainer(self.task, config.training, replicas)
        self.logs: list[dict[str, float]] = []
        for step in range(STEPS):
            losses = self.trainer.advance(self.task.batch(step, np.arange(2), slice(0, 2)))
            self.logs.append(in_their_names(self.trainer.figures(losses)))
            if step == 0:
                self.first_output_BCHW = self.task.seen_BCHW

    def tokenizer_after(self, values: str) -> Tokenizer:
        """With the raw weights, or with their averages, as `smalti` keeps them."""
        (trained,) = (one for one in self.trainer.parts if one.part.name == PART)
        tokenizer = Tokenizer(self.task.tokenizer.config).eval()
        if values == "after":
            tokenizer.load_state_dict(self.task.tokenizer.state_dict(), strict=True)
            return tokenizer
        assert trained.average is not None
        with trained.average.in_place():
            tokenizer.load_state_dict(self.task.tokenizer.state_dict(), strict=True)
        return tokenizer


def in_their_names(ours: dict[str, float]) -> dict[str, float]:
    generator = ("l1", "quantization", "entropy", "adversarial")
    values = {
        "disc_loss": ours["discriminator"] + ours["lecam"],
        "logits_real": ours["logits_real"],
        "logits_fake": ours["logits_fake"],
        "lecam_loss": ours["lecam_unweighted"],
        "total_loss": sum(ours[name] for name in generator),
        "codebook_quant_loss": ours["quantization"],
        "codebook_entropy_loss": ours["entropy"] / 0.05,
        "codebook_sample_entropy_loss": ours["sample_entropy"],
        "codebook_avg_entropy_loss": ours["codebook_entropy"],
        "codebook_loss": ours["quantization"] + ours["entropy"],
        "nll_loss": ours["l1"],
        "reconstruct_loss": ours["l1"],
        "d_weight": ours["adversarial_weight"],
        "g_loss": ours["adversarial"],
        "unsacled_g_loss": ours["adversarial_unweighted"],
    }
    return {f"train/{name}": value for name, value in values.items()}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace()


def test_the_recipe_has_the_settings_of_the_trace() -> None:
    config, theirs = published_config(), SPEC["config"]
    training, game = config.training, config.adversarial
    assert (training.optimizer.learning_rate, training.optimizer.betas) == (theirs["lr"], tuple(theirs["adam_betas"]))
    assert (training.optimizer.weight_decay, training.ema, training.clip) == (0, theirs["ema_decay"], None)
    assert game is not None
    assert (game.optimizer, game.schedule, game.order) == (None, None, "discriminator-first")
    assert {
        "gen_loss_weight": game.weight,
        "lecam_loss_weight": game.lecam,
        "disc_start": game.start,
    }.items() <= theirs["loss"].items()


@pytest.mark.parametrize("step", range(STEPS))
def test_logged_values(trace: Trace, step: int) -> None:
    tolerance = TOLERANCES["per_step_logs step 0" if step == 0 else "later steps"]
    theirs = SPEC["per_step_logs"][step]
    assert trace.logs[step].keys() == theirs.keys() - {"train/perceptual_loss", "train/disc_factor"}
    for name, value in trace.logs[step].items():
        assert value == pytest.approx(theirs[name], abs=tolerance), name


def test_first_step(trace: Trace) -> None:
    torch.testing.assert_close(trace.first_output_BCHW, ARRAYS["out/step0/xrec"], atol=5e-4, rtol=0)
    first = trace.trainer.first
    assert relative(first["discriminator.main.0.weight"], ARRAYS["out/step0/d_grad/main.0.weight"]) < 1e-3
    names = [key.removeprefix("out/step0/g_grad/") for key in ARRAYS if key.startswith("out/step0/g_grad/")]
    assert names
    for name in names:
        ours = first[f"tokenizer.{RENAMED.get(name, f'autoencoder.{name}')}"]
        assert relative(ours, ARRAYS[f"out/step0/g_grad/{name}"]) < 1e-3, name


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("values", ["after", "after_ema"])
def test_after_three_steps(trace: Trace, values: str) -> None:
    tokenizer = trace.tokenizer_after(values)
    codes_Bhw = tokenizer.encode(pixels_of(0))
    assert int((codes_Bhw.flatten() != ARRAYS[f"out/{values}/indices"]).sum()) <= 1
    codebook_KD = tokenizer.quantizer.codebook_KD.detach()
    torch.testing.assert_close(codebook_KD, ARRAYS[f"out/{values}/codebook"], atol=TOLERANCES["codebooks"], rtol=0)
    with torch.no_grad():
        output_BCHW = tokenizer.autoencoder.decode(tokenizer.quantizer.lookup(codes_Bhw))
    theirs = ARRAYS[f"out/{values}/reconstruction"]
    torch.testing.assert_close(output_BCHW, theirs, atol=TOLERANCES["out/after/reconstruction"], rtol=0)
