"""Shared by the stages that decode codes: passes through a tokenizer, and the other files of an images artifact."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.tokenizer_config import TokenizerConfig
from pipeline.artifact import Artifact
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from pipeline.keys import canonical_bytes, config_value
from smalti.arrays import ArraySpec, MappedArray
from smalti.attributes import TokenAttributes
from stages.images.image_files import ImageLayout, Images_BHW3, write_labels_and_metadata
from stages.sampling.config import ImagesConfig
from stages.weights.networks import NetworkFile, load_tokenizer

GRID = "grid.png"
NPZ = "samples.npz"


def plan_layout(
    config: ImagesConfig, codes: TokenAttributes, tokenizer: TokenizerConfig, *, origin: Artifact, role: str
) -> ImageLayout:
    """Shards of images as large as the grid of codes makes them; it must be what the codes say of themselves.

    origin: what the codes come from, and its role: the group's attributes name it.
    """
    height, width = (tokenizer.downsample * side for side in codes.grid)
    if codes.resolution not in (None, min(height, width)):
        raise CorruptError(
            f"{origin.name} has a grid of {codes.grid[0]}x{codes.grid[1]} codes and images of {codes.resolution} "
            f"pixels, but its tokenizer makes {tokenizer.downsample} pixels of a code",
            path=origin.path,
        )
    described = {"class_names": list(codes.class_names), "classes": codes.classes, role: origin.key}
    return ImageLayout(codes.n_images, height, width, config.shard_images, config.chunk_images, described)


def size_facts(layout: ImageLayout) -> dict[str, int]:
    """The height as `size`, and the width if it differs."""
    return {"size": layout.height} | ({} if layout.width == layout.height else {"width": layout.width})


def decode_pass(tokenizer: NetworkFile, codes_Ihw: NDArray[np.int64], *, rows: int) -> Images_BHW3:
    """Images of at most `rows` grids of codes, from a pass of exactly `rows`, padded with its first one."""
    import torch

    from models.tokenizer import to_bytes

    network = load_tokenizer(tokenizer)
    padded_Bhw = np.concatenate([codes_Ihw, codes_Ihw[:1].repeat(rows - len(codes_Ihw), axis=0)])
    with torch.inference_mode():
        images_BCHW = network.decode(torch.from_numpy(padded_Bhw).to(next(network.parameters()).device))
        bytes_BHW3 = to_bytes(images_BCHW, network.rounding).permute(0, 2, 3, 1).contiguous()
    kept: Images_BHW3 = bytes_BHW3[: len(codes_Ihw)].cpu().numpy()
    return kept


def write_beside(
    config: ImagesConfig,
    out: Draft,
    layout: ImageLayout,
    labels_I: NDArray[np.int32],
    draw: Callable[[Images_BHW3], bytes],
    *,
    others: Mapping[str, ArraySpec],
) -> None:
    """Everything besides the shards, which must be in the draft already.

    draw: makes the grid's PNG of its images.  others: arrays beside images and labels, by name.
    """
    write_labels_and_metadata(out, layout, labels_I, others=others)
    if not out.is_done("grid"):
        shown = min(config.grid_images, layout.images)
        out.put("grid", {GRID: draw(MappedArray(out.path / "images").read_rows(0, shown))})
    if config.npz and not out.is_done("npz"):
        with out.writing("npz", NPZ) as path:
            write_npz(path, MappedArray(out.path / "images"), config.shard_images)


def captions(codes: TokenAttributes, labels_N: NDArray[np.int32]) -> list[str]:
    """The names of classes, or their numbers."""
    return [codes.class_names[label] if codes.class_names else str(label) for label in labels_N.tolist()]


def grid_texts(config: ImagesConfig, codes: TokenAttributes, key: str) -> dict[str, str]:
    """How the images of a grid were made, for its text chunks."""
    texts = {"smalti": key, "config": canonical_bytes(config_value(config)).decode()}
    sampled: Any = codes.extra.get("sampled")
    return texts if sampled is None else {**texts, "sampled": canonical_bytes(sampled).decode()}


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
