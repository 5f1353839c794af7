"""Measurements per image of a score, in shards: figures of pairs, and nearness to training images.

They are scratch files of the draft, from which an interrupted score continues; the artifact does not contain them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.draft import SCRATCH, Draft
from pipeline.shards import unit_name
from pipeline.stage_cache import cached
from smalti.arrays import MappedArray
from stages.devices import pick_device, threads
from stages.images.image_files import PicturesAt
from stages.weights.perceptual import load_lpips

# B pairs of a block, Q queries


@dataclass(frozen=True)
class Pairs:
    """Images and their originals; `figures` of psnr, ssim and lpips, whose weights are `perceptual`."""

    images: PicturesAt
    originals: PicturesAt
    figures: tuple[str, ...]
    rows_per_pass: int
    perceptual: Path | None


@dataclass(frozen=True)
class Nearness:
    """Thumbnails, by their folders: those of `queries` are looked up among those of the training images."""

    queries: tuple[Path, ...]
    training: Path


@dataclass(frozen=True)
class ComparisonSpec:
    """The arguments of a shard. parts: each is split into blocks, (part, first row, row after the last)."""

    parts: tuple[Pairs | Nearness, ...]
    blocks: tuple[tuple[int, int, int], ...]
    device: str

    @property
    def sizes(self) -> list[int]:
        return [stop - start for _, start, stop in self.blocks]


def compare_shard(spec: ComparisonSpec, number: int) -> dict[str, bytes]:
    """The measurements of one block, by name."""
    part, start, stop = spec.blocks[number]
    compare: Callable[..., dict[str, NDArray[Any]]] = (
        compare_pairs if isinstance(spec.parts[part], Pairs) else find_nearest
    )
    with threads(1):
        found = compare(spec.parts[part], start, stop, spec.device)
    return {_scratch_file(number, name): _npy(values) for name, values in found.items()}


def compare_pairs(pairs: Pairs, start: int, stop: int, device: str) -> dict[str, NDArray[Any]]:
    """The figures of pairs, image by image: {name: (B,)}."""
    import torch

    from stages.scoring.figures import lpips_each, psnr_each, ssim_each

    ours, theirs = (one.open().read(start, stop) for one in (pairs.images, pairs.originals))
    found = {"psnr": psnr_each(ours, theirs)}
    if "ssim" in pairs.figures:
        found["ssim"] = ssim_each(ours, theirs)
    if pairs.perceptual is not None:
        with torch.inference_mode():
            found["lpips"] = lpips_each(load_lpips(pairs.perceptual, device), ours, theirs, rows=pairs.rows_per_pass)
    return found


def find_nearest(nearness: Nearness, start: int, stop: int, device: str) -> dict[str, NDArray[Any]]:
    """The squared distance of each thumbnail to the nearest of a block of training images: {nearest: (Q,)}."""
    from stages.scoring.neighbours import nearest

    block = MappedArray(nearness.training).read_rows(start, stop)
    return {"nearest": nearest(_thumbnails(nearness.queries), block, device=pick_device(device))}


def gather(spec: ComparisonSpec, out: Draft, part: int) -> list[dict[str, NDArray[Any]]]:
    """The measurements of all blocks of one part, in their order."""
    numbers = [number for number, block in enumerate(spec.blocks) if block[0] == part]
    return [{_name(path): np.load(path, allow_pickle=False) for path in out.files(unit_name(n))} for n in numbers]


@cached(1)
def _thumbnails(folders: tuple[Path, ...]) -> NDArray[np.uint8]:
    """Those of several sets of images, read once per process."""
    return np.concatenate([MappedArray(folder).read() for folder in folders])


def _scratch_file(number: int, part: str) -> str:
    return f"{SCRATCH}/{number:06d}-{part}.npy"


def _name(path: Path) -> str:
    return path.stem.partition("-")[2]


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
