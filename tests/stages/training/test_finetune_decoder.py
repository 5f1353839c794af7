"""finetune-decoder: only the decoder changes, and token sets are decoded by the old and by the new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.tokenizer import DECODING
from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, UsageError
from pipeline.progress import Progress
from pipeline.store import Store
from stages.images.image_files import open_pictures
from stages.weights.files import load_weights
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage
from tests.stages.small_artifacts import tokenizer_artifact

VIEWS = {"kind": "shifts", "size": 16, "pixels": 1}
TINY: dict[str, Any] = {
    "views": VIEWS,
    "rows_per_pass": 6,
    "adversarial": {"discriminator": {"kind": "patch", "width": 4, "layers": 1}, "weight": None},
    "training": {"steps": 4, "batch": 8, "ema": 0.9},
}
LONGER: dict[str, Any] = {**TINY, "training": {"steps": 40, "batch": 8}, "adversarial": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(folder / "train", images=10), folder / "store")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tokenizer_artifact(Store(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, images: Artifact, tokenizer: Artifact) -> Artifact:
    inputs = {"images": images, "tokenizer": tokenizer}
    return run_stage("finetune-decoder", tmp_path_factory.mktemp("tuned"), LONGER, inputs=inputs, progress=Progress())


def seen(images: Artifact) -> NDArray[np.uint8]:
    pictures = open_pictures(images, size=None)
    return pictures.read(0, len(pictures))


def test_only_the_decoder_changes(tmp_path: Path, images: Artifact, tokenizer: Artifact, tuned: Artifact) -> None:
    """Also beside a discriminator and with averaged weights: encoder, codebook and counters keep every byte."""
    inputs = {"images": images, "tokenizer": tokenizer}
    before = load_weights(tokenizer)
    for made in (tuned, run_stage("finetune-decoder", tmp_path, TINY, inputs=inputs)):
        after = load_weights(made)
        assert after.keys() == before.keys()
        changed = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
        assert changed
        assert all(name.startswith(DECODING) for name in changed)
        assert {name for name in before if name.startswith(DECODING) and name.endswith("weight")} <= changed


def test_tokens_are_decoded_by_both(tmp_path: Path, images: Artifact, tokenizer: Artifact, tuned: Artifact) -> None:
    """Codes of either tokenizer are the same and each decodes those of the other."""
    coding = {"views": {"kind": "center", "size": 16}, "shard_images": 8, "chunk_images": 4}
    makers = {"old": tokenizer, "new": tuned}
    tokens = {
        name: run_stage("pretokenize", tmp_path / name, coding, inputs={"images": images, "tokenizer": maker})
        for name, maker in makers.items()
    }
    stored = [
        {name: entry.sha256 for name, entry in found.files.items() if name.startswith("tokens/")}
        for found in tokens.values()
    ]
    assert stored[0] == stored[1]
    assert tokens["old"].facts["tokenizer"] == tokens["new"].facts["tokenizer"]
    pictures = {
        (codes, decoder): run_stage(
            "decode",
            tmp_path / f"{codes} by {decoder}",
            {"shard_images": 8, "chunk_images": 4},
            inputs={"tokens": tokens[codes], "tokenizer": makers[decoder]},
        )
        for codes in tokens
        for decoder in makers
    }
    for decoder in makers:
        old, new = (seen(pictures[codes, decoder]) for codes in tokens)
        assert np.array_equal(old, new)
    assert not np.array_equal(*(seen(pictures["old", decoder]) for decoder in makers))
    stranger = tokenizer_artifact(Store(tmp_path / "stranger"), seed=5)
    with pytest.raises(CorruptError, match="another tokenizer"):
        run_stage("decode", tmp_path, {}, inputs={"tokens": tokens["new"], "tokenizer": stranger})


def test_a_decoder_is_tuned_twice(tmp_path: Path, images: Artifact, tokenizer: Artifact, tuned: Artifact) -> None:
    """The codes stay those of the first tokenizer."""
    twice = run_stage("finetune-decoder", tmp_path, TINY, inputs={"images": images, "tokenizer": tuned})
    assert twice.facts["codes_of"] == tuned.facts["codes_of"]


def test_it_learns(tuned: Artifact) -> None:
    lines = [json.loads(line) for line in (tuned.path / "log/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert steps[-1]["l2"] < 0.8 * steps[0]["l2"]
    assert all({"usage", "perplexity"} <= line.keys() for line in steps)


def test_views_that_the_tokenizer_cannot_see_are_refused(tmp_path: Path, images: Artifact, tokenizer: Artifact) -> None:
    config = {**TINY, "views": {"kind": "center", "size": 18}}
    with pytest.raises(UsageError, match=r"views\.size 18 does not fit"):
        run_stage("finetune-decoder", tmp_path, config, inputs={"images": images, "tokenizer": tokenizer})


@pytest.mark.crash
def test_whole_after_any_crash(tmp_path: Path, images: Artifact, tokenizer: Artifact) -> None:
    inputs = {"images": images, "tokenizer": tokenizer}
    check_every_crash(
        lambda store: run_stage("finetune-decoder", store, TINY, inputs=inputs, checkpoint_seconds=0.0),
        tmp_path,
        most=5,
    )
