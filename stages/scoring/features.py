"""Image features as an artifact: outputs of extractors for every image, and the moments for Frechet distances.

An artifact of kind "image-features" is a zarr group. For each extractor, numbered from 0, it holds float32 `features-0`
(image, feature) and `logits-0` (image, class), and float64 `mean-0` (feature,) and `covariance-0` (feature, feature);
beside them uint8 `thumbnails` (image, value) and int32 `labels` (image,). Published statistics have moments alone.
The extractors of distances come first: Inception, or else all classifiers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.compatibility import Origin
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from smalti.arrays import ArraySpec, MappedArray, encode_shard, group_files
from stages.scoring.protocol import INCEPTION_FEATURES, Description, Extractor

FORMAT = 1
KIND = ATTRIBUTES = "image-features"
SIDE = 32  # pixels a side of a thumbnail, at most

# R rows (images), E features


@dataclass(frozen=True)
class Moments:
    """Count, mean (E,) and sums of the products of deviations (E, E), in float64."""

    rows: int
    mean_E: NDArray[np.float64]
    sums_EE: NDArray[np.float64]

    @classmethod
    def of(cls, rows_RE: NDArray[np.float32]) -> Moments:
        mean_E = rows_RE.mean(0, dtype=np.float64)
        centred_RE = rows_RE - mean_E
        return cls(len(rows_RE), mean_E, centred_RE.T @ centred_RE)

    def joined(self, other: Moments) -> Moments:
        """Moments of the union of both sets of rows (Chan, Golub and LeVeque 1979)."""
        rows = self.rows + other.rows
        shift_E = other.mean_E - self.mean_E
        sums_EE = self.sums_EE + other.sums_EE + np.outer(shift_E, shift_E) * (self.rows * other.rows / rows)
        return Moments(rows, self.mean_E + shift_E * (other.rows / rows), sums_EE)

    @property
    def covariance_EE(self) -> NDArray[np.float64]:
        return self.sums_EE / (self.rows - 1)


def join(moments: Iterable[Moments]) -> Moments:
    """Moments of all shards, merged in their order, independent of the workers."""
    return reduce(Moments.joined, moments)


@dataclass(frozen=True)
class Extracted:
    """The outputs of one extractor for a set of images. features_NE, logits_NL: float32, None of published statistics."""

    features_NE: NDArray[np.float32] | None
    logits_NL: NDArray[np.float32] | None
    mean_E: NDArray[np.float64]
    covariance_EE: NDArray[np.float64]


class ImageFeatures:
    """An opened artifact of this kind. images: None for published statistics, which do not give the number."""

    def __init__(self, artifact: Artifact):
        facts = artifact.facts
        if facts.get("format") != FORMAT:
            raise CorruptError(
                f"{artifact.name} has image features of format {facts.get('format')!r}, this version reads {FORMAT}",
                path=artifact.path,
            )
        self.artifact, self.name, self.path = artifact, artifact.name, artifact.path
        self.images: int | None = facts["images"]
        self.extractors = [Extractor(**one) for one in facts["extractors"]]

    @property
    def of_distances(self) -> list[Extractor]:
        inceptions = [one for one in self.extractors if one.kind != "classifier"]
        return inceptions or self.extractors

    @property
    def description(self) -> Description:
        names = [f"classifier {one.id[:12]}" if one.kind == "classifier" else one.id for one in self.of_distances]
        origins = [Origin(name, digest=one.id) for name, one in zip(names, self.of_distances, strict=True)]
        return Description(tuple(origins), self.artifact.facts["size"], self.artifact.facts["views"])

    def read(self, name: str) -> NDArray[Any]:
        return MappedArray(self.path / name).read()

    def extracted(self, number: int) -> Extracted:
        rows = [None if self.images is None else self.read(f"{name}-{number}") for name in ("features", "logits")]
        return Extracted(rows[0], rows[1], self.read(f"mean-{number}"), self.read(f"covariance-{number}"))

    def is_of(self, images: Artifact) -> bool:
        """Whether these are features of these images."""
        recorded = self.artifact.inputs.get("images", {})
        return recorded.get("digest") in (images.content, images.digest)


def whole(array: NDArray[Any]) -> ArraySpec:
    """The layout of an array that is one chunk."""
    return ArraySpec(shape=array.shape, dtype=str(array.dtype), chunk_rows=len(array))


def moment_layouts(extractors: list[Extractor]) -> dict[str, ArraySpec]:
    sizes = {f"mean-{number}": (one.features,) for number, one in enumerate(extractors)}
    squares = {f"covariance-{number}": (one.features,) * 2 for number, one in enumerate(extractors)}
    return {
        name: ArraySpec(shape=shape, dtype="float64", chunk_rows=shape[0])
        for name, shape in {**sizes, **squares}.items()
    }


def write_metadata(
    out: Draft, extractors: list[Extractor], arrays: dict[str, ArraySpec], *, images: int | None, **seen: Any
) -> None:
    """The group's metadata, and facts."""
    out.facts = {"format": FORMAT, "images": images, **seen, "extractors": [asdict(one) for one in extractors]}
    if not out.is_done("metadata"):
        out.put("metadata", group_files({ATTRIBUTES: out.facts}, {**arrays, **moment_layouts(extractors)}))


def write_whole(out: Draft, unit: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Arrays of one chunk each, as one unit of the draft."""
    encoded = {name: encode_shard(whole(array), 0, array) for name, array in arrays.items()}
    out.put(unit, {f"{name}/{file}": data for name, (file, data) in encoded.items()})


def read_statistics(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of Inception features, as ADM's evaluator keeps them beside its reference images.

    CorruptError for any other file. Nothing in it is unpickled, and the images in it are not read.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            mean_E, covariance_EE = (held[name].astype(np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # numpy, zipfile and zlib have many kinds for a damaged file
        raise _no_statistics(path, f"arrays mu and sigma cannot be read ({str(error)[:100]})") from error
    if mean_E.shape != (INCEPTION_FEATURES,) or covariance_EE.shape != (INCEPTION_FEATURES,) * 2:
        raise _no_statistics(path, f"mu has shape {mean_E.shape}, sigma {covariance_EE.shape}")
    if not (np.isfinite(mean_E).all() and np.isfinite(covariance_EE).all()):
        raise _no_statistics(path, "they hold NaN or infinity")
    return mean_E, covariance_EE


def _no_statistics(path: Path, why: str) -> CorruptError:
    sizes = f"mu ({INCEPTION_FEATURES},) and sigma ({INCEPTION_FEATURES}, {INCEPTION_FEATURES})"
    return CorruptError(f"{path} is not a valid .npz of reference statistics: {why}; expected {sizes}", path=path)
