"""`index`: list a source of images (keys, labels, sizes) without copying them.

Images that cannot be used are found here, because later steps rely on the rows of the set: bad images stop the stage
(`decode.corrupt=fail`), or are left out (`skip`), or are excluded by a list (`--exclude`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline import durable
from pipeline.compatibility import Facts, KnownInputs, Origin
from pipeline.config import Config
from pipeline.cores import own_cores
from pipeline.draft import Draft
from pipeline.errors import BadImages, InputError, UsageError
from pipeline.images import (
    DecodePolicy,
    DigitsSource,
    ImageSet,
    ImageSource,
    Listing,
    Problem,
    describe_left_out,
    digest_listing,
    exclude,
    identify,
    identify_exclusions,
    index_files,
    list_images,
    name_some,
    read_exclusions,
    without,
    write_exclusions,
)
from pipeline.images.digits import CLASSES
from pipeline.keys import NEUTRAL
from pipeline.runtime import Runtime
from pipeline.stage import External, Inputs, stage
from pipeline.trees import Tree
from smalti.counting import counted

MOST_NAMES = 1000  # class names in the manifest; a larger list stays in images.json
BAD_IMAGES = "bad-images.txt"
LEFT_OUT = "left-out.txt"
SKIP = "decode.corrupt=skip"


class IndexConfig(Config):
    """The source of the images, decoding, and checks before they are listed."""

    source: ImageSource = Field(default=DigitsSource.model_validate({}), description="where the images come from")
    decode: DecodePolicy = Field(
        default=DecodePolicy.model_validate({}), description="rules for decoding, and for images that cannot be"
    )
    check: Literal["names", "headers", "pixels"] = Field(
        "headers",
        description="what is read of every file to find bad images: nothing, its header, or all of it "
        "(slow, finds cut files too; always so with decode.corrupt=skip)",
        json_schema_extra=NEUTRAL,
    )
    without: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="images or folders to leave out if they are there, as paths below the folder of the classes",
        json_schema_extra=NEUTRAL,
    )

    @model_validator(mode="after")
    def _lists_files(self) -> IndexConfig:
        if self.without and isinstance(self.source, DigitsSource):
            raise ValueError("without names files, and the source digits has none")
        return self


def identify_images(config: IndexConfig, root: Path) -> str | Tree:
    """The content id of the images below `root`, for the key."""
    need_folder(config, root)
    return identify(config.source, root)


def identify_excluded(config: IndexConfig, file: Path) -> str:
    """The content id of a list of images to leave out, for the key."""
    need_folder(config, file)
    return identify_exclusions(file)


def need_folder(config: IndexConfig, given: Path) -> None:
    if isinstance(config.source, DigitsSource):
        raise UsageError(
            f"index was given {given}, but its source is digits, which reads no files",
            hint="leave --images and --exclude out, or set source.kind=folder",
        )


def foresee(config: IndexConfig, inputs: KnownInputs) -> Facts:
    """All facts of the digits; of a folder those of its index."""
    if isinstance(config.source, DigitsSource):
        return foresee_digits(config.source, inputs)
    return {"listed": inputs.own(inputs.made.files["keys.txt"].sha256 if inputs.made else None)}


def foresee_digits(source: DigitsSource, inputs: KnownInputs) -> Facts:
    names = tuple(str(digit) for digit in range(CLASSES))
    part = f"digits, {source.split} of split {source.split_seed} with {source.held_out} and {source.validation}"
    listed = Origin(inputs.name, digest=part)
    return {
        "images": source.images,
        "classes": len(names),
        "class_names": names,
        "pixels": source.size,
        "listed": listed,
    }


@stage(
    "index",
    version=1,
    config=IndexConfig,
    reads={},
    writes="image-set",
    example="smalti index --set source.kind=digits --set source.split=train",
    externals={
        "images": External(
            help="folder of the images, one folder per class or all in one; alone it means source.kind=folder",
            identify=identify_images,
            needed=lambda config: config.source.kind == "folder",
            implies={"source": {"kind": "folder"}},
        ),
        "exclude": External(
            help="text file of images to leave out: one path below the image folder per line, # begins a comment",
            identify=identify_excluded,
            needed=lambda config: False,
        ),
    },
    foresees=foresee,
)
def index_images(config: IndexConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """List a folder of images, or the embedded digits, as an image set.

    reads: the names and sizes below --images, and of the files what `check`, source.deep or decode.corrupt=skip asks for.
    writes: images.json, keys.txt, labels.npy, sizes.npy, digests.npy, skipped.jsonl.  resumes: from the start.
    """
    root = run.paths.get("images")
    if not out.is_done("index"):
        listing = list_images(config.source, root)
        check_unchanged(listing, out, root)
        if "exclude" in run.paths:
            found, listing = len(listing), exclude(listing, run.paths["exclude"])
            run.progress.say(f"  excluded: {found - len(listing)} of {counted(found, 'image')}")
        listing = leave_out(config, listing, run)
        report_left_out(listing, run)
        images = ImageSet(listing, source=config.source, decode=config.decode, root=root)
        kept, skipped = keep_good(images, find_problems(config, images, run), run)
        out.put("index", index_files(kept, source=config.source, decode=config.decode, skipped=skipped))
    describe(out, ImageSet.open(out.path, root=root), skipped=count_skipped(out))


def check_unchanged(listing: Listing, out: Draft, root: Path | None) -> None:
    """InputError if the folder has changed since the key was computed."""
    wanted = out.request.externals.get("images")
    if wanted is not None and digest_listing(listing) != wanted:
        raise InputError(f"the images below {root} changed while they were indexed", path=root, hint="run it again")


def leave_out(config: IndexConfig, listing: Listing, run: Runtime) -> Listing:
    """The listing without the files that the config names; InputError if nothing is left."""
    kept, found = without(listing, config.without)
    if found:
        run.progress.say(f"  left out, as the config names them: {name_some(sorted(found))}")
    if len(listing) and not len(kept):
        raise InputError(f"without excludes all of the {len(listing)} images", path=run.paths.get("images"))
    return kept


def report_left_out(listing: Listing, run: Runtime) -> None:
    """Report ignored files; the whole list goes to the log."""
    if listing.left_out:
        file = run.log / LEFT_OUT
        durable.write_file(file, "".join(f"{key}\t{rule}\n" for key, rule in listing.left_out).encode())
        run.progress.say(f"  left out: {describe_left_out(listing.left_out)}")


def find_problems(config: IndexConfig, images: ImageSet, run: Runtime) -> list[Problem]:
    """All images that cannot be used, sorted by key: problems of the listing, and of the configured check."""
    found = list(images.listing.problems)
    pixels = config.decode.corrupt == "skip" or config.check == "pixels"
    if isinstance(config.source, DigitsSource) or (config.check == "names" and not pixels):
        return found
    with warnings.catch_warnings(), run.progress.bar("check images", total=len(images), unit="images") as bar:
        warnings.simplefilter("ignore")  # Pillow's, of images that become problems or are fine
        for count, problems in images.problems(pixels=pixels, threads=own_cores()):
            found += problems
            bar.advance(count)
    known = {problem.key: problem for problem in reversed(found)}  # one reason for each
    return [known[key] for key in sorted(known)]


def keep_good(images: ImageSet, problems: Sequence[Problem], run: Runtime) -> tuple[Listing, Sequence[Problem]]:
    """The listing without the problems. Raises BadImages, naming all of them, where they may not be left out."""
    if not problems:
        return images.listing, []
    bad = {problem.key for problem in problems}
    rows = np.array([row for row, key in enumerate(images.keys) if key not in bad], dtype=np.intp)
    refuse_problems(images, problems, left=len(rows), run=run)
    run.progress.say(f"  skipped {len(problems)}, all are in skipped.jsonl: {name_problems(problems)}")
    return replace(images.listing.keep(rows), problems=(), left_out=()), problems


def refuse_problems(images: ImageSet, problems: Sequence[Problem], *, left: int, run: Runtime) -> None:
    """BadImages if the policy does not leave the problems out; a file in the log lists them for --exclude."""
    policy, unread = images.decode_policy, sum(not problem.is_fixed for problem in problems)
    refusal, setting = (
        f"{len(problems)} of {len(problems) + left} images below {images.folder} cannot be used",
        SKIP,
    )
    if policy.corrupt == "skip":
        if 0 < policy.max_skipped < len(problems):
            refusal += f", {policy.max_skipped} may be skipped"
            setting = f"decode.max_skipped={len(problems)}"
        elif unread:
            refusal += f", and {unread} of them cannot be read here, which is not skipped"
            setting = ""
        elif left:
            return
        else:
            setting = ""
    file, excluded = run.log / BAD_IMAGES, run.paths.get("exclude")
    before = list(read_exclusions(excluded)) if excluded is not None else []
    durable.write_file(file, write_exclusions(problems, before).encode())
    raise BadImages(
        f"{refusal}: {name_problems(problems)}", path=file, command=images.command, setting=setting, listed=str(file)
    )


def name_problems(problems: Sequence[Problem]) -> str:
    return name_some([f"{key} {reason}" for key, reason, _ in problems], between="; ")


def count_skipped(out: Draft) -> int:
    report = out.path / "skipped.jsonl"
    return report.read_bytes().count(b"\n") if report.exists() else 0


def describe(out: Draft, images: ImageSet, *, skipped: int) -> None:
    """Facts for later stages and the sentence for the run's table."""
    classes = len(images.classes)
    out.facts |= {
        "images": len(images),
        "classes": classes,
        "source": images.source.kind,
        "split": images.source.split,
    }
    out.figure = f"{counted(len(images), 'image')}, {counted(classes, 'class')}" + (
        f", {skipped} skipped" if skipped else ""
    )
    if classes <= MOST_NAMES:
        out.facts["class_names"] = images.classes
