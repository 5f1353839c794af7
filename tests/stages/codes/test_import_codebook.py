"""import-codebook: centroids of others, there and back; refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, InputError, UsageError
from smalti import open_tokens
from tests.stages.codes.test_extract import tiny_dinov2
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage

ENCODER = {"kind": "whitened-patches", "image_size": 16, "cells": 2, "patch": 8, "dims": 5}
DINOV2 = {"kind": "dinov2", "size": "small", "image_size": 28, "block": -1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(root / "folder"), root / "store")


@pytest.fixture(scope="module")
def features(images: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_stage("extract", tmp_path_factory.mktemp("features"), {"encoder": ENCODER}, inputs={"images": images})


def brought(store: Path, file: Path, features: Artifact) -> Artifact:
    return run_stage("import-codebook", store, inputs={"features": features}, paths={"centroids": file})


def save(file: Path, codes: int, dims: int) -> Path:
    np.save(file, np.random.default_rng(0).standard_normal((codes, dims), dtype=np.float32))
    return file


def test_there_and_back(images: Artifact, features: Artifact, tmp_path: Path) -> None:
    """A codebook that went out as km_*.npy and came in again makes the same codes, and has the same identity."""
    fitted = run_stage("kmeans", tmp_path, {"clusters": 6, "iterations": 3}, inputs={"features": features})
    np.save(tmp_path / "km.npy", load_file(fitted.file("weights.safetensors"))["centroids_KD"])
    again = brought(tmp_path, tmp_path / "km.npy", features)
    for file in ("config.json", "weights.safetensors"):
        assert again.file(file).read_bytes() == fitted.file(file).read_bytes()
    one, two = (
        run_stage("pretokenize", tmp_path, inputs={"images": images, "tokenizer": codebook})
        for codebook in (fitted, again)
    )
    np.testing.assert_array_equal(open_tokens(one.path).tokens.read(), open_tokens(two.path).tokens.read())
    assert again.figure == "6 codes of 5 values, whitened-patches"


def test_published_files(images: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files become a codebook; images of 28 pixels are taken as they are, those of 32 are resized by the encoder."""
    weights, _ = tiny_dinov2(tmp_path, monkeypatch)
    paths = {"centroids": save(tmp_path / "km.npy", 7, 12), "weights": weights}
    codebook = run_stage("import-codebook", tmp_path, {"encoder": DINOV2}, paths=paths)
    assert codebook.facts["accepts"] == [28, 32]
    inputs = {"images": images, "tokenizer": codebook}
    for size in (28, 32):
        made = run_stage("pretokenize", tmp_path, {"views": {"kind": "eval-crop", "size": size}}, inputs=inputs)
        assert made.facts["grid"] == [2, 2]
        assert made.facts["codes"] == 7
    with pytest.raises(UsageError, match=r"takes images of 28 or 32 pixels, but views\.size is 42"):
        run_stage("pretokenize", tmp_path, {"views": {"kind": "eval-crop", "size": 42}}, inputs=inputs)


def test_every_crash(features: Artifact, tmp_path: Path) -> None:
    file = save(tmp_path / "km.npy", 4, 5)
    check_every_crash(lambda store: brought(store, file, features), tmp_path / "stores")


def test_refuses_what_does_not_fit(features: Artifact, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="centroids have 4 values, but features of whitened-patches have 5"):
        brought(tmp_path, save(tmp_path / "narrow.npy", 6, 4), features)
    np.save(tmp_path / "whole.npy", np.arange(6).reshape(2, 3))
    with pytest.raises(CorruptError, match=r"shape \(2, 3\), int64, expected centroids"):
        brought(tmp_path, tmp_path / "whole.npy", features)
    np.save(tmp_path / "bad.npy", np.full((2, 5), np.nan, np.float32))
    with pytest.raises(CorruptError, match="NaN or infinity"):
        brought(tmp_path, tmp_path / "bad.npy", features)
    np.save(tmp_path / "object.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptError, match="cannot be read as an array of centroids"):
        brought(tmp_path, tmp_path / "object.npy", features)
    with pytest.raises(InputError, match="no array of centroids"):
        brought(tmp_path, tmp_path / "missing.npy", features)
    with pytest.raises(UsageError, match="needs features, which hold their encoder, or the encoder"):
        run_stage("import-codebook", tmp_path, paths={"centroids": save(tmp_path / "km.npy", 6, 5)})
