"""clustering: iterations as faiss makes them, blocks, splits, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.errors import NumericError
from smalti.arrays import ArraySpec, MappedArray, encode_shard, metadata_bytes
from stages.codes import clustering
from stages.codes.clustering import (
    Rows,
    cut_blocks,
    move,
    search_by_faiss,
    search_by_torch,
    search_threads,
    split_largest,
)

CPU = torch.device("cpu")


def draw(rows: int, dims: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((rows, dims), dtype=np.float32)


def stored(folder: Path, rows_ND: NDArray[np.float32]) -> Rows:
    spec = ArraySpec(shape=rows_ND.shape, dtype="float32", chunk_rows=8, shard_rows=64)
    (folder / "c" / "0").mkdir(parents=True)
    (folder / "zarr.json").write_bytes(metadata_bytes(spec))
    for shard in range(spec.shards):
        name, data = encode_shard(spec, shard, rows_ND[slice(*spec.shard_range(shard))])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Rows(MappedArray(folder), None, name="rows")


def run(rows: Rows, centroids_KD: NDArray[np.float32], *, threads: int = 2) -> clustering.Moved:
    with search_threads(threads) as pool:
        return move(rows, centroids_KD, device=CPU, pool=pool, threads=threads)


def test_an_iteration_is_that_of_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "PRODUCTS", 1)
    monkeypatch.setattr(clustering, "LEAST_VALUES", 1)
    rows_ND = draw(3000, 8)
    whole = faiss.Kmeans(8, 20, niter=1, max_points_per_centroid=3000)
    whole.train(rows_ND, init_centroids=rows_ND[:20].copy())
    moved = run(stored(tmp_path, rows_ND), rows_ND[:20])
    np.testing.assert_allclose(moved.centroids_KD, whole.centroids, atol=1e-5)
    assert moved.inertia == pytest.approx(whole.obj[0], rel=1e-5)
    assert moved.counts_K.sum() == 3000


def test_both_searches_agree() -> None:
    rows_ND = draw(500, 8)
    ours, theirs = search_by_torch(CPU, rows_ND[:40])(rows_ND), search_by_faiss(rows_ND[:40])(rows_ND)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)


def test_blocks_are_of_nearly_equal_length_and_cover_all_rows() -> None:
    blocks = cut_blocks(2_097_152, 8192, 768, least=512)
    assert [blocks[0].start, blocks[-1].stop] == [0, 2_097_152]
    assert all(one.stop == other.start for one, other in itertools.pairwise(blocks))
    assert {block.stop - block.start for block in blocks} == {512}
    assert cut_blocks(7, 3, 16, least=512) == [slice(0, 7)]


def test_empty_clusters_split_the_largest() -> None:
    centroids_KD = np.array([[1, 1], [9, 9], [4, 4], [7, 7]], dtype=np.float32)
    split_largest(centroids_KD, np.array([2, 0, 9, 0]))
    up, down = 1 + 1 / 1024, 1 - 1 / 1024
    np.testing.assert_allclose(centroids_KD[1], [4 * up, 4 * down], rtol=1e-6)
    np.testing.assert_allclose(centroids_KD[3], [4 * down * up, 4 * up * down], rtol=1e-6)  # 5 of 9 were left
    np.testing.assert_allclose(centroids_KD[0], [1, 1])


def test_an_empty_cluster_comes_back(tmp_path: Path) -> None:
    rows_ND = draw(300, 4)
    moved = run(stored(tmp_path, rows_ND), np.concatenate([rows_ND[:3], np.full((1, 4), 1e3, np.float32)]))
    assert moved.counts_K[3] == 0
    assert abs(moved.centroids_KD[3]).max() < 10


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_names_features_that_are_not_finite(value: float, tmp_path: Path) -> None:
    rows_ND = draw(300, 4)
    rows_ND[77, 2] = value
    with pytest.raises(NumericError, match="rows holds NaN, infinity or values"):
        run(stored(tmp_path, rows_ND), rows_ND[:3])
