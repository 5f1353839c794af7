"""Checkpoints of RAR on ImageNet: the share of a training that they take, with states of that size made of random numbers.

A state is the parameters and the two moments of AdamW, 12 bytes per parameter. XL and XXL are calculated from the seconds
per GB of L. The copy for the thread is measured, too, and its memory is not counted: it is made where twice its size is free.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.large import Measured, Row
from models.generators.config import CodeShape, RarConfig
from models.generators.rar.memory import parameters
from pipeline.draft import Draft, Request
from stages.training import checkpoints
from stages.training.checkpoints import pause_after

SHAPE = CodeShape(codes=1024, grid=(16, 16), classes=1000)
SIZES = ("b", "l")
CALCULATED = ("xl", "xxl")
SECONDS = 30.0  # between two saves, at least
PER_PARAMETER = 12
PIECE = 2**24  # numbers of one tensor


def measure(scale: float, folder: Path) -> Iterator[Row]:
    for size in SIZES:
        state = random_state(int(scale * state_bytes(size)))
        began = time.perf_counter()
        copy = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        copying = (time.perf_counter() - began) / scale
        del state
        out = Draft.open(folder / size, Request("large", "large", 1, "0" * 64, {}, {}, {}))
        with Measured() as taken:
            checkpoints.save_checkpoint(out, 1, copy)
        writing = taken.seconds / scale
        yield taken.row(in_words(size, copying, writing), f"{scale * gigabytes(size):.2g} GB", times=1 / scale)
        out.drop(out.units()[0])
    for other in CALCULATED:
        more = gigabytes(other) / gigabytes(size)
        what = f"{in_words(other, more * copying, more * writing)}, calculated"
        yield taken.row(what, f"{scale * gigabytes(size):.2g} GB", times=more / scale)


def in_words(size: str, copying: float, writing: float) -> str:
    pause = pause_after(writing, SECONDS)
    return (
        f"RAR-{size.upper()}, {gigabytes(size):.1f} GB every {pause:.0f} s: {copying / (pause + copying):.1%} of the time by "
        f"a thread, {writing / (pause + writing):.1%} without"
    )


def state_bytes(size: str) -> int:
    return PER_PARAMETER * parameters(RarConfig.model_validate({"size": size}), SHAPE)


def gigabytes(size: str) -> float:
    return state_bytes(size) / 1e9


def random_state(size: int) -> checkpoints.State:
    pieces = [min(PIECE, size // 4 - start) for start in range(0, size // 4, PIECE)]
    return {f"model.{place:04d}": torch.rand(numbers) for place, numbers in enumerate(pieces)}
