"""`index`: list a source of images (keys, labels, sizes); the images stay where they are."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import InputError, UsageError
from pipeline.images import (
    DecodePolicy,
    DigitsSource,
    ImageSet,
    ImageSource,
    Listing,
    Skipped,
    content_id,
    digest_listing,
    drop_corrupt,
    index_files,
    list_images,
)
from pipeline.runtime import Runtime
from pipeline.stage import External, Inputs, stage

MOST_NAMES = 1000  # class names in the manifest; a larger list stays in images.json


class IndexConfig(Config):
    """Which images, and how they will be decoded."""

    source: ImageSource = Field(default=DigitsSource.model_validate({}), description="where the images come from")
    decode: DecodePolicy = Field(
        default=DecodePolicy.model_validate({}), description="rules for decoding, and for images that cannot be"
    )


def identify_images(config: IndexConfig, root: Path) -> str:
    """The content id of the images below `root`, for the key."""
    if isinstance(config.source, DigitsSource):
        raise UsageError(
            f"index was given the folder {root}, but its source is digits, which reads none",
            hint="leave --images out, or set source.kind=folder",
        )
    return content_id(config.source, root)


@stage(
    "index",
    version=1,
    config=IndexConfig,
    reads={},
    writes="image-set",
    example="smalti index --set source.kind=digits --set source.split=train",
    externals={
        "images": External(
            help="folder of the images, one folder per class",
            identify=identify_images,
            needed=lambda config: config.source.kind == "folder",
        )
    },
)
def index_images(config: IndexConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """List a folder of images, or the embedded digits, as an image set.

    reads: the names and sizes below --images, and the files themselves if source.deep or decode.corrupt=skip asks for it.
    writes: images.json, keys.txt, labels.npy, sizes.npy, digests.npy, skipped.jsonl.  resumes: from the start.
    """
    root = run.paths.get("images")
    if not out.is_done("index"):
        listing = list_images(config.source, root)
        check_unchanged(listing, out, root)
        listing, skipped = keep_good(config, listing, root, run.threads)
        out.put("index", index_files(listing, source=config.source, decode=config.decode, skipped=skipped))
    describe(out, ImageSet.open(out.path, root=root))


def check_unchanged(listing: Listing, out: Draft, root: Path | None) -> None:
    """InputError if the folder is not what it was when the key was made."""
    wanted = out.request.externals.get("images")
    if wanted is not None and digest_listing(listing) != wanted:
        raise InputError(f"the images below {root} changed while they were indexed", path=root, hint="run it again")


def keep_good(config: IndexConfig, listing: Listing, root: Path | None, threads: int) -> tuple[Listing, list[Skipped]]:
    """Under the policy `skip` decode everything once and leave out what cannot be; else the listing as it is."""
    if config.decode.corrupt != "skip":
        return listing, []
    return drop_corrupt(ImageSet(listing, source=config.source, decode=config.decode, root=root), threads=threads)


def describe(out: Draft, images: ImageSet) -> None:
    """Facts for later stages and for the run's table."""
    classes = len(images.classes)
    out.facts |= {
        "images": len(images),
        "classes": classes,
        "source": images.source.kind,
        "split": images.source.split,
    }
    out.figure = f"{len(images)} images, {classes} classes"
    if classes <= MOST_NAMES:
        out.facts["class_names"] = images.classes
