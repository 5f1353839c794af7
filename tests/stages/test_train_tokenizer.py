"""train-tokenizer: it learns to reconstruct, continues after any crash with the same bytes, warns of a dead codebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.errors import UsageError
from pipeline.progress import Progress
from stages.networks import NetworkFile, load_tokenizer
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage

AUTOENCODER = {"kind": "convolutional", "widths": [8, 8], "latent": 4}
QUANTIZER = {"kind": "vector", "codes": 16, "weight": 0.1, "revive_every": 2, "revive_until": 3}
TINY: dict[str, Any] = {
    "model": {"autoencoder": AUTOENCODER, "quantizer": QUANTIZER},
    "views": {"kind": "shifts", "size": 16, "pixels": 1},
    "rows_per_pass": 6,
    "training": {"steps": 4, "batch": 8},
}


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
    assert late.facts["figure"] == f"PSNR {late.facts['psnr']:.1f} dB on held-out, {late.facts['used']}/16 codes used"
    assert load_tokenizer(NetworkFile.of(late, "cpu")).codebook_size == 16


@pytest.mark.crash
def test_whole_after_any_crash(tmp_path: Path, images: Artifact) -> None:
    check_every_crash(
        lambda store: run_stage("train-tokenizer", store, TINY, inputs={"images": images}, checkpoint_seconds=0.0),
        tmp_path,
        most=6,
    )


def test_codebook_health_is_in_every_line_and_a_collapse_is_told(tmp_path: Path, images: Artifact) -> None:
    quantizer = {"kind": "vector", "codes": 256, "init": "uniform", "usage_decay": 0.5}
    config = {**TINY, "model": {"autoencoder": AUTOENCODER, "quantizer": quantizer}}
    made = run_stage("train-tokenizer", tmp_path, config, inputs={"images": images}, progress=Progress())
    lines = [json.loads(line) for line in (made.path / "log/metrics.jsonl").read_text().splitlines()]
    assert all({"usage", "perplexity", "dead"} <= line.keys() for line in lines if line["event"] == "train")
    warnings = [line["text"] for line in lines if line["event"] == "warning"]
    assert len(warnings) == 1
    assert "revive_every" in warnings[0]


def test_views_that_do_not_divide_into_codes_are_refused(tmp_path: Path, images: Artifact) -> None:
    config = {**TINY, "views": {"kind": "center", "size": 18}}
    with pytest.raises(UsageError, match="18x18 pixels does not divide into codes of 4 pixels"):
        run_stage("train-tokenizer", tmp_path, config, inputs={"images": images})
