"""Checkpoints of RAR on ImageNet: what they take of a training, measured with states of that size made of random numbers.

A state is the parameters and the two moments of AdamW, 12 bytes per parameter. Larger networks are calculated from the
seconds per GB of the largest that was measured.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from models.generators.config import SIZES, RarConfig
from models.generators.rar_memory import parameters
from pipeline.draft import Draft, Request
from stages.training import checkpoints
from stages.training.saver import REST, pause_after

MEASURED = ("b", "l")
SECONDS = 30.0
PER_PARAMETER = 12
PIECE = 2**24  # numbers of one tensor


def main() -> None:
    print("| RAR | GB | copy (s) | write and hash (s) | next save after (s) | share, in a thread | share, without |")
    print("|---|---|---|---|---|---|---|")
    per_gb = (0.0, 0.0)
    for size in SIZES:
        count = parameters(RarConfig.model_validate({"size": size}), codes=1024, tokens=256, classes=1000)
        gigabytes = PER_PARAMETER * count / 1e9
        if size in MEASURED:
            copying, writing = measure(PER_PARAMETER * count)
            per_gb = (copying / gigabytes, writing / gigabytes)
        elif per_gb[1]:
            copying, writing = per_gb[0] * gigabytes, per_gb[1] * gigabytes
        else:
            continue
        pause = pause_after(writing, SECONDS)
        shares = f"{copying / (pause + copying):.2%} | {writing / (pause + writing):.1%}"
        how = "" if size in MEASURED else " (calculated)"
        print(
            f"| {size.upper()}{how} | {gigabytes:.1f} | {copying:.1f} | {writing:.1f} | {pause:.0f} | {shares} |",
            flush=True,
        )
    print(
        f"\nThe pause is at least {REST:.0f} times the save, so a save that stops the training takes at most {1 / (REST + 1):.1%}."
    )


def measure(size: int) -> tuple[float, float]:
    """Seconds to copy a state of so many bytes, and to write, hash and fsync it."""
    pieces = [min(PIECE, size // 4 - start) for start in range(0, size // 4, PIECE)]
    state = {f"model.{place:04d}": torch.rand(numbers) for place, numbers in enumerate(pieces)}
    began = time.monotonic()
    copy = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    copied = time.monotonic()
    del state
    with TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        out = Draft.open(Path(folder) / "draft", Request("large", "large", 1, "0" * 64, {}, {}, {}))
        writing = time.monotonic()
        checkpoints.save_checkpoint(out, 1, copy)
        return copied - began, time.monotonic() - writing


if __name__ == "__main__":
    main()
