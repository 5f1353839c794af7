"""One iteration of K-Means over any number of rows: in memory, or read again block by block.

One thread computes the codes and sums of a block, from its rows alone; the sums of blocks are added in their order. So the
result depends neither on the number of threads nor on where the rows are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import NumericError
from smalti.arrays import MappedArray

if TYPE_CHECKING:
    import torch

# N rows that are clustered, n rows of a block, K clusters, P clusters of a block, D values of a row
PRODUCTS = 2**28  # of a block: milliseconds of work, so that threads end together
LEAST_ROWS, LEAST_ROWS_CUDA = 512, 2**14  # of a block: fewer make matrix products slow
LEAST_VALUES = 2**17  # of a block: with fewer, faiss takes a way that is three to ten times slower
MOST_VALUES = 2**21  # of a block, about: 8 MiB
PIECE_VALUES = 2**20  # that are copied out of mapped files before their pages are given back
PERTURBATION = 1 / 1024  # of the halves of a split cluster, as in faiss

Item = TypeVar("Item")
Result = TypeVar("Result")
Search = Callable[[NDArray[np.float32]], tuple[NDArray[np.int64], float]]
"""Rows (n, D) to the nearest centroid of each, and the sum of squared distances to them."""


class Rows:
    """Rows (N, D) in float32: some features of a mapped array, in memory after `hold`.

    chosen: their numbers in the list of all features, ascending; None: all.
    """

    def __init__(self, array: MappedArray, chosen: NDArray[np.int64] | None, *, name: str):
        self.name = name
        self._array, self._chosen = array, chosen
        self._held: NDArray[np.float32] | None = None
        self._axes = len(array.shape) - 1
        self.dims = int(array.shape[-1])
        self.count = int(np.prod(array.shape[:-1])) if chosen is None else len(chosen)

    def hold(self) -> None:
        """Copy all rows into memory."""
        self._held = self.read(0, self.count)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop (excluded)."""
        if self._held is not None:
            return self._held[start:stop]
        return self.take(np.arange(start, stop))

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of these numbers, in their order; mapped pages of the files are released piece by piece."""
        if self._held is not None:
            return self._held[numbers]
        rows_nD = np.empty((len(numbers), self.dims), dtype=np.float32)
        piece = max(1, PIECE_VALUES // self.dims // 16)  # chosen rows are apart from each other
        for start in range(0, len(numbers), piece):
            part = numbers[start : start + piece]
            rows_nD[start : start + piece] = self._array.rows(
                part if self._chosen is None else self._chosen[part], axes=self._axes
            )
            self._array.release()
        return rows_nD


class Moved(NamedTuple):
    """New centroids (K, D), and of the assignment that they come from the cluster sizes (K,) and the inertia."""

    centroids_KD: NDArray[np.float32]
    counts_K: NDArray[np.int64]
    inertia: float


class Sums(NamedTuple):
    """Of a block: the clusters that occur, their counts and the sums of their rows, and the inertia."""

    clusters_P: NDArray[np.int64]
    counts_P: NDArray[np.int64]
    sums_PD: NDArray[np.float32]
    inertia: float


def move(
    rows: Rows, centroids_KD: NDArray[np.float32], *, device: torch.device, pool: ThreadPoolExecutor, threads: int
) -> Moved:
    """One iteration: every row to its nearest centroid, every centroid to the mean of its rows; empty clusters split the
    largest. NumericError where distances are not finite.
    """
    search = search_on(device, centroids_KD)
    least = LEAST_ROWS_CUDA if device.type == "cuda" else LEAST_ROWS
    sums_KD, counts_K = np.zeros(centroids_KD.shape), np.zeros(len(centroids_KD), dtype=np.int64)
    inertia = 0.0
    blocks = cut_blocks(rows.count, *centroids_KD.shape, least=least)
    for found in in_order(pool, partial(sum_block, rows, search), blocks, ahead=2 * threads):
        sums_KD[found.clusters_P] += found.sums_PD
        counts_K[found.clusters_P] += found.counts_P
        inertia += found.inertia
    sums_KD /= np.maximum(counts_K, 1)[:, None]
    moved_KD = centroids_KD.copy()
    np.copyto(moved_KD, sums_KD, where=counts_K[:, None] > 0, casting="same_kind")
    split_largest(moved_KD, counts_K.copy())
    return Moved(moved_KD, counts_K, inertia)


def sum_block(rows: Rows, search: Search, block: slice) -> Sums:
    from scipy.sparse import csc_array

    rows_nD = rows.read(block.start, block.stop)
    codes_n, inertia = search(rows_nD)
    if not np.isfinite(inertia) or codes_n.min() < 0:
        raise NumericError(f"{rows.name} holds NaN, infinity or values whose squares are beyond float32")
    counts_K = np.bincount(codes_n)
    clusters_P = np.flatnonzero(counts_K)
    place_K = np.cumsum(counts_K > 0) - 1
    ones_n = np.ones(len(rows_nD), dtype=np.float32)
    members_Pn = csc_array(
        (ones_n, place_K[codes_n], np.arange(len(rows_nD) + 1)), shape=(len(clusters_P), len(rows_nD))
    )
    return Sums(
        clusters_P, counts_K[clusters_P], members_Pn @ rows_nD, inertia
    )  # a compiled loop over rows in their order


def split_largest(centroids_KD: NDArray[np.float32], counts_K: NDArray[np.int64]) -> None:
    """Each empty cluster, in place, takes half of the one that is then the largest: two centroids close to the old one."""
    signs_D = np.where(np.arange(centroids_KD.shape[1]) % 2, -1, 1).astype(np.float32) * np.float32(PERTURBATION)
    for empty in np.flatnonzero(counts_K == 0):
        largest = int(counts_K.argmax())
        centroids_KD[empty] = centroids_KD[largest] * (1 + signs_D)
        centroids_KD[largest] *= 1 - signs_D
        counts_K[empty] = counts_K[largest] // 2
        counts_K[largest] -= counts_K[empty]


def search_on(device: torch.device, centroids_KD: NDArray[np.float32]) -> Search:
    """faiss on the CPU, torch on CUDA; neither has a rows x codes matrix in memory."""
    return search_by_torch(device, centroids_KD) if device.type == "cuda" else search_by_faiss(centroids_KD)


def search_by_faiss(centroids_KD: NDArray[np.float32]) -> Search:
    import faiss

    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(centroids_KD)

    def search(rows_nD: NDArray[np.float32]) -> tuple[NDArray[np.int64], float]:
        distances_n1, codes_n1 = index.search(rows_nD, 1)
        return codes_n1[:, 0], float(distances_n1.sum(dtype=np.float64))

    return search


def search_by_torch(device: torch.device, centroids_KD: NDArray[np.float32]) -> Search:
    import torch

    from models.quantizers.vector import nearest

    known_KD = torch.from_numpy(centroids_KD).to(device)

    def search(rows_nD: NDArray[np.float32]) -> tuple[NDArray[np.int64], float]:
        sent_nD = torch.from_numpy(rows_nD).to(device)
        codes_n = nearest(sent_nD, known_KD)
        inertia = (sent_nD - known_KD[codes_n]).square().sum(1).double().sum()
        return codes_n.cpu().numpy(), float(inertia)

    return search


def cut_blocks(rows: int, clusters: int, dims: int, *, least: int) -> list[slice]:
    """Blocks of nearly equal length: a function of these sizes alone, because sums depend on it."""
    wanted = min(max(least, PRODUCTS // (clusters * dims)), MOST_VALUES // dims)
    blocks = max(1, rows // max(wanted, -(-LEAST_VALUES // dims)))
    return [slice(rows * block // blocks, rows * (block + 1) // blocks) for block in range(blocks)]


@contextmanager
def search_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which faiss uses one."""
    import faiss

    with ThreadPoolExecutor(threads, initializer=partial(faiss.omp_set_num_threads, 1)) as pool:
        yield pool


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """Results in the order of the items; at most `ahead` are computed before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
