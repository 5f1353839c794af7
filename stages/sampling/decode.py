"""Decoding: codes become images, shard by shard, with a grid to look at and the array that ADM's evaluator reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, Known, KnownInputs
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from smalti.counting import counted
from smalti.tokens import TokenSet, check_codes, check_labels, open_tokens
from stages.devices import products, threads
from stages.images.image_files import ImageLayout, Images_BHW3, open_pictures
from stages.images.pictures import grid_png, interleave
from stages.sampling.config import DecodeConfig
from stages.sampling.decoding import captions, decode_pass, grid_texts, plan_layout, size_facts, write_beside
from stages.weights.cards import TokenizerCard
from stages.weights.identity import check_same_tokenizer
from stages.weights.networks import NetworkFile

ORIGINALS = "originals"


def foresee(config: DecodeConfig, inputs: KnownInputs) -> Facts:
    """The size of the images is that of the grid times the tokenizer's downsampling."""
    tokens, tokenizer = inputs["tokens"], inputs["tokenizer"]
    if tokenizer.kind == "codebook":
        raise inputs.refusal(f"decodes with {tokenizer.name}, which makes a K-Means codebook and has no decoder")
    if tokens.facts.get("tokenizer", 0) is None:
        raise inputs.refusal(
            f"cannot decode the codes of {tokens.name}, which do not name their tokenizer",
            hint="give the step that imports the generator, or the one that samples, the input tokenizer",
        )
    facts = inputs.agree([tokens, tokenizer], "tokenizer", "codes")
    if config.crop >= tokens.get("crops", config.crop + 1):
        raise inputs.refusal(
            f"decodes crop {config.crop}, but {tokens.name} has {tokens.get('crops')} crops of each image"
        )
    pixels = _side(tokens, tokenizer, inputs)
    _check_originals(config, pixels, inputs)
    sized = {} if pixels is None else {"pixels": pixels}
    said = tokens.only("images", "classes", "class_names", "labels", "listed")
    return {**facts, **said, **sized, "decoded": tokens.origin}


def _side(tokens: Known, tokenizer: Known, inputs: KnownInputs) -> int | None:
    """Pixels from top to bottom; a refusal where the codes say another size than the tokenizer makes of them."""
    grid, downsample = tokens.get("grid"), tokenizer.get("downsample")
    said: int | None = tokens.get("pixels")
    if not grid or not downsample:
        return said
    if said not in (None, min(grid) * downsample):
        raise inputs.refusal(
            f"cannot decode {tokens.name}, whose grid of {grid[0]}x{grid[1]} codes stands for images of {said} pixels, with "
            f"{tokenizer.name}, which makes {downsample} pixels of a code"
        )
    return int(grid[0] * downsample)


def _check_originals(config: DecodeConfig, pixels: int | None, inputs: KnownInputs) -> None:
    for originals in inputs.all(ORIGINALS):
        if "listed" in inputs["tokens"].facts and inputs["tokens"].facts["listed"] is None:
            raise inputs.refusal(
                f"shows {originals.name} as originals, but the codes of {inputs['tokens'].name} are samples"
            )
        inputs.agree([inputs["tokens"], originals], "listed", "images")
        seen = config.views.size if config.views else None
        size = originals.get("pixels") if originals.kind == "images" else seen
        if pixels is not None and size not in (None, pixels):
            raise inputs.refusal(
                f"shows originals of {size} pixels ({originals.name}) beside images of {pixels} pixels"
            )


@dataclass(frozen=True)
class DecodeSpec:
    """The arguments of a shard."""

    tokenizer: NetworkFile
    tokens: Path
    config: DecodeConfig
    layout: ImageLayout


@stage(
    "decode",
    version=2,
    config=DecodeConfig,
    reads={
        "tokens": read("token-set", help="the codes"),
        "tokenizer": read(
            "tokenizer", "codebook", help="the tokenizer that made the codes, or that they are meant for"
        ),
        ORIGINALS: read(
            "image-set", "images", help="what the codes were made of, shown above them in the grid", optional=True
        ),
    },
    writes="images",
    example="smalti decode --tokens digits/rar/samples --tokenizer digits/rar/tokenizer",
    foresees=foresee,
)
def decode_tokens(config: DecodeConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn codes into images.

    Writes uint8 images and their labels as zarr arrays, and grid.png with ten images a row and the class of each.
    With originals, each row of them stands above its reconstructions. Every shard is a unit of its own.
    """
    artifact = inputs["tokens"]
    tokens = open_tokens(artifact.path)
    tokenizer = check_inputs(config, tokens, inputs)
    layout = plan_layout(config, tokens.attributes, tokenizer.decoder, origin=artifact, role="tokens")
    spec = DecodeSpec(NetworkFile.of(inputs["tokenizer"], run.device), artifact.path, config, layout)
    map_shards(out, run, decode_shard, spec, layout.sizes, label="decode")
    originals = next(iter(inputs.all(ORIGINALS)), None)
    write_beside(
        config,
        out,
        layout,
        tokens.labels,
        lambda images_NHW3: draw_grid(config, out, tokens, originals, images_NHW3),
        others={},
    )
    out.facts = {
        "images": tokens.n_images,
        **size_facts(layout),
        "classes": tokens.attributes.classes,
        "tokenizer": tokenizer.identity,
    }
    out.figure = f"{counted(tokens.n_images, 'image')} of {layout.width}x{layout.height}"


def check_inputs(config: DecodeConfig, tokens: TokenSet, inputs: Inputs) -> TokenizerCard:
    """The tokenizer. CorruptError (exit code 4) unless it has a decoder and these codes are its own."""
    tokenizer, path = TokenizerCard.of(inputs["tokenizer"]), inputs["tokens"].path
    codes = tokenizer.decoder.codebook_size
    check_same_tokenizer(
        tokens.attributes.tokenizer,
        tokenizer.identity,
        what=inputs["tokens"].name,
        by=tokenizer.name,
        path=path,
    )
    if tokens.codes != codes:
        raise CorruptError(
            f"{inputs['tokens'].name} has {tokens.codes} codes, but {tokenizer.name} has {codes}",
            path=path,
        )
    if config.crop >= tokens.n_crops:
        raise InputError(
            f"crop {config.crop} was asked for, but {path} has {counted(tokens.n_crops, 'crop')}", path=path
        )
    check_labels(tokens.labels, tokens.attributes.classes, CorruptError, str(path / "labels"))
    return tokenizer


def decode_shard(spec: DecodeSpec, number: int) -> dict[str, bytes]:
    """The file of one shard: passes of exactly `rows_per_pass` rows, the last one padded with its first row."""
    tokens, rows = open_tokens(spec.tokens), spec.config.rows_per_pass
    start, stop = spec.layout.spec.shard_range(number)
    codes_ICT = tokens.tokens.read_rows(start, stop)
    check_codes(codes_ICT, tokens.codes, start, CorruptError, str(spec.tokens / "tokens"))
    codes_Ihw = codes_ICT[:, spec.config.crop].reshape(-1, *tokens.grid).astype(np.int64)
    with threads(1), products(spec.config.precision):
        images = [
            decode_pass(spec.tokenizer, codes_Ihw[first : first + rows], rows=rows)
            for first in range(0, stop - start, rows)
        ]
    return spec.layout.shard(number, np.concatenate(images))


def draw_grid(
    config: DecodeConfig, out: Draft, tokens: TokenSet, originals: Artifact | None, images_NHW3: Images_BHW3
) -> bytes:
    """grid.png of the first images."""
    words = captions(tokens.attributes, tokens.labels[: len(images_NHW3)])
    if originals is not None:
        images_NHW3, words = interleave(images_NHW3, _matching(config, originals, tokens, images_NHW3), words)
    return grid_png(images_NHW3, words, grid_texts(config, tokens.attributes, out.request.key))


def _matching(config: DecodeConfig, originals: Artifact, tokens: TokenSet, images_NHW3: Images_BHW3) -> Images_BHW3:
    """The originals of the images of the grid; InputError unless they are the images that the codes were made of."""
    pictures = open_pictures(originals, size=images_NHW3.shape[1], views=config.views)
    if len(pictures) != tokens.n_images or (pictures.keys and pictures.keys != tokens.keys):
        raise InputError(
            f"{originals.name} does not hold the images that the codes of {tokens.path} were made of: "
            f"{counted(len(pictures), 'image')}, expected the {tokens.n_images} of the same keys",
            path=originals.path,
        )
    return pictures.read(0, len(images_NHW3))
