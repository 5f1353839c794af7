"""train-discriminator: it learns to tell reconstructions from images, changes no tokenizer, and others start from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.losses.adversarial import Adversary
from models.losses.config import AdversarialConfig
from pipeline.artifact import Artifact, verify_artifact
from pipeline.errors import CorruptError, UsageError
from pipeline.progress import Progress
from pipeline.store import Store
from stages.weights.files import load_config, load_weights
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage
from tests.stages.small_artifacts import digests, tokenizer_artifact

VIEWS = {"kind": "shifts", "size": 16, "pixels": 1}
PATCH = {"kind": "patch", "width": 4, "layers": 1}
TINY: dict[str, Any] = {
    "adversarial": {"discriminator": PATCH, "lecam_decay": 0.9},
    "views": VIEWS,
    "rows_per_pass": 6,
    "training": {"steps": 4, "batch": 8, "ema": 0.9, "optimizer": {"learning_rate": 0.005}},
}
BESIDE: dict[str, Any] = {"views": VIEWS, "training": {"steps": 2, "batch": 8}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(folder / "train", images=10), folder / "store")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of random weights: its reconstructions are easily told from images."""
    return tokenizer_artifact(Store(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def discriminator(tmp_path_factory: pytest.TempPathFactory, images: Artifact, tokenizer: Artifact) -> Artifact:
    config = {**TINY, "training": {**TINY["training"], "ema": None, "steps": 120}}
    return run_stage(
        "train-discriminator",
        tmp_path_factory.mktemp("trained"),
        config,
        inputs={"images": images, "tokenizer": tokenizer},
        progress=Progress(),
    )


def test_it_learns_to_tell_them_apart(discriminator: Artifact) -> None:
    lines = [json.loads(line) for line in (discriminator.path / "log/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert {"discriminator", "lecam", "logits_real", "logits_fake", "reconstruction"} <= steps[-1].keys()
    assert steps[-1]["discriminator"] < 0.5 * steps[0]["discriminator"]
    assert steps[-1]["logits_real"] > 0 > steps[-1]["logits_fake"]
    assert discriminator.facts["told_apart"] > 0.9
    assert discriminator.facts["told_apart_on"] == "training images"
    assert discriminator.figure.endswith("% of the patches told apart on training images")


def test_the_tokenizer_is_left_alone(tmp_path: Path, images: Artifact, tokenizer: Artifact) -> None:
    before = digests(tokenizer)
    made = run_stage("train-discriminator", tmp_path, TINY, inputs={"images": images, "tokenizer": tokenizer})
    verify_artifact(tokenizer.path)
    assert digests(tokenizer) == before
    assert load_config(made)["discriminator"] == PATCH
    names = Adversary(AdversarialConfig.model_validate(TINY["adversarial"]), channels=3).state_dict().keys()
    assert load_weights(made).keys() == names
    assert float(load_weights(made)["real_mean"]) != 0, "LeCAM's means are part of it"


def test_its_weights_are_where_the_game_goes_on(
    tmp_path: Path, images: Artifact, tokenizer: Artifact, discriminator: Artifact
) -> None:
    """From the same tokenizer, a trained discriminator finds other faults in the first step than a new one does."""
    inputs = {"images": images, "tokenizer": tokenizer}
    config = {**BESIDE, "adversarial": {"discriminator": PATCH}}
    fresh = run_stage("finetune-decoder", tmp_path / "fresh", config, inputs=inputs)
    given = {**inputs, "discriminator": discriminator}
    started = run_stage("finetune-decoder", tmp_path / "started", config, inputs=given, progress=Progress())
    assert digests(fresh) != digests(started)
    first = json.loads((started.path / "log/metrics.jsonl").read_text().splitlines()[0])
    assert first["logits_real"] > 0 > first["logits_fake"]


def test_another_network_is_refused(
    tmp_path: Path, images: Artifact, tokenizer: Artifact, discriminator: Artifact
) -> None:
    inputs = {"images": images, "tokenizer": tokenizer, "discriminator": discriminator}
    for wrong in ({**PATCH, "width": 8}, {"kind": "blur", "width": 32, "stages": 1}):
        with pytest.raises(
            CorruptError, match=r"adversarial\.discriminator is of .* but .* is of .*width 4"
        ) as refusal:
            run_stage("finetune-decoder", tmp_path, {**BESIDE, "adversarial": {"discriminator": wrong}}, inputs=inputs)
        assert 'set adversarial.discriminator to {"kind":"patch","width":4,"layers":1}' in str(refusal.value.hint)


def test_without_a_game_it_has_no_use(
    tmp_path: Path, images: Artifact, tokenizer: Artifact, discriminator: Artifact
) -> None:
    inputs = {"images": images, "tokenizer": tokenizer, "discriminator": discriminator}
    with pytest.raises(UsageError, match="its adversarial is null: the training would not use it"):
        run_stage("finetune-decoder", tmp_path, BESIDE, inputs=inputs)
    with pytest.raises(UsageError, match="its adversarial is null: the training would not use it"):
        run_stage(
            "train-tokenizer",
            tmp_path,
            {"training": {"batch": 4}},
            inputs={"images": images, "discriminator": discriminator},
        )


def test_views_that_the_tokenizer_cannot_see_are_refused(tmp_path: Path, images: Artifact, tokenizer: Artifact) -> None:
    config = {**TINY, "views": {"kind": "center", "size": 18}}
    with pytest.raises(UsageError, match=r"views\.size 18 does not fit"):
        run_stage("train-discriminator", tmp_path, config, inputs={"images": images, "tokenizer": tokenizer})


@pytest.mark.parametrize("stage", ["train-tokenizer", "train-discriminator", "finetune-decoder"])
@pytest.mark.parametrize(
    ("discriminator", "least", "knob"),
    [({"kind": "patch", "layers": 3}, 24, "layers"), ({"kind": "blur", "width": 32, "stages": 5}, 32, "stages")],
)
def test_views_smaller_than_a_patch_are_refused(
    tmp_path: Path, stage: str, discriminator: dict[str, Any], least: int, knob: str
) -> None:
    config = {"views": VIEWS, "adversarial": {"discriminator": discriminator}}
    wanted = rf"at least {least} pixels, but views.size is 16; lower adversarial\.discriminator\.{knob}"
    with pytest.raises(UsageError, match=wanted):
        run_stage(stage, tmp_path, config)


@pytest.mark.crash
def test_whole_after_any_crash(tmp_path: Path, images: Artifact, tokenizer: Artifact) -> None:
    torch.set_num_threads(1)
    inputs = {"images": images, "tokenizer": tokenizer}
    check_every_crash(
        lambda store: run_stage("train-discriminator", store, TINY, inputs=inputs, checkpoint_seconds=0.0),
        tmp_path,
        most=5,
    )
