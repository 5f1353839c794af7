"""Nearest neighbours among many rows, a block of distances at a time: memory does not grow with the number of rows.

N rows of ours, M of the reference, E features, R rows of a block, Q queries, P values of a thumbnail
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations_with_replacement, islice, product
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stages.scoring.features import SIDE

ROWS = 2048  # of a block
EXACT = 1024  # products of bytes whose sum float32 holds exactly: 2^10 x 2^7 x 2^7 = 2^24
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

Found = TypeVar("Found")
Features = NDArray[np.float32]
Block = slice


def precision_and_recall(ours_NE: Features, theirs_ME: Features, *, neighbours: int) -> tuple[float, float]:
    """Share of our rows within the reference, and of its rows within ours (Kynkaanniemi et al. 2019).

    A row is within a set if it is no farther from some row of it than that row's k-th neighbour in its own set.
    """
    reach_N, reach_M = (_reach(features, neighbours) for features in (ours_NE, theirs_ME))
    is_within_N, is_within_M = np.zeros(len(ours_NE), bool), np.zeros(len(theirs_ME), bool)

    def compare(place: tuple[Block, Block]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        rows, columns = place
        squares_RR = _squares(ours_NE[rows], theirs_ME[columns])
        return (
            (squares_RR <= reach_M[columns]).any(1).numpy(),
            (squares_RR <= reach_N[rows][:, None]).any(0).numpy(),
        )

    for (rows, columns), (found_rows, found_columns) in _each(compare, product(_blocks(ours_NE), _blocks(theirs_ME))):
        is_within_N[rows] |= found_rows
        is_within_M[columns] |= found_columns
    return float(is_within_N.mean()), float(is_within_M.mean())


def thumbnails(images_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images as rows of bytes (B, P): of more than `SIDE` pixels a side the rounded means of `SIDE` x `SIDE` areas."""
    if images_BHW3.shape[1] <= SIDE:
        return images_BHW3.reshape(len(images_BHW3), -1)
    images_B3HW = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float()
    small_B3hw = F.adaptive_avg_pool2d(images_B3HW, SIDE).round_().to(torch.uint8)
    return small_B3hw.permute(0, 2, 3, 1).reshape(len(images_BHW3), -1).numpy()


def nearest(queries_QP: NDArray[np.uint8], block_RP: NDArray[np.uint8], *, device: torch.device) -> NDArray[np.int32]:
    """The squared Euclidean distance of each query to the nearest row of a block (Q,), exact on every device.

    All sums are of integers that float32 holds, so neither their order nor TF32 changes them.
    """
    rows_RP = _centred(block_RP, device)
    found = []
    for start in range(0, len(queries_QP), ROWS):
        some_QP = _centred(queries_QP[start : start + ROWS], device)
        products_QR = torch.zeros(len(some_QP), len(rows_RP), dtype=torch.int32, device=device)
        for first in range(0, rows_RP.shape[1], EXACT):
            part = slice(first, first + EXACT)
            products_QR += (some_QP[:, part] @ rows_RP[:, part].T).to(torch.int32)
        squares_QR = _lengths(some_QP)[:, None] + _lengths(rows_RP) - 2 * products_QR
        found.append(squares_QR.min(1).values.cpu().numpy())
    return np.concatenate(found)


def _reach(features_NE: Features, neighbours: int) -> torch.Tensor:
    """The squared distance of each row to its k-th neighbour (N,); every pair of blocks is compared once."""
    nearest_NK = torch.full((len(features_NE), neighbours + 1), torch.inf)  # the row itself is one of them

    def compare(place: tuple[Block, Block]) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = place
        squares_RR = _squares(features_NE[rows], features_NE[columns])
        return _smallest(squares_RR, neighbours + 1), _smallest(squares_RR.T, neighbours + 1)

    for (rows, columns), (of_rows, of_columns) in _each(
        compare, combinations_with_replacement(_blocks(features_NE), 2)
    ):
        sides = [(rows, of_rows)] if rows == columns else [(rows, of_rows), (columns, of_columns)]
        for side, found in sides:
            nearest_NK[side] = _smallest(torch.cat([nearest_NK[side], found], 1), neighbours + 1)
    return nearest_NK.max(1).values


def _squares(one_RE: Features, other_RE: Features) -> torch.Tensor:
    """Squared distances (R, R), made in float64; as float32 a pair has the same one from both of its sides."""
    a_RE, b_RE = (torch.from_numpy(rows).double() for rows in (one_RE, other_RE))
    squares_RR = torch.addmm((a_RE**2).sum(1, keepdim=True) + (b_RE**2).sum(1), a_RE, b_RE.T, alpha=-2)
    return squares_RR.clamp_(min=0).float()


def _smallest(values_RR: torch.Tensor, count: int) -> torch.Tensor:
    return values_RR.topk(min(count, values_RR.shape[1]), dim=1, largest=False, sorted=False).values


def _blocks(rows: NDArray[Any]) -> list[Block]:
    return [slice(start, min(start + ROWS, len(rows))) for start in range(0, len(rows), ROWS)]


def _each(
    work: Callable[[tuple[Block, Block]], Found], places: Iterable[tuple[Block, Block]]
) -> Iterator[tuple[tuple[Block, Block], Found]]:
    """Each place and `work` of it, in order, by as many threads as there are cores."""
    waiting = iter(places)
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(islice(waiting, 4 * THREADS)):
            yield from zip(some, pool.map(work, some), strict=True)


def _centred(rows_RP: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Bytes as float32 from -128 to 127."""
    return torch.from_numpy(rows_RP).to(device).float() - 128


def _lengths(rows_RP: torch.Tensor) -> torch.Tensor:
    """Squared lengths (R,), int32."""
    return (rows_RP.to(torch.int32) ** 2).sum(1, dtype=torch.int32)
