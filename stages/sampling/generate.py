"""Samples as images at once: a pass is decoded while the next one is sampled.

The images are those of `decode` on the codes of `sample`, to the byte; the codes are stored with them. Sampling is bound by
memory bandwidth and decoding by arithmetic, so a device takes less time for both at once than one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.draft import Draft
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from pipeline.stage_cache import cached
from smalti.counting import counted
from stages.codes.classes import names_of_generator
from stages.codes.token_files import TokenLayout
from stages.devices import pick_device, products, threads
from stages.images.image_files import ImageLayout, Images_BHW3
from stages.images.pictures import grid_png
from stages.sampling.config import GenerateConfig
from stages.sampling.decoding import captions, decode_pass, grid_texts, plan_layout, size_facts, write_beside
from stages.sampling.pass_rows import propose_rows_beside_decoding
from stages.sampling.sample import (
    CONDITION,
    LABELS,
    TOKENIZER,
    Asked,
    choose,
    foresee,
    known_card,
    plan_codes,
    sampled_passes,
)
from stages.weights.cards import TokenizerCard
from stages.weights.networks import NetworkFile, load_tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class GenerateSpec:
    """The arguments of a shard."""

    generator: NetworkFile
    tokenizer: NetworkFile
    config: GenerateConfig
    codes: TokenLayout
    images: ImageLayout
    asked: Asked


@stage(
    "generate",
    version=4,
    config=GenerateConfig,
    reads={
        "generator": read("generator", help="the generator to sample from"),
        TOKENIZER: read("tokenizer", "codebook", help="the tokenizer of its codes"),
        LABELS: read("token-set", help="whose class proportions to follow (labels: like)", optional=True),
        CONDITION: read(
            "token-set",
            help="codes of another space: sample i is drawn for image i, and has its label",
            optional=True,
        ),
    },
    writes="images",
    example="smalti generate --generator digits/rar/generator --tokenizer digits/rar/tokenizer --images 100",
    foresees=foresee,
    proposes={"rows_per_pass": propose_rows_beside_decoding},
    names={"classes": names_of_generator},
)
def generate_images(config: GenerateConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Sample and decode at the same time.

    Writes uint8 images, their labels and codes as zarr arrays, and grid.png. The images are those of `sample` and then
    `decode`, to the byte, in less time: a pass is decoded while the next one is sampled. (On CUDA, `precision` is that of
    both; bfloat16 decodes as tf32 does.)
    """
    card = known_card(config, inputs)
    asked = choose(config, card, inputs)
    codes = plan_codes(config, card, asked, out.request.key)
    tokenizer = TokenizerCard.of(inputs[TOKENIZER]).decoder
    images = plan_layout(config, codes.attributes, tokenizer, origin=inputs["generator"], role="generator")
    generator, decoder = NetworkFile.of(inputs["generator"], run.device), NetworkFile.of(inputs[TOKENIZER], run.device)
    spec = GenerateSpec(generator, decoder, config, codes, images, asked)
    map_shards(out, run, generate_shard, spec, images.sizes, label="generate")
    others = {"tokens": codes.specs["tokens"]}
    write_beside(config, out, images, asked.labels_I, partial(draw_grid, spec, out.request.key), others=others)
    out.facts = {
        "images": config.images,
        **size_facts(images),
        "classes": asked.classes,
        "tokenizer": card.space.tokenizer,
    }
    out.figure = f"{counted(config.images, 'sample')} of {counted(len(np.unique(asked.labels_I)), 'class')}, {images.width}x{images.height}"


def generate_shard(spec: GenerateSpec, number: int) -> dict[str, bytes]:
    """The files of one shard: its images, and its codes."""
    shard = spec.images.spec.shard_range(number)
    with threads(1), products(spec.config.precision):
        passes = sampled_passes(spec.generator, spec.config, spec.asked, *shard)
        codes_IT, images_IHW3 = decode_meanwhile(spec, passes)
    return {**spec.images.shard(number, images_IHW3), **spec.codes.shard(number, codes_IT[:, None])}


def decode_meanwhile(spec: GenerateSpec, passes: Iterator[NDArray[np.int64]]) -> tuple[NDArray[np.int64], Images_BHW3]:
    """All codes of the passes, and their images, which a second thread decodes as soon as one of its passes is full."""
    rows, grid = spec.config.rows_per_decoding, spec.codes.attributes.grid
    waiting_IT = np.empty((0, spec.codes.attributes.tokens), np.int64)
    codes: list[NDArray[np.int64]] = []
    coming: list[Future[Images_BHW3]] = []
    thread = decoding_thread(spec.tokenizer, grid, rows)

    def decode(some_IT: NDArray[np.int64]) -> None:
        coming.append(thread.submit(decode_pass, spec.tokenizer, some_IT.reshape(-1, *grid), rows=rows))

    try:
        for drawn_IT in passes:
            codes.append(drawn_IT)
            waiting_IT = np.concatenate([waiting_IT, drawn_IT])
            while len(waiting_IT) >= rows:
                decode(waiting_IT[:rows])
                waiting_IT = waiting_IT[rows:]
        if len(waiting_IT):
            decode(waiting_IT)
        images = [future.result() for future in coming]
    except BaseException:
        for future in coming:
            future.cancel()
        raise
    return np.concatenate(codes), np.concatenate(images)


@cached(2)
def decoding_thread(tokenizer: NetworkFile, grid: tuple[int, int], rows: int) -> ThreadPoolExecutor:
    """The thread of this process that decodes such passes; on CUDA whatever it does is in a stream of its own.

    It is made once, since the device keeps the memory of every stream, and it decodes a pass now: kernels are loaded and
    workspaces taken before steps are recorded, during which nothing may wait for the whole device.
    """
    load_tokenizer(tokenizer)
    thread = ThreadPoolExecutor(1, initializer=partial(_enter_stream, pick_device(tokenizer.device)))
    thread.submit(decode_pass, tokenizer, np.zeros((1, *grid), np.int64), rows=rows).result()
    return thread


def draw_grid(spec: GenerateSpec, key: str, images_NHW3: Images_BHW3) -> bytes:
    """grid.png of the first images."""
    attributes = spec.codes.attributes
    words = captions(attributes, spec.asked.labels_I[: len(images_NHW3)])
    return grid_png(images_NHW3, words, grid_texts(spec.config, attributes, key))


def _enter_stream(device: torch.device) -> None:
    """For the rest of this thread. The weights must have arrived, since streams do not wait for each other."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
