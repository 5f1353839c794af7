"""How fast a token set is read in shuffled order: against a numpy memory map, and against JSONL as RAR reads it.

    python -m benchmarks.tokens                   # 200,000 rows of 256 tokens, about a minute
    python -m benchmarks.tokens --images 2000

Every form hands out the same rows in the same order, batches of 512, from a warm page cache, on one thread. JSONL lines
stand in memory as text and are parsed when asked for, as `linecache` in RAR's reader has them. Forms take turns, and
the median of five counts.

R rows (image, crop), B rows of a batch, T tokens, I images, C crops
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import smalti
from smalti.epoch import exact_order
from smalti.tokens import Verify

CROPS, TOKENS, CODES, BATCH, CHUNK_IMAGES = 10, 256, 16_384, 512, 128
SHARDS = (13, 79)  # the second is the count of ImageNet in shards of 16,384 images
BATCHES, BATCHES_OF_JSONL = 256, 8
MEMMAP_BAR, JSONL_BAR = 0.25, 20.0
OPENING_BAR_MS, OPENING_BAR_MS_PER_SHARD = 50.0, 1.0


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description="Reading speed of token sets.")
    parser.add_argument(
        "--images", type=int, default=20_000, help="images of 10 crops; at least 79 x 128 fill 79 shards"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each form; the median counts")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        codes_ICT = np.random.default_rng(0).integers(0, CODES, (options.images, CROPS, TOKENS), dtype=np.uint16)
        sets = {shards: create(Path(folder), codes_ICT, shards) for shards in SHARDS}
        print_reading(sets, memory_map(Path(folder), codes_ICT), json_lines(codes_ICT), options.repeats)
        print_opening(sets, options.repeats)


def create(folder: Path, codes_ICT: NDArray[np.uint16], shards: int) -> smalti.TokenSet:
    """A token set in about this many shards; a chunk of few images where the set is small."""
    images = len(codes_ICT)
    chunk = min(CHUNK_IMAGES, max(1, images // shards))
    shard_images = -(-images // shards // chunk) * chunk
    labels_I = np.arange(images) % 1000
    return smalti.create_tokens(
        folder / f"{shards}-shards",
        codes_ICT,
        labels=labels_I,
        codes=CODES,
        grid=(16, 16),
        name="random codes",
        shard_images=shard_images,
        chunk_images=chunk,
    )


def count_shards(token_set: smalti.TokenSet) -> int:
    return sum(1 for _ in (token_set.path / "tokens" / "c").iterdir())


def memory_map(folder: Path, codes_ICT: NDArray[np.uint16]) -> NDArray[np.uint16]:
    np.save(folder / "codes.npy", codes_ICT.reshape(-1, TOKENS))
    mapped: NDArray[np.uint16] = np.load(folder / "codes.npy", mmap_mode="r")
    return mapped


def json_lines(codes_ICT: NDArray[np.uint16]) -> list[str]:
    """Lines as RAR's pretokenizer writes them, of as many rows as the measurement asks for."""
    rows = codes_ICT.reshape(-1, TOKENS)[: 16 * BATCH]
    return [json.dumps({"class_id": row % 1000, "tokens": codes_T.tolist()}) for row, codes_T in enumerate(rows)]


def print_reading(
    sets: dict[int, smalti.TokenSet], mapped_RT: NDArray[np.uint16], lines: list[str], repeats: int
) -> None:
    print("| shards | smalti rows/s | numpy memmap rows/s | ratio | bar | JSONL rows/s | ratio | bar |")
    print("|---|---|---|---|---|---|---|---|")
    for token_set in sets.values():
        order = exact_order(len(token_set), seed=0, epoch=0)[: BATCHES * BATCH]
        forms: dict[str, Callable[[], int]] = {
            "smalti": lambda token_set=token_set: read_epoch(token_set),
            "memmap": lambda order=order: read_memory_map(mapped_RT, order),
            "jsonl": lambda order=order: read_json_lines(lines, order),
        }
        speeds = median_speeds(forms, repeats)
        of_map, of_lines = speeds["smalti"] / speeds["memmap"], speeds["smalti"] / speeds["jsonl"]
        files = count_shards(token_set)
        print(
            f"| {files} | {speeds['smalti']:,.0f} | {speeds['memmap']:,.0f} | {of_map:.2f} | "
            f"{verdict(of_map >= MEMMAP_BAR, f'>= {MEMMAP_BAR}')} | {speeds['jsonl']:,.0f} | {of_lines:.0f} | "
            f"{verdict(of_lines >= JSONL_BAR, f'>= {JSONL_BAR:.0f}')} |"
        )


def print_opening(sets: dict[int, smalti.TokenSet], repeats: int) -> None:
    print("\n| shards | opened, index | bar | opened, crc | opened, sha256 |\n|---|---|---|---|---|")
    for token_set in sets.values():
        milliseconds = {level: opening_ms(token_set.path, level, repeats) for level in ("index", "crc", "sha256")}
        files = count_shards(token_set)
        bar = OPENING_BAR_MS + OPENING_BAR_MS_PER_SHARD * files
        holds = verdict(milliseconds["index"] < bar, f"< {bar:.0f} ms")
        index, crc, sha256 = (f"{value:.1f} ms" for value in milliseconds.values())
        print(f"| {files} | {index} | {holds} | {crc} | {sha256} |")


def read_epoch(token_set: smalti.TokenSet) -> int:
    """With the exact order and the labels, as a trainer reads."""
    epoch = token_set.epoch(BATCH, seed=0, epoch=0)
    batches = min(BATCHES, len(epoch))
    return sum(len(codes_BT) for _, (_, codes_BT, _) in zip(range(batches), epoch, strict=False))


def read_memory_map(mapped_RT: NDArray[np.uint16], order: NDArray[np.int64]) -> int:
    whole = len(order) // BATCH * BATCH
    return sum(len(mapped_RT[order[low : low + BATCH]]) for low in range(0, whole, BATCH))


def read_json_lines(lines: list[str], order: NDArray[np.int64]) -> int:
    rows = order[: BATCHES_OF_JSONL * BATCH] % len(lines)
    return sum(len(parse_batch(lines, rows[low : low + BATCH])) for low in range(0, len(rows), BATCH))


def parse_batch(lines: list[str], rows_B: NDArray[np.int64]) -> NDArray[np.int64]:
    parsed: list[dict[str, Any]] = [json.loads(lines[row]) for row in rows_B.tolist()]
    return np.array([record["tokens"] for record in parsed])


def median_speeds(forms: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Rows per second of each form; one run of each warms up and is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, read in forms.items():
            started = time.perf_counter()
            rows = read()
            speeds[name].append(rows / (time.perf_counter() - started))
    return {name: statistics.median(found[1:]) for name, found in speeds.items()}


def opening_ms(path: Path, level: Verify, repeats: int) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        smalti.open_tokens(path, verify=level)
        found.append(1000 * (time.perf_counter() - started))
    return statistics.median(found)


def verdict(holds: bool, bar: str) -> str:
    return f"{bar}: {'holds' if holds else 'MISSED'}"


if __name__ == "__main__":
    main(sys.argv[1:])
