"""Images of a set as passes of a fixed number of rows, ready for a network.

A row is one view of one image: row = image * views + view. Every pass has a fixed number of rows, the last one of a range
padded with its last row, so that a network's results do not depend on shards or retries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.cores import own_cores
from pipeline.images import ImageSet, Met, ViewPolicy, ignore
from pipeline.stage_cache import cached

if TYPE_CHECKING:
    import torch

# R rows of a pass, S pixels per side, B images, V views


@dataclass(frozen=True)
class ImagesAt:
    """Where a shard finds its images: an image set's folder, and its manifest's digest."""

    path: Path
    digest: str

    @classmethod
    def of(cls, artifact: Artifact) -> ImagesAt:
        return cls(artifact.path, artifact.digest)

    def open(self) -> ImageSet:
        """The image set; opened once per process."""
        return _open(self.path, self.digest)


class Pass(NamedTuple):
    """rows_RSS3: uint8 rows of one pass.  real: number of rows before the padding."""

    rows_RSS3: NDArray[np.uint8]
    real: int


def view_passes(
    source: ImagesAt, images: Sequence[int], *, views: ViewPolicy, rows: int, met: Met = ignore
) -> Iterator[Pass]:
    """All views of these images in passes of `rows` rows; the next is read while one is used.

    met: called with (index, image) for every decoded image, in any order and in other threads.
    """
    passes = _passes(source.open(), images, views, rows, own_cores(), met)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, passes, None)
        while (found := coming.result()) is not None:
            coming = reader.submit(next, passes, None)
            yield found


def run_passes(
    network: Callable[[torch.Tensor], torch.Tensor], passes: Iterator[Pass], *, device: torch.device
) -> NDArray[Any]:
    """The network's results for all real rows, in order. network: images in [0,1] (R, 3, S, S) to a tensor (R, ...)."""
    return np.concatenate(list(pass_results(network, passes, device=device)))


def pass_results(
    network: Callable[[torch.Tensor], torch.Tensor], passes: Iterator[Pass], *, device: torch.device
) -> Iterator[NDArray[Any]]:
    """The same pass by pass."""
    import torch

    for rows_RSS3, real in passes:
        with torch.no_grad():
            found = network(to_images(rows_RSS3, device))
        yield found[:real].cpu().numpy()


def to_images(rows_RSS3: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Bytes (R, S, S, 3) to a tensor (R, 3, S, S) in [0,1] on the device."""
    import torch

    return unit_pixels(torch.from_numpy(rows_RSS3).to(device))


def unit_pixels(rows_RSS3: torch.Tensor) -> torch.Tensor:
    """Bytes (R, S, S, 3) to float32 (R, 3, S, S) in [0,1], on the tensor's device."""
    return rows_RSS3.permute(0, 3, 1, 2).contiguous().float().div_(255)


@cached(4)
def _open(path: Path, digest: str) -> ImageSet:
    return ImageSet.open(path)


def _passes(
    image_set: ImageSet, images: Sequence[int], views: ViewPolicy, rows: int, threads: int, met: Met
) -> Iterator[Pass]:
    at_once = -(-rows // views.count)
    waiting = np.empty((0, views.size, views.size, 3), np.uint8)
    for first in range(0, len(images), at_once):
        views_BVSS3 = image_set.all_views(images[first : first + at_once], views=views, threads=threads, met=met)
        waiting = np.concatenate([waiting, views_BVSS3.reshape(-1, *waiting.shape[1:])])
        while len(waiting) >= rows:
            yield Pass(waiting[:rows], rows)
            waiting = waiting[rows:]
    if len(waiting):
        yield Pass(np.concatenate([waiting, np.repeat(waiting[-1:], rows - len(waiting), 0)]), len(waiting))
