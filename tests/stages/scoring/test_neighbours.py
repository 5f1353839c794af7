"""Neighbours in blocks: the figures of torch-fidelity, exact distances, and memory of a few blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from stages.scoring import neighbours
from stages.scoring.neighbours import nearest, precision_and_recall, thumbnails

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [16, 50, 1000])
@pytest.mark.parametrize("shared", [0, 20])
def test_precision_and_recall_are_torch_fidelitys(rows: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both sets hold the same rows, whose distances lie exactly at the limit."""
    monkeypatch.setattr(neighbours, "ROWS", rows)
    rng = np.random.default_rng(3)
    ours = rng.normal(size=(130, 6)).astype(np.float32)
    theirs = rng.normal(0.5, 1.2, size=(90, 6)).astype(np.float32)
    theirs[:shared] = ours[:shared]
    wanted = prc_features_to_metric(
        *(torch.from_numpy(one).double() for one in (ours, theirs)),
        prc_neighborhood=3,
        prc_batch_size=10_000,
        save_cpu_ram=False,
        verbose=False,
    )
    found = precision_and_recall(ours, theirs, neighbours=3)
    assert found == pytest.approx((wanted["precision"], wanted["recall"]), abs=1e-6)
    assert 0 < found[0] < 1


def test_distances_of_bytes_are_exact() -> None:
    rng = np.random.default_rng(0)
    queries, block = (rng.integers(0, 256, (count, 3072), dtype=np.uint8) for count in (7, 5))
    queries[2], block[3], queries[4], block[4] = 255, 255, 0, 255
    wanted = ((queries[:, None].astype(np.int64) - block[None]) ** 2).sum(2).min(1)
    assert nearest(queries, block, device=CPU).tolist() == wanted.tolist()
    assert nearest(queries, block, device=CPU)[2] == 0


def test_thumbnails_are_means_of_areas() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    wanted = images.reshape(2, 32, 3, 32, 3, 3).mean((2, 4)).round()
    assert (thumbnails(images) == wanted.reshape(2, -1)).all()
    assert (thumbnails(images[:, :32, :32]) == images[:, :32, :32].reshape(2, -1)).all()
