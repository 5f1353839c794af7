"""How near RAR comes to what a device allows: sampling to its memory, training to its matrix products.

    python -m benchmarks.device                                                    # the GPU: B, L, XL, XXL in bfloat16
    python -m benchmarks.device --device cpu --sizes middle --batches 1 4 --precision float32 --train-batch 4

The limits are measured in the same run: a copy of a large buffer and a product of large matrices. A step of sampling
has to read the weights of blocks and head and all keys and values so far, and write its own; a pass lasts at least as
long as these bytes take, or as its products take where that is longer (many rows on a CPU). Codes only, guidance on,
random weights; the first passes, which warm up and record graphs, do not count. A step of training is forward,
backward and AdamW under autocast; its products are counted once each, three times for forward and backward.

B rows, R = 2B streams, T tokens, D width, J = T + 1 positions
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.sampling import MIDDLE, SAMPLING, build
from models.generators.config import SIZES, CodeShape, RarConfig
from models.generators.generator import build_decoder
from models.generators.rar.network import Rar
from models.sampling.loop import sample

CODES, TOKENS, CLASSES = 1024, 256, 1000
SHAPE = CodeShape(codes=CODES, grid=(16, 16), classes=CLASSES)
WARM_UP = 3  # passes: as it is, recorded, replayed
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description="RAR against the limits of a device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="*", choices=[*SIZES, "middle"], default=["b", "l", "xl", "xxl"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 256], help="rows of a pass of sampling")
    parser.add_argument("--train-batch", type=int, default=64, help="images of a step of training; 0: none")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), PRECISIONS[options.precision]
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; give --device cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device.index or 0)  # events belong to the current one
        torch.backends.cuda.enable_cudnn_sdp(False)  # as the stages do
    limits = Limits(device, dtype)
    print(f"{describe_machine()} {describe_device(device)}, {options.precision}, median of {options.repeats}.\n")
    print(f"Copy of a large buffer: {limits.bandwidth / 1e9:,.0f} GB/s; product: {limits.peak / 1e12:,.2f} TFLOP/s.")
    print("\n| size | batch | s | images/s | limit, images/s | share |\n|---|---|---|---|---|---|")
    for size in options.sizes:
        for batch in options.batches:
            measure_sampling(network(size, device), size, batch, dtype, limits, options.repeats)
    if options.train_batch:
        print(
            "\n| size | batch | s per step | images/s | share of the product's peak | memory GiB |\n|---|---|---|---|---|---|"
        )
        for size in options.sizes:
            for compiles in (False, True):
                model = network(size, device)
                for block in model.blocks if compiles else ():
                    block.compile()
                try:
                    measure_training(
                        model, f"{size}{', compiled' * compiles}", options.train_batch, dtype, limits, options.repeats
                    )
                except torch.OutOfMemoryError:
                    print(f"| {size} | {options.train_batch} | too little memory | - | - | - |")


class Limits:
    """Bytes per second of a copy (read and written) and operations per second of a matrix product."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        is_large = device.type == "cuda"
        source = torch.ones(2**32 if is_large else 2**28, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * len(source) / median_seconds(lambda: target.copy_(source), device, repeats=9)
        side = 8192 if is_large else 1024
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.peak = 2 * side**3 / median_seconds(lambda: left @ right, device, repeats=9)


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"


def network(size: str, device: torch.device) -> Rar:
    config = RarConfig(**SIZES[size]) if size in SIZES else MIDDLE
    with device:
        return build(config, SHAPE)


def measure_sampling(model: Rar, size: str, batch: int, dtype: torch.dtype, limits: Limits, repeats: int) -> None:
    decoder = build_decoder(model, rows=batch, guided=True, dtype=dtype)
    labels_B = torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(0))
    ids_B = torch.arange(batch)

    def draw() -> Tensor:
        return sample(decoder, labels_B, ids_B, config=SAMPLING, seed=0)

    for _ in range(WARM_UP - 1):
        draw()
    seconds = median_seconds(draw, model.lm_head.weight.device, repeats=repeats)
    least = least_seconds(model, batch, len(labels_B.unique()) + 1, dtype, limits)
    print(
        f"| {size} | {batch} | {seconds:.4f} | {batch / seconds:.1f} | {batch / least:.1f} | {least / seconds:.0%} |",
        flush=True,
    )


def least_seconds(model: Rar, batch: int, distinct: int, dtype: torch.dtype, limits: Limits) -> float:
    """What bytes and products of a pass take at least; modulations are products alone, of each distinct class once."""
    streams, positions, layers, width = 2 * batch, TOKENS + 1, model.config.layers, model.config.width
    weights, head = block_weights(model), CODES * width
    seen = positions * (positions + 1) / 2
    cache = 2 * layers * streams * width
    numbers = positions * (weights + cache) + cache * seen
    moved = dtype.itemsize * numbers + 4 * positions * head  # the head is always float32
    modulations = distinct * positions * modulation_weights(model)
    products = 2 * (positions * streams * (weights + head) + modulations + cache * seen)
    return max(moved / limits.bandwidth, products / limits.peak)


def measure_training(model: Rar, size: str, batch: int, dtype: torch.dtype, limits: Limits, repeats: int) -> None:
    device = model.lm_head.weight.device
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=device.type == "cuda")
    codes_BT = torch.randint(CODES, (batch, TOKENS), device=device)
    labels_B = torch.randint(CLASSES, (batch,), device=device)
    orders_BT = torch.rand(batch, TOKENS, device=device).argsort(-1)
    dropped_B = torch.zeros(batch, dtype=torch.bool, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = model.loss(codes_BT, labels_B, orders=orders_BT, dropped=dropped_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(step, device, repeats=repeats)
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}" if device.type == "cuda" else "-"
    share = training_products(model, batch) / seconds / limits.peak
    print(f"| {size} | {batch} | {seconds:.4f} | {batch / seconds:.1f} | {share:.0%} | {memory} |", flush=True)


def training_products(model: Rar, batch: int) -> float:
    """Operations of the matrix products of one step, attention counted below the diagonal only."""
    positions, distinct = TOKENS + 1, min(batch, CLASSES + 1)
    linears = batch * positions * (block_weights(model) + CODES * model.config.width)
    modulations = distinct * positions * modulation_weights(model)
    attention = batch * model.config.layers * positions**2 * model.config.width
    return 3 * 2 * (linears + modulations + attention)


def block_weights(model: Rar) -> int:
    """Numbers in the linear layers of all blocks, without the modulations'."""
    config = model.config
    return config.layers * (4 * config.width**2 + 2 * config.width * config.mlp_width)


def modulation_weights(model: Rar) -> int:
    return (6 * model.config.layers + 2) * model.config.width**2


def median_seconds(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """By events around the whole work on a GPU, by the clock elsewhere; one run before does not count."""
    work()
    return statistics.median(_seconds(work, device) for _ in range(repeats))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


if __name__ == "__main__":
    main(sys.argv[1:])
