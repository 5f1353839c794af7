"""Features of all images under all extractors, and what is measured pair by pair, shard by shard.

They are scratch files of the draft: an interrupted extraction goes on where it was, and the artifact does not keep them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact, read_manifest
from pipeline.draft import SCRATCH, Draft
from pipeline.errors import NumericError
from pipeline.images import Views
from pipeline.runtime import Runtime
from pipeline.shards import unit_name
from pipeline.stage import Inputs
from pipeline.stage_cache import cached
from stages.devices import pick_device, threads
from stages.images.image_files import Pictures, open_pictures
from stages.scoring.protocol import CLASSIFIER, INCEPTION, PYTORCH_FID, ExtractorFile, ScoreConfig
from stages.weights.networks import NetworkFile
from stages.weights.perceptual import load_lpips

if TYPE_CHECKING:
    from stages.scoring.figures import Features

PARTS = ("features", "logits")


@dataclass(frozen=True)
class Source:
    """Where images lie, and the digest of their manifest; picklable."""

    path: Path
    digest: str

    @classmethod
    def of(cls, artifact: Artifact) -> Source:
        return cls(artifact.path.absolute(), artifact.digest)


@dataclass(frozen=True)
class ExtractionSpec:
    """What a worker needs for any shard. Shards are numbered by extractor, then by source, then by block of images.

    Figures of pairs follow, as those of one more extractor that looks at the first source. With a third source, training
    images, the thumbnails of the first two come next, and then, for each block of training images, how near they are to
    it: these shards read the thumbnails, which lie in `folder`. device: of LPIPS, whose weights are `perceptual`, and of
    distances.
    """

    extractors: tuple[ExtractorFile, ...]
    sources: tuple[Source, ...]
    counts: tuple[int, ...]
    size: int
    config: ScoreConfig
    folder: Path
    device: str = "cpu"
    perceptual: Path | None = None

    @property
    def blocks(self) -> list[tuple[int, int, int, int]]:
        """(extractor, source, first image, image after the last) of every shard."""
        step = self.config.shard_images
        places = [(extractor, source) for extractor in range(len(self.extractors)) for source in (0, 1)]
        pairs = [(self.pairs, 0)] if self.config.of_pairs else []
        nearness = [(self.nearness, source) for source in range(3)] if len(self.sources) == 3 else []
        return [
            (extractor, source, start, min(start + step, self.counts[source]))
            for extractor, source in places + pairs + nearness
            for start in range(0, self.counts[source], step)
        ]

    @property
    def pairs(self) -> int:
        """The number that stands for the figures of pairs among the extractors."""
        return len(self.extractors)

    @property
    def nearness(self) -> int:
        """The number that stands for nearness to training images among the extractors."""
        return len(self.extractors) + 1

    def shards_of(self, extractor: int, *sources: int) -> list[int]:
        """Numbers of the shards of one extractor and these sources."""
        return [number for number, block in enumerate(self.blocks) if block[0] == extractor and block[1] in sources]


def choose_extractors(config: ScoreConfig, inputs: Inputs, run: Runtime) -> tuple[ExtractorFile, ...]:
    """Those of the distances first; the classifiers always, as judges of consistency."""
    judges = [NetworkFile.of(judge, run.device) for judge in inputs.all("classifiers")]
    extractors = [ExtractorFile(CLASSIFIER, run.device, classifier=judge) for judge in judges]
    if config.extractor == "inception":
        weights = run.paths["weights"].absolute()
        name = INCEPTION if config.inception_input == "torch-fidelity" else PYTORCH_FID
        return (ExtractorFile(name, run.device, weights=weights), *extractors)
    return tuple(extractors)


def extract_shard(spec: ExtractionSpec, number: int) -> dict[str, bytes]:
    """Features and logits, or the figures of pairs, of one block."""
    which, source, start, stop = spec.blocks[number]
    found: Mapping[str, NDArray[Any]]
    if which == spec.pairs:
        found = compare_block(spec, start, stop)
    elif which == spec.nearness:
        found = approach_block(spec, source, start, stop)
    else:
        found = extract_block(spec, which, source, start, stop)
    return {_scratch_file(number, name): _npy(part) for name, part in found.items()}


def extract_block(
    spec: ExtractionSpec, which: int, source: int, start: int, stop: int
) -> dict[str, NDArray[np.float32]]:
    """Features and logits: passes of exactly `rows_per_pass` rows, the last padded with its first row."""
    import torch

    from stages.scoring.extractors import load_extractor

    pictures = _open(spec.sources[source], spec.size, spec.config.views)
    rows = spec.config.rows_per_pass
    blocks: list[list[NDArray[np.float32]]] = []
    with threads(1), torch.inference_mode():
        extractor = load_extractor(spec.extractors[which])
        device = next(extractor.parameters()).device
        for first in range(start, stop, rows):
            bytes_BHW3 = pictures.read(first, min(first + rows, stop))
            padded_BHW3 = np.concatenate([bytes_BHW3, bytes_BHW3[:1].repeat(rows - len(bytes_BHW3), axis=0)])
            bytes_B3HW = torch.from_numpy(padded_BHW3).permute(0, 3, 1, 2).contiguous().to(device)
            blocks.append([part[: len(bytes_BHW3)].float().cpu().numpy() for part in extractor(bytes_B3HW)])
    parts = [np.concatenate(part) for part in zip(*blocks, strict=True)]
    if not all(np.isfinite(part).all() for part in parts):
        raise NumericError(f"features of images {start} to {stop - 1} are not finite", path=pictures.path)
    return dict(zip(PARTS, parts, strict=True))


def compare_block(spec: ExtractionSpec, start: int, stop: int) -> dict[str, NDArray[np.float64]]:
    """The figures of pairs, image by image: {name: (B,)}."""
    import torch

    from stages.scoring.figures import lpips_each, ssim_each

    ours, theirs = (_open(source, spec.size, spec.config.views).read(start, stop) for source in spec.sources)
    found: dict[str, NDArray[np.float64]] = {}
    if "ssim" in spec.config.of_pairs:
        found["ssim"] = ssim_each(ours, theirs)
    if spec.perceptual is not None:
        with threads(1), torch.inference_mode():
            lpips = load_lpips(spec.perceptual, spec.device)
            found["lpips"] = lpips_each(lpips, ours, theirs, rows=spec.config.rows_per_pass)
    return found


def approach_block(spec: ExtractionSpec, source: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
    """Thumbnails of a block (B, P), or, of training images, the squared distance of each thumbnail to the nearest of them."""
    from stages.scoring.neighbours import nearest, thumbnails

    pictures, rows = _open(spec.sources[source], spec.size, spec.config.views), spec.config.rows_per_pass
    with threads(1):
        block_BP = np.concatenate(
            [thumbnails(pictures.read(first, min(first + rows, stop))) for first in range(start, stop, rows)]
        )
        if source < 2:
            return {"thumbnails": block_BP}
        return {"nearest": nearest(_thumbnails(spec), block_BP, device=pick_device(spec.device))}


def gather(spec: ExtractionSpec, out: Draft) -> list[tuple[Features, Features]]:
    """Per extractor: features of the images and of the reference, out of the draft's scratch files."""
    from stages.scoring.figures import Features

    found: dict[tuple[int, int], list[list[NDArray[np.float32]]]] = {}
    for number, (extractor, source, _, _) in enumerate(spec.blocks):
        if extractor < len(spec.extractors):
            parts = [_load(out, number, name) for name in PARTS]
            found.setdefault((extractor, source), []).append(parts)
    whole = {
        place: Features(*(np.concatenate(part) for part in zip(*blocks, strict=True)))
        for place, blocks in found.items()
    }
    return [(whole[extractor, 0], whole[extractor, 1]) for extractor in range(len(spec.extractors))]


def gather_pairs(spec: ExtractionSpec, out: Draft) -> dict[str, float]:
    """Means over all pairs, out of the draft's scratch files."""
    numbers = spec.shards_of(spec.pairs, 0)
    return {
        name: float(np.concatenate([_load(out, number, name) for number in numbers]).mean())
        for name in spec.config.of_pairs
    }


def gather_nearness(spec: ExtractionSpec, out: Draft) -> dict[str, float]:
    """Nearness to training images, where there are some, out of the draft's scratch files."""
    from stages.scoring.figures import nearness

    numbers = spec.shards_of(spec.nearness, 2)
    if not numbers:
        return {}
    squares = _load(out, numbers[0], "nearest")
    for number in numbers[1:]:
        np.minimum(squares, _load(out, number, "nearest"), out=squares)
    distances = np.sqrt(squares.astype(np.float64))
    return nearness(distances[: spec.counts[0]], distances[spec.counts[0] :])


@cached(1)
def _thumbnails(spec: ExtractionSpec) -> NDArray[np.uint8]:
    """Those of images and reference (N + M, P), written by earlier shards; read once per process."""
    files = [spec.folder / _scratch_file(number, "thumbnails") for number in spec.shards_of(spec.nearness, 0, 1)]
    return np.concatenate([np.load(file, allow_pickle=False) for file in files])


@cached(3)
def _open(source: Source, size: int, views: Views | None) -> Pictures:
    """The images of a source; opened once per process."""
    return open_pictures(read_manifest(source.path), size=size, views=views)


def _load(out: Draft, number: int, part: str) -> NDArray[Any]:
    files = {path.name: path for path in out.files(unit_name(number))}
    loaded: NDArray[Any] = np.load(files[Path(_scratch_file(number, part)).name], allow_pickle=False)
    return loaded


def _scratch_file(number: int, part: str) -> str:
    return f"{SCRATCH}/{number:06d}-{part}.npy"


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
