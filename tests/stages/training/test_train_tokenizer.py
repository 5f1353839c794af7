"""train-tokenizer: it learns to reconstruct, with or without a discriminator, whole after any crash; health of the codebook."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.artifact import Artifact
from pipeline.errors import StorageError, UsageError
from pipeline.keys import config_value
from pipeline.progress import Progress
from stages.codes.code_usage import CodeUsage
from stages.training.config import TrainTokenizerConfig
from stages.weights.networks import NetworkFile, load_tokenizer
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage

AUTOENCODER = {"kind": "convolutional", "widths": [8, 8], "latent": 4}
QUANTIZER = {"kind": "vector", "codes": 16, "weight": 0.1, "revive_every": 2, "revive_until": 3}
TINY: dict[str, Any] = {
    "model": {"autoencoder": AUTOENCODER, "quantizer": QUANTIZER},
    "views": {"kind": "shifts", "size": 16, "pixels": 1},
    "rows_per_pass": 6,
    "training": {"steps": 4, "batch": 8},
    "reconstructions": {"every": 2},
}
GAME: dict[str, Any] = {"discriminator": {"kind": "patch", "width": 4, "layers": 1}, "start": 1, "weight": None}
BESIDE_A_DISCRIMINATOR = {**TINY, "adversarial": GAME, "training": {**TINY["training"], "ema": 0.9}}
USE, ENTROPIES = {"usage", "perplexity", "dead"}, {"sample_entropy", "codebook_entropy"}
HEALTH = {"vector": USE, "lookup-free": USE | ENTROPIES, "index-backpropagation": USE | ENTROPIES}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(folder / "train", images=10), folder / "store")


def test_it_learns_to_reconstruct(tmp_path: Path, images: Artifact) -> None:
    inputs = {"images": images, "held-out": images}
    early = run_stage("train-tokenizer", tmp_path, {**TINY, "training": {"steps": 1, "batch": 8}}, inputs=inputs)
    late = run_stage("train-tokenizer", tmp_path, {**TINY, "training": {"steps": 60, "batch": 10}}, inputs=inputs)
    assert late.facts["psnr"] > early.facts["psnr"] + 3
    assert late.facts["grid"] == [4, 4]
    assert late.facts["downsample"] == 4
    assert 0 < late.facts["used"] <= late.facts["codebook_size"] == 16
    assert late.figure == f"PSNR {late.facts['psnr']:.1f} dB on held-out, {late.facts['used']}/16 codes used"
    assert load_tokenizer(NetworkFile.of(late, "cpu")).codebook_size == 16


@pytest.mark.crash
def test_whole_after_any_crash(tmp_path: Path, images: Artifact) -> None:
    check_every_crash(
        lambda store: run_stage("train-tokenizer", store, TINY, inputs={"images": images}, checkpoint_seconds=0.0),
        tmp_path,
        most=6,
    )


@pytest.mark.crash
def test_whole_after_a_crash_at_every_call_beside_a_discriminator(tmp_path: Path, images: Artifact) -> None:
    """The discriminator, LeCAM's means, the averages and both optimizers come back, wherever it was killed."""
    config = {**BESIDE_A_DISCRIMINATOR, "training": {"steps": 2, "batch": 8, "ema": 0.9}}
    calls = check_every_crash(
        lambda store: run_stage("train-tokenizer", store, config, inputs={"images": images}, checkpoint_seconds=0.0),
        tmp_path,
    )
    assert calls > 20


def lines_of(made: Artifact, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (made.path / "log/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_discriminator_counts_from_its_start(tmp_path: Path, images: Artifact) -> None:
    """Before it, the tokenizer is that of a training without one; from it on, both sides mind each other."""

    def train(name: str, start: int | None, steps: int = 3) -> Artifact:
        game = None if start is None else {**GAME, "start": start}
        config = {**TINY, "adversarial": game, "training": {"steps": steps, "batch": 8}}
        return run_stage("train-tokenizer", tmp_path / name, config, inputs={"images": images}, progress=Progress())

    alone, later, second = train("alone", None), train("later", 3), train("second", 2)
    assert later.files["weights.safetensors"].sha256 == alone.files["weights.safetensors"].sha256
    assert second.files["weights.safetensors"].sha256 != alone.files["weights.safetensors"].sha256
    steps = lines_of(second, "train")
    assert ["adversarial" in line for line in steps] == [False, False, True]
    assert [line["adversarial_weight"] > 0 for line in steps] == [False, False, True]
    assert [line["discriminator"] + line["lecam"] > 0 for line in steps] == [False, False, True]


def test_the_weight_is_fixed_or_adaptive(tmp_path: Path, images: Artifact) -> None:
    def weights(**game: Any) -> list[float]:
        config = {**TINY, "adversarial": {**GAME, "start": 0, **game}}
        made = run_stage("train-tokenizer", tmp_path, config, inputs={"images": images}, progress=Progress())
        return [line["adversarial_weight"] for line in lines_of(made, "train")]

    assert weights(weight=0.25) == [0.25] * 4
    adaptive, doubled = weights(weight=None, adaptive_scale=0.4), weights(weight=None, adaptive_scale=0.8)
    assert doubled[0] == pytest.approx(2 * adaptive[0])
    assert len(set(adaptive)) == 4


def test_two_optimizers_with_schedules_of_their_own(tmp_path: Path, images: Artifact) -> None:
    own = {
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"kind": "constant", "drops": [2, 3], "factor": 0.5},
    }
    config = {
        **TINY,
        "adversarial": {**GAME, **own},
        "training": {
            "steps": 4,
            "batch": 8,
            "optimizer": {"learning_rate": 0.1},
            "schedule": {"kind": "constant", "drops": [1]},
        },
    }
    made = run_stage("train-tokenizer", tmp_path, config, inputs={"images": images}, progress=Progress())
    steps = lines_of(made, "train")
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.1, 0.01, 0.01, 0.01])
    assert [line["learning_rate_adversary"] for line in steps] == pytest.approx([0.01, 0.01, 0.005, 0.0025])


@pytest.mark.parametrize("quantizer", HEALTH)
def test_codebook_health_is_in_every_line(tmp_path: Path, images: Artifact, quantizer: str) -> None:
    """In the log, and in what progress says."""
    codes = {} if quantizer == "lookup-free" else {"codes": 16}
    config = {**TINY, "model": {"autoencoder": AUTOENCODER, "quantizer": {"kind": quantizer, **codes}}}
    said = io.StringIO()
    made = run_stage("train-tokenizer", tmp_path, config, inputs={"images": images}, progress=Progress(said))
    assert len(lines_of(made, "train")) == 4
    for line in lines_of(made, "train"):
        assert line.keys() >= HEALTH[quantizer]
    last = next(line for line in said.getvalue().splitlines() if "32/32 images" in line)
    assert all(f" {name} " in last for name in HEALTH[quantizer])


def test_a_collapse_is_told_with_advice(tmp_path: Path, images: Artifact) -> None:
    quantizer = {"kind": "vector", "codes": 256, "init": "uniform", "usage_decay": 0.5}
    config = {**TINY, "model": {"autoencoder": AUTOENCODER, "quantizer": quantizer}}
    said = io.StringIO()
    made = run_stage("train-tokenizer", tmp_path, config, inputs={"images": images}, progress=Progress(said))
    on_the_way, at_the_end = lines_of(made, "warning")
    assert on_the_way["text"].startswith("after 4 steps ")
    assert at_the_end["text"].startswith(f"the tokenizer uses {made.facts['used']} of its 256 codes")
    assert at_the_end["step"] == 4
    for warning in (on_the_way, at_the_end):
        assert "revive_every" in warning["text"]
        assert f"warning: {warning['text']}" in said.getvalue()


def test_one_code_of_256_is_told_at_the_end(tmp_path: Path, images: Artifact) -> None:
    """Also where the training was too short for its running use to show it."""
    quantizer = {"kind": "vector", "codes": 256, "init": "uniform"}
    config = {**TINY, "model": {"autoencoder": AUTOENCODER, "quantizer": quantizer}}
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodeUsage, "used", 1)
        made = run_stage("train-tokenizer", tmp_path, config, inputs={"images": images}, progress=Progress(said))
    assert made.facts["used"] == 1
    assert "warning: the tokenizer uses 1 of its 256 codes: the codebook collapsed; revive codes" in said.getvalue()


def test_what_is_computed_around_the_steps_is_said(tmp_path: Path, images: Artifact) -> None:
    said = io.StringIO()
    run_stage("train-tokenizer", tmp_path, TINY, inputs={"images": images, "held-out": images}, progress=Progress(said))
    heading, before, bar, *after = said.getvalue().splitlines()
    assert heading == "train-tokenizer"
    assert before == "  reading 20 images and 20 held-out images, building the networks"
    assert bar.startswith("  train-tokenizer: 32/32 images")
    assert after == ["  measuring the result on 20 images", "  counting the codes in use in 20 images"]


def grids(made: Artifact) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted((made.path / "log").glob("*.png"))}


def test_grids_of_reconstructions_in_the_log_and_no_trace_in_the_weights(tmp_path: Path, images: Artifact) -> None:
    config = {
        **BESIDE_A_DISCRIMINATOR,
        "training": {**TINY["training"], "steps": 20, "ema": 0.9},
        "reconstructions": {},
    }
    inputs = {"images": images, "held-out": images}
    drawn = run_stage("train-tokenizer", tmp_path, config, inputs=inputs)
    assert list(grids(drawn)) == [f"reconstructions-{step:08d}.png" for step in range(2, 21, 2)]
    first, last = grids(drawn)["reconstructions-00000002.png"], grids(drawn)["reconstructions-00000020.png"]
    assert first.shape == (4 * (64 + 12 + 2) + 2, 10 * 66 + 2, 3)
    originals, reconstructions = slice(0, 78), slice(80, 144)
    assert (first[originals] == last[originals]).all()
    assert (first[reconstructions] != last[reconstructions]).any()
    plain = run_stage("train-tokenizer", tmp_path, {**config, "reconstructions": None}, inputs=inputs)
    assert not grids(plain)
    assert plain.file("weights.safetensors").read_bytes() == drawn.file("weights.safetensors").read_bytes()
    assert not any(name.startswith("log") for name in drawn.files)
    few = {**config, "reconstructions": {"every": 15, "images": 3}}
    (grid,) = grids(run_stage("train-tokenizer", tmp_path, few, inputs=inputs)).values()
    assert grid.shape == (2 * (64 + 12 + 2) + 2, 10 * 66 + 2, 3)


def test_settings_without_grids_keep_their_key() -> None:
    assert set(config_value(TrainTokenizerConfig())) == {"model", "loss", "views", "rows_per_pass", "training"}


def test_lpips_without_its_weights_says_how_to_get_them_or_to_do_without(
    tmp_path: Path, images: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    config = {**TINY, "loss": {"kind": "reconstruction", "perceptual": 1.0}}
    with pytest.raises(
        StorageError, match=r"is not on this machine and cannot be downloaded \(no network\)"
    ) as refusal:
        run_stage("train-tokenizer", tmp_path / "store", config, inputs={"images": images})
    assert refusal.value.exit_code == 74
    assert "--perceptual FILE" in str(refusal.value.hint)
    assert "set loss.perceptual to 0" in str(refusal.value.hint)


def test_weights_that_the_loss_does_not_use_are_refused(tmp_path: Path, images: Artifact) -> None:
    (tmp_path / "vgg16.pth").write_bytes(b"whatever")
    with pytest.raises(UsageError, match=r"loss\.perceptual is 0"):
        run_stage(
            "train-tokenizer",
            tmp_path / "store",
            TINY,
            inputs={"images": images},
            paths={"perceptual": tmp_path / "vgg16.pth"},
        )


def test_views_that_do_not_divide_into_codes_are_refused(tmp_path: Path, images: Artifact) -> None:
    config = {**TINY, "views": {"kind": "center", "size": 18}}
    with pytest.raises(UsageError, match="18x18 pixels does not divide into codes of 4 pixels"):
        run_stage("train-tokenizer", tmp_path, config, inputs={"images": images})
