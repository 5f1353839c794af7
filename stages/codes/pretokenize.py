"""`pretokenize`: every view of every image to codes, as a token set for reuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import UsageError
from pipeline.images import ImageSet, Views, digest_listing
from pipeline.images.views import CenterViews, DrawnViews
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from smalti.arrays import MappedArray
from smalti.attributes import TokenAttributes
from stages.codes.code_usage import CodeUsage
from stages.codes.token_files import ShardSizes, TokenLayout, write_labels_and_cards
from stages.codes.tokenizing import check_codes_fit, load_encodes
from stages.devices import pick_device, threads
from stages.images.checks import check_seen
from stages.images.passes import ImagesAt, run_passes, view_passes
from stages.weights.cards import TokenizerCard
from stages.weights.networks import NetworkFile

# I images, C crops (views), T codes of one view
COLOUR = "RGB; transparency over white; colour profiles ignored"
DIGITS = {
    "name": "Optical Recognition of Handwritten Digits (UCI), as bundled with scikit-learn",
    "licence": "CC-BY-4.0",
    "terms_url": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
}


class Provenance(Config):
    """Source and licence of the images, for the card of the token set; known for the digits."""

    source: str | None = Field(default=None, description="name of the images' dataset")
    source_licence: str | None = Field(default=None, description="licence of the images")
    terms_url: str | None = Field(default=None, description="where the terms of the images stand")
    licence: str | None = Field(default=None, description="licence of the token set")


class PretokenizeConfig(ShardSizes):
    """The views that are tokenized, and the shards of the token set."""

    views: Views | None = Field(
        default=None, description="views of each image; null: the centre view at the tokenizer's size"
    )
    name: str | None = Field(default=None, description="name of the token set; null: that of the images' source")
    provenance: Provenance = Field(default=Provenance(), description="what the card says about the images")
    rows_per_pass: int = Field(default=64, ge=1, description="views per forward pass")


@dataclass(frozen=True)
class TokenizeSpec:
    """The arguments of a shard."""

    layout: TokenLayout
    images: ImagesAt
    tokenizer: NetworkFile
    views: Views
    rows_per_pass: int


def foresee(config: PretokenizeConfig, inputs: KnownInputs) -> Facts:
    """The codes are the tokenizer's, the labels those of the images."""
    images, tokenizer = inputs["images"], inputs["tokenizer"]
    if config.views is None and tokenizer.facts.get("pixels", 0) is None:
        raise inputs.refusal(f"has no views, and {tokenizer.name} does not record its image size: set views.size")
    pixels = config.views.size if config.views else tokenizer.get("pixels")
    seen = config.views or (CenterViews(size=pixels) if pixels else None)
    grid = None
    if seen is not None:
        check_seen(seen, inputs, "images")
        grid = check_codes_fit(seen, tokenizer, inputs)
    found = {
        **images.only("images", "classes", "class_names", "listed"),
        **tokenizer.only("tokenizer", "codes"),
        "crops": seen.count if seen else 1,
        "grid": grid,
        "pixels": pixels,
    }
    return {name: fact for name, fact in found.items() if fact is not None}


@stage(
    "pretokenize",
    version=2,
    config=PretokenizeConfig,
    reads={
        "images": read("image-set", help="images to turn into codes"),
        "tokenizer": read("tokenizer", "codebook", help="what turns them into codes"),
    },
    writes="token-set",
    example="smalti pretokenize --images digits:train --tokenizer digits/rar/codebook",
    foresees=foresee,
    checks_inputs=True,
)
def pretokenize(config: PretokenizeConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn every view of every image into codes.

    reads: an image set, and a tokenizer or a codebook.  writes: a token set (see docs/artifacts.md).  resumes: shard by
    shard; labels, keys, metadata and cards follow.
    """
    image_set = ImageSet.open(inputs["images"].path)
    tokenizer = TokenizerCard.of(inputs["tokenizer"])
    views = seen_views(config, tokenizer)
    layout = make_layout(config, views, image_set, tokenizer, out.request.key)
    spec = TokenizeSpec(
        layout,
        ImagesAt.of(inputs["images"]),
        NetworkFile.of(inputs["tokenizer"], run.device),
        views,
        config.rows_per_pass,
    )
    map_shards(out, run, tokenize_shard, spec, layout.sizes, label="codes")
    write_labels_and_cards(out, layout, image_set.labels, image_set.keys)
    describe(out, layout.attributes)


def seen_views(config: PretokenizeConfig, tokenizer: TokenizerCard) -> Views:
    """The views that become codes; UsageError where neither the config nor the tokenizer says their size."""
    if config.views is not None:
        return config.views
    if tokenizer.pixels is None:
        raise UsageError(f"{tokenizer.name} does not record its image size", hint="set views.size")
    return CenterViews(size=tokenizer.pixels)


def make_layout(
    config: PretokenizeConfig, views: Views, image_set: ImageSet, tokenizer: TokenizerCard, key: str
) -> TokenLayout:
    """The token set's attributes and shards, which are known before the first code."""
    source = describe_source(config.provenance, image_set)
    attributes = TokenAttributes(
        name=config.name or image_set.source.kind,
        split=image_set.source.split or None,
        n_images=len(image_set),
        n_crops=views.count,
        grid=tokenizer.grid(views.size),
        codes=tokenizer.codes,
        classes=len(image_set.classes),
        class_names=tuple(image_set.classes),
        tokenizer=tokenizer.identity,
        resolution=views.size,
        resize_filter=getattr(views, "filter", "halving by box, then bicubic (ADM)"),
        value_range=(0.0, 1.0),
        crops=tuple(views.describe()),
        exif=image_set.decode_policy.exif,
        colour=COLOUR,
        source=source,
        licence=config.provenance.licence or source.get("licence"),
        created_by=key,
    )
    longest = max(len(name.encode()) for name in image_set.keys)
    return TokenLayout(
        attributes, longest, config.shard_images, config.chunk_images, has_boxes=isinstance(views, DrawnViews)
    )


def describe_source(provenance: Provenance, image_set: ImageSet) -> dict[str, str]:
    """{name, licence, terms_url, files_sha256} of the images, as far as known."""
    known = dict(DIGITS) if image_set.source.kind == "digits" else {}
    given = {
        "name": provenance.source,
        "licence": provenance.source_licence,
        "terms_url": provenance.terms_url,
        "files_sha256": digest_listing(image_set.listing),
    }
    return known | {name: value for name, value in given.items() if value is not None}


def tokenize_shard(spec: TokenizeSpec, number: int) -> dict[str, bytes]:
    """The codes of one shard."""
    start, stop = spec.layout.shard_range(number)
    with threads(1):
        tokenizer = load_encodes(spec.tokenizer)
        boxes = Boxes(spec.views)
        passes = view_passes(spec.images, range(start, stop), views=spec.views, rows=spec.rows_per_pass, met=boxes.note)
        codes_RT = run_passes(
            lambda images_BCHW: tokenizer.encode(images_BCHW).flatten(1),
            passes,
            device=pick_device(spec.tokenizer.device),
        )
    files = spec.layout.shard(number, codes_RT.reshape(stop - start, spec.views.count, -1))
    return files | (spec.layout.box_shard(number, boxes.of(range(start, stop))) if spec.layout.has_boxes else {})


class Boxes:
    """Where random crops lie, noted when their images are decoded: that depends on the size of an image."""

    def __init__(self, views: Views):
        self._views = views
        self._noted: dict[int, NDArray[np.float32]] = {}

    def note(self, index: int, image_HW3: NDArray[np.uint8]) -> None:
        if isinstance(self._views, DrawnViews):
            self._noted[index] = self._views.boxes(image_HW3, index=index)

    def of(self, images: range) -> NDArray[np.float32]:
        """(I, C, 5) of images that were decoded."""
        return np.stack([self._noted[index] for index in images])


def describe(out: Draft, attributes: TokenAttributes) -> None:
    """Facts for later stages, and the usage of the codes."""
    usage = count_codes(MappedArray(out.path / "tokens"), attributes.codes)
    out.facts |= {
        "images": attributes.n_images,
        "crops": attributes.n_crops,
        "grid": list(attributes.grid),
        "codes": attributes.codes,
        "classes": attributes.classes,
        "resolution": attributes.resolution,
        "tokenizer": dict(attributes.tokenizer),
        "used": usage.used,
        "perplexity": usage.perplexity,
    }
    out.figure = f"{attributes.rows:,} x {attributes.tokens} tokens, {usage.sentence}"


def count_codes(tokens: MappedArray, codes: int) -> CodeUsage:
    usage = CodeUsage(codes)
    for shard in range(tokens.spec.shards):
        usage.add(tokens.read_shard(shard))
    return usage
