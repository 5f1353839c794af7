"""Which codes a trained tokenizer uses: counted by all processes together, in blocks that an interrupted count keeps.

The counts lie in the draft's scratch folder, as exact numbers: neither the number of processes nor an interruption changes
them.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.draft import SCRATCH, Draft
from stages.codes.code_usage import CodeUsage
from stages.images.passes import to_images
from stages.training.images import TrainingImages
from stages.training.replicas import Replicas

BLOCK = 8192  # images between two notes of the counts
PREFIX = "usage-"


def count_codes(
    encode: Callable[[Tensor], Tensor],
    images: TrainingImages,
    replicas: Replicas,
    out: Draft,
    *,
    codes: int,
    rows: int,
) -> CodeUsage:
    """Codes of the upright views of all images, complete in the first process; every process has to call it.

    encode: images in [0,1] (rows, 3, S, S) to their codes (rows, ...), each in [0, codes).
    """
    usage, done = CodeUsage(codes), 0
    if replicas.rank == 0:
        done = _take_up(usage, out)
    done = int(replicas.from_first(str(done)))
    for start in range(done, len(images), BLOCK):
        stop, own = min(start + BLOCK, len(images)), CodeUsage(codes)
        for first in range(start + replicas.rank * rows, stop, replicas.world * rows):
            numbers_R = np.minimum(np.arange(first, first + rows), len(images) - 1)  # always so many rows
            with torch.no_grad():
                codes_Rhw = encode(to_images(images.upright(numbers_R), replicas.device))
            own.add(codes_Rhw[: stop - first].cpu().numpy())
        usage.counts_K += replicas.total(torch.from_numpy(own.counts_K)).numpy()
        if replicas.rank == 0 and stop < len(images):
            _note(usage, stop, out)
    return usage


def _take_up(usage: CodeUsage, out: Draft) -> int:
    """Continue the counts of an interrupted run; returns how many images they are of."""
    units = [unit for unit in out.units() if unit.startswith(PREFIX)]
    if not units:
        return 0
    usage.counts_K += np.load(out.files(units[-1])[0], allow_pickle=False)
    return int(units[-1].removeprefix(PREFIX))


def _note(usage: CodeUsage, done: int, out: Draft) -> None:
    before, unit, buffer = (
        [unit for unit in out.units() if unit.startswith(PREFIX)],
        f"{PREFIX}{done:012d}",
        io.BytesIO(),
    )
    np.save(buffer, usage.counts_K, allow_pickle=False)
    out.put(unit, {f"{SCRATCH}/{unit}.npy": buffer.getvalue()})
    for old in before:
        out.drop(old)
