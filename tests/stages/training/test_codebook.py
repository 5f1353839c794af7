"""Codes in use after a training: exact whatever was interrupted, by two processes as by one, in memory of one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.draft import Draft, Request
from stages.training import codebook
from stages.training.codebook import count_codes
from stages.training.replicas import Replicas
from tests.two_processes import run_two

CODES, IMAGES, ROWS, BLOCK = 50, 45, 4, 10
PIXELS = np.random.default_rng(0).integers(0, CODES, (IMAGES, 2, 2, 3), dtype=np.uint8)
WANTED = np.bincount(PIXELS.reshape(-1), minlength=CODES)


class Images:
    """Stand for training images."""

    def __len__(self) -> int:
        return IMAGES

    def upright(self, rows_R: np.ndarray) -> np.ndarray:
        return PIXELS[rows_R]


def encode(images_RCHW: Tensor) -> Tensor:
    """The bytes themselves are the codes."""
    return (images_RCHW * 255).round().long()


def count(out: Draft, encoder: Any = encode) -> np.ndarray:
    replicas, images = Replicas(device="cpu", precision="float32"), Images()
    found = count_codes(encoder, images, replicas, out, codes=CODES, rows=ROWS)  # type: ignore[arg-type]
    return found.counts_K


def draft(folder: Path) -> Draft:
    return Draft.open(folder, Request("train-tokenizer", "tokenizer", 1, "0" * 64, {}, {}, {}))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "BLOCK", BLOCK)


def test_counts_are_exact_and_continue_where_they_were(tmp_path: Path) -> None:
    left = iter(range(7))  # three passes are a block

    def stopped(images_RCHW: Tensor) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(images_RCHW)

    with pytest.raises(KeyboardInterrupt):
        count(draft(tmp_path / "draft"), stopped)
    again = draft(tmp_path / "draft")
    assert again.units() == ["usage-000000000020"]
    passes: list[Tensor] = []
    found = count(again, lambda images_RCHW: passes.append(images_RCHW) or encode(images_RCHW))
    assert found.tolist() == WANTED.tolist()
    assert len(passes) == 3 + 3 + 2  # of images 20 to 44
    assert {len(one) for one in passes} == {ROWS}


def test_two_processes_count_as_one(tmp_path: Path) -> None:
    def work(folder: Path, rank: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        seen: list[int] = []
        counts = count(draft(folder), lambda images_RCHW: seen.append(1) or encode(images_RCHW))
        return {"counts": counts.tolist(), "passes": len(seen)}

    first, second = run_two(tmp_path, work)
    assert first["counts"] == WANTED.tolist()
    assert min(first["passes"], second["passes"]) >= 5
