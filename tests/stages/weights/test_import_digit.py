"""Checkpoints of fairseq, as DiGIT publishes them: codebooks beside a generator, and the codebook and the encoder within."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.encoders.config import Dinov2Config
from models.encoders.dinov2 import Dinov2
from pipeline.artifact import Artifact
from pipeline.errors import CorruptError
from stages.codes import encoders
from stages.codes.encoders import published_weights
from stages.codes.import_codebook import read_centroids
from stages.weights.cards import TokenizerCard, read_card
from stages.weights.import_weights import configs_of
from tests.models.generators.digit_fixtures import about
from tests.models.generators.digit_fixtures import published_weights as weights_of
from tests.stages.conformance import draw_folder, index_folder, run_stage


def checkpoint(folder: Path, name: str, **changes: Any) -> Path:
    """What fairseq saves: settings as plain containers, and much that is not needed here."""
    contents = {
        "args": None,
        "cfg": {"_name": None, "model": about(name)["config"], "task": {"_name": "tokens"}},
        "model": weights_of(name),
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "FP16Optimizer", "num_updates": 125_000}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 3}},
        "last_optimizer_state": {"loss_scale": 128.0},
        **changes,
    }
    torch.save(contents, folder / f"{name}.pt")
    return folder / f"{name}.pt"


def imported(folder: Path, file: Path, config: dict[str, Any] | None = None, **inputs: Artifact) -> Artifact:
    return run_stage(
        "import-weights", folder, {"layout": "digit", **(config or {})}, inputs=inputs, paths={"weights": file}
    )


def test_a_file_is_told_without_its_layout(tmp_path: Path) -> None:
    """Its VQGAN has 256 channels, which are no code of 256 bits."""
    kinds = sorted(config.kind for config in configs_of(checkpoint(tmp_path, "stage2_ar")))
    assert kinds == ["generator", "tokenizer"]


def test_codebooks_given_beside_a_file_are_in_the_card(tmp_path: Path) -> None:
    images = index_folder(draw_folder(tmp_path / "images"), tmp_path)
    encoder = {"kind": "whitened-patches", "image_size": 16, "cells": 2, "patch": 8, "dims": 5}
    features = run_stage("extract", tmp_path, {"encoder": encoder}, inputs={"images": images})
    codebooks = [
        run_stage("kmeans", tmp_path, {"clusters": clusters, "iterations": 1}, inputs={"features": features})
        for clusters in (64, 6)
    ]
    stage1, stage2 = checkpoint(tmp_path, "stage1_uncond"), checkpoint(tmp_path, "stage2_ar")
    identity = TokenizerCard.of(codebooks[0]).identity
    semantic = read_card(imported(tmp_path, stage1, tokenizer=codebooks[0])).space
    condition = read_card(imported(tmp_path, stage2, condition=codebooks[0])).condition
    for space in (semantic, condition):
        assert space is not None
        assert (space.tokenizer, space.grid, space.resolution) == (identity, (2, 2), 16)
    with pytest.raises(CorruptError, match=r"64 codes, but .* has 6"):
        imported(tmp_path, stage1, tokenizer=codebooks[1])
    with pytest.raises(CorruptError, match=r"64 codes, but .* has 6"):
        imported(tmp_path, stage2, condition=codebooks[1])
    with pytest.raises(CorruptError, match="no codes of another space"):
        imported(tmp_path, stage1, condition=codebooks[0])


def test_the_codebook_and_the_encoder_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, weights = checkpoint(tmp_path, "stage1_uncond"), weights_of("stage1_uncond")
    np.testing.assert_array_equal(read_centroids(file), weights["centroids"].T.numpy())
    with pytest.raises(CorruptError, match="holds no tensor centroids"):
        read_centroids(checkpoint(tmp_path, "vq_baseline"))
    config = Dinov2Config.model_validate({"size": "base"})
    monkeypatch.setattr(encoders, "build", lambda *given: Dinov2(config, embed_dim=32, depth=5, num_heads=2))
    state = published_weights(config, file)
    assert torch.equal(state["transformer.norm.weight"], weights["pretrained_encoder.norm.weight"])
