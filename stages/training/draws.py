"""Random numbers of a training as functions of (seed, name, step): data order, views, orders, dropped labels.

Each draw is made for the whole global batch, of which a process takes its share. So draws do not depend on the number of
processes or on interruptions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from smalti.counting import counted
from smalti.epoch import batches_of, exact_order

# B rows of a global batch, N rows of the data

Rows_B = NDArray[np.int64]


def stream(seed: int, name: str, step: int) -> np.random.Generator:
    """The random numbers of one name in one step: Philox keyed by SHA-256 of the three."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, name, step)[:16], "little")))


def torch_seed(seed: int, name: str, step: int, number: int = 0) -> int:
    """Seed of torch's default generator before a pass, in [0, 2**63). number: of the pass among those of the step."""
    return int.from_bytes(_digest(seed, f"{name}/{number}", step)[:8], "little") >> 1


def rows_of_steps(first: int, *, rows: int, batch: int, seed: int) -> Iterator[Rows_B]:
    """Which of `rows` data rows make up the global batch of each step from `first` on: epochs of whole batches, each a new permutation.

    It is the order of `TokenSet.epoch(batch, seed=seed, epoch=...)`, epoch after epoch.
    """
    if batch > rows:
        raise UsageError(
            f"training.batch is {batch}, but there are only {counted(rows, 'row')} to train on",
            hint="lower training.batch",
        )
    each = rows // batch * batch
    for epoch in count(first * batch // each):
        start = max(0, first * batch - epoch * each)
        yield from batches_of(exact_order(rows, seed=seed, epoch=epoch), batch, start=start, stop=each)


def share_of(batch: int, *, rank: int, world: int) -> slice:
    """The part of a global batch that process `rank` of `world` computes."""
    if batch % world:
        raise UsageError(
            f"training.batch {batch} does not divide into equal shares of {world} processes",
            hint="choose a batch that is a multiple of the number of processes",
        )
    return slice(batch // world * rank, batch // world * (rank + 1))


def passes_of(share: int, rows_per_pass: int | None) -> int:
    """The number of equal passes, of at most `rows_per_pass` rows each, in which a process computes its share."""
    fewest = 1 if rows_per_pass is None else -(-share // rows_per_pass)
    return next(passes for passes in range(fewest, share + 1) if share % passes == 0)


def _digest(seed: int, name: str, step: int) -> bytes:
    return hashlib.sha256(f"{seed} {name} {step}".encode()).digest()
