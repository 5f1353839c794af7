"""`extract`: patch features of an encoder for every image, or for some of the images and some of their features, in shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.encoders.config import Dinov2Config, EncoderConfig, WhitenedPatchesConfig
from pipeline.compatibility import Facts, KnownInputs, either
from pipeline.draft import Draft
from pipeline.durable import hash_file
from pipeline.errors import NumericError, UsageError
from pipeline.images import ImageSet, Views
from pipeline.images.views import CenterViews
from pipeline.keys import NEUTRAL, canonical_bytes, config_value
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import External, Inputs, read, stage
from pipeline.stage_cache import cached
from smalti.arrays import ArraySpec, encode_shard, group_files
from stages.codes.encoders import ENCODER, ENCODER_WEIGHTS, default_place, load_encoder, published_weights
from stages.codes.reservoir import smallest_rows
from stages.codes.token_files import ShardSizes
from stages.devices import pick_device, threads
from stages.images.checks import check_rgb, check_seen
from stages.images.passes import ImagesAt, pass_results, run_passes, to_images, view_passes
from stages.weights.checkpoint_reader import identify_file
from stages.weights.places import HubWeights

if TYPE_CHECKING:
    import torch

# N rows (views of images), h w grid of features, D values of a feature
IMAGES, ROWS = 2, 3  # streams of the hash: which images are encoded, and which of their features are kept


class ExtractConfig(ShardSizes):
    """Which encoder sees the images, and how its features are stored."""

    encoder: EncoderConfig = Field(
        default=WhitenedPatchesConfig(), description="whitened-patches (fitted on these images) or dinov2"
    )
    hub: HubWeights | None = Field(
        default=None, description="where a dinov2 without --weights comes from; null: timm's own place"
    )
    views: Views | None = Field(default=None, description="views of each image; null: the centre view")
    rows_per_pass: int = Field(default=64, ge=1, description="views per forward pass; float results depend on it")
    dtype: Literal["float32", "float16"] = Field(default="float32", description="type of the stored features")
    shard_images: int = Field(default=1024, ge=1, description="images per file, a multiple of chunk_images")
    chunk_images: int = Field(default=16, ge=1, description="images per chunk, the unit of checking")
    image_share: float = Field(
        default=1.0, gt=0, le=1, description="share of the images that are chosen", json_schema_extra=NEUTRAL
    )
    rows: int | None = Field(
        default=None,
        ge=1,
        description="features that are kept of the chosen images, such as 256 per cluster; null: all",
        json_schema_extra=NEUTRAL,
    )
    seed: int = Field(
        default=0, ge=0, lt=2**53, description="seed of the images and features chosen", json_schema_extra=NEUTRAL
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.views is not None and self.views.size not in self.encoder.accepts:
            sizes = either(self.encoder.accepts)
            raise ValueError(f"views.size {self.views.size} must be what the encoder takes: {sizes} pixels")
        if self.hub is not None and self.encoder.needs_fit:
            raise ValueError(f"hub is for published weights, but {self.encoder.kind} is fitted on the images")
        return self

    @property
    def seen(self) -> Views:
        """The views that are extracted."""
        return self.views or CenterViews(size=self.encoder.image_size)

    def count_chosen(self, images: int) -> int:
        """Number of chosen images."""
        return max(1, round(images * self.image_share))

    def count_rows(self, images: int) -> int:
        """Number of kept features of the chosen images."""
        height, width = self.encoder.grid
        features = images * self.seen.count * height * width
        return min(self.rows or features, features)


def identify_weights(config: ExtractConfig, path: Path) -> str:
    """SHA-256 of the weight file."""
    if not isinstance(config.encoder, Dinov2Config):
        raise UsageError(f"extract was given {path}, but {config.encoder.kind} is fitted and reads no weights")
    return identify_file(path)


def weights_place(config: ExtractConfig) -> HubWeights | None:
    """Where the published weights come from; None for an encoder that is fitted."""
    return (config.hub or default_place(config.encoder)) if isinstance(config.encoder, Dinov2Config) else None


def foresee(config: ExtractConfig, inputs: KnownInputs) -> Facts:
    """The features are those of all views of the chosen images."""
    check_seen(config.seen, inputs, "images")
    check_rgb(config.encoder, "encoder", inputs)
    facts = inputs["images"].only("images", "classes", "class_names", "listed")
    if "images" in facts:
        facts["images"] = config.count_chosen(facts["images"])
        facts["rows"] = config.count_rows(facts["images"])
    if config.image_share < 1:
        facts.pop("listed", None)
    return {
        **facts,
        "views": config.seen.count,
        "grid": config.encoder.grid,
        "pixels": config.encoder.image_size,
        "accepts": config.encoder.accepts,
    }


@dataclass(frozen=True)
class ExtractSpec:
    """The arguments of a shard. indexed: number of images in the image set."""

    config: ExtractConfig
    images: ImagesAt
    indexed: int
    encoder: Path
    encoder_digest: str
    device: str
    features: ArraySpec


@stage(
    "extract",
    version=2,
    config=ExtractConfig,
    reads={"images": read("image-set", help="image set to describe")},
    writes="features",
    example="smalti extract --images digits:train",
    externals={
        "weights": External(
            help="weight file of dinov2 (.safetensors or .pth); without it the hub is asked",
            identify=identify_weights,
            needed=lambda config: False,
            place=weights_place,
            otherwise="use the encoder whitened-patches, which is fitted on the images",
            is_file=True,
        )
    },
    digits_defaults=("encoder.image_size",),
    foresees=foresee,
)
def extract_features(config: ExtractConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn every image into a grid of features; or, with image_share and rows, keep some features of some images.

    reads: an image set; for dinov2 a weight file.  writes: a zarr group of features and labels (docs/artifacts.md), and
    the encoder with its weights.  resumes: the encoder first, then shard by shard.
    """
    image_set = ImageSet.open(inputs["images"].path)
    source = ImagesAt.of(inputs["images"])
    if not out.is_done("encoder"):
        out.put("encoder", encoder_files(config, source, len(image_set), run))
    spec = make_spec(config, source, len(image_set), out, run.device)
    shards = [spec.features.shard_range(shard) for shard in range(spec.features.shards)]
    unit, size = ("features", 1) if config.rows else ("images", config.seen.count)
    sizes = [(stop - start) // size for start, stop in shards]
    map_shards(out, run, extract_shard, spec, sizes, label="features", unit=unit)
    write_metadata(out, spec, image_set)
    describe(out, spec)


def choose_images(config: ExtractConfig, indexed: int) -> NDArray[np.int64]:
    """The images that are encoded, by their numbers in the image set, ascending."""
    return smallest_rows(indexed, config.count_chosen(indexed), seed=config.seed, stream=IMAGES)


@cached(2)
def choose_rows(config: ExtractConfig, indexed: int) -> NDArray[np.int64]:
    """The features that are kept, ascending: numbers in the list of all features of all views of the chosen images."""
    images = config.count_chosen(indexed)
    height, width = config.encoder.grid
    features = images * config.seen.count * height * width
    return smallest_rows(features, config.count_rows(images), seed=config.seed, stream=ROWS)


def encoder_files(config: ExtractConfig, source: ImagesAt, indexed: int, run: Runtime) -> dict[str, bytes]:
    """The encoder's config and weights: fitted on all views of the chosen images in their order, or published."""
    from safetensors.torch import save

    if isinstance(config.encoder, WhitenedPatchesConfig):
        state = fit_patches(config, source, choose_images(config, indexed), run)
    else:
        state = published_weights(config.encoder, run.paths["weights"])
    description = canonical_bytes(config_value(config.encoder)) + b"\n"
    return {ENCODER: description, ENCODER_WEIGHTS: save({name: value.contiguous() for name, value in state.items()})}


def fit_patches(
    config: ExtractConfig, source: ImagesAt, images: NDArray[np.int64], run: Runtime
) -> dict[str, torch.Tensor]:
    """Statistics of the patches of all views, on the CPU in float64; NumericError if they come out non-finite."""
    import torch

    from models.encoders.whitened_patches import WhitenedPatchesFit

    assert isinstance(config.encoder, WhitenedPatchesConfig)
    fitting = WhitenedPatchesFit(config.encoder)
    rows = len(images) * config.seen.count
    with threads(1), run.progress.bar("fitting", total=rows, unit="views") as bar:
        for seen in view_passes(source, images.tolist(), views=config.seen, rows=config.rows_per_pass):
            fitting.add(to_images(seen.rows_RSS3[: seen.real], torch.device("cpu")))
            bar.advance(seen.real)
        state = fitting.finish()
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise NumericError("the images do not vary, so no patches can be whitened", hint="give more than one image")
    return state


def make_spec(config: ExtractConfig, source: ImagesAt, indexed: int, out: Draft, device: str) -> ExtractSpec:
    digest = hash_file(out.path / ENCODER_WEIGHTS)
    encoder: Any = load_encoder(out.path, digest, device)
    images = config.count_chosen(indexed)
    rows = config.count_rows(images) if config.rows else images * config.seen.count
    chunk_rows = -(-config.chunk_images * rows // images)
    features = ArraySpec(
        shape=(rows, *(() if config.rows else config.encoder.grid), encoder.dims),
        dtype=config.dtype,
        chunk_rows=chunk_rows,
        shard_rows=config.shard_images // config.chunk_images * chunk_rows,
        dimension_names=("row", "value") if config.rows else ("row", "y", "x", "value"),
    )
    return ExtractSpec(config, source, indexed, out.path, digest, device, features)


def extract_shard(spec: ExtractSpec, number: int) -> dict[str, bytes]:
    """The features of one shard; NumericError names the first image whose features are not finite."""
    start, stop = spec.features.shard_range(number)
    with threads(1):
        network = load_encoder(spec.encoder, spec.encoder_digest, spec.device)
        encode = partial(encode_rows if spec.config.rows else encode_images, spec, network)
        features, images = encode(start, stop)
    stored = store_as(features, spec.config.dtype)
    check_finite(stored, spec, images)
    name, data = encode_shard(spec.features, number, stored)
    return {f"features/{name}": data}


def encode_images(
    spec: ExtractSpec, network: torch.nn.Module, start: int, stop: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Views start to stop of the chosen images: their features (N, h, w, D), and the image of each."""
    views = spec.config.seen
    images = choose_images(spec.config, spec.indexed)[start // views.count : stop // views.count]
    passes = view_passes(spec.images, images.tolist(), views=views, rows=spec.config.rows_per_pass)
    return run_passes(network, passes, device=pick_device(spec.device)), np.repeat(images, views.count)


def encode_rows(
    spec: ExtractSpec, network: torch.nn.Module, start: int, stop: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Kept features start to stop (N, D), and the image of each; images of which none is kept are not encoded."""
    views = spec.config.seen
    height, width = spec.config.encoder.grid
    per_image = views.count * height * width
    rows = choose_rows(spec.config, spec.indexed)[start:stop]
    near, place = np.unique(rows // per_image, return_inverse=True)
    images = choose_images(spec.config, spec.indexed)[near]
    wanted, first, kept = place * per_image + rows % per_image, 0, []  # among the features of these images
    passes = view_passes(spec.images, images.tolist(), views=views, rows=spec.config.rows_per_pass)
    for features_RhwD in pass_results(network, passes, device=pick_device(spec.device)):
        found_ND = features_RhwD.reshape(-1, features_RhwD.shape[-1])
        here = slice(*np.searchsorted(wanted, (first, first + len(found_ND))))
        kept.append(found_ND[wanted[here] - first])
        first += len(found_ND)
    return np.concatenate(kept), images[place]


def store_as(features: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is then refused by name
        return features.astype(dtype)


def check_finite(features: NDArray[Any], spec: ExtractSpec, images: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(~np.isfinite(features).reshape(len(features), -1).all(1))
    if len(bad):
        raise NumericError(
            f"the features of image {spec.images.open().keys[int(images[bad[0]])]} are not finite in {spec.config.dtype} "
            f"({len(bad)} of {len(features)} {'features' if spec.config.rows else 'views'} of this shard)",
            hint="check the encoder's weights" + (", or use dtype float32" if spec.config.dtype == "float16" else ""),
        )


def write_metadata(out: Draft, spec: ExtractSpec, image_set: ImageSet) -> None:
    """Labels, what was chosen, and the metadata of the group, after the shards."""
    config, images = spec.config, choose_images(spec.config, spec.indexed)
    beside: dict[str, NDArray[Any]] = {"labels": np.asarray(image_set.labels, np.int32)[images]}
    beside |= {"images": images} if config.image_share < 1 else {}
    beside |= {"rows": choose_rows(config, spec.indexed)} if config.rows else {}
    axes = {"rows": "row"}
    specs = {
        name: ArraySpec(
            shape=values.shape,
            dtype=str(values.dtype),
            chunk_rows=len(values),
            dimension_names=(axes.get(name, "image"),),
        )
        for name, values in beside.items()
    }
    for name, values in beside.items():
        if not out.is_done(name):
            file, data = encode_shard(specs[name], 0, values)
            out.put(name, {f"{name}/{file}": data})
    if not out.is_done("metadata"):
        out.put("metadata", group_files({}, {"features": spec.features, **specs}))


def describe(out: Draft, spec: ExtractSpec) -> None:
    config = spec.config
    height, width = config.encoder.grid
    rows, dims = spec.features.shape[0], spec.features.shape[-1]
    images = config.count_chosen(spec.indexed)
    out.facts |= {
        "images": images,
        "views": config.seen.count,
        "grid": [height, width],
        "dims": dims,
        "encoder": config.encoder.kind,
        "image_size": config.encoder.image_size,
        **({"rows": rows} if config.rows else {}),
        **({"accepts": list(config.encoder.accepts)} if len(config.encoder.accepts) > 1 else {}),
    }
    of = f"{rows:,} of {images * config.seen.count:,}" if config.rows else f"{rows:,}"
    out.figure = f"{of} x {height} x {width} features of {dims} values ({config.encoder.kind})"
