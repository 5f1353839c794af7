"""Image sources of `index`, which are listed and identified without reading pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.errors import InputError
from pipeline.images.digits import SHA256, DigitsSource, list_digits
from pipeline.images.folders import FolderSource, list_folder
from pipeline.images.listing import Listing, digest_listing
from pipeline.trees import Look, Tree

ImageSource = Annotated[DigitsSource | FolderSource, Field(discriminator="kind")]


def list_images(source: DigitsSource | FolderSource, root: Path | None = None) -> Listing:
    """The listing of a source. `root`: the folder of the images, for a source that needs one (else InputError)."""
    if isinstance(source, DigitsSource):
        return list_digits(source)
    return list_folder(source, need_root(root))


def identify(source: DigitsSource | FolderSource, root: Path | None = None) -> str | Tree:
    """The content id of a source for keys: of the digits the SHA-256 of the bundled data, of a folder that of its list."""
    if isinstance(source, DigitsSource):
        return SHA256
    given = need_root(root)
    return Tree(given / source.split, f"images, deep {source.deep}", lambda: look_at(source, given))


def look_at(source: FolderSource, root: Path) -> Look:
    """Digest of the list of all images. A folder with problems is not remembered: their repair may not change its time."""
    listing = list_folder(source, root)
    return Look(digest_listing(listing), {} if listing.problems else listing.folders)


def need_root(root: Path | None) -> Path:
    if root is None:
        raise InputError(
            "the image set needs the folder of its images, but none is given", hint="give it with --images"
        )
    return root
