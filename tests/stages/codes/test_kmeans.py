"""kmeans: what faiss would find, whatever the interruptions; the sample; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, InputError, NumericError, UsageError
from smalti.arrays import MappedArray
from stages.codes import clustering, kmeans
from stages.codes.clustering import Rows
from stages.codes.kmeans import KMeansConfig, choose_rows
from stages.codes.reservoir import smallest_rows
from tests.stages.conformance import (
    CRASHED,
    check_every_crash,
    check_same_bytes,
    crash_at,
    draw_folder,
    flip_bit,
    index_folder,
    run_stage,
)

ENCODER = {"kind": "whitened-patches", "image_size": 16, "cells": 2, "patch": 8, "dims": 5}
TINY = {"clusters": 6, "iterations": 4}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("features")
    images = index_folder(draw_folder(root / "folder"), root)
    config = {"encoder": ENCODER, "shard_images": 4, "chunk_images": 2}
    return run_stage("extract", root, config, inputs={"images": images})


def read_rows(features: Artifact) -> NDArray[np.float32]:
    return MappedArray(features.path / "features").read().reshape(-1, 5)


def read_centroids(codebook: Artifact) -> NDArray[np.float32]:
    return load_file(codebook.file("weights.safetensors"))["centroids_KD"].numpy()


def test_single_iterations_are_faiss_in_one_call(features: Artifact, tmp_path: Path) -> None:
    codebook = run_stage("kmeans", tmp_path, TINY, inputs={"features": features})
    rows_ND = read_rows(features)
    start = run_stage("kmeans", tmp_path, {**TINY, "iterations": 1}, inputs={"features": features})
    whole = faiss.Kmeans(5, 6, niter=3, min_points_per_centroid=1, seed=1)
    whole.train(rows_ND, init_centroids=read_centroids(start))
    np.testing.assert_allclose(read_centroids(codebook), whole.centroids, atol=1e-5)


def test_centroids_are_means_and_figures_are_counts(features: Artifact, tmp_path: Path) -> None:
    codebook = run_stage("kmeans", tmp_path, {**TINY, "iterations": 60}, inputs={"features": features})
    rows_ND, centroids_KD = read_rows(features), read_centroids(codebook)
    distances_NK = ((rows_ND[:, None] - centroids_KD) ** 2).sum(-1)
    codes_N = distances_NK.argmin(1)
    for code in range(6):
        np.testing.assert_allclose(centroids_KD[code], rows_ND[codes_N == code].mean(0), atol=1e-5)
    assert codebook.facts["inertia"] == pytest.approx(distances_NK.min(1).mean(), rel=1e-4)
    counts_K = np.bincount(codes_N, minlength=6)
    np.testing.assert_array_equal(np.load(codebook.file("sizes.npy")), counts_K)
    assert codebook.facts["sizes"] == {
        "smallest": counts_K.min(),
        "median": sorted(counts_K)[3],
        "largest": counts_K.max(),
    }
    assert codebook.facts["used"] == 6
    shares = np.bincount(codes_N) / len(codes_N)
    assert codebook.facts["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert codebook.figure.startswith("6/6 codes used, perplexity")


def test_codebook_carries_the_encoder(features: Artifact, tmp_path: Path) -> None:
    codebook = run_stage("kmeans", tmp_path, TINY, inputs={"features": features})
    encoder = load_file(features.file("encoder.safetensors"))
    weights = load_file(codebook.file("weights.safetensors"))
    assert set(weights) == {"centroids_KD", *(f"encoder.{name}" for name in encoder)}
    assert weights["encoder.mean_P"].equal(encoder["mean_P"])
    config = json.loads(codebook.file("config.json").read_bytes())
    assert config["encoder"] == {**ENCODER, "channels": 3, "noise": 0.001}


def test_every_crash(features: Artifact, tmp_path: Path) -> None:
    config = {"clusters": 3, "iterations": 2}
    check_every_crash(lambda store: run_stage("kmeans", store, config, inputs={"features": features}), tmp_path)


def test_continues_after_the_last_iteration(
    features: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stage("kmeans", tmp_path / "whole", {**TINY, "iterations": 9}, inputs={"features": features})
    config = {**TINY, "iterations": 9}
    assert crash_at(40, lambda: run_stage("kmeans", tmp_path, config, inputs={"features": features})) == CRASHED
    left = max((tmp_path / "kmeans").glob(".*.partial/scratch/*.npz"))
    steps = count_steps(monkeypatch)
    check_same_bytes(whole, run_stage("kmeans", tmp_path, config, inputs={"features": features}))
    assert len(steps) == 9 - int(left.stem.removeprefix("iteration-"))
    assert 0 < len(steps) < 9


def test_fewer_rows_are_those_of_smallest_hash(features: Artifact) -> None:
    rows = choose_rows(features, KMeansConfig(clusters=6, max_rows=20, seed=7))
    np.testing.assert_array_equal(rows.read(0, 20), read_rows(features)[smallest_rows(64, 20, seed=7)])
    assert KMeansConfig(clusters=8192).most_rows == 2_097_152


def test_threads_and_memory_change_no_byte(features: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "PRODUCTS", 1)
    monkeypatch.setattr(clustering, "LEAST_ROWS", 5)
    monkeypatch.setattr(clustering, "LEAST_VALUES", 25)  # blocks of 5 rows
    held: list[Rows] = []
    monkeypatch.setattr(Rows, "hold", lambda rows, hold=Rows.hold: (held.append(rows), hold(rows)))
    inputs = {"features": features}
    one = run_stage("kmeans", tmp_path / "one", {**TINY, "memory_gib": 64.0}, inputs=inputs, threads=1)
    assert len(held) == 1
    many = run_stage("kmeans", tmp_path / "many", {**TINY, "memory_gib": 0.001}, inputs=inputs, threads=3)
    assert len(held) == 1
    check_same_bytes(one, many)


def test_seed_changes_the_codebook(features: Artifact, tmp_path: Path) -> None:
    one = run_stage("kmeans", tmp_path, TINY, inputs={"features": features})
    two = run_stage("kmeans", tmp_path, {**TINY, "seed": 1}, inputs={"features": features})
    assert one.key != two.key
    assert not np.array_equal(read_centroids(one), read_centroids(two))


def test_as_many_clusters_as_rows(features: Artifact, tmp_path: Path) -> None:
    codebook = run_stage("kmeans", tmp_path, {"clusters": 64, "iterations": 2}, inputs={"features": features})
    assert codebook.facts["inertia"] == pytest.approx(0, abs=1e-5)


def test_refuses_more_clusters_than_rows(features: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"65 clusters need at least as many features, but .* has 64"):
        run_stage("kmeans", tmp_path, {"clusters": 65}, inputs={"features": features})
    with pytest.raises(InputError, match="max_rows is 5"):
        run_stage("kmeans", tmp_path, {"clusters": 6, "max_rows": 5}, inputs={"features": features})


def test_centroids_that_are_not_finite_stop_at_once_and_keep_the_last_good(
    features: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stage("kmeans", tmp_path / "whole", TINY, inputs={"features": features})
    steps = count_steps(monkeypatch, bad=3)
    with pytest.raises(NumericError, match="iteration 3"):
        run_stage("kmeans", tmp_path, TINY, inputs={"features": features})
    assert len(steps) == 3
    monkeypatch.undo()
    check_same_bytes(whole, run_stage("kmeans", tmp_path, TINY, inputs={"features": features}))


def test_damaged_features_are_refused(tmp_path: Path) -> None:
    images = index_folder(draw_folder(tmp_path / "folder"), tmp_path)
    damaged = run_stage("extract", tmp_path, {"encoder": ENCODER}, inputs={"images": images})
    flip_bit(damaged.file("features/c/0/0/0/0"), place=77)
    with pytest.raises(CorruptError, match="features"):
        run_stage("kmeans", tmp_path, TINY, inputs={"features": damaged})


def test_refuses_another_kind_and_nonsense(features: Artifact, tmp_path: Path) -> None:
    codebook = run_stage("kmeans", tmp_path, TINY, inputs={"features": features})
    with pytest.raises(CorruptError, match=r"kmeans reads a features as features, but kmeans/.* is of kind codebook"):
        run_stage("kmeans", tmp_path, TINY, inputs={"features": codebook})
    with pytest.raises(UsageError, match="clusters"):
        run_stage("kmeans", tmp_path, {"clusters": 0}, inputs={"features": features})


def count_steps(monkeypatch: pytest.MonkeyPatch, *, bad: int | None = None) -> list[int]:
    """Counts iterations, and makes the centroids of number `bad` NaN."""
    steps: list[int] = []
    sound = kmeans.move

    def counted(*arguments: Any, **options: Any) -> Any:
        steps.append(len(steps) + 1)
        moved = sound(*arguments, **options)
        return moved._replace(centroids_KD=moved.centroids_KD * np.nan) if steps[-1] == bad else moved

    monkeypatch.setattr(kmeans, "move", counted)
    return steps
