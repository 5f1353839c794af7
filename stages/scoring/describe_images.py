"""`describe-images`: features of images under the extractors of a score, so that a reference is extracted once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.classifiers.config import ClassifierConfig
from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, Known, KnownInputs, Origin
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.durable import hash_file
from pipeline.errors import InputError, NumericError, UsageError
from pipeline.images import Views
from pipeline.images.views import CenterViews
from pipeline.keys import canonical_bytes
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import External, Inputs, read, stage
from pipeline.store import Store
from smalti.arrays import ArraySpec, MappedArray, encode_shard
from smalti.counting import counted
from stages.devices import threads
from stages.images.image_files import Pictures, PicturesAt
from stages.scoring.features import KIND, SIDE, Moments, join, read_statistics, whole, write_metadata, write_whole
from stages.scoring.protocol import Description, Extractor, ExtractorFile, ExtractorKind, inception
from stages.weights.cards import read_config
from stages.weights.checkpoint_reader import identify_file
from stages.weights.networks import NetworkFile
from stages.weights.places import INCEPTION

CHUNK_IMAGES = 64  # images that share a checksum, at most

# B images of a pass, I of a shard, E features, L logits, P values of a thumbnail


class DescribeConfig(Config):
    """The extractors, and the size and views of images. Features with other settings cannot be compared."""

    extractor: ExtractorKind = Field(
        default="classifier",
        description="whose features: the given classifiers', or Inception's. Its 299 pixels are made as in TensorFlow "
        "(inception: torch-fidelity, ADM) or as in pytorch-fid",
    )
    source: Literal["images", "statistics"] = Field(
        default="images", description="images, or statistics that others published"
    )
    size: int | None = Field(
        default=None, ge=8, description="pixels per side of an image set's views; null: the size of the classifiers"
    )
    views: Views | None = Field(
        default=None, description="how an image set is seen, by the upright view; null: ADM's centre crop at size"
    )
    rows_per_pass: int = Field(default=64, ge=1, description="images that go through the extractor together")
    shard_images: int = Field(default=1024, ge=1, description="images per file, the unit of work")

    def seen_at(self, size: int) -> Views:
        """The views under which an image set is seen."""
        return self.views or CenterViews(size=size)


def foresee(config: DescribeConfig, inputs: KnownInputs) -> Facts:
    """Facts of the features; raises where images, classifiers and settings do not fit together."""
    problem = _lack(config, inputs)
    if problem:
        raise inputs.refusal(problem)
    judges = inputs.all("classifiers")
    of_distances = (
        tuple(judge.origin for judge in judges)
        if config.extractor == "classifier"
        else (Origin(config.extractor, digest=inception(config.extractor).id),)
    )
    if config.source == "statistics":
        return {"described": Description(of_distances)}
    images = inputs["images"]
    size = _foreseen_size(config, images, judges, inputs)
    _check_known_classes(images, judges, inputs)
    views = config.seen_at(size).model_dump(mode="json") if size and images.kind == "image-set" else None
    dims = [judge.get("features", 1) for judge in judges]
    return {
        **images.only("images", "classes", "class_names", "labels", "listed", "decoded"),
        **({} if size is None else {"pixels": size}),
        "described": Description(of_distances, size, views),
        "dims": max(dims) if config.extractor == "classifier" else inception(config.extractor).features,
        "shows": images.origin,
    }


def _lack(config: DescribeConfig, inputs: Any) -> str | None:
    """Raise for missing and for unused inputs."""
    if config.source == "statistics":
        is_alone = "images" not in inputs and not inputs.all("classifiers") and config.extractor == "inception"
        return None if is_alone else "takes statistics of Inception features from a file, and neither images nor judges"
    if "images" not in inputs:
        return "reads no images: give images, or published statistics"
    if config.extractor == "classifier" and not inputs.all("classifiers"):
        return "describes by classifiers (extractor), but reads none: give classifiers, or extractor: inception"
    return None


def _foreseen_size(config: DescribeConfig, images: Known, judges: list[Known], inputs: KnownInputs) -> int | None:
    """The size of the views, if it is known; raises where inputs and config contradict each other."""
    decoded = [images] if images.kind == "images" else []
    sizes = [(one.get("pixels"), f"images of {one.get('pixels')} pixels in {one.name}") for one in decoded]
    sizes += [(judge.get("pixels"), f"{judge.name} judges {judge.get('pixels')} pixels") for judge in judges]
    sizes += [(config.size, f"size is {config.size}")]
    sizes += [(config.views.size, f"views.size is {config.views.size}")] if config.views else []
    known = [(pixels, words) for pixels, words in sizes if pixels is not None]
    for pixels, words in known:
        if pixels != known[0][0]:
            raise inputs.refusal(f"describes images of different sizes: {known[0][1]}, but {words}")
    if not known and not decoded and not judges:
        raise inputs.refusal("reads an image set alone, whose images have no common size: set size")
    return known[0][0] if known else None


def _check_known_classes(images: Known, judges: list[Known], inputs: KnownInputs) -> None:
    """Raise unless every classifier has all classes of the images."""
    classes = images.get("labels", images.get("classes", 0))
    for judge in judges:
        if classes > judge.get("classes", classes):
            raise inputs.refusal(
                f"describes images of {counted(classes, 'class')} ({images.name}), but {judge.name} judges {judge.get('classes')} classes"
            )


def identify_inception(config: DescribeConfig, path: Path) -> str:
    """SHA-256 of the published Inception weights; CorruptError for any other file."""
    digest = identify_file(path)
    INCEPTION.check_digest(digest, path)
    return digest


def identify_statistics(config: DescribeConfig, path: Path) -> str:
    """SHA-256 of the file; InputError where there is none."""
    if not path.is_file():
        raise InputError(f"there is no file of statistics {path}", path=path)
    return hash_file(path)


@dataclass(frozen=True)
class DescribeSpec:
    """The arguments of a shard. arrays: those with a row per image."""

    extractors: tuple[ExtractorFile, ...]
    pictures: PicturesAt
    rows_per_pass: int
    arrays: dict[str, ArraySpec]

    @property
    def sizes(self) -> list[int]:
        """Images of each shard."""
        layout = self.arrays["thumbnails"]
        return [stop - start for start, stop in map(layout.shard_range, range(layout.shards))]


@stage(
    "describe-images",
    version=1,
    config=DescribeConfig,
    reads={
        "images": read("images", "image-set", help="samples, reconstructions or real images", optional=True),
        "classifiers": read(
            "classifier", help="judges: extractors, and of class consistency", optional=True, many=True
        ),
    },
    writes=KIND,
    example="smalti describe-images --images digits/rar/held-out-images --classifiers digits/rar/judge-1",
    externals={
        "weights": External(
            help="the published Inception weights, if they are not in torch's cache",
            identify=identify_inception,
            needed=lambda config: False,
            place=lambda config: INCEPTION if config.extractor != "classifier" and config.source == "images" else None,
            otherwise="describe by classifiers: set extractor to classifier, with the input classifiers",
            usual=(INCEPTION,),
            is_file=True,
        ),
        "statistics": External(
            help="published statistics in the place of images: an .npz with mu and sigma, as of ADM's evaluator",
            identify=identify_statistics,
            needed=lambda config: config.source == "statistics",
            implies={"source": "statistics", "extractor": "inception"},
            is_file=True,
        ),
    },
    foresees=foresee,
)
def describe_images(config: DescribeConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Extract the features of images, which scores compare with those of a reference.

    reads: images or an image set and, as extractors, classifiers; or an .npz of published statistics.  writes: features,
    logits, their means and covariances, labels, and thumbnails for nearness to training images.  resumes: shard by shard.
    """
    problem = _lack(config, inputs)
    if problem:
        raise UsageError(f"describe-images {problem}")
    if config.source == "statistics":
        copy_statistics(out, run.paths["statistics"])
        return
    size = common_size(config, inputs)
    place = PicturesAt.of(inputs["images"], size=size, views=config.views)
    pictures = place.open()
    check_classes(pictures, inputs)
    if len(pictures) < 2:
        raise InputError(f"{pictures.name} has 1 image, but a covariance needs at least 2", path=pictures.path)
    extractors, files = choose_extractors(config, inputs, run)
    arrays = row_arrays(config, extractors, images=len(pictures), size=size)
    spec = DescribeSpec(files, place, config.rows_per_pass, arrays)
    map_shards(out, run, describe_shard, spec, spec.sizes, label="describe")
    views = config.seen_at(size).model_dump(mode="json") if inputs["images"].kind == "image-set" else None
    labels_I = pictures.labels_I.astype(np.int32)
    if not out.is_done("labels"):
        write_whole(out, "labels", {"labels": labels_I})
    everything = {**arrays, "labels": whole(labels_I)}
    write_metadata(out, extractors, everything, images=len(pictures), size=size, views=views)
    if not out.is_done("moments"):
        write_whole(out, "moments", measure_moments(out, extractors))
    values = " + ".join(str(one.features) for one in extractors)
    out.figure = f"{values} features of {counted(len(pictures), 'image')} of {size} pixels"


def described_as(pattern: Artifact, images: Artifact, store: Store) -> tuple[DescribeConfig, Inputs]:
    """Stage config and inputs that describe images as those of `pattern`, by the same classifiers of this store."""
    config = DescribeConfig.model_validate_json(canonical_bytes(pattern.config))
    judges = [store.open(record["stage"], record["key"]) for record in pattern.inputs.get("classifiers", [])]
    seen: dict[str, Any] = {"size": None, "views": None}
    if images.kind == "image-set":
        is_like_it = pattern.facts["views"] is not None
        seen = {} if is_like_it else {"size": pattern.facts["size"]}
    return config.model_copy(update={"source": "images", **seen}), Inputs({"images": images, "classifiers": judges})


def copy_statistics(out: Draft, path: Path) -> None:
    """The moments of a file of published statistics."""
    mean_E, covariance_EE = read_statistics(path)
    write_metadata(out, [inception("inception")], {}, images=None, size=None, views=None)
    write_whole(out, "moments", {"mean-0": mean_E, "covariance-0": covariance_EE})
    out.figure = f"published statistics of {len(mean_E)} features"


def common_size(config: DescribeConfig, inputs: Inputs) -> int:
    """The size of the views: as configured, as decoded, or that of the classifiers."""
    images, judges = inputs["images"], inputs.all("classifiers")
    decoded = {f"images ({images.name}) has": int(images.facts["size"])} if "size" in images.facts else {}
    judged = {f"classifier {judge.name} takes": read_config(judge, ClassifierConfig).pixels for judge in judges}
    asked = {"size is": config.size} if config.size else {}
    sizes = decoded | judged | asked | ({"views.size is": config.views.size} if config.views else {})
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{what} {pixels}" for what, pixels in sizes.items())
        raise InputError(f"images, classifiers and size must agree on pixels a side, but {said}")
    if not sizes:
        raise UsageError("an image set alone has no common size: give size in the config")
    return next(iter(sizes.values()))


def check_classes(images: Pictures, inputs: Inputs) -> None:
    """InputError for a classifier that does not have the images' classes."""
    largest = int(images.labels_I.max(initial=0))
    for judge in inputs.all("classifiers"):
        classes = read_config(judge, ClassifierConfig).outputs
        if largest >= classes:
            raise InputError(
                f"{images.name} has class {largest}, but {judge.name} knows 0 to {classes - 1}", path=images.path
            )


def choose_extractors(
    config: DescribeConfig, inputs: Inputs, run: Runtime
) -> tuple[list[Extractor], tuple[ExtractorFile, ...]]:
    """The extractors: those of distances first, then all classifiers, for class consistency."""
    found: list[tuple[Extractor, ExtractorFile]] = []
    if config.extractor != "classifier":
        weights = run.paths["weights"].absolute()
        found.append((inception(config.extractor), ExtractorFile(config.extractor, run.device, weights=weights)))
    found += [(_judge(one), _judge_file(one, run.device)) for one in inputs.all("classifiers")]
    return [one for one, _ in found], tuple(file for _, file in found)


def _judge(classifier: Artifact) -> Extractor:
    network = read_config(classifier, ClassifierConfig)
    return Extractor("classifier", classifier.content, network.features, network.outputs)


def _judge_file(classifier: Artifact, device: str) -> ExtractorFile:
    return ExtractorFile("classifier", device, classifier=NetworkFile.of(classifier, device))


def row_arrays(config: DescribeConfig, extractors: list[Extractor], *, images: int, size: int) -> dict[str, ArraySpec]:
    """Layouts of the arrays with a row per image."""
    chunk_rows = math.gcd(config.shard_images, CHUNK_IMAGES)
    values = {"thumbnails": (min(size, SIDE) ** 2 * 3, "uint8")}
    for number, one in enumerate(extractors):
        values |= {f"features-{number}": (one.features, "float32"), f"logits-{number}": (one.logits, "float32")}
    return {
        name: ArraySpec(shape=(images, count), dtype=dtype, chunk_rows=chunk_rows, shard_rows=config.shard_images)
        for name, (count, dtype) in values.items()
    }


def describe_shard(spec: DescribeSpec, number: int) -> dict[str, bytes]:
    """The rows of one shard: passes of exactly `rows_per_pass` images, the last padded with its first one."""
    import torch

    from stages.scoring.extractors import load_extractor
    from stages.scoring.neighbours import thumbnails

    pictures, rows = spec.pictures.open(), spec.rows_per_pass
    start, stop = spec.arrays["thumbnails"].shard_range(number)
    blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in spec.arrays}
    with threads(1), torch.inference_mode():
        extractors = [load_extractor(file) for file in spec.extractors]
        for first in range(start, stop, rows):
            bytes_BHW3 = pictures.read(first, min(first + rows, stop))
            blocks["thumbnails"].append(thumbnails(bytes_BHW3))
            padded_BHW3 = np.concatenate([bytes_BHW3, bytes_BHW3[:1].repeat(rows - len(bytes_BHW3), axis=0)])
            bytes_B3HW = torch.from_numpy(padded_BHW3).permute(0, 3, 1, 2).contiguous()
            for which, extractor in enumerate(extractors):
                parts = extractor(bytes_B3HW.to(next(extractor.parameters()).device))
                for name, part in zip(("features", "logits"), parts, strict=True):
                    blocks[f"{name}-{which}"].append(part[: len(bytes_BHW3)].float().cpu().numpy())
    whole_shard = {name: np.concatenate(parts) for name, parts in blocks.items()}
    if not all(np.isfinite(part).all() for part in whole_shard.values()):
        raise NumericError(f"features of images {start} to {stop - 1} are not finite", path=pictures.path)
    encoded = {name: encode_shard(spec.arrays[name], number, part) for name, part in whole_shard.items()}
    return {f"{name}/{file}": data for name, (file, data) in encoded.items()}


def measure_moments(out: Draft, extractors: list[Extractor]) -> dict[str, NDArray[np.float64]]:
    """Means and covariances of all features, a shard in memory at a time."""
    from threadpoolctl import threadpool_limits

    found: dict[str, NDArray[np.float64]] = {}
    with threadpool_limits(1):  # the last bits of a sum depend on the number of threads
        for number in range(len(extractors)):
            rows = MappedArray(out.path / f"features-{number}")
            moments = join(Moments.of(rows.read_shard(shard)) for shard in range(rows.spec.shards))
            found |= {f"mean-{number}": moments.mean_E, f"covariance-{number}": moments.covariance_EE}
    return found
