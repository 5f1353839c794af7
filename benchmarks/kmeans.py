"""K-Means against a bare `faiss.Kmeans` at equal threads, and its peak of memory with ten times more rows than a budget.

    python -m benchmarks.kmeans                      # speed: about a minute
    python -m benchmarks.kmeans --budget-gib 1       # and memory: writes 10 GiB below the temporary folder

Both clusterings start from the same centroids and have the same rows in memory; they take turns, and the fastest of three
counts. Seconds are those of all threads of the process, beside wall-clock ones, which a busy machine disturbs.

N rows, K clusters, D values of a row
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quantizers import peak_mebibytes
from smalti.arrays import ArraySpec, MappedArray, encode_shard, metadata_bytes
from stages.codes.clustering import Rows, move, search_threads

SIZES = ((6_000, 2_048, 768), (160_000, 1_024, 64), (620_000, 128, 128), (65_536, 10_000, 16))
ITERATIONS, BAR, DIMS, CLUSTERS, SHARD_ROWS = 3, 1.15, 64, 64, 2**18


class Held(Rows):
    """Rows that are in memory from the start."""

    def __init__(self, rows_ND: NDArray[np.float32]):
        self.name, self._held = "rows", rows_ND
        self.count, self.dims = rows_ND.shape


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kmeans", description="Speed and memory of K-Means.")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="threads of both")
    parser.add_argument("--budget-gib", type=float, help="also cluster ten times as much")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # an array: one iteration in this process
    options = parser.parse_args(arguments)
    if options.one:
        rows = Rows(MappedArray(options.one), None, name="rows")
        cluster(rows, rows.read(0, CLUSTERS), threads=2, iterations=1)
        print(peak_mebibytes())
        return
    print(
        "| threads | rows x clusters x values | faiss s | ours s | ratio | ratio of wall clock | bar |\n"
        + "|---" * 7
        + "|"
    )
    for threads in options.threads:
        for size in SIZES:
            compare(*size, threads=threads)
    if options.budget_gib:
        print_memory(options.budget_gib)


def compare(rows: int, clusters: int, dims: int, *, threads: int) -> None:
    rows_ND = np.random.default_rng(0).standard_normal((rows, dims), dtype=np.float32)
    start_KD = rows_ND[:clusters].copy()
    forms: list[Callable[[], object]] = [
        lambda: bare(rows_ND, start_KD, threads),
        lambda: cluster(Held(rows_ND), start_KD, threads=threads, iterations=ITERATIONS),
    ]
    costs = np.array([[timed(form) for form in forms] for _ in range(3)]).min(0)
    (theirs, their_wall), (ours, our_wall) = costs
    verdict = "holds" if ours / theirs <= BAR else "fails"
    print(
        f"| {threads} | {rows:,} x {clusters:,} x {dims} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} | "
        f"{our_wall / their_wall:.2f} | <= {BAR}: {verdict} |",
        flush=True,
    )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the process and of the clock."""
    wall, own = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - own, time.perf_counter() - wall


def bare(rows_ND: NDArray[np.float32], start_KD: NDArray[np.float32], threads: int) -> None:
    faiss.omp_set_num_threads(threads)
    whole = faiss.Kmeans(
        *reversed(start_KD.shape), niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=len(rows_ND)
    )
    whole.train(rows_ND, init_centroids=start_KD)


def cluster(rows: Rows, centroids_KD: NDArray[np.float32], *, threads: int, iterations: int) -> None:
    with search_threads(threads) as pool:
        for _ in range(iterations):
            device = torch.device("cpu")
            centroids_KD = move(rows, centroids_KD, device=device, pool=pool, threads=threads).centroids_KD


def print_memory(budget_gib: float) -> None:
    """The peak of a process of its own that clusters ten budgets of rows, read from the disk."""
    rows = int(10 * budget_gib * 2**30) // (4 * DIMS)
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder), rows)
        command = [sys.executable, "-m", "benchmarks.kmeans", "--one", folder]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    peak = float(done.stdout) / 2**10
    verdict = "holds" if peak <= budget_gib else "fails"
    print(
        f"\n{10 * budget_gib:g} GiB of rows, budget {budget_gib:g} GiB: peak of the process {peak:.2f} GiB: {verdict}"
    )


def store(folder: Path, rows: int) -> None:
    spec = ArraySpec(shape=(rows, DIMS), dtype="float32", chunk_rows=SHARD_ROWS, shard_rows=SHARD_ROWS)
    (folder / "zarr.json").write_bytes(metadata_bytes(spec))
    values_ND = np.random.default_rng(0).standard_normal((SHARD_ROWS, DIMS), dtype=np.float32)
    for shard in range(spec.shards):
        start, stop = spec.shard_range(shard)
        name, data = encode_shard(spec, shard, values_ND[: stop - start] + np.float32(shard))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main(sys.argv[1:])
