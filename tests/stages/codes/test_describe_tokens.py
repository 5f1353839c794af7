"""describe-tokens: means of hidden states, the same whoever computes them, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.generators.config import GptConfig, HistogramConfig
from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, InputError, NumericError, UsageError
from pipeline.store import Store
from smalti.arrays import MappedArray
from stages.weights.networks import NetworkFile, load_generator
from tests.stages.conformance import check_every_crash, check_same_bytes, run_stage, zarr_members
from tests.stages.small_artifacts import CODES, Backwards, generator_artifact, token_artifact, tokenizer_artifact

IMAGES, CROPS = 7, 2
CODES_ICT = np.random.default_rng(0).integers(0, CODES, (IMAGES, CROPS, 4))
LABELS_I = np.arange(IMAGES) % 3
GPT = GptConfig(width=16, layers=2, heads=2, mlp_width=32, norm="post", condition="none")
TINY: dict[str, Any] = {"layer": 1, "rows_per_pass": 3, "shard_images": 4, "chunk_images": 2}


class Made:
    """A tokenizer, codes of it, and a generator of these."""

    def __init__(self, root: Path):
        self.store = Store(root)
        self.tokenizer = tokenizer_artifact(self.store)
        self.tokens = token_artifact(self.store, self.tokenizer, CODES_ICT, LABELS_I)
        self.generator = self.build(GPT)

    def build(self, model: Any, **given: Any) -> Artifact:
        return generator_artifact(self.store, self.tokenizer, model, **given)

    def describe(self, store: Path, config: dict[str, Any] | None = None, **given: Any) -> Artifact:
        inputs = {name: given.pop(name, getattr(self, name)) for name in ("generator", "tokens")}
        return run_stage("describe-tokens", store, {**TINY, **(config or {})}, inputs=inputs, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_row_is_the_mean_of_its_hidden_states(made: Made, tmp_path: Path, layer: int) -> None:
    artifact = made.describe(tmp_path, {"layer": layer})
    network = load_generator(NetworkFile.of(made.generator, "cpu"))
    with torch.no_grad():
        states_NJD = network.hidden_states(torch.from_numpy(CODES_ICT).flatten(0, 1), layer)
    features_ND = MappedArray(artifact.path / "features").read()
    np.testing.assert_allclose(features_ND, states_NJD.mean(1), atol=1e-5)
    assert states_NJD.shape == (IMAGES * CROPS, 5, 16)
    assert MappedArray(artifact.path / "labels").read().tolist() == LABELS_I.tolist()
    assert zarr_members(artifact) == ["features", "labels"]
    known = {"images": IMAGES, "views": CROPS, "classes": 3, "dims": 16, "layer": layer}
    assert artifact.facts == {**known, "generator": made.generator.content}


def test_workers_and_shards_leave_no_trace(made: Made, tmp_path: Path) -> None:
    whole = made.describe(tmp_path / "whole")
    check_same_bytes(whole, made.describe(tmp_path / "backwards", cluster=Backwards()))
    others = made.describe(tmp_path / "others", {"shard_images": 2})
    np.testing.assert_allclose(
        MappedArray(whole.path / "features").read(), MappedArray(others.path / "features").read(), atol=1e-6
    )


@pytest.mark.crash
def test_whole_after_any_crash(made: Made, tmp_path: Path) -> None:
    check_every_crash(made.describe, tmp_path, most=6)


def test_a_generator_that_learnt_without_labels_is_given_none(made: Made, tmp_path: Path) -> None:
    rar = made.build(None)
    features = [
        MappedArray(made.describe(tmp_path, generator=rar, tokens=tokens).path / "features").read()
        for tokens in (made.tokens, token_artifact(made.store, made.tokenizer, CODES_ICT, 2 - LABELS_I, name="others"))
    ]
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize(
    ("model", "layer", "refusal"),
    [
        (GPT, 3, r"layers 0 \(what the first block takes\) to 2, not 3"),
        (GPT.model_copy(update={"condition": "class"}), 1, "hold the class that it is given"),
        (HistogramConfig(), 0, "kind histogram has no hidden states"),
    ],
)
def test_refuses_layers_that_there_are_not(made: Made, tmp_path: Path, model: Any, layer: int, refusal: str) -> None:
    with pytest.raises(UsageError, match=refusal):
        made.describe(tmp_path, {"layer": layer}, generator=made.build(model))


def test_refuses_codes_of_another_space(made: Made, tmp_path: Path) -> None:
    other = tokenizer_artifact(made.store, seed=1)
    foreign = token_artifact(made.store, other, CODES_ICT, LABELS_I, name="foreign")
    with pytest.raises(CorruptError, match="tokenizer"):
        made.describe(tmp_path, tokens=foreign)


def test_names_the_first_row_that_is_not_finite(made: Made, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="hidden states of row 0 are not finite"):
        made.describe(tmp_path, generator=made.build(GPT, poison="blocks.0.norm1.weight"))


def test_kmeans_refuses_them(made: Made, tmp_path: Path) -> None:
    with pytest.raises((InputError, UsageError), match="hidden states of codes"):
        run_stage("kmeans", tmp_path, {"clusters": 2}, inputs={"features": made.describe(tmp_path)})
