"""`extract`: patch features of an encoder for every image, in shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.encoders.config import Dinov2Config, EncoderConfig, WhitenedPatchesConfig
from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.durable import hash_file
from pipeline.errors import NumericError, UsageError
from pipeline.images import ImageSet, Views
from pipeline.images.views import CenterViews
from pipeline.keys import canonical_bytes, config_value
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import External, Inputs, read, stage
from smalti.arrays import ArraySpec, encode_shard, group_files
from stages.codes.encoders import ENCODER, ENCODER_WEIGHTS, default_place, load_encoder, published_weights
from stages.codes.token_files import ShardSizes
from stages.devices import pick_device, threads
from stages.images.checks import check_rgb, check_seen
from stages.images.passes import ImagesAt, run_passes, to_images, view_passes
from stages.weights.checkpoint_reader import identify_file
from stages.weights.places import HubWeights

if TYPE_CHECKING:
    import torch

# N rows (views of images), h w grid of features, D values of a feature


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

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.views is not None and self.views.size != self.encoder.image_size:
            raise ValueError(f"views.size {self.views.size} must be the encoder's image_size {self.encoder.image_size}")
        if self.hub is not None and self.encoder.needs_fit:
            raise ValueError(f"hub is for published weights, but {self.encoder.kind} is fitted on the images")
        return self

    @property
    def seen(self) -> Views:
        """The views that are extracted."""
        return self.views or CenterViews(size=self.encoder.image_size)


def identify_weights(config: ExtractConfig, path: Path) -> str:
    """SHA-256 of the weight file."""
    if not isinstance(config.encoder, Dinov2Config):
        raise UsageError(f"extract was given {path}, but {config.encoder.kind} is fitted and reads no weights")
    return identify_file(path)


def weights_place(config: ExtractConfig) -> HubWeights | None:
    """Where the published weights come from; None for an encoder that is fitted."""
    return (config.hub or default_place(config.encoder)) if isinstance(config.encoder, Dinov2Config) else None


def foresee(config: ExtractConfig, inputs: KnownInputs) -> Facts:
    """The features are those of all views of all images."""
    check_seen(config.seen, inputs, "images")
    check_rgb(config.encoder, "encoder", inputs)
    return {
        **inputs["images"].only("images", "classes", "class_names", "listed"),
        "views": config.seen.count,
        "grid": config.encoder.grid,
        "pixels": config.encoder.image_size,
    }


@dataclass(frozen=True)
class ExtractSpec:
    """What a shard needs to know."""

    config: ExtractConfig
    images: ImagesAt
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
    """Turn every image into a grid of features.

    reads: an image set; for dinov2 a weight file.  writes: a zarr group of features (row, y, x, value) and labels, and
    the encoder with its weights.  resumes: the encoder first, then shard by shard.
    """
    image_set = ImageSet.open(inputs["images"].path)
    source = ImagesAt.of(inputs["images"])
    if not out.is_done("encoder"):
        out.put("encoder", encoder_files(config, source, len(image_set), run))
    spec = make_spec(config, source, len(image_set), out, run.device)
    shards = [spec.features.shard_range(shard) for shard in range(spec.features.shards)]
    sizes = [(stop - start) // config.seen.count for start, stop in shards]
    map_shards(out, run, extract_shard, spec, sizes, label="features")
    write_metadata(out, spec.features, image_set)
    describe(out, config, spec.features, image_set)


def encoder_files(config: ExtractConfig, source: ImagesAt, images: int, run: Runtime) -> dict[str, bytes]:
    """The encoder's config and weights: fitted on all views in their order, or published."""
    from safetensors.torch import save

    if isinstance(config.encoder, WhitenedPatchesConfig):
        state = fit_patches(config, source, images, run)
    else:
        state = published_weights(config.encoder, run.paths["weights"])
    description = canonical_bytes(config_value(config.encoder)) + b"\n"
    return {ENCODER: description, ENCODER_WEIGHTS: save({name: value.contiguous() for name, value in state.items()})}


def fit_patches(config: ExtractConfig, source: ImagesAt, images: int, run: Runtime) -> dict[str, torch.Tensor]:
    """Statistics of the patches of all views, on the CPU in float64; NumericError if they come out non-finite."""
    import torch

    from models.encoders.whitened_patches import WhitenedPatchesFit

    assert isinstance(config.encoder, WhitenedPatchesConfig)
    fitting = WhitenedPatchesFit(config.encoder)
    rows = images * config.seen.count
    with threads(1), run.progress.bar("fitting", total=rows, unit="views") as bar:
        for seen in view_passes(source, 0, images, views=config.seen, rows=config.rows_per_pass):
            fitting.add(to_images(seen.rows_RSS3[: seen.real], torch.device("cpu")))
            bar.advance(seen.real)
        state = fitting.finish()
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise NumericError("the images do not vary, so no patches can be whitened", hint="give more than one image")
    return state


def make_spec(config: ExtractConfig, source: ImagesAt, images: int, out: Draft, device: str) -> ExtractSpec:
    digest = hash_file(out.path / ENCODER_WEIGHTS)
    encoder: Any = load_encoder(out.path, digest, device)
    views = config.seen.count
    features = ArraySpec(
        shape=(images * views, *config.encoder.grid, encoder.dims),
        dtype=config.dtype,
        chunk_rows=config.chunk_images * views,
        shard_rows=config.shard_images * views,
        dimension_names=("row", "y", "x", "value"),
    )
    return ExtractSpec(config, source, out.path, digest, device, features)


def extract_shard(spec: ExtractSpec, number: int) -> dict[str, bytes]:
    """The features of one shard; NumericError names the first image whose features are not finite."""
    views = spec.config.seen
    start, stop = (row // views.count for row in spec.features.shard_range(number))
    with threads(1):
        network = load_encoder(spec.encoder, spec.encoder_digest, spec.device)
        passes = view_passes(spec.images, start, stop, views=views, rows=spec.config.rows_per_pass)
        features_NhwD = run_passes(network, passes, device=pick_device(spec.device))
    stored_NhwD = store_as(features_NhwD, spec.config.dtype)
    check_finite(stored_NhwD, spec, start)
    name, data = encode_shard(spec.features, number, stored_NhwD)
    return {f"features/{name}": data}


def store_as(features_NhwD: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is then refused by name
        return features_NhwD.astype(dtype)


def check_finite(features_NhwD: NDArray[Any], spec: ExtractSpec, first_image: int) -> None:
    bad = np.flatnonzero(~np.isfinite(features_NhwD).reshape(len(features_NhwD), -1).all(1))
    if len(bad):
        image = first_image + int(bad[0]) // spec.config.seen.count
        raise NumericError(
            f"the features of image {spec.images.open().keys[image]} are not finite in {spec.config.dtype} "
            f"({len(bad)} of {len(features_NhwD)} views of this shard)",
            hint="check the encoder's weights" + (", or use dtype float32" if spec.config.dtype == "float16" else ""),
        )


def write_metadata(out: Draft, features: ArraySpec, image_set: ImageSet) -> None:
    """Labels and the metadata of the group, after the shards."""
    labels = ArraySpec(shape=(len(image_set),), dtype="int32", chunk_rows=len(image_set), dimension_names=("image",))
    if not out.is_done("labels"):
        name, data = encode_shard(labels, 0, image_set.labels)
        out.put("labels", {f"labels/{name}": data})
    if not out.is_done("metadata"):
        out.put("metadata", group_files({}, {"features": features, "labels": labels}))


def describe(out: Draft, config: ExtractConfig, features: ArraySpec, image_set: ImageSet) -> None:
    _, height, width, dims = features.shape
    out.facts |= {
        "images": len(image_set),
        "views": config.seen.count,
        "grid": [height, width],
        "dims": dims,
        "encoder": config.encoder.kind,
        "image_size": config.encoder.image_size,
    }
    out.figure = f"{features.shape[0]:,} x {height} x {width} features of {dims} values ({config.encoder.kind})"
