"""Decoding: codes become images, shard by shard, with a grid to look at and the array that ADM's evaluator reads."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.tokenizer_config import TokenizerConfig
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError
from pipeline.images import Views
from pipeline.keys import NEUTRAL, canonical_bytes, config_value
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from smalti.arrays import MappedArray
from smalti.tokens import TokenSet, check_codes, check_labels, open_tokens
from stages.devices import threads
from stages.identity import check_same_tokenizer, tokenizer_identity
from stages.image_files import ImageLayout, Images_BHW3, open_pictures, write_labels_and_metadata
from stages.networks import NetworkFile, load_tokenizer, read_tokenizer_config
from stages.pictures import grid_png, interleave

GRID = "grid.png"
NPZ = "samples.npz"
ORIGINALS = "originals"


class DecodeConfig(Config):
    """How codes become images."""

    crop: int = Field(default=0, ge=0, description="which crop of each image to decode")
    rows_per_pass: int = Field(default=64, ge=1, description="images that go through the network together")
    shard_images: int = Field(default=1024, ge=1, description="images per file")
    chunk_images: int = Field(default=64, ge=1, description="images per checksum; divides shard_images")
    grid_images: int = Field(default=100, ge=1, le=1000, description="images shown in grid.png, the first ones")
    views: Views | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="how originals that are an image set are shown, by the upright view; null: ADM's centre crop",
    )
    npz: bool = Field(default=False, description="also write samples.npz (arr_0, uint8), as ADM's evaluator reads it")


@dataclass(frozen=True)
class DecodeSpec:
    """What a worker needs for any shard."""

    tokenizer: NetworkFile
    tokens: Path
    config: DecodeConfig
    layout: ImageLayout


@stage(
    "decode",
    version=1,
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
)
def decode_tokens(config: DecodeConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn codes into images.

    Writes uint8 images and their labels as zarr arrays, and grid.png with ten images a row and the class of each.
    With originals, each row of them stands above its reconstructions. Every shard is a unit of its own.
    """
    tokens = open_tokens(inputs["tokens"].path)
    tokenizer = check_inputs(config, tokens, inputs)
    layout = plan_layout(config, tokens, tokenizer, inputs["tokens"])
    spec = DecodeSpec(NetworkFile.of(inputs["tokenizer"], run.device), inputs["tokens"].path, config, layout)
    map_shards(out, run, decode_shard, spec, layout.sizes, label="decode")
    write_labels_and_metadata(out, layout, tokens.labels)
    if not out.is_done("grid"):
        originals = next(iter(inputs.all(ORIGINALS)), None)
        out.put("grid", {GRID: draw_grid(config, out, tokens, originals)})
    if config.npz and not out.is_done("npz"):
        with out.writing("npz", NPZ) as path:
            write_npz(path, MappedArray(out.path / "images"), config.shard_images)
    out.facts = {
        "images": tokens.n_images,
        "size": layout.height,
        "classes": tokens.attributes.classes,
        "tokenizer": tokenizer_identity(inputs["tokenizer"]),
        "figure": f"{tokens.n_images:,} images of {layout.width}x{layout.height}",
    }


def check_inputs(config: DecodeConfig, tokens: TokenSet, inputs: Inputs) -> TokenizerConfig:
    """The tokenizer's config. CorruptError (exit code 4) unless it has a decoder and these codes are its own."""
    artifact, path = inputs["tokenizer"], inputs["tokens"].path
    if artifact.kind == "codebook":
        raise CorruptError(
            f"{artifact.name} is a K-Means codebook, which has no decoder: its codes cannot become images",
            path=artifact.path,
            hint="give a tokenizer of train-tokenizer or import-weights",
        )
    tokenizer = read_tokenizer_config(artifact)
    check_same_tokenizer(
        tokens.attributes.tokenizer,
        tokenizer_identity(artifact),
        what=inputs["tokens"].name,
        by=artifact.name,
        path=path,
    )
    if tokens.codes != tokenizer.codebook_size:
        raise CorruptError(
            f"{inputs['tokens'].name} has {tokens.codes} codes, but {artifact.name} has {tokenizer.codebook_size}",
            path=path,
        )
    if config.crop >= tokens.n_crops:
        raise InputError(f"crop {config.crop} was asked for, but {path} has {tokens.n_crops} crops", path=path)
    check_labels(tokens.labels, tokens.attributes.classes, CorruptError, str(path / "labels"))
    return tokenizer


def plan_layout(config: DecodeConfig, tokens: TokenSet, tokenizer: TokenizerConfig, artifact: Artifact) -> ImageLayout:
    """Shards of images as large as the grid of codes makes them; it must be what the token set says of itself."""
    rows, columns = tokens.grid
    side = tokens.attributes.resolution
    if rows != columns or side not in (None, rows * tokenizer.downsample):
        raise CorruptError(
            f"{artifact.name} has a grid of {rows}x{columns} codes and images of {side} pixels, but its tokenizer "
            f"makes {tokenizer.downsample} pixels of a code",
            path=artifact.path,
        )
    described = {
        "class_names": list(tokens.attributes.class_names),
        "classes": tokens.attributes.classes,
        "tokens": artifact.key,
    }
    return ImageLayout(
        tokens.n_images,
        rows * tokenizer.downsample,
        columns * tokenizer.downsample,
        config.shard_images,
        config.chunk_images,
        described,
    )


def decode_shard(spec: DecodeSpec, number: int) -> dict[str, bytes]:
    """The file of one shard: passes of exactly `rows_per_pass` rows, the last one padded with its first row."""
    tokens, config = open_tokens(spec.tokens), spec.config
    start, stop = spec.layout.spec.shard_range(number)
    codes_ICT = tokens.tokens.read_rows(start, stop)
    check_codes(codes_ICT, tokens.codes, start, CorruptError, str(spec.tokens / "tokens"))
    codes_Ihw = codes_ICT[:, config.crop].reshape(-1, *tokens.grid).astype(np.int64)
    with threads(1):
        images = [
            _decode_pass(spec, codes_Ihw[first : first + config.rows_per_pass])
            for first in range(0, stop - start, config.rows_per_pass)
        ]
    return spec.layout.shard(number, np.concatenate(images))


def draw_grid(config: DecodeConfig, out: Draft, tokens: TokenSet, originals: Artifact | None) -> bytes:
    """grid.png of the first images, from the draft's own shards."""
    count = min(config.grid_images, tokens.n_images)
    images_NHW3 = MappedArray(out.path / "images").read_rows(0, count)
    names = tokens.attributes.class_names
    captions = [names[label] if names else str(label) for label in tokens.labels[:count].tolist()]
    if originals is not None:
        images_NHW3, captions = interleave(images_NHW3, _matching(config, originals, tokens, images_NHW3), captions)
    texts = {"smalti": out.request.key, "config": canonical_bytes(config_value(config)).decode()}
    if "sampled" in tokens.attributes.extra:
        texts["sampled"] = canonical_bytes(tokens.attributes.extra["sampled"]).decode()
    return grid_png(images_NHW3, captions, texts)


def write_npz(path: Path, images: MappedArray, rows: int) -> None:
    """All images as `arr_0` of an uncompressed npz, block by block; the archive carries a fixed date."""
    header = io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
    np.lib.format.write_array_header_1_0(header, described)
    entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, archive.open(entry, "w", force_zip64=True) as file:
        file.write(header.getvalue())
        for start in range(0, len(images), rows):
            file.write(images.read_rows(start, min(start + rows, len(images))).tobytes())


def _decode_pass(spec: DecodeSpec, codes_Ihw: NDArray[np.int64]) -> Images_BHW3:
    import torch

    from models.tokenizer import to_bytes

    tokenizer = load_tokenizer(spec.tokenizer)
    lacking = spec.config.rows_per_pass - len(codes_Ihw)
    padded_Bhw = np.concatenate([codes_Ihw, codes_Ihw[:1].repeat(lacking, axis=0)])
    with torch.inference_mode():
        images_BCHW = tokenizer.decode(torch.from_numpy(padded_Bhw).to(next(tokenizer.parameters()).device))
        bytes_BHW3 = to_bytes(images_BCHW, tokenizer.rounding).permute(0, 2, 3, 1)
    kept: Images_BHW3 = bytes_BHW3[: len(codes_Ihw)].cpu().numpy()
    return kept


def _matching(config: DecodeConfig, originals: Artifact, tokens: TokenSet, images_NHW3: Images_BHW3) -> Images_BHW3:
    """The originals of the images of the grid; InputError unless they are the images that the codes were made of."""
    pictures = open_pictures(originals, size=images_NHW3.shape[1], views=config.views)
    if len(pictures) != tokens.n_images or (pictures.keys and pictures.keys != tokens.keys):
        raise InputError(
            f"{originals.name} does not hold the images that the codes of {tokens.path} were made of: "
            f"{len(pictures)} images, expected the {tokens.n_images} of the same keys",
            path=originals.path,
        )
    return pictures.read(0, len(images_NHW3))
