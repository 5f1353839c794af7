"""How fast DiGIT's generators sample: stage 1 against RAR and against no cache, and both kinds of pixel decoders.

    python -m benchmarks.digit                    # one thread, float32, random weights: about ten minutes
    python -m benchmarks.digit --repeats 1 --batches 1 4

RAR has the same width, depth, heads and hidden width, and no guidance. Without cache, every step reads the whole sequence anew.
Seconds are those that the one thread was running.

B rows, S codes of the condition, T tokens, N codes so far, K codes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.generators.config import CodeShape, GptConfig, RarConfig
from models.generators.generator import Generator, build_decoder, build_generator, loop_of
from models.sampling.choice import choose
from models.sampling.config import SamplingConfig
from models.sampling.philox import uniforms

NUMBERS = {"width": 512, "layers": 6, "heads": 8, "mlp_width": 2048}
SEMANTIC = CodeShape(codes=8192, grid=(16, 16), classes=1000)
PIXELS = CodeShape(codes=1024, grid=(16, 16), condition=CodeShape(codes=8192, grid=(16, 16)))
UNCACHED = 4  # largest batch that is sampled without cache: it takes minutes
TOP_K = SamplingConfig(top_k=(300,))
TOP_P = SamplingConfig(top_p=(0.8,))


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description="Sampling speed of DiGIT's generators on one thread.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 32])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, random weights, median of {options.repeats}; {NUMBERS}.")
    compare_stage_1(options.batches, options.repeats)
    compare_pixel_decoders(options.batches, options.repeats)


def compare_stage_1(batches: Sequence[int], repeats: int) -> None:
    gpt = build(GptConfig(**NUMBERS, norm="post", condition="class"), SEMANTIC)
    rar = build(RarConfig(**NUMBERS), SEMANTIC)
    print("\nStage 1, 256 codes of 8,192:\n\n| batch | gpt s | rar s | rar / gpt | uncached s | uncached / gpt |")
    print("|---|---|---|---|---|---|")
    for batch in batches:
        labels_B = torch.arange(batch) % SEMANTIC.classes
        seconds = medians(
            {
                "gpt": lambda labels_B=labels_B: sample_pass(gpt, labels_B, TOP_K),
                "rar": lambda labels_B=labels_B: sample_pass(rar, labels_B, TOP_K),
            },
            repeats,
        )
        ours, others = seconds["gpt"], seconds["rar"]
        row = [f"{ours:.2f}", f"{others:.2f}", f"{others / ours:.2f}"]
        if batch <= UNCACHED:
            uncached = medians({"": lambda labels_B=labels_B: sample_uncached(gpt, labels_B, TOP_K)}, 1)[""]
            row += [f"{uncached:.2f}", f"{uncached / ours:.1f}"]
        print(f"| {' | '.join([str(batch), *row, '', ''][:6])} |", flush=True)


def compare_pixel_decoders(batches: Sequence[int], repeats: int) -> None:
    steps = build(GptConfig(**NUMBERS, norm="pre", condition="codes"), PIXELS)
    masks = build(GptConfig(**NUMBERS, norm="pre", condition="codes", sampling="masks"), PIXELS)
    print(
        "\nPixel decoders, 256 codes of 1,024 after 256 of 8,192:\n\n| batch | steps s | masks (8) s | masks / steps |"
    )
    print("|---|---|---|---|")
    for batch in batches:
        codes_BS = torch.randint(8192, (batch, 256), generator=torch.Generator().manual_seed(batch))
        seconds = medians(
            {
                "steps": lambda codes_BS=codes_BS: sample_pass(steps, codes_BS, TOP_P),
                "masks": lambda codes_BS=codes_BS: sample_pass(masks, codes_BS, SamplingConfig()),
            },
            repeats,
        )
        one, other = seconds["steps"], seconds["masks"]
        print(f"| {batch} | {one:.2f} | {other:.2f} | {other / one:.2f} |", flush=True)


def build(config: GptConfig | RarConfig, shape: CodeShape) -> Generator:
    torch.manual_seed(0)
    return build_generator(config, shape).eval()


def sample_pass(model: Generator, condition: Tensor, settings: SamplingConfig) -> Tensor:
    """The decoder's set-up is part of the time."""
    decoder = build_decoder(model, rows=len(condition), guided=False)
    codes_BT: Tensor = loop_of(model.config)(decoder, condition, torch.arange(len(condition)), config=settings, seed=0)
    return codes_BT


@torch.inference_mode()
def sample_uncached(model: Generator, labels_B: Tensor, settings: SamplingConfig) -> Tensor:
    """The same draws around the training forward pass."""
    shape = model.shape
    uniforms_BT = uniforms(0, torch.arange(len(labels_B)), steps=shape.tokens)
    codes_BN = torch.empty(len(labels_B), 0, dtype=torch.int64)
    for step in range(shape.tokens):
        logits_BV = model(codes_BN, labels_B)[:, -1]
        codes_B = choose(logits_BV, uniforms_BT[:, step], settings.filters(0), codes=shape.codes)
        codes_BN = torch.cat([codes_BN, codes_B[:, None]], dim=1)
    return codes_BN


def medians(works: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of each, taken in turns; the first run of each, if there are several, is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + (repeats > 1)):
        for name, work in works.items():
            start = time.thread_time()
            work()
            found[name].append(time.thread_time() - start)
    return {name: statistics.median(seconds[repeats > 1 :]) for name, seconds in found.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
